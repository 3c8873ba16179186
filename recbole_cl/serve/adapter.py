"""The adapter of a saved run, as peft loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_cl.errors import ConfigError
from recbole_cl.model.adapter_export import export_adapter as write
from recbole_cl.model.contract import offers
from recbole_cl.serve.recommender import Recommender
from recbole_cl.strategy.parts.cumulative import Cumulative


def export_adapter(run: Recommender, folder: str | Path) -> dict[str, Any]:
    """Writes the adapter with which a run answers, what its strategy adds from past stages included.

    Args:
        run: The run, from :func:`recbole_cl.load`.
        folder: Where; see :mod:`recbole_cl.model.adapter_export`.

    Returns:
        ``bytes`` and ``numbers`` written, ``rank``, and ``tokens`` whose rows are in it.

    Raises:
        ConfigError: If the model has no adapter of a language model.
        OutputError: If the folder cannot be written.
    """
    if not offers(run.model, "adapters"):
        raise ConfigError(f"model: {run.config['model']} has no adapter of a language model to export; PESO has one")
    past, own = None, None
    for member in run.strategy.members:
        if isinstance(member, Cumulative) and member.used:
            past = {name: member.beside(name, a) for name, (a, _) in run.model.adapters().items()}
            own = {name: member.own_weight(name) for name in past}
    return write(run.model, folder, past, own)
