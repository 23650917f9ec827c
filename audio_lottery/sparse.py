"""Sparse products on a CPU: layouts, the matrices in them, and the operators as slow references.

A weight is seen as (outputs, inputs) and kept in blocks r x c, a layout: "unstructured" is 1x1; in 4x1, 8x1 and 16x1
neighbouring outputs share an input. Blocks that a mask keeps in part are filled with zeros, so every layout is exact.
The operators are compiled (csrc/cpu/sparse.cpp) or, without the extension, the references below. The layers made
of them are layers.py's; which takes which layout is chosen in compression.py.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lottery

LAYOUTS = {"unstructured": (1, 1), "1x4": (1, 4), "4x1": (4, 1), "8x1": (8, 1), "16x1": (16, 1)}
WAYS = (*LAYOUTS, "windows", "bytes", "dense", "dense prepacked")  # that a weight's product may take
FEW_COLUMNS = 4  # csrc/cpu/sparse.cpp takes fewer one at a time
# w8a8: int8, whose products round their inputs to eight bits too where this processor multiplies bytes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8, "w8a8": torch.int8}


class Matrix(NamedTuple):
    """The kept blocks of a matrix (outputs, inputs); csrc/cpu/sparse.cpp describes it."""

    values: Tensor  # (blocks, r, c): float32, bfloat16 or int8
    columns: Tensor  # (blocks,) uint16: first input / c
    offsets: Tensor  # (ceil(outputs / r) + 1,) int32: where each block row begins
    scales: Tensor | None  # (outputs,) float32: what int8 values are multiplied by


def to_matrix(weight: Tensor, mask: Tensor, layout: str, dtype: str = "float32") -> Matrix:
    """The blocks of weight * mask that have a weight left.

    weight: (outputs, inputs), float.  mask: the same shape, bool, True = kept.  layout: a key of LAYOUTS.
    dtype: a key of DTYPES, the values'; int8 has a scale an output.
    Raises ValueError if a block's place does not fit 16 bits: more than 65,536 inputs, 262,144 for 1x4.
    """
    (r, c), (outputs, inputs) = LAYOUTS[layout], weight.shape
    if inputs > c << 16:
        raise ValueError(f"inputs must be at most {c << 16} for layout {layout} (16-bit places), got {inputs}")

    def blocks(x: Tensor) -> Tensor:  # (outputs, inputs) -> (outputs / r, inputs / c, r, c)
        x = F.pad(x, (0, -inputs % c, 0, -outputs % r))
        return x.unflatten(1, (x.shape[1] // c, c)).unflatten(0, (x.shape[0] // r, r)).transpose(1, 2)

    weight = weight.detach().float().masked_fill(~mask, 0)
    scales = None
    if DTYPES[dtype] is torch.int8:
        scales = F.pad(weight.abs(), (0, 1)).amax(1) / 127
        weight = (weight / torch.where(scales > 0, scales, 1)[:, None]).round().clamp(-127, 127)
    kept = blocks(mask).flatten(2).any(2)
    return Matrix(
        blocks(weight)[kept].to(DTYPES[dtype]).contiguous(),
        kept.nonzero()[:, 1].to(torch.uint16),
        F.pad(kept.sum(1).cumsum(0), (1, 0)).int(),
        scales,
    )


class Windows(NamedTuple):
    """A Matrix of single weights again, in the form that is fastest for one column.

    Some rows are a group, one a lane, rows with many weights first. A step has a window of neighbouring inputs; each
    lane takes its next weight, left to right, if its input is there, and 0 otherwise. Some steps are a bundle.
    """

    values: Tensor  # (bundles, steps, lanes), as in Matrix
    places: Tensor  # (bundles, lanes) int32: of each lane's inputs in the windows, 32 // steps bits a step
    starts: Tensor  # (bundles, steps) uint16: each step's first input
    offsets: Tensor  # (groups + 1,) int32: each group's first bundle
    rows: Tensor  # (groups, lanes) int32: each lane's output; as many as there are outputs where there is none


STEPS = {8: (8, 8, 1), 16: (6, 32, 16)}  # by lanes: a bundle's steps, a window's inputs, what starts are multiples of


def to_windows(matrix: Matrix, lanes: int | None = None) -> Windows:
    """`matrix`, of layout "unstructured", as Windows of 8 or 16 lanes: by default of as many as this processor has."""
    lanes = lanes or (16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8)
    steps, wide, multiple = STEPS[lanes]
    values, columns = (F.pad(x, (0, 1)) for x in (matrix.values.flatten(), matrix.columns.long()))  # none: the last
    begins, outputs = matrix.offsets.long(), len(matrix.offsets) - 1
    rows = begins.diff().argsort(descending=True, stable=True)
    rows = F.pad(rows, (0, -outputs % lanes), value=outputs).view(-1, lanes)  # (groups, lanes)
    at, end = begins[rows], F.pad(begins, (0, 1), value=int(begins[-1]))[rows + 1]
    taken, places, starts = [], [], []  # (groups, lanes), (groups, lanes) and (groups, 1) a step
    while len(taken) % steps or bool((at < end).any()):
        column = torch.where(at < end, columns[at], 1 << 30)
        first = column.amin(1, keepdim=True) // multiple * multiple
        takes = (at < end) & (column < first + wide)
        taken.append(torch.where(takes, at, len(values) - 1))
        places.append(torch.where(takes, column - first, 0))
        starts.append(first % (1 << 30))  # 0 where nothing is left
        at = at + takes
    if not taken:
        empty = matrix.columns.new_zeros
        return Windows(
            values.new_zeros(0, steps, lanes), empty((0, lanes), dtype=torch.int32), empty((0, steps)),
            empty(len(rows) + 1, dtype=torch.int32), rows.int(),
        )  # fmt: skip

    def bundles(parts: list[Tensor]) -> Tensor:  # -> (groups, bundles of the longest, steps, lanes or 1)
        return torch.stack(parts, 1).unflatten(1, (-1, steps))

    taken = bundles(taken)
    used = (taken < len(values) - 1).flatten(2).any(2)  # (groups, bundles)
    shifts = 32 // steps * torch.arange(steps, device=at.device)[:, None]
    return Windows(
        values[taken[used]],
        (bundles(places)[used] << shifts).sum(1).int(),
        bundles(starts)[used].squeeze(2).to(torch.uint16),
        F.pad(used.sum(1).cumsum(0), (1, 0)).int(),
        rows.int(),
    )


class Bytes(NamedTuple):
    """An int8 Matrix of single weights again, for inputs that are rounded to eight bits too; csrc/cpu/bytes.h.

    As Windows, but that each of 8 or 16 lanes takes up to EACH weights a step, of a window of EACH inputs a lane.
    """

    values: Tensor  # (steps, lanes, EACH) int8: 0 where a lane takes less
    places: Tensor  # the same, uint8: where in the window each input is
    starts: Tensor  # (steps,) uint16: where each step's window begins, at or before its first input
    offsets: Tensor  # (groups + 1,) int32: each group's first step
    rows: Tensor  # (groups, lanes) int32: each lane's output; as many as there are outputs where there is none
    sums: Tensor  # (groups, lanes) int32: of each lane's values, which VNNI takes off
    scales: Tensor  # (groups, lanes) float32: what they are multiplied by; 0 where there is none


EACH = 4
ALIGN = 32  # csrc/cpu/bytes.h keeps columns so that it reads windows at its multiples fastest


def byte_lanes() -> int:
    """Lanes of Bytes that this processor is fast with: 16 (AVX-512 VNNI and VBMI), 8 (AVX2) or 0, none."""
    if not lottery.ops.compiled:
        return 0
    import _lottery

    return _lottery.byte_lanes()


def to_bytes(matrix: Matrix, lanes: int | None = None, align: int = ALIGN) -> Bytes:
    """`matrix`, of layout "unstructured" and int8, with at most 65,536 inputs, as Bytes.

    lanes: 8 or 16; by default as many as this processor is fast with, 16 where that is neither.
    align: what the starts of windows are multiples of, with 16 lanes; at most 64.
    Rows with many weights come first, or all stay in their order where that takes hardly more steps: then a group's
    outputs are neighbours, and cost as much as some five steps less.
    """
    counts, lanes = matrix.offsets.long().diff(), lanes or byte_lanes() or 16
    orders = counts.argsort(descending=True, stable=True), torch.arange(len(counts))
    ways = [in_steps(matrix, rows, lanes, align if lanes == 16 else 1) for rows in orders]
    return min(ways, key=lambda way: len(way.values) + 5 * len(way.rows) * (way is ways[0]))


def in_steps(matrix: Matrix, rows: Tensor, lanes: int, align: int) -> Bytes:
    """rows: the order of the outputs, `lanes` of them a group."""
    values, columns = (F.pad(x, (0, 1)) for x in (matrix.values.flatten(), matrix.columns.long()))  # none: the last
    begins, outputs, none = matrix.offsets.long(), len(matrix.offsets) - 1, len(values) - 1
    rows = F.pad(rows, (0, -outputs % lanes), value=outputs).view(-1, lanes)  # (groups, lanes)
    at, end = begins[rows], F.pad(begins, (0, 1), value=int(begins[-1]))[rows + 1]
    taken, places, starts = [], [], []  # (groups, lanes, EACH) twice and (groups,) a step
    while bool((at < end).any()):
        first = torch.where(at < end, columns[at], 1 << 30).amin(1, keepdim=True)
        first -= first % align
        some = []
        for _ in range(EACH):
            takes = (at < end) & (columns[at] < first + lanes * EACH)
            some.append(torch.where(takes, at, none))
            at = at + takes
        some = torch.stack(some, 2)
        taken.append(some)
        places.append(torch.where(some < none, columns[some] - first[:, :, None], 0))
        starts.append(first[:, 0] % (1 << 30))  # 0 where nothing is left
    shape = (len(rows), len(taken))
    taken = torch.stack(taken, 1) if taken else columns.new_zeros(*shape, lanes, EACH)
    places = torch.stack(places, 1) if places else columns.new_zeros(*shape, lanes, EACH)
    starts = torch.stack(starts, 1) if starts else columns.new_zeros(shape)
    used = (taken < none).flatten(2).any(2)  # (groups, steps of the longest)
    kept = values[taken] * (taken < none)
    return Bytes(
        kept[used].contiguous(),
        places[used].to(torch.uint8),
        starts[used].to(torch.uint16),
        F.pad(used.sum(1).cumsum(0), (1, 0)).int(),
        rows.int(),
        kept.int().sum((1, 3)).int(),
        F.pad(matrix.scales, (0, 1))[rows],
    )


def from_bytes(tensors: list[Tensor], outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Bytes (its seven fields) as integers (outputs, inputs), float64, and their scales (outputs,)."""
    values, places, starts, offsets, rows, _, scales = tensors
    window = values.shape[1] * EACH
    groups = torch.arange(len(rows), device=rows.device).repeat_interleave(offsets.diff(), output_size=len(values))
    weight = values.new_zeros(outputs + 1, inputs + window, dtype=torch.float64)
    at = rows.long()[groups][:, :, None].expand_as(values), starts.long()[:, None, None] + places.long() % window
    weight.index_put_(at, values.double(), accumulate=True)
    by_row = scales.new_zeros(outputs + 1).index_put_((rows.long().flatten(),), scales.flatten())
    return weight[:outputs, :inputs], by_row[:outputs]


ROOM = 64  # inputs behind each row of a convolution's kernel, the widest window's


def kernel_inputs(channels: int, kernel, dilation) -> int:
    """How many inputs kernel_rows makes of an output."""
    return kernel[0] * ((dilation[1] * (kernel[1] - 1) + 1) * channels + ROOM)


def kernel_rows(weight: Tensor, dilation) -> Tensor:
    """A convolution's weight (outputs, C, h, w) as csrc/cpu/bytes.h reads images: (outputs, h * pitch), rows of pixels
    that hold their channels; pixels between those of a dilated kernel, and ROOM inputs behind each row, are 0."""
    outputs, channels, high, wide = weight.shape
    rows = weight.new_zeros(outputs, high, dilation[1] * (wide - 1) + 1, channels)
    rows[:, :, :: dilation[1]] = weight.permute(0, 2, 3, 1)
    return F.pad(rows.flatten(2), (0, ROOM)).flatten(1)


def of_kernel_rows(rows: Tensor, channels: int, kernel, dilation) -> Tensor:
    """What kernel_rows was made of."""
    pixels = rows.unflatten(1, (kernel[0], -1))[:, :, :-ROOM].unflatten(2, (-1, channels))
    return pixels[:, :, :: dilation[1]].permute(0, 3, 1, 2)


def conv_bytes(matrix: Matrix, shape: tuple[int, ...], dilation, lanes: int | None = None) -> Bytes:
    """The int8 `matrix` of a convolution's weight, of `shape` (outputs, C, h, w), as Bytes of its kernel_rows.

    matrix: to_matrix's, so that each row's largest magnitude is 127.
    Raises ValueError if these have more than 65,536 inputs.
    """
    integers = to_dense(*matrix[:3], None, shape[0], math.prod(shape[1:])).view(shape)
    rows = kernel_rows(integers, dilation)
    matrix = to_matrix(rows, rows != 0, "unstructured", "int8")._replace(scales=matrix.scales)
    return to_bytes(matrix, lanes, 1)  # a window would begin in the row before


def whole(weight: Tensor) -> Matrix:
    """(outputs, inputs) as a Matrix with nothing left out, float32."""
    return to_matrix(weight, torch.ones_like(weight, dtype=torch.bool), "16x1")


def to_dense(
    values: Tensor, columns: Tensor, offsets: Tensor, scales: Tensor | None, outputs: int, inputs: int
) -> Tensor:
    """A Matrix (its four fields) as (outputs, inputs), float32: weight * mask, up to the rounding of its values."""
    _, r, c = values.shape
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    groups = rows.repeat_interleave(offsets.diff(), output_size=len(columns))  # so that meta tensors have a size
    blocks = values.new_zeros(len(offsets) - 1, -(-inputs // c), r, c, dtype=torch.float32)
    blocks[groups, columns.long()] = values.float()
    weight = blocks.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, :inputs]
    return weight if scales is None else weight * scales[:, None]


# ---------------------------------------------------------------------------- ops: the reference


def check_devices(name: str, first: Tensor, **others: Tensor | list[Tensor] | None) -> None:
    """Raise ValueError unless all tensors are where `first` is, as csrc/cpu/sparse.cpp does."""
    for other, given in others.items():
        for tensor in given if isinstance(given, (list, tuple)) else [given]:
            if tensor is not None and tensor.device != first.device:
                raise ValueError(f"{other} must be on the device of {name}, got {tensor.device} and {first.device}")


def check_window(size, kernel, stride, padding, dilation) -> None:
    """Raise ValueError for a convolution that csrc/cpu/sparse.cpp refuses. size: (H, W) of the image."""
    pairs = {"kernel": (kernel, 1), "stride": (stride, 1), "padding": (padding, 0), "dilation": (dilation, 1)}
    for name, (pair, least) in pairs.items():
        if len(pair) != 2 or not all(least <= n < 1 << 31 for n in pair):
            raise ValueError(f"{name} must be two numbers of at least {least} and below 2^31, got {list(pair)}")
    if not all(n < 1 << 31 for n in size):
        raise ValueError(f"x must be below 2^31 high and wide, got {list(size)}")
    if min(conv_size(size, kernel, [1, 1], padding, dilation)) < 1:
        window = f"kernel {list(kernel)}, padding {list(padding)} and dilation {list(dilation)}"
        raise ValueError(f"x must be at least as large as the kernel, got {list(size)} for {window}")


def reference_sparse_linear(x, values, columns, offsets, scales, bias, outputs: int) -> Tensor:
    """x (..., inputs) -> x W^T + bias, (..., outputs); bias (outputs,) or None."""
    check_devices("x", x, values=values, columns=columns, offsets=offsets, scales=scales, bias=bias)
    return F.linear(x, to_dense(values, columns, offsets, scales, outputs, x.shape[-1]), bias)


def conv_size(size, kernel, stride, padding, dilation) -> list[int]:
    """(H, W) of a convolution's output."""
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)]


def reference_sparse_conv2d(
    x, values, columns, offsets, scales, bias, outputs: int, kernel, stride, padding, dilation
) -> Tensor:
    """x (B, C, H, W), W (outputs, C * kernel[0] * kernel[1]) -> (B, outputs, H', W').

    Raises ValueError unless kernel, stride, padding, dilation and the image are below 2^31.
    """
    check_devices("x", x, values=values, columns=columns, offsets=offsets, scales=scales, bias=bias)
    check_window(x.shape[2:], kernel, stride, padding, dilation)
    weight = to_dense(values, columns, offsets, scales, outputs, x.shape[1] * math.prod(kernel))
    return F.conv2d(x, weight.view(outputs, x.shape[1], *kernel), bias, stride, padding, dilation)


def in_eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., inputs) -> integers from -127 to 127 of its shape, float64, and what each row of them is multiplied by,
    (..., 1). A row with a NaN or an infinity has NaN there, one whose scale is no normal number 0."""
    scale = x.abs().amax(-1, keepdim=True) / 127 if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scale = torch.where(scale.isfinite(), torch.where(scale < torch.finfo(x.dtype).tiny, 0.0, scale), math.nan)
    return torch.where(scale > 0, (x * (1 / scale)).round(), 0.0).double(), scale  # as the operators round: a product


def reference_sparse_linear_in_bytes(x, bytes, bias, outputs: int) -> Tensor:
    """reference_sparse_linear by the seven tensors of Bytes, of x rounded to eight bits, each row by its own scale."""
    check_devices("x", x, bytes=bytes, bias=bias)
    (weight, scales), (rounded, scale) = from_bytes(bytes, outputs, x.shape[-1]), in_eight_bits(x)
    y = (rounded @ weight.T).float() * scales * scale
    return y if bias is None else y + bias


def reference_sparse_conv2d_in_bytes(x, bytes, bias, outputs: int, kernel, stride, padding, dilation) -> Tensor:
    """reference_sparse_conv2d by the tensors of conv_bytes, of x rounded to eight bits, each image by its own scale."""
    check_devices("x", x, bytes=bytes, bias=bias)
    check_window(x.shape[2:], kernel, stride, padding, dilation)
    integers, scales = from_bytes(bytes, outputs, kernel_inputs(x.shape[1], kernel, dilation))
    weight = of_kernel_rows(integers, x.shape[1], kernel, dilation)
    rounded, scale = in_eight_bits(x.flatten(1))
    y = F.conv2d(rounded.view(x.shape), weight, None, stride, padding, dilation).float()
    y = y * scales[:, None, None] * scale[:, :, None, None]
    return y if bias is None else y + bias[:, None, None]


def reference_sparse_lstm_in_bytes(projections, bytes, h0, c0, lengths, reverse: bool):
    """reference_sparse_lstm by the seven tensors of Bytes, of states rounded to eight bits, each by its own scale."""
    check_devices("projections", projections, bytes=bytes, h0=h0, c0=c0, lengths=lengths)
    weight, scales = from_bytes(bytes, 4 * h0.shape[1], h0.shape[1])

    def product(h: Tensor) -> Tensor:
        rounded, scale = in_eight_bits(h)
        return (weight @ rounded).float() * scales * scale

    return over_time(product, projections, h0, c0, lengths, reverse)


def reference_sparse_lstm_layer_in_bytes(x, inputs, bias, recurrent, h0, c0, lengths, reverse: bool):
    """reference_sparse_lstm_in_bytes by `recurrent` over W_ih x + bias, x (B, T, inputs), W_ih the Bytes `inputs`."""
    check_devices("x", x, inputs=inputs, bias=bias, recurrent=recurrent, h0=h0, c0=c0, lengths=lengths)
    projections = reference_sparse_linear_in_bytes(x, inputs, bias, 4 * h0.shape[1])
    return reference_sparse_lstm_in_bytes(projections, recurrent, h0, c0, lengths, reverse)


def reference_sparse_lstm(projections, values, columns, offsets, scales, h0, c0, lengths, reverse: bool, windows):
    """The LSTM's recurrence over projections (B, T, 4 H), which hold W_ih x and both biases.

    windows: the tensors of the matrix's Windows, or nothing; the outputs are the same, up to rounding.

    h0, c0: (B, H).  Returns outputs (B, T, H), zeros behind an end, and the last h and c. `reverse` starts at each end.
    """
    matrix = {"values": values, "columns": columns, "offsets": offsets, "scales": scales}
    check_devices("projections", projections, **matrix, h0=h0, c0=c0, lengths=lengths, windows=windows)
    weight = to_dense(values, columns, offsets, scales, 4 * h0.shape[1], h0.shape[1])
    return over_time(lambda h: weight @ h, projections, h0, c0, lengths, reverse)


def over_time(product, projections: Tensor, h0: Tensor, c0: Tensor, lengths: Tensor | None, reverse: bool):
    """What reference_sparse_lstm returns; product(h (H,)) -> (4 H,)."""
    batch, time, hidden = *projections.shape[:2], h0.shape[1]
    lengths = torch.full((batch,), time) if lengths is None else lengths
    outputs, h_last, c_last = projections.new_zeros(batch, time, hidden), h0.clone(), c0.clone()
    for b, length in enumerate(lengths.tolist()):
        h, c = h0[b], c0[b]
        for t in reversed(range(length)) if reverse else range(length):
            i, f, g, o = (projections[b, t] + product(h)).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs[b, t] = h
        h_last[b], c_last[b] = h, c
    return outputs, h_last, c_last


def reference_sparse_transducer(
    encoder_out, inputs, recurrent, projection, output, bias, max_symbols: int, state: list[Tensor], windows
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Greedy decoding of one utterance by a transducer; token 0 is the blank.

    encoder_out: (T, joiner), what the joiner adds to the predictor.  inputs: (tokens, 4 H), the embeddings through W_ih
    with both biases.  recurrent (W_hh), projection (joiner, H), output (tokens, joiner): the tensors of a Matrix.
    max_symbols: tokens that a frame may emit.
    state: [predictor_out (joiner,), h (H,), c (H,)] of the frames before, or [].
    windows: W_hh's, as in sparse_lstm, or its Bytes, which are taken then.
    Returns tokens (n,) int64, their frames (n,) int64 and probabilities (n,), and the state after the last frame.
    """
    matrices = {"recurrent": recurrent, "projection": projection, "output": output}
    check_devices("encoder_out", encoder_out, inputs=inputs, **matrices, bias=bias, state=state, windows=windows)
    hidden, joiner = inputs.shape[1] // 4, encoder_out.shape[1]
    projection = to_dense(*projection, *[None] * (4 - len(projection)), joiner, hidden)
    output = to_dense(*output, *[None] * (4 - len(output)), len(inputs), joiner)
    scales = recurrent[3] if len(recurrent) == 4 else None

    def predict(token: int, h: Tensor, c: Tensor) -> list[Tensor]:
        projections, state = inputs[token].view(1, 1, -1), (h[None], c[None], None, False)
        if len(windows) == len(Bytes._fields):
            out, h, c = reference_sparse_lstm_in_bytes(projections, windows, *state)
        else:
            out, h, c = reference_sparse_lstm(projections, *recurrent[:3], scales, *state, [])
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


if not lottery.ops.compiled:
    sparse_linear, sparse_conv2d = reference_sparse_linear, reference_sparse_conv2d
    sparse_lstm, sparse_transducer = reference_sparse_lstm, reference_sparse_transducer
    sparse_linear_in_bytes, sparse_lstm_in_bytes = reference_sparse_linear_in_bytes, reference_sparse_lstm_in_bytes
    sparse_conv2d_in_bytes = reference_sparse_conv2d_in_bytes
    sparse_lstm_layer_in_bytes = reference_sparse_lstm_layer_in_bytes
else:
    sparse_linear, sparse_conv2d = torch.ops.audio_lottery.sparse_linear, torch.ops.audio_lottery.sparse_conv2d
    sparse_lstm, sparse_transducer = torch.ops.audio_lottery.sparse_lstm, torch.ops.audio_lottery.sparse_transducer

    sparse_linear_in_bytes = torch.ops.audio_lottery.sparse_linear_in_bytes
    sparse_conv2d_in_bytes = torch.ops.audio_lottery.sparse_conv2d_in_bytes
    sparse_lstm_in_bytes = torch.ops.audio_lottery.sparse_lstm_in_bytes
    sparse_lstm_layer_in_bytes = torch.ops.audio_lottery.sparse_lstm_layer_in_bytes

    @torch.library.register_fake("audio_lottery::sparse_linear_in_bytes")
    def fake_linear_in_bytes(x, bytes, bias, outputs):
        check_devices("x", x, bytes=bytes, bias=bias)
        return x.new_empty(*x.shape[:-1], outputs)

    @torch.library.register_fake("audio_lottery::sparse_conv2d_in_bytes")
    def fake_conv2d_in_bytes(x, bytes, bias, outputs, kernel, stride, padding, dilation):
        check_devices("x", x, bytes=bytes, bias=bias)
        check_window(x.shape[2:], kernel, stride, padding, dilation)
        return x.new_empty(len(x), outputs, *conv_size(x.shape[2:], kernel, stride, padding, dilation))

    @torch.library.register_fake("audio_lottery::sparse_lstm_in_bytes")
    def fake_lstm_in_bytes(projections, bytes, h0, c0, lengths, reverse):
        check_devices("projections", projections, bytes=bytes, h0=h0, c0=c0, lengths=lengths)
        sizes = (*projections.shape[:2], h0.shape[1]), h0.shape, c0.shape
        return tuple(projections.new_empty(size) for size in sizes)

    @torch.library.register_fake("audio_lottery::sparse_lstm_layer_in_bytes")
    def fake_lstm_layer_in_bytes(x, inputs, bias, recurrent, h0, c0, lengths, reverse):
        check_devices("x", x, inputs=inputs, bias=bias, recurrent=recurrent, h0=h0, c0=c0, lengths=lengths)
        return tuple(x.new_empty(size) for size in ((*x.shape[:2], h0.shape[1]), h0.shape, c0.shape))

    @torch.library.register_fake("audio_lottery::sparse_linear")
    def fake_linear(x, values, columns, offsets, scales, bias, outputs):
        check_devices("x", x, values=values, columns=columns, offsets=offsets, scales=scales, bias=bias)
        return x.new_empty(*x.shape[:-1], outputs)

    @torch.library.register_fake("audio_lottery::sparse_conv2d")
    def fake_conv2d(x, values, columns, offsets, scales, bias, outputs, kernel, stride, padding, dilation):
        check_devices("x", x, values=values, columns=columns, offsets=offsets, scales=scales, bias=bias)
        check_window(x.shape[2:], kernel, stride, padding, dilation)
        return x.new_empty(len(x), outputs, *conv_size(x.shape[2:], kernel, stride, padding, dilation))

    @torch.library.register_fake("audio_lottery::sparse_lstm")
    def fake_lstm(projections, values, columns, offsets, scales, h0, c0, lengths, reverse, windows):
        matrix = {"values": values, "columns": columns, "offsets": offsets, "scales": scales}
        check_devices("projections", projections, **matrix, h0=h0, c0=c0, lengths=lengths, windows=windows)
        sizes = (*projections.shape[:2], h0.shape[1]), h0.shape, c0.shape
        return tuple(projections.new_empty(size) for size in sizes)

    @torch.library.register_fake("audio_lottery::sparse_transducer")
    def fake_transducer(encoder_out, inputs, recurrent, projection, output, bias, max_symbols, state, windows):
        matrices = {"recurrent": recurrent, "projection": projection, "output": output}
        check_devices("encoder_out", encoder_out, inputs=inputs, **matrices, bias=bias, state=state, windows=windows)
        emitted, hidden = torch.library.get_ctx().new_dynamic_size(), inputs.shape[1] // 4
        ids = [encoder_out.new_empty(emitted, dtype=torch.int64) for _ in range(2)]
        after = [encoder_out.new_empty(size) for size in (encoder_out.shape[1], hidden, hidden)]
        return *ids, encoder_out.new_empty(emitted), after
