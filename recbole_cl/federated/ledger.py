"""The ledger of a privacy budget: durable, shared by runs and processes, and never below what was released.

A file of lines that only grows. A release goes through it in three steps, under a lock that other processes wait for::

    charge    the round is written to the disk (fsync) before anything is drawn
    noise     the release is made
    release   it is written to the disk, before anybody gets it

A process that dies after the charge has spent it: what it might have released counts, whether it did or not, and the
same round run again goes on from there, since nobody has seen anything of the first try. Dies it after the release, the
same round, with the same id and the same input, gets what was released, and is not charged again. Other input under the
id of a round that was released is another release, which is charged.

Every line carries a hash of itself and of all lines before it, so that a ledger that was cut, edited or mixed up is
refused. A last line without its end is a write that was interrupted: nothing was released on it, and it is dropped.
The ledger holds hashes of what the server summed up: it belongs to the server, as those sums do.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from recbole_cl import disk
from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.federated.privacy import Release, epsilon

Crash = Callable[[str], None]
"""Called at the points ``charged``, ``drawn`` and ``written`` of a release; the tests kill the process there."""


class BudgetSpent(ConfigError):
    """The next release would exceed the budget, so it was not made."""


class Ledger:
    """A privacy budget in a file.

    Args:
        path: The file; it is made if it is not there. All who release data of the same users share it.
        budget: Largest epsilon of everything in it; infinite for none.
        delta: The delta of the budget.
        at: Called at the steps of a release, see :data:`Crash`.
    """

    def __init__(self, path: str | Path, budget: float, delta: float, at: Crash = lambda step: None) -> None:
        self.path, self.budget, self.delta, self._at = Path(path), budget, delta, at

    # -- what is asked ---------------------------------------------------------------------------------------------

    def charges(self) -> list[Release]:
        """Returns everything that was charged, released or not."""
        with self._locked() as file:
            return _charges(self._read(file))

    def spent(self) -> float:
        """Returns the epsilon of everything that was charged."""
        return epsilon(self.charges(), self.delta)

    def rounds(self) -> set[str]:
        """Returns the ids of the rounds that were released."""
        with self._locked() as file:
            return {line["round"] for line in self._read(file) if line["kind"] == "release"}

    # -- a release -------------------------------------------------------------------------------------------------

    def release(self, round_id: str, input_hash: str, what: Release, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns the release of a round: the stored one if there is one, else a new one that is charged first.

        Args:
            round_id: Name of the round among all that share the ledger.
            input_hash: Hash of what is released (:func:`hash_of`).
            what: What it costs.
            make: Draws the noise and returns the release; called at most once.

        Raises:
            BudgetSpent: If it would exceed the budget. Nothing was charged.
            CheckpointError: If the file is not a ledger that this class wrote.
        """
        with self._locked() as file:
            lines = self._read(file)
            mine = [line for line in lines if line["round"] == round_id and line["hash"] == input_hash]
            for line in mine:
                if line["kind"] == "release":
                    return _decoded(line["values"])
            if not mine:
                self._refuse(round_id, lines, what)
                cost = {"noise_multiplier": what.noise_multiplier, "sampling": what.sampling}
                self._append(file, {"kind": "charge", "round": round_id, "hash": input_hash, **cost})
            self._at("charged")
            values = np.ascontiguousarray(make(), dtype=np.float64)
            self._at("drawn")
            self._append(file, {"kind": "release", "round": round_id, "hash": input_hash, "values": _encoded(values)})
            self._at("written")
            return values

    def _refuse(self, round_id: str, lines: list[dict[str, Any]], what: Release) -> None:
        """Raises a :class:`BudgetSpent` where one more release exceeds the budget."""
        if math.isinf(self.budget):
            return
        before = _charges(lines)
        after = epsilon([*before, what], self.delta)
        if after > self.budget:
            raise BudgetSpent(
                f"protofed_epsilon: the release {round_id!r} would bring epsilon from "
                f"{epsilon(before, self.delta):.4g} to {after:.4g} at delta {self.delta:g}, more than the budget of "
                f"{self.budget:g}; it was not made. {self.path} holds {len(before)} releases of the same users. Give a "
                f"larger protofed_epsilon, or, only if these are other users, another protofed_ledger"
            )

    # -- the file --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Any]:
        """A context that no two processes are in at once, with the open file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with open(disk.open_kept(self.path, "protofed_ledger"), "a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if new:  # the name itself has to survive a power cut, too
                disk.sync(self.path.parent)
            yield file

    def _read(self, file: Any) -> list[dict[str, Any]]:
        """Returns the lines; an unfinished last one is cut off."""
        file.seek(0)
        data: bytes = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
            os.fsync(file.fileno())
        lines: list[dict[str, Any]] = []
        self._chain = ""
        for number, text in enumerate(data[:whole].splitlines(), 1):
            try:
                line = json.loads(text)
                chained = _chained(self._chain, {k: v for k, v in line.items() if k != "chain"})
                sound = line["chain"] == chained
            except (ValueError, KeyError, AttributeError, TypeError):
                sound = False
            if not sound:
                raise CheckpointError(
                    f"protofed_ledger: line {number} of {self.path} is not what was written there; a privacy budget "
                    f"cannot be told from it. Restore the file from where it was kept"
                )
            self._chain = chained
            lines.append(line)
        return lines

    def _append(self, file: Any, line: dict[str, Any]) -> None:
        """Writes a line that survives the process and the machine."""
        self._chain = _chained(self._chain, line)
        file.seek(0, os.SEEK_END)
        file.write(json.dumps({**line, "chain": self._chain}).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def hash_of(*arrays: np.ndarray) -> str:
    """Returns a hash of arrays, their shapes and types."""
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _chained(before: str, line: dict[str, Any]) -> str:
    return hashlib.blake2b((before + json.dumps(line, sort_keys=True)).encode(), digest_size=16).hexdigest()


def _charges(lines: list[dict[str, Any]]) -> list[Release]:
    return [Release(line["noise_multiplier"], line["sampling"]) for line in lines if line["kind"] == "charge"]


def _encoded(values: np.ndarray) -> dict[str, Any]:
    return {"shape": list(values.shape), "float64": base64.b64encode(values.astype("<f8").tobytes()).decode()}


def _decoded(values: dict[str, Any]) -> np.ndarray:
    flat = np.frombuffer(base64.b64decode(values["float64"]), dtype="<f8").astype(np.float64)
    return flat.reshape(values["shape"])
