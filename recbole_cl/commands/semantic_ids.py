"""``recbole-cl semantic-ids``: codes of items from their texts."""

from __future__ import annotations

import argparse

from recbole_cl.commands.base import ConfiguredCommand
from recbole_cl.commands.terminal import show
from recbole_cl.registry import commands


@commands.register("semantic-ids")
class SemanticIdsCommand(ConfiguredCommand):
    """Writes an index file of the items' codes and tells its quality."""

    summary = "make the codes of a dataset's items from their texts, for a generative model"
    description = (
        "Encode the texts of a dataset's items, quantise them into codes and write an index file, which the model "
        "PESO reads (semantic_ids). Any property is set with --name=value."
    )
    place = 5

    def run(self, options: argparse.Namespace, properties: list[str]) -> None:
        options.model = options.model or "PESO"
        config = self.configured(options, properties)
        from recbole_cl.model.semantic_ids import make_semantic_ids, save, summary_of

        path = config["semantic_ids"] or f"index.{config['dataset']}.json"
        made = make_semantic_ids(config)
        save(made, path)
        show(f"{summary_of(made)}\nwritten to   {path}; go on with --semantic_ids={path}")
