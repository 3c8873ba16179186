"""Answers of a loaded run beside RecBole's own: ``full_sort_predict``, what was seen set to -inf, ``torch.topk``.

    python tests/benchmarks/serving.py [--items 100000] [--users 2048] [--rounds 5]

A run over a made-up log is trained for one epoch and loaded. Then both sides answer the same users in turns, and the
medians are told, with the share of lists that are the same. RecBole's side is given ready tensors and answers with ids;
ours is given tokens and answers with tokens, reasons and scores. One thread, unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from recbole.data.interaction import Interaction

import recbole_cl
from recbole_cl.config import CLConfig
from recbole_cl.serve import Recommender
from recbole_cl.training.runner import Runner

K = 10
MODELS: dict[str, dict[str, Any]] = {
    "BPR": {},
    "LightGCN": {"n_layers": 2},
    "SASRec": {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}},
    "GRU4Rec": {"loss_type": "BPR", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}},
}


def write_log(folder: Path, n_items: int, n_users: int) -> None:
    """Writes a log in which each item occurs, and each user has about as many."""
    rng = np.random.default_rng(0)
    n = max(n_items + n_users, 20 * n_users)
    item = np.concatenate([rng.permutation(n_items), rng.integers(n_items, size=n - n_items)])
    user = np.concatenate([rng.permutation(n_users), rng.integers(n_users, size=n - n_users)])
    (folder / "made-up").mkdir(parents=True)
    rows = "\n".join(f"u{u}\ti{i}\t{t}" for t, (u, i) in enumerate(zip(user, item, strict=True)))
    (folder / "made-up" / "made-up.inter").write_text(f"user_id:token\titem_id:token\ttimestamp:float\n{rows}\n")


def made(model: str, folder: Path, **more: Any) -> Path:
    """Trains a model for an epoch; returns the run's folder."""
    settings = {
        "data_path": str(folder), "output_dir": str(folder / model), "n_stages": 1, "epochs": 1, "embedding_size": 64,
        "hidden_size": 64, "inner_size": 128, "MAX_ITEM_LIST_LENGTH": 50, "train_batch_size": 8192,
        "stage_ratios": [1.0, 0.0, 0.0], "show_progress": False, "serve": False, **MODELS[model], **more,
    }  # fmt: skip
    config = CLConfig(model=model, dataset="made-up", config_dict=settings)
    config["saved"] = True
    Runner(config).run()
    return folder / model


def plain(run: Recommender, users: list[str], rows: int) -> Callable[[], np.ndarray]:
    """Returns RecBole's side: ids of the best items of each user, shape ``[n, K]``."""
    model, table, config = run.model, run.stream.table, run.config
    ids = run.ids.users.ids(users)
    seen = [table.item[table.seq[table.ptr[u] : table.ptr[u + 1]]] for u in ids]
    columns = {config["USER_ID_FIELD"]: torch.from_numpy(ids)}
    if run.sequential:
        width = int(config["MAX_ITEM_LIST_LENGTH"])
        history = torch.zeros(len(ids), width, dtype=torch.int64)
        for row, items in enumerate(seen):
            history[row, : len(items[-width:])] = torch.from_numpy(items[-width:])
        columns[config["ITEM_ID_FIELD"] + config["LIST_SUFFIX"]] = history
        columns[config["ITEM_LIST_LENGTH_FIELD"]] = (history > 0).sum(dim=1)
    owner = torch.from_numpy(np.repeat(np.arange(len(seen)), [len(items) for items in seen]))
    masked = torch.from_numpy(np.concatenate(seen))

    @torch.no_grad()
    def answer() -> np.ndarray:
        found = []
        for start in range(0, len(ids), rows):
            part = Interaction({name: column[start : start + rows] for name, column in columns.items()})
            scores = model.full_sort_predict(part).view(len(part), -1)
            scores[:, 0] = -torch.inf
            if not config.repeatable_items:
                inside = (owner >= start) & (owner < start + rows)
                scores[owner[inside] - start, masked[inside]] = -torch.inf
            found.append(torch.topk(scores, K, dim=1).indices)
        return torch.cat(found).numpy()

    return answer


def alternated(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Returns the median CPU seconds of each side, run in turns after a first turn that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            begun = time.process_time()
            side()
            if number:
                taken[name].append(time.process_time() - begun)
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def main() -> None:
    """Prints a line a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=256, help="rows of a batch on RecBole's side")
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder, asked.items, asked.users)
        for model in asked.models:
            path = made(model, folder)
            runs = {search: recbole_cl.load(path, search=search) for search in ("dense", "exact", "approximate")}
            users = [f"u{number}" for number in range(asked.users)]
            theirs = plain(runs["dense"], users, asked.rows)
            sides: dict[str, Callable[[], Any]] = {"RecBole": theirs}
            for search, run in runs.items():
                sides[search] = lambda run=run, users=users: run.recommend(users, K)
            seconds = alternated(sides, asked.rounds)
            one = alternated({name: (lambda r=r: r.recommend("u7", K)) for name, r in runs.items()}, 50)
            first = plain(runs["dense"], ["u7"], 1)
            latency = alternated({"RecBole": first}, 50) | one
            expected = theirs()
            print(f"{model}, {asked.items:,} items, {asked.users:,} users")
            for name, value in seconds.items():
                told = f"  {name:<12} {1e3 * value:8.0f} ms  {seconds['RecBole'] / value:5.2f}x"
                told += f"  one user {1e3 * latency[name]:6.2f} ms  {latency['RecBole'] / latency[name]:5.2f}x"
                if name != "RecBole":
                    lists = [runs[name].ids.items.ids(items) for items in runs[name].recommend(users, K).items]
                    same = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(lists, expected, strict=True)])
                    told += f"  {same:.2%} of RecBole's items"
                print(told)


if __name__ == "__main__":
    main()
