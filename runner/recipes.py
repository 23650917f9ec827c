"""How each network is trained if no flag says otherwise: the paper's recipes, and ours for small corpora."""

import bisect
import dataclasses
from dataclasses import dataclass

import torch

from data import SpecAugment


@dataclass(frozen=True)
class Recipe:
    epochs: int
    batch_size: int
    lr: float
    # "one-cycle": the learning rate rises to lr and falls to 0 over all steps, beta1 falls from 0.95 to 0.85 and rises
    # again (Smith & Topin 2019, torch's defaults); "anneal": lr / anneal after each epoch; "transformer": it rises
    # evenly to lr over `warmup` steps and falls with the root of the steps (Vaswani et al. 2017); "constant": lr
    schedule: str
    clip: float  # of the gradient's norm
    seconds: tuple[float, float]  # shortest and longest utterance that is trained on; all are evaluated
    augment: SpecAugment
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    batch_seconds: float | None = None  # seconds of audio a batch, padding counted, instead of batch_size
    accumulate: int = 1  # batches a step
    amp: bool = False  # bfloat16 autocast in the forward pass
    # What came later, and stands in a configuration only where it is not this:
    anneal: float = 1.1
    warmup: int = 0  # steps
    optimizer: str = "adamw"  # or "adam", whose weight decay is part of the gradient
    eps: float = 1e-8  # of the optimizer
    tokens: str = "chars"  # if --tokens does not say
    stretch: float = 1  # how many times as long its schedule takes (lab/rivals.py)
    speeds: tuple[float, ...] = (1.0,)  # one is drawn for each utterance and epoch (Ko et al. 2015)
    dropout: float | None = None  # the size's, if it is not given
    ctc_weight: float | None = None  # of the Transducer's CTC loss; its own, if it is not given

    def told(self) -> dict:
        """The fields for a configuration; tokens have an entry of their own there, and a stretch is of a round."""
        later = ("anneal", "warmup", "optimizer", "eps", "tokens", "stretch", "speeds", "dropout", "ctc_weight")
        plain = {field.name: field.default for field in dataclasses.fields(self) if field.name in later}
        told = {key: v for key, v in dataclasses.asdict(self).items() if key not in plain or v != plain[key]}
        return {key: value for key, value in told.items() if key not in ("tokens", "stretch")}


# The paper's, its time warping left out. The Transducer's was not published: that it has the CNN-LSTM's is our choice.
PAPER = Recipe(16, 32, 3e-4, "anneal", 400.0, (1.0, 15.0), SpecAugment(1, 27, 1, 70))
PEAK = 2 * (512 * 10_000) ** -0.5  # K / sqrt(width * warm-up steps), of the transformer schedule
PAPER_CONFORMER = Recipe(
    200, 16, PEAK, "transformer", 5.0, (0.0, 15.0), SpecAugment(2, 27, 10, 10_000, 0.05), 1e-6, (0.9, 0.98),
    accumulate=16, warmup=10_000, optimizer="adam", eps=1e-9, tokens="bpe:256",
)  # fmt: skip
# Ours, for a quarter of an hour of speech and two cores.
ONE_CYCLE = (0.95, 0.999)
LIGHT, STRONG = SpecAugment(1, 10, 1, 10, 0.1), SpecAugment(2, 15, 2, 20, 0.2)
RECIPES = {
    ("cnn-lstm", "demo"): Recipe(20, 8, 3e-3, "one-cycle", 400.0, (0.0, 10.0), STRONG, betas=ONE_CYCLE),
    ("rnnt", "demo"): Recipe(18, 8, 4e-3, "one-cycle", 5.0, (0.0, 10.0), LIGHT, betas=ONE_CYCLE),
    ("conformer", "demo"): Recipe(16, 8, 2e-3, "one-cycle", 5.0, (0.0, 10.0), LIGHT, betas=ONE_CYCLE),
    ("cnn-lstm", "paper"): PAPER,
    ("rnnt", "paper"): PAPER,
    ("conformer", "paper"): PAPER_CONFORMER,
}
# AN4, 38 minutes, at three speeds: tuned on valid alone (docs/notes.md).
AN4 = {
    "cnn-lstm": {"epochs": 80},
    "rnnt": {"epochs": 60, "lr": 2.5e-3, "dropout": 0.3, "ctc_weight": 1.0},
    "conformer": {"epochs": 60, "dropout": 0.3},
}
RECIPES |= {
    (backbone, "an4"): dataclasses.replace(
        RECIPES[backbone, "demo"], speeds=(0.9, 1.0, 1.1), augment=LIGHT, **AN4[backbone]
    )
    for backbone in AN4
}
RECIPE_NAMES = ("demo", "an4", "paper")
OF_SIZE = {"demo": "demo", "wide": "demo", "wider": "demo", "paper": "paper"}  # if --recipe does not say


def settle(model: torch.nn.Module, recipe: Recipe) -> None:
    """Give the model the recipe's dropout, in all its layers, and weight of the CTC loss, if it has them."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and recipe.dropout is not None:
            module.p = recipe.dropout
    if recipe.ctc_weight is not None:
        model.ctc_weight = recipe.ctc_weight


def optimizer_of(model: torch.nn.Module, recipe, ends: list[int]):
    """Adam or AdamW, and its schedule of the learning rate. ends: steps after which each epoch ends."""
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
    optimizer = kind(model.parameters(), recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay)
    if recipe.schedule == "one-cycle":
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=ends[-1])
    factors = {  # of lr, by the steps that are done
        "anneal": lambda done: recipe.anneal ** -(bisect.bisect_right(ends, done) // recipe.stretch),
        "transformer": lambda done: min(ratio := (done + 1) / recipe.stretch / recipe.warmup, ratio**-0.5),
        "constant": lambda done: 1.0,
    }
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factors[recipe.schedule])


def epoch_and_batch(ends: list[int], step: int, recipe) -> tuple[int, int]:
    """Where a step of the recipe is: its epoch, from 0, and the batches of it that are done. ends: of the epochs."""
    epoch = bisect.bisect_right(ends, step)
    return epoch, (step - (ends[epoch - 1] if epoch else 0)) * recipe.accumulate
