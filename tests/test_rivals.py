"""Rivals of the search at equal compute."""

import json

import pytest
import soak
import torch
from test_train import refused

import lottery
import train
from audio_lottery import files, ledger, texts, verify
from lab import compare, networks, rivals
from runner import recipes

RECIPE = recipes.RECIPES["rnnt", "demo"]


@pytest.fixture(autouse=True)
def small_models(monkeypatch):
    soak.shrink_models(monkeypatch.setitem)
    monkeypatch.setattr(train.report.pictures, "draw", lambda path, *_: path.write_bytes(b""))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return soak.small_corpus(tmp_path_factory.mktemp("corpus"))


def run(*argv) -> None:
    assert train.main([str(a) for a in argv]) == 0


@pytest.fixture(params=[0, pytest.param(2, marks=pytest.mark.slow)])
def source(corpus, tmp_path_factory, request):
    """A search of two rounds of 6 steps in 2 epochs, rewound to step 0 or 2; made once each."""
    out = f"SOURCE{request.param}"
    if not hasattr(request.module, out):
        setattr(request.module, out, tmp_path_factory.mktemp("source") / "run")
        flags = ("--backbone", "cnn-lstm", "--epochs", 2, "--batch-size", 2, "--sparsity", 0.36, "--seed", 5)
        flags += ("--rewind-step", request.param, "--data", corpus)
        run(*flags, "--out", getattr(request.module, out))
    return getattr(request.module, out)


def rows_of(folder) -> list[dict]:
    return ledger.read_ledger(folder / "ledger.jsonl")


def verified(folder) -> bool:
    return not verify.failures(folder, networks)


# ---------------------------------------------------------------------------- recipes


def test_recipes_of_rounds():
    def of(control, number, rewind_step=0):
        recipe = rivals.recipe_of(RECIPE, control, number, 900, rewind_step)
        return recipe.schedule, recipe.lr / RECIPE.lr, recipe.epochs / RECIPE.epochs, recipe.stretch

    plain = ("one-cycle", 1, 1, 1)
    assert of(None, 3) == of("lr-rewind", 3) == of("gradual", 3) == of("dense-long", 0) == of("finetune", 0) == plain
    assert of("finetune", 1) == ("constant", 0.1, 1, 1)
    assert of("dense-long", 3) == of("gradual-long", 3) == ("one-cycle", 1, 4, 4)  # rounds 0 to 3
    assert of("dense-long", 2, 450) == ("one-cycle", 1, 2, 2)  # one round and two halves


def test_a_stretched_schedule_takes_as_many_times_as_long():
    def factors(stretch, ends):
        recipe = recipes.Recipe(2, 1, 1.0, "anneal", 1.0, (0, 9), None, anneal=2, stretch=stretch)
        return [recipes.optimizer_of(torch.nn.Linear(1, 1), recipe, ends)[1].lr_lambdas[0](s) for s in range(ends[-1])]

    assert factors(1, [1, 2, 3]) == [1, 0.5, 0.25] and factors(2, [1, 2, 3, 4, 5, 6]) == [1, 1, 0.5, 0.5, 0.25, 0.25]


# ---------------------------------------------------------------------------- gradual


def test_the_cubic_schedule_by_hand():
    """Zhu and Gupta 2017: s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt)) ** 3, here s_i = 0."""
    model = torch.nn.Linear(100, 10, bias=False)
    ticket = rivals.Gradual(model, lottery.BY_MAGNITUDE, 200)
    ticket.round = 3
    assert ticket.spread([250, 500, 700, 1000]) == 2  # the third ends as the masks are settled
    assert (ticket.begin, ticket.settled, ticket.every) == (100, 700, 10)
    for step in (100, 250, 400, 690, 700, 1000):
        part = min(1, (step - 100) / 600)
        sparsity = 0.8 + (0 - 0.8) * (1 - part) ** 3
        assert ticket.kept_at(step) == round(1000 * (1 - sparsity))
    masks, counts = ticket.masks, []
    for _ in range(1000):
        ticket.hold()
        with torch.no_grad():
            model.weight += 0.1 * torch.randn_like(model.weight)  # pruned ones too, as Adam's moments would
        ticket.stepped()
        assert not any((ticket.masks[name] & ~masks[name]).any() for name in masks)  # nested
        ticket.check()
        masks = ticket.masks
        counts.append(ticket.kept)
    assert counts[:109] == [1000] * 109 and counts[109] < 1000 and counts[699:] == [200] * 301 and counts[599] == 204
    assert len(set(counts)) <= 61


# ---------------------------------------------------------------------------- whole runs


def test_rivals_train_what_they_say(source, tmp_path):
    k = json.loads((source / "config.json").read_text())["rewind_step"]
    search = rows_of(source)
    assert [row["steps"] for row in search] == [6, 6 - k, 6 - k]
    in_all = [row["steps_in_all"] for row in search]
    assert in_all == [6, 12 - k, 18 - 2 * k]
    for rival in rivals.RIVALS:
        out = tmp_path / rival
        run("--ticket", source, "--control", rival, "--out", out)
        assert verified(out), verify.failures(out, networks)
        rows = rows_of(out)
        assert rows[0]["trained_sha256"] == search[0]["trained_sha256"] and rows[0]["data_sha256"]
        kept = [row["kept"] for row in (rows[:1] * 3 if rival == "dense-long" else search)]
        assert [row["kept"] for row in rows] == kept
        if rival == "gradual":
            assert [row["steps_in_all"] for row in rows] == [6, 6, 6]
        elif rival in rivals.SEARCHES or k == 0:
            assert [row["steps_in_all"] for row in rows] == in_all
        else:  # whole epochs
            assert all(0 <= row["steps_in_all"] - steps < 3 for row, steps in zip(rows, in_all))
        if rival in rivals.UNREWOUND:
            assert files.load_ticket(out / "ticket.safetensors").rewind is None
        if rival in rivals.SEARCHES:
            assert rows[1]["mask_sha256"] == search[1]["mask_sha256"]  # of the same dense network's last weights
            assert rows[1]["start_sha256"] != search[1]["start_sha256"]
            assert rows[2]["parent_sha256"] == rows[1]["mask_sha256"]
        else:
            assert rows[1]["start_sha256"] == search[0]["start_sha256"]  # theta_0
    ((_, methods),) = compare.merge([compare.load(p) for p in (source, *sorted(tmp_path.iterdir()))]).items()
    assert len(methods) == 6 and len(compare.rivals(methods)) == 5
    rounds = [rows_of(tmp_path / rival)[1] for rival in rivals.SEARCHES]
    assert rounds[0]["start_sha256"] == rounds[1]["start_sha256"] != rounds[0]["last_sha256"]
    assert rounds[0]["last_sha256"] != rounds[1]["last_sha256"]  # other learning rates


@pytest.mark.parametrize("rival", ["lr-rewind", "gradual"])
def test_a_rival_is_resumed_and_trained_again(rival, corpus, source, tmp_path, monkeypatch, capsys):
    flags = ["--ticket", source, "--control", rival, "--save-every", 0]
    run(*flags, "--out", tmp_path / "whole")
    after_step, steps = train.Checkpointer.after_step, []

    def stop_in_round_2(self, ticket, *rest):
        steps.append(ticket.round)
        if steps.count(2) == 2:
            self.signals.number = 15
        after_step(self, ticket, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(train.Checkpointer, "after_step", stop_in_round_2)
        assert train.main([str(a) for a in [*flags, "--out", tmp_path / "cut"]]) == 128 + 15
    run(*flags, "--out", tmp_path / "cut")
    whole, cut = ([ledger.row_hash(row) for row in rows_of(tmp_path / name)] for name in ("whole", "cut"))
    assert whole == cut and verified(tmp_path / "cut")
    assert (tmp_path / "whole/test.jsonl").read_bytes() == (tmp_path / "cut/test.jsonl").read_bytes()
    train.train_again(tmp_path / "cut", 0)
    if rival == "gradual":
        train.train_again(tmp_path / "cut", 2)
    else:
        with pytest.raises(lottery.LotteryError, match="round 2 cannot be trained again: --control lr-rewind starts"):
            train.train_again(tmp_path / "cut", 2)
        capsys.readouterr()
        assert "trained another run's" in refused(capsys, "--ticket", tmp_path / "cut", "--data", corpus)
        assert "searches, from round 0 to the last: no --rounds" in refused(capsys, *flags, "--rounds", 1)


def test_a_late_search_is_resumed_and_trained_again(corpus, tmp_path, monkeypatch, capsys):
    """Stopped in the epoch that a ticket begins in the middle of; a run of the old way is not gone on with."""
    flags = ["--backbone", "cnn-lstm", "--epochs", 3, "--batch-size", 2, "--sparsity", 0.36, "--rewind-step", 4]
    flags += ["--data", corpus, "--save-every", 0]
    run(*flags, "--out", tmp_path / "whole")
    after_step, steps = train.Checkpointer.after_step, []

    def stop_in_round_1(self, ticket, *rest):
        steps.append(ticket.round)
        if steps.count(1) == 1:
            self.signals.number = 15
        after_step(self, ticket, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(train.Checkpointer, "after_step", stop_in_round_1)
        assert train.main([str(a) for a in [*flags, "--out", tmp_path / "cut"]]) == 128 + 15
    run(*flags, "--out", tmp_path / "cut")
    whole, cut = (rows_of(tmp_path / name) for name in ("whole", "cut"))
    assert [ledger.row_hash(row) for row in whole] == [ledger.row_hash(row) for row in cut]
    assert verified(tmp_path / "cut") and [row.get("epochs_before") for row in cut] == [None, 1, 1]
    assert cut[1]["best_epoch"] in (2, 3) and len(cut[1]["losses"]) == 2 and cut[1]["steps"] == 9 - 4
    for number in range(3):
        train.train_again(tmp_path / "cut", number)
    config = json.loads((tmp_path / "cut/config.json").read_text())
    assert config.pop("late_rewinding") == "equal steps"
    (tmp_path / "cut/config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert "late_rewinding None there, equal steps now" in refused(capsys, *flags, "--out", tmp_path / "cut")
    train.train_again(tmp_path / "cut", 0)  # which is the same in both
    with pytest.raises(lottery.LotteryError, match="late_rewinding is equal steps now, None in the run"):
        train.train_again(tmp_path / "cut", 1)


# ---------------------------------------------------------------------------- without a test, and what a test leaves


def test_a_run_without_a_test_never_reads_it(corpus, tmp_path, capsys):
    here = tmp_path / "data"
    here.mkdir()
    for split in ("train", "valid"):
        (here / f"{split}.jsonl").write_text((corpus / f"{split}.jsonl").read_text())  # there is no test.jsonl
    flags = ["--backbone", "cnn-lstm", "--epochs", 2, "--sparsity", 0.2, "--data", here, "--out", tmp_path / "run"]
    assert "test.jsonl: cannot read the manifest" in refused(capsys, *flags)
    run(*flags, "--no-test")
    said = capsys.readouterr().out
    assert "trained with --no-test" in said and "against dense" in said
    for row in rows_of(tmp_path / "run"):
        assert not any(key.startswith("test") for key in row) and "verdict" not in row and row["valid_wer"] >= 0
    assert verified(tmp_path / "run") and not (tmp_path / "run/test.jsonl").exists()
    train.train_again(tmp_path / "run", 1)
    run(*flags, "--no-test")
    assert "is finished: nothing to train" in capsys.readouterr().out
    with pytest.raises(lottery.LotteryError, match="trained with --no-test: it has nothing to compare"):
        compare.load(tmp_path / "run")
    err = refused(capsys, *flags, "--no-test", "--noise", here, "--test-snr", 5)
    assert "--test-snr is of the test, and with --no-test there is none" in err


def test_texts_give_the_ledger_s_counts(corpus, source, tmp_path):
    out = tmp_path / "run"
    run("--ticket", source, "--control", "lr-rewind", "--out", out)
    lines = (out / "test.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 2  # rounds, utterances
    first = json.loads(lines[0])
    assert list(first) == [
        "round", "test", "id", "audio", "reference", "hypothesis", "substitutions", "deletions", "insertions",
    ]  # fmt: skip
    assert first["audio"].endswith(".opus") and "/" not in first["audio"]

    def wrong(text: dict, **changes) -> list[str]:
        changed = [json.dumps(text | changes), *lines[1:]]
        (out / "test.jsonl").write_text("\n".join(changed) + "\n")
        return verify.failures(out, networks)

    assert wrong(first) == []
    assert wrong(first, hypothesis="another text") == ["round 0: other texts in test.jsonl than the ledger's"]
    assert wrong(first, round=3) == ["test.jsonl has texts of round 3, of which the ledger says nothing"]
    assert wrong(first, id="0")[0].endswith(
        "test.jsonl, line 1, id: must be a whole number from 0 to 9223372036854775807, got '0'"
    )
    (out / "test.jsonl").unlink()
    said = next(check for check in verify.verify(out, networks) if check.name.startswith("the texts"))
    assert (said.word, said.missing) == ("not here", "test.jsonl: the texts of rounds 0, 1, 2")


def test_edits_by_hand():
    assert texts.edits("a b c".split(), "a x".split()) == 2 and texts.edits([], ["a"]) == 1
    assert texts.edits(list("kitten"), list("sitting")) == 3 and texts.edits(list("ab"), list("ab")) == 0


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, ""),
        ({"hypothesis": "a b"}, "test, utterance 0: its counts are not its texts'"),
        ({"substitutions": 0}, "test: test.jsonl has other errors than the ledger"),
        ({"reference": "a b", "hypothesis": "c", }, "test: test.jsonl has other words than the ledger"),
        ({"deletions": 2, "substitutions": 0}, "test, utterance 0: its counts are not its texts'"),
    ],
)  # fmt: skip
def test_counts_are_made_anew_from_texts(changes, said, tmp_path):
    text = {"test": "test", "id": 0, "audio": "a.wav", "reference": "a b c", "hypothesis": "a x"}
    text |= {"substitutions": 1, "deletions": 1, "insertions": 0} | changes
    row = {"round": 4, "texts_sha256": ledger.hash_json([text]), "test_errors": [2], "test_words": [3]}
    if said:
        with pytest.raises(lottery.LotteryError, match=f"round 4: {said}"):
            verify.check_texts_of(row, [text])
    else:
        verify.check_texts_of(row, [text])


def test_texts_of_a_round_stand_in_place_of_those_that_were_there(tmp_path):
    line = {"test": "test", "id": 0, "audio": "a.wav", "reference": "a", "hypothesis": "\u2028 \x85"}
    line |= dict.fromkeys(texts.KINDS, 0)
    path = tmp_path / texts.TEXTS
    assert texts.read_texts(path) == []
    for number in (0, 1, 0):
        texts.save_texts(path, number, [line])
    assert texts.read_texts(path) == [{"round": 1, **line}, {"round": 0, **line}]
