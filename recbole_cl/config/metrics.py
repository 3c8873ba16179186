"""Which metrics there are, and whether those that were asked for go together."""

from __future__ import annotations

import re
from typing import Any

from recbole.evaluator import metric_types
from recbole.evaluator.register import metrics_dict
from recbole.utils import EvaluatorType

from recbole_cl.errors import ConfigError, nearest


def list_metrics() -> list[str]:
    """Returns the names of RecBole's metrics as its users write them."""
    return sorted((cls.__name__ for cls in metrics_dict.values()), key=str.lower)


def check_metrics(final: dict[str, Any]) -> None:
    """Checks that the metrics exist, go together, fit the way of evaluation and hold the validation metric.

    Args:
        final: The effective properties; ``metrics`` and ``topk`` become lists.

    Raises:
        ConfigError: If they do not.
    """
    if isinstance(final["metrics"], str):
        final["metrics"] = [final["metrics"]]
    metrics = list(final["metrics"])
    for metric in metrics:
        if metric.lower() not in metric_types:
            hint = nearest(metric, list_metrics()) or f"; known: {', '.join(list_metrics())}"
            raise ConfigError(f"unknown metric {metric!r} in property 'metrics'{hint}")
    kinds = {metric_types[metric.lower()] for metric in metrics}
    if len(kinds) > 1:
        value = [metric for metric in metrics if metric_types[metric.lower()] == EvaluatorType.VALUE]
        raise ConfigError(
            f"property 'metrics' is {metrics!r}: {', '.join(value)} judge single scores, the others rankings; "
            "keep one kind"
        )
    topk = final["topk"] if isinstance(final["topk"], list | tuple) else [final["topk"]]
    final["topk"] = list(topk)
    ranking = kinds == {EvaluatorType.RANKING}
    name, at, k = final["valid_metric"].partition("@")
    computed = [f"{metric}@{n}" for metric in metrics for n in topk] if ranking else metrics
    if name.lower() not in {metric.lower() for metric in metrics}:
        raise ConfigError(
            f"property 'valid_metric' is {final['valid_metric']!r}, but property 'metrics' is {metrics!r}; "
            f"add {name!r} to metrics or set valid_metric to one of {', '.join(computed)}"
        )
    if final["valid_metric"].lower() not in {metric.lower() for metric in computed}:
        raise ConfigError(
            f"property 'valid_metric' is {final['valid_metric']!r}, but property 'metrics' {metrics!r} with "
            f"property 'topk' {topk!r} gives {', '.join(computed)}; set it to one of them"
            + (f" or add {k} to topk" if ranking and at else "")
        )
    modes = final["eval_args"].get("mode", "full")
    for mode in set(modes.values()) if isinstance(modes, dict) else {modes}:
        if not isinstance(mode, str) or not re.fullmatch(r"full|labeled|(uni|pop)[1-9]\d*", mode):
            raise ConfigError(
                f"property 'eval_args' has the mode {mode!r}; it must be 'full', 'labeled', or 'uni' or 'pop' and "
                "a number of sampled items, such as 'uni100'"
            )
        if (ranking and mode == "labeled") or (not ranking and mode == "full"):
            raise ConfigError(
                f"property 'metrics' is {metrics!r}, which {'rank items' if ranking else 'judge single scores'}, "
                f"but property 'eval_args' has the mode {mode!r}; use the mode "
                + ("'full' or 'uni100', or the metrics AUC and LogLoss" if ranking else "'labeled' or 'uni100'")
            )
