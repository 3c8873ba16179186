"""Sums over samples of a function of every sample's gradient, without forming the gradients of whole tables.

A part for strategies, not a strategy. A gradient per sample costs a copy of the parameters per sample if one asks
autograd for it. Here a batch's rows are run together once (``torch.func.vmap``), every use of a parameter gets a
shift of zeros added to its output, and one backward pass gives the gradients of the shifts: ``delta``, per sample.
With the inputs ``a`` of the same use, a parameter's gradients, and the sums of ``f`` of them, follow by its kind:

=====================  ==============================================================================================
looked-up rows         ``f(delta)`` added into the rows that were read, after rows that a sample read twice are summed
linear, used once      ``f(delta)^T f(a)``, as ``f(x y) = f(x) f(y)``
linear, several        ``f(sum_l delta_l a_l^T)``: the sum over a sample's positions comes before ``f``
tied output            both: the linear part of the softmax and the rows of the input are summed before ``f``
bias, scale, norm      ``f`` of ``delta`` (times the input) summed over positions
GRU                    the cell written out, so that its weights are linear layers used several times
=====================  ==============================================================================================

Uses are seen where PyTorch's functions are called (a ``TorchFunctionMode``), not in modules, so a table that is tied,
indexed or transposed by hand counts as much as a layer. A parameter in any other function is refused; the caller then
takes gradients sample by sample, and it compares both on a few rows before it trusts this path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Rows = Mapping[str, torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]

FORWARD = 2**24
"""Numbers that the outputs of the parameters' uses may hold for one chunk of samples."""
MOST = 4096
"""Samples in a chunk at most."""
DENSE = 2**20
"""Numbers of whole gradients that are held at once (4 MiB of float32: about a core's cache)."""


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


Collected = dict[str, list[tuple[Part, torch.Tensor, torch.Tensor | None]]]
"""For each parameter its uses: the part, ``delta`` ``[N, ...]`` and the saved input ``[N, ...]``."""


class PerSample:
    """Sums of ``reduce`` of per-sample gradients, for rows of one shape.

    Args:
        objective: Maps one row (fields without a batch dimension) to a scalar.
        parameters: Parameters by name, the very tensors that the objective uses, not requiring gradients meanwhile.
        reduce: Elementwise ``f`` with ``f(x y) = f(x) f(y)``: the square, the absolute value.
        row: One row; its shapes are those of all.

    Attributes:
        chunk: Samples that may be taken at once.
    """

    def __init__(
        self, objective: Callable[[Rows], torch.Tensor], parameters: Mapping[str, torch.Tensor], reduce: Reduce,
        row: Rows,
    ) -> None:  # fmt: skip
        self.objective, self.parameters, self.reduce = objective, parameters, reduce
        self.names = {id(p): name for name, p in parameters.items()}
        recorder = self._run(row, None)[1]
        self.uses, self.shapes = recorder.uses, recorder.shapes
        held = sum(math.prod(shape) for shape, _ in self.shapes) + sum(s.numel() for s in recorder.saved)
        self.chunk = max(1, min(MOST, FORWARD // (2 * max(held, 1))))

    def _run(self, row: Rows, shifts: list[torch.Tensor] | None) -> tuple[torch.Tensor, Recorder]:
        recorder = Recorder(self.names, shifts)
        with recorder:
            value = self.objective(row)
        return value, recorder

    def collect(self, rows: Rows) -> Collected:
        """Returns the uses of each parameter with ``delta`` and input of all rows, of one forward and backward pass."""
        count = len(next(iter(rows.values())))
        device = next(iter(self.parameters.values())).device
        shifts = [torch.zeros((), dtype=d, device=device).expand(count, *s) for s, d in self.shapes]

        def of_row(shifts: list[torch.Tensor], row: Rows) -> tuple[torch.Tensor, list[torch.Tensor]]:
            value, recorder = self._run(row, shifts)
            if recorder.uses != self.uses:
                raise Refused("the uses of the parameters change from row to row")
            return value, recorder.saved

        deltas, saved = vmap(grad(of_row, has_aux=True))(shifts, dict(rows))
        found: Collected = {}
        for parts, delta in zip(self.uses, deltas, strict=True):
            for part in parts:
                value = saved[part.saved] if part.saved >= 0 else None
                found.setdefault(part.name, []).append((part, delta, value))
        return found

    def add(self, found: Collected, sums: Mapping[str, torch.Tensor]) -> None:
        """Adds the reduced gradients of collected rows to ``sums`` (float64)."""
        for name, uses in found.items():
            _Gradients(uses, self.parameters[name].shape, self.reduce).add(sums[name])


class _Gradients:
    """One parameter's per-sample gradients, as the sum of its uses.

    Args:
        found: For each use the part, ``delta`` ``[N, ...]`` and the saved input.
        shape: Shape of the parameter.
        reduce: The function that is summed.
    """

    def __init__(
        self, found: list[tuple[Part, torch.Tensor, torch.Tensor | None]], shape: torch.Size, reduce: Reduce
    ) -> None:
        self.shape, self.reduce = shape, reduce
        outs: list[torch.Tensor] = []
        ins: list[torch.Tensor] = []
        ids: list[torch.Tensor] = []
        rows: list[torch.Tensor] = []
        self.rest: list[torch.Tensor] = []
        for part, delta, value in found:
            n = len(delta)
            if part.kind == "rows" and value is not None:
                g = delta.reshape(n, -1, *shape[1:])
                index = value.reshape(n, -1)
                ids.append(index)
                if part.padding >= 0:
                    g = g.masked_fill((index == part.padding).view(*index.shape, *[1] * (g.dim() - 2)), 0.0)
                rows.append(g)
            elif part.kind in ("outer", "outer_t") and value is not None:
                pair = delta.reshape(n, -1, delta.shape[-1]), value.reshape(n, -1, value.shape[-1])
                outs.append(pair[part.kind == "outer_t"])
                ins.append(pair[part.kind == "outer"])
            else:
                self.rest.append(_sum_to(delta if value is None else delta * value, shape))
        self.out = _joined(outs)  # [N, P, shape[0]]
        self.into = _joined(ins)  # [N, P, shape[1]]
        self.ids = _joined(ids)  # [N, K]
        self.rows = _joined(rows)  # [N, K, ...]

    def add(self, total: torch.Tensor) -> None:
        """Adds the sum over samples of the reduced gradients, by the cheapest exact way."""
        once = self.out is not None and self.out.shape[1] == 1
        if self.rest or (self.out is not None and not once):
            self._add_whole(total)
        elif self.out is not None and self.into is not None:
            self._add_factors(total, self.out[:, 0], self.into[:, 0])
        else:
            _, ids, rows = self._merged()
            total.index_add_(0, ids, self.reduce(rows).double())

    def _merged(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns sample, row number and gradient of every row that was read, what a sample read twice summed."""
        assert self.ids is not None and self.rows is not None
        n, reads = self.ids.shape
        samples = torch.arange(n, device=self.ids.device)
        ordered = self.ids.sort(dim=1).values
        if not (ordered[:, 1:] == ordered[:, :-1]).any():
            return samples.repeat_interleave(reads), self.ids.flatten(), self.rows.flatten(0, 1)
        keys = (samples.unsqueeze(1) * self.shape[0] + self.ids).flatten()
        unique, inverse = torch.unique(keys, return_inverse=True)
        rows = self.rows.new_zeros(len(unique), *self.shape[1:]).index_add_(0, inverse, self.rows.flatten(0, 1))
        return unique // self.shape[0], unique % self.shape[0], rows

    def _add_factors(self, total: torch.Tensor, out: torch.Tensor, into: torch.Tensor) -> None:
        """``f(delta)^T f(a)``; entries of rows that were also looked up are taken out of it and added whole."""
        outer = self.reduce(out)
        if self.ids is not None:
            samples, ids, rows = self._merged()
            outer[samples, ids] = 0.0
            rows = rows + out[samples, ids].unsqueeze(1) * into[samples]
            total.index_add_(0, ids, self.reduce(rows).double())
        total += (outer.T @ self.reduce(into)).double()

    def _add_whole(self, total: torch.Tensor) -> None:
        """Forms whole gradients, a few samples at a time."""
        n = len(next(v for v in (self.out, self.ids, *self.rest) if v is not None))
        step = max(1, DENSE // max(math.prod(self.shape), 1))
        for start in range(0, n, step):
            at = slice(start, start + step)
            count = min(step, n - start)
            if self.out is not None and self.into is not None:
                whole = torch.bmm(self.out[at].transpose(1, 2), self.into[at])
            else:
                whole = total.new_zeros((count, *self.shape), dtype=self.rest[0].dtype)
            for part in self.rest:
                whole = whole + part[at]
            if self.ids is not None and self.rows is not None:
                ids = self.ids[at] + torch.arange(count, device=total.device).unsqueeze(1) * self.shape[0]
                whole.view(-1, *self.shape[1:]).index_add_(0, ids.flatten(), self.rows[at].flatten(0, 1))
            total += self.reduce(whole).sum(dim=0).double()


def _joined(parts: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.cat(parts, 1) if len(parts) > 1 else (parts[0] if parts else None)


def _sum_to(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sums ``[N, *broadcast]`` to ``[N, *shape]``: what broadcasting a parameter does to its gradient."""
    lead = value.dim() - 1 - len(shape)
    if lead:
        value = value.flatten(1, lead).sum(1)
    for d, size in enumerate(shape, 1):
        if size == 1 and value.shape[d] != 1:
            value = value.sum(d, keepdim=True)
    return value
