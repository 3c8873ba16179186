"""A small log whose right answers are known, with a rule that changes from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_cl.disk import write_atomically

STAGE_SECONDS = 1_000_000
"""Stage s holds the timestamps ``[s * STAGE_SECONDS, (s + 1) * STAGE_SECONDS)``."""


@dataclass(frozen=True)
class PlantedDrift:
    """The written log and the rules behind it, by tokens.

    Args:
        folder: Folder that holds the dataset's folder (``data_path``).
        name: Name of the dataset.
        successors: For each stage the item that follows an item.
        user_cluster: Cluster of items that a user takes from (in the first stage, where users move).
        item_cluster: Cluster of each item.
        moving: Users go on to the next cluster in every stage.
    """

    folder: Path
    name: str
    successors: list[dict[str, str]]
    user_cluster: dict[str, int]
    item_cluster: dict[str, int]
    moving: bool = False

    @property
    def n_stages(self) -> int:
        """Number of stages."""
        return len(self.successors)

    def settings(self) -> dict[str, Any]:
        """Returns the properties under which the stream has exactly the planted stages."""
        return {
            "data_path": str(self.folder),
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
            "scheduler": "Boundaries",
            "boundaries": [stage * STAGE_SECONDS for stage in range(1, self.n_stages)],
            "n_stages": None,
        }

    def accuracy(self, last: list[str], label: list[str], stage: int) -> float:
        """Returns the share of targets that the rule of ``stage`` predicts: 1.0 on the targets of that stage.

        Args:
            last: Last item of each history.
            label: The item that came next.
            stage: Whose rule is asked.
        """
        rule = self.successors[stage]
        return float(np.mean([rule.get(a) == b for a, b in zip(last, label, strict=True)]))


def write_planted_drift(
    folder: str | Path,
    n_users: int = 48,
    n_items: int = 32,
    n_stages: int = 3,
    seed: int = 0,
    n_clusters: int = 4,
    length: int = 8,
    name: str = "planted-drift",
    moving: bool = False,
) -> PlantedDrift:
    """Writes an ``.inter`` file and returns what is true about it.

    ::

        stage 0     i0 -> i1 -> i2 -> ... -> i7 -> i0            in each cluster of items
        stage 1     i0 -> i5 -> i8 -> i2 -> ... -> i0            another cycle, with the new item i8

    A user stays in one cluster and makes ``length`` steps a stage, each to the successor of the item before, also
    across the border of two stages: the exact successor is right for every target with a history. No transition of a
    stage holds in another one, so a model that forgets scores near chance on earlier stages. Each later stage brings
    an eighth more users and one new item a cluster; new users begin at the new item.

    With ``moving`` a user of cluster c in stage s takes from cluster ``c + 1`` in stage ``s + 1`` and begins there at
    the new item: what a model without sequences learns drifts too, and what comes next is known within each stage.

    Args:
        folder: Where the dataset's folder is put.
        n_users: Users of the first stage.
        n_items: Items of the first stage.
        n_stages: Stages.
        seed: Seed of everything random here.
        n_clusters: Clusters of items.
        length: Interactions of a user in a stage.
        name: Name of the dataset.
        moving: Let users change their cluster in every stage.
    """
    rng = np.random.default_rng(seed)
    clusters = [list(part) for part in np.array_split(np.arange(n_items), n_clusters)]
    users, known = n_users, n_items
    used: set[tuple[int, int]] = set()
    last: dict[int, int] = {}
    rules, lines = [], []
    for stage in range(n_stages):
        newest = [part[0] for part in clusters]
        if stage:
            users += max(n_users // 8, 1)
            for number, part in enumerate(clusters):
                part.append(known + number)
            newest = [part[-1] for part in clusters]
            known += n_clusters
        rule = {a: b for part in clusters for a, b in _cycle(part, used, rng, shuffle=stage > 0)}
        used |= set(rule.items())
        rules.append({f"i{a}": f"i{b}" for a, b in rule.items()})
        if moving:
            last.clear()
        for step in range(length):
            for user in range(users):
                cluster = (user + stage * moving) % n_clusters
                if user in last:
                    last[user] = rule[last[user]]
                else:
                    last[user] = newest[cluster] if stage else int(rng.choice(clusters[cluster]))
                lines.append(f"u{user}\ti{last[user]}\t{stage * STAGE_SECONDS + step * users + user}")
    target = Path(folder) / name
    header = "user_id:token\titem_id:token\ttimestamp:float"
    write_atomically(target / f"{name}.inter", "\n".join([header, *lines]) + "\n")
    item_cluster = {f"i{item}": number for number, part in enumerate(clusters) for item in part}
    user_cluster = {f"u{u}": u % n_clusters for u in range(users)}
    return PlantedDrift(Path(folder), name, rules, user_cluster, item_cluster, moving)


def _cycle(
    items: list[int], used: set[tuple[int, int]], rng: np.random.Generator, shuffle: bool
) -> list[tuple[int, int]]:
    """Returns the transitions of one cycle through all items, none of which was used before."""
    order = list(items)
    for _ in range(10_000):
        if shuffle:
            rng.shuffle(order)
        pairs = list(zip(order, order[1:] + order[:1], strict=True))
        if not used.intersection(pairs):
            return pairs
    raise ValueError(
        f"n_items: {len(items)} items a cluster are too few for so many stages without a shared transition"
    )
