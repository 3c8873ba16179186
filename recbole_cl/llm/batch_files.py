"""Questions as a file for a batch service, and its answers: OpenAI's JSON lines, which vLLM's batch runner reads too.

A line out is a request, named by the question's name in the cache; a line in is the answer to one. What comes back is
somebody else's: each line is read for itself, and what is not an answer to a question of ours is counted and left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_cl import disk
from recbole_cl.errors import ConfigError
from recbole_cl.llm.cache import Kept
from recbole_cl.llm.clients.base import Request
from recbole_cl.llm.texts import cleaned_lines, fault, tokens

URL = "/v1/chat/completions"
LONGEST = 1 << 20
"""Characters of a line that are read."""


def write_requests(path: str | os.PathLike[str], requests: Sequence[Request], client: Any) -> int:
    """Writes questions, a line each, by one rename; returns how many.

    Args:
        path: The file.
        requests: Named questions, each once.
        client: Makes the body of a request (``body(request)``).

    Raises:
        ConfigError: If the client does not speak the protocol, or the file cannot be written.
    """
    if not hasattr(client, "body"):
        raise ConfigError("--batch-out needs a client that speaks OpenAI's protocol: --liber_client=openai_compatible")
    file = Path(path).expanduser()
    part = file.with_name(f".{os.getpid()}-{file.name}.part")
    try:
        disk.refuse_link(file, "--batch-out")
        with open(disk.create(part), "w", encoding="utf-8") as out:
            for request in requests:
                line = {"custom_id": request.key, "method": "POST", "url": URL, "body": client.body(request)}
                out.write(json.dumps(line) + "\n")
        os.replace(part, file)
    except OSError as error:
        raise ConfigError(
            f"--batch-out: {str(file)!r} cannot be written ({error.strerror or error}); give another file"
        ) from error
    return len(requests)


@dataclass
class Read:
    """What a file of answers holds.

    Attributes:
        kept: Answers that can be used, by the question's name; the first of two.
        malformed: Lines that are no answer of the protocol.
        failed: Lines that tell an error of the service.
        unusable: Answers that are empty, too long or repeat instructions.
        foreign: Answers to questions that are not ours, or of another version of a prompt.
        twice: Answers to a question that had one.
    """

    kept: dict[str, Kept] = field(default_factory=dict)
    malformed: int = 0
    failed: int = 0
    unusable: int = 0
    foreign: int = 0
    twice: int = 0


def read_answers(path: str | os.PathLike[str], asked: Mapping[str, Request]) -> Read:
    """Reads a file of answers.

    Args:
        path: The file.
        asked: Our questions by name.

    Raises:
        ConfigError: If the file cannot be read.
    """
    found = Read()
    try:
        with Path(path).expanduser().open(encoding="utf-8", errors="replace") as lines:
            while line := lines.readline(LONGEST + 1):
                whole = line.endswith("\n") or len(line) <= LONGEST
                while not whole and (rest := lines.readline(LONGEST)):  # the remainder of a line that is too long
                    whole = rest.endswith("\n")
                    line = "too long"
                if line.strip():
                    _read_line(line, asked, found)
    except OSError as error:
        raise ConfigError(f"--batch-in: {str(path)!r} cannot be read ({error.strerror})") from error
    return found


def _read_line(line: str, asked: Mapping[str, Request], found: Read) -> None:
    try:
        answer = json.loads(line)
        key, response = answer["custom_id"], answer.get("response")
        if answer.get("error") is not None or (response is not None and response.get("status_code", 200) != 200):
            found.failed += 1
            return
        body = response["body"]
        text, usage = body["choices"][0]["message"]["content"], body.get("usage") or {}
        if not isinstance(text, str) or not isinstance(key, str):
            raise TypeError("no text")
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        found.malformed += 1
        return
    request = asked.get(key)
    if request is None:
        found.foreign += 1
    elif key in found.kept:
        found.twice += 1
    elif fault(text) is not None:
        found.unusable += 1
    else:
        read, written = (
            count if isinstance(count, int) and count >= 0 else tokens(other)
            for count, other in zip(counts, (request.prompt, text), strict=True)
        )
        found.kept[key] = Kept(key, request.kind, cleaned_lines(text), read, written, 0.0)
