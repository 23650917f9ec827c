"""Cutting recordings into pieces that overlap, and joining the words of the pieces."""

import pytest
import torch

import data
from lab import pieces
from lab.pieces import Word
from models import Emission

TOKENS = [data.BLANK, " ", *"abcdefghij"]


def test_words_have_the_times_and_the_lowest_probability_of_their_tokens():
    heard = [Emission(4, 2, 3, 0.9), Emission(2, 3, 5, 0.5), Emission(1, 5, 6, 0.1), Emission(3, 9, 10, 0.8)]
    found = pieces.words_of(heard, TOKENS, 0.5, 10)
    assert found == [Word("ca", 11.0, 12.5, 0.5), Word("b", 14.5, 15.0, 0.8)]
    spelled = [data.BLANK, "▁the", "▁", "n", "o"]
    heard = [Emission(k, i, i + 1, 1 - i / 8) for i, k in enumerate([1, 3, 2, 2, 4])]
    assert pieces.words_of(heard, spelled, 1) == [Word("then", 0, 2, 0.875), Word("o", 4, 5, 0.5)]
    assert pieces.words_of([], TOKENS, 1) == []
    (word,) = pieces.words_of([heard[1]._replace(probability=float("nan"))], TOKENS, 1)
    assert word.confidence == 0  # JSON has no NaN


@pytest.mark.parametrize("blocks", [[7], [1] * 52, [52], [20, 20, 12], [21], [3, 40, 9], [25, 25]])
def test_pieces_of_blocks_are_those_of_the_whole(blocks):
    """From the second sample of the overlap on there is another piece; the last one may be short."""
    samples = torch.arange(sum(blocks))
    for piece, overlap, expected in (
        (20, 4, {7: [(0, 7)], 21: [(0, 20), (16, 21)], 50: [(0, 20), (16, 36), (32, 50)],
                 52: [(0, 20), (16, 36), (32, 52)]}),
        (20, 0, {7: [(0, 7)], 21: [(0, 20), (20, 21)], 50: [(0, 20), (20, 40), (40, 50)],
                 52: [(0, 20), (20, 40), (40, 52)]}),
        (60, 30, {n: [(0, n)] for n in (7, 21, 50, 52)}),
    ):  # fmt: skip
        found = list(pieces.pieces_of(iter(samples.split(blocks)), piece, overlap))
        assert [(start, start + len(part)) for start, part in found] == expected[len(samples)]
        assert all(torch.equal(part, samples[start : start + len(part)]) for start, part in found)


def joined(*parts) -> list[str]:
    """The words of (start, end, words) of each piece."""
    words, before = [], 0.0
    for start, end, more in parts:
        pieces.join(words, before, start, more)
        before = end
    return [word.word for word in words]


def test_joining_by_hand():
    # The overlap is 16 to 20, its middle half 17 to 19. A pause from 17.6 to 18.4: the middle is 18.
    left = [Word("a", 15, 16.2, 1), Word("b", 17.2, 17.6, 1), Word("c", 18.4, 18.6, 1), Word("x", 19.5, 20, 1)]
    right = [Word("y", 16, 16.2, 1), Word("b", 17.2, 17.5, 1), Word("c", 18.4, 18.6, 1), Word("d", 19.4, 21, 1)]
    assert pieces.seam(left, right, 16, 20) == pytest.approx(18)
    assert joined((0, 20, left), (16, 36, right)) == ["a", "b", "c", "d"]
    # One word all over the middle half: no pause, its end, and the word only once, whichever piece hears it earlier.
    left, right = [Word("long", 16.5, 19.2, 1)], [Word("long", 16.8, 19.5, 1), Word("e", 20, 21, 1)]
    assert pieces.seam(left, right, 16, 20) == 19.2
    assert joined((0, 20, left), (16, 36, right)) == ["long", "e"]
    early = [Word("long", 16.45, 19.45, 1), Word("e", 20, 21, 1)]
    assert joined((0, 20, [Word("long", 16.55, 19.55, 1)]), (16, 36, early)) == ["long", "e"]
    assert joined((0, 20, [])) == [] and joined((0, 20, left), (16, 36, [])) == ["long"]
    # Words without a pause, which the second piece times a frame of 80 ms earlier, or later.
    for shift in (-0.08, 0.08):
        left = [Word(f"w{k}", 16.04 + 0.4 * k, 16.44 + 0.4 * k, 1) for k in range(10)]
        right = [word._replace(start=word.start + shift, end=word.end + shift) for word in left]
        assert joined((0, 20, left), (16, 36, right)) == [word.word for word in left]


def test_what_ended_before_an_overlap_is_not_looked_at_again():
    class Counted(list):
        taken = 0

        def __getitem__(self, index):
            self.taken += len(range(*index.indices(len(self)))) if isinstance(index, slice) else 1
            return super().__getitem__(index)

    words = Counted()
    for start in range(0, 4800, 16):
        more = [Word("w", start + 5 + k, start + 5.5 + k, 1) for k in range(12)]
        pieces.join(words, start + 4, start, more)
    assert len(words) == 3600 and words.taken < 3 * len(words)
