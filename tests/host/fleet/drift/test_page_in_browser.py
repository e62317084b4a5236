"""The page of drift in a real browser: nothing is cut at any width or on paper, axe finds no fault, colours follow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from eyas_host.fleet.drift.monitor import Monitor
from eyas_host.fleet.drift.page import render
from eyas_host.fleet.store.database import Store
from tests.support.browser import (
    CUT_BOXES,
    CUT_CELLS,
    NARROW_PLOTS,
    PAPER_WIDTH,
    SMALL_TEXT,
    WIDER_THAN_THE_PAGE,
    chromium,
)
from tests.support.drift_parts import BEGIN, DAY, DAYS, TUNING

NOW = BEGIN + DAYS * DAY + 600
LONG = "Kratzer_auf_der_Oberfläche_mit_Flugrost_und_Öl_verunreinigt_ßßßß"


@pytest.fixture(scope="module")
def html(fleet: str) -> str:
    """A fleet with an alarm, another one of a device with long names, and one in the table of further ones."""
    with Store(fleet) as store:
        monitor = Monitor(store, TUNING, clock=lambda: NOW)
        monitor.load()
        first = monitor.alarms["cam-7"]
        change = msgspec.structs.replace(first.changes[0], measure=f"confidence of {LONG}", deviations=-40.0)
        monitor.sites["cam-12"] = LONG
        monitor.alarms["cam-12"] = msgspec.structs.replace(
            first,
            device="cam-12",
            id="2",
            site=LONG,
            state="suspected",
            changes=(change, *first.changes),
            ood_reason=LONG * 3,
            advice=f"look (`eyas send {LONG} snapshot`) " * 4,
            model=f"{LONG} 1.0.0",
        )
        return render(store, monitor, NOW)


@pytest.fixture
def page(html: str) -> Iterator[Any]:
    with chromium() as browser:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_content(html)
        yield tab


def test_nothing_is_cut_and_axe_finds_no_fault(page: Any) -> None:
    from axe_playwright_python.sync_playwright import Axe

    assert page.locator("figure svg").count() == 2
    for width in (390, 1280, 1920):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate(WIDER_THAN_THE_PAGE) == [], width
        assert page.evaluate(CUT_CELLS) == [], width
        assert page.evaluate(NARROW_PLOTS) == [], width
        if width > 390:
            assert page.evaluate(CUT_BOXES) == [], width
        assert page.evaluate(SMALL_TEXT, 9) == [], width
    page.set_viewport_size({"width": 390, "height": 900})
    seen = page.evaluate("""() => { const line = document.querySelector('.since').getBoundingClientRect();
        return 0 < line.left && line.left < innerWidth }""")
    assert seen  # a narrow window shows the end of the plot first, with the alarm
    for scheme, width in (("light", 1280), ("dark", 390)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [
            (fault["id"], node["html"][:120])
            for fault in found
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"]
        ] == []
    page.emulate_media(media="print")
    page.set_viewport_size({"width": PAPER_WIDTH, "height": 1000})
    assert page.evaluate(WIDER_THAN_THE_PAGE) == []
    assert page.evaluate(CUT_BOXES) == [] and page.evaluate(CUT_CELLS) == []
    assert page.evaluate(SMALL_TEXT, 6) == []


def test_a_screen_reader_gets_title_and_description_of_each_plot(page: Any) -> None:
    for plot in page.get_by_role("img").all():
        title, text = (
            page.locator(f"[id='{id_}']").text_content() for id_ in plot.get_attribute("aria-labelledby").split()
        )
        assert title.endswith((" of cam-7", " of cam-12")) and "Drift since" in text
    assert page.get_by_role("img").count() == 2
