"""report.html in a real browser: it runs, fits a phone, can be used by keyboard, and hostile text stays text.

Needs a Chromium; on Debian and Ubuntu: apt-get install chromium.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distill.browser import Browser, find_chromium
from tests.distill.fake_run import make_run
from tests.distill.test_report_page import make_report

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no Chromium on this machine")

ROWS = "[...document.querySelectorAll('#{} .list button')]"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = tmp_path_factory.mktemp("runs")
    plain, hostile = make_run(runs / "plain"), make_run(runs / "hostile", hostile=True)
    empty = make_run(runs / "empty", stages=())
    for folder in (plain, hostile, empty):
        make_report(folder)
    return {folder.name: folder / "report.html" for folder in (plain, hostile, empty)}


def choose(browser: Browser, section: str, name: str, value: str) -> int:
    """Set a control as a person would, and return how many items are left."""
    browser.evaluate(
        f"(() => {{ const c = document.querySelector('#{section} [name={name}]'); c.value = {value!r};"
        " c.dispatchEvent(new Event('input', { bubbles: true })); })()"
    )
    return browser.evaluate(ROWS.format(section) + ".length")


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
@pytest.mark.parametrize("name", ["plain", "hostile", "empty"])
def test_loads_cleanly_and_never_scrolls_sideways(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.size(width)
    browser.open(pages[name])
    browser.evaluate("document.querySelectorAll('[name=unfold]').forEach((box) => box.click())")
    browser.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true; })")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.problems() == []
    if "DISTILL_SCREENSHOTS" in os.environ:
        shots = Path(os.environ["DISTILL_SCREENSHOTS"])
        browser.screenshot(shots / f"{name}-{width}.png", whole=True)


def test_hostile_text_is_shown_and_never_runs(browser: Browser, pages: dict[str, Path]) -> None:
    browser.size(1280)
    browser.open(pages["hostile"])
    tags = "document.querySelectorAll('img, main script, iframe, main svg[onload], form form, textarea').length"
    seen = ""
    for section in ("traces", "answers"):
        browser.evaluate(f"document.querySelector('#{section} [name=unfold]').click()")
        for index in range(browser.evaluate(ROWS.format(section) + ".length")):
            browser.evaluate(ROWS.format(section) + f"[{index}].click()")
            seen += browser.evaluate(f"document.querySelector('#{section} .detail').textContent")
            assert browser.evaluate(tags) == 0
    for text in ("</script><script>window.pwned=1</script>", '"><img src=x onerror=', "{{ 7*7 }}", "<!--<script>"):
        assert text in seen
    assert browser.evaluate("typeof window.pwned") == "undefined"
    assert browser.problems() == []


def test_policy_stops_markup_that_would_slip_through(browser: Browser, pages: dict[str, Path]) -> None:
    """The wall behind the escaping, tested by breaking the escaping on purpose."""
    browser.size(1280)
    browser.open(pages["plain"])
    slip = "<img src=x onerror='window.pwned=1'><a href='javascript:window.pwned=2'>x</a>"
    browser.evaluate(f'document.querySelector("main").insertAdjacentHTML("beforeend", `{slip}`)')
    browser.evaluate("document.querySelector('main > a').click()")
    browser.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), { text: 'window.pwned=3' }))"
    )
    browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    assert browser.evaluate("typeof window.pwned") == "undefined"
    assert any("Content Security Policy" in problem for problem in browser.problems())


def test_filters_of_traces(browser: Browser, pages: dict[str, Path]) -> None:
    browser.size(1280)
    browser.open(pages["plain"])
    everything = choose(browser, "traces", "search", "")
    accepted = choose(browser, "traces", "verdict", "accepted")
    rejected = choose(browser, "traces", "verdict", "rejected")
    assert accepted + rejected == everything and min(accepted, rejected) > 0
    wrong = choose(browser, "traces", "verdict", "failed:correctness")
    assert 0 < wrong <= rejected
    assert "✗correctness" in browser.evaluate("document.querySelector('#traces .verdicts').textContent")
    assert choose(browser, "traces", "family", "gcd") < wrong
    assert choose(browser, "traces", "search", "no such words") == 0
    assert "Nothing matches" in browser.evaluate("document.querySelector('#traces .detail').textContent")


def test_filters_of_answers_agree_with_the_data(browser: Browser, pages: dict[str, Path]) -> None:
    browser.size(1280)
    browser.open(pages["plain"])
    choose(browser, "answers", "student", "tiny-llama")
    for value, mine, theirs in (("right wrong base", "true", "false"), ("wrong right teacher", "false", "true")):
        other = "teacher" if "teacher" in value else "tiny-llama/base"
        wanted = browser.evaluate(
            f"data.answers.filter((a) => a.answers['tiny-llama'].correct === {mine}"
            f" && a.answers['{other}'].correct === {theirs}).length"
        )
        assert wanted > 0 and choose(browser, "answers", "outcome", value) == wanted
    labels = browser.evaluate("[...document.querySelectorAll('#answers .models h4')].map((h) => h.textContent)")
    assert labels == ["tiny-llama", "base", "answers only", "teacher"]


def test_rows_of_the_list_begin_where_problems_differ(browser: Browser, pages: dict[str, Path]) -> None:
    browser.size(1280)
    browser.open(pages["plain"])
    rows = browser.evaluate("[...document.querySelectorAll('#answers .what')].map((row) => row.textContent)")
    problems = browser.evaluate("data.answers.map((item) => item.problem)")
    # The made-up problems of a family differ from their number on: "… (no. 12): 34 + 56 =".
    assert len(rows) == len(problems)
    assert all(row.startswith("… ") and problem.endswith(row[2:]) for row, problem in zip(rows, problems, strict=True))
    assert all("(no" not in row and " + " in row for row in rows)
    cases = '[[["a b c", "a b d"], "… d"], [["x", "y"], "y"], [["same", "same"], "same"], [["go 12", "go 13"], "… 13"]]'
    script = "(([a, b]) => gist(b, sharedStarts([a, b])))(texts.map((problem) => ({ family: 'f', problem })))"
    assert browser.evaluate(f"{cases}.every(([texts, wanted]) => {script} === wanted)")


def test_answers_stand_side_by_side_or_stacked(browser: Browser, pages: dict[str, Path]) -> None:
    tops = "new Set([...document.querySelectorAll('#answers .models > div')].map((d) => d.offsetTop)).size"
    for width, rows in ((1280, 1), (375, 4)):
        browser.size(width)
        browser.open(pages["plain"])
        assert browser.evaluate(tops) == rows


def test_address_opens_an_item_and_follows_the_choice(browser: Browser, pages: dict[str, Path]) -> None:
    browser.size(375)
    browser.open(pages["plain"])
    trace = browser.evaluate("data.traces[17].id")
    browser.open(pages["plain"], f"#trace/{trace}")
    assert trace in browser.evaluate("document.querySelector('#traces .detail .meta').textContent")
    top = "document.querySelector('#traces .detail').getBoundingClientRect().top"
    assert 0 <= browser.evaluate(top) < 900
    browser.evaluate("[...document.querySelectorAll('#traces .step button')].at(-1).click()")
    following = browser.evaluate("data.traces[18].id")
    assert browser.evaluate("location.hash") == f"#trace/{following}"
    browser.evaluate(f"location.hash = '#answer/{browser.evaluate('data.answers[5].id')}'")
    browser.evaluate("new Promise((done) => setTimeout(done, 50))")
    assert browser.evaluate("data.answers[5].id") in browser.evaluate(
        "document.querySelector('#answers .detail').textContent"
    )
    for nonsense in ("#trace/%", "#trace", "#constructor/x", "#answer/<b>"):
        browser.open(pages["plain"], nonsense)
        assert browser.problems() == []


def test_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.size(1280)
    browser.open(pages["plain"])
    browser.key("Tab")
    assert browser.evaluate("document.activeElement.className") == "skip"
    browser.evaluate(ROWS.format("traces") + "[0].focus()")
    browser.key("ArrowDown")
    browser.key("ArrowDown")
    current = "#traces .list [aria-current=true]"
    assert browser.evaluate(f"document.activeElement === document.querySelector('{current}')")
    assert browser.evaluate(ROWS.format("traces") + f".indexOf(document.querySelector('{current}'))") == 2
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    # The list is one stop of the Tab key, not sixty.
    browser.key("Tab")
    assert not browser.evaluate("document.activeElement.closest('#traces .list') !== null")


def test_text_contrast_in_both_schemes(browser: Browser, pages: dict[str, Path]) -> None:
    """WCAG AA, 4.5 to 1, for every text on the page against what is painted behind it."""
    script = """(() => {
      const paint = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
      const rgb = (color) => {
        paint.clearRect(0, 0, 1, 1); paint.fillStyle = color; paint.fillRect(0, 0, 1, 1);
        return [...paint.getImageData(0, 0, 1, 1).data];
      };
      const light = (c) => c.slice(0, 3).map((v) => v / 255)
        .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
      const behind = (node) => {
        for (let at = node; at; at = at.parentElement) {
          const color = rgb(getComputedStyle(at).backgroundColor);
          if (color[3] === 255) return color;
        }
      };
      const poor = [];
      for (const node of document.querySelectorAll('body *')) {
        const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
        const hidden = node.closest('script, noscript, option, button:disabled') || !node.getClientRects().length;
        if (!own || hidden) continue;
        const style = getComputedStyle(node);
        const [a, b] = [light(rgb(node instanceof SVGElement ? style.fill : style.color)), light(behind(node))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < 4.5) poor.push(`${node.tagName} ${node.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
      }
      return poor;
    })()"""
    for dark in (False, True):
        browser.size(1280, dark=dark)
        browser.open(pages["plain"])
        assert browser.evaluate(script) == []


def test_theme_button_and_chart_cursor(browser: Browser, pages: dict[str, Path]) -> None:
    browser.size(1280)
    browser.open(pages["plain"])
    paper = "getComputedStyle(document.body).backgroundColor"
    light = browser.evaluate(paper)
    browser.evaluate("(() => { const b = document.getElementById('theme'); b.click(); b.click(); })()")
    assert browser.evaluate("document.getElementById('theme').textContent") == "Theme: dark"
    assert browser.evaluate(paper) != light
    browser.evaluate(
        "(() => { const box = document.querySelector('.linechart[data-chart] .box'), at = box.getBoundingClientRect();"
        " box.dispatchEvent(new PointerEvent('pointermove', { clientX: at.left + at.width / 2, bubbles: true })); })()"
    )
    said = browser.evaluate("document.querySelector('figure output').textContent")
    assert said.startswith("at 250,000 tokens: ") and "traces, validation" in said


def test_headings_are_in_order_and_controls_have_names(browser: Browser, pages: dict[str, Path]) -> None:
    browser.size(1280)
    browser.open(pages["plain"])
    levels = browser.evaluate("[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))")
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "link", "combobox", "searchbox", "checkbox", "image", "region"}
    nameless = [n for n in nodes if n.get("role", {}).get("value") in roles and not n.get("name", {}).get("value")]
    assert nameless == []
