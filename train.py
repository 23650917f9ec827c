"""Find winning tickets: train dense, prune, rewind, repeat, and test every round against dense.

    python train.py --backbone rnnt --sparsity 0.9

lottery.py has the algorithm, docs/runs.md the files of a run folder, runner/settings.py what a run is made of.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    from lab import missing

    missing.in_one_line("train.py")

import torch
from tqdm import tqdm

import data
import lottery
import models
from audio_lottery import draws, files, ledger, verdicts
from audio_lottery.console import command, fail, printable
from audio_lottery.texts import TEXTS, save_texts
from lab import plan, report, rivals, scoring
from runner import flags, processes, recipes, retrain, settings
from runner.cache import Cache, load_examples, put_beside
from runner.clock import Place
from runner.folder import (
    Checkpoint,
    Checkpointer,
    Progress,
    Signals,
    Stopped,
    check_links,
    check_out,
    checkpoint_there,
    end,
    locked,
    rows_there,
    scalars_to,
)
from runner.settings import Setting

# ---------------------------------------------------------------------------- recognise


def recognise(
    model, examples: list[data.Example], tokens: list[str], batch_size: int, device: str, transcribe=None
) -> list[str]:
    """Transcripts, in the order of the examples: greedy, or as decode.transcriber(model, ...) does.

    Each process recognises its share of them.
    """
    share = examples[processes.index() :: processes.count()]
    texts = [""] * len(share)
    transcribe = transcribe or model.transcribe
    model.eval()
    with torch.inference_mode():
        for indices, batch in data.eval_batches(share, batch_size):
            batch = batch.to(device)
            for i, ids in zip(indices, transcribe(batch.features, batch.input_lengths)):
                texts[i] = data.decode(ids, tokens)
    shares = processes.gather(texts)
    return [shares[i % len(shares)][i // len(shares)] for i in range(len(examples))]


# ---------------------------------------------------------------------------- what is trained and tested on


class Corpus:
    """The splits as examples. Says aloud what training leaves out and what the tokens cannot spell."""

    def __init__(self, setting: Setting):
        self.setting, self.tokens, noise = setting, setting.tokens, setting.noise
        cached = isinstance(setting.cache, Cache)
        splits = processes.first_then_others(self.load) if cached else self.load()
        print(printable(f"data: {', '.join(f'{len(part)} {split}' for split, part in splits.items())} utterances"))
        self.train, self.valid = self.trainable(splits.pop("train")), splits.pop("valid")
        self.tests = splits  # by name; the first is what the verdicts are about
        self.heard = {name: setting.utterances[name] for name in splits}  # what they are examples of
        for split in ("valid", *self.tests):
            unseen = data.unseen_characters(setting.utterances[split], self.tokens)
            if unseen:
                counts = data.characters_told(unseen)
                print(f"data: {printable(split)} has characters that train has not, counted as errors: {counts}")
        if noise:
            print(f"noise: {noise}")
            for split, snr in itertools.product(list(self.tests), noise.test_snr):
                count, name = len(setting.utterances[split]), f"{split} at {snr:g} dB"
                mixes = [functools.partial(noise.for_test, snr=snr, index=i) for i in range(count)]
                self.tests[name] = self.examples(split, name, mixes=mixes, clean=self.tests[split])
                self.heard[name] = setting.utterances[split]

    def examples(self, split: str, name: str, **how) -> list[data.Example]:
        setting, kind, progress = self.setting, self.setting.model.features, f"features of {name}"
        utterances, workers = setting.utterances[split], setting.args.workers
        return load_examples(utterances, self.tokens, kind, progress, setting.cache, workers, **how)

    def load(self) -> dict[str, list[data.Example]]:
        noisy = self.setting.noise is not None and self.setting.noise.snr is not None
        found, broken = {}, []
        for split in self.setting.utterances:
            try:
                found[split] = self.examples(split, split, fresh=noisy and split == "train")
            except data.Broken as error:
                broken.append(error)
        if broken:
            hint = " (--skip-broken leaves those of train and valid out)" if {"train", "valid"} - found.keys() else ""
            raise data.DataError(f"{data.Broken(broken)}{hint}")
        load = functools.partial(self.examples, "train", "train at another speed", fresh=noisy)
        put_beside(found["train"], self.setting.args.recipe.speeds, load)
        return found

    def trainable(self, train: list[data.Example]) -> list[data.Example]:
        """Those of the recipe's lengths that CTC can align, in order."""
        low, high = self.setting.args.recipe.seconds
        long_enough = [e for e in train if low <= e.seconds <= high]
        shortest = [min((one.frames for one in e.at_speeds), default=e.frames) for e in long_enough]
        frames = self.setting.model.output_lengths(torch.tensor(shortest)).tolist()
        fits = [e for n, e in zip(frames, long_enough) if n >= max(2, data.frames_needed(e.targets))]  # 2: batch norm
        for gone, why in (
            (len(train) - len(long_enough), f"not between {low:g} and {high:g} s long"),
            (len(long_enough) - len(fits), "fewer encoder frames than CTC needs for the text"),
        ):
            if gone:
                print(f"data: {gone} train utterances left out of training: {why}")
        if not fits:
            raise data.DataError("no train utterance is left to train on (see the counts above)")
        return fits


# ---------------------------------------------------------------------------- one round of training


def train_round(
    ticket: lottery.Ticket, corpus: Corpus, setting: Setting, checkpointer: Checkpointer | None = None,
    checkpoint: Checkpoint | None = None, board=None, place: Place | None = None,
) -> Progress:  # fmt: skip
    """Train ticket.model to its last epoch, with a fresh optimizer, schedule and data order.

    It starts at the recipe's step ticket.first_step. Returns the progress, with the state of the epoch of the best
    valid WER, of those that end in it; of equals the later.
    checkpoint: in this round, to go on from.  board: takes scalars for TensorBoard.  place: of the round in its run.
    """
    model, at, args, recipe = ticket.model, Progress(), setting.args, setting.args.recipe
    ends, label, place = setting.epoch_ends(corpus.train), f"round {ticket.round}", place or Place(ticket.round)
    if isinstance(ticket, rivals.Gradual):
        at.before = ticket.spread(ends)
    optimizer, schedule = recipes.optimizer_of(model, recipe, ends)
    if checkpoint:
        at = checkpoint.restore(model, optimizer, schedule, args.device, recipe.epochs)
    elif ticket.first_step:
        begin_at(ticket.first_step, ends, model, corpus, setting, schedule, at)
    bar = tqdm(total=ends[-1], desc=place.title, unit="step", disable=True if processes.index() else None, leave=False)
    bar.update(schedule.last_epoch)
    bar.set_postfix_str(place.left(0.0, 0.0))
    started = said = time.monotonic()
    started -= at.seconds

    def step_done() -> None:
        at.seconds = time.monotonic() - started
        bar.update()
        if checkpointer:
            checkpointer.after_step(ticket, optimizer, schedule, at)

    for number in range(at.epoch, recipe.epochs):
        train_epoch(ticket, corpus, setting, optimizer, schedule, at, number, step_done)
        if not math.isfinite(at.loss):
            raise lottery.LotteryError(f"{label}, epoch {number + 1}: the loss is {at.loss}: try a lower --lr")
        ticket.check()
        if number < at.before:  # its masks still change
            at.epoch, at.batch, at.loss = number + 1, 0, 0.0
            continue
        validate(model, corpus, setting, at, trained_on(ticket, corpus, setting, ends, number))
        line = f"epoch {number + 1}/{recipe.epochs}, loss {at.losses[-1]:.2f}, valid WER {at.valid_wers[-1]:.3f}"
        line += f", {place.left((number + 1) / recipe.epochs, at.seconds)}"
        bar.set_postfix_str(line)
        if bar.disable and time.monotonic() - said > 30:  # in a log
            said = time.monotonic()
            print(f"  {place.title}, {line}", flush=True)
        if board:
            tell(board, label, number + 1, at, schedule)
        at.epoch, at.batch, at.loss, at.seconds = number + 1, 0, 0.0, time.monotonic() - started
        if checkpointer:
            checkpointer.after_step(ticket, optimizer, schedule, at)  # a signal during the evaluation
    bar.close()
    if checkpointer:
        checkpointer.save(ticket, optimizer, schedule, at)
    return at


def tell(board, label: str, epoch: int, at: Progress, schedule) -> None:
    """An epoch's scalars, for TensorBoard."""
    values = {"loss": at.losses[-1], "valid WER": at.valid_wers[-1], "learning rate": schedule.get_last_lr()[0]}
    for name, value in values.items():
        board.add_scalar(f"{name}/{label}", value, epoch)


def trained_on(ticket: lottery.Ticket, corpus: Corpus, setting: Setting, ends: list[int], number: int) -> int:
    """Utterances that epoch `number` trains on: all of them, or what is left where the round begins within it."""
    epoch, batches = recipes.epoch_and_batch(ends, ticket.first_step, setting.args.recipe)
    if number > epoch or not batches:
        return len(corpus.train)
    return sum(map(len, setting.epoch(corpus.train, number).chunks[batches:]))


def begin_at(
    step: int, ends: list[int], model: torch.nn.Module, corpus: Corpus, setting: Setting, schedule, at
) -> None:
    """Put a round's schedule, place in the data and generator of dropout where step `step` of the recipe finds them."""
    at.epoch, at.batch = recipes.epoch_and_batch(ends, step, setting.args.recipe)
    at.before = at.epoch
    schedule.last_epoch = step - 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a schedule's step before the optimizer's
        schedule.step()
    if not at.batch:
        return
    # What dropout has drawn by then hangs on the shapes of the batches before alone: they are passed through once more.
    state, device = lottery.copy_state(model), setting.args.device
    seed_dropout(setting, at.epoch)
    batches = setting.epoch(corpus.train, at.epoch, setting.args.recipe.augment).batches(0, setting.args.workers)
    model.train()
    for batch in itertools.islice(batches, at.batch):
        batch = batch.to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=setting.args.recipe.amp):
            model.loss(batch.features, batch.input_lengths, batch.targets, batch.target_lengths)
    lottery.load_state(model, state)  # batch norm's statistics


def seed_dropout(setting: Setting, epoch: int) -> None:
    torch.manual_seed(draws.torch_seed(setting.args.seed, epoch, draws.DROPOUT, processes.index()))


def train_epoch(
    ticket: lottery.Ticket, corpus: Corpus, setting: Setting, optimizer, schedule, at: Progress, number: int, step_done
) -> None:
    """Train from batch `at.batch` of epoch `number` to its end: the step that holds the ticket."""
    model, recipe = ticket.model, setting.args.recipe
    if at.batch == 0:  # else the generator stands where the checkpoint left it
        seed_dropout(setting, number)
    model.train()
    epoch = setting.epoch(corpus.train, number, recipe.augment)
    batches = epoch.batches(at.batch, setting.args.workers)
    while at.batch < len(epoch):
        optimizer.zero_grad()
        parts = range(at.batch, min(at.batch + recipe.accumulate, len(epoch)))
        loss = add_gradients(setting, epoch, parts, batches, at)
        ticket.hold()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        ticket.stepped()
        at.loss += processes.total(loss)
        at.batch = parts[-1] + 1
        step_done()


def add_gradients(setting: Setting, epoch: data.Epoch, parts: range, batches: Iterator, at: Progress) -> float:
    """Forward and backward over the batches `parts` of the epoch, which make up one step, as the next of `batches`.

    Gradients are of the mean loss over all of their utterances, in all processes. Returns the sum of this one's losses.
    A process without a share of a batch takes part with an utterance that weighs 0, in the loss and in batch norm.
    """
    device, loss_of = setting.args.device, setting.loss
    utterances, total = sum(len(epoch.chunks[i]) for i in parts), 0.0
    for i in parts:
        asked = time.monotonic()
        batch = next(batches)
        at.waited += time.monotonic() - asked
        batch = batch.to(device)
        with contextlib.nullcontext() if i == parts[-1] else processes.without_averaging(loss_of):
            processes.count_in_statistics(setting.model, epoch.weight(i) > 0)
            with torch.autocast(device, torch.bfloat16, enabled=setting.args.recipe.amp):
                loss = loss_of(batch.features, batch.input_lengths, batch.targets, batch.target_lengths)
            # a mean over this batch's share; DistributedDataParallel divides by the number of processes
            (loss * (epoch.weight(i) * processes.count() / utterances)).backward()
        total += loss.item() * epoch.weight(i)
    return total


def validate(model: torch.nn.Module, corpus: Corpus, setting: Setting, at: Progress, utterances: int) -> None:
    """The epoch's loss, a mean over its utterances, and valid WER; the state of the best epoch is kept."""
    hypotheses = recognise(model, corpus.valid, corpus.tokens, setting.args.recipe.batch_size, setting.args.device)
    at.losses.append(at.loss / utterances)
    at.valid_wers.append(scoring.rates([e.text for e in corpus.valid], hypotheses)["wer"])
    if ledger.best_epoch(at.valid_wers)[1] == len(at.valid_wers):
        at.best = lottery.copy_state(model)


# ---------------------------------------------------------------------------- the test


def evaluate_on_tests(setting: Setting, corpus: Corpus, dense: dict | None) -> tuple[dict, list[dict]]:
    """What a ledger row says of the first test set, and under "other_tests" of each other one; and what was recognised.

    dense: round 0's row. Round 0 itself also says who speaks each utterance and whether its text is one of train's
    (verdicts.about_utterances).  The texts: a line of test.jsonl an utterance, but for its round. --no-test: neither.
    """
    args, rows, texts = setting.args, {}, []
    for name, examples in corpus.tests.items():
        hypotheses = recognise(
            setting.model, examples, corpus.tokens, args.recipe.batch_size, args.device, setting.transcribe
        )
        found = scoring.rates([e.text for e in examples], hypotheses)
        row = rows[name] = {f"test_{key}": found[key] for key in ("wer", "cer", "errors", "words")}
        for i, (heard, said, counts) in enumerate(zip(corpus.heard[name], hypotheses, found["counts"])):
            audio = printable(heard.audio.name) + (f" from {heard.offset:.10g} s" if heard.offset is not None else "")
            about = {"test": name, "id": i, "audio": audio, "reference": heard.text, "hypothesis": said}
            texts.append(about | counts)
        if dense is not None:
            against = dense["other_tests"][name] if len(rows) > 1 else dense
            row |= verdicts.verdict_of(row["test_errors"], against["test_errors"], row["test_words"], args.margin)
        else:
            row |= verdicts.about_utterances(corpus.heard[name], setting.utterances["train"])
    if not rows:
        return {}, texts
    first, *others = rows
    row = rows[first] | {"verdict_rule": verdicts.VERDICT_RULE}
    return row | ({"other_tests": {name: rows[name] for name in others}} if others else {}), texts


def results(setting: Setting, corpus: Corpus, at: Progress, rows: list[dict], number: int) -> tuple[dict, list[dict]]:
    """What a ledger row says of a training and its test, and the texts of that; not tested again if `rows` has it."""
    started = time.monotonic()
    wer, epoch = ledger.best_epoch(at.valid_wers)
    row = {"epochs_before": at.before} if at.before else {}  # which do not count among valid_wers and losses
    row |= {"valid_wer": wer, "best_epoch": at.before + epoch, "valid_wers": at.valid_wers, "losses": at.losses}
    if setting.args.recipe.epochs != setting.config["epochs"]:
        row["epochs"] = setting.args.recipe.epochs
    there = number in [row["round"] for row in rows]
    tested, texts = ({}, []) if there else evaluate_on_tests(setting, corpus, rows[0] if number else None)
    row |= tested | ({"texts_sha256": ledger.hash_json(texts)} if texts else {})
    seconds = round(at.seconds + time.monotonic() - started, 1)
    return row | {"seconds": seconds, "waited": round(at.waited, 3), "resumed": at.resumed}, texts


# ---------------------------------------------------------------------------- the rounds


class Rounds:
    """The rounds of a run that are missing, in order, each a lottery.Found whose row has WER, CER and verdict.

    rows: the ledger so far; it grows between two rounds.
    """

    def __init__(
        self, setting: Setting, corpus: Corpus, rows: list[dict], checkpointer: Checkpointer,
        checkpoint: Checkpoint | None, board,
    ):  # fmt: skip
        self.setting, self.corpus, self.rows, self.board = setting, corpus, rows, board
        self.checkpointer, self.checkpoint = checkpointer, checkpoint
        self.trained: tuple[int, Progress] | None = None  # round and progress, between train() and evaluate()
        self.texts: list[dict] = []  # what the last round's tests recognised

    def of_round(self, number: int) -> Checkpoint | None:
        """The checkpoint, if it is in this round."""
        return self.checkpoint if self.checkpoint and self.checkpoint.about["round"] == number else None

    def search(self) -> Iterator[lottery.Found]:
        """Algorithm 1 with this recipe."""
        args = self.setting.args
        return lottery.find_ticket(
            self.setting.model, self.train, self.evaluate,
            sparsity=args.sparsity, prune_rate=args.prune_rate, rewind_step=args.rewind_step, pruning=args.pruning,
            exclude=args.keep_dense, rewind=args.control not in rivals.SEARCHES,
            resume=self.checkpoint.resume if self.checkpoint else None,
        )  # fmt: skip

    def train(self, ticket: lottery.Ticket) -> lottery.State:
        """What lottery.find_ticket asks for."""
        number = ticket.round
        here = settings.of_round(self.setting, self.corpus.train, number)
        at = self.train_one(ticket, here, self.rows[number - 1]["mask_sha256"] if number else None)
        self.trained = number, at
        return at.best

    def evaluate(self, _model: torch.nn.Module) -> dict:
        """What lottery.find_ticket asks for, behind train()."""
        number, at = self.trained
        row, self.texts = results(self.setting, self.corpus, at, self.rows, number)
        whole = self.setting.epoch_ends(self.corpus.train)[-1]
        steps = whole - (self.setting.args.rewind_step if number else 0)
        return row | {"steps": steps, "steps_in_all": whole + number * steps}

    def train_tickets(self) -> Iterator[lottery.Found]:
        """The tickets of --ticket, or their controls: nothing is pruned here."""
        setting = self.setting
        theta_0 = lottery.copy_state(setting.model)
        first = setting.rounds.index(self.checkpoint.about["round"]) if self.checkpoint else len(self.rows)
        for number in setting.rounds[first:]:
            lottery.load_state(setting.model, theta_0)
            here, ticket, about = settings.ticket_of(setting, number)
            here = settings.of_round(here, self.corpus.train, number)
            if checkpoint := self.of_round(number):
                checkpoint.resume(ticket)
            at = self.train_one(ticket, here, "")
            _, row = lottery.finish(ticket, at.best)
            tested, self.texts = results(here, self.corpus, at, self.rows, number)
            row |= about | tested | {"steps": ticket.steps - ticket.first_step}
            row |= {"steps_in_all": ticket.steps} if setting.args.control in rivals.TRAININGS else {}
            yield lottery.Found(ticket, row)

    def train_one(self, ticket: lottery.Ticket, setting: Setting, parent: str | None) -> Progress:
        """A round's training, from its checkpoint on if there is one. parent: hash of the round before's masks; None:
        this one's. Raises LotteryError unless all processes have the same masks and weights to start from."""
        masks = lottery.sha256(ticket.masks)
        hashes = processes.gather((masks, ticket.start_sha256))
        if len(set(hashes)) > 1:
            raise lottery.LotteryError(f"round {ticket.round}: the processes have other masks or weights: {hashes}")
        self.checkpointer.parent = masks if parent is None else parent
        self.say_empty(ticket)
        own = self.rows[1:] if self.setting.dense else self.rows
        place = Place(ticket.round, self.setting.rounds, [row["seconds"] for row in own])
        there = self.of_round(ticket.round)
        return train_round(ticket, self.corpus, setting, self.checkpointer, there, self.board, place)

    def say_empty(self, ticket: lottery.Ticket) -> None:
        """Name the layers that lost their last weight in this round."""
        before = self.rows[-1]["kept_per_layer"] if self.rows else {}
        for name, mask in ticket.masks.items():
            if not mask.any() and before.get(name, 1):
                what = "no weight is left in this layer (see --min-remaining)"
                print(f"  round {ticket.round}: {name}: {what}", flush=True)


# ---------------------------------------------------------------------------- the run


def run(args: argparse.Namespace, signals: Signals) -> None:
    """Everything that is missing of a run, in its folder."""
    if not processes.index():
        check_out(args.out)
    setting = settings.prepare(args)
    config, rounds = setting.config, len(setting.rounds)
    rows, corpus = rows_there(args.out, config, flags.NAMES), None
    print(printable("config: " + ", ".join(f"{key} {value}" for key, value in config.items())))
    if len(rows) < rounds:
        say_start(setting)
        corpus = Corpus(setting)
        settings.check_rewind_step(args, setting.epoch_ends(corpus.train)[-1], "only")
    processes.gather(None)  # all have looked into the folder before the first process writes there
    if not processes.index():
        args.out.mkdir(parents=True, exist_ok=True)
    with contextlib.nullcontext() if processes.index() else locked(args.out):
        rows = processes.gather(rows if processes.index() else rows_there(args.out, config, flags.NAMES))[0]  # again
        if len(rows) == rounds:
            print(printable(f"{args.out} is finished: nothing to train"))
            say_rows(rows)
        else:
            if not processes.index():
                check_links(args.out)
                if not (args.out / "config.json").exists():
                    files.write_atomically(args.out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
                (args.out / "ledger.jsonl").touch()
                (args.out / "masks").mkdir(exist_ok=True)
            train_all(setting, corpus, rows, signals)
        if not processes.index():
            end(args.out, rows)
    print("\n".join(map(printable, report.summary(setting.config, rows))))
    print(printable(f"{args.out}: ledger.jsonl, ticket.safetensors, report.md, report.png"))


def say_start(setting: Setting) -> None:
    model = setting.model
    device, several = setting.args.device, processes.told(setting.args.recipe)
    print(f"ops: {lottery.ops.path_on(device)}; device: {device}, {torch.get_num_threads()} threads{several}")
    everything = sum(p.numel() for p in model.parameters())
    total = sum(weight.numel() for weight in lottery.prunable(model, setting.args.keep_dense).values())
    rounds = f"{len(setting.rounds)} rounds, 0 (dense) to {setting.rounds[-1]}"
    print(f"model: {everything:,} parameters, {total:,} prunable; {rounds}")


def say_rows(rows: list[dict]) -> None:
    print("\n".join(map(report.text_line, [report.COLUMNS, *map(report.cells, rows)])), flush=True)


def train_all(setting: Setting, corpus: Corpus, rows: list[dict], signals: Signals) -> None:
    """All rounds that are missing; `rows` grows with the ledger."""
    args, out, first = setting.args, setting.args.out, not processes.index()
    config = ledger.settings_of(setting.config)
    run_sha256 = ledger.hash_json(config)
    checkpoint = checkpoint_there(out, rows, setting.rounds, run_sha256, bool(setting.dense))
    say_rows(rows)
    facts, tokens = setting.facts(), {"tokens": ledger.hash_json(setting.tokens)}
    earlier = checkpoint.other_facts(facts | tokens, rows) if checkpoint else {}
    processes.gather(None)  # all have read the checkpoint before the first process writes another
    signals.deferred = True
    checkpointer = Checkpointer(out, run_sha256, args.save_every, signals, checkpoint, not args.source)
    checkpointer.facts, checkpointer.earlier = facts | tokens, earlier
    board = scalars_to(out / "tensorboard") if args.tensorboard and first else None
    if setting.dense and not rows:
        ledger.append_row(out / "ledger.jsonl" if first else None, rows, setting.dense, config)
        where = setting.config["machine"]["dense"]
        print(printable(f"{report.text_line(report.cells(rows[0]))}  (the row of {where})"), flush=True)
    rounds = Rounds(setting, corpus, rows, checkpointer, checkpoint, board)
    for found in rounds.train_tickets() if args.source else rounds.search():
        info = setting.info(found.row)
        row = facts | found.row | {"info_sha256": ledger.hash_json(info)}
        row |= {"earlier": earlier[row["round"]]} if row["round"] in earlier else {}
        new = row["round"] not in [earlier["round"] for earlier in rows]
        if first:
            masks, rewinds = args.control != "dense-small", args.control not in rivals.UNREWOUND
            save_round(out, found.ticket, row["round"], info, masks, rewinds)
            if args.source and args.control not in ("random-init", "dense-small"):
                save_start(out, found.ticket, run_sha256)
            if new:
                save_texts(out / TEXTS, row["round"], rounds.texts)
        ledger.append_row(out / "ledger.jsonl" if first else None, rows, row, config)
        if new:
            print(report.text_line(report.cells(row)), flush=True)
            for key in ("test_wer", "test_cer") if board and "test_wer" in row else ():
                board.add_scalar(key, row[key], row["round"])
        number = processes.largest(signals.number)
        if number:  # came during the test: the round's checkpoint is there
            raise Stopped(number)
    signals.deferred = False
    if board:
        board.close()


def save_round(out: Path, ticket: lottery.Ticket, number: int, info: dict, masks: bool, rewinds: bool) -> None:
    """The round's masks, and its ticket in place of the last round's; rewinds: with its rewind state. Of round 0 the
    dense network, too, which stays."""
    if number and masks:
        files.save_masks(out / "masks" / f"{number:02d}.safetensors", ticket.masks)
    if not number:
        files.save_ticket(out / "dense.safetensors", ticket.masks, None, lottery.state_of(ticket.model), info)
    rewind = ticket.rewind_state if rewinds else None
    files.save_ticket(out / "ticket.safetensors", ticket.masks, rewind, lottery.state_of(ticket.model), info)


def save_start(out: Path, ticket: lottery.Ticket, run_sha256: str) -> None:
    """What all rounds of --ticket but round 0 start from, less what their masks remove: verify compares it."""
    path = out / "rewind.safetensors"
    if ticket.round and not path.exists():
        files.write_sealed(path, "rewind state", ticket.rewind_state, {"run": run_sha256})


def train_again(run: Path, number: int, cache: str | Path = "memory") -> None:
    """Train a round of a finished run again and compare bit for bit. Raises retrain.Differs if anything does.

    cache: of this command, and no other: what the run's configuration names is not written to.
    """
    there = retrain.read(run, number, cache)
    setting, ticket = retrain.prepare(there)
    corpus = Corpus(setting)
    at = train_round(ticket, corpus, settings.of_round(setting, corpus.train, number))
    found = retrain.found(there, ticket, at)
    lottery.load_state(setting.model, at.best)
    tested = evaluate_on_tests(setting, corpus, there.rows[0] if number else None)[0]
    found |= tested if verdicts.of_this_rule(there.row) else verdicts.without_verdicts(tested)
    print(retrain.compare(there, found))


@command("train.py", goes_on=True)
def main(argv: list[str] | None = None) -> int:
    args = flags.parse(argv)
    try:
        if args.plan:
            epochs = {name: args.epochs or recipes.RECIPES[name, "paper"].epochs for name in models.BACKBONES}
            print(f"{plan.table(epochs, args.prune_rate)}\n\n{plan.explained()}")
            return 0
        processes.start(args.device)
    except lottery.LotteryError as error:
        return fail("train.py", error)
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(Signals())
        stack.callback(processes.stop)
        if processes.index():  # the first process speaks for all
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        try:
            if args.retrain:
                train_again(*args.retrain, args.cache)
            else:
                run(args, signals)
        except (data.DataError, lottery.LotteryError, OSError) as error:
            code = fail("train.py", error)
            return 1 if isinstance(error, retrain.Differs) else code
        except Stopped as stopped:
            signals.over = True  # another one must not end what is said here
            if not processes.index():
                print(printable(stopped.told(sys.argv[1:] if argv is None else argv)), file=sys.stderr)
            return 128 + stopped.number
    return 0


if __name__ == "__main__":
    sys.exit(main())
