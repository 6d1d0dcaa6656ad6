"""Parcels: what is packed comes out as it was, twice is as good as once, and nothing is overwritten or let in."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
import tarfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from stores import files
from test_cli import call, refused

from sdecor._files import locked
from sdecor.config import Run
from sdecor.parcels import merge, pack
from sdecor.store import Record, Store

SHAPE = {"channels": 1, "num_classes": 10, "image_size": 28}
WEIGHTS = safetensors.torch.save({"w": torch.arange(3.0)})
RUNS = [Run.of(data="digits", method=m, seed=s) for m in ("standard", "decorrelation") for s in (0, 1)]


def record(run: Run, accuracy: float = 0.9, **changed: Any) -> Record:
    metrics = {"accuracy": accuracy, "undefined": math.nan}
    made = Record(run, metrics, {"loss_total": [2.0, 1.0]}, SHAPE, {"device": "CPU", "date": "2026-01-01"}, "")
    return replace(made, weights_sha256=hashlib.sha256(WEIGHTS).hexdigest(), **changed)


def store(root: Path, *runs: Run) -> Store:
    """A store with a record, weights and an exhibit of every run."""
    made = Store(root)
    for run in runs:
        made.write(record(run), WEIGHTS, {"saliency": torch.full((2, 4, 4), run.seed / 10).half()})
    return made


def contents(of: Store) -> dict[str, bytes]:
    return {name: (of.root / name).read_bytes() for name in files(of)}


def tar(path: Path, named: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as made:
        for name, content in named.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return path


def name(run: Run, kind: str = "results", suffix: str = ".json") -> str:
    return f"{kind}/digits/{run.key}{suffix}"


def text(made: Record) -> bytes:
    return made.to_json().encode()


def untouched(home: Store, source: Path, before: dict[str, bytes]) -> str:
    """The error of a merge that must not change anything."""
    with pytest.raises(ValueError) as caught:
        merge(source, home)
    assert contents(home) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the way there and back -----------------------------------------------------------------------------------------


def test_what_was_packed_arrives_as_it_was_and_once(tmp_path: Path) -> None:
    here, home = store(tmp_path / "here", *RUNS), Store(tmp_path / "home")
    assert pack(RUNS, here, tmp_path / "out", "plan-cpu") == [tmp_path / "out" / "plan-cpu.tar"]
    taken = merge(tmp_path / "out", home)
    assert (taken.known, taken.files, taken.failed, taken.left, taken.differ) == (0, 4, 0, [], [])
    assert sorted(r.run.key for r in taken.new) == sorted(run.key for run in RUNS)
    arrived = contents(home)
    assert arrived == {n: c for n, c in contents(here).items() if not n.startswith("weights")}
    assert home.exhibit(RUNS[1])["saliency"].unique().item() == pytest.approx(0.1, abs=1e-3)
    stamps = [(home.root / n).stat().st_mtime_ns for n in arrived]
    again = merge(tmp_path / "out", home)
    assert (again.new, again.known, again.files, again.failed, again.left, again.differ) == ([], 4, 0, 0, [], [])
    assert [(home.root / n).stat().st_mtime_ns for n in arrived] == stamps and contents(home) == arrived


def test_from_a_store_a_tar_a_folder_of_tars_and_a_compressed_tar(tmp_path: Path) -> None:
    here = store(tmp_path / "here", *RUNS)
    pack(RUNS[:2], here, tmp_path / "out", "one")
    pack(RUNS[2:], here, tmp_path / "out", "two")
    whole = contents(here)
    light = {n: c for n, c in whole.items() if not n.startswith("weights")}
    tar(tmp_path / "all.tar.gz", {f"./somewhere/runs/{n}": c for n, c in whole.items()})
    expected = {
        "here": whole,
        "out": light,
        "out/one.tar": {n: c for n, c in light.items() if any(run.key in n for run in RUNS[:2])},
        "all.tar.gz": whole,
    }
    for source, wanted in expected.items():
        home = Store(tmp_path / "home of" / source.replace("/", "-"))
        taken = merge(tmp_path / source, home)
        assert contents(home) == wanted and taken.left == [], source
    assert merge(here.root, here).known == 4 and contents(here) == whole  # into itself


def test_two_stores_that_overlap_make_their_union(tmp_path: Path) -> None:
    both = store(tmp_path / "a", *RUNS[:3]), store(tmp_path / "b", *RUNS[1:])
    for shelf, runs in zip(both, (RUNS[:3], RUNS[1:]), strict=True):
        pack(runs, shelf, tmp_path / "out", shelf.root.name)
    home, other = Store(tmp_path / "home"), Store(tmp_path / "other")
    merge(tmp_path / "out", home)
    for volume in ("b.tar", "a.tar"):
        merge(tmp_path / "out" / volume, other)
    union = {n: c for n, c in {**contents(both[0]), **contents(both[1])}.items() if not n.startswith("weights")}
    assert contents(home) == contents(other) == union
    assert len(list(home.records())) == 4


def test_volumes_hold_whole_runs(tmp_path: Path) -> None:
    here = store(tmp_path / "here", *RUNS)
    volumes = pack(RUNS, here, tmp_path / "out", "p", largest=12_000)
    assert [path.name for path in volumes] == ["p.tar", "p.2.tar"]
    for path in volumes:
        with tarfile.open(path) as held:
            names = held.getnames()
        keys = {Path(n).stem for n in names}
        assert sorted(names) == sorted(
            f for key in keys for f in (f"results/digits/{key}.json", f"exhibits/digits/{key}.safetensors")
        )
        home = Store(tmp_path / "home")
        assert (len((taken := merge(path, home)).new), taken.left) == (len(keys), [])
    assert len(list(home.records())) == 4 and home.exhibit(RUNS[0])
    assert len(pack(RUNS, here, tmp_path / "out", "p", largest=1)) == 4  # none is too small for one run
    assert pack(RUNS[:1], here, tmp_path / "out", "p") == [tmp_path / "out" / "p.tar"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["p.tar"]  # those of before would come back
    assert [r.run for r in merge(tmp_path / "out", Store(tmp_path / "one")).new] == RUNS[:1]


def test_a_parcel_of_nothing(tmp_path: Path) -> None:
    pack([RUNS[0]], Store(tmp_path / "here"), tmp_path / "out", "p")
    taken = merge(tmp_path / "out", Store(tmp_path / "home"))
    assert (taken.new, taken.known, taken.left) == ([], 0, [])
    assert not (tmp_path / "home").exists()


def test_the_note_of_a_broken_run_arrives_once(tmp_path: Path) -> None:
    here, home = store(tmp_path / "here", RUNS[0]), Store(tmp_path / "home")
    here.fail(RUNS[1], "loss is nan")
    pack(RUNS, here, tmp_path / "out", "p")
    assert merge(tmp_path / "out", home).failed == 1
    assert home.failure(RUNS[1]) == "loss is nan" and home.record(RUNS[1]) is None
    here.fail(RUNS[1], "loss is inf")  # said otherwise, it is the same run that broke down
    pack(RUNS, here, tmp_path / "out", "p")
    assert merge(tmp_path / "out", home).failed == 0
    assert home.failure(RUNS[1]) == "loss is nan"


def test_no_note_comes_where_the_run_is_done(tmp_path: Path) -> None:
    home = store(tmp_path / "home", RUNS[0])
    note = tar(tmp_path / "p.tar", {name(RUNS[0], "failed", ".txt"): b"loss is nan\n"})
    taken = merge(note, home)
    assert (taken.failed, taken.left) == (0, [name(RUNS[0], "failed", ".txt")])
    assert not home.failure(RUNS[0])


# --- what contradicts -----------------------------------------------------------------------------------------------


def test_another_result_is_refused_with_both_values_before_anything_is_written(tmp_path: Path) -> None:
    home = store(tmp_path / "home", RUNS[1])
    before = contents(home)
    other = store(tmp_path / "other", RUNS[0])
    for changed, said in (
        ({"accuracy": 0.8}, f"accuracy is 0.9 in {home.root} and 0.8 in {tmp_path / 'out'}"),
        ({"metrics": {"accuracy": 0.9}}, f"undefined is NaN in {home.root} and absent in {tmp_path / 'out'}"),
        ({"curves": {"loss_total": [2.0, 0.5]}}, "loss_total is [2.0, 1.0] in "),
        ({"weights_sha256": "0"}, 'weights_sha256 is "'),
    ):
        made = record(RUNS[1], changed.get("accuracy", 0.9))  # type: ignore[arg-type]
        other.write(replace(made, **{n: v for n, v in changed.items() if n != "accuracy"}))
        pack(RUNS, other, tmp_path / "out", "p")
        message = untouched(home, tmp_path / "out", before)
        assert message.startswith(f"two records of standard, seed 1 ({RUNS[1].key}) contradict each other: {said}")
        assert message.endswith("; remove one of the two")


def test_other_circumstances_of_the_same_result_are_no_contradiction(tmp_path: Path) -> None:
    home, other = store(tmp_path / "home", RUNS[0]), Store(tmp_path / "other")
    other.write(replace(record(RUNS[0]), environment={"device": "CPU", "date": "2026-02-02"}))
    before = contents(home)
    taken = merge(other.root, home)
    assert (taken.new, taken.known) == ([], 1) and contents(home) == before


def test_a_source_that_contradicts_itself(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    tar(tmp_path / "out" / "a.tar", {name(RUNS[0]): text(record(RUNS[0]))})
    tar(tmp_path / "out" / "b.tar", {name(RUNS[0]): text(record(RUNS[0], 0.7))})
    message = untouched(Store(tmp_path / "home"), tmp_path / "out", {})
    assert f"accuracy is 0.9 in {tmp_path / 'out'} and 0.7 in another file of it, {name(RUNS[0])}" in message


def test_an_exhibit_that_is_there_stays(tmp_path: Path) -> None:
    """A page may have added maps of its own."""
    home = store(tmp_path / "home", RUNS[0])
    exhibit = safetensors.torch.save({"saliency": torch.zeros(1)})
    held = {name(RUNS[0]): text(record(RUNS[0])), name(RUNS[0], "exhibits", ".safetensors"): exhibit}
    before = contents(home)
    taken = merge(tar(tmp_path / "p.tar", held), home)
    assert (taken.known, taken.files, taken.differ) == (1, 0, [name(RUNS[0], "exhibits", ".safetensors")])
    assert contents(home) == before


def test_weights_must_be_those_of_their_record(tmp_path: Path) -> None:
    wrong = {name(RUNS[0], "weights", ".safetensors"): b"others"}
    home = store(tmp_path / "home", RUNS[1])
    before = contents(home)
    held = {name(RUNS[0]): text(record(RUNS[0])), **wrong}
    message = untouched(home, tar(tmp_path / "p.tar", held), before)
    about = f"are not those that the record of run {RUNS[0].key} describes"
    assert message == f"weights {name(RUNS[0], 'weights', '.safetensors')} {about}"
    merge(tar(tmp_path / "q.tar", {name(RUNS[0]): text(record(RUNS[0]))}), home)
    before = contents(home)
    untouched(home, tar(tmp_path / "r.tar", wrong), before)  # they came alone, to a record that is there
    right = {name(RUNS[0], "weights", ".safetensors"): WEIGHTS, name(RUNS[0], "tables", ".csv"): b"a,b\n"}
    assert merge(tar(tmp_path / "s.tar", right), home).files == 2
    assert (home.root / name(RUNS[0], "weights", ".safetensors")).read_bytes() == WEIGHTS


# --- what is damaged or foreign -------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_tar_is_refused_wherever_it_ends(tmp_path: Path, compressed: bool) -> None:
    held = {name(run): text(record(run)) for run in RUNS}
    path = tar(tmp_path / ("p.tar.gz" if compressed else "p.tar"), held)
    whole, home = path.read_bytes(), store(tmp_path / "home", RUNS[0])
    before = contents(home)
    with tarfile.open(path) as made:
        ends = [member.offset for member in made] + [made.members[-1].offset_data + made.members[-1].size]
    ends = [0, 1, 511, *ends[1:], *(end + 100 for end in ends[1:]), ends[-1] + 512]
    for end in ends if not compressed else range(0, len(whole) - 1, 97):
        path.write_bytes(whole[:end])
        assert untouched(home, path, before).startswith(f"{path} is not a readable tar file (")
    path.write_bytes(whole)
    assert len(merge(path, home).new) == 3


def test_a_damaged_header_is_not_the_end(tmp_path: Path) -> None:
    path = tar(tmp_path / "p.tar", {name(run): text(record(run)) for run in RUNS})
    with tarfile.open(path) as made:
        third = made.getmembers()[2].offset
    whole = path.read_bytes()
    path.write_bytes(whole[:third] + b"\xff" * 512 + whole[third + 512 :])
    assert "it breaks off" in untouched(Store(tmp_path / "home"), path, {})


def test_records_and_exhibits_must_be_what_their_names_say(tmp_path: Path) -> None:
    home = Store(tmp_path / "home")
    good = {name(RUNS[1]): text(record(RUNS[1]))}
    said = {
        f"record {name(RUNS[0])} describes another run, {RUNS[1].key}": {name(RUNS[0]): text(record(RUNS[1]))},
        f"record {name(RUNS[0])} is not readable (JSONDecodeError: ": {name(RUNS[0]): text(record(RUNS[0]))[:99]},
        f"record {name(RUNS[0])} is not readable ('utf-8' codec ": {name(RUNS[0]): b"\xff\xfe"},
        f"exhibit {name(RUNS[0], 'exhibits', '.safetensors')} is not readable (": {
            name(RUNS[0]): text(record(RUNS[0])),
            name(RUNS[0], "exhibits", ".safetensors"): b"no maps",
        },
    }
    for message, held in said.items():
        assert untouched(home, tar(tmp_path / "p.tar", {**good, **held}), {}).startswith(message)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = pickle.dumps(Evil())
    torch.save({"x": 1}, tmp_path / "plain.pt")
    for kind, suffix in (("results", ".json"), ("exhibits", ".safetensors")):
        untouched(Store("home"), tar(Path("p.tar"), {name(RUNS[0], kind, suffix): evil}), {})
    taken = merge(tar(Path("q.tar"), {name(RUNS[0], "results", ".pkl"): evil, "runs.pt": evil}), Store("home"))
    assert taken.left == [name(RUNS[0], "results", ".pkl"), "runs.pt"]
    assert not Path("executed").exists() and not Path("home").exists()
    pickle.loads(evil)
    assert Path("executed").exists()  # as it would have been


def test_a_name_leads_nowhere_else(tmp_path: Path) -> None:
    """A file goes where its run belongs, whatever its name says before that."""
    (tmp_path / "deep" / "home").mkdir(parents=True)
    home, key = Store(tmp_path / "deep" / "home"), RUNS[0].key
    held = {
        f"../../{name(RUNS[0])}": text(record(RUNS[0])),
        f"{tmp_path}/deep/{name(RUNS[0], 'weights', '.safetensors')}": WEIGHTS,
        f"results/../../{key}.json": text(record(RUNS[0])),
        f"failed/../{RUNS[1].key}.txt": b"note",
        f"../failed/digits/{RUNS[1].key}.txt": b"note",
        f"tables/{tmp_path}/{key}.csv": b"a",
    }
    path = tar(tmp_path / "p.tar", held)
    with tarfile.open(path, "a") as made:
        link = tarfile.TarInfo(name(RUNS[2]))
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    outside = {p for p in tmp_path.rglob("*") if home.root not in p.parents}
    taken = merge(path, home)
    assert {p for p in tmp_path.rglob("*") if home.root not in p.parents} == outside
    wanted = [name(RUNS[0]), name(RUNS[0], "weights", ".safetensors"), name(RUNS[1], "failed", ".txt")]
    assert files(home) == sorted(wanted)
    assert sorted(taken.left) == sorted(
        [
            f"results/../../{key}.json",
            f"failed/../{RUNS[1].key}.txt",
            f"tables/{tmp_path}/{key}.csv",
            f"{name(RUNS[2])} (a link)",
        ]
    )


def test_foreign_files_are_named_and_left(tmp_path: Path) -> None:
    here, home = store(tmp_path / "here", RUNS[0]), Store(tmp_path / "home")
    for foreign in ("README.md", "results/digits/notes.json", f"results/digits/{RUNS[1].key}.json.corrupt"):
        (here.root / foreign).write_text("mine")
    for passing in (f"unfinished/{RUNS[1].key}.pt", f"unfinished/{RUNS[1].key}.lock", f"{name(RUNS[1])}.partial"):
        (here.root / passing).parent.mkdir(exist_ok=True)
        (here.root / passing).write_text("under way")
    lonely = here.root / name(RUNS[2], "exhibits", ".safetensors")
    lonely.write_bytes(safetensors.torch.save({"saliency": torch.zeros(1)}))
    taken = merge(here.root, home)
    foreign = ["README.md", f"results/digits/{RUNS[1].key}.json.corrupt", "results/digits/notes.json"]
    assert sorted(taken.left) == sorted([*foreign, name(RUNS[2], "exhibits", ".safetensors")])
    assert files(home) == sorted(
        name(RUNS[0], k, s)
        for k, s in (("results", ".json"), ("weights", ".safetensors"), ("exhibits", ".safetensors"))
    )


def test_an_exhibit_may_come_after_its_record(tmp_path: Path) -> None:
    here, home = store(tmp_path / "here", RUNS[0]), Store(tmp_path / "home")
    held = {n: c for n, c in contents(here).items() if n.startswith("exhibits")}
    path = tar(tmp_path / "p.tar", held)
    assert merge(path, home).left == list(held) and not files(home)
    home.write(record(RUNS[0]))
    assert (taken := merge(path, home)).files == 1 and not taken.left
    assert home.exhibit(RUNS[0])


# --- the command ----------------------------------------------------------------------------------------------------


def test_several_may_pack_into_one_place(tmp_path: Path) -> None:
    here = store(tmp_path / "here", *RUNS)
    with ThreadPoolExecutor(4) as pool:
        many = [pool.submit(pack, RUNS, here, tmp_path / "out", "p", largest=4000) for _ in range(40)]
        volumes = {tuple(one.result()) for one in many}
    assert len(volumes) == 1 and sorted((tmp_path / "out").iterdir()) == sorted(*volumes)
    home = Store(tmp_path / "home")
    assert len(merge(tmp_path / "out", home).new) == len(RUNS)


def test_a_run_that_is_being_done_is_left_alone(tmp_path: Path) -> None:
    here, home = store(tmp_path / "here", *RUNS[:2]), Store(tmp_path / "home")
    with locked(home.checkpoint(RUNS[0]).with_suffix(".lock")):
        out, _ = call("merge", here.root, "--store", home.root)
        assert f"1 records were not taken, since their runs are being done there: {RUNS[0].key}\n" in out
        assert "\n1 records taken, 0 were there;" in out and home.record(RUNS[0]) is None
    assert merge(here.root, home).new == [here.record(RUNS[0])]
    assert not [name for name in files(home) if name.startswith("unfinished")]


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    here = store(tmp_path / "here", *RUNS[:2])
    (here.root / "README.md").write_text("mine")
    home = tmp_path / "home"
    out, _ = call("merge", here.root, "--store", home)
    runs = sorted(RUNS[:2], key=lambda run: run.key)
    assert out.splitlines() == [
        *(f"{run.key}: standard on digits, seed {run.seed}, test" for run in runs),
        "1 files stay, since they belong to no store or no record, or are notes of runs that were done after all: "
        "README.md",
        "2 records taken, 0 were there; 4 exhibits, tables and weights, 0 notes of broken runs",
    ]
    out, _ = call("merge", here.root, "--store", home)
    assert out.endswith("0 records taken, 2 were there; 0 exhibits, tables and weights, 0 notes of broken runs\n")
    changed = json.loads((home / name(RUNS[0])).read_text())
    (home / name(RUNS[0])).write_text(json.dumps({**changed, "metrics": {"accuracy": 0.1}}))
    assert f"accuracy is 0.1 in {home} and 0.9 in {here.root}" in refused("merge", here.root, "--store", home)
    assert refused("merge", tmp_path / "no", "--store", home) == f"nothing to merge: {tmp_path / 'no'} does not exist"
