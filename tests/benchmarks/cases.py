"""The comparisons: each returns our side and the rival's as callables over the same data."""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.utils import init_seed
from side_by_side import peak_bytes

from recbole_cl import compat
from recbole_cl.config import CLConfig, get_model_class
from recbole_cl.evaluator import Evaluator, Known
from recbole_cl.rng import ModelRandomness
from recbole_cl.runner import Runner
from recbole_cl.strategy.base import Composite
from recbole_cl.stream.batch import Windows
from recbole_cl.stream.build import build_stream
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.stage import Targets
from recbole_cl.stream.table import InteractionTable
from recbole_cl.trainer import make_trainer

Side = Callable[[], Any]


def _context(config: CLConfig, index: int = 0) -> tuple[Runner, Any]:
    runner = Runner(config)
    runner.stream = build_stream(config)
    view = runner.stream.view(index)
    ctx = runner._context(index, runner.build_model(view, ModelRandomness(config["seed"])), view)
    return runner, ctx


def _recbole(model: str, folder: str, dataset: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """RecBole's configuration and dataset, as RecBole makes them."""
    given = {"data_path": folder, "use_gpu": False, "state": "ERROR", "show_progress": False, **settings}
    argv, sys.argv = sys.argv, sys.argv[:1]  # its Config reads the command line
    try:
        config = Config(model=model, dataset=dataset, config_dict=given)
    finally:
        sys.argv = argv
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
    _, loaded = _recbole("SASRec", str(Path(config["data_path"]).parent), dataset, settings)

    def theirs() -> int:
        whole = copy.copy(loaded)
        whole.field2type, whole.field2source = dict(loaded.field2type), dict(loaded.field2source)
        whole.field2seqlen = dict(loaded.field2seqlen)
        whole._change_feat_format()  # converts and augments
        return len(whole.inter_feat)

    return ours, theirs


def epoch_of_all_positions(length: int = 50) -> tuple[Side, Side, int]:
    """One SASRec epoch over the same ml-100k targets: all positions of windows against RecBole's loader and trainer."""
    config = CLConfig(
        "SASRec",
        "ml-100k",
        config_dict={
            "n_stages": 1, "stage_split": "leave_one_out", "MAX_ITEM_LIST_LENGTH": length, "show_progress": False,
        },
    )  # fmt: skip
    _, ctx = _context(config)
    loader = make_loader(ctx, ctx.stage.train, "benchmark")
    ctx.loader = loader
    trainer = make_trainer(ctx, Composite([]), config["learning_rate"])

    settings = {
        "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": length,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
        "repeatable": True,
        "normalize_all": False,
    }
    recbole, dataset = _recbole("SASRec", "unused", "ml-100k", settings)
    train, _, _ = data_preparation(recbole, dataset)
    model = get_model_class("SASRec").__mro__[2](recbole, train.dataset)
    compat.anomaly_mode_off()
    with tempfile.TemporaryDirectory() as folder, compat.without_side_effects():
        recbole["checkpoint_dir"] = folder
        rival = Trainer(recbole, model)
    assert type(model).__module__.startswith("recbole.")
    return (
        lambda: trainer._train_epoch(loader, 0),
        lambda: rival._train_epoch(train, 0),
        loader.n_targets - len(train.dataset),
    )


def matrix_of_five(model: str = "SASRec") -> tuple[Side, Side]:
    """A 5 x 5 matrix of ml-100k against 25 calls of RecBole's ``evaluate`` at its default batch, same targets.

    RecBole's side evaluates its own test loader of as many targets as a stage has, so both score the same number.
    """
    config = CLConfig(model, "ml-100k", config_dict={"n_stages": 5, "show_progress": False})
    runner, ctx = _context(config, 4)
    known = Known.everything(runner.stream.table, ctx.batcher.n_users, ctx.batcher.n_items)
    evaluator = Evaluator(config, runner.stream, Composite([]))

    def ours() -> None:
        for _ in range(5):
            for stage in runner.stream.stages:
                evaluator.evaluate(ctx, known, stage)

    settings: dict[str, Any] = {
        "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": 50,
        "eval_args": {"split": {"RS": [0.96, 0.02, 0.02]}, "order": "TO", "group_by": None, "mode": "full"},
        "repeatable": True,
        "normalize_all": False,
    }
    if model != "SASRec":
        settings |= {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}, "repeatable": False}
    recbole, dataset = _recbole(model, "unused", "ml-100k", settings)
    train, _, test = data_preparation(recbole, dataset)
    recbole_class = get_model_class(model)
    net = (recbole_class.__mro__[2] if model == "SASRec" else recbole_class)(recbole, train.dataset)
    with tempfile.TemporaryDirectory() as folder, compat.without_side_effects():
        recbole["checkpoint_dir"] = folder
        rival = Trainer(recbole, net)
    rival.eval_collector.data_collect(train)

    def theirs() -> None:
        for _ in range(25):
            rival.evaluate(test, load_best_model=False)

    return ours, theirs


def finetune_epoch(model: str) -> tuple[Side, Side]:
    """A FineTune epoch through our trainer against RecBole's bare ``_train_epoch`` over the same batches."""
    config = CLConfig(model, "ml-100k", config_dict={"n_stages": 5, "show_progress": False})
    _, ctx = _context(config)
    ctx.loader = loader = make_loader(ctx, ctx.stage.train, "benchmark")
    ours = make_trainer(ctx, Composite([]), config["learning_rate"])
    with compat.without_side_effects():
        bare = Trainer(config, ctx.model)
    return lambda: ours._train_epoch(loader, 0), lambda: bare._train_epoch(loader, 0)


def memory_of_windows(millions: int = 10) -> tuple[float, int]:
    """Peak megabytes of a table and its windows over a log repeated with shifted users, and its rows."""
    rows = millions * 1_000_000
    rng = np.random.default_rng(0)
    user = rng.integers(1, rows // 50, rows)
    item = rng.integers(1, 50_000, rows)
    zero = np.zeros(rows, dtype=np.int64)

    def work() -> int:
        table = InteractionTable(user, item, zero, zero, rows // 50, 50_000)
        targets = Targets.next_items(table, np.arange(rows))
        targets = targets[targets.hi > targets.lo]
        supervised = np.zeros(rows + 1, dtype=bool)
        supervised[targets.hi] = True
        return len(Windows(targets, supervised, 50, 50))

    return peak_bytes(work) / 1e6, rows


torch.set_num_threads(1)
