"""Padding, neighbours, published sizes, and the losses against slow oracles: a recursion, and all paths one by one."""

import itertools

import pytest
import torch
from test_networks import SMALL
from torch import nn

import lottery
import models
from runner import flags, recipes

BACKBONES = list(models.BACKBONES)


def small(backbone, tokens=7):
    torch.manual_seed(0)
    model = models.build(backbone, "demo", tokens)
    for module in model.modules():  # batch norm as after training: statistics that are not 0 and 1
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def arguments(backbone, features, lengths, targets):
    return (features, lengths, targets) if backbone == "rnnt" else (features, lengths)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_output_does_not_depend_on_padding_or_neighbours(backbone):
    model = small(backbone)
    lengths = torch.tensor([93, 41, 1, 64])
    features, targets = torch.randn(4, 120, 80), torch.randint(1, 7, (4, 5))
    features[:, 93:] = 1e3  # what stands behind an end must not matter
    with torch.no_grad():
        batch, out_lengths = model(*arguments(backbone, features, lengths, targets))
        for b, length in enumerate(lengths.tolist()):
            alone = features[b : b + 1, :length]
            single, single_length = model(*arguments(backbone, alone, lengths[b : b + 1], targets[b : b + 1]))
            assert single_length.item() == out_lengths[b].item() == single.shape[1]
            torch.testing.assert_close(batch[b, : single.shape[1]], single[0], atol=1e-5, rtol=0)
        if backbone != "rnnt":
            assert torch.equal(out_lengths, model.output_lengths(lengths))
        texts = model.transcribe(features, lengths)
        assert texts == [
            model.transcribe(features[b : b + 1, :n], lengths[b : b + 1])[0] for b, n in enumerate(lengths)
        ]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_compiled_model_knows_padding_too(backbone):
    """torch.compile says that it exports; an export of one utterance takes it to have no padding."""
    model, features = small(backbone), torch.randn(3, 93, 80)
    part = model.encode if backbone == "rnnt" else model.forward
    for lengths in ([93, 41, 64], [41]):  # a batch, and one with padding behind it
        given = features[: len(lengths)], torch.tensor(lengths)
        with torch.no_grad():
            (want, ends), (got, _) = part(*given), torch.compile(part, backend="eager")(*given)
        for b, end in enumerate(ends):
            torch.testing.assert_close(got[b, :end], want[b, :end], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_batch_is_learnt(backbone):
    torch.manual_seed(1)
    model = models.build(backbone, "demo", 5)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    features, lengths = torch.randn(2, 80, 80), torch.tensor([80, 64])
    targets, target_lengths = torch.tensor([[1, 2, 2, 3], [4, 1, 0, 0]]), torch.tensor([4, 2])
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(features, lengths, targets, target_lengths).backward()
        optimizer.step()
    for p in model.parameters():
        assert p.grad is not None and p.grad.isfinite().all()
    model.eval()
    with torch.no_grad():
        assert model.transcribe(features, lengths) == [[1, 2, 2, 3], [4, 1]]


def test_bilstm_equals_packed():
    torch.manual_seed(0)
    ours, theirs = models.BiLstm(6, 5), nn.LSTM(6, 5, batch_first=True, bidirectional=True)
    with torch.no_grad():
        for name, p in ours.ahead.named_parameters():
            getattr(theirs, name).copy_(p)
        for name, p in ours.back.named_parameters():
            getattr(theirs, name + "_reverse").copy_(p)
    x, lengths = torch.randn(3, 9, 6), torch.tensor([9, 4, 1])
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
    want, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=True)
    got = ours(x, lengths, models.valid_rows(lengths, 9))
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(got[b, :n], want[b, :n, :5] + want[b, :n, 5:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backbone", models.BACKBONES)
def test_what_is_left_out_without_padding_changes_no_bit(backbone, monkeypatch):
    torch.manual_seed(0)
    model = models.build(backbone, "demo", 28)
    batch = torch.randn(2, 90, 80), torch.tensor([90, 60])
    model.loss(*batch, torch.randint(1, 28, (2, 3)), torch.tensor([3, 3]))  # for statistics of batch norm
    model.eval()
    run = model.encode if backbone == "rnnt" else model
    with torch.inference_mode():
        for features, lengths in (batch, (batch[0], torch.tensor([90, 90])), (batch[0][:1], batch[1][:1])):
            found = run(features, lengths)[0]
            with monkeypatch.context() as patched:
                patched.setattr(models, "unpadded", lambda x, rows: False)
                assert torch.equal(found, run(features, lengths)[0])


def test_batch_norm_sees_valid_rows_only():
    norm, x = nn.BatchNorm1d(3), torch.randn(2, 5, 3)
    lengths = torch.tensor([5, 2])
    out = models.on_rows(norm, x, models.valid_rows(lengths, 5))
    want = nn.BatchNorm1d(3)(torch.cat((x[0], x[1, :2])))
    torch.testing.assert_close(torch.cat((out[0], out[1, :2])), want)
    assert (out[1, 2:] == 0).all()


def test_paper_sizes():
    with torch.device("meta"):
        cnn_lstm = models.build("cnn-lstm", "paper", 29)
        rnnt, conformer = models.build("rnnt", "paper", 29), models.build("conformer", "paper", 29)
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(cnn_lstm) == 86_618_400
    assert sum(w.numel() for w in lottery.prunable(cnn_lstm).values()) == 86_526_048
    assert count(rnnt) == pytest.approx(132.23e6, rel=0.01) and len(rnnt.encoder) == 5
    assert count(conformer) == pytest.approx(65.84e6, rel=0.02)
    for backbone in BACKBONES:
        assert 1e6 <= count(models.build(backbone, "demo", 29)) <= 2e6


@pytest.mark.parametrize(
    "backbone, size, factor, prunable",
    [
        ("cnn-lstm", "wide", 2, 5_602_400),
        ("cnn-lstm", "wider", 3, 12_591_504),
        ("rnnt", "wide", 2, 5_043_968),
        ("rnnt", "wider", 3, 11_055_744),
        ("conformer", "wide", 2, 6_225_440),
        ("conformer", "wider", 3, 13_989_936),
    ],
)
def test_wide_sizes_are_the_demo_with_that_many_times_its_widths(backbone, size, factor, prunable):
    assert sum(w.numel() for w in lottery.prunable(models.build(backbone, size, 29)).values()) == prunable
    demo, wide = (models.BACKBONES[backbone].SIZES[size] for size in ("demo", size))
    widths = {"channels", "hidden", "predictor", "joiner", "width", "heads"}
    assert wide == {key: factor * value if key in widths else value for key, value in demo.items()}
    assert flags.parse(["--backbone", backbone, "--size", size]).recipe == recipes.RECIPES[backbone, "demo"]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_paper_size_runs(backbone):
    torch.manual_seed(0)
    model = models.build(backbone, "paper", 29)
    features, lengths = torch.randn(2, 60, 161 if model.features == "log1p-stft" else 80), torch.tensor([60, 40])
    loss = model.loss(features, lengths, torch.tensor([[3, 4], [5, 0]]), torch.tensor([2, 1]))
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        assert len(model.eval().transcribe(features, lengths)) == 2


def test_transducer_loss_equals_a_slow_oracle():
    """Sum over all alignments by the forward recursion of Graves 2012, eq. 16, in double, one cell at a time."""
    model = small("rnnt", tokens=4)
    model.ctc_weight = 0.0
    features, lengths = torch.randn(2, 40, 80), torch.tensor([40, 23])
    targets, target_lengths = torch.tensor([[1, 3, 3], [2, 0, 0]]), torch.tensor([3, 1])
    with torch.no_grad():
        logits, out_lengths = model(features, lengths, targets)
        log_probs = logits.double().log_softmax(-1)
        total = 0.0
        for b in range(2):
            t_end, u_end = int(out_lengths[b]), int(target_lengths[b])
            alpha = {(0, 0): torch.zeros((), dtype=torch.double)}
            for t in range(t_end):
                for u in range(u_end + 1):
                    ways = []
                    if t:
                        ways.append(alpha[t - 1, u] + log_probs[b, t - 1, u, 0])
                    if u:
                        ways.append(alpha[t, u - 1] + log_probs[b, t, u - 1, targets[b, u - 1]])
                    if ways:
                        alpha[t, u] = torch.stack(ways).logsumexp(0)
            total -= alpha[t_end - 1, u_end] + log_probs[b, t_end - 1, u_end, 0]
        loss = model.loss(features, lengths, targets, target_lengths)
    torch.testing.assert_close(loss.double(), total / 2, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backbone, loss", [("cnn-lstm", 6.25089409), ("conformer", 6.56900401), ("rnnt", 15.24744789)])
def test_networks_compute_what_they_did(backbone, loss):
    """Losses of tiny networks of known weights: no residual, clamp or stride has changed."""
    model = models.BACKBONES[backbone](4, **SMALL[backbone]).eval().double()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(0.5 * torch.sin(torch.arange(p.numel()) * 0.7 + i).view(p.shape))
        features = 100 * torch.sin(torch.arange(2 * 40 * 80) * 0.37).view(2, 40, 80).double()
        targets = torch.tensor([[1, 3, 2], [2, 0, 0]]), torch.tensor([3, 1])
        assert model.loss(features, torch.tensor([40, 23]), *targets).item() == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("backbone", ["cnn-lstm", "conformer"])
def test_ctc_loss_equals_all_paths(backbone):
    """A path is a token a frame; it says a text if that is what is left without repeats and without blanks (0)."""
    model = small(backbone, tokens=3)
    features, lengths = torch.randn(2, 20, 80), torch.tensor([20, 13])
    targets, target_lengths = torch.tensor([[1, 1, 2], [2, 0, 0]]), torch.tensor([3, 1])
    with torch.no_grad():
        log_probs, out_lengths = model(features, lengths)
        total = 0.0
        for b, said in enumerate([[1, 1, 2], [2]]):
            table = log_probs[b, : int(out_lengths[b])].double().tolist()
            ways = [
                sum(frame[token] for frame, token in zip(table, path))
                for path in itertools.product(range(3), repeat=len(table))
                if [token for token, _ in itertools.groupby(path) if token] == said
            ]
            assert len(ways) > 1
            total -= torch.tensor(ways, dtype=torch.double).logsumexp(0)
        loss = model.loss(features, lengths, targets, target_lengths)
    torch.testing.assert_close(loss.double(), total / 2, rtol=1e-5, atol=1e-5)


def test_transducer_caps_symbols_per_frame():
    model = small("rnnt")
    with torch.no_grad():
        model.output.weight.zero_()
        model.output.bias.copy_(torch.tensor([0.0, 0, 0, 1, 0, 0, 0]))  # never the blank
        out = model.transcribe(torch.randn(1, 24, 80), torch.tensor([24]))
    assert out == [[3] * (3 * model.MAX_SYMBOLS)]  # 24 features, 6 encoder frames, 3 joiner frames
