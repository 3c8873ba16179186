"""A stream of tasks over one log: what is asked changes, the users do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from recbole.utils import ModelType

from recbole_cl.config.columns import column_names, read_header
from recbole_cl.config.files import properties_dir
from recbole_cl.config.values import read_properties
from recbole_cl.errors import ConfigError, DataError, nearest
from recbole_cl.registry import schedulers
from recbole_cl.rng import numpy_generator
from recbole_cl.schema import is_integer, is_number
from recbole_cl.stream.build import first_seen, known
from recbole_cl.stream.schedulers.base import Log, Scheduler, Slices
from recbole_cl.stream.stage import Stage, Targets, Task
from recbole_cl.stream.table import TEST, TRAIN, VALID, InteractionTable
from recbole_cl.stream.task_columns import Columns, label_classes, labelled
from recbole_cl.stream.tasks import REPEAT, TaskSpec, parse_tasks

if TYPE_CHECKING:
    from recbole_cl.stream.dataset import StreamDatasetMixin


@schedulers.register()
class TaskStream(Scheduler):
    """One stage a task of the property ``tasks``, all over the whole log (PCL, section 2).

    ::

                 every user's interactions, in time
        user     |  training part               | valid | test |
        task 1   next item              o o o o o   o       o        each o a target with the history before it
        task 2   next item, rating 5    o   o       o       o        only interactions that meet the filter
        task 3   genre of the next item o o o o o   o       o        the label is a class
        task 4   age group of the user  [-- history --] -> label     users are dealt to train, valid and test

    An interaction that is held out in one task is held out in all, so no task trains on what another is tested on;
    the user's label is predicted from the user's training part. A user and an item have a row if training knows them,
    the same rows in every stage.

    ``task_cold_items`` hides a share of these items from the first task (PCL, section 4.5)::

        log          i1 i2 i3 i4 i5 i6        i2 and i5 were drawn by the seed
        task 1       i1 i3 i4 i6              no target, no negative, in no history, no row in the model
        task 2       i1 i2 i3 i4 i5 i6        their rows come, with the last ids: "new items" of the second task

    A late item's first appearance is thus that of the second task. Task 1 stays a task over its own items for ever.

    Raises:
        ConfigError: If a task makes no sense or a field is in none of the files.
        DataError: If a task has no targets, a single class, or a class that training lacks.
    """

    time_ordered = False
    remedy = "loosen the task's filter"

    @classmethod
    def settle(cls, config: Any) -> None:
        """Reads the declarations and sees to it that their columns are loaded; called while a config is made.

        Args:
            config: The configuration that is being made; ``tasks`` and ``load_col`` are completed.
        """
        final = config.final_config_dict
        declared = _ordered(declared_tasks(final.get("tasks"), config.dataset), final.get("task_order"))
        specs = parse_tasks(declared)
        for key in ("task_eval_per_user", "task_train_per_user"):
            value = final.get(key)
            if value is not None and not (is_integer(value) and value >= 1):
                raise ConfigError(f"{key}: {value!r} must be an integer of at least 1, or ~ for all")
        if (positions := final.get("task_class_positions")) not in ("all", "last"):
            raise ConfigError(
                f"task_class_positions: {positions!r} must be 'all' (of a window in one pass) or 'last' (a row each)"
                f"{nearest(str(positions), ('all', 'last'))}"
            )
        _check_cold_items(final, specs)
        log = config.log_files
        headers = {"inter": log.columns}
        for other in ("user", "item"):
            if (file := log.folder / f"{log.dataset}.{other}").is_file():
                headers[other] = column_names(read_header(file, final))
        wanted: dict[str, list[str]] = {"inter": [], "user": [], "item": []}
        for spec in specs:
            for field in spec.columns:
                suffix = next((suffix for suffix, columns in headers.items() if field in columns), None)
                if suffix is None:
                    known = [REPEAT, *dict.fromkeys(column for columns in headers.values() for column in columns)]
                    hint = nearest(field, known) or f". They have {', '.join(known)}"
                    raise ConfigError(
                        f"tasks: {spec.name!r} names the field {field!r}, which is no column of "
                        f"{config.dataset}.inter, .user or .item{hint}"
                    )
                if field in spec.attributes and suffix != "item":
                    raise ConfigError(
                        f"tasks: {spec.name!r} names the attribute {field!r}, which is no column of "
                        f"{config.dataset}.item; attributes are those of items"
                    )
                if final.get("normalize_all") or field in (final.get("normalize_field") or ()):
                    raise ConfigError(
                        f"tasks: {spec.name!r} reads {field!r} as the file has it; take it out of normalize_field and "
                        f"set normalize_all: False"
                    )
                if field in (final.get("discretization") or ()):
                    raise ConfigError(
                        f"tasks: {spec.name!r} reads {field!r} as the file has it; take it out of discretization"
                    )
                wanted[suffix].append(field)
        load = final.get("load_col")
        if load is not None:
            ids = {"inter": [], "user": [final["USER_ID_FIELD"]], "item": [final["ITEM_ID_FIELD"]]}
            for suffix, fields in wanted.items():
                if fields and load.get(suffix) != "*":
                    given = load.get(suffix) or ids[suffix]
                    load = {**load, suffix: list(dict.fromkeys([*given, *fields]))}
            final["load_col"] = load
        final["tasks"] = [dict(given) for given in declared]

    def assign(self, log: Log) -> Slices:
        return Slices(np.zeros(len(log), dtype=np.int64), ["log"])

    def late_items(self, item: np.ndarray, known: np.ndarray) -> np.ndarray:
        share = self.config["task_cold_items"]
        if not share:
            return super().late_items(item, known)
        items = np.unique(item[known])
        drawn = numpy_generator(self.config["seed"], 0, "task_cold_items").permutation(items)
        return np.isin(item, drawn[: round(share * len(items))])

    def stages(self, table: InteractionTable, roles: np.ndarray, dataset: StreamDatasetMixin) -> list[Stage]:
        if self.config["stage_split"] == "next_stage":
            raise ConfigError("stage_split: next_stage has no meaning under TaskStream; use user_tail or leave_one_out")
        specs = parse_tasks(self.config["tasks"])[: self.n_stages]
        users = known(first_seen(table.user, dataset.raw_phase.astype(np.int64), table.n_users), 1)
        items = known(first_seen(table.item, dataset.raw_phase.astype(np.int64), table.n_items), 1)
        growing = self.config["vocabulary"] == "growing"
        late = bool(dataset.raw_late.any())
        # Ids are given in this order: items of the first task, late ones, those that training does not know.
        warm = 1 + len(np.unique(table.item[(dataset.raw_phase == 0) & ~dataset.raw_late])) if late else table.n_items
        self._sequences = table.sequences_of(table.item < warm) if late else None
        columns = Columns(dataset, table)
        stages = []
        for index, spec in enumerate(specs):
            first = index == 0
            parts, task = self._targets(spec, columns, roles, dataset, first)
            stages.append(
                Stage(
                    index=index,
                    name=spec.name,
                    start=float(dataset.raw_time.min()),
                    end=float(dataset.raw_time.max()),
                    train=parts[TRAIN],
                    valid=parts[VALID],
                    test=parts[TEST],
                    task=task,
                    n_users=users if growing else table.n_users,
                    n_items=(min(warm, items) if first else items) if growing else table.n_items,
                    catalogue=warm if first else table.n_items,
                    # Later stages meet nobody new, but for the late items of the second.
                    first_new_user=1 if first else table.n_users,
                    first_new_item=(1, warm)[index] if index < 2 else table.n_items,
                    n_new_users=table.n_users - 1 if first else 0,
                    n_new_items=(warm - 1, table.n_items - warm)[index] if index < 2 else 0,
                    items=_items(spec, parts[TRAIN], warm if first and late else None),
                )
            )
        return stages

    def _targets(
        self, spec: TaskSpec, columns: Columns, roles: np.ndarray, dataset: StreamDatasetMixin, first: bool
    ) -> tuple[dict[int, Targets], Task]:
        """Returns a task's targets by role, and the task."""
        table = columns.table
        meets = np.ones(len(table), dtype=bool)
        for condition in spec.filter:
            flags, none = columns.matches(spec.name, condition)
            meets &= flags
            if none.any():
                kept = "keeps" if flags[none].any() else "leaves out"
                dataset.stream_warnings.append(
                    f"tasks: {spec.name!r}: {int(none.sum())} of {len(none)} interactions have no {condition.field}; "
                    f"the filter {condition} {kept} them"
                )
        met = int(meets.sum())
        if spec.kind == "classification" and columns.of_user(spec.target or ""):
            found, role = self._users(spec, table, meets, dataset)
        else:
            meets &= np.isin(roles, (TRAIN, VALID, TEST))
            if first and self._sequences is not None:
                lo, hi = self._sequences
                positions = np.flatnonzero(meets & (hi >= 0))
                user, item = table.user[positions], table.item[positions]
                found = Targets(positions, user, lo[positions], hi[positions], item)
            else:
                positions = np.flatnonzero(meets)
                found = Targets.next_items(table, positions, self.config["history"])
            role = roles[positions]
        if self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            keep = found.hi > found.lo
            found, role = found[keep], role[keep]
        if not (role == TRAIN).any():
            conditions = " and ".join(map(str, spec.filter))
            how = f"; {met or 'no'} interactions of the log meet {conditions}" if conditions else ""
            why = ", none of them in training and after a history" if conditions and met else ""
            raise DataError(
                f"tasks: {spec.name!r} has no training target{how}{why}; "
                f"{'loosen its filter' if conditions else 'raise the first of stage_ratios'} or leave the task out"
            )
        eval_most = spec.eval_per_user or self.config["task_eval_per_user"]
        train_most = spec.train_per_user or (None if first else self.config["task_train_per_user"])
        most = {TRAIN: train_most, VALID: eval_most, TEST: eval_most}
        parts, labels = {part: found[role == part] for part in most}, None
        if spec.kind == "classification":
            parts, labels = _classes(spec, columns, parts, most)
        parts = {part: _newest(targets, most[part]) for part, targets in parts.items()}
        task = Task(
            kind=spec.kind,
            name=spec.name,
            n_labels=None if labels is None else len(labels),
            primary=spec.metric,
            description=spec.description,
            labels=None if labels is None else tuple(labels),
            attributes=spec.attributes,
        )
        return parts, task

    def _users(
        self, spec: TaskSpec, table: InteractionTable, meets: np.ndarray, dataset: StreamDatasetMixin
    ) -> tuple[Targets, np.ndarray]:
        """Returns one target a user, with the user's training part as history, and its role."""
        # The first interaction of each user that training does not know ends the history.
        unknown = dataset.raw_phase[table.seq] != 0
        hi = table.ptr[1:].copy()
        at = np.flatnonzero(unknown)
        np.minimum.at(hi, table.user[table.seq[at]], at)
        users = np.flatnonzero(hi > table.ptr[:-1])
        met = np.zeros(table.n_users, dtype=bool)
        met[table.user[meets]] = True
        users = users[met[users]]
        lo, hi = table.ptr[users], hi[users]
        shares = np.asarray(self.config["stage_ratios"], dtype=np.float64)
        cuts = np.rint(np.cumsum(shares / shares.sum())[:-1] * len(users)).astype(np.int64)
        order = numpy_generator(self.config["seed"], 0, f"task/{spec.name}").permutation(len(users))
        role = np.empty(len(users), dtype=np.int8)
        for part, index in zip((TRAIN, VALID, TEST), np.split(order, cuts), strict=True):
            role[index] = part
        last = table.seq[hi - 1]
        return Targets(last, users, lo, hi, np.zeros(len(users), dtype=np.int64)), role


def _classes(
    spec: TaskSpec, columns: Columns, parts: dict[int, Targets], most: dict[int, int | None]
) -> tuple[dict[int, Targets], list[str]]:
    """Gives the targets of a classification their classes.

    Args:
        spec: The task.
        columns: The columns of the log.
        parts: Targets by role.
        most: How many of a user's targets are kept, by role.

    Returns:
        The targets that have a class, and the classes' names.
    """
    values, names = columns.raw_labels(spec)
    known = labelled(values, names)
    without = sum(int((~known[targets.position]).sum()) for targets in parts.values())
    parts = {part: targets[known[targets.position]] for part, targets in parts.items()}
    for part in parts:
        # The classes are those of what is trained on. Where they are not chosen, every held-out target must have one
        # of them; where they are, a user's newest ones that have one are kept.
        if part == TRAIN or spec.classes is None:
            parts[part] = _newest(parts[part], most[part])
    held_out = Targets.concat([parts[VALID], parts[TEST]])
    label, labels = label_classes(spec, values, names, parts[TRAIN].position, held_out.position)
    chosen = {part: replace(targets, label=label[targets.position]) for part, targets in parts.items()}
    parts, total = {part: targets[targets.label >= 0] for part, targets in chosen.items()}, without + _number(chosen)
    if (left := total - _number(parts)) > 0:
        columns.dataset.stream_warnings.append(
            f"tasks: {spec.name!r}: {left} of {total} targets have no label or none of its {len(labels)} classes and "
            f"are left out"
        )
    return parts, labels


def _number(parts: dict[int, Targets]) -> int:
    return sum(map(len, parts.values()))


def _items(spec: TaskSpec, train: Targets, late_from: int | None) -> np.ndarray | None:
    """Returns the items that a task's targets are ranked among, or ``None`` for all."""
    if spec.candidates == "targets":
        return np.unique(train.label)
    return None if late_from is None else np.arange(1, late_from)


def _check_cold_items(final: Any, specs: Sequence[TaskSpec]) -> None:
    share = final.get("task_cold_items") or 0
    if not (is_number(share) and 0 <= share < 1):
        raise ConfigError(f"task_cold_items: {share!r} must be a share of the items, from 0 on and below 1")
    if not share:
        return
    if specs[0].kind != "next_item":
        raise ConfigError(
            f"task_cold_items: {share} hides items from the first task, which is {specs[0].name!r} ({specs[0].kind}); "
            f"put a next_item task first"
        )
    if len(specs[: final.get("n_stages")]) < 2:
        raise ConfigError(f"task_cold_items: {share} of the items would never come; have a second task")
    if final.get("vocabulary") == "global":
        raise ConfigError(
            "vocabulary: global gives the first task a row for every item, but task_cold_items hides some from it; use "
            "growing"
        )


def _newest(targets: Targets, number: int | None) -> Targets:
    """Returns each user's newest targets, at most ``number`` of them, in the order given."""
    if number is None or not len(targets):
        return targets
    order = np.lexsort((targets.hi, targets.user))
    user = targets.user[order]
    ends = np.flatnonzero(np.r_[user[1:] != user[:-1], True])
    from_end = np.repeat(ends, np.diff(np.r_[-1, ends])) - np.arange(len(user))
    return targets[np.sort(order[from_end < number])]


def declared_tasks(given: Any, dataset: str) -> Any:
    """Returns the declarations: given ones, those of a file, or those that are brought along for the dataset."""
    if given is not None and not isinstance(given, str):
        return given
    own = properties_dir() / "tasks"
    file = own / f"{given or dataset}.yaml"
    if given is not None and Path(given).suffix in (".yaml", ".yml"):
        file = Path(given)
    if (given is None or file.parent == own) and not file.is_file():
        known = ", ".join(sorted(path.stem for path in own.glob("*.yaml")))
        what = f"dataset {dataset!r} brings none" if given is None else f"there are none called {given!r}"
        raise ConfigError(f"tasks: {what} (known: {known}); declare them, as in properties/tasks/ml-100k.yaml")
    values = read_properties(file)
    if "tasks" not in values:
        raise ConfigError(f"tasks: the file {str(file)!r} holds no property 'tasks'")
    return values["tasks"]


def _ordered(declared: Any, order: Any) -> Any:
    """Returns the declarations in the order of ``task_order``, which counts from 1 and may leave some out."""
    if order is None:
        return declared
    n = len(declared) if isinstance(declared, list | tuple) else 0
    numbers = isinstance(order, list | tuple) and all(is_integer(k) and 1 <= k <= n for k in order)
    if not numbers or not order or len(set(order)) != len(order):
        raise ConfigError(f"task_order: {order!r} must list different numbers of tasks, from 1 to {n}")
    return [declared[k - 1] for k in order]
