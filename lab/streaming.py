"""A stream arrives in pieces, and cannot know the mean of what is to come: its features, and a Transducer on them."""

import signal
from collections.abc import Iterator
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import log_mel
from models import Emission, Transducer


def pcm_chunks(file: BinaryIO, samples: int) -> Iterator[tuple[Tensor, bool]]:
    """A stream of 16-bit PCM -> chunks (samples,) of it, and whether it is the last one, which may be shorter.

    The first Ctrl-C ends it as its end does, so that all that was said is written; the next one acts as ever.
    """
    ended = last = waiting = False

    def stop(*_) -> None:
        nonlocal last
        last = True
        signal.signal(signal.SIGINT, before)
        if waiting:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as of what a shell runs in the background
        signal.signal(signal.SIGINT, stop)
    try:
        while not ended:
            content = b""
            try:
                while len(content) < 2 * samples and not last:
                    waiting = True
                    more = file.read1(2 * samples - len(content))
                    waiting = False
                    content, last = content + more, last or not more
            except KeyboardInterrupt:
                waiting = False
            ended = last
            pcm = np.frombuffer(content[: len(content) // 2 * 2], "<i2").astype(np.float32)
            yield torch.from_numpy(pcm / 32768), ended
    finally:
        signal.signal(signal.SIGINT, before)


class Running:
    """Normalisation of features that arrive in pieces, since a stream cannot know the mean of what is to come.

    Mean and variance of a frame are those of all frames up to it; the first SECOND frames share those of them all, so
    that nothing comes out before a second is there. The pieces make no difference, up to rounding.
    moments: of similar audio, (2, F); they count as KNOWN frames heard before, and nothing waits.
    one_mean: one mean and one variance for all bins, as in data.normalize.
    """

    SECOND, KNOWN = 100, 300  # frames

    def __init__(self, moments: Tensor | None = None, one_mean: bool = False):
        self.one_mean = one_mean
        self.held, self.count, self.sums = None, 0, None  # sums of x and of x squared, (2, F) float64
        if moments is not None:
            self.count, self.sums = self.KNOWN, self.KNOWN * (moments.mean(1, keepdim=True) if one_mean else moments)

    @staticmethod
    def moments(recordings: list[Tensor]) -> Tensor:
        """The mean of x and of x squared over the frames of all recordings, each (T, F). Returns (2, F) float64."""
        x = torch.cat(recordings).double()
        return torch.stack((x.mean(0), x.square().mean(0)))

    def push(self, features: Tensor, last: bool = False) -> Tensor:
        """(T, F), T may be 0 -> (T', F), those now known. last: nothing follows."""
        x = features if self.held is None else torch.cat([self.held, features])
        if not len(x) or (self.count + len(x) < self.SECOND and not last):
            self.held = x
            return x[:0]
        values = torch.stack((x, x.square()), 1).double()  # (T, 2, F)
        values = values.mean(2, keepdim=True) if self.one_mean else values
        if self.sums is not None:
            values[0] += self.sums
        sums = values.cumsum(0)
        # whose sums a frame takes: its own, in the first second the last one's of that
        at = torch.arange(len(x)).clamp(min=min(self.SECOND - self.count, len(x)) - 1)
        mean, square = (sums[at] / (self.count + 1 + at)[:, None, None]).unbind(1)
        deviation = (square - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
        self.held, self.count, self.sums = x[:0], self.count + len(x), sums[-1]
        return ((x - mean) / deviation).float()


class FeatureStream:
    """Log-mel features of audio that arrives in pieces, normalised by Running: those of all of it, up to rounding."""

    EDGE = 2  # frames: a window ends 256 samples, 1.6 frames, from its middle

    def __init__(self, moments: Tensor | None = None):
        self.samples, self.running = torch.zeros(0), Running(moments)
        self.known = 0  # frames in samples, given already

    def push(self, samples: Tensor, last: bool = False) -> Tensor:
        """(N,) at 16 kHz, N may be 0 -> (T, 80), the frames that are now known. last: nothing follows."""
        self.samples = torch.cat([self.samples, samples])
        whole = 1 + (len(self.samples) - (0 if last else 256)) // 160  # frames whose window is there
        if whole <= self.known or not len(self.samples):
            return self.running.push(torch.zeros(0, 80), last)
        features = log_mel(self.samples)[self.known : whole]
        start = max(0, whole - self.EDGE)
        self.samples, self.known = self.samples[160 * start :], whole - start
        return self.running.push(features, last)


class Stream:
    """A Transducer on one utterance whose features arrive in pieces: `emissions` of all of them, up to rounding.

    A frame is known when the features of its window are, (window - 8) * 10 ms after its own 80 ms.
    """

    def __init__(self, model: Transducer):
        self.model, self.rest, self.frames = model, torch.zeros(0, 80), 0  # encoder frames so far
        self.states = self.decoded = None  # of the encoder's LSTMs, of the greedy loop

    def push(self, features: Tensor, last: bool = False) -> list[Emission]:
        """features: (T, 80), T may be 0.  Returns what is new. last: nothing follows."""
        x = torch.cat([self.rest, features])
        new = -(-len(x) // 4) if last else max(0, (len(x) - self.model.window) // 4 + 1)
        self.rest = x[4 * new :]
        if not new:
            return []
        x = F.pad(x, (0, 0, 0, self.model.window - 1 if last else 0))[: 4 * (new - 1) + self.model.window]
        encoder_out, self.states = self.model.windows(x.T[None], self.states)
        first = -(-self.frames // 2)  # the joiner's frames so far: it sees encoder frames 0, 2, 4, ...
        encoder_out = encoder_out[:, self.frames % 2 :]
        self.frames += new
        length = torch.tensor([encoder_out.shape[1]])
        (found,), self.decoded = self.model.greedy(*self.model.every_second(encoder_out, length), self.decoded)
        return [e._replace(start=first + e.start, end=first + e.end) for e in found]
