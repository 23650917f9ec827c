"""lab/choice.py: when layers are measured, what is kept of it, and what becomes of damage."""

import itertools
import json
import math
import os
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import test_transcribe
import torch
from torch import nn

import data
import lottery
import transcribe
from audio_lottery import compression
from lab import choice

X = torch.randn(4, 60, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "audio-lottery" / "choices"


@pytest.fixture
def fast(monkeypatch):
    """What is sparse is fastest; how often something was timed."""
    timed = []

    def times(candidates, *_):
        timed.append(list(candidates))
        return {name: 0.0 if name in ("unstructured", "ours") else 1.0 for name in candidates}

    monkeypatch.setattr(compression, "time_calls", times)
    return timed


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60))
    masks = {name: torch.rand_like(weight) < 0.1 for name, weight in lottery.prunable(model).items()}
    return model, masks


def chosen(seconds, **how):
    model, masks = network()
    return choice.choose(model, masks, lambda m: m(X), seconds, **how)


def layouts(found):
    return [type(layer).__name__ for layer in found.model]


def test_little_audio_is_not_measured_for(cache, fast):
    found = chosen(599.0)
    assert found.told.startswith("dense products: 599 s of audio do not repay measuring, which 10 minutes do")
    assert layouts(found) == ["Linear"] * 2 and not fast and not cache.exists()
    model, masks = network()
    for name, weight in lottery.prunable(model).items():
        weight.data.masked_fill_(~masks[name], 0)
    assert torch.equal(found.model(X), model(X))


@pytest.mark.parametrize("seconds", [600.0, math.inf])
def test_measured_once_and_kept(seconds, cache, fast):
    first = chosen(seconds)
    assert layouts(first) == ["Product"] * 2 and "2 of 2 weights (all); measured in " in first.told and len(fast) == 3
    (kept,) = cache.iterdir()
    assert json.loads(kept.read_text())["layers"] == {"0.weight": "unstructured", "1.weight": "unstructured"}
    again = chosen(1.0)  # now it costs nothing
    assert layouts(again) == ["Product"] * 2 and again.told.endswith("; as measured before") and len(fast) == 3
    assert torch.equal(again.model(X), first.model(X))
    chosen(1.0, anew=True)
    assert len(fast) == 6
    for other in ({"dtype": "int8"}, {"use": "chunks"}):
        assert layouts(chosen(1.0, **other)) == ["Linear"] * 2


def test_each_part_of_the_key_counts(cache, fast, monkeypatch):
    chosen(math.inf)
    model, masks = network()
    assert choice.read(choice.key_of(masks, "float32", ""), masks)
    other, has = {name: ~mask for name, mask in masks.items()}, choice.byte_lanes()
    assert not choice.read(choice.key_of(other, "float32", ""), masks)
    for where, name, value in (
        (choice, "processor", lambda: "another"), (choice.torch, "get_num_threads", lambda: 99),
        (choice.torch, "__version__", "0"), (choice, "__version__", "0"),
        (lottery, "ops", types.SimpleNamespace(path="another", compiled=False)), (choice, "WAYS", choice.WAYS[1:]),
        (choice, "byte_lanes", lambda: 24 - has),
    ):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(where, name, value)
            assert not choice.read(choice.key_of(masks, "float32", ""), masks), name


def test_damage_is_measured_anew(cache, fast):
    chosen(math.inf)
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    found = json.loads(whole)
    layers = found["layers"]
    for content in (
        b"", whole[:-9], b"[]", whole.replace(b"unstructured", b"other"), b"x" * (choice.LIMIT + 1),
        json.dumps(found | {"layers": {"0.weight": "16x1"}}).encode(),
        json.dumps(found | {"layers": layers | {"2.weight": "16x1"}}).encode(),
        json.dumps(found | {"key": found["key"] | {"threads": 0}}).encode(), json.dumps(found | {"more": 1}).encode(),
    ):  # fmt: skip
        kept.write_bytes(content)
        assert chosen(math.inf).told.count("measured in ") == 1 and kept.read_bytes() == whole
    kept.unlink()
    kept.mkdir()  # cannot be read, and not be written
    assert "measured in " in chosen(math.inf).told and "do not repay" in chosen(1.0).told


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, fast, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "measured in " in chosen(math.inf).told
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choice.folder() == tmp_path / ".cache" / "audio-lottery" / "choices"

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(choice.Path, "home", homeless)
    assert "measured in " in chosen(math.inf).told


def test_seconds_ahead_by_hand(tmp_path):
    soundfile.write(tmp_path / "two.wav", np.zeros(16_000), 8_000)
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    two, broken = (data.Utterance(tmp_path / name, "") for name in ("two.wav", "broken.wav"))
    part = data.Utterance(tmp_path / "two.wav", "", offset=0.5)
    segment = data.Utterance(tmp_path / "two.wav", "", offset=0.5, duration=0.25)
    assert choice.seconds_ahead([two, broken, part, segment, data.Utterance(tmp_path / "gone", "")]) == 3.75
    (tmp_path / "two.raw").write_bytes((tmp_path / "two.wav").read_bytes())  # a name that soundfile takes at its word
    (tmp_path / "none.raw").write_bytes(bytes(100))
    assert choice.seconds_ahead([data.Utterance(tmp_path / f"{name}.raw", "") for name in ("two", "none")]) == 2.0
    assert choice.seconds_ahead([two] * 400) == 600.0  # no file is opened behind what is enough
    assert choice.seconds_ahead(itertools.repeat(two)) == 600.0
    assert choice.seconds_ahead([data.Utterance(Path("-"), "")]) == math.inf
    os.mkfifo(tmp_path / "pipe")
    assert choice.seconds_ahead([data.Utterance(tmp_path / "pipe", "")]) == math.inf  # and it was not waited for


def test_which_layers_is_said_on_one_line():
    layers = {f"{name}.weight": "16x1" for name in "abc"}
    assert choice.said(layers) == "sparse products for 3 of 3 weights (all)"
    assert (
        choice.said(layers | {"d.weight_ih_l0": "dense"})
        == "sparse products for 3 of 4 weights (all but d.weight_ih_l0)"
    )
    assert choice.said({"a.weight": "dense prepacked", "b.weight": "dense"}) == "sparse products for 0 of 2 weights"
    assert choice.said({"a.weight": "1x4", "b.weight": "dense"}) == "sparse products for 1 of 2 weights (a)"


def test_the_command_line_chooses_once(tmp_path, cache, fast, capsys, monkeypatch):
    ticket = test_transcribe.ticket(tmp_path, "rnnt")
    audio = str(test_transcribe.DEMO / "audio" / "conf-getpin.opus")

    def told(*flags) -> str:
        assert transcribe.main([str(ticket), audio, *flags]) == 0
        return capsys.readouterr().err

    assert told().startswith("dense products: 2 s of audio do not repay measuring")
    monkeypatch.setattr(choice, "MINUTES", 0.01)
    assert "; measured in " in told()
    before = len(fast)
    assert "; as measured before\n" in told() and "; as measured before\n" in told(audio) and len(fast) == before
    assert "; measured in " in told("--stream")  # another use
    assert "; as measured before\n" in told("--stream") and "; measured in " in told("--stream", "--chunk", "1")
    assert "products" not in told("--dense")
    with pytest.raises(SystemExit):
        transcribe.main([str(ticket), audio, "--dense", "--measure"])
    assert "argument --measure: not allowed with argument --dense" in capsys.readouterr().err
