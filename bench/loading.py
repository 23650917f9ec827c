"""`python -m bench data` and `python -m bench save`: features, their cache, waiting for them, and checkpoints."""

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
import threading
from pathlib import Path

import soundfile
import torch

import data
import lottery
import models
import train
from audio_lottery import ledger, sound
from bench.measure import HERE, in_a_process, in_turns, memory, stop, timed
from runner import cache
from runner.folder import Checkpointer, Progress, Signals

DEMO = HERE / "demo"


def bench_data(args: argparse.Namespace) -> None:
    """Features an hour and core, and the share of training that waits for the cache."""
    torch.set_num_threads(1)
    utterances = data.read_corpus(DEMO)["train"]
    minutes = sum(u.duration for u in utterances) / 60
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flac = as_flac(utterances, folder)
        for form, corpus in (("Opus", utterances), ("FLAC", flac)):
            bench_features(form, corpus, minutes / 60, args.repeats)
        bench_cache(flac, data.tokens_of(utterances), folder / "cache", minutes)
        bytes_of = {}
        for copies in (1, 16):
            code = "from pathlib import Path; from bench import loading; "
            code += f"loading.memory_of_cached_training(Path({name!r}), {copies})"
            bytes_of[copies] = int(in_a_process(code).split()[-1])
        told = ", ".join(f"{n * minutes:.0f} minutes {size / 1e6:.0f} MB" for n, size in bytes_of.items())
        print(f"training from the cache, peak memory: {told}", flush=True)
        bench_waiting(folder)


def as_flac(utterances: list[data.Utterance], folder: Path) -> list[data.Utterance]:
    flac = []
    for i, u in enumerate(utterances):
        flac.append(dataclasses.replace(u, audio=folder / f"{i}.flac"))
        soundfile.write(flac[-1].audio, sound.load_audio(u.audio).numpy(), data.SAMPLE_RATE)
    return flac


def bench_features(form: str, corpus: list[data.Utterance], hours: float, repeats: int) -> None:
    for kind in data.FEATURES:
        seconds = statistics.median(
            timed(lambda: [data.features_of(u, kind) for u in corpus])  # noqa: B023
            for _ in range(repeats)
        )
        print(f"{form} to {kind}, one core: {hours * 3600 / seconds:,.0f} hours of audio an hour", flush=True)


def bench_cache(corpus: list[data.Utterance], tokens: list[str], folder: Path, minutes: float) -> None:
    kept = cache.Cache(folder)
    for start in ("first", "second"):
        cache._opened.cache_clear()
        seconds = timed(lambda: cache.load_examples(corpus, tokens, "log-mel", "", kept))
        print(f"cache, {start} start: {seconds:.2f} s for {minutes:.0f} minutes of audio", flush=True)


# ---------------------------------------------------------------------------- training from the cache


def demo_rows(split: str) -> list[dict]:
    """Of the demo's manifest, with paths that hold from anywhere."""
    rows = [json.loads(line) for line in (DEMO / f"{split}.jsonl").read_text().splitlines()]
    return [row | {"audio_filepath": str(DEMO / row["audio_filepath"])} for row in rows]


def write_manifest(folder: Path, split: str, rows: list[dict]) -> None:
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def train_quietly(argv: list[str]) -> None:
    """An epoch of a dense round, without its lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = train.main([*argv, "--epochs", "1", "--sparsity", "0"])
    if code:
        stop("the run failed")


def memory_of_cached_training(folder: Path, copies: int) -> None:
    """Child process: an epoch from the cache on `copies` times the demo's train set; print the peak of its own memory.

    Anonymous memory: pages of files are the system's to take back.
    """
    rows = demo_rows("train")
    for split in ("train", "valid", "test"):
        write_manifest(folder, split, rows * copies if split == "train" else rows[:4])
    seen, done = [], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen.append(memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    argv = ["--data", str(folder), "--cache", str(folder / "cache"), "--out", str(folder / f"run{copies}")]
    try:
        train_quietly([*argv, "--seconds", "0:3"])
    finally:
        done.set()
        watcher.join()
    print(max(seen))


def bench_waiting(folder: Path) -> None:
    """The share of training that waits for the cache in `folder`: at demo and, of fewer utterances, at paper size."""
    few = folder / "few"
    few.mkdir()
    for split, count in (("train", 24), ("valid", 4), ("test", 4)):
        write_manifest(few, split, demo_rows(split)[:count])
    for size, corpus, batch in (("demo", "demo", "8"), ("paper", str(few), "4")):
        for backbone in models.BACKBONES:
            for workers in (0, 1):
                out = folder / f"{backbone}{size}{workers}"
                argv = ["--backbone", backbone, "--size", size, "--data", corpus, "--batch-size", batch]
                argv += ["--seconds", "0:15", "--workers", str(workers), "--cache", str(folder / "cache")]
                train_quietly([*argv, "--out", str(out)])
                (row,) = ledger.read_ledger(out / "ledger.jsonl")
                share = row["waited"] / row["seconds"]
                print(
                    f"{backbone} {size} from the cache, {workers} workers: waits for data {share:.2%} of the time",
                    flush=True,
                )


# ---------------------------------------------------------------------------- saving


def bench_save(args: argparse.Namespace) -> None:
    """What a checkpoint costs: of a step's time, every 5 minutes."""
    torch.manual_seed(0)
    backbone = args.backbone or "rnnt"
    model = models.build(backbone, args.size, 29)
    ticket, optimizer = lottery.Ticket(model), torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    at = Progress(best=lottery.copy_state(model))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpointer = Checkpointer(Path(folder), "", None, Signals(), None)

        def save() -> None:
            checkpointer.save(ticket, optimizer, schedule, at)

        save()  # writes the rewind state too
        seconds = in_turns("cpu", args.repeats, save=save)["save"]
        size = (Path(folder) / "checkpoint.safetensors").stat().st_size
    print(
        f"{backbone} {args.size}: a checkpoint of {size / 1e6:.1f} MB in {seconds:.3f} s: {seconds / 300:.2%} of "
        "the time at one every 5 minutes"
    )
