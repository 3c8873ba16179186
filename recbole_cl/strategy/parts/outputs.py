"""What a model answers for users, for strategies that hold or distil outputs.

A part for strategies, not a strategy. RecBole's models have no common method for a user's representation, so each way
of getting one is recognised by the model's methods; a model that offers none is refused by name.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.model.general_recommender import BPR, LightGCN
from recbole.utils import ModelType
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from recbole_cl.errors import ConfigError
from recbole_cl.model.capabilities import capabilities
from recbole_cl.rng import ModelRandomness
from recbole_cl.strategy.context import StageContext

CACHES = ("restore_user_e", "restore_item_e")
Towers = tuple[torch.Tensor, torch.Tensor]
"""Vectors of all users ``[n_users, d]`` and of all items ``[n_items, d]``."""


def arguments(model: nn.Module, name: str) -> list[str] | None:
    """Returns the names of a method's arguments, or ``None`` where there is no such method."""
    method = getattr(type(model), name, None)
    return None if method is None else list(inspect.signature(method).parameters)[1:]


def _has_lookups(model: nn.Module) -> bool:
    return all(len(arguments(model, f"get_{kind}_embedding") or ()) == 1 for kind in ("user", "item"))


def has_vectors(model: nn.Module) -> bool:
    """Tells whether :func:`vectors` serves a model: BPR and the propagating models (LightGCN, NGCF, DGCF, ...)."""
    if getattr(model, "type", None) != ModelType.GENERAL or "pairwise" not in capabilities(model):
        return False
    return _has_lookups(model) or arguments(model, "forward") == []


def vectors(model: Any, users: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the vectors of users ``[U, d]`` and items ``[I, d]`` (propagated, in graph models) of given ids."""
    if _has_lookups(model):
        return model.get_user_embedding(users), model.get_item_embedding(items)
    all_users, all_items = model.forward()[:2]
    return all_users[users], all_items[items]


def check_layers(strategy: str, config: Any, model: nn.Module) -> None:
    """Raises a :class:`ConfigError` for models that :func:`layers` cannot serve."""
    if not any(isinstance(model, cls) and type(model).forward is cls.forward for cls in (BPR, LightGCN)):
        raise ConfigError(
            f"strategy: {strategy} cannot serve the model {config['model']}: it is written for two towers of users and "
            f"items, BPR and LightGCN; use one of them, or PersonalizedImitation, LwF or EWC"
        )


def layers(model: Any, towers: Towers | None = None) -> list[Towers]:
    """Returns the vectors of each layer of BPR (one) or LightGCN (its tables, then each propagation).

    Args:
        model: The model; LightGCN's graph is read from it.
        towers: Tables to propagate instead of the model's own, of any width.
    """
    users, items = (model.user_embedding.weight, model.item_embedding.weight) if towers is None else towers
    found = [(users, items)]
    if isinstance(model, LightGCN):
        both = torch.cat([users, items])
        for _ in range(model.n_layers):
            both = torch.sparse.mm(model.norm_adj_matrix, both)
            found.append((both[: len(users)], both[len(users) :]))
    return found


def final(found: list[Towers]) -> Towers:
    """Returns what scores are products of: the mean over layers."""
    if len(found) == 1:
        return found[0]
    users, items = zip(*found, strict=True)
    return torch.stack(users).mean(0), torch.stack(items).mean(0)


def check_user_vectors(strategy: str, config: Any, model: nn.Module) -> None:
    """Raises a :class:`ConfigError` for models that :func:`user_vectors` cannot serve."""
    forward = arguments(model, "forward")
    sequential = getattr(model, "type", None) == ModelType.SEQUENTIAL and forward == ["item_seq", "item_seq_len"]
    if not ("user_representation" in capabilities(model) or has_vectors(model) or sequential):
        raise ConfigError(
            f"strategy: {strategy} cannot serve the model {config['model']}, which gives no user representation: it "
            f"has neither user_representation(batch), nor get_user_embedding(user) with get_item_embedding(item), nor "
            f"a forward() of all users and items or of (item_seq, item_seq_len); use EWC, SI or another model"
        )


def user_vectors(model: Any, batch: Interaction) -> torch.Tensor:
    """Returns the model's vector of each row's user (of each row's history in sequential models), shape ``[B, d]``."""
    if "user_representation" in capabilities(model):
        found: torch.Tensor = model.user_representation(batch)
        return found
    if getattr(model, "type", None) == ModelType.SEQUENTIAL:
        found = model.forward(batch[model.ITEM_SEQ], batch[model.ITEM_SEQ_LEN])
        return found
    users = batch[model.USER_ID]
    return vectors(model, users, users[:0])[0]


@contextlib.contextmanager
def second_forward(ctx: StageContext, name: str) -> Iterator[None]:
    """Lets the trained model run once more in a step without a trace, so that strength 0 keeps FineTune's bits.

    Dropout draws from a generator of the owner's, running statistics of BatchNorm stay as they are, and what RecBole's
    graph models keep of a propagation is dropped.
    """
    norms = [m for m in ctx.model.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.training = False
    seed = int(ctx.generator(f"{name}/dropout").integers(2**31))
    try:
        with ModelRandomness(seed).owned():
            yield
    finally:
        for norm in norms:
            norm.training = True
        for module in ctx.model.modules():
            for cache in CACHES:
                if getattr(module, cache, None) is not None:
                    setattr(module, cache, None)
