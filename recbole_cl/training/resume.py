"""What a checkpoint says about a run, and whether a run may go on from it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from recbole_cl import checkpoint, distributed
from recbole_cl.errors import CheckpointError, ConfigError, RecBoleCLError
from recbole_cl.model.contract import contract
from recbole_cl.results.journal import PACKAGES, settings, versions
from recbole_cl.strategy.composite import Composite
from recbole_cl.training.inputs import files_read, refuse_changed_files, stores_named

LOGGER = logging.getLogger("recbole_cl")


class UnusableCheckpoint(CheckpointError):
    """A checkpoint is whole, but what stands in it cannot be put into this run's parts."""


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """A context in which the content of a checkpoint is put into place: whatever fails there, it is the content.

    Args:
        what: Name of what is read.

    Raises:
        UnusableCheckpoint: In place of any error that is not about this process or what was asked for.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except CheckpointError as error:
        raise UnusableCheckpoint(str(error)) from error
    except RecBoleCLError:
        raise
    except Exception as error:
        raise UnusableCheckpoint(
            f"{what}: its content is not that of this run ({type(error).__name__}: {error})"
        ) from error


def newest(
    folder: Path, config: Any, data: Any, stages: int, warn: Callable[[str], None], before: int | None = None
) -> tuple[dict[str, Any] | None, int]:
    """Returns the newest checkpoint of a run, the same in all processes.

    Args:
        folder: The run's folder.
        config: The run's configuration.
        data: Fingerprint of its stream.
        stages: How many stages it has.
        warn: Takes a sentence about a checkpoint that cannot be used, a side store that is gone, another version.
        before: Only checkpoints with smaller numbers: the others were tried.

    Returns:
        Its state (``None`` where there is none) and its number.

    Raises:
        CheckpointError: If none can be used, the processes see different ones, or configuration or log have changed.
    """

    def accept(state: dict[str, Any]) -> None:
        check_state(state, stages)
        refuse_changes(state, config, data)
        refuse_changed_files(files, state.get("files"), stores_named(config, state["side_stores"]))

    files = files_read(config)

    state, number, warnings = checkpoint.newest(folder / "checkpoints", accept, before)
    seen = distributed.current().texts(str(number))
    if len(set(seen)) > 1:
        raise CheckpointError(
            f"resume: the processes see different newest checkpoints in {folder} ({', '.join(seen)}); give an "
            f"output_dir on a file system that all of them share"
        )
    for warning in warnings:
        warn(warning)
    if state is None:
        if before is None:
            LOGGER.warning("resume: there is no checkpoint in %s; the run starts from the beginning", folder)
        return None, number
    tell_versions(state, warn)
    for name, path in state["side_stores"].items():
        if not Path(path).exists():
            warn(f"resume: the store {name!r} at {path}, which the checkpoint names, is not there any more")
    return state, number


def go_on(run: Any) -> int | None:
    """Goes on from the newest checkpoint of a run that can be used, and walks to the end.

    A checkpoint is only known to be good once its content has been put into the model, the strategies, the optimiser
    and the generators. Where that fails it is named, the run is as new again, and the one before it is tried.

    Args:
        run: The :class:`~recbole_cl.training.runner.Runner`, which has begun.

    Returns:
        The first stage of which something was left to do; ``None`` where there is no checkpoint, and nothing was done.

    Raises:
        CheckpointError: If there are checkpoints and not one can be used.
    """
    refused: list[str] = []
    messages: list[str] = []
    number: int | None = None
    while True:
        saved, found = newest(run.folder, run.config, run.data, len(run.stream), messages.append, number)
        if saved is None and refused:
            raise CheckpointError(
                f"resume: no checkpoint in {run.folder} can be used: {'; '.join(refused)}. Start anew without resume"
            )
        if saved is None:
            return None
        number, written = found, run.number
        try:
            with loading(f"checkpoint {number:08d}"):
                run.adopt(saved)
            for warning in dict.fromkeys(messages):
                run.journal.warn(warning)
            run.output.go_on()
            run.number = written = checkpoint.last_number(run.folder / "checkpoints")
            LOGGER.info("resuming at stage %d from checkpoint %d", saved["stage"] + 1, number)
            return int(run.walk(saved))
        except UnusableCheckpoint as error:
            if run.number != written:  # it was good: what is wrong was read later
                raise
            reason = str(error).removeprefix("checkpoint: ")
            refused.append(reason if reason.startswith("checkpoint ") else f"checkpoint {number:08d}: {reason}")
            messages.append(f"{refused[-1]}; the one before it is used")
            run.strategy, run.model = run.strategies(), None
            run.begin(run.stream)


_ALWAYS: dict[str, Any] = {
    "config": dict, "data": str, "store": str | None, "stage": int, "phase": str, "model": dict, "strategy": dict,
    "side_stores": dict, "generators": dict, "previous": dict | None, "carried": dict, "known": dict, "journal": dict,
}  # fmt: skip
_INSIDE: dict[str, Any] = {"progress": dict, "trainer": dict, "stage_start": dict}


def check_state(state: Mapping[str, Any], stages: int | None = None) -> None:
    """Raises a :class:`CheckpointError` that names the field where a state is not one that a run writes.

    Args:
        state: What a checkpoint holds.
        stages: How many stages the run has, where that is known.
    """
    inside = _INSIDE if state.get("phase") == "train" else {}
    for key, kind in {**_ALWAYS, **inside}.items():
        if key not in state:
            raise CheckpointError(f"it lacks {key!r}, so it was not written by a run")
        value = state[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise CheckpointError(f"{key!r} is {_short(value)}, which no run writes")
    if state["phase"] not in ("train", "done"):
        raise CheckpointError(f"'phase' is {_short(state['phase'])}; a run writes train or done")
    if state["stage"] < 0 or (stages is not None and state["stage"] >= stages):
        found = "" if stages is None else f"; this run has the stages 0 to {stages - 1}"
        raise CheckpointError(f"'stage' is {state['stage']}, which no run writes{found}")
    for name, path in state["side_stores"].items():
        if not isinstance(path, str):
            raise CheckpointError(f"'side_stores' names {name!r} at {_short(path)}, which is no path")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def tell_versions(state: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Warns where a checkpoint was written by other versions than those that go on from it."""
    now, then = versions(), state.get("versions")
    if not isinstance(then, Mapping):
        return
    keys = [key for key in ("recbole-cl", "python", *PACKAGES[1:]) if now.get(key) != then.get(key)]
    if keys:
        changes = ", ".join(f"{key} was {then.get(key, 'not there')}, is {now.get(key, 'not there')}" for key in keys)
        warn(f"resume: the checkpoint was written by other versions ({changes}); the rest of the run may differ")


def refuse_changes(state: dict[str, Any], config: Any, data: Any) -> None:
    """Raises a :class:`CheckpointError` where configuration or log differ from those of a checkpoint."""
    free = config.RESUME_MAY_CHANGE
    now, then = settings(config), state["config"]
    changed = [k for k in sorted(set(now) | set(then)) if k not in free and k != "device" and now.get(k) != then.get(k)]
    if changed:
        changes = "; ".join(f"{k} was {then.get(k)!r}, is {now.get(k)!r}" for k in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise CheckpointError(
            f"resume: the configuration has changed ({changes}{more}); give the old values, or start anew without "
            f"resume"
        )
    if state["data"] != data:
        raise CheckpointError(
            "resume: the log of interactions has changed since the checkpoint, or one of the tables that are read with "
            "it (.item, .user, .kg, .link, .net and the like); restore it, or start anew without resume"
        )


def side_stores(model: Any, strategy: Composite) -> dict[str, str]:
    """Returns the durable stores of strategies and model, name to path.

    Raises:
        ConfigError: If both name a store alike.
    """
    own = dict(contract(model).side_stores())
    stores = strategy.side_stores()
    twice = sorted(own.keys() & stores.keys())
    if twice:
        raise ConfigError(f"side_stores: a strategy and the model both name a store {twice[0]!r}; rename one")
    return {**stores, **own}
