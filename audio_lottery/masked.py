"""A copy of a model to make fast: without wrappers, and with zeros where weights are pruned."""

import copy
import functools
from collections.abc import Iterable

from torch import Tensor, nn

import lottery

WRAPPERS = {
    "module": (nn.parallel.DistributedDataParallel, nn.DataParallel),
    "_orig_mod": nn.Module,  # torch.compile's; no other module has a child of this name
}


def wrapped_as(module: nn.Module) -> str | None:
    """The name of the one child that a module wraps, for torch.compile, DistributedDataParallel and DataParallel."""
    return next((n for n, kinds in WRAPPERS.items() if n in module._modules and isinstance(module, kinds)), None)


def unwrapped_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with no wrapper in it."""
    memo: dict[int, object] = {}  # what deepcopy takes for a copy
    for module in reversed(list(model.modules())):  # the innermost first
        for value in vars(module).values():  # old weight_norm leaves a tensor of the graph there, which has no copy
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        child = wrapped_as(module)
        if child:
            memo[id(module)] = copy.deepcopy(getattr(module, child), memo)
    return copy.deepcopy(model, memo)


def unwrapped_name(model: nn.Module, name: str) -> str:
    """A parameter's name in the unwrapped copy, from its name in the model or in the copy."""
    wrappers = [(prefix, child) for prefix, m in model.named_modules() if (child := wrapped_as(m))]
    for prefix, child in reversed(wrappers):  # the innermost first
        before = f"{prefix}." if prefix else ""
        if name.startswith(f"{before}{child}."):
            name = before + name[len(f"{before}{child}.") :]
    return name


def of(function: object, model: nn.Module) -> bool:
    """Is this a method of one of the model's modules, or a partial of one?"""
    if isinstance(function, functools.partial):
        return any(of(part, model) for part in (function.func, *function.args))
    return any(getattr(function, "__self__", None) is module for module in model.modules())


def masked_copy(model: nn.Module, masks: lottery.Masks) -> tuple[nn.Module, lottery.Masks]:
    """An unwrapped copy with zeros where weights are pruned, for inference, and its masks by its own names.

    A weight without a mask was not pruned. Raises LotteryError for masks that are not the model's, for none, and for a
    module whose own `forward` is a function that no copy takes along.
    """
    masked = unwrapped_copy(model).eval().requires_grad_(False)
    for name, module in masked.named_modules():
        if "forward" in vars(module) and not of(module.forward, masked):
            what = f"the forward of {name or 'the model'} was replaced by a function that no copy takes along"
            raise lottery.LotteryError(f"{what}: it would run the model that it was made for (give it as a method)")
    masks = {unwrapped_name(model, name): mask for name, mask in masks.items()}
    weights = lottery.prunable(masked)
    for name in [*masks, *weights]:
        if name not in weights:
            raise lottery.LotteryError(f"masks has {name}, which the model does not prune (see lottery.scope)")
        if not masks or (name in masks and masks[name].shape != weights[name].shape):
            shape = list(masks[name].shape) if name in masks else "none"
            raise lottery.LotteryError(f"{name}: a mask of shape {list(weights[name].shape)} is needed, got {shape}")
        if name in masks:
            weights[name].masked_fill_(~masks[name], 0)
    return masked, masks


def check_names(model: nn.Module, names: Iterable[str], what: str = "keep_dense") -> list[str]:
    """`names`, given as `what`, as names of the unwrapped model. Raises LotteryError for one that is none of its layers
    or weights."""
    if isinstance(names, str):
        raise lottery.LotteryError(f"{what} must be a list of names, got {names!r}")
    names = [unwrapped_name(model, name) for name in names]
    known = {unwrapped_name(model, f"{n}.")[:-1] for n, _ in model.named_modules(remove_duplicate=False) if n}
    known |= {unwrapped_name(model, n) for n, _ in model.named_parameters(remove_duplicate=False)}
    known.discard("")
    for name in names:
        if name not in known:
            raise lottery.LotteryError(f"{what}: the model has no layer and no weight named {name!r}")
    return names
