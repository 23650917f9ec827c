"""Side-by-side measurements: `python -m bench ops` validates first and then times. Tables go to results/bench/*.txt.

All figures of a row come from one process, as medians; what counts is the ratio. Ways take turns, but for numpy's and
torch.nn.utils.prune's pruning, which are so much slower that they come behind.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    from lab import missing

    missing.in_one_line("python -m bench")

import models
from audio_lottery.console import Parser, command, fail
from bench.infer import bench_infer
from bench.loading import bench_data, bench_save
from bench.measure import PROGRAM
from bench.ops import bench_ops
from bench.tickets import bench_tickets
from bench.training import bench_train
from bench.tryout import bench_try
from data import DataError
from lottery import LotteryError

MEASUREMENTS = {
    "ops": bench_ops, "train": bench_train, "data": bench_data, "save": bench_save,
    "infer": lambda args: bench_tickets(args) if args.ticket else bench_infer(args), "try": bench_try,
}  # fmt: skip


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog=PROGRAM, description=__doc__.split("\n")[0])
    add = parser.add_argument
    what = (
        "ops: the operators; train: a step; data: features and cache; save: a checkpoint; infer: sparse products, or "
    )
    what += "tickets (--ticket); try: a look at a ticket"
    add("what", choices=list(MEASUREMENTS), help=what)
    add("--size", choices=["demo", "paper"], default="paper", help="of train and save")
    add("--backbone", choices=list(models.BACKBONES), help="of save (default: rnnt) and infer (all)")
    add("--repeats", type=int, default=21, help="turns a median is taken over (default: 21)")
    without_peers = "ops: without torch.nn.utils.prune, which takes minutes"
    add("--no-peers", dest="peers", action="store_false", help=without_peers)
    add("--short", action="store_true", help="infer: one thread and 90 %% sparsity only")
    tickets = "infer: tickets (files or run folders) on the test set of --data, with WER; try: the first of them"
    add("--ticket", type=Path, nargs="+", help=tickets)
    add("--data", type=Path, default=Path("demo"), help="of --ticket (default: demo)")
    add("--picture", type=Path, metavar="FILE.png", help="infer --ticket: draw time and WER of each way side by side")
    args = parser.parse_args(argv)
    if args.picture and not (args.what == "infer" and args.ticket):
        parser.error("--picture is of infer --ticket")
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    return args


@command(PROGRAM)
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        MEASUREMENTS[args.what](args)
    except (LotteryError, DataError, OSError) as error:
        return fail(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
