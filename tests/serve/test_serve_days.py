"""A shop's last days as an engineer would run them: export, import, run, daily updates, recommend, rollback.

The log is found through RECBOLE_CL_DATA; without it these tests skip.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import recbole_cl
from recbole_cl import cli
from recbole_cl.training.versions import Versions

SMALL = [
    "--embedding_size=32", "--hidden_size=32", "--inner_size=64", "--n_layers=1", "--MAX_ITEM_LIST_LENGTH=20",
    "--learning_rate=0.005", "--n_stages=2", "--matrix_cells=last_row", "--fwt_reference=untrained",
    "--show_progress=False",
]  # fmt: skip
MORE = {
    "PCL": ["--pcl_encoder=random"],
    "DeepFM": ["--mlp_hidden_size=[32]"],
}


@pytest.fixture(scope="module")
def purchases() -> pd.DataFrame:
    folder = os.environ.get("RECBOLE_CL_DATA")
    path = Path(folder or ".") / "online-retail" / "online-retail.inter"
    if not folder or not path.is_file():
        pytest.skip("RECBOLE_CL_DATA does not lead to a folder that holds online-retail")
    frame = pd.read_csv(path, sep="\t", dtype={"user_id:token": str, "item_id:token": str})
    frame["when"] = pd.to_datetime(frame["timestamp:float"], unit="s")
    return frame


def export(frame: pd.DataFrame, path: Path, since: str, until: str) -> Path:
    """Writes the purchases of some days as the shop's own export: other names, ISO dates."""
    chosen = frame[(frame["when"] >= since) & (frame["when"] < until)]
    table = chosen[["user_id:token", "item_id:token", "when"]].set_axis(["customer", "article", "when"], axis=1)
    table.to_csv(path, index=False, date_format="%Y-%m-%dT%H:%M:%S")
    return path


def days(
    frame: pd.DataFrame, folder: Path, model: str, since: str, epochs: int, capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """Lives through the last days with a model; returns what was told."""

    def told(*words: str, code: int = 0) -> str:
        capsys.readouterr()
        found = cli.main(list(words))
        out, err = capsys.readouterr()
        assert found == code, f"{words}: {err}"
        return out if code in (0, 3) else err

    data, run = f"--data_path={folder / 'data'}", str(folder / f"run-{model}")
    if not (folder / "data").exists():
        shop = export(frame, folder / "retail.csv", since, "2011-12-06")
        summary = told("import", str(shop), "--user=customer", "--item=article", "--time=when", "--name=retail", data)
        assert "2011-12-05" in summary and "clock         iso" in summary
    more = MORE.get(model, [])
    told("run", "--dataset=retail", data, f"--model={model}", "--serve=True", f"--epochs={epochs}",
         f"--output_dir={run}", *SMALL, *more)  # fmt: skip
    moved = folder / f"served-{model}"
    shutil.move(run, moved)  # wherever it lies, and without its log
    updates = []
    dates = ["2011-12-06", "2011-12-07", "2011-12-08", "2011-12-09"]
    for number, (day, after) in enumerate(itertools.pairwise(dates)):
        file = export(frame, folder / f"{day}.csv", day, after)
        if number == 1:  # the export broke off in the middle of a line
            broken = folder / "broken.csv"
            broken.write_bytes(file.read_bytes()[: file.stat().st_size // 2].rsplit(b",", 1)[0] + b"\n")
            before = Versions.of(moved).champion
            assert "broken.csv" in told("update", str(moved), "--new-data", str(broken), code=2)
            assert Versions.of(moved).champion == before
        line = told("update", str(moved), "--new-data", str(file), "--margin=1", f"--epochs={epochs}", "--json")
        updates.append(json.loads(line))
    users = frame[frame["when"] >= "2011-12-08"]["user_id:token"].unique()[:3].tolist()
    asked = ["recommend", str(moved), "--users", ",".join([*users, "nobody"]), "--k", "10"]
    lists = [json.loads(line) for line in told(*asked).splitlines()]
    told("rollback", str(moved))
    back = [json.loads(line) for line in told(*asked).splitlines()]
    return {"updates": updates, "lists": lists, "back": back, "folder": moved, "users": users}


def check(told: dict[str, Any], frame: pd.DataFrame, since: str) -> None:
    champions = [one["champion"] for one in told["updates"]]
    assert champions == [1, 2, 3] and all(one["promoted"] for one in told["updates"])
    assert all(one["old"] is not None and np.isfinite(one["new"]) for one in told["updates"])
    served = recbole_cl.load(told["folder"], version=3)
    chosen = frame[(frame["when"] >= since) & (frame["when"] < "2011-12-09")]
    assert len(served.stream.table) == len(chosen), "not a row is lost"
    assert set(map(str, served.ids.users.tokens[1:])) == set(chosen["user_id:token"])
    assert set(map(str, served.ids.items.tokens[1:])) == set(chosen["item_id:token"])
    assert served.position.all_rows and served.ids.users.trained[1:].mean() > 0.9
    for one in told["lists"][:-1]:
        assert len(one["items"]) == len(set(one["items"])) == 10 or one["reason"]
    assert told["lists"][-1]["status"] == "unknown" and not told["lists"][-1]["items"]
    assert told["lists"] != told["back"]
    assert recbole_cl.load(told["folder"]).position.version == 2


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("days")


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_three_days_of_a_shop(
    model: str, purchases: pd.DataFrame, shelf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = days(purchases, shelf, model, "2011-12-01", 2, capsys)
    check(told, purchases, "2011-12-01")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["SASRec", "BPR", "LightGCN", "DeepFM", "PCL"])
def test_three_days_after_two_months(
    model: str, purchases: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = days(purchases, tmp_path, model, "2011-10-10", 8, capsys)
    check(told, purchases, "2011-10-10")
