"""Who may import whom: read from the sources, one way only."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "sdecor"
# From the bottom upwards: a module may import those of lower lines only, and those before it on its own.
LINES = """
_torchvision _files _bits _code registers first_convolution graphs processes
config
whitening saliency shapes images models
decorrelation masking sources plotting
attribution measures objects data
objective
baselines training
store
prepare parcels deletion ground_truth
evaluation
experiment choice plan rehearsal pace planned bundle
report
__main__
"""
RANK = {n: (i, j) for i, line in enumerate(LINES.split("\n")) for j, n in enumerate(line.split())}
# These know tensors only.
TENSORS = {"attribution", "measures", "saliency", "masking", "whitening", "decorrelation"}
ABOVE_TENSORS = {"config", "data", "images", "objective", "training", "store", "prepare", "evaluation", "experiment"}


def part(path: Path) -> str:
    """The module, or the package that a module belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Modules of sdecor that a file imports anywhere, and names that it takes from them."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("sdecor")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sdecor":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path.name} imports by dots"
    return found


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def test_every_module_has_its_place() -> None:
    assert {part(p) for p in FILES} == set(RANK)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_downwards(path: Path) -> None:
    own, below = part(path), {name.split(".")[1] for name in imports(path) if "." in name} & set(RANK)
    assert {name for name in below - {own} if RANK[name] >= RANK[own]} == set()
    if own in TENSORS:
        assert below & ABOVE_TENSORS == set()


def test_there_is_no_circle() -> None:
    paths = {p: ".".join(["sdecor", *p.relative_to(PACKAGE).with_suffix("").parts]) for p in FILES}
    names = {name.removesuffix(".__init__"): path for path, name in paths.items()}
    graph = {}
    for module, path in names.items():
        seen = {s if s in names else s.rpartition(".")[0] for s in imports(path)}
        graph[module] = seen & names.keys() - {module}
    assert len(graph) == len(list(TopologicalSorter(graph).static_order())) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_private_name_crosses_a_file(path: Path) -> None:
    private = {n for n in imports(path) if n.rpartition(".")[2].startswith("_") and not n.endswith("__version__")}
    modules = {f"sdecor.{p.stem}" for p in PACKAGE.glob("_*.py")} | {
        "sdecor.measures._checks",
        "sdecor.measures._perturbation",
    }
    assert private - modules == set()


def test_config_and_registers_need_no_torch() -> None:
    for name in ("config", "registers", "_files"):
        tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
        roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        roots |= {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert roots & {"torch", "numpy", "pandas", "torchvision"} == set()


def test_nothing_knows_where_a_checkout_lies() -> None:
    """No file of the package climbs above it."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "parents[1]" not in text and "parent.parent" not in text, path.name
