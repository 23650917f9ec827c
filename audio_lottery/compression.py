"""A ticket in use: `compress` turns the pruned products of any nn.Module into sparse ones, for inference on a CPU.

    compressed, rows = compress(model, masks, lambda model: model.transcribe(features, input_lengths))

Each layer takes what was measured fastest on this machine, dense included; a row says what and why. Where the whole is
faster dense, it stays dense. The forms that layers can take are sparse.py's.
"""

import copy
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import lottery
from audio_lottery.sparse import (
    DTYPES,
    LAYOUTS,
    Conv,
    DenseProduct,
    Greedy,
    Lstm,
    Matrix,
    Product,
    Recurrent,
    to_matrix,
    whole,
)  # fmt: skip

FRAMES = 100  # that layers are measured on where `run` is not given
Calls = list[tuple[int, tuple]]  # how often, and with what


class Taken(NamedTuple):
    """A row of the table: what one pruned weight took."""

    name: str
    shape: tuple[int, int]  # (outputs, inputs), as a product
    remaining: float
    columns: int  # in its largest call
    layout: str  # one of LAYOUTS, "dense" or "dense prepacked"
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


# ---------------------------------------------------------------------------- measuring


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


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers, whatever form they are kept in."""
    packed = [4 * m.packed.numel() for m in model.modules() if isinstance(m, DenseProduct)]
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors) + sum(packed)


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


def fastest(
    name: str, mask: Tensor, columns: int, candidates: dict[str, nn.Module], matrices: dict[str, Matrix], calls: Calls
) -> tuple[nn.Module, Taken]:
    """The candidate that needs least time for all calls, and its row."""
    times = time_calls(candidates, calls)
    layout = min(times, key=times.get)
    return candidates[layout], row(name, mask, columns, layout, matrices, said(times))


def compress_layer(
    name: str, layer: nn.Module, masks: lottery.Masks, calls: Calls, layouts: list[str], dtype: str
) -> tuple[nn.Module, list[Taken]]:
    """A linear layer or a convolution: what it becomes, and its row."""
    mask, weight = masks[f"{name}.weight"].flatten(1), layer.weight.detach().flatten(1)
    bias = None if layer.bias is None else layer.bias.detach()
    matrices = smaller(weight, mask, layouts, dtype)
    columns = max(layer(*arguments).numel() for _, arguments in calls) // len(weight)
    if isinstance(layer, nn.Linear):
        candidates = products(weight, bias, matrices, columns)
    else:
        candidates = {"dense": layer} | {layout: Conv(layer, matrix, bias) for layout, matrix in matrices.items()}
    become, taken = fastest(f"{name}.weight", mask, columns, candidates, matrices, calls)
    return become, [taken]


def compress_lstm(
    name: str, lstm: nn.LSTM, masks: lottery.Masks, calls: Calls, layouts: list[str], dtype: str
) -> tuple[nn.Module, list[Taken]]:
    """An nn.LSTM: what it becomes, and a row for each of its weights. Its layers are measured in turn."""
    inputs, recurrent, rows = [], [], []
    xs = [(often, a[0] if lstm.batch_first else a[0].transpose(0, 1)) for often, a in calls]  # (B, T, inputs) each
    for layer in range(lstm.num_layers):
        outs = []  # of each direction, one (B, T, H) a call
        for suffix in (f"l{layer}", f"l{layer}_reverse")[: 1 + lstm.bidirectional]:
            weight, mask = getattr(lstm, f"weight_ih_{suffix}").detach(), masks[f"{name}.weight_ih_{suffix}"]
            bias = getattr(lstm, f"bias_ih_{suffix}") + getattr(lstm, f"bias_hh_{suffix}") if lstm.bias else None
            columns = max(x.shape[0] * x.shape[1] for _, x in xs)
            matrices = smaller(weight, mask, layouts, dtype)
            candidates = products(weight, None if bias is None else bias.detach(), matrices, columns)
            product, taken = fastest(
                f"{name}.weight_ih_{suffix}", mask, columns, candidates, matrices, [(often, (x,)) for often, x in xs]
            )
            inputs.append(product)
            rows.append(taken)
            projections = [(often, product(x)) for often, x in xs]  # (B, T, 4 H) each
            step, taken, out = compress_recurrence(name, lstm, suffix, masks, projections, layouts, dtype)
            recurrent.append(step)
            rows.append(taken)
            outs.append(out)
        xs = [(often, torch.cat(out, 2)) for (often, _), out in zip(xs, zip(*outs))]
    compressed = Lstm(lstm, inputs, recurrent)
    times = time_calls({"nn.LSTM": lstm, "ours": compressed}, calls)
    if times["nn.LSTM"] < times["ours"]:
        return lstm, [r.as_dense(said(times)) for r in rows]
    return compressed, [r._replace(why=f"{r.why}; {said(times)}") for r in rows]


def compress_recurrence(
    name: str, lstm: nn.LSTM, suffix: str, masks: lottery.Masks, projections: list[tuple[int, Tensor]],
    layouts: list[str], dtype: str,
) -> tuple[Recurrent, Taken, list[Tensor]]:  # fmt: skip
    """W_hh of one layer and direction: what it becomes, its row, and its outputs (B, T, H) for each projection.

    projections: how often, and (B, T, 4 H).
    """
    weight, mask = getattr(lstm, f"weight_hh_{suffix}").detach(), masks[f"{name}.weight_hh_{suffix}"]
    columns = max(x.shape[0] for _, x in projections)  # at a time
    matrices = smaller(weight, mask, layouts, dtype)
    matrices["dense"] = whole(weight)
    candidates = {layout: Recurrent(matrix, None, len(weight)) for layout, matrix in matrices.items()}
    calls = []
    for often, x in projections:
        zeros = x.new_zeros(x.shape[0], lstm.hidden_size)
        calls.append((often, (x, zeros, zeros, suffix.endswith("reverse"))))
    become, taken = fastest(f"{name}.weight_hh_{suffix}", mask, columns, candidates, matrices, calls)
    return become, taken, [become(*arguments)[0] for _, arguments in calls]


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


# ---------------------------------------------------------------------------- the whole model


def masked_copy(model: nn.Module, masks: lottery.Masks) -> nn.Module:
    """A copy with zeros where weights are pruned, in evaluation mode and without gradients.

    Raises LotteryError for masks that are not the model's.
    """
    masked = copy.deepcopy(model).eval().requires_grad_(False)
    for name, weight in lottery.prunable(masked).items():
        if name not in masks or masks[name].shape != weight.shape:
            shape = list(masks[name].shape) if name in masks else "none"
            raise lottery.LotteryError(f"{name}: a mask of shape {list(weight.shape)} is needed, got {shape}")
        weight.masked_fill_(~masks[name], 0)
    return masked


def compress_layers(
    model: nn.Module, masks: lottery.Masks, run: Callable[[nn.Module], object] | None, layouts: list[str], dtype: str
) -> list[Taken]:
    """Replace each pruned layer of a masked model, in place, by what is fastest. Returns a row for each weight."""
    rows, weights = [], lottery.prunable(model)
    all_calls = record_calls(model, run) if run else {m: usual_calls(m) for m in model.modules()}
    for name, module in list(model.named_modules()):
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
        setattr(model.get_submodule(parent), child, module)
    return rows


def compress_greedy(network: nn.Module) -> None:
    """Give a network that offers its greedy loop a compiled one; sparse.Greedy says how a network does."""
    if hasattr(network, "greedy_parts"):
        network.use_greedy(Greedy(**network.greedy_parts()))


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
    A model with the methods `greedy_parts` and `use_greedy` gets a compiled greedy loop too: see sparse.Greedy.
    Raises LotteryError for another layout or dtype, for masks that are not the model's, and for greedy_parts that do
    not fit.
    """
    if dtype not in DTYPES:
        raise lottery.LotteryError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    if layout is not None and layout not in LAYOUTS:
        raise lottery.LotteryError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout}")
    compressed = masked_copy(model, masks)
    dense = copy.deepcopy(compressed)
    with torch.no_grad():
        compress_greedy(dense)  # before anything is measured: it may refuse
        rows = compress_layers(compressed, masks, run, list(LAYOUTS) if layout is None else [layout], dtype)
        compress_greedy(compressed)
        if run and any(row.layout != "dense" for row in rows):  # layers may gain less than what surrounds them costs
            times = time_calls({"dense": lambda: run(dense), "ours": lambda: run(compressed)}, [(1, ())])
            if times["dense"] < times["ours"]:
                return dense, [r.as_dense(f"the whole model: {said(times)}") for r in rows]
    return compressed, rows
