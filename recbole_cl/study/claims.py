"""Who runs which cell, where several processes or machines share a study's folder: files, and no server.

A claim is a file ``claim-1``, ``claim-2``, ... in the cell's folder; the highest number counts. Each is created so that
it fails where it is there already, so of two that want the same number one gets it. The owner touches its file every
:data:`BEAT` seconds. A claim no longer holds when its owner gave it back, or is dead: on the same machine its process
is gone, on another the file was not touched for :data:`STALE` seconds by the clock of the folder itself. Whoever comes
then takes the next number. An owner that sees a higher number than its own has been taken for dead and ends at once.

Claims are removed once a cell is done: whoever claims it later looks at its state again first.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

BEAT, STALE = 15.0, 600.0
_FIRST = "claim-"
TABLES = ".tables"
"""Claimed by who writes what all cells share: tables, and the script of their reports."""


class Claim:
    """A claim that this process holds.

    Args:
        path: Its file.
        lost: Called, from another thread, when somebody else took the cell over; ends the process by default.
    """

    def __init__(self, path: Path, lost: Callable[[], None] | None = None) -> None:
        self.path = path
        self._lost = lost or (lambda: os._exit(3))
        self._over = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            if _highest(self.path.parent) != _number(self.path):
                self._lost()
                return
            try:
                os.utime(self.path)
            except OSError:
                continue  # the folder is away for a moment: the next beat tries again

    def release(self, done: bool = False) -> None:
        """Gives it back; ``done`` removes all claims of the cell, which nobody needs any more."""
        self._over.set()
        if done:
            for path in self.path.parent.glob(f"{_FIRST}*"):
                path.unlink(missing_ok=True)
        else:
            _give_back(self.path)


def claim(own: Path, lost: Callable[[], None] | None = None) -> Claim | None:
    """Claims a cell for this process.

    Args:
        own: The cell's folder.
        lost: See :class:`Claim`.

    Returns:
        The claim, or ``None`` where a living owner has it.
    """
    own.mkdir(parents=True, exist_ok=True)
    highest = _highest(own)
    if highest and _holds(own / f"{_FIRST}{highest}"):
        return None
    path = own / f"{_FIRST}{highest + 1}"
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return None  # somebody was faster
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(json.dumps({**_machine(), "pid": os.getpid(), "started": _started(os.getpid())}))
    return Claim(path, lost)


def give_back_of_the_dead(own: Path) -> None:
    """Gives back the claim of a process of this machine that is gone, so that other machines need not wait for it."""
    path = own / f"{_FIRST}{_highest(own)}"
    note = _note(path)
    if note is not None and _is_here(note) and not _lives(note):
        _give_back(path)


def held(own: Path) -> bool:
    """Tells whether somebody who lives, as far as can be seen, has claimed a cell."""
    highest = _highest(own)
    return bool(highest) and _holds(own / f"{_FIRST}{highest}")


def _number(path: Path) -> int:
    number = path.name.removeprefix(_FIRST)
    return int(number) if number.isdigit() else 0


def _highest(own: Path) -> int:
    return max((_number(path) for path in own.glob(f"{_FIRST}*")), default=0)


def _note(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _give_back(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(json.dumps({"given_back": True}), encoding="utf-8")
    os.replace(temporary, path)


def _holds(path: Path) -> bool:
    note = _note(path)
    if note is not None and note.get("given_back"):
        return False
    if note is not None and _is_here(note):
        return _lives(note)
    return _age(path) < STALE  # of another machine, or just being written


def _age(path: Path) -> float:
    """Returns how long ago a file was touched, by the clock that gives files of this folder their times."""
    probe = path.with_name(f".now.{uuid.uuid4().hex}")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        return now - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0  # it changes right now: ask again later
    finally:
        probe.unlink(missing_ok=True)


def _machine() -> dict[str, str]:
    """Returns what tells this machine, this start of it, and this space of process ids from others."""
    found = {"host": socket.gethostname()}
    for name, read in (
        ("boot", lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip()),
        ("space", lambda: os.readlink("/proc/self/ns/pid")),
    ):
        try:
            found[name] = read()
        except OSError:
            found[name] = ""
    return found


def _is_here(note: dict[str, Any]) -> bool:
    return all(note.get(name) == value for name, value in _machine().items())


def _lives(note: dict[str, Any]) -> bool:
    pid = note.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    started = _started(pid)
    return not started or started == note.get("started")


def _started(pid: int) -> str:
    """Returns when a process started, so that a number used twice is not taken for it; empty where that is not told.

    A zombie counts as gone.
    """
    try:
        words = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return "gone" if words[0] in "ZX" else words[19]


@contextlib.contextmanager
def alone(own: Path) -> Iterator[None]:
    """Waits until nobody else does the same thing in a folder, and keeps others out meanwhile."""
    while (mine := claim(own)) is None:
        time.sleep(0.2)
    try:
        yield
    finally:
        mine.release(done=True)


def shard_of(text: str) -> tuple[int, int]:
    """Reads ``i/n``, i from 1 to n.

    Raises:
        ValueError: If it makes no sense.
    """
    first, _, second = text.partition("/")
    i, n = int(first), int(second)
    if not 1 <= i <= n:
        raise ValueError(text)
    return i, n


def in_turn(length: int, shard: tuple[int, int]) -> list[int]:
    """Returns the order in which shard i of n looks at ``length`` cells: its own share first, then the others'."""
    i, n = shard
    return [index for step in range(n) for index in range((i - 1 + step) % n, length, n)]


def deadline(hours: float | None) -> float | None:
    """Returns the moment (of ``time.monotonic``) after so many hours."""
    return None if hours is None else time.monotonic() + 3600 * hours
