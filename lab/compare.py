"""Runs merged into methods: seeds together at each round, a method beside its dense model and beside another method."""

import functools
import itertools
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

import lottery
import models
from audio_lottery import ledger, verdicts
from lab import plan
from lab.controls import FOLLOWING


class Run(NamedTuple):
    config: dict
    rows: list[dict]
    path: Path = Path()

    @property
    def data(self) -> str:
        return Path(self.config["machine"]["data"]).name


CONFIG = {"backbone", "size", "seed", "sparsity", "prune_rate", "margin", "data_sha256", "machine"}
ROW = {"round", "total", "remaining", "remaining_all", "kept_per_layer", "mask_sha256", "valid_wer"}
ROW |= {"test_wer", "test_cer", "test_errors", "test_words"}


def load(path: Path) -> Run:
    """The finished rounds of a run folder. Raises LotteryError unless they are one chain from the settings on."""
    config, rows = ledger.read_run(path)
    if config.get("test") is False:
        raise lottery.LotteryError(f"{path}: trained with --no-test: it has nothing to compare on a test")
    missing = (CONFIG - config.keys()).union(*(ROW - row.keys() for row in rows))
    if not isinstance(config.get("machine"), dict) or not isinstance(config["machine"].get("data"), str):
        missing |= {"data"}
    if missing:
        raise lottery.LotteryError(f"{path}: not a run of train.py: it has no {', '.join(sorted(missing))}")
    return Run(config, rows, path)


# ---------------------------------------------------------------------------- a round, over seeds


def of_test(row: dict, test: str) -> dict:
    """What a row says of the first test set (test ""), or of another one by name."""
    return row["other_tests"][test] if test else row


@functools.lru_cache(maxsize=4096)
def judged(errors: tuple, others: tuple, words: tuple, margin: float, nothing: float) -> verdicts.Verdict:
    return verdicts.verdict(errors, others, words, margin, nothing=nothing)


@dataclass
class Point:
    """A round of a method: a ledger row a seed, each beside the row it is compared with, of the same seed."""

    margin: float
    seeds: list[int] = field(default_factory=list)
    rows: list[dict] = field(default_factory=list)
    others: list[dict] = field(default_factory=list)  # the dense round of the same run, or another method's round
    heard: dict[str, dict] = field(default_factory=dict)  # what round 0 says of a test set's utterances
    rival: bool = False  # are the others another method's?

    def add(self, seed: int, row: dict, other: dict, dense: dict) -> None:
        """dense: round 0 of the row's run, which knows the speakers and the texts that were trained on."""
        self.seeds.append(seed)
        self.rows.append(row)
        self.others.append(other)
        for test in self.tests():
            about = dense and of_test(dense, test)
            if there := {key: about[key] for key in ("test_speakers", "test_seen") if key in about}:
                self.heard[test] = there

    @property
    def round(self) -> int:
        return self.rows[0]["round"]

    def tests(self) -> list[str]:
        return ["", *self.rows[0].get("other_tests", {})]

    def values(self, key: str, test: str = "") -> list[float]:
        """One a seed."""
        return [of_test(row, test)[key] for row in self.rows]

    def mean(self, key: str, test: str = "") -> float:
        return statistics.fmean(self.values(key, test))

    def mean_other(self, key: str, test: str = "") -> float:
        return statistics.fmean(of_test(row, test)[key] for row in self.others)

    def differences(self, key: str, test: str = "") -> list[float]:
        """rows less others, one a seed."""
        return [of_test(row, test)[key] - of_test(other, test)[key] for row, other in zip(self.rows, self.others)]

    def counts(self, test: str = "", over: str = "utterances") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Errors of the rows and of the others, (seeds, utterances), and the reference words, (utterances,).

        over: "speakers" has sums of each speaker's utterances in their place, "new texts" those whose texts train has
        not.
        """
        rows, others = ([of_test(row, test) for row in part] for part in (self.rows, self.others))
        words = rows[0]["test_words"]
        if any(row["test_words"] != words for row in rows + others):
            raise lottery.LotteryError("runs that were tested on other utterances cannot be compared")
        errors, other_errors = ([row["test_errors"] for row in part] for part in (rows, others))
        found = np.array(errors), np.array(other_errors), np.array(words)
        if over == "speakers":
            numbers = np.array(self.heard[test]["test_speakers"])
            sums = np.eye(numbers.max() + 1, dtype=int)[numbers]  # (utterances, speakers)
            return tuple(part @ sums for part in found)
        if over == "new texts":
            new = np.array(self.heard[test]["test_seen"]) == 0
            return tuple(part[..., new] for part in found)
        return found

    def verdict(self, test: str = "", over: str = "utterances") -> verdicts.Verdict:
        """rows against others, by the rule of today; what a row says of itself by that rule is taken as it stands."""
        row = of_test(self.rows[0], test)
        if over != "utterances":
            return self.judge(*self.counts(test, over))
        if len(self.rows) == 1 and not self.rival and verdicts.of_this_rule(self.rows[0]):
            return verdicts.Verdict(row["verdict"], *row["interval"])
        return self.judge(*self.counts(test))

    def judge(self, errors: np.ndarray, others: np.ndarray, words: np.ndarray) -> verdicts.Verdict:
        """A rival may recognise nothing: what beats it wins, unless it recognises nothing too."""
        something = self.rival and errors.mean(0).sum() < verdicts.NOTHING * words.sum()
        nothing = float("inf") if something else verdicts.NOTHING
        hashable = (tuple(map(tuple, errors.tolist())), tuple(map(tuple, others.tolist())), tuple(words.tolist()))
        return judged(*hashable, self.margin, nothing)

    def by_speaker(self, test: str = "") -> tuple[verdicts.Verdict, int] | None:
        """The verdict with speakers resampled in place of utterances, and how many; None where they are not known."""
        if "test_speakers" not in self.heard.get(test, {}):
            return None
        return self.verdict(test, "speakers"), len(self.counts(test, "speakers")[2])

    def of_new_texts(self, test: str = "") -> tuple[verdicts.Verdict, float, int] | None:
        """Over the utterances whose texts are not in train: the verdict, the WER, and how many; None if that is all, or
        if several seeds have one such text between them, which has no variance."""
        if "test_seen" not in self.heard.get(test, {}):
            return None
        errors, _, words = self.counts(test, "new texts")
        if (len(errors) > 1 and len(words) < 2) or not words.any():
            return None
        return self.verdict(test, "new texts"), float(errors.sum() / (len(errors) * words.sum())), len(words)

    def empty_layers(self) -> list[str]:
        """Layers without a weight, in any seed."""
        return [
            name for name in self.rows[0]["kept_per_layer"] if any(not r["kept_per_layer"][name] for r in self.rows)
        ]


# ---------------------------------------------------------------------------- methods

MARKS = (0.41, 0.168, 0.107, 0.044)  # remaining weights whose rounds are judged, in this order; --marks names others
# What a method leaves open, or tells in other words: ticket and init by the data that they come from.
OPEN = ("seed", "sparsity", "rounds", "dense", "ticket_sha256", "init_sha256")
# Values of settings that a configuration does not name, and the paper's prune rate; names of methods leave them out.
PLAIN = {"control": None, "ticket": None, "ticket_weights": "rewind", "init": None, "rewind_step": 0}
PLAIN |= {"prune_rate": 0.2, "block": [1, 1], "scope": "global", "min_remaining": 0.0, "keep_dense": [], "snr": None}
PLAIN |= {"test_snr": None, "marks": list(MARKS)}
OF_TESTS = ("test_snr", "noise_draws")  # settings that do not say what a ticket is


@dataclass
class Method:
    """Runs whose settings differ in nothing but seed and sparsity."""

    settings: dict  # what they share, without the values of PLAIN
    data: str
    points: dict[tuple, Point] = field(default_factory=dict)  # by step(): dense, then sparser and sparser
    name: str = ""
    left_out: list[Run] = field(default_factory=list)  # with other results in rounds that a seed has already

    def get(self, key: str):
        return self.settings.get(key, PLAIN.get(key))

    def dense(self) -> Point:
        return next(iter(self.points.values()))

    def lacks_seeds(self, point: Point) -> bool:
        """Has the point other seeds than the dense networks?"""
        return set(point.seeds) != set(self.dense().seeds)

    def tickets(self) -> list[Point]:
        return list(self.points.values())[1:]

    def marked(self) -> list[Point]:
        """The tickets nearest to each mark and within a tenth of it, dense to sparse: named before any result."""
        found = []
        for mark in self.get("marks"):
            point = min(self.tickets(), key=lambda p: abs(p.mean("remaining") - mark), default=None)
            if point and abs(point.mean("remaining") - mark) <= 0.1 * mark and point not in found:
                found.append(point)
        return found

    def walk(self) -> tuple[Point | None, Point | None]:
        """The sparsest ticket of the fixed sequence and the one that stopped it; None where there is none.

        The marked tickets are judged from dense to sparse, up to the first that is neither winning nor matching: so no
        round is chosen on the test, and no correction is owed for judging several.
        """
        sparsest = None
        for point in self.marked():
            if point.verdict().word not in ("winning", "matching"):
                return sparsest, point
            sparsest = point
        return sparsest, None

    def holm(self) -> list[float]:
        """Of each marked ticket, the p of one that truly loses the margin, as Holm corrects it for all marks, those too
        that have no round yet: beside the walk, which hangs on the order. 1 where there is no verdict."""
        marked = self.marked()
        ps = [
            1.0 if point.verdict().word == "no verdict" else verdicts.p_value(*point.counts(), point.margin)
            for point in marked
        ]
        return verdicts.holm(ps + [1.0] * (len(self.get("marks")) - len(ps)))[: len(ps)]

    def best(self) -> Point | None:
        """The ticket of the best valid WER, less dense's, as rounds may have other seeds. The test selects nothing."""

        def loss(point: Point) -> tuple[float, float]:
            return point.mean("valid_wer") - point.mean_other("valid_wer"), point.mean("remaining")

        return min(self.tickets(), key=loss, default=None)

    def multiply_adds(self, point: Point) -> tuple[float, float]:
        """A second of audio, dense and with zeros skipped, mean over seeds."""
        backbone, size = self.settings["backbone"], self.settings["size"]
        sizes = models.BACKBONES[backbone].SIZES[size]
        count = functools.partial(plan.multiply_adds, backbone, exclude=self.get("keep_dense"))

        def mean(rows: list[dict]) -> float:  # a narrower network's row has its own sizes
            return statistics.fmean(
                count(row.get("sizes", sizes), row["kept_per_layer"], whole="sizes" in row) for row in rows
            )

        return mean(point.others), mean(point.rows)

    def layer_shares(self) -> dict[str, list[float]]:
        """The share of its weights that each layer keeps, a point, mean over seeds."""
        return {
            name: [
                statistics.fmean(
                    r["kept_per_layer"][name] / o["kept_per_layer"][name] for r, o in zip(p.rows, p.others)
                )
                for p in self.points.values()
            ]
            for name in self.dense().rows[0]["kept_per_layer"]
        }


def step(row: dict, config: dict) -> tuple[int, float]:
    """What makes rounds of two seeds the same: the number and, of a last round that is cut short, the sparsity."""
    total, rate = row.get("total_blocks", row["total"]), config["prune_rate"]
    counts = lottery.kept_counts(total, config["sparsity"], rate)
    cut = row["round"] == len(counts) - 1 and counts[-1] != lottery.kept_after(total, row["round"], rate)
    return row["round"], config["sparsity"] if cut else 0.0


def origin(run: Run, what: str, sources: dict[str, Run]) -> str | None:
    """Data of the run that this one's ticket or init is of: found by mask among the runs given, else by its folder."""
    path = run.config["machine"].get(what)
    if not path:
        return None
    source = sources.get(run.rows[-1].get("source_mask_sha256")) if what == "ticket" else None
    if source:
        return source.data
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    try:
        return Run(ledger.read_config(folder), []).data
    except lottery.LotteryError:
        return "another run"


def merge(runs: list[Run]) -> dict[str, list[Method]]:
    """Methods by backbone, data and size. Of two runs of one method and seed, a round counts once: the first given."""
    sources = {row["mask_sha256"]: r for r in runs if not r.config["machine"].get("ticket") for row in r.rows[1:]}
    groups: dict[tuple[str, str], dict[str, Method]] = {}
    for run in runs:
        config = run.config
        settings = {key: value for key, value in ledger.settings_of(config).items() if key not in OPEN}
        settings |= {what: origin(run, what, sources) for what in ("ticket", "init")}
        settings = {key: value for key, value in settings.items() if key not in PLAIN or value != PLAIN[key]}
        methods = groups.setdefault(
            (f"{config['backbone']} on {run.data}, {config['size']} size", config["data_sha256"]), {}
        )
        method = methods.setdefault(ledger.hash_json(settings), Method(settings, run.data))
        for row in run.rows:
            point = method.points.setdefault(step(row, config), Point(config["margin"]))
            if config["seed"] not in point.seeds:
                point.add(config["seed"], row, run.rows[0], run.rows[0])
            elif row["test_errors"] != point.rows[point.seeds.index(config["seed"])]["test_errors"]:
                method.left_out += [run] if run not in method.left_out else []
    titles, named = [title for title, _ in groups], {}
    for (title, sha256), methods in groups.items():
        for method in methods.values():
            method.points = dict(sorted(method.points.items(), key=lambda p: (p[0][0] > 0, -p[1].mean("remaining"))))
        named[title + f", data {sha256[:8]}" * (titles.count(title) > 1)] = list(methods.values())
        give_names(list(methods.values()))
    return named


def give_names(methods: list[Method]) -> None:
    """Name each by what differs among them or from PLAIN, in the words of the flags; by how it is tested, and then by
    hashes, if nothing else does."""
    keys = sorted({key for method in methods for key in method.settings} - {"control", "ticket"})
    always = PLAIN.keys() - {*OF_TESTS}
    keys = [key for key in keys if key in always or any(m.get(key) != methods[0].get(key) for m in methods)]
    plain = methods[0].settings | PLAIN
    for with_tests, with_hashes in ((False, False), (True, False), (True, True)):
        for method in methods:
            words, source = [method.get("control")] if method.get("control") else [], method.get("ticket")
            if source and (source != method.data or not words):
                words.append("ticket" + (f" of {source}" if source != method.data else ""))
            for key in keys:
                value, of_hashes = method.get(key), key.endswith("sha256") or key in FOLLOWING
                shown = with_hashes or (not of_hashes and (with_tests or key not in OF_TESTS))
                if value != plain.get(key) and shown:
                    between = {"block": "x", "snr": ":", "seconds": ":"}.get(key, ",")
                    words.append(f"{key} {between.join(map(str, value)) if isinstance(value, list) else value}")
            method.name = ", ".join(words) or "global magnitude"
        if len({method.name for method in methods}) == len(methods):
            return


def short_names(methods: list[Method]) -> tuple[str, dict[str, str]]:
    """The words of all methods' names, and what is left of each name: "tickets" where nothing is. For pictures."""
    words = {method.name: method.name.split(", ") for method in methods}
    common = [word for word in words[methods[0].name] if all(word in others for others in words.values())]
    left = {name: ", ".join(word for word in own if word not in common) for name, own in words.items()}
    return ", ".join(common), {name: short or "tickets" for name, short in left.items()}


# ---------------------------------------------------------------------------- a method against another


def rivals(methods: list[Method]) -> list[tuple[Method, Method]]:
    """Pairs, all else the same, of which the first is said to be better.

    A ticket and its control; another corpus' ticket and the target's own; rewinding to a later step and to step 0; a
    start from trained weights and from new ones; weights ranked by layer or LAMP and globally.
    """
    pairs = []
    for a, b in itertools.permutations(methods, 2):
        keys = (a.settings.keys() | b.settings.keys()) - {"ticket", *FOLLOWING, *OF_TESTS}
        keys -= set() if a.get("snr") or b.get("snr") else {"noise_sha256"}  # of tests alone, too
        different = {key for key in keys if a.get(key) != b.get(key)}
        fits = a.get("ticket") == b.get("ticket")
        if different == {"control"}:  # the control of a retrained ticket, or of a search's
            fits = fits or (a.get("ticket") is None and b.get("ticket") == a.data)
        elif different in ({"rewind_step"}, {"init"}, {"scope"}):
            fits = fits and all(b.get(key) == PLAIN[key] for key in different)
        else:
            fits = not different and a.get("ticket") not in (None, a.data) and b.get("ticket") is None
        pairs += [(a, b)] if fits and not a.get("control") else []
    return pairs


def compared(a: Method, b: Method) -> list[Point]:
    """a's tickets, b's as the others, at every round that both have with a seed in common; sparser and sparser."""
    found = []
    for at, ours in list(a.points.items())[1:]:
        theirs = b.points.get(at, Point(0.0))
        point = Point(ours.margin, heard=ours.heard, rival=True)
        for seed, row in zip(ours.seeds, ours.rows):
            if seed in theirs.seeds:
                other = theirs.rows[theirs.seeds.index(seed)]
                point.add(seed, row, other, {})
        found += [point] if point.seeds else []
    return found


def by_seed(runs: list[Run], name: str) -> dict[int, Run]:
    """A run a seed. Raises LotteryError if two have the same, or another setting that a method does not leave open."""
    found: dict[int, Run] = {}
    every = [ledger.settings_of(run.config) for run in runs]
    for run, own in zip(runs, every):
        if run.config["seed"] in found:
            raise lottery.LotteryError(f"{name}: {run.path} and {found[run.config['seed']].path} have the same seed")
        for key in sorted((own.keys() | every[0].keys()) - set(OPEN)):
            here, there = (one.get(key, PLAIN.get(key)) for one in (own, every[0]))
            if here != there:
                both = f"{there} in {runs[0].path}, {here} in {run.path}"
                raise lottery.LotteryError(f"{name}: runs of a method may differ in seed alone, not in {key}: {both}")
        found[run.config["seed"]] = run
    return found


def alike(row: dict, other: dict) -> bool:
    """Do both keep as many weights, to 1 %?"""
    return abs(row["remaining"] - other["remaining"]) <= 0.01 * other["remaining"]


def paired(a: list[Run], b: list[Run], rounds: list[tuple[int, int]] | None = None) -> list[Point]:
    """a's rounds, b's as the others, by seed: the rounds named (a's, b's), or all tickets of as many weights, to 1 %.

    Raises LotteryError for two runs of a seed in one set, and unless there is a seed and a round to compare.
    """
    ours, theirs = by_seed(a, "A"), by_seed(b, "B")
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise lottery.LotteryError(f"A has seeds {sorted(ours)} and B {sorted(theirs)}: none in common")
    named = rounds is not None
    if not named:
        rounds = sorted({
            (row["round"], near["round"]) for seed in seeds for row in ours[seed].rows if row["round"]
            for near in [min(theirs[seed].rows, key=lambda other: abs(other["remaining"] - row["remaining"]))]
            if near["round"] and alike(near, row)
        })  # fmt: skip
    found: list[Point] = []
    for left, right in rounds:
        points: list[Point] = []  # one, unless sparsities differ among the seeds
        for seed in seeds:
            row, other = (next((r for r in run.rows if r["round"] == number), None)
                          for run, number in ((ours[seed], left), (theirs[seed], right)))  # fmt: skip
            if not (row and other) or not (named or alike(row, other)):
                continue
            point = next((p for p in points if alike(row, p.rows[0]) and alike(other, p.others[0])), None)
            if point is None:
                points.append(point := Point(ours[seed].config["margin"], rival=True))
            point.add(seed, row, other, ours[seed].rows[0])
        if named and len(points) > 1:
            kept = ", ".join(f"{p.mean('remaining'):.1%} and {p.mean_other('remaining'):.1%}" for p in points)
            raise lottery.LotteryError(f"rounds {left}:{right} keep other shares in other seeds: {kept}")
        found += points
    if not found:
        told = ", ".join(f"{left}:{right}" for left, right in rounds)
        why = f"rounds {told}" if rounds else "round of as many weights in common: name rounds (--rounds R:Q)"
        raise lottery.LotteryError(f"A and B have no {why}")
    return found
