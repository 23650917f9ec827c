"""How well tickets recognise a manifest's recordings: WER and CER with intervals, by utterance, one against another."""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jiwer
import numpy as np

import data
from audio_lottery import files, verdicts
from audio_lottery.console import Parser, json_line, printable
from audio_lottery.texts import KINDS
from lab import alignments
from lab.compare import Point
from lab.formats import name_of

MANIFESTS = (".jsonl", ".json")


class System(NamedTuple):
    """A ticket that is scored."""

    name: str  # its path
    tokens: list[str]
    hear: Callable[[list[data.Utterance]], list[str | data.DataError]]  # the texts, or why there is none


# ---------------------------------------------------------------------------- what is asked for


def other(args: argparse.Namespace) -> list[Path]:
    """The ticket that --against names: a path, or "dense", the network that this run's ticket was pruned from."""
    if args.against is None or str(args.against) != "dense":
        return [args.against] if args.against else []
    folder = args.ticket if args.ticket.is_dir() else args.ticket.parent
    path = folder / "dense.safetensors"
    if not path.is_file():
        why = "the run folder of a search has it, unless it is of an old one: name a ticket, or a run of --sparsity 0"
        raise data.DataError(f"--against dense: no {path}: {why}")
    return [path]


def check(parser: Parser, args: argparse.Namespace) -> None:
    """End in one line where flags of the score are without it, or others beside it."""
    if not args.score:
        for name in ("against", "by_utterance", "alignments"):
            if getattr(args, name):
                parser.error(f"--{name.replace('_', '-')} goes with --score")
        return
    for name in ("format", "names", "out", "stream", "export"):
        if getattr(args, name) not in (None, False, "text"):
            parser.error(f"--score prints no texts: it goes with no --{name} (see --by-utterance and --alignments)")
    for name in args.audio:
        if name != "-" and Path(name).suffix.lower() not in MANIFESTS:
            parser.error(f"--score needs texts to compare with: manifests (.jsonl, .json) or -, got {name}")


def check_target(args: argparse.Namespace, recordings: list[data.Utterance]) -> None:
    """Raise DataError or OSError unless --by-utterance can be written, over nothing that is read."""
    if not args.by_utterance:
        return
    files.check_target(args.by_utterance)
    read = [files.ticket_path(path) for path in (args.ticket, *other(args))]
    read += [Path(name) for name in (*args.audio, args.lm, args.calibrate) if name]
    read += [recording.audio for recording in recordings]
    for path in read if args.by_utterance.exists() else ():
        if path.exists() and os.path.samefile(path, args.by_utterance):
            raise data.DataError(f"--by-utterance {args.by_utterance}: is what is read: name another file")


def references(audio: list[str]) -> list[data.Utterance]:
    """The utterances of manifests, texts as training normalises them. Raises DataError naming the line without one."""
    found: list[data.Utterance] = []
    for name in audio:
        if name == "-":
            found += of_manifest(sys.stdin.buffer, "stdin", Path())
        else:
            with data.manifest_file(Path(name)) as file:
                found += of_manifest(file, name, Path(name).parent)
    return found


def of_manifest(file: BinaryIO, name: str, folder: Path) -> Iterator[data.Utterance]:
    for line, row in data.manifest_rows(file, name):
        text = row.get("text")
        text = " ".join(text.split()) if isinstance(text, str) else text
        data.check_text(text, f"{name}, line {line}")
        audio = folder / row["audio_filepath"]
        yield data.Utterance(audio, text, "", row["offset"], row["duration"], name, line)


# ---------------------------------------------------------------------------- counts


def counted(reference: str, said: str) -> dict:
    """Errors and words of an utterance, and those of its characters, by jiwer as in training."""
    words, letters = jiwer.process_words(reference, said), jiwer.process_characters(reference, said)
    row = {"hypothesis": said, **{kind: getattr(words, kind) for kind in KINDS}}
    row["words"] = words.hits + words.substitutions + words.deletions
    row["character_errors"] = letters.substitutions + letters.deletions + letters.insertions
    return row | {"characters": letters.hits + letters.substitutions + letters.deletions}


def rates(references: list[str], hypotheses: list[str]) -> dict:
    """Word error counts an utterance, of each kind too, and WER and CER over all (jiwer)."""
    outputs = [jiwer.process_words(r, h) for r, h in zip(references, hypotheses)]
    counts = [{kind: getattr(output, kind) for kind in KINDS} for output in outputs]
    errors = [sum(count.values()) for count in counts]
    words = [o.hits + o.substitutions + o.deletions for o in outputs]
    cer = jiwer.cer(references, hypotheses)
    return {"errors": errors, "words": words, "wer": sum(errors) / sum(words), "cer": cer, "counts": counts}


def errors_of(rows: list[dict]) -> list[int]:
    return [sum(row[kind] for kind in KINDS) for row in rows]


def rate(errors: list[int], units: list[int]) -> str:
    """An error rate and its 95 % interval over utterances; none of a single one."""
    told = f"{sum(errors) / sum(units):.3f}"
    if len(units) == 1:
        return told
    low, high = verdicts.interval(errors, units)
    return f"{told} [{low:.3f}, {high:.3f}]"


# ---------------------------------------------------------------------------- what is said


def score(args: argparse.Namespace, recordings: list[data.Utterance], systems: list[System]) -> int:
    """Recognise, print, write --by-utterance. 1 if a recording is left out, since one of the systems cannot read it."""
    texts: list[list[str]] = []
    left, failed = recordings, {}
    for system in systems:
        heard = system.hear(left)
        new = {id(u): str(text) for u, text in zip(left, heard) if isinstance(text, data.DataError)}
        kept = [id(utterance) not in new for utterance in left]
        texts = [list(itertools.compress(earlier, kept)) for earlier in texts]
        texts.append(list(itertools.compress(heard, kept)))
        left, failed = list(itertools.compress(left, kept)), failed | new
    rows = [[counted(u.text, said) for u, said in zip(left, texts_of)] for texts_of in texts]
    if args.by_utterance:
        write(args.by_utterance, recordings, failed, rows)
    if args.alignments:
        print_alignments(left, rows)
    if failed:
        print(f"left out of the score: {len(failed)} of {len(recordings)} recordings, which are broken (see stderr)")
    if not left:
        print("nothing is left to score")
        return 1
    say(args, left, systems, rows)
    return int(bool(failed))


def say(args: argparse.Namespace, heard: list[data.Utterance], systems: list[System], rows: list[list[dict]]) -> None:
    words, letters = ([row[key] for row in rows[0]] for key in ("words", "characters"))
    intervals = "95 % intervals over utterances" if len(heard) > 1 else "no interval of one utterance"
    s = "s" * (len(heard) > 1)
    print(f"{len(heard)} utterance{s}, {sum(words):,} words, {sum(letters):,} characters; {intervals}")
    for system, mine in zip(systems, rows):
        name = printable(system.name)
        unseen = data.unseen_characters(heard, system.tokens)
        if unseen:
            counts = data.characters_told(unseen)
            print(f"{name}: the texts have characters that it cannot spell, counted as errors: {counts}")
        kinds = ", ".join(f"{sum(row[kind] for row in mine)} {kind}" for kind in KINDS)
        cer = rate([row["character_errors"] for row in mine], letters)
        print(f"{name}: WER {rate(errors_of(mine), words)}, CER {cer}; {kinds}")
    if len(systems) > 1:
        print(f"{printable(systems[0].name)} less {printable(systems[1].name)}: {against(rows, words, args.margin)}")


def against(rows: list[list[dict]], words: list[int], margin: float) -> str:
    """The first system's WER less the second's, and the verdict by the paired test, as of a run's ticket."""
    first, second = (np.array([errors_of(mine)]) for mine in rows)
    told = Point(margin, rival=True).judge(first, second, np.array(words))
    difference = (first - second).sum() / sum(words)
    word = "no verdict (neither recognises anything)" if told.word == "no verdict" else told.word
    power = f", power {verdicts.power(told, margin):.0%}" if told.word == "undecided" else ""
    if len(words) == 1:
        return f"WER {difference:+.3f}; no verdict of one utterance"
    return f"WER {difference:+.3f}, {word} [{told.low:+.3f}, {told.high:+.3f}]{power}, margin {margin:g}"


def print_alignments(heard: list[data.Utterance], rows: list[list[dict]]) -> None:
    """Those of the utterances that a system has an error in."""
    names = ["reference", "recognised", "by the other"][: 1 + len(rows)]
    for utterance, *mine in zip(heard, *rows):
        if any(errors_of(mine)):
            errors = " and ".join(map(str, errors_of(mine)))
            print(printable(f"{name_of(utterance)}: {errors} errors, {mine[0]['words']} words"))
            found = alignments.columns(utterance.text, [row["hypothesis"] for row in mine])
            print("\n".join(alignments.text_lines(names, found)), end="\n\n")


def write(path: Path, recordings: list[data.Utterance], failed: dict[int, str], rows: list[list[dict]]) -> None:
    """A line of JSON an utterance, in the order of the manifests; of a broken one, why."""
    counts, lines = zip(*rows), []
    for utterance in recordings:
        row: dict = {"audio_filepath": str(utterance.audio)}
        row |= {k: v for k in ("offset", "duration") if (v := getattr(utterance, k)) is not None}
        row["reference"] = utterance.text
        if id(utterance) in failed:
            row["error"] = failed[id(utterance)]
        else:
            first, *others = next(counts)
            row |= first | ({"against": others[0]} if others else {})
        lines.append(json_line(row) + "\n")
    files.write_atomically(path, "".join(lines).encode())
