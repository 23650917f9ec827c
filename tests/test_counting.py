"""How often weights multiply, by hand and beside torch's counter of FLOPs."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lottery
from audio_lottery import counting


def test_weight_uses_in_attention_and_packed_sequences():
    """Attention calls its output layer without a forward of it; a packed batch of 3 and 2 steps has 5, not 6."""
    model = nn.Sequential()
    model.attention, model.lstm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LSTM(4, 3, batch_first=True)
    x = torch.zeros(2, 3, 4)

    def call():
        model.attention(x, x, x)
        model.lstm(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2]), batch_first=True))

    uses = counting.weight_uses(model, call)
    assert uses["attention.in_proj_weight"] == uses["attention.out_proj.weight"] == 6
    assert uses["lstm.weight_ih_l0"] == uses["lstm.weight_hh_l0"] == 5


def test_weight_uses_by_hand():
    model = nn.Sequential()
    model.conv, model.linear = nn.Conv1d(2, 3, 4, stride=2), nn.Linear(3, 5)
    model.lstm, model.both = nn.LSTM(3, 6, batch_first=True), nn.LSTM(6, 2, bidirectional=True, batch_first=True)

    def call():
        x = model.conv(torch.zeros(2, 2, 12)).transpose(1, 2)  # (2, 5, 3): (12 - 4) // 2 + 1 = 5 frames
        model.linear(x[:, :4])
        model.both(model.lstm(x)[0])

    uses = counting.weight_uses(model, call)
    assert uses.pop("conv.weight") == 10 and uses.pop("linear.weight") == 8
    assert set(uses.values()) == {10} and len(uses) == 2 + 4  # recurrent weights: each of 5 steps of 2 utterances


def attention(**sizes):
    return nn.MultiheadAttention(8, 2, **sizes)


zeros = torch.zeros
TABLE = {  # layer, inputs, and its multiply-adds by hand where torch counts none
    "Conv1d, stride, groups": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), [zeros(2, 4, 11)], None),
    "Conv1d of one": (nn.Conv1d(4, 6, 3), [zeros(4, 11)], 9 * 6 * 4 * 3),
    "Conv2d, dilation": (nn.Conv2d(4, 6, (3, 2), dilation=2), [zeros(2, 4, 11, 9)], None),
    "Conv3d, stride": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), [zeros(2, 2, 5, 6, 4)], None),
    "ConvTranspose1d, stride 4": (nn.ConvTranspose1d(4, 6, 4, stride=4), [zeros(2, 4, 10)], None),
    "ConvTranspose2d, groups": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), [zeros(2, 4, 5, 6)], None
    ),
    "ConvTranspose3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), [zeros(2, 2, 3, 4, 3)], None),
    "Linear": (nn.Linear(5, 7), [zeros(2, 3, 5)], None),
    "Linear of one": (nn.Linear(5, 7, bias=False), [zeros(5)], None),
    "Bilinear": (nn.Bilinear(3, 4, 5), [zeros(2, 6, 3), zeros(2, 6, 4)], 12 * 5 * 3 * 4),
    "RNN": (nn.RNN(3, 4, 2), [zeros(5, 2, 3)], 10 * (4 * 3 + 4 * 4 + 4 * 4 + 4 * 4)),
    "GRU, both ways": (nn.GRU(3, 4, bidirectional=True), [zeros(5, 2, 3)], 2 * 10 * 3 * (4 * 3 + 4 * 4)),
    "LSTM": (nn.LSTM(3, 4), [zeros(5, 2, 3)], 10 * 4 * (4 * 3 + 4 * 4)),
    "LSTM of one": (nn.LSTM(3, 4), [zeros(5, 3)], 5 * 4 * (4 * 3 + 4 * 4)),
    "LSTM, proj_size": (nn.LSTM(3, 4, proj_size=2), [zeros(5, 2, 3)], 10 * (4 * 4 * (3 + 2) + 2 * 4)),
    "RNNCell": (nn.RNNCell(3, 4), [zeros(3)], None),
    "GRUCell": (nn.GRUCell(3, 4), [zeros(6, 3)], None),
    "LSTMCell": (nn.LSTMCell(3, 4), [zeros(6, 3)], None),
    "attention to itself": (attention(), [zeros(5, 2, 8)] * 3, None),
    "attention, batch_first": (attention(batch_first=True), [zeros(2, 5, 8)] * 3, None),
    "attention of one": (attention(), [zeros(5, 8)] * 3, None),
    "attention to another": (attention(), [zeros(5, 2, 8), zeros(7, 2, 8), zeros(7, 2, 8)], None),
    "attention, kdim, vdim": (attention(kdim=6, vdim=10), [zeros(5, 2, 8), zeros(7, 2, 6), zeros(7, 2, 10)], None),
    "attention, bias_k": (attention(add_bias_kv=True), [zeros(5, 2, 8), zeros(7, 2, 8), zeros(7, 2, 8)], None),
    "Transformer": (nn.Transformer(8, 2, 1, 1, 16), [zeros(7, 2, 8), zeros(5, 2, 8)], None),
    "TransformerEncoder in eval": (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval(), [zeros(2, 5, 8)],
        2 * 10 * (4 * 8 * 8 + 2 * 8 * 16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_multiply_adds_beside_torch_s_counter(name):
    module, inputs, by_hand = TABLE[name]
    with torch.no_grad():
        uses = counting.weight_uses(module, lambda: module(*inputs))
        with FlopCounterMode(display=False) as counter:
            module(*inputs)
    counted = {str(op): flops // 2 for op, flops in counter.get_flop_counts().get("Global", {}).items()}
    for activations in ("aten.bmm", "aten.baddbmm"):  # products of two activations in attention
        counted.pop(activations, None)
    expected = sum(counted.values()) if by_hand is None else by_hand
    assert expected > 0 and counting.multiply_adds(uses, lottery.prunable(module)) == expected
    empty = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in lottery.prunable(module).items()}
    assert counting.multiply_adds(uses, empty) == 0


def test_uses_of_layers_that_are_called_oddly():
    upsampling = nn.ConvTranspose1d(2, 3, 4, stride=4)
    assert counting.weight_uses(upsampling, lambda: upsampling(zeros(1, 2, 10))) == {"weight": 10}  # not the 40 places
    assert counting.weight_uses(upsampling, lambda: upsampling(input=zeros(1, 2, 10))) == {"weight": 10}
    cross = attention()  # queries 3 x 2, keys and values 5 x 2
    uses = counting.weight_uses(cross, lambda: cross(value=zeros(5, 2, 8), key=zeros(5, 2, 8), query=zeros(3, 2, 8)))
    assert uses["in_proj_weight"].tolist() == [[6]] * 8 + [[10]] * 16 and uses["out_proj.weight"] == 6
    kept = {"in_proj_weight": torch.zeros(24, 8, dtype=torch.bool)}
    kept["in_proj_weight"][0, :3] = kept["in_proj_weight"][8, :2] = True
    assert counting.multiply_adds(uses, kept) == 3 * 6 + 2 * 10


@pytest.mark.parametrize("product", ["linear", "matmul"])
def test_a_weight_that_multiplies_outside_of_its_layer_is_refused(product):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.attention = nn.Linear(4, 4), attention()

        def forward(self, x):
            self.inner.weight.norm()  # no product with an input
            self.inner(x)
            return nn.functional.linear(x, self.inner.weight) if product == "linear" else x @ self.inner.weight.T

    model = Functional()
    rule = rf"inner.weight multiplies in {product} outside of its layer's forward: its uses cannot be counted"
    with pytest.raises(lottery.LotteryError, match=rule):
        counting.weight_uses(model, lambda: model(zeros(2, 4)))
    assert not model.inner._forward_hooks and not model.inner._forward_pre_hooks
    model.forward = lambda x: model.attention(x, x, x)  # which multiplies by the weight of its out_proj itself
    assert counting.weight_uses(model, lambda: model(zeros(2, 8)))["attention.out_proj.weight"] == 2
    with pytest.raises(
        lottery.LotteryError, match=r"attention.in_proj_weight multiplies in multi_head_attention_forward"
    ):
        counting.weight_uses(model, lambda: functional_attention(model.attention, zeros(2, 1, 8)))


@pytest.mark.parametrize("how", ["scaled", "cast", "twice", "joined", "a part"])
def test_what_is_made_of_a_weight_multiplies_outside_of_its_layer_too(how):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.gate = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 1))

        def forward(self, x):
            made = {"scaled": lambda w: w * self.gate, "cast": lambda w: w.to(torch.float64),
                    "twice": lambda w: (w * self.gate).tanh(), "joined": lambda w: torch.cat([w, w[:2] + 1]),
                    "a part": lambda w: w[:2].contiguous()}[how](self.inner.weight)  # fmt: skip
            return x.to(made.dtype) @ made.T

    model = Gated()
    with pytest.raises(lottery.LotteryError, match=r"inner.weight multiplies in matmul outside of its layer's forward"):
        counting.weight_uses(model, lambda: model(zeros(2, 4)))


def test_rows_of_a_tied_weight_are_an_input():
    model = nn.ModuleDict({"symbols": nn.Embedding(4, 4), "first": nn.Linear(4, 4), "out": nn.Linear(4, 4)})
    model["first"].weight = model["symbols"].weight  # pruned where every layer of it is: so here it is none
    model["out"].weight = nn.Parameter(torch.ones(4, 4))
    ids = torch.arange(4)
    looked_up = lambda: model["out"](nn.functional.embedding(ids, model["out"].weight))  # noqa: E731
    assert counting.weight_uses(model, looked_up) == {"out.weight": 4}


def test_a_linear_that_shapes_its_output():
    class Heads(nn.Linear):
        def forward(self, x):
            return super().forward(x).unflatten(-1, (2, 3))

    model = nn.Sequential(Heads(4, 6))
    assert counting.weight_uses(model, lambda: model(zeros(5, 4))) == {"0.weight": 5}


def functional_attention(module, x):
    return nn.functional.multi_head_attention_forward(
        x, x, x, 8, 2, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0, module.out_proj.weight,
        module.out_proj.bias,
    )  # fmt: skip
