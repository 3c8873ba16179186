"""Bottleneck adapters in a frozen base."""

from __future__ import annotations

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.part_tuning import PartTuning, attach


@strategies.register()
class Adapter(PartTuning):
    """Trains a bottleneck behind each sub-layer of a base that stays as the first stage left it.

    Houlsby et al. 2019, "Parameter-efficient transfer learning for NLP", section 2.1 and figure 2::

        h' = h + sum_k A_k(h),      A_k(h) = U_k gelu(D_k h + b_k) + c_k,      U_k = 0, c_k = 0 at the beginning

    h is what a sub-layer's last projection gives, before its residual and LayerNorm (in SASRec: attention and feed-
    forward of every layer; dropout comes behind the adapter, not before it). With ``per_stage`` every stage from
    ``trainable_from`` on adds an adapter and trains it alone; those before are kept and go on counting, in parallel.
    Otherwise one adapter evolves. Our choices: gelu as in the base; LayerNorms and the output table stay frozen.
    """

    prefix = "adapter"
    defaults = {"size": 16, "per_stage": False}

    def validate(self) -> None:
        if self.params["size"] < 1:
            raise ConfigError(f"adapter_size: {self.params['size']} is too small; it must be at least 1")

    def _count(self, ctx: StageContext) -> int:
        later = ctx.index - int(ctx.config["trainable_from"])
        return max(1, later + 1) if self.params["per_stage"] else 1

    def attach(self, ctx: StageContext) -> None:
        attach(ctx, "adapter", int(self.params["size"]), self.who, self._count(ctx))

    def trained_parts(self, ctx: StageContext, names: list[str]) -> list[str]:
        newest = f".adapters.{self._count(ctx) - 1}."
        return [name for name in names if newest in name]
