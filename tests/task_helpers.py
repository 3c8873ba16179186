"""A small log of several tasks whose right answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

N_CLUSTERS, PER_CLUSTER, START = 3, 8, 1_000_000

TASKS: list[dict[str, Any]] = [
    {"name": "next item"},
    {"name": "next five-star item", "filter": {"field": "rating", "op": "==", "value": 5}},
    {"name": "genre of the next item", "kind": "classification", "target": "genre", "attributes": ["genre"]},
    {"name": "group of the user", "kind": "classification", "target": "group"},
]

SETTINGS: dict[str, Any] = {
    "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
    "scheduler": "TaskStream",
    "tasks": TASKS,
    "task_train_per_user": 4,
    "metrics": ["Hit", "NDCG"],
    "topk": [5],
    "valid_metric": "Hit@5",
    "MAX_ITEM_LIST_LENGTH": 8,
    "hidden_size": 16,
    "embedding_size": 16,
    "inner_size": 32,
    "n_layers": 1,
    "n_heads": 2,
    "train_batch_size": 64,
    "learning_rate": 0.01,
    "epochs": 2,
    "pcl_encoder": "random",
    "show_progress": False,
}


def write_task_log(folder: Path, n_users: int = 36, length: int = 14, seed: int = 0) -> Path:
    """Writes ``tasks-log`` and returns the folder above it.

    A user stays in one cluster of items and goes round its cycle; some step at random. Items with an even number get
    five stars, others four or three. An item's genres begin with that of its half of the cluster; a user's group is the
    cluster and the age runs from 10 to 69.
    """
    rng = np.random.default_rng(seed)
    inter, users = [], []
    for user in range(n_users):
        cluster = user % N_CLUSTERS
        place = int(rng.integers(PER_CLUSTER))
        for step in range(length - user % 4):
            place = int(rng.integers(PER_CLUSTER)) if rng.random() < 0.1 else (place + 1) % PER_CLUSTER
            item = cluster * PER_CLUSTER + place
            rating = 5 if place % 2 == 0 else int(rng.integers(3, 5))
            inter.append((f"u{user}", f"i{item}", rating, START + step * n_users + user))
        users.append((f"u{user}", f"g{cluster}", 10 + (7 * user) % 60, "F" if user else "M"))
    items = [
        (f"i{item}", ("early" if item % PER_CLUSTER < 4 else "late") + f" of{item // PER_CLUSTER}")
        for item in range(N_CLUSTERS * PER_CLUSTER)
    ]
    target = folder / "tasks-log"
    target.mkdir(parents=True, exist_ok=True)
    _write(target / "tasks-log.inter", "user_id:token item_id:token rating:float timestamp:float", inter)
    _write(target / "tasks-log.user", "user_id:token group:token age:token gender:token", users)
    _write(target / "tasks-log.item", "item_id:token genre:token_seq", items)
    return folder


def _write(path: Path, header: str, rows: list[tuple[Any, ...]]) -> None:
    lines = ["\t".join(header.split()), *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_log(folder: Path) -> tuple[list[list[str]], dict[str, list[str]], dict[str, list[str]]]:
    """Returns the rows of the interactions, in time, and those of users and items by token."""

    def rows(suffix: str) -> list[list[str]]:
        lines = (folder / "tasks-log" / f"tasks-log.{suffix}").read_text(encoding="utf-8").splitlines()[1:]
        return [line.split("\t") for line in lines]

    inter = sorted(rows("inter"), key=lambda row: float(row[3]))
    return inter, {row[0]: row[1:] for row in rows("user")}, {row[0]: row[1:] for row in rows("item")}
