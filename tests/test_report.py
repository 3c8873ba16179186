"""The page, the terminal summary and the picture of a made-up run."""

from __future__ import annotations

import copy
import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_fixture import METRICS, make_result

from recbole_cl.errors import DataError, OutputError
from recbole_cl.report import page, picture, render_folder, terminal_summary, text, write_report
from recbole_cl.report.figures import learning_curves
from recbole_cl.report.skeleton import plotly_script
from recbole_cl.results import summarise_all

SECTIONS = ["headline", "stages", "matrix", "forgetting", "curves", "strata", "disparity", "costs", "terms"]
SECTIONS += ["warnings", "configuration", "versions"]
EVIL = "<script>alert('x')</script><img src=x onerror=\"alert(1)\">&\x1b[31m\u2028"


class Page(HTMLParser):
    """Reads a page as a browser would: elements, and the text of each script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def figures(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])


def check(html: str) -> Page:
    """Checks what holds for every page, and returns it read."""
    read = Page(html)
    assert [a.get("id") for a in read.all("section")] == SECTIONS
    # One file, offline: nothing is loaded. (Plotly's own script contains addresses, which it does not use here.)
    for tag, attrs in read.elements:
        for name in ("src", "srcset", "data", "action", "poster"):
            assert name not in attrs, f"<{tag} {name}>"
        if "href" in attrs:
            assert (attrs["href"] or "").startswith("#"), f"<{tag} href>"
        assert not any(name.startswith("on") for name in attrs), f"an event handler in <{tag}>"
    assert "link" not in {tag for tag, _ in read.elements}
    assert [a.get("type") for a in read.all("script")] == ["application/json", None, None]
    assert read.scripts[1].count("plotly.js v") >= 1 and "plotly.js v" not in read.scripts[0]
    placed = {a["data-figure"] for a in read.all("div") if "data-figure" in a}
    assert placed == set(read.figures), "every figure has a place and every place a figure"
    assert "NaN" not in read.scripts[0] and "Infinity" not in read.scripts[0]
    return read


def test_page_is_one_file_with_all_sections(tmp_path: Path) -> None:
    begin = time.perf_counter()
    path = write_report(make_result(), tmp_path / "new" / "folder")
    assert time.perf_counter() - begin < 2
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"], "no half page is left behind"
    read = check(path.read_text(encoding="utf-8"))
    said = " ".join(read.words)
    for told in (
        "SASRec-online-retail",
        "mean_{s<T} (max_{s<=t<=T-1} R[t,s] - R[T,s])",
        "0.0264",
        "warm user",
        "1.2.1",
    ):
        assert told in said, told
    assert "Exp_g = (share of the recommended slots" in said
    assert "{&quot;" not in said and '[["EWC", {"lambda": 10.0}]]' in said
    options = [a["value"] for a in read.all("option")]
    assert options == list(METRICS), "the primary metric comes first"
    shown = [a for a in read.all("div") if "data-metric" in a and "hidden" not in a]
    assert {a["data-metric"] for a in shown} == {"NDCG@10"}


def test_policy_names_the_scripts_that_are_there() -> None:
    """The hashes in the policy must be those of the scripts, or a browser shows no figure."""
    import base64
    import hashlib

    read = check(page(make_result(2)))
    policy = next(a["content"] for a in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and "default-src 'none'" in policy
    hashes = re.findall(r"'(sha256-[^']+)'", policy)
    for script, told in zip(read.scripts[1:], hashes, strict=True):
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert told == f"sha256-{digest}"


def test_numbers_of_the_figures_are_those_of_the_matrix() -> None:
    result = make_result()
    found = check(page(result)).figures
    for metric in METRICS:
        heat = found[f"matrix {metric}"]
        assert heat["data"][0]["z"] == result["matrix"][metric]
        assert len(heat["layout"]["shapes"]) == 5, "one frame a diagonal cell"
        cells = {(n["y"], n["x"]): n["text"] for n in heat["layout"]["annotations"]}
        for t, row in enumerate(result["matrix"][metric]):
            assert [cells[t, s] for s in range(5)] == [f"{value:.4f}" for value in row]
        curves = found[f"forgetting {metric}"]["data"]
        solid = [c for c in curves if "dash" not in c["line"]]
        dotted = [c for c in curves if "dash" in c["line"]]
        assert [len(c["y"]) for c in solid] == [5, 4, 3, 2, 1]
        assert [len(c["y"]) for c in dotted] == [2, 3, 4, 5]
        assert solid[2]["y"] == [result["matrix"][metric][t][2] for t in (2, 3, 4)]
    assert [t["name"] for t in found["terms"]["data"]] == ["loss", "data", "EWC"]
    stars = [t["marker"]["symbol"].count("star") for t in found["curves NDCG@10"]["data"]]
    assert stars == [1] * 5
    assert not found["matrix NDCG@10"]["data"][0]["reversescale"]


@pytest.mark.parametrize("metrics", [{"NDCG@10": 0.11}, {"RMSE": 0.9}])
def test_numbers_are_legible_on_their_cells(metrics: dict[str, float]) -> None:
    """WCAG 2.2 asks for a contrast of 4.5 to 1; the colours are mixed here from the page's own colour scale."""
    heat = check(page(make_result(8, metrics=metrics))).figures[f"matrix {next(iter(metrics))}"]
    trace = heat["data"][0]
    scale = [(share, np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)])) for share, c in trace["colorscale"]]

    def light(rgb: np.ndarray) -> float:
        linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    worst = 99.0
    for note in heat["layout"]["annotations"]:
        share = (trace["z"][note["y"]][note["x"]] - trace["zmin"]) / (trace["zmax"] - trace["zmin"])
        share = 1 - share if trace["reversescale"] else share
        shares, colours = zip(*scale, strict=True)
        cell = np.array([np.interp(share, shares, [c[i] for c in colours]) for i in range(3)])
        ink = np.array([int(note["font"]["color"][i : i + 2], 16) for i in (1, 3, 5)])
        bright, faint = sorted([light(cell), light(ink)], reverse=True)
        worst = min(worst, (bright + 0.05) / (faint + 0.05))
    assert 4.5 <= worst < 21


def test_what_was_given_stands_first() -> None:
    result = make_result(2)
    keys = sorted(result["config"])
    result["given"] = [keys[-1], "gone"]
    words = check(page(result)).words
    assert words.index("given for this run") < words.index(keys[-1]) < words.index("as the files have it")
    assert words.index("as the files have it") < words.index(keys[0])
    del result["given"]
    assert "given for this run" not in check(page(result)).words


def test_pages_of_a_study_share_one_script(tmp_path: Path) -> None:
    """Each page refers to the one file beside the study; without it a line says what is missing."""
    pages = [write_report(make_result(2), tmp_path / "cells" / name, shared=tmp_path) for name in "ab"]
    (script,) = tmp_path.glob("plotly-*.min.js")
    for path in pages:
        html = path.read_text(encoding="utf-8")
        assert len(html) < 1_000_000 and f'<script src="../../{script.name}"></script>' in html
        assert 'id="unscripted"' in html
    before = script.stat().st_mtime_ns
    write_report(make_result(2), tmp_path / "cells" / "c", shared=tmp_path)
    assert script.stat().st_mtime_ns == before
    script.write_text("cut")
    write_report(make_result(2), tmp_path / "cells" / "c", shared=tmp_path)
    assert script.read_text(encoding="utf-8") == plotly_script()[0]


def test_smaller_is_better_reverses_the_colours() -> None:
    found = check(page(make_result(3, metrics={"RMSE": 0.9, "NDCG@10": 0.1}))).figures
    assert found["matrix RMSE"]["data"][0]["reversescale"]
    assert not found["matrix NDCG@10"]["data"][0]["reversescale"]


def poison(value: Any) -> Any:
    """Puts hostile text at every place that holds text, keys of free dictionaries included."""
    if isinstance(value, str):
        return EVIL + value
    if isinstance(value, list):
        return [poison(v) for v in value]
    if isinstance(value, dict):
        return {k: poison(v) for k, v in value.items()}
    return value


def test_data_never_becomes_markup() -> None:
    result = poison(make_result(3))
    for key in ("matrix", "reference", "strata"):
        result[key] = {EVIL + k: v for k, v in result[key].items()}
    for name in result["summary"]:
        result["summary"][name] = {EVIL + k: v for k, v in result["summary"][name].items()}
    result["reasons"] = {"AF": {EVIL + "NDCG@10": EVIL}}
    result["config"][EVIL] = {EVIL: [EVIL]}
    result["versions"][EVIL] = EVIL
    for record in result["curves"]:
        record["terms"] = {EVIL: 1.0}
        record["valid"] = {EVIL + k: v for k, v in record["valid"].items()}
    result["strata"] = {m: {EVIL: rows["all"]} for m, rows in result["strata"].items()}
    result["stages"] = [{**stage, EVIL: 1} for stage in result["stages"]]
    result["cost"] = [{**cost, EVIL: 1} for cost in result["cost"]]
    result["disparity"] = [{**d, EVIL: 1, "definition_" + EVIL: EVIL} for d in result["disparity"]]
    read = check(page(result))  # exactly three scripts, no event handlers, nothing loaded
    assert "img" not in {tag for tag, _ in read.elements}
    assert not any("\x1b" in words for words in read.words)
    for figure in read.figures.values():
        drawn = json.dumps(figure)
        assert "<script" not in drawn and "<img" not in drawn, "Plotly reads HTML in names"
    summary = terminal_summary(result)
    assert "\x1b" not in summary and "\u2028" not in summary
    assert max(map(text.width, summary.splitlines())) <= 110


def test_null_cells_and_infinite_numbers() -> None:
    result = make_result(4)
    for metric, rows in result["matrix"].items():
        rows[3][0] = None
        rows[0] = [None] * 4
        result["reference"][metric] = [None, 0.1, float("nan"), float("inf")]
    result |= summarise_all(result["matrix"])
    result["curves"][0] |= {"train_loss": float("nan"), "valid": None, "terms": None}
    result["curves"][1] |= {"targets": None}
    result["steps_to_95"] = [None, 100, None, None]
    result["cost"][1] = {}
    result["disparity"][2] = None
    result["stages"][1] |= {"start": None, "n_train": None}
    read = check(page(result))
    assert "not defined" in " ".join(read.words)
    assert "stage 1 left out" in " ".join(read.words)
    cells = [note["text"] for note in read.figures["matrix NDCG@10"]["layout"]["annotations"]]
    assert len(cells) == 16 and cells.count("-") == 5
    told = terminal_summary(result)
    assert re.search(r"^ +1 +- +- +- +-$", told, re.M)
    assert "no reference b[s] was run" in told


def test_one_stage() -> None:
    read = check(page(make_result(1)))
    assert "needs at least two stages" in " ".join(read.words)
    told = terminal_summary(make_result(1))
    assert re.search(r"AF +- +mean_", told)
    assert "[0.0" in told


def test_twenty_stages() -> None:
    result = make_result(20)
    heat = check(page(result)).figures["matrix NDCG@10"]["layout"]
    assert heat["xaxis"]["ticktext"][-1] == "20" and heat["yaxis"]["ticktext"][-1] == "20 2011-39"
    told = terminal_summary(result)
    assert max(map(len, told.splitlines())) <= 110
    assert len(re.findall(r"^ +20 +", told, re.M)) >= 3, "the last row stands in the stages and in both blocks"


@pytest.mark.parametrize("keys", [[], ["curves"], ["stages"], ["matrix"], ["summary", "formulas", "reasons"], ["cost"]])
def test_missing_keys(keys: list[str]) -> None:
    result = make_result(3)
    for key in keys:
        del result[key]
    check(page(result))
    assert terminal_summary(result)
    for key in keys:
        check(page({**result, key: None}))
        assert terminal_summary({**result, key: None})


def test_nothing_at_all() -> None:
    assert "RecBole-CL" in terminal_summary({})
    check(page({}))
    empty = {"matrix": {"NDCG@10": []}, "stages": [], "summary": {"AF": {}}, "curves": [{}], "cost": [None]}
    check(page(empty))
    assert terminal_summary(empty)


def test_huge_and_tiny_numbers() -> None:
    result = make_result(3, metrics={"LogLoss": 3e12, "NDCG@10": 1e-7})
    for stage in result["stages"]:
        stage |= {"n_train": 10**15, "n_users": 10**18, "n_items": 10**12, "start": -1e300, "name": "s" * 300}
    result["cost"] = [{"seconds": 1e12, "peak_memory_mb": 1e12, "parameters": 10**30, "model_bytes": 10**30}] * 3
    result["warnings"] = ["w" * 5000] * 50
    result["output_dir"] = "/very" * 100
    result["name"] = "n" * 500
    told = terminal_summary(result)
    assert max(map(len, told.splitlines())) <= 110
    assert "Warnings  50" in told and "47 more" in told
    check(page(result))


def test_terminal_summary_holds_what_a_person_asks_first() -> None:
    told = terminal_summary(make_result())
    assert max(map(len, told.splitlines())) <= 110
    lines = told.splitlines()
    assert lines[0] == "RecBole-CL  SASRec-online-retail-EWC-TimeSlices-seed2020"
    assert any(re.match(r" +1 \[0\.0963\] +0\.0426", line) for line in lines), "the diagonal is marked"
    assert "AF                0.0264   mean_{s<T} (max_{s<=t<=T-1} R[t,s] - R[T,s])" in told
    for name in ("LA", "BWT", "FWT", "next_stage"):
        assert re.search(rf"^  {name} +-?0\.\d{{4}} +mean_", told, re.M), name
    assert "Cost      3.0 min (training 2.5 min, evaluation 24.0 s)" in told
    assert "Warnings  2" in told
    assert lines[-1] == "Results   runs/SASRec-online-retail-EWC-TimeSlices-seed2020"


def test_wide_characters_keep_the_table_straight() -> None:
    result = make_result(3)
    for stage in result["stages"]:
        stage["name"] = "音楽とゲーム"
    told = terminal_summary(result)
    table = [line for line in told.splitlines() if "2011-" in line]
    assert len({text.width(line) for line in table}) == 1
    assert max(map(text.width, told.splitlines())) <= 110


def test_metric_names_ignore_case() -> None:
    """RecBole is asked for NDCG@10 and answers ndcg@10."""
    result = make_result(3)
    result["primary_metric"] = "ndcg@10"
    result["curves"] = [{**r, "valid": {"ndcg@10": 0.1}} for r in result["curves"]]
    read = check(page(result))
    assert "curves ndcg@10" in read.figures
    assert "Recall@10 was not validated; these are the metrics that chose the epochs." in " ".join(read.words)
    assert "NDCG@10 (rows" in terminal_summary(result)


def test_stage_named_in_the_curves_and_several_passes() -> None:
    result = make_result(3)
    for record in result["curves"]:
        record["pass"] = "first" if record["epoch"] < 2 else "second"
        record["stage"] = result["stages"][record["stage"]]["name"]
    drawn = check(page(result)).figures["curves NDCG@10"]["data"]
    assert [t["line"]["dash"] for t in drawn] == ["solid", "dash"] * 3
    assert drawn[1]["name"] == "stage 1 2011-01, second"


@pytest.mark.parametrize(
    "rows",
    [
        [[0.1, 0.9], [0.8, 0.2]],
        [0.1, 0.2],
        [{"t": 0, "s": 0, "value": 0.1}, {"t": 1, "s": 0, "value": 0.8}, {"t": 1, "s": 1, "value": 0.2}],
    ],
)
def test_strata_rows_in_any_shape(rows: list) -> None:
    diagonal, last = text.diagonal_and_last(rows, 2)
    assert diagonal == [0.1, 0.2]
    assert last in ([0.8, 0.2], [None, None])


def test_render_folder(tmp_path: Path) -> None:
    result = make_result(3)
    (tmp_path / "result.json").write_text(json.dumps(result))
    told = render_folder(tmp_path)
    assert told.splitlines()[-1].endswith(str(tmp_path)[-90:])
    assert (tmp_path / "report.html").exists()
    assert render_folder(tmp_path / "result.json") == told
    with pytest.raises(DataError, match="output_dir of a run"):
        render_folder(tmp_path / "nowhere")
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        render_folder(tmp_path)
    (tmp_path / "result.json").write_text("[1]")
    with pytest.raises(DataError, match="holds a list"):
        render_folder(tmp_path)


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="output_dir: cannot write to"):
        write_report(make_result(1), tmp_path / "file")


def test_result_is_not_changed() -> None:
    result = make_result(3)
    before = copy.deepcopy(result)
    page(result)
    terminal_summary(result)
    assert result == before


def test_picture_without_a_browser_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import plotly.graph_objects as go

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr(go.Figure, "to_image", fail)
    assert picture(make_result(3), tmp_path / "picture.png") is None
    assert picture({}, tmp_path / "picture.png") is None


def test_picture_is_a_valid_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plotly's Python side checks every key of the specifications, without a browser."""
    import plotly.graph_objects as go

    drawn: list[Any] = []
    monkeypatch.setattr(go.Figure, "to_image", lambda self, **_: (drawn.append(self), b"png")[1])
    assert picture(make_result(3), tmp_path / "picture.png") == tmp_path / "picture.png"
    assert len(drawn[0].data) == 1 + 5
    for name, figure in check(page(make_result(3))).figures.items():
        assert go.Figure(figure).data is not None, name


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "-"), (float("nan"), "-"), (0, "0.0000"), (0.12345, "0.1235"), (-0.5, "-0.5000"),
        (1e-7, "1.00e-07"), (123456.0, "1.235e+05"), ("x", "-"), (True, "-"),
    ],
)  # fmt: skip
def test_numbers(value: Any, told: str) -> None:
    assert text.number(value) == told


def test_units_and_moments() -> None:
    assert [text.seconds(v) for v in (None, 1.234, 61, 7200)] == ["-", "1.23 s", "1.0 min", "2.0 h"]
    assert [text.size(v) for v in (None, 12, 1234, 5.5e6, 3e15)] == ["-", "12 B", "1.2 KB", "5.5 MB", "3,000.0 TB"]
    assert [text.moment(v) for v in (None, 1293840000, 7, "2011-01-01T00:00:00", "week 3")] == [
        "-", "2011-01-01", "7", "2011-01-01", "week 3",
    ]  # fmt: skip
    assert text.moment(-421545600) == "1956-08-23", "before 1970, too"
    assert text.count(1234567) == "1,234,567"


def test_a_star_for_the_epoch_that_was_kept_and_no_other() -> None:
    """Every improvement is noted with the curve; the last one is what the stage hands on."""
    result = make_result(5)
    for stage in range(5):
        points = [point for point in result["curves"] if point["stage"] == stage]
        last = next(n for n, point in enumerate(points) if point["best"])
        for point in points[:last]:
            point["best"] = True
    metric = str(result["primary_metric"])
    for trace, stage in zip(learning_curves(result, metric)["data"], range(5), strict=True):
        points = [point for point in result["curves"] if point["stage"] == stage]
        kept = max(n for n, point in enumerate(points) if point["best"])
        assert [n for n, symbol in enumerate(trace["marker"]["symbol"]) if symbol == "star"] == [kept]


def test_curves_of_what_chose_the_epochs() -> None:
    """Where no curve is of the metric shown, each stage's is of its own primary metric."""
    result = make_result(5)
    other = next(m for m in result["curves"][0]["valid"] if m != result["primary_metric"])
    result["stages"][1]["primary_metric"] = other
    for stage, trace in enumerate(learning_curves(result, None)["data"]):
        metric = other if stage == 1 else result["primary_metric"]
        assert trace["y"] == [text.lookup(p["valid"], metric) for p in result["curves"] if p["stage"] == stage]
