"""One call from names to results."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any


def run_recbole_cl(
    model: str | type | None = None,
    dataset: str | None = None,
    config_file_list: Sequence[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    saved: bool = True,
    args: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Trains a model through a stream of stages and returns what was measured.

    Args:
        model: Name or class of the model.
        dataset: Name of the dataset, the folder and stem of its ``.inter`` file.
        config_file_list: YAML files with properties; later ones win.
        config_dict: Properties that win over the files. It is not changed.
        saved: Whether checkpoints are written while the run goes on.
        args: ``--key=value`` strings that win over everything; None reads none. ``sys.argv`` is never read.

    Returns:
        The result of the run, as written to ``result.json``.

    Raises:
        RecBoleCLError: If what was asked for cannot be run; the message names the field, the value and the remedy.
    """
    from recbole_cl.config import CLConfig
    from recbole_cl.report import terminal_summary
    from recbole_cl.training.runner import Runner

    config = CLConfig(
        model=model, dataset=dataset, config_file_list=config_file_list, config_dict=config_dict, args=args
    )
    config["saved"] = saved
    result = Runner(config).run()
    logging.getLogger("recbole_cl").info("\n%s", terminal_summary(result))
    return result
