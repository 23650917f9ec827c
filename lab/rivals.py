"""Rivals of the search at equal compute: with its data, seeds and recipe, and steps told beside each in the ledger.

Searches of their own, which prune the same ladder and whose weights go on from round to round:

    finetune       at a constant tenth of the highest learning rate (Han et al. 2015)
    lr-rewind      the schedule begins anew each round (Renda et al. 2020)

One training from theta_0 for each round of the search, to that round's count of weights:

    gradual        as long as one round; masks shrink on the cubic schedule of Zhu and Gupta 2017
    gradual-long   the same, as long as the whole search up to that round
    dense-long     no masks: dense, as long as the whole search up to that round
"""

import bisect
import dataclasses
import math
from collections.abc import Sequence

from torch import nn

import lottery
from audio_lottery import ledger

SEARCHES = ledger.GO_ON  # finetune and lr-rewind
TRAININGS = (*ledger.GRADUAL, "dense-long")
RIVALS = (*SEARCHES, *TRAININGS)
UNREWOUND = (*SEARCHES, *ledger.GRADUAL)  # their tickets start from no rewind state


def recipe_of(recipe, control: str | None, number: int, steps: int, rewind_step: int):
    """The recipe of round `number`. steps: of round 0; rewind_step: a later round has as many fewer."""
    if control == "finetune" and number:
        return dataclasses.replace(recipe, schedule="constant", lr=recipe.lr / 10)
    if control in ("gradual-long", "dense-long") and number:
        epochs = math.ceil(recipe.epochs * (steps + number * (steps - rewind_step)) / steps)
        return dataclasses.replace(recipe, epochs=epochs, stretch=epochs / recipe.epochs)
    return recipe


class Gradual(lottery.Ticket):
    """A ticket whose masks shrink as it trains: kept(s) = keep + (all - keep) * left(s) ** 3 (Zhu and Gupta 2017).

    left falls from 1 to 0 between a tenth and seven tenths of the steps, and masks change once in a hundredth
    of all; the rest lets the network recover. Only epochs that end there count.
    """

    def __init__(self, model: nn.Module, pruning: lottery.Pruning, keep: int, exclude: Sequence[str] = ()):
        super().__init__(model, 0, pruning, exclude)
        self.units, self.keep, self.settled = self.kept_units, keep, 0

    def spread(self, ends: list[int]) -> int:
        """Over a training whose epochs end after so many steps. Returns the epochs that end while masks change."""
        steps = ends[-1]
        self.begin, self.settled, self.every = steps // 10, max(1, 7 * steps // 10), max(1, steps // 100)
        return bisect.bisect_left(ends, self.settled)

    def kept_at(self, step: int) -> int:
        left = min(1, max(0, (self.settled - step) / (self.settled - self.begin)))
        return self.keep + round((self.units - self.keep) * left**3)

    def stepped(self) -> None:
        super().stepped()
        due = (self.steps - self.begin) % self.every == 0 or self.steps == self.settled
        if due and self.begin < self.steps <= self.settled and self.kept_at(self.steps) < self.kept_units:
            self.prune(self.kept_at(self.steps))
        self.after_step()  # what the optimizer remembers of a weight moves it once it is pruned, too


def ticket_of(
    control: str, model: nn.Module, pruning: lottery.Pruning, keep: int, number: int, exclude: Sequence[str] = ()
) -> lottery.Ticket:
    """What one of TRAININGS trains in the place of round `number`, whose masks keep `keep` units.

    model: at theta_0. exclude: what the run keeps dense.
    """
    whole = control == "dense-long"
    ticket = lottery.Ticket(model, 0, pruning, exclude) if whole else Gradual(model, pruning, keep, exclude)
    ticket.round = number
    return ticket
