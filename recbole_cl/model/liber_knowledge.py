"""What was learnt of the users' partitions: vectors of summaries and shifts, what they cost, where they came from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recbole_cl.errors import ConfigError
from recbole_cl.llm.cache import Kept
from recbole_cl.llm.cascade import Cascade
from recbole_cl.llm.encode import encode_texts
from recbole_cl.llm.vectors import Projection, clause_vectors
from recbole_cl.model.liber_texts import History, cascade_of, folder_of
from recbole_cl.rng import torch_generator

_LOG = logging.getLogger("recbole_cl")


@dataclass
class Knowledge:
    """Rows by user and then by time; columns of equal length ``P``.

    Attributes:
        user: User ids.
        number: Place among the user's partitions, from 0.
        stage: Stage of the behaviour that closed it: the stage that its calls are booked to.
        summary: Vectors, shape ``[P, size]``.
        shift: Vectors, 0 for a user's first partition, shape ``[P, size]``.
        bill: Tokens read and written of the summary, then of the shift, shape ``[P, 4]``.
        fallback: How many of the two texts are the offline client's in place of an answer, shape ``[P]``.
        mean: See :class:`~recbole_cl.llm.vectors.Projection`; empty until there is one.
        matrix: As above.
    """

    user: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    number: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    stage: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    summary: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    shift: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    bill: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 4, dtype=torch.int64))
    fallback: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    mean: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    matrix: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def __len__(self) -> int:
        return len(self.user)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns all of it, as tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def joined(self, new: Knowledge) -> Knowledge:
        """Returns the rows of both, in order; the projection is this one's."""
        names = [f.name for f in fields(self) if f.name not in ("mean", "matrix")]
        if not len(self):
            columns = {name: getattr(new, name) for name in names}
        else:
            columns = {name: torch.cat([getattr(self, name), getattr(new, name)]) for name in names}
        order = torch.from_numpy(np.lexsort((columns["number"].numpy(), columns["user"].numpy())))
        return Knowledge(**{k: v[order] for k, v in columns.items()}, mean=self.mean, matrix=self.matrix)

    def starts(self, n_users: int) -> torch.Tensor:
        """Returns where each user's rows begin, shape ``[n_users + 1]``."""
        return torch.searchsorted(self.user, torch.arange(n_users + 1))


class Learner:
    """Asks for what is missing and makes vectors of it.

    Args:
        config: The run's configuration.
        history: The log's partitions.

    Attributes:
        encoder: The encoder that was used: ``hash`` where the one that was asked for is not installed.
    """

    def __init__(self, config: Any, history: History) -> None:
        self.config, self.history = config, history
        self.folder = folder_of(config)
        self.encoder = str(config["liber_encoder"])

    def learn(self, known: Knowledge, stage: int, until: int) -> Knowledge:
        """Returns the knowledge with what was missing of the partitions that close at a position or before it.

        Args:
            known: What is known already.
            stage: The stage that is prepared; the projection is fitted on what closed in it or earlier.
            until: The position.
        """
        parts = self.history.partitions
        have = {(int(u), int(n)) for u, n in zip(known.user, known.number, strict=True)}
        rows = np.flatnonzero(parts.closer <= until)
        rows = np.array([r for r in rows if (int(parts.user[r]), int(parts.number[r])) not in have], dtype=np.int64)
        if not len(rows):
            return known
        cascade = cascade_of(self.config)
        try:
            summaries, shifts = self._answers(cascade, rows)
        finally:
            self.history.calls[stage] = self.history.calls.get(stage, 0) + cascade.spent.calls
            cascade.cache.close()
        return self._vectors(known, rows, stage, summaries, shifts)

    def _answers(self, cascade: Cascade, rows: np.ndarray) -> tuple[list[Kept], dict[int, Kept]]:
        """Returns the summary of each row, and the shift of each row that has a predecessor."""
        parts, prompts = self.history.partitions, self.history.prompts
        later = rows[(parts.number[rows] > 0) & self.history.asks_shifts]
        wanted = np.union1d(rows, later - 1)  # of one user, partitions follow each other
        asked = cascade.named(prompts["summary"], self.history.summaries(wanted))
        kept = dict(zip(wanted.tolist(), cascade.wave(prompts["summary"], asked, "summaries"), strict=True))
        pairs = [self.history.shift(kept[row - 1].text, kept[row].text) for row in later.tolist()]
        asked = cascade.named(prompts["shift"], pairs)
        shifts = dict(zip(later.tolist(), cascade.wave(prompts["shift"], asked, "shifts"), strict=True))
        return [kept[row] for row in rows.tolist()], shifts

    def _vectors(
        self, known: Knowledge, rows: np.ndarray, stage: int, summaries: list[Kept], shifts: dict[int, Kept]
    ) -> Knowledge:
        parts, size = self.history.partitions, int(self.config["liber_size"])
        closed = torch.from_numpy(self.history.stream.table.stage[parts.closer[rows]])
        both = [*summaries, *shifts.values()]
        about = [[k.key for k in both], closed.tolist(), stage, size, self.config["seed"]]
        about += [self.encoder, known.mean.tolist()]
        file = self.folder / "vectors" / f"{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.safetensors"
        made = _read(file)
        if made is None:
            made = self._encode(known, both, closed, len(summaries), stage, size, [int(r in shifts) for r in rows])
            _write(file, made)
        projection = Projection(made["mean"], made["matrix"])
        empty = Kept("", "shift", "", 0, 0, 0.0)
        second = [shifts.get(row, empty) for row in rows.tolist()]
        pairs = list(zip(summaries, second, strict=True))
        self.history.seconds[stage] = sum(a.seconds + b.seconds for a, b in pairs)
        new = Knowledge(
            torch.from_numpy(parts.user[rows]),
            torch.from_numpy(parts.number[rows]),
            closed,
            made["summary"],
            made["shift"],
            torch.tensor([[a.prompt_tokens, a.answer_tokens, b.prompt_tokens, b.answer_tokens] for a, b in pairs]),
            torch.tensor([(a.fallback is not None) + (b.fallback is not None) for a, b in pairs]),
        )
        known = known.joined(new)
        known.mean, known.matrix = projection.mean, projection.matrix
        return known

    def _encode(
        self, known: Knowledge, both: list[Kept], closed: torch.Tensor, n: int, stage: int, size: int, has: list[int]
    ) -> dict[str, torch.Tensor]:
        raw, distinct = clause_vectors([kept.text for kept in both], self.encode)
        _LOG.info("LIBER: %d texts have %d distinct clauses, encoded by %s", len(both), distinct, self.encoder)
        shifted = torch.tensor(has, dtype=torch.bool)
        past = closed <= stage
        past = torch.cat([past, past[shifted]])
        if len(known.mean):
            projection = Projection(known.mean, known.matrix)
        elif int(past.sum()) > 1:
            projection = Projection.fit(raw[past], size)
        else:  # nothing to fit on yet: directions by chance keep distances
            drawn = torch.randn(
                raw.size(1), size, generator=torch_generator(self.config["seed"], 0, "liber/projection")
            )
            projection = Projection(torch.zeros(raw.size(1)), drawn / size**0.5)
        made = projection(raw)
        shift = torch.zeros(n, size)
        shift[shifted] = made[n:]
        return {
            "summary": made[:n].contiguous(), "shift": shift, "mean": projection.mean.contiguous(),
            "matrix": projection.matrix.contiguous(),
        }  # fmt: skip

    def encode(self, texts: Any) -> torch.Tensor:
        """Returns the configured encoder's vectors of texts, shape ``[n, width]``."""
        parameters = self.config.component_parameters("liber_encoder")
        seed, store = int(self.config["seed"]), self.config["text_cache"]
        if self.encoder == "minilm":
            try:
                return encode_texts(self.encoder, texts, seed, "liber_encoder", parameters, store)
            except ConfigError as error:
                _LOG.warning("LIBER: %s; the encoder 'hash' stands in", error)
                self.encoder, parameters = "hash", None
        return encode_texts(self.encoder, texts, seed, "liber_encoder", parameters, store)


def _read(file: Path) -> dict[str, torch.Tensor] | None:
    """Returns the vectors of a file, or ``None`` where it is not there or damaged."""
    if not file.is_file():
        return None
    try:
        made = load_file(file)
    except (OSError, SafetensorError):
        made = {}
    if made.keys() >= {"summary", "shift", "mean", "matrix"}:
        return {name: value.clone() for name, value in made.items()}  # aligned as what is computed is
    _LOG.warning("LIBER: %s is damaged; its vectors are made anew", file)
    return None


def _write(file: Path, made: dict[str, torch.Tensor]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{os.getpid()}-{file.name}.part")
        save_file(made, part)
        os.replace(part, file)
    except OSError as error:
        _LOG.warning("LIBER: vectors are not kept in %s: %s", file.parent, error.strerror)
