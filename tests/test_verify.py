"""verify finds whatever the files alone contradict: forged runs, every hash of them right (tests/lies.py)."""

import json
import random
import re
import subprocess

import lies
import pytest
import soak
import torch

import lottery
import models
import train
from audio_lottery import __main__ as command
from audio_lottery import files, ledger, verdicts, verify
from lab import networks

NAMES = [name for name, _ in verify.CHECKS]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One tiny search of two rounds, by networks of a few thousand weights."""
    folder = tmp_path_factory.mktemp("verify")
    with pytest.MonkeyPatch.context() as patch:
        soak.shrink_models(patch.setitem)
        argv = ["--data", soak.small_corpus(folder), "--backbone", "cnn-lstm", "--epochs", "2", "--sparsity", "0.36"]
        assert train.main([*map(str, argv), "--out", str(folder / "run")]) == 0
        yield folder / "run"


@pytest.fixture
def forged(finished, tmp_path):
    subprocess.run(["cp", "-r", finished, tmp_path / "run"], check=True)
    return lies.Forged(tmp_path / "run", random.Random(0))


def words(run):
    return [check.word for check in verify.verify(run, networks)]


def test_a_run_that_nobody_touched(finished, capsys, monkeypatch):
    assert words(finished) == ["ok"] * 10
    assert command.main(["verify", str(finished)]) == 0
    assert capsys.readouterr().out == "".join(f"ok        {name}\n" for name in NAMES)
    monkeypatch.setattr(command, "networks", lambda: None)  # the package alone, without lab/
    assert command.main(["verify", str(finished)]) == 0
    assert capsys.readouterr().out.splitlines()[6] == (
        f"not here  {NAMES[6]}: the networks' code (lab/networks.py), to compare tensors with sizes and tokens"
    )


def test_a_forger_who_changes_nothing_is_believed(forged):
    forged.save_ticket()
    forged.save()
    assert words(forged.run) == ["ok"] * 10


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", [kind for kind in lies.RUNS if kind != "no_end"])
def test_every_kind_of_lie_is_found(kind, seed, finished, tmp_path, monkeypatch):
    subprocess.run(["cp", "-r", finished, tmp_path / "run"], check=True)
    monkeypatch.setattr(verify, "verdict_of", told)
    lies.RUNS[kind](lies.Forged(tmp_path / "run", random.Random(seed)))
    found = words(tmp_path / "run")
    assert "FAILED" in found or (kind == "no_valid_wers_and_a_valid_wer_of_its_own" and "not here" in found)


VERDICTS = {}


def told(errors, dense, counts, margin):
    """verdicts.verdict_of, once for the same errors: it is the slow part."""
    key = str((errors, dense, counts, margin))
    VERDICTS[key] = VERDICTS.get(key) or verdicts.verdict_of(errors, dense, counts, margin)
    return VERDICTS[key]


def failed(forged, *, end=True):
    forged.save(end)
    return "; ".join(verify.failures(forged.run, networks))


def test_an_invented_count_of_unpruned_parameters(forged):
    file = forged.ticket()
    rest = sum(v.numel() for n, v in file.trained.items() if n not in file.masks and v.is_floating_point())
    rest -= sum(v.numel() for n, v in file.trained.items() if "running" in n)
    row = forged.rows[-1]
    assert row["remaining_all"] == (row["kept"] + rest) / (row["total"] + rest)  # the true one
    for row in forged.rows:
        row["remaining_all"] = (row["kept"] + rest + 1) / (row["total"] + rest + 1)
    assert "remaining_all is " in failed(forged) and "by the ticket's tensors" in failed(forged)


@pytest.mark.parametrize("key", ["seed", "sparsity", "data_sha256", "backbone", "size", "lr"])
def test_a_ticket_of_another_configuration(key, forged):
    info = forged.ticket().info | {key: {"seed": 5, "sparsity": 0.5, "lr": 1.0}.get(key, "x")}
    forged.save_ticket(info=info)
    assert failed(forged) == f"its info is not the configuration's: {key}"


def test_tokens_reversed_and_sizes_of_another_network(forged):
    info = forged.ticket().info
    forged.save_ticket(info=info | {"tokens": info["tokens"][::-1]})
    assert failed(forged) == "its tokens are not as --tokens chars makes them"
    forged.save_ticket(info=info | {"sizes": info["sizes"] | {"hidden": 9}})
    assert "the ticket's parameters are not its network's: " in failed(forged)
    forged.save_ticket(info=info | {"sizes": info["sizes"] | {"dropout": 0.75}})
    assert failed(forged) == "its sizes are not those of a cnn-lstm of demo size"


def test_trained_tensors_of_another_network(forged):
    trained, bias = forged.ticket().trained, "convs.0.bias"
    for changed in (
        {name: value for name, value in trained.items() if name != bias},
        trained | {"more": torch.zeros(1)},
        trained | {bias: trained[bias].double()},
    ):
        forged.save_ticket(trained=changed)
        assert "its trained tensors are not those of its rewind state" in failed(forged)


@pytest.mark.parametrize(
    "number, changes, message",
    [
        (1, {"test_cer": -3}, "line 2, test_cer: must be a number from 0 to 1e+06, got -3"),
        (1, {"test_cer": None}, "line 2, test_cer: must be a number from 0 to 1e+06, got None"),
        (1, {"seconds": "1.0"}, "line 2, seconds: must be a number"),
        (1, {"valid_wer": "x"}, "line 2, valid_wer: must be a number"),
        (2, {"test_errors": [-1, 2]}, "line 3, test_errors[0]: must be a whole number"),
        (2, {"test_errors": [0.5, 2]}, "line 3, test_errors[0]: must be a whole number"),
        (2, {"threshold": -1}, "line 3, threshold: must be a number from 0"),
        (0, {"threshold": 0.5}, "round 0: a threshold, where nothing was pruned"),
        (2, {"device": "abacus"}, "line 3, device: must be one of cpu, cuda, got 'abacus'"),
        (2, {"waited": 1e6}, "round 2: it waited longer than it took"),
        (2, {"note": "x"}, "round 2: has 'note', which nothing here writes"),
        (1, {"parent_sha256": lies.SHA}, "round 1: parent_sha256 is not the masks before"),
        (1, {"rewind_sha256": lies.SHA}, "round 1: another rewind state than round 0's"),
        (2, {"best_epoch": 99}, "round 2: its best epoch is behind the last one"),
    ],
)
def test_values_that_no_run_writes(number, changes, message, forged):
    forged.rows[number] |= changes
    assert message in failed(forged)


def test_weights_of_the_last_epoch_that_is_the_best(forged):
    row = forged.rows[1]
    row |= {"valid_wers": [1.0, 0.5], "valid_wer": 0.5, "best_epoch": 2, "last_sha256": lies.SHA}
    assert "round 1: the last epoch is the best, and the weights differ" in failed(forged)


def test_valid_wers_dropped(forged):
    row = forged.rows[1]
    del row["valid_wers"], row["losses"]
    row |= {"valid_wer": 0.001, "best_epoch": 1}
    assert "rounds [1] have no valid_wers, and others have" in failed(forged)
    for row in forged.rows:
        row.pop("valid_wers", None), row.pop("losses", None)
    assert "rounds [0, 1, 2] have no valid_wers" in failed(forged)
    forged.save(end=False)  # as a run of before
    assert words(forged.run)[2] == "not here"
    forged.rows[1]["best_epoch"] = 99
    assert "round 1: its best epoch is behind the last one" in failed(forged, end=False)


def test_an_unknown_backbone(forged):
    forged.config["backbone"] = "abacus"
    assert "backbone: must be one of cnn-lstm, rnnt, conformer, got 'abacus'" in failed(forged)


def test_masks_of_a_round_that_is_not_there(forged):
    masks = forged.run / "masks"
    (masks / "03.safetensors").write_bytes((masks / "02.safetensors").read_bytes())
    assert failed(forged) == "masks/03.safetensors is of no round of the ledger"


def test_the_report_is_the_one_that_the_run_ended_with(forged):
    report, picture = forged.run / "report.md", forged.run / "report.png"
    whole = report.read_bytes()
    report.write_bytes(whole.replace(b"winning", b"WINNING"))
    assert failed(forged) == "report.md is not what the run wrote"
    report.write_bytes(whole)
    picture.unlink()
    assert failed(forged) == "report.png is not there"
    forged.save(end=False)
    (check,) = [check for check in verify.verify(forged.run, networks) if check.word != "ok"]
    assert check.missing == "the hashes of report.md and report.png, which runs of before do not keep"
    assert command.main(["verify", str(forged.run)]) == 0


def test_a_ticket_keeps_its_rewind_state(forged):
    forged.save_ticket(rewind=None)
    assert failed(forged) == "it has no rewind state, which a run keeps"


def test_a_folder_without_masks_and_tickets(forged, capsys):
    for path in (*forged.run.glob("*.safetensors"), *forged.run.glob("report.*"), *(forged.run / "masks").iterdir()):
        path.unlink()
    (forged.run / "masks").rmdir()
    assert verify.verify(forged.run, networks)[-1].missing == "report.md and report.png"  # which are left out, too
    (forged.run / "report.md").write_bytes(b"another")
    assert verify.verify(forged.run, networks)[-1].wrong == "report.md is not what the run wrote"
    (forged.run / "report.md").unlink()
    forged.save(end=False)
    assert command.main(["verify", str(forged.run)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[:10].strip() for line in said] == ["ok"] * 3 + ["not here"] * 4 + ["ok"] * 2 + ["not here"]
    assert said[3] == f"not here  {NAMES[3]}: masks, rewind state and ticket"
    forged.rows.pop()
    forged.save(end=False)
    assert words(forged.run)[0] == "not here"  # a run that is not finished, as one under results/
    forged.rows[0]["test_wer"] = 0.5
    forged.save(end=False)
    assert command.main(["verify", str(forged.run)]) == 1
    assert "FAILED    rates, " in capsys.readouterr().out


def test_a_run_that_ends_tells_its_report(forged):
    end = json.loads((forged.run / "ledger.jsonl").read_bytes().splitlines()[-1])
    assert end == {
        "end": {name: ledger.file_hash(forged.run / name) for name in verify.REPORTS},
        "previous": ledger.row_hash(forged.rows[-1]),
    }
    assert [row["round"] for row in ledger.read_ledger(forged.run / "ledger.jsonl")] == [0, 1, 2]


def test_texts_of_before_and_of_a_stranger(forged, monkeypatch):
    lines = [json.loads(line) for line in (forged.run / "test.jsonl").read_text().splitlines()]
    last = max(line["round"] for line in lines)
    for line in lines:
        if line["round"] == last and line["id"] == 0:
            line["reference"] = " ".join("x" * len(word) for word in line["reference"].split())
    (forged.run / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert any("utterance 0 has another reference in round" in wrong for wrong in verify.failures(forged.run, networks))
    monkeypatch.setattr(verify, "STEPS", 3)
    assert any("texts too long to be compared" in wrong for wrong in verify.failures(forged.run, networks))


def test_tests_in_noise_are_the_configuration_s():
    noisy = {"test at 10 dB": {}, "test at 5 dB": {}}
    verify.check_noise(noisy, [10.0, 5.0], "round 1: ")
    verify.check_noise({"other": {}, **noisy, "other at 10 dB": {}, "other at 5 dB": {}}, [10.0, 5.0], "round 1: ")
    for others, ratios in ((noisy, [10.0]), ({"test at 10 dB": {}}, [10.0, 5.0]), ({}, [5.0]), (noisy, ())):
        with pytest.raises(lottery.LotteryError, match="round 1: its tests in noise are not the configuration's"):
            verify.check_noise(others, ratios, "round 1: ")


def test_a_test_text_without_words_is_no_forgery():
    """A corpus' test keeps a text of which normalisation leaves nothing: any word that is heard there is an error."""
    row = {"test_errors": [1, 1], "test_words": [0, 3], "test_wer": 2 / 3, "test_cer": 0.2}
    verify.check_test(row, row, "round 1: ")
    with pytest.raises(lottery.LotteryError, match="round 1: other test utterances than round 0's"):
        verify.check_test(row, row | {"test_words": [1, 2]}, "round 1: ")


def test_the_words_of_settings_are_those_of_the_code():
    assert ledger.BACKBONES == tuple(models.BACKBONES) and set(ledger.SIZES) == set(models.CnnLstm.SIZES)


@pytest.mark.parametrize(
    "run",
    [
        "prompts/imp-cnn-lstm-0", "prompts/lamp-rnnt-2", "queen/queen4-conf-1", "prompts/dense-small-conf48-lamp-0",
        "prompts/demo-rnnt-0", "prompts/demo-cnn-lstm-0",
    ],
)  # fmt: skip
def test_old_ledgers_are_not_found_wrong(run):
    folder = train.Path(train.__file__).parent / "results" / run
    found = verify.verify(folder, networks)
    assert not [check for check in found if check.wrong]
    verdict = "ok" if run == "queen/queen4-conf-1" else "not here"  # of one round; or of an older rule
    assert [check.word for check in found[3:]] == [*["not here"] * 4, verdict, *["not here"] * 2]


def test_a_folder_of_no_run_and_a_damaged_config(forged, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert command.main(["verify", str(tmp_path / "empty")]) == 2
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1
    assert said.err.endswith("empty: not a run folder: no config.json and no ledger.jsonl\n")
    (forged.run / "config.json").write_text("{")
    assert command.main(["verify", str(forged.run)]) == 1
    (line,) = capsys.readouterr().out.splitlines()  # one, not one a check
    assert line.startswith("FAILED    config.json and ledger.jsonl are a run's: ")


def test_files_that_are_no_files(forged):
    for name in ("config.json", "ledger.jsonl", "ticket.safetensors", "rewind.safetensors", "masks/01.safetensors"):
        path = forged.run / name
        whole = path.read_bytes()
        path.unlink()
        path.symlink_to("/dev/zero")
        assert re.search(f"{re.escape(name)}: .*not a regular file", "; ".join(verify.failures(forged.run, networks)))
        path.unlink()
        path.write_bytes(lies.DEEPER)
        assert verify.failures(forged.run, networks)
        path.write_bytes(whole)
    assert files.load_ticket(forged.run / "ticket.safetensors")


@pytest.mark.slow
def test_every_run_under_results_is_verified():
    found = sorted(path.parent for path in (train.Path(train.__file__).parent / "results").rglob("config.json"))
    wrong = [(run.name, check) for run in found for check in verify.verify(run, networks) if check.word == "FAILED"]
    assert len(found) >= 178 and not wrong, wrong
