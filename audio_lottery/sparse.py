"""Sparse products on a CPU: layouts, the matrices in them, the operators as slow references, and the layers.

A weight is seen as (outputs, inputs) and kept in blocks r x c, a layout: "unstructured" is 1x1; in 4x1, 8x1 and 16x1
neighbouring outputs share an input. Blocks that a mask keeps in part are filled with zeros, so every layout is exact.
The operators are compiled (csrc/cpu/sparse.cpp) or, without the extension, the references below. Which layer takes
which layout is chosen in compression.py.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lottery

LAYOUTS = {"unstructured": (1, 1), "1x4": (1, 4), "4x1": (4, 1), "8x1": (8, 1), "16x1": (16, 1)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


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


def to_dense(
    values: Tensor, columns: Tensor, offsets: Tensor, scales: Tensor | None, outputs: int, inputs: int
) -> Tensor:
    """A Matrix (its four fields) as (outputs, inputs), float32: weight * mask, up to the rounding of its values."""
    _, r, c = values.shape
    groups = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    blocks = values.new_zeros(len(offsets) - 1, -(-inputs // c), r, c, dtype=torch.float32)
    blocks[groups, columns.long()] = values.float()
    weight = blocks.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, :inputs]
    return weight if scales is None else weight * scales[:, None]


# ---------------------------------------------------------------------------- ops: the reference


def reference_sparse_linear(x, values, columns, offsets, scales, bias, outputs: int) -> Tensor:
    """x (..., inputs) -> x W^T + bias, (..., outputs); bias (outputs,) or None."""
    return F.linear(x, to_dense(values, columns, offsets, scales, outputs, x.shape[-1]), bias)


def conv_size(size, kernel, stride, padding, dilation) -> list[int]:
    """(H, W) of a convolution's output."""
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)]


def reference_sparse_conv2d(
    x, values, columns, offsets, scales, bias, outputs: int, kernel, stride, padding, dilation
) -> Tensor:
    """x (B, C, H, W), W (outputs, C * kernel[0] * kernel[1]) -> (B, outputs, H', W')."""
    weight = to_dense(values, columns, offsets, scales, outputs, x.shape[1] * math.prod(kernel))
    return F.conv2d(x, weight.view(outputs, x.shape[1], *kernel), bias, stride, padding, dilation)


def reference_sparse_lstm(projections, values, columns, offsets, scales, h0, c0, lengths, reverse: bool):
    """The LSTM's recurrence over projections (B, T, 4 H), which hold W_ih x and both biases.

    h0, c0: (B, H).  Returns outputs (B, T, H), zeros behind an end, and the last h and c. `reverse` starts at each end.
    """
    batch, time, hidden = *projections.shape[:2], h0.shape[1]
    weight = to_dense(values, columns, offsets, scales, 4 * hidden, hidden)
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
    """Greedy decoding of one utterance by a transducer; token 0 is the blank.

    encoder_out: (T, joiner), what the joiner adds to the predictor.  inputs: (tokens, 4 H), the embeddings through W_ih
    with both biases.  recurrent (W_hh), projection (joiner, H), output (tokens, joiner): the tensors of a Matrix.
    max_symbols: tokens that a frame may emit.
    state: [predictor_out (joiner,), h (H,), c (H,)] of the frames before, or [].
    Returns tokens (n,) int64, their frames (n,) int64 and probabilities (n,), and the state after the last frame.
    """
    hidden, joiner = inputs.shape[1] // 4, encoder_out.shape[1]
    projection = to_dense(*projection, *[None] * (4 - len(projection)), joiner, hidden)
    output = to_dense(*output, *[None] * (4 - len(output)), len(inputs), joiner)
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


if not lottery.ops.compiled:
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
    """The greedy loop of a transducer over one utterance, without Python for every symbol. Token 0 is the blank.

    A network opts in by two methods; compress, which knows no more of it, calls
    `network.use_greedy(Greedy(**network.greedy_parts()))`.

    greedy_parts(): the arguments below by name, as the network has them now; compress has replaced some.
    use_greedy(loop): takes the loop, as a submodule, and decodes by calling it.

    embedding: nn.Embedding (tokens, E).  predictor: nn.LSTM(E, H) of one layer and direction.  projection: nn.Linear(H,
    joiner) without a bias.  output: nn.Linear(joiner, tokens), of tanh(encoder_out + projection(h)).
    max_symbols: tokens that a frame may emit.  The loop keeps its own copies of weights that stayed dense.
    Raises LotteryError for a predictor or projection of another kind.
    """

    def __init__(
        self, embedding: nn.Embedding, predictor: nn.LSTM | Lstm, projection: nn.Module, output: nn.Module,
        max_symbols: int,
    ):  # fmt: skip
        super().__init__()
        if isinstance(predictor, Lstm) and len(predictor.inputs) == 1:
            inputs, recurrent = predictor.inputs[0](embedding.weight), predictor.recurrent[0].matrix()
        elif isinstance(predictor, nn.LSTM) and len(predictor.all_weights) == 1 and not predictor.proj_size:
            bias = predictor.bias_ih_l0 + predictor.bias_hh_l0 if predictor.bias else None
            inputs = F.linear(embedding.weight, predictor.weight_ih_l0, bias)
            recurrent = whole(predictor.weight_hh_l0)
        else:
            raise lottery.LotteryError(
                f"greedy_parts: predictor must be an nn.LSTM of one layer and direction, got {predictor}"
            )
        if projection.bias is not None:
            raise lottery.LotteryError("greedy_parts: projection must have no bias (the encoder's side may have one)")
        self.max_symbols = max_symbols
        self.register_buffer("inputs", inputs)  # (tokens, 4 H)
        self.register_buffer("bias", output.bias)
        matrices = {"recurrent": recurrent, "projection": matrix_of(projection), "output": matrix_of(output)}
        self.names = {}
        for name, matrix in matrices.items():
            tensors = {f"{name}_{part}": t for part, t in matrix._asdict().items() if t is not None}
            self.names[name] = list(tensors)
            for part, tensor in tensors.items():
                self.register_buffer(part, tensor)

    def forward(self, encoder_out: Tensor, state: list[Tensor]) -> tuple[list[tuple], list[Tensor]]:
        """One utterance, or what follows of it.

        encoder_out: (T, joiner) float32, what the joiner adds to the predictor.
        state: [predictor_out (joiner,), h (H,), c (H,)] as the frames before left it, [] at the start.
        Returns (token, frame, probability) of each token emitted, frames counted from 0, and the state.
        """
        matrices = [[getattr(self, part) for part in parts] for parts in self.names.values()]
        *found, state = sparse_transducer(encoder_out, self.inputs, *matrices, self.bias, self.max_symbols, state)
        return list(zip(*(tensor.tolist() for tensor in found))), state


def whole(weight: Tensor) -> Matrix:
    """(outputs, inputs) as a Matrix with nothing left out, float32."""
    return to_matrix(weight, torch.ones_like(weight, dtype=torch.bool), "16x1")


def matrix_of(layer: nn.Module) -> Matrix:
    """The weight of an nn.Linear, or of the Product or DenseProduct that took its place."""
    if isinstance(layer, Product):
        return layer.matrix()
    return whole(layer.packed.to_dense() if isinstance(layer, DenseProduct) else layer.weight)
