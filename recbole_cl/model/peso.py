"""PESO's model: a causal language model over the codes of items, with one adapter that evolves (Yoo et al. 2026).

::

    history   <s> a3 b1 c7 d2  a5 b0 c7 d9  ...       each item is as many tokens as its semantic id has codes
    answer    a1 -> b4 -> c0 -> d6                    beam search over the trie of the items that are allowed

The base stage has two passes: all weights, then the adapter on the frozen base; around a checkpoint (``llm``) it has
one, adapter and rows of the tokens. Later stages train the adapter alone, and the rows if ``llm_tokens`` says so.
Strategies that say how it is held reach it by :meth:`PESO.adapters` (the capability ``continual_lora``).
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from torch import nn

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.generative.beam import CodeTokens, beam_search, best_items, in_parts, sequence_scores
from recbole_cl.generative.decoder import CopyingDecoder, TreeDecoder
from recbole_cl.generative.index import SemanticIds, read_index
from recbole_cl.generative.quality import quality
from recbole_cl.generative.trie import Pairs, Trie
from recbole_cl.model.all_positions import passes
from recbole_cl.model.contract import ContinualModel, StageTrainer
from recbole_cl.model.language import language
from recbole_cl.model.small_llama import factors, lora_layers, token_loss, train_only
from recbole_cl.model.state import RUN
from recbole_cl.registry import Registry, encoders, models, tokenisers
from recbole_cl.stream.batch import TARGETS

if TYPE_CHECKING:
    from recbole_cl.strategy.context import Pass, StageContext

TOKENS_AT_ONCE = {"cpu": 1 << 13, "cuda": 1 << 17}
"""Tokens of prompts that are answered together."""


@models.register()
class PESO(ContinualModel, SequentialRecommender):
    """A generative recommender whose items are sequences of codes.

    Args:
        config: The run's configuration.
        dataset: RecBole's dataset at the stage.
    """

    capabilities = ("continual_lora",)
    components: ClassVar[dict[str, Registry]] = {"tokeniser": tokenisers, "text_encoder": encoders}
    trains_all_positions = True
    scores_untrained_items = True
    own_metrics: ClassVar[dict[str, bool]] = {"nll": False}
    codes: torch.Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.config = config
        self.ids, self._source = _semantic_ids(config)
        # Also items of later stages: one without codes is told before anything is trained.
        tokens = [str(token) for token in dataset.field2id_token[self.ITEM_ID][1:]]
        rows = self.ids.of(tokens, repr(self._source["source"]))[: self.n_items - 1]
        self._strange = len(self.ids.items) - len(tokens)
        codes = torch.from_numpy(np.r_[np.zeros((1, self.ids.levels), dtype=np.int64), rows])
        self.register_buffer("codes", codes, persistent=False)
        self.language = language(config, self.ids, self.max_seq_length)
        self.llm = self.language.llm
        self.tokens = CodeTokens(self.language.first, self.ids.sizes, config["beam_normaliser"])
        self.trains_all_positions = self.language.template.codes_only
        self._check_choices()
        self._trie: tuple[torch.Tensor, Trie] | None = None

    def _check_choices(self) -> None:
        """Raises a :class:`ConfigError` where properties of the training make no sense together."""
        config = self.config
        if config["llm_tokens"] not in ("base", "every"):
            raise ConfigError(f"property 'llm_tokens' is {config['llm_tokens']!r}; it must be 'base' or 'every'")
        if config["loss_temperature"] <= 0:
            raise ConfigError(f"property 'loss_temperature' is {config['loss_temperature']!r}; it must be above 0")
        if config["loss_end"] and self.trains_all_positions:
            raise ConfigError(
                "property 'loss_end' is True, but in a prompt of codes alone the next item stands where the end would; "
                "choose a prompt of words (llm_prompt), or leave it out"
            )

    # -- for strategies -------------------------------------------------------------------------------------------

    def adapters(self) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
        """Returns A ``[r, in]`` and B ``[out, r]`` of the adapter that is trained, by the adapted layer's name."""
        return {name: factors(layer) for name, layer in lora_layers(self.llm).items()}

    def adapted_layers(self) -> dict[str, nn.Module]:
        """Returns the adapted layers themselves, by the same names."""
        return lora_layers(self.llm)

    # -- the contract ---------------------------------------------------------------------------------------------

    def frozen_bases(self) -> dict[str, dict[str, Any]]:
        """Returns the index of the items' codes, which has no tensors, and the language model under its adapter.

        A checkpoint of other codes, or of an adapter for another language model, is refused. A base that the run has
        trained itself is frozen from the second pass on.
        """
        bases: dict[str, dict[str, Any]] = {"semantic_ids": {**self._source, "names": []}}
        own = ["lora_", "trainable_tokens_delta"]
        if self.language.base is None and self.config["llm_tokens"] == "every":
            own += ["embed_tokens", "lm_head"]
        names = [f"llm.{name}" for name in self.llm.state_dict() if not any(part in name for part in own)]
        if self.language.base is not None:
            bases["llm"] = {**self.language.base, "names": names}
        elif not self.llm.model.norm.weight.requires_grad:
            bases["llm"] = {"source": RUN, "names": names}
        return bases

    def plan_stage(self, ctx: StageContext, passes: list[Pass]) -> list[Pass]:
        """Returns two passes for each that begins without a base: all weights, then the adapter.

        Around a checkpoint it is one, of adapter and rows of tokens, of ``base_epochs`` epochs.
        """
        planned: list[Pass] = []
        first = self.config["base_epochs"]
        for plan in passes:
            if plan.init != "fresh" and not plan.untrained and (ctx.index > 0 or plan is not passes[0]):
                planned.append(plan)
                continue
            if self.language.base is not None:
                planned.append(replace(plan, name=f"{plan.name}/first", epochs=plan.epochs or first))
                continue
            planned += [
                replace(plan, name=f"{plan.name}/base", epochs=plan.epochs or first),
                replace(
                    plan,
                    name=f"{plan.name}/adapter",
                    init="previous",
                    epochs=plan.epochs or self.config["adapter_epochs"],
                    lr_scale=plan.lr_scale * self.config["adapter_lr_scale"],
                ),
            ]
        return planned

    def stage_trainer(self, ctx: StageContext, learning_rate: float) -> StageTrainer | None:
        """Says what the pass trains; RecBole's trainer does it."""
        kind = ctx.pass_.name.rpartition("/")[2]
        rows = kind == "first" or (kind != "adapter" and self.config["llm_tokens"] == "every")
        train_only(self.llm, "base" if kind == "base" else "adapter", rows)
        return None

    def item_levels(self) -> dict[str, np.ndarray]:
        """Returns the leaf of each item: items with the same codes are one."""
        _, leaf = np.unique(self.codes[1:].cpu().numpy(), axis=0, return_inverse=True)
        return {"code": np.r_[0, leaf.reshape(-1) + 1]}

    def report(self) -> dict[str, Any]:
        """Returns the quality of the semantic ids of the items that have a row."""
        codes = self.codes[1:].cpu().numpy()
        quality_of_codes = quality(codes, codes, self.ids.sizes)
        after = quality_of_codes["after"]
        numbers = {
            "items with codes": quality_of_codes["items"],
            "items of the index that the log does not have": self._strange,
            "different semantic ids": after["unique"],
            "items that share one": after["colliding"],
            "largest leaf": after["largest"],
            "entropy of semantic ids (bits)": quality_of_codes["entropy_bits"],
        }
        return {"numbers": numbers, "tables": {"codes of each level": quality_of_codes["levels"]}}

    # -- training -------------------------------------------------------------------------------------------------

    def spell(self, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns item ids ``[B, L]``, 0 for none at their end, as prompts ``[B, P]``, and their lengths ``[B]``."""
        return self.language.template.write(self.tokens.of(self.codes[items]), (items > 0).sum(1))

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Returns the mean cross-entropy over the tokens of all supervised items."""
        losses = [part.flatten() for _, part in self._token_losses(interaction)]
        return torch.cat(losses).mean()

    def per_sample_loss(self, interaction: Interaction) -> torch.Tensor:
        """Returns each row's mean over the tokens of its supervised items, shape ``[B]``."""
        parts = self._token_losses(interaction)
        row = torch.cat([rows for rows, _ in parts])
        loss = torch.cat([part.mean(1) for _, part in parts])
        total = loss.new_zeros(len(interaction)).index_add(0, row, loss)
        count = loss.new_zeros(len(interaction)).index_add(0, row, torch.ones_like(loss))
        return total / count.clamp(min=1)

    def _loss_of(self, answers: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        """Returns the cross-entropy of tokens ``[n, S]`` for outputs of shape ``[n, S, d]``."""
        temperature = float(self.config["loss_temperature"])
        return token_loss(answers.flatten(0, 1), self.llm.lm_head, asked.flatten(), temperature).view(asked.shape)

    def _answer_losses(self, interaction: Interaction) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns row ``[B]`` and cross-entropies ``[B, levels]`` of each row's item behind its prompt."""
        prompts, lengths = self._prompts(interaction)
        asked = self.tokens.of(self.codes[interaction[self.ITEM_ID]])
        if self.config["loss_end"]:
            asked = nn.functional.pad(asked, (0, 1), value=self.language.end)
        steps = asked.size(1)
        at = lengths.unsqueeze(1) + torch.arange(steps, device=lengths.device)
        tokens = nn.functional.pad(prompts, (0, steps), value=self.language.template.pad).scatter(1, at, asked)
        hidden = self.llm.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        rows = torch.arange(len(tokens), device=tokens.device)
        return [(rows, self._loss_of(hidden[rows.unsqueeze(1), at - 1], asked))]

    def _token_losses(self, interaction: Interaction) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns row ``[n]`` and cross-entropies ``[n, levels]`` of the supervised items, similar lengths together."""
        if not self.trains_all_positions:
            return self._answer_losses(interaction)
        history, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN].unsqueeze(1)
        items = nn.functional.pad(history, (0, 1)).scatter(1, lengths, interaction[self.ITEM_ID].unsqueeze(1))
        if TARGETS in interaction:
            wanted = interaction[TARGETS] > 0
        else:
            wanted = torch.zeros_like(history, dtype=torch.bool).scatter(1, lengths - 1, True)
        template, levels, found = self.language.template, self.ids.levels, []
        head = len(template.head)
        for rows, width in passes(wanted):
            tokens, _ = self.spell(items[rows, : width + 1])
            tokens = nn.functional.pad(
                tokens, (0, template.longest(width + 1, levels) - tokens.size(1)), value=template.pad
            )
            hidden = self.llm.model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
            # The tokens of item j + 1, which a flag at j asks for, are answered where those of item j end.
            flags = wanted[rows, :width]
            answers = hidden[:, head - 1 + levels :].unflatten(1, (width, levels))[flags]
            asked = tokens[:, head + levels :].unflatten(1, (width, levels))[flags]
            loss = self._loss_of(answers, asked)
            found.append((rows[flags.nonzero()[:, 0]], loss))
        return found

    # -- answers --------------------------------------------------------------------------------------------------

    def _prompts(self, interaction: Interaction) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns right-padded prompts ``[B, P]`` and their lengths ``[B]``."""
        lengths = interaction[self.ITEM_SEQ_LEN]
        width = int(lengths.max()) if len(lengths) else 1
        return self.spell(interaction[self.ITEM_SEQ][:, :width])

    def _parts(self, lengths: torch.Tensor, width: int = 1) -> list[torch.Tensor]:
        """Returns rows that are answered together; ``width`` tokens a row come on top of the prompts."""
        most = TOKENS_AT_ONCE.get(lengths.device.type, 1 << 13)
        return [part.to(lengths.device) for part in in_parts(lengths + width, most)]

    def _trie_of(self, allowed: torch.Tensor) -> Trie:
        if self._trie is None or not torch.equal(self._trie[0], allowed):
            self._trie = (allowed.clone(), Trie(self.codes, allowed, self.ids.sizes))
        return self._trie[1]

    @torch.no_grad()
    def recommend(
        self, batch: Interaction, k: int, allowed: torch.Tensor, excluded: Pairs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the items that a beam search over the allowed items' trie finds, and their log-probabilities."""
        trie, decoder = self._trie_of(allowed), TreeDecoder if self.config["beam_tree"] else CopyingDecoder
        prompts, lengths = self._prompts(batch)
        items = torch.zeros((len(prompts), k), dtype=torch.int64, device=prompts.device)
        scores = torch.full((len(prompts), k), -torch.inf, device=prompts.device)
        width = max(k, self.config["beam_size"])
        for rows in self._parts(lengths, width):
            longest = int(lengths[rows].max())
            theirs = _of_rows(excluded, rows, len(prompts))
            asked = (prompts[rows, :longest], lengths[rows])
            beams = beam_search(decoder(self.llm), self.tokens, trie, *asked, width, theirs)
            items[rows], scores[rows] = best_items(beams, trie, k, theirs)
        return items, scores

    @torch.no_grad()
    def scores(self, interaction: Interaction, items: torch.Tensor) -> torch.Tensor:
        """Returns the log-probabilities of given items by teacher forcing, shape ``[B, C]``."""
        prompts, lengths = self._prompts(interaction)
        found = torch.empty(items.shape, device=items.device)
        for rows in self._parts(lengths, items.size(1) * self.ids.levels):
            longest = int(lengths[rows].max())
            asked = (prompts[rows, :longest], lengths[rows])
            found[rows] = sequence_scores(TreeDecoder(self.llm), self.tokens, *asked, self.codes[items[rows]])
        return found

    def predict(self, interaction: Interaction) -> torch.Tensor:
        """Returns the log-probability of each row's item, shape ``[B]``."""
        return self.scores(interaction, interaction[self.ITEM_ID].unsqueeze(1)).squeeze(1)

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        """Returns the scores of the items that the beam search finds, -inf elsewhere, shape ``[B, n_items]``."""
        device = self.codes.device
        allowed = torch.ones(self.n_items, dtype=torch.bool, device=device)
        allowed[0] = False
        none = (torch.empty(0, dtype=torch.int64, device=device),) * 2
        items, scores = self.recommend(interaction, max(self.config["topk"]), allowed, none)
        everything = torch.full((len(items), self.n_items), -torch.inf, device=device)
        everything.scatter_(1, items, scores)
        everything[:, 0] = -torch.inf  # empty slots
        return everything

    def measure(self, batch: Interaction) -> dict[str, torch.Tensor]:
        """Returns the negative log-likelihood of each target's codes, of all tokens, shape ``[B]``."""
        return {"nll": -self.predict(batch)}


def _of_rows(excluded: Pairs, rows: torch.Tensor, n: int) -> Pairs:
    """Returns the pairs of some rows, which are numbered anew."""
    row, item = excluded
    place = torch.full((n,), -1, dtype=torch.int64, device=rows.device)
    place[rows] = torch.arange(len(rows), device=rows.device)
    number = place[row]
    return number[number >= 0], item[number >= 0]


def _semantic_ids(config: Any) -> tuple[SemanticIds, dict[str, str]]:
    """Returns the run's semantic ids, and the name and hash of their file.

    Raises:
        ConfigError: If none are named or the file is nowhere.
    """
    asked, folder = config["semantic_ids"], Path(config["data_path"])
    remedy = f"make one from the items' texts with 'recbole-cl semantic-ids --dataset={config['dataset']}'"
    found = [Path(asked).expanduser(), folder / asked] if asked else sorted(folder.glob("index*.json"))
    files = [path for path in found if path.is_file()]
    if not asked and len(files) > 1:
        raise ConfigError(
            f"semantic_ids: the dataset's folder holds {', '.join(path.name for path in files)}; name one of them"
        )
    if not files:
        problem = "semantic_ids: there is no index*.json"
        problem = f"property 'semantic_ids' is {asked!r}, which is no file, neither here nor" if asked else problem
        raise ConfigError(f"{problem} in the dataset's folder {str(folder)!r}; PESO reads items as codes: {remedy}")
    file = files[0]
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"semantic_ids: cannot read {str(file)!r}: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    return _read(str(file), digest), {"source": file.name, "sha256": digest}


@functools.lru_cache(maxsize=4)
def _read(path: str, digest: str) -> SemanticIds:
    """Returns what a file of this hash holds: a model is made anew at every stage."""
    return read_index(path)
