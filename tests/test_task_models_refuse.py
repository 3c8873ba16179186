"""What models and strategies of task streams refuse before anything is trained: backbones, choices, combinations."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.narm import NARM
from task_helpers import SETTINGS, write_task_log
from torch import nn

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.model import task_model
from recbole_cl.model.gru4rec import GRU4Rec
from recbole_cl.model.sasrec import SASRec
from recbole_cl.model.task_model import probing, why_no_inner_product
from recbole_cl.training.runner import Runner

BACKBONE = {
    "PCL": "pcl_backbone",
    "MultiTask": "multi_task_backbone",
    "MMOE": "mmoe_backbone",
    "SoftMask": "soft_mask_backbone",
}
SLICES = {"scheduler": "BaseThenIncrements", "n_stages": 3}
Start = Callable[..., Runner]


class Trained(Exception):
    """A model was asked for a loss: whatever was to be refused has got through."""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of four tasks: next item, next five-star item, genre of the next item, group of the user."""
    return write_task_log(tmp_path_factory.mktemp("log"), n_users=24)


@pytest.fixture
def start(log: Path, tmp_path: Path) -> Start:
    """Makes the runner of a walk."""
    numbers = iter(range(100))

    def start(model: str, strategy: Any = "FineTune", **changed: Any) -> Runner:
        given = {**SETTINGS, "n_stages": 3, "epochs": 1, "data_path": str(log), **changed}
        if given["scheduler"] != "TaskStream":
            given = {key: value for key, value in given.items() if not key.startswith("task")}
        given["output_dir"] = str(tmp_path / f"run{next(numbers)}")
        return Runner(CLConfig(model=model, dataset="tasks-log", config_dict={**given, "strategy": strategy}))

    return start


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks a walk off where it begins to train."""

    def trained(*_: Any) -> Any:
        raise Trained

    monkeypatch.setattr(task_model.TaskModel, "calculate_loss", trained)
    monkeypatch.setattr("recbole_cl.model.multi_task.MultiTask.calculate_loss", trained)
    monkeypatch.setattr("recbole_cl.model.pcl.PCL.calculate_loss", trained)


def refusal(start: Start, *args: Any, **changed: Any) -> str:
    """Returns the message with which a walk is refused before its first batch."""
    with pytest.raises(ConfigError) as told:
        start(*args, **changed).run()
    return str(told.value)


# -- backbones ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("model", BACKBONE)
@pytest.mark.parametrize(
    ("backbone", "why"),
    [
        ("HGN", "its forward takes (seq_item, user), not (item_seq, item_seq_len)"),
        ("Caser", "its forward takes (user, item_seq), not (item_seq, item_seq_len)"),
        ("CORE", "its forward takes (item_seq), not (item_seq, item_seq_len)"),
        ("SASRecF", "it reads the columns of selected_features, and the log has no 'class'"),
    ],
)
def test_a_backbone_that_does_not_fit_is_refused(start: Start, model: str, backbone: str, why: str) -> None:
    """The message names the property, the value, why, and what serves."""
    told = refusal(start, model, **{BACKBONE[model]: backbone})
    serving = "SASRec" if model == "SoftMask" else "SASRec, GRU4Rec, NARM or STAMP"
    assert told == f"{BACKBONE[model]}: {backbone} cannot be the backbone of {model}: {why}; use {serving}"


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("backbone", "settings", "why"),
    [
        ("NPE", {}, "its forward takes (seq_item, user)"),
        ("SHAN", {}, "its forward takes (seq_item, user)"),
        ("FPMC", {}, "its forward takes (user, item_seq, item_seq_len, next_item)"),
        ("RepeatNet", {}, "it has no item_embedding to build on"),
        ("FDSA", {}, "the log has no 'class'"),
        ("GRU4RecF", {}, "the log has no 'class'"),
        ("GRU4RecCPR", {}, "it cannot be made with loss_type: BPR and the columns of this log (SystemExit: 0)"),
        ("GRU4RecCPR", {"loss_type": "CE"}, "its forward gives (3, 8, 16) for 3 histories"),
        ("SASRecCPR", {"loss_type": "CE"}, "its forward gives a list for 3 histories"),
    ],
)
def test_other_backbones_that_do_not_fit(start: Start, backbone: str, settings: dict[str, Any], why: str) -> None:
    """Each by what is the first to tell that it does not: its arguments, its making, its output."""
    told = refusal(start, "MultiTask", multi_task_backbone=backbone, **settings)
    assert told.startswith(f"multi_task_backbone: {backbone} cannot be the backbone of MultiTask: ") and why in told


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("model", BACKBONE)
def test_a_backbone_that_scores_otherwise_is_refused(start: Start, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are right, its answers are not inner products with the table of items."""

    def scores(self: Any, batch: Interaction) -> torch.Tensor:
        return self.forward(batch[self.ITEM_SEQ], batch[self.ITEM_SEQ_LEN]) @ self.item_embedding.weight.relu().T

    monkeypatch.setattr(SASRec, "full_sort_predict", scores)
    told = refusal(start, model)
    assert told.startswith(f"{BACKBONE[model]}: SASRec cannot be the backbone of {model}: it does not score items by")


@pytest.mark.usefixtures("untrained")
def test_a_backbone_that_cannot_answer_is_refused(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it raises is told."""
    monkeypatch.setattr(SASRec, "full_sort_predict", lambda self, batch: batch["price"])
    assert "it cannot answer a history (KeyError: 'price')" in refusal(start, "MultiTask")


@pytest.mark.parametrize("backbone", ["SASRec", "GRU4Rec", "NARM", "STAMP", "SINE", "LightSANs", "SRGNN", "GCSAN"])
@pytest.mark.parametrize("loss", ["BPR", "CE"])
def test_backbones_that_fit_are_taken(start: Start, backbone: str, loss: str) -> None:
    """Their scores are inner products, whatever they are trained with."""
    with torch.autograd.set_detect_anomaly(False):  # RecBole's SINE switches it on
        runner = start("MultiTask", multi_task_backbone=backbone, loss_type=loss, n_stages=1)
        runner.run()
    assert type(runner.model.backbone).__name__ == backbone


@pytest.mark.parametrize("backbone", ["SINE", "LightSANs", "FDSA", "SASRecF", "GRU4RecF"])
def test_more_backbones_that_fit_pcl(start: Start, backbone: str) -> None:
    """They are prompted; those that read columns of items need them named."""
    with torch.autograd.set_detect_anomaly(False):
        runner = start("PCL", pcl_backbone=backbone, selected_features=["genre"], n_stages=2)
        runner.run()
    assert runner.model.prompts[0].grad is not None


class Scored(nn.Module):
    """A backbone that answers the mean of its items, with something of its own in its scores."""

    ITEM_SEQ, ITEM_SEQ_LEN, USER_ID, max_seq_length = "items", "lengths", "user", 5

    def __init__(self, extra: str | None) -> None:
        super().__init__()
        self.item_embedding, self.extra = nn.Embedding(7, 4, padding_idx=0), extra
        self.bias, self.dropout = nn.Parameter(torch.zeros(7)), nn.Dropout(0.5)
        self.dropout.eval()  # as a model may leave parts of itself
        self.asked: list[torch.Tensor] = []

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled() and not self.training
        self.asked += [item_seq, item_seq_len]
        return self.item_embedding(item_seq).sum(1) / item_seq_len.unsqueeze(1)

    def full_sort_predict(self, batch: Interaction) -> torch.Tensor:
        scores = self.forward(batch["items"], batch["lengths"]) @ self.item_embedding.weight.T
        if self.extra == "bias":
            return scores + self.bias
        if self.extra == "few":
            return scores[:, :-1]
        return scores if self.extra is None else scores * (1 + (2e-4 if self.extra == "scale" else 1e-6))


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        (None, None),
        ("rounding", None),
        ("scale", "inner product"),
        ("bias", "inner product"),
        ("few", "scores 5 items"),
    ],
)
@pytest.mark.parametrize("size", [1e-3, 1.0])
def test_the_probe_tells_scores_from_inner_products(extra: str | None, told: str | None, size: float) -> None:
    """Small scores are compared as sharply as large ones; a bias that starts as zero is seen; nothing stays behind."""
    torch.manual_seed(1)
    model = Scored(extra)
    model.item_embedding.weight.data.mul_(size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    why = why_no_inner_product(model, "cpu")
    assert (why is None) if told is None else (why is not None and told in why)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and not model.dropout.training
    sequence, lengths = model.asked[:2]
    assert lengths.tolist() == [5, 2, 1] and ((sequence > 0).sum(1) == lengths).all() and int(sequence.max()) <= 6


def test_the_probe_puts_back_what_it_filled() -> None:
    """Also where the model raises."""
    model = Scored(None)
    with pytest.raises(Trained), probing(model, "cpu"):
        assert not model.training and (model.bias != 0).all()
        raise Trained
    assert not model.bias.any() and model.training and not model.dropout.training


def test_the_probe_draws_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training has the bits that it has without it, also with a backbone that draws where it answers."""

    original = GRU4Rec.forward

    def noisy(self: Any, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        drawn.append((random.random(), np.random.rand(), torch.rand(1)))
        return original(self, item_seq, item_seq_len)

    drawn: list[Any] = []
    monkeypatch.setattr(GRU4Rec, "forward", noisy)
    tables = []
    for probe in (why_no_inner_product, lambda *_: None):
        monkeypatch.setattr(task_model, "why_no_inner_product", probe)
        runner = start("MultiTask", multi_task_backbone="GRU4Rec", n_stages=1)
        runner.run()
        tables.append(runner.model.backbone.item_embedding.weight.detach())
    assert drawn and torch.equal(*tables)


def test_a_later_argument_may_have_a_default(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """``forward`` may take more than the history if it need not be told."""
    original = NARM.forward

    def more(self: Any, item_seq: torch.Tensor, item_seq_len: torch.Tensor, twice: bool = False) -> torch.Tensor:
        return original(self, item_seq, item_seq_len)  # type: ignore[no-any-return]

    monkeypatch.setattr(NARM, "forward", more)
    start("MultiTask", multi_task_backbone="NARM", n_stages=1).run()
    del more.__defaults__
    assert "its forward takes (item_seq, item_seq_len, twice)" in refusal(
        start, "MultiTask", multi_task_backbone="NARM"
    )


# -- choices ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("model", BACKBONE)
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("task_pair_loss", "bce", "'bce' is none of BCE, BPR; did you mean 'BCE'?"),
        ("loss_type", "bpr", "'bpr' is none of BPR, CE; did you mean 'BPR'?"),
        ("{}_classifier", "deep", "'deep' is none of linear, mlp"),
        ("{}_next_item", "lin", "'lin' is none of none, linear, mlp; did you mean 'linear'?"),
    ],
)
def test_a_misspelt_choice_is_refused(start: Start, model: str, key: str, value: str, told: str) -> None:
    """The message names the property, the value and the choices."""
    key = key.format(BACKBONE[model].removesuffix("_backbone"))
    key = {"pcl_classifier": "pcl_adapter", "pcl_next_item": "pcl_item_adapter"}.get(key, key)
    assert refusal(start, model, **{key: value}).startswith(f"{key}: {told}")


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("pcl_context_scope", "al", "pcl_context_scope: 'al' is none of so_far, all"),
        ("pcl_prompted_items", 0, "pcl_prompted_items: 0 must be from 1 to"),
        ("pcl_init_std", -1.0, "pcl_init_std: -1.0"),
    ],
)
def test_what_pcl_cannot_read_is_refused(start: Start, key: str, value: Any, told: str) -> None:
    """Nothing is silently something else."""
    assert refusal(start, "PCL", **{key: value}).startswith(told)


# -- strategies ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize(
    ("model", "strategy", "instead"),
    [
        ("PCL", "CONURE", "FineTune"),
        ("PCL", "LwF", "FineTune"),
        ("PCL", "ERRandom", "FineTune"),
        ("PCL", "ERFreq", "FineTune"),
        ("PCL", "INFER", "FineTune"),
        ("MultiTask", "LwF", "TERACON"),
        ("MMOE", "LwF", "TERACON"),
        ("SoftMask", "LwF", "TERACON"),
        ("MultiTask", "ERRandom", "MTL"),
        ("MMOE", "INFER", "MTL"),
    ],
)
def test_a_strategy_that_cannot_serve_a_task_model_is_refused(
    start: Start, model: str, strategy: str, instead: str
) -> None:
    """The message names strategy, model and what serves instead."""
    told = refusal(start, model, strategy)
    assert (
        told.startswith(f"strategy: {strategy} cannot serve the model {model}") and instead in told.split("; use ")[1]
    )


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("strategy", ["CONURE", "LwF", "ERRandom", "INFER"])
def test_pcl_refuses_them_on_slices_of_time_too(start: Start, strategy: str) -> None:
    """There, too, it keeps what earlier slices trained."""
    told = refusal(start, "PCL", strategy, **SLICES)
    assert told.startswith(f"strategy: {strategy} cannot serve the model PCL") and "use FineTune" in told


@pytest.mark.parametrize("model", ["MultiTask", "MMOE", "SoftMask"])
def test_conure_serves_the_others(start: Start, model: str) -> None:
    """They begin every task with all their weights."""
    assert len(start(model, "CONURE").run()["matrix"]["primary"]) == 3


@pytest.mark.parametrize(("model", "strategy"), [("SASRec", "LwF"), ("MultiTask", "ERRandom")])
def test_what_serves_on_slices_of_time_is_not_refused(start: Start, model: str, strategy: str) -> None:
    """A model without tasks has a teacher; slices are all of one kind, so replay may join them."""
    assert len(start(model, strategy, **SLICES).run()["matrix"]["hit@5"]) == 3
