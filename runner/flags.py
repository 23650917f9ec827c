"""The command line of train.py. Each flag stands once, in TABLE; parser, configuration and messages follow from it."""

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import lottery
import models
from audio_lottery import checked
from audio_lottery.console import Parser
from lab import controls, corpora, decode, rivals
from lab.compare import MARKS
from runner import processes
from runner.recipes import OF_SIZE, RECIPE_NAMES, RECIPES
from runner.values import low_high, rows_by_columns, shares, snr_list, snr_range, speeds

NO_FLAG = checked.text(r"(?!-)[^\0]*", rule="a text that does not begin with -, as flags do")
HERE = Path(__file__).resolve().parent.parent  # the repository
NONE = Path("none")  # as --lm, --noise and --init: without, where --ticket's run has it
MOST_BEAM = 100_000
SCOPE_OF_BLOCKS = "lamp"  # measured: results/prompts/blocks.md


# ---------------------------------------------------------------------------- the table

TRAIN, DATA, PRUNE = "what to train", "on what (data)", "how to prune"
TEST, MACHINE = "how to test (decoding, noise)", "the machine"
IN_CONFIG = ("always", "recipe", "changed")


@dataclass(frozen=True)
class Flag:
    name: str  # in the configuration; on the command line --name, with - for _, or what is `spelled`
    group: str  # of --help
    # Where its value stands in config.json, and so whether it is part of the run's identity. "always": by its name;
    # "recipe": as the field of the recipe that it changes; "changed": by its name, if it is not the default (or
    # `absent`); "machine": in config["machine"], which is no part of the identity; "no": nowhere.
    identity: Literal["always", "recipe", "changed", "machine", "no"]
    value: Callable | tuple[str, ...]  # what reads it, or the words that it may be; bool: a switch
    _: dataclasses.KW_ONLY
    help: str
    default: object = None  # None: none, the recipe's, or one that hangs on other flags (`otherwise` says which)
    otherwise: str = ""  # the default in words, where `default` does not say it
    absent: object = None  # what a configuration without it means, where that is not the default
    rule: str = ""  # what it must be, for the help; or
    least: float | None = None  # what it is checked for, with
    most: float = 2**31 - 1
    metavar: str | tuple[str, ...] | None = None
    count: int | str | None = None  # argparse's nargs
    between: str = ""  # what stands between the numbers of its value
    part_of: str = ""  # the flag without which it means nothing
    masks: bool = False  # says how masks are made, so that --ticket's run fixes it
    with_ticket: bool = False  # goes with --ticket only
    spelled: str = ""

    @property
    def option(self) -> str:
        return self.spelled or f"--{self.name.replace('_', '-')}"

    @property
    def range(self) -> str:
        if self.least is None:
            return self.rule
        return f"at least {self.least}" + (f" and at most {self.most}" if self.most < 2**31 - 1 else "")

    @property
    def when_absent(self) -> object:
        return self.default if self.absent is None else self.absent

    @property
    def taken_over(self) -> bool:
        """Is its default with --ticket what that run had?"""
        return not self.with_ticket and (self.identity in IN_CONFIG or self.name in controls.PATHS)

    def written(self, value) -> str:
        if self.count and isinstance(value, (list, tuple)):
            return " ".join(map(str, value))
        return self.between.join(f"{v}" for v in value) if self.between else str(value)

    @property
    def shape(self) -> checked.Shape:
        """What its value is in JSON, as a configuration or a ticket has it."""
        if self.value is bool:
            return checked.switch
        if isinstance(self.value, tuple):
            return checked.one_of(*self.value)
        if self.between:
            return checked.listed(checked.number(), 1, 1000)
        one = {int: checked.integer(-(2**31)), float: checked.number()}.get(self.value, NO_FLAG)
        return checked.listed(one, 1, 1001) if self.count else one

    def read_back(self, value, where: str):
        """The value of a configuration or a ticket, as if it had been typed: of the flag's own type and range.

        Raises LotteryError, which begins with `where`, for any other.
        """
        self.shape(value, f"{where}, {self.name}")
        if self.value is bool or isinstance(self.value, tuple):
            return value
        try:
            if self.count:
                return [self.value(str(one)) for one in value]
            value = self.value(self.written(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise lottery.LotteryError(f"{where}, {self.name}: {error}") from None
        if self.least is not None and not self.least <= value <= self.most:
            raise lottery.LotteryError(f"{where}, {self.name}: must be {self.range}, got {value}")
        return value


# name, group, identity, what reads it; then default, rule and how it is written; then the help.
TABLE = (
    Flag("backbone", TRAIN, "always", tuple(models.BACKBONES), default="rnnt",
         help="kind of network: a CNN-LSTM or a Conformer trained with CTC, or a transducer (rnnt)"),
    Flag("size", TRAIN, "always", ("demo", "wide", "wider", "paper"), default="demo",
         help="size of the network; wide and wider are demo with 2 and 3 times the widths"),
    Flag("recipe_name", TRAIN, "changed", RECIPE_NAMES, otherwise="the size's: paper or demo", spelled="--recipe",
         help="how it is trained: for a quarter of an hour of speech, for AN4, or as in the paper"),
    Flag("epochs", TRAIN, "recipe", int, least=1, most=10_000, metavar="N",
         help="passes over the training speech in each round"),
    Flag("batch_size", TRAIN, "recipe", int, least=1, most=1_000_000, metavar="N", help="utterances in a batch"),
    Flag("batch_seconds", TRAIN, "recipe", float, otherwise="none", least=1, most=1_000_000, metavar="S",
         help="seconds of audio in a batch, padding counted, in place of --batch-size"),
    Flag("accumulate", TRAIN, "recipe", int, least=1, most=1_000_000, metavar="N",
         help="batches whose gradients make one optimizer step"),
    Flag("lr", TRAIN, "recipe", float, rule="above 0 and at most 100", metavar="RATE", help="highest learning rate"),
    Flag("anneal", TRAIN, "recipe", float, least=1, most=100, otherwise="1.1", metavar="RATE",
         help="what the learning rate is divided by after each epoch, in the paper's recipe of cnn-lstm and rnnt"),
    Flag("seconds", TRAIN, "recipe", low_high, rule="0 <= LO < HI <= 1e7", between=":", metavar="LO:HI",
         help="train only on utterances between LO and HI seconds long"),
    Flag("speeds", TRAIN, "recipe", speeds, otherwise="1", absent=(1.0,), between=",", metavar="A,B,...",
         rule="0.5 to 2, rising", help="train on each utterance at one of these speeds, drawn anew in each epoch"),
    Flag("amp", TRAIN, "recipe", bool, otherwise="no",
         help="compute the forward pass in 16-bit floats (bfloat16), on CUDA only"),
    Flag("seed", TRAIN, "always", int, default=0, least=0, metavar="N",
         help="what all random draws follow from: initial weights, data order, dropout, augmentation"),
    Flag("init", TRAIN, "machine", Path, otherwise="random weights", metavar="FILE|none",
         help="search from the trained weights of this ticket"),
    Flag("ticket", TRAIN, "machine", Path, otherwise="none", metavar="RUN|FILE",
         help="do not search, but train the tickets of this run, or this one; its settings are the defaults"),
    Flag("rounds", TRAIN, "changed", int, otherwise="all", count="+", metavar="R", with_ticket=True,
         help="with --ticket, the rounds to train, besides round 0, which always is"),
    Flag("ticket_weights", TRAIN, "changed", ("rewind", "trained"), default="rewind", with_ticket=True,
         help="with --ticket, the weights to start from: those it rewinds to, or its trained ones"),
    Flag("control", TRAIN, "changed", (*controls.CONTROLS, *rivals.RIVALS), otherwise="none", with_ticket=True,
         metavar="NAME", rule=", ".join((*controls.CONTROLS, *rivals.RIVALS)),
         help="with --ticket, train this control or rival in its place, with all else the same"),
    Flag("dense", TRAIN, "machine", Path, otherwise="--ticket's, if its settings are the same", metavar="RUN",
         with_ticket=True, help="with --ticket, take round 0 from this run"),
    Flag("plan", TRAIN, "no", bool, help="train nothing: print what a search costs at paper size"),

    Flag("data", DATA, "machine", str, otherwise="demo", metavar="demo|DIR",
         help="folder with train.jsonl, valid.jsonl and test.jsonl, or with the corpus that --corpus names"),
    Flag("corpus", DATA, "always", ("manifests", *corpora.CORPORA), default="manifests",
         help="what is in --data: those three manifests, or a corpus as it is unpacked"),
    Flag("train_sets", DATA, "always", str, otherwise="all its train sets", count="+", metavar="SET",
         help="sets of --corpus to train on, e.g. train-960"),
    Flag("valid_sets", DATA, "always", str, otherwise="its dev set", count="+", metavar="SET",
         help="sets of --corpus to choose epochs on, e.g. dev-clean"),
    Flag("test_sets", DATA, "always", str, otherwise="its test sets", count="+", metavar="SET",
         help="sets of --corpus to test on, each by itself, e.g. test-clean"),
    Flag("download", DATA, "no", bool, help="fetch what of LibriSpeech or TED-LIUM is not in --data"),
    Flag("skip_broken", DATA, "changed", bool, otherwise="no",
         help="leave broken recordings out of train and valid, counted aloud; one of a test set stops the run"),
    Flag("tokens", DATA, "always", str, otherwise="chars; in the paper's recipe of conformer bpe:256", absent="chars",
         metavar="chars|bpe:N",
         help="what texts are spelled with: characters, or N pieces of words that sentencepiece finds"),

    Flag("sparsity", PRUNE, "always", float, default=0.9, rule="at least 0, below 1", metavar="SHARE", masks=True,
         help="share of the prunable weights that the last round has removed"),
    Flag("prune_rate", PRUNE, "always", float, default=0.2, rule="above 0, below 1", metavar="SHARE", masks=True,
         help="share of the surviving weights that each round removes"),
    Flag("rewind_step", PRUNE, "always", int, default=0, least=0, metavar="K", masks=True,
         help="optimizer step whose weights every round starts from; 0 is the initial weights"),
    Flag("block", PRUNE, "changed", rows_by_columns, default=(1, 1), rule="both at least 1", between="x",
         metavar="RxC", masks=True, help="prune blocks of R rows and C columns, e.g. 8x1; 1x1 is single weights"),
    Flag("scope", PRUNE, "changed", lottery.SCOPES, otherwise=f"global, with --block {SCOPE_OF_BLOCKS}",
         absent="global", masks=True, help="rank weights over all layers, within each layer, or by their LAMP score"),
    Flag("min_remaining", PRUNE, "changed", float, default=0.0, rule="at least 0, below 1", metavar="SHARE",
         masks=True, help="share of its weights that every layer keeps at least"),
    Flag("keep_dense", PRUNE, "changed", str, default=(), otherwise="none", count="+", metavar="NAME", masks=True,
         help="layers or weights that are not pruned, by name or pattern, e.g. output 'encoder.*'"),

    Flag("test", TEST, "changed", bool, default=True, otherwise="yes",
         help="test each round; without, train and validate and never touch the test, as for tuning a recipe"),
    Flag("margin", TEST, "always", float, default=0.01, least=0, most=100, metavar="WER",
         help="word error rate (WER) that a matching ticket may lose"),
    Flag("marks", TEST, "changed", shares, default=MARKS, rule="between 1 and 0, falling", between=",",
         metavar="A,B,...", help="remaining weights whose nearest rounds (to a tenth) are judged, dense to sparse, up "
         "to the first that does not match: no round is chosen on the test"),
    Flag("beam", TEST, "always", int, otherwise=f"1, with --lm {decode.BEAM}", least=1, most=MOST_BEAM, metavar="N",
         part_of="lm", help="texts that decoding keeps side by side; 1 keeps the likeliest token of each frame"),
    Flag("lm", TEST, "machine", Path, otherwise="none", metavar="FILE.arpa|none",
         help="language model for decoding, n-grams of words, for networks trained with CTC"),
    Flag("lm_weight", TEST, "always", float, otherwise=f"{decode.LM_WEIGHT}", rule="-1e6 to 1e6", metavar="W",
         part_of="lm", help="with --lm, what its log-probability counts beside the network's"),
    Flag("word_score", TEST, "always", float, otherwise=f"{decode.WORD_SCORE}", rule="-1e6 to 1e6", metavar="S",
         part_of="lm", help="with --lm, what every word of a text adds to its score"),
    Flag("noise", TEST, "machine", Path, otherwise="none", metavar="DIR|none",
         help="recordings of noise: DIR/train is mixed into training, DIR/test into the test"),
    Flag("snr", TEST, "changed", snr_range, otherwise="none", rule="-100 to 100", between=":", metavar="LO:HI",
         part_of="noise", help="with --noise, signal-to-noise ratio in training, drawn between LO and HI dB"),
    Flag("test_snr", TEST, "changed", snr_list, otherwise="none", rule="-100 to 100", between=",",
         metavar="A,B,...", part_of="noise",
         help="with --noise, signal-to-noise ratios in dB, one more test each, e.g. 20,10,0"),

    Flag("device", MACHINE, "machine", ("auto", "cpu", "cuda"), default="auto",
         help="where to compute; auto is CUDA where there is one, else the CPU"),
    Flag("threads", MACHINE, "machine", int, otherwise="torch's own", least=1, most=1024, metavar="N",
         help="threads that compute on the CPU"),
    Flag("workers", MACHINE, "no", int, default=0, least=0, most=1024, metavar="N",
         help="processes that prepare features and batches"),
    Flag("cache", MACHINE, "machine", str, default="memory", metavar="memory|none|DIR", help="where features are kept"),
    Flag("out", MACHINE, "no", Path, otherwise="runs/BACKBONE-DATA-SIZE-SPARSITY-seedSEED", metavar="DIR",
         help="run folder"),
    Flag("save_every", MACHINE, "no", float, otherwise="5, more if slow to write", least=0, most=1_000_000,
         metavar="MINUTES", help="time between checkpoints"),
    Flag("tensorboard", MACHINE, "no", bool, help="write losses and error rates for TensorBoard to the run folder"),
    Flag("retrain", TRAIN, "no", str, rule="ROUND at least 0", count=2, metavar=("RUN", "ROUND"),
         help="train a round of a finished run again and compare it bit for bit with the ledger"),
)  # fmt: skip

NAMED = {flag.name: flag for flag in TABLE}
NAMES = tuple(flag.name for flag in TABLE if flag.identity in IN_CONFIG)
NOT_OF_DENSE = tuple(  # round 0 is the same without them; but --keep-dense is in all of its counts
    flag.name for flag in TABLE if (flag.masks or flag.with_ticket) and flag.name != "keep_dense"
)
DECODING = tuple(flag.name for flag in TABLE if flag.part_of == "lm")


# ---------------------------------------------------------------------------- from the table to the parser


def default_said(flag: Flag) -> str:
    """The default as the help gives it; "" for none."""
    if flag.otherwise or flag.identity != "recipe":
        return flag.otherwise or ("" if flag.default is None else flag.written(flag.default))
    demo, paper = (getattr(RECIPES["rnnt", size], flag.name) for size in ("demo", "paper"))
    if flag.between:
        demo, paper = (flag.between.join(f"{number:g}" for number in pair) for pair in (demo, paper))
    return f"{demo}" if demo == paper else f"the recipe's: {demo} for rnnt, {paper} at --size paper"


def described(flag: Flag) -> str:
    """The flag's help, with its rule and its default."""
    default = default_said(flag)
    told = "; ".join(filter(None, (flag.range, default and f"default: {default}")))
    return f"{flag.help} ({told})" if told else flag.help


def parser() -> Parser:
    p = Parser(
        prog="train.py", usage="train.py [flags]",
        description="Find winning tickets of a speech recogniser: train, prune, rewind, repeat, and test every round.",
        epilog="Words: docs/glossary.md.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
    )  # fmt: skip
    groups = {title: p.add_argument_group(title) for title in (TRAIN, DATA, PRUNE, TEST, MACHINE)}
    for flag in TABLE:
        add(groups[flag.group], flag)
    return p


def add(group, flag: Flag) -> None:
    """Put a flag of the table into a group of a parser, of train.py's or another command's."""
    options = {"help": described(flag), "dest": flag.name}
    if flag.value is bool:  # what --ticket's run may have needs a --no- as well
        options["action"] = argparse.BooleanOptionalAction if flag.taken_over else "store_true"
        options |= {"default": flag.default} if flag.taken_over else {}
    else:
        reads = {"choices": flag.value} if isinstance(flag.value, tuple) else {"type": flag.value}
        options |= {"default": flag.default, "metavar": flag.metavar, "nargs": flag.count} | reads
    group.add_argument(flag.option, **options)


# ---------------------------------------------------------------------------- from the command line to the settings


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags with their defaults and the recipe filled in. What cannot be is one line and exit code 2.

    Sets torch's threads to --threads.
    """
    p = parser()
    args = p.parse_args(argv)
    given = [word.partition("=")[0] for word in (sys.argv[1:] if argv is None else argv) if word.startswith("--")]
    for name in given if args.retrain else ():
        if name not in ("--retrain", "--cache"):
            p.error(f"--retrain takes all settings from the run, and no flag beside it but --cache: got {name}")
    for name in given if args.plan else ():
        if name not in ("--plan", "--epochs", "--prune-rate"):
            p.error(f"--plan is of paper sizes, and takes no flag beside it but --epochs and --prune-rate: got {name}")
    args.source = None
    if args.ticket:
        args = parse_with_source(p, args, argv)
    args.data = "demo" if args.data is None else args.data
    args.skip_broken = args.skip_broken or None  # --no-skip-broken is as if it were not given
    args.lm, args.noise, args.init = (None if path == NONE else path for path in (args.lm, args.noise, args.init))
    of_size = "paper" if args.plan else OF_SIZE[args.size]
    args.recipe = RECIPES[args.backbone, args.recipe_name or of_size]
    args.recipe_name = None if args.recipe_name == of_size else args.recipe_name  # the size's is the default
    chosen = {flag.name: getattr(args, flag.name) for flag in TABLE if flag.identity == "recipe"}
    args.recipe = dataclasses.replace(args.recipe, **{key: v for key, v in chosen.items() if v is not None})
    args.tokens = args.tokens or args.recipe.tokens
    check_values(p, args)
    check_pruning(p, args)
    check_ticket(p, args)
    check_packages(p, args)
    args.cache = args.cache if args.cache in ("memory", "none") else Path(args.cache)
    args.data = HERE / "demo" if args.data == "demo" else Path(args.data)
    args.out = args.out or default_out(args)
    if args.control in rivals.SEARCHES:  # the source has given its settings, and nothing else is taken from it
        args.source = args.rounds = None
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def parse_with_source(p: Parser, alone: argparse.Namespace, argv: list[str] | None) -> argparse.Namespace:
    """Parse again, with the settings of --ticket's run as defaults. alone: what the command line says without them."""
    try:
        source = controls.read_source(alone.ticket)
        p.set_defaults(**defaults_of(source, alone))
    except lottery.LotteryError as error:
        p.error(f"--ticket {error}")
    args = p.parse_args(argv, argparse.Namespace(source=source))
    if args.corpus != source.settings.get("corpus"):  # whose sets are no other's
        args.train_sets, args.valid_sets, args.test_sets = alone.train_sets, alone.valid_sets, alone.test_sets
    if args.backbone not in models.BACKBONES or args.size not in OF_SIZE:
        p.error(f"--ticket {args.ticket}: there is no backbone {args.backbone} of {args.size} size")
    if args.data is None:
        p.error(f"--ticket {args.ticket}: a ticket file does not say what it was trained on: give --data")
    return args


def defaults_of(source: controls.Source, alone: argparse.Namespace) -> dict:
    """Every setting of a source's run, as defaults of the flags; less what those that are given stand in place of.

    Raises LotteryError for a setting that its flag would not take.
    """
    there = source.settings | {key: path for key, path in source.paths.items() if path}
    seconds = alone.batch_seconds or (alone.batch_size is None and there.get("batch_seconds"))
    instead = ["batch_size" if seconds else "batch_seconds"]
    instead += [flag.name for flag in TABLE if flag.part_of and getattr(alone, flag.part_of) == NONE]
    if not alone.test:
        instead += ["test_snr", "test_sets", "lm", "lm_weight", "word_score", "beam"]
        instead += [] if there.get("snr") or alone.snr else ["noise"]  # which was of the test
    defaults = {}
    for flag in TABLE:
        value = there.get(flag.name, flag.when_absent)
        if flag.taken_over and flag.name not in instead and value is not None:
            defaults[flag.name] = flag.read_back(value, str(source.path)) if flag.name in there else value
    return defaults


def default_out(args: argparse.Namespace) -> Path:
    parts = [args.backbone, args.data.resolve().name, args.size, f"{args.sparsity:g}", f"seed{args.seed}"]
    if args.block != (1, 1):
        parts.append(f"block{args.block[0]}x{args.block[1]}")
    if args.source:
        ticket = args.ticket.resolve()
        parts.append(args.control or f"ticket-of-{ticket.name if ticket.is_dir() else ticket.stem}")
    return Path("runs") / "-".join(parts)


# ---------------------------------------------------------------------------- what cannot be


def check_range(p: Parser, flag: Flag, value) -> None:
    if flag.least is not None and value is not None and not flag.least <= value <= flag.most:
        p.error(f"{flag.option} must be {flag.range}{' and below 2^31' * (flag.most == 2**31 - 1)}, got {value}")


def check_values(p: Parser, args: argparse.Namespace) -> None:
    """What each flag may be by itself and beside others; --device auto becomes cpu or cuda."""
    for flag in TABLE:
        check_range(p, flag, getattr(args, flag.name))
    check_decoding(p, args)
    if args.anneal is not None and args.recipe.schedule != "anneal":
        p.error(f"--anneal goes with the schedule anneal, and this recipe has {args.recipe.schedule}")
    if not 0 < args.recipe.lr <= 100:
        p.error(f"--lr must be above 0 and at most 100, got {args.recipe.lr}")
    try:
        lottery.check_rates(args.sparsity, args.prune_rate)
    except lottery.LotteryError as error:
        p.error(str(error))
    if args.corpus == "manifests" and (args.download or args.train_sets or args.valid_sets or args.test_sets):
        p.error("--download and --train-sets, --valid-sets, --test-sets go with --corpus, not with manifests")
    if args.corpus != "manifests" and args.data == "demo":
        p.error(f"--corpus {args.corpus} wants --data DIR, the folder with the unpacked corpus")
    if args.batch_seconds and args.batch_size:
        p.error("--batch-size and --batch-seconds: only one of them can say how large a batch is")
    of_test = {"--test-snr": args.test_snr, "--test-sets": args.test_sets, "--lm": args.lm, "--beam": args.beam > 1}
    for option in filter(of_test.get, () if args.test else of_test):
        p.error(f"{option} is of the test, and with --no-test there is none")
    if args.noise and args.snr is None and args.test_snr is None:
        p.error("--noise needs --snr LO:HI (training), --test-snr A,B,... (test) or both")
    if not args.noise and not (args.snr is None and args.test_snr is None):
        there = f" (those of {args.ticket}: give that or --noise none)" if args.source else ""
        p.error(f"--snr and --test-snr need --noise DIR{there}")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA device here")
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    if args.amp and args.device == "cpu":
        p.error("--amp needs CUDA: on a CPU bfloat16 is no faster")
    if args.retrain:
        run, number = args.retrain
        if not re.fullmatch("[0-9]{1,9}", number):
            p.error(f"--retrain RUN ROUND: ROUND must be a whole number of at least 0, got {number!r}")
        args.retrain = Path(run), int(number)


def check_pruning(p: Parser, args: argparse.Namespace) -> None:
    """--block, --scope and --min-remaining: their rules, and the scope of blocks."""
    if args.scope is None:
        args.scope = "global" if args.block == (1, 1) else SCOPE_OF_BLOCKS
    args.pruning = lottery.Pruning(args.block, args.scope, args.min_remaining)
    try:
        args.pruning.check()
    except lottery.LotteryError as error:
        p.error(f"--{str(error).replace('_', '-', 1)}")


def check_ticket(p: Parser, args: argparse.Namespace) -> None:
    """The flags of --ticket, and those that its run fixes; --rounds become those that are trained."""
    if not args.source:
        if args.control or args.rounds or args.dense or args.ticket_weights != "rewind":
            p.error("--control, --rounds, --dense and --ticket-weights go with --ticket")
        return
    if args.init and str(args.init.resolve()) != args.source.paths.get("init"):  # which round 0 starts from
        p.error("--init and --ticket: only one of them can say what is trained from")
    for flag in TABLE:
        there = p.get_default(flag.name)
        if flag.masks and getattr(args, flag.name) != there:
            told = flag.written(there) or "not given"
            p.error(f"{flag.option} is {told} in {args.ticket}, whose masks were made so: leave it out")
    there = args.source.masks
    if not there:
        p.error(f"--ticket {args.ticket}: it has no ticket: nothing in it is pruned yet")
    last = {max(there)} if args.ticket_weights == "trained" else set(there)  # trained weights are kept of one round
    if args.control in rivals.SEARCHES and (args.rounds or args.dense):
        p.error(f"--control {args.control} searches, from round 0 to the last: no --rounds and no --dense")
    args.rounds = sorted({0, *(args.rounds or last)})
    missing = set(args.rounds) - last - {0}
    if args.rounds == [0]:
        p.error("--rounds 0: round 0 is the dense network, which is there with any other round: name one")
    if missing:
        p.error(f"--rounds {min(missing)}: {args.ticket} has {', '.join(map(str, sorted(last))) or 'none'}")
    if args.control and args.ticket_weights != "rewind":
        p.error(f"--control {args.control} and --ticket-weights trained: controls start from initial weights")
    if args.control in controls.RANDOM and args.source.whole is None:
        why = "the file has 0 there, and its seed does not draw them again: name the run folder"
        p.error(f"--control {args.control} keeps weights that the ticket does not, and {why}")


def check_decoding(p: Parser, args: argparse.Namespace) -> None:
    """--tokens, and the flags of decoding in the test."""
    if not re.fullmatch("chars|bpe:[1-9][0-9]{0,8}", args.tokens):
        p.error(f"--tokens must be chars or bpe:N, N a number of tokens, got {args.tokens!r}")
    if args.lm is not None and args.backbone == "rnnt":
        p.error("--lm goes with CTC (--backbone cnn-lstm or conformer); rnnt has --beam alone")
    check_beam(p, args, f" (those of {args.ticket}: give --lm FILE or --lm none)" if args.source else "")


def check_beam(p: Parser, args: argparse.Namespace, hint: str = "") -> None:
    """--beam, --lm and its scores, of train.py and transcribe.py: their rules and, with --lm, their defaults."""
    scores = {"lm_weight": decode.LM_WEIGHT, "word_score": decode.WORD_SCORE}
    if args.lm is None and any(getattr(args, key) is not None for key in scores):
        p.error(f"--lm-weight and --word-score need --lm{hint}")
    if args.lm is not None and not args.lm.is_file():
        p.error(f"--lm {args.lm}: no such file")
    if args.beam is None:
        args.beam = decode.BEAM if args.lm else 1
    if not 1 <= args.beam <= MOST_BEAM:
        p.error(f"--beam must be at least 1 and at most {MOST_BEAM}, got {args.beam}")
    for key, default in scores.items() if args.lm else ():
        if getattr(args, key) is None:
            setattr(args, key, default)
        if not abs(getattr(args, key)) <= 1e6:  # nor is a NaN
            p.error(f"--{key.replace('_', '-')} must be a finite number from -1e6 to 1e6, got {getattr(args, key)}")


def check_packages(p: Parser, args: argparse.Namespace) -> None:
    """What a flag asks for and only an extra installs: missed now, before anything is read."""
    if args.backbone != "rnnt":
        check_beam_package(p, args)
    for wanted, flag, module, install in (
        (args.tensorboard, "--tensorboard", "tensorboard", "tensorboard, or 'audio-lottery[tensorboard]'"),
        (args.tokens != "chars", f"--tokens {args.tokens}", "sentencepiece", "sentencepiece"),
        (not args.plan and not args.retrain, "report.png", "matplotlib", "matplotlib"),
    ):  # fmt: skip
        if wanted:
            need(p, flag, module, install)


def check_beam_package(p: Parser, args: argparse.Namespace) -> None:
    """A beam search for CTC, with or without --lm, needs the extra [lm]."""
    if args.lm or args.beam > 1:
        flag = "--lm" if args.lm else f"--beam {args.beam}"
        need(p, flag, "flashlight.lib.text", "flashlight-text==0.0.7, or 'audio-lottery[lm]'")


def need(p: Parser, flag: str, module: str, install: str) -> None:
    """End in one line unless the module that a flag asks for can be imported."""
    if not installed(module):
        p.error(f"{flag}: the package is not there: pip install {install}")


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even what it is in
        return False


# ---------------------------------------------------------------------------- to config.json and back


def configuration(args: argparse.Namespace) -> dict:
    """Everything that decides the result, as JSON: config.json."""
    config = {flag.name: getattr(args, flag.name) for flag in TABLE if flag.identity == "always"}
    config["lm_sha256"] = args.lm and hashlib.sha256(args.lm.read_bytes()).hexdigest()
    config |= args.recipe.told() | {"processes": processes.count()}
    for flag in TABLE:
        value = getattr(args, flag.name)
        if flag.identity == "changed" and value != flag.when_absent:
            config[flag.name] = value
    # Not compared when a run is met again (data_sha256 is): but results are equal bit for bit only on one machine.
    machine = {flag.name: getattr(args, flag.name) for flag in TABLE if flag.identity == "machine"}
    machine |= {key: str(value.resolve()) for key, value in machine.items() if isinstance(value, Path)}
    for key in [key for key, value in machine.items() if isinstance(value, str) and not utf8(value)]:
        why = "the name is no UTF-8, which a run's settings are kept in: rename it, or the folder above it"
        raise lottery.LotteryError(f"{NAMED[key].option} {machine[key]}: {why}")
    machine |= {"threads": torch.get_num_threads()} | ({"data": "demo"} if args.data == HERE / "demo" else {})
    return json.loads(json.dumps(config | {"machine": machine}))


def utf8(name: str) -> bool:
    """Can the name be written in UTF-8? Not one with a byte of another encoding."""
    return not any("\udc80" <= character <= "\udcff" for character in name)


def shortest(config: dict) -> list[str]:
    """command_line less the flags whose defaults say the same, for people to read; all, where --ticket has defaults."""
    if of_ticket(config):
        return command_line(config)
    first = {key: config[key] for key in ("backbone", "size", "recipe_name") if key in config}
    usual = configuration(parse([f"{NAMED[key].option}={value}" for key, value in first.items()]))
    usual |= {key: None for key in first if first[key] != NAMED[key].default}
    hang = {"backbone": "backbone", "scope": "block", "beam": "lm_sha256"}  # other defaults beside these
    same = [key for key in NAMES if config.get(key) == usual.get(key) and not config.get(hang.get(key))]
    return command_line(config, leave_out=same)


def command_line(config: dict, leave_out: Collection[str] = ()) -> list[str]:
    """The flags that give this configuration again, but for files and machine, and those named to leave out.

    Raises LotteryError for a setting that its flag would not take.
    """
    argv = []
    for flag in TABLE:
        if flag.name in leave_out:
            continue
        value = config.get(flag.name, flag.when_absent)
        if flag.name not in NAMES or value in (None, ()) or (flag.name == "batch_size" and config.get("batch_seconds")):
            continue
        value = flag.read_back(value, "config.json")
        if isinstance(value, bool):
            argv.append(flag.option if value else flag.option.replace("--", "--no-", 1))
        elif flag.count:
            argv += [flag.option, *map(str, value)]
        else:
            argv.append(f"{flag.option}={flag.written(value)}")
    if of_ticket(config):  # what is not said would be the source's
        argv += [] if "recipe_name" in config else [f"--recipe={OF_SIZE[config['size']]}"]
        argv += [] if config.get("skip_broken") else ["--no-skip-broken"]
        argv += ["--anneal=1.1"] if config.get("schedule") == "anneal" and "anneal" not in config else []
    return argv


def of_ticket(config: dict) -> bool:
    """Are the defaults of its flags those of --ticket's run?"""
    return "control" in config or "rounds" in config
