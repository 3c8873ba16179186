"""What a client of a large language model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        kind: ``summary`` or ``shift``.
        prompt: The whole text, the only thing that leaves the machine.
        data: What the prompt was made of, for clients that write by rule. Of a summary: ``behaviours``, a mapping of
            field to words each, with ``liked`` (True, False or None). Of a shift: the texts ``previous`` and
            ``current``.
        key: Name of the question in the cache, sent as ``Idempotency-Key``.
    """

    kind: str
    prompt: str
    data: Mapping[str, Any] = field(default_factory=dict)
    key: str = ""


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        text: The text.
        prompt_tokens: Tokens read, as the service counts them, or as estimated.
        answer_tokens: Tokens written.
    """

    text: str
    prompt_tokens: int
    answer_tokens: int


class ClientError(Exception):
    """A question was not answered.

    Args:
        message: What happened; never a key or a header.
        again: Whether to ask again makes sense.
        after: Seconds that the service wants to be left alone for.
    """

    def __init__(self, message: str, again: bool = True, after: float | None = None) -> None:
        super().__init__(message)
        self.again, self.after = again, after


class LLMClient:
    """A language model that answers questions.

    A client is one file with one class, in this package or in another one (an entry point of the group
    ``recbole_cl.llm_clients``). A complete one::

        @llm_clients.register("parrot")
        class Parrot(LLMClient):
            instant, remote = True, False

            def ask(self, request):
                return Answer("Mostly seeds.", len(request.prompt) // 4, 3)

    Its properties lie in ``properties/llm_client/<name>.yaml``, or it has them as ``defaults``.

    Args:
        parameters: Own properties without prefix.

    Attributes:
        prefix: What its own properties begin with; its name by default.
        instant: It answers at once and costs nothing: questions are asked one after the other and kept many at a time.
        remote: Prompts leave this machine; then nothing is asked without ``liber_consent``.
    """

    prefix: ClassVar[str | None] = None
    instant: ClassVar[bool] = False
    remote: Any = True

    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.parameters = dict(parameters)

    def identity(self) -> dict[str, Any]:
        """Returns all that an answer depends on beside the prompt, JSON-able; no secrets: it is kept."""
        return {"parameters": self.parameters}

    @property
    def model(self) -> str:
        """Name of the model, for the provenance of an answer."""
        return str(self.parameters.get("model") or type(self).__name__)

    def check(self) -> None:
        """Raises a :class:`~recbole_cl.errors.ConfigError` where nothing can be asked, before anything is."""

    def ask(self, request: Request) -> Answer:
        """Answers one question; called from several threads.

        Raises:
            ClientError: If it is not answered.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement ask(request)")
