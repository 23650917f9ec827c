"""BPE tokens, and the beam searches of the test."""

import bz2
import gzip
import importlib.util
import itertools
import json
import math
from pathlib import Path

import pytest
import sentencepiece
import soak
import torch
import torchaudio
from test_train import refused
from torchaudio.models import RNNTBeamSearch

import data
import models
import train
from audio_lottery import files
from lab import decode, scoring

ROOT = Path(train.__file__).parent
needs_flashlight = pytest.mark.skipif(
    not importlib.util.find_spec("flashlight"), reason="flashlight-text is not installed: pip install flashlight-text"
)
CHARS = [data.BLANK, " ", "a", "c", "e", "h", "s", "t"]
ARPA = """\\data\\
ngram 1=8
ngram 2=3

\\1-grams:
-9\t<s>\t-0.5
-1\t</s>
-5\t<unk>
-1\tthe\t-0.5
-1\tsea\t-0.5
-1\tsee\t-0.5
-1\tseat\t-0.5
-1\teats\t-0.5

\\2-grams:
-0.1\t<s> the
-0.1\tthe sea
-0.1\tsea eats

\\end\\
"""


@pytest.fixture
def arpa(tmp_path):
    (tmp_path / "lm.arpa").write_text(ARPA)
    return tmp_path / "lm.arpa"


class Heard:
    """A CTC network that hears the same log-probs, (1, T, V), whatever is said."""

    def __init__(self, log_probs):
        self.log_probs = log_probs

    def __call__(self, features, input_lengths):
        return self.log_probs, torch.tensor([self.log_probs.shape[1]])

    def transcribe(self, features, input_lengths):
        return models.ctc_greedy(*self(features, input_lengths))


def heard(tokens, *frames):
    """Each frame is a token or {token: probability}; a token alone has 0.95, the others share the rest."""
    log_probs = torch.zeros(1, len(frames), len(tokens))
    for t, frame in enumerate(frames):
        given = frame if isinstance(frame, dict) else {frame: 0.95}
        rest = (1 - sum(given.values())) / (len(tokens) - len(given))
        log_probs[0, t] = torch.tensor([given.get(token, rest) for token in tokens]).log()
    return Heard(log_probs)


def text(model, tokens, **options):
    (ids,) = decode.transcriber(model, tokens, **options)(None, None)
    return data.decode(ids, tokens)


# ---------------------------------------------------------------------------- CTC


@needs_flashlight
def test_a_language_model_lowers_wer(arpa):
    """Heard: "the see eets". "eets" is no word; "see" is one, but "the sea" is likelier."""
    a_or_e, _ = {"a": 0.45, "e": 0.5}, data.BLANK
    model = heard(CHARS, "t", "h", "e", " ", "s", "e", _, a_or_e, " ", "e", _, a_or_e, "t", "s")
    greedy, with_lm = text(model, CHARS), text(model, CHARS, beam=50, lm=arpa)
    assert (greedy, with_lm) == ("the see eets", "the sea eats")
    assert scoring.rates(["the sea eats"], [greedy])["errors"] == [2]
    assert scoring.rates(["the sea eats"], [with_lm])["errors"] == [0]
    # Without weight only the dictionary is left, and a word of the training texts that the LM has not is in it.
    assert text(model, CHARS, beam=50, lm=arpa, lm_weight=0, word_score=0) == "the see eats"
    assert text(model, CHARS, beam=50, lm=arpa, lm_weight=0, word_score=0, words=["eets"]) == "the see eets"


@needs_flashlight
def test_the_search_maximises_what_it_says(tmp_path):
    """Against all paths of six frames over four tokens."""
    tokens = [data.BLANK, " ", "a", "b"]
    unigrams = {"<s>": -9, "</s>": -0.7, "<unk>": -4, "a": -0.4, "ab": -0.9, "ba": -1.1}  # decimal logarithms
    bigrams = {("<s>", "a"): -0.8, ("a", "ba"): -0.2, ("ab", "</s>"): -0.1}
    lines = ["\\data\\", "ngram 1=6", "ngram 2=3", "", "\\1-grams:", *(f"{p}\t{w}\t-0.3" for w, p in unigrams.items())]
    lines += ["", "\\2-grams:", *(f"{p}\t{a} {b}" for (a, b), p in bigrams.items()), "", "\\end\\", ""]
    (tmp_path / "lm.arpa").write_text("\n".join(lines))

    def lm_score(words):
        pairs = itertools.pairwise(["<s>", *words, "</s>"])
        return sum(bigrams.get((a, b), unigrams[b] - 0.3) for a, b in pairs) * math.log(10)

    generator, several_words = torch.Generator().manual_seed(0), 0
    for _ in range(10):
        log_probs = (2 * torch.randn(1, 6, 4, generator=generator)).log_softmax(-1)
        found = text(Heard(log_probs), tokens, beam=1000, lm=tmp_path / "lm.arpa", lm_weight=0.5, word_score=1.5)
        paths = torch.cartesian_prod(*[torch.arange(4)] * 6)
        sums = {}
        for path, score in zip(paths, log_probs[0, torch.arange(6), paths].sum(1)):
            ids = path.unique_consecutive()
            words = tuple(data.decode(ids[ids != 0].tolist(), tokens).split())
            if {"a", "ab", "ba"}.issuperset(words):
                sums[words] = sums.get(words, 0) + score.exp().item()
        best = max(sums, key=lambda words: math.log(sums[words]) + 0.5 * lm_score(words) + 1.5 * len(words))
        assert tuple(found.split()) == best
        several_words += len(best) > 1
    assert several_words >= 3


@needs_flashlight
def test_words_of_pieces_last_and_meet(arpa):
    """Pieces carry no sign of a word's end: its last one may last, be followed by a blank or by the next word."""
    tokens, _ = [data.BLANK, "▁t", "▁s", "▁th", "▁se", "▁the", *"▁aehst"], data.BLANK
    a_or_e = {"a": 0.45, "e": 0.5}
    for end, between in itertools.product([(), ("t",), ("t", "t"), (_,), (_, _)], [(), ("▁the", _), (_, _)]):
        model = heard(tokens, "▁the", *between, "▁se", a_or_e, *end)
        found = text(model, tokens, beam=50, lm=arpa, lm_weight=0.5)
        assert found == ("the seat" if "t" in end else "the sea"), (between, end)
        assert text(model, tokens) == ("the seet" if "t" in end else "the see")


@needs_flashlight
def test_a_beam_without_a_language_model():
    _ = data.BLANK
    model = heard(CHARS, "t", "t", "h", _, "e", " ", " ", "s", "e", _, "e")
    assert text(model, CHARS, beam=8) == text(model, CHARS) == "the see"
    # The alignments of "a" sum to 0.64, each of them less than that of nothing, 0.36.
    model = Heard(torch.tensor([[[0.6, 0.4], [0.6, 0.4]]]).log())
    assert text(model, [data.BLANK, "a"], beam=8) == "a" and text(model, [data.BLANK, "a"]) == ""
    assert decode.transcriber(model, CHARS) == model.transcribe  # beam 1


WITHOUT_UNK = ARPA.replace("-5\t<unk>\n", "").replace("ngram 1=8", "ngram 1=7")


@needs_flashlight
@pytest.mark.parametrize(
    "content",
    [
        b"# made by lmplz -o 2\n#\n\n" + ARPA.encode(), b"made by another program, with -1\n" + ARPA.encode(),
        b"\xef\xbb\xbf" + ARPA.encode(), ARPA.replace("\n", "\r\n").encode(), gzip.compress(ARPA.encode(), mtime=0),
        gzip.compress(b"# made\n" + ARPA.encode(), mtime=0), WITHOUT_UNK.encode(),
    ],
    ids=["comments", "a line above", "byte-order mark", "CRLF", "gzip", "gzip and comments", "no <unk>"],
)  # fmt: skip
def test_arpa_files_as_they_are(content, arpa):
    a_or_e, _ = {"a": 0.45, "e": 0.5}, data.BLANK
    model = heard(CHARS, "t", "h", "e", " ", "s", "e", _, a_or_e, " ", "e", _, a_or_e, "t", "s")
    arpa.write_bytes(content)
    assert text(model, CHARS, beam=50, lm=arpa) == "the sea eats"


def test_a_word_that_only_longer_tokens_could_spell_is_left_out(arpa):
    """A foreign ticket's tokens: each letter of "the" is in one, but not by itself."""
    tokens = [data.BLANK, " ", "th", "e", "s", "a", "t"]
    words = [line.split()[0] for line in decode.spellings(arpa, arpa, ["tea", "hat"], tokens, 1)]
    assert "the" not in words and "hat" not in words and {"sea", "eats", "tea"} <= set(words)


NO_ARPA = "not an ARPA file in UTF-8 (no counts and unigrams are found)"
KENLM = b"mmap lm http://kheafield.com/code format version 5\n\0" + bytes(500)
NO_BEGIN = ARPA.replace("-9\t<s>\t-0.5\n", "").replace("ngram 1=8", "ngram 1=7").replace("-0.1\t<s> the\n", "")


@needs_flashlight
@pytest.mark.parametrize(
    "content, message",
    [
        (b"", NO_ARPA),
        (KENLM, "lm.arpa: is KenLM's binary form: give the ARPA file it was built from, for its words"),
        (bz2.compress(ARPA.encode()), "lm.arpa: is packed by bzip2: unpack it, or pack it by gzip, which is read"),
        (gzip.compress(ARPA.encode(), mtime=0)[:-30], "lm.arpa: not a whole gzip file ("),
        (gzip.compress(b"hello", mtime=0), NO_ARPA),
        (NO_BEGIN.replace("ngram 2=3", "ngram 2=2").encode(), "KenLM cannot read it (The ARPA file is missing <s>"),
        (b"\xff\xfe" + bytes(100), NO_ARPA),
        (ARPA.replace("ngram 1=8", "ngram 1=-8").encode(), NO_ARPA),
        (ARPA.encode()[:-40], "KenLM cannot read it ("),
        (ARPA.replace("ngram 2=3", "ngram 2=4").encode(), "KenLM cannot read it ("),
        (ARPA.upper().replace("NGRAM", "ngram").replace("DATA", "data").replace("GRAMS:", "grams:").encode(),
         "the tokens spell none of its 5 words (in capitals?)"),
    ],
)  # fmt: skip
def test_a_broken_language_model_is_one_line(content, message, tmp_path, capfd):
    (tmp_path / "lm.arpa").write_bytes(content)
    argv = ["--data", ROOT / "demo", "--backbone", "cnn-lstm", "--lm", tmp_path / "lm.arpa", "--out", tmp_path / "run"]
    assert message in refused(capfd, *argv)
    assert not (tmp_path / "run").exists()


def test_without_flashlight(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(__import__("sys").modules, "torchaudio.models.decoder", None)
    said = refused(capsys, "--backbone", "conformer", "--beam", "4", "--out", tmp_path / "run")
    assert "a beam search needs flashlight-text: pip install flashlight-text==0.0.7 (the extra [lm])" in said


# ---------------------------------------------------------------------------- transducer


def taught(features, lengths, targets):
    """A small transducer after 80 steps on these utterances, each as often as it is given."""
    torch.manual_seed(0)
    sizes = dict(window=12, channels=8, hidden=16, layers=1, predictor=8, joiner=16, dropout=0.0, ctc_weight=0.0)
    model = models.Transducer(5, **sizes)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(80):
        optimizer.zero_grad()
        model.loss(features, lengths, targets, (targets > 0).sum(1)).backward()
        optimizer.step()
    return model.eval()


def test_transducer_beam_on_a_sure_network_is_greedy():
    features, lengths = torch.randn(2, 90, 80, generator=torch.Generator().manual_seed(0)), torch.tensor([90, 61])
    model = taught(features, lengths, torch.tensor([[1, 2, 3, 3, 4], [4, 1, 1, 0, 0]]))
    with torch.inference_mode():
        assert model.transcribe(features, lengths) == [[1, 2, 3, 3, 4], [4, 1, 1]]
        for beam in (2, 3, 4):
            found = decode.transcriber(model, ["-"] * 5, beam=beam)(features, lengths)
            assert found == [[1, 2, 3, 3, 4], [4, 1, 1]]


def test_transducer_beam_finds_what_is_likelier_than_greedy():
    """Heard fifty times: 13 are "1 2 1 4", 13 "1 3 1 2", 24 "4 4 4". Greedy starts with 1, "4 4 4" is the likeliest."""
    features, lengths = torch.randn(1, 24, 80, generator=torch.Generator().manual_seed(0)), torch.tensor([24])
    targets = torch.tensor(13 * [[1, 2, 1, 4]] + 13 * [[1, 3, 1, 2]] + 24 * [[4, 4, 4, 0]])
    model = taught(features.expand(50, -1, -1), lengths.expand(50), targets)
    with torch.inference_mode():
        assert model.transcribe(features, lengths)[0] in ([1, 2, 1, 4], [1, 3, 1, 2])
        assert decode.transcriber(model, ["-"] * 5, beam=4)(features, lengths) == [[4, 4, 4]]
        found = RNNTBeamSearch(decode.BlankLast(model), blank=4)(features, lengths, 4)
        for token_ids, _, _, score in found[:3]:  # ln p, but for what the search dropped
            ids = torch.tensor([[i + 1 for i in token_ids[1:]]])
            logits, frames = model(features, lengths, ids)
            count = torch.tensor([ids.shape[1]])
            loss = torchaudio.functional.rnnt_loss(logits, ids.int(), frames.int(), count.int(), 0, reduction="sum")
            assert -0.1 < score + loss.item() < 1e-4
        assert abs(found[0][3] - math.log(24 / 50)) < 0.1


@torch.inference_mode()
def test_transducer_beam_ends_with_the_utterance():
    """This one never stops: eight tokens a frame of 80 ms, twelve frames and eight."""
    model = models.build("rnnt", "demo", 5).eval()
    model.output.bias[1] = 100
    found = decode.transcriber(model, ["-"] * 5, beam=2)(torch.randn(2, 90, 80), torch.tensor([90, 61]))
    assert found == [12 * 8 * [1], 8 * 8 * [1]]


def test_transducer_beam_needs_more_tokens():
    with pytest.raises(data.DataError, match="--beam 5: for rnnt it must be below the number of tokens, 5"):
        decode.transcriber(models.build("rnnt", "demo", 5), ["-"] * 5, beam=5)


# ---------------------------------------------------------------------------- tokens


@pytest.fixture(scope="module")
def demo():
    return data.read_corpus(ROOT / "demo")


@pytest.mark.parametrize("count", [29, 60, 300])
def test_bpe_as_sentencepiece_does(count, demo, monkeypatch):
    models_made = []
    processor = sentencepiece.SentencePieceProcessor

    def keep(model_proto):
        models_made.append(model_proto)
        return processor(model_proto=model_proto)

    monkeypatch.setattr(sentencepiece, "SentencePieceProcessor", keep)
    tokens = data.tokens_of(demo["train"], f"bpe:{count}")
    assert len(tokens) == count and tokens[0] == data.BLANK and "▁" in tokens
    assert data.tokens_of(demo["train"], f"bpe:{count}") == tokens and models_made[0] == models_made[1]
    theirs = processor(model_proto=models_made[0])
    for utterance in (u for split in demo.values() for u in split):
        if data.unseen_characters([utterance], tokens):
            continue
        ids = data.encode(utterance.text, tokens)
        assert ids == theirs.encode(utterance.text) and data.decode(ids, tokens) == utterance.text


def test_bpe_characters_without_a_token(tmp_path):
    train_texts = [data.Utterance(tmp_path, text) for text in ("banana ban", "nab a ban")]
    tokens = data.tokens_of(train_texts, "bpe:8")
    assert set(tokens) == {data.BLANK, "▁", "a", "b", "n", "an", "▁b", "▁ban"}
    seen = data.Utterance(tmp_path, "a bañ ña")
    assert data.unseen_characters([seen], tokens) == {"ñ": 2}
    assert data.encode("ban", tokens) == [tokens.index("▁ban")]
    assert [tokens[i] for i in data.encode("nanab", tokens)] == ["▁", "n", "an", "a", "b"]


def test_refused_tokens(demo, tmp_path):
    with pytest.raises(data.DataError, match=r"bpe:9: .*Vocabulary size is smaller than required_chars. 9 vs 29"):
        data.tokens_of(demo["train"], "bpe:9")
    with pytest.raises(data.DataError, match=r"bpe:90000: .*Please set it to a value <= \d+"):
        data.tokens_of(demo["train"], "bpe:90000")
    with pytest.raises(data.DataError, match="has the character '▁', which stands for a space in BPE pieces"):
        data.tokens_of([data.Utterance(tmp_path, "a ▁ b")])


# ---------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--tokens", "bpe"], "--tokens must be chars or bpe:N, N a number of tokens, got 'bpe'"),
        (["--tokens", "bpe:0"], "--tokens must be chars or bpe:N"),
        (["--beam", "0"], "--beam must be at least 1 and "),
        (["--lm-weight", "0"], "--lm-weight and --word-score need --lm"),
        (["--lm", "README.md"], "--lm goes with CTC (--backbone cnn-lstm or conformer); rnnt has --beam alone"),
        (["--backbone", "cnn-lstm", "--lm", "/nowhere"], "--lm /nowhere: no such file"),
        (["--backbone", "cnn-lstm", "--lm", __file__, "--word-score", "nan"], "--word-score must be a finite number"),
    ],
)
def test_unusable_flags(argv, message, capsys, tmp_path):
    assert message in refused(capsys, "--out", tmp_path / "run", *argv)


@pytest.fixture
def small_networks(monkeypatch):
    soak.shrink_models(monkeypatch.setitem)


def small_run(tmp_path, *flags):
    argv = ["--data", str(soak.small_corpus(tmp_path)), "--out", str(tmp_path / "run"), "--epochs", "1"]
    return train.main([*argv, "--sparsity", "0.2", *map(str, flags)])


def test_only_the_test_is_searched(small_networks, tmp_path, monkeypatch):
    searched = []

    def transcriber(model, *_, **__):
        return lambda features, lengths: searched.append(len(lengths)) or model.transcribe(features, lengths)

    monkeypatch.setattr(decode, "transcriber", transcriber)
    assert small_run(tmp_path) == 0
    assert searched == [2, 2]  # the two test utterances, once a round


@needs_flashlight
def test_a_run_with_pieces_and_a_language_model(small_networks, arpa, tmp_path, capsys):
    flags = ["--backbone", "cnn-lstm", "--tokens", "bpe:25", "--beam", "8", "--lm", arpa]
    assert small_run(tmp_path, *flags) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {"tokens": "bpe:25", "beam": 8, "lm_weight": 1.97, "word_score": 4.36}.items() <= config.items()
    assert len(files.load_ticket(tmp_path / "run" / "ticket.safetensors").info["tokens"]) == 25
    assert train.main(["--retrain", str(tmp_path / "run"), "1"]) == 0
    assert "are the ledger's, bit for bit" in capsys.readouterr().out
    arpa.write_text(ARPA.replace("-0.1\tthe sea", "-0.2\tthe sea"))
    assert small_run(tmp_path, *flags) == 2
    assert "holds another run (--lm, by its hash " in capsys.readouterr().err


def test_a_transducer_run_with_a_beam(small_networks, tmp_path):
    assert small_run(tmp_path, "--tokens", "bpe:25", "--beam", "3") == 0
    assert train.main(["--retrain", str(tmp_path / "run"), "0"]) == 0


def test_words_that_no_token_spells_are_told_once(tmp_path, capsys):
    path = tmp_path / "lm.arpa"
    path.write_text(ARPA.replace("sea\t", "Über\t", 1).replace("eats\t", "l\u2019e\u0301t\u00e9\t", 1))
    tokens = [data.BLANK, *" aelsthu"]
    for _ in range(2):
        lines = decode.spellings(path, path, ["a"], tokens, 1)
        assert [line.split()[0] for line in lines] == ["the", "see", "seat", "a"]
    told = "'b' x 1, 'r' x 1, 'Ü' x 1, 'é' x 1, U+0301 x 1, '\u2019' x 1"
    assert capsys.readouterr().err == f"--lm {path}: 2 of its 5 words cannot be recognised: no token spells {told}\n"
