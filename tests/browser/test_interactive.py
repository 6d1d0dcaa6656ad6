"""The figure with sliders and the quizzes, in a real browser: run `make book` first.

Skipped, with the reason, where the site, playwright or Chromium is missing.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import test_pages
from test_pages import DESKTOP, PAGES, PHONE, ROOT, Visit

site, browser = test_pages.site, test_pages.browser

CHAPTER = "book/why/correlation"
QUIZZES = [name for name in PAGES if name.endswith("/quiz")]
WIDGET, FALLBACK = ".sdecor-interactive", ".tag_interactive-fallback"

# What the figure shows, once it is drawn again.
SHOWN = """() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => {
  const all = s => [...document.querySelectorAll('.sdecor-interactive ' + s)];
  const rgb = c => [d3.rgb(c).r, d3.rgb(c).g, d3.rgb(c).b];
  done({
    settings: all('output').map(e => e.value),
    spoken: all('input').map(e => e.getAttribute('aria-valuetext')),
    bars: all('.panel.weights g[data-part=bar] rect').map(e => +e.getAttribute('height')),
    labels: all('.panel.weights g[data-part=text] text').map(e => +e.textContent),
    places: all('.panel.fields g[data-part=text] text').map(e => e.textContent).filter(t => /^\\d$/.test(t)).length,
    cells: all('.panel.map .cells rect').map(e => rgb(e.getAttribute('fill'))),
    weights: all('.of-weights')[0].textContent,
    map: all('.of-map')[0].textContent,
    words: all('svg[role=img]').map(e => e.getAttribute('aria-label')),
  });
})))"""
SET = """values => document.querySelectorAll('.sdecor-interactive input').forEach((e, i) => {
  e.value = values[i];
  e.dispatchEvent(new Event('input', {bubbles: true}));
})"""


def model(rho: float, copies: int, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights of ridge regression, from a linear system and not from the figure's formula; and the gradient map."""
    covariance = np.full((copies, copies), rho) + (1 - rho) * np.eye(copies)
    weights = np.linalg.solve(covariance + strength * np.eye(copies), covariance[0])
    row, column = np.mgrid[:16, :16] + 0.5
    places = [(x, y) for y in (3, 8, 13) for x in (3, 8, 13) if (x, y) != (8, 8)]
    fields = np.array([np.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * 1.2**2)) for x, y in places[:copies]])
    return weights, np.abs(np.tensordot(weights, fields, 1))


def participation_ratio(v: np.ndarray) -> float:
    return float(v.sum() ** 2 / (v**2).sum())


def same(text: str, value: float, digits: int) -> bool:
    """Whether a number is shown rounded to so many digits."""
    return len(text.partition(".")[2]) == digits and abs(float(text) - value) <= 0.5 * 10**-digits + 1e-9


@pytest.fixture
def chapter(browser: Any, site: str) -> Any:
    with Visit(browser, site, CHAPTER, viewport=DESKTOP) as visit:
        visit.page.wait_for_selector(f"{WIDGET} .cells")
        yield visit
        assert visit.foreign == [], "requests to another host"
        assert visit.failed == [] and visit.errors == []


def test_numbers_weights_and_map_are_those_of_the_model(chapter: Visit) -> None:
    for rho in (0, 0.01, 0.5, 0.9, 1):
        for copies in (1, 2, 5, 8):
            for step in (0, 27, 40, 60):
                strength = 10 ** (step / 20 - 3)
                chapter.page.evaluate(SET, [rho, copies, step])
                shown = chapter.page.evaluate(SHOWN)
                weights, gradient = model(rho, copies, strength)
                assert shown["settings"] == [f"{rho:.2f}", f"{copies}", f"{float(f'{strength:.3g}'):g}"]
                assert shown["spoken"][2] == shown["settings"][2]
                assert same(shown["weights"], participation_ratio(weights), 2), (rho, copies, step, shown["weights"])
                assert same(shown["map"], participation_ratio(gradient), 1), (rho, copies, step, shown["map"])
                heights = np.array(shown["bars"])
                np.testing.assert_allclose(heights / heights.sum(), weights / weights.sum(), atol=1e-6)
                np.testing.assert_allclose(shown["labels"], weights[[0, -1]][:copies], atol=0.005 + 1e-9)
                assert shown["places"] == copies
                scale = "v => v.map(x => d3.rgb(d3.interpolateMagma(Math.sqrt(x)))).map(c => [c.r, c.g, c.b])"
                colours = chapter.page.evaluate(scale, gradient.ravel().tolist())
                np.testing.assert_allclose(shown["cells"], colours, atol=6)
                assert f"{weights[0]:.2f}" in shown["words"][0] and str(copies) in shown["words"][1]


def test_slider_by_mouse(chapter: Visit) -> None:
    before = chapter.page.evaluate(SHOWN)
    slider = chapter.page.locator(f"{WIDGET} input").first
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    chapter.page.mouse.move(box["x"] + 8 + 0.9 * (box["width"] - 16), box["y"] + box["height"] / 2)
    chapter.page.mouse.down()
    chapter.page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + box["height"] / 2, steps=5)
    chapter.page.mouse.move(box["x"] + 0.2 * box["width"], box["y"] + box["height"] / 2, steps=5)
    chapter.page.mouse.up()
    after = chapter.page.evaluate(SHOWN)
    assert float(before["settings"][0]) == 0.9 and 0.1 < float(after["settings"][0]) < 0.3
    for part in ("bars", "labels", "cells", "weights", "map", "words"):
        assert before[part] != after[part], part


def test_sliders_and_reset_by_keyboard(chapter: Visit) -> None:
    start = chapter.page.evaluate(SHOWN)
    assert start["settings"] == ["0.90", "4", "0.1"]
    press = chapter.page.keyboard.press
    chapter.page.locator(f"{WIDGET} input").first.focus()
    press("ArrowLeft")
    one = chapter.page.evaluate(SHOWN)
    assert one["settings"][0] == "0.89"
    assert one["bars"] != start["bars"] and one["cells"] != start["cells"] and one["weights"] != start["weights"]
    outline = chapter.ask("getComputedStyle(document.activeElement).outlineStyle")
    assert outline not in ("none", "auto"), "the slider that has the focus is not marked"
    press("End")
    press("Tab")
    press("ArrowRight")
    equal = chapter.page.evaluate(SHOWN)
    assert equal["settings"][:2] == ["1.00", "5"] and equal["weights"] == "5.00" and equal["spoken"][1] == "5 features"
    press("Tab")
    press("Home")
    assert chapter.page.evaluate(SHOWN)["settings"][2] == "0.001"
    chapter.page.wait_for_function(
        "document.querySelector('.sdecor-interactive [aria-live=polite]').textContent.includes('5.00')"
    )
    press("Tab")
    press("Enter")
    assert chapter.page.evaluate(SHOWN) == start


def test_figure_has_names_and_large_targets(chapter: Visit) -> None:
    chapter.page.set_viewport_size(PHONE)
    chapter.page.wait_for_timeout(300)
    assert chapter.ask("document.documentElement.scrollWidth") <= PHONE["width"]
    assert all(len(words.split()) > 4 for words in chapter.page.evaluate(SHOWN)["words"])
    assert len(chapter.every(f"{WIDGET} input", "e.labels.length === 1 && e.labels[0].textContent.trim()")) == 3
    assert not chapter.every(f"{WIDGET} :is(input, button)", "e.getBoundingClientRect().height < 24")
    edges = chapter.every(f"{WIDGET} svg", "e.getBoundingClientRect().right")
    assert len(edges) == 3 and max(edges) <= PHONE["width"]


def test_links_to_the_static_figure_lead_to_the_live_one(chapter: Visit) -> None:
    assert chapter.every(f"{WIDGET} figure", "e.id")
    assert not chapter.every(f"{FALLBACK} figure", "e.id")


def test_on_paper_the_static_figure_takes_the_place_of_the_live_one(chapter: Visit) -> None:
    seen = "s => document.querySelector(s).checkVisibility()"
    assert chapter.page.evaluate(seen, WIDGET) and not chapter.page.evaluate(seen, FALLBACK)
    chapter.page.emulate_media(media="print")
    assert chapter.page.evaluate(seen, f"{FALLBACK} img") and not chapter.page.evaluate(seen, f"{WIDGET} figure")


def test_without_scripts_the_static_figure_shows(browser: Any, site: str) -> None:
    with Visit(browser, site, CHAPTER, java_script_enabled=False) as visit:
        assert visit.page.locator(f"{FALLBACK} img").first.is_visible()
        assert visit.page.locator(f"{WIDGET} figure").count() == 0


def test_where_the_libraries_are_missing_the_static_figure_stays(browser: Any, site: str) -> None:
    with Visit(browser, site, "search") as visit:  # any page, to set up the tab
        visit.page.route("**/vendor/plot*", lambda route: route.abort())
        visit.page.goto(f"{site}{CHAPTER}.html")
        visit.page.wait_for_load_state("networkidle")
        assert visit.page.locator(f"{FALLBACK} img").first.is_visible()
        assert visit.page.locator(f"{WIDGET} figure").count() == 0


def test_other_pages_load_no_library(browser: Any, site: str) -> None:
    with Visit(browser, site, "search") as visit:
        asked: list[str] = []
        visit.page.on("request", lambda request: asked.append(request.url))
        visit.page.goto(f"{site}book/intro.html")
        visit.page.wait_for_load_state("networkidle")
        assert any("interactive.js" in url for url in asked)
        assert not [url for url in asked if "/vendor/" in url and ("d3" in url or "plot" in url)]


def source(name: str) -> list[list[bool]]:
    """For each question of a quiz, which of its options are right."""
    text = (ROOT / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\{admonition\} Question (\d+)\n:class: quiz\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert [int(number) for number, _ in blocks] == list(range(1, len(blocks) + 1))
    return [[mark == "x" for mark in re.findall(r"^- \[([ x])\] ", block, re.MULTILINE)] for _, block in blocks]


@pytest.fixture
def quiz(browser: Any, site: str, request: pytest.FixtureRequest) -> Any:
    with Visit(browser, site, getattr(request, "param", QUIZZES[0]), viewport=DESKTOP) as visit:
        yield visit
        assert visit.foreign == [], "requests to another host"
        assert visit.failed == [] and visit.errors == []


def score(visit: Visit) -> str:
    return visit.page.inner_text(".quiz-score p")


@pytest.mark.parametrize(("quiz", "name"), [(n, n) for n in QUIZZES], indirect=["quiz"])
def test_every_question_knows_its_right_answers(quiz: Visit, name: str) -> None:
    expected = source(name)
    assert 8 <= len(expected) <= 10
    boxes = quiz.page.locator(".admonition.quiz").all()
    assert len(boxes) == len(expected)
    for box, right in zip(boxes, expected, strict=True):
        assert len(right) >= 3 and 1 <= sum(right) < len(right)
        assert box.locator("legend").inner_text().strip()
        options, feedback = box.locator(".quiz-option"), box.locator(".quiz-feedback")
        assert options.count() == feedback.count() == len(right)
        assert feedback.filter(visible=True).count() == 0
        several = sum(right) > 1
        assert box.locator("input[type=checkbox]").count() == (len(right) if several else 0)
        said = []
        for i in range(len(right)):
            options.nth(i).locator("label").click(position={"x": 2, "y": 4})
            if not several:
                assert feedback.filter(visible=True).count() == 1
                said.append(feedback.nth(i).inner_text())
        if several:
            box.get_by_role("button", name="Check").click()
            said = feedback.all_inner_texts()
            assert "Not yet" in box.locator(".quiz-summary").inner_text()
        assert [text.startswith("Right.") for text in said] == right
        assert all(len(text.split()) > 6 for text in said), "an explanation is missing"
    of_first = sum(len(right) > 0 and right[0] and sum(right) == 1 for right in expected)
    assert score(quiz) == f"{of_first} of {len(expected)} at the first try."
    assert quiz.ask("!document.querySelector('article').textContent.includes('\\\\(')"), "raw formulas"
    quiz.page.set_viewport_size(PHONE)
    assert quiz.ask("document.documentElement.scrollWidth") <= PHONE["width"]
    assert not quiz.every(".quiz :is(input, button)", "Math.min(e.offsetHeight, e.offsetWidth) < 24")


def test_first_try_counts_and_start_again_forgets(quiz: Visit) -> None:
    answers = source(QUIZZES[0])
    press, boxes = quiz.page.keyboard.press, quiz.page.locator(".admonition.quiz")
    assert score(quiz).startswith(f"{len(answers)} questions")
    one, other = [i for i, right in enumerate(answers) if sum(right) == 1 and not right[0]][:2]
    several = next(i for i, right in enumerate(answers) if sum(right) > 1)

    # By mouse: wrong first, then right. Only the first counts.
    box = boxes.nth(one)
    box.locator("input").nth(0).click()
    assert box.locator(".quiz-feedback").filter(visible=True).inner_text().startswith("Not right.")
    assert score(quiz).startswith("0 of 1 ")
    box.locator("label").nth(answers[one].index(True)).click()
    assert box.locator(".quiz-feedback").filter(visible=True).inner_text().startswith("Right.")
    assert score(quiz).startswith("0 of 1 ")

    # By keyboard: the arrows pass wrong options without choosing them.
    box = boxes.nth(other)
    box.locator("input").nth(0).focus()
    for _ in range(answers[other].index(True)):
        press("ArrowDown")
        assert box.locator("input:checked").count() == 0
    press("Space")
    assert box.locator(".quiz-feedback").filter(visible=True).inner_text().startswith("Right.")
    assert score(quiz).startswith("1 of 2 ")

    # Several right answers: nothing is said before the check, an empty one does not count, and all must be marked.
    box = boxes.nth(several)
    check = box.get_by_role("button", name="Check")
    check.click()
    assert "at least one" in box.locator(".quiz-summary").inner_text()
    assert score(quiz).startswith("1 of 2 ")
    box.locator("input").first.focus()
    for right in answers[several]:
        if right:
            press("Space")
        press("Tab")
    assert box.locator(".quiz-feedback").filter(visible=True).count() == 0
    press("Enter")
    assert box.locator(".quiz-summary").inner_text().startswith("Right")
    assert box.locator(".quiz-feedback").filter(visible=True).count() == sum(answers[several])
    assert score(quiz).startswith("2 of 3 ")

    quiz.page.get_by_role("button", name="Start again").click()
    assert score(quiz).startswith(f"{len(answers)} questions")
    assert quiz.page.locator("input:checked").count() == 0
    assert quiz.page.locator(".quiz-feedback").filter(visible=True).count() == 0
    press("Enter")  # the focus is on the first option of the first question
    assert score(quiz).startswith(f"{int(answers[0] == [True] + [False] * (len(answers[0]) - 1))} of 1 ")


def test_verdict_is_a_word_and_a_shape_with_enough_contrast(quiz: Visit) -> None:
    contrast = """e => {
      const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((s, v, i) => s + v * [0.2126, 0.7152, 0.0722][i], 0);
      let ground = e;
      while (/, 0\\)$/.test(getComputedStyle(ground).backgroundColor)) ground = ground.parentElement;
      const [a, b] = [getComputedStyle(e).color, getComputedStyle(ground).backgroundColor].map(light);
      return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    }"""
    answers = source(QUIZZES[0])
    for theme in ("light", "dark"):
        quiz.page.emulate_media(color_scheme=theme)
        quiz.page.wait_for_function(f"document.documentElement.dataset.theme === '{theme}'")
        for box, right in zip(quiz.page.locator(".admonition.quiz").all(), answers, strict=True):
            for i in range(len(right)) if sum(right) == 1 else ():
                box.locator("input").nth(i).click()
                verdict = box.locator(".quiz-verdict").filter(visible=True)
                assert verdict.locator("circle" if right[i] else "rect").count() == 1
                assert verdict.evaluate(contrast) >= 4.5


@pytest.mark.parametrize("name", QUIZZES)
@pytest.mark.parametrize("scripts", [True, False])
def test_on_paper_and_without_scripts_answers_are_readable(browser: Any, site: str, name: str, scripts: bool) -> None:
    """With scripts the page is printed, fresh; without, it is looked at as it comes."""
    options, right = [len(marks) for marks in source(name)], sum(map(sum, source(name)))
    with Visit(browser, site, name, java_script_enabled=scripts, viewport=DESKTOP) as visit:
        if scripts:
            visit.page.emulate_media(media="print")
            assert visit.page.locator(".quiz-feedback").filter(visible=True).count() == sum(options)
            assert visit.page.locator(":is(.quiz, .quiz-score) :is(input, button)").filter(visible=True).count() == 0
            marks = visit.every(".quiz-option label", "getComputedStyle(e, '::before').content")
            assert sum("☑" in mark for mark in marks) == right and len(marks) == sum(options)
        else:
            items = visit.page.locator(".quiz li.task-list-item")
            assert items.count() == items.filter(visible=True).count() == sum(options)
            assert visit.page.locator(".quiz li.task-list-item > ul > li").filter(visible=True).count() == sum(options)
            assert visit.page.locator(".quiz input[checked]").filter(visible=True).count() == right
