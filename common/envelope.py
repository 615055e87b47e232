"""The Flower side of the protocol: one body of bytes in one record, and nothing else.

Five actions name what a body is about. `OFFER` is a Flower query, the others are train messages with a name
of their own: offer (which proxy?) → proxy (here it is) → learn (one round) … → deliver (the student that
all of you made).
"""

from flwr.app import ConfigRecord, RecordDict

from common.messages import MessageError

RECORD, FIELD = "grandrounds", "body"

OFFER = "query.offer"
PROXY = "train.proxy"
LEARN = "train.learn"
DELIVER = "train.deliver"


def seal(body: bytes) -> RecordDict:
    """Wrap a body for a Flower message."""
    return RecordDict({RECORD: ConfigRecord({FIELD: body})})


def unseal(content: RecordDict) -> bytes:
    """Unwrap a body.

    Raises:
        MessageError: if the content has any other record, key or type.
    """
    record = content.get(RECORD)
    if set(content) != {RECORD} or not isinstance(record, ConfigRecord) or set(record) != {FIELD}:
        raise MessageError("the envelope holds something other than one body")
    body = record[FIELD]
    if not isinstance(body, bytes):
        raise MessageError("the body is not bytes")
    return body
