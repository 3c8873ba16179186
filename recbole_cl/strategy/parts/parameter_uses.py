"""Where a model uses its parameters: each use is noted, and a shift is added to its output.

A part for strategies, not a strategy. Uses are seen where PyTorch's functions are called (a ``TorchFunctionMode``), not
in modules, so a table that is tied, indexed or transposed by hand counts as much as a layer. A parameter in a function
that has no rule here is refused; the caller then takes gradients sample by sample
(:mod:`recbole_cl.strategy.parts.per_sample_gradients`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Refused(Exception):
    """A parameter is used in a way that has no rule here."""


@dataclass(frozen=True)
class Part:
    """One parameter's share in a use.

    Args:
        name: The parameter.
        kind: ``rows``, ``outer`` (``delta x a``), ``outer_t`` (``a x delta``), ``sum`` or ``scale``.
        saved: Number of the saved input; -1 for none.
        padding: Row whose gradient is not taken; -1 for none.
    """

    name: str
    kind: str
    saved: int = -1
    padding: int = -1


class Recorder(TorchFunctionMode):
    """Adds shifts to the outputs of parameters' uses and notes what each use was.

    Args:
        names: Names of the parameters by ``id``.
        shifts: What to add, in the order of uses; ``None`` only notes the outputs' shapes.

    Attributes:
        uses: For each use its parts.
        saved: Inputs that the parts need.
        shapes: Shape and type of each use's output.
    """

    def __init__(self, names: Mapping[int, str], shifts: list[torch.Tensor] | None = None) -> None:
        super().__init__()
        self.names, self.shifts = names, shifts
        self.uses: list[list[Part]] = []
        self.saved: list[torch.Tensor] = []
        self.shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._transposed: dict[int, tuple[torch.Tensor, str]] = {}  # the tensor is kept, so its id is not reused

    def name(self, value: Any) -> str | None:
        """Returns the name of a parameter, ``None`` for everything else."""
        return self.names.get(id(value)) if torch.is_tensor(value) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = list(_flat((args, kwargs.values())))
        if not any(id(v) in self.names or id(v) in self._transposed for v in values):
            return func(*args, **kwargs)
        rule = RULES.get(getattr(func, "__name__", ""))
        if rule is not None:
            return rule(self, *args, **kwargs)
        out = func(*args, **kwargs)
        if not torch.is_tensor(out):
            return out  # a shape, a type, a device
        if self.name(args[0]) and out.dim() == 2 and _is_transpose(func, args):
            self._transposed[id(out)] = (out, self.names[id(args[0])])
            return out
        raise Refused(f"{getattr(func, '__name__', func)} of {self.name(args[0]) or 'a parameter'}")

    def save(self, value: torch.Tensor) -> int:
        """Keeps an input and returns its number."""
        self.saved.append(value)
        return len(self.saved) - 1

    def use(self, out: torch.Tensor, parts: list[Part]) -> torch.Tensor:
        """Notes a use and returns its output with the shift added."""
        if not parts:
            return out
        self.uses.append(parts)
        self.shapes.append((out.shape, out.dtype))
        return out if self.shifts is None else out + self.shifts[len(self.uses) - 1]

    # -- rules ----------------------------------------------------------------------------------------------------

    def plain(self, *values: Any) -> None:
        """Refuses parameters where a rule expects data."""
        for value in values:
            if torch.is_tensor(value) and (id(value) in self.names or id(value) in self._transposed):
                raise Refused("a parameter where data are expected")

    def embedding(
        self, ids: torch.Tensor, weight: torch.Tensor, padding_idx: int | None = None, max_norm: Any = None,
        norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """A table read by ids."""
        if max_norm is not None or scale_grad_by_freq or self.name(weight) is None:
            raise Refused("an embedding with max_norm or scale_grad_by_freq")
        padding = -1 if padding_idx is None else padding_idx % len(weight)
        return self.use(weight[ids], [Part(self.names[id(weight)], "rows", self.save(ids), padding)])

    def getitem(self, weight: torch.Tensor, ids: Any) -> torch.Tensor:
        """A table read by ids, as ``table[ids]``."""
        if self.name(weight) is None or not torch.is_tensor(ids) or ids.dtype != torch.int64:
            raise Refused("a part of a parameter")
        return self.use(weight[ids], [Part(self.names[id(weight)], "rows", self.save(ids))])

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """``x W^T + b``."""
        self.plain(x)
        parts = []
        if (name := self.name(weight)) is not None:
            parts.append(Part(name, "outer", self.save(x)))
        if (name := self.name(bias)) is not None:
            parts.append(Part(name, "sum"))
        return self.use(F.linear(x, weight, bias), parts)

    def matmul(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``x W`` and, for a transposed table, ``x W^T``."""
        self.plain(x)
        if weight.dim() != 2 or x.dim() < 2:
            raise Refused("a product with a vector")
        if id(weight) in self._transposed:
            part = Part(self._transposed[id(weight)][1], "outer", self.save(x))
        else:
            part = Part(self.names[id(weight)], "outer_t", self.save(x))
        return self.use(torch.matmul(x, weight), [part])

    def add(self, x: Any, y: Any) -> torch.Tensor:
        """``x + p``, broadcast."""
        x, p = (y, x) if self.name(x) is not None else (x, y)
        self.plain(x)
        return self.use(x + p, [Part(self.names[id(p)], "sum")])

    def mul(self, x: Any, y: Any) -> torch.Tensor:
        """``x p``, broadcast."""
        x, p = (y, x) if self.name(x) is not None else (x, y)
        self.plain(x)
        out = x * p
        saved = torch.as_tensor(x, dtype=out.dtype, device=out.device).expand(out.shape)
        return self.use(out, [Part(self.names[id(p)], "scale", self.save(saved))])

    def layer_norm(
        self, x: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None,
        eps: float = 1e-5,
    ) -> torch.Tensor:  # fmt: skip
        """The normalised input, then scale and shift."""
        self.plain(x)
        return self._affine(F.layer_norm(x, shape, None, None, eps), weight, bias)

    def batch_norm(
        self, x: torch.Tensor, mean: torch.Tensor | None, var: torch.Tensor | None, weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
    ) -> torch.Tensor:  # fmt: skip
        """Running statistics, then scale and shift; batch statistics couple samples."""
        self.plain(x, mean, var)
        if training or mean is None or x.dim() != 2:
            raise Refused("BatchNorm with statistics of the batch, or over positions")
        return self._affine(F.batch_norm(x, mean, var, None, None, False, momentum, eps), weight, bias)

    def _affine(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        parts, out = [], x
        if weight is not None:
            out = out * weight
            if (name := self.name(weight)) is not None:
                parts.append(Part(name, "scale", self.save(x)))
        if bias is not None:
            out = out + bias
            if (name := self.name(bias)) is not None:
                parts.append(Part(name, "sum"))
        return self.use(out, parts)

    def gru(
        self, x: torch.Tensor, start: torch.Tensor, weights: Any, has_bias: bool, layers: int, dropout: float,
        training: bool, bidirectional: bool, batch_first: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """``nn.GRU`` step by step: gates r, z and candidate n (Cho et al. 2014, in PyTorch's arrangement)."""
        if bidirectional or (training and dropout) or not torch.is_tensor(start):
            raise Refused("a GRU with two directions, dropout or packed sequences")
        self.plain(x, start)
        x, per = (x if batch_first else x.transpose(0, 1)), 4 if has_bias else 2
        ends = []
        for layer in range(layers):
            w_in, w_on, b_in, b_on = (*weights[layer * per : (layer + 1) * per], None, None)[:4]
            steps, h, outputs = self.linear(x, w_in, b_in), start[layer], []
            for t in range(x.shape[1]):
                now, then = steps[:, t].chunk(3, -1), self.linear(h, w_on, b_on).chunk(3, -1)
                r, z = torch.sigmoid(now[0] + then[0]), torch.sigmoid(now[1] + then[1])
                n = torch.tanh(now[2] + r * then[2])
                h = n + z * (h - n)
                outputs.append(h)
            x = torch.stack(outputs, 1)
            ends.append(h)
        return (x if batch_first else x.transpose(0, 1)), torch.stack(ends)


RULES: dict[str, Callable[..., Any]] = {
    "embedding": Recorder.embedding,
    "__getitem__": Recorder.getitem,
    "linear": Recorder.linear,
    "matmul": Recorder.matmul,
    "add": Recorder.add,
    "mul": Recorder.mul,
    "layer_norm": Recorder.layer_norm,
    "batch_norm": Recorder.batch_norm,
    "gru": Recorder.gru,
}
"""Rules by the name of PyTorch's function; a tensor's method and the function of that name take the same arguments."""


def _flat(value: Any) -> Iterator[Any]:
    for part in value:
        if isinstance(part, list | tuple | type({}.values())):
            yield from _flat(part)
        else:
            yield part


def _is_transpose(func: Any, args: Any) -> bool:
    if func == torch.Tensor.T.__get__:  # type: ignore[attr-defined]
        return True
    name = getattr(func, "__name__", "")
    return name == "t" or (name in ("transpose", "permute") and sorted(x % 2 for x in _flat(args[1:])) == [0, 1])
