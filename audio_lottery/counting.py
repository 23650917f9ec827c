"""How often the weights of any nn.Module multiply: its multiply-adds, dense and with zeros skipped."""

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lottery import PRUNED_LAYERS, LotteryError, prunable

# Functions that multiply by a weight, by their names in torch: outside of the weight's layer they are not counted.
PRODUCTS = {
    "linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "mv", "addmm", "baddbmm", "einsum",
    "tensordot", "inner", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "multi_head_attention_forward", "addmv", "multi_dot", "linalg_multi_dot", "linalg_matmul",
    "lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
}  # fmt: skip

# What these make of a weight is it again, whole, in part or beside others.
COPIES = {
    "cat", "concat", "concatenate", "stack", "hstack", "vstack", "contiguous", "clone", "to", "float", "half",
    "bfloat16", "double",
}  # fmt: skip
ROWS_OF = {"embedding", "index_select", "gather"}  # what these take of a weight, as a tied one, is an input


def weight_uses(model: nn.Module, call: Callable[[], object]) -> dict[str, int | Tensor]:
    """How often each prunable weight multiplies an input during call(), which runs the model.

    One number a parameter; where its rows differ (in_proj_weight of an nn.MultiheadAttention whose queries are not as
    many as its keys) int64 (rows, 1). The sum of uses * numel, or of (uses * ones).sum(), is the multiply-adds of all
    products with weights; of (uses * mask).sum(), with zeros skipped: see multiply_adds. Counted are convolutions
    (padding included; transposed ones by their inputs), recurrent layers (each step), linear layers and attention's
    projections, not products of two activations. (Counters of FLOPs take nn.LSTM for 0.)
    Raises LotteryError, naming it, for a weight that is multiplied outside of its layer's forward: it is not seen here.
    """
    weights = prunable(model)
    names = {id(weight): name for name, weight in weights.items()}
    uses: dict[str, int | Tensor] = dict.fromkeys(names.values(), 0)
    running: list[nn.Module] = []
    made: dict[int, tuple[str, Tensor]] = {}  # what was made of a weight outside of its layer, and holds its place

    def count(module, args, kwargs, output):
        running.pop()
        for path, weight in own_weights(module):
            if id(weight) in names:
                uses[names[id(weight)]] += uses_in(module, path, args, kwargs, output)

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            within = {id(weight) for module in running for _, weight in own_weights(module)}
            found = (id(x) for tensor in tensors_in((args, kwargs)) for x in (tensor, tensor._base))
            known = (names.get(key) or made.get(key, ("",))[0] for key in found if key not in within)
            name = next(filter(None, known), None)
            called = getattr(func, "__name__", "")
            if name and called in PRODUCTS:
                what = f"multiplies in {called} outside of its layer's forward"
                raise LotteryError(f"{name} {what}: its uses cannot be counted")
            result = func(*args, **(kwargs or {}))
            if name and called not in ROWS_OF and isinstance(result, Tensor) and result.is_floating_point():
                if called in COPIES or result.numel() == weights[name].numel():
                    made[id(result)] = name, result
            return result

    layers = [module for module in model.modules() if isinstance(module, PRUNED_LAYERS)]
    hooks = [module.register_forward_hook(count, with_kwargs=True) for module in layers]
    hooks += [module.register_forward_pre_hook(lambda module, _: running.append(module)) for module in layers]
    try:
        with Watch():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return uses


def multiply_adds(uses: dict[str, int | Tensor], kept: dict[str, Tensor]) -> int:
    """Of the products with weights, from weight_uses: `kept` are masks, or the weights themselves for all of them.

    A weight that has none in `kept` is not counted.
    """
    masks = {name: mask if mask.dtype == torch.bool else torch.ones_like(mask) > 0 for name, mask in kept.items()}
    return sum(int((uses[name] * mask.flatten(1)).sum()) for name, mask in masks.items())


def own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters that a layer multiplies by itself: an attention calls no forward of its out_proj."""
    yield from module.named_parameters(recurse=False)
    if is_attention(module):
        yield "out_proj.weight", module.out_proj.weight


def is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


def rows_of(x: Tensor) -> int:
    """Vectors in a tensor of (..., features), or in a packed sequence."""
    return x.data.numel() // max(x.data.shape[-1], 1)


def uses_in(module: nn.Module, path: str, args: tuple, kwargs: dict, output) -> int | Tensor:
    """How often the weight `path` of a layer multiplied in this call of it."""
    given = list(inspect.signature(module.forward).bind(*args, **kwargs).arguments.values())
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return given[0].numel() // module.in_channels
    out = output[0] if isinstance(output, tuple) else output
    if isinstance(module, nn.modules.conv._ConvNd):
        return out.numel() // module.out_channels
    if isinstance(module, nn.Linear):
        return out.numel() // max(module.out_features, 1)
    if not is_attention(module):
        return rows_of(out)
    query, key, value = map(rows_of, given[:3])
    if path != "in_proj_weight":
        return {"k_proj_weight": key, "v_proj_weight": value}.get(path, query)
    if query == key == value:
        return query
    return torch.tensor([query, key, value], device=out.device).repeat_interleave(module.embed_dim)[:, None]
