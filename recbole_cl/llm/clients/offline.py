"""Summaries and shifts by counting: the client that needs no model, no network and no key."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_cl.llm.catalogue import is_title
from recbole_cl.llm.clients.base import Answer, LLMClient, Request
from recbole_cl.llm.texts import clauses, tokens
from recbole_cl.registry import llm_clients

RULES = 1
"""Version of the rules: other rules, other answers."""
KEPT = 1 << 16
"""Behaviours whose words are kept."""
_STOP = frozenset(["a", "an", "and", "at", "by", "for", "from", "in", "of", "on", "or", "set", "the", "to", "with"])
_STRENGTHS = ((0.6, "mostly"), (0.3, "often"), (0.0, "sometimes"))
_ORDER = {name: place for place, (_, name) in enumerate(reversed(_STRENGTHS))}
_CLAUSE = re.compile(r"(mostly|often|sometimes|dislikes) (.+)", re.IGNORECASE)


@llm_clients.register("offline")
class Offline(LLMClient):
    """Writes what occurs most among the items' words, and what has changed between two such texts.

    The same behaviours give the same text. Sentences are taken from a small set (a strength and a word), so that many
    users share them.

    Args:
        parameters: ``clauses`` (sentences at most), ``min_count`` (times that a word must occur).
    """

    prefix = "offline"
    remote = False
    instant = True

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self._read: dict[int, tuple[Mapping[str, Any], frozenset[str]]] = {}

    def identity(self) -> dict[str, Any]:
        return {"parameters": self.parameters, "rules": RULES}

    def ask(self, request: Request) -> Answer:
        if request.kind == "summary":
            text = self._summary(request.data["behaviours"])
        else:
            text = self._shift(request.data["previous"], request.data["current"])
        return Answer(text, tokens(request.prompt), tokens(text))

    def _summary(self, behaviours: Sequence[Mapping[str, Any]]) -> str:
        liked = [b for b in behaviours if b.get("liked") is not False]
        counts, bad = self._counts(liked), self._counts([b for b in behaviours if b.get("liked") is False])
        least = int(self.parameters["min_count"])
        ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
        ranked = [entry for entry in ranked if entry[1] >= least] or ranked[:1]
        found = []
        for word, count in ranked[: int(self.parameters["clauses"])]:
            share = count / len(liked)
            found.append(f"{next(name for low, name in _STRENGTHS if share >= low).capitalize()} {word}.")
        worst = [
            word
            for word, count in sorted(bad.items(), key=lambda entry: (-entry[1], entry[0]))
            if count >= least and count > counts.get(word, 0)
        ]
        found += [f"Dislikes {word}." for word in worst[:2]]
        return " ".join(found) or "Nothing in particular."

    def _counts(self, behaviours: Sequence[Mapping[str, Any]]) -> Counter[str]:
        """Returns how many behaviours have each word; titles count only where nothing else is known."""
        found: Counter[str] = Counter()
        for behaviour in behaviours:
            found.update(self._words(behaviour))
        return found

    def _words(self, behaviour: Mapping[str, Any]) -> frozenset[str]:
        """Returns the words that a behaviour is counted by; the same object, as a log's items are, is read once."""
        kept = self._read.get(id(behaviour))
        if kept is None or kept[0] is not behaviour:
            named = {k: v for k, v in behaviour.items() if k != "liked"}
            values = [v for k, v in named.items() if not is_title(k)] or list(named.values())
            kept = behaviour, frozenset(word for value in values for word in map(_word, value) if word)
            if len(self._read) >= KEPT:
                self._read.clear()
            self._read[id(behaviour)] = kept
        return kept[1]

    def _shift(self, previous: str, current: str) -> str:
        before, after = _strengths(previous), _strengths(current)
        found = []
        for word in sorted(after.keys() - before.keys()):
            found.append(f"Newly {word}.")
        for word in sorted(after.keys() & before.keys()):
            if after[word] != before[word]:
                found.append(f"{'More' if after[word] > before[word] else 'Less'} {word}.")
        for word in sorted(before.keys() - after.keys()):
            found.append(f"No longer {word}.")
        return " ".join(found[: 2 * int(self.parameters["clauses"])]) or "Nothing has changed."


@functools.lru_cache(maxsize=1 << 16)
def _word(value: str) -> str:
    """Returns a value as it is counted, a year as its decade; nothing for a number or a word that tells nothing."""
    value = value.strip(" ,.:;!?\"'()").lower()
    if re.fullmatch(r"(1[5-9]|20)\d\d", value):
        return f"of the {value[:3]}0s"
    return "" if value in _STOP or len(value) < 2 or value.isdigit() else value


def _strengths(text: str) -> dict[str, int]:
    """Returns word to strength of a summary's clauses; a clause in other words is a word of its own."""
    found = {}
    for clause in clauses(text):
        match = _CLAUSE.fullmatch(clause)
        strength, word = (match[1].lower(), match[2]) if match else ("often", clause)
        found[f"disliked {word}" if strength == "dislikes" else word] = _ORDER.get(strength, 0)
    return found
