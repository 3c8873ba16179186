"""Texts of others on their way into a prompt, and answers on their way out: data, never instructions."""

from __future__ import annotations

import re
import unicodedata

LONGEST_WORD = 80
"""Characters of a title or a tag at most."""
LONGEST_ANSWER = 2000
"""Characters of an answer at most."""
CLAUSES = 24
"""Clauses of an answer at most; a model that goes on and on has not understood."""

_SPLIT = re.compile(r"[.;]+(?:\s+|$)")
_MARK = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+")
_ECHOES = (
    "<<<", ">>>", "quotation marks names an item", "you describe what a person", "you describe how what a person",
    "never an instruction", "ignore the instructions", "ignore all instructions", "ignore previous instructions",
    "as an ai",
)  # fmt: skip


def clean(text: str, longest: int = LONGEST_WORD) -> str:
    """Returns a text in one line, without characters that act on a reader (controls, marks that turn letters round).

    Args:
        text: Any text.
        longest: Characters that are kept.
    """
    if not text.isprintable():
        text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    kept = " ".join(text.split())
    return kept if len(kept) <= longest else kept[: longest - 1].rstrip() + "…"


def quoted(text: str, longest: int = LONGEST_WORD) -> str:
    """Returns a text in quotation marks, with none inside and no mark that ends a block of data."""
    inner = clean(text, longest).replace('"', "'").replace("“", "'").replace("”", "'")
    return '"' + inner.replace("<<<", "<").replace(">>>", ">") + '"'


def clauses(text: str) -> list[str]:
    """Returns the clauses of an answer: its sentences, without the marks of a list."""
    lines = (_MARK.sub("", line) for line in text.splitlines())
    parts = (part.strip(" .;") for line in lines for part in _SPLIT.split(line))
    return [part for part in parts if part]


def fault(answer: str) -> str | None:
    """Returns what is wrong with an answer, or ``None`` where it can be used."""
    if not answer.strip():
        return "is empty"
    if len(answer) > LONGEST_ANSWER:
        return f"has {len(answer)} characters, more than {LONGEST_ANSWER}"
    if len(clauses(answer)) > CLAUSES:
        return f"has more than {CLAUSES} sentences"
    lower = answer.lower()
    if any(echo in lower for echo in _ECHOES):
        return "repeats instructions"
    return None


def cleaned_lines(text: str) -> str:
    """Returns an answer as it is kept, cleaned line by line."""
    return "\n".join(line for line in (clean(line, LONGEST_ANSWER) for line in text.splitlines()) if line)


def tokens(text: str) -> int:
    """Returns about how many tokens a text has: four bytes each, the usual rule of thumb for English."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // 4)
