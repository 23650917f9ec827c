"""`python -m bench infer`: tickets at work on a CPU, beside dense torch, torch.ao's int8 and onnxruntime.

Everything is validated first. A table's rows take turns in one process; times are medians, what counts is the ratio.
Masks are drawn at random, in whole blocks of their layout; trained tickets are measured by bench/tickets.py.
"""

import argparse
import contextlib
import copy
import functools
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lottery
import models
from audio_lottery import compression, files, layers, sparse
from bench.measure import in_turns, must_be_compiled, stop

SECONDS = 5  # of audio in an utterance
FRAMES = 100  # that a stream is measured on at once
SPARSITIES = (0.8, 0.9, 0.956)


def dtypes_of(layout: str) -> list[str]:
    """What differs there: only single weights have products in bytes."""
    return [dtype for dtype in sparse.DTYPES if dtype != "w8a8" or layout == "unstructured"]


def random_mask(shape: tuple[int, ...], sparsity: float, layout: str, seed: int) -> Tensor:
    """Each block kept with probability 1 - sparsity."""
    (r, c), rows, columns = sparse.LAYOUTS[layout], shape[0], math.prod(shape[1:])
    grid = torch.rand(-(-rows // r), -(-columns // c), generator=torch.Generator().manual_seed(seed))
    kept = grid >= sparsity
    return kept.repeat_interleave(r, 0).repeat_interleave(c, 1)[:rows, :columns].reshape(shape)


def random_masks(model: nn.Module, sparsity: float, layout: str) -> lottery.Masks:
    weights = lottery.prunable(model).items()
    return {name: random_mask(tuple(w.shape), sparsity, layout, seed) for seed, (name, w) in enumerate(weights)}


def close(name: str, got: Tensor, want: Tensor, tolerance: float = 1e-3) -> None:
    if not (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max())):
        stop(f"{name} differs from what it should say by {(got - want).abs().max():.2g}")


def validate() -> None:
    torch.manual_seed(0)
    for layout in sparse.LAYOUTS:
        weight, mask = torch.randn(1024, 256), random_mask((1024, 256), 0.9, layout, 0)
        for dtype in sparse.DTYPES:
            matrix = sparse.to_matrix(weight, mask, layout, dtype)
            for columns in (1, 100):
                x = torch.randn(columns, 256)
                want = F.linear(x, sparse.to_dense(*matrix, 1024, 256))
                close(f"sparse_linear {layout} {dtype}", sparse.sparse_linear(x, *matrix, None, 1024), want, 1e-4)
            arguments = torch.randn(1, 20, 1024), *matrix, torch.zeros(1, 256), torch.zeros(1, 256), None, False, []
            for got, want in zip(sparse.sparse_lstm(*arguments), sparse.reference_sparse_lstm(*arguments)):
                close(f"sparse_lstm {layout} {dtype}", got, want, 1e-4)
            if (layout, dtype) == ("unstructured", "w8a8"):
                validate_bytes(list(sparse.to_bytes(matrix)))
    print("validated against dense masked products, or in bytes against the reference: every layout and dtype")


def validate_bytes(tensors: list[Tensor]) -> None:
    """tensors: of Bytes, (1024, 256)."""
    for columns in (1, 100):
        x = torch.randn(columns, 256)
        want = sparse.reference_sparse_linear_in_bytes(x, tensors, None, 1024)
        close("sparse_linear_in_bytes", sparse.sparse_linear_in_bytes(x, tensors, None, 1024), want, 1e-5)
    arguments = torch.randn(1, 20, 1024), tensors, torch.zeros(1, 256), torch.zeros(1, 256), None, False
    for got, want in zip(sparse.sparse_lstm_in_bytes(*arguments), sparse.reference_sparse_lstm_in_bytes(*arguments)):
        close("sparse_lstm_in_bytes", got, want, 0.02)  # a state between two bytes may fall to either


def bench_products(columns: int, repeats: int, sparsity: float = 0.9) -> None:
    """A 4096x1024 gate matrix times `columns` columns; matrices take turns, so each comes from the outer cache."""
    weight, x = torch.randn(4096, 1024), torch.randn(columns, 1024)
    dense = {
        "F.linear": lambda: F.linear(x, weight),
        "prepacked oneDNN": functools.partial(layers.DenseProduct(weight, None, columns), x),
    }
    if columns == 1:
        dense["torch.mv"] = lambda: torch.mv(weight, x[0])
    csr, x_t = (weight * random_mask((4096, 1024), sparsity, "unstructured", 0)).to_sparse_csr(), x.t().contiguous()
    functions = {**dense, "torch CSR": lambda: csr @ x_t}
    for layout in sparse.LAYOUTS:
        mask = random_mask((4096, 1024), sparsity, layout, 0)
        for dtype in dtypes_of(layout):
            form = layers.InBytes if dtype == "w8a8" else layers.Product
            product = form(sparse.to_matrix(weight, mask, layout, dtype), None, (4096, 1024))
            functions[f"{layout} {dtype}"] = functools.partial(product, x)
    t = in_turns("cpu", repeats, **functions)
    best = min(dense, key=t.get)
    print(f"\n4096x1024, {sparsity:.1%} sparse, {columns} columns; times over {best}")
    for name, seconds in t.items():
        print(f"  {name:24} {seconds * 1e6:9.1f} us  {t[best] / seconds:6.2f} x")


# ---------------------------------------------------------------------------- streaming


class DenseSteps:
    """An LSTM stack frame by frame in torch, with care: one product a layer, gates in one buffer, nothing copied."""

    def __init__(self, lstm: nn.LSTM):
        self.weights, self.biases, hidden = [], [], lstm.hidden_size
        order = torch.arange(4 * hidden).view(4, hidden)[[0, 1, 3, 2]].flatten()  # i, f, o, g: one sigmoid for three
        for ih, hh, bias_ih, bias_hh in lstm.all_weights:
            self.weights.append(torch.cat((ih, hh), 1)[order].contiguous())
            self.biases.append((bias_ih + bias_hh)[order].contiguous())
        self.inputs = [torch.zeros(w.shape[1]) for w in self.weights]  # a layer's input, then its own last output
        self.cells, self.hidden = [torch.zeros(hidden) for _ in self.weights], hidden

    def __call__(self, x: Tensor) -> Tensor:
        for weight, bias, both, cell in zip(self.weights, self.biases, self.inputs, self.cells):
            both[: len(x)] = x
            gates = torch.addmv(bias, weight, both)
            i, f, o = gates[: 3 * self.hidden].sigmoid_().view(3, -1)
            cell.mul_(f).addcmul_(i, gates[3 * self.hidden :].tanh_())
            x = torch.mul(o, cell.tanh(), out=both[len(both) - self.hidden :])
        return x


def stream(lstm: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """Each call is the next frame."""
    state = [None]

    def frame() -> Tensor:
        out, state[0] = lstm(x, state[0])
        return out[0, 0]

    return frame


def stream_cells(lstm: nn.LSTM, x: Tensor) -> Callable[[], Tensor]:
    cells = []
    for weights in lstm.all_weights:
        cells.append(nn.LSTMCell(lstm.input_size, lstm.hidden_size).requires_grad_(False))
        for to, given in zip(cells[-1].parameters(), weights):
            to.data = given.data
    states = [(torch.zeros(1, lstm.hidden_size), torch.zeros(1, lstm.hidden_size))] * len(cells)

    def frame() -> Tensor:
        out = x[0]
        for i, cell in enumerate(cells):
            states[i] = cell(out, states[i])
            out = states[i][0]
        return out[0]

    return frame


def bench_streaming(repeats: int, sparsities: tuple[float, ...], hidden: int = 1664, layers: int = 5) -> None:
    """Microseconds a frame through the LSTMs of the paper-size Transducer's encoder, one utterance, one frame a call.

    A turn is FRAMES frames of one way, as in a stream: what fits the caches is in them. (nn.LSTM: 3, it fits none.)
    """
    torch.manual_seed(0)
    x = torch.randn(1, 1, hidden)
    dense = nn.LSTM(hidden, hidden, layers, batch_first=True).requires_grad_(False)
    steps = DenseSteps(dense)
    functions = {
        "nn.LSTM": stream(dense, x), "nn.LSTMCell": stream_cells(dense, x), "dense steps": lambda: steps(x[0, 0]),
    }  # fmt: skip
    for _ in range(3):
        a, b, c = (function() for function in functions.values())
        close("nn.LSTMCell", b, a), close("dense steps", c, a)
    sizes = dict.fromkeys(functions, compression.resident_bytes(dense))
    model = nn.Sequential(dense)
    for sparsity in sparsities:
        for layout in sparse.LAYOUTS:
            masks = random_masks(model, sparsity, layout)
            for dtype in dtypes_of(layout) if sparsity == 0.9 else ("float32",):
                compressed, rows = compression.compress(model, masks, lambda m: m(x), layout=layout, dtype=dtype)
                stayed = " (dense)" if all(row.layout.startswith("dense") for row in rows) else ""
                name = f"{sparsity:.1%} {layout} {dtype}{stayed}"
                functions[name], sizes[name] = stream(compressed[0], x), compression.resident_bytes(compressed)
    frames = {name: 3 if name == "nn.LSTM" else FRAMES for name in functions}
    turns = {name: lambda f=f, n=frames[name]: [f() for _ in range(n)] for name, f in functions.items()}
    t = {name: seconds / frames[name] for name, seconds in in_turns("cpu", repeats, **turns).items()}
    print(f"\n{layers} LSTM layers of {hidden}, frame by frame; times over nn.LSTMCell and over the dense steps;")
    print("real-time factor at 40 ms a frame; resident")
    for name, seconds in t.items():
        ratios = f"{t['nn.LSTMCell'] / seconds:7.2f} x {t['dense steps'] / seconds:7.2f} x"
        print(f"  {name:28} {seconds * 1e6:9.1f} us {ratios}  {seconds / 0.04:.4f}  {sizes[name] / 1e6:6.1f} MB")


# ---------------------------------------------------------------------------- whole utterances


def utterances_of(backbone: str, batch: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """A model of paper size and utterances. The transducer emits a token every 80 ms, as letters are spoken."""
    torch.manual_seed(0)
    model = models.build(backbone, "paper", 29).eval().requires_grad_(False)
    if backbone == "rnnt":
        model.MAX_SYMBOLS = 1
        model.output.bias[models.BLANK] = -1e9
    frames = 100 * SECONDS
    features = torch.randn(batch, frames, 161 if model.features == "log1p-stft" else 80)
    return model, (features, torch.full((batch,), frames))


def transcribe(model: nn.Module, utterances: tuple[Tensor, Tensor]) -> list[list[int]]:
    with torch.inference_mode():
        return model.transcribe(*utterances)


def with_parts(model: nn.Module, wrap: Callable[[Callable, tuple], Callable], utterances: tuple) -> nn.Module:
    """A copy whose heavy parts go through wrap(part, an example of its arguments)."""
    other = copy.copy(model)
    if isinstance(model, models.Transducer):
        token = torch.zeros(len(utterances[0]), 1, dtype=torch.int64)
        first = model.predict(token)[1]
        step = wrap(
            lambda token, h, c: (lambda out, state: (out, *state))(*model.predict(token, (h, c))), (token, *first)
        )

        def predict(tokens: Tensor, state=None) -> tuple:
            out, *state = step(tokens, *(state or (torch.zeros_like(first[0]), torch.zeros_like(first[1]))))
            return out, tuple(state)

        other.encode, other.predict = wrap(model.encode, utterances), predict
        wrapped = [other.encode, step]
    else:
        other.forward = wrap(model.forward, utterances)
        wrapped = [other.forward]
    other.graph_bytes = sum(getattr(part, "bytes", 0) for part in wrapped)
    return other


def with_our_loop(other: nn.Module, model: nn.Module) -> nn.Module:
    """A way that decodes a transducer by our compiled loop, in float32, in place of one in Python."""
    other._modules = dict(other._modules)  # a shallow copy shares them
    with torch.no_grad():
        other.use_greedy(layers.Greedy(**model.greedy_parts()))
    return other


# The utterances that are measured have no padding: no peer selects rows or masks for it.
WITHOUT_PADDING = {
    "on_rows": lambda layer, x, rows: layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]),
    "without_padding": lambda features, lengths: features,
    "valid_rows": lambda lengths, frames: None,
    "unpadded": lambda x, rows: True,
}


def compiled(part: Callable, example: tuple) -> Callable:
    """Frozen, so that weights are prepacked; compiled at its first call."""
    made = torch.compile(part, options={"freezing": True})

    def run(*arguments):
        with mock.patch.multiple(models, **WITHOUT_PADDING):
            return made(*arguments)

    return run


def has_vnni() -> bool:
    """Does the processor add products of bytes in 32 bits? Else onnxruntime adds two of them in 16, which may saturate:
    its documentation has weights of 7 bits for that."""
    with contextlib.suppress(OSError):
        return "vnni" in Path("/proc/cpuinfo").read_text()
    return False


class ByFrames(nn.Module):
    """A Conv1d of kernel 1 as a linear layer of each frame, which quantizers know."""

    def __init__(self, conv: nn.Conv1d):
        super().__init__()
        self.linear = nn.utils.skip_init(nn.Linear, conv.in_channels, conv.out_channels, conv.bias is not None)
        self.linear.weight, self.linear.bias = nn.Parameter(conv.weight.detach()[..., 0]), conv.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.transpose(1, 2)).transpose(1, 2)


def to_quantize(model: nn.Module) -> nn.Module:
    """A copy whose pointwise convolutions are linear layers: the Conformer's int8 takes a tenth less so."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv1d) and layer.kernel_size == layer.stride == (1,) and layer.groups == 1:
            model.set_submodule(name, ByFrames(layer))
    return model


def int8_graph(graph: bytes) -> bytes:
    """An ONNX graph with its LSTMs and linear layers quantized. Convolutions stay float32: as ConvInteger the CNN-LSTM
    takes 1.65 times as long, the Conformer 2.7 times (results/bench/infer-int8-peers-xeon.txt)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "float32.onnx", Path(folder) / "int8.onnx"
        before.write_bytes(graph)
        root = logging.getLogger()
        level = root.level
        root.setLevel(logging.ERROR)  # it warns of what it would rather have had done before
        try:
            kinds = ["LSTM", "MatMul", "Gemm"]
            more = {"weight_type": QuantType.QInt8, "reduce_range": not has_vnni()}
            quantize_dynamic(before, after, op_types_to_quantize=kinds, **more)
        finally:
            root.setLevel(level)
        return after.read_bytes()


def session_of(graph: bytes):
    """onnxruntime with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else its threads spin into others' turns
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def in_onnxruntime(part: Callable, example: tuple, int8_of: nn.Module | None = None) -> Callable:
    """int8_of: the model that `part` is of, to quantize it."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = int8_of  # so that its weights have names in the graph, as the quantizer wants them

        def forward(self, *arguments):
            return part(*arguments)

    file, names = io.BytesIO(), [f"in{i}" for i in range(len(example))]
    with mock.patch.multiple(models, **WITHOUT_PADDING), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(Whole().eval(), example, file, input_names=names, opset_version=17, dynamo=False)
    graph = int8_graph(file.getvalue()) if int8_of is not None else file.getvalue()
    session = session_of(graph)
    takes = {value.name for value in session.get_inputs()}  # lengths that nothing depends on are no input

    def run(*arguments: Tensor) -> tuple:
        given = {name: value.numpy() for name, value in zip(names, arguments) if name in takes}
        return tuple(torch.from_numpy(np.asarray(value)) for value in session.run(None, given))

    run.bytes = len(graph)
    return run


def quantized(model: nn.Module) -> nn.Module:
    """Linear layers and LSTMs in torch.ao's dynamic int8."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.Linear}, torch.qint8)


def saved_bytes(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def ticket_bytes(model: nn.Module, masks: lottery.Masks) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ticket.safetensors"
        files.save_ticket(path, masks, None, model.state_dict(), {})
        return path.stat().st_size


OUR_LOOP = ", our loop"  # of a transducer's peer that has it


class Way(NamedTuple):
    """A model as it is used, and its bytes on the disk and in memory."""

    model: nn.Module
    disk: int
    resident: int


def peers_of(model: nn.Module, utterances: tuple[Tensor, Tensor], run: Callable) -> dict[str, Way]:
    """The dense ways to run a model. Says which cannot, or say something else."""
    wanted, size = run(model), saved_bytes(model)
    ways = {"dense torch": Way(model, size, size)}
    all_kept = {name: torch.ones_like(w, dtype=torch.bool) for name, w in lottery.prunable(model).items()}
    linear = to_quantize(model)
    makers = {
        "torch.compile": lambda: with_parts(model, compiled, utterances),
        "ours, nothing left out": lambda: compression.compress(model, all_kept, run)[0],
        "torch.ao dynamic int8": lambda: quantized(linear),
        "onnxruntime float32": lambda: with_parts(model, in_onnxruntime, utterances),
        "onnxruntime int8": lambda: with_parts(linear, functools.partial(in_onnxruntime, int8_of=linear), utterances),
    }
    if isinstance(model, models.Transducer):  # whichever is faster: a loop in Python, or a float32 one without
        makers |= {
            name + OUR_LOOP: lambda make=makers[name]: with_our_loop(make(), model)
            for name in ("torch.ao dynamic int8", "onnxruntime float32", "onnxruntime int8")
        }
    for name, make in makers.items():
        try:
            made = make()
            said = run(made)
        except ImportError as error:
            print(f"  {name}: not here ({error})")
        except Exception as error:
            why = (str(error).splitlines() or [""])[0][:100]
            print(f"  {name}: cannot run this model ({type(error).__name__}: {why})")
        else:
            if said != wanted and "int8" not in name:
                print(f"  {name}: says something else than dense torch")
            disk = getattr(made, "graph_bytes", 0) or (saved_bytes(made) if "int8" in name else size)
            if same := ways.get(name.removesuffix(OUR_LOOP)):
                disk = same.disk
            ways[name] = Way(made, disk, compression.resident_bytes(made) if "ours" in name else disk)
    return ways


def tickets_of(model: nn.Module, backbone: str, run: Callable, sparsities: tuple[float, ...]) -> dict[str, Way]:
    """The model compressed, with masks of each sparsity in blocks of each layout; single weights in each dtype."""
    ways, single = {}, (f"unstructured {dtype}".removesuffix(" float32") for dtype in dtypes_of("unstructured"))
    layouts = (*single, "1x4", "8x1", "16x1")
    for sparsity in sparsities:
        for layout, _, dtype in (name.partition(" ") for name in layouts):
            masks, name = random_masks(model, sparsity, layout), f"{sparsity:.1%} {layout} {dtype}".rstrip()
            masked = copy.deepcopy(model)
            lottery.ops.hold_ticket_(list(lottery.prunable(masked).values()), [], list(masks.values()))
            if layout == "unstructured":  # the layout makes no difference there
                disk = ticket_bytes(masked, masks)
            compressed, rows = compression.compress(model, masks, run, dtype=dtype or "float32")
            if run(compressed) != run(masked) and not dtype:
                print(f"  {name}: says something else than the dense masked model")
            ways[name] = Way(compressed, disk, compression.resident_bytes(compressed))
            if sparsity == 0.9 and layout in ("unstructured", "16x1"):
                print(f"\n{backbone}: what {name} took, and why (milliseconds of what was tried)")
                print("\n".join(map(str, rows)), flush=True)
    return ways


def bench_utterances(backbone: str, repeats: int, sparsities: tuple[float, ...], batch: int = 1) -> None:
    """Utterances through transcribe at paper size, `batch` at once."""
    model, utterances = utterances_of(backbone, batch)
    run = functools.partial(transcribe, utterances=utterances)
    ways = peers_of(model, utterances, run)
    ways |= tickets_of(model, backbone, run, sparsities)
    t = in_turns("cpu", repeats, **{name: functools.partial(run, way.model) for name, way in ways.items()})
    best = min((name for name in ("dense torch", "torch.compile") if name in t), key=t.get)
    print(
        f"\n{backbone} at paper size, utterances of {SECONDS} s at once: {batch}; masks in blocks of the layout named:"
    )
    print(f"real-time factor; times over {best}, ours with nothing left out, torch.ao dynamic int8, onnxruntime and")
    print("onnxruntime int8; MB on the disk and resident")
    for name, took in t.items():
        peers = (
            best, "ours, nothing left out", "torch.ao dynamic int8", "onnxruntime float32", "onnxruntime int8",
        )  # fmt: skip
        least = {peer: min(t[peer], t.get(peer + OUR_LOOP, math.inf)) for peer in peers if peer in t}
        ratios = " ".join(f"{least[peer] / took:6.2f} x" if peer in least else "       -" for peer in peers)
        sizes = f"{ways[name].disk / 1e6:7.1f} {ways[name].resident / 1e6:7.1f}"
        print(f"  {name:32} {took * 1e3:8.1f} ms  {took / SECONDS / batch:.4f}  {ratios}  {sizes}", flush=True)


# ---------------------------------------------------------------------------- all of it


def begin() -> None:
    """What every measurement of use starts with."""
    print(f"torch {torch.__version__}, ops: {lottery.ops.path}, {torch.backends.cpu.get_cpu_capability()}")
    must_be_compiled()
    torch.set_num_threads(1)
    validate()


def bench_infer(args: argparse.Namespace) -> None:
    begin()
    for threads in (1,) if args.short else (1, 2):
        sparsities = SPARSITIES if threads == 1 and not args.short else (0.9,)
        torch.set_num_threads(threads)
        print(f"\n---------------- {threads} thread{'s' * (threads > 1)}")
        if not args.short:
            for columns in (1, 100):
                bench_products(columns, args.repeats)
        for hidden in (1664,) if args.short else (1664, 1024):
            bench_streaming(max(3, args.repeats // 4), sparsities, hidden)
        for backbone in [args.backbone] if args.backbone else models.BACKBONES:
            for batch in (1, 16):
                bench_utterances(backbone, max(3, args.repeats // 4), sparsities, batch)
