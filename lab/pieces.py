"""A recording in pieces that overlap: cut as it is decoded, and the words of the pieces joined."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import data
from models import Emission


class Word(NamedTuple):
    word: str
    start: float  # seconds
    end: float
    confidence: float  # the lowest probability among its tokens


def words_of(emissions: Iterable[Emission], tokens: list[str], frame: float, offset: float = 0.0) -> list[Word]:
    """The words that the tokens spell. frame: seconds; offset: seconds, of frame 0."""
    words, spelled = [], None
    for emission in emissions:
        for character in tokens[emission.token].replace(data.SPACE, " "):
            if character.isspace():
                spelled = None
            elif spelled is None:
                spelled = [character, emission.start, emission.end, emission.probability]
                words.append(spelled)
            else:
                spelled[0] += character
                spelled[2:] = emission.end, min(spelled[3], emission.probability)
    return [
        Word(text, offset + start * frame, offset + end * frame, 0.0 if math.isnan(p) else p)  # as of infinite logits
        for text, start, end, p in words
    ]


def pieces_of(blocks: Iterable[Tensor], piece: int, overlap: int) -> Iterator[tuple[int, Tensor]]:
    """Blocks (N,) of a recording, one at least -> where each piece starts, and its samples (M,), M <= piece."""
    start, kept = 0, []
    for block in blocks:
        kept.append(block)
        if sum(map(len, kept)) > piece:
            (*_, whole) = kept = [torch.cat(kept)]
            while len(whole) > piece:
                yield start, whole[:piece]
                start, whole = start + piece - overlap, whole[piece - overlap :]
            kept = [whole]
    yield start, torch.cat(kept)


def seam(there: list[Word], more: list[Word], start: float, before: float) -> float:
    """Where to join pieces that overlap from start to before: the middle of the widest pause in the overlap's middle
    half.

    there, more: the words of both. Without a pause, the edge of one of `there` that is nearest to the overlap's middle:
    so the other piece must hear a word later or earlier by half its length to have it on the other side.
    """
    low, high = start + (before - start) / 4, before - (before - start) / 4
    edges = [edge for word in there for edge in (word.start, word.end) if start < edge < before]
    at = min(edges, key=lambda edge: abs(2 * edge - low - high), default=(low + high) / 2)
    widest, spoken = 0.0, low
    for start, end in [*sorted((word.start, word.end) for word in there + more), (high, high)]:
        if min(start, high) - spoken > widest:
            widest, at = min(start, high) - spoken, (min(start, high) + spoken) / 2
        spoken = max(spoken, end)
    return at


def join(words: list[Word], before: float, start: float, more: list[Word]) -> None:
    """Add to the words of a recording so far, up to second `before`, those of its next piece, from `start` on.

    The words in the overlap, from `start` to `before`, come once.
    """
    first = len(words)
    while first and words[first - 1].end > start:
        first -= 1
    there = words[first:]  # those before stand, whatever comes
    at = seam(there, more, start, before)
    there = [word for word in there if word.start + word.end < 2 * at]
    more = [word for word in more if word.start + word.end >= 2 * at]
    if there and more and there[-1].word == more[0].word and more[0].start < there[-1].end:
        more = more[1:]  # one word on both sides of a seam without a pause
    words[first:] = there + more
