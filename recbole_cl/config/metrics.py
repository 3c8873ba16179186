"""Which metrics there are, and whether those that were asked for go together."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from recbole.evaluator import metric_types
from recbole.evaluator.register import metrics_dict
from recbole.utils import EvaluatorType

from recbole_cl.errors import ConfigError, nearest

BOTH_KINDS = "gauc"
"""RecBole's only metric that judges rankings and, as an area under the curve of each user, single scores too."""


def list_metrics() -> list[str]:
    """Returns the names of RecBole's metrics as its users write them."""
    return sorted((cls.__name__ for cls in metrics_dict.values()), key=str.lower)


def own_metrics(model_class: type) -> dict[str, bool]:
    """Returns the metrics that a model brings, name in lower case to whether more is better.

    Raises:
        ConfigError: If one has the name of a metric of RecBole's.
    """
    found = {str(name).lower(): bool(bigger) for name, bigger in dict(getattr(model_class, "own_metrics", {})).items()}
    taken = [name for name in found if name.partition("@")[0] in metric_types]
    if taken:
        raise ConfigError(
            f"model {model_class.__name__!r} has a metric of its own called {taken[0]!r}, which is one of RecBole's; "
            "rename it"
        )
    return found


def kind_of_metrics(final: dict[str, Any]) -> set[EvaluatorType]:
    """Returns the kinds of the metrics asked for: one, or two that do not go together.

    GAUC is of the others' kind; alone it judges single scores where all evaluation is of labelled rows.
    """
    kinds = {metric_types[metric.lower()] for metric in final["metrics"] if metric.lower() != BOTH_KINDS}
    if kinds:
        return kinds
    modes = final["eval_args"].get("mode", "full")
    labelled = set(modes.values() if isinstance(modes, dict) else [modes]) == {"labeled"}
    return {EvaluatorType.VALUE if labelled else EvaluatorType.RANKING}


@contextlib.contextmanager
def told_to_recbole(final: dict[str, Any], model_class: type) -> Iterator[None]:
    """A context in which RecBole derives kind and direction from metrics as it knows them.

    Args:
        final: The effective properties; ``valid_metric_bigger`` is set for a metric of the model's own.
        model_class: The model.
    """
    metrics = final["metrics"]
    if kind_of_metrics(final) == {EvaluatorType.VALUE}:
        final["metrics"] = [metric for metric in metrics if metric.lower() != BOTH_KINDS] or ["AUC"]
    try:
        yield
    finally:
        final["metrics"] = metrics
    bigger = own_metrics(model_class).get(str(final["valid_metric"]).lower())
    if bigger is not None:
        final["valid_metric_bigger"] = bigger


def check_metrics(final: dict[str, Any], model_class: type) -> None:
    """Checks that the metrics exist, go together, fit the way of evaluation and hold the validation metric.

    Args:
        final: The effective properties; ``metrics`` and ``topk`` become lists.
        model_class: The model; ``valid_metric`` may be one of its own metrics.

    Raises:
        ConfigError: If they do not.
    """
    if isinstance(final["metrics"], str):
        final["metrics"] = [final["metrics"]]
    metrics, own = list(final["metrics"]), own_metrics(model_class)
    for metric in metrics:
        if metric.lower() in own:
            raise ConfigError(
                f"property 'metrics' holds {metric!r}, which the model measures anyway; leave it out there "
                "(valid_metric may name it)"
            )
        if metric.lower() not in metric_types:
            hint = nearest(metric, list_metrics()) or f"; known: {', '.join(list_metrics())}"
            raise ConfigError(f"unknown metric {metric!r} in property 'metrics'{hint}")
    kinds = kind_of_metrics(final)
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
    cut = [metric for metric in metrics if ranking and metric.lower() != BOTH_KINDS]  # GAUC has no cut-off
    computed = [f"{metric}@{n}" for metric in cut for n in topk] + [m for m in metrics if m not in cut]
    known = {metric.lower() for metric in computed} | own.keys()
    if name.lower() not in {metric.lower() for metric in metrics} | own.keys():
        raise ConfigError(
            f"property 'valid_metric' is {final['valid_metric']!r}, but property 'metrics' is {metrics!r}; "
            f"add {name!r} to metrics or set valid_metric to one of {', '.join([*computed, *own])}"
        )
    if final["valid_metric"].lower() not in known:
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
