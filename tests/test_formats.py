"""lab/formats.py by hand, and through the command line on a small ticket with random weights."""

import json
import re
from pathlib import Path

import pytest
import test_transcribe

import data
import transcribe
from lab import formats
from lab.formats import Cue, Transcript, Writer
from lab.pieces import Word

speech = test_transcribe.speech


@pytest.fixture(scope="module")
def ticket(tmp_path_factory):
    return test_transcribe.ticket(tmp_path_factory.mktemp("ticket"), "conformer")


def heard(*words, path="/talks/one two.flac", offset=None) -> Transcript:
    """Words as (text, start, end)."""
    source = data.Utterance(Path(path), "", offset=offset)
    return Transcript(source, 9.0, [Word(*word, 0.5) for word in words])


def test_times_by_hand():
    assert formats.clock(3661.2345, ",") == "01:01:01,234" and formats.clock(0.9996, ".") == "00:00:01.000"
    assert formats.clock(360_000, ".") == "100:00:00.000"


def test_cues_by_hand():
    words = [
        Word(*w, 1.0) for w in (("a", 0.0, 0.5), ("b", 0.6, 1.0), ("c", 2.0, 2.5), ("d", 2.6, 8.9), ("e", 9.1, 9.2))
    ]
    assert formats.cues_of(words) == [(0.0, 1.0, "a b"), (2.0, 8.9, "c d"), (9.1, 9.2, "e")]  # a pause of 1 s, 7 s
    assert formats.cues_of([]) == []
    twenty = [Word("twenty", i / 10, (i + 1) / 10, 1.0) for i in range(13)]  # 6 words a line of 42: 41 characters
    assert [cue.text.count("twenty") for cue in formats.cues_of(twenty)] == [12, 1]
    (long,) = formats.cues_of([Word("x" * 100, 0.0, 1.0, 1.0)])
    assert long.text == "x" * 100
    over = [Word("a", 0.0, 3.5, 1.0), Word("b", 4.6, 12.0, 1.0), Word("c", 11.5, 12.1, 1.0)]  # b ends in c
    assert [(cue.start, cue.end) for cue in formats.cues_of(over)] == [(0.0, 3.5), (4.6, 11.5), (11.5, 12.1)]


def test_subtitles_by_hand():
    words = heard(("a<b>", 0.1, 0.5), ("&", 0.6, 0.9), ("{x}", 1.0, 1.1), ("-->", 3.0, 3.25)).words
    assert formats.subtitles(words, "srt") == (
        "1\n00:00:00,100 --> 00:00:01,100\na\u2039b\u203a & (x)\n\n2\n00:00:03,000 --> 00:00:03,250\n--\u203a\n"
    )
    assert formats.subtitles(words, "vtt") == (
        "WEBVTT\n\n00:00:00.100 --> 00:00:01.100\na&lt;b&gt; &amp; {x}\n\n00:00:03.000 --> 00:00:03.250\n--&gt;\n"
    )
    assert formats.subtitles([], "srt") == "" and formats.subtitles([], "vtt") == "WEBVTT\n\n"
    lines = formats.subtitles([Word("twenty", 0.0, 0.1, 1.0)] * 7, "srt").splitlines()
    assert lines[2:] == [" ".join(["twenty"] * 6), "twenty"]


def test_ctm_by_hand():
    found = formats.ctm_lines(heard(("a", 0.5, 0.75), ("<ALT>", 1.0, 1.5), offset=2.0))
    assert found == ["one_two 1 2.500 0.250 a 0.500", "one_two 1 3.000 0.500 \u2039ALT\u203a 0.500"]
    assert formats.ctm_name(Path("-")) == "stdin" and formats.ctm_name(Path("x/;;a\u2003b.wav")) == "_;a_b"
    assert formats.ctm_lines(Transcript(data.Utterance(Path("a"), ""), 0.0, [], "broken")) == []


def test_segments_of_a_recording_are_one_file_and_a_broken_one_is_none(tmp_path):
    writer = Writer("srt", folder=tmp_path)
    parts = [
        heard(("b", 0.0, 0.5), offset=5.0),
        heard(("a", 0.0, 0.5), offset=1.0),
        heard(("c", 0.0, 1.0), path="c.wav"),
    ]
    assert [writer.push(part) for part in parts] == [[], [], [f"{tmp_path}/one two.srt"]]
    assert writer.push(Transcript(data.Utterance(Path("d.wav"), ""), 0.0, [], "broken")) == [f"{tmp_path}/c.srt"]
    assert writer.end() == [] and not (tmp_path / "d.srt").exists()
    text = (tmp_path / "one two.srt").read_text()
    assert text.index("00:00:01,000") < text.index("00:00:05,000") and text.startswith("1\n") and "\n\n2\n" in text


@pytest.mark.parametrize(
    "form, names, message",
    [
        ("srt", ["a.wav", "b.wav"], "2 recordings are as many files"),
        ("ctm", ["x/a b.wav", "y/a_b.mp3"], "y/a_b.mp3 and x/a b.wav have one name there"),
        ("vtt", ["a.wav", "b.wav", "a.wav"], "3 recordings are as many files"),
    ],
)
def test_what_would_be_mixed_up_is_refused(form, names, message):
    with pytest.raises(data.DataError, match=re.escape(message)):
        formats.check(form, None, [data.Utterance(Path(name), "") for name in names])


def test_a_recording_twice_has_no_two_files(tmp_path):
    recordings = [data.Utterance(Path(name), "") for name in ("a.wav", "b.wav", "a.wav")]
    with pytest.raises(data.DataError, match="a recording stands twice, with others between"):
        formats.check("srt", tmp_path, recordings)
    formats.check("srt", tmp_path, [recordings[0], *recordings[:2]])
    for form in ("text", "json", "ctm"):
        formats.check(form, None, recordings)


def test_formats_have_the_words_and_times_of_json(ticket, speech, tmp_path, capsys):
    def said(*argv) -> tuple[int, str]:
        code = transcribe.main([str(ticket), *map(str, argv), "--dense"])
        return code, capsys.readouterr().out

    rows = [json.loads(line) for line in said(*speech, "--format", "json")[1].splitlines()]
    assert said(*speech, "--json")[1].splitlines() == said(*speech, "--format", "json")[1].splitlines()
    assert said(*speech)[1].splitlines() == [row["text"] for row in rows]
    lines = [line.split(" ") for line in said(*speech, "--format", "ctm")[1].splitlines()]
    words = [(path.stem, word) for path, row in zip(speech, rows) for word in row["words"]]
    assert len(lines) == len(words) > 5
    for (name, channel, start, lasts, text, confidence), (stem, word) in zip(lines, words):
        assert (name, channel, text) == (stem, "1", word["word"]) and float(start) == word["start"]
        assert float(start) + float(lasts) == pytest.approx(word["end"], abs=2e-3)
        assert float(confidence) == word["confidence"]
    code, one = said(speech[0], "--format", "vtt")
    assert code == 0 and one.startswith("WEBVTT\n\n00:00:0")
    code, told = said(*speech, tmp_path / "gone.wav", "--format", "srt", "--out", tmp_path / "made/subs")
    assert code == 1 and told.splitlines() == [f"{tmp_path}/made/subs/{path.stem}.srt" for path in speech]
    for path, row in zip(speech, rows):
        text = (tmp_path / "made" / "subs" / f"{path.stem}.srt").read_text()
        spoken = [line for line in text.splitlines() if line and not line.isdigit() and "-->" not in line]
        assert " ".join(spoken) == row["text"]
        assert text.split("\n")[1].startswith(formats.clock(row["words"][0]["start"], ","))
    assert isinstance(formats.cues_of([Word("a", 0.0, 1.0, 1.0)])[0], Cue)
