"""What a run was trained over, kept in its folder: ``store/<hash of the content>``, safetensors and JSON.

A store is written once for a stream, atomically, as checkpoints are (:mod:`recbole_cl.checkpoint`), and never changed;
checkpoints refer to it by its name. So a run can be loaded, asked and updated from any working directory and from a
moved folder, without its log.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

from recbole_cl import checkpoint, disk
from recbole_cl.errors import CheckpointError, DataError
from recbole_cl.stream.build import Stream
from recbole_cl.stream.store import stream_of, stream_state
from recbole_cl.tree import tree_hash

FOLDER = "store"
FORMAT = 1


def keep_stream(folder: Path, stream: Stream, log: Any = None) -> str:
    """Writes a stream into a run's folder, unless it is there already.

    Args:
        folder: The run's folder.
        stream: The stream.
        log: How the log's columns were named where it was imported from, or ``None``.

    Returns:
        The name of the store.

    Raises:
        OutputError: If the folder cannot be written.
    """
    state = {"format": FORMAT, "fingerprint": stream.fingerprint(), "stream": stream_state(stream), "log": log}
    name = tree_hash(state)
    root = folder / FOLDER
    target = root / name
    if (target / "manifest.json").is_file():
        return name
    with checkpoint.explained(folder):
        writing = root / f".writing-{os.getpid()}"
        disk.own_folder(root)
        disk.clear(writing)
        written = checkpoint.save(writing, 1, state, keep=1)
        disk.clear(target)
        os.replace(written, target)
        disk.sync(root)
        shutil.rmtree(writing, ignore_errors=True)
    return name


def read_stream(folder: Path, name: str, config: Any) -> tuple[Stream, str, Any]:
    """Returns a kept stream, its fingerprint, and how its log's columns were named.

    Args:
        folder: The run's folder; an earlier run's, moved aside, finds the store of the folder above.
        name: Name of the store.
        config: The run's configuration.

    Raises:
        CheckpointError: If the store is missing, truncated, changed, or not what the checkpoint refers to.
    """
    if not name or "/" in name or name.startswith("."):
        raise CheckpointError(f"store: {name!r} is not the name of a store; the checkpoint was changed")
    roots = [root / FOLDER / name for root in (folder, folder.parent)]
    path = next((root for root in roots if root.is_dir()), None)
    if path is None:
        raise CheckpointError(
            f"store: {FOLDER}/{name} is missing in {folder}, so the run cannot be loaded; copy the whole folder of "
            f"the run"
        )
    try:
        state = checkpoint.read(path)
    except CheckpointError as error:
        reason = str(error).removeprefix("checkpoint ")
        raise CheckpointError(f"store {reason}; restore {FOLDER}/{name} from a copy, or run again") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(f"store {name}: written in format {state.get('format')!r}, this is {FORMAT}")
    stream = stream_of(config, state["stream"])
    if stream.fingerprint() != state["fingerprint"]:
        raise CheckpointError(f"store {name}: its rows are not those that it was written with; run again")
    return stream, state["fingerprint"], state["log"]


def imported_columns(config: Any) -> Any:
    """Returns how the columns of the log were named where ``recbole-cl import`` read it, or ``None``."""
    path = Path(config["data_path"] or "") / f"{config['dataset']}.import.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"dataset {config['dataset']!r}: {path.name} cannot be read ({error}); import it again"
        ) from error


def prune_stores(folder: Path, kept: Container[str]) -> None:
    """Removes the stores of a run that nothing refers to, and what a killed process left behind."""
    root = folder / FOLDER
    if not root.is_dir():
        return
    for path in root.iterdir():
        if path.is_dir() and path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)
