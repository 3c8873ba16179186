"""A mixture of experts with a gate and a tower for each task, and masks of layers for each task."""

from __future__ import annotations

import torch
from torch import nn


class MixtureOfExperts(nn.Module):
    """Experts shared by all tasks; each task mixes them by a gate of its own and reads the mixture by its own tower.

    Ma, Zhao, Yi, Chen, Hong and Chi 2018, "Modeling task relationships in multi-task learning with multi-gate
    mixture-of-experts", eq. 5 to 7::

        y_k = tower_k( sum_e softmax(G_k x)_e expert_e(x) )
        expert_e(x) = relu(A_e x + a_e),    tower_k(z) = T_k z + t_k

    Args:
        width: Size d of inputs and outputs.
        n_experts: Number of experts.
        n_tasks: Number of tasks.
        deviation: Standard deviation of the initial matrices; ``None`` takes ``1 / sqrt(width)``.
    """

    def __init__(self, width: int, n_experts: int, n_tasks: int, deviation: float | None = None) -> None:
        super().__init__()
        deviation = width**-0.5 if deviation is None else deviation
        self.experts = nn.Parameter(torch.randn(n_experts, width, width) * deviation)
        self.expert_bias = nn.Parameter(torch.zeros(n_experts, width))
        # A parameter for each task: one tensor of all would look shared to what weighs gradients of shared parameters.
        self.gates = nn.ParameterList(torch.randn(n_experts, width) * deviation for _ in range(n_tasks))
        self.towers = nn.ParameterList(torch.randn(width, width) * deviation for _ in range(n_tasks))
        self.tower_bias = nn.ParameterList(torch.zeros(width) for _ in range(n_tasks))

    def forward(self, hidden: torch.Tensor, task: int) -> torch.Tensor:
        """Returns what a task reads.

        Args:
            hidden: Shared representation, shape ``[..., d]``.
            task: Index of the task.

        Returns:
            Shape of ``hidden``.
        """
        found = torch.relu(torch.einsum("...d,eod->...eo", hidden, self.experts) + self.expert_bias)
        share = (hidden @ self.gates[task].T).softmax(-1)
        mixed = torch.einsum("...e,...eo->...o", share, found)
        return mixed @ self.towers[task].T + self.tower_bias[task]


class TaskMasks(nn.Module):
    """Soft masks of layers' outputs, one for each task, each made with an eye on all the tasks so far.

    Kim, Lee, Kim, Yang and Park 2023, "Task relation-aware continual user representation learning", eq. 4, 12 and 13.
    With the embedding ``e_k`` of task k at a layer, and s annealed while a task trains::

        first task        m_0 = sigmoid(s e_0)
        later, K tasks    m_k = sigmoid(s MLP_k(tanh(s e_k), tanh(s e_i), tanh(-s e_i) for i != k))

    As in the authors' code (Sein-Kim/TERACON) the network is one linear map per layer and task over the 2K - 1 values
    that a dimension has, shared by all dimensions; embeddings start uniform in [0, 2]. Here the map has a place for
    every task of the stream, and those of later tasks are multiplied by zero. The authors' has places for the tasks so
    far, and is drawn anew in each stage.

    Args:
        n_tasks: Tasks of the stream.
        n_layers: Masked layers.
        width: Size d of a layer's output.
    """

    LIMIT = 6.0
    """Bound on the embeddings: beyond it the sigmoid has no gradient left."""

    def __init__(self, n_tasks: int, n_layers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.rand(n_tasks, n_layers, width) * 2)
        self.weight = nn.Parameter(torch.randn(n_tasks, n_layers, 2 * n_tasks - 1) * 0.01)
        self.bias = nn.Parameter(torch.full((n_tasks, n_layers), 0.1))

    def forward(self, task: int, seen: int, scale: float) -> torch.Tensor:
        """Returns the masks of one task.

        Args:
            task: Index of the task.
            seen: Tasks so far; those behind them have no say.
            scale: s.

        Returns:
            Values in (0, 1), shape ``[n_layers, d]``.
        """
        if seen == 1 and task == 0:
            return torch.sigmoid(scale * self.embedding[0])
        others = [i for i in range(len(self.embedding)) if i != task]
        used = torch.tensor([float(i < seen) for i in others], device=self.weight.device)
        squashed = torch.tanh(scale * self.embedding[others]) * used.view(-1, 1, 1)
        own = torch.tanh(scale * self.embedding[task]).unsqueeze(0)
        inputs = torch.cat([own, squashed, -squashed])  # tanh is odd
        out = torch.einsum("lj,jld->ld", self.weight[task], inputs) + self.bias[task].unsqueeze(-1)
        return torch.sigmoid(scale * out)
