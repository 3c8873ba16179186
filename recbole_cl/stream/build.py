"""From a configuration to a stream."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from recbole.utils import EvaluatorType, ModelType

from recbole_cl.errors import DataError
from recbole_cl.stream.dataset import StageView, StreamDatasetMixin, load_dataset
from recbole_cl.stream.read_tables import tables_digest
from recbole_cl.stream.stage import Stage, Targets, Task
from recbole_cl.stream.table import TEST, TRAIN, VALID, InteractionTable


def build_stream(config: Any) -> Stream:
    """Loads the log, cuts it into stages and gives ids.

    Raises:
        DataError: If a stage is empty or nothing can be trained; the message names the stage and the remedy.
    """
    dataset = load_dataset(config)
    table = dataset.build_table()
    stages = dataset._scheduler.stages(table, dataset.raw_role, dataset)
    if stages is None:
        stages = stages_of_slices(config, table, dataset.raw_role, dataset)
    stream = Stream(
        table=table,
        stages=stages,
        dataset=dataset,
        scheduler=type(dataset._scheduler).__name__,
        history=config["history"],
        warnings=list(dataset.stream_warnings),
    )
    _check(config, stream, dataset)
    return stream


def first_seen(ids: np.ndarray, when: np.ndarray, n_ids: int) -> np.ndarray:
    """Returns the smallest ``when`` of each id, shape ``[n_ids]``; ids that never occur get the largest int64."""
    out = np.full(n_ids, np.iinfo(np.int64).max)
    np.minimum.at(out, ids, when)
    return out


def known(first: np.ndarray, limit: int) -> int:
    """Returns how many ids, padding included, were seen before ``limit``; ids are given in that order."""
    return 1 + int((first[1:] < limit).sum())


def stages_of_slices(
    config: Any, table: InteractionTable, roles: np.ndarray, dataset: StreamDatasetMixin
) -> list[Stage]:
    """Returns one stage a slice of the table, with the split's roles.

    Args:
        config: The run's configuration.
        table: The sorted table.
        roles: Role of each position.
        dataset: The loaded dataset; names of the slices and vocabulary phases are read.
    """
    next_stage = config["stage_split"] == "next_stage"
    n_slices = len(dataset.slice_names)
    n_stages = n_slices - 1 if next_stage else n_slices
    if n_stages < 1:
        raise DataError("n_stages: stage_split: next_stage needs at least two slices; raise n_stages")
    # 2 * slice + phase orders what a stage's training knows (phase 0) before its held-out targets (phase 1).
    when = 2 * table.stage + dataset.raw_phase
    users, items = (
        first_seen(table.user, when, table.n_users),
        first_seen(table.item, when, table.n_items),
    )
    growing = config["vocabulary"] == "growing"
    needs_history = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    task = Task(kind="value", name="value") if _is_value(config) else Task()

    def targets(slice_index: int, *wanted: int) -> Targets:
        positions = np.flatnonzero((table.stage == slice_index) & np.isin(roles, wanted))
        found = Targets.next_items(table, positions, config["history"])
        return found[found.hi > found.lo] if needs_history else found

    stages = []
    for k in range(n_stages):
        rows = np.flatnonzero(table.stage == k)
        if not len(rows):
            raise DataError(
                f"scheduler: stage {k + 1} ({dataset.slice_names[k]}) holds no interaction; {dataset._scheduler.remedy}"
            )
        last = k + 1 if next_stage else k
        stages.append(
            Stage(
                index=k,
                name=dataset.slice_names[k],
                start=float(dataset.raw_time[rows].min()),
                end=float(dataset.raw_time[rows].max()),
                train=targets(k, TRAIN),
                valid=targets(k, VALID),
                test=targets(k + 1, TRAIN, VALID, TEST) if next_stage else targets(k, TEST),
                task=task,
                n_users=known(users, 2 * k + 1) if growing else table.n_users,
                n_items=known(items, 2 * k + 1) if growing else table.n_items,
                catalogue=known(items, 2 * last + 2),
                first_new_user=known(users, 2 * k),
                first_new_item=known(items, 2 * k),
                n_new_users=known(users, 2 * k + 2) - known(users, 2 * k),
                n_new_items=known(items, 2 * k + 2) - known(items, 2 * k),
                tested_until=k if next_stage else None,
            )
        )
        if next_stage:
            stages[-1].first_new_user, stages[-1].first_new_item = known(users, 2 * k + 2), known(items, 2 * k + 2)
    return stages


def _is_value(config: Any) -> bool:
    return config["eval_type"] == EvaluatorType.VALUE


def _check(config: Any, stream: Stream, dataset: StreamDatasetMixin) -> None:
    for stage in stream.stages:
        if not len(stage.train):
            raise DataError(
                f"stage {stage.index + 1} ({stage.name}) has no training target; lower n_stages or min_user_inter, or "
                f"raise the first of stage_ratios"
            )
        if not len(stage.valid):
            stream.warnings.append(
                f"stage {stage.index + 1} ({stage.name}) has no validation target: no early stopping, all epochs run"
            )
        if not len(stage.test):
            stream.warnings.append(
                f"stage {stage.index + 1} ({stage.name}) has no test target or user: its column of the matrix is null"
            )
    if config["vocabulary"] == "global":
        later = stream.table.n_items - stream.stages[0].catalogue
        stream.warnings.append(
            f"vocabulary: global gives rows to all users and items from the start: a full softmax at stage 1 ranks "
            f"{later} items of the future"
        )
    if config["candidates"] == "all":
        stream.warnings.append("candidates: all ranks over every item that the model has a row for, trained or not")
    if config["history"] == "all":  # checked on the data: a column of periods need not follow the clock
        table = stream.table
        time, seq = table.timestamp[table.seq], table.user[table.seq]
        later = int(((time[1:] < time[:-1]) & (seq[1:] == seq[:-1])).sum())
        if later:
            stream.warnings.append(
                f"history: all under {stream.scheduler} puts interactions of earlier stages before targets with an "
                f"earlier timestamp ({later} such steps); history: stage does not look ahead"
            )


@dataclass
class Stream:
    """The stages over one table, and RecBole's dataset behind it."""

    table: InteractionTable
    stages: list[Stage]
    dataset: StreamDatasetMixin
    scheduler: str
    history: str = "all"
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.stages)

    def trained_targets(self, stage: int, scope: str) -> Targets:
        """Returns training targets: ``stage`` (of this one) or ``so_far`` (of all up to it with a task of its kind)."""
        if scope == "stage":
            return self.stages[stage].train
        parts = [s.train for s in self.stages[: stage + 1] if s.task.kind == self.stages[stage].task.kind]
        return Targets.concat(parts)

    def view(self, stage: int, graph: str = "all") -> StageView:
        """Returns RecBole's dataset as it stands when ``stage`` is trained (see :class:`StageView`)."""
        view = StageView.of(self, stage, graph)
        # A model finds here what stands behind a batch's _position and _task: the table and the stages' tasks.
        view.stream, view.stage_index = self, stage
        return view

    def graph_positions(self, stage: int, graph: str = "all") -> np.ndarray:
        """Returns the sorted positions of the training interactions that a graph model sees at ``stage``.

        The targets of a classification are no interactions to learn from: such a stage sees those of the stages before.
        """
        chosen = self.stages[: stage + 1]
        if graph == "stage" and self.stages[stage].task.kind != "classification":
            chosen = chosen[-1:]
        seen = np.zeros(len(self.table), dtype=bool)  # flags need no sorting: linear in the interactions
        for known in chosen:
            if known.task.kind != "classification":
                seen[known.train.position] = True
        return np.flatnonzero(seen)

    def fingerprint(self) -> str:
        """Returns a hash of all that was read: the table, the stages' targets, and every table of the dataset."""
        digest = hashlib.sha256(self.table.fingerprint().encode())
        for stage in self.stages:
            digest.update(repr(stage.task).encode())
            for split in ("train", "valid", "test"):
                targets = stage.split(split)
                for column in (targets.position, targets.hi, targets.label):
                    digest.update(np.ascontiguousarray(column, dtype=np.int64).tobytes())
        for part in tables_digest(self.dataset):
            digest.update(part)
        return digest.hexdigest()
