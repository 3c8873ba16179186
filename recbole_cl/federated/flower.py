"""The same rounds on Flower: a ServerApp and a ClientApp that a SuperLink and its SuperNodes run, or one process.

A node is one user's device. A round's message brings the prototypes; the device trains its prompts by
:func:`~recbole_cl.federated.client.client_step`, keeps them in its node's state and answers with one clipped vector.
What comes back is validated as uploads are (:func:`~recbole_cl.federated.uploads.accept`), and released through the
ledger. An app is a few lines::

    app = client_app(device)    # device(context) gives the frozen model and the node's own targets
    app = server_app(start)     # start(context) gives the first prototypes, aggregator, mechanism and ledger
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recbole_cl.errors import ConfigError
from recbole_cl.federated.aggregators.base import Aggregator
from recbole_cl.federated.client import (
    FIELDS,
    Examples,
    Outputs,
    Prompts,
    Settings,
    client_step,
    encode_upload,
    observe,
)
from recbole_cl.federated.ledger import Ledger
from recbole_cl.federated.prompts import SharedParts
from recbole_cl.federated.server import Mechanism, ServerRound, server_round
from recbole_cl.federated.uploads import Upload, accept

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
try:
    from flwr.app import DEFAULT_TTL, ArrayRecord, Context, Message, Metadata, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:  # the package itself does without
    raise ConfigError("protofed_engine: flower needs Flower (flwr>=1.42,<1.43) in this environment") from error

if TYPE_CHECKING:
    from flwr.common.typing import Run

TRAIN = "train"


@dataclass
class Device:
    """What a user's device has.

    Args:
        outputs: The frozen backbone behind prompts.
        table: Its item embeddings, shape ``[n_items, d]``.
        shared: The frozen shared parts; each round puts its prototypes in.
        settings: How clients learn.
        examples: Gives the device's own targets in a round.
        radius: R.
        noted: The round's query was noted before the message came.
    """

    outputs: Outputs
    table: torch.Tensor
    shared: SharedParts
    settings: Settings
    examples: Callable[[str], Examples]
    radius: float = 1.0
    noted: bool = False


@dataclass
class Server:
    """What a server begins with.

    Args:
        prototypes: Public prototypes, shape ``[K, d']``.
        aggregator: Makes prototypes of noisy sums.
        mechanism: How sums are released; its sampling is the chance by which a device is asked.
        ledger: Where releases are charged and kept.
        rounds: Rounds.
        name: Name of the run's rounds in the ledger.
        generator: Gives the generator of a name.
        ended: Called with each round and how many uploads were refused, by reason.
        timeout: Seconds that devices have to answer.
        least: Devices that must be there before a round begins.
    """

    prototypes: np.ndarray
    aggregator: Aggregator
    mechanism: Mechanism
    ledger: Ledger
    rounds: int
    name: str
    generator: Callable[[str], np.random.Generator]
    ended: Callable[[ServerRound, dict[str, int]], None] = lambda given, refused: None
    timeout: float = 600.0
    least: int = 1


def client_app(device: Callable[[Context], Device]) -> Any:
    """Returns the app of a device.

    Args:
        device: Gives what the device of a context has.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        mine = device(context)
        given = torch.from_numpy(message.content["prototypes"].to_numpy_ndarrays()[0].copy())
        with torch.no_grad():
            mine.shared.prototypes.copy_(given.to(mine.shared.prototypes))
        examples = mine.examples(message.metadata.group_id)
        prompts = kept(context, mine.shared)
        if not mine.noted:
            prompts = observe(prompts, examples.query, mine.settings.window)
        prompts, losses = client_step(mine.outputs, mine.table, mine.shared, prompts, examples, mine.settings)
        keep(context, prompts)
        vector = encode_upload(mine.shared, prompts, mine.radius)[0].numpy()
        content = {"vector": ArrayRecord([vector]), "metrics": MetricRecord({"loss": float(losses[0])})}
        return Message(RecordDict(content), reply_to=message)

    return app


def kept(context: Context, shared: SharedParts) -> Prompts:
    """Returns the prompts in a node's state, those that everybody begins with where there are none."""
    if "prompts" not in context.state:
        return Prompts.new(1, shared.tokens, shared.width)
    arrays = context.state["prompts"].to_numpy_ndarrays()
    return Prompts(*(torch.from_numpy(array.copy()) for array in arrays))


def keep(context: Context, prompts: Prompts) -> None:
    """Puts prompts of one client into its node's state."""
    context.state["prompts"] = ArrayRecord([getattr(prompts, name).detach().numpy() for name in FIELDS])


def server_app(start: Callable[[Context], Server]) -> Any:
    """Returns the app of a server.

    Args:
        start: Gives what the server begins with.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        run_rounds(grid, start(context))

    return app


def run_rounds(grid: Grid, server: Server) -> np.ndarray:
    """Runs the rounds; returns the last prototypes."""
    prototypes = server.prototypes
    for number in range(server.rounds):
        round_id = f"{server.name}/round{number}"
        nodes = _nodes(grid, server)
        coins = server.generator(f"clients/{number}").random(len(nodes))
        asked = [node for node, coin in zip(nodes, coins, strict=True) if coin < server.mechanism.cost.sampling]
        uploads = ask(grid, asked, prototypes, round_id, server.timeout)
        width, radius = prototypes.shape[1], server.mechanism.radius
        taken = accept(uploads, round_id, range(len(asked)), width, radius)
        args = (server.mechanism, server.ledger, round_id, server.generator)
        given = server_round(server.aggregator, taken.vectors, prototypes, *args)
        server.ended(given, taken.refused)
        prototypes = given.prototypes
    return prototypes


def _nodes(grid: Grid, server: Server) -> list[int]:
    end = time.monotonic() + server.timeout
    while True:
        nodes = sorted(grid.get_node_ids())
        if len(nodes) >= server.least or time.monotonic() > end:
            return nodes
        time.sleep(0.5)


def ask(grid: Grid, nodes: list[int], prototypes: np.ndarray, round_id: str, timeout: float) -> list[Upload]:
    """Returns what devices answer to a round; a client is the number of its node among those that were asked.

    Args:
        grid: Reaches the nodes.
        nodes: Their ids.
        prototypes: Sent to all, in float32.
        round_id: Name of the round.
        timeout: Seconds to wait.
    """
    number, uploads = {node: place for place, node in enumerate(nodes)}, []
    for reply in replies(grid, nodes, prototypes, round_id, timeout):
        if reply.has_error():
            continue  # a device that failed has sent nothing
        try:
            vector: Any = reply.content["vector"].to_numpy_ndarrays()[0]
        except (KeyError, IndexError, ValueError, TypeError, AttributeError):
            vector = None
        client = number.get(reply.metadata.src_node_id, -1)
        uploads.append(Upload(client, reply.metadata.group_id, vector))
    return uploads


def replies(
    grid: Grid, nodes: list[int], prototypes: np.ndarray, round_id: str, timeout: float | None
) -> Iterable[Message]:
    """Returns the answers of devices to a round's prototypes."""
    content = RecordDict({"prototypes": ArrayRecord([prototypes.astype(np.float32)])})
    messages = [grid.create_message(content, TRAIN, node, round_id) for node in nodes]
    found: Iterable[Message] = grid.send_and_receive(messages, timeout=timeout)
    return found


class LocalGrid(Grid):  # type: ignore[misc]
    """A grid in this process: each message is answered at once by a ClientApp with its node's context.

    Args:
        app: Answers.
        nodes: Ids of the nodes.
    """

    def __init__(self, app: Any, nodes: Iterable[int]) -> None:
        self.app = app
        self.contexts = {node: Context(0, node, {}, RecordDict(), {}) for node in nodes}
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        """Does nothing: there is one run."""

    @property
    def run(self) -> Run:
        """There is no run that a SuperLink would know."""
        raise ConfigError("the grid in one process has no run; nothing of ours asks for it")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Returns a message."""
        self._sent += 1
        metadata = Metadata(
            0, str(self._sent), 0, dst_node_id, "", group_id, time.time(), ttl or DEFAULT_TTL, message_type
        )
        return Message(content=content, metadata=metadata)

    def get_node_ids(self) -> Iterable[int]:
        """Returns the ids of the nodes."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Lets the app answer messages; returns their ids."""
        ids = []
        for message in messages:
            ids.append(f"{len(self._replies)}")
            self._replies[ids[-1]] = self.app(message, self.contexts[message.metadata.dst_node_id])
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Returns the answers to messages."""
        return [self._replies.pop(number) for number in list(message_ids) if number in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Returns the answers."""
        return [self.app(message, self.contexts[message.metadata.dst_node_id]) for message in messages]
