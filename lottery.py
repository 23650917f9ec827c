"""Lottery tickets for any nn.Module: masks, magnitude pruning, rewinding, rounds.

Algorithm 1 of "Audio Lottery" (Ding, Chen, Wang; ICLR 2022), whole, with the reference of each of its operators. Knows
nothing of speech and imports nothing of ours but the compiled operators. In short:

    for found in find_ticket(model, train, evaluate, sparsity=0.9):
        print(found.row)                 # one dict a round: counts, hashes and what `evaluate` measured

Words: `sparsity` is the fraction of prunable weights removed, `remaining` is 1 - sparsity, a mask is bool and True
where a weight is kept, round 0 is dense. The invariants that are asserted as it runs:

    I1  masks are nested                            I4  hold() comes before every step; a pruned weight is exactly 0
    I2  kept counts are exact, ties included        I5  a NaN or infinite parameter is refused by name
    I3  a rewound weight is theta_k * mask, bit for bit
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Masks = dict[str, Tensor]  # parameter name -> bool, the parameter's shape, True = kept
State = dict[str, Tensor]  # parameters and buffers, by their names in a state_dict


class LotteryError(ValueError):
    """A request that cannot be met, or an invariant that does not hold; the message names the thing and the rule."""


# ---------------------------------------------------------------------------- scope: what is pruned

PRUNED_LAYERS = (nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Linear, nn.Bilinear, nn.MultiheadAttention)


class Scoped(NamedTuple):
    name: str
    shape: tuple[int, ...]
    status: str  # "pruned", or why not


def scope(model: nn.Module, exclude: Sequence[str] = ()) -> list[Scoped]:
    """Every parameter of the model, in order, with its shape and "pruned" or why not.

    Pruned is every weight of two or more dimensions in convolution, recurrent, attention and linear layers. A weight
    shared between layers is judged by all of them and listed once.
    exclude: names of weights or layers, or patterns of them ("encoder.*"), that are not pruned.  Raises LotteryError
    for one that matches no weight that would be pruned, and for a lazy layer.
    """
    found: dict[int, tuple[Tensor, list[str], list[str]]] = {}  # each parameter, its names, reasons not to prune it
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False):
            _, names, reasons = found.setdefault(id(parameter), (parameter, [], []))
            names.append(f"{prefix}.{name}" if prefix else name)
            if nn.parameter.is_lazy(parameter):
                raise LotteryError(f"{names[0]} has no shape yet: run the model once, so that its lazy layers are made")
            reasons.append(why_not(module, name, parameter))
    rows, unused = [], set(exclude := (exclude,) if isinstance(exclude, str) else tuple(exclude))
    for parameter, names, reasons in found.values():
        reason = next(filter(None, reasons), "")
        for pattern in () if reason else exclude:
            if any(fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*") for name in names):
                unused.discard(pattern)
                reason = reason or f"excluded by {pattern!r}"
        rows.append(Scoped(names[0], tuple(parameter.shape), reason or "pruned"))
    if unused:
        raise LotteryError(f"exclude {min(unused)!r} matches no weight that would be pruned (see lottery.scope)")
    return rows


def why_not(module: nn.Module, name: str, parameter: Tensor) -> str:
    """Why this module's parameter is not pruned; "" if it is."""
    reparametrised = isinstance(module, nn.utils.parametrize.ParametrizationList)
    if not isinstance(module, PRUNED_LAYERS) and not reparametrised:
        return f"in {type(module).__name__}, no convolution, recurrent, attention or linear layer of torch's"
    computed = vars(module).get(name.rpartition("_")[0])  # weight, of weight_g and weight_v, or of weight_orig
    if reparametrised or isinstance(computed, Tensor):
        return "reparametrised: the layer computes its weight from this, and a 0 here need be none there"
    return "a bias" if "bias" in name else f"{parameter.dim()}-D" if parameter.dim() < 2 else ""


def prunable(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, Tensor]:
    """The pruned parameters by name, in order. Raises LotteryError if there are none, and as scope does."""
    parameters, rows = dict(model.named_parameters()), scope(model, exclude)
    found = {row.name: parameters[row.name] for row in rows if row.status == "pruned"}
    if not found:
        why = next((f": {row.name} is {row.status}" for row in rows if len(row.shape) >= 2), "")
        raise LotteryError(f"the model has no weight to prune (see lottery.scope){why}")
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
        raise LotteryError(f"prune_rate {prune_rate} takes {rounds:.10g} rounds to sparsity {sparsity} (1,000 at most)")


def kept_counts(total: int, sparsity: float, prune_rate: float = 0.2) -> list[int]:
    """Kept counts of rounds 0, 1, ...; the last is exactly round(total * (1 - sparsity)). Raises LotteryError as
    check_rates does, and if no weight would be kept."""
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
    path: str  # which path this is
    devices: set[str] = set()  # kinds of devices that the compiled operators work on; the reference works on all

    def path_on(self, device: str) -> str:
        """Which path tensors on this device take, for the line at start-up."""
        if not self.compiled or torch.device(device).type in self.devices:
            return self.path
        return f"pure PyTorch on {device}: this build is {self.path}, for {' and '.join(sorted(self.devices))} alone"


def choose_ops() -> Ops:
    """The operators of csrc/ where they are built, the reference elsewhere: the one place that chooses."""
    try:
        import _lottery  # registers torch.ops.audio_lottery

        torch.ops.audio_lottery.rotary_attention.default  # noqa: B018  the newest: an older build has it not
    except (ImportError, AttributeError) as error:
        ours = reference_hold_ticket_, reference_global_magnitude_masks, reference_block_norms
        return Ops(*ours, False, f"pure PyTorch ({error})")
    compiled, facts = torch.ops.audio_lottery, _lottery.build_facts()
    devices = {"cpu", "cuda"} if facts["cuda"] else {"cpu"}

    def on_its_devices(op, reference):  # the reference has those on a GPU in a build without CUDA, and []
        return lambda ws, *rest: (op if ws and {w.device.type for w in ws} <= devices else reference)(ws, *rest)

    return Ops(
        on_its_devices(compiled.hold_ticket_, reference_hold_ticket_),
        on_its_devices(compiled.global_magnitude_masks, reference_global_magnitude_masks),
        on_its_devices(compiled.block_norms, reference_block_norms),
        True,
        f"compiled C++ ({facts['instructions']}, {'OpenMP' if facts['openmp'] else 'one thread'})"
        + (f" and CUDA ({facts['cuda']})" if facts["cuda"] else ""),
        devices,
    )


ops = choose_ops()


# ---------------------------------------------------------------------------- masks and rewinding


def state_of(model: nn.Module) -> State:
    """All parameters and buffers, by every name they have: the tensors of state_dict, and those that it leaves out."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def copy_state(model: nn.Module) -> State:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in state_of(model).items()}


def load_state(model: nn.Module, state: State, whole: bool = False) -> None:
    """Put parameters and buffers back, in place. Unless `whole`, what the model's state_dict leaves out may be missing.

    Raises LotteryError, naming the tensor, for a state of another model.
    """
    own = state_of(model)
    missing = own.keys() - state.keys() and (own if whole else model.state_dict()).keys() - state.keys()
    for name in sorted((state.keys() - own.keys()) | missing):
        raise LotteryError(f"{name} is not in the {'state' if name in missing else 'model'}: made later, or another's")
    with torch.no_grad():
        for name, value in state.items():
            tensor, fits = own[name], value.shape == own[name].shape
            if value.dtype != tensor.dtype or (not fits and isinstance(tensor, nn.Parameter)):
                there, here = (f"{x.dtype} {list(x.shape)}" for x in (value, tensor))
                raise LotteryError(f"{name} is {there} in the state, {here} in the model")
            if not fits:  # a buffer that grows, as in a quantiser's observers
                tensor.set_(torch.empty_like(value, device=tensor.device))
            tensor.copy_(value)


def sha256(tensors: dict[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        copied = tensor.detach().to("cpu", copy=True).contiguous()  # numpy() fixes the size of its storage for good
        digest.update(copied.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_model(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Raise LotteryError, naming the tensor, unless all state can be hashed and put back, and the weights be ranked."""
    own, (first, device) = state_of(model), next((name, weight.device) for name, weight in weights.items())
    places: dict[int, str] = {}
    for name, tensor in own.items():
        if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
            raise LotteryError(f"{name} is quantised, sparse or on the meta device: it cannot be hashed and put back")
        if any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride())):
            raise LotteryError(f"{name} was expanded, and elements that share a place cannot be put back: clone() it")
        other = places.setdefault(tensor.data_ptr(), name)
        if own[other] is not tensor and tensor.numel() and {name, other} & weights.keys():
            raise LotteryError(f"{other} and {name} share their memory: make them one parameter, or clone() one")
    for name in sorted(model.state_dict().keys() - own.keys()):
        raise LotteryError(f"{name} is state, but neither a parameter nor a buffer (extra state, a quantised layer)")
    for name, weight in weights.items():
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise LotteryError(f"{name} must be float32, bfloat16, float16 or float64, got {weight.dtype}")
        if weight.device != device:
            raise LotteryError(f"{first} is on {device}, {name} on {weight.device}: all must be on one device")


SCOPES = ("global", "layer", "lamp")


class Pruning(NamedTuple):
    """How weights are ranked against each other, and in which units they are removed."""

    block: tuple[int, int] = (1, 1)  # rows, columns of a unit, each weight seen as out_features x the rest
    scope: str = "global"  # by magnitude, as in Algorithm 1; "layer": the same share of each; "lamp": Lee et al. 2021
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
        """The mask, of the shape and the strides of `mask`, that keeps these units."""
        if self.block != (1, 1):
            matrix = mask.flatten(1)
            rows, columns = (min(n, size) for n, size in zip(self.block, matrix.shape))
            whole = units.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            units = whole[: matrix.shape[0], : matrix.shape[1]].reshape(mask.shape)
        return units if units.stride() == mask.stride() else torch.empty_like(mask).copy_(units)

    def least(self, units: Tensor) -> int:
        """Units that a layer keeps at least."""
        share = math.ceil(round(self.min_remaining * units.numel(), 6))  # 0.07 * 100 is 7, not 7.000000000000001
        return max(share, 1) if self.min_remaining else 0


BY_MAGNITUDE = Pruning()  # Algorithm 1


def rank_within(scores: Tensor, units: Tensor, scope: str) -> Tensor:
    """Scores of a layer's surviving units that order them as |scores| does, made comparable between layers.

    scores, units: of one shape.  Returns float64 of it, 0 where units is False, the same on every device.
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
            raise LotteryError(f"{name} has a NaN or infinite weight: nothing was pruned (too high a learning rate?)")
    scores, units = [w.detach() for w in weights.values()], [pruning.units(masks[name]) for name in weights]
    if len({score.dtype for score in scores}) > 1:
        scores = [score.double() for score in scores]  # exact
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
    if (found := sum(int(unit.sum()) for unit in kept)) != keep:  # I2
        raise LotteryError(f"pruning kept {found} weights or blocks instead of {keep}")
    new = {name: pruning.weights(unit, masks[name]) for name, unit in zip(weights, kept)}
    for name in new:
        if (new[name] & ~masks[name]).any():  # I1
            raise LotteryError(f"{name}: the new mask keeps a weight that was pruned before (masks must be nested)")
    return new


class Ticket:
    """Masks held in place on a model, and the state it rewinds to.

    A training loop calls hold() once a step, after backward() and before clipping, and stepped() after
    optimizer.step(); in between after_step(), where the optimizer moves weights whose gradient is 0. Parameters stay
    the leaf tensors they were: no hooks and no copies, so that optimizers, state_dict, deepcopy, DDP and cuDNN's flat
    weights see nothing new. Raises LotteryError, by name, for a model that cannot be pruned, hashed and rewound.
    """

    def __init__(
        self, model: nn.Module, rewind_step: int = 0, pruning: Pruning = BY_MAGNITUDE, exclude: Sequence[str] = ()
    ):
        pruning.check()
        if not hasattr(rewind_step, "__index__") or rewind_step < 0:
            raise LotteryError(f"rewind_step must be a whole number of at least 0, got {rewind_step!r}")
        self.model, self.rewind_step, self.steps, self.round = model, rewind_step, 0, 0
        self.pruning, self.exclude, self.held = pruning, exclude, False  # held since the last step
        self.weights = prunable(model, exclude)
        check_model(model, self.weights)
        self.masks: Masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        self.check()
        self.threshold = 0.0  # the smallest magnitude that the last pruning kept
        self.start_sha256 = sha256(state_of(model))  # of all that the round started from
        self.rewind_state: State | None = copy_state(model) if rewind_step == 0 else None

    @property
    def first_step(self) -> int:
        """The step of the recipe at which this round starts: rewind_step, but 0 in round 0 (Frankle et al. 2020)."""
        return self.rewind_step if self.round else 0

    @property
    def kept(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

    @property
    def kept_units(self) -> int:
        return sum(int(self.pruning.units(mask).sum()) for mask in self.masks.values())

    def hold(self) -> None:
        """Zero pruned weights and their gradients, in one pass."""
        self.check_identities()
        with_grad = [name for name, w in self.weights.items() if w.grad is not None]
        self._zero(with_grad, [self.weights[name].grad for name in with_grad])
        self._zero([name for name, w in self.weights.items() if w.grad is None], [])
        self.held = True

    def after_step(self) -> None:
        """Zero pruned weights again, after a step that moved weights whose gradient is 0."""
        self._zero(list(self.weights), [])

    def _zero(self, names: list[str], grads: list[Tensor]) -> None:
        if names:
            with torch.no_grad():
                ops.hold_ticket_([self.weights[n] for n in names], grads, [self.masks[n] for n in names])

    def stepped(self) -> None:
        """Count an optimizer step; in round 0 keep the state at `rewind_step`. Raises LotteryError without a hold()."""
        if not self.held:
            raise LotteryError(f"step {self.steps} had no hold() before it: pruned weights would train")
        self.steps, self.held = self.steps + 1, False
        if self.round == 0 and self.steps == self.rewind_step:
            self.rewind_state = copy_state(self.model)

    def prune(self, keep: int) -> None:
        """Prune to `keep` units by the magnitudes the model has now; call it on the last epoch's."""
        self.check_identities()
        self.masks = prune(self.weights, self.masks, keep, self.pruning)
        kept = (w.detach()[self.masks[name]].abs() for name, w in self.weights.items())
        self.threshold = min((float(w.min()) for w in kept if w.numel()), default=0.0)

    def rewind(self) -> None:
        """Restore all parameters and buffers to the kept state and apply the masks (step 4)."""
        if self.rewind_state is None:
            raise LotteryError(f"rewind_step {self.rewind_step} was never reached: round 0 took {self.steps} steps")
        self.check_scope()
        load_state(self.model, self.rewind_state, whole=True)
        self.go_on()
        for name, weight in self.weights.items():  # I3
            if not torch.equal(weight.detach(), self.rewind_state[name].masked_fill(~self.masks[name], 0)):
                raise LotteryError(f"{name}: the rewound weights are not theta_k * mask")

    def go_on(self) -> None:
        """Begin a round with the weights where they are, under the masks."""
        self.check_scope()
        self.model.zero_grad(set_to_none=True)
        self.hold()
        self.steps, self.held, self.start_sha256 = self.first_step, False, sha256(state_of(self.model))

    def check(self) -> None:
        """Raise LotteryError unless what is trained or pruned is finite (I5) and a pruned weight exactly 0 (I4)."""
        for name, parameter in self.model.named_parameters():
            if (parameter.requires_grad or name in self.masks) and not parameter.isfinite().all():
                raise LotteryError(f"{name} has a NaN or infinite value: no round begins or ends with one")
        for name, weight in self.weights.items():
            if (weight.detach()[~self.masks[name]] != 0).any():
                why = "hold() was not called every step, or the optimizer moves weights whose gradient is 0"
                which = "as Muon does, or momentum of an earlier round: then call after_step() too"
                raise LotteryError(f"{name}: a pruned weight is not 0: {why}, {which}")

    def check_identities(self) -> None:
        """Raise LotteryError unless each weight that is held is the model's parameter of that name."""
        for name, weight in self.weights.items():
            module, (*path, leaf) = self.model, name.split(".")
            for part in path:
                module = getattr(module, "_modules", {}).get(part)
            if getattr(module, "_parameters", {}).get(leaf) is not weight:
                rule = "change weights in place (no load_state_dict with assign=True, no layer replaced)"
                raise LotteryError(f"{name} is another tensor in the model now than the ticket holds: {rule}")

    def check_scope(self) -> None:
        """Raise LotteryError unless the weights that are held are all that the model has to prune."""
        self.check_identities()
        for row in scope(self.model, self.exclude):
            if row.status == "pruned" and row.name not in self.weights:
                raise LotteryError(f"{row.name} was not in the model when the ticket was made, and is not held")


# ---------------------------------------------------------------------------- Algorithm 1


@dataclass
class Found:
    """One finished round. While it is yielded the model holds the weights that were evaluated."""

    ticket: Ticket
    row: dict  # plain numbers, strings and lists: a line of the ledger


def find_ticket(
    model: nn.Module, train: Callable[[Ticket], State | None], evaluate: Callable[[nn.Module], dict], *,
    sparsity: float, prune_rate: float = 0.2, rewind_step: int = 0, pruning: Pruning = BY_MAGNITUDE,
    exclude: Sequence[str] = (), rewind: bool = True, resume: Callable[[Ticket], str] | None = None,
) -> Iterator[Found]:  # fmt: skip
    """Iterative magnitude pruning with rewinding, Algorithm 1. Yields a Found a round, the dense round 0 first.

    train(ticket): trains ticket.model in place with a fresh optimizer, calling ticket.hold() and ticket.stepped() as
        Ticket says. Schedule, data order and all draws start at the recipe's step ticket.first_step, so that a ticket
        and the dense network have had as many steps. It leaves the last epoch's weights, which are what is pruned, and
        returns the state to evaluate (that of the best epoch on validation data, say) or None for the last. Each
        round begins in the mode (train or eval, module by module) in which the model was given.
    evaluate(model): a dict of what to add to the round's row. It is called once a round.
    exclude: names or patterns of what is not pruned, as in scope().
    rewind: False lets the weights go on from round to round, the rival of step 4 (Renda et al. 2020).
    resume(ticket): goes on in the middle of a round: sets ticket.round, masks, threshold, start_sha256, steps and
        rewind_state and the model's state to what they were, and returns the hash of the masks of the round before.
    """
    if not callable(train) or not callable(evaluate):
        raise LotteryError(f"train and evaluate must be functions, got {train!r} and {evaluate!r}")
    ticket = Ticket(model, rewind_step, pruning, exclude)
    modes = {module: module.training for module in model.modules()}
    counts = kept_counts(ticket.kept_units, sparsity, prune_rate)
    check_least(ticket, counts[-1])
    parent = resume(ticket) if resume else sha256(ticket.masks)
    if counts[ticket.round : ticket.round + 1] != [ticket.kept_units]:
        raise LotteryError(f"round {ticket.round} keeps {ticket.kept_units}, the search has rounds of {counts}")
    for index, keep in list(enumerate(counts))[ticket.round :]:
        if index != ticket.round:
            ticket.round = index
            ticket.prune(keep)
            ticket.rewind() if rewind else ticket.go_on()
        model.train(modes[model])  # it may do more than set a flag
        for module, mode in modes.items():
            module.training = mode
        last, row = finish(ticket, train(ticket))
        row["parent_sha256"] = parent
        measured = evaluate(model)
        if not isinstance(measured, dict):
            raise LotteryError(f"evaluate must return a dict of what to add to the row, got {type(measured).__name__}")
        for key in filter(row.__contains__, measured):
            raise LotteryError(f"evaluate returned {key!r}, which the row has already: choose another name for it")
        yield Found(ticket, row | measured)
        parent = row["mask_sha256"]
        ticket.check_identities()
        load_state(model, last)


def check_least(ticket: Ticket, keep: int) -> None:
    """Raise LotteryError if what each layer keeps at least is more than `keep` units."""
    least = sum(ticket.pruning.least(ticket.pruning.units(mask)) for mask in ticket.masks.values())
    if least > keep:
        share = f"min_remaining {ticket.pruning.min_remaining}"
        raise LotteryError(f"{share} keeps {least} of the prunable, more than {keep} that sparsity leaves")


def finish(ticket: Ticket, trained: State | None) -> tuple[State, dict]:
    """After a round's training: the last epoch's state, and what the round's row says of weights and masks.

    The model is left with the state to evaluate, `trained` or the last.
    """
    ticket.check_scope()
    ticket.check()
    if ticket.rewind_state is None:
        raise LotteryError(f"rewind_step {ticket.rewind_step} was never reached: round 0 took {ticket.steps} steps")
    model, kept, total = ticket.model, ticket.kept, sum(mask.numel() for mask in ticket.masks.values())
    rest = sum(p.numel() for p in model.parameters()) - total  # never pruned: biases, norms, embeddings
    last = copy_state(model)
    if trained is not None:
        if not isinstance(trained, dict):
            raise LotteryError(f"train must return a state_dict or None, got {type(trained).__name__}")
        load_state(model, trained)
        ticket.check()
    row = {
        "round": ticket.round, "remaining": kept / total, "remaining_all": (kept + rest) / (total + rest),
        "kept": kept, "total": total,
        "kept_per_layer": {name: int(mask.sum()) for name, mask in ticket.masks.items()},
        "mask_sha256": sha256(ticket.masks), "rewind_sha256": sha256(ticket.rewind_state),
        "start_sha256": ticket.start_sha256, "last_sha256": sha256(last),
        "trained_sha256": sha256(state_of(model)), "threshold": ticket.threshold,
    }  # fmt: skip
    if ticket.pruning.block != (1, 1):
        row["kept_blocks"] = ticket.kept_units
        row["total_blocks"] = sum(ticket.pruning.units(mask).numel() for mask in ticket.masks.values())
    return last, row
