"""Beam search for the test: CTC with or without an n-gram language model, and the transducer.

transcriber() returns a function like model.transcribe: (features, input_lengths) -> list of token id lists.
torchaudio's decoders do it; here words are spelled for the one and token ids shifted for the other.
"""

import collections
import contextlib
import functools
import gzip
import itertools
import math
import os
import re
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchaudio.models import RNNTBeamSearch

import data
import models
from audio_lottery.console import printable
from models import BLANK, Emission

BEAM, LM_WEIGHT, WORD_SCORE = 1024, 1.97, 4.36  # the paper's, for the CNN-LSTM and a pruned 3-gram on LibriSpeech


def transcriber(
    model, tokens: list[str], beam: int = 1, lm: Path | None = None,
    lm_weight: float = LM_WEIGHT, word_score: float = WORD_SCORE, words: Iterable[str] = (),
) -> Callable[[Tensor, Tensor], list[list[int]]]:  # fmt: skip
    """Greedy at beam 1 without a language model. `words` are recognised besides those of the model `lm`, if that gives
    <unk> a probability: else they are too unlikely for any beam."""
    if beam == 1 and not lm:
        return model.transcribe
    if isinstance(model, models.Transducer):
        if beam >= len(tokens):
            raise data.DataError(f"--beam {beam}: for rnnt it must be below the number of tokens, {len(tokens)}")
        return transducer_beam(model, beam)
    emissions = ctc_beam(model, tokens, beam, lm, lm_weight, word_score, words)
    return lambda *batch: [[emission.token for emission in found] for found in emissions(*batch)]


# ---------------------------------------------------------------------------- CTC


def ctc_beam(model, tokens: list[str], beam: int, lm: Path | None, lm_weight: float, word_score: float, words):
    """A function like model.emissions, which knows of a token the first frame only, by flashlight's decoder.

    Maximises ln p(path) + lm_weight * ln p_lm(words) + word_score * number of words.

    With a language model only its words and `words` can come out, or a part of one where an utterance is cut. Paths
    that give the same tokens are summed; only for BPE with a language model, where the spellings below let one path
    count more than once, the best one stands for all.
    """
    try:
        from torchaudio.models.decoder import ctc_decoder
    except (ImportError, RuntimeError):
        need = "a beam search needs flashlight-text: pip install flashlight-text==0.0.7 (the extra [lm])"
        raise data.DataError(need) from None
    # Every word ends in this token: flashlight rests on it between words, and gives a word's last token one frame only.
    silence = tokens.index(" ") if lm and " " in tokens else BLANK
    options = dict(  # of a frame the 40 likeliest tokens are tried
        tokens=[str(i) for i in range(len(tokens))], blank_token=str(BLANK), sil_token=str(silence), beam_size=beam,
        beam_size_token=40, log_add=not lm or silence != BLANK,
    )  # fmt: skip
    if lm:
        with (
            plain_arpa(lm) as arpa,
            tempfile.NamedTemporaryFile("w", encoding="utf-8") as file,
            silent_stderr(),
        ):
            file.writelines(spellings(arpa, lm, words, tokens, silence))
            file.flush()
            try:  # KenLM's logarithms are decimal
                scores = dict(lm=os.fspath(arpa), lm_weight=lm_weight * math.log(10), word_score=word_score)
                decoder = ctc_decoder(file.name, **scores, **options)
            except RuntimeError as error:
                why = re.sub(r"^.* threw \w+\.\s*", "", str(error), flags=re.S)  # the place in KenLM's source
                raise data.DataError(f"--lm {lm}: KenLM cannot read it ({why})") from None
    else:
        decoder = ctc_decoder(None, **options)
    end = torch.full((1, len(tokens)), -1e3)  # a frame behind the last one, which ends the last word
    end[0, silence] = 0

    def emissions(features: Tensor, input_lengths: Tensor) -> list[list[Emission]]:
        log_probs, lengths = model(features, input_lengths)
        texts = []
        for frames, length in zip(log_probs.float().cpu(), lengths.tolist()):
            frames = torch.cat([frames[:length], end]) if lm else frames[:length].contiguous()
            (found,) = decoder(frames[None])
            times = (found[0].timesteps - 1).clamp(0, len(frames) - 1) if found else ()  # it begins and ends outside
            best = zip(found[0].tokens.tolist(), times.tolist()) if found else ()
            texts.append([Emission(token, at, at + 1, float(frames[at, token].exp())) for token, at in best])
        return texts

    return emissions


KENLM = b"mmap lm http://kheafield.com/code"
PACKED = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
NO_ARPA = "not an ARPA file in UTF-8 (no counts and unigrams are found)"


@contextlib.contextmanager
def plain_arpa(lm: Path) -> Iterator[Path]:
    """An ARPA file as KenLM reads it, from \\data\\ on: `lm` itself or, if that is packed by gzip or something stands
    above, a copy of it. Raises DataError, which says what it is, for a file without \\data\\."""
    with open(lm, "rb") as file:
        head = file.read(64)
    if head.startswith(KENLM):
        raise data.DataError(f"--lm {lm}: is KenLM's binary form: give the ARPA file it was built from, for its words")
    for magic, name in PACKED.items():
        if head.startswith(magic):
            raise data.DataError(f"--lm {lm}: is packed by {name}: unpack it, or pack it by gzip, which is read")
    if head.startswith(b"\\data\\"):
        yield lm
        return
    with tempfile.NamedTemporaryFile(suffix=".arpa") as copy:
        try:
            with gzip.open(lm, "rb") if head.startswith(b"\x1f\x8b") else open(lm, "rb") as file:
                for line in itertools.dropwhile(lambda line: line.removeprefix(data.MARK).strip() != b"\\data\\", file):
                    copy.write(line.removeprefix(data.MARK))
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise data.DataError(f"--lm {lm}: not a whole gzip file ({error})") from None
        copy.flush()
        if not copy.tell():
            raise data.DataError(f"--lm {lm}: {NO_ARPA}")
        yield Path(copy.name)


def arpa_words(path: Path, lm: Path) -> list[str]:
    """The unigrams of an ARPA file (plain_arpa), without <s>, </s> and <unk>, which need not be there."""
    try:
        with open(path, encoding="utf-8") as file:
            head = list(itertools.takewhile(lambda line: line.strip() != "\\1-grams:", file))
            unigrams = itertools.takewhile(lambda line: not line.startswith("\\"), file)
            words = [line.split()[1] for line in unigrams if line.strip()]
        if not words or any("-" in line for line in head):  # a negative count would crash KenLM
            raise ValueError
    except (ValueError, IndexError):
        raise data.DataError(f"--lm {lm}: {NO_ARPA}") from None
    return [word for word in words if word.lower() not in ("<s>", "</s>", "<unk>")]


@functools.cache
def tell(message: str) -> None:
    """Once, however often the language model is read."""
    print(printable(message), file=sys.stderr)


def spellings(arpa: Path, lm: Path, words: Iterable[str], tokens: list[str], silence: int) -> list[str]:
    """Lines of a lexicon: a word and the ids of its tokens. A word that the tokens cannot spell is left out."""
    lm_words, spelled = arpa_words(arpa, lm), {}
    for word in dict.fromkeys(lm_words + sorted(words)):
        with contextlib.suppress(KeyError):
            spelled[word] = " ".join(map(str, data.encode(word, tokens)))
    if spelled.keys().isdisjoint(lm_words):
        raise data.DataError(f"--lm {lm}: the tokens spell none of its {len(lm_words)} words (in capitals?)")
    if lost := [word for word in lm_words if word not in spelled]:
        counts = collections.Counter("".join(lost))
        told = data.characters_told({c: counts[c] for c in counts.keys() - data.spelled_by(tokens)}, most=10)
        tell(f"--lm {lm}: {len(lost)} of its {len(lm_words)} words cannot be recognised: no token spells {told}")
    lines = []
    for word, ids in spelled.items():
        lines.append(f"{word} {ids} {silence}\n")
        if silence == BLANK:  # the next word may follow without a blank
            lines.append(f"{word} {ids}\n")
    return lines


@contextlib.contextmanager
def silent_stderr():
    """KenLM draws a progress bar there, from C++."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# ---------------------------------------------------------------------------- transducer


def transducer_beam(model: models.Transducer, beam: int):
    """torchaudio's RNNTBeamSearch, an approximate search for the text of the largest score.

    The score is the sum over alignments, as a logarithm, divided by the number of tokens + 1. Against a search of all
    texts it found the best one in 2 of 20 tiny cases: a wider beam is no proof of a likelier text.
    """
    last = model.output.out_features - 1
    beam_search = RNNTBeamSearch(BlankLast(model), blank=last, step_max_tokens=model.MAX_SYMBOLS)

    def transcribe(features: Tensor, input_lengths: Tensor) -> list[list[int]]:
        texts = []
        for utterance, length in zip(features, input_lengths):
            ids = beam_search(utterance[:length], length, beam)[0][0]  # the best hypothesis' tokens, behind a blank
            texts.append([i + 1 for i in ids[1:]])
        return texts

    return transcribe


class BlankLast:
    """A Transducer in the words of torchaudio's RNNT, which has the blank behind the tokens: token i is our i + 1."""

    def __init__(self, model: models.Transducer):
        self.model, self.tokens = model, model.output.out_features

    def transcribe(self, features: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.every_second(*self.model.encode(features, lengths))

    def predict(self, tokens: Tensor, lengths: Tensor, state):
        """tokens (B, U), state [[h, c]], each (B, H) -> predictor_out (B, U, joiner), lengths, state."""
        state = state and tuple(s[None] for s in state[0])
        out, (h, c) = self.model.predict((tokens + 1) % self.tokens, state)
        return out, lengths, [[h[0], c[0]]]

    def join(self, encoder_out: Tensor, encoder_lengths: Tensor, predictor_out: Tensor, predictor_lengths: Tensor):
        """(1, T, joiner), (B, U, joiner) -> logits (B, T, U, V), the blank last."""
        logits = self.model.join(encoder_out[:, :, None] + predictor_out[:, None])
        return logits.roll(-1, -1), encoder_lengths, predictor_lengths
