"""PESO's studies: their rows are the paper's, each makes a configuration, and they share the base stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recbole_cl.config import CLConfig, find_dataset
from recbole_cl.errors import ConfigError
from recbole_cl.study import read_plan

NAMES = ["peso", "peso_splits", "peso_lambda", "peso_learning_rate", "peso_two_tower"]


def labels(name: str, preset: str = "laptop") -> list[str]:
    return list(dict.fromkeys(cell.labels["strategy"] for cell in read_plan(name, preset).cells))


def test_the_rows_are_the_papers() -> None:
    table_2 = ["Pretrain", "SingleLoRA", "PESO"] + [
        f"{name} {variant}"
        for name in ("InfLoRA", "SumLoRA", "SDLoRA")
        for variant in ("all", "latest", "all, inherit", "latest, inherit")
    ]
    figure_2 = ["L2LoRA", "OrthogonalLoRA", "OutputKL", "PerRankKL"]
    for preset in ("laptop", "full"):
        rows = [*table_2[:3], *figure_2, "LSAT", "SASRec, CE", *table_2[3:]]  # what a study that is cut short has first
        assert labels("peso", preset) == rows and len(table_2) == 15
        assert {cell.seed for cell in read_plan("peso", preset).cells} == {2020, 2021, 2022}
    assert labels("peso_lambda")[1:6] == [f"PESO {v}" for v in (0.5, 1.0, 2.0, 5.0, 8.0)]
    assert {cell.labels["scheduler"] for cell in read_plan("peso_splits", "laptop").cells} == {
        "Periods",
        "UserDisjoint",
    }
    assert labels("peso_two_tower")[:5] == ["Pretrain", "FineTune", "Contrastive", "ContrastivePIW", "PISA"]


def test_a_seed_trains_its_base_once() -> None:
    cells = [cell for cell in read_plan("peso", "laptop").cells if cell.labels["strategy"] != "SASRec, CE"]
    assert len(cells) == 60 and len({cell.base for cell in cells}) == 3 and None not in {cell.base for cell in cells}


@pytest.mark.parametrize("name", NAMES)
def test_each_row_makes_a_configuration(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the authors' blocks, without warnings: nothing in a study is idle or misspelt."""
    try:
        find_dataset("peso-video-games")
    except ConfigError:
        pytest.skip("the log peso-video-games is not on this machine")
    for preset in ("laptop", "full"):
        for cell in read_plan(name, preset).cells:
            if cell.seed == 2020:
                given: dict[str, Any] = {**cell.settings, "use_gpu": False}
                model, dataset = given.pop("model"), given.pop("dataset")
                config = CLConfig(model, dataset, config_dict=given)
                assert config["matrix_cells"] == "diagonal" and config["own_metric_rows"]
                assert Path(config["data_path"]).is_dir() and not config.warnings, (cell.labels, config.warnings)


def test_the_statistics_of_the_papers_table_4(tmp_path: Path) -> None:
    """By hand, of a log of two stages."""
    import sys

    sys.path.insert(0, str(Path(__file__).parent / "contracts"))
    from conformance_helpers import write_atomic
    from run_helpers import script

    from recbole_cl.stream.build import build_stream

    (tmp_path / "log").mkdir()
    rows = [("u1", "a", 1), ("u1", "b", 2), ("u2", "a", 3), ("u2", "c", 4), ("u1", "c", 5), ("u3", "d", 6)]
    write_atomic(tmp_path / "log" / "log.inter", ["user_id:token", "item_id:token", "timestamp:float"], rows)
    given = {"data_path": str(tmp_path), "n_stages": 2, "scheduler": "TimeSlices", "stage_split": "tail"}
    given |= {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "stage_ratios": [1.0, 0.0, 0.0]}
    told = script("stage_statistics").table(build_stream(CLConfig("BPR", "log", config_dict=given))).splitlines()
    assert told[2] == "| 1 | 2 | 2 | 2 | 2 | 3 | 1.50 | 0.2500 |"
    assert told[3] == "| 2 | 3 | 1 | 2 | 2 | 3 | 1.00 | 0.5000 |"
