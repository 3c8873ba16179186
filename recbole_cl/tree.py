"""Nested states (dicts and lists of tensors, arrays and plain values): copies and hashes; a model that only answers."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn


class FrozenTensors(dict[str, torch.Tensor]):
    """Tensors of a frozen base that a run has made itself: its checkpoints refer to one file that holds them.

    Whoever holds one takes it that its tensors do not change.
    """

    @functools.cached_property
    def name(self) -> str:
        """The name of that file: a hash of names, shapes and content."""
        return tree_hash({key: (list(tensor.shape), tensor) for key, tensor in sorted(self.items())})


@contextlib.contextmanager
def answering(model: nn.Module) -> Iterator[None]:
    """A context in which a model is in eval mode; afterwards each of its modules has the mode that it had.

    ``train()`` is not called for that: some models of RecBole draw random graphs there (SGL), which would then depend
    on what was looked at.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def clone_tree(value: Any) -> Any:
    """Returns a deep copy of a state on the CPU: nothing in it shares memory with the original.

    Tensors that were tied are tied in the copy, so that a checkpoint stores them once.
    """
    copies: dict[tuple[Any, ...], torch.Tensor] = {}

    def clone(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if not value.numel():
                return value.detach().to("cpu", copy=True)
            key = (value.data_ptr(), value.shape, value.stride(), value.dtype, value.device)
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, np.ndarray):
            return value.copy()
        if isinstance(value, Mapping):
            copy = {k: clone(v) for k, v in value.items()}
            if not isinstance(value, FrozenTensors):
                return copy
            frozen = FrozenTensors(copy)
            frozen.__dict__.update(value.__dict__)  # the name, where it is known: it costs a pass over the tensors
            return frozen
        if isinstance(value, (list, tuple)):
            return [clone(v) for v in value]
        return value

    return clone(value)


def tree_hash(*trees: Any) -> str:
    """Returns a hash of every leaf of the given states."""
    digest = hashlib.blake2b(digest_size=16)

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach().to("cpu").contiguous()
            digest.update(str(value.dtype).encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
        elif isinstance(value, np.ndarray):
            digest.update(
                np.ascontiguousarray(value).tobytes() if value.dtype != object else repr(value.tolist()).encode()
            )
        elif isinstance(value, Mapping):
            for key in value:
                digest.update(str(key).encode())
                walk(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                walk(item)
        else:
            digest.update(repr(value).encode())

    for tree in trees:
        walk(tree)
    return digest.hexdigest()
