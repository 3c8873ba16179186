"""Soft prompts: what is added to a frozen model's input so that it answers another task."""

from recbole_cl.prompt.attributes import ItemAttribute
from recbole_cl.prompt.contextual import ContextualPrompts
from recbole_cl.prompt.descriptions import describe
from recbole_cl.prompt.position import PromptedEmbedding, place_prompts

__all__ = [
    "ContextualPrompts",
    "ItemAttribute",
    "PromptedEmbedding",
    "describe",
    "place_prompts",
]
