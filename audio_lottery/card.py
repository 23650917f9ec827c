"""A ticket's card, as Markdown: python -m audio_lottery card TICKET. What the files do not say, it says plainly.

The ticket's own file has the masks, the weights and the settings of its run. How well it recognises, and on what folder
it was trained, is in a run folder's config.json and ledger.jsonl: TICKET's own, or the one that --run names, where the
row of its masks and weights is looked for. The licence is read in the COPYRIGHT of the folder with the data.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from audio_lottery import checked, files, ledger
from audio_lottery.console import markdown_text, printable
from audio_lottery.verdicts import Verdict, interval
from audio_lottery.verify import BUFFERS
from lottery import LotteryError, sha256

HERE = Path(__file__).resolve().parents[1]  # the checkout, where it is one
UNKNOWN = "not known here"
PATHS = ("data", "noise", "lm", "init", "ticket", "dense")  # of a configuration's machine
LONGEST = 2**20  # bytes of a COPYRIGHT


class Origin(NamedTuple):
    """What a run folder says of a ticket."""

    config: dict
    row: dict
    dense: dict  # round 0's row


def origin_of(run: Path, file: files.TicketFile) -> Origin:
    """Raises LotteryError, naming the folder, unless a round of its ledger has this ticket's masks and weights."""
    config, rows = ledger.read_run(run)
    hashes = sha256(file.masks), sha256(file.trained)
    for row in rows:
        if (row["mask_sha256"], row["trained_sha256"]) == hashes:
            return Origin(config, row, rows[0])
    raise LotteryError(f"{run}: no round of its ledger has this ticket's masks and weights")


# ---------------------------------------------------------------------------- what it says


def network(info: dict, file: files.TicketFile) -> list[str]:
    sizes = info.get("sizes")
    if isinstance(sizes, dict) and "dropout" in info:  # a recipe's, in place of the size's
        sizes = {**sizes, "dropout": info["dropout"]}
    said = ", ".join(f"{key} {checked.said(value)}" for key, value in sizes.items()) if isinstance(sizes, dict) else ""
    found = [f"network: {info['backbone']} of {info['size']} size ({said})" if is_run(info) else f"network: {UNKNOWN}"]
    if isinstance(info.get("tokens"), list):
        found.append(f"tokens: {len(info['tokens'])}, the blank among them; features: {info.get('features', UNKNOWN)}")
    if file.rewind is None:
        others = info.get("rewind_step") or {"control", "init_sha256", "ticket_sha256"} & info.keys()  # not its seed's
        again = is_run(info) and file.rewind_sha256 and not others
        why = "train.py --ticket draws it again from its seed" if again else "it can be used, and not be rewound"
        found.append(f"rewind state: left out; {why}")
    return found


def is_run(info: dict) -> bool:
    """Is this the info of a ticket of train.py?"""
    try:
        ledger.check_settings(settings_in(info), "info")
    except LotteryError:
        return False
    return True


def training(info: dict, origin: Origin | None) -> list[str]:
    if not is_run(info):
        return [f"trained on: {UNKNOWN}: its info is not that of a run"]
    data = Path(origin.config["machine"]["data"]).name if origin else f"a corpus whose name is {UNKNOWN}"
    sets = info.get("train_sets")
    more = f", sets {', '.join(map(str, sets))}" if isinstance(sets, list) else ""
    found = [f"trained on: {data}{more}; SHA-256 of the corpus {info['data_sha256']}"]
    if origin:
        row, count = origin.row, len(ledger.rounds_of([origin.dense], ledger.settings_of(origin.config)))
        where = f"{row['device']}, {row['threads']} thread{'s' * (row['threads'] > 1)}, " if "device" in row else ""
        versions = ", ".join(f"{name} {version}" for name, version in row.get("versions", {}).items())
        found.append(f"round {row['round']} of a run of {count}, seed {info['seed']}, {where}{versions}")
    return found


def rates(origin: Origin | None) -> list[str]:
    """WER with its interval, over other utterances; and against dense."""
    if origin is None:
        return [f"WER: {UNKNOWN}: the ledger of its run has it (--run RUN)"]
    if not ledger.is_tested(origin.row):
        return [f"WER: on valid {origin.row['valid_wer']:.3f}; its run was not tested (--no-test)"]
    found = []
    for name, row in {"": origin.row, **origin.row.get("other_tests", {})}.items():
        errors, words = row["test_errors"], row["test_words"]
        over = "95 % interval [{:.3f}, {:.3f}] over other utterances".format(*interval(errors, words))
        where = f"{name}, {len(words)} utterances" if name else f"the test's {len(words)} utterances"
        found.append(f"WER on {where}: {row['test_wer']:.3f}, {over}; CER {row['test_cer']:.3f}")
        if "verdict" in row and origin.row["round"]:
            dense = (origin.dense["other_tests"][name] if name else origin.dense)["test_wer"]
            power = f", power {row['power']:.0%}" if "power" in row else ""
            found.append(f"against dense, {dense:.3f}: {Verdict(row['verdict'], *row['interval'])}{power}, 1 seed")
    return found


def sizes(path: Path, file: files.TicketFile) -> list[str]:
    kept, total = (sum(int(f(mask)) for mask in file.masks.values()) for f in (lambda m: m.sum(), lambda m: m.numel()))
    own = {name: value for name, value in file.trained.items() if name.split(".")[-1] not in BUFFERS}
    rest = sum(value.numel() for name, value in own.items() if name not in file.masks)
    parts, dense = files.parts(path, file), files.dense_bytes(file.trained)
    whole, rewind = sum(parts.values()), sum(size for part, size in parts.items() if part.startswith("rewind"))
    without = f", {whole - rewind:,} without its rewind state" if rewind else ""
    of_all = f"; {kept + rest:,} of all {total + rest:,} parameters, {(kept + rest) / (total + rest):.1%}"
    of_all = of_all if is_run(file.info) else ""  # which tensors of another network are parameters is unknown
    return [
        f"weights kept: {kept:,} of {total:,} prunable ones, {kept / total:.1%}{of_all}",
        f"bytes: {whole:,}{without}; the dense float32 checkpoint has {dense:,}",
    ]


def licence_in(folder: Path) -> str | None:
    """What the folder's COPYRIGHT says: the licence of all files where it is in Debian's form, else every one that it
    names, else its first line. None if there is none that can be read."""
    try:
        text = checked.read_bytes(folder / "COPYRIGHT", "licence", LONGEST).decode("utf-8", "replace")
    except LotteryError:
        return None
    whole = re.search(r"^Files: \*$(?:\n(?!\n).*)*?\nLicen[sc]e: *(.+)$", text, re.M)
    named = [whole[1]] if whole else list(dict.fromkeys(re.findall(r"^Licen[sc]e: *(.+)$", text, re.M)))
    named = named or [line for line in text.splitlines() if line.strip()][:1]
    return ", ".join(one.strip()[:200] for one in named[:10]) or None


def licence(given: str | None, origin: Origin | None) -> str:
    if given is not None:
        return given
    data = origin.config["machine"]["data"] if origin else None
    found = licence_in(HERE / "demo" if data == "demo" else Path(data)) if data else None
    if found:
        return f"{found} (COPYRIGHT in {Path(data).name})"
    why = "the folder has no COPYRIGHT that can be read" if data else "a ticket's file does not name its corpus"
    return f"{UNKNOWN}: {why}; --licence TEXT says it"


def command(info: dict, origin: Origin | None, line_of: Callable[[dict], list[str]] | None) -> list[str]:
    """The command line, in a block; or the settings, where what makes a command of them is not here."""
    if not is_run(info):
        return [f"The command that made it is {UNKNOWN}."]
    config = origin.config if origin else settings_in(info)
    if line_of is None:
        block = json.dumps(ledger.settings_of(config), indent=2).split("\n")
        why = f"The command that made it is {UNKNOWN}: the repository's checkout makes it of these settings."
        return [why, "", "```json", *map(printable, block), "```"]
    machine = config.get("machine", {"data": "DIR"})
    places = [f"--{key}={Path(machine[key]).name}" for key in PATHS if machine.get(key)]
    places += [f"--threads={origin.row['threads']}"] if origin and "device" in origin.row else []  # bits depend on it
    line = shlex.join(["python", "train.py", *line_of(config), *places])
    whose = "" if origin else f" (its corpus, DIR, is {UNKNOWN})"
    return [f"The command that made it{whose}:", "", "```", printable(line), "```"]


def settings_in(info: dict) -> dict:
    """The settings of a run, of its ticket's info: what --tokens was stands in the tokens themselves."""
    pieces = isinstance(info.get("tokens"), list) and "▁" in "".join(map(str, info["tokens"]))  # of bpe:N
    kind = {"tokens": f"bpe:{len(info['tokens'])}" if pieces else "chars"}
    return {key: value for key, value in info.items() if key not in ("sizes", "features")} | kind


def card(
    path: Path, run: Path | None = None, given: str | None = None,
    line_of: Callable[[dict], list[str]] | None = None,
) -> str:  # fmt: skip
    """The card of a ticket (its file or its run folder), as Markdown.

    run: the folder whose ledger tells of it; by default TICKET, where that is a folder.  given: the licence.
    line_of: makes the flags of train.py of a configuration.  Raises LotteryError for what cannot be read.
    """
    run = run or (path if path.is_dir() else None)
    file = files.load_ticket(path)
    origin, info = origin_of(run, file) if run else None, file.info
    if origin and (wrong := [key for key in ledger.settings_of(origin.config) if differs(key, origin.config, info)]):
        raise LotteryError(f"{run}: its settings are not those that the ticket states: {', '.join(wrong)}")
    kept = sum(int(mask.sum()) for mask in file.masks.values()) / sum(mask.numel() for mask in file.masks.values())
    about = f"{info['backbone']}, {info['size']} size" if is_run(info) else "a network that its info does not name"
    facts = [
        *network(info, file), *training(info, origin), *rates(origin), *sizes(path, file),
        f"licence of the data: {licence(given, origin)}",
    ]  # fmt: skip
    lines = [f"# {markdown_text(f'A ticket: {about}, {kept:.1%} of the prunable weights')}", ""]
    lines += [f"- {markdown_text(fact)}" for fact in facts]
    return "\n".join([*lines, "", *command(info, origin, line_of), ""])


def differs(key: str, config: dict, info: dict) -> bool:
    """Does a setting stand otherwise in a ticket's info? The tokens' place is taken by their list."""
    return key != "tokens" and config[key] != info.get(key)
