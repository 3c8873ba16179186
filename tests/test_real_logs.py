"""The walk on real logs: every family of models, with time's own ties, outliers, new users and repeats.

The logs are found through the environment variable RECBOLE_CL_DATA; without it these tests skip.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from recbole_cl.config import CLConfig
from recbole_cl.training.runner import Runner

LOGS = {"online-retail": 397_924, "lastfm-tags": 71_064, "amazon-videogames": 231_780, "ml-100k": 100_000}
MODELS = ("BPR", "LightGCN", "NeuMF", "SASRec", "GRU4Rec", "DeepFM")
QUICK = {("lastfm-tags", "BPR"), ("lastfm-tags", "SASRec"), ("lastfm-tags", "DeepFM"), ("ml-100k", "CKE")}
CASES = [(log, model) for log in LOGS if log != "ml-100k" for model in MODELS] + [("ml-100k", "CKE")]


@pytest.mark.parametrize(
    ("log", "model"),
    [pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow, id="-".join(case)) for case in CASES],
)
def test_a_model_walks_a_real_log(tmp_path: Path, log: str, model: str) -> None:
    folder = os.environ.get("RECBOLE_CL_DATA")
    if log != "ml-100k" and (not folder or not (Path(folder) / log).is_dir()):
        pytest.skip(f"RECBOLE_CL_DATA does not lead to a folder that holds {log}")
    config = CLConfig(
        model=model,
        dataset=log,
        config_dict={
            "n_stages": 3,
            "epochs": 1,
            "embedding_size": 16,
            "hidden_size": 16,
            "inner_size": 32,
            "MAX_ITEM_LIST_LENGTH": 20,
            "eval_batch_size": 1 << 20,
            "show_progress": False,
            # NeuMF scores pair by pair: all of 10,672 items for every user would be most of an hour.
            **({"eval_args": {"mode": "uni100"}} if (log, model) == ("amazon-videogames", "NeuMF") else {}),
            "output_dir": str(tmp_path / "run"),
        },
    )
    config["saved"] = False
    runner = Runner(config)
    result = runner.run()
    matrix = np.array(result["matrix"][result["primary_metric"]], dtype=float)
    assert matrix.shape == (3, 3) and np.isfinite(matrix).all() and (matrix >= 0).all()
    if model != "CKE":  # CKE keeps only what links to the knowledge graph, and says how many it drops
        assert len(runner.stream.table) == LOGS[log]
    if log == "lastfm-tags":
        assert any("far outside the bulk" in warning for warning in result["warnings"])
    assert sum(stage["n_new_users"] for stage in result["stages"]) == runner.stream.table.n_users - 1
