"""The report's robustness table and what it says for and against shipping."""

from __future__ import annotations

from html.parser import HTMLParser

import msgspec
import numpy as np

from eyas_host.evaluation.robustness import Robustness, RobustnessRow
from eyas_host.report.html import render_html
from eyas_host.report.signals import judge
from tests.support.report_parts import HOSTILE, Page, make_report


def row(change: str, accuracy: float, flagged: float | None, reason: str = "") -> RobustnessRow:
    return RobustnessRow(
        change=change, balanced_accuracy=accuracy, drop=0.8 - accuracy, confidence=0.93, flagged=flagged, reason=reason
    )


BLIND = row("negative", 0.55, 0.4)
NOTICED = row("light x0.3", 0.5, 1.0, f"darker than 99 % of the training images {HOSTILE}")
HARMLESS = row("light x0.5", 0.79, 0.0)


def robustness(*rows: RobustnessRow, flagged: float | None = 0.0) -> Robustness:
    return Robustness(
        images=200, windows=100, window_frames=30, balanced_accuracy=0.8, flagged=flagged, rows=tuple(rows)
    )


def texts(measured: Robustness | None, level: str) -> list[str]:
    report = make_report(("defective", "ok"), robustness=measured)
    return [signal.text for signal in judge(report) if signal.level == level]


def test_a_change_that_costs_accuracy_unnoticed_is_a_warning() -> None:
    warned = texts(robustness(BLIND, NOTICED, HARMLESS), "yellow")
    assert [text for text in warned if "55.0 %" in text] == [
        "negative: balanced accuracy falls to 55.0 %, and devices flag only 40 % of such windows"
    ]
    assert not any("light" in text for text in warned)


def test_what_no_device_notices_is_said_in_words() -> None:
    assert "no device notices it" in " ".join(texts(robustness(row("flat grey", 0.5, 0.0)), "yellow"))
    assert "no device notices it" in " ".join(texts(robustness(row("flat grey", 0.5, None), flagged=None), "yellow"))


def test_noticing_every_costly_change_counts_for_the_model() -> None:
    assert any("all 1 changes" in text for text in texts(robustness(NOTICED, HARMLESS), "green"))
    assert not any("notice all" in text for text in texts(robustness(HARMLESS), "green")), "nothing cost accuracy"


def test_false_alarms_are_a_warning() -> None:
    assert any(
        "3.0 % of the windows of unchanged" in text for text in texts(robustness(NOTICED, flagged=0.03), "yellow")
    )
    assert not any("unchanged" in text for text in texts(robustness(NOTICED, flagged=0.01), "yellow"))


class Images(HTMLParser):
    """Alternative texts of the images of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.alt: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.alt.append(dict(attrs)["alt"] or "")


def test_the_table_shows_each_change_with_an_example() -> None:
    report = make_report(("defective", "ok"), robustness=robustness(BLIND, NOTICED, HARMLESS))
    example = np.full((128, 128, 3), 90, dtype=np.uint8)
    html = render_html(report, None, {"negative": example})
    page = Page(html)
    negative = [" ".join(cell.split()) for cell in page.row("negative")]
    assert negative[0] == "negative unnoticed"
    assert negative[2:] == ["55.0 %", "25.0", "93 %", "40 %", ""]
    dark = [" ".join(cell.split()) for cell in page.row("light x0.3")]
    assert dark[0] == "light x0.3"
    assert dark[6].startswith("darker than 99 %")
    assert HOSTILE not in html
    assert "an image after negative" in Images(html).alt


def test_a_report_without_the_table_renders() -> None:
    page = render_html(make_report(("defective", "ok")))
    assert "Robustness" not in page
    encoded = msgspec.json.encode(make_report(("a", "b"), robustness=robustness(BLIND)))
    assert msgspec.json.decode(encoded)["robustness"]["rows"][0]["change"] == "negative"
