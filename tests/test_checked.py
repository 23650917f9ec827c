"""The reader of JSON that may come from a stranger, by hand."""

import functools
import os

import pytest

from audio_lottery import checked
from lottery import LotteryError

DEEP = "[" * 33 + "]" * 33


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"a": [1, 2.5, "x", null, true]}', {"a": [1, 2.5, "x", None, True]}),
        ("[" * 32 + "]" * 32, functools.reduce(lambda inner, _: [inner], range(31), [])),
        ("9223372036854775807", 2**63 - 1),
        ('"\\ud83d\\ude00"', "\U0001f600"),
    ],
)
def test_what_is_read(text, value):
    assert checked.parse(text.encode(), "here") == value


@pytest.mark.parametrize(
    "text, why",
    [
        (b"{", "Expecting property name"),
        (b"\xff", "codec can't decode"),
        (b"NaN", "the number NaN"),
        (b"-Infinity", "the number -Infinity"),
        (b"1e999", "the number 1e999"),
        (b"9223372036854775808", "a number of 19 characters"),
        (b"9" * 10_000, "a number of 10000 characters"),
        (b'{"a": 1, "a": 2}', "a name twice"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'{"\\udfff": 1}', "half a surrogate pair"),
        (DEEP.encode(), "deeper than 32 levels"),
        (b"[" * 100_000 + b"]" * 100_000, "deeper than 32 levels"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "deeper than 32 levels"),
    ],
)
def test_what_is_refused(text, why):
    with pytest.raises(LotteryError, match=rf"^here: not JSON that can be read \(.*{why}"):
        checked.parse(text, "here")


SHAPE = checked.record(
    {"n": checked.integer(0, 5)},
    {"x": checked.number(-1, 1), "t": checked.text("[a-c]+"), "l": checked.listed(checked.integer(), 1, 2),
     "w": checked.one_of("cpu", "cuda"), "m": checked.maybe(checked.switch), "k": checked.keyed(checked.SHA256)},
    others=False,
)  # fmt: skip


def test_a_shape_lets_through_what_it_says():
    SHAPE({"n": 5, "x": -1, "t": "abc", "l": [1, 2], "w": "cpu", "m": None, "k": {"a": "0" * 64}}, "here")
    SHAPE({"n": 0, "x": 0.5, "m": False}, "here")


@pytest.mark.parametrize(
    "value, said",
    [
        ([], "here: must be an object, got []"),
        ({}, "here: a value is missing: n"),
        ({"n": 0, "more": 1}, "here: has 'more', which nothing here writes"),
        ({"n": 6}, "here, n: must be a whole number from 0 to 5, got 6"),
        ({"n": True}, "here, n: must be a whole number from 0 to 5, got True"),
        ({"n": 1.0}, "here, n: must be a whole number from 0 to 5, got 1.0"),
        ({"n": 0, "x": float("nan")}, "here, x: must be a number from -1 to 1, got nan"),
        ({"n": 0, "x": "1"}, "here, x: must be a number from -1 to 1, got '1'"),
        ({"n": 0, "t": "abcd"}, "here, t: must be as [a-c]+, got 'abcd'"),
        ({"n": 0, "t": "\ud800"}, "here, t: must be a text of at most 10000 characters, got '\\ud800'"),
        ({"n": 0, "l": []}, "here, l: must be a list of 1 to 2 values, got []"),
        ({"n": 0, "l": [1, "x"]}, "here, l[1]: must be a whole number from 0 to 9223372036854775807, got 'x'"),
        ({"n": 0, "w": ["cpu"]}, "here, w: must be one of cpu, cuda, got ['cpu']"),
        ({"n": 0, "m": 0}, "here, m: must be true or false, got 0"),
        ({"n": 0, "k": {"a": "0"}}, "here, k, a: must be a SHA-256, 64 hex digits, got '0'"),
        ({"n": 0, "k": []}, "here, k: must be an object of at most 100000 values, got []"),
    ],
)
def test_a_shape_says_what_is_wrong(value, said):
    with pytest.raises(LotteryError) as error:
        SHAPE(value, "here")
    assert str(error.value) == said


def test_only_regular_files_of_a_size_are_read(tmp_path):
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    for name, why in (
        ("zero", "not a regular file"), ("pipe", "not a regular file"), (".", "not a regular file"),
        ("gone", "No such file or directory"), ("large", "1,099,511,627,776 bytes; at most 9 are read"),
    ):  # fmt: skip
        with pytest.raises(LotteryError) as error:
            checked.read_bytes(tmp_path / name, "thing", limit=9)
        assert str(error.value) == f"{tmp_path / name}: cannot read the thing ({why})"
    with pytest.raises(LotteryError, match="no name of a file"):
        checked.read_bytes(tmp_path / "a\0b", "thing")
    (tmp_path / "good").write_bytes(b'{"n": 1}')
    assert checked.read_json(tmp_path / "good", "thing", SHAPE, limit=9) == {"n": 1}
