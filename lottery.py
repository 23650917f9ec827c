"""Lottery tickets for any nn.Module: masks, global magnitude pruning, rewinding, rounds, verdicts, ticket files.

Algorithm 1 of "Audio Lottery" (Ding, Chen, Wang; ICLR 2022). Knows nothing of speech. In short:

    for found in find_ticket(model, train, evaluate, sparsity=0.9):
        print(found.row)                 # one dict a round: counts, hashes and what `evaluate` measured

Words: `sparsity` is the fraction of prunable weights removed, `remaining` is 1 - sparsity, a mask is bool and True
where a weight is kept, round 0 is dense. The invariants that are asserted as it runs:

    I1  masks are nested                            I4  a pruned weight is exactly 0 after every epoch
    I2  kept counts are exact, ties included        I5  a NaN or infinite weight is refused by name
    I3  a rewound weight is theta_k * mask, bit for bit
"""

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

Masks = dict[str, Tensor]  # parameter name -> bool, the parameter's shape, True = kept
State = dict[str, Tensor]  # a state_dict: parameters and buffers


class LotteryError(ValueError):
    """A request that cannot be met, or an invariant that does not hold; the message names the thing and the rule."""


# ---------------------------------------------------------------------------- ops: the reference


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
        matrix = nn.functional.pad(matrix, (0, -matrix.size(1) % c, 0, -matrix.size(0) % r))  # |w| + 0 is exact
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


ops = choose_ops()  # everything below calls ops.NAME


# ---------------------------------------------------------------------------- scope: what is pruned

PRUNED_LAYERS = (
    nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Linear, nn.Bilinear, nn.MultiheadAttention,
)  # fmt: skip


class Scoped(NamedTuple):
    name: str
    shape: tuple[int, ...]
    verdict: str  # "pruned", or why not


def scope(model: nn.Module) -> list[Scoped]:
    """Every parameter of the model, in order, with its shape and "pruned" or why not.

    Pruned is every weight of two or more dimensions in convolution, recurrent, attention and linear layers. A weight
    shared between layers is judged by all of them and listed once.
    """
    reasons: dict[int, list[str]] = {}
    rows: dict[int, tuple[str, Tensor]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(module, PRUNED_LAYERS):
                reason = f"in {type(module).__name__}, not a convolution, recurrent, attention or linear layer"
            elif "bias" in name:
                reason = "a bias"
            elif parameter.dim() < 2:
                reason = f"{parameter.dim()}-D"
            else:
                reason = ""
            reasons.setdefault(id(parameter), []).append(reason)
            rows.setdefault(id(parameter), (f"{prefix}.{name}" if prefix else name, parameter))
    return [
        Scoped(name, tuple(parameter.shape), next(filter(None, reasons[key]), "pruned"))
        for key, (name, parameter) in rows.items()
    ]


def prunable(model: nn.Module) -> dict[str, Tensor]:
    """The pruned parameters by name, in order. Raises LotteryError if there are none."""
    parameters = dict(model.named_parameters())
    found = {row.name: parameters[row.name] for row in scope(model) if row.verdict == "pruned"}
    if not found:
        raise LotteryError("the model has no weight to prune (see lottery.scope)")
    return found


def weight_uses(model: nn.Module, call: Callable[[], object]) -> dict[str, int]:
    """How often each prunable weight multiplies an input during call(), which runs the model.

    The sum of uses * numel is the multiply-adds of all products with weights; of uses * kept, with zeros skipped.
    Counted are convolutions (padding included), recurrent layers (each step) and linear layers, not products of two
    activations, as in attention. (Counters of FLOPs take nn.LSTM for 0.)
    """
    names = {id(weight): name for name, weight in prunable(model).items()}
    uses = dict.fromkeys(names.values(), 0)

    def count(module, inputs, output):
        out = (output[0] if isinstance(output, tuple) else output).data  # of a packed sequence too
        for weight in module.parameters(recurse=isinstance(module, nn.MultiheadAttention)):  # calls out_proj unseen
            if id(weight) in names:
                convolution = isinstance(module, nn.modules.conv._ConvNd)
                uses[names[id(weight)]] += out.numel() // (module.out_channels if convolution else out.shape[-1])

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, PRUNED_LAYERS)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return uses


def compress(model: nn.Module, masks: Masks, run: Callable[[nn.Module], object] | None = None, **options):
    """A copy of the model with sparse products for inference on a CPU, and what each layer took.

    run: uses the model as it will be used; each layer is measured on what reaches it.  options: layout, dtype.
    See sparse.compress.
    """
    import sparse  # which imports this file

    return sparse.compress(model, masks, run, **options)


# ---------------------------------------------------------------------------- how many are kept


def kept_after(total: int, rounds: int, prune_rate: float) -> int:
    """Weights kept after `rounds` rounds: round(total * (1 - prune_rate) ** rounds)."""
    return round(total * (1 - prune_rate) ** rounds)


def check_rates(sparsity: float, prune_rate: float) -> None:
    """Raise LotteryError unless 0 <= sparsity < 1, 0 < prune_rate < 1, and 1,000 rounds are enough."""
    if not 0 <= sparsity < 1:
        raise LotteryError(f"sparsity must be in [0, 1), got {sparsity} (it is the fraction removed, not kept)")
    if not 0 < prune_rate < 1:
        raise LotteryError(f"prune_rate must be in (0, 1), got {prune_rate} (the share of survivors removed a round)")
    rounds = math.log(1 - sparsity) / math.log1p(-prune_rate)
    if rounds > 1000:
        raise LotteryError(f"prune_rate {prune_rate} takes {rounds:.0f} rounds to sparsity {sparsity} (1,000 at most)")


def kept_counts(total: int, sparsity: float, prune_rate: float = 0.2) -> list[int]:
    """Kept counts of rounds 0, 1, ...; the last is exactly round(total * (1 - sparsity)).

    Raises LotteryError as check_rates does, and if no weight would be kept.
    """
    check_rates(sparsity, prune_rate)
    last = round(total * (1 - sparsity))
    if last < 1:
        raise LotteryError(f"sparsity {sparsity} keeps none of {total} weights (at least 1 must be kept)")
    counts = [total]
    while counts[-1] > last:
        counts.append(max(last, min(kept_after(total, len(counts), prune_rate), counts[-1] - 1)))
    return counts


# ---------------------------------------------------------------------------- masks and rewinding


def copy_state(model: nn.Module) -> State:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def sha256(tensors: dict[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


SCOPES = ("global", "layer", "lamp")


class Pruning(NamedTuple):
    """How weights are ranked against each other, and in which units they are removed."""

    block: tuple[int, int] = (1, 1)  # rows, columns of a unit, each weight seen as out_features x the rest
    # "global": by magnitude, as in Algorithm 1; "layer": the same share of each layer; "lamp": Lee et al. 2021
    scope: str = "global"
    min_remaining: float = 0.0  # share of its units that each layer keeps at least

    def check(self) -> None:
        """Raise LotteryError for a value that cannot be."""
        if len(self.block) != 2 or not all(isinstance(n, int) and 1 <= n < 2**31 for n in self.block):
            raise LotteryError(f"block must be rows and columns, both at least 1, got {self.block}")
        if self.scope not in SCOPES:
            raise LotteryError(f"scope must be one of {', '.join(SCOPES)}, got {self.scope!r}")
        if not 0 <= self.min_remaining < 1:
            raise LotteryError(f"min_remaining must be in [0, 1), got {self.min_remaining} (a layer's least share)")

    def units(self, mask: Tensor) -> Tensor:
        """Which units a mask keeps: itself, or (ceil(R / rows), ceil(C / columns)) bool for a weight of R x C.

        A unit is kept or removed whole, so that its first weight speaks for it.
        """
        rows, columns = self.block
        return mask if self.block == (1, 1) else mask.flatten(1)[::rows, ::columns]

    def weights(self, units: Tensor, mask: Tensor) -> Tensor:
        """The mask, of the shape of `mask`, that keeps these units."""
        if self.block == (1, 1):
            return units
        (rows, columns), matrix = self.block, mask.flatten(1)
        whole = units.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return whole[: matrix.shape[0], : matrix.shape[1]].reshape(mask.shape)

    def least(self, units: Tensor) -> int:
        """Units that a layer keeps at least."""
        return math.ceil(round(self.min_remaining * units.numel(), 6))  # 0.07 * 100 is 7, not 7.000000000000001


BY_MAGNITUDE = Pruning()  # Algorithm 1


def rank_within(scores: Tensor, units: Tensor, scope: str) -> Tensor:
    """Scores of a layer's surviving units that order them as |scores| does, made comparable between layers.

    scores, units: of one shape.  Returns float64 of it, 0 where units is False; the same bits on every device.
    scope "layer": n / (rank + 1/2), n the layer's units, removed ones too, and rank 0 its largest: the largest of all
    layers together are the same share of each, rounded by Webster's method, and shares of fewer are subsets.
    scope "lamp": score^2 / sum of the squares of itself and all larger ones (Lee et al. 2021, "Layer-adaptive
    sparsity for the magnitude-based pruning").
    """
    survivors = units.cpu()
    magnitudes = scores.detach().cpu()[survivors].double().abs()
    order = magnitudes.argsort(descending=True, stable=True)  # ties: the lower flat index first
    if scope == "layer":
        values = survivors.numel() / (torch.arange(len(order), dtype=torch.float64) + 0.5)
    else:
        squares = magnitudes[order].square()
        values = torch.where(squares > 0, squares / squares.cumsum(0), 0.0)
    ranked, out = torch.empty_like(magnitudes), torch.zeros(units.shape, dtype=torch.float64)
    ranked[order] = values
    out[survivors] = ranked
    return out.to(units.device)


def prune(weights: dict[str, Tensor], masks: Masks, keep: int, pruning: Pruning = BY_MAGNITUDE) -> Masks:
    """New masks of the `keep` largest surviving units (step 2 of Algorithm 1, where a unit is a weight).

    The score of a block is its L1 norm.  Ties: the earlier parameter, then the lower flat index, is kept.
    Raises LotteryError for a NaN or infinite weight, naming the parameter, and for an impossible `keep`.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise LotteryError(
                f"{name} has a NaN or infinite weight: nothing was pruned (is the learning rate too high?)"
            )
    scores, units = [w.detach() for w in weights.values()], [pruning.units(masks[name]) for name in weights]
    try:
        if pruning.block != (1, 1):
            scores = ops.block_norms(scores, *pruning.block)
        if pruning.scope != "global":
            scores = [rank_within(score, unit, pruning.scope) for score, unit in zip(scores, units)]
        # Each layer's least first, which is among its largest; then the largest of what is left.
        least = [min(pruning.least(unit), int(unit.sum())) for unit in units] if pruning.min_remaining else []
        if sum(least) > keep:
            raise LotteryError(f"min_remaining {pruning.min_remaining} keeps {sum(least)}, more than {keep} in all")
        floor = [ops.global_magnitude_masks([s], [u], n)[0] for s, u, n in zip(scores, units, least)]
        above = ops.global_magnitude_masks(scores, [u & ~f for u, f in zip(units, floor)] or units, keep - sum(least))
    except (ValueError, TypeError) as error:
        raise LotteryError(str(error)) from None
    kept = [a | f for a, f in zip(above, floor)] or above
    if sum(int(unit.sum()) for unit in kept) != keep:  # I2
        what = "weights" if pruning.block == (1, 1) else "blocks"
        raise LotteryError(f"pruning kept {sum(int(u.sum()) for u in kept)} {what} instead of {keep}")
    new = {name: pruning.weights(unit, masks[name]) for name, unit in zip(weights, kept)}
    for name in new:
        if (new[name] & ~masks[name]).any():  # I1
            raise LotteryError(f"{name}: the new mask keeps a weight that was pruned before (masks must be nested)")
    return new


class Ticket:
    """Masks held in place on a model, and the state it rewinds to.

    A training loop calls hold() once a step, after backward() and before clipping, and stepped() after
    optimizer.step(). Parameters stay the leaf tensors they were: no hooks and no copies, so that optimizers,
    state_dict, deepcopy, DDP and cuDNN's flat weights see nothing new.
    """

    def __init__(self, model: nn.Module, rewind_step: int = 0, pruning: Pruning = BY_MAGNITUDE):
        pruning.check()
        self.model, self.rewind_step, self.steps, self.round = model, rewind_step, 0, 0
        self.pruning = pruning
        self.weights = prunable(model)
        self.masks: Masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        self.threshold = 0.0  # the smallest magnitude that the last pruning kept
        self.start_sha256 = sha256(model.state_dict())  # of all that the round started from
        self.rewind_state: State | None = copy_state(model) if rewind_step == 0 else None

    @property
    def kept(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def kept_units(self) -> int:
        return sum(int(self.pruning.units(mask).sum()) for mask in self.masks.values())

    def hold(self) -> None:
        """Zero pruned weights and their gradients, in one pass."""
        with_grad = {name: w for name, w in self.weights.items() if w.grad is not None}
        without = [name for name in self.weights if name not in with_grad]
        with torch.no_grad():
            if with_grad:
                masks = [self.masks[name] for name in with_grad]
                ops.hold_ticket_(list(with_grad.values()), [w.grad for w in with_grad.values()], masks)
            if without:
                ops.hold_ticket_([self.weights[n] for n in without], [], [self.masks[n] for n in without])

    def stepped(self) -> None:
        """Count an optimizer step; in round 0 keep the state at `rewind_step`."""
        self.steps += 1
        if self.round == 0 and self.steps == self.rewind_step:
            self.rewind_state = copy_state(self.model)

    def prune(self, keep: int) -> None:
        """Prune to `keep` units by the magnitudes the model has now; call it on the last epoch's."""
        self.masks = prune(self.weights, self.masks, keep, self.pruning)
        kept = (w.detach()[self.masks[name]].abs() for name, w in self.weights.items())
        self.threshold = min(float(w.min()) for w in kept if w.numel())

    def rewind(self) -> None:
        """Restore all parameters and buffers to the kept state and apply the masks (step 4)."""
        if self.rewind_state is None:
            raise LotteryError(f"rewind_step {self.rewind_step} was never reached: round 0 took {self.steps} steps")
        self.model.load_state_dict(self.rewind_state)
        self.model.zero_grad(set_to_none=True)
        self.hold()
        for name, weight in self.weights.items():  # I3
            if not torch.equal(weight.detach(), self.rewind_state[name].masked_fill(~self.masks[name], 0)):
                raise LotteryError(f"{name}: the rewound weights are not theta_k * mask")
        self.steps, self.start_sha256 = 0, sha256(self.model.state_dict())

    def check(self) -> None:
        """Raise LotteryError unless every pruned weight is exactly 0 (I4)."""
        for name, weight in self.weights.items():
            if (weight.detach()[~self.masks[name]] != 0).any():
                raise LotteryError(f"{name}: a pruned weight is not 0: the training loop must call hold() every step")


# ---------------------------------------------------------------------------- Algorithm 1


@dataclass
class Found:
    """One finished round. While it is yielded the model holds the weights that were evaluated."""

    ticket: Ticket
    row: dict  # plain numbers, strings and lists: a line of the ledger


def find_ticket(
    model: nn.Module,
    train: Callable[[Ticket], State | None],
    evaluate: Callable[[nn.Module], dict],
    *,
    sparsity: float,
    prune_rate: float = 0.2,
    rewind_step: int = 0,
    pruning: Pruning = BY_MAGNITUDE,
    resume: Callable[[Ticket], str] | None = None,
) -> Iterator[Found]:
    """Iterative magnitude pruning with rewinding, Algorithm 1. Yields a Found a round, the dense round 0 first.

    train(ticket): trains ticket.model in place, with a fresh optimizer, schedule and data order, calling ticket.hold()
        and ticket.stepped() as Ticket says. It leaves the last epoch's weights, which are what is pruned, and
        returns the state to evaluate (that of the best epoch on validation data, say) or None for the last.
    evaluate(model): what to add to the round's row. It is called once a round.
    resume(ticket): goes on in the middle of a round: sets ticket.round, masks, threshold, start_sha256, steps and
        rewind_state and the model's weights to what they were, and returns the hash of the masks of the round before.
    """
    ticket = Ticket(model, rewind_step, pruning)
    counts = kept_counts(ticket.kept_units, sparsity, prune_rate)
    check_least(ticket, counts[-1])
    parent = sha256(ticket.masks)
    if resume:
        parent = resume(ticket)
    for index, keep in list(enumerate(counts))[ticket.round :]:
        if index != ticket.round:
            ticket.round = index
            ticket.prune(keep)
            ticket.rewind()
        trained = train(ticket)
        last, row = finish(ticket, trained)
        yield Found(ticket, {**row, "parent_sha256": parent, **evaluate(model)})
        parent = row["mask_sha256"]
        model.load_state_dict(last)


def check_least(ticket: Ticket, keep: int) -> None:
    """Raise LotteryError if what each layer keeps at least is more than `keep` units."""
    pruning, units = ticket.pruning, [ticket.pruning.units(mask) for mask in ticket.masks.values()]
    least = sum(map(pruning.least, units))
    if least > keep:
        raise LotteryError(f"min_remaining {pruning.min_remaining} keeps {least} of the prunable, more than {keep}")


def finish(ticket: Ticket, trained: State | None) -> tuple[State, dict]:
    """After a round's training: the last epoch's state, and what the round's row says of weights and masks.

    The model is left with the state to evaluate, `trained` or the last.
    """
    ticket.check()
    if ticket.rewind_state is None:
        raise LotteryError(f"rewind_step {ticket.rewind_step} was never reached: round 0 took {ticket.steps} steps")
    model, kept, total = ticket.model, ticket.kept, sum(mask.numel() for mask in ticket.masks.values())
    rest = sum(p.numel() for p in model.parameters()) - total  # never pruned: biases, norms, embeddings
    last = copy_state(model)
    if trained is not None:
        model.load_state_dict(trained)
        ticket.check()
    row = {
        "round": ticket.round,
        "remaining": kept / total,
        "remaining_all": (kept + rest) / (total + rest),
        "kept": kept,
        "total": total,
        "kept_per_layer": {name: int(mask.sum()) for name, mask in ticket.masks.items()},
        "mask_sha256": sha256(ticket.masks),
        "rewind_sha256": sha256(ticket.rewind_state),
        "start_sha256": ticket.start_sha256,
        "last_sha256": sha256(last),
        "trained_sha256": sha256(model.state_dict()),
        "threshold": ticket.threshold,
    }
    if ticket.pruning.block != (1, 1):
        row["kept_blocks"] = ticket.kept_units
        row["total_blocks"] = sum(ticket.pruning.units(mask).numel() for mask in ticket.masks.values())
    return last, row


# ---------------------------------------------------------------------------- verdict


class Verdict(NamedTuple):
    word: str  # winning, matching, worse or undecided
    low: float  # 95 % interval of error rate (ticket) - error rate (dense)
    high: float

    def __str__(self) -> str:
        return f"{self.word} [{self.low:+.3f}, {self.high:+.3f}]"


def verdict(ticket_errors, dense_errors, words, margin: float = 0.01, resamples: int = 10_000) -> Verdict:
    """Paired bootstrap over utterances of the difference in error rate, ticket - dense.

    ticket_errors, dense_errors: (utterances,) or (seeds, utterances) integers; seeds are pooled.  words: (utterances,)
    reference words.  Errors and words of an utterance are resampled together (Bisani & Ney 2004). The words, in this
    order: winning if the 95 % interval lies below 0, matching if its upper end is <= margin, worse if it lies above
    0, else undecided.
    """
    ticket_errors, dense_errors = np.atleast_2d(ticket_errors), np.atleast_2d(dense_errors)
    words = np.asarray(words)
    if ticket_errors.shape != dense_errors.shape or ticket_errors.shape[1:] != words.shape:
        raise LotteryError(
            f"a paired test needs the same utterances: {ticket_errors.shape} ticket, {dense_errors.shape} dense errors "
            f"(seeds, utterances), {words.shape} words"
        )
    difference = (ticket_errors - dense_errors).mean(0)  # per utterance, mean over seeds
    rng, rates = np.random.default_rng(0), np.empty(resamples)
    for i in range(resamples):
        picks = rng.integers(0, len(words), len(words))
        rates[i] = difference[picks].sum() / words[picks].sum()
    low, high = np.percentile(rates, [2.5, 97.5])
    if high < 0:
        word = "winning"
    elif high <= margin:
        word = "matching"
    elif low > 0:
        word = "worse"
    else:
        word = "undecided"
    return Verdict(word, float(low), float(high))


# ---------------------------------------------------------------------------- files
#
# Every file of tensors is a safetensors file with one metadata entry, "about": a SHA-256 of the whole file, its own
# digits taken as zeros, and JSON. Nothing is parsed before the hash holds, so damage has one outcome: LotteryError.

FORMAT = "audio-lottery 1"
SEAL = b'"about":"sha256:'


def write_atomically(path: Path, content: bytes, suffix: str = ".tmp") -> None:
    """Write to a temporary file, fsync, rename, fsync the folder: the file is whole, old or new, at any instant.

    suffix: of the temporary file; processes that may write one file at once need one each.
    """
    temporary = path.with_name(path.name + suffix)
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _digest(content: bytes, at: int) -> str:
    """SHA-256 of content with the 64 digits at `at` as zeros."""
    digest = hashlib.sha256(memoryview(content)[:at])
    digest.update(b"0" * 64)
    digest.update(memoryview(content)[at + 64 :])
    return digest.hexdigest()


def write_sealed(path: Path, kind: str, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and JSON to one file, whole or not at all."""
    metadata = {"about": f"sha256:{'0' * 64} " + json.dumps({"format": FORMAT, "kind": kind, **about})}
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(ready, metadata)
    at = content.index(SEAL) + len(SEAL)
    digest = _digest(content, at).encode()
    write_atomically(path, content[:at] + digest + content[at + 64 :])


def read_sealed(path: Path, kind: str) -> tuple[dict[str, Tensor], dict]:
    """Returns tensors and JSON. Raises LotteryError, naming the file, unless it is whole, and of this kind."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LotteryError(f"{path}: cannot read the {kind} ({error.strerror})") from None
    try:
        at = content.index(SEAL) + len(SEAL)
        if content[at : at + 64] != _digest(content, at).encode():
            raise ValueError("its content does not have the hash it states")
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        about = json.loads(header["__metadata__"]["about"][len("sha256:") + 65 :])
        if (about["format"], about["kind"]) != (FORMAT, kind):
            raise ValueError(f"it is a {about['kind']} of format {about['format']!r}, not a {kind} of {FORMAT!r}")
        return safetensors.torch.load(content), about
    except Exception as error:  # whatever damage makes the readers above raise
        raise LotteryError(f"{path}: not a whole {kind}: {error}") from None


def pack(mask: Tensor) -> Tensor:
    """A mask as bits, (ceil(n / 8),) uint8, the lowest bit first."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))


def unpack(bits: Tensor, shape: list[int]) -> Tensor:
    """Raises ValueError unless `bits` are as many as the shape needs, the unused ones 0."""
    mask = torch.from_numpy(np.unpackbits(bits.numpy(), bitorder="little").astype(bool))
    n = math.prod(shape)
    if bits.dim() != 1 or len(bits) != (n + 7) // 8 or mask[n:].any():
        raise ValueError(f"{len(bits)} bytes of mask for the shape {shape}")
    return mask[:n].view(shape)


def save_masks(path: Path, masks: Masks) -> None:
    """Write masks alone, as bits."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    write_sealed(path, "masks", {name: pack(mask) for name, mask in masks.items()}, {"shapes": shapes})


def load_masks(path: Path) -> Masks:
    tensors, about = read_sealed(path, "masks")
    return _unpacked(path, tensors, about["shapes"])


def _unpacked(path: Path, tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> Masks:
    try:
        return {name: unpack(tensors[name], shape) for name, shape in shapes.items()}
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise LotteryError(f"{path}: masks and shapes do not fit: {error}") from None


class TicketFile(NamedTuple):
    masks: Masks
    rewind: State | None  # full tensors, 0 where pruned; None in a ticket without it
    trained: State
    info: dict


def save_ticket(path: Path, masks: Masks, rewind: State | None, trained: State, info: dict) -> None:
    """Write a ticket: masks as bits, rewind and trained values at kept places only, all else (biases, norms) whole.

    rewind: None leaves it out.  info: whatever rebuilds the model (JSON), kept in the file's metadata.
    """
    tensors = {f"mask/{name}": pack(mask) for name, mask in masks.items()}
    for part, state in (("rewind", rewind or {}), ("trained", trained)):
        for name, value in state.items():
            tensors[f"{part}/{name}"] = value[masks[name]] if name in masks else value
    about = {
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "mask_sha256": {name: sha256({name: mask}) for name, mask in masks.items()},
        "info": info,
    }
    write_sealed(path, "ticket", tensors, about)


def load_ticket(path: Path, model: nn.Module | None = None) -> TicketFile:
    """Read and check a ticket: its hash, its masks' hashes and shapes, and, given a model, the model's scope.

    A parameter with two names is masked under its first alone: hold the ticket after loading a state into such a model.
    Raises LotteryError, naming the file, for anything that is not a whole ticket (for this model).
    """
    tensors, about = read_sealed(path, "ticket")
    try:
        file = _ticket_of(path, tensors, about)
    except LotteryError:
        raise
    except Exception as error:  # metadata that a seal was put on again
        raise LotteryError(f"{path}: not a whole ticket: {type(error).__name__}: {error}") from None
    if model is not None:
        check_fit(path, file, model)
    return file


def check_fit(path: Path, file: TicketFile, model: nn.Module) -> None:
    """Raise LotteryError, naming the file, unless the ticket is of this model's scope and has this model's state."""
    shapes = {name: tuple(w.shape) for name, w in prunable(model).items()}
    if shapes != {name: tuple(mask.shape) for name, mask in file.masks.items()}:
        raise LotteryError(f"{path}: the ticket's masks are not of this model's prunable weights")
    expected = {name: (value.shape, value.dtype) for name, value in model.state_dict().items()}
    for state in filter(None, (file.trained, file.rewind)):
        if expected != {name: (value.shape, value.dtype) for name, value in state.items()}:
            raise LotteryError(f"{path}: the ticket's parameters are not this model's")


def _ticket_of(path: Path, tensors: dict[str, Tensor], about: dict) -> TicketFile:
    masks = _unpacked(path, {n[5:]: t for n, t in tensors.items() if n.startswith("mask/")}, about["shapes"])
    if about["mask_sha256"] != {name: sha256({name: mask}) for name, mask in masks.items()}:
        raise LotteryError(f"{path}: a mask does not have the hash the ticket states")
    states: dict[str, State] = {"rewind": {}, "trained": {}}
    for key, value in tensors.items():
        part, name = key.split("/", 1)
        if part not in states:
            continue
        if name in masks:
            kept = int(masks[name].sum())
            if value.shape != (kept,):
                raise LotteryError(f"{path}: {key} has {tuple(value.shape)} values for {kept} kept places")
            value = torch.zeros(masks[name].shape, dtype=value.dtype).masked_scatter_(masks[name], value)
        states[part][name] = value
    return TicketFile(masks, states["rewind"] or None, states["trained"], about["info"])


# ---------------------------------------------------------------------------- the ledger
#
# One JSON object a line, a line a round. "previous" is the hash of the line before (in the first line of the
# configuration): the chain. It leaves out "seconds", "waited" (of them, for data), "resumed" and "timing_sha256", so
# that an interrupted run has the chain of an uninterrupted one; "timing_sha256" covers those.

TIMING = ("seconds", "waited", "resumed", "timing_sha256")


def hash_json(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def row_hash(row: dict) -> str:
    return hash_json({key: value for key, value in row.items() if key not in TIMING})


def timing_hash(row: dict) -> str:
    return hash_json([row_hash(row), *(row.get(key) for key in TIMING[:-1])])


def ledger_line(row: dict) -> bytes:
    return (json.dumps(row) + "\n").encode()


def read_ledger(path: Path) -> list[dict]:
    """The whole lines of a ledger; a last line without its newline was being written and does not count.

    Raises LotteryError, naming file and line, for a line that is no row.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LotteryError(f"{path}: cannot read the ledger ({error.strerror})") from None
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            rows.append(dict(json.loads(line.decode())))
        except (ValueError, TypeError, RecursionError):
            raise LotteryError(f"{path}, line {number}: not a row of a ledger") from None
    return rows


def settings_of(config: dict) -> dict:
    """What decides a result: the configuration without the machine it runs on."""
    return {key: value for key, value in config.items() if key != "machine"}


def unit_counts(rows: list[dict], settings: dict) -> list[int]:
    """Weights, or blocks, that each round of a search keeps by its settings; rows: its ledger, round 0 at least."""
    total = rows[0]["total_blocks" if "block" in settings else "total"]
    return kept_counts(total, settings["sparsity"], settings["prune_rate"])


def rounds_of(rows: list[dict], settings: dict) -> list[int]:
    """The rounds that a finished run has: its settings' "rounds" if masks are given, else as many as pruning takes."""
    return settings["rounds"] if "rounds" in settings else list(range(len(unit_counts(rows, settings))))


def check_chain(rows: list[dict], settings: dict) -> None:
    """Raise LotteryError unless the rows are the settings' rounds, in one chain from them on, with exact counts."""
    try:
        previous, rounds = hash_json(settings), rounds_of(rows, settings) if rows else []
        for number, row in enumerate(rows):
            if [row["round"]] != rounds[number : number + 1]:
                raise LotteryError(f"line {number + 1} is round {row['round']}")
            if row["previous"] != previous:
                before = f"round {rows[number - 1]['round']}" if number else "the configuration"
                raise LotteryError(f"round {row['round']} does not follow {before}")
            if row["timing_sha256"] != timing_hash(row):
                raise LotteryError(f"round {row['round']} does not have the hash it states")
            previous = row_hash(row)
        if rows and "rounds" not in settings:
            kept = [row["kept_blocks" if "block" in settings else "kept"] for row in rows]
            counts = unit_counts(rows, settings)[: len(rows)]
            if kept != counts:
                raise LotteryError(f"kept counts are {kept}, not {counts}")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        if isinstance(error, LotteryError):
            raise
        raise LotteryError(f"a value is missing or of the wrong kind ({type(error).__name__}: {error})") from None


def append_row(path: Path | None, rows: list[dict], row: dict, config: dict) -> None:
    """Chain a row to `rows` and to the ledger on the disk (path None: another process writes that).

    A round that is there already (an interrupted run came back to it) must be the same and is not written again.
    """
    at = sum(earlier["round"] < row["round"] for earlier in rows)
    row = {**row, "previous": row_hash(rows[at - 1]) if at else hash_json(config)}
    row["timing_sha256"] = timing_hash(row)
    if at < len(rows):
        for key in ("mask_sha256", "last_sha256", "trained_sha256"):
            if rows[at][key] != row[key]:
                raise LotteryError(f"{path}: round {row['round']} came out with another {key} than the ledger says")
        return
    if path:
        whole = path.read_bytes().rfind(b"\n") + 1  # behind it: a line that was being written
        with open(path, "r+b") as file:
            file.truncate(whole)
            file.seek(whole)
            file.write(ledger_line(row))
            file.flush()
            os.fsync(file.fileno())
    rows.append(row)


# ---------------------------------------------------------------------------- verify


def verify(run: Path) -> list[tuple[str, str]]:
    """Check a finished run from its files alone. Returns (check, "" or what is wrong) in order.

    Files: config.json, ledger.jsonl, rewind.safetensors (theta_k), masks/ROUND.safetensors, ticket.safetensors. They
    hold no secret: who writes new counts with new hashes is found out by training a round again, not by this.
    """
    found: dict = {"run": run}
    checks = []
    for name, function in (
        ("the ledger is one chain from the configuration on, with exact counts", _verify_chain),
        ("rates, verdicts and shares follow from the counts beside them", _verify_rows),
        ("masks are nested and exact, and every round starts at theta_k * mask", _verify_masks),
        ("the ticket is the last round's, and its pruned weights are exactly 0", _verify_ticket),
    ):
        try:
            function(found)
            checks.append((name, ""))
        except (LotteryError, OSError) as error:
            checks.append((name, str(error)))
        except Exception as error:  # whatever a tampered file makes the check trip over
            checks.append((name, f"a value is missing or of the wrong kind ({type(error).__name__}: {error})"))
    return checks


def _expect(right: bool, what: str) -> None:
    if not right:
        raise LotteryError(what)


def _verify_chain(found: dict) -> None:
    run = found["run"]
    found["settings"] = settings_of(json.loads((run / "config.json").read_text(encoding="utf-8")))
    rows = found["rows"] = read_ledger(run / "ledger.jsonl")
    written = (run / "ledger.jsonl").read_bytes()
    _expect(written == b"".join(map(ledger_line, rows)), "it is not as this program writes it")
    check_chain(rows, found["settings"])
    rounds = len(rounds_of(rows, found["settings"]))
    _expect(len(rows) == rounds, f"it has {len(rows)} rounds of {rounds}: the run is not finished")


def _verify_rows(found: dict) -> None:
    settings, dense = found["settings"], found["rows"][0]
    for row in found["rows"]:
        where = f"round {row['round']}: "
        _expect(row["total"] == dense["total"], where + "another total than round 0's")
        _expect(row["remaining"] == row["kept"] / row["total"], where + "remaining is not kept / total")
        for key in ("seed", "data_sha256"):
            _expect(row[key] == settings[key], where + f"{key} is not the configuration's")
        if row is dense and "dense" in settings:  # of another run, where its settings were the line before
            row_there = row_hash({**row, "previous": row["config_sha256"]})
            _expect(row_there == settings["dense"], where + "it is not the row that the configuration names")
        else:
            _expect(row["config_sha256"] == hash_json(settings), where + "config_sha256 is not the configuration's")
        others, dense_others = row.get("other_tests", {}), dense.get("other_tests", {})
        _expect(list(others) == list(dense_others), where + "other test sets than round 0's")
        for test, dense_test in zip([row, *others.values()], [dense, *dense_others.values()]):
            errors, words = test["test_errors"], test["test_words"]
            _expect(words == dense_test["test_words"], where + "other test utterances than round 0's")
            _expect(test["test_wer"] == sum(errors) / sum(words), where + "test_wer is not test_errors / test_words")
            if row["round"]:
                right = verdict(errors, dense_test["test_errors"], words, settings["margin"])
                stated = Verdict(test["verdict"], *test["interval"])
                _expect(stated == right, where + f"the verdict is {right}, not {stated}")


def _verify_masks(found: dict) -> None:
    if "rounds" in found["settings"]:  # given, not pruned: a start of its own each round, which the ticket has
        for row in found["rows"]:
            where, masks = f"round {row['round']}: ", None
            if row["round"] and found["settings"].get("control") != "dense-small":
                masks = load_masks(found["run"] / "masks" / f"{row['round']:02d}.safetensors")
                counts = {name: int(mask.sum()) for name, mask in masks.items()}
                _expect(counts == row["kept_per_layer"], where + "other counts than the ledger's")
                _expect(sha256(masks) == row["mask_sha256"], where + "other masks than the ledger's")
                _verify_blocks(masks, row, found["settings"])
            _expect(sum(row["kept_per_layer"].values()) == row["kept"], where + "the layers' counts do not add up")
        return
    run, theta = found["run"], read_sealed(found["run"] / "rewind.safetensors", "rewind state")[0]
    names = found["rows"][0]["kept_per_layer"]
    parent = {name: torch.ones_like(theta[name], dtype=torch.bool) for name in names}
    for row in found["rows"]:
        where = f"round {row['round']}: "
        masks = parent if row["round"] == 0 else load_masks(run / "masks" / f"{row['round']:02d}.safetensors")
        shapes = {name: mask.shape for name, mask in masks.items()}
        _expect(shapes == {name: theta[name].shape for name in names}, where + "masks of other weights")
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        _expect(counts == row["kept_per_layer"], where + "other counts than the ledger's")
        _expect(sum(counts.values()) == row["kept"], where + "the layers' counts do not add up")
        _verify_blocks(masks, row, found["settings"])
        grown = any((masks[name] & ~parent[name]).any() for name in names)
        _expect(not grown, where + "keeps a weight that was pruned before")
        hashes = sha256(masks), sha256(parent)
        _expect(hashes == (row["mask_sha256"], row["parent_sha256"]), where + "other hashes than the ledger's")
        _expect(sha256(theta) == row["rewind_sha256"], where + "rewind.safetensors is not its rewind state")
        start = {n: v.masked_fill(~masks[n], 0) if n in masks else v for n, v in theta.items()}
        if row["round"] or found["settings"]["rewind_step"] == 0:  # else round 0 started before theta_k
            _expect(sha256(start) == row["start_sha256"], where + "does not start at theta_k * mask")
        parent = masks


def _verify_blocks(masks: Masks, row: dict, settings: dict) -> None:
    where, pruning = f"round {row['round']}: ", Pruning(tuple(settings.get("block", (1, 1))))
    _expect(sum(mask.numel() for mask in masks.values()) == row["total"], where + "total is not the masks'")
    units = {name: pruning.units(mask) for name, mask in masks.items()}
    whole = {name: pruning.weights(unit, masks[name]) for name, unit in units.items()}
    _expect(sha256(whole) == sha256(masks), where + "a block is kept in part")
    if "block" in settings:
        counts = [sum(int(unit.sum()) for unit in units.values()), sum(unit.numel() for unit in units.values())]
        stated = [row["kept_blocks"], row["total_blocks"]]
        _expect(stated == counts, where + f"its masks keep {counts[0]} of {counts[1]} blocks, not {stated}")


def _verify_ticket(found: dict) -> None:
    file, row = load_ticket(found["run"] / "ticket.safetensors"), found["rows"][-1]
    _expect(sha256(file.masks) == row["mask_sha256"], "its masks are not the last round's")
    tested = sha256(file.trained) == row["trained_sha256"]
    _expect(tested, "its weights are not those that were tested in the last round")
    zero = not any((file.trained[name][~mask] != 0).any() for name, mask in file.masks.items())
    _expect(zero, "a pruned weight is not 0")
    if file.rewind is not None:  # round 0 starts before theta_k, if k is not 0
        start = row["start_sha256" if row["round"] or not found["settings"]["rewind_step"] else "rewind_sha256"]
        _expect(sha256(file.rewind) == start, "its rewind state is not what its round started from")
    _expect(hash_json(file.info) == row["info_sha256"], "its info (tokens, sizes, features) is not the last round's")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="lottery.py", description="Check runs, copy and weigh tickets.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="print a line a check; exit code 0 if all hold, 1 if not")
    command.add_argument("run", type=Path, help="run folder")
    command.add_argument("--retrain", type=int, metavar="R", help="train round R again and compare bit for bit")
    command = commands.add_parser("copy", help="copy a ticket, checked on the way")
    command.add_argument("ticket", type=Path)
    command.add_argument("new", type=Path)
    command.add_argument("--without-rewind", action="store_true", help="leave the rewind state out: half the size")
    command = commands.add_parser("size", help="bytes by part beside the dense checkpoint, what remains, multiply-adds")
    command.add_argument("ticket", type=Path)
    args = parser.parse_args(argv)
    if args.command == "size":
        import size  # it knows the recognisers, whose products it counts; nothing above does

        try:
            print(size.report(args.ticket))
        except (LotteryError, OSError) as error:
            print(f"lottery.py: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0
    if args.command == "copy":
        try:
            file = load_ticket(args.ticket)
            save_ticket(args.new, file.masks, None if args.without_rewind else file.rewind, file.trained, file.info)
        except (LotteryError, OSError) as error:
            print(f"lottery.py: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0
    if not args.run.is_dir():
        print(f"lottery.py: error: {args.run}: no such run folder", file=sys.stderr)
        return 2
    failed = 0
    for name, wrong in verify(args.run):
        print(f"{'FAILED' if wrong else 'ok':6}  {name}{f': {wrong}' if wrong else ''}", flush=True)
        failed += bool(wrong)
    if args.retrain is not None and not failed:
        train = Path(__file__).resolve().parent / "train.py"
        failed = subprocess.run([sys.executable, str(train), "--retrain", str(args.run), str(args.retrain)]).returncode
    return int(failed != 0)


if __name__ == "__main__":
    sys.modules["lottery"] = sys.modules[__name__]  # size.py imports it: not a second time
    sys.exit(main())
