"""What is recognised, written down: a line of text or JSON, NIST's CTM, or the subtitles SRT and WebVTT.

A recording is told of when it is whole. Subtitles are a file a recording; the others are lines, one behind the other.
Foreign text is safe in each: printable() on one line, and what the format itself would read is escaped.
"""

import itertools
import re
import textwrap
from pathlib import Path
from typing import NamedTuple

import data
from audio_lottery import console, files, sound
from audio_lottery.console import printable
from lab.pieces import Word

FORMATS = ("text", "json", "srt", "vtt", "ctm")
SUBTITLES = ("srt", "vtt")
LINE, LINES = 42, 2  # characters in a line of a subtitle, and lines, as broadcasters have them
LONGEST, PAUSE = 7.0, 1.0  # seconds: of a subtitle, at most; of silence that ends one
SRT = str.maketrans("<>{}", "\u2039\u203a()")  # it has no escapes, and < and { begin markup: single angle quotes
VTT = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})


def name_of(recording: data.Utterance) -> str:
    """The file and, of a segment, its seconds."""
    return sound.segment_name(recording.audio, recording.offset, recording.duration)


class Transcript(NamedTuple):
    source: data.Utterance
    seconds: float  # of audio
    words: list[Word]
    error: str = ""

    @property
    def text(self) -> str:
        return " ".join(word.word for word in self.words)

    def in_file(self) -> list[Word]:
        """The words by the seconds of the file, where this is a segment of it."""
        offset = self.source.offset or 0.0
        return [word._replace(start=word.start + offset, end=word.end + offset) for word in self.words]


# ---------------------------------------------------------------------------- lines


def text_line(transcript: Transcript, names: bool = False) -> str:
    """One line, whatever is in names and tokens: safe on a terminal and in UTF-8."""
    text = printable(transcript.text)
    return f"{printable(name_of(transcript.source))}\t{text}" if names else text


def json_line(transcript: Transcript) -> str:
    """An object on one line: the file, its seconds, its text, and each word with its times and confidence."""
    row = {"audio_filepath": str(transcript.source.audio)}
    for key in ("offset", "duration"):
        if getattr(transcript.source, key) is not None:
            row[key] = getattr(transcript.source, key)
    if transcript.error:
        return console.json_line(row | {"error": transcript.error})
    words = [w._replace(**{k: round(getattr(w, k), 3) for k in Word._fields[1:]}) for w in transcript.words]
    confidence = round(sum(w.confidence for w in transcript.words) / len(words), 3) if words else None
    row |= {"duration": round(transcript.seconds, 3), "text": transcript.text, "confidence": confidence}
    return console.json_line(row | {"words": [word._asdict() for word in words]})


def ctm_lines(transcript: Transcript) -> list[str]:
    """A line a word: file, channel, start, duration, word, confidence. Fields are between spaces, and ;; is a comment.

    The file is its name without its ending, as scorers look it up; < and > in a word would be sclite's alternatives.
    """
    name = ctm_name(transcript.source.audio)
    return [
        f"{name} 1 {word.start:.3f} {word.end - word.start:.3f} {printable(word.word).translate(SRT)} "
        f"{word.confidence:.3f}"
        for word in transcript.in_file()
    ]


def ctm_name(audio: Path) -> str:
    return re.sub(r"\s|^;", "_", "stdin" if audio == Path("-") else printable(audio.stem))


# ---------------------------------------------------------------------------- subtitles


class Cue(NamedTuple):
    start: float  # seconds
    end: float
    text: str


def cues_of(words: list[Word]) -> list[Cue]:
    """Words as subtitles: of LINES lines and LONGEST seconds at most, ended by a PAUSE; none lasts into the next.

    A word that is longer is a subtitle by itself.
    """
    groups: list[list[Word]] = []
    for word in words:
        last = groups[-1] if groups else []
        wrapped = textwrap.wrap(" ".join(printable(w.word) for w in [*last, word]), LINE, break_long_words=False)
        fits = last and len(wrapped) <= LINES and word.end - last[0].start <= LONGEST
        if fits and word.start - last[-1].end < PAUSE:
            last.append(word)
        else:
            groups.append([word])
    starts = [group[0].start for group in groups[1:]] + [float("inf")]
    cues = []
    for group, after in zip(groups, starts):
        start, end = group[0].start, group[-1].end
        cues.append(Cue(start, min(end, after) if after > start else end, " ".join(printable(w.word) for w in group)))
    return cues


def clock(seconds: float, point: str) -> str:
    """01:02:03.456, with the point that a format has."""
    whole, thousandths = divmod(round(1000 * seconds), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}{point}{thousandths:03d}"


def subtitles(words: list[Word], form: str) -> str:
    """The file of a recording's words, in SRT or WebVTT."""
    escapes, point, begin = (SRT, ",", "") if form == "srt" else (VTT, ".", "WEBVTT\n\n")
    parts = []
    for number, cue in enumerate(cues_of(words), 1):
        lines = [line.translate(escapes) for line in textwrap.wrap(cue.text, LINE, break_long_words=False)]
        times = f"{clock(cue.start, point)} --> {clock(cue.end, point)}"
        parts.append("\n".join([*([str(number)] if form == "srt" else []), times, *lines, ""]))
    return begin + "\n".join(parts)


# ---------------------------------------------------------------------------- to stdout, or a file each


def check(form: str, folder: Path | None, recordings: list[data.Utterance]) -> None:
    """Raise DataError if two recordings would be one in this format, or if several are to be one file of subtitles.
    Else make the folder; raises OSError, naming it, if it cannot be made."""
    if folder and folder.exists() and not folder.is_dir():
        raise data.DataError(f"--out {folder}: is a file, and wants a folder")
    paths = [path for path, _ in itertools.groupby(recording.audio for recording in recordings)]  # segments follow
    by_name: dict[str, Path] = {}
    for path in paths if form in (*SUBTITLES, "ctm") else ():
        other = by_name.setdefault(ctm_name(path) if form == "ctm" else path.stem, path)
        if other != path:
            raise data.DataError(f"--format {form}: {path} and {other} have one name there: recognise them one by one")
    if form in SUBTITLES and not folder and len(paths) > 1:
        ways = "give --out FOLDER, or one recording at a time"
        raise data.DataError(f"--format {form}: {len(paths)} recordings are as many files: {ways}")
    if form in SUBTITLES and len(paths) > len(by_name):
        raise data.DataError(f"--format {form}: a recording stands twice, with others between: recognise it by itself")
    if folder:
        with files.naming(folder):
            folder.mkdir(parents=True, exist_ok=True)


class Writer:
    """Takes transcripts in order, and says what is to be printed of each."""

    def __init__(self, form: str, names: bool = False, folder: Path | None = None):
        """names: before each line of text.  folder: where each recording's subtitles go, as NAME.srt or NAME.vtt."""
        self.form, self.names, self.folder = form, names, folder
        self.open: list[Transcript] = []  # segments of one recording, whose subtitles are one file

    def push(self, transcript: Transcript) -> list[str]:
        """What is to be printed now, line by line. Raises OSError, naming it, for a file that cannot be written."""
        if self.form == "json":
            return [json_line(transcript)]
        if self.form == "text":
            return [text_line(transcript, self.names)]
        if self.form == "ctm":
            return ctm_lines(transcript)
        done = self.end() if self.open and self.open[0].source.audio != transcript.source.audio else []
        self.open.append(transcript)
        return done

    def end(self) -> list[str]:
        """As push(), of the last recording. One of which a part failed has no file: it would look whole."""
        segments, self.open = self.open, []
        if not segments or any(transcript.error for transcript in segments):
            return []
        words = sorted((word for part in segments for word in part.in_file()), key=lambda word: word.start)
        content = subtitles(words, self.form)
        if not self.folder:
            return content.splitlines()
        path = self.folder / f"{segments[0].source.audio.stem}.{self.form}"
        files.write_atomically(path, content.encode())
        return [printable(path)]
