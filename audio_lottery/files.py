"""Files of tensors: masks, checkpoints and tickets, each written whole or not at all.

Every one is a safetensors file with one metadata entry, "about": a SHA-256 of the whole file, its own digits taken as
zeros, and JSON. The size is checked before the file is read, and the hash before anything is parsed, so that damage has
one outcome: LotteryError.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Container, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from audio_lottery import checked
from lottery import LotteryError, Masks, State, Ticket, copy_state, prunable, sha256, state_of

FORMAT = "audio-lottery 1"
SEAL = b'"about":"sha256:'
HEADER = 16 * 2**20  # bytes of a header, at most: of a million names and numbers
LARGEST = 2**34  # bytes of a file, at most

DIMENSIONS = checked.listed(checked.integer(0, 2**31 - 1), 0, 8)
SHAPES = checked.keyed(DIMENSIONS)
TENSOR = checked.record(
    {
        "dtype": checked.text(most=20), "shape": DIMENSIONS,
        "data_offsets": checked.listed(checked.integer(0, LARGEST), 2, 2),
    },
    others=False,
)  # fmt: skip
METADATA = checked.record({"about": checked.text(most=HEADER)}, others=False)
CONTENTS = checked.record({"__metadata__": METADATA})
OFFSETS = re.compile(rb'"data_offsets":\[\d{1,15},(\d{1,15})\]')  # as safetensors writes them
MASKS = checked.record({"shapes": SHAPES})
TICKET = checked.record(
    {"shapes": SHAPES, "mask_sha256": checked.keyed(checked.SHA256), "info": checked.OBJECT},
    {"rewind_sha256": checked.SHA256},
)


# ---------------------------------------------------------------------------- writing


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError in here names `path`, whatever call it came from: a full disk has no name for what it is full of."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def check_target(path: Path) -> None:
    """Raise OSError, naming the path, unless a file can be written there: over a regular one, or under a new name."""
    with naming(path):
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise OSError(errno.EINVAL, "not a regular file: only those, and new names, are written to")
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise OSError(errno.ENOENT, f"no such folder: {path.parent}") from None
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def write_atomically(path: Path, content: bytes, suffix: str = ".tmp") -> None:
    """Write to a temporary file, fsync, rename, fsync the folder: the file is whole, old or new, at any instant.

    suffix: of the temporary file; processes that may write one file at once need one each.
    Raises OSError, naming the path; also if it is a folder, a device or a pipe, which a rename would replace.
    """
    check_target(path)
    temporary = path.with_name(path.name + suffix)
    with naming(path):
        temporary.unlink(missing_ok=True)
        try:
            with open(temporary, "xb") as file:  # x: never through a link that lies there
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---------------------------------------------------------------------------- sealed files


def digest(content: bytes, at: int) -> str:
    """SHA-256 of content with the 64 digits at `at` as zeros."""
    found = hashlib.sha256(memoryview(content)[:at])
    found.update(b"0" * 64)
    found.update(memoryview(content)[at + 64 :])
    return found.hexdigest()


def write_sealed(path: Path, kind: str, tensors: dict[str, Tensor], about: dict) -> None:
    """Write tensors and JSON to one file, whole or not at all. Raises LotteryError for JSON that would not be read."""
    try:
        said = json.dumps({"format": FORMAT, "kind": kind, **about})
    except (TypeError, ValueError, RecursionError) as error:
        raise LotteryError(f"{path}: its metadata is no JSON: {error}") from None
    checked.parse(said, f"{path}: its metadata", checked.OBJECT)  # before it takes the place of a good one
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(ready, {"about": f"sha256:{'0' * 64} {said}"})
    if int.from_bytes(content[:8], "little") > HEADER or len(content) > LARGEST:
        raise LotteryError(f"{path}: a header of {HEADER:,} bytes and a file of {LARGEST:,} are the most that is read")
    at = content.index(SEAL) + len(SEAL)
    stated = digest(content, at).encode()
    write_atomically(path, content[:at] + stated + content[at + 64 :])


def read_sealed(path: Path, kind: str, shape: checked.Shape = checked.OBJECT) -> tuple[dict[str, Tensor], dict]:
    """Returns tensors and JSON, the latter of the shape.

    Raises LotteryError, naming the file, unless it is a regular file, whole, and of this kind. What is no such file, or
    larger or smaller than its header says, is refused before it is read.
    """
    with checked.opened(path, kind) as (number, size):
        try:
            content = _whole(number, size)
            about = checked.parse(_about(content), "its metadata", checked.OBJECT)
            if (about.get("format"), about.get("kind")) != (FORMAT, kind):
                found = f"a {about.get('kind')} of format {about.get('format')!r}"
                raise ValueError(f"it is {found}, not a {kind} of {FORMAT!r}")
            shape(about, "its metadata")
            return safetensors.torch.load(content), about
        except OSError:
            raise
        except Exception as error:  # whatever damage makes the readers above raise
            raise LotteryError(f"{path}: not a whole {kind}: {error}") from None


def _whole(number: int, size: int) -> bytes:
    """The bytes of an open file. Raises ValueError, before they are read, if its header tells of more or fewer."""
    start = checked.read_on(number, min(size, 2**16))
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or not 2 <= length <= min(HEADER, size - 8):
        raise ValueError(f"a header of {length:,} bytes in {size:,} (2 to {HEADER:,} are read)")
    start += checked.read_on(number, 8 + length - len(start))
    ends = OFFSETS.findall(start, 8, 8 + length)
    end = 8 + length + max(map(int, ends), default=0)
    if end != size or size > LARGEST:
        raise ValueError(f"{size:,} bytes where its header says {end:,} ({LARGEST:,} at most)")
    return start + checked.read_on(number, end - len(start))


def _about(content: bytes) -> str:
    """The JSON of the metadata. Raises ValueError unless the content has the hash it states, and tensors of a shape."""
    at = content.index(SEAL) + len(SEAL)
    if content[at : at + 64] != digest(content, at).encode():
        raise ValueError("its content does not have the hash it states")
    header = checked.parse(content[8 : 8 + int.from_bytes(content[:8], "little")], "its header", CONTENTS)
    for name, row in header.items():
        if name != "__metadata__":
            TENSOR(row, f"its header, {name}")
    about = header["__metadata__"]["about"]
    if not about.startswith(f"sha256:{content[at : at + 64].decode()} "):  # another text that looks like the seal
        raise ValueError("its hash does not stand where it belongs")
    return about[len("sha256:") + 65 :]


def pack_bits(mask: Tensor) -> Tensor:
    """A mask as bits, (ceil(n / 8),) uint8, the lowest bit first."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))


def unpack_bits(bits: Tensor, shape: list[int]) -> Tensor:
    """Raises ValueError unless `bits` are as many as the shape needs, the unused ones 0."""
    n = math.prod(shape)
    if bits.dim() != 1 or bits.dtype != torch.uint8 or len(bits) != (n + 7) // 8:
        raise ValueError(f"{bits.numel()} bytes of mask for the shape {shape}")
    mask = torch.from_numpy(np.unpackbits(bits.numpy(), bitorder="little").astype(bool))
    if mask[n:].any():
        raise ValueError(f"{bits.numel()} bytes of mask for the shape {shape}, with bits behind its end")
    return mask[:n].view(shape)


def save_masks(path: Path, masks: Masks) -> None:
    """Write masks alone, as bits."""
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    write_sealed(path, "masks", {name: pack_bits(mask) for name, mask in masks.items()}, {"shapes": shapes})


def load_masks(path: Path) -> Masks:
    tensors, about = read_sealed(path, "masks", MASKS)
    return _unpacked(path, tensors, about["shapes"])


def _unpacked(path: Path, tensors: dict[str, Tensor], shapes: dict[str, list[int]]) -> Masks:
    if tensors.keys() != shapes.keys():
        raise LotteryError(f"{path}: masks and shapes do not fit: they are of other weights")
    if (size := 2 * sum(map(math.prod, shapes.values()))) > LARGEST:  # a bit of the file is two bytes
        raise LotteryError(f"{path}: its masks would take {size:,} bytes of memory ({LARGEST:,} at most)")
    try:
        return {name: unpack_bits(tensors[name], shape) for name, shape in shapes.items()}
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise LotteryError(f"{path}: masks and shapes do not fit: {error}") from None


class TicketFile(NamedTuple):
    masks: Masks
    rewind: State | None  # full tensors, 0 where pruned; None in a ticket without it
    trained: State
    info: dict
    rewind_sha256: str | None = None  # of the rewind state, also where it is left out; None if neither is there


def save_ticket(
    path: Path, masks: Masks, rewind: State | None, trained: State, info: dict, rewind_sha256: str | None = None
) -> None:
    """Write a ticket: masks as bits, rewind and trained values at kept places only, all else (biases, norms) whole.

    rewind: None leaves it out; rewind_sha256 is then its hash, with 0 where pruned (TicketFile's), if that is known.
    info: whatever rebuilds the model (JSON), kept in the file's metadata.
    Raises LotteryError, naming it, for what load_ticket would refuse: no mask at all, a mask of no weight, a NaN, an
    infinite value of a masked weight, and info that is no JSON or has a NaN in it. What was there stays then.
    """
    path = Path(path)
    if not any(mask.numel() for mask in masks.values()):
        raise LotteryError(f"{path}: a ticket has a mask, and this has none")
    for part, state in (("rewind", rewind or trained), ("trained", trained)):
        for name in sorted(masks.keys() - state.keys()):
            raise LotteryError(f"{path}: {name} has a mask, and no {part} weight")
        check_finite(path, state, state.keys() - masks.keys())
    tensors = {f"mask/{name}": pack_bits(mask) for name, mask in masks.items()}
    for part, state in (("rewind", rewind or {}), ("trained", trained)):
        for name, value in state.items():
            tensors[f"{part}/{name}"] = value[masks[name]] if name in masks else value
    about = {
        "shapes": {name: list(mask.shape) for name, mask in masks.items()},
        "mask_sha256": {name: sha256({name: mask}) for name, mask in masks.items()},
        "info": info,
    }
    rewind_sha256 = sha256(kept_of(rewind, masks)) if rewind else rewind_sha256
    about |= {"rewind_sha256": rewind_sha256} if rewind_sha256 else {}
    TICKET(about, f"{path}: its metadata")
    write_sealed(path, "ticket", tensors, about)


def kept_of(state: State, masks: Masks) -> State:
    """The state with 0 where it is pruned, as a file's is read."""
    return {
        name: value.masked_fill(~masks[name].to(value.device), 0) if name in masks else value
        for name, value in state.items()
    }


def ticket_path(path: Path) -> Path:
    """The file of a ticket that is named by itself or by its run folder."""
    return path / "ticket.safetensors" if path.is_dir() else path


def load_ticket(path: Path, model: nn.Module | None = None) -> TicketFile:
    """Read and check a ticket: its hash, its masks' hashes and shapes, and, given a model, the model's scope.

    path: of its file or of its run folder.
    A parameter with two names is masked under its first alone: hold the ticket after loading a state into such a model.
    Raises LotteryError, naming the file, for anything that is not a whole, finite ticket (for this model).
    """
    path = ticket_path(Path(path))
    tensors, about = read_sealed(path, "ticket", TICKET)
    try:
        file = _ticket_of(path, tensors, about, dict(model.named_buffers()) if model is not None else {})
    except LotteryError:
        raise
    except Exception as error:  # metadata that a seal was put on again
        raise LotteryError(f"{path}: not a whole ticket: {type(error).__name__}: {error}") from None
    if model is not None:
        check_fit(path, file, model)
    return file


def check_fit(path: Path, file: TicketFile, model: nn.Module) -> None:
    """Raise LotteryError, naming the file, unless the ticket is of this model's scope and has this model's state."""
    shapes, masks = prunable(model), file.masks  # those that were excluded have no mask
    if not masks or any(name not in shapes or mask.shape != shapes[name].shape for name, mask in masks.items()):
        raise LotteryError(f"{path}: the ticket's masks are not of this model's prunable weights")
    own, least = state_of(model), model.state_dict().keys()

    def kind(name: str, value: Tensor) -> tuple:
        return value.dtype, value.shape if isinstance(own[name], nn.Parameter) else None  # a buffer may have grown

    for state in filter(None, (file.trained, file.rewind)):
        known = least <= state.keys() <= own.keys()
        if not known or any(kind(name, value) != kind(name, own[name]) for name, value in state.items()):
            raise LotteryError(f"{path}: the ticket's parameters are not this model's")


def restore_ticket(ticket: Ticket, file: TicketFile, round: int = 1) -> None:
    """Give a ticket of the same model the masks and the rewind state of a file: ready to be trained as in `round`.

    Raises LotteryError, naming the weight, for masks of other weights, and for a file without a rewind state.
    """
    for name in sorted(ticket.weights.keys() | file.masks.keys()):
        shapes = [list(part[name].shape) if name in part else "none" for part in (file.masks, ticket.weights)]
        if shapes[0] != shapes[1]:
            why = "" if shapes[0] != "none" else " (make the Ticket with the file's exclude)"
            raise LotteryError(f"{name}: the file has a mask of {shapes[0]} for pruned weights of {shapes[1]}{why}")
    if file.rewind is None:
        raise LotteryError("the file has no rewind state to go on from")
    if round == 0 and ticket.rewind_step:
        raise LotteryError(f"round 0 starts before step {ticket.rewind_step}, which is all that the file has of it")
    own, weights = state_of(ticket.model), ticket.weights
    ticket.masks = {n: torch.empty_like(w, dtype=torch.bool).copy_(file.masks[n]) for n, w in weights.items()}
    state = {n: value.to(own[n].device) if n in own else value for n, value in file.rewind.items()}
    ticket.rewind_state = copy_state(ticket.model) | state  # buffers that a state_dict leaves out may be missing there
    ticket.round = round
    ticket.rewind()


def check_finite(path: Path, state: State, buffers: Container[str] = ()) -> None:
    """Raise LotteryError, naming the file and the tensor, for a NaN or infinite value; buffers may be infinite."""
    for name, value in state.items():
        if value.isnan().any() or not (name in buffers or value.isfinite().all()):
            raise LotteryError(f"{path}: {name} has a NaN or infinite value")


def _ticket_of(path: Path, tensors: dict[str, Tensor], about: dict, buffers: Container[str]) -> TicketFile:
    in_memory = 0  # where nothing is kept, a bit of the file is a bool and two weights
    for name, shape in about["shapes"].items():
        weights = (tensors[key].element_size() for key in (f"trained/{name}", f"rewind/{name}") if key in tensors)
        in_memory += math.prod(shape) * (1 + sum(weights))
    if in_memory > LARGEST:
        raise LotteryError(f"{path}: its weights would take {in_memory:,} bytes of memory ({LARGEST:,} at most)")
    masks = _unpacked(path, {n[5:]: t for n, t in tensors.items() if n.startswith("mask/")}, about["shapes"])
    if about["mask_sha256"] != {name: sha256({name: mask}) for name, mask in masks.items()}:
        raise LotteryError(f"{path}: a mask does not have the hash the ticket states")
    if not any(mask.numel() for mask in masks.values()):
        raise LotteryError(f"{path}: not a whole ticket: it has no mask")
    states: dict[str, State] = {"rewind": {}, "trained": {}}
    for key, value in tensors.items():
        part, name = key.split("/", 1)
        if part not in states and part != "mask":
            raise LotteryError(f"{path}: not a whole ticket: {key} is no part of one")
        if part not in states:
            continue
        if name in masks:
            kept = int(masks[name].sum())
            if value.shape != (kept,):
                raise LotteryError(f"{path}: {key} has {tuple(value.shape)} values for {kept} kept places")
            value = torch.zeros(masks[name].shape, dtype=value.dtype).masked_scatter_(masks[name], value)
        states[part][name] = value
    for part, state in states.items():
        check_finite(path, state, buffers)
        if missing := masks.keys() - state.keys() if state or part == "trained" else ():
            raise LotteryError(f"{path}: not a whole ticket: it has no {part}/{min(missing)}")
    rewind, stated = states["rewind"] or None, about.get("rewind_sha256")
    if rewind and stated not in (None, sha256(rewind)):
        raise LotteryError(f"{path}: its rewind state does not have the hash the ticket states")
    stated = stated or (sha256(rewind) if rewind else None)  # an older file states none
    return TicketFile(masks, rewind, states["trained"], about["info"], stated)


# ---------------------------------------------------------------------------- what a ticket weighs


def parts(path: Path, file: TicketFile) -> dict[str, int]:
    """Bytes of each part of the ticket's file (path, as for load_ticket), in all as many as the file has."""
    found = {"masks, as bits": sum((mask.numel() + 7) // 8 for mask in file.masks.values())}
    for what, state in (("trained", file.trained), ("rewind", file.rewind or {})):
        kept = {name: int(file.masks[name].sum()) if name in file.masks else v.numel() for name, v in state.items()}
        size = {name: count * state[name].element_size() for name, count in kept.items()}
        found[f"{what}: kept weights"] = sum(size[name] for name in size if name in file.masks)
        found[f"{what}: all else (biases, norms, ...)"] = sum(size[name] for name in size if name not in file.masks)
    found["names, shapes, hashes, info"] = ticket_path(path).stat().st_size - sum(found.values())
    return found


def dense_bytes(state: State) -> int:
    """Of a checkpoint of the whole network, its floating-point numbers as float32."""
    return sum(v.numel() * (4 if v.is_floating_point() else v.element_size()) for v in state.values())
