"""A run whose first stage is that of another run: methods that differ after it alone train it once.

``keep_base: True`` writes the first stage into the run's folder, ``base_run: FOLDER`` takes it over. That gives the
bits of a run that trained it, for strategies that say so (``base_is_finetune``).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_cl import checkpoint, distributed
from recbole_cl.errors import CheckpointError, ConfigError
from recbole_cl.evaluation.metrics import check_tasks
from recbole_cl.model.state import load_owned_state
from recbole_cl.registry import strategies
from recbole_cl.results.journal import settings
from recbole_cl.rng import ModelRandomness, derive
from recbole_cl.strategy.composite import Composite
from recbole_cl.strategy.context import StageContext
from recbole_cl.training.resume import check_state, loading

if TYPE_CHECKING:
    from recbole_cl.training.runner import Runner

LOGGER = logging.getLogger("recbole_cl")
FOLDER = "base"


def keep_base(runner: Runner, ctx: StageContext, at_end: dict[str, Any]) -> None:
    """Writes what another run needs to take the first stage over.

    Args:
        runner: The run, whose first stage has ended.
        ctx: The stage.
        at_end: The random state as the strategies' ``end_stage`` began.
    """
    with distributed.current().together():
        if runner.state.main:
            state = runner.saved_state(ctx, "done") | {"randomness": at_end}
            checkpoint.save(runner.folder / FOLDER, 1, state, 1)


def take_base(runner: Runner) -> dict[str, Any]:
    """Takes the first stage over from another run; the strategies end it as if they had been there.

    Args:
        runner: The run, of which nothing has been trained; ``base_run`` names the other one's folder.

    Returns:
        The other run's state at the end of its first stage.
    """
    config, folder = runner.config, Path(runner.config["base_run"]).expanduser()
    base = base_state(folder, config, runner.data, runner.strategy)
    with loading(f"property 'base_run', {str(folder)!r}"):
        runner.take_up(base)
    randomness = ModelRandomness(derive(config["seed"], 0))
    ctx = runner.state.models.fresh(0, runner.stream.view(0, config["graph"]), randomness)
    check_tasks(config, runner.stream, ctx.model)
    runner.strategy.check(config, ctx.model)
    with loading(f"property 'base_run', {str(folder)!r}"):
        load_owned_state(ctx.model, base["model"])
        randomness.load_state_dict(base["randomness"])
    ctx.known = runner.known
    with randomness.owned():
        runner.strategy.end_stage(ctx)
    runner.model = ctx.model
    runner._save(ctx, "done")
    LOGGER.info("the first stage is that of the run in %s", folder)
    return base


def base_state(folder: Path, config: Any, data: Any, strategy: Composite) -> dict[str, Any]:
    """Returns the first stage of another run, to be taken over.

    Args:
        folder: The other run's folder.
        config: This run's configuration.
        data: Fingerprint of this run's stream.
        strategy: This run's strategies.

    Raises:
        ConfigError: If a strategy does something in the first stage.
        CheckpointError: If there is none, or it was made with other settings or another log.
    """
    acting = [s.name for s in strategy.members if not s.base_is_finetune]
    if acting:
        raise ConfigError(
            f"property 'base_run' is {str(folder)!r}, but the strategy {acting[0]} takes part in the first stage; "
            f"leave base_run out"
        )
    state, _, warnings = checkpoint.newest(folder / FOLDER, check_state)
    if state is None:
        reason = f": {warnings[0]}" if warnings else "; run it with keep_base: True"
        raise CheckpointError(f"property 'base_run' is {str(folder)!r}, which keeps no first stage{reason}")
    now, then = settings(config), state["config"]
    prefixes = [
        strategies.get(name).prefix for settings_of_run in (now, then) for name, _ in settings_of_run["strategy"]
    ]
    own = tuple(f"{prefix}_" for prefix in prefixes if prefix)
    free = {*config.RESUME_MAY_CHANGE, "strategy", "base_run", "keep_base", "device"}
    changed = [
        key
        for key in sorted({*now, *then})
        if key not in free and not key.startswith(own) and now.get(key) != then.get(key)
    ]
    if changed:
        raise CheckpointError(
            f"property 'base_run': the run in {str(folder)!r} was made with other settings ({changed[0]} was "
            f"{then.get(changed[0])!r}, is {now.get(changed[0])!r}); give it those, or leave base_run out"
        )
    if state["data"] != data:
        raise CheckpointError(
            f"property 'base_run': the run in {str(folder)!r} was made of another log, or of one that has changed "
            f"since; make it anew, or leave base_run out"
        )
    return state
