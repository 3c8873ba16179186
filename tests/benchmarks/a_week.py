"""A week as a shop's engineer lives it: seven daily files, one of them broken, updates killed while they promote.

    RECBOLE_CL_DATA=... python tests/benchmarks/a_week.py [--model SASRec] [--since 2011-11-01]

online-retail is imported up to its last seven days of trade, and a model is trained and served (``serve: True``). Each
night the day's file updates it; beside it a model is trained anew on all rows up to that night, for as many epochs as
the first one. Both then answer for the customers of the next day, and NDCG@10 of what those buy is told, with the CPU
seconds of both. The third night's file breaks off in the middle of a line first. In the fourth night the update is
killed (SIGKILL) at five points of its promotion, each time on a copy of the folder, which then has to serve the version
before or after, whole. One thread, unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch

import recbole_cl
from recbole_cl.config import CLConfig
from recbole_cl.errors import RecBoleCLError
from recbole_cl.importer import Columns, import_log
from recbole_cl.serve import Recommender
from recbole_cl.serve.update import update
from recbole_cl.training import store, versions
from recbole_cl.training.runner import Runner

NAMES = {"user": "customer", "item": "article", "time": "when"}
POINTS = ["before the store is written", "before the store is put in its place", "before the version is written",
          "before the list is replaced", "before what is old is cleared away"]  # fmt: skip
SETTINGS: dict[str, Any] = {
    "embedding_size": 32, "hidden_size": 32, "inner_size": 64, "n_layers": 1, "n_heads": 2,
    "MAX_ITEM_LIST_LENGTH": 20, "learning_rate": 0.005, "train_batch_size": 1024, "show_progress": False,
    "matrix_cells": "last_row", "fwt_reference": "untrained", "valid_metric": "NDCG@10", "metrics": ["NDCG"],
    "topk": 10,
}  # fmt: skip


def purchases(since: str) -> pd.DataFrame:
    """Returns the rows since a day, with the columns of the shop's export."""
    path = Path(os.environ["RECBOLE_CL_DATA"]) / "online-retail" / "online-retail.inter"
    frame = pd.read_csv(path, sep="\t", dtype={"user_id:token": str, "item_id:token": str})
    when = pd.to_datetime(frame["timestamp:float"], unit="s")
    found = pd.DataFrame({"customer": frame["user_id:token"], "article": frame["item_id:token"], "when": when})
    return found[found["when"] >= since].reset_index(drop=True)


def export(rows: pd.DataFrame, path: Path) -> Path:
    """Writes rows as the shop does."""
    rows.to_csv(path, index=False, date_format="%Y-%m-%dT%H:%M:%S")
    return path


def trained(rows: pd.DataFrame, folder: Path, model: str, name: str, **more: Any) -> tuple[Path, float]:
    """Imports rows and trains a model on them; returns the run's folder and the CPU seconds of the training."""
    file = export(rows, folder / f"{name}.csv")
    import_log(file, Columns(**NAMES), name, str(folder / "data"), overwrite=True)
    begun = time.process_time()
    settings = {**SETTINGS, "data_path": str(folder / "data"), "output_dir": str(folder / f"run-{name}"), **more}
    config = CLConfig(model=model, dataset=name, config_dict=settings)
    config["saved"] = True
    Runner(config).run()
    return folder / f"run-{name}", time.process_time() - begun


def ndcg(run: Recommender, day: pd.DataFrame) -> float:
    """Returns NDCG@10 of the lists for a day's customers, among those whom the run can answer for.

    Gains are the articles that a customer buys on that day and that are in the run's catalogue.
    """
    wanted = day.groupby("customer")["article"].apply(set)
    values = []
    for answer in run.recommend(wanted.index.tolist(), 10, filter_seen=False):
        right = {item for item in wanted[answer.user] if item in run.ids.items}
        if answer.items and right:
            gains = sum(1 / np.log2(rank + 2) for rank, item in enumerate(answer.items) if item in right)
            values.append(gains / sum(1 / np.log2(rank + 2) for rank in range(min(len(right), 10))))
    return float(np.mean(values))


def killed_at(point: int, change: Callable[[], object]) -> None:
    """Makes a change in a process of its own, which is killed at a point of the promotion."""
    pid = os.fork()
    if pid == 0:
        places: list[tuple[Any, str, int]] = [
            (store, "keep_stream", 1), (os, "replace", 1), (versions.checkpoint, "save", 2),
            (versions.Versions, "write", 1), (versions.Versions, "clean", 1),
        ]  # fmt: skip
        owner, name, nth = places[point]
        inner, count = getattr(owner, name), 0

        def call(*arguments: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(*arguments, **more)

        setattr(owner, name, call)
        if owner is store:
            from recbole_cl.serve import update as module

            module.keep_stream = call  # type: ignore[attr-defined]
        try:
            change()
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def main() -> None:
    """Lives through the week and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="SASRec")
    parser.add_argument("--since", default="2011-11-01")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--update_epochs", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    frame = purchases(asked.since)
    days = sorted(frame["when"].dt.date.unique())[-8:]
    date = frame["when"].dt.date
    changes = {"epochs": asked.update_epochs, "show_progress": False}
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = {"epochs": asked.epochs}
        run, seconds = trained(frame[date < days[0]], folder, asked.model, "shop", n_stages=1, serve=True, **whole)
        print(
            f"{asked.model}, {(date < days[0]).sum():,} rows before {days[0]}: {seconds:.0f} CPU s, with serve: True",
            flush=True,
        )
        for number, (day, after) in enumerate(itertools.pairwise(days)):
            today = frame[date == day]
            file = export(today, folder / f"{day}.csv")
            note = ""
            before = versions.Versions.of(run).champion
            if number == 2:
                broken = folder / "broken.csv"
                broken.write_bytes(file.read_bytes()[: file.stat().st_size // 2].rsplit(b",", 1)[0] + b"\n")
                try:
                    update(run, broken, changes, columns=NAMES)
                except RecBoleCLError as error:
                    note = f"broken file refused ({str(error)[:60]}...)"
                assert note and versions.Versions.of(run).champion == before
            if number == 3:
                served = []
                lists = recbole_cl.load(run).recommend(today["customer"].unique()[:20].tolist(), 10).items
                for point in range(len(POINTS)):
                    copy = Path(shutil.copytree(run, folder / f"killed-{point}"))
                    killed_at(point, lambda copy=copy, file=file: update(copy, file, changes, columns=NAMES, margin=1))
                    found = recbole_cl.load(copy)
                    served.append(found.position.version)
                    if found.position.version == before:
                        assert found.recommend(today["customer"].unique()[:20].tolist(), 10).items == lists
                    shutil.rmtree(copy)
                note = f"killed at {len(POINTS)} points: version {', '.join(map(str, served))} served, whole"
            begun = time.process_time()
            done = update(run, file, changes, columns=NAMES)
            mine = time.process_time() - begun
            anew, theirs = trained(
                frame[date <= day], folder, asked.model, "anew", n_stages=1, stage_ratios=[1.0, 0.0, 0.0], **whole
            )
            tomorrow = frame[date == after]
            scores = [ndcg(recbole_cl.load(path), tomorrow) for path in (run, anew)]
            shutil.rmtree(anew)
            told = f"version {done.champion}" if done.promoted else f"kept version {done.champion}"
            rows.append((str(day), len(today), mine, theirs, *scores))
            print(
                f"| {day} | {len(today):,} | {mine:.1f} | {theirs:.1f} | {theirs / mine:.1f} | {scores[0]:.4f} | "
                f"{scores[1]:.4f} | {scores[0] / scores[1]:.1%} | {'; '.join(filter(None, [told, note]))} |",
                flush=True,
            )
        table = np.array([row[2:] for row in rows])
        sums = table.mean(axis=0)
        print(
            f"| mean | {np.mean([row[1] for row in rows]):,.0f} | {sums[0]:.1f} | {sums[1]:.1f} | "
            f"{sums[1] / sums[0]:.1f} | {sums[2]:.4f} | {sums[3]:.4f} | {sums[2] / sums[3]:.1%} | |"
        )


if __name__ == "__main__":
    sys.exit(main())
