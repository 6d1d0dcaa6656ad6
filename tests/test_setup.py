from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sdecor


@pytest.fixture(scope="module")
def pyproject(root: Path) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def project(pyproject: dict) -> dict:
    return pyproject["project"]


@pytest.fixture(scope="module")
def direct(project: dict) -> list[Requirement]:
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(line) for group in groups for line in group]


@pytest.fixture(scope="module")
def pins(root: Path) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in (root / "constraints.txt").read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def pinned_here(pins: list[Requirement]) -> dict[str, str]:
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    assert len({canonicalize_name(pin.name) for pin in here}) == len(here), "a package is pinned twice"
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in here}


def python(code: str, cwd: Path | None = None) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_pin_is_exact_and_on_the_public_index(pins: list[Requirement]) -> None:
    for pin in pins:
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), f"{pin}: not one public version"


def test_pins_satisfy_the_ranges_of_the_project(direct: list[Requirement], pins: list[Requirement]) -> None:
    versions = pinned_here(pins)
    for requirement in direct:
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), str(requirement)


def test_environment_yml_names_the_same_packages_and_versions(
    root: Path, direct: list[Requirement], pins: list[Requirement]
) -> None:
    *conda, pip = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    assert conda == ["python=3.11", "pip"]
    constraints, *packages, project_itself = pip["pip"]
    assert (constraints, project_itself) == ("-c constraints.txt", "-e .")
    versions = pinned_here(pins)
    assert sorted(packages) == sorted(f"{r.name}=={versions[canonicalize_name(r.name)]}" for r in direct)


def test_binder_gets_the_module_at_the_pins_with_torch_for_the_cpu(root: Path) -> None:
    lines = [line for line in (root / ".binder/requirements.txt").read_text().splitlines() if not line.startswith("#")]
    # pip looks for constraints beside the file that names them, and for the project where Binder calls it: at the root.
    assert lines == ["--extra-index-url https://download.pytorch.org/whl/cpu", "-c ../constraints.txt", "-e ."]
    conda, *_ = yaml.safe_load((root / "environment.yml").read_text())["dependencies"]
    assert (root / ".binder/runtime.txt").read_text().strip() == conda.replace("=", "-")


def test_everything_installed_for_the_project_is_pinned(direct: list[Requirement], pins: list[Requirement]) -> None:
    versions = pinned_here(pins)
    todo, seen = list(direct), set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), *sorted(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        assert key[0] in versions, f"constraints.txt does not pin {requirement.name}"
        try:
            distribution = importlib.metadata.distribution(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra or a platform that this environment does without
        assert distribution.version.split("+")[0] == versions[key[0]], f"{requirement.name} is not at its pin"
        for line in distribution.requires or []:
            child = Requirement(line)
            extras = requirement.extras or {""}
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(child)


def test_every_package_is_installed(root: Path, pyproject: dict, tmp_path: Path) -> None:
    """An editable install, too, knows no others than these."""
    named = pyproject["tool"]["setuptools"]["packages"]
    folders = (p.parent.relative_to(root) for p in (root / "sdecor").rglob("__init__.py"))
    assert sorted(named) == sorted([".".join(folder.parts) for folder in folders] + ["sdecor_book"])
    assert pyproject["project"]["scripts"] == {"sdecor": "sdecor.__main__:main"}
    places = python("import sdecor, sdecor_book; print(sdecor.__file__, sdecor_book.__file__)", cwd=tmp_path).split()
    assert [Path(place).parent for place in places] == [root / "sdecor", root / "book/tools"]


def test_version_is_the_same_everywhere(root: Path, project: dict) -> None:
    citation = yaml.safe_load((root / "CITATION.cff").read_text())
    assert sdecor.__version__ == project["version"] == citation["version"] == importlib.metadata.version("sdecor")


def test_licences_are_named(root: Path) -> None:
    licence = (root / "LICENSE").read_text()
    assert "MIT License" in licence and "CC BY 4.0" in licence
    assert yaml.safe_load((root / "CITATION.cff").read_text())["license"] == ["MIT", "CC-BY-4.0"]


def test_sdecor_alone_imports_neither_torch_nor_torchvision() -> None:
    assert python("import sdecor, sys; print([m for m in sys.modules if m.startswith('torch')])") == "[]\n"


def test_torchvision_is_usable_after_sdecor() -> None:
    code = """
        import sdecor
        import torchvision
        from torchvision import transforms
        print(torchvision.datasets.MNIST.__name__, torchvision.models.resnet18().fc.out_features)
    """
    assert python(code) == "MNIST 1000\n"


@pytest.mark.skipif(sys.platform != "linux", reason="nothing is declared on other systems")
def test_operators_that_exist_are_left_alone() -> None:
    code = """
        import torch
        real = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            real.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            real.impl(name, lambda dets, scores, iou_threshold: scores + 1, "CPU")
        import sdecor
        import torchvision
        result = torch.ops.torchvision.nms(torch.ones(2, 4), torch.ones(2), 0.5)
        print(len(sdecor._torchvision._declared), result.tolist())
    """
    assert python(code) == "0 [2.0, 2.0]\n"


@pytest.fixture
def checkout(root: Path, tmp_path: Path) -> Path:
    """Files of a checkout that make needs, and what stands for Python."""
    (folder := tmp_path / "checkout").mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, folder)
    (tmp_path / "python").write_text(INTERPRETER)
    (tmp_path / "python").chmod(0o755)
    return folder


def make(target: str, checkout: Path) -> tuple[int, list[str]]:
    """Exit code of a target, and the calls of Python."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    (log := checkout / "log").unlink(missing_ok=True)
    command = ["make", target, f"PYTHON={checkout.parent / 'python'}"]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, check=False)
    return done.returncode, log.read_text().splitlines() if log.exists() else []


INTERPRETER = """\
#!/bin/sh
# Stands for Python: notes its arguments, fails where the file "broken" lies, and makes an environment of itself.
echo "$*" >> log
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"-m pip"*) test ! -e broken ;;
esac
"""


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_sets_up_once_and_takes_nothing_half_done_for_done(checkout: Path, tmp_path: Path) -> None:
    def ready(checkout: Path) -> tuple[int, list[str]]:
        code, calls = make("ready", checkout)
        return code, [line.split()[1] for line in calls if line.startswith("-m")]

    everything = ["venv", "pip", "pip", "ipykernel"]
    assert ready(checkout) == (0, everything)
    assert ready(checkout) == (0, [])

    later = (checkout / ".venv/.ready").stat().st_mtime + 5
    os.utime(checkout / "constraints.txt", (later, later))
    (checkout / "broken").touch()
    code, steps = ready(checkout)
    assert code != 0 and steps == ["pip"]
    (checkout / "broken").unlink()
    assert ready(checkout) == (0, everything), "an update that broke off leaves nothing to build on"

    os.utime(checkout / "constraints.txt", (later - 10, later - 10))
    assert ready(checkout) == (0, [])
    now = (checkout / ".venv/.ready").stat().st_mtime + 5
    os.utime(checkout / "pyproject.toml", (now, now))
    assert ready(checkout) == (0, everything[1:]), "a change installs into the environment at hand"

    os.utime(checkout / "pyproject.toml", (later - 10, later - 10))
    assert ready(checkout.rename(tmp_path / "moved")) == (0, everything), "scripts name the path they were made for"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_targets_that_ci_leaves_alone(checkout: Path) -> None:
    """One would change the checkout, the other remove the environment; what `chapters` calls is in test_tools."""
    assert make("ready", checkout)[0] == 0
    assert make("chapters", checkout) == (0, ["-m sdecor_book --stale"])
    kept = {"Makefile", "pyproject.toml", "constraints.txt", "book/build/whitening.md"}
    for name in ("_build/html/index.html", "build/quick/x.ipynb", ".mypy_cache/x", "book/build/whitening.md"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).touch()
    assert make("clean", checkout) == (0, [])
    assert {p.relative_to(checkout).as_posix() for p in checkout.rglob("*") if p.is_file()} == kept
