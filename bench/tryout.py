"""A look at a ticket: what it hears in test recordings, its WER, and what sparse products gain. For `make try`."""

import argparse
import math
import time
from pathlib import Path

import torch

import data
import train
from audio_lottery import compression, files
from audio_lottery.console import printable
from lab import choice, scoring
from runner.cache import load_examples
from transcribe import load

HERE = Path(__file__).resolve().parents[1]
TICKET, DATA = HERE / "tickets" / "demo-rnnt.safetensors", HERE / "demo"
SHOWN, BATCH, TURNS = 6, 8, 3  # recordings that are shown; utterances at once; times that each way is timed
CLOSING = (
    "A quarter of an hour of speech teaches a network no more than this. Where tickets stand on AN4, 38 minutes of "
    "speech with an official test of other speakers: RESULTS.md and docs/an4.md."
)


def shares(ticket: files.TicketFile) -> str:
    kept, total = (sum(int(f(mask)) for mask in ticket.masks.values()) for f in (lambda m: m.sum(), torch.numel))
    return f"{kept / total:.1%} of {total:,} prunable weights kept"


def bench_try(args: argparse.Namespace) -> None:
    """One ticket on the test set of --data. Raises LotteryError or DataError, naming the file, for what is none."""
    path = (args.ticket or [TICKET])[0]
    folder = DATA if args.data == Path("demo") else args.data
    model, ticket = load(path)
    utterances = data.read_manifest(folder / "test.jsonl")
    examples = load_examples(utterances, ticket.info["tokens"], model.features)
    first = torch.nn.utils.rnn.pad_sequence([e.features for e in examples[:BATCH]], True)[:, : choice.FRAMES]
    lengths = torch.tensor([min(e.frames, choice.FRAMES) for e in examples[:BATCH]])
    with torch.inference_mode():
        found = choice.choose(model, ticket.masks, lambda m: m.emissions(first, lengths), math.inf, use="pieces")
    dense = compression.compress(model, ticket.masks, chosen={})[0]
    took, texts = {}, {}
    for name in ("dense", "sparse") * TURNS:
        started = time.perf_counter()
        user = {"dense": dense, "sparse": found.model}[name]
        texts[name] = train.recognise(user, examples, ticket.info["tokens"], BATCH, "cpu")
        took[name] = min(took.get(name, math.inf), time.perf_counter() - started)
    name = path.relative_to(HERE) if path.is_relative_to(HERE) else path
    print(f"{printable(name)}: {ticket.info['backbone']}, {shares(ticket)}\n")
    for at in range(0, len(utterances), -(-len(utterances) // SHOWN)):
        print(f"  said   {printable(utterances[at].text)}\n  heard  {printable(texts['sparse'][at])}\n")
    print(rate([utterance.text for utterance in utterances], texts["sparse"]))
    gain = f"{took['dense'] / took['sparse']:.1f} times as fast" if found.sparse else "no layer is faster sparse here"
    same = f"{sum(map(str.__eq__, texts['sparse'], texts['dense']))} of {len(examples)} texts the same"
    ways = f"{took['sparse']:.2f} s sparse, {took['dense']:.2f} s dense"
    print(f"speed  {sum(example.seconds for example in examples):.0f} s of audio in {ways}: {gain}; {same}")
    print(f"       {printable(found.told)}; threads: {torch.get_num_threads()}")
    parts, whole = files.parts(path, ticket), files.dense_bytes(ticket.trained)
    size = sum(count for part, count in parts.items() if not part.startswith("rewind"))
    small = f"{size / 1e6:.2f} MB as a ticket, {whole / 1e6:.2f} MB as a dense checkpoint"
    print(f"size   {small}: {whole / size:.1f} times smaller\n\n{CLOSING}")


def rate(references: list[str], texts: list[str]) -> str:
    """WER, and its interval: a bootstrap over utterances."""
    found = scoring.rates(references, texts)
    told = scoring.rate(found["errors"], found["words"])
    return f"WER    {told}, a 95 % interval over other utterances; {len(texts)} test recordings"
