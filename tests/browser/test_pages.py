"""The built site in a real browser: run `make book` first.

Skipped, with the reason, where the site, playwright or Chromium is missing.
"""

from __future__ import annotations

import functools
import http.server
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
