"""Parts of a Conformer's block in one pass each, in place of several layers: what compress gives a block that asks.

A block opts in by two methods; compress, which knows no more of it, calls
`block.use_fused(*fused(**block.fused_parts()))`.

fused_parts(): heads, depthwise and norm, as the arguments of fused() below.
use_fused(attention, convolution): takes the two, as submodules, and calls them in evaluation mode without gradients,
where padding is behind each utterance's end, but for an export, a trace or torch.compile: their graphs are of its own
layers. Both None: its own always.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lottery
from audio_lottery.layers import FLOAT32, Fixed
from audio_lottery.sparse import check_devices


def reference_gated_convolution(x: Tensor, weight: Tensor, bias: Tensor, lengths: Tensor | None) -> Tensor:
    """GLU of x (B, 2 C, T), depthwise convolution by weight (C, K) and bias (C,), K odd, and SiLU -> (B, C, T).

    lengths: (B,) int64 or None. What stands behind an end counts as zeros, and is zeros in what comes.
    """
    check_devices("x", x, weight=weight, bias=bias, lengths=lengths)
    time, kernel = x.shape[2], weight.shape[1]
    lengths = x.new_full((len(x),), time) if lengths is None else lengths
    valid = (torch.arange(time, device=x.device) < lengths[:, None])[:, None]  # (B, 1, T)
    padded = F.pad(F.glu(x, 1).where(valid, 0.0), (kernel // 2, kernel // 2))
    sums = sum(weight[:, k, None] * padded[:, :, k : k + time] for k in range(kernel)) + bias[:, None]
    return F.silu(sums).where(valid, 0.0)


def reference_rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Tensor | None, heads: int) -> Tensor:
    """Attention of qkv (B, T, 3 * heads * d), queries and keys turned by rotary positions -> (B, T, heads * d).

    cos, sin: (T, d / 2), of the angle of each pair (i, d / 2 + i).  lengths: (B,) int64 or None. What stands behind an
    end is no key, and is zeros in what comes.
    """
    check_devices("qkv", qkv, cos=cos, sin=sin, lengths=lengths)
    lengths = qkv.new_full((len(qkv),), qkv.shape[1]) if lengths is None else lengths
    valid = torch.arange(qkv.shape[1], device=qkv.device) < lengths[:, None]  # (B, T)
    qkv, mask = qkv.where(valid[:, :, None], 0.0), None if valid.all() else valid[:, None, None]  # none is faster
    q, k, v = qkv.unflatten(2, (3, heads, qkv.shape[2] // (3 * heads))).permute(2, 0, 3, 1, 4)  # (B, heads, T, d) each
    pairs = (x.chunk(2, -1) for x in (q, k))
    turned = [torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(v.dtype) for a, b in pairs]
    y = F.scaled_dot_product_attention(*turned, v, mask).transpose(1, 2).flatten(2)
    return y.where(valid[:, :, None], 0.0)


if not lottery.ops.compiled:
    gated_convolution, rotary_attention = reference_gated_convolution, reference_rotary_attention
else:
    gated_convolution = torch.ops.audio_lottery.gated_convolution
    rotary_attention = torch.ops.audio_lottery.rotary_attention

    @torch.library.register_fake("audio_lottery::gated_convolution")
    def fake_gated_convolution(x, weight, bias, lengths):
        check_devices("x", x, weight=weight, bias=bias, lengths=lengths)
        return x.new_empty(len(x), x.shape[2], len(weight)).transpose(1, 2)  # frame by frame

    @torch.library.register_fake("audio_lottery::rotary_attention")
    def fake_rotary_attention(qkv, cos, sin, lengths, heads):
        check_devices("qkv", qkv, cos=cos, sin=sin, lengths=lengths)
        return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


def fused(heads: int, depthwise: nn.Conv1d, norm: nn.BatchNorm1d) -> "tuple[RotaryAttention, GatedConvolution]":
    """What a block's use_fused takes.

    heads: of its attention, which turns queries and keys by rotary positions.  depthwise: between a GLU over channels
    and `norm`, which SiLU follows.  Raises LotteryError for layers of another form.
    """
    fits = isinstance(depthwise, nn.Conv1d) and isinstance(norm, nn.modules.batchnorm._BatchNorm)
    if fits:
        channels, (kernel,) = depthwise.out_channels, depthwise.kernel_size
        form = depthwise.groups, depthwise.stride, depthwise.dilation, depthwise.padding, depthwise.padding_mode
        fits = kernel % 2 and form == (channels, (1,), (1,), (kernel // 2,), "zeros") and norm.running_mean is not None
    if not fits:
        raise lottery.LotteryError(
            "fused_parts: depthwise must be an nn.Conv1d of a group a channel, with an odd kernel, as many frames out "
            f"as in, and norm one that keeps statistics, got {depthwise} and {norm}"
        )
    return RotaryAttention(heads), GatedConvolution(depthwise, norm)


KEPT: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of a few lengths


def turns(frames: int, half: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary positions, (frames, half) each."""
    found = KEPT.get((frames, half)) if type(frames) is int else None
    if found is not None:
        return found
    with torch.inference_mode(False):  # else they could be used in that mode alone, ever after
        numbers = {"dtype": torch.float32, "device": "cpu"}  # they are kept: whatever device is the default now
        rates = 10_000.0 ** (-torch.arange(half, **numbers) / half)
        angle = torch.outer(torch.arange(frames, **numbers), rates)
        found = angle.cos(), angle.sin()
    if type(frames) is int and type(angle) is Tensor:  # not what stands in for one while a graph is traced
        if len(KEPT) >= 8:
            KEPT.clear()  # at once, whatever other threads do
        KEPT[frames, half] = found
    return found


class RotaryAttention(nn.Module):
    """What stands between the projections of self-attention with rotary positions."""

    def __init__(self, heads: int):
        super().__init__()
        self.heads = heads

    def forward(self, qkv: Tensor, valid: Tensor) -> Tensor:
        """qkv (B, T, 3 * width), valid (B, T) bool, True before each end -> (B, T, width)."""
        cos, sin = (table.to(qkv.device) for table in turns(qkv.shape[1], qkv.shape[2] // (6 * self.heads)))
        if qkv.device.type != "cpu":
            return reference_rotary_attention(qkv, cos, sin, valid.sum(1), self.heads)
        return rotary_attention(qkv.to(FLOAT32), cos, sin, valid.sum(1), self.heads).to(qkv.dtype)


class GatedConvolution(Fixed):
    """GLU, the depthwise convolution with its norm in its weights, and SiLU. It keeps its own copy of the weights."""

    def __init__(self, depthwise: nn.Conv1d, norm: nn.BatchNorm1d):
        super().__init__()
        scale = (norm.running_var.double() + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.double())
        bias = -norm.running_mean.double() if depthwise.bias is None else depthwise.bias - norm.running_mean.double()
        shift = 0.0 if norm.bias is None else norm.bias.double()
        self.register_buffer("weight", (depthwise.weight[:, 0] * scale[:, None]).detach().float())  # (C, K)
        self.register_buffer("bias", (bias * scale + shift).detach().float())

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """x (B, 2 C, T), valid (B, T) bool, True before each end -> (B, C, T)."""
        on_cpu = x.device.type == "cpu"
        product = gated_convolution if on_cpu else reference_gated_convolution
        return product(x.to(FLOAT32), self.weight, self.bias, valid.sum(1)).to(x.dtype)
