"""What was recognised in a run's test, dense beside a ticket: the sections of its report on the texts in test.jsonl."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from audio_lottery.console import markdown_text
from lab import alignments, plan
from lab.alignments import Pair
from lab.compare import Method

WORST = 10  # utterances that are shown
MOST = 10  # words, or utterances, in each of the other lists
NAMES = {"dense": "dense network", "ticket": "ticket"}  # in a sentence
LONGEST = 300  # characters of a text in a list


class Heard(NamedTuple):
    """An utterance of the first test set, and what each system recognised in it."""

    id: int  # its place in the test set
    audio: str  # the recording's name, as test.jsonl has it
    reference: str
    said: tuple[str, ...]


class Look(NamedTuple):
    """What there is to see: the systems by their names, dense first, and the utterances; name of the test set."""

    test: str
    systems: list[str]  # one or two of "dense" and "ticket"
    round: int | None  # of the ticket
    utterances: list[Heard]


def look(method: Method, texts: list[dict]) -> Look | None:
    """Dense beside the ticket that the summary names: the sparsest winning or matching one at the marks, else the one
    best on valid. None without a text of either."""
    ticket = method.walk()[0] or method.best()
    rounds = {"dense": 0} | ({"ticket": ticket.round} if ticket else {})
    there = {line["round"] for line in texts}
    rounds = {name: number for name, number in rounds.items() if number in there}
    if not rounds:
        return None
    test = next(line["test"] for line in texts if line["round"] in rounds.values())
    by_id: dict[int, dict[int, dict]] = {}
    for line in texts:
        if line["test"] == test and line["round"] in rounds.values():
            by_id.setdefault(line["id"], {})[line["round"]] = line
    found = []
    for number, lines in sorted(by_id.items()):
        if len(lines) == len(rounds):
            first = next(iter(lines.values()))
            said = tuple(lines[r]["hypothesis"] for r in rounds.values())
            found.append(Heard(number, first["audio"], first["reference"], said))
    return Look(test, list(rounds), rounds.get("ticket"), found) if found else None


def worst(there: Look) -> list[Heard]:
    """The utterances with the most errors of the ticket; of as many, with the most of dense; then in their order."""

    def order(heard: Heard) -> tuple[int, ...]:
        return *(-alignments.errors(alignments.pairs(heard.reference, text)) for text in reversed(heard.said)), heard.id

    return sorted(there.utterances, key=order)[:WORST]


# ---------------------------------------------------------------------------- the sections


def sections(there: Look) -> list[str]:
    """Markdown: the worst utterances, a heading of the third level each and no others; what is confused; who is
    right where the other is not."""
    found = [[alignments.pairs(heard.reference, text) for text in heard.said] for heard in there.utterances]
    lines = [*of_worst(there), *of_confusions(there, found)]
    return lines + (of_differences(there, found) if len(there.systems) == 2 else [])


def counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"


def of_worst(there: Look) -> list[str]:
    shown, last = worst(there), NAMES[there.systems[-1]]
    whose = f"ticket: round {there.round}" if there.round else "there is no text of a ticket"
    whose += "" if "dense" in there.systems else "; the texts of the dense network are another run's"
    lines = ["## The worst utterances", ""]
    lines += [
        f"Test set {markdown_text(there.test)}, {whose}. The {counted(len(shown), 'utterance')} with the most errors "
        f"of the {last}. Errors are **bold**; {alignments.LEFT_OUT} is a word left out, and in a column without a word "
        "of the reference one was put in."
    ]
    for number, heard in enumerate(shown, 1):
        wrong = [
            f"{name} {alignments.errors(alignments.pairs(heard.reference, text))}"
            for name, text in zip(there.systems, heard.said)
        ]
        words = counted(len(heard.reference.split()), "word")
        lines += ["", f"### {number}. {markdown_text(heard.audio)}: errors {', '.join(wrong)}, of {words}"]
        names = ["reference", *there.systems]
        lines += alignments.markdown_lines(names, alignments.columns(heard.reference, heard.said))
    return lines


KINDS = {"substitution": "taken for another", "deletion": "left out", "insertion": "put in"}


def kind_of(pair: Pair) -> str | None:
    if pair[0] == pair[1]:
        return None
    return "insertion" if pair[0] is None else "deletion" if pair[1] is None else "substitution"


def of_confusions(there: Look, found: list[list[list[Pair]]]) -> list[str]:
    """found: by utterance and system."""
    counts = [Counter(pair for one in found for pair in one[n]) for n in range(len(there.systems))]
    rows = []
    for kind, words in KINDS.items():
        those = [pair for pair in set().union(*counts) if kind_of(pair) == kind]
        for pair in ranked(those, lambda pair: [count[pair] for count in counts]):
            numbers = [str(count[pair]) for count in counts]
            rows.append([words, *(markdown_text(alignments.shown(word)) for word in pair), *numbers])
    head = ["## The words most often confused", ""]
    if not rows:
        return ["", *head, "None: every word is right."]
    explained = f"At most {MOST} of each kind, those of the {NAMES[there.systems[-1]]} first."
    columns = ["what happened", "word", "recognised", *there.systems]
    return ["", *head, explained, "", *plan.markdown(columns, rows)]


def ranked(words: Iterable, counts) -> list:
    """The MOST first by their counts, the last system's before all, and then by their letters."""
    return sorted(words, key=lambda word: ([-n for n in reversed(counts(word))], str(word)))[:MOST]


def of_differences(there: Look, found: list[list[list[Pair]]]) -> list[str]:
    """What each of two systems has right and the other has not: utterances, and words."""
    alone: list[Counter] = [Counter(), Counter()]
    for one in found:
        dense, ticket = ([pair for pair in pairs if pair[0] is not None] for pairs in one)
        for (word, first), (_, second) in zip(dense, ticket):  # a pair a word of the reference
            alone[0][word] += first == word != second
            alone[1][word] += second == word != first
    lines = []
    for n, ours, theirs in ((1, "the ticket", "dense"), (0, "dense", "the ticket")):
        whole = [
            heard for heard, one in zip(there.utterances, found)
            if not alignments.errors(one[n]) and alignments.errors(one[1 - n])
        ]  # fmt: skip
        told = [counted(len(whole), "utterance"), counted(alone[n].total(), "word")]
        lines += ["", f"## What {ours} gets right and {theirs} does not", "", f"{told[0]} whole, {told[1]} in all."]
        if whole:
            rows = [[markdown_text(text) for text in (h.audio, cut(h.reference), cut(h.said[1 - n]))] for h in whole]
            columns = ["recording", "said, and recognised", f"recognised by {theirs}"]
            lines += ["", *plan.markdown(columns, rows[:MOST])]
            lines += ["", f"... and {counted(len(rows) - MOST, 'utterance')} more"] if len(rows) > MOST else []
        often = ranked([word for word, count in alone[n].items() if count], lambda word, n=n: [alone[n][word]])
        if often:
            words = ", ".join(f"{markdown_text(alignments.shown(word))} {alone[n][word]}" for word in often)
            lines += ["", f"The words most often: {words}."]
    return lines


def cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
