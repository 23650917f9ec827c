"""transcribe.py --score: counts, intervals, verdicts, and what cannot be scored."""

import io
import json
import math
from types import SimpleNamespace

import pytest
from test_transcribe import DEMO, SIZES, said, ticket

import data
import transcribe
from audio_lottery import verdicts
from lab import scoring


@pytest.fixture(scope="module")
def tickets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tickets")
    return {backbone: ticket(folder, backbone) for backbone in SIZES}


@pytest.fixture(scope="module")
def rows():
    """Three of the demo's test recordings, 2 to 4 s, by their full paths."""
    found = [json.loads(line) for line in (DEMO / "test.jsonl").read_text().splitlines()]
    return [row | {"audio_filepath": str(DEMO / row["audio_filepath"])} for row in found if 2 < row["duration"] < 4][:3]


def manifest(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------------------- from the command line


@pytest.mark.parametrize("backbone", ["cnn-lstm", "rnnt"])
def test_the_score_is_that_of_a_test(backbone, tickets, rows, tmp_path, capsys):
    """WER, CER and counts as train.py's, of the texts that transcribe.py prints."""
    told = manifest(tmp_path / "a.jsonl", [row | {"text": f"  {row['text']}\t"} for row in rows])
    code, texts, _ = said(capsys, tickets[backbone], told, "--dense")
    right = scoring.rates([row["text"] for row in rows], texts)
    by = tmp_path / "by.jsonl"
    code, out, err = said(capsys, tickets[backbone], told, "--dense", "--score", "--by-utterance", by)
    assert code == 0 and not err
    words, letters = sum(right["words"]), sum(len(row["text"]) for row in rows)
    assert out[0] == f"3 utterances, {words} words, {letters} characters; 95 % intervals over utterances"
    assert out[1].startswith(
        f"{tickets[backbone]}: the texts have characters that it cannot spell, counted as errors: "
    )
    assert "'l' x " in out[1] and "'a'" not in out[1]
    low, high = verdicts.interval(right["errors"], right["words"])
    assert out[2].startswith(
        f"{tickets[backbone]}: WER {right['wer']:.3f} [{low:.3f}, {high:.3f}], CER {right['cer']:.3f}"
    )
    kinds = {kind: sum(count[kind] for count in right["counts"]) for kind in right["counts"][0]}
    assert out[2].endswith("; " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())) and len(out) == 3
    found = lines_of(by)
    assert [(row["audio_filepath"], row["reference"], row["hypothesis"]) for row in found] == [
        (row["audio_filepath"], row["text"], text) for row, text in zip(rows, texts)
    ]
    assert [{kind: row[kind] for kind in kinds} for row in found] == right["counts"]
    assert [row["words"] for row in found] == right["words"]
    assert sum(row["character_errors"] for row in found) / letters == pytest.approx(right["cer"])


def test_against_another_ticket(tickets, rows, tmp_path, capsys):
    told, by = manifest(tmp_path / "a.jsonl", rows), tmp_path / "by.jsonl"
    argv = [tickets["rnnt"], told, "--dense", "--score", "--against"]
    code, out, _ = said(capsys, *argv, tickets["cnn-lstm"], "--by-utterance", by, "--alignments", "--margin", "100")
    rates = [float(line.split(": WER ")[1].split(" ")[0]) for line in out if ": WER " in line and "CER" in line]
    assert code == 0 and len(rates) == 2
    assert out[-1].startswith(f"{tickets['rnnt']} less {tickets['cnn-lstm']}: WER {rates[0] - rates[1]:+.3f}")
    found = lines_of(by)
    assert all(set(row["against"]) == {"hypothesis", *scoring.KINDS, "words", "character_errors", "characters"}
               for row in found)  # fmt: skip
    assert sum(line.startswith("  by the other") for line in out) >= 3 and "  reference" in out[1]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ticket.safetensors").write_bytes(tickets["rnnt"].read_bytes())
    code, out, _ = said(capsys, *argv, tmp_path / "run")
    assert code == 0 and ": WER +0.000, " in out[-1] and "[+0.000, +0.000], margin 0.01" in out[-1]


def test_a_broken_recording_is_left_out_aloud(tickets, rows, tmp_path, capsys):
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    gone = [{"audio_filepath": name, "text": "x", "offset": 0.5} for name in ("bad.wav", "gone.wav")]
    told, by = manifest(tmp_path / "a.jsonl", [gone[0], *rows, gone[1]]), tmp_path / "by.jsonl"
    code, whole, _ = said(capsys, tickets["rnnt"], manifest(tmp_path / "b.jsonl", rows), "--dense", "--score")
    code, out, err = said(capsys, tickets["rnnt"], told, "--dense", "--score", "--by-utterance", by)
    assert code == 1 and out == [
        "left out of the score: 2 of 5 recordings, which are broken (see stderr)", *whole,
    ]  # fmt: skip
    bad, missing = err.splitlines()
    assert f"{told}, line 1: {tmp_path / 'bad.wav'}" in bad and "line 5" in missing and "gone.wav" in missing
    found = lines_of(by)
    assert ["error" in row for row in found] == [True, False, False, False, True] and found[0]["offset"] == 0.5
    told = manifest(tmp_path / "c.jsonl", gone)
    code, out, _ = said(capsys, tickets["rnnt"], told, "--dense", "--score", "--against", tickets["rnnt"])
    assert (code, out[-1]) == (1, "nothing is left to score")


def test_a_manifest_on_stdin(tickets, rows, capsys, monkeypatch):
    content = "".join(json.dumps(row) + "\n" for row in rows[:1]).encode()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    code, out, _ = said(capsys, tickets["rnnt"], "-", "--dense", "--score")
    assert code == 0 and out[0].startswith("1 utterance, ") and out[0].endswith("no interval of one utterance")
    assert "[" not in out[-1].replace(str(tickets["rnnt"]), "")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["x.wav", "--score"], "--score needs texts to compare with: manifests (.jsonl, .json) or -, got x.wav"),
        (["{folder}", "--score"], "--score needs texts to compare with: manifests"),
        (["a.jsonl", "--score", "--json"], "--score prints no texts: it goes with no --format"),
        (["a.jsonl", "--score", "--names"], "--score prints no texts: it goes with no --names"),
        (["-", "--score", "--stream"], "--score prints no texts: it goes with no --stream"),
        (["a.jsonl", "--against", "x"], "--against goes with --score"),
        (["a.jsonl", "--by-utterance", "x"], "--by-utterance goes with --score"),
        (["a.jsonl", "--alignments"], "--alignments goes with --score"),
        (["a.jsonl", "--score", "--margin", "-1"], "--margin must be"),
        (["/no/a.jsonl", "--score"], "/no/a.jsonl: cannot read the manifest (No such file or directory)"),
        (["{folder}/empty.jsonl", "--score"], "empty.jsonl: the manifest is empty"),
        (["{folder}/no-text.jsonl", "--score"], "no-text.jsonl, line 2: 'text' must be a string, got None"),
        (["{folder}/blank.jsonl", "--score"], "blank.jsonl, line 1: the text is empty"),
        (["{folder}/half.jsonl", "--score"], "half.jsonl, line 1: the text has half a surrogate pair"),
        (["{folder}/good.jsonl", "--score", "--by-utterance", "/no/x.jsonl"], "/no/x.jsonl: no such folder: /no"),
        (["{folder}/good.jsonl", "--score", "--by-utterance", "{folder}/good.jsonl"], "is what is read: name another"),
        (["{folder}/good.jsonl", "--score", "--by-utterance", "{cnn-lstm}"], "is what is read: name another file"),
        (["{folder}/good.jsonl", "--score", "--by-utterance", "{folder}/a.wav"], "is what is read: name another file"),
        (
            [
                "{folder}/good.jsonl",
                "--score",
                "--by-utterance",
                "{folder}/b.wav",
                "--normalize",
                "running",
                "--calibrate",
                "{folder}/b.wav",
            ],
            "is what is read: name another file",
        ),
        (
            ["{folder}/good.jsonl", "--score", "--against", "dense"],
            "dense.safetensors: the run folder of a search has it",
        ),
        (["{folder}/good.jsonl", "--score", "--against", "/no"], "/no: cannot read the ticket"),
        (["{folder}/good.jsonl", "--score", "--against", "{rnnt}", "--beam", "2"], "--beam and --lm go with CTC"),
    ],
)
def test_what_cannot_be_scored_is_one_line(argv, message, tickets, tmp_path, capsys):
    row = {"audio_filepath": "a.wav", "text": "a"}
    for name in ("empty.jsonl", "a.wav", "b.wav"):
        (tmp_path / name).write_text("")
    manifest(tmp_path / "good.jsonl", [row])
    manifest(tmp_path / "no-text.jsonl", [row, {"audio_filepath": "a.wav"}])
    manifest(tmp_path / "blank.jsonl", [row | {"text": " \t"}])
    manifest(tmp_path / "half.jsonl", [row | {"text": "\ud800"}])
    before = tickets["cnn-lstm"].read_bytes()
    try:
        code = transcribe.main([a.format(folder=tmp_path, **tickets) for a in [str(tickets["cnn-lstm"]), *argv]])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2 and not captured.out and tickets["cnn-lstm"].read_bytes() == before
    assert captured.err.startswith("transcribe.py: error: ") and captured.err.count("\n") == 1
    assert message in captured.err


# ---------------------------------------------------------------------------- by hand


def system(name, texts, tokens="abcdefghijklmnopqrstuvwxyz "):
    return scoring.System(name, [data.BLANK, *tokens], lambda recordings: [texts[u.audio] for u in recordings])


def scored(capsys, references, *systems, **flags) -> tuple[int, list[str]]:
    args = SimpleNamespace(by_utterance=None, alignments=False, margin=0.01, **flags)
    heard = [data.Utterance(name, text) for name, text in references.items()]
    return scoring.score(args, heard, list(systems)), capsys.readouterr().out.splitlines()


def test_rates_and_a_verdict_by_hand(capsys):
    """50 utterances of two words; one system has the second wrong each time, the other nothing: intervals of no width,
    and of half the utterances, 0.25 +- 1.96 * 0.25 / sqrt(50)."""
    references = {i: "aa bb" for i in range(50)}
    half, right = system("half", dict.fromkeys(range(50), "aa b")), system("right", references)
    code, out = scored(capsys, references, half, right)
    assert code == 0 and out == [
        "50 utterances, 100 words, 250 characters; 95 % intervals over utterances",
        "half: WER 0.500 [0.500, 0.500], CER 0.200 [0.200, 0.200]; 50 substitutions, 0 deletions, 0 insertions",
        "right: WER 0.000 [0.000, 0.000], CER 0.000 [0.000, 0.000]; 0 substitutions, 0 deletions, 0 insertions",
        "half less right: WER +0.500, worse [+0.500, +0.500], margin 0.01",
    ]
    some = system("some", {i: "aa bb" if i % 2 else "aa" for i in range(50)})
    _, out = scored(capsys, references, some)
    low, high = map(float, out[1].split("[")[1].split("]")[0].split(", "))
    assert "WER 0.250 [" in out[1] and "0 substitutions, 25 deletions" in out[1]
    assert low == pytest.approx(0.25 - 1.96 * 0.25 / math.sqrt(50), abs=0.011) and high == pytest.approx(
        0.319, abs=0.011
    )
    mixed = system("mixed", {i: "aa" if i % 2 else "aa bb" for i in range(50)})
    assert ", undecided [" in (line := scored(capsys, references, some, mixed)[1][-1]) and ", power " in line


def test_what_recognises_nothing_is_beaten(capsys):
    references = {i: "aa bb" for i in range(9)}
    deaf, right = system("deaf", dict.fromkeys(range(9), "")), system("right", references)
    assert "right less deaf: WER -1.000, winning" in scored(capsys, references, right, deaf)[1][-1]
    assert "no verdict (neither recognises anything)" in scored(capsys, references, deaf, deaf)[1][-1]
    assert scored(capsys, {0: "aa"}, right, deaf)[1][-1] == "right less deaf: WER +0.000; no verdict of one utterance"


def test_a_recording_that_one_cannot_read_is_left_out_of_both(capsys):
    references, broken = {0: "a", 1: "b", 2: "c"}, data.DataError("broken")
    first, second = system("one", {0: "a", 1: broken, 2: "x"}), system("two", {0: "y", 2: broken})
    code, out = scored(capsys, references, first, second)
    assert code == 1 and out[0] == "left out of the score: 2 of 3 recordings, which are broken (see stderr)"
    assert out[1].startswith("1 utterance, 1 words") and "one: WER 0.000" in out[2] and "two: WER 1.000" in out[3]


def test_foreign_names_and_texts_are_safe(tmp_path, capsys):
    args = SimpleNamespace(by_utterance=tmp_path / "by.jsonl", alignments=True, margin=0.01)
    heard = [data.Utterance("x\x1b[2J\udcff", "a\x1b[2J ñ")]
    one = system("\x1b[2Jt", {heard[0].audio: "\u202ea"})
    assert scoring.score(args, heard, [one]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and "'ñ' x 1" in out
    text = (tmp_path / "by.jsonl").read_text(encoding="utf-8")
    assert "ñ" in text and "\x1b" not in text and json.loads(text)["reference"] == "a\x1b[2J ñ"
