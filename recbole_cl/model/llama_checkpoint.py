"""A Llama-family checkpoint by name or folder: loaded, given tokens for codes, asked in the words of a template.

Weights come from safetensors alone, and no code that a checkpoint brings is run. The tokens of the codes join its
vocabulary side by side, level by level (``<a_0> <a_1> ... <b_0> ...``); their rows are trained, all other weights stay.
"""

from __future__ import annotations

import functools
import string
from pathlib import Path
from typing import Any

import torch

from recbole_cl.config.files import properties_dir
from recbole_cl.errors import ConfigError
from recbole_cl.generative.template import Template
from recbole_cl.llm.encoders.sentence_transformers_folder import folder_hash

FAMILY = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Types of models with a body ``model``, a head ``lm_head`` and attention that takes a mask of four dimensions."""
FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.txt"]
"""What is fetched of a checkpoint on the hub."""
LONGEST_PROMPT = 4000
"""Characters of a template at most."""
BETWEEN = ", "
"""What stands between two items in a prompt of words."""


def checkpoint_folder(name: str, revision: str | None) -> Path:
    """Returns the folder of a checkpoint: a local one, or that of the hub's files on this machine.

    Args:
        name: A folder, or a name on the model hub (``meta-llama/Llama-3.2-1B``).
        revision: Branch, tag or commit on the hub.

    Raises:
        ConfigError: If it is neither, or the hub cannot be reached and has not been asked before.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"property 'llm' is {name!r}, a folder without config.json, so no model is in it")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"property 'llm' is {name!r}, which is no folder here, and the model hub does not give it ({reason}); name "
            f"a folder with config.json, a tokenizer and *.safetensors, or log in where the model wants it "
            f"('hf auth login')"
        ) from error


@functools.lru_cache(maxsize=4)
def _hash(folder: str, changed: tuple[tuple[str, int, int], ...]) -> str:
    return folder_hash(Path(folder))


def checkpoint_hash(folder: Path) -> str:
    """Returns the hash of a checkpoint's files, which are read once while they do not change."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path, path.stat()) for path in files]
    return _hash(str(folder), tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats))


def load_checkpoint(folder: Path, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Returns a causal language model and its tokenizer.

    Args:
        folder: Where it lies.
        name: What the property says, for messages.
        dtype: Of its weights.

    Raises:
        ConfigError: If it cannot be read, is of another family, has no safetensors, or its tokenizer knows more tokens
            than it has rows for.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a model is read again at every stage
    try:
        settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if settings.model_type not in FAMILY:
            raise ConfigError(
                f"property 'llm' is {name!r}, a model of the type {settings.model_type!r}; PESO takes those of the "
                f"Llama family: {', '.join(FAMILY)}"
            )
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        llm = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=dtype
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"property 'llm' is {name!r}, which cannot be loaded: {reason}; it needs config.json, a tokenizer of the "
            f"tokenizers library and weights as *.safetensors"
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()
    rows = int(llm.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]
    if len(tokenizer) > rows:
        raise ConfigError(
            f"property 'llm' is {name!r}, a checkpoint of another vocabulary than its tokenizer's: the tokenizer knows "
            f"{len(tokenizer)} tokens, the model has rows for {rows}; give it the tokenizer that it was trained with"
        )
    return llm, tokenizer


def add_codes(llm: Any, tokenizer: Any, sizes: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Gives a language model a token for each code, and returns the token of code 0 of each level.

    A checkpoint that knows the codes already (it was trained on such an index) keeps their rows.

    Args:
        llm: The model, resized in place where it has no room.
        tokenizer: Its tokenizer, changed in place.
        sizes: Codes of each level.
        name: What the property ``llm`` says, for messages.

    Raises:
        ConfigError: If it knows some of the codes and not the others, or knows them in another order.
    """
    from tokenizers import AddedToken

    words = [f"<{letter}_{code}>" for letter, size in zip(string.ascii_lowercase, sizes, strict=False)
             for code in range(size)]  # fmt: skip
    known = tokenizer.get_vocab()
    held = [word for word in words if word in known]
    if held and len(held) < len(words):
        lost = next(word for word in words if word not in known)
        raise ConfigError(
            f"property 'llm' is {name!r}, a checkpoint of another vocabulary: it knows {len(held)} of the "
            f"{len(words)} codes that semantic_ids may have, {held[0]} among them, and {lost} not; give it the index "
            f"of codes that it was trained on, or a checkpoint without codes"
        )
    if not held:
        tokenizer.add_tokens([AddedToken(word, normalized=False, special=False) for word in words])
    ids = tokenizer.convert_tokens_to_ids(words)
    if ids != list(range(ids[0], ids[0] + len(ids))):
        raise ConfigError(
            f"property 'llm' is {name!r}, a checkpoint of another vocabulary: the tokens of its codes do not follow "
            f"each other level by level; give it a checkpoint without codes"
        )
    if len(tokenizer) > llm.get_input_embeddings().num_embeddings:
        # mean_resizing would draw from a normal distribution over the whole vocabulary: slow, and with tied rows alike.
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return tuple(ids[sum(sizes[:level])] for level in range(len(sizes)))


def read_words(asked: str) -> str:
    """Returns the words of a prompt, ``{items}`` where the items stand.

    Args:
        asked: ``paper`` or ``code``, a version of them (``paper.v1``), or a file.

    Raises:
        ConfigError: If there is none, or it lacks its place for items.
    """
    folder = properties_dir() / "prompts"
    names = {path.name.removeprefix("next_item_").removesuffix(".txt"): path for path in folder.glob("next_item_*.txt")}
    latest = {name.partition(".")[0]: path for name, path in sorted(names.items())}
    file = {**names, **latest}.get(asked) or Path(asked).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeError, ValueError) as error:
        raise ConfigError(
            f"property 'llm_prompt' is {asked!r}: it is none of codes, {', '.join(sorted(latest))}, and no file that "
            f"can be read"
        ) from error
    # A prompt is data: what acts on a terminal or hides from a reader is left out.
    kept = "".join(c for c in text if c.isprintable() or c == "\n").strip("\n")
    if kept.count("{items}") != 1:
        raise ConfigError(f"the prompt {file.name} must hold {{items}} once, where the items of a history belong")
    if len(kept) > LONGEST_PROMPT:
        raise ConfigError(f"the prompt {file.name} has {len(kept)} characters; it may have {LONGEST_PROMPT}")
    return kept


def template_of(asked: str, tokenizer: Any, first: tuple[int, ...]) -> Template:
    """Returns the tokens around a history.

    Args:
        asked: ``codes``, or what :func:`read_words` takes.
        tokenizer: A tokenizer that knows the codes.
        first: The token of code 0 of each level.

    Raises:
        ConfigError: If there is no such prompt, or the tokenizer cuts codes into pieces.
    """
    start = tokenizer.bos_token_id
    pad = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
    if asked == "codes":
        return Template((pad if start is None else start,), pad=pad)
    item = "".join(tokenizer.convert_ids_to_tokens(list(first)))
    written = read_words(asked).replace("{items}", item + BETWEEN + item)
    ids = [] if start is None else [start]
    ids += tokenizer(written, add_special_tokens=False)["input_ids"]
    places = [place for place, token in enumerate(ids) if token in first]
    levels = len(first)
    one, two = places[:levels], places[levels:]
    whole = all(
        [ids[p] for p in part] == list(first) and part == list(range(part[0], part[0] + levels)) for part in (one, two)
    ) if len(places) == 2 * levels else False  # fmt: skip
    if not whole or one[0] == 0:
        raise ConfigError(
            "property 'llm': its tokenizer does not keep the tokens of codes whole, so no prompt can be written"
        )
    return Template(tuple(ids[: one[0]]), tuple(ids[one[-1] + 1 : two[0]]), tuple(ids[two[-1] + 1 :]), pad)
