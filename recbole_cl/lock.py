"""One process at a time in a folder: a lock that says who holds it.

The lock is the kernel's (``flock`` on ``.lock`` in the folder), so a process that was killed holds none. What stands in
the file tells others whom they wait for: host, process id, the start of that process (an id is given again after a
while), since when and for what. It is removed when the lock is let go.

A folder may lie on a disk that several hosts share and whose locks they do not see of each other. So a file that names
another host is believed, and only a person removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recbole_cl.disk import explained
from recbole_cl.errors import ConfigError

LOGGER = logging.getLogger("recbole_cl")
NAME = ".lock"
PATIENCE = 2.0
"""Seconds in which a holder has written who it is."""
_HELD: dict[Path, tuple[int, int]] = {}
"""Folder to the thread that holds its lock, and the open file."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Args:
        host: Name of the host.
        boot: Which start of that machine; ``None`` where the system does not tell.
        pid: The process.
        start: When it began, in ticks since the machine's start; ``None`` where the system does not tell.
        since: When it took the lock (ISO, UTC).
        what: What it does.
    """

    host: str
    boot: str | None
    pid: int
    start: int | None
    since: str
    what: str

    @classmethod
    def own(cls, what: str) -> Holder:
        """Returns this process."""
        pid = os.getpid()
        since = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(socket.gethostname(), _boot(), pid, _start(pid), since, what)

    @classmethod
    def read(cls, descriptor: int) -> Holder | None:
        """Returns who stands in an open lock; ``None`` where nobody does, or what does is no holder."""
        try:
            written: Any = json.loads(os.pread(descriptor, 1 << 16, 0))
            types = {"host": str, "boot": str | None, "pid": int, "start": int | None, "since": str, "what": str}
            if all(isinstance(written[key], kind) for key, kind in types.items()) and written["pid"] > 0:
                return cls(**{key: written[key] for key in types})
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        return None

    @property
    def here(self) -> bool:
        """Whether it is, or was, a process of this machine."""
        return self.host == socket.gethostname() or (self.boot is not None and self.boot == _boot())

    @property
    def alive(self) -> bool:
        """Whether a process of this machine still runs: that one, not a later one of the same number."""
        if self.boot != _boot():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except OSError:  # another user's
            pass
        return _start(self.pid) == self.start

    def __str__(self) -> str:
        me = ", this process" if self.alive and self.pid == os.getpid() else ""
        return f"{self.what!r} (process {self.pid} on {self.host}{me}, since {self.since})"


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _start(pid: int) -> int | None:
    """Returns when a process began, in ticks since the machine's start."""
    try:
        # The name in parentheses may hold anything; of what follows it the 20th word is the start.
        return int(
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
    except (OSError, IndexError, ValueError):
        return None


@contextlib.contextmanager
def hold(folder: Path, what: str, *, nested: bool = False) -> Iterator[None]:
    """A context in which no other process works in a folder.

    Args:
        folder: The folder; made where it is missing.
        what: What this process does there, for those that are refused.
        nested: Go on where this thread holds the lock already.

    Raises:
        ConfigError: If another process, or another thread of this one, holds it; the message names it and the remedy.
        OutputError: If the folder cannot be written.
    """
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        key = folder.resolve()
    if nested and key in _HELD and _HELD[key][0] == threading.get_ident():
        yield
        return
    descriptor = _take(folder, what)
    _HELD[key] = (threading.get_ident(), descriptor)
    try:
        yield
    finally:
        if _HELD.pop(key, None) is not None:  # else a child after a fork, which holds nothing
            with contextlib.suppress(OSError):
                (folder / NAME).unlink()  # while it is held: nobody else's
            os.close(descriptor)


def _take(folder: Path, what: str) -> int:
    """Returns the open file of the lock, once it is this process's."""
    path = folder / NAME
    while True:
        descriptor = _open(path)
        try:
            kernel = _lock(descriptor)
            if kernel is False:
                raise ConfigError(_refusal(folder, _wait_for_name(descriptor)))
            if not _same(descriptor, path):  # let go and removed in between
                os.close(descriptor)
                continue
            holder = Holder.read(descriptor)
            if holder is not None and not holder.here:
                raise ConfigError(
                    f"output_dir: {folder} was taken by {holder}, which cannot be asked from {socket.gethostname()}; "
                    f"wait until it has ended, or give another output_dir; if it has ended, remove {path}"
                )
            if holder is not None and kernel is None and holder.alive:
                raise ConfigError(_refusal(folder, holder))
            if holder is not None:
                LOGGER.info("%s was left by %s, which has ended; it is taken over", path, holder)
            with explained(folder):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(asdict(Holder.own(what))).encode(), 0)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _open(path: Path) -> int:
    """Opens the file of a lock: a regular one, never what a link points to, and without waiting."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise ConfigError(f"output_dir: {path} is no plain file; remove it") from error
        with explained(path.parent):
            raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigError(f"output_dir: {path} is no plain file; remove it")
    return descriptor


def _lock(descriptor: int) -> bool | None:
    """Asks the kernel for the lock; ``False`` if another has it, ``None`` on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _same(descriptor: int, path: Path) -> bool:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(found, os.fstat(descriptor))


def _wait_for_name(descriptor: int) -> Holder | None:
    until = time.monotonic() + PATIENCE
    while (holder := Holder.read(descriptor)) is None and time.monotonic() < until:
        time.sleep(0.02)
    return holder


def _refusal(folder: Path, holder: Holder | None) -> str:
    who = "another process" if holder is None else str(holder)
    return f"output_dir: {folder} is in use by {who}; wait until it has ended, or give another output_dir"


def _let_go_in_child() -> None:
    """After a fork: what the parent holds is not the child's, which may outlive it."""
    for _, descriptor in _HELD.values():
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
