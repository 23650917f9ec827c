"""The three recognisers: CnnLstm (CTC), Transducer (RNN-T) and ConformerCtc. Knows nothing of masks.

One interface, so that no caller asks which it has:

    model(features, input_lengths, ...)                               log_probs or logits, for inspection
    model.loss(features, input_lengths, targets, target_lengths)      scalar: sum over the batch / batch size
    model.transcribe(features, input_lengths)                         list of token id lists, greedy
    model.emissions(features, input_lengths)                          list of lists of Emission: these tokens, timed
    model.stride                                                      feature frames in a frame of an Emission
    model.output_lengths(input_lengths)                               encoder frames; CTC needs enough of them
    model.features                                                    which of data.FEATURES it reads
    model.TOKEN_LAYERS                                                layers whose shape and meaning are the tokens'

features (B, T, F) float; input_lengths (B,) int64, 1 <= length <= T; targets (B, U)
int64; target_lengths (B,) int64; token 0 is the blank. In evaluation mode no output depends on padding
or on the other utterances of the batch.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.distributed.nn.functional
import torch.nn.functional as F
import torchaudio
from torch import Tensor, nn

try:
    import _lottery  # registers torch.ops.audio_lottery

    torch.ops.audio_lottery.rotary_attention.default  # noqa: B018  AttributeError: an older build, as lottery.py says
    COMPILED_ON = {"cpu", "cuda"} if _lottery.build_facts()["cuda"] else {"cpu"}
except (ImportError, AttributeError):
    COMPILED_ON = set()
BLANK = 0


class Emission(NamedTuple):
    """A token that was recognised. Frames are of `stride` feature frames."""

    token: int
    start: int  # its first frame
    end: int  # behind its last frame
    probability: float  # for CTC the highest in these frames


def valid_frames(lengths: Tensor, frames: int) -> Tensor:
    """(B,) lengths -> (B, frames) bool, True before each end."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def valid_rows(lengths: Tensor, frames: int) -> Tensor:
    """Indices of the valid frames among the B * frames rows of a padded batch, (N,) int64."""
    return valid_frames(lengths, frames).flatten().nonzero().squeeze(1)


def without_padding(features: Tensor, input_lengths: Tensor) -> Tensor:
    """features (B, T, F), set to zero behind each end."""
    return torch.where(valid_frames(input_lengths, features.shape[1])[:, :, None], features, 0.0)


def images(x: Tensor, training: bool) -> Tensor:
    """x (B, C, F, T) as a convolution trains on it fastest: on a CPU with channels last, in half the time."""
    return x.contiguous(memory_format=torch.channels_last) if training and x.device.type == "cpu" else x


def unpadded(x: Tensor, rows: Tensor) -> bool:
    """Is x (B, T, ...) known to have no padding, as one utterance has none? Asked for speed, so not in training.

    No graph of an exported utterance has to select rows. (torch.compile says that it exports, too.)
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    return len(rows) == x.shape[0] * x.shape[1] and not torch.is_grad_enabled()


def on_rows(layer, x: Tensor, rows: Tensor) -> Tensor:
    """Apply `layer` to the valid rows of x (B, T, ...) alone; zeros elsewhere.

    Batch norm sees no padding this way: neither in training, where the official code counts it, nor after.
    """
    if unpadded(x, rows):
        return layer(x.flatten(0, 1).contiguous()).unflatten(0, x.shape[:2])
    y = layer(x.flatten(0, 1).index_select(0, rows))  # (N, ...)
    out = y.new_zeros(x.shape[0] * x.shape[1], *y.shape[1:])
    return out.index_copy(0, rows, y).unflatten(0, x.shape[:2])


class BatchNorm(nn.BatchNorm1d):
    """Batch norm of (N, C, ...). Where torch.distributed runs, its statistics are of all processes together, less those
    that do not count (processes.count_in_statistics). (torch's SyncBatchNorm is that for CUDA alone.)
    """

    counted = True  # does this process's batch count?

    def _check_input_dim(self, input: Tensor) -> None:  # torch has a class for each number of dimensions
        pass

    def forward(self, x: Tensor) -> Tensor:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not (self.training and distributed):
            return super().forward(x)
        add_up = torch.distributed.nn.functional.all_reduce  # the sum over processes, in backward() too
        values = (x.float() if x.dtype in (torch.bfloat16, torch.float16) else x).movedim(1, -1)  # (..., C)
        weight = float(self.counted)
        sums = add_up(weight * torch.cat([values.flatten(0, -2).sum(0), values.new_tensor([x[:, 0].numel()])]))
        n, mean = sums[-1], sums[:-1] / sums[-1]
        variance = add_up(weight * (values - mean).square().flatten(0, -2).sum(0)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        normal = (values - mean) * (variance + self.eps).rsqrt()
        return (normal * self.weight + self.bias).movedim(-1, 1).to(x.dtype)


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """log_probs: (B, T, V). Sum over the batch / batch size, as the paper trains."""
    loss = F.ctc_loss(log_probs.transpose(0, 1), targets, lengths, target_lengths, BLANK, reduction="sum")
    return loss / len(lengths)


def ctc_greedy(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """Best token a frame, repeats merged, blanks dropped. log_probs: (B, T, V)."""
    best = log_probs.argmax(-1).cpu()
    collapsed = (row[:length].unique_consecutive() for row, length in zip(best, lengths.tolist()))
    return [row[row != BLANK].tolist() for row in collapsed]


def ctc_emissions(log_probs: Tensor, lengths: Tensor) -> list[list[Emission]]:
    """ctc_greedy with times: a token lasts as long as it is the best one of its frame. log_probs: (B, T, V)."""
    found = []
    for values, best, length in zip(*(x.cpu() for x in log_probs.max(-1)), lengths.tolist()):
        runs, counts = best[:length].unique_consecutive(return_counts=True)
        spans = zip(runs.tolist(), (counts.cumsum(0) - counts).tolist(), counts.cumsum(0).tolist())
        found.append([Emission(k, s, e, float(values[s:e].max().exp())) for k, s, e in spans if k != BLANK])
    return found


# ---------------------------------------------------------------------------- CNN-LSTM with CTC


class BiLstm(nn.Module):
    """Bidirectional LSTM over padded batches; the two directions are summed.

    The backward direction runs over each utterance flipped within its own length: the same numbers as a packed
    nn.LSTM(bidirectional=True), about three times as fast on a CPU.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.ahead = nn.LSTM(inputs, hidden, batch_first=True)
        self.back = nn.LSTM(inputs, hidden, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor, rows: Tensor) -> Tensor:
        """(B, T, inputs), rows: the valid frames' -> (B, T, hidden); what stands behind an end is undefined."""
        if getattr(self.back, "takes_ends", False):  # one that compress made, which needs no flip
            return self.ahead(x)[0] + self.back(x, None, lengths)[0]
        if unpadded(x, rows):
            return self.ahead(x)[0] + self.back(x.flip(1))[0].flip(1)
        time = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        flip = torch.where(time < lengths[:, None], lengths[:, None] - 1 - time, time)[:, :, None]  # (B, T, 1)
        back = self.back(x.gather(1, flip.expand_as(x)))[0]
        return self.ahead(x)[0] + back.gather(1, flip.expand_as(back))


def widened(shape: dict, factor: int) -> dict:
    """`shape` with `factor` times its channels, widths and heads, as deep as before."""
    widths = ("channels", "hidden", "predictor", "joiner", "width", "heads")
    return {key: factor * value if key in widths else value for key, value in shape.items()}


class CnnLstm(nn.Module):
    """The paper's CNN-LSTM (Deep Speech 2): two convolutions, BiLSTM layers, CTC.

    At size "paper" it is the published network, 86,618,400 parameters for 29 tokens: Conv2d 1->32 41x11 and
    32->32 21x11, batch norm and Hardtanh(0, 20) after each, five BiLSTMs of 1024 with summed directions, batch
    norm before layers 2-5, batch norm and a bias-free Linear. One thing differs from the official code: batch
    norm takes its statistics over valid frames only. Convolution weights are (out, in, frequency, time).
    """

    DEMO = dict(
        features="log-mel", channels=16, kernels=((21, 11), (11, 7)), strides=((2, 2), (2, 2)),
        hidden=192, layers=2, dropout=0.2,
    )  # fmt: skip
    SIZES = {
        "demo": DEMO,
        "wide": widened(DEMO, 2),
        "wider": widened(DEMO, 3),
        "paper": dict(
            features="log1p-stft", channels=32, kernels=((41, 11), (21, 11)), strides=((2, 2), (2, 1)),
            hidden=1024, layers=5, dropout=0.0,
        ),
    }  # fmt: skip
    BINS = {"log-mel": 80, "log1p-stft": 161}

    TOKEN_LAYERS = ("output",)

    def __init__(
        self, tokens: int, features, channels, kernels, strides, hidden, layers, dropout, first_channels=None
    ):  # fmt: skip
        """first_channels: of the first convolution, if it has others than those behind it."""
        super().__init__()
        self.features, self.time_strides = features, [stride[1] for stride in strides]
        self.stride = math.prod(self.time_strides)
        inputs, bins, self.convs, self.conv_norms = 1, self.BINS[features], nn.ModuleList(), nn.ModuleList()
        for i, (kernel, stride) in enumerate(zip(kernels, strides)):
            padding = (kernel[0] // 2, kernel[1] // 2)
            outputs = channels if i else first_channels or channels
            self.convs.append(nn.Conv2d(inputs, outputs, kernel, stride, padding))
            self.conv_norms.append(BatchNorm(outputs))
            inputs = outputs
            bins = (bins - 1) // stride[0] + 1
        sizes = [channels * bins] + [hidden] * layers
        self.lstms = nn.ModuleList(BiLstm(sizes[i], hidden) for i in range(layers))
        self.lstm_norms = nn.ModuleList(BatchNorm(hidden) for _ in range(layers))  # behind each layer
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, tokens, bias=False)

    def output_lengths(self, input_lengths: Tensor) -> Tensor:
        for stride in self.time_strides:
            input_lengths = (input_lengths - 1) // stride + 1
        return input_lengths

    def forward(self, features: Tensor, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, F), (B,) -> log_probs (B, T', V), lengths (B,)."""
        x = without_padding(features, input_lengths).transpose(1, 2)[:, None]  # (B, 1, F, T)
        lengths = input_lengths
        for conv, norm, stride in zip(self.convs, self.conv_norms, self.time_strides):
            x = conv(images(x, self.training))  # (B, C, F', T')
            lengths = (lengths - 1) // stride + 1
            rows, frames = valid_rows(lengths, x.shape[3]), x.permute(0, 3, 1, 2)  # (B, T', C, F')
            if unpadded(frames, rows):
                x = F.hardtanh(norm(x), 0.0, 20.0)  # as it stands; exported, it follows its convolution
            else:
                x = on_rows(lambda some: F.hardtanh(norm(some), 0.0, 20.0), frames, rows).permute(0, 2, 3, 1)  # noqa: B023
        x = x.permute(0, 3, 1, 2).flatten(2)  # (B, T', C * F')
        for lstm, norm in zip(self.lstms, self.lstm_norms):
            x = self.dropout(on_rows(norm, lstm(x, lengths, rows), rows))  # (B, T', hidden)
        return self.output(x).log_softmax(-1), lengths

    def loss(self, features: Tensor, input_lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
        return ctc_loss(*self(features, input_lengths), targets, target_lengths)

    def transcribe(self, features: Tensor, input_lengths: Tensor) -> list[list[int]]:
        return ctc_greedy(*self(features, input_lengths))

    def emissions(self, features: Tensor, input_lengths: Tensor) -> list[list[Emission]]:
        return ctc_emissions(*self(features, input_lengths))


# ---------------------------------------------------------------------------- RNN-Transducer


def reference_transducer_loss(encoder_out, predictor_out, output, targets, lengths, target_lengths) -> Tensor:
    """The transducer's loss (Graves 2012) of a tanh joiner, summed over the batch.

    encoder_out (B, T, joiner), predictor_out (B, U + 1, joiner); output: (..., joiner) -> logits (..., V); targets
    (B, U) int64; lengths, target_lengths: B ints each, 1 <= length <= T, 0 <= target length <= U.
    """
    # The valid cells (t, u) of all utterances in one column: a padded (B, T, U + 1, joiner) is mostly padding.
    shapes = [(t, u + 1) for t, u in zip(lengths, target_lengths)]
    cells = [(encoder_out[b, :t, None] + predictor_out[b, None, :u]).flatten(0, 1) for b, (t, u) in enumerate(shapes)]
    logits = output(torch.tanh(torch.cat(cells))).split([t * u for t, u in shapes])  # each (t * u, V)

    def loss_of(b: int) -> Tensor:
        t, u = shapes[b]
        sizes = targets.new_tensor([[t], [u - 1]]).int()
        lattice, said = logits[b].view(1, t, u, -1).float(), targets[b : b + 1, : u - 1].int()
        return torchaudio.functional.rnnt_loss(lattice, said, *sizes, BLANK, reduction="sum")

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # torchaudio's CPU kernel runs on one thread
        losses = list((pool.map if targets.device.type == "cpu" else map)(loss_of, range(len(shapes))))
    return torch.stack(losses).sum()


class CompiledLoss(torch.autograd.Function):
    """The same by csrc/, from (encoder_out, predictor_out, weight, bias, targets, lengths, target_lengths)."""

    @staticmethod
    def forward(ctx, *arguments):
        loss, *gradients = torch.ops.audio_lottery.transducer_loss(*arguments)
        ctx.save_for_backward(*gradients)  # made with the loss, for backward() to scale
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        return *(scale * gradient for gradient in ctx.saved_tensors), None, None, None


class Transducer(nn.Module):
    """RNN-Transducer (Graves 2012): LSTM encoder, LSTM predictor, tanh joiner.

    The encoder is unidirectional. A strided convolution makes one 40 ms frame out of a window of `window` feature
    frames, so it looks (window - 4) * 10 ms ahead and can stream. The joiner sees every second frame (80 ms), which
    halves its lattice. Training adds `ctc_weight` times a CTC loss on all encoder frames, whose output layer serves
    for nothing else: without it the encoder learns slowly from little speech.
    The paper's 132 M shape was never published: size "paper" is ours, five encoder layers and one predictor layer.
    """

    DEMO = dict(window=12, channels=192, hidden=256, layers=2, predictor=128, joiner=128, dropout=0.1)
    SIZES = {
        "demo": DEMO,
        "wide": widened(DEMO, 2),
        "wider": widened(DEMO, 3),
        "paper": dict(window=12, channels=768, hidden=1664, layers=5, predictor=1664, joiner=1024, dropout=0.1),
    }
    MAX_SYMBOLS = 8  # tokens an 80 ms frame may emit in `transcribe`
    features, stride = "log-mel", 8
    TOKEN_LAYERS = ("embedding", "output", "ctc_output")

    def __init__(self, tokens: int, window, channels, hidden, layers, predictor, joiner, dropout, ctc_weight=0.5):
        super().__init__()
        self.window, self.ctc_weight = window, ctc_weight
        self.subsample = nn.Conv1d(80, channels, window, stride=4)
        sizes = [channels] + [hidden] * layers
        self.encoder = nn.ModuleList(nn.LSTM(sizes[i], hidden, batch_first=True) for i in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in sizes)  # before each layer, and behind the last
        self.embedding = nn.Embedding(tokens, predictor)
        self.predictor = nn.LSTM(predictor, predictor, batch_first=True)
        self.encoder_projection = nn.Linear(hidden, joiner)
        self.predictor_projection = nn.Linear(predictor, joiner, bias=False)
        self.output = nn.Linear(joiner, tokens)
        self.ctc_output = nn.Linear(hidden, tokens)
        self.dropout = nn.Dropout(dropout)
        self.greedy_loop = None  # what use_greedy was given

    def output_lengths(self, input_lengths: Tensor) -> Tensor:
        return (input_lengths - 1) // 4 + 1

    def encode(self, features: Tensor, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 80), (B,) -> encoder_out (B, T', hidden), lengths (B,), T' = ceil(T / 4)."""
        x = without_padding(features, input_lengths).transpose(1, 2)
        return self.windows(F.pad(x, (0, self.window - 1)))[0], self.output_lengths(input_lengths)

    def windows(self, x: Tensor, states: list | None = None) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """x (B, 80, N) -> encoder_out (B, (N - window) // 4 + 1, hidden) and each LSTM's state, from `states` on."""
        x = self.norms[0](self.subsample(x).transpose(1, 2).relu())  # (B, T', channels)
        after = []
        for lstm, norm, state in zip(self.encoder, self.norms[1:], states or [None] * len(self.encoder)):
            x, state = lstm(x, state)
            x = self.dropout(norm(x))
            after.append(state)
        return x, after

    def every_second(self, encoder_out: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """encoder_out (B, T', hidden) -> what the joiner adds to the predictor, (B, ceil(T' / 2), joiner), lengths."""
        return self.encoder_projection(encoder_out[:, ::2]), (lengths + 1) // 2

    def predict(self, tokens: Tensor, state=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """tokens (B, U) -> what the joiner adds to the encoder, (B, U, joiner), and the LSTM's state."""
        out, state = self.predictor(self.dropout(self.embedding(tokens)), state)
        return self.predictor_projection(self.dropout(out)), state

    def join(self, summed: Tensor) -> Tensor:
        """The sum of what encoder and predictor add, (..., joiner) -> logits (..., V)."""
        return self.output(torch.tanh(summed))

    def forward(self, features: Tensor, input_lengths: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 80), (B,), (B, U) -> logits (B, T'', U + 1, V), lengths (B,), T'' = ceil(T / 8)."""
        encoder_out, lengths = self.every_second(*self.encode(features, input_lengths))
        predictor_out, _ = self.predict(F.pad(targets, (1, 0), value=BLANK))
        return self.join(encoder_out[:, :, None] + predictor_out[:, None]), lengths

    def loss(self, features: Tensor, input_lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
        encoder_out, lengths = self.encode(features, input_lengths)
        log_probs = self.ctc_output(encoder_out).log_softmax(-1)
        ctc = ctc_loss(log_probs, lengths, targets, target_lengths)
        encoder_out, lengths = self.every_second(encoder_out, lengths)
        predictor_out, _ = self.predict(F.pad(targets, (1, 0), value=BLANK))
        counts, layer = (lengths.tolist(), target_lengths.tolist()), self.output
        # Compiled in float32, through a layer as it was built: nn.Linear, and no hooks that would not be called.
        hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
        built = type(layer) is nn.Linear and layer.bias is not None and not any(hooks)
        if built and encoder_out.dtype == layer.weight.dtype == torch.float32 and features.device.type in COMPILED_ON:
            loss = CompiledLoss.apply(encoder_out, predictor_out, layer.weight, layer.bias, targets.long(), *counts)
        else:
            loss = reference_transducer_loss(encoder_out, predictor_out, layer, targets, *counts)
        return loss / len(lengths) + self.ctc_weight * ctc

    def transcribe(self, features: Tensor, input_lengths: Tensor) -> list[list[int]]:
        return [[emission.token for emission in found] for found in self.emissions(features, input_lengths)]

    def emissions(self, features: Tensor, input_lengths: Tensor) -> list[list[Emission]]:
        return self.greedy(*self.every_second(*self.encode(features, input_lengths)))[0]

    def greedy(self, encoder_out: Tensor, lengths: Tensor, state=None) -> tuple[list[list[Emission]], tuple]:
        """At each frame tokens are emitted until the blank wins, MAX_SYMBOLS at most.

        encoder_out (B, T'', joiner) of every_second, lengths (B,). Returns what each utterance emits, and the state
        from which frames that follow go on: predictor_out (B, joiner) and the predictor's (h, c).
        Every utterance keeps its own frame pointer, so no step of the batch waits for another's frame.
        """
        if self.greedy_loop is not None and len(lengths):
            return self.greedy_by_loop(encoder_out, lengths, state)
        batch, rows = len(lengths), torch.arange(len(lengths), device=encoder_out.device)
        frame, emitted = lengths.new_zeros(2, batch)  # where each utterance stands, and tokens out of this frame
        if state is None:
            predictor_out, state = self.predict(lengths.new_full((batch, 1), BLANK))
            state = (predictor_out[:, 0], state)
        predictor_out, state = state
        steps = []
        while (frame < lengths).any():
            active = frame < lengths
            logits = self.join(encoder_out[rows, frame.clamp(max=encoder_out.shape[1] - 1)] + predictor_out)
            best = torch.where(active, logits.argmax(-1), BLANK)
            best = torch.where(emitted < self.MAX_SYMBOLS, best, BLANK)
            probability = logits.softmax(-1).gather(1, best[:, None])[:, 0]
            steps.append(torch.stack((best.double(), frame.double(), probability.double())))
            emits = best != BLANK
            frame, emitted = torch.where(emits, frame, frame + 1), torch.where(emits, emitted + 1, 0)
            if emits.any():  # only those that emitted move on in the predictor
                out, (h, c) = self.predict(best[:, None], state)
                predictor_out = torch.where(emits[:, None], out[:, 0], predictor_out)
                state = (torch.where(emits[:, None], h, state[0]), torch.where(emits[:, None], c, state[1]))
        table = torch.stack(steps).permute(2, 0, 1).tolist() if steps else [[]] * batch  # (B, steps, 3)
        found = [[Emission(int(k), int(t), int(t) + 1, p) for k, t, p in row if k != BLANK] for row in table]
        return found, (predictor_out, state)

    def greedy_parts(self) -> dict:
        """What the loop of `greedy` is made of, by the names that another implementation of it takes them under."""
        return {
            "embedding": self.embedding, "predictor": self.predictor, "projection": self.predictor_projection,
            "output": self.output, "max_symbols": self.MAX_SYMBOLS,
        }  # fmt: skip

    def use_greedy(self, loop: nn.Module | None) -> None:
        """Let `greedy` run this loop, made of greedy_parts; None: its own, the one above.

        loop(encoder_out (T, joiner), state) -> list of (token, frame, probability), state, for one utterance. A state
        is [predictor_out (joiner,), h (H,), c (H,)], or [] at the start.
        """
        self.greedy_loop = loop

    def greedy_by_loop(self, encoder_out: Tensor, lengths: Tensor, state) -> tuple[list[list[Emission]], tuple]:
        """`greedy` by greedy_loop, utterance by utterance; one at least."""
        found, states = [], []
        for b, length in enumerate(lengths.tolist()):
            before = [] if state is None else [state[0][b], state[1][0][0, b], state[1][1][0, b]]
            emitted, after = self.greedy_loop(encoder_out[b, :length], before)
            found.append([Emission(token, frame, frame + 1, p) for token, frame, p in emitted])
            states.append(after)
        predictor_out, h, c = (torch.stack(tensors) for tensors in zip(*states))
        return found, (predictor_out, (h[None], c[None]))


# ---------------------------------------------------------------------------- Conformer with CTC


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021). x: (B, heads, T, d), d even."""
    a, b = x.chunk(2, -1)
    rates = 10_000.0 ** (-torch.arange(a.shape[-1], device=x.device, dtype=torch.float32) / a.shape[-1])
    angle = torch.outer(torch.arange(x.shape[-2], device=x.device, dtype=torch.float32), rates)  # (T, d / 2)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def in_one_pass(module: nn.Module, x: Tensor) -> bool:
    """Does it go on from x by what use_fused was given? Not for training, gradients or traces (torch.compile's too)."""
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return module.fused is not None and not (module.training or x.requires_grad or traced)


class Attention(nn.Module):
    """Multi-head self-attention with relative positions through rotation; padded keys are masked."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fused = None  # what ConformerBlock.use_fused was given

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x: (B, T, width), valid: (B, T) bool -> (B, T, width)."""
        qkv = self.qkv(x)
        if in_one_pass(self, qkv):
            return self.out(self.fused(qkv, valid))
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, d)
        x = F.scaled_dot_product_attention(rotate(q), rotate(k), v, valid[:, None, None])
        return self.out(x.transpose(1, 2).flatten(2))


class ConformerBlock(nn.Module):
    """Gulati et al. 2020, Fig. 1: half a feed-forward, attention, convolution, half a feed-forward, layer norm.

    Dropout stands behind each of the four parts; inside feed-forward and attention it cost a CPU a quarter of the step.
    """

    def __init__(self, width: int, heads: int, kernel: int, dropout: float, inner: int):
        super().__init__()
        drop = nn.Dropout(dropout)

        def feed_forward() -> nn.Sequential:
            up, down = nn.Linear(width, inner), nn.Linear(inner, width)
            return nn.Sequential(nn.LayerNorm(width), up, nn.SiLU(), down, drop)

        self.feed_forward1, self.feed_forward2 = feed_forward(), feed_forward()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.conv_norm = nn.LayerNorm(width)
        self.pointwise1 = nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.batch_norm = BatchNorm(width)
        self.pointwise2 = nn.Conv1d(width, width, 1)
        self.norm, self.drop, self.fused = nn.LayerNorm(width), drop, None  # fused: what use_fused was given

    def fused_parts(self) -> dict:
        """What `use_fused` is given other forms of, by the names that their maker takes it under."""
        return {"heads": self.attention.heads, "depthwise": self.depthwise, "norm": self.batch_norm}

    def use_fused(self, attention: nn.Module | None, convolution: nn.Module | None) -> None:
        """Compute by these, made of fused_parts, but where in_one_pass says no; None: by its own layers.

        attention(qkv (B, T, 3 * width), valid (B, T), True before each end) -> (B, T, width), before the projection.
        convolution(x (B, 2 * width, T), valid) -> (B, width, T): all between the two pointwise convolutions.
        """
        self.attention.fused, self.fused = attention, convolution

    def convolution(self, x: Tensor, valid: Tensor, rows: Tensor) -> Tensor:
        x = self.pointwise1(self.conv_norm(x).transpose(1, 2))  # (B, 2 * width, T)
        if in_one_pass(self, x):
            return self.pointwise2(self.fused(x, valid)).transpose(1, 2)
        x = F.glu(x, 1)  # (B, width, T)
        x = self.depthwise(x * valid[:, None]).transpose(1, 2)  # masked: no padding leaks in
        x = F.silu(on_rows(self.batch_norm, x, rows))  # (B, T, width)
        return self.drop(self.pointwise2(x.transpose(1, 2)).transpose(1, 2))

    def forward(self, x: Tensor, valid: Tensor, rows: Tensor) -> Tensor:
        """x: (B, T, width), valid: (B, T) bool, rows: its indices -> (B, T, width)."""
        x = x.add(self.feed_forward1(x), alpha=0.5)
        x = x + self.drop(self.attention(self.attention_norm(x), valid))
        x = x + self.convolution(x, valid, rows)
        return self.norm(x.add(self.feed_forward2(x), alpha=0.5))


class ConformerCtc(nn.Module):
    """Conformer (Gulati et al. 2020) with CTC behind two strided convolutions (40 ms a frame).

    Positions are rotary rather than Transformer-XL's. The paper used the Efficient Conformer at 65.8 M; size "paper"
    is the plain Conformer at 66 M.
    """

    DEMO = dict(channels=16, width=128, heads=4, blocks=4, kernel=15, dropout=0.1)
    SIZES = {
        "demo": DEMO,
        "wide": widened(DEMO, 2),
        "wider": widened(DEMO, 3),
        "paper": dict(channels=256, width=416, heads=8, blocks=16, kernel=15, dropout=0.1),
    }
    features, stride = "log-mel", 4
    TOKEN_LAYERS = ("output",)

    def __init__(self, tokens: int, channels, width, heads, blocks, kernel, dropout, inner=None):
        """inner: width inside the feed-forward parts; 4 * width if it is not given."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 2, 1)  # (frequency, time)
        self.conv2 = nn.Conv2d(channels, channels, 3, 2, 1)
        self.input = nn.Linear(channels * 20, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            ConformerBlock(width, heads, kernel, dropout, inner or 4 * width) for _ in range(blocks)
        )
        self.output = nn.Linear(width, tokens)

    def output_lengths(self, input_lengths: Tensor) -> Tensor:
        return (input_lengths - 1) // 4 + 1

    def forward(self, features: Tensor, input_lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, 80), (B,) -> log_probs (B, T', V), lengths (B,), T' = ceil(T / 4)."""
        x = without_padding(features, input_lengths).transpose(1, 2)[:, None]
        x = self.conv1(images(x, self.training)).relu()  # (B, C, 40, ceil(T / 2))
        valid = valid_frames((input_lengths - 1) // 2 + 1, x.shape[3])
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing() or not valid.all():
            x = x * valid[:, None, None]
        x = self.conv2(x).relu()  # (B, C, 20, T')
        lengths = self.output_lengths(input_lengths)
        valid, rows = valid_frames(lengths, x.shape[3]), valid_rows(lengths, x.shape[3])
        x = self.dropout(self.input(x.permute(0, 3, 1, 2).flatten(2)))  # (B, T', width)
        for block in self.blocks:
            x = block(x, valid, rows)
        return self.output(x).log_softmax(-1), lengths

    def loss(self, features: Tensor, input_lengths: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
        return ctc_loss(*self(features, input_lengths), targets, target_lengths)

    def transcribe(self, features: Tensor, input_lengths: Tensor) -> list[list[int]]:
        return ctc_greedy(*self(features, input_lengths))

    def emissions(self, features: Tensor, input_lengths: Tensor) -> list[list[Emission]]:
        return ctc_emissions(*self(features, input_lengths))


BACKBONES = {"cnn-lstm": CnnLstm, "rnnt": Transducer, "conformer": ConformerCtc}


def build(backbone: str, size: str, tokens: int) -> nn.Module:
    """A freshly initialised network; draws from torch's global generator."""
    return BACKBONES[backbone](tokens, **BACKBONES[backbone].SIZES[size])
