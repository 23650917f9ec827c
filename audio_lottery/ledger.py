"""The ledger: one JSON object a line, a line a round, chained; and `verify`, which checks a run from its files alone.

"previous" is the hash of the line before (in the first line of the configuration): the chain. It leaves out "seconds",
"waited" (of them, for data), "resumed" and "timing_sha256", so that an interrupted run has the chain of an
uninterrupted one; "timing_sha256" covers those.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import torch

from audio_lottery.files import load_masks, load_ticket, read_sealed
from lottery import VERDICT_RULE, LotteryError, Masks, Pruning, Verdict, kept_counts, sha256, verdict

TIMING = ("seconds", "waited", "resumed", "timing_sha256")


def hash_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def row_hash(row: dict) -> str:
    return hash_json({key: value for key, value in row.items() if key not in TIMING})


def timing_hash(row: dict) -> str:
    return hash_json([row_hash(row), *(row.get(key) for key in TIMING[:-1])])


def ledger_line(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()


def read_ledger(path: Path) -> list[dict]:
    """The whole lines of a ledger; a last line without its newline was being written and does not count.

    Raises LotteryError, naming file and line, for a line that is no row.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LotteryError(f"{path}: cannot read the ledger ({error.strerror})") from None
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            rows.append(dict(json.loads(line.decode())))
        except (ValueError, TypeError, RecursionError):
            raise LotteryError(f"{path}, line {number}: not a row of a ledger") from None
    return rows


def numbered(speakers: list[str]) -> list[int]:
    """Who speaks each utterance, as numbers from 0 on in the order they come; [] unless all have names, of two or more.

    Numbers, since a corpus may name its speakers in 128 characters, and since nobody needs to know them.
    """
    names = {name: number for number, name in enumerate(dict.fromkeys(speakers))}
    return [names[name] for name in speakers] if len(names) > 1 and "" not in names else []


OF_VERDICTS = ("verdict", "interval", "power", "verdict_rule", "test_speakers")  # by an older rule other, or not there


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
    """Was the row's verdict made as lottery.verdict makes it now? Rows of the first rule do not say."""
    return row.get("verdict_rule") == VERDICT_RULE


def without_verdicts(row: dict) -> dict:
    """What a row says of its tests but for the verdicts: all that can be held against a row of another rule."""
    left = {key: value for key, value in row.items() if key not in OF_VERDICTS}
    others = {name: without_verdicts(test) for name, test in row.get("other_tests", {}).items()}
    return left | ({"other_tests": others} if others else {})


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
    try:
        config = dict(json.loads((path / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise LotteryError(f"{path}: not a run folder: no config.json that can be read") from None
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
        whole = path.read_bytes().rfind(b"\n") + 1  # behind it: a line that was being written
        with open(path, "r+b") as file:
            file.truncate(whole)
            file.seek(whole)
            file.write(ledger_line(row))
            file.flush()
            os.fsync(file.fileno())
    rows.append(row)


# ---------------------------------------------------------------------------- verify


def verify(run: Path) -> list[tuple[str, str]]:
    """Check a finished run from its files alone. Returns (check, "" or what is wrong) in order.

    Files: config.json, ledger.jsonl, rewind.safetensors (theta_k), masks/ROUND.safetensors, ticket.safetensors. They
    hold no secret: who writes new counts with new hashes is found out by training a round again, not by this.
    """
    found: dict = {"run": run}
    checks = []
    for name, function in (
        ("the ledger is one chain from the configuration on, with exact counts", _verify_chain),
        ("rates, verdicts and shares follow from the counts beside them", _verify_rows),
        ("masks are nested and exact, and every round starts at theta_k * mask", _verify_masks),
        ("the ticket is the last round's, and its pruned weights are exactly 0", _verify_ticket),
    ):
        try:
            function(found)
            checks.append((name, ""))
        except (LotteryError, OSError) as error:
            checks.append((name, str(error)))
        except Exception as error:  # whatever a tampered file makes the check trip over
            checks.append((name, f"a value is missing or of the wrong kind ({type(error).__name__}: {error})"))
    return checks


def _expect(right: bool, what: str) -> None:
    if not right:
        raise LotteryError(what)


def _verify_chain(found: dict) -> None:
    run = found["run"]
    found["settings"] = settings_of(json.loads((run / "config.json").read_text(encoding="utf-8")))
    rows = found["rows"] = read_ledger(run / "ledger.jsonl")
    written = (run / "ledger.jsonl").read_bytes()
    _expect(written == b"".join(map(ledger_line, rows)), "it is not as this program writes it")
    check_chain(rows, found["settings"])
    rounds = len(rounds_of(rows, found["settings"]))
    _expect(len(rows) == rounds, f"it has {len(rows)} rounds of {rounds}: the run is not finished")


def _verify_rows(found: dict) -> None:
    settings, dense = found["settings"], found["rows"][0]
    rest = never_pruned(found["rows"][-1])
    for row in found["rows"]:
        where = f"round {row['round']}: "
        _expect(row["total"] == dense["total"], where + "another total than round 0's")
        _expect(row["remaining"] == row["kept"] / row["total"], where + "remaining is not kept / total")
        if "sizes" not in row:  # dense-small: another network, its parameters by the dense one's
            share = (row["kept"] + rest) / (row["total"] + rest)
            _expect(row["remaining_all"] == share, where + f"remaining_all is not {share}, as the last round's is")
        for key in ("seed", "data_sha256"):
            _expect(row[key] == settings[key], where + f"{key} is not the configuration's")
        if row is dense and "dense" in settings:  # of another run, where its settings were the line before
            row_there = row_hash({**row, "previous": row["config_sha256"]})
            _expect(row_there == settings["dense"], where + "it is not the row that the configuration names")
        else:
            _expect(row["config_sha256"] == hash_json(settings), where + "config_sha256 is not the configuration's")
        if "valid_wers" in row:  # ledgers of before do not have it
            epochs = len(row["valid_wers"]), len(row["losses"])
            _expect(epochs == (settings["epochs"],) * 2, where + "not as many epochs as configured")
            best, stated = best_epoch(row["valid_wers"]), (row["valid_wer"], row["best_epoch"])
            _expect(stated == best, where + f"the best valid WER and its epoch are {best}, not {stated}")
        others, dense_others = row.get("other_tests", {}), dense.get("other_tests", {})
        _expect(list(others) == list(dense_others), where + "other test sets than round 0's")
        for test, dense_test in zip([row, *others.values()], [dense, *dense_others.values()]):
            errors, words = test["test_errors"], test["test_words"]
            _expect(words == dense_test["test_words"], where + "other test utterances than round 0's")
            _expect(test["test_wer"] == sum(errors) / sum(words), where + "test_wer is not test_errors / test_words")
            if "test_speakers" in test:
                _expect(len(test["test_speakers"]) == len(words), where + "not a speaker for each test utterance")
            if row["round"] and of_this_rule(row):  # the interval of an older rule is not made any more
                right = verdict_of(errors, dense_test["test_errors"], words, settings["margin"])
                stated = {key: test[key] for key in ("verdict", "interval", "power") if key in test}
                said = [Verdict(told["verdict"], *told["interval"]) for told in (right, stated)]
                _expect(stated == right, where + f"the verdict is {said[0]}, not {said[1]}, or its power is another")


def _verify_masks(found: dict) -> None:
    if "rounds" in found["settings"]:  # given, not pruned: a start of its own each round, which the ticket has
        for row in found["rows"]:
            where, masks = f"round {row['round']}: ", None
            if row["round"] and found["settings"].get("control") != "dense-small":
                masks = load_masks(found["run"] / "masks" / f"{row['round']:02d}.safetensors")
                counts = {name: int(mask.sum()) for name, mask in masks.items()}
                _expect(counts == row["kept_per_layer"], where + "other counts than the ledger's")
                _expect(sha256(masks) == row["mask_sha256"], where + "other masks than the ledger's")
                _verify_blocks(masks, row, found["settings"])
            _expect(sum(row["kept_per_layer"].values()) == row["kept"], where + "the layers' counts do not add up")
        return
    run, theta = found["run"], read_sealed(found["run"] / "rewind.safetensors", "rewind state")[0]
    names = found["rows"][0]["kept_per_layer"]
    parent = {name: torch.ones_like(theta[name], dtype=torch.bool) for name in names}
    for row in found["rows"]:
        where = f"round {row['round']}: "
        masks = parent if row["round"] == 0 else load_masks(run / "masks" / f"{row['round']:02d}.safetensors")
        shapes = {name: mask.shape for name, mask in masks.items()}
        _expect(shapes == {name: theta[name].shape for name in names}, where + "masks of other weights")
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        _expect(counts == row["kept_per_layer"], where + "other counts than the ledger's")
        _expect(sum(counts.values()) == row["kept"], where + "the layers' counts do not add up")
        _verify_blocks(masks, row, found["settings"])
        grown = any((masks[name] & ~parent[name]).any() for name in names)
        _expect(not grown, where + "keeps a weight that was pruned before")
        hashes = sha256(masks), sha256(parent)
        _expect(hashes == (row["mask_sha256"], row["parent_sha256"]), where + "other hashes than the ledger's")
        _expect(sha256(theta) == row["rewind_sha256"], where + "rewind.safetensors is not its rewind state")
        start = {n: v.masked_fill(~masks[n], 0) if n in masks else v for n, v in theta.items()}
        if row["round"] or found["settings"]["rewind_step"] == 0:  # else round 0 started before theta_k
            _expect(sha256(start) == row["start_sha256"], where + "does not start at theta_k * mask")
        parent = masks


def _verify_blocks(masks: Masks, row: dict, settings: dict) -> None:
    where, pruning = f"round {row['round']}: ", Pruning(tuple(settings.get("block", (1, 1))))
    _expect(sum(mask.numel() for mask in masks.values()) == row["total"], where + "total is not the masks'")
    units = {name: pruning.units(mask) for name, mask in masks.items()}
    whole = {name: pruning.weights(unit, masks[name]) for name, unit in units.items()}
    _expect(sha256(whole) == sha256(masks), where + "a block is kept in part")
    if "block" in settings:
        counts = [sum(int(unit.sum()) for unit in units.values()), sum(unit.numel() for unit in units.values())]
        stated = [row["kept_blocks"], row["total_blocks"]]
        _expect(stated == counts, where + f"its masks keep {counts[0]} of {counts[1]} blocks, not {stated}")


def _verify_ticket(found: dict) -> None:
    file, row = load_ticket(found["run"] / "ticket.safetensors"), found["rows"][-1]
    _expect(sha256(file.masks) == row["mask_sha256"], "its masks are not the last round's")
    tested = sha256(file.trained) == row["trained_sha256"]
    _expect(tested, "its weights are not those that were tested in the last round")
    zero = not any((file.trained[name][~mask] != 0).any() for name, mask in file.masks.items())
    _expect(zero, "a pruned weight is not 0")
    if file.rewind is not None:  # round 0 starts before theta_k, if k is not 0
        start = row["start_sha256" if row["round"] or not found["settings"]["rewind_step"] else "rewind_sha256"]
        _expect(sha256(file.rewind) == start, "its rewind state is not what its round started from")
    _expect(hash_json(file.info) == row["info_sha256"], "its info (tokens, sizes, features) is not the last round's")
