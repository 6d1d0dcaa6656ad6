"""The exercises: each has a solution, and each self-check knows its solution from typical mistakes.

A self-check is a cell with the tag ``self-check`` under its exercise. It defines one function, ``check`` or
``check_...``, that takes a student's function and returns what to say about it, starting with "Right" if and only if it
is right. The typical mistakes lie in ``exercises/``, a file for each chapter and a heading for each exercise.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sdecor.registers import REGISTERS

jupytext = pytest.importorskip("jupytext", reason="needs the packages of the extra 'book'")

BOOK = Path(__file__).resolve().parents[1] / "book"
MISTAKES = Path(__file__).parent / "exercises"
CHAPTERS = [p for p in sorted(BOOK.rglob("*.md")) if p.read_text(encoding="utf-8").startswith("---\njupytext:")]
FENCED = re.compile(r"^(`{3,}|~{3,})(?:python|\{code-block\} python)\n(.*?)^\1$", re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def entered() -> Iterator[None]:
    """Chapters enter penalties and terms of their own; what they entered is taken out again."""
    before = {kind: list(register) for kind, register in REGISTERS.items()}
    yield
    for kind, register in REGISTERS.items():
        for name in set(register) - set(before[kind]):
            del register[name]


def short(path: Path) -> str:
    return path.relative_to(BOOK).with_suffix("").as_posix()


def blocks(text: str, directive: str) -> dict[str, str]:
    """Label to content of every exercise, or every solution, of a page."""
    if directive == "exercise":
        found = re.findall(
            r"^(`{3,})\{exercise\}[^\n]*\n(?::[^\n]*\n)*?:label: (\S+)\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE
        )
    else:
        found = re.findall(r"^(`{3,})\{solution\} (\S+)\n(.*?)^\1$", text, re.DOTALL | re.MULTILINE)
    return {label: content for _, label, content in found}


def self_checks(path: Path) -> list[tuple[str, str]]:
    """Label of the exercise above it, and source, of every self-check of a chapter."""
    found, label = [], ""
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "markdown":
            label = [label, *blocks(cell.source, "exercise")][-1]
        elif "self-check" in cell.metadata.get("tags", ()):
            found.append((label, cell.source))
    return found


def definitions(path: Path) -> dict[str, Any]:
    """What a chapter imports and defines, without running the rest of it."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    space: dict[str, Any] = {"print": lambda *_: None, "__name__": "chapter"}
    for cell in jupytext.read(path).cells:
        if cell.cell_type != "code":
            continue
        for node in ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.MULTILINE)).body:
            simple = isinstance(node, kinds) or (
                isinstance(node, ast.With) and any(isinstance(part, ast.Import | ast.ImportFrom) for part in node.body)
            )
            if simple and "self-check" not in cell.metadata.get("tags", ()):
                try:
                    exec(compile(ast.Module([node], []), short(path), "exec"), space)
                except NameError:
                    pass  # a default value or decorator that only a run of the chapter has
    return space


def last_function(code: str, space: dict[str, Any]) -> Any:
    """The function that `code` defines last, run where the chapter's functions are known."""
    own = dict(space)
    exec(compile(code, "answer", "exec"), own)
    return own[[node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef | ast.ClassDef)][-1]]


def mistakes(path: Path) -> dict[str, list[str]]:
    """Label to wrong answers."""
    file = MISTAKES / f"{short(path).replace('/', '-')}.md"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    parts = re.split(r"^## (\S+)$", text, flags=re.MULTILINE)[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return {label: [code for _, code in FENCED.findall(body)] for label, body in pairs}


@pytest.mark.parametrize("path", CHAPTERS, ids=short)
def test_every_exercise_has_a_kind_and_a_solution(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    exercises, solutions = blocks(text, "exercise"), blocks(text, "solution")
    assert len(exercises) >= 3
    assert list(exercises) == list(solutions)
    assert [label for label, content in solutions.items() if ":class: dropdown" not in content] == []
    assert len(self_checks(path)) >= 1
    assert {"Recall", "Derive", "Code", "Explore"} <= set(re.findall(r"^`{3,}\{exercise\} (\w+)$", text, re.MULTILINE))
    assert {label for label, _ in self_checks(path)} == mistakes(path).keys()


@pytest.mark.parametrize(
    ("path", "label"),
    [pytest.param(p, label, id=label) for p in CHAPTERS for label, _ in self_checks(p)],
)
def test_a_self_check_knows_right_from_wrong(path: Path, label: str) -> None:
    space = definitions(path)
    before = set(space)
    exec(compile(dict(self_checks(path))[label], f"self-check of {label}", "exec"), space)
    (check,) = [space[name] for name in space.keys() - before if name.startswith("check")]
    solution = FENCED.search(blocks(path.read_text(encoding="utf-8"), "solution")[label])
    assert solution, "the solution has no code"
    right = check(last_function(solution[2], space))
    assert right.startswith("Right"), right
    said = [check(last_function(code, space)) for code in mistakes(path)[label]]
    assert len(said) >= 2
    assert [message for message in said if message.startswith("Right")] == []
    assert len(set(said)) == len(said), said
