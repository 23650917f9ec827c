"""Runs of several processes: the same masks as one process, stopped and taken up again."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soak
import torch

import data
import lottery
import models
import train
from audio_lottery import files, ledger, verify
from runner import processes, recipes
from runner.folder import Progress

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


@pytest.mark.parametrize("backbone", ["cnn-lstm", pytest.param("rnnt", marks=pytest.mark.slow)])  # without batch norm
def test_two_processes_come_to_the_masks_of_one_with_the_doubled_batch(backbone, script, corpus, tmp_path):
    one = start(script, corpus, tmp_path / "one", 1, "--backbone", backbone, "--batch-size", 4)
    finish(one)
    said = finish(start(script, corpus, tmp_path / "two", 2, "--backbone", backbone, "--batch-size", 2))
    assert said.count("round  remaining") == 1  # the first process speaks for all
    rows, expected = (ledger.read_ledger(tmp_path / name / "ledger.jsonl") for name in ("two", "one"))
    assert [row["mask_sha256"] for row in rows] == [row["mask_sha256"] for row in expected]
    assert len({row["mask_sha256"] for row in rows}) == 3
    assert verify.failures(tmp_path / "two") == []  # its networks are smaller than those of this process
    trained, other = (files.load_ticket(tmp_path / name / "ticket.safetensors").trained for name in ("two", "one"))
    for name, value in trained.items():
        # Batch norm takes the biases before it out again: their gradient is rounding, and so is what Adam makes of it.
        if not (name.endswith("bias") and ("convs" in name or "depthwise" in name)) and "running_mean" not in name:
            torch.testing.assert_close(value, other[name], atol=2e-3, rtol=1e-2, msg=name)
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_two_processes_are_stopped_and_go_on(script, corpus, tmp_path):
    finish(start(script, corpus, tmp_path / "whole", 2, "--batch-size", 2))
    stopped = start(script, corpus, tmp_path / "stopped", 2, "--batch-size", 2, "--save-every", 0)
    while not (tmp_path / "stopped" / "checkpoint.safetensors").exists():
        assert stopped.poll() is None, stopped.communicate()
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    said = "".join(map(str, stopped.communicate(timeout=100)))
    assert stopped.returncode != 0 and (tmp_path / "stopped" / "checkpoint.safetensors").exists()
    assert said.count("go on with: the same torchrun command, with 2 processes again") == 1, said
    assert "going on in round" in finish(start(script, corpus, tmp_path / "stopped", 2, "--batch-size", 2))
    assert soak.result(tmp_path / "stopped") == soak.result(tmp_path / "whole")
    # One process is another run: its batches are half as large.
    alone = start(script, corpus, tmp_path / "whole", 1, "--batch-size", 2)
    _, said = alone.communicate(timeout=100)
    assert alone.returncode == 2 and "holds another run (processes 2 there, 1 now): start as many" in said


def test_what_a_step_of_several_processes_holds_is_told(monkeypatch):
    recipe = recipes.RECIPES["conformer", "paper"]
    assert processes.told(recipe) == ""
    monkeypatch.setattr(processes, "count", lambda: 8)
    assert processes.told(recipe) == "; 8 processes, 2048 utterances a step"
    assert processes.told(dataclasses.replace(recipe, batch_seconds=60.0)) == "; 8 processes, 7680 s a step"


def spans(lengths, seconds, processes) -> list[list[list[int]]]:
    """Frames of each utterance in each process's share of each batch."""
    examples = [data.Example(torch.zeros(n, 4), "", [1]) for n in lengths]
    epochs = [data.Epoch(examples, 1, 0, 0, None, seconds, p, processes) for p in range(processes)]
    found = []
    for k, chunk in enumerate(epochs[0].chunks):
        shares = [[lengths[i] for i in chunk[epoch.mine(k)]] if epoch.weight(k) else [] for epoch in epochs]
        assert sum(map(len, shares)) == len(chunk)
        found.append(shares)
    return found


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batch_seconds_hold_in_each_process(processes):
    """60 s gave 66.4: the cut looked at lengths that were jittered by up to 10 %."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 1500, 600).tolist() + [9000, 7000, 6500]
    batches = spans(lengths, 60, processes)
    assert sorted(n for shares in batches for share in shares for n in share) == sorted(lengths)
    padded = [max(share) * len(share) for shares in batches for share in shares if len(share) > 1]
    assert max(padded) <= 6000 and np.median(padded) > 5000
    assert {n for shares in batches for share in shares for n in share if n > 6000} == {9000, 7000, 6500}
    assert all(len(share) == 1 for shares in batches for share in shares if max(share, default=0) > 6000)


def test_batches_by_seconds_by_hand():
    # Shortest first; two of 30 frames are 0.6 s, a third would be 0.9. The long one has a process for itself.
    assert sorted(spans([30, 30, 30, 30, 500], 0.6, 1)) == [[[30, 30]], [[30, 30]], [[500]]]
    assert sorted(spans([30, 30, 30, 30, 500], 0.6, 2)) == [[[30, 30], [30, 30]], [[500], []]]
    assert sorted(spans([30, 30, 500], 0.6, 2)) == [[[30], [30]], [[500], []]]


def in_processes(count, folder) -> None:
    """gradients() in each of `count` forked processes that talk over gloo; what each finds, to folder/RANK.pt.

    Called in an interpreter of its own: where autograd has started a thread (torch.library.opcheck does), no forked
    process can go backward.
    """
    import torch._dynamo  # DistributedDataParallel does; slow, so once here rather than in each

    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                where = f"file://{folder / 'meet'}"
                torch.distributed.init_process_group("gloo", init_method=where, rank=rank, world_size=count)
                torch.save(gradients(), folder / f"{rank}.pt")
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    sys.exit(any([os.waitpid(child, 0)[1] for child in children]))


def gradients_of_chunks(model, examples, recipe, chunks) -> list[dict]:
    """Gradients and buffers of this process behind one step on each of the chunks, from the same weights."""
    args = SimpleNamespace(device="cpu", recipe=recipe)
    setting, found = SimpleNamespace(args=args, model=model, loss=processes.loss_of(model)), []
    epoch = data.Epoch(examples, 1, 0, 0, None, process=processes.index(), processes=processes.count())
    start = lottery.copy_state(model)
    for chunk in chunks:
        model.load_state_dict(start)
        model.train().zero_grad()
        epoch.chunks, epoch.masks = [chunk], [[[] for _ in chunk]]
        loss = train.add_gradients(setting, epoch, range(1), epoch.batches(), Progress())
        about = {"loss": torch.tensor(processes.total(loss), dtype=torch.float32)}
        buffers = {f"buffer {name}": value.clone() for name, value in model.named_buffers()}
        found.append(about | {name: p.grad.clone() for name, p in model.named_parameters()} | buffers)
    return found


def gradients() -> list[dict]:
    """What this process finds for batches of 1, 2 and 4 utterances, of two networks with batch norm."""
    torch.manual_seed(0)
    sizes = {
        "cnn-lstm": dict(
            features="log-mel", channels=2, kernels=((5, 3), (3, 3)), strides=((2, 2), (2, 2)), hidden=8, layers=2,
            dropout=0.0,
        ),
        "conformer": dict(channels=2, width=16, heads=2, blocks=1, kernel=3, dropout=0.0),
    }  # fmt: skip
    networks = {backbone: models.BACKBONES[backbone](5, **sizes[backbone]) for backbone in sizes}
    lengths = (40, 90, 60, 30)
    examples = [data.Example(3 * i + torch.randn(n, 80) * (i + 1), "", [1, 2, 3]) for i, n in enumerate(lengths)]
    recipe, chunks = SimpleNamespace(amp=False), [[0], [1, 0], [0, 1, 2, 3]]
    return [
        step for model in networks.values()
        for step in gradients_of_chunks(copy.deepcopy(model), examples, recipe, chunks)
    ]  # fmt: skip


def test_a_process_without_a_share_changes_no_gradient_and_no_statistics(tmp_path):
    """Three processes with batches of 1, 2 and 4 utterances: the gradients of one process."""
    expected = gradients()
    paths = f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]"
    work = f"import pathlib, test_parallel; test_parallel.in_processes(3, pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", f"import sys; {paths}; {work}"], check=True)
    for share in (torch.load(tmp_path / f"{rank}.pt") for rank in range(3)):
        for got, want in zip(share, expected, strict=True):
            others = ("loss", "buffer")
            size = max(float(v.abs().max()) for name, v in want.items() if not name.startswith(others))
            assert size > 0.1
            for name, value in want.items():
                torch.testing.assert_close(got[name], value, atol=1e-5 * size, rtol=1e-5, msg=name)


@pytest.mark.parametrize("ticket", [False, True])
def test_processes_that_start_from_other_masks_or_weights_are_refused(ticket, corpus, tmp_path, monkeypatch, capsys):
    small = dict(channels=8, hidden=12, layers=1, predictor=8, joiner=8)
    monkeypatch.setitem(models.Transducer.SIZES, "demo", models.Transducer.SIZES["demo"] | small)
    argv = ["--data", str(corpus), "--epochs", "1", "--sparsity", "0.2"]
    if ticket:  # what --ticket trains is compared as what a search prunes
        assert train.main([*argv, "--out", str(tmp_path / "source")]) == 0
        argv = ["--ticket", str(tmp_path / "source")]
        capsys.readouterr()

    def gather(value):
        other = ("0" * 64, value[1]) if isinstance(value, tuple) else value
        return [value, other] if isinstance(value, tuple) else [value]

    monkeypatch.setattr(train.processes, "gather", gather)
    assert train.main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert f"round {int(ticket)}: the processes have other masks or weights" in capsys.readouterr().err


def test_half_a_launcher_s_environment_is_one_line(tmp_path, monkeypatch, capsys):
    """As some clusters' shells have it: others are told of, and not where they are."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": None, "MASTER_PORT": None}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert train.main(["--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("train.py: error: RANK is 0 and WORLD_SIZE 2, so that other processes are waited for: start")
    assert said.count("\n") == 1 and not (tmp_path / "run").exists()
