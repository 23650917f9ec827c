"""Algorithm 1 and its invariants, on models whose masks can be checked in the head."""

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils.prune import random_unstructured

import lottery

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
    assert [row["threshold"] for _, _, row in seen] == [0, 0.5, 1, 2]  # the least magnitude that stays
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


def test_a_hidden_buffer_that_was_made_later_is_not_forgotten():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            if not hasattr(self, "seen"):
                self.register_buffer("seen", torch.zeros(()), persistent=False)
            self.seen += 1
            return self.linear(x)

    def train(ticket):
        ticket.model(torch.randn(3, 4)).sum().backward()
        ticket.hold()

    model = Counts()
    rounds = lottery.find_ticket(model, train, lambda m: {}, sparsity=0.5, prune_rate=0.5)
    next(rounds)
    with pytest.raises(lottery.LotteryError, match="seen is not in the state: made later, or another's"):
        next(rounds)
    rounds = lottery.find_ticket(model, train, lambda m: {}, sparsity=0.5, prune_rate=0.5)  # it is there now
    assert len(list(rounds)) == 2 and model.seen == 1 + 1


def test_masks_lie_as_the_weights_do():
    """So that hold() takes weight, gradient and mask in one pass in every round, channels_last too."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)).to(memory_format=torch.channels_last)
    for block in ((1, 1), (2, 1)):
        ticket = lottery.Ticket(model, pruning=lottery.Pruning(block))
        ticket.prune(ticket.kept_units // 2)
        for name, weight in ticket.weights.items():
            assert ticket.masks[name].stride() == weight.stride(), name


def test_no_weights_at_all():
    assert lottery.prune({}, {}, 0) == {} and lottery.ops.block_norms([], 1, 1) == []
    assert lottery.ops.hold_ticket_([], [], []) is None
    with pytest.raises(lottery.LotteryError):
        lottery.prune({}, {}, 1)


def test_a_rewind_that_rewinds_nothing_is_refused(monkeypatch):
    ticket = lottery.Ticket(Toy())
    train_toy(ticket)
    ticket.prune(6)
    monkeypatch.setattr(lottery, "load_state", lambda *_, **_named: None)
    with pytest.raises(lottery.LotteryError, match=r"a.weight: the rewound weights are not theta_k \* mask"):
        ticket.rewind()


def test_late_rewinding_restores_the_step():
    model = Toy()

    def train(ticket):
        train_toy(ticket)
        train_toy(ticket)

    rounds = lottery.find_ticket(model, train, lambda m: {}, sparsity=0.2, rewind_step=1)
    next(rounds)
    found = next(rounds)
    assert found.ticket.rewind_state["a.weight"].tolist() == [[1, -2, 0.5], [-3, 0.5, -6]]  # after one step of round 0
    assert (found.ticket.first_step, found.ticket.steps) == (1, 1 + 2)  # it went on at step 1
    with pytest.raises(lottery.LotteryError, match="rewind_step 3 was never reached: round 0 took 2 steps"):
        next(lottery.find_ticket(Toy(), train, lambda m: {}, sparsity=0.2, rewind_step=3))


def test_weights_go_on_if_they_are_not_rewound():
    starts = []

    def train(ticket):
        starts.append({name: weight.detach().clone() for name, weight in ticket.weights.items()})
        train_toy(ticket)

    found = list(lottery.find_ticket(Toy(), train, lambda m: {}, sparsity=0.4, rewind=False))
    rewound = list(lottery.find_ticket(Toy(), train_toy, lambda m: {}, sparsity=0.4))
    assert [f.row["kept"] for f in found] == [f.row["kept"] for f in rewound]  # the same ladder
    assert found[1].row["mask_sha256"] == rewound[1].row["mask_sha256"]  # round 0 is the same
    last = starts[0] if len(starts) == 1 else starts[1]
    model = Toy()
    ticket = lottery.Ticket(model)
    train_toy(ticket)  # round 0
    kept = lottery.prune(ticket.weights, ticket.masks, found[1].row["kept"])
    for name, weight in ticket.weights.items():
        assert torch.equal(last[name], weight.detach().masked_fill(~kept[name], 0)), name


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
        (0.5, 1e-9, r"prune_rate 1e-09 takes 693147180.2 rounds to sparsity 0.5 \(1,000 at most\)"),
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
        ticket = lottery.Ticket(model)
        model.b.weight.data[0, 1] = bad
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


def test_lamp_equals_its_definition():
    """Lee et al. 2021: a weight's square by the sum of those of its layer that are not smaller. Each largest has 1."""
    torch.manual_seed(0)
    weights = {"a": torch.randn(5, 7), "b": torch.randn(3, 4, 2) * 9, "c": torch.randn(11, 3) / 9}
    masks = {name: torch.rand(weight.shape) < 0.8 for name, weight in weights.items()}
    scores = []
    for name, weight in weights.items():
        left = {i: w for i, w in enumerate(weight.flatten().tolist()) if masks[name].flatten()[i]}
        for i, w in left.items():
            scores.append((-w * w / sum(v * v for v in left.values() if abs(v) >= abs(w)), name, i))
    scores.sort()  # ties: the earlier layer
    for keep in (0, 1, 3, 20, 50, len(scores)):
        got = lottery.prune(weights, masks, keep, lottery.Pruning(scope="lamp"))
        kept = {(name, i) for name, mask in got.items() for i in mask.flatten().nonzero().flatten().tolist()}
        assert kept == {(name, i) for _, name, i in scores[:keep]}


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


def test_a_step_without_a_hold_before_it_is_refused():
    """A single hold() behind the last step would hide that pruned weights had trained."""

    def train(ticket):
        for _ in range(3):
            for w in ticket.weights.values():
                w.data.add_(1.0)
            ticket.stepped()
        ticket.hold()

    with pytest.raises(lottery.LotteryError, match=r"^step 0 had no hold\(\) before it: pruned weights would train$"):
        next(lottery.find_ticket(Toy(), train, lambda m: {}, sparsity=0.5))


@pytest.mark.parametrize("name", ["a.weight", "b.weight", "a.bias"])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_parameter_that_is_not_finite_is_refused_by_name(name, bad):
    """At the start, in a kept place, and in a pruned one: before any other invariant is blamed."""
    said = f"^{name} has a NaN or infinite value: no round begins or ends with one$"
    broken = Toy()
    if name not in dict(broken.named_parameters()):
        broken.a.bias = torch.nn.Parameter(torch.zeros(len(broken.a.weight)))
    model = copy.deepcopy(broken)
    broken.get_parameter(name).data.view(-1)[0] = bad
    with pytest.raises(lottery.LotteryError, match=said):
        lottery.Ticket(broken)

    def train(ticket, place):
        if ticket.round == 1:  # the last
            ticket.model.get_parameter(name).data.view(-1)[place] = bad

    for place in (0, -1):
        at = functools.partial(train, place=place)
        rounds = lottery.find_ticket(copy.deepcopy(model), at, lambda m: {}, sparsity=0.5, prune_rate=0.5)
        next(rounds)
        with pytest.raises(lottery.LotteryError, match=said):
            next(rounds)


@pytest.mark.parametrize("step", [-1, 1.5, None])
def test_an_impossible_rewind_step_is_refused_before_any_training(step):
    with pytest.raises(lottery.LotteryError, match="rewind_step must be a whole number of at least 0, got"):
        next(lottery.find_ticket(Toy(), print, lambda m: {}, sparsity=0.5, rewind_step=step))


def test_broken_masks_are_refused(monkeypatch):
    ticket = lottery.Ticket(Toy())
    ticket.prune(6)
    everything = [torch.ones_like(m) for m in ticket.masks.values()]
    monkeypatch.setattr(lottery, "ops", lottery.ops._replace(global_magnitude_masks=lambda *_: everything))
    with pytest.raises(lottery.LotteryError, match="pruning kept 10 weights or blocks instead of 5"):
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
    assert rows[0] == ("free", (3, 3), "in Net, no convolution, recurrent, attention or linear layer of torch's")
    assert {row.name for row in rows if row.status == "pruned"} == {
        "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight",
        "lstm.weight_ih_l0", "lstm.weight_hh_l0", "lstm.weight_ih_l0_reverse", "lstm.weight_hh_l0_reverse",
    }  # fmt: skip
    why = {row.name: row.status for row in rows}
    assert why["conv.bias"] == "a bias"
    assert why["norm.weight"].startswith("in LayerNorm") and why["embedding.weight"].startswith("in Embedding")
    with pytest.raises(lottery.LotteryError, match="no weight to prune"):
        lottery.prunable(nn.LayerNorm(3))


@pytest.mark.parametrize(
    "layer, names",
    [
        (lambda: nn.utils.weight_norm(nn.Linear(4, 3)), ("weight_g", "weight_v")),
        (lambda: nn.utils.weight_norm(nn.LSTM(4, 3), "weight_hh_l0"), ("weight_hh_l0_g", "weight_hh_l0_v")),
        (lambda: nn.utils.spectral_norm(nn.Conv1d(4, 3, 2)), ("weight_orig",)),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), ("original0", "original1")),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), ("original",)),
        (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 3)), ("original",)),
        (lambda: random_unstructured(nn.Linear(4, 3), "weight", 0.5), ("weight_orig",)),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_reparametrised_weights_are_named_and_left_alone(layer, names):
    """A 0 in v is no 0 in g * v / |v|, and a row of them is NaN: they stay whole, and the rest is pruned."""
    model = nn.Sequential(layer())
    rows = {row.name: row.status for row in lottery.scope(model)}
    for name in names:
        (verdict,) = [verdict for path, verdict in rows.items() if path.split(".")[-1] == name]
        assert verdict.startswith("reparametrised: the layer computes its weight from this")
    if not isinstance(model[0], nn.LSTM):
        with pytest.raises(lottery.LotteryError, match=r"no weight to prune .*: 0\..* is reparametrised"):
            lottery.Ticket(model)
    model.append(nn.Linear(3, 4, bias=False))
    for found in lottery.find_ticket(model, lambda ticket: ticket.hold(), lambda m: {}, sparsity=0.7):
        assert "1.weight" in found.row["kept_per_layer"]
        assert all(name.split(".")[-1] not in names for name in found.row["kept_per_layer"])
    assert all(value.isfinite().all() for value in lottery.state_of(model).values())


# ---------------------------------------------------------------------------- exclude


def test_what_is_excluded_is_listed_and_stays_whole():
    model = nn.Sequential()
    model.encoder, model.output = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)), nn.Linear(4, 6)
    for exclude, gone in (
        ("output", {"output.weight"}),
        (["output.weight"], {"output.weight"}),
        (["encoder.1"], {"encoder.1.weight_ih_l0", "encoder.1.weight_hh_l0"}),
        (["*_hh_*", "output"], {"encoder.1.weight_hh_l0", "output.weight"}),
        (["encoder.*", "encoder.0"], {"encoder.0.weight", "encoder.1.weight_ih_l0", "encoder.1.weight_hh_l0"}),
    ):
        rows = {row.name: row.status for row in lottery.scope(model, exclude)}
        assert {name for name, verdict in rows.items() if verdict.startswith("excluded by")} == gone
        assert lottery.prunable(model, exclude).keys() == lottery.prunable(model).keys() - gone
    assert dict((r.name, r.status) for r in lottery.scope(model, ["out*"]))["output.weight"] == "excluded by 'out*'"
    before = model.output.weight.detach().clone()
    for found in lottery.find_ticket(
        model, lambda ticket: ticket.hold(), lambda m: {}, sparsity=0.5, exclude=["output"]
    ):
        assert found.row["total"] == 16 + 128 and "output.weight" not in found.row["kept_per_layer"]
    assert found.row["kept"] == 72 and torch.equal(model.output.weight, before)
    assert found.row["remaining_all"] == pytest.approx((72 + 24 + 6 + 4 + 32) / (144 + 24 + 6 + 4 + 32))


def test_a_tied_weight_is_excluded_by_any_of_its_names():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with pytest.raises(lottery.LotteryError, match=r"no weight to prune .*: 0.weight is excluded by '1'"):
        lottery.prunable(model, ["1"])


@pytest.mark.parametrize("exclude", [["b"], ["nothing.*", "a"], ["a.bias"], ["c"]])
def test_a_pattern_that_matches_nothing_is_refused(exclude):
    model = Toy()
    model.c = nn.Embedding(3, 3)
    wrong = next((p for p in exclude if p not in ("a", "b")), None)
    if wrong is None:
        assert lottery.Ticket(model, exclude=exclude).masks.keys() == {"a.weight"}
        return
    with pytest.raises(lottery.LotteryError, match=rf"exclude '{wrong}' matches no weight that would be pruned"):
        next(lottery.find_ticket(model, train_toy, lambda m: {}, sparsity=0.5, exclude=exclude))


# ---------------------------------------------------------------------------- modes


def test_each_round_begins_in_the_mode_of_round_0():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout())
    model[1].eval()  # frozen statistics
    modes = []

    def train(ticket):
        modes.append([module.training for module in ticket.model.modules()])
        ticket.model.train()

    for _ in lottery.find_ticket(model, train, lambda m: m.eval() and {}, sparsity=0.5):
        model.eval()
    assert modes == [[True, True, False, True]] * 4


# ---------------------------------------------------------------------------- the weights are the model's


def assign(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def replace(model):
    model.a = nn.Linear(3, 2)


def remove(model):
    del model.a


@pytest.mark.parametrize("change", [assign, replace, remove])
@pytest.mark.parametrize("where", ["before hold", "after hold", "in evaluate"])
def test_replaced_weights_are_found_out(change, where):
    def train(ticket):
        if ticket.round and where == "before hold":
            change(ticket.model)
        ticket.hold()
        if ticket.round and where == "after hold":
            change(ticket.model)

    def evaluate(model):
        if where == "in evaluate":
            change(model)
        return {}

    rounds = lottery.find_ticket(Toy(), train, evaluate, sparsity=0.5)
    next(rounds)
    with pytest.raises(
        lottery.LotteryError, match=r"a.weight is another tensor in the model now than the ticket holds"
    ):
        next(rounds)


def test_a_weight_that_comes_later_is_found_out():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    ticket = lottery.Ticket(model)
    ticket.prune(5)
    model[1].weight = nn.Parameter(torch.ones(3, 3))
    ticket.hold()
    for check in (ticket.rewind, lambda: lottery.finish(ticket, None)):
        with pytest.raises(lottery.LotteryError, match=r"1.weight was not in the model when the ticket was made"):
            check()


# ---------------------------------------------------------------------------- what evaluate and train return


@pytest.mark.parametrize(
    "returned, message",
    [
        ({"kept": 3, "round": 99}, "evaluate returned 'kept', which the row has already"),
        ({"parent_sha256": ""}, "evaluate returned 'parent_sha256', which the row has"),
        (None, "evaluate must return a dict of what to add to the row, got NoneType"),
        (0.5, "evaluate must return a dict of what to add to the row, got float"),
    ],
)
def test_what_evaluate_returns_overwrites_nothing(returned, message):
    with pytest.raises(lottery.LotteryError, match=message):
        next(lottery.find_ticket(Toy(), train_toy, lambda m: returned, sparsity=0.5))


def test_what_is_no_function_is_refused_before_training():
    def train(ticket):
        raise AssertionError("trained")

    with pytest.raises(lottery.LotteryError, match=r"train and evaluate must be functions, got .* and \{\}"):
        next(lottery.find_ticket(Toy(), train, {}, sparsity=0.5))
    with pytest.raises(lottery.LotteryError, match=r"train must return a state_dict or None, got float"):
        next(lottery.find_ticket(Toy(), lambda ticket: 0.5, lambda m: {}, sparsity=0.5))


def test_a_search_goes_on_in_a_round_of_its_own_alone():
    def resume(ticket):
        ticket.prune(7)
        ticket.round = 1
        return ""

    with pytest.raises(lottery.LotteryError, match=r"round 1 keeps 7, the search has rounds of \[10, 8, 6, 5\]"):
        next(lottery.find_ticket(Toy(), train_toy, lambda m: {}, sparsity=0.5, resume=resume))


# ---------------------------------------------------------------------------- state


class Counting(nn.Module):
    """A weight, and buffers that a state_dict leaves out: a count, rebound at each call, and a mask."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("mask", torch.full((2,), -INF), persistent=False)

    def forward(self, x):
        self.calls = self.calls + 1
        return self.linear(x)


def test_buffers_that_a_state_dict_leaves_out_are_rewound_and_hashed():
    model, hashes = Counting(), []
    assert "calls" not in model.state_dict() and lottery.state_of(model)["calls"] is model.calls

    def train(ticket):
        assert int(ticket.model.calls) == 0
        hashes.append(ticket.start_sha256)
        ticket.model(torch.zeros(1, 4))
        if ticket.round == 1:
            ticket.model(torch.zeros(1, 4))
        ticket.hold()

    rows = [found.row for found in lottery.find_ticket(model, train, lambda m: {}, sparsity=0.4)]
    assert int(model.calls) == 1 and len(rows) == 3
    state = lottery.copy_state(model)
    assert lottery.sha256(state) == rows[2]["last_sha256"] == rows[2]["trained_sha256"]
    state["calls"] += 1
    assert lottery.sha256(state) != rows[2]["last_sha256"]
    assert rows[0]["rewind_sha256"] == hashes[0] == rows[0]["start_sha256"]
    lottery.load_state(model, state)
    assert int(model.calls) == 2
    lottery.load_state(model, model.state_dict())  # without them: they stay
    assert int(model.calls) == 2


def test_hashes_of_models_without_such_buffers_are_what_they_were():
    assert lottery.Ticket(Toy()).start_sha256 == "1182c2cead361fb680d09bd8ed46535cd7bd57a00199ae61e2ddb7e7876e3bc8"
    model = nn.Sequential(nn.LSTM(3, 2), nn.BatchNorm1d(3))
    for parameter in model.parameters():
        parameter.data.fill_(0.5)
    assert lottery.Ticket(model).start_sha256 == "851e88b7f7f9c2c21172b3b33bae9d1e7b292ce84ec1e18f3646aa5e116ab319"
    model[0].weight_hh_l0 = nn.Parameter(torch.zeros(8, 2))
    model.append(nn.LSTM(3, 2))
    model[2].weight_hh_l0 = model[0].weight_hh_l0  # both names count, as in a state_dict
    assert lottery.state_of(model).keys() == model.state_dict().keys()
    assert lottery.sha256(lottery.state_of(model)) == lottery.sha256(model.state_dict())


def test_buffers_may_grow():
    class Growing(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("seen", torch.tensor([]))

    model = Growing()

    def train(ticket):
        assert model.seen.shape == (0,)
        model.seen.resize_(3).fill_(7)

    for found in lottery.find_ticket(model, train, lambda m: {"seen": m.seen.tolist()}, sparsity=0.5):
        assert found.row["seen"] == [7, 7, 7]


def test_hashing_has_no_side_effect():
    model = Toy()
    model.register_buffer("seen", torch.zeros(2))
    lottery.Ticket(model)
    for tensor in lottery.state_of(model).values():
        assert tensor.untyped_storage().resizable()
    model.seen.resize_(9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_prepared_for_quantisation_is_pruned():
    quantization = torch.ao.quantization
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    model = quantization.prepare_qat(model)

    def train(ticket):
        optimizer = torch.optim.SGD(ticket.model.parameters(), 0.1)
        for _ in range(2):
            optimizer.zero_grad()
            ticket.model(torch.randn(3, 6)).square().sum().backward()
            ticket.hold()
            optimizer.step()
            ticket.stepped()

    rows = [found.row for found in lottery.find_ticket(model, train, lambda m: m.eval() and {}, sparsity=0.4)]
    assert [row["kept"] for row in rows] == [40, 32, 26, 24] and len({row["rewind_sha256"] for row in rows}) == 1


# ---------------------------------------------------------------------------- models that are refused


class Extra(nn.Linear):
    def get_extra_state(self):
        return {"step": 1}

    def set_extra_state(self, state):
        pass


def lazy():
    return nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2))


def quantised():
    model = nn.Sequential(nn.Linear(3, 4), nn.LSTM(4, 4))
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def sparse():
    model = Toy()
    model.register_buffer("edges", torch.eye(3).to_sparse())
    return model


def expanded():
    model = Toy()
    model.register_buffer("positions", torch.arange(3).expand(2, 3))
    return model


def of_one_storage():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    return model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "make, message",
    [
        (expanded, r"positions was expanded, and elements that share a place cannot be put back: clone\(\) it"),
        (of_one_storage, r"0.weight and 1.weight share their memory: make them one parameter, or clone\(\) one"),
        (lambda: nn.Sequential(Extra(3, 3)), r"0._extra_state is state, but neither a parameter nor a buffer"),
        (quantised, r"0._packed_params.* is state, but neither a parameter nor a buffer"),
        (lazy, r"1.(bias|weight) has no shape yet: run the model once"),
        (sparse, "edges is quantised, sparse or on the meta device"),
        (lambda: Toy().to("meta"), "a.weight is quantised, sparse or on the meta device"),
        (
            lambda: Toy().to(torch.complex64),
            "a.weight must be float32, bfloat16, float16 or float64, got torch.complex64",
        ),
    ],
)
def test_models_that_cannot_be_rewound_are_refused_by_name(make, message):
    with pytest.raises(lottery.LotteryError, match=message):
        lottery.Ticket(make())


def test_a_state_dict_that_leaves_out_frozen_parts():
    class Adapter(nn.Sequential):
        def state_dict(self, *args, **kwargs):
            return {name: value for name, value in super().state_dict(*args, **kwargs).items() if name[0] != "0"}

    model = Adapter(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 2))
    for found in lottery.find_ticket(
        model, lambda ticket: ticket.hold() or copy.deepcopy(ticket.model.state_dict()), lambda m: {}, sparsity=0.5
    ):
        assert found.ticket.rewind_state.keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert found.row["kept"] == 12 and int((model[0].weight != 0).sum()) == found.row["kept_per_layer"]["0.weight"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"c.weight": torch.ones(1)}, "c.weight is not in the model: made later, or another's"),
        (lambda s: {"a.weight": s["a.weight"]}, "a.bias is not in the state: made later, or another's"),
        (
            lambda s: s | {"a.bias": torch.ones(3)},
            r"a.bias is torch.float32 \[3\] in the state, torch.float32 \[2\] in",
        ),
        (lambda s: s | {"b.bias": torch.ones(1).double()}, r"b.bias is torch.float64 \[1\] in the state"),
    ],
)
def test_states_of_other_models_are_refused_by_name(change, message):
    model = Toy()
    with pytest.raises(lottery.LotteryError, match=message):
        lottery.load_state(model, change(lottery.copy_state(model)))


REFERENCE = lottery.Ops(
    lottery.reference_hold_ticket_,
    lottery.reference_global_magnitude_masks,
    lottery.reference_block_norms,
    False,
    "here",
)


@pytest.mark.parametrize("ops", [REFERENCE, lottery.ops], ids=["reference", "chosen"])
def test_dtypes_may_be_mixed_on_every_path(monkeypatch, ops):
    monkeypatch.setattr(lottery, "ops", ops)
    model = Toy()
    model.b.to(torch.bfloat16)

    def train(ticket):
        ticket.model.a.weight.grad = torch.ones_like(ticket.model.a.weight)
        ticket.model.b.weight.grad = torch.ones_like(ticket.model.b.weight)
        ticket.hold()

    for found in lottery.find_ticket(model, train, lambda m: {}, sparsity=0.5):
        masks = found.ticket.masks
    assert torch.equal(masks["a.weight"], bits([0, 0, 0], [0, 0, 1])) and masks["b.weight"].all()
    assert model.b.weight.dtype == torch.bfloat16


def test_the_start_line_says_what_is_true_for_the_device():
    ops = lottery.Ops(None, None, None, True, "compiled C++ (AVX2, OpenMP)", {"cpu"})
    assert ops.path_on("cpu") == "compiled C++ (AVX2, OpenMP)"
    assert ops.path_on("cuda:1") == ("pure PyTorch on cuda:1: this build is compiled C++ (AVX2, OpenMP), for cpu alone")
    assert ops._replace(devices={"cpu", "cuda"}).path_on("cuda") == "compiled C++ (AVX2, OpenMP)"
    assert REFERENCE.path_on("cuda") == "here"
    assert lottery.ops.path_on("cpu") == lottery.ops.path


# ---------------------------------------------------------------------------- optimizers that move zeros


def search_with(optimizer_of, after_step):
    """Two rounds of a small network; optimizer_of(model) is asked anew in each round."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False))
    x, y = torch.randn(16, 8), torch.randn(16, 4)

    def train(ticket):
        optimizer = optimizer_of(ticket.model)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.mse_loss(ticket.model(x), y).backward()
            ticket.hold()
            optimizer.step()
            if after_step:
                ticket.after_step()
            ticket.stepped()

    for found in lottery.find_ticket(model, train, lambda m: {}, sparsity=0.5):
        zeros = sum(int((w == 0).sum()) for w in found.ticket.weights.values())
        assert zeros == 96 - found.row["kept"]
    return found.row["kept"]


def muon(model):
    return torch.optim.Muon(model.parameters(), lr=0.02)


def reused_adamw():
    """One optimizer for all rounds: the momentum of the round before moves weights whose gradient is 0."""
    made = []

    def optimizer_of(model):
        made.append(made[0] if made else torch.optim.AdamW(model.parameters(), lr=0.02))
        return made[0]

    return optimizer_of


@pytest.mark.parametrize("optimizer_of", [lambda: muon, reused_adamw], ids=["Muon", "reused AdamW"])
def test_optimizers_that_move_zeros(optimizer_of):
    with pytest.raises(
        lottery.LotteryError, match=r"a pruned weight is not 0: hold\(\) was not .* call after_step\(\) too"
    ):
        search_with(optimizer_of(), after_step=False)
    assert search_with(optimizer_of(), after_step=True) == 48
