"""Errors a user can act on.

Every one carries a sentence that names the field, the value and the remedy. The command line prints that
sentence without a traceback and ends with :attr:`exit_code`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class RecBoleCLError(Exception):
    """Base of all errors of this package."""

    exit_code = 1


class ConfigError(RecBoleCLError, ValueError):
    """A property, name or combination that was asked for makes no sense."""

    exit_code = 2


class DataError(RecBoleCLError, ValueError):
    """The interaction log cannot be cut into the stream that was asked for."""

    exit_code = 2


class CheckpointError(RecBoleCLError, RuntimeError):
    """A checkpoint is truncated, foreign, or belongs to another configuration or log."""

    exit_code = 2


class OutputError(RecBoleCLError, OSError):
    """The output folder cannot be written."""

    exit_code = 2


class TrainingError(RecBoleCLError, ArithmeticError):
    """Training went wrong: a loss term is NaN or infinite."""


class ProcessError(RecBoleCLError, RuntimeError):
    """Another process of a run under torchrun has failed; the message names it and its reason."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    table = {k.lower(): k for k in known}
    match = difflib.get_close_matches(str(name).lower(), table, n=1, cutoff=0.6)
    return f"; did you mean {table[match[0]]!r}?" if match else ""


_ACTS = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Returns a text with everything that a terminal acts on, or that breaks its line, written as an escape.

    Names come from logs and files of others: control characters, ends of lines and the marks that turn the order of
    letters round are shown (``\\x1b``) and not sent. Tabs stay.
    """
    return _ACTS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
