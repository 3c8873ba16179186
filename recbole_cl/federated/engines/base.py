"""The contract of an engine: it runs the clients of a round, wherever they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from recbole_cl.federated.client import Examples, Outputs, Prompts, Settings
from recbole_cl.federated.prompts import SharedParts


class Engine:
    """Base of the engines.

    Args:
        parameters: Its own parameters, without prefix.
    """

    prefix = ""

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.params = dict(parameters)

    def run(
        self,
        outputs: Outputs,
        table: torch.Tensor,
        shared: SharedParts,
        prompts: Prompts,
        examples: Examples,
        settings: Settings,
    ) -> tuple[Prompts, torch.Tensor]:
        """Returns the clients after their local steps, and their losses; see :func:`client_step`."""
        raise NotImplementedError
