"""Transcribe audio with a ticket: text on stdout, a line a file.

    python transcribe.py runs/NAME/ticket.safetensors recording.flac folder/ --json

What is longer than --piece is cut into pieces that overlap, each recognised by itself; their words are joined in the
widest pause in the middle half of the overlap.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

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
from audio_lottery import compress, files
from audio_lottery.console import Parser, command, fail
from lab import decode, networks, streaming
from models import Emission
from runner.flags import check_beam

BATCH = 8  # pieces


def parser() -> Parser:
    p = Parser(
        prog="transcribe.py", usage="transcribe.py TICKET AUDIO... [flags]",
        description="Transcribe audio with a ticket: text on stdout, a line a file.",
    )  # fmt: skip
    add = p.add_argument
    add("ticket", type=Path, metavar="TICKET", help="ticket.safetensors of a run")
    add("audio", nargs="*", metavar="AUDIO", help="files, folders, or - for a manifest on stdin, paths from here")
    add("--json", action="store_true", help="an object a line: words, their seconds, confidence")
    add("--dense", action="store_true", help="plain products, zeros multiplied, for comparison")
    add("--values", choices=["float32", "bfloat16", "int8"], help="of sparse weights (default: float32)")
    add("--piece", type=float, default=20.0, metavar="S", help="longest audio recognised at once (default: 20)")
    add("--overlap", type=float, default=4.0, metavar="S", help="of two pieces of a longer file (default: 4)")
    add("--normalize", choices=["utterance", "running"], help="features by a whole piece's statistics, or as --stream")
    add("--calibrate", type=Path, metavar="AUDIO", help="file or folder whose statistics the running ones begin with")
    add("--beam", type=int, help=f"width of the search, CTC (default: 1, greedy; with --lm {decode.BEAM})")
    add("--lm", type=Path, metavar="FILE.arpa", help="n-gram model of words, CTC")
    add("--lm-weight", type=float, help=f"of its ln p (default: {decode.LM_WEIGHT})")
    add("--word-score", type=float, help=f"added a word, with --lm (default: {decode.WORD_SCORE})")
    add("--stream", action="store_true", help="in chunks, as audio arrives, transducers; - is raw 16-bit 16 kHz mono")
    add("--chunk", type=float, default=0.32, metavar="S", help="seconds a chunk, with --stream (default: 0.32)")
    add("--export", type=Path, metavar="FILE.onnx", help="write the dense masked model as ONNX, and transcribe nothing")
    return p


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = parser()
    args = p.parse_args(argv)
    if bool(args.export) == bool(args.audio):
        p.error("give AUDIO (files, folders or -), or --export FILE.onnx without AUDIO")
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
    check_beam(p, args)
    if args.stream and (args.normalize == "utterance" or args.beam > 1 or args.lm):
        p.error("--stream normalises with running statistics and is greedy: no --normalize utterance, --beam, --lm")
    return args


# ---------------------------------------------------------------------------- what is asked for


def load(path: Path) -> tuple[nn.Module, files.TicketFile]:
    """The model of a ticket with its trained weights, for evaluation. Raises LotteryError naming the file."""
    file = files.load_ticket(path)
    try:
        model = networks.of(file.info, file.trained)
    except ValueError as error:
        raise lottery.LotteryError(f"{path}: {error}") from None
    files.check_fit(path, file, model)
    return model.eval(), file


def sources(audio: list[str]) -> Iterator[data.Utterance]:
    """The recordings meant by files, folders (recordings in them) and - (a manifest on stdin)."""
    for name in audio:
        if name == "-":
            for _, row in data.manifest_rows(sys.stdin.buffer.read(), "stdin"):
                yield data.Utterance(Path(row["audio_filepath"]), "", "", row["offset"], row["duration"])
        elif Path(name).is_dir():
            found = data.recordings(Path(name))
            if not found:
                raise data.DataError(f"{name}: no recording in it (by their endings: {' '.join(sorted(data.AUDIO))})")
            yield from (data.Utterance(path, "") for path in found)
        else:
            yield data.Utterance(Path(name), "")


# ---------------------------------------------------------------------------- words


class Word(NamedTuple):
    word: str
    start: float  # seconds
    end: float
    confidence: float  # the lowest probability among its tokens


def words_of(emissions: Iterable[Emission], tokens: list[str], frame: float, offset: float = 0.0) -> list[Word]:
    """The words that the tokens spell. frame: seconds; offset: seconds, of frame 0."""
    words, spelled = [], None
    for emission in emissions:
        for character in tokens[emission.token].replace(data.SPACE, " "):
            if character.isspace():
                spelled = None
            elif spelled is None:
                spelled = [character, emission.start, emission.end, emission.probability]
                words.append(spelled)
            else:
                spelled[0] += character
                spelled[2:] = emission.end, min(spelled[3], emission.probability)
    return [Word(text, offset + start * frame, offset + end * frame, p) for text, start, end, p in words]


def cut(samples: int, piece: int, overlap: int) -> list[tuple[int, int]]:
    """Start and end of each piece."""
    step = piece - overlap
    count = 1 + max(0, -(-(samples - piece) // step))
    return [(i * step, min(i * step + piece, samples)) for i in range(count)]


def seam(words: list[Word], low: float, high: float) -> float:
    """Where to join pieces that overlap from low to high: the middle of the widest pause in the overlap's middle half.

    words: of both pieces. Without a pause, the overlap's middle.
    """
    low, high = low + (high - low) / 4, high - (high - low) / 4
    widest, at, spoken = 0.0, (low + high) / 2, low
    for start, end in [*sorted((word.start, word.end) for word in words), (high, high)]:
        if min(start, high) - spoken > widest:
            widest, at = min(start, high) - spoken, (min(start, high) + spoken) / 2
        spoken = max(spoken, end)
    return at


def join(pieces: list[tuple[float, float, list[Word]]]) -> list[Word]:
    """Start, end and words of each piece of a recording -> its words, those in the overlaps once."""
    (_, before, words), *others = pieces
    for start, end, more in others:
        at = seam(words + more, start, before)
        words = [word for word in words if word.start + word.end < 2 * at]
        more = [word for word in more if word.start + word.end >= 2 * at]
        if words and more and words[-1].word == more[0].word and more[0].start < words[-1].end:
            more = more[1:]  # one word on both sides of a seam without a pause
        words, before = words + more, end
    return words


# ---------------------------------------------------------------------------- recognition


def finite(features: Tensor, path: Path | str) -> Tensor:
    if not features.isfinite().all():
        raise data.DataError(f"{path}: its samples are too large (features are not finite; full scale is 1)")
    return features


class Recogniser:
    """A ticket ready for audio: sparse products, made and measured when the first batch comes, or dense ones."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.model, self.ticket = load(args.ticket)
        self.backbone, self.tokens = self.ticket.info["backbone"], self.ticket.info["tokens"]
        self.frame = self.model.stride * data.FRAME_SECONDS
        self.seconds = 0.0  # of the network
        self.reading = 0.0  # seconds to decode audio and make features of it
        self.ready, self.moments = False, None
        if args.calibrate:
            waveforms = (data.load_audio(recording.audio) for recording in sources([str(args.calibrate)]))
            self.moments = streaming.Running.moments([data.FEATURES[self.model.features](w) for w in waveforms])

    def prepare(self, run: Callable[[nn.Module], object]) -> None:
        """run: the use that layers are measured in."""
        args, self.ready = self.args, True
        if not args.dense:
            started = time.monotonic()
            options = {"dtype": args.values or "float32"}
            self.model, rows = compress(self.model, self.ticket.masks, run, **options)
            sparse = sum(not row.layout.startswith("dense") for row in rows)
            told = f"sparse products for {sparse} of {len(rows)} weights, the fastest here"
            print(f"{told}; measured in {time.monotonic() - started:.1f} s", file=sys.stderr)
        self.emissions = self.model.emissions
        if args.beam > 1 or args.lm:
            search = (args.beam, args.lm, args.lm_weight, args.word_score)
            self.emissions = decode.ctc_search(self.model, self.tokens, *search, words=())

    def features(self, waveform: Tensor, path: Path) -> Tensor:
        """(N,) -> (T, F). Raises DataError naming the file if they are not finite."""
        features = data.FEATURES[self.model.features](waveform)
        running = self.args.normalize == "running"
        if running:
            return finite(streaming.Running(self.moments).push(features, last=True), path)
        return finite(data.normalize(features), path)

    def recognise(self, features: list[Tensor]) -> list[list[Emission]]:
        """What is in each of some (T, F)."""
        found = []
        for i in range(0, len(features), BATCH):
            batch = features[i : i + BATCH]
            padded = nn.utils.rnn.pad_sequence(batch, batch_first=True), torch.tensor([len(f) for f in batch])
            with torch.inference_mode():
                if not self.ready:
                    self.prepare(lambda model: model.emissions(*padded))  # noqa: B023
                started = time.monotonic()
                found += self.emissions(*padded)
                self.seconds += time.monotonic() - started
        return found


class Transcript(NamedTuple):
    source: data.Utterance
    seconds: float  # of audio
    words: list[Word]
    error: str = ""

    def line(self, as_json: bool) -> str:
        text = " ".join(word.word for word in self.words)
        if not as_json:
            return text
        row = {"audio_filepath": str(self.source.audio)}
        for key in ("offset", "duration"):
            if getattr(self.source, key) is not None:
                row[key] = getattr(self.source, key)
        if self.error:
            return json.dumps(row | {"error": self.error}, ensure_ascii=False)
        words = [w._replace(**{k: round(getattr(w, k), 3) for k in ("start", "end", "confidence")}) for w in self.words]
        confidence = round(sum(w.confidence for w in self.words) / len(self.words), 3) if self.words else None
        row |= {"duration": round(self.seconds, 3), "text": text, "confidence": confidence}
        return json.dumps(row | {"words": [word._asdict() for word in words]}, ensure_ascii=False)


def transcripts(recogniser: Recogniser, recordings: Iterable[data.Utterance]) -> Iterator[Transcript]:
    """In order. Recordings are taken together until they are a batch."""
    size = [round(getattr(recogniser.args, flag) * data.SAMPLE_RATE) for flag in ("piece", "overlap")]
    waiting = []  # (recording, seconds of audio, pieces [start, end] in samples, features of each, error)

    def flush() -> Iterator[Transcript]:
        found = iter(recogniser.recognise([f for *_, features, _ in waiting for f in features]))
        for recording, seconds, pieces, _, error in waiting:
            parts = []
            for start, end in pieces:
                start, end = start / data.SAMPLE_RATE, end / data.SAMPLE_RATE
                parts.append((start, end, words_of(next(found), recogniser.tokens, recogniser.frame, start)))
            yield Transcript(recording, seconds, join(parts) if parts else [], error)
        waiting.clear()

    for recording in recordings:
        started = time.monotonic()
        try:
            waveform = data.load_audio(recording.audio, recording.offset, recording.duration)
            pieces = cut(len(waveform), *size)
            features = [recogniser.features(waveform[start:end], recording.audio) for start, end in pieces]
            waiting.append((recording, len(waveform) / data.SAMPLE_RATE, pieces, features, ""))
        except data.DataError as error:
            waiting.append((recording, 0.0, [], [], str(error)))
        recogniser.reading += time.monotonic() - started
        if sum(len(features) for *_, features, _ in waiting) >= BATCH:
            yield from flush()
    yield from flush()


# ---------------------------------------------------------------------------- streaming


def chunks_of(audio: Tensor, samples: int) -> Iterator[tuple[Tensor, bool]]:
    """(a chunk, whether it is the last one)."""
    for start in range(0, len(audio), samples):
        yield audio[start : start + samples], start + samples >= len(audio)


def chunks_of_stdin(samples: int) -> Iterator[tuple[Tensor, bool]]:
    last = False
    while not last:
        content = sys.stdin.buffer.read(2 * samples)
        last = len(content) < 2 * samples
        pcm = np.frombuffer(content[: len(content) // 2 * 2], "<i2").astype(np.float32)
        yield torch.from_numpy(pcm / 32768), last


def follow(
    model: models.Transducer, chunks: Iterable[tuple[Tensor, bool]], moments: Tensor | None, path: Path | str = ""
) -> Iterator[tuple[list[Emission], int, float]]:
    """What each chunk (N,) of 16 kHz audio adds, N, and the seconds that took, features included."""
    features, stream = streaming.FeatureStream(moments), models.Stream(model)
    for samples, last in chunks:
        started = time.monotonic()
        with torch.inference_mode():
            found = stream.push(finite(features.push(samples, last), path), last)
        yield found, len(samples), time.monotonic() - started


def streamed(
    recogniser: Recogniser, recordings: Iterable[data.Utterance], latencies: list[float]
) -> Iterator[Transcript]:
    """As transcripts, but each recording in chunks, and without --json its text is printed as it comes."""
    args, size = recogniser.args, round(recogniser.args.chunk * data.SAMPLE_RATE)
    noise = torch.randn(2 * data.SAMPLE_RATE + size, generator=torch.Generator().manual_seed(0))
    recogniser.prepare(lambda model: list(follow(model, chunks_of(noise, size), None)))
    for recording in recordings:
        emissions, seconds, printed = [], 0.0, ""
        try:
            if recording.audio == Path("-"):
                chunks = chunks_of_stdin(size)
            else:
                waveform = data.load_audio(recording.audio, recording.offset, recording.duration)
                chunks = chunks_of(waveform, size)
            for new, samples, took in follow(recogniser.model, chunks, recogniser.moments, recording.audio):
                emissions += new
                seconds += samples / data.SAMPLE_RATE
                latencies.append(took)
                recogniser.seconds += took
                if new and not args.json:
                    text = data.decode([emission.token for emission in emissions], recogniser.tokens)
                    print(text[len(printed) :], end="", flush=True)
                    printed = text
            yield Transcript(recording, seconds, words_of(emissions, recogniser.tokens, recogniser.frame))
        except data.DataError as error:
            yield Transcript(recording, 0.0, [], str(error))


def latency(model: models.Transducer, args: argparse.Namespace, latencies: list[float]) -> str:
    median, high, most = (1e3 * q for q in np.quantile(latencies, [0.5, 0.95, 1]))
    after = 10 * (model.window - 1) + 16 - 10 * model.stride
    return (
        f"chunks of {args.chunk:g} s: {median:.1f} ms of compute in the median, "
        f"{high:.1f} at 95 %, {most:.1f} at most; "
        f"what is said can come out {after} ms after its frame of {10 * model.stride} ms"
        + ("" if args.calibrate else ", the first second at its end")
    )


# ---------------------------------------------------------------------------- the whole


def run(args: argparse.Namespace) -> int:
    if args.export:
        files.check_target(args.export)
    recogniser = Recogniser(args)
    if args.stream and not isinstance(recogniser.model, models.Transducer):
        raise lottery.LotteryError(f"--stream goes with a transducer (rnnt); this ticket is of {recogniser.backbone}")
    if (args.beam > 1 or args.lm) and isinstance(recogniser.model, models.Transducer):
        raise lottery.LotteryError("--beam and --lm go with CTC; a transducer's beam search does not say when")
    if args.export:
        from lab import export

        paths = export.export(recogniser.model, recogniser.tokens, args.export)
        print("\n".join(f"{path}: {path.stat().st_size:,} bytes" for path in paths))
        return 0
    if args.stream and "-" in args.audio:
        if len(args.audio) > 1:
            raise data.DataError("--stream -: stdin is one endless recording, and goes with no other AUDIO")
        recordings = [data.Utterance(Path("-"), "")]
    else:
        recordings = list(sources(args.audio))
    latencies: list[float] = []
    found = streamed(recogniser, recordings, latencies) if args.stream else transcripts(recogniser, recordings)
    failed, seconds = 0, 0.0
    bar = tqdm(found, total=len(recordings), unit="file", leave=False, disable=True if args.stream else None)
    for transcript in bar:
        if transcript.error:
            failed += 1
            bar.write(f"transcribe.py: {transcript.error}", file=sys.stderr)
        bar.write("" if args.stream and not args.json else transcript.line(args.json), file=sys.stdout)
        sys.stdout.flush()
        seconds += transcript.seconds
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
