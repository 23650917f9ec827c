"""A ticket in use: `compress` turns the pruned products of any nn.Module into sparse ones, for inference on a CPU.

    compressed, rows = compress(model, masks, lambda model: model.transcribe(features, input_lengths))

Each layer takes what was measured fastest on this machine, dense included; a row says what and why. Where the whole is
faster dense, it stays dense. The forms that layers can take are layers.py's; a layer whose form fails stays dense.
What was measured once need not be again: `choice(rows)` is what the layers took, and compress(..., chosen=...) obeys.
"""

import copy
import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import lottery
from audio_lottery import layers
from audio_lottery.fused import fused
from audio_lottery.layers import DenseProduct, Fixed, Greedy, Layer, Lstm, Product, Recurrent
from audio_lottery.masked import check_names, masked_copy
from audio_lottery.sparse import DTYPES, FEW_COLUMNS, LAYOUTS, WAYS, Matrix, byte_lanes, to_matrix, whole

FRAMES = 100  # that layers are measured on where `run` is not given
TURNS = 2  # of the whole model, dense and compressed
Calls = list[tuple[int, tuple]]  # how often, and with what


class Swap(NamedTuple):
    """A layer and what takes its place, wherever the model has it."""

    rows: list[str]  # the names of its rows in the table
    places: list[tuple[nn.Module, str]]  # the modules that hold it, and as what
    dense: nn.Module
    sparse: nn.Module

    def put(self, module: nn.Module) -> None:
        for parent, child in self.places:
            setattr(parent, child, module)


class Taken(NamedTuple):
    """A row of the table: what one pruned weight took."""

    name: str
    shape: tuple[int, int]  # (outputs, inputs), as a product
    remaining: float
    columns: int  # in its largest call
    layout: str  # one of WAYS
    bytes: int
    why: str  # milliseconds of everything tried, in all calls of `run` together; or why nothing was

    def as_dense(self, why: str) -> "Taken":
        """The row of this weight where it stays dense after all; `why` is added to what it says."""
        if self.layout == "dense":
            return self
        return self._replace(layout="dense", bytes=4 * self.shape[0] * self.shape[1], why=f"{self.why}; {why}")

    def __str__(self) -> str:
        left = f"{self.name:40} {'x'.join(map(str, self.shape)):>10} {self.remaining:6.1%} {self.columns:6d}"
        return f"{left} {self.layout:15} {self.bytes:9d}  {self.why}"


def choice(rows: list[Taken]) -> dict[str, str]:
    """What each pruned weight took, by its name, dense ones too: compress's `chosen`. (An LSTM of ours whose products
    are all dense is torch's again.)"""
    return {row.name: row.layout for row in rows}


# ---------------------------------------------------------------------------- measuring


def time_calls(candidates: dict[str, Callable], calls: Calls, turns: int = 12) -> dict[str, float]:
    """Milliseconds each candidate needs for all calls: the least of some turns, since other programs only add.

    What takes twice as long as the best is not tried again.
    """
    total = dict.fromkeys(candidates, 0.0)
    for often, arguments in calls:
        least, left, begin = dict.fromkeys(candidates, math.inf), list(candidates), time.perf_counter()
        for turn in range(turns):
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


def kind_of(argument: object) -> object:
    """What calls are told apart by: kinds and sizes, not values."""
    if isinstance(argument, PackedSequence):
        return argument.data.shape, len(argument.batch_sizes)
    if not isinstance(argument, Tensor):
        return type(argument)
    if argument.is_nested:
        return tuple(part.shape for part in argument.unbind())
    return argument.dtype, argument.shape


def record_calls(model: nn.Module, run: Callable[[nn.Module], object]) -> dict[nn.Module, Calls]:
    """What each module is called with while `run(model)` runs; calls of one shape are counted, not kept."""
    seen: dict[nn.Module, dict] = {}

    def record(module: nn.Module, arguments: tuple, named: dict) -> None:
        arguments += tuple(named[name] for name in ("input", "hx") if name in named)  # as our layers' own are named
        kinds = tuple(map(kind_of, arguments))
        often = seen.setdefault(module, {}).get(kinds, (0, None))[0]
        seen[module][kinds] = (often + 1, arguments)

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in model.modules()]
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
    return [(1, (torch.randn(size, generator=torch.Generator().manual_seed(0), device="cpu"),))]


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers, whatever form they are kept in; what is shared counts once."""
    packed = [4 * m.packed.numel() for m in model.modules() if isinstance(m, DenseProduct)]
    tensors = [*model.parameters(), *model.buffers()]
    return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}.values()) + sum(packed)


# ---------------------------------------------------------------------------- choosing, layer by layer


def smaller(weight: Tensor, mask: Tensor, layouts: list[str], dtype: str) -> dict[str, Matrix]:
    """The matrix in each layout that stores less than all of it."""
    found = {}
    for layout in layouts:
        r, c = LAYOUTS[layout]
        if weight.shape[1] <= c << 16 and mask.sum() < mask.numel():
            matrix = to_matrix(weight, mask, layout, dtype)
            if matrix.values.numel() < weight.numel():
                found[layout] = matrix
    return found


def products(
    weight: Tensor, bias: Tensor | None, matrices: dict[str, Matrix], columns: int, in_bytes: bool,
    layer: nn.Linear | None = None,
) -> dict[str, nn.Module]:  # fmt: skip
    """x -> x W^T + bias in every way there is. layer: the one it takes the place of, if it is one."""
    dense = layer
    if dense is None:
        dense = nn.utils.skip_init(nn.Linear, *reversed(weight.shape), bias=bias is not None)
        dense.weight, dense.bias = nn.Parameter(weight, False), None if bias is None else nn.Parameter(bias, False)
    candidates = {"dense": dense}
    if torch.backends.mkldnn.is_available():
        candidates["dense prepacked"] = DenseProduct(weight, bias, columns, layer)
    if in_bytes and "unstructured" in matrices:
        candidates["bytes"] = layers.InBytes(matrices["unstructured"], bias, weight.shape, layer)
    return candidates | {name: Product(matrix, bias, weight.shape, layer) for name, matrix in matrices.items()}


def row(name: str, mask: Tensor, columns: int, layout: str, kept: list[Tensor], why: str) -> Taken:
    """kept: the sparse form's tensors, none where the weight stays dense."""
    size = sum(t.numel() * t.element_size() for t in kept) if kept else 4 * mask.numel()
    return Taken(name, tuple(mask.shape), float(mask.float().mean()), columns, layout, size, why)


class Maker(NamedTuple):
    """How layers are made sparse: what `compress` was asked for."""

    run: Callable[[nn.Module], object] | None
    layouts: list[str]
    dtype: str
    keep_dense: list[str]
    chosen: dict[str, str] | None = None  # by weights; None: measured

    @property
    def in_bytes(self) -> bool:
        """May inputs be rounded to eight bits, and does this processor gain by it?"""
        return self.dtype == "w8a8" and byte_lanes() > 0

    def smaller(self, name: str, weight: Tensor, mask: Tensor) -> dict[str, Matrix]:
        """The matrix in each layout that stores less than all of it, of those that are wanted."""
        if self.chosen is None:
            return smaller(weight, mask, self.layouts, self.dtype)
        layout = self.chosen.get(name)
        layout = "unstructured" if layout in ("windows", "bytes") else layout
        return smaller(weight, mask, [x for x in LAYOUTS if x == layout], self.dtype)

    def fastest(
        self, name: str, mask: Tensor, columns: int, candidates: dict[str, nn.Module], calls: Calls
    ) -> tuple[nn.Module, Taken]:
        """The candidate that needs least time for all calls, or the one that is chosen, and its row."""
        if self.chosen is None:
            times = time_calls(candidates, calls)
            layout, why = min(times, key=times.get), said(times)
        else:
            layout, why = self.chosen.get(name, "dense"), "chosen before"
            if layout not in candidates:
                raise lottery.LotteryError(f"{layout} was chosen, and stores no less than all of it or is not here")
        become = candidates[layout]
        return become, row(name, mask, columns, layout, list(become.buffers()), why)


def compress_layer(
    name: str, layer: nn.Module, masks: lottery.Masks, calls: Calls, maker: Maker
) -> tuple[nn.Module, list[Taken]]:
    """A linear layer or a convolution: what it becomes, and its row."""
    mask, weight, bias = masks[f"{name}.weight"].flatten(1), layer.weight.detach().flatten(1), layer.bias
    bias = bias if bias is None else bias.detach()
    matrices = maker.smaller(f"{name}.weight", weight, mask)
    columns = max(layer(*arguments).numel() for _, arguments in calls) // len(weight)
    if isinstance(layer, nn.Linear):
        candidates = products(weight, bias, matrices, columns, maker.in_bytes, layer)
    else:
        candidates = {"dense": layer} | layers.convolutions(layer, matrices, bias, maker.in_bytes, calls)
    become, taken = maker.fastest(f"{name}.weight", mask, columns, candidates, calls)
    return become, [taken]


def compress_lstm(
    name: str, lstm: nn.LSTM, masks: lottery.Masks, calls: Calls, maker: Maker
) -> tuple[nn.Module, list[Taken]]:
    """An nn.LSTM: what it becomes, and a row for each of its weights. Its layers are measured in turn."""
    inputs, recurrent, rows = [], [], []
    xs = [(often, layers.as_batches(lstm, a[0])) for often, a in calls]  # (B, T, inputs) each
    for layer in range(lstm.num_layers):
        outs = []  # of each direction, one (B, T, H) a call
        for suffix in (f"l{layer}", f"l{layer}_reverse")[: 1 + lstm.bidirectional]:
            weight, mask = getattr(lstm, f"weight_ih_{suffix}").detach(), masks[f"{name}.weight_ih_{suffix}"]
            bias = getattr(lstm, f"bias_ih_{suffix}") + getattr(lstm, f"bias_hh_{suffix}") if lstm.bias else None
            columns = max(x.shape[0] * x.shape[1] for _, x in xs)
            matrices = maker.smaller(f"{name}.weight_ih_{suffix}", weight, mask)
            bias = None if bias is None else bias.detach()
            candidates = products(weight, bias, matrices, columns, maker.in_bytes)
            product, taken = maker.fastest(
                f"{name}.weight_ih_{suffix}", mask, columns, candidates, [(often, (x,)) for often, x in xs]
            )
            inputs.append(product)
            rows.append(taken)
            projections = [(often, product(x)) for often, x in xs]  # (B, T, 4 H) each
            step, taken, out = compress_recurrence(name, lstm, suffix, masks, projections, maker)
            recurrent.append(step)
            rows.append(taken)
            outs.append(out)
        xs = [(often, torch.cat(out, 2)) for (often, _), out in zip(xs, zip(*outs))]
    compressed = Lstm(lstm, inputs, recurrent)
    if maker.chosen is not None:
        return compressed, rows
    times = time_calls({"nn.LSTM": lstm, "ours": compressed}, calls)
    if times["nn.LSTM"] < times["ours"]:
        return lstm, [r.as_dense(said(times)) for r in rows]
    return compressed, [r._replace(why=f"{r.why}; {said(times)}") for r in rows]


def compress_recurrence(
    name: str, lstm: nn.LSTM, suffix: str, masks: lottery.Masks, projections: list[tuple[int, Tensor]], maker: Maker
) -> tuple[Recurrent | layers.RecurrentInBytes, Taken, list[Tensor]]:
    """W_hh of one layer and direction: what it becomes, its row, and its outputs (B, T, H) for each projection.

    projections: how often, and (B, T, 4 H).
    """
    weight, mask = getattr(lstm, f"weight_hh_{suffix}").detach(), masks[f"{name}.weight_hh_{suffix}"]
    columns = max(x.shape[0] for _, x in projections)  # at a time
    matrices = maker.smaller(f"{name}.weight_hh_{suffix}", weight, mask)
    matrices["dense"] = whole(weight)
    candidates = {layout: Recurrent(matrix, weight.shape) for layout, matrix in matrices.items()}
    if "unstructured" in matrices and (columns < FEW_COLUMNS or maker.chosen is not None):
        candidates["windows"] = Recurrent(matrices["unstructured"], weight.shape, windowed=True)
    if "unstructured" in matrices and maker.in_bytes:
        candidates["bytes"] = layers.RecurrentInBytes(matrices["unstructured"], weight.shape)
    calls = []
    for often, x in projections:
        zeros = x.new_zeros(x.shape[0], lstm.hidden_size)
        calls.append((often, (x, zeros, zeros, suffix.endswith("reverse"))))
    become, taken = maker.fastest(f"{name}.weight_hh_{suffix}", mask, columns, candidates, calls)
    return become, taken, [become(*arguments)[0] for _, arguments in calls]


FORMS = {nn.Linear: compress_layer, nn.Conv1d: compress_layer, nn.Conv2d: compress_layer, nn.LSTM: compress_lstm}


def form_of(
    name: str, module: nn.Module, own: dict[str, Tensor], calls: Calls, ran: bool
) -> tuple[Callable | None, str]:
    """What makes a pruned module sparse, compress_layer or compress_lstm; or None, and why it stays dense.

    own: its pruned weights, by their names in it.
    """
    kind, tensors = type(module), [a[0].data if isinstance(a[0], PackedSequence) else a[0] for _, a in calls if a]
    if kind not in FORMS:
        return None, f"no sparse form of {kind.__name__}"
    options = {"groups": 1, "padding_mode": "zeros", "proj_size": 0}
    other = [option for option, usual in options.items() if getattr(module, option, usual) != usual]
    if other or isinstance(getattr(module, "padding", 0), str):
        return None, f"no sparse form of {kind.__name__} with {other[0] if other else 'padding by name'}"
    if module._forward_hooks or module._forward_pre_hooks:
        return None, "it has hooks, as weight_norm is one, which only the layer itself runs"
    if "forward" in vars(module):
        return None, "its forward was replaced by another function"
    if len(own) != (2 * len(module.all_weights) if kind is nn.LSTM else 1):
        return None, f"only {', '.join(own)} of it can be pruned"
    if not calls:
        return None, "run does not reach it" if ran else f"a {kind.__name__} is measured where `run` is given"
    if not name:
        return None, "it is the whole model"
    if len(tensors) != len(calls) or not all(isinstance(t, Tensor) for t in tensors):
        return None, f"what this {kind.__name__} is called with is no tensor"
    for tensor in [*tensors, *own.values()]:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            return None, f"sparse products are of float32 on a CPU, not of {tensor.dtype} on {tensor.device.type}"
    return FORMS[kind], ""


# ---------------------------------------------------------------------------- the whole model


def made(maker: Maker, name: str, module: nn.Module, masks: lottery.Masks, own: list[str], calls: Calls):
    """What a pruned module becomes, itself where it stays dense, and the rows of `own`, its weights."""
    inside = {n.rpartition(".")[2]: module.get_parameter(n.rpartition(".")[2]) for n in own}
    kept = [kept for kept in maker.keep_dense if any(n == kept or n.startswith(f"{kept}.") for n in own)]
    form, why = form_of(name, module, inside, calls, maker.run is not None)
    unmasked = [n for n in own if n not in masks]
    if maker.chosen is not None and all(maker.chosen.get(n, "dense") == "dense" for n in own):
        form, why = None, "chosen before"
    if kept or unmasked:
        form, why = None, f"keep_dense names {kept[0]}" if kept else "it has no mask: it was not pruned"
    try:
        if form is not None:
            become, rows = form(name, module, masks, calls, maker)
            if become is not module:
                off = check_alike(module, become, calls, exact=maker.dtype == "float32")
                if maker.dtype != "float32":
                    told = f"in {maker.dtype} its outputs are up to {off:.1%} off"
                    rows = [r if r.layout.startswith("dense") else r._replace(why=f"{r.why}; {told}") for r in rows]
            return become, rows
    except Exception as error:
        why = failing(error)
    full = {n: masks.get(n, torch.ones_like(w, dtype=torch.bool)) for n, w in zip(own, inside.values())}
    return module, [row(n, mask.flatten(1), 0, "dense", [], why) for n, mask in full.items()]


def failing(error: Exception) -> str:
    """Why a layer stays dense whose replacement raised this."""
    return f"its replacement fails: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"


def tensors_in(value: object) -> list[Tensor]:
    """The tensors of a layer's output, in order; those of nested ones one by one."""
    if isinstance(value, Tensor):
        return list(value.unbind()) if value.is_nested else [value]
    return [tensor for part in value for tensor in tensors_in(part)] if isinstance(value, (tuple, list)) else []


def largest(values: Tensor) -> float:
    """The largest magnitude of the finite ones, 0 where there is none."""
    finite = values[values.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


def check_alike(layer: nn.Module, become: nn.Module, calls: Calls, exact: bool) -> float:
    """The largest difference of their outputs in all calls, as a share of the layer's largest output there.

    Raises LotteryError unless both answer alike. exact: up to float32's rounding; else in shape, and finite where the
    layer's outputs are.
    """
    off = 0.0
    for _, arguments in calls:
        wanted, got = tensors_in(layer(*arguments)), tensors_in(become(*arguments))
        if [(t.shape, t.dtype) for t in got] != [(t.shape, t.dtype) for t in wanted]:
            raise lottery.LotteryError(f"its shapes are {[list(t.shape) for t in got]}")
        for a, b in zip(got, wanted):
            most, far = largest(b), (a - b)[b.isfinite()].abs()
            if exact and not torch.allclose(a, b, rtol=1e-3, atol=1e-3 * most, equal_nan=True):
                raise lottery.LotteryError(f"its outputs are up to {float((a - b).abs().max()):.3g} off")
            if not far.isfinite().all():
                raise lottery.LotteryError("its outputs are not finite where the layer's are")
            off = max(off, float(far.max()) / most) if far.numel() and most else off
    return off


def compress_layers(model: nn.Module, masks: lottery.Masks, maker: Maker) -> tuple[list[Taken], list[Swap]]:
    """Replace each pruned layer of a masked model, in place, by what is fastest. Returns a row for each weight."""
    rows, swaps, run = [], [], maker.run
    shared = {id(weight): name for name, weight in lottery.prunable(model).items()}  # a tied one has a layer each
    all_calls = record_calls(model, run) if run else {m: usual_calls(m) for m in model.modules()}
    everywhere = list(model.named_modules(remove_duplicate=False))
    for name, module in list(model.named_modules()):
        dot = f"{name}." if name else ""
        own = {f"{dot}{n}": shared[id(p)] for n, p in module.named_parameters(recurse=False) if id(p) in shared}
        if not own:
            continue
        own_masks = {mine: masks[first] for mine, first in own.items() if first in masks}
        become, own_rows = made(maker, name, module, own_masks, list(own), all_calls.get(module, []))
        rows += own_rows
        if become is not module:
            places = [other.rpartition(".") for other, m in everywhere if m is module]
            swaps.append(Swap(list(own), [(model.get_submodule(p), c) for p, _, c in places], module, become))
    for swap in swaps:
        swap.put(swap.sparse)
    return rows, swaps


def floats_in(value: object) -> list[Tensor]:
    return [tensor for tensor in tensors_in(value) if tensor.is_floating_point()]


def alike(got: list[Tensor], wanted: list[Tensor], share: float) -> bool:
    """Are they of the same shapes, and the same up to this share of the largest?"""
    return [t.shape for t in got] == [t.shape for t in wanted] and all(
        torch.allclose(a, b, rtol=share, atol=share * largest(b), equal_nan=True) for a, b in zip(got, wanted)
    )


def check_answers(got: list[Tensor], wanted: list[Tensor]) -> None:
    """Raise LotteryError unless the model answers as before, up to float32's rounding through several layers."""
    if [t.shape for t in got] != [t.shape for t in wanted]:
        raise lottery.LotteryError(f"what run returns is of shapes {[list(t.shape) for t in got]}")
    for a, b in zip(got, wanted):
        if not alike([a], [b], 1e-2):
            raise lottery.LotteryError(f"what run returns is up to {float((a - b).abs().max()):.3g} off")


def answers_of(dense: nn.Module, first: list[Tensor], run: Callable[[nn.Module], object]) -> list[Tensor]:
    """What `run` returns of the dense copy, with whatever that computes in one pass; [] if it is another each time.

    first: what it returned before. Raises LotteryError where one pass computes something else than the model.
    """
    again = floats_in(run(dense)) if first else []
    if alike(again, first, 1e-3):  # one pass rounds otherwise
        return again
    in_one_pass = [m for m in dense.modules() if hasattr(m, "fused_parts") or hasattr(m, "greedy_parts")]
    if in_one_pass and alike(floats_in(run(dense)), again, 1e-3):
        names = ", ".join(dict.fromkeys(type(module).__name__ for module in in_one_pass))
        raise lottery.LotteryError(f"fused_parts or greedy_parts of {names} compute something else than the model does")
    return []


def attempt(
    model: nn.Module, dense: nn.Module, swaps: list[Swap], run: Callable[[nn.Module], object], wanted: list[Tensor]
) -> list[tuple[Swap, str]]:
    """Put `swaps` in and run the model. Returns those without which it runs and answers as wanted, and why; they are
    dense again."""
    for swap in swaps:
        swap.put(swap.sparse)
    try:
        use_products(model, dense)
        found = floats_in(run(model))
        if wanted:
            check_answers(found, wanted)
        return []
    except Exception as error:
        for swap in swaps:
            swap.put(swap.dense)
        if len(swaps) == 1:
            return [(swaps[0], failing(error))]
        half = len(swaps) // 2
        return attempt(model, dense, swaps[:half], run, wanted) + attempt(model, dense, swaps[half:], run, wanted)


def use_products(model: nn.Module, dense: nn.Module) -> None:
    """Have the model call its layers where it would read their weights, and give it a compiled greedy loop.

    torch's path for an nn.TransformerEncoderLayer in inference reads the weights of its linear layers; it is not taken
    where the layer's activation is none that it knows. dense: the model before anything was replaced. A network that
    offers its greedy loop gets one of what it has now; layers.Greedy says how it does. A block that offers parts of
    itself gets them in one pass each; fused.py says how.
    """
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            ours = model.get_submodule(name)
            replaced = isinstance(ours.linear1, Layer) or isinstance(ours.linear2, Layer)
            ours.activation_relu_or_gelu = 0 if replaced else layer.activation_relu_or_gelu
    parts = model.greedy_parts() if hasattr(model, "greedy_parts") and lottery.ops.compiled else {}
    if parts and plain(parts) and parts["embedding"].weight.device.type == "cpu":
        model.use_greedy(Greedy(**parts))
    for module in list(model.modules()):
        parts = module.fused_parts() if hasattr(module, "fused_parts") else {}
        if parts and plain(parts):
            module.use_fused(*fused(**parts))


def plain(parts: dict[str, object]) -> bool:
    """Do these layers compute what their kinds do? Not with hooks, and not with a forward of their own: what is made of
    their weights would leave that out."""
    kinds = (nn.Embedding, nn.Linear, nn.LSTM, nn.Conv1d)
    for layer in parts.values():
        if not isinstance(layer, nn.Module) or isinstance(layer, Fixed):
            continue
        of_torch = next((kind for kind in kinds if isinstance(layer, kind)), None)
        own = "forward" in vars(layer) or (of_torch and type(layer).forward is not of_torch.forward)
        if own or layer._forward_hooks or layer._forward_pre_hooks:
            return False
    return True


def checked_choice(model: nn.Module, chosen: dict[str, str] | None, run: Callable | None) -> dict[str, str] | None:
    """`chosen` by the names of the unwrapped model. Raises LotteryError for names and layouts that there are not."""
    if chosen is None:
        return None
    if run is None and set(chosen.values()) - {"dense"}:
        raise lottery.LotteryError("chosen needs run: what a layer is called with shapes what it becomes")
    for name, layout in chosen.items():
        if layout not in WAYS:
            raise lottery.LotteryError(f"chosen, {name}: must be one of {', '.join(WAYS)}, got {layout!r}")
    return dict(zip(check_names(model, chosen, "chosen"), chosen.values()))


def compress(
    model: nn.Module, masks: lottery.Masks, run: Callable[[nn.Module], object] | None = None, *,
    layout: str | None = None, dtype: str = "float32", keep_dense: Iterable[str] = (),
    chosen: dict[str, str] | None = None,
) -> tuple[nn.Module, list[Taken]]:  # fmt: skip
    """A copy of the model whose pruned products are sparse where that is faster, in evaluation mode, and the table.

    The copy is called as the model is. A layer that was replaced keeps its attributes, its weight (made anew whenever
    it is read, so that writing to it changes nothing) and all kinds of input that it takes; `.half()` and its like are
    obeyed, while products are computed in float32. The copy can be copied, pickled and sent to another process. It has
    no wrapper of torch.compile, DistributedDataParallel or DataParallel.
    run: uses the model as it will be used (`lambda model: model.transcribe(features, input_lengths)`): each layer is
    measured on what reaches it there, with as many threads as torch has now; layers that are not reached stay dense.
    It is called 8 times at most, so it must not use anything up; more often only where a layer's replacement fails,
    which then stays dense and is named: also where in float32 what `run` returns would be another. If it is faster
    dense as a whole, all stays dense.
    Without it a layer is measured on one utterance of FRAMES frames, and Conv2d stays dense.
    layout: one of LAYOUTS to measure against dense; all by default.
    dtype: "float32", "bfloat16", or "int8" with a scale an output; for sparse layers, dense ones stay float32. "w8a8":
    int8, and their inputs rounded to eight bits too, where this processor gains by it.
    keep_dense: names of layers (with all in them) or of weights that stay dense.
    chosen: what each weight takes, as choice(rows) of another call on such a model says; weights that it does not name
    stay dense. Nothing is measured, and `run` is called four times at most; not at all where everything stays dense.
    A model with the methods `greedy_parts` and `use_greedy` gets a compiled greedy loop too: see layers.Greedy. A block
    in it with `fused_parts` and `use_fused` gets what these name in one pass each: see fused.py.
    Raises LotteryError for another layout or dtype, for masks and names that are not the model's, for `chosen` without
    `run`, for greedy_parts that do not fit, and where these or fused_parts compute something else than the model. What
    `run` raises on the dense model passes through.
    """
    if dtype not in DTYPES:
        raise lottery.LotteryError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if layout is not None and layout not in LAYOUTS:
        raise lottery.LotteryError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
    chosen = checked_choice(model, chosen, run)
    returned: list = []  # by run, as the layers' calls were recorded
    layouts, kept = list(LAYOUTS) if layout is None else [layout], run and (lambda m: returned.append(run(m)))
    maker = Maker(kept, layouts, dtype, check_names(model, keep_dense), chosen)
    compressed, masks = masked_copy(model, masks)
    dense = copy.deepcopy(compressed)
    with torch.no_grad():
        use_products(dense, dense)  # before anything is measured: it may refuse
        if chosen is not None and set(chosen.values()) <= {"dense"}:
            maker = maker._replace(run=None)  # nothing is replaced
        rows, swaps = compress_layers(compressed, masks, maker)
        if run:
            return tried(compressed, dense, rows, swaps, run, maker, returned)
        use_products(compressed, dense)
    return compressed, rows


def tried(
    compressed: nn.Module, dense: nn.Module, rows: list[Taken], swaps: list[Swap], run: Callable[[nn.Module], object],
    maker: Maker, returned: list,
) -> tuple[nn.Module, list[Taken]]:  # fmt: skip
    """Of the copy with all its swaps what runs, answers as the dense one did (returned: by its first run) and is faster
    as a whole; and the rows of that."""
    wanted = answers_of(dense, floats_in(returned[0]), run) if swaps and maker.dtype == "float32" else []
    failed = attempt(compressed, dense, swaps, run, wanted) if swaps else []
    if failed and len(failed) == len(swaps):
        run(compressed)  # all dense again: if this raises, it is not for our layers
    for swap, why in failed:
        rows = [r.as_dense(why) if r.name in swap.rows else r for r in rows]
    use_products(compressed, dense)
    if maker.chosen is None and any(row.layout != "dense" for row in rows):
        # layers may gain less than what surrounds them costs
        ways = {"dense": lambda: run(dense), "ours": lambda: run(compressed)}
        times = time_calls(ways, [(1, ())], TURNS)
        if times["dense"] < times["ours"]:
            return dense, [r.as_dense(f"the whole model: {said(times)}") for r in rows]
    return compressed, rows
