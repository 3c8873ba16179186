"""A page of figures alone: one file that opens anywhere, offline (see :mod:`recbole_cl.report.skeleton`)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from recbole_cl.report import figures, text
from recbole_cl.report.skeleton import document


def gallery(title: str, about: str, drawn: Mapping[str, tuple[str, figures.Figure]], script: str | None = None) -> str:
    """Returns the HTML text of a page of figures.

    Args:
        title: Title of the page.
        about: A paragraph above them.
        drawn: Name to heading and figure. One of several panels scrolls by itself where the page is narrow.
        script: Where Plotly's script lies, relative to the page; by default the page holds it.
    """
    body = "".join(
        f"<section><h2>{escape(text.clean(heading))}</h2><div{' class=wide-figure' if _panels(figure) > 1 else ''}>"
        f'<div class="figure" data-figure="{escape(name)}" style="height:{figure["layout"]["height"]:.0f}px"></div>'
        "</div></section>"
        for name, (heading, figure) in drawn.items()
    )
    page_title = escape(text.clean(title))
    return document(
        page_title,
        f'<main><header><h1>{page_title}</h1><p class="note">{escape(text.clean(about))}</p></header>'
        f"<noscript><p>The figures need JavaScript.</p></noscript>{body}</main>",
        {name: figure for name, (_, figure) in drawn.items()},
        script,
    )


def _panels(figure: figures.Figure) -> int:
    return sum(key.startswith("xaxis") for key in figure["layout"])
