"""The compiled transducer loss: beside every alignment, Graves's recursion in float64, and torchaudio."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_ops import DEVICES

import lottery
import models
from bench.measure import peak_memory

if not lottery.ops.compiled:
    pytest.skip(f"the extension is not built: {lottery.ops.path}", allow_module_level=True)

compiled = torch.ops.audio_lottery.transducer_loss
ROOT = Path(__file__).resolve().parents[1]
NAMES = ("loss", "encoder_out", "predictor_out", "weight", "bias")
# joiner, tokens, frames and labels of each utterance: around every vector, line (16) and tile (64) of the loops
CASES = [
    (1, 2, [1], [0]),
    (5, 3, [1], [4]),
    (7, 4, [6], [0]),
    (16, 17, [3, 1, 2], [2, 3, 0]),
    (17, 33, [8, 5, 7], [7, 7, 1]),
    (33, 16, [13, 1, 4], [4, 0, 4]),
    (130, 49, [9, 16], [6, 3]),
    (24, 30, [60, 2, 1], [30, 1, 0]),  # one much longer than the others
    (3, 5, [2] * 21, [1, 0, 2] * 7),  # more utterances than sums
]


def batch(joiner, tokens, lengths, target_lengths, scale=1.0, device="cpu", seed=0):
    """The operator's arguments; padding has two more frames than the longest, and is NaN and no token."""
    g = torch.Generator().manual_seed(seed)
    size, frames, labels = len(lengths), max(lengths) + 2, max(target_lengths)
    ahead = torch.randn(size, frames, joiner, generator=g)
    predicted = torch.randn(size, labels + 1, joiner, generator=g)
    weight, bias = scale * torch.randn(tokens, joiner, generator=g), torch.randn(tokens, generator=g)
    targets = torch.randint(1, tokens, (size, labels), generator=g)
    for b, (t, u) in enumerate(zip(lengths, target_lengths)):
        ahead[b, t:], predicted[b, u + 1 :], targets[b, u:] = torch.nan, torch.nan, -1
    return *(x.to(device) for x in (ahead, predicted, weight, bias, targets)), lengths, target_lengths


def log_probs_of(arguments, b):
    """(T, U + 1, V) and the labels of an utterance."""
    ahead, predicted, weight, bias, targets, lengths, target_lengths = arguments
    t, u = lengths[b], target_lengths[b]
    logits = F.linear(torch.tanh(ahead[b, :t, None] + predicted[b, None, : u + 1]), weight, bias)
    return logits.log_softmax(-1), targets[b, :u].tolist()


def by_alignments(*arguments):
    """An alignment is an order of a blank a frame and the labels, the last of them a blank."""
    total = 0
    for b in range(len(arguments[0])):
        table, said = log_probs_of(arguments, b)
        ways = []
        for places in itertools.combinations(range(len(table) + len(said) - 1), len(said)):
            t = u = way = 0
            for step in range(len(table) + len(said)):
                way = way + table[t, u, said[u] if step in places else 0]
                t, u = (t, u + 1) if step in places else (t + 1, u)
            ways.append(way)
        total = total - torch.stack(ways).logsumexp(0)
    return total


def by_recursion(*arguments):
    """Graves 2012, eq. 16, a cell at a time."""
    total = 0
    for b in range(len(arguments[0])):
        table, said = log_probs_of(arguments, b)
        alpha = {}
        for t, u in itertools.product(range(len(table)), range(len(said) + 1)):
            ways = [alpha[t - 1, u] + table[t - 1, u, 0]] if t else []
            ways += [alpha[t, u - 1] + table[t, u - 1, said[u - 1]]] if u else []
            alpha[t, u] = torch.stack(ways).logsumexp(0) if ways else table.new_zeros(())
        total = total - alpha[t, u] - table[t, u, 0]
    return total


def by_torchaudio(ahead, predicted, weight, bias, targets, lengths, target_lengths):
    return models.reference_transducer_loss(
        ahead, predicted, lambda x: F.linear(x, weight, bias), targets, lengths, target_lengths
    )


def with_gradients(function, arguments, dtype):
    """A loss and its gradients by autograd, as the operator returns them."""
    tensors = [x.detach().to("cpu", dtype).requires_grad_() for x in arguments[:4]]
    loss = function(*tensors, arguments[4].cpu(), *arguments[5:])
    return loss.detach(), *torch.autograd.grad(loss, tensors)


def assert_near(got, want, share):
    """Up to this share of the largest number of each tensor."""
    for name, ours, theirs in zip(NAMES, got, want, strict=True):
        far = (ours.cpu().double() - theirs.double()).abs().max() if theirs.numel() else 0
        assert far <= share * theirs.abs().max(), f"{name}: {far} of {theirs.abs().max()}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_recursion_in_float64(case, scale, device):
    arguments = batch(*case, scale, device)
    got = compiled(*arguments)
    assert [x.dtype for x in got] == [torch.float32] * 5
    assert [x.shape for x in got[1:]] == [x.shape for x in arguments[:4]]
    assert_near(got, with_gradients(by_recursion, arguments, torch.float64), 5e-6)


@pytest.mark.parametrize("case", [case for case in CASES if max(case[2]) <= 7])
def test_equals_all_alignments(case):
    arguments = batch(*case)
    assert_near(compiled(*arguments), with_gradients(by_alignments, arguments, torch.float64), 5e-6)


@pytest.mark.parametrize("case", CASES)
def test_equals_torchaudio(case):
    """To 1e-5; in long lattices to 1e-4, as far as torchaudio's float32 is from float64 there."""
    arguments = batch(*case, scale=0.3)
    share = 1e-5 if max(case[2]) < 10 else 1e-4
    assert_near(compiled(*arguments), with_gradients(by_torchaudio, arguments, torch.float32), share)


def test_by_hand():
    """A frame, a label, three tokens as likely each: label and blank, 1/9."""
    arguments = torch.zeros(1, 1, 2), torch.zeros(1, 2, 2), torch.zeros(3, 2), torch.zeros(3), torch.tensor([[2]])
    loss, *_, d_bias = compiled(*arguments, [1], [1])
    assert float(loss) == pytest.approx(2.1972246)  # log(9)
    assert d_bias.tolist() == pytest.approx([2 / 3 - 1, 2 / 3, 2 / 3 - 1])


@pytest.mark.parametrize("device", DEVICES)
def test_padding_takes_no_part(device):
    arguments = batch(9, 6, [4, 2], [1, 3], device=device)
    got = compiled(*arguments)
    other = [x.clone() for x in arguments[:5]]
    for b, (t, u) in enumerate(zip(*arguments[5:])):
        other[0][b, t:], other[1][b, u + 1 :], other[4][b, u:] = 7.0, torch.inf, 10**9
        assert (got[1][b, t:] == 0).all() and (got[2][b, u + 1 :] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(got, compiled(*other, *arguments[5:])))


def test_same_bits_with_any_number_of_threads():
    arguments, before = batch(40, 30, [20, 7, 1, 9] * 5, [5, 9, 2, 0] * 5), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 1, 2, 5):
            torch.set_num_threads(threads)
            found.append(compiled(*arguments))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(found[0], again))


def check_with(capability, program):
    """Run the program, which finds the tests' modules, by these instructions: torch and its operators take what this
    variable says, once, so in a process of its own."""
    if capability.upper() == torch.backends.cpu.get_cpu_capability():
        pytest.skip("all other tests are of these")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_other_instructions(capability):
    program = """
import torch, test_transducer_loss as here
for case in here.CASES[:7]:
    arguments = here.batch(*case)
    here.assert_near(here.compiled(*arguments), here.with_gradients(here.by_recursion, arguments, torch.float64), 5e-6)
"""
    check_with(capability, program)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_seen(value, index, device):
    arguments = batch(20, 30, [9, 4], [3, 2], device=device)
    arguments[index].view(-1)[0] = value
    loss, *gradients = compiled(*arguments)
    if index < 2 and value == float("inf"):  # tanh takes it
        assert loss.isfinite() and all(x.isfinite().all() for x in gradients)
    else:
        assert loss.isnan() and all(x.isnan().any() for x in gradients)


def test_impossible_alignments():
    """A blank that no cell can take, and then a label: no text is possible."""
    for token in range(2):
        arguments = batch(4, 2, [3], [2])
        arguments[3][token] = -torch.inf
        assert compiled(*arguments)[0] == torch.inf


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    tensors = torch.ones(0, 5, 4), torch.ones(0, 3, 4), torch.ones(6, 4), torch.ones(6), torch.ones(0, 2).long()
    loss, *gradients = compiled(*(x.to(device) for x in tensors), [], [])
    assert loss == 0 and [x.shape for x in gradients] == [x.shape for x in tensors[:4]]
    assert all((x == 0).all() for x in gradients)


def test_not_contiguous():
    arguments = batch(6, 5, [4, 3], [2, 1])
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments[:3]]
    got = compiled(*turned, arguments[3].expand(2, -1).t()[:, 0], arguments[4].t().contiguous().t(), *arguments[5:])
    assert all(torch.equal(a, b) for a, b in zip(got, compiled(*arguments)))


REFUSED = [
    ({0: torch.ones(2, 4)}, ValueError, r"encoder_out must be \(batch, frames, joiner\), got \[2, 4\]"),
    ({0: torch.ones(2, 4, 6).double()}, TypeError, "encoder_out must be Float, got Double"),
    ({1: torch.ones(2, 4, 6)}, ValueError, r"predictor_out must have the shape \[2, 3, 6\], got \[2, 4, 6\]"),
    ({2: torch.ones(5, 7)}, ValueError, r"weight must have the shape \[5, 6\], got \[5, 7\]"),
    ({2: torch.ones(0, 6)}, ValueError, r"weight must be \(tokens, joiner\), got \[0, 6\]"),
    ({3: torch.ones(6)}, ValueError, r"bias must have the shape \[5\], got \[6\]"),
    ({4: torch.ones(2, 2).int()}, TypeError, "targets must be Long, got Int"),
    ({4: torch.ones(3, 2).long()}, ValueError, r"targets must have the shape \[2, 2\], got \[3, 2\]"),
    ({5: [4]}, ValueError, "lengths must be one an utterance, got 1 for 2"),
    ({5: [4, 0]}, ValueError, r"lengths\[1\] must be between 1 and 4, got 0"),
    ({6: [3, 0]}, ValueError, r"target_lengths\[0\] must be between 0 and 2, got 3"),
]  # fmt: skip


@pytest.mark.parametrize("device", [*DEVICES, "meta"])
@pytest.mark.parametrize("change, kind, message", REFUSED)
def test_refused(change, kind, message, device):
    tensors = torch.ones(2, 4, 6), torch.ones(2, 3, 6), torch.ones(5, 6), torch.ones(5), torch.ones(2, 2).long()
    arguments = [*tensors, [4, 3], [2, 0]]
    for index, value in change.items():
        arguments[index] = value
    arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
    with pytest.raises(kind, match=message):
        compiled(*arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("target", [5, -1])
def test_a_target_that_is_no_token(target, device):
    arguments = batch(6, 5, [4, 3], [1, 2], device=device)
    arguments[4][1, 1] = target
    with pytest.raises(ValueError, match=rf"targets\[1\]\[1\] must be between 0 and 4, got {target}"):
        compiled(*arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_matrix_of_cells_and_tokens():
    """38,376 cells of 512 tokens in float32 would be 79 MB."""
    arguments = batch(8, 512, [123, 123, 123, 123], [77, 77, 77, 77])
    compiled(*arguments)
    assert peak_memory(lambda: compiled(*arguments)) < 10e6


def test_opcheck():
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(compiled, batch(6, 5, [4, 3], [2, 1]), test_utils=tests)


# ---------------------------------------------------------------------------- in the network


def network():
    torch.manual_seed(0)
    sizes = dict(window=12, channels=8, hidden=12, layers=1, predictor=8, joiner=10, dropout=0.0)
    return models.Transducer(7, **sizes)


def step(model, dtype=torch.float32):
    """A loss, and the gradients of all parameters."""
    torch.manual_seed(1)
    features, lengths = torch.randn(3, 80, 80).to(dtype), torch.tensor([80, 41, 8])
    targets, target_lengths = torch.randint(1, 7, (3, 5)), torch.tensor([5, 0, 2])
    model.zero_grad()
    loss = model.loss(features, lengths, targets, target_lengths)
    (3 * loss).backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def taken(monkeypatch):
    """Which of the two ways the network's loss takes, call by call."""
    ways = []
    reference, forward = models.reference_transducer_loss, models.CompiledLoss.forward
    monkeypatch.setattr(models, "reference_transducer_loss", lambda *x: ways.append("reference") or reference(*x))
    monkeypatch.setattr(models.CompiledLoss, "forward", lambda *x: ways.append("compiled") or forward(*x))
    return ways


def test_a_step_is_the_reference_s(taken, monkeypatch):
    model = network()
    loss, gradients = step(model)
    monkeypatch.setattr(models, "COMPILED_ON", set())
    want, wanted = step(model)
    assert taken == ["compiled", "reference"]
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    for (name, _), ours, theirs in zip(model.named_parameters(), gradients, wanted):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


def test_the_reference_where_it_must_be(taken):
    """In another dtype, and where something looks at what goes through the output layer."""
    step(network().double(), torch.float64)
    model, seen = network(), []
    model.output.register_forward_hook(lambda *call: seen.append(call))
    step(model)
    assert taken == ["reference"] * 2 and len(seen) == 1
    model = network()
    model.output.register_full_backward_hook(lambda *call: seen.append(call))
    step(model)
    model = network()
    model.output = torch.nn.Linear(10, 7, bias=False)
    step(model)
    assert taken == ["reference"] * 4 and len(seen) == 2


def test_one_backward_pass_alone():
    """The gradients are made with the loss: nothing knows how they follow from it. Targets of 32 bits are taken too."""
    ahead, *others = batch(5, 4, [3], [2])
    ahead.requires_grad_()
    (gradient,) = torch.autograd.grad(models.CompiledLoss.apply(ahead, *others).square(), ahead, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    model, targets = network(), torch.tensor([[1, 2, 3]])
    losses = [
        model.loss(torch.ones(1, 40, 80), torch.tensor([40]), t, torch.tensor([3])) for t in (targets, targets.int())
    ]
    assert losses[0] == losses[1]
