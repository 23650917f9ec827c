"""Tables and pictures of a run, from its ledger."""

import io
import json
from pathlib import Path

import lottery

COLUMNS = ["round", "remaining", "of all", "valid WER", "test WER", "test CER", "seconds", "against dense"]


def cells(row: dict) -> list[str]:
    """A ledger row under COLUMNS."""
    shares = [f"{row[key]:.1%}" for key in ("remaining", "remaining_all")]
    rates = [f"{row[key]:.3f}" for key in ("valid_wer", "test_wer", "test_cer")]
    against = str(lottery.Verdict(row["verdict"], *row["interval"])) if row["round"] else "-"
    return [str(row["round"]), *shares, *rates, f"{row['seconds']:.0f}", against]


def text_line(texts: list[str]) -> str:
    return "  ".join([text.rjust(len(column)) for text, column in zip(texts[:-1], COLUMNS)] + texts[-1:])


def markdown_line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def markdown_table(ledger: list[dict]) -> list[str]:
    return [markdown_line(COLUMNS), markdown_line(["---:"] * 7 + [":---"]), *(markdown_line(cells(r)) for r in ledger)]


def summary(ledger: list[dict]) -> list[str]:
    """The dense model, the sparsest ticket that is not behind it, and the best one."""
    dense, tickets = ledger[0], ledger[1:]
    lines = [f"dense: test WER {dense['test_wer']:.3f}, CER {dense['test_cer']:.3f}"]
    good = [row for row in tickets if row["verdict"] in ("winning", "matching")]
    for name, rows, key in (
        ("sparsest winning or matching ticket", good, lambda row: row["remaining"]),
        ("ticket with the best valid WER", tickets, lambda row: (row["valid_wer"], row["remaining"])),
    ):
        if rows:
            row = min(rows, key=key)
            lines.append(
                f"{name}: round {row['round']}, {row['remaining']:.1%} of the prunable and {row['remaining_all']:.1%} "
                f"of all weights remain, test WER {row['test_wer']:.3f}, {row['verdict']}"
            )
        elif tickets:
            lines.append(f"{name}: none")
    for name in dense.get("other_tests", {}):
        rates = ", ".join(f"{r['round']}: {r['other_tests'][name]['test_wer']:.3f}" for r in ledger)
        lines.append(f"{name}: test WER by round {rates}")
    seeds_and_utterances = f"1 seed, {len(dense['test_words'])} test utterances"
    return [*lines, f"95 % intervals of WER(ticket) - WER(dense): {seeds_and_utterances}, each ticket tested once"]


def write_report(out: Path, config: dict, ledger: list[dict]) -> None:
    """report.md and report.png."""
    utterances = len(ledger[0]["test_words"])
    explained = (
        f"Against dense: 95 % interval of WER(ticket) - WER(dense), paired bootstrap over {utterances} test "
        f"utterances, 1 seed, no correction for testing {len(ledger) - 1} tickets. *winning*: the interval lies below "
        f"0; *matching*: its upper end is at most {config['margin']}; *worse*: it lies above 0; else *undecided*. Each "
        "round is tested once, at its epoch with the best valid WER; pruning uses the last epoch. `remaining` is of "
        "the prunable weights, `of all` of all parameters."
    )
    lines = [f"# {config['backbone']} on {config['machine']['data']}, seed {config['seed']}", ""]
    lines += [*(f"- {line}" for line in summary(ledger)), "", explained, "", *markdown_table(ledger)]
    for name in ledger[0].get("other_tests", {}):
        lines += ["", f"{name}:", "", *markdown_table([row | row["other_tests"][name] for row in ledger])]
    lines += ["", "![WER and CER against remaining weights](report.png)", ""]
    lines += ["```json", json.dumps(config, indent=2), "```", ""]
    lottery.write_atomically(out / "report.md", "\n".join(lines).encode())
    draw(out / "report.png", config, ledger)


def draw(path: Path, config: dict, ledger: list[dict]) -> None:
    """WER and CER against remaining weights; the band is the paired interval about the dense WER."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    remaining = [100 * row["remaining"] for row in ledger]
    for ax, key, name in ((axes[0], "test_wer", "test WER"), (axes[1], "test_cer", "test CER")):
        dense = ledger[0][key]
        ax.axhline(dense, color="black", linewidth=1, linestyle="--", label=f"dense {dense:.3f}")
        if key == "test_wer" and len(ledger) > 1:
            low, high = ([dense + row["interval"][i] for row in ledger[1:]] for i in (0, 1))
            ax.fill_between(remaining[1:], low, high, color="C0", alpha=0.2, label="95 % interval against dense")
        ax.plot(remaining, [row[key] for row in ledger], "o-", color="C0", label="ticket")
        ax.set(xscale="log", xlabel="remaining prunable weights, %", ylabel=name)
        ticks = [t for t in (100, 50, 20, 10, 5, 2, 1) if t >= 0.8 * remaining[-1]]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
        ax.legend(loc="lower left")
    figure.suptitle(
        f"{config['backbone']} on {Path(config['machine']['data']).name}, {config['size']} size, seed {config['seed']}"
    )
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png")
    plt.close(figure)
    lottery.write_atomically(path, content.getvalue())
