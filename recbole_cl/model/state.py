"""What of a model is owned by the run: its state without frozen bases, plus what RecBole keeps beside parameters."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch
from recbole.utils import ModelType
from torch import nn

from recbole_cl.config.models import traits_of
from recbole_cl.errors import CheckpointError
from recbole_cl.model.contract import contract, offers
from recbole_cl.stream.vocabulary import Growth, carry, infer_axes
from recbole_cl.tree import FrozenTensors, clone_tree

RUN = "run"
"""Source of a frozen base that the run has trained itself: it is written once, beside the checkpoints."""


def frozen_bases(model: Any) -> dict[str, dict[str, str]]:
    """Returns the frozen parts of a model that come from elsewhere: prefix of their names to source and sha256.

    A model that builds on a pretrained base declares it (:class:`~recbole_cl.model.contract.ContinualModel`); the base
    is referred to in checkpoints, not stored. Parts that the run has made itself are not among them.
    """
    declared = contract(model).frozen_bases()
    return {
        prefix: {key: base[key] for key in ("source", "sha256")}
        for prefix, base in declared.items()
        if base["source"] != RUN
    }


def base_names(model: Any, made_here: bool = False) -> frozenset[str]:
    """Returns the names of the tensors that belong to frozen bases: those that are named, or all below the prefix.

    ``base`` holds ``base.weight``, not ``base2.weight``.

    Args:
        model: The model.
        made_here: The bases that the run has made itself, in place of those that come from elsewhere.
    """
    names: set[str] = set()
    for prefix, base in contract(model).frozen_bases().items():
        if (base["source"] == RUN) != made_here:
            continue
        below = {n for n in model.state_dict() if n == prefix or n.startswith(prefix.rstrip(".") + ".")}
        names |= below & set(base["names"]) if "names" in base else below
    return frozenset(names)


def freeze(model: nn.Module, names: Container[str]) -> None:
    """Says of the named parameters that they are not trained."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in names:
            parameter.requires_grad_(False)


def owned_state(model: Any) -> dict[str, Any]:
    """Returns the tensors that a checkpoint holds, RecBole's ``other_parameter`` and state that is no parameter.

    ``frozen`` has those of bases that the run has made itself, which its checkpoints share.
    """
    theirs, frozen = base_names(model), base_names(model, made_here=True)
    tensors = {k: v for k, v in model.state_dict().items() if k not in theirs}
    state = {
        "tensors": {k: v for k, v in tensors.items() if k not in frozen},
        "frozen": FrozenTensors({k: v for k, v in tensors.items() if k in frozen}),
        "bases": frozen_bases(model),
        "other": others(model),
    }
    if offers(model, "owned_state"):
        state["owned"] = model.owned_state()
    return state


def others(model: Any) -> dict[str, Any]:
    """Returns what a checkpoint holds of RecBole's ``other_parameter``."""
    # Memory-based models (ItemKNN, EASE) compute theirs from the data when they are made; only what training
    # accumulates (Pop's counts) is carried.
    if not hasattr(model, "other_parameter"):
        return {}
    kept = (torch.Tensor, np.ndarray, int, float)
    return {k: v for k, v in model.other_parameter().items() if isinstance(v, kept) and not isinstance(v, bool)}


def load_owned_state(model: Any, state: Mapping[str, Any]) -> None:
    """Puts an owned state back.

    Raises:
        CheckpointError: If keys are missing or a frozen base is another one.
    """
    bases = frozen_bases(model)
    for prefix in sorted({*state["bases"], *bases}):
        saved, have = state["bases"].get(prefix), bases.get(prefix)
        if saved is None or have is None or have["sha256"] != saved["sha256"]:
            raise CheckpointError(
                f"checkpoint: it was trained on {_base_name(saved)} under {prefix!r}, this run has {_base_name(have)}; "
                f"give it that base, or start anew in another output_dir"
            )
    state = contract(model).fit_state(state)
    frozen = state.get("frozen", {})
    missing = model.load_state_dict({**state["tensors"], **frozen}, strict=False)
    theirs = base_names(model)
    freeze(model, frozen)
    lost = [k for k in missing.missing_keys if k not in theirs]
    if lost or missing.unexpected_keys:
        raise CheckpointError(
            f"checkpoint: the model misses {lost or 'nothing'} and does not know {list(missing.unexpected_keys)}"
        )
    if state["other"]:
        model.load_other_parameter({k: _copy(v) for k, v in state["other"].items()})
    if "owned" in state:
        model.load_owned_state(state["owned"])


def _base_name(base: Mapping[str, str] | None) -> str:
    return "no frozen base" if base is None else f"the frozen base {base['source']!r} (sha256 {base['sha256'][:12]})"


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value.copy() if isinstance(value, np.ndarray) else value


def grow_model(
    old: Any, new: Any, n_users: tuple[int, int], n_items: tuple[int, int], new_rows: str
) -> tuple[Growth, list[str]]:
    """Carries the weights of one stage's model into the next one's.

    Args:
        old: Model of the stage before.
        new: Model of this stage, freshly initialised, with this stage's numbers of rows.
        n_users: Users (before, after).
        n_items: Items (before, after).
        new_rows: See :func:`recbole_cl.stream.vocabulary.carry`.

    Returns:
        The growth, and the names of old tensors that have no place in the new model.
    """
    growth = Growth(n_users, n_items, infer_axes(old, new, n_users, n_items))
    theirs = base_names(new)
    state = {k: v for k, v in old.state_dict().items() if k not in theirs}
    lost = carry(state, new, growth, new_rows)
    freeze(new, base_names(old, made_here=True))
    if getattr(new, "type", None) != ModelType.TRADITIONAL or traits_of(new).counts:
        _carry_others(old, new, n_users, n_items)
    if offers(old, "owned_state"):
        new.load_owned_state(contract(new).grow_owned_state(clone_tree(old.owned_state()), growth))
    return growth, lost


def _carry_others(old: Any, new: Any, n_users: tuple[int, int], n_items: tuple[int, int]) -> None:
    before, after = others(old), others(new)
    grown: dict[str, Any] = {}
    for name, value in before.items():
        fresh = after.get(name)
        if not isinstance(value, torch.Tensor) or not isinstance(fresh, torch.Tensor) or not value.dim():
            grown[name] = _copy(value)
            continue
        holder_old, holder_new = nn.Module(), nn.Module()
        holder_old.register_buffer(name, value)
        holder_new.register_buffer(name, fresh)
        axes = infer_axes(holder_old, holder_new, n_users, n_items)
        grown[name] = Growth(n_users, n_items, axes).expand(name, value, fresh)
    if grown:
        new.load_other_parameter(grown)


def count_parameters(model: nn.Module) -> tuple[int, int, int]:
    """Returns trainable numbers (frozen rows left out), all numbers, and bytes of a model; tied tensors count once."""
    unique = {p.data_ptr(): p for p in model.parameters()}.values()
    trainable = sum(p.numel() for p in unique if p.requires_grad) - int(contract(model).masked_entries)
    return trainable, sum(p.numel() for p in unique), sum(p.numel() * p.element_size() for p in unique)
