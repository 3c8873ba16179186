"""What RecBole 1.2.1 needs to run on today's numpy, scipy and torch.

Each shim is one small function whose docstring names the RecBole line that breaks and the symptom. Those on numpy and
scipy are additive: they bring back a name that a newer version has dropped and never replace one that exists, so that
code beside RecBole sees its libraries unchanged. :func:`apply` runs them once, on ``import recbole_cl``, and with them
the guards over what RecBole would evaluate or unpickle (:mod:`recbole_cl.guards`).

``recbole.quick_start`` is never imported by this package: it imports ray, which does not start on this stack. RecBole's
config, data, trainer, evaluator, model and utils packages load without it.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from recbole_cl import guards
from recbole_cl.errors import ConfigError

_applied = False


def apply() -> None:
    """Applies every shim; a second call does nothing.

    Raises:
        ConfigError: If the installed pandas is one that RecBole computes wrong results with.
    """
    global _applied
    if _applied:
        return
    check_pandas()
    numpy_aliases()
    scipy_dok_update()
    silence_deprecations()
    guards.install()
    _applied = True


def check_pandas(installed: str | None = None) -> None:
    """Refuses pandas 3, on which RecBole does not fail but computes something else.

    ``recbole/data/dataset/dataset.py:648`` fills missing values with ``feat[field].fillna(inplace=True)``: on pandas 3
    this changes a copy, and the padding row holds -9223372036854775808. ``Series.agg(len)`` (``dataset.py:712``)
    returns a scalar there.

    Args:
        installed: The version to judge. Default: the installed one.

    Raises:
        ConfigError: If it is 3 or later.
    """
    if installed is None:
        try:
            installed = version("pandas")
        except PackageNotFoundError:
            return
    major = re.match(r"\d+", installed)
    if major is not None and int(major.group()) >= 3:
        raise ConfigError(
            f"pandas {installed} is installed, but RecBole 1.2.1 silently reads wrong data with pandas 3: "
            "install an older one with `pip install 'pandas<3'`"
        )


def numpy_aliases() -> None:
    """Brings back the numpy names that RecBole reads; only the missing ones.

    ``recbole/data/interaction.py:31`` (``np.float``: AttributeError on the first batch), ``evaluator/metrics.py:90,
    131,190`` (``np.float``), ``data/dataset/dataset.py:652`` (``np.float``), ``trainer/hyper_tuning.py:386``
    (``np.str``) and ``config/configurator.py:628-635`` (``np.float_``, ``np.complex_``, ``np.unicode_``: no RecBole
    ``Config`` can be made). ``np.bool`` and ``np.long`` exist in numpy 2 and are left alone.
    """
    import numpy as np

    aliases: dict[str, Any] = {
        "float": np.float64,
        "int": np.int_,
        "bool": np.bool_,
        "long": np.int_,
        "complex": np.complex128,
        "object": np.object_,
        "str": np.str_,
        "unicode": np.str_,
        "float_": np.float64,
        "complex_": np.complex128,
        "unicode_": np.str_,
    }
    for name, value in aliases.items():
        # Looked up in the module's dictionary: hasattr() would run numpy's warnings for names that were removed.
        if name not in np.__dict__:
            setattr(np, name, value)


def scipy_dok_update() -> None:
    """Brings back ``dok_matrix._update``, which scipy 1.13 removed.

    Graph models fill their adjacency matrix with it: ``recbole/model/general_recommender/lightgcn.py:111``, and NGCF,
    GCMC, SpectralCF, NCL, KGIN and MCCLK (AttributeError: '_update'). The keys are pairs of row and column that
    RecBole has already bounded, so nothing has to be checked, as in the method that was removed.
    """
    from scipy.sparse import dok_matrix

    if hasattr(dok_matrix, "_update"):
        return

    def _update(self: Any, data: dict[tuple[int, int], Any]) -> None:
        self._dict.update(data)

    dok_matrix._update = _update


def evaluator_counts() -> None:
    """Lets the metrics ItemCoverage, AveragePopularity, GiniIndex and TailPercentage be computed.

    ``recbole/evaluator/collector.py:226`` moves everything it has collected to the CPU, also the number of items and
    the counter of their interactions that these metrics need (AttributeError: 'int' object has no attribute 'cpu').
    The method runs on the tensors alone, and the rest is handed over beside it.

    Not part of :func:`apply`, since it has to import RecBole's evaluator and with it torch; :mod:`recbole_cl.config`
    calls it, without which no run starts. A second call does nothing.
    """
    from recbole.evaluator.collector import Collector

    original = Collector.get_data_struct
    if getattr(original, "_keeps_counts", False):
        return

    def get_data_struct(self: Any) -> Any:
        collected = self.data_struct._data_dict
        counts = {key: value for key, value in collected.items() if not hasattr(value, "cpu")}
        for key in counts:
            del collected[key]
        try:
            result = original(self)
        finally:
            collected.update(counts)
        result._data_dict.update(counts)
        return result

    get_data_struct._keeps_counts = True  # type: ignore[attr-defined]
    Collector.get_data_struct = get_data_struct


def anomaly_mode_off() -> None:
    """Turns off autograd's anomaly mode, which RecBole turns on for the whole process by importing one model.

    ``recbole/model/sequential_recommender/sine.py:25`` calls ``torch.autograd.set_detect_anomaly(True)`` when it is
    imported, and importing any sequential model imports them all: every backward pass then records and checks each
    operation, about three times slower. Called by :mod:`recbole_cl.config` once the model is imported; does nothing
    where that module is not loaded, so that a mode the caller chose for a model of his own stays.
    """
    import sys

    if "recbole.model.sequential_recommender.sine" in sys.modules:
        import torch

        torch.autograd.set_detect_anomaly(False)


def silence_deprecations() -> None:
    """Hides the warnings that RecBole's own lines provoke at every epoch and that its users cannot act on.

    Only these messages and only where RecBole's modules raise them: chained ``fillna(inplace=True)``
    (``data/dataset/dataset.py:501,648,650``) and ``Series.agg(len)`` (``:1217``), harmless below pandas 3;
    ``torch.cuda.amp.GradScaler`` (``trainer/trainer.py:235``); ``torch.sparse.FloatTensor``
    (``model/general_recommender/lightgcn.py:125``).
    """
    for message, category, module in (
        (r"A value is trying to be set on a copy", FutureWarning, r"recbole\.data\."),
        (r"using <built-in function len> in Series\.agg", FutureWarning, r"recbole\.data\."),
        (r"`torch\.cuda\.amp\.(GradScaler|autocast)", FutureWarning, r"recbole\.trainer\."),
        (r"torch\.sparse\.SparseTensor", UserWarning, r"recbole\.model\."),
    ):
        warnings.filterwarnings("ignore", message=message, category=category, module=module)


class NullWriter:
    """A TensorBoard writer that writes nothing."""

    def add_scalar(self, *args: Any, **kwargs: Any) -> None:
        """Drops a scalar."""

    def add_scalars(self, *args: Any, **kwargs: Any) -> None:
        """Drops scalars."""

    def add_hparams(self, *args: Any, **kwargs: Any) -> None:
        """Drops hyper-parameters."""

    def flush(self) -> None:
        """Has nothing to flush."""

    def close(self) -> None:
        """Has nothing to close."""


class NullWandbLogger:
    """Stands in for RecBole's WandbLogger and starts no wandb run."""

    log_wandb = False

    def __init__(self, config: Any = None) -> None:
        self.config = config

    def log_metrics(self, metrics: Any, head: str = "train", commit: bool = True) -> None:
        """Drops metrics."""

    def log_eval_metrics(self, metrics: Any, head: str = "eval") -> None:
        """Drops metrics."""


@contextlib.contextmanager
def without_side_effects() -> Iterator[None]:
    """A context in which a RecBole trainer is constructed without touching the disk or the network.

    ``recbole/trainer/trainer.py:115,131`` make a folder ``log_tensorboard`` and a folder ``checkpoint_dir`` in the
    working directory for every trainer, and line 116 may start a wandb run. A stream makes a trainer a stage, and a
    run writes only into its own ``output_dir``. The three names are globals of that module, looked up when called;
    they are put back on the way out. The trainer keeps the null writer it was made with. Not for several threads.

    Yields:
        None.
    """
    from recbole.trainer import trainer as module

    replaced = {
        "get_tensorboard": lambda logger: NullWriter(),
        "ensure_dir": lambda path: None,
        "WandbLogger": NullWandbLogger,
    }
    before = {name: getattr(module, name) for name in replaced}
    for name, value in replaced.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
