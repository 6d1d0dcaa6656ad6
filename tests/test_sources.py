"""Where data lies: roots, what is present, downloads without a network, and checks of files."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path

import pytest
from pictures import exactly, fake_mnist

from sdecor import data
from sdecor.data import load
from sdecor.registers import DATASETS


@pytest.mark.parametrize(
    ("name", "title"), [("mnist", "MNIST"), ("cifar10", "CIFAR-10"), ("caltech101", "Caltech-101")]
)
def test_no_data_and_no_network_is_said(name: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    message = (
        f"{title} not found under {tmp_path} and could not be downloaded (%s); put the files there, set SDECOR_DATA, "
        "or use data='digits' which needs no download"
    )
    with pytest.raises(FileNotFoundError, match=exactly(message % "download=False")):
        load(name, tmp_path, download=False)
    monkeypatch.setenv("SDECOR_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=exactly(message % "<urlopen error Network is unreachable>")):
        load(name)


def test_the_root_is_the_argument_the_variable_or_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDECOR_DATA", "/elsewhere")
    assert data.data_root("~/x") == Path.home() / "x" and data.data_root() == Path("/elsewhere")
    monkeypatch.delenv("SDECOR_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data.data_root() == Path("/cache/sdecor")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.data_root() == Path.home() / ".cache" / "sdecor"


def test_every_set_says_where_it_comes_from() -> None:
    listed = {source.name: source for source in data.available("/nowhere")}
    known = ["mnist", "cifar10", "caltech101", "imagenet10", "digits", "shapes"]
    assert list(listed) == known == [name for name in DATASETS if name != "folder"]
    assert [s.present for s in listed.values()] == [False, False, False, False, True, True]
    assert all(s.title and s.source and s.licence and s.cite for s in listed.values())
    assert all(DATASETS[name].function.__doc__ and DATASETS[name].classes and DATASETS[name].size for name in known)


def test_what_has_no_download_says_where_it_belongs(tmp_path: Path) -> None:
    message = (
        f"ImageNet, 10 classes not found under {tmp_path} and has no download; put the files there as "
        "imagenet10/train/CLASS/*.jpg and imagenet10/test/CLASS/*.jpg, or set SDECOR_DATA to the folder that holds them"
    )
    with pytest.raises(FileNotFoundError, match=exactly(message)):
        load("imagenet10", tmp_path)
    assert data.check("imagenet10", tmp_path) == [f"ImageNet, 10 classes is not under {tmp_path}"]
    with pytest.raises(ValueError, match="^nothing to fetch for 'imagenet10'; data sets to fetch: mnist, cifar10, "):
        data.fetch("imagenet10", tmp_path)


def test_check_and_fetch_name_what_is_wrong(tmp_path: Path) -> None:
    assert data.check("shapes", tmp_path) == [] == data.check("digits", tmp_path)
    assert data.check("mnist", tmp_path) == [f"MNIST is not under {tmp_path}"]
    raw = fake_mnist(tmp_path)
    assert data.fetch("mnist", tmp_path) == tmp_path  # it is there: no network is touched
    problems = data.check("mnist", tmp_path)
    assert len(problems) == 4 and problems[0].startswith(
        f"{raw}/train-images-idx3-ubyte has another sha256 sum than ba89"
    )
    with pytest.raises(ValueError, match=exactly(f"unknown data set 'x'; known: {', '.join(DATASETS)}")):
        data.check("x")
    with pytest.raises(ValueError, match="^nothing to fetch for 'x'; data sets to fetch: mnist, cifar10, caltech101$"):
        data.fetch("x")
