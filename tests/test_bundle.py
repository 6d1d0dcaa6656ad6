"""A bundle: what is in it, what it refuses, and that it runs where there is neither the checkout nor a network."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from PIL import Image
from stores import SHAPES
from test_cli import call, refused

from sdecor.bundle import IMPORTS
from sdecor.store import Store

pytestmark = [
    pytest.mark.skipif(os.name != "posix", reason="run.sh is for a shell"),
    pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed"),
]
PLAN = f"""{SHAPES}
[presets.quick]
seeds = 1
[presets.real]
data = "mnist"
data_options = {{}}
"""
# A file of one's own, which run.sh has read: it says which module is there, and whether anything can be reached.
OWN = """
import os, socket
import sdecor

if "PORT" in os.environ:
    import tinywheel
    print("module", sdecor.__file__)
    try:
        socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), timeout=5).close()
        print("network reached")
    except OSError:
        print("network denied")
"""
DENIED = """
import socket

def deny(*_, **__):
    raise OSError("no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = deny
"""


@pytest.fixture(autouse=True)
def in_the_checkout(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (root / ".git").exists():
        pytest.skip("not a checkout of git")
    monkeypatch.chdir(root)
    monkeypatch.delenv("SDECOR_USE", raising=False)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(PLAN, encoding="utf-8")
    return path


@pytest.fixture
def port() -> Iterator[int]:
    """A port of this machine at which somebody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        over = threading.Event()

        def listen() -> None:
            while not over.is_set():
                try:
                    server.accept()[0].close()
                except TimeoutError:
                    continue

        thread = threading.Thread(target=listen)
        thread.start()
        yield server.getsockname()[1]
        over.set()
        thread.join()


def jail(folder: Path) -> tuple[list[str], dict[str, str]]:
    """A command to put in front, and variables, that take the network away: a namespace where this system has them."""
    for words in (["unshare", "-rn"], ["unshare", "-n"]):
        if (
            shutil.which("unshare")
            and not subprocess.run([*words, "true"], capture_output=True, check=False).returncode
        ):
            return words, {}
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(DENIED, encoding="utf-8")  # of Python alone; tar and sh ask for none
    return [], {"PYTHONPATH": str(folder)}


def start(folder: Path, *options: object, front: tuple[str, ...] | list[str] = (), **variables: object) -> Any:
    """Run run.sh from another folder, in an environment that knows next to nothing."""
    away = folder.parent / "away"
    away.mkdir(exist_ok=True)
    plain = {"PATH": os.environ["PATH"], "HOME": away, "PYTHON": sys.executable, "OMP_NUM_THREADS": 1}
    command = [*front, "sh", folder / "run.sh", *options]
    environment = {name: str(value) for name, value in {**plain, **variables}.items()}
    return subprocess.run(
        [str(c) for c in command], cwd=away, env=environment, capture_output=True, text=True, check=False
    )


def fake(path: Path, text: str) -> Path:
    """An interpreter that is none."""
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def wheel(folder: Path, name: str) -> Path:
    """A package of one module, which says where it lies."""
    about = {
        f"{name}.py": "print('wheel', __file__)\n",
        f"{name}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{name}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    about[f"{name}-1.0.dist-info/RECORD"] = "".join(f"{file},,\n" for file in about)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as made:
        for file, text in about.items():
            made.writestr(file, text)
    return path


def folder_of_data(folder: Path) -> Path:
    made = folder / "root" / "MNIST"
    (made / "raw").mkdir(parents=True)
    (made / "raw" / "images").write_bytes(b"images")
    return made


# --- what is in it --------------------------------------------------------------------------------------------------


def test_a_bundle_holds_what_git_tracks_and_what_it_is_told(root: Path, plan: Path, tmp_path: Path) -> None:
    data = folder_of_data(tmp_path)
    with tarfile.open(tmp_path / "more.tar.gz", "w:gz") as tar:
        tar.add(data, "./other/files")
    given = ["--data", data, "--data", tmp_path / "more.tar.gz", "--wheel", wheel(tmp_path, "tinywheel")]
    out, _ = call("bundle", plan, tmp_path / "b", "--preset", "quick", *given)
    made = {p.relative_to(tmp_path / "b").as_posix() for p in (tmp_path / "b").rglob("*") if p.is_file()}
    command = ["git", "ls-files", "sdecor", "pyproject.toml", "LICENSE"]
    tracked = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    others = {"archives/MNIST.tar.gz", "archives/more.tar.gz", "wheels/tinywheel-1.0-py3-none-any.whl"}
    assert made == {f"checkout/{name}" for name in tracked} | others | {"run.sh", "tiny.toml"}
    assert (tmp_path / "b/checkout/sdecor/config.py").read_bytes() == (root / "sdecor/config.py").read_bytes()
    with tarfile.open(tmp_path / "b/archives/MNIST.tar.gz") as tar:
        assert tar.getnames() == ["MNIST", "MNIST/raw", "MNIST/raw/images"]
        assert {(m.uid, m.uname) for m in tar} == {(0, "")}
    rows = re.findall(r"^ +([\d.]+) MiB  (.*)$", out, re.MULTILINE)
    assert {name for _, name in rows} == others | {"run.sh", "tiny.toml", "checkout", "all"}
    assert "no --data" not in out


def test_a_tar_file_has_the_same_files(plan: Path, tmp_path: Path) -> None:
    call("bundle", plan, tmp_path / "b", "--preset", "quick")
    call("bundle", plan, tmp_path / "c.tar", "--preset", "quick")
    with tarfile.open(tmp_path / "c.tar") as tar:
        modes = {member.name: member.mode for member in tar}
        tar.extractall(tmp_path)
    assert modes["c/run.sh"] == 0o755
    for path in (p for p in (tmp_path / "b").rglob("*") if p.is_file()):
        assert (tmp_path / "c" / path.relative_to(tmp_path / "b")).read_bytes() == path.read_bytes()
    assert len(modes) == sum(p.is_file() for p in (tmp_path / "b").rglob("*"))


def test_data_that_no_archive_brings_is_named(plan: Path, tmp_path: Path) -> None:
    out, _ = call("bundle", plan, tmp_path / "b", "--preset", "real")
    assert "not in it, since no --data brings them: mnist; SDECOR_DATA must say where\n" in out


def test_nothing_is_written_beyond_the_limit(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/noise").write_bytes(os.urandom(1 << 20))
    before = sorted(tmp_path.rglob("*"))
    for out in ("b", "b.tar"):
        said = refused("bundle", plan, tmp_path / out, "--preset", "quick", "--data", tmp_path / "root", "--limit", 0.5)
        assert re.fullmatch(
            r"the bundle takes 1\.\d MiB, and its limit is 0\.5: "
            r"run\.sh 0\.0, tiny\.toml 0\.0, checkout 0\.\d, archives/root\.tar\.gz 1\.0",
            said,
        )
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_refused(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*given: object) -> str:
        return refused("bundle", plan, tmp_path / "b", "--preset", "quick", *given)

    text = tmp_path / "note.txt"
    text.write_text("not a tar file")
    assert no("--data", text) == f"data must be a tar file, or a folder of a data root; {text} is neither"
    assert no("--data", tmp_path / "absent").endswith("absent is neither")
    assert no("--wheel", text) == f"wheel must be a file .whl, got {text}"
    assert "'big'" in no("--preset", "big")
    for name in ("one", "two"):
        (tmp_path / name / "MNIST").mkdir(parents=True)
    twice = ["--data", tmp_path / "one" / "MNIST", "--data", tmp_path / "two" / "MNIST"]
    assert no(*twice) == "two files of the bundle would be archives/MNIST.tar.gz; rename one"
    (tmp_path / "b").mkdir()
    assert no() == f"{tmp_path / 'b'} is there already; remove it, or choose another name"
    (tmp_path / "b").rmdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert no().startswith("a bundle is made in a checkout of git; here git says: ")
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run(["git", *"-c user.name=a -c user.email=b commit --quiet --allow-empty -m c".split()], check=True)
    assert no() == f"the checkout {tmp_path} has no sdecor; go to the folder of one that has"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert no() == "git is not installed; a bundle is made in a checkout of git"
    assert not (tmp_path / "b").exists()


# --- what it says at once -------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_a_run_imports_is_known() -> None:
    """All of it, and nothing else: run.sh asks for these before it begins."""
    code = """
        import sys
        from pathlib import Path
        from tempfile import TemporaryDirectory
        import sdecor.__main__
        from sdecor import parcels, planned
        from sdecor._files import locked
        from sdecor.data import load
        load("digits", split="test")
        with TemporaryDirectory() as folder, locked(Path(folder, "x.lock")):
            pass
        print(*{name.split(".")[0] for name in sys.modules})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    lines = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    imported = {"pillow": "PIL", "scikit-learn": "sklearn", "scikit-image": "skimage"}
    direct = {imported.get(name, name) for name in (Requirement(line).name for line in lines)}
    assert direct & set(done.stdout.split()) == {*IMPORTS.values()}


def test_an_interpreter_that_will_not_do_is_named_at_once(plan: Path, tmp_path: Path) -> None:
    call("bundle", plan, tmp_path / "b", "--preset", "quick", "--data", folder_of_data(tmp_path))
    version = "import sys; sys.version_info = (3, 9, 1); sys.version = '3.9.1 (x)'; $2"
    bare = fake(tmp_path / "bare", f'exec "{sys.executable}" -S "$@"')
    old = fake(tmp_path / "old", f'exec "{sys.executable}" -c "{version}"')
    for python, said in (
        (old, f"sdecor needs Python 3.11 or newer, and {old} is 3.9.1; set PYTHON to another"),
        (tmp_path / "no", f"no interpreter '{tmp_path / 'no'}'; set PYTHON to one, 3.11 or newer"),
        (
            bare,
            f"{bare} does not find: {', '.join(sorted(IMPORTS))}; set PYTHON to another interpreter, "
            "or bundle again with --wheel FILE for each",
        ),
    ):
        done = start(tmp_path / "b", PYTHON=python)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {said}\n")
    stale = tmp_path / "stale" / "filelock-3.0.dist-info" / "METADATA"
    stale.parent.mkdir(parents=True)
    stale.write_text("Metadata-Version: 2.1\nName: filelock\nVersion: 3.0\n", encoding="utf-8")
    done = start(tmp_path / "b", PYTHONPATH=tmp_path / "stale")
    assert done.returncode == 2 and " does not find: filelock>=4.2 (there is 3.0); set PYTHON" in done.stderr
    assert not (tmp_path / "b" / "data").exists()


def test_names_that_a_bundle_cannot_have(plan: Path, tmp_path: Path) -> None:
    said = refused("bundle", plan, tmp_path / "b.tar.gz", "--preset", "quick")
    assert said == "a bundle is a folder, or a file whose name ends in .tar; got b.tar.gz"
    assert (
        refused("bundle", plan, tmp_path / "no" / "b", "--preset", "quick")
        == f"no folder {tmp_path / 'no'} to write b into"
    )


def test_a_folder_of_images_is_named_as_what_must_be_there(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    for split in ("train", "test"):
        for kind in ("a", "b"):
            (pictures / split / kind).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(pictures / split / kind / "1.png")
    plan = tmp_path / "own.toml"
    for number, given in enumerate((str(pictures), f"folder:{pictures}")):
        plan.write_text(f'[shared]\ndata = "{given}"\n[arms.standard]\n[presets.quick]\n', encoding="utf-8")
        out, _ = call("bundle", plan, tmp_path / str(number), "--preset", "quick")
        assert f"not in it, and wanted there in the same place: {pictures}\n" in out and "--data" not in out


# --- that it runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_runs_without_checkout_and_network(
    plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int
) -> None:
    (tmp_path / "own.py").write_text(OWN, encoding="utf-8")
    monkeypatch.setenv("SDECOR_USE", str(tmp_path / "own.py"))
    folder = tmp_path / "a bundle"
    given = ["--data", folder_of_data(tmp_path), "--wheel", wheel(tmp_path, "tinywheel")]
    out, _ = call("bundle", plan, folder, "--preset", "quick", *given)
    commit = re.search(r" has the module at (\S+); ", out)
    assert commit is not None
    front, variables = jail(tmp_path / "jail")
    done = start(folder, "--budget", 300, front=front, PORT=port, **variables)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert {line for line in said if line.startswith("module")} == {f"module {folder}/checkout/sdecor/__init__.py"}
    assert {line for line in said if line.startswith("wheel")} == {f"wheel {folder}/packages/tinywheel.py"}
    assert {line for line in said if line.startswith("network")} == {"network denied"}
    assert (folder / "data/MNIST/raw/images").read_bytes() == b"images"
    assert not list(folder.glob("new.*"))

    out, _ = call("merge", folder / "parcel", "--store", tmp_path / "home")
    records = list(Store(tmp_path / "home").records())
    assert sorted(record.run.evaluate_on for record in records) == ["test", "val"]
    assert {record.environment["commit"] for record in records} == {commit[1]}
    assert out.endswith("2 records taken, 0 were there; 1 exhibits, tables and weights, 0 notes of broken runs\n")


@pytest.mark.slow
def test_a_plan_of_the_book_goes_on_where_it_was(tmp_path: Path) -> None:
    call("bundle", "cifar10", tmp_path / "b.tar")
    with tarfile.open(tmp_path / "b.tar") as tar:
        tar.extractall(tmp_path)
    front, variables = jail(tmp_path / "jail")
    options = ["--preset", "quick", "--store", tmp_path / "a store", "--workers", 2]
    results = tmp_path / "a store" / "results"
    first = start(tmp_path / "b", *options, "--budget", 40, front=front, **variables)
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in results.rglob("*.json")}
    assert 0 < len(before), first.stdout
    second = start(tmp_path / "b", *options, front=front, **variables)
    assert second.returncode == 0, second.stderr
    assert "runs done, 0 to do" in second.stdout and "depend" not in second.stdout
    assert all(path.read_bytes() == content for path, content in before.items())
    call("merge", tmp_path / "b" / "parcel", "--store", tmp_path / "home")
    assert len(list(Store(tmp_path / "home").records())) == len(list(results.rglob("*.json"))) >= len(before)
    out, _ = call("plan", "cifar10", "--preset", "quick", "--store", tmp_path / "home")
    assert "runs done, 0 to do" in out and "depend" not in out
