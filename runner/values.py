"""What reads the values of flags that are more than a number or a word. Raises argparse's own error, in a line."""

import argparse
import itertools
import re


def low_high(text: str) -> tuple[float, float]:
    """LO:HI, two numbers with 0 <= LO < HI <= 1e7."""
    try:
        low, high = map(float, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be LO:HI, two numbers of seconds, got {text!r}") from None
    if not 0 <= low < high <= 1e7:
        raise argparse.ArgumentTypeError(f"must be LO:HI with 0 <= LO < HI <= 1e7, got {text!r}")
    return low, high


def rows_by_columns(text: str) -> tuple[int, int]:
    """RxC, two whole numbers of at least 1."""
    if not re.fullmatch("[1-9][0-9]{0,8}x[1-9][0-9]{0,8}", text):
        raise argparse.ArgumentTypeError(f"must be RxC, rows and columns of a block, both at least 1, got {text!r}")
    rows, columns = map(int, text.split("x"))
    return rows, columns


def decibels(text: str, separator: str) -> tuple[float, ...]:
    """Numbers between the separators, each in [-100, 100]."""
    values = tuple(float(value) + 0.0 for value in text.split(separator))  # -0 is 0
    if not all(-100 <= value <= 100 for value in values):
        raise ValueError
    return values


def snr_range(text: str) -> tuple[float, float]:
    """LO:HI, in dB."""
    try:
        low, high = decibels(text, ":")
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be LO:HI, two numbers of dB in [-100, 100], got {text!r}") from None
    if low > high:
        raise argparse.ArgumentTypeError(f"must be LO:HI with LO <= HI, got {text!r}")
    return low, high


def snr_list(text: str) -> tuple[float, ...]:
    """A,B,..., in dB."""
    try:
        values = decibels(text, ",")
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be A,B,..., numbers of dB in [-100, 100], got {text!r}") from None
    if len({f"{value:g}" for value in values}) < len(values):
        raise argparse.ArgumentTypeError(f"must not name an SNR twice, got {text!r}")
    return values


def speeds(text: str) -> tuple[float, ...]:
    """A,B,..., from slow to fast, each in [0.5, 2] and of two decimals at most, so that resampling is by small whole
    numbers."""
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be A,B,..., speeds, got {text!r}") from None
    rising = all(a < b for a, b in itertools.pairwise(values)) and values == tuple(round(value, 2) for value in values)
    if not rising or not 0.5 <= values[0] <= values[-1] <= 2:
        rule = "from 0.5 to 2, each above the one before and of two decimals at most"
        raise argparse.ArgumentTypeError(f"must be A,B,... {rule}, got {text!r}")
    return values


def shares(text: str) -> tuple[float, ...]:
    """A,B,..., shares of the weights, from dense to sparse."""
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be A,B,..., shares of the weights, got {text!r}") from None
    falling = all(a > b for a, b in itertools.pairwise((1, *values, 0)))
    if not falling:
        raise argparse.ArgumentTypeError(f"must be A,B,... between 1 and 0, each below the one before, got {text!r}")
    return values
