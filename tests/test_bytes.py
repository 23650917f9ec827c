"""Products in bytes: the form, the operators beside their references, and what compress makes of w8a8."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_sparse import LSTMS, built, instructions, random_matrix, transducer_arguments, two_threads  # noqa: F401
from torch import nn

import lottery
import models
from audio_lottery import compress, compression, layers, sparse

SIZES = ((1, 1), (3, 5), (16, 64), (17, 65), (100, 67), (48, 300))


@pytest.fixture(params=[8, 16])
def lanes(request):
    return request.param


def in_bytes(outputs, inputs, remaining=0.1, lanes=None):
    matrix, dense = random_matrix(outputs, inputs, "unstructured", "int8", remaining)
    return list(sparse.to_bytes(matrix, lanes)), dense


def test_to_bytes_by_hand():
    """Two rows of a group, the second first: four weights a step at most, of a window of 64 inputs, or of 32."""
    mask = torch.zeros(2, 200, dtype=torch.bool)
    mask[0, 70] = mask[1, [3, 5, 7, 66, 67, 199]] = True
    weight = torch.arange(1.0, 401).view(2, 200)
    matrix = sparse.to_matrix(weight, mask, "unstructured", "int8")
    found = sparse.in_steps(matrix, torch.tensor([1, 0]), 16, 1)
    assert found.rows.tolist() == [[1, 0, *[2] * 14]] and found.offsets.tolist() == [0, 3]
    assert found.starts.tolist() == [3, 67, 199]
    assert found.places[:, :2].tolist() == [[[0, 2, 4, 63], [0] * 4], [[0] * 4, [3, 0, 0, 0]], [[0] * 4, [0] * 4]]
    fuller = [round(w * 127 / 400) for w in (204, 206, 208, 267)]
    assert found.values[0, :2].tolist() == [fuller, [0] * 4] and found.values[1, 1].tolist() == [127, 0, 0, 0]
    assert not found.values[:, 2:].any() and found.values.dtype == torch.int8
    assert found.sums.tolist()[0][1:] == [127, *[0] * 14]
    torch.testing.assert_close(found.scales, torch.tensor([[400 / 127, 71 / 127, *[0.0] * 14]]))
    aligned = sparse.in_steps(matrix, torch.tensor([1, 0]), 16, 32)
    assert aligned.starts.tolist() == [0, 64, 192] and aligned.offsets.tolist() == [0, 3]
    assert aligned.places[:, :2].tolist() == [
        [[3, 5, 7, 0], [0] * 4],
        [[2, 3, 0, 0], [6, 0, 0, 0]],
        [[7, 0, 0, 0], [0] * 4],
    ]
    of_eight = sparse.in_steps(matrix, torch.tensor([1, 0]), 8, 1)
    assert of_eight.rows.tolist() == [[1, 0, *[2] * 6]] and of_eight.starts.tolist() == [3, 66, 199]
    assert of_eight.places[:, :2].tolist() == [
        [[0, 2, 4, 0], [0] * 4],
        [[0, 1, 0, 0], [4, 0, 0, 0]],
        [[0] * 4, [0] * 4],
    ]


def test_rows_are_sorted_where_that_saves_steps(lanes):
    """Every second row of two groups has many weights; or all have as many."""
    even, mixed = torch.ones(32, 640, dtype=torch.bool), torch.zeros(32, 640, dtype=torch.bool)
    mixed[::2] = True
    for mask, rows in ((even, list(range(32))), (mixed, [*range(0, 32, 2), *range(1, 32, 2)])):
        found = sparse.to_bytes(sparse.to_matrix(torch.ones(32, 640), mask, "unstructured", "int8"), lanes)
        assert found.rows.flatten().tolist() == rows


@pytest.mark.parametrize("remaining", [0.0, 0.1, 0.5, 1.0])
def test_bytes_hold_the_matrix(remaining, lanes):
    for outputs, inputs in SIZES:
        tensors, dense = in_bytes(outputs, inputs, remaining, lanes)
        integers, scales = sparse.from_bytes(tensors, outputs, inputs)
        assert torch.equal(integers.float() * scales[:, None], dense)
        assert torch.equal(sparse.Bytes(*tensors).sums.sum(), integers.sum().int())


def test_rows_of_eight_bits():
    x = torch.tensor([[1.0, -0.5, 0.25], [0.0, 0.0, 0.0], [1e-42, 0.0, 0.0], [math.inf, 1, 0], [1, math.nan, 0]])
    rounded, scale = sparse.in_eight_bits(x)
    assert rounded.tolist() == [[127, -64, 32], [0] * 3, [0] * 3, [0] * 3, [0] * 3]
    assert torch.equal(scale[:3, 0], torch.tensor([1 / 127, 0, 0])) and scale[3:].isnan().all()


@built
def test_linear_equals_reference(instructions, lanes):  # noqa: F811
    """Sums of integers are the same on every processor: only the last products may round."""
    for outputs, inputs in SIZES:
        for remaining in (0.0, 0.1, 1.0):
            tensors, dense = in_bytes(outputs, inputs, remaining, lanes)
            for n in (1, 2, 3, 7, 16, 37, 300):  # 256 of them at a time
                x, bias = torch.randn(n, inputs) * torch.logspace(-20, 20, n)[:, None], torch.randn(outputs)
                for b in (None, bias):
                    got = sparse.sparse_linear_in_bytes(x, tensors, b, outputs)
                    wanted = sparse.reference_sparse_linear_in_bytes(x, tensors, b, outputs)
                    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
                exact = x @ dense.T
                most = x.abs().amax(1, keepdim=True) * dense.abs().sum(1) / 254
                assert ((wanted - bias - exact).abs() <= 1.01 * most + 1e-5 * exact.abs() + 1e-5).all()


@built
def test_the_largest_products(instructions, lanes):  # noqa: F811
    """Pairs of products at their largest, of either sign, in sums of 16 bits on the way: none is cut."""
    mask = torch.ones(24, 96, dtype=torch.bool)
    weight = torch.where(torch.arange(24)[:, None] % 3 == 0, -1.0, 1.0).expand(24, 96) * 2.0
    tensors = list(sparse.to_bytes(sparse.to_matrix(weight, mask, "unstructured", "int8"), lanes))
    x = torch.tensor([[3.0], [-3.0]]).expand(2, 96)
    torch.testing.assert_close(sparse.sparse_linear_in_bytes(x, tensors, None, 24), x @ weight.T)
    groups = torch.arange(len(tensors[4])).repeat_interleave(tensors[3].diff())
    for crafted in (torch.randint(-128, 128, tensors[0].shape), torch.full(tensors[0].shape, -128)):  # in none of ours
        tensors[0] = crafted.to(torch.int8)
        tensors[5] = torch.zeros_like(tensors[5]).index_add_(0, groups, crafted.sum(2).int())
        wanted = sparse.reference_sparse_linear_in_bytes(x, tensors, None, 24)
        torch.testing.assert_close(sparse.sparse_linear_in_bytes(x, tensors, None, 24), wanted)


@built
def test_special_columns(instructions, lanes):  # noqa: F811
    """NaN and infinity anywhere, zeros and what is too small to divide by: as the reference has them."""
    tensors, _ = in_bytes(37, 22, 0.3, lanes)
    x = torch.randn(7, 22)
    x[0, 21], x[1, 3], x[2, 20], x[3] = math.nan, math.nan, -math.inf, 0.0
    x[4] = torch.finfo(torch.float32).tiny / 4
    wanted = sparse.reference_sparse_linear_in_bytes(x, tensors, None, 37)
    assert wanted[:3].isnan().all() and not wanted[3:5].any()
    for n in (7, 1):  # several at a time, or one
        found = torch.cat([sparse.sparse_linear_in_bytes(part, tensors, None, 37) for part in x.split(n)])
        torch.testing.assert_close(found, wanted, equal_nan=True)


@built
def test_more_groups_than_stay_near(instructions, lanes):  # noqa: F811
    """Columns pass by some groups at a time: many small ones, and two that are larger than that each."""
    for outputs, inputs, remaining in ((2100, 130, 0.4), (20, 9000, 1.0)):
        tensors, _ = in_bytes(outputs, inputs, remaining, lanes)
        x, bias = torch.randn(5, inputs), torch.randn(outputs)
        wanted = sparse.reference_sparse_linear_in_bytes(x, tensors, bias, outputs)
        torch.testing.assert_close(sparse.sparse_linear_in_bytes(x, tensors, bias, outputs), wanted)


@built
def test_linear_takes_what_sparse_linear_takes(instructions, lanes):  # noqa: F811
    tensors, dense = in_bytes(37, 22, 0.1, lanes)
    op = sparse.sparse_linear_in_bytes
    assert (
        op(torch.randn(0, 22), tensors, None, 37).shape == (0, 37) and op(torch.randn(22), tensors, None, 37).dim() == 1
    )
    columns = torch.randn(22, 9).t()  # of other strides
    assert torch.equal(op(columns, tensors, None, 37), op(columns.contiguous(), tensors, None, 37))
    bad = torch.randn(3, 22)
    bad[1, 4] = math.nan
    found = op(bad, tensors, None, 37)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    empty, _ = in_bytes(8, 1, 0.0, lanes)
    assert torch.equal(op(torch.ones(5, 1), empty, torch.ones(8), 8), torch.ones(5, 8))


CONVOLUTIONS = (  # channels, outputs, image, kernel, stride, padding, dilation
    (1, 3, (5, 6), (1, 1), (1, 1), (0, 0), (1, 1)), (3, 17, (9, 8), (3, 5), (2, 1), (1, 2), (1, 1)),
    (5, 16, (11, 13), (3, 2), (1, 3), (4, 0), (2, 3)), (32, 8, (7, 1), (2, 1), (1, 2), (0, 0), (1, 1)),
    (2, 33, (1, 40), (1, 11), (1, 2), (0, 5), (1, 1)),
)  # fmt: skip


@pytest.mark.parametrize("of", CONVOLUTIONS)
def test_kernel_rows(of):
    channels, outputs, _, kernel, _, _, dilation = of
    weight = torch.randn(outputs, channels, *kernel)
    rows = sparse.kernel_rows(weight, dilation)
    assert rows.shape[1] == sparse.kernel_inputs(channels, kernel, dilation)
    assert torch.equal(sparse.of_kernel_rows(rows, channels, kernel, dilation), weight)
    by_hand = sparse.kernel_rows(torch.arange(8.0).view(1, 2, 1, 4), (1, 2))
    assert by_hand[0, :14].tolist() == [0, 4, 0, 0, 1, 5, 0, 0, 2, 6, 0, 0, 3, 7] and not by_hand[0, 14:].any()


def a_convolution(of, remaining=0.3, lanes=None):
    channels, outputs, _, kernel, *_, dilation = of
    matrix, dense = random_matrix(outputs, channels * math.prod(kernel), "unstructured", "int8", remaining)
    shape = (outputs, channels, *kernel)
    return list(sparse.conv_bytes(matrix, shape, dilation, lanes)), dense.view(shape)


@built
@pytest.mark.parametrize("of", CONVOLUTIONS)
def test_convolution_equals_reference(of, instructions, lanes):  # noqa: F811
    channels, outputs, size, *window = of
    for remaining in (0.0, 0.3, 1.0):
        tensors, dense = a_convolution(of, remaining, lanes)
        for batch in (0, 1, 3):
            x = torch.randn(batch, channels, *size) * torch.tensor([1.0, 1e-20, 1e10])[:batch, None, None, None]
            for bias in (None, torch.randn(outputs)):
                given = x, tensors, bias, outputs, *window
                wanted = sparse.reference_sparse_conv2d_in_bytes(*given)
                torch.testing.assert_close(sparse.sparse_conv2d_in_bytes(*given), wanted, rtol=1e-6, atol=1e-6)
            exact = F.conv2d(x, dense, bias, *window[1:])
            most = x.flatten(1).abs().amax(1)[:, None, None, None] * dense.flatten(1).abs().sum(1)[:, None, None] / 254
            assert ((wanted - exact).abs() <= 1.01 * most + 1e-5 * exact.abs() + 1e-5).all()
    x[1, 0, 0, 0] = math.nan
    found = sparse.sparse_conv2d_in_bytes(*given)
    assert found[1].isnan().all() and torch.equal(found[[0, 2]], wanted[[0, 2]])


@built
def test_convolution_refuses(lanes):
    of = CONVOLUTIONS[1]
    tensors, _ = a_convolution(of, 0.3, lanes)
    x, window = torch.zeros(1, 3, 9, 8), [*of[3:]]
    for message, changes in (
        ("padding must be two numbers of at least 0", {"padding": (-1, 0)}),
        ("x must be at least as large as the kernel", {"x": torch.zeros(1, 3, 0, 8)}),
        ("bytes: offsets must be", {"outputs": 40}),
        (r"a kernel in bytes must have at most 65536 inputs, .* got \[3, 10000\] of 7 channels",
         {"kernel": (3, 10**4), "padding": (1, 10**4), "x": torch.zeros(1, 7, 9, 8)}),
        ("a kernel in bytes must", {"x": torch.zeros(1, 1 << 17, 1, 1), "kernel": (1, 1)}),
        ("a kernel in bytes must", {"x": torch.zeros(1, 1, 9, 8), "kernel": (2**31 - 1, 1), "padding": (2**31 - 1, 1)}),
    ):  # fmt: skip
        given = {"x": x, "bytes": tensors, "bias": None, "outputs": 17}
        given |= dict(zip(("kernel", "stride", "padding", "dilation"), window)) | changes
        with pytest.raises(ValueError, match=message):
            sparse.sparse_conv2d_in_bytes(*given.values())


@built
def test_any_starts_stay_inside_an_image(instructions, lanes):  # noqa: F811
    of = CONVOLUTIONS[2]
    tensors, _ = a_convolution(of, 0.5, lanes)
    tensors[1].random_(0, 256)
    inputs = sparse.kernel_inputs(of[0], of[3], of[6])
    tensors[2] = torch.full_like(tensors[2].int(), inputs - 1).to(torch.uint16)
    assert (
        sparse.sparse_conv2d_in_bytes(torch.randn(2, of[0], *of[2]), tensors, None, *of[1:2], *of[3:]).isfinite().all()
    )


@built
def test_on_two_threads_an_image(two_threads, lanes):  # noqa: F811
    of = (8, 40, (30, 60), (5, 5), (1, 1), (2, 2), (1, 1))
    tensors, _ = a_convolution(of, 0.5, lanes)
    given = torch.randn(3, 8, 30, 60), tensors, None, 40, *of[3:]
    torch.set_num_threads(1)
    wanted = sparse.sparse_conv2d_in_bytes(*given)
    torch.set_num_threads(2)
    assert torch.equal(sparse.sparse_conv2d_in_bytes(*given), wanted)


@built
def test_lstm_equals_reference(instructions, lanes):  # noqa: F811
    for hidden, batch, frames in LSTMS:
        tensors, _ = in_bytes(4 * hidden, hidden, 0.3, lanes)
        projections, (h0, c0) = torch.randn(batch, frames, 4 * hidden), torch.randn(2, batch, hidden)
        for ends in (None, torch.arange(batch).clamp(max=frames)):
            for reverse in (False, True):
                arguments = projections, tensors, h0, c0, ends, reverse
                got = sparse.sparse_lstm_in_bytes(*arguments)
                for ours, wanted in zip(got, sparse.reference_sparse_lstm_in_bytes(*arguments)):
                    # a state that lies between two bytes may fall to either, for the last bit of a sigmoid
                    torch.testing.assert_close(ours, wanted, rtol=1e-2, atol=2e-2)
                    close = (ours - wanted).abs() < 1e-5
                    assert not close.numel() or close.float().mean() > 0.5


@built
def test_lstm_layer_equals_its_parts(instructions, lanes, two_threads):  # noqa: F811
    """To the bit: projections that are made some frames at a time, for two threads too, and when utterances end."""
    sizes = [(9, 21, 3, 70), (40, 300, 1, 70), (40, 7, 300, 4), (301, 64, 2, 5), (301, 400, 17, 9)]
    sizes += [(5, 8, 0, 3), (5, 8, 2, 0)]  # no utterance, no frame
    for hidden, inputs, batch, frames in sizes:
        recurrent, of_inputs = in_bytes(4 * hidden, hidden, 0.3, lanes)[0], in_bytes(4 * hidden, inputs, 0.3, 8)[0]
        x, bias, state = torch.randn(batch, frames, inputs), torch.randn(4 * hidden), torch.randn(2, batch, hidden)
        for b, ends, reverse in ((None, None, False), (bias, torch.randint(0, frames + 1, (batch,)), True)):
            torch.set_num_threads(1)
            projections = sparse.sparse_linear_in_bytes(x, of_inputs, b, 4 * hidden)
            wanted = sparse.sparse_lstm_in_bytes(projections, recurrent, *state, ends, reverse)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                got = sparse.sparse_lstm_layer_in_bytes(x, of_inputs, b, recurrent, *state, ends, reverse)
                assert all(map(torch.equal, got, wanted)) and len(got) == 3


def test_lstm_layer_reference_is_its_parts(lanes):
    recurrent, of_inputs = in_bytes(36, 9, 0.3, lanes)[0], in_bytes(36, 21, 0.3, lanes)[0]
    x, bias, state = torch.randn(2, 3, 21), torch.randn(36), torch.randn(2, 2, 9)
    projections = sparse.reference_sparse_linear_in_bytes(x, of_inputs, bias, 36)
    wanted = sparse.reference_sparse_lstm_in_bytes(projections, recurrent, *state, None, True)
    got = sparse.reference_sparse_lstm_layer_in_bytes(x, of_inputs, bias, recurrent, *state, None, True)
    assert all(map(torch.equal, got, wanted))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_lstm_in_bytes_makes_no_projections(bidirectional, monkeypatch):
    """Where W_ih and W_hh are both in bytes, nobody asks for them, and the numbers are the same, to the bit."""
    torch.manual_seed(0)
    lstm = nn.LSTM(12, 9, 2, batch_first=True, bidirectional=bidirectional)
    places = [f"_l{layer}{way}" for layer in range(2) for way in ("", "_reverse")[: 1 + bidirectional]]

    def part(kind, place):
        weight = getattr(lstm, f"weight_{kind}{place}").detach()
        return sparse.to_matrix(weight, weight != 0, "unstructured", "int8"), tuple(weight.shape)

    biases = [(getattr(lstm, "bias_ih" + p) + getattr(lstm, "bias_hh" + p)).detach() for p in places]
    inputs = [layers.InBytes(part("ih", p)[0], b, part("ih", p)[1]) for p, b in zip(places, biases)]
    ours = layers.Lstm(lstm, inputs, [layers.RecurrentInBytes(*part("hh", p)) for p in places])
    x, by_parts = torch.randn(3, 5, 12), layers.sparse_lstm_in_bytes
    with torch.no_grad():
        wanted, _ = lstm(x)
        in_one, state = ours(x)
        torch.testing.assert_close(in_one, wanted, rtol=0, atol=0.05)
        calls = []
        monkeypatch.setattr(layers, "sparse_lstm_in_bytes", lambda *given: calls.append(given) or by_parts(*given))
        assert torch.equal(ours(x)[0], in_one) and not calls  # projections were nowhere
        ours.inputs.half()  # of which the biases alone are rounded
        torch.testing.assert_close(ours(x)[0], in_one, rtol=0, atol=0.02)
        assert not calls
        ours.inputs.float()
        for product, bias in zip(ours.inputs, biases):
            product.bias.copy_(bias)
        ours.inputs[0].register_forward_hook(lambda *given: None)
        apart, after = ours(x)  # a hook sees the projections
    assert len(calls) == 1 and torch.equal(in_one, apart) and all(map(torch.equal, state, after))
    with pytest.raises(ValueError, match=r"input must be \(..., 12\), got \[3, 5, 11\]"):
        ours(x[:, :, 1:])


@built
def test_on_two_threads(two_threads, lanes):  # noqa: F811
    tensors, _ = in_bytes(1204, 301, 0.4, lanes)
    x, projections, (h0, c0) = torch.randn(300, 301), torch.randn(17, 4, 1204), torch.randn(2, 17, 301)
    torch.set_num_threads(1)
    wanted = sparse.sparse_linear_in_bytes(x, tensors, None, 1204)
    ends = torch.arange(17).clamp(max=4)
    of_lstm = sparse.sparse_lstm_in_bytes(projections, tensors, h0, c0, ends, True)
    torch.set_num_threads(2)
    assert torch.equal(sparse.sparse_linear_in_bytes(x, tensors, None, 1204), wanted)
    for ours, alone in zip(sparse.sparse_lstm_in_bytes(projections, tensors, h0, c0, ends, True), of_lstm):
        assert torch.equal(ours, alone)


@built
def test_refuses(lanes):
    tensors, _ = in_bytes(37, 70, 0.1, lanes)
    linear = lambda *given: sparse.sparse_linear_in_bytes(torch.zeros(2, 70), list(given), None, 37)  # noqa: E731
    names = list(sparse.Bytes._fields)

    def refused(message, kind=ValueError, **changes):
        with pytest.raises(kind, match=message):
            linear(*(changes.get(name, t) for name, t in zip(names, tensors)))

    with pytest.raises(
        ValueError, match="bytes must be values, places, starts, offsets, rows, sums and scales, got 6 t"
    ):
        linear(*tensors[:6])
    steps, groups = len(tensors[0]), len(tensors[4])
    refused("bytes: values must be Char, got Float", TypeError, values=tensors[0].float())
    refused(rf"bytes: places must be \[{steps}, {lanes}, 4\], got", places=tensors[1][:, :, :3])
    refused("bytes: starts must be below the 70 inputs, got 70", starts=torch.full((steps,), 70).to(torch.uint16))
    refused(f"bytes: offsets must rise from 0 to the {steps} steps", offsets=tensors[3].flip(0))
    refused("bytes: rows must have each of the 37 outputs once, got 37", rows=torch.full_like(tensors[4], 37))
    refused("bytes: rows must have each of the 37 outputs once, got 0", rows=torch.zeros_like(tensors[4]))
    refused(rf"bytes: scales must be \[{groups}, {lanes}\], got", scales=tensors[6][:1])
    with pytest.raises(ValueError, match="bytes: inputs must be at most 65536, got 70000"):
        sparse.sparse_linear_in_bytes(torch.zeros(1, 70_000), tensors, None, 37)
    with pytest.raises(TypeError, match="x must be float32, got Double"):
        sparse.sparse_linear_in_bytes(torch.zeros(2, 70).double(), tensors, None, 37)
    with pytest.raises(ValueError, match="h0 must be"):
        sparse.sparse_lstm_in_bytes(torch.zeros(1, 2, 36), in_bytes(36, 9)[0], *torch.zeros(2, 2, 9), None, False)
    of_inputs, recurrent = in_bytes(36, 5, 0.5, lanes)[0], in_bytes(36, 9, 0.5, lanes)[0]

    crafted = [*recurrent[:4], torch.zeros_like(recurrent[4]), *recurrent[5:]]

    def layer(
        x=torch.zeros(2, 3, 5), inputs=of_inputs, bias=None, recurrent=recurrent, h=torch.zeros(2, 9), ends=None  # noqa: B008
    ):  # fmt: skip
        return sparse.sparse_lstm_layer_in_bytes(x, inputs, bias, recurrent, h, torch.zeros(2, 9), ends, False)

    for message, kind, change in (
        ("x must be float32, got Double", TypeError, {"x": torch.zeros(2, 3, 5).double()}),
        (r"x must be \(batch, time, inputs\), got", ValueError, {"x": torch.zeros(3, 5)}),
        (r"h0 must be \(batch, hidden\), got", ValueError, {"h": torch.zeros(9)}),
        (r"h0 must be \[2, 9\], got", ValueError, {"h": torch.zeros(1, 9)}),
        ("hidden must be at most 65536, got 2305843009213693952", ValueError, {"h": torch.zeros(0, 1 << 61)}),
        ("inputs must be values, places, starts, .* got 6 tensors", ValueError, {"inputs": of_inputs[:6]}),
        ("recurrent: rows must have each of the 36 outputs once", ValueError, {"recurrent": crafted}),
        (r"bias must be \[36\], got", ValueError, {"bias": torch.zeros(35)}),
        ("lengths must be between 0 and the 3 frames, got 4", ValueError, {"ends": torch.tensor([4, 1])}),
    ):
        with pytest.raises(kind, match=message):
            layer(**change)


@built
def test_any_places_and_starts_stay_inside(instructions, lanes):  # noqa: F811
    """Places beyond a window wrap around in it, in every path, as the instruction does."""
    tensors, _ = in_bytes(37, 70, 0.5, lanes)
    tensors[1].random_(0, 256)
    x = torch.randn(5, 70)
    wanted = sparse.reference_sparse_linear_in_bytes(
        F.pad(x, (0, 4 * lanes)), tensors, None, 37
    )  # behind x there are zeros
    within = sparse.sparse_linear_in_bytes(F.pad(x, (0, 4 * lanes)), tensors, None, 37)
    torch.testing.assert_close(within, wanted, rtol=1e-5, atol=1e-5)
    for inputs in (70, 64, 96):  # the last window of either copy of a column
        tensors[2] = torch.full_like(tensors[2].int(), inputs - 1).to(torch.uint16)
        assert sparse.sparse_linear_in_bytes(torch.randn(5, inputs), tensors, None, 37).isfinite().all()


@built
def test_transducer_equals_reference(instructions, lanes):  # noqa: F811
    encoder_out, inputs, recurrent, *others, _ = transducer_arguments("unstructured", "int8")
    tensors = list(sparse.to_bytes(sparse.Matrix(*recurrent), lanes))
    given = encoder_out, inputs, recurrent, *others
    tokens, frames, *after = sparse.sparse_transducer(*given, [], tensors)
    wanted = sparse.reference_sparse_transducer(*given, [], tensors)
    assert torch.equal(tokens, wanted[0]) and torch.equal(frames, wanted[1]) and 0 < len(tokens) < 36
    torch.testing.assert_close(after, list(wanted[2:]), rtol=1e-2, atol=2e-2)
    first = sparse.sparse_transducer(encoder_out[:5], *given[1:], [], tensors)  # in two chunks
    second = sparse.sparse_transducer(encoder_out[5:], *given[1:], first[3], tensors)
    assert torch.equal(torch.cat([first[0], second[0]]), tokens) and all(map(torch.equal, second[3], after[1]))
    in_windows = sparse.sparse_transducer(*given, [], [])
    assert not torch.equal(in_windows[3][1], after[1][1])  # it is they that were taken


# ---------------------------------------------------------------------------- layers


def network():
    torch.manual_seed(0)
    layers = {"over": nn.Conv2d(1, 4, 3, padding=1), "along": nn.Conv1d(160, 40, 3, dilation=2, padding=2)}
    layers |= {"each": nn.Conv1d(40, 40, 1), "out": nn.Linear(64, 30)}
    layers |= {"lstm": nn.LSTM(40, 32, 2, bidirectional=True, batch_first=True)}
    model = nn.ModuleDict(layers)
    masks = {name: torch.rand(w.shape) < 0.3 for name, w in lottery.prunable(model).items()}
    return model.eval(), masks, torch.randn(2, 20, 40)


def run(x):
    def use(model):
        h = model["over"](x.transpose(1, 2)[:, None]).flatten(1, 2)
        frames = model["along"](h).transpose(1, 2).contiguous()  # "each" takes them as they stand
        return model["out"](model["lstm"](model["each"](frames.transpose(1, 2)).transpose(1, 2))[0])

    return use


@built
def test_w8a8_in_use(monkeypatch):
    """Each weight chosen in bytes: near the masked model's answers, the same by copies, in their place in the table."""
    monkeypatch.setattr(compression, "byte_lanes", lambda: 16)  # wherever this runs; made of its own lanes
    model, masks, x = network()
    chosen = dict.fromkeys(masks, "bytes")
    compressed, rows = compress(model, masks, run(x), dtype="w8a8", chosen=chosen)
    assert compression.choice(rows) == chosen and all("in w8a8 its outputs are up to" in row.why for row in rows)
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for name, weight in lottery.prunable(masked).items():
            weight *= masks[name]
        wanted, found = run(x)(masked), run(x)(compressed)
    assert 0 < float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())
    for other in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
        assert torch.equal(run(x)(other), found)
    for name, weight in lottery.prunable(masked).items():
        kept = compressed.get_submodule(name.rpartition(".")[0])
        ours = getattr(kept, name.rpartition(".")[2])
        assert ours.shape == weight.shape and not ours[~masks[name]].any()
        assert float((ours - weight).abs().max()) < 0.01 * float(weight.abs().max())
    assert (
        run(x)(compressed.half()).dtype == torch.float32
        and compressed["out"](x.new_zeros(3, 64).half()).dtype == torch.half
    )


@built
def test_a_transducer_in_bytes(monkeypatch):
    """Its predictor's recurrence in the greedy loop too, and a copy says the same."""
    monkeypatch.setattr(compression, "byte_lanes", lambda: 16)
    torch.manual_seed(0)
    model = models.build("rnnt", "demo", 12).eval()
    masks = {name: torch.rand(w.shape) < 0.3 for name, w in lottery.prunable(model).items()}
    features, lengths = torch.randn(2, 90, 80), torch.tensor([90, 70])
    chosen = {name: "dense" if "subsample" in name or "ctc" in name else "bytes" for name in masks}
    use = lambda model: model.transcribe(features, lengths)  # noqa: E731
    compressed, rows = compress(model, masks, use, dtype="w8a8", chosen=chosen)
    assert compression.choice(rows) == chosen and len(compressed.greedy_loop.windows) == 7
    assert use(pickle.loads(pickle.dumps(compressed))) == use(compressed) and any(use(compressed))


@built
def test_bytes_are_for_those_who_ask(monkeypatch):
    """Nothing else rounds inputs: not int8, nor a processor that does not gain by it."""
    model, masks, x = network()
    for dtype, has in (("int8", 16), ("w8a8", 0)):
        monkeypatch.setattr(compression, "byte_lanes", lambda has=has: has)
        with pytest.raises(lottery.LotteryError, match="bytes was chosen, and stores no less than all of it or is not"):
            maker = compression.Maker(run(x), ["unstructured"], dtype, [], {"out.weight": "bytes"})
            compression.compress_layer("out", model["out"], masks, [(1, (x.new_zeros(1, 64),))], maker)


@built
def test_what_is_in_bytes_may_be_a_matrix():
    matrix, dense = random_matrix(37, 22, "unstructured", "int8")
    layer = layers.InBytes(matrix, None, (37, 22))
    torch.testing.assert_close(sparse.to_dense(*layers.matrix_of(layer), 37, 22), dense)
    with pytest.raises(ValueError, match=r"input must be \(\.\.\., 22\)"):
        layer(torch.zeros(2, 21))
    assert torch.equal(
        layer(torch.ones(2, 22)), sparse.reference_sparse_linear_in_bytes(torch.ones(2, 22), layer.bytes(), None, 37)
    )
    recurrent = layers.RecurrentInBytes(*[random_matrix(36, 9, "unstructured", "int8")[0], (36, 9)])
    assert len(recurrent.windows()) == 7 and F.linear(torch.ones(1, 9), recurrent.weight).shape == (1, 36)
