"""Texts word beside word: jiwer's alignment of what one or several systems recognised with what was said."""

import itertools
import unicodedata
from collections.abc import Sequence

import jiwer

from audio_lottery.console import markdown_text, printable
from lab import plan

Pair = tuple[str | None, str | None]  # a word of the reference and one recognised; None where there is none
Column = tuple[str | None, ...]  # a word of the reference, then one a system
LEFT_OUT = "—"
WIDTH = 100  # places of a line of an alignment, the names in front not counted
MOST = 200  # columns that are shown
LONGEST = 60  # characters of a word that are shown


def pairs(reference: str, said: str) -> list[Pair]:
    """In order: equal words, substitutions, deletions (word, None), insertions (None, word)."""
    found = jiwer.process_words(reference, said)
    words, others = found.references[0], found.hypotheses[0]
    return [
        pair
        for chunk in found.alignments[0]
        for pair in itertools.zip_longest(
            words[chunk.ref_start_idx : chunk.ref_end_idx], others[chunk.hyp_start_idx : chunk.hyp_end_idx]
        )
    ]


def errors(found: list[Pair]) -> int:
    return sum(word != other for word, other in found)


def columns(reference: str, said: Sequence[str]) -> list[Column]:
    """The words of the reference with what each system has in their place, and between them what it has besides."""
    aligned = [pairs(reference, text) for text in said]
    words = [word for word, _ in aligned[0] if word is not None]
    found: list[Column] = []
    for word, places in itertools.zip_longest(words, zip(*map(_by_place, aligned))):
        found += [(None, *more) for more in itertools.zip_longest(*(besides for besides, _ in places))]
        found += [(word, *(instead for _, instead in places))] if word is not None else []
    return found


def _by_place(found: list[Pair]) -> list[tuple[list[str], str | None]]:
    """For each word of the reference, and for its end: the words inserted before it, and what stands in its place."""
    places, besides = [], []
    for word, other in found:
        if word is None:
            besides.append(other)
        else:
            places.append((besides, other))
            besides = []
    return [*places, (besides, None)]


# ---------------------------------------------------------------------------- as lines of text, and as Markdown


def shown(word: str | None) -> str:
    """A word on one line, its end cut off if it is as long as no word is; None is no word."""
    word = printable(word or "")
    return word if len(word) <= LONGEST else f"{word[: LONGEST - 1]}…"


def width(text: str) -> int:
    """Places that a text takes on a terminal: none for marks and joiners, two for wide characters."""
    return sum(0 if is_above(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def is_above(character: str) -> bool:
    """Does it share the place of the letter before? (Hangul's vowels and finals do, as syllables are put together.)"""
    jamo = "\u1160" <= character <= "\u11ff" or "\ud7b0" <= character <= "\ud7ff"
    return jamo or unicodedata.category(character) in ("Mn", "Me", "Cf")


def folded(found: list[Column], between: int) -> tuple[list[list[Column]], int]:
    """The columns in lines of WIDTH places, `between` of them between two; and how many are left out (beyond MOST)."""
    lines, used = [], WIDTH
    for column in found[:MOST]:
        places = between + max(3, *(width(shown(word)) for word in column))
        if used + places > WIDTH:
            lines.append([])
            used = 0
        lines[-1].append(column)
        used += places
    return lines, len(found) - len(found[:MOST])


def left_out(count: int) -> list[str]:
    return [f"... and {count} words more"] if count else []


def text_lines(names: Sequence[str], found: list[Column]) -> list[str]:
    """For a terminal, as jiwer shows alignments: *** where there is no word, and S, D or I below an error.

    names: of the reference and of each system.
    """
    room, lines = max(map(width, names)), []
    folds, more = folded(found, 1)
    for fold in folds:
        cells = [[_text(column, n) for n in range(len(names))] for column in fold]
        wide = [max(map(width, texts)) for texts in cells]
        for n, name in enumerate(names):
            rows = [[texts[n] for texts in cells]]
            rows += [[_letter(column, n) for column in fold]] if n else []
            for label, row in zip((name, ""), rows):
                line = " ".join(text + " " * (w - width(text)) for text, w in zip(row, wide)).rstrip()
                lines += [f"  {label}{' ' * (room - width(label))}  {line}".rstrip()] if line else []
    return lines + [f"  {line}" for line in left_out(more)]


def _text(column: Column, n: int) -> str:
    """*** where a word is left out, and in the reference where one is inserted."""
    if column[n] is not None:
        return shown(column[n])
    return "" if n and column[0] is None else "***"


def _letter(column: Column, n: int) -> str:
    if column[n] == column[0]:
        return ""
    return "I" if column[0] is None else "D" if column[n] is None else "S"


def markdown_lines(names: Sequence[str], found: list[Column]) -> list[str]:
    """Tables whose head is the reference; errors are bold, and a word that is left out is a bold dash."""
    folds, more = folded(found, 3)
    lines: list[str] = []
    for fold in folds:
        rows = [[names[0], *(markdown_text(shown(column[0])) for column in fold)]]
        for n, name in enumerate(names[1:], 1):
            rows.append([name, *(_cell(column, n) for column in fold)])
        lines += ["", *plan.markdown(rows[0], rows[1:])]
    return lines + [line for text in left_out(more) for line in ("", text)]


def _cell(column: Column, n: int) -> str:
    if column[n] == column[0]:
        return markdown_text(shown(column[n]))
    return f"**{markdown_text(shown(column[n])) if column[n] is not None else LEFT_OUT}**"
