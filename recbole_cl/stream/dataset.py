"""RecBole's datasets over a stream.

:func:`load_dataset` loads the atomic files with RecBole's own class for the model, but sorts the interactions into
the stream before ids are given, and never builds RecBole's dense sequences. :class:`StageView` is what a model's
constructor sees at a stage: the users and items known so far, the training interactions so far.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import Dataset, KnowledgeBasedDataset, SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils import FeatureType

from recbole_cl.config.blocks import write_interactions
from recbole_cl.config.columns import ID_PROPERTIES, check_header
from recbole_cl.errors import DataError, RecBoleCLError
from recbole_cl.registry import schedulers
from recbole_cl.stream.parity import plain_class, recbole_view
from recbole_cl.stream.quality import check_labels, check_timestamps, clock, idle_labels, number
from recbole_cl.stream.reader import fast_reader
from recbole_cl.stream.schedulers.base import Log, Scheduler, parse_time
from recbole_cl.stream.split import roles, vocabulary_phase
from recbole_cl.stream.table import InteractionTable

if TYPE_CHECKING:
    from recbole.data.dataset import Dataset as _Mixed  # what the mixin is put in front of
else:
    _Mixed = object


class StreamDatasetMixin(_Mixed):
    """Overrides of RecBole's ``Dataset``: the stream's order, no statistics of the future, no dense sequences.

    Attributes:
        stream_warnings: What was noticed while loading, each with a count.
        raw_stage: Stage of each row of ``inter_feat``.
        raw_time: Timestamps of the rows in seconds, float64.
        raw_role: Roles of the rows (see :func:`recbole_cl.stream.split.roles`).
        raw_phase: See :func:`recbole_cl.stream.split.vocabulary_phase`.
        raw_late: Rows whose item the first stage shall not know (:meth:`Scheduler.late_items`).
        slice_names: Names of the slices.
        number_counts: Of each column of numbers that lacks some, how many numbers each row has; RecBole fills the gaps.
    """

    stream_warnings: list[str]
    raw_stage: np.ndarray
    raw_time: np.ndarray
    raw_role: np.ndarray
    raw_phase: np.ndarray
    raw_late: np.ndarray
    slice_names: list[str]
    number_counts: dict[str, np.ndarray]
    inter_feat: Any
    item_feat: Any
    _n_read: int
    _line: np.ndarray
    _without_row = 0
    _ticks = 1.0

    def __init__(self, config: Any, scheduler: Scheduler) -> None:
        self.stream_warnings = []
        self._scheduler = scheduler
        super().__init__(config)
        self._change_feat_format()
        label = config["LABEL_FIELD"]
        labels = self.inter_feat[label].numpy() if label in self.inter_feat else None
        check_labels(config, labels)
        self.stream_warnings += idle_labels(config, labels)
        self._drop_unused_col()

    def _download(self) -> None:
        raise DataError(f"data_path: {self.dataset_path!r} does not exist; nothing is downloaded")

    def _load_inter_feat(self, token: str, dataset_path: str) -> None:
        """Loads the interactions; blocks are written as an interaction file first, which is gone afterwards."""
        if (Path(dataset_path) / f"{token}.inter").is_file():
            super()._load_inter_feat(token, dataset_path)
            return
        with tempfile.TemporaryDirectory() as folder:
            write_interactions(Path(dataset_path), Path(folder) / f"{token}.inter", self.config["field_separator"])
            super()._load_inter_feat(token, folder)

    def _load_feat(self, filepath: str, source: Any) -> pd.DataFrame | None:
        check_header(Path(filepath), self.config.final_config_dict)
        ids = [self.config[key] for key in ID_PROPERTIES]
        with fast_reader(ids, self.stream_warnings):
            return super()._load_feat(filepath, source)

    def _filter_inter_by_user_or_item(self) -> None:
        before = len(self.inter_feat)
        super()._filter_inter_by_user_or_item()
        self._without_row = before - len(self.inter_feat)
        if self._without_row:
            self.stream_warnings.append(
                f"filter_inter_by_user_or_item: {self._without_row} of {before} interactions were dropped because "
                f"their user or item has no row in the .user or .item file; set filter_inter_by_user_or_item: False "
                f"to keep them"
            )

    def _remove_duplication(self) -> None:
        """As RecBole, but rows of one time stay in the order of the file: which of them is first is then no chance."""
        keep = self.config["rm_dup_inter"]
        if keep is not None:
            self.inter_feat.sort_values(self.time_field, kind="stable", inplace=True)
            self.inter_feat.drop_duplicates([self.uid_field, self.iid_field], keep=keep, inplace=True)

    def _reset_index(self) -> None:
        if self.inter_feat.empty:
            raise DataError(
                f"dataset {self.dataset_name!r}: none of its {self._n_read} interactions is left after filtering; "
                f"loosen val_interval, user_inter_num_interval, item_inter_num_interval or "
                f"filter_inter_by_user_or_item, or check that the ids of the .user and .item files are those of .inter"
            )
        self._line = self.inter_feat.index.to_numpy() + 2  # the header is line 1
        super()._reset_index()

    def _data_filtering(self) -> None:
        self._n_read = before = len(self.inter_feat)
        if not before:
            raise DataError(f"dataset {self.dataset_name!r}: the .inter file holds no interaction, only its header")
        super()._data_filtering()
        lost = before - len(self.inter_feat) - self._without_row
        if lost:
            linked = ", no link to the knowledge graph" if isinstance(self, KnowledgeBasedDataset) else ""
            self.stream_warnings.append(
                f"filtering: {lost} of {before} interactions were dropped by the filters of the configuration "
                f"(missing ids, rm_dup_inter, val_interval, *_inter_num_interval{linked}), which look at the whole log"
            )
        self._sort_into_stream()
        if isinstance(self, KnowledgeBasedDataset):
            if self.item_feat is not None and not self.config["parity"]:
                # RecBole puts items without a link before all others; they never occur in the stream.
                self.item_feat = self.item_feat[self.item_feat[self.iid_field].isin(self.item2entity.keys())]
            # Its merging of items and entities counts on every linked item being there, also after time_range.
            self._filter_link()

    def _sort_into_stream(self) -> None:
        """Assigns stages and roles, and sorts the interactions by (stage, time)."""
        line = self._line[self.inter_feat.index]
        frame = self.inter_feat.reset_index(drop=True)
        if frame.empty:
            raise DataError(
                f"dataset {self.dataset_name!r}: no item of its interactions is linked to the knowledge graph; check "
                f"that the ids of the .link file are those of .inter"
            )
        time, warnings = check_timestamps(frame, self.time_field, line)
        self.stream_warnings += warnings
        self._ticks, _ = clock(pd.to_numeric(frame[self.time_field]).to_numpy(dtype=np.float64))
        frame, time = self._time_range(frame, time)
        user = pd.factorize(frame[self.uid_field])[0]
        item = pd.factorize(frame[self.iid_field])[0]
        slices = self._scheduler.assign(Log(user, item, time, self._with_item_column(frame), self._ticks))
        order = np.lexsort((time, slices.stage))
        order = order[slices.stage[order] >= 0]
        left_out = len(frame) - len(order)
        if left_out:
            self.stream_warnings.append(f"n_stages: {left_out} interactions of later periods are left out")
        if not len(order):
            raise DataError(f"scheduler: {type(self._scheduler).__name__} put no interaction into a stage")
        self.inter_feat = frame.iloc[order].reset_index(drop=True)
        self.raw_stage, self.raw_time = slices.stage[order], time[order]
        self.slice_names = slices.names
        self.raw_role = roles(self.config, user[order], self.raw_time, self.raw_stage)
        self.raw_phase = vocabulary_phase(self.config, self.raw_role)
        tokens = self.inter_feat[self.iid_field].to_numpy()
        self.raw_late = self._scheduler.late_items(tokens, self.raw_phase == 0)

    def _time_range(self, frame: pd.DataFrame, time: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
        limits = self.config["time_range"]
        if limits is None:
            return frame, time
        low, high = (
            bound if value is None else parse_time(value, "time_range", self._ticks)
            for value, bound in zip(limits, (-np.inf, np.inf), strict=True)
        )
        keep = (time >= low) & (time <= high)
        if not keep.any():
            raise DataError(
                f"time_range: no interaction lies in {list(limits)!r}; the log spans "
                f"{number(time.min())} to {number(time.max())}"
            )
        if not keep.all():
            self.stream_warnings.append(f"time_range: {int((~keep).sum())} of {len(keep)} interactions are left out")
        return frame[keep].reset_index(drop=True), time[keep]

    def _with_item_column(self, frame: pd.DataFrame) -> pd.DataFrame:
        """Joins ``period_field`` from the item file where the interactions do not have it."""
        field = self.config["period_field"]
        if not field or field in frame or self.item_feat is None or field not in self.item_feat:
            return frame
        column = self.item_feat.set_index(self.iid_field)[field]
        values = frame[self.iid_field].map(column)
        return frame.assign(**{field: values.map(lambda v: " ".join(map(str, v)) if isinstance(v, np.ndarray) else v)})

    def _remap(self, remap_list: list[tuple[pd.DataFrame, str, Any]]) -> None:
        """Gives ids by first appearance in (stage, phase, time), late items last in a phase; others as RecBole."""
        if not remap_list:
            return
        first_feat, first_field, first_type = remap_list[0]
        in_stream = first_feat is self.inter_feat and first_field in (self.uid_field, self.iid_field)
        if not in_stream or first_type != FeatureType.TOKEN:
            super()._remap(remap_list)
            return
        late = self.raw_late if first_field == self.iid_field else np.zeros(len(first_feat), dtype=bool)
        order = np.lexsort((np.arange(len(first_feat)), late, self.raw_phase, self.raw_stage))
        column = first_feat[first_field].to_numpy()
        first_feat[first_field] = column[order]
        super()._remap(remap_list)
        ids = np.empty(len(order), dtype=np.int64)
        ids[order] = first_feat[first_field].to_numpy()
        first_feat[first_field] = ids

    def _base_rows(self, feat: pd.DataFrame) -> np.ndarray:
        """Rows of a feature table that the base stage may know; statistics are fitted on them."""
        if self.config["parity"]:
            return np.ones(len(feat), dtype=bool)
        if feat is self.inter_feat:
            return (self.raw_stage == self.raw_stage[0]) & (self.raw_phase == 0)
        base = self.inter_feat[(self.raw_stage == self.raw_stage[0]) & (self.raw_phase == 0)]
        for field in (self.uid_field, self.iid_field):
            if field in feat:
                return feat[field].isin(base[field]).to_numpy()
        return np.ones(len(feat), dtype=bool)

    def _fill_nan(self) -> None:
        # RecBole fills with the mean of the whole log, a statistic of later stages.
        self.number_counts = {}
        for name in self.feat_name_list:
            feat = getattr(self, name)
            for field in feat:
                if self.field2type[field] == FeatureType.FLOAT_SEQ:
                    lengths = [np.size(row) if isinstance(row, np.ndarray) else 0 for row in feat[field]]
                    self.number_counts[field] = np.asarray(lengths, dtype=np.int64)
                if self.field2type[field] == FeatureType.FLOAT and feat[field].isna().any():
                    self.number_counts[field] = feat[field].notna().to_numpy().astype(np.int64)
                    base = feat[field][self._base_rows(feat)]
                    mean = base.mean()
                    feat[field] = feat[field].fillna(0.0 if np.isnan(mean) else mean)
        super()._fill_nan()

    def _normalize(self) -> None:
        """Scales to [0, 1] by the minimum and maximum of the base stage; later values may lie outside."""
        chosen = self.config["normalize_field"] or []
        if chosen and self.config["normalize_all"]:
            raise DataError("normalize_field and normalize_all are both set; keep one")
        for field in chosen or (self.float_like_fields if self.config["normalize_all"] else []):
            if self.field2type.get(field) not in (FeatureType.FLOAT, FeatureType.FLOAT_SEQ):
                raise DataError(f"normalize_field: {field!r} is no column of numbers that is loaded; leave it out")
            if field == self.time_field:
                continue  # the stream keeps its clock
            for feat in self.field2feats(field):
                base = feat[field][self._base_rows(feat)]
                known = np.concatenate([np.atleast_1d(value) for value in base]) if len(base) else np.zeros(1)
                low, high = (known.min(), known.max()) if len(known) else (0.0, 0.0)
                if high > low:
                    feat[field] = (feat[field] - low) / (high - low)
                else:  # one value in the base: 1 for it, as RecBole; later ones keep their distance to it
                    feat[field] = feat[field] - low + 1.0

    def _discretization(self) -> None:
        chosen = self.config["discretization"] or {}
        if any((how or {}).get("method") == "ED" for how in chosen.values()):
            self.stream_warnings.append(
                "discretization: bucket bounds of the method ED are computed by RecBole over the whole log, later "
                "stages included; use LD for bounds that do not look ahead"
            )
        super()._discretization()

    def _change_feat_format(self) -> None:
        """Turns the frames into tensors; sequential fields are declared, never materialised."""
        Dataset._change_feat_format(self)
        if isinstance(self, SequentialDataset):
            self._aug_presets()

    def build_table(self) -> InteractionTable:
        """Returns the table over the interactions."""
        scale = 1 if (self.raw_time == np.floor(self.raw_time)).all() else 1_000_000
        whole = np.floor if self._ticks == 1 else np.rint  # 0.123 s, of milliseconds, are not 122,999 microseconds
        limit = np.iinfo(np.int64).max // scale
        if (np.abs(self.raw_time) >= limit).any():
            raise DataError(f"TIME_FIELD: {np.abs(self.raw_time).max():g} does not fit into 64 bits; use seconds")
        return InteractionTable(
            user=self.inter_feat[self.uid_field].numpy().astype(np.int64),
            item=self.inter_feat[self.iid_field].numpy().astype(np.int64),
            timestamp=whole(self.raw_time * scale).astype(np.int64),
            stage=self.raw_stage.astype(np.int64),
            n_users=len(self.field2id_token[self.uid_field]),
            n_items=len(self.field2id_token[self.iid_field]),
            time_scale=scale,
        )

    # A view overrides what is known; the loaded dataset knows everything.
    known_users: int | None = None
    known_items: int | None = None

    def num(self, field: str) -> int:
        """Returns RecBole's ``num``, or the ids known at the stage for users and items."""
        if self.known_users is not None and field in self.alias["user_id"]:
            return self.known_users
        if self.known_items is not None and field in self.alias["item_id"]:
            return self.known_items
        return super().num(field)

    def inter_matrix(self, form: str = "coo", value_field: str | None = None) -> Any:
        """Returns the sparse user-item matrix of the training interactions (the sequential class expects lists)."""
        return Dataset.inter_matrix(self, form, value_field)


class StageView:
    """RecBole's dataset as a model sees it when one stage is trained.

    ``num``, ``user_num`` and ``item_num`` count the users and items known then (``vocabulary: growing``);
    ``inter_feat`` holds the training interactions so far (``graph: all``) or of the stage; ``user_feat`` and
    ``item_feat`` end with the known ids; knowledge triples with items of the future are left out.
    """

    def __new__(cls) -> StageView:
        raise TypeError("use StageView.of(stream, stage)")

    @staticmethod
    def of(stream: Any, index: int, graph: str = "all") -> Any:
        """Returns the view of ``stream.dataset`` at stage ``index``."""
        stage, base = stream.stages[index], stream.dataset
        if base.config["parity"]:
            return recbole_view(stream)
        view = copy.copy(base)
        view.field2type, view.field2source, view.field2seqlen = (
            dict(base.field2type),
            dict(base.field2source),
            dict(base.field2seqlen),
        )
        view.known_users, view.known_items = stage.n_users, stage.n_items
        rows = torch.from_numpy(stream.graph_positions(index, graph))
        view.inter_feat = select(base.inter_feat, rows)
        for name, known in (("user_feat", stage.n_users), ("item_feat", stage.n_items)):
            feat = getattr(base, name)
            if feat is not None and len(feat) > known:
                setattr(view, name, select(feat, torch.arange(known)))
        if getattr(base, "kg_feat", None) is not None:
            head, tail = base.kg_feat[base.head_entity_field], base.kg_feat[base.tail_entity_field]
            total = len(base.field2id_token[base.iid_field])
            later = ((head >= stage.n_items) & (head < total)) | ((tail >= stage.n_items) & (tail < total))
            view.kg_feat = select(base.kg_feat, torch.nonzero(~later).flatten())
        return view


def select(feat: Interaction, rows: torch.Tensor) -> Interaction:
    """Returns rows of an ``Interaction`` by tensor index (RecBole's own indexing goes through Python lists)."""
    return Interaction({name: column[rows] for name, column in feat.interaction.items()})


def dataset_class(config: Any) -> type:
    """Returns RecBole's dataset class for the configured model, with :class:`StreamDatasetMixin` in front."""
    base = plain_class(config)
    return type(f"Stream{base.__name__}", (StreamDatasetMixin, base), {})


def load_dataset(config: Any) -> StreamDatasetMixin:
    """Loads the configured log into stream order.

    Raises:
        DataError: If the files or the timestamps do not allow it.
    """
    scheduler = schedulers.get(config["scheduler"])(config)
    try:
        return dataset_class(config)(config, scheduler)
    except RecBoleCLError:
        raise
    except ValueError as error:
        raise DataError(f"dataset {config['dataset']!r}: {error}") from error
    except (TypeError, KeyError) as error:
        raise DataError(
            f"dataset {config['dataset']!r}: RecBole cannot load it with these properties ({type(error).__name__}: "
            f"{error}); look at the types in the first lines of its files, and at load_col and alias_of_*"
        ) from error


__all__ = ["StageView", "StreamDatasetMixin", "dataset_class", "load_dataset", "select"]
