"""What follows from the model's type and loss, and from the labels of a log: repeats, negatives, evaluation."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

from recbole.utils import InputType, ModelType

from recbole_cl.config.models import reads
from recbole_cl.errors import ConfigError, nearest


def settle_repeats(final: dict[str, Any]) -> bool:
    """Resolves ``repeatable``: RecBole refuses sequential models without it, whatever its user wants.

    Args:
        final: The effective properties; ``repeatable`` becomes what RecBole has to be told.

    Returns:
        Whether an item that a user had before may be recommended again.
    """
    choice = final["repeatable"]
    if isinstance(choice, str):
        choice = {"true": True, "false": False}.get(choice.lower(), "auto")
    sequential = final["MODEL_TYPE"] == ModelType.SEQUENTIAL
    repeatable = sequential if choice == "auto" else choice
    final["repeatable"] = True if sequential else repeatable
    return repeatable


def settle_loss(final: Mapping[str, Any], model: str, model_class: type) -> None:
    """Checks the loss of a model whose input follows from it.

    Raises:
        ConfigError: If RecBole knows no input for the loss.
    """
    given = final.get("loss_type")
    if not hasattr(model_class, "input_type") and given not in ("BPR", "CE"):
        hint = nearest(str(given), ("BPR", "CE")) or "."
        raise ConfigError(
            f"loss_type: {given!r} is none of BPR, CE{hint} The model {model!r} compares a target with a negative, or "
            f"with all items"
        )


def settle_negatives(final: dict[str, Any], model: str, asked: Collection[str]) -> None:
    """Takes the negative samples away from a sequential model whose cross-entropy is over all items.

    RecBole's default asks for a negative each and is then refused.

    Args:
        final: The effective properties; ``train_neg_sample_args`` is set.
        model: Name of the model.
        asked: Properties that were set above RecBole's quick start.

    Raises:
        ConfigError: If negatives were asked for.
    """
    if final["MODEL_TYPE"] != ModelType.SEQUENTIAL or final.get("loss_type") != "CE":
        return
    given = final.get("train_neg_sample_args") if "train_neg_sample_args" in asked else None
    distribution = given.get("distribution", "uniform") if isinstance(given, dict) else given
    if distribution not in (None, "None", "none"):
        raise ConfigError(
            f"property 'train_neg_sample_args' is {given!r}, but model {model!r} has loss_type 'CE', "
            "which compares with all items; leave it out or set loss_type to 'BPR'"
        )
    final["train_neg_sample_args"] = None


def check_negatives(final: Mapping[str, Any], model_class: type) -> None:
    """Checks that a model which compares an item with another one is given negatives.

    Raises:
        ConfigError: If ``train_neg_sample_args`` asks for none.
    """
    none, kind = final["train_neg_sample_args"]["distribution"] == "none", final["MODEL_INPUT_TYPE"]
    if final["MODEL_TYPE"] == ModelType.SEQUENTIAL and final.get("loss_type") == "CE":
        return  # SINE says PAIRWISE, and compares with all items under this loss
    if none and kind == InputType.PAIRWISE and reads(model_class, "NEG_ITEM_ID"):
        raise ConfigError(
            f"property 'train_neg_sample_args' is None, but model {model_class.__name__!r} compares each item with a "
            f"negative; set train_neg_sample_args: {{distribution: uniform, sample_num: 1}}"
        )


def rank_without_labels(final: dict[str, Any], asked: Collection[str], overall: Mapping[str, Any]) -> None:
    """Makes a ranker of a context-aware model on a log without labels.

    RecBole's quick start takes a context-aware model for a classifier of labelled rows: no negative samples, AUC and
    LogLoss. It fails on a log without labels. There the model learns to tell what was taken from sampled items, and is
    judged as a ranker, as its users set by hand; of 100 sampled items and the target, since such a model has to compute
    each pair anew. Whatever is set explicitly stays.

    Args:
        final: The effective properties; negatives, ``eval_args`` and metrics are set.
        asked: Properties that were set above RecBole's quick start.
        overall: Our general properties.
    """
    if "train_neg_sample_args" not in asked:
        final["train_neg_sample_args"] = {"distribution": "uniform", "sample_num": 1}
    if "eval_args" not in asked:
        final["eval_args"] = {**final["eval_args"], "mode": "uni100"}
    if not {"metrics", "valid_metric"} & set(asked):
        final.update({key: copy.deepcopy(overall[key]) for key in ("metrics", "valid_metric")})
