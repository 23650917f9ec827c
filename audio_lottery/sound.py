"""Any recording as mono audio at 16 kHz, whole or in blocks, from the formats that soundfile reads.

Whatever is wrong with a file is a DataError that names the file, and the segment.
"""

import contextlib
import io
import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

SAMPLE_RATE = 16_000
FRAME_SECONDS = 0.01  # from one feature frame to the next
BLOCK = 2**22  # numbers at once, all channels: 16 MB, 4 minutes of mono at 16 kHz
ROUNDING = 0.1  # seconds that a manifest's duration of a whole file may be short of it
MP3_PADDING = 2 * 1152  # samples, at most, that an MP3's header counts and no decoder returns
NAMED = {".sd2", ".gsm", ".vox"}  # libsndfile knows these by their names alone
PLAIN = {"PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}  # codings of a WAV
AHEAD = 2**15  # bytes of a FLAC file that its decoder may have read ahead, more than it does
PACKED = re.compile("FLAC|OGG|MP3|.* (ALAC|DWVW|MPEG)")  # codings that may take less than a bit a sample
UNKNOWN = 2**62  # frames, by a header that does not say how many


class DataError(ValueError):
    """Something is wrong with a file of the user's; the message names it."""


class Broken(DataError):
    """Several recordings are: the first of them by name, and how many there are."""

    SHOWN = 10

    def __init__(self, errors: list[DataError]):
        super().__init__(errors)
        self.errors = [one for error in errors for one in (error.errors if isinstance(error, Broken) else [error])]

    def __str__(self) -> str:
        shown, more = "; ".join(map(str, self.errors[: self.SHOWN])), len(self.errors) - self.SHOWN
        if len(self.errors) == 1:
            return shown
        return f"{len(self.errors)} recordings are broken: {shown}" + (f"; and {more} more" if more > 0 else "")


def load_audio(path: Path, offset: float | None = None, duration: float | None = None) -> Tensor:
    """(N,) float32 in [-1, 1], mono, 16 kHz. Any format soundfile reads: WAV, FLAC, Ogg, Opus, MP3, SPHERE.

    offset: where a segment starts, in seconds; it ends after `duration`. Without an offset `duration` is of the file's
    beginning; a file that is longer by at most ROUNDING is read whole, so that no rounding of a manifest cuts it.
    Raises DataError for a missing, empty, truncated or non-audio file and for NaN or infinite samples.
    """
    with memory_for(path):
        return torch.cat(list(audio_blocks(path, offset, duration)))


def audio_blocks(
    path: Path, offset: float | None = None, duration: float | None = None, seconds: float = math.inf
) -> Iterator[Tensor]:
    """What load_audio gives, in pieces (N,), N > 0, in order: memory does not grow with the recording's length.

    seconds: of a piece, about; at most BLOCK numbers are decoded at once whatever it is. What fits into one piece is
    what resampling the whole gives bit for bit, what does not is to rounding (1e-6).
    Raises DataError as load_audio does: what is wrong with a file's length comes behind its last piece.
    """
    name = segment_name(path, offset, duration)
    with memory_for(name), _opened(path, name) as file:
        if not 1_000 <= file.samplerate <= 768_000:
            raise DataError(f"{name}: a sample rate of {file.samplerate} Hz (1,000 to 768,000 are read)")
        yield from to_sample_rate(_mono(file, name, offset, duration, seconds), file.samplerate)


def about(path: Path) -> tuple[float, str]:
    """A recording's seconds by its header, which says a great many where it does not know, and soundfile's format.

    Raises DataError as load_audio does for what cannot be opened.
    """
    with _opened(path, str(path)) as file:
        return file.frames / file.samplerate, file.format


def segment_name(path: Path, offset: float | None, duration: float | None) -> str:
    """The file and, of a segment, its seconds, for messages."""
    if offset is None:
        return str(path)
    return f"{path}, {offset:.10g} s to {'its end' if duration is None else f'{offset + duration:.10g} s'}"


@contextlib.contextmanager
def memory_for(name: object) -> Iterator[None]:
    """Running out of memory in here is a DataError that names what it was for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
        if isinstance(error, RuntimeError) and not re.search("memory|allocat", str(error)):
            raise
        raise DataError(f"{name}: too large for the memory that is left") from None


# ---------------------------------------------------------------------------- decoding, in blocks


class _Forward(soundfile.SoundFile):
    """Reads on from where it is. soundfile asks for the place before each read and goes to it behind each: a format
    that cannot seek would fail there."""

    def seekable(self) -> bool:
        return False

    def go(self, frame: int) -> int:
        """Be at this frame, or at the end if that is before it; returns where. What cannot seek is read through."""
        frame = min(frame, self.frames)
        if super().seekable():
            with contextlib.suppress(soundfile.SoundFileError):
                return self.seek(frame)
        at = 0
        while at < frame and (read := len(self.read(min(frame - at, BLOCK // self.channels + 1), "float32", True))):
            at += read
        return at


@contextlib.contextmanager
def _opened(path: Path, name: str) -> Iterator[_Forward]:
    """A recording, opened by its handle: of a name libsndfile concludes too much ("._x" beside an MP3 x makes it SD2),
    and a name may be no UTF-8. Raises DataError for what is no audio, and for what goes wrong while it is open."""
    try:
        with open(path, "rb") as handle:
            about = os.fstat(handle.fileno())
            if stat.S_ISREG(about.st_mode) and not about.st_size:
                raise DataError(f"{name}: the file is empty (0 bytes)")
            source = os.fsencode(path) if path.suffix.lower() in NAMED else handle.fileno()
            with _Forward(source, closefd=False) as file:
                if rest := _unclosed(file):
                    how = dict(samplerate=file.samplerate, channels=file.channels, subtype=file.subtype)
                    file = _Forward(rest, format="RAW", endian="LITTLE", **how)
                with file:
                    yield file
    except DataError:
        raise
    except soundfile.LibsndfileError as error:
        raise DataError(f"{name}: cannot decode the audio ({error.error_string.strip()})") from None
    except (soundfile.SoundFileError, OSError, TypeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error).strip()
        raise DataError(f"{name}: cannot decode the audio ({why})") from None


def _unclosed(file: _Forward) -> "_Rest | None":
    """The samples of a WAV whose sizes were never written: its writer died while it was recording. None for any other
    file, and for codings that are not samples one behind the other."""
    if file.frames or file.format not in ("WAV", "WAVEX") or file.subtype not in PLAIN:
        return None
    end, at = os.fstat(file.name).st_size, 12
    while at + 8 <= end:
        chunk, size = struct.unpack("<4sI", os.pread(file.name, 8, at))
        if chunk == b"data":
            return None if _is_metadata(file.name, at + 8, end) else _Rest(file.name, at + 8)
        at += 8 + size + size % 2
    return None


def _is_metadata(descriptor: int, place: int, end: int) -> bool:
    """Is what a file has from `place` to its end nothing, tags, chunks of RIFF, AIFF or Wave64, or padding?"""
    head, behind = os.pread(descriptor, 24, place), end - place
    if behind < 8 or re.match(rb"TAG|ID3|APETAGEX|LYRICS", head):
        return True
    sizes = [int.from_bytes(head[4:8], "little"), int.from_bytes(head[4:8], "big"), int.from_bytes(head[16:], "little")]
    if re.match(rb"[ -~]{4}", head) and any(size <= behind for size in sizes):
        return True
    zeros = bytes(2**20)
    return all(zeros.startswith(os.pread(descriptor, 2**20, start)) for start in range(place, end, 2**20))


class _Rest:
    """A file from a byte on, as soundfile wants one."""

    def __init__(self, descriptor: int, start: int):
        self.descriptor, self.start, self.at = descriptor, start, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        end = os.fstat(self.descriptor).st_size - self.start
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: end}[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int) -> bytes:
        content = os.pread(self.descriptor, size, self.start + self.at)
        self.at += len(content)
        return content


def _mono(file: _Forward, name: str, offset: float | None, duration: float | None, seconds: float) -> Iterator[Tensor]:
    """The segment's samples, channels averaged, (N,) at the file's rate, in blocks."""
    rate = file.samplerate
    begin = 0 if offset is None else file.go(round(offset * rate))
    stop = None if duration is None else round(duration * rate)  # samples wanted
    spare = round(ROUNDING * rate) + 1 if offset is None and stop is not None else 0
    limit = math.inf if stop is None else stop + spare  # samples read, at most
    end = min(limit, file.frames - begin)
    block = min(BLOCK // file.channels, BLOCK * rate // SAMPLE_RATE, round(min(seconds, 1e6) * rate))
    block = max(block, 2 * spare, 1)
    done = 0
    while done < end:
        wanted = block if end - done >= 2 * block else end - done  # so that the last one is not below `spare`
        samples = file.read(wanted, dtype="float32", always_2d=True)  # (N, channels)
        if not np.isfinite(samples).all():
            raise DataError(f"{name}: a sample is NaN or infinite")
        ended = len(samples) < wanted
        done += len(samples)
        if spare and done == limit:  # longer than by rounding: the first `duration` seconds
            ended, done, samples = True, stop, samples[: len(samples) - spare]
        if len(samples):
            yield torch.from_numpy(samples).mean(1)
        if ended:
            break
    _check_length(file, name, done, begin, offset, duration)


def _check_length(
    file: _Forward, name: str, done: int, begin: int, offset: float | None, duration: float | None
) -> None:
    """Raise DataError unless as many samples were decoded as the header and the manifest say.

    MP3 headers count up to MP3_PADDING samples that no decoder returns, and lengths of whole files are often rounded:
    hence 0.1 s, or 2 %. A segment may end a frame of features behind its recording.
    """
    if not done:
        where = "" if offset is None else f" from {offset:.10g} s on"
        raise DataError(f"{name}: no audio in it{where} (its header counts {file.frames} samples)")
    cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.M)  # libsndfile's log, of a WAV
    if cut and int(cut[2]) < int(cut[1]) < 0x7FFF0000:  # larger sizes stand for "unknown" in WAVs written to a pipe
        raise DataError(f"{name}: truncated audio: {cut[2]} bytes of data where its header says {cut[1]}")
    if isinstance(file.name, int) and not PACKED.match(f"{file.format} {file.subtype}"):
        size = os.fstat(file.name).st_size
        if stat.S_ISREG(os.fstat(file.name).st_mode) and (begin + done) * file.channels > 8 * size:
            raise DataError(f"{name}: its header counts {file.frames} samples, more than its {size} bytes can hold")
    if (behind := _left_behind(file, begin + done)) > max(0.1 * file.samplerate / (begin + done), 0.02):
        raise DataError(f"{name}: its header counts {file.frames} samples, and {behind:.0%} as many bytes follow them")
    seconds, wanted = done / file.samplerate, math.inf if duration is None else duration
    header = min((file.frames - begin) / file.samplerate, wanted) if file.frames < UNKNOWN else 0.0
    if offset:
        short = FRAME_SECONDS + (MP3_PADDING / file.samplerate if file.format == "MP3" else 0.0)
    else:
        short = max(0.1, 0.02 * wanted)
    for source, expected, missing in (
        ("its header", header, max(0.1, 0.02 * header)), ("the manifest", duration or 0.0, short),
    ):  # fmt: skip
        if seconds < expected - missing:
            raise DataError(f"{name}: truncated audio: {seconds:.2f} s decoded where {source} says {expected:.2f} s")


def _left_behind(file: _Forward, at: int) -> float:
    """How many bytes that are no metadata follow the last sample that a header counts, beside those up to there.

    0 before the last sample, and for Ogg, whose decoder goes by the bytes and not by the header.
    """
    if at < file.frames or file.format == "OGG" or not isinstance(file.name, int):
        return 0.0
    end, place = os.fstat(file.name).st_size, os.lseek(file.name, 0, os.SEEK_CUR)
    if file.format == "FLAC" and end <= AHEAD:
        return _flac_frames(os.pread(file.name, end, 0)) / at - 1
    return 0.0 if _is_metadata(file.name, place, end) else (end - place) / max(place, 1)


def _flac_frames(content: bytes) -> int:
    """Samples of a FLAC file by its frames: with a header that does not say how many."""
    unsaid, total = bytearray(content), content.index(b"fLaC") + 21  # the low 36 bits from here on
    unsaid[total] &= 0xF0
    unsaid[total + 1 : total + 5] = bytes(4)
    count = 0
    with _Forward(io.BytesIO(unsaid)) as file:
        while read := len(file.read(BLOCK // file.channels + 1, "float32", always_2d=True)):
            count += read
    return count


def to_sample_rate(blocks: Iterator[Tensor], sample_rate: int) -> Iterator[Tensor]:
    """Blocks (N,) at sample_rate -> blocks at 16 kHz: what torchaudio.functional.resample makes of the whole."""
    # A divisor below 25 Hz makes a filter of thousands of phases: round such rates, by 0.2 % at most from 8 kHz on.
    rate = sample_rate if math.gcd(sample_rate, SAMPLE_RATE) >= 25 else round(sample_rate / 25) * 25
    if rate == SAMPLE_RATE:
        yield from blocks
        return
    resample = torchaudio.transforms.Resample(rate, SAMPLE_RATE, dtype=torch.float32)
    divisor = math.gcd(rate, SAMPLE_RATE)
    old, new = rate // divisor, SAMPLE_RATE // divisor  # of every `old` samples it makes `new`
    context = -(-resample.width // old) * old  # samples on either side that decide a result
    kept, start, done = None, 0, 0  # samples from `start` on; what comes of those before `done` is given
    for block in blocks:
        if kept is None:
            kept = block
            continue
        sure = (start + len(kept) - context) // old * old  # what comes of those before hangs on no later ones
        if sure > done:
            yield resample(kept)[(done - start) // old * new : (sure - start) // old * new]
            done, before = sure, start
            start = max(0, sure - context)
            kept = kept[start - before :]
        kept = torch.cat([kept, block])
    if kept is not None:
        yield resample(kept)[(done - start) // old * new :]


# ---------------------------------------------------------------------------- folders

# Endings of what is looked for in a folder.
AUDIO = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".sph", ".w64", ".caf"}
# What a NAS, a desktop or an unpacker leaves beside the files it keeps.
FOREIGN = {"@eaDir", "@Recycle", "#recycle", "#snapshot", "__MACOSX", "lost+found", "$RECYCLE.BIN"}


def foreign(name: str) -> bool:
    """Is a file or folder of this name no part of a corpus? Hidden ones (._x, .ipynb_checkpoints), and FOREIGN."""
    return name.startswith(".") or name in FOREIGN


def recordings(folder: Path) -> list[Path]:
    """The recordings in a folder and in those below it, by their names' endings; foreign ones left out."""
    named = (path for path in folder.rglob("*") if path.suffix.lower() in AUDIO)
    own = (path for path in named if not any(map(foreign, path.relative_to(folder).parts)))
    found = filter(os.path.isfile, own)  # False, too, for what may not be looked at
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())
