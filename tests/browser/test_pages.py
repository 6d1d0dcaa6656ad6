"""The built site in a real browser: run `make book` first.

Skipped, with the reason, where the site, playwright or Chromium is missing.
"""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit
from xml.etree import ElementTree

import pytest

yaml = pytest.importorskip("yaml", reason="needs the packages of the extra 'test'")

ROOT = Path(__file__).parents[2]
SITE = ROOT / "_build" / "html"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE = 120_000  # milliseconds; a page takes one second, but not on a machine that trains at the same time
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


def entries(node: dict[str, Any]) -> list[str]:
    """Pages of a table of contents, without suffix."""
    own = [node[key].removesuffix(".ipynb") for key in ("root", "file") if key in node]
    below = [part for key in ("parts", "chapters", "sections") for part in node.get(key, [])]
    return own + [name for part in below for name in entries(part)]


def notebooks() -> list[str]:
    return [name for name in PAGES if f"{name}.ipynb" in (ROOT / "_toc.yml").read_text(encoding="utf-8")]


PAGES = entries(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """Address of the built site, served from this machine."""
    if not (SITE / "index.html").exists():
        pytest.skip("the site is not built: run make book")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(site: str) -> Iterator[Any]:
    """Chromium, with a fresh profile."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=executable, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


class Visit:
    """A page in a tab of its own, and what went wrong while it loaded."""

    def __init__(self, browser: Any, site: str, name: str, **settings: Any) -> None:
        self.context = browser.new_context(**settings)
        self.context.set_default_timeout(PATIENCE)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.failed: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("requestfailed", lambda r: self.failed.append(r.url))
        self.page.on("response", lambda r: self.failed.append(f"{r.status} {r.url}") if r.status >= 400 else None)
        self.page.on("request", lambda r: self._note(r.url, site))
        self.page.goto(f"{site}{name}.html")
        self.page.wait_for_load_state("networkidle")
        self.page.evaluate("window.MathJax?.startup?.promise")

    def _note(self, url: str, site: str) -> None:
        if urlsplit(url).scheme not in ("data", "blob") and not url.startswith(site):
            self.foreign.append(url)

    def ask(self, script: str) -> Any:
        return self.page.evaluate(script)

    def every(self, selector: str, value: str) -> list[str]:
        """`value`, in terms of `e`, of every element that fits `selector`, where it is not empty."""
        return self.page.evaluate(f"s => [...document.querySelectorAll(s)].map(e => {value}).filter(v => v)", selector)

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("name", PAGES)
def test_page(browser: Any, site: str, name: str) -> None:
    """One visit a page: what it asks for and shows, then the same page on a phone, then in the dark."""
    with Visit(browser, site, name, viewport=DESKTOP, color_scheme="light") as visit:
        assert visit.foreign == [], "requests to another host"
        assert visit.failed == [], "failed requests"
        assert visit.errors == [], "errors in the console"
        assert not visit.ask("document.querySelector('.math') && !document.querySelector('mjx-container')"), (
            "raw formulas"
        )
        assert visit.every("mjx-merror", "e.textContent") == [], "formulas that MathJax cannot read"
        assert visit.every("article img", "e.alt.trim() ? '' : e.src") == [], "images without alternative text"
        assert visit.every("img", "e.naturalWidth || !e.checkVisibility() ? '' : e.src") == [], (
            "images that are not there"
        )
        for size in (DESKTOP, PHONE):
            visit.page.set_viewport_size(size)
            boxes = ".search-button__button, form.bd-search"
            shown = visit.every(boxes, "e.checkVisibility() && e.getBoundingClientRect().right > 0 ? e.className : ''")
            assert len(shown) == 1, f"search boxes at a width of {size['width']}: {shown}"
            width = visit.ask("document.documentElement.scrollWidth")
            assert width <= size["width"], f"{width} px wide on a screen of {size['width']}"
        visit.page.emulate_media(color_scheme="dark")
        visit.page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
        grounds = visit.every("article img", "getComputedStyle(e).backgroundColor + ' ' + getComputedStyle(e).filter")
        assert set(grounds) <= {"rgb(255, 255, 255) none"}, "figures without a light ground, or with changed colours"


# Rules of axe that the theme breaks and we do not mend, each with its reason. There is none.
EXCUSED: dict[str, str] = {}
LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
VISUAL = ["color-contrast", "link-in-text-block", "scrollable-region-focusable"]  # these depend on colours and width
# Colours are the costly part: of code the first word of each kind stays; formulas in a line have the line's colour.
SIMPLER = """() => {
  const seen = new Set();
  for (const e of document.querySelectorAll("pre span"))
    seen.has(e.className) ? e.replaceWith(e.textContent) : seen.add(e.className);
  for (const e of document.querySelectorAll("mjx-container:not([display])")) e.replaceChildren("x");
}"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_page_is_accessible(browser: Any, site: str, name: str) -> None:
    """What axe-core finds, on a desktop in the light and on a phone in the dark."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()

    def violations(rules: list[str]) -> list[str]:
        options = {"runOnly": rules, "resultTypes": ["violations"]}
        found = axe.run(visit.page, options=options).response["violations"]
        return [f"{v['id']}: {n['html'][:200]}" for v in found if v["id"] not in EXCUSED for n in v["nodes"]]

    with Visit(browser, site, name, viewport=DESKTOP, color_scheme="light") as visit:
        visit.page.evaluate(SIMPLER)
        assert violations(LEVELS) == []
        if name.endswith("/api"):
            return  # half a minute for each look at so long a page
        visit.page.set_viewport_size(PHONE)
        visit.page.emulate_media(color_scheme="dark")
        visit.page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
        visit.page.wait_for_timeout(1000)  # the theme waits a moment before it looks for what scrolls now
        assert violations(VISUAL) == []


def test_axe_would_notice_grey_on_white(browser: Any, site: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed").Axe()
    with Visit(browser, site, "book/back/bibliography", viewport=DESKTOP, color_scheme="light") as visit:
        visit.page.add_style_tag(content="h1 { color: #999 !important }")
        found = axe.run(visit.page, options={"runOnly": ["color-contrast"]}).response["violations"]
    assert [v["id"] for v in found] == ["color-contrast"]


def preview(visit: Visit) -> str:
    """What is shown beside a reference, if anything is."""
    return " ".join(visit.every("#preview:popover-open", "e.textContent")).strip()


def test_references_show_what_they_point_to(browser: Any, site: str) -> None:
    """By mouse, by keyboard and by touch; it can be pointed at and sent away (WCAG 1.4.13)."""
    shown = "document.querySelector('#preview:popover-open')"
    with Visit(browser, site, "book/build/attribution", viewport=DESKTOP) as visit:
        page, links = visit.page, visit.page.locator(".bd-article a.reference.internal")
        cited = links.and_(page.locator("[href*='bibliography.html#']")).first
        cited.hover()
        page.wait_for_function(shown)
        text = preview(visit)
        assert re.search(r"\b(19|20)\d\d\b", text) and len(text) > 40
        assert cited.get_attribute("aria-describedby") == "preview" and not cited.get_attribute("title")
        page.locator("#preview").hover()
        page.wait_for_timeout(600)
        assert preview(visit) == text
        page.keyboard.press("Escape")
        assert preview(visit) == "" and cited.get_attribute("aria-describedby") is None
        figure = links.and_(page.locator("[href^='#fig-']")).first
        figure.focus()
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("Tab")
        page.wait_for_function(shown)
        assert visit.every("#preview img", "e.alt") and not visit.every("#preview [id]", "e.id")
        page.keyboard.press("Tab")
        page.wait_for_function(f"!{shown} || !document.querySelector('#preview img')")
        assert (visit.errors, visit.failed, visit.foreign) == ([], [], [])
    with Visit(browser, site, "book/build/attribution", viewport=PHONE, has_touch=True) as visit:
        cited = visit.page.locator(".bd-article a.reference.internal[href*='bibliography.html#']").first
        cited.tap()
        visit.page.wait_for_function(shown)
        assert preview(visit).endswith("Go there") and visit.page.url.endswith("attribution.html")
        visit.page.locator("#preview a", has_text="Go there").tap()
        visit.page.wait_for_url("**/bibliography.html#*")


def test_terms_are_shown_from_another_page(browser: Any, site: str) -> None:
    with Visit(browser, site, "book/why/saliency", viewport=DESKTOP) as visit:
        visit.page.locator(".bd-article a[href*='glossary.html#term-']").first.hover()
        visit.page.wait_for_function("document.querySelector('#preview:popover-open')")
        assert len(preview(visit)) > 40


def test_print_is_black_on_white_without_controls(browser: Any, site: str) -> None:
    with Visit(browser, site, "book/build/attribution", viewport=DESKTOP, color_scheme="dark") as visit:
        visit.page.emulate_media(color_scheme="dark", media="print")
        colours = "[getComputedStyle(e).color, getComputedStyle(e).backgroundColor].join(' on ')"
        body = visit.every("html, body, .highlight pre, .highlight span", colours)
        grounds = "(rgb\\(255, 255, 255\\)|rgba\\(0, 0, 0, 0\\))"
        assert [c for c in set(body) if not re.fullmatch(f"rgb\\(0, 0, 0\\) on {grounds}", c)] == []
        controls = "button, .bd-sidebar-primary, .bd-sidebar-secondary, .bd-header, footer, .headerlink"
        assert visit.every(controls, "e.checkVisibility() ? e.outerHTML.slice(0, 200) : ''") == []
        title, content = ".solution .admonition-title", ".solution > :not(.admonition-title)"
        seen = "String(e.checkVisibility())"
        assert (set(visit.every(title, seen)), set(visit.every(content, seen))) == ({"true"}, {"false"})
        visit.page.emulate_media(media="screen")
        visit.page.get_by_role("button", name="Open all solutions").click()
        visit.page.emulate_media(media="print")
        assert set(visit.every(content, seen)) == {"true"}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_print_fits_on_paper(browser: Any, site: str, name: str) -> None:
    """A4 with margins of 16 mm is 672 pixels wide."""
    with Visit(browser, site, name, viewport={"width": 672, "height": 1000}) as visit:
        visit.page.emulate_media(media="print")
        beyond = "e.checkVisibility() && e.getBoundingClientRect().right > 674 ? e.outerHTML.slice(0, 200) : ''"
        assert visit.every(".bd-article :is(img, table, pre, p, mjx-container[display] > mjx-math)", beyond) == []


class Marks(HTMLParser):
    """Anchors, links and meta data of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.meta: dict[str, str] = {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.ids.update(found[key] for key in ("id", "name") if key in found)
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        if tag == "meta" and "content" in found:
            self.meta[found.get("property", found.get("name", ""))] = found["content"]


@functools.cache
def marks(path: Path) -> Marks:
    return Marks(path)


def dead(page: Path) -> list[str]:
    """Links of a page within its site that lead to no file, or to no place in it."""
    found = []
    for link in marks(page).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or link in ("", "#"):
            continue
        target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
        anchor = unquote(parts.fragment) if target.suffix == ".html" else ""
        if not target.is_file() or anchor and anchor not in marks(target).ids:
            found.append(link)
    return found


@pytest.mark.usefixtures("site")
def test_links_within_the_site_arrive() -> None:
    """On all pages: also the index, and the code of the modules, which links back to the API."""
    pages = [page for page in SITE.rglob("*.html") if "_static" not in page.relative_to(SITE).parts]
    assert {*(SITE / f"{name}.html" for name in PAGES), SITE / "_modules/sdecor/sources.html"} <= {*pages}
    assert {page.relative_to(SITE).as_posix(): links for page in pages if (links := dead(page))} == {}


def test_dead_links_would_be_noticed(tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("<p id=here>")
    page = tmp_path / "page.html"
    links = ["there.html", "there.html#here", "there.html#gone", "gone.html", "#gone", "#top", "https://x.org/a#b", "#"]
    page.write_text("<h1 id=top>" + "".join(f"<a href='{link}'>" for link in links))
    assert dead(page) == ["there.html#gone", "gone.html", "#gone"]


@pytest.mark.usefixtures("site")
def test_numbers_of_figures_theorems_exercises_and_equations_occur_once() -> None:
    texts = [(SITE / f"{name}.html").read_text(encoding="utf-8") for name in PAGES]
    numbered = r'class="(?:caption-number|eqno)">\s*([^<]*?)\s*<'
    numbers = Counter(number for text in texts for number in re.findall(numbered, text))
    assert {"Fig.", "Table", "Theorem", "Exercise"} <= {number.split()[0] for number in numbers}
    assert [number for number, times in numbers.items() if times > 1] == []


@pytest.mark.usefixtures("site")
def test_site_map_and_cards_name_every_page() -> None:
    base = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["html"]["baseurl"]
    places = [e.text or "" for e in ElementTree.parse(SITE / "sitemap.xml").iter() if e.tag.endswith("}loc")]
    assert sorted(places) == sorted(f"{base}{name}.html" for name in PAGES)
    for name in PAGES:
        meta = marks(SITE / f"{name}.html").meta
        assert 50 <= len(meta["description"]) <= 250 and not re.search(r"\\[(\[a-z]", meta["description"]), name
        assert meta["og:url"] == f"{base}{name}.html" and meta["og:title"] and meta["og:image:alt"]
        card = SITE / meta["og:image"].removeprefix(base)
        assert card.stat().st_size < 150_000, name


@pytest.mark.parametrize("name", notebooks())
def test_notebook_can_be_launched_and_downloaded(browser: Any, site: str, name: str) -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    repository, branch = urlsplit(config["repository"]["url"]).path, config["repository"]["branch"]
    with Visit(browser, site, name, viewport=DESKTOP) as visit:
        links = visit.every(".article-header-buttons a", "e.href")
        assert f"https://colab.research.google.com/github{repository}/blob/{branch}/{name}.ipynb" in links
        assert f"https://mybinder.org/v2/gh{repository}/{branch}?urlpath=lab/tree/{name}.ipynb" in links
        (download,) = [a for a in links if a.endswith(".ipynb") and a.startswith(site)]
        assert '"cells"' in visit.context.request.get(download).text()


def test_search_finds_a_page(browser: Any, site: str) -> None:
    with Visit(browser, site, "search", viewport=DESKTOP) as visit:
        visit.page.goto(f"{site}search.html?q=whitening")
        visit.page.wait_for_selector("#search-results li a")
        assert visit.foreign == []
