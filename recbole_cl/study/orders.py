"""Orders of the tasks: an axis of a study, and what the order costs each task.

Yang et al. 2025 (PCL), section 4.4: all (T - 1)! orders of the tasks after the first, and how much a task loses from
its best order to its worst.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from recbole_cl.errors import ConfigError
from recbole_cl.schema import is_integer
from recbole_cl.stream.schedulers.task_stream import declared_tasks

MOST = 720
"""Orders that ``all`` may mean: those of six tasks after the first."""


def task_orders(asked: Any, settings: Mapping[str, Any], where: str) -> list[list[int]]:
    """Returns the orders that a preset asks for.

    Args:
        asked: ``all``, every order in which the first task stays first, or a list of orders, each a list of numbers of
            tasks from 1 on (see the property ``task_order``).
        settings: Properties of the runs; ``dataset``, ``scheduler``, ``tasks`` and ``n_stages`` are read.
        where: Place in the file, for messages.

    Raises:
        ConfigError: If that makes no sense.
    """
    scheduler = str(settings.get("scheduler"))
    if scheduler.lower() != "taskstream":
        raise ConfigError(f"{where}: orders are those of tasks, but a scheduler is {scheduler!r}; use TaskStream")
    if "task_order" in settings:
        raise ConfigError(f"{where}: task_order and orders are both set; keep one")
    if asked == "all":
        n = len(declared_tasks(settings.get("tasks"), str(settings["dataset"])))
        n = min(n, settings.get("n_stages") or n)
        if math.factorial(n - 1) > MOST:
            raise ConfigError(f"{where}: orders: all are {math.factorial(n - 1)} for {n} tasks; list those you want")
        return [[1, *later] for later in itertools.permutations(range(2, n + 1))]
    good = isinstance(asked, list) and asked and all(isinstance(o, list) and o for o in asked)
    if not good or not all(is_integer(number) for order in asked for number in order):
        raise ConfigError(f"{where}: orders is {asked!r}; give all, or a list of orders such as [[1, 2, 3], [1, 3, 2]]")
    return [list(order) for order in asked]


def order_name(order: list[int]) -> str:
    """Returns the label of an order."""
    return "-".join(map(str, order))


def degradation(rows: pd.DataFrame) -> pd.DataFrame:
    """Returns what the order costs: one row a strategy and task.

    The seeds of an order are averaged first. Where the model never forgets, a task's figure depends on the tasks before
    it only, and orders that begin alike share it.

    Args:
        rows: One row a run with ``strategy``, ``order``, ``seed`` and the last model's figures ``last:<task>``.

    Returns:
        Columns ``strategy``, ``task``, ``orders``, ``best``, ``best_order``, ``worst``, ``worst_order`` and ``loss``,
        (best - worst) / best in per cent.
    """
    tasks = [name for name in rows if name.startswith("last:")]
    out = []
    for strategy, own in rows.groupby("strategy", sort=False):
        means = own.groupby("order", sort=False)[tasks].mean()
        for task in tasks:
            found = means[task].dropna()
            if len(found) < 2:
                continue
            best, worst = float(found.max()), float(found.min())
            out.append(
                {
                    "strategy": strategy,
                    "task": task.removeprefix("last:"),
                    "orders": len(found),
                    "best": best,
                    "best_order": str(found.idxmax()),
                    "worst": worst,
                    "worst_order": str(found.idxmin()),
                    "loss": 100 * (best - worst) / best if best > 0 else math.nan,
                }
            )
    return pd.DataFrame(out)


def degradation_table(rows: pd.DataFrame, scale: float = 1.0) -> list[str]:
    """Returns :func:`degradation` as lines of Markdown, with each strategy's mean over the tasks after the first."""
    table = degradation(rows)
    if not len(table):
        return []
    lines = ["What the order costs, best to worst, in per cent of the best:", ""]
    lines += ["| strategy | task | orders | best | in | worst | in | loss, % |", "|---|---|---|---|---|---|---|---|"]
    same_first = rows["order"].str.partition("-")[0].nunique() == 1  # it knows of no order: left out of the mean
    for strategy, own in table.groupby("strategy", sort=False):
        for row in own.itertuples():
            figures = f"{row.best * scale:.4f} | {row.best_order} | {row.worst * scale:.4f} | {row.worst_order}"
            lines.append(f"| {strategy} | {row.task} | {row.orders} | {figures} | {row.loss:.2f} |")
        mean = own["loss"][1:].mean() if same_first else own["loss"].mean()
        lines.append(f"| {strategy} | *mean{' of the later tasks' if same_first else ''}* | | | | | | {mean:.2f} |")
    return [*lines, ""]
