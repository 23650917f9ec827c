"""Tables and pictures: of one run, from its ledger, and of many, with what they say of the paper's claims.

python -m lab.report RUN [RUN ...] [--out FOLDER]
python -m lab.report --compare A B [--rounds R[:Q] ...] [--out FOLDER]
python -m lab.report RUN --html [--out FOLDER]
"""

import io
import itertools
import json
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    from lab import missing

    missing.in_one_line("lab.report")

import lottery
from audio_lottery import files, verdicts
from audio_lottery.console import Parser, command, fail, markdown_text, printable
from audio_lottery.ledger import read_run
from audio_lottery.texts import TEXTS, read_texts
from lab import compare, page, pictures, plan, recognised, tables
from lab.compare import Method, Point, Run, merge, short_names

PROGRAM = "python -m lab.report"
COLUMNS = ["round", "remaining", "of all", "valid WER", "test WER", "test CER", "seconds", "against dense"]


# ---------------------------------------------------------------------------- one run


def cells(row: dict) -> list[str]:
    """A ledger row under COLUMNS."""
    shares = [f"{row[key]:.1%}" for key in ("remaining", "remaining_all")]
    rates = [f"{row[key]:.3f}" if key in row else "-" for key in ("valid_wer", "test_wer", "test_cer")]
    against = str(verdicts.Verdict(row["verdict"], *row["interval"])) if "verdict" in row else "-"
    against += f", power {row['power']:.0%}" if "power" in row else ""
    return [str(row["round"]), *shares, *rates, f"{row['seconds']:.0f}", against]


def text_line(texts: list[str]) -> str:
    return "  ".join([text.rjust(len(column)) for text, column in zip(texts[:-1], COLUMNS)] + texts[-1:])


def markdown_table(ledger: list[dict]) -> list[str]:
    return plan.markdown(COLUMNS, list(map(cells, ledger)), right=7)


def in_words(marks: list[float]) -> str:
    *most, last = [f"{100 * mark:.3g}" for mark in marks]
    return f"{', '.join(most)} and {last} %" if most else f"{last} %"


def summary(config: dict, ledger: list[dict]) -> list[str]:
    """The dense model, how far the fixed sequence went, the ticket best on valid, and what the last one multiplies."""
    if config.get("test") is False:
        return ["trained with --no-test: valid WER alone, and nothing that a ticket could be told by"]
    ((method,),) = merge([Run(config, ledger)]).values()
    dense, tickets = ledger[0], method.tickets()

    def told(point: Point) -> str:
        (row,) = point.rows
        return (
            f"round {row['round']}, {row['remaining']:.1%} of the prunable and {row['remaining_all']:.1%} of all "
            f"weights remain, test WER {row['test_wer']:.3f}, {tables.judged(point)}"
        )

    new = tables.new_texts(method.dense())
    lines = [f"dense: test WER {dense['test_wer']:.3f}, CER {dense['test_cer']:.3f}{new and f'; {new}'}"]
    sparsest, stopped = method.walk()
    marks, best = in_words(method.get("marks")), method.best()
    if not method.marked():
        lines += [f"no round is within a tenth of a mark ({marks}): no ticket is judged"] if tickets else []
    else:
        lines.append(f"sparsest winning or matching ticket at the marks: {told(sparsest) if sparsest else 'none'}")
        lines += [f"the sequence stopped at: {told(stopped)}"] if stopped else []
    lines += [f"ticket with the best valid WER: {told(best)}"] if best else []
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
    intervals = f"95 % intervals of WER(ticket) - WER(dense): {seeds_and_utterances}; power: see docs/comparisons.md"
    return [*lines, intervals]


def write_report(out: Path, config: dict, ledger: list[dict]) -> None:
    """report.md and report.png of one run, of nothing but what is in its folder."""
    text = markdown_report(config, ledger, look_of(out, config, ledger))
    draw_report(out / "report.png", config, ledger)
    files.write_atomically(out / "report.md", text.encode())


def look_of(run: Path, config: dict, ledger: list[dict]) -> recognised.Look | None:
    """The texts of a run's test, dense beside its ticket; None where its folder has none."""
    there = read_texts(run / TEXTS) if config.get("test") is not False else []
    ((method,),) = merge([Run(config, ledger)]).values() if there else ((None,),)
    return method and recognised.look(method, there)


def full_title(title: str, methods: list[Method]) -> str:
    """Of a picture: what its methods have in common with it."""
    return f"{title}: {short_names(methods)[0]}".removesuffix(": ")


def draw_report(target: Path | io.BytesIO, config: dict, ledger: list[dict]) -> None:
    """The picture of one run."""
    if config.get("test") is False:
        pictures.draw_valid(target, ledger)
    else:
        ((title, methods),) = merge([Run(config, ledger)]).items()
        pictures.draw(target, f"{full_title(title, methods)}, seed {config['seed']}", methods)


def markdown_report(config: dict, ledger: list[dict], look: recognised.Look | None) -> str:
    """report.md of one run; with --no-test, valid WER by round."""
    if config.get("test") is False:
        lines = [heading(config), "", *summary(config, ledger), "", *markdown_table(ledger), ""]
        lines += ["![valid WER](report.png)", "", "```json", json.dumps(config, indent=2), "```", ""]
        return "\n".join(lines)
    utterances = len(ledger[0]["test_words"])
    marks = in_words(config.get("marks", list(compare.MARKS)))
    explained = (
        f"Against dense: 95 % interval of WER(ticket) - WER(dense), paired bootstrap over {utterances} test "
        f"utterances, of this seed alone. {tables.WORDS_EXPLAINED.format(margin=config['margin'])} No round is chosen "
        f"on the test: the rounds nearest {marks} of the weights, named beforehand, are judged from dense to sparse "
        "up to the first that is neither winning nor matching; the other rounds' verdicts are for reading on. Each "
        "round is tested once, at its epoch with the best valid WER; pruning uses the last epoch. `remaining` is of "
        "the prunable weights, `of all` of all parameters."
    )
    told = [*(f"- {markdown_text(line)}" for line in summary(config, ledger)), "", explained]
    lines = [heading(config), "", *told, "", *markdown_table(ledger)]
    for name in ledger[0].get("other_tests", {}):
        rows = [row | row["other_tests"][name] for row in ledger]
        lines += ["", f"{markdown_text(name)}:", "", *markdown_table(rows)]
    lines += ["", "![WER and CER against remaining weights](report.png)", ""]
    lines += [*recognised.sections(look), ""] if look else []
    lines += ["```json", json.dumps(config, indent=2), "```", ""]
    return "\n".join(lines)


def heading(config: dict) -> str:
    return f"# {config['backbone']} on {markdown_text(config['machine']['data'])}, seed {config['seed']}"


# ---------------------------------------------------------------------------- command line


def write_page(run: Path, out: Path | None) -> None:
    """report.html of one run, in its folder or another; says how large it is, and how many players it has."""
    config, rows = read_run(run)
    if not rows:
        raise lottery.LotteryError(f"{run}: no round is finished yet")
    picture = io.BytesIO()
    with tables.wrong_values(run):
        look, title = look_of(run, config, rows), f"{config['backbone']} on {config['machine']['data']}"
        text = markdown_report(config, rows, look)
        draw_report(picture, config, rows)
        players = page.players_of(config, look.test, recognised.worst(look)) if look else []
        content, shown = page.page(title, text, page.inline(picture.getvalue().decode()), players)
    path = (out or run) / "report.html"
    if out:
        out.mkdir(parents=True, exist_ok=True)
    files.write_atomically(path, content)
    told = f"{len(content):,} bytes, {shown} of {len(players)} recordings"
    why = dict.fromkeys(player for player in players if isinstance(player, str))
    print(printable(f"{path}: {told}{f' ({next(iter(why))})' if why else ''}"))


def write_pictures(out: Path, groups: dict[str, list[Method]]) -> None:
    full = {title: full_title(title, methods) for title, methods in groups.items()}
    for title, methods in groups.items():
        pictures.draw(out / f"{tables.file_name(title)}.png", full[title], methods)
        pictures.draw_layers(out / f"{tables.file_name(title)}-layers.png", full[title], methods)
    words = {title: re.split(", |: ", name) for title, name in full.items()}
    common = [word for word in min(words.values()) if all(word in others for others in words.values())]
    left = {title: ", ".join(word for word in own if word not in common) for title, own in words.items()}
    found = {left[title]: tables.claims(methods) for title, methods in groups.items()}
    for name, claims in tables.forests(found).items():
        rows = tables.forest_of(claims)
        pictures.draw_forest(out / name, rows, *full.values() if len(full) == 1 else [", ".join(common)])


def merged(paths: list[Path]) -> dict[str, list[Method]]:
    """Runs as methods; says which are left out, and why."""
    runs = {path: tables.read(path) for path in paths}
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
    return groups


@command(PROGRAM)
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog=PROGRAM, description="Merge runs, or compare two sets of them: tables, pictures, claims.")
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="run folder, finished or not")
    sets = "two sets of runs, a run a seed: folders or patterns between commas, in quotes"
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help=sets)
    which = "with --compare, A's rounds and B's (default: all tickets of as many weights, to 1 %%)"
    parser.add_argument("--rounds", type=tables.rounds_pair, nargs="+", metavar="R[:Q]", help=which)
    parser.add_argument("--out", type=Path, help="folder for report.md and the pictures (default: only print)")
    page_of = "write report.html of one run into its folder, or into --out: its report as a page, with recordings"
    parser.add_argument("--html", action="store_true", help=page_of)
    args = parser.parse_args(argv)
    if args.html and (len(args.runs) != 1 or args.compare):
        parser.error("--html is of one run")
    if bool(args.runs) == bool(args.compare) or (args.rounds and not args.compare):
        parser.error("name runs to merge, or --compare A B, with --rounds if not all are meant")
    if args.out and args.out.exists() and not args.out.is_dir():
        parser.error(f"--out {args.out}: must be a folder, or not be there yet")
    try:
        if args.html:
            write_page(args.runs[0], args.out)
            return 0
        if args.compare:
            lines, found = tables.comparison(*args.compare, args.rounds)
            print("\n".join(lines), end="")
        else:
            groups = merged(args.runs)
            print(tables.merged_report(groups, pictured=False), end="")
        if args.out:
            args.out.mkdir(parents=True, exist_ok=True)
            if args.compare:
                pictures.draw_forest(args.out / "forest.png", tables.forest_of({"": found}))
                lines += ["![each interval against 0 and the margin](forest.png)", ""]
            else:
                write_pictures(args.out, groups)
                lines = tables.merged_report(groups, pictured=True).split("\n")
            files.write_atomically(args.out / "report.md", "\n".join(lines).encode())
    except (lottery.LotteryError, OSError) as error:
        return fail(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
