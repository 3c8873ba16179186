"""``recbole-cl export``: vectors of a saved run, or its adapter, for other programs."""

from __future__ import annotations

import argparse

from recbole_cl.commands.base import Command
from recbole_cl.commands.terminal import show
from recbole_cl.registry import commands


@commands.register("export")
class Export(Command):
    """Writes the vectors of items or users with their tokens, or the adapter of a language model."""

    summary = (
        "write the vectors of a saved run (numpy, parquet, a faiss index, with tokens), or PESO's adapter for peft"
    )
    place = 15
    goes_on_by = "the same command"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("folder", metavar="RUN", help="output folder of the run")
        parser.add_argument("--to", required=True, metavar="DIR", help="folder of the files")
        parser.add_argument(
            "--of", choices=["items", "users", "both", "adapter"], default="items", help="whose (default: items)"
        )
        parser.add_argument(
            "--format", choices=["npy", "parquet", "faiss"], default="npy", help="of the files (default: npy)"
        )
        parser.add_argument("--approximate", action="store_true", help="a faiss index that visits a part of its lists")
        parser.add_argument("--run-version", type=int, metavar="N", help="version of the run (default: the champion)")

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        from recbole_cl.serve import load
        from recbole_cl.serve.adapter import export_adapter
        from recbole_cl.serve.export import export

        if options.of == "adapter":
            adapter = export_adapter(load(options.folder, options.run_version), options.to)
            rows = f", rows of {adapter['tokens']} tokens" if adapter["tokens"] else ""
            show(f"adapter of rank {adapter['rank']}{rows}: {adapter['bytes'] / 1e6:.1f} MB in {options.to}")
            return
        run = load(options.folder, options.run_version, search="dense")
        for of in ("items", "users") if options.of == "both" else (options.of,):
            for path in export(run, options.to, of, options.format, options.approximate):
                show(str(path))
