"""Versions of a run's model: which there are, and which one is served (the champion).

::

    RUN/checkpoints/          the run itself; version 0 where it was not trained on all rows for serving
    RUN/store/<hash>/         what the versions were trained over
    RUN/versions/00000003/    a version: a checkpoint; one that was written anew (users forgotten) has another number
    RUN/versions/index.json   the list of versions and the champion; one file, replaced by one rename

A version becomes one by that rename and not before, so whoever reads sees the old list or the new one. What a killed
update leaves behind stands in no list and is cleared away by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from recbole_cl import checkpoint
from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.training.store import prune_stores

FOLDER, INDEX = "versions", "index.json"
FORMAT = "recbole-cl versions"
T = TypeVar("T")


@dataclass
class Versions:
    """The versions of a run.

    Args:
        folder: The run's folder.
        champion: Number of the version that is served.
        entries: One a version, oldest first: ``number``, ``parent``, ``created``, ``store`` and what an update tells.
        previous: Champions before this one, newest last: where a rollback goes.
        retired: Tokens of the items that no version recommends.
    """

    folder: Path
    champion: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    previous: list[int] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path) -> Versions:
        """Returns the versions of a run; a run that was never updated has one, its own.

        Raises:
            CheckpointError: If the folder holds no run, or the list is broken.
        """
        path = folder / FOLDER / INDEX
        if not path.is_file():
            if not checkpoint.numbered(folder / "checkpoints"):
                raise CheckpointError(
                    f"{folder} holds no trained model (no checkpoints, no versions); give the output folder of a run "
                    f"that kept its checkpoints"
                )
            return cls(folder, 0, [{"number": 0, "parent": None, "created": None, "store": None, "where": "run"}])
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
            if read["format"] != FORMAT:
                raise ValueError(f"format is {read['format']!r}")
            previous, retired = [int(n) for n in read["previous"]], [str(one) for one in read.get("retired", [])]
            found = cls(folder, int(read["champion"]), list(read["versions"]), previous, retired)
            found.entry(found.champion)
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise CheckpointError(
                f"{FOLDER}/{INDEX} in {folder} is broken ({error}); restore it from a copy"
            ) from error
        return found

    def entry(self, number: int) -> dict[str, Any]:
        """Returns what is told of a version.

        Raises:
            ConfigError: If there is none of that number.
        """
        for entry in self.entries:
            if entry["number"] == number:
                return entry
        known = ", ".join(str(entry["number"]) for entry in self.entries)
        raise ConfigError(f"version {number} is not there; {self.folder} has {known}")

    def read(self, number: int) -> dict[str, Any]:
        """Returns the state of a version.

        Raises:
            CheckpointError: If it is missing, truncated, changed, or the run has not come to its end.
        """
        if self.entry(number).get("where") != "run":
            try:
                return _whole(lambda: checkpoint.read(self.folder / FOLDER / place(self.entry(number))))
            except CheckpointError as error:
                others = [entry["number"] for entry in self.entries if entry["number"] != number]
                remedy = f"serve version {others[-1]} with recbole-cl rollback" if others else "run again"
                raise CheckpointError(f"version {number}: {error}; restore it from a copy, or {remedy}") from error
        state, _, _ = _whole(lambda: checkpoint.newest(self.folder / "checkpoints"))
        if state is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint; give the output folder of a run that kept them")
        if state["phase"] != "done":
            raise CheckpointError(
                f"the run in {self.folder} was interrupted in stage {state['stage'] + 1}; finish it with the same "
                f"command and --resume=True"
            )
        return state

    def next_number(self) -> int:
        """Returns the number of the version that comes next; a number, also of a folder, is never used twice."""
        return 1 + max(max(entry["number"], entry.get("folder", 0)) for entry in self.entries)

    # -- changes --------------------------------------------------------------------------------------------------

    def add(self, state: Mapping[str, Any], entry: Mapping[str, Any], keep: int) -> int:
        """Writes a version and makes it the champion; the champion before stays until the very last step.

        Args:
            state: The checkpoint.
            entry: What is told of it: ``store`` and the rest.
            keep: How many versions are kept; the champion and the one before it always are.

        Returns:
            Its number.

        Raises:
            OutputError: If the folder cannot be written; the champion is the one before.
        """
        number = self.next_number() if self.entries else 0
        root = self.folder / FOLDER
        checkpoint.save(root, number, state, keep=1 << 30)
        told = {"number": number, "parent": self.champion if self.entries else None, "created": now(), **entry}
        previous = [*self.previous, self.champion] if self.entries else []
        entries = [*self.entries, told]
        needed = {number, *previous[-1:]}
        for old in [entry["number"] for entry in entries if entry["number"] not in needed]:
            if len(entries) > max(keep, len(needed)):
                entries = [entry for entry in entries if entry["number"] != old]
        left = {entry["number"] for entry in entries}
        self.champion, self.entries, self.previous = number, entries, [n for n in previous if n in left]
        self.write()
        self.clean()
        return number

    def roll_back(self, to: int | None = None) -> int:
        """Makes an earlier version the champion; nothing is removed.

        Args:
            to: Its number; by default the champion before this one.

        Raises:
            ConfigError: If there is none.
        """
        if to is None:
            if not self.previous:
                raise ConfigError(f"rollback: version {self.champion} of {self.folder} has no champion before it")
            to = self.previous[-1]
        self.read(self.entry(to)["number"])  # a version that cannot be read is no way back
        if to in self.previous:
            self.previous = self.previous[: self.previous.index(to)]
        elif to != self.champion:
            self.previous = [*self.previous, self.champion]
        self.champion = to
        self.write()
        return to

    def write(self) -> None:
        """Writes the list: from here on it counts."""
        content = {
            "format": FORMAT,
            "champion": self.champion,
            "previous": self.previous,
            "versions": self.entries,
            "retired": self.retired,
        }
        checkpoint.write_atomically(self.folder / FOLDER / INDEX, json.dumps(content, indent=1))

    def clean(self) -> None:
        """Removes what no version needs: folders of versions that are not listed, stores that nothing refers to."""
        listed = {place(entry) for entry in self.entries}
        for path in checkpoint.numbered(self.folder / FOLDER):
            if path.name not in listed:
                shutil.rmtree(path, ignore_errors=True)
        stores = {entry["store"] for entry in self.entries if entry["store"]}
        runs = [self.folder, *self.folder.glob("earlier-*")]  # those moved aside find their stores here
        run = [path for one in runs for name in ("checkpoints", FOLDER) for path in checkpoint.numbered(one / name)]
        with contextlib.suppress(OSError, ValueError):
            stores |= {json.loads((path / "state.json").read_text(encoding="utf-8")).get("store") for path in run}
            prune_stores(self.folder, stores)


def place(entry: Mapping[str, Any]) -> str:
    """Returns the name of the folder that a version lies in."""
    return f"{entry.get('folder', entry['number']):08d}"


def _whole(read: Callable[[], T]) -> T:
    """Returns what is read; a file that is no safetensors file in spite of its hash is refused as all foreign ones."""
    try:
        return read()
    except (CheckpointError, OSError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"checkpoint: a file is not what a run writes ({type(error).__name__}: {error})"
        ) from error


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which no other process changes the versions of a run; a killed process holds no lock.

    Raises:
        ConfigError: If another process does so now.
    """
    root = folder / FOLDER
    with checkpoint.explained(folder):
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process is changing the versions of {folder}; wait until it has ended"
            ) from error
        yield
    finally:
        os.close(descriptor)


def now() -> str:
    """Returns the time as it is written into the list."""
    return datetime.now(UTC).isoformat(timespec="seconds")
