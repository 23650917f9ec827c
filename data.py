"""Corpora, tokens, features, SpecAugment and batches. Knows nothing of models.

A corpus is a folder with train.jsonl, valid.jsonl and test.jsonl in NeMo's manifest form: one JSON
object a line with audio_filepath (relative to the manifest), text and, if known, duration and offset
(seconds) and speaker. Whatever is wrong with a file is a DataError that names the file, and the line in a manifest.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
import torchaudio
from torch import Tensor
from tqdm import tqdm

from audio_lottery import checked, draws
from audio_lottery.console import leave_signals_to_the_parent, printable
from audio_lottery.sound import SAMPLE_RATE, Broken, DataError, load_audio, memory_for, segment_name
from lottery import LotteryError

SPLITS = ("train", "valid", "test")
BLANK = "<blank>"  # token 0, of CTC and of the transducer
SPACE = "▁"  # sentencepiece's: what a BPE piece at the start of a word starts with


# ---------------------------------------------------------------------------- manifests


@dataclass(frozen=True, slots=True)
class Utterance:
    audio: Path
    text: str
    speaker: str = ""
    offset: float | None = None  # seconds; None: from the beginning, and the whole file without a duration
    duration: float | None = None  # seconds
    source: str = dataclasses.field(default="", compare=False)  # the manifest or transcript that names it, and
    line: int = dataclasses.field(default=0, compare=False)  # where in it; for messages

    @property
    def where(self) -> str:
        """ "SOURCE, line N", or "" if no file names it."""
        return self.source and f"{self.source}, line {self.line}"


def read_manifest(path: Path) -> list[Utterance]:
    """The utterances of one manifest, in its order. Raises DataError naming file and line."""
    source, folder, utterances = str(path), str(path.parent), []
    recordings: dict[str, Path] = {}  # one Path, looked for once, for all segments of a recording
    with manifest_file(path) as file:
        for line, row in manifest_rows(file, source):
            text, name = row.get("text"), row["audio_filepath"]
            text = " ".join(text.split()) if isinstance(text, str) else text
            if not text or not isinstance(text, str) or not text.isascii():
                check_text(text, f"{source}, line {line}")
            if (audio := recordings.get(name)) is None:
                audio = recordings[name] = Path(folder, name)
                if not os.path.isfile(audio):
                    raise DataError(f"{source}, line {line}: no such audio file: {audio}")
            speaker = sys.intern(str("" if row.get("speaker") is None else row["speaker"]))
            utterances.append(Utterance(audio, text, speaker, row["offset"], row["duration"], source, line))
    return utterances


@contextlib.contextmanager
def manifest_file(path: Path) -> Iterator[BinaryIO]:
    """The open file. Raises DataError, naming it, if it is no regular file or cannot be read."""
    try:
        with checked.opened(path, "manifest") as (number, _), open(number, "rb", closefd=False) as file:
            yield file
    except LotteryError as error:
        raise DataError(str(error)) from None


def check_text(text: object, where: str) -> None:
    """Raise DataError unless it is a text, single-spaced already, that an utterance may have. where: file and line."""
    if not isinstance(text, str):
        raise DataError(f"{where}: 'text' must be a string, got {text!r}")
    if not text:
        raise DataError(f"{where}: the text is empty (every utterance needs at least one character)")
    if re.search("[\ud800-\udfff]", text):
        raise DataError(f"{where}: the text has half a surrogate pair, which no UTF-8 file can hold: {text!r}")


MARK = b"\xef\xbb\xbf"  # a byte-order mark: some editors begin a text file with it
LONGEST = 2**20  # bytes of a line


def manifest_rows(content: bytes | BinaryIO, name: str) -> Iterator[tuple[int, dict]]:
    """(line, object) of each line of a manifest: audio_filepath is a string, offset and duration seconds or None.

    content: the file, read line by line, so that memory does not grow with it; or its bytes.
    Raises DataError naming the line for what is no such object, and if there is none.
    """
    file, empty = io.BytesIO(content) if isinstance(content, bytes) else content, True
    for number, line in enumerate(iter(functools.partial(file.readline, LONGEST), b""), 1):
        whole = len(line) < LONGEST
        line = line.removeprefix(MARK) if number == 1 else line
        if whole and not line.strip():
            continue
        empty = False
        try:
            yield number, _manifest_row(line, whole)
        except DataError as error:
            raise DataError(f"{name}, line {number}: {error}") from None
    if empty:
        raise DataError(f"{name}: the manifest is empty")


def _manifest_row(line: bytes, whole: bool) -> dict:
    if not whole:
        raise DataError(f"longer than {LONGEST} bytes: no line of a manifest")
    try:
        row = checked.parse(line, "", what="a JSON object in UTF-8", halves=True)  # of a name; a text's is refused
    except LotteryError as error:
        raise DataError(str(error).removeprefix(": ")) from None
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    name = row.get("audio_filepath")
    if "audio_filepath" not in row:
        there = ", ".join(map(repr, list(row)[:5]))[:80]
        raise DataError(
            f"'audio_filepath' is missing (a recording has it, 'text' and 'duration'), got {there or 'no key'}"
        )
    if not isinstance(name, str) or not name:
        raise DataError(f"'audio_filepath' must be a string, got {name!r}")
    for key in ("offset", "duration"):
        value = row.setdefault(key, None)
        if value is not None and not (type(value) in (int, float) and 0 <= value < 1e7):  # a bool is neither
            raise DataError(f"{key!r} must be a number of seconds from 0 to 1e7, got {str(value)[:40]!r}")
    return row


def read_corpus(folder: Path, splits: tuple[str, ...] = SPLITS) -> dict[str, list[Utterance]]:
    """{"train": [...], "valid": [...], "test": [...]}, or only these splits of it.

    Raises DataError for a recording that is in two of them.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (--data wants one with train.jsonl, valid.jsonl and test.jsonl)")
    corpus = {split: read_manifest(folder / f"{split}.jsonl") for split in splits}
    check_apart(corpus)
    return corpus


def check_apart(corpus: dict[str, list[Utterance]]) -> None:
    """Raise DataError for a recording that is in two parts."""
    part_of: dict[str, str] = {}
    place = functools.cache(os.path.realpath)  # whatever ways and links lead there; once for all segments
    for part, utterances in corpus.items():
        for utterance in utterances:
            other = part_of.setdefault(place(utterance.audio), part)
            if other != part:
                why = f"is in {part} and in {other}: a recording may be in one of them only"
                with told_of(utterance):
                    raise DataError(f"{utterance.audio}: {why}")


def audio_files(corpus: dict[str, list[Utterance]]) -> list[Path]:
    return [utterance.audio for utterances in corpus.values() for utterance in utterances]


def corpus_sha256(corpus: dict[str, list[Utterance]], hashes: dict[Path, str]) -> str:
    """Hash of every utterance's part, text, speaker, times, file name and the recording's bytes.

    The order counts, the folder does not. hashes: of the recordings (hash_files).
    """
    digest = hashlib.sha256()
    for part, utterances in corpus.items():
        for u in utterances:
            row = [part, u.text, u.speaker, u.offset, u.duration, u.audio.name, hashes[u.audio]]
            digest.update(json.dumps(row).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------------------- tokens


def tokens_of(utterances: list[Utterance], kind: str = "chars") -> list[str]:
    """The blank, then what the texts are spelled with. The list is all that encode and decode need.

    "chars": the characters in code point order. "bpe:N": byte pairs that sentencepiece merged, in its order, and the
    characters; N tokens in all, the blank among them.
    """
    texts = [utterance.text for utterance in utterances]
    characters = set("".join(texts))
    if SPACE in characters:
        raise DataError(f"a train text has the character {SPACE!r}, which stands for a space in BPE pieces")
    if kind == "chars":
        return [BLANK] + sorted(characters)
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=int(kind[len("bpe:") :]),
            character_coverage=1.0, normalization_rule_name="identity", max_sentence_length=2**30,
            num_threads=1, bos_id=-1, eos_id=-1, minloglevel=2,
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        why = str(error).split("] ")[-1].split(" or decrease")[0]
        raise DataError(f"--tokens {kind}: sentencepiece finds no such pieces in the train texts ({why})") from None
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    tokens = [BLANK] + [pieces.id_to_piece(i) for i in range(1, len(pieces))]  # 0 is its <unk>
    if missing := characters - spelled_by(tokens):
        raise DataError(f"--tokens {kind}: sentencepiece keeps no piece for {sorted(missing)}")
    return tokens


def spelled_by(tokens: list[str]) -> set[str]:
    """The characters that the tokens can spell."""
    return set("".join(tokens[1:]).replace(SPACE, " "))


def encode(text: str, tokens: list[str]) -> list[int]:
    """Characters, or as sentencepiece does: in each word, merge the pair that was merged first in training, again and
    again. Equal bit for bit to its own encoder (see the tests), so that no model of it has to be kept."""
    index = {token: i for i, token in enumerate(tokens) if i}
    if SPACE not in index:
        return [index[character] for character in text]
    ids = []
    for word in text.split():
        pieces = [SPACE, *word]
        while pairs := [(index[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in index]:
            _, i = min(pairs)
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        ids += [index[piece] for piece in pieces]
    return ids


def decode(ids: list[int], tokens: list[str]) -> str:
    """Token ids to a text with single spaces."""
    return " ".join("".join(tokens[i] for i in ids).replace(SPACE, " ").split())


def unseen_characters(utterances: list[Utterance], tokens: list[str]) -> dict[str, int]:
    """Characters that no token stands for, with their counts. They stay in the reference, as errors."""
    known = spelled_by(tokens)
    counts: dict[str, int] = {}
    for character in "".join(utterance.text for utterance in utterances):
        if character not in known:
            counts[character] = counts.get(character, 0) + 1
    return counts


def characters_told(counts: dict[str, int], most: int = 50) -> str:
    """Characters with their counts, by code points where they are not letters, digits or signs by themselves."""
    told = [
        f"{c!r} x {n}" if unicodedata.category(c)[0] in "LNPS" or c == " " else f"U+{ord(c):04X} x {n}"
        for c, n in sorted(counts.items())
    ]
    return ", ".join(told[:most]) + (f" and {len(told) - most} more" if len(told) > most else "")


# ---------------------------------------------------------------------------- audio and features


def _checked(waveform: Tensor) -> Tensor:
    if waveform.dim() != 1 or not len(waveform):
        raise ValueError(f"waveform must be (N,) with N >= 1, got shape {tuple(waveform.shape)}")
    return waveform


def log_mel(waveform: Tensor) -> Tensor:
    """80-bin log-mel features, 25 ms Hann window, 10 ms hop.

    waveform: (N,) float in [-1, 1] at 16 kHz.  Returns (T, 80), T = 1 + N // 160, natural log.
    Raises ValueError unless waveform is 1-D and not empty.
    """
    if "mel" not in _TRANSFORMS:
        _TRANSFORMS["mel"] = torchaudio.transforms.MelSpectrogram(
            SAMPLE_RATE, n_fft=512, win_length=400, hop_length=160, n_mels=80, pad_mode="constant"
        )
    return (_TRANSFORMS["mel"](_checked(waveform)) + 1e-6).log().T


def log1p_stft(waveform: Tensor) -> Tensor:
    """161-bin log1p magnitude spectrogram, 20 ms Hamming window, 10 ms hop: the paper's CNN-LSTM.

    waveform: (N,) float in [-1, 1] at 16 kHz.  Returns (T, 161), T = 1 + N // 160.
    Raises ValueError unless waveform is 1-D and not empty.
    """
    if "stft" not in _TRANSFORMS:
        _TRANSFORMS["stft"] = torchaudio.transforms.Spectrogram(
            n_fft=320, hop_length=160, window_fn=torch.hamming_window, power=1.0, pad_mode="constant"
        )
    return _TRANSFORMS["stft"](_checked(waveform)).log1p().T


_TRANSFORMS: dict[str, torch.nn.Module] = {}  # built once: the filter banks cost more than an utterance
FEATURES = {"log-mel": log_mel, "log1p-stft": log1p_stft}
ONE_MEAN = ("log1p-stft",)  # which the official code normalises by one mean and one deviation for all bins


def normalize(features: Tensor, one_mean: bool = False) -> Tensor:
    """(T, F) to zero mean and unit variance over the utterance.

    One mean and one variance a bin; with one_mean, one of each for all bins, the variance with T F - 1 below it, as in
    the paper's CNN-LSTM.
    """
    if one_mean:  # by numpy: torch shares one sum of all out among its threads, and its bits would hang on them
        x = features.numpy().astype(np.float64)
        return (features - float(x.mean())) / max(float(x.std(ddof=1)), 1e-3)
    return (features - features.mean(0)) / features.std(0, correction=0).clamp(min=1e-3)


# ---------------------------------------------------------------------------- examples


class Source(Protocol):
    """Features that are read when they are asked for: Fresh, or those of a file (runner/cache.py)."""

    shape: tuple[int, int]  # (T, F)

    def read(self) -> Tensor: ...


@dataclass(frozen=True)
class Fresh:
    """Features that are computed each time they are asked for."""

    utterance: Utterance
    kind: str
    shape: tuple[int, int]  # (T, F)
    waveform: Tensor | None = None  # (N,) at that speed, if it is kept in memory
    mix: Callable[[Tensor], Tensor] | None = None  # what becomes of the waveform before
    speed: float = 1.0

    def read(self) -> Tensor:
        return features_of(self.utterance, self.kind, self.mix, self.waveform, self.speed)[0]


@dataclass
class Example:
    source: Tensor | Source  # (T, F)
    text: str
    targets: list[int]  # token ids; characters without a token left out
    seconds: float = 0.0
    at_speeds: tuple["Example", ...] = ()  # the utterance at each speed that an epoch draws from; (): at its own alone

    @property
    def features(self) -> Tensor:
        return self.source if isinstance(self.source, Tensor) else self.source.read()

    @property
    def frames(self) -> int:
        return self.source.shape[0]


def features_of(
    utterance: Utterance, kind: str, mix: Callable[[Tensor], Tensor] | None = None, waveform: Tensor | None = None,
    speed: float = 1.0,
) -> tuple[Tensor, float]:  # fmt: skip
    """Decode and compute: normalised features (T, F) and seconds. Raises DataError naming the file.

    mix: what becomes of the waveform (N,) before, e.g. noise added. waveform: where it is there at that speed already.
    """
    if waveform is None:
        waveform = waveform_of(utterance, speed)
    with told_of(utterance), memory_for(utterance.audio):
        features = normalize(FEATURES[kind](mix(waveform) if mix else waveform), kind in ONE_MEAN)
        if not features.isfinite().all():
            name = segment_name(utterance.audio, utterance.offset, utterance.duration)
            raise DataError(f"{name}: its samples are too large (features are not finite; full scale is 1)")
    return features, len(waveform) / SAMPLE_RATE


def waveform_of(utterance: Utterance, speed: float = 1.0) -> Tensor:
    """(N,) at 16 kHz; `speed` times as fast and as high (by resampling: Ko et al. 2015).

    Raises DataError as load_audio does, naming the line that names the recording as well.
    """
    with told_of(utterance):
        waveform = load_audio(utterance.audio, utterance.offset, utterance.duration)
        with memory_for(utterance.audio):
            return waveform if speed == 1 else torchaudio.functional.speed(waveform, SAMPLE_RATE, speed)[0]


@contextlib.contextmanager
def told_of(utterance: Utterance) -> Iterator[None]:
    """A DataError in here names the line that names the utterance, too."""
    try:
        yield
    except DataError as error:
        if not utterance.source:
            raise
        raise DataError(f"{utterance.where}: {error}") from None


def in_parallel(
    dataset, progress: str = "", workers: int = 0, unit: str = "utt", first_error: bool = False
) -> Iterator:
    """The items of a dataset, in order, computed by worker processes.

    Items that are DataErrors are raised together, as Broken, once all are through; with first_error the first, at once.
    """
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, worker_init_fn=leave_signals_to_the_parent,
        multiprocessing_context="fork" if workers else None, collate_fn=lambda item: item,
        generator=torch.Generator(),  # else it draws from the global one
    )  # fmt: skip
    errors = []
    for item in tqdm(loader, desc=printable(progress), unit=unit, disable=None if progress else True, leave=False):
        if isinstance(item, DataError):
            if first_error:
                raise item
            errors.append(item)
        elif not errors:
            yield item
    if errors:
        raise Broken(errors)


def frames_needed(targets: list[int]) -> int:
    """Frames that CTC needs at the least: one a token, one more between equal neighbours."""
    return len(targets) + sum(a == b for a, b in itertools.pairwise(targets))


def hash_files(paths: list[Path]) -> dict[Path, str]:
    """SHA-256 of each file's bytes. Raises DataError naming the files that cannot be read."""

    def one(path: Path) -> str | DataError:
        digest = hashlib.sha256()
        try:
            with open(path, "rb", buffering=0) as file:
                while piece := file.read(2**20):
                    digest.update(piece)
        except OSError as error:
            return DataError(f"{path}: cannot read the audio ({error.strerror})")
        return digest.hexdigest()

    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        found = dict(zip(distinct, pool.map(one, distinct)))
    if errors := [error for error in found.values() if isinstance(error, DataError)]:
        raise Broken(errors)
    return found


# ---------------------------------------------------------------------------- SpecAugment and batches


@dataclass(frozen=True)
class SpecAugment:
    """Park et al. 2019 without time warping: masks of random place and width, filled with the mean (0)."""

    freq_masks: int
    freq_width: int  # bins, at most
    time_masks: int
    time_width: int  # frames, at most
    time_share: float = 1.0  # of the utterance, at most, a mask

    def draw(self, shape: tuple[int, int], rng: np.random.Generator) -> list[tuple[slice, slice]]:
        """The places to mask in features of shape (T, F)."""
        places = []
        frames, bins = shape
        time_width = min(self.time_width, int(self.time_share * frames))
        for _ in range(self.freq_masks):
            width = int(rng.integers(0, min(self.freq_width, bins) + 1))
            start = int(rng.integers(0, bins - width + 1))
            places.append((slice(None), slice(start, start + width)))
        for _ in range(self.time_masks):
            width = int(rng.integers(0, time_width + 1))
            start = int(rng.integers(0, frames - width + 1))
            places.append((slice(start, start + width), slice(None)))
        return places


@dataclass
class Batch:
    features: Tensor  # (B, T, F), zero behind each utterance's end
    input_lengths: Tensor  # (B,) int64, frames
    targets: Tensor  # (B, U) int64, blank behind each end
    target_lengths: Tensor  # (B,) int64
    texts: list[str]

    def to(self, device: torch.device) -> "Batch":
        moved = (t.to(device) for t in (self.features, self.input_lengths, self.targets, self.target_lengths))
        return Batch(*moved, self.texts)


def collate(examples: list[Example], features: list[Tensor] | None = None) -> Batch:
    """Pad examples to one batch; `features` stands in for theirs (SpecAugment)."""
    features = features or [example.features for example in examples]
    targets = [torch.tensor(example.targets, dtype=torch.int64) for example in examples]
    return Batch(
        torch.nn.utils.rnn.pad_sequence(features, batch_first=True),
        torch.tensor([len(f) for f in features]),
        torch.nn.utils.rnn.pad_sequence(targets, batch_first=True),
        torch.tensor([len(t) for t in targets]),
        [example.text for example in examples],
    )


class Epoch(torch.utils.data.Dataset):
    """The batches of an epoch, in random order, each of utterances of similar length, each utterance once.

    All is decided here, from (seed, epoch) alone, so that an epoch is the same whatever ran before it and whoever
    reads the features. An item is a Batch: this process's share, or one utterance that counts for nothing where the
    batch has fewer utterances than there are processes.
    batch_size: utterances a process; with batch_seconds, instead, seconds a process at most, padding counted; an
    utterance that is longer has its process for itself.
    mix(waveform, seed=, epoch=, index=), index into examples: what becomes of each waveform (N,) before its features.
    An example with at_speeds stands in the epoch as one of them, drawn for itself.
    """

    def __init__(
        self, examples: list[Example], batch_size: int, seed: int, epoch: int, augment: "SpecAugment | None",
        batch_seconds: float | None = None, process: int = 0, processes: int = 1,
        mix: Callable[..., Tensor] | None = None,
    ):  # fmt: skip
        self.examples, self.process, self.processes = at_one_speed(examples, seed, epoch), process, processes
        examples = self.examples
        self.mix = mix and functools.partial(mix, seed=seed, epoch=epoch)
        rng = draws.generator(seed, epoch, draws.ORDER)
        # Jittered by up to 10 % before sorting: similar lengths meet, the same utterances do not always.
        lengths = np.array([example.frames for example in examples])
        order = np.argsort(lengths * rng.uniform(0.9, 1.1, len(examples)), kind="stable")
        if batch_seconds:
            chunks = _chunks_of_frames(order, lengths, 100 * batch_seconds, processes)
        else:
            size = batch_size * processes
            chunks = [order[i : i + size] for i in range(0, len(order), size)]
        self.chunks = [chunks[i] for i in rng.permutation(len(chunks))]
        draw = augment.draw if augment else lambda shape, rng: []
        self.masks = [[draw(examples[i].source.shape, rng) for i in chunk] for chunk in self.chunks]

    def __len__(self) -> int:
        return len(self.chunks)

    def mine(self, index: int) -> slice:
        return slice(self.process, None, self.processes) if self.process < len(self.chunks[index]) else slice(1)

    def weight(self, index: int) -> int:
        """Utterances of batch `index` that this process has."""
        return len(self.chunks[index][self.process :: self.processes])

    def __getitem__(self, index: int) -> "Batch | DataError":
        mine, features = self.mine(index), []
        try:
            for i, masks in zip(self.chunks[index][mine], self.masks[index][mine]):
                features.append(self.features(int(i)))
                for place in masks:
                    features[-1][place] = 0
        except DataError as error:
            return error
        return collate([self.examples[i] for i in self.chunks[index][mine]], features)

    def features(self, i: int) -> Tensor:
        """(T, F) of examples[i] in this epoch, before SpecAugment."""
        example = self.examples[i]
        if not self.mix:
            return example.features.clone()
        return dataclasses.replace(example.source, mix=functools.partial(self.mix, index=i)).read()

    def batches(self, first: int = 0, workers: int = 0) -> Iterator["Batch"]:
        """From batch `first` on, prepared ahead by worker processes if there are any."""
        left = torch.utils.data.Subset(self, range(first, len(self)))
        yield from in_parallel(left, workers=workers, first_error=True)


def at_one_speed(examples: list[Example], seed: int, epoch: int) -> list[Example]:
    """The examples as they stand in an epoch: of those with at_speeds, the one that is drawn."""
    rng = draws.generator(seed, epoch, draws.SPEED)
    return [e.at_speeds[rng.integers(len(e.at_speeds))] if e.at_speeds else e for e in examples]


def _chunks_of_frames(order: np.ndarray, lengths: np.ndarray, frames: float, processes: int) -> list[np.ndarray]:
    """Cut `order` where a process's share, the longest times its count, would exceed `frames`."""
    cuts, start, longest = [], 0, 0
    for place, length in enumerate(lengths[order].tolist()):
        longest = max(longest, length)
        share = -(-(place - start + 1) // processes)  # utterances of the process that has most
        if share > 1 and share * longest > frames:
            cuts.append(place)
            start, longest = place, length
    return np.split(order, cuts)


def eval_batches(examples: list[Example], batch_size: int):
    """All examples once, longest first. Yields (indices into examples, Batch)."""
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].frames, i))
    for i in range(0, math.ceil(len(order) / batch_size)):
        indices = order[i * batch_size : (i + 1) * batch_size]
        yield indices, collate([examples[i] for i in indices])
