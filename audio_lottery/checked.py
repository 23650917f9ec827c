"""The one reader of JSON that may come from a stranger: bounded, finite, and of a declared shape.

    rows = parse(content, "ledger.jsonl, line 1")     # or a LotteryError that names the place
    ROW(rows, "ledger.jsonl, line 1")                 # a shape: a call that returns nothing, or the same error

A shape is made of the functions below: `record({"seed": integer(), ...}, {"block": listed(integer(1), 2, 2)})`.
"""

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from lottery import LotteryError

Shape = Callable[[object, str], None]  # value, where it stands -> nothing, or a LotteryError
DEPTH = 32  # lists and objects in each other; this program writes 4
WHOLE = 2**63  # integers lie below
LIMIT = 64 * 2**20  # bytes of a file of JSON: a ledger of 1,000 rounds on 10,000 utterances has 50 MB
SURROGATE = re.compile("[\ud800-\udfff]")


# ---------------------------------------------------------------------------- bytes


@contextlib.contextmanager
def opened(path: Path, what: str) -> Iterator[tuple[int, int]]:
    """The open file's number and its size. Raises LotteryError, naming it, unless it is a regular file.

    An OSError in here is one that it cannot be read.
    """
    if "\0" in str(path):
        raise LotteryError(f"{str(path)!r}: cannot read the {what} (no name of a file)")
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer must not block
        try:
            status = os.fstat(number)
            if not stat.S_ISREG(status.st_mode):
                raise LotteryError(f"{path}: cannot read the {what} (not a regular file)")
            yield number, status.st_size
        finally:
            os.close(number)
    except OSError as error:
        raise LotteryError(f"{path}: cannot read the {what} ({error.strerror})") from None


def read_on(number: int, count: int) -> bytes:
    """The next `count` bytes of an open file; fewer if it ends."""
    parts = []
    while count > 0 and (part := os.read(number, min(count, 2**30))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def read_bytes(path: Path, what: str, limit: int = LIMIT) -> bytes:
    """The whole file. Raises LotteryError, naming it, unless it is a regular file of at most `limit` bytes."""
    with opened(path, what) as (number, size):
        if size > limit:
            raise LotteryError(f"{path}: cannot read the {what} ({size:,} bytes; at most {limit:,} are read)")
        return read_on(number, limit)


# ---------------------------------------------------------------------------- JSON


def _integer(text: str) -> int:
    if len(text) > 20 or not -WHOLE < int(text) < WHOLE:
        raise ValueError(f"a number of {len(text)} characters")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]}")
    return value


def _pairs(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice in one object")
    return found


_DECODER = json.JSONDecoder(
    parse_int=_integer, parse_float=_number, parse_constant=_number, object_pairs_hook=_pairs
)  # made once: a manifest has a million lines


def _depth(value: object, halves: bool) -> None:
    """Raise ValueError if lists and objects go deeper than DEPTH, or, unless `halves`, for half a surrogate pair."""
    level = [value]
    for depth in range(DEPTH + 1):
        texts = [v for v in level if isinstance(v, str)]
        texts += [key for v in level if isinstance(v, dict) for key in v]
        if not halves and any(map(SURROGATE.search, texts)):
            raise ValueError("half a surrogate pair, which no UTF-8 text can hold")
        level = [v for v in level if isinstance(v, (list, dict))]
        if level and depth == DEPTH:
            raise ValueError(f"deeper than {DEPTH} levels")
        level = [item for v in level for item in (v.values() if isinstance(v, dict) else v)]


def parse(
    content: bytes | str, where: str, shape: Shape | None = None, what: str = "JSON", halves: bool = False
):  # fmt: skip
    """The value that JSON in UTF-8 stands for: numbers finite, integers below 2^63, names once, DEPTH levels at most.

    halves: let half a surrogate pair through, as which Python holds a byte of a file name that is no UTF-8.
    Raises LotteryError, which begins with `where`, for anything else, and as `shape` does.
    """
    try:
        text = content.decode("utf-8") if isinstance(content, bytes) else content
        value = _DECODER.decode(text)
        utf8 = isinstance(content, bytes) and "\\u" not in text  # without half a surrogate pair, then
        if not (halves or utf8) or text.count("[") + text.count("{") > DEPTH:
            _depth(value, halves)
    except (ValueError, RecursionError) as error:
        why = f"deeper than {DEPTH} levels" if isinstance(error, RecursionError) else error
        raise LotteryError(f"{where}: not {what} that can be read ({why})") from None
    if shape:
        shape(value, where)
    return value


def read_json(path: Path, what: str, shape: Shape | None = None, limit: int = LIMIT):
    """The value in a file of JSON. Raises LotteryError, naming the file, as read_bytes, parse and `shape` do."""
    return parse(read_bytes(path, what, limit), str(path), shape, f"a {what}")


# ---------------------------------------------------------------------------- shapes


def said(value: object) -> str:
    """A value in an error, short."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse(where: str, rule: str, value: object) -> None:
    raise LotteryError(f"{where}: must be {rule}, got {said(value)}")


def number(low: float = -1e300, high: float = 1e300) -> Shape:
    """A finite number from low to high."""

    def check(value: object, where: str) -> None:
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not good or not low <= value <= high:  # a NaN is not
            _refuse(where, f"a number from {low:g} to {high:g}", value)

    return check


def integer(low: int = 0, high: int = WHOLE - 1) -> Shape:
    def check(value: object, where: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            _refuse(where, f"a whole number from {low} to {high}", value)

    return check


def text(pattern: str = "", most: int = 10_000, rule: str = "") -> Shape:
    """A string that the pattern, if there is one, matches whole; rule: the pattern in words."""

    def check(value: object, where: str) -> None:
        if not isinstance(value, str) or len(value) > most or SURROGATE.search(value):
            _refuse(where, f"a text of at most {most} characters", value)
        if pattern and not re.fullmatch(pattern, value):
            _refuse(where, rule or f"as {pattern}", value)

    return check


def one_of(*words: str) -> Shape:
    def check(value: object, where: str) -> None:
        if not isinstance(value, str) or value not in words:
            _refuse(where, f"one of {', '.join(words)}", value)

    return check


def switch(value: object, where: str) -> None:
    """True or False."""
    if not isinstance(value, bool):
        _refuse(where, "true or false", value)


def maybe(shape: Shape) -> Shape:
    """null, or of the shape."""

    def check(value: object, where: str) -> None:
        if value is not None:
            shape(value, where)

    return check


def listed(shape: Shape, least: int = 0, most: int = 10_000_000) -> Shape:
    """A list of `least` to `most` values of one shape."""

    def check(value: object, where: str) -> None:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            _refuse(where, f"a list of {least if least == most else f'{least} to {most}'} values", value)
        for i, item in enumerate(value):
            shape(item, f"{where}[{i}]")

    return check


def tupled(*shapes: Shape) -> Shape:
    """A list of as many values as there are shapes, each of its own."""
    as_many = listed(anything, len(shapes), len(shapes))

    def check(value: object, where: str) -> None:
        as_many(value, where)
        for i, (item, shape) in enumerate(zip(value, shapes)):
            shape(item, f"{where}[{i}]")

    return check


def keyed(shape: Shape, most: int = 100_000) -> Shape:
    """An object with values of one shape, under any names."""

    def check(value: object, where: str) -> None:
        if not isinstance(value, dict) or len(value) > most or not all(isinstance(key, str) for key in value):
            _refuse(where, f"an object of at most {most} values", value)
        for key, item in value.items():
            shape(item, f"{where}, {key}")

    return check


def record(needed: dict[str, Shape], may: dict[str, Shape] | None = None, others: bool = True) -> Shape:
    """An object that has all of `needed`, may have `may`, and (others) anything else."""
    shapes = needed | (may or {})

    def check(value: object, where: str) -> None:
        if not isinstance(value, dict):
            _refuse(where, "an object", value)
        if missing := [key for key in needed if key not in value]:
            raise LotteryError(f"{where}: a value is missing: {', '.join(missing)}")
        if unknown := [] if others else [key for key in value if key not in shapes]:
            raise LotteryError(f"{where}: has {said(unknown[0])}, which nothing here writes")
        for key, shape in shapes.items():
            if key in value:
                shape(value[key], f"{where}, {key}")

    return check


def anything(value: object, where: str) -> None:
    """Whatever `parse` lets through."""


SHA256 = text("[0-9a-f]{64}", rule="a SHA-256, 64 hex digits")
OBJECT = record({})
