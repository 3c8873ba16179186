"""Small trainable parts in a frozen model: bottleneck adapters, prefix prompts, LoRA.

Each function puts parts into a model and leaves what the model computes as it was, but for prompts, whose tokens are
attended to once they are active. Where parts can go is found by RecBole's own building blocks
(``MultiHeadAttention``, ``FeedForward``, ``MLPLayers``, ``TransformerEncoder``, GRU4Rec's layers). A model of another
package, or one around a language model of transformers, says it by a method::

    def adapter_groups(self):  # names of submodules, for each kind that makes sense
        return {"lora": ["q_proj", "v_proj"], "adapter": ["encoder.project"], "prompt": []}

A name is a submodule's own, or as in peft's ``target_modules`` the last part of the names of several (``q_proj``:
those of all layers). ``lora`` and ``adapter`` name ``nn.Linear`` layers that are *called*; a layer of which only
``weight`` is read would not notice. ``prompt`` names encoders that are called as RecBole's ``TransformerEncoder`` or as
a ``nn.GRU`` with ``batch_first``.

LoRA is peft's in every model: its layers stand in the places of the dense ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from recbole.model.layers import FeedForward, MLPLayers, MultiHeadAttention, TransformerEncoder
from recbole.model.sequential_recommender.gru4rec import GRU4Rec
from torch import nn

from recbole_cl.errors import ConfigError, nearest
from recbole_cl.model.contract import offers

KINDS = ("prompt", "adapter", "lora")
_LACKING = {
    "prompt": "it has no sequence encoder (a transformer, GRU4Rec) before whose inputs prefix tokens could stand",
    "adapter": "it has no dense layer (of attention, feed-forward or an MLP) behind which an adapter could stand",
    "lora": "it has no dense layer (of attention, feed-forward or an MLP) whose update could be of low rank",
}
MASKED = -10000.0
"""What RecBole adds to attention scores that must not count."""


class Bottleneck(nn.Module):
    """An adapter without its residual: up(gelu(down(h))), zero at the beginning.

    Args:
        width: Size d of the vectors.
        size: Size of the bottleneck.
    """

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.Linear(size, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns what is added to ``hidden``, shape ``[..., d]``."""
        return self.up(nn.functional.gelu(self.down(hidden)))


class Adapted(nn.Module):
    """A dense layer with adapters behind it: h + sum_k A_k(h), h = layer(x).

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = layer
        self.adapters = nn.ModuleList()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns the adapted output, shape ``[..., d]``."""
        hidden = self.base_layer(inputs)
        return hidden + sum(adapter(hidden) for adapter in self.adapters)


class Prompt(nn.Module):
    """Prefix tokens before the inputs of a sequence encoder; they belong to nobody's history.

    Tokens are seen by every position and see each other; in a recurrent encoder they are its first steps. Their own
    outputs are cut off, so for the model around it nothing has moved: position i is still position i, with its own
    position embedding. The tokens enter behind the model's input LayerNorm and dropout.

    The module is a child of the encoder and works by hooks, so the encoder keeps its type and its names, and without
    active tokens nothing at all is different.

    Args:
        length: Number of tokens P.
        width: Size d of the encoder's inputs.
    """

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(length, width) * 0.02)
        self.handles: list[Any] = []

    def stand_before(self, encoder: nn.Module, active: bool) -> None:
        """Switches the tokens on or off for the encoder whose child this is."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if active:
            self.handles = [encoder.register_forward_pre_hook(self.enter), encoder.register_forward_hook(self.leave)]

    def enter(self, encoder: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Puts the tokens before hidden states ``[B, L, d]``, and lets the attention mask (if any) know."""
        hidden, *rest = inputs
        hidden = torch.cat([self.tokens.expand(len(hidden), -1, -1), hidden], dim=1)
        if isinstance(encoder, nn.GRU):
            return (hidden, *rest)
        mask, *options = rest
        return (hidden, self._mask(mask), *options)

    def leave(self, encoder: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> Any:
        """Cuts the tokens' outputs off."""
        length = len(self.tokens)
        if isinstance(encoder, nn.GRU):
            return outputs[0][:, length:], outputs[1]
        return [layer[:, length:] for layer in outputs]

    def _mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Returns the attention mask ``[B, 1, P + L, P + L]`` for one of ``[B, 1, L or 1, L]``."""
        length, (batch, heads, _, width) = len(self.tokens), mask.shape
        mask = mask.expand(batch, heads, width, width)
        items = torch.cat([mask.new_zeros(batch, heads, width, length), mask], dim=-1)
        hidden = mask.new_full((batch, heads, length, width), MASKED)
        tokens = torch.cat([mask.new_zeros(batch, heads, length, length), hidden], dim=-1)
        return torch.cat([tokens, items], dim=-2)


def places(model: nn.Module, kind: str) -> list[str]:
    """Returns the names of the submodules that get parts of a kind; empty where it makes no sense.

    Args:
        model: The model, with or without parts.
        kind: One of :data:`KINDS`.

    Raises:
        ConfigError: If the model's ``adapter_groups`` names what is not there.
    """
    if offers(model, "adapter_groups"):
        groups: Mapping[str, Sequence[str]] = model.adapter_groups()  # type: ignore[operator, assignment]
        return _named(model, kind, groups.get(kind, ()))
    found: list[str] = []
    for name, module in model.named_modules():
        inside = f"{name}." if name else ""
        if isinstance(module, MultiHeadAttention):
            # Adapters stand behind each sub-layer's last projection, before its residual (Houlsby et al. 2019, fig. 2).
            names = {"adapter": ["dense"], "lora": ["query", "key", "value", "dense"]}
        elif isinstance(module, FeedForward):
            names = {"adapter": ["dense_2"], "lora": ["dense_1", "dense_2"]}
        elif isinstance(module, MLPLayers):
            layers = enumerate(module.mlp_layers)
            dense = [f"mlp_layers.{n}" for n, layer in layers if isinstance(_inner(layer), nn.Linear)]
            names = {"adapter": dense, "lora": dense}
        elif isinstance(module, GRU4Rec):
            names = {"adapter": ["dense"], "lora": ["dense"], "prompt": ["gru_layers"]}
        elif isinstance(module, TransformerEncoder):
            names = {"prompt": [""]}
        else:
            continue
        found += [(inside + place).rstrip(".") for place in names.get(kind, [])]
    return found


def _named(model: nn.Module, kind: str, wanted: Sequence[str]) -> list[str]:
    """Returns the submodules that a model's own names mean, each once, in the model's order."""
    modules, who = dict(model.named_modules()), f"adapter_groups of the model {type(model).__name__}"
    found: set[str] = set()
    for name in wanted:
        meant = [name] if name in modules else [full for full in modules if full.endswith(f".{name}")]
        if not meant:
            last = {full.rpartition(".")[2] for full in modules}
            raise ConfigError(f"{who}: {kind} names {name!r}, but no submodule is called so{nearest(name, last)}")
        for full in meant:
            if kind != "prompt" and not isinstance(_inner(modules[full]), nn.Linear):
                kept = type(_inner(modules[full])).__name__
                raise ConfigError(f"{who}: {kind} names {full!r}, which is a {kept}; name nn.Linear layers")
        found.update(meant)
    return [name for name in modules if name in found]


def _inner(module: nn.Module) -> nn.Module:
    """Returns the layer of the model itself inside its wrappers (ours and peft's)."""
    while isinstance(getattr(module, "base_layer", None), nn.Module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def require_places(model: nn.Module, kind: str, who: str) -> list[str]:
    """Returns :func:`places`.

    Args:
        model: The model.
        kind: One of :data:`KINDS`.
        who: Who asks, for the message (``"strategy: Adapter"``).

    Raises:
        ConfigError: Naming the model and what it lacks.
    """
    found = places(model, kind)
    if not found:
        raise ConfigError(f"{who} cannot serve the model {type(model).__name__}: {_LACKING[kind]}")
    return found


def add_adapters(model: nn.Module, names: Sequence[str], size: int, count: int = 1) -> None:
    """Puts ``count`` adapters behind each of the named dense layers; what is there already counts.

    Args:
        model: The model, changed in place.
        names: Names of ``nn.Linear`` submodules, from :func:`places`.
        size: Size of the bottleneck.
        count: Adapters of each layer.
    """
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, Adapted):
            module = Adapted(module)  # type: ignore[arg-type]
            _put(model, name, module)
        width = _inner(module).out_features
        while len(module.adapters) < count:
            module.adapters.append(Bottleneck(int(width), size))  # type: ignore[arg-type]


def add_prompts(model: nn.Module, names: Sequence[str], length: int, active: bool = True) -> None:
    """Puts prefix tokens before the inputs of the named encoders.

    Args:
        model: The model, changed in place.
        names: Names of encoders, from :func:`places`.
        length: Number of tokens.
        active: Whether the tokens are there for the encoder; inactive ones change nothing.
    """
    for name in names:
        encoder = model.get_submodule(name)
        if "prompt" not in encoder._modules:
            encoder.add_module("prompt", Prompt(length, _width(encoder)))
        prompt: Any = encoder.get_submodule("prompt")
        prompt.stand_before(encoder, active)


def _width(encoder: nn.Module) -> int:
    if isinstance(encoder, nn.GRU):
        return encoder.input_size
    return next(m for m in encoder.modules() if isinstance(m, nn.LayerNorm)).normalized_shape[0]


def add_lora(
    model: nn.Module,
    names: Sequence[str],
    rank: int,
    adapters: Sequence[str] = ("lora",),
    alpha: float | None = None,
    dropout: float = 0.0,
) -> None:
    """Gives each of the named dense layers low-rank updates W + alpha / rank sum_k s_k B_k A_k, B_k = 0 (peft's LoRA).

    The scales s_k are 1 and all updates are active; :func:`use_lora` changes both.

    Args:
        model: The model, changed in place.
        names: Names of ``nn.Linear`` submodules, from :func:`places`.
        rank: Rank of each update.
        adapters: Names of the updates.
        alpha: peft's ``lora_alpha``; by default the rank, a factor of 1.
        dropout: Share of a layer's inputs that training hides from its updates, drawn by torch's generator where the
            model runs. A model that has the updates gets this share, too.
    """
    from peft import LoraConfig, inject_adapter_in_model  # it takes seconds to import
    from peft.tuners.lora import LoraLayer

    flags = {id(p): p.requires_grad for p in model.parameters()}
    have = {name for name, _ in model.named_parameters()}
    for adapter in adapters:
        if any(f".lora_A.{adapter}." in name for name in have):
            continue  # a model that lives on from stage to stage has them
        for host, inside in _hosts(model, names):
            pattern = "|".join(re.escape(name) for name in inside)
            config = LoraConfig(r=rank, lora_alpha=rank if alpha is None else alpha, target_modules=pattern)  # type: ignore[arg-type]
            inject_adapter_in_model(config, host, adapter_name=adapter)
            del host.peft_config  # peft's note on the model: a second adapter would be warned of
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for adapter in adapters:
                module.lora_dropout[adapter] = nn.Dropout(dropout) if dropout else nn.Identity()
            module.train(
                module.get_base_layer().training
            )  # a new module is in training mode, whatever stands around it
    for p in model.parameters():  # peft freezes the rest; what trains is the strategy's to say
        p.requires_grad_(flags.get(id(p), True))
    use_lora(model, {adapter: 1.0 for adapter in adapters})


def _hosts(model: nn.Module, names: Sequence[str]) -> list[tuple[nn.Module, list[str]]]:
    """Returns the modules that peft adapts, and the named layers by their names inside them.

    A model of transformers is one by itself: peft reads its ``config`` (tied embeddings, quantised weights). What
    stands outside of all of them is told by the name inside a shell, for ``config`` of a RecBole model is another.
    """
    found: dict[str, nn.Module] = {}
    for prefix, module in model.named_modules():
        if hasattr(getattr(module, "config", None), "to_dict") and not prefix.startswith(tuple(f"{p}." for p in found)):
            found[prefix] = module
    inside: dict[str, list[str]] = {prefix: [] for prefix in [*found, ""]}
    for name in names:
        host = next((prefix for prefix in found if name.startswith(f"{prefix}.")), "")
        inside[host].append(name.removeprefix(f"{host}.") if host else f"model.{name}")
    found[""] = nn.ModuleDict({"model": model})
    return [(found[prefix], mine) for prefix, mine in inside.items() if mine]


def use_lora(model: nn.Module, scales: Mapping[str, float]) -> None:
    """Lets the named updates count, each with its scale times its alpha / rank, and no others.

    The layers' gradients flow to them alone.
    """
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            flags = [(p, p.requires_grad) for p in module.parameters()]
            module.set_adapter(list(scales))
            for p, flag in flags:  # set_adapter also decides what is trained
                p.requires_grad_(flag)
            for name, scale in scales.items():
                module.scaling[name] = scale * (module.lora_alpha[name] / module.r[name])


def part_names(model: nn.Module) -> list[str]:
    """Returns the names of all parameters that are parts, not the model's own."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, Bottleneck):
            found += [f"{name}.{inner}" for inner, _ in module.named_parameters()]
        elif isinstance(module, Prompt):
            found.append(f"{name}.tokens")
    return found + [name for name, _ in model.named_parameters() if re.search(r"\.lora_[AB]\.", name)]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    outer, _, last = name.rpartition(".")
    setattr(model.get_submodule(outer), last, module)
