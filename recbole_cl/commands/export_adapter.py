"""``recbole-cl export-adapter``: the adapter of a saved run in peft's format."""

from __future__ import annotations

import argparse

from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import show
from recbole_cl.registry import commands


@commands.register("export-adapter")
class ExportAdapter(Command):
    """Loads a run and writes its adapter."""

    summary = "write the adapter of a saved run of PESO as peft loads it"
    description = (
        "Load a run, without its log, and write the adapter of its language model into a folder that peft loads by "
        "itself: adapter_config.json and adapter_model.safetensors."
    )
    place = 15
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folder", metavar="RUN", help="output folder of the run")
        parser.add_argument("into", metavar="DIR", help="folder that the adapter is written to")
        parser.add_argument("--run-version", type=int, metavar="N", help="version of the run (default: the champion)")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.serve import load
        from recbole_cl.serve.adapter import export_adapter

        told = export_adapter(load(options.folder, options.run_version), options.into)
        rows = f", rows of {told['tokens']} tokens" if told["tokens"] else ""
        show(f"adapter of rank {told['rank']}{rows}: {told['bytes'] / 1e6:.1f} MB in {options.into}")
