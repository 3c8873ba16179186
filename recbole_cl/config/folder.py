"""Where a run is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def run_folder(config: Any) -> Path:
    """Returns the folder of a run: ``output_dir``, or one named after what is run."""
    if config["output_dir"]:
        return Path(config["output_dir"]).expanduser()
    how = config.strategy_name + ("" if config["trainable"] == "all" else f"-{config['trainable']}")
    parts = (config["model"], config["dataset"], how, config["scheduler"], f"seed{config['seed']}")
    return Path("runs") / "-".join(map(str, parts))
