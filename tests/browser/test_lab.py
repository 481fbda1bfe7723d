"""The quickstart in a real JupyterLab, driven by a real browser: Run All, a plot that moves, Stop, a chat that answers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.lab import ROOT, chromium, jupyterlab
from tests.lanes import run, short_quickstart

# A shared machine of 2 cores may take its time; nothing here is faster for waiting less.
START, TRAIN, STEP = 120_000, 240_000, 90_000  # milliseconds: Lab and kernel, model and data, one step or one reply
LOOKED_FOR_ELSEWHERE = ("session.evaluate", "session.export", "before.answers", "summary = {")


def step_of(bar: Locator) -> int:
    return int(bar.get_attribute("aria-valuenow") or 0)


def run_all(page: Page, address: str) -> None:
    page.goto(f"{address}/lab/tree/quickstart.ipynb")
    page.locator(".jp-Notebook").wait_for(timeout=START)
    page.get_by_text("Python 3", exact=False).first.wait_for(timeout=START)
    expect(page.locator(".jp-NotebookPanel-toolbar")).to_contain_text("Python 3", timeout=START)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def stop_mid_training(page: Page) -> tuple[int, int]:
    """Watch the live plot move, press Stop, and see the run end early. Returns the step it was pressed at and the last step."""
    cell = page.locator(".jp-CodeCell").filter(has_text="await run")
    bar = cell.get_by_role("progressbar", name="Training progress")
    expect(bar).to_have_attribute("aria-valuenow", re.compile(r"[1-9]\d*"), timeout=TRAIN)
    first, drawn = step_of(bar), cell.locator(".nbk-figure svg").first.inner_html()
    expect(bar).not_to_have_attribute("aria-valuenow", str(first), timeout=STEP)
    assert step_of(bar) > first
    assert cell.locator(".nbk-figure svg").first.inner_html() != drawn, "the plot is drawn anew"
    pressed = step_of(bar)
    cell.get_by_role("button", name="Stop", exact=True).click()
    expect(cell).to_contain_text(re.compile(r"Stopped at step \d+"), timeout=STEP)
    return pressed, step_of(bar)


def chat_answers(page: Page) -> list[str]:
    """The replies of the chat cell: the base model's and the tuned one's."""
    cell = page.locator(".jp-CodeCell").filter(has_text="ChatPanel(session)")
    expect(cell.get_by_text("writing …")).to_have_count(0, timeout=TRAIN)
    replies = cell.locator(".nbk-exchange .nbk-said")
    for number in range(2):
        expect(replies.nth(number)).to_have_text(re.compile(r"\w"), timeout=TRAIN)
    return [replies.nth(number).inner_text().strip() for number in range(2)]


@pytest.mark.slow
def test_stop_is_pressed_while_the_quickstart_trains(tmp_path: Path) -> None:
    run(sys.executable, "-m", "nbkit", "fetch", "smollm2-135m-instruct")
    served, pictures = tmp_path / "served", ROOT / "build" / "browser"
    served.mkdir()
    pictures.mkdir(parents=True, exist_ok=True)
    short_quickstart(served / "quickstart.ipynb", "smollm2-135m-instruct", max_steps=50, without=LOOKED_FOR_ELSEWHERE)
    with jupyterlab(served, tmp_path) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        try:
            run_all(page, address)
            pressed, ended = stop_mid_training(page)
            page.screenshot(path=pictures / "stopped.png")
            assert pressed <= ended < 50, "Stop ends the run at a step boundary, long before its last step"
            answers = chat_answers(page)
            assert len(answers) == 2 and all(answers)
            page.locator(".jp-CodeCell").filter(has_text="ChatPanel(session)").scroll_into_view_if_needed()
            assert page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.error']").count() == 0
        finally:
            page.screenshot(path=pictures / "last.png")
