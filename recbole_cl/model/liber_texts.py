"""From a stream to LIBER's questions: the partitions of the log, and what a prompt tells of each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_cl.llm.cache import AnswerCache
from recbole_cl.llm.cascade import Cascade, Limits
from recbole_cl.llm.catalogue import Catalogue, is_title, line, profile
from recbole_cl.llm.clients.base import Request
from recbole_cl.llm.partitions import Partitions, Rules, visible
from recbole_cl.llm.prompts import Prompt, read_prompt
from recbole_cl.llm.texts import tokens
from recbole_cl.registry import llm_clients
from recbole_cl.stream.build import Stream

SECONDS_A_DAY = 86400


def folder_of(config: Any) -> Path:
    """Returns the folder that keeps answers and vectors: of a saved run that has moved, where it lies now."""
    if config["liber_folder"]:
        return Path(config["liber_folder"]).expanduser()
    if config["output_dir"]:
        return (getattr(config, "folder", None) or Path(config["output_dir"]).expanduser()) / "knowledge"
    return Path("runs") / "knowledge" / str(config["dataset"])


def rules_of(config: Any, stream: Stream) -> Rules:
    """Returns when a partition closes, in the unit of the log's times."""
    days = config["liber_partition_days"]
    return Rules(
        config["liber_partition_size"], None if days is None else days * SECONDS_A_DAY * stream.table.time_scale
    )


def cascade_of(config: Any) -> Cascade:
    """Returns who asks the configured client."""
    limits = Limits(
        int(config["liber_concurrency"]),
        int(config["liber_retries"]),
        calls=config["liber_max_calls"],
        tokens=config["liber_max_tokens"],
        calls_per_minute=config["liber_calls_per_minute"],
    )
    offline = llm_clients.get("offline")
    cache = AnswerCache(folder_of(config) / "answers.sqlite")
    client = config.component("liber_client")(config.component_parameters("liber_client"))
    return Cascade(
        llm_clients.name_of(config["liber_client"]), client, offline({"clauses": 8, "min_count": 2}), cache, limits,
        progress=bool(config["show_progress"]), consent=bool(config["liber_consent"]),
    )  # fmt: skip


class History:
    """The partitions of a stream and the questions about them.

    Args:
        config: The run's configuration.
        stream: The stream.

    Attributes:
        partitions: All closed partitions of the log.
        calls: Calls that this process made, by stage; the models of a stage, references too, ask once among them.
        seconds: Seconds that a stage's answers took, also those that an earlier process had.
        seen: How many of the user's partitions a sample at each position sees, shape ``[N]``.
        whole: A summary tells of all that came before its partition's end.
        asks_shifts: Shifts are asked for.
    """

    def __init__(self, config: Any, stream: Stream) -> None:
        self.config, self.stream = config, stream
        table = stream.table
        self.partitions = Partitions.of(table.seq[: len(table)], table.ptr, table.timestamp, rules_of(config, stream))
        self.seen = visible(self.partitions, table.user, np.arange(len(table)), table.timestamp)
        self.whole = config["liber_reading"] == "whole"
        self.asks_shifts = config["liber_shift"] == "cascade" and not self.whole
        self.calls: dict[int, int] = {}
        self.seconds: dict[int, float] = {}
        self._items: Catalogue | None = None
        self._written: dict[tuple[int, bool | None], tuple[dict[str, Any], str]] = {}

    @functools.cached_property
    def prompts(self) -> dict[str, Prompt]:
        """The prompts by kind, read where they are needed: a saved run that is only asked does without."""
        return {kind: read_prompt(kind, str(self.config["liber_prompts"])) for kind in ("summary", "shift")}

    def _read(self) -> None:
        if self._items is None:
            kept = folder_of(self.config) / "words"
            self._items = Catalogue(self.config, "item", "liber_item_fields", self.config["liber_item_fields"], kept)
            self._users = Catalogue(self.config, "user", "liber_user_fields", self.config["liber_user_fields"], kept)
            dataset = self.stream.dataset
            self._item_tokens = dataset.field2id_token[dataset.iid_field]
            self._user_tokens = dataset.field2id_token[dataset.uid_field]
            label = self.config["LABEL_FIELD"]
            labelled = label in dataset.inter_feat.interaction
            self._liked = dataset.inter_feat[label].numpy() > 0 if labelled else None

    def behaviours(self, begin: int, end: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Returns the behaviours in a range of the users' sequences, as data and as lines of a prompt."""
        self._read()
        assert self._items is not None
        at = self.stream.table.seq[begin:end]
        items = self.stream.table.item[at].tolist()
        liked: list[bool | None] = [None] * len(items) if self._liked is None else self._liked[at].tolist()
        both = [self._behaviour(item, like) for item, like in zip(items, liked, strict=True)]
        return [data for data, _ in both], [shown for _, shown in both]

    def _behaviour(self, item: int, liked: bool | None) -> tuple[dict[str, Any], str]:
        """Returns a behaviour as data and as a line; an item is written once."""
        if (item, liked) not in self._written:
            assert self._items is not None
            words = self._items.words(str(self._item_tokens[item]))
            self._written[item, liked] = {**words, "liked": liked}, line(words, liked)
        return self._written[item, liked]

    def profile(self, user: int) -> str:
        """Returns what prompts tell of a user."""
        self._read()
        return profile(self._users.words(str(self._user_tokens[user])))

    def summaries(self, rows: Sequence[int] | np.ndarray) -> list[Request]:
        """Returns the questions for summaries of some partitions."""
        found, longest = [], int(self.config["liber_longest"])
        for row in rows:
            begin, end = int(self.partitions.begin[row]), int(self.partitions.end[row])
            if self.whole:
                begin = int(self.stream.table.ptr[self.partitions.user[row]])
            data, lines = self.behaviours(begin, end)
            if len(lines) > longest:
                lines = [f"({len(lines) - longest} earlier ones are left out)", *lines[-longest:]]
            values = {"profile": self.profile(int(self.partitions.user[row])), "behaviours": "\n".join(lines)}
            found.append(Request("summary", self.prompts["summary"].fill(values), {"behaviours": data}))
        return found

    def item_texts(self) -> list[str]:
        """Returns a text for each item, by id: its words, a sentence each; empty where nothing is told of it."""
        self._read()
        assert self._items is not None
        found = []
        for token in self._item_tokens:
            words = self._items.words(str(token))
            titles = [" ".join(words[name]) for name in words if is_title(name)]
            others = [word for name in words if not is_title(name) for word in words[name]]
            found.append(". ".join([*titles, *others]))
        return found

    def shift(self, previous: str, current: str, of: str = "") -> Request:
        """Returns the question for the shift between two summaries; ``of`` names the newer one's question."""
        values = {"previous": previous, "current": current}
        return Request("shift", self.prompts["shift"].fill(values), {**values, "of": of})

    def naive(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns what asking anew at every behaviour, with all that came before, costs: tokens read at each position.

        Returns:
            Stage and tokens of each position, shape ``[N]`` each.
        """
        self._read()
        assert self._items is not None
        table = self.stream.table
        of_item = np.array([tokens(line(self._items.words(str(token)))) for token in self._item_tokens])
        own = of_item[table.item[table.seq[: len(table)]]]
        sums = np.cumsum(own)
        before = np.r_[0, sums][table.ptr[table.user[table.seq[: len(table)]]]]
        read = np.empty(len(table), dtype=np.int64)
        read[table.seq[: len(table)]] = sums - before + tokens(self.prompts["summary"].text)
        return table.stage, read


_NEWEST: list[tuple[Any, Stream, History]] = []


def history_of(config: Any, stream: Stream) -> History:
    """Returns the history of a stream; that of the newest one is kept, since models are made anew at every stage."""
    for asked, of, found in _NEWEST:
        if asked is config and of is stream:
            return found
    found = History(config, stream)
    _NEWEST[:] = [(config, stream, found)]
    return found
