"""An adapter in peft's own format: a folder that peft loads without this package.

::

    adapter_config.json          rank, alpha, layers, tokens, and the language model that it is for
    adapter_model.safetensors    A and B of each layer, the rows of the codes' tokens
    tokenizer.json, ...          around a checkpoint: its tokenizer with the codes in it
    base/                        the embedded Llama, whose weights are nowhere else

Adapters of past stages that a strategy adds to the layers are part of it: their factors stand beside the trained ones
as further ranks, ``[B_1 .. B_t] [A_1; ..; A_t]``, so one adapter of peft is the whole sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recbole_cl import disk
from recbole_cl.errors import ConfigError, OutputError
from recbole_cl.generative.lora import Factors
from recbole_cl.model.contract import offers
from recbole_cl.model.small_llama import lora_config

PREFIX = "base_model.model."
"""What peft puts before the names of a model's parts."""


def export_adapter(
    model: Any,
    folder: str | Path,
    past: Mapping[str, Sequence[Factors]] | None = None,
    own: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Writes the adapter of a model, and returns what was written: ``bytes``, ``numbers``, ``rank``, ``tokens``.

    Args:
        model: A model whose language model has one adapter (:class:`recbole_cl.model.peso.PESO`).
        folder: Where; what stands there is replaced.
        past: Of each layer's name, factors whose products are added to its weight beside the adapter.
        own: Of each layer's name, what its adapter is multiplied by; default 1.

    Raises:
        ConfigError: If the model has no such adapter.
        OutputError: If the folder cannot be written.
    """
    if not offers(model, "adapters") or not hasattr(model, "llm"):
        raise ConfigError(f"model: {type(model).__name__} has no adapter of a language model to export; PESO has one")
    config, llm, into = model.config, model.llm, Path(folder).expanduser()
    rank, alpha = int(config["lora_rank"]), float(config["lora_alpha"])
    tensors: dict[str, torch.Tensor] = {}
    ranks = set()
    for name, (a, b) in model.adapters().items():
        beside = list((past or {}).get(name, ()))
        wide = torch.cat([*(one for one, _ in beside), a.detach().float()])
        tall = torch.cat(
            [*(other * (rank / alpha) for _, other in beside), (own or {}).get(name, 1.0) * b.detach().float()], dim=1
        )
        ranks.add(len(wide))
        tensors[f"{PREFIX}{name}.lora_A.weight"] = wide
        tensors[f"{PREFIX}{name}.lora_B.weight"] = tall
    (whole,) = ranks
    rows = {name: p for name, p in llm.named_parameters() if "trainable_tokens_delta" in name}
    for name, p in rows.items():
        tensors[PREFIX + name.rpartition(".")[0]] = p.detach()
    number = next((len(p) for p in rows.values()), 0)
    first = model.language.first[0]
    settings = lora_config(
        llm, whole, alpha * whole / rank, 0.0, list(config["lora_targets"]), range(first, first + number)
    )
    base = model.language.base
    settings.base_model_name_or_path = base["source"] if base else "base"
    settings.inference_mode = True
    written = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    try:
        _write(into, settings, written, model)
    except OSError as error:
        raise OutputError(f"cannot write the adapter into {str(folder)!r}: {error.strerror or error}") from error
    return {
        "bytes": sum(t.numel() * t.element_size() for t in written.values()),
        "numbers": sum(t.numel() for t in written.values()),
        "rank": whole,
        "tokens": number,
    }


def _write(into: Path, settings: Any, tensors: dict[str, torch.Tensor], model: Any) -> None:
    disk.own_folder(into, "the folder of the adapter")
    for folder in (into, into / "base"):
        for path in folder.iterdir() if folder.is_dir() else ():
            disk.refuse_link(path, "the folder of the adapter")  # peft and transformers would write through it
    settings.save_pretrained(into)
    part = into / ".adapter_model.safetensors.tmp"
    disk.write_tensors(part, tensors, {"format": "pt"})
    part.replace(into / "adapter_model.safetensors")
    if model.language.tokenizer is not None:
        model.language.tokenizer.save_pretrained(into)
        return
    llm = model.llm
    bare = type(llm)(llm.config)
    weights = {name.replace(".base_layer.", "."): t for name, t in llm.state_dict().items() if "lora_" not in name}
    bare.load_state_dict(weights)
    bare.save_pretrained(into / "base")
