"""Which layers of a ticket are sparse on this machine: measured where that pays, once, and kept in the user's cache.

Measuring takes as long as recognising some minutes of speech. So it is done where MINUTES of audio lie ahead, or nobody
knows how many; else all stays dense. What was measured is kept in a file: $XDG_CACHE_HOME/audio-lottery/choices/, by
default in ~/.cache. A damaged file is as one that is not there, and a folder that cannot be written is no error.
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import data
import lottery
from audio_lottery import __version__, checked, compression, files, sound
from audio_lottery.sparse import WAYS, byte_lanes

MINUTES = 10  # of audio ahead, from which on measuring is repaid: docs/sparse.md has the times
FRAMES = 200  # of each piece of a first batch that are enough to measure layers on
LIMIT = 2**20  # bytes of a file
LAYER = checked.one_of(*WAYS)
KEPT = checked.record({"key": checked.OBJECT, "layers": checked.keyed(LAYER)}, others=False)


# ---------------------------------------------------------------------------- what lies ahead


def seconds_ahead(recordings: Iterable[data.Utterance], enough: float = 60 * MINUTES) -> float:
    """Seconds of audio by the files' headers, up to `enough`; infinite if a length is unknown, as of a pipe.

    What cannot be read counts 0: it is told of when its turn comes.
    """
    seconds = 0.0
    for recording in recordings:
        if recording.duration is not None:
            seconds += recording.duration
        elif os.path.isfile(recording.audio):
            with contextlib.suppress(data.DataError):
                seconds += max(0.0, sound.about(recording.audio)[0] - (recording.offset or 0.0))
        elif recording.audio == Path("-") or os.path.exists(recording.audio):
            return math.inf
        if seconds >= enough:
            break
    return seconds


# ---------------------------------------------------------------------------- the user's cache


@functools.cache
def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def key_of(masks: lottery.Masks, dtype: str, use: str) -> dict:
    """All that decides which layout is fastest. use: how the network is called."""
    return {
        "masks": lottery.sha256(masks), "processor": processor(), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "audio_lottery": __version__, "ops": lottery.ops.path, "values": dtype, "use": use,
        "instructions": torch.backends.cpu.get_cpu_capability(),  # what ATEN_CPU_CAPABILITY leaves of the processor's
        "ways": [*WAYS],  # one more, and all are measured anew
        "forms": 2,  # of the ways; one more wherever one of them takes another time than before
        "bytes": byte_lanes(),
    }  # fmt: skip


def folder() -> Path:
    """Raises RuntimeError where the user has no home."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))  # one that is not absolute does not count, by its rules
    return (named if named.is_absolute() else Path.home() / ".cache") / "audio-lottery" / "choices"


def path_of(key: dict) -> Path:
    return folder() / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.json"


def read(key: dict, weights: Iterable[str]) -> dict[str, str] | None:
    """What was kept under this key: a layout for each of the weights. None if nothing whole is there."""
    with contextlib.suppress(lottery.LotteryError, RuntimeError):
        found = checked.read_json(path_of(key), "choice of layers", KEPT, LIMIT)
        if found["key"] == key and found["layers"].keys() == set(weights):
            return found["layers"]
    return None


def keep(key: dict, layers: dict[str, str]) -> None:
    """Write it, whole or not at all. What cannot be written is measured again the next time."""
    with contextlib.suppress(OSError, RuntimeError):
        path = path_of(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps({"key": key, "layers": layers}, indent=1) + "\n"
        files.write_atomically(path, content.encode(), f".{os.getpid()}.tmp")


# ---------------------------------------------------------------------------- choosing


class Chosen(NamedTuple):
    model: nn.Module
    told: str  # which layers are sparse, and how that was decided, on one line
    sparse: bool  # whether any is


def choose(
    model: nn.Module, masks: lottery.Masks, run: Callable[[nn.Module], object], seconds: float,
    dtype: str = "float32", use: str = "", anew: bool = False,
) -> Chosen:  # fmt: skip
    """The model with those layers sparse that are faster so, as it was kept or as it is measured now.

    run: the use that layers are measured in; use: its name.  seconds: of audio ahead.  anew: measure in any case.
    """
    key = key_of(masks, dtype, use)
    layers, started = None if anew else read(key, lottery.prunable(model)), time.monotonic()
    if layers is None and seconds < 60 * MINUTES and not anew:
        dense = compression.compress(model, masks, chosen={})[0]
        why = f"{seconds:.0f} s of audio do not repay measuring, which {MINUTES} minutes do; --measure does it"
        return Chosen(dense, f"dense products: {why}", False)
    compressed, rows = compression.compress(model, masks, run, dtype=dtype, chosen=layers)
    how, taken = "as measured before", compression.choice(rows)
    if layers is None:
        how = f"measured in {time.monotonic() - started:.1f} s"
        keep(key, taken)
    return Chosen(compressed, f"{said(taken)}; {how}", any(not layout.startswith("dense") for layout in taken.values()))


def said(layers: dict[str, str]) -> str:
    """Which weights are sparse, on one line; or which are not, where those are fewer."""
    dense = [name.removesuffix(".weight") for name, layout in layers.items() if layout.startswith("dense")]
    sparse = [name.removesuffix(".weight") for name, layout in layers.items() if not layout.startswith("dense")]
    listed = ", ".join(sparse) if len(sparse) <= len(dense) else f"all but {', '.join(dense)}" if dense else "all"
    return f"sparse products for {len(sparse)} of {len(layers)} weights{f' ({listed})' if sparse else ''}"
