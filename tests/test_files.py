"""Sealed files that lie, and what is written where."""

import errno
import os

import pytest
import torch

import lottery
from audio_lottery import __main__ as command
from audio_lottery import console, files


@pytest.fixture
def ticket(tmp_path):
    model = torch.nn.Linear(3, 2)
    found = lottery.Ticket(model)
    found.prune(4)
    files.save_ticket(tmp_path / "t", found.masks, found.rewind_state, model.state_dict(), {"tokens": ["a"]})
    return tmp_path / "t"


def refused(path, kind="ticket"):
    with pytest.raises(lottery.LotteryError) as error:
        files.read_sealed(path, kind)
    return str(error.value)


def test_a_file_that_is_larger_or_smaller_than_its_header_says_is_not_read(ticket, tmp_path):
    whole = ticket.read_bytes()
    with open(ticket, "r+b") as file:
        file.truncate(2**40)  # takes no room on the disk
    assert "1,099,511,627,776 bytes where its header says " in refused(ticket)
    ticket.write_bytes(whole[:-1])
    assert f"{len(whole) - 1} bytes where its header says {len(whole)}" in refused(ticket).replace(",", "")
    for length in (0, 1, 2**62, len(whole), 17 * 2**20):
        ticket.write_bytes(length.to_bytes(8, "little") + whole[8:])
        assert f"a header of {length:,} bytes in {len(whole):,}" in refused(ticket)
    for inner, why in (
        (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "its header: not JSON that can be read (deeper than 32 levels)"),
        (b"}", "its header: not JSON that can be read (Expecting"),
    ):
        seal = b'{"__metadata__":{"about":"sha256:' + b"0" * 64 + b' {}"},"x":' + inner
        whole = len(seal).to_bytes(8, "little") + seal
        at = whole.index(files.SEAL) + len(files.SEAL)
        ticket.write_bytes(whole[:at] + files.digest(whole, at).encode() + whole[at + 64 :])
        assert why in refused(ticket)


def test_what_is_no_regular_file_is_not_read(ticket, tmp_path):
    ticket.unlink()
    ticket.symlink_to("/dev/zero")
    assert refused(ticket) == f"{ticket}: cannot read the ticket (not a regular file)"
    ticket.unlink()
    os.mkfifo(ticket)
    assert refused(ticket) == f"{ticket}: cannot read the ticket (not a regular file)"


@pytest.mark.parametrize("info", [None, [], 5, "x"])
def test_info_is_an_object(info, ticket):
    _, _, trained, _ = file = files.load_ticket(ticket)
    files.save_ticket(ticket, file.masks, None, trained, info)
    with pytest.raises(lottery.LotteryError, match=r"t: not a whole ticket: its metadata, info: must be an object"):
        files.load_ticket(ticket)


@pytest.mark.parametrize(
    "shape, why",
    [
        ([10**9, 10**9], "bytes of mask for the shape"),
        ([2**62], "must be a whole number from 0 to 2147483647"),
        ([-1, 6], "must be a whole number"),
        ([2.0, 3], "must be a whole number"),
        ("x", "must be a list"),
    ],
)
def test_shapes_that_the_bits_do_not_confirm(shape, why, ticket):
    tensors, about = files.read_sealed(ticket, "ticket")
    about["shapes"]["weight"] = shape
    files.write_sealed(ticket, "ticket", tensors, {k: v for k, v in about.items() if k not in ("format", "kind")})
    with pytest.raises(lottery.LotteryError) as error:
        files.load_ticket(ticket)
    assert str(error.value).startswith(f"{ticket}: ") and why in str(error.value)


def test_tensors_that_are_of_no_ticket(ticket):
    tensors, about = files.read_sealed(ticket, "ticket")
    about = {key: value for key, value in about.items() if key not in ("format", "kind")}
    for change, why in (
        ({"other/weight": torch.zeros(1)}, "other/weight is no part of one"),
        ({"mask/more": torch.zeros(1, dtype=torch.uint8)}, "masks and shapes do not fit"),
        ({"trained/weight": None}, "it has no trained/weight"),
        ({"rewind/weight": None}, "it has no rewind/weight"),
    ):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        files.write_sealed(ticket, "ticket", changed, about)
        with pytest.raises(lottery.LotteryError, match=why):
            files.load_ticket(ticket)


# ---------------------------------------------------------------------------- writing


def test_only_regular_files_and_new_names_are_written_to(ticket, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "full").symlink_to("/dev/full")
    for name in ("pipe", "full", "."):
        path = tmp_path / name
        before = os.stat(path).st_ino
        assert command.main(["copy", str(ticket), str(path)]) == 2
        said = capsys.readouterr().err
        assert said == f"audio-lottery: error: {path}: not a regular file: only those, and new names, are written to\n"
        assert os.stat(path).st_ino == before
    assert command.main(["copy", str(ticket), str(tmp_path / "gone" / "t")]) == 2
    said = capsys.readouterr().err
    assert said == f"audio-lottery: error: {tmp_path}/gone/t: no such folder: {tmp_path}/gone\n"
    (tmp_path / "new.tmp").symlink_to(tmp_path / "elsewhere")  # somebody's link where the temporary file goes
    assert command.main(["copy", str(ticket), str(tmp_path / "new")]) == 0
    assert not (tmp_path / "elsewhere").exists() and files.load_ticket(tmp_path / "new").info == {"tokens": ["a"]}


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError) as error:
        files.write_atomically(tmp_path / "t", b"new")
    assert (error.value.filename, error.value.strerror) == (str(tmp_path / "t"), "File too large")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_system_is_its_path_and_why(capsys):
    assert console.fail("x", FileNotFoundError(2, "No such file or directory", "a\x1b\nb")) == 2
    assert capsys.readouterr().err == "x: error: a\\x1b b: No such file or directory\n"
