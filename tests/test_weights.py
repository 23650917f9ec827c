"""Weights of a language model, chosen on valid speech alone."""

import importlib.util
import json

import numpy as np
import pytest
import soak
import soundfile

import train
from lab import weights

ARPA = """\\data\\
ngram 1=4
ngram 2=1

\\1-grams:
-9\t<s>\t-0.5
-1\t</s>
-0.3\tone\t-0.5
-0.3\ttwo

\\2-grams:
-0.1\tone two

\\end\\
"""
needs_flashlight = pytest.mark.skipif(
    not importlib.util.find_spec("flashlight"), reason="flashlight-text is not installed: pip install flashlight-text"
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    soak.shrink_models(monkeypatch.setitem)

    def trained(backbone: str):
        (tmp_path / "corpus").mkdir()
        argv = ["--data", str(soak.small_corpus(tmp_path / "corpus")), "--backbone", backbone, "--epochs", "1"]
        assert train.main([*argv, "--sparsity", "0", "--out", str(tmp_path / "run")]) == 0
        (tmp_path / "corpus" / "test.jsonl").unlink()  # which is not looked at
        (tmp_path / "lm.arpa").write_text(ARPA)
        return [str(tmp_path / "run"), "--lm", str(tmp_path / "lm.arpa")]

    return trained


@needs_flashlight
def test_the_pair_of_the_lowest_wer_on_valid(run, monkeypatch, capsys):
    argv = run("cnn-lstm")
    found = {(0.5, 0.0): 0.8, (0.5, 2.0): 0.5, (1.0, 0.0): 0.5, (1.0, 2.0): 0.6}  # of equals, what changes less
    capsys.readouterr()
    assert weights.main([*argv, "--beam", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| weight \\ score | -1 | 0 | 1 | 2 |" and len(lines) == 2 + 5 + 1
    assert all(0 <= float(cell) for line in lines[2:7] for cell in line.split("|")[2:-1])
    assert "greedy 1.0000 (2 utterances; the test was not read)" in lines[-1]
    monkeypatch.setattr(weights, "wers", lambda *about: [7, 0.9, *(found[pair] for pair in about[-1])])
    assert weights.main([*argv, "--lm-weights", "0.5,1", "--word-scores", "0,2"]) == 0
    out = capsys.readouterr().out
    assert "| 0.5 | 0.8000 | 0.5000 |\n| 1 | 0.5000 | 0.6000 |\n" in out
    assert "--beam 100 --lm-weight 0.5 --word-score 2: valid WER 0.5000; greedy 0.9000 (7 utterances;" in out


@needs_flashlight
def test_a_broken_recording_is_left_out_as_the_run_left_it_out(run, tmp_path, monkeypatch, capsys):
    argv = run("cnn-lstm")
    row = json.loads((tmp_path / "corpus" / "valid.jsonl").read_text().splitlines()[0])
    soundfile.write(tmp_path / "corpus" / "loud.wav", np.full(16_000, 1e30), 16_000, "FLOAT")
    with open(tmp_path / "corpus" / "valid.jsonl", "a") as file:
        file.write("\n" + json.dumps({"audio_filepath": "loud.wav", "text": row["text"]}))
    capsys.readouterr()
    assert weights.main([*argv, "--beam", "5"]) == 2
    assert "loud.wav" in (err := capsys.readouterr().err) and "its samples are too large" in err
    ticket = weights.files.load_ticket(tmp_path / "run")
    monkeypatch.setattr(
        weights.files, "load_ticket", lambda path: ticket._replace(info=ticket.info | {"skip_broken": True})
    )
    assert weights.main([*argv, "--beam", "5"]) == 0
    said = capsys.readouterr()
    assert "(2 utterances;" in said.out and "left out, as the run was told to: " in said.err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--beam", "0"], "--beam must be at least 1 and at most 100000, got 0"),
        (["--lm-weights", "1,x"], "argument --lm-weights: invalid numbers value: '1,x'"),
        (["--word-scores", "nan"], "argument --word-scores: invalid numbers value: 'nan'"),
    ],
)
def test_unusable_flags(argv, message, capsys):
    with pytest.raises(SystemExit):
        weights.main(["run", "--lm", "lm.arpa", *argv])
    assert message in capsys.readouterr().err


def test_what_cannot_be_weighed(run, tmp_path, capsys):
    argv = run("rnnt")
    assert weights.main(argv) == 2
    assert "goes with CTC (cnn-lstm, conformer), and this ticket is of rnnt" in capsys.readouterr().err
    assert weights.main([str(tmp_path), *argv[1:]]) == 2
    assert "config.json" in capsys.readouterr().err
