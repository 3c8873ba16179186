"""Own metrics of each target, and two runs compared user by user."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent / "contracts"))
from conformance_helpers import Job, assert_same_walk, matrix, write_log
from run_helpers import script
from test_peso import PESO, SETTINGS, write_index

from recbole_cl.errors import DataError
from recbole_cl.results.paired import paired, read_rows


def frame(values: list[tuple[int, int, int, float]]) -> pd.DataFrame:
    return pd.DataFrame(values, columns=["t", "s", "user", "nll"])


def test_pairs_by_hand() -> None:
    """Three users; user 1 has two stages, user 2 two seeds that disagree, cells off the diagonal do not count."""
    one = [frame([(1, 1, 1, 3.0), (2, 2, 1, 5.0), (1, 1, 2, 2.0), (2, 1, 2, 99.0), (2, 2, 3, 1.0)])]
    other = [frame([(2, 2, 3, 2.0), (1, 1, 2, 1.0), (1, 1, 1, 1.0), (2, 2, 1, 4.0), (2, 1, 2, -99.0)])]
    told = paired(one, other, "nll")
    by_user = np.array([1.5, 1.0, -1.0])  # (2 + 1) / 2, 1, -1
    half = 4.302653 * by_user.std(ddof=1) / np.sqrt(3)  # t of two degrees of freedom
    assert told["users"] == 3 and told["mean"] == pytest.approx(0.5)
    assert (told["low"], told["high"]) == (pytest.approx(0.5 - half, abs=1e-5), pytest.approx(0.5 + half, abs=1e-5))
    assert paired(one, other, "nll", [2])["mean"] == pytest.approx((1 - 1) / 2)
    two = paired([*one, *one], [*other, frame([(1, 1, 1, 3.0), (2, 2, 1, 5.0), (1, 1, 2, 4.0), (2, 2, 3, 1.0)])], "nll")
    assert two["mean"] == pytest.approx((0.75 - 0.5 - 0.5) / 3)
    with pytest.raises(DataError, match="other targets"):
        paired(one, [frame([(1, 1, 1, 1.0)])], "nll")
    with pytest.raises(DataError, match="no metric 'hit'; it has nll"):
        paired(one, other, "hit")


def test_a_run_keeps_its_rows(tmp_path: Path) -> None:
    """Their means are the matrix, also where the run was killed, and a study's table comes of them."""
    log = write_log(tmp_path / "log", n_items=45)
    write_index(log.folder / "log" / "index.json")
    small: dict[str, Any] = {**SETTINGS, "epochs": 1, "base_epochs": 1, "own_metric_rows": True}
    job = Job(PESO, log.folder, small)
    whole = job.walk(tmp_path / "whole")
    rows = read_rows(tmp_path / "whole" / "run")
    cells = rows.groupby(["t", "s"]).nll.mean().unstack().to_numpy()
    np.testing.assert_allclose(cells, np.array(matrix(whole, "nll"), dtype=float), rtol=1e-12)
    (tmp_path / "again").mkdir()
    job.killed(tmp_path / "again", whole.ticks - 1)
    assert_same_walk(whole, job.walk(tmp_path / "again", resume=True))
    assert (tmp_path / "again" / "run" / "rows.csv").read_text() == (
        tmp_path / "whole" / "run" / "rows.csv"
    ).read_text()
    for name, strength in (("SingleLoRA", 0.0), ("PESO", 1e4)):
        folder = tmp_path / "study" / "log" / "TimeSlices" / "PESO" / name / "seed1"
        folder.parent.mkdir(parents=True)
        job.walk(tmp_path / name, peso_lambda=strength)
        (tmp_path / name / "run").rename(folder)
    told = script("paired_nll").table(tmp_path / "study", "SingleLoRA").splitlines()
    assert len(told) == 3 and told[2].startswith("| PESO | +"), "what is held at its place learns less of a stage"
    with pytest.raises(DataError, match="own_metric_rows"):
        read_rows(tmp_path)
    assert json.loads((tmp_path / "whole" / "run" / "result.json").read_text())["config"]["own_metric_rows"] is True
