"""python -m bench infer --ticket: bench/tickets.py on small tickets."""

import json
import re
from pathlib import Path

import pytest
import test_transcribe
import torch

import lottery
import models
from audio_lottery import files
from audio_lottery.sparse import DTYPES
from bench import __main__ as bench
from bench import tickets
from transcribe import load

ROOT = Path(tickets.__file__).resolve().parents[1]


@pytest.fixture
def corpus(tmp_path):
    """A folder of manifests with three of the demo's recordings as its test."""
    rows = [json.loads(line) for line in (ROOT / "demo" / "test.jsonl").read_text().splitlines()]
    rows = [row | {"audio_filepath": str(ROOT / "demo" / row["audio_filepath"])} for row in rows]
    rows = [row for row in rows if 1 < row["duration"] < 2]
    for name, chosen in ("train", rows[:1]), ("valid", rows[1:2]), ("test", rows[2:5]):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return tmp_path


@pytest.mark.skipif(not lottery.ops.compiled, reason="needs the compiled extension")
@pytest.mark.parametrize("backbone", list(models.BACKBONES))
def test_each_way_is_measured_and_drawn(backbone, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sparse = test_transcribe.ticket(tmp_path, backbone)
    _, ticket = load(sparse)
    dense, everything = tmp_path / "dense.safetensors", {n: torch.ones_like(m) for n, m in ticket.masks.items()}
    files.save_ticket(dense, everything, None, ticket.trained, ticket.info)
    picture = tmp_path / "ways.png"
    argv = ["infer", "--ticket", str(dense), str(sparse), "--data", str(corpus), "--repeats", "1"]
    assert bench.main([*argv, "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^  (\S+: .+?) +(\d+\.\d+) \[\d+\.\d+, \d+\.\d+\] +(\d+) .* ([\d.]+) x$", out, re.M)
    kept = sum(int(m.sum()) for m in ticket.masks.values()) / sum(m.numel() for m in ticket.masks.values())
    whole, part = f"{tmp_path.name}: dense, ", f"{sparse.parent.name}: {kept:.1%}, single weights, "
    fused = ["fused"] * (backbone == "conformer")
    wanted = [whole + way for way in ("torch float32", *fused, "torch.ao int8", "onnxruntime int8")]
    wanted += [part + way for way in ("masked in torch", *DTYPES)]
    assert [name for name, *_ in rows] == wanted
    masked, compressed = rows[-1 - len(DTYPES) :][:2]
    assert rows[0][3] == "1.00" and rows[0][2] == masked[2] == compressed[2] == "3"  # texts as in torch
    assert masked[1] == compressed[1] and (not fused or rows[1][2] == "3")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("backbone", list(models.BACKBONES))
def test_onnxruntime_int8_says_what_torch_says_nearly(backbone, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, ticket = load(test_transcribe.ticket(tmp_path, backbone))
    quantized, size = tickets.onnxruntime_int8(model, ticket.info["tokens"])
    assert size > 0
    for frames in (80, 133):  # of any length
        features, lengths = torch.randn(1, frames, models.CnnLstm.BINS[model.features]), torch.tensor([frames])
        with torch.inference_mode():
            if backbone == "rnnt":
                got, want = (m.every_second(*m.encode(features, lengths))[0] for m in (quantized, model))
                assert quantized.greedy_loop is not None and len(quantized.transcribe(features, lengths)) == 1
            else:
                (got, counted), (want, _) = (m(features, lengths) for m in (quantized, model))
                assert counted.tolist() == [want.shape[1]]
        assert (got - want).abs().mean() < 0.1 < 1 < want.abs().mean()


def test_a_picture_is_of_tickets(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["infer", "--picture", "a.png"])
    assert stopped.value.code == 2 and "--picture is of infer --ticket" in capsys.readouterr().err


@pytest.mark.skipif(not lottery.ops.compiled, reason="needs the compiled extension")
def test_wrong_input_is_one_line(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tickets.infer, "validate", lambda: None)
    path = str(test_transcribe.ticket(tmp_path, "conformer"))
    infer = ["infer", "--data", str(corpus), "--repeats", "1", "--ticket"]
    assert bench.main([*infer, path, "--picture", str(tmp_path / "none" / "a.png")]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "none" in told.err and told.out == ""  # before anything is measured
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    assert bench.main([*infer, str(broken)]) == 2
    assert str(broken) in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"two tickets would both be called .*single weights, masked in torch"):
        bench.main([*infer, path, path])


def test_a_dense_peer_quantizes_pointwise_convolutions_too():
    torch.manual_seed(0)
    model, x, lengths = models.build("conformer", "demo", 9).eval(), torch.randn(1, 60, 80), torch.tensor([60])
    linear = tickets.infer.to_quantize(model)
    small = [
        m for m in tickets.infer.quantized(linear).modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)
    ]
    dense = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    pointwise = [m for m in model.modules() if isinstance(m, torch.nn.Conv1d) and m.kernel_size == (1,)]
    assert len(small) == len(dense) + len(pointwise) > len(dense)
    with torch.no_grad():
        assert torch.allclose(linear(x, lengths)[0], model(x, lengths)[0], atol=1e-5)
