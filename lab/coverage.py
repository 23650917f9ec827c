"""How far verdicts can be trusted: their coverage and power, simulated from the errors in ledgers.

python -m lab.coverage RUN [RUN ...] [--seeds N ...] [--worse WER] [--trials N]

Each trial draws new seeds and new utterances around a difference that is known. From the differences of a ledger's
ticket and dense network come the spread of seeds, of utterances and of both together (verdicts.components), each scaled
to what it estimates without bias: utterances are drawn from the ledger's, with their words and how hard they are; a
seed's level is normal; what is left is drawn from the utterance's own over the seeds.
"""

import functools
import itertools
import sys
from pathlib import Path

if __name__ == "__main__":
    from lab import missing

    missing.in_one_line("lab.coverage")

import numpy as np

import lottery
from audio_lottery import verdicts
from audio_lottery.console import Parser, command, fail, markdown_text
from lab import plan
from lab.compare import Method, Point, load, merge

PROGRAM = "python -m lab.coverage"
SEEDS = (3, 5, 10)
TRIALS = 2000
AT_ONCE = 2_000_000  # differences in memory


@functools.cache
def quantiles() -> tuple[np.ndarray, np.ndarray]:
    """1 / degrees of freedom, rising, and Student's t of them."""
    inverse = np.linspace(0.0005, 1, 200)
    return inverse, np.array([verdicts.student_t(1 / x) for x in inverse])


def student_t(freedom: np.ndarray) -> np.ndarray:
    """verdicts.student_t of many, to three digits."""
    return np.interp(1 / freedom, *quantiles())


# ---------------------------------------------------------------------------- power


def power(point: Point, test: str = "", over: str = "utterances", trials: int = 20_000) -> float:
    """The chance that a ticket truly equal to dense is called matching, or winning, by as many seeds and utterances.

    over: speakers in place of utterances, or those of new texts (Point.counts).  One seed: equal in that seed, from the
    interval (verdicts.power).
    """
    if len(point.seeds) == 1:
        return verdicts.power(point.verdict(test, over), point.margin)
    return float(np.mean(upper_ends(point, test, over, trials) <= point.margin))


def gain_found(point: Point, test: str = "") -> float:
    """How much better a method must truly be to be called better in 80 % of experiments as large."""
    if len(point.seeds) == 1:
        told = point.verdict(test)
        return (told.high - told.low) / 2 * (1 + 0.8416 / 1.96)  # normal quantiles of 80 and 97.5 %
    return float(np.quantile(upper_ends(point, test), 0.8))


def upper_ends(point: Point, test: str = "", over: str = "utterances", trials: int = 20_000) -> np.ndarray:
    """Upper ends of the intervals of a true difference of 0, in so many other experiments; of two seeds or more.

    The three components are taken as what the point's estimate, their estimates in another experiment as chi-square,
    the difference as normal.
    """
    errors, others, words = point.counts(test, over)
    _, *parts = verdicts.components(errors - others, words)
    seeds, utterances = len(errors) - 1, len(words) - 1
    of_both = parts[2]
    true = [np.maximum(parts[0], of_both), np.maximum(parts[1], of_both), of_both]
    rng = np.random.default_rng(0)
    freedoms = (seeds, utterances, seeds * utterances)
    drawn = [part * rng.chisquare(n, trials) / n for part, n in zip(true, freedoms)]
    variance = drawn[1] + np.maximum(drawn[0] - drawn[2], 0)
    spread = sum(part**2 / n for part, n in zip(drawn, freedoms))
    freedom = np.maximum(min(seeds, utterances), variance**2 / np.where(spread > 0, spread, np.inf))
    rate = rng.normal(0, np.sqrt(true[0] + true[1] - of_both), trials)
    return rate + student_t(freedom) * np.sqrt(variance)


# ---------------------------------------------------------------------------- other seeds, other utterances


class Source:
    """Differences (tickets, seeds, utterances) of a ledger's, taken apart: what trials are drawn from."""

    def __init__(self, differences: np.ndarray, words: np.ndarray):
        """differences: ticket - dense, of several rounds in the same seeds.  words: (utterances,)."""
        rate, of_seeds, of_utterances, of_both = verdicts.components(differences, words)
        seeds = differences.shape[1]
        left = differences - rate[:, None, None] * words
        by_seed = left.sum(-1) / words.sum()  # (tickets, seeds), about 0
        by_utterance = left.mean(1)
        self.words = words
        with np.errstate(invalid="ignore", divide="ignore"):
            unbiased = [
                np.nan_to_num(np.sqrt(np.maximum(part - of_both, 0) / part)) for part in (of_seeds, of_utterances)
            ]
        self.levels = by_seed * unbiased[0][:, None]
        self.hard = by_utterance * unbiased[1][:, None]
        both = left - by_utterance[:, None] - by_seed[:, :, None] * words
        self.both = both * (seeds / (seeds - 1)) ** 0.5

    def draw(self, rng: np.random.Generator, trials: int, seeds: int, worse: float) -> tuple[np.ndarray, np.ndarray]:
        """Differences (trials, tickets, seeds, utterances) of tickets that are truly `worse`, and words."""
        known, utterances = self.both.shape[1:]
        picks = rng.integers(0, utterances, (trials, utterances))
        words = self.words[picks]  # (trials, utterances)
        normal = rng.normal(size=(trials, seeds, known)) / (known - 1) ** 0.5
        levels = np.einsum("ijk,lk->ilj", normal, self.levels)  # (trials, tickets, seeds), correlated as the ledger's
        chosen = rng.integers(0, known, (trials, seeds, utterances))
        both = self.both[:, chosen, picks[:, None, :]].swapaxes(0, 1)  # (trials, tickets, seeds, utterances)
        hard = self.hard[:, picks].swapaxes(0, 1)[:, :, None]
        return (worse + levels[..., None]) * words[:, None, None] + hard + both, words[:, None]

    def trials(self, count: int, seeds: int, worse: float):
        """(differences, words) in parts that fit the memory; the same each time."""
        rng = np.random.default_rng(seeds)
        most = max(1, AT_ONCE // (self.both.shape[0] * seeds * self.both.shape[2]))
        for start in range(0, count, most):
            yield self.draw(rng, min(most, count - start), seeds, worse)


def crossed(differences: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The verdict's own interval."""
    rate, variance, freedom = verdicts.crossed(differences, words)
    half = student_t(freedom) * np.sqrt(variance)
    return rate - half, rate + half


def pooled(differences: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Utterances alone, as if there were no other seeds: what one seed's bootstrap gives, too."""
    total = words.sum(-1)
    mean = differences.mean(-2)
    rate = mean.sum(-1) / total
    half = 1.96 * np.sqrt(((mean - rate[..., None] * words) ** 2).sum(-1)) / total
    return rate - half, rate + half


def nested(differences: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seeds and utterances added up: the interaction counts three times."""
    rate, *parts = verdicts.components(differences, words)
    half = 1.96 * np.sqrt(sum(parts))
    return rate - half, rate + half


def of_seeds(differences: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Student's t of the seeds' means, as if there were no other utterances."""
    rate, variance, *_ = verdicts.components(differences, words)
    half = verdicts.student_t(differences.shape[-2] - 1) * np.sqrt(variance)
    return rate - half, rate + half


RULES = {"crossed": crossed, "utterances alone": pooled, "seeds alone": of_seeds, "nested": nested}


def simulated(source: Source, rule, seeds: int, margin: float, worse: float = 0.0, trials: int = TRIALS):
    """Shares of the trials, each (tickets,): the interval holds the truth; it is called matching or winning."""
    holds, matches = [], []
    for differences, words in source.trials(trials, seeds, worse):
        low, high = rule(differences, words)
        holds.append((low <= worse) & (worse <= high))
        matches.append(high <= margin)
    return np.concatenate(holds).mean(0), np.concatenate(matches).mean(0)


def searches(source: Source, marked: list[int], seeds: int, margin: float, worse: float, trials: int = TRIALS):
    """Shares of searches whose tickets are all truly `worse`: some round is called matching; the sequence's first is.

    marked: the places of the sequence's tickets among the source's.
    """
    rule, some, first = crossed if seeds > 1 else pooled, [], []
    for differences, words in source.trials(trials, seeds, worse):
        matches = rule(differences, words)[1] <= margin
        some.append(matches.any(1))
        first.append(matches[:, marked[0]])
    return np.concatenate(some).mean(), np.concatenate(first).mean()


# ---------------------------------------------------------------------------- command line


def source_of(points: list[Point]) -> Source:
    """Of the seeds that all the points have."""
    seeds = [seed for seed in points[0].seeds if all(seed in point.seeds for point in points)]
    differences = []
    for point in points:
        errors, others, words = point.counts()
        differences.append((errors - others)[[point.seeds.index(seed) for seed in seeds]])
    return Source(np.array(differences, float), words)


def of_method(title: str, method: Method, seeds: list[int], worse: float, trials: int) -> list[str]:
    points = [point for point in method.marked() if len(point.seeds) > 1]
    if not points:
        return []
    rows = []
    for point, (name, rule), count in itertools.product(points, RULES.items(), seeds):
        source = source_of([point])
        covered, equal = simulated(source, rule, count, point.margin, 0.0, trials)
        _, wrong = simulated(source, rule, count, point.margin, worse, trials)
        rows.append([f"{point.mean('remaining'):.1%}", str(len(point.seeds)), name, str(count), f"{covered[0]:.1%}",
                     f"{equal[0]:.1%}", f"{wrong[0]:.1%}"])  # fmt: skip
    columns = ["remaining", "seeds known", "interval", "seeds", "coverage", "equal: called matching"]
    lines = [f"## {markdown_text(f'{title}: {method.name}')}", ""]
    lines += plan.markdown([*columns, f"{worse:g} worse: called matching"], rows)
    tickets = [point for point in method.tickets() if len(point.seeds) > 1]
    known = len(set.intersection(*(set(point.seeds) for point in tickets)))
    if known < 2:
        return [*lines, "", "The tickets have fewer than two seeds in common: no search can be simulated.", ""]
    source, marked = source_of(tickets), [tickets.index(point) for point in points]
    for count in (1, *seeds):
        some, first = searches(source, marked, count, points[0].margin, worse, trials)
        given = f"from {known} seeds known, {count} seed{'s' * (count > 1)}"
        lines += [""] * (count == 1) + [
            f"- All {len(tickets)} tickets {worse:g} worse, {given}: some round is called "
            f"matching in {some:.1%} of the searches, the sequence's first in {first:.1%}."
        ]
    return [*lines, ""]


@command(PROGRAM)
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog=PROGRAM, description="Coverage and power of verdicts, simulated from the errors in ledgers.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder; two seeds of a method or more")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), metavar="N",
                        help="seeds to simulate, at least 2 (default: 3 5 10)")  # fmt: skip
    parser.add_argument("--worse", type=float, default=0.02, metavar="WER",
                        help="what a ticket that should not match is behind (default: 0.02)")  # fmt: skip
    parser.add_argument("--trials", type=int, default=TRIALS, metavar="N", help=f"default: {TRIALS}")
    args = parser.parse_args(argv)
    if min(args.seeds) < 2 or args.trials < 1:
        parser.error(f"--seeds must be at least 2 and --trials at least 1, got {args.seeds} and {args.trials}")
    try:
        lines = []
        for title, methods in merge([run for run in map(load, args.runs) if run.rows]).items():
            for method in methods:
                lines += of_method(title, method, args.seeds, args.worse, args.trials)
        if not lines:
            raise lottery.LotteryError("no method with two seeds at a mark: how seeds vary cannot be seen")
        print("\n".join(["# Coverage and power of verdicts", "", *lines]), end="")
    except (lottery.LotteryError, OSError) as error:
        return fail(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
