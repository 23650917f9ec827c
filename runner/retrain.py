"""Training a round of a finished run again, to compare it bit for bit: python train.py --retrain RUN ROUND"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

import lottery
from audio_lottery import files, ledger
from lab import controls, rivals
from runner import flags, settings
from runner.folder import Progress


class Differs(lottery.LotteryError):
    """The round came out differently."""


@dataclass
class Recorded:
    """A round that a ledger tells of."""

    run: Path
    config: dict
    rows: list[dict]
    row: dict
    args: argparse.Namespace  # the command that trained it

    @property
    def number(self) -> int:
        return self.row["round"]


def read(run: Path, number: int, cache: str | Path = "memory") -> Recorded:
    """cache: this command's --cache, as the run's may lie anywhere.

    Raises LotteryError if there is no such round, or its command cannot be made again.
    """
    try:
        config = ledger.read_config(run)
        rows = ledger.read_ledger(run / "ledger.jsonl")
        if number not in [row["round"] for row in rows]:
            raise lottery.LotteryError(f"the ledger has rounds {', '.join(str(row['round']) for row in rows)}")
        row = next(row for row in rows if row["round"] == number)
        paths = {key: config["machine"].get(key) for key in ("lm", "noise", "ticket", "dense", "init")}
        paths |= {key: paths[key] or str(flags.NONE) for key in ("lm", "noise", "init")}
        argv = flags.command_line(config) + [f"--{key}={path}" for key, path in paths.items() if path]
        where = {"data": config["machine"]["data"], "device": row["device"], "cache": cache, "out": run}
        args = flags.parse([*argv, *(f"--{key}={value}" for key, value in where.items())])
        torch.set_num_threads(row["threads"])
    except lottery.LotteryError as error:
        raise lottery.LotteryError(f"{run}: no round {number} to train again ({error})") from None
    except (OSError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise lottery.LotteryError(f"{run}: no round {number} to train again ({why})") from None
    return Recorded(run, config, rows, row, args)


def prepare(there: Recorded) -> tuple[settings.Setting, lottery.Ticket]:
    """The round's setting and its ticket, rewound and ready. Raises LotteryError if a setting is another one now."""
    setting, args = settings.prepare(there.args), there.args
    for key in {**setting.config, **there.config}:
        value = setting.config.get(key)
        once = not there.number and key in controls.FOLLOWING  # which says nothing of round 0
        if key != "machine" and not once and there.config.get(key) != value:
            raise lottery.LotteryError(f"{there.run}: {key} is {value} now, {there.config.get(key)} in the run")
    if args.source:
        setting, ticket, _ = settings.ticket_of(setting, there.number)
        return setting, ticket
    ticket = lottery.Ticket(setting.model, args.rewind_step, args.pruning, args.keep_dense)
    if there.number and args.control in rivals.SEARCHES:
        why = f"--control {args.control} starts it from the last weights of the round before, which no file holds"
        raise lottery.LotteryError(f"{there.run}: round {there.number} cannot be trained again: {why}")
    if there.number:
        ticket.round = there.number
        state, _ = files.read_sealed(there.run / "rewind.safetensors", "rewind state")
        ticket.rewind_state = {name: value.to(args.device) for name, value in state.items()}
        masks = files.load_masks(there.run / "masks" / f"{there.number:02d}.safetensors")
        if lottery.sha256(masks) != there.row["mask_sha256"]:
            raise lottery.LotteryError(f"{there.run}: the masks of round {there.number} are not the ledger's")
        for name, weight in ticket.weights.items():
            if name not in masks or masks[name].shape != weight.shape:
                raise lottery.LotteryError(f"{there.run}: round {there.number} has no mask of {name} {[*weight.shape]}")
        ticket.masks = {name: mask.to(args.device) for name, mask in masks.items()}
        ticket.rewind()
    return setting, ticket


def found(there: Recorded, ticket: lottery.Ticket, at: Progress) -> dict:
    """What the trained ticket has to be compared in; the masks that follow from it too, under "next_mask_sha256"."""
    values = {
        "rewind_sha256": lottery.sha256(ticket.rewind_state),
        "start_sha256": ticket.start_sha256,
        "last_sha256": lottery.sha256(lottery.state_of(ticket.model)),
        "trained_sha256": lottery.sha256(at.best),
        "valid_wer": ledger.best_epoch(at.valid_wers)[0],
    }
    values |= {key: getattr(at, key) for key in ("valid_wers", "losses") if key in there.row}
    if there.args.source and not there.number:  # whoever trained it may have kept a later step
        del values["rewind_sha256"]
    if after := next_row(there):
        ticket.prune(after.get("kept_blocks", after["kept"]))
        values["next_mask_sha256"] = lottery.sha256(ticket.masks)
    return values


def next_row(there: Recorded) -> dict | None:
    """The row of the round whose masks follow from this one's weights."""
    rows = [] if there.args.source else there.rows
    return next((row for row in rows if row["round"] == there.number + 1), None)


def compare(there: Recorded, values: dict) -> str:
    """One line that all are the ledger's. Raises Differs naming the first that is not."""
    after = next_row(there)
    for what, value in values.items():
        stated = after["mask_sha256"] if what == "next_mask_sha256" else there.row.get(what)
        if value != stated:
            others = ", ".join(sorted(there.row.get("earlier", {})))
            why = others and f" (its first part was trained with other {others})"
            raise Differs(f"round {there.number} trained again differs from the ledger in {what}{why}")
    return f"ok      round {there.number} trained again: {', '.join(values)} are the ledger's, bit for bit"
