"""The book's sources: what can be checked without building the site. `tests/browser` looks at the built pages."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

yaml = pytest.importorskip("yaml", reason="needs the packages of the extra 'test'")

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
STATIC = BOOK / "_static"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
NOTEBOOKS = sorted(p for p in BOOK.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
SOURCES = sorted(BOOK.rglob("*.md"))
PAGES = [p for p in SOURCES if STATIC not in p.parents]

TEXTUAL = {".md", ".ipynb", ".css", ".svg", ".js"}

# What makes a browser ask another host while it shows a page. Links are no requests.
FOREIGN = re.compile(
    r"""<(?:script|link|img|iframe|source|video|audio|object|embed)\b[^>]*\b(?:src|href|data|srcset)\s*=\s*["']?(?:https?:)?//
      | !\[[^\]]*\]\(\s*<?(?:https?:)?//
      | \{(?:figure|image|iframe)\}\s*(?:https?:)?//
      | \burl\(\s*["']?(?:https?:)?//
      | @import\s+["'](?:https?:)?//
      | \b(?:fetch|import|require\.config)\s*\(\s*["'](?:https?:)?//""",
    re.VERBOSE,
)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def entries(node: dict[str, Any]) -> list[str]:
    """Pages of a table of contents, in order."""
    own = [node[key] for key in ("root", "file") if key in node]
    below = [part for key in ("parts", "chapters", "sections") for part in node.get(key, [])]
    return own + [name for part in below for name in entries(part)]


def page_of(entry: str) -> Path:
    """File of an entry, which has its suffix when it is a notebook."""
    return ROOT / entry if entry.endswith(".ipynb") else ROOT / f"{entry}.md"


def figures(text: str) -> list[tuple[str, str]]:
    """Target and alternative text of every figure and image of a Markdown page."""
    blocks = re.findall(r"^(`{3,}|:{3,})\{(?:figure|image)\}\s*(\S*)[^\n]*\n(.*?)^\1", text, re.DOTALL | re.MULTILINE)
    found = []
    for _, target, body in blocks:
        alt = re.search(r"^:alt:\s*(.*)$", body, re.MULTILINE)
        found.append((target, alt.group(1) if alt else ""))
    return found + [(target, alt) for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", text)]


def pair_problems(source: Path, notebook: Path) -> list[str]:
    """Why a notebook is not its Markdown source, run once from top to bottom without an error; empty if it is.

    Args:
        source: MyST Markdown with a jupytext header.
        notebook: The notebook made from it, with outputs.
    """
    jupytext = pytest.importorskip("jupytext", reason="needs the packages of the extra 'book'")
    if not source.exists():
        return [f"{source.name} does not exist; a notebook is made from its text"]
    if not re.match(r"---\n(?:.*\n)*?jupytext:", read(source)):
        return [f"{source.name} has no jupytext header"]
    written, made = jupytext.read(source), json.loads(read(notebook))
    problems = []
    if made["metadata"].get("kernelspec", {}).get("language") != "python":
        problems.append("the header names no kernelspec with language: python, which papermill needs")
    if len(written.cells) != len(made["cells"]):
        problems.append(f"{len(written.cells)} cells in {source.name}, {len(made['cells'])} in {notebook.name}")
    count = 0
    for i, (a, b) in enumerate(zip(written.cells, made["cells"], strict=False)):
        text = "".join(b["source"])
        if a.cell_type != b["cell_type"] or a.source.strip() != text.strip():
            problems.append(f"cell {i} differs: {a.source[:40]!r} in the text, {text[:40]!r} in the notebook")
        for key in ("tags", "mystnb"):
            if (a.metadata.get(key) or None) != (b["metadata"].get(key) or None):
                problems.append(f"cell {i} differs in its {key}")
        for key in ("papermill", "execution", "ExecuteTime"):
            if key in b["metadata"]:
                problems.append(f"cell {i} carries {key} metadata, which changes with every run")
        if b["cell_type"] == "code" and text.strip():
            count += 1
            if b["execution_count"] != count:
                problems.append(f"cell {i} has execution count {b['execution_count']}, in order it would be {count}")
            problems += [
                f"cell {i} ended with {out.get('ename')}" for out in b["outputs"] if out["output_type"] == "error"
            ]
    if "papermill" in made["metadata"]:
        problems.append("the notebook carries papermill metadata, which changes with every run")
    return problems


def test_every_entry_of_the_contents_exists() -> None:
    listed = entries(TOC)
    assert not [name for name, times in Counter(listed).items() if times > 1]
    assert not [name for name in listed if not page_of(name).is_file()]


def test_every_page_is_in_the_contents() -> None:
    listed = {page_of(name) for name in entries(TOC)}
    sources = {page.with_suffix(".md") for page in listed if page.suffix == ".ipynb"}
    assert not [short(p) for p in [*PAGES, *NOTEBOOKS] if p not in listed | sources]


def test_build_executes_nothing_and_takes_scripts_from_here() -> None:
    assert CONFIG["execute"]["execute_notebooks"] == "off"
    sphinx = CONFIG["sphinx"]["config"]
    (folder,) = sphinx["html_static_path"]
    for name in [sphinx["mathjax_path"], *sphinx["html_css_files"], *(name for name, _ in sphinx["html_js_files"])]:
        assert (ROOT / folder / name).is_file(), name
    logo, cards = sphinx["html_theme_options"]["logo"], sphinx["ogp_social_cards"]
    for name in (
        CONFIG["html"]["favicon"],
        logo["image_light"],
        logo["image_dark"],
        cards["image"],
        cards["image_mini"],
    ):
        assert (ROOT / name).is_file(), name
    assert (STATIC / "mathjax/LICENSE").is_file()


def test_static_files_stay_small() -> None:
    assert sum(p.stat().st_size for p in STATIC.rglob("*") if p.is_file()) < 3e6


def test_address_of_the_repository_is_in_the_configuration_only() -> None:
    """A chapter may name it, in the cell that installs the module on a fresh runtime."""
    address = CONFIG["repository"]["url"].removeprefix("https://")
    chapters = {p.with_suffix(".md") for p in NOTEBOOKS}
    places = [
        *(p for p in PAGES if p not in chapters),
        *(ROOT / "sdecor").rglob("*.py"),
        *(ROOT / "tests").rglob("*.py"),
    ]
    assert not [short(p) for p in places if address in read(p)]


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in [*SOURCES, *NOTEBOOKS, *STATIC.rglob("*.*")]
        if p.suffix in TEXTUAL and STATIC / "mathjax" not in p.parents
    ],
    ids=short,
)
def test_no_source_asks_another_host(path: Path) -> None:
    """MathJax is left as published; the browser tests see what it asks for."""
    text = read(path)
    if path.suffix == ".ipynb":
        text = "\n".join(part for cell in json.loads(text)["cells"] for part in html_of(cell))
    assert not [m.group(0) for m in FOREIGN.finditer(text)]


def html_of(cell: dict[str, Any]) -> list[str]:
    """What a cell puts on its page: its text, or its outputs that a browser interprets."""
    if cell["cell_type"] == "markdown":
        return ["".join(cell["source"])]
    kinds = ("text/html", "application/javascript", "image/svg+xml")
    return [
        "".join(out["data"][kind]) for out in cell.get("outputs", []) for kind in kinds if kind in out.get("data", {})
    ]


def test_the_pattern_for_other_hosts_knows_the_usual_ways() -> None:
    for bad in (
        '<script src="https://cdn.example/x.js"></script>',
        "<link rel='stylesheet' href='//fonts.example/a.css'>",
        "![badge](https://colab.example/badge.svg)",
        "```{figure} https://example.org/a.png",
        "@import 'https://fonts.example/a.css';",
        "src: url(https://fonts.example/a.woff2)",
    ):
        assert FOREIGN.search(bad), bad
    for good in (
        "[Colab](https://colab.example)",
        '<a href="https://example.org">x</a>',
        'xmlns="http://www.w3.org/2000/svg"',
    ):
        assert not FOREIGN.search(good), good


def bibliography() -> Counter[str]:
    return Counter(re.findall(r"^@\w+\{([^,\s]+),", read(BOOK / "references.bib"), re.MULTILINE))


def test_citations_resolve() -> None:
    known = bibliography()
    assert known and max(known.values()) == 1
    for page in PAGES:
        cited = {k.strip() for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", read(page)) for k in keys.split(",")}
        assert cited <= set(known), f"{short(page)} cites {sorted(cited - set(known))}"


def test_references_are_complete() -> None:
    for entry in re.split(r"^@", read(BOOK / "references.bib"), flags=re.MULTILINE)[1:]:
        key = entry.split("{", 1)[1].split(",", 1)[0]
        missing = [f for f in ("author", "title", "year") if not re.search(rf"^\s*{f}\s*=", entry, re.MULTILINE)]
        assert not missing, f"{key} lacks {missing}"
        assert re.search(r"^\s*(doi|eprint|pages|institution|booktitle|publisher)\s*=", entry, re.MULTILINE), (
            f"{key} cannot be found"
        )


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_figures_of_a_page_exist_and_have_alternative_text(page: Path) -> None:
    for target, alt in figures(read(page)):
        assert (page.parent / target).is_file(), target
        assert len(alt.split()) >= 4, f"{target}: say in :alt: what is to be seen"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=short)
def test_figures_of_a_notebook_have_alternative_text(notebook: Path) -> None:
    for i, cell in enumerate(json.loads(read(notebook))["cells"]):
        drawn = any(kind.startswith("image/") for out in cell.get("outputs", []) for kind in out.get("data", {}))
        alt = cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", "")
        assert not drawn or len(alt.split()) >= 4, f"cell {i} draws: say in mystnb.image.alt what is to be seen"


@pytest.mark.parametrize("path", sorted(STATIC.glob("*.svg")), ids=short)
def test_drawings_are_opaque_and_self_contained(path: Path) -> None:
    root = ElementTree.fromstring(read(path))
    ns = "{http://www.w3.org/2000/svg}"
    width, height = root.attrib["viewBox"].split()[2:]
    ground = next(e for e in root if e.tag not in (f"{ns}title", f"{ns}desc", f"{ns}style", f"{ns}defs"))
    assert ground.tag == f"{ns}rect" and (ground.get("width"), ground.get("height")) == (width, height)
    assert re.fullmatch(r"#[0-9a-f]{3,6}", ground.get("fill", ""))
    assert not [e for e in root.iter() if any(k.endswith("href") for k in e.attrib)]
    if f"{path.name}" in "".join(read(p) for p in PAGES):  # a figure; an icon needs no words
        for part in ("title", "desc"):
            assert (root.findtext(f"{ns}{part}") or "").strip()
        assert root.get("role") == "img" and root.get("aria-labelledby")


INSTALL = """\
# A fresh runtime, such as Colab's, has no sdecor: fetch the book, with the records and weights of the published runs.
import importlib.util
import site

if importlib.util.find_spec("sdecor_book") is None:
    !git clone --quiet --depth 1 {url}
    %pip install --quiet --editable {name}
    site.main()  # from now on this Python finds it"""


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=short)
def test_first_cell_of_a_chapter_installs_the_book(notebook: Path) -> None:
    """The same in all, with the address of the configuration; tests/test_install_cell.py runs it."""
    jupytext = pytest.importorskip("jupytext", reason="needs the packages of the extra 'book'")
    first, second, *_ = (c for c in jupytext.read(notebook.with_suffix(".md")).cells if c.cell_type == "code")
    url = CONFIG["repository"]["url"]
    assert first.source == INSTALL.format(url=url, name=url.rsplit("/", 1)[1])
    assert (first.metadata["tags"], second.metadata["tags"]) == (
        ["install", "remove-cell"],
        ["parameters", "hide-cell"],
    )


def test_every_public_module_is_in_the_api() -> None:
    """And what notebooks import of the book's own helpers."""
    files = [p for p in (ROOT / "sdecor").rglob("*.py") if not p.name.startswith("_") or p.name == "__init__.py"]
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in files}
    modules = modules - {"sdecor", "sdecor.images"} | {"sdecor_book.chapter"}  # images is in sdecor.data
    assert modules == set(re.findall(r"^\.\. automodule:: (\S+)$", read(BOOK / "back/api.md"), re.MULTILINE))


def test_every_symbol_has_one_row() -> None:
    """In the whole book; a chapter may give another meaning to a symbol in a section of its own."""
    for section in read(BOOK / "back/notation.md").split("\n### "):
        rows = re.findall(r"^\| (\$[^|]+\$) \|", section, re.MULTILINE)
        assert rows
        assert not [s for s, times in Counter(rows).items() if times > 1]


def test_letters_that_two_pages_use_are_listed_with_both_meanings() -> None:
    text = read(BOOK / "back/notation.md")
    listed = re.findall(r"^- (.*?):", text, re.MULTILINE)
    known = {letter for entry in listed for letter in re.findall(r"\$([^$]+)\$", entry)}
    pages = [
        {re.sub(r"\\(?:hat|tilde|bar)\s*", "", symbol) for symbol in re.findall(r"\$([^$]+)\$", " ".join(rows))}
        for rows in (re.findall(r"^\| ([^|]+) \|", part, re.MULTILINE) for part in text.split("\n### ")[1:])
    ]
    found = Counter(letter for page in pages for letter in {re.match(r"\\[a-zA-Z]+|\w", s)[0] for s in page})
    same = {r"\nu", "w"}  # eigenvalues, and weights, on all pages
    assert {letter for letter, times in found.items() if times > 1} - same <= known
    assert {"F", r"\omega"} <= known


def test_names_beside_the_symbols_are_in_the_code() -> None:
    sources = [*(ROOT / "sdecor").rglob("*.py"), *(p.with_suffix(".md") for p in NOTEBOOKS)]
    known = set(re.findall(r"\w+", "\n".join(read(p) for p in sources)))
    cells = re.findall(r"^\| \$.*\| ([^|]+) \|$", read(BOOK / "back/notation.md"), re.MULTILINE)
    named = {
        word for cell in cells for code in re.findall(r"`([^`]+)`", cell) for word in re.findall(r"[A-Za-z_]{2,}", code)
    }
    assert len(named) > 20
    assert not named - known


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=short)
def test_notebook_is_its_source_executed(notebook: Path) -> None:
    assert pair_problems(notebook.with_suffix(".md"), notebook) == []


SOURCE = """---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {name: python3, display_name: Python 3, language: python}
---

# Title

```{code-cell} ipython3
:tags: [parameters]
n = 1
```

```{code-cell} ipython3
n + 1
```
"""


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A source, where its notebook is to be, and the notebook as it should be."""
    jupytext = pytest.importorskip("jupytext", reason="needs the packages of the extra 'book'")
    source = tmp_path / "x.md"
    source.write_text(SOURCE, encoding="utf-8")
    notebook = json.loads(jupytext.writes(jupytext.read(source), "ipynb"))
    for count, cell in enumerate(notebook["cells"][1:], start=1):
        cell["execution_count"] = count
    return source, tmp_path / "x.ipynb", notebook


def test_a_pair_that_agrees_passes(pair: tuple[Path, Path, dict[str, Any]]) -> None:
    source, path, notebook = pair
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert pair_problems(source, path) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda cells: cells[2].update(source="n + 2"), "cell 2 differs"),
        (lambda cells: cells.pop(), "3 cells in x.md, 2 in x.ipynb"),
        (lambda cells: cells[1].update(metadata={}), "cell 1 differs in its tags"),
        (lambda cells: cells[2].update(execution_count=None), "execution count None"),
        (lambda cells: cells[2].update(execution_count=5), "execution count 5, in order it would be 2"),
        (lambda cells: cells[2].update(outputs=[{"output_type": "error", "ename": "OSError"}]), "ended with OSError"),
        (lambda cells: cells[2]["metadata"].update(papermill={}), "papermill metadata"),
    ],
)
def test_a_pair_that_disagrees_is_told_apart(
    pair: tuple[Path, Path, dict[str, Any]], change: Any, message: str
) -> None:
    source, path, notebook = pair
    change(notebook["cells"])
    path.write_text(json.dumps(notebook), encoding="utf-8")
    assert any(message in problem for problem in pair_problems(source, path))
