"""Statistics of studies: values by hand and by scipy, marks, LaTeX, figures, runs of any origin."""

from __future__ import annotations

import importlib.util
import json
import math
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from recbole_cl import cli
from recbole_cl.errors import ConfigError, DataError
from recbole_cl.results.matrix import summarise_all
from recbole_cl.study.compare import Asked, column_is_smaller, latex, tables_of
from recbole_cl.study.found import found_plan
from recbole_cl.study.statistics import adjusted, paired, ranks
from recbole_cl.study.table import mean_and_interval

METRIC = "ndcg@10"
matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="the extra [plots] is missing")


# -- arithmetic ---------------------------------------------------------------------------------------------------


def test_paired_t_by_hand_and_by_scipy() -> None:
    """Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3) with two degrees of freedom."""
    found = paired([11.0, 12.0, 13.0], [10.0, 10.0, 10.0])
    t = 2 * math.sqrt(3)
    by_hand = 1 - t / math.sqrt(2 + t * t)  # two-sided p of Student's t with two degrees of freedom, in closed form
    assert found.p == pytest.approx(by_hand) and (found.n, found.difference, found.effect) == (3, 2.0, 2.0)
    assert found.half == pytest.approx(4.302652729911275 / math.sqrt(3))  # t(0.975, 2), from tables
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 9))
    assert paired(a, b).p == stats.ttest_rel(a, b).pvalue
    low, high = stats.ttest_rel(a, b).confidence_interval()
    assert paired(a, b).half == pytest.approx((high - low) / 2)
    a[3] = math.nan  # a run that lacks the figure leaves its pair out
    assert paired(a, b).p == stats.ttest_rel(np.delete(a, 3), np.delete(b, 3)).pvalue


def test_wilcoxon_by_all_signs() -> None:
    rng = np.random.default_rng(1)
    d = rng.normal(0.5, size=7)
    placed = stats.rankdata(np.abs(d))
    seen = min(placed[d > 0].sum(), placed[d < 0].sum())
    all_sums = [placed[np.array(signs)].sum() for signs in product([True, False], repeat=7)]
    by_hand = min(1.0, 2 * np.mean([value <= seen for value in all_sums]))
    assert paired(d, np.zeros(7), "wilcoxon").p == pytest.approx(by_hand)
    assert paired([1.0, 2.0, 3.5, 4.0, 5.0], np.zeros(5), "wilcoxon").p == 2 / 2**5


def test_differences_that_say_nothing() -> None:
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert math.isnan(paired([1.3, 2.3, 0.7], [1.0, 2.0, 0.4]).p), "a constant difference has no spread"
    assert math.isnan(paired([1.0], [2.0]).p) and paired([1.0], [2.0]).difference == -1.0
    assert paired([], []).n == 0
    with pytest.raises(ValueError, match="use t, wilcoxon"):
        paired([1.0], [1.0], "sign")


def test_corrections_by_hand() -> None:
    p = [0.01, 0.04, math.nan, 0.03, 0.005]
    holm = [0.03, 0.06, None, 0.06, 0.02]  # 4 x 0.005, 3 x 0.01, 2 x 0.03, then not below the one before
    bh = [0.02, 0.04, None, 0.04, 0.02]  # 0.04 x 4 / 4, min(0.03 x 4 / 3, 0.04), 0.01 x 4 / 2, 0.005 x 4 -> 0.02
    for name, wanted in (("holm", holm), ("bh", bh), ("bonferroni", [0.04, 0.16, None, 0.12, 0.02]), ("none", p)):
        found = adjusted(p, name)
        assert math.isnan(found[2])
        assert [v for v in found if v == v] == pytest.approx([v for v in wanted if v is not None and v == v])
    assert adjusted([]) == [] and adjusted([0.9, 0.8]) == [1.0, 1.0]
    with pytest.raises(ValueError, match="holm"):
        adjusted(p, "sidak")


@pytest.mark.skipif(importlib.util.find_spec("statsmodels") is None, reason="the extra [peers] is missing")
@pytest.mark.parametrize(("name", "theirs"), [("holm", "holm"), ("bh", "fdr_bh"), ("bonferroni", "bonferroni")])
def test_corrections_beside_statsmodels(name: str, theirs: str) -> None:
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(2).uniform(size=23) ** 3
    p[5] = p[7]
    assert adjusted(p.tolist(), name) == pytest.approx(multipletests(p, method=theirs)[1])


def test_ranks_of_demsar() -> None:
    """The example of Demšar 2006, table 6: four versions of C4.5 on 14 logs, Nemenyi's q(0.05, 4) = 2.569."""
    auc = [
        [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967],
        [0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931],
        [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875],
        [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
        [0.972, 0.981, 0.9751, 0.975], [0.957, 0.978, 0.946, 0.970],
    ]  # fmt: skip
    found = ranks(["C4.5", "+m", "+cf", "+m+cf"], auc)
    by_name = dict(zip(found.names, found.mean, strict=True))
    assert [by_name[name] for name in ("C4.5", "+m", "+cf", "+m+cf")] == pytest.approx(
        [3.143, 2.000, 2.893, 1.964], abs=5e-4
    )
    assert found.critical == pytest.approx(2.569 * math.sqrt(4 * 5 / (6 * 14)), abs=1e-3)  # 1.25
    assert found.names[0] == "+m+cf" and found.groups() == [(0, 3)]
    assert ranks(["a", "b", "c"], np.ones((4, 3))).p == 1.0
    turned = ranks(["a", "b", "c"], [[1, 2, 3], [1, 2, 3]], smaller=True)
    assert turned.names == ("a", "b", "c") and turned.mean == (1, 2, 3)
    with pytest.raises(ValueError, match="without gaps"):
        ranks(["a", "b", "c"], [[1, 2, math.nan], [1, 2, 3]])


def test_groups_are_the_longest_rows() -> None:
    rng = np.random.default_rng(3)
    scores = np.arange(8)[None, :] + rng.normal(0, 1.5, size=(30, 8))
    found = ranks(list("abcdefgh"), scores)
    k = len(found.mean)
    rows = {(i, j) for i in range(k) for j in range(i + 1, k) if found.mean[j] - found.mean[i] <= found.critical}
    longest = {(i, j) for i, j in rows if not any(a <= i and j <= b and (a, b) != (i, j) for a, b in rows)}
    assert set(found.groups()) == longest and len(longest) > 1


# -- tables -------------------------------------------------------------------------------------------------------


def write_runs(root: Path, methods: dict[str, float], seeds: int = 5, **config: Any) -> dict[str, np.ndarray]:
    """Writes results as runs do and returns each method's final averages by seed."""
    found = {}
    rng = np.random.default_rng(7)
    shared = rng.normal(0, 0.02, seeds)
    for place, (name, mean) in enumerate(methods.items()):
        values = []
        for seed in range(seeds):
            matrix = (mean + shared[seed] + rng.normal(0, 0.003, (3, 3))).tolist()
            summary = summarise_all({METRIC: matrix})["summary"]
            strategy = [[name, {}]]
            given = {"model": "BPR", "dataset": "toy_log", "scheduler": "TimeSlices", "strategy": strategy, **config}
            cost = {"train_seconds": 2.0 * (place + 1), "eval_seconds": 1.0, "peak_memory_mb": 100.0}
            result = {
                "config": {**given, "seed": seed}, "seed": seed, "primary_metric": METRIC, "strata": {}, "curves": [],
                "stages": [{"name": str(s), "primary_metric": METRIC} for s in range(3)], "matrix": {METRIC: matrix},
                "summary": summary, "smaller_is_better": {METRIC: False}, "cost": [cost] * 3,
            }  # fmt: skip
            folder = root / f"{given['model']}-{given['dataset']}" / f"{name}-{seed}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
            values.append(summary["final_average"][METRIC])
        found[name] = np.array(values)
    return found


def test_table_of_found_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Marks and p values are those of scipy on the numbers of the files, Holm's correction by hand."""
    values = write_runs(tmp_path, {"EWC": 0.20, "FineTune": 0.25, "Joint": 0.30, "LwF": 0.2505})
    formats = [] if importlib.util.find_spec("matplotlib") is None else ["--formats=svg"]
    assert cli.main(["study", str(tmp_path), "--table", "--compare", *formats]) == 0
    printed = capsys.readouterr().out
    p = {name: stats.ttest_rel(values[name], values["FineTune"]).pvalue for name in ("EWC", "Joint", "LwF")}
    order = sorted(p, key=lambda name: p[name])
    holm = {name: min(1.0, max(p[o] * (3 - j) for j, o in enumerate(order[: i + 1]))) for i, name in enumerate(order)}
    (table,) = tables_of(found_plan(tmp_path), tmp_path, Asked())
    column = table.entries[f"final_average:{METRIC}"]
    assert {name: column[name].p for name in p} == pytest.approx(holm)
    assert holm["EWC"] < 0.05 and holm["Joint"] < 0.05 and holm["LwF"] > 0.05
    assert {name: entry.mark for name, entry in column.items()} == {"EWC": "-", "FineTune": "", "Joint": "+", "LwF": ""}
    assert [name for name, entry in column.items() if entry.best] == ["Joint"]
    mean, half = mean_and_interval(values["Joint"])
    assert f"| Joint | 5 | **{mean:.4f} ± {half:.4f}** + |" in printed and "| FineTune (reference) |" in printed
    assert table.costs["Joint"]["train_seconds"] == (18.0, 1.5)
    tex = (tmp_path / "compare.tex").read_text(encoding="utf-8")
    assert rf"Joint & 5 & \textbf{{{mean:.4f} $\pm$ {half:.4f}}}$^{{+}}$ &" in tex and "toy\\_log" in tex
    assert (tmp_path / "compare.csv").read_text(encoding="utf-8").count("\n") == 1 + 3 * len(table.entries)
    assert "AF ndcg@10 ↓" in printed and "BWT ndcg@10 ↑" in printed
    # Another reference turns the signs round.
    (turned,) = tables_of(found_plan(tmp_path), tmp_path, Asked(against="Joint"))
    assert {e.mark for n, e in turned.entries[f"final_average:{METRIC}"].items() if n != "Joint"} == {"-"}


def test_direction_of_columns() -> None:
    told = {"own": True}
    asked = {
        "AF:ndcg@10": True,
        "BWT:rmse": False,
        "LA:rmse": True,
        "LA:own": True,
        "LA:ndcg@10": False,
        "last:x": True,
    }
    assert {name: column_is_smaller(name, "rmse", told) for name in asked} == asked


def test_runs_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    write_runs(tmp_path / "a", {"EWC": 0.2}, 2, epochs=3, state="INFO")
    write_runs(tmp_path / "b", {"EWC": 0.3}, 2, epochs=5, state="DEBUG")
    assert {cell.labels["strategy"] for cell in found_plan(tmp_path).cells} == {"EWC (epochs 3)", "EWC (epochs 5)"}
    write_runs(tmp_path / "c", {"EWC": 0.3}, 1, epochs=5)
    names = {cell.labels["strategy"] for cell in found_plan(tmp_path).cells}
    assert "EWC (c/BPR-toy_log/EWC-0)" in names and len(names) == 5, "the same settings and seed twice"


def test_what_is_not_finished_is_left_out(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs", {"EWC": 0.2, "FineTune": 0.3}, 2)
    write_runs(tmp_path / "runs" / "earlier-1", {"EWC": 0.2}, 2)
    (tmp_path / "runs/BPR-toy_log/EWC-0/cell.json").write_text('{"done": false}', encoding="utf-8")
    assert len(found_plan(tmp_path / "runs").cells) == 3
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="no finished run"):
        found_plan(tmp_path / "none")
    with pytest.raises(ConfigError, match="no such folder"):
        found_plan(tmp_path / "nowhere")
    (tmp_path / "none" / "result.json").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match="no result of a run"):
        found_plan(tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--table", "--compare", "--against=FineTun"], "did you mean 'FineTune'?"),
        (["--table", "--compare", "--test=T"], "--test=T: there is no such"),
        (["--table", "--compare", "--correction=holms"], "did you mean 'holm'?"),
        (["--table", "--compare", "--alpha=5"], "--alpha=5: give a level between 0 and 1"),
        (["--table", "--against=EWC"], "go with --compare"),
        ([], "add --table"),
    ],
)
def test_what_makes_no_sense_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    write_runs(tmp_path, {"EWC": 0.2, "FineTune": 0.3}, 2)
    assert cli.main(["study", str(tmp_path), *words]) == 2
    assert told in capsys.readouterr().err


def test_latex_prints_what_stands_there() -> None:
    assert latex("a_b & 5 % {x} #1 \\ ^~$") == (
        r"a\_b \& 5 \% \{x\} \#1 \textbackslash{} \textasciicircum{}\textasciitilde{}\$"
    )


# -- figures ------------------------------------------------------------------------------------------------------


@matplotlib
def test_figures_hold_the_numbers(tmp_path: Path) -> None:
    """Points of the plane are means with intervals; ranks over three tables; every format is written."""
    from recbole_cl.study import pictures
    from recbole_cl.study.table import rows

    methods = {"EWC": 0.20, "FineTune": 0.25, "Joint": 0.30}
    for model in ("BPR", "LightGCN", "SASRec"):
        write_runs(tmp_path / model, methods, 3, model=model)
    plan = found_plan(tmp_path)
    files = pictures.write_pictures(plan, tmp_path, Asked(), ("pdf", "svg", "png"))
    assert {file.suffix for file in files} == {".pdf", ".svg", ".png"} and all(file.stat().st_size for file in files)
    assert {file.read_bytes()[:4] for file in files if file.suffix != ".svg"} == {b"%PDF", b"\x89PNG"}
    names = {file.stem for file in files}
    assert {"plane-toy_log-TimeSlices-BPR", "ranks-final_average-ndcg_10"} <= names
    frame = rows(plan, tmp_path)
    drawn = pictures.plane(frame[frame["model"] == "BPR"], METRIC, False, "")
    own = frame[(frame["model"] == "BPR") & (frame["strategy"] == "Joint")]
    container = drawn.axes[0].containers[2]
    (x,), (y,) = container.lines[0].get_data()
    assert (x, y) == (own[f"plasticity:{METRIC}"].mean(), own[f"stability:{METRIC}"].mean())
    (low, _), (high, _) = container.lines[2][0].get_segments()[0]
    assert (high - low) / 2 == pytest.approx(mean_and_interval(own[f"plasticity:{METRIC}"])[1])
    order, scores, what = pictures.blocks(frame, f"final_average:{METRIC}")
    assert order == list(methods) and scores.shape == (3, 3) and what.startswith("3 tables")
    one = frame[frame["model"] == "BPR"]
    assert pictures.blocks(one, f"final_average:{METRIC}")[1].shape == (3, 3)
    assert pictures.blocks(one, f"final_average:{METRIC}")[2] == "3 seeds of 1 table"
    with pytest.raises(ConfigError, match="'jpg' is none"):
        pictures.write_pictures(plan, tmp_path, Asked(), ("jpg",))
