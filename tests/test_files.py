"""Sealed files: whole or refused, of this model or refused, what a program goes on with, files that lie."""

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lottery
from audio_lottery import __main__ as command
from audio_lottery import console, files


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
    masks, rewind, trained, info, rewind_sha256 = files.load_ticket(tmp_path / "t.safetensors")
    assert rewind_sha256 == lottery.sha256(rewind)
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


# ---------------------------------------------------------------------------- going on


def train_a_step(ticket):
    ticket.model(torch.ones(4, 7)).square().sum().backward()
    ticket.hold()
    with torch.no_grad():
        for parameter in ticket.model.parameters():
            parameter -= 0.1 * parameter.grad
    ticket.stepped()


def test_a_program_goes_on_with_a_ticket(tmp_path):
    path = tmp_path / "t.safetensors"
    ticket, model = ticket_file(path)
    torch.manual_seed(2)
    other = nn.Sequential(nn.Linear(7, 3), nn.BatchNorm1d(3))
    again = lottery.Ticket(other)
    files.restore_ticket(again, files.load_ticket(path, other), round=4)
    assert again.round == 4 and again.kept == 5 and again.start_sha256 == ticket.start_sha256
    for name, value in lottery.state_of(model).items():
        assert torch.equal(lottery.state_of(other)[name], value)
    train_a_step(ticket)
    train_a_step(again)
    again.check()
    assert lottery.sha256(lottery.state_of(other)) == lottery.sha256(lottery.state_of(model))


def test_a_search_goes_on_from_a_file(tmp_path):
    """The round of the file is trained again, and the next ones are those of a search that never stopped."""

    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))

    path, rows = tmp_path / "t.safetensors", []
    for found in lottery.find_ticket(net := model(), train_a_step, lambda m: {}, sparsity=0.6, rewind_step=1):
        rows.append(found.row)
        if found.row["round"] == 2:
            files.save_ticket(path, found.ticket.masks, found.ticket.rewind_state, net.state_dict(), found.row)

    def resume(ticket):
        file = files.load_ticket(path, ticket.model)
        files.restore_ticket(ticket, file, file.info["round"])
        ticket.threshold = file.info["threshold"]
        return file.info["parent_sha256"]

    torch.manual_seed(9)
    net = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    rest = lottery.find_ticket(net, train_a_step, lambda m: {}, sparsity=0.6, rewind_step=1, resume=resume)
    start = {"rewind_sha256": ""}  # the file's is 0 where it is pruned
    assert [found.row | start for found in rest] == [row | start for row in rows[2:]] and len(rows) == 5


def test_a_rewind_state_of_another_hash_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    ticket_file(path)
    tensors, about = files.read_sealed(path, "ticket")
    fields = {key: about[key] for key in ("shapes", "mask_sha256", "info")}
    files.write_sealed(path, "ticket", tensors, fields | {"rewind_sha256": "0" * 64})
    with pytest.raises(lottery.LotteryError, match="its rewind state does not have the hash the ticket states"):
        files.load_ticket(path)
    files.write_sealed(path, "ticket", tensors, fields)  # as an older version wrote it
    file = files.load_ticket(path)
    assert file.rewind_sha256 == lottery.sha256(file.rewind)


def test_going_on_with_another_ticket_is_refused_by_name(tmp_path):
    path = tmp_path / "t.safetensors"
    _, model = ticket_file(path)
    file = files.load_ticket(path)
    for ticket, message in (
        (lottery.Ticket(nn.Sequential(nn.Linear(7, 4))), r"0.weight: the file has a mask of \[3, 7\] for .* \[4, 7\]"),
        (lottery.Ticket(nn.Linear(7, 3)), r"0.weight: the file has a mask of \[3, 7\] for pruned weights of none"),
    ):
        with pytest.raises(lottery.LotteryError, match=message):
            files.restore_ticket(ticket, file)
    with pytest.raises(lottery.LotteryError, match="the file has no rewind state to go on from"):
        files.restore_ticket(lottery.Ticket(model), file._replace(rewind=None))
    with pytest.raises(
        lottery.LotteryError, match="round 0 starts before step 2, which is all that the file has of it"
    ):
        files.restore_ticket(lottery.Ticket(model, rewind_step=2), file, round=0)


def test_a_ticket_of_a_model_with_excluded_weights_and_hidden_buffers(tmp_path):
    """Excluded weights have no mask; buffers that a state_dict leaves out are rewound to, infinite ones too."""

    class Masked(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Linear(7, 3), nn.Linear(3, 2))
            self.register_buffer("mask", torch.tensor([0.0, float("-inf")]), persistent=False)

    path, model = tmp_path / "t.safetensors", Masked()
    ticket = lottery.Ticket(model, exclude="1")
    ticket.prune(5)
    ticket.rewind()
    files.save_ticket(path, ticket.masks, ticket.rewind_state, model.state_dict(), {})
    model.mask.fill_(3)
    file = files.load_ticket(path, model)
    assert file.masks.keys() == {"0.weight"} and "mask" in file.rewind and "mask" not in file.trained
    with pytest.raises(lottery.LotteryError, match="mask has a NaN or infinite value"):
        files.load_ticket(path)  # without the model nothing says that it is a buffer
    with pytest.raises(lottery.LotteryError, match=r"1.weight: the file has a mask of none"):
        files.restore_ticket(lottery.Ticket(model), file)
    again = lottery.Ticket(model, exclude="1")
    files.restore_ticket(again, file)
    assert model.mask.tolist() == [0, float("-inf")] and again.start_sha256 == ticket.start_sha256
    model.mask[0] = float("nan")
    with pytest.raises(lottery.LotteryError, match=r"t\.safetensors: mask has a NaN or infinite value"):
        files.save_ticket(path, ticket.masks, lottery.copy_state(model), model.state_dict(), {})
    assert files.load_ticket(path, model).masks.keys() == {"0.weight"}  # what was there is there


def test_a_ticket_that_could_not_be_read_again_is_not_written(tmp_path):
    model = nn.Linear(3, 2)
    masks, state = {"weight": torch.ones(2, 3, dtype=torch.bool)}, model.state_dict()
    path = str(tmp_path / "t.safetensors")  # a path may be text
    for value in (float("nan"), float("inf")):
        broken = {**state, "weight": state["weight"] * value}
        for rewind, trained in ((broken, state), (state, broken), (None, broken)):
            with pytest.raises(lottery.LotteryError, match=r"t\.safetensors: weight has a NaN or infinite value"):
                files.save_ticket(path, masks, rewind, trained, {})
    for rewind, trained, part in ((state, {}, "trained"), ({"bias": state["bias"]}, state, "rewind")):
        with pytest.raises(lottery.LotteryError, match=f"t.safetensors: weight has a mask, and no {part} weight"):
            files.save_ticket(path, masks, rewind, trained, {})
    assert not list(tmp_path.iterdir())
    files.save_ticket(path, masks, None, state, {})
    assert torch.equal(files.load_ticket(path, model).trained["weight"], state["weight"])


def test_the_program_in_the_readme_runs_word_for_word(tmp_path, monkeypatch, capsys):
    readme = (Path(files.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    exec(compile(program, "README.md", "exec"), names)
    out = capsys.readouterr().out
    assert out.count("% remain, accuracy ") == 12 and "10.0% remain, accuracy " in out
    (again,) = re.findall(r"trained again: accuracy (\S+)", out)
    assert float(again) == pytest.approx(names["found"].row["accuracy"], abs=5e-4)  # the same masks from the same start
    assert float(again) > 0.5 and [path.name for path in tmp_path.iterdir()] == ["ticket.safetensors"]
    assert {type(row).__name__ for row in names["rows"]} == {"Taken"}


# ---------------------------------------------------------------------------- files that lie


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
    file = files.load_ticket(ticket)
    before = ticket.read_bytes()
    with pytest.raises(lottery.LotteryError, match=r"t: its metadata, info: must be an object"):
        files.save_ticket(ticket, file.masks, None, file.trained, info)
    assert ticket.read_bytes() == before


@pytest.mark.parametrize(
    "info, why",
    [
        ({"loss": float("nan")}, r"t: its metadata: not JSON that can be read \(the number NaN"),
        ({"n": 2**63}, "t: its metadata: not JSON that can be read"),
        ({1: "a", "1": "b"}, "t: its metadata: not JSON that can be read"),
        ({"text": "\ud800"}, "t: its metadata: not JSON that can be read"),
        ({"long": "x" * files.HEADER}, "t: a header of 16,777,216 bytes and a file of "),
    ],
)
def test_a_good_ticket_is_not_written_over_by_one_that_cannot_be_read(info, why, ticket):
    file, before = files.load_ticket(ticket), ticket.read_bytes()
    with pytest.raises(lottery.LotteryError, match=why):
        files.save_ticket(ticket, file.masks, file.rewind, file.trained, info)
    assert ticket.read_bytes() == before


def test_a_ticket_of_nothing_that_would_fill_the_memory(tmp_path, monkeypatch):
    masks = {"w": torch.zeros(1000, 1000, dtype=torch.bool)}
    weight = {"w": torch.zeros(1000, 1000, dtype=torch.float64)}
    files.save_ticket(tmp_path / "t", masks, weight, weight, {})
    monkeypatch.setattr(files, "LARGEST", 16_999_999)
    with pytest.raises(
        lottery.LotteryError, match=r"t: its weights would take 17,000,000 bytes of memory \(16,999,999"
    ):
        files.load_ticket(tmp_path / "t")


@pytest.mark.parametrize(
    "shape, why",
    [
        ([10**9, 10**9], "its weights would take 9,000,000,000,000,000,000 bytes of memory"),
        ([20, 30], "bytes of mask for the shape"),
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
