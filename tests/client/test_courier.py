"""The courier: light, ignorant, and unable to say anything but an answer of the protocol."""

import json
import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.common.config import parse_config_args
from flwr.supercore.task_identity import TaskIdentity

from client import app as courier
from client.connection import Connection, connect
from client.courier_process import supernode_command
from client.courier_settings import CourierFolder, CourierSettings
from client.custodian_pb2 import Body
from client.custodian_pb2_grpc import CustodianServicer, add_CustodianServicer_to_server
from common.envelope import OFFER, seal, unseal
from common.logs import VARIABLE
from common.messages import Greeting, Offer, Receipt, Refusal, Rule, decode_answer

ROOT = Path(__file__).resolve().parents[2]


def context(**node_config: str | int) -> Context:
    return Context(run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config={})


def message(content: RecordDict) -> Message:
    """What Flower would hand to the app; messages take their sender from the identity of the process."""
    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
    asked = Message(content, 2, OFFER)
    asked.metadata.__dict__["_message_id"] = "1"
    return asked


def answer_to(content: RecordDict, **node_config: str | int) -> Greeting | Refusal:
    reply = courier.app(message(content), context(**node_config))
    assert not reply.has_error()
    return decode_answer(unseal(reply.content))


OFFERED = seal(Offer(bytes(32)).encode())


def test_without_a_custodian_in_the_node_config_the_site_is_unavailable():
    assert answer_to(OFFERED).rule is Rule.UNAVAILABLE


def test_its_lines_say_which_run_round_and_site_they_are_about(loggers_as_before, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, "json")
    asked = message(OFFERED)
    for group, number in (("3", 3), ("", 0), ("9" * 5000, 999_999_999), ("patient 7", 0)):
        asked.metadata.__dict__["_group_id"] = group
        told = context(site="north")
        told.run_config = {"run-id": "trial"}
        reply = courier.app(asked, told)
        assert decode_answer(unseal(reply.content)).rule is Rule.UNAVAILABLE
        line = json.loads(capsys.readouterr().err)
        assert (line["run"], line["round"], line["site"]) == ("trial", number, "north")
        assert line["message"] == "the custodian gives no answer: the node config names no custodian"


def test_a_form_of_the_log_that_there_is_none_of_makes_the_site_unavailable(monkeypatch):
    monkeypatch.setenv(VARIABLE, "xml")
    assert answer_to(OFFERED).rule is Rule.UNAVAILABLE


def test_a_sites_courier_is_told_its_custodian_and_its_name(tmp_path):
    settings = CourierSettings(site="north", address="host:1", bundle="0" * 64, custodian="unix:/door.sock")
    command = supernode_command(CourierFolder(tmp_path, settings), 1)
    node_config = parse_config_args([command[command.index("--node-config") + 1]])
    assert node_config == {"custodian": "unix:/door.sock", "site": "north"}


def test_no_run_config_can_name_a_custodian_or_make_a_real_site_simulate():
    asked = context()
    asked.run_config = {"custodian": "unix:/tmp/evil.sock", "partition-id": 0, "scenario": "heart"}
    reply = courier.app(message(OFFERED), asked)
    assert decode_answer(unseal(reply.content)).rule is Rule.UNAVAILABLE


def test_certificates_that_cannot_be_read_do_not_travel(tmp_path):
    address = {"custodian": "tcp:127.0.0.1:9", "custodian-certificates": str(tmp_path / "secret-name")}
    assert answer_to(OFFERED, **address).rule is Rule.UNAVAILABLE


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"grandrounds": ConfigRecord({"body": "text"})}),
        RecordDict({"grandrounds": ConfigRecord({"body": b"", "more": 1})}),
        RecordDict({"grandrounds": ConfigRecord({"body": b""}), "more": ConfigRecord()}),
        RecordDict({"other": ConfigRecord({"body": b""})}),
    ],
)
def test_an_envelope_with_anything_else_is_malformed(content, tmp_path):
    assert answer_to(content, custodian=f"unix:{tmp_path}/none.sock").rule is Rule.MALFORMED


def test_a_custodian_that_is_not_there_is_unavailable_after_some_patience(tmp_path):
    channel = grpc.insecure_channel(f"unix:{tmp_path}/none.sock")
    assert decode_answer(Connection(channel, patience=0.2).offer(b"")).rule is Rule.UNAVAILABLE


class Impostor(CustodianServicer):
    """Something that listens at the custodian's place and says what it shouldn't."""

    def Offer(self, request: Body, context: grpc.ServicerContext) -> Body:
        return Body(body=b"the patient's name is")

    def Learn(self, request: Body, context: grpc.ServicerContext) -> Body:
        raise ValueError("the patient's name is")

    def Deliver(self, request: Body, context: grpc.ServicerContext) -> Body:
        return Body(body=Receipt(bytes(32)).encode() + b"and more")


@pytest.fixture
def impostor(tmp_path) -> Iterator[Connection]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_CustodianServicer_to_server(Impostor(), server)
    server.add_insecure_port(f"unix:{tmp_path}/door.sock")
    server.start()
    yield Connection(grpc.insecure_channel(f"unix:{tmp_path}/door.sock"))
    server.stop(None)


@pytest.mark.parametrize("question", ["offer", "learn", "deliver", "accept_proxy"])
def test_only_answers_of_the_protocol_are_passed_on(impostor, question):
    assert decode_answer(getattr(impostor, question)(b"")).rule is Rule.UNAVAILABLE


# ---- Start-up ---------------------------------------------------------------------------------------------

NO_OP = """
import time
began = time.process_time()
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
app = ClientApp()

@app.query("offer")
def offer(message, context):
    return Message(RecordDict(), reply_to=message)
"""
COURIER = """
import time
began = time.process_time()
from flwr.app import Context, Message, RecordDict
from client.app import app
"""
ASK = """
import json, sys
from flwr.app import ConfigRecord
from flwr.supercore.task_identity import TaskIdentity

TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1
message = Message(RecordDict({"grandrounds": ConfigRecord({"body": b"GRO1" + bytes(32)})}), 2, "query.offer")
message.metadata.__dict__["_message_id"] = "1"
node_config = {"custodian": sys.argv[1]}
context = Context(run_id=1, node_id=2, node_config=node_config, state=RecordDict(), run_config={})
reply = app(message, context)
took = time.process_time() - began
heavy = [name for name in ("torch", "opacus", "pandas", "scipy", "pydantic") if name in sys.modules]
print(json.dumps({"seconds": took, "heavy": heavy, "records": len(reply.content)}))
"""


def process(program: str, address: str) -> dict:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program + ASK, address]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.slow
def test_from_process_start_to_the_reply_it_computes_little_more_than_flowers_own_no_op(hospital):
    with hospital.served():
        pairs = [(process(NO_OP, hospital.address), process(COURIER, hospital.address)) for _ in range(7)]
    assert all(ours["heavy"] == [] and ours["records"] == 1 for _, ours in pairs)
    extra = statistics.median(ours["seconds"] - flowers["seconds"] for flowers, ours in pairs)
    assert extra <= 0.2, extra


def test_couriers_of_one_process_share_a_connection(tmp_path):
    address = f"unix:{tmp_path}/door.sock"
    together = threading.Barrier(4)

    def reach(_: int) -> Connection:
        together.wait()
        return connect(address)

    with futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(reach, range(4)))
    assert connect(address) is connect(address)


def test_a_supernode_whose_connection_ended_ends_although_threads_of_its_own_live():
    code = (
        "import sys, threading, client.supernode as ours; ours.exchange = lambda *_: None;"
        "ours.flower_supernode = threading.Thread(target=threading.Event().wait).start;"
        "sys.argv = ['supernode', 'certificate', 'key']; ours.main()"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 1
