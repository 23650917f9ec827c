"""Alignments of one and two texts with a reference: columns by hand, lines on a terminal, Markdown."""

import pytest

from lab import alignments
from lab.alignments import columns, pairs, text_lines


def test_pairs_by_hand():
    assert pairs("a b c", "a x c d") == [("a", "a"), ("b", "x"), ("c", "c"), (None, "d")]
    assert pairs("a b c", "c") == [("a", None), ("b", None), ("c", "c")]
    assert pairs("a", "") == [("a", None)] and pairs("", "a") == [(None, "a")] and pairs("", "") == []
    assert alignments.errors(pairs("a b c", "a x c d")) == 2


def test_two_systems_share_the_columns_of_the_reference():
    """What one has put in is a column in which the other has nothing."""
    assert columns("one two three", ["one oh two three", "won two oh oh"]) == [
        ("one", "one", "won"), (None, "oh", None), ("two", "two", "two"), (None, None, "oh"), ("three", "three", "oh"),
    ]  # fmt: skip
    assert columns("", ["", "a"]) == [(None, None, "a")] and columns("", ["", ""]) == []


@pytest.mark.parametrize("said", [["a b", "b c d"], ["x", ""], ["a a b c c", "c b a"]])
def test_a_column_loses_no_word(said):
    found = columns("a b c", said)
    for row, text in enumerate(["a b c", *said]):
        assert [column[row] for column in found if column[row] is not None] == text.split()


def test_lines_for_a_terminal():
    names = ["reference", "dense", "ticket"]
    assert text_lines(names, columns("one two three", ["one oh two three", "won two"])) == [
        "  reference  one *** two three",
        "  dense      one oh  two three",
        "                 I",
        "  ticket     won     two ***",
        "             S           D",
    ]
    assert text_lines(["a", "b"], columns("日本 x", ["日本 y"])) == ["  a  日本 x", "  b  日本 y", "          S"]
    for text, places in (("ที่", 1), ("कु", 1), ("a\u200db", 2), ("\u1100\u1161\u11a8", 2), ("日本", 4)):
        assert alignments.width(text) == places
    assert "\x1b" not in "".join(text_lines(["a", "b"], columns("\x1b[2J", ["\u202e"])))


def test_long_texts_are_folded_and_cut():
    lines = text_lines(["r", "h"], columns(" ".join(["word"] * 300), [" ".join(["word"] * 300)]))
    assert max(map(len, lines)) <= 105 and lines[-1] == "  ... and 100 words more"
    assert sum(line.count("word") for line in lines if line.startswith("  r")) == 200
    (head, _, row) = alignments.markdown_lines(["r", "h"], columns("x" * 1000, ["y" * 1000]))[1:]
    assert head == f"| r | {'x' * 59}… |" and row == f"| h | **{'y' * 59}…** |"


def test_markdown_marks_errors_and_escapes_words():
    lines = alignments.markdown_lines(["reference", "dense"], columns("<b> | c", ["<i> |"]))
    assert lines == [
        "",
        "| reference | \\<b\\> | \\| | c |",
        "| --- | --- | --- | --- |",
        "| dense | **\\<i\\>** | \\| | **—** |",
    ]
