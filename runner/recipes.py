"""How each network is trained if no flag says otherwise: the paper's recipe, and ours for small corpora."""

from dataclasses import dataclass

import models
from data import SpecAugment


@dataclass(frozen=True)
class Recipe:
    epochs: int
    batch_size: int
    lr: float
    # "one-cycle": the learning rate rises to lr and falls to 0 over all steps, beta1 falls from 0.95 to 0.85 and rises
    # again (Smith & Topin 2019, torch's defaults); "anneal": lr / 1.1 after each epoch
    schedule: str
    clip: float  # of the gradient's norm
    seconds: tuple[float, float]  # shortest and longest utterance that is trained on; all are evaluated
    augment: SpecAugment
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    batch_seconds: float | None = None  # seconds of audio a batch, padding counted, instead of batch_size
    accumulate: int = 1  # batches a step
    amp: bool = False  # bfloat16 autocast in the forward pass


# The paper's, for every backbone at --size paper (its time warping left out).
PAPER = Recipe(16, 32, 3e-4, "anneal", 400.0, (1.0, 15.0), SpecAugment(1, 27, 1, 70))
# Ours, for a quarter of an hour of speech and two cores.
ONE_CYCLE = (0.95, 0.999)
LIGHT, STRONG = SpecAugment(1, 10, 1, 10, 0.1), SpecAugment(2, 15, 2, 20, 0.2)
RECIPES = {
    ("cnn-lstm", "demo"): Recipe(20, 8, 3e-3, "one-cycle", 400.0, (0.0, 10.0), STRONG, betas=ONE_CYCLE),
    ("rnnt", "demo"): Recipe(18, 8, 4e-3, "one-cycle", 5.0, (0.0, 10.0), LIGHT, betas=ONE_CYCLE),
    ("conformer", "demo"): Recipe(16, 8, 2e-3, "one-cycle", 5.0, (0.0, 10.0), LIGHT, betas=ONE_CYCLE),
    **{(backbone, "paper"): PAPER for backbone in models.BACKBONES},
}
# the demo's, for networks of nearly four and eight to nine times its weights
RECIPES |= {(backbone, size): RECIPES[backbone, "demo"] for backbone in models.BACKBONES for size in ("wide", "wider")}
