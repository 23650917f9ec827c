"""Tickets of other runs, and their controls."""

import dataclasses
import json
import random
import subprocess
from pathlib import Path

import lies
import pytest
import soak
import torch
from test_train import refused

import lottery
import models
import train
import transcribe
from audio_lottery import files, ledger, verify
from lab import compare, controls, networks, plan, report, tables


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    soak.shrink_models(monkeypatch.setitem)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return soak.small_corpus(tmp_path_factory.mktemp("corpus"))


def run(*argv) -> None:
    assert train.main([str(a) for a in argv]) == 0


@pytest.fixture
def source(corpus, tmp_path_factory, request):
    """A search of two rounds, made once."""
    if not hasattr(request.module, "SOURCE"):
        request.module.SOURCE = tmp_path_factory.mktemp("source") / "run"
        flags = ("--backbone", "cnn-lstm", "--epochs", 1, "--sparsity", 0.36)
        run("--data", corpus, "--out", request.module.SOURCE, *flags, "--seed", 5)
    return request.module.SOURCE


def masks_of(folder: Path, number: int) -> lottery.Masks:
    return files.load_masks(folder / "masks" / f"{number:02d}.safetensors")


def kept(masks: lottery.Masks) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


def verified(folder: Path) -> bool:
    return not verify.failures(folder, networks)


def test_random_masks_by_hand():
    masks = {"a": torch.arange(12).view(3, 4) < 6, "b": torch.arange(4).view(2, 2) < 1, "new": torch.ones(2, 2) > 0}
    pruning = lottery.BY_MAGNITUDE
    anywhere = controls.random_masks(masks, ["new"], pruning, seed=0, matched=False)
    matched = controls.random_masks(masks, ["new"], pruning, seed=0, matched=True)
    assert kept(matched) == {"a": 6, "b": 1, "new": 4}
    counts = kept(anywhere)
    assert counts["new"] == 4 and counts["a"] + counts["b"] == 7
    others = [controls.random_masks(masks, ["new"], pruning, seed, matched=False) for seed in range(1, 20)]
    assert len({lottery.sha256(m) for m in others}) > 15
    assert {kept(m)["a"] for m in others} > {5, 6}  # 12 of 16 weights are a's: it keeps 5.25 of 7 on average
    fewer = {"a": torch.arange(12).view(3, 4) < 2, "b": torch.zeros(2, 2) > 0, "new": masks["new"]}
    for matched_too in (False, True):
        few = controls.random_masks(fewer, ["new"], pruning, 0, matched_too)
        many = controls.random_masks(masks, ["new"], pruning, 0, matched_too)
        assert not any((few[name] & ~many[name]).any() for name in masks)


@pytest.mark.parametrize(
    "size, share",
    [("demo", 0.05), pytest.param("demo", 0.5, marks=pytest.mark.slow)]
    + [pytest.param("paper", share, marks=pytest.mark.slow) for share in (0.05, 0.2)],
)
@pytest.mark.parametrize("backbone", list(models.BACKBONES))
def test_small_networks_are_within_a_hundredth_and_keep_their_heads(backbone, size, share, monkeypatch):
    network = models.BACKBONES[backbone]
    monkeypatch.setitem(network.SIZES, "demo", network.DEMO)  # not shrunk here
    monkeypatch.setitem(models.ConformerCtc.SIZES, "paper", models.ConformerCtc.SIZES["paper"] | {"blocks": 2})

    def parameters(sizes):
        with torch.device("meta"):
            return sum(p.numel() for p in network(29, **sizes).parameters())

    whole = network.SIZES[size]
    most = round(share * parameters(whole))
    found = controls.small_sizes(backbone, size, 29, most)
    assert 0.99 * most <= parameters(found) <= most
    for key in ("heads", "blocks", "layers", "kernel", "kernels"):
        assert found.get(key) == whole.get(key)
    shares = [
        found[key] / whole.get(key, 4 * whole.get("width", 0) or whole.get("channels"))
        for key in controls.WIDTHS[backbone]
    ]
    fills = 2 if backbone == "cnn-lstm" else 3  # the last of them, 0.1 % of the weights, takes what is left
    assert max(shares[:fills]) < 2 * min(shares[:fills])
    with pytest.raises(lottery.LotteryError, match="has 10 parameters or fewer"):
        controls.small_sizes(backbone, size, 29, 10)


def test_the_feed_forward_width_is_four_times_the_models_if_none_is_given():
    sizes = dict(models.ConformerCtc.SIZES["demo"])
    names = [{n: tuple(p.shape) for n, p in models.ConformerCtc(9, **sizes, **more).named_parameters()}
             for more in ({}, {"inner": 4 * sizes["width"]}, {"inner": 5})]  # fmt: skip
    assert names[0] == names[1]
    assert names[2]["blocks.0.feed_forward1.1.weight"] == (5, sizes["width"])


def test_controls_train_what_they_say(source, tmp_path):
    rows = ledger.read_ledger(source / "ledger.jsonl")
    theta = files.read_sealed(source / "rewind.safetensors", "rewind state")[0]
    found = {}
    for control in controls.CONTROLS:
        out = tmp_path / control
        run("--ticket", source, "--control", control, "--rounds", 2, "--out", out)
        assert verified(out)
        config = json.loads((out / "config.json").read_text())
        assert (config["seed"], config["epochs"], config["backbone"]) == (5, 1, "cnn-lstm")  # the source's
        dense, found[control] = ledger.read_ledger(out / "ledger.jsonl")
        assert dense["trained_sha256"] == rows[0]["trained_sha256"] and found[control]["round"] == 2
        assert config.get("mask_draws") == ("named" if control in controls.RANDOM else None)
        assert found[control]["source_mask_sha256"] == rows[2]["mask_sha256"]
    uniform, matched, init, small = (found[control] for control in controls.CONTROLS)
    assert uniform["kept"] == matched["kept"] == init["kept"] == rows[2]["kept"]
    assert matched["kept_per_layer"] == init["kept_per_layer"] == rows[2]["kept_per_layer"] != uniform["kept_per_layer"]
    assert init["mask_sha256"] == rows[2]["mask_sha256"] != matched["mask_sha256"]
    masked = {name: m for name, m in masks_of(tmp_path / "random-mask-matched", 2).items()}
    start = {n: v.masked_fill(~masked[n], 0) if n in masked else v for n, v in theta.items()}
    assert matched["start_sha256"] == lottery.sha256(start)  # the ticket's theta_0
    started = files.load_ticket(tmp_path / "random-init" / "ticket.safetensors").rewind
    name, mask = next(iter(masks_of(source, 2).items()))
    assert not (started[name][mask] == theta[name][mask]).any()
    assert small["remaining_all"] <= rows[2]["remaining_all"] and small["sizes"]["hidden"] < 8
    ((method, *_), *_) = compare.merge([compare.load(tmp_path / "dense-small")]).values()
    assert f"{small['parameters']:,} parameters" in tables.narrower(method.tickets()[0])


def test_random_init_draws_anew_in_each_round_and_seed():
    def drawn(seed, number):
        sizes = models.BACKBONES["cnn-lstm"].SIZES["demo"]
        return controls.fresh("cnn-lstm", sizes, 5, seed, number, "cpu").output.weight

    one = drawn(0, 1)
    assert torch.equal(one, drawn(0, 1)) and not (one == drawn(0, 2)).any() and not (one == drawn(1, 1)).any()


def test_a_control_is_resumed_and_retrained(source, corpus, tmp_path, monkeypatch):
    flags = ["--ticket", source, "--control", "random-init", "--rounds", 1, 2, "--save-every", 0, "--data", corpus]
    run(*flags, "--out", tmp_path / "whole")
    after_step, steps = train.Checkpointer.after_step, []

    def stop_in_round_2(self, ticket, *rest):
        steps.append(ticket.round)
        if ticket.round == 2:
            self.signals.number = 15
        after_step(self, ticket, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(train.Checkpointer, "after_step", stop_in_round_2)
        assert train.main([str(a) for a in [*flags, "--out", tmp_path / "cut"]]) == 128 + 15
    assert steps[-1] == 2
    run(*flags, "--out", tmp_path / "cut")
    results = [ledger.read_ledger(tmp_path / name / "ledger.jsonl") for name in ("whole", "cut")]
    assert [ledger.row_hash(row) for row in results[0]] == [ledger.row_hash(row) for row in results[1]]
    assert verified(tmp_path / "cut")
    train.train_again(tmp_path / "cut", 2)
    lines = (tmp_path / "cut" / "ledger.jsonl").read_text().splitlines()
    row = json.loads(lines[2]) | {"valid_wer": 0.125}
    row["timing_sha256"] = ledger.timing_hash(row)
    (tmp_path / "cut" / "ledger.jsonl").write_text("\n".join([*lines[:2], json.dumps(row)]) + "\n")
    with pytest.raises(lottery.LotteryError, match="round 2 trained again differs from the ledger in valid_wer"):
        train.train_again(tmp_path / "cut", 2)


def test_transfer_makes_token_layers_new(source, corpus, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "valid", "test"):
        rows = [
            json.loads(line) | {"text": f"{'éèà'[i % 3]}"} for i, line in enumerate(open(corpus / f"{split}.jsonl"))
        ]
        (other / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run("--ticket", source, "--data", other, "--out", tmp_path / "run")
    assert "round 2: made new and not pruned, for other tokens: output.weight" in capsys.readouterr().out
    assert verified(tmp_path / "run")
    dense, *rows = ledger.read_ledger(tmp_path / "run" / "ledger.jsonl")
    there = ledger.read_ledger(source / "ledger.jsonl")
    assert dense["data_sha256"] != there[0]["data_sha256"]  # trained here, for these data
    for row, old in zip(rows, there[1:]):
        layers = dict(row["kept_per_layer"])
        assert layers.pop("output.weight") == 4 * 8  # whole: blank and three characters
        assert layers == {name: n for name, n in old["kept_per_layer"].items() if name != "output.weight"}
    file = files.load_ticket(tmp_path / "run" / "ticket.safetensors")
    theta = files.read_sealed(source / "rewind.safetensors", "rewind state")[0]
    name, mask = next(iter(masks_of(source, 2).items()))
    assert torch.equal(file.rewind[name], theta[name].masked_fill(~mask, 0))
    # a control there, whose dense row comes from that run
    flags = ["--ticket", source, "--data", other, "--control", "random-mask-matched", "--rounds", 2]
    run(*flags, "--dense", tmp_path / "run", "--out", tmp_path / "control")
    control = ledger.read_ledger(tmp_path / "control" / "ledger.jsonl")
    assert control[0]["trained_sha256"] == dense["trained_sha256"] and verified(tmp_path / "control")
    assert "--dense" in refused(capsys, *flags, "--dense", source, "--out", tmp_path / "no")


def test_ticket_files_and_trained_starts(source, corpus, tmp_path, capsys):
    file, data = source / "ticket.safetensors", ("--data", corpus)
    there = files.load_ticket(file)
    run("--ticket", file, *data, "--ticket-weights", "trained", "--out", tmp_path / "trained")
    row = ledger.read_ledger(tmp_path / "trained" / "ledger.jsonl")[-1]
    assert row["round"] == 2 and row["start_sha256"] == lottery.sha256(there.trained)
    flags = ("--backbone", "cnn-lstm", "--epochs", 1, "--sparsity", 0.1, *data)
    run("--init", file, *flags, "--out", tmp_path / "init")
    assert "theta_0: the trained weights of" in capsys.readouterr().out
    assert ledger.read_ledger(tmp_path / "init" / "ledger.jsonl")[0]["rewind_sha256"] == row["start_sha256"]
    run("--ticket", tmp_path / "init", "--control", "random-mask", "--out", tmp_path / "control")
    dense = [ledger.read_ledger(tmp_path / name / "ledger.jsonl")[0] for name in ("init", "control")]
    assert dense[0]["trained_sha256"] == dense[1]["trained_sha256"]  # it starts from the ticket too
    assert all(verified(tmp_path / name) for name in ("init", "trained", "control"))
    train.train_again(tmp_path / "control", 0)
    forged = lies.Forged(tmp_path / "control", random.Random(0))  # the starts of its rounds, by rewind.safetensors
    forged.rows[1]["start_sha256"] = lies.SHA
    forged.save()
    assert any("does not start at theta_k" in wrong for wrong in verify.failures(tmp_path / "control", networks))
    right = forged.rows[1]["source_mask_sha256"]
    for other in ("x", None):
        forged.rows[1]["source_mask_sha256"] = other
        forged.save()
        assert any("source_mask_sha256: must be " in wrong for wrong in verify.failures(tmp_path / "control", networks))
    forged.rows[1]["source_mask_sha256"] = right
    forged.save()
    forged = lies.Forged(tmp_path / "init", random.Random(0))
    whole = dict(forged.config)
    forged.config["init_sha256"] = "x"
    forged.save()
    assert any("config.json, init_sha256: must be a SHA-256" in w for w in verify.failures(tmp_path / "init", networks))
    forged.config = whole
    forged.save()
    (tmp_path / "control" / "rewind.safetensors").unlink()
    assert "rewind.safetensors is not there" in verify.failures(tmp_path / "control", networks)
    methods = next(iter(compare.merge([compare.load(tmp_path / name) for name in ("init", "control")]).values()))
    assert len(compare.rivals(methods)) == 1
    files.save_ticket(tmp_path / "no.safetensors", there.masks, None, there.trained, there.info)
    assert "it has no rewind state" in refused(capsys, "--ticket", tmp_path / "no.safetensors", *data)
    assert "a ticket file does not say what it was trained on: give --data" in refused(capsys, "--ticket", file)


def test_a_file_without_its_rewind_state_draws_it_again(source, corpus, tmp_path, capsys):
    there, row = files.load_ticket(source), ledger.read_ledger(source / "ledger.jsonl")[-1]
    small, data = tmp_path / "small", ("--data", corpus)
    files.save_ticket(small, there.masks, None, there.trained, there.info, there.rewind_sha256)
    generator = torch.get_rng_state()
    drawn = controls.drawn_again(files.load_ticket(small))
    assert lottery.sha256(drawn) == row["rewind_sha256"] and torch.equal(torch.get_rng_state(), generator)
    flags = ("--rounds", 2, *data, "--dense", source)
    run("--ticket", small, *flags, "--out", tmp_path / "again")
    again = ledger.read_ledger(tmp_path / "again" / "ledger.jsonl")[-1]
    assert again["trained_sha256"] == row["trained_sha256"] and verified(tmp_path / "again")
    for name, ticket in {"of_file": small, "of_run": source}.items():  # masks that keep what the ticket does not
        run("--ticket", ticket, "--control", "random-mask", *flags, "--out", tmp_path / name)
    rows = [ledger.read_ledger(tmp_path / name / "ledger.jsonl")[-1] for name in ("of_file", "of_run")]
    assert rows[0]["trained_sha256"] == rows[1]["trained_sha256"] != row["trained_sha256"]
    assert verified(tmp_path / "of_file")
    files.save_ticket(small, there.masks, None, there.trained, there.info | {"seed": 6}, there.rewind_sha256)
    said = refused(capsys, "--ticket", small, *data)
    assert "left out, and seed 6 draws another one here (torch " in said and "--ticket-weights trained, or" in said
    run("--ticket", small, *flags[:4], "--ticket-weights", "trained", "--out", tmp_path / "trained")  # asks for no draw
    assert ledger.read_ledger(tmp_path / "trained" / "ledger.jsonl")[-1]["start_sha256"] == row["trained_sha256"]
    files.save_ticket(small, there.masks, there.rewind, there.trained, there.info | {"seed": 6})  # as of a later step
    flags = ("--control", "random-mask", *data)
    assert "keeps weights that the ticket does not" in refused(capsys, "--ticket", small, *flags)


def test_a_ticket_that_does_not_fit_is_refused_before_training(source, corpus, tmp_path, capsys, monkeypatch):
    there, bad = files.load_ticket(source / "ticket.safetensors"), tmp_path / "bad.safetensors"
    flags = ("--data", corpus, "--backbone", "cnn-lstm", "--out", tmp_path / "run")
    name, *_ = there.masks
    nan = {**there.trained, name: torch.full_like(there.trained[name], torch.nan)}
    with monkeypatch.context() as patch:  # no save_ticket writes it
        patch.setattr(files, "check_finite", lambda *_: None)
        files.save_ticket(bad, there.masks, nan, nan, there.info)
    for flag in ("--ticket", "--init"):
        assert f"bad.safetensors: {name} has a NaN or infinite value" in refused(capsys, flag, bad, *flags)
    files.save_ticket(bad, there.masks, there.rewind, there.trained, there.info | {"tokens": [1, 2]})
    said = refused(capsys, "--init", bad, *flags)
    assert "bad.safetensors: its info, tokens[0]: must be a text of at most 1000 characters, got 1" in said
    subprocess.run(["cp", "-r", source, tmp_path / "there"], check=True)
    files.write_sealed(tmp_path / "there" / "rewind.safetensors", "rewind state", nan, {})
    said = refused(capsys, "--ticket", tmp_path / "there", *flags)
    assert f"rewind.safetensors: {name} has a NaN or infinite value" in said
    fewer = {key: mask for key, mask in there.masks.items() if key != name}
    files.save_ticket(bad, fewer, there.rewind, there.trained, there.info)
    assert f"its masks are of another network: {name} does not fit" in refused(capsys, "--ticket", bad, *flags)
    whole = {key: torch.ones_like(mask) for key, mask in there.masks.items()}
    files.save_ticket(bad, whole, there.rewind, there.trained, there.info)
    assert "nothing in it is pruned yet" in refused(capsys, "--ticket", bad, *flags)
    said = refused(capsys, *flags, "--sparsity", 0.5, "--min-remaining", 0.9)
    assert "min_remaining 0.9 keeps" in said and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--ticket", "/nowhere"], "--ticket /nowhere: cannot read the ticket"),
        (["--control", "random-mask"], "--control, --rounds, --dense and --ticket-weights go with --ticket"),
        (["--ticket", "SOURCE", "--rounds", "7"], "--rounds 7: "),
        (["--ticket", "SOURCE", "--rounds", "0"], "--rounds 0: round 0 is the dense network"),
        (["--ticket", "SOURCE", "--sparsity", "0.9"], "--sparsity is 0.36 in "),
        (["--ticket", "SOURCE", "--block", "1x2"], "--block is 1x1 in "),
        (["--ticket", "SOURCE", "--rewind-step", "1"], "--rewind-step is 0 in "),
        (["--ticket", "SOURCE", "--rounds", "1", "--ticket-weights", "trained"], "--rounds 1: "),
        (["--ticket", "SOURCE", "--control", "x"], "argument --control: invalid choice: 'x'"),
        (["--ticket", "SOURCE", "--control", "random-init", "--ticket-weights", "trained"], "controls start from"),
        (["--ticket", "SOURCE", "--init", "SOURCE"], "--init and --ticket: only one"),
        (["--ticket", "SOURCE", "--backbone", "rnnt"], "it is of another network: "),
        (["--init", "/nowhere"], "/nowhere: cannot read the ticket"),
        (["--block", "1x0"], "argument --block: must be RxC, rows and columns of a block, both at least 1, got '1x0'"),
        (["--min-remaining", "1"], "--min-remaining must be in [0, 1), got 1.0"),
        (["--scope", "x"], "argument --scope: invalid choice: 'x'"),
    ],
)
def test_unusable_flags(source, corpus, tmp_path, capsys, flags, message):
    flags = [flag.replace("SOURCE", str(source)) for flag in flags]
    assert message in refused(capsys, "--data", corpus, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()  # nothing was trained first


def test_blocks_are_ranked_by_lamp_if_nothing_else_is_said():
    def scope(*flags):
        return train.flags.parse([*flags, "--backbone", "rnnt"]).pruning.scope

    assert (scope(), scope("--block", "1x4")) == ("global", "lamp")
    assert scope("--block", "1x4", "--scope", "layer") == "layer"


def test_no_network_is_small_enough_is_told_before_training(source, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(controls, "parameters_left", lambda model, masks: 10)
    flags = ("--data", corpus, "--out", tmp_path / "run", "--ticket", source)
    assert "no cnn-lstm has 10 parameters or fewer" in refused(capsys, *flags, "--control", "dense-small")
    assert not (tmp_path / "run").exists()


def test_a_damaged_source_is_named(source, corpus, tmp_path, capsys):
    subprocess.run(["cp", "-r", source, tmp_path / "there"], check=True)
    (tmp_path / "there" / "masks" / "01.safetensors").write_bytes(b"x")
    said = refused(capsys, "--data", corpus, "--out", tmp_path / "run", "--ticket", tmp_path / "there")
    assert "01.safetensors: not a whole masks" in said
    files.save_masks(tmp_path / "there" / "masks" / "01.safetensors", masks_of(source, 1))
    theta = files.read_sealed(source / "rewind.safetensors", "rewind state")[0]
    other = {name: value + 1 for name, value in theta.items()}  # of another seed, say
    files.write_sealed(tmp_path / "there" / "rewind.safetensors", "rewind state", other, {})
    said = refused(capsys, "--data", corpus, "--out", tmp_path / "run", "--ticket", tmp_path / "there")
    assert "rewind.safetensors is not the ledger's rewind state" in said


def test_a_source_whose_files_do_not_belong_together(source, corpus, tmp_path, capsys):
    there, data = tmp_path / "there", ("--data", corpus, "--out", tmp_path / "run")
    subprocess.run(["cp", "-r", source, there], check=True)
    lines = (there / "ledger.jsonl").read_text().splitlines(keepends=True)
    (there / "ledger.jsonl").write_text("".join(lines[:2]))  # killed between ticket and ledger of round 2
    assert "ticket.safetensors is not of the ledger's last round" in refused(capsys, "--ticket", there, *data)
    run("--data", corpus, "--backbone", "cnn-lstm", "--epochs", 1, "--sparsity", 0, "--out", tmp_path / "dense")
    for flags in ((), ("--ticket-weights", "trained")):
        assert "nothing in it is pruned yet" in refused(capsys, "--ticket", tmp_path / "dense", *flags, *data)
    model = models.build("cnn-lstm", "demo", 5)
    more = lottery.copy_state(model) | {"layer_7": torch.ones(1)}
    with pytest.raises(lottery.LotteryError, match="layer_7 is not in this one"):
        controls.adopt(model, more, True, source)


@pytest.mark.parametrize(
    "block, rate, kept, number", [(None, 0.5, 4, 1), (None, 0.5, 2, 2), (None, 0.5, 3, 1), ([1, 2], 0.5, 2, 2)]
)
def test_a_ticket_file_knows_its_round(tmp_path, block, rate, kept, number):
    """8 weights halved twice, and 4 blocks of two halved twice: 4, 2 and 2, 1; or the nearest, if a layer is whole."""
    masks = {"a": torch.arange(8).view(2, 4) < kept}
    settings = {"sparsity": 0.75, "prune_rate": rate} | ({"block": block} if block else {})
    assert controls.round_of_file(masks, settings) == number


def test_given_flags_stand_in_place_of_the_source_s(source, monkeypatch):
    there = controls.read_source(source)

    def parsed(settings, *flags, **paths):
        found = dataclasses.replace(there, settings=there.settings | settings, paths=there.paths | paths)
        monkeypatch.setattr(controls, "read_source", lambda path: found)
        return train.flags.parse(["--ticket", str(source), *flags])

    assert parsed({}, "--batch-seconds", "9").recipe.batch_seconds == 9
    args = parsed({"batch_seconds": 9.0}, "--batch-size", "3")
    assert (args.recipe.batch_seconds, args.recipe.batch_size) == (None, 3)
    assert parsed({"batch_seconds": 9.0}).recipe.batch_seconds == 9
    sets = {"corpus": "librispeech", "train_sets": ["dev-clean"]}
    assert parsed(sets).train_sets == ["dev-clean"]
    assert parsed(sets, "--corpus", "tedlium").train_sets is None
    assert parsed(sets, "--corpus", "tedlium", "--train-sets", "train").train_sets == ["train"]
    searched = {"beam": 7, "lm_weight": 2.0, "word_score": 1.0}
    args = parsed(searched, lm=str(source / "config.json"))
    assert (args.lm, args.lm_weight, args.beam) == (source / "config.json", 2.0, 7)
    args = parsed(searched, "--lm", "none", lm=str(source / "config.json"))
    assert (args.lm, args.lm_weight, args.beam) == (None, None, 1)
    args = parsed({"snr": [0.0, 5.0]}, noise="noise")
    assert (args.noise, args.snr) == (Path("noise"), (0.0, 5.0))
    args = parsed({"snr": [0.0, 5.0]}, "--noise", "none", noise="noise")
    assert (args.noise, args.snr) == (None, None)
    assert not parsed({"amp": True}, "--no-amp").recipe.amp
    assert parsed({}).out.name.endswith("ticket-of-run")


def rechained(folder: Path, changes: dict) -> None:
    """Rewrite a ledger, round by round, into a chain that holds."""
    config = ledger.settings_of(json.loads((folder / "config.json").read_text()))
    rows = []
    for row in ledger.read_ledger(folder / "ledger.jsonl"):
        ledger.append_row(None, rows, row | {key: values[row["round"]] for key, values in changes.items()}, config)
    (folder / "ledger.jsonl").write_bytes(b"".join(map(ledger.ledger_line, rows)))


def test_late_rewinding_and_global_blocks_are_checked_and_retrained(corpus, tmp_path, capsys):
    search, control, again = (tmp_path / name for name in ("search", "control", "again"))
    flags = ("--data", corpus, "--backbone", "cnn-lstm", "--epochs", 1, "--batch-size", 3, "--sparsity", 0.2)
    run(*flags, "--block", "3x2", "--scope", "global", "--rewind-step", 1, "--out", search)
    train.train_again(search, 1)
    run("--ticket", search, "--control", "random-mask", "--out", control)
    train.train_again(control, 0)
    # the dense row is taken over twice
    run("--ticket", search, "--dense", control, "--out", again)
    assert json.loads((again / "config.json").read_text())["machine"]["dense"] == str(control)
    assert verified(search) and verified(control) and verified(again)
    said = refused(capsys, "--ticket", search, "--batch-size", 6, "--out", tmp_path / "short")
    assert "--rewind-step 1: a round has at most 1 steps, and tickets train on what is left of them" in said
    rows = ledger.read_ledger(search / "ledger.jsonl")
    cer = [row["test_cer"] for row in rows]
    rechained(search, {"test_cer": [0.5, 0.5]})
    assert verified(search)
    with pytest.raises(lottery.LotteryError, match="differs from the ledger in test_cer"):
        train.train_again(search, 1)
    rechained(search, {"test_cer": cer, "kept_blocks": [100, 80], "total_blocks": [100, 100]})
    (wrong,) = verify.failures(search, networks)
    assert wrong.endswith(" blocks, not [80, 100]")


def test_floor_and_emptied_layers_are_told(corpus, tmp_path, capsys):
    flags = ("--data", corpus, "--backbone", "cnn-lstm", "--epochs", 1, "--prune-rate", 0.9, "--sparsity", 0.99)
    run(*flags, "--out", tmp_path / "a")
    said = capsys.readouterr().out
    rows = ledger.read_ledger(tmp_path / "a" / "ledger.jsonl")
    first_empty = {}
    for row in rows:
        for name, count in row["kept_per_layer"].items():
            if count == 0:
                first_empty.setdefault(name, row["round"])
    assert first_empty
    for name, number in first_empty.items():
        assert said.count(f"{name}: no weight is left in this layer") == 1
        assert f"round {number}: {name}: no weight is left" in said
    run(*flags, "--out", tmp_path / "b", "--min-remaining", 0.005)
    for row in ledger.read_ledger(tmp_path / "b" / "ledger.jsonl"):
        assert min(row["kept_per_layer"].values()) >= 1
    assert "no weight is left" not in capsys.readouterr().out and verified(tmp_path / "b")
    assert "min_remaining 0.5 keeps" in refused(capsys, *flags, "--out", tmp_path / "c", "--min-remaining", 0.5)


KEPT_DENSE = ["output", "lstms.0.*_hh_*"]


def test_a_search_keeps_dense_what_it_is_told_to(corpus, tmp_path, capsys):
    search, flags = tmp_path / "search", ("--data", corpus, "--backbone", "cnn-lstm", "--epochs", 1)
    run(*flags, "--sparsity", 0.2, "--out", search, "--keep-dense", *KEPT_DENSE)
    rows, file = ledger.read_ledger(search / "ledger.jsonl"), files.load_ticket(search / "ticket.safetensors")
    assert json.loads((search / "config.json").read_text())["keep_dense"] == KEPT_DENSE == file.info["keep_dense"]
    model = models.build("cnn-lstm", "demo", len(file.info["tokens"]))
    weights = lottery.prunable(model, KEPT_DENSE)
    gone = lottery.prunable(model).keys() - weights.keys()
    assert "output.weight" in gone and len(gone) == 3  # both ways of the first LSTM
    assert rows[0]["total"] == sum(weight.numel() for weight in weights.values())
    assert rows[1]["kept_per_layer"].keys() == masks_of(search, 1).keys() == weights.keys() == file.masks.keys()
    assert f"{rows[0]['total']:,} prunable; 2 rounds" in capsys.readouterr().out and verified(search)
    dense = plan.multiply_adds("cnn-lstm", models.CnnLstm.SIZES["demo"])
    assert plan.multiply_adds("cnn-lstm", models.CnnLstm.SIZES["demo"], rows[0]["kept_per_layer"]) == dense
    assert plan.main([str(search / "ticket.safetensors")]) == report.main([str(search)]) == 0
    assert transcribe.load(search / "ticket.safetensors")[1].masks.keys() == weights.keys()
    capsys.readouterr()
    said = refused(capsys, "--ticket", search, "--keep-dense", "output", "--out", tmp_path / "x")
    assert "--keep-dense is output lstms.0.*_hh_* in " in said
    said = refused(capsys, *flags, "--sparsity", 0.2, "--out", search, "--keep-dense", "output")
    assert "holds another run (--keep-dense ['output', 'lstms.0.*_hh_*'] there, ['output'] now)" in said


@pytest.mark.slow
def test_what_is_kept_dense_stays_so_in_all_that_follows(source, corpus, tmp_path, capsys):
    flags = ("--data", corpus, "--backbone", "cnn-lstm", "--epochs", 1, "--sparsity", 0.36)
    search = tmp_path / "search"
    run(*flags, "--seed", 5, "--out", search, "--keep-dense", *KEPT_DENSE)
    rows = ledger.read_ledger(search / "ledger.jsonl")
    run("--retrain", search, 2)
    for control in (None, *controls.CONTROLS):
        out = tmp_path / f"{control}"
        run("--ticket", search, *(["--control", control] if control else []), "--rounds", 2, "--out", out)
        dense, row = ledger.read_ledger(out / "ledger.jsonl")
        assert dense["trained_sha256"] == rows[0]["trained_sha256"]
        assert dense["total"] == row["total"] == rows[0]["total"] and verified(out)
        assert json.loads((out / "config.json").read_text())["keep_dense"] == KEPT_DENSE
        assert control == "dense-small" or row["kept"] == rows[2]["kept"]
    run("--ticket", search / "ticket.safetensors", "--data", corpus, "--out", tmp_path / "file")
    run("--retrain", tmp_path / "file", 2)
    assert verified(tmp_path / "file")
    capsys.readouterr()
    said = refused(capsys, "--ticket", search, "--dense", source, "--out", tmp_path / "x")
    assert "it has no round 0 of these settings (other keep_dense)" in said
    said = refused(capsys, "--ticket", source, "--keep-dense", "output", "--out", tmp_path / "x")
    assert "--keep-dense is not given in " in said


@pytest.mark.parametrize("pattern", ["outputs", "output.bias", "nothing.*"])
def test_a_name_that_keeps_nothing_dense_is_refused(corpus, tmp_path, capsys, pattern):
    flags = ("--data", corpus, "--backbone", "cnn-lstm", "--out", tmp_path / "run", "--keep-dense", "output", pattern)
    assert f"--keep-dense '{pattern}' matches no weight that would be pruned" in refused(capsys, *flags)
    assert not (tmp_path / "run").exists()
