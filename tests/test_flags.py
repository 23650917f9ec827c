"""The table of flags: what is part of a run's identity, and that old configurations still mean the same."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lottery
import models
from lab import controls
from runner import flags, recipes, settings

RESULTS = flags.HERE / "results"
WITH_TICKET = ["rounds", "ticket_weights", "control", "dense"]
FOUND = {"data_sha256", "ticket_sha256", "lm_sha256", "init_sha256", "noise_sha256", "dense"}  # when a run begins
WAYS = {"noise_draws", "normalization", *controls.FOLLOWING}  # the words of settings.ways: no flag says them


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def refused(capsys, *argv) -> str:
    """The one line on stderr, without the program's name; exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        flags.parse([str(word) for word in argv])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.count("\n") == 1 and line.startswith("train.py: error: ")
    return line.removeprefix("train.py: error: ").strip()


def identity(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "machine" and key not in FOUND | WAYS}


def of(*argv) -> dict:
    return flags.configuration(flags.parse([str(word) for word in argv]))


def source_of(monkeypatch, config: dict, rounds=range(1, 40), **paths) -> None:
    """--ticket reads a run of these settings, with a ticket of each round."""
    settings = {key: value for key, value in config.items() if key not in ("machine", *WITH_TICKET)}
    masks = {number: {} for number in rounds}
    there = dict.fromkeys(controls.PATHS) | {"data": "demo"} | paths
    found = controls.Source(Path("run"), settings, [], masks, {}, {}, there)
    monkeypatch.setattr(controls, "read_source", lambda path: found)


def again(config: dict, monkeypatch) -> dict:
    """The configuration that the command line of this one gives."""
    argv = flags.command_line(config)
    argv += ["--noise", "x"] if "noise_sha256" in config else []
    argv += ["--data", "x"] if config.get("corpus", "manifests") != "manifests" else []
    if config["machine"].get("ticket"):
        source_of(monkeypatch, config)
        argv += ["--ticket", str(RESULTS)]  # a folder: controls want one
    return of(*argv)


# ---------------------------------------------------------------------------- the table


def test_each_flag_stands_once():
    names = [flag.name for flag in flags.TABLE]
    assert len(names) == len(set(names)) == 53
    groups = list(dict.fromkeys(flag.group for flag in flags.TABLE))
    assert groups == [flags.TRAIN, flags.DATA, flags.PRUNE, flags.TEST, flags.MACHINE]
    fields = {field.name for field in dataclasses.fields(recipes.Recipe)}
    assert {flag.name for flag in flags.TABLE if flag.identity == "recipe"} < fields


def test_what_makes_the_identity():
    by = {
        kind: [flag.name for flag in flags.TABLE if flag.identity == kind] for kind in ("recipe", "changed", "machine")
    }
    assert by["recipe"] == [
        "epochs", "batch_size", "batch_seconds", "accumulate", "lr", "anneal", "seconds", "speeds", "amp",
    ]  # fmt: skip
    changed = ["recipe_name", "rounds", "ticket_weights", "control", "skip_broken", "block", "scope", "min_remaining"]
    changed += ["keep_dense", "test", "marks", "snr", "test_snr"]
    assert by["changed"] == changed
    assert by["machine"] == ["init", "ticket", "dense", "data", "lm", "noise", "device", "threads", "cache"]
    assert flags.DECODING == ("beam", "lm_weight", "word_score")
    masks = ["sparsity", "prune_rate", "rewind_step", "block", "scope", "min_remaining"]
    assert [flag.name for flag in flags.TABLE if flag.masks] == [*masks, "keep_dense"]
    assert [flag.name for flag in flags.TABLE if flag.with_ticket] == WITH_TICKET
    assert flags.NOT_OF_DENSE == (*WITH_TICKET, *masks)


# ---------------------------------------------------------------------------- configurations


def test_the_configuration_without_flags():
    assert of("--threads", 1, "--device", "cpu") == {
        "backbone": "rnnt", "size": "demo", "seed": 0, "corpus": "manifests", "tokens": "chars",
        "train_sets": None, "valid_sets": None, "test_sets": None,
        "sparsity": 0.9, "prune_rate": 0.2, "rewind_step": 0,
        "margin": 0.01, "beam": 1, "lm_weight": None, "word_score": None, "lm_sha256": None,
        "epochs": 18, "batch_size": 8, "batch_seconds": None, "accumulate": 1, "lr": 0.004, "schedule": "one-cycle",
        "clip": 5.0, "seconds": [0.0, 10.0], "weight_decay": 1e-05, "betas": [0.95, 0.999], "amp": False,
        "augment": {"freq_masks": 1, "freq_width": 10, "time_masks": 1, "time_width": 10, "time_share": 0.1},
        "processes": 1,
        "machine": {
            "device": "cpu", "threads": 1, "data": "demo", "cache": "memory",
            "lm": None, "ticket": None, "dense": None, "init": None, "noise": None,
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    "argv, more",
    [
        (["--block", "1x4"], {"block": [1, 4], "scope": "lamp"}),
        (["--block", "8x1", "--scope", "global"], {"block": [8, 1]}),
        (["--scope", "layer", "--min-remaining", ".1"], {"scope": "layer", "min_remaining": 0.1}),
        (["--keep-dense", "output", "encoder.*"], {"keep_dense": ["output", "encoder.*"]}),
        (["--noise", "x", "--snr", "-5:10"], {"snr": [-5.0, 10.0]}),
        (["--noise", "x", "--test-snr", "20,-0,-5"], {"test_snr": [20.0, 0.0, -5.0]}),
        (["--batch-seconds", "60", "--accumulate", "4"], {"batch_seconds": 60.0, "accumulate": 4}),
        (["--seconds", "0.5:7", "--lr", "1e-3"], {"seconds": [0.5, 7.0], "lr": 0.001}),
        (["--block", "1x1", "--scope", "global", "--min-remaining", "0", "--lm", "none"], {}),
        (["--no-test"], {"test": False}),
        (["--speeds", "0.9,1,1.1"], {"speeds": [0.9, 1.0, 1.1]}),
        (["--speeds", "1"], {}),
        (["--threads", "1", "--workers", "2", "--cache", "none", "--out", "x", "--save-every", "1"], {}),
    ],
)
def test_what_a_flag_adds(argv, more):
    assert identity(of(*argv)) == identity(of()) | more
    line = flags.command_line(of(*argv))
    assert identity(of(*line, *(["--noise", "x"] if "--noise" in argv else []))) == identity(of(*argv))


@pytest.mark.parametrize(
    "run, of_ticket",
    [
        ("imp-cnn-lstm-0", {}),
        ("lamp-rnnt-2", {"scope": "lamp"}),
        ("b8x1-global-cnn-lstm-0", {"block": [8, 1]}),
        ("b8x1-lamp36-cnn-lstm-1", {"block": [8, 1], "scope": "lamp"}),
        ("conf48-late-lamp-2", {"scope": "lamp"}),
        ("noise-lamp-cnn-lstm-1", {"scope": "lamp", "snr": [0.0, 20.0]}),
        ("ep60-rnnt-0", {"rounds": [0, 10, 14]}),
        ("random-init-imp-cnn-lstm-2", {"control": "random-init"}),
    ],
)
def test_old_configurations_give_their_command_line(run, of_ticket, monkeypatch):
    config = json.loads((RESULTS / "prompts" / run / "config.json").read_text())
    assert of_ticket.items() <= config.items()
    assert identity(again(config, monkeypatch)) == identity(config)


def test_every_old_configuration_is_understood(monkeypatch):
    configs = [json.loads(path.read_text()) for path in sorted(RESULTS.rglob("config.json"))]
    assert len(configs) > 150
    for config in configs:
        found, said = identity(again(config, monkeypatch)), identity(config)
        if said.pop("data", None):  # the first ones, which do not name what came later
            found = {key: value for key, value in found.items() if key in said}
        assert found == said


def test_a_command_line():
    config = identity(of("--block", "1x4", "--batch-seconds", "9", "--seconds", "1:2", "--epochs", 3))
    line = flags.command_line(config | {"rounds": [0, 2], "train_sets": ["a", "b"], "amp": True})
    assert line == [
        "--backbone=rnnt", "--size=demo", "--epochs=3", "--batch-seconds=9.0", "--accumulate=1", "--lr=0.004",
        "--seconds=1.0:2.0", "--speeds=1.0", "--amp", "--seed=0", "--rounds", "0", "2", "--ticket-weights=rewind",
        "--corpus=manifests", "--train-sets", "a", "b", "--tokens=chars", "--sparsity=0.9", "--prune-rate=0.2",
        "--rewind-step=0", "--block=1x4", "--scope=lamp", "--min-remaining=0.0", "--test", "--margin=0.01",
        "--marks=0.41,0.168,0.107,0.044", "--beam=1",
        "--recipe=demo", "--no-skip-broken",  # else those of the ticket's run
    ]  # fmt: skip


AN4 = {
    "cnn-lstm": {"epochs": 80},
    "rnnt": {"epochs": 60, "lr": 0.0025, "dropout": 0.3, "ctc_weight": 1.0},
    "conformer": {"epochs": 60, "dropout": 0.3},
}


@pytest.mark.parametrize("backbone", AN4)
def test_recipes_by_name(backbone, monkeypatch):
    plain = of("--backbone", backbone)
    assert "recipe_name" not in plain and of("--backbone", backbone, "--recipe", "demo") == plain
    an4 = of("--backbone", backbone, "--recipe", "an4")
    masks = {"freq_masks": 1, "freq_width": 10, "time_masks": 1, "time_width": 10, "time_share": 0.1}
    own = {"recipe_name": "an4", "speeds": [0.9, 1.0, 1.1], "augment": masks, **AN4[backbone]}
    assert identity(an4) == identity(plain) | own
    assert "--recipe=an4" in flags.command_line(an4) and of(*flags.command_line(an4)) == an4
    assert of("--backbone", backbone, "--recipe", "an4", "--epochs", 7)["epochs"] == 7
    monkeypatch.setattr(flags, "installed", lambda module: True)
    paper = of("--backbone", backbone, "--recipe", "paper")
    assert paper["size"] == "demo" and paper["recipe_name"] == "paper" and paper["schedule"] != "one-cycle"
    large = of("--backbone", backbone, "--size", "paper")
    assert identity(of("--backbone", backbone, "--size", "paper", "--recipe", "paper")) == identity(large)
    assert identity(of(*flags.command_line(large))) == identity(large)


@pytest.mark.parametrize("backbone, layers", [("cnn-lstm", 1), ("rnnt", 1), ("conformer", 5)])
def test_a_recipe_may_have_dropout_and_a_weight_of_ctc_of_its_own(backbone, layers):
    model, recipe = models.build(backbone, "demo", 5), recipes.RECIPES[backbone, "demo"]

    def found():
        return [m.p for m in model.modules() if isinstance(m, nn.Dropout)], getattr(model, "ctc_weight", None)

    of_size = found()
    recipes.settle(model, recipe)
    assert found() == of_size and len(of_size[0]) == layers
    args = argparse.Namespace(recipe=dataclasses.replace(recipe, dropout=0.45, ctc_weight=3.0))
    setting = settings.Setting(args, {}, {}, [], model, lambda model: None, [], "memory")  # as a run has it
    assert found() == ([0.45] * layers, 3.0)
    model = models.build(backbone, "demo", 5)
    dataclasses.replace(setting, model=model)  # as the control dense-small does
    assert found() == ([0.45] * layers, 3.0)


# ---------------------------------------------------------------------------- --ticket

WRONG = [
    ("seed", "3", "must be a whole number"), ("seed", -1, "must be at least 0"), ("seed", True, "must be a whole"),
    ("size", "huge", "must be one of demo, wide, wider, paper"), ("size", 5, "must be one of"),
    ("snr", [20.0, 0.0], "must be LO:HI with LO <= HI, got '20.0:0.0'"), ("snr", "0:5", "must be a list"),
    ("seconds", [5.0, 1.0], "must be LO:HI"), ("seconds", [0.0, 1e9], "must be LO:HI"),
    ("min_remaining", {}, "must be a number"), ("corpus", "x", "must be one of manifests"), ("lr", None, ""),
    ("lr", "0.1", "must be a number"), ("epochs", 2**31, "must be at least 1 and at most 10000"),
    ("block", [0, 1], "must be RxC"), ("amp", "yes", "must be true or false"), ("train_sets", "a", "must be a list"),
    ("tokens", "--download", "must be a text that does not begin with -"), ("batch_seconds", "x", "must be a number"),
]  # fmt: skip


@pytest.mark.parametrize("key, value, why", WRONG)
def test_settings_of_a_ticket_go_through_the_flags_types(key, value, why, monkeypatch, capsys):
    config = of("--noise", "x", "--snr", "0:5") | {key: value}
    source_of(monkeypatch, config, noise="x")
    if value is None:  # as if it were not there
        assert flags.parse(["--ticket", str(RESULTS)]).recipe.lr == recipes.RECIPES["rnnt", "demo"].lr
        return
    assert f"--ticket run, {key}: {why}" in refused(capsys, "--ticket", RESULTS)
    with pytest.raises(lottery.LotteryError, match=rf"config.json, {key}: "):
        flags.command_line(config)


def test_a_ticket_s_run_gives_the_defaults(monkeypatch, capsys):
    config = of("--block", "2x3", "--noise", "x", "--snr", "0:5", "--epochs", 3, "--lr", 0.1, "--seed", 7)
    source_of(monkeypatch, config, [1, 2], noise="x")
    assert identity(of("--ticket", "x")) == identity(config) | {"rounds": [0, 1, 2]}
    assert "snr" not in of("--ticket", "x", "--noise", "none")
    assert of("--ticket", "x", "--epochs", 4, "--rounds", 2)["epochs"] == 4
    source_of(monkeypatch, of("--noise", "x", "--test-snr", "10,0"), [1, 2], noise="x")  # its noise is the test's
    found = of("--ticket", "x", "--no-test")
    assert not found["test"] and "test_snr" not in found and found["machine"]["noise"] is None
    source_of(monkeypatch, config, [1, 2], noise="x")
    assert "snr" in of("--ticket", "x", "--no-test")
    said = refused(capsys, "--ticket", "x", "--block", "1x1")
    assert said == "--block is 2x3 in x, whose masks were made so: leave it out"
    said = refused(capsys, "--ticket", "x", "--sparsity", 0.5)
    assert said == "--sparsity is 0.9 in x, whose masks were made so: leave it out"
    assert refused(capsys, "--ticket", "x", "--rounds", 7) == "--rounds 7: x has 1, 2"
    source_of(monkeypatch, config, [1, 2], data=None)
    assert "give --data" in refused(capsys, "--ticket", "x")


# ---------------------------------------------------------------------------- what cannot be

SPEEDS = "from 0.5 to 2, each above the one before and of two decimals at most"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--threads", "0"], "--threads must be at least 1 and at most 1024, got 0"),
        (["--threads", "1025"], "--threads must be at least 1 and at most 1024, got 1025"),
        (["--threads", "two"], "argument --threads: invalid int value: 'two'"),
        (["--seed", 2**31], "--seed must be at least 0 and below 2^31, got 2147483648"),
        (["--save-every", "nan"], "--save-every must be at least 0 and at most 1000000, got nan"),
        (["--retrain", "run", "two"], "--retrain RUN ROUND: ROUND must be a whole number of at least 0, got 'two'"),
        (["--retrain", "run", "-1"], "--retrain RUN ROUND: ROUND must be a whole number of at least 0, got '-1'"),
        (["--retrain", "run", "1.5"], "--retrain RUN ROUND: ROUND must be a whole number of at least 0, got '1.5'"),
        (["--retrain", "run"], "argument --retrain: expected 2 arguments"),
        (
            ["--retrain", "run", "1", "--data=x"],
            "--retrain takes all settings from the run, and no flag beside it but --cache: got --data",
        ),
        (
            ["--seed", "7", "--retrain", "run", "1"],
            "--retrain takes all settings from the run, and no flag beside it but --cache: got --seed",
        ),
        (
            ["--plan", "--sparsity", "0.5"],
            "--plan is of paper sizes, and takes no flag beside it but --epochs and --prune-rate: got --sparsity",
        ),
        (["--no-test", "--beam", "4"], "--beam is of the test, and with --no-test there is none"),
        (
            ["--no-test", "--backbone", "cnn-lstm", "--lm", "README.md"],
            "--lm is of the test, and with --no-test there is none",
        ),
        (["--rounds", "1"], "--control, --rounds, --dense and --ticket-weights go with --ticket"),
        (["--speeds", "1,0.9"], f"argument --speeds: must be A,B,... {SPEEDS}, got '1,0.9'"),
        (["--speeds", "1.234"], f"argument --speeds: must be A,B,... {SPEEDS}, got '1.234'"),
        (["--speeds", "fast"], "argument --speeds: must be A,B,..., speeds, got 'fast'"),
        (["--beam", "0"], "--beam must be at least 1 and at most 100000, got 0"),
    ],
)
def test_unusable_flags(capsys, argv, message):
    assert refused(capsys, *argv) == message


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--backbone", "cnn-lstm", "--lm", __file__], "--lm: the package is not there: pip install flashlight-text=="),
        (["--backbone", "conformer", "--beam", 4], "--beam 4: the package is not there: pip install flashlight-text=="),
        (["--tensorboard"], "--tensorboard: the package is not there: pip install tensorboard, or 'audio-lottery[tens"),
        (["--tokens", "bpe:9"], "--tokens bpe:9: the package is not there: pip install sentencepiece"),
    ],
)
def test_a_package_is_missed_before_anything_is_read(capsys, monkeypatch, argv, message):
    monkeypatch.setattr(flags, "installed", lambda module: True)
    flags.parse([str(word) for word in argv])
    monkeypatch.setattr(flags, "installed", lambda module: module == "matplotlib")
    assert refused(capsys, *argv).startswith(message)
    assert flags.parse(["--beam", "4"]).beam == 4  # the transducer's search needs none
    monkeypatch.setattr(flags, "installed", lambda module: module != "matplotlib")
    assert refused(capsys) == "report.png: the package is not there: pip install matplotlib"


def test_installed():
    assert flags.installed("torch.nn") and not flags.installed("torch.nowhere.at_all")


# ---------------------------------------------------------------------------- what flags do


def test_threads():
    torch.set_num_threads(1)
    assert of("--threads", 2)["machine"]["threads"] == torch.get_num_threads() == 2
    assert flags.parse([]).threads is None and torch.get_num_threads() == 2


def test_retrain_is_a_path_and_a_number():
    assert flags.parse(["--retrain", "runs/a", "02"]).retrain == (Path("runs/a"), 2)


def test_the_scope_of_blocks():
    assert flags.parse([]).pruning == lottery.Pruning((1, 1), "global", 0.0)
    assert flags.parse(["--block", "1x4"]).pruning == lottery.Pruning((1, 4), "lamp", 0.0)


@pytest.mark.parametrize("columns", [80, 120])
def test_help(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stopped:
        flags.parse(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "usage: train.py [flags]\n" in text
    assert columns - 30 < max(map(len, text.splitlines())) < columns
    titles = [line.rstrip(":") for line in text.splitlines() if line.endswith(":") and line[0] != " "]
    assert titles == ["options", "what to train", "on what (data)", "how to prune", "how to test (decoding, noise)",
                      "the machine"]  # fmt: skip
    told = " ".join(text.split())
    for part in (
        "--sparsity SHARE share of the prunable weights that the last round has removed (at least 0, below 1; "
        "default: 0.9)",
        "passes over the training speech in each round (at least 1 and at most 10000; default: the recipe's: 18 for",
        "--threads N threads that compute on the CPU (at least 1 and at most 1024; default: torch's own)",
        "train a round of a finished run again and compare it bit for bit with the ledger (ROUND at least 0)",
    ):
        assert part in told
    assert "None" not in text and "False" not in text and text.endswith("Words: docs/glossary.md.\n")
    for flag in flags.TABLE:
        assert f"  {flag.option}" in text


def test_marks_are_part_of_a_run_and_not_of_its_dense_network(capsys):
    assert "marks" not in of() and "marks" not in of("--marks", "0.41,0.168,0.107,0.044")  # as runs of before
    assert of("--marks", "0.5,0.25")["marks"] == [0.5, 0.25]
    assert "--marks=0.5,0.25" in flags.command_line(of("--marks", "0.5,.25"))
    for text, why in (("0.5,0.5", "each below the one before"), ("1,0.5", "between 1 and 0"), ("41", "between 1 and 0"),
                      ("0.5,0", "between 1 and 0"), ("a", "shares of the weights"), ("nan", "each below")):  # fmt: skip
        said = refused(capsys, "--marks", text)
        assert said.startswith("argument --marks: must be A,B,...") and why in said and repr(text) in said


def test_the_commands_of_an4_are_understood():
    """Each writes where no other does; what it takes tickets from is shipped, or made by a line above."""
    made, here = set(), flags.HERE
    for line in (here / "results" / "an4" / "runs.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        program, script, *argv = line.split()
        assert (program, script) == ("python", "train.py")
        args = flags.parser().parse_args(argv)
        sources = {args.ticket, args.dense} - made - {None}
        shipped = all(path.parts[0] in ("results", "tickets") and (here / path).exists() for path in sources)
        assert args.out not in made and shipped, line
        assert args.threads == 1 and (args.ticket or args.recipe_name == "an4")
        made.add(args.out)
    assert len(made) == 88
