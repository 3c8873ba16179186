"""The contract of models, joined by models of each kind; and for each of its checks a model that breaks it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import nn
from torch.nn import functional as F

from recbole_cl.model.contract import ContinualModel
from recbole_cl.stream.vocabulary import Growth
from recbole_cl.testing.model_contract import ModelContract

# -- models that meet it ------------------------------------------------------------------------------------------


class TestSASRec(ModelContract):
    model = "SASRec"


class TestGRU4Rec(ModelContract):
    model = "GRU4Rec"


class TestBPR(ModelContract):
    model = "BPR"


class TestDeepFM(ModelContract):
    model = "DeepFM"
    settings = {"mlp_hidden_size": [16, 8], "eval_args": {"mode": "full"}}


class TestPCL(ModelContract):
    model = "PCL"
    settings = {"pcl_encoder": "random", "weight_decay": 0.0}
    why_not_carried = "a slice of time begins with prompts of its own"


class Lists(ContinualModel, GeneralRecommender):
    """Users and items, a counter for each user, lists and candidates of its own: everything a model may have."""

    input_type = InputType.POINTWISE
    defaults = {"train_neg_sample_args": None}

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.user_embedding = nn.Embedding(self.n_users, 8, padding_idx=0)
        self.item_embedding = nn.Embedding(self.n_items, 8, padding_idx=0)
        self.seen = np.zeros(self.n_users, dtype=np.int64)

    def owned_state(self) -> dict[str, Any]:
        return {"seen": self.seen.copy()}

    def load_owned_state(self, state: Mapping[str, Any]) -> None:
        self.seen = np.array(state["seen"])

    def grow_owned_state(self, state: Mapping[str, Any], growth: Growth) -> Mapping[str, Any]:
        return {"seen": np.r_[state["seen"], np.zeros(growth.n_users[1] - growth.n_users[0], dtype=np.int64)]}

    def logits(self, batch: Any) -> torch.Tensor:
        return self.user_embedding(batch[self.USER_ID]) @ self.item_embedding.weight.T

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        np.add.at(self.seen, batch[self.USER_ID].numpy(), 1)
        return F.cross_entropy(self.logits(batch), batch[self.ITEM_ID])

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.logits(batch)

    def scores(self, batch: Any, items: torch.Tensor) -> torch.Tensor:
        return self.logits(batch).gather(1, items)

    def recommend(self, batch: Any, k: int, allowed: torch.Tensor, excluded: Any) -> Any:
        scores = self.logits(batch).masked_fill(~allowed, -torch.inf)
        scores[excluded] = -torch.inf
        values, items = scores.topk(k, dim=1)
        return torch.where(torch.isfinite(values), items, 0), values

    def report(self) -> dict[str, Any]:
        return {"numbers": {"rows seen": int(self.seen.sum())}}

    def stage_costs(self) -> dict[str, Any]:
        return {"rows_seen": int(self.seen.sum())}


class TestLists(ModelContract):
    model = Lists
    settings = {"learning_rate": 0.05}


# -- models that do not -------------------------------------------------------------------------------------------


class Lazy(Lists):
    """Trains nothing."""

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        return 0.0 * super().calculate_loss(batch)


class Forgetful(Lists):
    """Every new stage begins with the tables turned around."""

    def load_owned_state(self, state: Mapping[str, Any]) -> None:
        super().load_owned_state(state)
        if not self.seen.sum():
            return
        with torch.no_grad():
            self.item_embedding.weight.neg_()


class Short(Lists):
    """Does not score the newest item."""

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.logits(batch)[:, :-1]


class Unsaved(Lists):
    """Its loss depends on a counter that no checkpoint holds."""

    steps = 0

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        self.steps += 1
        return super().calculate_loss(batch) * (1 + 0.01 * self.steps)


class Drawing(Lists):
    """Draws from the global generator when the runner does not look."""

    def report(self) -> dict[str, Any]:
        return {"numbers": {"drawn": float(torch.rand(()))}}


class Hidden(Lists):
    """Adds a vector to its scores that is no part of its state."""

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.offset = torch.randn(self.n_items)

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.logits(batch) + self.offset


class Impure(Lists):
    """Answers otherwise when it is asked again: a counter that is no state, so that the runner's hash sees nothing."""

    asked = 0

    def logits(self, batch: Any) -> torch.Tensor:
        self.asked += not self.training
        return super().logits(batch).roll(self.asked, 1)


class Infinite(Lists):
    """Gives an item an infinite score."""

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        scores = self.logits(batch)
        scores[:, 3] = torch.inf
        return scores


class Disagreeing(Lists):
    """Scores given items by another rule."""

    def scores(self, batch: Any, items: torch.Tensor) -> torch.Tensor:
        return 2 * super().scores(batch, items)


class Tied(Lists):
    """Compares the rows of a batch with one another."""

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        scores = self.logits(batch)
        return scores - scores.mean(0, keepdim=True)


class Careless(Lists):
    """Its lists do not read what is excluded, where few items are allowed."""

    def recommend(self, batch: Any, k: int, allowed: torch.Tensor, excluded: Any) -> Any:
        ignored = (excluded[0][:0], excluded[1][:0])
        few = int(allowed.sum()) < 0.6 * len(allowed)
        return super().recommend(batch, k, allowed, ignored if few else excluded)


class OneRow(Lists):
    """Divides by the spread of a batch."""

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        return super().calculate_loss(batch) / self.logits(batch)[:, 1].std()


class OtherArguments(Lists):
    """Takes more than it is given at one place, which is no harm, and less at another."""

    def stage_costs(self, stage: int = 0) -> dict[str, Any]:
        return super().stage_costs()

    def prepare_stage(self) -> None:  # type: ignore[override]
        """Takes no context."""


class OwnSeconds(Lists):
    """Its costs have a name that the runner measures."""

    def stage_costs(self) -> dict[str, Any]:
        return {"peak_memory_mb": 1.0}


BROKEN = [
    ("test_it_learns", Lazy, "does not fall"),
    ("test_it_grows", Forgetful, "begins with other answers"),
    ("test_it_grows", Short, "does not score all known items"),
    ("test_an_interrupted_run_goes_on_with_the_same_bits", Unsaved, "differs"),
    ("test_it_draws_from_the_runs_generators", Drawing, "global generator of torch"),
    ("test_its_state_round_trips", Hidden, "need more than state"),
    ("test_evaluation_changes_nothing", Impure, "gave other results"),
    ("test_scores_are_numbers", Infinite, "a score is infinite"),
    ("test_all_ways_to_scores_agree", Disagreeing, "given candidates and all items"),
    ("test_rows_do_not_depend_on_each_other", Tied, "a row alone and in a batch"),
    ("test_lists_hold_what_is_allowed", Careless, "excluded from"),
    ("test_one_row_is_a_batch", OneRow, "one row"),
    ("test_its_names_are_the_contracts", OtherArguments, "prepare_stage.*does not take"),
    ("test_what_it_tells_can_be_kept", OwnSeconds, "a name that the runner measures"),
]


@pytest.mark.parametrize(("test", "cls", "told"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_each_check_finds_a_broken_model(test: str, cls: type, told: str, tmp_path: Path) -> None:
    """A contract is worth what it refuses."""
    joined = type(f"Of{cls.__name__}", (ModelContract,), {"model": cls, "settings": TestLists.settings})
    runs = joined.runs_in(tmp_path)
    if test == "test_its_names_are_the_contracts":
        runs = TestLists.runs_in(tmp_path)
        runs.whole.model.__class__ = cls  # it could not be walked
    arguments = [runs, tmp_path / "state"][: 2 if test == "test_its_state_round_trips" else 1]
    with pytest.raises(Exception, match=told) as found:
        getattr(joined(), test)(*arguments)
    assert not isinstance(found.value, pytest.skip.Exception)


def test_every_check_has_a_model_that_breaks_it() -> None:
    """A check that is added comes with a model that it refuses."""
    checks = {name for name in vars(ModelContract) if name.startswith("test_")}
    assert checks == {test for test, _, _ in BROKEN}
