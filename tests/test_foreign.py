"""Models that nobody here wrote: three rounds each, a ticket saved and loaded, a compressed copy, multiply-adds.

docs/models.md has a row of each; the tests hold the page to what they see.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchaudio import models as audio

import lottery
from audio_lottery import compress, compression, load_ticket, save_ticket, sparse, weight_uses

PAGE = (Path(__file__).parents[1] / "docs" / "models.md").read_text()


class Foreign(NamedTuple):
    make: Callable[[], nn.Module]
    use: Callable[[nn.Module], object]  # with inputs of its own, the same every time
    by_hand: int | None = None  # multiply-adds of prunable weights in `use`, where torch's counter takes them for 0
    unpruned: int = 0  # multiply-adds that the counter counts, of weights that are not prunable


def randn(*size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0))


def tokens(*size: int) -> Tensor:
    return torch.randint(0, 11, size, generator=torch.Generator().manual_seed(0))


PADDING = torch.arange(6) >= torch.tensor([6, 4])[:, None]  # (2, 6)


class LanguageModel(nn.Module):
    """The output layer's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embedding, self.lstm, self.output = nn.Embedding(11, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 11)
        self.output.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.lstm(self.embedding(x))[0])


class Recurrent(nn.Module):
    def __init__(self, recurrent: nn.RNNBase, outputs: int):
        super().__init__()
        self.recurrent, self.output = recurrent, nn.Linear(outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.recurrent(x)[0])


def convolutional(weight_norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), weight_norm(nn.Conv2d(6, 8, 3, 2)), nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8), nn.ConvTranspose2d(8, 4, 2, 2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


def encoder(**options) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **options), 2)


def wav2vec2() -> nn.Module:
    return audio.wav2vec2_model(
        "group_norm", [(8, 10, 5), (8, 3, 2)], False, 16, 0.0, 8, 4, 2, 2, 0.0, 32, 0.0, 0.0, False, 0.0, 7
    )


def transducer() -> nn.Module:
    return audio.emformer_rnnt_model(
        input_dim=8, encoding_dim=12, num_symbols=11, segment_length=4, right_context_length=0,
        time_reduction_input_dim=6, time_reduction_stride=2, transformer_num_heads=2, transformer_ffn_dim=16,
        transformer_num_layers=2, transformer_dropout=0.0, transformer_activation="gelu",
        transformer_left_context_length=4, transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise", transformer_tanh_on_mem=True, symbol_embedding_dim=6,
        num_lstm_layers=2, lstm_layer_norm=True, lstm_layer_norm_epsilon=1e-3, lstm_dropout=0.0,
    )  # fmt: skip


TEN, FIVE, THREE = torch.tensor([10, 7]), torch.tensor([5, 3]), torch.tensor([3, 2])
FRAMES, SYMBOLS = 2 * 10, 2 * 6  # what the recurrent layers and the language model are given, both utterances together

MODELS = {
    "nn.TransformerEncoder": Foreign(encoder, lambda m: m(randn(2, 6, 8), src_key_padding_mask=PADDING)),
    "nn.TransformerEncoder, norm first": Foreign(
        lambda: encoder(norm_first=True, activation="gelu"), lambda m: m(randn(2, 6, 8))
    ),
    "nn.Transformer": Foreign(
        lambda: nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True), lambda m: m(randn(2, 7, 8), randn(2, 4, 8))
    ),
    "torchaudio Conformer": Foreign(lambda: audio.Conformer(8, 2, 16, 2, 5), lambda m: m(randn(2, 10, 8), TEN)),
    "torchaudio Emformer": Foreign(
        lambda: audio.Emformer(8, 2, 16, 2, 4, right_context_length=1, max_memory_size=2),
        lambda m: m(randn(2, 9, 8), torch.tensor([9, 7])),
    ),
    "torchaudio wav2vec2_model": Foreign(wav2vec2, lambda m: m(randn(2, 300)), unpruned=2 * 30 * 16 * 8 * 4),
    "torchaudio DeepSpeech": Foreign(  # three layers, W_ih and W_hh both ways, the layer on both, and the output
        lambda: audio.DeepSpeech(5, 6, 4), lambda m: m(randn(2, 1, 10, 5)),
        by_hand=FRAMES * (5 * 6 + 6 * 6 + 6 * 6 + 2 * (6 * 6 + 6 * 6) + 6 * 6 + 6 * 4),
    ),
    "torchaudio RNNT": Foreign(transducer, lambda m: m(randn(2, 10, 8), FIVE * 2, tokens(2, 3), THREE)),
    "language model, tied": Foreign(  # the tied output is not prunable
        LanguageModel, lambda m: m(tokens(2, 6)), by_hand=SYMBOLS * (4 * 8 * 8 + 4 * 8 * 8)
    ),
    "nn.LSTM with proj_size": Foreign(
        lambda: Recurrent(nn.LSTM(5, 6, batch_first=True, proj_size=4), 4), lambda m: m(randn(2, 10, 5)),
        by_hand=FRAMES * (4 * 6 * 5 + 4 * 6 * 4 + 4 * 6 + 4 * 3),
    ),
    "nn.LSTM": Foreign(
        lambda: Recurrent(nn.LSTM(5, 6, 2, batch_first=True, bidirectional=True), 12), lambda m: m(randn(2, 10, 5)),
        by_hand=FRAMES * (2 * (4 * 6 * 5 + 4 * 6 * 6) + 2 * (4 * 6 * 12 + 4 * 6 * 6) + 12 * 3),
    ),
    "nn.GRU": Foreign(
        lambda: Recurrent(nn.GRU(5, 6, batch_first=True), 6), lambda m: m(randn(2, 10, 5)),
        by_hand=FRAMES * (3 * 6 * 5 + 3 * 6 * 6 + 6 * 3),
    ),
    "convolutions, batch norm, weight norm": Foreign(
        lambda: convolutional(nn.utils.parametrizations.weight_norm), lambda m: m(randn(2, 1, 14, 14)),
        unpruned=2 * 36 * 8 * 6 * 9,
    ),
    "convolutions, batch norm, old weight norm": Foreign(
        lambda: convolutional(nn.utils.weight_norm), lambda m: m(randn(2, 1, 14, 14)), unpruned=2 * 36 * 8 * 6 * 9
    ),
}  # fmt: skip

LONG = ("torchaudio Conformer", "torchaudio Emformer", "torchaudio wav2vec2_model", "torchaudio RNNT")


def floats(value: object) -> list[Tensor]:
    """The tensors of an output that have a gradient to give."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [tensor for part in value for tensor in floats(part)] if isinstance(value, (tuple, list)) else []


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name].make()


@pytest.fixture
def sparsest(monkeypatch):
    """Has compress replace all that it can, however long it takes."""
    order = {
        form: -i for i, form in enumerate(["nn.LSTM", "dense", "dense prepacked", "windows", *sparse.LAYOUTS, "ours"])
    }
    monkeypatch.setattr(compression, "time_calls", lambda candidates, *_: {form: order[form] for form in candidates})


def find(name: str, model: nn.Module) -> lottery.Found:
    """Three rounds of two steps, at 100, 50 and 25 %; everything that a round promises is checked."""
    use, theta_0, before, rounds = MODELS[name].use, copy.deepcopy(model.state_dict()), None, 0

    def train(ticket: lottery.Ticket) -> None:
        for key, tensor in ticket.model.state_dict().items():  # rewound: parameters and buffers
            mask = ticket.masks.get(key)
            assert torch.equal(tensor, theta_0[key] if mask is None else theta_0[key] * mask), key
        optimizer = torch.optim.AdamW(ticket.model.parameters(), 0.01)
        ticket.model.train()
        for _ in range(2):
            optimizer.zero_grad()
            sum(out.square().mean() for out in floats(use(ticket.model))).backward()
            ticket.hold()
            optimizer.step()
            ticket.stepped()

    def evaluate(model: nn.Module) -> dict:
        return {"loss": float(sum(out.square().mean() for out in floats(use(model.eval()))))}

    total = sum(weight.numel() for weight in lottery.prunable(model).values())
    for found in lottery.find_ticket(model, train, evaluate, sparsity=0.75, prune_rate=0.5):
        masks, rounds = {n: mask.clone() for n, mask in found.ticket.masks.items()}, rounds + 1
        assert (
            found.row["kept"] == round(total * 0.5 ** found.row["round"]) == sum(int(m.sum()) for m in masks.values())
        )
        assert before is None or not any((mask & ~before[n]).any() for n, mask in masks.items())
        for n, weight in lottery.prunable(model).items():
            assert (weight[~masks[n]] == 0).all() and weight.isfinite().all()
        before = masks
    assert rounds == 3
    return found


def layers_of(model: nn.Module, rows: list[compression.Taken]) -> tuple[str, str]:
    """What was replaced, and what was not and why, as docs/models.md says it: numbers of layers."""
    kinds: dict[str, tuple[bool, str, str]] = {}
    for row in rows:
        layer = row.name.rpartition(".")[0]
        kinds[layer] = row.layout != "dense", type(model.get_submodule(layer)).__name__, row.why
    replaced = Counter(kind for taken, kind, _ in kinds.values() if taken)
    dense = Counter(f"{kind} ({why})" for taken, kind, why in kinds.values() if not taken)
    said = [", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "-" for counts in (replaced, dense)]
    return said[0], re.sub(r"(\w+) \(no sparse form of \1( with \w+)?\)", r"\1\2", said[1])


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in MODELS])
def test_three_rounds_a_file_and_a_fast_copy(name, tmp_path, sparsest):
    model, use = made(name), MODELS[name].use
    found = find(name, model)
    with torch.no_grad():
        want = floats(use(model.eval()))

    save_ticket(tmp_path / "ticket.safetensors", found.ticket.masks, found.ticket.rewind_state, model.state_dict(), {})
    other = made(name)
    file = load_ticket(tmp_path / "ticket.safetensors", other)
    other.load_state_dict(file.trained)
    with torch.no_grad():
        assert all(map(torch.equal, floats(use(other.eval())), want)) and file.masks.keys() == found.ticket.masks.keys()

        compressed, rows = compress(other, file.masks, use)
        for copied in (compressed, copy.deepcopy(compressed)):
            got = floats(use(copied))
            assert len(got) == len(want) > 0
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    weights, everything = list(lottery.prunable(model).values()), sum(p.numel() for p in model.parameters())
    replaced, dense = layers_of(model, rows)
    prunable = f"{sum(w.numel() for w in weights):,} of {everything:,}"
    assert f"| {name} | {prunable} | {replaced} | {dense} |" in PAGE.splitlines()


@pytest.mark.parametrize("name", MODELS)
def test_multiply_adds(name):
    """By torch's counter, without products of two activations; where it takes recurrent layers for 0, by hand."""
    model, (_, use, by_hand, unpruned) = made(name).train(), MODELS[name]
    uses = weight_uses(model, lambda: use(model))
    ours = sum(int((uses[n] * torch.ones(w.shape).flatten(1)).sum()) for n, w in lottery.prunable(model).items())
    if by_hand is not None:
        assert ours == by_hand
        return
    with FlopCounterMode(display=False) as counter:
        use(model)
    products = {"aten.mm", "aten.addmm", "aten.convolution", "aten._convolution"}  # bmm is of two activations
    flops = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    assert ours == sum(n for op, n in flops.items() if op in products) // 2 - unpruned, flops
