"""Where data lies: roots, what is present, downloads without a network, and checks of files."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import exactly, fake_mnist

from sdecor import data
from sdecor.data import Request, load
from sdecor.registers import DATASETS
from sdecor.sources import provide


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
    known = ["mnist", "cifar10", "cifar10-jpeg", "caltech101", "imagenet10", "digits", "shapes"]
    assert list(listed) == known == [name for name in DATASETS if name != "folder"]
    assert [s.present for s in listed.values()] == [False] * 5 + [True, True]
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


# What is there in part


@pytest.mark.parametrize(
    ("name", "folder", "problem"),
    [
        ("mnist", "MNIST/raw", "train-images-idx3-ubyte is missing"),
        ("cifar10", "cifar-10-batches-py", "data_batch_1 is missing"),
        ("caltech101", "caltech101/101_ObjectCategories", "holds 0 class folders instead of 101"),
        ("cifar10-jpeg", "cifar10", "train is missing"),
        ("imagenet10", "imagenet10", "train is missing"),
    ],
)
def test_an_empty_folder_is_no_data_set(
    name: str, folder: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Network is unreachable")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    (tmp_path / folder).mkdir(parents=True)
    assert [source.present for source in data.available(tmp_path) if source.name == name] == [False]
    assert data.check(name, tmp_path)[0].endswith(problem)
    title = DATASETS[name].title.replace("(", r"\(").replace(")", r"\)")
    start = f"^{title} under {tmp_path} is not whole \\({tmp_path}/{folder}.{problem}\\) and "
    fetchable = DATASETS[name].download is not None
    with pytest.raises(
        ValueError, match=start + ("could not be downloaded .download=False." if fetchable else "has no download")
    ):
        load(name, tmp_path, **({"download": False} if fetchable else {}))
    if fetchable:
        for function in (data.fetch, lambda name, root: load(name, root)):
            with pytest.raises(ValueError, match=f"{start}could not be downloaded .<urlopen error Network is unreach"):
                function(name, tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir()) == [folder.split("/")[0]]  # nothing is left behind


FILES = {f"{i}.bin": random.Random(i).randbytes(1000) for i in range(6)}


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Callable[[float], None]]:
    """A data set of a few files, each of which takes so many seconds to come."""

    def enter(seconds: float) -> None:
        def download(root: str) -> None:
            with (tmp_path / "downloads").open("a") as log:
                log.write("x")
            (Path(root) / "slow").mkdir()
            for name, content in FILES.items():
                with (Path(root) / "slow" / name).open("wb") as file:
                    for part in (content[:300], content[300:]):
                        file.write(part)
                        file.flush()
                        time.sleep(seconds / 2)

        layout = {
            **{
                "folder": "slow",
                "algorithm": "md5",
                "files": {n: hashlib.md5(c).hexdigest() for n, c in FILES.items()},
            },
            **{"bytes": {name: len(content) for name, content in FILES.items()}},
        }

        @data.dataset("slow", classes=2, download=download, present=lambda r: (r / "slow").is_dir(), layouts=(layout,))
        def _slow(request: Request, *, download: bool = True) -> Any:
            provide("slow", request.root, download=download)
            values = b"".join((request.root / "slow" / name).read_bytes() for name in FILES)
            images = torch.frombuffer(bytearray(values), dtype=torch.uint8)[: 6 * 900].reshape(6, 1, 30, 30)
            return images, torch.arange(6) % 2

    yield enter
    del DATASETS["slow"]


def _load(root: Path, download: bool, answers: Any) -> None:
    try:
        answers.put((download, load("slow", root, download=download).digest))
    except Exception as error:
        answers.put((download, repr(error)))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_second_process_waits_for_a_download(tmp_path: Path, slow: Callable[[float], None]) -> None:
    slow(0.1)
    other = multiprocessing.get_context("fork")
    answers, root = other.SimpleQueue(), tmp_path / "root"
    first = other.Process(target=data.fetch, args=("slow", root))
    first.start()
    while not (root / ".slow.partial" / "slow" / "1.bin").is_file():
        time.sleep(0.01)
    rest = [other.Process(target=_load, args=(root, download, answers)) for download in (True, False)]
    for process in rest:
        process.start()
    seen = set()
    while first.is_alive():
        (source,) = (source for source in data.available(root) if source.name == "slow")
        if source.present:
            assert data.check("slow", root) == []
        seen.add(source.present)
        time.sleep(0.01)
    assert False in seen
    found = dict(answers.get() for _ in rest)
    for process in (first, *rest):
        process.join()
    digest = load("slow", root).digest
    assert found == {True: digest, False: digest}
    assert (tmp_path / "downloads").read_text() == "x"
    assert sorted(path.name for path in root.iterdir()) == ["slow"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_download_is_made_up_for(tmp_path: Path, slow: Callable[[float], None]) -> None:
    slow(0.1)
    other = multiprocessing.get_context("fork")
    killed = other.Process(target=data.fetch, args=("slow", tmp_path))
    killed.start()
    while not (tmp_path / ".slow.partial" / "slow" / "2.bin").is_file():
        time.sleep(0.01)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert data.check("slow", tmp_path) == [f"slow is not under {tmp_path}"]
    with pytest.raises(FileNotFoundError, match="^slow not found under .* could not be downloaded .download=False.; "):
        load("slow", tmp_path, download=False)
    assert data.fetch("slow", tmp_path) == tmp_path
    assert data.check("slow", tmp_path) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["downloads", "slow"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "longer", "all but one"])
def test_a_download_completes_what_is_there_in_part(damage: str, tmp_path: Path, slow: Callable[[float], None]) -> None:
    slow(0)
    whole = load("slow", tmp_path).digest
    own = tmp_path / "slow" / "notes.txt"
    own.write_text("mine")
    for name in list(FILES)[: 5 if damage == "all but one" else 1]:
        path = tmp_path / "slow" / name
        path.unlink() if damage in ("missing", "all but one") else None
        if damage == "truncated":
            os.truncate(path, 999)
        elif damage == "longer":
            path.write_bytes(bytes(1001))
    assert not next(source for source in data.available(tmp_path) if source.name == "slow").present
    assert data.check("slow", tmp_path) != []
    with pytest.raises(
        ValueError, match="^slow under .* is not whole .*0.bin is .* could not be downloaded .download=Fa"
    ):
        load("slow", tmp_path, download=False)
    assert load("slow", tmp_path).digest == whole
    assert data.check("slow", tmp_path) == [] and own.read_text() == "mine"
    (tmp_path / "slow" / "3.bin").write_bytes(bytes(1000))
    assert data.check("slow", tmp_path)[0].startswith(f"{tmp_path}/slow/3.bin has another md5 sum than ")


def test_a_download_that_brings_too_little_is_an_error(tmp_path: Path, slow: Callable[[float], None]) -> None:
    slow(0)
    gone = FILES.pop("5.bin")
    try:
        with pytest.raises(
            ValueError, match="^slow is not whole after a download: .*/slow/5.bin is missing; delete that "
        ):
            data.fetch("slow", tmp_path)
    finally:
        FILES["5.bin"] = gone
