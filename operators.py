"""The operators that tickets add to training: a reference in PyTorch, and the choice between it and csrc/.

Masks are bool, True where a weight is kept; lists are of one tensor a weight, all of one device.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _check_device(weights: list[Tensor], i: int) -> None:
    if weights[i].device != weights[0].device:
        devices = f"weights[0] is on {weights[0].device}, weights[{i}] on {weights[i].device}"
        raise ValueError(f"all weights must be on one device: {devices}")


def _check_tensors(weights: list[Tensor], grads: list[Tensor], masks: list[Tensor]) -> None:
    """What csrc/checks.h refuses, but for the dtypes of weights and gradients."""
    if len(weights) != len(masks):
        raise ValueError(f"weights and masks must be as many, got {len(weights)} and {len(masks)}")
    if grads and len(grads) != len(weights):
        raise ValueError(f"grads must be empty or as many as weights, got {len(grads)} and {len(weights)}")
    for i, mask in enumerate(masks):
        if mask.dtype != torch.bool:
            raise TypeError(f"masks[{i}] must be bool, got {mask.dtype}")
        _check_device(weights, i)
    for name, tensors in (("masks", masks), ("grads", grads)):
        for i, (tensor, weight) in enumerate(zip(tensors, weights)):
            if tensor.shape != weight.shape:
                shapes = f"{list(tensor.shape)} and {list(weight.shape)}"
                raise ValueError(f"{name}[{i}] must have the shape of weights[{i}], got {shapes}")
            if tensor.device != weight.device:
                devices = f"{tensor.device} and {weight.device}"
                raise ValueError(f"{name}[{i}] must be on the device of weights[{i}], got {devices}")


def reference_hold_ticket_(weights: list[Tensor], grads: list[Tensor], masks: list[Tensor]) -> None:
    """Zero every weight and gradient where its mask is False, in place; NaN becomes 0 too.

    weights, masks: as many tensors, pairwise of one shape.  grads: as many, or none at all.
    """
    _check_tensors(weights, grads, masks)
    for tensors in (weights, grads):
        for tensor, mask in zip(tensors, masks):
            tensor.masked_fill_(mask.logical_not(), 0)


def reference_global_magnitude_masks(weights: list[Tensor], masks: list[Tensor], keep: int) -> list[Tensor]:
    """Masks of the `keep` largest |w| among the surviving weights of all tensors together.

    Ties at the threshold: the earlier tensor, then the lower flat index, is kept.  Raises ValueError for a NaN or
    infinite weight, naming its position, and unless 0 <= keep <= survivors.
    """
    _check_tensors(weights, [], masks)
    for i, weight in enumerate(weights):
        if not weight.isfinite().all():
            raise ValueError(f"weights[{i}] has a NaN or infinite value (magnitudes must be finite to be ranked)")
    survivors = sum(int(mask.sum()) for mask in masks)
    if not 0 <= keep <= survivors:
        raise ValueError(f"keep must be between 0 and the {survivors} surviving weights, got {keep}")
    if keep == 0:
        return [torch.zeros_like(mask) for mask in masks]
    scores = torch.cat([torch.where(m, w.abs(), -1).flatten() for w, m in zip(weights, masks)])  # pruned: below all
    threshold = scores.kthvalue(scores.numel() - keep + 1).values  # the keep-th largest
    above, tied = scores > threshold, scores == threshold
    kept = above | (tied & (tied.cumsum(0) <= keep - above.sum()))
    return [part.view(mask.shape) for part, mask in zip(kept.split([mask.numel() for mask in masks]), masks)]


def _check_blocks(weights: list[Tensor], rows: int, columns: int) -> None:
    if rows < 1 or columns < 1:
        raise ValueError(f"rows and columns must be at least 1, got {rows} and {columns}")
    for i, weight in enumerate(weights):
        if weight.dim() < 2:
            rule = "(a block is a tile of a matrix)"
            raise ValueError(f"weights[{i}] must have at least 2 dimensions, got {weight.dim()} {rule}")
        _check_device(weights, i)


def reference_block_norms(weights: list[Tensor], rows: int, columns: int) -> list[Tensor]:
    """The L1 norms of the blocks of each weight, a matrix of size(0) rows with its other dimensions flattened.

    Blocks are tiles of rows x columns from the top left, smaller at the edges.  Returns float64 (ceil(R / rows),
    ceil(C / columns)) for each weight (R, ...), R x C as a matrix: the sum of |w| over the block, added row by row from
    its top left, so that every implementation rounds alike; NaN or infinite where a weight of the block is.  Ranking
    them with global_magnitude_masks prunes blocks.  Call it on detached weights.  Raises ValueError unless rows and
    columns are >= 1 and each weight has two dimensions or more.
    """
    _check_blocks(weights, rows, columns)
    norms = []
    for weight in weights:
        matrix = weight.flatten(1).abs()
        r, c = (min(block, max(size, 1)) for block, size in zip((rows, columns), matrix.shape))
        matrix = F.pad(matrix, (0, -matrix.size(1) % c, 0, -matrix.size(0) % r))  # |w| + 0 is exact
        tiles = matrix.view(matrix.size(0) // r, r, matrix.size(1) // c, c)
        norm = tiles.new_zeros(tiles.size(0), tiles.size(2), dtype=torch.float64)
        for row in range(r):
            for column in range(c):
                norm += tiles[:, row, :, column].double()
        norms.append(norm)
    return norms


class Ops(NamedTuple):
    hold_ticket_: Callable[[list[Tensor], list[Tensor], list[Tensor]], None]
    global_magnitude_masks: Callable[[list[Tensor], list[Tensor], int], list[Tensor]]
    block_norms: Callable[[list[Tensor], int, int], list[Tensor]]
    path: str  # which path this is, for the line at start-up


def choose_ops() -> Ops:
    """The operators of csrc/ where they are built, the reference elsewhere: the one place that chooses."""
    try:
        import _lottery  # registers torch.ops.audio_lottery
    except ImportError as error:
        reference = reference_hold_ticket_, reference_global_magnitude_masks, reference_block_norms
        return Ops(*reference, f"pure PyTorch ({error})")
    compiled, facts = torch.ops.audio_lottery, _lottery.build_facts()
    torch.library.register_fake("audio_lottery::hold_ticket_", _check_tensors)

    @torch.library.register_fake("audio_lottery::global_magnitude_masks")
    def fake_masks(weights, masks, keep):
        _check_tensors(weights, [], masks)
        return [mask.new_empty(mask.shape) for mask in masks]

    @torch.library.register_fake("audio_lottery::block_norms")
    def fake_norms(weights, rows, columns):
        _check_blocks(weights, rows, columns)
        matrices = [weight.flatten(1) for weight in weights]
        shapes = [(-(-matrix.size(0) // rows), -(-matrix.size(1) // columns)) for matrix in matrices]
        return [weight.new_empty(shape, dtype=torch.float64) for weight, shape in zip(weights, shapes)]

    def on_its_devices(op, reference):  # a build without CUDA leaves tensors on a GPU to the reference
        devices = {"cpu", "cuda"} if facts["cuda"] else {"cpu"}
        return lambda weights, *rest: (op if {w.device.type for w in weights} <= devices else reference)(weights, *rest)

    return Ops(
        on_its_devices(compiled.hold_ticket_, reference_hold_ticket_),
        on_its_devices(compiled.global_magnitude_masks, reference_global_magnitude_masks),
        on_its_devices(compiled.block_norms, reference_block_norms),
        f"compiled C++ ({facts['instructions']}, {'OpenMP' if facts['openmp'] else 'one thread'})"
        + (f" and CUDA ({facts['cuda']})" if facts["cuda"] else ""),
    )


ops = choose_ops()  # lottery.py calls ops.NAME
