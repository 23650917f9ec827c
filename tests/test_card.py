"""python -m audio_lottery card: of a run folder, of a ticket alone, of strangers' tickets."""

import json
import re

import pytest
import torch

import data
import lottery
import models
from audio_lottery import __main__ as audio_lottery
from audio_lottery import card, files, ledger
from runner import flags

TOKENS = [data.BLANK, " ", *"abcdef"]
SIZES = dict(window=12, channels=8, hidden=8, layers=1, predictor=8, joiner=8, dropout=0.0)
ERRORS, WORDS = [[2, 3, 1, 0], [1, 3, 2, 0]], [4, 4, 4, 4]


def ticket_and_settings(argv=("--sparsity", "0.2"), more=()):
    """Masks that keep 80 %, weights, and the configuration of a command."""
    torch.manual_seed(0)
    model = models.Transducer(len(TOKENS), **SIZES)
    ticket = lottery.Ticket(model)
    ticket.prune(ticket.kept_units * 8 // 10)
    ticket.hold()
    config = flags.configuration(flags.parse(["--backbone", "rnnt", *argv])) | {"data_sha256": "5" * 64}
    return ticket, config | dict(more)


def save_run(folder, argv=("--sparsity", "0.2"), machine=(), info=(), more=()):
    """A run of two rounds, its last one's ticket too; folder: what it is written to."""
    folder.mkdir(exist_ok=True)
    ticket, config = ticket_and_settings(argv, more)
    config["machine"] |= dict(machine)
    settings = ledger.settings_of(config)
    ones = {name: torch.ones_like(mask) for name, mask in ticket.masks.items()}
    state, rows = lottery.state_of(ticket.model), []
    total = sum(mask.numel() for mask in ones.values())
    for number, masks in enumerate((ones, ticket.masks)):
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        row = {
            "round": number, "kept": sum(kept.values()), "total": total, "remaining": sum(kept.values()) / total,
            "remaining_all": 0.5, "kept_per_layer": kept, "mask_sha256": lottery.sha256(masks), "last_sha256": "",
            "trained_sha256": lottery.sha256(state) if number else "", "valid_wer": 0.25, "seconds": 1.0,
            "device": "cpu", "threads": 2, "versions": {"torch": "2"},
        }  # fmt: skip
        if settings.get("test", True):
            row |= {"test_wer": sum(ERRORS[number]) / 16, "test_cer": 0.1, "test_errors": ERRORS[number]}
            row |= {"test_words": WORDS}
            row |= {"verdict": "undecided", "interval": [-0.25, 0.125], "power": 0.04} if number else {}
        ledger.append_row(None, rows, row, settings)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "ledger.jsonl").write_bytes(b"".join(map(ledger.ledger_line, rows)))
    about = settings | {"sizes": SIZES, "tokens": TOKENS, "features": "log-mel"} | dict(info)
    files.save_ticket(folder / "ticket.safetensors", ticket.masks, ticket.rewind_state, state, about)
    return folder


def told(capsys, *argv) -> tuple[int, str, str]:
    code = audio_lottery.main(["card", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_run_folder_says_all(tmp_path, capsys):
    code, out, err = told(capsys, save_run(tmp_path / "run"))
    assert (code, err) == (0, "") and out.startswith("# A ticket: rnnt, demo size, 80.0% of the prunable weights\n\n- ")
    ticket, _ = ticket_and_settings()
    total = sum(mask.numel() for mask in ticket.masks.values())
    everything = sum(p.numel() for p in ticket.model.parameters())
    kept = total * 8 // 10
    left = everything - total + kept
    for line in (
        "network: rnnt of demo size (window 12, channels 8, hidden 8, layers 1, predictor 8, joiner 8, dropout 0.0)",
        "tokens: 8, the blank among them; features: log-mel",
        f"trained on: demo; SHA-256 of the corpus {'5' * 64}",
        "round 1 of a run of 2, seed 0, cpu, 2 threads, torch 2",
        r"WER on the test's 4 utterances: 0.375, 95 % interval \[0.125, 0.625\] over other utterances; CER 0.100",
        r"against dense, 0.375: undecided \[-0.250, +0.125\], power 4%, 1 seed",
        f"weights kept: {kept:,} of {total:,} prunable ones, 80.0%; "
        f"{left:,} of all {everything:,} parameters, {left / everything:.1%}",
        "licence of the data: CC-BY-SA-3.0 (COPYRIGHT in demo)",
    ):
        assert f"\n- {line}\n" in out
    size = (tmp_path / "run" / "ticket.safetensors").stat().st_size
    assert re.search(rf"\n- bytes: {size:,}, [\d,]+ without its rewind state; the dense float32 checkpoint has", out)
    line = "python train.py --backbone=rnnt --sparsity=0.2 --data=demo --threads=2"
    assert out.endswith(f"The command that made it:\n\n```\n{line}\n```\n")


def test_a_ticket_that_no_seed_draws_again_cannot_be_rewound(tmp_path, capsys):
    file = files.load_ticket(save_run(tmp_path / "run"))
    for more in ({"rewind_step": 1}, {"init_sha256": "5" * 64}):
        info = file.info | more
        files.save_ticket(tmp_path / "late", file.masks, None, file.trained, info, file.rewind_sha256)
        assert "\n- rewind state: left out; it can be used, and not be rewound\n" in told(capsys, tmp_path / "late")[1]


def test_a_ticket_alone_says_what_it_does_not_know(tmp_path, capsys):
    run = save_run(tmp_path / "run")
    assert audio_lottery.main(["copy", str(run), str(tmp_path / "alone"), "--without-rewind"]) == 0
    code, out, _ = told(capsys, tmp_path / "alone")
    assert code == 0
    for line in (
        "rewind state: left out; train.py --ticket draws it again from its seed",
        f"trained on: a corpus whose name is not known here; SHA-256 of the corpus {'5' * 64}",
        "WER: not known here: the ledger of its run has it (--run RUN)",
        "licence of the data: not known here: a ticket's file does not name its corpus; --licence TEXT says it",
    ):
        assert f"\n- {line}\n" in out
    assert "(its corpus, DIR, is not known here):" in out and "--sparsity=0.2 --data=DIR\n" in out
    code, out, _ = told(capsys, tmp_path / "alone", "--licence", "CC0 *1.0*", "--run", run)
    assert code == 0 and r"licence of the data: CC0 \*1.0\*" in out and "WER on the test's 4 utterances: 0.375" in out
    assert "the dense float32 checkpoint" in out and "without its rewind state" not in out


def test_a_ledger_of_another_ticket_is_refused(tmp_path, capsys):
    run = save_run(tmp_path / "run")
    other = save_run(tmp_path / "other", more={"seed": 1})
    file = files.load_ticket(run)
    file.trained["output.bias"].add_(1)
    files.save_ticket(tmp_path / "changed", file.masks, None, file.trained, file.info)
    for argv, message in (
        ((tmp_path / "changed", "--run", run), f"{run}: no round of its ledger has this ticket's masks and weights"),
        ((run, "--run", other), f"{other}: its settings are not those that the ticket states: seed"),
        ((tmp_path / "gone",), f"{tmp_path}/gone: cannot read the ticket"),
        ((run, "--run", tmp_path / "none"), f"{tmp_path}/none: not a run folder: no config.json that can be read"),
    ):
        code, out, err = told(capsys, *argv)
        assert (code, out) == (2, "") and err.startswith("audio-lottery: error: ") and message in err, err
        assert err.count("\n") == 1


def test_a_run_without_a_test(tmp_path, capsys):
    out = told(capsys, save_run(tmp_path / "run", ("--sparsity", "0.2", "--no-test")))[1]
    assert "\n- WER: on valid 0.250; its run was not tested (--no-test)\n" in out and " --no-test --data=demo" in out


def test_foreign_texts_stay_text(tmp_path, capsys):
    folder = tmp_path / "<img src=x>`\x1b[2J"
    folder.mkdir()
    (folder / "COPYRIGHT").write_text("Files: *\nCopyright: me\nLicense: <script>*\x1b[2J\n")
    run = save_run(tmp_path / "run", machine={"data": str(folder)})
    out = told(capsys, run)[1]
    assert "trained on: \\<img src=x\\>\\`" in out and "\x1b" not in out
    assert "licence of the data: \\<script\\>\\*" in out
    file = files.load_ticket(run)
    for info in (
        {},
        {"backbone": "<b>"},
        {"sizes": [], "tokens": 3},
        {"tokens": [[1], None]},
        file.info | {"seed": "x"},
    ):
        files.save_ticket(tmp_path / "strange", file.masks, None, file.trained, info)
        code, out, _ = told(capsys, tmp_path / "strange")
        assert code == 0 and "# A ticket: a network that its info does not name, 80.0%" in out
        assert "The command that made it is not known here." in out and "trained on: not known here" in out


def test_where_the_package_is_installed_alone_the_settings_stand_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audio_lottery, "of_checkout", lambda *_: None)
    out = told(capsys, save_run(tmp_path / "run"))[1]
    assert "The command that made it is not known here: the repository's checkout makes it of these settings." in out
    assert json.loads(out.split("```json\n")[1].split("```")[0])["sparsity"] == 0.2


@pytest.mark.parametrize(
    "text, found",
    [
        ("Format: x\n\nFiles: *\nCopyright: a\n License: no\nLicense: CC0\n\nFiles: b\nLicense: GPL", "CC0"),
        ("Licence: A\ntext\nLicence: B\nLicence: A\n", "A, B"),
        ("\n\n  Do what you like.\nmore", "Do what you like."),
        ("\n", None),
    ],
)  # fmt: skip
def test_licences_by_hand(text, found, tmp_path):
    assert card.licence_in(tmp_path) is None
    (tmp_path / "COPYRIGHT").write_text(text)
    assert card.licence_in(tmp_path) == found


@pytest.mark.parametrize(
    "line",
    [
        "--backbone=rnnt", "--backbone=conformer --epochs=3 --seed=2", "--backbone=rnnt --size=wide --tokens=bpe:64",
        "--backbone=rnnt --block=8x1 --scope=global", "--backbone=rnnt --block=8x1 --scope=lamp",
        "--backbone=cnn-lstm --recipe=an4", "--backbone=rnnt --beam=4", "--backbone=rnnt --no-test",
    ],
)  # fmt: skip
def test_the_shortest_command_gives_the_configuration_again(line):
    config = flags.configuration(flags.parse(line.split()))
    short = flags.shortest(config)
    again = flags.configuration(flags.parse(short))
    assert again == config and len(short) <= len(line.split()) and set(short) <= {*line.split(), "--scope=lamp"}
