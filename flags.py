"""The command line of train.py: recipes, flags, and the configuration that they make."""

import argparse
import dataclasses
import hashlib
import json
import math
import re
from pathlib import Path
from typing import NoReturn

import torch

import controls
import corpora
import decode
import lottery
import models
import parallel
from data import SpecAugment

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------- recipes


@dataclasses.dataclass(frozen=True)
class Recipe:
    epochs: int
    batch_size: int
    lr: float
    # "one-cycle": the learning rate rises to lr and falls to 0 over all steps, beta1 falls from 0.95 to 0.85 and rises
    # again (Smith & Topin 2019, torch's defaults); "anneal": lr / 1.1 after each epoch
    schedule: str
    clip: float  # of the gradient's norm
    seconds: tuple[float, float]  # shortest and longest utterance that is trained on; all are evaluated
    augment: SpecAugment
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    batch_seconds: float | None = None  # seconds of audio a batch, padding counted, instead of batch_size
    accumulate: int = 1  # batches a step
    amp: bool = False  # bfloat16 autocast in the forward pass


# The paper's, for every backbone at --size paper (its time warping left out).
PAPER = Recipe(16, 32, 3e-4, "anneal", 400.0, (1.0, 15.0), SpecAugment(1, 27, 1, 70))
# Ours, for a quarter of an hour of speech and two cores.
ONE_CYCLE = (0.95, 0.999)
LIGHT, STRONG = SpecAugment(1, 10, 1, 10, 0.1), SpecAugment(2, 15, 2, 20, 0.2)
RECIPES = {
    ("cnn-lstm", "demo"): Recipe(20, 8, 3e-3, "one-cycle", 400.0, (0.0, 10.0), STRONG, betas=ONE_CYCLE),
    ("rnnt", "demo"): Recipe(18, 8, 4e-3, "one-cycle", 5.0, (0.0, 10.0), LIGHT, betas=ONE_CYCLE),
    ("conformer", "demo"): Recipe(16, 8, 2e-3, "one-cycle", 5.0, (0.0, 10.0), LIGHT, betas=ONE_CYCLE),
    **{(backbone, "paper"): PAPER for backbone in models.BACKBONES},
}
# the demo's, for networks of nearly four and eight to nine times its weights
RECIPES |= {(backbone, size): RECIPES[backbone, "demo"] for backbone in models.BACKBONES for size in ("wide", "wider")}


# ---------------------------------------------------------------------------- command line


def low_high(text: str) -> tuple[float, float]:
    """LO:HI, two numbers with 0 <= LO < HI."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be LO:HI, two numbers of seconds, got {text!r}") from None
    if not 0 <= low < high:
        raise argparse.ArgumentTypeError(f"must be LO:HI with 0 <= LO < HI, got {text!r}")
    return low, high


def rows_by_columns(text: str) -> tuple[int, int]:
    """RxC, two whole numbers of at least 1."""
    if not re.fullmatch("[1-9][0-9]{0,8}x[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"must be RxC, rows and columns of a block, both at least 1, got {text!r}")
    rows, columns = map(int, text.split("x"))
    return rows, columns


def decibels(text: str, separator: str) -> tuple[float, ...]:
    """Numbers between the separators, each in [-100, 100]."""
    values = tuple(float(value) + 0.0 for value in text.split(separator))  # -0 is 0
    if not all(-100 <= value <= 100 for value in values):
        raise ValueError
    return values


def snr_range(text: str) -> tuple[float, float]:
    """LO:HI, in dB."""
    try:
        low, high = decibels(text, ":")
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be LO:HI, two numbers of dB in [-100, 100], got {text!r}") from None
    if low > high:
        raise argparse.ArgumentTypeError(f"must be LO:HI with LO <= HI, got {text!r}")
    return low, high


def snr_list(text: str) -> tuple[float, ...]:
    """A,B,..., in dB."""
    try:
        values = decibels(text, ",")
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be A,B,..., numbers of dB in [-100, 100], got {text!r}") from None
    if len({f"{value:g}" for value in values}) < len(values):
        raise argparse.ArgumentTypeError(f"must not name an SNR twice, got {text!r}")
    return values


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2 (argparse prints its usage above it)."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parser() -> Parser:
    recipe = {size: RECIPES["rnnt", size] for size in ("demo", "paper")}

    def default(field: str) -> str:
        return (
            f"the recipe's, e.g. {getattr(recipe['demo'], field)} (demo) or {getattr(recipe['paper'], field)} (paper)"
        )

    p = Parser(
        prog="train.py", usage="train.py [flags]", allow_abbrev=False,
        description="Find winning tickets of a speech recogniser.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )  # fmt: skip
    add = p.add_argument
    add("--backbone", choices=list(models.BACKBONES), default="rnnt", help="network (default: rnnt)")
    add("--sparsity", type=float, default=0.9, help="fraction of prunable weights to remove (default: 0.9)")
    add("--data", metavar="demo|DIR", help="folder with train, valid, test.jsonl (default: demo)")
    kinds = ["manifests", *corpora.CORPORA]
    add("--corpus", choices=kinds, default="manifests", help="what --data is (default: manifests)")
    for part, default_set in (("train", "train-960"), ("valid", "dev-clean"), ("test", "test-clean test-other")):
        add(f"--{part}-sets", nargs="+", metavar="SET", help=f"parts of the corpus, e.g. {default_set}")
    add("--download", action="store_true", help="fetch what of LibriSpeech or TED-LIUM is not there")
    sizes = "of network and recipe; wide, wider: the demo's recipe, twice and three times its widths (default: demo)"
    add("--size", choices=["demo", "wide", "wider", "paper"], default="demo", help=sizes)
    add("--prune-rate", type=float, default=0.2, help="share of survivors removed a round (default: 0.2)")
    add("--epochs", type=int, help=f"epochs a round (default: {default('epochs')})")
    add("--batch-size", type=int, help=f"utterances (default: {default('batch_size')})")
    add("--batch-seconds", type=float, metavar="S", help="seconds a batch instead, padding counted")
    add("--accumulate", type=int, default=1, metavar="N", help="batches a step (default: 1)")
    add("--lr", type=float, help=f"learning rate (default: {default('lr')})")
    add("--seconds", type=low_high, metavar="LO:HI", help="train on utterances as long (default: 0:10, paper 1:15)")
    add("--tokens", default="chars", metavar="chars|bpe:N", help="or N pieces, sentencepiece's BPE (default: chars)")
    add("--beam", type=int, help=f"width of the search in the test (default: 1, greedy; with --lm {decode.BEAM})")
    add("--lm", type=Path, metavar="FILE.arpa", help="n-gram model of words, for the test of a CTC network")
    add("--lm-weight", type=float, help=f"of its ln p (default: {decode.LM_WEIGHT}, the paper's for LibriSpeech)")
    add("--word-score", type=float, help=f"added a word, with --lm (default: {decode.WORD_SCORE}, the paper's)")
    add("--block", type=rows_by_columns, default=(1, 1), metavar="RxC", help="prune blocks, e.g. 8x1 (default: 1x1)")
    add("--scope", choices=lottery.SCOPES, help="how weights are ranked (default: global, with --block lamp)")
    add("--min-remaining", type=float, default=0.0, metavar="SHARE", help="that each layer keeps (default: 0)")
    add("--ticket", type=Path, metavar="RUN|FILE", help="train another run's tickets instead of searching")
    add("--ticket-weights", choices=["rewind", "trained"], default="rewind", help="of them (default: rewind)")
    add("--control", choices=controls.CONTROLS, help="train this instead of them, with all else the same")
    add("--rounds", type=int, nargs="+", metavar="R", help="of --ticket's run (default: all)")
    add("--dense", type=Path, metavar="RUN", help="take round 0 from it (default: --ticket's, if it is the same)")
    add("--init", type=Path, metavar="FILE", help="search from the trained weights of this ticket")
    add("--rewind-step", type=int, default=0, help="step whose weights are restored (default: 0, initialisation)")
    add("--seed", type=int, default=0, help="of initialisation, order, dropout, masking (default: 0)")
    add("--margin", type=float, default=0.01, help="WER that a matching ticket may lose (default: 0.01)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    add("--amp", action=argparse.BooleanOptionalAction, default=False, help="bfloat16 autocast, on CUDA")
    add("--cache", default="memory", metavar="memory|none|DIR", help="where features are kept (default: memory)")
    add("--workers", type=int, default=0, metavar="N", help="processes that prepare features and batches (default: 0)")
    add("--tensorboard", action="store_true", help="write scalars for TensorBoard to the run folder")
    add("--save-every", type=float, metavar="MINUTES", help="between checkpoints (default: 5; more if slow to write)")
    add("--plan", action="store_true", help="print what a search costs at paper size, and train nothing")
    add("--noise", type=Path, metavar="DIR", help="recordings to add: DIR/train in training, DIR/test in the test")
    add("--snr", type=snr_range, metavar="LO:HI", help="speech over noise in training, in dB (valid stays clean)")
    add("--test-snr", type=snr_list, metavar="A,B,...", help="in dB, one more test each, e.g. 20,10,5,0")
    add("--out", type=Path, help="run folder (default: runs/BACKBONE-DATA-SIZE-SPARSITY-seedSEED)")
    add("--retrain", nargs=2, metavar=("RUN", "ROUND"), help=argparse.SUPPRESS)  # for lottery.py verify
    p._negative_number_matcher = re.compile(r"-\.?\d")  # argparse's: --snr -5:10 is a value and not a flag
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags with their defaults and the recipe filled in. What cannot be is one line and exit code 2."""
    p = parser()
    args = p.parse_args(argv)
    args.source = None
    if args.ticket:
        given = args
        try:
            args.source = controls.read_source(args.ticket)
        except lottery.LotteryError as error:
            p.error(f"--ticket {error}")
        p.set_defaults(**defaults_of(args.source, given))
        args = p.parse_args(argv, argparse.Namespace(source=args.source))
        if args.corpus != args.source.settings.get("corpus"):  # whose sets are no other's
            args.train_sets, args.valid_sets, args.test_sets = given.train_sets, given.valid_sets, given.test_sets
        if (args.backbone, args.size) not in RECIPES:
            p.error(f"--ticket {args.ticket}: there is no backbone {args.backbone} of {args.size} size")
    if args.data is None:
        if args.source:
            p.error(f"--ticket {args.ticket}: a ticket file does not say what it was trained on: give --data")
        args.data = "demo"
    args.lm, args.noise, args.init = (None if path == NONE else path for path in (args.lm, args.noise, args.init))
    args.recipe = RECIPES[args.backbone, "paper" if args.plan else args.size]
    chosen = {key: getattr(args, key) for key in RECIPE if getattr(args, key) is not None}
    args.recipe = dataclasses.replace(args.recipe, **chosen)
    check_values(p, args)
    check_given(p, args)
    args.cache = args.cache if args.cache in ("memory", "none") else Path(args.cache)
    args.data = HERE / "demo" if args.data == "demo" else Path(args.data)
    parts = [args.backbone, args.data.resolve().name, args.size, f"{args.sparsity:g}", f"seed{args.seed}"]
    if args.block != (1, 1):
        parts.append(f"block{args.block[0]}x{args.block[1]}")
    if args.source:
        ticket = args.ticket.resolve()
        parts.append(args.control or f"ticket-of-{ticket.name if ticket.is_dir() else ticket.stem}")
    args.out = args.out or Path("runs") / "-".join(parts)
    return args


def check_values(p: Parser, args: argparse.Namespace) -> None:
    """What each flag may be by itself and beside others; --device auto becomes cpu or cuda."""
    for flag, value, low in (
        ("--epochs", args.recipe.epochs, 1), ("--batch-size", args.recipe.batch_size, 1), ("--seed", args.seed, 0),
        ("--rewind-step", args.rewind_step, 0), ("--margin", args.margin, 0), ("--accumulate", args.accumulate, 1),
        ("--workers", args.workers, 0), ("--batch-seconds", 1 if args.batch_seconds is None else args.batch_seconds, 1),
    ):  # fmt: skip
        if not low <= value < 2**31:
            p.error(f"{flag} must be at least {low} and below 2^31, got {value}")
    check_search(p, args)
    if args.save_every is not None and not 0 <= args.save_every < math.inf:
        p.error(f"--save-every must be at least 0, got {args.save_every}")
    if not 0 < args.recipe.lr < math.inf:
        p.error(f"--lr must be above 0, got {args.recipe.lr}")
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


def check_given(p: Parser, args: argparse.Namespace) -> None:
    """--block, --scope, --min-remaining, and the flags of --ticket: their rules and defaults."""
    if args.scope is None:
        args.scope = "global" if args.block == (1, 1) else SCOPE_OF_BLOCKS
    args.pruning = lottery.Pruning(args.block, args.scope, args.min_remaining)
    try:
        args.pruning.check()
    except lottery.LotteryError as error:
        p.error(f"--{str(error).replace('_', '-', 1)}")
    if not args.source:
        if args.control or args.rounds or args.dense or args.ticket_weights != "rewind":
            p.error("--control, --rounds, --dense and --ticket-weights go with --ticket")
        return
    if args.init and str(args.init.resolve()) != args.source.paths.get("init"):  # which round 0 starts from
        p.error("--init and --ticket: only one of them can say what is trained from")
    for key in PRUNED_BY:
        if getattr(args, key) != p.get_default(key):
            there = p.get_default(key)
            there = BETWEEN[key].join(map(str, there)) if key in BETWEEN else there
            p.error(f"--{key.replace('_', '-')} is {there} in {args.ticket}, whose masks were made so: leave it out")
    there = args.source.masks
    if not there:
        p.error(f"--ticket {args.ticket}: it has no ticket: nothing in it is pruned yet")
    last = {max(there)} if args.ticket_weights == "trained" else set(there)  # trained weights are kept of one round
    args.rounds = sorted({0, *(args.rounds or last)})
    missing = set(args.rounds) - last - {0}
    if args.rounds == [0]:
        p.error("--rounds 0: round 0 is the dense network, which is there with any other round: name one")
    if missing:
        p.error(f"--rounds {min(missing)}: {args.ticket} has {', '.join(map(str, sorted(last))) or 'none'}")
    if args.control and args.ticket_weights != "rewind":
        p.error(f"--control {args.control} and --ticket-weights trained: controls start from initial weights")
    if args.control in controls.RANDOM and not args.ticket.is_dir():
        why = "a ticket file has 0 where it is pruned: name the run folder"
        p.error(f"--control {args.control} keeps weights that the ticket does not, and {why}")


def check_search(p: Parser, args: argparse.Namespace) -> None:
    """--tokens, and the flags of the search in the test."""
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
    if not 1 <= args.beam < 2**31:
        p.error(f"--beam must be at least 1 and below 2^31, got {args.beam}")
    for key, default in scores.items() if args.lm else ():
        if getattr(args, key) is None:
            setattr(args, key, default)
        if not math.isfinite(getattr(args, key)):
            p.error(f"--{key.replace('_', '-')} must be a finite number, got {getattr(args, key)}")


def defaults_of(source: controls.Source, given: argparse.Namespace) -> dict:
    """Every setting of a source's run, as defaults of the flags; less what those that are given stand in place of."""
    there = {"scope": "global"} | source.settings
    settings = {key: there[key] for key in FLAGS if key not in GIVEN and there.get(key) is not None}
    seconds = given.batch_seconds or (given.batch_size is None and "batch_seconds" in settings)
    instead = ["batch_size" if seconds else "batch_seconds"]
    instead += SEARCH if given.lm == NONE else []
    instead += NOISE if given.noise == NONE else []
    settings = {key: value for key, value in settings.items() if key not in instead}
    settings |= {key: tuple(settings[key]) for key in BETWEEN if key in settings}
    return settings | {key: path for key, path in source.paths.items() if path}


SCOPE_OF_BLOCKS = "lamp"  # measured: RESULTS.md, "Blocks"
NONE = Path("none")  # as --lm, --noise and --init: without, where --ticket's run has it
CHOICES = ("backbone", "sparsity", "size", "prune_rate", "rewind_step", "seed", "margin", "corpus")
CHOICES += ("train_sets", "valid_sets", "test_sets", "tokens")
SEARCH = ("beam", "lm_weight", "word_score")
# Where they are not named in a configuration, they have these values (the flags' defaults may be others).
PRUNING = {"block": (1, 1), "scope": "global", "min_remaining": 0.0}
NOISE = {"snr": None, "test_snr": None}
PRUNED_BY = ("sparsity", "prune_rate", "rewind_step", *PRUNING)
GIVEN = {"control": None, "ticket_weights": "rewind", "rounds": None}
BETWEEN = {"seconds": ":", "snr": ":", "test_snr": ",", "block": "x"}  # the numbers of a flag's value
RECIPE = ("epochs", "batch_size", "batch_seconds", "accumulate", "lr", "seconds", "amp")
FLAGS = (*CHOICES, *SEARCH, *RECIPE, *PRUNING, *NOISE, *GIVEN)


def configuration(args: argparse.Namespace) -> dict:
    """Everything that decides the result, as JSON: config.json."""
    config = {name: getattr(args, name) for name in (*CHOICES, *SEARCH)}
    config["lm_sha256"] = args.lm and hashlib.sha256(args.lm.read_bytes()).hexdigest()
    config |= dataclasses.asdict(args.recipe) | {"processes": parallel.count()}
    config |= {k: getattr(args, k) for k, default in (PRUNING | NOISE | GIVEN).items() if getattr(args, k) != default}
    # Not compared when a run is met again (data_sha256 is): but results are equal bit for bit only on one machine.
    config["machine"] = {"device": args.device, "threads": torch.get_num_threads()}
    config["machine"]["data"] = "demo" if args.data == HERE / "demo" else str(args.data.resolve())
    config["machine"]["cache"] = args.cache if isinstance(args.cache, str) else str(args.cache.resolve())
    paths = {key: getattr(args, key) for key in ("lm", "ticket", "dense", "init", "noise")}
    config["machine"] |= {key: path and str(path.resolve()) for key, path in paths.items()}
    return json.loads(json.dumps(config))


def command_line(config: dict) -> list[str]:
    """The flags that give this configuration again."""
    argv = []
    for name in FLAGS:
        flag, value = f"--{name.replace('_', '-')}", config.get(name, PRUNING.get(name))
        if name == "batch_size" and config["batch_seconds"]:
            continue
        if name in BETWEEN and value:
            value = BETWEEN[name].join(map(str, value))
        if isinstance(value, bool):
            argv.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            argv += [flag, *map(str, value)]
        elif value is not None:
            argv.append(f"{flag}={value}")
    return argv
