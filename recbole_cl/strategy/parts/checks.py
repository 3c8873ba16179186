"""What is checked before anything is trained: bounds of the strategies' numbers, whether a row has a loss.

A part for strategies, not a strategy.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.model.capabilities import capabilities
from recbole_cl.strategy.base import Strategy


def check_number(
    strategy: Strategy,
    name: str,
    advice: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    optional: bool = False,
) -> None:
    """Raises a :class:`ConfigError` where a parameter is no finite number within its bounds.

    Args:
        strategy: Whose parameter it is; its prefix makes the name of the property.
        name: The parameter, without the prefix.
        advice: What the message ends with: a value that works, and what it means.
        least: It must be at least this.
        above: It must be more than this.
        most: It must be at most this.
        optional: ``None`` is allowed.
    """
    value = strategy.params[name]
    if optional and value is None:
        return
    finite = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if (
        finite
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    ):
        return
    bounds = [
        f"{words} {bound}"
        for words, bound in (("at least", least), ("more than", above), ("at most", most))
        if bound is not None
    ]
    wanted = ["a finite number"] * (not finite) + bounds
    raise ConfigError(f"{strategy.prefix}_{name}: {value!r} must be {' and '.join(wanted)}; {advice}")


def check_strength(strategy: Strategy, name: str = "lambda") -> None:
    """Raises a :class:`ConfigError` where the weight of a strategy's term is negative or not finite."""
    check_number(strategy, name, "0 is FineTune, and a negative strength would drive the old knowledge out", least=0)


def check_samples(strategy: Strategy) -> None:
    """Raises a :class:`ConfigError` where a strategy's ``samples`` is neither ``None`` nor at least 1."""
    check_number(strategy, "samples", "~ takes all of the stage's targets", least=1, optional=True)


def check_loss(strategy: str, config: Any, model: nn.Module) -> None:
    """Raises a :class:`ConfigError` for models without a loss of one row (RecBole's MKR has two of its own)."""
    from recbole.model.abstract_recommender import AbstractRecommender

    if "per_sample_loss" not in capabilities(model) and (
        type(model).calculate_loss is AbstractRecommender.calculate_loss  # type: ignore[attr-defined]
    ):
        raise ConfigError(
            f"strategy: {strategy} cannot serve the model {config['model']}: it has neither calculate_loss nor "
            f"per_sample_loss; use a replay strategy or another model"
        )
