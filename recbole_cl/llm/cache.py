"""Answers that were paid for, in one SQLite file: none is asked for twice, by however many processes.

A question's name is the sha256 of all that its answer depends on. Before it is asked, a process takes a *lease* on it;
others that need the answer wait for it. Leases of processes that died are taken over, on the same machine at once,
elsewhere when they have run out. An answer is committed before anybody is told it, so a killed run finds all that was
answered; only what was on its way at that moment is asked again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_cl import disk
from recbole_cl.errors import ConfigError

_LOG = logging.getLogger(__name__)
_AT_ONCE = 500
"""Names in one SQL statement."""

_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, text TEXT NOT NULL, prompt_tokens INTEGER NOT NULL,
    answer_tokens INTEGER NOT NULL, seconds REAL NOT NULL, fallback TEXT, about TEXT NOT NULL, made REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL) WITHOUT ROWID;
"""


def name_of(about: Mapping[str, Any], prompt: str) -> str:
    """Returns the name of a question, 64 hexadecimal digits.

    Args:
        about: Client, model, parameters and version of the prompt, JSON-able.
        prompt: The whole text.
    """
    return hashlib.sha256(json.dumps([about, prompt], sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Kept:
    """An answer as it is kept.

    Attributes:
        key: Name of its question.
        kind: ``summary`` or ``shift``.
        text: The text.
        prompt_tokens: Tokens read.
        answer_tokens: Tokens written.
        seconds: Seconds that it took.
        fallback: Why the offline text stands in for an answer, or ``None``.
    """

    key: str
    kind: str
    text: str
    prompt_tokens: int
    answer_tokens: int
    seconds: float
    fallback: str | None = None


class AnswerCache:
    """The file.

    Args:
        path: Where it lies; it is made if it is not there. A file that is no database, or a damaged one (cut off), is
            put aside and told, and a new one is begun.
        lease: Seconds for which a question is leased.

    Raises:
        ConfigError: If it can be neither read nor made.
    """

    def __init__(self, path: str | os.PathLike[str], lease: float = 900.0) -> None:
        self.path = Path(path).expanduser()
        self.lease = lease
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._lock = threading.RLock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for suffix in ("", "-wal", "-shm", "-journal"):  # SQLite would follow links
                disk.refuse_link(self.path.with_name(self.path.name + suffix), "liber_cache")
            self._connection = self._open()
        except (OSError, sqlite3.Error, ValueError) as error:
            raise ConfigError(
                f"property 'liber_cache' is {str(path)!r}, which can be neither read nor made ({error}); choose another"
            ) from error

    def _open(self) -> sqlite3.Connection:
        for _ in range(3):
            connection = sqlite3.connect(self.path, timeout=60.0, isolation_level=None, check_same_thread=False)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.executescript(_TABLES)
                if connection.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok":
                    return connection
            except sqlite3.OperationalError:
                connection.close()
                raise
            except sqlite3.DatabaseError:
                pass
            connection.close()
            self._put_aside()
        raise ConfigError(f"property 'liber_cache' is {str(self.path)!r}, which is damaged again and again")

    def _put_aside(self) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        _LOG.warning("liber_cache: %s is damaged; it is put aside as %s, its answers are asked for again",
                     self.path, aside.name)  # fmt: skip
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.replace(f"{self.path}{suffix}", f"{aside}{suffix}")

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._connection.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def find(self, keys: Iterable[str]) -> dict[str, Kept]:
        """Returns the answers that are there, by name."""
        found: dict[str, Kept] = {}
        asked = list(dict.fromkeys(keys))
        for start in range(0, len(asked), _AT_ONCE):
            part = asked[start : start + _AT_ONCE]
            marks = ",".join("?" * len(part))
            with self._lock:
                rows = self._connection.execute(
                    "SELECT key, kind, text, prompt_tokens, answer_tokens, seconds, fallback FROM answers "
                    f"WHERE key IN ({marks})",
                    part,
                ).fetchall()
            found.update((row[0], Kept(*row)) for row in rows)
        return found

    def take(self, keys: Sequence[str]) -> list[str]:
        """Leases questions; returns those that this process is to ask: not answered, nor leased to one that lives."""
        granted = []
        with self._writing() as connection:
            now = time.time()
            answered = self.find(keys)
            for key in keys:
                if key in answered:
                    continue
                row = connection.execute("SELECT owner, until FROM leases WHERE key = ?", (key,)).fetchone()
                if row is not None and row[0] != self._owner and row[1] > now and self._lives(row[0]):
                    continue
                connection.execute("REPLACE INTO leases VALUES (?, ?, ?)", (key, self._owner, now + self.lease))
                granted.append(key)
        return granted

    @staticmethod
    def _lives(owner: str) -> bool:
        """Tells whether a process may be alive; of those of other machines nobody knows."""
        host, _, pid = owner.rpartition(":")
        if host != socket.gethostname():
            return True
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except (PermissionError, ValueError):
            pass
        return True

    def keep(self, answers: Sequence[Kept], about: Mapping[str, Any], leased: bool = True) -> None:
        """Commits answers and gives their leases back.

        Args:
            answers: The answers.
            about: Client, model, parameters and version of the prompt: where they came from.
            leased: Their questions were leased.
        """
        about_json, now = json.dumps(about, sort_keys=True), time.time()
        with self._writing() as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    (a.key, a.kind, a.text, a.prompt_tokens, a.answer_tokens, a.seconds, a.fallback, about_json, now)
                    for a in answers
                ],
            )
            if leased:
                connection.executemany("DELETE FROM leases WHERE key = ?", [(a.key,) for a in answers])

    def give_back(self, keys: Iterable[str]) -> None:
        """Gives leases back without answers."""
        with self._writing() as connection:
            connection.executemany(
                "DELETE FROM leases WHERE key = ? AND owner = ?", [(key, self._owner) for key in keys]
            )

    def forget(self, keys: Iterable[str]) -> int:
        """Removes answers for good; returns how many there were. The space is overwritten."""
        with self._lock:
            self._connection.execute("PRAGMA secure_delete=ON")
        with self._writing() as connection:
            count = sum(
                connection.execute("DELETE FROM answers WHERE key = ?", (key,)).rowcount for key in dict.fromkeys(keys)
            )
        with self._lock:
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return count

    def everything(self) -> list[tuple[Kept, str]]:
        """Returns all answers, each with the JSON that tells where it came from."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT key, kind, text, prompt_tokens, answer_tokens, seconds, fallback, about FROM answers"
            ).fetchall()
        return [(Kept(*row[:-1]), str(row[-1])) for row in rows]

    def __len__(self) -> int:
        with self._lock:
            return int(self._connection.execute("SELECT COUNT(*) FROM answers").fetchone()[0])
