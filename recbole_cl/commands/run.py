"""``recbole-cl run``: a model through a stream of stages."""

from __future__ import annotations

import argparse

from recbole_cl.commands.base import ConfiguredCommand
from recbole_cl.commands.terminal import show, speaks
from recbole_cl.registry import commands


@commands.register("run")
class Run(ConfiguredCommand):
    """Trains a model through a stream and prints the summary."""

    summary = "train a model through a stream of stages"
    description = (
        "Train a model through a stream of stages. Any property is set with --name=value, "
        "such as --strategy=EWC --ewc_lambda=10 --n_stages=5."
    )
    place = 0
    imports = ("recbole_cl.training.runner",)

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        config = self.configured(options, properties)
        from recbole_cl.training.runner import Runner

        result = Runner(config).run()
        from recbole_cl.report import terminal_summary

        if speaks():
            show(terminal_summary(result))
