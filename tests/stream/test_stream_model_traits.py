"""What sets some of RecBole's models apart: one table, asked by class, so that subclasses and wrappers are served."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.data import dataset as recbole_datasets
from recbole.data import utils as recbole_data
from recbole.model.abstract_recommender import GeneralRecommender, SequentialRecommender
from recbole.model.general_recommender import BPR, MultiVAE, Pop
from recbole.model.sequential_recommender import DIEN, FEARec, SASRec
from recbole.utils import InputType, get_trainer
from stream_helpers import Plain, configure, random_rows, stage_context, stream_of, write

from recbole_cl.config.models import TRAITS, Traits, configured_traits, recbole_models, recbole_name, traits_of
from recbole_cl.errors import ConfigError
from recbole_cl.model.sasrec import SASRec as OwnSASRec
from recbole_cl.stream.loader import make_loader
from recbole_cl.stream.parity import plain_class

NEGATIVES: dict[str, Any] = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}
PACKAGE = Path(importlib.import_module("recbole_cl").__file__ or "").parent


class RenamedDIEN(DIEN):
    """RecBole's DIEN under another name."""


class RenamedMultiVAE(MultiVAE):
    """RecBole's MultiVAE under another name."""


class RenamedFEARec(FEARec):
    """RecBole's FEARec under another name: as unfit for a stream as FEARec."""


class MendedFEARec(FEARec):
    """One that needs no table of augmented sequences any more, and says so."""

    recbole_traits = Traits()


class Around(SequentialRecommender):
    """A model around another one."""

    input_type = InputType.POINTWISE
    backbone_property = "around"
    defaults = {"around": "DIEN", **NEGATIVES}

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.inner = torch.nn.Linear(2, 2)


Foreign = type("DIEN", (SASRec,), {})
"""A class of another package that happens to be called as one of RecBole's."""


def test_every_row_is_a_model_of_recbole() -> None:
    """A slip in a name of the table would switch its row off."""
    assert set(TRAITS) <= {name for name, _ in recbole_models().values()}


def test_user_batches_are_those_of_recbole() -> None:
    """RecBole's own table, read from its source, has the same models."""
    table = re.search(r"register_table = {(.*?)}", inspect.getsource(recbole_data.get_dataloader), re.DOTALL)
    assert table is not None
    wanted = set(re.findall(r'"(\w+)":', table[1]))
    assert {name for name, traits in TRAITS.items() if traits.user_batches} == wanted


def test_traits_follow_the_class() -> None:
    """A subclass is what it derives from, whatever it is called; a name alone is nothing; a class may differ."""
    assert traits_of(RenamedDIEN).negative_lists and traits_of(DIEN).negative_lists
    assert traits_of(RenamedMultiVAE).user_batches and not traits_of(BPR).user_batches
    assert traits_of(type("Counting", (Pop,), {})).counts
    assert traits_of(Foreign) == Traits() == traits_of(SASRec)
    assert traits_of(FEARec).refused and traits_of(RenamedFEARec).refused and not traits_of(MendedFEARec).refused


def test_a_model_has_the_traits_of_the_one_inside_it() -> None:
    """By the configuration before there is a model, by its parts afterwards; a part that is no backbone tells none."""
    config = configure(model=Around, dataset="ml-100k")
    assert configured_traits(config).negative_lists
    other = configure(model=Around, dataset="ml-100k", around="SASRec", train_neg_sample_args=None)
    assert not configured_traits(other).negative_lists

    class Holds(GeneralRecommender):
        def __init__(self, inner: Any) -> None:
            torch.nn.Module.__init__(self)
            self.inner = inner

    class Wraps(Holds):
        backbone_property = "inner"

    inner = MultiVAE.__new__(MultiVAE)
    torch.nn.Module.__init__(inner)
    assert traits_of(Wraps(inner)).user_batches
    assert not traits_of(Holds(inner)).user_batches


@pytest.mark.parametrize(("renamed", "model"), [(RenamedDIEN, "DIEN"), (RenamedMultiVAE, "MultiVAE")])
def test_a_subclass_gets_the_batches_of_its_model(tmp_path: Path, renamed: type, model: str) -> None:
    """The same fields and the same bits, in training and in evaluation."""
    folder, given = write(tmp_path, random_rows()), NEGATIVES if model == "DIEN" else {}
    found = []
    for asked in (model, renamed):
        config, stream = stream_of(folder, model=asked, **given)
        ctx = stage_context(config, stream, 0)
        batches = [*make_loader(ctx, ctx.stage.train, "t"), ctx.batcher.rows(ctx.stage.test, evaluation=True)]
        found.append([batch.interaction for batch in batches])
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ("neg_item_id_list" in found[0][0]) == (model == "DIEN")


def test_a_wrapper_around_dien_gets_its_lists(tmp_path: Path) -> None:
    """Its rows hold a list of negatives in training, and one of zeros where it only scores."""
    config, stream = stream_of(write(tmp_path, random_rows()), model=Around)
    ctx = stage_context(config, stream, 0)
    batch = next(iter(make_loader(ctx, ctx.stage.train, "t")))
    assert ((batch["neg_item_id_list"] > 0) == (batch["item_id_list"] > 0)).all()
    assert not ctx.batcher.rows(ctx.stage.test, evaluation=True)["neg_item_id_list"].any()


def test_lists_of_negatives_need_negatives(tmp_path: Path) -> None:
    """The message names the model as its user does."""
    config, stream = stream_of(write(tmp_path, random_rows()), model=RenamedDIEN, train_neg_sample_args=None)
    ctx = stage_context(config, stream, 0)
    with pytest.raises(ConfigError, match=r"train_neg_sample_args: RenamedDIEN needs negatives; set \{distribution"):
        next(iter(make_loader(ctx, ctx.stage.train, "t")))


def test_a_refused_model_is_refused_as_a_class_too() -> None:
    """By name, as RecBole's class and as a subclass of it; one that has mended the reason is not."""
    for model in ("FEARec", FEARec, RenamedFEARec):
        with pytest.raises(ConfigError, match="cannot be trained in stages: it reads RecBole's table"):
            configure(model=model, dataset="ml-100k")
    assert configure(model=MendedFEARec, dataset="ml-100k").model_class is MendedFEARec
    with pytest.raises(ConfigError, match=r"RenamedDIEN.*RecBole loads its data in a way of its own"):
        configure(model=RenamedDIEN, dataset="ml-100k", parity="recbole", **NEGATIVES)


def test_a_missing_package_is_told_for_classes_too() -> None:
    """Before the data is read: RecBole's class imports it when it is constructed."""
    needy = type("Needy", (BPR,), {"recbole_traits": Traits(package="no_such_package")})
    with pytest.raises(ConfigError, match=r"'Needy' needs the package 'no_such_package'.*pip install no-such-package"):
        configure(model=needy, dataset="ml-100k")


def test_recbole_finds_what_it_keeps_for_a_subclass() -> None:
    """RecBole looks datasets and trainers up by the name of the model: that of the RecBole model in the line."""
    assert recbole_name(OwnSASRec) == recbole_name(SASRec) == recbole_name(Foreign) == "SASRec"
    kgat = type("KGAT", (BPR,), {"__module__": "recbole.model.knowledge_aware_recommender.kgat"})
    assert get_trainer(None, recbole_name(type("Mine", (kgat,), {}))).__name__ == "KGATTrainer"
    assert recbole_name(type("Mine", (GeneralRecommender,), {})) == "Mine"
    ksr = importlib.import_module("recbole.model.sequential_recommender.ksr").KSR

    def data(model_class: type) -> type:
        config = Plain(MODEL_TYPE=SASRec.type)
        config.model_class = model_class
        return plain_class(config)

    assert data(type("Mine", (ksr,), {})) is recbole_datasets.KSRDataset
    assert data(RenamedDIEN) is data(Foreign) is recbole_datasets.SequentialDataset


def test_nobody_in_these_rooms_asks_for_a_name() -> None:
    """No condition on what the configured model, or the class of one, is called."""
    asks = re.compile(r"""(config\["model"\]|config\.model|__name__)\s*(==|!=|(not )?in\b)""")
    files = [*(PACKAGE / "stream").rglob("*.py"), *(PACKAGE / "config").rglob("*.py")]
    found = [
        f"{file.name}: {line.strip()}" for file in files for line in file.read_text().splitlines() if asks.search(line)
    ]
    table = 'models.py: if cls.__module__.startswith("recbole.model.") and cls.__name__ in TRAITS:'
    saved = 'store.py: if kind.__name__ != state["class"]:'  # of a dataset that was kept
    assert sorted(found) == [table, saved]
