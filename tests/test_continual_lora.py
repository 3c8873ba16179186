"""Strategies of continual LoRA over the model PESO: deltas and gradients against dense computations, killed runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "contracts"))
from conformance_helpers import Job, Walk, assert_resumes, checkpoints, write_log
from test_peso import N_ITEMS, PESO, SETTINGS, context, write_index

from recbole_cl import checkpoint
from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.parts.adapter_pull import AdapterPull

CUMULATIVE = ["SumLoRA", "SDLoRA", "InfLoRA"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    log = write_log(tmp_path_factory.mktemp("log"), n_items=N_ITEMS)
    write_index(log.folder / "log" / "index.json")
    return Job(PESO, log.folder, {**SETTINGS, "lora_dropout": 0.0, "learning_rate": 0.02})


@pytest.fixture(scope="module")
def walks(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Walk]:
    """Walks of each strategy, made when they are first asked for."""
    made: dict[str, Walk] = {}

    def walk(name: str) -> Walk:
        if name not in made:
            made[name] = job.walk(tmp_path_factory.mktemp(name), strategy=name)
        return made[name]

    return walk


# -- pulls: gradients against autograd over the dense formula, float64 --------------------------------------------


def kl(v: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    return (v.softmax(0) * (v.log_softmax(0) - u.log_softmax(0))).sum()


def flat(*tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat([t.flatten() for t in tensors])


def by_module(now: Any, before: Any) -> torch.Tensor:
    return sum(kl(flat(*now[name]), flat(*before[name])) for name in now)


def by_factor_mean(now: Any, before: Any) -> torch.Tensor:
    return sum(kl(flat(x), flat(y)) for name in now for x, y in zip(now[name], before[name], strict=True)) / len(now)


def by_numel(now: Any, before: Any) -> torch.Tensor:
    return sum(sum(t.numel() for t in now[name]) * kl(flat(*now[name]), flat(*before[name])) for name in now)


def by_rank(now: Any, before: Any) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name, (a, b) in now.items():
        for k in range(len(a)):
            total = total + kl(flat(a[k], b[:, k]), flat(before[name][0][k], before[name][1][:, k]))
    return total


def by_distance(now: Any, before: Any) -> torch.Tensor:
    return sum(0.5 * (flat(*now[name]) - flat(*before[name])).square().sum() for name in now)


def by_span(now: Any, before: Any) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name, (a, b) in now.items():
        c, d = before[name]
        total = total + sum((x @ y).square() for x in a for y in c) + sum((x @ y).square() for x in b.T for y in d.T)
    return total


def by_output(now: Any, before: Any) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name, (a, b) in now.items():
        for x in INPUTS[name].double():
            total = total + kl(b @ (a @ x), before[name][1] @ (before[name][0] @ x)) / len(INPUTS[name])
    return total


SHAPES = {"q": (2, 5, 7), "up": (2, 6, 9)}
INPUTS = {
    name: torch.randn(8, width, generator=torch.Generator().manual_seed(5)) for name, (_, width, _) in SHAPES.items()
}


@pytest.mark.parametrize(
    ("name", "parameters", "dense"),
    [
        ("PESO", {}, by_module),
        ("PESO", {"reduction": "mean", "groups": "factor"}, by_factor_mean),
        ("PESO", {"scale": "numel"}, by_numel),
        ("PerRankKL", {}, by_rank),
        ("L2LoRA", {}, by_distance),
        ("OrthogonalLoRA", {}, by_span),
        ("OutputKL", {"inputs": 4096}, by_output),
    ],
)
def test_a_pull_is_the_dense_formula(name: str, parameters: dict[str, Any], dense: Callable[..., Any]) -> None:
    g = torch.Generator().manual_seed(0)
    before, now = {}, {}
    for layer, (r, width, out) in SHAPES.items():
        before[layer] = (torch.randn(r, width, generator=g), torch.randn(out, r, generator=g))
        now[layer] = tuple(t + 0.1 * torch.randn(t.shape, generator=g) for t in before[layer])
    cls = strategies.get(name)
    strategy: AdapterPull = cls({**cls.defaults, **parameters})
    strategy.anchor = before
    if name == "OutputKL":
        strategy._inputs = {layer: [x] for layer, x in INPUTS.items()}
    value, gradients = strategy.pull(now)
    exact = {layer: tuple(t.double().requires_grad_() for t in pair) for layer, pair in now.items()}
    want = dense(exact, {layer: tuple(t.double() for t in pair) for layer, pair in before.items()})
    wanted = torch.autograd.grad(want, [t for pair in exact.values() for t in pair])
    assert float(value) == pytest.approx(float(want.detach()), rel=1e-4)
    for found, gradient in zip(gradients, wanted, strict=True):
        assert found.shape == gradient.shape
        assert (found.double() - gradient).norm() < 1e-4 * gradient.norm()


# -- adapters of past stages --------------------------------------------------------------------------------------


def effective(walk: Walk, name: str) -> torch.Tensor:
    """Returns what an adapted layer of the last model multiplies its inputs by, by asking it."""
    model = walk.runner.model.eval()
    layer = model.adapted_layers()[name]
    with torch.no_grad():
        return layer(torch.eye(layer.base_layer.in_features)).T


@pytest.mark.parametrize("name", CUMULATIVE)
def test_what_a_layer_computes_is_the_dense_sum(walks: Callable[[str], Walk], name: str) -> None:
    walk = walks(name)
    strategy, model = walk.runner.strategy.members[0], walk.runner.model
    scaling = 16 / 2
    assert strategy.used == [0, 1] and len(strategy.past) == 3  # the last stage's own adapter has joined
    for layer, (a, b) in model.adapters().items():
        dense = model.adapted_layers()[layer].base_layer.weight.double() + scaling * b.double() @ a.double()
        for index in strategy.used:
            x, y = (t.double() for t in strategy.past[index][layer])
            if name == "InfLoRA":
                dense = dense + scaling * y @ x
            else:
                magnitude = strategy.magnitudes[layer][index].double() if name == "SDLoRA" else 1.0
                dense = dense + magnitude * (y / y.norm()) @ (x / x.norm())
        assert torch.allclose(effective(walk, layer).double(), dense, atol=1e-5)
        assert (dense - model.adapted_layers()[layer].base_layer.weight).norm() > 1e-3


@pytest.mark.parametrize("name", CUMULATIVE)
def test_past_adapters_and_the_base_stay_byte_for_byte(walks: Callable[[str], Walk], name: str) -> None:
    states = [checkpoint.read(path) for path in checkpoints(walks(name))]
    done = [s for s in states if s["phase"] == "done"]
    past = done[-1]["strategy"][name]["past"]
    for stage, state in enumerate(done):
        tensors = state["model"]["tensors"]
        for layer, pair in past[stage].items():
            assert torch.equal(pair["a"], tensors[f"llm.{layer}.lora_A.default.weight"])
            assert torch.equal(pair["b"], tensors[f"llm.{layer}.lora_B.default.weight"])
    base = [n for n in done[0]["model"]["tensors"] if "lora_" not in n]
    assert all(torch.equal(done[0]["model"]["tensors"][n], s["model"]["tensors"][n]) for s in done for n in base)


def test_magnitudes_are_learnt(walks: Callable[[str], Walk]) -> None:
    magnitudes = walks("SDLoRA").runner.strategy.members[0].magnitudes
    moved = torch.stack([p.detach() for p in magnitudes.values()])
    assert (moved != 1.0).any(dim=0).all()


def test_inflora_leaves_past_inputs_alone(walks: Callable[[str], Walk]) -> None:
    """A lies outside the span of past inputs, and stays as it was computed."""
    walk = walks("InfLoRA")
    strategy = walk.runner.strategy.members[0]
    states = [checkpoint.read(path) for path in checkpoints(walk)]
    in_stage = [s["model"]["tensors"] for s in states if s["stage"] == 1]
    names = [n for n in in_stage[0] if "lora_A" in n]
    assert all(torch.equal(in_stage[0][n], one[n]) for one in in_stage for n in names)
    told = next(s for s in states if s["stage"] == 0 and s["phase"] == "done")["strategy"]["InfLoRA"]
    checked = 0
    for layer, span in told["span"].items():
        a = in_stage[0][f"llm.{layer}.lora_A.default.weight"].double()
        if span.shape[1] <= span.shape[0] - len(a):
            assert (a @ span).abs().max() < 1e-5
            checked += 1
    assert checked and len(strategy.span) == len(told["span"])


@pytest.mark.parametrize("name", CUMULATIVE)
def test_a_killed_run_has_the_same_bits(job: Job, walks: Callable[[str], Walk], tmp_path: Path, name: str) -> None:
    whole = walks(name)
    killed = Job(PESO, job.data, {**job.settings, "strategy": name})
    assert_resumes(killed, tmp_path, whole, whole.ticks - (7 if name == "InfLoRA" else 2), 2)


def test_variants(job: Job, tmp_path: Path) -> None:
    """The latest adapter only; one that goes on where the stage before ended."""
    walk = job.walk(tmp_path / "latest", strategy="SumLoRA", sum_lora_adapters="latest", sum_lora_inherit=True)
    strategy = walk.runner.strategy.members[0]
    assert strategy.used == [1]
    with pytest.raises(ConfigError, match="inf_lora_inherit"):
        job.walk(tmp_path / "inherit", strategy="InfLoRA", inf_lora_inherit=True)
    with pytest.raises(ConfigError, match="sum_lora_adapters"):
        job.walk(tmp_path / "some", strategy="SumLoRA", sum_lora_adapters="some")
    with pytest.raises(ConfigError, match="SumLoRA"):
        job.walk(tmp_path / "two", strategy=["SumLoRA", "PESO"])


def test_contexts_can_be_made_again(walks: Callable[[str], Walk]) -> None:
    assert context(walks("SumLoRA").runner).model is walks("SumLoRA").runner.model


# -- SD-LoRA's own form, and two adapters -------------------------------------------------------------------------

OWN_FORM = {"strategy": "SDLoRA", "sd_lora_shared": True, "sd_lora_current": True, "sd_lora_init": 0.8}


def test_sd_loras_own_form(job: Job, tmp_path: Path) -> None:
    """A magnitude a stage for all layers, one on the current adapter too; what a layer computes is the dense sum."""
    walk = job.walk(tmp_path / "whole", **OWN_FORM)
    strategy, model = walk.runner.strategy.members[0], walk.runner.model
    (magnitudes,) = strategy.magnitudes.values()
    assert magnitudes.shape == (3,) and (magnitudes != 0.8).all()
    for layer, (a, b) in model.adapters().items():
        base = model.adapted_layers()[layer].base_layer.weight.double()
        dense = base + float(magnitudes.detach()[2]) * 8 * b.double() @ a.double()
        for index in strategy.used:
            x, y = (t.double() for t in strategy.past[index][layer])
            dense = dense + float(magnitudes.detach()[index]) * (y / y.norm()) @ (x / x.norm())
        assert torch.allclose(effective(walk, layer).double(), dense, atol=1e-5)
    states = [checkpoint.read(path) for path in checkpoints(walk)]
    at = [s["strategy"]["SDLoRA"]["magnitudes"].get("all layers") for s in states if s["phase"] == "done"]
    assert at[0] is None and at[1].shape == (2,)
    killed = Job(PESO, job.data, {**job.settings, **OWN_FORM})
    (tmp_path / "again").mkdir()
    assert_resumes(killed, tmp_path / "again", walk, walk.ticks - 2, 2)
    kept = magnitudes.detach().tolist()
    strategy.begin_stage(context(walk.runner))
    assert strategy.of("any").tolist() == pytest.approx([*kept, 0.8]), "the current one goes on into the past"


def test_lsat_is_the_average_of_both(job: Job, tmp_path: Path) -> None:
    walk = job.walk(tmp_path / "whole", strategy="LSAT", lsat_share=0.25)
    done = [s for s in map(checkpoint.read, checkpoints(walk)) if s["phase"] == "done"]
    for state in done[1:]:
        own = state["strategy"]["LSAT"]
        for layer, pair in own["short"].items():
            for key, letter in (("a", "A"), ("b", "B")):
                long = done[0]["model"]["tensors"][f"llm.{layer}.lora_{letter}.default.weight"]
                assert torch.equal(own["long"][layer][key], long), "the long-term adapter stays"
                mixed = state["model"]["tensors"][f"llm.{layer}.lora_{letter}.default.weight"]
                assert torch.allclose(mixed, 0.25 * long + 0.75 * pair[key], atol=1e-7)
                assert not torch.equal(pair[key], long)
    (tmp_path / "again").mkdir()
    killed = Job(PESO, job.data, {**job.settings, "strategy": "LSAT", "lsat_share": 0.25})
    assert_resumes(killed, tmp_path / "again", walk, walk.ticks - 2, 2)


def test_lsat_without_its_long_half_is_a_single_lora(job: Job, walks: Callable[[str], Walk], tmp_path: Path) -> None:
    free = job.walk(tmp_path / "free", strategy="LSAT", lsat_share=0.0, lsat_inherit=True)
    assert free.result["matrix"] == walks("SingleLoRA").result["matrix"]
    with pytest.raises(ConfigError, match="lsat_share"):
        job.walk(tmp_path / "much", strategy="LSAT", lsat_share=1.5)
