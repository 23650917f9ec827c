"""What every command prints: errors of one line, and foreign text that can do nothing but be read."""

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from audio_lottery import console
from audio_lottery.console import markdown_text, printable

PRINTED = {
    "plain.wav": "plain.wav",
    "Ærger ñ 日本語 नमी\u200cشد 👍": "Ærger ñ 日本語 नमी\u200cشد 👍",
    "a\nb\r\tc": r"a\nb\r\tc",
    "\x1b[31mred\x07": r"\x1b[31mred\x07",
    "\x1b]8;;http://x\x1b\\link": r"\x1b]8;;http://x\x1b\link",
    "\x9b2J\x85\x00\x7f": r"\x9b2J\x85\x00\x7f",
    "a\u2028b\u2029c": r"a\u2028b\u2029c",
    "user\u202egnp.exe\u2066\u200f\ufeff": r"user\u202egnp.exe\u2066\u200f\ufeff",
    "\ud800.wav": r"\ud800.wav",
    b"caf\xe9.wav".decode("utf-8", "surrogateescape"): r"caf\xe9.wav",
    "\U000e0041": r"\U000e0041",
    r"C:\new": r"C:\new",
    "": "",
}


@pytest.mark.parametrize("text", PRINTED)
def test_printable(text):
    shown = printable(text)
    assert shown == PRINTED[text]
    assert printable(shown) == shown and len(shown.splitlines()) <= 1
    shown.encode("utf-8")


def test_no_character_of_unicode_ends_a_line_or_starts_an_escape():
    codes = [*range(0x3100), *range(0xD800, 0xE010), *range(0xE0000, 0xE0100), *range(0x3100, sys.maxunicode + 1, 61)]
    everything = "".join(map(chr, codes))
    shown = printable(everything)
    assert len(shown.splitlines()) == 1 and shown.encode("utf-8").decode("utf-8") == shown
    assert not set(shown) & {chr(c) for c in [*range(32), *range(127, 160)]}
    assert set(map(chr, range(32, 127))) <= set(shown)  # ASCII that can be seen stays


MARKED = {
    "prompts-en, batch_size 8, seed 0.1": "prompts-en, batch_size 8, seed 0.1",
    "<img src=x onerror=alert(1)>": r"\<img src=x onerror=alert(1)\>",
    "# heading": r"\# heading",
    "a | b": r"a \| b",
    "`code` *b* _i_ ~~s~~ $x$ &lt;": r"\`code\` \*b\* \_i\_ \~\~s\~\~ \$x\$ \&lt;",
    "![x](y)": r"!\[x\](y)",
    "- item": r"\- item",
    "12. item": r"12\. item",
    "2) item": r"2\) item",
    "===": r"\===",
    "  a\n# b": r"a\\n\# b",
    "back\\slash|": r"back\\slash\|",
}


@pytest.mark.parametrize("text", MARKED)
def test_markdown_text(text):
    assert markdown_text(text) == MARKED[text]


def test_errors_are_one_safe_line(capsys):
    assert console.fail("x.py", ValueError("two\n  lines of \x1b[2J\udcff")) == 2
    assert capsys.readouterr().err == "x.py: error: two lines of \\x1b[2J\\xff\n"
    parser = console.Parser(prog="x.py")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--no-such\x1b]0;title\x07\nflag"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == "x.py: error: unrecognized arguments: --no-such\\x1b]0;title\\x07\\nflag\n"


# ---------------------------------------------------------------------------- streams that nobody reads


class Broken(io.StringIO):
    """A stream that cannot be written to."""

    def __init__(self, error):
        super().__init__()
        self.error, self.tries = error, 0

    def write(self, text):
        self.tries += 1
        raise self.error


def said_by(main, monkeypatch, capsys, stdout, goes_on=False, argv=None):
    """(exit code, stderr) of a command whose stdout is this."""
    monkeypatch.setattr(sys, "stdout", stdout)
    try:
        code = console.command("prog", goes_on)(main)(argv)
    except SystemExit as stop:
        code = stop.code
    assert sys.stdout is stdout  # as it was
    return code, capsys.readouterr().err


PIPE = BrokenPipeError(errno.EPIPE, "Broken pipe")
FULL = OSError(errno.ENOSPC, "No space left on device")
CLOSED = OSError(errno.EBADF, "Bad file descriptor")


@pytest.mark.parametrize(
    "error, code, said",
    [
        (PIPE, 141, ""),
        (FULL, 2, "prog: error: stdout: No space left on device\n"),
        (CLOSED, 2, "prog: error: stdout: Bad file descriptor\n"),
    ],
)
def test_what_cannot_be_printed_ends_a_command_in_a_line_or_in_silence(error, code, said, monkeypatch, capsys):
    def main(argv):
        try:
            print("one")
            print("two")
        except OSError as error:
            return console.fail("prog", error)
        return 0

    assert said_by(main, monkeypatch, capsys, Broken(error)) == (code, said)
    assert said_by(lambda argv: print("x") or 0, monkeypatch, capsys, Broken(error)) == (code, said)


def test_json_stays_json_in_another_encoding():
    behind = io.BytesIO()
    out = console.Stream(io.TextIOWrapper(behind, "latin-1"), None)
    row = {"text": "日é \U0001f600 \x85"}
    out.write(json.dumps(row, ensure_ascii=False))
    out.flush()
    assert json.loads(behind.getvalue().decode("ascii")) == row


def test_memory_that_runs_out_is_one_line(monkeypatch, capsys):
    def main(argv):
        raise RuntimeError("CUDA out of memory. Tried to allocate 9 GiB.\nmore of it")

    told = "prog: error: CUDA out of memory. Tried to allocate 9 GiB.\n"
    assert said_by(main, monkeypatch, capsys, io.StringIO()) == (2, told)
    with pytest.raises(RuntimeError, match="a bug"):
        said_by(lambda argv: (_ for _ in ()).throw(RuntimeError("a bug")), monkeypatch, capsys, io.StringIO())


@pytest.mark.parametrize(
    "error, said",
    [(PIPE, ""), (FULL, "prog: stdout: No space left on device: going on unseen\n")],
)
def test_a_run_goes_on_when_nobody_reads(error, said, monkeypatch, capsys):
    done, stdout = [], Broken(error)

    def main(argv):
        for i in range(3):
            print(i, flush=True)
            done.append(i)
        return 7

    assert said_by(main, monkeypatch, capsys, stdout, goes_on=True) == (7, said)
    assert done == [0, 1, 2] and stdout.tries == 1


def test_help_that_cannot_be_printed(monkeypatch, capsys):
    def main(argv):
        console.Parser(prog="prog").parse_args(argv)

    stdout = Broken(FULL)
    assert said_by(main, monkeypatch, capsys, stdout, argv=["--help"])[0] == 2
    assert said_by(main, monkeypatch, capsys, Broken(PIPE), argv=["--version"]) == (141, "")


def test_stderr_is_written_to_as_long_as_it_can_be(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(PIPE))
    assert console.command("prog")(lambda argv: print("x", file=sys.stderr) or 5)([]) == 5


def test_an_interrupt_and_a_missing_package(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    def missing(argv):
        import nowhere.at_all  # noqa: F401

    assert said_by(interrupted, monkeypatch, capsys, io.StringIO()) == (130, "")
    said = "prog: error: the package nowhere is not there: pip install nowhere\n"
    assert said_by(missing, monkeypatch, capsys, io.StringIO()) == (2, said)


def test_half_a_surrogate_pair_can_be_printed(monkeypatch, capsys):
    stdout = io.TextIOWrapper(io.BytesIO(), "utf-8")
    assert said_by(lambda argv: print("a\udc80b") or 0, monkeypatch, capsys, stdout) == (0, "")
    assert stdout.buffer.getvalue() == b"a\\udc80b\n"


ROOT = Path(console.__file__).resolve().parents[1]
COMMANDS = [
    "train.py --help", "transcribe.py --help", "-m audio_lottery verify results/prompts/imp-cnn-lstm-0",
    "-m lab.report results/prompts/imp-cnn-lstm-0", "-m lab.plan --help", "-m bench --help", "train.py --plan",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_with_streams_that_are_not_there(command):
    goes_on = command == "train.py --plan"
    for redirect, codes in ((">&-", (2,)), ("> /dev/full", (2,)), ("| true", (0, 141)), ("<&- > /dev/null", (0,))):
        line = f"{sys.executable} {command} {redirect}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode in ((0, *codes) if goes_on else codes), (line, done.stderr)
        assert done.stderr.count("\n") <= 1 and "Traceback" not in done.stderr, (line, done.stderr)


@pytest.mark.parametrize("name, package", [("train.py", "jiwer"), ("transcribe.py", "numpy")])
def test_a_package_that_is_not_there_is_one_line(name, package):
    code = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path({name!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"error: the package {package} is not there: pip install -r requirements.txt" in done.stderr


UNDER_SIGNALS = """
import ctypes, signal, time, torch
from audio_lottery.console import command
torch.set_num_threads(1)
class Stack(ctypes.Structure):
    _fields_ = [("place", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
def disabled():
    stack = Stack()
    ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))
    return stack.flags == 2
@command("under signals")
def main(argv):
    assert not disabled()
    lstm, x, count = torch.nn.LSTM(64, 64), torch.randn(50, 8, 64), 0
    def noted(*_):
        nonlocal count
        count += 1
    def gradient():
        lstm.zero_grad()
        lstm(x)[0].sum().backward()
        return lstm.weight_hh_l0.grad.clone()
    expected, begin = gradient(), time.monotonic()
    signal.signal(signal.SIGALRM, noted)
    signal.setitimer(signal.ITIMER_REAL, 2e-4, 2e-4)
    while count < 2000 and time.monotonic() - begin < 60:
        assert gradient().equal(expected)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert count >= 100, count
    return 0
assert disabled()
raise SystemExit(main())
"""


def test_signals_write_over_nothing():
    """Without a stack of their own this ended in glibc's "corrupted size vs. prev_size" wherever AVX2 is."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONFAULTHANDLER", "PYTHONDEVMODE")}
    command = [sys.executable, "-c", UNDER_SIGNALS]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
