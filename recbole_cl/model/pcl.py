"""PCL: a frozen backbone that is prompted for every task that comes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import nn

from recbole_cl.errors import ConfigError
from recbole_cl.llm.encode import encode_texts
from recbole_cl.model.all_positions import last_items
from recbole_cl.model.prompted_histories import Computed, HistoryCache, RecurrentHistories, TransformerHistories
from recbole_cl.model.state import grow_model
from recbole_cl.model.task_heads import TaskHeads
from recbole_cl.model.task_model import TaskModel, probing
from recbole_cl.prompt import ContextualPrompts, ItemAttribute, PromptedEmbedding, describe, place_prompts
from recbole_cl.registry import encoders, models, strategies
from recbole_cl.stream.batch import TARGETS
from recbole_cl.stream.stage import Stage
from recbole_cl.stream.vocabulary import Growth

SCOPES = ("so_far", "all")
"""Tasks that the attention over descriptions sees."""
ATTRIBUTES = (True, "prompted", False)
"""Items of a history that a task's attributes are added to: all, those that are prompted, none."""


@models.register()
class PCL(TaskModel):
    """Prompt-based continual learning (Yang et al., WWW Companion 2025) over a sequential model of RecBole.

    The first task is next-item prediction and trains the backbone with its item embeddings; both are frozen then. A
    later task k trains three small things: position-wise prompts p_k, which are added to the embeddings of the last t
    items (eq. 1) and start from those of the task before; one attention, shared by all tasks, over the sentence
    embeddings of the tasks' descriptions, whose output p'_k is added there too, times lambda (eq. 2 and 3); and an
    adapter f_k. The attention goes on training in later tasks, so p'_k is kept as it was when the task ended, beside
    p_k and f_k: a task's answers never change again.

    Slices of time are tasks as well: the first slice is pretrained on, each later one is prompted for. There alone new
    items appear; their embeddings are trained in the slice that brings them, those of all others stay.

    Args:
        config: The run's configuration; see ``properties/model/PCL.yaml``.
        dataset: The stage's view.

    Raises:
        ConfigError: If the first task is a classification, or the backbone cannot be prompted.
    """

    backbone_property = "pcl_backbone"
    components = {"pcl_encoder": encoders}
    builds_on_stages = True

    def __init__(self, config: Any, dataset: Any) -> None:
        self.n_trained_items = [stage.n_items for stage in dataset.stream.stages]
        super().__init__(config, dataset)
        if self.tasks[0].kind != "next_item":
            raise ConfigError(
                f"model: PCL pretrains on the first task, which is {self.tasks[0].name!r} ({self.tasks[0].kind}); put "
                f"a next_item task first"
            )
        self._refuse_new_beginnings(config)
        self._refuse_what_moves_old_rows()
        length, n_later = config["MAX_ITEM_LIST_LENGTH"], len(self.tasks) - 1
        self.n_prompted = int(length if config["pcl_prompted_items"] is None else config["pcl_prompted_items"])
        if not 1 <= self.n_prompted <= length:
            raise ConfigError(
                f"pcl_prompted_items: {self.n_prompted} must be from 1 to MAX_ITEM_LIST_LENGTH: {length}, or ~ for that"
            )
        if config["pcl_init_std"] < 0:
            raise ConfigError(f"pcl_init_std: {config['pcl_init_std']!r} must be at least 0")
        if config["pcl_context_scope"] not in SCOPES:
            raise ConfigError(f"pcl_context_scope: {config['pcl_context_scope']!r} is none of {', '.join(SCOPES)}")
        if config["pcl_attributes"] not in ATTRIBUTES:
            raise ConfigError(
                f"pcl_attributes: {config['pcl_attributes']!r} is none of True (all items of a history have theirs "
                f"added), 'prompted' (the prompted ones), False"
            )
        self.intensity, self.inherit = float(config["pcl_lambda"]), bool(config["pcl_inherit"])
        n_prompts = n_later if config["pcl_prompts"] else 0
        self.contextual: ContextualPrompts | None = None
        whole, n_in_log = dataset.stream.dataset, dataset.stream.table.n_items  # also items that come later
        with self.own_randomness("parts"):
            drawn = (torch.randn(length, self.width) * config["pcl_init_std"] for _ in range(n_prompts))
            self.prompts = nn.ParameterList(drawn)
            if config["pcl_contextual"]:
                words = [describe(stage, config["valid_metric"], length) for stage in dataset.stream.stages]
                part = config.component_parameters("pcl_encoder")
                name, store = config["pcl_encoder"], config["text_cache"]
                texts = encode_texts(name, words, config["seed"], "pcl_encoder", part, store)
                over_all = config["pcl_context_scope"] == "all"
                self.contextual = ContextualPrompts(texts, self.width, config["pcl_heads"], over_all)
            self.attributes = nn.ModuleList(
                nn.ModuleList(ItemAttribute(whole, field, n_in_log, self.width) for field in task.attributes)
                if config["pcl_attributes"]
                else nn.ModuleList()
                for task in self.tasks
            )
        self.register_buffer(
            "contextual_prompts", torch.zeros(len(self.tasks), self.width)
        )  # p'_k of the tasks that have ended
        self._probe()
        self._choose_trainable()

    contextual_prompts: torch.Tensor
    _histories: HistoryCache | None = None
    _frozen: tuple[Any, ...] = ()
    _validating = False

    @staticmethod
    def _refuse_new_beginnings(config: Any) -> None:
        """Refuses what would train a later task's prompts on a backbone that nobody has pretrained."""
        anew = [
            name
            for name, params in config.strategy_specs()
            if name == "Joint" or strategies.get(name)(params).begins_anew  # Joint trains all tasks' data in each
        ]
        asked = f"strategy: {anew[0]}" if anew else "scratch: True" if config["scratch"] else None
        if asked:
            raise ConfigError(
                f"{asked} begins a task with an untrained model, but PCL prompts a backbone that was trained on the "
                f"first task; use FineTune, and fwt_reference: untrained without scratch"
            )

    def _refuse_what_moves_old_rows(self) -> None:
        """Refuses what would move rows of the item table without a gradient, where later slices bring new items."""
        if self.n_trained_items[-1] == self.n_trained_items[0]:
            return  # the table is frozen as a whole
        if self.config["weight_decay"]:
            raise ConfigError("weight_decay: PCL keeps the rows of known items as they are; set it to 0")
        if self.config["stage_optimizer"] == "carry":
            raise ConfigError(
                "stage_optimizer: 'carry' would move the rows of known items, which PCL keeps as they are, by "
                "their old moments; set it to 'reset'"
            )

    def _probe(self) -> None:
        """Asks the backbone for one sequence, so that one that cannot be prompted is refused before it is trained."""
        device = self.config["device"]
        sequence = torch.ones(1, self.max_seq_length, dtype=torch.int64, device=device)
        prompted = self.backbone.item_embedding.adding(sequence, None)
        with self.own_randomness("probe"), probing(self.backbone, device), prompted:
            self.backbone.forward(sequence, sequence[:, 0])

    def make_heads(self) -> TaskHeads:
        with self.own_randomness("heads"):
            return self.heads_of("pcl_adapter", "pcl_item_adapter", "pcl_item_bias")

    def make_backbone(self, config: Any, dataset: Any) -> Any:
        backbone = super().make_backbone(config, dataset)
        backbone.item_embedding = PromptedEmbedding(backbone.item_embedding)
        return backbone

    # -- from task to task ----------------------------------------------------------------------------------------

    def grow_in_place(self, view: Any, users: tuple[int, int], items: tuple[int, int]) -> Growth:
        """Ends the task that was trained and begins the next one; the runner calls it between two stages.

        Args:
            view: The next stage's view.
            users: Known users (before, after).
            items: Known items (before, after).
        """
        if self.contextual is not None and self.stage > 0:
            with torch.no_grad():
                self.contextual_prompts[self.stage] = self.contextual(self.stage)
        growth = Growth(users, items, {})
        if not growth.identity:
            device = self.backbone.item_embedding.weight.device
            new = self.make_backbone(self.config, view).to(device)
            grown, _ = grow_model(self.backbone, new, users, items, self.config["new_rows"])
            self.backbone, self.n_items = new, items[1]
            found: dict[str, Any] = {f"backbone.{name}": axes for name, axes in grown.axes.items()}
            found |= {f"heads.{name}": [(("item", 0),)] for name in self.heads.grow(self.n_items)}
            growth = Growth(users, items, found)
        self.stage = view.stage_index
        self._frozen = ()  # a task has histories of its own: those of the task before leave their room to them
        if self.inherit and self.prompts and self.stage > 1:
            with torch.no_grad():
                self.prompts[self.stage - 1].copy_(self.prompts[self.stage - 2])
        self._choose_trainable()
        return growth

    def _choose_trainable(self) -> None:
        """Lets exactly what belongs to the running task train."""
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        if self.stage == 0:
            self.backbone.requires_grad_(True)
            return
        if self.prompts:
            self.prompts[self.stage - 1].requires_grad_(True)
        for part in (self.contextual, self.heads[self.stage], self.attributes[self.stage]):
            if part is not None:
                part.requires_grad_(True)
        known = self.n_trained_items[self.stage - 1]
        table = self.backbone.item_embedding.weight
        if len(table) > known:  # slices of time: only the rows of this slice's new items learn
            table.requires_grad_(True)
            new = (torch.arange(len(table), device=table.device) >= known).unsqueeze(1)
            table.register_hook(lambda gradient: gradient * new.to(gradient))
        if not any(p.requires_grad for p in self.parameters()):
            raise ConfigError(
                f"pcl_prompts: False leaves the task {self.tasks[self.stage].name!r} nothing to train; add "
                f"pcl_item_adapter: linear or pcl_item_bias: True, or keep the prompts"
            )

    def train(self, mode: bool = True) -> PCL:
        """Switches training on or off; a frozen backbone never updates statistics, and drops out only if asked to."""
        super().train(mode)
        if mode and self.stage > 0:
            for module in self.backbone.modules():
                drops = isinstance(module, nn.Dropout) and bool(self.config["pcl_dropout"])
                # cuDNN gives gradients of a recurrent layer in training mode only.
                module.training = drops or isinstance(module, nn.RNNBase)
        return self

    # -- histories that are computed once -------------------------------------------------------------------------

    @property
    def trains_all_positions(self) -> bool:
        """Tells the loader to make windows: in the first stage as the backbone does, then where they share work."""
        return super().trains_all_positions or self._shares_histories(self.stage)

    def _shares_histories(self, task: int) -> bool:
        """Tells whether what stands before a task's prompted items is the frozen backbone's own, and most of a history.

        Not so if attributes or rows of new items are trained that may stand anywhere, or the backbone drops out.
        """
        frozen = self.stage > 0 and not self.backbone.item_embedding.weight.requires_grad
        return frozen and not self.config["pcl_dropout"] and self._touches_ends(task)

    def _touches_ends(self, task: int) -> bool:
        """Tells whether a task adds something to its prompted items alone, and these are at most half of a history."""
        attributes: Any = self.attributes[task]
        reach = len(attributes) > 0 and self.config["pcl_attributes"] != "prompted"
        return not reach and 2 * self.n_prompted <= self.max_seq_length and self._prompter() is not None

    def _prompter(self) -> TransformerHistories | RecurrentHistories | None:
        for kind in (TransformerHistories, RecurrentHistories):
            if kind.serves(self.backbone):
                return kind(self.backbone)
        return None

    def _at_ends(self, sequence: torch.Tensor, row: torch.Tensor, last: torch.Tensor, task: int) -> torch.Tensor:
        """Returns the prompted outputs of histories, ``[n, d]``, computing the last t items of each.

        Args:
            sequence: Item ids, shape ``[W, L]``.
            row: The sequence of each history, shape ``[n]``, in rising order.
            last: The place of its last item, shape ``[n]``.
            task: Stage index.
        """
        prompter = self._prompter()
        assert prompter is not None
        frozen = tuple((p.data_ptr(), p._version) for p in self.backbone.parameters())
        if self._histories is None:
            limit = int(self.config["pcl_memory_mb"]) << 20
            self._histories = HistoryCache(prompter.compute, self.max_seq_length, limit)
        if frozen != self._frozen:  # other weights, other histories
            self._histories.begin(prompter.compute)
            self._frozen = frozen
        return self._prompted_ends(self._histories.of(sequence), sequence, row, last, task)

    def _prompted_ends(
        self, computed: Computed, sequence: torch.Tensor, row: torch.Tensor, last: torch.Tensor, task: int
    ) -> torch.Tensor:
        """Returns :meth:`_at_ends`, given what the frozen backbone has computed of the sequences."""
        prompter, prompts = self._prompter(), self.prompts_of(task)
        assert prompter is not None
        own: Any = self.attributes[task]
        if prompts is None:
            prompts = self.backbone.item_embedding.weight.new_zeros(self.n_prompted if len(own) else 1, self.width)
        added = (lambda ids: sum(attribute(ids) for attribute in own)) if len(own) else None
        return prompter.outputs(computed, sequence, row, last, prompts, added)

    def calculate_loss(self, batch: Interaction) -> torch.Tensor:
        """Returns the loss of the rows, or of the supervised positions of windows: each a history of its own."""
        if TARGETS not in batch or self.stage == 0:
            return super().calculate_loss(batch)

        def at(rows: Interaction, task: int, supervised: torch.Tensor) -> torch.Tensor:
            sequence, (row, last) = rows[self.ITEM_SEQ], supervised.nonzero().unbind(1)
            if self._shares_histories(task):
                return self._at_ends(sequence, row, last, task)
            inside = torch.arange(sequence.size(1), device=row.device) <= last.unsqueeze(1)
            history = {self.ITEM_SEQ: sequence[row] * inside, self.ITEM_SEQ_LEN: last + 1}
            return self.represent(Interaction(history), task)

        return self.windows_loss(batch, at)

    @contextlib.contextmanager
    def evaluating(self, stage: Stage, split: str) -> Iterator[None]:
        """A context of evaluation: between epochs what is kept of histories serves validation too, up to rounding.

        Answers that are told or served never come from what is kept: their bits must not depend on ``pcl_memory_mb``.
        """
        self._validating = split == "valid"
        try:
            yield
        finally:
            self._validating = False

    # -- prompting ------------------------------------------------------------------------------------------------

    def prompts_of(self, task: int) -> torch.Tensor | None:
        """Returns the last t rows of p_k, with lambda p'_k added to each, ``[t, d]``, or ``None`` for nothing."""
        if not 0 < task <= self.stage:
            return None
        prompts = self.prompts[task - 1][-self.n_prompted :] if self.prompts else None
        if self.contextual is None:
            return prompts
        context = self.contextual(task) if task == self.stage else self.contextual_prompts[task]
        if prompts is None:
            return self.intensity * context.expand(self.n_prompted, -1)
        return prompts + self.intensity * context

    def added(self, sequence: torch.Tensor, lengths: torch.Tensor, task: int) -> torch.Tensor | None:
        """Returns what a task adds to the embeddings of a sequence, ``[B, L, d]``, or ``None`` for nothing.

        Args:
            sequence: Item ids, shape ``[B, L]``.
            lengths: Items of each sequence, shape ``[B]``.
            task: Stage index; one that has not come yet has nothing to add.
        """
        prompts = self.prompts_of(task)
        own: Any = self.attributes[task] if 0 < task <= self.stage else ()
        out = None if prompts is None else place_prompts(prompts, lengths, sequence.size(1))
        if len(own) and self.config["pcl_attributes"] == "prompted":
            from_end = lengths.unsqueeze(1) - torch.arange(sequence.size(1), device=sequence.device)
            sequence = sequence * (from_end <= self.n_prompted)  # padding has no attributes
        for attribute in own:
            out = attribute(sequence) if out is None else out + attribute(sequence)
        return out

    def represent(self, batch: Interaction, task: int, found: torch.Tensor | None = None) -> torch.Tensor:
        """Returns the frozen backbone's output under a task's prompts, shape ``[B, d]``.

        Args:
            batch: Rows with RecBole's sequence fields.
            task: Stage index.
            found: The sequence's embeddings, where they were looked up before.
        """
        sequence, lengths = batch[self.ITEM_SEQ], batch[self.ITEM_SEQ_LEN]
        learning = (self.training or self._validating) and found is None and task == self.stage
        if learning and self._shares_histories(task):
            return self._at_ends(sequence, torch.arange(len(sequence), device=sequence.device), lengths - 1, task)
        added = self.added(sequence, lengths, task)
        if added is None and found is None:
            return self._output(sequence, lengths)
        with self.backbone.item_embedding.adding(sequence, added, found):
            return self._output(sequence, lengths)

    def _output(self, sequence: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Returns the backbone's output after the last item.

        Models of all positions compute the few outputs that are wanted; their ``forward`` parts the rows of a batch, so
        that the sequence is not looked up as it was given.
        """
        if not hasattr(self.backbone, "outputs_at"):
            return self.backbone.forward(sequence, lengths)  # type: ignore[no-any-return]
        sequence = sequence[:, : int(lengths.max())]
        return self.backbone.outputs_at(sequence, last_items(lengths, sequence.size(1)))  # type: ignore[no-any-return]

    def represent_all(self, batch: Interaction) -> torch.Tensor:
        """Returns the representations for all tasks so far, ``[K, B, d]``; the sequence is looked up once.

        If every task adds something to the last few items alone, what stands before them is computed once as well.
        Then the numbers are those of :meth:`represent` up to rounding, otherwise to the bit.
        """
        sequence, lengths = batch[self.ITEM_SEQ], batch[self.ITEM_SEQ_LEN]
        tasks, prompter = range(self.stage + 1), self._prompter()
        answers = not self.training and not torch.is_grad_enabled()
        if answers and prompter is not None and all(self._touches_ends(task) for task in tasks):
            computed = HistoryCache(prompter.compute, self.max_seq_length, limit=0).of(sequence)
            row = torch.arange(len(sequence), device=sequence.device)
            return torch.stack([self._prompted_ends(computed, sequence, row, lengths - 1, task) for task in tasks])
        found = self.backbone.item_embedding(sequence)
        return torch.stack([self.represent(batch, task, found) for task in tasks])

    # -- costs ----------------------------------------------------------------------------------------------------

    def stage_costs(self) -> dict[str, Any]:
        """Returns the columns #B and #F of the paper's table, and the bytes that a task leaves behind."""
        own: list[Any] = [*self.backbone.parameters()]
        if self.stage > 0:
            parts = (self.heads[self.stage], self.attributes[self.stage])
            own = [*self.prompts[self.stage - 1 : self.stage], *(p for part in parts for p in part.parameters())]
            own += [self.contextual_prompts[self.stage]] if self.contextual is not None else []
        size = sum(tensor.numel() * tensor.element_size() for tensor in own)
        return {"backbones": 1, "objectives": 1, "bytes_per_task": size}
