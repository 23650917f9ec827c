"""What many runs say together: every round, the marks and where their sequence stopped, claims, comparisons."""

import argparse
import contextlib
import glob
import hashlib
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lottery
from audio_lottery import checked, verdicts
from audio_lottery.console import markdown_text
from lab import coverage, plan
from lab.compare import Method, Point, Run, compared, load, merge, of_test, paired, rivals, short_names

WORDS_EXPLAINED = (
    "*winning*: the interval lies below 0; *matching*: its upper end is at most {margin}; *worse*: it lies above 0; "
    "else *undecided*, with its power, the chance that a ticket truly equal to dense is called matching or winning; "
    f"*no verdict* where dense recognises nothing (WER {verdicts.NOTHING} or more)."
)


# ---------------------------------------------------------------------------- a verdict in words


def judged_over(point: Point, test: str = "", over: str = "utterances") -> str:
    """The verdict and its interval; the power of an undecided one."""
    found = point.verdict(test, over)
    return str(found) + (f", power {coverage.power(point, test, over):.0%}" if found.word == "undecided" else "")


def judged(point: Point, test: str = "") -> str:
    """The verdict; by speakers too, where they are known, and of the utterances whose texts train has not, where it
    has some."""
    words = judged_over(point, test)
    if found := point.by_speaker(test):
        words += f"; by {found[1]} speakers {judged_over(point, test, 'speakers')}"
    if found := point.of_new_texts(test):
        words += f"; {new_texts(point, test)}, {judged_over(point, test, 'new texts')}"
    return words


def new_texts(point: Point, test: str = "") -> str:
    """The WER over the utterances whose texts train has not; "" where it has none of them, or all."""
    found = point.of_new_texts(test)
    return f"WER {found[1]:.3f} on the {found[2]} texts that train has not" if found else ""


# ---------------------------------------------------------------------------- tables

README, SECOND = "official README", "one second-hand summary, unchecked"
PAPER = [  # backbone, what, test WER of dense, of the sparsest matching and of the best ticket, where from
    ("cnn-lstm", "LibriSpeech clean / other", "0.079 / 0.210", "0.079 / 0.205 at 21.0 %", "0.071 / 0.192 at 51.2 %",
     README),
    ("cnn-lstm", "LibriSpeech clean", "0.0802", "0.0798 at 21.0 %", "", SECOND),
    ("cnn-lstm", "TED-LIUM", "0.1593", "0.1570 at 4.4 %", "0.1404 at 16.8 %",
     f"{SECOND}; 4.4 % is in the abstract too"),
    ("cnn-lstm", "Common Voice", "", "at 16.8 %", "", SECOND),
    ("cnn-lstm", "TED-LIUM, random pruning", "0.1593", "at 26.2 %", "", f"{SECOND}; by layer, the ticket globally"),
    ("cnn-lstm", "TED-LIUM, random ticket", "0.1593", "at 10.7 %", "", f"{SECOND}; the code draws in round 1 alone"),
    ("cnn-lstm", "TED-LIUM, blocks of 1x4", "0.1593", "0.1566 at 4.4 %", "", f"{SECOND}; no code"),
    ("cnn-lstm", "TED-LIUM, from LibriSpeech's weights", "", "0.1345", "0.1169 at 32.8 %", f"{SECOND}; no code"),
    ("cnn-lstm", "TED-LIUM, mask of LibriSpeech", "0.1593", "0.1588 at 32.8 %", "", SECOND),
    ("cnn-lstm", "TED-LIUM, mask of Common Voice", "0.1593", "0.1593 at 41.0 %", "", SECOND),
    ("cnn-lstm", "TED-LIUM, noise of level 0.2", "0.1680", "0.1575", "", f"{SECOND}; a gain, its SNR unknown"),
    ("cnn-lstm", "TED-LIUM, noise of level 0.5", "0.3821", "0.1582", "",
     f"{SECOND}; suspicious: no noise in its test"),
    ("rnnt", "LibriSpeech clean", "0.0590", "0.0571 at 10.7 %", "", f"{SECOND}; no code, no shape"),
    ("conformer", "LibriSpeech clean / other", "0.025 / 0.068", "0.024 / 0.064 at 16.8 %", "0.021 / 0.061 at 51.2 %",
     f"{README}; test utterances over 15 s dropped; 16.8 % of linear weights, 27.6 % of all"),
    ("conformer", "LibriSpeech clean", "0.0255", "0.0249 at 16.8 %", "", SECOND),
]  # fmt: skip
CAVEAT = (
    "The paper's points: WER as a fraction, as everywhere here; other corpora, n-gram language models, no seeds and no "
    "intervals in any source. The official CNN-LSTM code chooses its epoch on the test set. The READMEs print 51.8 and "
    "16.2 % where the ladder of 0.8^k has 51.2 and 16.8 %."
)
EXPLAINED = (
    "Against dense: verdict and 95 % interval of WER(ticket) - WER(dense). One seed: paired bootstrap over test "
    "utterances, of that seed alone. More: seeds crossed with utterances (V_seeds + V_utterances - V_interaction, "
    "Student's t with Satterthwaite's degrees of freedom), so that the interval is of other seeds and other "
    "utterances. " + WORDS_EXPLAINED.format(margin="the margin") + " No round is chosen on the test: rounds that were "
    "named beforehand (the marks) are judged from dense to sparse, up to the first that is neither winning nor "
    "matching; a verdict of any other round is for reading on. Beside a mark in brackets: Holm's p, one-sided, the "
    "chance of so low a difference if its ticket truly loses the margin, corrected for all marks; 0.025 or less is "
    "matching whatever their order. "
    "`remaining` is of the prunable weights, `of all` of all "
    f"parameters. Multiply-adds: products with weights as speech is recognised, {plan.TOKENS_A_SECOND} tokens a "
    "second; of the ticket, zeros are skipped. ± is the standard deviation over seeds."
)
MERGED = ["test set", "method", "round", "remaining", "of all", "seeds", "valid WER", "test WER", "test CER"]
MERGED += ["test WER less dense's", "against dense", "multiply-adds a second: dense, ticket", "layers without a weight"]
MERGED += ["narrower network", "steps, all that led to it"]


def spread(values: list[float], sign: str = "") -> str:
    return f"{statistics.fmean(values):{sign}.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def seeds_of(point: Point) -> str:
    return f"{len(point.seeds)} seed{'s' * (len(point.seeds) > 1)}"


def is_mark(method: Method, point: Point) -> bool:
    return any(point is mark for mark in method.marked())


def merged_cells(method: Method, point: Point, test: str) -> list[str]:
    """A round of a method under MERGED."""
    whole, skipped = method.multiply_adds(point)
    marked = is_mark(method, point)
    return [
        markdown_text(test or "test"), markdown_text(method.name), str(point.round) + (", a mark" if marked else ""),
        *(f"{point.mean(key):.1%}" for key in ("remaining", "remaining_all")),
        str(len(point.seeds)), spread(point.values("valid_wer")),
        *(spread(point.values(key, test)) for key in ("test_wer", "test_cer")),
        *([spread(point.differences("test_wer", test), "+"), judged(point, test)] if point.round
          else ["-", new_texts(point, test) or "-"]),
        f"{whole / 1e6:.1f} M, {skipped / 1e6:.1f} M ({skipped / whole:.1%})",
        markdown_text(", ".join(point.empty_layers())),
        narrower(point), f"{point.rows[0]['steps_in_all']:,}" if "steps_in_all" in point.rows[0] else "",
    ]  # fmt: skip


def curves(methods: list[Method]) -> list[str]:
    """What most readers want of searches: a row a round, the marks bold, a column a test set. [] without a search."""
    searches = [method for method in methods if not method.get("control") and not method.get("ticket")]
    points = [(method, point) for method in searches for point in method.points.values()]
    tests = list(dict.fromkeys(test for _, point in points for test in point.tests() if test))
    new = any(point.of_new_texts() for _, point in points)
    columns = ["method"] * (len(searches) > 1) + ["remaining", "weights kept", "seeds", "valid WER", "test WER", "CER"]
    columns += ["WER, new texts"] * new + ["against dense", *(f"WER, {markdown_text(test)}" for test in tests)]
    rows = []
    for method, point in points:
        share, found = f"{point.mean('remaining'):.1%}", point.of_new_texts()
        cells = [markdown_text(method.name)] * (len(searches) > 1)
        cells += [f"**{share}**" if is_mark(method, point) else share, f"{point.mean('kept'):,.0f}"]
        fewer = f" (dense of these: {point.mean_other('test_wer'):.3f})"
        cells += [str(len(point.seeds)), f"{point.mean('valid_wer'):.3f}"]
        cells += [spread(point.values("test_wer")) + fewer * method.lacks_seeds(point)]
        cells += [f"{point.mean('test_cer'):.3f}"] + [f"{found[1]:.3f}" if found else ""] * new
        cells += [judged_over(point) if point.round else ""]
        rows.append(cells + [f"{point.mean('test_wer', t):.3f}" if t in point.tests() else "" for t in tests])
    return [*plan.markdown(columns, rows), ""] if rows else []


def narrower(point: Point) -> str:
    """Widths, heads and parameters of a dense network of other sizes than the method's."""
    row = point.rows[0]
    words = {"width": "wide", "inner": "wide inside", "hidden": "hidden", "heads": "heads", "channels": "channels"}
    words |= {"predictor": "in the predictor", "joiner": "in the joiner", "first_channels": "channels first"}
    sizes = row.get("sizes", {})
    said = [f"{checked.said(sizes[key])} {word}" for key, word in words.items() if key in sizes]
    return markdown_text(", ".join(said + ([f"{row['parameters']:,} parameters"] if "parameters" in row else [])))


def told(point: Point | None) -> str:
    """A ticket in the summary."""
    if point is None:
        return "none"
    shares = f"{point.mean('remaining'):.1%} ({point.mean('remaining_all'):.1%} of all)"
    return f"{spread(point.values('test_wer'))} at {shares}, {judged(point)}, {seeds_of(point)}"


def other_seeds(methods: list[Method]) -> list[str]:
    """A warning of each method whose marks, up to its stop, have not the same seeds, as where a run is not finished."""
    lines = []
    for m in methods:
        marks, (_, stopped) = m.marked(), m.walk()
        marks = marks[: marks.index(stopped) + 1] if stopped else marks
        seeds = {f"{p.mean('remaining'):.1%}": ", ".join(map(str, sorted(p.seeds))) for p in marks}
        if len(set(seeds.values())) > 1:
            told = "; ".join(f"{share}: {numbers}" for share, numbers in seeds.items())
            lines += [f"{markdown_text(m.name)}: the marks have not the same seeds ({told}): no sequence yet.", ""]
    return lines


def rounded_up(p: float) -> float:
    """To three digits: 0.0251 is not to be read as 0.025."""
    return math.ceil(1000 * p - 1e-9) / 1000


def tables(methods: list[Method]) -> list[str]:
    """Curves, summary, the paper's points, every round on every test set, and comparisons of methods."""
    columns = ["method", "dense, test WER", "marks, Holm's p", "sparsest winning or matching ticket at the marks"]
    columns += ["the sequence stopped at", "ticket with the best valid WER"]
    rows = []
    for m in methods:
        sparsest, stopped = m.walk()
        marks = [f"{point.mean('remaining'):.1%} ({rounded_up(p):.3f})" for point, p in zip(m.marked(), m.holm())]
        rows.append(
            [
                markdown_text(m.name),
                spread(m.dense().values("test_wer")),
                ", ".join(marks) or "no round near one",
                *map(told, (sparsest, stopped, m.best())),
            ]
        )
    lines = [*curves(methods), *plan.markdown(columns, rows), "", *other_seeds(methods)]
    rows = [list(row[1:]) for row in PAPER if row[0] == methods[0].settings["backbone"]]
    columns = ["the paper's", "dense, test WER", "sparsest matching ticket", "best ticket", "source"]
    lines += [*plan.markdown(columns, rows), ""] if rows else []
    points = [(method, point) for method in methods for point in method.points.values()]
    tests = dict.fromkeys(test for _, point in points for test in point.tests())
    rows = [merged_cells(m, point, test) for test in tests for m, point in points if test in point.tests()]
    lines += plan.markdown(MERGED, rows)
    rows = [
        [markdown_text(f"{a.name} less {b.name}"), f"{p.mean('remaining'):.1%}", str(len(p.seeds)),
         word_of(p, "", ("winning",)), interval(p, "", ("winning",))]
        for a, b in rivals(methods) for p in compared(a, b)
    ]  # fmt: skip
    if rows:
        lines += ["", *plan.markdown(["test WER", "remaining", "seeds", "the first is better", "95 % interval"], rows)]
    return lines


# ---------------------------------------------------------------------------- claims

MATCHES = ("winning", "matching")
FORESTS = {
    "forest.png": "each claim's interval against 0 and the margin",
    "forest-other-tests.png": "the same of the other tests, as in noise",
}


class Claim(NamedTuple):
    what: str
    label: str  # in the forest
    point: Point
    test: str = ""
    true: tuple[str, ...] = MATCHES  # the words with which it holds


def word_of(point: Point, test: str = "", true: tuple[str, ...] = MATCHES) -> str:
    """Whether a claim holds; that a ticket matches is refuted only above the margin, that one is better above 0."""
    told = point.verdict(test)
    if told.word in (*true, "no verdict"):
        return "holds" if told.word in true else told.word
    return "does not hold" if told.low > (point.margin if true == MATCHES else 0) else "undecided"


def interval(point: Point, test: str = "", true: tuple[str, ...] = MATCHES) -> str:
    """The interval, and behind it, of an undecided claim: that a ticket matches has a power; that one method is better
    has the gain that would be found. Then what is shown all the same: that it is worse than dense, or matches."""
    told, shown = point.verdict(test), ""
    if word_of(point, test, true) == "undecided":
        if true != MATCHES:
            shown = f", finds a gain of {coverage.gain_found(point, test):.3f}"
        elif told.word == "undecided":
            shown = f", power {coverage.power(point, test):.0%}"
        shown += f", {told.word}" if told.word in ("worse", "matching") else ""
    return f"[{told.low:+.3f}, {told.high:+.3f}]{shown}"


def claims(methods: list[Method]) -> list[Claim]:
    """What these runs can speak to, at the marks: tickets against dense, and rivals."""
    found, (_, short) = [], short_names(methods)
    for method in methods:
        _, stopped = method.walk()
        for point in method.marked() if not method.get("control") else ():
            share = f"{point.mean('remaining'):.1%}"
            after = stopped is not None and point.mean("remaining") < stopped.mean("remaining")
            what = f"{method.name} with {share} of the weights matches dense"
            label = f"{short[method.name]}, {share}"
            if after:
                what += f" (after {stopped.mean('remaining'):.1%}, where the sequence stopped)"
                label += ", after the stop"
            found += [Claim(what, f"{label}{f', {test}' if test else ''}", point, test) for test in point.tests()]
    for a, b in rivals(methods):
        points = compared(a, b)
        rows = [id(row) for point in a.marked() for row in point.rows]
        for point in [p for p in points if id(p.rows[0]) in rows] or points[-1:]:
            share = f"{point.mean('remaining'):.1%}"
            what = f"{a.name} is better than {b.name} at {share}"
            found.append(Claim(what, f"{short[a.name]} less {short[b.name]}, {share}", point, true=("winning",)))
    return found


def forests(groups: dict[str, list[Claim]]) -> dict[str, dict[str, list[Claim]]]:
    """The claims that each picture of FORESTS shows; none of a picture that would show none."""
    found = {}
    for name, others in zip(FORESTS, (False, True)):
        shown = {title: [claim for claim in claims if bool(claim.test) is others] for title, claims in groups.items()}
        found |= {name: shown} if any(shown.values()) else {}
    return found


def said(title: str, claim: Claim) -> str:
    _, _, p, test, true = claim
    return (
        f"- {markdown_text(f'{title}: {claim.what}' + (f' on {test}' if test else ''))}: "
        f"**{word_of(p, test, true)}**, {interval(p, test, true)}, "
        f"{seeds_of(p)} ({', '.join(map(str, sorted(p.seeds)))}), "
        f"{len(of_test(p.rows[0], test)['test_words'])} test utterances."
    )


def file_name(title: str) -> str:
    """For a picture: letters, digits, dots and hyphens, and not too many for a file system."""
    name = re.sub(r"[^\w.-]+", "-", title)
    return name if len(name.encode()) <= 200 else f"{name[:40]}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"


def merged_report(groups: dict[str, list[Method]], pictured: bool) -> str:
    lines = ["# Tickets: seeds and methods", "", EXPLAINED, "", CAVEAT]
    for title, methods in groups.items():
        lines += ["", f"## {markdown_text(title)}", "", *tables(methods)]
        if pictured:
            lines += ["", f"![WER and CER against remaining weights]({file_name(title)}.png)"]
            lines += ["", f"![weights kept, by layer]({file_name(title)}-layers.png)"]
    by_title = {title: claims(methods) for title, methods in groups.items()}
    found = [said(title, claim) for title, those in by_title.items() for claim in those]
    explained = (
        "Each about a mark: rounds that were named before any result (comparisons of methods without one: the "
        "sparsest). Intervals are of a difference of test WER. A ticket matches if it is winning or matching, and does "
        "not if the interval lies above the margin; undecided, worse, if it lies above 0 only. One method is better if "
        "it is winning, undecided if no more is shown than that it matches; beside that stands the true gain with "
        "which it would be called better in 80 % of experiments as large."
    )
    found = found or ["None yet: no round is near a mark."]
    shown = [line for name in forests(by_title) for line in ("", f"![{FORESTS[name]}]({name})")] if pictured else []
    return "\n".join([*lines, "", "## Claims", "", explained, "", *found, *shown, ""])


# ---------------------------------------------------------------------------- two sets of runs


def read(path: Path) -> Run:
    """A run that can be told of. Raises LotteryError for one with a value that no run of train.py has."""
    run = load(path)
    with wrong_values(path):
        if run.rows:
            merged_report(merge([run]), pictured=False)
    return run


@contextlib.contextmanager
def wrong_values(path: Path) -> Iterator[None]:
    """Whatever a ledger that was chained again makes the tables trip over is a LotteryError that names the run."""
    try:
        yield
    except (lottery.LotteryError, OSError):
        raise
    except Exception as error:
        raise lottery.LotteryError(
            f"{path}: a value is missing or of the wrong kind ({type(error).__name__}: {error})"
        ) from None


def paths_of(text: str) -> list[Path]:
    """Run folders between commas, each by its path or as a pattern. Raises LotteryError where a part finds none."""
    paths = []
    for part in text.split(","):
        found = sorted(glob.glob(part))
        if not found:
            raise lottery.LotteryError(f"--compare {part}: no such run")
        paths += [Path(path) for path in found if Path(path) not in paths]
    return paths


def rounds_pair(text: str) -> tuple[int, int]:
    """R, or R:Q: A's round and B's."""
    if not re.fullmatch("[0-9]{1,6}(:[0-9]{1,6})?", text):
        raise argparse.ArgumentTypeError(f"must be R or R:Q, rounds of A and of B, got {text!r}")
    first, _, second = text.partition(":")
    return int(first), int(second or first)


def comparison(a: str, b: str, rounds: list[tuple[int, int]] | None) -> tuple[list[str], list[Claim]]:
    """A table of A less B, and its rows as claims. Raises LotteryError for sets that cannot be compared."""
    sets = [[read(path) for path in paths_of(part)] for part in (a, b)]
    points = paired(*sets, rounds)
    left_out = other_noise([run.config for part in sets for run in part])
    columns = ["rounds, A and B", "remaining, A and B", "test set", "seeds", "test WER, A", "test WER, B", "A less B"]
    rows, found = [], []
    for p in points:
        shares = f"{p.mean('remaining'):.1%}", f"{p.mean_other('remaining'):.1%}"
        every = [row.get("other_tests", {}) for row in p.rows + p.others]
        for test in [test for test in p.tests() if not test or all(test in tests for tests in every)]:
            if test.endswith(" dB") and left_out:
                continue
            values = spread(p.values("test_wer", test)), spread([of_test(o, test)["test_wer"] for o in p.others])
            seeds = ", ".join(map(str, sorted(p.seeds)))
            rows.append([f"{p.round}, {p.others[0]['round']}", ", ".join(shares), markdown_text(test or "test"), seeds,
                         *values, spread(p.differences("test_wer", test), "+"), judged(p, test)])  # fmt: skip
            label = " less ".join(dict.fromkeys(shares)) + (f", {test}" if test else "")
            found.append(Claim("", label, p, test))
    lines = [
        "# A less B",
        "",
        f"- A: {markdown_text(a)}",
        f"- B: {markdown_text(b)}",
        f"- utterances: {len(points[0].counts()[2])}",
        "",
    ]
    lines += [left_out, ""] * bool(left_out)
    return [*lines, *plan.markdown([*columns, "verdict, 95 % interval"], rows), "", COMPARED, ""], found


def other_noise(configs: list[dict]) -> str:
    """Why tests in noise are left out; "" if nothing says that their noise is another.

    Of runs that were trained in noise noise_sha256 is of that too: it is compared among those, and among the others.
    """
    for trained in (False, True):
        hashes = {c.get("noise_sha256") for c in configs if c.get("noise_sha256") and bool(c.get("snr")) == trained}
        if len(hashes) > 1:
            return "Tests in noise are left out: the recordings of the noise are others (noise_sha256)."
    if len({c.get("noise_draws") for c in configs if c.get("noise_sha256")}) > 1:
        return "Tests in noise are left out: the noise was drawn in another way (noise_draws)."
    return ""


COMPARED = (
    "The verdict is A's against B's, as a ticket's against dense: *winning*, A is better; *matching*, at most the "
    "margin worse; *worse*; *undecided*, with its power. B may recognise nothing: what beats it wins. Pairs are named "
    "by who runs the command, so several of them are several tests."
)


def forest_of(groups: dict[str, list[Claim]]) -> list[tuple[str, verdicts.Verdict, float]]:
    """Rows of the picture, by group: the first test's, then the other tests'."""
    rows = []
    for title, found in groups.items():
        tests = list(dict.fromkeys(["", *(claim.test for claim in found)]))
        for claim in sorted(found, key=lambda claim: tests.index(claim.test)):
            label = f"{title}: {claim.label}" if title else claim.label
            rows.append((label, claim.point.verdict(claim.test), claim.point.margin))
    return rows
