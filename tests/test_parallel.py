"""Runs of several processes: the same masks as one process, stopped and taken up again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soak
import torch

import lottery
import train
from audio_lottery import files, ledger

ROOT = Path(lottery.__file__).parent
SCRIPT = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import models, soak, train
soak.shrink_models()
for backbone in models.BACKBONES.values():
    backbone.SIZES["demo"]["dropout"] = 0.0  # processes draw other places than one process does
sys.exit(train.main())
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return soak.small_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "train_small.py"
    path.write_text(SCRIPT)
    return path


def start(script, corpus, out, processes, *flags):
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    argv = ["--data", corpus, "--out", out, "--epochs", "3", "--sparsity", "0.36", "--lr", "1e-2", *flags]
    return subprocess.Popen(
        [sys.executable, *launch, script, *map(str, argv)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, out + err
    return out


@pytest.mark.parametrize("backbone", ["cnn-lstm", "rnnt"])  # with batch norm, and without
def test_two_processes_come_to_the_masks_of_one_with_the_doubled_batch(backbone, script, corpus, tmp_path):
    one = start(script, corpus, tmp_path / "one", 1, "--backbone", backbone, "--batch-size", 4)
    finish(one)
    said = finish(start(script, corpus, tmp_path / "two", 2, "--backbone", backbone, "--batch-size", 2))
    assert said.count("round  remaining") == 1  # the first process speaks for all
    rows, expected = (ledger.read_ledger(tmp_path / name / "ledger.jsonl") for name in ("two", "one"))
    assert [row["mask_sha256"] for row in rows] == [row["mask_sha256"] for row in expected]
    assert len({row["mask_sha256"] for row in rows}) == 3
    assert [wrong for _, wrong in ledger.verify(tmp_path / "two")] == [""] * 5
    trained, other = (files.load_ticket(tmp_path / name / "ticket.safetensors").trained for name in ("two", "one"))
    for name, value in trained.items():
        # Batch norm takes the biases before it out again: their gradient is rounding, and so is what Adam makes of it.
        if not (name.endswith("bias") and ("convs" in name or "depthwise" in name)) and "running_mean" not in name:
            torch.testing.assert_close(value, other[name], atol=2e-3, rtol=1e-2, msg=name)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2


def test_two_processes_are_stopped_and_go_on(script, corpus, tmp_path):
    finish(start(script, corpus, tmp_path / "whole", 2, "--batch-size", 2))
    stopped = start(script, corpus, tmp_path / "stopped", 2, "--batch-size", 2, "--save-every", 0)
    while not (tmp_path / "stopped" / "checkpoint.safetensors").exists():
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    stopped.communicate(timeout=100)
    assert stopped.returncode != 0 and (tmp_path / "stopped" / "checkpoint.safetensors").exists()
    assert "going on in round" in finish(start(script, corpus, tmp_path / "stopped", 2, "--batch-size", 2))
    assert soak.result(tmp_path / "stopped") == soak.result(tmp_path / "whole")
    # One process is another run: its batches are half as large.
    alone = start(script, corpus, tmp_path / "whole", 1, "--batch-size", 2)
    _, said = alone.communicate(timeout=100)
    assert alone.returncode == 2 and "holds another run (processes 2 there, 1 now)" in said


def test_processes_that_pruned_differently_are_refused(corpus, tmp_path, monkeypatch, capsys):
    def gather(value):
        other = ("0" * 64, value[1]) if isinstance(value, tuple) else value
        return [value, other] if isinstance(value, tuple) else [value]

    monkeypatch.setattr(train.processes, "gather", gather)
    argv = ["--data", str(corpus), "--out", str(tmp_path / "run"), "--epochs", "1", "--sparsity", "0.2"]
    assert train.main(argv) == 2
    assert "round 0: the processes have other masks or weights" in capsys.readouterr().err
