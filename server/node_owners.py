"""Which of the SuperLink's nodes is which site's: a small file between a federation and its studies.

The SuperLink knows a node by its key, and the federation's folder knows whose key it is. Together they say
from which node a site may answer. A server app sees nodes' numbers only, so the federation writes the numbers
down whenever it tells the SuperLink keys, and a study reads them whenever it calls the roll: a site that is
given a key while a study is under way can join it, and one that has lost its key is out.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from common.errors import UserError
from common.kit import SiteName
from common.runs import disk_errors, write_whole

_FILE = TypeAdapter(dict[SiteName, int])


def write_owners(path: Path, owner_of: Mapping[int, str]) -> None:
    """Write down which node is whose.

    Args:
        path: The file.
        owner_of: Each node's site, by Flower's number for the node.

    Raises:
        UserError: if it can't be written; what was there stays.
    """
    numbers = {site: node for node, site in sorted(owner_of.items(), key=lambda one: one[1])}
    write_whole(path, (json.dumps(numbers, indent=2) + "\n").encode())


def read_owners(path: Path) -> dict[int, str]:
    """Read which node is whose.

    Raises:
        UserError: if the file can't be read or is none of ours. Nobody is believed then.
    """
    with disk_errors(path, "read"):
        body = path.read_bytes()
    try:
        numbers = _FILE.validate_json(body, strict=True)
    except ValidationError:
        raise UserError(f"{path}: expected the sites' names, each with its node's number") from None
    return {node: site for site, node in numbers.items()}
