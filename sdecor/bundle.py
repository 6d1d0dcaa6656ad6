"""A plan to carry to a machine without network: the module, the plan, data, wheels, and a script that runs it.

A bundle is a plain folder, or a tar file of one::

    run.sh      sh run.sh [options of `sdecor run`]
    PLAN.toml   as it is here
    checkout/   what git tracks of the module, as it is here, with pyproject.toml and the licence
    archives/   tar files, which run.sh unpacks into a data root, data/
    wheels/     packages that are missing there, which run.sh installs into packages/
    own/        files of your own, as ``SDECOR_USE`` names them
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdecor.config import Data
from sdecor.plan import Course
from sdecor.registers import DATASETS, USE

MIB = 1 << 20
#: What a run imports, beside the standard library, by the name of its package.
IMPORTS = {n: n for n in "click filelock numpy pandas safetensors scipy torch torchvision tqdm".split()}
IMPORTS |= {"pillow": "PIL", "scikit-learn": "sklearn"}
RUN = """\
#!/bin/sh
# Works through a plan where there is no network:  sh run.sh [options of sdecor run, such as --device cuda --workers 4]
# PYTHON chooses the interpreter. Records go to runs/ beside this file and as a parcel to parcel/, unless --store and
# --pack say otherwise. Start it again, and it goes on.
set -eu
here=$(cd "$(dirname "$0")" && pwd -P)
python=${PYTHON:-python3}
new=
trap 'rm -rf "$new"' EXIT
trap 'exit 130' HUP INT TERM

fail() {
  echo "error: $*" >&2
  exit 2
}

# A folder is filled under another name, so that it is whole or absent, even if two jobs do it at a time.
begin() {
  new=$(mktemp -d "$here/new.XXXXXX")
}
finish() {
  "$python" -c 'import os, sys; os.rename(*sys.argv[1:])' "$new" "$here/$1" 2>/dev/null || [ -d "$here/$1" ] ||
    fail "could not make $here/$1"
  rm -rf "$new"
}

case $here in *:*) fail "a path with a colon is none for Python: move $here" ;; esac
command -v "$python" >/dev/null || fail "no interpreter '$python'; set PYTHON to one, 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "sdecor needs Python 3.11 or newer, and $python is" \\
    "$("$python" -c 'import sys; print(sys.version.split()[0])'); set PYTHON to another"

export PYTHONSAFEPATH=1  # what lies in the current folder is not imported
export PYTHONPATH="$here/checkout:$here/packages${PYTHONPATH:+:$PYTHONPATH}"
export SDECOR_COMMIT=@COMMIT@
@SETTINGS@
if [ -d "$here/wheels" ] && [ ! -d "$here/packages" ]; then
  begin
  PIP_DISABLE_PIP_VERSION_CHECK=1 "$python" -m pip install --quiet --no-index --no-deps --target "$new" \\
    "$here"/wheels/*.whl || fail "the wheels could not be installed, see above"
  finish packages
fi
lacking=$("$python" -c '
import re, sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
def number(text):
    return [int(part) for part in re.findall("[0-9]+", text.partition("+")[0])[:3]]
lacking = []
for package, module, least in (word.split(":") for word in sys.argv[1:]):
    try:
        there = version(package)
    except PackageNotFoundError:
        there = least
    if find_spec(module) is None:
        lacking.append(package)
    elif number(there) < number(least):
        lacking.append(f"{package}>={least} (there is {there})")
print(*lacking, sep=", ")' @IMPORTS@)
[ -z "$lacking" ] ||
  fail "$python does not find: $lacking; set PYTHON to another interpreter, or bundle again with --wheel FILE for each"
if [ -d "$here/archives" ] && [ ! -d "$here/data" ]; then
  begin
  for archive in "$here"/archives/*; do
    tar -xof "$archive" -C "$new" || fail "$archive could not be unpacked, see above"
  done
  finish data
fi
exec "$python" -m sdecor run "$here"/@PLAN@ --preset @PRESET@ --store "$here/runs" --pack "$here/parcel" "$@"
"""


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds, and what it does not."""

    commit: str  #: As git describes it.
    sizes: dict[str, int]  #: Bytes of each part.
    untracked: list[str]  #: Files of the module that git does not track, which are not in it.
    absent: list[str]  #: Data sets of the plan that no archive brings.
    folders: list[Path]  #: Image folders of the plan, which must be there in the same place.


def bundle(
    course: Course,
    plan: Path,
    out: Path,
    *,
    data: Iterable[Path] = (),
    wheels: Iterable[Path] = (),
    limit: float = 64 * MIB,
) -> Bundle:
    """Write what a machine without network needs for a plan; the module is that of the checkout that one is in.

    Args:
        course: The plan, at the preset that run.sh takes unless it is told another.
        plan: Its file.
        out: A folder that is not there yet, or a file if its name ends in ``.tar``.
        data: Tar files that unpack into a data root, or folders of a data root, each of which keeps its name.
        wheels: Of packages that are missing there.
        limit: Bytes that all of it may take. If it takes more, ValueError says how large each part is, and nothing is
            written.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already; remove it, or choose another name")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"no folder {out.parent} to write {out.name} into")
    if out.suffix in (".gz", ".tgz", ".zip", ".xz", ".bz2"):
        raise ValueError(f"a bundle is a folder, or a file whose name ends in .tar; got {out.name}")
    sets = _data(course)
    top = _git(".", "rev-parse", "--show-toplevel").rstrip("\n")
    commit = _git(top, "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()
    tracked = _listed(_git(top, "ls-files", "-z", "sdecor", "pyproject.toml", "LICENSE"))
    if "sdecor/__init__.py" not in tracked:
        raise FileNotFoundError(f"the checkout {top} has no sdecor; go to the folder of one that has")
    used = _listed(os.environ.get(USE, "").replace(os.pathsep, "\0"))
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as made:
        archives, script = [_archive(path, Path(made)) for path in data], Path(made, "run.sh")
        least = _least(Path(top, "pyproject.toml"))
        script.write_text(_script(course, plan, commit, bool(archives), used, least), encoding="utf-8")
        files = [("run.sh", script), (plan.name, plan), *((f"checkout/{name}", Path(top, name)) for name in tracked)]
        files += [(f"archives/{path.name}", path) for path in archives]
        files += [(f"wheels/{path.name}", _wheel(path)) for path in wheels]
        files += [(f"own/{Path(name).name}", Path(name)) for name in used if name.endswith(".py")]
        sizes = _sizes(files, limit)
        _write(files, out, Path(made, "whole"))
        brought = {name.removeprefix("./").split("/")[0] for path in archives for name in _names(path)}
    untracked = _listed(_git(top, "ls-files", "-z", "--others", "--exclude-standard", "sdecor"))
    absent = [data.name for data in sets if data.path is None and not _brings(brought, data.name)]
    return Bundle(commit, sizes, untracked, absent, [data.path for data in sets if data.path is not None])


def _git(folder: str, *words: str) -> str:
    try:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, check=True).stdout
    except FileNotFoundError:
        raise FileNotFoundError("git is not installed; a bundle is made in a checkout of git") from None
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines()[-1:]
        raise ValueError(f"a bundle is made in a checkout of git; here git says: {' '.join(said)}") from None


def _listed(text: str) -> list[str]:
    return [name for name in text.split("\0") if name]


def _archive(path: Path, made: Path) -> Path:
    """The tar file itself, or one of a folder."""
    if path.is_file() and tarfile.is_tarfile(path):
        return path
    if not path.is_dir():
        raise ValueError(f"data must be a tar file, or a folder of a data root; {path} is neither")

    def nobody(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    name = path.resolve().name
    with tarfile.open(made / f"{name}.tar.gz", "w:gz") as tar:
        tar.add(path, name, filter=nobody)
    return made / f"{name}.tar.gz"


def _names(archive: Path) -> list[str]:
    with tarfile.open(archive) as tar:
        return tar.getnames()


def _wheel(path: Path) -> Path:
    if path.suffix != ".whl":
        raise ValueError(f"wheel must be a file .whl, got {path}")
    return path


def _least(project: Path) -> list[str]:
    """``PACKAGE:MODULE:VERSION`` of what a run imports, the version being the oldest that the project takes."""
    needed = dict(one.split(">=") for one in tomllib.loads(project.read_text())["project"]["dependencies"])
    return [f"{package}:{module}:{needed[package].split(',')[0]}" for package, module in sorted(IMPORTS.items())]


def _script(course: Course, plan: Path, commit: str, archives: bool, used: list[str], least: list[str]) -> str:
    settings = ['export SDECOR_DATA="$here/data"' if archives else 'export SDECOR_DATA="${SDECOR_DATA:-$here/data}"']
    if used:
        own = [f'"$here"/own/{shlex.quote(Path(n).name)}' if n.endswith(".py") else shlex.quote(n) for n in used]
        settings.append(f"export {USE}={':'.join(own)}")
    filled = {"COMMIT": commit, "PLAN": plan.name, "PRESET": course.preset}
    text = RUN.replace("@SETTINGS@", "\n".join(settings)).replace("@IMPORTS@", " ".join(least))
    for name, value in filled.items():
        text = text.replace(f"@{name}@", shlex.quote(value))
    return text


def _sizes(files: list[tuple[str, Path]], limit: float) -> dict[str, int]:
    """Bytes of the checkout and of every other file; ValueError if they are too many, or two files have one name."""
    if twice := [name for name, count in Counter(name for name, _ in files).items() if count > 1]:
        raise ValueError(f"two files of the bundle would be {twice[0]}; rename one")
    sizes: dict[str, int] = {}
    for name, path in files:
        part = "checkout" if name.startswith("checkout/") else name
        sizes[part] = sizes.get(part, 0) + path.stat().st_size
    if (total := sum(sizes.values())) > limit:
        said = ", ".join(f"{name} {size / MIB:.1f}" for name, size in sizes.items())
        raise ValueError(f"the bundle takes {total / MIB:.1f} MiB, and its limit is {limit / MIB:g}: {said}")
    return sizes


def _write(files: list[tuple[str, Path]], out: Path, made: Path) -> None:
    """Fill `made`, then rename it."""
    if out.suffix == ".tar":
        with tarfile.open(made, "w") as tar:
            for name, path in files:
                member = tarfile.TarInfo(f"{out.stem}/{name}")
                member.size, member.mode = path.stat().st_size, 0o755 if name == "run.sh" else 0o644
                with path.open("rb") as content:
                    tar.addfile(member, content)
    else:
        for name, path in files:
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, made / name)
        (made / "run.sh").chmod(0o755)
    made.rename(out)


def _data(course: Course) -> list[Data]:
    """Data sets that a plan reads, each once."""
    runs = [run for trials in course.possible().values() for run in trials]
    return list({run.data.name: run.data for run in runs}.values())


def _brings(brought: set[str], name: str) -> bool:
    """Whether a data set needs no files, or is among what archives have at their top."""
    entry = DATASETS[name]
    return entry.present is None or any(layout["folder"].split("/")[0] in brought for layout in entry.layouts)


__all__ = ["IMPORTS", "Bundle", "bundle"]
