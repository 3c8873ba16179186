"""What the conformance tests share: a small growing log, a walk over it, and a walk that is killed and resumed."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_cl import checkpoint, registry
from recbole_cl.config import CLConfig
from recbole_cl.model.state import owned_state
from recbole_cl.training.runner import Runner
from recbole_cl.tree import tree_hash

START = 1_600_000_001
"""First timestamp: beyond 2**24, where RecBole's float32 columns round to 128 seconds."""

SMALL: dict[str, Any] = {
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    "n_stages": 3,
    "MAX_ITEM_LIST_LENGTH": 8,
    "train_batch_size": 64,
    "eval_batch_size": 256,
    "learning_rate": 0.02,
    "epochs": 2,
    "metrics": ["Hit", "NDCG"],
    "valid_metric": "NDCG@5",
    "topk": [5],
    "checkpoint_steps": 2,
    "show_progress": False,
    "seed": 11,
}

RESULT_KEYS = {
    "name", "config", "versions", "seed", "output_dir", "primary_metric", "stages", "matrix", "summary", "formulas",
    "reasons", "reference", "curves", "steps_to_95", "strata", "disparity", "cold", "cost", "warnings",
}  # fmt: skip


# -- data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Log:
    """A written log: interactions (user, item, timestamp) in time order, and each user's group."""

    folder: Path
    name: str
    rows: list[tuple[str, str, int]]
    groups: dict[str, str]


def write_log(
    folder: Path, n_users: int = 40, n_items: int = 45, n_groups: int = 3, steps: int = 900, seed: int = 3
) -> Log:
    """Writes ``log.inter`` and ``log.user``: users keep to the items of their group; both appear little by little."""
    rng = np.random.default_rng(seed)
    rows: list[tuple[str, str, int]] = []
    for step in range(steps):
        share = 0.4 + 0.6 * step / (steps - 1)
        user = int(rng.integers(0, n_users * share))
        group = user % n_groups
        choices = np.arange(group, max(int(n_items * share), n_groups), n_groups)
        rows.append((f"u{user}", f"i{rng.choice(choices)}", START + 7 * step))
    groups = {user: f"g{int(user[1:]) % n_groups}" for user, _, _ in rows}
    target = folder / "log"
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "log.inter", ["user_id:token", "item_id:token", "timestamp:float"], rows)
    write_atomic(target / "log.user", ["user_id:token", "group:token"], list(groups.items()))
    return Log(folder, "log", rows, groups)


def write_atomic(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Writes one of RecBole's atomic files."""
    lines = ["\t".join(header), *("\t".join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# -- walks --------------------------------------------------------------------------------------------------------


@dataclass
class Fuse:
    """Counts the training steps of this process; where a limit is set, the process dies at it.

    A model calls :meth:`tick` in each training step. SIGKILL leaves no time to tidy up: what is not on the disk by
    then is gone, as with a power cut or the kernel's out-of-memory killer.
    """

    limit: int | None = None
    ticks: int = 0

    def tick(self) -> None:
        """Counts one step."""
        self.ticks += 1
        if self.limit is not None and self.ticks >= self.limit:
            os.kill(os.getpid(), signal.SIGKILL)


FUSE = Fuse()


@dataclass
class Walk:
    """A finished walk.

    Attributes:
        runner: Its runner.
        result: What it returned.
        ticks: Training steps that it took.
    """

    runner: Runner
    result: dict[str, Any]
    ticks: int


@dataclass(frozen=True)
class Job:
    """A model over the log, to be walked into one or several folders.

    Args:
        model: The model's class; it must be importable, for the walk that is killed runs in another process.
        data: Folder of the log.
        settings: Properties; ``{folder}`` in a text stands for the walk's folder.
        components: Strategies and schedulers of the test, by the name of their registry. They are registered while a
            walk runs and not after: other tests ask what the package registers.
    """

    model: type
    data: Path
    settings: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, type] = field(default_factory=dict)

    @contextlib.contextmanager
    def registered(self) -> Iterator[None]:
        """A context in which the test's components answer to their names."""
        for kind, component in self.components.items():
            getattr(registry, kind).register()(component)
        try:
            yield
        finally:
            for kind, component in self.components.items():
                members = getattr(registry, kind)
                for table in (members._members, members._names):
                    table.pop(component.__name__.lower())

    def config(self, folder: Path, **changed: Any) -> CLConfig:
        """Returns the configuration of a walk."""
        given = {**SMALL, **self.settings, "data_path": str(self.data), "output_dir": "{folder}/run", **changed}
        given = {k: v.replace("{folder}", str(folder)) if isinstance(v, str) else v for k, v in given.items()}
        config = CLConfig(model=self.model, dataset="log", config_dict=given)
        config["saved"] = True
        return config

    def walk(self, folder: Path, **changed: Any) -> Walk:
        """Walks to the end."""
        before = FUSE.ticks
        with self.registered():
            runner = Runner(self.config(folder, **changed))
            result = runner.run()
        return Walk(runner, result, FUSE.ticks - before)

    def killed(self, folder: Path, step: int) -> dict[str, Any]:
        """Walks in a process of its own that dies by SIGKILL at a training step; returns its newest checkpoint."""
        # A server that has imported torch once forks the children; its own process never runs anything else.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["recbole_cl.training.runner", "recbole_cl.config"])
        process = context.Process(target=_walk_until, args=(self, folder, step))
        process.start()
        process.join(timeout=120)
        assert process.exitcode == -signal.SIGKILL, f"the walk ended with {process.exitcode} instead of being killed"
        assert not (folder / "run" / "result.json").exists()
        state, _, _ = checkpoint.newest(folder / "run" / "checkpoints")
        assert state is not None
        return state


def _walk_until(job: Job, folder: Path, step: int) -> None:
    FUSE.limit, FUSE.ticks = step, 0
    job.walk(folder)


def assert_same_walk(whole: Walk, again: Walk) -> None:
    """Asserts that two walks gave the same matrix, curves, parameters and states, bit for bit."""
    assert again.result["matrix"] == whole.result["matrix"]
    assert again.result["reference"] == whole.result["reference"]
    assert again.result["strata"] == whole.result["strata"]
    assert again.result["cold"] == whole.result["cold"]
    timeless = [[{k: v for k, v in c.items() if k != "seconds"} for c in w.result["curves"]] for w in (whole, again)]
    assert timeless[0] == timeless[1]
    one, two = owned_state(whole.runner.model)["tensors"], owned_state(again.runner.model)["tensors"]
    assert one.keys() == two.keys()
    differing = [name for name in one if tree_hash(one[name]) != tree_hash(two[name])]
    assert not differing, f"{differing} differ after the resumption"
    assert tree_hash(owned_state(whole.runner.model)) == tree_hash(owned_state(again.runner.model))
    assert tree_hash(whole.runner.strategy.state_dict()) == tree_hash(again.runner.strategy.state_dict())


def assert_resumes(job: Job, folder: Path, whole: Walk, step: int, stage: int) -> Walk:
    """Kills a walk at a training step, inside a stage, resumes it, and compares it with the uninterrupted one."""
    state = job.killed(folder, step)
    assert (state["phase"], state["stage"]) == ("train", stage), "the kill was meant to fall inside another stage"
    again = job.walk(folder, resume=True)
    assert 0 < again.ticks < whole.ticks, "the resumed walk began anew"
    assert_same_walk(whole, again)
    return again


def assert_reported(walk: Walk) -> str:
    """Asserts that result.json and report.html tell the walk; returns the page."""
    folder = walk.runner.folder
    told = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert told.keys() >= RESULT_KEYS
    assert told["matrix"] == walk.result["matrix"]
    assert len(told["stages"]) == len(told["cost"]) == len(walk.runner.stream)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert walk.runner.config["model"] in page
    assert all(stage["name"] in page for stage in told["stages"])
    return page


def matrix(walk: Walk, metric: str) -> np.ndarray:
    """Returns R[t, s] with NaN for null."""
    rows = walk.result["matrix"][metric]
    return np.array([[np.nan if value is None else value for value in row] for row in rows])


def assert_grows(walk: Walk) -> None:
    """Asserts that users and items appear from stage to stage, and that the last model has rows for those known."""
    stages = walk.runner.stream.stages
    assert all(a.n_items < b.n_items for a, b in pairwise(stages))
    assert all(a.n_users <= b.n_users for a, b in pairwise(stages))
    assert stages[0].n_users < stages[-1].n_users
    tables = [t for name, t in walk.runner.model.state_dict().items() if "item_embedding" in name]
    assert tables and all(len(table) == stages[-1].n_items for table in tables)


def undecided(scores: torch.Tensor, k: int) -> bool:
    """Tells whether a row's first k places hang on rounding: then two ways to its scores may order them otherwise.

    A row by itself and the same row in a batch are such ways; kernels need not round alike for both shapes.

    Args:
        scores: Scores of the row, shape ``[n]``.
        k: Places that are looked at.
    """
    best = scores[torch.isfinite(scores)].sort(descending=True).values[: k + 1]
    return bool((best[:-1] - best[1:] <= 2e-6 * best.abs().max()).any()) if len(best) else False


def checkpoints(walk: Walk) -> list[Path]:
    """Returns the checkpoint folders that a walk kept, oldest first."""
    return checkpoint.numbered(walk.runner.folder / "checkpoints")
