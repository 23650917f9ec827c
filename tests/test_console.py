"""What every command prints: errors of one line, and foreign text that can do nothing but be read."""

import sys

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
