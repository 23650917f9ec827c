"""The verdict: words, one seed's bootstrap, several seeds crossed with utterances; literals, an oracle, coverage."""

import itertools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
import lottery
import train
from audio_lottery import verdicts


def test_words_of_one_seed():
    words = [10] * 50
    worse, better = [3] * 50, [1] * 50
    assert verdicts.verdict(better, worse, words) == ("winning", -0.2, -0.2)
    assert verdicts.verdict(worse, better, words) == ("worse", 0.2, 0.2)
    assert verdicts.verdict(worse, worse, words) == ("matching", 0, 0)
    mixed = verdicts.verdict([0, 4] * 25, [2] * 50, words)
    assert mixed.word == "undecided" and mixed.low < 0 < mixed.high
    # the interval of a difference of +-2 errors in 10 words over 50 utterances: 1.96 * 0.2 / sqrt(50) = 0.055
    assert mixed.high == pytest.approx(0.055, abs=0.002) and mixed.low == pytest.approx(-0.055, abs=0.002)
    assert verdicts.verdict([0, 4] * 25, [2] * 50, words, margin=0.1).word == "matching"
    with pytest.raises(lottery.LotteryError, match="a paired test needs the same utterances"):
        verdicts.verdict([1] * 49, [1] * 50, words)


def test_one_seed_s_bootstrap_is_the_one_of_all_draws():
    """Three utterances: all 27 draws by hand, in place of 10,000 of them."""
    difference, words = np.array([-1, 0, 2]), np.array([2, 3, 5])
    rates = sorted(difference[list(d)].sum() / words[list(d)].sum() for d in itertools.product(range(3), repeat=3))
    assert rates[0] == -0.5 and rates[1:4] == [pytest.approx(-2 / 7)] * 3 and rates[-1] == 0.4
    # -0.5 alone has a chance of 1 / 27 > 2.5 %, and 0.4 too
    assert verdicts.verdict([0, 1, 3], [1, 1, 1], words) == ("undecided", -0.5, 0.4)
    assert verdicts.interval(difference, words) == (-0.5, 0.4)


def test_an_error_rate_has_its_interval():
    """A third of 300 words wrong, an error in every third utterance of one word: 1/3 +- 1.96 sqrt(2/9 / 300)."""
    low, high = verdicts.interval([1, 0, 0] * 100, [1] * 300)
    assert low == pytest.approx(1 / 3 - 0.0533, abs=0.004) and high == pytest.approx(1 / 3 + 0.0533, abs=0.004)
    assert verdicts.interval([1] * 3, [2, 2, 2]) == (0.5, 0.5)


def test_memory_s_parts_are_one_draw():
    rng = np.random.default_rng(0)
    ticket, dense, words = rng.integers(0, 4, 30), rng.integers(0, 4, 30), rng.integers(5, 9, 30)
    counts = np.random.default_rng(0).multinomial(30, [1 / 30] * 30, size=2500)
    rates = [c @ (ticket - dense) / (c @ words) for c in counts]
    found = verdicts.verdict(ticket, dense, words, resamples=2500)
    assert found[1:] == pytest.approx(np.percentile(rates, [2.5, 97.5]), abs=1e-12)


def test_words_at_the_edges_of_an_interval():
    assert verdicts.word_of(-0.01, 0.01, 0.01) == verdicts.word_of(-0.01, 0, 0) == "matching"
    assert verdicts.word_of(0, 0.02, 0.01) == "undecided" and verdicts.word_of(-0.02, -0.01, 0.01) == "winning"
    assert verdicts.word_of(0.001, 0.02, 0.01) == "worse" and verdicts.word_of(0.001, 0.01, 0.01) == "matching"


def test_references_without_words():
    """Draws of nothing but such utterances have no error rate and are left out; a test of nothing else is refused."""
    low, high = verdicts.verdict([0, 1], [0, 2], [0, 3])[1:]
    assert (low, high) == (pytest.approx(-1 / 3), pytest.approx(-1 / 3))
    with pytest.raises(lottery.LotteryError, match="none of the 2 references has a word"):
        verdicts.verdict([0, 1], [0, 2], [0, 0])


@pytest.mark.parametrize("name", ["ticket_errors", "dense_errors", "words"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_count_that_is_no_number_is_refused(name, value):
    counts = {"ticket_errors": [0.0, 1.0], "dense_errors": [0.0, 2.0], "words": [3.0, 3.0]}
    counts[name][1] = value
    with pytest.raises(lottery.LotteryError, match=f"^{name}: a count must be finite, got {value}$"):
        verdicts.verdict(*counts.values())


def test_no_verdict_where_dense_recognises_nothing():
    words = [10] * 10
    nothing = verdicts.verdict([10] * 10, [10] * 10, words)
    assert nothing == ("no verdict", 0, 0)
    assert str(nothing) == "no verdict (dense recognises nothing: error rate 0.95 or more) [+0.000, +0.000]"
    dense = [9] * 5 + [10] * 5  # 0.95
    assert verdicts.verdict([1] * 10, dense, words).word == "no verdict"
    assert verdicts.verdict([1] * 10, [9] * 6 + [10] * 4, words).word == "winning"  # 0.94
    assert verdicts.verdict([1] * 10, dense, words, nothing=math.inf).word == "winning"
    # of seeds, their mean counts
    assert verdicts.verdict([[1] * 10] * 2, [dense, [10] * 10], words).word == "no verdict"
    assert verdicts.verdict([[1] * 10] * 2, [dense, [9] * 10], words).word == "winning"


# ---------------------------------------------------------------------------- several seeds


def test_seeds_alone_differ():
    """Two seeds, 0.1 better and 0.1 worse in every utterance: 0 +- 12.706 * 0.1, Student's t of one degree."""
    found = verdicts.verdict([[1] * 50, [3] * 50], [[2] * 50, [2] * 50], [10] * 50)
    assert found == ("undecided", pytest.approx(-1.2706, abs=1e-4), pytest.approx(1.2706, abs=1e-4))


def test_utterances_alone_differ():
    """Three seeds that agree: +-2 errors of 10 words, 50 utterances; variance 0.2 ** 2 / 49, t of 49 degrees 2.0096."""
    found = verdicts.verdict([[0, 4] * 25] * 3, [[2] * 50] * 3, [10] * 50)
    assert found.high == pytest.approx(2.0096 * 0.2 / 7, abs=1e-5) and found.low == -found.high


def test_components_by_hand():
    """Two seeds, two utterances of 10 words; differences [[4, 0], [0, 0]]: rate 0.1, seeds 0.2 and 0."""
    rate, of_seeds, of_utterances, of_both = verdicts.components([[4, 0], [0, 0]], [10, 10])
    assert (rate, of_seeds) == (pytest.approx(0.1), pytest.approx(2 * 0.1**2 / 2))
    # beyond the rate [[3, -1], [-1, -1]]: utterances 1 and -1, then beyond the seeds' +-1 too [[1, -1], [-1, 1]]
    assert of_utterances == pytest.approx((1 + 1) * 2 / 20**2)
    assert of_both == pytest.approx(4 * 2 / 20**2 / 2)
    rate, variance, freedom = verdicts.crossed([[4, 0], [0, 0]], [10, 10])
    assert variance == pytest.approx(0.01) and freedom == 1  # all three are 0.01: the seeds' own part is 0


def oracle(difference, words):
    """The same by loops, from the textbook: two-way analysis of variance of the residuals of a ratio."""
    seeds, utterances, total = len(difference), len(words), sum(words)
    rate = sum(map(sum, difference)) / (seeds * total)
    by_seed = [sum(row) / total for row in difference]
    left = [[d - rate * w for d, w in zip(row, words)] for row in difference]
    by_utterance = [sum(row[u] for row in left) / seeds for u in range(utterances)]
    of_seeds = sum((r - rate) ** 2 for r in by_seed) / (seeds - 1) / seeds
    of_utterances = utterances * sum(b**2 for b in by_utterance) / (utterances - 1) / total**2
    of_both = sum(
        (left[s][u] - by_utterance[u] - (by_seed[s] - rate) * words[u]) ** 2
        for s in range(seeds) for u in range(utterances)
    ) * utterances / (utterances - 1) / (seeds - 1) / seeds / total**2  # fmt: skip
    variance = of_utterances + max(0, of_seeds - of_both)
    freedom = variance**2 / (
        of_seeds**2 / (seeds - 1) + of_utterances**2 / (utterances - 1) + of_both**2 / (seeds - 1) / (utterances - 1)
    )
    return rate, variance, max(freedom, min(seeds, utterances) - 1)


@pytest.mark.parametrize("seeds, utterances", [(2, 2), (3, 7), (5, 65), (9, 4)])
def test_crossed_is_the_oracle_s(seeds, utterances):
    rng = np.random.default_rng(seeds)
    difference = rng.integers(-3, 4, (2, seeds, utterances))
    words = rng.integers(1, 12, (2, utterances))
    both = np.array(verdicts.crossed(difference, words))
    for i in range(2):  # leading dimensions go along
        found = oracle(difference[i].tolist(), words[i].tolist())
        assert both[:, i] == pytest.approx(found, rel=1e-9)
        assert np.array(verdicts.crossed(difference[i], words[i])) == pytest.approx(found, rel=1e-9)
        rate, variance, freedom = found
        told = verdicts.verdict(np.maximum(difference[i], 0), np.maximum(-difference[i], 0), words[i], nothing=math.inf)
        half = verdicts.student_t(freedom) * variance**0.5
        assert told[1:] == (pytest.approx(rate - half), pytest.approx(rate + half))


def test_student_s_t_is_the_table_s():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 30: 2.042, 120: 1.980, 100_000: 1.960}
    assert {n: round(verdicts.student_t(n), 3) for n in table} == table


def test_crossed_needs_two_of_each():
    for shape in ((1, 5), (5, 1)):
        with pytest.raises(lottery.LotteryError, match=f"needs? two seeds and two utterances, got {shape[0]} and"):
            verdicts.crossed(np.zeros(shape), np.ones(shape[1]))


def test_no_seed_s_interval_is_narrower_than_its_utterances_alone():
    """What is negative among the components does not narrow the interval below that of these seeds' utterances."""
    rng = np.random.default_rng(5)
    words = rng.integers(3, 9, 40)
    for _ in range(50):
        difference = rng.integers(-2, 3, (3, 40))
        _, _, of_utterances, _ = verdicts.components(difference, words)
        assert verdicts.crossed(difference, words)[1] >= of_utterances > 0


def test_p_values_go_with_the_intervals():
    rng = np.random.default_rng(3)
    words = rng.integers(3, 9, 60)
    for seeds, shift in itertools.product((1, 3, 5), (0, 1)):
        dense = rng.binomial(words, 0.2, (seeds, 60))
        ticket = np.clip(dense + rng.integers(-1, 2, dense.shape) + shift * (rng.random(dense.shape) < 0.1), 0, None)
        high = verdicts.verdict(ticket, dense, words, margin=0).high
        for margin, within in ((high + 2e-3, True), (high - 2e-3, False)):
            assert (verdicts.p_value(ticket, dense, words, margin) <= 0.025) == within, (seeds, margin)
    # of 4 utterances of 1 word the ticket has one error more: 0 in (3/4)^4 of the draws
    assert verdicts.p_value([1, 0, 0, 0], [0] * 4, [1] * 4, 0.0) == pytest.approx(1 - 81 / 256, abs=0.01)


def test_students_t_from_a_table():
    for t, freedom, p in ((12.706, 1, 0.025), (2.776, 4, 0.025), (1.372, 10, 0.1), (0, 3, 0.5), (-2.776, 4, 0.975)):
        assert verdicts.above(t, freedom) == pytest.approx(p, abs=1e-4)


def test_holm_by_hand():
    assert verdicts.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert verdicts.holm([0.4, 0.6]) == pytest.approx([0.8, 0.8]) and verdicts.holm([]) == []


# ---------------------------------------------------------------------------- what rows bear


def test_rows_bear_rule_power_and_speakers(monkeypatch):
    """Four utterances of two speakers, a second test in noise: round 0 numbers the speakers, later ones are judged."""
    texts, names = ["one two"] * 4, ["ann", "bob", "ann", "bob"]
    utterances = [data.Utterance(Path("a"), text, name) for text, name in zip(texts, names)]
    args = SimpleNamespace(margin=0.01, recipe=SimpleNamespace(batch_size=1), device="cpu")
    train_set = [data.Utterance(Path("b"), "one three")]
    setting = SimpleNamespace(args=args, model=None, transcribe=None, utterances={"train": train_set})
    examples = [SimpleNamespace(text=text) for text in texts]
    names = ("test", "test at 10 dB")
    corpus = SimpleNamespace(tests=dict.fromkeys(names, examples), heard=dict.fromkeys(names, utterances), tokens=None)
    monkeypatch.setattr(train, "recognise", lambda *_: ["one two", "one", "one", "one two"])
    dense, lines = train.evaluate_on_tests(setting, corpus, None)
    assert [line["hypothesis"] for line in lines[:4]] == ["one two", "one", "one", "one two"] and len(lines) == 8
    assert dense["verdict_rule"] == verdicts.VERDICT_RULE == 2 and dense["test_errors"] == [0, 1, 1, 0]
    assert dense["test_speakers"] == dense["other_tests"]["test at 10 dB"]["test_speakers"] == [0, 1, 0, 1]
    assert not {"verdict", "interval", "power", "test_seen"} & dense.keys()  # no text is one that was trained on
    monkeypatch.setattr(train, "recognise", lambda *_: ["one", "one two", "one", "one two"])
    row, _ = train.evaluate_on_tests(setting, corpus, dense)
    told = verdicts.verdict([1, 0, 1, 0], [0, 1, 1, 0], [2] * 4)
    assert (row["verdict"], *row["interval"]) == told and told.word == "undecided" and 0 < row["power"] < 0.1
    args.margin = 1.0
    assert train.evaluate_on_tests(setting, corpus, dense)[0]["verdict"] == "matching"
    assert "test_speakers" not in row and row["verdict_rule"] == 2
    foreign = [data.Utterance(Path("\udce9.wav"), text) for text in texts]
    corpus.heard = dict.fromkeys(names, foreign)
    assert train.evaluate_on_tests(setting, corpus, None)[1][0]["audio"] == "\\xe9.wav"  # a byte that is no UTF-8
    nameless = [data.Utterance(Path("a"), text) for text in texts]
    corpus.heard = dict.fromkeys(names, nameless)
    assert "test_speakers" not in train.evaluate_on_tests(setting, corpus, None)[0]


def test_utterances_of_texts_that_were_trained_on():
    heard = [data.Utterance(Path("a"), text) for text in ("yes", "go home", "no")]
    assert verdicts.about_utterances(heard, heard[::2]) == {"test_seen": [1, 0, 1]}
    assert verdicts.about_utterances(heard, heard) == verdicts.about_utterances(heard, []) == {}


def test_speakers_are_numbered():
    assert verdicts.numbered(["ann", "bob", "ann", "cy"]) == [0, 1, 0, 2]
    assert verdicts.numbered(["ann", "ann"]) == verdicts.numbered(["ann", "", "bob"]) == verdicts.numbered([]) == []
    tests = {"other_tests": {"test at 0 dB": {"test_errors": [1], "verdict": "worse", "interval": [0, 1]}}}
    assert verdicts.without_verdicts({"test_wer": 0.5, "verdict_rule": 2, "test_speakers": [0, 1], **tests}) == {
        "test_wer": 0.5, "other_tests": {"test at 0 dB": {"test_errors": [1]}},
    }  # fmt: skip


def test_a_resample_without_words_is_left_out():
    """(n1 - n0) / 3 n1 for n0 and n1 draws of the first two: -1/3 in 3 of 19 (0 0 1), 1/3 in 7 (without the first)."""
    assert verdicts.verdict([0, 1, 0], [1, 0, 0], [0, 3, 0], margin=0.4) == ("matching", -1 / 3, 1 / 3)
