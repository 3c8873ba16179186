"""A run as it was left, without its log: its configuration, its stream, and a runner that stands where it ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole.data.transform import construct_transform

from recbole_cl.config.restore import RestoredConfig
from recbole_cl.errors import CheckpointError
from recbole_cl.stream.build import Stream
from recbole_cl.training.resume import loading
from recbole_cl.training.runner import Runner
from recbole_cl.training.store import read_stream
from recbole_cl.training.versions import Versions


@dataclass
class SavedRun:
    """A version of a run, read from its folder.

    Attributes:
        folder: The run's folder.
        versions: The versions that it has.
        number: The one that was read.
        state: Its checkpoint.
        config: Its configuration.
        stream: What it was trained over.
        log: How the columns of its log were named where it was imported from, or ``None``.
    """

    folder: Path
    versions: Versions
    number: int
    state: dict[str, Any]
    config: RestoredConfig
    stream: Stream
    log: Any

    @classmethod
    def open(
        cls,
        folder: str | Path,
        version: int | None = None,
        model_class: type | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> SavedRun:
        """Reads a version of a run.

        Args:
            folder: The run's folder, wherever it lies now.
            version: Its number; by default the champion.
            model_class: The model's class, where nobody here answers to its name.
            changes: Properties that differ from now on.

        Raises:
            CheckpointError: If something of it is missing, truncated, changed or foreign; the message names it.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"{str(folder)!r} is no folder; give the output folder of a run")
        versions = Versions.of(folder)
        number = versions.champion if version is None else version
        return cls.of_state(versions, number, versions.read(number), model_class, changes)

    @classmethod
    def of_state(
        cls,
        versions: Versions,
        number: int,
        state: dict[str, Any],
        model_class: type | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> SavedRun:
        """Returns the run of a checkpoint that was read; the arguments are those of :meth:`open`."""
        folder = versions.folder
        if not state.get("store"):
            raise CheckpointError(
                f"the run in {folder} did not keep what it was trained over (it was made by an older version of "
                f"RecBole-CL), so it cannot be loaded; run it again"
            )
        config = RestoredConfig(state["config"], model_class, changes, folder)
        stream, fingerprint, log = read_stream(folder, state["store"], config)
        if fingerprint != state["data"]:
            raise CheckpointError(f"version {number}: its store {state['store']} is that of another log; run again")
        if state["stage"] != len(stream) - 1:
            raise CheckpointError(
                f"the run in {folder} ended after stage {state['stage'] + 1} of {len(stream)}; finish it with the same "
                f"command and --resume=True"
            )
        return cls(folder, versions, number, state, config, stream, log)

    def runner(self, config: Any = None, stream: Stream | None = None) -> Runner:
        """Returns a runner that stands where this version ended.

        Args:
            config: Another configuration of the same model.
            stream: A longer stream, whose first stages are those of this version.
        """
        config = self.config if config is None else config
        construct_transform(config)  # it names its fields in the configuration, where models read them
        runner = Runner(config)
        runner.folder = self.folder
        runner.begin(self.stream if stream is None else stream)
        with loading(f"version {self.number}"):
            runner.adopt(self.state)
        return runner
