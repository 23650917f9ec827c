"""The weight of a language model and the score of a word, chosen on a run's valid speech: WER at each pair.

    python -m lab.weights RUN --lm FILE.arpa [--lm-weights 0.5,1,2] [--word-scores -1,0,1] [--beam N]

The test is not read. The pair of the lowest WER goes to train.py --lm and transcribe.py --lm as --lm-weight and
--word-score.
"""

import itertools
import sys
from pathlib import Path

if __name__ == "__main__":
    from lab import missing

    missing.in_one_line("lab.weights")

import jiwer
import torch

import data
import lottery
import models
from audio_lottery import files, ledger
from audio_lottery.console import Parser, command, fail, printable
from lab import corpora, decode, networks, plan

PROGRAM = "python -m lab.weights"
DEMO = Path(__file__).resolve().parent.parent / "demo"


def numbers(text: str) -> tuple[float, ...]:
    """A,B,..., each within a million of 0."""
    values = tuple(map(float, text.split(",")))
    if not all(abs(value) <= 1e6 for value in values):
        raise ValueError
    return values


def valid_of(config: dict, folder: Path) -> tuple[list[data.Utterance], set[str]]:
    """The valid utterances of a run, and the words of its train texts."""
    if config.get("corpus", "manifests") == "manifests":
        found = data.read_corpus(folder, ("train", "valid"))
    else:
        found = corpora.read(config["corpus"], folder, config.get("train_sets"), config.get("valid_sets"), test_sets=[])
    return found["valid"], {word for utterance in found["train"] for word in utterance.text.split()}


def log_probs_of(
    model: torch.nn.Module, utterance: data.Utterance, one_mean: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """log_probs (1, T, V) and lengths (1,). one_mean: how the network's features were normalised."""
    features = data.normalize(data.FEATURES[model.features](data.waveform_of(utterance)), one_mean)
    with data.told_of(utterance):
        if not features.isfinite().all():
            why = "its samples are too large (features are not finite; full scale is 1)"
            raise data.DataError(f"{utterance.audio}: {why}")
    with torch.inference_mode():
        return model(features[None], torch.tensor([len(features)]))


def wers(
    file: files.TicketFile, utterances: list[data.Utterance], words: set[str], lm: Path, beam: int, pairs
) -> list[float]:  # fmt: skip
    """How many utterances were recognised; the greedy WER, then that of each pair (lm_weight, word_score)."""
    model, tokens = networks.of(file.info, file.trained).eval(), file.info["tokens"]
    if isinstance(model, models.Transducer):
        raise lottery.LotteryError("a language model goes with CTC (cnn-lstm, conformer), and this ticket is of rnnt")
    decode.transcriber(None, tokens, beam, lm, *pairs[0], words)  # a bad language model is told before all else
    one_mean = model.features in data.ONE_MEAN and "normalization" in file.info  # once a mean a bin
    outputs, texts = [], []
    for utterance in utterances:
        try:
            outputs.append(log_probs_of(model, utterance, one_mean))
            texts.append(utterance.text)
        except data.DataError as error:
            if not file.info.get("skip_broken"):
                raise
            print(printable(f"left out, as the run was told to: {error}"), file=sys.stderr)

    def wer(transcribe) -> float:
        return jiwer.wer(texts, [data.decode(transcribe(*output)[0], tokens) for output in outputs])

    known = lambda log_probs, lengths: (log_probs, lengths)  # noqa: E731, a network that was asked already
    found = [len(texts), wer(models.ctc_greedy)]
    for lm_weight, word_score in pairs:
        found.append(wer(decode.transcriber(known, tokens, beam, lm, lm_weight, word_score, words)))
    return found


@command(PROGRAM)
def main(argv: list[str] | None = None) -> int:
    p = Parser(prog=PROGRAM, description="Choose --lm-weight and --word-score on a run's valid speech.")
    p.add_argument("run", type=Path, metavar="RUN", help="run folder, for its ticket and its corpus")
    p.add_argument("--lm", type=Path, required=True, metavar="FILE.arpa", help="language model, n-grams of words")
    p.add_argument("--data", type=Path, metavar="DIR", help="the corpus, if it is not where the run found it")
    p.add_argument("--lm-weights", type=numbers, default=(0.1, 0.25, 0.5, 1.0, 2.0), metavar="A,B,...",
                   help="weights to try (default: 0.1,0.25,0.5,1,2)")  # fmt: skip
    p.add_argument("--word-scores", type=numbers, default=(-1.0, 0.0, 1.0, 2.0), metavar="A,B,...",
                   help="scores of a word to try (default: -1,0,1,2)")  # fmt: skip
    p.add_argument("--beam", type=int, default=100, metavar="N", help="texts kept side by side (default: 100)")
    args = p.parse_args(argv)
    if not 1 <= args.beam <= 100_000:
        p.error(f"--beam must be at least 1 and at most 100000, got {args.beam}")
    pairs = list(itertools.product(args.lm_weights, args.word_scores))
    try:
        config = ledger.read_config(args.run)
        there = config["machine"]["data"]
        utterances, words = valid_of(config, args.data or (DEMO if there == "demo" else Path(there)))
        count, greedy, *found = wers(files.load_ticket(args.run), utterances, words, args.lm, args.beam, pairs)
    except (data.DataError, lottery.LotteryError, OSError) as error:
        return fail(PROGRAM, error)
    rows = [[f"{w:g}", *(f"{found[pairs.index((w, s))]:.4f}" for s in args.word_scores)] for w in args.lm_weights]
    columns = ["weight \\ score", *(f"{score:g}" for score in args.word_scores)]
    print("\n".join(plan.markdown(columns, rows, right=len(columns))))
    best = min(range(len(pairs)), key=lambda i: (found[i], abs(pairs[i][0]), abs(pairs[i][1])))
    weight, score = pairs[best]
    said = f"--beam {args.beam} --lm-weight {weight:g} --word-score {score:g}: valid WER {found[best]:.4f}"
    print(printable(f"{said}; greedy {greedy:.4f} ({count} utterances; the test was not read)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
