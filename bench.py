"""Side-by-side measurements: `python bench.py ops` or `infer` validates first and then times. Tables go to RESULTS.md.

All figures of a row come from one process, in turns, as medians; what counts is the ratio.
"""

import argparse
import ctypes
import functools
import math
import statistics
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import lottery
import models
import sparse


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


def peak_memory(function) -> int:
    """Bytes of resident memory that a call adds at its peak, over what was there before (Linux)."""

    def status(key: str) -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

    ctypes.CDLL(None).malloc_trim(0)  # so that the call cannot live on memory freed before it
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM, the high-water mark
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


# ---------------------------------------------------------------------------- ops


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
        reference = lottery.reference_global_magnitude_masks(weights, masks, keep)
        if not all(torch.equal(a, b) for a, b in zip(ours, reference)):
            sys.exit("bench.py: the compiled masks differ from the reference: nothing was timed")
        held, by_hand = [w.clone() for w in weights], [w.clone() for w in weights]
        lottery.ops.hold_ticket_(held, [], masks)
        lottery.reference_hold_ticket_(by_hand, [], masks)
        if not all(torch.equal(a, b) for a, b in zip(held, by_hand)):
            sys.exit("bench.py: the held weights differ from the reference: nothing was timed")
    print(f"validated against the reference on {device}: masks and held weights equal, bit for bit")


def bench_pruning(device: str, hidden: int, rounds: int, repeats: int, peers: bool) -> str:
    weights = cnn_lstm_weights(hidden, device)
    total = sum(w.numel() for w in weights)
    masks = masks_of_round(weights, rounds - 1)
    keep = lottery.kept_after(total, rounds, 0.2)
    tied = [torch.where(w > 0, 1.0, 2.0) for w in weights]  # two magnitudes, cut between them: the fall-back
    survivors = [torch.ones_like(m) for m in masks]
    keep_tied = sum(int((w == 2).sum()) for w in tied)
    functions = {
        "ours": lambda: lottery.ops.global_magnitude_masks(weights, masks, keep),
        "fallback": lambda: lottery.ops.global_magnitude_masks(tied, survivors, keep_tied),
        "read": lambda: [w.sum() for w in weights],
    }
    t = in_turns(device, repeats, **functions)
    line = f"{total / 1e6:6.1f} M  round {rounds:2d}  {torch.get_num_threads()} threads  ours {t['ours'] * 1e3:8.2f} ms"
    line += f"  {t['ours'] / t['read']:5.2f} reads  fall-back {t['fallback'] / t['read']:5.2f} reads"
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
            print(f"\n{device}: holding weights and gradients (hold_ticket_)")
            for hidden in (58, 294, 1024):
                for rounds in (1, 10):
                    line, seconds = bench_holding(device, hidden, rounds, args.repeats)
                    print(line, flush=True)
            step = training_step(device)
            print(f"a training step at paper size: {step:.2f} s; holding is {seconds / step:.2%} of it", flush=True)


# ---------------------------------------------------------------------------- infer


def random_mask(shape: tuple[int, ...], sparsity: float, layout: str, seed: int) -> torch.Tensor:
    """Blocks kept at random, as many as `sparsity` leaves."""
    (r, c), rows, columns = sparse.LAYOUTS[layout], shape[0], math.prod(shape[1:])
    grid = torch.rand(-(-rows // r), -(-columns // c), generator=torch.Generator().manual_seed(seed))
    kept = grid.flatten().argsort() < round(grid.numel() * (1 - sparsity))
    return kept.view_as(grid).repeat_interleave(r, 0).repeat_interleave(c, 1)[:rows, :columns].reshape(shape)


def random_masks(model: nn.Module, sparsity: float, layout: str) -> lottery.Masks:
    weights = lottery.prunable(model).items()
    return {name: random_mask(tuple(w.shape), sparsity, layout, seed) for seed, (name, w) in enumerate(weights)}


def validate_infer() -> None:
    torch.manual_seed(0)
    for layout in sparse.LAYOUTS:
        weight, mask = torch.randn(1024, 256), random_mask((1024, 256), 0.9, layout, 0)
        for values in sparse.VALUES:
            matrix = sparse.pack(weight, mask, layout, values)
            for columns in (1, 100):
                x = torch.randn(columns, 256)
                got = sparse.sparse_linear(x, *matrix, None, 1024)
                if not torch.allclose(got, F.linear(x, sparse.unpack(*matrix, 1024, 256)), rtol=1e-4, atol=1e-4):
                    sys.exit(f"bench.py: sparse_linear {layout} {values} differs from dense: nothing was timed")
            arguments = torch.randn(1, 20, 1024), *matrix, torch.zeros(1, 256), torch.zeros(1, 256), None, False
            for got, want in zip(sparse.sparse_lstm(*arguments), sparse.reference_sparse_lstm(*arguments)):
                if not torch.allclose(got, want, rtol=1e-4, atol=1e-4):
                    sys.exit(f"bench.py: sparse_lstm {layout} {values} differs from the reference: nothing was timed")
    print("validated against dense masked products: every layout and values")


def bench_products(columns: int, sparsity: float, repeats: int) -> None:
    """A 4096x1024 gate matrix times `columns` columns; matrices take turns, so each comes from the outer cache."""
    weight, x = torch.randn(4096, 1024), torch.randn(columns, 1024)
    functions = {
        "F.linear": lambda: F.linear(x, weight),
        "prepacked oneDNN": functools.partial(sparse.DenseProduct(weight, None, columns), x),
        "ours, nothing left out": functools.partial(
            sparse.Product(sparse.pack(weight, torch.ones_like(weight, dtype=torch.bool), "16x1"), None, 4096), x
        ),
    }
    if columns == 1:
        functions["torch.mv"] = lambda: torch.mv(weight, x[0])
    mask = random_mask((4096, 1024), sparsity, "unstructured", 0)
    csr, x_t = (weight * mask).to_sparse_csr(), x.t().contiguous()
    functions["torch CSR"] = lambda: csr @ x_t
    for layout in sparse.LAYOUTS:
        mask = random_mask((4096, 1024), sparsity, layout, 0)
        for values in sparse.VALUES:
            product = sparse.Product(sparse.pack(weight, mask, layout, values), None, 4096)
            functions[f"{layout} {values}"] = functools.partial(product, x)
    t = in_turns("cpu", repeats, **functions)
    dense = [name for name in ("F.linear", "prepacked oneDNN", "torch.mv") if name in t]
    best = min(dense, key=t.get)
    print(f"4096x1024, {sparsity:.1%} sparse, {columns} columns, {torch.get_num_threads()} threads (times over {best})")
    for name, seconds in t.items():
        print(f"  {name:24} {seconds * 1e6:9.1f} us  {t[best] / seconds:6.2f} x")


class DenseSteps:
    """An LSTM stack frame by frame in torch, with care: one product a layer, gates in one buffer, nothing copied."""

    def __init__(self, lstm: nn.LSTM):
        self.weights, self.biases, hidden = [], [], lstm.hidden_size
        order = torch.arange(4 * hidden).view(4, hidden)[[0, 1, 3, 2]].flatten()  # i, f, o, g: one sigmoid for three
        for i in range(lstm.num_layers):
            ih, hh, bias_ih, bias_hh = (p.detach() for p in lstm.all_weights[i])
            self.weights.append(torch.cat((ih, hh), 1)[order].contiguous())
            self.biases.append((bias_ih + bias_hh)[order].contiguous())
        self.inputs = [torch.zeros(w.shape[1]) for w in self.weights]  # a layer's input, then its own last output
        self.cells, self.hidden = [torch.zeros(hidden) for _ in self.weights], hidden

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for weight, bias, both, cell in zip(self.weights, self.biases, self.inputs, self.cells):
            both[: len(x)] = x
            gates = torch.addmv(bias, weight, both)
            i, f, o = gates[: 3 * self.hidden].sigmoid_().view(3, -1)
            cell.mul_(f).addcmul_(i, gates[3 * self.hidden :].tanh_())
            x = torch.mul(o, cell.tanh(), out=both[len(both) - self.hidden :])
        return x


def bench_streaming(repeats: int, hidden: int = 1024, layers: int = 5) -> None:
    """Microseconds a frame through a unidirectional LSTM stack, one utterance, one frame a call."""
    torch.manual_seed(0)
    x = torch.randn(1, 1, hidden)

    def stream(lstm: nn.Module):
        def frame() -> None:
            frame.out, frame.state = lstm(x, frame.state)

        frame.state = None
        return frame

    def cells(lstm: nn.LSTM):
        made = []
        for i in range(layers):
            cell = nn.LSTMCell(hidden, hidden)
            for to, given in zip(cell.parameters(), lstm.all_weights[i]):
                to.data = given.data
            made.append(cell)
        states = [(torch.zeros(1, hidden), torch.zeros(1, hidden))] * layers

        def frame() -> None:
            out = x[0]
            for i, cell in enumerate(made):
                states[i] = cell(out, states[i])
                out = states[i][0]
            frame.out = out

        return frame

    dense = nn.LSTM(hidden, hidden, layers, batch_first=True)
    steps = DenseSteps(dense)
    functions = {"nn.LSTM": stream(dense), "nn.LSTMCell": cells(dense), "dense steps": lambda: steps(x[0, 0])}
    sizes = {}
    for sparsity in (0.0, 0.8, 0.9, 0.956):
        for layout in sparse.LAYOUTS if sparsity else ("16x1",):
            for values in sparse.VALUES if sparsity else ("float32",):
                model = nn.Sequential(dense)
                masks = random_masks(model, sparsity, layout)
                lstm, rows = sparse.compress(model, masks, lambda m: m(x), layout=layout, values=values)
                name = f"{sparsity:.1%} {layout} {values}" if sparsity else "ours, nothing left out"
                functions[name], sizes[name] = stream(lstm[0]), sum(row.bytes for row in rows)
    for _ in range(3):
        functions["nn.LSTM"](), functions["nn.LSTMCell"](), steps(x[0, 0])
    if not torch.allclose(functions["nn.LSTM"].out[0, 0], functions["nn.LSTMCell"].out[0], atol=1e-5) or not (
        torch.allclose(steps.inputs[-1][hidden:], functions["nn.LSTMCell"].out[0], atol=1e-5)
    ):
        sys.exit("bench.py: the dense ways to stream differ: nothing was timed")
    t = in_turns("cpu", 5 * repeats, **functions)
    print(
        f"{layers} LSTM layers of {hidden}, frame by frame, {torch.get_num_threads()} threads; times over nn.LSTMCell"
    )
    print("and over the dense steps; real-time factor at 40 ms a frame; bytes of weights")
    for name, seconds in t.items():
        ratios = f"{t['nn.LSTMCell'] / seconds:7.2f} x {t['dense steps'] / seconds:7.2f} x"
        size = sizes.get(name, 8 * 4 * layers * hidden * hidden)
        print(f"  {name:28} {seconds * 1e6:9.1f} us {ratios}  {seconds / 0.04:.4f}  {size / 1e6:6.1f} MB")


def bench_utterance(backbone: str, repeats: int, seconds: int = 5) -> None:
    """One utterance at paper size: the whole CNN-LSTM or Conformer, the encoder of the transducer."""
    torch.manual_seed(0)
    model = models.build(backbone, "paper", 29).eval().requires_grad_(False)
    features = torch.randn(1, 100 * seconds, 161 if model.features == "log1p-stft" else 80)
    lengths = torch.tensor([100 * seconds])

    def run(model: nn.Module):
        with torch.inference_mode():
            return (model.encode if backbone == "rnnt" else model)(features, lengths)

    def sizes(rows: list[sparse.Taken]) -> float:
        return sum(row.bytes for row in rows) / 1e6

    all_kept = {name: torch.ones_like(w, dtype=torch.bool) for name, w in lottery.prunable(model).items()}
    best_dense, rows = sparse.compress(model, all_kept, run)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear}, torch.qint8)
    candidates = {"dense": model, "torch.ao dynamic int8": quantized, "ours, nothing left out": best_dense}
    bytes_of = {"dense": sizes(rows), "ours, nothing left out": sizes(rows)}
    for sparsity in (0.8, 0.9, 0.956):
        for layout in sparse.LAYOUTS:
            masks = random_masks(model, sparsity, layout)
            name = f"{sparsity:.1%} {layout}"
            candidates[name], rows = sparse.compress(model, masks, run)
            bytes_of[name] = sizes(rows)
            if sparsity == 0.9 and layout in ("unstructured", "16x1"):
                print(f"\n{backbone}: what {name} took (milliseconds of what was tried)")
                print("\n".join(map(str, rows)))
    t = in_turns("cpu", max(3, repeats // 4), **{name: functools.partial(run, m) for name, m in candidates.items()})
    print(
        f"\n{backbone} at paper size, {seconds} s of audio, {torch.get_num_threads()} threads; times over dense torch,"
    )
    print(
        "and over the same product by product choice with nothing left out; real-time factor; bytes of pruned weights"
    )
    for name, took in t.items():
        ratios = f"{t['dense'] / took:6.2f} x {t['ours, nothing left out'] / took:6.2f} x"
        size = f"{bytes_of[name]:7.1f} MB" if name in bytes_of else ""
        print(f"  {name:24} {took * 1e3:8.1f} ms {ratios}  {took / seconds:.4f}  {size}", flush=True)


def bench_infer(args: argparse.Namespace) -> None:
    print(f"torch {torch.__version__}, ops: {lottery.ops.path}, {torch.backends.cpu.get_cpu_capability()}")
    if "pure" in lottery.ops.path:
        sys.exit("bench.py: the extension is not built: there is nothing to time against the reference")
    validate_infer()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        print(f"\n{threads} threads")
        with torch.inference_mode():
            for columns in (1, 100):
                for sparsity in (0.8, 0.9, 0.956):
                    bench_products(columns, sparsity, args.repeats)
            bench_streaming(args.repeats)
        for backbone in models.BACKBONES:
            bench_utterance(backbone, args.repeats)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=["ops", "infer"])
    parser.add_argument("--repeats", type=int, default=21, help="turns a median is taken over (default: 21)")
    parser.add_argument(
        "--no-peers", dest="peers", action="store_false", help="without torch.nn.utils.prune, which takes minutes"
    )
    args = parser.parse_args(argv)
    (bench_infer if args.what == "infer" else bench_ops)(args)


if __name__ == "__main__":
    main()
