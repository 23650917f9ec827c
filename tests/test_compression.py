"""What takes a layer's place is called, read, cast, copied and sent away as the layer was."""

import copy
import functools
import pickle
import re
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import lottery
import models
from audio_lottery import compress, compression, layers, sparse

LAYOUTS = list(sparse.LAYOUTS)


@pytest.fixture
def always(monkeypatch):
    """Has compress take the form of this name; without one, the sparsest."""

    def choose(first="unstructured"):
        names = ["dense", "nn.LSTM", "dense prepacked", "windows", *LAYOUTS, "ours", first]
        order = {name: -i for i, name in enumerate(names)}
        monkeypatch.setattr(
            compression, "time_calls", lambda candidates, *_: {name: order[name] for name in candidates}
        )

    choose()
    return choose


def pruned(model, remaining=0.3):
    """The model in evaluation mode under random masks, and the masks."""
    generator, masks = torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        for name, weight in lottery.prunable(model.eval()).items():
            masks[name] = torch.rand(weight.shape, generator=generator) < remaining
            weight.masked_fill_(~masks[name], 0)
    return model, masks


def close(got, want, tolerance=1e-5):
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------- what is read of a layer

LAYERS = [
    (nn.Linear(6, 9), (4, 6), "in_features out_features"),
    (nn.Linear(6, 9, bias=False), (4, 6), "in_features out_features"),
    (
        nn.Conv1d(4, 6, 3, 2, 1),
        (2, 4, 11),
        "in_channels out_channels kernel_size stride padding dilation groups padding_mode transposed",
    ),
    (nn.Conv2d(2, 5, (3, 2), dilation=2), (2, 2, 9, 8), "kernel_size stride padding dilation groups output_padding"),
    (
        nn.LSTM(5, 7, 2, bidirectional=True, batch_first=True),
        (3, 4, 5),
        "mode input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size",
    ),
    (nn.LSTM(5, 7, bias=False), (3, 4, 5), "hidden_size num_layers bias batch_first"),
]


@torch.no_grad()
@pytest.mark.parametrize("form", ["unstructured", "windows", "dense prepacked"])
@pytest.mark.parametrize("layer, size, attributes", LAYERS)
def test_attributes_and_weights(layer, size, attributes, form, always):
    always(form)
    layer.marked = "by a user"
    model, masks = pruned(nn.Sequential(layer))
    x = torch.randn(size)
    compressed, rows = compress(model, masks, lambda m: m(x), layout="unstructured")
    ours = compressed[0]
    assert type(ours) is not type(layer) or (form == "dense prepacked" and isinstance(layer, nn.modules.conv._ConvNd))
    assert not ours.training and len(rows) == len(masks)
    for name in (*attributes.split(), "marked"):
        assert getattr(ours, name) == getattr(layer, name), name
    for name, parameter in layer.named_parameters():
        got = getattr(ours, name)
        assert got.dtype == parameter.dtype and got.shape == parameter.shape
        if "bias" not in name:
            assert torch.equal(got, parameter), name
    if not isinstance(layer, nn.LSTM):
        assert ours.bias is None if layer.bias is None else torch.equal(ours.bias, layer.bias)
    elif layer.bias:  # their sum is what counts
        assert torch.equal(ours.bias_ih_l1_reverse, layer.bias_ih_l1_reverse + layer.bias_hh_l1_reverse)
        assert torch.equal(ours.bias_hh_l1, torch.zeros(28))
    if isinstance(layer, nn.LSTM):
        assert ours.flatten_parameters() is None
        for wrong in (
            "weight_ih_l2",
            "weight_hr_l0",
            "weight_ih_lx",
            "nothing",
            *(() if layer.bias else ["bias_ih_l0"]),
        ):
            with pytest.raises(AttributeError, match=wrong):
                getattr(ours, wrong)
    got, want = compressed(input=x), model(x)
    close(got, want)


# ---------------------------------------------------------------------------- inputs of every kind


def lstm_inputs(batch_first):
    """By name: the positional arguments of an LSTM of 5 -> 7, two layers in two directions."""
    x, state = torch.randn(3, 4, 5), tuple(torch.randn(2, 4, 3 if batch_first else 4, 7))
    lengths = torch.tensor([2, 4, 1] if batch_first else [3, 1, 3, 2])
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    ordered = pack_padded_sequence(x, lengths.sort(descending=True).values, batch_first)
    alone = tuple(torch.randn(2, 4, 7))
    return {
        "plain": (x,), "state": (x, state), "packed": (packed,), "packed, state": (packed, state),
        "packed in order": (ordered, state), "unbatched": (x[0],), "unbatched, state": (x[0], alone),
    }  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("measured_on", ["plain", "packed, state", "unbatched"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_lstm_takes_what_torchs_takes(batch_first, measured_on, always):
    torch.manual_seed(0)
    model, masks = pruned(nn.Sequential(nn.LSTM(5, 7, 2, bidirectional=True, batch_first=batch_first)))
    inputs = lstm_inputs(batch_first)
    compressed, _ = compress(model, masks, lambda m: m[0](*inputs[measured_on]), layout="4x1")
    ours = compressed[0]
    assert type(ours) is layers.Lstm
    for name, arguments in inputs.items():
        (got, got_state), (want, want_state) = ours(*arguments), model[0](*arguments)
        if "packed" in name:
            assert torch.equal(got.batch_sizes, want.batch_sizes)
            got, want = (pad_packed_sequence(p)[0] for p in (got, want))
        close((got, *got_state), (want, *want_state))
    x, state = inputs["state"]
    close(ours(x, hx=state)[0], model[0](x, hx=state)[0])
    close(ours(input=x, hx=state)[1], model[0](input=x, hx=state)[1])
    with pytest.raises(ValueError, match="input must have 2 or 3 dimensions, got 4"):
        ours(x[None])
    with pytest.raises(ValueError, match=r"h and c must be \[4, \d, 7\], got \[\[2, \d, 7\]"):
        ours(x, tuple(s[:2] for s in state))


@torch.no_grad()
def test_an_lstm_goes_back_from_each_end(always):
    model, masks = pruned(nn.Sequential(nn.LSTM(5, 7, batch_first=True)))
    x, ends = torch.randn(3, 9, 5), torch.tensor([4, 9, 1])
    compressed, _ = compress(model, masks, lambda m: m(x))
    assert compressed[0].takes_ends
    found, (h, c) = compressed[0](x, None, ends)
    halves = compressed[0](x.bfloat16(), None, ends)[0]
    for b, end in enumerate(ends.tolist()):
        wanted, state = model(x[b : b + 1, :end].flip(1))
        close(found[b, :end], wanted[0].flip(0))
        close((h[:, b], c[:, b]), tuple(s[:, 0] for s in state))
        close(halves[b, :end].float(), found[b, :end], 0.05)
    for form in (dict(), dict(num_layers=2, batch_first=True), dict(bidirectional=True, batch_first=True)):
        model, masks = pruned(nn.Sequential(nn.LSTM(5, 7, **form)))
        other = compress(model, masks, lambda m: m(x))[0][0]
        assert not other.takes_ends
        with pytest.raises(ValueError, match="ends are for"):
            other(x, None, ends)
    with pytest.raises(ValueError, match="ends are for"):
        compressed[0](x[0], None, ends[:1])


@torch.no_grad()
@pytest.mark.parametrize("ends", [[20], [20, 20], [20, 7, 1]])
def test_two_directions_that_are_summed_need_no_flip(ends, always, monkeypatch):
    model, masks = pruned(models.BiLstm(6, 8))
    x, lengths = torch.randn(len(ends), 20, 6), torch.tensor(ends)
    valid, given = models.valid_frames(lengths, 20), (x, lengths, models.valid_rows(lengths, 20))
    compressed, _ = compress(model, masks, lambda m: m(*given)[valid])
    wanted = model(*given)[valid]
    monkeypatch.setattr(torch.Tensor, "flip", None)
    monkeypatch.setattr(torch.Tensor, "gather", None)
    close(compressed(*given)[valid], wanted)


@torch.no_grad()
def test_keywords_are_recorded(always):
    class Keyed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.output = nn.LSTM(5, 7, batch_first=True), nn.Linear(7, 3)

        def forward(self, x):
            state = tuple(self.lstm.weight_hh_l0.new_zeros(1, len(x), self.lstm.hidden_size) for _ in range(2))
            self.lstm.flatten_parameters()
            out, _ = self.lstm(input=x, hx=state)
            return self.output(input=out.to(self.output.weight.dtype))

    model, masks = pruned(Keyed())
    x = torch.randn(2, 4, 5)
    compressed, rows = compress(model, masks, lambda m: m(x))
    assert {row.layout for row in rows} == {"unstructured"}
    close(compressed(x), model(x))


@torch.no_grad()
def test_convolutions_without_a_batch(always):
    model, masks = pruned(nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Conv1d(6, 5, 2, 2)))
    image, image_masks = pruned(nn.Sequential(nn.Conv2d(2, 5, 3, 2, 1)))
    for network, own, sizes in ((model, masks, [(4, 20), (3, 4, 20)]), (image, image_masks, [(2, 9, 8), (3, 2, 9, 8)])):
        compressed, rows = compress(network, own, lambda m: m(torch.randn(sizes[0])))  # noqa: B023
        assert {row.layout for row in rows} == {"unstructured"}
        for size in sizes:
            x = torch.randn(size)
            close(compressed(x), network(x))


@torch.no_grad()
@pytest.mark.parametrize("form", ["unstructured", "16x1"])
def test_a_convolution_of_single_frames_takes_them_as_they_stand(form, always):
    always(form)
    model, masks = pruned(nn.Sequential(nn.Conv1d(20, 33, 1)))
    frames, channels = torch.randn(2, 11, 20).transpose(1, 2), torch.randn(2, 20, 11)
    by_frames, _ = compress(model, masks, lambda m: m(frames))
    by_channels, _ = compress(model, masks, lambda m: m(channels))
    assert type(by_frames[0]) is layers.Pointwise and type(by_channels[0]) is layers.Conv
    assert by_frames(frames).transpose(1, 2).is_contiguous()
    assert by_frames(channels).is_contiguous() and by_channels(channels).is_contiguous()  # as torch's
    for x in (frames, channels, frames[0], frames[:, :, ::2]):
        for compressed in (by_frames, pickle.loads(pickle.dumps(by_frames)), by_channels):
            close(compressed(x), model(x))
    assert torch.equal(by_frames[0].weight, model[0].weight) and by_frames[0].kernel_size == (1,)
    half = by_frames.half()
    assert half[0].weight.dtype == half[0].bias.dtype == half(frames.half()).dtype == torch.half
    for wrong in (torch.randn(2, 19, 11), torch.randn(20), torch.randn(1, 2, 20, 11)):
        with pytest.raises(ValueError, match=r"input must be \(\[B,\] 20, T\), got \["):
            by_frames(wrong)


# ---------------------------------------------------------------------------- casts, copies, other processes


class Mixed(nn.Module):
    """Convolution, LSTM, two linear layers, and a norm that is cast in earnest."""

    def __init__(self):
        super().__init__()
        self.conv, self.lstm = nn.Conv1d(4, 6, 3), nn.LSTM(6, 7, 2, batch_first=True)
        self.hidden, self.norm, self.output = nn.Linear(7, 8), nn.LayerNorm(8), nn.Linear(8, 3, bias=False)

    def forward(self, x):
        out, _ = self.lstm(self.conv(x).transpose(1, 2))
        return self.output(self.norm(self.hidden(out)))


@pytest.fixture
def mixed(always):
    """Compressed and dense; one linear layer, and an LSTM's product, as oneDNN likes them, or plainly dense."""
    torch.manual_seed(0)
    model, masks = pruned(Mixed())

    def make(form="unstructured"):
        always(form)
        return compress(model, masks, lambda m: m(torch.randn(2, 4, 9)))[0], model

    return make


@torch.no_grad()
@pytest.mark.parametrize("form", ["unstructured", "windows", "dense prepacked", "dense"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-5), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_casts(dtype, tolerance, form, mixed):
    compressed, model = mixed(form)
    x = torch.randn(2, 4, 9)
    want = model(x)
    assert compressed.to(dtype) is compressed
    for name in ("hidden", "output", "conv"):
        assert getattr(compressed, name).weight.dtype == dtype
    assert compressed.lstm.weight_hh_l1.dtype == dtype and compressed.hidden.bias.dtype == dtype
    if layers.Lstm is type(compressed.lstm):
        own = compressed.lstm.recurrent[0]
        assert (own.values.dtype, own.offsets.dtype) == (torch.float32, torch.int32)
        out, (h, c) = compressed.lstm(torch.randn(2, 3, 6, dtype=dtype))
        assert {out.dtype, h.dtype, c.dtype} == {dtype}
        out, state = compressed.lstm(
            pack_padded_sequence(torch.randn(2, 3, 6, dtype=dtype), torch.tensor([3, 1]), True)
        )
        assert out.data.dtype == state[0].dtype == dtype
    got = compressed(x.to(dtype))
    assert got.dtype == dtype
    close(got.float(), want, tolerance)
    close(compressed.float()(x), want, tolerance)


@torch.no_grad()
@pytest.mark.parametrize("form", ["unstructured", "windows", "dense prepacked"])
def test_copies(form, mixed):
    compressed, model = mixed(form)
    x = torch.randn(2, 4, 9)
    want = compressed(x)
    others = [copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))]
    others.append(pickle.loads(pickle.dumps(copy.deepcopy(compressed).share_memory())))
    others.append(ForkingPickler.loads(ForkingPickler.dumps(compressed)))  # what a queue to another process does
    others.append(copy.copy(compressed))
    for other in others:
        assert torch.equal(other(x), want)
    assert torch.equal(compressed(x), want) and compressed.hidden.training is False
    if form == "unstructured":
        assert compressed.hidden.columns.dtype == others[1].hidden.columns.dtype == torch.uint16
        meta = copy.deepcopy(compressed).to("meta")
        assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}
        assert meta.hidden(torch.empty(5, 7, device="meta")).shape == (5, 8)
        states = compressed.state_dict()
        others[0].load_state_dict(states)
        assert "hidden.values" in states and torch.equal(others[0](x), want)


def answer(queue, model, x):
    with torch.no_grad():
        queue.put(model(x).tolist())


@pytest.mark.slow
def test_another_process(mixed):
    compressed, _ = mixed()
    x = torch.randn(2, 4, 9)
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=answer, args=(queue, compressed, x))
    process.start()
    with torch.no_grad():
        close(torch.tensor(queue.get(timeout=120)), compressed(x))
    process.join()
    assert process.exitcode == 0


# ---------------------------------------------------------------------------- torch's path that reads weights


@torch.no_grad()
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_in_evaluation(activation, always, monkeypatch):
    """nn.TransformerEncoder packs rows of several lengths, and its layers read linear1.weight."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, activation=activation, batch_first=True)
    model, masks = pruned(nn.Sequential(nn.TransformerEncoder(layer, 2, nn.LayerNorm(8))))
    x, padding = torch.randn(3, 5, 8), torch.arange(5) >= torch.tensor([5, 3, 1])[:, None]
    assert model[0].use_nested_tensor and (model[0](x, src_key_padding_mask=padding)[2, 1:] == model[0].norm.bias).all()
    uses = {
        "plain": lambda m: m[0](x), "padded": lambda m: m[0](x, src_key_padding_mask=padding),
        "causal": lambda m: m[0](x, nn.Transformer.generate_square_subsequent_mask(5), is_causal=True),
        "one": lambda m: m[0](x[0]),
    }  # fmt: skip
    called = []  # by products themselves: hooks would keep torch from its own path
    for kind in (layers.Product, layers.DenseProduct):
        monkeypatch.setattr(kind, "product", lambda self, *a, f=kind.product: called.append(1) or f(self, *a))
    for only in (None, "0.layers.0.linear1", "0.layers.1"):
        for run in uses.values():
            for form in ("unstructured", "dense prepacked"):
                always(form)
                kept = [] if only is None else [n for n in ("0.layers.0", "0.layers.1") if not only.startswith(n)]
                compressed, rows = compress(model, masks, run, keep_dense=kept)
                assert sum(
                    type(m) in (layers.Product, layers.DenseProduct) for m in compressed.modules()
                ) == 4 - 2 * len(kept)
                for use in uses.values():
                    close(use(compressed), use(model))
                    called.clear()
                    use(compressed)
                    assert len(called) == 4 - 2 * len(kept)  # so that they are used at all
    flags = [layer.activation_relu_or_gelu for layer in model[0].layers]
    assert flags == [1 if activation == "relu" else 2] * 2  # of the model itself


# ---------------------------------------------------------------------------- what fails stays dense


class Reads(nn.Module):
    """Does something with its layers that only the real ones can."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.b.reset_parameters  # noqa: B018
        x = self.d(self.c(self.b(self.a(x))))
        return torch.ao.nn.quantized.dynamic.Linear, self.c.extra_repr.__func__.__qualname__.index("Linear"), x


@torch.no_grad()
def test_a_layer_whose_replacement_fails_stays_dense_and_is_named(always):
    model, masks = pruned(Reads())
    x = torch.randn(2, 6)
    compressed, rows = compress(model, masks, lambda m: m(x))
    why = {row.name: row.why for row in rows if row.layout == "dense"}
    assert list(why) == ["b.weight", "c.weight"]
    assert (
        "its replacement fails: AttributeError: 'Product' object has no attribute 'reset_parameters'" in why["b.weight"]
    )
    assert "its replacement fails: ValueError: substring not found" in why["c.weight"]
    assert [type(m) for m in compressed.children()] == [layers.Product, nn.Linear, nn.Linear, layers.Product]
    close(compressed(x)[2], model(x)[2])


@torch.no_grad()
def test_a_transformer_layer_that_stays_dense_keeps_torchs_path(always):
    model, masks = pruned(nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)))
    x = torch.randn(2, 5, 8)
    for read, flag in ((["linear1", "linear2"], 1), (["linear1"], 0), ([], 0)):
        run = lambda m: ([getattr(m[0], name).reset_parameters for name in read], m(x))  # noqa: B023, E731
        compressed, rows = compress(model, masks, run)
        assert [r.name.split(".")[1] for r in rows if "reset_parameters" in r.why] == read
        assert compressed[0].activation_relu_or_gelu == flag
        close(compressed(x), model(x))


@torch.no_grad()
def test_a_replacement_that_answers_something_else_stays_dense(always, monkeypatch):
    model, masks = pruned(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)))
    x = torch.randn(2, 6)
    right = layers.Product.product
    for wrong, why in (
        (lambda self, *a: right(self, *a) * (1 + (self.outputs == 5)), r"LotteryError: its outputs are up to .* off"),
        (lambda self, *a: right(self, *a)[:1], r"LotteryError: its shapes are \[\[1, 5\]\]"),
    ):
        monkeypatch.setattr(
            layers.Product, "product", lambda self, *a, f=wrong: (f if self.outputs == 5 else right)(self, *a)
        )
        compressed, rows = compress(model, masks, lambda m: m(x))
        assert (rows[0].layout, rows[1].layout) == ("unstructured", "dense")
        assert re.search("its replacement fails: " + why, rows[1].why)
        close(compressed(x), model(x))


@torch.no_grad()
def test_the_whole_answer_is_checked_where_parts_are_computed_in_one_pass(always, monkeypatch):
    """One pass rounds otherwise, which is no other answer; a part that computes something else is refused."""

    class Block(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.inner, self.scale, self.passed = nn.Linear(6, 6), scale, False

        def fused_parts(self):
            return {}

        def forward(self, x):
            return self.inner(x) * (self.scale if self.passed else 1)

    def use(model, dense):
        model[0].passed = True

    monkeypatch.setattr(compression, "use_products", use)
    x, right = torch.randn(2, 6), layers.Product.product
    model, masks = pruned(nn.Sequential(Block(1 + 1e-5), nn.Linear(6, 5)))
    monkeypatch.setattr(layers.Product, "product", lambda self, *a: right(self, *a) * (1 + (self.outputs == 5)))
    compressed, rows = compress(model, masks, lambda m: m(x))
    assert [row.layout for row in rows] == ["unstructured", "dense"]
    assert re.search("LotteryError: .* off", rows[1].why)
    model[0].scale = 1.5
    with pytest.raises(lottery.LotteryError, match="of Block compute something else than the model does"):
        compress(model, masks, lambda m: m(x))
    calls = []
    compress(model, masks, lambda m: calls.append(m) or m(torch.randn(2, 6)))  # another answer each time says nothing
    assert len(calls) <= 8


def test_run_is_called_a_handful_of_times_and_its_errors_pass_through(always):
    model, masks = pruned(nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60), nn.Linear(60, 60)))
    calls = []

    def run(model):
        calls.append(type(model[0]))
        return model(torch.randn(2, 60))

    compress(model, masks, run)
    # once to record, once to see that it runs (what it returns is another each time); the rest is timing
    assert calls == [nn.Linear, nn.Linear, layers.Product]
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        compress(model, masks, lambda m: m(torch.randn(2, 7)))
    turns = iter([None])

    def once(model):
        next(turns)
        return model(torch.randn(2, 60))

    with pytest.raises(StopIteration):  # it used something up
        compress(model, masks, once)


def test_a_model_that_looks_at_its_layers_kinds_stays_dense(always):
    """It asks isinstance, as some do to put an activation behind a layer: without an error the answer is another."""

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 5)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
                x = x.relu() if isinstance(layer, nn.Linear) else x
            return x, [x]

    model, masks = pruned(Looking())
    x = torch.randn(9, 6)
    compressed, rows = compress(model, masks, lambda m: m(x))
    close(compressed(x)[0], model(x)[0])
    assert [row.layout for row in rows] == ["dense", "dense"]
    assert all(re.search("its replacement fails: LotteryError: what run returns is up to .* off", r.why) for r in rows)


def test_a_forward_that_was_replaced(always):
    def doubled(forward, x):
        return 2 * forward(x)

    model, masks = pruned(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)))
    x = torch.randn(3, 6)
    model[0].forward = functools.partial(doubled, model[0].forward)  # a copy of it is of the copy's layer
    want = model(x)
    compressed, rows = compress(model, masks, lambda m: m(x))
    close(compressed(x), want)
    assert (rows[0].layout, rows[1].layout) == ("dense", "unstructured")
    assert rows[0].why == "its forward was replaced by another function"
    layer = model[0]
    model[0].forward = lambda x: nn.functional.linear(x, layer.weight)  # one of this layer, whose copy runs it too
    with pytest.raises(lottery.LotteryError, match="the forward of 0 was replaced by a function that no copy takes"):
        compress(model, masks, lambda m: m(x))


def test_a_move_that_fails_leaves_the_layer_as_it_was(always):
    model, masks = pruned(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    x = torch.randn(3, 6)
    compressed, _ = compress(model, masks, lambda m: m(x))
    want = compressed(x)

    def refuse(tensor):
        raise RuntimeError("no such device")

    with pytest.raises(RuntimeError, match="no such device"):
        compressed._apply(refuse)
    assert torch.equal(compressed(x), want)


def test_run_is_timed_twice_each_way(monkeypatch):
    model, masks = pruned(nn.Sequential(nn.Linear(60, 60)))
    calls, times = [], compression.time_calls

    def prefer_ours(candidates, measured, turns=12):
        return times(candidates, measured, turns) | {"unstructured": 0.0}

    monkeypatch.setattr(compression, "time_calls", prefer_ours)
    compress(model, masks, lambda m: calls.append(type(m[0])) or m(torch.randn(2, 60)), layout="unstructured")
    assert 4 <= len(calls) <= 7 and set(calls) == {nn.Linear, layers.Product}


# ---------------------------------------------------------------------------- names, wrappers, shared layers


def test_keep_dense(always):
    model, masks = pruned(nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), nn.LSTM(6, 6), nn.LSTM(6, 6)))
    run = lambda m: m[2](m[1](m[0](torch.randn(3, 2, 6)))[0])  # noqa: E731
    for kept, dense in (
        ([], ""), (["0.1"], "0.1"), (["0"], "0."), (["0.1.weight", "2"], "0.1 2."), (("1.weight_hh_l0",), "1."),
    ):  # fmt: skip
        compressed, rows = compress(model, masks, run, keep_dense=kept)
        for row in rows:
            stays = row.name.startswith(tuple(dense.split()))
            assert row.why.startswith("keep_dense names ") == stays == (row.layout == "dense")
    for wrong, message in (
        (["output"], "keep_dense: the model has no layer and no weight named 'output'"),
        ("0.1", "keep_dense must be a list of names, got '0.1'"),
        ([""], "keep_dense: the model has no layer and no weight named ''"),
    ):
        with pytest.raises(lottery.LotteryError, match=message):
            compress(model, masks, run, keep_dense=wrong)


def test_weights_without_a_mask_stay_dense(always):
    """As those that were excluded from pruning."""
    model, masks = pruned(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)))
    del masks["1.weight"]
    compressed, rows = compress(model, masks, lambda m: m(torch.randn(2, 6)))
    assert [(r.name, r.layout) for r in rows] == [("0.weight", "unstructured"), ("1.weight", "dense")]
    assert rows[1].why == "it has no mask: it was not pruned" and rows[1].remaining == 1
    with pytest.raises(lottery.LotteryError, match=r"masks has 2\.weight, which the model does not prune"):
        compress(model, masks | {"2.weight": masks["0.weight"]})


class Inside(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.output = body, nn.Linear(6, 6)

    def forward(self, x):
        return self.output(self.body(x))


@torch.no_grad()
@pytest.mark.parametrize("names", ["of the wrapper", "of the model"])
def test_wrapped_models_are_unwrapped(names, always, tmp_path):
    plain, masks = pruned(Inside(nn.Sequential(nn.Linear(6, 6))))
    x = torch.randn(2, 6)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        compile_ = lambda m: torch.compile(m, backend="eager")  # noqa: E731
        ddp = nn.parallel.DistributedDataParallel
        parameters = copy.deepcopy(plain).requires_grad_(True)
        for wrapped in (
            compile_(copy.deepcopy(plain)),
            ddp(copy.deepcopy(parameters)),
            compile_(ddp(copy.deepcopy(parameters))),
            nn.DataParallel(copy.deepcopy(plain)),
            Inside(compile_(copy.deepcopy(plain.body))),
            Inside(ddp(copy.deepcopy(parameters.body))),
        ):
            if type(wrapped) is Inside:
                wrapped.output.load_state_dict(plain.output.state_dict())
            theirs = dict(zip(lottery.prunable(wrapped), masks.values())) if "wrapper" in names else masks
            compressed, rows = compress(wrapped.eval(), theirs, lambda m: m(x))
            assert type(compressed) is Inside and [row.name for row in rows] == list(masks)
            assert {row.layout for row in rows} == {"unstructured"}
            close(compressed(x), plain(x))
            for kept in ({n.removesuffix(".weight") for n in theirs}, list(theirs)):
                _, rows = compress(wrapped, theirs, lambda m: m(x), keep_dense=kept)
                assert {row.layout for row in rows} == {"dense"}
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_compiled_in_place(always):
    model, masks = pruned(Inside(nn.Linear(6, 6)))
    model.compile(backend="eager")
    x = torch.randn(2, 6)
    with torch.no_grad():
        compressed, rows = compress(model, masks, lambda m: m(x))
        assert {row.layout for row in rows} == {"unstructured"}
        close(compressed(x), model(x))


@torch.no_grad()
def test_shared_layers_and_shared_weights(always):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6))
    model[2] = model[0]  # the same layer twice
    model[3].weight = model[0].weight  # the same weight in another
    model, masks = pruned(model)
    compressed, rows = compress(model, masks, lambda m: m(torch.randn(2, 6)))
    assert [row.name for row in rows] == ["0.weight", "3.weight"] and list(masks) == ["0.weight"]
    assert compressed[0] is compressed[2] and type(compressed[3]) is type(compressed[0]) is layers.Product
    x = torch.randn(3, 6)
    close(compressed(x), model(x))


def test_layers_with_hooks_stay_dense(always):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    seen = []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    nn.utils.parametrizations.weight_norm(model[1])
    with torch.no_grad():
        masks = {n: torch.rand_like(w) < 0.3 for n, w in lottery.prunable(model).items()}
        compressed, rows = compress(model, masks, lambda m: m(torch.randn(2, 6)))
    why = {row.name: row.why for row in rows}
    assert why["0.weight"].startswith("it has hooks") and type(compressed[0]) is nn.Linear
    assert type(compressed[1]) is type(model[1]) and type(compressed[2]) is layers.Product
    assert len(seen) == 3  # recorded, once more to see that it returns the same, and tried


def test_old_weight_norm_after_a_backward_pass(always):
    """It leaves a tensor of the graph on the layer, which deepcopy refuses."""
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(6, 6)), nn.Linear(6, 6))
    x = torch.randn(2, 6)
    model(x).sum().backward()
    masks = {n: torch.rand_like(w) < 0.3 for n, w in lottery.prunable(model).items()}
    compressed, rows = compress(model, {"1.weight": masks["1.weight"]}, lambda m: m(x), layout="unstructured")
    assert {r.name: r.layout for r in rows}["1.weight"] == "unstructured" and type(compressed[0]) is nn.Linear
    with torch.no_grad():
        model[1].weight.masked_fill_(~masks["1.weight"], 0)
        close(compressed(x), model(x))


# ---------------------------------------------------------------------------- what was chosen before


def test_a_choice_is_taken_without_measuring(monkeypatch):
    model, masks = pruned(nn.Sequential(nn.Linear(60, 60), nn.LSTM(60, 60), nn.Linear(60, 60)))
    x, runs = torch.randn(3, 60), []
    run = lambda m: runs.append(1) or m[2](m[1](m[0](x))[0])  # noqa: E731
    kept = {"0.weight": "unstructured", "1.weight_hh_l0": "8x1"}
    monkeypatch.setattr(compression, "time_calls", None)  # nothing is measured
    compressed, rows = compress(model, masks, run, chosen=kept)
    assert len(runs) == 3
    assert compression.choice(rows) == dict.fromkeys(masks, "dense") | kept
    assert [type(layer) for layer in compressed] == [layers.Product, layers.Lstm, nn.Linear]
    assert {row.why for row in rows} == {"chosen before"}
    torch.testing.assert_close(run(compressed), run(compress(model, masks, chosen={})[0]), atol=1e-5, rtol=1e-4)
    again, rows = compress(model, masks, run, chosen=compression.choice(rows))
    assert torch.equal(run(again), run(compressed))
    dense, rows = compress(model, masks, chosen={"0.weight": "dense"})
    assert [type(layer) for layer in dense] == [nn.Linear, nn.LSTM, nn.Linear] and {r.layout for r in rows} == {"dense"}
    for wrong, message in (
        ({"3.weight": "dense"}, "chosen: the model has no layer and no weight named '3.weight'"),
        ({"0.weight": "2x2"}, "chosen, 0.weight: must be one of unstructured, .*, got '2x2'"),
    ):
        with pytest.raises(lottery.LotteryError, match=message):
            compress(model, masks, run, chosen=wrong)
    with pytest.raises(lottery.LotteryError, match="chosen needs run"):
        compress(model, masks, chosen=kept)


def test_a_choice_that_does_not_fit_stays_dense():
    model, masks = pruned(nn.Sequential(nn.Linear(60, 60)))
    masks["0.weight"][:] = True  # nothing is pruned
    compressed, (row,) = compress(model, masks, lambda m: m(torch.randn(2, 60)), chosen={"0.weight": "16x1"})
    assert type(compressed[0]) is nn.Linear and row.layout == "dense"
    assert "16x1 was chosen, and stores no less than all of it or is not here" in row.why


# ---------------------------------------------------------------------------- what must not pass in silence


@torch.no_grad()
@pytest.mark.parametrize("form", ["unstructured", "dense prepacked"])
@pytest.mark.parametrize(
    "layer, size, wrong, said",
    [
        (nn.Linear(40, 8), (2, 40), (2, 80), "(..., 40), got [2, 80]"),
        (nn.Linear(40, 8), (2, 40), (2, 39), "(..., 40), got [2, 39]"),
        (nn.LSTM(5, 7), (3, 2, 5), (3, 2, 9), "(..., 5), got [2, 3, 9]"),
        (nn.Conv1d(4, 6, 3), (2, 4, 20), (2, 9, 20), "([B,] 4, T), got [2, 9, 20]"),
        (nn.Conv1d(4, 6, 3), (4, 20), (20,), "([B,] 4, T), got [20]"),
        (nn.Conv2d(4, 6, 3), (2, 4, 9, 9), (2, 9, 9, 9), "([B,] 4, F, T), got [2, 9, 9, 9]"),
    ],
)
def test_inputs_of_another_width_are_refused(layer, size, wrong, said, form, always):
    if form == "dense prepacked" and isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        pytest.skip("convolutions have no such form")
    model, masks = pruned(nn.Sequential(layer))
    weights = dict.fromkeys(masks, form)
    if isinstance(layer, nn.LSTM):
        weights["0.weight_hh_l0"] = "unstructured"
    fast, _ = compress(model, masks, lambda m: m(torch.randn(size)), chosen=weights)
    assert type(fast[0]) is not type(layer)
    with pytest.raises(ValueError, match=re.escape(f"input must be {said}")):
        fast(torch.randn(wrong))
    with pytest.raises(TypeError, match=re.escape("input must be of floating point numbers, got torch.int64")):
        fast(torch.ones(size, dtype=torch.int64))


def test_gradients_are_right_or_refused(always):
    """A product that left its own out would be worse than none, beside a residual."""
    model, masks = pruned(nn.Sequential(nn.Linear(8, 8)))
    x = torch.randn(3, 8, requires_grad=True)
    (want,) = torch.autograd.grad((x + model(x)).sum(), x)
    fast, _ = compress(model, masks, lambda m: m(x), chosen={"0.weight": "dense prepacked"})
    close(torch.autograd.grad((x + fast(x)).sum(), x), (want,))
    fast, _ = compress(model, masks, lambda m: m(x), chosen={"0.weight": "unstructured"})
    y = (x + fast(x)).sum()  # forward as ever
    if lottery.ops.compiled:
        with pytest.raises(RuntimeError, match="derivative for audio_lottery::sparse_linear is not implemented"):
            y.backward()
    else:
        close(torch.autograd.grad(y, x), (want,))


@torch.no_grad()
def test_a_state_has_the_prepacked_weight(always):
    two = [pruned(nn.Sequential(nn.Linear(40, 8)))[0] for _ in range(2)]
    masks, x = dict.fromkeys(["0.weight"], torch.rand(8, 40) < 0.3), torch.randn(2, 40)
    a, b = (compress(m, masks, lambda m: m(x), chosen={"0.weight": "dense prepacked"})[0] for m in two)
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))
    with pytest.raises(lottery.LotteryError, match=re.escape("weight must be [8, 40], got [8, 39]")):
        b[0].set_extra_state(torch.zeros(8, 39))


@torch.no_grad()
def test_an_lstm_under_autocast(always):
    model, masks = pruned(nn.Sequential(nn.LSTM(5, 7)))
    chosen, x = {"0.weight_ih_l0": "dense", "0.weight_hh_l0": "unstructured"}, torch.randn(4, 2, 5)
    fast, _ = compress(model, masks, lambda m: m(x), chosen=chosen)
    want = model(x)[0]  # under autocast torch's own fails on some processors
    with torch.autocast("cpu", torch.bfloat16):
        close(fast(x)[0].float(), want, 0.02)


@torch.no_grad()
def test_what_a_dtype_costs_is_told(always):
    """One weight of 50 in each row leaves int8 little for the others; a weight that bfloat16 makes infinite is kept."""
    torch.manual_seed(0)
    model, masks = pruned(nn.Sequential(nn.Linear(400, 8)))
    x = torch.randn(3, 400)
    for dtype, most in (("int8", 0.05), ("bfloat16", 0.02)):
        fast, (row,) = compress(model, masks, lambda m: m(x), dtype=dtype, chosen={"0.weight": "unstructured"})
        off = float((fast(x) - model(x)).abs().max() / model(x).abs().max())
        assert row.why == f"chosen before; in {dtype} its outputs are up to {off:.1%} off" and 0 < off < most
    masks["0.weight"][:, 0], x[:, 0] = True, 0
    model[0].weight[:, 0] = 50
    _, (row,) = compress(model, masks, lambda m: m(x), dtype="int8", chosen={"0.weight": "unstructured"})
    assert float(row.why.split()[-2].rstrip("%")) > 50
    model[0].weight[0, 0], x[:, 0] = torch.finfo(torch.float32).max, 1e-4
    fast, (row,) = compress(model, masks, lambda m: m(x), dtype="bfloat16", chosen={"0.weight": "unstructured"})
    assert row.layout == "dense" and "its outputs are not finite where the layer's are" in row.why


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_transducer_of_another_dtype_keeps_its_loop(dtype):
    torch.manual_seed(0)
    model = models.build("rnnt", "demo", 29).eval().to(dtype)
    masks = {name: torch.rand(weight.shape) < 0.3 for name, weight in lottery.prunable(model).items()}
    features, lengths = torch.randn(1, 40, 80, dtype=dtype), torch.tensor([40])
    fast, rows = compress(model, masks, chosen={})
    assert {row.layout for row in rows} == {"dense"} and len(fast.transcribe(features, lengths)) == 1
    fast, _ = compress(model.float(), masks, chosen={})
    cast = copy.deepcopy(fast).to(dtype)
    assert len(cast.emissions(features, lengths)[0]) == len(cast.transcribe(features, lengths)[0])
