"""What leaves a site in a whole run, byte by byte: the fields of the protocol, in lengths that tell nothing.

`held_to_protocol` reads the serialised message as it goes to the wire, knows every field that may be in it,
and raises for anything else.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

from common.codec import CODECS
from common.envelope import DELIVER, FIELD, LEARN, OFFER, PROXY, RECORD, seal, unseal
from common.messages import Answer, Greeting, MessageError, Receipt, Release, decode_answer

# Flower's own, which a site's software doesn't choose. `created_at` and `ttl` tell when an answer left, hence
# how long it took; a served custodian answers on a beat (`client.schedule`).
METADATA = {
    "run_id",
    "src_node_id",
    "dst_node_id",
    "reply_to_message_id",
    "group_id",
    "ttl",
    "message_type",
    "created_at",
    "dst_task_id",
}
ANSWERS = {OFFER: Greeting, PROXY: Receipt, LEARN: Release, DELIVER: Receipt}
FIELDS_OF_A_RELEASE = 121  # bytes before counts and payload


def fields(message: object) -> dict[str, object]:
    return {descriptor.name: value for descriptor, value in message.ListFields()}


def held_to_protocol(wire: bytes) -> tuple[str, Answer]:
    """Read one message; raises AssertionError for any field or length that the protocol doesn't list."""
    proto = ProtoMessage.FromString(wire)
    assert set(fields(proto)) == {"metadata", "content"}
    assert set(fields(proto.metadata)) <= METADATA
    (item,) = proto.content.items
    assert set(fields(item)) == {"key", "config_record"} and item.key == RECORD
    (entry,) = item.config_record.items
    assert set(fields(entry)) == {"key", "value"} and entry.key == FIELD
    assert set(fields(entry.value)) == {"bytes"}
    body = entry.value.bytes
    # Nothing hides beside what was read: unknown fields would survive parsing.
    again = ProtoMessage(metadata=proto.metadata)
    again.content.CopyFrom(recorddict_to_proto(seal(body)))
    assert again.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)
    action = proto.metadata.message_type
    try:
        answer = decode_answer(body)
    except MessageError as error:
        raise AssertionError(f"not a body of the protocol: {error}") from None
    assert type(answer) is ANSWERS[action]
    assert answer.encode() == body
    if isinstance(answer, Release):
        assert len(body) == FIELDS_OF_A_RELEASE + 4 * len(answer.counts) + len(answer.payload)
        assert np.isfinite(answer.logits()).all()  # raises where a byte of the payload says anything else
    return action, answer


@pytest.mark.parametrize(
    "changes",
    [
        {"num-rounds": 3},
        {"method": "oneshot", "codec": "fp16"},
        {"method": "fedmd", "codec": "fp32", "students": "mixed", "proxy-cases": 50},
        {"privacy.hold-out-share": 0.1, "privacy.sample-rate": 0.5},
    ],
    ids=["descent", "oneshot", "fedmd", "hold-out"],
)
def test_nothing_but_the_protocol_leaves_a_site_and_only_logits_differ_in_length(run_app, changes):
    outcome = run_app(changes)
    lengths: dict[tuple[str, int], list[int]] = defaultdict(list)
    answers: dict[tuple[str, int], list[Answer]] = defaultdict(list)
    for _, wire in outcome.replies:
        action, answer = held_to_protocol(wire)
        number = answer.round if isinstance(answer, Release) else 0
        opinion = len(answer.payload) if isinstance(answer, Release) else 0
        lengths[action, number].append(len(answer.encode()) - opinion)
        answers[action, number].append(answer)
    rounds = outcome.summary.rounds
    assert set(answers) == {(OFFER, 0), (PROXY, 0), (DELIVER, 0), *((LEARN, n + 1) for n in range(rounds))}
    assert all(len(found) == 4 and len(set(found)) == 1 for found in lengths.values())
    bought = {number: len(said[0].counts) for (action, number), said in answers.items() if action == LEARN}
    assert len({lengths[LEARN, number][0] - 4 * counts for number, counts in bought.items()}) == 1
    for (action, _), said in answers.items():
        if (
            action == LEARN
        ):  # all but the opinion, what was bought and the ledger's head follows from the task
            public = {replace(one, payload=b"", scale=0.0, counts=(), head=bytes(32)) for one in said}
            assert len(public) == 1
            assert len({one.head for one in said}) == 4


def reply(body: bytes = b"", content: RecordDict | None = None, action: str = LEARN) -> bytes:
    proto = ProtoMessage()
    proto.metadata.message_type = action
    proto.content.CopyFrom(recorddict_to_proto(seal(body) if content is None else content))
    return bytes(proto.SerializeToString())


SCALE, PAYLOAD = CODECS["int8"].encode(np.float32([[1, -1], [2, 0], [0, 3]]))
RELEASE = Release(bytes(32), bytes(32), 1, 1, "int8", SCALE, PAYLOAD, 3, 2).encode()


@pytest.mark.parametrize(
    "wire",
    [
        reply(RELEASE + b"\0"),
        reply(RELEASE[:-1]),
        reply(b""),
        reply(RELEASE, action=OFFER),
        reply(content=RecordDict({RECORD: ConfigRecord({FIELD: RELEASE, "loss": 0.3})})),
        reply(content=RecordDict({RECORD: ConfigRecord({FIELD: "text"})})),
        reply(content=RecordDict({RECORD: ConfigRecord({FIELD: [RELEASE]})})),
        reply(content=RecordDict({RECORD: ConfigRecord({FIELD: RELEASE}), "m": MetricRecord({"n": 303})})),
        reply(content=RecordDict({RECORD: MetricRecord({"n": 303})})),
        reply(content=RecordDict({"weights": ArrayRecord()})),
        reply(content=RecordDict()),
        reply(RELEASE) + b"\xaa\x3f\x01x",  # a field that Flower doesn't know
    ],
)
def test_the_inspection_fails_on_any_field_or_length_beyond_the_protocol(wire):
    assert held_to_protocol(reply(RELEASE))[0] == LEARN
    with pytest.raises((AssertionError, ValueError)):
        held_to_protocol(wire)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({RECORD: ConfigRecord({FIELD: "text"})}),
        RecordDict({RECORD: ConfigRecord({FIELD: b"", "more": 1})}),
        RecordDict({RECORD: ConfigRecord({"other": b""})}),
        RecordDict({RECORD: ConfigRecord({FIELD: b""}), "other": ConfigRecord({})}),
        RecordDict({"other": ConfigRecord({FIELD: b""})}),
        RecordDict({RECORD: MetricRecord({FIELD: 1})}),
        RecordDict({RECORD: ConfigRecord({FIELD: [b"a"]})}),
    ],
)
def test_an_envelope_with_anything_else_in_it_is_not_opened(content):
    with pytest.raises(MessageError):
        unseal(content)


def test_what_was_sealed_is_unsealed():
    assert unseal(seal(b"\x00body")) == b"\x00body"
