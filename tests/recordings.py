"""What `soak.py recordings` tries: recordings of every kind with every lie of their headers, and manifests with one
fault each. Each is a content and what must come of it."""

import itertools
import json
import os
import random
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch

import data
from audio_lottery import sound

RATES = (4000, 8000, 11_025, 12_000, 16_000, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000)
CHANNELS = (1, 2, 3, 6, 8)


class Recording(NamedTuple):
    what: str
    path: Path
    seconds: float  # that were written
    rate: int
    lie: str = ""  # "size": in the header; "cut": the file was; "": none


def tone(frames: int, rate: int, channels: int, rng: random.Random) -> np.ndarray:
    """(frames, channels): a tone and noise, so that what is packed stays large."""
    noise = np.random.default_rng(rng.randrange(2**31)).normal(0, 0.05, (frames, channels))
    return 0.3 * np.sin(2 * np.pi * 300 * np.arange(frames) / rate)[:, None] + noise


def kinds() -> list[tuple[str, str]]:
    """Every pair of format and subtype but RAW's, which has no header."""
    formats = [format for format in soundfile.available_formats() if format != "RAW"]
    return [(format, subtype) for format in formats for subtype in soundfile.available_subtypes(format)]


def write(folder: Path, format: str, subtype: str, rate: int, channels: int, rng: random.Random) -> Recording | None:
    """A recording of 1 to 2 s; None if soundfile cannot write this."""
    if subtype.startswith("ALAC") and channels > 2:
        return None  # libsndfile 1.2.2 corrupts its memory when it writes these
    frames = round(rng.uniform(1.2, 2) * rate)
    path = folder / f"a.{format.lower()}"
    try:
        soundfile.write(path, tone(frames, rate, channels, rng), rate, format=format, subtype=subtype)
        rate_there = soundfile.info(path).samplerate  # some formats have rates of their own
    except (soundfile.SoundFileError, ValueError, TypeError, AssertionError):
        return None
    return Recording(f"{format} {subtype}, {rate} Hz, {channels} channels", path, frames / rate_there, rate_there)


def sizes_in(content: bytes, frames: int) -> list[tuple[int, str]]:
    """Places and codes of the numbers in a header that count samples or bytes."""
    found, size = [], len(content)
    for code in ("<I", ">I", "<Q", ">Q"):
        width = struct.calcsize(code)
        for at in range(min(size, 1024) - width):
            (value,) = struct.unpack_from(code, content, at)
            if value == frames or size - 300 <= value <= size:
                found.append((at, code))
    return found


def rate_of(path: Path) -> int | None:
    try:
        return soundfile.info(path).samplerate
    except soundfile.SoundFileError:
        return None


def lies(recording: Recording, rng: random.Random, most: int) -> Iterator[Recording]:
    """The recording with one number of its header changed, its end cut off, or nothing in it."""
    content = recording.path.read_bytes()
    if recording.path.suffix != ".sd2":
        frames, rate = soundfile.info(recording.path).frames, rate_of(recording.path)
        sizes = [(at, code, new) for at, code in sizes_in(content, frames) for new in (0, 1, 2, 3, 4)]
        for at, code, new in rng.sample(sizes, min(most, len(sizes))):
            (value,) = struct.unpack_from(code, content, at)
            value = (0, value // 2, min(2 * value, 2**32 - 1), 2**31 - 1, 2**32 - 1)[new]
            lie = bytearray(content)
            struct.pack_into(code, lie, at, value)
            if lie != content:
                recording.path.write_bytes(lie)
                if rate_of(recording.path) not in (None, rate):
                    continue  # it was another number that is as large
                yield recording._replace(what=f"{recording.what}: {value} at byte {at}", lie="size")
        if recording.what.startswith("NIST"):  # whose header is text
            count = str(frames).encode()
            for other in (b"0", str(frames // 2).encode(), b"9" * len(count)):
                recording.path.write_bytes(content.replace(count, other.rjust(len(count)), 1))
                yield recording._replace(what=f"{recording.what}: {other!r} samples", lie="size")
    for cut in (0, rng.randrange(1, 100), len(content) // 2):
        recording.path.write_bytes(content[:cut])
        yield recording._replace(what=f"{recording.what}: cut to {cut} bytes", lie="cut")


# ---------------------------------------------------------------------------- manifests

Row = dict[str, object]
LINES: dict[str, Callable[[str, random.Random], bytes]] = {  # a row's JSON, and what becomes of it
    "cut": lambda line, rng: line[: rng.randrange(1, len(line))].encode(),
    "no object": lambda line, rng: rng.choice([b"[]", b"null", b"1", b'"a"', b"true", b"[" * 100_000]),
    "not UTF-8": lambda line, rng: line.encode() + b"\xff",
    "UTF-16": lambda line, rng: line.encode("utf-16"),
    "two objects": lambda line, rng: (line + line).encode(),
    "a byte": lambda line, rng: line.replace('"', "\x00", 1).encode(),
    "long": lambda line, rng: line.encode() + b" " * 2**20 + b"x",
}
VALUES: dict[str, Callable[[random.Random], Row]] = {
    "audio_filepath": lambda rng: {"audio_filepath": rng.choice(
        [None, 1, [], {}, "", "no.wav", "\ud800.wav", "a\0.wav", ".", "..", "x" * 5000, "\x1b[2J", "a.wav\n"])},
    "text": lambda rng: {"text": rng.choice([None, 1, [], "", " \t", "\ud800", "a\udfff", {"a": 1}])},
    "offset": lambda rng: {"offset": rng.choice(
        [-1, float("nan"), float("inf"), "1", [], True, 1e7, 10**400, 2.5, {}, 1e6])},
    "duration": lambda rng: {"duration": rng.choice(
        [-1, float("nan"), float("inf"), "1", [], False, 1e305, 10**40, 5, 0, {}])},
    "segment": lambda rng: {"offset": 1.0, "duration": rng.choice([1.02, 1.5, 100.0])},
}  # fmt: skip


def faulty(rng: random.Random) -> tuple[str, bytes, int]:
    """What is wrong with it, a manifest whose rows are of a.wav (2 s) but for one fault, and the fault's line."""
    rows = [{"audio_filepath": "a.wav", "text": "hello", "duration": 2.0} for _ in range(rng.randint(1, 5))]
    at, kind = rng.randrange(len(rows)), rng.choice([*LINES, *VALUES])
    lines = [json.dumps(row).encode() for row in rows]
    if kind in LINES:
        lines[at] = LINES[kind](lines[at].decode(), rng)
    else:
        lines[at] = json.dumps(rows[at] | VALUES[kind](rng)).encode()
    mark = rng.choice([b"", b"\xef\xbb\xbf"]) if kind != "UTF-16" else b""
    end = rng.choice([b"\n", b"\r\n"])
    return f"{kind}: {lines[at][:80]!r}", mark + end.join(lines), at + 1


# ---------------------------------------------------------------------------- what becomes of them


def apart(attempts) -> list[tuple[str, str]]:
    """(what, outcome) of each attempt, tried in a forked process, so that a crash or a hang (60 s) is seen and counted.

    attempts: yields what is tried, then what became of it, in turn.
    """
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        for output in (1, 2):  # decoders' own chatter
            os.dup2(os.open(os.devnull, os.O_WRONLY), output)
        with os.fdopen(write_end, "w", encoding="utf-8", errors="backslashreplace") as told:
            for word in attempts:
                signal.alarm(60)
                told.write(json.dumps(word) + "\n")
                told.flush()
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end, encoding="utf-8") as answers:
        words = [json.loads(line) for line in answers]
    _, status = os.waitpid(process, 0)
    if status:
        words += [""] * (len(words) % 2 == 0) + [f"exception: died of {status}"]
    return list(zip(words[::2], words[1::2]))


def decoded(recording) -> str:
    """What became of a recording: whole, named, or silent: decoded as another length than was written."""
    duration = recording.seconds if recording.lie == "cut" else None
    try:
        seconds = len(sound.load_audio(recording.path, None, duration)) / sound.SAMPLE_RATE
    except sound.DataError as error:
        if not str(error).startswith(str(recording.path)):
            return f"exception: {error} does not name the file"
        return "named" if recording.lie else f"silent: refused as written ({error})"
    except BaseException as error:
        return f"exception: {type(error).__name__}: {error}"
    more, spare = seconds - recording.seconds, max(0.1, 0.02 * recording.seconds)
    padding = sound.MP3_PADDING / recording.rate if recording.path.suffix == ".mp3" else 0.0  # told in its header
    close = -spare <= more <= spare + padding
    return "whole" if close else f"silent: {seconds:.2f} s of {recording.seconds:.2f} s"


def read_faulty(path: Path, line: int) -> str:
    try:
        for utterance in data.read_manifest(path):
            data.waveform_of(utterance)
    except data.DataError as error:
        return "named" if str(error).startswith(f"{path}, line {line}: ") else f"silent about the line: {error}"
    except BaseException as error:
        return f"exception: {type(error).__name__}: {error}"
    return "silent"


def recordings(number: int, seed: int, manifests: int = 1000) -> bool:
    found = []
    torch.set_num_threads(1)
    order = [(*kind, rate, channels) for kind in kinds() for rate in RATES for channels in CHANNELS]
    random.Random(seed).shuffle(order)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = Path(folder) / "train.jsonl"

        def of_kinds(first: int):
            for i in range(first, first + 25):
                rng = random.Random(f"{seed} {i}")
                whole = write(Path(folder), *order[i % len(order)], rng)
                for recording in itertools.chain([whole], lies(whole, rng, 4)) if whole else ():
                    yield recording.what
                    yield decoded(recording)

        def with_faults():
            soundfile.write(path.with_name("a.wav"), np.full(32_000, 0.1), 16_000)
            rng = random.Random(seed)
            for _ in range(manifests):
                what, content, line = faulty(rng)
                path.write_bytes(content)
                yield f"manifest, {what}"
                yield read_faulty(path, line)

        for first in itertools.count(step=25):
            if len(found) >= number:
                break
            found += apart(of_kinds(first))
        tried = len(found)
        found += apart(with_faults())
    written = {what.split(":")[0] for what, _ in found[:tried]}
    count = {
        word: sum(outcome.startswith(word) for _, outcome in found) for word in ("whole", "named", "silent", "exc")
    }
    print(
        f"recordings: {tried} recordings of {len(written)} kinds (format, subtype, rate, channels) and "
        f"{len(found) - tried} manifests with a fault each: crashes {count['exc']}, silent {count['silent']}; "
        f"{count['whole']} decoded whole, {count['named']} refused by name"
    )
    wrong = [f"{what}: {outcome}" for what, outcome in found if outcome.startswith(("silent", "exc"))]
    print("".join(f"  {line}\n" for line in wrong[:40]), end="")
    return not wrong and len(found) - tried == manifests
