"""Questions in waves: all summaries, then all shifts, each asked once, within limits, and kept as it is answered.

A shift needs the two summaries beside it and nothing else, so two waves suffice for any number of partitions.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from recbole_cl.errors import ConfigError
from recbole_cl.llm.cache import AnswerCache, Kept, name_of
from recbole_cl.llm.clients.base import ClientError, LLMClient, Request
from recbole_cl.llm.prompts import Prompt
from recbole_cl.llm.texts import cleaned_lines, fault, tokens

_LOG = logging.getLogger("recbole_cl")
_AT_ONCE = 2000
"""Questions to an instant client that are kept in one go."""
_LEASED = 4
"""Questions leased at a time for each on its way: others share the work, and leases do not run out."""


@dataclass(frozen=True)
class Limits:
    """How questions are asked.

    Args:
        concurrency: Questions on their way at the same time.
        retries: Times that a question is asked again.
        backoff: Seconds before the first time, doubled each time.
        calls: Calls of this process at most; ``None`` for no limit.
        tokens: Tokens, read and written, at most; ``None`` for no limit.
        calls_per_minute: Calls in a minute at most; ``None`` for no limit.
    """

    concurrency: int = 8
    retries: int = 4
    backoff: float = 1.0
    calls: int | None = None
    tokens: int | None = None
    calls_per_minute: float | None = None


@dataclass
class Spent:
    """What was spent.

    Attributes:
        calls: Calls made, those that failed included.
        prompt_tokens: Tokens read, of calls that were answered.
        answer_tokens: Tokens written.
        answered: Questions answered now.
        found: Questions whose answer was there.
        fallbacks: Questions that the offline text stands in for.
        latencies: Seconds of each call that was answered.
    """

    calls: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    answered: int = 0
    found: int = 0
    fallbacks: int = 0
    latencies: list[float] = field(default_factory=list)


class Cascade:
    """Asks a client through a cache.

    Args:
        name: Registered name of the client.
        client: The client.
        fallback: Answers in place of one that does not come, or comes as what cannot be used.
        cache: Where answers are kept.
        limits: How questions are asked.
        progress: Whether a bar is shown.
        consent: Prompts may leave this machine.
    """

    def __init__(
        self, name: str, client: LLMClient, fallback: LLMClient, cache: AnswerCache, limits: Limits,
        progress: bool = False, consent: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.client, self.fallback, self.cache, self.limits = name, client, fallback, cache, limits
        self.progress, self.consent = progress, consent
        self.spent = Spent()
        self._lock = threading.Lock()
        self._next = 0.0  # when the next call may go out
        self._stopped = threading.Event()

    def about(self, prompt: Prompt) -> dict[str, Any]:
        """Returns all that an answer depends on beside the filled prompt."""
        return {
            "client": self.name, "model": self.client.model, "prompt": f"{prompt.kind}.{prompt.version}",
            **self.client.identity(),
        }  # fmt: skip

    def named(self, prompt: Prompt, requests: Sequence[Request]) -> list[Request]:
        """Returns the questions with their names."""
        about = self.about(prompt)
        return [replace(request, key=name_of(about, request.prompt)) for request in requests]

    def missing(self, requests: Sequence[Request]) -> list[Request]:
        """Returns the questions that nobody has answered yet, each once."""
        once = {request.key: request for request in requests}
        found = self.cache.find(once)
        return [request for key, request in once.items() if key not in found]

    def wave(self, prompt: Prompt, requests: Sequence[Request], title: str = "") -> list[Kept]:
        """Returns the answers to named questions, in their order: those that are there, and those that are asked for.

        Raises:
            ConfigError: If nothing can be asked, or a limit is reached; what was answered by then is kept.
        """
        about = self.about(prompt)
        once = {request.key: request for request in requests}
        found = self.cache.find(once)
        self.spent.found += len(found)
        todo = [key for key in once if key not in found]
        if todo:
            self.client.check()
            if self.client.remote and not self.consent:
                raise ConfigError(
                    f"liber_client: {self.name!r} would send what users did to another machine; look at it with "
                    f"recbole-cl profile --show-prompt USER, and set liber_consent: True if it may leave"
                )
        bar = tqdm(total=len(todo), desc=title, disable=not self.progress or not todo, leave=False)
        try:
            while todo:
                # An instant answer costs less than a lease; of two processes that give it the first is kept.
                at_once = _AT_ONCE if self.client.instant else _LEASED * self.limits.concurrency
                mine = todo[:at_once] if self.client.instant else self.cache.take(todo[:at_once])
                if mine and self.client.instant:
                    kept = [self._try(once[key]) for key in mine]
                    self.cache.keep(kept, about, leased=False)
                    bar.update(len(kept))
                elif mine:
                    self._ask_all([once[key] for key in mine], about, lambda kept: bar.update(1))
                answers = self.cache.find(mine if self.client.instant else todo)
                found.update(answers)
                todo = [key for key in todo if key not in answers]
                if todo and not mine:  # others are asking
                    time.sleep(0.05)
        finally:
            bar.close()
        return [found[request.key] for request in requests]

    def _ask_all(self, requests: Sequence[Request], about: Mapping[str, Any], report: Callable[[Kept], None]) -> None:
        """Asks questions several at a time; each answer is kept as it comes."""
        self._stopped.clear()
        waiting = list(reversed(requests))
        running: dict[Future[Kept], Request] = {}
        with ThreadPoolExecutor(self.limits.concurrency) as pool:
            try:
                while waiting or running:
                    while waiting and len(running) < self.limits.concurrency:
                        request = waiting.pop()
                        running[pool.submit(self._try, request)] = request
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        kept = future.result()
                        running.pop(future)
                        self.cache.keep([kept], about)
                        report(kept)
            except BaseException:
                self._stopped.set()
                for future in running:
                    if not future.done() or future.exception() is None:
                        try:
                            self.cache.keep([future.result()], about)
                        except BaseException as error:
                            _LOG.debug("a call ended with %s", type(error).__name__)
                self.cache.give_back([request.key for request in requests])
                raise

    def _try(self, request: Request) -> Kept:
        """Asks until there is an answer that can be used; else the offline text stands in."""
        reason = ""
        for attempt in range(self.limits.retries + 1):
            if self._stopped.is_set():
                break
            self._admit(request)
            begun = time.perf_counter()
            try:
                answer = self.client.ask(request)
            except ClientError as error:
                reason = str(error)
                if not error.again:
                    raise ConfigError(
                        f"liber_client: {self.name!r} cannot be asked: {reason}; what was answered is kept"
                    ) from None
                pause = error.after if error.after is not None else self.limits.backoff * 2**attempt
            else:
                seconds = time.perf_counter() - begun
                with self._lock:
                    self.spent.prompt_tokens += answer.prompt_tokens
                    self.spent.answer_tokens += answer.answer_tokens
                    self.spent.latencies.append(seconds)
                wrong = fault(answer.text)
                if wrong is None:
                    with self._lock:
                        self.spent.answered += 1
                    return Kept(
                        request.key,
                        request.kind,
                        cleaned_lines(answer.text),
                        answer.prompt_tokens,
                        answer.answer_tokens,
                        seconds,
                    )
                reason, pause = f"the answer {wrong}", 0.0
            if attempt < self.limits.retries:
                self._stopped.wait(pause)
        return self._stand_in(request, reason)

    def _stand_in(self, request: Request, reason: str) -> Kept:
        text = self.fallback.ask(request).text
        with self._lock:
            self.spent.fallbacks += 1
        return Kept(request.key, request.kind, text, 0, 0, 0.0, reason)

    def _admit(self, request: Request) -> None:
        """Counts a call before it goes out, and waits for its turn.

        Raises:
            ConfigError: If a limit is reached.
        """
        limits, cost = self.limits, tokens(request.prompt) if self.limits.tokens is not None else 0
        with self._lock:
            if limits.calls is not None and self.spent.calls >= limits.calls:
                raise ConfigError(
                    f"property 'liber_max_calls' is {limits.calls}, and so many calls were made; what was answered is "
                    f"kept: raise it and resume"
                )
            used = self.spent.prompt_tokens + self.spent.answer_tokens
            if limits.tokens is not None and used + cost > limits.tokens:
                raise ConfigError(
                    f"property 'liber_max_tokens' is {limits.tokens}, and {used} were used; what was answered is kept: "
                    f"raise it and resume"
                )
            self.spent.calls += 1
            pause = 0.0
            if limits.calls_per_minute is not None:
                now = time.monotonic()
                self._next = max(self._next, now)
                pause = self._next - now
                self._next += 60.0 / limits.calls_per_minute
        if pause:
            self._stopped.wait(pause)
