"""What a model offers beyond RecBole's ``calculate_loss`` and ``predict``.

A strategy names what it needs; a model that lacks it is refused by name before anything is trained. A model offers a
capability by having the method, or by listing further ones in a class attribute ``capabilities``.
"""

from __future__ import annotations

from recbole.utils import InputType, ModelType
from torch import nn

from recbole_cl.config.models import traits_of
from recbole_cl.model.contract import contract, offers

METHODS = ("per_sample_loss", "user_representation", "scores", "adapter_groups", "full_sort_predict", "predict_task")


def capabilities(model: nn.Module) -> frozenset[str]:
    """Returns the names of what a model offers.

    ``gradient`` every model with trainable parameters and a differentiable loss; ``batch_rows`` models that train on
    rows of interactions (not RecBole's whole-user batches); ``pairwise`` and ``pointwise`` by their input type; the
    methods of :data:`METHODS` where the class implements them; and what the class lists itself.
    """
    found = set(contract(model).capabilities)
    # RecBole's closed-form models have one parameter that nothing reads, since its trainer needs one.
    trained = any(p.requires_grad for name, p in model.named_parameters() if name != "dummy_param")
    if trained and getattr(model, "type", None) != ModelType.TRADITIONAL:
        found.add("gradient")
    if not traits_of(model).user_batches:
        found.add("batch_rows")
    kind = getattr(model, "input_type", None)
    if kind is not None:
        found.add("pairwise" if kind == InputType.PAIRWISE else "pointwise")
    found |= {name for name in METHODS if offers(model, name)}
    return frozenset(found)
