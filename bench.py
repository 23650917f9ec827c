"""Side-by-side measurements: `python bench.py ops` validates first and then times. Tables go to RESULTS.md.

All figures of a row come from one process, in turns, as medians; what counts is the ratio.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import nn
from torch.nn.utils import prune

import data
import flags
import ledger
import lottery
import models
import operators
import runs
import train


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(device: str, repeats: int, **functions) -> dict[str, float]:
    """Median seconds of each function, called in turns after one warm-up each."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = clock(device)
            function()
            if turn:
                times[name].append(clock(device) - start)
    return {name: statistics.median(values) for name, values in times.items()}


def memory(key: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM at most so far (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def peak_memory(function) -> int:
    """Bytes of resident memory that a call adds at its peak, over what was there before (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # so that the call cannot live on memory freed before it
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM, the high-water mark
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


# ---------------------------------------------------------------------------- ops

BLOCKS = [(1, 4), (8, 1), (16, 1)]  # rows x columns


def cnn_lstm_weights(hidden: int, device: str) -> list[torch.Tensor]:
    """The pruned weights of the paper's CNN-LSTM (hidden 1024) or a narrower one, at theta_0 plus a little training.

    Layers differ in scale as they do in the network: the bounds of theta_0 lie between 0.0116 and 0.047.
    """
    torch.manual_seed(0)
    model = models.CnnLstm(29, **{**models.CnnLstm.SIZES["paper"], "hidden": hidden})
    weights = [w.detach() for w in lottery.prunable(model).values()]
    return [(w + torch.randn_like(w) * 0.3 * w.std()).to(device) for w in weights]


def masks_of_round(weights: list[torch.Tensor], rounds: int) -> list[torch.Tensor]:
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    total = sum(w.numel() for w in weights)
    for r in range(1, rounds + 1):
        masks = lottery.ops.global_magnitude_masks(weights, masks, lottery.kept_after(total, r, 0.2))
    return masks


class Holder(nn.Module):
    """One weight, as torch.nn.utils.prune wants it."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.clone())


def torch_prune(weights: list[torch.Tensor], masks: list[torch.Tensor], keep: int) -> float:
    """Seconds of one torch.nn.utils.prune.global_unstructured to `keep` weights."""
    holders = [Holder(w) for w in weights]
    if not all(bool(m.all()) for m in masks):
        for holder, mask in zip(holders, masks):
            prune.custom_from_mask(holder, "weight", mask)
    amount = sum(int(m.sum()) for m in masks) - keep
    start = clock(weights[0].device.type)
    prune.global_unstructured([(h, "weight") for h in holders], prune.L1Unstructured, amount=amount)
    return clock(weights[0].device.type) - start


def numpy_masks(weights: list[torch.Tensor], removed: int) -> list[np.ndarray]:
    """What a user of numpy.partition writes for the same masks (ties aside)."""
    magnitudes = [np.abs(w.numpy()) for w in weights]
    threshold = np.partition(np.concatenate([m.ravel() for m in magnitudes]), removed)[removed]
    return [m >= threshold for m in magnitudes]


def validate_ops(device: str) -> None:
    torch.manual_seed(0)
    for levels in (10**6, 3):
        weights = [(torch.randint(-levels, levels, (n,)) / levels).to(device) for n in (1, 100_003, 2_000_000)]
        masks = [torch.rand_like(w) < 0.9 for w in weights]
        keep = sum(int(m.sum()) for m in masks) // 2
        ours = lottery.ops.global_magnitude_masks(weights, masks, keep)
        reference = operators.reference_global_magnitude_masks(weights, masks, keep)
        if not all(torch.equal(a, b) for a, b in zip(ours, reference)):
            sys.exit("bench.py: the compiled masks differ from the reference: nothing was timed")
        held, by_hand = [w.clone() for w in weights], [w.clone() for w in weights]
        lottery.ops.hold_ticket_(held, [], masks)
        operators.reference_hold_ticket_(by_hand, [], masks)
        if not all(torch.equal(a, b) for a, b in zip(held, by_hand)):
            sys.exit("bench.py: the held weights differ from the reference: nothing was timed")
        matrices = [w[: len(w) // 101 * 101].view(-1, 101) for w in weights[1:]]
        for block in BLOCKS:
            ours = lottery.ops.block_norms(matrices, *block)
            if not all(map(torch.equal, ours, operators.reference_block_norms(matrices, *block))):
                sys.exit("bench.py: the block norms differ from the reference: nothing was timed")
    print(f"validated against the reference on {device}: masks, held weights and block norms equal, bit for bit")


def falls_back(weights: list[torch.Tensor]) -> dict[str, tuple[list[torch.Tensor], int]]:
    """Weights and a keep for each way in which the CPU operator misses its fast path.

    ties: two magnitudes, cut between them. between: the same and five weights between the two, where the cut falls and
    which no sample sees. misled: every place of the first sample holds a magnitude far above all others.
    """
    total = sum(w.numel() for w in weights)
    tied = [torch.where(w > 0, 1.0, 2.0).to(w.dtype) for w in weights]
    keep = sum(int((w == 2).sum()) for w in tied)
    between = [w.clone() for w in tied]
    between[0].view(-1)[between[0].flatten().eq(1).nonzero()[:5]] = 1.5
    misled = torch.cat([w.flatten() for w in weights])
    n = int(min(max(0.7 * total ** (2 / 3), (3 * total / (0.7 * 3 * 2**19)) ** 2) + 1, 2**22))  # as sample_bracket
    stride = total // min(n, total)
    j = torch.arange(total // stride, device=misled.device)
    misled[j * stride + (j * 2654435761 % 2**32 * stride >> 32)] += 1000
    misled = [part.view_as(w) for part, w in zip(misled.split([w.numel() for w in weights]), weights)]
    return {"ties": (tied, keep), "between": (between, keep + 3), "misled": (misled, total // 2)}


def bench_pruning(device: str, hidden: int, rounds: int, repeats: int, peers: bool) -> str:
    weights = cnn_lstm_weights(hidden, device)
    total = sum(w.numel() for w in weights)
    masks = masks_of_round(weights, rounds - 1)
    keep = lottery.kept_after(total, rounds, 0.2)
    dense = [torch.ones_like(m) for m in masks]
    ties, between, misled = falls_back(weights).values()
    functions = {
        "ours": lambda: lottery.ops.global_magnitude_masks(weights, masks, keep),
        "ties": lambda: lottery.ops.global_magnitude_masks(ties[0], dense, ties[1]),
        "read": lambda: [w.sum() for w in weights],  # not next to ours, which would leave the weights in the cache
        "between": lambda: lottery.ops.global_magnitude_masks(between[0], dense, between[1]),
        "misled": lambda: lottery.ops.global_magnitude_masks(misled[0], dense, misled[1]),
    }
    t = in_turns(device, repeats, **functions)
    line = f"{total / 1e6:6.1f} M  round {rounds:2d}  {torch.get_num_threads()} threads  ours {t['ours'] * 1e3:8.2f} ms"
    line += f"  {t['ours'] / t['read']:5.2f} reads  fall-back"
    line += "".join(f" {name} {t[name] / t['read']:5.2f}" for name in ("ties", "between", "misled")) + " reads"
    if device == "cpu":
        extra = peak_memory(functions["ours"]) - total
        line += f"  extra memory {extra / 1e6:5.1f} MB"
        joined = torch.cat([w.flatten() for w in weights]).abs().numpy()
        partition = statistics.median(_timed(lambda: np.partition(joined, total - keep)) for _ in range(5))
        whole = statistics.median(_timed(lambda: numpy_masks(weights, total - keep)) for _ in range(5))
        line += f"  numpy.partition {partition / t['ours']:5.1f} x, with join, abs and masks {whole / t['ours']:5.1f} x"
    if peers:
        line += f"  torch.nn.utils.prune {torch_prune(weights, masks, keep) / t['ours']:7.0f} x"
    return line


def bench_blocks(device: str, hidden: int, repeats: int) -> str:
    """The norms alone, and pruning dense weights to 80 % of their blocks with them, both in reads of the weights."""
    weights = cnn_lstm_weights(hidden, device)
    functions = {}
    for rows, columns in BLOCKS:
        norms = lottery.ops.block_norms(weights, rows, columns)
        masks, keep = [torch.ones_like(n, dtype=torch.bool) for n in norms], round(0.8 * sum(n.numel() for n in norms))

        def prune_blocks(block=(rows, columns), masks=masks, keep=keep) -> None:
            lottery.ops.global_magnitude_masks(lottery.ops.block_norms(weights, *block), masks, keep)

        functions[f"{rows}x{columns}"] = lambda block=(rows, columns): lottery.ops.block_norms(weights, *block)
        functions[f"{rows}x{columns} and masks"] = prune_blocks
    t = in_turns(device, repeats, read=lambda: [w.sum() for w in weights], **functions)
    line = f"{sum(w.numel() for w in weights) / 1e6:6.1f} M  {torch.get_num_threads()} threads"
    return line + "".join(f"  {name} {t[name] / t['read']:5.2f}" for name in functions) + " reads"


def _timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bench_holding(device: str, hidden: int, rounds: int, repeats: int) -> tuple[str, float]:
    weights = cnn_lstm_weights(hidden, device)
    masks = masks_of_round(weights, rounds)
    lottery.ops.hold_ticket_(weights, [], masks)
    grads = [torch.randn_like(w) for w in weights]
    from_weights, from_grads = [w.clone() for w in weights], [g.clone() for g in grads]

    def copy() -> None:
        for to, source in zip(weights + grads, from_weights + from_grads):
            to.copy_(source)

    # Each turn's copy restores the gradients, as backward() overwrites them; the weights are held already.
    t = in_turns(
        device,
        repeats,
        copy=copy,
        ours=lambda: lottery.ops.hold_ticket_(weights, grads, masks),
        copy_again=copy,
        foreach=lambda: (torch._foreach_mul_(weights, masks), torch._foreach_mul_(grads, masks)),
    )
    total = sum(w.numel() for w in weights)
    line = f"{total / 1e6:6.1f} M  round {rounds:2d}  {torch.get_num_threads()} threads  ours {t['ours'] * 1e3:8.2f} ms"
    line += f"  {t['ours'] / t['copy']:5.2f} copies  torch._foreach_mul_ {t['foreach'] / t['ours']:5.1f} x"
    return line, t["ours"]


def training_step(device: str) -> float:
    """Median seconds of a step of the paper's CNN-LSTM: 4 utterances of 5 s, AdamW, no ticket held."""
    torch.manual_seed(0)
    model = models.build("cnn-lstm", "paper", 29).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
    features, lengths = torch.randn(4, 500, 161, device=device), torch.full((4,), 500, device=device)
    targets, target_lengths = torch.randint(1, 29, (4, 60), device=device), torch.full((4,), 60, device=device)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(features, lengths, targets, target_lengths).backward()
        optimizer.step()

    return in_turns(device, 3, step=step)["step"]


def bench_ops(args: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, ops: {lottery.ops.path}")
    if "pure" in lottery.ops.path:
        sys.exit("bench.py: the extension is not built: there is nothing to time against the reference")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() and "CUDA" in lottery.ops.path else [])
    if devices == ["cpu"]:
        print("no GPU here: CUDA not timed")
    for device in devices:
        validate_ops(device)
        for threads in (1, 2) if device == "cpu" else (torch.get_num_threads(),):
            torch.set_num_threads(threads)
            print(f"\n{device}: pruning to the next round's count (global_magnitude_masks)")
            for hidden in (58, 294, 1024):
                for rounds in (1, 10):
                    print(bench_pruning(device, hidden, rounds, args.repeats, args.peers), flush=True)
            print(f"\n{device}: pruning blocks (block_norms, then global_magnitude_masks on the norms)")
            for hidden in (58, 294, 1024):
                print(bench_blocks(device, hidden, args.repeats), flush=True)
            print(f"\n{device}: holding weights and gradients (hold_ticket_)")
            for hidden in (58, 294, 1024):
                for rounds in (1, 10):
                    line, seconds = bench_holding(device, hidden, rounds, args.repeats)
                    print(line, flush=True)
            step = training_step(device)
            print(f"a training step at paper size: {step:.2f} s; holding is {seconds / step:.2%} of it", flush=True)


# ---------------------------------------------------------------------------- train


class OfficialBiLstm(nn.Module):
    """A layer as the official code runs it: nn.LSTM over packed sequences, the two directions summed."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]
        return out.unflatten(-1, (2, -1)).sum(2)


def official_cnn_lstm(size: str) -> nn.Module:
    """models.CnnLstm with packed layers, every prunable weight under torch.nn.utils.prune at 20 % remaining."""
    model = models.build("cnn-lstm", size, 29)
    for i, lstm in enumerate(model.lstms):
        model.lstms[i] = OfficialBiLstm(lstm.ahead.input_size, lstm.ahead.hidden_size)
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.dim() > 1 and "bias" not in name:
                prune.custom_from_mask(module, name, torch.rand_like(weight) < 0.2)
    return model


def training_run(way: str, size: str, steps: int) -> None:
    """Child process: print the median seconds of a step, of holding and of pruning, and the peak memory in bytes.

    Both ways keep theta_0 in memory, to rewind to.
    """
    torch.manual_seed(0)
    features, lengths = torch.randn(4, 500, 161 if size == "paper" else 80), torch.tensor([500, 470, 440, 400])
    targets, target_lengths = torch.randint(1, 29, (4, 60)), torch.tensor([60, 55, 50, 45])
    before = memory("VmRSS")
    hold = []
    if way == "official":
        model, ticket = official_cnn_lstm(size), None
        theta_0 = [parameter.detach().clone() for parameter in model.parameters()]
    else:
        model = models.build("cnn-lstm", size, 29)
        ticket = lottery.Ticket(model)
        ticket.masks = {name: torch.rand_like(w) < 0.2 for name, w in ticket.weights.items()}
        ticket.rewind()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(features, lengths, targets, target_lengths).backward()
        if ticket:
            hold.append(_timed(ticket.hold))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 400.0)
        optimizer.step()

    seconds = in_turns("cpu", steps, step=step)["step"]
    peak_of_steps = memory("VmHWM") - before
    start = time.perf_counter()
    if ticket:
        ticket.prune(round(0.16 * sum(w.numel() for w in ticket.weights.values())))
        ticket.rewind()
    else:
        pairs = [(m, n[: -len("_orig")]) for m in model.modules() for n, _ in m.named_parameters(recurse=False)]
        pairs = [(m, n) for m, n in pairs if hasattr(m, f"{n}_mask")]
        prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.2)
    pruning = time.perf_counter() - start
    if not ticket:
        with torch.no_grad():  # rewind
            for parameter, value in zip(model.parameters(), theta_0, strict=True):
                parameter.copy_(value)
    held = statistics.median(hold) if hold else 0.0
    print(json.dumps([seconds, held, pruning, peak_of_steps, memory("VmHWM") - before]))


def validate_training() -> None:
    """The official way of running gives the same loss and gradients, at demo size."""
    torch.manual_seed(0)
    ours = models.build("cnn-lstm", "demo", 29).eval()
    theirs = models.build("cnn-lstm", "demo", 29).eval()
    state = ours.state_dict()
    for i, lstm in enumerate(ours.lstms):
        theirs.lstms[i] = OfficialBiLstm(lstm.ahead.input_size, lstm.ahead.hidden_size)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            state[f"lstms.{i}.rnn.{name}"] = state.pop(f"lstms.{i}.ahead.{name}")
            state[f"lstms.{i}.rnn.{name}_reverse"] = state.pop(f"lstms.{i}.back.{name}")
    theirs.load_state_dict(state)
    batch = torch.randn(4, 500, 80), torch.tensor([500, 470, 440, 400])
    batch += torch.randint(1, 29, (4, 60)), torch.tensor([60, 55, 50, 45])
    losses = [model.loss(*batch) for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(ours.convs[0].weight.grad, theirs.convs[0].weight.grad, rtol=1e-3, atol=1e-4)
    print("validated: packed and padded layers give the same loss and gradients")


def bench_train(args: argparse.Namespace) -> None:
    validate_training()
    for threads in (1, 2):
        found = {}
        for way in ("ours", "official"):
            call = f"import bench; bench.torch.set_num_threads({threads}); bench.training_run({way!r}, {args.size!r}, "
            call += f"{args.repeats})"
            said = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, check=True).stdout
            found[way] = json.loads(said)
        (ours, held, pruned, peak, top), (theirs, _, their_pruning, their_peak, their_top) = found.values()
        print(
            f"cnn-lstm {args.size}, {threads} threads: a step {ours:.2f} s, the official way {theirs:.2f} s "
            f"({theirs / ours:.1f} x); holding the ticket {held / ours:.2%} of the step; peak memory of steps "
            f"{peak / 1e9:.2f} GB against {their_peak / 1e9:.2f} GB ({peak / their_peak:.2f}), with pruning and "
            f"rewinding {top / 1e9:.2f} against {their_top / 1e9:.2f} GB ({top / their_top:.2f}); pruning "
            f"{pruned:.2f} s against {their_pruning:.1f} s",
            flush=True,
        )
        torch.set_num_threads(threads)
        transducer_step(args.size, args.repeats)
    if torch.cuda.is_available():
        for backbone in models.BACKBONES:
            for amp in (False, True):
                print(cuda_step(backbone, amp, args.repeats), flush=True)
    else:
        print("no GPU here: no step on CUDA timed")


def transducer_step(size: str, repeats: int) -> None:
    """Where the RNN-T's step goes, and what the padded joiner of most implementations would cost."""
    torch.manual_seed(0)
    model = models.build("rnnt", size, 29)
    features, lengths = torch.randn(4, 500, 80), torch.tensor([500, 420, 350, 300])
    targets, target_lengths = torch.randint(1, 29, (4, 75)), torch.tensor([75, 60, 50, 45])
    ahead, frames = (x.detach() for x in model.encode(features, lengths))
    joined, joiner_lengths = (x.detach() for x in model.every_second(ahead, frames))
    predicted = model.predict(nn.functional.pad(targets, (1, 0)))[0].detach()

    def ours() -> None:  # the lattice's valid cells alone
        cells = [
            (joined[b, :t, None] + predicted[b, None, : u + 1]).flatten(0, 1)
            for b, (t, u) in enumerate(zip(joiner_lengths.tolist(), target_lengths.tolist()))
        ]
        model.join(torch.cat(cells)).sum().backward()

    def padded() -> None:
        model.join(joined[:, :, None] + predicted[:, None]).sum().backward()

    def lattice() -> None:
        logits = model.join(joined[:, :, None] + predicted[:, None]).detach().requires_grad_()
        torchaudio.functional.rnnt_loss(
            logits, targets.int(), joiner_lengths.int(), target_lengths.int(), blank=0, reduction="sum"
        ).backward()

    def forward_join() -> None:
        with torch.no_grad():
            model.join(joined[:, :, None] + predicted[:, None])

    t = in_turns(
        "cpu",
        repeats,
        step=lambda: model.loss(features, lengths, targets, target_lengths).backward(),
        encoder=lambda: model.encode(features, lengths)[0].sum().backward(),
        predictor=lambda: model.predict(nn.functional.pad(targets, (1, 0)))[0].sum().backward(),
        joiner=ours,
        padded=padded,
        lattice=lattice,
        forward_join=forward_join,
    )
    loss = t["lattice"] - t["forward_join"]
    parts = ", ".join(f"{name} {t[name] / t['step']:.0%}" for name in ("encoder", "predictor", "joiner"))
    print(
        f"rnnt {size}, {torch.get_num_threads()} threads: forward and backward {t['step']:.2f} s: {parts}, transducer "
        f"loss {loss / t['step']:.0%}; a padded joiner would take {t['padded'] / t['joiner']:.1f} x ours",
        flush=True,
    )


def cuda_step(backbone: str, amp: bool, repeats: int) -> str:
    """A step at paper size on CUDA: 32 utterances of 10 s."""
    torch.manual_seed(0)
    model = models.build(backbone, "paper", 29).cuda()
    ticket, optimizer = lottery.Ticket(model), torch.optim.AdamW(model.parameters(), 3e-4)
    features = torch.randn(32, 1000, models.CnnLstm.BINS[model.features], device="cuda")
    lengths, target_lengths = (torch.full((32,), n, device="cuda") for n in (1000, 120))
    targets = torch.randint(1, 29, (32, 120), device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            loss = model.loss(features, lengths, targets, target_lengths)
        loss.backward()
        ticket.hold()
        optimizer.step()

    torch.cuda.reset_peak_memory_stats()
    t = in_turns("cuda", repeats, step=step, hold=ticket.hold)
    peak = torch.cuda.max_memory_allocated()
    return (
        f"{backbone} paper on {torch.cuda.get_device_name()}{' --amp' if amp else ''}: 32 utterances of 10 s: "
        f"{t['step'] * 1e3:.0f} ms a step, holding {t['hold'] / t['step']:.1%} of it, {peak / 1e9:.1f} GB"
    )


# ---------------------------------------------------------------------------- data and saving


def bench_data(args: argparse.Namespace) -> None:
    """Features an hour and core, and the share of training that waits for the cache."""
    torch.set_num_threads(1)
    utterances = data.read_corpus(flags.HERE / "demo")["train"]
    hours = sum(u.duration for u in utterances) / 3600
    with tempfile.TemporaryDirectory() as folder:
        flac = []
        for i, u in enumerate(utterances):
            flac.append(dataclasses.replace(u, audio=Path(folder) / f"{i}.flac"))
            soundfile.write(flac[-1].audio, data.load_audio(u.audio).numpy(), data.SAMPLE_RATE)
        for name, corpus in (("Opus", utterances), ("FLAC", flac)):
            for kind in data.FEATURES:
                seconds = statistics.median(
                    _timed(lambda: [data.features_of(u, kind) for u in corpus])  # noqa: B023
                    for _ in range(args.repeats)
                )
                print(f"{name} to {kind}, one core: {hours * 3600 / seconds:,.0f} hours of audio an hour", flush=True)
        cache = data.Cache(Path(folder) / "cache")
        tokens = data.tokens_of(utterances)
        for start in ("first", "second"):
            data._opened.cache_clear()
            seconds = _timed(lambda: data.load_examples(flac, tokens, "log-mel", "", cache))
            print(f"cache, {start} start: {seconds:.2f} s for {hours * 60:.0f} minutes of audio", flush=True)
        bytes_of = {}
        for copies in (1, 16):
            child = f"import bench, pathlib; bench.memory_of_cached_training(pathlib.Path({folder!r}), {copies})"
            said = subprocess.run(
                [sys.executable, "-c", child], capture_output=True, text=True, check=True, cwd=flags.HERE
            )
            bytes_of[copies] = int(said.stdout.split()[-1])
        told = ", ".join(f"{n * hours * 60:.0f} minutes {size / 1e6:.0f} MB" for n, size in bytes_of.items())
        print(f"training from the cache, peak memory (mapped files aside): {told}", flush=True)
        few = Path(folder) / "few"
        few.mkdir()
        for split, count in (("train", 24), ("valid", 4), ("test", 4)):
            rows = [json.loads(line) for line in (flags.HERE / "demo" / f"{split}.jsonl").read_text().splitlines()]
            for row in rows:
                row["audio_filepath"] = str(flags.HERE / "demo" / row["audio_filepath"])
            (few / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows[:count])))
        for size, corpus, batch in (("demo", "demo", "8"), ("paper", str(few), "4")):
            for backbone in models.BACKBONES:
                for workers in (0, 1):
                    out = f"{folder}/{backbone}{size}{workers}"
                    argv = [
                        "--backbone",
                        backbone,
                        "--size",
                        size,
                        "--data",
                        corpus,
                        "--batch-size",
                        batch,
                        "--out",
                        out,
                    ]
                    argv += ["--epochs", "1", "--sparsity", "0", "--seconds", "0:15", "--workers", str(workers)]
                    with contextlib.redirect_stdout(io.StringIO()):
                        if train.main([*argv, "--cache", f"{folder}/cache"]):
                            sys.exit("bench.py: the run failed")
                    (row,) = ledger.read_ledger(Path(out) / "ledger.jsonl")
                    share = row["waited"] / row["seconds"]
                    print(
                        f"{backbone} {size} from the cache, {workers} workers: waits for data {share:.2%} of the time",
                        flush=True,
                    )


def memory_of_cached_training(folder: Path, copies: int) -> None:
    """Child process: an epoch from the cache on `copies` times the demo's train set; print the peak of its own memory.

    Anonymous memory: pages of the mapped cache are the system's to take back.
    """
    rows = [json.loads(line) for line in (flags.HERE / "demo" / "train.jsonl").read_text().splitlines()]
    for split in ("train", "valid", "test"):
        part = rows * copies if split == "train" else rows[:4]
        there = [row | {"audio_filepath": str(flags.HERE / "demo" / row["audio_filepath"])} for row in part]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, there)))
    seen, stop = [], threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            seen.append(memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    argv = ["--data", str(folder), "--cache", str(folder / "cache"), "--out", str(folder / f"run{copies}")]
    with contextlib.redirect_stdout(io.StringIO()):
        code = train.main([*argv, "--epochs", "1", "--sparsity", "0", "--seconds", "0:3"])
    stop.set()
    watcher.join()
    if code:
        sys.exit("bench.py: the run failed")
    print(max(seen))


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
    at = runs.Progress(best=lottery.copy_state(model))
    with tempfile.TemporaryDirectory(dir=".") as folder:
        keeper = runs.Keeper(Path(folder), "", None, runs.Signals(), None)
        keeper.save(ticket, optimizer, schedule, at)  # writes the rewind state too
        seconds = in_turns("cpu", args.repeats, save=lambda: keeper.save(ticket, optimizer, schedule, at))["save"]
        size = (Path(folder) / "checkpoint.safetensors").stat().st_size
    print(
        f"{backbone} {args.size}: a checkpoint of {size / 1e6:.1f} MB in {seconds:.3f} s: {seconds / 300:.2%} of "
        "the time at one every 5 minutes"
    )


def main(argv: list[str] | None = None) -> None:
    parser = flags.Parser(prog="bench.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=["ops", "train", "data", "save", "infer"])
    parser.add_argument("--size", choices=["demo", "paper"], default="paper", help="of train and save")
    parser.add_argument("--backbone", choices=list(models.BACKBONES), help="of save (default: rnnt) and infer (all)")
    parser.add_argument("--repeats", type=int, default=21, help="turns a median is taken over (default: 21)")
    parser.add_argument(
        "--no-peers", dest="peers", action="store_false", help="without torch.nn.utils.prune, which takes minutes"
    )
    parser.add_argument("--short", action="store_true", help="infer: one thread and 90 %% sparsity only")
    parser.add_argument(
        "--ticket", type=Path, nargs="+", help="infer: files ticket.safetensors on the test set of --data, with WER"
    )
    parser.add_argument("--data", type=Path, default=Path("demo"), help="of --ticket (default: demo)")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.what == "infer":
        from bench_infer import bench_infer  # which imports this file

        try:
            return bench_infer(args)
        except (lottery.LotteryError, data.DataError, OSError) as error:
            print(f"bench.py: error: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(2)
    {"ops": bench_ops, "train": bench_train, "data": bench_data, "save": bench_save}[args.what](args)


if __name__ == "__main__":
    main()
