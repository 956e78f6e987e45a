"""The page in a real browser."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from made_runs import EVIL, METHODS
from page_browser import Browser

from lethebench.leaderboard import build

SHOWN = "section.board:not([hidden])"
ROWS = f"[...document.querySelectorAll('{SHOWN} tbody.methods tr.row')]"
NAMES = (
    f"return {ROWS}.filter(r => !r.hidden)"
    ".map(r => r.querySelector('.m').textContent + ' ' + r.querySelector('.s').textContent)"
)
METHOD_ROWS = sum(not m.control for m in METHODS)


def values(browser: Browser, key: str) -> list[float | None]:
    """A column of the shown methods, top to bottom."""
    script = f"""
      const heads = [...document.querySelectorAll('{SHOWN} thead th.num')];
      const at = 4 + heads.findIndex(h => h.dataset.key === arguments[0]);
      const texts = {ROWS}.filter(r => !r.hidden).map(r => r.cells[at].dataset.v);
      return texts.map(v => v === '' ? null : Number(v));"""
    found: list[float | None] = browser.js(script, key)
    return found


def press(browser: Browser, selector: str) -> None:
    browser.js("arguments[0].click()", browser.driver.find_element("css selector", f"{SHOWN} {selector}"))


def state(browser: Browser) -> dict[str, list[str]]:
    return parse_qs(urlsplit(browser.driver.current_url).fragment)


@pytest.mark.parametrize(
    ("width", "dark"), [(375, False), (375, True), (768, False), (1280, False), (1920, True)]
)
def test_no_complaint_no_request_no_overflow(browser: Browser, site: Path, width: int, dark: bool) -> None:
    browser.open(site, width=width, dark=dark)
    assert browser.overflow() <= 0
    browser.js(f"{ROWS}.forEach(r => r.querySelector('.open').click())")
    assert browser.overflow() <= 0
    asked = browser.requests()
    assert site.as_uri() in asked
    assert [u for u in asked if u != site.as_uri() and not u.startswith("data:")] == []
    assert browser.complaints() == []


def test_sorting_goes_best_first_then_worst_first_then_back(browser: Browser, site: Path) -> None:
    browser.open(site)
    start = browser.js(NAMES)
    head = 'th[data-key="fbmem.memorized"]'
    press(browser, f"{head} button")
    found = values(browser, "fbmem.memorized")
    numbers = [v for v in found if v is not None]
    assert numbers == sorted(numbers) and found[-2:] == [None, None], "lower is better; blanks last"
    th = browser.driver.find_element("css selector", f"{SHOWN} {head}")
    assert th.get_attribute("aria-sort") == "ascending"
    press(browser, f"{head} button")
    found = values(browser, "fbmem.memorized")
    numbers = [v for v in found if v is not None]
    assert numbers == sorted(numbers, reverse=True) and found[-2:] == [None, None]
    assert th.get_attribute("aria-sort") == "descending" and state(browser)["sort"] == ["-fbmem.memorized"]
    press(browser, f"{head} button")
    assert browser.js(NAMES) == start and th.get_attribute("aria-sort") == "none"


@pytest.mark.parametrize("key", ["clip_mini.score", "acc_g", "cost.fit_seconds", "fd_mini"])
def test_every_kind_of_column_sorts_by_its_better_direction(browser: Browser, site: Path, key: str) -> None:
    browser.open(site)
    press(browser, f'th[data-key="{key}"] button')
    found = [v for v in values(browser, key) if v is not None]
    assert len(found) > 5 and found == sorted(found, reverse=key == "clip_mini.score")


def test_controls_stay_on_top_when_sorted(browser: Browser, site: Path) -> None:
    browser.open(site, "#sort=-clip_mini.score")
    first = f"return document.querySelector('{SHOWN} tbody.controls .m').textContent"
    assert browser.js(first) == "base" and browser.js(NAMES)[0].startswith("wen")


def test_text_filter_and_its_count(browser: Browser, site: Path) -> None:
    browser.open(site)
    box = browser.driver.find_element("css selector", f"{SHOWN} input[type=search]")
    box.send_keys("uniforget str")
    assert sorted(browser.js(NAMES)) == ["ca+uniforget strong", "uniforget strong"]
    count = browser.driver.find_element("css selector", f"{SHOWN} .count")
    assert count.text == f"2 of {METHOD_ROWS} rows"
    box.send_keys(" nonsense")
    assert browser.js(NAMES) == []
    empty = browser.driver.find_element("css selector", f"{SHOWN} .empty")
    assert empty.is_displayed()
    press(browser, "[data-clear]")
    assert len(browser.js(NAMES)) == METHOD_ROWS and not empty.is_displayed()


def test_facets_of_family_and_knowledge(browser: Browser, site: Path) -> None:
    browser.open(site)
    press(browser, '[data-family="sampling"]')
    assert {n.split()[0] for n in browser.js(NAMES)} == {"wen", "flowedit"}
    press(browser, '[data-family="sampling"]')
    press(browser, '[data-see="neutral prompts"]')
    found = {n.split()[0] for n in browser.js(NAMES)}
    assert "uniforget" in found and "wen" in found, "a method that sees less fits too"
    assert "ca+uniforget" not in found and "nemo" not in found
    press(browser, '[data-see="concept names"]')
    assert "ca+uniforget" in {n.split()[0] for n in browser.js(NAMES)}


def test_column_groups_and_differences(browser: Browser, site: Path) -> None:
    browser.open(site)
    head = browser.driver.find_element("css selector", f'{SHOWN} th[data-key="copy_mini.similarity"]')
    assert not head.is_displayed(), "the group of further scores is closed at first"
    press(browser, '[data-group="more"]')
    assert head.is_displayed()
    press(browser, '[data-group="memorization"]')
    assert not browser.driver.find_element("css selector", f'{SHOWN} th[data-key="fbmem.vm"]').is_displayed()
    press(browser, "[data-diff]")
    cell = browser.driver.find_element("css selector", f"{SHOWN} tbody.methods td.g-utility")
    assert cell.text.startswith(("−", "+", "0")) and " to " in cell.text


def test_drawer_shows_images_and_provenance(browser: Browser, site: Path) -> None:
    browser.open(site)
    before = browser.js("return document.querySelectorAll('img[src]').length")
    row = browser.driver.find_element("css selector", f"{SHOWN} tr[id^=uniforget-strong]")
    button = row.find_element("css selector", ".open")
    assert button.get_attribute("aria-expanded") == "false"
    browser.js("arguments[0].click()", button)
    drawer = browser.driver.find_element("id", button.get_attribute("aria-controls") or "")
    assert drawer.is_displayed() and button.get_attribute("aria-expanded") == "true"
    loaded = browser.js(
        """
      const images = [...arguments[0].querySelectorAll('img')];
      return Promise.all(images.map(i => i.decode())).then(() => images.map(i => i.naturalWidth));""",
        drawer,
    )
    assert len(loaded) >= 30 and set(loaded) == {64}
    assert browser.js("return document.querySelectorAll('img[src]').length") == before + len(loaded)
    for text in ("All scores", "By kind", "Provenance", "an invented processor", "0123456789ab", "Citation"):
        assert text in drawer.text
    browser.js("arguments[0].click()", button)
    assert not drawer.is_displayed()


def test_state_lives_in_the_address(browser: Browser, site: Path) -> None:
    browser.open(site)
    press(browser, 'th[data-key="clip_mini.score"] button')
    press(browser, '[data-family="weights"]')
    press(browser, '[data-group="cost"]')
    press(browser, "[data-diff]")
    press(browser, "tbody.methods tr.row:not([hidden]) .open")
    fragment = "#" + urlsplit(browser.driver.current_url).fragment
    names = browser.js(NAMES)
    assert state(browser)["sort"] == ["-clip_mini.score"] and state(browser)["hide"] == ["cost"]
    browser.open(site, fragment)
    assert browser.js(NAMES) == names
    assert browser.driver.find_element("css selector", f"{SHOWN} tr.drawer:not([hidden])").is_displayed()
    assert "#" + urlsplit(browser.driver.current_url).fragment == fragment


def test_an_address_with_nonsense_does_no_harm(browser: Browser, site: Path) -> None:
    browser.open(site, "#sort=x&family=<b>&open=%22%5D&see=nowhere&board=none&hide=" + "y" * 500)
    assert len(browser.js(NAMES)) == METHOD_ROWS and browser.complaints() == []


def test_boards_are_chosen_by_the_selector(browser: Browser, site: Path) -> None:
    browser.open(site)
    browser.js(
        "const s = document.querySelector('#board'); s.selectedIndex = 1;s.dispatchEvent(new Event('change'))"
    )
    assert {n.split()[0] for n in browser.js(NAMES)} == {"uniforget"}
    assert state(browser)["board"] == ["planted@1/mini-flux"]
    assert browser.overflow() <= 0


def test_names_from_plugins_are_text(browser: Browser, site: Path) -> None:
    browser.open(site)
    browser.js(f"{ROWS}.forEach(r => r.querySelector('.open').click())")
    browser.js("document.querySelectorAll('.wide .mark').forEach(m => m.dispatchEvent(new Event('focus')))")
    assert any(EVIL in n for n in browser.js(NAMES))
    assert browser.js("return window.pwned === undefined && !document.querySelector('[onerror], img[src=x]')")
    assert browser.complaints() == []


def test_a_mark_of_the_plot_opens_its_row_by_keyboard(browser: Browser, site: Path) -> None:
    browser.open(site)
    mark = browser.driver.find_element(
        "css selector", f"{SHOWN} svg.wide .mark.c0, {SHOWN} svg.wide .mark.c1"
    )
    browser.js("arguments[0].focus()", mark)
    tip = browser.driver.find_element("id", "tip")
    assert tip.is_displayed() and "Memorized:" in tip.text
    mark.send_keys("\ue007")
    row = mark.get_attribute("data-row") or ""
    assert browser.driver.find_element("id", f"{row}-d").is_displayed()
    focused = browser.js("return document.activeElement.closest('tr').id")
    assert focused == row


def lit(browser: Browser) -> set[str]:
    """The methods that stand out on the shown plot."""
    script = f"return [...document.querySelectorAll('{SHOWN} svg.wide .mark:not(.dim)')].map(m => m.dataset.series)"
    return set(browser.js(script))


def test_the_key_makes_a_method_stand_out(browser: Browser, site: Path) -> None:
    browser.open(site)
    everything = lit(browser)
    assert {"base", "uniforget", "nemo", "wen"} < everything
    nemo = browser.driver.find_element("css selector", f'{SHOWN} .pick[data-series="nemo"]')
    browser.js("arguments[0].focus()", nemo)
    assert lit(browser) == {"nemo"}
    browser.js("arguments[0].blur()", nemo)
    assert lit(browser) == everything
    nemo.send_keys(" ")
    assert nemo.get_attribute("aria-pressed") == "true" and state(browser)["pick"] == ["nemo"]
    press(browser, '.pick[data-series="wen"]')
    browser.js("document.activeElement.blur()")
    assert lit(browser) == {"nemo", "wen"}
    browser.open(site, "#" + urlsplit(browser.driver.current_url).fragment)
    assert lit(browser) == {"nemo", "wen"}
    family = browser.driver.find_element("xpath", "//button[text()='Act while sampling (dashed)']")
    browser.js("arguments[0].focus()", family)
    assert lit(browser) == {"wen"}
    assert browser.complaints() == []


@pytest.mark.parametrize(("width", "size"), [(375, "narrow"), (1280, "wide")])
def test_removed_or_hidden_is_drawn_and_told(browser: Browser, site: Path, width: int, size: str) -> None:
    browser.open(site, width=width)
    drawn = [
        e.get_attribute("class")
        for e in browser.driver.find_elements("css selector", f"{SHOWN} .dumbbells svg")
        if e.is_displayed()
    ]
    assert drawn == [size]
    inside = f"""
      const svg = document.querySelector('{SHOWN} .dumbbells svg.{size}'), box = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text, circle')].every(e => {{
        const r = e.getBoundingClientRect();
        return r.left >= box.left - 8 && r.right <= box.right + 8 && r.bottom <= box.bottom + 4; }});"""
    assert browser.js(inside)
    table = browser.driver.find_element("css selector", f"{SHOWN} .verdicts")
    assert table.is_displayed()
    lines = browser.js(
        "return [...arguments[0].tBodies[0].rows].map(r => [...r.cells].slice(0, 3).map(c => c.textContent))",
        table,
    )
    assert ["uniforget", "strong", "hides"] in lines
    assert ["ca+uniforget", "strong", "not told apart"] in lines


def test_attacks_stand_in_the_row_and_sort_the_table(browser: Browser, site: Path) -> None:
    browser.open(site)
    press(browser, "tr[id^=uniforget-strong] .open")
    table = browser.driver.find_element("css selector", f"{SHOWN} tr[id^=uniforget-strong] + tr .attacks")
    texts = browser.js("return [...arguments[0].tBodies[0].rows].map(r => r.textContent)", table)
    assert len(texts) == 2 and texts[0].startswith("embedding") and "the tests" in texts[0]
    assert "hides" in texts[0] and "steps 50" in texts[0] and table.is_displayed()
    press(browser, 'th[data-key="best_known"] button')
    found = values(browser, "best_known")
    numbers = [v for v in found if v is not None]
    assert len(numbers) == 7 and numbers == sorted(numbers) and found[-1] is None


def test_the_table_works_by_keyboard(browser: Browser, site: Path) -> None:
    browser.open(site)
    button = browser.driver.find_element("css selector", f'{SHOWN} th[data-key="fbmem.vm"] button')
    button.send_keys("\ue007")
    assert state(browser)["sort"] == ["fbmem.vm"]
    opener = browser.driver.find_element("css selector", f"{SHOWN} tbody.methods .open")
    opener.send_keys(" ")
    assert opener.get_attribute("aria-expanded") == "true"


def test_first_column_stays_in_sight_on_a_phone(browser: Browser, site: Path) -> None:
    browser.open(site, width=375)
    script = f"""
      const scroller = document.querySelector('{SHOWN} .scroller');
      scroller.scrollLeft = 400;
      return [scroller.scrollLeft, scroller.querySelector('.row .name').getBoundingClientRect().left];"""
    scrolled, left = browser.js(script)
    assert scrolled == 400 and 0 <= left < 20
    assert (
        browser.js(f"return document.querySelector('{SHOWN} svg.narrow').getBoundingClientRect().width") > 250
    )


def test_the_page_reads_without_scripts(browser: Browser, site: Path) -> None:
    browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.open(site)
        rows = browser.driver.find_elements("css selector", "tr.row")
        assert rows[0].is_displayed()
        assert browser.driver.find_element("css selector", "tr.drawer").is_displayed()
        assert browser.driver.find_element("css selector", ".key .pick .dot").is_displayed()
        assert browser.driver.find_element("css selector", ".dumbbells svg.wide").is_displayed()
    finally:
        browser.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_an_empty_page_has_no_complaint(browser: Browser, tmp_path: Path) -> None:
    browser.open(build(tmp_path / "none", tmp_path / "site"))
    assert browser.complaints() == [] and browser.overflow() <= 0
