"""The sections of a report on what was recognised: the worst utterances, confusions, who is right where."""

import json

import pytest
from test_report import ROUND_0, write_run

from audio_lottery import ledger
from audio_lottery.texts import edits
from lab import recognised, report

DENSE = ["a cat sat", "the dog", "no", "one two"]  # what the dense network recognised
TICKET = ["the cat sat", "dog", "know", "one too two"]  # the ticket has the first right, dense the second and third
SAID = ["the cat sat", "the dog", "no", "one two three"]


def texts(number, hypotheses, references=SAID, test="test", audio="u{}.wav"):
    lines = []
    for i, (reference, hypothesis) in enumerate(zip(references, hypotheses)):
        kinds = {"substitutions": edits(reference.split(), hypothesis.split()), "deletions": 0, "insertions": 0}
        lines.append({"round": number, "test": test, "id": i, "audio": audio.format(i), "reference": reference,
                      "hypothesis": hypothesis, **kinds})  # fmt: skip
    return lines


def write_texts(run, *lines):
    (run / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for part in lines for line in part))


def report_of(run) -> str:
    config, rows = ledger.read_run(run)
    return report.markdown_report(config, rows, report.look_of(run, config, rows))


@pytest.fixture
def run(tmp_path):
    """Round 2 is the best on valid; no round is at a mark."""
    run = write_run(tmp_path / "run", [ROUND_0, [9] * 4, [3] * 4], valid=[0.5, 0.5, 0.4], epochs=1)
    write_texts(run, texts(0, DENSE), texts(0, ["noise"] * 4, test="other"), texts(1, ["x"] * 4), texts(2, TICKET))
    return run


def test_a_report_shows_what_was_recognised(run):
    said = report_of(run)
    assert "Test set test, ticket: round 2. The 4 utterances with the most errors of the ticket." in said
    assert [line for line in said.splitlines() if line.startswith("### ")] == [
        "### 1. u3.wav: errors dense 1, ticket 2, of 3 words",
        "### 2. u1.wav: errors dense 0, ticket 1, of 2 words",
        "### 3. u2.wav: errors dense 0, ticket 1, of 1 word",
        "### 4. u0.wav: errors dense 1, ticket 0, of 3 words",
    ]
    assert (
        "| reference | one |  | two | three |\n| --- | --- | --- | --- | --- |\n"
        "| dense | one |  | two | **—** |\n| ticket | one | **too** | two | **—** |\n"
    ) in said
    assert (
        "| what happened | word | recognised | dense | ticket |\n| --- | --- | --- | --- | --- |\n"
        "| taken for another | no | know | 0 | 1 |\n| taken for another | the | a | 1 | 0 |\n"
        "| left out | three |  | 1 | 1 |\n| left out | the |  | 0 | 1 |\n| put in |  | too | 0 | 1 |\n"
    ) in said
    ours, theirs = said.split("## What the ticket gets right and dense does not\n")[1].split("## What dense gets")
    assert "1 utterance whole, 1 word in all." in ours and "| u0.wav | the cat sat | a cat sat |" in ours
    assert "The words most often: the 1." in ours
    assert "2 utterances whole, 2 words in all." in theirs and "| u1.wav | the dog | dog |" in theirs
    assert "The words most often: no 1, the 1." in theirs
    assert "noise" not in said  # it is of the first test set
    report.write_report(run, *ledger.read_run(run))
    assert (run / "report.md").read_text() == said and (run / "report.png").exists()


def test_the_ticket_is_the_one_that_the_summary_names(tmp_path):
    """The sparsest matching one at the marks, round 4, though round 1 is the best on valid."""
    errors = [ROUND_0] * 4 + [[3] * 4]
    run = write_run(tmp_path / "run", errors, valid=[0.5, 0.1, 0.5, 0.5, 0.5], sparsity=0.5904, epochs=1)
    write_texts(run, texts(0, DENSE), texts(1, ["x"] * 4), texts(4, TICKET))
    assert "Test set test, ticket: round 4." in report_of(run)


def test_one_system_alone_is_shown_alone(tmp_path):
    run = write_run(tmp_path / "dense", [ROUND_0], epochs=1)
    write_texts(run, texts(0, DENSE))
    said = report_of(run)
    assert "there is no text of a ticket. The 4 utterances with the most errors of the dense network." in said
    assert "| left out | three |  | 1 |" in said and "gets right" not in said
    run = write_run(tmp_path / "taken", [ROUND_0, ROUND_0], epochs=1)  # round 0 is another run's
    write_texts(run, texts(1, TICKET))
    assert "ticket: round 1; the texts of the dense network are another run's." in report_of(run)
    write_texts(run, texts(1, SAID))
    assert "None: every word is right." in report_of(run)


def test_without_texts_a_report_is_as_before(tmp_path):
    run = write_run(tmp_path / "run", [ROUND_0, ROUND_0], epochs=1)
    said = report_of(run)
    assert "worst" not in said and "confused" not in said
    write_texts(run)
    assert report_of(run) == said


def test_lists_are_short():
    there = recognised.Look("test", ["dense", "ticket"], 1, [
        recognised.Heard(i, "a", f"right{i} wrong{i}", (f"w{i} x{i}", f"right{i} y{i}")) for i in range(30)
    ])  # fmt: skip
    lines = recognised.sections(there)
    assert sum(line.startswith("### ") for line in lines) == 10
    assert sum(line.startswith("| taken for another") for line in lines) == 10
    assert "0 utterances whole, 30 words in all." in lines and len("\n".join(lines)) < 5000


def test_foreign_texts_are_no_markup(tmp_path):
    run = write_run(tmp_path / "run", [ROUND_0, ROUND_0], epochs=1)
    evil = ["<img src=x onerror=alert(1)>", "| a | b", "```\n# x", "![x](http://x.y) \x1b[2J"]
    write_texts(run, texts(0, evil, evil, audio="<img>{}|"), texts(1, ["x"] * 4, evil, audio="<img>{}|"))
    said = report_of(run)
    assert "<img" not in said.replace("\\<", "") and "\x1b" not in said and "](http" not in said.replace("\\]", "")
    assert said.count("\n```") == 2  # the settings' own
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert all("|" not in cell.replace("\\|", "") for row in rows for cell in row[2:-2].split(" | "))
