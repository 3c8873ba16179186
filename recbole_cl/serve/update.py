"""One more stage on a saved run: new rows in, a better model out, or the old one kept.

::

    new rows      | training part        | valid | held-out tail |
    old model                                      -> old figure
    old model ---- trained on these ----> new model -> new figure       promoted only if it is not worse by a margin
    old model ---- trained on all of these -------------------->        what is served, where the run serves all rows

Until the last step, one rename, the champion is the version before; a process that is killed before that has changed
nothing that anybody sees.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recbole_cl.errors import ConfigError, nearest
from recbole_cl.model.contract import contract
from recbole_cl.results.matrix import smaller_is_better
from recbole_cl.serve.features import read_features
from recbole_cl.serve.incoming import read_incoming
from recbole_cl.stream.build import Stream
from recbole_cl.stream.extend import Moves, extended
from recbole_cl.stream.quality import date
from recbole_cl.training.all_rows import all_rows, best_epochs
from recbole_cl.training.load import SavedRun
from recbole_cl.training.runner import Runner
from recbole_cl.training.store import keep_stream
from recbole_cl.training.versions import locked

LOGGER = logging.getLogger("recbole_cl")
MARGIN, KEEP = 0.05, 5


@dataclass
class Update:
    """What an update came to.

    Args:
        promoted: A new version is served.
        reason: Why, or why not, in a sentence.
        champion: Number of the version that is served now.
        challenger: Number of the version that was trained and kept aside, or ``None``.
        metric: The guard metric, or ``None`` for none.
        old: The old model on the held-out tail.
        new: The new model there.
        tested: Held-out targets.
        rows: What was read, left out and used.
        notes: What was left out or looks odd.
        seconds: How long it took.
    """

    promoted: bool
    reason: str
    champion: int
    metric: str | None
    old: float | None
    new: float | None
    tested: int
    rows: dict[str, int]
    challenger: int | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Returns it JSON-able."""
        return asdict(self)


def update(
    run: str | Path,
    new_data: str | Path,
    changes: Mapping[str, Any] | None = None,
    *,
    columns: Mapping[str, Any] | None = None,
    guard: str | None = None,
    margin: float = MARGIN,
    keep: int = KEEP,
    new_ids: bool = False,
    without: Sequence[str] = (),
    as_challenger: bool = False,
    new_users: str | Path | None = None,
    new_items: str | Path | None = None,
    dry_run: bool = False,
    model_class: type | None = None,
) -> Update:
    """Trains the champion of a run on new rows, and serves what comes out unless it is worse.

    Args:
        run: The run's folder.
        new_data: File of new interactions.
        changes: ``strategy``, its parameters and other properties of this and later updates (``epochs``).
        columns: Names of the file's columns, where they differ from those that the log was imported with.
        guard: Metric that must not fall (``ndcg@10``); default the run's ``valid_metric``; ``none`` always promotes.
        margin: Share of the old figure that the new one may fall short of it.
        keep: Versions that are kept.
        new_ids: Take a file in which no item is known to the run.
        without: Users whose rows in the file are left out.
        new_users: File with the features of users who come with the rows (``.user``, or a table).
        new_items: File with those of items.
        as_challenger: Keep the new version as the challenger even where it is as good.
        dry_run: Train and compare, but change nothing in the run's folder.
        model_class: The model's class, where nobody here answers to its name.

    Raises:
        RecBoleCLError: If the file or the run cannot be used; nothing has changed then.
    """
    begun = time.perf_counter()
    if not 0 <= margin <= 1:
        raise ConfigError(f"margin: {margin!r} is the share of the old figure that may be lost, from 0 to 1")
    if keep < 2:
        raise ConfigError(f"keep: {keep!r} must be at least 2, the champion and the one before it")
    folder = Path(run).expanduser()
    with contextlib.nullcontext() if dry_run or not folder.is_dir() else locked(folder, "update"):
        saved = SavedRun.open(run, model_class=model_class)
        changed = SavedRun.open(run, model_class=model_class, changes=changes) if changes else saved
        incoming = read_incoming(saved, new_data, columns, new_ids, without)
        name = f"update {len(saved.stream) + 1}"
        features = {}
        for side, file in (("user", new_users), ("item", new_items)):
            if file is not None:
                features[side], notes = read_features(saved, file, side)
                incoming.notes += notes
        stream, moves = extended(changed.config, saved.stream, incoming.rows, name, features)
        stage = stream.stages[-1]
        used = incoming.figures
        LOGGER.info(
            "update: %d rows up to %s UTC, %d new users, %d new items",
            used["used"], date(stage.end), used["new_users"], used["new_items"],
        )  # fmt: skip
        new = standing_at(changed, stream, moves)
        new.train_stages(stage.index)
        costs = contract(new.standing(stage.index).model).stage_costs()
        metric, old_figure, new_figure = _compared(saved, stream, moves, new, guard)
        promoted, reason = judged(metric, old_figure, new_figure, margin)
        if promoted and as_challenger:
            promoted, reason = False, f"kept as the challenger, as asked: {reason}"
        result = Update(
            promoted and not dry_run,
            reason,
            saved.number,
            metric,
            old_figure,
            new_figure,
            len(stage.test),
            used,
            notes=[
                *incoming.notes,
                *(f"{name}: {value}" for name, value in costs.items() if isinstance(value, int) and value),
            ],
        )
        if not dry_run:
            number = _keep(changed, stream, moves, new, result, Path(new_data).name, keep)
            result.champion, result.challenger = (number, None) if promoted else (saved.number, number)
        else:
            result.reason = f"dry run, nothing has changed; it would {'' if promoted else 'not '}be promoted: {reason}"
        result.seconds = round(time.perf_counter() - begun, 3)
    return result


def standing_at(saved: SavedRun, stream: Stream, moves: Moves, config: Any = None) -> Runner:
    """Returns a runner that stands at the end of a saved run, over a longer stream.

    Args:
        saved: The saved run.
        stream: The longer stream.
        moves: Where the ranges of its histories went.
        config: Another configuration; default the saved run's.
    """
    config = saved.config if config is None else config
    runner = Runner(config)
    names = {s.name for s in runner.strategy.members}
    state = dict(saved.state)
    kept = {name: moves.state(value) for name, value in state["strategy"].items() if name in names}
    state["strategy"] = {**runner.strategy.state_dict(), **kept}
    known = dict(state["known"])
    for key, size in (("users", stream.table.n_users), ("items", stream.table.n_items)):
        flags = np.zeros(size, dtype=bool)
        flags[: len(known[key])] = known[key]
        known[key] = flags
    state["known"] = known
    longer = SavedRun(saved.folder, saved.versions, saved.number, state, config, stream, saved.log)
    found = longer.runner()
    found.only_trains = True
    return found


# -- the guard ----------------------------------------------------------------------------------------------------


def _compared(
    saved: SavedRun, stream: Stream, moves: Moves, new: Runner, guard: str | None
) -> tuple[str | None, float | None, float | None]:
    """Returns the guard metric, and its values for the old and the new model on the held-out tail."""
    stage = stream.stages[-1]
    if guard is not None and guard.lower() == "none":
        return None, None, None
    if not len(stage.test):
        return guard or new.journal.primary(stage), None, None
    old = standing_at(saved, stream, moves)
    figures = []
    for runner, at in ((old, stage.index - 1), (new, stage.index)):
        ctx = runner.standing(at)
        figures.append(runner.evaluator.evaluate(ctx, runner.known, stage).metrics)
    metric = (guard or new.journal.primary(stage)).lower()
    if metric not in figures[1]:
        known = ", ".join(sorted(figures[1]))
        raise ConfigError(
            f"guard: {guard!r} is no metric of this run{nearest(metric, figures[1]) or '.'} It has {known}"
        )
    return metric, figures[0][metric], figures[1][metric]


def judged(metric: str | None, old: float | None, new: float | None, margin: float) -> tuple[bool, str]:
    """Returns whether the new model is to be served, and why."""
    if metric is None:
        return True, "there is no guard"
    if old is None or new is None:
        return False, (
            "the new rows are too few to hold some out, so old and new model cannot be compared; collect more, or "
            "promote without a comparison: --guard=none"
        )
    less = smaller_is_better(metric)
    limit = old * (1 + margin) if less else old * (1 - margin)
    good = new <= limit if less else new >= limit
    verdict = f"{metric} on the held-out tail is {new:.4f}, the old model's {old:.4f}"
    if good:
        return True, verdict
    return False, f"{verdict}: worse by more than the margin of {margin:.0%}, so the old model is kept"


# -- versions -------------------------------------------------------------------------------------------------------


def _keep(saved: SavedRun, stream: Stream, moves: Moves, new: Runner, result: Update, file: str, keep: int) -> int:
    """Writes the new version and makes it the champion, or the challenger; returns its number."""
    last, served_all = len(stream) - 1, bool(saved.state.get("all_rows", False))
    runner = new
    if served_all:
        whole = all_rows(saved.config, stream, only=[last])
        runner = standing_at(saved, whole, moves)
        runner.state.epochs = {key: n for key, n in best_epochs(new.journal.curves).items() if key[0] == last}
        runner.train_stages(last)
    runner.data = runner.stream.fingerprint()
    runner.store = keep_stream(saved.folder, runner.stream, saved.log)
    state: dict[str, Any] = {**runner.saved_state(runner.standing(last), "done"), "all_rows": served_all}
    entry = {
        "store": runner.store,
        "where": "versions",
        "all_rows": served_all,
        "file": file,
        "rows": result.rows,
        "strategy": saved.config.strategy_name,
        "until": stream.stages[-1].end,
        "metric": result.metric,
        "old": result.old,
        "new": result.new,
    }
    return saved.versions.add(state, entry, keep, result.promoted)
