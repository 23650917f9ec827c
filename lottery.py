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

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

Masks = dict[str, Tensor]  # parameter name -> bool, the parameter's shape, True = kept
State = dict[str, Tensor]  # a state_dict: parameters and buffers


class LotteryError(ValueError):
    """A request that cannot be met, or an invariant that does not hold; the message names the thing and the rule."""


# ---------------------------------------------------------------------------- ops: the reference


def reference_hold_ticket_(weights: list[Tensor], grads: list[Tensor], masks: list[Tensor]) -> None:
    """Zero every weight and gradient where its mask is False, in place; NaN becomes 0 too.

    weights, masks: as many tensors, pairwise of one shape.  grads: as many, or none at all.
    """
    for tensors in (weights, grads):
        for tensor, mask in zip(tensors, masks):
            tensor.masked_fill_(mask.logical_not(), 0)


def reference_global_magnitude_masks(weights: list[Tensor], masks: list[Tensor], keep: int) -> list[Tensor]:
    """Masks of the `keep` largest |w| among the surviving weights of all tensors together.

    Ties at the threshold: the earlier tensor, then the lower flat index, is kept.  Raises ValueError for a NaN or
    infinite weight, naming its position, and unless 0 <= keep <= survivors.
    """
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


class Ops(NamedTuple):
    hold_ticket_: Callable[[list[Tensor], list[Tensor], list[Tensor]], None]
    global_magnitude_masks: Callable[[list[Tensor], list[Tensor], int], list[Tensor]]
    path: str  # which path this is, for the line at start-up


def choose_ops() -> Ops:
    """The operators of csrc/ where they are built, the reference elsewhere: the one place that chooses."""
    try:
        import _lottery  # registers torch.ops.audio_lottery
    except ImportError as error:
        return Ops(reference_hold_ticket_, reference_global_magnitude_masks, f"pure PyTorch ({error})")
    compiled, facts = torch.ops.audio_lottery, _lottery.build_facts()
    torch.library.register_fake("audio_lottery::hold_ticket_", lambda weights, grads, masks: None)
    torch.library.register_fake(
        "audio_lottery::global_magnitude_masks", lambda weights, masks, keep: [torch.empty_like(mask) for mask in masks]
    )

    def on_its_devices(op, reference):  # a build without CUDA leaves tensors on a GPU to the reference
        devices = {"cpu", "cuda"} if facts["cuda"] else {"cpu"}
        return lambda weights, *rest: (op if weights[0].device.type in devices else reference)(weights, *rest)

    return Ops(
        on_its_devices(compiled.hold_ticket_, reference_hold_ticket_),
        on_its_devices(compiled.global_magnitude_masks, reference_global_magnitude_masks),
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
    """Hash of names, dtypes, shapes and bytes, in the order of the dict."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def prune(weights: dict[str, Tensor], masks: Masks, keep: int) -> Masks:
    """New masks of the `keep` largest surviving weights, by global magnitude (step 2 of Algorithm 1).

    Raises LotteryError for a NaN or infinite weight, naming the parameter, and for an impossible `keep`.
    """
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise LotteryError(
                f"{name} has a NaN or infinite weight: nothing was pruned (is the learning rate too high?)"
            )
    try:
        kept = ops.global_magnitude_masks(
            [weight.detach() for weight in weights.values()], [masks[name] for name in weights], keep
        )
    except ValueError as error:
        raise LotteryError(str(error)) from None
    new = dict(zip(weights, kept))
    if sum(int(mask.sum()) for mask in new.values()) != keep:  # I2
        raise LotteryError(f"pruning kept {sum(int(m.sum()) for m in new.values())} weights instead of {keep}")
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

    def __init__(self, model: nn.Module, rewind_step: int = 0):
        self.model, self.rewind_step, self.steps, self.round = model, rewind_step, 0, 0
        self.weights = prunable(model)
        self.masks: Masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}
        self.rewind_state: State | None = copy_state(model) if rewind_step == 0 else None

    @property
    def kept(self) -> int:
        return sum(int(mask.sum()) for mask in self.masks.values())

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
        """Prune to `keep` weights by the magnitudes the model has now; call it on the last epoch's."""
        self.masks = prune(self.weights, self.masks, keep)

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
        self.steps = 0

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
) -> Iterator[Found]:
    """Iterative magnitude pruning with rewinding, Algorithm 1. Yields a Found a round, the dense round 0 first.

    train(ticket): trains ticket.model in place, with a fresh optimizer, schedule and data order, calling ticket.hold()
        and ticket.stepped() as Ticket says. It leaves the last epoch's weights, which are what is pruned, and
        returns the state to evaluate (that of the best epoch on validation data, say) or None for the last.
    evaluate(model): what to add to the round's row. It is called once a round.
    """
    ticket = Ticket(model, rewind_step)
    total = ticket.kept
    rest = sum(p.numel() for p in model.parameters()) - total  # never pruned: biases, norms, embeddings
    parent = sha256(ticket.masks)
    for ticket.round, keep in enumerate(kept_counts(total, sparsity, prune_rate)):
        if ticket.round:
            ticket.prune(keep)
            ticket.rewind()
        trained = train(ticket)
        ticket.check()
        if ticket.rewind_state is None:
            raise LotteryError(f"rewind_step {rewind_step} was never reached: round 0 took {ticket.steps} steps")
        last = copy_state(model)
        if trained is not None:
            model.load_state_dict(trained)
            ticket.check()
        masks = sha256(ticket.masks)
        row = {
            "round": ticket.round,
            "remaining": keep / total,
            "remaining_all": (keep + rest) / (total + rest),
            "kept": keep,
            "total": total,
            "kept_per_layer": {name: int(mask.sum()) for name, mask in ticket.masks.items()},
            "mask_sha256": masks,
            "parent_sha256": parent,
            "rewind_sha256": sha256(ticket.rewind_state),
            **evaluate(model),
        }
        yield Found(ticket, row)
        parent = masks
        model.load_state_dict(last)


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

TICKET_FORMAT = "audio-lottery ticket 1"


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary file, fsync, rename, fsync the folder: the file is whole, old or new, at any instant."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def save_ticket(path: Path, masks: Masks, rewind: State, trained: State, info: dict) -> None:
    """Write a ticket: masks as bits, rewind and trained values at kept places only, all else (biases, norms) whole.

    info: whatever rebuilds the model (JSON), kept in the file's metadata.
    """
    tensors = {f"mask/{n}": torch.from_numpy(np.packbits(m.cpu().numpy(), bitorder="little")) for n, m in masks.items()}
    for part, state in (("rewind", rewind), ("trained", trained)):
        for name, value in state.items():
            value = value.detach().cpu()
            tensors[f"{part}/{name}"] = (value[masks[name].cpu()] if name in masks else value).clone().contiguous()
    about = {
        "format": TICKET_FORMAT,
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "mask_sha256": sha256(masks),
        "info": info,
    }
    metadata = {"ticket": json.dumps(about, ensure_ascii=False)}  # one entry: safetensors writes several in any order
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def load_ticket(path: Path) -> tuple[Masks, State, State, dict]:
    """Returns masks, the rewind state, the trained state (full tensors, 0 where pruned) and info.

    A parameter with two names is masked under its first alone: hold the ticket after loading a state into such a model.
    Raises LotteryError, naming the file, if it is missing or not a whole ticket.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("ticket", "{}"))
            if about.get("format") != TICKET_FORMAT:
                raise LotteryError(f"{path}: not a ticket (format {about.get('format')!r}, not {TICKET_FORMAT!r})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        masks: Masks = {}
        for name, shape in about["shapes"].items():
            bits = np.unpackbits(tensors[f"mask/{name}"].numpy(), count=int(np.prod(shape)), bitorder="little")
            masks[name] = torch.from_numpy(bits.astype(bool)).view(shape)
        if sha256(masks) != about["mask_sha256"]:
            raise LotteryError(f"{path}: corrupt ticket: the masks do not have the hash the file states")
        states: dict[str, State] = {"rewind": {}, "trained": {}}
        for key, value in tensors.items():
            part, name = key.split("/", 1)
            if part in states and name in masks:
                value = torch.zeros(masks[name].shape, dtype=value.dtype).masked_scatter_(masks[name], value)
            if part in states:
                states[part][name] = value
        return masks, states["rewind"], states["trained"], about["info"]
    except LotteryError:
        raise
    except Exception as error:  # whatever a broken file makes the readers above raise
        raise LotteryError(f"{path}: cannot read the ticket ({error})") from None
