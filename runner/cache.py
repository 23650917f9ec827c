"""Features for a run: kept in memory, kept in files, or computed anew each time; by several processes.

Which features, and what they are made of, is data.features_of; here is where they are kept.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import soundfile
import torch
import torchaudio
from torch import Tensor

import data
from audio_lottery.files import write_atomically
from data import FEATURES, SAMPLE_RATE, DataError, Example, Fresh, Utterance, features_of, in_parallel, load_audio

# ---------------------------------------------------------------------------- in memory, or computed anew


def load_examples(
    utterances: list[Utterance], tokens: list[str], kind: str, progress: str = "",
    cache: "str | Cache" = "memory", workers: int = 0,
    fresh: bool = False, mixes: list[Callable[[Tensor], Tensor]] | None = None,
) -> list[Example]:  # fmt: skip
    """One Example an utterance, in order.

    cache: "memory" keeps all features there; "none" computes them each time they are asked for; a Cache keeps them on
    the disk. workers: processes that compute beside this one.
    fresh: every source is Fresh, as Epoch's mix asks for; "memory" keeps the waveforms.
    mixes: for each utterance, what becomes of its waveform first. A Cache does not keep such features.
    """
    bins = FEATURES[kind](torch.zeros(1)).shape[1]
    if cache == "memory":
        found = in_parallel(_Compute(utterances, kind, mixes, fresh), progress, workers)
        found = ((torch.from_numpy(array), seconds) for array, seconds in found)
        if fresh:
            found = ((Fresh(u, kind, (1 + len(w) // 160, bins), w), s) for u, (w, s) in zip(utterances, found))
    elif cache == "none" or mixes:
        lengths = ((u, mix, *length(u)) for u, mix in zip(utterances, mixes or [None] * len(utterances)))
        found = ((Fresh(u, kind, (frames, bins), mix=mix), seconds) for u, mix, frames, seconds in lengths)
    else:
        found = cache.features(utterances, kind, progress, workers)
        if fresh:
            found = ((Fresh(u, kind, stored.shape), seconds) for u, (stored, seconds) in zip(utterances, found))
    known = data.spelled_by(tokens)
    return [
        Example(source, u.text, data.encode("".join(c for c in u.text if c in known), tokens), seconds)
        for u, (source, seconds) in zip(utterances, found)
    ]


def length(utterance: Utterance) -> tuple[int, float]:
    """Feature frames and seconds by the file's header: what is decoded is as long, or a little longer."""
    try:
        info = soundfile.info(utterance.audio)
    except (soundfile.SoundFileError, OSError, RuntimeError) as error:
        raise DataError(f"{utterance.audio}: cannot decode the audio ({str(error).strip()})") from None
    samples = info.frames - 2 * 1152 * (info.format == "MP3")  # its header counts up to two frames too many
    seconds = samples / info.samplerate - (utterance.offset or 0.0)
    if utterance.offset is not None and utterance.duration is not None:
        seconds = min(seconds, utterance.duration)
    seconds = max(seconds, 1 / SAMPLE_RATE)
    return 1 + int(seconds * SAMPLE_RATE) // 160, seconds


class _Compute(torch.utils.data.Dataset):
    """Features, or the waveform, and seconds of each utterance, or the DataError met (a worker must not raise it).

    As arrays: a tensor from a worker keeps a file open for as long as it lives, and there are as many as utterances.
    """

    def __init__(self, utterances: list[Utterance], kind: str, mixes: list | None = None, waveforms: bool = False):
        self.utterances, self.kind, self.mixes, self.waveforms = utterances, kind, mixes, waveforms

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int):
        u = self.utterances[index]
        try:
            waveform = load_audio(u.audio, u.offset, u.duration)
            features, seconds = features_of(u, self.kind, self.mixes and self.mixes[index], waveform)
        except DataError as error:
            return error
        return (waveform if self.waveforms else features).numpy(), seconds


# ---------------------------------------------------------------------------- in files


@dataclass(frozen=True)
class Stored:
    """Features in a file of the cache: rows `start` to `start + frames` of it."""

    path: Path
    start: int
    shape: tuple[int, int]  # (T, F)
    crc32: int

    def read(self) -> Tensor:
        """(T, F). Raises DataError, naming the file, if the bytes are not those that were written."""
        try:
            features = _opened(self.path).get_slice("features")[self.start : self.start + self.shape[0]]
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"{self.path}: cannot read the cached features ({error})") from None
        if zlib.crc32(features.contiguous().numpy()) != self.crc32:
            raise DataError(f"{self.path}: damaged: delete it, and it is computed again")
        return features


@functools.cache
def _opened(path: Path):
    return safetensors.safe_open(path, "pt")  # maps the file: memory does not grow with it


class Cache:
    """Features on the disk, in files of up to SHARD utterances, mapped into memory when they are read.

    A file's name is the hash of its recordings' bytes, segments, the kind of features and the code that computes
    them, so whatever changes is computed anew and whatever does not is shared by all runs. Files appear whole or not
    at all; an interrupted computation goes on where it was.
    """

    SHARD = 256

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--cache {folder}: cannot make the folder ({error.strerror})") from None
        self.hashes: dict[Path, str] = {}

    def hash_files(self, paths: list[Path]) -> dict[Path, str]:
        """hash_files, but a file whose size and time are those of the last start is not read again."""
        index, known = self.folder / "hashes.json", {}
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # damaged or not there: all are read
            rows = json.loads(index.read_text(encoding="utf-8")).items()
            known = {path: (size, time, sha256) for path, (size, time, sha256) in rows}
        stamps = {p: (stat.st_size, stat.st_mtime_ns) for p in paths if p not in self.hashes for stat in [_stat(p)]}
        if stamps:
            new = {path: known[str(path)][2] for path, s in stamps.items() if known.get(str(path), ())[:2] == s}
            new |= data.hash_files([path for path in stamps if path not in new])
            known |= {str(path): (*stamp, new[path]) for path, stamp in stamps.items()}
            write_atomically(index, json.dumps(known).encode(), f".{os.getpid()}.tmp")
            self.hashes |= new
        return self.hashes

    def shards(self, utterances: list[Utterance], kind: str) -> list[tuple[Path, list[Utterance]]]:
        hashes = self.hash_files([u.audio for u in utterances])
        steps = (load_audio, data.to_sample_rate, FEATURES[kind], data.normalize, features_of)
        code = [inspect.getsource(step) for step in steps] + [torchaudio.__version__, soundfile.__libsndfile_version__]
        found = []
        for start in range(0, len(utterances), self.SHARD):
            part = utterances[start : start + self.SHARD]
            key = json.dumps([code, [[hashes[u.audio], u.offset, u.duration] for u in part]])
            found.append((self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors", part))
        return found

    def features(self, utterances: list[Utterance], kind: str, progress: str = "", workers: int = 0):
        """(Stored, seconds) an utterance, in order. Computes what is not there yet."""
        shards = self.shards(utterances, kind)
        missing = {path: part for path, part in shards if not path.exists()}
        for _ in in_parallel(_Shards(list(missing.items()), kind), progress, workers, "file"):
            pass
        for path, _ in shards:
            try:
                table = _opened(path).get_tensor("table").tolist()
                _, bins = _opened(path).get_slice("features").get_shape()
            except (OSError, safetensors.SafetensorError) as error:
                raise DataError(f"{path}: damaged ({error}): delete it, and it is computed again") from None
            start = 0
            for frames, samples, crc32 in table:
                yield Stored(path, start, (frames, bins), crc32), samples / SAMPLE_RATE
                start += frames


class _Shards(torch.utils.data.Dataset):
    """Writing each missing file of a cache: an item is None, or the DataError met."""

    def __init__(self, shards: list[tuple[Path, list[Utterance]]], kind: str):
        self.shards, self.kind = shards, kind

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> DataError | None:
        path, utterances = self.shards[index]
        try:
            found = [features_of(utterance, self.kind) for utterance in utterances]
            rows = [(len(f), round(s * SAMPLE_RATE), zlib.crc32(f.contiguous().numpy())) for f, s in found]
            content = {"features": torch.cat([f for f, _ in found]), "table": torch.tensor(rows, dtype=torch.int64)}
            write_atomically(path, safetensors.torch.save(content), f".{os.getpid()}.tmp")
        except OSError as error:
            return DataError(f"{path}: cannot write the cache ({error.strerror})")
        except DataError as error:
            return error
        return None


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot read the audio ({error.strerror})") from None
