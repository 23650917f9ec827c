"""Language models of training texts: probabilities by hand, by NLTK, and as a reader of the file finds them."""

import itertools
import json
import math

import pytest

import data
from lab import decode, ngrams

pytest.importorskip("nltk", reason="needs nltk (the extra [lm])")
TEXTS = ["a b", "a c", "b a c", "c", "a b a b c a"]


def read(text: str) -> dict[tuple, tuple[float, float]]:
    """(logarithm, weight) of each n-gram of an ARPA file."""
    head, *sections = text.split("\n\n")
    counts = [int(line.split("=")[1]) for line in head.splitlines()[1:]]
    assert head.startswith("\\data\\\n") and sections.pop() == "\\end\\\n"
    grams = {}
    for n, (count, section) in enumerate(zip(counts, sections, strict=True), 1):
        first, *lines = section.splitlines()
        assert first == f"\\{n}-grams:" and len(lines) == count
        for line in lines:
            p, gram, *weight = line.split("\t")
            assert len(gram.split()) == n and len(weight) <= 1
            grams[tuple(gram.split())] = float(p), float(weight[0]) if weight else 0.0
    return grams


def log10(grams: dict, word: str, context: tuple) -> float:
    """As every reader of ARPA does: of the longest n-gram that is there, less the weights of the contexts given up."""
    if (*context, word) in grams:
        return grams[(*context, word)][0]
    return grams.get(context, (0, 0.0))[1] + log10(grams, word, context[1:])


def test_two_texts_by_hand():
    """Of 5 pairs one ends in a, b and c each, two in </s>. p(a | <s>) = (2 - 0.75) / 2 + 0.75 * 1 / 2 * 1 / 5 = 0.7."""
    grams = read(ngrams.arpa(["a b", "a c"], 2))
    found = {gram: round(10**p, 4) for gram, (p, _) in grams.items()}
    assert found == {
        ("<s>",): 0.0, ("<unk>",): 0.0, ("a",): 0.2, ("b",): 0.2, ("c",): 0.2, ("</s>",): 0.4,
        ("<s>", "a"): 0.7, ("a", "b"): 0.275, ("a", "c"): 0.275, ("b", "</s>"): 0.55, ("c", "</s>"): 0.55,
    }  # fmt: skip
    assert {gram[0]: round(10**weight, 4) for gram, (_, weight) in grams.items() if weight} == {
        "<s>": 0.375, "a": 0.75, "b": 0.75, "c": 0.75,
    }  # fmt: skip


@pytest.mark.parametrize("order", [2, 3, 4])
def test_a_reader_finds_what_nltk_says(order):
    from nltk.lm import KneserNeyInterpolated
    from nltk.util import everygrams

    grams = read(ngrams.arpa(TEXTS, order))
    model = KneserNeyInterpolated(order, discount=0.75)
    sentences = [["<s>"] * (order - 1) + text.split() + ["</s>"] for text in TEXTS]
    kept = [[gram for gram in everygrams(s, max_len=order) if gram[-1] != "<s>"] for s in sentences]
    model.fit(kept, [word for s in sentences for word in s])
    words = ["a", "b", "c", "</s>"]
    for length in range(order):
        for history in itertools.product(words[:3], repeat=length):
            for context in {history, (("<s>",) + history)[-(order - 1) :]}:
                whole = ("<s>",) * (order - 1 - len(context)) + context if context[:1] == ("<s>",) else context
                found = [10 ** log10(grams, word, context) for word in words]
                assert found == pytest.approx([model.score(word, whole) for word in words], rel=1e-4), context
                assert sum(found) == pytest.approx(1, abs=1e-4)
    assert log10(grams, "a", ("c", "c")) < log10(grams, "a", ()) < 0  # a context that is not there


def test_the_command(tmp_path, capsys):
    (tmp_path / "a.wav").touch()
    rows = [{"audio_filepath": "a.wav", "text": text} for text in TEXTS]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert ngrams.main([str(tmp_path), str(tmp_path / "lm.arpa")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/lm.arpa: 3-grams of 5 train texts, 14 words\n"
    assert (tmp_path / "lm.arpa").read_text() == ngrams.arpa(TEXTS)
    assert sorted(decode.arpa_words(tmp_path / "lm.arpa", tmp_path)) == ["a", "b", "c"]
    assert math.isclose(read(ngrams.arpa(TEXTS))[("<s>",)][0], -99)


@pytest.mark.parametrize("texts", [[], [" "], ["a </s>"], ["<unk> a"]])
def test_texts_that_cannot_be(texts):
    with pytest.raises(data.DataError, match="a language model needs texts of words, none of them <s>, </s> or <unk>"):
        ngrams.arpa(texts)


def test_wrong_arguments(tmp_path, capsys):
    for argv, message in (
        ([str(tmp_path / "x"), "a.arpa"], f"{tmp_path}/x: no such folder"),
        ([str(tmp_path), "a.arpa", "--corpus", "an4"], f"{tmp_path}: no an4 set 'train' (there: none)"),
        ([str(tmp_path), "a.arpa", "--order", "1"], "--order must be 2 to 5, got 1"),
    ):
        try:
            code = ngrams.main(argv)
        except SystemExit as error:
            code = error.code
        err = capsys.readouterr().err
        assert code == 2 and message in err and len(err.splitlines()) == 1, err
