"""Is a ticket as good as the dense network? The paired test of their errors."""

from typing import NamedTuple

import numpy as np

from lottery import LotteryError


class Verdict(NamedTuple):
    word: str  # winning, matching, worse or undecided
    low: float  # 95 % interval of error rate (ticket) - error rate (dense)
    high: float

    def __str__(self) -> str:
        return f"{self.word} [{self.low:+.3f}, {self.high:+.3f}]"


def verdict(ticket_errors, dense_errors, words, margin: float = 0.01, resamples: int = 10_000) -> Verdict:
    """Paired bootstrap over utterances of the difference in error rate, ticket - dense.

    ticket_errors, dense_errors: (utterances,) or (seeds, utterances) integers; seeds are pooled.  words: (utterances,)
    reference words.  Errors and words of an utterance are resampled together (Bisani & Ney 2004). The words, in this
    order: winning if the 95 % interval lies below 0, matching if its upper end is <= margin, worse if it lies above
    0, else undecided. A resample without any word has no rate and is drawn again.
    Raises LotteryError for other utterances, and for references without any word.
    """
    ticket_errors, dense_errors = np.atleast_2d(ticket_errors), np.atleast_2d(dense_errors)
    words = np.asarray(words)
    if ticket_errors.shape != dense_errors.shape or ticket_errors.shape[1:] != words.shape:
        raise LotteryError(
            f"a paired test needs the same utterances: {ticket_errors.shape} ticket, {dense_errors.shape} dense errors "
            f"(seeds, utterances), {words.shape} words"
        )
    if not words.any():
        raise LotteryError(f"none of the {len(words)} references has a word: there is no error rate to compare")
    difference = (ticket_errors - dense_errors).mean(0)  # per utterance, mean over seeds
    rng, rates = np.random.default_rng(0), np.empty(resamples)
    for i in range(resamples):
        picks = rng.integers(0, len(words), len(words))
        while not words[picks].any():
            picks = rng.integers(0, len(words), len(words))
        rates[i] = difference[picks].sum() / words[picks].sum()
    low, high = np.percentile(rates, [2.5, 97.5])
    if high < 0:
        word = "winning"
    elif high <= margin:
        word = "matching"
    elif low > 0:
        word = "worse"
    else:
        word = "undecided"
    return Verdict(word, float(low), float(high))
