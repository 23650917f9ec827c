"""Runs that are killed, stopped, tampered with or started twice. The long versions: make soak."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soak

import lottery
import train

ROOT = Path(train.__file__).parent


def command(corpus, out, *flags):
    flags = ["--data", str(corpus), "--out", str(out), "--epochs", "2", "--sparsity", "0.36", *map(str, flags)]
    return [sys.executable, "train.py", *flags]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return soak.small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(command(corpus, out)[2:]) == 0
    return out


@pytest.fixture
def copy_of_run(finished, tmp_path):
    subprocess.run(["cp", "-r", finished, tmp_path / "run"], check=True)
    return tmp_path / "run"


@pytest.mark.parametrize("what, number", [("kills", 25), ("tickets", 3000), ("ledgers", 300), ("audio", 400)])
def test_short_soak(what, number):
    done = subprocess.run(
        [sys.executable, "tests/soak.py", what, str(number)], capture_output=True, text=True, cwd=ROOT, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"{what}: ")


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_save_and_say_how_to_go_on(number, code, corpus, finished, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(corpus, out, "--save-every", "0"), cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while not (out / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert said.count("\n") == 1 and f"stopped by {number.name}; go on with: python train.py --data" in said
    again = subprocess.run(command(corpus, out), cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "going on in round" in again.stdout, again.stderr
    assert soak.result(out) == soak.result(finished)
    assert sum(row["resumed"] for row in lottery.read_ledger(out / "ledger.jsonl")) == 1


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
        assert "holds another run (data_sha256 " in capsys.readouterr().err
    finally:
        manifest.write_text(whole)


def test_two_processes_on_one_folder(copy_of_run, corpus, capsys):
    with open(copy_of_run / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("process 123 on elsewhere")
        held.flush()
        assert train.main(command(corpus, copy_of_run)[2:]) == 2
    assert "in use by process 123 on elsewhere" in capsys.readouterr().err


def test_a_broken_checkpoint_is_named_and_nothing_is_lost(corpus, tmp_path, capsys, monkeypatch):
    out, steps = tmp_path / "run", []

    def stop(*_):
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


def test_no_more_than_one_checkpoint_and_the_rewind_state(corpus, tmp_path, monkeypatch):
    seen = set()
    save = lottery.write_sealed

    def watch(path, kind, tensors, about):
        save(path, kind, tensors, about)
        seen.update(p.name for p in path.parent.iterdir() if p.is_file() and p.suffix == ".safetensors")

    monkeypatch.setattr(lottery, "write_sealed", watch)
    assert train.main([*command(corpus, tmp_path / "run")[2:], "--save-every", "0"]) == 0
    assert {name for name in seen if not re.match(r"\d+\.", name)} == {
        "rewind.safetensors", "checkpoint.safetensors", "ticket.safetensors",
    }  # fmt: skip
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


# ---------------------------------------------------------------------------- verify


def verified(run, *flags):
    return subprocess.run(
        [sys.executable, "lottery.py", "verify", str(run), *flags], capture_output=True, text=True, cwd=ROOT
    )


def test_verify_and_retrain(copy_of_run):
    for number in ("0", "2"):
        done = verified(copy_of_run, "--retrain", number)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("ok ") == 4 and f"round {number} trained again" in done.stdout


def test_copy_without_rewind(copy_of_run, tmp_path):
    ticket, new = copy_of_run / "ticket.safetensors", tmp_path / "small.safetensors"
    arguments = [sys.executable, "lottery.py", "copy", str(ticket), str(new), "--without-rewind"]
    assert subprocess.run(arguments, cwd=ROOT).returncode == 0
    whole, small = lottery.load_ticket(ticket), lottery.load_ticket(new)
    assert small.rewind is None and lottery.sha256(small.trained) == lottery.sha256(whole.trained)
    assert small.info == whole.info and lottery.sha256(small.masks) == lottery.sha256(whole.masks)
    ticket.write_bytes(b"x")
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "not a whole ticket" in done.stderr


def rewrite(run, number, **changes):
    rows = lottery.read_ledger(run / "ledger.jsonl")
    rows[number] |= changes
    (run / "ledger.jsonl").write_bytes(b"".join(map(lottery.ledger_line, rows)))


def test_verify_finds_tampering(copy_of_run):
    assert verified(copy_of_run.parent / "nowhere").returncode == 2
    tampered = (
        (lambda: rewrite(copy_of_run, 1, test_wer=0.01), "FAILED  the ledger is one chain"),
        (lambda: rewrite(copy_of_run, 2, seconds=0.1), "round 2 does not have the hash it states"),
        (lambda: rewrite(copy_of_run, 1, round=7), "line 2 is round 7"),
        (lambda: (copy_of_run / "masks" / "01.safetensors").unlink(), "01.safetensors: cannot read the masks"),
        (lambda: regrow(copy_of_run), "keeps a weight that was pruned before"),
        (lambda: (copy_of_run / "ticket.safetensors").write_bytes(b"x"), "not a whole ticket"),
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
    path, first = run / "masks" / "02.safetensors", lottery.load_masks(run / "masks" / "01.safetensors")
    masks = lottery.load_masks(path)
    name = next(n for n in masks if not first[n].all() and masks[n].any())
    masks[name].view(-1)[(~first[name]).flatten().nonzero()[0]] = True
    masks[name].view(-1)[masks[name].flatten().nonzero()[-1]] = False
    lottery.save_masks(path, masks)


def unmask(run):
    path = run / "ticket.safetensors"
    file = lottery.load_ticket(path)
    name = next(iter(file.masks))
    lottery.save_ticket(path, file.masks, file.rewind, {**file.trained, name: file.trained[name] * 2}, file.info)


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
