"""test.jsonl of a run: what was recognised in each round's tests, a line an utterance, and its errors by kind."""

import json
from pathlib import Path

from audio_lottery import checked
from audio_lottery.checked import integer, text
from audio_lottery.files import write_atomically

TEXTS, LIMIT = "test.jsonl", 2**32  # bytes
KINDS = ("substitutions", "deletions", "insertions")
TEXT = checked.record(
    {
        "round": integer(0, 1000), "test": text(), "id": integer(), "audio": text(), "reference": text(most=10**6),
        "hypothesis": text(most=10**6), **dict.fromkeys(KINDS, integer()),
    },
    others=False,
)  # fmt: skip


def read_texts(path: Path) -> list[dict]:
    """The lines, [] if there is no such file. Raises LotteryError, naming file and line, for one that is none."""
    lines = checked.read_bytes(path, "texts", LIMIT).split(b"\n")[:-1] if path.exists() else []
    return [checked.parse(line, f"{path}, line {at}", TEXT) for at, line in enumerate(lines, 1)]


def save_texts(path: Path, number: int, texts: list[dict]) -> None:
    """Put the texts of a round's tests into test.jsonl, in place of what is there of that round; the file is whole."""
    if texts:
        rows = [row for row in read_texts(path) if row["round"] != number] + [{"round": number, **t} for t in texts]
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def steps_of(lines: list[dict]) -> int:
    """Steps that `edits` takes for all of them, so that nobody waits for a stranger's texts."""
    return sum(len(line["reference"].split()) * len(line["hypothesis"].split()) for line in lines)


def edits(reference: list[str], hypothesis: list[str]) -> int:
    """The fewest substitutions, deletions and insertions of words that make one of the other (Levenshtein)."""
    costs = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        before, costs[0] = costs[0], i
        for j, other in enumerate(hypothesis, 1):
            before, costs[j] = costs[j], min(costs[j] + 1, costs[j - 1] + 1, before + (word != other))
    return costs[-1]
