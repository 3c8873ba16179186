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
from safetensors.torch import load_file

from recbole_cl import disk
from recbole_cl.errors import ConfigError
from recbole_cl.llm.cache import Kept
from recbole_cl.llm.cascade import Cascade
from recbole_cl.llm.encode import encode_texts
from recbole_cl.llm.partition_store import PartitionStore, partition_key
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
        self._encoded: dict[str, torch.Tensor] = {}

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
        past = closed <= stage
        projection = self._projection(known, summaries, shifts, rows, past, size)
        asked = [self.config["liber_encoder"], self.config.component_parameters("liber_encoder")]
        about = [*asked, projection.mean.tolist(), projection.matrix.tolist()]
        of = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
        store = PartitionStore(self.folder / "vectors" / of)
        keys = [
            partition_key(kept.key, shifts[row].key if row in shifts else "")
            for kept, row in zip(summaries, rows.tolist(), strict=True)
        ]
        found = store.find(keys, 2 * size)
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        if missing:
            first = {key: place for place, key in reversed(list(enumerate(keys)))}
            places = [first[key] for key in missing]
            made = self._made(projection, [summaries[p] for p in places], [shifts.get(int(rows[p])) for p in places])
            store.keep(missing, made.numpy())
            found.update(zip(missing, made.numpy(), strict=True))
        both = torch.from_numpy(np.stack([found[key] for key in keys]))
        empty = Kept("", "shift", "", 0, 0, 0.0)
        second = [shifts.get(row, empty) for row in rows.tolist()]
        pairs = list(zip(summaries, second, strict=True))
        self.history.seconds[stage] = sum(a.seconds + b.seconds for a, b in pairs)
        new = Knowledge(
            torch.from_numpy(parts.user[rows]),
            torch.from_numpy(parts.number[rows]),
            closed,
            both[:, :size].contiguous(),
            both[:, size:].contiguous(),
            torch.tensor([[a.prompt_tokens, a.answer_tokens, b.prompt_tokens, b.answer_tokens] for a, b in pairs]),
            torch.tensor([(a.fallback is not None) + (b.fallback is not None) for a, b in pairs]),
        )
        known = known.joined(new)
        known.mean, known.matrix = projection.mean, projection.matrix
        return known

    def _projection(
        self, known: Knowledge, summaries: list[Kept], shifts: dict[int, Kept], rows: np.ndarray, past: torch.Tensor,
        size: int,
    ) -> Projection:  # fmt: skip
        """Returns the projection that there is, or one fitted on the texts that are past, kept for the next time."""
        if len(known.mean):
            return Projection(known.mean, known.matrix)
        here = [place for place, flag in enumerate(past.tolist()) if flag]
        fitted = [summaries[place] for place in here]
        fitted += [shifts[row] for row in rows[here].tolist() if row in shifts]
        about = [[kept.key for kept in fitted], size, self.config["seed"], self.encoder]
        parameters = self.config.component_parameters("liber_encoder")
        name = hashlib.sha256(json.dumps([about, parameters], sort_keys=True, default=str).encode()).hexdigest()
        file = self.folder / "vectors" / f"{name}.safetensors"
        made = _read(file)
        if made is None:
            if len(fitted) > 1:
                fit = Projection.fit(clause_vectors([kept.text for kept in fitted], self.encode)[0], size)
            else:  # nothing to fit on yet: directions by chance keep distances
                width = self.encode([summaries[0].text]).size(1)
                generator = torch_generator(self.config["seed"], 0, "liber/projection")
                fit = Projection(torch.zeros(width), torch.randn(width, size, generator=generator) / size**0.5)
            made = {"mean": fit.mean.contiguous(), "matrix": fit.matrix.contiguous()}
            _write(file, made)
        return Projection(made["mean"], made["matrix"])

    def _made(self, projection: Projection, summaries: list[Kept], shifts: list[Kept | None]) -> torch.Tensor:
        """Returns the vectors of summaries and shifts side by side, shape ``[n, 2 size]``; without a shift zero."""
        texts = [kept.text for kept in [*summaries, *shifts] if kept is not None]
        raw, distinct = clause_vectors(texts, self.encode)
        _LOG.info("LIBER: %d texts have %d distinct clauses, encoded by %s", len(texts), distinct, self.encoder)
        made = projection(raw)
        second = torch.zeros(len(summaries), made.size(1))
        second[torch.tensor([kept is not None for kept in shifts])] = made[len(summaries) :]
        return torch.cat([made[: len(summaries)], second], dim=1)

    def encode(self, texts: Any) -> torch.Tensor:
        """Returns the configured encoder's vectors of different texts, shape ``[n, width]``; each is encoded once."""
        texts = list(dict.fromkeys(texts))
        new = [text for text in texts if text not in self._encoded]
        if new:
            self._encoded.update(zip(new, self._encode(new), strict=True))
        return torch.stack([self._encoded[text] for text in texts])

    def _encode(self, texts: list[str]) -> torch.Tensor:
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
    if made.keys() >= {"mean", "matrix"}:
        return {name: value.clone() for name, value in made.items()}  # aligned as what is computed is
    _LOG.warning("LIBER: %s is damaged; it is made anew", file)
    return None


def _write(file: Path, made: dict[str, torch.Tensor]) -> None:
    try:
        disk.own_folder(file.parent, "liber_cache")
        part = file.with_name(f".{os.getpid()}-{file.name}.part")
        disk.write_tensors(part, made)
        os.replace(part, file)  # a link in its place goes, what it leads to stays
    except OSError as error:
        _LOG.warning("LIBER: vectors are not kept in %s: %s", file.parent, error.strerror or error)
