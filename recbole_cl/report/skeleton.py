"""A page of ours: one file that opens anywhere, offline, and sends nothing.

Plotly's script is embedded once, the figures are data beside it. A content security policy lets the browser run exactly
the two scripts of this module, by their hashes, and load nothing: a name in a data file that looks like a script stays
text even if an escape were forgotten. The pages of a study share one file with Plotly's script, 4.7 MB, in the study's
folder (:func:`share_script`); their policy names files beside the page in place of its hash.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from recbole_cl.disk import write_atomically
from recbole_cl.report import figures, text

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #52606d; --line: #e4e9ee; --pale: #f4f6f8;
  --accent: #1d5f93; --warn: #9c4221; --card: #ffffff; --bar: #fffffff2; --edge: #cbd2d9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #a3b0bd; --line: #2c3640; --pale: #0f1419;
  --accent: #7cb7ea; --warn: #f0a679; --card: #161b21; --bar: #161b21f2; --edge: #3b4753; } }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; background: var(--pale); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", Arial, sans-serif; }
main, .bar > div { max-width: 1160px; margin: 0 auto; padding: 0 20px; }
.bar { position: sticky; top: 0; z-index: 9; background: var(--bar); border-bottom: 1px solid var(--line); }
.bar > div { display: flex; gap: 6px 16px; align-items: center; flex-wrap: wrap; padding-top: 8px;
  padding-bottom: 8px; }
.bar a { color: var(--muted); text-decoration: none; font-size: 13px; }
.bar a:hover { color: var(--accent); text-decoration: underline; }
.bar label { margin-left: auto; font-size: 13px; color: var(--muted); white-space: nowrap; }
select { font: inherit; font-size: 13px; padding: 3px 8px; border: 1px solid var(--edge); border-radius: 6px;
  background: var(--card); color: var(--ink); max-width: 220px; }
header { padding: 30px 0 6px; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 8px; overflow-wrap: anywhere; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 0 0 4px; letter-spacing: -.005em; }
h3 { font-size: 14px; margin: 18px 0 6px; color: var(--muted); font-weight: 600; }
p { margin: 4px 0 10px; }
.note { color: var(--muted); font-size: 13.5px; max-width: 88ch; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; margin: 0; padding: 0; list-style: none; }
.chips li { background: var(--card); border: 1px solid var(--line); border-radius: 99px; padding: 2px 11px;
  font-size: 13px; overflow-wrap: anywhere; }
.chips b { font-weight: 600; } .chips span { color: var(--muted); margin-right: 5px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 22px;
  margin: 18px 0; scroll-margin-top: 56px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(245px, 100%), 1fr)); gap: 12px;
  margin: 12px 0 4px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card .what { color: var(--muted); font-size: 13px; } .card .what b { color: var(--ink); font-weight: 600; }
.card .value { font-size: 26px; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.35; }
.card .value.none { color: var(--muted); font-size: 18px; font-weight: 400; line-height: 1.95; }
.card .reason { color: var(--warn); font-size: 12.5px; line-height: 1.4; margin-top: 3px; overflow-wrap: anywhere; }
code, .formula { font: 12px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  color: var(--muted); overflow-wrap: anywhere; }
.two { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 20px; }
.scroll { overflow-x: auto; margin: 8px 0; }
.tall { max-height: 420px; overflow-y: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
table.wide { width: 100%; }
th, td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap;
  vertical-align: top; }
th:last-child, td:last-child { padding-right: 2px; }
th { color: var(--muted); font-weight: 600; }
th.l, td.l { text-align: left; }
td.long { white-space: normal; overflow-wrap: anywhere; text-align: left; min-width: 22em; }
td.d { font-weight: 600; } tr:last-child td { border-bottom: 0; }
.figure { width: 100%; min-height: 120px; }
.wide-figure { overflow-x: auto; } .wide-figure .figure { min-width: 860px; }
details { margin: 10px 0 0; } summary { cursor: pointer; color: var(--accent); font-size: 13.5px; }
ul.warnings { margin: 8px 0 0; padding-left: 20px; } ul.warnings li { margin: 3px 0; overflow-wrap: anywhere; }
.none { color: var(--muted); }
footer { color: var(--muted); font-size: 12.5px; padding: 4px 0 40px; overflow-wrap: anywhere; }
@media (max-width: 860px) { .two { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 560px) { main, .bar > div { padding-left: 10px; padding-right: 10px; }
  section { padding: 14px 12px; }
  .bar > div { flex-wrap: nowrap; overflow-x: auto; } .bar a { white-space: nowrap; }
  .bar label { position: sticky; right: 0; background: var(--card); padding-left: 8px; } select { max-width: 130px; }
  h1 { font-size: 22px; } td.long { min-width: 15em; } }
@media print { .bar { display: none; } body { background: #fff; } section { break-inside: avoid; } }
"""

# A figure is drawn when it is first seen: a hidden one has no size that Plotly could fill. The buttons are listed one
# by one because Plotly's own list has one that sends the figure to a server. Colours of a dark page are those of the
# style above; dark lines are made lighter. On a narrow page a legend goes below its figure, stages are told by their
# numbers, and the numbers in a heat map's cells become as small as the cells ask for, or leave.
SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const night = window.matchMedia("(prefers-color-scheme: dark)");
const dark = {"#1f2933": "#e6edf3", "#52606d": "#a3b0bd", "#e4e9ee": "#2c3640", "#ffffff": "#161b21",
  "#f4f6f8": "#222a32", "#9aa5b1": "#6b7885"};
function lighter(colour) {
  const parts = [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  const light = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  const share = light < 110 ? 0.5 : 0;
  return "#" + parts.map((v) => Math.round(v + (255 - v) * share).toString(16).padStart(2, "0")).join("");
}
function dressed(figure, width) {
  let look = JSON.stringify(figure.layout), data = figure.data;
  if (night.matches) {
    look = look.replace(/#[0-9a-f]{6}/g, (colour) => dark[colour] || colour);
    data = data.map((trace) => trace.type === "heatmap"
      ? {...trace, colorbar: {...trace.colorbar, tickfont: {...trace.colorbar.tickfont, color: dark["#52606d"]}}}
      : JSON.parse(JSON.stringify(trace).replace(/"#[0-9a-f]{6}"/g, (c) => '"' + lighter(c.slice(1, 8)) + '"')));
  }
  look = JSON.parse(look);
  if (width >= 560 || look.xaxis2) return {data, look};
  look.margin = {...look.margin, l: 44, r: 8};
  if (data.length && data[0].type === "heatmap") {
    data = [{...data[0], showscale: false}];
    const cell = (width - 60) / data[0].x.length, longest = Math.max(...look.annotations.map((a) => a.text.length));
    const size = Math.floor(cell / (0.62 * longest));
    look.annotations = size < 8 ? []
      : look.annotations.map((a) => ({...a, font: {...a.font, size: Math.min(size, a.font.size || 12)}}));
  }
  for (const axis of [look.xaxis, look.yaxis])
    if (axis && axis.ticktext) axis.ticktext = axis.ticktext.map((name) => name.split(" ")[0]);
  const shown = data.filter((trace) => trace.name && trace.showlegend !== false).length;
  if (look.showlegend !== false && shown > 1 && (look.legend || {}).orientation !== "h") {
    const rows = Math.ceil(shown / 2);
    look.legend = {...look.legend, orientation: "h", x: 0, y: -60 / look.height, yanchor: "top"};
    look.height += 22 * rows;
    look.margin = {...look.margin, b: (look.margin.b || 52) + 22 * rows};
  }
  return {data, look};
}
function draw() {
  for (const node of document.querySelectorAll(".figure:not([data-drawn])")) {
    if (node.offsetParent === null) continue;
    const {data, look} = dressed(figures[node.dataset.figure], node.clientWidth);
    node.dataset.drawn = "1";
    if (look.height) node.style.height = look.height + "px";
    Plotly.newPlot(node, data, look, {displaylogo: false, responsive: true, plotlyServerURL: "",
      displayModeBar: node.clientWidth < 560 ? false : "hover",
      modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]]});
  }
}
function show(metric) {
  for (const node of document.querySelectorAll("[data-metric]")) node.hidden = node.dataset.metric !== metric;
  draw();
}
if (!window.Plotly) {
  for (const node of document.querySelectorAll(".figure")) node.dataset.drawn = "1";
  document.getElementById("unscripted").hidden = false;
}
const choice = document.getElementById("metric");
if (choice) { choice.addEventListener("change", () => show(choice.value)); show(choice.value); }
document.addEventListener("toggle", draw, true);
night.addEventListener("change", () => {
  for (const node of document.querySelectorAll(".figure[data-drawn]")) delete node.dataset.drawn;
  draw();
});
draw();
"""


@lru_cache(maxsize=1)
def plotly_script() -> tuple[str, str]:
    """Returns Plotly's minified script and its hash for the content security policy."""
    # Read from the package's data: importing plotly.offline costs more than writing the whole page.
    script = resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text(encoding="utf-8")
    # A browser ends a script at the first closing tag, and reads a carriage return as a newline before it hashes.
    script = script.replace("</script", r"<\/script").replace("\r\n", "\n").replace("\r", "\n")
    return script, _hash(script)


def _hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def share_script(folder: Path) -> Path:
    """Writes Plotly's script into a folder whose pages share it, unless it is there; returns the file."""
    script, digest = plotly_script()
    path = folder / f"plotly-{hashlib.sha256(digest.encode()).hexdigest()[:12]}.min.js"
    if not path.is_file() or path.stat().st_size != len(script.encode("utf-8")):
        write_atomically(path, script)
    return path


def document(title: str, body: str, drawn: Mapping[str, figures.Figure], script: str | None = None) -> str:
    """Returns the HTML text of a page.

    Args:
        title: Its title, escaped.
        body: What is shown, escaped; where a figure stands there is ``<div class="figure" data-figure="name">``.
        drawn: The figures by name.
        script: Where Plotly's script lies, relative to the page; by default it is embedded.
    """
    plotly, source = plotly_script()
    source = f"'{source}'" if script is None else "'self' file:"  # a page from a folder has no self but file:
    policy = (
        f"default-src 'none'; script-src {source} '{_hash(SCRIPT)}'; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    absent = (
        '<p id="unscripted" class="note" hidden>The figures need the file with Plotly\'s script that lies in the '
        "folder of the study; <code>recbole-cl report DIR</code> writes a page that needs no other file.</p>"
    )
    loaded = f"<script>{plotly}</script>" if script is None else f'<script src="{escape(script)}"></script>'
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}: RecBole-CL</title><style>{STYLE}</style></head><body>{absent}{body}\n"
        f'<script type="application/json" id="figures">{_json(drawn)}</script>\n'
        f"{loaded}\n<script>{SCRIPT}</script></body></html>\n"
    )


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[int] = (0,),
    long: Sequence[int] = (),
    wide: bool = False,
) -> str:
    """Builds a table that scrolls by itself where it is wider than the page.

    Args:
        heads: Headings.
        rows: Text of the cells, escaped here.
        left: Columns aligned to the left.
        long: Columns of running text, which may wrap.
        wide: Whether it fills the page.
    """
    kinds = ["long" if c in long else "l" if c in left else "" for c in range(len(heads))]

    def cell(tag: str, c: int, value: str) -> str:
        kind = "l" if tag == "th" and kinds[c] == "long" else kinds[c]
        return f"<{tag}{f' class={kind}' if kind else ''}>{escape(text.clean(value))}</{tag}>"

    head = "".join(cell("th", c, value) for c, value in enumerate(heads))
    body = "".join(
        f"<tr>{''.join(cell('td', c, value) for c, value in enumerate(row[: len(heads)]))}</tr>" for row in rows
    )
    style = ' class="wide"' if wide else ""
    return f'<div class="scroll"><table{style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _json(value: Any) -> str:
    """Writes JSON that may stand inside a script element: no character in it can end the element."""
    encoded = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return encoded.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
