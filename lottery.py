"""Lottery tickets for any nn.Module: masks, magnitude pruning, rewinding, rounds, verdicts.

Algorithm 1 of "Audio Lottery" (Ding, Chen, Wang; ICLR 2022), whole, with the reference of each of its operators. Knows
nothing of speech and imports nothing of ours but the compiled operators. In short:

    for found in find_ticket(model, train, evaluate, sparsity=0.9):
        print(found.row)                 # one dict a round: counts, hashes and what `evaluate` measured

Words: `sparsity` is the fraction of prunable weights removed, `remaining` is 1 - sparsity, a mask is bool and True
where a weight is kept, round 0 is dense. The invariants that are asserted as it runs:

    I1  masks are nested                            I4  a pruned weight is exactly 0 after every epoch
    I2  kept counts are exact, ties included        I5  a NaN or infinite weight is refused by name
    I3  a rewound weight is theta_k * mask, bit for bit

What leans on it: audio_lottery/ (files, the ledger, sparse inference).
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Masks = dict[str, Tensor]  # parameter name -> bool, the parameter's shape, True = kept
State = dict[str, Tensor]  # a state_dict: parameters and buffers


class LotteryError(ValueError):
    """A request that cannot be met, or an invariant that does not hold; the message names the thing and the rule."""


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


# ---------------------------------------------------------------------------- operators
#
# Each as a reference in PyTorch; csrc/ has the same compiled. Lists are of one tensor a weight, all of one device.


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
    compiled: bool
    path: str  # which path this is, for the line at start-up


def choose_ops() -> Ops:
    """The operators of csrc/ where they are built, the reference elsewhere: the one place that chooses."""
    try:
        import _lottery  # registers torch.ops.audio_lottery
    except ImportError as error:
        reference = reference_hold_ticket_, reference_global_magnitude_masks, reference_block_norms
        return Ops(*reference, False, f"pure PyTorch ({error})")
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
        True,
        f"compiled C++ ({facts['instructions']}, {'OpenMP' if facts['openmp'] else 'one thread'})"
        + (f" and CUDA ({facts['cuda']})" if facts["cuda"] else ""),
    )


ops = choose_ops()


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
        matrix = mask.flatten(1)
        rows, columns = (min(n, size) for n, size in zip(self.block, matrix.shape))
        whole = units.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        return whole[: matrix.shape[0], : matrix.shape[1]].reshape(mask.shape)

    def least(self, units: Tensor) -> int:
        """Units that a layer keeps at least."""
        share = math.ceil(round(self.min_remaining * units.numel(), 6))  # 0.07 * 100 is 7, not 7.000000000000001
        return max(share, 1) if self.min_remaining else 0


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
        raise LotteryError(
            f"min_remaining {pruning.min_remaining} keeps {least} of the prunable, more than {keep}, all that the "
            "sparsity leaves"
        )


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

VERDICT_RULE = 2  # which rule a ledger's verdicts follow; rows of the first one do not name it
NOTHING = 0.95  # error rate from which on the dense network is said to recognise nothing


class Verdict(NamedTuple):
    word: str  # winning, matching, worse, undecided, or "no verdict" where dense recognises nothing
    low: float  # 95 % interval of error rate (ticket) - error rate (dense)
    high: float

    def __str__(self) -> str:
        why = f" (dense recognises nothing: error rate {NOTHING} or more)" if self.word == "no verdict" else ""
        return f"{self.word}{why} [{self.low:+.3f}, {self.high:+.3f}]"


def verdict(
    ticket_errors, dense_errors, words, margin: float = 0.01, resamples: int = 10_000, nothing: float = NOTHING
) -> Verdict:
    """The 95 % interval of the difference in error rate, ticket - dense, and its word.

    ticket_errors, dense_errors: (utterances,) or (seeds, utterances) integers.  words: (utterances,) reference words.
    One seed: paired bootstrap over utterances, errors and words of each drawn together (Bisani & Ney 2004); the
    interval is of that seed. More: seeds crossed with utterances, see `crossed`. The words, in this order: no verdict
    if dense's error rate is `nothing` or more, winning if the interval lies below 0, matching if its upper end is
    <= margin, worse if it lies above 0, else undecided.
    """
    ticket_errors, dense_errors = np.atleast_2d(ticket_errors), np.atleast_2d(dense_errors)
    words = np.asarray(words)
    if ticket_errors.shape != dense_errors.shape or ticket_errors.shape[1:] != words.shape:
        raise LotteryError(
            f"a paired test needs the same utterances: {ticket_errors.shape} ticket, {dense_errors.shape} dense errors "
            f"(seeds, utterances), {words.shape} words"
        )
    if words.sum() <= 0:
        raise LotteryError(f"a paired test needs reference words: {len(words)} utterances have none")
    difference = ticket_errors - dense_errors
    if len(difference) == 1:
        rng, shares, rates = np.random.default_rng(0), np.full(len(words), 1 / len(words)), []
        for start in range(0, resamples, 1000):  # the draws of one multinomial, a part in memory at a time
            counts = rng.multinomial(len(words), shares, size=min(1000, resamples - start))
            counts = counts[counts @ words > 0]  # utterances without words may be all that is drawn
            rates.append((counts @ difference[0]) / (counts @ words))
        low, high = np.percentile(np.concatenate(rates), [2.5, 97.5])
    else:
        rate, variance, freedom = crossed(difference, words)
        half = student_t(float(freedom)) * math.sqrt(variance)
        low, high = rate - half, rate + half
    if dense_errors.mean(0).sum() >= nothing * words.sum():
        word = "no verdict"
    elif high < 0:
        word = "winning"
    elif high <= margin:
        word = "matching"
    else:
        word = "worse" if low > 0 else "undecided"
    return Verdict(word, float(low), float(high))


def crossed(difference, words) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The difference in error rate, its variance and that one's degrees of freedom; seeds crossed with utterances.

    difference: (..., seeds, utterances) errors, ticket - dense, two seeds or more.  words: (..., utterances).
    Two-way clustering (Cameron, Gelbach & Miller 2011; Owen 2007): V_seeds + V_utterances - V_interaction, in which
    the seeds' own part, V_seeds - V_interaction, counts as 0 where it comes out below. Degrees of freedom:
    Satterthwaite's, and at least those of the fewer, seeds or utterances. Coverage: python -m lab.coverage.
    """
    rate, *parts = components(difference, words)
    variance = parts[1] + np.maximum(parts[0] - parts[2], 0)
    seeds, utterances = (n - 1 for n in np.shape(difference)[-2:])
    spread = sum(part**2 / n for part, n in zip(parts, (seeds, utterances, seeds * utterances)))
    return rate, variance, np.maximum(min(seeds, utterances), variance**2 / np.where(spread > 0, spread, np.inf))


def components(difference, words) -> tuple[np.ndarray, ...]:
    """The difference in error rate, V_seeds, V_utterances, V_interaction: variances of it, each unbiased.

    Shapes as in `crossed`. Raises LotteryError for fewer than two seeds or utterances.
    """
    difference, words = np.asarray(difference, float), np.asarray(words, float)
    seeds, utterances = difference.shape[-2:]
    if min(seeds, utterances) < 2:
        raise LotteryError(f"crossed variances need two seeds and two utterances, got {seeds} and {utterances}")
    total = words.sum(-1)[..., None]
    by_seed = difference.sum(-1) / total  # (..., seeds)
    rate = by_seed.mean(-1)
    left = difference - rate[..., None, None] * words[..., None, :]  # errors beyond the rate's
    by_utterance = left.mean(-2)
    both = left - by_utterance[..., None, :] - (by_seed - rate[..., None])[..., None] * words[..., None, :]
    few = utterances / (utterances - 1) / total[..., 0] ** 2
    of_seeds = ((by_seed - rate[..., None]) ** 2).sum(-1) / (seeds * (seeds - 1))
    of_both = (both**2).sum((-1, -2)) * few / (seeds * (seeds - 1))
    return rate, of_seeds, (by_utterance**2).sum(-1) * few, of_both


def student_t(freedom: float) -> float:
    """The 97.5 % point of Student's t, to four digits, by its angle: t = sqrt(n) tan a has density cos(a)^(n - 1)."""
    angles = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * area[-1], area, angles))
