"""Nothing that somebody gives runs: no property, no file of a log, no file of weights, whatever of RecBole reads it.

Each attack plants code that makes a file, and finds that it did not.
"""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config
from run_helpers import ROOT, SMALL, configure, run, toy

from recbole_cl import guards
from recbole_cl.config import CLConfig
from recbole_cl.config.files import PACKAGE, RECBOLE
from recbole_cl.config.models import get_model_class
from recbole_cl.config.restore import RestoredConfig
from recbole_cl.errors import ConfigError, DataError, RecBoleCLError
from recbole_cl.results.journal import settings
from recbole_cl.stream.build import build_stream
from recbole_cl.testing.toy import PlantedDrift


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


class Attack:
    """Code that makes a file, as a text and in files."""

    def __init__(self, folder: Path) -> None:
        self.mark = folder / "it-ran"
        self.code = f"__import__('pathlib').Path({str(self.mark)!r}).touch()"

    def torch_file(self, path: Path) -> Path:
        """A file as RecBole's trainer writes it, with code where its configuration is."""
        torch.save({"config": Bomb(self.mark), "state_dict": {"a": torch.ones(1)}}, path)
        return path

    def pickle_file(self, path: Path) -> Path:
        """A pickle."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(Bomb(self.mark)))
        return path

    def array_file(self, path: Path) -> Path:
        """A numpy file of objects."""
        np.save(path, np.array([Bomb(self.mark)], dtype=object), allow_pickle=True)
        return path

    def works(self) -> None:
        """Asserts that the attack is one: read as RecBole would, each of its forms runs."""
        own = Attack(self.mark.parent)
        own.mark = self.mark.with_name("it-runs-elsewhere")
        own.code = own.code.replace("it-ran", "it-runs-elsewhere")
        reads = {
            "code": lambda _: eval(own.code),  # what RecBole does
            "torch_file": lambda path: torch.load(path, weights_only=False),
            "pickle_file": lambda path: pickle.loads(path.read_bytes()),
            "array_file": lambda path: np.load(path, allow_pickle=True),
        }
        for form, read in reads.items():
            path = self.mark.with_name("attack.npy")
            if form != "code":
                getattr(own, form)(path)
            read(path)
            assert own.mark.exists(), form
            own.mark.unlink()
            path.unlink(missing_ok=True)


@pytest.fixture
def attack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Attack]:
    """An attack that must not have run, also where the environment turns torch's own care off."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder = tmp_path / "attack"
    folder.mkdir()
    made = Attack(folder)
    yield made
    assert not made.mark.exists(), "the planted code ran"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("planted"))


def test_the_attacks_are_attacks(tmp_path: Path) -> None:
    """The tests below are worth what these files do where nobody guards."""
    Attack(tmp_path).works()


# -- every call of the kind is told -----------------------------------------------------------------------------------

NAMES = {"eval", "exec", "compile", "__import__", "execfile"}
CALLS = {
    "torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "numpy.load",
    "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "importlib.import_module", "shelve.open",
    "os.system", "os.popen", "os.startfile", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load",
    "marshal.loads", "joblib.load", "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads",
}  # fmt: skip
ANYWHERE = {
    "extractall", "extract_zip", "download_url", "urlopen", "urlretrieve", "load_model", "Booster", "read_pickle",
    "from_pretrained", "SentenceTransformer", "import_module", "run_path", "run_module", "unsafe_load", "Unpickler",
}  # fmt: skip
"""Last parts of a call's name that count whatever stands before."""
STARTS = ("subprocess.", "os.exec", "os.spawn", "runpy.", "ctypes.", "pty.")


def calls(source: str) -> set[tuple[str, str]]:
    """Returns the calls of a source that could run what they are given, with the function that each stands in."""
    tree = ast.parse(source)
    real: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            real |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            real |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    found: set[tuple[str, str]] = set()

    def walk(node: ast.AST, where: tuple[str, ...]) -> None:
        for child in ast.iter_child_nodes(node):
            inner = where
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                inner = (*where, child.name)
            if isinstance(child, ast.Call):
                name = ast.unparse(child.func)
                root, dot, rest = name.partition(".")
                full = real.get(root, root) + dot + rest
                if (
                    name in NAMES
                    or full in CALLS
                    or full.startswith(STARTS)
                    or (full.rpartition(".")[2] in ANYWHERE and (dot or full != name or name in ANYWHERE))
                ):
                    found.add((".".join(where), name))
            walk(child, inner)

    walk(tree, ())
    return found


def test_every_call_that_could_run_something_is_told() -> None:
    """A call that a version of RecBole brings, or one that is gone, is seen here."""
    found = {
        (path.relative_to(RECBOLE).as_posix(), where, call)
        for path in RECBOLE.rglob("*.py")
        for where, call in calls(path.read_text(encoding="utf-8"))
    }
    assert found - guards.SITES.keys() == set(), "tell in recbole_cl/guards.py what is done about it"
    assert guards.SITES.keys() - found == set(), "RecBole has no such call"


OWN = {
    ("cli.py", "_import", "importlib.import_module"): "the module that --import names: it is asked for",
    ("cli.py", "main", "importlib.import_module"): "modules that a command names in its class",
    ("config/models.py", "get_model_class", "importlib.import_module"): "a file of RecBole's models",
    ("config/values.py", "read_properties", "yaml.load"): "with a loader that makes plain values",
    ("config/values.py", "parse_value", "yaml.load"): "with a loader that makes plain values",
    ("study/walk.py", "_begin", "importlib.import_module"): "the modules that --import names: they are asked for",
    ("training/costs.py", "import_before_the_clock", "importlib.import_module"): "fixed names",
    ("llm/frozen_vectors.py", "_from", "kind.from_pretrained"): "no remote code; safetensors",
    ("guards.py", "_only_numbers.load", "np.load"): "with allow_pickle=False",
    ("guards.py", "_only_tensors.load", "torch.load"): "with weights_only=True",
    ("llm/clients/transformers_folder.py", "Transformers._load", "AutoModelForCausalLM.from_pretrained"): "safetensors",
    ("llm/clients/transformers_folder.py", "Transformers._load", "AutoTokenizer.from_pretrained"): "no remote code",
    ("llm/encoders/sentence_transformers_folder.py", "load", "SentenceTransformer"): "classes are checked before",
    ("llm/partition_store.py", "PartitionStore.read", "np.load"): "with allow_pickle=False",
    ("model/content_rows.py", "read_vectors", "np.load"): "with allow_pickle=False",
    ("model/llama_checkpoint.py", "load_checkpoint", "AutoConfig.from_pretrained"): "no remote code",
    ("model/llama_checkpoint.py", "load_checkpoint", "AutoModelForCausalLM.from_pretrained"): "safetensors",
    ("model/llama_checkpoint.py", "load_checkpoint", "AutoTokenizer.from_pretrained"): "no remote code",
    ("registry.py", "Registry._load_members", "importlib.import_module"): "a file of this package",
    ("stream/reader.py", "fast_reader", "importlib.import_module"): "a fixed name",
}
"""Calls of the kind in this package, and why they run nothing that somebody gives."""


@pytest.mark.parametrize(
    "source, call",
    [
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("__import__(name)", "__import__"),
        ("import numpy as n\nn.load(path)", "n.load"),
        ("from torch import load as read\nread(path)", "read"),
        ("import pickle as p\np.Unpickler(file).load()", "p.Unpickler"),
        ("import os\nos.system(text)", "os.system"),
        ("import subprocess as s\ns.run(text)", "s.run"),
        ("import yaml\nyaml.load(text, Loader=x)", "yaml.load"),
        ("from importlib import import_module\nimport_module(name)", "import_module"),
        ("pd.read_pickle(path)", "pd.read_pickle"),
        ("archive.extractall(folder)", "archive.extractall"),
    ],
)
def test_the_reader_of_calls_reads_them_all(source: str, call: str) -> None:
    """The test above is worth what this function finds."""
    assert calls(source) == {("", call)}
    inside = "class A:\n    def f(self):\n" + "".join(f"        {line}\n" for line in source.splitlines())
    assert calls(inside) == {("A.f", call)}
    assert calls("import re, json\nre.compile('a')\njson.load(f)\nmodel.eval()\nmodel.load_state_dict(x)") == set()


def test_what_is_told_to_be_guarded_is(tmp_path: Path) -> None:
    """In each module that the table calls guarded or refusing, the very name that is called is a stand-in."""
    for (file, where, call), answer in guards.SITES.items():
        name = "recbole." + file.removesuffix(".py").replace("/", ".")
        if not answer.startswith(("guarded", "refused")) or answer == guards.OWN_FILE:
            continue
        assert name in guards.GUARDS, f"{file}: {call}"
        if name == "recbole.quick_start.quick_start":  # it imports ray; see below
            continue
        module = importlib.import_module(name)
        first, _, rest = call.partition(".")
        replaced = vars(module)[first]
        if rest:
            assert isinstance(replaced, guards.StandIn), f"{file}: {call}"
            assert rest in vars(replaced) or call == "yaml.load"
        else:
            assert replaced is not getattr(__builtins__, first, None) and callable(replaced), f"{file}, {where}"
    used = {"recbole." + file.removesuffix(".py").replace("/", ".") for file, _, _ in guards.SITES}
    assert guards.GUARDS.keys() <= used


def test_a_module_is_guarded_whenever_it_is_imported(tmp_path: Path) -> None:
    """Before recbole_cl, after it, or anew; and the libraries themselves stay what they are."""
    code = """
import importlib, sys
sys.argv = ["x"]
import numpy
numpy.float_, numpy.complex_, numpy.unicode_ = numpy.float64, numpy.complex128, numpy.str_
import recbole.config.configurator
assert "_guarded_by_recbole_cl" not in vars(recbole.config.configurator)
import recbole_cl
import recbole.trainer.trainer, recbole.data.utils
import numpy, pickle, torch, yaml
from recbole_cl import guards
for again in range(2):
    for name in ("recbole.trainer.trainer", "recbole.data.utils", "recbole.config.configurator"):
        module = importlib.import_module(name)
        assert vars(module)["_guarded_by_recbole_cl"], name
        for known, own in guards.GUARDS[name](module).items():
            assert type(vars(module)[known]) is type(own), (name, known)
        importlib.reload(module)
assert sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path) == 1
assert torch.load.__module__ == "torch.serialization" and pickle.load is importlib.import_module("_pickle").load
assert eval("1 + 1") == 2 and type(numpy).__name__ == "module" and "recbole" not in yaml.FullLoader.__module__
print("guarded")
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout == "guarded\n", done.stderr


# -- properties -------------------------------------------------------------------------------------------------------


def test_no_property_of_a_run_is_evaluated(tmp_path: Path, attack: Attack, log: PlantedDrift) -> None:
    """On the command line, in a dictionary, in a file; numbers, lists and texts are read as ever."""
    file = tmp_path / "own.yaml"
    file.write_text(f'pre_model_path: "{attack.code}"\nmlp_hidden_size: "[64, 32]"\n', encoding="utf-8")
    given = log.settings()
    for more, args in (({}, [f"--pre_model_path={attack.code}"]), ({"pre_model_path": attack.code}, [])):
        config = CLConfig("BPR", log.name, config_dict={**given, **more}, args=args)
        assert config["pre_model_path"] == attack.code
    config = CLConfig("NeuMF", log.name, [file], {**given, "embedding_size": "16"}, ["--mlp_hidden_size=[8,4]"])
    assert config["mlp_hidden_size"] == [8, 4] and config["pre_model_path"] == attack.code
    for text in (f"!!python/object/apply:os.system ['touch {attack.mark}']", "!!python/name:os.system"):
        file.write_text(f"pre_model_path: {text}\n", encoding="utf-8")
        with pytest.raises(ConfigError, match="is not valid YAML"):
            CLConfig("BPR", log.name, [file], log.settings())


def test_recboles_own_configuration_evaluates_nothing(tmp_path: Path, attack: Attack, monkeypatch: Any) -> None:
    """The one that a comparison with RecBole makes: what a person writes as a value is one, and code stays a text."""
    texts = {
        "mlp_hidden_size": ("[64, 32]", [64, 32]),
        "learning_rate": ("1e-3", 1e-3),
        "val_interval": ("{'rating': '[3,inf)'}", {"rating": "[3,inf)"}),
        "topk": ("[5, 10]", [5, 10]),
        "pair": ("(5, 10)", (5, 10)),
        "repeatable": ("True", True),
        "shuffle": ("true", True),
        "reg_weight": ("-0.5", -0.5),
        "weight_decay": ("None", None),
        "LABEL_FIELD": ("'rating'", "rating"),
        "pre_model_path": ("saved/BPR.pth", "saved/BPR.pth"),
        "attack": (attack.code, attack.code),
        "lambda_attack": (f"(lambda: {attack.code})()", f"(lambda: {attack.code})()"),
        "comprehension": (f"[{attack.code} for _ in [0]]", f"[{attack.code} for _ in [0]]"),
        "module": (f"os.system('touch {attack.mark}')", f"os.system('touch {attack.mark}')"),
        "long": ("9" * 5000, "9" * 5000),
        "deep": ("[" * 5000, "[" * 5000),
    }  # fmt: skip
    given = {key: text for key, (text, _) in texts.items()}
    (tmp_path / "own.yaml").write_text("tuple: !!python/tuple [1, 2]\nrate: 1e-4\n", encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["x", f"--on_the_line={attack.code}", "--layers=[1,2]"])
    config = Config("BPR", "ml-100k", [str(tmp_path / "own.yaml")], {**given, "use_gpu": False})
    assert {key: config[key] for key in texts} == {key: value for key, (_, value) in texts.items()}
    assert config["on_the_line"] == attack.code and config["layers"] == [1, 2]
    assert config["tuple"] == (1, 2) and config["rate"] == 1e-4
    import yaml

    for text in (f"!!python/object/apply:os.system ['touch {attack.mark}']", "!!python/name:os.system"):
        (tmp_path / "own.yaml").write_text(f"key: {text}\n", encoding="utf-8")
        with pytest.raises(yaml.YAMLError):
            Config("BPR", "ml-100k", [str(tmp_path / "own.yaml")], {"use_gpu": False})


def test_kd_dagfms_teacher_is_a_name(tmp_path: Path, attack: Attack, log: PlantedDrift) -> None:
    """Refused before the log is read, and where the model is made: a checkpoint's settings come from others, too."""
    given = {**log.settings(), **SMALL, "output_dir": str(tmp_path / "run")}
    for teacher in (attack.code, f"(lambda config: {attack.code})", "os.system", "nn.Linear", "CINComp", "", 5, None):
        with pytest.raises(ConfigError, match=r"property 'teacher' is .* none of CrossNet, CIN, DAGFM"):
            CLConfig("KD_DAGFM", log.name, config_dict={**given, "teacher": teacher})
    with pytest.raises(ConfigError, match="did you mean 'CrossNet'"):
        CLConfig("KD_DAGFM", log.name, config_dict={**given, "teacher": "Crosnet"})
    config = CLConfig("KD_DAGFM", log.name, config_dict=given)
    restored = RestoredConfig({**settings(config), "teacher": attack.code})
    restored["device"] = torch.device("cpu")
    with pytest.raises(ConfigError, match="property 'teacher'"):
        get_model_class("KD_DAGFM")(restored, build_stream(config).view(0))


@pytest.mark.parametrize("teacher", ["CrossNet", "CIN"])
def test_kd_dagfm_trains_with_each_of_its_teachers(tmp_path: Path, log: PlantedDrift, teacher: str) -> None:
    runner, result = run(log, tmp_path / "run", "KD_DAGFM", epochs=1, teacher=teacher, t_cin=[4], eval_args=RANKED)
    assert type(runner.model.teacher_network).__name__ == teacher and len(result["stages"]) == 3


RANKED = {"mode": "uni20"}


def test_a_search_space_is_a_list_of_values(tmp_path: Path, attack: Attack) -> None:
    """RecBole's hyper-parameter search evaluates the choices of its file."""
    from recbole.trainer import hyper_tuning

    read = vars(hyper_tuning)["eval"]
    assert read("[0.1,0.01]") == [0.1, 0.01] and read("['[64]','[32,16]']") == ["[64]", "[32,16]"]
    with pytest.raises(ConfigError, match="params_file: the choice"):
        read(attack.code)


# -- files ------------------------------------------------------------------------------------------------------------

PRETRAINED = [
    ("ConvNCF", {"train_method": "after_pretrain"}, "pre_model_path"),
    ("NAIS", {}, "pretrain_path"),
    ("NeuMF", {"use_pretrain": True, "mlp_pretrain_path": "missing"}, "mf_pretrain_path"),
    ("RaCT", {"train_stage": "critic_pretrain"}, "pre_model_path"),
    ("RaCT", {"train_stage": "finetune"}, "pre_model_path"),
    ("KD_DAGFM", {"phase": "distillation", "eval_args": RANKED}, "warm_up"),
]
"""Model, what makes it read weights, and the property that names the file."""


@pytest.mark.parametrize("model, more, key", PRETRAINED)
def test_files_of_weights_hold_tensors(
    tmp_path: Path, attack: Attack, log: PlantedDrift, model: str, more: dict[str, Any], key: str
) -> None:
    """Refused by name with a remedy: a file with code, a pickle, no file, a file that holds no weights."""
    numbers = tmp_path / "numbers.pth"
    torch.save([1, 2], numbers)
    files = {
        attack.torch_file(tmp_path / "attack.pth"): "does not hold tensors and plain values alone.*Where you trust",
        attack.pickle_file(tmp_path / "attack.pkl"): "does not hold tensors and plain values alone",
        tmp_path / "missing.pth": "is no file",
        numbers: "holds no weights",
    }
    for file, told in files.items():
        with pytest.raises(ConfigError, match=f"{key}.*{file.name}.*{told}"):
            run(log, tmp_path / "run", model, epochs=1, **{**more, key: str(file)})


def test_files_of_s3rec(tmp_path: Path, attack: Attack) -> None:
    """S3Rec reads attributes of items, which the toy log lacks: the function that it calls is asked itself."""
    from recbole.model.sequential_recommender import s3rec

    with pytest.raises(ConfigError, match=r"pre_model_path: .*attack.pth' is not read"):
        s3rec.torch.load(str(attack.torch_file(tmp_path / "attack.pth")))


def test_weights_that_are_weights_are_read(tmp_path: Path, log: PlantedDrift) -> None:
    """NeuMF from two files of RecBole's trainer whose configuration was left out, as the remedy says; both forms."""
    given = {"vocabulary": "global", "epochs": 1, "mf_train": True, "mlp_train": True}
    files = {}
    for part, other in (("mf", "mlp"), ("mlp", "mf")):
        runner, _ = run(log, tmp_path / part, "NeuMF", **{**given, f"{other}_train": False})
        files[part] = tmp_path / f"{part}.pth"
        weights = runner.model.state_dict()
        torch.save({"state_dict": weights, "epoch": 3} if part == "mf" else weights, files[part])
    given |= {"use_pretrain": True, **{f"{part}_pretrain_path": str(file) for part, file in files.items()}}
    config = configure(log, tmp_path / "run", "NeuMF", **given)
    made = get_model_class("NeuMF")(config, build_stream(config).view(0))
    for part, name in (("mf", "item_mf_embedding"), ("mlp", "item_mlp_embedding")):
        found = torch.load(files[part], weights_only=True)
        wanted = found.get("state_dict", found)[f"{name}.weight"]
        assert torch.equal(made.state_dict()[f"{name}.weight"], wanted)


def test_ldiffrecs_vectors_are_numbers(tmp_path: Path, attack: Attack) -> None:
    """In a log's folder lies what came with the log: a pickled ``item_emb.npy`` is refused, not run."""
    pytest.importorskip("recbole.model.general_recommender.ldiffrec")
    own = toy(tmp_path / "own")
    path = Path(own.settings()["data_path"]) / own.name / "item_emb.npy"
    wrong = {
        "pickled objects are not read": lambda: attack.array_file(path),
        "no array of numbers": lambda: attack.pickle_file(path),
        "it is no array of numbers; LDiffRec": lambda: np.save(path, np.array(["a"])),
    }
    for told, plant in wrong.items():
        plant()
        with pytest.raises(DataError, match=f"item_emb.npy: .*{told}"):
            run(own, tmp_path / "run", "LDiffRec", epochs=1, n_cate=2)
    path.unlink()
    with pytest.raises(DataError, match=r"item_emb.npy: the file is missing; .*n_cate: 1"):
        run(own, tmp_path / "run", "LDiffRec", epochs=1, n_cate=2)
    from recbole.model.general_recommender import ldiffrec

    np.save(path, np.eye(3, dtype=np.float32))
    assert np.array_equal(ldiffrec.np.load(path, allow_pickle=True), np.eye(3)), "numbers are read as ever"


def test_saved_datasets_and_loaders_are_not_read(tmp_path: Path, attack: Attack, monkeypatch: Any) -> None:
    """By the property that names one, and where RecBole looks by itself: ``saved/`` of the working directory."""
    from recbole.data import utils

    monkeypatch.setattr(sys, "argv", ["x"])
    monkeypatch.chdir(tmp_path)
    named = attack.pickle_file(tmp_path / "named.pth")
    attack.pickle_file(tmp_path / "saved" / "ml-100k-Dataset.pth")
    attack.pickle_file(tmp_path / "saved" / "ml-100k-for-BPR-dataloader.pth")
    for more, told in (({}, "saved/ml-100k-Dataset.pth"), ({"dataset_save_path": str(named)}, "named.pth")):
        config = Config("BPR", "ml-100k", config_dict={"use_gpu": False, **more})
        with pytest.raises(ConfigError, match=f"dataset_save_path.*{told}' was written by RecBole with pickle"):
            utils.create_dataset(config)
    for more, told in (({}, "for-BPR-dataloader.pth"), ({"dataloaders_save_path": str(named)}, "named.pth")):
        config = Config("BPR", "ml-100k", config_dict={"use_gpu": False, **more})
        with pytest.raises(ConfigError, match=f"dataloaders_save_path: .*{told}"):
            utils.load_split_dataloaders(config)


def test_a_run_and_a_comparison_leave_planted_files_alone(
    tmp_path: Path, attack: Attack, log: PlantedDrift, monkeypatch: Any
) -> None:
    """Files under RecBole's names in the working directory, and properties that ask for them: none is read."""
    from recbole_cl.study.parity import compare

    monkeypatch.chdir(tmp_path)
    for name in (f"{log.name}-Dataset", f"{log.name}-for-BPR-dataloader", f"BPR-{log.name}"):
        attack.pickle_file(tmp_path / "saved" / f"{name}.pth")
    named = str(attack.pickle_file(tmp_path / "named.pth"))
    for key in ("dataset_save_path", "dataloaders_save_path"):
        with pytest.raises(ConfigError, match=f"property '{key}'"):
            run(log, tmp_path / "run", "BPR", **{key: named})
    run(log, tmp_path / "run", "BPR", epochs=1)
    more = {**SMALL, "parity": "recbole", "output_dir": str(tmp_path / "parity"), "attack": attack.code, "epochs": 1}
    keys = ("data_path", "load_col")
    found = compare(CLConfig("BPR", log.name, config_dict={**{k: log.settings()[k] for k in keys}, **more}))
    assert found["equal_losses"]


def test_recboles_trainer_reads_tensors(tmp_path: Path, attack: Attack, log: PlantedDrift) -> None:
    """``resume_checkpoint`` and ``evaluate`` of RecBole's trainer, which a model of another package may call."""
    from recbole.trainer import trainer

    file = attack.torch_file(tmp_path / "attack.pth")
    for call in (
        lambda: trainer.Trainer.resume_checkpoint(_Bare(), file),
        lambda: trainer.Trainer.evaluate(_Bare(), [1], model_file=file),
    ):
        with pytest.raises(ConfigError, match=r"model_file or resume_file: .*attack.pth' is not read"):
            call()


class _Bare:
    """Stands for a trainer up to the line that reads a file."""

    device = torch.device("cpu")
    saved_model_file = ""


def test_quick_starts_loader_is_refused(tmp_path: Path, attack: Attack) -> None:
    """The module imports ray and is not imported here; guarded as any other once it is."""
    import types

    module = types.ModuleType("recbole.quick_start.quick_start")
    module.load_data_and_model = lambda model_file: torch.load(model_file)  # type: ignore[attr-defined]
    guards.guard(module)
    with pytest.raises(ConfigError, match=r"model_file: .*attack.pth.*recbole_cl.load"):
        module.load_data_and_model(attack.torch_file(tmp_path / "attack.pth"))


def test_downloads_are_not_made(tmp_path: Path, monkeypatch: Any) -> None:
    """A log that is not there is refused by name; RecBole would fetch an archive and unpack it where it likes."""
    import urllib.request

    def never(*args: Any, **kwargs: Any) -> None:
        pytest.fail("something was asked of the network")

    monkeypatch.setattr(urllib.request, "urlopen", never)
    monkeypatch.chdir(tmp_path)
    for name in ("ml-1m", "lastfm"):
        with pytest.raises(RecBoleCLError, match=f"dataset '{name}' was not found"):
            CLConfig("BPR", name, config_dict={"data_path": str(tmp_path)})
    config = CLConfig("BPR", "ml-100k")
    config["data_path"] = str(tmp_path / "gone")
    with pytest.raises(DataError, match="nothing is downloaded"):
        build_stream(config)


def test_own_code_evaluates_nothing() -> None:
    """The same reading of this package: what it calls of the kind, and why that runs nothing."""
    found = {
        (path.relative_to(PACKAGE).as_posix(), where, call)
        for path in PACKAGE.rglob("*.py")
        for where, call in calls(path.read_text(encoding="utf-8"))
    }
    assert found == OWN.keys()


def test_a_folder_of_a_sentence_encoder_names_no_classes_of_its_own(tmp_path: Path, attack: Attack) -> None:
    """Before version 6 sentence-transformers imports what ``modules.json`` names from the folder itself."""
    from recbole_cl.llm.encoders.sentence_transformers_folder import SentenceTransformersFolder

    (tmp_path / "evil.py").write_text(attack.code + "\nclass Evil:\n    pass\n", encoding="utf-8")
    encoder = SentenceTransformersFolder({"folder": str(tmp_path), "batch_size": 2}, 0)
    for told, words in (
        ('[{"idx": 0, "name": "0", "path": "", "type": "evil.Evil"}]', "names the class 'evil.Evil'"),
        ('[{"type": "os.system"}]', "names the class 'os.system'"),
        ("{", "is no list of modules"),
        ("[5]", "is no list of modules"),
    ):
        (tmp_path / "modules.json").write_text(told, encoding="utf-8")
        with pytest.raises(ConfigError, match=words):
            encoder.encode(["a"])
