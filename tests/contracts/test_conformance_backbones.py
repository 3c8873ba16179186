"""A wrapper around any backbone is of the backbone's type: one that adds zero gives exactly the backbone's figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from conformance_helpers import Job, Log, write_atomic, write_log
from recbole.model.abstract_recommender import AbstractRecommender, SequentialRecommender
from recbole.utils import EvaluatorType, InputType, ModelType

from recbole_cl.config import CLConfig, get_model_class
from recbole_cl.errors import ConfigError
from recbole_cl.model.contract import ContinualModel


class PlusZero(ContinualModel, AbstractRecommender):
    """The scores of the model inside, and zero."""

    backbone_property = "plus_zero_backbone"
    backbone_types = frozenset({ModelType.GENERAL, ModelType.SEQUENTIAL, ModelType.CONTEXT})
    type_of_backbone = True
    defaults: ClassVar[dict[str, Any]] = {"plus_zero_backbone": "BPR"}

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__()
        kind: Any = get_model_class(config["plus_zero_backbone"])
        self.backbone = kind(config, dataset)
        self.trains_all_positions = getattr(self.backbone, "trains_all_positions", False)

    def calculate_loss(self, interaction: Any) -> Any:
        return self.backbone.calculate_loss(interaction)

    def predict(self, interaction: Any) -> torch.Tensor:
        return self.backbone.predict(interaction) + 0.0


class PlusZeroForAll(PlusZero):
    """The same for backbones that score all items at once."""

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        return self.backbone.full_sort_predict(interaction) + 0.0


class OtherType(PlusZeroForAll):
    """The same over a class that has a type of its own, which gives way."""

    type = ModelType.SEQUENTIAL
    input_type = InputType.LISTWISE


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """A log with labels, groups of users and colours of items."""
    made = write_log(tmp_path_factory.mktemp("data"))
    rows = [(user, item, time, int(item[1:]) * int(user[1:]) % 3 > 0) for user, item, time in made.rows]
    header = ["user_id:token", "item_id:token", "timestamp:float", "label:float"]
    write_atomic(made.folder / "log" / "log.inter", header, [(u, i, t, float(y)) for u, i, t, y in rows])
    items = sorted({item for _, item, _ in made.rows})
    write_atomic(
        made.folder / "log" / "log.item", ["item_id:token", "colour:token"], [(i, f"c{int(i[1:]) % 4}") for i in items]
    )
    return made


LABELLED = {
    "load_col": {
        "inter": ["user_id", "item_id", "timestamp", "label"], "user": ["user_id", "group"],
        "item": ["item_id", "colour"],
    },
    "metrics": ["AUC", "LogLoss"], "valid_metric": "AUC", "topk": [5],
}  # fmt: skip

RUNS = {
    "BPR": {},
    "SASRec": {},
    "SASRec, last positions": {"train_positions": "last"},
    "GRU4Rec with negatives": {"loss_type": "BPR"},
    "DeepFM": LABELLED,
    "DeepFM, ranked": {},
    "DIN": {**LABELLED, "load_col": {**LABELLED["load_col"], "user": []}},
}


WRAPPED = [
    *((PlusZero if run.startswith("D") else PlusZeroForAll, run) for run in RUNS), (OtherType, "BPR"),
    (OtherType, "SASRec"),
]  # fmt: skip


@pytest.mark.parametrize(("wrapper", "run"), WRAPPED)
def test_adding_zero_changes_no_figure(wrapper: type, run: str, log: Log, tmp_path: Path) -> None:
    """Two stages each; losses, matrix and weights have the backbone's bits."""
    backbone, settings = run.replace(",", "").split()[0], {**RUNS[run], "n_stages": 2, "epochs": 2}
    plain = Job(get_model_class(backbone), log.folder, settings).walk(tmp_path / "plain")
    job = Job(wrapper, log.folder, {**settings, "plus_zero_backbone": backbone})
    wrapped = job.walk(tmp_path / "wrapped")
    assert wrapped.result["matrix"] == plain.result["matrix"]
    losses = [[curve["train_loss"] for curve in walk.result["curves"]] for walk in (plain, wrapped)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    inner = wrapped.runner.model.backbone.state_dict()
    assert all(torch.equal(value, inner[name]) for name, value in plain.runner.model.state_dict().items())
    model, kind = wrapped.runner.model, type(plain.runner.model)
    assert isinstance(model, wrapper) and model.type == kind.type
    assert getattr(model, "input_type", None) == getattr(kind, "input_type", None)


def test_the_configuration_follows_the_backbone(log: Log) -> None:
    """Type, input, quick start, negatives and metrics are the backbone's own, whatever the class says itself."""
    for run, settings in RUNS.items():
        backbone = run.replace(",", "").split()[0]
        given = {**settings, "data_path": str(log.folder)}
        plain = CLConfig(backbone, "log", config_dict=given)
        for wrapper in (PlusZero, OtherType):
            config = CLConfig(wrapper, "log", config_dict={**given, "plus_zero_backbone": backbone})
            differing = {
                key
                for key in plain.final_config_dict.keys() | config.final_config_dict.keys()
                if config[key] != plain[key]
            }
            assert differing == {"model", "plus_zero_backbone"}, run
            assert issubclass(config.model_class, wrapper)
            assert config.fingerprint()["model_class"].endswith(f".{wrapper.__name__}")
    assert CLConfig(PlusZero, "ml-100k", config_dict={"plus_zero_backbone": "DeepFM"})["threshold"] == {"rating": 4}
    din = CLConfig(PlusZero, "ml-100k", config_dict={"plus_zero_backbone": "DIN"})
    assert (din["eval_type"], din["MODEL_INPUT_TYPE"]) == (EvaluatorType.VALUE, InputType.POINTWISE)
    assert OtherType.type == ModelType.SEQUENTIAL and PlusZero.type is AbstractRecommender.type, (
        "the classes are as they were"
    )


class OnlyContext(PlusZero):
    """A wrapper of context-aware models alone."""

    backbone_types = frozenset({ModelType.CONTEXT})


class OnlySequential(SequentialRecommender):
    """A wrapper that says nothing about types."""

    backbone_property = "plus_zero_backbone"


@pytest.mark.parametrize(
    ("wrapper", "backbone", "words"),
    [
        (OnlyContext, "BPR", "'BPR' cannot be the backbone of OnlyContext; name a context-aware model, as DeepFM"),
        (
            OnlySequential,
            "DeepFM",
            "'DeepFM' cannot be the backbone of OnlySequential; name a sequential model, as SASR",
        ),
        (
            PlusZero,
            "CKE",
            "name a general model, as BPR or sequential model, as SASRec or context-aware model, as DeepFM",
        ),
        (PlusZero, "PCL", "'PCL' cannot be the backbone of PlusZero"),
        (PlusZero, "SASRek", "unknown model 'SASRek'; did you mean 'SASRec'"),
    ],
)
def test_backbones_that_do_not_fit(wrapper: type, backbone: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CLConfig(wrapper, "ml-100k", config_dict={"plus_zero_backbone": backbone})
