"""The executed chapters: numbers in the text come from outputs, and the outputs from the committed records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

BOOK = Path(__file__).resolve().parent.parent / "book"
CHAPTERS = [p for p in sorted(BOOK.rglob("*.md")) if p.read_text(encoding="utf-8").startswith("---\njupytext:")]
EXPERIMENTS = [p for p in CHAPTERS if p.parent.name == "experiments"]
REPORTS = [p for p in CHAPTERS if p in EXPERIMENTS or "\n## What came out\n" in p.read_text(encoding="utf-8")]
# These train small networks while they run, which on another processor come out a little different; the others read
# records and weights.
TRAINING = {"build/objective", "build/training", "build/whitening", "why/masks"}
# Numbers that name something and measure nothing.
NAMED = r"(?:Fig\. \d+|Gini index of 1|, 0 is|tenth|5 %|95 %|CIFAR-10|Caltech-101|ResNet-18)"


def prose(source: str) -> str:
    """The text of a chapter without header, cells, directives, code, formulas, links and quoted results."""
    text = re.sub(r"\A---\n.*?\n---\n", "", source, flags=re.DOTALL)
    text = re.sub(r"^(`{3,}|:{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
    return re.sub(r"\{[\w:]+\}`[^`]*`|`[^`]*`|\$[^$]*\$|\]\([^)]*\)", "", text)


def results(source: str) -> str:
    """The part of a chapter that speaks of results: from its heading "What came out" up to the exercises."""
    return source.split("\n## What came out\n")[1].split("\n## Exercises\n")[0]


def running(source: str) -> str:
    """The text of a page without cells, figures and other blocks, and without the rows of tables."""
    return re.sub(r"^(`{3,}|:{3,})(?s:.*?)^\1$|^\|.*$", "", source, flags=re.MULTILINE)


def code_of(source: Path) -> list[str]:
    """Lines of a chapter's own cells, without blank ones and comments, and without the cell that installs the book."""
    jupytext = pytest.importorskip("jupytext", reason="needs the packages of the extra 'book'")
    own = (c for c in jupytext.read(source).cells if c.cell_type == "code" and "install" not in c.metadata["tags"])
    lines = (line.strip() for cell in own for line in cell.source.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def glued(notebook: Path) -> dict[str, str]:
    """Name to value of everything glued in a notebook."""
    found: dict[str, str] = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        for output in cell.get("outputs", ()):
            scrap = output.get("metadata", {}).get("scrapbook")
            if scrap:
                found[scrap["name"]] = output["data"]["application/papermill.record/text/plain"]
    return found


def comparable(notebook: Path) -> list[tuple[int, Any]]:
    """Tables and glued values in order, with their cell; figures and the text of warnings are left out."""
    found: list[tuple[int, Any]] = []
    for i, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if not any(kind.startswith("image/") for kind in data):
                found += [
                    (i, "".join(v)) for kind, v in sorted(data.items()) if kind.startswith(("text/plain", "applic"))
                ]
    return found


@pytest.mark.parametrize("source", REPORTS, ids=lambda p: p.stem)
def test_result_prose_quotes_no_typed_number(source: Path) -> None:
    text = re.sub(NAMED, "", prose(results(source.read_text(encoding="utf-8"))))
    assert re.findall(r"[^\n]*\d[^\n]*", text) == []


def test_a_typed_number_would_be_noticed() -> None:
    chapter = "\n## What came out\n\nIt rose by 3.2 points, {glue:text}`a:.1f` with $x^2$ and `b = 1`.\n"
    assert re.findall(r"\d\S*", prose(results(chapter))) == ["3.2"]


@pytest.mark.parametrize("source", CHAPTERS, ids=lambda p: p.stem)
def test_every_quoted_result_exists(source: Path) -> None:
    quoted = set(re.findall(r"\{glue:text\}`([\w-]+)", source.read_text(encoding="utf-8")))
    assert quoted
    assert quoted - glued(source.with_suffix(".ipynb")).keys() == set()


@pytest.mark.parametrize(
    "page", [p for p in sorted(BOOK.rglob("*.md")) if "_static" not in p.parts], ids=lambda p: p.stem
)
def test_every_result_quoted_from_another_page_exists(page: Path) -> None:
    for notebook, name in re.findall(r"\{glue:text\}`([^`:]+\.ipynb)::([\w-]+)", page.read_text(encoding="utf-8")):
        assert name in glued(page.parent / notebook), f"{notebook} has no {name}"


@pytest.mark.parametrize("source", EXPERIMENTS, ids=lambda p: p.stem)
def test_an_experiment_shows_more_than_it_tells(source: Path) -> None:
    """A result is a picture and a table first; what is general is in the module."""
    assert len(re.findall(r"\{glue:text\}", running(source.read_text(encoding="utf-8")))) <= 12
    assert len(code_of(source)) <= 150


def test_what_stands_in_running_text_is_told_apart() -> None:
    page = "It is {glue:text}`a`.\n\n| b | {glue:text}`b` |\n\n```{note}\n{glue:text}`c`\n```\n\nAnd {glue:text}`d`.\n"
    assert re.findall(r"`(\w)`", running(page)) == ["a", "d"]


@pytest.mark.parametrize("source", CHAPTERS, ids=lambda p: p.stem)
def test_no_page_shows_a_warning_of_python(source: Path) -> None:
    """Which would name files of the machine; what the module has to say is no such warning."""
    cells = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    said = ["".join(o["text"]) for c in cells for o in c.get("outputs", ()) if o.get("name") == "stderr"]
    assert [text for text in said if re.search(r"\w+Warning: |\.py:\d+", text)] == []


@pytest.mark.parametrize("source", CHAPTERS, ids=lambda p: p.stem)
def test_figures_are_kept_light(source: Path) -> None:
    pytest.importorskip("papermill", reason="needs the packages of the extra 'book'")
    from sdecor_book.execute import light

    cells = json.loads(source.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
    outputs = (o.get("data", {}).get("image/svg+xml") for c in cells for o in c.get("outputs", ()))
    drawn = ["".join(svg) for svg in outputs if svg]
    assert drawn == [light(svg) for svg in drawn]


@pytest.mark.slow
@pytest.mark.parametrize("source", CHAPTERS, ids=lambda p: p.stem)
def test_committed_outputs_are_what_the_records_give(source: Path, real_data: Path, tmp_path: Path) -> None:
    papermill = pytest.importorskip("papermill", reason="needs the packages of the extra 'book'")
    from sdecor_book.execute import own_sockets

    fresh = tmp_path / "fresh.ipynb"
    committed = source.with_suffix(".ipynb")
    declared = source.read_text(encoding="utf-8")
    mine: dict[str, Any] = {"data_root": str(real_data), "workers": 1}
    given = {name: value for name, value in mine.items() if f"\n{name}: " in declared}
    with own_sockets() as how:
        how |= {"kernel_name": "python3", "progress_bar": False, "cwd": tmp_path}
        papermill.execute_notebook(committed, fresh, given, **how)
    old, new = comparable(committed), comparable(fresh)
    injected = int(bool(given))  # the cell that papermill adds
    assert [i + injected for i, _ in old] == [i for i, _ in new]
    for (cell, a), (_, b) in zip(old, new, strict=True):
        numbers = [[float(n) for n in re.findall(r"-?\d+(?:\.\d+)?", text)] for text in (a, b)]
        assert re.sub(r"[\d.+-]+", "", a) == re.sub(r"[\d.+-]+", "", b), f"cell {cell}"
        rel, absolute = (0.5, 0.5) if short(source) in TRAINING else (2e-3, 0.05)
        assert numbers[0] == pytest.approx(numbers[1], rel=rel, abs=absolute), f"cell {cell}"


PAGES = [p for p in sorted(BOOK.rglob("*.md")) if "_static" not in p.parts]
WHY = [p for p in CHAPTERS if p.parent.name == "why"]
INDICES = ("$i$", "$j$", "$k$", "$v$")
HEADINGS = ("## What to remember", "## Exercises", "## Further reading")
OPENING = ("**Objectives.**", "**Prerequisites.**", "**Reading time.**", "**Run time.**")
# Commands of LaTeX that are symbols of their own, and need a row on the notation page when a page uses them.
GREEK = re.compile(
    r"\\(?:alpha|beta|gamma|Gamma|delta|Delta|varepsilon|epsilon|zeta|eta|theta|Theta|kappa|lambda|Lambda|mu|nu|xi|pi|rho"
    r"|sigma|Sigma|tau|phi|varphi|Phi|psi|Psi|omega|Omega|ell|odot)(?![A-Za-z])"
)
WORDS = re.compile(r"\\(?:text|operatorname|begin|end|label|tag|ref|eqref|cite)\*?\{[^}]*\}")
NAMES = re.compile(r"\\(?:mathrm|mathcal|mathbb|mathbf|mathsf)(?:\{(\w+)\}|\s*(\w))")


def formulas(source: str) -> str:
    """All mathematics of a page, without the code in its cells."""
    text = re.sub(
        r"^(`{3,}|~{3,})(?:\{code-cell\}|python|bash|\{figure\}).*?^\1$", "", source, flags=re.DOTALL | re.MULTILINE
    )
    text = re.sub(r"(?<!`)`[^`\n]+`(?!`)", "", text)
    blocks = re.findall(r"\$\$(.*?)\$\$|^`{3,}\{math\}\n(.*?)^`{3,}$", text, re.DOTALL | re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
    return "\n".join(["".join(b) for b in blocks] + re.findall(r"\$([^$]+)\$", text))


def symbols(mathematics: str) -> set[str]:
    """Letters, Greek letters and named operators that occur in formulas."""
    text = WORDS.sub(" ", mathematics)
    named = {f"{a or b}" for a, b in NAMES.findall(text)}
    text = NAMES.sub(" ", text)
    greek = set(GREEK.findall(text))
    return named | greek | set(re.findall(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])", re.sub(r"\\[A-Za-z]+", " ", text)))


def defined(page: str) -> set[str]:
    """Symbols with a row on the notation page: those of the whole book, and those of one page only."""
    text = (BOOK / "back/notation.md").read_text(encoding="utf-8")
    book, *own = re.split(r"^### .*?\(\.\./(.*?)(?:\.ipynb|\.md)?\)$", text, flags=re.MULTILINE)
    sections = [book, *(body for name, body in zip(own[::2], own[1::2], strict=True) if name == page)]
    rows = [*re.findall(r"^\| ([^|]*\$[^|]*) \|", "\n".join(sections), re.MULTILINE), *INDICES]
    return symbols("\n".join(m for row in rows for m in re.findall(r"\$([^$]+)\$", row)))


def short(path: Path) -> str:
    return path.relative_to(BOOK).with_suffix("").as_posix()


@pytest.mark.parametrize("source", CHAPTERS, ids=short)
def test_chapter_opens_and_ends_as_all_do(source: Path) -> None:
    text = source.read_text(encoding="utf-8")
    opening, *_ = text.split("```{code-cell}")
    assert [word for word in OPENING if word not in opening] == []
    places = [text.find(f"\n{heading}\n") for heading in HEADINGS]
    assert -1 not in places and places == sorted(places)
    assert "{cite" in text[places[-1] :]


@pytest.mark.parametrize("source", CHAPTERS, ids=short)
def test_a_question_in_plain_words_opens_a_chapter(source: Path) -> None:
    opening = re.search(r"^# .+\n\n(.*?)\n\n\*\*Objectives\.\*\*", source.read_text(encoding="utf-8"), re.DOTALL | re.M)
    assert opening, "a question stands between title and objectives, and nothing else"
    question = opening[1]
    assert "?" in question and len(question.split()) <= 40 and "\n\n" not in question
    assert not re.search(r"[$`{]", question)


@pytest.mark.parametrize("source", CHAPTERS, ids=short)
def test_parameters_and_their_check_are_folded(source: Path) -> None:
    jupytext = pytest.importorskip("jupytext", reason="needs the packages of the extra 'book'")
    cells = [c for c in jupytext.read(source).cells if c.cell_type == "code"]
    given = [c for c in cells if "parameters" in c.metadata.get("tags", ())]
    checked = [c for c in cells if "chapter.parameters(" in c.source]
    assert (len(given), len(checked)) == (1, 1)
    assert all("hide-cell" in c.metadata["tags"] for c in (*given, *checked))


def checked(chapter: str, given: dict[str, Any]) -> Any:
    """The settings that a chapter makes of its parameters, without the rest of it."""
    jupytext = pytest.importorskip("jupytext", reason="needs the packages of the extra 'book'")
    cells = [c for c in jupytext.read(BOOK / f"{chapter}.md").cells if c.cell_type == "code"]
    (declared,) = [c.source for c in cells if "parameters" in c.metadata.get("tags", ())]
    (check,) = [c.source for c in cells if "chapter.parameters(" in c.source]
    space: dict[str, Any] = {}
    exec(compile(declared, chapter, "exec", dont_inherit=True), space)
    assert given.keys() <= space["__annotations__"].keys()
    space |= given
    exec(compile(check, chapter, "exec", dont_inherit=True), space)
    return space["settings"]


@pytest.mark.parametrize("source", CHAPTERS, ids=short)
def test_published_parameters_are_all_empty(source: Path) -> None:
    """So that whatever is given is known to be given."""
    assert checked(short(source), {}).given == {}


@pytest.mark.parametrize(
    ("chapter", "given", "message"),
    [
        ("build/training", {"samples": 63}, "parameter 'samples' must be from 64 to 100000, got 63"),
        ("build/training", {"samples": 100_001}, "parameter 'samples' must be from 64 to 100000, got 100001"),
        ("build/training", {"seed": 10**19}, "parameter 'seed' must be from 0 to 999999, got 10000000000000000000"),
        ("build/measures", {"seeds": 1}, "parameter 'seeds' must be at least 2, got 1"),
        ("build/measures", {"images": 40}, "parameter 'images' is 64 in what was published; 40 needs retrain=True"),
        ("build/measures", {"images": 3, "retrain": True}, "parameter 'images' must be from 4 to 8000, got 3"),
        ("build/measures", {"images": 241, "preset": "quick"}, "parameter 'images' must be from 4 to 240, got 241"),
        ("experiments/mnist", {"limit": 15}, "parameter 'limit' must be at least 16, got 15"),
        ("experiments/cifar10", {"limit": 1}, "parameter 'limit' must be at least 16, got 1"),
    ],
)
def test_a_chapter_refuses_what_it_cannot_use(chapter: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        checked(chapter, given)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("chapter", "given"),
    [
        ("build/training", {"samples": 64, "epochs": 1, "seed": 999_999}),
        ("build/training", {"samples": 100_000, "epochs": 10**6}),
        ("build/measures", {"seeds": 2}),
        ("build/measures", {"images": 4, "preset": "quick"}),
        ("build/measures", {"images": 40, "seeds": 2, "retrain": True}),
        ("experiments/mnist", {"limit": 16, "seeds": 1, "epochs": 1}),
        ("experiments/cifar10", {"limit": 16, "seeds": 1, "epochs": 1}),
    ],
)
def test_a_chapter_takes_what_it_can_use(chapter: str, given: dict[str, Any]) -> None:
    settings = checked(chapter, given)
    assert vars(settings).items() >= given.items()


@pytest.mark.slow
def test_a_chapter_on_pictures_of_ones_own(tmp_path: Path) -> None:
    """Two classes, four test images, one seed: fewer than it shows of MNIST, and networks that make no mistake."""
    pytest.importorskip("papermill", reason="needs the packages of the extra 'book'")
    from sdecor_book import execute

    draw = np.random.default_rng(0)
    for split, count in {"train": 24, "test": 2}.items():
        for name, colour in {"dark": 40, "light": 200}.items():
            (folder := tmp_path / "own" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = colour + draw.integers(-20, 20, (16, 16, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    given = {"preset": "quick", "data": f"folder:{tmp_path / 'own'}", "seeds": "1", "epochs": "1"}
    done = execute.run("experiments/mnist", given, out=str(tmp_path / "out.ipynb"))
    cells = json.loads(done.read_text(encoding="utf-8"))["cells"]
    shown = [data for cell in cells for out in cell.get("outputs", ()) for data in out.get("data", {}).items()]
    texts = ["".join(text) for kind, text in shown if kind.startswith(("text/", "application/papermill"))]
    assert not [text for text in texts if re.search(r"\bnan\b", text)]
    assert sum("This is not the published run" in text for text in texts) == 1


@pytest.mark.parametrize("source", [p for p in PAGES if p.name != "notation.md"], ids=short)
def test_every_symbol_is_defined(source: Path) -> None:
    used = symbols(formulas(source.read_text(encoding="utf-8")))
    assert used - defined(short(source)) == set()


def test_an_undefined_symbol_would_be_noticed() -> None:
    page = "Let $\\Xi x$, $\\zeta_i$ and $\\mathrm{Foo}(x)$.\n\n```{code-cell}\nprice = '$Y$'\n```\n"
    assert {"Foo", "\\zeta"} <= symbols(formulas(page)) - defined("intro")
    assert "Y" not in symbols(formulas(page))


@pytest.mark.parametrize("source", WHY, ids=short)
def test_every_theorem_is_checked_and_broken(source: Path) -> None:
    """After a theorem, and before the next, a cell shows that it holds, and that it fails without its assumptions."""
    text = source.read_text(encoding="utf-8")
    parts = re.split(r"^`{3,}\{prf:(?:theorem|proposition|corollary|lemma)\}", text, flags=re.MULTILINE)
    for part in parts[1:]:
        label = re.search(r":label: (\S+)", part)
        assert label, part[:80]
        cells = re.findall(
            r"^```\{code-cell\} ipython3\n(:tags: \[[^\]]*theorem-check.*?)^```$", part, re.DOTALL | re.MULTILINE
        )
        code = "\n".join(cells)
        assert "{prf:proof}" in part, f"{label[1]} has no proof"
        assert "assert holds(" in code, f"{label[1]} is not checked"
        assert "assert not holds(" in code, f"{label[1]} is not shown to fail"
