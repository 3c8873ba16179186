"""Words about tasks."""

from __future__ import annotations

from recbole_cl.stream.stage import Stage


def describe(stage: Stage, valid_metric: str, length: int) -> str:
    """Returns a task's description, or words for its name, input, output and metric where it has none.

    Args:
        stage: The stage; a slice of time that has no task of its own is told by its name.
        valid_metric: The run's metric.
        length: Items of a history at most.
    """
    task = stage.task
    if task.description:
        return task.description
    name = stage.name if task.name in ("next_item", stage.name) else f"{task.name}, {stage.name}"
    if task.kind == "classification":
        words = ", ".join((task.labels or ())[:20]) or f"{task.n_labels} classes"
        output = f"one of the classes {words}"
    else:
        output = "the item that the user takes next"
    return (
        f"{name}. Input: the sequence of a user's last {length} items, oldest first. Output: {output}. "
        f"Metric: {task.primary_metric(valid_metric)}."
    )
