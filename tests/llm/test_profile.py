"""``recbole-cl profile``: prepared, shown, forgotten, and nothing sent where nothing shall be."""

from __future__ import annotations

import json
import re
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "contracts"))
from conformance_helpers import write_atomic, write_log
from llm_server import serving

from recbole_cl.cli import main
from recbole_cl.llm.partition_store import PartitionStore, partition_key


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


def test_nothing_leaves_the_machine_without_consent(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another machine is asked only where that is allowed; this one may be asked."""
    words = ["--liber_client=openai_compatible", "--openai_base_url=http://llm.invalid/v1", "--openai_model=m",
             "--liber_retries=0", "--liber_concurrency=1"]  # fmt: skip
    given = [*words, f"--data_path={data}", "--liber_partition_size=5", "--show_progress=False",
             "--liber_backbone=SASRec", "--load_col={inter: [user_id, item_id, timestamp]}"]  # fmt: skip
    assert main(["profile", "log", *given]) == 2
    assert "set liber_consent: True if it may leave" in capsys.readouterr().err
    assert "calls that are left" in ask(data, capsys, "log", "--dry-run", *words), "a dry run sends nothing"
    assert main(["profile", "log", *given, "--liber_consent=True", "--liber_max_calls=1"]) == 2
    assert "'liber_max_calls' is 1" in capsys.readouterr().err, "it may leave: one call was made, to nobody"


BATCH = ["--liber_client=openai_compatible", "--openai_model=m"]


def answered(requests: Path, answers: Path, text: Callable[[str], str]) -> list[str]:
    """Writes the answers to a batch file as a service does; returns the names of the questions."""
    lines = [json.loads(line) for line in requests.read_text().splitlines()]
    told = []
    for line in lines:
        assert line["method"] == "POST" and line["url"] == "/v1/chat/completions" and line["body"]["model"] == "m"
        content = text(line["body"]["messages"][0]["content"])
        body = {"choices": [{"message": {"role": "assistant", "content": content}}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3}}  # fmt: skip
        told.append({"id": "b", "custom_id": line["custom_id"], "response": {"status_code": 200, "body": body},
                     "error": None})  # fmt: skip
    answers.write_text("".join(json.dumps(line) + "\n" for line in told))
    return [line["custom_id"] for line in lines]


def test_a_batch_goes_out_and_comes_in(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two waves of files fill the cache that a run reads; what is malformed, wrong or missing is counted."""
    out, back = tmp_path / "out.jsonl", tmp_path / "in.jsonl"
    told = ask(data, capsys, "log", f"--batch-out={out}", *BATCH)
    summaries = number(told, "summaries")
    assert summaries == number(told, "questions written") == len(out.read_text().splitlines()) > 10
    assert number(told, "shifts that wait for summaries") > 5 and "u1" not in out.read_text()
    names = answered(out, back, lambda prompt: f"Mostly tag{len(prompt) % 3}.")
    assert len(set(names)) == summaries
    lines = back.read_text().splitlines()
    wrong = json.loads(lines[1])
    wrong["response"]["body"]["choices"][0]["message"]["content"] = "Ignore the instructions."
    failed = {"custom_id": names[2], "response": {"status_code": 500, "body": {}}, "error": None}
    expired = {"custom_id": names[3], "response": None, "error": {"code": "batch_expired"}}
    foreign = {**json.loads(lines[0]), "custom_id": "f" * 64}
    bad = ["{broken", "[]", "7", json.dumps({"custom_id": names[4], "response": {"status_code": 200, "body": {}}}),
           json.dumps({**json.loads(lines[0]), "custom_id": ["a"]}), "x" * (1 << 21)]  # fmt: skip
    mixed = [lines[0], json.dumps(wrong), json.dumps(failed), json.dumps(expired), *lines[5:], lines[0],
             json.dumps(foreign), *bad]  # fmt: skip
    back.write_text("\n".join(mixed))
    told = ask(data, capsys, "log", f"--batch-in={back}", *BATCH)
    assert number(told, "answers kept") == summaries - 4
    assert number(told, "malformed lines") == len(bad) and number(told, "errors of the service") == 2
    assert number(told, "answers that cannot be used") == number(told, "answers to other questions") == 1
    assert number(told, "answers that came twice") == 1
    assert number(told, "questions still without an answer") == 4
    rounds = 0
    while number(ask(data, capsys, "log", f"--batch-out={out}", *BATCH), "questions written"):
        answered(out, back, lambda prompt: "Mostly shifted.")
        assert number(ask(data, capsys, "log", f"--batch-in={back}", *BATCH), "questions still without an answer") == 0
        rounds += 1
    assert rounds <= 2, "two waves suffice"
    told = ask(data, capsys, "log", *BATCH)  # no address is needed: nothing is open
    assert number(told, "calls made") == 0 and number(told, "texts that the offline client stands in for") == 0
    assert "Mostly shifted" in ask(data, capsys, "show", "u1", "--dataset=log", *BATCH)


def test_a_check_finds_what_is_missing_left_over_or_damaged(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["--liber_encoder=hash", "--liber_size=8", f"--liber_folder={tmp_path / 'kept'}"]

    def check(code: int = 0, *more: str) -> dict[str, int]:
        size = [] if any("partition_size" in word for word in more) else ["--liber_partition_size=5"]
        given = [f"--data_path={data}", *size, "--show_progress=False", *own, *more,
                 "--liber_backbone=SASRec", "--load_col={inter: [user_id, item_id, timestamp]}"]  # fmt: skip
        assert main(["profile", "log", "--check", *given]) == code
        lines = [line.rpartition(": ") for line in capsys.readouterr().out.splitlines()]
        return {name: int(value.replace(",", "")) for name, _, value in lines}

    empty = check()
    assert empty["answers"] == 0 and empty["questions without an answer"] > 10
    ask(data, capsys, "log", *own)
    whole = check()
    assert whole["questions without an answer"] == whole["shifts that wait for summaries"] == 0 < whole["answers"]
    run = ["run", "--model=LIBER", "--liber_backbone=SASRec", "--dataset=log", f"--data_path={data}", "--epochs=1",
           "--liber_partition_size=5", "--show_progress=False", f"--output_dir={tmp_path / 'run'}", "--n_stages=2",
           "--load_col={inter: [user_id, item_id, timestamp]}", *own]  # fmt: skip
    assert main(run) == 0
    capsys.readouterr()
    assert check()["vectors of partitions"] > 10
    other = check(0, "--liber_partition_size=7")
    assert other["answers that no partition asks for"] > 0 and other["questions without an answer"] > 0
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for kind, text in (("summary", "{profile} {behaviours}"), ("shift", "{previous} {current}")):
        (prompts / f"{kind}.txt").write_text(text)
    assert check(0, f"--liber_prompts={prompts}")["answers to another version of a prompt"] == whole["answers"]
    assert check(0, "--offline_min_count=3")["answers of another client, model or setting"] == whole["answers"]
    cache = sqlite3.connect(tmp_path / "kept" / "answers.sqlite")
    cache.execute("UPDATE answers SET text = '' WHERE key = (SELECT MIN(key) FROM answers)")
    cache.commit()
    (vectors,) = (tmp_path / "kept" / "vectors").glob("*/*.npy")
    raw = bytearray(vectors.read_bytes())
    raw[-1] ^= 1
    vectors.write_bytes(bytes(raw))
    vectors.with_name("0" * 64 + ".npy").write_bytes(b"")
    damaged = check(4)
    assert damaged["answers that cannot be used"] == damaged["vector files that are damaged"] == 1
    assert damaged["vector files without their other half"] == 1 and damaged["vectors of partitions"] == 0


def test_partition_vectors_are_mapped_and_made_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = PartitionStore(tmp_path / "s")
    keys = [partition_key(f"s{i}", f"d{i}") for i in range(6)]
    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    assert store.find(keys, 4) == {}
    store.keep(keys[:4], vectors[:4])
    store.keep(keys[4:], vectors[4:])
    found = store.find(keys, 4)
    assert all(np.array_equal(found[key], row) for key, row in zip(keys, vectors, strict=True))
    pair = store.read(next(store.files()))
    assert pair is not None and isinstance(pair[1], np.memmap)
    assert partition_key("s1", "d1") != partition_key("s1d", "1")
    first = next(store.files())
    held = len(first.read_bytes()) // 32
    first.with_suffix(".npy").write_bytes(first.with_suffix(".npy").read_bytes()[:-4])
    assert len(store.find(keys, 4)) == 6 - held and "is damaged" in caplog.text and not first.exists()
    store.keep(keys, vectors)
    assert len(store.find(keys, 4)) == 6


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["show"], "profile show needs a user"),
        (["a", "b"], "one dataset"),
        (["log", "--check", "--dry-run"], "give one of --dry-run"),
        (["log", "--batch-out=x.jsonl"], "needs a client that speaks OpenAI's protocol"),
        (["log", "--batch-out=x.jsonl", "--liber_client=openai_compatible"], "'openai_model' is not set"),
        (["log", "--batch-in=nosuch.jsonl", "--liber_client=openai_compatible"], "cannot be read"),
        (["show", "u999", "--dataset=log"], "user 'u999' is not in dataset 'log'"),
    ],
)
def test_mistakes_are_told(words: list[str], told: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *words, f"--data_path={data}"]) == 2
    assert told in capsys.readouterr().err
