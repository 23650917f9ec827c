"""Transcribe with an exported ticket, without torch: onnxruntime, numpy and soundfile alone.

    python onnx_transcribe.py net.onnx recording.flac ...

`transcribe.py TICKET --export net.onnx` wrote net.onnx, or net-encoder.onnx and two others, and tokens.txt beside it.
Recordings of 16 kHz, each taken whole: as transcribe.py does up to 20 s.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile

RATE, FFT, WINDOW, HOP, MELS = 16_000, 512, 400, 160, 80


def mel_filters():
    """(257, 80): triangles, evenly spaced on HTK's mel scale from 0 to 8 kHz."""
    hertz = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), MELS + 2) / 2595) - 1)
    bins = np.linspace(0, RATE / 2, FFT // 2 + 1)[:, None]
    rising = (bins - hertz[:-2]) / (hertz[1:-1] - hertz[:-2])
    falling = (hertz[2:] - bins) / (hertz[2:] - hertz[1:-1])
    return np.maximum(0, np.minimum(rising, falling))


def features_of(waveform):
    """(N,) in [-1, 1] -> (1, 1 + N // 160, 80) float32: log-mel, each bin of mean 0 and variance 1."""
    side = (FFT - WINDOW) // 2
    hann = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW), side)
    padded = np.pad(waveform.astype(np.float64), FFT // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, FFT)[::HOP]
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    mel = np.log(power @ mel_filters() + 1e-6)
    return ((mel - mel.mean(0)) / np.maximum(mel.std(0), 1e-3)).astype(np.float32)[None]


def read(path):
    """(N,) in [-1, 1]: the mean of the channels."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        sys.exit(f"{path}: {error}")
    if rate != RATE or not len(samples):
        sys.exit(f"{path}: {len(samples)} samples at {rate} Hz: some at {RATE} Hz are wanted")
    return samples.mean(1)


class Ctc:
    """One graph: the best token of each frame, repeats merged, blanks dropped."""

    def __init__(self, path):
        self.graph = onnxruntime.InferenceSession(path)
        if self.graph.get_modelmeta().custom_metadata_map.get("features") == "log1p-stft":
            sys.exit(f"{path}: takes other features than log-mel")

    def __call__(self, features):
        best = self.graph.run(None, {"features": features})[0][0].argmax(-1)  # (T',)
        return [k for k, before in zip(best, [0, *best]) if k != before and k]


class Transducer:
    """Three graphs: in each frame, tokens until the blank wins."""

    def __init__(self, path):
        stem = str(path).removesuffix("-encoder.onnx")
        parts = ("encoder", "predictor", "joiner")
        graphs = [onnxruntime.InferenceSession(f"{stem}-{part}.onnx") for part in parts]
        self.encoder, self.predictor, self.joiner = graphs
        self.most = int(self.encoder.get_modelmeta().custom_metadata_map["max_symbols"])

    def predict(self, token, h, c):
        return self.predictor.run(None, {"token": np.array([[token]]), "h": h, "c": c})

    def __call__(self, features):
        zeros = np.zeros([1, 1, self.predictor.get_inputs()[1].shape[2]], np.float32)
        found, (out, h, c) = [], self.predict(0, zeros, zeros)
        for frame in self.encoder.run(None, {"features": features})[0][0]:
            for _ in range(self.most):
                (logits,) = self.joiner.run(None, {"encoder_out": frame[None], "predictor_out": out})
                if not logits.argmax():
                    break
                found.append(logits.argmax())
                out, h, c = self.predict(found[-1], h, c)
        return found


def main(graph, *recordings):
    path = Path(graph)
    encoder = path if path.stem.endswith("-encoder") else path.with_name(f"{path.stem}-encoder.onnx")
    recognise = Transducer(encoder) if encoder.exists() else Ctc(path)
    tokens = path.with_name("tokens.txt").read_bytes().decode().split("\n")
    for recording in recordings:
        text = "".join(tokens[k] for k in recognise(features_of(read(recording)))).replace("▁", " ")
        print(" ".join("".join(c for c in text if not (c < " " or "\x7f" <= c < "\xa0")).split()))  # safe on a terminal


if __name__ == "__main__":
    main(*sys.argv[1:])
