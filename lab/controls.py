"""Tickets of another run, and the controls that they are compared with.

A source is a search, of which the finished rounds count, or one ticket file. Of it are trained, with one recipe and one
data order:

    (no control)           its masks with its rewind state, or with its trained weights
    random-mask            as many weights (or blocks), anywhere
    random-mask-matched    as many in each layer, anywhere in it: only which weights differs
    random-init            its masks on a new draw of the initial weights, another one each round
    a rival                see lab/rivals.py
    dense-small            no mask: a narrower network, as deep, with as many heads and within 1 % as many parameters,
                           or else the next smaller one
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import lottery
import models
from audio_lottery import draws, files, ledger
from lab import networks, rivals

CONTROLS = ledger.CONTROLS
RANDOM = ("random-mask", "random-mask-matched")  # which keep weights that the ticket does not
PATHS = ("data", "noise", "lm", "init")  # flags of a run that name files
# Words of a configuration that say how a control or a rewinding is done, where it was once done otherwise.
FOLLOWING = ("mask_draws", "small", "late_rewinding")
# Sizes of a narrower network: the first is tried near its share of the whole, the others then fill up, in this order.
WIDTHS = {
    "cnn-lstm": ("channels", "hidden", "first_channels"),
    "rnnt": ("hidden", "predictor", "joiner", "channels"),
    "conformer": ("width", "inner", "channels"),
}


@dataclass
class Source:
    """Another run's tickets."""

    path: Path
    settings: dict  # the run's
    tokens: list[str]
    masks: dict[int, lottery.Masks]  # by round
    rewind: lottery.State | None  # whole in a run folder; 0 where pruned of a file, which may leave it out
    trained: lottery.State  # of the last round
    paths: dict[str, str | None]  # of PATHS; a file does not say them
    dense: dict | None = None  # the run's round 0 in its ledger
    file: files.TicketFile | None = None  # None: a run folder

    @functools.cached_property
    def whole(self) -> lottery.State | None:
        """The rewind state with nothing left out, for controls that keep other weights; None: a file cannot have it."""
        return drawn_again(self.file) if self.file else self.rewind

    def state(self, weights: str) -> lottery.State:
        """The "rewind" or "trained" weights. Raises LotteryError if a file leaves the first out and it is not drawn."""
        if weights == "trained":
            return self.trained
        if self.rewind is None and self.whole is not None:
            self.rewind = files.kept_of(self.whole, self.file.masks)
        if self.rewind is None:
            why = "it has no rewind state, nor the hash of the one that its seed draws"
            if self.file.rewind_sha256:
                drawn = f"seed {self.settings['seed']} draws another one here (torch {torch.__version__})"
                why = f"its rewind state is left out, and {drawn}"
            raise lottery.LotteryError(f"{self.path}: {why}: --ticket-weights trained, or another ticket")
        return self.rewind

    def identity(self, rounds: list[int], weights: str) -> str:
        """Hash of all that trainings take from it; what random masks keep beside the ticket's is in their rows."""
        masks = [lottery.sha256(self.masks[number]) for number in rounds if number]
        return ledger.hash_json([masks, lottery.sha256(self.state(weights)), self.tokens])


def round_of_file(masks: lottery.Masks, settings: dict) -> int:
    """The round of a ticket file, by its counts: the nearest, as layers made new for other tokens are whole."""
    pruning = lottery.Pruning(tuple(settings.get("block", (1, 1))))
    units = [pruning.units(mask) for mask in masks.values()]
    kept, total = sum(int(unit.sum()) for unit in units), sum(unit.numel() for unit in units)
    counts = lottery.kept_counts(total, settings["sparsity"], settings["prune_rate"])
    return min(range(1, len(counts)), key=lambda r: abs(counts[r] - kept), default=1)


def read_source(path: Path) -> Source:
    """A run folder, with the tickets of all of its rounds, or a ticket file, with one. Raises LotteryError."""
    file = files.load_ticket(path / "ticket.safetensors" if path.is_dir() else path)
    try:
        settings, tokens = dict(file.info), file.info["tokens"]
        for key in ("tokens", "sizes", "features"):
            del settings[key]
        try:
            networks.described(file.info, file.trained)
        except lottery.LotteryError as error:
            raise lottery.LotteryError(f"{path}: {error}") from None
        ledger.check_settings(settings, f"{path}: its info")
        if not path.is_dir():
            whole = all(mask.all() for mask in file.masks.values())
            masks = {} if whole else {round_of_file(file.masks, settings): file.masks}
            return Source(path, settings, tokens, masks, file.rewind, file.trained, {}, file=file)
        (config, rows), masks = ledger.read_run(path), {}
        if "rounds" in config or "control" in config:
            raise lottery.LotteryError(f"{path}: it searched for no ticket, but trained another run's: name that run")
        for row in rows[1:]:
            masks[row["round"]] = files.load_masks(path / "masks" / f"{row['round']:02d}.safetensors")
            if lottery.sha256(masks[row["round"]]) != row["mask_sha256"]:
                raise lottery.LotteryError(f"{path}: the masks of round {row['round']} are not the ledger's")
        if lottery.sha256(file.trained) != rows[-1]["trained_sha256"]:
            raise lottery.LotteryError(f"{path}: ticket.safetensors is not of the ledger's last round")
        rewind = files.read_sealed(path / "rewind.safetensors", "rewind state")[0]
        files.check_finite(path / "rewind.safetensors", rewind)
        if lottery.sha256(rewind) != rows[-1]["rewind_sha256"]:
            raise lottery.LotteryError(f"{path}: rewind.safetensors is not the ledger's rewind state")
        paths = {key: path and str(path) for key, path in config["machine"].items() if key in PATHS}
        return Source(path, ledger.settings_of(config), tokens, masks, rewind, file.trained, paths, rows[0])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, lottery.LotteryError):
            raise
        why = f"{type(error).__name__}: {error}"
        raise lottery.LotteryError(f"{path}: not the tickets of a run ({why})") from None


def drawn_again(file: files.TicketFile) -> lottery.State | None:
    """theta_0 as the file's seed draws it, whole, where that is what it rewinds to: its hash tells.

    None where it is not, or not known: it is a later step's, or another run's, or another version of torch or another
    processor drew it otherwise.
    """
    if file.rewind_sha256 is None:
        return None
    info = file.info
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(info["seed"])
        drawn = lottery.state_of(models.BACKBONES[info["backbone"]](len(info["tokens"]), **info["sizes"]))
    drawn = {name: value.detach() for name, value in drawn.items()}
    return drawn if lottery.sha256(files.kept_of(drawn, file.masks)) == file.rewind_sha256 else None


def adopt(model: nn.Module, state: lottery.State, same_tokens: bool, path: Path) -> tuple[lottery.State, list[str]]:
    """`state` for this model, and the names of the token layers that are the model's own because the tokens differ.

    Raises LotteryError if any other layer is not of the same shape.
    """
    own, renewed = lottery.copy_state(model), []
    found = {}
    if more := sorted(state.keys() - own.keys()):
        raise lottery.LotteryError(f"{path}: it is of another network: {more[0]} is not in this one")
    for name, value in own.items():
        if not same_tokens and name.split(".")[0] in model.TOKEN_LAYERS:
            renewed.append(name)
            found[name] = value
        elif name not in state or state[name].shape != value.shape:
            raise lottery.LotteryError(f"{path}: it is of another network: {name} is not there in this shape")
        else:
            found[name] = state[name].to(value.device)
    return found, renewed


def masks_for(
    source: Source, number: int, model: nn.Module, renewed: list[str], exclude: Sequence[str] = ()
) -> lottery.Masks:
    """The source's masks of a round for this model, the `renewed` layers whole; of those in `exclude` there are none.

    Raises LotteryError if any other layer is not of the same shape.
    """
    shapes = {name: weight.shape for name, weight in lottery.prunable(model, exclude).items()}
    there = {name: mask for name, mask in source.masks[number].items() if name not in renewed}
    for name in sorted((shapes.keys() - renewed) | there.keys()):
        if name not in there or shapes.get(name) != there[name].shape:
            raise lottery.LotteryError(f"{source.path}: its masks are of another network: {name} does not fit")
    return {name: there.get(name, torch.ones(shape, dtype=torch.bool)) for name, shape in shapes.items()}


def check_source(
    source: Source, rounds: list[int], model: nn.Module, tokens: list[str], *,
    control: str | None, weights: str, backbone: str, size: str, exclude: Sequence[str] = (),
) -> None:  # fmt: skip
    """Raise LotteryError, before anything is trained, unless the source's weights and masks are of this network.

    And, of the control dense-small, unless there is a network for each round.
    """
    _, renewed = adopt(model, source.state(weights), source.tokens == tokens, source.path)
    for number in filter(None, rounds):
        masks = masks_for(source, number, model, renewed, exclude)
        if control == "dense-small":
            small_sizes(backbone, size, len(tokens), parameters_left(model, masks))


def random_masks(masks: lottery.Masks, renewed: list[str], pruning: lottery.Pruning, seed: int, matched: bool):
    """As many units as `masks` keeps, drawn uniformly: from all together, or (matched) from each layer as many.

    The order is drawn once from the seed, so that the masks of fewer are subsets. `renewed` layers stay as they are.
    """
    generator = torch.Generator().manual_seed(draws.torch_seed(seed, 0, draws.MASKS))
    units = {name: pruning.units(mask).cpu() for name, mask in masks.items()}
    order = {name: torch.rand(unit.shape, dtype=torch.float64, generator=generator) for name, unit in units.items()}
    drawn = [name for name in masks if name not in renewed]
    groups = [[name] for name in drawn] if matched else [drawn]
    new = dict(masks)
    for names in groups:
        keep = sum(int(units[name].sum()) for name in names)
        every = [torch.ones_like(units[name]) for name in names]
        chosen = lottery.ops.global_magnitude_masks([order[name] for name in names], every, keep)
        new |= {n: pruning.weights(unit.to(masks[n].device), masks[n]) for n, unit in zip(names, chosen)}
    return new


def fresh(backbone: str, sizes: dict, tokens: int, seed: int, number: int, device) -> nn.Module:
    """A new draw of the initial weights, for round `number`."""
    torch.manual_seed(draws.torch_seed(seed, number, draws.INITIAL_WEIGHTS))
    return models.BACKBONES[backbone](tokens, **sizes).to(device)


def parameters_left(model: nn.Module, masks: lottery.Masks) -> int:
    """All parameters of the model, those never pruned too, less the weights that the masks remove."""
    return sum(p.numel() for p in model.parameters()) - sum(int((~mask).sum()) for mask in masks.values())


def small_sizes(backbone: str, size: str, tokens: int, most: int) -> dict:
    """The sizes of a network with at most `most` parameters and at least 99 % of them, its shape near the whole one's.

    As deep, and with as many heads. Its first width of WIDTHS is as near to its share of the whole as 99 % allow, the
    others are as large as fits; where none near it has 99 %, it is the largest of them.
    """
    whole = dict(models.BACKBONES[backbone].SIZES[size])
    own = {"conformer": ("inner", "width", 4), "cnn-lstm": ("first_channels", "channels", 1)}  # of others if not named
    whole |= {name: times * whole[other] for name, other, times in [own[backbone]]} if backbone in own else {}
    first, *others = WIDTHS[backbone]
    unit = 2 * whole["heads"] if first == "width" else 1  # rotation takes an even number of a head

    def count(sizes: dict) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in models.BACKBONES[backbone](tokens, **sizes).parameters())

    def scaled(share: float) -> dict:
        alike = {key: max(1, round(share * whole[key])) for key in WIDTHS[backbone]}
        return whole | alike | {first: max(1, round(share * whole[first] / unit)) * unit}

    def fits(share: float) -> bool:
        return count(scaled(share)) <= most

    share = largest(lambda thousandth: fits(thousandth / 1000), 0, 1000) / 1000
    found = []
    for near in sorted(range(-6, 7), key=abs):
        sizes = scaled(share)
        sizes[first] = max(unit, sizes[first] + near * unit)
        for key in others:
            room = [sizes | {key: value} for value in range(2 * sizes[key] + 8)]
            sizes[key] = max(1, largest(lambda value: count(room[value]) <= most, 0, len(room)))  # noqa: B023
        found += [(count(sizes), sizes)] if count(sizes) <= most else []
        if found and found[-1][0] >= 0.99 * most:
            return found[-1][1]
    if not found:
        raise lottery.LotteryError(f"--control dense-small: no {backbone} has {most} parameters or fewer")
    return max(found, key=lambda pair: pair[0])[1]


def largest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest whole number below `high` for which it holds, which does for all smaller ones; `low` if for none."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def ticket_of_round(
    source: Source, number: int, model: nn.Module, tokens: list[str], pruning: lottery.Pruning, seed: int, *,
    control: str | None, weights: str, backbone: str, size: str, exclude: Sequence[str] = (),
) -> tuple[lottery.Ticket, dict, list[str]]:  # fmt: skip
    """What round `number` trains, rewound and ready; what its row says of its origin; the layers made new.

    model: a network as theta_0 of this run; dense-small has its own instead. weights: "rewind" or "trained".
    exclude: what the run keeps dense.
    """
    device = next(model.parameters()).device
    start, renewed = adopt(model, source.state(weights), source.tokens == tokens, source.path)
    masks = {name: mask.to(device) for name, mask in masks_for(source, number, model, renewed, exclude).items()}
    about = {"source_mask_sha256": lottery.sha256(source.masks[number])}
    if control == "dense-small":
        everything, total = sum(p.numel() for p in model.parameters()), sum(mask.numel() for mask in masks.values())
        sizes = small_sizes(backbone, size, len(tokens), parameters_left(model, masks))
        ticket = lottery.Ticket(fresh(backbone, sizes, len(tokens), seed, number, device), exclude=exclude)
        ticket.round = number
        about |= {"sizes": sizes, "total": total, "remaining": ticket.kept / total}
        about["parameters"] = sum(p.numel() for p in ticket.model.parameters())
        about["remaining_all"] = about["parameters"] / everything
        return ticket, about, []
    if control in rivals.TRAININGS:
        keep = sum(int(pruning.units(mask).sum()) for mask in masks.values())
        return rivals.ticket_of(control, model, pruning, keep, number, exclude), about, []
    if control in RANDOM:
        start, _ = adopt(model, source.whole, source.tokens == tokens, source.path)
        masks = random_masks(masks, renewed, pruning, seed, control == "random-mask-matched")
    if control == "random-init":
        sizes = models.BACKBONES[backbone].SIZES[size]
        start = lottery.copy_state(fresh(backbone, sizes, len(tokens), seed, number, device))
    # From theta_k it has as many steps before it as the dense network; other starts have none, and train from step 0.
    late = control != "random-init" and weights == "rewind"
    ticket = lottery.Ticket(model, source.settings.get("rewind_step", 0) if late else 0, pruning, exclude)
    ticket.round, ticket.masks, ticket.rewind_state = number, masks, start
    ticket.rewind()
    return ticket, about, renewed
