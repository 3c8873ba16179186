"""``recbole-cl parity``: one stage by RecBole and by RecBole-CL, side by side."""

from __future__ import annotations

import argparse

from recbole_cl.commands.base import ConfiguredCommand
from recbole_cl.commands.terminal import show
from recbole_cl.registry import commands


@commands.register("parity")
class Parity(ConfiguredCommand):
    """Trains by both and prints losses and metrics."""

    summary = "train a model with RecBole and with RecBole-CL, and lay the results side by side"
    description = (
        "Train a model on one stage with RecBole itself and with RecBole-CL (parity: recbole), and print "
        "losses and metrics side by side. Any property is set with --name=value."
    )
    place = 1
    former_names = ("compare",)

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        if not any(argument.startswith("--parity=") for argument in properties):
            properties = [*properties, "--parity=recbole"]
        config = self.configured(options, properties)
        from recbole_cl.study.parity import compare, comparison_table

        show(comparison_table(compare(config)))
