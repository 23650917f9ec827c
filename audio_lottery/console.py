"""The manners of every command: what cannot be is one line on stderr that names it, and exit code 2."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from audio_lottery import __version__


class Parser(argparse.ArgumentParser):
    """argparse, with --version, whole flag names only, one line an error, and negative numbers as values of flags."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)
        self.add_argument("--version", action="version", version=f"Audio Lottery {__version__}")

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2 (argparse prints its usage above it)."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """As argparse does, but `--snr -5:10` means `--snr=-5:10`: what starts like a number is no flag."""
        joined: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if joined and re.match(r"-\.?\d", word) and re.fullmatch(r"--[^=]+", joined[-1]):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return super().parse_known_args(joined, namespace)


def fail(program: str, error: Exception) -> int:
    """Say in one line on stderr what was wrong; the exit code for it."""
    print(f"{program}: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
