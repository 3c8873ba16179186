"""Several processes under torchrun: who this one is, and what the processes tell each other.

A run of one process has the group of one, whose methods do nothing. Under ``torchrun`` every process walks the same
stream with the same generators; what is split are the rows of a batch (:mod:`recbole_cl.training.data_parallel`) and
the batches of an evaluation. Nothing is pickled: tensors, rows and texts are exchanged as tensors.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from recbole_cl.errors import ProcessError

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others before it ends. A process that fails is noticed at once."""
PATIENCE = 5.0
"""Seconds in which a failing process tells why, once its connections are gone."""
ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_runs = itertools.count()


def launched() -> bool:
    """Tells whether this process is one of several that torchrun started."""
    return all(key in os.environ for key in ENVIRONMENT) and int(os.environ["WORLD_SIZE"]) > 1


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Args:
        rank: Number of this one, from 0.
        size: How many there are.
        store: Where a failing process leaves its reason; it outlives the connections.
        reason_key: Under which key, in this run.
    """

    rank: int = 0
    size: int = 1
    store: Any = None
    reason_key: list[str] = field(default_factory=lambda: ["failed"])

    @property
    def main(self) -> bool:
        """True for the one that writes files, logs and progress bars."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Returns this process's contiguous part of ``n`` things; the parts differ by one at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    # -- exchanges ------------------------------------------------------------------------------------------------

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds a tensor over all processes, in place: the same bits in each."""
        if self.size > 1:
            self._exchange(lambda: dist.all_reduce(tensor))
        return tensor

    def any(self, flags: torch.Tensor) -> torch.Tensor:
        """Returns, for each flag, whether it is set in some process (shape as given, on the CPU)."""
        if self.size == 1:
            return flags
        common = flags.to("cpu", torch.uint8, copy=True)
        self._exchange(lambda: dist.all_reduce(common, op=dist.ReduceOp.MAX))
        return common.bool()

    def gather(self, rows: np.ndarray) -> np.ndarray:
        """Returns the rows of all processes in their order, exactly.

        Args:
            rows: This process's, ``n_r >= 0`` of them, which may differ from process to process; ``[n_r, ...]``.

        Returns:
            Rows, shape ``[sum of n_r, ...]``.
        """
        if self.size == 1:
            return rows
        length = torch.tensor([len(rows)])
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        self._exchange(lambda: dist.all_gather(lengths, length))
        most = int(max(lengths))
        if not most:
            return rows
        own = torch.from_numpy(np.ascontiguousarray(rows))
        padded = own.new_zeros((most, *own.shape[1:]))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        self._exchange(lambda: dist.all_gather(parts, padded))
        return torch.cat([part[: int(n)] for part, n in zip(parts, lengths, strict=True)]).numpy()

    def texts(self, text: str) -> list[str]:
        """Returns every process's text."""
        ends = np.cumsum(self.gather(np.array([len(text.encode())])))
        together = self.gather(np.frombuffer(text.encode(), dtype=np.uint8).copy())
        return [part.tobytes().decode() for part in np.split(together, ends[:-1])]

    def from_main(self, value: bytes) -> bytes:
        """Returns the bytes that the main process gave."""
        return self.gather(np.frombuffer(value if self.main else b"", dtype=np.uint8).copy()).tobytes()

    # -- errors ---------------------------------------------------------------------------------------------------

    def agree(self, failure: Exception | None, flags: torch.Tensor | None = None) -> torch.Tensor | None:
        """Ends all processes where one has failed; returns :meth:`any` of the flags.

        Raises:
            Exception: ``failure``, in the process that failed.
            ProcessError: In the others; the message names the rank and its reason.
        """
        if self.size == 1:
            if failure is not None:
                raise failure
            return flags
        failed = torch.zeros(self.size, dtype=torch.bool)
        failed[self.rank] = failure is not None
        together = self.any(failed if flags is None else torch.cat([failed, flags.cpu().bool()]))
        if together[: self.size].any():
            reasons = self.texts("" if failure is None else _words(failure))
            if failure is not None:
                raise failure
            first = int(together[: self.size].int().argmax())
            raise ProcessError(f"rank {first} failed: {reasons[first]}")
        return together[self.size :]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """All processes wait for each other's body, and end with the reason of one that failed."""
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
        self.agree(failure)

    @contextlib.contextmanager
    def announced(self) -> Iterator[None]:
        """Leaves the reason where the others find it when this process ends by an error of its own."""
        self.reason_key[0] = f"failed/{next(_runs)}"  # runs of one process are counted alike in all
        try:
            yield
        except ProcessError:
            raise
        except BaseException as error:
            if self.store is not None:
                with contextlib.suppress(Exception):  # the store's host may be gone, too
                    self.store.set(self.reason_key[0], f"rank {self.rank} failed: {_words(error)}")
            raise

    def _exchange(self, run: Callable[[], Any]) -> None:
        try:
            run()
        except RuntimeError as error:  # a peer's connection is closed, or the time is up
            raise ProcessError(self._reason(error)) from error

    def _reason(self, error: Exception) -> str:
        until = time.monotonic() + PATIENCE
        with contextlib.suppress(Exception):
            while self.store is not None and time.monotonic() < until:
                if self.store.check(self.reason_key):
                    return str(self.store.get(self.reason_key[0]).decode())
                time.sleep(0.1)
        return f"rank {self.rank} lost another process, which left no reason; its own output may tell ({_words(error)})"


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    from recbole_cl.errors import RecBoleCLError

    return text if isinstance(error, RecBoleCLError) else f"{type(error).__name__}: {text}"


ALONE = Group()
_group = ALONE


def current() -> Group:
    """Returns the processes of this run; a group of one before :func:`start`."""
    return _group


def start(device: torch.device) -> Group:
    """Joins the processes that torchrun started, once; without torchrun this is a run of one.

    Exchanges of tensors on a GPU go over NCCL, all others over gloo.

    Args:
        device: Where the model will be.
    """
    global _group
    if _group.size > 1 or not launched():
        return _group
    store = None
    if not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("recbole_cl", store), rank=rank, world_size=size, timeout=TIMEOUT
        )
        atexit.register(_leave)
    _group = Group(dist.get_rank(), dist.get_world_size(), store)
    if not _group.main:
        logging.getLogger("recbole_cl").setLevel(logging.ERROR)
    return _group


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
