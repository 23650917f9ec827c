"""Find winning tickets: train dense, prune, rewind, repeat, and test every round against dense.

    python train.py --backbone rnnt --sparsity 0.9

See README.md for what stands in the run folder, lottery.py for the algorithm.
"""

import argparse
import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jiwer
import numpy as np
import torch
from tqdm import tqdm

import controls
import corpora
import data
import decode
import files
import flags
import ledger
import lottery
import models
import parallel
import plan
import report
from data import SpecAugment
from noise import Noise
from runs import Keeper, Kept, Progress, Signals, Stopped, locked, read_run

# ---------------------------------------------------------------------------- recognise and score


def recognise(
    model, examples: list[data.Example], tokens: list[str], batch_size: int, device: str, transcribe=None
) -> list[str]:
    """Transcripts, in the order of the examples: greedy, or as decode.transcriber(model, ...) does.

    Each process recognises its share of them.
    """
    share = examples[parallel.index() :: parallel.count()]
    texts = [""] * len(share)
    transcribe = transcribe or model.transcribe
    model.eval()
    with torch.inference_mode():
        for indices, batch in data.eval_batches(share, batch_size):
            batch = batch.to(device)
            for i, ids in zip(indices, transcribe(batch.features, batch.input_lengths)):
                texts[i] = data.decode(ids, tokens)
    shares = parallel.gather(texts)
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(examples))]


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

    def __init__(
        self, utterances: dict[str, list[data.Utterance]], tokens: list[str], model, seconds=(0.0, math.inf),
        cache: "str | data.Cache" = "memory", workers: int = 0, noise: Noise | None = None,
    ):  # fmt: skip
        self.tokens = tokens

        def examples(split: str, name: str, **how) -> list[data.Example]:
            return data.load_examples(
                utterances[split], tokens, model.features, f"features of {name}", cache, workers, **how
            )

        def load() -> dict[str, list[data.Example]]:
            noisy = noise is not None and noise.snr is not None
            return {split: examples(split, split, fresh=noisy and split == "train") for split in utterances}

        splits = parallel.first_then_others(load) if isinstance(cache, data.Cache) else load()
        print(f"data: {', '.join(f'{len(part)} {split}' for split, part in splits.items())} utterances")
        self.train, self.valid = splits.pop("train"), splits.pop("valid")
        self.tests = splits  # by name; the first is what the verdicts are about
        low, high = seconds
        long_enough = [e for e in self.train if low <= e.seconds <= high]
        frames = model.output_lengths(torch.tensor([e.frames for e in long_enough])).tolist()
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
        for split in ("valid", *self.tests):
            unseen = data.unseen_characters(utterances[split], tokens)
            if unseen:
                counts = ", ".join(f"{c!r} x {n}" for c, n in sorted(unseen.items()))
                print(f"data: {split} has characters that train has not, counted as errors: {counts}")
        if noise:
            print(f"noise: {noise}")
            for split, snr in itertools.product(list(self.tests), noise.test_snr):
                mixes = [functools.partial(noise.for_test, snr=snr, index=i) for i in range(len(utterances[split]))]
                name = f"{split} at {snr:g} dB"
                self.tests[name] = examples(split, name, mixes=mixes)


def train_round(
    ticket: lottery.Ticket, corpus: Corpus, setting: "Setting", keeper: Keeper | None = None, kept: Kept | None = None,
    board=None,
) -> Progress:  # fmt: skip
    """Train ticket.model to its last epoch, with a fresh optimizer, schedule and data order.

    Returns the progress, with the state of the epoch of the best valid WER; of equals the later.
    keeper saves checkpoints on the way; kept is a checkpoint in this round to go on from; board takes scalars.
    """
    model, at, args, recipe = ticket.model, Progress(), setting.args, setting.args.recipe
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, recipe.betas, weight_decay=recipe.weight_decay)
    ends = setting.epoch_ends(corpus)
    if recipe.schedule == "one-cycle":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=ends[-1])
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.1 ** -bisect.bisect_right(ends, step))
    if kept:
        at = kept.restore(model, optimizer, schedule, args.device)
    label = f"round {ticket.round}"
    bar = tqdm(total=ends[-1], desc=label, unit="step", disable=True if parallel.index() else None, leave=False)
    bar.update(schedule.last_epoch)
    started = said = time.monotonic()
    started -= at.seconds
    for number in range(at.epoch, recipe.epochs):
        if at.batch == 0:  # else the generator stands where the checkpoint left it
            seeds = [args.seed, number, 1] + [parallel.index()] * (parallel.index() > 0)
            torch.manual_seed(int(np.random.default_rng(seeds).integers(2**63)))  # dropout
        model.train()
        epoch = setting.epoch(corpus, number, recipe.augment)
        batches = epoch.batches(at.batch, args.workers)
        while at.batch < len(epoch):
            optimizer.zero_grad()
            parts = range(at.batch, min(at.batch + recipe.accumulate, len(epoch)))
            loss = add_gradients(setting, epoch, parts, batches, at)
            ticket.hold()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            ticket.stepped()
            at.loss += parallel.total(loss)
            at.batch, at.seconds = parts[-1] + 1, time.monotonic() - started
            bar.update()
            if keeper:
                keeper.after_step(ticket, optimizer, schedule, at)
        if not math.isfinite(at.loss):
            raise lottery.LotteryError(f"{label}, epoch {number + 1}: the loss is {at.loss}: try a lower --lr")
        ticket.check()
        hypotheses = recognise(model, corpus.valid, corpus.tokens, recipe.batch_size, args.device)
        wer = score([e.text for e in corpus.valid], hypotheses)["wer"]
        loss = at.loss / len(corpus.train)
        at.losses.append(loss)
        at.valid_wers.append(wer)
        if ledger.best_epoch(at.valid_wers)[1] == number + 1:
            at.best = lottery.copy_state(model)
        line = f"epoch {number + 1}/{recipe.epochs}, loss {loss:.2f}, valid WER {wer:.3f}"
        bar.set_postfix_str(line)
        if bar.disable and time.monotonic() - said > 30:  # in a log
            said = time.monotonic()
            print(f"  {label}, {line}", flush=True)
        if board:
            for name, value in (("loss", loss), ("valid WER", wer), ("learning rate", schedule.get_last_lr()[0])):
                board.add_scalar(f"{name}/{label}", value, number + 1)
        at.epoch, at.batch, at.loss, at.seconds = number + 1, 0, 0.0, time.monotonic() - started
        if keeper:
            keeper.after_step(ticket, optimizer, schedule, at)  # a signal during the evaluation
    bar.close()
    if keeper:
        keeper.save(ticket, optimizer, schedule, at)
    return at


def add_gradients(setting: "Setting", epoch: data.Epoch, parts: range, batches: Iterator, at: Progress) -> float:
    """Forward and backward over the batches `parts` of the epoch, which make up one step, as the next of `batches`.

    Gradients are of the mean loss over all of their utterances, in all processes. Returns the sum of this one's losses.
    """
    device, loss_of = setting.args.device, setting.loss
    utterances, total = sum(len(epoch.chunks[i]) for i in parts), 0.0
    for i in parts:
        asked = time.monotonic()
        batch = next(batches)
        at.waited += time.monotonic() - asked
        batch = batch.to(device)
        with contextlib.nullcontext() if i == parts[-1] else parallel.without_averaging(loss_of):
            with torch.autocast(device, torch.bfloat16, enabled=setting.args.recipe.amp):
                loss = loss_of(batch.features, batch.input_lengths, batch.targets, batch.target_lengths)
            # a mean over this batch's share; DistributedDataParallel divides by the number of processes
            (loss * (epoch.weight(i) * parallel.count() / utterances)).backward()
        total += loss.item() * epoch.weight(i)
    return total


# ---------------------------------------------------------------------------- the whole


def code_sha256() -> str:
    """Hash of the sources that decide a result."""
    names = (
        "train", "flags", "runs", "parallel", "controls", "lottery", "operators", "files", "ledger", "models", "data",
        "corpora", "decode", "noise",
    )  # fmt: skip
    sources = [flags.HERE / f"{name}.py" for name in names] + sorted((flags.HERE / "csrc").rglob("*.*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


@dataclasses.dataclass
class Setting:
    """What is built before anything is trained."""

    args: argparse.Namespace
    config: dict  # everything that decides the result, without "machine"
    utterances: dict[str, list[data.Utterance]]
    tokens: list[str]
    model: torch.nn.Module
    search_of: Callable  # of a model: how the test transcribes
    rounds: list[int]
    cache: "str | data.Cache"
    dense: dict | None = None  # round 0, if it is taken from another run
    noise: Noise | None = None

    def __post_init__(self):
        self.loss, self.transcribe = parallel.loss_of(self.model), self.search_of(self.model)

    def corpus(self) -> Corpus:
        args = self.args
        return Corpus(
            self.utterances, self.tokens, self.model, args.recipe.seconds, self.cache, args.workers, self.noise
        )

    def epoch(self, corpus: Corpus, number: int, augment: SpecAugment | None = None) -> data.Epoch:
        recipe, process, processes = self.args.recipe, parallel.index(), parallel.count()
        mix = self.noise.for_training if self.noise and self.noise.snr is not None else None
        return data.Epoch(
            corpus.train, recipe.batch_size, self.args.seed, number, augment, recipe.batch_seconds, process, processes,
            mix,
        )  # fmt: skip

    def epoch_ends(self, corpus: Corpus) -> list[int]:
        """Steps after which each epoch of a round ends."""
        recipe = self.args.recipe
        steps = (math.ceil(len(self.epoch(corpus, e)) / recipe.accumulate) for e in range(recipe.epochs))
        return list(itertools.accumulate(steps))


IN_MEMORY = 8e9  # bytes of recordings whose features are kept in memory, at most


def prepare(args: argparse.Namespace) -> Setting:
    if args.corpus == "manifests":
        utterances = data.read_corpus(args.data)
    else:
        sets = (args.train_sets, args.valid_sets, args.test_sets)
        if args.download and not parallel.index():
            corpora.download(args.corpus, args.data, *sets)
        parallel.gather(None)
        utterances = corpora.read(args.corpus, args.data, *sets)
    cache = data.Cache(args.cache) if isinstance(args.cache, Path) else args.cache
    tokens = data.tokens_of(utterances["train"], args.tokens)
    torch.manual_seed(args.seed)  # the draw of theta_0
    model = models.build(args.backbone, args.size, len(tokens)).to(args.device)
    if args.init:
        start_from(args.init, model, tokens)
    if args.source:  # of another network: refused before anything is trained
        what = {"control": args.control, "weights": args.ticket_weights, "backbone": args.backbone, "size": args.size}
        controls.check_source(args.source, args.rounds, model, tokens, **what)
    files = data.audio_files(utterances)
    cached = isinstance(cache, data.Cache)
    size = sum(path.stat().st_size for path in set(files))
    if cache == "memory" and size > IN_MEMORY:
        raise data.DataError(
            f"--cache memory: {size / 1e9:.0f} GB of recordings are too many for it: name a folder for their features "
            "(0.12 GB an hour of speech, log-mel; twice as much for --backbone cnn-lstm at paper size), or none"
        )
    hashes = parallel.first_then_others(lambda: cache.hash_files(files)) if cached else data.hash_files(files)
    config = flags.configuration(args) | {"data_sha256": data.corpus_sha256(utterances, hashes)}
    config |= {"ticket_sha256": args.source.identity(args.rounds, args.ticket_weights)} if args.source else {}
    config |= {"init_sha256": lottery.sha256(model.state_dict())} if args.init else {}
    noise = Noise(args.noise, args.snr, args.test_snr or ()) if args.noise else None
    config |= {"noise_sha256": noise.sha256} if noise else {}
    dense = dense_of(args, config)
    config |= {"dense": ledger.row_hash(dense)} if dense else {}
    ticket = lottery.Ticket(model, pruning=args.pruning)
    counts = lottery.kept_counts(ticket.kept_units, args.sparsity, args.prune_rate)
    if not args.source:
        lottery.check_least(ticket, counts[-1])
    options = {key: getattr(args, key) for key in flags.SEARCH} if args.lm else {"beam": args.beam}
    words = {word for utterance in utterances["train"] for word in utterance.text.split()}
    search_of = functools.partial(decode.transcriber, tokens=tokens, lm=args.lm, words=words, **options)
    rounds = args.rounds or list(range(len(counts)))
    return Setting(args, config, utterances, tokens, model, search_of, rounds, cache, dense, noise)


def start_from(path: Path, model: torch.nn.Module, tokens: list[str]) -> None:
    """Put a ticket's trained weights into the model, as theta_0."""
    file = files.load_ticket(path)
    state, renewed = controls.adopt(model, file.trained, file.info.get("tokens") == tokens, path)
    model.load_state_dict(state)
    said = f"; made new, for other tokens: {', '.join(renewed)}" if renewed else ""
    removed = sum(int((~mask).sum()) for mask in file.masks.values())
    print(f"theta_0: the trained weights of {path}{f', {removed:,} of them 0' if removed else ''}{said}")


def dense_of(args: argparse.Namespace, config: dict) -> dict | None:
    """Round 0 of --dense, or of --ticket's run, if it was trained with the same settings."""
    if not args.source:
        return None
    run, settings, row = args.ticket, args.source.settings, args.source.dense
    if args.dense:
        run = args.dense
        there, rows = controls.read_run(run)
        settings, row = ledger.settings_of(there), rows[0] if rows else None
    ignored = {
        "machine",
        "sparsity",
        "prune_rate",
        "rewind_step",
        "margin",
        "ticket_sha256",
        "dense",
        *flags.PRUNING,
        *flags.GIVEN,
    }
    keys = sorted((config.keys() | settings.keys()) - ignored)
    other = [key for key in keys if config.get(key) != settings.get(key)]
    if row and not other:
        config["machine"]["dense"] = str(run.resolve())
        return {**row, "previous": row["config_sha256"]}  # as where it was trained: that run may have taken it over too
    if args.dense:
        why = f"other {', '.join(other)}" if row else "none is finished"
        raise lottery.LotteryError(f"--dense {run}: it has no round 0 of these settings ({why})")
    return None


def run(args: argparse.Namespace, signals: Signals) -> None:
    setting = prepare(args)
    config, model, rounds = setting.config, setting.model, len(setting.rounds)
    rows = read_run(args.out, config, flags.FLAGS)
    print("config: " + ", ".join(f"{key} {value}" for key, value in config.items()))
    if len(rows) < rounds:
        print(f"ops: {lottery.ops.path}; device: {args.device}, {torch.get_num_threads()} threads")
        everything = sum(p.numel() for p in model.parameters())
        total = sum(weight.numel() for weight in lottery.prunable(model).values())
        print(f"model: {everything:,} parameters, {total:,} prunable; {rounds} rounds, the first one dense")
        corpus = setting.corpus()
        steps = setting.epoch_ends(corpus)[-1]
        if args.rewind_step > steps and not args.source:
            raise lottery.LotteryError(f"--rewind-step {args.rewind_step}: a round has only {steps} steps")
    parallel.gather(None)  # all have looked into the folder before the first process writes there
    if not parallel.index():
        args.out.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if parallel.index() else locked(args.out):
        if not parallel.index():
            rows = read_run(args.out, config, flags.FLAGS)  # again, now that nobody else writes
        if len(rows) == rounds:
            print(f"{args.out} is finished: nothing to train")
            print("\n".join(map(report.text_line, [report.COLUMNS, *map(report.cells, rows)])))
        else:
            if not parallel.index():
                if not (args.out / "config.json").exists():
                    files.write_atomically(args.out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
                (args.out / "ledger.jsonl").touch()
                (args.out / "masks").mkdir(exist_ok=True)
            train_all(setting, corpus, rows, signals)
        if not parallel.index():
            if not all((args.out / name).exists() for name in ("report.md", "report.png")):
                report.write_report(args.out, config, rows)
            (args.out / "checkpoint.safetensors").unlink(missing_ok=True)
    print("\n".join(report.summary(setting.config, rows)))
    print(f"{args.out}: ledger.jsonl, ticket.safetensors, report.md, report.png")


def train_all(setting: Setting, corpus: Corpus, rows: list[dict], signals: Signals) -> None:
    """All rounds that are missing; `rows` grows with the ledger."""
    args, out = setting.args, setting.args.out
    run_sha256 = ledger.hash_json(ledger.settings_of(setting.config))
    kept = Kept(out, run_sha256) if (out / "checkpoint.safetensors").exists() else None
    if len(rows) > bool(setting.dense) and not kept:
        raise lottery.LotteryError(f"--out {out}: {len(rows)} rounds in the ledger and no checkpoint to go on from")
    if kept and kept.about["round"] not in setting.rounds[max(0, len(rows) - 1) : len(rows) + 1]:
        where = f"the checkpoint is in round {kept.about['round']}, the ledger has {len(rows)} rounds"
        raise lottery.LotteryError(f"--out {out}: {where}")
    if kept:
        at = kept.about["progress"]
        print(f"going on in round {kept.about['round']}, after {at['epoch']} epochs and {at['batch']} steps")
    print("\n".join(map(report.text_line, [report.COLUMNS, *map(report.cells, rows)])), flush=True)
    config = ledger.settings_of(setting.config)
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
    parallel.gather(None)  # all have read the checkpoint before the first process writes another
    signals.deferred = True
    keeper = Keeper(out, run_sha256, args.save_every, signals, kept, keeps_rewind_state=not args.source)
    board = scalars_to(out / "tensorboard") if args.tensorboard and not parallel.index() else None
    if setting.dense and not rows:
        ledger.append_row(None if parallel.index() else out / "ledger.jsonl", rows, setting.dense, config)
        print(
            f"{report.text_line(report.cells(rows[0]))}  (the row of {setting.config['machine']['dense']})", flush=True
        )
    for found in (given if args.source else search)(setting, corpus, rows, keeper, kept, board):
        ticket, row = found.ticket, facts | found.row
        told = json.loads(json.dumps(info | {k: row[k] for k in ("sizes",) if k in row}))  # as it is read back
        row["info_sha256"] = ledger.hash_json(told)
        new = row["round"] not in [earlier["round"] for earlier in rows]
        if not parallel.index():
            if row["round"] and args.control != "dense-small":
                files.save_masks(out / "masks" / f"{row['round']:02d}.safetensors", ticket.masks)
            state = ticket.model.state_dict()
            files.save_ticket(out / "ticket.safetensors", ticket.masks, ticket.rewind_state, state, told)
        ledger.append_row(None if parallel.index() else out / "ledger.jsonl", rows, row, config)
        if new:
            print(report.text_line(report.cells(row)), flush=True)
            if board:
                for key in ("test_wer", "test_cer"):
                    board.add_scalar(key, row[key], row["round"])
        number = parallel.largest(signals.number)
        if number:  # came during the test: the round's checkpoint is there
            raise Stopped(number)
    signals.deferred = False
    if board:
        board.close()


def scalars_to(folder: Path):
    """A writer for TensorBoard. It writes by itself every two minutes, and at its close."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise lottery.LotteryError("--tensorboard: the package is not there: pip install tensorboard") from None
    return SummaryWriter(str(folder))


def evaluate_on_tests(setting: Setting, corpus: Corpus, dense: dict | None) -> dict:
    """What a ledger row says of the first test set, and under "other_tests" of each other one; dense: round 0's row."""
    args, rows = setting.args, {}
    for name, examples in corpus.tests.items():
        hypotheses = recognise(
            setting.model, examples, corpus.tokens, args.recipe.batch_size, args.device, setting.transcribe
        )
        found = score([e.text for e in examples], hypotheses)
        row = rows[name] = {f"test_{key}": found[key] for key in ("wer", "cer", "errors", "words")}
        if dense is not None:
            against = dense["other_tests"][name] if len(rows) > 1 else dense
            told = lottery.verdict(row["test_errors"], against["test_errors"], row["test_words"], args.margin)
            row |= {"verdict": told.word, "interval": [told.low, told.high]}
    first, *others = rows
    return rows[first] | ({"other_tests": {name: rows[name] for name in others}} if others else {})


def search(setting: Setting, corpus: Corpus, rows: list[dict], keeper: Keeper, kept: Kept | None, board=None):
    """lottery.find_ticket with this recipe; rows get WER, CER, seconds and the verdict against round 0."""
    args = setting.args
    at, at_round = Progress(), 0

    def train(ticket: lottery.Ticket) -> lottery.State:
        nonlocal at, at_round
        at_round = ticket.round
        keeper.parent = rows[ticket.round - 1]["mask_sha256"] if ticket.round else lottery.sha256(ticket.masks)
        hashes = parallel.gather((lottery.sha256(ticket.masks), ticket.start_sha256))
        if len(set(hashes)) > 1:
            raise lottery.LotteryError(f"round {ticket.round}: the processes have other masks or weights: {hashes}")
        say_empty(ticket, rows)
        here = kept if kept and kept.about["round"] == ticket.round else None
        at = train_round(ticket, corpus, setting, keeper, here, board)
        return at.best

    def evaluate(model: torch.nn.Module) -> dict:
        return results(setting, corpus, at, rows[0] if at_round else None)

    return lottery.find_ticket(
        setting.model, train, evaluate,
        sparsity=args.sparsity, prune_rate=args.prune_rate, rewind_step=args.rewind_step, pruning=args.pruning,
        resume=kept.resume if kept else None,
    )  # fmt: skip


def say_empty(ticket: lottery.Ticket, rows: list[dict]) -> None:
    """Name the layers that lost their last weight in this round."""
    before = rows[-1]["kept_per_layer"] if rows else {}
    for name, mask in ticket.masks.items():
        if not mask.any() and before.get(name, 1):
            print(f"  round {ticket.round}: {name}: no weight is left in this layer (see --min-remaining)", flush=True)


def results(setting: Setting, corpus: Corpus, at: Progress, dense: dict | None) -> dict:
    """What a ledger row says of a training and its test."""
    started = time.monotonic()
    wer, epoch = ledger.best_epoch(at.valid_wers)
    row = {"valid_wer": wer, "best_epoch": epoch, "valid_wers": at.valid_wers, "losses": at.losses}
    row |= evaluate_on_tests(setting, corpus, dense)
    seconds = round(at.seconds + time.monotonic() - started, 1)
    return row | {"seconds": seconds, "waited": round(at.waited, 3), "resumed": at.resumed}


def of_round(setting: Setting, number: int) -> tuple[Setting, lottery.Ticket, dict]:
    """The ticket of --ticket's round `number`, or its control, ready to be trained; the setting with its model; what
    its row says of its origin."""
    args, model = setting.args, setting.model
    if number == 0:
        return setting, lottery.Ticket(model), {}
    ticket, about, renewed = controls.given(
        args.source, number, model, setting.tokens, args.pruning, args.seed,
        control=args.control, weights=args.ticket_weights, backbone=args.backbone, size=args.size,
    )  # fmt: skip
    if renewed:
        print(f"  round {number}: made new and not pruned, for other tokens: {', '.join(renewed)}", flush=True)
    if ticket.model is not model:
        setting = dataclasses.replace(setting, model=ticket.model)
    return setting, ticket, about


def given(setting: Setting, corpus: Corpus, rows: list[dict], keeper: Keeper, kept: Kept | None, board=None):
    """Train the tickets of --ticket, or their controls: as `search`, without pruning."""
    theta_0 = lottery.copy_state(setting.model)
    first = setting.rounds.index(kept.about["round"]) if kept else len(rows)
    for number in setting.rounds[first:]:
        setting.model.load_state_dict(theta_0)
        here, ticket, about = of_round(setting, number)
        resumes = kept if kept and kept.about["round"] == number else None
        if resumes:
            resumes.resume(ticket)
        keeper.parent = ""
        say_empty(ticket, rows)
        at = train_round(ticket, corpus, here, keeper, resumes, board)
        _, row = lottery.finish(ticket, at.best)
        yield lottery.Found(ticket, row | about | results(here, corpus, at, rows[0] if number else None))


def retrain(run: Path, number: int) -> None:
    """Train round `number` of a finished run again and compare bit for bit. Raises LotteryError if anything differs."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        rows = ledger.read_ledger(run / "ledger.jsonl")
        if number not in [row["round"] for row in rows]:
            raise IndexError(f"the ledger has rounds {', '.join(str(row['round']) for row in rows)}")
        argv = flags.command_line(config)
        paths = {key: config["machine"].get(key) for key in ("lm", "noise", "ticket", "dense", "init")}
        paths |= {key: paths[key] or str(flags.NONE) for key in ("lm", "noise", "init")}
        argv += [f"--{key}={path}" for key, path in paths.items() if path]
        row = next(row for row in rows if row["round"] == number)
        where = ["--data", config["machine"]["data"], "--device", row["device"], "--cache", config["machine"]["cache"]]
        args = flags.parse([*argv, *where, "--out", str(run)])
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
    ticket = lottery.Ticket(setting.model, args.rewind_step, args.pruning)
    if args.source:
        setting, ticket, _ = of_round(setting, number)
    elif number:
        ticket.round = number
        state, _ = files.read_sealed(run / "rewind.safetensors", "rewind state")
        ticket.rewind_state = {name: value.to(args.device) for name, value in state.items()}
        masks = files.load_masks(run / "masks" / f"{number:02d}.safetensors")
        ticket.masks = {name: mask.to(args.device) for name, mask in masks.items()}
        ticket.rewind()
    at = train_round(ticket, corpus, setting)
    later = [r for r in rows if r["round"] == number + 1 and not args.source]  # whose masks follow from these weights
    compared = {
        "rewind_sha256": lottery.sha256(ticket.rewind_state),
        "start_sha256": ticket.start_sha256,
        "last_sha256": lottery.sha256(setting.model.state_dict()),
        "trained_sha256": lottery.sha256(at.best),
        "valid_wer": ledger.best_epoch(at.valid_wers)[0],
    }
    if later:
        ticket.prune(later[0].get("kept_blocks", later[0]["kept"]))
        compared["mask_sha256"] = lottery.sha256(ticket.masks)
    if args.source and not number:  # whoever trained it may have kept a later step
        del compared["rewind_sha256"]
    setting.model.load_state_dict(at.best)
    compared |= evaluate_on_tests(setting, corpus, rows[0] if number else None)
    for what, value in compared.items():
        if value != (later[0] if what == "mask_sha256" else row).get(what):
            raise lottery.LotteryError(f"round {number} trained again differs from the ledger in {what}")
    print(f"ok      round {number} trained again: {', '.join(compared)} are the ledger's, bit for bit")


def main(argv: list[str] | None = None) -> int:
    args = flags.parse(argv)
    if args.plan:
        print(f"{plan.table(args.recipe.epochs, args.prune_rate)}\n\n{plan.explained(args.recipe.epochs)}")
        return 0
    parallel.start(args.device)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        stack.callback(parallel.stop)
        if parallel.index():  # the first process speaks for all
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
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
