"""Ids by first appearance: ``id < n_t`` is "known when stage t is trained", whatever the split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from recbole.utils import ModelType
from stream_helpers import configure, random_rows, stream_of, tokens, write

from recbole_cl.config import RECBOLE
from recbole_cl.stream.build import Stream, build_stream
from recbole_cl.stream.table import TRAIN, VALID

SPLITS = ("tail", "user_tail", "leave_one_out", "next_stage")


def known_sets(
    stream: Stream, field: str, column: np.ndarray, early: np.ndarray
) -> tuple[list[set[str]], list[set[str]]]:
    """For each slice, the tokens seen before its held-out targets, and by its end: plain loops over the table."""
    names = tokens(stream, field, column)
    trained, ended = [], []
    for stage in range(int(stream.table.stage.max()) + 1):
        before = {names[p] for p in range(len(names)) if stream.table.stage[p] < stage}
        trained.append(before | {names[p] for p in range(len(names)) if stream.table.stage[p] == stage and early[p]})
        ended.append(before | {names[p] for p in range(len(names)) if stream.table.stage[p] == stage})
    return trained, ended


@pytest.mark.parametrize("valid", ["tail", "random"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("scheduler", ["TimeSlices", "BaseThenIncrements", "UserDisjoint"])
def test_known_is_a_prefix_of_the_ids(tmp_path: Path, scheduler: str, split: str, valid: str) -> None:
    write(tmp_path, random_rows(seed=2))
    _, stream = stream_of(tmp_path, scheduler=scheduler, stage_split=split, valid_split=valid, min_user_inter=3)
    table, dataset = stream.table, stream.dataset
    early = dataset.raw_role == TRAIN
    if valid == "random":
        early |= dataset.raw_role == VALID
    for field, column, n in (("user_id", table.user, "n_users"), ("item_id", table.item, "n_items")):
        trained, ended = known_sets(stream, field, column, early)
        for stage in stream.stages:
            k = stage.index
            before = ended[k - 1] if k else set()
            limit = getattr(stage, n)
            assert set(tokens(stream, field, np.arange(1, limit))) == trained[k]
            assert getattr(stage, f"n_new_{field[:4]}s") == len(ended[k] - before)
            tested_in = k + 1 if split == "next_stage" else k
            first_new = getattr(stage, f"first_new_{field[:4]}")
            assert set(tokens(stream, field, np.arange(1, first_new))) == (ended[tested_in - 1] if tested_in else set())
            if field == "item_id":
                assert set(tokens(stream, field, np.arange(1, stage.catalogue))) == ended[tested_in]
    # The order inside the prefix is that of first appearance in (stage, phase, time).
    order = np.lexsort((np.arange(len(table)), ~early, table.stage))
    for column in (table.user, table.item):
        assert list(dict.fromkeys(column[order].tolist())) == list(range(1, int(column.max()) + 1))


def test_training_knows_what_it_sees(tmp_path: Path) -> None:
    write(tmp_path, random_rows(seed=5))
    for split in SPLITS:
        _, stream = stream_of(tmp_path, stage_split=split, valid_split="random")
        for stage in stream.stages:
            for targets in (stage.train, stream.trained_targets(stage.index, "so_far")):
                assert targets.label.max() < stage.n_items and targets.user.max() < stage.n_users


def test_a_longer_log_keeps_the_ids_of_the_earlier_part(tmp_path: Path) -> None:
    rows = random_rows(600, span=6000, seed=4)
    write(tmp_path, [r for r in rows if r[2] < 4000], name="short")
    write(tmp_path, rows, name="long")
    _, short = stream_of(tmp_path, dataset="short", scheduler="Boundaries", n_stages=None, boundaries=[2000])
    _, long = stream_of(tmp_path, dataset="long", scheduler="Boundaries", n_stages=None, boundaries=[2000, 4000, 5000])
    assert len(short) == 2 and len(long) == 4
    for field, n in (("user_id", short.table.n_users), ("item_id", short.table.n_items)):
        assert tokens(short, field, np.arange(n)) == tokens(long, field, np.arange(n))
    assert long.table.n_items > short.table.n_items
    for a, b in zip(short.stages, long.stages, strict=False):
        for split in ("train", "valid", "test"):
            assert a.split(split).position.tolist() == b.split(split).position.tolist()
            assert a.split(split).label.tolist() == b.split(split).label.tolist()
        assert (a.n_users, a.n_items, a.catalogue) == (b.n_users, b.n_items, b.catalogue)


def test_items_only_in_the_item_file_come_last(tmp_path: Path) -> None:
    rows = random_rows(200)
    write(tmp_path, rows)
    seen = {r[1] for r in rows}
    ordered = ["unsold", *sorted(seen), "never"]
    write(tmp_path, [(i, k) for k, i in enumerate(ordered)], "item_id:token\tprice:float", "item")
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "price"]}
    _, stream = stream_of(tmp_path, load_col=load)
    assert tokens(stream, "item_id", np.arange(stream.table.n_items))[-2:] == ["unsold", "never"]
    assert stream.stages[-1].catalogue == stream.table.n_items - 2
    assert max(stage.n_items for stage in stream.stages) <= stream.table.n_items - 2
    # The feature table stands in the order of the ids.
    price = stream.dataset.item_feat["price"]
    for token in ("unsold", "never", next(iter(seen))):
        assert price[int(stream.dataset.field2token_id["item_id"][token])] == ordered.index(token)


def test_global_vocabulary_has_all_rows_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, random_rows())
    _, stream = stream_of(tmp_path, vocabulary="global")
    table = stream.table
    assert all((s.n_users, s.n_items) == (table.n_users, table.n_items) for s in stream.stages)
    late = table.n_items - stream.stages[0].catalogue
    assert late > 0 and any(f"ranks {late} items of the future" in told for told in stream.warnings)


def raw_triples() -> set[tuple[str, str, str]]:
    file = RECBOLE / "dataset_example" / "ml-100k" / "ml-100k.kg"
    return set(pd.read_csv(file, sep="\t", dtype=str).itertuples(index=False, name=None))


@pytest.mark.parametrize("case", ["all files", "interactions", "time_range"])
def test_knowledge_models_keep_the_order_of_first_appearance(case: str) -> None:
    properties: dict[str, Any] = {"model": "CKE", "dataset": "ml-100k"}
    kg = {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
    inter = {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    if case == "all files":  # .item holds items without a link, too
        properties["load_col"] = {**inter, **kg, "item": ["item_id", "release_year"]}
    else:  # no .item file that would hold the items which time_range leaves out
        properties["load_col"] = {**inter, **kg}
    if case == "time_range":
        properties["time_range"] = ["1997-09-01", 882000000]
    config = configure(None, **properties)
    assert config["MODEL_TYPE"] == ModelType.KNOWLEDGE
    stream = build_stream(config)
    table, dataset = stream.table, stream.dataset
    order = np.lexsort((np.arange(len(table)), dataset.raw_phase, table.stage))
    assert list(dict.fromkeys(table.item[order].tolist())) == list(range(1, int(table.item.max()) + 1))
    if case == "time_range":
        assert stream.stages[-1].end <= 882000000 and table.n_items < 1500
    # Every item is an entity of the same number, and its triples are the file's.
    link = pd.read_csv(RECBOLE / "dataset_example" / "ml-100k" / "ml-100k.link", sep="\t", dtype=str).to_numpy()
    entity_of = {str(item): str(entity) for item, entity in link}
    entities = dataset.field2id_token[dataset.entity_field]
    for item in range(1, table.n_items):
        assert entities[item] == entity_of[str(dataset.field2id_token["item_id"][item])]
    assert len(entities) == dataset.entity_num == len(set(entities))
    head, relation, tail = (dataset.kg_feat[f].numpy() for f in ("head_id", "relation_id", "tail_id"))
    relations = dataset.field2id_token["relation_id"]
    assert set(zip(entities[head], relations[relation], entities[tail], strict=True)) == raw_triples()
    assert any("no link to the knowledge graph" in told for told in stream.warnings)
