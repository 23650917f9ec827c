"""Runs of all three backbones on a few of the demo's recordings, through the command line."""

import itertools
import json
import signal
from pathlib import Path

import pytest
import soak
import torch

import data
import lottery
import models
import train
import transcribe
from audio_lottery import files, ledger, verify
from lab import networks, scoring
from runner import cache

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for split, count in (("train", 24), ("valid", 5), ("test", 6)):
        rows = [json.loads(line) for line in (ROOT / "demo" / f"{split}.jsonl").read_text().splitlines()]
        short = [row for row in rows if row["duration"] < 1.5][:count]
        for row in short:
            row["audio_filepath"] = str(ROOT / "demo" / row["audio_filepath"])
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, short)))
    return folder


def run(corpus, out, *flags):
    return train.main(["--data", str(corpus), "--out", str(out), "--epochs", "2", "--sparsity", "0.4", *flags])


def of_the_ticket(path, backbone, row, utterances) -> list[str]:
    """What a ticket hears. Its theta_0 is of the seed alone, its masks are the row's, its weights test as there."""
    masks, rewind, trained, info, _ = files.load_ticket(path)
    assert info["sizes"] == json.loads(json.dumps(models.BACKBONES[backbone].SIZES["demo"]))
    assert lottery.sha256(masks) == row["mask_sha256"]
    torch.manual_seed(0)
    model = models.build(backbone, "demo", len(info["tokens"]))
    for name, value in model.state_dict().items():
        assert torch.equal(rewind[name], value.masked_fill(~masks[name], 0) if name in masks else value), name
    model.load_state_dict(trained)
    assert all((trained[name][~mask] == 0).all() for name, mask in masks.items())
    examples = cache.load_examples(utterances, info["tokens"], info["features"])
    hypotheses = train.recognise(model, examples, info["tokens"], 3, "cpu")
    assert scoring.rates([u.text for u in utterances], hypotheses)["errors"] == row["test_errors"]
    return hypotheses


@pytest.mark.parametrize("backbone", list(models.BACKBONES))
def test_from_speech_to_a_ticket(backbone, corpus, tmp_path, capsys):
    assert run(corpus, tmp_path / "run", "--backbone", backbone) == 0
    said = capsys.readouterr()
    assert "against dense" in said.out and "ops: " in said.out
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "ledger.jsonl", "test.jsonl", "rewind.safetensors", "masks", "lock"} | {
        "ticket.safetensors", "dense.safetensors", "report.md", "report.png",
    }  # fmt: skip
    assert [check.word for check in verify.verify(tmp_path / "run", networks)] == ["ok"] * 10
    *rows, end = [json.loads(line) for line in (tmp_path / "run" / "ledger.jsonl").read_text().splitlines()]
    assert "end" in end
    total = rows[0]["total"]
    assert [row["kept"] for row in rows] == [total, round(0.8 * total), round(0.64 * total), round(0.6 * total)]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    for parent, row in itertools.pairwise(rows):
        assert row["parent_sha256"] == parent["mask_sha256"] and row["rewind_sha256"] == parent["rewind_sha256"]
        assert row["verdict"] in ("winning", "matching", "worse", "undecided", "no verdict")
    for row in rows:
        assert sum(row["kept_per_layer"].values()) == row["kept"]
        assert row["test_wer"] == sum(row["test_errors"]) / sum(row["test_words"])
        assert {"remaining", "remaining_all", "valid_wer", "test_cer", "seconds", "seed"} <= set(row)

    assert "\n## The worst utterances\n" in (tmp_path / "run" / "report.md").read_text()
    utterances = data.read_corpus(corpus)["test"]
    hypotheses = of_the_ticket(tmp_path / "run" / "ticket.safetensors", backbone, rows[-1], utterances)
    capsys.readouterr()

    # transcribe.py on the ticket gives the texts of the test.
    ticket, audio = str(tmp_path / "run" / "ticket.safetensors"), [str(u.audio) for u in utterances]
    assert transcribe.main([ticket, *audio, "--dense"]) == 0
    assert capsys.readouterr().out.splitlines() == hypotheses

    # --score gives the ledger's numbers, and against the dense network that the run keeps its last interval.
    argv = [str(tmp_path / "run"), str(corpus / "test.jsonl"), "--score", "--dense", "--against", "dense"]
    assert transcribe.main(argv) == 0
    scored = capsys.readouterr().out
    for name, row in (("run", rows[-1]), ("run/dense.safetensors", rows[0])):
        assert (
            f"{tmp_path / name}: WER {row['test_wer']:.3f} [" in scored and f", CER {row['test_cer']:.3f} [" in scored
        )
    low, high = rows[-1]["interval"]
    assert f"less {tmp_path}/run/dense.safetensors: WER " in scored and f" [{low:+.3f}, {high:+.3f}]" in scored

    # The same command on the finished run trains nothing and prints the table.
    assert run(corpus, tmp_path / "run", "--backbone", backbone) == 0
    again = capsys.readouterr().out
    assert "is finished: nothing to train" in again and said.out.splitlines()[-5] in again
    # Another setting on it is refused and named.
    assert run(corpus, tmp_path / "run", "--backbone", backbone, "--seed", "3") == 2
    assert "holds another run (--seed 0 there, 3 now)" in capsys.readouterr().err


def test_a_run_tests_its_best_epoch_prunes_its_last_and_chooses_nothing_by_the_test(corpus, tmp_path, monkeypatch):
    """Valid falls from epoch to epoch, by a script: so the first epoch is the best, and the last one another."""
    soak.shrink_models(monkeypatch.setitem)
    other = tmp_path / "other"  # the same to train on and to choose by; another test, with a character of its own
    other.mkdir()
    for split in ("train", "valid"):
        (other / f"{split}.jsonl").write_text((corpus / f"{split}.jsonl").read_text())
    row = json.loads((corpus / "test.jsonl").read_text().splitlines()[0])
    (other / "test.jsonl").write_text(json.dumps(row | {"text": "ñandú"}))
    rates, valid = scoring.rates, [u.text for u in data.read_corpus(corpus)["valid"]]

    def rows_of(name, folder, *flags, code=0):
        count = itertools.count(1)

        def scripted(said, heard):
            return rates(said, heard) | ({"wer": float(next(count))} if said == valid else {})

        monkeypatch.setattr(scoring, "rates", scripted)
        assert run(folder, tmp_path / name, "--backbone", "cnn-lstm", *flags) == code
        return ledger.read_ledger(tmp_path / name / "ledger.jsonl")

    rows = rows_of("run", corpus)
    for row in rows:
        assert row["best_epoch"] == 1 and row["trained_sha256"] != row["last_sha256"]
    kept = {name: value.cpu() for name, value in files.load_ticket(tmp_path / "run/dense.safetensors").trained.items()}
    assert lottery.sha256(kept) == rows[0]["trained_sha256"]

    def stop(*_):
        raise train.Stopped(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_on_tests", stop)  # after round 0's last epoch, with nothing pruned
        rows_of("stopped", corpus, code=143)
    hashes = ("mask_sha256", "rewind_sha256", "start_sha256", "last_sha256", "trained_sha256")
    for again in (rows_of("stopped", corpus), rows_of("elsewhere", other), rows_of("none", corpus, "--no-test")):
        for key in (*hashes, "best_epoch", "losses", "threshold"):
            assert [row[key] for row in again] == [row[key] for row in rows], key


def test_two_runs_of_one_seed_give_one_ledger(corpus, tmp_path):
    ledgers = []
    for name, flags in (("a", []), ("b", []), ("cached", ["--cache", str(tmp_path / "cache"), "--workers", "2"])):
        assert run(corpus, tmp_path / name, "--backbone", "rnnt", "--rewind-step", "3", *flags) == 0
        *rows, _ = [json.loads(line) for line in (tmp_path / name / "ledger.jsonl").read_text().splitlines()]
        ledgers.append([json.dumps({k: v for k, v in row.items() if k not in ledger.TIMING}) for row in rows])
    assert ledgers[0] == ledgers[1] == ledgers[2]
    tickets = [(tmp_path / name / "ticket.safetensors").read_bytes() for name in ("a", "b", "cached")]
    assert tickets[0] == tickets[1] == tickets[2]


def test_rewind_step_beyond_the_round(corpus, tmp_path, capsys):
    assert run(corpus, tmp_path / "run", "--rewind-step", "6") == 2
    assert (
        "--rewind-step 6: a round has at most 6 steps, and tickets train on what is left of them"
        in capsys.readouterr().err
    )
