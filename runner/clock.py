"""Where a run stands: which round of how many, and about how long the rest takes."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Place(NamedTuple):
    """A round in its run. Of a search the rounds are 0, 1, 2, ...; with --ticket those that are trained."""

    number: int
    rounds: Sequence[int] = ()  # of the run; none: this round is trained by itself
    seconds: Sequence[float] = ()  # of the rounds so far, less one that is taken from another run

    @property
    def title(self) -> str:
        rounds = list(self.rounds)
        if not rounds:
            return f"round {self.number}"
        if rounds == list(range(len(rounds))):
            return f"round {self.number} of {len(rounds)}"
        return f"round {self.number} ({rounds.index(self.number) + 1} of {len(rounds)})"

    def left(self, done: float, elapsed: float) -> str:
        """Until all rounds are done, as those so far took; in the first one, as it took. "" where nothing is known.

        done: share of this round, behind `elapsed` seconds.
        """
        if not (self.seconds or done):
            return ""
        a_round = statistics.fmean(self.seconds) if self.seconds else elapsed / done
        behind = len(self.rounds) - 1 - list(self.rounds).index(self.number) if self.rounds else 0
        return f"{in_words(a_round * (behind + 1 - done))} left"


def in_words(seconds: float) -> str:
    """Roughly: 40 s, 9 min, 2 h 5 min, 3 d 4 h."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"
