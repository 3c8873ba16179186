"""One causal pass over all positions gives the loss of RecBole's prefixes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from run_helpers import configure, toy

from recbole_cl.rng import ModelRandomness
from recbole_cl.stream.batch import TARGETS, Batcher, Windows
from recbole_cl.stream.build import build_stream
from recbole_cl.training.runner import Runner


@pytest.mark.parametrize("loss_type", ["CE", "BPR"])
@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_loss_equals_mean_of_prefix_losses(tmp_path: Path, model: str, loss_type: str) -> None:
    config = configure(toy(tmp_path), tmp_path / "run", model, loss_type=loss_type, MAX_ITEM_LIST_LENGTH=40)
    stream = build_stream(config)
    view = stream.view(2)
    stage = stream.stages[2]
    net = Runner(config).build_model(view, ModelRandomness(0)).eval()
    batcher = Batcher(config, stream, view, stage.n_users, stage.n_items)
    targets = stage.train
    supervised = np.zeros(len(stream.table) + 1, dtype=bool)
    supervised[targets.hi] = True
    windows = Windows(targets, supervised, 40, 40)
    rows = batcher.window_rows(windows, np.arange(len(windows)))
    assert int((rows[TARGETS] > 0).sum()) == len(targets)

    prefixes = batcher.rows(targets)
    if loss_type == "BPR":  # the same negative for the same target on both sides
        negative = prefixes["item_id"] % (stage.n_items - 1) + 1
        prefixes.interaction["neg_item_id"] = negative
        rows.interaction["neg_" + TARGETS] = torch.where(rows[TARGETS] > 0, rows[TARGETS] % (stage.n_items - 1) + 1, 0)
    ours = net.calculate_loss(rows)
    recbole = net.calculate_loss(prefixes)  # no all-position field: RecBole's own path
    assert len(prefixes) > 1 and not torch.equal(ours, torch.zeros_like(ours))
    torch.testing.assert_close(ours, recbole, rtol=1e-5, atol=1e-6)

    grad_ours = torch.autograd.grad(ours, net.item_embedding.weight)[0]
    grad_recbole = torch.autograd.grad(recbole, net.item_embedding.weight)[0]
    torch.testing.assert_close(grad_ours, grad_recbole, rtol=1e-4, atol=1e-6)


def test_per_sample_losses_average_to_the_loss(tmp_path: Path) -> None:
    config = configure(toy(tmp_path), tmp_path / "run", "SASRec")
    stream = build_stream(config)
    net = Runner(config).build_model(stream.view(0), ModelRandomness(0)).eval()
    stage = stream.stages[0]
    batcher = Batcher(config, stream, stream.view(0), stage.n_users, stage.n_items)
    rows = batcher.rows(stage.train)
    torch.testing.assert_close(net.per_sample_loss(rows).mean(), net.calculate_loss(rows), rtol=1e-5, atol=1e-6)
    items = torch.randint(1, stage.n_items, (len(rows), 7))
    torch.testing.assert_close(net.scores(rows, items), net.full_sort_predict(rows).gather(1, items))


def test_train_positions_last_is_recboles_path(tmp_path: Path) -> None:
    """``last`` gives a row a target to the loader, ``all`` a window a user, for as many targets."""
    from types import SimpleNamespace

    from recbole_cl.strategy.context import Pass
    from recbole_cl.stream.loader import make_loader

    log = toy(tmp_path)
    counts = {}
    for how in ("all", "last"):
        config = configure(log, tmp_path / how, "SASRec", train_positions=how, MAX_ITEM_LIST_LENGTH=4, window=4)
        stream = build_stream(config)
        stage, view = stream.stages[1], stream.view(1)
        net = Runner(config).build_model(view, ModelRandomness(0))
        batcher = Batcher(config, stream, view, stage.n_users, stage.n_items)
        ctx = SimpleNamespace(
            config=config, batcher=batcher, stage=stage, model=net, stream=stream, index=1, pass_=Pass()
        )
        loader = make_loader(ctx, stage.train, "x")
        seen = []
        for batch in loader:
            assert (TARGETS in batch) == (how == "all")
            seen += batch[TARGETS][batch[TARGETS] > 0].tolist() if how == "all" else batch["item_id"].tolist()
        counts[how] = sorted(seen)
        assert loader.n_targets == len(stage.train)
    assert counts["all"] == counts["last"] == sorted(stage.train.label.tolist())


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("model", ["SASRec", "GRU4Rec"])
def test_scores_without_gradients_are_recboles(tmp_path: Path, model: str, layers: int) -> None:
    config = configure(toy(tmp_path), tmp_path / "run", model, n_layers=layers, num_layers=layers)
    stream = build_stream(config)
    net = Runner(config).build_model(stream.view(2), ModelRandomness(1)).eval()
    stage = stream.stages[2]
    rows = Batcher(config, stream, stream.view(2), stage.n_users, stage.n_items).rows(stage.test)
    assert rows["item_length"].min() < rows["item_length"].max(), "histories of several lengths"
    slow = net.full_sort_predict(rows).detach()  # gradients on: RecBole's own pass
    with torch.no_grad():
        fast = net.full_sort_predict(rows)
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-6)
