"""Sparse products against dense masked ones, and compressed models against the dense masked model."""

import copy
import io
import itertools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lottery
import models
from audio_lottery import compression, layers, sparse

LAYOUTS, DTYPES = list(sparse.LAYOUTS), list(sparse.DTYPES)
built = pytest.mark.skipif(not lottery.ops.compiled, reason=f"the extension is not built: {lottery.ops.path}")


@pytest.fixture(params=["DEFAULT", "AVX2", "AVX512"])
def instructions(request):
    """Each of the paths that this processor has."""
    import _lottery

    try:
        before = _lottery.sparse_instructions(request.param)
    except ValueError:
        pytest.skip("not of this processor")
    yield request.param
    _lottery.sparse_instructions(before)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random_mask(outputs, inputs, layout, remaining=0.1, seed=0):
    """Whole blocks kept at random; some block rows lose everything."""
    r, c = sparse.LAYOUTS[layout]
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(-(-outputs // r), -(-inputs // c), generator=generator) < remaining
    kept[::5] = False
    return kept.repeat_interleave(r, 0).repeat_interleave(c, 1)[:outputs, :inputs]


def random_matrix(outputs, inputs, layout, dtype="float32", remaining=0.1):
    """A matrix and what it is worth, in float32."""
    torch.manual_seed(outputs + inputs)
    weight, mask = torch.randn(outputs, inputs), random_mask(outputs, inputs, layout, remaining)
    matrix = sparse.to_matrix(weight, mask, layout, dtype)
    dense = sparse.to_dense(*matrix, outputs, inputs)
    wanted = weight * mask
    eight_bits = dtype in ("int8", "w8a8")
    error = 2**-8 * wanted.abs() if dtype == "bfloat16" else eight_bits * wanted.abs().amax(1, keepdim=True) / 254
    assert ((dense - wanted).abs() <= error * 1.01 + 1e-7 * eight_bits).all()
    assert (dense[~mask] == 0).all()
    return matrix, dense


# ---------------------------------------------------------------------------- matrices


def test_to_matrix_by_hand():
    weight = torch.arange(1.0, 13).view(3, 4)
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    values, columns, offsets, scales = sparse.to_matrix(weight, mask, "unstructured")
    assert values.flatten().tolist() == [1, 4, 10] and scales is None
    assert columns.tolist() == [0, 3, 1] and offsets.tolist() == [0, 2, 2, 3]
    values, columns, offsets, _ = sparse.to_matrix(weight, mask, "1x4")
    assert values[:, 0].tolist() == [[1, 0, 0, 4], [0, 10, 0, 0]] and columns.tolist() == [0, 0]
    values, columns, offsets, _ = sparse.to_matrix(weight, mask, "4x1")  # the fourth output is not there
    assert values[:, :, 0].tolist() == [[1, 0, 0, 0], [0, 0, 10, 0], [4, 0, 0, 0]]
    assert columns.tolist() == [0, 1, 3] and offsets.tolist() == [0, 3]
    values, _, _, scales = sparse.to_matrix(weight, mask, "unstructured", "int8")
    assert values.flatten().tolist() == [32, 127, 127]
    torch.testing.assert_close(scales, torch.tensor([4 / 127, 0, 10 / 127]))


def test_int8_of_tiny_rows_and_of_none():
    """A scale is the one that values were divided by, however small; a matrix without inputs has one too."""
    weight = torch.tensor([[1e-29, 5e-30], [0.0, 0.0], [1e-44, 0.0]])
    matrix = sparse.to_matrix(weight, torch.ones(3, 2, dtype=torch.bool), "unstructured", "int8")
    dense = sparse.to_dense(*matrix, 3, 2)
    assert ((dense - weight).abs() <= 0.51 * matrix.scales[:, None])[:2].all()
    assert dense.isfinite().all()
    assert sparse.to_matrix(torch.zeros(4, 0), torch.zeros(4, 0, dtype=torch.bool), "8x1", "int8").values.numel() == 0


def test_to_matrix_refuses_places_of_more_than_16_bits():
    mask = torch.zeros(1, 65_540, dtype=torch.bool)
    with pytest.raises(ValueError, match="inputs must be at most 65536 for layout unstructured"):
        sparse.to_matrix(mask.float(), mask, "unstructured")
    mask[0, -1] = True
    matrix = sparse.to_matrix(mask.float(), mask, "1x4")
    assert torch.equal(sparse.to_dense(*matrix, 1, 65_540), mask.float())


def test_to_windows_by_hand():
    """Three rows of a group: the fullest first; lanes wait for a weight beyond the window."""
    mask = torch.zeros(3, 20, dtype=torch.bool)
    mask[0, 0] = mask[1, [1, 7, 8]] = mask[1, 19] = True
    weight = torch.arange(1.0, 61).view(3, 20)
    windows = sparse.to_windows(sparse.to_matrix(weight, mask, "unstructured"), 8)
    assert windows.rows.tolist() == [[1, 0, 2, 3, 3, 3, 3, 3]] and windows.offsets.tolist() == [0, 1]
    assert windows.starts.tolist() == [[0, 7, 8, 19, 0, 0, 0, 0]]
    assert windows.values[0, :, :2].tolist() == [[22, 1], [28, 0], [29, 0], [40, 0], [0, 0], [0, 0], [0, 0], [0, 0]]
    assert windows.places.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0]]


def test_to_windows_of_sixteen_lanes_by_hand():
    """Windows of 32 inputs begin at multiples of 16."""
    mask = torch.zeros(2, 70, dtype=torch.bool)
    mask[0, [17, 40, 69]] = mask[1, [3, 20]] = True
    weight = torch.arange(1.0, 141).view(2, 70)
    windows = sparse.to_windows(sparse.to_matrix(weight, mask, "unstructured"), 16)
    assert windows.rows.tolist() == [[0, 1, *[2] * 14]] and windows.offsets.tolist() == [0, 1]
    assert windows.starts.tolist() == [[0, 16, 64, 0, 0, 0]]
    assert windows.values[0, :, :2].tolist() == [[18, 74], [41, 91], [70, 0], [0, 0], [0, 0], [0, 0]]
    assert windows.places.tolist() == [[17 + (24 << 5) + (5 << 10), 3 + (4 << 5), *[0] * 14]]


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_hold_the_matrix(dtype, lanes):
    for outputs, inputs in ((1, 1), (3, 5), (8, 8), (17, 19), (100, 67)):
        for remaining in (0.0, 0.1, 1.0):
            matrix, dense = random_matrix(outputs, inputs, "unstructured", dtype, remaining)
            windows, found = sparse.to_windows(matrix, lanes), torch.zeros(outputs + 1, inputs + 31)
            assert windows.values.dtype == matrix.values.dtype and windows.starts.dtype == torch.uint16
            rows = windows.rows.long().repeat_interleave(windows.offsets.diff(), 0)
            steps = windows.values.shape[1]
            for step in range(steps):
                bits = 32 // steps
                columns = windows.starts.long()[:, step, None] + (windows.places >> bits * step & (1 << bits) - 1)
                found.index_put_((rows, columns), windows.values[:, step].float(), accumulate=True)
            scales = 1.0 if matrix.scales is None else matrix.scales[:, None]
            assert torch.equal(found[:outputs, :inputs] * scales, dense)
            assert not found[outputs:].any() and not found[:, inputs:].any()


# ---------------------------------------------------------------------------- sparse_linear


def check_linear(matrix, dense, columns):
    x, bias = torch.randn(columns, dense.shape[1]), torch.randn(len(dense))
    for b in (bias, None):
        got = sparse.sparse_linear(x, *matrix, b, len(dense))
        want = F.linear(x.double(), dense.double(), None if b is None else b.double()).float()
        torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-5)


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_equals_dense(layout, instructions):
    for dtype in DTYPES:
        for outputs, inputs in ((1, 1), (3, 5), (16, 16), (17, 19), (100, 67), (130, 258)):
            matrix, dense = random_matrix(outputs, inputs, layout, dtype)
            for columns in (1, 3, 4, 5, 16, 17, 33, 129):
                check_linear(matrix, dense, columns)


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_on_two_threads(layout, two_threads):
    matrix, dense = random_matrix(515, 1030, layout, remaining=0.3)
    for columns in (1, 4, 65):
        check_linear(matrix, dense, columns)


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_shapes(layout):
    matrix, dense = random_matrix(37, 22, layout)
    x = torch.randn(22, 3, 5).permute(2, 1, 0)  # not contiguous
    torch.testing.assert_close(sparse.sparse_linear(x, *matrix, None, 37), F.linear(x, dense), rtol=1e-5, atol=1e-5)
    vector = torch.randn(22)
    torch.testing.assert_close(sparse.sparse_linear(vector, *matrix, None, 37), dense @ vector, rtol=1e-5, atol=1e-5)
    assert sparse.sparse_linear(torch.randn(0, 22), *matrix, None, 37).shape == (0, 37)
    empty = sparse.to_matrix(torch.zeros(8, 0), torch.zeros(8, 0, dtype=torch.bool), layout)
    assert torch.equal(sparse.sparse_linear(torch.zeros(5, 0), *empty, torch.ones(8), 8), torch.ones(5, 8))
    for remaining in (0.0, 1.0):  # nothing left, and nothing left out
        matrix, dense = random_matrix(37, 22, layout, remaining=remaining)
        for rows in (x, vector):
            got = sparse.sparse_linear(rows, *matrix, None, 37)
            torch.testing.assert_close(got, F.linear(rows, dense), rtol=1e-5, atol=1e-5)


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_keeps_nan_and_infinity_where_they_are(layout):
    """An input that no kept block reads may be anything; in many columns, neither may other columns suffer."""
    weight = torch.zeros(16, 64)
    weight[:, 3] = 1.0
    matrix = sparse.to_matrix(weight, weight.bool(), layout)
    x = torch.ones(40, 64)
    x[:, 20:] = float("nan")
    x[7, 3] = float("inf")
    for columns in (x, x[:1]):
        got = sparse.sparse_linear(columns, *matrix, None, 16)
        assert got[0].tolist() == [1.0] * 16
    assert sparse.sparse_linear(x, *matrix, None, 16).isinf().sum() == 16


@built
def test_linear_refuses():
    matrix = sparse.to_matrix(torch.ones(32, 20), torch.ones(32, 20, dtype=torch.bool), "8x1")
    x = torch.randn(2, 20)

    def call(x=x, bias=None, outputs=32, **changes):
        return sparse.sparse_linear(x, *matrix._replace(**changes), bias, outputs)

    call()
    wrong = [
        (TypeError, "x must be float32, got Double", dict(x=x.double())),
        (ValueError, "columns must be below 19 for 19 inputs in blocks of 1, got 19", dict(x=torch.randn(2, 19))),
        (TypeError, "values must be float32, bfloat16 or int8, got Half", dict(values=matrix.values.half())),
        (ValueError, "blocks must be 1x1, 1x4, 4x1, 8x1 or 16x1, got 7x1", dict(values=matrix.values[:, :7])),
        (ValueError, r"values must be \(blocks, r, c\)", dict(values=matrix.values.flatten())),
        (TypeError, "columns must be uint16, got Int", dict(columns=matrix.columns.int())),
        (ValueError, "one a block of values", dict(columns=matrix.columns[1:])),
        (TypeError, "offsets must be int32, got Long", dict(offsets=matrix.offsets.long())),
        (ValueError, r"offsets must be \(6\) for 33 outputs in blocks of 8", dict(outputs=33)),
        (ValueError, "offsets must run from 0 to the", dict(offsets=matrix.offsets + 1)),
        (ValueError, "offsets must not decrease", dict(offsets=matrix.offsets[[0, 3, 2, 3, 4]].contiguous())),
        (ValueError, "scales must be given with int8 values, and only then", dict(scales=torch.ones(32))),
        (ValueError, "scales must be given", dict(values=matrix.values.to(torch.int8))),
        (ValueError, r"scales must be \(32\)", dict(values=matrix.values.to(torch.int8), scales=torch.ones(31))),
        (ValueError, r"bias must be \[32\], got \[31\]", dict(bias=torch.zeros(31))),
    ]
    for error, message, changes in wrong:
        with pytest.raises(error, match=message):
            call(**changes)


# ---------------------------------------------------------------------------- sparse_lstm


def check_lstm(hidden, batch, frames, layout, dtype="float32", remaining=0.1):
    matrix, _ = random_matrix(4 * hidden, hidden, layout, dtype, remaining)
    projections, (h0, c0) = torch.randn(batch, frames, 4 * hidden), torch.randn(2, batch, hidden)
    windows = [list(sparse.to_windows(matrix, lanes)) for lanes in (8, 16)] if layout == "unstructured" else []
    for ends in (None, torch.arange(batch).clamp(max=frames)):
        for reverse in (False, True):
            arguments = projections, *matrix, h0, c0, ends, reverse
            want = sparse.reference_sparse_lstm(*arguments, [])
            for more in ([], *windows):
                got = sparse.sparse_lstm(*arguments, more)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


LSTMS = (  # hidden, batch, frames
    (1, 1, 1), (5, 3, 4), (16, 1, 3), (37, 2, 6), (9, 16, 3), (19, 17, 18), (3, 0, 2), (150, 2, 3),
)  # fmt: skip


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lstm_equals_reference(layout, instructions):
    for dtype in DTYPES:
        for hidden, batch, frames in LSTMS:
            check_lstm(hidden, batch, frames, layout, dtype)


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lstm_on_two_threads(layout, two_threads):
    for batch in (1, 2, 17):
        check_lstm(301, batch, 4, layout, remaining=0.3)


@built
def test_lstm_with_nothing_for_a_thread(two_threads):
    """All weights are in the second of two block rows, which is longer than what is left of the outputs."""
    mask = torch.ones(20, 5, dtype=torch.bool)
    mask[:16] = False
    matrix = sparse.to_matrix(torch.randn(20, 5), mask, "16x1")
    lengths = torch.ones(1000, dtype=torch.int64).index_fill(0, torch.tensor([0]), 3)  # many, so that threads share
    arguments = torch.randn(1000, 3, 20), *matrix, *torch.randn(2, 1000, 5), lengths, False, []
    want = sparse.reference_sparse_lstm(*arguments)
    torch.testing.assert_close(sparse.sparse_lstm(*arguments), want, rtol=1e-4, atol=1e-5)


@built
def test_lstm_of_a_batch_is_that_of_each_utterance():
    """In no order of lengths, from the state that each begins with."""
    matrix, _ = random_matrix(4 * 21, 21, "unstructured")
    lengths = torch.tensor([2, 7, 0, 7, 3, 1, 5])
    projections, (h0, c0) = torch.randn(7, 7, 84), torch.randn(2, 7, 21)
    for reverse in (False, True):
        out, h, c = sparse.sparse_lstm(projections, *matrix, h0, c0, lengths, reverse, [])
        for b, length in enumerate(lengths.tolist()):
            alone = projections[b : b + 1, :length], *matrix, h0[b : b + 1], c0[b : b + 1], None, reverse, []
            want = sparse.sparse_lstm(*alone)
            torch.testing.assert_close((out[b, :length], h[b], c[b]), tuple(t[0] for t in want), rtol=1e-5, atol=1e-6)
            assert not out[b, length:].any()


@built
def test_lstm_gates_far_out():
    """Saturated gates, and NaN stays NaN."""
    matrix = sparse.to_matrix(torch.zeros(20, 5), torch.zeros(20, 5, dtype=torch.bool), "unstructured")
    zeros = torch.zeros(1, 5)
    gates = torch.tensor([-1e30, -100.0, 0.0, 100.0, float("nan")]).expand(1, 1, 4, 5).reshape(1, 1, 20)
    out, h, c = sparse.sparse_lstm(gates, *matrix, zeros, zeros, None, False, [])
    torch.testing.assert_close(out[0, 0], torch.tensor([0, 0, 0, 0.76159416, float("nan")]), equal_nan=True)
    torch.testing.assert_close(c[0], torch.tensor([0, 0, 0, 1, float("nan")]), equal_nan=True)


@built
def test_lstm_refuses():
    matrix, _ = random_matrix(32, 8, "8x1")
    projections, state = torch.randn(2, 3, 32), torch.zeros(2, 8)

    def call(projections=projections, h0=state, c0=state, lengths=None, matrix=matrix):
        return sparse.sparse_lstm(projections, *matrix, h0, c0, lengths, False, [])

    call()
    wrong = [
        (ValueError, r"projections must be \(batch, time, 4 \* hidden\)", dict(projections=torch.randn(2, 3, 30))),
        (TypeError, "projections must be float32", dict(projections=projections.double())),
        (ValueError, r"h0 must be \[2, 8\], got \[1, 8\]", dict(h0=state[:1])),
        (TypeError, "c0 must be float32", dict(c0=state.double())),
        (ValueError, r"lengths must be \(2\)", dict(lengths=torch.tensor([3]))),
        (ValueError, "lengths must be between 0 and the 3 frames, got 4", dict(lengths=torch.tensor([3, 4]))),
        (TypeError, "lengths must be int64", dict(lengths=torch.tensor([3, 3], dtype=torch.int32))),
        (ValueError, "offsets must be", dict(matrix=random_matrix(40, 8, "8x1")[0])),
    ]
    for error, message, changes in wrong:
        with pytest.raises(error, match=message):
            call(**changes)


@built
@pytest.mark.parametrize(("lanes", "groups"), [(8, 5), (16, 3)])
def test_lstm_refuses_windows(lanes, groups):
    matrix, _ = random_matrix(36, 9, "unstructured", remaining=0.5)
    windows = sparse.to_windows(matrix, lanes)

    def call(*windows, matrix=matrix):
        return sparse.sparse_lstm(torch.zeros(1, 3, 36), *matrix, *torch.zeros(2, 1, 9), None, False, list(windows))

    call(*windows)
    wrong = [
        (ValueError, "windows must be values, places, starts, offsets and rows", windows[:4]),
        (TypeError, "windows: values must be Float, got BFloat16", windows._replace(values=windows.values.bfloat16())),
        (ValueError, "windows: values must be", windows._replace(values=windows.values[:, :5])),
        (ValueError, "windows: places must be", windows._replace(places=windows.places[1:])),
        (TypeError, "windows: starts must be UInt16, got Int", windows._replace(starts=windows.starts.int())),
        (ValueError, "windows: starts must be below the 9 inputs, got 9",
         windows._replace(starts=torch.full_like(windows.starts.int(), 9).to(torch.uint16))),
        (ValueError, "windows: offsets must rise from 0", windows._replace(offsets=windows.offsets + 1)),
        (ValueError, "windows: offsets must rise from 0", windows._replace(offsets=windows.offsets.flip(0))),
        (ValueError, "windows: rows must be at least 0", windows._replace(rows=windows.rows - 1)),
        (ValueError, rf"windows: rows must be \[{groups}, {lanes}\], got \[{groups - 1}, {lanes}\]",
         windows._replace(rows=windows.rows[1:])),
    ]  # fmt: skip
    for error, message, tensors in wrong:
        with pytest.raises(error, match=message):
            call(*tensors)
    with pytest.raises(ValueError, match="of single weights, got 5 tensors and blocks 4x1"):
        call(*windows, matrix=random_matrix(36, 9, "4x1")[0])


def transducer_arguments(layout, dtype, hidden=21, joiner=19, tokens=37):
    """Small products of one layout; the blank wins now and then."""
    sizes = (4 * hidden, hidden), (joiner, hidden), (tokens, joiner)
    matrices = [random_matrix(*size, layout, dtype, 0.3)[0] for size in sizes]
    bias = torch.zeros(tokens)
    bias[0] = 3.0
    recurrent, projection, output = ([t for t in matrix if t is not None] for matrix in matrices)
    return torch.randn(12, joiner), torch.randn(tokens, 4 * hidden), recurrent, projection, output, bias, 3, []


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transducer_equals_reference(layout, instructions):
    for dtype in DTYPES:
        encoder_out, *others, _ = transducer_arguments(layout, dtype)
        tokens, frames, probabilities, state = got = sparse.sparse_transducer(encoder_out, *others, [], [])
        want = sparse.reference_sparse_transducer(encoder_out, *others, [], [])
        assert torch.equal(tokens, want[0]) and torch.equal(frames, want[1]) and 0 < len(tokens) < 36
        torch.testing.assert_close(got[2:], want[2:])
        first = sparse.sparse_transducer(encoder_out[:5], *others, [], [])  # in two chunks
        second = sparse.sparse_transducer(encoder_out[5:], *others, first[3], [])
        assert torch.equal(torch.cat([first[0], second[0]]), tokens)
        assert torch.equal(torch.cat([first[1], second[1] + 5]), frames)
        assert torch.equal(torch.cat([first[2], second[2]]), probabilities)
        assert all(map(torch.equal, second[3], state))
        if layout == "unstructured":
            windows = sparse.to_windows(sparse.Matrix(*others[1], *[None] * (4 - len(others[1]))))
            torch.testing.assert_close(sparse.sparse_transducer(encoder_out, *others, [], list(windows)), got)
        nothing = sparse.sparse_transducer(encoder_out[:0], *others, state, [])
        assert not len(nothing[0]) and all(map(torch.equal, nothing[3], state))


@built
def test_a_logit_that_is_nan_is_the_most_in_the_loop_too(instructions):
    """As argmax has it, so that what is broken shows the same in both."""
    encoder_out, *others, _ = transducer_arguments("unstructured", "float32")
    others[4] = torch.zeros_like(others[4])
    others[4][2] = float("nan")
    loops = sparse.sparse_transducer, sparse.reference_sparse_transducer
    got, want = (loop(encoder_out, *others, [], [])[0] for loop in loops)
    assert torch.equal(got, want) and set(got.tolist()) == {2}


@built
def test_transducer_refuses():
    encoder_out, inputs, recurrent, projection, output, bias, most, _ = transducer_arguments("4x1", "float32")
    wrong = [
        (TypeError, "encoder_out must be float32", (encoder_out.double(), inputs, recurrent, projection, output, bias)),
        (ValueError, "inputs must have two dimensions", (encoder_out, inputs[0], recurrent, projection, output, bias)),
        (ValueError, r"inputs must be \(tokens, 4 \* hidden\)",
         (encoder_out, inputs[:, 1:], recurrent, projection, output, bias)),
        (ValueError, "recurrent must be values, columns, offsets and scales if any, got 2 tensors",
         (encoder_out, inputs, recurrent[:2], projection, output, bias)),
        (ValueError, "offsets must be", (encoder_out, inputs, recurrent, recurrent, output, bias)),
        (ValueError, r"bias must be \[37\], got \[36\]",
         (encoder_out, inputs, recurrent, projection, output, bias[1:])),
    ]  # fmt: skip
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message):
            sparse.sparse_transducer(*arguments, most, [], [])
    arguments = encoder_out, inputs, recurrent, projection, output, bias, most
    for message, state in (
        ("state must be predictor_out, h and c, or nothing, got 1 tensors", [torch.zeros(19)]),
        (r"h must be \[21\], got \[20\]", [torch.zeros(19), torch.zeros(20), torch.zeros(21)]),
    ):
        with pytest.raises(ValueError, match=message):
            sparse.sparse_transducer(*arguments, state, [])


# ---------------------------------------------------------------------------- sparse_conv2d


WINDOWS = [  # channels, size, kernel, stride, padding, dilation
    (1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    (3, (9, 40), (5, 3), (2, 1), (2, 1), (1, 1)),
    (2, (7, 70), (3, 11), (1, 2), (1, 5), (1, 1)),
    (2, (11, 23), (3, 4), (2, 3), (4, 7), (2, 3)),  # more padding than the kernel is wide
    (5, (1, 50), (1, 12), (1, 4), (0, 0), (1, 1)),
    (7, (1, 33), (1, 1), (1, 1), (0, 0), (1, 1)),
    (2, (4, 5), (2, 2), (3, 5), (0, 0), (1, 1)),  # a stride wider than the kernel
]


@built
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv2d_equals_torchs(layout, instructions):
    for channels, size, kernel, *window in WINDOWS:
        for dtype in DTYPES:
            for outputs in (1, 18):
                matrix, dense = random_matrix(outputs, channels * kernel[0] * kernel[1], layout, dtype, 0.4)
                x, bias = torch.randn(2, channels, *size), torch.randn(outputs)
                for b in (bias, None):
                    got = sparse.sparse_conv2d(x, *matrix, b, outputs, kernel, *window)
                    want = F.conv2d(x, dense.view(outputs, channels, *kernel), b, *window)
                    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@built
def test_conv2d_shapes(two_threads):
    matrix, dense = random_matrix(40, 4 * 9, "8x1", remaining=0.5)
    x = torch.randn(3, 70, 60, 4).permute(0, 3, 1, 2)  # not contiguous
    arguments = (*matrix, None, 40, (3, 3), (1, 1), (1, 1), (1, 1))
    want = F.conv2d(x, dense.view(40, 4, 3, 3), None, 1, 1)
    torch.testing.assert_close(sparse.sparse_conv2d(x, *arguments), want, rtol=1e-4, atol=1e-4)
    assert sparse.sparse_conv2d(x[:0], *arguments).shape == (0, 40, 70, 60)


@built
def test_conv2d_refuses():
    matrix, _ = random_matrix(16, 2 * 6, "4x1")

    def call(x=None, bias=None, kernel=(2, 3), stride=(1, 1), padding=(0, 0), dilation=(1, 1)):
        x = torch.randn(1, 2, 4, 4) if x is None else x
        return sparse.sparse_conv2d(x, *matrix, bias, 16, kernel, stride, padding, dilation)

    call()
    wrong = [
        (TypeError, "x must be float32, got Double", dict(x=torch.zeros(1, 2, 4, 4).double())),
        (ValueError, r"x must be \(batch, channels, height, width\), got \[2, 4, 4\]", dict(x=torch.zeros(2, 4, 4))),
        (ValueError, "columns must be below 4 for 4 inputs", dict(kernel=(2, 1))),
        (ValueError, r"stride must be two numbers of at least 1 and below 2\^31, got \[1, 0\]", dict(stride=(1, 0))),
        (ValueError, r"padding must be two numbers of at least 0 and below 2\^31, got \[1\]", dict(padding=(1,))),
        (ValueError, "x must be at least as large as the kernel", dict(x=torch.zeros(1, 2, 4, 2))),
        (ValueError, r"bias must be \[16\], got \[15\]", dict(bias=torch.zeros(15))),
    ]
    for error, message, changes in wrong:
        with pytest.raises(error, match=message):
            call(**changes)


CONVOLUTIONS = [sparse.sparse_conv2d, sparse.reference_sparse_conv2d]


@pytest.mark.parametrize("conv2d", CONVOLUTIONS)
@pytest.mark.parametrize("device", ["cpu", "meta"])  # on meta the fake answers
def test_conv2d_bounds_its_window(conv2d, device):
    matrix, _ = random_matrix(16, 2 * 6, "4x1")
    matrix = sparse.Matrix(*(t if t is None else t.to(device) for t in matrix))
    x = torch.randn(1, 2, 4, 4, device=device)
    window = {"kernel": [2, 3], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    for name, place, number in itertools.product(
        window, (0, 1), (1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1, -1, -1 << 63)
    ):
        wrong = copy.deepcopy(window)
        wrong[name][place] = number
        with pytest.raises(ValueError, match=rf"{name} must be two numbers of at least . and below 2\^31, got \["):
            conv2d(x, *matrix, None, 16, *wrong.values())
    most = (1 << 31) - 1
    for wrong in (
        dict(dilation=[most, 1]), dict(dilation=[1, most]), dict(kernel=[2, most]), dict(kernel=[most, 2]),
        dict(kernel=[most, most], dilation=[most, most]), dict(dilation=[most, most], padding=[1 << 29, 1 << 29]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"x must be at least as large as the kernel, got \["):
            conv2d(x, *matrix, None, 16, *(window | wrong).values())
    wide = torch.empty(0, 2, 4, 1 << 31, device=device)
    with pytest.raises(ValueError, match=r"x must be below 2\^31 high and wide, got \["):
        conv2d(wide, *matrix, None, 16, *window.values())


@built
def test_conv2d_of_as_wide_a_stride_as_can_be():
    """One output in a row: its inputs lie as they would at any stride."""
    most = (1 << 31) - 1
    matrix, dense = random_matrix(18, 2 * 6, "4x1", remaining=0.5)
    x = torch.randn(1, 2, 5, 7)
    for window in (((most, most), (1, 2), (2, 1)), ((1, most), (0, 0), (1, 3)), ((most, 2), (0, 0), (3, 1))):
        got = sparse.sparse_conv2d(x, *matrix, None, 18, (2, 3), *window)
        want = F.conv2d(x, dense.view(18, 2, 2, 3), None, *window)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@built
def test_conv2d_refuses_more_inputs_than_there_are_numbers():
    matrix, _ = random_matrix(16, 2 * 6, "4x1")
    most = (1 << 31) - 1
    with pytest.raises(ValueError, match=r"channels \* kernel must be below 2\^63, got 3 channels and kernel \[21"):
        sparse.sparse_conv2d(torch.empty(0, 3, 4, 4), *matrix, None, 16, (most, most), (1, 1), (most, most), (1, 1))
    with pytest.raises(ValueError, match=r"outputs must be at least 0 and below 2\^31, got 9223372036854775807"):
        sparse.sparse_linear(torch.randn(2, 12), *matrix, None, (1 << 63) - 1)


OPERATORS = [
    "sparse_linear", "sparse_conv2d", "sparse_lstm", "sparse_transducer",
    "sparse_linear_in_bytes", "sparse_lstm_in_bytes", "sparse_lstm_layer_in_bytes",
]  # fmt: skip


def operators(implementation):
    """Each sparse operator of an implementation, with arguments that it takes, by name."""
    matrix, _ = random_matrix(32, 8, "8x1", "int8")
    parts = matrix._asdict()
    encoder_out, inputs, recurrent, projection, output, bias, most, _ = transducer_arguments("4x1", "float32")
    image, _ = random_matrix(32, 8, "8x1", "int8")
    single, _ = random_matrix(32, 8, "unstructured", "int8")
    window = {"kernel": (2, 2), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    state = [torch.zeros(19), torch.zeros(21), torch.zeros(21)]
    arguments = {
        "sparse_linear": {"x": torch.randn(3, 8), **parts, "bias": torch.zeros(32), "outputs": 32},
        "sparse_conv2d": {
            "x": torch.randn(1, 2, 4, 4), **image._asdict(), "bias": torch.zeros(32), "outputs": 32, **window,
        },
        "sparse_lstm": {
            "projections": torch.randn(2, 3, 32), **single._asdict(), "h0": torch.zeros(2, 8),
            "c0": torch.zeros(2, 8), "lengths": torch.tensor([3, 2]), "reverse": False,
            "windows": list(sparse.to_windows(single)),
        },
        "sparse_linear_in_bytes": {
            "x": torch.randn(3, 8), "bytes": list(sparse.to_bytes(single)), "bias": torch.zeros(32), "outputs": 32,
        },
        "sparse_conv2d_in_bytes": {
            "x": torch.randn(1, 2, 4, 4), "bytes": list(sparse.conv_bytes(single, (32, 2, 2, 2), (1, 1))),
            "bias": torch.zeros(32), "outputs": 32, **window,
        },
        "sparse_lstm_in_bytes": {
            "projections": torch.randn(2, 3, 32), "bytes": list(sparse.to_bytes(single)), "h0": torch.zeros(2, 8),
            "c0": torch.zeros(2, 8), "lengths": torch.tensor([3, 2]), "reverse": False,
        },
        "sparse_lstm_layer_in_bytes": {
            "x": torch.randn(2, 3, 8), "inputs": list(sparse.to_bytes(single)), "bias": torch.zeros(32),
            "recurrent": list(sparse.to_bytes(single)), "h0": torch.zeros(2, 8), "c0": torch.zeros(2, 8),
            "lengths": torch.tensor([3, 2]), "reverse": False,
        },
        "sparse_transducer": {
            "encoder_out": encoder_out, "inputs": inputs, "recurrent": recurrent, "projection": projection,
            "output": output, "bias": bias, "max_symbols": most, "state": state, "windows": [],
        },
    }  # fmt: skip
    prefix = "reference_" if implementation == "reference" else ""
    return {name: (getattr(sparse, prefix + name), given) for name, given in arguments.items()}


def elsewhere(value, place=None):
    """On meta: a tensor, or one of a list of them (all, without a place)."""
    if isinstance(value, list):
        return [t.to("meta") if place in (None, i) else t for i, t in enumerate(value)]
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("implementation", ["compiled", "reference"])
@pytest.mark.parametrize("name", OPERATORS)
def test_devices_are_not_mixed(name, implementation):
    """A meta tensor among others answered with memory that nobody had written."""
    op, arguments = operators(implementation)[name]
    op(*arguments.values())
    tensors = [n for n, v in arguments.items() if isinstance(v, torch.Tensor | list)]
    for moved in tensors:
        for place in range(len(arguments[moved])) if isinstance(arguments[moved], list) else (None,):
            mixed = arguments | {moved: elsewhere(arguments[moved], place)}
            other = moved if moved != tensors[0] else ".*"
            with pytest.raises(
                ValueError, match=rf"^{other} must be on the device of {tensors[0]}, got (meta|cpu) and"
            ):
                op(*mixed.values())
    if implementation == "compiled" and lottery.ops.compiled and name != "sparse_transducer":
        out = op(*(elsewhere(value) for value in arguments.values()))  # all of it there is a shape to be known
        assert (out[0] if isinstance(out, tuple) else out).device.type == "meta"


@built
def test_a_transposed_state_of_a_traced_lstm_has_the_strides_of_a_real_one():
    matrix, _ = random_matrix(32, 8, "8x1")
    h0, c0 = torch.zeros(8, 2).t(), torch.zeros(8, 2).t()
    run = lambda *given: torch.ops.audio_lottery.sparse_lstm(*given, None, False, [])  # noqa: E731
    given = torch.randn(2, 3, 32), *matrix, h0, c0
    with FakeTensorMode() as mode:
        traced = run(*(value if value is None else mode.from_tensor(value) for value in given))
    assert [out.stride() for out in traced] == [out.stride() for out in run(*given)]


@pytest.mark.parametrize("layer", ["product", "dense"])
def test_a_nested_tensor_keeps_its_layout(layer):
    dense = nn.Linear(4, 8)
    matrix = sparse.to_matrix(dense.weight.detach(), torch.ones(8, 4, dtype=torch.bool), "unstructured", "float32")
    product = layers.Product(matrix, dense.bias, dense.weight.shape, dense)
    if layer == "dense":
        product = layers.DenseProduct(dense.weight.detach(), dense.bias.detach(), 5, dense)
    parts = [torch.randn(2, 4), torch.randn(3, 4)]
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor(parts, layout=layout)
        with torch.no_grad():
            found, wanted = product(nested), dense(nested)
            assert found.layout == wanted.layout == layout
            for ours, theirs in zip((found + wanted).unbind(), wanted.unbind()):
                torch.testing.assert_close(ours, 2 * theirs)


@built
def test_opcheck():
    matrix, _ = random_matrix(32, 8, "8x1", "int8")
    torch.library.opcheck(torch.ops.audio_lottery.sparse_linear, (torch.randn(5, 8), *matrix, torch.randn(32), 32))
    arguments = torch.randn(2, 3, 32), *matrix, torch.zeros(2, 8), torch.zeros(2, 8), torch.tensor([3, 2]), True, []
    torch.library.opcheck(torch.ops.audio_lottery.sparse_lstm, arguments)
    matrix, _ = random_matrix(32, 8, "unstructured")
    windows = list(sparse.to_windows(matrix))
    arguments = torch.randn(2, 3, 32), *matrix, torch.zeros(2, 8), torch.zeros(2, 8), None, False, windows
    torch.library.opcheck(torch.ops.audio_lottery.sparse_lstm, arguments)
    matrix, _ = random_matrix(32, 8, "8x1", "int8")
    arguments = torch.randn(2, 2, 5, 9), *matrix, None, 32, (2, 2), (1, 2), (1, 0), (1, 1)
    torch.library.opcheck(torch.ops.audio_lottery.sparse_conv2d, arguments)
    single, _ = random_matrix(32, 8, "unstructured", "int8")
    in_bytes = list(sparse.to_bytes(single))
    torch.library.opcheck(torch.ops.audio_lottery.sparse_linear_in_bytes, (torch.randn(5, 8), in_bytes, None, 32))
    of_rows = list(sparse.conv_bytes(single, (32, 2, 2, 2), (1, 1)))
    arguments = torch.randn(2, 2, 5, 9), of_rows, None, 32, (2, 2), (1, 2), (1, 0), (1, 1)
    torch.library.opcheck(torch.ops.audio_lottery.sparse_conv2d_in_bytes, arguments)
    arguments = torch.randn(2, 3, 32), in_bytes, torch.zeros(2, 8), torch.zeros(2, 8), torch.tensor([3, 2]), True
    torch.library.opcheck(torch.ops.audio_lottery.sparse_lstm_in_bytes, arguments)
    arguments = torch.randn(2, 3, 8), in_bytes, torch.randn(32), in_bytes, *arguments[2:]
    torch.library.opcheck(torch.ops.audio_lottery.sparse_lstm_layer_in_bytes, arguments)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = *transducer_arguments("1x4", "float32"), []
    torch.library.opcheck(torch.ops.audio_lottery.sparse_transducer, arguments, test_utils=tests)


@built
def test_instructions_refuse():
    import _lottery

    with pytest.raises(ValueError, match=r"instructions must be DEFAULT, AVX2 or AVX512 .* got SSE9"):
        _lottery.sparse_instructions("SSE9")


# ---------------------------------------------------------------------------- compress


def masked_model(backbone, layout, remaining=0.1):
    """A backbone of demo size under random masks, and the masks."""
    torch.manual_seed(0)
    model = models.build(backbone, "demo", 29).eval()
    masks = {}
    with torch.no_grad():
        for seed, (name, weight) in enumerate(lottery.prunable(model).items()):
            flat = weight.flatten(1)
            masks[name] = random_mask(*flat.shape, layout, remaining, seed).view(weight.shape)
            weight.mul_(8).masked_fill_(~masks[name], 0)  # louder, so that something is heard behind all layers
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
    return model, masks


def outputs(model, features, lengths):
    """All log-probs or encoder outputs before each end."""
    with torch.inference_mode():
        out, lengths = model.encode(features, lengths) if hasattr(model, "encode") else model(features, lengths)
        return torch.cat([o[:length] for o, length in zip(out, lengths.tolist())])


def always_sparse(monkeypatch, but=()):
    """Take the last layout there is, however long it takes; `but`: what is taken before all others."""
    order = {
        name: -i for i, name in enumerate(["nn.LSTM", "dense", "dense prepacked", "windows", *LAYOUTS, "ours", *but])
    }
    monkeypatch.setattr(compression, "time_calls", lambda candidates, *_: {name: order[name] for name in candidates})


@pytest.mark.parametrize("backbone", list(models.BACKBONES))
def test_compressed_models_say_the_same(backbone, monkeypatch):
    always_sparse(monkeypatch)
    features, lengths = torch.randn(2, 66, 80), torch.tensor([66, 41])
    for layout, dtype, tolerance in (*((layout, "float32", 1e-4) for layout in LAYOUTS), ("1x4", "bfloat16", 0.05),
                                     ("8x1", "int8", 0.05)):  # fmt: skip
        model, masks = masked_model(backbone, layout)
        want, texts = outputs(model, features, lengths), model.transcribe(features, lengths)
        compressed, rows = compression.compress(
            model, masks, lambda m: m.transcribe(features, lengths), layout=layout, dtype=dtype
        )
        assert [row.name for row in rows] == list(masks)
        dense = {row.name: row.why for row in rows if row.layout != layout}
        if backbone == "conformer":
            assert dense == {f"blocks.{i}.depthwise.weight": "no sparse form of Conv1d with groups" for i in range(4)}
        else:
            assert dense == ({"ctc_output.weight": "run does not reach it"} if backbone == "rnnt" else {})
        got = outputs(compressed, features, lengths)
        assert (got - want).abs().max() <= tolerance * max(1, want.abs().max()), (layout, dtype)
        if dtype == "float32":
            assert compressed.transcribe(features, lengths) == texts
        if backbone == "rnnt":
            assert compressed.greedy(torch.zeros(0, 3, 128), torch.zeros(0, dtype=torch.int64))[0] == []
        assert torch.equal(outputs(model, features, lengths), want)  # the model itself is untouched
        kept = {name for name, _ in compressed.named_buffers()}
        tensors = {*compressed.parameters(), *compressed.buffers()}  # the loop shares some
        assert compression.resident_bytes(compressed) == sum(t.numel() * t.element_size() for t in tensors) and kept
        assert (
            sum(row.bytes for row in rows)
            < compression.resident_bytes(compressed)
            < compression.resident_bytes(model) / 3
        )


@pytest.mark.parametrize("backbone", ["cnn-lstm", "rnnt"])
def test_compressed_models_take_batches(backbone, monkeypatch):
    """Measured on one utterance, used on 17 of other lengths: what each of them says by itself."""
    always_sparse(monkeypatch, but=["windows"])
    model, masks = masked_model(backbone, "unstructured")
    one = torch.randn(1, 66, 80), torch.tensor([66])
    compressed, rows = compression.compress(model, masks, lambda m: m.transcribe(*one), layout="unstructured")
    recurrent = [row.layout for row in rows if "weight_hh" in row.name]
    assert recurrent and set(recurrent) == {"windows"}
    again, same = compression.compress(
        model, masks, lambda m: m.transcribe(*one), layout="unstructured", chosen=compression.choice(rows)
    )
    assert [row[:6] for row in same] == [row[:6] for row in rows]
    features, lengths = torch.randn(17, 90, 80), torch.arange(17) * 5 + 10
    for ours in (compressed, again):
        got, want = (outputs(m, features, lengths) for m in (ours, model))
        assert (got - want).abs().max() <= 1e-4 * max(1, want.abs().max())
        texts = ours.transcribe(features, lengths)
        assert texts == model.transcribe(features, lengths)
        assert texts == [ours.transcribe(f[None, :n], n[None])[0] for f, n in zip(features, lengths)]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_compressed_models_can_be_copied_and_saved(monkeypatch):
    always_sparse(monkeypatch, but=["dense prepacked"])
    features, lengths = torch.randn(2, 66, 80), torch.tensor([66, 41])
    model, masks = masked_model("rnnt", "1x4")
    compressed, _ = compression.compress(model, masks, lambda m: m.transcribe(features, lengths))
    assert {layers.DenseProduct, layers.Recurrent, layers.Greedy} <= {type(module) for module in compressed.modules()}
    torch.save(compressed, file := io.BytesIO())  # pickle alone does not know torch's uint16
    file.seek(0)
    for other in (copy.deepcopy(compressed), torch.load(file, weights_only=False)):
        assert torch.equal(outputs(other, features, lengths), outputs(compressed, features, lengths))
        assert other.greedy_loop is not compressed.greedy_loop and "greedy_loop" in dict(other.named_children())
        assert other.transcribe(features, lengths) == compressed.transcribe(features, lengths)
        assert compression.resident_bytes(other) == compression.resident_bytes(compressed)


class Speller(nn.Module):
    """A transducer of no speech: each row of numbers is spelled as some symbols. It offers its loop to nobody."""

    def __init__(self, bias=True, layers=1, mix_bias=False):
        super().__init__()
        self.read, self.symbols = nn.Linear(7, 19), nn.Embedding(9, 11)
        self.memory = nn.LSTM(11, 21, layers, bias=bias)
        self.mix, self.say = nn.Linear(21, 19, bias=mix_bias), nn.Linear(19, 9, bias=bias)
        self.loop = None

    def forward(self, rows):
        """(T, 7) -> symbols."""
        encoded = self.read(rows)
        if self.loop is not None:
            return [symbol for symbol, _, _ in self.loop(encoded, [])[0]]
        found, symbol, state = [], torch.zeros(1, 1, dtype=torch.int64), None
        out, state = self.memory(self.symbols(symbol), state)
        for row in encoded:
            for _ in range(3):
                symbol = self.say(torch.tanh(row + self.mix(out[0, 0]))).argmax().view(1, 1)
                if not symbol.item():
                    break
                found.append(symbol.item())
                out, state = self.memory(self.symbols(symbol), state)
        return found


class OfferingSpeller(Speller):
    def greedy_parts(self):
        parts = {"embedding": self.symbols, "predictor": self.memory, "projection": self.mix, "output": self.say}
        return parts | {"max_symbols": 3}

    def use_greedy(self, loop):
        self.loop = loop


def masked_speller(kind, **options):
    torch.manual_seed(0)
    model, masks = kind(**options).eval(), {}
    with torch.no_grad():
        for name, weight in lottery.prunable(model).items():
            masks[name] = torch.rand_like(weight) < 0.5
            weight.mul_(6).masked_fill_(~masks[name], 0)
    return model, masks, torch.randn(12, 7)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_model_that_offers_its_greedy_loop(bias, monkeypatch):
    model, masks, rows = masked_speller(OfferingSpeller, bias=bias)
    want = model(rows)
    assert 5 < len(want) < 36 and len(set(want)) > 2  # the blank won now and then
    always_sparse(monkeypatch)
    compressed, table = compression.compress(model, masks, lambda m: m(rows), layout="unstructured")
    assert {row.layout for row in table} == {"unstructured"}
    start, state = compressed.loop(compressed.read(rows[:5]), [])
    rest, _ = compressed.loop(compressed.read(rows[5:]), state)
    assert [symbol for symbol, _, _ in start + rest] == want
    times = lambda candidates, *_: {n: float((n == "dense") != ("ours" in candidates)) for n in candidates}  # noqa: E731
    monkeypatch.setattr(compression, "time_calls", times)  # each layer is faster sparse, and yet the whole is not
    dense, table = compression.compress(model, masks, lambda m: m(rows), layout="unstructured")
    assert {row.layout for row in table} == {"dense"} and type(dense.memory) is nn.LSTM
    for network in (compressed, dense):
        assert type(network.loop) is layers.Greedy and model.loop is None
        assert network(rows) == copy.deepcopy(network)(rows) == want


@torch.no_grad()
@pytest.mark.parametrize("how", ["hook", "forward", "subclass"])
def test_a_loop_of_layers_that_compute_something_else_is_left_to_the_model(how, monkeypatch):
    """A penalty on the blank, as decoders have it: the compiled loop would leave it out."""
    model, masks, rows = masked_speller(OfferingSpeller)
    plain, penalty = model(rows), torch.eye(model.say.out_features)[0] * 3
    if how == "hook":
        model.say.register_forward_hook(lambda module, args, logits: logits - penalty)
    elif how == "forward":
        model.say.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) - penalty, model.say)
    else:

        class Penalised(nn.Linear):
            def forward(self, x):
                return super().forward(x) - penalty

        model.say.__class__ = Penalised
    want = model(rows)
    assert want != plain
    always_sparse(monkeypatch)
    compressed, table = compression.compress(model, masks, lambda m: m(rows), layout="unstructured")
    assert compressed.loop is None and compressed(rows) == want
    assert {row.name: row.layout for row in table}["say.weight"] == "dense"


@torch.no_grad()
def test_rows_that_lie_in_memory_as_channels_do(monkeypatch):
    """Few rows, padded to blocks of 1x4: (1, 2, 1, 5) with the channels last."""
    weight = torch.randn(3, 5)
    matrix = sparse.to_matrix(weight, torch.ones(3, 5, dtype=torch.bool), "1x4")
    x = torch.randn(1, 1, 5, 2).permute(0, 3, 1, 2)
    assert x.shape == (1, 2, 1, 5) and not x.is_contiguous()
    torch.testing.assert_close(sparse.sparse_linear(x, *matrix, None, 3), x @ weight.T)


def test_greedy_parts_that_do_not_fit():
    for message, options in (
        (r"greedy_parts: predictor must be an nn.LSTM of one layer and direction, got LSTM\(11, 21", dict(layers=2)),
        ("greedy_parts: projection must have no bias", dict(mix_bias=True)),
    ):
        model, masks, rows = masked_speller(OfferingSpeller, **options)
        with pytest.raises(lottery.LotteryError, match=message):
            compression.compress(model, masks)


@torch.no_grad()
def test_a_model_that_offers_no_loop_is_left_its_own(monkeypatch):
    always_sparse(monkeypatch)
    model, masks, rows = masked_speller(Speller)
    compressed, _ = compression.compress(model, masks, lambda m: m(rows), layout="unstructured")
    assert type(compressed.memory) is layers.Lstm and compressed.loop is None
    assert vars(compressed).keys() == vars(model).keys()
    assert [name for name, _ in compressed.named_children()] == [name for name, _ in model.named_children()]
    assert compressed(rows) == model(rows)


def test_a_transducers_loop_adds_to_its_state_only_while_it_is_there():
    model, _ = masked_model("rnnt", "1x4")
    keys, features, lengths = list(model.state_dict()), torch.randn(2, 66, 80), torch.tensor([66, 41])
    want = model.emissions(features, lengths)
    with torch.no_grad():
        model.use_greedy(layers.Greedy(**model.greedy_parts()))
    assert {key for key in model.state_dict() if key not in keys} == {
        f"greedy_loop.{name}" for name, _ in model.greedy_loop.named_buffers()
    }
    found = model.emissions(features, lengths)
    assert [[e[:3] for e in one] for one in found] == [[e[:3] for e in one] for one in want] and any(want)
    for one, other in zip(itertools.chain(*found), itertools.chain(*want)):
        assert abs(one.probability - other.probability) < 1e-4
    model.use_greedy(None)
    assert list(model.state_dict()) == keys and model.emissions(features, lengths) == want


@pytest.mark.parametrize("batch_first", [False, True])
def test_any_lstm(batch_first, monkeypatch):
    """Layers, two directions, no bias, with a state or without."""
    always_sparse(monkeypatch)
    for options in (dict(num_layers=2, bidirectional=True), dict(num_layers=3, bias=False), dict(bidirectional=True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LSTM(11, 13, batch_first=batch_first, **options)).eval()
        masks = {name: torch.rand_like(w) < 0.3 for name, w in lottery.prunable(model).items()}
        with torch.no_grad():
            for name, w in lottery.prunable(model).items():
                w.masked_fill_(~masks[name], 0)
            compressed, rows = compression.compress(
                model, masks, lambda m: m(torch.randn(4, 6, 11)), layout="unstructured"
            )
            assert isinstance(compressed[0], layers.Lstm) and len(rows) == len(masks)
            x = torch.randn(3, 5, 11)
            batch = 3 if batch_first else 5
            state = torch.randn(2, options.get("num_layers", 1) * (1 + ("bidirectional" in options)), batch, 13)
            for given in (None, tuple(state)):
                (got, got_state), (want, want_state) = compressed[0](x, given), model[0](x, given)
                torch.testing.assert_close((got, *got_state), (want, *want_state), rtol=1e-4, atol=1e-5)


def test_streaming_in_chunks_equals_all_at_once(monkeypatch):
    always_sparse(monkeypatch)
    model = nn.Sequential(nn.LSTM(10, 24, batch_first=True)).eval()
    masks = {name: torch.rand_like(w) < 0.2 for name, w in lottery.prunable(model).items()}
    x, state, chunks = torch.randn(1, 12, 10), None, []
    with torch.inference_mode():
        compressed, _ = compression.compress(model, masks, lambda m: m(x))
        whole, (h, c) = compressed[0](x)
        for chunk in x.split([1, 1, 4, 6], 1):
            out, state = compressed[0](chunk, state)
            chunks.append(out)
    torch.testing.assert_close(torch.cat(chunks, 1), whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(state, (h, c), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(3, 17, (5, 3), (2, 1), (2, 1)),
        nn.Conv2d(3, 8, 3, 2, 1, dilation=2, bias=False),
        nn.Conv1d(6, 9, 4, stride=3),
        nn.Conv1d(6, 9, 1),
        nn.Conv2d(2, 5, 1, stride=2),
    ],
)
def test_any_convolution(conv, monkeypatch):
    always_sparse(monkeypatch)
    model = nn.Sequential(conv).eval()
    x = torch.randn(2, conv.in_channels, *([19, 23] if isinstance(conv, nn.Conv2d) else [23]))
    masks = {"0.weight": torch.rand_like(conv.weight) < 0.3}
    with torch.inference_mode():
        conv.weight.masked_fill_(~masks["0.weight"], 0)
        compressed, _ = compression.compress(model, masks, lambda m: m(x), layout="unstructured")
        assert isinstance(compressed[0], layers.Conv)
        torch.testing.assert_close(compressed(x), model(x), rtol=1e-4, atol=1e-5)


def test_compress_measures_and_says_why():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 2048), nn.Linear(2048, 16), nn.GRU(16, 16)).eval()
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in lottery.prunable(model).items()}
    masks["0.weight"] = random_mask(2048, 512, "16x1", 0.05)
    compressed, rows = compression.compress(model, masks, lambda m: [m(torch.randn(3, 40, 512)) for _ in range(2)])
    assert [(row.name, row.shape, row.columns) for row in rows[:2]] == [
        ("0.weight", (2048, 512), 120), ("1.weight", (16, 2048), 120)
    ]  # fmt: skip
    assert rows[1].layout.startswith("dense") and rows[1].remaining == 1  # nothing to leave out
    assert rows[2].why == rows[3].why == "no sparse form of GRU"
    if lottery.ops.compiled:
        assert isinstance(compressed[0], layers.Product) and rows[0].bytes < 4 * 2048 * 512 / 8


def test_compress_keeps_the_whole_dense_where_that_is_faster(monkeypatch):
    """Each layer is faster sparse, and yet the whole is not."""
    model = nn.Sequential(nn.Linear(512, 2048)).eval()
    masks = {"0.weight": random_mask(2048, 512, "16x1", 0.05)}
    x = torch.randn(1, 40, 512)

    def times(candidates, *_):
        return {name: float((name == "dense") != ("ours" in candidates)) for name in candidates}

    monkeypatch.setattr(compression, "time_calls", times)
    compressed, rows = compression.compress(model, masks, lambda m: m(x))
    assert type(compressed[0]) is nn.Linear
    assert torch.equal(compressed[0].weight, torch.where(masks["0.weight"], model[0].weight, 0.0))
    assert (rows[0].layout, rows[0].bytes) == ("dense", 4 * 2048 * 512)
    assert rows[0].why.endswith("; the whole model: dense 0, ours 1")


def test_compress_without_run():
    """Layers are measured on an utterance of their own; the convolution in two dimensions would need its height."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv1d(3, 8, 5, 2), nn.LSTM(8, 8), nn.Linear(8, 640)).eval()
    masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in lottery.prunable(model).items()}
    state = torch.get_rng_state()
    compressed, rows = compression.compress(model, masks)
    assert torch.equal(torch.get_rng_state(), state)
    assert [row.columns for row in rows] == [0, 50, 100, 1, 100]
    assert rows[0].why == "a Conv2d is measured where `run` is given"
    assert all(row.layout in row.why for row in rows[1:])  # the times of what was tried
    torch.testing.assert_close(compressed[3](torch.ones(8)), model[3].bias)


def test_what_stays_dense():
    for model, x, why in (
        (
            nn.Sequential(nn.Conv2d(2, 2, 3)).bfloat16(),
            torch.randn(1, 2, 9, 9).bfloat16(),
            "not of torch.bfloat16 on cpu",
        ),
        (nn.Sequential(nn.Linear(2, 2)).double(), torch.randn(1, 2).double(), "not of torch.float64 on cpu"),
        (nn.Sequential(nn.Conv1d(2, 2, 3, groups=2)), torch.randn(1, 2, 9), "no sparse form of Conv1d with groups"),
        (
            nn.Sequential(nn.Conv1d(2, 2, 3, padding="same")),
            torch.randn(1, 2, 9),
            "no sparse form of Conv1d with padding by name",
        ),
        (nn.Sequential(nn.ConvTranspose1d(2, 2, 3)), torch.randn(1, 2, 9), "no sparse form of ConvTranspose1d"),
        (nn.Sequential(nn.LSTM(2, 2, proj_size=1)), torch.randn(3, 1, 2), "no sparse form of LSTM with proj_size"),
    ):
        masks = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in lottery.prunable(model).items()}
        compressed, rows = compression.compress(model.eval(), masks, lambda m: m(x))  # noqa: B023
        assert all(row.why.endswith(why) for row in rows) and type(compressed[0]) is type(model[0])
    model = nn.Linear(4, 4)
    compressed, rows = compression.compress(model, {"weight": torch.zeros(4, 4).bool()}, lambda m: m(torch.randn(1, 4)))
    assert rows[0].why == "it is the whole model" and torch.equal(compressed(torch.randn(1, 4))[0], model.bias)


def test_compress_refuses():
    model = nn.Sequential(nn.Linear(4, 4))
    masks = {"0.weight": torch.ones(4, 4, dtype=torch.bool)}
    run = lambda m: m(torch.zeros(1, 4))  # noqa: E731
    for message, changes in (
        ("dtype must be one of float32, bfloat16, int8, w8a8, got int4", dict(dtype="int4")),
        ("layout must be one of unstructured, 1x4, 4x1, 8x1, 16x1, got 2x2", dict(layout="2x2")),
    ):
        with pytest.raises(lottery.LotteryError, match=message):
            compression.compress(model, masks, run, **changes)
    with pytest.raises(lottery.LotteryError, match=r"0.weight: a mask of shape \[4, 4\] is needed, got none"):
        compression.compress(model, {}, run)
