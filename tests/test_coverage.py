"""Coverage and power of verdicts by simulation: the model's moments, the command, and whether 95 % are 95 %."""

from pathlib import Path

import numpy as np
import pytest
from test_report import write_run

from audio_lottery import verdicts
from lab import compare, coverage

UTTERANCES = 40


def known(seed_sd=0.0, utterance_sd=0.0, both_sd=1.0, seeds=4, tickets=1):
    """Differences of tickets (tickets, seeds, utterances), around 0, and words."""
    rng = np.random.default_rng(0)
    words = rng.integers(3, 9, UTTERANCES)
    shape = tickets, seeds, UTTERANCES
    levels = rng.normal(0, seed_sd, (tickets, seeds, 1)) * words
    return levels + rng.normal(0, utterance_sd, shape[-1]) + rng.normal(0, both_sd, shape), words


def test_the_gain_that_is_found_is_called_better_four_times_in_five():
    folder = Path(coverage.__file__).parents[1] / "results" / "an4"
    runs = [compare.load(folder / f"cnn-lstm-{seed}") for seed in range(5)]
    ((method,),) = compare.merge(runs).values()
    point = method.tickets()[3]
    gain = coverage.gain_found(point)
    _, better = coverage.simulated(coverage.source_of([point]), coverage.crossed, 5, margin=0.0, worse=-gain)
    assert better[0] == pytest.approx(0.8, abs=0.06) and 0.005 < gain < 0.05


def test_trials_are_spread_as_the_ledger_says():
    """The variance of the trials' rates is V_seeds + V_utterances - V_interaction of the ledger's seeds."""
    differences, words = known(0.05, 0.5, 1.0)
    _, of_seeds, of_utterances, of_both = verdicts.components(differences[0], words)
    assert of_seeds > of_both and of_utterances > of_both  # else parts of the model are 0
    source = coverage.Source(differences, words)
    drawn, drawn_words = source.draw(np.random.default_rng(1), 4000, 4, 0.03)
    assert drawn.shape == (4000, 1, 4, UTTERANCES) and drawn_words.shape == (4000, 1, UTTERANCES)
    rates = drawn.sum((-1, -2))[:, 0] / drawn_words.sum(-1)[:, 0] / 4
    assert rates.mean() == pytest.approx(0.03, abs=0.003)
    assert rates.var() == pytest.approx(of_seeds + of_utterances - of_both, rel=0.12)
    # and what verdicts.components finds in them is, in the mean, what was put in
    found = [part.mean() for part in verdicts.components(drawn[:, 0], drawn_words[:, 0])[1:]]
    assert found == pytest.approx([of_seeds, of_utterances, of_both], rel=0.15)


@pytest.mark.parametrize("seed_sd", [0.0, 0.03, 0.2])
@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_hold_the_truth(seed_sd, seeds):
    """Whether seeds hardly differ or differ more than utterances do: about 95 %, and no less than 93 %."""
    source = coverage.Source(*known(seed_sd, 0.5))
    covered, _ = coverage.simulated(source, coverage.crossed, seeds, 0.01, trials=800)
    assert 0.93 <= covered[0] <= 1
    if seed_sd == 0.2:  # one interval that knows nothing of other seeds, and one that counts the interaction thrice
        pooled, _ = coverage.simulated(source, coverage.pooled, seeds, 0.01, trials=800)
        assert pooled[0] < 0.7


def test_a_ticket_behind_by_the_margin_is_seldom_called_matching():
    source = coverage.Source(*known(0.02, 0.5))
    _, wrong = coverage.simulated(source, coverage.crossed, 5, 0.02, worse=0.02, trials=800)
    assert wrong[0] <= 0.04  # 2.5 % is what a 95 % interval promises


def test_power_is_the_simulation_s():
    differences, words = known(0.004, 0.1, 0.4, seeds=5)
    low = np.round(differences[0]).astype(int)
    point = compare.Point(0.03)
    for seed, row in enumerate(low):
        of = {"round": 1, "test_words": words.tolist()}
        dense = of | {"test_errors": [3] * UTTERANCES}
        point.add(seed, of | {"test_errors": (3 + row).tolist()}, dense, dense)
    _, matches = coverage.simulated(coverage.Source(low[None].astype(float), words), coverage.crossed, 5, 0.03)
    assert 0.2 < matches[0] < 0.99
    assert coverage.power(point) == pytest.approx(matches[0], abs=0.06)
    assert coverage.power(point) == coverage.power(point)  # seeded
    del point.seeds[1:], point.rows[1:], point.others[1:]
    assert coverage.power(point) == verdicts.power(point.verdict(), 0.03)


def test_many_rounds_are_many_chances():
    """Some of 14 rounds is called matching more often than the first of the sequence, and than 2.5 %."""
    source = coverage.Source(*known(0.0, 0.3, tickets=14))
    some, first = coverage.searches(source, [3, 7], 1, 0.01, 0.02, trials=400)
    assert some > 0.1 and first < 0.06 and some > 3 * first


def test_student_s_t_of_many():
    freedoms = np.array([1, 2, 2.5, 7.3, 64, 1000])
    assert coverage.student_t(freedoms) == pytest.approx([verdicts.student_t(n) for n in freedoms], rel=2e-3)


def test_the_command_prints_a_table_a_method(tmp_path, capsys):
    rng = np.random.default_rng(0)
    dense = [4, 4, 4, 4]
    runs = [
        write_run(tmp_path / str(s), [dense] * 4 + [rng.integers(2, 7, 4).tolist()], seed=s, sparsity=0.5904)
        for s in range(3)
    ]
    argv = [str(run) for run in runs]
    assert coverage.main([*argv, "--trials", "50", "--seeds", "4"]) == 0
    said = capsys.readouterr().out
    rows = [line.split(" | ") for line in said.splitlines() if line.startswith("| 41.0%")]
    assert [row[1:4] for row in rows] == [["3", name, "4"] for name in coverage.RULES]
    assert all(0 <= float(cell.strip(" |%")) <= 100 for row in rows for cell in row[4:])
    assert said.count("- All 4 tickets 0.02 worse, from 3 seeds known, ") == 2
    assert "1 seed: some round is called matching in " in said
    assert coverage.main([*argv, "--trials", "50", "--seeds", "4"]) == 0 and capsys.readouterr().out == said
    short = [str(write_run(tmp_path / f"short{s}", [dense] * 5, seed=s, sparsity=0.5904)) for s in (0, 1)]
    apart = write_run(tmp_path / "apart", [dense] * 2 + [[1, 2, 3, 4]], seed=2, sparsity=0.36)
    assert coverage.main([*short, str(apart), "--trials", "50", "--seeds", "4"]) == 0
    assert "- All 4 tickets 0.02 worse, from 2 seeds known, " in capsys.readouterr().out
    assert coverage.main(argv[:1]) == 2
    assert "no method with two seeds at a mark" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        coverage.main([*argv, "--seeds", "1"])
    assert "--seeds must be at least 2" in capsys.readouterr().err
