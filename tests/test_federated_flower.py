"""Flower's apps: the same prompts and prototypes as the engine of batches, in process and as real processes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("flwr", reason="flwr>=1.42,<1.43 is not installed")

from test_federated_clients import RATES, World

from recbole_cl.federated.aggregators.fed_k_means import DPFedKMeans
from recbole_cl.federated.client import FIELDS, encode_upload, observe
from recbole_cl.federated.engines.flower import Flower
from recbole_cl.federated.engines.in_process import InProcess
from recbole_cl.federated.flower import Device, LocalGrid, Server, client_app, kept, run_rounds
from recbole_cl.federated.ledger import Ledger
from recbole_cl.federated.privacy import Release
from recbole_cl.federated.server import Mechanism, ServerRound, server_round

KMEANS = {"momentum": 0.5, "floor": 1.0, "separation": 0.1, "prune": 0.1}
ROUNDS = 10


def draws(name: str) -> np.random.Generator:
    return np.random.default_rng(sum(map(ord, name)))


def test_the_engine_is_the_batch_within_a_millionth() -> None:
    """Ten rounds of ragged clients."""
    world, found = World(), []
    for engine in (InProcess({"clients": 256}), Flower({})):
        prompts = world.new()
        for number in range(ROUNDS):
            examples = replace(world.examples, query=world.examples.query + 0.1 * number)
            prompts = observe(prompts, examples.query, 5.0)
            given = (world.outputs, world.table, world.shared)
            prompts, losses = engine.run(*given, prompts, examples, RATES)
        found.append((prompts, losses))
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=1e-6)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found[1][0], name), getattr(found[0][0], name), rtol=0, atol=1e-6)
    assert found[0][0].long.norm() > 0.1, "nothing was learnt"


def server(folder: Path, start: np.ndarray, rounds: list[ServerRound], refused: list[dict[str, int]]) -> Server:
    ledger = Ledger(folder / "ledger.jsonl", math.inf, 1e-5)
    mechanism = Mechanism(Release(0.2, 0.8), bits=0)

    def ended(given: ServerRound, why: dict[str, int]) -> None:
        rounds.append(given)
        refused.append(why)

    return Server(start, DPFedKMeans(KMEANS), mechanism, ledger, ROUNDS, "run", draws, ended)


def device(world: World, node: int) -> Device:
    mine = world.examples.of(torch.tensor([node]))
    return Device(world.outputs, world.table, world.shared, RATES, lambda name: mine)


def test_whole_rounds_are_those_of_the_batch(tmp_path: Path) -> None:
    """Server and clients: drawn devices, noise, ledger, prototypes; and each node keeps its own prompts."""
    world, rounds = World(), []
    start = world.shared.prototypes.detach().numpy().astype(np.float64).copy()
    grid = LocalGrid(client_app(lambda context: device(world, context.node_id)), range(len(world.examples)))
    last = run_rounds(grid, server(tmp_path / "flower", start, rounds, []))
    again, prompts, prototypes = World(), world.new(), start
    other = server(tmp_path / "batch", start, [], [])
    for number in range(ROUNDS):
        asked = torch.from_numpy(np.flatnonzero(draws(f"clients/{number}").random(len(prompts)) < 0.8))
        again.shared.prototypes.data.copy_(torch.from_numpy(prototypes.astype(np.float32)))
        examples = again.examples.of(asked)
        mine = observe(prompts.of(asked), examples.query, RATES.window)
        mine, _ = InProcess({"clients": 64}).run(again.outputs, again.table, again.shared, mine, examples, RATES)
        for name in FIELDS:
            getattr(prompts, name)[asked] = getattr(mine, name)
        sent = encode_upload(again.shared, mine, 1.0).numpy().astype(np.float64)
        args = (other.mechanism, other.ledger, f"run/round{number}", draws)
        prototypes = server_round(other.aggregator, sent, prototypes, *args).prototypes
        np.testing.assert_allclose(rounds[number].prototypes, prototypes, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(last, rounds[-1].prototypes)
    for node, context in grid.contexts.items():
        torch.testing.assert_close(kept(context, world.shared).long[0], prompts.long[node], rtol=0, atol=1e-6)
    assert len(Ledger(tmp_path / "flower" / "ledger.jsonl", math.inf, 1e-5).charges()) == ROUNDS


def test_devices_that_fail_or_lie_do_not_stop_a_round(tmp_path: Path) -> None:
    """One that sends no number is refused and counted; one that answers with an error has sent nothing."""
    from flwr.app import ArrayRecord, Error, Message, RecordDict

    world, rounds, refused = World(), [], []
    app = client_app(lambda context: device(world, context.node_id))

    def broken(message: Message, context: object) -> Message:
        reply = app(message, context)
        node = context.node_id
        if node == 0:
            return Message(Error(1, "the device went away"), reply_to=message)
        if node == 1:
            return Message(RecordDict({"vector": ArrayRecord([np.full(4, np.nan, np.float32)])}), reply_to=message)
        if node == 2:
            return Message(RecordDict({"vector": ArrayRecord([np.full(4, 9.0, np.float32)])}), reply_to=message)
        return Message(RecordDict({}), reply_to=message) if node == 3 else reply

    start = world.shared.prototypes.detach().numpy().astype(np.float64).copy()
    run_rounds(LocalGrid(broken, range(len(world.examples))), server(tmp_path, start, rounds, refused))
    assert len(rounds) == ROUNDS
    reasons = {why for told in refused for why in told}
    assert reasons == {
        "numbers that are not finite", "longer than the clip radius", "no array of floating-point numbers",
    }  # fmt: skip


# -- real processes ---------------------------------------------------------------------------------------------------

APP = Path(__file__).with_name("flower_app")


def free_ports(n: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


@pytest.mark.slow
def test_real_processes_give_the_rounds_of_one_process(tmp_path: Path) -> None:
    """A SuperLink and two SuperNodes on loopback: three rounds, the prototypes of the grid in one process."""
    if shutil.which("flower-superlink") is None:
        pytest.skip("flower-superlink is not on the path")
    fleet, control, http, one, two, health = free_ports(6)
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{control}"\ninsecure = true\n'
    )
    env = {**os.environ, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    started: list[subprocess.Popen[bytes]] = []

    def launch(name: str, *command: str) -> None:
        with (tmp_path / f"{name}.log").open("wb") as log:
            started.append(
                subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            )

    try:
        launch(
            "superlink", "flower-superlink", "--insecure", "--disable-runtime-dependency-installation",
            "--fleet-api-address", f"127.0.0.1:{fleet}", "--control-api-address", f"127.0.0.1:{control}",
            "--port", str(http), "--health-server-address", f"127.0.0.1:{health}",
        )  # fmt: skip
        for number, port in ((0, one), (1, two)):
            launch(
                f"supernode{number}", "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{fleet}",
                "--port", str(port), "--node-config", f"client={number}",
            )  # fmt: skip
        given = f"folder='{tmp_path}'"
        end, said = time.monotonic() + 60, None
        while time.monotonic() < end:  # the SuperLink takes seconds to listen
            said = subprocess.run(
                ["flwr", "run", str(APP), "here", "--run-config", given], env=env, capture_output=True, text=True
            )
            if said.returncode == 0:
                break
            time.sleep(2)
        assert said is not None and said.returncode == 0, said
        rounds, end = tmp_path / "rounds.json", time.monotonic() + 240
        told: list[dict] = []
        while len(told) < 3 and time.monotonic() < end:
            time.sleep(1)
            with contextlib.suppress(OSError, ValueError):
                told = json.loads(rounds.read_text())
        logs = "\n".join(path.read_text()[-3000:] for path in tmp_path.glob("*.log"))
        assert len(told) == 3, logs
    finally:
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    sys.path.insert(0, str(APP))
    try:
        from prompts_app import apps
    finally:
        sys.path.remove(str(APP))
    from flwr.app import Context, RecordDict

    grid = LocalGrid(apps.client, range(2))
    for node, context in grid.contexts.items():
        context.node_config["client"] = node
    (tmp_path / "again").mkdir()
    config = {"rounds": 3, "devices": 2, "folder": str(tmp_path / "again")}
    run_rounds(grid, apps.start(Context(0, 0, {}, RecordDict(), config)))
    again = json.loads((tmp_path / "again" / "rounds.json").read_text())
    for mine, theirs in zip(again, told, strict=True):
        np.testing.assert_allclose(theirs["prototypes"], mine["prototypes"], rtol=0, atol=1e-6)
        assert theirs["refused"] == {}
