"""`python -m bench ops`: the operators, validated against the reference first and then timed.

Beside them what people use today: torch.nn.utils.prune, numpy.partition, torch._foreach_mul_. Times are in reads or
copies of the same weights.
"""

import argparse
import statistics

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune

import lottery
import models
from bench.measure import clock, in_turns, must_be_compiled, peak_memory, stop, timed

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
    """Seconds of torch.nn.utils.prune.global_unstructured to `keep` weights, the median of three calls."""
    return statistics.median(prune_once(weights, masks, keep) for _ in range(3))


def prune_once(weights: list[torch.Tensor], masks: list[torch.Tensor], keep: int) -> float:
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
        reference = lottery.reference_global_magnitude_masks(weights, masks, keep)
        if not all(torch.equal(a, b) for a, b in zip(ours, reference)):
            stop("the compiled masks differ from the reference: nothing was timed")
        held, by_hand = [w.clone() for w in weights], [w.clone() for w in weights]
        lottery.ops.hold_ticket_(held, [], masks)
        lottery.reference_hold_ticket_(by_hand, [], masks)
        if not all(torch.equal(a, b) for a, b in zip(held, by_hand)):
            stop("the held weights differ from the reference: nothing was timed")
        matrices = [w[: len(w) // 101 * 101].view(-1, 101) for w in weights[1:]]
        for block in BLOCKS:
            ours = lottery.ops.block_norms(matrices, *block)
            if not all(map(torch.equal, ours, lottery.reference_block_norms(matrices, *block))):
                stop("the block norms differ from the reference: nothing was timed")
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
        partition = statistics.median(timed(lambda: np.partition(joined, total - keep)) for _ in range(5))
        whole = statistics.median(timed(lambda: numpy_masks(weights, total - keep)) for _ in range(5))
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
    must_be_compiled()
    from _lottery import build_facts  # there, since it is compiled

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() and build_facts()["cuda"] else [])
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
