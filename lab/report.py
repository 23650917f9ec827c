"""Tables and pictures: of one run, from its ledger, and of many, with what they say of the paper's claims.

python -m lab.report RUN [RUN ...] [--out FOLDER]
"""

import hashlib
import io
import itertools
import json
import re
import statistics
import sys
from pathlib import Path

if __name__ == "__main__":
    from lab import missing

    missing.in_one_line("lab.report")

import numpy as np

import lottery
from audio_lottery import files, verdicts
from audio_lottery.console import Parser, command, fail, markdown_text, printable
from lab import plan
from lab.compare import Method, Point, Run, compared, load, merge, of_test, rivals

PROGRAM = "python -m lab.report"
COLUMNS = ["round", "remaining", "of all", "valid WER", "test WER", "test CER", "seconds", "against dense"]


# ---------------------------------------------------------------------------- one run


def cells(row: dict) -> list[str]:
    """A ledger row under COLUMNS."""
    shares = [f"{row[key]:.1%}" for key in ("remaining", "remaining_all")]
    rates = [f"{row[key]:.3f}" for key in ("valid_wer", "test_wer", "test_cer")]
    against = str(verdicts.Verdict(row["verdict"], *row["interval"])) if row["round"] else "-"
    return [str(row["round"]), *shares, *rates, f"{row['seconds']:.0f}", against]


def text_line(texts: list[str]) -> str:
    return "  ".join([text.rjust(len(column)) for text, column in zip(texts[:-1], COLUMNS)] + texts[-1:])


def markdown_table(ledger: list[dict]) -> list[str]:
    return plan.markdown(COLUMNS, list(map(cells, ledger)), right=7)


def summary(config: dict, ledger: list[dict]) -> list[str]:
    """The dense model, the sparsest ticket that is not behind it, the best one, and what the last one multiplies."""
    ((method,),) = merge([Run(config, ledger)]).values()
    dense, tickets = ledger[0], method.tickets()
    lines = [f"dense: test WER {dense['test_wer']:.3f}, CER {dense['test_cer']:.3f}"]
    for name, point in (
        ("sparsest winning or matching ticket", method.sparsest()),
        ("ticket with the best valid WER", method.best()),
    ):
        if point:
            (row,) = point.rows
            lines.append(
                f"{name}: round {row['round']}, {row['remaining']:.1%} of the prunable and {row['remaining_all']:.1%} "
                f"of all weights remain, test WER {row['test_wer']:.3f}, {row['verdict']}"
            )
        elif tickets:
            lines.append(f"{name}: none")
    for name in dense.get("other_tests", {}):
        rates = ", ".join(f"{r['round']}: {r['other_tests'][name]['test_wer']:.3f}" for r in ledger)
        lines.append(f"{name}: test WER by round {rates}")
    if tickets:
        whole, skipped = method.multiply_adds(tickets[-1])
        lines.append(
            f"multiply-adds a second of audio: dense {whole / 1e6:.1f} M, round {ledger[-1]['round']} "
            f"{skipped / 1e6:.1f} M with zeros skipped ({skipped / whole:.1%})"
        )
    seeds_and_utterances = f"1 seed, {len(dense['test_words'])} test utterances"
    return [*lines, f"95 % intervals of WER(ticket) - WER(dense): {seeds_and_utterances}, each ticket tested once"]


def write_report(out: Path, config: dict, ledger: list[dict]) -> None:
    """report.md and report.png of one run."""
    utterances = len(ledger[0]["test_words"])
    explained = (
        f"Against dense: 95 % interval of WER(ticket) - WER(dense), paired bootstrap over {utterances} test "
        f"utterances, 1 seed, no correction for testing {len(ledger) - 1} tickets. *winning*: the interval lies below "
        f"0; *matching*: its upper end is at most {config['margin']}; *worse*: it lies above 0; else *undecided*. Each "
        "round is tested once, at its epoch with the best valid WER; pruning uses the last epoch. `remaining` is of "
        "the prunable weights, `of all` of all parameters."
    )
    lines = [f"# {config['backbone']} on {markdown_text(config['machine']['data'])}, seed {config['seed']}", ""]
    lines += [
        *(f"- {markdown_text(line)}" for line in summary(config, ledger)),
        "",
        explained,
        "",
        *markdown_table(ledger),
    ]
    for name in ledger[0].get("other_tests", {}):
        lines += [
            "",
            f"{markdown_text(name)}:",
            "",
            *markdown_table([row | row["other_tests"][name] for row in ledger]),
        ]
    lines += ["", "![WER and CER against remaining weights](report.png)", ""]
    lines += ["```json", json.dumps(config, indent=2), "```", ""]
    files.write_atomically(out / "report.md", "\n".join(lines).encode())
    ((title, methods),) = merge([Run(config, ledger)]).items()
    draw(out / "report.png", f"{title}, seed {config['seed']}", methods)


# ---------------------------------------------------------------------------- many runs: tables

README, SECOND = "official README", "one second-hand summary, unchecked"
PAPER = [  # backbone, what, test WER in % of dense, of the sparsest matching and of the best ticket, where from
    ("cnn-lstm", "LibriSpeech clean / other", "7.9 / 21.0", "7.9 / 20.5 at 21.0 %", "7.1 / 19.2 at 51.2 %", README),
    ("cnn-lstm", "LibriSpeech clean", "8.02", "7.98 at 21.0 %", "", SECOND),
    ("cnn-lstm", "TED-LIUM", "15.93", "15.70 at 4.4 %", "14.04 at 16.8 %", f"{SECOND}; 4.4 % is in the abstract too"),
    ("cnn-lstm", "Common Voice", "", "at 16.8 %", "", SECOND),
    ("cnn-lstm", "TED-LIUM, random pruning", "15.93", "at 26.2 %", "", f"{SECOND}; by layer, the ticket globally"),
    ("cnn-lstm", "TED-LIUM, random ticket", "15.93", "at 10.7 %", "", f"{SECOND}; the code draws in round 1 alone"),
    ("cnn-lstm", "TED-LIUM, blocks of 1x4", "15.93", "15.66 at 4.4 %", "", f"{SECOND}; no code"),
    ("cnn-lstm", "TED-LIUM, from LibriSpeech's weights", "", "13.45", "11.69 at 32.8 %", f"{SECOND}; no code"),
    ("cnn-lstm", "TED-LIUM, mask of LibriSpeech", "15.93", "15.88 at 32.8 %", "", SECOND),
    ("cnn-lstm", "TED-LIUM, mask of Common Voice", "15.93", "15.93 at 41.0 %", "", SECOND),
    ("cnn-lstm", "TED-LIUM, noise of level 0.2", "16.80", "15.75", "", f"{SECOND}; a gain, its SNR unknown"),
    ("cnn-lstm", "TED-LIUM, noise of level 0.5", "38.21", "15.82", "", f"{SECOND}; suspicious: no noise in its test"),
    ("rnnt", "LibriSpeech clean", "5.90", "5.71 at 10.7 %", "", f"{SECOND}; no code, no shape"),
    ("conformer", "LibriSpeech clean / other", "2.5 / 6.8", "2.4 / 6.4 at 16.8 %", "2.1 / 6.1 at 51.2 %",
     f"{README}; test utterances over 15 s dropped; 16.8 % of linear weights, 27.6 % of all"),
    ("conformer", "LibriSpeech clean", "2.55", "2.49 at 16.8 %", "", SECOND),
]  # fmt: skip
CAVEAT = (
    "The paper's points: other corpora, n-gram language models, no seeds and no intervals in any source. The official "
    "CNN-LSTM code chooses its epoch on the test set. The READMEs print 51.8 and 16.2 % where the ladder of 0.8^k has "
    "51.2 and 16.8 %."
)
EXPLAINED = (
    "Against dense: verdict and 95 % interval of WER(ticket) - WER(dense), paired bootstrap over test utterances, "
    "seeds pooled: the interval is of these seeds; how seeds vary, the standard deviation (±) tells. No correction for "
    "testing many tickets. `remaining` is of the prunable weights, `of all` of all parameters. Multiply-adds: products "
    f"with weights in the forward pass of the loss, {plan.TOKENS_A_SECOND} tokens a second; of the ticket, zeros are "
    "skipped."
)
MERGED = ["test set", "method", "round", "remaining", "of all", "seeds", "valid WER", "test WER", "test CER"]
MERGED += ["test WER less dense's", "against dense", "multiply-adds a second: dense, ticket", "layers without a weight"]


def spread(values: list[float], sign: str = "") -> str:
    return f"{statistics.fmean(values):{sign}.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def seeds_of(point: Point) -> str:
    return f"{len(point.seeds)} seed{'s' * (len(point.seeds) > 1)}"


def merged_cells(method: Method, point: Point, test: str) -> list[str]:
    """A round of a method under MERGED."""
    whole, skipped = method.multiply_adds(point)
    return [
        markdown_text(test or "test"), markdown_text(method.name), str(point.round),
        *(f"{point.mean(key):.1%}" for key in ("remaining", "remaining_all")),
        str(len(point.seeds)), spread(point.values("valid_wer")),
        *(spread(point.values(key, test)) for key in ("test_wer", "test_cer")),
        *([spread(point.differences("test_wer", test), "+"), str(point.verdict(test))] if point.round else ["-", "-"]),
        f"{whole / 1e6:.1f} M, {skipped / 1e6:.1f} M ({skipped / whole:.1%})",
        markdown_text(", ".join(point.empty_layers())),
    ]  # fmt: skip


def told(point: Point | None) -> str:
    """A ticket in the summary."""
    if point is None:
        return "none"
    shares = f"{point.mean('remaining'):.1%} ({point.mean('remaining_all'):.1%} of all)"
    return f"{spread(point.values('test_wer'))} at {shares}, {point.verdict()}, {seeds_of(point)}"


def tables(methods: list[Method]) -> list[str]:
    """Summary beside the paper's points, every round on every test set, and comparisons of methods."""
    columns = ["method", "dense, test WER", "sparsest winning or matching ticket", "ticket with the best valid WER"]
    rows = [
        [markdown_text(m.name), spread(m.dense().values("test_wer")), told(m.sparsest()), told(m.best()), "these runs"]
        for m in methods
    ]
    rows += [[f"paper: {row[1]}", *row[2:]] for row in PAPER if row[0] == methods[0].settings["backbone"]]
    lines = [*plan.markdown([*columns, "source"], rows), ""]
    points = [(method, point) for method in methods for point in method.points.values()]
    tests = dict.fromkeys(test for _, point in points for test in point.tests())
    rows = [merged_cells(m, point, test) for test in tests for m, point in points if test in point.tests()]
    lines += plan.markdown(MERGED, rows)
    rows = [
        [markdown_text(f"{a.name} less {b.name}"), f"{p.mean('remaining'):.1%}",
         str(len(p.seeds)), word_of(p), interval(p)]
        for a, b in rivals(methods) for p in compared(a, b)
    ]  # fmt: skip
    if rows:
        lines += ["", *plan.markdown(["test WER", "remaining", "seeds", "the first is better", "95 % interval"], rows)]
    return lines


# ---------------------------------------------------------------------------- many runs: claims

LIMITS = (0.2005, 0.0445)  # remaining weights that claims are about: a fifth, and the paper's 4.4 %; counts are rounded


def word_of(point: Point, test: str = "", true: tuple[str, ...] = ("winning",)) -> str:
    word = point.verdict(test).word
    return "holds" if word in true else "does not hold" if word == "worse" else "undecided"


def interval(point: Point, test: str = "") -> str:
    _, low, high = point.verdict(test)
    return f"[{low:+.3f}, {high:+.3f}]"


def at_limits(points: list[Point]) -> list[Point]:
    """The first of the points, which grow sparser, at or below each limit: chosen by no result."""
    found = [next((p for p in points if p.mean("remaining") <= limit), None) for limit in LIMITS]
    return [point for i, point in enumerate(found) if point and point not in found[:i]]


def claims(title: str, methods: list[Method]) -> list[str]:
    """A sentence for each claim that these runs can speak to."""
    found = [  # claim, point, test set, verdicts that it holds with
        (f"{method.name} with {p.mean('remaining'):.1%} of the weights matches dense", p, test, ("winning", "matching"))
        for method in methods if not method.get("control")
        for p in at_limits(method.tickets()) for test in p.tests()
    ]  # fmt: skip
    for a, b in rivals(methods):
        points = compared(a, b)
        for p in at_limits(points) or points[-1:]:
            found.append((f"{a.name} is better than {b.name} at {p.mean('remaining'):.1%}", p, "", ("winning",)))
    return [
        f"- {markdown_text(f'{title}: {claim}' + (f' on {test}' if test else ''))}: "
        f"**{word_of(p, test, true)}**, {interval(p, test)}, "
        f"{seeds_of(p)} ({', '.join(map(str, sorted(p.seeds)))}), "
        f"{len(of_test(p.rows[0], test)['test_words'])} test utterances."
        for claim, p, test, true in found
    ]


def merged_report(groups: dict[str, list[Method]], pictures: bool) -> str:
    lines = ["# Tickets: seeds and methods", "", EXPLAINED, "", CAVEAT]
    for title, methods in groups.items():
        lines += ["", f"## {markdown_text(title)}", "", *tables(methods)]
        if pictures:
            lines += ["", f"![WER and CER against remaining weights]({file_name(title)}.png)"]
            lines += ["", f"![weights kept, by layer]({file_name(title)}-layers.png)"]
    said = [line for title, methods in groups.items() for line in claims(title, methods)]
    explained = (
        "Each about the first round with at most 20 % and at most 4.4 % of the prunable weights, which no result chose "
        "(comparisons of methods without such a round: the sparsest). Intervals are of a difference of test WER. "
        "A ticket matches if it is winning or matching, and does not if it is worse."
    )
    said = said or ["None yet: no ticket is sparse enough."]
    return "\n".join([*lines, "", "## Claims", "", explained, "", *said, ""])


# ---------------------------------------------------------------------------- pictures

T975 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % of Student's t, 1, 2, ... degrees of freedom


def file_name(title: str) -> str:
    """For a picture: letters, digits, dots and hyphens, and not too many for a file system."""
    name = re.sub(r"[^\w.-]+", "-", title)
    return name if len(name.encode()) <= 200 else f"{name[:40]}-{hashlib.sha256(title.encode()).hexdigest()[:8]}"


def plain(text: str) -> str:
    """A foreign text for a picture: one line, and no mathematics, which matplotlib finds between two $."""
    return printable(text).replace("$", r"\$")


def wer_band(point: Point) -> tuple[float, float]:
    """The paired interval about dense."""
    _, low, high = point.verdict()
    return point.mean_other("test_wer") + low, point.mean_other("test_wer") + high


def cer_band(point: Point) -> tuple[float, float] | None:
    """t-interval over seeds of CER(ticket) - CER(dense), about dense; None of one seed.

    Ledgers count no character errors by utterance, so that there is nothing to resample.
    """
    differences = point.differences("test_cer")
    n = len(differences)
    if n == 1:
        return None
    half = T975[min(n - 1, len(T975)) - 1] * statistics.stdev(differences) / n**0.5
    return point.mean("test_cer") - half, point.mean("test_cer") + half


def save(path: Path, figure) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png", metadata={"Software": None})
    files.write_atomically(path, content.getvalue())


def draw(path: Path, title: str, methods: list[Method]) -> None:
    """WER and CER against remaining weights, a line a method: the mean over seeds with its 95 % band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    sparsest = min(100 * point.mean("remaining") for method in methods for point in method.points.values())
    for ax, key, name, band, kind in zip(
        figure.subplots(1, 2), ("test_wer", "test_cer"), ("test WER", "test CER"), (wer_band, cer_band),
        ("paired bootstrap over utterances, seeds pooled", "t-interval over seeds, from two on"),
    ):  # fmt: skip
        limits = []
        for color, method in zip((f"C{i % 10}" for i in range(len(methods))), methods):
            points = list(method.points.values())
            remaining, rates = [100 * p.mean("remaining") for p in points], [p.mean(key) for p in points]
            few, many = (choose(len(p.seeds) for p in points) for choose in (min, max))
            seeds = f"{few} to {many} seeds" if few < many else seeds_of(points[0])
            ax.axhline(rates[0], color=color, linewidth=1, linestyle="--")
            ax.plot(remaining, rates, "o-", color=color, markersize=4, label=plain(f"{method.name}, {seeds}"))
            bands = [(x, *band(p)) for x, p in zip(remaining[1:], points[1:]) if band(p)]
            if bands:
                ax.fill_between(*map(list, zip(*bands)), color=color, alpha=0.2)
            limits += rates + [y for _, *pair in bands for y in pair if band is wer_band]
        ax.set_ylim(min(limits) - 0.02, max(limits) + 0.02)  # a band of two seeds may reach far beyond
        ax.set(xscale="log", xlabel="remaining prunable weights, %", ylabel=name)
        ax.set_title(f"dashed: dense; bands: 95 %, against dense, {kind}", fontsize=8)
        ticks = [t for t in (100, 50, 20, 10, 5, 2, 1) if t >= 0.8 * sparsest]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
        ax.legend(loc="upper left", fontsize=8)
    figure.suptitle(plain(title))
    save(path, figure)


def draw_layers(path: Path, title: str, methods: list[Method]) -> None:
    """The share of weights kept by layer and round, a panel a method; controls only where there is nothing else."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    methods = [method for method in methods if not method.get("control")] or methods
    shares = [np.array(list(method.layer_shares().values())) for method in methods]
    names, least = list(methods[0].layer_shares()), min(array[array > 0].min() for array in shares)
    width = 3 + 0.45 * sum(array.shape[1] for array in shares)
    figure = Figure(figsize=(max(width, 6), 1.6 + 0.25 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(methods), sharey=True, squeeze=False)[0]
    for ax, method, array in zip(axes, methods, shares):
        image = ax.imshow(np.ma.masked_equal(array, 0), norm=LogNorm(min(least, 0.99), 1), aspect="auto")
        remaining = [f"{100 * point.mean('remaining'):.3g}" for point in method.points.values()]
        ax.set_xticks(range(len(remaining)), remaining, fontsize=7)
        ax.set_yticks(range(len(names)), list(map(plain, names)), fontsize=7)
        ax.set(xlabel="remaining prunable weights, %", title=plain(method.name))
    figure.colorbar(image, ax=list(axes), label="share kept (white: none)")
    figure.suptitle(plain(title))
    save(path, figure)


# ---------------------------------------------------------------------------- command line


def read(path: Path) -> Run:
    """A run that can be told of. Raises LotteryError for one with a value that no run of train.py has."""
    run = load(path)
    try:
        if run.rows:
            merged_report(merge([run]), pictures=False)
    except lottery.LotteryError:
        raise
    except Exception as error:  # whatever a ledger that was chained again makes the tables trip over
        raise lottery.LotteryError(
            f"{path}: a value is missing or of the wrong kind ({type(error).__name__}: {error})"
        ) from None
    return run


@command(PROGRAM)
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog=PROGRAM, description="Merge runs: tables, pictures, claims.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folder, finished or not")
    parser.add_argument("--out", type=Path, help="folder for report.md and the pictures (default: only print)")
    args = parser.parse_args(argv)
    try:
        runs = {path: read(path) for path in args.runs}
        for path in [path for path, run in runs.items() if not run.rows]:
            print(f"{PROGRAM}: {printable(path)}: no round is finished yet: left out", file=sys.stderr)
            del runs[path]
        if not runs:
            raise lottery.LotteryError("no run with a finished round")
        groups = merge(list(runs.values()))
        for method in itertools.chain(*groups.values()):
            for run in method.left_out:
                why = f"a run before it is {method.name}, seed {run.config['seed']}, too"
                print(printable(f"{PROGRAM}: {run.path}: left out where {why}"), file=sys.stderr)
        print(merged_report(groups, pictures=False), end="")
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            for title, methods in groups.items():
                draw(args.out / f"{file_name(title)}.png", title, methods)
                draw_layers(args.out / f"{file_name(title)}-layers.png", title, methods)
            files.write_atomically(args.out / "report.md", merged_report(groups, pictures=True).encode())
    except (lottery.LotteryError, OSError) as error:
        return fail(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
