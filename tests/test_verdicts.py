"""The paired test of errors: its words, its interval, and what has none."""

import numpy as np
import pytest

import lottery
from audio_lottery import verdicts


def test_verdict_words():
    words = [10] * 50
    worse, better = [3] * 50, [1] * 50
    assert verdicts.verdict(better, worse, words) == ("winning", -0.2, -0.2)
    assert verdicts.verdict(worse, better, words) == ("worse", 0.2, 0.2)
    assert verdicts.verdict(worse, worse, words) == ("matching", 0, 0)
    mixed = verdicts.verdict([0, 4] * 25, [2] * 50, words)
    assert mixed.word == "undecided" and mixed.low < 0 < mixed.high
    # the interval of a difference of +-2 errors in 10 words over 50 utterances: 1.96 * 0.2 / sqrt(50) = 0.055
    assert mixed.high == pytest.approx(0.055, abs=0.008)
    assert verdicts.verdict([0, 4] * 25, [2] * 50, words, margin=0.1).word == "matching"


def test_verdict_pools_seeds_and_pairs_utterances():
    words = [10] * 50
    seeds = verdicts.verdict([[1] * 50, [3] * 50], [[2] * 50, [2] * 50], words)
    assert seeds == ("matching", 0, 0)
    with pytest.raises(lottery.LotteryError, match="a paired test needs the same utterances"):
        verdicts.verdict([1] * 49, [1] * 50, words)


def test_the_numbers_of_old_ledgers_stay():
    words = [4, 5, 7, 8, 1, 2, 7, 8, 2, 3, 7, 4, 3, 7, 3, 4, 6, 5, 1, 1, 7, 7, 7, 5, 7, 3, 4, 7, 1, 3]
    rng = np.random.default_rng(1)
    rng.integers(1, 9, 30)
    dense, ticket = rng.integers(0, 4, 30), rng.integers(0, 4, 30)
    assert verdicts.verdict(ticket, dense, words) == ("undecided", -0.06711409395973154, 0.17424242424242425)


def test_a_resample_without_words_is_drawn_again():
    """In a quarter of them only the first utterance is drawn, which has no word: its rate would be 0 / 0."""
    assert verdicts.verdict([0, 1], [0, 2], [0, 3]) == ("winning", -1 / 3, -1 / 3)
    # (n1 - n0) / 3 n1 for n0 and n1 draws of the first two: -1/3 in 3 of 19 (0 0 1), 1/3 in 7 (without the first)
    assert verdicts.verdict([0, 1, 0], [1, 0, 0], [0, 3, 0], margin=0.4) == ("matching", -1 / 3, 1 / 3)


@pytest.mark.parametrize("words", [[0, 0], [0]])
def test_references_without_any_word_are_refused(words):
    with pytest.raises(lottery.LotteryError, match=rf"none of the {len(words)} references has a word"):
        verdicts.verdict([0] * len(words), [1] * len(words), words)
