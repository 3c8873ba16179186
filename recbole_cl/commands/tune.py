"""``recbole-cl tune``: properties chosen on the first stages' validation targets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from recbole_cl.commands.base import ConfiguredCommand
from recbole_cl.commands.terminal import show
from recbole_cl.errors import ConfigError
from recbole_cl.registry import commands


@commands.register("tune")
class Tune(ConfiguredCommand):
    """Searches properties without looking at later stages."""

    summary = "choose properties of a strategy on the first stages, never on the future"
    description = (
        "Search properties of a strategy with optuna. A trial trains the first stages only and is judged by their "
        "validation targets. The same command goes on after an interruption, and gives what an uninterrupted one gives."
    )
    place = 3
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        super().arguments(parser)
        parser.add_argument("--trials", type=int, default=20, help="trials in all; the first is as given (default: 20)")
        parser.add_argument("--first_stages", type=int, default=2, help="stages that are trained (default: 2)")
        parser.add_argument("--space", help="what is searched: a YAML file, or YAML (default: the strategy's own)")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.config import CLConfig
        from recbole_cl.study.tune import BEST, read_space, table, tune

        for name in ("trials", "first_stages"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name}={getattr(options, name)}: give a number from 1 on")
        base = self.configured(options, properties)
        names = [name for name, _ in base.strategy_specs()]
        space = read_space(options.space, names)

        def configure(changed: dict[str, Any]) -> CLConfig:
            files = (options.config_files or "").split()
            given = [word for word in properties if word.removeprefix("--").partition("=")[0] not in changed]
            made = CLConfig(
                model=base["model"], dataset=base["dataset"], config_file_list=files, config_dict=changed, args=given
            )
            made["saved"] = False
            return made

        label = f"{base['model']}-{base['dataset']}-{'+'.join(names)}-{base['scheduler']}-seed{base['seed']}"
        folder = Path(base["output_dir"] or f"tune/{label}").expanduser()
        found = tune(configure, space, folder, options.trials, options.first_stages)
        show(table(found))
        show(f"\n{folder / BEST}: recbole-cl run --config_files={folder / BEST} and the properties of this command")
