"""What becomes of each of RecBole's documented properties in a stream: the one table of answers.

RecBole reads its properties in its quick start, its data preparation and its trainers' ``fit``, some of which a stream
replaces. A property that nothing here reads is either refused, where who sets it would wait for something that never
comes, or kept with a warning, where it says how fast or how wordy RecBole is. ``docs/properties.md`` has the table.
What becomes of one property stands here and nowhere else, which is why this file is long.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recbole.evaluator import smaller_metrics
from recbole.utils import ModelType

from recbole_cl.config.files import RECBOLE
from recbole_cl.config.metrics import own_metrics
from recbole_cl.config.models import configured_classes, reads
from recbole_cl.config.values import read_properties
from recbole_cl.errors import ConfigError

WORKS, REFUSED, UNREAD = "works", "refused", "nothing reads it"


@dataclass(frozen=True)
class Answer:
    """What becomes of one property.

    Attributes:
        kind: :data:`WORKS`; :data:`REFUSED` or, with a warning, :data:`UNREAD` where it is not the default.
        note: The reason and the remedy, or what is particular about it here.
        default: Values beside RecBole's default that ask for nothing.
        example: A value that is refused or warned of.
    """

    kind: str = WORKS
    note: str = ""
    default: tuple[Any, ...] = ()
    example: Any = None


def _refused(reason: str, example: Any, *default: Any) -> Answer:
    return Answer(REFUSED, reason, default, example)


def _unread(reason: str, example: Any, *default: Any) -> Answer:
    return Answer(UNREAD, reason, default, example)


_TORCHRUN = "several processes are started by torchrun, which says who each of them is; leave it out"
_STORE = "a run keeps what it was trained over in its own folder; leave it out"
_SPLIT = (
    "`mode` works. `split`, `order` and `group_by` do not cut stages: `stage_split`, `stage_ratios` and `n_stages` do, "
    "by time. They are refused where they say something else than the stream does"
)

ANSWERS: dict[str, dict[str, Answer]] = {
    "Environment": {
        "gpu_id": Answer(),
        "use_gpu": Answer(),
        "worker": _unread("batches are made as whole arrays in the training process; leave it out", 4),
        "seed": Answer(),
        "state": Answer(),
        "encoding": Answer(),
        "reproducibility": Answer(note="every run has bits of its own seed; this sets cuDNN's part"),
        "data_path": Answer(note="the folder that holds the dataset's folder, or that folder"),
        "checkpoint_dir": _refused(
            "checkpoints lie in the run's folder; set output_dir", "mine", "saved", "saved/", "./saved", "./saved/"
        ),
        "show_progress": Answer(),
        "save_dataset": _refused(_STORE, True, False),
        "dataset_save_path": _refused(_STORE, "saved/toy.pth"),
        "save_dataloaders": _refused(_STORE, True, False),
        "dataloaders_save_path": _refused(_STORE, "saved/toy-loaders.pth"),
        "log_wandb": _refused(
            "nothing is sent anywhere: curves and results are in result.json, records.csv and report.html; leave it "
            "out",
            True,
            False,
        ),
        "wandb_project": _unread("nothing is sent anywhere; leave it out", "mine"),
        "shuffle": Answer(note="of the training targets, from the run's own generator"),
        "config_file": _refused("files of properties are named by config_files", "mine.yaml"),
        "nproc": _refused(_TORCHRUN, 2, 1),
        "world_size": _refused(_TORCHRUN, 2, 1, -1),
        "ip": _refused(_TORCHRUN, "10.0.0.1", "localhost"),
        "port": _refused(_TORCHRUN, 5679, "5678", 5678),
        "offset": _refused(_TORCHRUN, 1, 0),
        "local_rank": _refused(_TORCHRUN, 1, 0),
        "single_spec": _refused(_TORCHRUN, False, True),
    },
    "Data": {
        "field_separator": Answer(),
        "seq_separator": Answer(),
        "USER_ID_FIELD": Answer(),
        "ITEM_ID_FIELD": Answer(),
        "RATING_FIELD": Answer(note="loaded where `load_col` is not set; DMF learns from it"),
        "TIME_FIELD": Answer(note="a stream needs it"),
        "seq_len": Answer(note="a column of it must be loaded"),
        "LABEL_FIELD": Answer(
            note="read where labels are learnt (context-aware models, without sampled negatives) or judged (`mode: "
            "labeled`); elsewhere a warning tells how many rows of label 0 are taken for positives"
        ),
        "threshold": Answer(
            note="as LABEL_FIELD; refused where nothing reads the labels: `val_interval: {rating: '[4,inf)'}` leaves "
            "out what was not liked"
        ),
        "NEG_PREFIX": Answer(),
        "numerical_features": Answer(note="a column of it must be loaded"),
        "load_col": Answer(note="the columns that a stream needs are added"),
        "unload_col": Answer(note="with `load_col: ~`, as in RecBole; not the columns that a stream needs"),
        "unused_col": Answer(note="not the columns that a stream needs"),
        "additional_feat_suffix": Answer(),
        "rm_dup_inter": Answer(note="over the whole log, with the number of rows told"),
        "val_interval": Answer(note="over the whole log, with the number of rows told; its columns are loaded"),
        "filter_inter_by_user_or_item": Answer(note="with the number of rows told"),
        "user_inter_num_interval": Answer(note="counted over the whole log, with the number of rows told"),
        "item_inter_num_interval": Answer(note="counted over the whole log, with the number of rows told"),
        "alias_of_user_id": Answer(note="with `vocabulary: global`: such a column may name users of the future"),
        "alias_of_item_id": Answer(note="with `vocabulary: global`: such a column may name items of the future"),
        "alias_of_entity_id": Answer(note="models with a knowledge graph"),
        "alias_of_relation_id": Answer(note="models with a knowledge graph"),
        "preload_weight": Answer(note="models that read it: KSR, GRU4RecKG; refused for the others"),
        "normalize_field": Answer(note="by minimum and maximum of the first stage; later values may lie outside"),
        "normalize_all": Answer(note="as normalize_field"),
        "discretization": Answer(note="the bounds of ED are computed over the whole log, which a warning says"),
        "ITEM_LIST_LENGTH_FIELD": Answer(note="not the name of a column"),
        "LIST_SUFFIX": Answer(),
        "MAX_ITEM_LIST_LENGTH": Answer(),
        "POSITION_FIELD": _unread("no model of RecBole reads it; leave it out", "place"),
        "HEAD_ENTITY_ID_FIELD": Answer(),
        "TAIL_ENTITY_ID_FIELD": Answer(),
        "RELATION_ID_FIELD": Answer(),
        "ENTITY_ID_FIELD": Answer(),
        "kg_reverse_r": Answer(note="models with a knowledge graph"),
        "entity_kg_num_interval": Answer(note="models with a knowledge graph"),
        "relation_kg_num_interval": Answer(note="models with a knowledge graph"),
        "benchmark_filename": _refused("stages are cut from one file; join the files and leave it out", ["a", "b"], []),
    },
    "Training": {
        "epochs": Answer(note="at most so many in each stage"),
        "train_batch_size": Answer(),
        "learner": Answer(note="an unknown name is refused; RecBole takes Adam"),
        "learning_rate": Answer(),
        "train_neg_sample_args": Answer(note="drawn from what is known by then, never from the future"),
        "eval_step": Answer(note="0 never validates"),
        "stopping_step": Answer(),
        "clip_grad_norm": Answer(),
        "weight_decay": Answer(),
        "loss_decimal_place": _unread("losses are kept with all their digits; leave it out", 2),
        "require_pow": Answer(note="models that read it: LightGCN, SimpleX; refused for the others"),
        "enable_amp": Answer(),
        "enable_scaler": Answer(),
        "transform": Answer(
            note="sequential models that train on their last position (`train_positions: last`); `user_defined` is "
            "refused: a model's `collate` adds columns to its batches"
        ),
    },
    "Evaluation": {
        "eval_args": Answer(note=_SPLIT),
        "repeatable": Answer(note="`auto`: sequential models may recommend an earlier item again"),
        "metrics": Answer(),
        "topk": Answer(),
        "valid_metric": Answer(),
        "valid_metric_bigger": Answer(note="follows from valid_metric; refused where it says otherwise"),
        "eval_batch_size": Answer(),
        "metric_decimal_place": Answer(note="12 and more rounds nothing"),
    },
}
"""Every property of RecBole's pages on its configuration, by page."""

FORMER: dict[str, str] = {
    "neg_sampling": "train_neg_sample_args: {distribution: uniform, sample_num: 1}",
    "training_neg_sample_num": "train_neg_sample_args: {distribution: uniform, sample_num: 1}",
    "training_neg_sample_distribution": "train_neg_sample_args: {distribution: popularity, sample_num: 1}",
    "eval_setting": "eval_args: {mode: full}, with stage_split and stage_ratios for the split",
    "split_ratio": "stage_ratios: [0.8, 0.1, 0.1]",
    "leave_one_num": "stage_split: leave_one_out",
    "group_by_user": "stage_split: user_tail",
    "real_time_process": "nothing, for it has no counterpart",
    "min_user_inter_num": "user_inter_num_interval: '[5,inf)'",
    "max_user_inter_num": "user_inter_num_interval: '[0,50]'",
    "min_item_inter_num": "item_inter_num_interval: '[5,inf)'",
    "max_item_inter_num": "item_inter_num_interval: '[0,50]'",
    "lowest_val": "val_interval: {rating: '[3,inf)'}",
    "highest_val": "val_interval: {rating: '(-inf,3]'}",
    "equal_val": "val_interval: {rating: '[3,3]'}",
    "not_equal_val": "val_interval: {rating: '(-inf,3);(3,inf)'}",
    "fields_in_same_space": "alias_of_item_id",
}
"""Properties of earlier versions of RecBole, which 1.2.1 passes over, and what says the same today."""


def answer_of(key: str) -> Answer | None:
    """Returns the answer of a property, ``None`` for one that RecBole does not document."""
    return next((answers[key] for answers in ANSWERS.values() if key in answers), None)


@functools.lru_cache(maxsize=1)
def defaults_of_recbole() -> Mapping[str, Any]:
    """Returns RecBole's general defaults."""
    files = (RECBOLE / "properties" / "overall.yaml", RECBOLE / "properties" / "dataset" / "sample.yaml")
    return {key: value for file in files for key, value in read_properties(file).items()}


def check_recbole(asked: Mapping[str, Any]) -> list[str]:
    """Refuses what would have no effect, or warns of it.

    Args:
        asked: Properties that were given.

    Returns:
        Warnings: properties without an effect on any result.

    Raises:
        ConfigError: If a property asks for what a stream does not do; the message has the remedy.
    """
    warnings, defaults = [], defaults_of_recbole()
    for key, value in asked.items():
        if key in FORMER:
            raise ConfigError(f"property {key!r} is of an earlier RecBole, and nothing reads it; use {FORMER[key]}")
        answer = answer_of(key)
        if answer is None or answer.kind == WORKS or value is None or value in (defaults.get(key), *answer.default):
            continue
        if answer.kind == REFUSED:
            raise ConfigError(f"property {key!r} is {value!r}, which nothing here reads: {answer.note}")
        warnings.append(f"property {key!r} has no effect: {answer.note}")
    return warnings


_GRAPH = (
    "kg_reverse_r",
    "entity_kg_num_interval",
    "relation_kg_num_interval",
    "alias_of_entity_id",
    "alias_of_relation_id",
)
_READERS = {"preload_weight": "get_preload_weight", "require_pow": "require_pow"}
"""Properties that few models read, and what their sources then hold."""


def check_for_model(final: Mapping[str, Any], asked: Mapping[str, Any], classes: Sequence[type]) -> list[str]:
    """Refuses properties that have no effect on this run's model, or warns of them.

    Args:
        final: The effective properties.
        asked: Properties that were given.
        classes: The model's class, and that of the model inside it.

    Returns:
        Warnings: settings of a knowledge graph where the model has none.

    Raises:
        ConfigError: If one has no effect.
    """
    model, defaults = classes[0].__name__, defaults_of_recbole()
    given = {key for key, value in asked.items() if value and value != defaults.get(key)}
    sources = list(_sources(classes))
    for key in _READERS.keys() & given:
        if not any(source is None or _READERS[key] in source for source in sources):
            raise ConfigError(f"property {key!r} is {asked[key]!r}, which model {model!r} does not read; leave it out")
    for key in ("alias_of_user_id", "alias_of_item_id"):
        if key in given and final["vocabulary"] == "growing":
            raise ConfigError(
                f"property {key!r} is {asked[key]!r}, whose values may be users or items of later stages, for which a "
                f"growing vocabulary has no rows yet; set vocabulary: global, or leave it out"
            )
    if "valid_metric_bigger" in asked:
        _check_direction(final, asked["valid_metric_bigger"], classes[0])
    _check_labels(final, asked, model, classes)
    _check_split(final, asked)
    _check_transform(final, asked, model, classes)
    if final["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        return []
    return [f"property {key!r} has no effect: {model} reads no knowledge graph" for key in _GRAPH if key in given]


def _check_direction(final: Mapping[str, Any], given: Any, model_class: type) -> None:
    name = str(final["valid_metric"]).lower()
    bigger = own_metrics(model_class).get(name, name.partition("@")[0] not in smaller_metrics)
    if given is not bigger:
        raise ConfigError(
            f"property 'valid_metric_bigger' is {given!r}, but it follows from valid_metric {final['valid_metric']!r}, "
            f"of which {'more' if bigger else 'less'} is better; leave it out"
        )


def _sources(classes: Iterable[type]) -> Iterator[str | None]:
    """Yields the sources of classes and of those that they derive from; ``None`` for one of another package."""
    for cls in (base for given in classes for base in given.__mro__):
        room = cls.__module__.partition(".")[0]
        if room in ("recbole", "recbole_cl"):
            yield inspect.getsource(cls)
        elif room not in ("torch", "builtins", "typing", "abc"):
            yield None


def labels_are_idle(final: Mapping[str, Any], classes: Sequence[type]) -> bool:
    """Tells whether training takes every interaction for a positive, whatever its label says.

    So it is with sampled negatives, which bring the labels, and with losses of RecBole's or ours that read none. A loss
    of another package may read and mean what it likes.

    Args:
        final: The effective properties.
        classes: The model's class, and that of the model inside it.
    """
    negatives = final["train_neg_sample_args"]
    if negatives not in (None, "None") and negatives.get("distribution", "uniform") not in (None, "None", "none"):
        return True
    for cls in (base for given in classes for base in given.__mro__ if "calculate_loss" in vars(base)):
        if cls.__module__.partition(".")[0] not in ("recbole", "recbole_cl"):
            return False
    return not any(reads(cls, "LABEL") for cls in classes)


def labels_are_learnt(config: Any) -> bool:
    """Tells whether the configured model, or the one inside it, learns from the labels of the log."""
    sampled = config["train_neg_sample_args"]["distribution"] != "none"
    return not sampled and any(reads(cls, "LABEL") for cls in configured_classes(config))


def _check_labels(final: Mapping[str, Any], asked: Mapping[str, Any], model: str, classes: Sequence[type]) -> None:
    """Refuses a threshold that makes labels which nobody reads."""
    modes = final["eval_args"].get("mode", "full")
    judged = "labeled" in (modes.values() if isinstance(modes, Mapping) else (modes,))
    if not asked.get("threshold") or judged or not labels_are_idle(final, classes):
        return
    [(column, least)] = asked["threshold"].items()
    why = "takes every interaction for a positive" + (
        ""
        if not any(reads(cls, "LABEL") for cls in classes)
        else (" where negatives are sampled (train_neg_sample_args)")
    )
    raise ConfigError(
        f"property 'threshold' is {asked['threshold']!r}, which has no effect: {model} {why}; leave it out, and set "
        f"val_interval: {{{column}: '[{least},inf)'}} to train and test on what was liked only"
    )


def _check_split(final: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuses a split of ``eval_args`` that is not the stream's; RecBole's defaults ask for nothing."""
    given = asked.get("eval_args") or {}
    split, how, ratios = given.get("split"), final["stage_split"], list(final["stage_ratios"])
    if final["parity"] is not None:
        return
    remedy = "a stream cuts stages by time: leave it out, and set stage_split and stage_ratios"
    if split is not None:
        kind, value = next(iter(split.items()))
        in_shares = kind == "RS" and list(value) in (ratios, [0.8, 0.1, 0.1])
        last = kind == "LS" and value == "valid_and_test" and how == "leave_one_out"
        if not (in_shares or last):
            if kind == "LS":
                remedy = "a stream cuts stages by time: set stage_split: leave_one_out, or leave split out"
            raise ConfigError(
                f"property 'eval_args' has the split {split!r}, which is not how stages are cut; {remedy}"
            )
    by_user = how in ("leave_one_out", "user_tail")
    if given.get("group_by", "user") != "user" and by_user:
        raise ConfigError(
            f"property 'eval_args' has group_by {given['group_by']!r}, but stage_split is {how!r}, which goes by "
            f"user; set stage_split: tail"
        )


def _check_transform(final: Mapping[str, Any], asked: Mapping[str, Any], model: str, classes: Sequence[type]) -> None:
    """Refuses a transform of batches that cannot work or has no effect."""
    name = asked.get("transform")
    if name is None:
        return
    if name == "user_defined":
        raise ConfigError(
            "property 'transform' is 'user_defined', which is a place in RecBole's source and does nothing; leave it "
            "out, and add columns to the batches by the model's collate"
        )
    if final["MODEL_TYPE"] != ModelType.SEQUENTIAL:
        raise ConfigError(
            f"property 'transform' is {name!r}, which changes sequences, and {model} reads none; leave it out"
        )
    if final["train_positions"] == "all" and any(getattr(cls, "trains_all_positions", False) for cls in classes):
        raise ConfigError(
            f"property 'transform' is {name!r}, but {model} trains on all positions of a window, which no transform "
            f"reaches; set train_positions: last, or leave it out"
        )
    for key in {"mask_itemseq": ("mask_ratio",), "crop_itemseq": ("eta",), "reorder_itemseq": ("beta",)}.get(name, ()):
        value = final.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= 1:
            raise ConfigError(
                f"property 'transform' is {name!r}, which needs property {key!r}, a number above 0 and at most 1, such "
                f"as 0.2; it is {value!r}"
            )


def markdown() -> str:
    """Returns the tables of answers as Markdown."""
    lines: list[str] = []
    for page, answers in ANSWERS.items():
        lines += [f"### RecBole: {page.lower()}", "", "| property | answer | |", "|---|---|---|"]
        for key, answer in answers.items():
            reason = (
                re.sub(r"\b(output_dir|config_files)\b", r"`\1`", answer.note).replace("|", "\\|").replace("<", "&lt;")
            )
            lines.append(f"| `{key}` | {answer.kind} | {reason} |")
        lines.append("")
    lines += ["### RecBole: former names", "", "Refused, with what says the same today:", ""]
    lines += [f"- `{key}`: {use}" for key, use in FORMER.items()]
    return "\n".join([*lines, ""])


__all__ = ["ANSWERS", "FORMER", "Answer", "answer_of", "check_for_model", "check_recbole", "markdown"]
