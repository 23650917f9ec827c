"""The ledger: one JSON object a line, a line a round, chained; and config.json, where the chain begins.

"previous" is the hash of the line before (in the first line of the configuration): the chain. It leaves out "seconds",
"waited" (of them, for data), "resumed" and "timing_sha256", so that an interrupted run has the chain of an
uninterrupted one; "timing_sha256" covers those. A run that has ended has one line more, which is no row and outside of
the chain: "end", the hashes of its report. Runs of before do not have it.
"""

import hashlib
import json
import os
from pathlib import Path

from audio_lottery import checked
from audio_lottery.checked import SHA256, integer, keyed, listed, maybe, number, one_of, record, text
from audio_lottery.files import naming
from lottery import SCOPES, LotteryError, kept_counts

TIMING = ("seconds", "waited", "resumed", "timing_sha256")

# ---------------------------------------------------------------------------- what may stand in the files

BACKBONES, SIZES = ("cnn-lstm", "rnnt", "conformer"), ("demo", "wide", "wider", "paper")
CONTROLS = ("random-mask", "random-mask-matched", "random-init", "dense-small")
GO_ON = ("finetune", "lr-rewind")  # rivals that search, whose weights go on from round to round
GRADUAL = ("gradual", "gradual-long")  # rivals of one training, whose masks shrink as it goes
RIVALS = (*GO_ON, *GRADUAL, "dense-long")
EPOCHS = 10_000_000  # of a training, at most: the longest rival's are those of all rounds of a search
COUNT, RATE, SECONDS = integer(0, 2**53), number(0, 1e6), number(0, 1e9)
HASH = text(most=1_000)  # as reports take it; verify wants SHA-256
PATH = maybe(text(most=5_000))

MACHINE = record(
    {"data": text(most=5_000)},
    {
        "device": one_of("cpu", "cuda"), "threads": integer(1, 1024), "cache": text(most=5_000),
        "lm": PATH, "ticket": PATH, "dense": PATH, "init": PATH, "noise": PATH,
    },
)  # fmt: skip
NEEDED = {
    "backbone": one_of(*BACKBONES), "size": one_of(*SIZES), "seed": integer(0, 2**31 - 1),
    "sparsity": number(0, 1), "prune_rate": number(0, 1), "margin": number(0, 100), "data_sha256": text(most=1_000),
}  # fmt: skip
SETTINGS = record(
    NEEDED,
    {
        "rewind_step": integer(0, 2**31 - 1), "epochs": integer(1, 10_000), "processes": integer(1, 10_000),
        "batch_size": integer(1), "batch_seconds": maybe(number(0, 1e9)), "accumulate": integer(1),
        "lr": number(0, 1e6), "seconds": listed(number(0, 1e9), 2, 2), "amp": checked.switch, "tokens": text(),
        "block": listed(integer(1, 10**9), 2, 2), "scope": one_of(*SCOPES), "min_remaining": number(0, 1),
        "beam": maybe(integer(1, 2**31 - 1)), "rounds": listed(integer(0, 1000), 1, 1001),
        "control": maybe(one_of(*CONTROLS, *RIVALS)), "ticket_weights": one_of("rewind", "trained"),
        "snr": maybe(listed(number(-100, 100), 2, 2)), "test_snr": maybe(listed(number(-100, 100), 1, 1000)),
        "dense": HASH, "ticket_sha256": HASH, "init_sha256": HASH, "noise_sha256": HASH, "lm_sha256": maybe(HASH),
        "test": checked.switch, "marks": listed(number(0, 1), 1, 1000), "recipe_name": text(most=100),
        "anneal": number(1, 100), "warmup": integer(0, 10**9),
        "optimizer": one_of("adam", "adamw"), "eps": number(0, 1), "dropout": number(0, 1),
        "ctc_weight": number(0, 1e6),
        **dict.fromkeys(("noise_draws", "small", "normalization", "late_rewinding", "mask_draws"), text(most=100)),
    },
)  # fmt: skip

TEST = {
    "test_wer": RATE, "test_cer": RATE, "test_errors": listed(COUNT, 1), "test_words": listed(COUNT, 1),
    "verdict": one_of("winning", "matching", "worse", "undecided", "no verdict"),
    "interval": listed(number(-1e6, 1e6), 2, 2), "power": number(0, 1), "test_speakers": listed(COUNT, 1),
    "test_seen": listed(integer(0, 1), 1),
}  # fmt: skip
TESTED = ("test_wer", "test_cer", "test_errors", "test_words")
ROW_NEEDED = {
    "round": integer(0, 1000), "remaining": number(0, 1), "remaining_all": number(0, 1), "kept": COUNT, "total": COUNT,
    "kept_per_layer": keyed(COUNT), "mask_sha256": HASH, "last_sha256": HASH, "trained_sha256": HASH,
    "valid_wer": RATE, "seconds": SECONDS, "previous": SHA256, "timing_sha256": SHA256,
}  # fmt: skip
ROW_MAY = {
    "seed": integer(0, 2**31 - 1), "config_sha256": SHA256, "data_sha256": SHA256, "code_sha256": SHA256,
    "versions": keyed(text(most=100), 20), "device": one_of("cpu", "cuda"), "threads": integer(1, 1024),
    "rewind_sha256": SHA256, "start_sha256": SHA256, "threshold": number(0, 1e30), "best_epoch": integer(1, EPOCHS),
    "info_sha256": SHA256, "waited": SECONDS, "resumed": integer(0, 10**9), "parent_sha256": SHA256,
    "source_mask_sha256": HASH, "valid_wers": listed(RATE, 1, EPOCHS), "losses": listed(number(), 1, EPOCHS),
    "kept_blocks": COUNT, "total_blocks": COUNT, "sizes": keyed(checked.anything, 20),
    "steps": COUNT, "steps_in_all": COUNT, "epochs": integer(1, EPOCHS), "epochs_before": integer(1, EPOCHS),
    "parameters": COUNT, "texts_sha256": SHA256, "verdict_rule": integer(1, 1000), **TEST,
    "earlier": keyed(checked.anything, 20),
    "other_tests": keyed(record({key: TEST[key] for key in TESTED}, TEST)),
}  # fmt: skip
_ROW = record(ROW_NEEDED, ROW_MAY)
END = record({"end": keyed(SHA256, 10), "previous": SHA256}, others=False)


def check_row(row: object, where: str) -> None:
    """A row of a ledger, as a shape of audio_lottery.checked."""
    _ROW(row, where)
    if not is_tested(row):  # as with --no-test
        there = [key for key in row if key in TEST or key in ("other_tests", "texts_sha256", "verdict_rule")]
        if there:
            raise LotteryError(f"{where}: a value is missing: {', '.join(key for key in TESTED if key not in row)}")
        check_weights(row, where)
        return
    if row["round"] and not ("verdict" in row and "interval" in row):
        raise LotteryError(f"{where}: has no verdict and interval")
    if "" in row.get("other_tests", {}):  # as the row's own test goes by below, and in what reads it
        raise LotteryError(f"{where}: a test set without a name")
    for name, test in {"": row, **row.get("other_tests", {})}.items():
        if len(test["test_errors"]) != len(test["test_words"]) or not sum(test["test_words"]):
            raise LotteryError(
                f"{where}: has not as many test_errors as test_words, or no words{name and f' ({name})'}"
            )
        if row["round"] and "verdict" not in test:
            raise LotteryError(f"{where}: has no verdict of {name}")
    check_weights(row, where)


def is_tested(row: dict) -> bool:
    return all(key in row for key in TESTED)


def check_weights(row: dict, where: str) -> None:
    if not row["total"] or not row["kept_per_layer"]:
        raise LotteryError(f"{where}: has no weights")


def check_settings(settings: dict, where: str) -> None:
    """config.json, or a ticket's info, as a shape of audio_lottery.checked; with the rules between its values."""
    SETTINGS(settings, where)
    if not settings["sparsity"] < 1 or not 0 < settings["prune_rate"] < 1:
        raise LotteryError(f"{where}: sparsity must be below 1, and prune_rate between 0 and 1")
    rounds = settings.get("rounds", [0])
    if rounds[0] != 0 or rounds != sorted(set(rounds)):
        raise LotteryError(f"{where}, rounds: must be 0 and then growing, got {checked.said(rounds)}")


# ---------------------------------------------------------------------------- lines and hashes


def hash_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def row_hash(row: dict) -> str:
    return hash_json({key: value for key, value in row.items() if key not in TIMING})


def timing_hash(row: dict) -> str:
    """Of the times that a row has: the first ledgers did not count what was waited for."""
    return hash_json([row_hash(row), *(row[key] for key in TIMING[:-1] if key in row)])


def ledger_line(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()


def read_lines(path: Path) -> tuple[list[dict], dict | None]:
    """The rows of a ledger, and its end if it has one; a last line without its newline was being written.

    Raises LotteryError, naming file and line, for a line that is neither.
    """
    rows, end = [], None
    for at, line in enumerate(checked.read_bytes(path, "ledger").split(b"\n")[:-1], 1):
        where = f"{path}, line {at}"
        value = checked.parse(line, where, what="a row of a ledger")
        if end:
            raise LotteryError(f"{where}: stands behind the end")
        if isinstance(value, dict) and "end" in value:
            END(value, where)
            end = value
        else:
            check_row(value, where)
            rows.append(value)
    if end and (not rows or end["previous"] != row_hash(rows[-1])):
        raise LotteryError(f"{path}, line {at}: the end does not follow the last round")
    return rows, end


def read_ledger(path: Path) -> list[dict]:
    """The rows of a ledger. Raises LotteryError, naming file and line, as read_lines does."""
    return read_lines(path)[0]


def read_config(run: Path) -> dict:
    """config.json of a run folder. Raises LotteryError unless it is one, with every value of its kind."""
    try:
        return checked.read_json(run / "config.json", "configuration", check_config)
    except LotteryError as error:
        raise LotteryError(f"{run}: not a run folder: no config.json that can be read ({error})") from None


def check_config(config: object, where: str) -> None:
    check_settings(config, where)
    record({"machine": MACHINE})(config, where)


def best_epoch(valid_wers: list[float]) -> tuple[float, int]:
    """The best valid WER and its epoch, counted from 1; of equals the later."""
    best = min(valid_wers)
    return best, len(valid_wers) - valid_wers[::-1].index(best)


def never_pruned(row: dict) -> int:
    """Parameters that are not prunable, from a row's two shares: remaining_all = (kept + rest) / (total + rest)."""
    share = row["remaining_all"]
    return 0 if row["kept"] == row["total"] else round((share * row["total"] - row["kept"]) / (1 - share))


def settings_of(config: dict) -> dict:
    """What decides a result: the configuration without the machine it runs on."""
    return {key: value for key, value in config.items() if key != "machine"}


def unit_counts(rows: list[dict], settings: dict) -> list[int]:
    """Weights, or blocks, that each round of a search keeps by its settings; rows: its ledger, round 0 at least."""
    total = rows[0]["total_blocks" if "block" in settings else "total"]
    return kept_counts(total, settings["sparsity"], settings["prune_rate"])


def rounds_of(rows: list[dict], settings: dict) -> list[int]:
    """The rounds that a finished run has: its settings' "rounds" if masks are given, else as many as pruning takes."""
    return settings["rounds"] if "rounds" in settings else list(range(len(unit_counts(rows, settings))))


def check_chain(rows: list[dict], settings: dict) -> None:
    """Raise LotteryError unless the rows are the settings' rounds, in one chain from them on, with exact counts."""
    try:
        previous, rounds = hash_json(settings), rounds_of(rows, settings) if rows else []
        for number, row in enumerate(rows):
            if [row["round"]] != rounds[number : number + 1]:
                raise LotteryError(f"line {number + 1} is round {row['round']}")
            if row["previous"] != previous:
                before = f"round {rows[number - 1]['round']}" if number else "the configuration"
                raise LotteryError(f"round {row['round']} does not follow {before}")
            if row["timing_sha256"] != timing_hash(row):
                raise LotteryError(f"round {row['round']} does not have the hash it states")
            if is_tested(row) != settings.get("test", True):
                said = "is tested, where --no-test" if is_tested(row) else "is not tested, where the configuration"
                raise LotteryError(f"round {row['round']} {said} says otherwise")
            previous = row_hash(row)
        if rows and "rounds" not in settings:
            kept = [row["kept_blocks" if "block" in settings else "kept"] for row in rows]
            counts = unit_counts(rows, settings)[: len(rows)]
            if kept != counts:
                raise LotteryError(f"kept counts are {kept}, not {counts}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, LotteryError):
            raise
        raise LotteryError(f"a value is missing or of the wrong kind ({type(error).__name__}: {error})") from None


def read_run(path: Path) -> tuple[dict, list[dict]]:
    """Configuration and ledger of a run folder. Raises LotteryError unless they are one chain."""
    config = read_config(path)
    rows = read_ledger(path / "ledger.jsonl")
    try:
        check_chain(rows, settings_of(config))
    except LotteryError as error:
        raise LotteryError(f"{path / 'ledger.jsonl'}: {error} (see python -m audio_lottery verify)") from None
    return config, rows


def append_row(path: Path | None, rows: list[dict], row: dict, config: dict) -> None:
    """Chain a row to `rows` and to the ledger on the disk (path None: another process writes that).

    A round that is there already (an interrupted run came back to it) must be the same and is not written again.
    """
    at = sum(earlier["round"] < row["round"] for earlier in rows)
    row = {**row, "previous": row_hash(rows[at - 1]) if at else hash_json(config)}
    row["timing_sha256"] = timing_hash(row)
    if at < len(rows):
        for key in ("mask_sha256", "last_sha256", "trained_sha256"):
            if rows[at][key] != row[key]:
                raise LotteryError(f"{path}: round {row['round']} came out with another {key} than the ledger says")
        return
    if path:
        _append(path, ledger_line(row))
    rows.append(row)


def _append(path: Path, line: bytes) -> None:
    """Behind the whole rows, in place of an end or a line that was being written. Raises OSError, naming the path."""
    with naming(path):
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        last = content.rfind(b"\n", 0, max(0, whole - 1)) + 1
        if content.startswith(b'{"end": ', last, whole):
            whole = last
        with open(path, "r+b") as file:
            file.truncate(whole)
            file.seek(whole)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def file_hash(path: Path) -> str:
    return hashlib.sha256(checked.read_bytes(path, "report")).hexdigest()


def end_line(row: dict, names: dict[str, str]) -> bytes:
    """names: of files and their hashes; row: the last one."""
    return ledger_line({"end": names, "previous": row_hash(row)})


def append_end(run: Path, rows: list[dict], names: tuple[str, ...]) -> None:
    """Say in the ledger that the run has ended, and with which files. In place of an end that is there."""
    _append(run / "ledger.jsonl", end_line(rows[-1], {name: file_hash(run / name) for name in names}))
