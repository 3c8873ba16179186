"""Prefix tokens before the inputs of a frozen base."""

from __future__ import annotations

from recbole_cl.errors import ConfigError
from recbole_cl.registry import strategies
from recbole_cl.strategy.context import StageContext
from recbole_cl.strategy.parts.part_tuning import PartTuning, attach


@strategies.register()
class PromptTuning(PartTuning):
    """Trains P vectors that stand before every history; the base stays as the first stage left it.

    Lester, Al-Rfou and Constant 2021, "The power of scale for parameter-efficient prompt tuning", section 2::

        encoder([p_1, ..., p_P, x_1, ..., x_L])[P:],      p in R^(P x d) trained

    Our choices for SASRec: every position attends to the tokens, tokens to each other but not to items; they enter
    behind the input LayerNorm, have no position embedding, and take none of the history's places (position i keeps its
    embedding, and the history its length). In GRU4Rec they are the first P steps, a learnt initial state. They start
    near zero (standard deviation 0.02) and are there from stage ``trainable_from`` on, so importances of other
    strategies know them from the end of that stage. There are no prompts at which the model is what it was: attention
    always gives tokens some weight.
    """

    prefix = "prompt_tuning"
    defaults = {"length": 8}

    def validate(self) -> None:
        if self.params["length"] < 1:
            raise ConfigError(f"prompt_tuning_length: {self.params['length']} is too small; it must be at least 1")

    def attach(self, ctx: StageContext) -> None:
        attach(ctx, "prompt", int(self.params["length"]), self.who)
