"""What a property may be: types, choices and ranges, told in the words that an error message needs.

:data:`SCHEMA` has one rule for every key of ``properties/overall.yaml`` (a test holds the two together),
:data:`RECBOLE_SCHEMA` for RecBole's common numbers, which RecBole itself passes on unchecked. Properties of
strategies, schedulers and models are checked against the ``# (type)`` comment of their line by :func:`check_declared`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recbole_cl.errors import ConfigError, nearest


@dataclass(frozen=True)
class Rule:
    """What one property may be.

    Args:
        allowed: The end of the sentence "it must be ...".
        accepts: Tells whether a value is allowed.
        choices: Names to suggest from, if there are any.
    """

    allowed: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()

    def check(self, key: str, value: Any) -> None:
        """Raises a :class:`ConfigError` that names ``key``, ``value`` and what is allowed, if it is not."""
        if not self.accepts(value):
            hint = nearest(value, self.choices) if isinstance(value, str) else ""
            raise ConfigError(f"property {key!r} is {value!r}; it must be {self.allowed}{hint}")

    def optional(self) -> Rule:
        """Returns this rule with None (``~`` in YAML) allowed as well."""
        return Rule(f"{self.allowed}, or ~ for none", lambda v: v is None or self.accepts(v), self.choices)


def is_integer(value: Any) -> bool:
    """True for an int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """True for a finite int or float that is not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def time_value(value: Any) -> float | None:
    """Returns seconds since 1970 of a timestamp or an ISO date (UTC by default), None if it is neither."""
    if is_number(value):
        return float(value)
    if not isinstance(value, str):
        return None
    try:
        moment = datetime.fromisoformat(value)
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def integer(low: int) -> Rule:
    """An int of at least ``low``."""
    return Rule(f"an integer of at least {low}", lambda v: is_integer(v) and v >= low)


def positive() -> Rule:
    """A finite number above 0."""
    return Rule("a number above 0", lambda v: is_number(v) and v > 0)


def non_negative() -> Rule:
    """A finite number of at least 0."""
    return Rule("a number of at least 0", lambda v: is_number(v) and v >= 0)


def share() -> Rule:
    """A number strictly between 0 and 1."""
    return Rule("a number between 0 and 1, both excluded", lambda v: is_number(v) and 0 < v < 1)


def rate() -> Rule:
    """A number of at least 0 and below 1."""
    return Rule("a number of at least 0 and below 1", lambda v: is_number(v) and 0 <= v < 1)


def boolean() -> Rule:
    """True or False."""
    return Rule("True or False", lambda v: isinstance(v, bool))


def text() -> Rule:
    """A string that is not empty."""
    return Rule("a text", lambda v: isinstance(v, str) and v != "")


def choice(*names: str, any_case: bool = False) -> Rule:
    """One of ``names``."""
    return Rule(
        "one of " + ", ".join(repr(n) for n in names),
        lambda v: isinstance(v, str) and (v.lower() if any_case else v) in names,
        names,
    )


def _ratios(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(is_number(v) and v >= 0 for v in value)
        and value[0] > 0
    )


def _times(value: Any, strictly: bool) -> bool:
    if not isinstance(value, list | tuple) or not value:
        return False
    times = [time_value(v) for v in value]
    known = [t for t in times if t is not None]
    pairs = itertools.pairwise(known)
    return len(known) == len(times) and all(a < b if strictly else a <= b for a, b in pairs)


def _one_or_many(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return accepts(value) or (isinstance(value, list | tuple) and len(value) > 0 and all(accepts(v) for v in value))


SCHEMA: dict[str, Rule] = {
    # What is learnt, and how old knowledge is kept
    "strategy": Rule(
        "a name, a list of names, or {name: {parameter: value}}",
        lambda v: isinstance(v, str | list | tuple | dict) and len(v) > 0,
    ),
    "scratch": boolean(),
    "fwt_reference": choice("untrained", "stage_only"),
    "stage_lr_scale": Rule(
        "a number of at least 0 or a list of such numbers",
        lambda v: _one_or_many(v, lambda x: is_number(x) and x >= 0),
    ),
    "accumulate_gradients": integer(1),
    "warmup": Rule("a number of steps, or a share of them below 1", lambda v: is_number(v) and v >= 0),
    "lr_schedule": choice("constant", "linear", "cosine"),
    "stage_epochs": Rule(
        "an integer of at least 1, a list of such numbers and ~, or ~",
        lambda v: _one_or_many(v, lambda x: x is None or (is_integer(x) and x >= 1)),
    ),
    "stage_optimizer": choice("reset", "carry"),
    "train_positions": choice("all", "last"),
    "window": integer(1).optional(),
    "window_stride": integer(1).optional(),
    "window_shift": boolean(),
    "graph": choice("all", "stage"),
    "new_rows": choice("random", "mean"),
    "trainable": choice("all", "prompt", "adapter", "lora"),
    "trainable_from": integer(1),
    "trainable_size": integer(1),
    "trainable_alpha": positive().optional(),
    "trainable_dropout": rate(),
    # What comes when
    "scheduler": text(),
    # None where the scheduler's own file says so: it follows from the periods or boundaries.
    "n_stages": integer(1).optional(),
    "base_ratio": share(),
    "stage_by": choice("count", "time"),
    "boundaries": Rule(
        "a list, not empty, of increasing timestamps or ISO dates such as 2011-06-01", lambda v: _times(v, True)
    ).optional(),
    "period_field": text().optional(),
    "stage_split": choice("tail", "leave_one_out", "user_tail", "next_stage"),
    "valid_split": choice("tail", "random"),
    "stage_ratios": Rule("three numbers of at least 0, the first (training) above 0", _ratios),
    "min_user_inter": integer(0),
    "history": choice("all", "stage"),
    "vocabulary": choice("growing", "global"),
    "time_range": Rule(
        "a list of the first and the last timestamp or ISO date, in this order",
        lambda v: _times(v, False) and len(v) == 2,
    ).optional(),
    # How it is told
    "matrix_cells": choice("all", "diagonal", "last_row"),
    "candidates": choice("seen", "trained", "all"),
    "candidates_exclude": choice("auto", "target", "seen", "stage"),
    "cold_targets": choice("keep", "drop"),
    "repeatable": Rule(
        "'auto', True or False",
        lambda v: isinstance(v, bool) or (isinstance(v, str) and v.lower() in ("auto", "true", "false")),
        ("auto",),
    ),
    "task_id": choice("given", "latest"),
    "strata": Rule(
        "a name, a list of names, or {name: {parameter: value}}",
        lambda v: (isinstance(v, str) and v != "") or isinstance(v, list | tuple | dict),
    ),
    "parity": choice("recbole").optional(),
    "head_ratio": share(),
    # Where it is kept
    "output_dir": text().optional(),
    "resume": boolean(),
    "keep_base": boolean(),
    "base_run": text().optional(),
    "checkpoint_steps": integer(1).optional(),
    "checkpoint_keep": integer(1),
    "serve": boolean(),
    "text_cache": text().optional(),
    # RecBole's own keys whose default differs here
    "epochs": integer(1),
    "stopping_step": integer(0),
    "valid_metric": text(),
    "metrics": Rule(
        "the name of a metric or a list of such names",
        lambda v: _one_or_many(v, lambda x: isinstance(x, str) and x != ""),
    ),
    "topk": Rule(
        "an integer of at least 1 or a list of such integers",
        lambda v: _one_or_many(v, lambda x: is_integer(x) and x > 0),
    ),
    "metric_decimal_place": integer(0),
    "MAX_ITEM_LIST_LENGTH": integer(1),
    "data_path": text().optional(),
    "use_gpu": boolean(),
}

RECBOLE_SCHEMA: dict[str, Rule] = {
    # numpy's generator, which RecBole seeds with it, takes no more than 32 bits.
    "seed": Rule("an integer from 0 to 4294967295", lambda v: is_integer(v) and 0 <= v < 2**32),
    "train_batch_size": integer(1),
    "eval_batch_size": integer(1),
    "eval_step": integer(0),
    "learning_rate": positive(),
    "weight_decay": non_negative(),
    "worker": integer(0),
    "loss_decimal_place": integer(0),
    "embedding_size": integer(1),
    "hidden_size": integer(1),
    "show_progress": boolean(),
    "reproducibility": boolean(),
    "shuffle": boolean(),
    "enable_amp": boolean(),
    "state": choice("debug", "info", "warning", "error", "critical", any_case=True).optional(),
    # RecBole trains with Adam, after a warning, where it does not know the name.
    "learner": choice("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam", any_case=True),
    "clip_grad_norm": Rule("a dict of arguments of clip_grad_norm_", lambda v: isinstance(v, dict)).optional(),
    "eval_args": Rule("a dict", lambda v: isinstance(v, dict)),
    "load_col": Rule("a dict of lists of columns", lambda v: isinstance(v, dict)).optional(),
    "threshold": Rule(
        "a dict of one column and its number, such as {rating: 4}",
        lambda v: isinstance(v, dict) and len(v) == 1 and all(is_number(x) for x in v.values()),
    ).optional(),
}


def check(values: Mapping[str, Any]) -> None:
    """Checks every value that has a rule.

    Args:
        values: All effective properties.

    Raises:
        ConfigError: If one breaks its rule, or two contradict each other.
    """
    for rules in (SCHEMA, RECBOLE_SCHEMA):
        for key, rule in rules.items():
            if key in values:
                rule.check(key, values[key])
    stride, window = values.get("window_stride"), values.get("window")
    if stride is not None and stride > (window or values.get("MAX_ITEM_LIST_LENGTH", stride)):
        raise ConfigError(
            f"property 'window_stride' is {stride}, more than the window of {window or values['MAX_ITEM_LIST_LENGTH']} "
            "inputs: the targets between two windows would never be trained on; make it at most the window"
        )


_TYPES: dict[str, Callable[[Any], bool]] = {
    "int": is_integer,
    "float": is_number,
    "bool": lambda v: isinstance(v, bool),
    "str": lambda v: isinstance(v, str),
    "list": lambda v: isinstance(v, list | tuple),
    "dict": lambda v: isinstance(v, dict),
    "none": lambda v: v is None,
}
# ``key: value   # (type) meaning``; the value may hold a '#' only inside quotes, which none of ours does.
_DECLARATION = re.compile(r"^([A-Za-z_]\w*):([^#]*)#\s*\(([^)]+)\)")


def declared_types(path: Path) -> dict[str, tuple[str, ...]]:
    """Reads the types that the ``# (type) meaning`` comments of a properties file declare.

    Args:
        path: A YAML file.

    Returns:
        For each top-level key with such a comment the names of its types; a key whose default is ``~`` may be none.
    """
    types: dict[str, tuple[str, ...]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _DECLARATION.match(line)
        if match is None:
            continue
        # "list of float" declares a list.
        words = [part.split()[0].lower() for part in re.split(r",|\bor\b", match.group(3)) if part.split()]
        if match.group(2).strip() in ("~", "null", "None"):
            words.append("none")
        types[match.group(1)] = tuple(dict.fromkeys(words))
    return types


def check_declared(key: str, value: Any, words: tuple[str, ...]) -> None:
    """Checks a value against declared types; a word that is no type's name allows everything.

    Raises:
        ConfigError: If ``value`` is of none of the types.
    """
    if not all(word in _TYPES for word in words) or any(_TYPES[word](value) for word in words):
        return
    raise ConfigError(f"property {key!r} is {value!r}; it must be of type {' or '.join(words)}")
