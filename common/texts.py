"""Free text as numbers, by a tokenizer that learns nothing: it has no list of words to tell of a patient.

A text becomes its words in lower case, and each word the *pieces* that it is made of: itself and, for
`subwords`, its character n-grams, so that words with a common stem, and words with a typing error, have
pieces in common (fastText, Bojanowski et al. 2017, arXiv:1607.04606, section 3.2). A piece's id is a checksum
of its letters (the hashing trick, Weinberger et al. 2009, arXiv:0902.2206): every site numbers pieces alike,
without having seen anybody's text. Two pieces may share an id; the larger the vocabulary, the fewer do.

Id 0 is padding. What a text has beyond the fixed length isn't seen.

Shape legend: N texts, L ids of each.
"""

import re
import unicodedata
import zlib
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np

from common.records import Float32s

Pieces = Literal["words", "subwords"]

PADDING = 0
LEAST_VOCABULARY, LARGEST_VOCABULARY = 64, 8192
"""Ids that a text may be made of, padding among them. An embedding has a row for each, and under differential
privacy one example's gradient has as many rows."""
LONGEST_TEXT = 100_000
"""Characters of a text that are looked at."""
LONGEST_WORD = 40
"""Characters of a word that are looked at: what is longer is hardly one."""
NGRAMS = (3, 4, 5)

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


def is_text(case_shape: tuple[int, ...]) -> bool:
    """Whether cases of this shape are texts: one line of ids, (1, L). Tables have (D,), images (C, H, W)."""
    return len(case_shape) == 2 and case_shape[0] == 1


def encode_texts(texts_N: Iterable[str], vocabulary: int, length: int, pieces: Pieces) -> Float32s:
    """Number the pieces of texts.

    Args:
        texts_N: The texts; each is encoded by itself, so none changes another's ids.
        vocabulary: Ids run from 1 to one below it.
        length: L.
        pieces: Whole words, or words with their character n-grams.

    Returns:
        (N, L) ids as float32, which holds them exactly, as all cases are; the rest is padding.
    """
    ids_of_word: dict[str, list[int]] = {}  # for this call alone: words of patients are kept nowhere else
    rows = []
    for text in texts_N:
        ids: list[int] = []
        for word in words(text):
            if word not in ids_of_word:
                ids_of_word[word] = [_id(piece, vocabulary) for piece in pieces_of(word, pieces)]
            ids += ids_of_word[word]
            if len(ids) >= length:
                break
        row_L = np.full(length, PADDING, dtype=np.float32)
        row_L[: len(ids)] = ids[:length]
        rows.append(row_L)
    return np.stack(rows) if rows else np.empty((0, length), dtype=np.float32)


def words(text: str) -> Iterator[str]:
    """Find the words of a text: letters and digits, apostrophes inside them, each letter in one writing."""
    plain = unicodedata.normalize("NFKC", text[:LONGEST_TEXT]).casefold()
    return (found.group().replace("’", "'")[:LONGEST_WORD] for found in _WORD.finditer(plain))


def pieces_of(word: str, pieces: Pieces) -> list[str]:
    """Take a word apart. `<` and `>` mark its ends, so that the n-gram `<her>` isn't part of `where`."""
    marked = f"<{word}>"
    if pieces == "words":
        return [marked]
    grams = [marked[at : at + size] for size in NGRAMS for at in range(len(marked) - size + 1)]
    return [marked, *(gram for gram in grams if gram != marked)]


def _id(piece: str, vocabulary: int) -> int:
    return 1 + zlib.crc32(piece.encode()) % (vocabulary - 1)
