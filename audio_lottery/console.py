"""The manners of every command: what cannot be is one line on stderr that names it, and exit code 2.

What files, names and settings of others say is printed through printable(), and put into Markdown by markdown_text().
"""

import argparse
import re
import sys
import unicodedata
from collections.abc import Sequence
from typing import NoReturn

from audio_lottery import __version__

# ---------------------------------------------------------------------------- foreign text

JOINERS = "\u200c\u200d"  # formats, but Persian and Indic words are spelled with them
UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (directions, invisible), surrogate, line and paragraph ends


def printable(text: object) -> str:
    """str(text) on one line, safe on a terminal and in UTF-8: what controls, hides, turns or ends a line is escaped.

    Escapes are Python's: \\x1b, \\n, \\u202e, \\ud800. A byte of a file name that is no UTF-8 is \\xff, as it is in
    bytes. All else stays, whatever the script; a backslash too, so that this is for reading, not for reading back.
    """
    return re.sub(r"[^ -~]", lambda found: _shown(found[0]), str(text))


def _shown(character: str) -> str:
    if unicodedata.category(character) not in UNSAFE or character in JOINERS:
        return character
    if "\udc80" <= character <= "\udcff":  # how Python holds such a byte (PEP 383)
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def markdown_text(text: object) -> str:
    """printable(text) as Markdown that shows it letter for letter, in a paragraph, a heading or a cell of a table.

    No HTML, link, code, emphasis, mathematics, heading or list can come of it. A _ within a word stays: it is none.
    """
    line = re.sub(r"[\\`*\[\]<>#|~&$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text).strip())
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", line)  # what begins a list or underlines a heading


# ---------------------------------------------------------------------------- the command line


class Parser(argparse.ArgumentParser):
    """argparse, with --version, whole flag names only, one line an error, and negative numbers as values of flags."""

    def __init__(self, *args, **options):
        super().__init__(*args, allow_abbrev=False, **options)
        self.add_argument("--version", action="version", version=f"Audio Lottery {__version__}")

    def error(self, message: str) -> NoReturn:
        """One line, exit code 2 (argparse prints its usage above it)."""
        self.exit(2, f"{self.prog}: error: {printable(message)}\n")

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
    print(f"{program}: error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return 2
