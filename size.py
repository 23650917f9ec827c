"""What a ticket weighs: python lottery.py size TICKET"""

from pathlib import Path

import torch

import files
import lottery
import models
import plan


def parts(path: Path, file: files.TicketFile) -> dict[str, int]:
    """Bytes of each part of the ticket's file, in all as many as the file has."""
    found = {"masks, as bits": sum((mask.numel() + 7) // 8 for mask in file.masks.values())}
    for what, state in (("trained", file.trained), ("rewind", file.rewind or {})):
        kept = {name: int(file.masks[name].sum()) if name in file.masks else v.numel() for name, v in state.items()}
        size = {name: count * state[name].element_size() for name, count in kept.items()}
        found[f"{what}: kept weights"] = sum(size[name] for name in size if name in file.masks)
        found[f"{what}: all else (biases, norms, ...)"] = sum(size[name] for name in size if name not in file.masks)
    found["names, shapes, hashes, info"] = path.stat().st_size - sum(found.values())
    return found


def dense_bytes(state: lottery.State) -> int:
    """Of a checkpoint of the whole network, its floating-point numbers as float32."""
    return sum(v.numel() * (4 if v.is_floating_point() else v.element_size()) for v in state.values())


def report(path: Path) -> str:
    """Bytes by part against the dense float32 checkpoint, what remains, multiply-adds a second of audio.

    Raises LotteryError, naming the file, for anything that is not a whole ticket of a backbone of models.py.
    """
    file = files.load_ticket(path)
    try:
        with torch.device("meta"):
            model = models.of(file.info)
    except ValueError as error:
        raise lottery.LotteryError(f"{path}: {error}") from None
    files.check_fit(path, file, model)
    dense, found = dense_bytes(file.trained), parts(path, file)
    whole = sum(found.values())
    rewind = sum(size for what, size in found.items() if what.startswith("rewind"))
    found |= {"the file": whole, "without its rewind state": whole - rewind, "dense float32 checkpoint": dense}
    kept = {name: int(mask.sum()) for name, mask in file.masks.items()}
    prunable, everything = sum(mask.numel() for mask in file.masks.values()), sum(p.numel() for p in model.parameters())
    removed = prunable - sum(kept.values())
    multiplied = [
        plan.multiply_adds(file.info["backbone"], file.info["sizes"], counts)
        for counts in ({name: mask.numel() for name, mask in file.masks.items()}, kept)
    ]
    return "\n".join(
        [
            *(f"{what:38} {size:13,} bytes {size / dense:7.1%} of dense" for what, size in found.items()),
            f"remaining: {1 - removed / prunable:.1%} of {prunable:,} prunable weights, "
            f"{1 - removed / everything:.1%} of all {everything:,}",
            f"multiply-adds a second of audio: dense {multiplied[0] / 1e6:.1f} M, ticket {multiplied[1] / 1e6:.1f} M "
            f"with zeros skipped ({multiplied[1] / multiplied[0]:.1%}), counted as plan.py does",
        ]
    )
