"""Components that a model or a strategy names by a property: found, with defaults, types and own parameters."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.model.general_recommender import BPR
from test_config import make

from recbole_cl import registry
from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.llm.encode import encode_texts
from recbole_cl.llm.encoders.base import TextEncoder
from recbole_cl.registry import COMPONENTS, Registry, encoders, engines, strategies, tokenisers

ALL = [value for value in vars(registry).values() if isinstance(value, Registry)]


@pytest.fixture(autouse=True)
def lent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    for members in ALL:
        members.names()
        for name in ("_members", "_names"):
            monkeypatch.setattr(members, name, dict(getattr(members, name)))
    yield


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module with an engine that has a file beside it, and a tokeniser that names an encoder."""
    (tmp_path / "parts_elsewhere.py").write_text(
        "from recbole_cl.registry import encoders, engines, tokenisers\n"
        "@engines.register('farm')\n"
        "class Farm:\n"
        "    def __init__(self, parameters, seed): self.parameters = parameters\n"
        "@tokenisers.register('Cut')\n"
        "class Cut:\n"
        "    prefix = 'cut'\n"
        "    components = {'cut_encoder': encoders}\n"
        "    defaults = {'encoder': 'random', 'levels': 3}\n"
    )
    (tmp_path / "Farm.yaml").write_text("farm_hands: 4   # (int) Hands.\nepochs: 9\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "parts_elsewhere", raising=False)
    return __import__("parts_elsewhere")


class Model(BPR):
    components = {"model_engine": engines, "model_tokeniser": tokenisers}
    defaults = {"model_engine": "farm", "model_tokeniser": None, "farm_hands": 5}


def test_a_model_names_its_parts(parts: Any) -> None:
    """Their defaults lie below the model's, which lie below what was asked for; each part sees its own parameters."""
    config = make(Model)
    assert config.component("model_engine") is parts.Farm
    assert config.component_parameters("model_engine") == {"hands": 5}
    assert config["epochs"] == 9  # a general property that the part sets
    assert make(Model, farm_hands=6, model_engine="FARM").component_parameters("model_engine") == {"hands": 6}
    assert make(Model, model_engine="FARM").fingerprint() == config.fingerprint()
    config.component_parameters("model_engine").clear()
    assert config.component_parameters("model_engine") == {"hands": 5}
    with pytest.raises(ConfigError, match="'model_tokeniser' names no component in this run; those that do are model_"):
        config.component("model_tokeniser")


def test_a_part_names_parts_itself(parts: Any) -> None:
    config = make(Model, model_tokeniser="cut", random_width=7)
    assert config.component_parameters("model_tokeniser") == {"encoder": "random", "levels": 3}
    assert config.component_parameters("cut_encoder") == {"width": 7}
    other = make(Model, model_tokeniser="cut", cut_encoder="minilm")
    assert other.component_parameters("cut_encoder") == {"batch_size": 32}
    assert "random_width" not in other.final_config_dict


def test_a_strategy_names_its_parts(parts: Any) -> None:
    """In the dict form, too, which wins over the flat one."""

    class Named:
        prefix = "named"
        components = {"named_encoder": encoders}
        defaults = {"encoder": "minilm"}

    strategies._add("Named", Named)
    assert make(strategy="Named").component_parameters("named_encoder") == {"batch_size": 32}
    config = make(strategy={"Named": {"encoder": "Random"}}, named_encoder="minilm")
    assert config.component_parameters("named_encoder") == {"width": 384}
    assert config.strategy_specs() == [("Named", {"encoder": "Random"})]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"farm_hands": "many"}, r"'farm_hands' is 'many'; it must be of type float"),
        ({"farm_hand": 3}, r"unknown property 'farm_hand'; did you mean 'farm_hands'"),
        ({"farm_cows_and_sheep": 3}, r"unknown property 'farm_cows_and_sheep' of the engine 'farm'.* has farm_hands"),
        ({"model_engine": "fram"}, r"model_engine: unknown engine 'fram'; did you mean 'farm'\? Known: farm, "),
        ({"model_engine": 5}, r"'model_engine' is 5; it must be the name of a component \(engine\)"),
        ({"model_tokeniser": "/"}, r"unknown tokeniser '/'. Known: Cut, residual_"),
    ],
)
def test_what_a_part_refuses(parts: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(Model, **given)


def test_properties_of_a_part_that_is_not_used_are_told() -> None:
    warnings = make(minilm_batch_size=3).warnings
    assert warnings == [
        "property 'minilm_batch_size' has no effect: it belongs to the encoder 'minilm', which is not used"
    ]


def test_one_property_in_two_registries_is_refused(parts: Any) -> None:
    class Twice:
        components = {"model_engine": encoders}

    strategies._add("Twice", Twice)
    with pytest.raises(
        ConfigError, match="'model_engine' is looked up in two registries, of kind 'encoder' and 'engine'"
    ):
        make(Model, strategy="Twice")


# ---------------------------------------------------------------------------------------------- registries


def test_every_registry_has_a_package_a_folder_and_a_group() -> None:
    """Also one whose package is still empty."""
    import importlib
    import tomllib

    root = Path(registry.__file__).resolve().parent.parent
    groups = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]
    assert {members.group for members in ALL} == set(groups)
    for members in ALL:
        assert importlib.import_module(members.package).__doc__
        assert members.names() == sorted(members.names(), key=str.lower)
    assert {members.folder for members in COMPONENTS} == {members.folder for members in ALL} - {
        "model",
        "stream",
        "stratum",
        None,
    }


@pytest.mark.parametrize("members", ALL, ids=lambda members: members.kind)
def test_another_package_adds_to_every_registry(
    members: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "added_elsewhere.py").write_text("class Added: pass\n")
    info = tmp_path / "added-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: added\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{members.group}]\nAdded = added_elsewhere:Added\n")
    monkeypatch.syspath_prepend(tmp_path)
    fresh = Registry(members.kind, members.group, "recbole_cl.federated.engines")  # an empty package
    assert fresh.names() == ["Added"] and fresh.get("added").__module__ == "added_elsewhere"
    (info / "entry_points.txt").write_text(f"[{members.group}]\nAdded = missing_elsewhere:Added\n")
    broken = Registry(members.kind, members.group, "recbole_cl.federated.engines")
    for _ in range(2):  # the second time, too
        with pytest.raises(ConfigError, match="missing_elsewhere:Added' cannot be imported"):
            broken.names()


# ---------------------------------------------------------------------------------------------- text encoders


def test_the_encoder_of_the_docstring_encodes() -> None:
    code = textwrap.dedent(inspect.getdoc(TextEncoder).split("::", 1)[1].split("In place of")[0])  # type: ignore[union-attr]
    exec(compile(code, "base.py", "exec"), {"encoders": encoders, "TextEncoder": TextEncoder, "torch": torch})
    assert encode_texts("lengths", ["a", "bcd"], 0).tolist() == [[1.0, 1.0], [3.0, 3.0]]
    config = CLConfig("PCL", "ml-100k", args=["--pcl_encoder=lengths", "--lengths_width=4"])
    parameters = config.component_parameters("pcl_encoder")
    assert encode_texts("lengths", ["a"], 0, "pcl_encoder", parameters).shape == (1, 4)


def test_a_folder_stands_in_place_of_an_encoders_name(tmp_path: Path) -> None:
    config = make("PCL", pcl_encoder=str(tmp_path), sentence_transformers_batch_size=8)
    assert config.component_parameters("pcl_encoder") == {"folder": str(tmp_path), "batch_size": 8}
    assert config["pcl_encoder"] == str(tmp_path)
    with pytest.raises(ConfigError, match=r"it holds no modules\.json"):
        encode_texts(str(tmp_path), ["a"], 0)
    with pytest.raises(ConfigError, match="sentence_transformers_folder: ~ names no folder"):
        encode_texts("sentence_transformers", ["a"], 0)
    with pytest.raises(ConfigError, match="pcl_encoder: 'minilmm' is neither an encoder; did you mean 'minilm'"):
        make("PCL", pcl_encoder="minilmm")


def test_random_vectors_are_those_of_the_seed_and_the_text() -> None:
    """By hand: a generator seeded by the seed and the text's hash draws a row, which is scaled to length one."""
    import hashlib

    from recbole_cl.rng import torch_generator

    name = f"encoder/{hashlib.sha256(b'a').hexdigest()}"
    row = torch.randn(384, generator=torch_generator(3, 0, name))
    assert torch.equal(encode_texts("random", ["a"], 3)[0], torch.nn.functional.normalize(row, dim=-1))
    narrow = encode_texts("random", ["a"], 3, parameters={"width": 5})
    assert narrow.shape == (1, 5) and not torch.equal(encode_texts("random", ["a"], 4, parameters={"width": 5}), narrow)
