"""The two apps. A device's own data is made of its number here; a real one reads the log of its user."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context
from recbole.model.layers import TransformerEncoder
from torch.nn import functional as F

from recbole_cl.federated.aggregators.fed_k_means import DPFedKMeans
from recbole_cl.federated.client import Behind, Examples, Settings
from recbole_cl.federated.flower import Device, Server, client_app, server_app
from recbole_cl.federated.ledger import Ledger
from recbole_cl.federated.privacy import Release
from recbole_cl.federated.prompts import SharedParts
from recbole_cl.federated.server import Mechanism
from recbole_cl.model.fused import layer_outputs
from recbole_cl.prompt.prefix import prompted_outputs

ITEMS, WIDTH, TOKENS, LENGTH = 40, 16, 2, 8


class Frozen:
    """What every device got once: the backbone and the shared parts. Here they are drawn; a real one loads a file."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            encoder = TransformerEncoder(2, 2, WIDTH, 32, 0.0, 0.0, "gelu", 1e-12).eval().requires_grad_(False)
            self.layers, self.table = encoder.layer, torch.randn(ITEMS, WIDTH)
            self.shared = SharedParts(WIDTH, TOKENS, 16, 4, 4, seed=1).requires_grad_(False)

    def outputs(self, sequence: torch.Tensor) -> Behind:
        embedded = F.layer_norm(self.table[sequence], (WIDTH,))
        return lambda prompts, wanted: prompted_outputs(self.layers, embedded, prompts, layer_outputs, wanted)


def own_targets(number: int) -> Examples:
    """Returns what one user's device has."""
    rng = np.random.default_rng(number)
    sequence = rng.integers(1, ITEMS, size=(1, LENGTH))
    targets, negatives = rng.integers(1, ITEMS, size=(1, LENGTH)), rng.integers(1, ITEMS, size=(1, LENGTH, 2))
    query = torch.from_numpy(rng.normal(size=(1, WIDTH)).astype(np.float32))
    return Examples(torch.zeros(1, dtype=torch.int64), *map(torch.from_numpy, (sequence, targets, negatives)), query)


def device(context: Context) -> Device:
    """Returns the device of a node, which was started with ``--node-config client=<number>``."""
    frozen, examples = Frozen(), own_targets(int(context.node_config["client"]))
    return Device(frozen.outputs, frozen.table, frozen.shared, Settings(), lambda name: examples)


def start(context: Context) -> Server:
    """Returns what the server begins with; it writes each round's prototypes beside its ledger."""
    folder, told = Path(str(context.run_config["folder"])), []

    def ended(given, refused) -> None:
        told.append({"prototypes": given.prototypes.tolist(), "refused": refused})
        (folder / "rounds.json").write_text(json.dumps(told))

    return Server(
        prototypes=Frozen().shared.prototypes.numpy().astype(np.float64),
        aggregator=DPFedKMeans({"momentum": 0.5, "floor": 1.0, "separation": 0.1, "prune": 0.0}),
        mechanism=Mechanism(Release(0.1), bits=0),
        ledger=Ledger(folder / "ledger.jsonl", np.inf, 1e-5),  # a real one has a budget
        rounds=int(context.run_config["rounds"]),
        name="example",
        generator=lambda name: np.random.default_rng(list(name.encode())),
        ended=ended,
        least=int(context.run_config["devices"]),
        timeout=120.0,
    )


client = client_app(device)
server = server_app(start)
