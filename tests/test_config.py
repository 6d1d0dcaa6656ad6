"""Descriptions: what is equal has one key, what differs has another, and what is impossible is named."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdecor import config
from sdecor.config import Data, Model, Run, Schedule, fingerprint, fitting, flat_fields, flat_options, method_grid
from sdecor.registers import ATTRIBUTIONS, METHODS, TERMS


def test_published_keys_stay_what_they_are() -> None:
    assert Run().key == "44136fa355b3678a"  # of the empty difference
    assert Run.of(method="saliencydecor-signed", seed=3).key == "5998833cfc3d8e8e"
    weights = {"decorrelation": 3}
    assert Run.of(data="mnist", method="decorrelation", weights=weights, lr=8e-3, epochs=6).key == "78563dce9e4895bc"


def test_a_setting_that_comes_later_moves_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys hash what differs from the defaults, so nothing that has its default can matter."""
    run = Run.of(data="mnist", lr=2e-3)
    assert run.difference() == {"data": "mnist", "lr": 2e-3}
    explicit = Run.of(**{name: value for name, value in run.to_dict().items()})
    assert explicit.key == run.key and len(run.to_dict()) == len(flat_fields())


def test_describing_a_run_needs_no_torch() -> None:
    code = "import sys, sdecor.config, sdecor.registers; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def flat(draw: st.DrawFn) -> dict[str, Any]:
    """Flat settings that fit each other."""
    method = draw(st.sampled_from(sorted(METHODS)))
    terms = METHODS[method].terms
    weight = st.floats(0.01, 100) | st.integers(1, 9)
    some: dict[str, Any] = {"fraction": st.floats(0.01, 0.99), "fill": st.sampled_from(["uniform", "mean", "blur"])}
    some |= {"direction": st.sampled_from(["clean_to_masked", "detached", "symmetric"])}
    some |= {"penalty": st.sampled_from(["correlation", "zca", "decov"]), "group_size": st.none() | st.integers(1, 64)}
    some |= {"layers": st.lists(st.text("abc", min_size=1), max_size=3)}
    own = {name for term in terms for name in TERMS[term].options} - METHODS[method].settings.keys()
    own -= {"layers"} if "place" in METHODS[method].settings else set()  # a place is one of the default layers
    out = {
        "data": draw(st.sampled_from(["digits", "mnist", "shapes"])),
        "model": draw(st.sampled_from(["lenet", "package.module:factory"])),
        "method": method,
        "weights": draw(st.fixed_dictionaries({}, optional=dict.fromkeys(terms, weight))),
        "settings": draw(st.fixed_dictionaries({}, optional={n: v for n, v in some.items() if n in own})),
        "seed": draw(st.integers(0, 2**31)),
        "limit": draw(st.none() | st.integers(1, 10**6)),
        "evaluate_on": draw(st.sampled_from(["val", "test"])),
        "epochs": draw(st.integers(1, 999)),
        "lr": draw(st.floats(1e-6, 10) | st.integers(1, 10)),
        "shape": draw(st.sampled_from(["cosine", "one-cycle", "constant"])),
        "clip": draw(st.none() | st.floats(1e-3, 1e3) | st.integers(1, 9)),
        "augment": draw(st.lists(st.sampled_from(["crop", "flip", "cutout"]), max_size=3, unique=True)),
        "permuted_labels": draw(st.booleans()),
        "removed": draw(st.sampled_from([0, 0.0, 0.3])),
    }
    if out["data"] == "shapes":
        out["data_options"] = draw(st.fixed_dictionaries({}, optional={"cue_copies": st.integers(0, 12)}))
    return out


flats = st.composite(flat)()


@settings(max_examples=50, deadline=None)
@given(flats)
def test_a_description_survives_json_copies_and_processes(values: dict[str, Any]) -> None:
    run = Run.of(**values)
    for again in (Run.from_dict(json.loads(json.dumps(run.to_dict()))), pickle.loads(pickle.dumps(run)), run.but()):
        assert again == run and hash(again) == hash(run) and again.to_dict() == run.to_dict()
    assert copy.deepcopy(run) == run


@settings(max_examples=50, deadline=None)
@given(flats, flats)
def test_equal_descriptions_have_equal_keys_and_others_have_not(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = Run.of(**one), Run.of(**other)
    assert (first == second) == (first.key == second.key) == (first.to_dict() == second.to_dict())
    assert Run.of(**dict(reversed(one.items()))).key == first.key


def test_every_setting_that_is_used_changes_the_key() -> None:
    base = Run.of(method="saliencydecor-absolute", settings={"fill": "constant"}, optimizer="sgd")
    others: dict[str, Any] = {
        "data": "mnist", "model": "vit", "method": "saliencydecor-signed", "seed": 1, "evaluate_on": "val", "limit": 9,
        "data_options": {"cue_copies": 3}, "model_options": {"width": 32}, "epochs": 9, "batch_size": 9, "lr": 0.1,
        "weight_decay": 0.1, "optimizer": "adamw", "momentum": 0.5, "shape": "constant", "clip": None,
        "augment": ("flip",), "weights": {"consistency": 0.1}, "permuted_labels": True, "removed": 0.5,
        "curve_images": 9,
        "tuning_epochs": 2, "per_class": 3,
    }  # fmt: skip
    assert {*others, "removed_by", "settings", "fingerprint", "code"} == set(flat_fields())
    wide = base.but(model="resnet18")
    keys = {name: base.but(**{name: value}).key for name, value in others.items() if name != "model_options"}
    keys |= {"removed_by": base.but(removed=0.5, removed_by="random").key, "resnet18": wide.key}
    keys["width"] = wide.but(model_options={"width": 32}).key
    changes: dict[str, Any] = {
        "fraction": 0.1, "fill_value": 1.0, "direction": "detached", "penalty": "zca", "group_size": None,
        "layers": ("conv1",),
    }  # fmt: skip
    for name, value in changes.items():
        keys[name] = base.but(settings={"fill": "constant", name: value}).key
    keys["fill"] = base.but(settings={"fill": "mean"}).key
    assert len({base.key, *keys.values()}) == 1 + len(keys)


def test_the_order_of_options_and_the_type_of_a_number_do_not_matter() -> None:
    one = Run.of(data_options=(("samples", 9), ("cue_copies", 1)), method="noise", weights={"classification": 1})
    assert one == Run.of(
        data_options={"cue_copies": 1, "samples": 9}, method="noise", weights=[["classification", 1.0]]
    )
    assert Run.of(lr=1, clip=5).key == Run.of(lr=1.0, clip=5.0).key
    assert Run.of(augment=("flip", "crop")) == Run.of(augment=("crop", "flip"))
    zero = [Run.of(method="decorrelation", weights={"decorrelation": w}) for w in (0, 0.0, -0.0)]
    assert len({run.key for run in zero}) == 1
    assert Run.of(data_options={"cue_copies": 2}) == Run()  # the default, spelt out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magic"}, f"unknown method 'magic'; known: {', '.join(METHODS)}"),
        ({"evaluate_on": "train"}, "unknown evaluate_on 'train'; known: val, test"),
        (
            {"settings": {"fraction": 1.0}, "method": "consistency-signed"},
            "fraction must be strictly between 0 and 1, got 1.0",
        ),
        ({"settings": {"fraction": 0.3}}, "method 'standard' has no setting 'fraction'; it has: none"),
        ({"weights": 3}, "weights must be names with values, such as {'a': 1}, got 3"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be of type int, got 1.5 (float)"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'; known: adamw, sgd"),
        ({"momentum": 0.5}, "momentum has no effect with optimizer 'adamw'"),
        ({"augment": ("blur",)}, "unknown augment 'blur'; known: crop, flip, cutout"),
        ({"removed": 1}, "removed must leave something, got 1.0"),
        ({"removed": -0.1}, "removed must be from 0 to 1, got -0.1"),
        ({"removed_by": "magic"}, f"unknown removed_by 'magic'; known: {', '.join(ATTRIBUTIONS)}, random"),
        ({"removed_by": "random"}, "removed_by='random' has no effect without removed"),
        (
            {"data": "digits", "fingerprint": "0"},
            "fingerprint belongs to image folders; 'digits' is a data set by name",
        ),
        (
            {"model": "magic"},
            "unknown model 'magic'; known: lenet, cnn_bn, cnn_small, resnet18, vgg11_bn, vit, "
            "or package.module:factory",
        ),
        ({"model_options": {"width": 3}}, "model 'lenet' has no option 'width'; it has: none"),
        ({"learning_rate": 1.0}, f"unknown setting 'learning_rate'; known: {', '.join(flat_fields())}"),
    ],
)
def test_impossible_runs(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Run.of(**values)
    assert str(error.value) == message


def test_schedules_by_hand() -> None:
    steps = 100
    one = [Schedule(shape="one-cycle", lr=2.0).rate(i, steps) for i in range(steps)]
    assert max(one) == one[29] == 2.0 and one[0] == pytest.approx(2 / 30) and one[-1] == pytest.approx(2 / 71)
    cosine = [Schedule(lr=2.0).rate(i, steps) for i in range(steps)]
    assert (
        cosine[4] == 2.0
        and cosine[0] == pytest.approx(0.4)
        and cosine[52] == pytest.approx(1 + math.cos(math.pi * 47 / 95))
    )
    assert {Schedule(shape="constant", lr=2.0).rate(i, steps) for i in range(steps)} == {2.0}


def test_texts_become_values() -> None:
    options = flat_options()
    assert options["epochs"].of_text("3") == 3
    assert options["lr"].of_text("1e-3") == 1e-3
    assert options["limit"].of_text("none") is None
    assert options["clip"].of_text("2") == 2.0
    assert options["method"].of_text("1") == "1"
    assert options["augment"].of_text("crop,flip") == ("crop", "flip") and options["augment"].of_text("") == ()
    for name, text, kind in (("epochs", "1.5", "int"), ("lr", "x", "float"), ("epochs", "none", "int")):
        with pytest.raises(ValueError, match=rf"{name} must be of type {kind}, got "):
            options[name].of_text(text)


def test_a_grid_of_methods_and_seeds() -> None:
    runs = method_grid(range(2), epochs=3)
    alike = ["standard-long"]  # which is standard, unless a plan lets it train for longer
    assert [(r.seed, r.method) for r in runs] == [(s, m) for s in (0, 1) for m in METHODS if m not in alike]
    assert method_grid([0], alike)[0].method == "standard-long"
    assert {r.schedule.epochs for r in runs} == {3}
    assert method_grid(iter([5]), iter(["standard"])) == [Run(seed=5)]
    grid = method_grid([0], weights={"consistency": 3}, settings={"penalty": "zca"})
    assert {r.method for r in grid if dict(r.weights).get("consistency") == 3} == {
        m for m in METHODS if "consistency" in METHODS[m].terms
    }
    assert {r.method for r in grid if dict(r.settings).get("penalty") == "zca"} == {
        m for m in METHODS if "decorrelation" in METHODS[m].terms
    }
    for one, what in (({"weights": {"consistency": 3}}, "weight"), ({"settings": {"fraction": 0.2}}, "setting")):
        name = next(iter(next(iter(one.values()))))
        with pytest.raises(ValueError) as error:
            method_grid([0], ["standard", "decorrelation"], **one)
        assert str(error.value) == f"none of the methods standard, decorrelation takes the {what} '{name}'"


def test_another_method_keeps_what_fits() -> None:
    run = Run.of(method="saliencydecor-signed", weights={"consistency": 3}, settings={"penalty": "zca"})
    other = run.but(method="decorrelation")
    assert dict(other.weights) == {"classification": 1.0, "decorrelation": 1.0}
    assert dict(other.settings)["penalty"] == "zca"
    assert fitting("standard", dict(run.weights), dict(run.settings)) == ({"classification": 1.0}, {})


# --- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "flowers"
    for name in ("train/a/1.png", "train/a/2.png", "train/b/1.png"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def test_spellings_of_one_folder_are_one_run_and_other_folders_are_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    spellings = [
        "folder:flowers",
        "flowers",
        "folder:./flowers/",
        f"folder:{folder}",
        "folder:../" + folder.parent.name + "/flowers",
    ]
    runs = [Run.of(data=spelling) for spelling in spellings]
    assert len({run.key for run in runs}) == 1
    assert str(folder.parent) not in json.dumps(runs[0].to_dict())  # the text is as it was typed
    assert all(run.data.path == folder for run in runs)
    other = folder.parent / "elsewhere" / "flowers"
    shutil.copytree(folder, other)
    assert Run.of(data=f"folder:{other}") == runs[0]  # a copy is the same data, whatever its times
    (other / "train/a/1.png").rename(other / "train/b/2.png")
    monkeypatch.chdir(other.parent)
    assert Run.of(data="folder:flowers") != runs[0]


def test_the_fingerprint_of_a_large_folder_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    small = fingerprint(folder)
    assert not cache.exists()
    monkeypatch.setattr(config, "LONG", 1)
    read: list[str] = []
    content = config._content
    monkeypatch.setattr(config, "_content", lambda files, root: read.append(root) or content(files, root))
    for _ in range(3):
        config._known.cache_clear()  # as in another process
        assert fingerprint(folder) == small
    [kept] = (cache / "sdecor" / "fingerprints").iterdir()
    assert len(read) == 1 and kept.read_text() == small
    next(folder.rglob("*.png")).write_bytes(b"other")
    assert fingerprint(folder) != small and len(read) == 2
    kept.write_text("cut")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # a file where a folder should be
    config._known.cache_clear()
    assert len(fingerprint(folder)) == 16 and len(read) == 3


def test_a_fingerprint_tells_names_and_contents(folder: Path) -> None:
    first = fingerprint(folder)
    os.utime(folder / "train/a/1.png", (1, 1))
    (folder / ".DS_Store").write_bytes(b"x")
    assert fingerprint(folder) == first
    one, two = folder / "train/a/1.png", folder / "train/a/2.png"
    a, b = one.read_bytes(), two.read_bytes()
    assert len(a) == len(b)
    one.write_bytes(b), two.write_bytes(a)  # two pictures of one size change places
    changed = fingerprint(folder)
    assert changed != first
    one.write_bytes(a), two.write_bytes(b)
    assert fingerprint(folder) == first
    (folder / "train/c").mkdir()
    (folder / "train/c/1.png").write_bytes(b"")
    assert fingerprint(folder) not in (first, changed)
    with pytest.raises(FileNotFoundError, match=r"image folder .*nothing does not exist"):
        Run.of(data=f"folder:{folder / 'nothing'}")


def test_links_are_followed_as_loading_follows_them(folder: Path, tmp_path: Path) -> None:
    for name, pictures in (("one", folder / "train"), ("two", folder / "train" / "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train").symlink_to(pictures)
    one, two = (Run.of(data=f"folder:{tmp_path / name}") for name in ("one", "two"))
    assert one.key != two.key


@pytest.mark.parametrize("name", ["", "folder:"])
def test_no_name_is_no_folder(name: str) -> None:
    with pytest.raises(ValueError, match=r"^data must be a data set or an image folder \(folder:PATH\), got "):
        Run.of(data=name)


def test_a_description_is_readable_where_its_folder_is_not(folder: Path) -> None:
    run = Run.of(data=f"folder:{folder}", limit=2)
    text = json.dumps(run.to_dict())
    shutil.rmtree(folder)
    assert Run.from_dict(json.loads(text)).key == run.key


def test_parts_may_be_given_whole() -> None:
    run = Run(data=Data("digits"), model=Model("cnn_bn"), schedule=Schedule(epochs=3))
    assert (
        run == Run.of(data="digits", model="cnn_bn", epochs=3) == Run("digits", "cnn_bn", schedule=Schedule(epochs=3))
    )
