"""Run configuration as files: what is written is read again."""

import tomllib

from hypothesis import given
from hypothesis import strategies as st

from common.config import RunConfig, Scalar
from common.run_config_files import as_toml

text = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.one_of(
    text, st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False, allow_infinity=False)
)


@given(st.dictionaries(st.sampled_from(sorted(RunConfig().flat())), scalars))
def test_toml_says_what_the_run_config_says(run_config: dict[str, Scalar]) -> None:
    def flat(tree: dict[str, object], prefix: str = "") -> dict[str, object]:
        leaves: dict[str, object] = {}
        for key, value in tree.items():
            leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return leaves

    read = flat(tomllib.loads(as_toml(run_config)))
    assert read == run_config
    assert {key: type(value) for key, value in read.items()} == {k: type(v) for k, v in run_config.items()}
