"""Are a model's user vectors good for a task that it was not made for, and for another model?

Yang et al. 2025 (PCL), section 4.6: prompts are tuned on some tasks; what the frozen backbone gives for each of them is
a vector of the user. Beside the one-hot user it feeds a small network for the last task.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.rng import ModelRandomness, derive, torch_generator
from recbole_cl.stream.batch import Batcher
from recbole_cl.stream.stage import Targets

ROWS_AT_ONCE = 512
PROMPTED, FIRST, RANDOM = "prompted tasks", "first task alone", "random vectors"
SPLITS = ("train", "valid", "test")


def universal(
    runner: Any, hidden: int, epochs: int, learning_rate: float, batch_size: int, one_hot: bool
) -> dict[str, Any]:
    """Trains an MLP of one hidden layer on the stream's last task from three kinds of fixed user vectors.

    - ``prompted tasks`` the representations under the prompts of task 2 to the last but one, side by side
    - ``first task alone`` the representation without prompts (SSP in the paper)
    - ``random vectors`` as wide as the first, drawn once (NP)

    The last task's own prompts are not used, and no earlier task's representation depends on them: the model may be
    taken as it is at the end of the stream. Every vector is of the history that the last task's targets have; vectors
    are standardised by the training users.

    Args:
        runner: The finished run, of a model with ``represent_all``.
        hidden: Width of the hidden layer.
        epochs: Epochs, the same for all.
        learning_rate: Step size of Adam.
        batch_size: Users a step.
        one_hot: Put the one-hot user beside the vector. Its weights start at zero: a held-out user adds nothing.

    Returns:
        For each kind: ``accuracy`` on the test users and ``epochs`` at the lowest validation loss, ``epochs_to_level``
        until the validation accuracy first reaches the best one of ``first task alone`` (``None``: never), ``width``,
        and ``curve``, the validation accuracy after each epoch.

    Raises:
        ConfigError: If the model, the number of tasks or the last task does not allow it.
    """
    stream, model = runner.stream, runner.model
    stage = stream.stages[-1]
    if not hasattr(model, "represent_all"):
        raise ConfigError(f"probe universal: the model {runner.config['model']} has no represent_all(batch); use PCL")
    if stage.task.kind != "classification":
        raise ConfigError(
            f"probe universal: the last task, {stage.task.name!r}, is no classification; put one last with task_order"
        )
    if len(stream) < 3:
        raise ConfigError("probe universal: there is no task between the first and the last; the stream needs three")
    if not len(stage.valid) or not len(stage.test):
        raise ConfigError(f"probe universal: {stage.task.name!r} has no validation or no test users; see stage_ratios")
    batcher = Batcher(runner.config, stream, stream.view(stage.index), stage.n_users, stage.n_items)
    vectors = {split: _vectors(model, batcher, stage.split(split), runner.config["device"]) for split in SPLITS}
    wide = {split: v[1:].transpose(0, 1).flatten(1) for split, v in vectors.items()}
    seed, index = runner.config["seed"], stage.index
    generator = torch_generator(seed, index, "universal/random")
    noise = torch.randn(stream.table.n_users, wide["train"].size(1), generator=generator)
    users = {split: torch.from_numpy(stage.split(split).user) for split in SPLITS}
    kinds = {
        PROMPTED: wide,
        FIRST: {split: v[0] for split, v in vectors.items()},
        RANDOM: {split: noise[users[split]] for split in SPLITS},
    }
    labels = {split: torch.from_numpy(stage.split(split).label) for split in SPLITS}
    found = {}
    for name, features in kinds.items():
        with ModelRandomness(derive(seed, index, "universal/mlp")).owned():  # the same beginning for all
            found[name] = _train(
                standardised(features), users if one_hot else None, labels, int(stage.task.n_labels or 1),
                hidden, epochs, learning_rate, batch_size,
            )  # fmt: skip
    level = max(found[FIRST]["curve"])
    for values in found.values():
        values["epochs_to_level"] = next((n for n, v in enumerate(values["curve"], 1) if v >= level), None)
    return {"metric": "accuracy", "task": stage.task.name, "n_test": len(stage.test), "variants": found}


@torch.no_grad()
def _vectors(model: Any, batcher: Batcher, targets: Targets, device: Any) -> torch.Tensor:
    """Returns the representations of the targets' histories for all tasks but the last, ``[K - 1, n, d]``."""
    model.eval()
    parts = []
    for start in range(0, len(targets), ROWS_AT_ONCE):
        rows = batcher.rows(targets[np.arange(start, min(start + ROWS_AT_ONCE, len(targets)))], evaluation=True)
        parts.append(model.represent_all(rows.to(device))[:-1].cpu())
    return torch.cat(parts, dim=1)


def standardised(features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns features of zero mean and unit deviation over the training rows, by split."""
    mean, deviation = features["train"].mean(dim=0), features["train"].std(dim=0)
    return {split: (x - mean) / deviation.clamp(min=1e-6) for split, x in features.items()}


class UserNetwork(nn.Module):
    """An MLP of one hidden layer over (one-hot user, fixed vector).

    Args:
        n_users: Users, padding included; 0 for no one-hot part.
        width: Width of the vector.
        hidden: Width of the hidden layer.
        n_labels: Classes.
    """

    def __init__(self, n_users: int, width: int, hidden: int, n_labels: int) -> None:
        super().__init__()
        self.of_vector, self.last = nn.Linear(width, hidden), nn.Linear(hidden, n_labels)
        self.of_user = nn.Embedding(n_users, hidden) if n_users else None  # a one-hot vector times its weights
        if self.of_user is not None:
            nn.init.zeros_(self.of_user.weight)

    def forward(self, users: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """Returns logits ``[n, n_labels]`` of users ``[n]`` with vectors ``[n, width]``."""
        inner = self.of_vector(vectors)
        return self.last(F.relu(inner if self.of_user is None else inner + self.of_user(users)))


def _train(
    features: dict[str, torch.Tensor],
    users: dict[str, torch.Tensor] | None,
    labels: dict[str, torch.Tensor],
    n_labels: int,
    hidden: int,
    epochs: int,
    learning_rate: float,
    batch_size: int,
) -> dict[str, Any]:
    own = users or {split: torch.zeros_like(y) for split, y in labels.items()}
    n_users = 1 + max(int(u.max()) for u in users.values()) if users else 0
    network = UserNetwork(n_users, features["train"].size(1), hidden, n_labels)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    curve, best, accuracy, epoch = [], float("inf"), 0.0, 0
    for number in range(1, epochs + 1):
        for rows in torch.randperm(len(labels["train"])).split(batch_size):
            logits = network(own["train"][rows], features["train"][rows])
            optimizer.zero_grad()
            F.cross_entropy(logits, labels["train"][rows]).backward()
            optimizer.step()
        with torch.no_grad():
            answers = {split: network(own[split], features[split]) for split in ("valid", "test")}
        curve.append(_accuracy(answers["valid"], labels["valid"]))
        loss = float(F.cross_entropy(answers["valid"], labels["valid"]))
        if loss < best:
            best, accuracy, epoch = loss, _accuracy(answers["test"], labels["test"]), number
    return {"accuracy": accuracy, "epochs": epoch, "width": features["train"].size(1), "curve": curve}


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())
