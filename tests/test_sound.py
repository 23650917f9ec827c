"""Recordings as they really are: formats, names, headers that lie; decoded in blocks, and always the same samples."""

import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import recordings
import soundfile
import torch
import torchaudio

import data
from audio_lottery import sound
from audio_lottery.sound import DataError, audio_blocks, load_audio

DEMO = Path(data.__file__).parent / "demo"
QUEEN = Path(data.__file__).parent.parent / "shared" / "corpora" / "queen"


def noise(n, channels=1, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (n, channels)).astype("float32")


def write(path, samples, rate=16_000, **options):
    soundfile.write(path, samples, rate, **options)
    return path


def plainly(path):
    """As every version has decoded a whole file: at one go."""
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    waveform = torch.from_numpy(samples).mean(1)
    return waveform if rate == 16_000 else torchaudio.functional.resample(waveform, rate, 16_000)


# ---------------------------------------------------------------------------- the same samples


@pytest.mark.parametrize("folder", [DEMO, QUEEN], ids=["demo", "queen"])
def test_real_recordings_give_the_samples_they_always_gave(folder):
    """Opus at 16 kHz and MP3 at 11 kHz, bit for bit; their manifests have a duration and no offset."""
    if not folder.is_dir():
        pytest.skip("needs ../shared/corpora, which is not part of the project")
    for utterance in data.read_manifest(folder / "test.jsonl")[::13]:
        assert utterance.duration and utterance.offset is None
        assert torch.equal(load_audio(utterance.audio, None, utterance.duration), plainly(utterance.audio))


@pytest.mark.parametrize("rate", [8000, 11_025, 16_000, 44_100, 192_000])
@pytest.mark.parametrize("channels", [1, 3])
def test_blocks_are_the_whole(tmp_path, rate, channels):
    path = write(tmp_path / "a.wav", noise(rate + 17, channels), rate, subtype="FLOAT")
    whole = load_audio(path)
    assert torch.equal(whole, plainly(path))
    for seconds in (0.003, 0.11, 0.5):
        pieces = list(audio_blocks(path, seconds=seconds))
        assert len(pieces) > 1 and max(map(len, pieces)) <= 16_000 * max(4 * seconds, 0.2)
        assert len(torch.cat(pieces)) == len(whole)
        torch.testing.assert_close(torch.cat(pieces), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("suffix, options", [("flac", {}), ("mp3", {}), ("ogg", {"subtype": "OPUS"}), ("ogg", {})])
def test_blocks_of_what_is_packed(tmp_path, suffix, options):
    path = write(tmp_path / f"a.{suffix}", noise(30_000), **options)
    assert torch.equal(torch.cat(list(audio_blocks(path, seconds=0.1))), load_audio(path))


def test_memory_is_of_a_block_whatever_the_length(tmp_path, monkeypatch):
    monkeypatch.setattr(sound, "BLOCK", 2**14)
    path = write(tmp_path / "a.flac", np.zeros((300_000, 8), "int16"), 48_000)
    read, asked = soundfile.SoundFile.read, []
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda file, n, *a, **k: asked.append(n) or read(file, n, *a, **k))
    assert sum(map(len, audio_blocks(path))) == 100_000
    assert max(asked) * 8 <= 2 * 2**14 + 8 and len(asked) > 100


def test_what_is_too_large_for_the_memory_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", noise(100))
    for error in (MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        with pytest.raises(DataError, match=r"a.wav: too large for the memory that is left"):
            load_audio(path)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        load_audio(path)


# ---------------------------------------------------------------------------- names and formats


def test_a_companion_does_not_make_an_mp3_something_else(tmp_path):
    path = write(tmp_path / "a.mp3", noise(20_000))
    content = path.read_bytes()
    assert content[:1] == b"\xff"  # no ID3
    expected = load_audio(path)
    (tmp_path / "._a.mp3").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(200))
    assert torch.equal(load_audio(path), expected)


def test_a_name_that_is_no_utf8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9\n.wav"))
    write(tmp_path / "a.wav", noise(1600)).rename(path)
    assert len(load_audio(path)) == 1600


PAIRS = [
    (format, subtype)
    for format in soundfile.available_formats() for subtype in soundfile.available_subtypes(format)
    if format != "RAW" and subtype not in ("DWVW_12", "MPEG_LAYER_I", "MPEG_LAYER_II")
    and (format, subtype) != ("WAV", "MPEG_LAYER_III")  # which soundfile cannot write
]  # fmt: skip


@pytest.mark.parametrize("format", sorted({format for format, _ in PAIRS}))
def test_every_format_and_subtype_decodes_and_segments_of_it_do(tmp_path, format):
    for subtype in [subtype for there, subtype in PAIRS if there == format]:
        path = tmp_path / f"{subtype}.{format.lower()}"
        write(path, 0.5 * np.sin(np.arange(6000) / 9), format=format, subtype=subtype)
        whole = load_audio(path)
        if format in ("VOC", "WVE", "XI"):  # which have rates of their own
            assert len(whole) > 2000 and 0 < len(load_audio(path, 0.05, 0.05)) <= 800
            continue
        segment = load_audio(path, 0.1, 0.2)
        assert 6000 <= len(whole) <= 7200 and len(segment) == 3200
        if format not in ("MP3", "OGG"):  # of which a seek gives nearly the same samples
            assert torch.equal(segment, whole[1600:4800]), subtype


@pytest.mark.parametrize("suffix, subtype", [("gsm", "GSM610"), ("vox", "VOX_ADPCM")])
def test_formats_without_a_header_are_known_by_their_names(tmp_path, suffix, subtype):
    soundfile.write(tmp_path / f"a.{suffix}", noise(8000), 8000, format="RAW", subtype=subtype)
    assert len(load_audio(tmp_path / f"a.{suffix}")) == pytest.approx(16_000, abs=320)


# ---------------------------------------------------------------------------- headers that lie


def patched(path, **sizes):
    """Each chunk's size, of a WAV, in place of its own."""
    content = bytearray(path.read_bytes())
    for chunk, size in sizes.items():
        struct.pack_into("<I", content, content.index(chunk.encode()) + 4, size)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT", "ULAW"])
def test_a_wav_whose_sizes_were_never_written_is_read_to_its_end(tmp_path, subtype):
    path = write(tmp_path / "a.wav", noise(9000, 2), subtype=subtype)
    expected = load_audio(path)
    patched(path, RIFF=0, data=0)
    assert torch.equal(load_audio(path)[: len(expected)], expected)
    assert torch.equal(load_audio(path, 0.25, 0.125), expected[4000:6000])


def test_sizes_that_stand_for_unknown(tmp_path):
    path = write(tmp_path / "a.wav", noise(9000))
    expected = load_audio(path)
    assert torch.equal(load_audio(patched(path, RIFF=2**32 - 1, data=2**32 - 1)), expected)
    content = bytearray(write(tmp_path / "a.flac", noise(9000)).read_bytes())
    content[22:26] = bytes(4)  # the low 32 bits of STREAMINFO's total, as an encoder that writes to a pipe leaves it
    (tmp_path / "b.flac").write_bytes(content)
    assert torch.equal(load_audio(tmp_path / "b.flac"), load_audio(tmp_path / "a.flac"))


def test_sizes_that_are_too_small_are_named(tmp_path):
    with pytest.raises(DataError, match=r"a.wav: its header counts 4500 samples, and 100% as many bytes follow them"):
        load_audio(patched(write(tmp_path / "a.wav", noise(9000)), data=9000))
    with pytest.raises(DataError, match=r"a.wav, 0.25 s to its end: its header counts 4500 samples"):
        load_audio(tmp_path / "a.wav", 0.25)
    assert len(load_audio(tmp_path / "a.wav", 0.1, 0.1)) == 1600  # it does not reach the end
    with pytest.raises(DataError, match=r"b.wav: no audio in it \(its header counts 0 samples\)"):
        load_audio(patched(write(tmp_path / "b.wav", noise(9000), subtype="IMA_ADPCM"), data=0))


def test_files_one_behind_the_other_and_a_flac_of_half_its_samples_are_named(tmp_path):
    path = write(tmp_path / "a.mp3", noise(20_000))
    path.write_bytes(path.read_bytes() * 2)  # cat a.mp3 a.mp3: libsndfile reads as much as the first header counts
    with pytest.raises(DataError, match=r"a.mp3: its header counts 20000 samples, and 100% as many bytes follow them"):
        load_audio(path)
    for seconds in (0.4, 3):
        content = bytearray(write(tmp_path / "a.flac", noise(round(16_000 * seconds))).read_bytes())
        (total,) = struct.unpack_from(">I", content, 22)
        struct.pack_into(">I", content, 22, total // 2)
        (tmp_path / "b.flac").write_bytes(content)
        with pytest.raises(DataError, match=rf"b.flac: its header counts {total // 2} samples, and .* follow them"):
            load_audio(tmp_path / "b.flac")
        assert len(load_audio(tmp_path / "a.flac")) == total


def test_more_samples_than_a_file_can_hold_are_named(tmp_path):
    content = bytearray(write(tmp_path / "a.sds", noise(9000)).read_bytes())
    content[10:14] = bytes([127] * 4)  # of which libsndfile gives 131 s, nearly all of them zeros
    (tmp_path / "a.sds").write_bytes(content)
    with pytest.raises(DataError, match=r"a.sds: its header counts 2097151 samples, more than its \d+ bytes can hold"):
        load_audio(tmp_path / "a.sds")


def test_tags_chunks_and_padding_behind_the_samples_are_no_samples(tmp_path):
    path = write(tmp_path / "a.wav", noise(1000))
    content = path.read_bytes()
    for behind in (b"LIST" + struct.pack("<I", 400) + bytes(400), b"TAG" + b"a song".ljust(125), bytes(5000), b"\xff"):
        path.write_bytes(content + behind)
        assert len(load_audio(path)) == 1000
    empty = write(tmp_path / "b.wav", np.zeros((0, 1)))
    empty.write_bytes(empty.read_bytes() + b"LIST" + struct.pack("<I", 400) + bytes(400))
    with pytest.raises(DataError, match=r"b.wav: no audio in it"):
        load_audio(empty)


def test_an_empty_file_is_called_empty(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(DataError, match=r"a.wav: the file is empty \(0 bytes\)$"):
        load_audio(tmp_path / "a.wav")
    with pytest.raises(DataError, match=r"gone.wav: cannot decode the audio \(No such file or directory\)$"):
        load_audio(tmp_path / "gone.wav")


# ---------------------------------------------------------------------------- durations and segments


def test_a_duration_without_an_offset_is_the_beginning(tmp_path):
    """NeMo takes the first seconds; what a rounded duration leaves over is no reason to cut a file."""
    path = write(tmp_path / "a.wav", noise(32_000), subtype="FLOAT")
    whole = load_audio(path)
    assert torch.equal(load_audio(path, None, 0.5), whole[:8000])
    assert torch.equal(torch.cat(list(audio_blocks(path, None, 1.5, seconds=0.01))), whole[:24_000])
    for duration in (1.9, 1.95, 2.0, 2.04, 2.1):
        assert torch.equal(load_audio(path, None, duration), whole)
        assert torch.equal(torch.cat(list(audio_blocks(path, None, duration, seconds=0.05))), whole)
    assert len(load_audio(path, None, 1.8)) == 28_800
    with pytest.raises(DataError, match=r"a.wav: truncated audio: 2.00 s decoded where the manifest says 2.20 s"):
        load_audio(path, None, 2.2)


def test_a_segment_may_end_a_frame_behind_its_recording(tmp_path):
    path = write(tmp_path / "a.wav", noise(32_000))
    assert len(load_audio(path, 1.0, 1.01)) == 16_000
    with pytest.raises(DataError, match=r"a.wav, 1 s to 2.02 s: truncated audio: 1.00 s decoded where the manifest"):
        load_audio(path, 1.0, 1.02)
    with pytest.raises(DataError, match=r"a.wav, 2.5 s to 3.5 s: no audio in it from 2.5 s on"):
        load_audio(path, 2.5, 1.0)
    with pytest.raises(DataError, match=r"a.wav, 2.5 s to its end: no audio in it from 2.5 s on"):
        load_audio(path, 2.5)
    assert math.isclose(len(load_audio(path, 0, 2.05)), 32_000)  # a rounded length of the whole file


def test_a_short_soak_of_recordings_and_manifests(capsys):
    assert recordings.recordings(80, seed=0, manifests=60), capsys.readouterr().out
    assert "and 60 manifests with a fault each: crashes 0, silent 0; " in capsys.readouterr().out
