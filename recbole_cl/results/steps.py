"""How fast a stage is learnt: Steps-to-95 % from the learning curve inside the stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["stage_curve", "steps_to_95"]


def steps_to_95(
    curve: Iterable[Sequence[float | None]], share: float = 0.95, smaller_is_better: bool = False
) -> int | None:
    """Training targets after which the validation value first reaches 95 % of the stage's best.

    steps = min { n_i : v_i >= share * max_j v_j }, with (n_i, v_i) the measured points of the curve.

    After ProtoFed-SP, section 4.1.2 (iii), with two choices of ours: steps are counted in training targets, not in
    optimiser steps, so that batch sizes can be compared; and the converged value is the best one, because the snapshot
    of the best validation is what a stage hands on. Nothing is interpolated: the answer is a measured point, so the
    spacing of validations is its resolution.

    Where smaller is better: steps = min { n_i : v_i <= min_j v_j / share }, for values >= 0.

    Args:
        curve: Points (training targets seen within the stage, validation value), by increasing targets. Points whose
            value is None or not finite are passed over. A point at 0 targets, the model as the stage found it, makes
            the answer 0 where nothing was left to learn.
        share: The share of the best value, in (0, 1].
        smaller_is_better: True for losses and errors.

    Returns:
        The number of training targets, or None: no point has a value, the best score is not above 0, or a loss is below
        0 (a share of the best then has no meaning).

    Raises:
        ValueError: ``share`` is outside (0, 1] or the targets decrease.
    """
    if not 0.0 < share <= 1.0:
        raise ValueError(f"share is in (0, 1], not {share}")
    points: list[tuple[int, float]] = []
    before = -math.inf
    for targets, value in curve:
        if targets is None or targets < before:
            raise ValueError(f"the training targets of a curve must not decrease, but {targets} follows {before:g}")
        before = targets
        if value is not None and math.isfinite(value):
            points.append((int(targets), float(value)))
    if not points:
        return None
    values = [value for _, value in points]
    if smaller_is_better:
        if min(values) < 0.0:
            return None
        bar = min(values) / share
        return next(targets for targets, value in points if value <= bar)
    if max(values) <= 0.0:
        return None
    bar = share * max(values)
    return next(targets for targets, value in points if value >= bar)


def stage_curve(
    curves: Iterable[Mapping[str, Any]], stage: Any, metric: str, pass_name: str | None = None
) -> list[tuple[int, float | None]]:
    """Picks one stage's learning curve out of the run's log.

    Args:
        curves: Records with ``stage``, ``pass``, ``targets`` and ``valid`` (``{metric: value}`` or None), the
            ``curves`` of ``result.json``.
        stage: The stage, as the records name it.
        metric: The validation metric; case is ignored.
        pass_name: Only this pass of the stage's plan, where a strategy trains in several.

    Returns:
        Points (training targets, value or None), in the order of the log.
    """
    wanted = metric.lower()
    points: list[tuple[int, float | None]] = []
    for record in curves:
        if record.get("stage") != stage or (pass_name is not None and record.get("pass") != pass_name):
            continue
        valid = {str(name).lower(): value for name, value in (record.get("valid") or {}).items()}
        if record.get("targets") is not None and wanted in valid:
            points.append((int(record["targets"]), valid[wanted]))
    return points
