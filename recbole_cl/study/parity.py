"""``parity: recbole``: a run of one stage that draws and computes what RecBole itself would, bit for bit.

A stream of one stage under FineTune is RecBole's own training: the same rows in the same order, RecBole's samplers and
loaders, the same random states. Under ``parity: recbole`` nothing of ours stands between, so the loss of every batch
has the bits of RecBole's (same machine, same thread count), when RecBole is given the log sorted by time.
:func:`compare` runs both and lays them side by side.

This is a check, not a way to run a stream: RecBole's sampler knows the positives of the future, its ranking has every
item as a candidate.

Models that draw while they are evaluated (BERT4Rec's masks, KTUP, MacridVAE) agree up to RecBole's first validation,
which moves the random state that its training goes on from; here evaluation is pure. With ``eval_step: 0`` their losses
agree to the end.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from recbole_cl.errors import ConfigError


class _Tape:
    """Losses by epoch and batch, validation by epoch.

    Attributes:
        losses: The loss of each batch of each epoch; a tuple where the model returns several.
        valid: The result of each validation.
    """

    def __init__(self) -> None:
        self.losses: list[list[Any]] = []
        self.valid: list[dict[str, float]] = []

    def listen(self, model: Any) -> None:
        """Records every loss that a model returns from now on."""
        for name in ("calculate_loss", "calculate_kg_loss"):
            function = getattr(model, name, None)
            if function is not None:
                setattr(model, name, self._recorded(function))

    def _recorded(self, function: Any) -> Any:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            loss = function(*args, **kwargs)
            parts = tuple(p.item() for p in loss) if isinstance(loss, tuple) else loss.item()
            self.losses[-1].append(parts)
            return loss

        return recorded


def compare(config: Any) -> dict[str, Any]:
    """Runs RecBole and RecBole-CL on the same log, split and seed.

    Args:
        config: A configuration with ``parity: recbole``. Its run goes to ``output_dir``, or nowhere.

    Returns:
        ``recbole`` and ``recbole_cl``, each with ``losses`` (by epoch and batch), ``valid`` (by epoch),
        ``best_valid_result`` and ``test_result``; ``batches``; ``equal_losses``, whether all losses have the same
        bits; ``first_difference`` as (epoch, batch) or ``None``; ``largest_metric_gap``.

    Raises:
        ConfigError: If ``parity`` is not set, or RecBole does not have the model.
    """
    from recbole_cl.config.models import recbole_models

    if config["parity"] != "recbole":
        raise ConfigError("property 'parity' is not set; a comparison with RecBole needs parity: recbole")
    if config["resume"]:
        raise ConfigError("property 'resume' is True; a comparison with RecBole runs from the start, leave it out")
    if config["model"].lower() not in recbole_models():
        raise ConfigError(f"model {config['model']!r} is none of RecBole's, so there is nothing to compare it with")
    wanted = _recbole_properties(config)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write_sorted(config, folder / "data")
        theirs = _run_recbole(config, wanted, folder)
        ours = _run_ours(config, folder / "run")
    first = _first_difference(theirs["losses"], ours["losses"])
    pairs = [
        *zip(theirs["valid"], ours["valid"], strict=False),
        (theirs["test_result"], ours["test_result"]),
    ]
    gaps = [abs(a[key] - b[key]) for a, b in pairs for key in a if key in b]
    return {
        "model": config["model"],
        "dataset": config["dataset"],
        "seed": config["seed"],
        "batches": sum(map(len, theirs["losses"])),
        "equal_losses": first is None,
        "first_difference": first,
        "largest_metric_gap": max(gaps, default=0.0),
        "recbole": theirs,
        "recbole_cl": ours,
    }


def _first_difference(a: list[list[Any]], b: list[list[Any]]) -> tuple[int, int] | None:
    for epoch in range(max(len(a), len(b))):
        x, y = (losses[epoch] if epoch < len(losses) else [] for losses in (a, b))
        for batch in range(max(len(x), len(y))):
            if x[batch : batch + 1] != y[batch : batch + 1]:
                return epoch, batch
    return None


_NOT_HANDED_OVER = frozenset(
    {
        "model", "dataset", "data_path", "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "device", "single_spec",
        "local_rank", "valid_neg_sample_args", "test_neg_sample_args", "valid_metric_bigger", "checkpoint_dir",
        "save_dataset", "save_dataloaders", "dataset_save_path", "dataloaders_save_path", "log_wandb", "show_progress",
    }
)  # fmt: skip


def _recbole_properties(config: Any) -> dict[str, Any]:
    """Returns the effective properties as RecBole's own ``Config`` takes them."""
    wanted = {
        key: copy.deepcopy(value) for key, value in config.final_config_dict.items() if key not in _NOT_HANDED_OVER
    }
    if (wanted.get("train_neg_sample_args") or {}).get("distribution") == "none":
        wanted["train_neg_sample_args"] = None  # RecBole refuses its own word for it where the loss is CE
    if config["device"].type == "cpu":
        wanted["gpu_id"], wanted["use_gpu"] = "", False
    wanted.update(log_wandb=False, show_progress=False)
    return wanted


def _write_sorted(config: Any, folder: Path) -> None:
    """Copies the dataset's files; the interactions in the order of their timestamps, ties as in the file."""
    source, name = Path(config["data_path"]), config["dataset"]
    folder.mkdir(parents=True)
    for file in source.glob(f"{name}.*"):
        if file.suffix != ".inter" and file.is_file():
            shutil.copy(file, folder / file.name)
    encoding, separator = config["encoding"] or "utf-8", config["field_separator"]
    text = (source / f"{name}.inter").read_text(encoding=encoding)
    header, *lines = [line for line in text.split("\n") if line.strip()]
    column = [field.partition(":")[0] for field in header.rstrip("\r").split(separator)].index(config["TIME_FIELD"])
    try:
        time = np.array([float(line.rstrip("\r").split(separator)[column]) for line in lines])
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"TIME_FIELD: {name}.inter has a line without a number in the column {config['TIME_FIELD']!r}, so RecBole "
            f"cannot be given the log sorted by time"
        ) from error
    order = np.argsort(time, kind="stable")
    (folder / f"{name}.inter").write_text("\n".join([header, *(lines[i] for i in order)]) + "\n", encoding=encoding)


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """A context in which RecBole's ``Config`` is made without traces.

    It reads ``sys.argv``, sets CUDA_VISIBLE_DEVICES, and grows a list of arguments and PyYAML's loader.
    """
    from recbole.utils import argument_list

    argv, sys.argv = sys.argv, sys.argv[:1] or [""]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = list(argument_list.dataset_arguments)
    resolvers = vars(yaml.FullLoader).get("yaml_implicit_resolvers")
    kept = None if resolvers is None else {key: list(value) for key, value in resolvers.items()}
    try:
        yield
    finally:
        sys.argv = argv
        if visible is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        argument_list.dataset_arguments[:] = names
        if kept is not None:
            yaml.FullLoader.yaml_implicit_resolvers = kept
        elif "yaml_implicit_resolvers" in vars(yaml.FullLoader):
            del yaml.FullLoader.yaml_implicit_resolvers


def _run_recbole(config: Any, wanted: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Does what RecBole's ``run_recbole`` does (which cannot be imported: it starts ray), and listens.

    The best model is kept in memory instead of a file that today's torch refuses to read.
    """
    from recbole.config import Config
    from recbole.data.utils import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    from recbole_cl import compat
    from recbole_cl.rng import ModelRandomness
    from recbole_cl.stream.reader import fast_reader

    tape = _Tape()
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    try:
        with ModelRandomness(0).owned(), compat.without_side_effects():
            with _contained():
                own = Config(model=config["model"], dataset=config["dataset"], config_dict=wanted)
            # RecBole evaluates text, so "[5,10]" became a list; and it looks for ml-100k in its own folder.
            own.final_config_dict.update({key: value for key, value in wanted.items() if isinstance(value, str)})
            own["data_path"], own["checkpoint_dir"] = str(folder / "data"), str(folder / "saved")
            (folder / "saved").mkdir()
            init_seed(own["seed"], own["reproducibility"])
            with fast_reader():
                dataset = create_dataset(own)
            train, valid, test = data_preparation(own, dataset)
            init_seed(own["seed"] + own["local_rank"], own["reproducibility"])
            model = get_model(own["model"])(own, train._dataset).to(own["device"])
            compat.anomaly_mode_off()
            trainer = get_trainer(own["MODEL_TYPE"], own["model"])(own, model)
            tape.listen(model)
            best: dict[str, Any] = {}

            def keep(epoch: int, verbose: bool = True, **_: Any) -> None:
                best["state"] = copy.deepcopy(model.state_dict())
                best["other"] = copy.deepcopy(model.other_parameter())

            trainer._save_checkpoint = keep
            _listen_to(trainer, tape)
            _, best_result = trainer.fit(train, valid, verbose=False, saved=True, show_progress=False)
            if not best:
                raise ConfigError(
                    f"model {config['model']!r}: RecBole trains it in phases of its own (pre-training) that have no "
                    f"counterpart here; compare another model"
                )
            model.load_state_dict(best["state"])
            model.load_other_parameter(best["other"])
            tested = trainer.evaluate(test, load_best_model=False, show_progress=False)
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = flags
    return {
        "losses": tape.losses,
        "valid": tape.valid,
        "best_valid_result": {key: float(value) for key, value in (best_result or {}).items()},
        "test_result": {key: float(value) for key, value in (tested or {}).items()},
    }


def _listen_to(trainer: Any, tape: _Tape) -> None:
    train_epoch, valid_epoch = trainer._train_epoch, trainer._valid_epoch

    def trained(*args: Any, **kwargs: Any) -> Any:
        tape.losses.append([])
        return train_epoch(*args, **kwargs)

    def validated(*args: Any, **kwargs: Any) -> Any:
        score, result = valid_epoch(*args, **kwargs)
        tape.valid.append({key: float(value) for key, value in result.items()})
        return score, result

    trainer._train_epoch, trainer._valid_epoch = trained, validated


def _run_ours(config: Any, folder: Path) -> dict[str, Any]:
    from recbole_cl.training.runner import Runner

    tape = _Tape()

    class Listening(Runner):
        def build_model(self, view: Any, randomness: Any) -> Any:
            model = super().build_model(view, randomness)
            tape.listen(model)
            tape.losses.append([])
            self.journal.listeners = [self._note]
            return model

        @staticmethod
        def _note(point: dict[str, Any]) -> None:
            if point["valid"] is not None:
                tape.valid.append(dict(point["valid"]))
            tape.losses.append([])

    asked, saved = config["output_dir"], config["saved"]
    if not asked:
        config["output_dir"] = str(folder)
        config["saved"] = False
    try:
        runner = Listening(config)
        runner.run()
    finally:
        config["output_dir"], config["saved"] = asked, saved
    best = [point["valid"] for point in runner.journal.curves if point["best"]]
    tested = runner.records.select(t=0, s=0, stratum="all")
    return {
        "losses": tape.losses[:-1],
        "valid": tape.valid,
        "best_valid_result": dict(best[-1]) if best else {},
        "test_result": {record.metric: record.value for record in tested if record.metric != "primary"},
    }


def comparison_table(found: Mapping[str, Any]) -> str:
    """Returns what :func:`compare` has found as text: a line an epoch and metric, RecBole left, RecBole-CL right."""
    theirs, ours = found["recbole"], found["recbole_cl"]
    rows: list[tuple[str, str, str, str]] = [("", "RecBole", "RecBole-CL", "same")]
    for epoch in range(max(len(theirs["losses"]), len(ours["losses"]))):
        a, b = (side["losses"][epoch] if epoch < len(side["losses"]) else [] for side in (theirs, ours))
        rows.append((f"epoch {epoch} loss", _total(a), _total(b), "bits" if a == b else "NO"))
        for x, y in zip(theirs["valid"][epoch : epoch + 1], ours["valid"][epoch : epoch + 1], strict=False):
            rows += _metric_rows(f"epoch {epoch} valid", x, y)
    rows += _metric_rows("test", theirs["test_result"], ours["test_result"])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]:<{widths[3]}}".rstrip()
        for row in rows
    ]
    batches = found["batches"]
    if found["equal_losses"]:
        verdict = f"the losses of all {batches} batches have the same bits"
    else:
        epoch, batch = found["first_difference"]
        verdict = f"losses differ from epoch {epoch}, batch {batch} on"
    title = f"{found['model']} on {found['dataset']}, seed {found['seed']}: {verdict}; metrics differ by at most "
    return "\n".join([title + f"{found['largest_metric_gap']:.2g}", "", *lines])


def _total(losses: list[Any]) -> str:
    if not losses:
        return "-"
    total = sum(sum(loss) if isinstance(loss, tuple) else loss for loss in losses)
    return f"{total:.10g}"


def _metric_rows(label: str, a: Mapping[str, float], b: Mapping[str, float]) -> list[tuple[str, str, str, str]]:
    return [
        (
            f"{label} {key}",
            f"{a[key]:.10f}",
            f"{b[key]:.10f}" if key in b else "-",
            "yes" if key in b and abs(a[key] - b[key]) <= 1e-9 else "NO",
        )
        for key in a
    ]
