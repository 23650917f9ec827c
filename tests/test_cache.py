"""Features kept in memory, in files or nowhere: the same epochs, and what is damaged in a file is named."""

import errno
import itertools
import json
import os
import random
import signal
import traceback
from pathlib import Path

import lies
import numpy as np
import pytest
import soak
import soundfile
import torch

import data
import models
import train
from runner import cache, flags, folder, settings

TOKENS = [data.BLANK, *"abc"]
# Ending, rate, seconds, how soundfile writes it. An MP3's header may count up to two frames of 1152 samples too many.
FORMS = [
    ("mp3", 16_000, 0.55, {}), ("mp3", 22_050, 0.31, {}), ("mp3", 44_100, 0.73, {}), ("mp3", 11_025, 0.62, {}),
    ("opus", 48_000, 0.44, dict(format="OGG", subtype="OPUS")), ("ogg", 44_100, 0.5, {}), ("flac", 11_027, 0.41, {}),
    ("flac", 8_000, 0.37, {}), ("wav", 37_800, 0.6, {}), ("wav", 16_000, 0.29, {}),
]  # fmt: skip


def noise(samples, seed=0):
    return (0.1 * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def recordings_in(home, forms=FORMS) -> list[data.Utterance]:
    home.mkdir()
    found = []
    for i, (ending, rate, seconds, options) in enumerate(forms):
        found.append(data.Utterance(home / f"{i}.{ending}", "ab" if i % 2 else "cab"))
        soundfile.write(found[-1].audio, noise(int(rate * seconds), i), rate, **options)
    return found


@pytest.fixture
def recordings(tmp_path):
    return recordings_in(tmp_path / "audio")


def examples_of(utterances, kept, **how):
    return cache.load_examples(utterances, TOKENS, "log-mel", "", kept, **how)


# ---------------------------------------------------------------------------- the same epochs


def test_an_epoch_is_the_same_from_memory_from_files_and_from_nowhere(recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.Cache, "SHARD", 3)
    segment = data.Utterance(recordings[2].audio, "a", "", 0.2, 0.31)  # of an MP3
    utterances = [*recordings, segment]
    kept = {"memory": "memory", "none": "none", "folder": cache.Cache(tmp_path / "cache")}
    found = {name: examples_of(utterances, place, workers=name == "none") for name, place in kept.items()}
    found["again"] = examples_of(utterances, kept["folder"])
    found["noisy"] = examples_of(utterances, kept["folder"], fresh=True)
    expected = [(e.frames, e.seconds) for e in found["memory"]]
    assert all(e.frames == len(e.features) == 1 + round(16_000 * e.seconds) // 160 for e in found["memory"])
    augment = data.SpecAugment(1, 9, 2, 20, 0.5)
    for name, examples in found.items():
        assert [(e.frames, e.seconds) for e in examples] == expected, name
        assert all(torch.equal(a.features, b.features) for a, b in zip(examples, found["memory"])), name
        for number, seconds in itertools.product(range(3), (None, 1.5)):
            ours, whole = (data.Epoch(e, 2, 0, number, augment, seconds) for e in (examples, found["memory"]))
            assert [list(chunk) for chunk in ours.chunks] == [list(chunk) for chunk in whole.chunks], name
            assert ours.masks == whole.masks, name
    assert expected[0] == (56, 0.55)


def test_utterances_at_other_speeds_are_the_same_from_memory_from_files_and_from_nowhere(recordings, tmp_path):
    kept = {"memory": "memory", "none": "none", "folder": cache.Cache(tmp_path / "cache")}
    for speed, frames in ((0.9, 1 + 9778 // 160), (1.0, 56), (1.1, 1 + 8000 // 160)):
        found = [examples_of(recordings, place, speed=speed) for place in kept.values()]
        found += [examples_of(recordings, place, speed=speed, fresh=True) for place in kept.values()]
        for examples in found:
            assert examples[0].frames == len(examples[0].features) == frames
            assert [e.seconds for e in examples] == [e.seconds for e in found[0]]
            assert all(torch.equal(a.features, b.features) for a, b in zip(examples, found[0]))


@pytest.mark.parametrize("kept", ["none", "folder"])
def test_noise_in_the_test_takes_the_lengths_that_are_known(recordings, tmp_path, kept, monkeypatch):
    place = cache.Cache(tmp_path / "cache") if kept == "folder" else kept
    clean = examples_of(recordings, place)
    monkeypatch.setattr(cache, "length", None)  # nothing is decoded to count again
    noisy = examples_of(recordings, place, mixes=[lambda w: 2 * w] * len(recordings), clean=clean)
    assert [(e.frames, e.seconds) for e in noisy] == [(e.frames, e.seconds) for e in clean]
    assert noisy[0].features.shape == clean[0].features.shape


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    small = dict(channels=8, hidden=12, layers=1, predictor=8, joiner=8)
    monkeypatch.setitem(models.Transducer.SIZES, "demo", models.Transducer.SIZES["demo"] | small)
    (tmp_path / "corpus").mkdir()
    utterances = recordings_in(tmp_path / "corpus" / "audio")
    for split, part in (("train", utterances[:7]), ("valid", utterances[7:8]), ("test", utterances[8:])):
        rows = [{"audio_filepath": f"audio/{u.audio.name}", "text": u.text} for u in part]
        (tmp_path / "corpus" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "corpus"


def test_a_run_stopped_under_one_cache_and_resumed_under_another_is_the_whole_run(
    corpus, tmp_path, monkeypatch, capsys
):
    argv = ["--data", str(corpus), "--epochs", "2", "--batch-size", "2", "--sparsity", "0.2", "--device", "cpu"]
    argv += ["--speeds", "0.9,1,1.1"]
    after_step, steps = folder.Checkpointer.after_step, itertools.count(1)

    def stopping(self, *about):
        if next(steps) in (3, 9):  # in the middle of epochs
            self.signals.number = signal.SIGTERM
        after_step(self, *about)

    assert train.main([*argv, "--out", str(tmp_path / "whole")]) == 0
    monkeypatch.setattr(folder.Checkpointer, "after_step", stopping)
    places = ["none", str(tmp_path / "cache"), "memory"]
    codes = [train.main([*argv, "--out", str(tmp_path / "parts"), "--cache", place]) for place in places]
    assert codes == [128 + signal.SIGTERM] * 2 + [0], capsys.readouterr()
    parts, whole = (soak.result(tmp_path / name) for name in ("parts", "whole"))
    assert parts.keys() == whole.keys() and parts | {"config.json": ""} == whole | {"config.json": ""}  # its machine


# ---------------------------------------------------------------------------- files that are whole


def one_file(home: Path) -> Path:
    (path,) = home.glob("*.safetensors")
    return path


def everything(utterances, home):
    return [e.features for e in examples_of(utterances, cache.Cache(home))]


def test_no_changed_byte_of_a_file_goes_by_in_silence(recordings, tmp_path):
    few = recordings[8:]
    everything(few, tmp_path / "cache")
    path = one_file(tmp_path / "cache")
    whole = path.read_bytes()
    end, rng = 8 + int.from_bytes(whole[:8], "little"), np.random.default_rng(0)
    for at in [*range(int(rng.integers(4)), end, 4), *rng.integers(end, len(whole), 20)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :])
        cache._opened.cache_clear()
        with pytest.raises(data.DataError, match=rf"{path.name}: damaged.*: delete it"):
            everything(few, tmp_path / "cache")
    for content in (b"", whole[:7], whole[: end - 1], whole[:-1], whole + b"\0"):
        path.write_bytes(content)
        with pytest.raises(data.DataError, match=rf"{path.name}: damaged \(.*: delete it"):
            everything(few, tmp_path / "cache")


def of_rows(change):
    return lambda header, about, body: about.update(rows=change(about["rows"]))


@pytest.mark.parametrize(
    "change",
    [
        of_rows(lambda rows: rows[:-1]),
        of_rows(lambda rows: [*rows, [1, 1, "00" * 32]]),
        of_rows(lambda rows: [[frames + 1, *rest] for frames, *rest in rows]),
        of_rows(lambda rows: [[-frames, *rest] for frames, *rest in rows]),
        of_rows(lambda rows: [[1 + 10**12 // 160, 10**12, rows[0][2]], *rows[1:]]),
        of_rows(lambda rows: "rows"),
        lambda header, about, body: header["features"].update(shape=[10**9, 80]),
        lambda header, about, body: header["features"].update(dtype="F64"),
        lambda header, about, body: header.update(other=header["features"]),
        lambda header, about, body: about.update(format="features 0"),
        lambda header, about, body: body[:-4],
    ],
)
def test_a_file_of_other_utterances_under_a_seal_that_holds_is_damaged_too(change, recordings, tmp_path):
    everything(recordings, tmp_path / "cache")
    lies.resealed(one_file(tmp_path / "cache"), lambda *_: None)
    cache._opened.cache_clear()
    everything(recordings, tmp_path / "cache")  # the seal that this test puts on holds
    lies.resealed(one_file(tmp_path / "cache"), change)
    cache._opened.cache_clear()
    with pytest.raises(data.DataError, match=r"safetensors: damaged \(.*: delete it"):
        everything(recordings, tmp_path / "cache")


@pytest.mark.parametrize("kind", list(lies.STORED))
def test_lying_caches_and_manifests_are_refused_by_name_or_do_no_harm(kind, tmp_path):
    rows = [{"audio_filepath": str(u.audio), "text": u.text} for u in recordings_in(tmp_path / "audio", FORMS[8:])]
    manifest, home = tmp_path / "train.jsonl", tmp_path / "cache"
    manifest.write_text("\n".join(map(json.dumps, rows)))

    def read():
        cache._opened.cache_clear()
        return everything(data.read_manifest(manifest), home)

    expected = read()
    whole = {path: path.read_bytes() for path in [manifest, *home.iterdir()]}
    for seed in range(12):
        if lies.STORED[kind](home, manifest, random.Random(seed)):
            with pytest.raises(data.DataError, match=rf"^{tmp_path}.*(jsonl|safetensors)"):
                read()
        else:
            assert all(map(torch.equal, read(), expected))
        for path in [manifest, *home.iterdir()]:
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for path, content in whole.items():
            path.write_bytes(content)


def test_permuted_utterances_of_a_file_are_named_when_they_are_read(recordings, tmp_path):
    everything(recordings, tmp_path / "cache")
    lies.resealed(one_file(tmp_path / "cache"), of_rows(lambda rows: rows[::-1]))
    cache._opened.cache_clear()
    with pytest.raises(data.DataError, match="safetensors: damaged: delete it"):
        everything(recordings, tmp_path / "cache")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_cut_while_it_is_in_use_is_one_line(workers, recordings, tmp_path):
    examples = examples_of(recordings, cache.Cache(tmp_path / "cache"))
    assert examples[0].features.isfinite().all()
    path = one_file(tmp_path / "cache")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(data.DataError, match=r"safetensors: damaged \(it was cut while it was in use\): delete it"):
        list(data.Epoch(examples, 2, 0, 0, None).batches(0, workers))
    path.unlink()
    cache._opened.cache_clear()
    with pytest.raises(data.DataError, match=r"cannot read the cached features \(No such file or directory\)"):
        list(data.Epoch(examples, 2, 0, 0, None).batches(0, workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_all_broken_recordings_are_named_wherever_features_are_kept(workers, recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.Cache, "SHARD", 4)
    for i in (1, 2, 9):  # two of one file of the cache, and the last one
        recordings[i].audio.write_bytes(b"")
    said = set()
    for kept in ("memory", "none", cache.Cache(tmp_path / "cache")):
        with pytest.raises(data.Broken) as broken:
            examples_of(recordings, kept, workers=workers)
        said.add(str(broken.value))
    (message,) = said
    assert message.startswith("3 recordings are broken: ")
    assert all(f"{recordings[i].audio.name}: the file is empty (0 bytes)" in message for i in (1, 2, 9))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 1  # those without a broken one are kept


def test_a_complete_cache_that_can_only_be_read_serves(recordings, tmp_path, monkeypatch):
    first = everything(recordings, tmp_path / "cache")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patched:
        patched.setattr(cache, "write_atomically", refuse)
        assert all(map(torch.equal, everything(recordings, tmp_path / "cache"), first))
        os.utime(recordings[0].audio, ns=(1, 1))  # hashed again, and the index cannot be written
        assert all(map(torch.equal, everything(recordings, tmp_path / "cache"), first))
        with pytest.raises(data.DataError, match=r"safetensors: cannot write the cache \(Read-only file system\)"):
            everything(recordings[1:], tmp_path / "cache")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


def test_recordings_of_two_folders_are_not_taken_for_each_other(tmp_path, monkeypatch):
    """One relative name, as many bytes, one time: only their folders tell them apart."""
    kept = tmp_path / "cache"
    for i, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        soundfile.write("a.wav", noise(1600, seed=i), 16_000)
        os.utime("a.wav", ns=(1, 1))
        hashes = cache.Cache(kept).hash_files([Path("a.wav")])
        assert hashes == data.hash_files([Path("a.wav")])


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    (tmp_path / "a.tmp").mkdir()
    foreign = tmp_path / "thesis.tmp"
    shard, index, new = (
        tmp_path / f"{name}{cache._temporary()}" for name in (f"{0:064x}.safetensors", "hashes.json", "hashes.json")
    )
    for path in (foreign, shard, index, new):
        path.write_bytes(b"half")
        os.utime(path, (1, 1))
    os.utime(new)
    cache.Cache(tmp_path)
    assert foreign.exists() and new.exists() and not shard.exists() and not index.exists()


def test_two_live_processes_fill_one_cache(recordings, tmp_path, monkeypatch):
    monkeypatch.setattr(cache.Cache, "SHARD", 2)
    expected = [e.features for e in examples_of(recordings, "memory")]
    children = []
    for own in (recordings, recordings[:6]):  # files that both write, and some that one does; two indices of hashes
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                torch.set_num_threads(1)
                for features, right in zip(everything(own, tmp_path / "cache"), expected):
                    assert torch.equal(features, right)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert not list((tmp_path / "cache").glob("*.tmp")) and len(list((tmp_path / "cache").glob("*.safetensors"))) == 5
    assert all(map(torch.equal, everything(recordings, tmp_path / "cache"), expected))


def memory() -> int:
    """Bytes of this process that no file backs."""
    return 1024 * int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0])


def test_memory_does_not_grow_with_the_cache(tmp_path):
    """Three epochs of 20 MB of features in files: nothing of them stays."""
    rng, stored = np.random.default_rng(0), []
    for number in range(8):
        some = [(torch.from_numpy(rng.standard_normal((501, 80), np.float32)), 5.0) for _ in range(16)]
        (tmp_path / f"{number}").write_bytes(cache.shard_content(some))
        stored += cache.read_shard(tmp_path / f"{number}", 16, 80)
    examples = [data.Example(source, "ab", [1, 2], seconds) for source, seconds in stored]
    sizes = []
    for number in range(3):
        for batch in data.Epoch(examples, 4, 0, number, None).batches():
            sizes.append(memory())
            assert batch.features.shape == (4, 501, 80)
    assert len(sizes) == 96 and max(sizes) - sizes[0] < 8e6


# ---------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("argv", [["--cache", ""], ["--cache="], ["--out", ""], ["--data="]])
def test_an_empty_argument_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        train.main(argv)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert said.startswith(f"train.py: error: {argv[0].rstrip('=')}: an empty argument")


def test_the_cache_of_a_run_is_its_machines_and_no_part_of_its_identity(corpus, tmp_path):
    configs = []
    for place in ("memory", "none", str(tmp_path / "cache")):
        setting = settings.prepare(flags.parse(["--data", str(corpus), "--cache", place]))
        configs.append({key: value for key, value in setting.config.items() if key != "machine"})
    assert configs[0] == configs[1] == configs[2]
