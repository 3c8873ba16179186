"""Errors a user can act on.

Every one carries a sentence that names the field, the value and the remedy. The command line prints that
sentence without a traceback and ends with :attr:`exit_code`.
"""

from __future__ import annotations

import difflib
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
