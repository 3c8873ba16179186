"""What a checkpoint says about a run, and whether a run may go on from it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from recbole_cl import checkpoint, distributed
from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.model.contract import contract
from recbole_cl.results.journal import settings
from recbole_cl.strategy.composite import Composite

LOGGER = logging.getLogger("recbole_cl")


def newest(folder: Path, config: Any, data: Any, warn: Callable[[str], None]) -> tuple[dict[str, Any] | None, int]:
    """Returns the newest checkpoint of a run, the same in all processes.

    Args:
        folder: The run's folder.
        config: The run's configuration.
        data: Fingerprint of its stream.
        warn: Takes a sentence about a checkpoint that cannot be read, or a side store that is gone.

    Returns:
        Its state (``None`` where there is none) and its number.

    Raises:
        CheckpointError: If none can be read, the processes see different ones, or configuration or log have changed.
    """
    state, number, warnings = checkpoint.newest(folder / "checkpoints")
    seen = distributed.current().texts(str(number))
    if len(set(seen)) > 1:
        raise CheckpointError(
            f"resume: the processes see different newest checkpoints in {folder} ({', '.join(seen)}); give an "
            f"output_dir on a file system that all of them share"
        )
    for warning in warnings:
        warn(warning)
    if state is None:
        LOGGER.warning("resume: there is no checkpoint in %s; the run starts from the beginning", folder)
        return None, number
    refuse_changes(state, config, data)
    for name, path in state["side_stores"].items():
        if not Path(path).exists():
            warn(f"resume: the store {name!r} at {path}, which the checkpoint names, is not there any more")
    return state, number


def refuse_changes(state: dict[str, Any], config: Any, data: Any) -> None:
    """Raises a :class:`CheckpointError` where configuration or log differ from those of a checkpoint."""
    free = config.RESUME_MAY_CHANGE
    now, then = settings(config), state["config"]
    changed = [k for k in sorted(set(now) | set(then)) if k not in free and k != "device" and now.get(k) != then.get(k)]
    if changed:
        told = "; ".join(f"{k} was {then.get(k)!r}, is {now.get(k)!r}" for k in changed[:4])
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise CheckpointError(
            f"resume: the configuration has changed ({told}{more}); give the old values, or start anew in another "
            f"output_dir"
        )
    if state["data"] != data:
        raise CheckpointError(
            "resume: the log of interactions has changed since the checkpoint; restore it, or start anew in "
            "another output_dir"
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
