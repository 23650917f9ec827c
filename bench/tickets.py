"""`python -m bench infer --ticket T ...`: trained tickets on their test set, beside dense networks and dense int8.

A ticket that keeps all weights, such as a run's dense.safetensors, is a dense network: it is measured in torch, and in
the int8 of torch.ao and of onnxruntime. Others are compressed. One thread, one utterance at a time, features not
counted; the ways take turns in one process, so that what counts is the ratio.
"""

import argparse
import copy
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import data
import models
import train
from audio_lottery import compression, files, sound, sparse, verdicts
from audio_lottery.console import printable
from bench import infer
from bench.measure import in_turns, stop
from lab import export, pictures, scoring
from runner.cache import load_examples
from transcribe import load


def onnxruntime_int8(model: nn.Module, tokens: list[str]) -> tuple[nn.Module, int]:
    """The model with its heavy parts in onnxruntime, from graphs as --export writes them, quantized; and their bytes.

    It takes one utterance at a time. A transducer's encoder is in onnxruntime; its loop is ours, in float32.
    """
    runs, size = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export.export(model, tokens, path)
        for part, graph in export.paths_of(model, path).items():
            small = infer.int8_graph(graph.read_bytes())
            size += len(small)
            if part in ("", "encoder"):
                runs[part] = functools.partial(run_session, infer.session_of(small))
    other = copy.copy(model)
    if not isinstance(model, models.Transducer):

        def forward(features: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            (log_probs,) = runs[""](features)
            return log_probs, torch.tensor([log_probs.shape[1]])

        other.forward = forward
        return other, size

    other.encode = lambda features, lengths: (runs["encoder"](features)[0], lengths)
    other.every_second = lambda encoded, _: (encoded, torch.tensor([encoded.shape[1]]))  # done by the graph
    return infer.with_our_loop(other, model), size


def run_session(session, *arguments: torch.Tensor) -> list[torch.Tensor]:
    given = {value.name: argument.numpy() for value, argument in zip(session.get_inputs(), arguments)}
    return [torch.from_numpy(out) for out in session.run(None, given)]


MASKED = ", masked in torch"  # a ticket as dense as it was trained: what its compressed forms are held against


def ways_of(model: nn.Module, ticket: files.TicketFile, run: Callable) -> Iterator[tuple[str, infer.Way, list]]:
    """What is measured of a ticket, in torch first: its name, and what each layer took where it is compressed."""
    size = infer.saved_bytes(model)

    def looped(way: nn.Module) -> nn.Module:  # a transducer decodes by our compiled loop in every way
        return infer.with_our_loop(copy.copy(way), model) if isinstance(model, models.Transducer) else way

    kept, total = (sum(int(f(mask)) for mask in ticket.masks.values()) for f in (lambda m: m.sum(), torch.numel))
    if kept == total:
        yield "dense, torch float32", infer.Way(looped(model), size, size), []
        if any(hasattr(module, "fused_parts") for module in model.modules()):  # a ticket's gain by it is not sparsity's
            fused, _ = compression.compress(model, ticket.masks, chosen={})
            yield "dense, fused", infer.Way(fused, size, size), []
        linear = infer.to_quantize(model)
        small = infer.quantized(linear)
        size = infer.saved_bytes(small)
        yield "dense, torch.ao int8", infer.Way(looped(small), size, size), []
        try:
            small, size = onnxruntime_int8(linear, ticket.info["tokens"])
        except (ImportError, data.DataError) as error:
            print(f"  onnxruntime: not here ({error})")
        else:
            yield "dense, onnxruntime int8", infer.Way(small, size, size), []
        return
    block = ticket.info.get("block")
    name = f"{kept / total:.1%}, {'x'.join(map(str, block)) if block else 'single weights'}"
    yield name + MASKED, infer.Way(looped(model), size, size), []
    disk = infer.ticket_bytes(model, ticket.masks)
    for dtype in sparse.DTYPES:
        user, rows = compression.compress(model, ticket.masks, run, dtype=dtype)
        yield f"{name}, {dtype}", infer.Way(user, disk, compression.resident_bytes(user)), rows


def bench_tickets(args: argparse.Namespace) -> None:
    """Texts, WER with its interval, bytes and time of each way. Draws time and WER side by side with --picture."""
    if args.picture:
        files.check_target(args.picture)  # before minutes are spent
    infer.begin()
    runs, cells, first, counts = {}, {}, None, {}
    for path in args.ticket:
        model, ticket = load(path)
        tokens = ticket.info["tokens"]
        examples = load_examples(data.read_corpus(args.data)["test"], tokens, model.features)
        references, seconds = [example.text for example in examples], sum(e.frames for e in examples)
        middle = sorted(examples, key=lambda e: e.frames)[len(examples) // 2].features[None]
        run = functools.partial(infer.transcribe, utterances=(middle, torch.tensor([middle.shape[1]])))
        print(f"\n{printable(path)}: {ticket.info['backbone']}, {len(examples)} utterances", flush=True)
        wanted = None
        for name, way, rows in ways_of(model, ticket, run):
            label = printable(f"{files.ticket_path(path).parent.name}: {name}")
            if label in runs:
                stop(f"two tickets would both be called {label}: copy one to a folder of another name")
            said = train.recognise(way.model, examples, tokens, 1, "cpu")
            wanted = wanted or said
            if rows and name.endswith(", float32"):
                print("\n".join(f"    {row}" for row in rows))
            if name.endswith((", float32", ", fused")) and said != wanted:
                stop(f"{name}: the texts are not those of the model in torch")
            first = first or label
            counts[label] = scoring.rates(references, said)
            print(f"    {name}: WER {counts[label]['wer']:.3f}", flush=True)
            cells[label] = way, sum(map(str.__eq__, said, wanted)), seconds * sound.FRAME_SECONDS
            runs[label] = functools.partial(train.recognise, way.model, examples, tokens, 1, "cpu")
    took = in_turns("cpu", max(3, args.repeats // 4), **runs)
    print("\nWER with 95 % over other utterances, texts as in torch, kB on the disk and resident, real-time factor,")
    print(f"times over {first}")
    bars = []
    for name, (way, equal, seconds) in cells.items():
        errors, words = counts[name]["errors"], counts[name]["words"]
        factor, gain = took[name] / seconds, took[first] / took[name]
        print(
            f"  {name:52} {scoring.rate(errors, words)}  {equal:3}  {way.disk / 1e3:7.0f} {way.resident / 1e3:7.0f}  "
            f"{factor:.5f}  {gain:5.2f} x"
        )
        if not name.endswith(MASKED):
            bars.append((name, 1e3 * factor, sum(errors) / sum(words), *verdicts.interval(errors, words)))
    if args.picture:
        pictures.draw_in_use(args.picture, bars)
