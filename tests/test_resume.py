"""Runs that are killed, stopped, tampered with or started twice. The long versions: make soak."""

import contextlib
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import soak
import torch

import data
import lottery
import train
from audio_lottery import files, ledger, verdicts, verify
from audio_lottery.__main__ import main as audio_lottery
from lab import networks
from runner import folder, retrain, settings

ROOT = Path(train.__file__).parent


def command(corpus, out, *flags):
    flags = ["--data", str(corpus), "--out", str(out), "--epochs", "2", "--sparsity", "0.36", *map(str, flags)]
    return [sys.executable, "train.py", *flags]


def undisturbed(argv):
    """The exit code of train.py in this process, which nobody but the test may stop.

    A run takes every SIGTERM for its own, one that is meant for the tests too (`timeout`, an operator): then the tests
    end as they were told to, and none of them fails.
    """
    code = train.main(argv)
    if code in (130, 143):
        pytest.exit(f"a signal from outside ended a run ({code})", returncode=code)
    return code


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return soak.small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert undisturbed(command(corpus, out)[2:]) == 0
    return out


@pytest.fixture
def copy_of_run(finished, tmp_path):
    subprocess.run(["cp", "-r", finished, tmp_path / "run"], check=True)
    return tmp_path / "run"


@pytest.mark.parametrize("what, number", [("kills", 4), ("tickets", 1000), ("ledgers", 300), ("audio", 400)])
def test_short_soak(what, number):
    done = subprocess.run(
        [sys.executable, "tests/soak.py", what, str(number)], capture_output=True, text=True, cwd=ROOT, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{what}: ")


@pytest.mark.parametrize(
    "number, code, workers", [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 1), (signal.SIGHUP, 129, 0)]
)
def test_signals_save_and_say_how_to_go_on(number, code, workers, corpus, finished, tmp_path):
    """To the whole group, as timeout, torchrun and Slurm send them: workers leave them to the run."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(corpus, out, "--save-every", "0", "--workers", workers),
        cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    while not (out / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code, said
    assert said.count("\n") == 1 and f"stopped by {number.name}; go on with: python train.py --data" in said
    again = subprocess.run(command(corpus, out), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "going on in round" in again.stdout, again.stderr
    assert soak.result(out) == soak.result(finished)
    # none, if it came in a round's test: the row is written then, and the next round begins
    assert sum(row["resumed"] for row in ledger.read_ledger(out / "ledger.jsonl")) <= 1


def test_a_finished_run_trains_nothing(copy_of_run, corpus, capsys):
    before = {path: path.read_bytes() for path in copy_of_run.rglob("*") if path.is_file() and path.name != "lock"}
    assert train.main([*command(corpus, copy_of_run)[2:], "--save-every", "1", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "is finished: nothing to train" in said and "against dense" in said
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    "flag, value, message",
    [
        ("--lr", "0.5", "--lr 0.004 there, 0.5 now"),
        ("--margin", "0.2", "--margin 0.01 there, 0.2 now"),
        ("--rewind-step", "1", "--rewind-step 0 there, 1 now"),
        ("--backbone", "conformer", "--backbone rnnt there, conformer now"),
    ],
)
def test_a_changed_setting_is_refused(flag, value, message, copy_of_run, corpus, capsys):
    assert train.main([*command(corpus, copy_of_run)[2:], flag, value]) == 2
    assert message in capsys.readouterr().err


def test_changed_data_are_refused(finished, corpus, tmp_path, capsys):
    manifest = corpus / "test.jsonl"
    whole = manifest.read_text()
    first, rest = whole.split("\n", 1)
    manifest.write_text(json.dumps(json.loads(first) | {"text": "another"}) + "\n" + rest)
    try:
        assert train.main(command(corpus, finished)[2:]) == 2
        assert "holds another run (--data, by its hash " in capsys.readouterr().err
    finally:
        manifest.write_text(whole)


def test_two_processes_on_one_folder(copy_of_run, corpus, capsys):
    hold = f"""
import fcntl, sys
with open({str(copy_of_run / "lock")!r}, "w") as held:
    fcntl.lockf(held, fcntl.LOCK_EX)
    held.write("process 123 on elsewhere")
    held.flush()
    print("held", flush=True)
    sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold], text=True, **pipes) as holder:
        holder.stdout.readline()
        assert train.main(command(corpus, copy_of_run)[2:]) == 2
        assert "in use by process 123 on elsewhere" in capsys.readouterr().err
        holder.kill()
    assert train.main(command(corpus, copy_of_run)[2:]) == 0  # the lock died with its owner


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    """A stranger's run folder must not empty a file elsewhere."""
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "lock").symlink_to("thesis.txt")
    with pytest.raises(OSError, match="lock"), folder.locked(tmp_path):
        pass
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_broken_checkpoint_is_named_and_nothing_is_lost(corpus, tmp_path, capsys, monkeypatch):
    out, steps = tmp_path / "run", []

    def stop(ticket):
        if ticket.steps == 0:  # it is being made
            return
        steps.append(1)
        if len(steps) == 3:
            raise train.Stopped(signal.SIGTERM)

    monkeypatch.setattr(lottery.Ticket, "check", stop)
    assert train.main([*command(corpus, out)[2:], "--save-every", "0"]) == 143
    checkpoint = out / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-5])
    ledger = (out / "ledger.jsonl").read_bytes()
    capsys.readouterr()
    assert train.main(command(corpus, out)[2:]) == 2
    assert "checkpoint.safetensors: not a whole checkpoint" in capsys.readouterr().err
    assert (out / "ledger.jsonl").read_bytes() == ledger


def test_a_round_that_was_tested_keeps_its_texts(corpus, tmp_path, monkeypatch):
    """Stopped behind its row, the round is not tested again on going on: another machine may hear another word."""
    out, append, evaluate, tests = tmp_path / "run", ledger.append_row, train.evaluate_on_tests, []

    def stop(path, rows, row, config):
        append(path, rows, row, config)
        if row["round"] == 1:
            raise train.Stopped(signal.SIGTERM)

    def count(*given):
        tests.append(1)
        return evaluate(*given)

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "append_row", stop)
        assert train.main(command(corpus, out)[2:]) == 143
    texts = (out / "test.jsonl").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(train, "evaluate_on_tests", count)
        patched.setattr(ledger, "append_row", stop)
        assert train.main(command(corpus, out)[2:]) == 143
    assert not tests and (out / "test.jsonl").read_bytes() == texts
    assert train.main(command(corpus, out)[2:]) == 0 and not verify.failures(out, networks)


def test_no_more_than_one_checkpoint_and_the_rewind_state(corpus, tmp_path, monkeypatch):
    seen = set()
    save = files.write_sealed

    def watch(path, kind, tensors, about):
        save(path, kind, tensors, about)
        seen.update(p.name for p in path.parent.iterdir() if p.is_file() and p.suffix == ".safetensors")

    monkeypatch.setattr(files, "write_sealed", watch)
    assert train.main([*command(corpus, tmp_path / "run")[2:], "--save-every", "0"]) == 0
    assert {name for name in seen if not re.match(r"\d+\.", name)} == {
        "rewind.safetensors", "checkpoint.safetensors", "ticket.safetensors", "dense.safetensors",
    }  # fmt: skip
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


# ---------------------------------------------------------------------------- verify


def called(main, *argv):
    """A command in this process, as subprocess.run would give it."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(map(str, argv)))
        except SystemExit as error:
            code = error.code
    return types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def verified(run):
    return called(audio_lottery, "verify", run)


def test_verify_and_retrain(copy_of_run):
    done = verified(copy_of_run)
    assert done.returncode == 0 and done.stdout.count("ok ") == 10, done.stdout + done.stderr
    for number in ("0", "2"):
        done = called(train.main, "--retrain", copy_of_run, number)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"ok      round {number} trained again" in done.stdout
        assert ("mask_sha256" in done.stdout) == (number == "0")  # round 2 is the last: nothing was pruned after it
    done = called(train.main, "--retrain", copy_of_run, 9)
    assert done.returncode == 2 and "the ledger has rounds 0, 1, 2" in done.stderr and done.stderr.count("\n") == 1


def test_training_again_keeps_features_where_this_command_says(copy_of_run, tmp_path):
    """And not in the folder that a stranger's config.json names."""
    config = json.loads((copy_of_run / "config.json").read_text())
    config["machine"]["cache"] = str(tmp_path / "theirs")
    (copy_of_run / "config.json").write_text(json.dumps(config))
    assert retrain.read(copy_of_run, 1).args.cache == "memory"
    there = retrain.read(copy_of_run, 1, tmp_path / "ours")
    assert there.args.cache == tmp_path / "ours" and retrain.prepare(there)[1].round == 1
    assert (tmp_path / "ours").is_dir() and not (tmp_path / "theirs").exists()
    config["machine"]["data"] = "--download"
    (copy_of_run / "config.json").write_text(json.dumps(config))
    with pytest.raises(data.DataError, match="--download: no such folder"):
        retrain.prepare(retrain.read(copy_of_run, 1))


def test_copy_without_rewind(copy_of_run, tmp_path):
    ticket, new = copy_of_run / "ticket.safetensors", tmp_path / "small.safetensors"
    arguments = ["copy", ticket, new, "--without-rewind"]
    assert called(audio_lottery, *arguments).returncode == 0
    whole, small = files.load_ticket(ticket), files.load_ticket(new)
    assert small.rewind is None and small.rewind_sha256 == lottery.sha256(whole.rewind)
    assert lottery.sha256(small.trained) == lottery.sha256(whole.trained)
    assert small.info == whole.info and lottery.sha256(small.masks) == lottery.sha256(whole.masks)
    ticket.write_bytes(b"x")
    done = called(audio_lottery, *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not a whole ticket" in done.stderr


def rewrite(run, number, **changes):
    rows = ledger.read_ledger(run / "ledger.jsonl")
    rows[number] |= changes
    (run / "ledger.jsonl").write_bytes(b"".join(map(ledger.ledger_line, rows)))


def forge(run, number, **changes):
    """Change a row and compute every hash behind it anew, as somebody would who wants to be believed."""
    rows = ledger.read_ledger(run / "ledger.jsonl")
    rows[number] = {key: value for key, value in (rows[number] | changes).items() if value is not None}
    for row, before in zip(rows[1:], rows):
        row["previous"] = ledger.row_hash(before)
    for row in rows:
        row["timing_sha256"] = ledger.timing_hash(row)
    (run / "ledger.jsonl").write_bytes(b"".join(map(ledger.ledger_line, rows)))


@pytest.mark.parametrize(
    "number, changes, message",
    [
        (2, {"test_wer": 0.01}, "round 2: test_wer is not test_errors / test_words"),
        (2, {"verdict": "winning", "interval": [-0.5, -0.4]}, "round 2: the verdict is "),
        (1, {"remaining": 0.1}, "round 1: remaining is not kept / total"),
        (1, {"remaining_all": 0.1}, "round 1: remaining_all is not "),
        (2, {"remaining_all": 0.1}, "remaining_all is not "),
        (1, {"best_epoch": 99}, "round 1: the best valid WER and its epoch are "),
        (2, {"valid_wer": -0.5}, "line 3, valid_wer: must be a number from 0 to 1e+06, got -0.5"),
        (2, {"losses": [1.0] * 99}, "round 2: not as many epochs as configured"),
        (1, {"seed": 5}, "round 1: seed is not the configuration's"),
        (0, {"data_sha256": "0" * 64}, "round 0: data_sha256 is not the configuration's"),
        (2, {"config_sha256": "0" * 64}, "round 2: config_sha256 is not the configuration's"),
        (2, {"start_sha256": "0" * 64}, "round 2: does not start at theta_k * mask"),
        (2, {"info_sha256": "0" * 64}, "its info (tokens, sizes, features) is not the last round's"),
        (0, {"total": float("inf")}, "line 1: not a row of a ledger that can be read (the number Infinity)"),
    ],
)
def test_verify_finds_forged_rows(number, changes, message, copy_of_run):
    forge(copy_of_run, number, **changes)
    wrong = verify.failures(copy_of_run, networks)
    assert wrong and any(message in text for text in wrong), wrong


def test_a_run_does_not_write_through_links(copy_of_run, corpus, tmp_path, capsys):
    target = tmp_path / "mine"
    target.write_text("a token without a newline")
    (copy_of_run / "ledger.jsonl").unlink()
    (copy_of_run / "ledger.jsonl").symlink_to(target)
    assert train.main(command(corpus, copy_of_run)[2:]) == 2
    assert "ledger.jsonl is a link, which a run does not write through" in capsys.readouterr().err
    assert target.read_text() == "a token without a newline"


def test_retraining_from_other_masks_is_one_line(copy_of_run, capsys):
    masks = files.load_masks(copy_of_run / "masks" / "02.safetensors")
    for wrong in ({name: ~mask for name, mask in masks.items()}, {}):
        files.save_masks(copy_of_run / "masks" / "02.safetensors", wrong)
        assert train.main(["--retrain", str(copy_of_run), "2"]) == 2
        assert "the masks of round 2 are not the ledger's" in capsys.readouterr().err


def test_retraining_finds_a_consistent_forgery(copy_of_run):
    """Other errors with the rates and verdicts that follow from them: only training again can tell."""
    rows = ledger.read_ledger(copy_of_run / "ledger.jsonl")
    errors = [0] * len(rows[2]["test_errors"])
    found = verdicts.verdict(errors, rows[0]["test_errors"], rows[2]["test_words"])
    changes = {
        "test_errors": errors,
        "test_wer": 0.0,
        "test_cer": 0.0,
        "verdict": found.word,
        "interval": [found.low, found.high],
    }
    forge(copy_of_run, 2, **changes)
    (copy_of_run / "test.jsonl").unlink()  # whose texts would tell
    assert not verify.failures(copy_of_run, networks)
    done = called(train.main, "--retrain", copy_of_run, 2)
    assert done.returncode == 1 and "differs from the ledger in test_wer" in done.stderr


def test_a_broken_ledger_is_refused_at_the_start(copy_of_run, corpus, capsys):
    path = copy_of_run / "ledger.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for content, message in (
        (b"{}\n", "line 1: a value is missing: round, remaining"),
        (b"".join([*lines, lines[-1]]), "line 5: stands behind the end"),
        (b"".join(lines[1:]), "line 1 is round 1"),
        (lines[0], "no checkpoint to go on from"),
    ):
        path.write_bytes(content)
        assert train.main(command(corpus, copy_of_run)[2:]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said


def stopped_run(corpus, out, monkeypatch, *flags):
    """A run that stops in its second round, at the end of an epoch."""
    calls = []

    def stop(ticket):
        if ticket.steps == 0:  # it is being made
            return
        calls.append(1)
        if len(calls) == 5:
            raise train.Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(lottery.Ticket, "check", stop)
        assert train.main([*command(corpus, out)[2:], "--save-every", "0", *flags]) == 143


def test_a_checkpoint_of_another_run_or_round_is_refused(corpus, tmp_path, capsys, monkeypatch):
    stopped_run(corpus, tmp_path / "a", monkeypatch)
    stopped_run(corpus, tmp_path / "b", monkeypatch, "--seed", "1")
    for name in ("checkpoint", "rewind"):
        ours, theirs = tmp_path / "a" / f"{name}.safetensors", tmp_path / "b" / f"{name}.safetensors"
        whole = ours.read_bytes()
        ours.write_bytes(theirs.read_bytes())
        capsys.readouterr()
        assert train.main(command(corpus, tmp_path / "a")[2:]) == 2
        assert "there is of another run" in capsys.readouterr().err
        ours.write_bytes(whole)
    (tmp_path / "a" / "ledger.jsonl").write_bytes(b"")
    assert train.main(command(corpus, tmp_path / "a")[2:]) == 2
    assert "the checkpoint is in round 1, the ledger has 0 rounds" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["valid", "test", "last test"])
def test_a_signal_during_an_evaluation_is_not_lost(when, corpus, finished, tmp_path, monkeypatch, capsys):
    recognise, seen = train.recognise, []

    at = {"valid": 1, "test": 2, "last test": 8}[when]

    def signalled(model, examples, *rest):
        seen.append(len(seen))  # epochs 2, rounds 3: valid, valid, test; valid, valid, test; ...
        if seen[-1] == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return recognise(model, examples, *rest)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train, "recognise", signalled)
        code = train.main(command(corpus, out)[2:])
    if at not in seen and code == 143:
        pytest.exit("a signal from outside ended a run (143)", returncode=143)
    assert code == 143 and seen[-1] == at  # not a step later
    assert "stopped by SIGTERM" in capsys.readouterr().err
    assert undisturbed(command(corpus, out)[2:]) == 0
    assert soak.result(out) == soak.result(finished) and (out / "report.png").exists()


def test_a_signal_that_is_sent_twice_is_one(corpus, tmp_path, monkeypatch, capsys):
    """As `timeout` does, in a step and while the first one is being told: the run is saved, and ends in one line."""
    printable, hold = train.printable, lottery.Ticket.hold

    def twice(ticket):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        hold(ticket)

    def again(text):
        if "stopped by" in text:
            os.kill(os.getpid(), signal.SIGTERM)
        return printable(text)

    monkeypatch.setattr(lottery.Ticket, "hold", twice)
    monkeypatch.setattr(train, "printable", again)
    monkeypatch.setattr(folder.Signals, "SAME", 100.0)  # seconds: however slow this machine is
    assert train.main(command(corpus, tmp_path / "run")[2:]) == 143
    assert folder.Checkpoint(tmp_path / "run", run_sha256(tmp_path / "run")).about["progress"]["batch"] == 1
    assert capsys.readouterr().err.count("\n") == 1


def run_sha256(run):
    return ledger.hash_json(ledger.settings_of(ledger.read_config(run)))


def test_a_round_that_other_code_goes_on_with_says_so(corpus, tmp_path, monkeypatch, capsys):
    argv, steps = [*command(corpus, tmp_path / "run")[2:], "--backbone", "cnn-lstm"], itertools.count(1)
    after_step = train.Checkpointer.after_step

    def stop_once(self, ticket, *rest):
        if ticket.round == 1 and next(steps) == 2:
            self.signals.number = signal.SIGTERM
        after_step(self, ticket, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train.Checkpointer, "after_step", stop_once)
        assert train.main(argv) == 143
    before = settings.CODE_SHA256
    monkeypatch.setattr(settings, "CODE_SHA256", "0" * 64)
    assert undisturbed(argv) == 0
    said = "the round's first part was trained with other code_sha256: bits may differ, and its row says so"
    assert said in capsys.readouterr().out
    rows = ledger.read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert [row.get("earlier") for row in rows] == [None, {"code_sha256": [before]}, None]
    assert verify.failures(tmp_path / "run", networks) == []


def test_facts_of_before_are_kept_and_other_tokens_refused(tmp_path):
    checkpoint = folder.Checkpoint.__new__(folder.Checkpoint)
    facts = {"tokens": "a", "threads": 2, "device": "cpu", "earlier": {"device": ["cuda"], "threads": [1, 4]}}
    checkpoint.out, checkpoint.about = tmp_path, {"round": 3, "facts": facts}
    now = {"tokens": "a", "threads": 1, "device": "cpu"}
    assert checkpoint.other_facts(now, [{"round": 3}]) == {}
    found = checkpoint.other_facts(now, [])
    assert found == {3: {"threads": [4, 2], "device": ["cuda"]}}
    with pytest.raises(lottery.LotteryError, match="the checkpoint is of other tokens"):
        checkpoint.other_facts({"tokens": "b", "threads": 2}, [])


def test_signals_before_a_run_can_be_saved(monkeypatch):
    """Raised at once; and noted, since Python drops what is raised in a destructor."""

    class Trap:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with folder.Signals() as signals:
        Trap()
        assert signals.number == signal.SIGTERM  # so that the next step ends the run
    monkeypatch.setattr(folder.Signals, "SAME", 100.0)  # seconds: however slow this machine is
    with folder.Signals() as signals:
        with pytest.raises(folder.Stopped):
            os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same
        monkeypatch.setattr(signals, "last", signals.last - 101)
        with pytest.raises(folder.Stopped):  # the second one does not wait
            os.kill(os.getpid(), signal.SIGINT)


def test_the_hash_of_the_code_is_of_what_was_imported(monkeypatch):
    """An edit of a source while tests or a run are at work changes no row: it is not what they run."""
    args = types.SimpleNamespace(seed=0, device="cpu")
    setting = types.SimpleNamespace(args=args, config={"machine": {}, "data_sha256": "x"})
    stated = settings.Setting.facts(setting)["code_sha256"]
    monkeypatch.setattr(Path, "read_bytes", lambda _: b"edited")
    assert settings.Setting.facts(setting)["code_sha256"] == stated != settings.code_sha256()


def test_a_row_names_the_operators_that_it_ran_on(monkeypatch):
    setting = types.SimpleNamespace(
        args=types.SimpleNamespace(seed=0, device="cpu"), config={"machine": {}, "data_sha256": "x"}
    )
    for path in ("compiled C++ (AVX2, OpenMP)", "pure PyTorch (" + 200 * "x"):
        monkeypatch.setattr(lottery, "ops", lottery.ops._replace(path=path))
        row = settings.Setting.facts(setting)
        assert row["versions"]["operators"] == path[:100]
        ledger.ROW_MAY["versions"](row["versions"], "versions")


def test_a_signal_while_a_checkpoint_is_read_is_no_damage(corpus, tmp_path, monkeypatch, capsys):
    stopped_run(corpus, tmp_path / "run", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(files.safetensors.torch, "load", lambda _: os.kill(os.getpid(), signal.SIGTERM))
        assert train.main(command(corpus, tmp_path / "run")[2:]) == 143
    assert train.main(command(corpus, tmp_path / "run")[2:]) == 0


def test_the_same_corpus_elsewhere_is_the_same_run(copy_of_run, corpus, tmp_path, capsys):
    subprocess.run(["cp", "-r", corpus, tmp_path / "moved"], check=True)
    assert train.main(command(tmp_path / "moved", copy_of_run)[2:]) == 0
    assert "is finished: nothing to train" in capsys.readouterr().out


def test_verify_finds_tampering(copy_of_run):
    assert verified(copy_of_run.parent / "nowhere").returncode == 2
    tampered = (
        (lambda: rewrite(copy_of_run, 1, test_wer=0.01), "FAILED    the ledger is one chain"),
        (lambda: rewrite(copy_of_run, 2, seconds=0.5), "round 2 does not have the hash it states"),
        (lambda: rewrite(copy_of_run, 1, round=7), "line 2 is round 7"),
        (lambda: (copy_of_run / "masks" / "01.safetensors").unlink(), "01.safetensors: cannot read the masks"),
        (lambda: regrow(copy_of_run), "keeps a weight that was pruned before"),
        (lambda: (copy_of_run / "ticket.safetensors").write_bytes(b"x"), "not a whole ticket"),
        (lambda: swap(copy_of_run), "dense.safetensors: its weights are not those that were tested in round 0"),
        (lambda: unmask(copy_of_run), "its weights are not those that were tested"),
        (lambda: reseed(copy_of_run), "does not follow the configuration"),
    )
    for tamper, message in tampered:
        originals = {path: path.read_bytes() for path in copy_of_run.rglob("*") if path.is_file()}
        tamper()
        done = verified(copy_of_run)
        assert done.returncode == 1 and message in done.stdout and "Traceback" not in done.stderr, done.stdout
        for path, content in originals.items():
            path.write_bytes(content)
    assert verified(copy_of_run).returncode == 0


def regrow(run):
    """Swap a kept for a pruned weight in round 2's masks: the counts stay right."""
    path, first = run / "masks" / "02.safetensors", files.load_masks(run / "masks" / "01.safetensors")
    masks = files.load_masks(path)
    name = next(n for n in masks if not first[n].all() and masks[n].any())
    masks[name].view(-1)[(~first[name]).flatten().nonzero()[0]] = True
    masks[name].view(-1)[masks[name].flatten().nonzero()[-1]] = False
    files.save_masks(path, masks)


def swap(run):
    """The ticket in the dense network's place."""
    (run / "dense.safetensors").write_bytes((run / "ticket.safetensors").read_bytes())


def unmask(run):
    path = run / "ticket.safetensors"
    file = files.load_ticket(path)
    assert file.rewind is not None
    name = next(iter(file.masks))
    files.save_ticket(path, file.masks, file.rewind, {**file.trained, name: file.trained[name] * 2}, file.info)


def reseed(run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"seed": 7}))


def test_an_unwritable_folder_ends_in_one_line(corpus, tmp_path, capsys):
    if os.geteuid() == 0:
        out = Path("/proc/nothing/here")  # root may write anywhere else
    else:
        out = tmp_path / "closed"
        out.mkdir(mode=0o500)
        out = out / "run"
    assert train.main(command(corpus, out)[2:]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_checkpoints_that_are_slow_to_write_are_written_less_often(tmp_path, monkeypatch):
    """At the default saving takes 1 % of the time at most; a stated --save-every is kept."""
    now = [0.0]
    monkeypatch.setattr(folder.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(files, "write_sealed", lambda *_: now.__setitem__(0, now[0] + 20))
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    rest = lottery.Ticket(model), optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), train.Progress()
    for minutes, seconds in ((None, 2000), (1, 60)):
        keeper = train.Checkpointer(tmp_path, "", minutes, train.Signals(), None)
        keeper.save(*rest)  # twenty seconds each, of two files
        keeper.save(*rest)
        assert keeper.seconds == seconds


def test_a_checkpoint_of_another_version_is_refused_in_a_line(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    at = train.Progress(epoch=3, losses=[1.0] * 3, valid_wers=[1.0] * 3, best=lottery.copy_state(model))
    rest = lottery.Ticket(model), optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer), at
    train.Checkpointer(tmp_path, "", None, train.Signals(), None).save(*rest)
    kept = folder.Checkpoint(tmp_path, "")
    assert kept.restore(model, *rest[1:3], "cpu").epoch == 3
    kept.about["progress"]["best_wer"] = 0.5  # what it said before it kept the valid WER of every epoch
    with pytest.raises(lottery.LotteryError, match="the checkpoint is of another version"):
        kept.restore(model, *rest[1:3], "cpu")


def test_a_checkpoint_that_lies_is_refused_in_a_line(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    at = train.Progress(epoch=1, losses=[1.0], valid_wers=[1.0], best=lottery.copy_state(model))
    ticket, schedule = lottery.Ticket(model), torch.optim.lr_scheduler.ConstantLR(optimizer)
    train.Checkpointer(tmp_path, "", None, train.Signals(), None).save(ticket, optimizer, schedule, at)
    path = tmp_path / "checkpoint.safetensors"
    tensors, about = files.read_sealed(path, "checkpoint")
    about = {key: value for key, value in about.items() if key not in ("format", "kind")}
    progress = about["progress"]

    def refused(tensors, about):
        files.write_sealed(path, "checkpoint", tensors, about)
        with pytest.raises(lottery.LotteryError) as error:
            there = folder.Checkpoint(tmp_path, "")
            there.resume(ticket)
            there.restore(model, optimizer, schedule, "cpu", epochs=2)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)

    for name in tensors:
        refused(
            {key: value for key, value in tensors.items() if key != name}, about
        ) if "optimizer" not in name else None
    refused(tensors | {"optimizer/more/step": torch.zeros(1)}, about)
    refused(tensors | {"model/weight": torch.zeros(9, 9)}, about)
    for change in ({"epoch": 2}, {"epoch": 10**9}, {"losses": []}, {"valid_wers": ["x"]}, {"batch": -1}):
        refused(tensors, about | {"progress": progress | change})
    for key, value in (
        ("round", -1),
        ("steps", "x"),
        ("start", 5),
        ("group", []),
        ("threshold", None),
        ("schedule", {}),
    ):
        refused(tensors, about | {key: value})
    theta, _ = files.read_sealed(tmp_path / "rewind.safetensors", "rewind state")
    files.write_sealed(tmp_path / "rewind.safetensors", "rewind state", {"weight": theta["weight"]}, {"run": ""})
    refused(tensors, about)


def test_only_the_process_that_writes_decides_when_to_save(tmp_path, monkeypatch):
    """The others do not know how long writing takes."""
    saved = []
    monkeypatch.setattr(train.Checkpointer, "save", lambda *_: saved.append(1))
    for process, expected in ((1, 0), (0, 1)):
        monkeypatch.setattr(folder.processes, "index", lambda: process)  # noqa: B023
        train.Checkpointer(tmp_path, "", 0, train.Signals(), None).after_step(None, None, None, None)
        assert len(saved) == expected


def test_buffers_that_a_state_dict_leaves_out_survive_a_checkpoint(tmp_path):
    """The model's own in checkpoint.safetensors, and those that every round rewinds to in rewind.safetensors."""

    def network():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 2))
        model.register_buffer("steps", torch.zeros(()), persistent=False)
        return model

    ticket = lottery.Ticket(network())
    ticket.prune(4)
    ticket.round = 1
    ticket.rewind()
    ticket.model.steps += 5
    optimizer = torch.optim.AdamW(ticket.model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    at = folder.Progress(epoch=1, losses=[1.0], valid_wers=[1.0], best=lottery.copy_state(ticket.model))
    folder.Checkpointer(tmp_path, "a run", None, folder.Signals(), None).save(ticket, optimizer, schedule, at)
    again = lottery.Ticket(network())
    checkpoint = folder.Checkpoint(tmp_path, "a run")
    checkpoint.resume(again)
    assert int(again.model.steps) == 5 and again.start_sha256 == ticket.start_sha256
    assert int(checkpoint.restore(again.model, optimizer, schedule, "cpu").best["steps"]) == 5
    again.prune(3)
    again.rewind()
    assert int(again.model.steps) == 0
    assert lottery.sha256(again.rewind_state) == lottery.sha256(ticket.rewind_state)


def test_an_older_rule_s_verdicts_are_not_held_against_this_one_s(copy_of_run):
    """Their intervals were made otherwise; their counts, and the chain, are checked as ever; they train again too."""
    rows = ledger.read_ledger(copy_of_run / "ledger.jsonl")
    assert [row["verdict_rule"] for row in rows] == [verdicts.VERDICT_RULE] * 3
    forge(copy_of_run, 2, verdict="winning", interval=[-0.5, -0.4])
    (wrong,) = verify.failures(copy_of_run, networks)
    assert wrong.startswith("round 2: the verdict is ")
    for number in range(3):  # as a ledger of before has it: without the rule's name
        forge(copy_of_run, number, verdict_rule=None)
    assert not verify.failures(copy_of_run, networks)
    assert "not here" in [check.word for check in verify.verify(copy_of_run, networks)]
    assert train.main(["--retrain", str(copy_of_run), "2"]) == 0
    for changes, message in (
        ({"interval": [0.1, 0.2]}, "round 2: the verdict winning is not that of [0.1, 0.2]"),
        ({"interval": [-0.5, -0.4], "verdict_rule": 3}, "round 2: verdict_rule must be 2, got 3"),
    ):
        forge(copy_of_run, 2, **changes)
        assert verify.failures(copy_of_run, networks) == [message]
    forge(copy_of_run, 2, test_wer=0.01, verdict_rule=None)
    assert any("test_wer is not" in wrong for wrong in verify.failures(copy_of_run, networks))
