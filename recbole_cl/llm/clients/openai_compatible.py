"""Any server that speaks OpenAI's chat protocol: hosted ones, vLLM, llama.cpp, Ollama."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from recbole_cl.errors import ConfigError
from recbole_cl.llm.clients.base import Answer, ClientError, LLMClient, Request
from recbole_cl.llm.texts import tokens
from recbole_cl.registry import llm_clients

LONGEST = 1 << 20
"""Bytes of an answer that are read."""
_LOCAL = ("127.0.0.1", "::1", "localhost")
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: a redirected request would take the key with it."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@llm_clients.register("openai_compatible")
class OpenAICompatible(LLMClient):
    """Asks ``<base_url>/chat/completions``; the key comes from the environment and goes into one header alone.

    Args:
        parameters: ``base_url``, ``model``, ``key_env``, ``temperature``, ``max_tokens``, ``timeout``.
    """

    prefix = "openai"

    def identity(self) -> dict[str, Any]:
        kept = ("base_url", "model", "temperature", "max_tokens")
        return {"parameters": {name: self.parameters[name] for name in kept}}

    def check(self) -> None:
        url = urlsplit(str(self.parameters["base_url"] or ""))
        if url.scheme not in ("http", "https") or not url.hostname or url.username or url.password or url.query:
            raise ConfigError(
                "property 'openai_base_url' must be the address of a server, such as https://host/v1, with neither "
                "user, password nor query; the key belongs into the environment variable that openai_key_env names"
            )
        if not self.parameters["model"]:
            raise ConfigError("property 'openai_model' is not set; name the model that the server is to ask")

    @property
    def remote(self) -> bool:
        """Whether the server is another machine."""
        return urlsplit(str(self.parameters["base_url"] or "")).hostname not in _LOCAL

    def body(self, request: Request) -> dict[str, Any]:
        """Returns what is asked, JSON-able; also a line of a batch file."""
        if not self.parameters["model"]:
            raise ConfigError("property 'openai_model' is not set; name the model that the server is to ask")
        return {
            "model": self.parameters["model"],
            "messages": [{"role": "user", "content": request.prompt}],
            "temperature": self.parameters["temperature"],
            "max_tokens": self.parameters["max_tokens"],
        }

    def ask(self, request: Request) -> Answer:
        body = self.body(request)
        headers = {"Content-Type": "application/json", "Idempotency-Key": request.key}
        key = os.environ.get(str(self.parameters["key_env"] or ""), "").strip()
        if key:
            headers["Authorization"] = f"Bearer {key}"
        base = str(self.parameters["base_url"]).rstrip("/")
        asked = urllib.request.Request(f"{base}/chat/completions", json.dumps(body).encode(), headers, method="POST")
        try:
            with self._opener(base).open(asked, timeout=float(self.parameters["timeout"])) as response:
                raw = response.read(LONGEST + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise ClientError(f"the server answered {error.code}", error.code in _AGAIN, _after(error)) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise ClientError(f"the server cannot be reached or broke off ({type(error).__name__})") from None
        return _answer(raw, request)

    @staticmethod
    def _opener(base: str) -> urllib.request.OpenerDirector:
        local = urlsplit(base).hostname in _LOCAL
        return urllib.request.build_opener(_NoRedirects, *([urllib.request.ProxyHandler({})] if local else []))


def _after(error: urllib.error.HTTPError) -> float | None:
    """Returns the seconds of ``Retry-After``, where it says some, an hour at most."""
    try:
        return min(max(float(error.headers.get("Retry-After", "")), 0.0), 3600.0)
    except ValueError:
        return None


def _answer(raw: bytes, request: Request) -> Answer:
    """Reads a response.

    Raises:
        ClientError: If it is no answer; asked again, there may be one.
    """
    if len(raw) > LONGEST:
        raise ClientError(f"the answer has more than {LONGEST} bytes")
    try:
        reply = json.loads(raw)
        text = reply["choices"][0]["message"]["content"]
        usage = reply.get("usage") or {}
        if not isinstance(text, str):
            raise TypeError("content is no text")
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ClientError("the answer is not what the protocol says") from None
    read, written = (
        count if isinstance(count, int) and count >= 0 else tokens(other)
        for count, other in zip(counts, (request.prompt, text), strict=True)
    )
    return Answer(text, read, written)
