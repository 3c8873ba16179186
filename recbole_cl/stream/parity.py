"""``parity: recbole``: RecBole's own dataset, samplers and loader over a stream's log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from recbole.data import dataset as recbole_datasets
from recbole.data.interaction import Interaction
from recbole.utils import ModelType

from recbole_cl.config.models import configured_classes, configured_traits, recbole_name
from recbole_cl.stream.transforms import transform_of


def recbole_view(stream: Any) -> Any:
    """Returns RecBole's training dataset over the stream's log, with RecBole's training loader in ``parity_loader``.

    RecBole's own code augments, orders and splits the rows. Loader and samplers are made before the model, as in
    RecBole, since they declare fields that a model may look for.

    Args:
        stream: The stream, of one stage.
    """
    from recbole.data.utils import create_samplers, get_dataloader
    from recbole.sampler import KGSampler

    base, config = stream.dataset, stream.dataset.config
    plain: Any = plain_class(config)
    full: Any = plain.__new__(plain)
    full.__dict__.update(base.__dict__)
    for name in ("field2type", "field2source", "field2seqlen"):
        setattr(full, name, dict(getattr(base, name)))
    full.inter_feat = Interaction(dict(base.inter_feat.interaction))
    # The frames are tensors already; what is left of RecBole's step is the augmentation of sequences.
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    full._change_feat_format = full.data_augmentation if sequential else lambda: None
    built = full.build()
    del full._change_feat_format
    for part in built:
        del part._change_feat_format
    sampler, _, _ = create_samplers(config, full, built)
    loader = get_dataloader(config, "train")
    train: Any = built[0]
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        args = config["train_neg_sample_args"]
        entities = KGSampler(full, args["distribution"], args["alpha"])
        train.parity_loader = ParityLoader(loader(config, train, sampler, entities, shuffle=True))
    else:
        train.parity_loader = ParityLoader(loader(config, train, sampler, shuffle=config["shuffle"]))
    return train


class ParityLoader:
    """RecBole's training loader with what a runner asks of a loader.

    Args:
        loader: A ``TrainDataLoader``, ``UserDataLoader`` or ``KnowledgeBasedDataLoader``.

    A batch is RecBole's: it carries no ``_position``, ``_stage`` and ``_timestamp``, and negatives are drawn from
    numpy's global generator, which is the run's own state while an epoch runs.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.general = getattr(loader, "general_dataloader", loader)
        self._parts = [self.general]
        if hasattr(self.general.transform, "_neg_sample"):
            self.general.transform = transform_of(self.general.config)
        if hasattr(loader, "kg_dataloader"):
            self._parts.append(loader.kg_dataloader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Interaction]:
        return iter(self.loader)

    @property
    def n_targets(self) -> int:
        """Training targets of an epoch."""
        return int(self.general.sample_size)

    def complete(self, rows: Interaction) -> Interaction:
        """Applies RecBole's transform and adds its negatives."""
        transformed = self.general.transform(self.general._dataset, rows)
        return self.general._neg_sampling(transformed) if hasattr(self.general, "_neg_sampling") else transformed

    def state_dict(self) -> dict[str, Any]:
        """Returns the states of the generators of the orders; checkpoints lie between epochs."""
        return {"generators": [part.generator.get_state() for part in self._parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Puts the generators back."""
        for part, saved in zip(self._parts, state["generators"], strict=True):
            part.generator.set_state(saved)


def plain_class(config: Any) -> type:
    """Returns RecBole's dataset class for the configured model, or for the one inside it."""
    by_type = {
        ModelType.SEQUENTIAL: recbole_datasets.SequentialDataset,
        ModelType.KNOWLEDGE: recbole_datasets.KnowledgeBasedDataset,
    }
    if not configured_traits(config).negative_lists:  # the loader draws them
        for model_class in configured_classes(config):
            found = getattr(recbole_datasets, f"{recbole_name(model_class)}Dataset", None)
            if found is not None:
                return found
    return by_type.get(config["MODEL_TYPE"], recbole_datasets.Dataset)
