"""The histograms of an inspection as a plotly figure. plotly is optional; the same bars are drawn as SVG without it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbkit.data.histogram import Bars, lengths_of, shares_of
from nbkit.errors import ConfigError

if TYPE_CHECKING:
    from nbkit.data.inspection import Inspection


def figure(shown: Inspection) -> Any:
    """A plotly `Figure` of lengths and trained shares. Raises: ConfigError where plotly is not installed."""
    try:
        from plotly import graph_objects
        from plotly.subplots import make_subplots
    except ImportError as error:
        raise ConfigError(
            'plotly is not installed; pip install "nbkit-llm[report]", or look at the histograms as they are.'
        ) from error
    pair = (lengths_of(shown.lengths, shown.set.max_length), shares_of(shown.trained, shown.lengths))
    drawn = make_subplots(rows=1, cols=2, subplot_titles=[bars.title for bars in pair])
    for column, bars in enumerate(pair, 1):
        drawn.add_trace(_trace(bars, graph_objects), row=1, col=column)
        drawn.update_xaxes(title_text=bars.axis, row=1, col=column)
        if bars.limit_place() is not None:
            drawn.add_vline(x=bars.limit, line_dash="dot", row=1, col=column)  # type: ignore[arg-type]  # ints are what it takes
    drawn.update_yaxes(title_text="rows")
    drawn.update_layout(showlegend=False, bargap=0.02, height=340, margin={"t": 40, "l": 50, "r": 20, "b": 40})
    return drawn


def _trace(bars: Bars, graph_objects: Any) -> Any:
    middles = [(low + high) / 2 for low, high in zip(bars.edges, bars.edges[1:], strict=False)]
    names = [bars.name(number) for number in range(len(bars.counts))]
    width = bars.edges[1] - bars.edges[0]
    return graph_objects.Bar(x=middles, y=list(bars.counts), width=width, hovertext=names, hoverinfo="text")
