"""The paired test of errors: its words, its interval, and what has none."""

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
