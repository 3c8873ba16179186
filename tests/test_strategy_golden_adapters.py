"""Parts of a frozen base against values computed another way; what is frozen keeps its bytes, what trains moves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec
from torch import nn
from torch.nn import functional as F

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.model.adapters import (
    Adapted,
    Prompt,
    add_adapters,
    add_lora,
    add_prompts,
    part_names,
    places,
    use_lora,
)
from recbole_cl.model.gru4rec import GRU4Rec
from recbole_cl.model.sasrec import SASRec
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.part_tuning import PartTuning, Trainable
from recbole_cl.stream.vocabulary import Growth
from recbole_cl.testing.comparing import assert_same
from recbole_cl.testing.contract import SMALL
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift
from recbole_cl.training.runner import Runner

HEADS, WIDTH, LENGTH, ITEMS = 2, 8, 6, 20
LENGTHS = (6, 3, 1, 4)


def model(cls: type = SASRec, layers: int = 2) -> Any:
    """A small model with weights far from symmetric, in eval mode."""
    config = {
        "n_layers": layers, "n_heads": HEADS, "hidden_size": WIDTH, "inner_size": 12, "embedding_size": WIDTH,
        "num_layers": layers, "hidden_dropout_prob": 0.5, "attn_dropout_prob": 0.5, "dropout_prob": 0.5,
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.4, "loss_type": "CE",
        "USER_ID_FIELD": "u", "ITEM_ID_FIELD": "i", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "n",
        "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": LENGTH, "device": torch.device("cpu"),
    }  # fmt: skip
    torch.manual_seed(0)
    return cls(config, SimpleNamespace(num=lambda field: ITEMS)).eval()


def batch() -> Interaction:
    """Histories of several lengths, padded on the right."""
    rows = torch.randint(1, ITEMS, (len(LENGTHS), LENGTH), generator=torch.Generator().manual_seed(1))
    for row, length in zip(rows, LENGTHS, strict=True):
        row[length:] = 0
    return Interaction({"i_list": rows, "n": torch.tensor(LENGTHS)})


def shake(net: nn.Module) -> None:
    """Gives every part values far from its neutral ones."""
    generator = torch.Generator().manual_seed(2)
    for name in part_names(net):
        p = net.get_parameter(name)
        p.data = torch.randn(p.shape, generator=generator) * 0.5


def attach(net: nn.Module, kind: str, size: int = 3) -> None:
    """Puts parts in their places."""
    {"adapter": add_adapters, "lora": add_lora, "prompt": add_prompts}[kind](net, places(net, kind), size)


# -- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [SASRec, GRU4Rec])
def test_at_the_beginning_the_model_is_what_it_was(cls: type) -> None:
    """Adapters and LoRA add zero, inactive prompts are not there: the same bits."""
    expected = model(cls).full_sort_predict(batch())
    for kind in ("adapter", "lora"):
        net = model(cls)
        attach(net, kind)
        assert part_names(net) and torch.equal(net.full_sort_predict(batch()), expected), kind
        shake(net)
        assert not torch.allclose(net.full_sort_predict(batch()), expected, atol=1e-3), kind
    net = model(cls)
    add_prompts(net, places(net, "prompt"), 3, active=False)
    assert torch.equal(net.full_sort_predict(batch()), expected)
    add_prompts(net, places(net, "prompt"), 3)
    shake(net)
    assert not torch.allclose(net.full_sort_predict(batch()), expected, atol=1e-3)


def test_adapters_by_hand() -> None:
    """h + sum of two bottlenecks, written out."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"dense": nn.Linear(5, 4)})
    layer = holder["dense"]
    add_adapters(holder, ["dense"], 2, count=2)
    assert [p for p in holder["dense"].adapters[0].up.parameters() if bool(p.any())] == []
    shake(holder)
    x, adapted = torch.randn(3, 5), holder["dense"]
    assert isinstance(adapted, Adapted)
    h = x @ layer.weight.T + layer.bias
    expected = h.clone()
    for adapter in adapted.adapters:
        inner = h @ adapter.down.weight.T + adapter.down.bias
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        expected = expected + inner @ adapter.up.weight.T + adapter.up.bias
    torch.testing.assert_close(adapted(x), expected)
    add_adapters(holder, ["dense"], 2, count=3)  # what is there stays
    assert len(adapted.adapters) == 3 and holder["dense"] is adapted
    torch.testing.assert_close(adapted(x), expected)


def test_adapters_stand_before_residual_and_layer_norm() -> None:
    """A sub-layer is LayerNorm(A(dense(...)) + input), in both sub-layers of every layer and nowhere else."""
    net = model()
    assert places(net, "adapter") == [
        f"trm_encoder.layer.{n}.{part}.{last}"
        for n in (0, 1)
        for part, last in (("multi_head_attention", "dense"), ("feed_forward", "dense_2"))
    ]
    attach(net, "adapter")
    shake(net)
    block, x = net.trm_encoder.layer[0].feed_forward, torch.randn(2, 3, WIDTH)
    h = block.dense_2.base_layer(F.gelu(block.dense_1(x)))
    h = h + block.dense_2.adapters[0](h)
    torch.testing.assert_close(block(x), block.LayerNorm(h + x))


def test_lora_by_hand() -> None:
    """x (W + s_l B_l A_l + s_s B_s A_s)^T + b, with the shares of the fusion."""
    torch.manual_seed(0)
    holder = nn.ModuleDict({"dense": nn.Linear(5, 4), "other": nn.Linear(5, 4)})
    weight, bias = holder["dense"].weight.detach().clone(), holder["dense"].bias.detach().clone()
    add_lora(holder, ["dense"], 2, ("long", "short"))
    shake(holder)
    layer, x = holder["dense"], torch.randn(3, 5)
    delta = {k: layer.lora_B[k].weight @ layer.lora_A[k].weight for k in ("long", "short")}
    assert not hasattr(holder["other"], "lora_A")
    for scales in ({"long": 1.0, "short": 1.0}, {"long": 0.7, "short": 0.3}, {"long": 1.0}, {"short": 1.0}):
        use_lora(holder, scales)
        whole = weight + sum(scale * delta[k] for k, scale in scales.items())
        torch.testing.assert_close(layer(x), x @ whole.T + bias)


def test_peft_leaves_the_flags_to_us() -> None:
    net = model()
    net.item_embedding.weight.requires_grad_(False)
    attach(net, "lora")
    use_lora(net, {"lora": 0.5})
    assert [n for n, p in net.named_parameters() if not p.requires_grad] == ["item_embedding.weight"]


def test_prompts_against_a_plain_loop() -> None:
    """One unpadded history at a time: tokens first, then items; items see tokens and earlier items, tokens tokens."""
    net = model()
    attach(net, "prompt")
    shake(net)
    encoder: Any = net.trm_encoder
    assert isinstance(encoder.prompt, Prompt)
    rows, tokens = batch(), encoder.prompt.tokens
    every, last = net.encode(rows["i_list"]), net.user_representation(rows)
    for n, length in enumerate(LENGTHS):
        items = rows["i_list"][n, :length]
        x = net.LayerNorm(net.item_embedding(items) + net.position_embedding.weight[:length])
        x = torch.cat([tokens, x]).unsqueeze(0)
        size = len(tokens) + length
        mask = torch.zeros(1, 1, size, size)
        for query in range(size):
            for key in range(size):
                sees = key < len(tokens) if query < len(tokens) else key <= query
                mask[0, 0, query, key] = 0.0 if sees else -math.inf
        for layer in encoder.layer:
            x = layer(x, mask)
        expected = x[0, len(tokens) :]
        torch.testing.assert_close(every[n, :length], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(last[n], expected[-1], rtol=1e-4, atol=1e-5)


def test_prompts_of_a_recurrent_model_are_its_first_steps() -> None:
    net = model(GRU4Rec)
    attach(net, "prompt")
    shake(net)
    rows, last, plain = batch(), net.user_representation(batch()), model(GRU4Rec).gru_layers
    for n, length in enumerate(LENGTHS):
        x = torch.cat([net.gru_layers.prompt.tokens, net.item_embedding(rows["i_list"][n, :length])]).unsqueeze(0)
        expected = net.dense(plain(x)[0][0, -1])
        torch.testing.assert_close(last[n], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cls", [SASRec, GRU4Rec])
@pytest.mark.parametrize("kind", ["adapter", "lora", "prompt"])
def test_every_path_of_the_model_sees_the_parts(cls: type, kind: str) -> None:
    """Scores without gradients, scores with them, RecBole's own class and all positions at once agree."""
    net = model(cls)
    attach(net, kind)
    shake(net)
    rows = batch()
    slow = net.full_sort_predict(rows).detach()
    with torch.no_grad():
        fast = net.full_sort_predict(rows)
        hidden = net.encode(rows["i_list"])[torch.arange(len(LENGTHS)), torch.tensor(LENGTHS) - 1]
        listed = net.scores(rows, torch.arange(ITEMS).expand(len(LENGTHS), -1))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden @ net.item_embedding.weight.T, slow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(listed, slow, rtol=1e-4, atol=1e-5)
    if cls is SASRec:
        theirs = RecBoleSASRec.forward(net, rows["i_list"], rows["n"])
        torch.testing.assert_close(theirs @ net.item_embedding.weight.T, slow, rtol=1e-4, atol=1e-5)


# -- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return write_planted_drift(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def configure(toy: PlantedDrift, tmp_path: Path) -> Callable[..., CLConfig]:
    numbers = iter(range(100))

    def configure(backbone: Any, strategy: Any = "FineTune", **properties: Any) -> CLConfig:
        given = {**SMALL, **toy.settings(), "strategy": strategy, "mlp_hidden_size": [8, 4], "eval_step": 0}
        given |= {"output_dir": str(tmp_path / f"run{next(numbers)}"), **properties}
        return CLConfig(model=backbone, dataset=toy.name, config_dict=given)

    return configure


@pytest.fixture
def run(configure: Callable[..., CLConfig]) -> Callable[..., tuple[Runner, dict[str, Any]]]:
    def run(*asked: Any, **properties: Any) -> tuple[Runner, dict[str, Any]]:
        config = configure(*asked, **properties)
        config["saved"] = False
        runner = Runner(config)
        return runner, runner.run()

    return run


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The model's tensors at the end of every stage."""
    found: list[dict[str, torch.Tensor]] = []
    original = Runner._evaluate_all

    def keep(self: Runner, ctx: StageContext) -> None:
        found.append({name: value.detach().clone() for name, value in ctx.model.state_dict().items()})
        original(self, ctx)

    monkeypatch.setattr(Runner, "_evaluate_all", keep)
    return found


def own(name: str) -> str:
    """The name a parameter of the model has without parts."""
    return name.replace(".base_layer.", ".")


HARD = {"stage_optimizer": "carry", "weight_decay": 0.1, "clip_grad_norm": {"max_norm": 0.5}}
"""Where a gradient of zero alone does not hold an entry: moments of the base stage and decay would move it."""


@pytest.mark.parametrize(("backbone", "kind"), [("SASRec", "lora"), ("GRU4Rec", "prompt"), ("DeepFM", "adapter")])
def test_frozen_bytes_and_moving_parts(
    backbone: str,
    kind: str,
    run: Callable[..., tuple[Runner, dict[str, Any]]],
    stages: list[dict[str, torch.Tensor]],
) -> None:
    """The base is FineTune's, bit for bit; later no byte of it moves, while parts and rows of who is new do."""
    run(backbone, n_stages=None, **HARD)
    plain = stages.copy()
    stages.clear()
    runner, result = run(backbone, trainable=kind, **HARD)
    parts = part_names(runner.model)
    base = [name for name in stages[0] if name not in parts]
    assert {own(name) for name in base} == set(plain[0])
    for name in base:
        assert torch.equal(stages[0][name], plain[0][own(name)]), f"{name}: the base stage is not FineTune's"
    first, last = runner.stream.stages[0], runner.stream.stages[-1]
    vocabulary = ((first.n_users, last.n_users), (first.n_items, last.n_items))
    grown = 0
    for name in base:
        then, now = stages[0][name], stages[2][name]
        if then.shape == now.shape:
            assert torch.equal(then, now), f"{name} moved"
            continue
        grown += 1
        # Whose rows are whose, from the model's own tables: users come first where one table holds both.
        both = then.shape[0] == first.n_users + first.n_items
        axis = (("user", 0), ("item", 0)) if both else (("item", 0),)
        old, _ = Growth(*vocabulary).rows(axis)
        new = sorted(set(range(len(now))) - set(old.tolist()))
        assert torch.equal(then, now[old]), f"{name}: old rows moved"
        started = stages[1][name]
        assert len(new) and not torch.equal(started[-1], now[-1]), f"{name}: new rows do not move"
    assert grown
    for name in parts:
        assert not torch.equal(stages[1][name], stages[2][name]), f"{name} does not move"
    trained = sum(stages[2][name].numel() for name in parts)
    trained += sum(stages[2][name].numel() - stages[0][name].numel() for name in base)
    assert result["cost"][2]["trainable_parameters"] == trained
    assert result["cost"][0]["trainable_parameters"] == sum(stages[0][name].numel() for name in base)


def test_gradients_reach_the_trained_part_alone(
    run: Callable[..., tuple[Runner, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser holds the parts and the item table; in it, rows of the base get no gradient, new ones do."""
    seen: dict[int, set[str]] = {}
    rows: dict[int, torch.Tensor] = {}
    original = Trainable.after_step

    def look(self: Trainable, ctx: StageContext) -> None:
        with_gradient = {n for n, p in ctx.model.named_parameters() if p.grad is not None and bool(p.grad.any())}
        seen.setdefault(ctx.index, set()).update(with_gradient)
        moved = ctx.model.item_embedding.weight.grad.abs().sum(1) > 0
        rows[ctx.index] = rows.get(ctx.index, torch.zeros_like(moved)) | moved
        original(self, ctx)

    monkeypatch.setattr(Trainable, "after_step", look)
    runner, _ = run("SASRec", trainable="adapter")
    parts = set(part_names(runner.model))
    assert seen[0] & parts == set() and len(seen[0]) > 10
    assert seen[1] == seen[2] == parts | {"item_embedding.weight"}
    sizes = [stage.n_items for stage in runner.stream.stages]
    for index in (1, 2):
        assert not rows[index][: sizes[0]].any() and rows[index][sizes[0] :].all()


def test_ewc_holds_lora(
    run: Callable[..., tuple[Runner, dict[str, Any]]], stages: list[dict[str, torch.Tensor]]
) -> None:
    """EWC measures the base stage in the coordinates of LoRA and holds them: B stays nearer to 0 than without it."""
    run("SASRec", trainable="lora", new_rows="mean")
    plain, drift = stages[-1], {}
    for strength in (0.0, 1e5):
        stages.clear()
        runner, result = run("SASRec", {"EWC": {"lambda": strength}}, trainable="lora", new_rows="mean")
        ewc = next(s for s in runner.strategy.members if s.name == "EWC")
        ups = [name for name in part_names(runner.model) if "lora_B" in name]
        assert all(bool(ewc.importance[name].any()) for name in ups)  # type: ignore[attr-defined]
        drift[strength] = sum(float(stages[1][name].square().sum()) for name in ups)
        if not strength:
            assert_same(plain, stages[-1])  # neutral parameters stay neutral
        logged = [c["terms"]["EWC/penalty"] for c in result["curves"] if c["stage"] == 1]
        assert (max(logged) > 0) == (strength > 0)
    assert 0 < drift[1e5] < 0.5 * drift[0.0], drift


def test_a_teacher_does_not_change_what_trains(
    run: Callable[..., tuple[Runner, dict[str, Any]]], stages: list[dict[str, torch.Tensor]]
) -> None:
    """LwF makes the model of the stage before in the middle of a pass; parts of both later stages move all the same."""
    runner, result = run("SASRec", "LwF", trainable="adapter")
    for name in part_names(runner.model):
        assert not torch.equal(stages[0][name], stages[1][name]) and not torch.equal(stages[1][name], stages[2][name])
    assert max(c["terms"]["LwF/distillation"] for c in result["curves"] if c["stage"] == 1) > 0


@pytest.mark.parametrize("kind", ["adapter", "lora", "prompt"])
def test_a_copy_stands_alone(kind: str) -> None:
    net = model()
    attach(net, kind)
    shake(net)
    rows, other = batch(), copy.deepcopy(net)
    torch.testing.assert_close(other.full_sort_predict(rows), net.full_sort_predict(rows))
    expected = net.full_sort_predict(rows)
    for name in part_names(other):
        other.get_parameter(name).data.zero_()
    assert not torch.allclose(other.full_sort_predict(rows), expected, atol=1e-3)
    assert torch.equal(net.full_sort_predict(rows), expected)


def test_killed_and_resumed(configure: Callable[..., CLConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits of an uninterrupted run, in the stage after the one in which the parts began to train."""

    def runner(**more: Any) -> Runner:
        return Runner(configure("SASRec", "SI", trainable="prompt", stage_optimizer="carry", **more))

    def stop(self: PartTuning, ctx: StageContext) -> None:
        original(self, ctx)
        if ctx.index == 2 and ctx.step == 5:
            raise KeyboardInterrupt

    whole = runner()
    whole.run()
    original = PartTuning.after_step
    broken = runner(checkpoint_steps=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(PartTuning, "after_step", stop)
        broken.run()
    again = runner(checkpoint_steps=2, resume=True, output_dir=str(broken.folder))
    again.run()
    assert_same(whole.model.state_dict(), again.model.state_dict())
    assert_same(whole.strategy.state_dict(), again.strategy.state_dict())


def test_an_adapter_a_stage(
    run: Callable[..., tuple[Runner, dict[str, Any]]], stages: list[dict[str, torch.Tensor]]
) -> None:
    """The adapter of stage 1 keeps its bytes in stage 2, where another one is trained."""
    run("SASRec", {"Adapter": {"per_stage": True, "size": 4}})
    names = [sorted(name for name in state if ".adapters." in name) for state in stages]
    assert [len(n) for n in names] == [8, 8, 16]
    for name in names[1]:
        assert torch.equal(stages[1][name], stages[2][name]) and ".adapters.0." in name
        assert not torch.equal(stages[0][name], stages[1][name])
    assert all(bool(stages[2][name].any()) for name in names[2])


def test_dual_lora_trains_apart_and_serves_both(
    run: Callable[..., tuple[Runner, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long on all data so far, short on the stage from a new beginning, each alone; the sum serves."""
    from recbole_cl.strategy.dual_lora import DualLoRA

    told: list[tuple[Any, ...]] = []
    ends: list[dict[str, torch.Tensor]] = []
    original, ended = DualLoRA.after_step, DualLoRA.end_stage

    def look(self: DualLoRA, ctx: StageContext) -> None:
        original(self, ctx)
        if ctx.index and ctx.step == 1:
            layer = ctx.model.trm_encoder.layer[0].multi_head_attention.query
            moving = {n.split(".")[-2] for n, p in ctx.parameters().items() if "lora" in n}
            targets = len(ctx.stage.train) if ctx.pass_.data == "stage" else ctx.loader.n_targets
            told.append((ctx.index, ctx.pass_.name, layer.active_adapters, moving, ctx.loader.n_targets == targets))
            fresh = ctx.model.get_parameter("trm_encoder.layer.0.multi_head_attention.query.lora_B.short.weight")
            # After one step of Adam an entry that began at 0 is no further than the learning rate.
            assert ctx.pass_.name == "long" or float(fresh.detach().abs().max()) <= 1.01 * ctx.learning_rate

    def end(self: DualLoRA, ctx: StageContext) -> None:
        ended(self, ctx)
        ends.append({n: p.detach().clone() for n, p in ctx.model.named_parameters() if "lora" in n})

    monkeypatch.setattr(DualLoRA, "after_step", look)
    monkeypatch.setattr(DualLoRA, "end_stage", end)
    runner, result = run("SASRec", {"DualLoRA": {"rank": 2, "long_share": 0.25}})
    assert told == [
        (stage, name, [name], {name}, True) for stage in (1, 2) for name in ("long", "short")
    ]  # fmt: skip
    layer = runner.model.get_submodule("trm_encoder.layer.0.multi_head_attention.query")
    assert sorted(layer.active_adapters) == ["long", "short"] and layer.scaling == {"long": 0.25, "short": 0.75}
    trained = {c["pass"]: c["targets"] for c in result["curves"] if c["stage"] == 2}
    assert set(trained) == {"long", "short"} and trained["long"] > 2 * (trained["short"] - trained["long"])
    for name, value in ends[2].items():
        assert not torch.equal(value, ends[1][name]), name
    starts = [e["trm_encoder.layer.0.multi_head_attention.query.lora_A.short.weight"] for e in ends]
    assert len({float(s.sum()) for s in starts}) == 3


# -- models and refusals ------------------------------------------------------------------------------------------


class Elsewhere(SASRec):
    """A model of another package that says itself where parts go."""

    def adapter_groups(self) -> dict[str, list[str]]:
        return {"adapter": ["trm_encoder.layer.0.feed_forward.dense_1"]}


def test_a_model_says_itself_where_parts_go(run: Callable[..., tuple[Runner, dict[str, Any]]]) -> None:
    runner, _ = run(Elsewhere, trainable="adapter")
    assert {name.rsplit(".adapters", 1)[0] for name in part_names(runner.model)} == {
        "trm_encoder.layer.0.feed_forward.dense_1"
    }
    with pytest.raises(ConfigError, match=r"trainable: lora cannot serve the model Elsewhere"):
        run(Elsewhere, trainable="lora")


def refusals() -> Iterator[Any]:
    for backbone in ("BPR", "LightGCN"):
        for kind in ("prompt", "adapter", "lora"):
            yield backbone, "FineTune", {"trainable": kind}, f"trainable: {kind} cannot serve the model {backbone}: it"
        for strategy in ("Adapter", "PromptTuning", "DualLoRA"):
            yield backbone, strategy, {}, f"strategy: {strategy} cannot serve the model {backbone}: it has no"
    yield "NeuMF", "PromptTuning", {}, "strategy: PromptTuning cannot serve the model NeuMF"
    yield "SASRec", "Adapter", {"trainable": "lora"}, "'trainable' is 'lora', but the strategy Adapter trains its own"
    yield "SASRec", ["Adapter", "PromptTuning"], {}, "Adapter and PromptTuning are both a way of training parts only"
    for bound in ("FullRetrain", "Scratch"):
        yield "SASRec", bound, {"trainable": "lora"}, "trainable: lora adapts a base .* starts from new weights"
    yield "SASRec", "EWC", {"trainable": "lora", "trainable_from": 3}, "'trainable_from' is 3, but the stream has 3"
    yield "SASRec", "FineTune", {"trainable": "Lora!"}, "'trainable' is 'Lora!'; it must be one of"
    yield "SASRec", "FineTune", {"trainable_from": 0}, "'trainable_from' is 0; it must be an integer of at least 1"
    yield "SASRec", {"Adapter": {"size": 0}}, {}, "adapter_size: 0"
    yield "SASRec", {"PromptTuning": {"length": 0}}, {}, "prompt_tuning_length: 0"
    yield "SASRec", {"DualLoRA": {"rank": 0}}, {}, "dual_lora_rank: 0"
    yield "SASRec", {"DualLoRA": {"long_share": 1.5}}, {}, "dual_lora_long_share: 1.5"


@pytest.mark.parametrize(("backbone", "strategy", "properties", "told"), refusals())
def test_refused_with_the_reason(
    backbone: str,
    strategy: Any,
    properties: dict[str, Any],
    told: str,
    run: Callable[..., tuple[Runner, dict[str, Any]]],
) -> None:
    with pytest.raises(ConfigError, match=told):
        run(backbone, strategy, **properties)
