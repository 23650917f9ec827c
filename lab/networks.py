"""The network that a ticket's info describes: nothing is built from numbers that its tensors do not confirm."""

import json

import torch
from torch import Tensor, nn

import data
import models
from audio_lottery import checked
from lottery import LotteryError

WIDEST, MOST_TOKENS = 2**16, 10**6
WIDTH, DROPOUT = checked.integer(1, WIDEST), checked.number(0, 0.999)
PAIRS = checked.listed(checked.listed(checked.integer(1, 255), 2, 2), 1, 100)
FEATURES = checked.one_of(*models.CnnLstm.BINS)
SIZES = {
    "cnn-lstm": {"features": FEATURES, "channels": WIDTH, "kernels": PAIRS, "strides": PAIRS, "hidden": WIDTH},
    "rnnt": {
        "window": checked.integer(4, 1000),  # less than the hop of 4 frames would skip some
        "channels": WIDTH,
        "hidden": WIDTH,
        "predictor": WIDTH,
        "joiner": WIDTH,
    },
    "conformer": {"channels": WIDTH, "width": WIDTH, "heads": WIDTH, "kernel": checked.integer(1, 999)},
}
MAY = {"cnn-lstm": {"first_channels": WIDTH}, "conformer": {"inner": WIDTH}}  # of networks that --control narrows
DEPTH = {"cnn-lstm": "layers", "rnnt": "layers", "conformer": "blocks"}
TOKEN = checked.text(".+", most=1000)


def check_tokens(tokens: object, where: str = "tokens") -> None:
    """Raise LotteryError unless these are a ticket's tokens: different texts, the blank among them, in a list."""
    checked.listed(TOKEN, 2, MOST_TOKENS)(tokens, where)
    if len(set(tokens)) < len(tokens):
        raise LotteryError(f"{where}: must be different from each other")


def check_sizes(backbone: object, sizes: object, weights: int) -> None:
    """Raise LotteryError unless these are sizes of such a network, each bounded, of no more layers than `weights`.

    What they would build is not looked at: described() compares that.
    """
    checked.one_of(*models.BACKBONES)(backbone, "backbone")
    shapes = SIZES[backbone] | {"dropout": DROPOUT, DEPTH[backbone]: checked.integer(1, min(1000, max(1, weights)))}
    checked.record(shapes, MAY.get(backbone), others=False)(sizes, "sizes")
    if backbone == "cnn-lstm" and len(sizes["kernels"]) != len(sizes["strides"]):
        raise LotteryError("sizes: kernels and strides must be as many")
    kernels = sizes["kernels"] if backbone == "cnn-lstm" else [[sizes.get("kernel", 1)]]
    if any(number % 2 == 0 for pair in kernels for number in pair):
        raise LotteryError("sizes: kernels must be odd, so that as many frames come out as their lengths say")
    if backbone == "conformer" and sizes["width"] % (2 * sizes["heads"]):
        raise LotteryError("sizes: width must be an even number a head")


def skeleton(backbone: str, sizes: dict, tokens: int, weights: int) -> nn.Module:
    """The network without values, on torch's meta device, so that it takes no memory.

    weights: how many tensors speak for its layers.  Raises LotteryError as check_sizes does.
    """
    check_sizes(backbone, sizes, weights)
    try:
        with torch.device("meta"):
            return models.BACKBONES[backbone](tokens, **sizes)
    except (TypeError, ValueError, RuntimeError) as error:
        raise LotteryError(f"no {backbone} has these sizes ({error})") from None


def parameters(backbone: str, sizes: dict, tokens: int) -> int:
    """Of such a network, those that are never pruned too."""
    return sum(p.numel() for p in skeleton(backbone, sizes, tokens, 10**4).parameters())


def described(info: dict, state: dict[str, Tensor]) -> nn.Module:
    """The skeleton of the network that a ticket's info describes.

    Raises LotteryError unless `info` has backbone, sizes and tokens of a network whose state has exactly the names,
    shapes and dtypes of `state`.
    """
    try:
        checked.record(dict.fromkeys(("backbone", "sizes", "tokens"), checked.anything))(info, "info")
        check_tokens(info["tokens"])
        model = skeleton(info["backbone"], info["sizes"], len(info["tokens"]), len(state))
        checked.one_of(model.features)(info.get("features", model.features), "features")
    except LotteryError as error:
        why = f"its backbone, sizes or tokens do not fit ({error})"
        raise LotteryError(f"not a recogniser's ticket: {why}") from None
    own = model.state_dict()
    for name in [*own, *state]:
        if name not in own or name not in state:
            where = "of the network it describes" if name not in own else "there"
            raise LotteryError(f"the ticket's parameters are not its network's: {checked.said(name)} is not {where}")
        there, wanted = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in (state[name], own[name]))
        if there != wanted:
            raise LotteryError(f"the ticket's parameters are not its network's: {name} is {there}, not {wanted}")
    return model


def of(info: dict, state: dict[str, Tensor]) -> nn.Module:
    """The network that a ticket's info describes, with the weights of `state`. Raises LotteryError as described()."""
    described(info, state)
    model = models.BACKBONES[info["backbone"]](len(info["tokens"]), **info["sizes"])
    model.load_state_dict(state)
    return model


def check_run(info: dict, settings: dict, row: dict) -> None:
    """Raise LotteryError unless tokens and sizes of a ticket's info are those of its run's settings and last row."""
    kind, tokens, backbone = settings["tokens"], info["tokens"], settings["backbone"]
    in_order = kind != "chars" or (sorted(tokens[1:]) == tokens[1:] and {len(token) for token in tokens[1:]} == {1})
    if tokens[0] != data.BLANK or not in_order or kind not in ("chars", f"bpe:{len(tokens)}"):
        raise LotteryError(f"its tokens are not as --tokens {kind} makes them")
    whole = json.loads(json.dumps(models.BACKBONES[backbone].SIZES[settings["size"]]))
    if "sizes" not in row:
        if info["sizes"] != whole:
            raise LotteryError(f"its sizes are not those of a {backbone} of {settings['size']} size")
        return
    share = parameters(backbone, info["sizes"], len(tokens)) / parameters(backbone, whole, len(tokens))
    if row["remaining_all"] != share:
        raise LotteryError(f"round {row['round']}: remaining_all is {share} by the networks' sizes")
