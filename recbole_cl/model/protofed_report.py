"""What ProtoFed-SP tells beside the matrix: its privacy, what that costs, and what the backbone cannot know."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from recbole_cl.model.protofed_plan import budget_of

if TYPE_CHECKING:
    from recbole_cl.federated.server import Mechanism
    from recbole_cl.model.federated_base import FederatedModel
    from recbole_cl.model.protofed_sp import ProtoFedSP

OUTSIDE = (
    "the base stage (backbone, encoders, decoder, first prototypes)",
    "early stopping on the base stage and the choice of all properties",
    "seeds, and how many targets, users and items there are",
    "what a user's own device shows its user",
)
FLOATS = (
    "the noise is floating-point Gaussian noise, whose low bits can tell on the sum (Mironov 2012): the figure holds "
    "for real numbers"
)


def numbers_of(model: ProtoFedSP) -> dict[str, Any]:
    """Returns the stage's report: numbers, tables."""
    plan = model.plan
    numbers: dict[str, Any] = {
        "prototypes K": plan.sizes.prototypes,
        "numbers of a prototype d'": plan.sizes.width,
    }
    more, tables = traffic(model)
    numbers |= more
    if model.phase == "backbone":
        return {"numbers": numbers, "tables": tables}
    epsilon, rows = privacy_rows(model, plan.mechanism, plan.n_releases, _own_rows(model))
    numbers |= epsilon
    tables["Privacy"] = rows
    if model.notes.get("rounds"):
        tables["Rounds"] = model.notes["rounds"]
    if model.notes.get("refused"):
        tables["Refused uploads"] = [{"reason": why, "uploads": n} for why, n in model.notes["refused"].items()]
    return {"numbers": numbers, "tables": tables}


def traffic(model: FederatedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the numbers of the last round and a client's bytes, and the table of targets with unseen items."""
    numbers: dict[str, Any] = {}
    if model.notes.get("rounds"):
        numbers["noise/R"] = model.notes["rounds"][-1]["noise/R"]
        for key in ("bytes_up_per_client", "bytes_down_per_client"):
            numbers[key.replace("_", " ")] = model.notes[key]
    tables: dict[str, Any] = {}
    shares = model.unseen.get("test", [])
    if shares:
        tables["Targets whose item the backbone never saw"] = [
            {"stage": stage + 1, **{split: _share(column[stage]) for split, column in model.unseen.items()}}
            for stage in range(len(shares))
        ]
    return numbers, tables


def privacy_rows(
    model: FederatedModel, mechanism: Mechanism, n_releases: int, more: dict[str, str]
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Returns the epsilon of everything in the ledger, if there is a finite one, and the rows that say what it means.

    Args:
        model: The model.
        mechanism: How it releases.
        n_releases: How often in the whole run.
        more: Rows of its own.
    """
    config, spent = model.config, _spent(model)
    if model.notes.get("rounds") and not mechanism.cost.private:  # what has no noise need not stand in a ledger
        spent = math.inf
    numbers = {"epsilon": round(spent, 4)} if spent is not None and math.isfinite(spent) else {}
    budget = budget_of(config)
    rows = {
        "epsilon spent": "infinite: no noise, no privacy" if spent == math.inf else f"{spent or 0.0:.4g}",
        "budget": "none" if math.isinf(budget) else f"{budget:g}",
        "delta": f"{float(config['protofed_delta']):g}",
        "unit": "the user",
        "adjacency": "add or remove one user",
        "trust": _trust(mechanism.trust),
        "accountant": "dp-accounting, privacy loss distributions; at least the true epsilon",
        "noise multiplier": f"{mechanism.cost.noise_multiplier:g}, sampling {mechanism.cost.sampling:g}",
        "releases": f"{len(model.published)} so far, {n_releases} in the run",
        **more,
        "noise from": "the run's seed: a simulation" if config["protofed_noise"] == "seed" else "the operating system",
        "ledger": "shared with whoever releases data of the same users: their releases are in the figure",
        "outside the guarantee": "; ".join(OUTSIDE),
        "arithmetic": FLOATS,
    }
    return numbers, [{"what": what, "value": value} for what, value in rows.items()]


def _spent(model: FederatedModel) -> float | None:
    """Returns the epsilon of everything in the ledger, ``None`` where there is no ledger yet."""
    return model.ledger().spent() if model.published else None


def _trust(trust: str) -> str:
    return {
        "central": "central: the server sees the clipped uploads and adds the noise",
        "local": "local: each client adds the noise to its own upload",
    }[trust]


def _own_rows(model: ProtoFedSP) -> dict[str, str]:
    plan, delta = model.plan, float(model.config["protofed_delta"])
    cost, radius = plan.mechanism.cost, plan.mechanism.radius
    return {"K and d'": _sizes(model), **model.aggregator.described(plan.n_releases, cost.sampling, delta, radius)}


def _sizes(model: ProtoFedSP) -> str:
    plan = model.plan
    how = "picked: the most that noise leaves standing" if plan.picked else "given"
    return (
        f"K {plan.sizes.prototypes}, d' {plan.sizes.width}, {how}; expected noise/R {plan.sizes.noise_ratio:.2g} with "
        f"{plan.n_users:.0f} users a release"
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
