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
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

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
    groups = torch.arange(len(offsets) - 1, device=offsets.device).repeat_interleave(offsets.diff())
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


def reference_sparse_lstm(projections, values, columns, offsets, scales, h0, c0, lengths, reverse: bool):
    """The LSTM's recurrence over projections (B, T, 4 H), which hold W_ih x and both biases.

    h0, c0: (B, H).  Returns outputs (B, T, H), zeros behind an end, and the last h and c. `reverse` starts at each end.
    """
    matrix = {"values": values, "columns": columns, "offsets": offsets, "scales": scales}
    check_devices("projections", projections, **matrix, h0=h0, c0=c0, lengths=lengths)
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
    matrices = {"recurrent": recurrent, "projection": projection, "output": output}
    check_devices("encoder_out", encoder_out, inputs=inputs, **matrices, bias=bias, state=state)
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
    def fake_lstm(projections, values, columns, offsets, scales, h0, c0, lengths, reverse):
        matrix = {"values": values, "columns": columns, "offsets": offsets, "scales": scales}
        check_devices("projections", projections, **matrix, h0=h0, c0=c0, lengths=lengths)
        return projections.new_empty(*projections.shape[:2], h0.shape[1]), torch.empty_like(h0), torch.empty_like(c0)

    @torch.library.register_fake("audio_lottery::sparse_transducer")
    def fake_transducer(encoder_out, inputs, recurrent, projection, output, bias, max_symbols, state):
        matrices = {"recurrent": recurrent, "projection": projection, "output": output}
        check_devices("encoder_out", encoder_out, inputs=inputs, **matrices, bias=bias, state=state)
        emitted, hidden = torch.library.get_ctx().new_dynamic_size(), inputs.shape[1] // 4
        ids = [encoder_out.new_empty(emitted, dtype=torch.int64) for _ in range(2)]
        after = [encoder_out.new_empty(size) for size in (encoder_out.shape[1], hidden, hidden)]
        return *ids, encoder_out.new_empty(emitted), after


# ---------------------------------------------------------------------------- layers
#
# What takes a layer's place keeps what others read of it: its attributes, its bias, its weight (made when asked for, so
# that writing to it changes nothing), and every kind of input that it takes.

FLOAT32 = torch.float32


def bits(tensor: Tensor) -> Tensor:
    """The tensor's memory as integers, which no cast of a module touches and which pickle knows."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


class Fixed(nn.Module):
    """Its buffers move with the module, but `.half()` and its like leave them alone; `dtype` is what they asked for."""

    def __init__(self):
        super().__init__()
        self.dtype = FLOAT32

    def _apply(self, fn, recurse: bool = True):
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        self._buffers.update({name: bits(buffer) for name, buffer in before.items()})
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            self._buffers[name] = moved.view(buffer.dtype) if moved.dtype == bits(buffer).dtype else buffer
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def __getstate__(self) -> dict:  # for copy and pickle, which does not know uint16
        own = self._buffers.items()
        places = {name: bits(buffer) for name, buffer in own if buffer is not None and buffer.dtype == torch.uint16}
        return super().__getstate__() | {"_buffers": self._buffers | places, "places": list(places)}

    def __setstate__(self, state: dict) -> None:
        names = state.pop("places")
        super().__setstate__(state)
        self._buffers = dict(self._buffers)
        self._buffers.update({name: self._buffers[name].view(torch.uint16) for name in names})

    def keep_attributes(self, layer: nn.Module) -> None:
        """Take over what others may read of the layer: in_features, stride, hidden_size, whatever a user added."""
        of_all = vars(nn.Module())
        self.train(layer.training)
        vars(self).update({n: v for n, v in vars(layer).items() if n not in of_all and not n.startswith("_")})


class Layer(Fixed):
    """In a layer's place: product(x, bias) computes it in float32, whatever the dtype of what comes and goes."""

    def __init__(self, bias: Tensor | None, layer: nn.Module | None):
        super().__init__()
        if layer is not None:
            self.keep_attributes(layer)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype is FLOAT32 is self.dtype and not input.is_nested:
            return self.product(input, self._parameters["bias"])  # nn.Module looks attributes up so slowly
        if input.is_nested:  # rows of several lengths, as nn.TransformerEncoder packs them
            parts = input.unbind()
            rows = self.forward(torch.cat(parts)).split([len(part) for part in parts])
            return torch.nested.as_nested_tensor(list(rows))
        return self.product(input.float(), None if self.bias is None else self.bias.float()).to(input.dtype)


class Product(Layer):
    """x -> x W^T + bias, W in one layout. shape: W's, (outputs, ...). layer: the one whose place it takes, if any."""

    def __init__(self, matrix: Matrix, bias: Tensor | None, shape: tuple[int, ...], layer: nn.Module | None = None):
        super().__init__(bias, layer)
        self.outputs, self.shape = shape[0], tuple(shape)
        for name, tensor in matrix._asdict().items():
            self.register_buffer(name, tensor)

    def matrix(self) -> Matrix:
        own = self._buffers  # nn.Module looks attributes up so slowly that a stream would feel it
        return Matrix(own["values"], own["columns"], own["offsets"], own["scales"])

    @property
    def weight(self) -> Tensor:
        """weight * mask, dense, of the shape it had."""
        return to_dense(*self.matrix(), self.outputs, math.prod(self.shape[1:])).view(self.shape).to(self.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return sparse_linear(x, *self.matrix(), bias, self.outputs)


class Recurrent(Product):
    """The recurrence of an LSTM, W_hh in one layout. lengths: (B,) int64 or None."""

    def forward(
        self, projections: Tensor, h: Tensor, c: Tensor, reverse: bool, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return sparse_lstm(projections, *self.matrix(), h, c, lengths, reverse)


class DenseProduct(Layer):
    """x -> x W^T + bias with nothing left out, W as oneDNN likes it for so many columns."""

    def __init__(self, weight: Tensor, bias: Tensor | None, columns: int, layer: nn.Module | None = None):
        super().__init__(bias, layer)
        self.columns, self.packed = columns, torch.ops.mkldnn._reorder_linear_weight(weight, columns)

    def __getstate__(self) -> dict:  # for copy and pickle, which oneDNN's form of a tensor has none of
        return super().__getstate__() | {"packed": self.packed.to_dense()}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.packed, self.columns)

    @property
    def weight(self) -> Tensor:
        """weight * mask, (outputs, inputs)."""
        return self.packed.to_dense().to(self.dtype)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


class Conv(Product):
    """Conv1d or Conv2d with one group and zeros for padding, its weights (outputs, inputs * kernel) in one layout."""

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, matrix: Matrix, bias: Tensor | None):
        super().__init__(matrix, bias, tuple(conv.weight.shape), conv)
        self.one_d = isinstance(conv, nn.Conv1d)
        wide = lambda pair, fill: (fill, *pair) if self.one_d else pair  # noqa: E731
        self.window = (
            wide(conv.kernel_size, 1), wide(conv.stride, 1), wide(conv.padding, 0), wide(conv.dilation, 1),
        )  # fmt: skip

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """([B,] C, [F,] T) -> ([B,] C', [F',] T')."""
        if self.one_d:
            x = x.unsqueeze(-2)
        batched = x.dim() != 3
        y = sparse_conv2d(x if batched else x[None], *self.matrix(), bias, self.outputs, *self.window)
        y = y if batched else y[0]
        return y.squeeze(-2) if self.one_d else y


class Lstm(Fixed):
    """nn.LSTM with sparse products; called as it is, and with its attributes. Dropout is for training, so it has none.

    inputs: for each layer and direction the product with W_ih, both biases in it.  recurrent: as many, of W_hh.
    """

    def __init__(self, lstm: nn.LSTM, inputs: list[nn.Module], recurrent: list[Recurrent]):
        super().__init__()
        self.keep_attributes(lstm)
        self.directions = 2 if lstm.bidirectional else 1
        self.inputs, self.recurrent = nn.ModuleList(inputs), nn.ModuleList(recurrent)  # a layer's directions in turn

    def flatten_parameters(self) -> None:
        """Nothing to do: there are no parameters of cuDNN's."""

    def __getattr__(self, name: str):
        """weight_ih_l0 and its like, made when asked for; the biases' sum counts as bias_ih."""
        kind, _, place = name.partition("_l")
        if kind not in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]:
            return super().__getattr__(name)
        ways = ("", "_reverse")[: self.directions]
        places = [f"{layer}{way}" for layer in range(self.num_layers) for way in ways]
        if place not in places:
            return super().__getattr__(name)
        at = places.index(place)
        product = self.recurrent[at] if kind == "weight_hh" else self.inputs[at]
        if kind.startswith("weight"):
            return product.weight
        return torch.zeros_like(product.bias) if kind == "bias_hh" else product.bias

    def forward(self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None):
        """As nn.LSTM: (B, T, inputs), (T, B, inputs) or (T, inputs), or a PackedSequence -> the same, and (h, c)."""
        if not isinstance(input, Tensor):
            return self.packed(input, hx)
        if input.dim() == 2:
            at = 0 if self.batch_first else 1
            out, state = self(input.unsqueeze(at), hx if hx is None else tuple(s.unsqueeze(1) for s in hx))
            return out.squeeze(at), tuple(s.squeeze(1) for s in state)
        if input.dim() != 3:
            raise ValueError(f"input must have 2 or 3 dimensions, got {input.dim()}")
        out, state = self.steps(input if self.batch_first else input.transpose(0, 1), hx)
        return out if self.batch_first else out.transpose(0, 1), state

    def packed(self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None):
        """On sequences of several lengths; states come and go in the order from before they were packed."""
        x, lengths = pad_packed_sequence(PackedSequence(input.data, input.batch_sizes), batch_first=True)
        if hx is not None and input.sorted_indices is not None:
            hx = tuple(s.index_select(1, input.sorted_indices) for s in hx)
        out, state = self.steps(x, hx, lengths)
        if input.unsorted_indices is not None:
            state = tuple(s.index_select(1, input.unsorted_indices) for s in state)
        return input._replace(data=pack_padded_sequence(out, lengths, batch_first=True).data), state

    def steps(self, x: Tensor, state: tuple[Tensor, Tensor] | None, lengths: Tensor | None = None):
        """(B, T, inputs) -> (B, T, directions * H), (h, c), each (layers * directions, B, H)."""
        dtype = x.dtype
        if dtype is not FLOAT32:  # computed in float32, as Layer does
            out, state = self.steps(x.float(), state and tuple(s.float() for s in state), lengths)
            return out.to(dtype), tuple(s.to(dtype) for s in state)
        inputs, recurrents = self._modules["inputs"]._modules.values(), self._modules["recurrent"]._modules.values()
        size = len(inputs), x.shape[0], self.hidden_size
        if state is None:
            zeros = x.new_zeros(size)
            state = (zeros, zeros)
        elif state[0].shape != size or state[1].shape != size:
            raise ValueError(f"h and c must be {list(size)}, got {[list(s.shape) for s in state]}")
        h_last, c_last, outs = [], [], []
        for i, (product, recurrent) in enumerate(zip(inputs, recurrents)):
            reverse = i % self.directions == 1
            projections = product(x) if self.dtype is FLOAT32 else in_float32(product, x)
            out, h, c = recurrent(projections, state[0][i], state[1][i], reverse, lengths)
            h_last.append(h)
            c_last.append(c)
            outs.append(out)
            if len(outs) == self.directions:
                x, outs = torch.cat(outs, 2) if len(outs) > 1 else outs[0], []
        return x, (torch.stack(h_last), torch.stack(c_last))


def in_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer that was cast, on x in float32; what is sparse computes in float32 by itself."""
    if not isinstance(layer, nn.Linear):
        return layer(x)
    return F.linear(x, layer.weight.float(), None if layer.bias is None else layer.bias.float())


class Greedy(Fixed):
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
        self.register_buffer("inputs", inputs.detach())  # (tokens, 4 H)
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

        encoder_out: (T, joiner), what the joiner adds to the predictor.
        state: [predictor_out (joiner,), h (H,), c (H,)] as the frames before left it, [] at the start.
        Returns (token, frame, probability) of each token emitted, frames counted from 0, and the state.
        """
        matrices = [[getattr(self, part) for part in parts] for parts in self.names.values()]
        dtype, encoder_out, state = encoder_out.dtype, encoder_out.float(), [s.float() for s in state]
        *found, state = sparse_transducer(encoder_out, self.inputs, *matrices, self.bias, self.max_symbols, state)
        return list(zip(*(tensor.tolist() for tensor in found))), [s.to(dtype) for s in state]


def whole(weight: Tensor) -> Matrix:
    """(outputs, inputs) as a Matrix with nothing left out, float32."""
    return to_matrix(weight, torch.ones_like(weight, dtype=torch.bool), "16x1")


def matrix_of(layer: nn.Module) -> Matrix:
    """The weight of an nn.Linear, or of the Product or DenseProduct that took its place."""
    return layer.matrix() if isinstance(layer, Product) else whole(layer.weight)
