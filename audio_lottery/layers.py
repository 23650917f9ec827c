"""Layers of sparse products, that take the place of torch's in a compressed model, and a transducer's greedy loop.

What takes a layer's place keeps what others read of it: its attributes, its bias, its weight (made when asked for, so
that writing to it changes nothing), and every kind of input that it takes. The products are sparse.py's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lottery
from audio_lottery.sparse import (
    Bytes,
    Matrix,
    Windows,
    conv_bytes,
    from_bytes,
    kernel_inputs,
    of_kernel_rows,
    sparse_conv2d,
    sparse_conv2d_in_bytes,
    sparse_linear,
    sparse_linear_in_bytes,
    sparse_lstm,
    sparse_lstm_in_bytes,
    sparse_lstm_layer_in_bytes,
    sparse_transducer,
    to_bytes,
    to_dense,
    to_matrix,
    to_windows,
    whole,
)  # fmt: skip

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
        try:
            super()._apply(fn, recurse)
        finally:  # it may fail, as without a GPU
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
        ours = {*vars(nn.Module()), *vars(self), "forward"}
        self.train(layer.training)
        vars(self).update({n: v for n, v in vars(layer).items() if n not in ours and not n.startswith("_")})


def check_floating(input: Tensor) -> None:
    """Raise TypeError for integers and the like, which torch's own layers refuse and a cast to float32 would hide."""
    if not input.is_floating_point():
        raise TypeError(f"input must be of floating point numbers, got {input.dtype}")


def check_width(x: Tensor, inputs: int) -> None:
    """Raise ValueError unless x is (..., inputs): a sparse matrix knows only of its kept columns."""
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ValueError(f"input must be (..., {inputs}), got {list(x.shape)}")


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
        check_floating(input)
        if input.layout is torch.jagged:
            of = torch.nested.nested_tensor_from_jagged
            return of(self.forward(input.values()), input.offsets(), input.lengths(), input._ragged_idx)
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
        check_width(x, self.shape[1])
        return sparse_linear(x, *self.matrix(), bias, self.outputs)


class Recurrent(Product):
    """The recurrence of an LSTM, W_hh in one layout. lengths: (B,) int64 or None.

    windowed: keep single weights as Windows too, about as large again or twice, for fewer than FEW_COLUMNS utterances.
    """

    def __init__(self, matrix: Matrix, shape: tuple[int, ...], windowed: bool = False):
        super().__init__(matrix, None, shape)
        self.names = [f"windows_{name}" for name in Windows._fields] if windowed else []
        for name, tensor in zip(self.names, to_windows(matrix) if windowed else ()):
            self.register_buffer(name, tensor)

    def windows(self) -> list[Tensor]:
        """The tensors of the Windows, if there are."""
        return [self._buffers[name] for name in self.names]

    def forward(
        self, projections: Tensor, h: Tensor, c: Tensor, reverse: bool, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return sparse_lstm(projections, *self.matrix(), h, c, lengths, reverse, self.windows())


class InBytes(Layer):
    """x -> x W^T + bias by Bytes, of x rounded to eight bits too. shape, layer: as Product's."""

    def __init__(self, matrix: Matrix, bias: Tensor | None, shape: tuple[int, ...], layer: nn.Module | None = None):
        super().__init__(bias, layer)
        self.outputs, self.inputs = shape
        for name, tensor in to_bytes(matrix)._asdict().items():
            self.register_buffer(name, tensor)

    def bytes(self) -> list[Tensor]:
        """The tensors of the Bytes."""
        return [self._buffers[name] for name in Bytes._fields]

    @property
    def weight(self) -> Tensor:
        """weight * mask, dense."""
        integers, scales = from_bytes(self.bytes(), self.outputs, self.inputs)
        return (integers.float() * scales[:, None]).to(self.dtype)

    def matrix(self) -> Matrix:
        """The same as a Matrix."""
        weight = self.weight.float()
        return to_matrix(weight, weight != 0, "unstructured", "int8")

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        check_width(x, self.inputs)
        return sparse_linear_in_bytes(x, self.bytes(), bias, self.outputs)


class RecurrentInBytes(InBytes):
    """As Recurrent, by Bytes."""

    def __init__(self, matrix: Matrix, shape: tuple[int, ...]):
        super().__init__(matrix, None, shape)

    def windows(self) -> list[Tensor]:
        """For a greedy loop, which takes the Bytes in the place of Windows."""
        return self.bytes()

    def forward(
        self, projections: Tensor, h: Tensor, c: Tensor, reverse: bool, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return sparse_lstm_in_bytes(projections, self.bytes(), h, c, lengths, reverse)

    def after(
        self, product: InBytes, x: Tensor, h: Tensor, c: Tensor, reverse: bool, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """forward(product(x), ...), which never has all projections in memory."""
        check_width(x, product.inputs)
        bias = None if product.bias is None else product.bias.float()
        return sparse_lstm_layer_in_bytes(x, product.bytes(), bias, self.bytes(), h, c, lengths, reverse)


def as_made(layer: nn.Module, kind: type) -> bool:
    """Is it of this kind, without hooks and without a forward of its own, so that another may compute in its place?"""
    return type(layer) is kind and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


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

    def get_extra_state(self) -> Tensor:
        return self.packed.to_dense()

    def set_extra_state(self, state: Tensor) -> None:
        if state.shape != self.packed.shape:
            raise lottery.LotteryError(f"weight must be {list(self.packed.shape)}, got {list(state.shape)}")
        self.packed = torch.ops.mkldnn._reorder_linear_weight(state.float(), self.columns)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        check_width(x, self.packed.shape[1])
        if x.requires_grad and torch.is_grad_enabled():  # oneDNN's would leave its gradient out
            return F.linear(x, self.packed.to_dense(), bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")


def window_of(conv: nn.Conv1d | nn.Conv2d) -> tuple[tuple[int, int], ...]:
    """Kernel, stride, padding and dilation, of two dimensions each."""
    pairs = (conv.kernel_size, 1), (conv.stride, 1), (conv.padding, 0), (conv.dilation, 1)
    return tuple((fill, *pair) if len(pair) == 1 else tuple(pair) for pair, fill in pairs)


class Conv(Product):
    """Conv1d or Conv2d with one group and zeros for padding, its weights (outputs, inputs * kernel) in one layout."""

    def __init__(self, conv: nn.Conv1d | nn.Conv2d, matrix: Matrix, bias: Tensor | None):
        super().__init__(self.as_kept(conv, matrix), bias, tuple(conv.weight.shape), conv)
        self.one_d, self.window = isinstance(conv, nn.Conv1d), window_of(conv)

    @staticmethod
    def as_kept(conv: nn.Conv1d | nn.Conv2d, matrix: Matrix) -> Matrix | Bytes:
        return matrix

    def convolved(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, C, F, T) -> (B, C', F', T')."""
        return sparse_conv2d(x, *self.matrix(), bias, self.outputs, *self.window)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """([B,] C, [F,] T) -> ([B,] C', [F',] T')."""
        if x.dim() not in (len(self.shape) - 1, len(self.shape)) or x.shape[1 - len(self.shape)] != self.shape[1]:
            size = "T" if self.one_d else "F, T"
            raise ValueError(f"input must be ([B,] {self.shape[1]}, {size}), got {list(x.shape)}")
        if self.one_d:
            x = x.unsqueeze(-2)
        batched = x.dim() != 3
        y = self.convolved(x if batched else x[None], bias)
        y = y if batched else y[0]
        return y.squeeze(-2) if self.one_d else y


class ConvInBytes(Conv):
    """As Conv, by Bytes, of x rounded to eight bits too, each image by its own scale."""

    @staticmethod
    def as_kept(conv: nn.Conv1d | nn.Conv2d, matrix: Matrix) -> Matrix | Bytes:
        kernel, *_, dilation = window_of(conv)
        return conv_bytes(matrix, (*conv.weight.shape[:2], *kernel), dilation)

    bytes = InBytes.bytes

    @property
    def weight(self) -> Tensor:
        """weight * mask, dense, of the shape it had."""
        (kernel, *_, dilation), channels = self.window, self.shape[1]
        integers, scales = from_bytes(self.bytes(), self.outputs, kernel_inputs(channels, kernel, dilation))
        weight = of_kernel_rows(integers.float() * scales[:, None], channels, kernel, dilation)
        return weight.reshape(self.shape).to(self.dtype)

    def convolved(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return sparse_conv2d_in_bytes(x, self.bytes(), bias, self.outputs, *self.window)


class Pointwise(Layer):
    """A Conv1d of kernel 1 as a product of each frame: without a copy where frames stand one by one in memory."""

    def __init__(self, conv: nn.Conv1d, frames: Product | InBytes, bias: Tensor | None):
        super().__init__(bias, conv)
        self.frames = frames  # (outputs, inputs), without a bias

    @property
    def weight(self) -> Tensor:
        """weight * mask, dense, of the shape it had."""
        return self.frames.weight.to(self.dtype)[..., None]

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """([B,] C, T) -> ([B,] C', T)."""
        if x.dim() not in (2, 3) or x.shape[-2] != self.in_channels:
            raise ValueError(f"input must be ([B,] {self.in_channels}, T), got {list(x.shape)}")
        y = self.frames.product(x.transpose(-2, -1), bias).transpose(-2, -1)
        return y.contiguous() if x.is_contiguous() else y


def convolutions(
    conv: nn.Conv1d | nn.Conv2d, matrices: dict[str, Matrix], bias: Tensor | None, in_bytes: bool, calls: list
) -> dict[str, Layer]:
    """The convolution in every sparse way there is; in bytes where these have places for its inputs.

    calls: how often, and its arguments. Frames that stand one by one in memory are taken as they stand.
    """
    (outputs, inputs, *kernel), in_bytes = conv.weight.shape, in_bytes and "unstructured" in matrices
    by_frames = kernel == [1] and all(x.transpose(-2, -1).is_contiguous() for _, (x, *_) in calls)
    if by_frames and conv.stride == (1,) and conv.padding == (0,):
        products = {layout: Product(matrix, None, (outputs, inputs)) for layout, matrix in matrices.items()}
        if in_bytes:
            products["bytes"] = InBytes(matrices["unstructured"], None, (outputs, inputs))
        return {layout: Pointwise(conv, product, bias) for layout, product in products.items()}
    ways = {layout: Conv(conv, matrix, bias) for layout, matrix in matrices.items()}
    kernel, *_, dilation = window_of(conv)
    if in_bytes and kernel_inputs(conv.in_channels, kernel, dilation) <= 1 << 16:
        ways["bytes"] = ConvInBytes(conv, matrices["unstructured"], bias)
    return ways


class Lstm(Fixed):
    """nn.LSTM with sparse products; called as it is, and with its attributes. Dropout is for training, so it has none.

    inputs: for each layer and direction the product with W_ih, both biases in it.  recurrent: as many, of W_hh.
    """

    def __init__(self, lstm: nn.LSTM, inputs: list[nn.Module], recurrent: list[Recurrent | RecurrentInBytes]):
        super().__init__()
        self.keep_attributes(lstm)
        self.directions = 2 if lstm.bidirectional else 1
        self.takes_ends = lstm.batch_first and len(inputs) == 1  # of forward()
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

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None, ends: Tensor | None = None
    ):
        """As nn.LSTM: (B, T, inputs), (T, B, inputs) or (T, inputs), or a PackedSequence -> the same, and (h, c).

        ends (B,) int64, where takes_ends is True: (B, T, inputs) is gone over from each one's end to its start.
        """
        if ends is not None:
            if not self.takes_ends or input.dim() != 3:
                raise ValueError("ends are for (B, T, inputs), of one layer and direction with batch_first")
            return self.steps(input, hx, ends, backwards=True)
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

    def steps(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None, lengths: Tensor | None = None, backwards: bool = False
    ):
        """(B, T, inputs) -> (B, T, directions * H), (h, c), each (layers * directions, B, H)."""
        dtype = x.dtype
        if dtype is not FLOAT32:  # computed in float32, as Layer does
            check_floating(x)
            out, state = self.steps(x.float(), state and tuple(s.float() for s in state), lengths, backwards)
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
            reverse = backwards or i % self.directions == 1
            if as_made(product, InBytes) and as_made(recurrent, RecurrentInBytes):
                out, h, c = recurrent.after(product, x, state[0][i], state[1][i], reverse, lengths)
            else:
                projections = product(x) if self.dtype is FLOAT32 else in_float32(product, x)
                out, h, c = recurrent(projections.float(), state[0][i], state[1][i], reverse, lengths)  # autocast's too
            h_last.append(h)
            c_last.append(c)
            outs.append(out)
            if len(outs) == self.directions:
                x, outs = torch.cat(outs, 2) if len(outs) > 1 else outs[0], []
        return x, (torch.stack(h_last), torch.stack(c_last))


def as_batches(lstm: nn.LSTM, x: Tensor | PackedSequence) -> Tensor:
    """What an LSTM is given, as (B, T, inputs)."""
    if isinstance(x, PackedSequence):
        return pad_packed_sequence(x, batch_first=True)[0]
    if x.dim() == 2:
        return x[None]
    return x if lstm.batch_first else x.transpose(0, 1)


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
            windows = predictor.recurrent[0].windows()
        elif isinstance(predictor, nn.LSTM) and len(predictor.all_weights) == 1 and not predictor.proj_size:
            bias = predictor.bias_ih_l0 + predictor.bias_hh_l0 if predictor.bias else None
            inputs = F.linear(embedding.weight, predictor.weight_ih_l0, bias)
            recurrent, windows = whole(predictor.weight_hh_l0), []
        else:
            raise lottery.LotteryError(
                f"greedy_parts: predictor must be an nn.LSTM of one layer and direction, got {predictor}"
            )
        if projection.bias is not None:
            raise lottery.LotteryError("greedy_parts: projection must have no bias (the encoder's side may have one)")
        self.max_symbols = max_symbols
        self.register_buffer("inputs", inputs.detach().float())  # (tokens, 4 H)
        self.register_buffer("bias", None if output.bias is None else output.bias.detach().float().clone())
        matrices = {"recurrent": recurrent, "projection": matrix_of(projection), "output": matrix_of(output)}
        self.names = {}
        for name, matrix in matrices.items():
            tensors = {f"{name}_{part}": t for part, t in matrix._asdict().items() if t is not None}
            self.names[name] = list(tensors)
            for part, tensor in tensors.items():
                self.register_buffer(part, tensor)
        self.windows = [f"windows_{i}" for i in range(len(windows))]
        for name, tensor in zip(self.windows, windows):
            self.register_buffer(name, tensor)

    def forward(self, encoder_out: Tensor, state: list[Tensor]) -> tuple[list[tuple], list[Tensor]]:
        """One utterance, or what follows of it.

        encoder_out: (T, joiner), what the joiner adds to the predictor.
        state: [predictor_out (joiner,), h (H,), c (H,)] as the frames before left it, [] at the start.
        Returns (token, frame, probability) of each token emitted, frames counted from 0, and the state.
        """
        matrices = [[getattr(self, part) for part in parts] for parts in self.names.values()]
        dtype, encoder_out, state = encoder_out.dtype, encoder_out.float(), [s.float() for s in state]
        windows = [getattr(self, name) for name in self.windows]
        *found, state = sparse_transducer(
            encoder_out, self.inputs, *matrices, self.bias, self.max_symbols, state, windows
        )
        return list(zip(*(tensor.tolist() for tensor in found))), [s.to(dtype) for s in state]


def matrix_of(layer: nn.Module) -> Matrix:
    """The weight of an nn.Linear, or of the Product, InBytes or DenseProduct that took its place."""
    return layer.matrix() if isinstance(layer, (Product, InBytes)) else whole(layer.weight)
