"""Where new rows begin (``new_rows``), measured on the targets of users and items that are new in their stage.

    RECBOLE_CL_DATA=... python tests/benchmarks/new_rows.py [--since 2011-11-21] [--seeds 2]

BPR over the last weeks of online-retail in four stages, a run for each way and seed. NDCG@10 right after each stage
after the first, means over targets. The log has no words, so ``text`` begins as ``random`` does and is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from a_week import NAMES, export, purchases

from recbole_cl.config import CLConfig
from recbole_cl.importer import Columns, import_log
from recbole_cl.training.runner import Runner

SETTINGS: dict[str, Any] = {
    "embedding_size": 32, "learning_rate": 0.005, "train_batch_size": 1024, "show_progress": False, "n_stages": 4,
    "matrix_cells": "diagonal", "fwt_reference": "untrained", "metrics": ["NDCG"], "valid_metric": "NDCG@10",
    "topk": 10, "stopping_step": 100, "repeatable": True,
}  # fmt: skip
STRATA = ("all", "new_user", "new_item")


def main() -> None:
    """Prints a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--since", default="2011-11-21")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = export(purchases(asked.since), folder / "shop.csv")
        import_log(file, Columns(**NAMES), "shop", str(folder / "data"))
        print(f"| new_rows | {' | '.join(STRATA)} |\n|---|{'---|' * len(STRATA)}")
        for way in ("random", "mean", "one_hop", "two_hop"):
            found: dict[str, list[tuple[float, int]]] = {stratum: [] for stratum in STRATA}
            for seed in range(asked.seeds):
                settings = {**SETTINGS, "data_path": str(folder / "data"), "output_dir": str(folder / f"{way}-{seed}")}
                settings |= {"new_rows": way, "seed": seed, "epochs": asked.epochs}
                config = CLConfig(model="BPR", dataset="shop", config_dict=settings)
                config["saved"] = False
                runner = Runner(config)
                runner.run()
                for one in runner.records:
                    wanted = one.t == one.s > 0 and one.metric == "ndcg@10" and one.stratum in found
                    if wanted and one.level == "item" and one.n and one.value is not None:
                        found[one.stratum].append((float(one.value), int(one.n)))
            told = []
            for pairs in found.values():
                values, n = np.array(pairs).T
                told.append(f"{np.average(values, weights=n):.4f} ({int(n.sum() / asked.seeds):,})")
            print(f"| `{way}` | {' | '.join(told)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
