"""The example of docs/examples behind a real server: asked over HTTP, and it follows the champion."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_helpers import ROOT, run
from test_serve_update import FIRST, NAMES, new_rows

from recbole_cl.serve.forget import retire
from recbole_cl.serve.update import update
from recbole_cl.testing.toy import PlantedDrift, write_planted_drift

for module in ("fastapi", "uvicorn"):
    pytest.importorskip(module, reason=f"{module}, of the extra 'serve', is not installed")


def asked(address: str, body: Any = None) -> Any:
    """Returns what the server answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, PlantedDrift]]:
    """A server's address, the run that it serves, and the log."""
    root = tmp_path_factory.mktemp("api")
    log = write_planted_drift(root / "data", n_stages=4)
    run(log, root / "run", "SASRec", epochs=1, **FIRST)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["-m", "uvicorn", "serve_api:app", "--app-dir", str(ROOT / "docs" / "examples"), "--port", str(port)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "RUN": str(root / "run"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with (root / "server.log").open("w") as told:
        process = subprocess.Popen([sys.executable, *command], cwd=root, env=environment, stdout=told, stderr=told)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, (root / "server.log").read_text()
            try:
                asked(f"{address}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.2)
        yield address, root / "run", log
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_the_example_is_short() -> None:
    lines = (ROOT / "docs" / "examples" / "serve_api.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 45


def test_it_answers_and_follows_the_champion(server: tuple[str, Path, PlantedDrift], tmp_path: Path) -> None:
    address, folder, log = server
    known, unknown = asked(f"{address}/recommend", {"users": ["u1", "nobody"], "k": 3})
    assert known["user"] == "u1" and len(known["items"]) == 3 and unknown["items"] == []
    (cold,) = asked(f"{address}/recommend", {"histories": [["i1", "i2"]], "k": 40, "excluded": ["i9"]})
    assert len(cold["items"]) > 30 and "i9" not in cold["items"]
    with pytest.raises(urllib.error.HTTPError) as told:
        asked(f"{address}/recommend", {"users": ["u1"], "k": 0})
    assert told.value.code == 422 and "k: 0 must be" in told.value.read().decode()
    near = asked(f"{address}/similar/i5?k=3")["items"]
    assert len(near) == 3 and asked(f"{address}/health")["version"] == 0
    update(folder, new_rows(log, tmp_path / "new.csv"), columns=NAMES, guard="none")
    assert asked(f"{address}/health")["version"] == 1
    retire(folder, [near[0]])
    assert near[0] not in asked(f"{address}/similar/i5?k=50")["items"]
