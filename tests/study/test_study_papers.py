"""Protocols of papers: every file resolves, its methods exist, a missing log is told with where it is to be had."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_cl import cli
from recbole_cl.config import CLConfig, properties_dir
from recbole_cl.errors import ConfigError
from recbole_cl.study.plan import list_papers, read_plan

FOLDER = properties_dir() / "paper"
PRESETS = [
    pytest.param(name, preset, id=f"{name}-{preset}")
    for name in list_papers()
    for preset in yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))["presets"]
]


def columns_of(plan: Any) -> set[str]:
    """Columns that the table of a plan can have."""
    report = plan.report
    if report["summaries"] == ["last"]:
        return {f"last:{task['name']}" for task in plan.cells[0].settings["tasks"]}
    return {f"{summary}:{metric.lower()}" for summary in report["summaries"] for metric in report["metric"]}


def small_log(folder: Path, name: str, load: dict[str, list[str]]) -> None:
    """Writes a log of the columns that a protocol asks for: 40 users, 60 items, five rows a user and stage."""
    kinds = {"timestamp": "float", "rating": "float", "like": "float", "label": "float", "title": "token_seq"}
    typed = {which: [f"{c}:{kinds.get(c, 'token')}" for c in columns] for which, columns in load.items()}
    (folder / name).mkdir(parents=True)
    rows = []
    for t in range(1000):
        value = {"user_id": t % 40, "item_id": (7 * t + t // 40) % 60, "timestamp": 1_640_995_200 + 40_000 * t}
        rows.append([str(value.get(column, 1 + t % 5)) for column in load["inter"]])
    tables = {"inter": rows}
    for which, n in (("item", 60), ("user", 40)):
        if which in load:
            tables[which] = [[str(i), *[f"x{i % 3}"] * (len(load[which]) - 1)] for i in range(n)]
    for which, lines in tables.items():
        text = "\n".join("\t".join(line) for line in [typed[which], *lines])
        (folder / name / f"{name}.{which}").write_text(text + "\n", encoding="utf-8")


@pytest.mark.parametrize(("name", "preset"), PRESETS)
def test_a_protocol_resolves(name: str, preset: str, tmp_path: Path) -> None:
    """Its cells are properties that a run accepts, over a log of the columns that they name."""
    plan = read_plan(name, preset)
    logs = {str(cell.settings["dataset"]) for cell in plan.cells}
    assert len(logs) == 1 and logs <= set(plan.logs) and plan.about
    published = plan.report.get("published") or {}
    assert all(math.isfinite(x) and 0 < x < 1 for figures in published.values() for x in figures.values())
    assert {column for figures in published.values() for column in figures} <= columns_of(plan)
    (log,) = logs
    inter = {"inter": ["user_id", "item_id", "timestamp"]}
    small_log(tmp_path, log, plan.cells[0].settings.get("load_col") or inter)
    for cell in plan.cells:
        if cell.seed == plan.cells[0].seed:
            given = {k: v for k, v in cell.settings.items() if k not in ("model", "dataset")}
            CLConfig(cell.settings["model"], log, config_dict={**given, "data_path": str(tmp_path)})


def test_every_row_has_its_figures() -> None:
    """Figures of the papers by spot checks, and no row of ours without its own where the paper prints one."""
    peso = read_plan("peso_table2", "books").report["published"]
    assert peso["PESO"]["LA:hit@5"] == 0.0448 and peso["Pretrain"]["LA:ndcg@10"] == 0.0204
    assert {cell.labels["strategy"] for cell in read_plan("peso_table2", "books").cells} == set(peso)
    proto = read_plan("protofed_table1", "hm").report["published"]
    assert proto["ProtoFedSP"] == {"LA:ndcg@10": 0.284, "LA:hit@10": 0.512} and len(proto) == 23
    pcl = read_plan("pcl_table1", "movielens").report["published"]
    assert pcl["TERACON"]["last:next five-star item"] == 0.4297 and "last:next item" not in pcl["FineAll"]


def test_a_missing_log_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RECBOLE_CL_DATA", str(tmp_path))
    assert cli.main(["study", "protofed_table1", "--preset=hm", f"--output_dir={tmp_path / 'out'}"]) == 2
    told = capsys.readouterr().err
    assert "kaggle.com" in told and "recbole-cl import transactions_train.csv --format=hm" in told and "hm" in told
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="did you mean 'peso_table2'"):
        read_plan("peso_tabel2", "books")
