"""The items' own words in place of a reading: what a language model must beat."""

from __future__ import annotations

from typing import Any

from recbole_cl.llm.clients.base import Answer, LLMClient, Request
from recbole_cl.llm.texts import CLAUSES, LONGEST_WORD, clean, tokens
from recbole_cl.registry import llm_clients


@llm_clients.register("items")
class Items(LLMClient):
    """Writes down the newest items, a sentence each; as clauses are averaged, a vector is the mean of items' vectors.

    It writes no shift: use it with ``liber_shift: none`` or ``difference``.
    """

    prefix = "items"
    instant = True
    remote = False
    defaults: dict[str, Any] = {}

    def ask(self, request: Request) -> Answer:
        if request.kind != "summary":
            return Answer("Nothing is said of it.", tokens(request.prompt), 6)
        found = []
        for behaviour in request.data["behaviours"][-CLAUSES:]:
            words = " ".join(word for name, values in behaviour.items() if name != "liked" for word in values)
            text = clean(words.replace(".", " ").replace(";", " "), LONGEST_WORD - 2)
            found.append(f"{text or 'an item'}.")
        text = " ".join(found)
        return Answer(text, tokens(request.prompt), tokens(text))
