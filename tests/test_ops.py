"""The compiled operators against the pure-PyTorch reference, bit for bit."""

import copy

import pytest
import torch
from torch import nn

import lottery
from bench.__main__ import main
from bench.ops import falls_back

if not lottery.ops.compiled:
    pytest.skip(f"the extension is not built: {lottery.ops.path}", allow_module_level=True)
import _lottery  # there, since it is compiled

compiled = torch.ops.audio_lottery
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not (torch.cuda.is_available() and _lottery.build_facts()["cuda"]),
            reason="no GPU here, or built without CUDA",
        ),
    ),
]
# around every vector (2 to 64 elements), flag word (8), block (512, 2,048) and chunk (16,384, 32,768) tail
SIZES = [0, 1, 2, 7, 8, 9, 15, 17, 31, 33, 63, 64, 65, 511, 513, 2047, 2048, 2049, 16383, 16385, 32767, 32768, 32769]
SIZES += [100_003]


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def random_masks(weights, share=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand(w.shape, generator=generator) < share).to(w.device) for w in weights]


def same_masks(weights, masks, keep):
    got = compiled.global_magnitude_masks(weights, masks, keep)
    want = lottery.reference_global_magnitude_masks(weights, masks, keep)
    assert sum(int(g.sum()) for g in got) == keep
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == torch.bool and g.device == w.device and torch.equal(g, w), (i, weights[i].shape, keep)
    return got


# ---------------------------------------------------------------------------- hold_ticket_


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hold_equals_reference(dtype, device):
    torch.manual_seed(0)
    weights = [torch.randn(n).to(device, dtype) for n in SIZES]
    grads = [torch.randn(n).to(device, dtype) for n in SIZES]
    masks = random_masks(weights)
    for grad, mask in zip(
        grads, masks
    ):  # NaN, infinity and -0.0 under a false mask become +0, and stay under a true one
        for i, value in enumerate((float("nan"), float("inf"), -0.0)):
            if len(grad) > 9:
                grad[i], grad[i + 3] = value, value
                mask[i], mask[i + 3] = False, True
    for with_grads in (True, False):
        ours = [t.clone() for t in weights], [t.clone() for t in grads] if with_grads else []
        reference = [t.clone() for t in weights], [t.clone() for t in grads] if with_grads else []
        for _ in range(2):  # the second time the weights are clean already
            compiled.hold_ticket_(*ours, masks)
            lottery.reference_hold_ticket_(*reference, masks)
            for a, b in zip(ours[0] + ours[1], reference[0] + reference[1], strict=True):
                assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("device", DEVICES)
def test_hold_non_contiguous(device):
    base = torch.randn(40, 30, device=device)
    cases = [
        base.t(),
        base[:, ::2],
        base[3:7],
        torch.randn(2, 3, 5, 7, device=device).to(memory_format=torch.channels_last),
    ]
    for weight in cases:
        for mask_like in (weight, weight.contiguous()):
            mask = torch.rand(weight.shape, device=device) < 0.5
            mask = torch.empty_like(mask_like, dtype=torch.bool).copy_(mask)
            weight_, grad = weight.clone(), torch.randn(weight.shape, device=device)
            want = weight_ * mask, grad * mask
            compiled.hold_ticket_([weight_], [grad], [mask])
            assert torch.equal(weight_, want[0]) and torch.equal(grad, want[1])
    view = base.clone()[:, ::2]
    mask = torch.rand(view.shape, device=device) < 0.5
    want = view * mask
    compiled.hold_ticket_([view], [], [mask])
    assert torch.equal(view, want)


@pytest.mark.parametrize("device", DEVICES)
def test_hold_hundreds_of_tensors(device):
    weights = [torch.randn(i % 50, i % 7, device=device) for i in range(350)]
    masks, want = random_masks(weights), None
    want = [w * m for w, m in zip(weights, masks)]
    compiled.hold_ticket_(weights, [], masks)
    assert all(torch.equal(a, b) for a, b in zip(weights, want))


def test_hold_is_seen_by_autograd():
    x = torch.ones(3)
    w = torch.ones(3, requires_grad=True)
    y = (w * x).sum()
    with torch.no_grad():
        compiled.hold_ticket_([x], [], [torch.tensor([True, False, True])])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# ---------------------------------------------------------------------------- global_magnitude_masks


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pruning_equals_reference(dtype, device):
    torch.manual_seed(1)
    weights = [torch.randn(n).to(device, dtype) * 0.05 for n in SIZES]
    masks = random_masks(weights)
    survivors = sum(int(m.sum()) for m in masks)
    for keep in (0, 1, 2, survivors // 10, survivors // 2, round(0.8 * survivors), survivors - 1, survivors):
        same_masks(weights, masks, keep)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", SIZES[1:])
def test_pruning_one_tensor(n, device):
    weight = torch.randn(n, device=device)
    for keep in {0, 1, n // 3, n}:
        same_masks([weight], [torch.ones(n, dtype=torch.bool, device=device)], keep)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [1, 2, 3, 10, 1000])
def test_pruning_ties(levels, dtype, device):
    """Few magnitudes: the order of tensors and flat indices decides. Two million of them overflow the candidates."""
    torch.manual_seed(levels)
    weights = [(torch.randint(1, levels + 1, (n,), device=device) * 0.125).to(dtype) for n in (5, 70_000, 0, 1_930_001)]
    for weight in weights:
        weight[::3] *= -1
    masks = random_masks(weights, 0.9)
    survivors = sum(int(m.sum()) for m in masks)
    boundary = sum(int((m & (w.abs() > levels * 0.0625)).sum()) for w, m in zip(weights, masks))
    for keep in {1, survivors // 2, boundary, min(boundary + 1, survivors), survivors - 1}:
        same_masks(weights, masks, keep)


@pytest.mark.parametrize("device", DEVICES)
def test_pruning_where_the_sample_misleads(device):
    """Layers of very different scale and size, sorted weights, and a level that fills the bracket."""
    torch.manual_seed(2)
    big = torch.randn(3_000_000, device=device) * 1e-6
    unbalanced = [
        big,
        torch.randn(1000, device=device),
        torch.zeros(50_000, device=device),
        torch.randn(3, device=device) * 1e6,
    ]
    sorted_weights = [torch.linspace(-1, 1, 4_000_001, device=device)]
    two_levels = [torch.where(torch.arange(4_000_000, device=device) % 2 == 0, 1.0, 2.0)]
    nearly = [torch.cat([1 + torch.arange(2_500_000, device=device) % 3 * 2**-23, torch.rand(100_000, device=device)])]
    for weights in (unbalanced, sorted_weights, two_levels, nearly):
        total = sum(w.numel() for w in weights)
        masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
        for keep in (1, 1002, total // 5, total // 2, total - 40_000, total - 1):
            same_masks(weights, masks, keep)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pruning_falls_back(dtype, device):
    """Inputs that overflow the list, that defeat the sample, and both."""
    torch.manual_seed(6)
    weights = [(torch.randn(n, device=device) * 0.1).to(dtype) for n in (300_001, 0, 1_700_000)]
    cases = falls_back(weights)
    misled, keep = cases["misled"]
    cases["tied"] = [torch.where(w.abs() > 500, w, torch.where(w > 0, 1.0, 2.0).to(dtype)) for w in misled], keep
    half = [torch.where((w.abs() > 500) & (torch.rand(w.shape, device=device) < 0.5), w * 0, w) for w in misled]
    cases["half"] = half, keep  # the bracket spans all other weights, and so do its ends
    for weights, keep in cases.values():
        same_masks(weights, random_masks(weights, 1.1), keep)
        masks = random_masks(weights, 0.99)
        for cut in (20_000, keep, 1_900_000):
            same_masks(weights, masks, cut)
    masks = [m & (w.abs() < 500) for w, m in zip(misled, masks)]  # the sample finds no survivor
    same_masks(misled, masks, 700_000)


@pytest.mark.parametrize("flags, said", [("ops --repeats 0", "--repeats must be at least 1, got 0"), ("nap", "'nap'")])
def test_a_wrong_measurement_is_one_line(flags, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(flags.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    assert error.startswith("python -m bench: error: ") and said in error


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_byte_but_zero_is_true(dtype, device):
    """A bool tensor made by view or frombuffer can hold any byte."""
    generator = torch.Generator().manual_seed(7)
    random = torch.rand(2_000_003, generator=generator)
    for weight in (random[:3000] * 0.1, random, (random * 3).ceil()):
        weight = weight.to(device, dtype)
        choice = torch.randint(5, weight.shape, generator=generator)
        raw = torch.tensor([0, 1, 2, 128, 255], dtype=torch.uint8)[choice].to(device)
        mask, clean = raw.view(torch.bool), raw != 0
        for keep in (1, len(weight) // 2, int(clean.sum())):
            got = compiled.global_magnitude_masks([weight], [mask], keep)[0]
            want = lottery.reference_global_magnitude_masks([weight], [clean], keep)[0]
            assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))
        for step in (1, 3):  # the second is not contiguous
            held, want = weight.clone(), weight.clone()
            compiled.hold_ticket_([held[::step]], [], [mask[::step]])
            lottery.reference_hold_ticket_([want[::step]], [], [clean[::step]])
            assert torch.equal(held, want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pruning_denormals_zeros_and_extremes(dtype, device):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal * info.eps  # the smallest denormal
    values = [0.0, -0.0, tiny, -tiny, 3 * tiny, info.smallest_normal, -info.max, info.max, 1.0, -1.0] * 7
    weights = [torch.tensor(values, dtype=torch.float64).to(dtype).to(device)]
    masks = random_masks(weights, 0.8)
    for keep in range(int(masks[0].sum()) + 1):
        same_masks(weights, masks, keep)


@pytest.mark.parametrize("device", DEVICES)
def test_pruning_random_shapes(device):
    generator = torch.Generator().manual_seed(3)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    for case in range(150):
        dtype, levels = DTYPES[draw(0, 4)], (2, 30, 10**6)[draw(0, 3)]
        weights = []
        for _ in range(draw(1, 8)):
            shape = [draw(0, (4000, 70, 16)[dims]) for dims in [draw(0, 3)] for _ in range(dims + 1)]
            weight = (torch.randint(-levels, levels + 1, shape, generator=generator) / levels).to(device, dtype)
            weights.append(weight.transpose(0, -1) if draw(0, 2) else weight)
        masks = random_masks(weights, (0.1, 0.5, 1.0)[draw(0, 3)], case)
        survivors = sum(int(m.sum()) for m in masks)
        same_masks(weights, masks, draw(0, survivors + 1))


@pytest.mark.parametrize("device", DEVICES)
def test_rounds_are_nested(device):
    torch.manual_seed(4)
    weights = [torch.randn(300, 400, device=device), torch.randn(1000, device=device).round(decimals=1)]
    masks = [torch.ones_like(w, dtype=torch.bool) for w in weights]
    keep = 121_000
    for _ in range(10):
        keep = int(0.8 * keep)
        new = same_masks(weights, masks, keep)
        assert not any((n & ~m).any() for n, m in zip(new, masks))
        masks = new


# ---------------------------------------------------------------------------- block_norms

NORMS = [compiled.block_norms, lottery.reference_block_norms]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_norms", NORMS)
def test_block_norms_by_hand(block_norms, dtype, device):
    weight = torch.tensor([[1.0, -2, 3], [-4, 5, -6], [7, 8, -9]], dtype=dtype, device=device)
    for rows, columns, want in (
        (1, 1, [[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        (2, 2, [[12, 9], [15, 9]]),  # the edge blocks are 2 x 1, 1 x 2 and 1 x 1
        (2, 1, [[5, 7, 9], [7, 8, 9]]),
        (1, 2, [[3, 3], [9, 6], [15, 9]]),
        (3, 3, [[45]]),
        (2**62, 1, [[12, 15, 18]]),
        (2**63 - 1, 2**63 - 1, [[45]]),
    ):
        (norms,) = block_norms([weight], rows, columns)
        assert norms.dtype == torch.float64 and norms.device == weight.device and norms.tolist() == want


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_norms", NORMS)
def test_block_norms_add_row_by_row(block_norms, device):
    """1e16 + 1 rounds to 1e16, so a sum shows its order: 1 + 1 first, or not."""
    big = 1e16
    weight = torch.tensor([[1, 1, big, 1, 1, big], [big, 0, 1, 0, 1, 0]], dtype=torch.float64, device=device)
    assert block_norms([weight], 2, 2)[0].tolist() == [[big + 2, big, big]]
    assert block_norms([weight], 2, 1)[0].tolist() == [[big, 1, big, 1, 2, big]]


BLOCKS = [(1, 1), (1, 2), (1, 4), (1, 8), (8, 1), (16, 1), (2, 4), (3, 5)]


def same_norms(weights, rows, columns):
    got, want = compiled.block_norms(weights, rows, columns), lottery.reference_block_norms(weights, rows, columns)
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.dtype == torch.float64 and g.device == w.device and g.shape == w.shape
        assert torch.equal(bits(g), bits(w)), (i, weights[i].shape, rows, columns)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_block_norms_equal_reference(dtype, device):
    """Tails of vectors, of pieces and of blocks; magnitudes over 13 decades, so that the order of a sum shows."""
    torch.manual_seed(9)
    shapes = [(height, width) for height in (1, 7, 17) for width in (1, 2, 3, 7, 8, 9, 15, 17, 31, 33, 65, 127)]
    shapes += [(2, 32_769), (3, 65_541), (10_001, 3), (8_193, 4), (130, 1_001), (2, 3, 5), (16, 3, 5, 7), (9, 1, 1, 1)]
    weights = [(torch.randn(s) * 10 ** (torch.rand(s) * 13 - 10)).to(device, dtype) for s in shapes]
    for rows, columns in BLOCKS:
        same_norms(weights, rows, columns)
    same_norms(weights[-4:], 40, 20)


@pytest.mark.parametrize("device", DEVICES)
def test_block_norms_non_contiguous(device):
    base = torch.randn(40, 30, device=device)
    channels_last = torch.randn(6, 3, 5, 7, device=device).to(memory_format=torch.channels_last)
    for rows, columns in BLOCKS:
        same_norms(
            [base.t(), base[:, ::2], base[3:7], base[:, 1:], channels_last, base[:1].expand(9, 30)], rows, columns
        )
    assert compiled.block_norms([channels_last], 1, 105)[0].flatten().tolist() == pytest.approx(
        channels_last.double().abs().sum((1, 2, 3)).tolist()
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_norms", NORMS)
def test_block_norms_of_empty_weights(block_norms, device):
    weights = [torch.ones(shape, device=device) for shape in ((0, 5), (5, 0), (0, 0), (3, 0, 4), (0, 3, 4), (3, 5))]
    norms = block_norms(weights, 2, 2)
    assert [tuple(n.shape) for n in norms] == [(0, 3), (3, 0), (0, 0), (2, 0), (0, 6), (2, 3)]
    assert norms[-1].tolist() == [[4, 4, 2], [2, 2, 1]] and all(n.dtype == torch.float64 for n in norms)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_norms", NORMS)
def test_block_norms_pass_nan_and_infinity_on(block_norms, dtype, device):
    nan, inf = float("nan"), float("inf")
    weight = torch.tensor([[1, nan, 2, -inf, nan, -inf], [1, 1, 1, 1, inf, inf]], dtype=dtype, device=device)
    for columns in (2, 4):
        want = torch.tensor([[nan, inf, nan], [2, 2, inf]]) if columns == 2 else torch.tensor([[nan, nan], [4, inf]])
        assert torch.equal(block_norms([weight], 1, columns)[0].isnan().cpu(), want.isnan())
        assert torch.equal(block_norms([weight], 1, columns)[0].nan_to_num().cpu(), want.double().nan_to_num())
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    weight = torch.tensor([[-largest, largest, -smallest, smallest]], dtype=dtype, device=device)
    assert block_norms([weight], 1, 2)[0].tolist() == [[2 * largest, 2 * smallest]]  # infinite in float64 alone


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_are_ranked_by_their_norms(device):
    weights = [torch.tensor([[1.0, 1, 5, 5], [1, -1, 5, 0]]), torch.tensor([[-9.0, 3], [0, 0], [7, 7]])]
    norms = compiled.block_norms([w.to(device) for w in weights], 2, 2)
    assert [n.tolist() for n in norms] == [[[4, 15]], [[12], [14]]]
    masks = compiled.global_magnitude_masks(norms, [torch.ones_like(n, dtype=torch.bool) for n in norms], 2)
    assert [m.tolist() for m in masks] == [[[False, True]], [[False], [True]]]


def test_threads_do_not_matter():
    torch.manual_seed(5)
    cases = [torch.randn(400_000), torch.randint(1, 4, (400_000,)).float(), torch.ones(400_000)]
    threads = torch.get_num_threads()
    try:
        for weight in cases:
            masks, results = random_masks([weight]), []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                held = weight.clone()
                compiled.hold_ticket_([held], [], masks)
                norms = compiled.block_norms([weight.view(400, 1000)], 16, 1) + compiled.block_norms(
                    [weight[None]], 1, 4
                )
                results.append((compiled.global_magnitude_masks([weight], masks, 100_000)[0], held, *norms))
            assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0], strict=True))
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------- what is refused

W, M = torch.randn(4, 4), torch.ones(4, 4, dtype=torch.bool)
M2 = M.view(2, 8)


def moved(arguments, device):
    return [[t.to(device) for t in a] if isinstance(a, list) else a for a in arguments]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, "weights and masks must be as many, got 1 and 2", ([W], [], [M, M])),
        (TypeError, r"masks\[0\] must be bool, got Float", ([W], [], [M.float()])),
        (TypeError, r"weights\[1\] must be float32, bfloat16, float16 or float64, got Int", ([W, W.int()], [], [M, M])),
        (ValueError, r"masks\[0\] must have the shape of weights\[0\], got \[2, 8\] and \[4, 4\]", ([W], [], [M2])),
        (ValueError, "grads must be empty or as many as weights, got 2 and 1", ([W], [W, W], [M])),
        (TypeError, r"grads\[0\] must have the dtype of weights\[0\], got Double and Float", ([W], [W.double()], [M])),
        (ValueError, r"grads\[0\] must have the shape of weights\[0\], got \[2, 4\] and", ([W], [W[:2]], [M])),
    ],
)
def test_hold_refuses(error, message, arguments, device):
    with pytest.raises(error, match=message):
        compiled.hold_ticket_(*moved(arguments, device))


@pytest.mark.parametrize("device, other", [("cpu", "meta"), pytest.param("cuda", "cpu", marks=DEVICES[1].marks)])
def test_mixed_devices_are_refused(device, other):
    w, m = W.to(device), M.to(device)
    far_w, far_m = W.to(other), M.to(other)
    message = rf"\[1\] must be on the device of weights\[1\], got {other}(:0)? and {device}"
    one_device = rf"all weights must be on one device: weights\[0\] is on {device}(:0)?, weights\[1\] on {other}"
    for prune in (compiled.global_magnitude_masks, lottery.reference_global_magnitude_masks):
        with pytest.raises(ValueError, match="masks" + message):
            prune([w, w], [m, far_m], 1)
        with pytest.raises(ValueError, match=one_device):
            prune([w, far_w], [m, m], 1)
    for hold in (compiled.hold_ticket_, lottery.reference_hold_ticket_):
        with pytest.raises(ValueError, match="masks" + message):
            hold([w, w], [], [m, far_m])
        with pytest.raises(ValueError, match="grads" + message):
            hold([w, w], [w, far_w], [m, m])
        with pytest.raises(ValueError, match=one_device):
            hold([w, far_w], [], [m, m])
    for block_norms in NORMS:
        with pytest.raises(ValueError, match=one_device):
            block_norms([w, far_w], 1, 4)


NAN = torch.tensor([1.0, float("nan")])
SURVIVORS = "keep must be between 0 and the %d surviving weights, got %d"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, SURVIVORS % (16, 17), ([W], [M], 17)),
        (ValueError, SURVIVORS % (16, -1), ([W], [M], -1)),
        (ValueError, SURVIVORS % (0, 1), ([W], [~M], 1)),
        (ValueError, SURVIVORS % (0, 1), ([W[:0]], [M[:0]], 1)),
        (ValueError, r"weights\[1\] has a NaN or infinite value", ([W, NAN], [M, torch.tensor([True, True])], 2)),
        (ValueError, r"weights\[1\] has a NaN or infinite value", ([W, NAN], [M, torch.tensor([True, False])], 2)),
        (ValueError, r"weights\[0\] has a NaN or infinite", ([torch.tensor([float("-inf")])], [M[0, :1]], 1)),
        (
            TypeError,
            r"all weights must have one dtype: weights\[0\] is Float, weights\[1\] Half",
            ([W, W.half()], [M, M], 2),
        ),
        (TypeError, r"masks\[1\] must be bool", ([W, W], [M, M.int()], 2)),
    ],
)
def test_pruning_refuses(error, message, arguments, device):
    arguments = moved(arguments, device)
    with pytest.raises(error, match=message):
        compiled.global_magnitude_masks(*arguments)
    if "one dtype" not in message:  # which the reference compares by value
        with pytest.raises(error, match=message):
            lottery.reference_global_magnitude_masks(*arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("keep", [-1, 10, 1_000_000, 3_000_000])
def test_nan_is_refused_before_an_impossible_keep(keep, device):
    torch.manual_seed(8)
    listed, overflowing = torch.randn(2_000_000, device=device), torch.ones(2_000_000, device=device)
    for weight in (listed, overflowing):
        masks = random_masks([weight], 0.9)
        bad = weight.clone()
        bad[1_999_999] = float("nan")
        with pytest.raises(ValueError, match=r"weights\[1\] has a NaN"):
            compiled.global_magnitude_masks([weight, bad], masks * 2, keep)
        if not 0 <= keep < 2_000_000:
            with pytest.raises(ValueError, match="keep must be between"):
                compiled.global_magnitude_masks([weight], masks, keep)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinity_is_refused_in_every_dtype(dtype, device):
    weight, mask = torch.ones(5000, dtype=dtype, device=device), torch.ones(5000, dtype=torch.bool, device=device)
    compiled.global_magnitude_masks([weight], [mask], 10)
    weight[4999] = float("inf")
    with pytest.raises(ValueError, match=r"weights\[0\] has a NaN or infinite value"):
        compiled.global_magnitude_masks([weight], [mask], 10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (ValueError, r"weights\[1\] must have at least 2 dimensions, got 1 \(a block is a tile", ([W, W[0]], 1, 4)),
        (ValueError, r"weights\[0\] must have at least 2 dimensions, got 0 \(a block is a tile", ([W[0, 0]], 1, 4)),
        (ValueError, "rows and columns must be at least 1, got 0 and 4", ([W], 0, 4)),
        (ValueError, "rows and columns must be at least 1, got 8 and -1", ([W], 8, -1)),
        (TypeError, r"weights\[1\] must be float32, bfloat16, float16 or float64, got Int", ([W, W.int()], 1, 1)),
    ],
)
def test_block_norms_refuse(error, message, arguments, device):
    arguments = moved(arguments, device)
    for block_norms in NORMS if error is ValueError else NORMS[:1]:  # the reference takes any dtype
        with pytest.raises(error, match=message):
            block_norms(*arguments)


# ---------------------------------------------------------------------------- registrations


def test_opcheck():
    weights, masks = [torch.randn(5, 3), torch.randn(7)], [torch.rand(5, 3) < 0.5, torch.rand(7) < 0.5]
    survivors = sum(int(m.sum()) for m in masks)
    torch.library.opcheck(compiled.global_magnitude_masks, (weights, masks, survivors // 2))
    torch.library.opcheck(compiled.hold_ticket_, (weights, [torch.randn(5, 3), torch.randn(7)], masks))
    torch.library.opcheck(compiled.hold_ticket_, (weights, [], masks))
    turned = [weights[0].t(), weights[1]], [masks[0].t(), masks[1]]
    torch.library.opcheck(compiled.global_magnitude_masks, (*turned, survivors // 2))
    torch.library.opcheck(compiled.hold_ticket_, (turned[0], [], turned[1]))
    torch.library.opcheck(compiled.block_norms, ([torch.randn(5, 3), torch.randn(3, 0), torch.randn(4, 2, 3)], 2, 4))


def test_compiled_step():
    torch.manual_seed(0)
    weight, mask = torch.randn(6, 4), torch.rand(6, 4) < 0.5

    def step(weight, grad, x):
        compiled.hold_ticket_([weight], [grad], [mask])
        return (x @ (weight - 0.1 * grad).t()).sum()

    arguments = weight, torch.randn(6, 4), torch.randn(3, 4)
    eager, graph = [a.clone() for a in arguments], [a.clone() for a in arguments]
    want = step(*eager)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")(*graph)
    torch.testing.assert_close(got, want)
    assert torch.equal(eager[0], graph[0]) and torch.equal(eager[1], graph[1])


# ---------------------------------------------------------------------------- the same as masked copies


class TwoWay(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.output = nn.LSTM(6, 5, bidirectional=True), nn.Linear(10, 3)

    def forward(self, x):
        return self.output(self.lstm(x)[0])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    ],
)
def test_training_equals_masked_copies(optimizer):
    """In-place holding, deepcopy and state_dict between, against masks multiplied by hand."""
    torch.manual_seed(0)
    ours = TwoWay()
    theirs = copy.deepcopy(ours)
    ticket = lottery.Ticket(ours)
    ticket.prune(150)
    ticket.rewind()
    masks = [ticket.masks.get(name) for name, _ in theirs.named_parameters()]
    with torch.no_grad():
        for p, mask in zip(theirs.parameters(), masks):
            if mask is not None:
                p.mul_(mask)
    our_optimizer, their_optimizer = optimizer(ours.parameters()), optimizer(theirs.parameters())
    for _ in range(6):
        x = torch.randn(7, 2, 6)
        our_optimizer.zero_grad()
        ours(x).square().sum().backward()
        ticket.hold()
        our_optimizer.step()
        their_optimizer.zero_grad()
        theirs(x).square().sum().backward()
        with torch.no_grad():
            for p, mask in zip(theirs.parameters(), masks):
                if mask is not None:
                    p.grad.mul_(mask)
        their_optimizer.step()
        with torch.no_grad():
            for p, mask in zip(theirs.parameters(), masks):
                if mask is not None:
                    p.mul_(mask)
    ticket.check()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(a, b)
    twin = copy.deepcopy(ours)
    twin.load_state_dict(ours.state_dict())
    assert torch.equal(twin(x), ours(x))


def test_a_ticket_under_ddp(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = TwoWay()
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        results = []
        for model, ticket in ((plain, lottery.Ticket(plain)), (wrapped, lottery.Ticket(wrapped.module))):
            ticket.prune(100)
            ticket.rewind()
            optimizer = torch.optim.AdamW(model.parameters(), 0.01)
            torch.manual_seed(1)
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.randn(7, 2, 6)).square().sum().backward()
                ticket.hold()
                optimizer.step()
            ticket.check()
            results.append(ticket.model.state_dict())
        assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    finally:
        torch.distributed.destroy_process_group()
