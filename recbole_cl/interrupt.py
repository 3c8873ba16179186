"""Ctrl-C: one line and exit code 130, from the first moment of the command on.

Importing numpy, torch and RecBole takes seconds. An interruption there would end in a traceback through somebody
else's module, or be turned into an ImportError, or be swallowed. Nothing has been done yet that could be left half
done, so the command just ends. This module is imported before everything else, and imports nothing that Python has not
imported by then: what is left is the start of Python itself, some hundredths of a second.

A process that only imports the package keeps the handler that it has.
"""

import _signal as signal  # the module signal itself imports enum, collections and more first
import os
import sys

LINE = b"recbole-cl: interrupted; nothing was done yet\n"
_seen: list[bool] = []


def is_command() -> bool:
    """Tells whether this process was started as the command: the program, the script, or the module."""
    program = os.path.basename(sys.argv[0]) if sys.argv else ""
    if program in ("recbole-cl", "recbole-cl.exe", "run_recbole_cl.py"):
        return True
    return program in ("-m", "-c") and any("recbole_cl.cli" in word for word in sys.orig_argv[1:4])


def end_at_once() -> None:
    """Lets an interruption end the process with one line, if the process is the command and nobody ignores it."""
    if is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(*_: object) -> None:
    try:
        os.write(2, LINE)
    finally:
        os._exit(130)


def raise_from_here() -> None:
    """From here on an interruption is a ``KeyboardInterrupt`` again, for work that has something to put away."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, _raise)


def _raise(*_: object) -> None:
    _seen.append(True)
    raise KeyboardInterrupt


def was_seen() -> bool:
    """Tells whether there was an interruption, also where a library has turned it into an error of its own."""
    return bool(_seen)
