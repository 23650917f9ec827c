"""Find winning tickets: train dense, prune, rewind, repeat, and test every round against dense.

    python train.py --backbone rnnt --sparsity 0.9

See README.md for what stands in the run folder, lottery.py for the algorithm.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import jiwer
import numpy as np
import torch
from tqdm import tqdm

import data
import decode
import lottery
import models
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


# ---------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2 (argparse prints its usage above it)."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    recipe = {size: RECIPES["rnnt", size] for size in ("demo", "paper")}

    def default(field: str) -> str:
        return (
            f"the recipe's, e.g. {getattr(recipe['demo'], field)} (demo) or {getattr(recipe['paper'], field)} (paper)"
        )

    p = Parser(
        prog="train.py", description="Find winning tickets of a speech recogniser.", allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )  # fmt: skip
    add = p.add_argument
    add("--backbone", choices=list(models.BACKBONES), default="rnnt", help="network (default: rnnt)")
    add("--sparsity", type=float, default=0.9, help="fraction of prunable weights to remove (default: 0.9)")
    add("--data", default="demo", metavar="demo|DIR", help="folder with train, valid, test.jsonl (default: demo)")
    add("--size", choices=["demo", "paper"], default="demo", help="size of network and recipe (default: demo)")
    add("--prune-rate", type=float, default=0.2, help="share of survivors removed a round (default: 0.2)")
    add("--epochs", type=int, help=f"epochs a round (default: {default('epochs')})")
    add("--batch-size", type=int, help=f"utterances (default: {default('batch_size')})")
    add("--lr", type=float, help=f"learning rate (default: {default('lr')})")
    add("--tokens", default="chars", metavar="chars|bpe:N", help="or N pieces, sentencepiece's BPE (default: chars)")
    add("--beam", type=int, help=f"width of the search in the test (default: 1, greedy; with --lm {decode.BEAM})")
    add("--lm", type=Path, metavar="FILE.arpa", help="n-gram model of words, for the test of a CTC network")
    add("--lm-weight", type=float, help=f"of its ln p (default: {decode.LM_WEIGHT}, the paper's for LibriSpeech)")
    add("--word-score", type=float, help=f"added a word, with --lm (default: {decode.WORD_SCORE}, the paper's)")
    add("--rewind-step", type=int, default=0, help="step whose weights are restored (default: 0, initialisation)")
    add("--seed", type=int, default=0, help="of initialisation, order, dropout, masking (default: 0)")
    add("--margin", type=float, default=0.01, help="WER that a matching ticket may lose (default: 0.01)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    add("--save-every", type=float, default=5, metavar="MINUTES", help="minutes between checkpoints (default: 5)")
    add("--out", type=Path, help="run folder (default: runs/BACKBONE-DATA-SIZE-SPARSITY-seedSEED)")
    add("--retrain", nargs=2, metavar=("RUN", "ROUND"), help=argparse.SUPPRESS)  # for lottery.py verify
    args = p.parse_args(argv)
    args.recipe = RECIPES[args.backbone, args.size]
    chosen = {k: getattr(args, k) for k in ("epochs", "batch_size", "lr") if getattr(args, k) is not None}
    args.recipe = dataclasses.replace(args.recipe, **chosen)
    for flag, value, low in (
        ("--epochs", args.recipe.epochs, 1), ("--batch-size", args.recipe.batch_size, 1), ("--seed", args.seed, 0),
        ("--rewind-step", args.rewind_step, 0), ("--margin", args.margin, 0),
    ):  # fmt: skip
        if not low <= value < 2**31:
            p.error(f"{flag} must be at least {low} and below 2^31, got {value}")
    check_search(p, args)
    if not 0 <= args.save_every < math.inf:
        p.error(f"--save-every must be at least 0, got {args.save_every}")
    if not 0 < args.recipe.lr < math.inf:
        p.error(f"--lr must be above 0, got {args.recipe.lr}")
    try:
        lottery.check_rates(args.sparsity, args.prune_rate)
    except lottery.LotteryError as error:
        p.error(str(error))
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA device here")
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    args.data = HERE / "demo" if args.data == "demo" else Path(args.data)
    name = f"{args.backbone}-{args.data.resolve().name}-{args.size}-{args.sparsity:g}-seed{args.seed}"
    args.out = args.out or Path("runs") / name
    return args


def check_search(p: Parser, args: argparse.Namespace) -> None:
    """--tokens, --beam and the flags of --lm: their rules and, with --lm, their defaults."""
    if not re.fullmatch("chars|bpe:[1-9][0-9]{0,8}", args.tokens):
        p.error(f"--tokens must be chars or bpe:N, N a number of tokens, got {args.tokens!r}")
    scores = {"lm_weight": decode.LM_WEIGHT, "word_score": decode.WORD_SCORE}
    if args.lm is None and any(getattr(args, key) is not None for key in scores):
        p.error("--lm-weight and --word-score need --lm")
    if args.lm is not None and args.backbone == "rnnt":
        p.error("--lm goes with CTC (--backbone cnn-lstm or conformer); rnnt has --beam alone")
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


CHOICES = ("backbone", "sparsity", "size", "prune_rate", "rewind_step", "seed", "margin", "tokens")
SEARCH = ("beam", "lm_weight", "word_score")
FLAGS = (*CHOICES, *SEARCH, "epochs", "batch_size", "lr")


def configuration(args: argparse.Namespace) -> dict:
    """Everything that decides the result, as JSON: config.json."""
    config = {k: getattr(args, k) for k in (*CHOICES, *SEARCH)}
    config["lm_sha256"] = args.lm and hashlib.sha256(args.lm.read_bytes()).hexdigest()
    config |= dataclasses.asdict(args.recipe)
    # Not compared when a run is met again (data_sha256 is): but results are equal bit for bit only on one machine.
    config["machine"] = {"device": args.device, "threads": torch.get_num_threads()}
    config["machine"]["data"] = "demo" if args.data == HERE / "demo" else str(args.data.resolve())
    config["machine"]["lm"] = args.lm and str(args.lm.resolve())
    return json.loads(json.dumps(config))


# ---------------------------------------------------------------------------- recognise and score


def recognise(
    model, examples: list[data.Example], tokens: list[str], batch_size: int, device: str, transcribe=None
) -> list[str]:
    """Transcripts, in the order of the examples: greedy, or as decode.transcriber(model, ...) does."""
    texts = [""] * len(examples)
    transcribe = transcribe or model.transcribe
    model.eval()
    with torch.inference_mode():
        for indices, batch in data.eval_batches(examples, batch_size):
            batch = batch.to(device)
            for i, ids in zip(indices, transcribe(batch.features, batch.input_lengths)):
                texts[i] = data.decode(ids, tokens)
    return texts


def score(references: list[str], hypotheses: list[str]) -> dict:
    """Word error counts an utterance, and WER and CER over all (jiwer)."""
    outputs = [jiwer.process_words(r, h) for r, h in zip(references, hypotheses)]
    errors = [o.substitutions + o.deletions + o.insertions for o in outputs]
    words = [o.hits + o.substitutions + o.deletions for o in outputs]
    cer = jiwer.cer(references, hypotheses)
    return {"errors": errors, "words": words, "wer": sum(errors) / sum(words), "cer": cer}


# ---------------------------------------------------------------------------- one round of training


class Corpus:
    """The three splits as examples. Says aloud what training leaves out and what the tokens cannot spell."""

    def __init__(self, utterances: dict[str, list[data.Utterance]], tokens: list[str], model, seconds=(0.0, math.inf)):
        self.tokens = tokens
        self.train, self.valid, self.test = (
            data.load_examples(utterances[split], tokens, model.features, f"features of {split}")
            for split in ("train", "valid", "test")
        )
        print(f"data: {len(self.train)} train, {len(self.valid)} valid, {len(self.test)} test utterances")
        low, high = seconds
        long_enough = [e for e in self.train if low <= e.seconds <= high]
        frames = model.output_lengths(torch.tensor([len(e.features) for e in long_enough])).tolist()
        fits = [e for n, e in zip(frames, long_enough) if n >= max(2, data.frames_needed(e.targets))]  # 2: batch norm
        for gone, why in (
            (len(self.train) - len(long_enough), f"not between {low:g} and {high:g} s long"),
            (len(long_enough) - len(fits), "fewer encoder frames than CTC needs for the text"),
        ):
            if gone:
                print(f"data: {gone} train utterances left out of training: {why}")
        if not fits:
            raise data.DataError("no train utterance is left to train on (see the counts above)")
        self.train = fits
        for split in ("valid", "test"):
            unseen = data.unseen_characters(utterances[split], tokens)
            if unseen:
                counts = ", ".join(f"{c!r} x {n}" for c, n in sorted(unseen.items()))
                print(f"data: {split} has characters that train has not, counted as errors: {counts}")


@dataclasses.dataclass
class Progress:
    """Where a round stands."""

    epoch: int = 0
    batch: int = 0  # of the epoch, done
    loss: float = 0.0  # summed over the epoch's utterances so far
    best_wer: float = math.inf
    best_epoch: int = 0
    best: lottery.State = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    resumed: int = 0  # how often this round was taken up again


def train_round(
    ticket: lottery.Ticket, corpus: Corpus, recipe: Recipe, seed: int, device: str,
    keeper: "Keeper | None" = None, kept: "Kept | None" = None,
) -> Progress:  # fmt: skip
    """Train ticket.model to its last epoch, with a fresh optimizer, schedule and data order.

    Returns the progress, with the state of the epoch of the best valid WER; of equals the later.
    keeper saves checkpoints on the way; kept is a checkpoint in this round to go on from.
    """
    model, at = ticket.model, Progress()
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, recipe.betas, weight_decay=recipe.weight_decay)
    steps = steps_an_epoch(corpus, recipe)
    if recipe.schedule == "one-cycle":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps * recipe.epochs)
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.1 ** -(step // steps))
    if kept:
        at = kept.restore(model, optimizer, schedule, device)
    started = time.monotonic() - at.seconds
    label = f"round {ticket.round}"
    bar = tqdm(total=steps * recipe.epochs, desc=label, unit="step", disable=None, leave=False)
    bar.update(at.epoch * steps + at.batch)
    said = time.monotonic()
    for epoch in range(at.epoch, recipe.epochs):
        if at.batch == 0:  # else the generator stands where the checkpoint left it
            torch.manual_seed(int(np.random.default_rng([seed, epoch, 1]).integers(2**63)))  # dropout
        model.train()
        for index, batch in enumerate(data.train_batches(corpus.train, recipe.batch_size, seed, epoch, recipe.augment)):
            if index < at.batch:
                continue
            batch = batch.to(device)
            optimizer.zero_grad()
            loss = model.loss(batch.features, batch.input_lengths, batch.targets, batch.target_lengths)
            loss.backward()
            ticket.hold()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            ticket.stepped()
            at.loss += loss.item() * len(batch.texts)
            at.batch, at.seconds = index + 1, time.monotonic() - started
            bar.update()
            if keeper:
                keeper.after_step(ticket, optimizer, schedule, at)
        if not math.isfinite(at.loss):
            raise lottery.LotteryError(f"{label}, epoch {epoch + 1}: the loss is {at.loss}: try a lower --lr")
        ticket.check()
        hypotheses = recognise(model, corpus.valid, corpus.tokens, recipe.batch_size, device)
        wer = score([e.text for e in corpus.valid], hypotheses)["wer"]
        if wer <= at.best_wer:
            at.best_wer, at.best_epoch, at.best = wer, epoch + 1, lottery.copy_state(model)
        line = f"epoch {epoch + 1}/{recipe.epochs}, loss {at.loss / len(corpus.train):.2f}, valid WER {wer:.3f}"
        bar.set_postfix_str(line)
        if bar.disable and time.monotonic() - said > 30:  # in a log
            said = time.monotonic()
            print(f"  {label}, {line}", flush=True)
        at.epoch, at.batch, at.loss, at.seconds = epoch + 1, 0, 0.0, time.monotonic() - started
        if keeper:
            keeper.after_step(ticket, optimizer, schedule, at)  # a signal during the evaluation
    bar.close()
    if keeper:
        keeper.save(ticket, optimizer, schedule, at)
    return at


def steps_an_epoch(corpus: Corpus, recipe: Recipe) -> int:
    return math.ceil(len(corpus.train) / recipe.batch_size)


# ---------------------------------------------------------------------------- the run folder


class Stopped(BaseException):
    """A signal came; the run is saved. No Exception: a reader's `except Exception` must not take it for damage."""

    def __init__(self, number: int):
        self.number = number


class Signals:
    """SIGINT and SIGTERM: noted while `deferred`, so that a step is finished and saved; else they end the program."""

    def __init__(self):
        self.deferred, self.number = False, 0

    def __enter__(self) -> "Signals":
        self.before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, _frame) -> None:
        if not self.deferred or self.number:  # the second one does not wait
            raise Stopped(number)
        self.number = number


class Keeper:
    """Writes checkpoint.safetensors: everything that a run goes on from, in one file that is whole at any instant."""

    def __init__(self, out: Path, run_sha256: str, minutes: float, signals: Signals, kept: "Kept | None"):
        self.out, self.run, self.seconds, self.signals = out, {"run": run_sha256}, 60 * minutes, signals
        self.rewind_saved = kept is not None and kept.has_rewind_state
        self.saved = time.monotonic()
        self.parent = ""  # the hash of the masks of the round before

    def after_step(self, ticket: lottery.Ticket, optimizer, schedule, at: Progress) -> None:
        if self.signals.number or time.monotonic() - self.saved >= self.seconds:
            self.save(ticket, optimizer, schedule, at)
        if self.signals.number:
            raise Stopped(self.signals.number)

    def save(self, ticket: lottery.Ticket, optimizer, schedule, at: Progress) -> None:
        model, tensors = ticket.model, {"rng": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            tensors["rng_cuda"] = torch.cuda.get_rng_state()
        tensors |= {f"model/{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in at.best.items()}
        tensors |= {f"mask/{name}": lottery.pack(mask) for name, mask in ticket.masks.items()}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value
        (group,) = optimizer.param_groups
        about = self.run | {
            "round": ticket.round,
            "steps": ticket.steps,
            "has_rewind_state": ticket.rewind_state is not None,
            "threshold": ticket.threshold,
            "start": ticket.start_sha256,
            "parent": self.parent,
            "schedule": schedule.last_epoch,
            "group": {key: value for key, value in group.items() if key != "params"},
            "progress": {f.name: getattr(at, f.name) for f in dataclasses.fields(at) if f.name != "best"},
        }
        if ticket.rewind_state is not None and not self.rewind_saved:
            lottery.write_sealed(self.out / "rewind.safetensors", "rewind state", ticket.rewind_state, self.run)
            self.rewind_saved = True
        lottery.write_sealed(self.out / "checkpoint.safetensors", "checkpoint", tensors, about)
        self.saved = time.monotonic()


class Kept:
    """A checkpoint as read back."""

    def __init__(self, out: Path, run_sha256: str):
        self.tensors, self.about = lottery.read_sealed(out / "checkpoint.safetensors", "checkpoint")
        self.has_rewind_state, self.rewind_state = self.about["has_rewind_state"], None
        belong = [("checkpoint", self.about)]
        if self.has_rewind_state:
            self.rewind_state, about = lottery.read_sealed(out / "rewind.safetensors", "rewind state")
            belong.append(("rewind state", about))
        for kind, about in belong:
            if about["run"] != run_sha256:
                raise lottery.LotteryError(f"--out {out}: the {kind} there is of another run")

    def part(self, name: str) -> dict[str, torch.Tensor]:
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(f"{name}/")}

    def resume(self, ticket: lottery.Ticket) -> str:
        """What lottery.find_ticket asks for."""
        device = next(iter(ticket.weights.values())).device
        about, packed = self.about, self.part("mask")
        ticket.round, ticket.steps, ticket.threshold = about["round"], about["steps"], about["threshold"]
        ticket.masks = {n: lottery.unpack(packed[n], list(w.shape)).to(device) for n, w in ticket.weights.items()}
        ticket.start_sha256 = about["start"]
        if self.has_rewind_state:
            ticket.rewind_state = {name: value.to(device) for name, value in self.rewind_state.items()}
        ticket.model.load_state_dict(self.part("model"))
        return about["parent"]

    def restore(self, model: torch.nn.Module, optimizer, schedule, device: str) -> Progress:
        """Put optimizer, schedule and generators where they were; the model is there already."""
        parameters = dict(model.named_parameters())
        for key, value in self.part("optimizer").items():
            name, entry = key.rsplit("/", 1)
            optimizer.state[parameters[name]][entry] = value if entry == "step" else value.to(device)
        group = {k: tuple(v) if isinstance(v, list) else v for k, v in self.about["group"].items()}
        optimizer.param_groups[0].update(group)
        schedule.last_epoch = self.about["schedule"]
        torch.set_rng_state(self.tensors["rng"])
        if device == "cuda" and "rng_cuda" in self.tensors:
            torch.cuda.set_rng_state(self.tensors["rng_cuda"])
        at = Progress(**self.about["progress"], best={n: v.to(device) for n, v in self.part("best").items()})
        at.resumed += 1
        return at


@contextlib.contextmanager
def locked(out: Path):
    """Hold the run folder; the lock dies with this process. Raises LotteryError naming the process that has it."""
    with open(out / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise lottery.LotteryError(f"--out {out}: in use by {file.read().strip() or 'another process'}") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def read_run(out: Path, config: dict) -> list[dict]:
    """The ledger of the run in the folder `out`, [] if there is none yet. Writes nothing.

    Raises LotteryError if the folder holds another run, or anything else.
    """
    if out.exists() and not out.is_dir():
        raise lottery.LotteryError(f"--out {out}: is a file, not a folder")
    if not out.exists() or {path.name for path in out.iterdir()} <= {"lock", "config.json.tmp"}:
        return []
    try:
        old = dict(json.loads((out / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise lottery.LotteryError(f"--out {out}: the folder is not empty and holds no run: choose another") from None
    for key, value in config.items():
        if key != "machine" and old.get(key) != value:
            hashes = {"data_sha256": "--data, by its hash", "lm_sha256": "--lm, by its hash"}
            name = f"--{key.replace('_', '-')}" if key in FLAGS else hashes.get(key, key)
            what = f"{name} {old.get(key)} there, {value} now"
            raise lottery.LotteryError(f"--out {out}: holds another run ({what}): choose another folder")
    path = out / "ledger.jsonl"
    rows = lottery.read_ledger(path) if path.exists() else []
    try:
        lottery.check_chain(rows, lottery.settings_of(config))
    except lottery.LotteryError as error:
        raise lottery.LotteryError(f"{path}: {error} (see lottery.py verify)") from None
    return rows


# ---------------------------------------------------------------------------- report

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
    lines += [*(f"- {line}" for line in summary(ledger)), "", explained, ""]
    lines += [markdown_line(COLUMNS), markdown_line(["---:"] * 7 + [":---"])]
    lines += [markdown_line(cells(row)) for row in ledger]
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


# ---------------------------------------------------------------------------- the whole


def code_sha256() -> str:
    """Hash of the sources that decide a result."""
    names = ("train.py", "lottery.py", "models.py", "data.py", "decode.py")
    sources = [HERE / name for name in names] + sorted((HERE / "csrc").rglob("*.*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


@dataclasses.dataclass
class Setting:
    """What is built before anything is trained."""

    args: argparse.Namespace
    config: dict  # everything that decides the result, without "machine"
    utterances: dict[str, list[data.Utterance]]
    tokens: list[str]
    model: torch.nn.Module
    transcribe: Callable  # the search of the test
    counts: list[int]  # kept weights, a round

    def corpus(self) -> Corpus:
        return Corpus(self.utterances, self.tokens, self.model, self.args.recipe.seconds)


def prepare(args: argparse.Namespace) -> Setting:
    utterances = data.read_corpus(args.data)
    tokens = data.tokens_of(utterances["train"], args.tokens)
    torch.manual_seed(args.seed)  # the draw of theta_0
    model = models.build(args.backbone, args.size, len(tokens))
    total = sum(weight.numel() for weight in lottery.prunable(model).values())
    config = configuration(args) | {"data_sha256": data.corpus_sha256(args.data, utterances)}
    counts = lottery.kept_counts(total, args.sparsity, args.prune_rate)
    search = {key: getattr(args, key) for key in SEARCH} if args.lm else {"beam": args.beam}
    words = {word for utterance in utterances["train"] for word in utterance.text.split()}
    transcribe = decode.transcriber(model, tokens, lm=args.lm, words=words, **search)
    return Setting(args, config, utterances, tokens, model, transcribe, counts)


def run(args: argparse.Namespace, signals: Signals) -> None:
    setting = prepare(args)
    config, model, rounds = setting.config, setting.model, len(setting.counts)
    rows = read_run(args.out, config)
    print("config: " + ", ".join(f"{key} {value}" for key, value in config.items()))
    if len(rows) < rounds:
        print(f"ops: {lottery.ops.path}; device: {args.device}, {torch.get_num_threads()} threads")
        everything, total = sum(p.numel() for p in model.parameters()), setting.counts[0]
        print(f"model: {everything:,} parameters, {total:,} prunable; {rounds} rounds, the first one dense")
        corpus = setting.corpus()
        steps = steps_an_epoch(corpus, args.recipe) * args.recipe.epochs
        if args.rewind_step > steps:
            raise lottery.LotteryError(f"--rewind-step {args.rewind_step}: a round has only {steps} steps")
        args.out.mkdir(parents=True, exist_ok=True)
    with locked(args.out):
        rows = read_run(args.out, config)  # again, now that nobody else writes
        if len(rows) == rounds:
            print(f"{args.out} is finished: nothing to train")
            print("\n".join(map(text_line, [COLUMNS, *map(cells, rows)])))
        else:
            if not (args.out / "config.json").exists():
                lottery.write_atomically(args.out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
            (args.out / "ledger.jsonl").touch()
            (args.out / "masks").mkdir(exist_ok=True)
            train_all(setting, corpus, rows, signals)
        if not all((args.out / name).exists() for name in ("report.md", "report.png")):
            write_report(args.out, config, rows)
        (args.out / "checkpoint.safetensors").unlink(missing_ok=True)
    print("\n".join(summary(rows)))
    print(f"{args.out}: ledger.jsonl, ticket.safetensors, report.md, report.png")


def train_all(setting: Setting, corpus: Corpus, rows: list[dict], signals: Signals) -> None:
    """All rounds that are missing; `rows` grows with the ledger."""
    args, out = setting.args, setting.args.out
    run_sha256 = lottery.hash_json(lottery.settings_of(setting.config))
    kept = Kept(out, run_sha256) if (out / "checkpoint.safetensors").exists() else None
    if rows and not kept:
        raise lottery.LotteryError(f"--out {out}: {len(rows)} rounds in the ledger and no checkpoint to go on from")
    if kept and kept.about["round"] not in (len(rows) - 1, len(rows)):
        where = f"the checkpoint is in round {kept.about['round']}, the ledger has {len(rows)} rounds"
        raise lottery.LotteryError(f"--out {out}: {where}")
    if kept:
        at = kept.about["progress"]
        print(f"going on in round {kept.about['round']}, after {at['epoch']} epochs and {at['batch']} steps")
    print("\n".join(map(text_line, [COLUMNS, *map(cells, rows)])), flush=True)
    config = lottery.settings_of(setting.config)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()}
    facts = {
        "seed": args.seed,
        "config_sha256": run_sha256,
        "data_sha256": config["data_sha256"],
        "code_sha256": code_sha256(),
        "versions": versions,
        "device": args.device,
        "threads": torch.get_num_threads(),
    }
    sizes = models.BACKBONES[args.backbone].SIZES[args.size]
    info = {**config, "sizes": sizes, "tokens": setting.tokens, "features": setting.model.features}
    info = json.loads(json.dumps(info))  # as it is read back
    signals.deferred = True
    for found in search(setting, corpus, rows, Keeper(out, run_sha256, args.save_every, signals, kept), kept):
        ticket, row = found.ticket, found.row | facts | {"info_sha256": lottery.hash_json(info)}
        if row["round"]:
            lottery.save_masks(out / "masks" / f"{row['round']:02d}.safetensors", ticket.masks)
        state = setting.model.state_dict()
        lottery.save_ticket(out / "ticket.safetensors", ticket.masks, ticket.rewind_state, state, info)
        new = row["round"] == len(rows)
        lottery.append_row(out / "ledger.jsonl", rows, row, config)
        if new:
            print(text_line(cells(row)), flush=True)
        for name, count in row["kept_per_layer"].items():
            if count == 0:
                print(f"  {name}: no weight is left in this layer", flush=True)
        if signals.number:  # came during the test: the round's checkpoint is there
            raise Stopped(signals.number)
    signals.deferred = False


def evaluate_on_test(setting: Setting, corpus: Corpus) -> dict:
    args, model = setting.args, setting.model
    hypotheses = recognise(model, corpus.test, corpus.tokens, args.recipe.batch_size, args.device, setting.transcribe)
    return score([e.text for e in corpus.test], hypotheses)


def search(setting: Setting, corpus: Corpus, rows: list[dict], keeper: Keeper, kept: Kept | None):
    """lottery.find_ticket with this recipe; rows get WER, CER, seconds and the verdict against round 0."""
    args = setting.args
    at, at_round = Progress(), 0

    def train(ticket: lottery.Ticket) -> lottery.State:
        nonlocal at, at_round
        at_round = ticket.round
        keeper.parent = rows[ticket.round - 1]["mask_sha256"] if ticket.round else lottery.sha256(ticket.masks)
        here = kept if kept and kept.about["round"] == ticket.round else None
        at = train_round(ticket, corpus, args.recipe, args.seed, args.device, keeper, here)
        return at.best

    def evaluate(model: torch.nn.Module) -> dict:
        started = time.monotonic()
        test = evaluate_on_test(setting, corpus)
        row = {"valid_wer": at.best_wer, "best_epoch": at.best_epoch, "test_wer": test["wer"]}
        row |= {"test_cer": test["cer"], "test_errors": test["errors"], "test_words": test["words"]}
        if at_round:
            dense = rows[0]["test_errors"]
            found = lottery.verdict(test["errors"], dense, test["words"], args.margin)
            row |= {"verdict": found.word, "interval": [found.low, found.high]}
        return row | {"seconds": round(at.seconds + time.monotonic() - started, 1), "resumed": at.resumed}

    return lottery.find_ticket(
        setting.model.to(args.device), train, evaluate,
        sparsity=args.sparsity, prune_rate=args.prune_rate, rewind_step=args.rewind_step,
        resume=kept.resume if kept else None,
    )  # fmt: skip


def retrain(run: Path, number: int) -> None:
    """Train round `number` of a finished run again and compare bit for bit. Raises LotteryError if anything differs."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        rows = lottery.read_ledger(run / "ledger.jsonl")
        if not 0 <= number < len(rows):
            raise IndexError(f"the ledger has {len(rows)} rounds")
        argv = [f"--{name.replace('_', '-')}={config[name]}" for name in FLAGS if config[name] is not None]
        if config["lm_sha256"]:
            argv += ["--lm", config["machine"]["lm"]]
        row = rows[number]
        args = parse([*argv, "--data", config["machine"]["data"], "--device", row["device"], "--out", str(run)])
        torch.set_num_threads(row["threads"])
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise lottery.LotteryError(
            f"{run}: no round {number} to train again ({type(error).__name__}: {error})"
        ) from None
    setting = prepare(args)
    for key, value in setting.config.items():
        if key != "machine" and config.get(key) != value:
            raise lottery.LotteryError(f"{run}: {key} is {value} now, {config.get(key)} in the run")
    corpus = setting.corpus()
    ticket = lottery.Ticket(setting.model.to(args.device), args.rewind_step)
    if number:
        ticket.round = number
        state, _ = lottery.read_sealed(run / "rewind.safetensors", "rewind state")
        ticket.rewind_state = {name: value.to(args.device) for name, value in state.items()}
        masks = lottery.load_masks(run / "masks" / f"{number:02d}.safetensors")
        ticket.masks = {name: mask.to(args.device) for name, mask in masks.items()}
        ticket.rewind()
    at = train_round(ticket, corpus, args.recipe, args.seed, args.device)
    compared = {
        "rewind_sha256": lottery.sha256(ticket.rewind_state),
        "start_sha256": ticket.start_sha256,
        "last_sha256": lottery.sha256(setting.model.state_dict()),
        "trained_sha256": lottery.sha256(at.best),
        "valid_wer": at.best_wer,
    }
    if number + 1 < len(rows):  # the next masks must follow from these weights
        ticket.prune(rows[number + 1]["kept"])
        compared["mask_sha256"] = lottery.sha256(ticket.masks)
    setting.model.load_state_dict(at.best)
    compared["test_errors"] = evaluate_on_test(setting, corpus)["errors"]
    for what, value in compared.items():
        if value != rows[number + (what == "mask_sha256")][what]:
            raise lottery.LotteryError(f"round {number} trained again differs from the ledger in {what}")
    print(f"ok      round {number} trained again: {', '.join(compared)} are the ledger's, bit for bit")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    with Signals() as signals:
        try:
            if args.retrain:
                retrain(Path(args.retrain[0]), int(args.retrain[1]))
            else:
                run(args, signals)
        except (data.DataError, lottery.LotteryError, OSError) as error:
            print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 1 if args.retrain else 2
        except Stopped as stopped:
            command = shlex.join(["python", "train.py", *(sys.argv[1:] if argv is None else argv)])
            name = signal.Signals(stopped.number).name
            print(f"train.py: stopped by {name}; go on with: {command}", file=sys.stderr)
            return 128 + stopped.number
    return 0


if __name__ == "__main__":
    sys.exit(main())
