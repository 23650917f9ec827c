"""How often weights multiply, by hand and beside torch's counter of FLOPs."""

import torch
from torch import nn

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
