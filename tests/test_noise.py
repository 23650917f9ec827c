"""Noise at a true SNR: powers by hand, draws, and a whole run with it."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import soak
import soundfile
import torch
from test_train import refused

import data
import models
import train
from audio_lottery import ledger, sound, verify
from lab import networks, noise
from runner import cache, flags

SHARED = Path(noise.__file__).parent.parent / "shared" / "corpora" / "noise"


def white(n, seed=0, level=0.1):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, level, n).astype("float32"))


def speech(seed=0):
    """0.5 s of pause, 1 s at a mean square of about 0.04, 0.3 s of pause, 1 s of the same, in 25 ms frames."""
    return torch.cat([torch.zeros(8000), white(16_000, seed, 0.2), torch.zeros(4800), white(16_000, seed + 1, 0.2)])


def decibels(clean, mixed, active):
    """SNR by numpy alone, from the mix and a mask of speech-active samples."""
    clean, mixed = clean.numpy().astype("float64"), mixed.numpy().astype("float64")
    return 10 * np.log10((clean[active.numpy()] ** 2).mean() / ((mixed - clean) ** 2).mean())


def write(path, waveform, rate=16_000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.asarray(waveform), rate, subtype="FLOAT")
    return path


@pytest.fixture
def folder(tmp_path):
    """train: a short and a long recording; test: one."""
    write(tmp_path / "noise/train/short.wav", white(3000, 1))
    write(tmp_path / "noise/train/street/long.wav", white(90_000, 2))
    write(tmp_path / "noise/test/other.wav", white(70_000, 3, 0.01))
    (tmp_path / "noise/train/README").write_text("not a recording")
    (tmp_path / "noise/train/._short.wav").write_text("nor is this")
    return tmp_path / "noise"


# ---------------------------------------------------------------------------- powers


def test_pauses_do_not_count():
    tone = torch.tensor([0.5, -0.5] * 400)  # two frames of mean square 1/4
    pause = torch.full((1200,), 0.5 * 10 ** (-41 / 20))  # three frames, 41 dB below
    assert noise.speech_power(torch.cat([pause, tone, pause])) == 0.25
    soft = torch.full((400,), 0.5 * 10 ** (-39 / 20))  # 39 dB below: speech
    expected = (800 * 0.25 + 400 * 0.25 * 10**-3.9) / 1200
    assert noise.speech_power(torch.cat([tone, soft])) == pytest.approx(expected, rel=1e-6)
    assert noise.speech_power(torch.cat([tone, torch.full((100,), 0.5)])) == 0.25  # the last frame, of 100 samples
    assert noise.speech_power(torch.tensor([0.5])) == 0.25 and noise.speech_power(torch.zeros(900)) == 0


@pytest.mark.parametrize("snr", [20.0, 5.0, 0.0, -7.5])
def test_the_snr_is_the_one_asked_for(snr):
    clean = speech()
    mixed = noise.mix(clean, white(len(clean), 9, 0.003), snr)
    assert mixed.dtype == torch.float32 and mixed.shape == clean.shape
    assert decibels(clean, mixed, clean != 0) == pytest.approx(snr, abs=1e-4)
    quieter = noise.mix(clean, white(len(clean), 9, 3e-5), snr)  # the recording's level does not count
    torch.testing.assert_close(quieter, mixed, atol=1e-6, rtol=1e-5)


def test_mix_by_hand():
    clean = torch.tensor([0.5, -0.5] * 200)
    mixed = noise.mix(clean, torch.full((400,), 0.25), 0.0)  # equal powers: noise of 0.5
    assert torch.equal(mixed, torch.tensor([1.0, 0.0] * 200))
    assert torch.equal(noise.mix(torch.zeros(400), white(400), 0.0), torch.zeros(400))  # no level to refer to
    with pytest.raises(ValueError, match="as long as each other, got 400 and 399 samples"):
        noise.mix(clean, white(399), 0.0)
    with pytest.raises(ValueError, match="noise must not be all 0"):
        noise.mix(clean, torch.zeros(400), 0.0)


# ---------------------------------------------------------------------------- segments


def test_a_long_recording_is_cropped_and_a_short_one_looped():
    rng, ramp = np.random.default_rng(0), torch.arange(1.0, 11.0)
    crops = {tuple(noise.segment([ramp], 8, rng).tolist()) for _ in range(100)}
    assert crops == {tuple(float(k) for k in range(first, first + 8)) for first in (1, 2, 3)}
    loops = {tuple(noise.segment([ramp[:3]], 7, rng).tolist()) for _ in range(100)}
    assert loops == {(1, 2, 3, 1, 2, 3, 1), (2, 3, 1, 2, 3, 1, 2), (3, 1, 2, 3, 1, 2, 3)}
    assert torch.equal(noise.segment([ramp], 10, rng), ramp)


def test_a_silent_crop_is_drawn_again():
    rng, click = np.random.default_rng(0), torch.zeros(10_000)
    click[5000:6000] = 0.5
    assert all(noise.power(noise.segment([click], 500, rng)) > 0 for _ in range(50))
    click = torch.zeros(10**6)
    click[7] = 0.5  # ten draws miss it: the crop that holds it
    found = noise.segment([click], 1000, rng)
    assert len(found) == 1000 and found[7] == 0.5 and found.count_nonzero() == 1


# ---------------------------------------------------------------------------- draws


def test_a_draw_follows_from_seed_epoch_and_utterance(folder):
    clean, levels = speech(), []
    here = noise.Noise(folder, (5.0, 15.0))
    first = here.for_training(clean, seed=1, epoch=2, index=3)
    torch.rand(3), np.random.rand(3)
    assert torch.equal(first, noise.Noise(folder, (5.0, 15.0)).for_training(clean, seed=1, epoch=2, index=3))
    for seed, epoch, index in ((0, 2, 3), (1, 3, 3), (1, 2, 4), (2, 1, 3), (1, 2, 0)):
        assert not torch.equal(first, here.for_training(clean, seed=seed, epoch=epoch, index=index))
    for index in range(200):
        levels.append(decibels(clean, here.for_training(clean, seed=0, epoch=0, index=index), clean != 0))
    # evenly drawn: of 200 the mean is 10 with a standard error of 10 / sqrt(12 * 200) = 0.2
    assert 5 <= min(levels) < 5.5 and 14.5 < max(levels) <= 15.0001 and abs(np.mean(levels) - 10) < 0.8


def test_training_never_hears_the_noise_of_the_test(folder, tmp_path):
    """Constant recordings tell by their sign where a sample of noise comes from."""
    for part, sign in (("train", 1), ("test", -1)):
        for n in (1000, 60_000):
            write(tmp_path / "signs" / part / f"{n}.wav", torch.full((n,), 0.1 * sign))
    here, clean = noise.Noise(tmp_path / "signs", (0.0, 10.0), (10.0,)), speech()
    for i in range(40):
        assert (here.for_training(clean, seed=0, epoch=i, index=i) - clean).min() > 0
        assert (here.for_test(clean, 10.0, i) - clean).max() < 0
    assert noise.Noise(folder, (0.0, 10.0)).test == [] and noise.Noise(folder, None, (10.0,)).train == []
    soundfile.write(tmp_path / "signs/test/again.wav", np.full(1000, 0.1, "float32"), 16_000, subtype="DOUBLE")
    with pytest.raises(
        data.DataError, match=r"again.wav sounds as .*train/1000.wav: no noise of the test may be trained on"
    ):
        noise.Noise(tmp_path / "signs", (0.0, 10.0), (10.0,))


def test_the_test_is_the_same_for_every_seed_and_range_of_training(folder):
    one, other = noise.Noise(folder, (5.0, 15.0), (10.0, 0.0)), noise.Noise(folder, None, (0.0,))
    clean = speech()
    mixed = one.for_test(clean, 0.0, 4)
    assert torch.equal(mixed, other.for_test(clean, 0.0, 4)) and torch.equal(mixed, one.for_test(clean, -0.0, 4))
    assert not torch.equal(mixed, one.for_test(clean, 0.0, 5))
    added = [one.for_test(clean, snr, 4).double() - clean.double() for snr in (0.0, 20.0)]  # one recording and place
    torch.testing.assert_close(added[0], 10 * added[1], atol=1e-6, rtol=1e-5)
    for snr in (20.0, 0.0, -5.0):
        assert decibels(clean, one.for_test(clean, snr, 4), clean != 0) == pytest.approx(snr, abs=1e-4)


def test_the_hash_covers_names_and_bytes_of_what_is_used(folder):
    def sha256(*levels):
        return noise.Noise(folder, *levels).sha256

    both, train_only, test_only = sha256((0, 9), (5,)), sha256((0, 9)), sha256(None, (5,))
    assert len({both, train_only, test_only}) == 3 and both == sha256((3, 4), (1, 2))
    (folder / "test/other.wav").rename(folder / "test/renamed.wav")
    assert sha256((0, 9)) == train_only and sha256(None, (5,)) != test_only
    write(folder / "train/short.wav", white(3000, 8))
    assert sha256((0, 9)) != train_only


# ---------------------------------------------------------------------------- features and batches


@pytest.fixture
def utterances(tmp_path):
    lengths = [20_000, 9000, 12_345, 400, 30_000, 15_000, 8000]
    return [data.Utterance(write(tmp_path / f"u{i}.wav", white(n, 50 + i)), "a") for i, n in enumerate(lengths)]


def noisy_features(examples, here, seed, epoch, batch_size=3, workers=0, **how):
    """{frames: features}, which tells the utterances apart."""
    batches = data.Epoch(examples, batch_size, seed, epoch, None, mix=here.for_training, **how).batches(workers=workers)
    return {int(n): f[:n] for batch in batches for f, n in zip(batch.features, batch.input_lengths)}


def test_batches_workers_processes_and_caches_hear_the_same(folder, utterances, tmp_path):
    here, tokens = noise.Noise(folder, (0.0, 10.0)), [data.BLANK, "a"]
    examples = cache.load_examples(utterances, tokens, "log-mel", fresh=True)
    assert examples[2].frames == 1 + 12_345 // 160 and examples[0].source.waveform is not None
    expected = noisy_features(examples, here, 1, 2)
    mixed = here.for_training(sound.load_audio(utterances[4].audio), seed=1, epoch=2, index=4)
    assert torch.equal(expected[188], data.normalize(data.log_mel(mixed))) and len(expected) == len(utterances)
    shares = [noisy_features(examples, here, 1, 2, 2, process=p, processes=2) for p in (0, 1)]
    others = [noisy_features(examples, here, 1, 2, 8), noisy_features(examples, here, 1, 2, 3, 2)]
    others.append(shares[0] | shares[1])
    for kept_in in ("none", cache.Cache(tmp_path / "cache")):
        again = cache.load_examples(utterances, tokens, "log-mel", cache=kept_in, fresh=True)
        assert [e.frames for e in again] == [e.frames for e in examples]
        others.append(noisy_features(again, here, 1, 2))
    for got in others:
        assert got.keys() == expected.keys() and all(torch.equal(got[n], expected[n]) for n in expected)
    later = noisy_features(examples, here, 1, 3)
    assert not any(torch.equal(later[n], expected[n]) for n in expected)


def test_noisy_test_features_are_the_same_in_memory_and_computed_anew(folder, utterances, tmp_path):
    here = noise.Noise(folder, None, (5.0,))
    mixes = [lambda waveform, i=i: here.for_test(waveform, 5.0, i) for i in range(len(utterances))]
    found = []
    for kept_in, workers in (("memory", 0), ("memory", 2), ("none", 0), (cache.Cache(tmp_path / "cache"), 0)):
        examples = cache.load_examples(utterances, [data.BLANK, "a"], "log-mel", "", kept_in, workers, mixes=mixes)
        found.append([example.features for example in examples])
    for got in found[1:]:
        assert all(map(torch.equal, got, found[0]))
    assert not torch.equal(found[0][0], data.features_of(utterances[0], "log-mel")[0])


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--noise", "x"], "--noise needs --snr LO:HI (training), --test-snr A,B,... (test) or both"),
        (["--snr", "0:10"], "--snr and --test-snr need --noise DIR"),
        (["--test-snr", "10"], "--snr and --test-snr need --noise DIR"),
        (["--noise", "x", "--snr", "10"], "argument --snr: must be LO:HI, two numbers of dB in [-100, 100], got '10'"),
        (["--noise", "x", "--snr", "-5:nan"], "--snr: must be LO:HI, two numbers of dB in [-100, 100], got '-5:nan'"),
        (["--noise", "x", "--snr", "-5:-6"], "argument --snr: must be LO:HI with LO <= HI, got '-5:-6'"),
        (["--noise", "x", "--test-snr", "10,,5"], "must be A,B,..., numbers of dB in [-100, 100], got '10,,5'"),
        (["--noise", "x", "--test-snr", "101"], "must be A,B,..., numbers of dB in [-100, 100], got '101'"),
        (["--noise", "x", "--test-snr", "5,10,5.0"], "--test-snr: must not name an SNR twice, got '5,10,5.0'"),
        (["--noise", "/nowhere", "--snr", "-5:10"], "/nowhere/train: no such folder (--noise DIR: DIR/train for --snr"),
        (["--noise", "/nowhere", "--test-snr", "-5,0"], "/nowhere/test: no such folder"),
    ],
)
def test_unusable_flags(capsys, tmp_path, flags, message):
    assert message in refused(capsys, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_unusable_recordings(capsys, folder, tmp_path):
    flags = ["--out", tmp_path / "run", "--noise", folder, "--snr", "0:10"]
    bad = write(folder / "train/bad.wav", torch.zeros(16_000))
    assert "bad.wav: silent: there is no noise in it to add" in refused(capsys, *flags)
    bad.write_bytes(b"RIFF" + bytes(500))
    assert "bad.wav: cannot decode the audio" in refused(capsys, *flags)
    (folder / "train/street/empty.wav").touch()
    said = refused(capsys, *flags)
    assert "2 recordings are broken: " in said and "bad.wav: cannot" in said and "empty.wav: the file is empty" in said
    (folder / "train/street/empty.wav").unlink()
    (folder / "train/@eaDir").mkdir()
    (folder / "train/@eaDir/short.wav").touch()  # no part of the folder
    for path in (bad, folder / "train/short.wav", folder / "train/street/long.wav"):
        path.unlink()
    assert "noise/train: no recording in it (--noise looks for .aif " in refused(capsys, *flags)
    assert not (tmp_path / "run").exists()


def test_the_configuration_gives_its_command_line():
    argv = ["--noise", "x", "--snr=-2.5:10", "--test-snr", "20,0,-5"]
    args = flags.parse(argv)
    assert args.snr == (-2.5, 10.0) and args.test_snr == (20.0, 0.0, -5.0)
    line = flags.command_line(flags.configuration(args))
    assert line[-2:] == ["--snr=-2.5:10.0", "--test-snr=20.0,0.0,-5.0"]
    again = flags.parse([*line, "--noise", "x"])
    assert (again.snr, again.test_snr) == (args.snr, args.test_snr)


def test_a_run_with_noise(folder, tmp_path, capsys, monkeypatch):
    """Trained, stopped, gone on with, verified and trained again; each SNR is a test with a verdict of its own."""
    (tmp_path / "corpus").mkdir()
    corpus = soak.small_corpus(tmp_path / "corpus")
    small = {"channels": 8, "hidden": 12, "layers": 1, "predictor": 8, "joiner": 8}
    monkeypatch.setitem(models.Transducer.SIZES, "demo", models.Transducer.SIZES["demo"] | small)
    flags = ["--data", str(corpus), "--sparsity", "0.2", "--epochs", "2", "--batch-size", "2", "--noise", str(folder)]
    flags += ["--snr", "5:20", "--test-snr", "10,-5"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    said = capsys.readouterr().out
    assert "noise: training at 5 to 20 dB with 2 recordings, 0.1 min; test at 10, -5 dB with 1 recordings" in said
    assert "test at -5 dB: test WER by round 0: " in said
    rows = ledger.read_ledger(tmp_path / "whole" / "ledger.jsonl")
    assert list(rows[1]["other_tests"]) == ["test at 10 dB", "test at -5 dB"]
    assert all("verdict" in row for row in rows[1]["other_tests"].values())
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["noise_draws"] == "by utterance"
    assert config["snr"] == [5, 20] and config["test_snr"] == [10, -5] and len(config["noise_sha256"]) == 64

    clean = [*flags[: flags.index("--noise")], "--out", str(tmp_path / "clean")]
    assert train.main(clean) == 0
    quiet = ledger.read_ledger(tmp_path / "clean" / "ledger.jsonl")
    assert quiet[0]["rewind_sha256"] == rows[0]["rewind_sha256"] and quiet[0]["last_sha256"] != rows[0]["last_sha256"]

    steps = itertools.count(1)

    def stop_once(self, *state):
        if next(steps) == 6:  # in the second epoch, after two of three batches
            raise train.Stopped(15)
        self.save(*state)

    with monkeypatch.context() as patched:
        patched.setattr(train.Checkpointer, "after_step", stop_once)
        assert train.main([*flags, "--out", str(tmp_path / "stopped")]) == 143
    assert train.main([*flags, "--out", str(tmp_path / "stopped"), "--workers", "1"]) == 0
    assert soak.result(tmp_path / "stopped") == soak.result(tmp_path / "whole")
    again = ledger.read_ledger(tmp_path / "stopped" / "ledger.jsonl")
    assert sum(row["resumed"] for row in again) == 1
    assert [row["other_tests"] for row in again] == [row["other_tests"] for row in rows]

    assert verify.failures(tmp_path / "whole", networks) == []
    capsys.readouterr()
    assert train.main(["--retrain", str(tmp_path / "whole"), "1"]) == 0
    assert "other_tests" in capsys.readouterr().out
    write(folder / "train/short.wav", white(3000, 99))
    assert train.main(["--retrain", str(tmp_path / "whole"), "1"]) == 2
    assert "noise_sha256 is " in capsys.readouterr().err
    message = refused(capsys, *flags, "--out", tmp_path / "whole")
    assert "holds another run (--noise, by its hash" in message


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/corpora/noise, which is not part of the project")
def test_real_recordings():
    here, clean = noise.Noise(SHARED, (0.0, 20.0), (5.0,)), speech()
    assert (len(here.train), len(here.test)) == (126, 50)
    for index in range(100):
        mixed = here.for_test(clean, 5.0, index)
        assert mixed.isfinite().all() and math.isclose(decibels(clean, mixed, clean != 0), 5.0, abs_tol=1e-3)
