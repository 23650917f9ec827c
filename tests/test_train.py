"""The command line: flags, messages, scores, run folders."""

import argparse
import dataclasses
import functools
import json
import math
import os
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
import lottery
import models
import train
from audio_lottery import files, ledger
from audio_lottery.texts import KINDS, edits
from lab import scoring
from runner import flags, processes, recipes, settings

ROOT = Path(train.__file__).parent


def refused(capsys, *argv) -> str:
    """Run main; it must print one line on stderr and give exit code 2. Returns the line."""
    try:
        code = train.main([str(a) for a in argv])
    except SystemExit as error:
        code = error.code
    captured = capsys.readouterr()
    assert code == 2 and captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("train.py: error: ")
    return captured.err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--sparsity", "1.5"], "sparsity must be in [0, 1), got 1.5 (it is the fraction removed, not kept)"),
        (["--sparsity", "nan"], "sparsity must be in [0, 1), got nan"),
        (["--sparsity", "x"], "argument --sparsity: invalid float value: 'x'"),
        (["--prune-rate", "0"], "prune_rate must be in (0, 1), got 0.0"),
        (["--backbone", "whisper"], "argument --backbone: invalid choice: 'whisper'"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch-size", "-3"], "--batch-size must be at least 1"),
        (["--lr", "inf"], "--lr must be above 0 and at most 100, got inf"),
        (["--lr", "0"], "--lr must be above 0 and at most 100, got 0.0"),
        (["--size", "paper", "--anneal", "0.9"], "--anneal must be at least 1 and at most 100, got 0.9"),
        (["--anneal", "1.2"], "--anneal goes with the schedule anneal, and this recipe has one-cycle"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--lr", "1e308"], "--lr must be above 0 and at most 100, got 1e+308"),
        (["--epochs", "2147483647"], "--epochs must be at least 1 and at most 10000, got 2147483647"),
        (["--batch-size", "2147483647"], "--batch-size must be at least 1 and at most 1000000, got 2147483647"),
        (["--workers", "5000"], "--workers must be at least 0 and at most 1024, got 5000"),
        (["--save-every", "1e308"], "--save-every must be at least 0 and at most 1000000, got 1e+308"),
        (["--seconds", "0:inf"], "must be LO:HI with 0 <= LO < HI <= 1e7, got '0:inf'"),
        (["--rewind-step", "-1"], "--rewind-step must be at least 0"),
        (["--margin", "nan"], "--margin must be at least 0"),
        (["--batch-seconds", "0"], "--batch-seconds must be at least 1"),
        (["--batch-seconds", "60", "--batch-size", "8"], "--batch-size and --batch-seconds: only one of them"),
        (["--accumulate", "0"], "--accumulate must be at least 1"),
        (["--workers", "-1"], "--workers must be at least 0"),
        (["--seconds", "5"], "must be LO:HI, two numbers of seconds, got '5'"),
        (["--seconds", "5:1"], "must be LO:HI with 0 <= LO < HI <= 1e7, got '5:1'"),
        (["--device", "cpu", "--amp"], "--amp needs CUDA"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all: no such folder"),
    ],
)
def test_unusable_flags(capsys, tmp_path, argv, message):
    assert message in refused(capsys, "--out", tmp_path / "run", *argv)
    assert not (tmp_path / "run").exists()


def tiny_corpus(folder, **rows):
    """A corpus of one recording a split; rows replaces what stands in a manifest."""
    for split in ("train", "valid", "test"):
        shutil.copy(ROOT / "demo" / "audio" / "added.opus", folder / f"{split}.opus")
        row = {"audio_filepath": f"{split}.opus", "text": "added", "duration": 0.723}
        (folder / f"{split}.jsonl").write_text(json.dumps({**row, **rows.get(split, {})}))
    return folder


def test_broken_files_end_in_one_line_and_leave_no_run(capsys, tmp_path):
    (tmp_path / "noise.wav").write_bytes(b"RIFF" + bytes(500))
    for rows, message in (
        ({"test": {"audio_filepath": str(tmp_path / "noise.wav")}}, "noise.wav: cannot decode the audio"),
        ({"valid": {"text": ""}}, "valid.jsonl, line 1: the text is empty"),
        ({"train": {"text": "x" * 90}}, "no train utterance is left to train on"),
    ):
        folder = tiny_corpus(tmp_path, **rows)
        assert message in refused(capsys, "--data", folder, "--out", tmp_path / "run")
        assert not (tmp_path / "run").exists()
    tiny_corpus(tmp_path)
    (tmp_path / "train.jsonl").write_text("{oops")
    assert "train.jsonl, line 1: not a JSON object" in refused(capsys, "--data", tmp_path, "--out", tmp_path / "run")


def test_copies_of_a_recording_in_two_parts_are_told(capsys, tmp_path):
    folder = tiny_corpus(tmp_path, train={"text": "x" * 90})  # too long: it ends before it trains
    assert train.main(["--data", str(folder), "--out", str(tmp_path / "run")]) == 2
    said = f"{folder}/valid.opus of valid is {folder}/train.opus of train; {folder}/test.opus of test is "
    assert f"in two parts, which makes tests easier: {said}{folder}/train.opus of train\n" in capsys.readouterr().out
    with open(folder / "valid.opus", "ab") as file:
        file.write(b"another")
    assert train.main(["--data", str(folder), "--out", str(tmp_path / "run")]) == 2
    out = capsys.readouterr().out
    assert "valid.opus of" not in out and "test.opus of test is" in out


def test_durations_that_cut_recordings_are_told(capsys, tmp_path):
    rows = {"train": {"text": "x" * 90}, "valid": {"duration": 0.5}, "test": {"duration": 0.7}}
    folder = tiny_corpus(tmp_path, **rows)  # of 0.723 s each
    assert train.main(["--data", str(folder), "--out", str(tmp_path / "run")]) == 2
    said = [line for line in capsys.readouterr().out.splitlines() if "beginnings" in line]
    longer = "1 of 1 looked at are longer than their duration, by 0.2 s (median)"
    assert said == [f"data: of valid {longer}: only their beginnings are heard"]


def test_a_folder_whose_name_is_no_utf8_is_refused_before_training(capsys, tmp_path):
    folder = tmp_path / os.fsdecode(b"corp\xe9")
    folder.mkdir()
    said = refused(capsys, "--data", tiny_corpus(folder), "--out", tmp_path / "run")
    assert f"--data {tmp_path}/corp\\xe9: the name is no UTF-8, which a run's settings are kept in" in said
    assert not (tmp_path / "run").exists()


def test_no_disk(capsys, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_atomically", full)
    assert "No space left on device" in refused(capsys, "--data", tiny_corpus(tmp_path), "--out", tmp_path / "run")


def test_unusable_out(capsys, tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[1]")
    (tmp_path / "odd" / "ledger.jsonl").write_text("")
    assert "holds no run" in refused(capsys, "--out", tmp_path / "odd")
    (tmp_path / "file").write_text("x")
    assert "is a file, not a folder" in refused(capsys, "--out", tmp_path / "file")
    assert "Not a directory" in refused(capsys, "--out", tmp_path / "file" / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    assert "is not empty and holds no run" in refused(capsys, "--out", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_an_out_that_cannot_be_made_is_told_before_data_are_read(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for out, why in (("file", "is a file"), ("file/a/b", "Not a directory"), ("link", "File exists")):
        said = refused(capsys, "--data", tmp_path / "nowhere", "--out", tmp_path / out)
        assert f"--out {tmp_path / out}: " in said and why in said
    assert "no such folder" in refused(capsys, "--data", tmp_path / "nowhere", "--out", tmp_path / "a" / "b" / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}  # none that was tried is left


def test_a_rewind_step_past_the_end_is_told_before_data_are_read(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "hashes_of", None)
    monkeypatch.setattr(train, "Corpus", None)
    corpus = tiny_corpus(tmp_path)
    flags = ("--data", corpus, "--out", tmp_path / "a" / "run", "--rewind-step", 5, "--epochs", 2)
    assert "--rewind-step 5: a round has at most 2 steps" in refused(capsys, *flags)
    assert not (tmp_path / "a").exists()


def test_no_cuda(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert "torch finds no CUDA device" in refused(capsys, "--device", "cuda", "--out", tmp_path / "run")


def test_paper_recipes():
    """The official configurations (../shared/paper.md has no RNN-T's: ours is the CNN-LSTM's)."""

    def of(backbone, *more):
        return flags.parse(["--size", "paper", "--backbone", backbone, *more])

    for backbone in ("cnn-lstm", "rnnt"):
        args = of(backbone)
        recipe = args.recipe
        assert (recipe.lr, recipe.betas, recipe.weight_decay, recipe.clip) == (3e-4, (0.9, 0.999), 1e-5, 400)
        assert (recipe.batch_size, recipe.epochs, recipe.schedule, recipe.anneal) == (32, 16, "anneal", 1.1)
        assert (recipe.optimizer, args.tokens, recipe.augment) == ("adamw", "chars", data.SpecAugment(1, 27, 1, 70))
        assert "anneal" not in flags.configuration(args)
        assert flags.configuration(of(backbone, "--anneal", "1.01"))["anneal"] == 1.01
    args = of("conformer")
    recipe = args.recipe
    assert (recipe.optimizer, recipe.betas, recipe.eps, recipe.weight_decay) == ("adam", (0.9, 0.98), 1e-9, 1e-6)
    assert (recipe.epochs, recipe.batch_size, recipe.accumulate, recipe.clip) == (200, 16, 16, 5)
    assert args.tokens == "bpe:256" and of("conformer", "--tokens", "chars").tokens == "chars"
    places = recipe.augment.draw((1000, 80), np.random.default_rng(0))
    assert len(places) == 12 and all(place[0].stop - place[0].start <= 50 for place in places[2:])
    optimizer, schedule = recipes.optimizer_of(torch.nn.Linear(1, 1), recipe, [20_000])
    assert type(optimizer) is torch.optim.Adam
    for step in (1, 100, 10_000, 20_000, 90_000):  # K / sqrt(width) * min(step ** -0.5, step * warmup ** -1.5)
        expected = 2 * 512**-0.5 * min(step**-0.5, step * 10_000**-1.5)
        assert schedule.lr_lambdas[0](step - 1) * recipe.lr == pytest.approx(expected, rel=1e-12)


def test_the_learning_rate_anneals_after_each_epoch():
    recipe = flags.parse(["--size", "paper", "--backbone", "rnnt", "--anneal", "2"]).recipe
    _, schedule = recipes.optimizer_of(torch.nn.Linear(1, 1), recipe, [3, 5])
    assert [schedule.lr_lambdas[0](step) for step in range(6)] == [1, 1, 1, 0.5, 0.5, 0.25]


def test_score_counts_by_hand():
    scored = scoring.rates(["a b c", "d e"], ["a x c d", ""])
    assert scored["errors"] == [2, 2] and scored["words"] == [3, 2] and scored["wer"] == pytest.approx(4 / 5)
    kinds = [(count["substitutions"], count["deletions"], count["insertions"]) for count in scored["counts"]]
    assert kinds == [(1, 0, 1), (0, 2, 0)]
    assert scored["cer"] == pytest.approx((3 + 3) / 8)  # b -> x and " d" inserted; "d e" deleted


def distance(one, other):
    """Levenshtein's, by its definition."""

    @functools.cache
    def rest(i, j):
        if i == len(one) or j == len(other):
            return len(one) - i + len(other) - j
        return min(rest(i + 1, j) + 1, rest(i, j + 1) + 1, rest(i + 1, j + 1) + (one[i] != other[j]))

    return rest(0, 0)


def test_scores_are_levenshtein_s():
    draw = random.Random(0)
    said, heard = ([" ".join(draw.choices("a b ab ba".split(), k=draw.randint(1, 9))) for _ in range(60)] for _ in "12")
    heard[7] = ""
    scored = scoring.rates(said, heard)
    assert scored["errors"] == [distance(a.split(), b.split()) for a, b in zip(said, heard)]
    assert scored["errors"] == [sum(count[kind] for kind in KINDS) for count in scored["counts"]]
    assert scored["errors"] == [edits(a.split(), b.split()) for a, b in zip(said, heard)]
    assert scored["wer"] == pytest.approx(sum(scored["errors"]) / sum(len(a.split()) for a in said))
    assert scored["cer"] == pytest.approx(sum(map(distance, said, heard)) / sum(map(len, said)))


class Counter(torch.nn.Module):
    """A stand-in model whose loss is its one weight's square, and whose transcripts follow a script."""

    features = "log-mel"

    def __init__(self, scripts):
        super().__init__()
        self.linear, self.scripts = torch.nn.Linear(2, 2), iter(scripts)

    def loss(self, features, input_lengths, targets, target_lengths):
        return self.linear.weight.square().sum()

    def transcribe(self, features, input_lengths):
        return next(self.scripts)


def corpus_of(utterances, tokens, seconds=(0.0, math.inf), speeds=(1.0,)):
    """train.Corpus of a CNN-LSTM that is not trained."""
    recipe = dataclasses.replace(recipes.RECIPES["cnn-lstm", "demo"], seconds=seconds, speeds=speeds)
    args = argparse.Namespace(workers=0, recipe=recipe)
    model = models.build("cnn-lstm", "demo", len(tokens))
    return train.Corpus(settings.Setting(args, {}, utterances, tokens, model, lambda _: None, [], "memory"))


def small_corpus():
    corpus = train.Corpus.__new__(train.Corpus)
    example = data.Example(torch.zeros(10, 80), "a b", [1, 2, 1])
    corpus.tokens, corpus.train, corpus.valid = [data.BLANK, "a", " ", "b"], [example] * 3, [example]
    return corpus


def trained(ticket, recipe, examples=None, seed=0):
    args = argparse.Namespace(recipe=recipe, device="cpu", seed=seed, workers=0)
    corpus = small_corpus()
    corpus.train = examples or corpus.train
    return train.train_round(
        ticket, corpus, settings.Setting(args, {}, {}, corpus.tokens, ticket.model, lambda _: None, [], "memory")
    )


def test_best_epoch_is_chosen_on_valid_and_the_model_keeps_the_last():
    a_b, a, nothing = [[1, 2, 3]], [[1]], [[]]
    model = Counter([nothing, a_b, a_b, a])
    recipe = recipes.Recipe(4, 2, 1e-2, "anneal", 400.0, (0, 9), data.SpecAugment(0, 0, 0, 0))
    ticket = lottery.Ticket(model)
    at = trained(ticket, recipe)
    assert ledger.best_epoch(at.valid_wers) == (0.0, 3)  # of two equal epochs the later
    assert len(at.losses) == 4 and at.losses == sorted(at.losses, reverse=True)
    assert at.valid_wers[1] == at.valid_wers[2] == 0.0 < min(at.valid_wers[0], at.valid_wers[3])
    assert ticket.steps == 8  # 3 utterances in batches of 2: two steps an epoch, nobody lost
    assert not torch.equal(at.best["linear.weight"], model.linear.weight)


class Sum(Counter):
    """Each weight's gradient is 1."""

    def loss(self, features, input_lengths, targets, target_lengths):
        return self.linear.weight.sum()


def test_a_step_holds_before_it_clips(monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda p, most: norms.append((float(clip(p, most)), most)))
    ticket = lottery.Ticket(Sum([[[]]] * 9))
    ticket.prune(1)
    ticket.rewind()
    trained(ticket, recipes.Recipe(2, 2, 1e-2, "anneal", 4.0, (0, 9), data.SpecAugment(0, 0, 0, 0)))
    assert norms == [(1.0, 4.0)] * 4  # of the one weight that stays, not of all four


@pytest.mark.parametrize(
    "change",
    [{"clip": 1e-3}, {"weight_decay": 0.5}, {"eps": 1.0}, {"betas": (0.5, 0.9)}, {"optimizer": "adam"},
     {"augment": data.SpecAugment(2, 40, 2, 9)}, {"lr": 2e-2}, {"schedule": "one-cycle"}, {"batch_size": 1}, "seed"],
    ids=str,
)  # fmt: skip
def test_each_setting_reaches_the_weights(change):
    generator = torch.Generator().manual_seed(0)
    examples = [data.Example(torch.randn(n, 80, generator=generator), "", [1, 2]) for n in (20, 33, 41)]
    plain = recipes.Recipe(2, 2, 1e-2, "anneal", 5.0, (0, 9), data.SpecAugment(0, 0, 0, 0), weight_decay=1e-2)
    shape = dict(window=12, channels=4, hidden=4, layers=1, predictor=4, joiner=4, dropout=0.0)
    found = []
    for recipe, seed in ((plain, 0), (plain, 1) if change == "seed" else (dataclasses.replace(plain, **change), 0)):
        torch.manual_seed(0)
        model = models.Transducer(4, **shape)
        trained(lottery.Ticket(model), recipe, examples, seed)
        found.append(lottery.sha256(model.state_dict()))
    assert found[0] != found[1]


def test_a_loss_is_a_mean_over_utterances():
    model = Counter([[[]]] * 9)
    loss = model.linear.weight.square().sum().item()
    at = trained(
        lottery.Ticket(model), recipes.Recipe(2, 2, 1e-12, "anneal", 4.0, (0, 9), data.SpecAugment(0, 0, 0, 0))
    )
    assert at.losses == [pytest.approx(loss)] * 2


def test_processes_recognise_their_shares_and_all_know_the_whole(monkeypatch):
    class Reader(torch.nn.Module):
        def transcribe(self, features, input_lengths):
            return [[int(row[0, 0])] for row in features]

    examples = [data.Example(torch.full((7 - n, 2), float(n)), "", [1]) for n in range(1, 7)]
    shares = []
    monkeypatch.setattr(processes, "count", lambda: 4)
    monkeypatch.setattr(processes, "gather", lambda texts: shares.append(texts) or [[""] * 9] * 4)
    for index in range(4):
        monkeypatch.setattr(processes, "index", lambda index=index: index)
        train.recognise(Reader(), examples, [data.BLANK, *"abcdef"], 2, "cpu")
    assert shares == [["a", "e"], ["b", "f"], ["c"], ["d"]]
    monkeypatch.setattr(processes, "gather", lambda _: shares)
    assert train.recognise(Reader(), examples, [data.BLANK, *"abcdef"], 2, "cpu") == [*"abcdef"]


def test_every_round_trains_alike():
    """After a rewind with full masks the same numbers come again: optimizer, schedule, order, dropout start afresh."""
    torch.manual_seed(0)
    model = models.build("rnnt", "demo", 4)
    recipe = recipes.Recipe(2, 2, 1e-2, "one-cycle", 5.0, (0, 9), data.SpecAugment(1, 9, 1, 3))
    ticket = lottery.Ticket(model)
    states = []
    for _ in range(2):
        states.append(trained(ticket, recipe).best)
        torch.rand(17)  # whatever draws from the global generator between
        ticket.rewind()
    assert lottery.sha256(states[0]) == lottery.sha256(states[1]) != lottery.sha256(model.state_dict())


@pytest.mark.parametrize("accumulate, k", [(1, 4), (1, 3), (1, 1), (2, 3)])
@pytest.mark.parametrize("schedule", ["one-cycle", "anneal"])
def test_a_ticket_goes_on_at_the_recipes_step(schedule, accumulate, k, monkeypatch):
    """Step s of a round is the dense network's step k + s: learning rate, betas, utterances, masks, dropout."""
    seen, add_gradients, step = [], train.add_gradients, torch.optim.AdamW.step

    def gradients(setting, epoch, parts, batches, at):
        dropout = torch.get_rng_state().sum().item()
        seen.append([[epoch.chunks[i].tolist() for i in parts], str([epoch.masks[i] for i in parts]), dropout])
        return add_gradients(setting, epoch, parts, batches, at)

    def stepped(self, *args, **kwargs):
        seen[-1] += [self.param_groups[0]["lr"], self.param_groups[0]["betas"]]
        return step(self, *args, **kwargs)

    monkeypatch.setattr(train, "add_gradients", gradients)
    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    torch.manual_seed(0)
    shape = dict(window=12, channels=4, hidden=4, layers=1, predictor=4, joiner=4, dropout=0.3)
    examples = [data.Example(torch.randn(n, 80), "a b", [1, 2, 1]) for n in (20, 33, 41, 50, 64)]
    augment = data.SpecAugment(1, 9, 1, 3)
    recipe = recipes.Recipe(3, 2, 1e-2, schedule, 5.0, (0, 9), augment, accumulate=accumulate)
    ticket = lottery.Ticket(models.Transducer(4, **shape), rewind_step=k)
    dense = trained(ticket, recipe, examples)
    steps = ticket.steps
    ticket.round, before = 1, list(seen)
    ticket.rewind()
    seen.clear()
    torch.rand(7)  # whatever draws from the global generator between
    at = trained(ticket, recipe, examples)
    assert len(before) == steps == ticket.steps and seen == before[k:] and len(seen) == steps - k
    per_epoch = steps // 3
    assert at.before == k // per_epoch and len(at.valid_wers) == len(at.losses) == 3 - at.before
    assert len(dense.valid_wers) == 3 and dense.before == 0
    again = lottery.Ticket(ticket.model, rewind_step=k)
    again.round, again.rewind_state = 1, ticket.rewind_state
    again.rewind()
    assert lottery.sha256(trained(again, recipe, examples).best) == lottery.sha256(at.best)


def test_long_utterances_leave_training_alone(capsys):
    utterances = {split: data.read_manifest(ROOT / "demo" / f"{split}.jsonl") for split in ("train", "valid", "test")}
    short = {split: [u for u in rows if u.duration < 0.9 or u.duration > 10] for split, rows in utterances.items()}
    tokens = data.tokens_of(utterances["train"])
    corpus = corpus_of(short, tokens, (0.0, 10.0))
    assert "10 train utterances left out of training: not between 0 and 10 s long" in capsys.readouterr().out
    assert len(corpus.tests["test"]) == len(short["test"]) and max(e.seconds for e in corpus.tests["test"]) > 10
    assert len(corpus.train) == len(short["train"]) - 10 and max(e.seconds for e in corpus.train) < 10


def test_what_ctc_cannot_align_at_the_fastest_speed_is_left_out(tmp_path, capsys):
    """0.8 s are 21 encoder frames, and 0.4 s at twice the speed 11: enough for 21 tokens, and for 11 of them."""
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 12_800), 16_000)
    utterances = [data.Utterance(tmp_path / "a.wav", text) for text in ("ab" * 5 + "a", "ab" * 6)]
    tokens = [data.BLANK, "a", "b"]
    splits = {"train": utterances, "valid": utterances, "test": utterances}
    assert len(corpus_of(splits, tokens).train) == 2
    corpus = corpus_of(splits, tokens, speeds=(0.5, 1.0, 2.0))
    assert "1 train utterances left out of training: fewer encoder frames than CTC" in capsys.readouterr().out
    (example,) = corpus.train
    assert [e.frames for e in example.at_speeds] == [161, 81, 41] and example.frames == 81
    assert torch.equal(example.at_speeds[1].features, example.features) and not example.at_speeds[1].at_speeds
    assert not any(e.at_speeds for part in (corpus.valid, corpus.tests["test"]) for e in part)


def test_accumulated_batches_step_like_one_batch():
    """Without batch norm and dropout the mean over 2 + 1 utterances in two batches is that of 3 in one."""
    states, generator = [], torch.Generator().manual_seed(0)
    labels = ([1, 2, 1], [3, 2, 1], [3, 3])  # other speech and texts, as the mean of equal utterances has any weights
    examples = [data.Example(torch.randn(40, 80, generator=generator), "", ids) for ids in labels]
    for batch_size, accumulate in ((3, 1), (2, 2), (1, 3)):
        torch.manual_seed(0)
        model = models.build("rnnt", "demo", 4)
        model.dropout.p = 0.0
        augment = data.SpecAugment(0, 0, 0, 0)
        recipe = recipes.Recipe(2, batch_size, 1e-3, "anneal", 5.0, (0, 9), augment, accumulate=accumulate)
        ticket = lottery.Ticket(model)
        trained(ticket, recipe, examples)
        assert ticket.steps == 2  # one an epoch
        states.append(model.state_dict())
    for state in states[1:]:
        # AdamW divides by the gradient's size, so that near 0 rounding, another on each processor, shows in the step
        other = [~torch.isclose(value, states[0][name], atol=3e-5, rtol=1e-4) for name, value in state.items()]
        assert sum(int(part.sum()) for part in other) < 1000  # of 1.4 million; the mean of the batches' means: 900,000


def test_a_diverging_loss_is_named():
    recipe = recipes.Recipe(3, 2, 1e30, "anneal", 1e30, (0, 9), data.SpecAugment(0, 0, 0, 0))
    with pytest.raises(lottery.LotteryError, match=r"round 0, epoch \d: the loss is (nan|inf): try a lower --lr"):
        trained(lottery.Ticket(Counter([[[]]] * 9)), recipe)


def test_corpus_says_what_it_leaves_out(tmp_path, capsys):
    for split, texts in {"train": ["added", "x" * 90], "valid": ["ñandú"], "test": ["x" * 90]}.items():
        shutil.copy(ROOT / "demo" / "audio" / "added.opus", tmp_path / f"{split}.opus")
        rows = [{"audio_filepath": f"{split}.opus", "text": text, "duration": 0.723} for text in texts]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    utterances = data.read_corpus(tmp_path)
    tokens = data.tokens_of(utterances["train"])
    corpus = corpus_of(utterances, tokens)
    said = capsys.readouterr().out
    assert "1 train utterances left out of training: fewer encoder frames than CTC needs" in said
    assert "valid has characters that train has not, counted as errors: 'n' x 2" not in said
    assert "'n' x 1" in said and "'ñ' x 1" in said and "'ú' x 1" in said
    assert len(corpus.train) == 1 and len(corpus.tests["test"]) == 1  # a test utterance is never dropped
    with pytest.raises(data.DataError, match="no train utterance is left"):
        corpus_of(utterances, tokens, (1.0, 9.0))
    assert "2 train utterances left out of training: not between 1 and 9 s long" in capsys.readouterr().out


def test_a_plan_of_too_many_rounds_is_one_line(capsys):
    assert train.main(["--plan", "--prune-rate", "0.0025"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "takes 1247." in err and "rounds to sparsity 0.956" in err


def test_plan_trains_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train.plan, "multiply_adds", lambda backbone, of: 2e9 if of == "loss" else 0)
    assert train.main(["--plan"]) == 0
    said = capsys.readouterr().out
    # 0.8 ** 7 = 0.21: dense and 7 rounds, 16 epochs, 960 h; 3 * 2e9 * 3600 s each; 2 * 2.65e18 / 20e12 / 3600 h
    assert "| rnnt | 16 | 2.00 G | LibriSpeech, 960 h | 8 trainings, 122,880 h of audio, 2.7e+18, 74 GPU h |" in said
    # the Conformer's recipe has 200 epochs, 12.5 times as many
    assert (
        "| conformer | 200 | 2.00 G | LibriSpeech, 960 h | 8 trainings, 1,536,000 h of audio, 3.3e+19, 922 GPU" in said
    )
    assert "an assumption, not a measurement" in said and not list(tmp_path.iterdir())


def test_multiply_adds_of_the_papers_network_by_hand():
    """One second of speech more is 50 frames more of five BiLSTMs, their output, and the two convolutions."""
    network = {**models.CnnLstm.SIZES["demo"], "hidden": 8, "layers": 1}
    model = models.CnnLstm(29, **network)
    uses = [train.plan.per_utterance(model, seconds, 29) for seconds in (2, 3)]
    more = {name: uses[1][name] - uses[0][name] for name in uses[0]}
    assert more["output.weight"] == more["lstms.0.back.weight_hh_l0"] == 25  # strides 2 and 2 of 100 frames
    assert more["convs.0.weight"] == 50 * 40 and more["convs.1.weight"] == 25 * 20  # frames times bins left


def test_tensorboard_is_asked_for_and_not_there(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tiny = tiny_corpus(tmp_path)
    argv = ["--data", tiny, "--out", tmp_path / "run", "--epochs", "1", "--sparsity", "0", "--tensorboard"]
    assert "--tensorboard: the package is not there: pip install tensorboard" in refused(capsys, *argv)


def test_a_corpus_too_large_for_memory_asks_for_a_folder(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(settings, "IN_MEMORY", 100)
    said = refused(capsys, "--data", tiny_corpus(tmp_path))
    assert "--cache memory: 0.0 GB of features are too many for it (0.0 at most): name a folder for them" in said
    assert not (tmp_path / "run").exists()
