"""What a run writes at its end, and what of an earlier run it moves out of the way before it writes at all.

Nothing in the folder is touched until there is something to put in its place: a run that is refused, or that is killed
before its first checkpoint, leaves all as it was.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from recbole_cl import checkpoint, distributed
from recbole_cl.report import write_report
from recbole_cl.results.journal import RESULTS, Journal, set_aside
from recbole_cl.training.run_state import RunState
from recbole_cl.training.store import imported_columns, keep_stream

LOGGER = logging.getLogger("recbole_cl")


class Output:
    """The folder of a run, as this process writes into it.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._in_the_way: tuple[str, ...] = (*RESULTS, "checkpoints", "versions")

    def go_on(self) -> None:
        """The run goes on from a checkpoint in the folder, so what is there is its own, but for results."""
        self._in_the_way = RESULTS

    def keep(self, run: RunState, store: str | None) -> str | None:
        """Keeps what the run is trained over, so that it can be loaded without its log; returns the name of the store.

        Args:
            run: The run.
            store: The name where it is kept already.
        """
        if run.config["saved"] is False or store is not None:
            return store
        with distributed.current().together():
            if run.main:
                try:
                    store = keep_stream(self.folder, run.stream, imported_columns(run.config))
                except TypeError as error:  # a dataset class of another package
                    run.journal.warn(f"{error}; the run cannot be loaded without its log")
        return store

    def make_room(self) -> None:
        """Moves what an earlier run left aside, before the first write."""
        set_aside(self.folder, self._in_the_way)
        self._in_the_way = ()

    def finish(self, journal: Journal, complete: bool) -> dict[str, Any]:
        """Writes the results and returns them; those of a run that was complete before stay as they are."""
        return self.complete(journal) if complete else self.write(journal)

    def write(self, journal: Journal) -> dict[str, Any]:
        """Writes the results and the report of them; returns the result."""
        self.make_room()
        result = journal.write(self.folder)
        with checkpoint.explained(self.folder):
            write_report(result, self.folder)
        return result

    def complete(self, journal: Journal) -> dict[str, Any]:
        """Returns the results of a run that was complete before; what is there of them stays as it is."""
        LOGGER.info("nothing is left to do: the run in %s is complete", self.folder)
        try:
            result = json.loads((self.folder / "result.json").read_text(encoding="utf-8"))
            if not isinstance(result["matrix"], dict):
                raise TypeError("matrix")
        except FileNotFoundError:  # it was killed between its last checkpoint and its results
            return self.write(journal)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            LOGGER.warning("result.json in %s cannot be read (%s); it is written again", self.folder, error)
            return self.write(journal)
        if not (self.folder / "report.html").exists():
            with checkpoint.explained(self.folder):
                write_report(result, self.folder)
        return {**result, "output_dir": str(self.folder)}
