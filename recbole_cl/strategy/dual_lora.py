"""Two low-rank updates of a frozen base: one for all that was, one for the newest stage."""

from __future__ import annotations

import torch

from recbole_cl.errors import ConfigError
from recbole_cl.model.adapters import use_lora
from recbole_cl.registry import strategies
from recbole_cl.rng import torch_generator
from recbole_cl.strategy.context import Pass, StageContext
from recbole_cl.strategy.parts.part_tuning import PartTuning, attach_lora

BOTH = {"long", "short"}


@strategies.register()
class DualLoRA(PartTuning):
    """Learns long-term and short-term preferences in a LoRA each, apart from each other, and adds them up to serve.

    LSAT: Shi et al. 2024, "Preliminary study on incremental learning for large language model-based recommender
    systems" (CIKM; arXiv 2312.15599), its fusion by task arithmetic, on any model with dense layers::

        pass "long":   W + B_l A_l             trained on all stages so far, going on from the last stage's
        pass "short":  W + B_s A_s             trained on the stage alone, from B_s = 0 and a new A_s
        serving:       W + s B_l A_l + (1 - s) B_s A_s

    W is the base as the first stage left it; each B A is scaled by alpha / rank, 1 by default. Our choices: the long
    one goes on learning at every stage (the paper trains it once on abundant history and keeps it); s is one number;
    rows of new users and items are trained in both passes; each pass is validated with its own update. The long pass
    reads all past data, as Joint does: T stages cost about (T + 1) / 2 + 1 times FineTune.
    """

    prefix = "dual_lora"
    plans_passes = True
    defaults = {"rank": 8, "alpha": None, "dropout": 0.0, "long_share": 0.5}

    def validate(self) -> None:
        if self.params["rank"] < 1:
            raise ConfigError(f"dual_lora_rank: {self.params['rank']} is too small; it must be at least 1")
        if self.params["alpha"] is not None and self.params["alpha"] <= 0:
            raise ConfigError(f"dual_lora_alpha: {self.params['alpha']} must be above 0, or ~ for the rank")
        if not 0 <= self.params["dropout"] < 1:
            raise ConfigError(f"dual_lora_dropout: {self.params['dropout']} must be at least 0 and below 1")
        if not 0 <= self.params["long_share"] <= 1:
            raise ConfigError(f"dual_lora_long_share: {self.params['long_share']} must be between 0 and 1")

    def attach(self, ctx: StageContext) -> None:
        attach_lora(ctx, self.who, self.params, int(self.params["rank"]), ("long", "short"))
        self._fuse(ctx)

    def _fuse(self, ctx: StageContext) -> None:
        share = float(self.params["long_share"])
        use_lora(ctx.model, {"long": share, "short": 1 - share})

    def trained_parts(self, ctx: StageContext, names: list[str]) -> list[str]:
        pass_name = ctx.pass_.name
        return [name for name in names if pass_name not in BOTH or f".{pass_name}." in name]

    def plan_stage(self, ctx: StageContext) -> list[Pass] | None:
        super().plan_stage(ctx)
        if not self.adapts(ctx):
            return None
        return [Pass("long", data="so_far"), Pass("short", data="stage")]

    def begin_stage(self, ctx: StageContext) -> None:
        """Starts the short-term update anew."""
        super().begin_stage(ctx)
        if not self.adapts(ctx):
            return
        generator = torch_generator(ctx.config["seed"], ctx.index, f"{self.name}/short")
        with torch.no_grad():
            for name, p in ctx.model.named_parameters():
                if ".lora_A.short." in name:  # peft's initialisation: uniform in +- 1 / sqrt(inputs)
                    drawn = torch.rand(p.shape, generator=generator) * 2 - 1
                    p.copy_(drawn / p.shape[1] ** 0.5)
                elif ".lora_B.short." in name:
                    p.zero_()

    def begin_pass(self, ctx: StageContext) -> None:
        super().begin_pass(ctx)
        if ctx.pass_.name in BOTH:
            use_lora(ctx.model, {ctx.pass_.name: 1.0})

    def end_stage(self, ctx: StageContext) -> None:
        self._fuse(ctx)
        super().end_stage(ctx)
