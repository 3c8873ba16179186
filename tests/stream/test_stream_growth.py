"""Growing tables: axes found by shape, weights carried row by row, optimiser moments with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from stream_helpers import configure
from torch import nn

from recbole_cl.config import CLConfig
from recbole_cl.errors import ConfigError
from recbole_cl.rng import ModelRandomness
from recbole_cl.stream.build import Stream, build_stream
from recbole_cl.stream.vocabulary import Growth, carry, fixed_axis, grow_optimizer, infer_axes, item_axis, user_axis

USERS, ITEMS = (4, 6), (5, 8)


class Table(nn.Module):
    """A model with one parameter of the given name and shape."""

    def __init__(self, name: str, *shape: int, growth_axes: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        if growth_axes is not None:
            self.growth_axes = growth_axes


def axes_of(name: str, before: tuple[int, ...], after: tuple[int, ...], users=USERS, items=ITEMS, declared=None) -> Any:
    return infer_axes(Table(name, *before), Table(name, *after, growth_axes=declared), users, items)[name]


def test_axes_follow_from_what_grew() -> None:
    assert axes_of("user_embedding", (4, 3), (6, 3)) == [user_axis(), fixed_axis(3)]
    assert axes_of("w", (3, 5), (3, 8)) == [fixed_axis(3), item_axis()]
    assert axes_of("item_embedding", (6, 3), (9, 3)) == [item_axis(1), fixed_axis(3)]  # BERT4Rec's mask
    assert axes_of("all_nodes", (9, 3), (14, 3)) == [(("user", 0), ("item", 0)), fixed_axis(3)]
    assert axes_of("matrix", (4, 5), (6, 8)) == [user_axis(), item_axis()]
    assert axes_of("scale", (), ()) == []
    assert axes_of("layer", (3, 15), (3, 18)) == [fixed_axis(3), item_axis(10)]  # DiffRec: items and its clock
    # A width that happens to equal the number of items is not one, since it did not grow.
    assert axes_of("weight", (5, 5), (5, 8)) == [fixed_axis(5), item_axis()]


def test_as_many_users_as_items_is_decided_by_the_name() -> None:
    same = {"users": (5, 8), "items": (5, 8)}
    assert axes_of("user_table", (5, 2), (8, 2), **same)[0] == user_axis()
    assert axes_of("item_table", (5, 2), (8, 2), **same)[0] == item_axis()
    # One user more than items: the item table's mask row would explain the users' table, too.
    near = {"users": (6, 9), "items": (5, 8)}
    assert axes_of("user_table", (6, 2), (9, 2), **near)[0] == user_axis()
    assert axes_of("item_table", (6, 2), (9, 2), **near)[0] == item_axis(1)


def test_a_table_of_fields_is_judged_by_its_offsets() -> None:
    class Fields(nn.Module):
        """As RecBole's FMEmbedding: two rows of a gender, then the items. All in all as many rows as items and two."""

        def __init__(self, items: int) -> None:
            super().__init__()
            self.offsets = np.array([0, 2])
            self.embedding = nn.Embedding(2 + items, 1)

    axes = infer_axes(Fields(5), Fields(8), USERS, ITEMS)["embedding.weight"]
    assert axes == [(*fixed_axis(2), *item_axis()), fixed_axis(1)]


def test_declared_axes_win() -> None:
    declared = {"table": ["user", None]}
    assert axes_of("table", (5, 2), (8, 2), (5, 8), (5, 8), declared) == [user_axis(), fixed_axis(2)]
    middle = {"table": [(("none", 2), ("item", 0)), None]}  # two special rows in front
    axes = axes_of("table", (7, 1), (10, 1), declared=middle)
    growth = Growth(USERS, ITEMS, {"table": axes})
    grown = growth.expand("table", torch.arange(1.0, 8).view(7, 1), torch.zeros(10, 1))
    assert grown.flatten().tolist() == [1, 2, 3, 4, 5, 6, 7, 0, 0, 0]
    last = Growth(USERS, ITEMS, {"table": [item_axis(2), fixed_axis(1)]})
    assert last.expand("table", torch.arange(1.0, 8).view(7, 1)).flatten().tolist() == [1, 2, 3, 4, 5, 0, 0, 0, 6, 7]


def test_what_nothing_explains_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"growth_axes: 'w' went from 10 to 11 rows.*declare growth_axes .*vocabulary: global"
    ):
        axes_of("w", (10, 2), (11, 2))
    with pytest.raises(ConfigError, match="'w' has 1 dimensions before and 2 after"):
        axes_of("w", (5,), (8, 1))
    with pytest.raises(ConfigError, match="declare one axis a dimension"):
        axes_of("w", (5, 2), (8, 2), declared={"w": ["item"]})
    growth = Growth(USERS, ITEMS, {"w": [item_axis(), fixed_axis(2)]})
    with pytest.raises(ConfigError, match=r"the axes of 'w' describe \[5, 2\], it is \[4, 2\]"):
        growth.expand("w", torch.zeros(4, 2))
    with pytest.raises(ConfigError, match=r"make it \[8, 2\], the model of the next stage has \[9, 2\]"):
        growth.expand("w", torch.zeros(5, 2), torch.zeros(9, 2))


def test_identity_growth_changes_nothing() -> None:
    growth = Growth((4, 4), (5, 5), {})
    assert growth.identity and not Growth((4, 4), (5, 6)).identity
    tensor = torch.randn(5, 2)
    copy = growth.expand("w", tensor)
    assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()


def test_both_dimensions_and_counters_grow() -> None:
    growth = Growth(USERS, ITEMS, {"matrix": [user_axis(), item_axis()], "step": []})
    old = torch.randn(4, 5)
    new = growth.expand("matrix", old, torch.full((6, 8), 7.0))
    assert torch.equal(new[:4, :5], old) and (new[4:] == 7).all() and (new[:, 5:] == 7).all()
    assert growth.expand("step", torch.tensor(3.0)) == 3


def test_new_rows_as_the_mean() -> None:
    old, new = Table("w", 6, 3), Table("w", 9, 3)
    growth = Growth(USERS, ITEMS, infer_axes(old, new, USERS, ITEMS))  # five items and a mask row
    carry(old.state_dict(), new, growth, "mean")
    before, after = old.w.detach(), new.w.detach()
    assert torch.equal(after[:5], before[:5]) and torch.equal(after[8], before[5])
    assert torch.allclose(after[5:8], before[1:5].mean(0).expand(3, 3))  # neither padding nor mask
    nodes, later = Table("w", 9, 2), Table("w", 14, 2)
    growth = Growth(USERS, ITEMS, infer_axes(nodes, later, USERS, ITEMS))
    carry(nodes.state_dict(), later, growth, "mean")
    assert torch.allclose(later.w[4:6], nodes.w[1:4].mean(0).expand(2, 2))  # of users for users
    assert torch.allclose(later.w[11:], nodes.w[5:9].mean(0).expand(3, 2))  # of items for items
    wide, wider = Table("w", 3, 5), Table("w", 3, 8)
    growth = Growth(USERS, ITEMS, infer_axes(wide, wider, USERS, ITEMS))
    carry(wide.state_dict(), wider, growth, "mean")
    assert torch.allclose(wider.w[:, 5:], wide.w[:, 1:].mean(1, keepdim=True).expand(3, 3))


def test_what_the_new_model_lacks_is_named() -> None:
    old, new = Table("gone", 5, 2), Table("item_table", 8, 2)
    fresh = new.item_table.detach().clone()
    assert carry(old.state_dict(), new, Growth(USERS, ITEMS, infer_axes(old, new, USERS, ITEMS))) == ["gone"]
    assert torch.equal(new.item_table, fresh)


def test_optimiser_moments_grow_with_zeros() -> None:
    model = Table("item_table", 5, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model.item_table.square().sum().backward()
    optimizer.step()
    moments = {"item_table": dict(optimizer.state[model.item_table])}
    growth = Growth(USERS, ITEMS, {"item_table": [item_axis(), fixed_axis(2)]})
    grown = grow_optimizer(moments, growth)["item_table"]
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(grown[key][:5], moments["item_table"][key]) and not grown[key][5:].any()
        assert grown[key].shape == (8, 2) and moments["item_table"][key].any()
    assert grown["step"] == moments["item_table"]["step"] == 1


# ------------------------------------------------------------------------------------------------ RecBole's models

CONTEXT: dict[str, Any] = {
    "load_col": {
        "inter": ["user_id", "item_id", "rating", "timestamp"],
        "user": ["user_id", "age", "gender"],
        "item": ["item_id", "release_year"],
    },
    "threshold": {"rating": 4},
}
MODELS: dict[str, dict[str, Any]] = {
    "SASRec": {},
    "BERT4Rec": {},
    "LightGCN": {},
    "NeuMF": {},
    "BPR": {},
    "MultiVAE": {},
    "DiffRec": {},
    "CKE": {},
    "DeepFM": CONTEXT,
    "FFM": CONTEXT,
    "xDeepFM": CONTEXT,
}


@pytest.fixture(scope="module")
def streams() -> dict[str, tuple[CLConfig, Stream]]:
    return {}


def models_of(name: str, streams: dict[str, tuple[CLConfig, Stream]]) -> tuple[CLConfig, Stream, nn.Module, nn.Module]:
    if name not in streams:
        config = configure(None, model=name, dataset="ml-100k", n_stages=4, embedding_size=8, **MODELS[name])
        streams[name] = config, build_stream(config)
    config, stream = streams[name]
    built = []
    for stage in (0, 1):
        with ModelRandomness(stage).owned():
            built.append(config.model_class(config, stream.view(stage)))
    return config, stream, built[0], built[1]


def counts(stream: Stream) -> tuple[tuple[int, int], tuple[int, int]]:
    a, b = stream.stages[:2]
    return (a.n_users, b.n_users), (a.n_items, b.n_items)


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_recboles_models_are_carried(name: str, streams: dict[str, tuple[CLConfig, Stream]]) -> None:
    _, stream, old, new = models_of(name, streams)
    users, items = counts(stream)
    assert users[0] < users[1] and items[0] < items[1]
    axes = infer_axes(old, new, users, items)
    fresh = {key: value.clone() for key, value in new.state_dict().items()}
    growth = Growth(users, items, axes)
    assert carry(old.state_dict(), new, growth) == []
    grew = 0
    for key, value in new.state_dict().items():
        before = old.state_dict()[key]
        if value.shape == before.shape:
            assert torch.equal(value, before), key
            continue
        grew += 1
        # Every old number is somewhere in the new tensor, every other place is as initialised.
        where = np.ix_(*(growth.rows(axis)[0] for axis in axes[key]))
        assert torch.equal(value[where], before), key
        untouched = torch.ones(value.shape, dtype=torch.bool)
        untouched[where] = False
        assert torch.equal(value[untouched], fresh[key][untouched]) and untouched.any(), key
    assert grew >= 1


def test_the_mask_of_bert4rec_moves_to_the_end(streams: dict[str, tuple[CLConfig, Stream]]) -> None:
    _, stream, old, new = models_of("BERT4Rec", streams)
    users, items = counts(stream)
    carry(old.state_dict(), new, Growth(users, items, infer_axes(old, new, users, items)))
    assert torch.equal(new.item_embedding.weight[new.mask_token], old.item_embedding.weight[old.mask_token])
    assert torch.equal(new.item_embedding.weight[: items[0]], old.item_embedding.weight[: items[0]])
    assert not torch.equal(new.item_embedding.weight[items[0]], old.item_embedding.weight[old.mask_token])


@pytest.mark.parametrize("name", ["DeepFM", "FFM", "xDeepFM"])
def test_tables_with_offsets_keep_each_field(name: str, streams: dict[str, tuple[CLConfig, Stream]]) -> None:
    _, stream, old, new = models_of(name, streams)
    users, items = counts(stream)
    carry(old.state_dict(), new, Growth(users, items, infer_axes(old, new, users, items)))
    checked = 0
    for key, table in new.state_dict().items():
        before = old.state_dict()[key]
        if table.shape == before.shape or table.dim() != 2:
            continue
        fields = old.token_field_names
        starts = [np.r_[0, np.cumsum(m.token_field_dims)[:-1]].astype(int) for m in (old, new)]
        for field, a, b, size in zip(fields, *starts, old.token_field_dims, strict=True):
            assert torch.equal(table[b : b + size], before[a : a + size]), (key, field)
            checked += 1
    assert checked >= 5 and {"user_id", "item_id", "age", "gender", "release_year"} <= set(old.token_field_names)


def test_a_carried_model_scores_known_items_as_before(streams: dict[str, tuple[CLConfig, Stream]]) -> None:
    config, stream, old, new = models_of("DeepFM", streams)
    users, items = counts(stream)
    carry(old.state_dict(), new, Growth(users, items, infer_axes(old, new, users, items)))
    from stream_helpers import stage_context

    rows = stage_context(config, stream, 0).batcher.rows(stream.stages[0].train[np.arange(100)])
    old.eval(), new.eval()
    assert torch.allclose(old.predict(rows), new.predict(rows), atol=1e-6)
