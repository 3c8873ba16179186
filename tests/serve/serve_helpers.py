"""Runs that are loaded and asked, and what is compared; as a script, in a process that has never seen the run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
MODELS = ("SASRec", "BPR", "LightGCN", "DeepFM", "PCL")
FULL = {"eval_args": {"mode": "full"}}
"""DeepFM without labels samples candidates by default; a served list ranks all items."""
SETTINGS: dict[str, dict[str, Any]] = {"PCL": {"pcl_encoder": "random"}, "DeepFM": FULL}


def fresh(code: str, *arguments: str, cwd: Path, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs Python code in a process of its own, in a folder of its own, without the place of any data."""
    environment = {name: value for name, value in os.environ.items() if name != "RECBOLE_CL_DATA"}
    path = os.pathsep.join([str(ROOT), str(TESTS), str(Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def answers(ctx: Any) -> dict[str, np.ndarray]:
    """Returns what a model says of the last stage's test targets, and its state, to the bit.

    Args:
        ctx: The last stage, with the model in it.
    """
    from recbole_cl.model.state import owned_state
    from recbole_cl.tree import answering, tree_hash

    targets = ctx.stream.stages[-1].test
    with torch.no_grad(), answering(ctx.model):
        batch = ctx.batcher.rows(targets, stage=ctx.index, evaluation=True)
        told = {"predict": ctx.model.predict(batch).flatten().numpy()}
        with contextlib.suppress(NotImplementedError):
            told["full"] = ctx.model.full_sort_predict(batch).reshape(len(targets), -1).numpy()
    told["hash"] = np.array(tree_hash(owned_state(ctx.model)))
    return told


def ask(folder: str, out: str, ranked: str) -> None:
    """Loads a run and writes what its model says, and the lists that it recommends for the evaluated targets.

    Args:
        folder: The run's folder.
        out: File to write.
        ranked: File with the evaluator's lists, only to know how long they are.
    """
    import recbole_cl
    from recbole_cl.evaluation.rows import build_rows

    torch.set_num_threads(1)
    run = recbole_cl.load(folder)
    told = answers(run.saved.runner().standing(run.saved.state["stage"]))
    stream, items, users = run.stream, run.ids.items, run.ids.users
    rows = build_rows(run.config, stream, stream.stages[-1], "test")
    k = int(np.load(ranked)["recommended"].shape[1])
    table = stream.table
    if run.sequential:
        histories = [
            items.names(table.item[table.seq[lo:hi]]) for lo, hi in zip(rows.targets.lo, rows.targets.hi, strict=True)
        ]
        found = run.recommend(users.names(rows.targets.user), k, histories=histories)
    else:
        excluded = [items.names(rows.mask_item[rows.mask_row == n]) for n in range(len(rows.targets))]
        found = run.recommend(users.names(rows.targets.user), k, excluded=excluded, filter_seen=False)
    lists, scores = np.zeros((len(found), k), dtype=np.int64), np.full((len(found), k), -np.inf)
    for number, one in enumerate(found):
        lists[number, : len(one.items)] = items.ids(one.items)
        scores[number, : len(one.items)] = one.scores
    np.savez(out, lists=lists, scores=scores, **told)


def same_ranking(lists: np.ndarray, scores: np.ndarray, expected: np.ndarray, tolerance: float = 1e-5) -> bool:
    """Tells whether two rankings are the same; items may change places where their scores are equal but for rounding.

    The evaluator answers a sequence's prefixes in one pass where it can, a request is answered by itself, and kernels
    need not round alike for other shapes.
    """
    for row, values, wanted in zip(lists, scores, expected, strict=True):
        for at in np.flatnonzero(row != wanted):
            near = np.flatnonzero(np.abs(values - values[at]) <= tolerance)
            at_end = near[-1] == len(row) - 1  # the one beyond the list may be as good
            if wanted[at] not in row[near] and not at_end:
                return False
    return True
