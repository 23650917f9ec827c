"""Parts of a Conformer's block in one pass: the operator, what is made of it, and the networks that get it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lottery
import models
from audio_lottery import compression, fused
from lab import export

built = pytest.mark.skipif(not lottery.ops.compiled, reason="the extension is not built")
TOKENS = ["<blank>", " ", *"abcdefghij"]


def test_a_norm_of_another_kind_is_refused():
    depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
    for parts in ((depthwise, nn.GroupNorm(2, 8)), (nn.Linear(8, 8), nn.BatchNorm1d(8))):
        with pytest.raises(lottery.LotteryError, match="fused_parts: depthwise must be"):
            fused.fused(2, *parts)


def test_a_traced_graph_leaves_no_stand_in_behind():
    attention, shape = fused.RotaryAttention(2), (1, 7, 24)
    fused.KEPT.clear()
    with FakeTensorMode():
        assert attention(torch.empty(shape), torch.ones(1, 7, dtype=torch.bool)).shape == (1, 7, 8)
    assert attention(torch.randn(shape), torch.ones(1, 7, dtype=torch.bool)).shape == (1, 7, 8)
    for frames in range(1, 20):
        fused.turns(frames, 2)
    assert len(fused.KEPT) <= 8


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


# ---------------------------------------------------------------------------- the operator


def test_by_hand():
    """One channel, two frames: GLU halves what it is given (the gate is 0), the kernel adds 1, 2 and 3 times it."""
    x = torch.tensor([[[4.0, 8.0], [0.0, 0.0]]])
    found = fused.gated_convolution(x, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([-16.0]), None)
    sums = torch.tensor([2 * 2.0 + 3 * 4.0 - 16, 1 * 2.0 + 2 * 4.0 - 16])  # 0 and -6
    torch.testing.assert_close(found[0, 0], sums * torch.sigmoid(sums))
    found = fused.gated_convolution(x, torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([-3.0]), torch.tensor([1]))
    torch.testing.assert_close(found[0, 0], torch.tensor([1 / (1 + torch.tensor(-1.0).exp()), 0.0]))


@built
@pytest.mark.parametrize("batch, channels, time, kernel", [
    (1, 1, 1, 1), (2, 3, 1, 15), (3, 5, 7, 3), (1, 17, 33, 5), (4, 64, 125, 15), (2, 416, 250, 31), (1, 2, 5000, 7),
    (0, 4, 9, 3), (2, 0, 9, 3), (2, 4, 0, 3),
])  # fmt: skip
def test_it_is_its_reference(batch, channels, time, kernel, threads):
    x, weight, bias = 3 * drawn(batch, 2 * channels, time), drawn(channels, kernel), drawn(channels)
    ends = torch.tensor([(7 * i + 3) % (time + 1) for i in range(batch)], dtype=torch.int64)
    for lengths in (None, ends, torch.full((batch,), time)):
        wanted = fused.reference_gated_convolution(x, weight, bias, lengths)
        found = fused.gated_convolution(x, weight, bias, lengths)
        assert found.shape == (batch, channels, time)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        turned = x.transpose(1, 2).contiguous().transpose(1, 2), weight.t().contiguous().t()
        assert torch.equal(fused.gated_convolution(*turned, bias, lengths), found)


@built
def test_large_numbers_and_nan():
    x = torch.tensor([[[1.0, 1.0, 1.0, 2.0, torch.nan], [1e3, -1e3, torch.inf, -torch.inf, 0.0]]])
    arguments = x, torch.tensor([[1.0]]), torch.tensor([0.0]), None
    found, wanted = fused.gated_convolution(*arguments), fused.reference_gated_convolution(*arguments)
    torch.testing.assert_close(found, wanted, atol=1e-30, rtol=1e-6, equal_nan=True)
    assert found.isnan().tolist() == [[[False, False, False, False, True]]]
    gates = torch.tensor([[[1.0], [torch.nan]]])
    assert fused.gated_convolution(gates, *arguments[1:]).isnan().all()


@built
def test_what_lies_behind_an_end_counts_for_nothing():
    x, weight, bias = drawn(2, 8, 21), drawn(4, 5), drawn(4)
    lengths = torch.tensor([21, 9])
    found = fused.gated_convolution(x, weight, bias, lengths)
    alone = fused.gated_convolution(x[1:, :, :9], weight, bias, None)
    assert torch.equal(found[1:, :, :9], alone) and not found[1, :, 9:].any()
    x[1, :, 9:] = torch.nan
    assert torch.equal(fused.gated_convolution(x, weight, bias, lengths), found)


@built
@pytest.mark.parametrize("change, error, message", [
    (dict(x=torch.zeros(1, 4, 3).double()), TypeError, "x must be float32, got Double"),
    (dict(x=torch.zeros(4, 3)), ValueError, r"x must have 3 dimension\(s\), got \[4, 3\]"),
    (dict(bias=torch.zeros(2).half()), TypeError, "bias must be float32, got Half"),
    (dict(x=torch.zeros(1, 5, 3)), ValueError, "x must have two channels a row of weight"),
    (dict(bias=torch.zeros(3)), ValueError, "x must have two channels a row of weight, and bias a number"),
    (dict(weight=torch.zeros(2, 4)), ValueError, r"weight must be of an odd kernel, got \[2, 4\]"),
    (dict(lengths=torch.tensor([4])), ValueError, "lengths must be between 0 and the 3 frames, got 4"),
    (dict(lengths=torch.tensor([-1])), ValueError, "lengths must be between 0 and the 3 frames, got -1"),
    (dict(lengths=torch.tensor([1, 2])), ValueError, "lengths must be one an utterance"),
    (dict(lengths=torch.tensor([1.0])), TypeError, "lengths must be int64, got Float"),
])  # fmt: skip
def test_what_it_refuses(change, error, message):
    usual = dict(x=torch.zeros(1, 4, 3), weight=torch.zeros(2, 3), bias=torch.zeros(2), lengths=None)
    with pytest.raises(error, match=message):
        fused.gated_convolution(*(usual | change).values())


def test_attention_by_hand():
    """Two frames, one head of two numbers. The second frame's query and key are turned by a right angle."""
    qkv = torch.tensor([[[2.0, 0, 1, 0, 5, 6], [2, 0, 1, 0, 7, 8]]])
    cos, sin = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
    share = torch.sigmoid(torch.tensor(2 / 2**0.5))  # of a query's own frame: products are 2 and 0, over sqrt(2)
    found = fused.rotary_attention(qkv, cos, sin, None, 1)
    own, other = torch.tensor([[5.0, 6], [7, 8]]), torch.tensor([[7.0, 8], [5, 6]])
    torch.testing.assert_close(found[0], share * own + (1 - share) * other)
    found = fused.rotary_attention(qkv, cos, sin, torch.tensor([1]), 1)
    torch.testing.assert_close(found[0], torch.tensor([[5.0, 6], [0, 0]]))
    assert not fused.rotary_attention(qkv, cos, sin, torch.tensor([0]), 1).any()


@built
@pytest.mark.parametrize("batch, time, heads, size", [
    (1, 1, 1, 2), (2, 7, 3, 6), (3, 33, 8, 52), (1, 1000, 4, 32), (2, 256, 2, 70), (1, 17, 1, 16),
    (0, 4, 2, 4), (2, 0, 2, 4),
])  # fmt: skip
def test_attention_is_its_reference(batch, time, heads, size, threads):
    qkv, (cos, sin) = 2 * drawn(batch, time, 3 * heads * size), fused.turns(time, size // 2)
    ends = torch.tensor([(7 * i + 3) % (time + 1) for i in range(batch)], dtype=torch.int64)
    for lengths in (None, ends, torch.full((batch,), time)):
        found = fused.rotary_attention(qkv, cos, sin, lengths, heads)
        assert found.shape == (batch, time, heads * size)
        wanted = fused.reference_rotary_attention(qkv, cos, sin, lengths, heads)
        torch.testing.assert_close(found, wanted, atol=5e-5, rtol=1e-4)
        turned = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (qkv, cos, sin))
        assert torch.equal(fused.rotary_attention(*turned, lengths, heads), found)


@built
def test_attention_of_large_numbers_and_nan():
    qkv, (cos, sin) = drawn(2, 9, 12), fused.turns(9, 2)
    large = 1e3 * qkv, cos, sin, None, 1  # all but the largest score is nothing
    found, wanted = fused.rotary_attention(*large), fused.reference_rotary_attention(*large)
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-3)
    ends, (cos, sin) = torch.tensor([9, 4]), fused.turns(9, 2)
    found = fused.rotary_attention(qkv, cos, sin, ends, 1)
    assert torch.equal(found[1:, :4], fused.rotary_attention(qkv[1:, :4], cos[:4], sin[:4], None, 1))
    qkv[1, 4:] = torch.nan  # what is behind an end is no key
    for attention in (fused.rotary_attention, fused.reference_rotary_attention):
        torch.testing.assert_close(attention(qkv, cos, sin, ends, 1), found)
    qkv[0, 7] = torch.nan  # what is not a number stays in its utterance, whatever a thread did before
    for lost in (torch.nan, torch.inf):
        qkv[0, 7] = lost
        again = fused.rotary_attention(qkv, cos, sin, ends, 1)
        assert again[0].isnan().all() and torch.equal(again[1], found[1])


@built
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instructions(capability):
    from test_transducer_loss import check_with  # a module that is skipped where the extension is not built

    program = """
import test_fused as here
for case in (2, 7, 3, 6), (3, 33, 8, 52), (2, 256, 2, 70):
    here.test_attention_is_its_reference(*case, None)
for case in (3, 5, 7, 3), (1, 17, 33, 5), (2, 64, 125, 15):
    here.test_it_is_its_reference(*case, None)
here.test_attention_of_large_numbers_and_nan()
"""
    check_with(capability, program)


@built
@pytest.mark.parametrize("change, error, message", [
    (dict(qkv=torch.zeros(1, 2, 12).half()), TypeError, "qkv must be float32, got Half"),
    (dict(sin=torch.zeros(2)), ValueError, r"sin must have 2 dimension\(s\), got \[2\]"),
    (dict(heads=0), ValueError, "qkv must be three vectors of an even size a head"),
    (dict(qkv=torch.zeros(1, 2, 18)), ValueError, r"even size a head, got \[1, 2, 18\] for 2 heads"),
    (dict(cos=torch.zeros(2, 2)), ValueError, r"cos must be \[2, 1\], got \[2, 2\]"),
    (dict(sin=torch.zeros(3, 1)), ValueError, r"sin must be \[2, 1\], got \[3, 1\]"),
    (dict(lengths=torch.tensor([3])), ValueError, "lengths must be between 0 and the 2 frames, got 3"),
    (dict(lengths=torch.tensor([1, 2])), ValueError, r"lengths must be one an utterance, got \[2\] for qkv of"),
])  # fmt: skip
def test_what_attention_refuses(change, error, message):
    usual = dict(qkv=torch.zeros(1, 2, 12), cos=torch.zeros(2, 1), sin=torch.zeros(2, 1), lengths=None, heads=2)
    with pytest.raises(error, match=message):
        fused.rotary_attention(*(usual | change).values())


@built
def test_opcheck():
    for lengths in (None, torch.tensor([5, 0])):
        arguments = drawn(2, 5, 24), drawn(5, 2), drawn(5, 2), lengths, 2
        torch.library.opcheck(torch.ops.audio_lottery.rotary_attention, arguments)
    for lengths in (None, torch.tensor([9, 4])):
        arguments = drawn(2, 6, 9), drawn(3, 5), drawn(3), lengths
        torch.library.opcheck(torch.ops.audio_lottery.gated_convolution, arguments)


# ---------------------------------------------------------------------------- in a block


def block_of(**sizes) -> models.ConformerBlock:
    torch.manual_seed(0)
    block = models.ConformerBlock(**dict(width=24, heads=3, kernel=7, dropout=0.1, inner=48) | sizes).eval()
    for tensor in (block.batch_norm.running_mean, block.batch_norm.weight.data, block.batch_norm.bias.data):
        tensor.normal_()
    block.batch_norm.running_var.uniform_(0.1, 3)
    return block.requires_grad_(False)


@pytest.mark.parametrize("ends", [[2], [40], [40, 40], [40, 13, 1]])
def test_a_block_computes_the_same(ends):
    block, lengths = block_of(), torch.tensor(ends)
    x, frames = drawn(len(ends), max(ends), 24), max(ends)
    valid, rows = models.valid_frames(lengths, frames), models.valid_rows(lengths, frames)
    wanted, passes = block(x, valid, rows)[valid], []
    block.use_fused(*fused.fused(**block.fused_parts()))
    for part in (block.fused, block.attention.fused):
        part.register_forward_hook(lambda *_: passes.append(1))
    torch.testing.assert_close(block(x, valid, rows)[valid], wanted, atol=2e-5, rtol=1e-4)
    assert len(passes) == 2
    for _ in range(2):  # the angles of one length serve several, and other modes
        with torch.inference_mode():
            torch.testing.assert_close(block(x, valid, rows)[valid], wanted, atol=2e-5, rtol=1e-4)
    assert len(passes) == 6
    given = x.clone().requires_grad_()
    traced = torch.jit.trace(block, (x, valid, rows), check_trace=False)
    for by_layers in (block(given, valid, rows), traced(x, valid, rows)):
        torch.testing.assert_close(by_layers[valid], wanted, atol=2e-5, rtol=1e-4)
        assert len(passes) == 6
    block.train()(x, valid, rows)  # by its own layers, which have dropout and statistics
    block.use_fused(None, None)
    block.eval()(x, valid, rows)
    assert len(passes) == 6


def test_layers_of_another_form_are_refused():
    usual = nn.BatchNorm1d(4)
    for conv, norm in (
        (nn.Conv1d(4, 4, 4, padding=2, groups=4), usual), (nn.Conv1d(4, 4, 3, padding=1), usual),
        (nn.Conv1d(4, 4, 3, groups=4), usual), (nn.Conv1d(4, 4, 3, 2, 1, groups=4), usual),
        (nn.Conv1d(4, 4, 3, padding=1, groups=4, padding_mode="reflect"), usual),
        (nn.Conv1d(4, 4, 3, padding=1, groups=4), nn.BatchNorm1d(4, track_running_stats=False)),
    ):  # fmt: skip
        with pytest.raises(lottery.LotteryError, match=r"fused_parts: depthwise must be an nn\.Conv1d of a group a"):
            fused.fused(2, conv, norm)
    _, convolution = fused.fused(
        2, nn.Conv1d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm1d(4, affine=False)
    )
    assert convolution.bias.tolist() == [0.0] * 4


# ---------------------------------------------------------------------------- in a network


def network() -> tuple[nn.Module, lottery.Masks, tuple[torch.Tensor, torch.Tensor]]:
    """A small Conformer under masks of a tenth, and a batch of three utterances."""
    torch.manual_seed(1)
    model = models.ConformerCtc(len(TOKENS), channels=4, width=64, heads=4, blocks=2, kernel=7, dropout=0.1)
    for block in model.blocks:
        block.batch_norm.running_mean.normal_()
        block.batch_norm.running_var.uniform_(0.1, 2)
    masks = {name: torch.rand_like(weight) < 0.1 for name, weight in lottery.prunable(model).items()}
    lottery.ops.hold_ticket_(list(lottery.prunable(model).values()), [], list(masks.values()))
    return model.eval().requires_grad_(False), masks, (drawn(3, 161, 80), torch.tensor([161, 90, 5]))


def close(model, wanted, batch, **tolerance):
    found, lengths = model(*batch)
    for b, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[b, :length].float(), wanted[b, :length], **tolerance)


@pytest.mark.parametrize("chosen", [None, {}])
def test_a_compressed_conformer_says_the_same(chosen):
    """Sparse and all dense: alone, in a batch, copied, pickled, in halves, and exported."""
    model, masks, batch = network()
    wanted = model(*batch)[0]
    compressed, _ = compression.compress(model, masks, lambda m: m.transcribe(*batch), chosen=chosen)
    assert all(isinstance(block.fused, fused.GatedConvolution) for block in compressed.blocks)
    assert all(block.fused is None and block.attention.fused is None for block in model.blocks)  # the user's own
    tolerance = dict(atol=1e-4, rtol=1e-4)
    close(compressed, wanted, batch, **tolerance)
    assert compressed.transcribe(*batch) == model.transcribe(*batch)
    for b, length in enumerate(batch[1].tolist()):
        alone = batch[0][b : b + 1, :length], batch[1][b : b + 1]
        close(compressed, model(*alone)[0], alone, **tolerance)
    close(copy.deepcopy(compressed), wanted, batch, **tolerance)
    close(pickle.loads(pickle.dumps(compressed)), wanted, batch, **tolerance)
    kept = io.BytesIO()
    torch.save(compressed, kept)
    kept.seek(0)
    close(torch.load(kept, weights_only=False), wanted, batch, **tolerance)
    half = copy.deepcopy(compressed).bfloat16()
    assert half.blocks[0].fused.weight.dtype == torch.float32
    close(half, wanted, (batch[0].bfloat16(), batch[1]), atol=0.3, rtol=0.1)
    if chosen == {}:
        close(compression.compress(compressed, masks, chosen={})[0], wanted, batch, **tolerance)  # twice


def test_a_compressed_conformer_is_exported_by_its_own_layers(tmp_path):
    model, masks, batch = network()
    compressed, _ = compression.compress(model, masks, chosen={})
    program = torch.export.export(compressed, (batch[0][:1], batch[1][:1]))
    torch.testing.assert_close(program.module()(batch[0][:1], batch[1][:1])[0], model(batch[0][:1], batch[1][:1])[0])
    assert "gated_convolution" not in str(program.graph)
    sparse, _ = compression.compress(model, masks, lambda m: m.transcribe(*batch), layout="unstructured")
    program = torch.export.export(sparse, (batch[0][:1], batch[1][:1]))
    close(program.module(), model(batch[0][:1], batch[1][:1])[0], (batch[0][:1], batch[1][:1]), atol=1e-4, rtol=1e-4)
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    export.export(compressed, TOKENS, tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    (found,) = session.run(None, {"features": batch[0][:1].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(batch[0][:1], batch[1][:1])[0], atol=1e-4, rtol=0)


class Alike(nn.Module):
    """A user's own block, of layers of the same names."""

    def __init__(self):
        super().__init__()
        self.pointwise1, self.depthwise = nn.Conv1d(8, 16, 1), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.batch_norm, self.pointwise2 = nn.BatchNorm1d(8), nn.Conv1d(8, 8, 1)

    def forward(self, x):
        return self.pointwise2(F.relu(self.batch_norm(self.depthwise(F.glu(self.pointwise1(x), 1)))))


def test_what_does_not_ask_is_left_alone():
    model = nn.Sequential(Alike()).eval()
    masks = {name: torch.rand_like(weight) < 0.5 for name, weight in lottery.prunable(model).items()}
    compressed, _ = compression.compress(model, masks, lambda m: m(drawn(1, 8, 9)))
    assert not any(isinstance(m, (fused.GatedConvolution, fused.RotaryAttention)) for m in compressed.modules())
    model, masks, batch = network()
    heard = []
    model.blocks[1].batch_norm.register_forward_hook(lambda *_: heard.append(1))
    compressed, _ = compression.compress(model, masks, chosen={})
    assert compressed.blocks[0].fused is not None and compressed.blocks[1].fused is None
    heard.clear()
    compressed(*batch)
    assert heard == [1]
