"""Ticket files: whole or refused, of this model or refused, and what a program goes on with."""

import pytest
import torch
from torch import nn

import lottery
from audio_lottery import files


def ticket_file(path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
    ticket = lottery.Ticket(model)
    ticket.prune(5)
    ticket.rewind()
    files.save_ticket(path, ticket.masks, ticket.rewind_state, model.state_dict(), {"tokens": ["é"]})
    return ticket, model


def test_a_ticket_comes_back_bit_for_bit(tmp_path):
    ticket, model = ticket_file(tmp_path / "t.safetensors")
    masks, rewind, trained, info = files.load_ticket(tmp_path / "t.safetensors")
    assert info == {"tokens": ["é"]} and lottery.sha256(masks) == lottery.sha256(ticket.masks)
    assert torch.equal(rewind["0.weight"], ticket.rewind_state["0.weight"] * masks["0.weight"])
    assert set(trained) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(trained[name], value)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]  # no temporary file left


def test_broken_ticket_files_are_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    _, model = ticket_file(path)
    whole = path.read_bytes()
    with pytest.raises(lottery.LotteryError, match=r"missing.safetensors: cannot read the ticket \(No such file"):
        files.load_ticket(tmp_path / "missing.safetensors")
    for broken in (b"", whole[:20], whole[:-1], whole[:-1] + b"x", whole + b"x", whole.replace(b"tokens", b"tokers")):
        path.write_bytes(broken)
        with pytest.raises(lottery.LotteryError, match=r"t.safetensors: not a whole ticket: "):
            files.load_ticket(path)
    files.write_sealed(path, "checkpoint", {}, {})
    with pytest.raises(lottery.LotteryError, match="it is a checkpoint of format"):
        files.load_ticket(path)


def test_a_ticket_sealed_again_with_other_metadata_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    ticket_file(path)
    tensors, about = files.read_sealed(path, "ticket")
    edits = [{k: v for k, v in about.items() if k != gone} for gone in ("shapes", "mask_sha256", "info")]
    edits += [about | {"shapes": [1]}, about | {"shapes": {"0.weight": [-1, 7]}}, about | {"mask_sha256": {}}]
    for edited in edits:
        fields = {k: v for k, v in edited.items() if k not in ("format", "kind")}
        files.write_sealed(path, "ticket", tensors, fields)
        with pytest.raises(lottery.LotteryError, match=r"t.safetensors: "):
            files.load_ticket(path)
    fields = {k: v for k, v in about.items() if k not in ("format", "kind")}
    files.write_sealed(path, "ticket", tensors | {"noslash": torch.zeros(1)}, fields)
    with pytest.raises(lottery.LotteryError, match=r"t.safetensors: "):
        files.load_ticket(path)


def test_a_ticket_is_for_its_model(tmp_path):
    path = tmp_path / "t.safetensors"
    _, model = ticket_file(path)
    assert files.load_ticket(path, model).info == {"tokens": ["é"]}
    for other in (nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4)), nn.Sequential(nn.Linear(7, 3)), nn.Linear(7, 3)):
        with pytest.raises(lottery.LotteryError, match="are not"):
            files.load_ticket(path, other)


def test_a_ticket_without_its_rewind_state_is_small(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(1000, 1000)
    ticket = lottery.Ticket(model)
    ticket.prune(100_000)
    ticket.rewind()
    files.save_ticket(tmp_path / "t", ticket.masks, None, model.state_dict(), {})
    assert files.load_ticket(tmp_path / "t").rewind is None
    assert (tmp_path / "t").stat().st_size <= 0.14 * 4 * sum(p.numel() for p in model.parameters())


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "t"
    files.write_atomically(path, b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["t"]


def test_masks_as_bits():
    for n in (0, 1, 7, 8, 9, 1000):
        mask = torch.rand(n) < 0.5
        assert len(files.pack_bits(mask)) == (n + 7) // 8 and torch.equal(
            files.unpack_bits(files.pack_bits(mask), [n]), mask
        )
    for packed, shape in ((torch.tensor([255], dtype=torch.uint8), [7]), (torch.zeros(2, dtype=torch.uint8), [8])):
        with pytest.raises(ValueError, match="bytes of mask for the shape"):
            files.unpack_bits(packed, shape)
