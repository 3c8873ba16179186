"""One backbone with a head for each task: the shared bottom of the baselines on streams of tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.model.mixture import MixtureOfExperts, TaskMasks
from recbole_cl.model.task_heads import TaskHeads
from recbole_cl.model.task_model import TaskModel
from recbole_cl.registry import models
from recbole_cl.stream.batch import TARGETS


@models.register()
class MultiTask(TaskModel):
    """A backbone whose weights all tasks share, and a head for each task (Caruana 1997, hard parameter sharing).

    Under ``FineTune`` it is SinMo of arXiv 2502.19628, table 1, under ``SingleTask`` the row SASRec, under ``FineAll``,
    ``CONURE`` and ``MTL`` the rows of these names. Backbones that train on all positions do so where a task asks about
    what comes next, items or classes: the head of the task reads each position.
    """

    backbone_property = "multi_task_backbone"
    prefix = "multi_task"

    def make_heads(self) -> TaskHeads:
        """Returns the heads; a next-item task after the first has one, too, or it would be the first one again."""
        with self.own_randomness("heads"):
            return self.heads_of(*(f"{self.prefix}_{part}" for part in ("classifier", "next_item", "item_bias")))

    @property
    def trains_all_positions(self) -> bool:
        """Tells the loader to make windows in any stage, where the backbone reads them."""
        return bool(getattr(self.backbone, "trains_all_positions", False))

    def adapt(self, hidden: torch.Tensor, task: int) -> torch.Tensor:
        """Returns what a task reads of the backbone's output, shape ``[..., d]`` as ``hidden``."""
        return hidden

    def represent(self, batch: Interaction, task: int) -> torch.Tensor:
        return self.adapt(super().represent(batch, task), task)

    def at_positions(self, batch: Interaction, task: int, wanted: torch.Tensor) -> torch.Tensor:
        """Returns the representations of windows at flagged positions, ``[n, d]``, for flags ``[B, L]``."""
        return self.adapt(self.backbone.outputs(batch[self.ITEM_SEQ], wanted), task)

    def calculate_loss(self, batch: Interaction) -> torch.Tensor:
        """Returns the mean loss of the rows, or of the supervised positions of windows."""
        if TARGETS not in batch:
            return super().calculate_loss(batch)
        return self.windows_loss(batch, self.at_positions)

    def answers(self, batch: Interaction, task: int) -> torch.Tensor:
        """Returns a task's logits for the histories of a batch of any task: of its classes, or of all items."""
        if self.tasks[task].kind == "classification":
            return self.logits(batch, task, task)
        return self.item_scores(batch, task)

    def stage_costs(self) -> dict[str, int]:
        """Returns one backbone, one objective at a time, and the bytes that the stage's task added."""
        own = [*self.heads[self.stage].parameters(), *(self.backbone.parameters() if self.stage == 0 else ())]
        return {"backbones": 1, "objectives": 1, "bytes_per_task": sum(p.numel() * p.element_size() for p in own)}


@models.register()
class MMOE(MultiTask):
    """A mixture of experts over a backbone's output, with a gate and a tower for each task, before its head.

    Ma et al. 2018 (see :class:`recbole_cl.model.mixture.MixtureOfExperts`). Under the strategy ``MTL`` it is MMOE, with
    ``mtl_weights: mgda`` MMOE+ of arXiv 2502.19628, table 1.
    """

    backbone_property = "mmoe_backbone"
    prefix = "mmoe"

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        experts = config["mmoe_experts"]
        if experts < 1:
            raise ConfigError(f"mmoe_experts: {experts!r} must be at least 1")
        with self.own_randomness("mixture"):
            self.mixture = MixtureOfExperts(self.width, experts, len(self.tasks))

    def stage_costs(self) -> dict[str, int]:
        parts = self.mixture
        own = [parts.gates[0], parts.towers[0], parts.tower_bias[0]]
        own += [parts.experts, parts.expert_bias] if self.stage == 0 else []
        costs = super().stage_costs()
        return {**costs, "bytes_per_task": costs["bytes_per_task"] + sum(p.numel() * p.element_size() for p in own)}

    def adapt(self, hidden: torch.Tensor, task: int) -> torch.Tensor:
        return self.mixture(hidden, task)  # type: ignore[no-any-return]


@models.register()
class SoftMask(MultiTask):
    """A transformer whose layers' outputs are masked softly, by a mask for each task: the model of TERACON.

    Kim et al. 2023 (see :class:`recbole_cl.model.mixture.TaskMasks`). The outputs of both halves of every layer, before
    they are added to their input, are multiplied by the task's mask. Answers are given at the scale
    ``soft_mask_scale``; the strategy ``TERACON`` anneals it while a task trains.
    """

    backbone_property = "soft_mask_backbone"
    serving_backbones = "SASRec"
    prefix = "soft_mask"
    capabilities = ("task_masks",)

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        if not hasattr(self.backbone, "trm_encoder"):
            raise ConfigError(
                f"soft_mask_backbone: {config['soft_mask_backbone']} has no transformer layers to mask; use SASRec"
            )
        if config["soft_mask_scale"] <= 0:
            raise ConfigError(f"soft_mask_scale: {config['soft_mask_scale']!r} must be above 0")
        with self.own_randomness("masks"):
            self.masks = TaskMasks(len(self.tasks), len(self._halves()), self.width)
        self.train_scale = self.answer_scale = float(config["soft_mask_scale"])
        for half in self._halves():
            object.__setattr__(half, "output_mask", None)
            half.register_forward_hook(_apply_mask)

    def _halves(self) -> list[nn.Module]:
        """The last linear maps of the attention and of the feed-forward part of every layer."""
        layers = self.backbone.trm_encoder.layer
        return [half for layer in layers for half in (layer.multi_head_attention.dense, layer.feed_forward.dense_2)]

    def task_masks(self, task: int) -> torch.Tensor:
        """Returns the masks of a task, shape ``[layers, d]``, at the scale of training or of answering."""
        scale = self.train_scale if self.training else self.answer_scale
        return self.masks(task, self.stage + 1, scale)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def answering_at(self, scale: float) -> Iterator[None]:
        """A context in which a model in eval mode answers at another scale (a teacher, while its student anneals)."""
        kept, self.answer_scale = self.answer_scale, scale
        try:
            yield
        finally:
            self.answer_scale = kept

    def represent(self, batch: Interaction, task: int) -> torch.Tensor:
        with _Masked(self._halves(), self.task_masks(task)):
            return super().represent(batch, task)

    def at_positions(self, batch: Interaction, task: int, wanted: torch.Tensor) -> torch.Tensor:
        with _Masked(self._halves(), self.task_masks(task)):
            return super().at_positions(batch, task, wanted)

    def stage_costs(self) -> dict[str, int]:
        numbers = self.masks.embedding[0].numel() + self.masks.weight[0].numel() + self.masks.bias[0].numel()
        costs = super().stage_costs()
        return {**costs, "bytes_per_task": costs["bytes_per_task"] + numbers * self.masks.bias.element_size()}


class _Masked:
    """A context in which modules multiply their outputs by masks."""

    def __init__(self, modules: list[nn.Module], masks: torch.Tensor) -> None:
        self.modules, self.masks = modules, masks

    def __enter__(self) -> None:
        for module, mask in zip(self.modules, self.masks, strict=True):
            object.__setattr__(module, "output_mask", mask)  # neither a parameter nor a buffer

    def __exit__(self, *_: Any) -> None:
        for module in self.modules:
            object.__setattr__(module, "output_mask", None)  # or the module would hold the graph


def _apply_mask(module: Any, _: Any, output: torch.Tensor) -> torch.Tensor:
    return output if module.output_mask is None else output * module.output_mask
