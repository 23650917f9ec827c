"""Transcribe audio with a ticket: text on stdout, a line a file.

    python transcribe.py runs/NAME recording.flac folder/ manifest.jsonl --format json

What is longer than --piece is cut into pieces that overlap, each recognised by itself; their words are joined in the
widest pause in the middle half of the overlap. Pieces of all recordings are read a window ahead, and those of similar
lengths are recognised together (--batch). Behind the window nothing but words is kept.
"""

import argparse
import array
import collections
import contextlib
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

if __name__ == "__main__":
    from lab import missing

    missing.in_one_line("transcribe.py")

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import lottery
import models
from audio_lottery import checked, files, sound
from audio_lottery.console import Parser, command, fail, printable
from lab import choice, decode, export, formats, networks, scoring, streaming
from lab.formats import Transcript, name_of
from lab.pieces import Word, join, pieces_of, words_of
from lab.scoring import MANIFESTS
from models import Emission
from runner import flags

BATCH = 16  # pieces that are recognised together, by default
PIECE = 20  # seconds, by default
HELD = 300  # seconds of audio that are read before any is recognised, so that pieces of similar lengths meet
PADDED = 160  # seconds of audio in a batch, at most, each piece as long as the longest; a longer piece is alone


def parser() -> Parser:
    p = Parser(
        prog="transcribe.py", usage="transcribe.py TICKET AUDIO... [flags]", epilog="Words: docs/glossary.md.",
        description="Transcribe audio with a ticket: text on stdout, a line a file.",
    )  # fmt: skip
    p.add_argument("ticket", type=Path, metavar="TICKET", help="ticket.safetensors of a run, or the run's folder")
    audio = "files, folders, manifests (.jsonl, .json), or - for a manifest on stdin, paths from here"
    p.add_argument("audio", nargs="*", metavar="AUDIO", help=audio)
    group = p.add_argument_group("what comes out")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--format", choices=formats.FORMATS, default="text",
           help="lines of text, JSON or CTM, or subtitles (srt, vtt); all but text from the words' times")  # fmt: skip
    either("--json", dest="format", action="store_const", const="json", help="the same as --format json")
    add("--out", type=Path, metavar="DIR", help="with srt and vtt, write a file a recording there: DIR/NAME.srt")
    add("--names", action="store_true", help="put the file's name and a tab before each line of text")
    add("--export", type=Path, metavar="FILE.onnx",
        help="write the dense masked model as ONNX, with tokens.txt, and transcribe nothing")  # fmt: skip
    add = p.add_argument_group("how good it is").add_argument
    add("--score", action="store_true", help="print WER and CER against the texts of the manifests, and no text")
    add("--against", type=Path, metavar="OTHER",
        help="with --score: another ticket or run folder, or dense (this run's), and the verdict")  # fmt: skip
    add("--by-utterance", type=Path, metavar="FILE.jsonl", help="with --score: write each utterance's texts and counts")
    add("--alignments", action="store_true", help="with --score: print the utterances with errors, word below word")
    flags.add(p.add_argument_group("with --against"), flags.NAMED["margin"])
    decoding = p.add_argument_group("how to decode (networks trained with CTC)")
    for name in ("beam", "lm", "lm_weight", "word_score"):
        flags.add(decoding, flags.NAMED[name])
    add = p.add_argument_group("long recordings").add_argument
    add("--piece", type=float, default=float(PIECE), metavar="S",
        help="seconds of audio that are recognised at once, at most (default: 20)")  # fmt: skip
    add("--overlap", type=float, default=4.0, metavar="S", help="seconds that two pieces share (default: 4)")
    add = p.add_argument_group("streams").add_argument
    add("--stream", action="store_true",
        help="recognise in chunks, as audio arrives (transducers); - is raw 16-bit mono at 16 kHz")  # fmt: skip
    add("--chunk", type=float, default=0.32, metavar="S", help="seconds in a chunk, with --stream (default: 0.32)")
    add("--normalize", choices=["utterance", "running"],
        help="subtract the mean of the whole piece, or of what was heard of it so far, as --stream does of all "
        "(default: utterance)")  # fmt: skip
    add("--calibrate", type=Path, metavar="AUDIO", help="recordings whose mean and variance a running mean begins with")
    machine = p.add_argument_group("the machine")
    ways = machine.add_mutually_exclusive_group()
    ways.add_argument("--dense", action="store_true", help="multiply the zeros too: plain products, for comparison")
    ways.add_argument(
        "--measure",
        action="store_true",
        help="measure now which layers are faster sparse, however "
        f"short the audio (default: from {choice.MINUTES} minutes on, once; kept in the user's cache)",
    )
    machine.add_argument("--batch", type=int, metavar="N",
                         help="recordings of similar length (or their pieces) that are recognised together, "
                         f"at most (default: {BATCH})")  # fmt: skip
    machine.add_argument("--values", choices=["float32", "bfloat16", "int8", "w8a8"],
                         help="of sparse weights; w8a8: int8, and inputs in 8 bits too (default: float32)")  # fmt: skip
    flags.add(machine, flags.NAMED["threads"])
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = parser()
    args = p.parse_intermixed_args(argv)  # flags may stand between TICKET and AUDIO
    if bool(args.export) == bool(args.audio):
        p.error("give AUDIO (files, folders or -), or --export FILE.onnx without AUDIO")
    scoring.check(p, args)
    flags.check_range(p, flags.NAMED["margin"], args.margin)
    if args.names and args.format != "text":
        p.error("--names is of lines of text: JSON and CTM have the file in each line, subtitles have their own file")
    if args.out and args.format not in formats.SUBTITLES:
        p.error("--out goes with --format srt and vtt, which are a file a recording")
    if args.dense and args.values:
        p.error("--values is of sparse weights, and --dense has none")
    if not 0.1 <= args.overlap <= args.piece - 0.1 < math.inf:
        got = f"got {args.piece:g} and {args.overlap:g}"
        p.error(f"--overlap must be at least 0.1 seconds and --piece 0.1 seconds more than it, {got}")
    if args.piece > 3600:
        p.error(f"--piece must be at most 3600 seconds, got {args.piece:g}")
    if not 0.01 <= args.chunk <= 60:
        p.error(f"--chunk must be at least 0.01 seconds and at most 60, got {args.chunk:g}")
    if args.calibrate and not (args.stream or args.normalize == "running"):
        p.error("--calibrate goes with --stream or --normalize running")
    if args.batch is not None and not 1 <= args.batch <= 1024:
        p.error(f"--batch must be at least 1 and at most 1024, got {args.batch}")
    if args.batch and (args.stream or args.export):
        p.error("--batch is of whole recordings: --stream takes one at a time, and --export none")
    args.batch = args.batch or BATCH
    if args.lm == flags.NONE:
        args.lm = None
    flags.check_beam(p, args)
    flags.check_beam_package(p, args)
    for module in ("onnx", "onnxscript") if args.export else ():
        flags.need(p, "--export", module, "onnx onnxscript, or 'audio-lottery[onnx]'")
    flags.check_range(p, flags.NAMED["threads"], args.threads)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.stream and (args.normalize == "utterance" or args.beam > 1 or args.lm):
        p.error("--stream normalises with running statistics and is greedy: no --normalize utterance, --beam, --lm")
    words = [*(sys.argv[1:] if argv is None else argv), "--"]  # behind it are no flags
    words = {word.partition("=")[0] for word in words[: words.index("--")]}
    whole = "is of whole recordings: --stream takes --chunk"
    for flag, has_effect, why in (
        ("--margin", args.against, "goes with --against"),
        ("--chunk", args.stream, "goes with --stream"),
        ("--piece", not args.stream, whole),
        ("--overlap", not args.stream, whole),
    ):
        if flag in words and not has_effect:
            p.error(f"{flag} {why}")
    return args


# ---------------------------------------------------------------------------- what is asked for


def check_order(args: argparse.Namespace) -> None:
    """Raise LotteryError if an AUDIO is the ticket, and TICKET is none."""
    for name in () if sealed(args.ticket) else args.audio:
        if sealed(Path(name)):
            raise lottery.LotteryError(f"{args.ticket} is no ticket, and {name} is one: TICKET comes first, then AUDIO")


def sealed(path: Path) -> bool:
    """Does it begin as a ticket does? (A recording may be too long to be read whole.)"""
    try:
        with checked.opened(files.ticket_path(path), "ticket") as (number, _):
            return files.SEAL in checked.read_on(number, 1024)
    except (OSError, ValueError):
        return False


def load(path: Path) -> tuple[nn.Module, files.TicketFile]:
    """The model of a ticket with its trained weights, for evaluation. path: of its file or its run folder.

    Raises LotteryError naming the file.
    """
    file = files.load_ticket(path)
    try:
        model = networks.of(file.info, file.trained)
    except ValueError as error:
        raise lottery.LotteryError(f"{path}: {error}") from None
    files.check_fit(path, file, model)
    return model.eval(), file


def sources(audio: list[str]) -> Iterator[data.Utterance]:
    """The recordings meant by files, folders (recordings in them), manifests and - (a manifest on stdin)."""
    for name in audio:
        path = Path(name)
        if name == "-":
            yield from of_manifest(sys.stdin.buffer, "stdin", Path())
        elif os.path.isdir(path):  # False, too, for what may not be looked at
            found = sound.recordings(path)
            if not found:
                raise data.DataError(f"{name}: no recording in it (by their endings: {' '.join(sorted(sound.AUDIO))})")
            yield from (data.Utterance(path, "") for path in found)
        elif path.suffix.lower() in MANIFESTS:
            with data.manifest_file(path) as file:
                yield from of_manifest(file, name, path.parent)
        else:
            yield data.Utterance(path, "")


def of_manifest(file: BinaryIO, name: str, folder: Path) -> Iterator[data.Utterance]:
    """The recordings of a manifest, whose paths are relative to the folder; its texts may be missing."""
    for line, row in data.manifest_rows(file, name):
        audio = folder / row["audio_filepath"]
        yield data.Utterance(audio, "", "", row["offset"], row["duration"], source=name, line=line)


# ---------------------------------------------------------------------------- recognition


def finite(features: Tensor, path: Path | str) -> Tensor:
    if not features.isfinite().all():
        raise data.DataError(f"{path}: its samples are too large (features are not finite; full scale is 1)")
    return features


class Recogniser:
    """A ticket ready for audio: with sparse products, or dense ones, as is chosen when the first batch comes."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        check_order(args)
        self.model, self.ticket = load(args.ticket)
        self.backbone, self.tokens = self.ticket.info["backbone"], self.ticket.info["tokens"]
        self.frame = self.model.stride * sound.FRAME_SECONDS
        # Tickets of before say nothing of it, and have a mean a bin.
        self.one_mean = self.model.features in data.ONE_MEAN and "normalization" in self.ticket.info
        self.spaces = not {" ", data.SPACE}.isdisjoint("".join(self.tokens[1:]))
        self.seconds = 0.0  # of the network
        self.reading = 0.0  # seconds to decode audio and make features of it
        self.ahead = math.inf  # seconds of audio to recognise
        self.ready, self.moments = False, self.calibrated(args.calibrate) if args.calibrate else None
        self.beam, ctc = None, not isinstance(self.model, models.Transducer)
        if ctc and (args.beam > 1 or args.lm):  # before any recording: a bad --lm is none of theirs
            how = (args.beam, args.lm, args.lm_weight, args.word_score)
            self.beam = decode.ctc_beam(lambda *batch: self.model(*batch), self.tokens, *how, words=())

    def calibrated(self, path: Path) -> Tensor:
        """The moments (2, F) that the running statistics begin with: of the recordings that `path` means."""
        sums, count = torch.zeros(1), 0
        for recording in sources([str(path)]):
            for _, samples in pieces_of(blocks_of(recording, PIECE), PIECE * data.SAMPLE_RATE, 0):
                features = finite(data.FEATURES[self.model.features](samples), recording.audio)
                sums, count = sums + len(features) * streaming.Running.moments([features]), count + len(features)
        return sums / count

    def prepare(self, run: Callable[[nn.Module], object]) -> None:
        """run: the use that layers are measured in."""
        args = self.args
        if not args.dense:
            use = f"chunks of {args.chunk:g} s" if args.stream else f"pieces, {args.batch} at a time"
            self.model, told, _ = choice.choose(
                self.model, self.ticket.masks, run, self.ahead, args.values or "float32", use, args.measure
            )
            print(printable(told), file=sys.stderr)
        self.emissions = self.beam or self.model.emissions
        self.ready = True

    def features(self, waveform: Tensor, path: Path) -> Tensor:
        """(N,) -> (T, F). Raises DataError naming the file if they are not finite."""
        features = data.FEATURES[self.model.features](waveform)
        running = self.args.normalize == "running"
        if running:
            return finite(streaming.Running(self.moments, self.one_mean).push(features, last=True), path)
        return finite(data.normalize(features, self.one_mean), path)

    def pieces(self, recording: data.Utterance) -> Iterator[tuple[int, int, Tensor]]:
        """Where each piece of a recording starts and ends, in samples, and its features (T, F), as it is decoded."""
        piece, overlap = (round(seconds * data.SAMPLE_RATE) for seconds in (self.args.piece, self.args.overlap))
        found = pieces_of(blocks_of(recording, self.args.piece), piece, overlap)
        with told_of(recording):
            while True:
                started = time.monotonic()
                start, samples = next(found, (0, None))
                if samples is None:
                    return
                if start and not self.spaces:
                    decode.tell("the tokens have no space, so words have no ends: what two pieces share comes twice "
                                "(--overlap 0.1, or a longer --piece)")  # fmt: skip
                features = self.features(samples, recording.audio)
                self.reading += time.monotonic() - started
                yield start, start + len(samples), features

    def recognise(self, features: list[Tensor]) -> list[list[Emission]]:
        """What is in each of a batch of (T, F)."""
        padded = nn.utils.rnn.pad_sequence(features, batch_first=True), torch.tensor([len(f) for f in features])
        with torch.inference_mode():
            if not self.ready:
                frames = min(choice.FRAMES, padded[0].shape[1])
                some = padded[0][:, :frames], padded[1].clamp(max=frames)
                self.prepare(lambda model: model.emissions(*some))
            started = time.monotonic()
            found = self.emissions(*padded)
            self.seconds += time.monotonic() - started
        return found


@contextlib.contextmanager
def told_of(recording: data.Utterance) -> Iterator[None]:
    """What goes wrong in here, memory that runs out too, is a DataError that names recording, segment and line."""
    with data.told_of(recording), sound.memory_for(name_of(recording)):
        yield


def blocks_of(recording: data.Utterance, seconds: float) -> Iterator[Tensor]:
    return sound.audio_blocks(recording.audio, recording.offset, recording.duration, seconds)


@dataclass
class Hearing:
    """A recording of which some pieces are recognised already, in whatever order."""

    source: data.Utterance
    words: list[Word] = field(default_factory=list)
    end: float = 0.0  # seconds, of what is in words
    pieces: int = 0  # decoded
    joined: int = 0  # of which the words are in `words`
    early: dict[int, tuple[float, float, list[Word]]] = field(default_factory=dict)  # heard before one in front of them
    decoded: bool = False  # to its end
    error: str = ""

    def add(self, piece: "Piece", words: list[Word]) -> None:
        self.early[piece.place] = piece.start, piece.end, words
        while self.joined in self.early:
            start, end, more = self.early.pop(self.joined)
            join(self.words, self.end, start, more)
            self.end, self.joined = end, self.joined + 1

    def done(self) -> bool:
        return self.decoded and self.joined == self.pieces

    def transcript(self) -> Transcript:
        if self.error:
            return Transcript(self.source, 0.0, [], self.error)
        return Transcript(self.source, self.end, self.words)


class Piece(NamedTuple):
    hearing: Hearing
    place: int  # among those of its recording
    start: float  # seconds
    end: float
    features: Tensor  # (T, F)


def batches_of(pieces: list[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces of similar lengths together, at most `most` and PADDED seconds; first the batch with the first of all."""
    batches, longest, room = [], 0, 0
    for i in sorted(range(len(pieces)), key=lambda i: -len(pieces[i].features)):
        frames = len(pieces[i].features)
        if not room or 2 * frames < longest:  # else padding would cost more than company gains
            longest, room = frames, max(1, min(most, int(PADDED / (frames * sound.FRAME_SECONDS))))
            batches.append([])
        batches[-1].append(i)
        room -= 1
    return ([pieces[i] for i in batch] for batch in sorted(batches, key=min))


def hear(recogniser: Recogniser, batch: list[Piece]) -> None:
    """Recognise pieces, one at least."""
    found, wrong = [[]], ""
    try:
        with told_of(batch[0].hearing.source):
            found = recogniser.recognise([piece.features for piece in batch])
    except data.DataError as error:
        wrong = str(error)  # and no more: what the error holds on to is the memory that ran out
    if wrong and len(batch) > 1:  # each by itself takes less
        for piece in batch:
            hear(recogniser, [piece])
        return
    batch[0].hearing.error = wrong or batch[0].hearing.error
    for piece, emissions in zip(batch, found):
        piece.hearing.add(piece, words_of(emissions, recogniser.tokens, recogniser.frame, piece.start))


def transcripts(recogniser: Recogniser, recordings: Iterable[data.Utterance]) -> Iterator[Transcript]:
    """In order, each as soon as those before it are known."""
    hearings, window, most = collections.deque(), [], recogniser.args.batch

    def known() -> Iterator[Transcript]:
        while hearings and hearings[0].done():
            yield hearings.popleft().transcript()

    def flush() -> Iterator[Transcript]:
        for batch in batches_of(window, most):
            hear(recogniser, batch)
            yield from known()
        window.clear()

    for recording in recordings:
        hearings.append(hearing := Hearing(recording))
        try:
            for start, end, features in recogniser.pieces(recording):
                times = start / data.SAMPLE_RATE, end / data.SAMPLE_RATE
                window.append(Piece(hearing, hearing.pieces, *times, features))
                hearing.pieces += 1
                held = sum(piece.end - piece.start for piece in window)
                if most == 1 or held >= HELD:
                    yield from flush()
        except data.DataError as error:
            hearing.error = str(error)
        hearing.decoded = True
        yield from known()
    yield from flush()


# ---------------------------------------------------------------------------- streaming


def chunks_of(blocks: Iterable[Tensor], samples: int) -> Iterator[tuple[Tensor, bool]]:
    """Blocks (N,) -> (a chunk, whether it is the last one)."""
    before = None
    for _, chunk in pieces_of(blocks, samples, 0):
        if before is not None:
            yield before, False
        before = chunk
    yield before, True


def follow(
    model: models.Transducer, chunks: Iterable[tuple[Tensor, bool]], moments: Tensor | None, path: Path | str = ""
) -> Iterator[tuple[list[Emission], int, float]]:
    """What each chunk (N,) of 16 kHz audio adds, N, and the seconds that took, features included."""
    features, stream = streaming.FeatureStream(moments), streaming.Stream(model)
    for samples, last in chunks:
        started = time.monotonic()
        with torch.inference_mode():
            found = stream.push(finite(features.push(samples, last), path), last)
        yield found, len(samples), time.monotonic() - started


class Speller:
    """The text of tokens that come one after the other, with single spaces, as data.decode makes it of them all."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.begun, self.space = tokens, False, ""

    def push(self, emissions: list[Emission]) -> str:
        """What is new. A space comes with the word behind it."""
        new = self.space + "".join(self.tokens[emission.token] for emission in emissions).replace(data.SPACE, " ")
        words = new.split()
        self.space = new[-1:] if new[-1:].isspace() else ""
        if not words:
            return ""
        before, self.begun = " " if self.begun and new[0].isspace() else "", True
        return before + printable(" ".join(words))


def streamed(
    recogniser: Recogniser, recordings: Iterable[data.Utterance], latencies: "array.array[float]"
) -> Iterator[Transcript]:
    """As transcripts, but each recording in chunks, and lines of text are printed as they come."""
    args, size = recogniser.args, round(recogniser.args.chunk * data.SAMPLE_RATE)
    noise = torch.randn(2 * data.SAMPLE_RATE + size, generator=torch.Generator().manual_seed(0))
    recogniser.prepare(lambda model: list(follow(model, chunks_of([noise], size), None)))
    for recording in recordings:
        emissions, seconds, speller = [], 0.0, Speller(recogniser.tokens)
        if args.names:
            print(f"{printable(name_of(recording))}\t", end="", flush=True)
        try:
            stdin = recording.audio == Path("-")
            spoken = streaming.pcm_chunks(sys.stdin.buffer, size) if stdin else None
            chunks = spoken or chunks_of(blocks_of(recording, PIECE), size)
            with told_of(recording):
                for new, samples, took in follow(recogniser.model, chunks, recogniser.moments, recording.audio):
                    seconds += samples / data.SAMPLE_RATE
                    latencies.append(took)
                    recogniser.seconds += took
                    if args.format != "text":
                        emissions += new
                    elif new:
                        print(speller.push(new), end="", flush=True)
            yield Transcript(recording, seconds, words_of(emissions, recogniser.tokens, recogniser.frame))
        except data.DataError as error:
            yield Transcript(recording, 0.0, [], str(error))


def latency(model: models.Transducer, args: argparse.Namespace, latencies: "array.array[float]") -> str:
    median, high, most = (1e3 * q for q in np.quantile(latencies, [0.5, 0.95, 1]))
    after = 10 * (model.window - 1) + 16 - 10 * model.stride
    return (
        f"chunks of {args.chunk:g} s: {median:.1f} ms of compute in the median, "
        f"{high:.1f} at 95 %, {most:.1f} at most; "
        f"a frame of {10 * model.stride} ms is known {after} ms after its end, once its chunk is whole and computed"
        + ("" if args.calibrate else ", the first second at its end")
    )


# ---------------------------------------------------------------------------- the whole


def ready(args: argparse.Namespace) -> Recogniser:
    """Raises LotteryError for a network that the flags do not go with."""
    recogniser = Recogniser(args)
    if args.stream and not isinstance(recogniser.model, models.Transducer):
        raise lottery.LotteryError(f"--stream goes with a transducer (rnnt); this ticket is of {recogniser.backbone}")
    if (args.beam > 1 or args.lm) and isinstance(recogniser.model, models.Transducer):
        raise lottery.LotteryError("--beam and --lm go with CTC; a transducer's beam search does not say when")
    return recogniser


def heard(recogniser: Recogniser, recordings: list[data.Utterance]) -> list[str | data.DataError]:
    """The text of each recording, as a test has it; of a broken one, which is named on stderr, why."""
    found: list[str | data.DataError] = []
    bar = tqdm(transcripts(recogniser, recordings), total=len(recordings), unit="file", leave=False, disable=None)
    for transcript in bar:
        if transcript.error:
            bar.write(f"transcribe.py: {printable(transcript.error)}", file=sys.stderr)
        text = " ".join(word.word for word in transcript.words)
        found.append(data.DataError(transcript.error) if transcript.error else text)
    return found


def score(args: argparse.Namespace) -> int:
    """--score: how well the ticket recognises manifests, and how well another one does."""
    recordings, systems = scoring.references(args.audio), []
    scoring.check_target(args, recordings)
    for path in [args.ticket, *scoring.other(args)]:
        recogniser = ready(argparse.Namespace(**vars(args) | {"ticket": path}))
        recogniser.ahead = choice.seconds_ahead(recordings)
        hear = functools.partial(heard, recogniser)
        systems.append(scoring.System(str(path), recogniser.ticket.info["tokens"], hear))
    return scoring.score(args, recordings, systems)


def run(args: argparse.Namespace) -> int:
    if args.score:
        return score(args)
    if args.export:
        export.target(args.export)  # before the ticket is read
    recogniser = ready(args)
    if args.export:
        paths = export.export(recogniser.model, recogniser.tokens, args.export, recogniser.one_mean)
        print("\n".join(f"{printable(path)}: {path.stat().st_size:,} bytes" for path in paths))
        return 0
    if args.stream and "-" in args.audio:
        if len(args.audio) > 1:
            raise data.DataError("--stream -: stdin is one endless recording, and goes with no other AUDIO")
        recordings = [data.Utterance(Path("-"), "")]
    else:
        recordings = list(sources(args.audio))
    formats.check(args.format, args.out, recordings)
    recogniser.ahead = choice.seconds_ahead(recordings)
    latencies, writer = array.array("d"), formats.Writer(args.format, args.names, args.out)
    found = streamed(recogniser, recordings, latencies) if args.stream else transcripts(recogniser, recordings)
    failed, seconds = 0, 0.0
    bar = tqdm(found, total=len(recordings), unit="file", leave=False, disable=True if args.stream else None)
    for transcript in bar:
        if transcript.error:
            failed += 1
            bar.write(f"transcribe.py: {printable(transcript.error)}", file=sys.stderr)
        said = [""] if args.stream and args.format == "text" else writer.push(transcript)
        for line in said:
            bar.write(line, file=sys.stdout)
        sys.stdout.flush()
        seconds += transcript.seconds
    for line in writer.end():
        print(line, flush=True)
    if latencies:
        print(latency(recogniser.model, args, latencies), file=sys.stderr)
    compute = recogniser.reading + recogniser.seconds
    told = f"{seconds:.1f} s of audio in {compute:.2f} s of compute"
    told += f", {recogniser.reading:.2f} of them for reading and features" if recogniser.reading else ""
    told += f": {seconds / max(compute, 1e-9):.1f} seconds of audio a second"
    print(f"{told}; {failed} of {len(recordings)} files failed" if failed else told, file=sys.stderr)
    return int(failed > 0)


@command("transcribe.py")
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except (data.DataError, lottery.LotteryError, OSError) as error:
        return fail("transcribe.py", error)


if __name__ == "__main__":
    sys.exit(main())
