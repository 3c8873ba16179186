"""A stream of tasks over one log: what is asked changes, the users do not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from recbole.utils import ModelType

from recbole_cl.errors import ConfigError, DataError, nearest
from recbole_cl.registry import schedulers
from recbole_cl.rng import numpy_generator
from recbole_cl.schema import is_integer
from recbole_cl.stream.schedulers.base import Log, Scheduler, Slices
from recbole_cl.stream.stage import Stage, Targets, Task
from recbole_cl.stream.table import TEST, TRAIN, VALID, InteractionTable
from recbole_cl.stream.tasks import REPEAT, Columns, TaskSpec, label_classes, parse_tasks

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
        declared = _ordered(_declared(final.get("tasks"), config.dataset), final.get("task_order"))
        specs = parse_tasks(declared)
        for key in ("task_eval_per_user", "task_train_per_user"):
            value = final.get(key)
            if value is not None and not (is_integer(value) and value >= 1):
                raise ConfigError(f"{key}: {value!r} must be an integer of at least 1, or ~ for all")
        headers = {"inter": config._columns, **_headers(final, config._folder, config.dataset)}
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

    def stages(self, table: InteractionTable, roles: np.ndarray, dataset: StreamDatasetMixin) -> list[Stage]:
        from recbole_cl.stream.build import first_seen, known

        if self.config["stage_split"] == "next_stage":
            raise ConfigError("stage_split: next_stage has no meaning under TaskStream; use user_tail or leave_one_out")
        specs = parse_tasks(self.config["tasks"])[: self.n_stages]
        users = known(first_seen(table.user, dataset.raw_phase.astype(np.int64), table.n_users), 1)
        items = known(first_seen(table.item, dataset.raw_phase.astype(np.int64), table.n_items), 1)
        growing = self.config["vocabulary"] == "growing"
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
                    n_items=items if growing else table.n_items,
                    catalogue=table.n_items,
                    # Later stages meet nobody new.
                    first_new_user=1 if first else table.n_users,
                    first_new_item=1 if first else table.n_items,
                    n_new_users=table.n_users - 1 if first else 0,
                    n_new_items=table.n_items - 1 if first else 0,
                    items=np.unique(parts[TRAIN].label) if spec.candidates == "targets" else None,
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
            meets &= columns.matches(spec.name, condition)
        if spec.kind == "classification" and columns.of_user(spec.target or ""):
            found, role = self._users(spec, table, meets, dataset)
        else:
            positions = np.flatnonzero(meets & np.isin(roles, (TRAIN, VALID, TEST)))
            found = Targets.next_items(table, positions, self.config["history"])
            role = roles[positions]
        if self.config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            keep = found.hi > found.lo
            found, role = found[keep], role[keep]
        if not (role == TRAIN).any():
            told = " and ".join(map(str, spec.filter))
            raise DataError(f"tasks: {spec.name!r} has no training target{told and f'; no interaction meets {told}'}")
        labels: list[str] | None = None
        if spec.kind == "classification":
            values, names = columns.raw_labels(spec)
            train, held_out = found.position[role == TRAIN], found.position[role != TRAIN]
            label, labels = label_classes(spec, values, names, train, held_out)
            chosen = label[found.position]
            found = Targets(found.position, found.user, found.lo, found.hi, chosen)[chosen >= 0]
            role = role[chosen >= 0]
            if (left := int((chosen < 0).sum())) > 0:
                dataset.stream_warnings.append(
                    f"tasks: {spec.name!r}: {left} of {len(chosen)} targets have no label or none of its "
                    f"{len(labels)} classes and are left out"
                )
        eval_most = spec.eval_per_user or self.config["task_eval_per_user"]
        train_most = spec.train_per_user or (None if first else self.config["task_train_per_user"])
        most = {TRAIN: train_most, VALID: eval_most, TEST: eval_most}
        parts = {part: _newest(found[role == part], most[part]) for part in (TRAIN, VALID, TEST)}
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


def _newest(targets: Targets, number: int | None) -> Targets:
    """Returns each user's newest targets, at most ``number`` of them, in the order given."""
    if number is None or not len(targets):
        return targets
    order = np.lexsort((targets.hi, targets.user))
    user = targets.user[order]
    ends = np.flatnonzero(np.r_[user[1:] != user[:-1], True])
    from_end = np.repeat(ends, np.diff(np.r_[-1, ends])) - np.arange(len(user))
    return targets[np.sort(order[from_end < number])]


def _declared(given: Any, dataset: str) -> Any:
    """Returns the declarations: given ones, those of a file, or those that are brought along for the dataset."""
    from recbole_cl.config import properties_dir, read_properties

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


def _headers(final: Any, folder: Path, dataset: str) -> dict[str, list[str]]:
    """Returns the columns of the user and the item file, where there are such files."""
    found = {}
    for suffix in ("user", "item"):
        file = folder / f"{dataset}.{suffix}"
        if file.is_file():
            with file.open(encoding=final.get("encoding") or "utf-8") as lines:
                header = lines.readline().rstrip("\r\n").split(final["field_separator"])
            found[suffix] = [column.partition(":")[0] for column in header]
    return found
