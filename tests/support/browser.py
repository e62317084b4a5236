"""A Chromium that draws pages for tests, and what it finds wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.system_parts import BROWSERS, find, unavailable

PAPER_WIDTH = 703
"""Pixels between the margins of an A4 page: 186 mm at 96 dpi."""


@contextmanager
def chromium() -> Iterator[Any]:
    """A started browser (`playwright.sync_api.Browser`); the test is skipped without one, or fails in CI.

    While it runs, its event loop occupies the thread: close it before a test that starts one of its own.
    """
    program = next(filter(None, map(find, BROWSERS)), None)
    if program is None:
        unavailable("no Chromium is installed (make system-deps)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program)
        try:
            yield browser
        finally:
            browser.close()


WIDER_THAN_THE_PAGE = """() => {
  const wide = [...document.querySelectorAll('body *')].filter(e => {
    const box = e.getBoundingClientRect();
    return box.width && !e.closest('.scroll, .aside') && (box.right > innerWidth + 1 || box.left < -1);
  }).map(e => `${e.tagName}.${e.className}: ${e.textContent.slice(0, 40)}`);
  const boxes = [...document.querySelectorAll('.scroll')].filter(e => e.getBoundingClientRect().right > innerWidth + 1);
  const page = document.documentElement.scrollWidth;
  return [...wide, ...boxes.map(e => e.ariaLabel), ...(page > innerWidth ? [`the page: ${page}`] : [])];
}"""
"""What is wider than the window, other than inside a box that scrolls."""

CUT_BOXES = """() => [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)
  .map(e => `${e.ariaLabel}: ${e.scrollWidth} in ${e.clientWidth}`)"""
"""Tables and plots that their box does not show as a whole."""

CUT_CELLS = """() => [...document.querySelectorAll('th, td, dt, dd, li, figcaption')]
  .filter(e => e.clientWidth && !e.closest('.aside') && e.scrollWidth > e.clientWidth + 1)
  .map(e => `${e.tagName}: ${e.textContent.trim().slice(0, 60)} ${e.scrollWidth} in ${e.clientWidth}`)"""
"""Cells that hold more than they show."""

SMALL_TEXT = """(least) => [...document.querySelectorAll('td, th, dd, li, figcaption, p, svg text')]
  .filter(e => e.textContent.trim() && e.getBoundingClientRect().height)
  .map(e => [e.closest('svg') ? e.getBoundingClientRect().height : parseFloat(getComputedStyle(e).fontSize), e])
  .filter(([size, e]) => size < least)
  .map(([size, e]) => `${e.tagName} ${size}: ${e.textContent.trim().slice(0, 40)}`)"""
"""Texts below `least` pixels; of plots the height as drawn."""

NARROW_PLOTS = """() => [...document.querySelectorAll('figure svg')].filter(e => {
  const room = e.closest('.scroll') || e.parentElement, style = getComputedStyle(room);
  const width = room.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight);
  return e.getBoundingClientRect().width < 0.98 * width;
}).map(e => e.ariaLabel)"""
"""Plots that leave some of their room empty."""
