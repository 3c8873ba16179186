"""Each shim against the error that it cures, in a fresh interpreter with and without it."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from recbole_cl import compat
from recbole_cl.errors import ConfigError

ROOT = Path(compat.__file__).resolve().parent.parent
# The module is loaded by its path: `import recbole_cl` would apply every shim.
LOAD = """
import importlib.util, sys
sys.path.insert(0, {root!r})
import types
package = types.ModuleType("recbole_cl"); package.__path__ = [{package!r}]
sys.modules["recbole_cl"] = package
from recbole_cl import compat
"""


def run(code: str, *shims: str, cwd: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter in which only the named shims have been applied."""
    head = LOAD.format(root=str(ROOT), package=str(ROOT / "recbole_cl"))
    head += "".join(f"compat.{shim}()\n" for shim in shims)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *flags, "-c", head + code], capture_output=True, text=True, env=env, cwd=cwd, check=False
    )


DATASET = """
sys.argv = ["x"]
from recbole.config import Config
from recbole.data.dataset import Dataset
class Plain(Config):
    def compatibility_settings(self): pass
config = Plain(model="BPR", dataset="ml-100k", config_dict={"use_gpu": False})
data = Dataset(config).build()[0]
print("built")
"""
CASES = [
    # (shim, shims that are needed as well, code, what is raised without it)
    (
        "numpy_aliases",
        (),
        "from recbole.config import Config; sys.argv = ['x']; Config(model='BPR', dataset='ml-100k')",
        "np.float_",
    ),
    (
        "numpy_aliases",
        (),
        "from recbole.data.interaction import Interaction; import numpy; Interaction({'a': numpy.ones(2)})",
        "no attribute 'float'",
    ),
    (
        "scipy_dok_update",
        (),
        "import scipy.sparse as s; m = s.dok_matrix((2, 2)); m._update({(0, 1): 1}); assert m.toarray()[0, 1] == 1",
        "_update",
    ),
    (
        "evaluator_counts",
        ("numpy_aliases",),
        "from recbole.evaluator.collector import Collector, DataStruct\n"
        "c = Collector.__new__(Collector); c.data_struct = DataStruct(); c.data_struct.set('data.num_items', 3)\n"
        "assert c.get_data_struct().get('data.num_items') == 3 and c.data_struct.get('data.num_items') == 3",
        "no attribute 'cpu'",
    ),
    (
        "silence_deprecations",
        ("numpy_aliases",),
        "import warnings\n" + DATASET,
        "chained assignment",
    ),
]


@pytest.mark.parametrize(("shim", "others", "code", "symptom"), CASES, ids=[f"{case[0]}: {case[3]}" for case in CASES])
def test_recbole_fails_without_the_shim_and_works_with_it(
    shim: str, others: tuple[str, ...], code: str, symptom: str, tmp_path: Path
) -> None:
    flags = ("-W", "error::FutureWarning") if shim == "silence_deprecations" else ()
    without = run(code, *others, cwd=tmp_path, flags=flags)
    assert without.returncode != 0
    assert symptom in without.stderr
    done = run(code, *others, shim, cwd=tmp_path, flags=flags)
    assert done.returncode == 0, done.stderr


def test_lightgcn_and_the_counting_metrics_run_with_the_shims(tmp_path: Path) -> None:
    """The whole of RecBole's way, an epoch and an evaluation, on the shims alone; any FutureWarning is an error."""
    code = """
sys.argv = ["x"]
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.trainer import Trainer
from recbole.model.general_recommender import LightGCN
(open("tiny.inter", "w")).write("user_id:token\\titem_id:token\\ttimestamp:float\\n"
    + "".join(f"u{i % 9}\\ti{i * 7 % 101}\\t{i}\\n" for i in range(300)))
import os; os.mkdir("tiny"); os.rename("tiny.inter", "tiny/tiny.inter")
config = Config(model="LightGCN", dataset="tiny", config_dict={
    "use_gpu": False, "data_path": ".", "epochs": 1, "show_progress": False,
    "metrics": ["Recall", "ItemCoverage", "AveragePopularity", "GiniIndex", "TailPercentage", "ShannonEntropy"],
    "valid_metric": "Recall@10"})
train, valid, test = data_preparation(config, create_dataset(config))
with compat.without_side_effects():
    trainer = Trainer(config, LightGCN(config, train.dataset))
trainer.fit(train, None, verbose=False, saved=False, show_progress=False)
trainer.eval_collector.data_collect(train)
print(dict(trainer.evaluate(test, load_best_model=False)))
assert "ray" not in sys.modules and "recbole.quick_start" not in sys.modules
assert sorted(os.listdir(".")) == ["tiny"], os.listdir(".")
"""
    done = run(code, "apply", "evaluator_counts", cwd=tmp_path, flags=("-W", "error::FutureWarning"))
    assert done.returncode == 0, done.stderr
    assert "itemcoverage@10" in done.stdout


def test_apply_twice_changes_nothing() -> None:
    import numpy as np
    from scipy.sparse import dok_matrix

    before = (np.float, dok_matrix._update, list(warnings.filters))  # type: ignore[attr-defined]
    compat.apply()
    assert before == (np.float, dok_matrix._update, list(warnings.filters))  # type: ignore[attr-defined]


def test_aliases_that_numpy_has_are_left_alone() -> None:
    import numpy as np

    assert np.bool is np.bool_
    assert np.dtype(np.long) == np.dtype("long")


@pytest.mark.parametrize("installed", ["3.0.0", "3.1.2", "4.0.0rc1"])
def test_pandas_3_is_refused_with_a_remedy(installed: str) -> None:
    with pytest.raises(ConfigError, match=r"pandas<3"):
        compat.check_pandas(installed)


def test_pandas_2_is_accepted() -> None:
    compat.check_pandas("2.3.3")
    compat.check_pandas()


def test_a_trainer_is_constructed_without_files_or_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from recbole.trainer import trainer as module

    from recbole_cl.config import CLConfig

    monkeypatch.chdir(tmp_path)
    config = CLConfig("BPR", "ml-100k")
    config["log_wandb"] = True
    globals_before = (module.get_tensorboard, module.ensure_dir, module.WandbLogger)
    with compat.without_side_effects():
        trainer = module.Trainer(config, torch.nn.Linear(2, 2))
    trainer.tensorboard.add_scalar("a", 1.0, 0)
    trainer.tensorboard.add_hparams({}, {})
    trainer.tensorboard.flush()
    trainer.tensorboard.close()
    trainer.wandblogger.log_metrics({"a": 1.0})
    assert list(tmp_path.iterdir()) == []
    assert (module.get_tensorboard, module.ensure_dir, module.WandbLogger) == globals_before

    with pytest.raises(KeyError), compat.without_side_effects():
        raise KeyError
    assert (module.get_tensorboard, module.ensure_dir, module.WandbLogger) == globals_before


def test_the_package_is_light_to_import(tmp_path: Path) -> None:
    code = "import sys, recbole_cl; assert 'torch' not in sys.modules; assert recbole_cl.__version__"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_anomaly_mode_that_recbole_turns_on_is_turned_off(tmp_path: Path) -> None:
    code = (
        "import recbole_cl, torch\n"
        "import recbole.model.sequential_recommender\n"
        "assert torch.is_anomaly_enabled(), 'RecBole no longer turns it on: the shim can go'\n"
        "from recbole_cl.config import CLConfig\n"
        "CLConfig('SASRec', 'ml-100k')\n"
        "assert not torch.is_anomaly_enabled()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
