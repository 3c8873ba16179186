"""Training once more on all rows: the model that is served knows the newest interactions, too.

What is held out is held out for the figures. Whoever serves a model wants it to have trained on everything, so after
the evaluated walk a second one goes over the same stages (``serve: True``)::

    evaluated    stage 1  | train       | valid | test |   stage 2  | train       | valid | test |      -> the figures
    served       stage 1  | train                      |   stage 2  | train                      |      -> version 0

It validates nothing, so each pass trains as many epochs as the evaluated walk found best. No figure comes from it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from recbole_cl import distributed
from recbole_cl.errors import ConfigError
from recbole_cl.stream.build import Stream
from recbole_cl.stream.stage import Stage, Targets
from recbole_cl.training.store import imported_columns, keep_stream
from recbole_cl.training.versions import Versions

LOGGER = logging.getLogger("recbole_cl")


def all_rows(config: Any, stream: Stream, only: Iterable[int] | None = None) -> Stream:
    """Returns the stream with every target of its stages to be trained on, and none to be tested on.

    Under ``stage_split: next_stage`` the targets of the slice behind the last stage, which was only tested on, belong
    to the last stage's training.

    Args:
        config: ``vocabulary`` is read.
        stream: The stream, which stays as it is.
        only: Stages that are changed; default all.
    """
    table, last = stream.table, len(stream) - 1
    growing = config["vocabulary"] == "growing"
    chosen = set(range(len(stream)) if only is None else only)
    stages: list[Stage] = []
    for stage in stream.stages:
        if stage.index not in chosen:
            stages.append(stage)
            continue
        ahead = stage.tested_until is not None and stage.index < last  # its test targets are the next stage's own
        parts = [stage.train, stage.valid, *([] if ahead else [stage.test])]
        train = Targets.concat(parts)
        train = train[np.argsort(train.position, kind="stable")]
        nothing = train[:0]
        n_users, n_items = stage.n_users, stage.n_items
        if growing:
            seen = np.ones(len(table), dtype=bool) if stage.index == last else table.stage <= stage.index
            n_users = max(n_users, 1 + int(table.user[seen].max()))
            n_items = max(n_items, min(stage.catalogue, 1 + int(table.item[seen].max())))
        stages.append(
            replace(
                stage, train=train, valid=nothing, test=nothing, tested_until=None, n_users=n_users, n_items=n_items
            )
        )
    return replace(stream, stages=stages)


def best_epochs(curves: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], int]:
    """Returns how many epochs each pass was best after, by stage and name of the pass; all where it never validated.

    Args:
        curves: The points of a run's journal.
    """
    found: dict[tuple[int, str], int] = {}
    validated: set[tuple[int, str]] = set()
    for point in curves:
        key, epochs = (int(point["stage"]), str(point["pass"])), int(point["epoch"]) + 1
        if point["best"]:
            found[key] = epochs
            validated.add(key)
        elif key not in validated:
            found[key] = epochs
    return found


def refuse_serving(config: Any) -> None:
    """Raises a :class:`ConfigError` where a run is to serve a model and keeps none, or compares itself with RecBole."""
    if config["serve"] and (config["saved"] is False or config["parity"]):
        key = "parity" if config["parity"] else "saved"
        raise ConfigError(f"serve: True keeps a model to be served, which {key}: {config[key]} does not allow")


def train_on_all_rows(run: Any) -> bool:
    """Trains the model that is served, after a run's evaluated walk, and keeps it as version 0 of the run.

    Args:
        run: The :class:`~recbole_cl.training.runner.Runner`, whose walk is complete.

    Returns:
        Whether there was anything to do: not for a resumed run that serves already.
    """
    config = run.config
    versions = Versions(run.folder)
    if (run.folder / "versions" / "index.json").is_file():
        versions = Versions.of(run.folder)
        if versions.entries[0].get("data") == run.data:
            return False  # a resumed run that had come to its end
    begun = time.perf_counter()
    LOGGER.info("serve: training once more on all rows of %d stages", len(run.stream))
    again = type(run)(config)  # strategies that have seen nothing
    again.only_trains = True
    stream = all_rows(config, run.stream)
    again.begin(stream)
    again.state.epochs = best_epochs(run.journal.curves)
    again.data = stream.fingerprint()
    ctx = again.train_stages(0)
    rows = sum(len(stage.train) for stage in stream.stages)
    numbers = {
        "rows": rows,
        "seconds": round(time.perf_counter() - begun, 3),
        **{f"epochs of stage {stage + 1}, {name}": n for (stage, name), n in sorted(again.state.epochs.items())},
    }
    run.journal.add_report(run.stream.stages[-1], {"served model": {"numbers": numbers}})
    run.journal.warn(
        f"serve: the model that is served (version 0) was trained on all {rows} rows, the held-out ones too; every "
        f"figure of this report is the evaluated model's, which was not"
    )
    with distributed.current().together():
        if run.state.main:
            again.store = keep_stream(run.folder, stream, imported_columns(config))
            again.journal.load_state_dict(run.journal.state_dict())  # the figures are the evaluated walk's
            state = {**again.saved_state(ctx, "done"), "all_rows": True}
            entry = {"store": again.store, "data": run.data, "where": "versions", "rows": rows, "all_rows": True}
            versions.entries, versions.previous = [], []
            versions.add(state, entry, keep=1)
    return True
