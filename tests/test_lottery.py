"""Algorithm 1 and its invariants, on models whose masks can be checked in the head."""

import copy

import pytest
import torch
from torch import nn

import lottery
from audio_lottery import counting, files

NAN, INF = float("nan"), float("inf")


def bits(*rows):
    return torch.tensor(rows, dtype=torch.bool)


# ---------------------------------------------------------------------------- three rounds by hand


class Toy(nn.Module):
    """Ten prunable weights in two layers, and two biases."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(4, 1)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, -2, 3], [-4, 5, -6]]))
            self.b.weight.copy_(torch.tensor([[7.0, -8, 9, -10]]))
            self.a.bias.fill_(0.25)
            self.b.bias.fill_(-0.25)


# One SGD step at rate 1 subtracts these, so every round ends at
# a = [[1, -2, 0.5], [-3, 0.5, -6]], b = [[1, -8, 0.5, -10]] where weights are kept.
SLOPE_A = torch.tensor([[0.0, 0, 2.5], [-1, 4.5, 0]])
SLOPE_B = torch.tensor([[6.0, 0, 8.5, 0]])


def train_toy(ticket):
    model = ticket.model
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.zero_grad()
    ((model.a.weight * SLOPE_A).sum() + (model.b.weight * SLOPE_B).sum() + model.a.bias.sum()).backward()
    ticket.hold()
    optimizer.step()
    ticket.stepped()


def test_three_rounds_by_hand():
    model, seen = Toy(), []
    for found in lottery.find_ticket(model, train_toy, lambda m: {"probe": 1}, sparsity=0.5, prune_rate=0.2):
        masks = {name: mask.clone() for name, mask in found.ticket.masks.items()}
        seen.append((masks, copy.deepcopy(model.state_dict()), found.row))

    assert [row["kept"] for _, _, row in seen] == [10, 8, 6, 5]
    # Round 1 removes two of three tied 0.5s: the earliest, a[0][2], is kept.
    # Round 2 removes that one, and b[0][0] rather than a[0][0], tied at 1. Round 3 removes a[0][0].
    expected = [
        (bits([1, 1, 1], [1, 1, 1]), bits([1, 1, 1, 1])),
        (bits([1, 1, 1], [1, 0, 1]), bits([1, 1, 0, 1])),
        (bits([1, 1, 0], [1, 0, 1]), bits([0, 1, 0, 1])),
        (bits([0, 1, 0], [1, 0, 1]), bits([0, 1, 0, 1])),
    ]
    for (masks, _, _), (a, b) in zip(seen, expected):
        assert torch.equal(masks["a.weight"], a) and torch.equal(masks["b.weight"], b)
    last = seen[-1][1]
    assert last["a.weight"].tolist() == [[0, -2, 0], [-3, 0, -6]]
    assert last["b.weight"].tolist() == [[0, -8, 0, -10]]
    assert last["a.bias"].tolist() == [-0.75, -0.75]  # rewound to 0.25 and trained once, not four times
    row = seen[-1][2]
    assert row["round"] == 3 and row["total"] == 10 and row["remaining"] == 0.5 and row["probe"] == 1
    assert row["remaining_all"] == pytest.approx(8 / 13)  # 5 weights and 3 biases of 13 parameters
    assert row["kept_per_layer"] == {"a.weight": 3, "b.weight": 2}
    assert row["parent_sha256"] == seen[2][2]["mask_sha256"] != row["mask_sha256"]
    assert len({r["rewind_sha256"] for _, _, r in seen}) == 1


def test_late_rewinding_restores_the_step():
    model = Toy()

    def train(ticket):
        train_toy(ticket)
        train_toy(ticket)

    rounds = lottery.find_ticket(model, train, lambda m: {}, sparsity=0.2, rewind_step=1)
    next(rounds)
    found = next(rounds)
    assert found.ticket.rewind_state["a.weight"].tolist() == [[1, -2, 0.5], [-3, 0.5, -6]]  # after one step of round 0
    with pytest.raises(lottery.LotteryError, match="rewind_step 3 was never reached: round 0 took 2 steps"):
        next(lottery.find_ticket(Toy(), train, lambda m: {}, sparsity=0.2, rewind_step=3))


def test_pruning_uses_the_last_weights_not_the_evaluated_ones():
    """The state that `train` returns is what evaluate and the consumer see; the next round prunes the last epoch."""
    model = Toy()

    def train(ticket):
        best = lottery.copy_state(ticket.model)
        best["b.weight"].mul_(0.001)  # would lose its weights if it were pruned
        train_toy(ticket)
        return best

    rounds = lottery.find_ticket(model, train, lambda m: {"b": m.b.weight.tolist()}, sparsity=0.2)
    assert next(rounds).row["b"] == [pytest.approx([0.007, -0.008, 0.009, -0.010])]
    assert next(rounds).row["kept_per_layer"] == {"a.weight": 5, "b.weight": 3}


def test_an_evaluated_state_must_be_masked_too():
    def train(ticket):
        train_toy(ticket)
        return {name: torch.ones_like(value) for name, value in ticket.model.state_dict().items()}

    rounds = lottery.find_ticket(Toy(), train, lambda m: {}, sparsity=0.2)
    next(rounds)
    with pytest.raises(lottery.LotteryError, match=r"a.weight: a pruned weight is not 0"):
        next(rounds)


def test_rewinding_restores_batch_norm_statistics():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def train(ticket):
        ticket.model.train()
        ticket.model(torch.randn(8, 4) + 3)
        return None

    for found in lottery.find_ticket(model, train, lambda m: {}, sparsity=0.5):
        assert int(model[1].num_batches_tracked) == 1, found.row["round"]


# ---------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    "total, sparsity, counts",
    [
        (1000, 0.0, [1000]),
        (1000, 0.2, [1000, 800]),
        (1000, 0.9, [1000, 800, 640, 512, 410, 328, 262, 210, 168, 134, 107, 100]),
        (10, 0.9, [10, 8, 6, 5, 4, 3, 2, 1]),
        (3, 0.5, [3, 2]),
    ],
)
def test_kept_counts(total, sparsity, counts):
    assert lottery.kept_counts(total, sparsity, 0.2) == counts


@pytest.mark.parametrize(
    "sparsity, rate, message",
    [
        (1.5, 0.2, r"sparsity must be in \[0, 1\), got 1.5 \(it is the fraction removed, not kept\)"),
        (-0.1, 0.2, "sparsity must be in"),
        (NAN, 0.2, "sparsity must be in"),
        (0.5, 0.0, r"prune_rate must be in \(0, 1\), got 0.0"),
        (0.5, 1.0, "prune_rate must be in"),
        (0.9999, 0.2, "keeps none of 100 weights"),
        (0.5, 1e-9, r"prune_rate 1e-09 takes 6931471.. rounds to sparsity 0.5 \(1,000 at most\)"),
    ],
)
def test_impossible_counts(sparsity, rate, message):
    with pytest.raises(lottery.LotteryError, match=message):
        lottery.kept_counts(100, sparsity, rate)


# ---------------------------------------------------------------------------- the pruning op


def brute_force(weights, masks, keep):
    """Sort all survivors by (-|w|, tensor, flat index) in Python."""
    ranked = sorted(
        (-abs(value), i, j)
        for i, (w, m) in enumerate(zip(weights, masks))
        for j, (value, kept) in enumerate(zip(w.flatten().tolist(), m.flatten().tolist()))
        if kept
    )
    new = [torch.zeros_like(m).flatten() for m in masks]
    for _, i, j in ranked[:keep]:
        new[i][j] = True
    return [n.view(m.shape) for n, m in zip(new, masks)]


@pytest.mark.parametrize("levels", [2, 5, 10_000])  # few distinct magnitudes: many ties
def test_pruning_equals_a_sort(levels):
    generator = torch.Generator().manual_seed(levels)
    for _ in range(40):
        shapes = [tuple(torch.randint(0, 9, (2,), generator=generator).tolist()) for _ in range(4)]
        weights = [torch.randint(-levels, levels + 1, shape, generator=generator) / levels for shape in shapes]
        masks = [torch.rand(shape, generator=generator) < 0.7 for shape in shapes]
        survivors = sum(int(m.sum()) for m in masks)
        keep = int(torch.randint(0, survivors + 1, (1,), generator=generator))
        for got, want in zip(
            lottery.ops.global_magnitude_masks(weights, masks, keep), brute_force(weights, masks, keep)
        ):
            assert torch.equal(got, want)


def test_pruning_ignores_pruned_weights_however_large():
    assert lottery.ops.global_magnitude_masks([torch.tensor([9.0, 1, 2])], [bits(0, 1, 1)], 1)[0].tolist() == [0, 0, 1]


def test_pruning_refuses():
    for keep in (-1, 3):
        with pytest.raises(ValueError, match=f"keep must be between 0 and the 2 surviving weights, got {keep}"):
            lottery.ops.global_magnitude_masks([torch.tensor([9.0, 1, 2])], [bits(0, 1, 1)], keep)
    for bad in (NAN, INF, -INF):
        model = Toy()
        model.b.weight.data[0, 1] = bad
        ticket = lottery.Ticket(model)
        with pytest.raises(lottery.LotteryError, match=r"b.weight has a NaN or infinite weight"):
            ticket.prune(5)


# ---------------------------------------------------------------------------- holding


def test_held_weights_stay_zero_under_adamw_and_nan_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    ticket = lottery.Ticket(model)
    ticket.prune(30)
    ticket.rewind()
    order = [id(p) for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    for step in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        if step == 2:  # at a pruned place: must not spread
            name = next(n for n, m in ticket.masks.items() if not m.all())
            ticket.weights[name].grad[~ticket.masks[name]] = NAN
        ticket.hold()
        optimizer.step()
        ticket.check()
    assert sum(int((w != 0).sum()) for w in ticket.weights.values()) == 30
    assert [id(p) for p in model.parameters()] == order and "0.weight" in model.state_dict()
    copy.deepcopy(model)


# ---------------------------------------------------------------------------- other rankings, and blocks


def pruned(pruning, keep, weights=None, masks=None):
    weights = weights or {"a": torch.tensor([[1.0, -2, 3], [-4, 5, -6]]), "b": torch.tensor([[70.0, -80, 90, -100]])}
    masks = masks or {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    return lottery.prune(weights, masks, keep, pruning)


def test_blocks_by_hand():
    masks = pruned(lottery.Pruning(block=(2, 2)), 2)  # norms of a: [12, 9], of b: [150, 190]
    assert torch.equal(masks["a"], bits([0, 0, 0], [0, 0, 0])) and masks["b"].all()
    masks = pruned(lottery.Pruning(block=(2, 2)), 3)
    assert torch.equal(masks["a"], bits([1, 1, 0], [1, 1, 0]))
    masks = pruned(lottery.Pruning(block=(1, 2)), 4)  # [3, 3], [9, 6], [150, 190]
    assert torch.equal(masks["a"], bits([0, 0, 0], [1, 1, 1])) and masks["b"].all()
    masks = pruned(lottery.Pruning(block=(1, 2)), 5)  # the tie of the 3s: the lower index
    assert torch.equal(masks["a"], bits([1, 1, 0], [1, 1, 1]))
    cut = pruned(lottery.Pruning(block=(1, 2)), 3, masks=masks)
    assert torch.equal(cut["a"], bits([0, 0, 0], [1, 1, 0]))
    conv = {"conv": torch.arange(24.0).view(2, 2, 3, 2)}  # seen as 2 x 12
    assert torch.equal(
        pruned(lottery.Pruning(block=(2, 4)), 1, conv)["conv"].flatten(1), bits([0] * 8 + [1] * 4, [0] * 8 + [1] * 4)
    )


def test_layers_by_hand():
    # n / (rank + 1/2), the largest weight first: a 12, 4, 2.4, 1.71, 1.33, 1.09; b 8, 2.67, 1.6, 1.14
    shares = [{n: int(m.sum()) for n, m in pruned(lottery.Pruning(scope="layer"), keep).items()} for keep in range(11)]
    assert [(s["a"], s["b"]) for s in shares] == [
        (0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (3, 2), (4, 2), (4, 3), (5, 3), (5, 4), (6, 4)
    ]  # fmt: skip
    assert torch.equal(pruned(lottery.Pruning(scope="layer"), 3)["a"], bits([0, 0, 0], [0, 1, 1]))
    assert not torch.equal(pruned(lottery.Pruning(), 4)["b"], bits([0, 0, 1, 1]))  # global: b alone


def test_lamp_by_hand():
    # a: 1, 25 / 61, 16 / 77, 9 / 86, 4 / 90, 1 / 91; b: 1, 81 / 181, 64 / 245, 49 / 294
    order = [("a", 5), ("b", 3), ("b", 2), ("a", 4), ("b", 1), ("a", 3), ("b", 0), ("a", 2), ("a", 1), ("a", 0)]
    for keep in range(11):
        masks = pruned(lottery.Pruning(scope="lamp"), keep)
        got = {(name, i) for name, mask in masks.items() for i in mask.flatten().nonzero().flatten().tolist()}
        assert got == set(order[:keep])
    scores = lottery.rank_within(torch.tensor([3.0, -3, 0, 0, 9]), torch.tensor([1, 1, 1, 1, 0]) > 0, "lamp")
    assert scores.tolist() == [1.0, 0.5, 0.0, 0.0, 0.0]  # ties: the lower index first; a pruned 9 counts for nothing


@pytest.mark.parametrize("scope", lottery.SCOPES)
@pytest.mark.parametrize("block", [(1, 1), (1, 4), (8, 1), (3, 5)])
def test_rounds_of_any_ranking_are_nested_and_exact(scope, block):
    torch.manual_seed(0)
    shapes = {"a": (19, 23), "b": (7, 3, 5, 2), "c": (40, 6)}
    pruning = lottery.Pruning(block, scope, min_remaining=0.1)
    masks = {name: torch.ones(shape, dtype=torch.bool) for name, shape in shapes.items()}
    units = {name: pruning.units(mask).numel() for name, mask in masks.items()}
    for keep in lottery.kept_counts(sum(units.values()), 0.85)[1:]:
        weights = {name: torch.randn(shape) * (1 + 5 * (name == "c")) for name, shape in shapes.items()}
        before, masks = masks, lottery.prune(weights, masks, keep, pruning)
        kept = {name: pruning.units(mask) for name, mask in masks.items()}
        assert sum(int(unit.sum()) for unit in kept.values()) == keep
        for name in shapes:
            assert not (masks[name] & ~before[name]).any()
            assert torch.equal(pruning.weights(kept[name], masks[name]), masks[name])  # whole blocks
            assert int(kept[name].sum()) >= -(-units[name] // 10)
            if scope == "layer":
                assert abs(int(kept[name].sum()) - units[name] * keep / sum(units.values())) <= 1.5


def test_a_block_may_be_larger_than_the_weight():
    pruning, mask = lottery.Pruning((2**31 - 1, 2**31 - 1)), torch.ones(3, 2, 2, dtype=torch.bool)
    for kept in (mask, ~mask):
        assert pruning.units(kept).shape == (1, 1) and torch.equal(pruning.weights(pruning.units(kept), mask), kept)


def test_a_floor_takes_from_the_others_alone():
    free, floored = (pruned(lottery.Pruning(min_remaining=share), 4) for share in (0.0, 0.3))
    assert not free["a"].any() and free["b"].all()
    assert lottery.Pruning(min_remaining=0.07).least(torch.ones(10, 10)) == 7
    assert lottery.Pruning(min_remaining=1e-9).least(torch.ones(10, 10)) == 1
    assert torch.equal(floored["a"], bits([0, 0, 0], [0, 1, 1])) and torch.equal(floored["b"], bits([0, 0, 1, 1]))
    assert torch.equal(pruned(lottery.Pruning(min_remaining=0.3), 9)["a"], pruned(lottery.Pruning(), 9)["a"])
    with pytest.raises(lottery.LotteryError, match=r"min_remaining 0.3 keeps 4, more than 3 in all"):
        pruned(lottery.Pruning(min_remaining=0.3), 3)
    with pytest.raises(lottery.LotteryError, match=r"min_remaining 0.9 keeps 10 of the prunable, more than 5"):
        next(
            lottery.find_ticket(
                Toy(), train_toy, lambda m: {}, sparsity=0.5, pruning=lottery.Pruning((1, 1), "global", 0.9)
            )
        )


@pytest.mark.parametrize(
    "pruning, message",
    [
        (lottery.Pruning(block=(0, 4)), r"block must be rows and columns, both at least 1, got \(0, 4\)"),
        (lottery.Pruning(scope="local"), "scope must be one of global, layer, lamp, got 'local'"),
        (lottery.Pruning(min_remaining=1.0), r"min_remaining must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_prunings_are_refused(pruning, message):
    with pytest.raises(lottery.LotteryError, match=message):
        lottery.Ticket(Toy(), pruning=pruning)


def test_a_search_in_blocks_counts_blocks():
    for found in lottery.find_ticket(Toy(), train_toy, lambda m: {}, sparsity=0.5, pruning=lottery.Pruning((2, 1))):
        row = found.row
    assert (row["total"], row["total_blocks"], row["kept_blocks"]) == (10, 7, 4)  # 3 of a, 4 of b; round(7 / 2)
    assert (
        row["kept"]
        == sum(row["kept_per_layer"].values())
        == 4 + 2 * (4 - row["kept_per_layer"]["b.weight"]) - (4 - row["kept_per_layer"]["b.weight"])
    )


def test_a_loop_that_does_not_hold_is_found_out():
    def train(ticket):
        for w in ticket.weights.values():
            w.data.add_(1.0)

    rounds = lottery.find_ticket(Toy(), train, lambda m: {}, sparsity=0.5)
    next(rounds)
    with pytest.raises(lottery.LotteryError, match=r"weight: a pruned weight is not 0"):
        next(rounds)


def test_broken_masks_are_refused(monkeypatch):
    ticket = lottery.Ticket(Toy())
    ticket.prune(6)
    everything = [torch.ones_like(m) for m in ticket.masks.values()]
    monkeypatch.setattr(lottery, "ops", lottery.ops._replace(global_magnitude_masks=lambda *_: everything))
    with pytest.raises(lottery.LotteryError, match="pruning kept 10 weights instead of 5"):
        ticket.prune(5)
    regrown = [bits([1, 1, 0], [0, 1, 1]), bits([0, 0, 0, 1])]
    monkeypatch.setattr(lottery, "ops", lottery.ops._replace(global_magnitude_masks=lambda *_: regrown))
    with pytest.raises(lottery.LotteryError, match=r"a.weight: the new mask keeps a weight that was pruned before"):
        ticket.prune(5)


# ---------------------------------------------------------------------------- scope


def test_scope_names_every_parameter_and_why_not():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(5, 4)
            self.conv, self.norm = nn.Conv1d(4, 4, 3), nn.LayerNorm(4)
            self.lstm, self.attention = nn.LSTM(4, 4, bidirectional=True), nn.MultiheadAttention(4, 2)
            self.tied = nn.Linear(4, 5, bias=False)
            self.tied.weight = self.embedding.weight
            self.free = nn.Parameter(torch.zeros(3, 3))

    net = Net()
    rows = lottery.scope(net)
    assert [row.name for row in rows] == [name for name, _ in net.named_parameters()]
    assert rows[0] == ("free", (3, 3), "in Net, not a convolution, recurrent, attention or linear layer")
    assert {row.name for row in rows if row.verdict == "pruned"} == {
        "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight",
        "lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_ih_l0_reverse", "lstm.weight_hh_l0_reverse",
    }  # fmt: skip
    why = {row.name: row.verdict for row in rows}
    assert why["conv.bias"] == "a bias"
    assert why["norm.weight"].startswith("in LayerNorm") and why["embedding.weight"].startswith("in Embedding")
    with pytest.raises(lottery.LotteryError, match="no weight to prune"):
        lottery.prunable(nn.LayerNorm(3))


# ---------------------------------------------------------------------------- ticket files


def ticket_file(path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
    ticket = lottery.Ticket(model)
    ticket.prune(5)
    ticket.rewind()
    files.save_ticket(path, ticket.masks, ticket.rewind_state, model.state_dict(), {"tokens": ["é"]})
    return ticket, model


def test_a_ticket_comes_back_bit_for_bit(tmp_path):
    ticket, model = ticket_file(tmp_path / "t.safetensors")
    masks, rewind, trained, info = files.load_ticket(tmp_path / "t.safetensors")
    assert info == {"tokens": ["é"]} and lottery.sha256(masks) == lottery.sha256(ticket.masks)
    assert torch.equal(rewind["0.weight"], ticket.rewind_state["0.weight"] * masks["0.weight"])
    assert set(trained) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(trained[name], value)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]  # no temporary file left


def test_broken_ticket_files_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    _, model = ticket_file(path)
    whole = path.read_bytes()
    with pytest.raises(lottery.LotteryError, match=r"missing.safetensors: cannot read the ticket \(No such file"):
        files.load_ticket(tmp_path / "missing.safetensors")
    for broken in (b"", whole[:20], whole[:-1], whole[:-1] + b"x", whole + b"x", whole.replace(b"tokens", b"tokers")):
        path.write_bytes(broken)
        with pytest.raises(lottery.LotteryError, match=r"t.safetensors: not a whole ticket: "):
            files.load_ticket(path)
    files.write_sealed(path, "checkpoint", {}, {})
    with pytest.raises(lottery.LotteryError, match="it is a checkpoint of format"):
        files.load_ticket(path)


def test_a_ticket_sealed_again_with_other_metadata_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    ticket_file(path)
    tensors, about = files.read_sealed(path, "ticket")
    edits = [{k: v for k, v in about.items() if k != gone} for gone in ("shapes", "mask_sha256", "info")]
    edits += [about | {"shapes": [1]}, about | {"shapes": {"0.weight": [-1, 7]}}, about | {"mask_sha256": {}}]
    for edited in edits:
        fields = {k: v for k, v in edited.items() if k not in ("format", "kind")}
        files.write_sealed(path, "ticket", tensors, fields)
        with pytest.raises(lottery.LotteryError, match=r"t.safetensors: "):
            files.load_ticket(path)
    fields = {k: v for k, v in about.items() if k not in ("format", "kind")}
    files.write_sealed(path, "ticket", tensors | {"noslash": torch.zeros(1)}, fields)
    with pytest.raises(lottery.LotteryError, match=r"t.safetensors: "):
        files.load_ticket(path)


def test_a_ticket_is_for_its_model(tmp_path):
    path = tmp_path / "t.safetensors"
    _, model = ticket_file(path)
    assert files.load_ticket(path, model).info == {"tokens": ["é"]}
    for other in (nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(7, 3)), nn.Linear(7, 3)):
        with pytest.raises(lottery.LotteryError, match="are not"):
            files.load_ticket(path, other)


def test_a_ticket_without_its_rewind_state_is_small(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(1000, 1000)
    ticket = lottery.Ticket(model)
    ticket.prune(100_000)
    ticket.rewind()
    files.save_ticket(tmp_path / "t", ticket.masks, None, model.state_dict(), {})
    assert files.load_ticket(tmp_path / "t").rewind is None
    assert (tmp_path / "t").stat().st_size <= 0.14 * 4 * sum(p.numel() for p in model.parameters())


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "t"
    files.write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["t"]


def test_masks_as_bits():
    for n in (0, 1, 7, 8, 9, 1000):
        mask = torch.rand(n) < 0.5
        assert len(files.pack_bits(mask)) == (n + 7) // 8 and torch.equal(
            files.unpack_bits(files.pack_bits(mask), [n]), mask
        )
    for packed, shape in ((torch.tensor([255], dtype=torch.uint8), [7]), (torch.zeros(2, dtype=torch.uint8), [8])):
        with pytest.raises(ValueError, match="bytes of mask for the shape"):
            files.unpack_bits(packed, shape)


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
