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

Uses are found in :mod:`recbole_cl.strategy.parts.parameter_uses`. A parameter whose use has no rule there is refused;
the caller then takes gradients sample by sample, and it compares both on a few rows before it trusts this path.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch.func import grad, vmap

from recbole_cl.strategy.parts.parameter_uses import Part, Recorder, Refused

Rows = Mapping[str, torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]

FORWARD = 2**24
"""Numbers that the outputs of the parameters' uses may hold for one chunk of samples."""
MOST = 4096
"""Samples in a chunk at most."""
DENSE = 2**20
"""Numbers of whole gradients that are held at once (4 MiB of float32: about a core's cache)."""


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
