"""``recbole-cl profile``: prepared, shown, forgotten, and nothing sent where nothing shall be."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "contracts"))
from conformance_helpers import write_atomic, write_log
from llm_server import serving

from recbole_cl.cli import main


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A log with items; the working directory is empty."""
    made = write_log(tmp_path / "data", n_users=8, steps=300)
    items = sorted({i for _, i, _ in made.rows})
    write_atomic(
        made.folder / "log" / "log.item",
        ["item_id:token", "title:token_seq", "tags:token_seq"],
        [(i, f"Title {i[1:]}", f"tag{int(i[1:]) % 3} tag{int(i[1:]) % 5}") for i in items],
    )
    monkeypatch.chdir(tmp_path)
    return made.folder


def ask(data: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    given = [
        "--liber_backbone=SASRec", f"--data_path={data}", "--liber_partition_size=5", "--show_progress=False",
        "--load_col={inter: [user_id, item_id, timestamp]}",
    ]  # fmt: skip
    code = main(["profile", *words, *given])
    told = capsys.readouterr()
    assert code == 0, told.err
    return told.out


def number(text: str, name: str) -> int:
    found = re.search(rf"^{re.escape(name)}: ([\d,]+)$", text, re.MULTILINE)
    assert found, text
    return int(found[1].replace(",", ""))


def test_profile_prepares_shows_and_forgets(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = ask(data, capsys, "log", "--dry-run")
    calls = number(dry, "calls that are left, at most")
    assert calls == number(dry, "calls in all, at most") > 20
    assert "not asked yet" in ask(data, capsys, "show", "u1", "--dataset=log")
    assert number(ask(data, capsys, "log"), "texts") == calls
    assert number(ask(data, capsys, "log"), "calls made") == 0
    assert number(ask(data, capsys, "log", "--dry-run"), "calls that are left, at most") == 0
    shown = ask(data, capsys, "show", "u1", "--dataset=log")
    assert "not asked yet" not in shown and "tag" in shown and "changed" in shown
    assert "removed" in ask(data, capsys, "forget", "u1", "--dataset=log")
    assert "not asked yet" in ask(data, capsys, "show", "u1", "--dataset=log")
    assert "not asked yet" not in ask(data, capsys, "show", "u2", "--dataset=log")
    assert number(ask(data, capsys, "log"), "calls made") > 0


def test_nothing_is_sent_where_nothing_shall_be(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda number, prompt: ("answer", "Mostly rock.")) as server:
        client = ["--liber_client=openai_compatible", f"--openai_base_url={server.url}", "--openai_model=m"]
        prompt = ask(data, capsys, "--show-prompt", "u1", "--dataset=log", *client)
        assert "Title" in prompt and "u1" not in prompt and not re.search(r"\bi\d", prompt)
        ask(data, capsys, "log", "--dry-run", *client)
        ask(data, capsys, "show", "u1", "--dataset=log", *client)
        assert server.calls == 0
        told = ask(data, capsys, "log", *client)
        assert number(told, "calls made") == server.calls > 0
        assert set(server.prompts.values()) == {1}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["show"], "profile show needs a user"),
        (["a", "b"], "one dataset"),
        (["show", "u999", "--dataset=log"], "user 'u999' is not in dataset 'log'"),
    ],
)
def test_mistakes_are_told(words: list[str], told: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *words, f"--data_path={data}"]) == 2
    assert told in capsys.readouterr().err
