"""A round of clients as one batch beside a plain loop over them: ``python tests/benchmarks/federated_clients.py``.

256 clients, d = 64, two layers, histories of 50, one prompt an update, three local steps, one thread; both sides
alternate, medians of CPU seconds are told, which a busy machine leaves alone. Both give the same prompts within 1e-6.
"""

from __future__ import annotations

import contextlib
import statistics
import time

import numpy as np
import torch
from recbole.model.layers import TransformerEncoder

from recbole_cl.errors import ConfigError
from recbole_cl.federated.client import Behind, Examples, Prompts, Settings, observe
from recbole_cl.federated.engines.base import Engine
from recbole_cl.federated.engines.flower import Flower
from recbole_cl.federated.engines.in_process import InProcess, Loop
from recbole_cl.federated.prompts import SharedParts
from recbole_cl.model.fused import layer_outputs, layer_outputs_behind, projections
from recbole_cl.prompt.prefix import prompted_outputs

CLIENTS, WIDTH, LENGTH, TOKENS, ITEMS = 256, 64, 50, 8, 2000


class Case:
    """Clients with so many targets each."""

    def __init__(self, targets: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        encoder = TransformerEncoder(2, 2, WIDTH, 256, 0.0, 0.0, "gelu", 1e-12).eval().requires_grad_(False)
        self.layers, self.table = encoder.layer, torch.randn(ITEMS, WIDTH) * 0.3
        self.places = torch.randn(LENGTH, WIDTH) * 0.1
        self.shared = SharedParts(WIDTH, TOKENS, 128, 32, 32, seed=1).requires_grad_(False)
        lengths = rng.integers(max(targets, 10), LENGTH + 1, size=CLIENTS)
        inside = np.arange(LENGTH) < lengths[:, None]
        sequence = rng.integers(1, ITEMS, size=(CLIENTS, LENGTH)) * inside
        trained = inside & (np.arange(LENGTH) >= lengths[:, None] - targets)
        answers = rng.integers(1, ITEMS, size=sequence.shape) * trained
        negatives = rng.integers(1, ITEMS, size=(*sequence.shape, 1))
        self.examples = Examples(
            torch.arange(CLIENTS), *map(torch.from_numpy, (sequence, answers, negatives)), torch.randn(CLIENTS, WIDTH)
        )
        self.start = observe(Prompts.new(CLIENTS, TOKENS, WIDTH), self.examples.query, 5.0)

    def outputs(self, sequence: torch.Tensor) -> Behind:
        embedded = torch.nn.functional.layer_norm(self.table[sequence] + self.places[: sequence.size(1)], (WIDTH,))
        kept = projections(self.layers[0], embedded)

        def first(prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return layer_outputs_behind(self.layers[0], prompts, embedded, kept, mask)

        def behind(prompts: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
            return prompted_outputs(self.layers, embedded, prompts, layer_outputs, wanted, first)

        return behind

    def run(self, engine: Engine) -> Prompts:
        return engine.run(self.outputs, self.table, self.shared, self.start, self.examples, Settings())[0]


def ratio(targets: int, repeats: int = 3, slow: Engine | None = None) -> tuple[float, float, float]:
    """Returns the seconds of the loop and of the batch, medians, and how far their prompts are from each other.

    Args:
        targets: Of a client.
        repeats: Runs of each.
        slow: Stands in the loop's place.
    """
    case, engines = Case(targets), (Loop({}) if slow is None else slow, InProcess({"clients": 64}))
    loop, batch = (case.run(engine) for engine in engines)
    gap = float((loop.long - batch.long).abs().max())
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for kept, engine in zip(seconds, engines, strict=True):
            begun = time.process_time()
            case.run(engine)
            kept.append(time.process_time() - begun)
    return statistics.median(seconds[0]), statistics.median(seconds[1]), gap


if __name__ == "__main__":
    torch.set_num_threads(1)
    for n in (4, 12):
        slow, fast, gap = ratio(n)
        print(f"{n} targets a client: loop {slow:.2f} s, batch {fast:.3f} s, {slow / fast:.1f} x, within {gap:.1e}")
    with contextlib.suppress(ConfigError):  # without flwr there is nothing to compare with
        slow, fast, gap = ratio(4, slow=Flower({}))
        print(f"Flower in process, 4 targets: {slow:.2f} s, batch {fast:.3f} s, {slow / fast:.1f} x, within {gap:.1e}")
