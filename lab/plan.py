"""Multiply-adds of a network, and what a search for a ticket costs before it is begun.

python -m lab.plan TICKET      multiply-adds a second of audio as it recognises, dense and with zeros skipped
python train.py --plan         what a search costs: multiply-adds of the loss
"""

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    from lab import missing

    missing.in_one_line("lab.plan")

import torch

import lottery
import models
from audio_lottery import counting, files
from audio_lottery.console import Parser, command, fail
from lab import networks

HOURS = {"LibriSpeech": 960, "TED-LIUM 1": 118, "Common Voice (as in the paper)": 582}  # of training speech
SPARSITIES = (0.79, 0.9, 0.956)  # the paper's sparsest matching tickets of CNN-LSTM: 21 %, (10 %) and 4.4 % remain
TERAFLOPS = 20  # sustained by one GPU: an assumption; recurrent layers run far below the peak
SECONDS, TOKENS_A_SECOND = 4, 15  # of the utterance that is counted; characters of read English
TOKENS = 29  # the paper's; how often a weight multiplies does not depend on them


def multiply_adds(
    backbone: str, sizes: dict | None = None, kept: dict[str, int] | None = None, of: str = "transcribe",
    whole: bool = False, exclude: Sequence[str] = (), tokens: int = TOKENS,
) -> float:  # fmt: skip
    """Multiply-adds per second of speech, forward: convolutions, LSTMs (each step), linear layers, joiner.

    sizes: of the network (default: the paper's).  kept: weights by layer, as in a row of a ledger, so that zeros are
    skipped (default: all, with the paper's 29 tokens); whole: they are all that such a network has, less those of
    `exclude` (as in lottery.prunable).  tokens: of the network, for layers that have no count.
    of: "transcribe", greedy recognition, or "loss", which for a transducer computes its joiner over the whole lattice
    and a CTC output beside it.  Raises LotteryError if they are of other layers, or not as many; nothing is built then.
    The utterance is of 4 s and 15 tokens a second. Products of two activations, as in attention, are not counted.
    """
    if whole:
        check_whole(backbone, sizes, kept, exclude)
    sizes = sizes or models.BACKBONES[backbone].SIZES["paper"]
    uses, weights = _uses_and_weights(backbone, json.dumps(sizes), of, tokens)
    kept = weights if kept is None else kept
    if not kept or kept.keys() - uses.keys():
        raise lottery.LotteryError(f"{backbone} has the prunable layers {', '.join(uses)}, not {', '.join(kept)}")
    return sum(uses[name] * kept.get(name, weights[name]) for name in uses) / SECONDS  # no count: kept dense


def check_whole(backbone: str, sizes: dict, kept: dict[str, int], exclude: Sequence[str]) -> None:
    """Raise LotteryError unless a network of these sizes has these weights by layer, those of tokens aside."""
    model = networks.skeleton(backbone, sizes, TOKENS, len(kept))
    there = {name: weight.numel() for name, weight in lottery.prunable(model, exclude).items()}
    other = [
        n for n in there.keys() | kept.keys()
        if n.split(".")[0] not in model.TOKEN_LAYERS and there.get(n) != kept.get(n)
    ]  # fmt: skip
    if other:
        raise lottery.LotteryError(f"sizes of another {backbone} than kept_per_layer tells of: {min(other)}")


@functools.cache
def _uses_and_weights(backbone: str, sizes: str, of: str, tokens: int) -> tuple[dict[str, int], dict[str, int]]:
    """How often each weight multiplies in an utterance, and how many weights each layer has; sizes: JSON."""
    with torch.random.fork_rng(devices=[]):
        model = models.BACKBONES[backbone](tokens, **json.loads(sizes)).eval()  # eval: no statistics of other processes
        uses = per_utterance(model, SECONDS, tokens, of)
    return uses, {name: weight.numel() for name, weight in lottery.prunable(model).items()}


def per_utterance(model: torch.nn.Module, seconds: int, tokens: int, of: str = "transcribe") -> dict[str, int]:
    """How often each weight multiplies as one utterance is recognised, or in its loss."""
    frames, text = torch.tensor([100 * seconds]), torch.tensor([TOKENS_A_SECOND * seconds])
    features = torch.randn(1, int(frames), models.CnnLstm.BINS[model.features])
    targets = torch.randint(1, tokens, (1, int(text)))
    with torch.no_grad():
        if of == "loss":
            return counting.weight_uses(model, lambda: model.loss(features, frames, targets, text))
        with said(model, int(text), -(-int(frames) // model.stride)):
            return counting.weight_uses(model, lambda: model.transcribe(features, frames))


@contextlib.contextmanager
def said(model: torch.nn.Module, tokens: int, frames: int):
    """Inside, a transducer's greedy loop emits so many tokens in so many frames, evenly, whatever it hears."""
    if not isinstance(model, models.Transducer):
        yield
        return
    steps = itertools.count()  # of the loop: a token or the blank each

    def spell(_module, _inputs, logits):
        done = next(steps)
        emits = -(-(done + 1) * tokens // (tokens + frames)) > -(-done * tokens // (tokens + frames))
        return torch.nn.functional.one_hot(torch.tensor(int(emits)), logits.shape[-1]).to(logits).expand_as(logits)

    hook = model.output.register_forward_hook(spell)
    try:
        yield
    finally:
        hook.remove()


def weights_of(backbone: str) -> int:
    """Prunable weights at paper size."""
    with torch.device("meta"):
        model = models.build(backbone, "paper", TOKENS)
    return sum(weight.numel() for weight in lottery.prunable(model).values())


def markdown(columns: list[str], rows: list[list[str]], right: int = 0) -> list[str]:
    """The lines of a table, its first `right` columns aligned to the right."""
    rule = ["---:"] * right + ["---"] * (len(columns) - right)
    return [f"| {' | '.join(texts)} |" for texts in (columns, rule, *rows)]


def table(epochs: dict[str, int], prune_rate: float) -> str:
    """Markdown: what one search costs at each of SPARSITIES; epochs: of a training, by backbone."""
    columns = [
        "backbone",
        "epochs",
        "multiply-adds of the loss, a second of speech",
        "training speech",
        *(f"{s:.1%}" for s in SPARSITIES),
    ]
    rows = []
    for backbone in models.BACKBONES:
        forward, weights = multiply_adds(backbone, of="loss"), weights_of(backbone)
        for corpus, hours in HOURS.items():
            row = [backbone, str(epochs[backbone]), f"{forward / 1e9:.2f} G", f"{corpus}, {hours} h"]
            for sparsity in SPARSITIES:
                trainings = len(lottery.kept_counts(weights, sparsity, prune_rate))
                audio = trainings * epochs[backbone] * hours
                total = 3 * forward * 3600 * audio  # backward() takes two products for each of the forward pass
                gpu_hours = 2 * total / (TERAFLOPS * 1e12) / 3600
                row.append(f"{trainings} trainings, {audio:,} h of audio, {total:.1e}, {gpu_hours:,.0f} GPU h")
            rows.append(row)
    return "\n".join(markdown(columns, rows))


def explained() -> str:
    return (
        "Paper size, by target sparsity; epochs: of a training. Multiply-adds: of the loss, which is what training "
        "computes (recognising takes fewer with rnnt: python -m lab.plan TICKET); in the totals products with weights "
        "of forward and backward pass (3 times the forward pass), characters as tokens, "
        f"{TOKENS_A_SECOND} a second. GPU hours: at {TERAFLOPS} TFLOP/s sustained, an assumption, not a measurement; a "
        "pruned weight is multiplied all the same in training."
    )


# ---------------------------------------------------------------------------- a ticket


def of_ticket(path: Path) -> str:
    """What remains of all parameters, and multiply-adds a second of audio, dense and with zeros skipped.

    Raises LotteryError, naming the file, for anything that is not a whole ticket of a backbone of models.py.
    """
    file = files.load_ticket(path)
    try:
        model = networks.described(file.info, file.trained)
    except ValueError as error:
        raise lottery.LotteryError(f"{path}: {error}") from None
    files.check_fit(path, file, model)
    kept = {name: int(mask.sum()) for name, mask in file.masks.items()}
    total = {name: mask.numel() for name, mask in file.masks.items()}
    everything, removed = sum(p.numel() for p in model.parameters()), sum(total.values()) - sum(kept.values())
    count = functools.partial(multiply_adds, file.info["backbone"], file.info["sizes"], tokens=len(file.info["tokens"]))
    dense, ticket = map(count, (total, kept))
    return (
        f"remaining: {1 - removed / sum(total.values()):.1%} of {sum(total.values()):,} prunable weights, "
        f"{1 - removed / everything:.1%} of all {everything:,} parameters\n"
        f"multiply-adds a second of audio: dense {dense / 1e6:.1f} M, ticket {ticket / 1e6:.1f} M with zeros skipped "
        f"({ticket / dense:.1%})"
    )


@command("python -m lab.plan")
def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m lab.plan", description="What a ticket multiplies, by the second of audio.")
    parser.add_argument("ticket", type=Path, metavar="TICKET", help="ticket.safetensors of a run, or the run's folder")
    args = parser.parse_args(argv)
    try:
        print(of_ticket(args.ticket))
    except (lottery.LotteryError, OSError) as error:
        return fail("python -m lab.plan", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
