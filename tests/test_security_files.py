"""Files are written whole, with the mode that the umask leaves, and never through a link that somebody planted.

Each attack plants links to files of a victim where a run, study, cache, ledger or version is about to write, and looks
at the victim's files afterwards.
"""

from __future__ import annotations

import ast
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from run_helpers import ROOT, SMALL, run, toy

from recbole_cl import checkpoint, disk
from recbole_cl.errors import ConfigError, OutputError
from recbole_cl.federated.ledger import Ledger
from recbole_cl.federated.privacy import Release
from recbole_cl.generative.index import SemanticIds, write_index
from recbole_cl.importer import Columns, import_log
from recbole_cl.llm.cache import AnswerCache
from recbole_cl.llm.store import VectorStore
from recbole_cl.model import liber_knowledge
from recbole_cl.report import render_folder, write_report
from recbole_cl.results.journal import OWN, open_folder
from recbole_cl.results.records import Records
from recbole_cl.study import read_plan, walk
from recbole_cl.study.walk import run_cell
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift
from recbole_cl.training.store import keep_stream
from recbole_cl.training.versions import Versions, locked

MINE = "mine, and nobody else's\n"
LINK = "is a symbolic link"


class Victim:
    """A file and a folder of somebody else, to which links are planted."""

    def __init__(self, folder: Path) -> None:
        self.file, self.folder = folder / "victim.txt", folder / "victim"
        self.missing = folder / "victim-not-yet"
        self.folder.mkdir(parents=True)
        self.file.write_text(MINE)
        (self.folder / "kept.txt").write_text(MINE)

    def untouched(self) -> bool:
        """Tells whether both are as they were."""
        same = self.file.read_text() == MINE and not self.missing.exists()
        return same and [path.name for path in self.folder.iterdir()] == ["kept.txt"]


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    """A victim, whom a test must not have harmed."""
    made = Victim(tmp_path / "elsewhere")
    yield made
    assert made.untouched(), "a link was followed, and what it leads to overwritten"


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> PlantedDrift:
    return toy(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, log: PlantedDrift) -> Path:
    """The folder of a finished run, which itself is a link; temporary names of a killed run's lay there as links."""
    base = tmp_path_factory.mktemp("finished")
    made, real, folder = Victim(base / "elsewhere"), base / "disk", base / "run"
    (real / "checkpoints").mkdir(parents=True)
    folder.symlink_to(real)
    for name in (".probe", ".result.json.tmp", ".records.csv.tmp", ".report.html.tmp"):
        (real / name).symlink_to(made.file)
    (real / "checkpoints" / ".writing").symlink_to(made.folder)
    run(log, folder, "BPR", epochs=1, resume=True)
    assert made.untouched()
    links = [path.relative_to(real).as_posix() for path in real.rglob("*") if path.is_symlink()]
    assert set(links) <= {"earlier-1/checkpoints/.writing"}, "what a killed run may leave is cleared or moved away"
    return folder


# -- one helper ---------------------------------------------------------------------------------------------------

WRITES = {
    "write_text", "write_bytes", "touch", "save_file", "write_image", "write_html", "savez", "savefig", "to_parquet",
    "to_pickle", "save_pretrained", "mkstemp", "NamedTemporaryFile", "copy", "copyfile", "copytree", "move",
}  # fmt: skip
"""Calls that write a file, by the last part of their name."""
ELSEWHERE = {
    ("checkpoint.py", "write_text"): "into a folder that was just made",
    ("config/blocks.py", "open"): "into a temporary folder",
    ("study/parity.py", "write_text"): "into a temporary folder",
    ("study/parity.py", "copy"): "into a temporary folder",
    ("model/adapter_export.py", "save_pretrained"): "links in the folder are refused before",
    ("study/claims.py", "os.open"): "a file that is not there, or none (O_EXCL)",
    ("study/claims.py", "write_text"): "under a name that is drawn",
    ("study/claims.py", "touch"): "under a name that is drawn",
    ("training/peak_memory.py", "write_text"): "the counter of /proc",
    ("cli.py", "os.open"): "the null device",
    ("lock.py", "os.open"): "the lock, which stays where it is; O_NOFOLLOW",
}
"""Writes that do not go through :mod:`recbole_cl.disk`, and why they need not."""


def _writes(source: str) -> set[str]:
    """Returns the calls of a source that may write a file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        last = name.rpartition(".")[2]
        if name == "os.open":
            found |= set() if "os.O_RDONLY" in ast.unparse(node.args[1]) else {name}
        elif last in ("open", "fdopen"):
            modes = [*node.args, *(k.value for k in node.keywords if k.arg == "mode")]
            texts = {a.value for a in modes if isinstance(a, ast.Constant) and isinstance(a.value, str)}
            first = ast.unparse(node.args[0]) if node.args else ""
            given = re.match(r"(disk\.)?(create|open_kept)\(|descriptor$", first) is not None  # made or opened before
            if not given and any(set(text) <= set("rwxab+t") and set(text) & set("wxa+") for text in texts):
                found.add("open")
        elif last in ("save", "savefig") and node.args and ast.unparse(node.args[0]) in ("file", "image"):
            continue  # into what was opened before, or into memory
        elif last in WRITES and not name.startswith(("copy.", "self.")) and name != "torch.save":
            if last == "copy" and not name.startswith("shutil."):
                continue
            found.add(last)
        elif (
            last == "to_csv"
            and "records" not in name
            and any(isinstance(a, (ast.Constant, ast.Name, ast.BinOp)) for a in node.args)
        ):
            found.add("to_csv")
        elif name in ("torch.save", "np.save", "json.dump", "pickle.dump", "yaml.dump"):
            found.add(name)
    return found


def test_whatever_is_written_goes_through_one_helper() -> None:
    package = ROOT / "recbole_cl"
    found = {
        (path.relative_to(package).as_posix(), call)
        for path in package.rglob("*.py")
        for call in _writes(path.read_text(encoding="utf-8"))
        if path.name != "disk.py"
    }
    assert found - ELSEWHERE.keys() == set(), "write by recbole_cl.disk, or say here why not"
    assert ELSEWHERE.keys() - found == set(), "nothing writes so any more"


@pytest.mark.parametrize(
    "source, call",
    [
        ("open(path, 'w')", "open"),
        ("path.open('a+b')", "open"),
        ("path.open(mode='x', encoding='utf-8')", "open"),
        ("(folder / 'x').write_text('')", "write_text"),
        ("os.open(path, os.O_WRONLY)", "os.open"),
        ("save_file(tensors, path)", "save_file"),
        ("shutil.copy(a, b)", "copy"),
        ("frame.to_csv(folder / 'x.csv')", "to_csv"),
        ("torch.save(state, path)", "torch.save"),
    ],
)
def test_the_reader_of_writes_reads_them_all(source: str, call: str) -> None:
    """The test above is worth what this function finds."""
    assert _writes(f"def f():\n    {source}\n") == {call}
    assert _writes("path.open(encoding='utf-8')\nopen(path, 'rb')\nopen(disk.create(path), 'wb')\nx.copy()") == set()


def test_a_file_is_whole_or_the_old_one(tmp_path: Path, victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some" / "file"
    disk.write_atomically(path, "old: ü")
    assert path.read_bytes() == "old: ü".encode()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(disk.os, "fsync", full)
        with pytest.raises(OutputError, match="the disk is full; free space and go on with --resume=True"):
            disk.write_atomically(path, "new")
    assert path.read_text() == "old: ü" and [p.name for p in path.parent.iterdir()] == ["file"]
    for kind in (os.mkfifo, lambda there: os.symlink(victim.file, there), lambda there: Path(there).write_text("cut")):
        kind(path.with_name(".file.tmp"))  # left there by a killed process, or planted: never waited for, never written
        disk.write_atomically(path, "new")
        assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["file"]
    with monkeypatch.context() as patched:  # a link that comes back between the two steps
        patched.setattr(Path, "unlink", lambda self, **_: None)
        path.with_name(".file.tmp").symlink_to(victim.file)
        with pytest.raises(FileExistsError):
            disk.create(path.with_name(".file.tmp"))
    os.link(path, tmp_path / "other")
    disk.write_atomically(path, "newer")
    assert (tmp_path / "other").read_text() == "new", "a second name of the old file keeps the old content"


# -- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_a_run_whose_files_are_links_is_refused_before_it_begins(tmp_path: Path, victim: Victim, name: str) -> None:
    """Also a link that leads nowhere yet: written through, it would make a file elsewhere."""
    folder = tmp_path / "run"
    folder.mkdir()
    for target in (victim.folder, victim.file, victim.missing):
        (folder / name).symlink_to(target)
        with pytest.raises(OutputError, match=rf"output_dir: .*{name} {LINK}.*remove the link") as caught:
            open_folder(folder)
        assert caught.value.exit_code == 2
        assert os.readlink(folder / name) == str(target), "somebody's link is not removed for him"
        (folder / name).unlink()


def test_all_that_a_run_writes_is_looked_at(finished: Path) -> None:
    """The list that is checked before a run holds what lies in a run's folder after it."""
    assert {path.name for path in finished.iterdir()} - {"earlier-1"} <= set(OWN)


def test_links_planted_while_a_run_goes_on(finished: Path, tmp_path: Path, victim: Victim) -> None:
    """What comes between the check and the end of a run is refused, too, each by its name."""
    folder, state = tmp_path / "run", {"a": torch.ones(2)}
    folder.mkdir()
    records = Records()
    records.add(metric="ndcg@10", t=0, s=0, value=0.5, n=1)
    writes: dict[str, Callable[[], Any]] = {
        "result.json": lambda: checkpoint.write_atomically(folder / "result.json", "{}"),
        "records.csv": lambda: records.to_csv(folder / "records.csv"),
        "report.html": lambda: write_report({}, folder),
        "checkpoints": lambda: checkpoint.save(folder / "checkpoints", 1, state, 1),
        "versions": lambda: Versions(folder).add(state, {"store": None}, 1),
        "base": lambda: checkpoint.save(folder / "base", 1, state, 1),
    }
    for name, write in writes.items():
        for target in (victim.folder, victim.file, victim.missing):
            (folder / name).symlink_to(target)
            with pytest.raises(OutputError, match=f"{name} {LINK}"):
                write()
            (folder / name).unlink()
        write()  # and without a link it is written
        assert (folder / name).exists()


def test_a_checkpoint_in_the_place_of_a_link(tmp_path: Path, victim: Victim) -> None:
    """The number that comes next and the folder in which it is made are cleared, not followed."""
    folder, state = tmp_path / "checkpoints", {"a": torch.ones(2)}
    folder.mkdir()
    for name in (".writing", "00000001"):
        (folder / name).symlink_to(victim.folder)
    assert torch.equal(checkpoint.read(checkpoint.save(folder, 1, state, 1))["a"], state["a"])
    (folder / "00000000").symlink_to(victim.folder)  # an old one, to be removed
    checkpoint.save(folder, 2, state, 1)


def test_the_store_of_a_run(finished: Path, tmp_path: Path, victim: Victim, log: PlantedDrift) -> None:
    from run_helpers import configure

    from recbole_cl.stream.build import build_stream

    stream = build_stream(configure(log, tmp_path / "run", "BPR"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "store").symlink_to(victim.folder)
    with pytest.raises(OutputError, match=f"store {LINK}"):
        keep_stream(tmp_path / "run", stream)
    (tmp_path / "run" / "store").unlink()
    name = next((finished / "store").iterdir()).name
    (tmp_path / "run" / "store").mkdir()
    (tmp_path / "run" / "store" / f".writing-{os.getpid()}").symlink_to(victim.folder)
    (tmp_path / "run" / "store" / name).symlink_to(victim.folder)
    assert keep_stream(tmp_path / "run", stream) == name
    assert not (tmp_path / "run" / "store" / name).is_symlink()


@pytest.mark.parametrize("inner", ["versions", ".lock", "versions/index.json"])
def test_versions(finished: Path, tmp_path: Path, victim: Victim, inner: str) -> None:
    path = tmp_path / "run" / inner
    path.parent.mkdir(parents=True)
    path.symlink_to(victim.folder if inner == "versions" else victim.file)
    told = f"{path.name} is no plain file; remove it" if inner == ".lock" else f"{path.name} {LINK}"
    with pytest.raises((OutputError, ConfigError), match=told), locked(tmp_path / "run"):
        Versions(tmp_path / "run").write()


def test_a_report_made_again(finished: Path, tmp_path: Path, victim: Victim) -> None:
    """A folder that came from somebody else, with links in it, is shown without harm."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text((finished / "result.json").read_text())
    (tmp_path / "run" / ".report.html.tmp").symlink_to(victim.file)
    render_folder(tmp_path / "run")
    (tmp_path / "run" / "report.html").unlink()
    (tmp_path / "run" / "report.html").symlink_to(victim.file)
    with pytest.raises(OutputError, match=f"report.html {LINK}"):
        render_folder(tmp_path / "run")


def test_caches_ledgers_and_datasets(tmp_path: Path, victim: Victim) -> None:
    def plant(name: str, target: Path | None = None) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target or victim.missing)
        return path

    for suffix in ("", "-wal", "-shm", "-journal"):
        plant(f"answers{suffix}/answers.sqlite{suffix}")
        with pytest.raises(ConfigError, match=f"liber_cache.*{LINK}"):
            AnswerCache(tmp_path / f"answers{suffix}" / "answers.sqlite")
    plant("link/.ledger")
    with pytest.raises(OutputError, match=f"protofed_ledger: .*{LINK}"):
        Ledger(tmp_path / "link" / ".ledger", np.inf, 1e-5).release("r", "a", Release(2.0), lambda: np.ones(1))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match=r"protofed_ledger: .*pipe is not a file"):
        Ledger(tmp_path / "pipe", np.inf, 1e-5).charges()
    vectors = VectorStore(tmp_path / "vectors", "random", {}).folder
    vectors.rmdir()
    vectors.symlink_to(victim.folder)
    with pytest.raises(ConfigError, match=f"text_cache.*{LINK}"):
        VectorStore(tmp_path / "vectors", "random", {})
    index = SemanticIds(["i1"], np.zeros((1, 2), dtype=np.int64), (1, 1))
    with pytest.raises(OutputError, match=f"semantic_ids: .*{LINK}"):
        write_index(plant("index.json"), index)
    table = tmp_path / "table.csv"
    table.write_text("user,item,time\nu1,i1,1\nu1,i2,2\n")
    names = Columns(user="user", item="item", time="time")
    for suffix in ("inter", "import.json"):
        plant(f"data/{suffix[:5]}/{suffix[:5]}.{suffix}")
        with pytest.raises(OutputError, match=f"data_path: .*{LINK}"):
            import_log(table, names, suffix[:5], tmp_path / "data", overwrite=True)
    plant("toy/planted-drift/planted-drift.inter")
    with pytest.raises(OutputError, match=LINK):
        write_planted_drift(tmp_path / "toy")


def test_vectors_of_liber(tmp_path: Path, victim: Victim, caplog: pytest.LogCaptureFixture) -> None:
    """They are worth no run: what cannot be kept is told. A link in the place of a file is replaced."""
    made = {"mean": torch.ones(2)}
    (tmp_path / "vectors").symlink_to(victim.folder)
    liber_knowledge._write(tmp_path / "vectors" / "a.safetensors", made)
    assert "not kept" in caplog.text and LINK in caplog.text
    (tmp_path / "vectors").unlink()
    (tmp_path / "vectors").mkdir()
    for name in ("a.safetensors", f".{os.getpid()}-a.safetensors.part"):
        (tmp_path / "vectors" / name).symlink_to(victim.file)
    liber_knowledge._write(tmp_path / "vectors" / "a.safetensors", made)
    assert [path.is_symlink() for path in (tmp_path / "vectors").iterdir()] == [False]


@pytest.mark.parametrize("kind, name", [("npy", "items.npy"), ("faiss", "items.faiss"), ("npy", "items.tokens.txt")])
def test_exported_vectors(finished: Path, tmp_path: Path, victim: Victim, kind: str, name: str) -> None:
    import recbole_cl
    from recbole_cl.serve.export import export

    served, folder = recbole_cl.load(finished), tmp_path / "out"
    folder.mkdir()
    (folder / f".{os.getpid()}-{name}").symlink_to(victim.file)
    (folder / name).symlink_to(victim.file)
    with pytest.raises(OutputError, match=f"{name} {LINK}"):
        export(served, folder, kind=kind)
    (folder / name).unlink()
    export(served, folder, kind=kind)
    assert (folder / name).is_file() and not (folder / name).is_symlink()


def test_questions_for_a_batch_service(tmp_path: Path, victim: Victim) -> None:
    from recbole_cl.llm.batch_files import write_requests
    from recbole_cl.llm.clients.base import Request

    class Speaks:
        def body(self, request: Request) -> dict[str, str]:
            return {"prompt": request.prompt}

    out = tmp_path / "questions.jsonl"
    (tmp_path / f".{os.getpid()}-{out.name}.part").symlink_to(victim.file)
    assert write_requests(out, [Request("summary", "What of 1?", {}, "k")], Speaks()) == 1
    out.unlink()
    out.symlink_to(victim.file)
    with pytest.raises(ConfigError, match=f"--batch-out: .*{LINK}"):
        write_requests(out, [], Speaks())


# -- studies --------------------------------------------------------------------------------------------------------


def _study(folder: Path, log: PlantedDrift, **changed: Any) -> Path:
    settings = {**log.settings(), **SMALL, "epochs": 1}
    preset = {
        "datasets": [log.name],
        "schedulers": [settings["scheduler"]],
        "models": ["BPR"],
        "strategies": ["FineTune"],
        "seeds": [1],
        "settings": settings,
        **changed,
    }
    path = folder / "trial.yaml"
    path.write_text(yaml.safe_dump({"presets": {"laptop": preset}}), encoding="utf-8")
    return path


@pytest.mark.parametrize("part", ["", "/Boundaries", "/Boundaries/BPR", "/Boundaries/BPR/FineTune/seed1"])
def test_a_folder_of_a_study_that_is_a_link(tmp_path: Path, victim: Victim, log: PlantedDrift, part: str) -> None:
    plan = read_plan(_study(tmp_path, log), "laptop")
    path = tmp_path / f"out/{log.name}{part}"
    path.parent.mkdir(parents=True)
    path.symlink_to(victim.folder)
    with pytest.raises(OutputError, match=f"{path.name} {LINK}"):
        walk(plan, tmp_path / "out")


@pytest.mark.parametrize("name", ["table.md", "table.csv", "plots.html"])
def test_what_a_study_writes_at_its_end_is_looked_at_first(
    tmp_path: Path, victim: Victim, log: PlantedDrift, name: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).symlink_to(victim.file)
    with pytest.raises(OutputError, match=f"{name} {LINK}"):
        walk(read_plan(_study(tmp_path, log), "laptop"), tmp_path / "out")


@pytest.mark.parametrize("name", ["cell.json", "refused.json", "probe.json", "result.json"])
def test_a_cell_of_a_study(tmp_path: Path, victim: Victim, log: PlantedDrift, name: str) -> None:
    (cell,) = read_plan(_study(tmp_path, log), "laptop").cells
    own = tmp_path / "own"
    own.mkdir()
    (own / name).symlink_to(victim.missing)
    found = run_cell(dict(cell.settings), str(own), cell.digest, 1)
    assert found["state"] == "failed" and f"{name} {LINK}" in found["told"], "the study goes on, and tells it"


# -- names ----------------------------------------------------------------------------------------------------------

BAD = ["..", ".", "a/b", "../../escaped", "/etc/escaped", "a\\b", "a\0b", "", "x" * 256]


@pytest.mark.parametrize("label", BAD)
@pytest.mark.parametrize("axis", ["datasets", "schedulers", "models", "strategies"])
def test_a_label_of_a_study_names_a_folder_of_it(tmp_path: Path, log: PlantedDrift, axis: str, label: str) -> None:
    """Refused as the file is read: neither renamed in silence nor followed out of the study's folder."""
    entry = {label: {"dataset": log.name, "scheduler": "Boundaries", "model": "BPR", "strategy": "FineTune"}}
    with pytest.raises(
        ConfigError, match=rf"trial.yaml, preset laptop: {axis}: the label .* is (not a|a) name"
    ) as caught:
        read_plan(_study(tmp_path, log, **{axis: [entry]}), "laptop")
    assert label[:40] in unescaped(str(caught.value))


def unescaped(message: str) -> str:
    """Returns a message with the escapes of a quoted text undone, without evaluating it."""
    return message.replace("\\\\", "\\").replace("\\x00", "\0")


def test_labels_that_are_names_stay(tmp_path: Path, log: PlantedDrift) -> None:
    names = ["EWC + ER, weak", "...", ".hidden", "a..b", "é", "10%"]
    plan = read_plan(_study(tmp_path, log, strategies=[{name: {"strategy": "FineTune"}} for name in names]), "laptop")
    folders = [cell.folder.split("/")[3] for cell in plan.cells]
    assert folders == ["EWC_+_ER_weak", "...", ".hidden", "a..b", "é", "10_"]
    inside = (tmp_path / "out").resolve()
    assert all(inside in (inside / cell.folder).resolve().parents for cell in plan.cells)


@pytest.mark.parametrize("preset", ["..", "a/../../b", "a/b", "a\0b"])
def test_a_preset_names_the_folder_of_a_study(tmp_path: Path, log: PlantedDrift, preset: str) -> None:
    path = _study(tmp_path, log)
    path.write_text(path.read_text().replace("laptop:", f"{yaml.safe_dump(preset, default_style=chr(34)).strip()}:"))
    with pytest.raises(ConfigError, match=r"the preset .* is not a name"):
        read_plan(path, preset)


@pytest.mark.parametrize("name", BAD)
def test_a_dataset_is_a_name(tmp_path: Path, name: str) -> None:
    from recbole_cl.config import CLConfig

    with pytest.raises(ConfigError, match="dataset"):
        CLConfig("BPR", name, config_dict={"data_path": str(tmp_path)})
    table = tmp_path / "table.csv"
    table.write_text("user,item,time\nu1,i1,1\nu1,i2,2\n")
    with pytest.raises(ConfigError, match="name"):
        import_log(table, Columns(user="user", item="item", time="time"), name, tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


def test_the_folder_of_a_run_is_called_after_names(monkeypatch: pytest.MonkeyPatch, log: PlantedDrift) -> None:
    """A strategy of another package that has a path for a name does not lead a run out of ``runs/``."""
    from recbole_cl.config import CLConfig
    from recbole_cl.config.folder import run_folder

    config = CLConfig("BPR", log.name, config_dict=log.settings())
    assert run_folder(config) == Path("runs/BPR-planted-drift-FineTune-Boundaries-seed2020")
    monkeypatch.setattr(type(config), "strategy_name", "x/../../../escaped")
    with pytest.raises(ConfigError, match=r"the run's name .* is not a name; set output_dir"):
        run_folder(config)


@pytest.mark.parametrize("store", ["..", "../escaped", "a/b", "/etc", ".hidden", ""])
def test_the_store_of_a_version_is_a_name(tmp_path: Path, store: str) -> None:
    from recbole_cl.errors import CheckpointError
    from recbole_cl.training.store import read_stream

    with pytest.raises(CheckpointError, match="is not the name of a store"):
        read_stream(tmp_path, store, None)


# -- modes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["022", "077", "002"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The umask of the process, for a test."""
    wanted = int(request.param, 8)
    before = os.umask(wanted)
    yield wanted
    os.umask(before)


def test_every_file_has_the_mode_that_the_umask_leaves(tmp_path: Path, log: PlantedDrift, umask: int) -> None:
    """Checkpoints, the first stage, the store, versions, results and vectors: 0666 without the umask, folders 0777."""
    folder = tmp_path / "run"
    run(log, folder, "BPR", epochs=1, serve=True, keep_base=True)
    liber_knowledge._write(folder / "vectors" / "a.safetensors", {"mean": torch.ones(1)})
    with locked(folder):
        pass
    AnswerCache(folder / "answers.sqlite").close()
    Ledger(folder / "ledger", np.inf, 1e-5).charges()
    VectorStore(folder / "texts", "random", {}).keep(["a"], torch.ones(1, 2))
    files = [path for path in folder.rglob("*") if path.is_file()]
    told = {path.relative_to(folder).parts[0] for path in files}
    assert told >= {*OWN} - {"frozen", "rows.csv"} | {"vectors", "answers.sqlite", "ledger", "texts"}
    assert sum(path.suffix == ".safetensors" for path in files) >= 6
    # SQLite makes its files with 0644, whatever more the umask would leave.
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files}
    assert modes == {n: oct((0o644 if n == "answers.sqlite" else 0o666) & ~umask) for n in modes}
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o777 & ~umask}
