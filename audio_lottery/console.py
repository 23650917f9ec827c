"""The manners of every command: what cannot be is one line on stderr that names it, and exit code 2.

What files, names and settings of others say is printed through printable(), and put into Markdown by markdown_text().
"""

import argparse
import contextlib
import faulthandler
import functools
import json
import os
import re
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Sequence
from typing import NoReturn

from audio_lottery import __version__

# ---------------------------------------------------------------------------- foreign text

JOINERS = "\u200b\u200c\u200d\u180e"  # formats, but Khmer, Persian, Indic and Mongolian are spelled with them
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


def _as_json(found: re.Match) -> str:
    """\\u and four digits, twice for a character beyond 16 bits."""
    units = found[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))


def markdown_text(text: object) -> str:
    """printable(text) as Markdown that shows it letter for letter, in a paragraph, a heading or a cell of a table.

    No HTML, link, code, emphasis, mathematics, heading or list can come of it. A _ within a word stays: it is none.
    """
    line = re.sub(r"[\\`*\[\]<>#|~&$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", printable(text).strip())
    return re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", line)  # what begins a list or underlines a heading


def json_line(row: dict) -> str:
    """JSON in which all that is not printable() is written \\u and four digits. Half a surrogate pair, too, which is
    how a name that is no UTF-8 is read back: os.fsencode() gives its bytes."""
    escaped = lambda found: found[0] if printable(found[0]) == found[0] else json.dumps(found[0])[1:-1]  # noqa: E731
    return re.sub(r"[^ -~]", escaped, json.dumps(row, ensure_ascii=False))


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
        """As argparse does, but `--snr -5:10` means `--snr=-5:10`: what starts like a number is no flag.

        An empty argument is refused: no name or value is, and as a path it would be the current folder.
        """
        joined: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            if not word or re.fullmatch("--[^=]+=", word):
                before = word[:-1] or (joined[-1] if joined and joined[-1].startswith("--") else "")
                self.error(f"{before}: an empty argument" if before else "an empty argument ('')")
            if joined and re.match(r"-\.?\d", word) and re.fullmatch(r"--[^=]+", joined[-1]):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return super().parse_known_args(joined, namespace)


def fail(program: str, error: Exception) -> int:
    """Say in one line on stderr what was wrong; the exit code for it. An OSError is its path and why."""
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        if isinstance(error, BrokenPipeError) and error.filename == STDOUT:
            raise error  # no error of the command's: `command` answers it
        text = f"{os.fsdecode(error.filename)}: {error.strerror}"
    print(f"{program}: error: {printable(' '.join(text.split()))}", file=sys.stderr)
    return 2


# ---------------------------------------------------------------------------- streams that nobody reads

STDOUT = "stdout"  # the name of what cannot be written, in an OSError


class Stream:
    """stdout or stderr of a command. What cannot be written is an OSError that names the stream, or is left out.

    After the first time nothing more is tried. All that it does not say itself is the stream's behind it.
    """

    def __init__(self, behind, gives_up: Callable[[OSError], None] | None):
        """gives_up: called with the error, once, in place of raising it."""
        self.behind, self.gives_up, self.error = behind, gives_up, None

    def __getattr__(self, name: str):
        return getattr(self.behind, name)

    def write(self, text: str) -> int:
        try:
            self._call(self.behind.write, text)
        except UnicodeEncodeError:  # half a surrogate pair, or a terminal of another encoding
            self._call(self.behind.write, re.sub(r"[^\0-\x7f]", _as_json, text))  # so that JSON stays JSON
        return len(text)

    def flush(self) -> None:
        self._call(self.behind.flush)

    def _call(self, function: Callable, *arguments) -> None:
        if self.error:
            return
        try:
            function(*arguments)
        except OSError as error:
            self.error = type(error)(error.errno, error.strerror, STDOUT)
            _to_nowhere(self.behind)
            if not self.gives_up:
                raise self.error from None
            self.gives_up(self.error)


def _to_nowhere(stream) -> None:
    """Let what is still in the stream's buffer go to /dev/null: Python complains at its end otherwise."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def open_closed() -> None:
    """Let stdin, stdout and stderr be there if they were closed: empty, not to be written to, and /dev/null.

    Else the next file that is opened gets their number, and what a library prints goes into it.
    """
    for number, (name, mode, flags) in enumerate(
        (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY))
    ):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.open(os.devnull, flags), mode))


def receive_signals_apart() -> None:
    """Let signals come in on a stack of their own, faulthandler's, which Python's handlers use where it is there.

    oneDNN's products of float32 let the stack pointer point into the heap while they compute: the frame of a signal
    that comes meanwhile would be written over weights, or over what malloc keeps (their issue 4845; in torch 2.11).
    """
    if not faulthandler.is_enabled():
        faulthandler.enable(file=2)


def leave_signals_to_the_parent(_worker: int) -> None:
    """In a worker process: what comes to the whole group is the parent's to answer. A SIGTERM that comes later than the
    first is the parent's own."""
    came: list[float] = []

    def end(*_) -> None:
        came.append(time.monotonic())
        if came[-1] - came[0] > 0.2:  # seconds; `timeout` sends it twice at once
            os._exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def command(program: str, goes_on: bool = False):
    """Decorates main(argv) -> exit code of every command, so that no stream and no missing package is a traceback.

    stderr is written to as long as it can be. What cannot be written to stdout ends the command: in silence and with
    141 where its reader has left (as `| head` does), else in one line and with 2; goes_on: that line, if any, and the
    work goes on unseen. Ctrl-C is 130, a package that is not there one line and 2.
    """

    def decorate(main: Callable[..., int]):
        @functools.wraps(main)
        def guarded(argv: list[str] | None = None) -> int:
            open_closed()
            receive_signals_apart()
            before = out, err = sys.stdout, sys.stderr

            def unseen(error: OSError) -> None:
                if not isinstance(error, BrokenPipeError):
                    print(f"{program}: {STDOUT}: {error.strerror}: going on unseen", file=sys.stderr)

            sys.stderr = Stream(err, lambda error: None)
            sys.stdout = Stream(out, unseen if goes_on else None)
            try:
                return _called(program, main, argv)
            finally:
                sys.stdout, sys.stderr = before

        return guarded

    return decorate


def _called(program: str, main: Callable[..., int], argv: list[str] | None) -> int:
    """The exit code of main, all that it printed being written."""
    stdout = sys.stdout
    try:
        try:
            code = main(argv)
            stdout.flush()
        except SystemExit as stop:  # argparse's; behind --help it has taken an OSError for good
            stdout.flush()
            if stop.code or not stdout.error:
                raise
            if stdout.gives_up and not isinstance(stdout.error, BrokenPipeError):
                return 2  # it is said already
            raise stdout.error from None
        return code
    except BrokenPipeError as error:
        if error.filename != STDOUT:
            return fail(program, error)
        return 128 + 13
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if not re.search("out of memory|allocate memory|DataLoader worker", str(error)):
            raise
        return fail(program, ValueError(str(error).splitlines()[0]))
    except ModuleNotFoundError as error:
        return fail(program, ValueError(f"the package {error.name} is not there: pip install {error.name}"))
    except OSError as error:
        return fail(program, error)
