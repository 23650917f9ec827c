"""Pictures of runs: WER and CER against remaining weights, weights kept by layer, claims as a forest, ways in use.

Each is drawn into a PNG by its path, or as SVG into a buffer.
"""

import io
from pathlib import Path

import numpy as np

from audio_lottery import files, verdicts
from audio_lottery.console import printable
from lab.compare import Method, Point, short_names

COLORS = {"winning": "C2", "matching": "C0", "undecided": "0.55", "worse": "C3", "no verdict": "0.85"}


def plain(text: str) -> str:
    """A foreign text for a picture: one line, and no mathematics, which matplotlib finds between two $."""
    return printable(text).replace("$", r"\$")


def save(target: Path | io.BytesIO, figure) -> None:
    """As PNG to a path, or as SVG into a buffer, the same bytes each time."""
    if isinstance(target, io.BytesIO):
        from matplotlib import rc_context

        with rc_context({"svg.hashsalt": "Audio Lottery"}):  # what its ids are made of, in place of a random draw
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(target, format="svg", metadata=nothing)
        return
    content = io.BytesIO()
    figure.savefig(content, dpi=120, format="png", metadata={"Software": None})
    files.write_atomically(target, content.getvalue())


# ---------------------------------------------------------------------------- error rates

# What others report on a corpus's official test without a language model, in their repositories: WER and CER.
PUBLISHED = {
    "an4": {
        "ESPnet2": {"test_wer": 0.076, "test_cer": 0.036},
        "deepspeech.pytorch": {"test_wer": 0.0957, "test_cer": 0.0552},
    }
}


def wer_band(point: Point) -> tuple[float, float]:
    """The interval of the verdict, about dense."""
    _, low, high = point.verdict()
    return point.mean_other("test_wer") + low, point.mean_other("test_wer") + high


def share_ticks(sparsest: float) -> list[int]:
    """Ticks of an axis of remaining weights from 100 % to `sparsest` %: three at least."""
    long = [t for t in (100, 50, 20, 10, 5, 2, 1) if t >= 0.8 * sparsest]
    return long if len(long) > 2 else [t for t in (100, 90, 80, 70, 60, 50, 40, 30) if t >= 0.95 * sparsest]


def seeds_told(points: list[Point]) -> str:
    few, many = (choose(len(p.seeds) for p in points) for choose in (min, max))
    return f"{few} to {many} seeds" if few < many else f"{few} seed{'s' * (few > 1)}"


def draw(path: Path | io.BytesIO, title: str, methods: list[Method]) -> None:
    """WER and CER against remaining weights, a line a method: the mean over seeds.

    WER has the band of its verdicts, about dense; CER a dot a seed, as ledgers count no character errors by utterance.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    sparsest = min(100 * point.mean("remaining") for method in methods for point in method.points.values())
    wer, cer = axes = figure.subplots(1, 2)
    hollow = any(method.lacks_seeds(point) for method in methods for point in method.points.values())
    marks, (_, short) = [point for method in methods for point in method.marked()], short_names(methods)
    for ax, key in zip(axes, ("test_wer", "test_cer")):
        ends = []
        for color, method in zip((f"C{i % 10}" for i in range(len(methods))), methods):
            points = list(method.points.values())
            remaining, rates = [100 * p.mean("remaining") for p in points], [p.mean(key) for p in points]
            ax.axhline(rates[0], color=color, linewidth=1, linestyle="--")
            label = plain(f"{short[method.name]}, {seeds_told(points)}")
            ax.plot(remaining, rates, "-", color=color, label=label)
            for x, y, point in zip(remaining, rates, points):
                fill = "white" if method.lacks_seeds(point) else color
                ax.plot(x, y, "o", color=color, mfc=fill, markersize=6 if any(point is mark for mark in marks) else 3)
            ends += rates
            if ax is cer:
                dots = [(x, value) for x, p in zip(remaining, points) for value in p.values(key) if len(p.seeds) > 1]
                ax.plot(*(zip(*dots) if dots else ([], [])), ".", color=color, markersize=3, alpha=0.5)
                ends += [value for _, value in dots]
            elif len(points) > 1:
                low, high = zip(*map(wer_band, points[1:]))
                ax.fill_between(remaining[1:], low, high, color=color, alpha=0.2)
                ends += [*low, *high]
        for name, rates in PUBLISHED.get(methods[0].get("corpus"), {}).items():
            ax.axhline(rates[key], color="black", linewidth=1, linestyle=":")
            ax.text(1.01, rates[key], name, transform=ax.get_yaxis_transform(), fontsize=7, va="center")
            ends.append(rates[key])
        room = 0.05 * (max(ends) - min(ends)) + 0.005
        ax.set_ylim(min(ends) - room, max(ends) + room)
        ax.set(xscale="log", xlabel="remaining prunable weights")
        ticks = share_ticks(sparsest)
        ax.set_xticks(ticks, [f"{t} %" for t in ticks])
        ax.minorticks_off()
        ax.set_xlim(108, 0.92 * sparsest)
        ax.grid(alpha=0.3)
        ax.legend(loc="upper left", fontsize=8)
    wer.set_ylabel("test WER")
    cer.set_ylabel("test CER")
    words = "dashed: dense; bands: 95 % interval, about dense" + " of those seeds" * hollow + "; small dots: seeds"
    words += "; large: marks" * bool(marks) + "; hollow: fewer seeds" * hollow
    figure.supxlabel(words, fontsize=8)
    figure.suptitle(plain(title))
    save(path, figure)


def draw_valid(path: Path | io.BytesIO, ledger: list[dict]) -> None:
    """Valid WER against remaining weights of a run without a test."""
    from matplotlib.figure import Figure

    remaining = [100 * row["remaining"] for row in ledger]
    figure = Figure(figsize=(5.5, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.plot(remaining, [row["valid_wer"] for row in ledger], "o-", markersize=4)
    ax.set(xscale="log", xlabel="remaining prunable weights", ylabel="valid WER")
    ticks = share_ticks(min(remaining))
    ax.set_xticks(ticks, [f"{t} %" for t in ticks])
    ax.minorticks_off()
    ax.set_xlim(108, 0.92 * min(remaining))
    save(path, figure)


# ---------------------------------------------------------------------------- claims


def draw_forest(path: Path, claims: list[tuple[str, verdicts.Verdict, float]], title: str = "") -> None:
    """Each claim's interval against 0 and its margin, a row a claim, coloured by its word.

    claims: what it is about, its verdict and its margin. An interval many times as wide as most is cut, with an arrow.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 1.6 + 0.24 * len(claims)), layout="constrained")
    ax = figure.subplots()
    widths = [told.high - told.low for _, told, _ in claims]
    some = sorted(width for width in widths if width > 0)
    most = 5 * some[len(some) // 2] if some else 0.0
    whole = [told for (_, told, _), width in zip(claims, widths) if width <= most]
    ends = [0, *(margin for *_, margin in claims), *(told.low for told in whole), *(told.high for told in whole)]
    room = 0.04 * (max(ends) - min(ends)) or 0.01
    left, right = min(ends) - room, max(ends) + room
    ax.set_xlim(left, right)
    for y, (_, (word, low, high), margin) in enumerate(claims):
        ax.plot([low, high], [y, y], color=COLORS[word], linewidth=2.5, solid_capstyle="butt")
        ax.plot((low + high) / 2, y, "o", color=COLORS[word], markersize=4)
        for end, arrow in [(left, "<")] * (low < left) + [(right, ">")] * (high > right):
            ax.plot(end, y, arrow, color=COLORS[word], markersize=8, clip_on=False)
        ax.plot([margin, margin], [y - 0.5, y + 0.5], color="black", linewidth=1, linestyle=":")
    ax.axvline(0, color="black", linewidth=1)
    ax.set_yticks(range(len(claims)), [plain(what) for what, *_ in claims], fontsize=8)
    ax.set_ylim(len(claims) - 0.5, -0.5)
    ax.grid(axis="x", alpha=0.3)
    ax.set_xlabel("difference in test WER, 95 % interval; dotted: the margin", fontsize=9)
    ax.set_title(plain(title), fontsize=10)
    words = [word for word in COLORS if any(told.word == word for _, told, _ in claims)]
    lines = [Line2D([], [], color=COLORS[word], linewidth=2.5) for word in words]
    figure.legend(lines, words, fontsize=8, loc="outside lower center", ncols=len(words))
    save(path, figure)


# ---------------------------------------------------------------------------- in use


def draw_in_use(path: Path, ways: list[tuple[str, float, float, float, float]]) -> None:
    """Time and WER side by side, a bar each way. ways: name, ms a second of audio, WER and the ends of its interval.

    A run that all names begin with ("RUN: dense, ...") is told once, above.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.4 + 0.34 * len(ways)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names, times, wers, lows, highs = zip(*ways)
    runs = {name.partition(": ")[0] for name in names}
    told = [plain(name.partition(": ")[2] if len(runs) == 1 else name) for name in names]
    colors = ["0.55" if ": dense, " in name else "C0" for name in names]
    around = [wer - low for wer, low in zip(wers, lows)], [high - wer for wer, high in zip(wers, highs)]
    places = range(len(ways))
    left.bar_label(left.barh(places, times, color=colors), fmt="%.2f", padding=3, fontsize=8)
    bars = right.barh(places, wers, color=colors, xerr=around, error_kw={"linewidth": 1, "ecolor": "0.3"})
    right.bar_label(bars, labels=[f"{wer:.3f}" for wer in wers], padding=3, fontsize=8)
    left.set_yticks(places, told, fontsize=8)
    left.set(xlabel="ms a second of audio, one core, features not counted", ylim=(len(ways) - 0.5, -0.5))
    right.set(xlabel="test WER, 95 % over other utterances")
    for ax in (left, right):
        ax.margins(x=0.15)
        ax.grid(axis="x", alpha=0.3)
        ax.set_axisbelow(True)
    if len(runs) == 1:
        figure.suptitle(f"{plain(*runs)}, one seed", fontsize=10)
    save(path, figure)


# ---------------------------------------------------------------------------- layers


def draw_layers(path: Path, title: str, methods: list[Method]) -> None:
    """The share of weights kept by layer and round, a panel a method; controls only where there is nothing else."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    _, short = short_names(methods)
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
        ax.set(xlabel="remaining prunable weights, %", title=plain(short[method.name]))
    figure.colorbar(image, ax=list(axes), label="share kept (white: none)")
    figure.suptitle(plain(title))
    save(path, figure)
