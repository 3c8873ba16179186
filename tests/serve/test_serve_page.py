"""The tutorial, from top to bottom: each command and each piece of Python, in one folder."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from recbole_cl import cli

PAGE = Path(__file__).resolve().parents[2] / "docs" / "update_and_recommend.md"


def write_shop(path: Path, start: str, n: int, users: int, seed: int) -> None:
    """Writes an export: customers who go round the shelves of one of four corners."""
    rng = np.random.default_rng(seed)
    times = np.datetime64(start) + np.arange(n) * np.timedelta64(130, "s")
    place: dict[int, int] = {}
    lines = ["user,item,time"]
    for time in times:
        user = int(rng.integers(users))
        place[user] = (place.get(user, int(rng.integers(12))) + 1) % 12 if rng.random() < 0.8 else int(rng.integers(12))
        lines.append(f"u{user},i{(user % 4) * 12 + place[user]},{time}")
    path.write_text("\n".join(lines) + "\n")


def pieces() -> list[tuple[str, str]]:
    """Returns the page's commands and Python, in order."""
    return re.findall(r"^```(bash|python)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shop(tmp_path / "shop.csv", "2024-05-01T12:00:00", 1500, 40, 0)
    write_shop(tmp_path / "today.csv", "2024-05-04T00:00:00", 200, 44, 1)
    (tmp_path / "gone.list").write_text("i7\ni8\n")
    (tmp_path / "left.list").write_text("u5\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RECBOLE_CL_DATA", raising=False)
    told: dict[str, list[str]] = {}
    for kind, text in pieces():
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), {})
            continue
        for line in text.splitlines():
            words = shlex.split(line)
            assert words[0] == "recbole-cl"
            capsys.readouterr()
            code = cli.main(words[1:])
            out, err = capsys.readouterr()
            assert code == 0, f"{line}: {err}"
            told.setdefault(words[1], []).append(out)
    assert (tmp_path / "dataset" / "shop" / "shop.inter").is_file() and "rows          1,500" in told["import"][0]
    by_user, by_history = ([json.loads(line) for line in out.splitlines()] for out in told["recommend"])
    assert [(one["user"], one["status"], len(one["items"])) for one in by_user] == [
        ("u1", "known", 3), ("u2", "known", 3), ("somebody", "unknown", 0),
    ]  # fmt: skip
    assert len(by_history) == 1 and len(by_history[0]["items"]) == 3 and "i9" not in by_history[0]["items"]
    assert told["update"][0].startswith("promoted: ndcg@10") and "4 new users" in told["update"][0]
    before, after = told["versions"]
    assert before.splitlines()[1].startswith("*   1") and after.splitlines()[0].startswith("*   0")
    assert told["rollback"] == ["version 0 is served; it was 1\n"]


def test_the_page_tells_every_serving_command() -> None:
    named = {shlex.split(line)[1] for kind, text in pieces() if kind == "bash" for line in text.splitlines()}
    assert named == {"import", "run", "recommend", "export", "update", "versions", "rollback"}


# -- exit codes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a shop's run."""
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder / "shop.csv", "2024-05-01T12:00:00", 1500, 40, 0)
    write_shop(folder / "today.csv", "2024-05-04T00:00:00", 200, 44, 1)
    data = f"--data_path={folder / 'data'}"
    assert cli.main(["import", str(folder / "shop.csv"), "--user=user", "--item=item", "--time=time", data]) == 0
    run = ["run", "--dataset=shop", data, "--model=BPR", "--epochs=3", "--n_stages=2", "--show_progress=False"]
    assert cli.main([*run, f"--output_dir={folder / 'run'}"]) == 0
    return folder


def test_a_timer_reads_exit_codes(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = ["--new-data", str(shop / "today.csv")]
    run = str(shop / "run")
    (shop / "few.csv").write_text("user,item,time\nu1,i2,2024-05-05T00:00:00\nu1,i3,2024-05-05T00:00:01\n")
    assert cli.main(["update", run, "--new-data", str(shop / "few.csv"), "--json"]) == 3
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["promoted"] is False and told["champion"] == 0 and "too few" in told["reason"]
    (shop / "broken.csv").write_text("user,item,time\nu1,i2,2024-05-05T00:00:00\nu1,,2024-05-05T00:00:01\n")
    assert cli.main(["update", run, "--new-data", str(shop / "broken.csv")]) == 2
    assert "broken.csv, line 3: '' in column 'item' is empty" in capsys.readouterr().err
    assert cli.main(["update", str(shop / "nowhere"), *new]) == 2
    assert "is no folder" in capsys.readouterr().err
    assert cli.main(["update", run, *new, "--epoch=3"]) == 2
    assert "did you mean 'epochs'" in capsys.readouterr().err
    assert cli.main(["update", run, *new, "--dry-run", "--margin=1"]) == 0
    assert "dry run, nothing has changed" in capsys.readouterr().out
    assert cli.main(["rollback", run]) == 2
    assert "has no champion before it" in capsys.readouterr().err
    assert cli.main(["update", run, *new, "--margin=1"]) == 0
    assert cli.main(["versions", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["champion"] == 2, (
        "the one of too few rows is version 1, a challenger"
    )


def test_lists_are_asked_by_file(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shop / "users.txt").write_text("u1\n\nu2\n")
    run = str(shop / "run")
    assert cli.main(["recommend", run, "--users-file", str(shop / "users.txt"), "--k", "2", "--seen", "keep"]) == 0
    assert [json.loads(line)["user"] for line in capsys.readouterr().out.splitlines()] == ["u1", "u2"]
    assert cli.main(["recommend", run, "--users", "u1", "--k", "0"]) == 2
    assert cli.main(["recommend", run]) == 2
    assert "give --users (or --users-file), or --history" in capsys.readouterr().err
