"""What is written to a terminal: results on stdout, logs and one line of an error on stderr."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from recbole_cl.errors import ConfigError, OutputError, nearest, printable

PROGRAM = "recbole-cl"
HANDLER = "recbole_cl"
_LEVELS = ("debug", "info", "warning", "error", "critical")


class _Stderr(logging.StreamHandler):
    """Writes to what sys.stderr is now: a process that redirects it would keep a closed file."""

    @property
    def stream(self) -> Any:  # type: ignore[override]
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Ignores the stream of the moment in which the handler was made."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr is not None:  # a process whose stderr was closed
            super().emit(record)


class _Formatter(logging.Formatter):
    """One line a record, whatever names it holds; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable(record.message)
        return super().formatMessage(record)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM, which queues of clusters send, an interruption like Ctrl-C; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def setup_logging(state: str | None = None) -> None:
    """Sends log records to stderr, and nowhere else: RecBole's own set-up writes a folder ``log`` and works only once.

    Args:
        state: RecBole's name of a level: debug, info, warning, error or critical; None means info.

    Raises:
        ConfigError: If it is none of these.
    """
    name = (state or "info").lower()
    if name not in _LEVELS:
        raise ConfigError(
            f"property 'state' is {state!r}; it must be one of {', '.join(_LEVELS)}{nearest(name, _LEVELS)}"
        )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if handler.get_name() == HANDLER]:
        root.removeHandler(handler)
    handler = _Stderr()
    handler.set_name(HANDLER)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(message)s", "%d %b %H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(name.upper() if speaks() else "ERROR")


def rank() -> int | None:
    """Returns the number of this process among several under torchrun, without importing torch.

    Raises:
        ConfigError: If the environment gives numbers that are none.
    """
    given = {key: os.environ.get(key) for key in ("WORLD_SIZE", "RANK")}
    for key, value in given.items():
        if value is not None and not (value.strip().isascii() and value.strip().isdigit()):
            raise ConfigError(
                f"the environment variable {key} is {value!r}; it must be a number, which torchrun sets; unset it for "
                f"a run of one process"
            )
    return int(given["RANK"]) if given["RANK"] is not None and int(given["WORLD_SIZE"] or 1) != 1 else None


def speaks() -> bool:
    """Tells whether this process is the one of several that shows what happens."""
    return rank() in (None, 0)


def show(text: str) -> None:
    """Prints what was asked for, on stdout: a letter that the terminal does not have, or a control character, escaped.

    Raises:
        OutputError: If it cannot be written (a full disk); a reader that has gone away is a ``BrokenPipeError``.
    """
    if sys.stdout is None:  # closed when the process began: nobody wants to know
        return
    encoding = sys.stdout.encoding or "utf-8"
    lines = "\n".join(printable(line) for line in text.split("\n"))
    try:
        print(lines.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: closed by this process
        raise OutputError(f"standard output cannot be written ({error}); what was done is done") from error


def tell(message: str) -> None:
    """Prints one line on stderr: who speaks, and what there is to say."""
    if sys.stderr is None:
        return
    try:
        number = rank()
    except ConfigError:
        number = None
    who = PROGRAM if number is None else f"{PROGRAM} (rank {number})"
    line = f"{who}: {printable(' '.join(message.split()))}"
    encoding = sys.stderr.encoding or "utf-8"
    print(line.encode(encoding, "backslashreplace").decode(encoding), file=sys.stderr)
