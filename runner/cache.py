"""Features for a run: kept in memory, kept in files, or computed anew each time; by several processes.

Which features, and what they are made of, is data.features_of; here is where they are kept. Wherever that is, an
utterance has as many frames and seconds as were decoded, so that an epoch has one order and one set of masks.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors.torch
import soundfile
import torch
import torchaudio
from torch import Tensor

import data
from audio_lottery import checked, sound
from audio_lottery.checked import SHA256, integer
from audio_lottery.files import SEAL, digest, write_atomically
from data import FEATURES, SAMPLE_RATE, Broken, DataError, Example, Fresh, Utterance, features_of, in_parallel
from lottery import LotteryError

# ---------------------------------------------------------------------------- in memory, or computed anew


def load_examples(
    utterances: list[Utterance], tokens: list[str], kind: str, progress: str = "",
    cache: "str | Cache" = "memory", workers: int = 0,
    fresh: bool = False, mixes: list[Callable[[Tensor], Tensor]] | None = None, clean: list[Example] | None = None,
    speed: float = 1.0,
) -> list[Example]:  # fmt: skip
    """One Example an utterance, in order. Every recording is decoded, or was when the cache was filled.

    cache: "memory" keeps all features there; "none" computes them each time they are asked for, and keeps the lengths;
    a Cache keeps them on the disk. workers: processes that compute beside this one.
    fresh: every source is Fresh, as Epoch's mix asks for; "memory" keeps the waveforms.
    mixes: for each utterance, what becomes of its waveform first. A Cache does not keep such features.
    clean: the examples of these utterances without mixes, where they are there: their lengths are the same.
    speed: of every waveform, before anything else becomes of it.
    """
    bins = FEATURES[kind](torch.zeros(1)).shape[1]
    if cache == "memory":
        found = in_parallel(_Compute(utterances, kind, speed, mixes, fresh), progress, workers)
        found = ((torch.from_numpy(array), seconds) for array, seconds in found)
        if fresh:
            shapes = ((w, (1 + len(w) // 160, bins), s) for w, s in found)
            found = ((Fresh(u, kind, shape, w, speed=speed), s) for u, (w, shape, s) in zip(utterances, shapes))
    elif cache == "none" or mixes:
        counted = [(example.frames, example.seconds) for example in clean or ()]
        counted = counted or in_parallel(_Count(utterances, kind, speed), progress, workers)
        each = zip(utterances, mixes or [None] * len(utterances), counted)
        found = ((Fresh(u, kind, (frames, bins), None, mix, speed), s) for u, mix, (frames, s) in each)
    else:
        found = cache.features(utterances, kind, progress, workers, speed)
        if fresh:
            found = ((Fresh(u, kind, stored.shape, speed=speed), s) for u, (stored, s) in zip(utterances, found))
    known = data.spelled_by(tokens)
    return [
        Example(source, u.text, data.encode("".join(c for c in u.text if c in known), tokens), seconds)
        for u, (source, seconds) in zip(utterances, found)
    ]


def put_beside(examples: list[Example], speeds: tuple[float, ...], load: Callable[..., list[Example]]) -> None:
    """Put the same utterances at each speed beside them, as Example.at_speeds. load(speed=): the examples at one."""
    if speeds != (1.0,):
        sets = [[dataclasses.replace(e) for e in examples] if speed == 1 else load(speed=speed) for speed in speeds]
        for example, *at_speeds in zip(examples, *sets):
            example.at_speeds = tuple(at_speeds)


def length(utterance: Utterance, kind: str = "log-mel", speed: float = 1.0) -> tuple[int, float]:
    """Feature frames and seconds, by decoding it (a header may count two MP3 frames too many). What cannot be trained
    on is refused now, as where features are kept."""
    features, seconds = features_of(utterance, kind, speed=speed)
    return len(features), seconds


class _Count(torch.utils.data.Dataset):
    """The length of each utterance, or the DataError met (a worker must not raise it)."""

    def __init__(self, utterances: list[Utterance], kind: str, speed: float):
        self.utterances, self.kind, self.speed = utterances, kind, speed

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> tuple[int, float] | DataError:
        try:
            return length(self.utterances[index], self.kind, self.speed)
        except DataError as error:
            return error


class _Compute(torch.utils.data.Dataset):
    """Features, or the waveform, and seconds of each utterance, or the DataError met (a worker must not raise it).

    As arrays: a tensor from a worker keeps a file open for as long as it lives, and there are as many as utterances.
    """

    def __init__(self, utterances: list[Utterance], kind: str, speed: float, mixes: list | None, waveforms: bool):
        self.utterances, self.kind, self.speed, self.mixes, self.waveforms = utterances, kind, speed, mixes, waveforms

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int):
        u = self.utterances[index]
        try:
            waveform = data.waveform_of(u, self.speed)
            features, seconds = features_of(u, self.kind, self.mixes and self.mixes[index], waveform)
        except DataError as error:
            return error
        return (waveform if self.waveforms else features).numpy(), seconds


class _Whole(torch.utils.data.Dataset):
    """What is wrong with each utterance's recording, "" for nothing."""

    def __init__(self, utterances: list[Utterance]):
        self.utterances = utterances

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> str:
        try:
            features_of(self.utterances[index], "log-mel")
        except DataError as error:
            return str(error)
        return ""


def what_is_broken(utterances: list[Utterance], progress: str = "", workers: int = 0) -> list[str]:
    """What is wrong with each utterance's recording, "" for nothing, by decoding all of them."""
    return list(in_parallel(_Whole(utterances), progress, workers))


# ---------------------------------------------------------------------------- in files

# A file of a cache is a safetensors file: "features" (rows, bins) float32, the utterances one behind the other, and a
# header that states, sealed by its own SHA-256, frames, samples at 16 kHz and SHA-256 of the features of each. So the
# seal is of every byte, and a start reads the headers alone.
FORMAT = "features 1"
# What features are computed by: as it was imported, and not as an edit has it by the time they are computed.
CODE = [*map(inspect.getsource, (sound, data)), torchaudio.__version__, soundfile.__libsndfile_version__]
TABLE = checked.record(
    {"format": checked.text(most=100), "rows": checked.listed(checked.tupled(integer(1), integer(1), SHA256), 1)}
)
HEADER = checked.record({"__metadata__": checked.record({"about": checked.text(most=2**24)})})
INDEX = checked.keyed(checked.tupled(integer(), integer(1 - checked.WHOLE), SHA256), 10**7)  # size, time, SHA-256
TEMPORARY = re.compile(r"([0-9a-f]{64}\.safetensors|hashes\.json)\.\d+-[0-9a-f]{16}\.tmp")  # as by _temporary()
OLD = 24 * 3600  # seconds: what was begun so long ago is not being written
INDEX_LIMIT = 2**30  # bytes: of some five million recordings


@dataclass(frozen=True)
class Stored:
    """Features in a file of the cache: `shape` float32 values from byte `start` on."""

    path: Path
    start: int
    shape: tuple[int, int]  # (T, F)
    sha256: bytes

    def read(self) -> Tensor:
        """(T, F). Raises DataError, naming the file, if the bytes are not those that were written.

        Read, not mapped: a file that is cut while it is in use must not end the process (SIGBUS).
        """
        features = np.empty(self.shape, np.float32)
        there, content = 0, memoryview(features).cast("B")
        try:
            while there < features.nbytes:  # a file system may give less than it has
                read = os.preadv(_opened(self.path).fileno(), [content[there:]], self.start + there)
                if not read:
                    raise _damaged(self.path, " (it was cut while it was in use)")
                there += read
        except OSError as error:
            raise DataError(f"{self.path}: cannot read the cached features ({error.strerror})") from None
        if hashlib.sha256(features.data).digest() != self.sha256:
            raise _damaged(self.path)
        return torch.from_numpy(features)


@functools.lru_cache(maxsize=64)  # of a corpus there may be more than a process may open
def _opened(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)  # closed when the cache lets go of it


def _damaged(path: Path, why: str = "") -> DataError:
    return DataError(f"{path}: damaged{why}: delete it, and it is computed again")


class Cache:
    """Features on the disk, in files of up to SHARD utterances.

    A file's name is the hash of its recordings' bytes, segments, the kind of features and the code that computes
    them, so whatever changes is computed anew and whatever does not is shared by all runs, at the same time too. Files
    appear whole or not at all; an interrupted computation goes on where it was. Where all is there, nothing is written.
    """

    SHARD = 256

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--cache {folder}: cannot make the folder ({error.strerror})") from None
        for path in folder.glob("*.tmp"):  # of a process that was killed as it wrote
            with contextlib.suppress(OSError):
                if TEMPORARY.fullmatch(path.name) and path.stat().st_mtime < time.time() - OLD:
                    path.unlink()
        self.hashes: dict[Path, str] = {}

    def hash_files(self, paths: list[Path]) -> dict[Path, str]:
        """hash_files, but a file whose size and time are those of the last start is not read again."""
        known = self._index()
        stamps = {p: (stat.st_size, stat.st_mtime_ns) for p in paths if p not in self.hashes for stat in [_stat(p)]}
        places = {path: os.path.abspath(path) for path in stamps}  # the cache may serve several folders
        found = {path: known[places[path]][2] for path, s in stamps.items() if known.get(places[path], ())[:2] == s}
        new = data.hash_files([path for path in stamps if path not in found])
        self.hashes |= found | new
        if new:  # else nothing is written: the cache may be one that can only be read
            rows = self._index() | {places[path]: (*stamps[path], sha256) for path, sha256 in new.items()}
            with contextlib.suppress(OSError):  # the next start hashes them again, which is all that this saves
                write_atomically(self.folder / "hashes.json", json.dumps(rows).encode(), _temporary())
        return self.hashes

    def _index(self) -> dict[str, tuple[int, int, str]]:
        """Size, time and SHA-256 of recordings at their last hashing, by path; {} if damaged or not there."""
        with contextlib.suppress(LotteryError):
            rows = checked.read_json(self.folder / "hashes.json", "index of hashes", INDEX, INDEX_LIMIT)
            return {path: tuple(row) for path, row in rows.items()}
        return {}

    def shards(self, utterances: list[Utterance], kind: str, speed: float = 1.0) -> list[tuple[Path, list[Utterance]]]:
        hashes = self.hash_files([u.audio for u in utterances])
        found = []
        for start in range(0, len(utterances), self.SHARD):
            part = utterances[start : start + self.SHARD]
            key = json.dumps([FORMAT, kind, speed, CODE, [[hashes[u.audio], u.offset, u.duration] for u in part]])
            found.append((self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors", part))
        return found

    def features(
        self, utterances: list[Utterance], kind: str, progress: str = "", workers: int = 0, speed: float = 1.0
    ) -> Iterator[tuple[Stored, float]]:
        """(Stored, seconds) an utterance, in order. Computes what is not there yet."""
        bins, shards = FEATURES[kind](torch.zeros(1)).shape[1], self.shards(utterances, kind, speed)
        missing = {path: part for path, part in shards if not path.exists()}
        for unwritten in in_parallel(_Shards(list(missing.items()), kind, speed), progress, workers, "file"):
            if unwritten:
                raise DataError(unwritten)
        for path, part in shards:
            yield from read_shard(path, len(part), bins)


def shard_content(found: list[tuple[Tensor, float]]) -> bytes:
    """The file of the features (T, F) and seconds of some utterances, one at least."""
    rows = [[len(f), round(s * SAMPLE_RATE), hashlib.sha256(f.contiguous().numpy()).hexdigest()] for f, s in found]
    about = f"sha256:{'0' * 64} " + json.dumps({"format": FORMAT, "rows": rows})
    content = safetensors.torch.save({"features": torch.cat([f for f, _ in found])}, {"about": about})
    end = 8 + int.from_bytes(content[:8], "little")
    at = content.index(SEAL, 0, end) + len(SEAL)
    return content[:at] + digest(content[:end], at).encode() + content[at + 64 :]


def read_shard(path: Path, utterances: int, bins: int) -> Iterator[tuple[Stored, float]]:
    """(Stored, seconds) an utterance of a file. Raises DataError naming it unless it is whole, and of so many."""
    try:
        content, size = _header(path)
        end = len(content)
        at = content.index(SEAL) + len(SEAL)
        if content[at : at + 64] != digest(content, at).encode():
            raise ValueError("its header does not have the hash that it states")
        tensors = checked.parse(content[8:], "its header", HEADER)
        about = tensors.pop("__metadata__")["about"]
        about = checked.parse(about[len("sha256:") + 65 :], "its table", TABLE)
        rows = [(frames, samples, bytes.fromhex(sha256)) for frames, samples, sha256 in about["rows"]]
        if about["format"] != FORMAT or len(rows) != utterances:
            raise ValueError(f"{len(rows)} utterances of {about['format']!r}, not {utterances} of {FORMAT!r}")
        if any(frames != 1 + samples // 160 for frames, samples, _ in rows):
            raise ValueError("frames that are not those of its samples")
        shape = [sum(frames for frames, _, _ in rows), bins]
        expected = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
        if tensors != {"features": expected} or size != end + 4 * math.prod(shape):
            raise ValueError(f"{size - end} bytes of features, not {shape[0]} x {bins} float32")
    except DataError:
        raise
    except ValueError as error:  # LotteryError is one
        raise _damaged(path, f" ({error})") from None
    for frames, samples, sha256 in rows:
        yield Stored(path, end, (frames, bins), sha256), samples / SAMPLE_RATE
        end += 4 * frames * bins


def _header(path: Path) -> tuple[bytes, int]:
    """The header of a cached file, its length in 8 bytes before it, and the size of the file."""
    try:
        with checked.opened(path, "cached features") as (number, size):
            start = checked.read_on(number, 8)
            end = 8 + int.from_bytes(start, "little")
            if not 8 < end <= min(size, 2**24):
                raise ValueError(f"a header of {end - 8} bytes in a file of {size}")
            return start + checked.read_on(number, end - 8), size
    except LotteryError as error:
        raise DataError(str(error)) from None


class _Shards(torch.utils.data.Dataset):
    """Writing each missing file of a cache: an item is "", why it cannot be written, or all DataErrors met."""

    def __init__(self, shards: list[tuple[Path, list[Utterance]]], kind: str, speed: float):
        self.shards, self.kind, self.speed = shards, kind, speed

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> str | DataError:
        path, utterances = self.shards[index]
        found, errors = [], []
        for utterance in utterances:
            try:
                found.append(features_of(utterance, self.kind, speed=self.speed))
            except DataError as error:
                errors.append(error)
        if errors:
            return Broken(errors)
        try:
            write_atomically(path, shard_content(found), _temporary())
        except OSError as error:
            return f"{path}: cannot write the cache ({error.strerror})"
        return ""


def _temporary() -> str:
    """The ending of a temporary file, of no other process on any machine that shares the cache."""
    return f".{os.getpid()}-{os.urandom(8).hex()}.tmp"


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot read the audio ({error.strerror})") from None
