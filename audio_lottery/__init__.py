"""The public face of Audio Lottery: winning tickets of any nn.Module, found, kept in files and made fast.

    from audio_lottery import find_ticket, save_ticket, load_ticket, compress

The algorithm is lottery.py; here is what leans on it, without networks and corpora: files, verdicts, ledger, sparse
inference.
"""

__version__ = "0.2.0"

from audio_lottery import fakes as fakes
from audio_lottery.compression import Taken, compress
from audio_lottery.counting import multiply_adds, weight_uses
from audio_lottery.files import TicketFile, load_ticket, restore_ticket, save_ticket
from audio_lottery.verdicts import Verdict, verdict
from lottery import (
    Found,
    LotteryError,
    Pruning,
    Scoped,
    Ticket,
    find_ticket,
    kept_counts,
    prunable,
    prune,
    scope,
)  # fmt: skip

__all__ = [
    "Found", "LotteryError", "Pruning", "Scoped", "Taken", "Ticket", "TicketFile", "Verdict", "compress", "find_ticket",
    "kept_counts", "load_ticket", "multiply_adds", "prunable", "prune", "restore_ticket", "save_ticket", "scope",
    "verdict", "weight_uses",
]  # fmt: skip
