"""The comparisons: each returns our side and the rival's as callables over the same data."""

from __future__ import annotations

import contextlib
import copy
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed
from side_by_side import peak_bytes, resident_growth

from recbole_cl import compat
from recbole_cl.config import CLConfig, get_model_class
from recbole_cl.evaluation.evaluator import Evaluator, Known
from recbole_cl.model import all_positions
from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.composite import Composite
from recbole_cl.stream.batch import Windows
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.stage import Targets
from recbole_cl.stream.table import InteractionTable
from recbole_cl.training.runner import Runner
from recbole_cl.training.stage_trainer import make_trainer

Side = Callable[[], Any]


def _on(device: str) -> dict[str, Any]:
    """Settings of both sides for a device, ``cpu`` or ``cuda``."""
    return {"use_gpu": device != "cpu", "gpu_id": "0" if device != "cpu" else ""}


def context(config: CLConfig, index: int = 0) -> tuple[Runner, Any]:
    runner = Runner(config)
    runner.begin(build_stream(config))
    view = runner.stream.view(index)
    ctx = runner.state.models.context(index, runner.build_model(view, ModelRandomness(config["seed"])), view)
    return runner, ctx


def recbole_side(model: str, folder: str, dataset: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """RecBole's configuration and dataset, as RecBole makes them."""
    given = {"data_path": folder, "state": "ERROR", "show_progress": False, "use_gpu": False, **settings}
    argv, sys.argv = sys.argv, sys.argv[:1]  # its Config reads the command line
    try:
        config = Config(model=model, dataset=dataset, config_dict=given)
    finally:
        sys.argv = argv
    if folder != "unused":  # it looks for ml-100k in its own wheel
        config["data_path"] = str(Path(folder) / dataset)
    init_seed(config["seed"], True)
    return config, create_dataset(config)


def augmentation(dataset: str = "online-retail", stages: int = 10) -> tuple[Side, Side]:
    """Ten stages of sequences: an index of windows against RecBole's dense augmentation, from the loaded log on."""
    config = CLConfig("SASRec", dataset, config_dict={"n_stages": stages, "show_progress": False})
    stream = build_stream(config)

    def ours() -> int:
        t = stream.table
        table = InteractionTable(t.user, t.item, t.timestamp, t.stage, t.n_users, t.n_items)
        targets = [Targets.next_items(table, s.train.position) for s in stream.stages]
        return sum(len(t) for t in targets)

    settings = {
        "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": 50,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "repeatable": True,
    }
    _, loaded = recbole_side("SASRec", str(Path(config["data_path"]).parent), dataset, settings)

    def theirs() -> int:
        whole = copy.copy(loaded)
        whole.field2type, whole.field2source = dict(loaded.field2type), dict(loaded.field2source)
        whole.field2seqlen = dict(loaded.field2seqlen)
        whole._change_feat_format()  # converts and augments
        return len(whole.inter_feat)

    return ours, theirs


class _Part:
    """The first batches of a loader."""

    def __init__(self, loader: Any, number: int) -> None:
        self.loader, self.number = loader, number

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Any:
        return itertools.islice(self.loader, self.number)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def epoch_of_all_positions(
    length: int = 50, device: str = "cpu", batches: int | None = None
) -> tuple[Side, Side, int, float]:
    """One SASRec epoch over the same ml-100k targets: all positions of windows against RecBole's loader and trainer.

    Args:
        length: Inputs of a history at most.
        device: ``cpu`` or ``cuda``.
        batches: Only so many batches of RecBole's, which are all of one size and cost.

    Returns:
        Our side, RecBole's, how many targets more ours has, and what RecBole's time is to be multiplied by.
    """
    config = CLConfig(
        "SASRec",
        "ml-100k",
        config_dict={
            "n_stages": 1, "stage_split": "leave_one_out", "MAX_ITEM_LIST_LENGTH": length, "show_progress": False,
            **_on(device),
        },
    )  # fmt: skip
    _, ctx = context(config)
    loader = make_loader(ctx, ctx.stage.train, "benchmark")
    ctx.loader = loader
    trainer = make_trainer(ctx, Composite([]), config["learning_rate"])

    settings = {
        "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": length,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "repeatable": True,
        "normalize_all": False,
        **_on(device),
    }
    recbole, dataset = recbole_side("SASRec", "unused", "ml-100k", settings)
    train, _, _ = data_preparation(recbole, dataset)
    model = RecBoleSASRec(recbole, train.dataset).to(recbole["device"])
    compat.anomaly_mode_off()
    with tempfile.TemporaryDirectory() as folder, compat.without_side_effects():
        recbole["checkpoint_dir"] = folder
        rival = Trainer(recbole, model)
    some = train if batches is None else _Part(train, batches)
    return (
        lambda: trainer._train_epoch(loader, 0),
        lambda: rival._train_epoch(some, 0),
        loader.n_targets - len(train.dataset),
        len(train) / len(some),
    )


class _Used:
    """What RecBole's loader asks of a sampler: the items of each user that are not recommended again."""

    def __init__(self, n_users: int) -> None:
        self.used_ids = np.empty(n_users, dtype=object)
        for user in range(n_users):
            self.used_ids[user] = set()


def _recbole_loader(recbole: Any, evaluator: Evaluator, ctx: Any, stage: Any) -> FullSortEvalDataLoader:
    """RecBole's loader over a stage's own test targets, histories and earlier items."""
    rows = evaluator._rows_of(stage, "test")
    batch = ctx.batcher.rows(stage.test, evaluation=True).interaction
    data = copy.copy(ctx.view)
    data.inter_feat = Interaction({name: column for name, column in batch.items() if not name.startswith("_")})
    used = _Used(data.user_num)
    for row, item in (
        *zip(rows.row, rows.item, strict=True), *zip(rows.mask_row, rows.mask_item, strict=True)
    ):  # fmt: skip
        used.used_ids[rows.targets.user[row]].add(int(item))
    return FullSortEvalDataLoader(recbole, data, used)


def matrix_of_five(model: str = "SASRec", device: str = "cpu") -> tuple[Side, Side, float]:
    """A 5 x 5 matrix of ml-100k against 25 calls of RecBole's ``evaluate`` at its default batch.

    Both sides score the same weights (trained for a little) on the same test targets with the same histories, earlier
    items and candidates.

    Returns:
        Our side, RecBole's side, and the largest difference of a metric on a stage.
    """
    settings: dict[str, Any] = {"n_stages": 5, "vocabulary": "global", "candidates": "all", "show_progress": False}
    config = CLConfig(model, "ml-100k", config_dict=settings | _on(device))
    runner, ctx = context(config, 4)
    ctx.loader = make_loader(ctx, ctx.stream.trained_targets(4, "so_far"), "benchmark")
    trainer = make_trainer(ctx, Composite([]), config["learning_rate"])
    for epoch in range(1 if model == "SASRec" else 5):
        trainer._train_epoch(ctx.loader, epoch)
    known = Known.everything(runner.stream.table, ctx.batcher.n_users, ctx.batcher.n_items)
    evaluator = Evaluator(config, runner.stream, Composite([]))

    def ours(times: int = 5) -> list[dict[str, float]]:
        for _ in range(times):
            found = [evaluator.evaluate(ctx, known, stage).metrics for stage in runner.stream.stages]
        return found

    theirs_too: dict[str, Any] = {"metric_decimal_place": 12, "MAX_ITEM_LIST_LENGTH": 50, "normalize_all": False}
    if model == "SASRec":
        theirs_too |= {"train_neg_sample_args": None, "repeatable": True}
    recbole, _ = recbole_side(model, "unused", "ml-100k", theirs_too | _on(device))
    own = get_model_class(model)
    kind = next(c for c in own.__mro__ if c.__module__.startswith("recbole.model."))
    net = kind(recbole, ctx.view).to(recbole["device"])
    net.load_state_dict(ctx.model.state_dict())
    with tempfile.TemporaryDirectory() as folder, compat.without_side_effects():
        recbole["checkpoint_dir"] = folder
        rival = Trainer(recbole, net)
    loaders = [_recbole_loader(recbole, evaluator, ctx, stage) for stage in runner.stream.stages]

    def theirs(times: int = 5) -> list[dict[str, float]]:
        for _ in range(times):
            found = [dict(rival.evaluate(loader, load_best_model=False)) for loader in loaders]
        return found

    gap = max(abs(a[name] - b[name]) for a, b in zip(ours(1), theirs(1), strict=True) for name in b)
    return ours, theirs, gap


def finetune_epoch(model: str, device: str = "cpu") -> tuple[Side, Side]:
    """A FineTune epoch through our trainer against RecBole's bare ``_train_epoch`` over the same batches."""
    config = CLConfig(model, "ml-100k", config_dict={"n_stages": 5, "show_progress": False, **_on(device)})
    _, ctx = context(config)
    ctx.loader = loader = make_loader(ctx, ctx.stage.train, "benchmark")
    ours = make_trainer(ctx, Composite([]), config["learning_rate"])
    with compat.without_side_effects():
        bare = Trainer(config, ctx.model)
    return lambda: ours._train_epoch(loader, 0), lambda: bare._train_epoch(loader, 0)


def growth_of_augmentation(side: str, dataset: str = "online-retail") -> int:
    """Bytes by which the resident set grows while one side (``ours``, ``RecBole``) makes its sequences."""
    ours, theirs = augmentation(dataset)
    return resident_growth(ours if side == "ours" else theirs)


def memory_of_windows(millions: int, dataset: str = "ml-100k") -> tuple[int, int]:
    """Peak bytes of a table and its windows over a log repeated with shifted users, and its rows."""
    config = CLConfig("SASRec", dataset, config_dict={"n_stages": 1, "show_progress": False})
    log = build_stream(config).table
    times = -(-millions * 1_000_000 // len(log))
    rows = millions * 1_000_000
    user = (log.user + (np.arange(times) * log.n_users)[:, None]).ravel()[:rows]
    item = np.tile(log.item, times)[:rows]
    zero = np.zeros(rows, dtype=np.int64)

    def work() -> Windows:
        table = InteractionTable(user, item, zero, zero, times * log.n_users, log.n_items)
        targets = Targets.next_items(table, np.arange(rows))
        targets = targets[targets.hi > targets.lo]
        supervised = np.zeros(rows + 1, dtype=bool)
        supervised[targets.hi] = True
        return Windows(targets, supervised, 50, 50)

    return peak_bytes(work), rows


def views_of_five_stages(times: int, folder: str, dataset: str = "online-retail") -> tuple[Side, Side, int]:
    """The views of five stages of a log repeated with shifted users: flags of positions against sorting them.

    Args:
        times: How often the log is repeated.
        folder: Where the repeated log is written.
        dataset: The log.

    Returns:
        Our side, ourselves with ``np.unique`` in its place, and the number of interactions.
    """
    load = {"inter": ["user_id", "item_id", "timestamp"]}
    given: dict[str, Any] = {"n_stages": 5, "show_progress": False, "load_col": load}
    config = CLConfig("BPR", dataset, config_dict=given)
    log = pd.read_csv(Path(config["data_path"]) / f"{dataset}.inter", sep="\t", dtype=str)
    log = log[[column for column in log if column.partition(":")[0] in load["inter"]]]
    user = next(column for column in log if column.startswith("user_id:"))
    repeated = pd.concat([log.assign(**{user: f"{number}-" + log[user]}) for number in range(times)])
    (Path(folder) / "repeated").mkdir()
    repeated.to_csv(Path(folder) / "repeated" / "repeated.inter", sep="\t", index=False)
    stream = build_stream(CLConfig("BPR", "repeated", config_dict={**given, "data_path": folder}))

    class Sorted(type(stream)):  # type: ignore[misc]
        def graph_positions(self, stage: int, graph: str = "all") -> np.ndarray:
            return np.unique(np.concatenate([s.train.position for s in self.stages[: stage + 1]]))

    rival = Sorted(stream.table, stream.stages, stream.dataset, stream.scheduler)

    def views(of: Any) -> None:
        for index in range(len(of)):
            of.view(index)

    return lambda: views(stream), lambda: views(rival), len(stream.table)


RECBOLES_START = """
from recbole_cl import compat  # the shims alone: without them RecBole's Config does not start on today's numpy
compat.apply()
import sys
sys.argv = sys.argv[:1]
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_model, get_trainer
config = Config(model="BPR", dataset="ml-100k", config_dict={"use_gpu": False})
get_model(config["model"])
"""
OUR_START = """
from recbole_cl import run_recbole_cl
from recbole_cl.config import CLConfig
from recbole_cl.training.runner import Runner
Runner(CLConfig("BPR", "ml-100k"))
"""


def shares_of_a_stage(model: str = "SASRec", dataset: str = "ml-100k", epochs: int = 5) -> dict[str, float]:
    """Shares of CPU time of a run of five stages with checkpoints after each epoch, and of its last stage's resume.

    Returns:
        CPU seconds of the run's stages by what they were spent on, and ``resume``: what a killed run does before it
        goes on training, the loading of the log apart.
    """
    from recbole_cl.training import runner as module

    spent: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            begun = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - begun

        return wrapped

    class Killed(Exception):
        pass

    class Timed(Runner):
        stop_at: int | None = None

        def __init__(self, config: CLConfig) -> None:
            super().__init__(config)
            for part, name in (
                ("_save", "checkpoint"), ("_evaluate_all", "evaluation"), ("_enter", "enter"), ("_load", "resume"),
                ("_stage", "stage"),
            ):  # fmt: skip
                setattr(self, part, timed(name, getattr(self, part)))

        def begin(self, stream: Any) -> Any:
            state = super().begin(stream)
            state.journal.listeners.append(self._stop)
            return state

        def _stop(self, point: dict[str, Any]) -> None:
            if self.stop_at is not None and point["stage"] == len(self.stream) - 1 and point["epoch"] >= self.stop_at:
                raise Killed

    grow = module.grow_model
    module.grow_model = timed("growth", grow)
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "n_stages": 5, "epochs": epochs, "stopping_step": epochs, "show_progress": False,
                "output_dir": str(Path(folder) / "run"), "state": "ERROR",
            }  # fmt: skip
            Timed(CLConfig(model, dataset, config_dict=settings)).run()
            first = dict(spent)
            settings["output_dir"] = str(Path(folder) / "killed")
            killed = Timed(CLConfig(model, dataset, config_dict=settings))
            killed.stop_at = epochs - 2
            with contextlib.suppress(Killed):
                killed.run()
            spent.clear()
            resumed = Timed(CLConfig(model, dataset, config_dict=settings | {"resume": True}))
            resumed.run()
    finally:
        module.grow_model = grow
    return {**first, "resume": spent["resume"] + spent["enter"]}


def epoch_of_short_sequences(dataset: str = "diginetica-weeks", batches: int = 6) -> tuple[Side, Side, float]:
    """Steps of SASRec over a log of short sequences: rows of similar length in a pass against one padded pass.

    Returns:
        Both sides, and the share of the padded inputs that are items.
    """
    config = CLConfig("SASRec", dataset, config_dict={"n_stages": 4, "show_progress": False})
    _, ctx = context(config)
    ctx.loader = loader = make_loader(ctx, ctx.stage.train, "benchmark")
    trainer = make_trainer(ctx, Composite([]), config["learning_rate"])
    some = [batch for _, batch in zip(range(batches), loader, strict=False)]
    items = [batch[ctx.batcher.iid + ctx.batcher.suffix] > 0 for batch in some]

    class Fixed:
        def __iter__(self) -> Any:
            return iter(some)

        def __getattr__(self, name: str) -> Any:
            return getattr(loader, name)

    def run(overhead: int) -> None:
        before = all_positions.PASS_OVERHEAD
        all_positions.PASS_OVERHEAD = {**before, True: overhead}
        try:
            trainer._train_epoch(Fixed(), 0)
        finally:
            all_positions.PASS_OVERHEAD = before

    fill = sum(int(i.sum()) for i in items) / sum(i.numel() for i in items)
    return lambda: run(all_positions.PASS_OVERHEAD[True]), lambda: run(1 << 40), fill


def steps_compiled(length: int = 50, batches: int = 20, device: str = "cpu") -> tuple[Side, Side]:
    """Steps of SASRec on all positions of ml-100k as they are, and with ``torch.compile`` around the transformer."""
    settings = {"n_stages": 1, "MAX_ITEM_LIST_LENGTH": length, "show_progress": False, **_on(device)}
    _, ctx = context(CLConfig("SASRec", "ml-100k", config_dict=settings))
    model = ctx.model.train()
    loader = make_loader(ctx, ctx.stage.train, "benchmark")
    some = [batch.to(ctx.device) for batch in itertools.islice(loader, batches)]
    compiled = torch.compile(model.encode, dynamic=True)

    def steps() -> None:
        for batch in some:
            model.calculate_loss(batch).backward()
            model.zero_grad()

    def other() -> None:
        model.encode = compiled
        try:
            steps()
        finally:
            del model.encode

    other()  # compiles
    return steps, other


torch.set_num_threads(1)
