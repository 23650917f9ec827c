"""Several processes, one run: `torchrun --nproc-per-node N train.py ...`. In one process nothing here does anything.

Every process trains the same model on its share of each batch (DistributedDataParallel), prunes it by itself, and must
come to the same masks; the first one alone writes.
"""

import contextlib
import datetime
import os

import torch
import torch.distributed as dist
from torch import nn

import lottery
import models

WAITED = datetime.timedelta(days=2)  # for the first process, which may download a corpus or fill a cache alone


def start(device: str) -> None:
    """Join the other processes, if torchrun started some: gloo for what lies on the CPU, nccl on CUDA.

    Raises LotteryError where the environment tells of others and not how to reach them.
    """
    rank, others = os.environ.get("RANK"), os.environ.get("WORLD_SIZE", "1")
    if rank is None or (others.isdigit() and int(others) < 2):
        return
    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=WAITED)
    except (ValueError, KeyError, RuntimeError) as error:
        why = (str(error).splitlines() or [""])[0]
        told = f"RANK is {rank} and WORLD_SIZE {others}, so that other processes are waited for"
        raise lottery.LotteryError(f"{told}: start with torchrun, or unset them ({why})") from None


def stop() -> None:
    if count() > 1:
        dist.destroy_process_group()


def told(recipe) -> str:
    """How many there are, and what one step of all of them holds; "" of one."""
    times = count() * recipe.accumulate
    each, unit = (recipe.batch_size, "utterances") if recipe.batch_seconds is None else (recipe.batch_seconds, "s")
    step = f"{each * times:g} {unit}"
    return f"; {count()} processes, {step} a step" if count() > 1 else ""


def count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def index() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value) -> list:
    """Every process's value, in their order, in every process."""
    if count() == 1:
        return [value]
    values = [None] * count()
    dist.all_gather_object(values, value)
    return values


def first_then_others(call):
    """call() in the first process, then in the others, which find what it left on the disk. Returns each its own."""
    if index():
        gather(None)
    result = call()
    if not index():
        gather(None)
    return result


def largest(value: int) -> int:
    """The largest of the processes' values."""
    if count() == 1:
        return int(value)
    tensor = torch.tensor(int(value))
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def total(value: float) -> float:
    """The sum of the processes' values."""
    if count() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor)
    return float(tensor)


class _Loss(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *batch) -> torch.Tensor:
        return self.model.loss(*batch)


def loss_of(model: nn.Module):
    """model.loss, or, with several processes, the same with gradients averaged over them in backward()."""
    if count() == 1:
        return model.loss
    # batch norm keeps the buffers equal by itself (models.BatchNorm)
    return nn.parallel.DistributedDataParallel(_Loss(model), broadcast_buffers=False)


def count_in_statistics(model: nn.Module, counted: bool) -> None:
    """Whether models.BatchNorm counts the frames that this process trains on next.

    Not those of an utterance that only stands in for an empty share of a batch.
    """
    for module in model.modules():
        if isinstance(module, models.BatchNorm):
            module.counted = counted


def without_averaging(loss):
    """Gradients of a backward() in here stay where they are: all but the last part of an accumulated batch."""
    return loss.no_sync() if count() > 1 else contextlib.nullcontext()
