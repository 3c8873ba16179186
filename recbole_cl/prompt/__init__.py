"""Soft prompts: what is added to a frozen model's input so that it answers another task."""

from recbole_cl.prompt.attributes import ItemAttribute
from recbole_cl.prompt.contextual import ContextualPrompts
from recbole_cl.prompt.descriptions import describe
from recbole_cl.prompt.histories import Kept, KeptHistories, RecurrentHistories, TransformerHistories
from recbole_cl.prompt.position import PromptedEmbedding, place_prompts

__all__ = [
    "ContextualPrompts",
    "ItemAttribute",
    "Kept",
    "KeptHistories",
    "PromptedEmbedding",
    "RecurrentHistories",
    "TransformerHistories",
    "describe",
    "place_prompts",
]
