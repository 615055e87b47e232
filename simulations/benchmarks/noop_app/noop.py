"""A ServerApp and a ClientApp that exchange an array and do nothing with it.

Run config: `rounds`; `nodes`, how many to wait for; `payload`, the array's bytes; `record`, a file that
gets a `Record` as JSON; `failing-node`, a partition whose handler raises; `fail`, whether the ServerApp
raises at the end.
"""

import json
import time
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

server_app = ServerApp()
client_app = ClientApp()


class Record(TypedDict):
    """What the ServerApp saw."""

    seconds: list[float]
    """How long each round took."""
    turns: list[list[int]]
    """For each round, how many turns each node has counted in its own state; -1 for each error."""


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    """Exchange the array `rounds` times with every node."""
    config = context.run_config
    # Flower starts the ServerApp before the nodes have registered.
    while len(node_ids := list(grid.get_node_ids())) < int(config["nodes"]):
        time.sleep(0.05)
    content = RecordDict({"array": ArrayRecord({"x": Array(np.zeros(int(config["payload"]), np.uint8))})})
    record = Record(seconds=[], turns=[])
    for _ in range(int(config["rounds"])):
        started = time.perf_counter()
        messages = [Message(content, node, MessageType.TRAIN) for node in node_ids]
        replies = list(grid.send_and_receive(messages, timeout=60))
        record["seconds"].append(time.perf_counter() - started)
        counts = [reply.content.config_records["count"] for reply in replies if reply.has_content()]
        turns = [
            turn for _, turn in sorted((cast(int, c["partition"]), cast(int, c["turn"])) for c in counts)
        ]
        record["turns"].append(turns + [-1] * sum(reply.has_error() for reply in replies))
    if config["record"]:
        Path(str(config["record"])).write_text(json.dumps(record))
    if config["fail"]:
        raise RuntimeError("the no-op app was told to fail")


@client_app.train()
def answer(message: Message, context: Context) -> Message:
    """Send the array back, with how many turns this node has had."""
    partition = int(context.node_config["partition-id"])
    if partition == context.run_config["failing-node"]:
        raise RuntimeError("this node was told to fail")
    turn = context.state.config_records["count"]["turn"] if "count" in context.state else 0
    count = ConfigRecord({"partition": partition, "turn": cast(int, turn) + 1})
    context.state["count"] = count
    return Message(RecordDict({"array": message.content["array"], "count": count}), reply_to=message)
