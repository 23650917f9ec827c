"""Networks are built of sizes that the tensors confirm, and of no others."""

import random

import lies
import pytest
import torch

import lottery
import models
import transcribe
from audio_lottery import files, ledger
from bench.measure import peak_memory
from lab import controls, networks, plan
from runner import flags, recipes

SMALL = {
    "cnn-lstm": dict(
        features="log-mel",
        channels=2,
        kernels=[[5, 3], [3, 3]],
        strides=[[2, 2], [2, 2]],
        hidden=8,
        layers=1,
        dropout=0,
    ),
    "rnnt": dict(window=12, channels=8, hidden=12, layers=1, predictor=8, joiner=8, dropout=0.1),
    "conformer": dict(channels=2, width=16, heads=2, blocks=1, kernel=3, dropout=0.1),
}
TOKENS = ["<blank>", *"abc"]


def test_every_table_has_every_backbone():
    names = set(models.BACKBONES)
    for table in (ledger.BACKBONES, recipes.AN4, networks.SIZES, networks.DEPTH, controls.WIDTHS):
        assert set(table) == names, table
    assert set(recipes.RECIPES) == {(name, recipe) for name in names for recipe in recipes.RECIPE_NAMES}


@pytest.fixture
def ticket(tmp_path, request):
    backbone = getattr(request, "param", "rnnt")
    torch.manual_seed(0)
    model = models.BACKBONES[backbone](len(TOKENS), **SMALL[backbone])
    found = lottery.Ticket(model)
    found.prune(found.kept // 2)
    found.rewind()
    info = {"backbone": backbone, "sizes": SMALL[backbone], "tokens": TOKENS, "features": model.features, "seed": 0}
    info |= {"size": "demo", "sparsity": 0.5, "prune_rate": 0.5, "margin": 0.01, "data_sha256": lies.SHA}
    files.save_ticket(tmp_path / "t", found.masks, found.rewind_state, model.state_dict(), info)
    return lies.Lying(tmp_path / "t", random.Random(0))


@pytest.mark.parametrize("ticket", list(SMALL), indirect=True)
def test_a_ticket_as_it_was_written(ticket):
    model = networks.described(ticket.info, ticket.trained)
    assert all(p.device.type == "meta" for p in model.parameters())
    built = networks.of(ticket.info, ticket.trained)
    assert lottery.sha256(built.state_dict()) == lottery.sha256(ticket.trained)
    for backbone, sizes in SMALL.items():  # and what the code itself calls by a name
        for whole in models.BACKBONES[backbone].SIZES.values():
            networks.check_sizes(backbone, whole, 1000)
        assert networks.parameters(backbone, sizes, 4) > 0


@pytest.mark.parametrize("ticket", list(SMALL), indirect=True)
@pytest.mark.parametrize("value", [10**9, 2**62, 0, -1, "x", None, True, 1.5])
def test_every_size_is_bounded_and_confirmed(ticket, value):
    def refused():
        for key in ticket.info["sizes"]:
            wrong = {**ticket.info, "sizes": ticket.info["sizes"] | {key: value}}
            if key == "dropout" and value == 0:
                continue
            with pytest.raises(lottery.LotteryError, match="its backbone, sizes or tokens do not fit"):
                networks.of(wrong, ticket.trained)

    assert peak_memory(refused) < 100e6


@pytest.mark.parametrize(
    "change, why",
    [
        ({"backbone": "abacus"}, "backbone: must be one of cnn-lstm, rnnt, conformer, got 'abacus'"),
        ({"backbone": []}, "backbone: must be one of"),
        ({"backbone": "cnn-lstm"}, "sizes: a value is missing"),
        ({"sizes": None}, "sizes: must be an object"),
        (
            {"sizes": SMALL["rnnt"] | {"dropout": float("nan")}},
            "sizes, dropout: must be a number from 0 to 0.999, got nan",
        ),
        ({"sizes": SMALL["rnnt"] | {"window": 3}}, "sizes, window: must be a whole number from 4 to 1000, got 3"),
        ({"sizes": SMALL["rnnt"] | {"layers": 1000}}, "sizes, layers: must be a whole number from 1 to "),
        ({"sizes": SMALL["rnnt"] | {"joiner": 9}}, "the ticket's parameters are not its network's: "),
        ({"tokens": TOKENS[:-1]}, "embedding.weight is (4, 8) float32, not (3, 8) float32"),
        ({"tokens": [1, 2, 3, 4]}, "tokens[0]: must be a text of at most 1000 characters, got 1"),
        ({"tokens": [*TOKENS[:-1], None]}, "tokens[3]: must be a text"),
        ({"tokens": [*TOKENS[:-1], []]}, "tokens[3]: must be a text"),
        ({"tokens": [*TOKENS[:-1], "\ud800"]}, "tokens[3]: must be a text"),
        ({"tokens": [*TOKENS[:-1], "a"]}, "tokens: must be different from each other"),
        ({"tokens": "abcd"}, "tokens: must be a list of 2 to 1000000 values"),
        ({"features": "log1p-stft"}, "features: must be one of log-mel"),
    ],
)
def test_what_a_ticket_cannot_be(change, why, ticket):
    with pytest.raises(lottery.LotteryError) as error:
        networks.described(ticket.info | change, ticket.trained)
    assert why in str(error.value)


@pytest.mark.parametrize("backbone, changes, why", [
    ("conformer", {"heads": 3}, "width must be an even number a head"),
    ("conformer", {"kernel": 4}, "kernels must be odd"),
    ("cnn-lstm", {"kernels": [[4, 3], [3, 3]]}, "kernels must be odd"),
    ("cnn-lstm", {"kernels": [[5, 3]]}, "kernels and strides must be as many"),
    ("cnn-lstm", {"strides": [[0, 2], [2, 2]]}, "strides[0][0]: must be a whole number from 1 to 255, got 0"),
])  # fmt: skip
def test_sizes_that_no_tensor_speaks_of(backbone, changes, why):
    with pytest.raises(lottery.LotteryError) as error:
        networks.check_sizes(backbone, SMALL[backbone] | changes, 100)
    assert why in str(error.value)


@pytest.mark.parametrize("kind", list(lies.TICKETS))
@pytest.mark.parametrize("seed", range(3))
def test_lying_tickets_are_one_line_each(kind, seed, ticket, capsys):
    lie, reader = lies.TICKETS[kind]
    ticket.rng.seed(seed)
    lie(ticket)
    if reader in ("file", "network"):
        for read in (transcribe.load, plan.of_ticket, controls.read_source):
            with pytest.raises(lottery.LotteryError, match=r"t(: |/ticket)"):
                read(ticket.path)
    with pytest.raises(SystemExit) as stopped:
        flags.parse(["--ticket", str(ticket.path), "--data", "."])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("train.py: error: ") and said.count("\n") == 1


def test_sizes_of_a_ledger_s_row_are_built_only_if_its_counts_confirm_them():
    with torch.device("meta"):
        model = models.Transducer(7, **SMALL["rnnt"])
    kept = {name: weight.numel() for name, weight in lottery.prunable(model).items()}
    assert plan.multiply_adds("rnnt", SMALL["rnnt"], kept, whole=True) > 0
    for sizes in (SMALL["rnnt"] | {"hidden": 60_000}, SMALL["rnnt"] | {"hidden": 10**9}, None, {}):
        with pytest.raises(lottery.LotteryError, match="sizes"):
            plan.multiply_adds("rnnt", sizes, kept, whole=True)
    gone = "predictor.weight_hh_l0"
    del kept[gone]
    assert plan.multiply_adds("rnnt", SMALL["rnnt"], kept, whole=True, exclude=[gone]) > 0
    with pytest.raises(lottery.LotteryError, match=f"tells of: {gone}"):
        plan.multiply_adds("rnnt", SMALL["rnnt"], kept, whole=True)
