"""Real noise, added to speech at a true signal-to-noise ratio. Knows nothing of models.

The power of speech is measured where there is speech, the power of noise over the very samples that are added:
10 log10(P_speech / P_noise) is the SNR that was asked for, whatever the pauses and levels of the recordings.
"""

import hashlib
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
from audio_lottery import draws, sound

FRAME = 400  # samples: 25 ms
ACTIVE = 1e-4  # of the loudest frame's energy: 40 dB below it
SILENT = 1e-10  # mean square, -100 dB of full scale: what rounding to 16 bits leaves
TRIES = 10


def speech_power(waveform: Tensor) -> float:
    """Mean square over the speech-active samples: those in 25 ms frames within 40 dB of the loudest frame's energy.

    waveform: (N,) at 16 kHz.  0 if all samples are 0.
    Pauses do not count where they are quieter than that. Over the test parts of four corpora the level is that of
    ITU-T P.56 (method B) to 0.2 dB on average and 1.1 dB at most; at 30 dB it would be 0.3 to 0.5 dB above it.
    """
    squares = waveform.double().square()
    energy = torch.nn.functional.pad(squares, (0, -len(squares) % FRAME)).reshape(-1, FRAME).sum(1)
    active = (energy >= ACTIVE * energy.max()).repeat_interleave(FRAME)[: len(squares)]
    return float(squares[active].mean())


def power(waveform: Tensor) -> float:
    """Mean square."""
    return float(waveform.double().square().mean())


def mix(speech: Tensor, noise: Tensor, snr: float) -> Tensor:
    """speech + g noise, with 10 log10(speech_power(speech) / power(g noise)) = snr, in dB.

    speech, noise: (N,) at 16 kHz.  Returns (N,), which may go beyond [-1, 1]: nothing is clipped.
    Silent speech has no level to refer to, and is returned as it is.
    Raises ValueError if the lengths differ or the noise is all 0.
    """
    if speech.shape != noise.shape:
        raise ValueError(f"speech and noise must be as long as each other, got {len(speech)} and {len(noise)} samples")
    if not (added := power(noise)):
        raise ValueError("noise must not be all 0: no gain gives it a power")
    gain = math.sqrt(speech_power(speech) / added / 10 ** (snr / 10))
    return (speech.double() + gain * noise.double()).to(speech.dtype)


def segment(recordings: list[Tensor], samples: int, rng: np.random.Generator) -> Tensor:
    """(samples,) of one of the recordings: cropped at a random place, or, if it is shorter, looped from one.

    A silent crop is drawn again; after TRIES of them the loudest sample of the last recording is in the middle, or as
    near to it as the ends allow.
    """
    for _ in range(TRIES):
        recording = recordings[rng.integers(len(recordings))]
        if len(recording) < samples:
            start = int(rng.integers(len(recording)))
            return recording[(start + torch.arange(samples)) % len(recording)]
        start = int(rng.integers(len(recording) - samples + 1))
        if power(recording[start : start + samples]) >= SILENT:
            return recording[start : start + samples]
    start = int(recording.abs().argmax()) - samples // 2
    start = min(max(start, 0), len(recording) - samples)
    return recording[start : start + samples]


class Noise:
    """The recordings in folder/train, for training, and in folder/test, for the test: only what is used is read.

    snr: lowest and highest SNR of training, in dB; None: training stays clean. test_snr: each SNR of the test.
    Raises data.DataError for a folder that is not there or holds no recording, a recording that cannot be decoded or
    is silent, and one that is in both folders, sample for sample.
    """

    def __init__(self, folder: Path, snr: tuple[float, float] | None, test_snr: tuple[float, ...] = ()):
        self.snr, self.test_snr = snr, test_snr
        files = {part: _files(folder / part) for part, used in (("train", snr is not None), ("test", test_snr)) if used}
        hashes = data.hash_files([path for paths in files.values() for path in paths])
        rows = [[p, f.relative_to(folder / p).as_posix(), hashes[f]] for p, paths in files.items() for f in paths]
        self.sha256 = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
        heard = {part: _decoded(paths) for part, paths in files.items()}
        self.train, self.test = (heard.get(part, []) for part in ("train", "test"))
        seen = {hashlib.sha256(w.numpy()).digest(): f for f, w in zip(files.get("train", []), self.train)}
        for path, waveform in zip(files.get("test", []), self.test):
            if other := seen.get(hashlib.sha256(waveform.numpy()).digest()):
                raise data.DataError(f"--noise: {path} sounds as {other}: no noise of the test may be trained on")

    def __str__(self) -> str:
        told = []
        for what, recordings, levels in (
            ("training", self.train, self.snr and "{:g} to {:g}".format(*self.snr)),
            ("test", self.test, ", ".join(f"{snr:g}" for snr in self.test_snr)),
        ):
            if recordings:
                minutes = sum(map(len, recordings)) / data.SAMPLE_RATE / 60
                told.append(f"{what} at {levels} dB with {len(recordings)} recordings, {minutes:.1f} min")
        return "; ".join(told)

    def for_training(self, speech: Tensor, seed: int, epoch: int, index: int) -> Tensor:
        """speech (N,) with noise of folder/train: what, from where and how loud follows from the three numbers."""
        rng = draws.generator(seed, epoch, draws.NOISE, index)
        snr = rng.uniform(*self.snr)
        return mix(speech, segment(self.train, len(speech), rng), snr)

    def for_test(self, speech: Tensor, snr: float, index: int) -> Tensor:
        """speech (N,) with noise of folder/test at snr dB: the same recording, from the same place, for every snr.

        index: of the utterance in its test set. No model and no seed has a part in the draw.
        """
        return mix(speech, segment(self.test, len(speech), draws.generator(index, 0, draws.TEST_NOISE)), snr)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise data.DataError(f"{folder}: no such folder (--noise DIR: DIR/train for --snr, DIR/test for --test-snr)")
    found = sound.recordings(folder)
    if not found:
        raise data.DataError(f"{folder}: no recording in it (--noise looks for {' '.join(sorted(sound.AUDIO))})")
    return found


def _decoded(paths: list[Path]) -> list[Tensor]:
    """Raises data.Broken, which names all that cannot be used."""

    def decoded(path: Path) -> Tensor | data.DataError:
        try:
            waveform = sound.load_audio(path)
        except data.DataError as error:
            return error
        if power(waveform) < SILENT:
            return data.DataError(f"{path}: silent: there is no noise in it to add")
        return waveform

    with ThreadPoolExecutor() as pool:
        found = list(pool.map(decoded, paths))
    if errors := [error for error in found if isinstance(error, data.DataError)]:
        raise data.Broken(errors)
    return found
