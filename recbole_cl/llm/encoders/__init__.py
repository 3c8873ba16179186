"""Sentence encoders: texts to frozen vectors. ``recbole_cl.registry.encoders`` finds them by name."""

from recbole_cl.llm.encoders.base import TextEncoder, encode_texts

__all__ = ["TextEncoder", "encode_texts"]
