"""Federated baselines through a whole walk: killed and resumed, with and without noise, on all weights and on few."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance_helpers import Job, Walk, assert_reported, matrix, write_log
from recbole.data.interaction import Interaction

from recbole_cl.errors import ConfigError
from recbole_cl.federated.ledger import Ledger
from recbole_cl.federated.local import METHODS
from recbole_cl.model.federated_baselines import Federated
from recbole_cl.model.fedrap import FedRAP
from recbole_cl.testing.model_contract import ModelContract
from recbole_cl.tree import tree_hash

pytest.importorskip("dp_accounting", reason="dp-accounting, of the extra 'federated', is not installed")

SETTINGS = {
    "hidden_size": 16,
    "inner_size": 16,
    "n_layers": 2,
    "n_heads": 2,
    "epochs": 2,
    "eval_args": {"mode": {"valid": "uni20", "test": "uni20"}},
    "protofed_tokens": 2,
    "protofed_rounds": 2,
    "protofed_noise_multiplier": 1.5,
    "protofed_epsilon": 6.9,
    "federated_adapter": 3,
    "federated_base_rounds": 2,
}


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return Job(Federated, write_log(tmp_path_factory.mktemp("log")).folder, SETTINGS)


WAYS = [(method, part) for method in METHODS for part in ("prompt", "adapter", "whole") if (method, part) != (
    "FedRAP", "whole")]  # fmt: skip


@pytest.fixture(scope="module")
def walks(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives the walk of a method on a part with a budget, which is made once."""
    made: dict[tuple[str, str, float | None], Walk] = {}

    def walk(method: str, part: str, budget: float | None) -> Walk:
        key = (method, part, budget)
        if key not in made:
            folder, rate = tmp_path_factory.mktemp("walk"), 0.05 if part == "whole" else 0.5
            made[key] = job.walk(
                folder,
                federated_method=method,
                federated_part=part,
                federated_rate=rate,
                protofed_epsilon=budget,
                protofed_noise_multiplier=None if budget is None else 1.5,
            )
        return made[key]

    return walk


@pytest.mark.parametrize(("method", "part"), WAYS)
def test_each_method_walks(method: str, part: str, walks: Any) -> None:
    """Weights move, what a method keeps to each client is kept for its clients, and the report says what it cost."""
    walk = walks(method, part, 6.9 if part != "whole" or method == "Ditto" else None)
    model = walk.runner.model
    assert np.isfinite(matrix(walk, "ndcg@5")).all()
    users = {int(u) for stage in walk.runner.stream.stages for u in np.unique(stage.train.user)}
    assert set(model.own.users.tolist()) <= users
    assert bool(len(model.own)) == (method != "FedProx")
    told = walk.result["reports"][-1]
    privacy = {row["what"]: row["value"] for row in told["tables"]["Privacy"]}
    assert privacy["method"].startswith(f"{method} on {part}") and told["tables"]["Rounds"][1]["weights moved by"] > 0
    size = sum(value.numel() for value in model.global_weights().values())
    cost = walk.result["cost"][-1]
    assert cost["bytes_down_per_client"] == 2 * 4 * size
    assert cost["trainable_per_client"] == size * (2 if method in ("Ditto", "FedRAP") else 1)
    n = walk.runner.stream.stages[0].n_items
    assert walk.runner.known.items[n:].any() == (part == "whole"), "who trains rows learns new items"
    assert_reported(walk)


def test_the_budget_is_kept_and_charged(walks: Any) -> None:
    """Two releases a stage behind the first; the same walk without noise charges nothing and says so."""
    walk = walks("Ditto", "prompt", 6.9)
    ledger = Ledger(walk.runner.folder / "ledger.jsonl", math.inf, 1e-5)
    assert ledger.rounds() == set(walk.runner.model.published) and len(ledger.charges()) == 4
    assert walk.result["reports"][-1]["numbers"]["epsilon"] == pytest.approx(ledger.spent(), abs=1e-4)
    free = walks("Ditto", "prompt", None)
    assert not (free.runner.folder / "ledger.jsonl").exists()
    privacy = {row["what"]: row["value"] for row in free.result["reports"][-1]["tables"]["Privacy"]}
    assert privacy["epsilon spent"].startswith("infinite")
    assert tree_hash(free.runner.model.owned_state()) != tree_hash(walk.runner.model.owned_state())


def test_a_round_is_the_mean_of_what_changed(walks: Any) -> None:
    """Without noise: FedProx's global prompt after a round is that of a plain loop over its clients, n_k / n each."""
    walk = walks("FedProx", "prompt", None)
    model, runner = walk.runner.model, walk.runner
    from recbole_cl.federated.client import recommendation_losses
    from recbole_cl.model.federated_rounds import FederatedRounds
    from recbole_cl.strategy.context import Pass
    from recbole_cl.stream.loader import make_loader

    ctx = runner.state.models.context(2, model, runner.stream.view(2))
    ctx.pass_ = Pass("rounds", epochs=9)
    ctx.loader = make_loader(ctx, runner.stream.stages[2].train, "test")
    rounds = FederatedRounds(model, ctx, private=True)
    before = model.part.prompt.detach().clone()
    able = rounds.data.trained()
    ((users, whole),) = [
        (torch.from_numpy(rounds.data.users[able]), rounds.data.examples(able, rounds.generator("negatives/0")))
    ]
    expected, mass, table = torch.zeros_like(before), 0, model.backbone.item_embedding.weight.detach()
    for client in range(len(users)):
        one, prompt = whole.of(torch.tensor([client])), before.clone()
        for _ in range(3):
            prompt.requires_grad_(True)
            hidden = model.outputs(one.sequence)(prompt.expand(len(one.sequence), -1, -1), one.targets > 0)
            (slope,) = torch.autograd.grad(recommendation_losses(hidden, table, one, "BCE").sum(), prompt)
            prompt = (prompt - 0.5 * (slope + 0.1 * (prompt - before))).detach()
        n = int((one.targets > 0).sum())
        expected, mass = expected + n * (prompt - before), mass + n
    rounds.train_epoch(None, 0)
    torch.testing.assert_close(model.part.prompt.detach(), before + expected / mass, rtol=0, atol=1e-6)
    model.part.prompt.data.copy_(before)


@pytest.mark.parametrize(("method", "part"), [("Ditto", "whole"), ("FedRAP", "adapter")])
def test_killed_in_a_round(method: str, part: str, job: Job, walks: Any, tmp_path: Path) -> None:
    """A run that broke off between rounds goes on to the same weights and the same ledger."""
    budget = 6.9
    whole = walks(method, part, budget)
    given = {"federated_method": method, "federated_part": part, "federated_rate": 0.05 if part == "whole" else 0.5}
    train, left = Federated.train_clients, {"calls": 0}

    def broken(model: Federated, users: torch.Tensor, examples: Any) -> Any:
        left["calls"] += model.phase == "rounds" and model.rounds >= 3
        if left["calls"] == 1:
            raise KeyboardInterrupt
        return train(model, users, examples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Federated, "train_clients", broken)
        with pytest.raises(KeyboardInterrupt):
            job.walk(tmp_path, **given)
    again = job.walk(tmp_path, resume=True, **given)
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == (whole.runner.folder / "ledger.jsonl").read_bytes()
    assert again.result["matrix"] == whole.result["matrix"]
    assert tree_hash(again.runner.model.owned_state()) == tree_hash(whole.runner.model.owned_state())


@pytest.mark.parametrize("schedule", ["constant", "tanh"])
def test_fedrap_on_tables_of_items(schedule: str, job: Job, tmp_path: Path) -> None:
    """Only touched rows of a user move, new items are learnt, and the common table is averaged under the budget."""
    given = {"fedrap_width": 4, "federated_base_rounds": 3, "fedrap_schedule": schedule}
    given |= {"protofed_rounds": 1, "protofed_epsilon": 6.9, "fedrap_sparse": 0.5}
    kept = {name: SETTINGS[name] for name in ("eval_args",)}
    walk = Job(FedRAP, job.data, {**kept, "metrics": ["Hit", "NDCG"]}).walk(tmp_path, **given)
    model, stages = walk.runner.model, walk.runner.stream.stages
    assert np.isfinite(matrix(walk, "ndcg@5")).all() and walk.runner.known.items[stages[0].n_items :].any()
    users = {int(u) for stage in stages for u in np.unique(stage.train.user)}
    assert set(model.own) == users and all((items.diff() > 0).all() for items, *_ in model.own.values())
    for user, (items, rows, _, _) in model.own.items():
        targets = {int(i) for stage in stages for i in stage.train.label[stage.train.user == user]}
        assert targets <= set(items.tolist()) and not torch.equal(rows, model.first[items])
    assert len(model.ledger().charges()) == 2
    again = Job(FedRAP, job.data, kept).walk(tmp_path / "again", **given)
    assert tree_hash(again.runner.model.owned_state()) == tree_hash(model.owned_state()), "another run, other bits"
    batch = {"user_id": torch.tensor([*sorted(users)[:3], 0]), "item_id": torch.tensor([1, 2, 3, 4])}
    scores = model.full_sort_predict(Interaction(batch))
    for row, user in enumerate(batch["user_id"].tolist()):
        table = model.first.clone()
        items, rows, a, b = model.own.get(user, ([], [], model.start, torch.zeros(())))
        for item, value in zip(items, rows, strict=True):
            table[item] = value
        torch.testing.assert_close(scores[row], (table + model.common) @ a + b, rtol=1e-4, atol=1e-5)
    assert walk.result["reports"][-1]["tables"]["Privacy"][9]["value"].endswith(f"lambda and mu {schedule}")


class TestDitto(ModelContract):
    model = "Federated"
    settings = {**SETTINGS, "federated_method": "Ditto", "federated_part": "adapter"}
    settings |= {"protofed_rounds": 4, "protofed_epsilon": None, "protofed_noise_multiplier": None}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"federated_method": "FedAvg"}, "federated_method.*FedAvgFinetune"),
        ({"federated_method": "FedRAP", "federated_part": "whole"}, "federated_part.*FedRAP"),
        ({"federated_part": "whole", "protofed_new_items": "mean"}, "protofed_new_items.*cold"),
        ({"strategy": "FullRetrain"}, "FullRetrain cannot serve Federated"),
    ],
)
def test_what_makes_no_sense_is_refused(changed: dict, message: str, job: Job, tmp_path: Path) -> None:
    """With the property and what to use."""
    with pytest.raises(ConfigError, match=message):
        job.walk(tmp_path, **changed)
