"""Check runs, copy, weigh and describe tickets: python -m audio_lottery verify|copy|size|card"""

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from audio_lottery import card, files
from audio_lottery import verify as checks
from audio_lottery.console import Parser, command, fail, printable
from lottery import LotteryError

PROGRAM = "audio-lottery"


def parser() -> Parser:
    p = Parser(prog=PROGRAM, description="Check runs, copy, weigh and describe tickets.")
    commands = p.add_subparsers(dest="command", required=True, metavar="verify|copy|size|card")
    command = commands.add_parser("verify", help="a line a check: ok, FAILED or not here; exit code 1 if one FAILED")
    command.add_argument("run", type=Path, metavar="RUN", help="run folder")
    command.set_defaults(function=verify)
    command = commands.add_parser("copy", help="copy a ticket, checked on the way")
    command.add_argument("ticket", type=Path, metavar="TICKET", help="its file or its run folder")
    command.add_argument("new", type=Path, metavar="NEW")
    command.add_argument("--without-rewind", action="store_true", help="leave the rewind state out: half the size")
    command.set_defaults(function=copy)
    command = commands.add_parser("size", help="bytes by part beside the dense checkpoint, and what remains")
    command.add_argument("ticket", type=Path, metavar="TICKET", help="its file or its run folder")
    command.set_defaults(function=size)
    command = commands.add_parser("card", help="what it is, as Markdown: network, data, WER, sizes, licence, command")
    command.add_argument("ticket", type=Path, metavar="TICKET", help="its file or its run folder")
    of_run = "folder with config.json and ledger.jsonl, where TICKET is a file (default: TICKET, where it is a folder)"
    command.add_argument("--run", type=Path, help=of_run)
    command.add_argument("--licence", metavar="TEXT", help="of the data (default: by COPYRIGHT in the data's folder)")
    command.set_defaults(function=print_card)
    return p


def verify(args: argparse.Namespace) -> int:
    if args.run.is_file():
        why = "a ticket's own hash is checked whenever it is read, as by size"
        raise LotteryError(f"{args.run}: is a file: verify wants the run folder, with config.json and ledger ({why})")
    if not args.run.is_dir():
        raise LotteryError(f"{args.run}: no such run folder")
    if not (args.run / "config.json").exists() and not (args.run / "ledger.jsonl").exists():
        raise LotteryError(f"{args.run}: not a run folder: no config.json and no ledger.jsonl")
    failed = False
    for check in checks.verify(args.run, networks()):
        why = check.wrong or check.missing
        print(f"{check.word:8}  {check.name}{f': {printable(why)}' if why else ''}", flush=True)
        failed |= bool(check.wrong)
    return int(failed)


def networks() -> ModuleType | None:
    """lab.networks, which knows the networks; None where there is no checkout."""
    return of_checkout("lab", "networks")


def of_checkout(room: str, name: str) -> ModuleType | None:
    """A module of the checkout that this package lies in; None where the package is installed by itself."""
    try:
        found = importlib.util.find_spec(room)
        here = Path(__file__).resolve().parents[1] / room / "__init__.py"
        return importlib.import_module(f"{room}.{name}") if found and found.origin == str(here) else None
    except ImportError:
        return None


def print_card(args: argparse.Namespace) -> int:
    flags = of_checkout("runner", "flags")  # which makes a command of a configuration
    print(card.card(args.ticket, args.run, args.licence, flags and flags.shortest), end="")
    return 0


def copy(args: argparse.Namespace) -> int:
    file = files.load_ticket(args.ticket)
    rewind = None if args.without_rewind else file.rewind
    files.save_ticket(args.new, file.masks, rewind, file.trained, file.info, file.rewind_sha256)
    return 0


def size(args: argparse.Namespace) -> int:
    """Bytes of each part of the file against the dense float32 checkpoint, and the share of weights that remain."""
    file = files.load_ticket(args.ticket)
    dense, found = files.dense_bytes(file.trained), files.parts(args.ticket, file)
    whole = sum(found.values())
    rewind = sum(count for what, count in found.items() if what.startswith("rewind"))
    found |= {"the file": whole, "without its rewind state": whole - rewind, "dense float32 checkpoint": dense}
    for what, count in found.items():
        print(f"{what:38} {count:13,} bytes {count / dense:7.1%} of dense")
    kept, total = (sum(int(f(mask)) for mask in file.masks.values()) for f in (lambda m: m.sum(), lambda m: m.numel()))
    print(f"remaining: {kept / total:.1%} of {total:,} prunable weights")
    return 0


@command(PROGRAM)
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        return args.function(args)
    except (LotteryError, OSError) as error:
        return fail(PROGRAM, error)


if __name__ == "__main__":
    sys.exit(main())
