"""Is a ticket as good as the dense network? The paired test of their errors, and what a row of a ledger says of it."""

import math
from typing import NamedTuple

import numpy as np

from lottery import LotteryError

VERDICT_RULE = 2  # which rule a ledger's verdicts follow; rows of the first one do not name it
NOTHING = 0.95  # error rate from which on the dense network is said to recognise nothing


class Verdict(NamedTuple):
    word: str  # winning, matching, worse, undecided, or "no verdict" where dense recognises nothing
    low: float  # 95 % interval of error rate (ticket) - error rate (dense)
    high: float

    def __str__(self) -> str:
        why = f" (dense recognises nothing: error rate {NOTHING} or more)" if self.word == "no verdict" else ""
        return f"{self.word}{why} [{self.low:+.3f}, {self.high:+.3f}]"


def verdict(
    ticket_errors, dense_errors, words, margin: float = 0.01, resamples: int = 10_000, nothing: float = NOTHING
) -> Verdict:
    """The 95 % interval of the difference in error rate, ticket - dense, and its word.

    ticket_errors, dense_errors: (utterances,) or (seeds, utterances) integers.  words: (utterances,) reference words.
    One seed: paired bootstrap over utterances, errors and words of each drawn together (Bisani & Ney 2004); the
    interval is of that seed. More: seeds crossed with utterances, see `crossed`. The words, in this order: no verdict
    if dense's error rate is `nothing` or more, winning if the interval lies below 0, matching if its upper end is
    <= margin, worse if it lies above 0, else undecided. A draw without any word has no rate and is left out.
    Raises LotteryError for other utterances, for a count that is NaN or infinite, and for references without any word.
    """
    ticket_errors, dense_errors = np.atleast_2d(ticket_errors), np.atleast_2d(dense_errors)
    words = np.asarray(words)
    for name, counts in {"ticket_errors": ticket_errors, "dense_errors": dense_errors, "words": words}.items():
        if not np.isfinite(counts).all():
            raise LotteryError(f"{name}: a count must be finite, got {counts[~np.isfinite(counts)][0]}")
    if ticket_errors.shape != dense_errors.shape or ticket_errors.shape[1:] != words.shape:
        raise LotteryError(
            f"a paired test needs the same utterances: {ticket_errors.shape} ticket, {dense_errors.shape} dense errors "
            f"(seeds, utterances), {words.shape} words"
        )
    if not words.any():
        raise LotteryError(f"none of the {len(words)} references has a word: there is no error rate to compare")
    difference = ticket_errors - dense_errors
    if len(difference) == 1:
        low, high = interval(difference[0], words, resamples)
    else:
        rate, variance, freedom = crossed(difference, words)
        half = student_t(float(freedom)) * math.sqrt(variance)
        low, high = rate - half, rate + half
    recognised = dense_errors.mean(0).sum() < nothing * words.sum()
    return Verdict(word_of(low, high, margin) if recognised else "no verdict", float(low), float(high))


def word_of(low: float, high: float, margin: float) -> str:
    """The word of an interval, where dense recognises something."""
    if high <= margin:
        return "winning" if high < 0 else "matching"
    return "worse" if low > 0 else "undecided"


def p_value(ticket_errors, dense_errors, words, margin: float = 0.01) -> float:
    """One-sided p of a ticket that truly loses `margin`; by how the verdict's interval is made, so that p is at most
    0.025 where that ends at or below the margin. Arguments as for verdict, whose errors it raises."""
    verdict(ticket_errors, dense_errors, words)
    difference = np.atleast_2d(ticket_errors) - np.atleast_2d(dense_errors)
    if len(difference) == 1:
        rates = draws_of(difference[0], words, 10_000)
        return max(1, int((rates > margin).sum())) / len(rates)
    rate, variance, freedom = map(float, crossed(difference, words))
    return above((margin - rate) / math.sqrt(variance), freedom) if variance else float(rate > margin)


def holm(ps: list[float]) -> list[float]:
    """The p-values as Holm (1979) corrects them for being several: the k-th smallest of n counts n - k + 1 times, and
    none less than a smaller one."""
    found, most = list(ps), 0.0
    for k, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = found[i] = max(most, min(1.0, (len(ps) - k) * ps[i]))
    return found


def interval(errors, words, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of an error rate, or of a difference of two, over utterances that are drawn with their words.

    errors, words: (utterances,).
    """
    low, high = np.percentile(draws_of(errors, words, resamples), [2.5, 97.5])
    return float(low), float(high)


def draws_of(errors, words, resamples: int) -> np.ndarray:
    """The rates of so many draws of utterances with their words, the same each time. A draw without any word has no
    rate and is left out."""
    words = np.asarray(words)
    rng, shares, rates = np.random.default_rng(0), np.full(len(words), 1 / len(words)), []
    part = max(1, min(1000, 10**7 // len(words)))  # of the draws of one multinomial, in memory at a time
    for start in range(0, resamples, part):
        counts = rng.multinomial(len(words), shares, size=min(part, resamples - start))
        counts = counts[counts @ words > 0]  # utterances without words may be all that is drawn
        rates.append((counts @ np.asarray(errors)) / (counts @ words))
    return np.concatenate(rates)


def crossed(difference, words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The difference in error rate, its variance and that one's degrees of freedom; seeds crossed with utterances.

    difference: (..., seeds, utterances) errors, ticket - dense, two seeds or more.  words: (..., utterances).
    Two-way clustering (Cameron, Gelbach & Miller 2011; Owen 2007): V_seeds + V_utterances - V_interaction, in which
    the seeds' own part, V_seeds - V_interaction, counts as 0 where it comes out below. Degrees of freedom:
    Satterthwaite's, and at least those of the fewer, seeds or utterances. Coverage: python -m lab.coverage.
    """
    rate, *parts = components(difference, words)
    variance = parts[1] + np.maximum(parts[0] - parts[2], 0)
    seeds, utterances = (n - 1 for n in np.shape(difference)[-2:])
    spread = sum(part**2 / n for part, n in zip(parts, (seeds, utterances, seeds * utterances)))
    return rate, variance, np.maximum(min(seeds, utterances), variance**2 / np.where(spread > 0, spread, np.inf))


def components(difference, words) -> tuple[np.ndarray, ...]:
    """The difference in error rate, V_seeds, V_utterances, V_interaction: variances of it, each unbiased.

    Shapes as in `crossed`. Raises LotteryError for fewer than two seeds or utterances.
    """
    difference, words = np.asarray(difference, float), np.asarray(words, float)
    seeds, utterances = difference.shape[-2:]
    if min(seeds, utterances) < 2:
        raise LotteryError(f"crossed variances need two seeds and two utterances, got {seeds} and {utterances}")
    total = words.sum(-1)[..., None]
    by_seed = difference.sum(-1) / total  # (..., seeds)
    rate = by_seed.mean(-1)
    left = difference - rate[..., None, None] * words[..., None, :]  # errors beyond the rate's
    by_utterance = left.mean(-2)
    both = left - by_utterance[..., None, :] - (by_seed - rate[..., None])[..., None] * words[..., None, :]
    few = utterances / (utterances - 1) / total[..., 0] ** 2
    of_seeds = ((by_seed - rate[..., None]) ** 2).sum(-1) / (seeds * (seeds - 1))
    of_both = (both**2).sum((-1, -2)) * few / (seeds * (seeds - 1))
    return rate, of_seeds, (by_utterance**2).sum(-1) * few, of_both


def student_t(freedom: float) -> float:
    """The 97.5 % point of Student's t, to four digits."""
    angles, share = t_within(freedom)
    return math.sqrt(freedom) * math.tan(np.interp(0.95, share, angles))


def above(t: float, freedom: float) -> float:
    """The probability that Student's t is above t."""
    angles, share = t_within(freedom)
    outside = 1 - float(np.interp(math.atan(abs(t) / math.sqrt(freedom)), angles, share))
    return outside / 2 if t >= 0 else 1 - outside / 2


def t_within(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Angles a from 0 to pi / 2, and the probability that |t| is below sqrt(n) tan a: its density is cos(a)^(n - 1)."""
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return angles, area / area[-1]


# ---------------------------------------------------------------------------- rows of a ledger


def numbered(speakers: list[str]) -> list[int]:
    """Who speaks each utterance, as numbers from 0 on in the order they come; [] unless all have names, of two or more.

    Numbers, since a corpus may name its speakers in 128 characters, and since nobody needs to know them.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(speakers))}
    return [names[name] for name in speakers] if len(names) > 1 and "" not in names else []


def about_utterances(heard, train) -> dict:
    """What round 0 says of each test utterance besides its words, where they differ in it.

    test_speakers: who speaks it (numbered). test_seen: 1 if its text is one that was trained on, else 0.
    """
    texts, speakers = {utterance.text for utterance in train}, numbered([utterance.speaker for utterance in heard])
    seen = [int(utterance.text in texts) for utterance in heard]
    return ({"test_speakers": speakers} if speakers else {}) | ({"test_seen": seen} if len(set(seen)) > 1 else {})


# By an older rule other, or not there.
OF_VERDICTS = ("verdict", "interval", "power", "verdict_rule", "test_speakers", "test_seen")


def verdict_of(errors, dense_errors, words, margin: float) -> dict:
    """What a row says of its ticket against the dense network of its seed: one seed's verdict.

    An undecided one has its power: the chance that a ticket truly equal to dense is called matching, or winning, by
    these utterances. The interval is taken as normal and its width as the true one's.
    """
    told = verdict(errors, dense_errors, words, margin)
    row = {"verdict": told.word, "interval": [told.low, told.high]}
    return row | ({"power": power(told, margin)} if told.word == "undecided" else {})


def power(told: Verdict, margin: float) -> float:
    half = (told.high - told.low) / 2
    return round(0.5 * (1 + math.erf(1.96 * (margin / half - 1) / 2**0.5)), 3) if half else 1.0


def of_this_rule(row: dict) -> bool:
    """Was the row's verdict made as verdict makes it now? Rows of the first rule do not say."""
    return row.get("verdict_rule") == VERDICT_RULE


def without_verdicts(row: dict) -> dict:
    """What a row says of its tests but for the verdicts: all that can be held against a row of another rule."""
    left = {key: value for key, value in row.items() if key not in OF_VERDICTS}
    others = {name: without_verdicts(test) for name, test in row.get("other_tests", {}).items()}
    return left | ({"other_tests": others} if others else {})
