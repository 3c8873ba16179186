"""A causal language model of transformers, from a local folder; nothing is downloaded."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from recbole_cl.errors import ConfigError
from recbole_cl.llm.clients.base import Answer, LLMClient, Request
from recbole_cl.llm.encoders.sentence_transformers_folder import folder_hash
from recbole_cl.registry import llm_clients
from recbole_cl.rng import seeded


@llm_clients.register("transformers")
class Transformers(LLMClient):
    """Decodes greedily, one question after the other; a chat template is used where the tokenizer has one.

    A model that brings code of its own is refused. An answer depends on the hash of the folder's files.

    Args:
        parameters: ``folder``, ``max_tokens``, ``device``.
    """

    prefix = "transformers"
    remote = False

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        super().__init__(parameters)
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None
        self._hash: str | None = None

    @property
    def model(self) -> str:
        return Path(str(self.parameters["folder"] or "")).name

    def identity(self) -> dict[str, Any]:
        folder = Path(str(self.parameters["folder"] or "")).expanduser()
        if self._hash is None:
            self._hash = folder_hash(folder) if self.parameters["folder"] and folder.is_dir() else ""
        return {"parameters": {"max_tokens": self.parameters["max_tokens"]}, "folder": self._hash}

    def check(self) -> None:
        folder = self.parameters["folder"]
        if not folder or not (Path(str(folder)).expanduser() / "config.json").is_file():
            raise ConfigError(
                f"property 'transformers_folder' is {folder!r}; it must be a folder with config.json, a tokenizer and "
                f"the weights of a causal language model"
            )
        self._load()

    def _load(self) -> tuple[Any, Any]:
        with self._lock:
            if self._loaded is None:
                from transformers import AutoModelForCausalLM, AutoTokenizer

                folder = str(Path(str(self.parameters["folder"])).expanduser())
                try:
                    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
                    model = AutoModelForCausalLM.from_pretrained(
                        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True
                    )
                except (OSError, ValueError, KeyError, ImportError) as error:
                    reason = " ".join(str(error).split())[:300]
                    raise ConfigError(
                        f"property 'transformers_folder': {folder!r} cannot be loaded: {reason}"
                    ) from error
                self._loaded = tokenizer, model.to(self.parameters["device"]).eval()
            return self._loaded

    def ask(self, request: Request) -> Answer:
        tokenizer, model = self._load()
        text = request.prompt
        if getattr(tokenizer, "chat_template", None):
            message = [{"role": "user", "content": text}]
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        with self._lock, seeded(0), torch.no_grad():
            read = tokenizer(text, return_tensors="pt").to(model.device)
            room = int(getattr(model.config, "max_position_embeddings", 0) or 1 << 20)
            most = int(self.parameters["max_tokens"])
            ids = {name: read[name][:, -max(room - most, 1) :] for name in ("input_ids", "attention_mask")}
            end = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            out = model.generate(**ids, max_new_tokens=most, do_sample=False, pad_token_id=end)
        written = out[0, ids["input_ids"].size(1) :]
        return Answer(tokenizer.decode(written, skip_special_tokens=True), ids["input_ids"].size(1), len(written))
