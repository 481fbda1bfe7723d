"""The report of an export: one clear line, and text in a notebook stays text."""

from pathlib import Path

from nbkit.export.report import ExportReport, size_text

HOSTILE = "<img src=x onerror=alert(1)>&'\""


def test_one_line_and_escaped_html():
    report = ExportReport(
        kind="gguf " + HOSTILE, path=Path("/x") / HOSTILE, bytes=269_060_272, seconds=1.26, verdict="right " + HOSTILE, check={}
    )
    assert "269.1 MB" in str(report) and "1.3 s" in str(report) and "\n" not in str(report)
    html = report._repr_html_()
    assert "<img" not in html and html.count("&lt;img src=x onerror=alert(1)&gt;&amp;&#x27;&quot;") == 3


def test_sizes():
    assert [size_text(n) for n in (0, 999_999, 12_345_678, 15_300_000_000)] == ["0.0 MB", "1.0 MB", "12.3 MB", "15.3 GB"]
