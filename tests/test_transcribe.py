"""transcribe.py, export.py and size.py on tickets of small networks with random weights."""

import importlib.util
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import nn

import data
import lottery
import models
import transcribe
from audio_lottery import __main__ as audio_lottery
from audio_lottery import files, sound
from lab import networks, plan, streaming
from models import Emission
from runner import settings

DEMO = Path(transcribe.__file__).parent / "demo"
TOKENS = [data.BLANK, " ", *"abcdefghij"]
SIZES = {
    "cnn-lstm": dict(
        features="log-mel", channels=4, kernels=((5, 5), (5, 5)), strides=((4, 2), (4, 2)), hidden=16, layers=1,
        dropout=0.0,
    ),
    "rnnt": dict(window=12, channels=24, hidden=32, layers=2, predictor=16, joiner=16, dropout=0.0),
    "conformer": dict(channels=2, width=16, heads=2, blocks=1, kernel=5, dropout=0.0),
}  # fmt: skip


def ticket(folder, backbone, **info) -> Path:
    """A ticket of random weights, half of them pruned, that hears something in everything."""
    torch.manual_seed(1)
    model = models.BACKBONES[backbone](len(TOKENS), **SIZES[backbone])
    masks = {name: torch.rand_like(weight) < 0.5 for name, weight in lottery.prunable(model).items()}
    for name, weight in lottery.prunable(model).items():
        weight.data.mul_(4).masked_fill_(~masks[name], 0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 1.0  # the statistics of the next batch
    features = data.features_of(data.Utterance(DEMO / "audio" / "conf-getpin.opus", ""), model.features)[0]
    with torch.no_grad():
        model.train().loss(features[None], torch.tensor([len(features)]), torch.tensor([[1]]), torch.tensor([1]))
    info = {"backbone": backbone, "sizes": SIZES[backbone], "tokens": TOKENS, "features": model.features} | info
    files.save_ticket(folder / f"{backbone}.safetensors", masks, None, model.state_dict(), info)
    return folder / f"{backbone}.safetensors"


@pytest.fixture(scope="module")
def tickets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tickets")
    return {backbone: ticket(folder, backbone) for backbone in SIZES}


@pytest.fixture(scope="module")
def speech():
    """Three of the demo's recordings, 2 to 4 s."""
    rows = [json.loads(line) for line in (DEMO / "test.jsonl").read_text().splitlines()]
    return [DEMO / row["audio_filepath"] for row in rows if 2 < row["duration"] < 4][:3]


def said(capsys, *argv) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout, stderr."""
    code = transcribe.main([str(a) for a in argv])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


# ---------------------------------------------------------------------------- long recordings


def test_ctc_emissions_by_hand():
    best = torch.tensor([[0, 3, 3, 0, 3, 2, 9], [5, 5, 0, 0, 0, 0, 0]])
    log_probs = torch.full((2, 7, 10), 0.01).scatter(2, best[:, :, None], 0.5).log()
    log_probs[0, 2, 3] = torch.tensor(0.75).log()
    found = models.ctc_emissions(log_probs, torch.tensor([6, 2]))
    half = pytest.approx(0.5)
    assert found[0] == [(3, 1, 3, pytest.approx(0.75)), (3, 4, 5, half), (2, 5, 6, half)]
    assert found[1] == [(5, 0, 2, half)]


TONES = {"a": 500, "b": 1000, "c": 2000, "d": 4000}


def spoken(text: str) -> np.ndarray:
    """A letter is 0.1 s of a tone with 0.1 s of silence behind it, a space 0.3 s of silence."""
    t = np.arange(1600) / 16_000
    parts = [np.zeros(4800) if c == " " else np.r_[np.sin(2 * np.pi * TONES[c] * t), np.zeros(1600)] for c in text]
    return np.concatenate(parts).astype(np.float32)


def hears_tones(recogniser):
    """Make a recogniser write down the loudest of TONES in each 40 ms."""
    tones = [data.log_mel(torch.from_numpy(spoken(c)))[4].argmax().item() for c in TONES]

    def emissions(features, lengths):
        loudest = features[:, ::4, tones].max(-1)
        best = torch.where(loudest.values > 0, loudest.indices + 2, 0)  # "a" is token 2
        log_probs = torch.full((*best.shape, 6), 1e-3).scatter(2, best[:, :, None], 0.9).log()
        found = models.ctc_emissions(log_probs, (lengths - 1) // 4 + 1)
        for row in found:  # a pause of 0.2 s and more is a space
            for before, now in list(itertools.pairwise(row)):
                if now.start - before.end >= 5:
                    row.insert(row.index(now), Emission(1, now.start - 1, now.start, 1.0))
        return found

    recogniser.features, recogniser.ready = lambda w, _: data.log_mel(w), True
    recogniser.emissions = emissions


@pytest.mark.parametrize("piece, overlap", [(4, 1.6), (5.3, 2), (7, 3.1), (100, 4)])
def test_no_word_of_a_long_file_is_lost_or_doubled(piece, overlap, tickets, tmp_path):
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcd"), rng.integers(1, 4))) for _ in range(70)]  # often the same word twice
    recording = np.concatenate([spoken(f" {text}") for text in texts])
    soundfile.write(tmp_path / "long.wav", recording, 16_000)
    recogniser = transcribe.Recogniser(
        transcribe.parse([str(tickets["conformer"]), "x", "--piece", str(piece), "--overlap", str(overlap)])
    )
    hears_tones(recogniser)
    (found,) = transcribe.transcripts(recogniser, [data.Utterance(tmp_path / "long.wav", "")])
    assert [word.word for word in found.words] == texts
    at = 0.0
    for text, word in zip(texts, found.words):
        assert word.start == pytest.approx(at + 0.3, abs=0.05)
        at += 0.3 + 0.2 * len(text)
        assert word.end == pytest.approx(at - 0.1, abs=0.05)
    assert found.seconds == pytest.approx(at)


def test_tokens_without_a_space_are_told_of_at_a_seam(tickets, tmp_path, capsys):
    soundfile.write(tmp_path / "long.wav", np.concatenate([spoken("abcd")] * 20), 16_000)
    file = files.load_ticket(tickets["conformer"])
    tokens = [data.BLANK, *"kabcdefghij"]
    files.save_ticket(tmp_path / "chinese", file.masks, None, file.trained, file.info | {"tokens": tokens})
    argv = [str(tmp_path / "chinese"), str(tmp_path / "long.wav"), "--dense", "--piece"]
    assert transcribe.main([*argv, "100"]) == 0 and "no space" not in capsys.readouterr().err
    assert transcribe.main([*argv, "5"]) == 0
    assert capsys.readouterr().err.count("what two pieces share comes twice") == 1


# ---------------------------------------------------------------------------- the command line


def test_formats_folders_and_broken_files(tickets, speech, tmp_path, capsys):
    waveform = sound.load_audio(speech[0]).numpy()
    (tmp_path / "more" / "below").mkdir(parents=True)
    names = ["a.flac", "more/b.mp3", "more/below/c.ogg", "d.wav"]
    for name, rate in zip(names, (44_100, 11_025, 48_000, 8_000)):
        stereo = np.stack([waveform, waveform], 1)[: rate * 2]
        soundfile.write(tmp_path / name, stereo, rate)
    (tmp_path / "more" / "notes.txt").write_text("not audio")
    (tmp_path / "broken.wav").write_bytes(b"RIFF" + bytes(99))
    argv = (tickets["cnn-lstm"], tmp_path / "a.flac", tmp_path / "more", tmp_path / "broken.wav", tmp_path / "d.wav")
    code, lines, err = said(capsys, *argv, tmp_path / "gone.wav", "--dense")
    assert code == 1 and len(lines) == 6
    assert lines[3] == lines[5] == "" and all(lines[i] for i in (0, 1, 2, 4))
    assert f"{tmp_path}/broken.wav: cannot decode the audio" in err and f"{tmp_path}/gone.wav: cannot decode" in err
    assert "seconds of audio a second; 2 of 6 files failed" in err

    code, lines, err = said(capsys, *argv, "--dense", "--json")
    rows = [json.loads(line) for line in lines]
    assert [Path(row["audio_filepath"]).name for row in rows] == ["a.flac", "b.mp3", "c.ogg", "broken.wav", "d.wav"]
    assert "cannot decode" in rows[3]["error"] and "words" not in rows[3]
    row = rows[0]
    assert row["duration"] == pytest.approx(len(waveform) / 44_100, abs=1e-3)
    assert row["text"] == " ".join(word["word"] for word in row["words"])
    assert row["confidence"] == pytest.approx(sum(w["confidence"] for w in row["words"]) / len(row["words"]), abs=1e-3)
    assert all(0 <= w["start"] < w["end"] <= row["duration"] + 0.04 and 0 < w["confidence"] <= 1 for w in row["words"])


def memory() -> int:
    """Bytes of this process that no file backs."""
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


@pytest.fixture(scope="module")
def lasting(tmp_path_factory):
    """Of 30 s and of 1,200 s, two channels at 32 kHz: 307 MB as floats, 77 MB of them mono at 16 kHz."""
    folder = tmp_path_factory.mktemp("lasting")
    for seconds in (30, 1200):
        with soundfile.SoundFile(folder / f"{seconds}.flac", "w", 32_000, 2) as file:
            for second in range(seconds):
                file.write(np.random.default_rng(second % 7).integers(-99, 99, (32_000, 2), np.int16))
    return folder


@pytest.mark.parametrize("flags", [(), ("--normalize", "running"), ("--calibrate", "{long}", "--stream")])
def test_memory_does_not_grow_with_the_recording(flags, tickets, lasting, monkeypatch):
    seen, log_mel = [], data.log_mel

    def watched(*about):
        seen.append(memory())
        return [[Emission(2, 0, 1, 0.5)] for _ in about[-1]] if torch.is_tensor(about[-1]) else []

    def featured(waveform):
        seen.append(memory())
        return log_mel(waveform)

    def most(path, seconds) -> int:
        """Bytes at most while it is transcribed, and calibrated on."""
        seen.clear()
        given = [flag.format(long=path) for flag in flags]
        given += [] if "--stream" in flags else ["--piece", "4", "--overlap", "0.5"]
        args = transcribe.parse([str(tickets["rnnt"]), "x", "--dense", *given])
        recogniser = transcribe.Recogniser(args)
        recogniser.emissions, recogniser.ready = watched, True
        recordings = [data.Utterance(path, "")]
        streamed = args.stream and transcribe.streamed(recogniser, recordings, [])
        (transcript,) = streamed or transcribe.transcripts(recogniser, recordings)
        assert transcript.seconds == pytest.approx(seconds) and not transcript.error
        return max(seen)

    monkeypatch.setattr(sound, "BLOCK", 2**17)  # numbers that are decoded at once, at most
    monkeypatch.setitem(data.FEATURES, "log-mel", featured)
    monkeypatch.setattr(streaming.Stream, "push", watched)
    short, long = (most(lasting / f"{seconds}.flac", seconds) for seconds in (30, 1200))
    assert long - short < 3.5e7  # of 77 MB of samples and 38 of features; huge pages (THP) may add some


def test_running_out_of_memory_on_one_file_names_it_and_goes_on(tickets, speech, tmp_path, capsys, monkeypatch):
    """At decoding, at its features, at recognising: the others of its batch are recognised one by one."""
    clean = said(capsys, tickets["cnn-lstm"], *speech, "--dense")[1]
    blocks, stft, loss = sound.audio_blocks, data.log_mel, models.CnnLstm.emissions
    seconds = [soundfile.info(path).frames for path in speech]

    def no_memory(*_):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    def decoding(path, *about):
        return blocks(path, *about) if path != speech[1] else map(no_memory, [0])

    def features(waveform):
        return no_memory() if len(waveform) == len(sound.load_audio(speech[1])) else stft(waveform)

    def recognising(model, padded, lengths):
        if 1 + len(sound.load_audio(speech[1])) // 160 in lengths.tolist():
            raise MemoryError
        return loss(model, padded, lengths)

    assert len(set(seconds)) == 3
    for place, name, broken in (
        (sound, "audio_blocks", decoding), (data.FEATURES, "log-mel", features),
        (models.CnnLstm, "emissions", recognising),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            (patched.setitem if isinstance(place, dict) else patched.setattr)(place, name, broken)
            code, lines, err = said(capsys, tickets["cnn-lstm"], *speech, "--dense")
        assert code == 1 and lines == [clean[0], "", clean[2]]
        assert f"transcribe.py: {speech[1]}: too large for the memory that is left\n" in err and err.count("\n") == 2


def test_names_and_tokens_that_no_terminal_should_see(tickets, speech, tmp_path, capfd):
    """A name that is no UTF-8, one of half a surrogate pair, controls in names and in tokens; later lines go on."""
    file = files.load_ticket(tickets["conformer"])
    tokens = [data.BLANK, " ", "\x1b]0;owned\x07", "\u202d", "\u202e", "\x9b2J", *"efghij"]
    files.save_ticket(tmp_path / "evil", file.masks, None, file.trained, file.info | {"tokens": tokens})
    audio = tmp_path / os.fsdecode(b"\xff.opus")
    audio.write_bytes(speech[0].read_bytes())
    turned = tmp_path / "a\n\x1b[2J\u202eb\tc.opus"
    turned.write_bytes(speech[1].read_bytes())
    rows = [{"audio_filepath": "\ud800.wav"}, {"audio_filepath": turned.name}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    argv = [str(tmp_path / "evil"), str(audio), str(tmp_path / "list.jsonl"), str(speech[2]), "--dense"]
    for form in ("--json", "--names"):
        assert transcribe.main([*argv, form]) == 1
        captured = capfd.readouterr()
        lines = captured.out.split("\n")[:-1]
        assert len(lines) == 4 and captured.out.encode()
        assert not set(captured.out + captured.err) & set("\x1b\x07\x9b\u202e")
        assert "\\ud800.wav: cannot decode the audio" in captured.err
        if form == "--json":
            found = [json.loads(line) for line in lines]
            assert os.fsencode(found[0]["audio_filepath"]) == os.fsencode(audio)
            assert [row["audio_filepath"] for row in found[1:]] == [
                str(tmp_path / "\ud800.wav"), str(turned), str(speech[2]),
            ]  # fmt: skip
            assert "error" in found[1] and all(set(found[i]["text"]) & set("".join(tokens[2:6])) for i in (0, 2, 3))
        else:
            names, texts = zip(*(line.split("\t") for line in lines))
            assert names[0].endswith("\\xff.opus") and names[2].endswith("a\\n\\x1b[2J\\u202eb\\tc.opus")
            assert texts[1] == "" and all(texts[i] for i in (0, 2, 3))


def test_streamed_text_is_safe_too(tickets, speech, tmp_path, capfd):
    file = files.load_ticket(tickets["rnnt"])
    tokens = [data.BLANK, " ", "\x1b]0;owned\x07", "\u202d", "\u202e", *"defghij"]
    files.save_ticket(tmp_path / "evil", file.masks, None, file.trained, file.info | {"tokens": tokens})
    assert transcribe.main([str(tmp_path / "evil"), *map(str, speech), "--dense", "--stream", "--names"]) == 0
    out = capfd.readouterr().out
    assert not set(out) & set("\x1b\x07\u202e") and out.count("\n") == 3 and "\\x1b]0;owned\\x07" in out
    assert [line.split("\t")[0] for line in out.splitlines()] == list(map(str, speech))


def test_a_speller_says_what_decode_says_of_all():
    tokens, rng = [data.BLANK, " ", "▁the", "▁", "n", " o ", "\n"], np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(1, len(tokens), rng.integers(0, 9)).tolist()
        speller = transcribe.Speller(tokens)
        parts = [speller.push([Emission(token, 0, 1, 1.0) for token in ids[i : i + 2]]) for i in range(0, len(ids), 2)]
        assert "".join(parts) == data.decode(ids, tokens)


@pytest.mark.parametrize("backbone", list(SIZES))
def test_batches_of_recordings_are_transcribed_as_in_the_test(backbone, tickets, speech, capsys):
    code, lines, err = said(capsys, tickets[backbone], *speech, "--dense")
    model, file = transcribe.load(tickets[backbone])
    utterances = [data.Utterance(path, "") for path in speech]
    alone = [data.features_of(utterance, model.features)[0] for utterance in utterances]
    ids = [model.transcribe(f[None], torch.tensor([len(f)]))[0] for f in alone]
    assert code == 0 and lines == [data.decode(i, TOKENS) for i in ids] and all(lines) and len(set(lines)) == 3


@pytest.mark.parametrize("backbone", list(SIZES))
def test_files_taken_together_have_the_texts_and_times_of_files_alone(backbone, tickets, tmp_path, capsys):
    """Cut into pieces, a broken one among them, whatever the batch; in the order given."""
    rows = [json.loads(line) for line in (DEMO / "test.jsonl").read_text().splitlines()][:24]
    paths = [DEMO / row["audio_filepath"] for row in rows]
    (tmp_path / "broken.wav").write_bytes(b"RIFF" + bytes(99))
    argv = [tickets[backbone], *paths[:5], tmp_path / "broken.wav", *paths[5:], "--dense", "--json"]
    argv += ["--piece", "2", "--overlap", "0.4"]
    told = []
    for batch in (1, 3, 16, 1024):
        code, lines, err = said(capsys, *argv, "--batch", batch)
        told.append([json.loads(line) for line in lines])
        assert code == 1 and err.count("broken.wav: cannot decode") == 1 and "1 of 25 files failed" in err
    alone = told[0]
    names = [*paths[:5], tmp_path / "broken.wav", *paths[5:]]
    assert [row["audio_filepath"] for row in alone] == list(map(str, names)) and "error" in alone[5]
    assert len({row.get("text") for row in alone}) > 20
    timeless = [[row | {"confidence": 0, "words": []} for row in rows] for rows in told]
    assert timeless[1:] == timeless[:1] * 3
    for rows in told[1:]:
        for row, other in zip(rows, alone):
            assert [w["word"] for w in row.get("words", [])] == [w["word"] for w in other.get("words", [])]
            for key in ("start", "end", "confidence"):
                theirs = [w[key] for w in other.get("words", [])]
                assert [w[key] for w in row.get("words", [])] == pytest.approx(theirs, abs=2e-3)


def piece(seconds: float) -> transcribe.Piece:
    return transcribe.Piece(None, 0, 0.0, seconds, torch.empty(round(100 * seconds), 1))


def test_batches_by_hand():
    def lengths(*seconds, most):
        return [[p.end for p in batch] for batch in transcribe.batches_of(list(map(piece, seconds)), most)]

    assert lengths(most=4) == []
    assert lengths(3, 9, 2, 8, 4, most=1) == [[3], [9], [2], [8], [4]]  # in the order they came
    assert lengths(3, 9, 2, 8, 5, most=2) == [[5, 3], [9, 8], [2]]  # first what the first one is in
    assert lengths(3, 9, 2, 8, 4, most=8) == [[4, 3, 2], [9, 8]]  # 4 is less than half of 9
    assert lengths(20, 20, 20, 20, 20, 20, 20, 20, 20, most=16) == [[20] * 8, [20]]  # 160 s
    assert lengths(50, 100, 50, 200, most=16) == [[50, 50], [100], [200]]  # 2 * 100 s are too many, one alone is not


def test_a_window_is_read_ahead_and_no_more(tickets):
    """Seconds that are held when something is recognised, and what is told before more is read."""
    recogniser = transcribe.Recogniser(transcribe.parse([str(tickets["conformer"]), "x", "--batch", "4"]))
    lengths, order = [3, 19, 2, 18, 4, 17, 300, 6, 5], []

    def pieces(recording):
        order.append(f"read {recording.audio}")
        yield 0, 16_000 * int(str(recording.audio)), torch.empty(100 * int(str(recording.audio)), 80)

    def recognise(features):
        order.append([len(f) // 100 for f in features])
        return [[Emission(2, 0, 1, 0.5)]] * len(features)

    recogniser.pieces, recogniser.recognise = pieces, recognise
    for transcript in transcribe.transcripts(recogniser, [data.Utterance(Path(str(n)), "") for n in lengths]):
        order.append(f"told {transcript.source.audio}")
    assert order == [
        *(f"read {n}" for n in (3, 19, 2, 18, 4, 17, 300)), [4, 3, 2], "told 3",
        [19, 18, 17], *(f"told {n}" for n in (19, 2, 18, 4, 17)), [300], "told 300",
        "read 6", "read 5", [6, 5], "told 6", "told 5",
    ]  # fmt: skip


def test_batches_go_with_beams_subtitles_and_scores(tickets, speech, tmp_path, capsys):
    """And with --normalize running and sparse products."""
    (tmp_path / "ref.jsonl").write_text(
        "\n".join(json.dumps({"audio_filepath": str(path), "text": "a b"}) for path in speech)
    )
    unigrams = "-9\t<s>\t0\n-1\t</s>\n-1\tabc\t0\n-1\tde\t0"
    arpa = f"\\data\\\nngram 1=4\nngram 2=1\n\n\\1-grams:\n{unigrams}\n\n\\2-grams:\n-1\tabc de\n\n\\end\\\n"
    (tmp_path / "lm.arpa").write_text(arpa)
    ways = [(), ("--normalize", "running"), ("--score",), ("--format", "vtt", "--out", tmp_path), ("--measure",)]
    if importlib.util.find_spec("flashlight"):
        ways += [("--beam", "4"), ("--beam", "4", "--lm", tmp_path / "lm.arpa")]
    for flags in ways:
        audio = [tmp_path / "ref.jsonl"] if "--score" in flags else speech
        found = []
        for batch in (1, 16):
            dense = [] if "--measure" in flags else ["--dense"]
            code, lines, _ = said(capsys, tickets["conformer"], *audio, *dense, *flags, "--batch", batch)
            found.append((code, lines, [path.read_text() for path in sorted(tmp_path.glob("*.vtt"))]))
        assert found[0] == found[1] and found[0][0] == 0 and found[0][1], flags
    assert len(found[0][2]) == 3


def test_a_manifest_on_stdin(tickets, speech, capsys, monkeypatch):
    def give(*rows):
        content = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))

    monkeypatch.chdir(DEMO)
    here = str(speech[0].relative_to(DEMO))
    give({"audio_filepath": here}, {"audio_filepath": here, "offset": 0.5, "duration": 1.25}, {"audio_filepath": "no"})
    code, lines, err = said(capsys, tickets["rnnt"], "-", "--dense", "--json")
    rows = [json.loads(line) for line in lines]
    assert code == 1 and "no: cannot decode" in err and rows[2]["audio_filepath"] == "no"
    assert rows[1]["duration"] == 1.25 < rows[0]["duration"] and rows[1]["offset"] == 0.5
    for row, message in (("{oops", "stdin, line 1: not a JSON object"), ("", "stdin: the manifest is empty")):
        give(row)
        code, lines, err = said(capsys, tickets["rnnt"], "-")
        assert (code, lines) == (2, []) and err.startswith(f"transcribe.py: error: {message}") and err.count("\n") == 1


def test_a_manifest_by_its_name(tickets, speech, tmp_path, capsys, monkeypatch):
    """Its texts may be there or not; its paths are relative to it, wherever the command is given."""
    (tmp_path / "audio").mkdir()
    (tmp_path / "audio" / "a.opus").write_bytes(speech[0].read_bytes())
    rows = [
        {"audio_filepath": "audio/a.opus", "text": "x"}, {"audio_filepath": str(speech[1])},
        {"audio_filepath": "audio/a.opus", "offset": 0.5, "duration": 1},
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path.parent)
    expected = said(capsys, tickets["rnnt"], speech[0], speech[1], "--dense")[1]
    for name in ("list.jsonl", "LIST.JSON"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        code, lines, _ = said(capsys, tickets["rnnt"], tmp_path / name, "--dense", "--names")
        names = tmp_path / "audio" / "a.opus", speech[1]
        assert code == 0 and lines[:2] == [f"{name}\t{text}" for name, text in zip(names, expected)]
        assert lines[2].startswith(f"{tmp_path}/audio/a.opus, 0.5 s to 1.5 s\t")
    code, lines, err = said(capsys, tickets["rnnt"], tmp_path / "gone.jsonl")
    assert (code, lines) == (2, []) and "gone.jsonl: cannot read the manifest (No such file or directory)" in err


def test_flags_between_ticket_and_audio(capsys):
    expected = transcribe.parse(["T", "a", "-", "b", "--dense", "--piece", "5"])
    assert (expected.ticket, expected.audio, expected.dense, expected.piece) == (Path("T"), ["a", "-", "b"], True, 5)
    for argv in ("T --dense --piece 5 a - b", "--dense T a --piece 5 - b", "--dense --piece=5 T a - b"):
        assert transcribe.parse(argv.split()) == expected
    with pytest.raises(SystemExit):
        transcribe.parse(["T", "--no-such-flag", "a"])
    assert "error: unrecognized arguments: --no-such-flag" in capsys.readouterr().err


def test_a_ticket_by_its_run_folder(tickets, speech, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ticket.safetensors").write_bytes(tickets["rnnt"].read_bytes())
    assert said(capsys, tmp_path / "run", speech[0], "--dense")[0] == 0
    told = []
    for main, argv in ((audio_lottery.main, ["size"]), (plan.main, [])):
        for name in (tickets["rnnt"], tmp_path / "run"):
            assert main([*argv, str(name)]) == 0
            told.append(capsys.readouterr().out)
    assert told[0] == told[1] and told[2] == told[3]
    model, file = transcribe.load(tmp_path / "run")
    other = networks.of(file.info, file.rewind or file.trained)
    settings.start_from(tmp_path / "run", other, TOKENS)
    assert lottery.sha256(other.state_dict()) == lottery.sha256(model.state_dict())
    assert "theta_0: the trained weights of" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert said(capsys, tmp_path / "empty", speech[0])[2].count("empty/ticket.safetensors: cannot read the ticket") == 1
    assert audio_lottery.main(["verify", str(tickets["rnnt"])]) == 2
    assert "rnnt.safetensors: is a file: verify wants the run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, message",
    [
        (["{rnnt}"], "give AUDIO (files, folders or -), or --export FILE.onnx without AUDIO"),
        (["{rnnt}", "x.wav", "--export", "y.onnx"], "give AUDIO (files, folders or -), or --export"),
        (["{rnnt}", "x.wav", "--dense", "--values", "int8"], "--values is of sparse weights, and --dense has none"),
        (["{rnnt}", "x.wav", "--overlap", "20"], "--overlap must be at least 0.1 seconds and --piece 0.1 seconds more"),
        (["{rnnt}", "x.wav", "--chunk", "0"], "--chunk must be at least 0.01 seconds and at most 60, got 0"),
        (["{rnnt}", "x.wav", "--chunk", "1e308"], "--chunk must be at least 0.01 seconds and at most 60, got 1e+308"),
        (["{rnnt}", "x.wav", "--chunk", "1e6"], "--chunk must be at least 0.01 seconds and at most 60, got 1e+06"),
        (["{rnnt}", "x.wav", "--piece", "1e308"], "--piece must be at most 3600 seconds, got 1e+308"),
        (["{rnnt}", "x.wav", "--chunk", "1"], "--chunk goes with --stream"),
        (["{rnnt}", "x.wav", "--stream", "--piece=9"], "--piece is of whole recordings: --stream takes --chunk"),
        (["{rnnt}", "x.wav", "--stream", "--overlap", "1"], "--overlap is of whole recordings: --stream takes --chunk"),
        (["{rnnt}", "x.wav", "--margin", "0.5"], "--margin goes with --against"),
        (["/nowhere", "--export", "/no/where.onnx"], "/no/where.onnx: no such folder: /no"),  # before the ticket
        (["/nowhere", "--export", "/dev/full"], "/dev/full: not a regular file: only those, and new names"),
        (["{rnnt}", "x.wav", "--calibrate", "y"], "--calibrate goes with --stream or --normalize running"),
        (["{rnnt}", "x.wav", "--word-score", "1"], "--lm-weight and --word-score need --lm"),
        (["{rnnt}", "x.wav", "--batch", "0"], "--batch must be at least 1 and at most 1024, got 0"),
        (["{rnnt}", "x.wav", "--batch", "4", "--stream"], "--batch is of whole recordings: --stream takes one"),
        (["{rnnt}", "x.wav", "--beam", "0"], "--beam must be at least 1"),
        (["{rnnt}", "x.wav", "--beam", "4"], "--beam and --lm go with CTC"),
        (["{rnnt}", "x.wav", "--stream", "--normalize", "utterance"], "--stream normalises with running statistics"),
        (["{cnn-lstm}", "x.wav", "--stream"], "--stream goes with a transducer (rnnt); this ticket is of cnn-lstm"),
        (["{rnnt}", "-", "x.wav", "--stream"], "--stream -: stdin is one endless recording"),
        (["x.wav", "{rnnt}"], "x.wav is no ticket, and {rnnt} is one: TICKET comes first, then AUDIO"),
        (["{rnnt}", ""], "an empty argument"),
        (["{rnnt}", "x.wav", "--names", "--json"], "--names is of lines of text"),
        (["{rnnt}", "x.wav", "--json", "--format", "srt"], "argument --format: not allowed with argument --json"),
        (["{rnnt}", "x.wav", "--format", "doc"], "argument --format: invalid choice: 'doc'"),
        (["{rnnt}", "x.wav", "--out", "."], "--out goes with --format srt and vtt"),
        (["{rnnt}", "x.wav", "y.wav", "--format", "srt"], "--format srt: 2 recordings are as many files: give --out"),
        (["{rnnt}", "x.wav", "--format", "vtt", "--out", "{rnnt}"], ": is a file, and wants a folder"),
        (["{rnnt}", "a/x.wav", "b/x.mp3", "--format", "ctm"], "--format ctm: b/x.mp3 and a/x.wav have one name there"),
        (["/nowhere", "--export", ".."], "--export ..: must name a file"),
        (["{rnnt}", "{empty}"], "no recording in it (by their endings: .aif"),
        (["/nowhere/at/all", "x.wav"], "/nowhere/at/all: cannot read the ticket (No such file or directory)"),
        (["{cut}", "x.wav"], "cut: not a whole ticket"),
        (["{other}", "x.wav"], "not a recogniser's ticket: its backbone, sizes or tokens do not fit"),
        (["{misfit}", "x.wav"], "the ticket's parameters are not its network's: "),
    ],
)
def test_what_cannot_be_is_one_line(argv, message, tickets, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut").write_bytes(tickets["rnnt"].read_bytes()[:-1])
    masks, _, trained, info, _ = files.load_ticket(tickets["rnnt"])
    files.save_ticket(tmp_path / "other", masks, None, trained, {})
    files.save_ticket(tmp_path / "misfit", masks, None, trained, info | {"sizes": SIZES["rnnt"] | {"joiner": 8}})
    places = {name: tmp_path / name for name in ("empty", "cut", "other", "misfit")} | tickets
    try:
        code = transcribe.main([a.format(**places) if "{" in a else a for a in argv])
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2 and not captured.out
    assert captured.err.startswith("transcribe.py: error: ") and captured.err.count("\n") == 1
    assert message.format(**places) in captured.err


@pytest.mark.skipif(importlib.util.find_spec("flashlight") is None, reason="flashlight-text is not installed")
def test_a_language_model_that_cannot_be_read_is_no_recording_s_fault(tickets, speech, capsys):
    """One line before any recording, not one a recording; so with --score, which would count them as broken."""
    code, out, err = said(capsys, tickets["cnn-lstm"], *speech, "--lm", __file__)
    assert (code, out) == (2, []) and err.startswith(f"transcribe.py: error: --lm {__file__}: not an ARPA file")
    assert err.count("\n") == 1


def test_an_interrupt_and_a_reader_that_left_are_quiet(tickets, speech, capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patched, os.fdopen(writer, "w") as left:
        patched.setattr(sys, "stdout", left)
        assert transcribe.main([str(tickets["rnnt"]), str(speech[0]), "--dense"]) == 141
    assert capsys.readouterr().err == ""

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "load_ticket", interrupted)
    assert said(capsys, tickets["rnnt"], speech[0]) == (130, [], "")


def test_beam_search_says_when(tickets, speech, capsys):
    pytest.importorskip("flashlight.lib.text")
    code, lines, _ = said(capsys, tickets["conformer"], speech[0], "--dense", "--json", "--beam", "4")
    row = json.loads(lines[0])
    starts = [word["start"] for word in row["words"]]
    assert code == 0 and starts == sorted(starts) and len(starts) > 1 and 0 <= starts[0] < starts[-1] < row["duration"]


# ---------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("samples", [1, 100, 255, 256, 257, 1601, 15_999, 16_000, 40_003])
@pytest.mark.parametrize("chunk", [97, 1000, 16_001])
def test_features_in_pieces_are_those_of_the_whole(samples, chunk):
    waveform = torch.randn(samples, generator=torch.Generator().manual_seed(0)) / 10
    whole = streaming.Running().push(data.log_mel(waveform), last=True)
    stream = streaming.FeatureStream()
    parts = [stream.push(part) for part in waveform.split(chunk)] + [stream.push(waveform[:0], last=True)]
    assert torch.cat(parts).shape == whole.shape == (1 + samples // 160, 80)
    torch.testing.assert_close(torch.cat(parts), whole, atol=2e-5, rtol=0)


def test_running_normalisation_by_hand():
    x = torch.full((150, 1), 1.0)
    x[:50], x[100:] = 3.0, 4.0
    found = streaming.Running().push(x, last=True)[:, 0]
    torch.testing.assert_close(found[:100], torch.tensor([1.0] * 50 + [-1.0] * 50))  # mean 2, deviation 1: one second
    # After 50 frames of 4: mean (50 * 3 + 50 * 1 + 50 * 4) / 150 = 8 / 3, variance 26 / 3 - 64 / 9 = 14 / 9.
    assert found[149].item() == pytest.approx((4 - 8 / 3) / (14 / 9) ** 0.5)
    running = streaming.Running()
    assert len(running.push(x[:99])) == 0 and len(running.push(x[99:101])) == 101  # nothing before the second is there
    assert len(streaming.Running().push(x[:7], last=True)) == 7
    moments = streaming.Running.moments([x[:50], x[100:]])  # 3 and 4, mean 3.5, mean square 12.5, as of 300 frames
    assert moments.tolist() == [[3.5], [12.5]]
    found = streaming.Running(moments).push(x[:2])[:, 0]  # at once: (1050 + 6) / 302, (3750 + 18) / 302
    assert found[1].item() == pytest.approx((3 - 1056 / 302) / (3768 / 302 - (1056 / 302) ** 2) ** 0.5)


@pytest.mark.parametrize("pieces", [1, 3, 8, 9, 31])
def test_emissions_in_pieces_are_those_of_the_whole(pieces, tickets):
    model, _ = transcribe.load(tickets["rnnt"])
    for frames in (1, 2, 12, 13, 61, 200):
        features = torch.randn(frames, 80, generator=torch.Generator().manual_seed(frames))
        with torch.inference_mode():
            (whole,) = model.emissions(features[None], torch.tensor([frames]))
            stream = streaming.Stream(model)
            found = [e for part in features.split(pieces) for e in stream.push(part)] + stream.push(features[:0], True)
        assert [e[:3] for e in found] == [e[:3] for e in whole]
        assert [e.probability for e in found] == pytest.approx([e.probability for e in whole], abs=1e-5)
    assert len({e.token for e in whole}) > 2 and len({e.start for e in whole}) > 5


def test_streams_have_the_text_of_the_whole(tickets, speech, capsys, tmp_path):
    _, offline, _ = said(capsys, tickets["rnnt"], *speech, "--dense", "--normalize", "running")
    _, as_json, _ = said(capsys, tickets["rnnt"], *speech, "--dense", "--normalize", "running", "--json")
    for chunk in ("0.0517", "0.3217", "60"):
        code, lines, err = said(capsys, tickets["rnnt"], *speech, "--dense", "--stream", "--chunk", chunk)
        assert code == 0 and lines == offline and all(lines)
        assert f"chunks of {float(chunk):g} s: " in err and " ms of compute in the median" in err
        assert "a frame of 80 ms is known 46 ms after its end" in err
    calibrated = ("--dense", "--calibrate", DEMO / "audio" / "added.opus")
    _, other, _ = said(capsys, tickets["rnnt"], *speech, *calibrated, "--normalize", "running")
    assert said(capsys, tickets["rnnt"], *speech, *calibrated, "--stream")[1] == other != offline
    soundfile.write(tmp_path / "loud.wav", np.full(8000, 1e30), 16_000, "FLOAT")
    code, lines, err = said(capsys, tickets["rnnt"], *speech, "--calibrate", tmp_path / "loud.wav", "--stream")
    assert (code, lines) == (2, []) and f"{tmp_path / 'loud.wav'}: its samples are too large" in err
    code, lines, err = said(capsys, tickets["rnnt"], *speech, "--dense", "--stream", "--json")
    assert code == 0 and [json.loads(a)["words"] for a in lines] == [json.loads(b)["words"] for b in as_json]


@pytest.mark.parametrize("when", ["waiting", "computing"])
def test_ctrl_c_ends_a_stream_of_stdin_with_what_was_said(when):
    class Microphone:
        given = 0

        def read1(self, size):
            if when == "waiting" and self.given == 250:
                os.kill(os.getpid(), signal.SIGINT)
            self.given += min(size, 50)
            return b"\1\0" * (min(size, 50) // 2)

    before, found = signal.getsignal(signal.SIGINT), []
    for chunk, last in streaming.pcm_chunks(Microphone(), 50):
        found.append((len(chunk), last))
        if when == "computing" and len(found) == 2:
            os.kill(os.getpid(), signal.SIGINT)
    assert found == [(50, False), (50, False), (25 if when == "waiting" else 0, True)]
    assert signal.getsignal(signal.SIGINT) is before


def test_raw_audio_on_stdin(tickets, speech, capsys, monkeypatch, tmp_path):
    pcm = (sound.load_audio(speech[0]) * 32767).round().short().numpy()
    soundfile.write(tmp_path / "same.wav", pcm, 16_000)
    _, offline, _ = said(capsys, tickets["rnnt"], tmp_path / "same.wav", "--dense", "--normalize", "running")
    for content in (pcm.tobytes(), pcm.tobytes() + b"\1"):  # half a sample at the end
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert said(capsys, tickets["rnnt"], "-", "--dense", "--stream")[:2] == (0, offline)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))
    assert said(capsys, tickets["rnnt"], "-", "--dense", "--stream")[:2] == (0, [""])


# ---------------------------------------------------------------------------- sparse


@pytest.mark.parametrize("backbone", list(SIZES))
def test_sparse_products_give_the_text_of_dense_ones(backbone, tickets, speech, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, dense, _ = said(capsys, tickets[backbone], *speech, "--dense")
    code, lines, err = said(capsys, tickets[backbone], *speech)
    assert code == 0 and lines == dense and err.startswith("dense products: ") and not list(tmp_path.iterdir())
    code, lines, err = said(capsys, tickets[backbone], *speech, "--measure")
    assert code == 0 and lines == dense and "sparse products for " in err and "; measured in " in err
    _, timed, err = said(capsys, tickets[backbone], *speech, "--json")
    assert "; as measured before\n" in err
    assert [json.loads(line)["text"] for line in timed] == dense


# ---------------------------------------------------------------------------- export and size


def onnx_session(path):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(path))
    about = session.get_modelmeta().custom_metadata_map
    assert json.loads(about["tokens"]) == TOKENS and about["features"] == "log-mel"
    return (lambda **inputs: session.run(None, {k: v.numpy() for k, v in inputs.items()})), about


def without_torch():
    """docs/onnx_transcribe.py, which imports no torch."""
    path = DEMO.parent / "docs" / "onnx_transcribe.py"
    spec = importlib.util.spec_from_file_location("onnx_transcribe", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_script_without_torch_is_short_and_without_torch():
    text = (DEMO.parent / "docs" / "onnx_transcribe.py").read_text()
    imports = [line.split()[1] for line in text.splitlines() if line.startswith(("import ", "from "))]
    assert text.count("\n") <= 100 and imports == ["sys", "pathlib", "numpy", "onnxruntime", "soundfile"]


def check_script(script, graph, ticket, speech, capsys):
    """Its texts are ours; its features are, but for the rounding of torch's float32 in near silence."""
    script.main(str(graph), *map(str, speech))
    texts = capsys.readouterr().out.splitlines()
    assert texts == said(capsys, ticket, *speech, "--dense")[1] and all(texts)
    for path in speech:
        ours = data.features_of(data.Utterance(path, ""), "log-mel")[0].numpy()
        (found,) = script.features_of(script.read(path))
        assert found.shape == ours.shape and np.abs(found - ours).max() < 5e-4
        assert np.quantile(np.abs(found - ours), 0.999) < 1e-4


def test_the_script_without_torch_refuses_another_sample_rate(tmp_path):
    pytest.importorskip("onnxruntime")
    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8_000)
    with pytest.raises(SystemExit, match=r"a\.wav: 800 samples at 8000 Hz: some at 16000 Hz are wanted"):
        without_torch().read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.wav", np.zeros(0), 16_000)
    for name, why in (("b.wav", "0 samples at 16000 Hz"), ("gone.wav", "Error opening")):
        with pytest.raises(SystemExit, match=rf"{name}: {why}"):
            without_torch().read(tmp_path / name)


@pytest.mark.parametrize("backbone", ["cnn-lstm", "conformer"])
def test_a_ctc_network_in_onnx(backbone, tickets, speech, tmp_path, capfd):
    pytest.importorskip("onnxscript")
    code, lines, err = said(capfd, tickets[backbone], "--export", tmp_path / "net")
    assert (code, err) == (0, "")  # no warning of torch's
    assert [line.split(": ")[0] for line in lines] == [f"{tmp_path}/net.onnx", f"{tmp_path}/tokens.txt"]
    assert (tmp_path / "tokens.txt").read_bytes().decode() == "\n".join(["<blank>", "▁", *"abcdefghij", ""])
    run, about = onnx_session(tmp_path / "net.onnx")
    script = without_torch()
    model, _ = transcribe.load(tickets[backbone])
    assert about["stride"] == "4"
    for path in speech:
        features = data.features_of(data.Utterance(path, ""), model.features)[0][None]
        with torch.no_grad():
            log_probs, lengths = model(features, torch.tensor([features.shape[1]]))
        (found,) = map(torch.from_numpy, run(features=features))
        torch.testing.assert_close(found, log_probs, atol=1e-4, rtol=0)
        assert models.ctc_greedy(found, lengths) == models.ctc_greedy(log_probs, lengths)
        own = torch.from_numpy(script.features_of(script.read(path)))
        (found,) = map(torch.from_numpy, run(features=own))
        torch.testing.assert_close(found.exp(), log_probs.exp(), atol=1e-4, rtol=0)  # features included
    check_script(script, tmp_path / "net.onnx", tickets[backbone], speech, capfd)


def test_a_transducer_in_onnx(tickets, speech, tmp_path, capsys):
    pytest.importorskip("onnxscript")
    code, lines, _ = said(capsys, tickets["rnnt"], "--export", tmp_path / "net.onnx")
    assert code == 0 and [Path(line.split(":")[0]).name for line in lines] == [
        "net-encoder.onnx", "net-predictor.onnx", "net-joiner.onnx", "tokens.txt",
    ]  # fmt: skip
    (encode, about), (predict, _), (join, _) = (onnx_session(line.split(":")[0]) for line in lines[:3])
    model, _ = transcribe.load(tickets["rnnt"])
    for path in speech:
        features = data.features_of(data.Utterance(path, ""), model.features)[0][None]
        lengths = torch.tensor([features.shape[1]])
        with torch.no_grad():
            expected = model.every_second(*model.encode(features, lengths))[0]
            (encoded,) = map(torch.from_numpy, encode(features=features))
        torch.testing.assert_close(encoded, expected, atol=1e-4, rtol=0)
        ids, state = [], torch.zeros(2, 1, 1, SIZES["rnnt"]["predictor"])
        predictor_out, h, c = map(torch.from_numpy, predict(token=torch.tensor([[0]]), h=state[0], c=state[1]))
        for frame in encoded[0]:
            for _ in range(int(about["max_symbols"])):
                (logits,) = join(encoder_out=frame[None], predictor_out=predictor_out)
                if logits.argmax() == 0:
                    break
                ids.append(int(logits.argmax()))
                predictor_out, h, c = map(torch.from_numpy, predict(token=torch.tensor([[ids[-1]]]), h=h, c=c))
        assert [ids] == model.transcribe(features, lengths) and ids
    for name in ("net.onnx", "net-encoder.onnx"):
        check_script(without_torch(), tmp_path / name, tickets["rnnt"], speech, capsys)
    code, lines, err = said(capsys, tickets["cnn-lstm"], "--export", tmp_path / "net.onnx")
    assert (code, lines) == (2, []) and "net-encoder.onnx: is there, of another kind of network" in err
    (tmp_path / "tokens.txt").write_text("of another\n")
    code, lines, err = said(capsys, tickets["rnnt"], "--export", tmp_path / "net.onnx")
    assert (code, lines) == (2, []) and "tokens.txt: is there with other tokens than this ticket's" in err


def test_export_without_its_packages_is_one_line(tickets, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(SystemExit) as stopped:  # before the ticket is read
        transcribe.main([str(tmp_path / "no ticket"), "--export", str(tmp_path / "net.onnx")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1
    assert "--export: the package is not there: pip install onnx onnxscript, or 'audio-lottery[onnx]'" in err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "flashlight" in name else found(name))
    for flags in (["--beam", "4"], ["--lm", "README.md"]):
        with pytest.raises(SystemExit):
            transcribe.main([str(tmp_path / "no ticket"), str(tmp_path / "a.wav"), *flags])
        assert "the package is not there: pip install flashlight-text==0.0.7" in capsys.readouterr().err


def test_size_by_hand(tmp_path, capsys):
    path = ticket(tmp_path, "conformer")
    command = [sys.executable, "-m", "audio_lottery", "size", str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=DEMO.parent).stdout
    masks, _, trained, *_ = files.load_ticket(path)
    # Convolutions 18 + 36, input 640; a block: 4 feed-forward of 16 x 64, attention 16 x 48 + 16 x 16, pointwise
    # 16 x 32 + 16 x 16, depthwise 16 x 5; output 16 x 12.
    assert sum(m.numel() for m in masks.values()) == 18 + 36 + 640 + 4 * 1024 + 768 + 256 + 512 + 256 + 80 + 192 == 6854
    kept = sum(int(m.sum()) for m in masks.values())
    sizes = {line[:38].strip(): int(line[38:52].replace(",", "")) for line in out.splitlines()[:9]}
    assert sizes["trained: kept weights"] == 4 * kept and sizes["rewind: kept weights"] == 0
    assert sizes["masks, as bits"] == sum(-(-m.numel() // 8) for m in masks.values())
    assert sizes["the file"] == path.stat().st_size == sizes["without its rewind state"]
    assert sizes["dense float32 checkpoint"] == 4 * sum(v.numel() for v in trained.values()) + 4  # a counter is int64
    assert f"remaining: {kept / 6854:.1%} of 6,854 prunable weights" in out
    assert plan.main([str(path)]) == 0
    out = capsys.readouterr().out
    everything = sum(p.numel() for p in networks.described(files.load_ticket(path).info, trained).parameters())
    assert f"remaining: {kept / 6854:.1%} of 6,854 prunable weights, " in out
    assert f"{1 - (6854 - kept) / everything:.1%} of all {everything:,} parameters" in out
    assert "multiply-adds a second of audio: dense " in out
    for name, message in (("none", "none: cannot read the ticket"), ("other", "other: not a recogniser's ticket")):
        files.save_ticket(tmp_path / "other", masks, None, trained, {})
        assert plan.main([str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_what_is_no_regular_file_is_not_waited_for(tmp_path, capsys):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)  # nobody writes to it
    for argv in ([pipe, "x.wav"], ["/nowhere", pipe]):
        assert transcribe.main(list(map(str, argv))) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(data.DataError, match=r"pipe.jsonl: cannot read the manifest \(not a regular file\)"):
        list(transcribe.sources([str(pipe)]))
