"""A page of figures alone: one file that opens anywhere, offline (see :mod:`recbole_cl.report.html`)."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from recbole_cl.report import figures, text
from recbole_cl.report.html import SCRIPT, STYLE, _hash, _json, plotly_script


def gallery(title: str, about: str, drawn: Mapping[str, tuple[str, figures.Figure]]) -> str:
    """Returns the HTML text of a page of figures.

    Args:
        title: Title of the page.
        about: A paragraph above them.
        drawn: Name to heading and figure.
    """
    plotly, plotly_hash = plotly_script()
    policy = (
        f"default-src 'none'; script-src '{plotly_hash}' '{_hash(SCRIPT)}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    body = "".join(
        f'<section><h2>{escape(text.clean(heading))}</h2><div class="figure" data-figure="{escape(name)}" '
        f'style="height:{figure["layout"]["height"]:.0f}px"></div></section>'
        for name, (heading, figure) in drawn.items()
    )
    told = escape(text.clean(title))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{told}: RecBole-CL</title><style>{STYLE}</style></head><body><main>"
        f'<header><h1>{told}</h1><p class="note">{escape(text.clean(about))}</p></header>'
        f"<noscript><p>The figures need JavaScript.</p></noscript>{body}</main>\n"
        f'<script type="application/json" id="figures">{_json({n: f for n, (_, f) in drawn.items()})}</script>\n'
        f"<script>{plotly}</script>\n<script>{SCRIPT}</script></body></html>\n"
    )
