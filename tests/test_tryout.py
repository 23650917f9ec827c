"""make try: bench/tryout.py on a small ticket, and the Makefile and README that lead to it."""

import json
import re
from pathlib import Path

import pytest
import test_transcribe

from audio_lottery.verdicts import verdict
from bench import __main__ as bench
from bench import tryout

ROOT = Path(tryout.__file__).resolve().parents[1]


@pytest.fixture
def corpus(tmp_path):
    """Eight of the demo's test recordings, each with a text of its own."""
    rows = [json.loads(line) for line in (ROOT / "demo" / "test.jsonl").read_text().splitlines()]
    rows = [row for row in rows if 1 < row["duration"] < 3][:8]
    for row in rows:
        row["audio_filepath"] = str(ROOT / "demo" / row["audio_filepath"])
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path, [row["text"] for row in rows]


@pytest.mark.parametrize("backbone", ["rnnt", "conformer"])
def test_a_ticket_is_shown(backbone, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, texts = corpus
    ticket = test_transcribe.ticket(tmp_path, backbone)
    assert bench.main(["try", "--ticket", str(ticket), "--data", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{ticket}: {backbone}, ") and " prunable weights kept\n" in out
    assert [line[9:] for line in out.splitlines() if line.startswith("  said   ")] == texts[::2]
    assert out.count("\n  heard  ") == 4
    wer, low, high = map(float, re.search(r"\nWER    ([\d.]+) \[([\d.]+), ([\d.]+)\], a 95 % interval", out).groups())
    assert 0 < low <= wer <= high
    assert "; 8 test recordings\nspeed  " in out and "; 8 of 8 texts the same\n" in out
    faster = " times as fast; " in out
    assert faster != ("sparse products for 0 of " in out) == (": no layer is faster sparse here; " in out)
    assert "sparse products for " in out and " times smaller\n\nA quarter of an hour of speech teaches" in out
    assert "AN4" in out and out.rstrip().endswith("docs/an4.md.")


def test_wer_and_its_interval_by_hand():
    told = tryout.rate(["a b", "c d", "e f"], ["a b", "c x", "y"])  # 0, 1 and 2 errors of 6 words
    among = verdict([0, 1, 2], [0, 0, 0], [2, 2, 2])
    assert told.startswith("WER    0.500 [0.000, 1.000], a 95 % interval over other utterances; 3 test recordings")
    assert (among.low, among.high) == (0.0, 1.0)


def test_without_the_shipped_ticket_it_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(tryout, "TICKET", Path("/no/ticket"))
    assert bench.main(["try"]) == 2
    assert (
        capsys.readouterr().err
        == "python -m bench: error: /no/ticket: cannot read the ticket (No such file or directory)\n"
    )


def test_make_and_the_readme_begin_with_it():
    assert "\ntry: $(VENV)/installed\n\t$(BIN)/python -m bench try\n" in (ROOT / "Makefile").read_text()
    blocks = re.findall(r"```\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks[0].startswith("make try ")
