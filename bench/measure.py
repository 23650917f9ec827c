"""What every measurement leans on: functions that take turns, memory, and processes of their own."""

import ctypes
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

import lottery

PROGRAM = "python -m bench"
HERE = Path(__file__).resolve().parents[1]  # the root of the house


def stop(why: str) -> NoReturn:
    """Say in one line on stderr why nothing more is measured; exit code 1."""
    sys.exit(f"{PROGRAM}: {why}")


def must_be_compiled() -> None:
    if not lottery.ops.compiled:
        stop("the extension is not built: there is nothing to time against the reference")


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(device: str, repeats: int, **functions: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each function, called in turns after one warm-up each."""
    times = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            start = clock(device)
            function()
            if turn:
                times[name].append(clock(device) - start)
    return {name: statistics.median(values) for name, values in times.items()}


def memory(key: str) -> int:
    """Bytes of resident memory: VmRSS now, VmHWM at most so far (Linux)."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes of resident memory that a call adds at its peak, over what was there before (Linux)."""
    ctypes.CDLL(None).malloc_trim(0)  # so that the call cannot live on memory freed before it
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM, the high-water mark
    before = memory("VmRSS")
    function()
    return memory("VmHWM") - before


def in_a_process(code: str) -> str:
    """What a Python process of its own prints as it runs the code at the root."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE)
    if done.returncode:
        sys.stderr.write(done.stderr)
        stop(f"a process of its own failed, exit code {done.returncode}")
    return done.stdout
