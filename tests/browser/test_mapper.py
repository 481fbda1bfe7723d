"""The mapper in a real JupyterLab: a file is read by hand, a repair pressed, a token pointed at, the legend read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from playwright.sync_api import TimeoutError as NotSeen

from tests.browser.lab import ROOT, chromium, jupyterlab
from tests.tiny import save_tiny

START, STEP = 120_000, 60_000  # milliseconds
ATTACK = "<img src=x onerror=\"document.title='taken'\"> \x1b[31mred\u202e שלום"
ROWS = [
    {"messages": [{"role": "user", "content": f"{n}: {ATTACK}"}, {"role": "assistant", "content": f"{ATTACK} that is {n}"}]}
    for n in range(1, 13)
]


def notebook(folder: Path, *cells: str) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    code = [
        {"cell_type": "code", "id": f"c{n}", "metadata": {}, "execution_count": None, "outputs": [], "source": cell}
        for n, cell in enumerate(cells)
    ]
    content = {"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": code}
    (folder / "mapper.ipynb").write_text(json.dumps(content), encoding="utf-8")


def opened(page: Page, address: str) -> None:
    page.goto(f"{address}/lab/tree/mapper.ipynb")
    page.locator(".jp-Notebook").wait_for(timeout=START)
    expect(page.locator(".jp-NotebookPanel-toolbar")).to_contain_text("Python 3", timeout=START)
    for attempt in range(3):  # a kernel that is named may not be connected yet, and then nothing runs
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        try:
            page.locator(".nbk-panel").first.wait_for(timeout=START if attempt == 2 else START / 3)
        except NotSeen:
            continue
        return


@pytest.mark.slow
def test_a_token_is_pointed_at_and_the_legend_read(tmp_path: Path) -> None:
    served, pictures = tmp_path / "served", ROOT / "build" / "browser"
    served.mkdir()
    pictures.mkdir(parents=True, exist_ok=True)
    save_tiny(served / "tiny")
    rows = [*ROWS, ROWS[0], {"messages": [{"role": "user", "content": "no reply"}]}]
    (served / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    notebook(
        served,
        "import nbkit\nfrom nbkit.widgets import DatasetMapper\nsession = nbkit.Session()\n"
        "session.load('tiny', max_seq_length=512, progress=False)\nDatasetMapper(session)",
    )
    with jupyterlab(served, tmp_path) as address, chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        try:
            opened(page, address)
            panel = page.locator(".nbk-panel").first
            panel.wait_for(timeout=START)
            source = panel.get_by_label("Source", exact=True)
            source.fill("rows.jsonl")
            source.press("Tab")
            panel.get_by_role("button", name="Read", exact=True).click()
            expect(panel).to_contain_text("13 of 14 rows are ready to train on", timeout=STEP)
            expect(panel).to_contain_text("the row equals row 1")

            panel.get_by_role("button", name="Drop duplicates", exact=True).click()
            expect(panel).to_contain_text("12 of 14 rows are ready to train on", timeout=STEP)

            legend = panel.get_by_label("Legend", exact=True)
            expect(legend).to_contain_text("⟦trained⟧ the loss is computed on these")
            expect(legend).to_contain_text("masked read, not learned")
            tokens = panel.locator("pre.nbt-tokens").first
            trained = tokens.locator("mark.nbt-trained bdi.nbt").last
            trained.hover()
            assert trained.get_attribute("title") is not None and "label 2 (trained) · “<|im_end|>”" in str(
                trained.get_attribute("title")
            )
            assert "label −100 (masked)" in str(tokens.locator(".nbt-masked bdi.nbt").first.get_attribute("title"))
            weights = [
                tokens.locator(f".nbt-{state} bdi.nbt").first.evaluate("e => getComputedStyle(e).fontWeight")
                for state in ("trained", "masked")
            ]
            assert weights == ["700", "400"], "the states differ in form, not in colour alone"
            expect(tokens).to_contain_text("onerror=")
            expect(tokens).to_contain_text("[U+202E]")

            panel.get_by_label("Show", exact=True).select_option("whole batch")
            expect(panel).to_contain_text("Batch 1 of 6, as training sees it", timeout=STEP)
            assert page.title() != "taken" and panel.locator("img").count() == 0
        finally:
            page.screenshot(path=pictures / "mapper.png")
