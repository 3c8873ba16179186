"""The knowledge without a training: prepared, estimated, shown, forgotten."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np

from recbole_cl.errors import DataError, nearest
from recbole_cl.llm.batch_files import read_answers, write_requests
from recbole_cl.llm.cache import Kept
from recbole_cl.llm.cascade import Cascade
from recbole_cl.llm.clients.base import Request
from recbole_cl.llm.texts import tokens
from recbole_cl.model.liber_check import audit
from recbole_cl.model.liber_texts import History, cascade_of, folder_of, history_of
from recbole_cl.stream.build import Stream, build_stream

GUESSED_ANSWER = 60
"""Tokens of an answer that nobody has seen yet."""


class Profiles:
    """The partitions of a dataset, and what was written about them.

    Args:
        config: A configuration of ``LIBER``.
        stream: The stream; default that of the configured dataset.
    """

    def __init__(self, config: Any, stream: Stream | None = None) -> None:
        self.config = config
        self.stream = build_stream(config) if stream is None else stream
        self.history: History = history_of(config, self.stream)

    def _rows(self, user: str) -> np.ndarray:
        """Returns the partitions of a user, by its token.

        Raises:
            DataError: If the log has no such user.
        """
        dataset = self.stream.dataset
        known: dict[str, int] = dataset.field2token_id[dataset.uid_field]
        if user not in known or user == "[PAD]":
            raise DataError(f"user {user!r} is not in dataset {self.config['dataset']!r}{nearest(user, known)}")
        return np.flatnonzero(self.history.partitions.user == known[user])

    def _summaries(self, cascade: Cascade, rows: np.ndarray) -> list[Request]:
        return cascade.named(self.history.prompts["summary"], self.history.summaries(rows))

    def _shifts(self, cascade: Cascade, rows: np.ndarray, kept: dict[int, Kept]) -> dict[int, Request]:
        """Returns the questions for shifts by partition, of those whose two summaries are there."""
        if not self.history.asks_shifts:
            return {}
        later = [r for r in rows.tolist() if self.history.partitions.number[r] > 0 and {r - 1, r} <= kept.keys()]
        requests = [self.history.shift(kept[row - 1].text, kept[row].text, kept[row].key) for row in later]
        return dict(zip(later, cascade.named(self.history.prompts["shift"], requests), strict=True))

    def estimate(self) -> dict[str, Any]:
        """Returns what preparing would take, without asking anybody: calls, tokens and, with prices, the cost."""
        cascade = cascade_of(self.config)
        rows = np.arange(len(self.history.partitions))
        asked = self._summaries(cascade, rows)
        found = cascade.cache.find(request.key for request in asked)
        kept = {row: found[r.key] for row, r in zip(rows.tolist(), asked, strict=True) if r.key in found}
        open_ = cascade.missing(asked)
        shifts = self._shifts(cascade, rows, kept)
        open_shifts = cascade.missing(list(shifts.values()))
        later = int((self.history.partitions.number > 0).sum()) * self.history.asks_shifts
        unseen = later - len(shifts)
        each = tokens(self.history.prompts["shift"].text) + 2 * GUESSED_ANSWER
        read = sum(tokens(request.prompt) for request in [*open_, *open_shifts]) + unseen * each
        calls = len(open_) + len(open_shifts) + unseen
        numbers = {
            "users with a partition": len(np.unique(self.history.partitions.user)),
            "partitions": len(rows),
            "calls in all, at most": len(rows) + later,
            "calls that are left, at most": calls,
            "tokens read, about": read,
            "tokens written, about": calls * GUESSED_ANSWER,
            "calls, asked anew at each behaviour": len(self.stream.table),
        }
        prices = self.config["liber_price_read"], self.config["liber_price_written"]
        if None not in prices:
            numbers["cost, about"] = round((read * prices[0] + calls * GUESSED_ANSWER * prices[1]) / 1e6, 4)
        cascade.cache.close()
        return numbers

    def prepare(self) -> dict[str, Any]:
        """Asks for what is missing of all partitions, and returns what it took; may be killed and run again."""
        begun = time.perf_counter()
        cascade = cascade_of(self.config)
        rows = np.arange(len(self.history.partitions))
        asked = self._summaries(cascade, rows)
        kept = dict(zip(rows.tolist(), cascade.wave(self.history.prompts["summary"], asked, "summaries"), strict=True))
        shifts = list(self._shifts(cascade, rows, kept).values())
        cascade.wave(self.history.prompts["shift"], shifts, "shifts")
        seconds, spent = time.perf_counter() - begun, cascade.spent
        numbers: dict[str, Any] = {
            "partitions": len(rows),
            "texts": len(asked) + len(shifts),
            "calls made": spent.calls,
            "tokens read": spent.prompt_tokens,
            "tokens written": spent.answer_tokens,
            "texts that the offline client stands in for": spent.fallbacks,
            "calls, asked anew at each behaviour": len(self.stream.table),
            "seconds": round(seconds, 2),
        }
        if spent.latencies:
            p50, p95 = np.percentile(spent.latencies, [50, 95])
            numbers |= {"milliseconds a call, p50": round(1e3 * float(p50), 2), "p95": round(1e3 * float(p95), 2)}
        cascade.cache.close()
        return numbers | {"kept in": str(folder_of(self.config))}

    def _asked(self, cascade: Cascade) -> tuple[dict[str, Request], int]:
        """Returns the open questions by name, and how many shifts wait for a summary."""
        rows = np.arange(len(self.history.partitions))
        asked = self._summaries(cascade, rows)
        found = cascade.cache.find(request.key for request in asked)
        kept = {row: found[r.key] for row, r in zip(rows.tolist(), asked, strict=True) if r.key in found}
        shifts = self._shifts(cascade, rows, kept)
        later = int((self.history.partitions.number > 0).sum()) * self.history.asks_shifts
        open_ = cascade.missing([*asked, *shifts.values()])
        return {request.key: request for request in open_}, later - len(shifts)

    def batch_out(self, file: str) -> dict[str, Any]:
        """Writes the open questions as a batch file: the summaries first, and the shifts when these are answered."""
        cascade = cascade_of(self.config)
        asked, waiting = self._asked(cascade)
        count = write_requests(file, list(asked.values()), cascade.client)
        cascade.cache.close()
        kinds = Counter(request.kind for request in asked.values())
        return {
            "questions written": count, "summaries": kinds["summary"], "shifts": kinds["shift"],
            "shifts that wait for summaries": waiting,
            "tokens, about": sum(tokens(request.prompt) for request in asked.values()), "file": file,
        }  # fmt: skip

    def batch_in(self, file: str) -> dict[str, Any]:
        """Reads the answers of a batch into the cache; what cannot be used is counted, and stays open."""
        cascade = cascade_of(self.config)
        asked, _ = self._asked(cascade)
        read = read_answers(file, asked)
        for kind, prompt in self.history.prompts.items():
            cascade.cache.keep([kept for kept in read.kept.values() if kept.kind == kind], cascade.about(prompt))
        left, waiting = self._asked(cascade)
        cascade.cache.close()
        return {
            "answers kept": len(read.kept),
            "malformed lines": read.malformed,
            "errors of the service": read.failed,
            "answers that cannot be used": read.unusable,
            "answers to other questions": read.foreign,
            "answers that came twice": read.twice,
            "questions still without an answer": len(asked) - len(read.kept),
            "questions for the next batch": len(left),
            "shifts that wait for summaries": waiting,
        }

    def check(self) -> dict[str, int]:
        """Returns what is there, what is missing, and what should not be: see :func:`audit`."""
        cascade = cascade_of(self.config)
        rows = np.arange(len(self.history.partitions))
        asked = self._summaries(cascade, rows)
        found = cascade.cache.find(request.key for request in asked)
        kept = {row: found[r.key] for row, r in zip(rows.tolist(), asked, strict=True) if r.key in found}
        shifts = list(self._shifts(cascade, rows, kept).values())
        abouts = [cascade.about(prompt) for prompt in self.history.prompts.values()]
        later = int((self.history.partitions.number > 0).sum()) * self.history.asks_shifts
        audited = audit(cascade.cache, folder_of(self.config), asked, shifts, abouts, later - len(shifts))
        cascade.cache.close()
        return audited

    def show(self, user: str) -> Iterator[str]:
        """Yields what was written about a user, a partition a paragraph."""
        cascade, table, parts = cascade_of(self.config), self.stream.table, self.history.partitions
        rows = self._rows(user)
        asked = self._summaries(cascade, rows)
        found = cascade.cache.find(request.key for request in asked)
        kept = {row: found[r.key] for row, r in zip(rows.tolist(), asked, strict=True) if r.key in found}
        shifts = self._shifts(cascade, rows, kept)
        changed = cascade.cache.find(request.key for request in shifts.values())
        yield f"user {user}: {len(rows)} partitions"
        for row in rows.tolist():
            day = [
                datetime.fromtimestamp(int(table.timestamp[at]) / table.time_scale, UTC).date()
                for at in (parts.first[row], parts.last[row])
            ]
            size = int(parts.end[row] - parts.begin[row])
            yield f"partition {int(parts.number[row]) + 1}, {day[0]} to {day[1]}, {size} behaviours"
            yield f"  likes    {kept[row].text if row in kept else 'not asked yet'}"
            if parts.number[row] and self.history.asks_shifts:
                answer = changed.get(shifts[row].key) if row in shifts else None
                yield f"  changed  {answer.text if answer else 'not asked yet'}"
        cascade.cache.close()

    def prompts(self, user: str) -> Iterator[str]:
        """Yields what would be sent about a user; nothing is sent."""
        for request in self.history.summaries(self._rows(user)):
            yield request.prompt

    def forget(self, user: str) -> int:
        """Removes what was written about a user, and the vectors made of it; returns how many texts there were.

        A text that another user has word for word is the same text; it is asked for again when it is needed.
        """
        cascade = cascade_of(self.config)
        rows = self._rows(user)
        asked = self._summaries(cascade, rows)
        found = cascade.cache.find(request.key for request in asked)
        kept = {row: found[r.key] for row, r in zip(rows.tolist(), asked, strict=True) if r.key in found}
        keys = [request.key for request in [*asked, *self._shifts(cascade, rows, kept).values()]]
        count = cascade.cache.forget(keys)
        cascade.cache.close()
        folder = folder_of(self.config)
        shutil.rmtree(folder / "vectors", ignore_errors=True)
        for file in (folder / "words").glob("user-*.json"):
            file.unlink()
        return count
