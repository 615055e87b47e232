"""Whose each node is: a federation writes it, its studies read it; who can not be found is not believed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UserError
from server.node_owners import read_owners, write_owners


@given(
    st.dictionaries(
        st.integers(0, 2**64 - 1),
        st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"),
        max_size=5,
    )
)
def test_what_was_written_is_read(tmp_path_factory, owner_of):
    one_each = {node: site for site, node in {site: node for node, site in owner_of.items()}.items()}
    path = tmp_path_factory.mktemp("state") / "nodes.json"
    write_owners(path, one_each)
    assert read_owners(path) == one_each


@pytest.mark.parametrize(
    "body", ["", "[]", '{"north": "1"}', '{"north": 1.5}', '{"../x": 1}', '{"north": null}']
)
def test_what_is_no_such_file_is_refused(tmp_path, body):
    (tmp_path / "nodes.json").write_text(body)
    with pytest.raises(UserError, match=r"nodes.json: expected the sites' names"):
        read_owners(tmp_path / "nodes.json")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nodes.json can't be read: No such file"):
        read_owners(tmp_path / "nodes.json")
