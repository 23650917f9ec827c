"""runner/clock.py by hand, and in the log of a search."""

import itertools
import re
import types

import pytest
import soak
import test_decode

import train
from runner.clock import Place, in_words

small_networks = test_decode.small_networks


def test_titles():
    assert Place(3, range(12)).title == "round 3 of 12"
    assert Place(8, [0, 3, 8]).title == "round 8 (3 of 3)" and Place(5).title == "round 5"


def test_time_left_by_hand():
    assert Place(0, range(12)).left(0.0, 0.0) == ""  # nothing is known yet
    assert Place(0, range(12)).left(0.5, 30.0) == "12 min left"  # 60 s a round: half a round and 11 more
    assert Place(3, range(12), [60.0, 60.0, 90.0]).left(0.0, 0.0) == "10 min left"  # 70 s a round: 9 rounds
    assert Place(3, range(12), [60.0, 60.0, 90.0]).left(1.0, 999.0) == "9 min left"
    assert Place(11, range(12), [60.0] * 11).left(0.75, 50.0) == "15 s left"
    assert Place(8, [0, 3, 8, 11], [100.0]).left(0.5, 1.0) == "2 min left" and Place(5).left(0.5, 20.0) == "20 s left"


@pytest.mark.parametrize(
    "seconds, said",
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3569, "59 min"), (3571, "1 h 0 min"), (7500, "2 h 5 min"),
     (86_340, "23 h 59 min"), (86_400, "1 d 0 h"), (273_600, "3 d 4 h")],
)  # fmt: skip
def test_in_words(seconds, said):
    assert in_words(seconds) == said


def test_a_search_says_where_it_is_and_how_long_it_takes(tmp_path, capsys, monkeypatch, small_networks):
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=itertools.count(0, 31).__next__))
    flags = ["--epochs", "2", "--sparsity", "0.3", "--data", str(soak.small_corpus(tmp_path))]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "; 3 rounds, 0 (dense) to 2\n" in out
    lines = re.findall(r"(?m)^  (round \d of 3), epoch (\d)/2, loss [\d.]+, valid WER [\d.]+, (.+) left$", out)
    assert [line[:2] for line in lines] == [(f"round {r} of 3", e) for r in range(3) for e in "12"]
    assert all(re.fullmatch(r"\d+ (s|min)", left) for *_, left in lines) and lines[-1][2] == "0 s"
