"""Every ticket of tickets/ is of a committed run, and recognises as its ledger says; those of AN4 where AN4 is."""

import contextlib
from pathlib import Path

import pytest

import data
import lottery
import train
from audio_lottery import card, files, ledger
from lab import controls, scoring
from runner.cache import load_examples
from transcribe import load

HERE = Path(data.__file__).parent
AN4 = HERE.parent / "shared" / "corpora" / "an4"
TICKETS = sorted((HERE / "tickets").glob("*.safetensors"))


def run_of(path: Path) -> card.Origin:
    """The round of a run under results/ whose ledger bears the ticket's hashes."""
    file, same = files.load_ticket(path), ("data_sha256", "seed", "backbone")
    for folder in sorted((HERE / "results").glob("*/*")):
        if (folder / "ledger.jsonl").is_file():
            config = ledger.read_config(folder)
            if all(config[key] == file.info[key] for key in same):
                with contextlib.suppress(lottery.LotteryError):  # another run, or another round's
                    return card.origin_of(folder, file)
    raise AssertionError(f"no run under results/ has {path.name}")


@pytest.mark.parametrize("path", TICKETS, ids=lambda path: path.stem)
def test_a_ticket_is_small_has_a_card_and_a_committed_run(path):
    origin = run_of(path)
    assert path.stat().st_size <= 3_000_000 and files.load_ticket(path).rewind is None
    drawn = controls.drawn_again(files.load_ticket(path))
    assert lottery.sha256(drawn) == origin.row["rewind_sha256"]
    said = path.with_suffix(".md").read_text()
    assert f"{origin.row['test_wer']:.3f}" in said and origin.config["data_sha256"] in said


def rates_of(path: Path, utterances: list[data.Utterance]) -> dict:
    model, ticket = load(path)
    examples = load_examples(utterances, ticket.info["tokens"], model.features)
    hypotheses = train.recognise(model, examples, ticket.info["tokens"], 16, "cpu")
    return scoring.rates([e.text for e in examples], hypotheses)


@pytest.mark.parametrize("path", [p for p in TICKETS if p.stem.startswith("an4-")], ids=lambda path: path.stem)
def test_a_ticket_of_an4_makes_the_printed_errors(path):
    if not AN4.is_dir():
        pytest.skip("needs ../shared/corpora/an4, which is not part of the project")
    row = run_of(path).row
    found = rates_of(path, sorted(data.read_corpus(AN4)["test"], key=lambda u: u.audio.stem))  # as the clone has them
    assert found["errors"] == row["test_errors"] and found["words"] == row["test_words"]


@pytest.mark.parametrize("path", [p for p in TICKETS if p.stem.startswith("demo-")], ids=lambda path: path.stem)
def test_a_ticket_of_the_demo_makes_the_printed_errors(path):
    row, found = run_of(path).row, rates_of(path, data.read_corpus(HERE / "demo")["test"])
    assert found["words"] == row["test_words"]
    other = sum(a != b for a, b in zip(found["errors"], row["test_errors"]))
    assert other <= 2  # utterances: it was trained on another processor, which rounds otherwise
