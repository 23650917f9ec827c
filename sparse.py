"""A ticket in use: `compress` turns the pruned products of any nn.Module into sparse ones, for inference on a CPU.

    compressed, rows = compress(model, masks, lambda model: model.transcribe(features, input_lengths))

A weight is seen as (outputs, inputs) and kept in blocks r x c, a layout: "unstructured" is 1x1; in 4x1, 8x1 and 16x1
neighbouring outputs share an input. Blocks that a mask keeps in part are filled with zeros, so every layout is exact.
Each layer takes what was measured fastest on this machine, dense included; a row says what and why. Where the whole is
faster dense, it stays dense.
"""

import copy
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lottery

LAYOUTS = {"unstructured": (1, 1), "1x4": (1, 4), "4x1": (4, 1), "8x1": (8, 1), "16x1": (16, 1)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
FRAMES = 100  # that layers are measured on where `run` is not given


class Matrix(NamedTuple):
    """The kept blocks of a matrix (outputs, inputs); csrc/cpu/sparse.cpp describes it."""

    values: Tensor  # (blocks, r, c): float32, bfloat16 or int8
    columns: Tensor  # (blocks,) uint16: first input / c
    offsets: Tensor  # (ceil(outputs / r) + 1,) int32: where each block row begins
    scales: Tensor | None  # (outputs,) float32: what int8 values are multiplied by


def pack(weight: Tensor, mask: Tensor, layout: str, dtype: str = "float32") -> Matrix:
    """The blocks of weight * mask, both (outputs, inputs), that have a weight left.

    Raises ValueError if a block's place does not fit 16 bits.
    """
    (r, c), (outputs, inputs) = LAYOUTS[layout], weight.shape
    if inputs > c << 16:
        raise ValueError(f"inputs must be at most {c << 16} for layout {layout} (16-bit places), got {inputs}")

    def blocks(x: Tensor) -> Tensor:  # (outputs, inputs) -> (outputs / r, inputs / c, r, c)
        x = F.pad(x, (0, -inputs % c, 0, -outputs % r))
        return x.unflatten(1, (x.shape[1] // c, c)).unflatten(0, (x.shape[0] // r, r)).transpose(1, 2)

    weight = weight.detach().float().masked_fill(~mask, 0)
    scales = None
    if dtype == "int8":
        scales = weight.abs().amax(1) / 127
        weight = (weight / scales.clamp(min=1e-30)[:, None]).round()
    kept = blocks(mask).flatten(2).any(2)
    return Matrix(
        blocks(weight)[kept].to(DTYPES[dtype]).contiguous(),
        kept.nonzero()[:, 1].to(torch.uint16),
        F.pad(kept.sum(1).cumsum(0), (1, 0)).int(),
        scales,
    )


def unpack(
    values: Tensor, columns: Tensor, offsets: Tensor, scales: Tensor | None, outputs: int, inputs: int
) -> Tensor:
    """The matrix (outputs, inputs), float32."""
    _, r, c = values.shape
    groups = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    blocks = values.new_zeros(len(offsets) - 1, -(-inputs // c), r, c, dtype=torch.float32)
    blocks[groups, columns.long()] = values.float()
    weight = blocks.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, :inputs]
    return weight if scales is None else weight * scales[:, None]


# ---------------------------------------------------------------------------- ops: the reference


def reference_sparse_linear(x, values, columns, offsets, scales, bias, outputs: int) -> Tensor:
    """x (..., inputs) -> x W^T + bias, (..., outputs)."""
    return F.linear(x, unpack(values, columns, offsets, scales, outputs, x.shape[-1]), bias)


def conv_size(size, kernel, stride, padding, dilation) -> list[int]:
    """(H, W) of a convolution's output."""
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)]


def reference_sparse_conv2d(
    x, values, columns, offsets, scales, bias, outputs: int, kernel, stride, padding, dilation
) -> Tensor:
    """x (B, C, H, W), W (outputs, C * kernel[0] * kernel[1]) -> (B, outputs, H', W')."""
    weight = unpack(values, columns, offsets, scales, outputs, x.shape[1] * math.prod(kernel))
    return F.conv2d(x, weight.view(outputs, x.shape[1], *kernel), bias, stride, padding, dilation)


def reference_sparse_lstm(projections, values, columns, offsets, scales, h0, c0, lengths, reverse: bool):
    """The LSTM's recurrence over projections (B, T, 4 H), which hold W_ih x and both biases.

    h0, c0: (B, H).  Returns outputs (B, T, H), zeros behind an end, and the last h and c. `reverse` starts at each end.
    """
    batch, time, hidden = *projections.shape[:2], h0.shape[1]
    weight = unpack(values, columns, offsets, scales, 4 * hidden, hidden)
    lengths = torch.full((batch,), time) if lengths is None else lengths
    outputs, h_last, c_last = projections.new_zeros(batch, time, hidden), h0.clone(), c0.clone()
    for b, length in enumerate(lengths.tolist()):
        h, c = h0[b], c0[b]
        for t in reversed(range(length)) if reverse else range(length):
            i, f, g, o = (projections[b, t] + weight @ h).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs[b, t] = h
        h_last[b], c_last[b] = h, c
    return outputs, h_last, c_last


def reference_sparse_transducer(
    encoder_out, inputs, recurrent, projection, output, bias, max_symbols: int, state: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Greedy decoding of one utterance, models.Transducer.search; token 0 is the blank.

    encoder_out: (T, joiner), what the joiner adds to the predictor.  inputs: (tokens, 4 H), the embeddings through W_ih
    with both biases.  recurrent (W_hh), projection (joiner, H), output (tokens, joiner): the tensors of a Matrix.
    state: [predictor_out (joiner,), h (H,), c (H,)] of the frames before, or [].
    Returns tokens (n,) int64, their frames (n,) int64 and probabilities (n,), and the state after the last frame.
    """
    hidden, joiner = inputs.shape[1] // 4, encoder_out.shape[1]
    projection = unpack(*projection, *[None] * (4 - len(projection)), joiner, hidden)
    output = unpack(*output, *[None] * (4 - len(output)), len(inputs), joiner)
    scales = recurrent[3] if len(recurrent) == 4 else None

    def predict(token: int, h: Tensor, c: Tensor) -> list[Tensor]:
        projections = inputs[token].view(1, 1, -1)
        out, h, c = reference_sparse_lstm(projections, *recurrent[:3], scales, h[None], c[None], None, False)
        return [projection @ out[0, 0], h[0], c[0]]

    tokens, frames, probabilities = [], [], []
    predicted, h, c = state or predict(0, inputs.new_zeros(hidden), inputs.new_zeros(hidden))
    for t, frame in enumerate(encoder_out):
        for _ in range(max_symbols):
            logits = F.linear(torch.tanh(frame + predicted), output, bias)
            best = int(logits.argmax())
            if best == 0:
                break
            tokens.append(best)
            frames.append(t)
            probabilities.append(float(logits.softmax(0)[best]))
            predicted, h, c = predict(best, h, c)
    ids = (torch.tensor(numbers, dtype=torch.int64) for numbers in (tokens, frames))
    return *ids, inputs.new_tensor(probabilities), [x.clone() for x in (predicted, h, c)]


if "pure" in lottery.ops.path:
    sparse_linear, sparse_conv2d = reference_sparse_linear, reference_sparse_conv2d
    sparse_lstm, sparse_transducer = reference_sparse_lstm, reference_sparse_transducer
else:
    sparse_linear, sparse_conv2d = torch.ops.audio_lottery.sparse_linear, torch.ops.audio_lottery.sparse_conv2d
    sparse_lstm, sparse_transducer = torch.ops.audio_lottery.sparse_lstm, torch.ops.audio_lottery.sparse_transducer
    torch.library.register_fake(
        "audio_lottery::sparse_linear",
        lambda x, values, columns, offsets, scales, bias, outputs: x.new_empty(*x.shape[:-1], outputs),
    )
    torch.library.register_fake(
        "audio_lottery::sparse_lstm",
        lambda projections, values, columns, offsets, scales, h0, c0, lengths, reverse: (
            projections.new_empty(*projections.shape[:2], h0.shape[1]), torch.empty_like(h0), torch.empty_like(c0),
        ),
    )  # fmt: skip

    @torch.library.register_fake("audio_lottery::sparse_conv2d")
    def fake_conv2d(x, values, columns, offsets, scales, bias, outputs, kernel, stride, padding, dilation):
        return x.new_empty(len(x), outputs, *conv_size(x.shape[2:], kernel, stride, padding, dilation))

    @torch.library.register_fake("audio_lottery::sparse_transducer")
    def fake_transducer(encoder_out, inputs, recurrent, projection, output, bias, max_symbols, state):
        emitted, hidden = torch.library.get_ctx().new_dynamic_size(), inputs.shape[1] // 4
        ids = [encoder_out.new_empty(emitted, dtype=torch.int64) for _ in range(2)]
        after = [encoder_out.new_empty(size) for size in (encoder_out.shape[1], hidden, hidden)]
        return *ids, encoder_out.new_empty(emitted), after


# ---------------------------------------------------------------------------- layers


class Product(nn.Module):
    """x -> x W^T + bias, W in one layout."""

    def __init__(self, matrix: Matrix, bias: Tensor | None, outputs: int):
        super().__init__()
        self.outputs = outputs
        for name, tensor in {**matrix._asdict(), "bias": bias}.items():
            self.register_buffer(name, tensor)

    def matrix(self) -> Matrix:
        own = self._buffers  # nn.Module looks attributes up so slowly that a stream would feel it
        return Matrix(own["values"], own["columns"], own["offsets"], own["scales"])

    def forward(self, x: Tensor) -> Tensor:
        return sparse_linear(x, *self.matrix(), self.bias, self.outputs)


class Recurrent(Product):
    """The recurrence of an LSTM, W_hh in one layout."""

    def forward(self, projections: Tensor, h: Tensor, c: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        return sparse_lstm(projections, *self.matrix(), h, c, None, reverse)


class DenseProduct(nn.Module):
    """x -> x W^T + bias with nothing left out, W as oneDNN likes it for so many columns."""

    def __init__(self, weight: Tensor, bias: Tensor | None, columns: int):
        super().__init__()
        self.register_buffer("bias", bias)
        self.columns, self.packed = columns, torch.ops.mkldnn._reorder_linear_weight(weight, columns)

    def __getstate__(self) -> dict:  # for copy and pickle, which oneDNN's form of a tensor has none of
        return self.__dict__ | {"packed": self.packed.to_dense()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.packed, self.columns)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


class Conv(Product):
    """Conv1d or Conv2d with one group and zeros for padding, its weights (outputs, inputs * kernel) in one layout."""

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, matrix: Matrix, bias: Tensor | None):
        super().__init__(matrix, bias, conv.out_channels)
        self.one_d = isinstance(conv, nn.Conv1d)
        wide = lambda pair, fill: (fill, *pair) if self.one_d else pair  # noqa: E731
        self.window = (
            wide(conv.kernel_size, 1), wide(conv.stride, 1), wide(conv.padding, 0), wide(conv.dilation, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, [F,] T) -> (B, C', [F',] T')."""
        if self.one_d:
            x = x[:, :, None]
        y = sparse_conv2d(x, *self.matrix(), self.bias, self.outputs, *self.window)
        return y[:, :, 0] if self.one_d else y


class Lstm(nn.Module):
    """nn.LSTM with sparse products; called as it is, on batches."""

    def __init__(self, lstm: nn.LSTM, inputs: list[nn.Module], recurrent: list[Recurrent]):
        super().__init__()
        self.batch_first, self.directions = lstm.batch_first, 2 if lstm.bidirectional else 1
        self.inputs, self.recurrent = nn.ModuleList(inputs), nn.ModuleList(recurrent)  # a layer's directions in turn

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None):
        """(B, T, inputs) -> (B, T, directions * H), (h, c), each (layers * directions, B, H)."""
        if not self.batch_first:
            x = x.transpose(0, 1)
        if state is None:
            zeros = x.new_zeros(len(self.inputs), x.shape[0], self.recurrent[0].outputs // 4)
            state = (zeros, zeros)
        h_last, c_last, outs = [], [], []
        for i, (product, recurrent) in enumerate(zip(self.inputs, self.recurrent)):
            reverse = i % self.directions == 1
            out, h, c = recurrent(product(x), state[0][i], state[1][i], reverse)
            h_last.append(h)
            c_last.append(c)
            outs.append(out)
            if len(outs) == self.directions:
                x, outs = torch.cat(outs, 2) if len(outs) > 1 else outs[0], []
        return x if self.batch_first else x.transpose(0, 1), (torch.stack(h_last), torch.stack(c_last))


class Greedy(nn.Module):
    """The greedy loop of a compressed models.Transducer over one utterance, without Python for every symbol."""

    def __init__(self, model: nn.Module):
        super().__init__()
        embedding, predictor = model.embedding.weight, model.predictor
        if isinstance(predictor, Lstm):
            inputs, recurrent = predictor.inputs[0](embedding), predictor.recurrent[0].matrix()
        else:
            bias = predictor.bias_ih_l0 + predictor.bias_hh_l0
            inputs, recurrent = F.linear(embedding, predictor.weight_ih_l0, bias), whole(predictor.weight_hh_l0)
        self.max_symbols = model.MAX_SYMBOLS
        self.register_buffer("inputs", inputs)
        self.register_buffer("bias", model.output.bias)
        matrices = {
            "recurrent": recurrent,
            "projection": matrix_of(model.predictor_projection),
            "output": matrix_of(model.output),
        }
        self.names = {}
        for name, matrix in matrices.items():
            tensors = {f"{name}_{part}": t for part, t in matrix._asdict().items() if t is not None}
            self.names[name] = list(tensors)
            for part, tensor in tensors.items():
                self.register_buffer(part, tensor)

    def forward(self, encoder_out: Tensor, state: list[Tensor]) -> tuple[list[tuple], list[Tensor]]:
        """(T, joiner) -> token, frame and probability of what is emitted, and the state."""
        matrices = [[getattr(self, part) for part in parts] for parts in self.names.values()]
        *found, state = sparse_transducer(encoder_out, self.inputs, *matrices, self.bias, self.max_symbols, state)
        return list(zip(*(tensor.tolist() for tensor in found))), state


def search(self: nn.Module, encoder_out: Tensor, lengths: Tensor, state=None) -> tuple[list[list], tuple]:
    """models.Transducer.search; there, Python takes nine tenths of a small compressed model's time."""
    from models import Emission, Transducer  # here, so that other models need nothing of speech

    if not len(lengths):
        return Transducer.search(self, encoder_out, lengths, state)
    predictor_out, (h, c) = state or (None, (None, None))
    found, states = [], []
    for b, length in enumerate(lengths.tolist()):
        before = [] if state is None else [predictor_out[b], h[0, b], c[0, b]]
        emitted, after = self.greedy(encoder_out[b, :length], before)
        found.append([Emission(token, frame, frame + 1, p) for token, frame, p in emitted])
        states.append(after)
    predictor_out, h, c = (torch.stack(tensors) for tensors in zip(*states))
    return found, (predictor_out, (h[None], c[None]))


def whole(weight: Tensor) -> Matrix:
    """With nothing left out."""
    return pack(weight, torch.ones_like(weight, dtype=torch.bool), "16x1")


def matrix_of(layer: nn.Module) -> Matrix:
    if isinstance(layer, Product):
        return layer.matrix()
    return whole(layer.packed.to_dense() if isinstance(layer, DenseProduct) else layer.weight)


# ---------------------------------------------------------------------------- what is fastest


class Taken(NamedTuple):
    """A row of the table: what one pruned weight took."""

    name: str
    shape: tuple[int, int]  # (outputs, inputs), as a product
    remaining: float
    columns: int  # in its largest call
    layout: str  # one of LAYOUTS, or dense
    bytes: int
    why: str  # milliseconds of everything tried, in all calls of `run` together; or why nothing was

    def as_dense(self, why: str) -> "Taken":
        if self.layout == "dense":
            return self
        return self._replace(layout="dense", bytes=4 * self.shape[0] * self.shape[1], why=f"{self.why}; {why}")

    def __str__(self) -> str:
        left = f"{self.name:40} {'x'.join(map(str, self.shape)):>10} {self.remaining:6.1%} {self.columns:6d}"
        return f"{left} {self.layout:15} {self.bytes:9d}  {self.why}"


Calls = list[tuple[int, tuple]]  # how often, and with what


def time_calls(candidates: dict[str, Callable], calls: Calls) -> dict[str, float]:
    """Milliseconds each candidate needs for all calls: the least of some turns, since other programs only add.

    What takes twice as long as the best is not tried again.
    """
    total = dict.fromkeys(candidates, 0.0)
    for often, arguments in calls:
        least, left, begin = dict.fromkeys(candidates, math.inf), list(candidates), time.perf_counter()
        for turn in range(12):
            for name in left:
                start = time.perf_counter()
                candidates[name](*arguments)
                least[name] = min(least[name], time.perf_counter() - start)
            limit = min(least.values()) * (2 if turn else 8)  # the first turn warms up
            left = [name for name in left if least[name] <= limit]
            if len(left) == 1 or (turn >= 3 and time.perf_counter() - begin > 0.05):
                break
        for name in candidates:
            total[name] += 1e3 * often * least[name]
    return total


def said(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(times.items(), key=lambda item: item[1]))


def record_calls(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[nn.Module, Calls]:
    """What each module is called with while `run(model)` runs; calls of one shape are counted, not kept."""
    seen: dict[nn.Module, dict] = {}

    def record(module: nn.Module, arguments: tuple) -> None:
        if not arguments:  # all by keyword: not what a replacement could be called with
            return
        shapes = tuple(a.shape if isinstance(a, Tensor) else type(a) for a in arguments)
        often = seen.setdefault(module, {}).get(shapes, (0, None))[0]
        seen[module][shapes] = (often + 1, arguments)

    hooks = [module.register_forward_pre_hook(record) for module in model.modules()]
    try:
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: list(calls.values()) for module, calls in seen.items()}


def usual_calls(module: nn.Module) -> Calls:
    """One utterance of FRAMES frames, for layers whose input needs nothing else: all but Conv2d."""
    if isinstance(module, nn.Linear):
        size = (1, FRAMES, module.in_features)
    elif isinstance(module, nn.LSTM):
        size = (1, FRAMES, module.input_size) if module.batch_first else (FRAMES, 1, module.input_size)
    elif isinstance(module, nn.Conv1d):
        size = (1, module.in_channels, FRAMES + module.dilation[0] * (module.kernel_size[0] - 1))
    else:
        return []
    return [(1, (torch.randn(size, generator=torch.Generator().manual_seed(0)),))]


def smaller(weight: Tensor, mask: Tensor, layouts: list[str], dtype: str) -> dict[str, Matrix]:
    """The matrix in each layout that stores less than all of it."""
    found = {}
    for layout in layouts:
        r, c = LAYOUTS[layout]
        if weight.shape[1] <= c << 16 and mask.sum() < mask.numel():
            matrix = pack(weight, mask, layout, dtype)
            if matrix.values.numel() < weight.numel():
                found[layout] = matrix
    return found


def products(weight: Tensor, bias: Tensor | None, matrices: dict[str, Matrix], columns: int) -> dict[str, nn.Module]:
    """x -> x W^T + bias in every way there is."""
    outputs, inputs = weight.shape
    dense = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias is not None)
    dense.weight, dense.bias = nn.Parameter(weight, False), None if bias is None else nn.Parameter(bias, False)
    candidates = {"dense": dense}
    if torch.backends.mkldnn.is_available():
        candidates["dense prepacked"] = DenseProduct(weight, bias, columns)
    return candidates | {layout: Product(matrix, bias, outputs) for layout, matrix in matrices.items()}


def row(name: str, mask: Tensor, columns: int, layout: str, matrices: dict[str, Matrix], why: str) -> Taken:
    tensors = [t for t in matrices[layout] if t is not None] if layout in matrices else []
    size = sum(t.numel() * t.element_size() for t in tensors) if tensors else 4 * mask.numel()
    return Taken(name, tuple(mask.shape), float(mask.float().mean()), columns, layout, size, why)


def compress_layer(name: str, layer: nn.Module, masks: lottery.Masks, calls: Calls, layouts: list[str], dtype: str):
    """A linear layer or a convolution: what it becomes, and its row."""
    mask, weight = masks[f"{name}.weight"].flatten(1), layer.weight.detach().flatten(1)
    bias = None if layer.bias is None else layer.bias.detach()
    matrices = smaller(weight, mask, layouts, dtype)
    columns = max(layer(*arguments).numel() for _, arguments in calls) // len(weight)
    if isinstance(layer, nn.Linear):
        candidates = products(weight, bias, matrices, columns)
    else:
        candidates = {"dense": layer} | {layout: Conv(layer, matrix, bias) for layout, matrix in matrices.items()}
    times = time_calls(candidates, calls)
    taken = min(times, key=times.get)
    return candidates[taken], [row(f"{name}.weight", mask, columns, taken, matrices, said(times))]


def compress_lstm(name: str, lstm: nn.LSTM, masks: lottery.Masks, calls: Calls, layouts: list[str], dtype: str):
    """An nn.LSTM: what it becomes, and a row for each of its weights. Its layers are measured in turn."""
    inputs, recurrent, rows = [], [], []
    xs = [(often, a[0] if lstm.batch_first else a[0].transpose(0, 1)) for often, a in calls]  # (B, T, inputs) each
    outs = []
    suffixes = [f"l{i}{end}" for i in range(lstm.num_layers) for end in ("", "_reverse")[: 1 + lstm.bidirectional]]
    for suffix in suffixes:
        weight, mask = getattr(lstm, f"weight_ih_{suffix}").detach(), masks[f"{name}.weight_ih_{suffix}"]
        bias = getattr(lstm, f"bias_ih_{suffix}") + getattr(lstm, f"bias_hh_{suffix}") if lstm.bias else None
        columns = max(x.shape[0] * x.shape[1] for _, x in xs)
        matrices = smaller(weight, mask, layouts, dtype)
        candidates = products(weight, None if bias is None else bias.detach(), matrices, columns)
        times = time_calls(candidates, [(often, (x,)) for often, x in xs])
        taken = min(times, key=times.get)
        inputs.append(candidates[taken])
        rows.append(row(f"{name}.weight_ih_{suffix}", mask, columns, taken, matrices, said(times)))

        weight, mask = getattr(lstm, f"weight_hh_{suffix}").detach(), masks[f"{name}.weight_hh_{suffix}"]
        columns = max(x.shape[0] for _, x in xs)  # at a time
        matrices = smaller(weight, mask, layouts, dtype)
        matrices["dense"] = whole(weight)
        candidates = {layout: Recurrent(matrix, None, len(weight)) for layout, matrix in matrices.items()}
        reverse = suffix.endswith("reverse")
        states = [(often, inputs[-1](x), x.new_zeros(x.shape[0], lstm.hidden_size)) for often, x in xs]
        times = time_calls(candidates, [(often, (x, zeros, zeros, reverse)) for often, x, zeros in states])
        taken = min(times, key=times.get)
        recurrent.append(candidates[taken])
        rows.append(row(f"{name}.weight_hh_{suffix}", mask, columns, taken, matrices, said(times)))

        outs.append([recurrent[-1](x, zeros, zeros, reverse)[0] for _, x, zeros in states])
        if len(outs) == 1 + lstm.bidirectional:
            xs = [(often, torch.cat(out, 2)) for (often, _), out in zip(xs, zip(*outs))]
            outs = []
    compressed = Lstm(lstm, inputs, recurrent)
    times = time_calls({"nn.LSTM": lstm, "ours": compressed}, calls)
    if times["nn.LSTM"] < times["ours"]:
        return lstm, [r.as_dense(said(times)) for r in rows]
    return compressed, [r._replace(why=f"{r.why}; {said(times)}") for r in rows]


def form_of(name: str, module: nn.Module, weight: Tensor, calls: Calls, ran: bool) -> tuple[Callable | None, str]:
    """What makes a pruned module sparse, compress_layer or compress_lstm; or None, and why it stays dense."""
    kind, tensors = type(module), [a[0] for _, a in calls if isinstance(a[0], Tensor)]  # else packed sequences
    dims, floats = {t.dim() for t in tensors}, {t.dtype for t in [*tensors, weight]} == {torch.float32}
    if not calls:
        return None, "run does not reach it" if ran else f"a {kind.__name__} is measured where `run` is given"
    if not name:
        return None, "it is the whole model"
    if floats and len(tensors) == len(calls):
        if kind is nn.Linear:
            return compress_layer, ""
        if kind is nn.LSTM and not module.proj_size and dims == {3}:  # on batches
            return compress_lstm, ""
        if kind in (nn.Conv1d, nn.Conv2d) and module.groups == 1 and dims == {3 if kind is nn.Conv1d else 4}:
            if module.padding_mode == "zeros" and not isinstance(module.padding, str):
                return compress_layer, ""
    return None, f"no sparse form of this {kind.__name__}"


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers, whatever form they are kept in."""
    packed = [4 * m.packed.numel() for m in model.modules() if isinstance(m, DenseProduct)]
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) + sum(packed)


def compress(
    model: nn.Module, masks: lottery.Masks, run: Callable[[nn.Module], object] | None = None, *,
    layout: str | None = None, dtype: str = "float32",
) -> tuple[nn.Module, list[Taken]]:  # fmt: skip
    """A copy of the model whose pruned products are sparse where that is faster, in evaluation mode, and the table.

    The copy is called as the model is; its LSTMs take and return (h, c), so that a stream may come in chunks.
    run: uses the model as it will be used (`lambda model: model.transcribe(features, input_lengths)`): each layer is
    measured on what reaches it there, with as many threads as torch has now; layers that are not reached stay dense.
    It is called up to 25 times, so it must not use anything up; if it is faster dense as a whole, all stays dense.
    Without it a layer is measured on one utterance of FRAMES frames, and Conv2d stays dense.
    layout: one of LAYOUTS to measure against dense; all by default.
    dtype: "float32", "bfloat16", or "int8" with a scale an output; for sparse layers, dense ones stay float32.
    Raises LotteryError for masks that are not the model's.
    """
    if dtype not in DTYPES:
        raise lottery.LotteryError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if layout is not None and layout not in LAYOUTS:
        raise lottery.LotteryError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
    layouts = list(LAYOUTS) if layout is None else [layout]
    compressed = copy.deepcopy(model).eval().requires_grad_(False)
    weights = lottery.prunable(compressed)
    for name, weight in weights.items():
        if name not in masks or masks[name].shape != weight.shape:
            shape = list(masks[name].shape) if name in masks else "none"
            raise lottery.LotteryError(f"{name}: a mask of shape {list(weight.shape)} is needed, got {shape}")
        weight.masked_fill_(~masks[name], 0)
    rows, dense = [], copy.deepcopy(compressed)
    with torch.no_grad():
        all_calls = record_calls(compressed, run) if run else {m: usual_calls(m) for m in compressed.modules()}
        for name, module in list(compressed.named_modules()):
            own = [n for n in weights if n.rpartition(".")[0] == name]
            if not own:
                continue
            calls = all_calls.get(module, [])
            become, why = form_of(name, module, weights[own[0]], calls, run is not None)
            if become is None:
                rows += [row(n, masks[n].flatten(1), 0, "dense", {}, why) for n in own]
                continue
            module, own_rows = become(name, module, masks, calls, layouts, dtype)
            rows += own_rows
            parent, _, child = name.rpartition(".")
            setattr(compressed.get_submodule(parent), child, module)
        models = sys.modules.get("models")  # not imported here: a model of it has done so
        for transducer in (compressed, dense) if models and type(compressed) is models.Transducer else ():
            transducer.greedy = Greedy(transducer)
            transducer.search = functools.partial(search, transducer)
        if run and any(row.layout != "dense" for row in rows):  # layers may gain less than what surrounds them costs
            times = time_calls({"dense": lambda: run(dense), "ours": lambda: run(compressed)}, [(1, ())])
            if times["dense"] < times["ours"]:
                return dense, [r.as_dense(f"the whole model: {said(times)}") for r in rows]
    return compressed, rows
