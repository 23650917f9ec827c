"""Corpora, tokens, features, SpecAugment and batches. Knows nothing of models.

A corpus is a folder with train.jsonl, valid.jsonl and test.jsonl in NeMo's manifest form: one JSON
object a line with audio_filepath (relative to the manifest), text and, if known, duration and offset
(seconds) and speaker. Whatever is wrong with a file is a DataError that names the file, and the line in a manifest.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor
from tqdm import tqdm

SAMPLE_RATE = 16_000
FRAME_SECONDS = 0.01  # from one feature frame to the next
BLANK = "<blank>"  # token 0, of CTC and of the transducer
SPACE = "▁"  # sentencepiece's: what a BPE piece at the start of a word starts with


# Each kind of random draw by its name: the third number of its seed, behind the run's seed and an epoch, round or 0.
ORDER, DROPOUT, NOISE, TEST_NOISE, INITIAL_WEIGHTS, MASKS = range(6)


def draws(seed: int, number: int, stream: int, *more: int) -> np.random.Generator:
    """The generator of one kind of draw. A seed's trailing 0 changes nothing: ORDER is that of [seed, number]."""
    return np.random.default_rng([seed, number, stream, *more])


def torch_seed(seed: int, number: int, stream: int, *more: int) -> int:
    """What a generator of torch's is seeded with for one kind of draw."""
    return int(draws(seed, number, stream, *more).integers(2**63))


class DataError(ValueError):
    """Something is wrong with a file of the user's; the message names it."""


# ---------------------------------------------------------------------------- manifests


@dataclass(frozen=True)
class Utterance:
    audio: Path
    text: str
    speaker: str = ""
    offset: float | None = None  # seconds; None: the whole file
    duration: float | None = None  # seconds


def read_manifest(path: Path) -> list[Utterance]:
    """The utterances of one manifest, in its order. Raises DataError naming file and line."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the manifest ({error.strerror})") from None
    utterances = []
    for where, row in manifest_rows(content, str(path)):
        if not isinstance(row.get("text"), str):
            raise DataError(f"{where}: 'text' must be a string, got {row.get('text')!r}")
        text = " ".join(row["text"].split())
        if not text:
            raise DataError(f"{where}: the text is empty (every utterance needs at least one character)")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(f"{where}: the text has half a surrogate pair, which no UTF-8 file can hold: {text!r}")
        audio = path.parent / row["audio_filepath"]
        if not audio.is_file():
            raise DataError(f"{where}: no such audio file: {audio}")
        utterances.append(Utterance(audio, text, str(row.get("speaker", "")), row["offset"], row["duration"]))
    return utterances


def manifest_rows(content: bytes, name: str) -> Iterator[tuple[str, dict]]:
    """("name, line N", object) a line of a manifest: audio_filepath is a string, offset and duration seconds or None.

    Raises DataError naming the line for what is no such object, and if there is none.
    """
    empty = True
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        empty = False
        where = f"{name}, line {number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not a JSON object in UTF-8 ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object")
        if not isinstance(row.get("audio_filepath"), str):
            raise DataError(f"{where}: 'audio_filepath' must be a string, got {row.get('audio_filepath')!r}")
        seconds = {key: row.get(key) for key in ("offset", "duration")}
        for key, value in seconds.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 <= value < 1e7):
                raise DataError(f"{where}: {key!r} must be a number of seconds from 0 to 1e7, got {str(value)[:40]!r}")
        yield where, row | seconds
    if empty:
        raise DataError(f"{name}: the manifest is empty")


SPLITS = ("train", "valid", "test")


def read_corpus(folder: Path, splits: tuple[str, ...] = SPLITS) -> dict[str, list[Utterance]]:
    """{"train": [...], "valid": [...], "test": [...]}, or only these splits of it."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder (--data wants one with train.jsonl, valid.jsonl and test.jsonl)")
    return {split: read_manifest(folder / f"{split}.jsonl") for split in splits}


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


# ---------------------------------------------------------------------------- audio and features


AUDIO = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".sph", ".w64", ".caf"}


def recordings(folder: Path) -> list[Path]:
    """The recordings in a folder and in those below it, by their names' endings; hidden ones left out."""
    found = [
        path for path in folder.rglob("*")
        if path.suffix.lower() in AUDIO and path.is_file() and not path.name.startswith(".")
    ]  # fmt: skip
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def load_audio(path: Path, offset: float | None = None, duration: float | None = None) -> Tensor:
    """(N,) float32 in [-1, 1], mono, 16 kHz. Any format soundfile reads: WAV, FLAC, Ogg, Opus, MP3, SPHERE.

    offset: where a segment starts, in seconds; it ends after `duration`. Without an offset the whole file is read, and
    `duration`, if given, is what it must last: a decoder does not notice every cut, least of all in Ogg.
    Raises DataError for a missing, empty, truncated or non-audio file and for NaN or infinite samples.
    """
    try:
        with soundfile.SoundFile(path) as file:
            sample_rate, claimed = file.samplerate, file.frames / file.samplerate
            cut = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.M)  # libsndfile's log, of a WAV
            frames = -1
            if offset is not None:
                file.seek(min(round(offset * sample_rate), file.frames))
                claimed = min(claimed - offset, claimed if duration is None else duration)
                frames = max(0, round(claimed * sample_rate))
            samples = file.read(frames, dtype="float32", always_2d=True)  # (N, channels)
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError, ValueError, MemoryError) as error:
        raise DataError(f"{path}: cannot decode the audio ({str(error).strip()})") from None
    if not len(samples):
        raise DataError(f"{path}: no audio in it{'' if offset is None else f' from {offset} s on'}")
    if cut and int(cut[2]) < int(cut[1]) < 0x7FFF0000:  # larger sizes stand for "unknown" in WAVs written to a pipe
        raise DataError(f"{path}: truncated audio: {cut[2]} bytes of data where its header says {cut[1]}")
    seconds = len(samples) / sample_rate
    # MP3 headers count up to two frames of 1152 samples that no decoder returns: hence 0.1 s, or 2 %.
    for source, expected in (("its header", claimed), ("the manifest", duration or 0.0)):
        if seconds < expected - max(0.1, 0.02 * expected):
            raise DataError(f"{path}: truncated audio: {seconds:.2f} s decoded where {source} says {expected:.2f} s")
    if not np.isfinite(samples).all():
        raise DataError(f"{path}: a sample is NaN or infinite")
    return to_sample_rate(torch.from_numpy(samples).mean(1), sample_rate, path)


def to_sample_rate(waveform: Tensor, sample_rate: int, path: Path) -> Tensor:
    """(N,) at sample_rate -> (N',) at 16 kHz. Raises DataError, naming the file, for an absurd rate."""
    if not 1_000 <= sample_rate <= 768_000:
        raise DataError(f"{path}: a sample rate of {sample_rate} Hz (1,000 to 768,000 are read)")
    if sample_rate != SAMPLE_RATE:
        # A divisor below 25 Hz makes a filter of thousands of phases: round such rates, by 0.2 % at most from 8 kHz on.
        rate = sample_rate if math.gcd(sample_rate, SAMPLE_RATE) >= 25 else round(sample_rate / 25) * 25
        waveform = torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)
    return waveform


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
    if one_mean:
        return (features - features.mean()) / features.std().clamp(min=1e-3)
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
    shape: tuple[int, int]  # (T, F), T exact, or from the header of the file and not above what is decoded
    waveform: Tensor | None = None  # (N,), if it is kept in memory
    mix: Callable[[Tensor], Tensor] | None = None  # what becomes of the waveform before

    def read(self) -> Tensor:
        return features_of(self.utterance, self.kind, self.mix, self.waveform)[0]


@dataclass
class Example:
    source: Tensor | Source  # (T, F)
    text: str
    targets: list[int]  # token ids; characters without a token left out
    seconds: float = 0.0

    @property
    def features(self) -> Tensor:
        return self.source if isinstance(self.source, Tensor) else self.source.read()

    @property
    def frames(self) -> int:
        return self.source.shape[0]


def features_of(
    utterance: Utterance, kind: str, mix: Callable[[Tensor], Tensor] | None = None, waveform: Tensor | None = None
) -> tuple[Tensor, float]:
    """Decode and compute: normalised features (T, F) and seconds. Raises DataError naming the file.

    mix: what becomes of the waveform (N,) before, e.g. noise added. waveform: where it is decoded already.
    """
    if waveform is None:
        waveform = load_audio(utterance.audio, utterance.offset, utterance.duration)
    features = normalize(FEATURES[kind](mix(waveform) if mix else waveform), kind in ONE_MEAN)
    if not features.isfinite().all():
        raise DataError(f"{utterance.audio}: its samples are too large (features are not finite; full scale is 1)")
    return features, len(waveform) / SAMPLE_RATE


def in_parallel(dataset, progress: str = "", workers: int = 0, unit: str = "utt") -> Iterator:
    """The items of a dataset, in order, computed by worker processes. An item that is a DataError is raised."""
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=workers, worker_init_fn=_leave_signals_to_the_parent,
        multiprocessing_context="fork" if workers else None, collate_fn=lambda item: item,
        generator=torch.Generator(),  # else it draws from the global one
    )  # fmt: skip
    for item in tqdm(loader, desc=progress, unit=unit, disable=None if progress else True, leave=False):
        if isinstance(item, DataError):
            raise item
        yield item


def _leave_signals_to_the_parent(_worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def frames_needed(targets: list[int]) -> int:
    """Frames that CTC needs at the least: one a token, one more between equal neighbours."""
    return len(targets) + sum(a == b for a, b in itertools.pairwise(targets))


def hash_files(paths: list[Path]) -> dict[Path, str]:
    """SHA-256 of each file's bytes. Raises DataError naming the file."""

    def one(path: Path) -> str:
        try:
            return hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"{path}: cannot read the audio ({error.strerror})") from None

    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor() as pool:
        return dict(zip(distinct, pool.map(one, distinct)))


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
    batch_size: utterances a process; with batch_seconds, instead, seconds a process, padding counted.
    mix(waveform, seed=, epoch=, index=), index into examples: what becomes of each waveform (N,) before its features.
    """

    def __init__(
        self, examples: list[Example], batch_size: int, seed: int, epoch: int, augment: "SpecAugment | None",
        batch_seconds: float | None = None, process: int = 0, processes: int = 1,
        mix: Callable[..., Tensor] | None = None,
    ):  # fmt: skip
        self.examples, self.process, self.processes = examples, process, processes
        self.mix = mix and functools.partial(mix, seed=seed, epoch=epoch)
        rng = draws(seed, epoch, ORDER)
        # Jittered by up to 10 % before sorting: similar lengths meet, the same utterances do not always.
        lengths = np.array([example.frames for example in examples]) * rng.uniform(0.9, 1.1, len(examples))
        order = np.argsort(lengths, kind="stable")
        if batch_seconds:
            chunks = _chunks_of_frames(order, lengths, 100 * batch_seconds * processes)
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
        yield from in_parallel(torch.utils.data.Subset(self, range(first, len(self))), workers=workers)


def _chunks_of_frames(order: np.ndarray, lengths: np.ndarray, frames: float) -> list[np.ndarray]:
    """Cut `order` (shortest first) where the longest times the count would exceed `frames`."""
    cuts, start = [], 0
    for place in range(len(order)):
        if place > start and lengths[order[place]] * (place - start + 1) > frames:
            cuts.append(place)
            start = place
    return np.split(order, cuts)


def eval_batches(examples: list[Example], batch_size: int):
    """All examples once, longest first. Yields (indices into examples, Batch)."""
    order = sorted(range(len(examples)), key=lambda i: (-examples[i].frames, i))
    for i in range(0, math.ceil(len(order) / batch_size)):
        indices = order[i * batch_size : (i + 1) * batch_size]
        yield indices, collate([examples[i] for i in indices])
