"""Where a run is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_cl.disk import check_name


def run_folder(config: Any) -> Path:
    """Returns the folder of a run: ``output_dir``, or one named after what is run.

    Raises:
        ConfigError: If what is run has a name that leads elsewhere.
    """
    if config["output_dir"]:
        return Path(config["output_dir"]).expanduser()
    how = config.strategy_name + ("" if config["trainable"] == "all" else f"-{config['trainable']}")
    parts = (config["model"], config["dataset"], how, config["scheduler"], f"seed{config['seed']}")
    name = "-".join(map(str, parts))
    return Path("runs") / check_name(name, "the run's name", "set output_dir to the folder of the run")
