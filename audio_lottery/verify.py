"""Check a run from its files alone: python -m audio_lottery verify RUN. docs/runs.md says what that proves.

Files: config.json, ledger.jsonl, test.jsonl, rewind.safetensors (theta_k), masks/ROUND.safetensors, ticket.safetensors,
report.md, report.png. They hold no secret: who writes new counts with new hashes, none of which contradicts another, is
found out by training a round again, not by this.
"""

from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from audio_lottery import checked, ledger, texts
from audio_lottery.checked import SHA256
from audio_lottery.files import check_finite, check_fit, load_masks, load_ticket, read_sealed
from audio_lottery.verdicts import VERDICT_RULE, of_this_rule, verdict_of, word_of
from lottery import LotteryError, Masks, Pruning, State, prunable, sha256

REPORTS = ("report.md", "report.png")
STEPS = 10**9  # of comparing texts, at most: minutes
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")  # of a state, what is no parameter
EVERY_ROW = ("seed", "config_sha256", "data_sha256", "code_sha256", "versions", "device", "threads", "rewind_sha256")
EVERY_ROW += ("start_sha256", "threshold", "best_epoch", "info_sha256", "waited", "resumed")
HASHES = dict.fromkeys(("mask_sha256", "last_sha256", "trained_sha256"), SHA256)
NOT_FIRST = ("device", "threads", "info_sha256", "waited")  # not in the first ledgers, whose settings name the data


def row_shape(needed: tuple[str, ...]):
    must = ledger.ROW_NEEDED | {key: ledger.ROW_MAY[key] for key in needed} | HASHES
    may = {key: shape for key, shape in ledger.ROW_MAY.items() if key not in must} | {"source_mask_sha256": SHA256}
    return checked.record(must, may, others=False)


ROW = row_shape(EVERY_ROW)
FIRST_ROW = row_shape(tuple(key for key in EVERY_ROW if key not in NOT_FIRST))
SETTINGS_HASHES = ("data_sha256", "dense", "ticket_sha256", "init_sha256", "noise_sha256", "lm_sha256")
SETTINGS = checked.record({}, dict.fromkeys(SETTINGS_HASHES, checked.maybe(SHA256)))


class Check(NamedTuple):
    name: str
    wrong: str = ""  # what is wrong
    missing: str = ""  # what was not checked, since the folder does not have it

    @property
    def word(self) -> str:
        return "FAILED" if self.wrong else "not here" if self.missing else "ok"


class Run:
    """What the checks share: files are read once."""

    def __init__(self, path: Path, networks: ModuleType | None):
        self.path, self.networks = path, networks
        self.config = ledger.read_config(path)
        self.settings = ledger.settings_of(self.config)
        self.rows, self.end = ledger.read_lines(path / "ledger.jsonl")
        self.given = "rounds" in self.settings  # masks of another run, not a search
        self.control = self.settings.get("control")
        self.small = self.control == "dense-small"
        names = ("masks", "ticket.safetensors", "rewind.safetensors")
        self.bare = not any((path / name).exists() for name in names)
        self.file = self._theta = None

    @property
    def ticket(self):
        if self.file is None:
            self.file = load_ticket(self.path / "ticket.safetensors")
        return self.file

    @property
    def theta(self) -> State:
        """What the rounds rewind to."""
        if self._theta is None:
            path = self.path / "rewind.safetensors"
            self._theta = read_sealed(path, "rewind state")[0]
            check_finite(path, self._theta)
        return self._theta


def verify(path: Path, networks: ModuleType | None = None) -> list[Check]:
    """Check a finished run. Returns the checks in order.

    networks: lab.networks, which knows what network a ticket's info describes; None where it is not there.
    """
    try:
        run = Run(path, networks)
    except (LotteryError, OSError) as error:
        return [Check("config.json and ledger.jsonl are a run's", str(error))]
    checks: list[Check] = []
    for name, function in CHECKS:
        try:
            checks.append(Check(name, missing=function(run) or ""))
        except (LotteryError, OSError) as error:
            checks.append(Check(name, str(error)))
        except Exception as error:  # whatever a tampered file makes the check trip over
            checks.append(Check(name, f"a value is missing or of the wrong kind ({type(error).__name__}: {error})"))
    return checks


def failures(path: Path, networks: ModuleType | None = None) -> list[str]:
    """What is wrong with a run, [] if nothing is."""
    return [check.wrong for check in verify(path, networks) if check.wrong]


def expect(right: bool, what: str) -> None:
    if not right:
        raise LotteryError(what)


# ---------------------------------------------------------------------------- the ledger


def check_chain(run: Run) -> str | None:
    written = checked.read_bytes(run.path / "ledger.jsonl", "ledger")
    lines = [*run.rows, run.end] if run.end else run.rows
    expect(written == b"".join(map(ledger.ledger_line, lines)), "the ledger is not as this program writes it")
    ledger.check_chain(run.rows, run.settings)
    expect(bool(run.rows), "the ledger has no round")
    rounds = len(ledger.rounds_of(run.rows, run.settings))
    unfinished = f"it has {len(run.rows)} rounds of {rounds}: the run is not finished"
    expect(len(run.rows) == rounds or (run.bare and not run.end), unfinished)
    return unfinished if len(run.rows) < rounds else None


def check_rows(run: Run) -> None:
    dense = run.rows[0]
    SETTINGS(run.settings, "config.json")
    for row in run.rows:
        where = f"round {row['round']}: "
        (FIRST_ROW if "data" in run.settings else ROW)(row, f"round {row['round']}")
        check_counts(run, row, where)
        check_origin(run, row, where)
        others, dense_others = row.get("other_tests", {}), dense.get("other_tests", {})
        expect(list(others) == list(dense_others), where + "other test sets than round 0's")
        check_noise(others, run.settings.get("test_snr") or (), where)
        both = zip([row, *others.values()], [dense, *dense_others.values()]) if ledger.is_tested(row) else ()
        for test, dense_test in both:
            check_test(test, dense_test, where)


def check_counts(run: Run, row: dict, where: str) -> None:
    """Shares and layers against counts."""
    dense, last = run.rows[0], run.rows[-1]
    expect(row["total"] == dense["total"], where + "another total than round 0's")
    expect(row["remaining"] == row["kept"] / row["total"], where + "remaining is not kept / total")
    expect(sum(row["kept_per_layer"].values()) == row["kept"], where + "the layers' counts do not add up")
    expect(row["kept_per_layer"].keys() == dense["kept_per_layer"].keys(), where + "other layers than round 0's")
    more = [name for name, count in row["kept_per_layer"].items() if count > dense["kept_per_layer"][name]]
    narrower = run.small and row["round"]  # as a whole: a layer of it may be wider
    expect(narrower or not more, where + f"more weights than round 0 has in {', '.join(more)}")
    rest = ledger.never_pruned(last)
    if row["round"] == 0:
        expect(row["kept"] == row["total"], where + "the dense network has weights that are pruned")
        expect("verdict" not in row and "interval" not in row, where + "a verdict of dense against itself")
    if "sizes" in row:  # dense-small: another network, its parameters by the dense one's
        expect(run.small and row["round"] > 0, where + "sizes of its own, as only --control dense-small has them")
        expect(row["remaining"] <= row["remaining_all"], where + "remaining_all is below remaining")
    else:
        expect(not run.small or row["round"] == 0, where + "no sizes, which a round of --control dense-small has")
        share = 1.0 if run.small else (row["kept"] + rest) / (row["total"] + rest)
        expect(row["remaining_all"] == share, where + f"remaining_all is not {share}, as the last round's is")
    expect(row.get("waited", 0) <= row["seconds"] + 1, where + "it waited longer than it took")


def check_origin(run: Run, row: dict, where: str) -> None:
    """Settings, hashes and epochs against the configuration and the rounds before."""
    settings, dense, number = run.settings, run.rows[0], row["round"]
    for key in ("seed", "data_sha256"):
        expect(row[key] == settings[key], where + f"{key} is not the configuration's")
    if row is dense and "dense" in settings:  # of another run, where its settings were the line before
        row_there = ledger.row_hash({**row, "previous": row["config_sha256"]})
        expect(row_there == settings["dense"], where + "it is not the row that the configuration names")
    else:
        expect(row["config_sha256"] == ledger.hash_json(settings), where + "config_sha256 is not the configuration's")
    epochs = row.get("epochs", settings["epochs"])
    longer = number and settings.get("control") in ("gradual-long", "dense-long")
    expect("epochs" not in row or longer, where + "epochs of its own, as only the longer rivals have them")
    expect(row["best_epoch"] <= epochs, where + "its best epoch is behind the last one")
    same = row["last_sha256"] == row["trained_sha256"]
    expect(same or row["best_epoch"] < epochs, where + "the last epoch is the best, and the weights differ")
    if number == 0 or (run.given and run.control not in ledger.GRADUAL):
        expect(row["threshold"] == 0, where + "a threshold, where nothing was pruned")
    if run.given:
        return
    before = run.rows[number - 1] if number else row
    expect(row.get("parent_sha256") == before["mask_sha256"], where + "parent_sha256 is not the masks before")
    expect(row["rewind_sha256"] == dense["rewind_sha256"], where + "another rewind state than round 0's")
    if number == 0 and settings["rewind_step"] == 0:
        expect(row["start_sha256"] == row["rewind_sha256"], where + "it does not start at theta_0")
    grown = [n for n, count in row["kept_per_layer"].items() if count > before["kept_per_layer"][n]]
    expect(not grown, where + f"more weights than the round before in {', '.join(grown)}")


def check_noise(others: dict, ratios: list[float], where: str) -> None:
    """Each clean test, the first too, has one more at each signal-to-noise ratio of the configuration, and no other."""
    noisy = [name.rpartition(" at ")[2] for name in others if name.endswith(" dB")]
    clean = 1 + len(others) - len(noisy)
    expected = [f"{ratio:g} dB" for ratio in ratios] * clean
    expect(sorted(noisy) == sorted(expected), where + "its tests in noise are not the configuration's --test-snr")


def check_test(test: dict, dense_test: dict, where: str) -> None:
    errors, words = test["test_errors"], test["test_words"]
    expect(words == dense_test["test_words"] and sum(words) > 0, where + "other test utterances than round 0's")
    expect(test["test_wer"] == sum(errors) / sum(words), where + "test_wer is not test_errors / test_words")
    expect((test["test_cer"] == 0) == (sum(errors) == 0), where + "test_cer and test_errors: only one of them is 0")
    for about in ("test_speakers", "test_seen"):
        expect(len(test.get(about, words)) == len(words), where + f"{about} is not of each test utterance")


def check_verdicts(run: Run) -> str | None:
    """By the rule of today; an older rule's intervals are not made any more, and only their words are compared."""
    older, margin = [], run.settings["margin"]
    tested = [row for row in run.rows[1:] if ledger.is_tested(row)]
    today = next((i for i, row in enumerate(tested) if "verdict_rule" in row), len(tested))  # from this row on
    for i, row in enumerate(tested):
        tests = {"": row, **row.get("other_tests", {})}
        if not of_this_rule(row):
            old = i < today and (run.end is None or today < len(tested))  # a ledger with an end was ended by today's
            expect(old, f"round {row['round']}: verdict_rule must be {VERDICT_RULE}, got {row.get('verdict_rule')}")
            for test in tests.values():
                told = f"round {row['round']}: the verdict {test['verdict']} is not that of {test['interval']}"
                expect(test["verdict"] in ("no verdict", word_of(*test["interval"], margin)), told)
            older.append(str(row["round"]))
            continue
        for name, test in tests.items():
            dense = run.rows[0]["other_tests"][name] if name else run.rows[0]
            right = verdict_of(test["test_errors"], dense["test_errors"], test["test_words"], margin)
            stated = {key: test[key] for key in ("verdict", "interval", "power") if key in test}
            said = f"round {row['round']}: the verdict is {right['verdict']} {right['interval']}"
            expect(stated == right, f"{said}, not {stated['verdict']} {stated['interval']}, or its power is another")
    return f"intervals by the rule of today in rounds {', '.join(older)}" if older else None


def check_epochs(run: Run) -> str | None:
    """Ledgers of before have no valid_wers; one with an end has."""
    without = [row["round"] for row in run.rows if "valid_wers" not in row]
    for row in run.rows:
        where = f"round {row['round']}: "
        expect(("valid_wers" in row) == ("losses" in row), where + "one of valid_wers and losses is not there")
        if "valid_wers" in row:
            before = row.get("epochs_before", 0)  # end before the round starts, or while its masks still change
            wer, epoch = ledger.best_epoch(row["valid_wers"])
            epochs = before + len(row["valid_wers"]), before + len(row["losses"])
            wanted = row.get("epochs", run.settings["epochs"])
            expect(epochs == (wanted, wanted), where + "not as many epochs as configured")
            best, stated = (wer, before + epoch), (row["valid_wer"], row["best_epoch"])
            expect(stated == best, where + f"the best valid WER and its epoch are {best}, not {stated}")
    own = [row["round"] for row in run.rows if row["round"] or "dense" not in run.settings]
    old = not run.end and all(number in without for number in own)
    expect(old or not set(without) & set(own), f"rounds {without} have no valid_wers, and others have")
    return f"the valid WER of each epoch in rounds {', '.join(map(str, without))}" if without else None


# ---------------------------------------------------------------------------- masks and starts


def check_masks(run: Run) -> str | None:
    if run.bare:
        check_nothing_else(run, set())
        return "masks, rewind state and ticket"
    expected = {row["round"] for row in run.rows if row["round"] and not run.small}
    check_nothing_else(run, expected)
    parent = None
    for row in run.rows:
        where = f"round {row['round']}: "
        if row["round"] not in expected:
            continue
        masks = load_masks(run.path / "masks" / f"{row['round']:02d}.safetensors")
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        expect(counts == row["kept_per_layer"], where + "other counts than the ledger's")
        dense = {name: mask.numel() for name, mask in masks.items()}
        expect(dense == run.rows[0]["kept_per_layer"], where + "masks of other weights than round 0's")
        check_blocks(masks, row, run.settings)
        if run.given:
            expect(sha256(masks) == row["mask_sha256"], where + "other masks than the ledger's")
            continue
        parent = parent or {name: torch.ones_like(mask) for name, mask in masks.items()}
        same = masks.keys() == parent.keys() and all(mask.shape == parent[name].shape for name, mask in masks.items())
        expect(same, where + "masks of other weights")
        grown = any((mask & ~parent[name]).any() for name, mask in masks.items())
        expect(not grown, where + "keeps a weight that was pruned before")
        hashes = sha256(masks), sha256(parent)
        expect(hashes == (row["mask_sha256"], row["parent_sha256"]), where + "other hashes than the ledger's")
        parent = masks
    return None


def check_nothing_else(run: Run, rounds: set[int]) -> None:
    """No masks but those of rounds of the ledger; what was being written is no mask."""
    names = {f"{number:02d}.safetensors" for number in rounds}
    folder = run.path / "masks"
    more = sorted(p.name for p in folder.iterdir() if p.suffix != ".tmp") if folder.is_dir() else []
    more = [name for name in more if name not in names]
    expect(not more, f"masks/{more[0] if more else ''} is of no round of the ledger")


def check_blocks(masks: Masks, row: dict, settings: dict) -> None:
    where, pruning = f"round {row['round']}: ", Pruning(tuple(settings.get("block", (1, 1))))
    units = {name: pruning.units(mask) for name, mask in masks.items()}
    whole = {name: pruning.weights(unit, masks[name]) for name, unit in units.items()}
    expect(sha256(whole) == sha256(masks), where + "a block is kept in part")
    if "block" in settings:
        counts = [sum(int(unit.sum()) for unit in units.values()), sum(unit.numel() for unit in units.values())]
        stated = [row["kept_blocks"], row["total_blocks"]]
        expect(stated == counts, where + f"its masks keep {counts[0]} of {counts[1]} blocks, not {stated}")


def check_starts(run: Run) -> str | None:
    """Every round starts at theta_k * mask. Of given masks the ledger's last ticket has the start, at least."""
    if run.bare:
        return "the rewind state"
    if run.given:
        dense = run.rows[0]
        if "dense" not in run.settings:
            expect(dense["start_sha256"] == dense["rewind_sha256"], "round 0: it does not start at its theta_0")
        if run.control in (
            "random-init",
            "dense-small",
        ):  # new weights each round; the last are in the ticket
            earlier = [str(row["round"]) for row in run.rows[1:-1]]
            return f"the starts of rounds {', '.join(earlier)}, new weights each" if earlier else None
        if not (run.path / "rewind.safetensors").exists():  # runs of before do not keep it
            expect(run.end is None, "rewind.safetensors is not there")
            earlier = [str(row["round"]) for row in run.rows[1:-1]]
            return f"rewind.safetensors, the starts of rounds {', '.join(earlier)}" if earlier else None
    theta = run.theta
    for row in run.rows[1:] if run.given else run.rows:
        where = f"round {row['round']}: "
        expect(sha256(theta) == row["rewind_sha256"], where + "rewind.safetensors is not its rewind state")
        masks = {}
        if row["round"] and run.control in ledger.RIVALS:  # gradual and dense-long start whole
            if run.control in ledger.GO_ON:
                continue
        elif row["round"]:
            masks = load_masks(run.path / "masks" / f"{row['round']:02d}.safetensors")
        else:
            shapes = {name: tuple(theta[name].shape) for name in row["kept_per_layer"]}
            ones = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
            expect(sha256(ones) == row["mask_sha256"], where + "its masks are not of rewind.safetensors' weights")
        start = {n: v.masked_fill(~masks[n], 0) if n in masks else v for n, v in theta.items()}
        if row["round"] or run.settings["rewind_step"] == 0:  # else round 0 started before theta_k
            expect(sha256(start) == row["start_sha256"], where + "does not start at theta_k * mask")
    later = [str(row["round"]) for row in run.rows[1:]] if run.control in ledger.GO_ON else []
    return f"the starts of rounds {', '.join(later)}, last weights of the rounds before" if later else None


# ---------------------------------------------------------------------------- the ticket


def check_ticket(run: Run) -> str | None:
    check_dense(run)
    if run.bare:
        return "ticket.safetensors"
    file, row = run.ticket, run.rows[-1]
    expect(sha256(file.masks) == row["mask_sha256"], "its masks are not the last round's")
    counts = {name: int(mask.sum()) for name, mask in file.masks.items()}
    expect(counts == row["kept_per_layer"], "its masks keep other counts than the ledger's")
    tested = sha256(file.trained) == row["trained_sha256"]
    expect(tested, "its weights are not those that were tested in the last round")
    zero = not any((file.trained[name][~mask] != 0).any() for name, mask in file.masks.items())
    expect(zero, "a pruned weight is not 0")
    check_rewind(run)
    expect(
        ledger.hash_json(file.info) == row.get("info_sha256"),
        "its info (tokens, sizes, features) is not the last round's",
    )
    check_unpruned(run)
    return None


def check_dense(run: Run) -> None:
    """The dense network's weights, which transcribe.py --against dense takes; older runs have none."""
    path = run.path / "dense.safetensors"
    if path.exists():
        file, row = load_ticket(path), run.rows[0]
        tested = sha256(file.trained) == row["trained_sha256"] and sha256(file.masks) == row["mask_sha256"]
        expect(tested, "dense.safetensors: its weights are not those that were tested in round 0")
        expect(
            ledger.hash_json(file.info) == row.get("info_sha256"), "dense.safetensors: its info is not that of round 0"
        )


def check_rewind(run: Run) -> None:
    file, row = run.ticket, run.rows[-1]
    unrewound = run.control in (*ledger.GO_ON, *ledger.GRADUAL)
    if file.rewind is None and unrewound:
        return
    expect(file.rewind is not None, "it has no rewind state, which a run keeps")
    expect(not unrewound, f"it has a rewind state, which --control {run.control} has not")
    start = row["start_sha256" if row["round"] or not run.settings.get("rewind_step") or run.given else "rewind_sha256"]
    if run.given and not row["round"]:
        start = row["rewind_sha256"]
    expect(sha256(file.rewind) == start, "its rewind state is not what its round started from")
    kinds = ({n: (tuple(v.shape), v.dtype) for n, v in state.items()} for state in (file.trained, file.rewind))
    expect(
        len({str(sorted(kind.items())) for kind in kinds}) == 1, "its trained tensors are not those of its rewind state"
    )


def check_unpruned(run: Run) -> None:
    """The parameters that are never pruned are as many as remaining_all says: a headline, and in no count."""
    file, row = run.ticket, run.rows[-1]
    rest = sum(v.numel() for n, v in file.trained.items() if n not in file.masks and n.split(".")[-1] not in BUFFERS)
    if run.small:
        return  # by the dense network's, which check_network knows
    share = (row["kept"] + rest) / (row["total"] + rest)
    expect(row["remaining_all"] == share, f"round {row['round']}: remaining_all is {share} by the ticket's tensors")


def check_network(run: Run) -> str | None:
    if run.bare:
        return "ticket.safetensors"
    file, row, settings = run.ticket, run.rows[-1], run.settings
    stated = {key: value for key, value in file.info.items() if key not in ("tokens", "sizes", "features")}
    keys = dict.fromkeys(key for key in (*settings, *stated) if key != "tokens")  # whose place the list of them takes
    other = [key for key in keys if stated.get(key, ...) != settings.get(key, ...)]
    expect(not other, f"its info is not the configuration's: {', '.join(other)}")
    if "sizes" in row:
        expect(file.info.get("sizes") == row["sizes"], "its sizes are not the last round's")
    if run.networks is None:
        return "the networks' code (lab/networks.py), to compare tensors with sizes and tokens"
    model = run.networks.described(file.info, file.trained)
    check_fit(run.path / "ticket.safetensors", file, model)
    whole = prunable(model, settings.get("keep_dense", ()))
    expect(file.masks.keys() == whole.keys(), "its masks are not of all that is pruned by the configuration")
    run.networks.check_run(file.info, settings, row)
    return None


def check_texts(run: Run) -> str | None:
    """The texts of the tests give the ledger's counts. Ledgers of before, and a round 0 of another run, have none."""
    by_round: dict[int, list[dict]] = {}
    path, without = run.path / texts.TEXTS, []
    lines = texts.read_texts(path)
    expect(texts.steps_of(lines) <= STEPS, "test.jsonl: texts too long to be compared")
    said: dict[tuple, str] = {}
    for line in lines:
        expect(
            said.setdefault((line["test"], line["id"]), line["reference"]) == line["reference"],
            f"test.jsonl: {line['test']}, utterance {line['id']} has another reference in round {line['round']}",
        )
        by_round.setdefault(line.pop("round"), []).append(line)
    own = [row for row in run.rows if row["round"] or "dense" not in run.settings]
    stated = {row["round"]: row for row in own if "texts_sha256" in row}
    more = sorted(by_round.keys() - stated.keys())
    expect(not more, f"test.jsonl has texts of round {more[0] if more else ''}, of which the ledger says nothing")
    for row in own:
        if "texts_sha256" not in row or not path.exists():
            without.append(str(row["round"]))
        else:
            check_texts_of(row, by_round.get(row["round"], []))
    if not without or run.settings.get("test") is False:
        return None
    return f"test.jsonl: the texts of rounds {', '.join(without)}"


def check_texts_of(row: dict, lines: list[dict]) -> None:
    where = f"round {row['round']}: "
    expect(ledger.hash_json(lines) == row["texts_sha256"], where + "other texts in test.jsonl than the ledger's")
    tests: dict[str, list[dict]] = {}
    for line in lines:
        tests.setdefault(line["test"], []).append(line)
    stated = [row, *row.get("other_tests", {}).values()]
    same = len(tests) == len(stated) and list(tests)[1:] == list(row.get("other_tests", {}))
    expect(same, where + "test.jsonl has other test sets than the ledger")
    for (name, rows), counts in zip(tests.items(), stated):
        errors = [sum(line[kind] for kind in texts.KINDS) for line in rows]
        expect(errors == counts["test_errors"], where + f"{name}: test.jsonl has other errors than the ledger")
        for line in rows:
            reference, hypothesis = line["reference"].split(), line["hypothesis"].split()
            right = texts.edits(reference, hypothesis), len(hypothesis) - len(reference)
            told = sum(line[kind] for kind in texts.KINDS), line["insertions"] - line["deletions"]
            expect(right == told, where + f"{name}, utterance {line['id']}: its counts are not its texts'")
        words = [len(line["reference"].split()) for line in rows]
        expect(words == counts["test_words"], where + f"{name}: test.jsonl has other words than the ledger")


def check_report(run: Run) -> str | None:
    there = [name for name in REPORTS if (run.path / name).exists()]
    if not run.end:
        return "the hashes of report.md and report.png, which runs of before do not keep"
    stated = run.end["end"]
    expect(set(stated) == set(REPORTS), f"the ledger ends with hashes of {', '.join(sorted(stated))}")
    gone = [name for name in REPORTS if name not in there]
    for name in REPORTS:
        expect(name in there or run.bare, f"{name} is not there")
        expect(name in gone or ledger.file_hash(run.path / name) == stated[name], f"{name} is not what the run wrote")
    return " and ".join(gone) or None


CHECKS = (
    ("the ledger is one chain from the configuration on, with exact counts", check_chain),
    ("rates, shares and hashes follow from each other and the configuration", check_rows),
    ("each round was tested at its epoch of the best valid WER", check_epochs),
    ("masks are nested and exact, and of rounds of the ledger", check_masks),
    ("every round starts at theta_k * mask", check_starts),
    ("the ticket is the last round's, and its pruned weights are exactly 0", check_ticket),
    ("the ticket is of this configuration, and its tensors are its network's", check_network),
    ("verdicts follow from the counts beside them", check_verdicts),
    ("the texts of the tests give the ledger's counts", check_texts),
    ("report.md and report.png are those that the run ended with", check_report),
)
