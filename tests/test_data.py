"""Corpora, features, SpecAugment, batches; and every way a file can be broken."""

import io
import json
import math
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import soak
import soundfile
import torch

import data
import train
from audio_lottery import draws, sound
from runner import cache
from runner import flags as command_flags

DEMO = Path(data.__file__).parent / "demo"
SHARED = Path(data.__file__).parent.parent / "shared" / "corpora"


def write_wav(path, samples, rate=16_000, **kwargs):
    soundfile.write(path, np.asarray(samples, dtype="float32"), rate, **kwargs)
    return path


def noise(n, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, n).astype("float32")


def manifest(folder, *lines):
    path = folder / "train.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


# ---------------------------------------------------------------------------- manifests


def test_demo_corpus():
    corpus = data.read_corpus(DEMO)
    assert {split: len(rows) for split, rows in corpus.items()} == {"train": 408, "valid": 59, "test": 65}
    tokens = data.tokens_of(corpus["train"])
    assert tokens == [data.BLANK, " ", "'"] + [chr(c) for c in range(ord("a"), ord("z") + 1)]
    assert (DEMO / "COPYRIGHT").is_file()


@pytest.mark.parametrize("name", ["prompts-en", "prompts-es", "prompts-fr", "prompts-it", "queen"])
def test_other_corpora_load(name):
    if not (SHARED / name).is_dir():
        pytest.skip("needs ../shared/corpora, which is not part of the project")
    corpus = data.read_corpus(SHARED / name)
    tokens = data.tokens_of(corpus["train"])
    examples = cache.load_examples(corpus["test"][:5], tokens, "log-mel")
    known = [e for e in examples if set(e.text) <= set(tokens)]
    assert known and all(data.decode(e.targets, tokens) == e.text for e in known)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json", "train.jsonl, line 2: not a JSON object"),
        ("[1]", "train.jsonl, line 2: not a JSON object"),
        ({"text": "a"}, "line 2: 'audio_filepath' is missing .*, got 'text'"),
        ({}, "line 2: 'audio_filepath' is missing .*, got no key"),
        ({"audio_filepath": "a.wav"}, "line 2: 'text' must be a string"),
        ({"audio_filepath": "a.wav", "text": "  "}, "line 2: the text is empty"),
        ({"audio_filepath": "nope.wav", "text": "a"}, "line 2: no such audio file: .*nope.wav"),
        ({"audio_filepath": "a.wav", "text": "a", "duration": "x"}, "line 2: 'duration' must be a number of seconds"),
        (
            '{"audio_filepath": "a.wav", "text": "a", "offset": NaN}',
            "line 2: not a JSON object .*the number NaN",
        ),
        ({"audio_filepath": "a.wav", "text": "a", "duration": 1e305}, "line 2: 'duration' must be a number of seconds"),
        (
            {"audio_filepath": "a.wav", "text": "a", "offset": 10**400},
            "line 2: not a JSON object .*a number of 401 characters",
        ),
        ('{"audio_filepath": "a.wav", "text": "a\\ud800"}', "line 2: the text has half a surrogate pair"),
    ],
)
def test_bad_manifest_lines(tmp_path, line, message):
    write_wav(tmp_path / "a.wav", noise(1600))
    path = manifest(tmp_path, {"audio_filepath": "a.wav", "text": "fine"}, line)
    with pytest.raises(data.DataError, match=message):
        data.read_manifest(path)


def test_missing_and_empty_manifests(tmp_path):
    with pytest.raises(data.DataError, match="no such folder"):
        data.read_corpus(tmp_path / "nowhere")
    with pytest.raises(data.DataError, match=r"train.jsonl: cannot read the manifest"):
        data.read_corpus(tmp_path)
    os.mkfifo(tmp_path / "train.jsonl")  # nobody writes to it
    with pytest.raises(data.DataError, match=r"train.jsonl: cannot read the manifest \(not a regular file\)"):
        data.read_corpus(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl").write_text("\n\n")
    with pytest.raises(data.DataError, match=r"train.jsonl: the manifest is empty"):
        data.read_corpus(tmp_path)
    (tmp_path / "train.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(data.DataError, match="line 1: not a JSON object in UTF-8"):
        data.read_corpus(tmp_path)


def test_a_byte_order_mark_is_read_over(tmp_path):
    write_wav(tmp_path / "a.wav", noise(1600))
    path = manifest(tmp_path, {"audio_filepath": "a.wav", "text": "a"}, {"audio_filepath": "a.wav", "text": "b"})
    before = data.read_manifest(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert data.read_manifest(path) == before and [u.where for u in before] == [f"{path}, line {n}" for n in (1, 2)]
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(data.DataError, match="the manifest is empty"):
        data.read_manifest(path)
    path.write_bytes(path.read_bytes() + json.dumps({"audio_filepath": "a.wav", "text": "a"}).encode("utf-16"))
    with pytest.raises(data.DataError, match="line 1: not a JSON object in UTF-8"):
        data.read_manifest(path)


def test_a_manifest_is_read_a_line_at_a_time():
    class Endless(io.RawIOBase):
        given = 0

        def readable(self):
            return True

        def readinto(self, buffer):
            self.given += 1
            line = b'{"audio_filepath": "a.wav", "text": "a"}\n'
            buffer[: len(line)] = line
            return len(line)

    endless = Endless()
    rows = data.manifest_rows(io.BufferedReader(endless), "stdin")
    assert [next(rows)[0] for _ in range(3)] == [1, 2, 3] and endless.given < 1000
    with pytest.raises(data.DataError, match="stdin, line 2: longer than 1048576 bytes: no line of a manifest"):
        list(data.manifest_rows(b'{"audio_filepath": "a", "text": "a"}\n' + bytes([32, 120]) * 2**20, "stdin"))


def test_a_recording_of_many_segments_is_looked_for_once(tmp_path, monkeypatch):
    write_wav(tmp_path / "a.wav", noise(1600))
    rows = [{"audio_filepath": "a.wav", "text": "a", "offset": i / 100, "duration": 0.01} for i in range(10)]
    looked, isfile = [], os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(path) or isfile(path))
    utterances = data.read_manifest(manifest(tmp_path, *rows))
    assert len(looked) == 1 and len({id(utterance.audio) for utterance in utterances}) == 1
    assert [u.line for u in utterances] == list(range(1, 11)) and [u.offset for u in utterances][2] == 0.02


def test_a_recording_in_two_splits_is_refused(tmp_path, monkeypatch):
    for split in ("train", "valid", "test"):
        write_wav(tmp_path / f"{split}.wav", noise(1600))
        row = {"audio_filepath": f"{split}.wav", "text": "a"}
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")  # twice in one is no harm
    assert [len(utterances) for utterances in data.read_corpus(tmp_path).values()] == [2, 2, 2]
    for name in ("train.wav", "../" + tmp_path.name + "/train.wav", str(tmp_path / "train.wav")):
        row = {"audio_filepath": name, "offset": 0, "text": "b"}
        (tmp_path / "test.jsonl").write_text(f"\n{json.dumps(row)}")
        with pytest.raises(data.DataError, match=r"test.jsonl, line 2: .*train.wav: is in test and in train: a record"):
            data.read_corpus(tmp_path)
    (tmp_path / "link.wav").symlink_to("train.wav")
    (tmp_path / "test.jsonl").write_text(json.dumps({"audio_filepath": "link.wav", "text": "b"}))
    with pytest.raises(data.DataError, match=r"link.wav: is in test and in train"):
        data.read_corpus(tmp_path)
    (tmp_path / "test.jsonl").write_text(json.dumps({"audio_filepath": str(tmp_path / "train.wav"), "text": "b"}))
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(data.DataError, match=r"train.wav: is in test and in train"):
        data.read_corpus(Path(tmp_path.name))


def test_a_speaker_without_a_name_is_none(tmp_path):
    write_wav(tmp_path / "a.wav", noise(1600))
    rows = [{"audio_filepath": "a.wav", "text": "a"} | more for more in ({"speaker": None}, {}, {"speaker": 0})]
    assert [u.speaker for u in data.read_manifest(manifest(tmp_path, *rows))] == ["", "", "0"]


def test_half_a_surrogate_pair_in_a_name_is_no_file(tmp_path):
    path = manifest(tmp_path, '{"audio_filepath": "\\ud800.wav", "text": "a"}')
    with pytest.raises(data.DataError, match="line 1: no such audio file: "):
        data.read_manifest(path)
    name = os.fsdecode(b"caf\xe9.wav")
    write_wav(tmp_path / "a.wav", noise(1600)).rename(tmp_path / name)
    (utterance,) = data.read_manifest(manifest(tmp_path, {"audio_filepath": name, "text": "a"}))
    assert len(data.waveform_of(utterance)) == 1600


def test_segments_by_offset(tmp_path):
    samples = noise(32_000)
    write_wav(tmp_path / "a.wav", samples, subtype="FLOAT")
    row = {"audio_filepath": "a.wav", "text": "b", "offset": 0.5, "duration": 1.0}
    (utterance,) = data.read_manifest(manifest(tmp_path, row))
    waveform = sound.load_audio(utterance.audio, utterance.offset, utterance.duration)
    assert torch.equal(waveform, torch.from_numpy(samples[8000:24000]))
    first = sound.load_audio(utterance.audio, 0, 0.5)
    assert torch.equal(first, torch.from_numpy(samples[:8000]))
    with pytest.raises(data.DataError, match=r"no audio in it from 2.5 s on"):
        sound.load_audio(utterance.audio, 2.5, 1.0)
    with pytest.raises(data.DataError, match=r"truncated audio: 0.50 s decoded where the manifest says 1.00 s"):
        sound.load_audio(utterance.audio, 1.5, 1.0)


# ---------------------------------------------------------------------------- audio


def test_stereo_and_other_rates(tmp_path):
    mono = noise(8000)
    path = write_wav(tmp_path / "a.wav", np.stack((mono, -mono / 2), 1), rate=16_000, subtype="FLOAT")
    torch.testing.assert_close(sound.load_audio(path), torch.from_numpy(mono / 4))
    tone = np.sin(2 * np.pi * 440 * np.arange(11_025) / 11_025)
    waveform = sound.load_audio(write_wav(tmp_path / "b.wav", tone, rate=11_025))
    assert waveform.shape == (16_000,)
    spectrum = torch.fft.rfft(waveform).abs()
    assert spectrum.argmax() == 440
    odd = sound.load_audio(write_wav(tmp_path / "c.wav", tone, rate=11_027))  # shares no divisor with 16 kHz
    assert abs(len(odd) - 16_000) < 40
    with pytest.raises(data.DataError, match=r"d.wav: a sample rate of 300 Hz"):
        sound.load_audio(write_wav(tmp_path / "d.wav", tone, rate=300))


def test_every_format_decodes_and_every_cut_is_found(tmp_path):
    whole = sound.load_audio(DEMO / "audio" / "agent-alreadyon.opus").numpy()
    for name, kwargs in {
        "a.wav": {}, "a.flac": {}, "a.ogg": {"format": "OGG", "subtype": "OPUS"}, "a.mp3": {},
    }.items():  # fmt: skip
        path = write_wav(tmp_path / name, whole, **kwargs)
        assert len(sound.load_audio(path, duration=len(whole) / 16_000)) == pytest.approx(len(whole), abs=1700)
        content = path.read_bytes()
        for cut in (len(content) * 2 // 3, 60, 0):
            path.write_bytes(content[:cut])
            with pytest.raises(data.DataError, match=str(path)):
                sound.load_audio(path, duration=len(whole) / 16_000)


def test_a_cut_wav_is_found_without_a_duration(tmp_path):
    path = write_wav(tmp_path / "a.wav", noise(16_000))
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(
        data.DataError, match=r"a.wav: truncated audio: 19956 bytes of data where its header says 32000"
    ):
        sound.load_audio(path)


def test_audio_that_is_not(tmp_path):
    (tmp_path / "x.raw").write_bytes(bytes(3200))
    with pytest.raises(data.DataError, match=r"x.raw: cannot decode the audio"):
        sound.load_audio(tmp_path / "x.raw")
    write_wav(tmp_path / "huge.wav", np.full(1600, 1e25), subtype="FLOAT")
    with pytest.raises(data.DataError, match=r"huge.wav: its samples are too large"):
        cache.load_examples([data.Utterance(tmp_path / "huge.wav", "a")], [data.BLANK, "a"], "log-mel")
    (tmp_path / "text.wav").write_text("hello " * 100)
    with pytest.raises(data.DataError, match=r"text.wav: cannot decode the audio"):
        sound.load_audio(tmp_path / "text.wav")
    with pytest.raises(data.DataError, match=r"gone.wav: cannot decode the audio"):
        sound.load_audio(tmp_path / "gone.wav")
    with pytest.raises(data.DataError, match="cannot decode the audio"):
        sound.load_audio(tmp_path)
    write_wav(tmp_path / "empty.wav", [])
    with pytest.raises(data.DataError, match=r"empty.wav: no audio in it"):
        sound.load_audio(tmp_path / "empty.wav")
    for bad in (np.nan, np.inf):
        samples = noise(1600)
        samples[100] = bad
        write_wav(tmp_path / "bad.wav", samples, subtype="FLOAT")
        with pytest.raises(data.DataError, match=r"bad.wav: a sample is NaN or infinite"):
            sound.load_audio(tmp_path / "bad.wav")


def test_what_is_wrong_with_a_recording_names_its_line_and_segment(tmp_path):
    write_wav(tmp_path / "a.wav", noise(16_000))
    write_wav(tmp_path / "huge.wav", np.full(16_000, 1e25), subtype="FLOAT")
    rows = [{"audio_filepath": "a.wav", "text": "a"}, {"audio_filepath": "a.wav", "text": "a", "offset": 0.5}]
    rows += [rows[1] | {"duration": 0.25}, rows[1] | {"duration": 1}, {"audio_filepath": "huge.wav", "text": "a"}]
    utterances = data.read_manifest(manifest(tmp_path, *rows))
    assert [len(data.waveform_of(utterance)) for utterance in utterances[:3]] == [16_000, 8000, 4000]
    with pytest.raises(data.DataError, match=r"train.jsonl, line 4: .*a.wav, 0.5 s to 1.5 s: truncated audio: 0.50 s"):
        data.features_of(utterances[3], "log-mel")
    with pytest.raises(data.DataError, match=r"train.jsonl, line 5: .*huge.wav: its samples are too large"):
        data.features_of(utterances[4], "log-mel")


# ---------------------------------------------------------------------------- many broken at once


def corpus_with_broken(folder, train=(), valid=(), test=()):
    """A few of the demo's recordings, and an empty file for each name."""
    soak.small_corpus(folder)
    for split, names in (("train", train), ("valid", valid), ("test", test)):
        with open(folder / f"{split}.jsonl", "a") as file:
            for name in names:
                (folder / name).touch()
                file.write("\n" + json.dumps({"audio_filepath": name, "text": "hello"}))
    return folder


@pytest.fixture
def small_networks(monkeypatch):
    soak.shrink_models(monkeypatch.setitem)


@pytest.mark.parametrize("kept", ["memory", "DIR"])
def test_all_broken_recordings_are_named_at_once(tmp_path, capsys, small_networks, kept):
    corpus = corpus_with_broken(tmp_path, [f"t{i:02d}.wav" for i in range(11)], ["v.wav"], ["x.wav"])
    flags = ["--data", str(corpus), "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--cache", kept if kept == "memory" else str(tmp_path / "cache")]) == 2
    said = capsys.readouterr().err
    assert "train.py: error: 13 recordings are broken: " in said and said.count("\n") == 1
    assert said.count("the file is empty (0 bytes)") == 10 and "; and 3 more (--skip-broken leaves those of" in said
    assert f"train.jsonl, line 7: {corpus}/t00.wav: the file is empty" in said and "t09.wav" in said
    assert "t10.wav" not in said and not (tmp_path / "run").exists()


def test_skip_broken_leaves_them_out_aloud_and_in_the_configuration(tmp_path, capsys, small_networks):
    corpus = corpus_with_broken(tmp_path, ["t0.wav", "t1.wav"], ["v.wav"])
    flags = ["--data", str(corpus), "--epochs", "1", "--sparsity", "0.2", "--skip-broken"]
    assert train.main([*flags, "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert "data: 2 of 8 train recordings left out by --skip-broken: 2 recordings are broken: " in said
    assert "data: 1 of 3 valid recordings left out by --skip-broken: " in said
    assert "data: 6 train, 2 valid, 2 test utterances" in said
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["skip_broken"] is True
    whole = tmp_path / "whole"
    whole.mkdir()
    utterances = data.read_corpus(soak.small_corpus(whole))
    hashes = data.hash_files(data.audio_files(utterances))
    assert config["data_sha256"] == data.corpus_sha256(utterances, hashes)  # of what is trained and tested on
    assert train.main(["--retrain", str(tmp_path / "run"), "0"]) == 0
    assert "--skip-broken" in command_flags.command_line(config)
    assert "skip_broken" not in command_flags.configuration(command_flags.parse(["--no-skip-broken"]))
    capsys.readouterr()
    (tmp_path / "x.wav").touch()
    with open(corpus / "test.jsonl", "a") as file:
        file.write('\n{"audio_filepath": "x.wav", "text": "hello"}')
    assert train.main([*flags, "--out", str(tmp_path / "other")]) == 2
    assert "x.wav: the file is empty (0 bytes)" in capsys.readouterr().err


def test_skip_broken_with_nothing_left(tmp_path, capsys):
    corpus = corpus_with_broken(tmp_path, valid=["v.wav"])
    (corpus / "valid.jsonl").write_text('{"audio_filepath": "v.wav", "text": "hello"}')
    assert train.main(["--data", str(corpus), "--skip-broken", "--out", str(tmp_path / "run")]) == 2
    assert "--skip-broken: no valid recording is left: " in capsys.readouterr().err


def test_files_that_cannot_be_read_are_named_together(tmp_path):
    write_wav(tmp_path / "a.wav", noise(1600))
    with pytest.raises(
        data.Broken, match=r"2 recordings are broken: .*b.wav: cannot read the audio .*c.wav: cannot re"
    ):
        data.hash_files([tmp_path / name for name in ("b.wav", "a.wav", "c.wav")])


# ---------------------------------------------------------------------------- features


@pytest.mark.parametrize("samples", [1, 159, 160, 16_000])
@pytest.mark.parametrize("kind, bins", [("log-mel", 80), ("log1p-stft", 161)])
def test_features_shape_and_normalisation(samples, kind, bins):
    features = data.FEATURES[kind](torch.from_numpy(noise(samples)))
    assert features.shape == (1 + samples // 160, bins) and features.isfinite().all()
    normal = data.normalize(features)
    if samples == 16_000:
        one = data.normalize(features, one_mean=True)
        assert abs(one.mean()) < 1e-4 and abs(one.std() - 1) < 1e-4 and one.mean(0).abs().max() > 0.1
        torch.testing.assert_close(normal.mean(0), torch.zeros(bins), atol=1e-4, rtol=0)
        torch.testing.assert_close(normal.std(0, correction=0), torch.ones(bins), atol=1e-4, rtol=0)
    assert data.normalize(data.FEATURES[kind](torch.zeros(4000))).abs().max() < 1e-2  # silence: no 0 / 0
    with pytest.raises(ValueError, match=r"waveform must be \(N,\)"):
        data.FEATURES[kind](torch.zeros(2, 4000))


def test_the_papers_spectrogram_has_one_mean_and_one_deviation_for_all_bins():
    features = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # mean 3, squares about it 4 + 1 + 0 + 9, over 3
    expected = (features - 3) / (14 / 3) ** 0.5
    torch.testing.assert_close(data.normalize(features, one_mean=True), expected)
    long, threads = data.log1p_stft(torch.from_numpy(noise(80_000))), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 4):  # a worker has one thread, the main process all of them
            torch.set_num_threads(count)
            found.append(data.normalize(long, one_mean=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    utterance = data.Utterance(Path(data.__file__).parent / "demo/audio/added.opus", "")
    for kind, one_mean in (("log-mel", False), ("log1p-stft", True)):
        found, whole = data.features_of(utterance, kind)[0], data.FEATURES[kind](data.load_audio(utterance.audio))
        assert torch.equal(found, data.normalize(whole, one_mean))


def test_log1p_stft_of_a_tone_by_hand():
    """Of a sine of 1 in a Hamming window of 320 samples, mean 0.54: magnitude 0.54 * 320 / 2 in its bin, 50 Hz each."""
    features = data.log1p_stft(torch.sin(2 * torch.pi * 1000 * torch.arange(16_000) / 16_000))
    assert features[50].argmax() == 20 and features[50, 20].item() == pytest.approx(math.log1p(86.4), abs=1e-3)


def test_log_mel_of_a_tone_peaks_in_its_bin():
    t = torch.arange(16_000) / 16_000
    low, high = (data.log_mel(torch.sin(2 * torch.pi * f * t)).mean(0).argmax() for f in (300, 3000))
    assert low < high
    # HTK mel: 80 triangles between 0 and 8 kHz; 3 kHz is at 1876 of 2840 mel, so in bin 1876 / 2840 * 81 - 1 = 52.5
    assert abs(int(high) - 52.5) <= 1


def test_a_tone_at_another_speed_is_as_much_shorter_and_higher(tmp_path):
    t = np.arange(16_000) / 16_000
    utterance = data.Utterance(write_wav(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 400 * t)), "a")
    for speed, samples, hertz in ((0.9, 17_778, 360), (1.0, 16_000, 400), (1.25, 12_800, 500)):
        waveform = data.waveform_of(utterance, speed)
        assert len(waveform) == samples
        peak = torch.fft.rfft(waveform * torch.hann_window(samples)).abs().argmax()
        assert abs(peak * 16_000 / samples - hertz) < 1
        features, seconds = data.features_of(utterance, "log-mel", speed=speed)
        assert len(features) == 1 + samples // 160 and seconds == samples / 16_000


# ---------------------------------------------------------------------------- tokens


def test_unseen_characters_are_counted_and_stay_in_the_reference(tmp_path):
    write_wav(tmp_path / "a.wav", noise(1600))
    utterance = data.Utterance(tmp_path / "a.wav", "añoñ")
    tokens = [data.BLANK, "a", "o"]
    assert data.unseen_characters([utterance], tokens) == {"ñ": 2}
    (example,) = cache.load_examples([utterance], tokens, "log-mel")
    assert example.targets == [1, 2] and example.text == "añoñ"


def test_frames_needed():
    assert data.frames_needed([1, 2, 3]) == 3 and data.frames_needed([1, 1, 2, 2, 2]) == 8


# ---------------------------------------------------------------------------- batches


def examples(lengths):
    return [data.Example(torch.full((n, 4), float(i + 1)), f"t{i}", [1] * (i % 3 + 1)) for i, n in enumerate(lengths)]


def test_batches_lose_nobody_and_depend_on_seed_and_epoch_alone():
    some = examples([10, 50, 20, 40, 30, 60, 25])

    def epoch(seed, number):
        batches = data.Epoch(some, 3, seed, number, data.SpecAugment(1, 3, 1, 9)).batches()
        return [(b.texts, b.features) for b in batches]

    first, again = epoch(0, 0), epoch(0, 0)
    list(data.Epoch(some, 2, 5, 7, None).batches())  # whatever ran between
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))
    assert sorted(t for texts, _ in first for t in texts) == sorted(e.text for e in some)
    assert [t for t, _ in first] != [t for t, _ in epoch(0, 1)] or [t for t, _ in first] != [t for t, _ in epoch(0, 2)]
    assert [t for t, _ in first] != [t for t, _ in epoch(1, 0)] or [t for t, _ in first] != [t for t, _ in epoch(2, 0)]


def test_each_utterance_is_drawn_at_one_of_its_speeds_in_each_epoch():
    some = examples(range(100, 140))
    for example in some:
        n = example.frames
        example.at_speeds = tuple(
            data.Example(torch.full((m, 4), m / n), example.text, [1]) for m in (n + 10, n, n - 9)
        )

    def drawn(seed, number):
        epoch = data.Epoch(some, 4, seed, number, data.SpecAugment(0, 0, 1, 200))
        lengths = np.array([e.frames for e in epoch.examples])
        order = [i for chunk in epoch.chunks for i in chunk]
        assert sorted(order) == list(range(40))  # each once
        for chunk, masks in zip(epoch.chunks, epoch.masks):  # masks are within the length that was drawn
            assert all(place[0].stop <= lengths[i] for i, places in zip(chunk, masks) for place in places)
        for batch in epoch.batches():  # and these are its features
            for features, length, text in zip(batch.features, batch.input_lengths.tolist(), batch.texts):
                whole = 100 + int(text[1:])
                assert float(features[:length].max()) in (0, torch.tensor(length / whole).item())
        return (lengths - np.arange(100, 140)).tolist()

    epochs = [drawn(0, number) for number in range(60)]
    assert epochs[0] == drawn(0, 0) != drawn(1, 0) and epochs[0] != epochs[1]
    counts = [sum(epoch.count(change) for epoch in epochs) for change in (10, 0, -9)]
    assert sum(counts) == 2400 and all(abs(count - 800) < 4 * (2400 * 2 / 9) ** 0.5 for count in counts)
    assert all(len({epoch[i] for epoch in epochs}) == 3 for i in range(40))


def test_batches_are_of_similar_length():
    some = examples(range(10, 410))
    for batch in data.Epoch(some, 8, 0, 0, None).batches():
        assert batch.input_lengths.max() <= 1.35 * batch.input_lengths.min() + 10
        for b, n in enumerate(batch.input_lengths.tolist()):
            assert (batch.features[b, n:] == 0).all() and (batch.features[b, :n] != 0).all()
            u = int(batch.target_lengths[b])
            assert batch.targets[b, :u].tolist() == [1] * u and (batch.targets[b, u:] == 0).all()


def test_eval_batches_keep_their_indices():
    some = examples([10, 50, 20, 40, 30])
    seen = {}
    for indices, batch in data.eval_batches(some, 2):
        seen.update(zip(indices, batch.texts))
    assert [seen[i] for i in range(5)] == [e.text for e in some]


def test_spec_augment_masks_within_its_bounds():
    rng, features = np.random.default_rng(0), torch.ones(100, 80)
    widths = {"time": set(), "freq": set()}
    for _ in range(300):
        masked = features.clone()
        for place in data.SpecAugment(1, 27, 1, 70, 0.2).draw((100, 80), rng):
            masked[place] = 0
        widths["time"].add(int((masked == 0).all(1).sum()))
        widths["freq"].add(int((masked == 0).all(0).sum()))
    assert max(widths["time"]) == 20 and max(widths["freq"]) == 27 and 0 in widths["time"] and 0 in widths["freq"]
    some, places = examples([50, 50]), data.SpecAugment(2, 4, 2, 9)
    (batch,) = data.Epoch(some, 2, 0, 0, places).batches()
    assert (batch.features == 0).any() and all((e.features != 0).all() for e in some)  # copies were masked


def test_batches_by_seconds_hold_at_most_as_many_padded_seconds():
    some = examples(range(10, 410))  # 0.1 to 4.1 s
    epoch = data.Epoch(some, 8, 0, 0, None, batch_seconds=20)
    seen = []
    for batch in epoch.batches():
        longest, count = int(batch.input_lengths.max()), len(batch.texts)
        assert longest * count <= 20 * 100 * 1.25  # lengths are jittered by up to 10 % before they are cut
        seen += batch.texts
    assert sorted(seen) == sorted(e.text for e in some) and len(epoch) < 60
    # One longer than a batch stands alone.
    assert len(data.Epoch(examples([5000, 10, 10]), 8, 0, 0, None, batch_seconds=1)) == 2


@pytest.mark.parametrize("augment", [None, data.SpecAugment(1, 3, 1, 9)])
def test_the_shares_of_several_processes_make_up_the_batches_of_one(augment):
    some = examples([10, 50, 20, 40, 30, 60, 25])
    whole = data.Epoch(some, 6, 0, 0, augment)
    shares = [data.Epoch(some, 3, 0, 0, augment, process=p, processes=2) for p in (0, 1)]
    for k, batch in enumerate(whole.batches()):
        parts = [share[k] for share in shares]
        texts = [text for share, part in zip(shares, parts) for text in part.texts[: share.weight(k)]]
        assert sorted(texts) == sorted(batch.texts)
        for part in parts:
            for b, text in enumerate(part.texts):
                of_whole = batch.texts.index(text)
                n = int(part.input_lengths[b])
                assert torch.equal(part.features[b, :n], batch.features[of_whole, :n])
    assert [share.weight(k) for share in shares for k in range(2)].count(0) == 1  # 7 = 6 + 1: one has nothing


@pytest.mark.parametrize("first, workers", [(0, 2), (2, 0), (1, 1)])
def test_batches_from_the_middle_and_from_workers_are_the_same(first, workers):
    some = examples([10, 50, 20, 40, 30, 60, 25])
    torch.manual_seed(3)
    expected = list(data.Epoch(some, 2, 0, 0, data.SpecAugment(1, 3, 1, 9)).batches())[first:]
    state = torch.get_rng_state()
    got = list(data.Epoch(some, 2, 0, 0, data.SpecAugment(1, 3, 1, 9)).batches(first, workers))
    assert torch.equal(state, torch.get_rng_state())  # nothing is drawn from the global generator
    assert [b.texts for b in got] == [b.texts for b in expected]
    assert all(torch.equal(a.features, b.features) for a, b in zip(got, expected))


# ---------------------------------------------------------------------------- the cache


@pytest.fixture
def recordings(tmp_path):
    (tmp_path / "audio").mkdir()
    names = [tmp_path / "audio" / f"{i}.wav" for i in range(5)]
    for i, name in enumerate(names):
        write_wav(name, noise(1600 + 800 * i))
    return [data.Utterance(name, "ab", "", *((0.05, 0.1) if i == 4 else ())) for i, name in enumerate(names)]


@pytest.mark.parametrize("fresh", [False, True])
def test_features_from_workers_hold_no_file_open(recordings, fresh):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 100, before[1]))
    try:
        examples = cache.load_examples(recordings * 40, [data.BLANK], "log-mel", workers=1, fresh=fresh)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert len(examples) == 200 and examples[199].features.shape == examples[4].features.shape


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["log-mel", "log1p-stft"])
def test_cached_and_fresh_features_are_those_in_memory(recordings, tmp_path, kind, workers, monkeypatch):
    monkeypatch.setattr(cache.Cache, "SHARD", 2)
    tokens = [data.BLANK, "a", "b"]
    expected = cache.load_examples(recordings, tokens, kind)
    cached = cache.load_examples(recordings, tokens, kind, "", cache.Cache(tmp_path / "cache"), workers)
    fresh = cache.load_examples(recordings, tokens, kind, "", "none")
    for examples in (cached, fresh):
        for a, b in zip(expected, examples, strict=True):
            assert torch.equal(a.features, b.features) and a.targets == b.targets and abs(a.seconds - b.seconds) < 1e-3
            assert a.frames == b.frames
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 3
    # A second start computes nothing and does not read the recordings.
    monkeypatch.setattr(cache, "features_of", None)
    monkeypatch.setattr(cache, "CODE", "the code of now")
    with pytest.raises(TypeError):  # other code: another file
        cache.load_examples(recordings, tokens, kind, "", cache.Cache(tmp_path / "cache"))


def test_a_second_start_reads_no_recording_again(recordings, tmp_path, monkeypatch):
    first = cache.load_examples(recordings, [data.BLANK], "log-mel", "", cache.Cache(tmp_path / "cache"))
    monkeypatch.setattr(data, "hash_files", lambda paths: pytest.fail("hashed again") if paths else {})
    monkeypatch.setattr(cache._Shards, "__getitem__", lambda *_: pytest.fail("computed again"))
    again = cache.load_examples(recordings, [data.BLANK], "log-mel", "", cache.Cache(tmp_path / "cache"))
    assert all(torch.equal(a.features, b.features) for a, b in zip(first, again))


def test_a_changed_recording_is_computed_anew_and_only_its_file(recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.Cache, "SHARD", 2)
    cache.load_examples(recordings, [data.BLANK], "log-mel", "", cache.Cache(tmp_path / "cache"))
    before = set((tmp_path / "cache").glob("*.safetensors"))
    write_wav(recordings[0].audio, noise(4000))
    os.utime(recordings[0].audio, ns=(1, 1))
    examples = cache.load_examples(recordings, [data.BLANK], "log-mel", "", cache.Cache(tmp_path / "cache"))
    assert examples[0].frames == 26
    assert len(set((tmp_path / "cache").glob("*.safetensors")) - before) == 1


def test_a_damaged_cache_is_named(recordings, tmp_path):
    examples = cache.load_examples(recordings, [data.BLANK], "log-mel", "", cache.Cache(tmp_path / "cache"))
    (path,) = (tmp_path / "cache").glob("*.safetensors")
    whole = path.read_bytes()
    cache._opened.cache_clear()
    path.write_bytes(whole[:-1000] + bytes(1000))
    with pytest.raises(data.DataError, match=rf"{path.name}: damaged: delete it"):
        [example.features for example in examples]
    cache._opened.cache_clear()
    path.write_bytes(whole[:-1000])
    with pytest.raises(data.DataError, match=rf"{path.name}: damaged .*: delete it"):
        cache.load_examples(recordings, [data.BLANK], "log-mel", "", cache.Cache(tmp_path / "cache"))
    cache._opened.cache_clear()
    path.unlink()
    for index in ("[1, 2", "[1, 2]", "7", json.dumps({str(recordings[0].audio): 5})):  # only slows the next start
        (tmp_path / "cache" / "hashes.json").write_text(index)
        again = cache.load_examples(recordings, [data.BLANK], "log-mel", "", cache.Cache(tmp_path / "cache"))
        assert torch.equal(again[0].features, cache.load_examples(recordings[:1], [data.BLANK], "log-mel")[0].features)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_recording_is_named_from_a_worker_too(recordings, tmp_path, workers):
    recordings[3].audio.write_text("no audio")
    for kept_in in ("memory", cache.Cache(tmp_path / "cache")):
        with pytest.raises(data.DataError, match=r"3.wav: cannot decode the audio"):
            cache.load_examples(recordings, [data.BLANK], "log-mel", "", kept_in, workers)
    assert not list((tmp_path / "cache").glob("*.tmp"))
    (tmp_path / "file").touch()
    with pytest.raises(data.DataError, match=r"--cache .*file: cannot make the folder"):
        cache.Cache(tmp_path / "file")


def test_lengths_by_header_are_never_above_what_is_decoded(tmp_path):
    for name, rate in (("a.wav", 16_000), ("b.wav", 44_100), ("c.flac", 8_000), ("d.mp3", 16_000), ("e.mp3", 22_050)):
        for samples in (rate // 3, rate, 3 * rate + 17):
            soundfile.write(tmp_path / name, noise(samples), rate)
            utterance = data.Utterance(tmp_path / name, "a")
            frames = len(data.features_of(utterance, "log-mel")[0])
            assert 0 <= frames - cache.length(utterance)[0] <= 30, name


# ---------------------------------------------------------------------------- draws


def test_streams_of_draws_have_names_of_their_own():
    streams = (draws.ORDER, draws.DROPOUT, draws.NOISE, draws.TEST_NOISE, draws.INITIAL_WEIGHTS, draws.MASKS)
    assert len({draws.torch_seed(seed, n, s) for seed in range(4) for n in range(4) for s in streams}) == 4 * 4 * 6


def test_draws_of_a_training_are_what_they_were():
    """Old runs are trained again with these: order [seed, epoch], dropout [seed, epoch, 1], noise [.., 2, index]."""
    assert draws.generator(3, 7, draws.ORDER).random() == np.random.default_rng([3, 7]).random()
    before = [int(np.random.default_rng(seed).integers(2**63)) for seed in ([3, 7, 1], [3, 7, 1, 2], [3, 7, 4])]
    now = [draws.torch_seed(3, 7, draws.DROPOUT, process) for process in (0, 2)]
    assert [*now, draws.torch_seed(3, 7, draws.INITIAL_WEIGHTS)] == before
    assert draws.generator(3, 7, draws.NOISE, 5).random() == np.random.default_rng([3, 7, 2, 5]).random()
