"""What a privacy budget allows: how noisy releases are, and how many prototypes of which width they can carry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_cl.errors import ConfigError
from recbole_cl.federated.aggregators.base import Aggregator
from recbole_cl.federated.privacy import Release, Sizes, noise_multiplier, noise_ratio, pick_sizes
from recbole_cl.federated.server import Mechanism

PROTOTYPES = (32, 16, 8, 4, 2)
WIDTHS = (32, 16, 8, 4)
"""What K and d' are picked from."""


@dataclass(frozen=True)
class Plan:
    """What a run releases.

    Attributes:
        mechanism: How.
        n_releases: How often, over the whole run.
        n_users: Users expected in a release.
        sizes: Prototypes.
        picked: K and d' were picked here, not given.
    """

    mechanism: Mechanism
    n_releases: int
    n_users: float
    sizes: Sizes
    picked: bool


def make_plan(config: Any, stream: Any, aggregator: Aggregator) -> Plan:
    """Returns what a run over a stream releases.

    Args:
        config: The properties ``protofed_...``.
        stream: The stream.
        aggregator: Says how many releases a round takes.

    Raises:
        ConfigError: If the budget makes no sense, or noise would drown the prototypes.
    """
    mechanism, n_releases = make_mechanism(config, stream, 0 if config["protofed_static"] else aggregator.steps)
    cost, radius, weight = mechanism.cost, mechanism.radius, mechanism.weight
    if not aggregator.private and cost.private:
        raise ConfigError(
            f"protofed_aggregator: {config['protofed_aggregator']} has no private form: {aggregator.why_not_private}; "
            f"use DPFedKMeans, or protofed_epsilon: ~"
        )
    n_users = cost.sampling * users_of_a_slice(stream)
    # Local noise is added once for each user: as much as central noise for the root of so many users less.
    effective = math.sqrt(n_users) if mechanism.trust == "local" else n_users
    k, width = config["protofed_prototypes"], config["protofed_width"]
    if k is not None and width is not None:
        ratio = noise_ratio(effective, int(k), int(width), cost.noise_multiplier, radius, weight)
        return Plan(mechanism, n_releases, n_users, Sizes(int(k), int(width), ratio), False)
    limit = float(config["protofed_noise_limit"])
    choices = ((int(k),) if k is not None else PROTOTYPES, (int(width),) if width is not None else WIDTHS)
    sizes = pick_sizes(effective, cost.noise_multiplier, radius, weight, limit, *choices)
    return Plan(mechanism, n_releases, n_users, sizes, True)


def make_mechanism(config: Any, stream: Any, steps: int) -> tuple[Mechanism, int]:
    """Returns how a run releases sums, and how often.

    Args:
        config: The properties ``protofed_...``.
        stream: The stream.
        steps: Releases of a round.

    Raises:
        ConfigError: If the budget makes no sense.
    """
    budget, delta = budget_of(config), float(config["protofed_delta"])
    sampling = float(config["protofed_participation"])
    if not budget > 0 or not 0 < delta < 1 or not 0 < sampling <= 1:
        raise ConfigError(
            f"protofed_epsilon {budget!r}, protofed_delta {delta!r}, protofed_participation {sampling!r}: the first is "
            f"above 0 (~ for no noise), the second between 0 and 1, the third above 0 and at most 1"
        )
    n_releases = (len(stream) - 1) * int(config["protofed_rounds"]) * steps
    multiplier = config["protofed_noise_multiplier"]
    if multiplier is None:
        multiplier = noise_multiplier(budget, delta, n_releases, sampling)
    cost = Release(float(multiplier), sampling)
    radius, weight = float(config["protofed_radius"]), float(config["protofed_count_weight"])
    return Mechanism(cost, radius, weight, config["protofed_trust"], int(config["protofed_bits"])), n_releases


def budget_of(config: Any) -> float:
    """Returns the largest epsilon, infinite where there is no budget."""
    given = config["protofed_epsilon"]
    return math.inf if given is None else float(given)


def users_of_a_slice(stream: Any) -> float:
    """Returns how many users take part in a later slice: as many as had the last such number of base targets.

    What comes later is not looked at but for how much it is, which the scheduler decides.
    """
    base, later = stream.stages[0].train, [len(stage.train) for stage in stream.stages[1:]]
    size = int(np.median(later)) if later else len(base)
    return float(max(len(np.unique(base.user[np.argsort(base.position, kind="stable")][-max(size, 1) :])), 1))
