"""What strategies refuse before training, where their tensors live, and what the trainer hands to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import task_helpers
import torch
from recbole.data.interaction import Interaction
from run_helpers import bare_context, configure
from torch import nn

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError, TrainingError
from recbole_cl.registry import strategies
from recbole_cl.strategy.base import Strategy
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.mas import sensitivities
from recbole_cl.strategy.parts.importance import squared_gradients
from recbole_cl.strategy.parts.rows import OwnRows
from recbole_cl.testing import PlantedDrift, write_planted_drift
from recbole_cl.training.runner import Runner
from recbole_cl.tree import clone_tree

SMALL = {
    "embedding_size": 8, "hidden_size": 8, "inner_size": 16, "n_layers": 1, "n_heads": 2, "MAX_ITEM_LIST_LENGTH": 10,
    "mlp_hidden_size": [8], "mf_embedding_size": 4, "mlp_embedding_size": 4, "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0, "dropout_prob": 0.0,
}  # fmt: skip
QUADRATIC = ("SI", "EWC", "OnlineEWC", "MAS")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return write_planted_drift(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def context(toy: PlantedDrift) -> Callable[..., StageContext]:
    """Returns the context of a stage with a model that has the same weights each time."""
    return lambda model, index=0, **more: bare_context(toy, model, index, scale=3, **{**SMALL, **more})


def make(name: str, **parameters: Any) -> Any:
    """A strategy with the defaults of its properties file."""
    config = CLConfig(model="BPR", dataset="ml-100k", config_dict={"strategy": name})
    return strategies.get(name)({**dict(config.strategy_specs())[name], **parameters})


# -- devices ------------------------------------------------------------------------------------------------------


class Point(nn.Module):
    """Two parameters and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.theta, self.phi = (nn.Parameter(torch.tensor(values)) for values in ([1.0, 5.0], [2.0, 3.0, 4.0]))


def around(module: nn.Module) -> Any:
    """A context around a plain module."""
    found = dict(module.named_parameters())
    ctx = SimpleNamespace(model=module, parameters=lambda: found, terms={}, step=1, epoch=0, pass_=Pass())
    ctx.log = lambda name, value: ctx.terms.__setitem__(name, [float(value), 1.0])
    ctx.data_gradients = {name: torch.ones_like(p) for name, p in found.items()}
    return ctx


def step(strategy: Any, ctx: Any) -> None:
    for p in ctx.parameters().values():
        p.grad = torch.zeros_like(p)
    strategy.add_gradients(ctx)
    with torch.no_grad():
        for p in ctx.parameters().values():
            p -= 0.1
    strategy.after_step(ctx)


def tensors(strategy: Any) -> dict[str, torch.Tensor]:
    return {f"{part}/{name}": t for part in strategy.state for name, t in getattr(strategy, part).items()}


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importances of ones, on the parameters' device, whatever the data."""

    def ones(ctx: Any, *_: Any) -> dict[str, torch.Tensor]:
        return {name: torch.ones_like(p).detach() for name, p in ctx.parameters().items()}

    monkeypatch.setattr("recbole_cl.strategy.ewc.stage_importance", ones)
    monkeypatch.setattr("recbole_cl.strategy.mas.sensitivities", lambda model, *_: ones(around(model)))
    monkeypatch.setattr("recbole_cl.strategy.mas.OwnRows", lambda *_: SimpleNamespace(batches=lambda limit: []))


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that is not the CPU and refuses tensors of the CPU, as a GPU does; its tensors hold no values.

    What reads values gets zeros.
    """
    move = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else move(t))
    number = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: 0.0 if t.is_meta else number(t))
    return torch.device("meta")


@pytest.mark.usefixtures("ends")
@pytest.mark.parametrize("hook", ["step", "end_stage", "penalty"])
@pytest.mark.parametrize("name", QUADRATIC)
def test_a_state_that_was_put_back_works_where_the_parameters_are(
    name: str, hook: str, elsewhere: torch.device
) -> None:
    """Snapshots and checkpoints lie on the CPU; whichever hook comes first brings them back, once."""
    strategy, here = make(name), around(Point())
    strategy.begin_stage(here)
    step(strategy, here)
    strategy.end_stage(here)
    step(strategy, here)
    state = clone_tree(strategy.state_dict())
    there, again = around(Point().to(elsewhere)), make(name)
    again.load_state_dict(state)
    assert {t.device.type for t in tensors(again).values()} == {"cpu"} and len(tensors(again)) == 2 * len(again.state)
    if hook == "step":
        step(again, there)
    elif hook == "end_stage":
        again.end_stage(there)
    else:
        again.penalty(there)
    assert {t.device for t in tensors(again).values()} == {elsewhere}
    kept = tensors(again)
    step(again, there)
    again.penalty(there)
    assert all(t is kept[key] for key, t in tensors(again).items()), "a step copies what is in its place"
    again.end_stage(there)
    step(again, there)
    assert {t.device for t in tensors(again).values()} == {elsewhere}


# -- the gradient of the data alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
def test_si_gets_the_gradient_of_the_data_alone(
    toy: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    """In a run with a distillation and penalties beside it, at the weights before each step of a later stage."""
    before: dict[str, Any] = {}
    apart: list[float] = []  # of the gradient that the optimiser takes, step by step
    lwf, si = strategies.get("LwF"), strategies.get("SI")
    terms, after = lwf.loss_terms, si.after_step

    def look(member: Any, ctx: StageContext, batch: Interaction) -> Any:
        before["weights"] = {name: p.detach().clone() for name, p in ctx.parameters().items()}
        before["batch"] = Interaction({name: column.clone() for name, column in batch.interaction.items()})
        return terms(member, ctx, batch)

    def compare(member: Any, ctx: StageContext) -> None:
        if ctx.index == 1:
            named = ctx.parameters()
            now = {name: p.detach().clone() for name, p in named.items()}
            with torch.no_grad():
                for name, p in named.items():
                    p.copy_(before["weights"][name])
            found = torch.autograd.grad(
                ctx.model.calculate_loss(before["batch"]), list(named.values()), allow_unused=True
            )
            with torch.no_grad():
                for name, p in named.items():
                    p.copy_(now[name])
            gaps = []
            for (name, p), expected in zip(named.items(), found, strict=True):
                assert (name in ctx.data_gradients) == (expected is not None), name
                if expected is not None and p.grad is not None:
                    torch.testing.assert_close(ctx.data_gradients[name], expected, rtol=1e-4, atol=1e-6)
                    gaps.append(float((p.grad - expected).abs().max()))
            apart.append(max(gaps))
        after(member, ctx)

    monkeypatch.setattr(lwf, "loss_terms", look)
    monkeypatch.setattr(si, "after_step", compare)
    strategy = {"SI": {"c": 10.0}, "LwF": {"lambda": 5.0}, "EWC": {"lambda": 1000.0}}
    Runner(configure(toy, tmp_path, model, **SMALL, strategy=strategy, epochs=1, saved=False, eval_step=0)).run()
    assert len(apart) > 3 and min(apart[1:]) > 1e-4, "the strategies' terms cannot be told from the data's gradient"


# -- samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
@pytest.mark.parametrize("name", ["EWC", "OnlineEWC", "MAS"])
def test_samples_are_what_the_importance_is_taken_of(context: Any, name: str, model: str) -> None:
    """The importance after a stage is the mean over the drawn rows and no others."""
    measure: Any = sensitivities if name == "MAS" else squared_gradients
    expected = {}
    for limit in (5, None):
        ctx = context(model)
        batches = list(OwnRows(ctx, name).batches(limit))
        if limit:
            positions = torch.cat([batch["_position"] for batch in batches]).tolist()
            assert len(positions) == 5 == len(set(positions)) < OwnRows(ctx, name).size
        expected[limit] = measure(ctx.model, batches, ctx.parameters())
    for limit, values in expected.items():
        strategy, ctx = make(name, samples=limit), context(model)
        strategy.end_stage(ctx)
        assert strategy.importance.keys() == values.keys()
        for key, value in values.items():
            torch.testing.assert_close(strategy.importance[key], value, rtol=1e-5, atol=1e-9)
    same = [torch.allclose(expected[5][key], value, rtol=1e-2, atol=1e-9) for key, value in expected[None].items()]
    assert not all(same), "five rows cannot be told from all"


# -- refusals -----------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str, str, dict[str, Any], str]] = [
    ("SI", "BPR", {"c": -0.1}, "si_c: -0.1 must be at least 0; 0 is FineTune"),
    ("SI", "BPR", {"xi": 0}, "si_xi: 0 must be more than 0; it bounds Omega .* the default is 0.1"),
    ("SI", "BPR", {"xi": -0.1}, "si_xi: -0.1 must be more than 0"),
    ("SI", "BPR", {"c": float("nan")}, "si_c: nan must be a finite number and at least 0"),
    ("EWC", "BPR", {"lambda": -1.0}, "ewc_lambda: -1.0 must be at least 0; 0 is FineTune"),
    ("EWC", "BPR", {"lambda": float("inf")}, "ewc_lambda: inf must be a finite number"),
    ("EWC", "BPR", {"samples": 0}, "ewc_samples: 0 must be at least 1; ~ takes all"),
    ("OnlineEWC", "BPR", {"lambda": -1.0}, "online_ewc_lambda: -1.0 must be at least 0"),
    ("OnlineEWC", "BPR", {"gamma": -0.5}, "online_ewc_gamma: -0.5 must be at least 0 and at most 1"),
    ("MAS", "BPR", {"lambda": -2}, "mas_lambda: -2 must be at least 0"),
    ("MAS", "BPR", {"samples": -1}, "mas_samples: -1 must be at least 1"),
    ("PersonalizedImitation", "BPR", {"lambda": -1.0}, "piw_lambda: -1.0 must be at least 0"),
    ("PersonalizedImitation", "BPR", {"cluster": -1.0}, "piw_cluster: -1.0 must be at least 0"),
    ("Contrastive", "BPR", {"lambda": -0.1}, "contrastive_lambda: -0.1 must be at least 0"),
    ("Contrastive", "BPR", {"temperature": 0}, "contrastive_temperature: 0 must be more than 0"),
    ("ContrastivePIW", "BPR", {"lambda": -0.1}, "contrastive_piw_lambda: -0.1 must be at least 0"),
    ("ContrastivePIW", "BPR", {"cluster": -0.1}, "contrastive_piw_cluster: -0.1 must be at least 0"),
    ("CCD", "BPR", {"lambda": -1.0}, "ccd_lambda: -1.0 must be at least 0"),
    ("CCD", "BPR", {"stability": 0.1, "plasticity": 0.9}, "ccd_stability: 0.1 must be more than ccd_plasticity, 0.9"),
    ("CCD", "BPR", {"stability": 0.5, "plasticity": 0.5}, "ccd_stability: 0.5 must be more than ccd_plasticity, 0.5"),
    ("CCD", "BPR", {"plasticity": -0.1}, "ccd_plasticity: -0.1 must be at least 0 and at most 1"),
    ("CCD", "BPR", {"sharpness": -1}, "ccd_sharpness: -1 must be at least 0"),
    ("ADER", "SASRec", {"lambda": -0.8}, "ader_lambda: -0.8 must be at least 0"),
    ("ADER", "SASRec", {"batch_size": 0}, "ader_batch_size: 0 must be at least 1; ~ spreads"),
    ("ERRandom", "BPR", {"memory_size": 0}, "er_memory_size: 0 must be at least 1"),
    ("ERFreq", "BPR", {"batch_size": -1}, "er_freq_batch_size: -1 must be at least 0"),
    ("INFER", "BPR", {"reference": 0}, "infer_reference: 0 must be at least 1"),
    ("INFER", "BPR", {"samples": 0}, "infer_samples: 0 must be at least 1"),
    ("ReLoop2", "SASRec", {"lambda": -0.5}, "reloop2_lambda: -0.5 must be at least 0"),
]


@pytest.mark.parametrize(("name", "model", "parameters", "told"), REFUSED)
def test_numbers_without_sense_are_refused(
    context: Any, name: str, model: str, parameters: dict[str, Any], told: str
) -> None:
    ctx = context(model)
    with pytest.raises(ConfigError, match=told):
        make(name, **parameters).check(ctx.config, ctx.model)


@pytest.mark.parametrize("name", sorted({name for name, *_ in REFUSED}))
def test_defaults_and_neutral_parameters_are_taken(context: Any, name: str) -> None:
    model = next(model for other, model, *_ in REFUSED if other == name)
    ctx, neutral = context(model), strategies.get(name).neutral
    make(name).check(ctx.config, ctx.model)
    make(name, **neutral).check(ctx.config, ctx.model)


def test_a_run_refuses_before_it_trains(toy: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trains = "recbole_cl.training.trainer.HookedTrainer._train_epoch"
    monkeypatch.setattr(trains, lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(ConfigError, match=r"si_xi: -0\.1 must be more than 0"):
        Runner(configure(toy, tmp_path, "BPR", **SMALL, strategy={"SI": {"xi": -0.1}})).run()


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"bits": 40}, "reloop2_bits: 40 must be at least 2 and at most 20"),
        ({"bits": -3}, "reloop2_bits: -3 must be at least 2"),
        ({"arrays": -1}, "reloop2_arrays: -1 must be at least 1 and at most 64"),
        ({"arrays": 0}, "reloop2_arrays: 0 must be at least 1"),
    ],
)
def test_reloop2_refuses_a_memory_before_it_makes_it(
    toy: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, int], told: str
) -> None:
    monkeypatch.setattr("recbole_cl.strategy.reloop2.ErrorMemory", lambda *_: pytest.fail("it made the memory"))
    with pytest.raises(ConfigError, match=told):
        Runner(configure(toy, tmp_path, "SASRec", strategy={"ReLoop2": parameters})).run()


# -- replay on streams of tasks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_helpers.write_task_log(tmp_path_factory.mktemp("tasks"))


def on_tasks(folder: Path, out: Path, model: str, **properties: Any) -> Runner:
    given = {**task_helpers.SETTINGS, "data_path": str(folder), "output_dir": str(out), "epochs": 1, **properties}
    config = CLConfig(model=model, dataset="tasks-log", config_dict=given)
    config["saved"] = False
    return Runner(config)


@pytest.mark.parametrize("model", ["MultiTask", "PCL"])
@pytest.mark.parametrize("name", ["ERRandom", "ERFreq", "INFER"])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_replay_refuses_streams_of_tasks(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, name: str, positions: str
) -> None:
    """Rows of several tasks have several sets of fields; that is told before the first epoch, with what serves."""
    trains = "recbole_cl.training.trainer.HookedTrainer._train_epoch"
    monkeypatch.setattr(trains, lambda *_, **__: pytest.fail("it trained"))
    told = f"{name} cannot serve the model {model} under the scheduler TaskStream.*use MTL.*CONURE, TERACON.*PCL"
    if model == "PCL":
        told = f"{name} cannot serve the model PCL, which keeps what earlier stages trained.*use FineTune"
    with pytest.raises(ConfigError, match=told):
        on_tasks(tasks, tmp_path, model, strategy={name: {}}, train_positions=positions).run()


def test_replay_serves_a_stream_of_one_kind_of_task(tasks: Path, tmp_path: Path) -> None:
    """A model without heads answers every next-item task alike, and its rows have one set of fields."""
    runner = on_tasks(
        tasks, tmp_path, "SASRec", strategy={"ERRandom": {"batch_size": 16}}, tasks=task_helpers.TASKS[:2]
    )
    runner.run()
    assert len(runner.strategy.members[0].memory) > 0  # type: ignore[attr-defined]


# -- what the author of a strategy is told ------------------------------------------------------------------------


class Faulty(Strategy):
    """A strategy without a file, as the first draft of another package's."""

    prefix = "faulty"
    defaults = {"lambda": 0.1, "mode": "mean", "often": True}
    term: Any = 0.5

    def __init__(self, parameters: Any = None) -> None:
        super().__init__(parameters)
        self.anchor: dict[str, torch.Tensor] = {}

    def loss_terms(self, ctx: StageContext, batch: Interaction) -> Any:
        if not callable(self.term):
            return self.term if self.term is None else {"Faulty/term": self.term}
        drift = torch.zeros(())
        for name, p in ctx.parameters().items():
            drift = drift + (p - self.anchor.get(name, 0)).square().sum()
        return {"Faulty/term": drift}

    def end_stage(self, ctx: StageContext) -> None:
        self.anchor = {name: p.detach().clone() for name, p in ctx.parameters().items()}


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> type[Faulty]:
    strategies.names()
    monkeypatch.setattr(strategies, "_members", dict(strategies._members))
    monkeypatch.setattr(strategies, "_names", dict(strategies._names))
    own = type("Faulty", (Faulty,), {"__module__": "another_package"})
    strategies._add("Faulty", own)
    return own


@pytest.mark.parametrize(
    ("term", "told"),
    [
        (0.5, r"Faulty\.loss_terms returned a float \(0\.5\) as 'Faulty/term'; it must be a tensor of one number"),
        (torch.ones(3), r"Faulty\.loss_terms returned a tensor of shape \[3\] as 'Faulty/term'"),
        (None, r"Faulty\.loss_terms returned None; it must return a dict"),
    ],
)
def test_a_term_that_is_no_scalar_tensor(
    faulty: type[Faulty], toy: PlantedDrift, tmp_path: Path, term: Any, told: str
) -> None:
    faulty.term = term
    with pytest.raises(ConfigError, match=f"strategy: {told}"):
        Runner(configure(toy, tmp_path, "BPR", strategy="Faulty", epochs=1)).run()


def test_a_strategy_that_forgot_to_grow(faulty: type[Faulty], toy: PlantedDrift, tmp_path: Path) -> None:
    faulty.term = staticmethod(lambda: None)
    with pytest.raises(ConfigError, match=r"strategy: Faulty\.loss_terms: .*it has no grow\(growth\)"):
        Runner(configure(toy, tmp_path, "BPR", strategy="Faulty", epochs=1)).run()


def test_rows_that_are_none(
    faulty: type[Faulty], toy: PlantedDrift, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faulty, "augment_batch", lambda self, ctx, batch: None)
    with pytest.raises(TrainingError, match=r"strategy: Faulty\.augment_batch returned NoneType"):
        Runner(configure(toy, tmp_path, "BPR", strategy="Faulty", epochs=1)).run()


@pytest.mark.parametrize(
    ("key", "value", "told"), [("lambda", "much", "type float"), ("mode", 3, "type str"), ("often", 2, "type bool")]
)
def test_a_bad_property_of_a_strategy_without_a_file(faulty: type[Faulty], key: str, value: Any, told: str) -> None:
    for given in ({"strategy": "Faulty", f"faulty_{key}": value}, {"strategy": {"Faulty": {key: value}}}):
        with pytest.raises(ConfigError, match=f"'faulty_{key}' is {value!r}; it must be of {told}"):
            CLConfig("BPR", "ml-100k", config_dict=given)
    CLConfig("BPR", "ml-100k", config_dict={"strategy": {"Faulty": {"lambda": 1}}})
