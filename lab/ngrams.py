"""A language model of a corpus's training texts, n-grams of words in an ARPA file, for --lm.

    python -m lab.ngrams DIR FILE.arpa [--corpus an4] [--order 3]

DIR as for train.py's --data. Interpolated Kneser-Ney smoothing (Chen and Goodman 1998, section 2.7) by NLTK, whose
probabilities and weights are written as they are: NLTK writes no ARPA, and KenLM's estimator is no Python package. It
is for small corpora: time grows with the square of the texts. For LibriSpeech, KenLM's lmplz makes such a file.
"""

import functools
import itertools
import math
import sys
from pathlib import Path

if __name__ == "__main__":
    from lab import missing

    missing.in_one_line("lab.ngrams")

import data
import lottery
from audio_lottery import files
from audio_lottery.console import Parser, command, fail, printable
from lab import corpora

PROGRAM = "python -m lab.ngrams"
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
DISCOUNT = 0.75  # of counts; fixed, as Kneser and Ney's estimate of it needs more text than AN4 has
NEVER = -99.0  # the logarithm of 0, as SRILM writes it
Gram = tuple[str, ...]


def probabilities(texts: list[str], order: int) -> tuple[dict[Gram, float], dict[Gram, float]]:
    """p of each n-gram's last word behind the others, and of each context what p of the shorter one counts behind it.

    A text begins with one <s>, which follows nothing. NLTK wants order - 1 of them, or words behind <s> would not
    count in lower orders: contexts that begin with <s> are looked up there so, and are written with one.
    """
    from nltk.lm import KneserNeyInterpolated
    from nltk.util import everygrams

    sentences = [[BEGIN] * (order - 1) + text.split() + [END] for text in texts]
    model = KneserNeyInterpolated(order, discount=DISCOUNT)
    grams = ([g for g in everygrams(sentence, max_len=order) if g[-1] != BEGIN] for sentence in sentences)
    model.fit(grams, itertools.chain(*sentences))

    @functools.cache
    def weight(context: Gram) -> float:
        return model.estimator.alpha_gamma(END, context)[1] if model.counts[context] else 1.0

    def padded(context: Gram) -> list[Gram]:
        longer = order - len(context) if context[:1] == (BEGIN,) else 1
        return [(BEGIN,) * n + context for n in range(longer)]

    found = {(word,): model.score(word) for word in model.counts.unigrams}
    weights = {}
    for n in range(2, order + 1):
        for context, counts in model.counts[n].items():
            if BEGIN in context[1:] or END in context:
                continue
            for word in counts:
                found[(*context, word)] = model.score(word, padded(context)[-1])
            weights[context] = math.prod(map(weight, padded(context)))
    return found, weights


def arpa(texts: list[str], order: int = 3) -> str:
    """The ARPA file of the n-grams up to `order` words, in code point order.

    Raises DataError without a word, and for a word that means something else there.
    """
    words = {word for text in texts for word in text.split()}
    if not words or words & {BEGIN, END, UNKNOWN}:
        raise data.DataError(f"a language model needs texts of words, none of them {BEGIN}, {END} or {UNKNOWN}")
    found, weights = probabilities(texts, order)
    found |= {(BEGIN,): 0.0, (UNKNOWN,): 0.0}
    sections = []
    for n in range(1, order + 1):
        grams = sorted(gram for gram in found if len(gram) == n)
        lines = [f"{log10(found[g]):.6f}\t{' '.join(g)}" for g in grams]
        lines = [f"{line}\t{log10(weights[g]):.6f}" if g in weights else line for line, g in zip(lines, grams)]
        sections.append((len(grams), "\n".join([f"\\{n}-grams:", *lines, ""])))
    counts = "\n".join(f"ngram {n}={count}" for n, (count, _) in enumerate(sections, 1))
    return "\n".join(["\\data\\", counts, "", *(section for _, section in sections), "\\end\\", ""])


def log10(p: float) -> float:
    return math.log10(p) if p > 0 else NEVER


@command(PROGRAM)
def main(argv: list[str] | None = None) -> int:
    p = Parser(prog=PROGRAM, description="Make an n-gram language model of a corpus's training texts.")
    p.add_argument("data", type=Path, metavar="DIR", help="the corpus, as for train.py's --data")
    p.add_argument("out", type=Path, metavar="FILE.arpa", help="where the model is written")
    p.add_argument("--corpus", choices=("manifests", *corpora.CORPORA), default="manifests", help="what is in DIR")
    p.add_argument("--order", type=int, default=3, help="words of the longest n-gram, 2 to 5 (default: 3)")
    args = p.parse_args(argv)
    if not 2 <= args.order <= 5:
        p.error(f"--order must be 2 to 5, got {args.order}")
    try:
        if args.corpus == "manifests":
            train = data.read_corpus(args.data, ("train",))["train"]
        else:
            train = corpora.read(args.corpus, args.data, test_sets=[])["train"]
        content = arpa([utterance.text for utterance in train], args.order)
        files.write_atomically(args.out, content.encode())
    except (data.DataError, lottery.LotteryError, OSError) as error:
        return fail(PROGRAM, error)
    words = sum(len(utterance.text.split()) for utterance in train)
    print(printable(f"{args.out}: {args.order}-grams of {len(train)} train texts, {words:,} words"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
