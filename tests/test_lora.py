"""LoRA in a model around one of transformers: peft's own layers, what they compute, alpha, dropout, wrong names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from recbole.model.abstract_recommender import SequentialRecommender
from run_helpers import configure, toy
from test_strategy_golden_adapters import batch, model
from torch import nn
from torch.nn import functional as F

from recbole_cl.errors import ConfigError
from recbole_cl.model.adapters import add_lora, part_names, places, require_places, use_lora
from recbole_cl.strategy.parts.part_tuning import PartTuning
from recbole_cl.testing.comparing import assert_same
from recbole_cl.testing.toy import PlantedDrift
from recbole_cl.training.runner import Runner

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Speaking(SequentialRecommender):
    """A small Llama over items as tokens, left-padded by nothing: the stand-in of a generative recommender."""

    defaults = {"loss_type": "CE", "lora_targets": ATTENTION}

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        from transformers import LlamaConfig, LlamaForCausalLM

        self.config, self.targets = config, config["lora_targets"]  # RecBole's configuration, which is none of peft's
        shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
        given = LlamaConfig(
            vocab_size=self.n_items, num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True,
            pad_token_id=0, bos_token_id=None, eos_token_id=None, attn_implementation="eager",
            attention_dropout=0.2, **shape,
        )  # fmt: skip
        self.llm = LlamaForCausalLM(given)

    def adapter_groups(self) -> dict[str, list[str]]:
        return {"lora": self.targets}

    def logits(self, batch: Any) -> torch.Tensor:
        items, length = batch[self.ITEM_SEQ], batch[self.ITEM_SEQ_LEN]
        told = self.llm(input_ids=items, attention_mask=(items > 0).long(), use_cache=False).logits
        return told[torch.arange(len(items)), length - 1]

    def calculate_loss(self, batch: Any) -> torch.Tensor:
        return F.cross_entropy(self.logits(batch), batch[self.POS_ITEM_ID])

    def full_sort_predict(self, batch: Any) -> torch.Tensor:
        return self.logits(batch)


def speaking(**changed: Any) -> Speaking:
    """The stand-in with random weights, in eval mode."""
    from types import SimpleNamespace

    config = {
        "USER_ID_FIELD": "u", "ITEM_ID_FIELD": "i", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "n",
        "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": 6, "device": torch.device("cpu"), "lora_targets": ATTENTION,
    }  # fmt: skip
    torch.manual_seed(0)
    return Speaking({**config, **changed}, SimpleNamespace(num=lambda field: 20)).eval()


def shake(net: nn.Module) -> None:
    """Gives every update values far from zero."""
    generator = torch.Generator().manual_seed(2)
    for name in part_names(net):
        p = net.get_parameter(name)
        p.data = torch.randn(p.shape, generator=generator) * 0.3


# -- layers -------------------------------------------------------------------------------------------------------


def test_attention_of_a_llama_gets_pefts_layers() -> None:
    """Every projection of both layers and nothing else; the model is what it was, bit for bit, and trains as it did."""
    net = speaking()
    names = require_places(net, "lora", "somebody")
    assert names == [f"llm.model.layers.{n}.self_attn.{p}" for n in (0, 1) for p in ATTENTION]
    expected = net.full_sort_predict(batch())
    net.llm.model.embed_tokens.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in net.named_parameters()}
    add_lora(net, names, 4, alpha=16, dropout=0.05)
    assert [name for name, m in net.named_modules() if isinstance(m, LoraLayer)] == names
    assert places(net, "lora") == names, "the same names with the updates inside"
    assert torch.equal(net.full_sort_predict(batch()), expected)
    for name, p in net.named_parameters():
        assert p.requires_grad == flags.get(name.replace(".base_layer", ""), True), name
    assert not hasattr(net, "peft_config") and not hasattr(net.llm, "peft_config")
    add_lora(net, names, 4, ("second",))
    layer = net.get_submodule(names[0])
    assert isinstance(layer, LoraLayer) and set(layer.lora_A) == {"lora", "second"}


@pytest.mark.parametrize(("alpha", "factor"), [(None, 1.0), (16, 4.0), (2.0, 0.5)])
def test_the_update_is_alpha_over_rank_times_b_a(alpha: float | None, factor: float) -> None:
    """peft's own delta, and the answers of the same Llama whose weights are W + s alpha / r B A."""
    net, dense = speaking(), speaking()
    names = places(net, "lora")
    add_lora(net, names, 4, alpha=alpha)
    shake(net)
    for share in (1.0, 0.25):
        use_lora(net, {"lora": share})
        for name in names:
            layer: Any = net.get_submodule(name)
            delta = share * factor * layer.lora_B["lora"].weight @ layer.lora_A["lora"].weight
            torch.testing.assert_close(layer.get_delta_weight("lora"), delta)
            dense.get_submodule(name).weight.data = layer.base_layer.weight.detach() + delta.detach()
        # Two ways to one number: x W + x A B against x (W + A B).
        torch.testing.assert_close(net.logits(batch()), dense.logits(batch()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net.logits(batch()), speaking().logits(batch()), atol=1e-3)


def test_alpha_serves_recboles_own_models() -> None:
    """SASRec's updates count alpha / rank times as much; by default the bits are those of a scale of 1."""
    told = {}
    for alpha in (None, 3, 6):
        net = model()
        names = places(net, "lora")
        add_lora(net, names, 3, alpha=alpha)
        shake(net)
        told[alpha] = net.full_sort_predict(batch())
        assert {net.get_submodule(name).scaling["lora"] for name in names} == {2.0 if alpha == 6 else 1.0}
    assert torch.equal(told[None], told[3]) and not torch.allclose(told[None], told[6], atol=1e-3)


def test_dropout_hides_inputs_while_training_alone() -> None:
    """By torch's generator, so a run draws it from its own state; a share of 0 draws nothing."""
    net = speaking()
    names = places(net, "lora")
    add_lora(net, names, 4, dropout=0.5)
    shake(net)
    layer: Any = net.get_submodule(names[0])
    x = torch.randn(64, 16)
    assert torch.equal(layer(x), layer(x)), "answers draw nothing"
    net.train()
    torch.manual_seed(3)
    one, state = layer(x), torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(one, layer(x)) and not torch.equal(one, layer(x))
    base = F.linear(x, layer.base_layer.weight)
    torch.manual_seed(3)
    hidden = F.dropout(x, 0.5)
    torch.testing.assert_close(one - base, hidden @ layer.get_delta_weight("lora").T, rtol=1e-4, atol=1e-5)
    add_lora(net, names, 4, dropout=0.0)  # as at another stage: it has the updates, and gets the share
    assert layer.lora_A["lora"].weight.abs().sum() > 0
    torch.set_rng_state(state)
    assert torch.equal(layer(x), layer(x)) and torch.equal(torch.get_rng_state(), state)


# -- names that are not there -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (["q_prj"], "adapter_groups of the model Speaking: lora names 'q_prj', but no submodule is called so; did you"),
        (["layers.7.self_attn.q_proj"], "lora names 'layers.7.self_attn.q_proj', but no submodule"),
        (["self_attn"], "lora names 'llm.model.layers.0.self_attn', which is a LlamaAttention; name nn.Linear"),
        ([], "somebody cannot serve the model Speaking: it has no dense layer"),
    ],
)
def test_a_target_that_matches_nothing_is_told(targets: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        require_places(speaking(lora_targets=targets), "lora", "somebody")


def test_names_may_be_whole_or_their_last_parts() -> None:
    own = "llm.model.layers.1.self_attn.q_proj"
    assert places(speaking(lora_targets=[own]), "lora") == [own]
    assert places(speaking(lora_targets=["1.self_attn.q_proj", own]), "lora") == [own]


# -- whole runs ---------------------------------------------------------------------------------------------------

LORA = {"trainable": "lora", "trainable_size": 4, "trainable_alpha": 16, "trainable_dropout": 0.25}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def run(log: PlantedDrift, tmp_path: Path) -> Callable[..., Runner]:
    """Walks a model; its tensors at the end of each stage are kept in ``ends``."""

    def run(folder: str, backbone: Any = Speaking, **properties: Any) -> Runner:
        runner = Runner(configure(log, tmp_path / folder, backbone, **properties))
        runner.run()
        return runner

    return run


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    found: list[dict[str, torch.Tensor]] = []
    original = Runner._evaluate_all

    def look(self: Runner, ctx: Any) -> None:
        original(self, ctx)
        found.append({name: p.detach().clone() for name, p in ctx.model.named_parameters()})

    monkeypatch.setattr(Runner, "_evaluate_all", look)
    return found


def test_a_llama_is_adapted_from_stage_to_stage(
    run: Callable[..., Runner], ends: list[dict[str, torch.Tensor]]
) -> None:
    """The base stage has FineTune's bits, then updates and rows of new items move and nothing else does.

    The run owns its draws: the caller's generator is where it was.
    """
    before = torch.get_rng_state()
    run("plain")
    plain = ends.copy()
    ends.clear()
    runner = run("lora", **LORA)
    assert torch.equal(torch.get_rng_state(), before)
    parts = part_names(runner.model)
    assert len(parts) == 2 * 2 * len(ATTENTION)
    old = runner.stream.stages[0].n_items
    for name, value in ends[0].items():
        if name not in parts:
            assert torch.equal(value, plain[0][name.replace(".base_layer", "")]), f"{name}: another base stage"
            assert torch.equal(ends[2][name][:old] if "embed" in name else ends[2][name], value), f"{name} moved"
        else:
            assert not torch.equal(ends[1][name], ends[2][name]), f"{name} does not move"
    assert runner.stream.stages[2].n_items > old
    layer: Any = runner.model.get_submodule("llm.model.layers.0.self_attn.q_proj")
    assert layer.scaling["lora"] == 4.0 and layer.lora_dropout["lora"].p == 0.25


def test_dropout_goes_on_where_a_run_broke_off(run: Callable[..., Runner], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed between two steps ends with the bits of one that was not, and draws made a difference."""
    original = PartTuning.after_step

    def stop(self: PartTuning, ctx: Any) -> None:
        original(self, ctx)
        if ctx.index == 1 and ctx.step == 3:
            raise KeyboardInterrupt

    whole = run("whole", **LORA, checkpoint_steps=1)
    other = run("other", **{**LORA, "trainable_dropout": 0.0})
    moved = part_names(whole.model)
    assert not any(torch.equal(whole.model.get_parameter(n), other.model.get_parameter(n)) for n in moved)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PartTuning, "after_step", stop)
        run("broken", **LORA, checkpoint_steps=1)
    again = run("broken", **LORA, checkpoint_steps=1, resume=True)
    assert_same(whole.model.state_dict(), again.model.state_dict())


def test_dual_lora_has_alpha_and_dropout(run: Callable[..., Runner]) -> None:
    """Each update is scaled by its share times alpha / rank."""
    given = {"rank": 4, "alpha": 8, "dropout": 0.25, "long_share": 0.25}
    runner = run("dual", "SASRec", strategy={"DualLoRA": given}, epochs=1)
    layer: Any = runner.model.get_submodule("trm_encoder.layer.0.multi_head_attention.query")
    assert layer.scaling == {"long": 0.5, "short": 1.5}
    assert {name: drop.p for name, drop in layer.lora_dropout.items()} == {"long": 0.25, "short": 0.25}


@pytest.mark.parametrize(
    ("properties", "told"),
    [
        ({"trainable": "lora", "trainable_alpha": 0}, "'trainable_alpha' is 0; it must be a number above 0"),
        (
            {"trainable": "lora", "trainable_dropout": 1.0},
            "'trainable_dropout' is 1.0; it must be a number of at least",
        ),
        ({"trainable": "adapter", "trainable_alpha": 16}, "'trainable_alpha' is 16, but trainable: adapter has none"),
        (
            {"trainable": "prompt", "trainable_dropout": 0.1},
            "'trainable_dropout' is 0.1, but trainable: prompt has none",
        ),
        ({"strategy": {"DualLoRA": {"alpha": -1}}}, "dual_lora_alpha: -1 must be above 0"),
        ({"strategy": {"DualLoRA": {"dropout": 1}}}, "dual_lora_dropout: 1 must be at least 0 and below 1"),
    ],
)
def test_what_makes_no_sense_is_refused(run: Callable[..., Runner], properties: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        run("refused", "SASRec", **properties)
