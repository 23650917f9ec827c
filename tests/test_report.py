"""Merged runs: pooled seeds, names of methods, selection, comparisons, pictures; multiply-adds by hand."""

import functools
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import lottery
import models
from audio_lottery import console, ledger, verdicts
from lab import compare, pictures, plan, report, tables

with torch.device("meta"):
    WEIGHTS = {n: w.numel() for n, w in lottery.prunable(models.build("cnn-lstm", "demo", 29)).items()}
TOTAL = sum(WEIGHTS.values())
WORDS = [10, 10, 10, 10]
GLOBAL = "global magnitude"
ROUND_0 = [4, 4, 4, 4]  # errors: dense WER 16 / 40


@functools.cache
def verdict(errors, dense):
    return verdicts.verdict(errors, dense, WORDS)


def write_run(
    folder,
    errors,
    valid=None,
    *,
    seed=0,
    sparsity=0.4,
    data="/corpora/demo",
    machine=(),
    row=(),
    of_round_0=(),
    **settings,
):
    """A run folder of the demo CNN-LSTM; errors: by round and utterance; row, of_round_0: more entries of rows."""
    config = {"backbone": "cnn-lstm", "sparsity": sparsity, "size": "demo", "prune_rate": 0.2, "rewind_step": 0}
    config |= {"seed": seed, "margin": 0.01, "data_sha256": data[::-1], **settings}
    rows, settings = [], dict(config)
    config["machine"] = {"data": data, "threads": 1, **dict(machine)}
    for number, (kept, wrong) in enumerate(zip(lottery.kept_counts(TOTAL, sparsity, config["prune_rate"]), errors)):
        layers = {name: round(n * kept / TOTAL) for name, n in WEIGHTS.items()}
        told = verdict(tuple(wrong), tuple(errors[0])) if number else None
        new = {
            "round": number, "kept": kept, "total": TOTAL, "remaining": kept / TOTAL, "remaining_all": kept / TOTAL,
            "kept_per_layer": layers, "mask_sha256": f"{folder} {number}", "last_sha256": "", "trained_sha256": "",
            "valid_wer": valid[number] if valid else 0.5, "test_wer": sum(wrong) / 40, "test_cer": sum(wrong) / 80,
            "test_errors": wrong, "test_words": WORDS, "seconds": 1.0, "waited": 0.0, "resumed": 0,
        }  # fmt: skip
        if told:
            new |= {"verdict": told.word, "interval": [told.low, told.high], **dict(row)}
        else:
            new |= dict(of_round_0)
        ledger.append_row(None, rows, new, settings)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "ledger.jsonl").write_bytes(b"".join(map(ledger.ledger_line, rows)))
    return folder


def merged(*folders):
    return compare.merge([compare.load(folder) for folder in folders])


def test_two_seeds_are_crossed_with_utterances(tmp_path):
    one = write_run(tmp_path / "a", [ROUND_0, [3, 3, 3, 3], [5, 5, 5, 5]])
    two = write_run(tmp_path / "b", [ROUND_0, [1, 1, 1, 1]], seed=1)
    ((method,),) = merged(one, two).values()
    dense, first, second = method.points.values()
    assert method.name == GLOBAL and first.seeds == [0, 1] and second.seeds == [0]
    # 12 / 40 and 4 / 40 against 16 / 40: -0.1 and -0.3 in every utterance, so -0.2 +- 12.7062 * 0.1 by two seeds
    assert first.mean("test_wer") == pytest.approx(0.2) and first.mean_other("test_wer") == 0.4
    assert first.verdict() == ("undecided", pytest.approx(-1.47062), pytest.approx(1.07062))
    assert second.verdict() == ("worse", pytest.approx(0.1), pytest.approx(0.1))
    assert pictures.wer_band(first) == (pytest.approx(0.4 - 1.47062), pytest.approx(0.4 + 1.07062))
    assert tables.merged_cells(method, first, "")[5:8] == ["2", "0.500 ± 0.000", "0.200 ± 0.141"]
    assert tables.merged_cells(method, first, "")[9:11] == ["-0.200 ± 0.141", "undecided [-1.471, +1.071], power 3%"]
    assert tables.merged_cells(method, dense, "")[9:11] == ["-", "-"]


def test_a_longer_search_contains_the_shorter(tmp_path):
    """--sparsity 0.4 ends with a round 3 of 60 %, which is not the round 3 of 51.2 % of --sparsity 0.5."""
    errors = [ROUND_0] * 6
    short, long = (write_run(tmp_path / str(s), errors, sparsity=s, seed=int(10 * s)) for s in (0.4, 0.5))
    again = write_run(tmp_path / "again", errors, sparsity=0.4, seed=5)  # a seed that is there: rounds 0 to 2 are known
    ((method,),) = merged(short, long, again).values()
    found = [(f"{point.mean('remaining'):.3f}", point.seeds) for point in method.points.values()]
    assert found == [
        ("1.000", [4, 5]), ("0.800", [4, 5]), ("0.640", [4, 5]), ("0.600", [4, 5]), ("0.512", [5]), ("0.500", [5]),
    ]  # fmt: skip


def test_best_is_chosen_on_valid(tmp_path):
    """Round 2 has the better valid WER, round 1 the better test WER."""
    run = write_run(tmp_path / "a", [ROUND_0, [1, 1, 1, 1], [3, 3, 3, 3]], valid=[0.5, 0.45, 0.4])
    ((method,),) = merged(run).values()
    assert method.best().round == 2
    # A seed that has round 1 alone is worse there, and worse when dense: its round 1 gains 0.3, the most.
    other = write_run(tmp_path / "b", [ROUND_0, [9, 9, 9, 9]], valid=[0.9, 0.6], seed=1)
    ((method,),) = merged(run, other).values()
    assert method.best().round == 1


def test_methods_are_named_by_what_differs(tmp_path):
    errors = [ROUND_0, ROUND_0, ROUND_0]
    search = write_run(tmp_path / "search", errors, epochs=20)
    spanish = write_run(tmp_path / "spanish", errors, epochs=20, data="/corpora/es")
    ticket = {"machine": {"ticket": str(tmp_path / "gone")}, "ticket_sha256": "of a seed and its rounds"}
    of = {"row": {"source_mask_sha256": f"{tmp_path / 'search'} 1"}, **ticket}
    methods = merged(
        search,
        spanish,
        write_run(tmp_path / "late", errors, epochs=20, rewind_step=200, test_snr=[5], noise_sha256="34"),
        write_run(tmp_path / "lamp", errors, epochs=20, scope="lamp"),
        write_run(tmp_path / "faster", errors, epochs=20, prune_rate=0.3, scope="lamp"),
        write_run(tmp_path / "snr", errors, epochs=30, snr=[0, 20], noise_sha256="12"),
        write_run(tmp_path / "random", errors, epochs=20, control="random-mask", **of),
        write_run(tmp_path / "own", errors, epochs=20, **of),
        write_run(tmp_path / "es", errors, epochs=20, **of | {"row": {"source_mask_sha256": f"{spanish} 2"}}),
        write_run(tmp_path / "es-random", errors, epochs=20, control="random-init",
                  **of | {"row": {"source_mask_sha256": f"{spanish} 2"}}),
        write_run(tmp_path / "unknown", errors, epochs=20, **ticket),
    )  # fmt: skip
    assert list(methods) == ["cnn-lstm on demo, demo size", "cnn-lstm on es, demo size"]
    names = [method.name for method in methods["cnn-lstm on demo, demo size"]]
    assert names == [
        GLOBAL, "rewind_step 200", "scope lamp", "prune_rate 0.3, scope lamp", "epochs 30, snr 0:20", "random-mask",
        "ticket", "ticket of es", "random-init, ticket of es", "ticket of another run",
    ]  # fmt: skip
    pairs = [(a.name, b.name) for a, b in compare.rivals(methods["cnn-lstm on demo, demo size"])]
    assert pairs == [
        (GLOBAL, "random-mask"), ("rewind_step 200", GLOBAL), ("scope lamp", GLOBAL), ("ticket", "random-mask"),
        ("ticket of es", GLOBAL), ("ticket of es", "random-init, ticket of es"), ("ticket of another run", GLOBAL),
    ]  # fmt: skip


def test_a_method_alone_is_named_by_what_is_not_the_papers(tmp_path):
    runs = [
        write_run(tmp_path / str(seed), [ROUND_0] * 3, seed=seed, epochs=48, rewind_step=9, scope="lamp", test_snr=[5])
        for seed in (0, 1)
    ]
    ((method,),) = merged(*runs).values()
    assert method.name == "rewind_step 9, scope lamp"


def test_how_it_is_tested_names_a_method_only_where_nothing_else_does(tmp_path):
    def names(*others):
        runs = [write_run(tmp_path / f"{i} {len(others[1])}", [ROUND_0] * 3, **o) for i, o in enumerate(others)]
        ((*methods,),) = merged(*runs).values()
        return [method.name for method in methods]

    assert names({"test_snr": [5.0]}, {"scope": "lamp"}) == [GLOBAL, "scope lamp"]
    assert names({"test_snr": [5.0]}, {}) == ["test_snr 5.0", GLOBAL]


def sentences(title, methods):
    return [tables.said(title, claim) for claim in tables.claims(methods)]


def test_claims_say_what_holds(tmp_path):
    """Ten rounds to 10.7 %: the claims are about rounds 4, 8 and 10, 41.0, 16.8 and 10.7 %, whatever the others are."""
    imp = [[ROUND_0] * 8 + [[3, 3, 3, 3], [9, 9, 9, 9], [9, 9, 9, 9]], [ROUND_0] * 8 + [[3, 3, 3, 3]]]
    random = [[5, 5, 5, 5] if i else ROUND_0 for i in range(11)]
    ((title, methods),) = merged(
        *(write_run(tmp_path / f"imp{s}", errors, sparsity=0.8926, seed=s) for s, errors in enumerate(imp)),
        write_run(tmp_path / "random", random, sparsity=0.8926, seed=1, control="random-mask"),
    ).items()
    assert title == "cnn-lstm on demo, demo size"
    start = f"- {title}: {GLOBAL}"
    assert sentences(title, methods) == [
        f"{start} with 41.0% of the weights matches dense: **holds**, [+0.000, +0.000], 2 seeds (0, 1), "
        "4 test utterances.",
        f"{start} with 16.8% of the weights matches dense: **holds**, [-0.100, -0.100], 2 seeds (0, 1), "
        "4 test utterances.",
        f"{start} with 10.7% of the weights matches dense: **does not hold**, [+0.500, +0.500], 1 seed (0), "
        "4 test utterances.",
        f"{start} is better than random-mask at 41.0%: **holds**, [-0.100, -0.100], 1 seed (1), 4 test utterances.",
        f"{start} is better than random-mask at 16.8%: **holds**, [-0.200, -0.200], 1 seed (1), 4 test utterances.",
    ]
    (pair,) = compare.rivals(methods)
    assert len(compare.compared(*pair)) == 8


def test_the_sequence_is_of_named_rounds_and_stops(tmp_path):
    """Fourteen rounds to 4.4 %: of 41.0, 16.8, 10.7 and 4.4 % the second fails, so that later ones count no more."""
    good, bad = [3, 3, 3, 3], [9, 9, 9, 9]
    errors = [ROUND_0] + [bad] * 14
    for number in (4, 5, 9, 10, 14):
        errors[number] = good
    run = write_run(tmp_path / "a", errors, sparsity=0.956)
    ((method,),) = merged(run).values()
    assert [point.round for point in method.marked()] == [4, 8, 10, 14]
    sparsest, stopped = method.walk()
    assert (sparsest.round, stopped.round) == (4, 8)
    assert sentences("T", [method])[2] == (
        f"- T: {GLOBAL} with 10.7% of the weights matches dense (after 16.8%, where the sequence stopped): **holds**, "
        "[-0.100, -0.100], 1 seed (0), 4 test utterances."
    )
    config, rows = ledger.read_run(run)
    said = report.summary(config, rows)
    assert said[1] == (
        "sparsest winning or matching ticket at the marks: round 4, 41.0% of the prunable and 41.0% of all weights "
        "remain, test WER 0.300, winning [-0.100, -0.100]"
    )
    assert said[2].startswith("the sequence stopped at: round 8, 16.8% ") and said[2].endswith("worse [+0.500, +0.500]")
    assert said[3].startswith("ticket with the best valid WER: round 14, 4.4% ")
    # other marks, which are part of the run: 64 and 32.8 %; 0.3 is within a tenth of 32.8 %, 0.5 of 51.2 %
    for marks, rounds in (([0.64, 0.3], [2, 5]), ([0.58, 0.5], [3]), ([0.001], [])):
        method.settings["marks"] = marks
        assert [point.round for point in method.marked()] == rounds
    assert method.walk() == (None, None)
    other = write_run(tmp_path / "b", [ROUND_0, good], sparsity=0.956, marks=[0.8])
    ((first,), (again,)) = (next(iter(merged(folder).values())) for folder in (run, other))
    assert again.get("marks") == [0.8] and again.walk()[0].round == 1 and first.get("marks") == list(compare.MARKS)


def test_marks_of_other_seeds_are_no_sequence_yet(tmp_path):
    good = [3, 3, 3, 3]
    whole = write_run(tmp_path / "0", [ROUND_0] + [good] * 14, sparsity=0.956)
    unfinished = write_run(tmp_path / "1", [ROUND_0] + [good] * 5, sparsity=0.956, seed=1)
    ((method,),) = merged(whole, unfinished).values()
    (line, _) = tables.other_seeds([method])
    seeds = "41.0%: 0, 1; 16.8%: 0; 10.7%: 0; 4.4%: 0"
    assert line == f"{GLOBAL}: the marks have not the same seeds ({seeds}): no sequence yet."
    assert line in tables.tables([method])
    worse = [4, 10, 10, 10]
    stopped = write_run(tmp_path / "2", [ROUND_0] + [good] * 5 + [worse] * 9, sparsity=0.956, seed=2)
    short = write_run(tmp_path / "3", [ROUND_0] + [good] * 5 + [worse] * 3, sparsity=0.956, seed=3)
    ((method,),) = merged(stopped, short).values()
    assert method.walk()[1].mean("remaining") == pytest.approx(0.168, abs=1e-3) and len(method.marked()[-1].seeds) == 1
    assert tables.other_seeds([method]) == []  # the sequence does not reach the mark that one seed lacks
    assert tables.other_seeds(next(iter(merged(whole).values()))) == []


def test_dense_that_recognises_nothing_has_no_verdict(tmp_path):
    nothing = [10, 10, 10, 9]  # WER 0.975
    errors = [nothing, nothing, [3, 3, 3, 3], nothing, [1, 1, 1, 1]]
    run = write_run(tmp_path / "a", errors, sparsity=0.59)
    control = write_run(tmp_path / "b", [ROUND_0] + [nothing] * 4, sparsity=0.59, control="random-mask")
    ticket = write_run(tmp_path / "c", [ROUND_0, nothing, *[[3, 3, 3, 3]] * 3], sparsity=0.59)
    ((method,),) = merged(run).values()
    assert {point.verdict().word for point in method.tickets()} == {"no verdict"}
    assert method.walk()[0] is None and method.walk()[1].round == 4
    assert "**no verdict**" in sentences("T", [method])[0]
    # a control that recognises nothing is beaten all the same; two that recognise nothing are not compared
    (methods,) = merged(control, ticket).values()
    (pair,) = compare.rivals(methods)
    words = [point.verdict().word for point in compare.compared(*pair)]
    assert words == ["no verdict", "winning", "winning", "winning"]


def test_undecided_verdicts_have_their_power(tmp_path):
    """One seed, +-2 errors: of the interval's half width h, equal tickets match by Phi(1.96 (0.01 / h - 1))."""
    run = write_run(tmp_path / "a", [ROUND_0, [2, 6, 2, 6]])
    config, rows = ledger.read_run(run)
    low, high = rows[1]["interval"]
    expected = statistics.NormalDist().cdf(1.96 * (0.01 / ((high - low) / 2) - 1))
    ((method,),) = merged(run).values()
    assert tables.judged(method.tickets()[0]) == f"undecided [{low:+.3f}, {high:+.3f}], power {expected:.0%}"
    told = verdicts.verdict_of([2, 6, 2, 6], ROUND_0, WORDS, 0.01)
    assert told["power"] == pytest.approx(expected, abs=1e-3)
    assert report.cells(rows[1] | told)[-1].endswith(f"power {expected:.0%}")


def test_speakers_are_resampled_too(tmp_path):
    """Four utterances of two speakers; both of the first gain, both of the second lose: two draws in four are 0."""
    errors = [ROUND_0, [2, 2, 6, 6]]
    runs = [write_run(tmp_path / str(s), errors, seed=s, of_round_0={"test_speakers": [0, 0, 1, 1]}) for s in (0, 1)]
    ((method,),) = merged(runs[0]).values()
    told, count = method.tickets()[0].by_speaker()
    assert count == 2 and told == ("undecided", pytest.approx(-0.2), pytest.approx(0.2))
    assert tables.judged(method.tickets()[0]).endswith("; by 2 speakers undecided [-0.200, +0.200], power 3%")
    ((method,),) = merged(*runs).values()
    told, _ = method.tickets()[0].by_speaker()  # seeds x speakers: components as by hand in test_verdicts.py
    errors, others, words = np.array([[4, 12]] * 2), np.array([[8, 8]] * 2), np.array([20, 20])
    assert told == verdicts.verdict(errors, others, words)
    ((method,),) = merged(write_run(tmp_path / "old", [ROUND_0, [2, 2, 6, 6]])).values()
    assert method.tickets()[0].by_speaker() is None


def test_a_claim_of_better_that_is_undecided_says_that_it_matches(tmp_path):
    ((method,),) = merged(write_run(tmp_path / "a", [ROUND_0, ROUND_0])).values()
    (point,) = method.tickets()
    assert tables.word_of(point) == "holds" and tables.interval(point) == "[+0.000, +0.000]"
    better = ("winning",)
    assert tables.word_of(point, "", better) == "undecided"
    assert tables.interval(point, "", better) == "[+0.000, +0.000], finds a gain of 0.000, matching"
    ((method,),) = merged(write_run(tmp_path / "b", [ROUND_0, [2, 2, 6, 6]])).values()
    (point,) = method.tickets()  # WER 0.4 in both, [-0.2, +0.2]: half of it, and 0.8416 of its 1.96 deviations more
    assert tables.interval(point, "", better) == "[-0.200, +0.200], finds a gain of 0.286"


def test_a_match_is_refuted_above_the_margin_alone(tmp_path):
    """0, 1, 1 and 3 more errors in 10 words: 3.5 % of the draws have a sum of 1 or less, so it begins at 0.025."""
    ((method,),) = merged(write_run(tmp_path / "a", [ROUND_0, [4, 5, 5, 7]], margin=0.05)).values()
    (point,) = method.tickets()
    assert point.verdict().word == "worse" and point.verdict().low == 0.025
    assert tables.word_of(point) == "undecided" and tables.interval(point).endswith("], worse")
    assert tables.word_of(point, "", ("winning",)) == "does not hold"
    point.margin = 0.02
    assert tables.word_of(point) == "does not hold" and tables.interval(point).endswith("]")


def test_holm_counts_the_marks_that_have_no_round(tmp_path):
    ((method,),) = merged(write_run(tmp_path / "a", [ROUND_0] + [[1, 1, 1, 1]] * 4, sparsity=0.59)).values()
    assert method.holm() == [pytest.approx(4 / 10_000)]  # of 10,000 draws none is above the margin; 41 % is one of four
    nothing = [10, 10, 10, 10]
    ((method,),) = merged(write_run(tmp_path / "b", [nothing] + [ROUND_0] * 4, sparsity=0.59)).values()
    assert method.holm() == [1.0]


def test_a_short_table_of_searches(tmp_path):
    errors, control = [ROUND_0] + [[1, 1, 1, 1]] * 4, dict(control="random-mask")
    runs = [write_run(tmp_path / scope, errors, sparsity=0.59, scope=scope) for scope in ("global", "lamp")]
    (methods,) = merged(*runs, write_run(tmp_path / "c", errors, sparsity=0.59, **control)).values()
    head, _, *rows, end = tables.curves(methods)
    assert (
        head == "| method | remaining | weights kept | seeds | valid WER | test WER | CER | against dense |" and not end
    )
    assert len(rows) == 10 and [row.split("|")[2] for row in rows[:5]] == [
        " 100.0% ", " 80.0% ", " 64.0% ", " 51.2% ", " **41.0%** ",
    ]  # fmt: skip
    kept = lottery.kept_counts(TOTAL, 0.59, 0.2)[-1]
    assert f"| {kept:,} | 1 | 0.500 | 0.100 | 0.050 | winning [-0.300, -0.300] |" in rows[4]
    assert tables.curves([method for method in methods if method.get("control")]) == []


def test_the_demo_s_ledgers_are_read_though_the_first_ones_counted_no_waiting(tmp_path):
    results = Path(report.__file__).parent.parent / "results" / "prompts"
    first = compare.load(results / "demo-cnn-lstm-0")
    assert len(first.rows) == 12 and "waited" not in first.rows[0] and first.data == "demo"
    ((method,),) = compare.merge([first]).values()
    assert [f"{p.mean('remaining'):.1%}" for p in method.marked()] == ["41.0%", "16.8%", "10.7%"]
    for name in ("config.json", "ledger.jsonl"):
        (tmp_path / name).write_bytes((results / "demo-cnn-lstm-0" / name).read_bytes())
    lines = (tmp_path / "ledger.jsonl").read_text()
    (tmp_path / "ledger.jsonl").write_text(lines.replace('"seconds": 54.6', '"seconds": 54.7', 1))
    with pytest.raises(lottery.LotteryError, match="round 1 does not have the hash it states"):
        compare.load(tmp_path)


def test_utterances_whose_texts_were_not_trained_on_are_reported_too(tmp_path):
    """By hand: of four utterances of ten words the last two are new; there dense has 2 * 8 errors, the ticket 6 + 2."""
    errors, dense = [2, 2, 6, 2], [2, 2, 8, 8]
    run = write_run(tmp_path / "run", [dense, errors], of_round_0={"test_seen": [1, 1, 0, 0]})
    ((method,),) = merged(run).values()
    told, wer, count = method.tickets()[0].of_new_texts()
    assert (count, wer) == (2, 0.4) and told == verdicts.verdict([6, 2], [8, 8], [10, 10])
    assert method.dense().of_new_texts()[1:] == (0.8, 2)
    assert f"; WER 0.400 on the 2 texts that train has not, {told}" in tables.judged(method.tickets()[0])
    lines = report.summary(*ledger.read_run(run))
    assert lines[0].endswith("; WER 0.800 on the 2 texts that train has not")
    ((method,),) = merged(write_run(tmp_path / "old", [dense, errors])).values()
    assert method.tickets()[0].of_new_texts() is None and tables.new_texts(method.dense()) == ""
    seen = {"of_round_0": {"test_seen": [1, 1, 1, 0]}}  # one new text: a bootstrap of one seed, no variance of two
    runs = [write_run(tmp_path / f"one{seed}", [dense, errors], seed=seed, **seen) for seed in (0, 1)]
    ((alone,),), ((both,),) = (merged(*folders).values() for folders in (runs[:1], runs))
    assert alone.tickets()[0].of_new_texts()[2] == 1 and both.tickets()[0].of_new_texts() is None
    assert "texts that train" not in tables.judged(both.tickets()[0])


def test_other_test_sets_have_their_rows_and_claims(tmp_path):
    """Four utterances in the clean, two in noise, where the ticket has 3 + 3 errors of 20 words and dense 8 + 8."""
    run = write_run(tmp_path / "run", [ROUND_0, [3, 3, 3, 3]], sparsity=0.2)
    (method,) = next(iter(merged(run).values()))
    dense, ticket = method.points.values()
    noise = {"test_words": [10, 10], "test_cer": 0.25}
    dense.rows[0]["other_tests"] = {"test at 10 dB": noise | {"test_errors": [8, 8], "test_wer": 0.8}}
    told = {"verdict": "winning", "interval": [-0.5, -0.5]}
    ticket.rows[0]["other_tests"] = {"test at 10 dB": noise | told | {"test_errors": [3, 3], "test_wer": 0.3}}
    ticket.rows[0]["remaining"] = 0.168
    rows = [line for line in tables.tables([method]) if line.startswith("| test")]
    assert [row.split(" | ")[0] for row in rows] == ["| test set", "| test", "| test", *["| test at 10 dB"] * 2]
    assert "| 0.500 | 0.300 | 0.250 | -0.500 | winning [-0.500, -0.500] | 51.8 M, 41.4 M (80.0%) |" in rows[-1]
    assert sentences("T", [method]) == [
        f"- T: {GLOBAL} with 16.8% of the weights matches dense: **holds**, [-0.100, -0.100], 1 seed (0), "
        "4 test utterances.",
        f"- T: {GLOBAL} with 16.8% of the weights matches dense on test at 10 dB: **holds**, [-0.500, -0.500], "
        "1 seed (0), 2 test utterances.",
    ]


# ---------------------------------------------------------------------------- two sets of runs


def test_compare_prints_a_table_of_two_sets(tmp_path, capsys):
    """By seed; rounds of as many weights: round 1 of 36 % is as dense as none of 20 %, and round 2 as round 4."""
    slow = [[ROUND_0] * 4 + [[3, 3, 3, 3]], [ROUND_0] * 4 + [[2, 2, 2, 2]], [ROUND_0] * 5]
    for seed, errors in enumerate(slow):
        write_run(tmp_path / f"slow-{seed}", errors, sparsity=0.5904, seed=seed, scope="lamp")
    for seed in (0, 1):
        write_run(tmp_path / f"fast-{seed}", [ROUND_0] * 2 + [[4, 4, 4, 4]], sparsity=0.5904, seed=seed,
                  prune_rate=0.36)  # fmt: skip
    sets = ["--compare", str(tmp_path / "slow-*"), f"{tmp_path}/fast-0,{tmp_path}/fast-1"]
    assert report.main([*sets, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("| ")][2:]
    # -0.1 and -0.2 by seed: -0.15 +- 12.7062 * 0.05; round 2 of 64 % is as dense as round 1 of 36 %
    assert rows == [
        "| 2, 1 | 64.0%, 64.0% | test | 0, 1 | 0.400 ± 0.000 | 0.400 ± 0.000 | +0.000 ± 0.000 | "
        "matching [+0.000, +0.000] |",
        "| 4, 2 | 41.0%, 41.0% | test | 0, 1 | 0.250 ± 0.071 | 0.400 ± 0.000 | -0.150 ± 0.071 | "
        "undecided [-0.785, +0.485], power 3% |",
    ]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "forest.png"}
    assert (tmp_path / "out" / "report.md").read_text().startswith(said)
    assert report.main([*sets, "--rounds", "4:0", "0"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[:2] for row in rows] == [["| 4, 0", "41.0%, 100.0%"], ["| 0, 0", "100.0%, 100.0%"]]


def test_compare_has_all_rounds_whatever_comes_first_and_no_test_in_other_noise(tmp_path, capsys):
    """Seed 5 has a round less than seed 0, and the noise of B's test is of other recordings."""
    test = {"test_wer": 0.4, "test_cer": 0.2, "test_errors": ROUND_0, "test_words": WORDS}
    noisy = {"other_tests": {"test at 5 dB": test | {"verdict": "matching", "interval": [0, 0]}}}
    dense = {"other_tests": {"test at 5 dB": test}}
    for name, scope, noise in (("a", "lamp", "1"), ("b", "global", "2"), ("c", "global", "1")):
        for seed, rounds in ((0, 3), (5, 2)):
            how = dict(sparsity=0.36, seed=seed, scope=scope, row=noisy, of_round_0=dense, noise_sha256=noise)
            write_run(tmp_path / f"{name}{seed}", [ROUND_0] * rounds, **how)

    def rows(a, b):
        sets = [",".join(str(tmp_path / name) for name in part) for part in (a, b)]
        assert report.main(["--compare", *sets]) == 0
        lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
        return [(line[0], line[2], line[3]) for line in lines[2:]]

    found = [("| 1, 1", "test", "0, 5"), ("| 2, 2", "test", "0")]
    assert rows(("a5", "a0"), ("b0", "b5")) == rows(("a0", "a5"), ("b5", "b0")) == found
    assert ("| 1, 1", "test at 5 dB", "0, 5") in rows(("a0", "a5"), ("c0", "c5"))


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--compare", "{a}", "{missing}"], "missing: no such run"),
        (["--compare", "{a},{c}", "{b}"], "A: {c} and {a} have the same seed"),
        (["--compare", "{a}", "{d}"], "A has seeds [0] and B [1]: none in common"),
        (["--compare", "{a}", "{b}", "--rounds", "9"], "A and B have no rounds 9:9"),
        (["{a}", "--out", "{a}/config.json"], "/config.json: must be a folder, or not be there yet"),
        (["--compare", "{a}", "{b}", "--rounds", "x"], "must be R or R:Q, rounds of A and of B, got 'x'"),
        (["{a}", "--compare", "{a}", "{b}"], "name runs to merge, or --compare A B"),
        (["{a}", "--rounds", "1"], "name runs to merge, or --compare A B"),
        ([], "name runs to merge, or --compare A B"),
        (["--compare", "{a},{other}", "{a},{d}"], "in seed alone, not in scope: global in {a}, lamp in {other}"),
        (["--compare", "{a},{faster}", "{a},{d}", "--rounds", "1"], "other seeds: 80.0% and 80.0%, 90.0% and 80.0%"),
    ],
)  # fmt: skip
def test_sets_that_cannot_be_compared_are_one_line(argv, said, tmp_path, capsys):
    names = {name: tmp_path / name for name in ("a", "b", "c", "d", "missing")}
    for name in "abcd":
        write_run(names[name], [ROUND_0, ROUND_0], seed=int(name == "d"))
    names |= {"other": tmp_path / "other", "faster": tmp_path / "faster"}
    write_run(names["other"], [ROUND_0, ROUND_0], seed=1, scope="lamp")
    write_run(names["faster"], [ROUND_0, ROUND_0], seed=1, sparsity=0.1)  # its first round is its last
    argv = [word.format(**names) for word in argv]
    try:
        assert report.main(argv) == 2
    except SystemExit as stopped:
        assert stopped.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("python -m lab.report: error: ") and said.format(**names) in line


# ---------------------------------------------------------------------------- pictures


def drawn(monkeypatch):
    """The figures that are saved, by file name."""
    found = {}
    monkeypatch.setattr(pictures, "save", lambda path, figure: found.update({path.name: figure}))
    return found


def test_ticks_of_short_axes():
    assert pictures.share_ticks(4.4) == [100, 50, 20, 10, 5]
    assert pictures.share_ticks(64.0) == [100, 90, 80, 70] and pictures.share_ticks(80.0) == [100, 90, 80]
    assert pictures.share_ticks(41.0) == [100, 90, 80, 70, 60, 50, 40] and pictures.share_ticks(100.0) == [100]


def test_bands_are_not_cut_off(tmp_path, monkeypatch):
    """Two seeds, whose band reaches from -1.07 to 1.47."""
    runs = [write_run(tmp_path / str(s), [ROUND_0, [n] * 4], seed=s) for s, n in enumerate((3, 1))]
    ((method,),) = merged(*runs).values()
    figures = drawn(monkeypatch)
    pictures.draw(tmp_path / "a.png", "title", [method])
    wer, cer = figures["a.png"].axes
    low, high = wer.get_ylim()
    assert low < 0.4 - 1.47062 and high > 0.4 + 1.07062
    assert [label.get_text() for label in wer.get_xticklabels()] == ["100 %", "90 %", "80 %"]
    right, left = wer.get_xlim()
    assert right > 100 and left < 80
    assert sorted(cer.lines[-1].get_ydata()) == [0.05, 0.15, 0.2, 0.2]  # a dot a seed


@pytest.mark.parametrize("corpus, lines", [("an4", [0.076, 0.0957]), ("manifests", [])])
def test_published_rates_stand_beside_those_of_their_corpus(tmp_path, monkeypatch, corpus, lines):
    ((method,),) = merged(write_run(tmp_path / "run", [ROUND_0, [3] * 4], corpus=corpus)).values()
    figures = drawn(monkeypatch)
    pictures.draw(tmp_path / "a.png", "title", [method])
    wer = figures["a.png"].axes[0]
    assert [line.get_ydata()[0] for line in wer.lines if line.get_linestyle() == ":"] == lines
    assert [text.get_text() for text in wer.texts] == list(pictures.PUBLISHED.get(corpus, []))
    low, high = wer.get_ylim()
    assert all(low < rate < high for rate in lines)


def test_the_forest_has_a_row_a_claim_in_the_verdict_s_color(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    rows = [("GM, 41.0%", verdicts.Verdict("winning", -0.1, -0.05), 0.01),
            ("GM, 16.8%", verdicts.Verdict("undecided", -0.1, 0.2), 0.02)]  # fmt: skip
    pictures.draw_forest(tmp_path / "forest.png", rows)
    figure = figures["forest.png"]
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["GM, 41.0%", "GM, 16.8%"]
    intervals = [line for line in ax.lines if line.get_linewidth() == 2.5]
    assert [list(line.get_xdata()) for line in intervals] == [[-0.1, -0.05], [-0.1, 0.2]]
    assert [line.get_color() for line in intervals] == [pictures.COLORS["winning"], pictures.COLORS["undecided"]]
    margins = [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == ":"]
    assert margins == [[0.01, 0.01], [0.02, 0.02]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["winning", "undecided"]


def test_an_interval_many_times_as_wide_as_most_is_cut_with_arrows(tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    ends = [(-0.02, 0.01), (-0.02, 0.0), (0.01, 0.04), (-0.3, 0.03), (-0.4, 0.4)]
    rows = [(str(end), verdicts.Verdict("undecided", *end), 0.01) for end in ends]
    pictures.draw_forest(tmp_path / "forest.png", rows, "what all have in common")
    (ax,) = figures["forest.png"].axes
    left, right = ax.get_xlim()
    assert -0.03 < left < -0.02 and 0.04 < right < 0.05 and ax.get_title() == "what all have in common"
    arrows = [(line.get_marker(), *line.get_xydata()[0]) for line in ax.lines if line.get_marker() in "<>"]
    assert arrows == [("<", left, 3), ("<", left, 4), (">", right, 4)]
    nothing = [("same", verdicts.Verdict("matching", 0.0, 0.0), 0.0)] * 3  # of tickets with dense's errors
    pictures.draw_forest(tmp_path / "forest.png", [*nothing, ("a", verdicts.Verdict("undecided", -0.05, 0.02), 0.0)])
    left, right = figures["forest.png"].axes[0].get_xlim()
    assert left < -0.05 and right > 0.02
    pictures.draw_forest(tmp_path / "forest.png", nothing)
    left, right = figures["forest.png"].axes[0].get_xlim()
    assert left < 0 < right


def test_pictures_say_once_what_all_methods_have_in_common(tmp_path, monkeypatch):
    """And the claims of tests in noise have a picture of their own."""
    at_5_db = {"test_wer": 0.4, "test_cer": 0.2, "test_errors": ROUND_0, "test_words": WORDS}
    noise = {"other_tests": {"test at 5 dB": at_5_db | {"verdict": "matching", "interval": [0.0, 0.0]}}}
    methods = merged(*(
        write_run(tmp_path / str(i), [ROUND_0] * 5, sparsity=0.6, scope="lamp", row=noise, of_round_0=noise, **control)
        for i, control in enumerate(({}, {"control": "random-mask"}))
    ))  # fmt: skip
    figures = drawn(monkeypatch)
    report.write_pictures(tmp_path, methods)
    title = "cnn-lstm on demo, demo size"
    curves, forest = figures["cnn-lstm-on-demo-demo-size.png"], figures["forest.png"]
    layers = figures["cnn-lstm-on-demo-demo-size-layers.png"]
    for told in (curves.get_suptitle(), layers.get_suptitle(), forest.axes[0].get_title()):
        assert told == f"{title}: scope lamp"
    labels = [text.get_text() for text in curves.axes[0].get_legend().get_texts()]
    assert labels == ["tickets, 1 seed", "random-mask, 1 seed"]
    for name, rows in (("forest.png", ["tickets, 41.0%", "tickets less random-mask, 41.0%"]),
                       ("forest-other-tests.png", ["tickets, 41.0%, test at 5 dB"])):  # fmt: skip
        assert [label.get_text() for label in figures[name].axes[0].get_yticklabels()] == rows
        assert f"({name})" in tables.merged_report(methods, pictured=True)
    sizes = {line.get_markersize(): len(line.get_xdata()) for line in curves.axes[0].lines if line.get_marker() == "o"}
    assert sizes == {3: 1, 6: 1}  # a line a point: the marks are large
    (alone,) = methods.values()
    assert compare.short_names(alone[1:]) == ("random-mask, scope lamp", {alone[1].name: "tickets"})


@pytest.mark.parametrize("other, names", [("a", ["dense, int8", "10.7%"]), ("b", ["a: dense, int8", "b: 10.7%"])])
def test_ways_in_use_tell_their_run_once(other, names, tmp_path, monkeypatch):
    figures = drawn(monkeypatch)
    ways = [("a: dense, int8", 2.0, 0.2, 0.1, 0.3), (f"{other}: 10.7%", 1.0, 0.25, 0.2, 0.35)]
    pictures.draw_in_use(tmp_path / "use.png", ways)
    figure = figures["use.png"]
    time, wer = figure.axes
    assert [label.get_text() for label in time.get_yticklabels()] == names
    assert figure.get_suptitle() == ("a, one seed" if other == "a" else "")
    assert [bar.get_width() for bar in time.patches] == [2.0, 1.0]
    assert [bar.get_width() for bar in wer.patches] == [0.2, 0.25]
    assert len({bar.get_facecolor() for bar in time.patches}) == 2  # dense in grey


def test_layers_without_a_weight_are_marked_and_white(tmp_path):
    empty = dict.fromkeys(WEIGHTS, 100) | {"convs.1.weight": 0}
    half = {name: n // 2 for name, n in WEIGHTS.items()}
    ((method,),) = merged(
        write_run(tmp_path / "a", [ROUND_0, ROUND_0], row={"kept_per_layer": empty}),
        write_run(tmp_path / "b", [ROUND_0, ROUND_0], row={"kept_per_layer": half}, seed=1),
    ).values()
    cells = dict(zip(tables.MERGED, tables.merged_cells(method, method.tickets()[0], ""), strict=True))
    assert cells["layers without a weight"] == "convs.1.weight"
    shares = method.layer_shares()
    n = WEIGHTS["convs.0.weight"]  # 1 * 16 * 21 * 11
    assert n == 3696 and shares["convs.0.weight"] == [1.0, pytest.approx((100 / 3696 + 0.5) / 2)]
    assert shares["convs.1.weight"] == [1.0, 0.25]
    pictures.draw_layers(tmp_path / "layers.png", "title", [method])
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_command_prints_and_writes(tmp_path, capsys):
    errors = [ROUND_0] * 4 + [[3, 3, 3, 3]]
    folders = [write_run(tmp_path / f"run{s}", errors, seed=s, sparsity=0.5904) for s in (0, 1)]
    assert report.main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    told = "0.300 ± 0.000 at 41.0% (41.0% of all), winning [-0.100, -0.100], 2 seeds"
    assert f"| {GLOBAL} | 0.400 ± 0.000 | 41.0% (0.000) | {told} | none | {told} |" in said
    assert "| TED-LIUM | 0.1593 | 0.1570 at 4.4 % | 0.1404 at 16.8 % | one second-hand summary, unchecked; 4.4" in said
    names = {"report.md", "forest.png", "cnn-lstm-on-demo-demo-size.png", "cnn-lstm-on-demo-demo-size-layers.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert "(cnn-lstm-on-demo-demo-size-layers.png)" in (tmp_path / "out" / "report.md").read_text()


def test_a_second_run_of_one_seed_is_named(tmp_path, capsys):
    runs = [write_run(tmp_path / name, [ROUND_0, [n, 3, 3, 3]]) for name, n in (("a", 3), ("b", 2), ("c", 3))]
    assert report.main([str(run) for run in runs]) == 0
    (said,) = capsys.readouterr().err.splitlines()
    assert said == f"python -m lab.report: {runs[1]}: left out where a run before it is global magnitude, seed 0, too"


@pytest.mark.parametrize("name", [r"d$\foo$", "$x$", "a\x1b[2Jb", "<img src=x>", "# a | b `c` *d*", "x" * 250])
def test_foreign_names_are_no_markup(name, tmp_path, capsys):
    """matplotlib takes what stands between two $ for mathematics, and fails if it is none: that run never ended."""
    run = write_run(tmp_path / "run", [ROUND_0, [3, 3, 3, 3]], data=f"/corpora/{name}", epochs=1)
    config, rows = ledger.read_run(run)
    report.write_report(run, config, rows)
    assert (run / "report.png").stat().st_size > 1000
    heading = (run / "report.md").read_text().splitlines()[0]
    assert heading == f"# cnn-lstm on {console.markdown_text(f'/corpora/{name}')}, seed 0"
    assert report.main([str(run), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "<img" not in said.replace("\\<", "") and len(list((tmp_path / "out").iterdir())) == 3


def edit(path, old, new):
    path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda run: (run / "ledger.jsonl").write_bytes(b"{}\n"), "a value is missing"),
        (lambda run: (run / "ledger.jsonl").write_bytes(b"[\n"), "line 1: not a row of a ledger"),
        (lambda run: (run / "config.json").write_text("{"), "not a run folder"),
        (lambda run: edit(run / "config.json", '"/corpora/demo"', "1"), "machine, data: must be a text"),
        (lambda run: edit(run / "config.json", '"seed": 0', '"seed": 1'), "round 0 does not follow the configuration"),
        (lambda run: (run / "ledger.jsonl").unlink(), "cannot read the ledger"),
        (lambda run: (run / "ledger.jsonl").write_bytes(b""), "no run with a finished round"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_one_line(damage, said, tmp_path, capsys):
    run = write_run(tmp_path / "run", [ROUND_0, ROUND_0])
    damage(run)
    assert report.main([str(run)]) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("python -m lab.report: error: ") and said in error


def test_a_ledger_chained_with_wrong_values_is_one_line(tmp_path, capsys):
    run = write_run(tmp_path / "run", [ROUND_0, ROUND_0], row={"interval": "x", "verdict_rule": verdicts.VERDICT_RULE})
    assert report.main([str(run)]) == 2
    assert capsys.readouterr().err.startswith(
        f"python -m lab.report: error: {run / 'ledger.jsonl'}, line 2, interval: must be a list of 2 values, got 'x'"
    )


def test_multiply_adds_by_hand():
    """4 s are 400 frames, 100 encoder frames, 50 joiner frames; 60 tokens and the start make 61."""
    sizes = dict(window=12, channels=2, hidden=3, layers=1, predictor=4, joiner=5, dropout=0.1)
    dense = {
        "subsample.weight": 100 * 2 * 80 * 12,
        "encoder.0.weight_ih_l0": 100 * 4 * 3 * 2,
        "encoder.0.weight_hh_l0": 100 * 4 * 3 * 3,
        "predictor.weight_ih_l0": 61 * 4 * 4 * 4,
        "predictor.weight_hh_l0": 61 * 4 * 4 * 4,
        "encoder_projection.weight": 50 * 5 * 3,
        "predictor_projection.weight": 61 * 5 * 4,
        "output.weight": 50 * 61 * 29 * 5,  # the joiner's lattice
        "ctc_output.weight": 100 * 29 * 3,
    }
    assert plan.multiply_adds("rnnt", sizes, of="loss") == sum(dense.values()) / 4 == 658_728 / 4
    kept = dict.fromkeys(dense, 0)
    assert plan.multiply_adds("rnnt", sizes, kept | {"output.weight": 7}, "loss") == 50 * 61 * 7 / 4
    # As it recognises: a blank a frame and 60 tokens are 110 steps of the joiner, and the CTC output stands still.
    greedy = dense | {"output.weight": 110 * 29 * 5, "ctc_output.weight": 0}
    assert plan.multiply_adds("rnnt", sizes) == sum(greedy.values()) / 4 == 223_728 / 4
    assert plan.multiply_adds("rnnt", sizes, kept | {"output.weight": 7}) == 110 * 7 / 4
    assert plan.multiply_adds("rnnt", sizes, kept | {"encoder.0.weight_hh_l0": 10, "subsample.weight": 1}) == 1100 / 4
    with pytest.raises(lottery.LotteryError, match=r"rnnt has the prunable layers subsample\.weight, .*, not other"):
        plan.multiply_adds("rnnt", sizes, {"other": 1})
    # Conv2d: 1 -> 2 channels, kernel 3 x 5, strides 2 and 2: 40 of 80 bins, 200 frames; again: 20 bins, 100 frames
    sizes = dict(
        features="log-mel",
        channels=2,
        kernels=[(3, 5), (3, 5)],
        strides=[(2, 2), (2, 2)],
        hidden=3,
        layers=1,
        dropout=0.0,
    )
    convolutions = 40 * 200 * (2 * 1 * 3 * 5) + 20 * 100 * (2 * 2 * 3 * 5)
    recurrent = 100 * 2 * (4 * 3 * 2 * 20 + 4 * 3 * 3)  # two directions, inputs of 2 channels and 20 bins
    assert plan.multiply_adds("cnn-lstm", sizes) == (convolutions + recurrent + 100 * 29 * 3) / 4
    # 3 x 3 convolutions to the same places; a block of width w: feed-forward 16 w^2, attention 4 w^2, convolution 3 w^2
    sizes = dict(channels=2, width=4, heads=2, blocks=3, kernel=3, dropout=0.0)
    convolutions = 40 * 200 * (2 * 1 * 3 * 3) + 20 * 100 * (2 * 2 * 3 * 3)
    block = 23 * 4**2 + 4 * 3  # and depthwise
    assert plan.multiply_adds("conformer", sizes) == (convolutions + 100 * (2 * 20 * 4 + 3 * block + 29 * 4)) / 4


def test_the_tables_of_an4_are_those_of_its_ledgers():
    """What results/an4/README.md says of them: one command, of all that was run."""
    folder = Path(__file__).parents[1] / "results" / "an4"
    groups = report.merged(sorted(folder.glob("*-[0-9]")))
    told = tables.merged_report(groups, pictured=True)
    assert told == (folder / "tables" / "report.md").read_text()
    methods = next(iter(groups.values()))  # of the CNN-LSTM
    primary = max(methods, key=lambda method: max(len(point.seeds) for point in method.points.values()))
    curves = "\n".join(tables.curves([primary]))
    assert curves in (folder.parents[1] / "RESULTS.md").read_text(), "not the table of RESULTS.md"
