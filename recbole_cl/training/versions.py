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
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recbole_cl import checkpoint, disk
from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.lock import hold
from recbole_cl.seal import read_plain
from recbole_cl.training.resume import check_state
from recbole_cl.training.store import prune_stores

FOLDER, INDEX = "versions", "index.json"
FORMAT = "recbole-cl versions"


@dataclass
class Versions:
    """The versions of a run.

    Args:
        folder: The run's folder.
        champion: Number of the version that is served.
        entries: One a version, oldest first: ``number``, ``parent``, ``created``, ``store`` and what an update tells.
        previous: Champions before this one, newest last: where a rollback goes.
        retired: Tokens of the items that no version recommends.
        challenger: Number of a version that was trained and is not served: worse, or kept aside; ``None`` for none.
    """

    folder: Path
    champion: int = 0
    entries: list[dict[str, Any]] = field(default_factory=list)
    previous: list[int] = field(default_factory=list)
    retired: list[str] = field(default_factory=list)
    challenger: int | None = None

    @classmethod
    def of(cls, folder: Path) -> Versions:
        """Returns the versions of a run; a run that was never updated has one, its own.

        Raises:
            CheckpointError: If the folder holds no run, or the list is broken.
        """
        path = folder / FOLDER / INDEX
        if not os.path.lexists(path):
            if not checkpoint.numbered(folder / "checkpoints"):
                raise CheckpointError(
                    f"{folder} holds no trained model (no checkpoints, no versions); give the output folder of a run "
                    f"that kept its checkpoints"
                )
            return cls(folder, 0, [{"number": 0, "parent": None, "created": None, "store": None, "where": "run"}])
        try:
            read = json.loads(read_plain(path))
            if read["format"] != FORMAT:
                raise ValueError(f"format is {read['format']!r}")
            previous, retired = [int(n) for n in read["previous"]], [str(one) for one in read.get("retired", [])]
            challenger = None if read.get("challenger") is None else int(read["challenger"])
            found = cls(folder, int(read["champion"]), list(read["versions"]), previous, retired, challenger)
            if not all(isinstance(e["number"], int) and isinstance(e["store"], str | None) for e in found.entries):
                raise ValueError("a version has no number or no store")
            found.entry(found.champion)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
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
                state = checkpoint.read(self.folder / FOLDER / place(self.entry(number)))
                check_state(state)
            except (CheckpointError, OSError) as error:
                others = [entry["number"] for entry in self.entries if entry["number"] != number]
                remedy = f"serve version {others[-1]} with recbole-cl rollback" if others else "run again"
                raise CheckpointError(f"version {number}: {error}; restore it from a copy, or {remedy}") from error
            return state
        newest, _, refused = checkpoint.newest(self.folder / "checkpoints", check_state)
        if newest is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint; give the output folder of a run that kept them")
        if newest["phase"] != "done":
            raise CheckpointError(
                f"the run in {self.folder} was interrupted in stage {newest['stage'] + 1}; finish it with the same "
                f"command and --resume=True{f' ({refused[0]})' if refused else ''}"
            )
        return newest

    def next_number(self) -> int:
        """Returns the number of the version that comes next; a number, also of a folder, is never used twice."""
        return 1 + max(max(entry["number"], entry.get("folder", 0)) for entry in self.entries)

    # -- changes --------------------------------------------------------------------------------------------------

    def add(self, state: Mapping[str, Any], entry: Mapping[str, Any], keep: int, serve: bool = True) -> int:
        """Writes a version and makes it the champion; the champion before stays until the very last step.

        Args:
            state: The checkpoint.
            entry: What is told of it: ``store`` and the rest.
            keep: How many versions are kept; the champion, the one before it and the challenger always are.
            serve: Make it the champion; else it becomes the challenger, in the place of another one.

        Returns:
            Its number.

        Raises:
            OutputError: If the folder cannot be written; the champion is the one before.
        """
        number = self.next_number() if self.entries else 0
        root = self.folder / FOLDER
        checkpoint.save(root, number, state, keep=1 << 30)
        described = {"number": number, "parent": self.champion if self.entries else None, "created": now(), **entry}
        previous = [*self.previous, self.champion] if self.entries and serve else self.previous
        beaten = {self.challenger} - {self.champion, *previous[-1:]} if not serve else set[int | None]()
        entries = [*(e for e in self.entries if e["number"] not in beaten), described]
        champion, challenger = (number, self.challenger) if serve else (self.champion, number)
        needed = {champion, challenger, *previous[-1:]} - {None}
        for old in [entry["number"] for entry in entries if entry["number"] not in needed]:
            if len(entries) > max(keep, len(needed)):
                entries = [entry for entry in entries if entry["number"] != old]
        left = {entry["number"] for entry in entries}
        self.entries, self.previous = entries, [n for n in previous if n in left]
        self.champion, self.challenger = champion, challenger
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
        if self.challenger == to:
            self.challenger = None
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
            "challenger": self.challenger,
        }
        with disk.explained(self.folder):
            root = disk.own_folder(self.folder / FOLDER)
        disk.write_atomically(root / INDEX, json.dumps(content, indent=1))

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


@contextlib.contextmanager
def locked(folder: Path, what: str = "a change of its versions") -> Iterator[None]:
    """A context in which no other process runs in a run's folder or changes its versions; see :mod:`recbole_cl.lock`.

    Raises:
        ConfigError: If another process does so now.
    """
    with hold(folder, what):
        yield


def now() -> str:
    """Returns the time as it is written into the list."""
    return datetime.now(UTC).isoformat(timespec="seconds")
