"""What a property may be: types, choices and ranges, told in the words that an error message needs.

:data:`SCHEMA` has one rule for every key of ``properties/overall.yaml`` (a test holds the two together),
:data:`RECBOLE_SCHEMA` for RecBole's common properties and :data:`MODEL_SCHEMA` for those of models and parts, which
RecBole itself passes on unchecked. Properties of strategies, schedulers and models are checked against the
``# (type)`` comment of their line by :func:`check_declared`. What one property may be stands here and nowhere else,
which is why this file is long.
"""

from __future__ import annotations

import codecs
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


LARGEST = 2**31 - 1
"""Of sizes and counts: what the arrays behind them can hold at all."""


def integer(low: int, high: int = LARGEST) -> Rule:
    """An int of at least ``low`` and at most ``high``."""
    return Rule(f"an integer of at least {low} and at most {high}", lambda v: is_integer(v) and low <= v <= high)


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


def fraction(whole: bool = True) -> Rule:
    """A number from 0 to 1; with ``whole`` 1 as well."""
    end = "1" if whole else "1, 1 excluded"
    return Rule(f"a number from 0 to {end}", lambda v: is_number(v) and (0 <= v < 1 or (whole and v == 1)))


def many(rule: Rule, *, or_one: bool = False) -> Rule:
    """A list whose values have a rule; with ``or_one`` also one such value."""
    words = f"a list, each of its values {rule.allowed}"
    return Rule(
        f"{rule.allowed}, or {words}" if or_one else words,
        lambda v: (isinstance(v, list | tuple) and all(map(rule.accepts, v))) or (or_one and rule.accepts(v)),
    )


def path() -> Rule:
    """A text that can be a path here."""

    def accepts(value: Any) -> bool:
        if not isinstance(value, str) or not value or "\0" in value:
            return False
        try:
            Path(value).expanduser()
        except RuntimeError:  # ~nosuch
            return False
        return True

    return Rule(
        "a text that can be a path here, without the character NUL and without the home (~) of an unknown user", accepts
    )


def _encoding(value: Any) -> bool:
    try:
        return isinstance(value, str) and codecs.lookup(value)._is_text_encoding  # type: ignore[attr-defined]
    except (LookupError, ValueError):
        return False


_INTERVAL = re.compile(r"\s*[\[(]\s*[^,;\s]+\s*,\s*[^,;\s]+\s*[\])]\s*")


def _interval(value: Any) -> bool:
    """Tells whether a value is one of RecBole's texts of intervals, as ``[5,inf)``, several apart by ``;``."""
    if not isinstance(value, str):
        return False
    for part in value.split(";"):
        if not _INTERVAL.fullmatch(part):
            return False
        try:
            low, high = (float(end) for end in part.strip()[1:-1].split(","))
        except ValueError:
            return False
        if not low <= high:
            return False
    return True


def _columns(value: Any) -> bool:
    return value == "*" or (isinstance(value, list | tuple) and all(isinstance(v, str) and v for v in value))


def _clipping(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and {"max_norm"} <= value.keys() <= {"max_norm", "norm_type", "error_if_nonfinite", "foreach"}
        and is_number(value["max_norm"])
        and value["max_norm"] > 0
        and _norm(value.get("norm_type", 2))
        and all(value.get(key) in (None, True, False) for key in ("error_if_nonfinite", "foreach"))
    )


def _norm(value: Any) -> bool:
    return value == math.inf or (is_number(value) and value > 0)


def _negatives(value: Any) -> bool:
    """Tells whether a value is RecBole's dict of training negatives, without parts that would have no effect."""
    if not isinstance(value, dict) or not value.keys() <= {
        "distribution", "sample_num", "alpha", "dynamic", "candidate_num"
    }:  # fmt: skip
        return False
    how = value.get("distribution", "uniform")
    if how in (None, "None", "none"):
        return True
    dynamic, candidates, alpha = value.get("dynamic", False), value.get("candidate_num", 0), value.get("alpha", 1.0)
    return (
        how in ("uniform", "popularity")
        and _COUNT.accepts(value.get("sample_num", 1))
        and is_number(alpha)
        and (alpha == 1 or how == "popularity")
        and isinstance(dynamic, bool)
        and (_COUNT.accepts(candidates) if dynamic else candidates == 0 and is_integer(candidates))
    )


def _evaluation(value: Any) -> bool:
    if not isinstance(value, dict) or not value.keys() <= {"split", "order", "group_by", "mode"}:
        return False
    mode, split = value.get("mode", "full"), value.get("split")
    return (
        (not isinstance(mode, dict) or (bool(mode) and mode.keys() <= {"valid", "test"}))
        and value.get("order", "RO") in ("RO", "TO")
        and value.get("group_by", "user") in ("user", "none", None)
        and (split is None or (isinstance(split, dict) and len(split) == 1 and split.keys() <= {"RS", "LS"}))
        and (split is None or "RS" not in split or _ratios(split["RS"]))
        and (split is None or "LS" not in split or split["LS"] in ("valid_and_test", "valid_only", "test_only"))
    )


def _buckets(value: Any) -> bool:
    def accepts(how: Any) -> bool:
        if not isinstance(how, dict) or not how.keys() <= {"method", "bucket"}:
            return False
        buckets = integer(2, 1_000_000)
        return how.get("method") == "LD" or (how.get("method") == "ED" and buckets.accepts(how.get("bucket")))

    return isinstance(value, dict) and all(isinstance(key, str) and accepts(how) for key, how in value.items())


def names() -> Rule:
    """A list of texts."""
    return Rule("a list of names", lambda v: isinstance(v, list | tuple) and all(isinstance(x, str) and x for x in v))


def columns_by_file(example: str) -> Rule:
    """RecBole's dict of lists of columns by a file's suffix, or of '*' for all of a file."""
    return Rule(
        f"a dict of lists of columns, such as {{{example}}}, or of '*' for all of a file",
        lambda v: isinstance(v, dict) and all(isinstance(k, str) for k in v) and all(map(_columns, v.values())),
    )


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
    "output_dir": path().optional(),
    "resume": boolean(),
    "keep_base": boolean(),
    "base_run": text().optional(),
    "checkpoint_steps": integer(1).optional(),
    "checkpoint_keep": integer(1),
    "serve": boolean(),
    "text_cache": path().optional(),
    # RecBole's own keys whose default differs here
    "epochs": integer(1),
    "stopping_step": integer(0),
    "valid_metric": text(),
    "metrics": Rule(
        "the name of a metric or a list of such names",
        lambda v: _one_or_many(v, lambda x: isinstance(x, str) and x != ""),
    ),
    "topk": Rule(
        "an integer of at least 1 and at most 10000 or a list of such integers",
        lambda v: _one_or_many(v, lambda x: is_integer(x) and 0 < x <= 10_000),
    ),
    "metric_decimal_place": integer(0, 300),
    "MAX_ITEM_LIST_LENGTH": integer(1),
    "data_path": path().optional(),
    "use_gpu": boolean(),
}

_COUNT = integer(1, 100_000)
_INTERVALS = Rule("an interval, such as '[5,inf)'", _interval).optional()

RECBOLE_SCHEMA: dict[str, Rule] = {
    # numpy's generator, which RecBole seeds with it, takes no more than 32 bits.
    "seed": Rule("an integer from 0 to 4294967295", lambda v: is_integer(v) and 0 <= v < 2**32),
    "train_batch_size": integer(1),
    "eval_batch_size": integer(1),
    "eval_step": integer(0),
    "learning_rate": positive(),
    "weight_decay": non_negative(),
    "worker": integer(0),
    "loss_decimal_place": integer(0, 300),
    "show_progress": boolean(),
    "reproducibility": boolean(),
    "shuffle": boolean(),
    "enable_amp": boolean(),
    "state": choice("debug", "info", "warning", "error", "critical", any_case=True).optional(),
    # RecBole trains with Adam, after a warning, where it does not know the name.
    "learner": choice("adam", "adamw", "sgd", "adagrad", "rmsprop", "sparse_adam", any_case=True),
    "clip_grad_norm": Rule(
        "a dict with max_norm, a number above 0, and norm_type where it is not 2, such as {max_norm: 5}", _clipping
    ).optional(),
    "eval_args": Rule(
        "a dict of mode ('full', 'uni100', ... or one each for valid and test) and, as far as the stream cuts stages "
        "so, of split ({RS: [0.8, 0.1, 0.1]} or {LS: valid_and_test}), order (TO or RO) and group_by (user or none)",
        _evaluation,
    ),
    "train_neg_sample_args": Rule(
        "a dict of distribution (uniform or popularity), sample_num (an integer of at least 1 and at most 100000), "
        "alpha (a number, with popularity), dynamic (True or False) and candidate_num (an integer of at least 1, with "
        "dynamic), such as {distribution: uniform, sample_num: 1}",
        lambda v: v == "None" or _negatives(v),
    ).optional(),
    "load_col": columns_by_file("inter: [user_id, item_id, timestamp]").optional(),
    "unload_col": columns_by_file("inter: [rating]").optional(),
    "unused_col": columns_by_file("inter: [rating]").optional(),
    "val_interval": Rule(
        "a dict of column to interval, such as {rating: '[3,inf)'}, or to a list of values",
        lambda v: (
            isinstance(v, dict)
            and all(isinstance(k, str) for k in v)
            and all(_interval(x) or isinstance(x, list | tuple) for x in v.values())
        ),
    ).optional(),
    **dict.fromkeys(
        ("user_inter_num_interval", "item_inter_num_interval", "entity_kg_num_interval", "relation_kg_num_interval"),
        _INTERVALS,
    ),
    "rm_dup_inter": choice("first", "last").optional(),
    "filter_inter_by_user_or_item": boolean(),
    **dict.fromkeys(
        ("alias_of_user_id", "alias_of_item_id", "alias_of_entity_id", "alias_of_relation_id", "normalize_field"),
        names().optional(),
    ),
    "numerical_features": names(),
    "additional_feat_suffix": Rule(
        "a text or a list of texts", lambda v: _one_or_many(v, lambda x: isinstance(x, str) and x != "") or v == []
    ).optional(),
    "preload_weight": Rule(
        "a dict of a column of ids to the column of its vectors, such as {iid: item_emb}",
        lambda v: isinstance(v, dict) and all(isinstance(x, str) and x for x in (*v, *v.values())),
    ).optional(),
    "normalize_all": boolean().optional(),
    "discretization": Rule(
        "a dict of column to {method: LD} or {method: ED, bucket: 10} (at least 2 buckets)", _buckets
    ).optional(),
    "seq_len": Rule(
        "a dict of column to its most values, integers of at least 1, such as {genres: 5}",
        lambda v: isinstance(v, dict) and all(isinstance(k, str) and _COUNT.accepts(x) for k, x in v.items()),
    ).optional(),
    "kg_reverse_r": boolean(),
    "require_pow": boolean(),
    "enable_scaler": boolean(),
    **dict.fromkeys(
        (
            "USER_ID_FIELD",
            "ITEM_ID_FIELD",
            "RATING_FIELD",
            "TIME_FIELD",
            "LABEL_FIELD",
            "NEG_PREFIX",
            "LIST_SUFFIX",
            "ITEM_LIST_LENGTH_FIELD",
            "HEAD_ENTITY_ID_FIELD",
            "TAIL_ENTITY_ID_FIELD",
            "RELATION_ID_FIELD",
            "ENTITY_ID_FIELD",
        ),
        text(),
    ),
    "encoding": Rule(
        "the name of an encoding of texts, such as utf-8, utf-8-sig (with a mark at its start), utf-16 or latin-1",
        _encoding,
    ).optional(),
    "field_separator": Rule(
        "a text without an end of line", lambda v: isinstance(v, str) and v.strip("\r\n") == v != ""
    ),
    "seq_separator": Rule("a text without an end of line", lambda v: isinstance(v, str) and v.strip("\r\n") == v != ""),
    "transform": choice(
        "mask_itemseq", "inverse_itemseq", "crop_itemseq", "reorder_itemseq", "user_defined"
    ).optional(),
    "loss_type": text(),
    "checkpoint_dir": path().optional(),
    "threshold": Rule(
        "a dict of one column and its number, such as {rating: 4}",
        lambda v: isinstance(v, dict) and len(v) == 1 and all(is_number(x) for x in v.values()),
    ).optional(),
}

_SIZE, _DEPTH = integer(1, 1_000_000), integer(1, 10_000)
_STRENGTH = many(non_negative(), or_one=True)
MODEL_SCHEMA: dict[str, Rule] = {
    key: rule
    for rule, keys in (
        (
            _SIZE,
            "embedding_size hidden_size inner_size attention_size hidden_dimension latent_dimension "
            "gcn_output_dim low_rank rank kg_embedding_size mf_embedding_size mlp_embedding_size "
            "ui_embedding_size item_embedding_size user_embedding_size neigh_embedding_size interest_size "
            "prototype_size num_conv_kernel n_memory n_factors "
            "minilm_batch_size random_width sentence_transformers_batch_size",
        ),
        (
            _DEPTH,
            "n_layers num_layers n_heads num_heads block_num cross_layer_num context_hops n_hop n_hops n_iterations "
            "depth expert_num k_interests mmoe_experts pcl_heads nv nh",
        ),
        (
            fraction(whole=False),
            "hidden_dropout_prob attn_dropout_prob dropout_prob drop_ratio dropout mess_dropout mess_dropout_rate "
            "message_dropout node_dropout node_dropout_rate item_dropout sess_dropout",
        ),
        (many(fraction(whole=False)), "dropout_probs"),
        (fraction(), "corruption_ratio tau_ratio ft_ratio"),
        (Rule("a number above 0 and at most 1", lambda v: is_number(v) and 0 < v <= 1), "mask_ratio"),
        (positive(), "initializer_range layer_norm_eps ssl_tau ssl_temp tau temperature soft_mask_scale"),
        (
            _STRENGTH,
            "reg_weight reg_weight_1 reg_weight_2 reg_weights kg_weight ssl_weight ssl_reg lmd lmd_sem proto_reg "
            "sim_regularity pcl_lambda",
        ),
        (integer(0), "pcl_memory_mb"),
        (
            many(_SIZE),
            "mlp_hidden_size hidden_size_list layers cin_layer_size encoder_hidden_size cnn_channels "
            "item_hidden_size_list user_hidden_size_list",
        ),
        (choice("gelu", "relu", "swish", "tanh", "sigmoid"), "hidden_act"),
    )
    for key in keys.split()
}
"""Properties of RecBole's models and of ours that mean the same wherever they stand."""


def check(values: Mapping[str, Any]) -> None:
    """Checks every value that has a rule.

    Args:
        values: All effective properties.

    Raises:
        ConfigError: If one breaks its rule, or two contradict each other.
    """
    for rules in (SCHEMA, RECBOLE_SCHEMA, MODEL_SCHEMA):
        for key, rule in rules.items():
            if key in values:
                rule.check(key, values[key])
    heads, width = values.get("n_heads"), values.get("hidden_size")
    if heads is not None and width is not None and width % heads:
        raise ConfigError(
            f"property 'n_heads' is {heads}, which does not divide property 'hidden_size' {width}: each head has an "
            f"equal part of it; change one of them"
        )
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
