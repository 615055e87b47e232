"""Texts become ids by rules that everyone knows, each by itself."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.texts import (
    LARGEST_VOCABULARY,
    LEAST_VOCABULARY,
    LONGEST_TEXT,
    LONGEST_WORD,
    encode_texts,
    is_text,
    pieces_of,
    words,
)

TEXTS = st.text(max_size=60)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("The film isn't BAD, it’s (very) good!", ["the", "film", "isn't", "bad", "it's", "very", "good"]),
        (
            "ﬁbrosis – Ⅳ, 2.5 mg/kg; ÄRZTE_Straße",
            ["fibrosis", "iv", "2", "5", "mg", "kg", "ärzte", "strasse"],
        ),
        ("'' -- … \n\t", []),
        ("", []),
        ("x" * 500, ["x" * LONGEST_WORD]),
    ],
)
def test_words(text, found):
    assert list(words(text)) == found


def test_pieces_of_a_word():
    assert pieces_of("her", "words") == ["<her>"]
    assert pieces_of("her", "subwords") == ["<her>", "<he", "her", "er>", "<her", "her>"]
    assert pieces_of("a", "subwords") == ["<a>"]
    nephritis, nephrotic = (set(pieces_of(word, "subwords")) for word in ("nephritis", "nephrotic"))
    assert {"<neph", "neph", "eph"} <= nephritis & nephrotic


def test_ids_stand_in_the_order_of_the_text_and_the_rest_is_padding():
    x = encode_texts(["no pain, no gain", "pain", ""], LARGEST_VOCABULARY, 6, "words")
    assert x.shape == (3, 6) and x.dtype == np.float32
    no, pain, again, gain = x[0, :4]
    assert no == again and len({no, pain, gain}) == 3
    assert x[0, 4:].tolist() == [0, 0] and x[1].tolist() == [pain, 0, 0, 0, 0, 0] and not x[2].any()
    assert encode_texts(["no pain, no gain"], LARGEST_VOCABULARY, 3, "words").tolist() == [[no, pain, no]]
    assert encode_texts([], LARGEST_VOCABULARY, 3, "words").shape == (0, 3)


@given(
    st.lists(TEXTS, max_size=6), TEXTS, st.integers(LEAST_VOCABULARY, LARGEST_VOCABULARY), st.integers(1, 80)
)
def test_no_text_changes_another_and_every_id_is_in_the_vocabulary(texts, other, vocabulary, length):
    for pieces in ("words", "subwords"):
        x = encode_texts(texts, vocabulary, length, pieces)
        assert np.array_equal(encode_texts([other, *texts], vocabulary, length, pieces)[1:], x)
        assert np.all((x >= 0) & (x < vocabulary) & (x == np.round(x)))


def test_a_text_without_end_is_read_to_a_limit():
    begun = "pain " * 10
    endless = begun + "x" * LONGEST_TEXT + " pain"
    length = 20
    assert encode_texts([endless], 100, length, "words")[0, 11:].sum() == 0
    assert np.array_equal(encode_texts([endless], 100, 10, "words"), encode_texts([begun], 100, 10, "words"))


def test_another_process_gives_the_same_ids():
    call = "encode_texts(['Naïve T-cells'], 8192, 12, 'subwords').tolist()"
    shown = subprocess.run(
        [sys.executable, "-c", f"from common.texts import encode_texts; print({call})"],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert shown.strip() == str(encode_texts(["Naïve T-cells"], 8192, 12, "subwords").tolist())


def test_which_cases_are_texts():
    assert is_text((1, 20))
    assert not any(is_text(shape) for shape in [(20,), (1, 8, 8), (5, 4), (2, 20)])
