"""The paper's corpora: small trees of each, layout-true, out of the demo's recordings, and every way they can break."""

import dataclasses
import hashlib
import math
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soak
import soundfile
import torchaudio
from test_resume import forge

import data
import lottery
import train
from audio_lottery import ledger, sound, verify
from lab import corpora, networks
from runner import settings
from runner.flags import parse

DEMO = Path(data.__file__).parent / "demo"


def identity(utterances):
    return data.corpus_sha256(utterances, data.hash_files(data.audio_files(utterances)))


def few(train: int, valid: int, test: int) -> dict[str, list[data.Utterance]]:
    """The demo's first recordings under 1.5 s."""
    counts = {"train": train, "valid": valid, "test": test}
    return {s: [u for u in rows if u.duration < 1.5][: counts[s]] for s, rows in data.read_corpus(DEMO).items()}


# ---------------------------------------------------------------------------- trees


def librispeech_tree(folder: Path, recordings: dict[str, list[data.Utterance]]) -> Path:
    """Train over the three train sets, test over the two test sets, in turn. Returns what --data wants."""
    names = {"train": corpora.LIBRISPEECH_960, "valid": ["dev-clean"], "test": ["test-clean", "test-other"]}
    for split, utterances in recordings.items():
        for i, utterance in enumerate(utterances):
            name, number = names[split][i % len(names[split])], i // len(names[split])
            speaker, chapter = str(100 + number % 2), str(7000 + i % len(names[split]))  # two speakers a set
            home = folder / "LibriSpeech" / name / speaker / chapter
            home.mkdir(parents=True, exist_ok=True)
            key = f"{speaker}-{chapter}-{number:04d}"
            soundfile.write(home / f"{key}.flac", sound.load_audio(utterance.audio).numpy(), 16_000, subtype="PCM_16")
            with open(home / f"{speaker}-{chapter}.trans.txt", "a") as file:
                file.write(f"{key} {utterance.text.upper()}\n")
    (folder / "LibriSpeech" / "SPEAKERS.TXT").write_text(";ID |SEX| SUBSET\n")
    return folder


def tedlium_tree(folder: Path, recordings: dict[str, list[data.Utterance]], release: int) -> Path:
    """Two talks a set, their recordings half a second apart. Returns the release's folder, which --data wants."""
    home = folder / list(corpora.TEDLIUM_RELEASES)[release - 1]
    for split, utterances in recordings.items():
        name = {"valid": "dev"}.get(split, split)
        part = home / name if release < 3 else home / ("data" if name == "train" else f"legacy/{name}")
        (part / "sph").mkdir(parents=True)
        (part / "stm").mkdir()
        for number in (1, 2):
            talk, labels = f"Allison_20{number:02d}", {1: "<F0_F>", 2: "<o,f0,female>", 3: "<NA>"}[release]
            lines, pieces, begin = [";; LABEL\n"], [np.zeros(8000, "float32")], 0.5
            lines.append(f"{talk} 1 inter_segment_gap 0 {begin} <o,,unknown> ignore_time_segment_in_scoring\n")
            for utterance in utterances[number - 1 :: 2]:
                samples = sound.load_audio(utterance.audio).numpy()
                end = round(begin + math.ceil(len(samples) / 160) / 100, 2)
                text = utterance.text.replace("'", " '")
                if release == 1:
                    text = f"<sil> {text}(2) {{NOISE}} ({talk}-{begin:.2f}-{end:.2f}-{labels})"
                lines.append(f"{talk} 1 {talk} {begin:.2f} {end:.2f} {labels} {text} <unk>\n")
                pieces += [samples, np.zeros(round((end + 0.5) * 16_000) - sum(map(len, pieces)) - len(samples))]
                begin = round(end + 0.5, 2)
            (part / "stm" / f"{talk}.stm").write_text("".join(lines))
            soundfile.write(part / "sph" / f"{talk}.sph", np.concatenate(pieces), 16_000, "PCM_16", format="NIST")
            if part == home / "data":
                for kind in ("stm", "sph"):
                    (home / "legacy" / "train" / kind).mkdir(parents=True, exist_ok=True)
                    link = home / "legacy" / "train" / kind / f"{talk}.{kind}"
                    link.symlink_to(Path("..", "..", "..", "data", kind, f"{talk}.{kind}"))
    return home


def commonvoice_tree(folder: Path, recordings: dict[str, list[data.Utterance]]) -> Path:
    """English in the layout of today. Returns the language's folder, which --data wants."""
    home = folder / "cv-corpus-17.0-2024-03-15" / "en"
    (home / "clips").mkdir(parents=True)
    for split, utterances in recordings.items():
        lines = ["client_id\tpath\tsentence_id\tsentence\tup_votes\tage\n"]
        for i, utterance in enumerate(utterances):
            path = f"common_voice_en_{split}_{i}.mp3"
            soundfile.write(home / "clips" / path, sound.load_audio(utterance.audio).numpy(), 16_000)
            sentence = '"' + utterance.text.capitalize().replace("'", "\u2019") + "." + '"' * (i % 2)
            lines.append(f"{i % 3:0128x}\t{path.removesuffix('.mp3' * (i % 2))}\t{i}\t{sentence}\t2\t\n")
        name = {"valid": "dev"}.get(split, split)
        (home / f"{name}.tsv").write_text("".join(lines), encoding="utf-8")
    return home


def an4_tree(folder: Path, recordings: dict[str, list[data.Utterance]], ending: str = "wav") -> Path:
    """Ten speakers in train, of whom the eight of valid; one in test."""
    speakers = [f"m{letter}x{letter}" for letter in "abcdefghij"]
    (folder / "etc").mkdir(parents=True)
    clips = [*recordings["train"], *recordings["valid"]]
    parts = {"train": [(speakers[i % 10], clips[i % len(clips)]) for i in range(20)]}
    parts["test"] = [("fzzz", utterance) for utterance in recordings["test"]]
    for part, rows in parts.items():
        names, lines = [], []
        for i, (speaker, utterance) in enumerate(rows):
            key, text = f"an{100 + i}-{speaker}-b", utterance.text.upper()
            names.append(f"an4_{part}/{speaker}/{key}")
            lines.append(f"<s> {text} </s> ({key})" if part == "train" else f"{text} ({key})")
            audio = folder / "wav" / f"{names[-1]}.{ending}"
            audio.parent.mkdir(parents=True, exist_ok=True)
            samples = (sound.load_audio(utterance.audio).numpy() * 2**15).round().clip(-(2**15), 2**15 - 1)
            soundfile.write(audio, samples.astype("int16"), 16_000)
        (folder / "etc" / f"an4_{part}.fileids").write_text("\n".join(reversed(names)))  # in whatever order
        (folder / "etc" / f"an4_{part}.transcription").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def recordings():
    return few(6, 2, 4)


def tree(corpus: str, folder: Path, recordings, release: int = 2) -> Path:
    if corpus == "tedlium":
        return tedlium_tree(folder, recordings, release)
    trees = {"librispeech": librispeech_tree, "commonvoice": commonvoice_tree, "an4": an4_tree}
    return trees[corpus](folder, recordings)


def texts(utterances) -> list[str]:
    return sorted(utterance.text for utterance in utterances)


# ---------------------------------------------------------------------------- what is read


def test_librispeech(tmp_path, recordings):
    root = librispeech_tree(tmp_path, recordings)
    corpus = corpora.read("librispeech", root)
    assert list(corpus) == ["train", "valid", "test-clean", "test-other"]
    assert texts(corpus["train"]) == texts(recordings["train"]) and len(corpus["train"]) == 6
    assert texts(corpus["valid"]) == texts(recordings["valid"])
    assert texts(corpus["test-clean"] + corpus["test-other"]) == texts(recordings["test"])
    first = corpus["train"][0]
    assert first.audio == tmp_path / "LibriSpeech/train-clean-100/100/7000/100-7000-0000.flac"
    assert first.text == recordings["train"][0].text and first.speaker == "100"
    assert (first.offset, first.duration) == (None, None)
    original = sound.load_audio(recordings["train"][0].audio)
    assert abs(sound.load_audio(first.audio) - original).max() <= 1 / 32768
    assert corpora.read("librispeech", root / "LibriSpeech") == corpus  # either folder will do


@pytest.mark.parametrize("release", [1, 2, 3])
def test_tedlium(tmp_path, recordings, release):
    root = tedlium_tree(tmp_path, recordings, release)
    corpus = corpora.read("tedlium", root)
    assert list(corpus) == ["train", "valid", "test"]
    for split, utterances in corpus.items():
        assert texts(utterances) == texts(recordings[split])
    originals = recordings["train"][0::2] + recordings["train"][1::2]  # by talk
    for utterance, original in zip(corpus["train"], originals, strict=True):
        segment = sound.load_audio(utterance.audio, utterance.offset, utterance.duration)
        samples = sound.load_audio(original.audio)
        assert utterance.text == original.text and 0 <= len(segment) - len(samples) <= 160
        assert abs(segment[: len(samples)] - samples).max() <= 1 / 32768 and (segment[len(samples) :] == 0).all()
    assert {utterance.speaker for utterance in corpus["train"]} == {"Allison_2001", "Allison_2002"}
    assert corpus["train"][0].audio.parent == root / ("data" if release == 3 else "train") / "sph"
    assert corpora.read("tedlium", tmp_path) == corpus


def test_commonvoice(tmp_path, recordings):
    root = commonvoice_tree(tmp_path, recordings)
    corpus = corpora.read("commonvoice", root)
    assert list(corpus) == ["train", "valid", "test"]
    for split, utterances in corpus.items():
        assert [utterance.text for utterance in utterances] == [utterance.text for utterance in recordings[split]]
        for utterance, original in zip(utterances, recordings[split]):
            assert len(sound.load_audio(utterance.audio)) == pytest.approx(16_000 * original.duration, abs=2400)
    assert corpus["train"][0].audio == root / "clips" / "common_voice_en_train_0.mp3"
    assert corpus["train"][3].speaker == f"{0:0128x}" and corpus["train"][4].speaker == f"{1:0128x}"


def test_commonvoice_of_2017(tmp_path):
    (tmp_path / "cv-valid-train").mkdir()
    for name in ("train", "dev", "test"):
        soundfile.write(
            tmp_path / "cv-valid-train" / f"{name}.mp3", sound.load_audio(DEMO / "audio/added.opus"), 16_000
        )
        text = f'filename,text,up_votes\ncv-valid-train/{name}.mp3,"well, it\'s {name}",1\n'
        (tmp_path / f"cv-valid-{name}.csv").write_text(text)
    corpus = corpora.read("commonvoice", tmp_path)
    assert corpus["valid"] == [data.Utterance(tmp_path / "cv-valid-train" / "dev.mp3", "well it's dev")]
    (tmp_path / "cv-valid-dev.csv").write_text(f"filename,text\n{'x' * 200_000},hi\n")
    with pytest.raises(data.DataError, match=r"cv-valid-dev.csv, line 2: not CSV \(field larger than"):
        corpora.read("commonvoice", tmp_path)


def test_an4(tmp_path, recordings):
    found = corpora.read("an4", an4_tree(tmp_path / "an4", recordings))
    assert {part: len(rows) for part, rows in found.items()} == {"train": 4, "valid": 16, "test": 4}
    speakers = {part: sorted({u.speaker for u in rows}) for part, rows in found.items()}
    digests = {hashlib.sha1(f"an4-valid/m{c}x{c}".encode()).hexdigest(): f"m{c}x{c}" for c in "abcdefghij"}
    ordered = [digests[digest] for digest in sorted(digests)]
    assert speakers == {"train": sorted(ordered[8:]), "valid": sorted(ordered[:8]), "test": ["fzzz"]}
    assert [u.audio.stem for u in found["test"]] == [f"an{100 + i}-fzzz-b" for i in range(4)]  # not as they are listed
    assert [u.text for u in found["test"]] == [u.text for u in recordings["test"]]
    for path in (tmp_path / "an4" / "etc").glob("an4_test.*"):
        path.unlink()
    args = parse(["--corpus", "an4", "--data", str(tmp_path / "an4"), "--no-test"])
    assert settings.read_corpus(args) == {part: found[part] for part in ("train", "valid")}  # it never reads the test
    first = min(found["valid"] + found["train"], key=lambda u: u.audio.stem)
    assert first.text == recordings["train"][0].text and first.line == 1


def test_an4_is_known_by_its_samples(tmp_path, recordings):
    def sha256(root):
        found = corpora.read("an4", root)
        return data.corpus_sha256(found, corpora.hash_samples([u for part in found.values() for u in part]))

    wav, flac = (an4_tree(tmp_path / ending, recordings, ending) for ending in ("wav", "flac"))
    for path in flac.rglob("*.flac"):  # named as a clone names them, other bytes of the same samples
        path.rename(path.with_suffix(".wav"))
    known = sha256(wav)
    assert known == sha256(flac) and identity(corpora.read("an4", wav)) != identity(corpora.read("an4", flac))
    assert "not the AN4 of results/an4" in corpora.an4_said(known) and known in corpora.an4_said(known)
    assert all("as in results/an4" in corpora.an4_said(there) for there in corpora.AN4_SHA256)
    changed = next((wav / "wav" / "an4_test").rglob("*.wav"))
    samples, rate = soundfile.read(changed, dtype="int16")
    samples[7] += 1
    soundfile.write(changed, samples, rate)
    assert sha256(wav) != known


def test_the_manifests_of_an4_are_its_clone():
    manifests = Path(data.__file__).parent.parent / "shared" / "corpora" / "an4"
    if not manifests.is_dir():
        pytest.skip("needs ../shared/corpora/an4, which is not part of the project")
    found = data.read_corpus(manifests)
    assert {part: len(rows) for part, rows in found.items()} == {"train": 846, "valid": 102, "test": 130}
    hashes = corpora.hash_samples([u for part in found.values() for u in part])
    hashes = {path.with_suffix(".wav"): sha256 for path, sha256 in hashes.items()}
    for part, rows in found.items():
        clone = [dataclasses.replace(u, audio=u.audio.with_suffix(".wav"), duration=None) for u in rows]
        found[part] = sorted(clone, key=lambda u: u.audio.stem)
    assert corpora.AN4_SHA256[data.corpus_sha256(found, hashes)] == "train, valid and test"
    del found["test"]
    assert corpora.AN4_SHA256[data.corpus_sha256(found, hashes)] == "train and valid"


def test_choice_of_sets(tmp_path, recordings):
    librispeech = librispeech_tree(tmp_path / "a", recordings)
    corpus = corpora.read("librispeech", librispeech, ["train-other-500", "train-clean-100"], test_sets=["test-other"])
    assert list(corpus) == ["train", "valid", "test-other"]
    sets = [utterance.audio.parents[2].name for utterance in corpus["train"]]
    assert sets == ["train-other-500"] * 2 + ["train-clean-100"] * 2
    commonvoice = commonvoice_tree(tmp_path / "b", recordings)
    corpus = corpora.read("commonvoice", commonvoice, ["test"], ["train"], ["dev"])
    assert {part: len(utterances) for part, utterances in corpus.items()} == {"train": 4, "valid": 6, "test-dev": 2}


def test_empty_texts_leave_train_alone(tmp_path, recordings, capsys):
    root = tedlium_tree(tmp_path, recordings, 2)
    for name in ("train", "test"):
        with open(root / name / "stm" / "Allison_2001.stm", "a") as file:
            file.write("Allison_2001 1 Allison_2001 0.5 1.0 <NA> {NOISE} <unk>\n")
    corpus = corpora.read("tedlium", root)
    assert len(corpus["train"]) == 6 and "" not in texts(corpus["train"])
    assert len(corpus["test"]) == 5 and texts(corpus["test"])[0] == ""
    said = capsys.readouterr().out
    assert "1 train utterances left out: nothing is left of their texts" in said
    assert "1 test utterances have an empty text once normalised; kept" in said


def companions(root: Path) -> None:
    """What macOS, a NAS and a notebook put beside the files of a tree."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for path in [path for path in folder.iterdir() if path.is_file()]:
            (folder / f"._{path.name}").write_bytes(b"\x00\x05\x16\x07 no corpus")
        for name in (".ipynb_checkpoints", "@eaDir"):
            (folder / name / "x").mkdir(parents=True)
            (folder / name / "x" / "100-7000-0000.flac").touch()
        (folder / ".DS_Store").touch()


@pytest.mark.parametrize("corpus", ["librispeech", "tedlium", "commonvoice"])
def test_what_systems_put_beside_a_corpus_is_no_part_of_it(corpus, tmp_path):
    root = tree(corpus, tmp_path, few(6, 1, 2))
    before = corpora.read(corpus, root)
    companions(root)
    assert corpora.read(corpus, root) == before
    sets = CORPUS_SETS[corpus]
    assert list(corpora.CORPORA[corpus][0](root)) == sets


CORPUS_SETS = {
    "librispeech": ["dev-clean", "test-clean", "test-other", *corpora.LIBRISPEECH_960],
    "tedlium": ["train", "dev", "test"],
    "commonvoice": ["dev", "test", "train"],
}


@pytest.mark.parametrize("corpus", ["librispeech", "tedlium", "commonvoice"])
def test_a_byte_order_mark_is_read_over(corpus, tmp_path):
    root = tree(corpus, tmp_path, few(6, 1, 2))
    before = corpora.read(corpus, root)
    for path in root.rglob("*"):
        if path.suffix in (".txt", ".stm", ".tsv"):
            path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert corpora.read(corpus, root) == before


def test_segments_of_no_length_are_left_out_and_counted(tmp_path, recordings, capsys):
    root = tedlium_tree(tmp_path, recordings, 2)
    before = corpora.read("tedlium", root)
    for name in ("Allison_2001", "Allison_2002"):
        with open(root / "train" / "stm" / f"{name}.stm", "a") as file:
            file.write(f"{name} 1 {name} 0.5 0.5 <NA> hello\n")
    capsys.readouterr()
    assert corpora.read("tedlium", root) == before
    assert capsys.readouterr().out == f"data: 2 segments of no length left out of {root / 'train'}\n"


def test_common_voice_has_its_columns_in_any_order(tmp_path, recordings):
    root = commonvoice_tree(tmp_path, recordings)
    before = corpora.read("commonvoice", root)
    for path in root.glob("*.tsv"):
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        order = [3, 5, 1, 4, 0, 2]
        path.write_text("".join("\t".join(row[i] for i in order) + "\n" for row in rows), encoding="utf-8")
    assert corpora.read("commonvoice", root) == before
    assert [utterance.line for utterance in before["train"]] == [2, 3, 4, 5, 6, 7]


TEXTS = {
    corpora.normalise_librispeech: [("  THAT'S  IT ", "that's it")],
    corpora.normalise_tedlium: [
        ("<o,f0,male> it 's what we 've <unk> got", "it's what we've got"),
        ("{COUGH} but <sil> i was for(2) THIS [x] {SMACK}", "but i was for this"),
        ("don(2) 't (AimeeMullins_2009P-1.35-11.16-<o,f0,female>)", "don't"),
        ("'t is the parents ' house", "'t is the parents' house"),
        ("<NA> {NOISE} (3)", ""),
    ],
    corpora.normalise_commonvoice: [
        ('"Well-known," she said… IT\u2019S “good”!', "well known she said it's good"),
        ("\u2018It\u2019s\u2019 the dogs' 'n' C\u02bchoazh un po\u2019", "it's the dogs' n c'hoazh un po'"),
        ("„A\u0308rger“, groß: ¿Ñandú? 12 €", "ärger groß ñandú 12"),
        ("\uff28\uff29 日本語。 Москва́", "hi 日本語 москва́"),
        ("हिन्दी।", "हिन्दी"),
        ("نمی\u200cشد؟\u200f", "نمی\u200cشد"),
        ("co\u00adop \u2013 ' \u2013 ...", "coop"),
        ("İyi İSTANBUL", "iyi istanbul"),
        ("col·legi PARAL·LEL · fi·", "col·legi paral·lel fi"),
        ("ինչո՞ւ", "ինչու"),
        ('צה״ל צה"ל צה”ל צ\u05f3יפס "כן"', "צה״ל צה״ל צה״ל צ'יפס כן"),  # noqa: RUF001
        ("o\u02bbzbek o\u2018g", "o'zbek o'g"),
        ("ខ្មែរ\u200bថ្មី", "ខ្មែរ ថ្មី"),
        ("❤\ufe0f 葛\U000e0100 \u00a8 \u0301", "葛"),
    ],
}


@pytest.mark.parametrize("normalise", TEXTS)
def test_normalised_texts(normalise):
    for text, expected in TEXTS[normalise]:
        assert normalise(text) == expected
        assert normalise(expected) == expected


def test_a_capital_i_by_language(tmp_path):
    assert corpora.normalise_commonvoice("Iş\u0131k İyi", "tr") == "\u0131ş\u0131k iyi"
    assert corpora.normalise_commonvoice("Iş\u0131k İyi") == "iş\u0131k iyi"
    for language, said in (("tr", "\u0131s\u0131"), ("de", "is\u0131")):
        clips = tmp_path / language / "clips"
        clips.mkdir(parents=True)
        (clips / "a.mp3").touch()
        (clips.parent / "dev.tsv").write_text("client_id\tpath\tsentence\nx\ta.mp3\tIs\u0131\n")
        assert [u.text for u in corpora.read_commonvoice(clips.parent / "dev.tsv")] == [said]


# ---------------------------------------------------------------------------- what is wrong


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


CHAPTER, TALK, TSV = "LibriSpeech/dev-clean/100/7000/100-7000.trans.txt", "dev/stm/Allison_2001.stm", "dev.tsv"
BREAKS = {
    "a flac without a text": ("librispeech", CHAPTER, "100-7000-0000", "", "line 1: no such audio file, or a second"),
    "a text without a flac": ("librispeech", CHAPTER, None, "1-2-3 HI", "line 1: no such audio file.*1-2-3.flac"),
    "no text at all": ("librispeech", CHAPTER, None, "", "100-7000.trans.txt: no text for 100-7000-0000.flac"),
    "not UTF-8": ("librispeech", CHAPTER, None, b"100-7000-0000 A\n\xff", "trans.txt, line 2: not UTF-8"),
    "no trans.txt": ("librispeech", CHAPTER, None, None, "trans.txt: cannot read it .No such file"),
    "a short stm line": ("tedlium", TALK, None, "A 1 A 0.5", "stm, line 1: not of the form 'file channel speaker"),
    "a word for a time": ("tedlium", TALK, None, "A 1 A 0.5 x <NA> hi", "line 1: not of the form .*: 'A 1 A 0.5 x"),
    "end before begin": ("tedlium", TALK, None, ";;\nA 1 A 3 2.5 <NA> hi", "line 2: a segment from 3.0 to 2.5 s"),
    "NaN for a time": ("tedlium", TALK, None, "A 1 A nan 2.5 <NA> hi", "line 1: a segment from nan to 2.5 s"),
    "no such talk": ("tedlium", TALK, None, "A 1 A 1 2 <NA> hi", r"line 1: no such audio file: .*dev/sph/A.sph"),
    "no stm folder": ("tedlium", "dev/stm", None, None, "dev/stm: no such folder"),
    "no sentence": ("commonvoice", TSV, "sentence\t", "text\t", r"line 1: no column 'sentence' \(there: client"),
    "no path": ("commonvoice", TSV, "path", "file", "dev.tsv, line 1: no column 'path'"),
    "a short row": ("commonvoice", TSV, "\t2\t\n", "\t2\n", "dev.tsv, line 2: 5 columns where the header has 6"),
    "no clip": ("commonvoice", TSV, "valid_0.mp3", "x.mp3", "line 2: no such audio file: .*clips/common.*_x.mp3"),
    "no row": ("commonvoice", TSV, None, "client_id\tpath\tsentence\n", "no utterance with a text in dev"),
    "a text of no form": ("an4", "etc/an4_train.transcription", None, "<s> HI </s> an1-a-b", "line 1: not of the form"),
    "a text too many": ("an4", "etc/an4_test.transcription", None, "HI (a)\nHO (a)", "line 2: a second text for a"),
    "listed without a text": ("an4", "etc/an4_test.fileids", None, "x/y/z", "fileids, line 1: no text for z, or it is"),
    "a text not listed": ("an4", "etc/an4_test.fileids", "an4_test/fzzz/an101-fzzz-b", "", "an101-fzzz-b is not in"),
    "no recording": ("an4", "wav/an4_train/maxa/an100-maxa-b.wav", None, None, "no such audio file: .*an100-maxa"),
    "no fileids": ("an4", "etc/an4_train.fileids", None, None, "an4_train.fileids: cannot read it .No such file"),
    "an empty tsv": ("commonvoice", TSV, None, "", "no utterance with a text in dev"),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
def test_broken_trees(what, tmp_path):
    corpus, path, old, new, message = BREAKS[what]
    root = tree(corpus, tmp_path, few(3, 1, 2))
    if old is not None:
        replace(root / path, old, new)
    elif new is None:
        (root / path).rename(root / "elsewhere")
    else:
        (root / path).write_bytes(new if isinstance(new, bytes) else new.encode())
    with pytest.raises(data.DataError, match=message) as caught:
        corpora.read(corpus, root)
    assert "\n" not in str(caught.value)


def test_a_segment_beyond_the_talk_is_found_when_it_is_decoded(tmp_path, recordings):
    root = tedlium_tree(tmp_path, recordings, 2)
    (root / "dev" / "stm" / "Allison_2001.stm").write_text("Allison_2001 1 Allison_2001 0.5 99 <NA> hi\n")
    utterance = corpora.read("tedlium", root)["valid"][0]
    where = r"dev/stm/Allison_2001.stm, line 1: .*Allison_2001.sph, 0.5 s to 99 s: truncated audio: .* says 98.50 s"
    with pytest.raises(data.DataError, match=where):
        data.features_of(utterance, "log-mel")


def test_a_segment_may_end_a_frame_behind_the_talk(tmp_path, recordings):
    root = tedlium_tree(tmp_path, recordings, 2)
    seconds = soundfile.info(root / "dev" / "sph" / "Allison_2001.sph").duration
    for beyond, fits in ((0.009, True), (0.5, False)):
        line = f"Allison_2001 1 Allison_2001 0.25 {seconds + beyond} <NA> hi\n"
        (root / "dev" / "stm" / "Allison_2001.stm").write_text(line)
        utterance = corpora.read("tedlium", root)["valid"][0]
        if fits:
            assert len(data.waveform_of(utterance)) == round((seconds - 0.25) * 16_000)
            continue
        with pytest.raises(data.DataError, match=r"stm, line 1: .*, 0.25 s to .* s: truncated audio"):
            data.waveform_of(utterance)


@pytest.mark.parametrize(
    "corpus, there",
    [
        ("librispeech", "dev-clean, test-clean, test-other, train-clean-100, train-clean-360, train-other-500"),
        ("tedlium", "train, dev, test"),
        ("commonvoice", "dev, test, train"),
    ],
)
def test_missing_sets_and_folders(tmp_path, recordings, corpus, there):
    with pytest.raises(data.DataError, match="nowhere: no such folder"):
        corpora.read(corpus, tmp_path / "nowhere")
    with pytest.raises(data.DataError, match=rf"no {corpus} set '.*' \(there: none\)"):
        corpora.read(corpus, tmp_path)
    root = tree(corpus, tmp_path, recordings)
    with pytest.raises(data.DataError, match=rf"{root}: no {corpus} set 'dev-noisy' \(there: {there}\)"):
        corpora.read(corpus, root, valid_sets=["dev-noisy"])


def test_sets_chosen_twice(tmp_path, recordings):
    root = librispeech_tree(tmp_path, recordings)
    with pytest.raises(data.DataError, match="the librispeech set 'test-clean' is chosen twice"):
        corpora.read("librispeech", root, valid_sets=["test-clean"])
    with pytest.raises(data.DataError, match="the librispeech set 'train-clean-100' is chosen twice"):
        corpora.read("librispeech", root, train_sets=["train-960", "train-clean-100"])


def test_a_recording_in_two_parts(tmp_path, recordings):
    root = commonvoice_tree(tmp_path, recordings)
    rows = [(root / f"{name}.tsv").read_text().splitlines(keepends=True) for name in ("train", "test")]
    (root / "validated.tsv").write_text("".join(rows[0] + rows[1][1:]))
    with pytest.raises(data.DataError, match=r"test.tsv, line 2: .*_test_0.mp3: is in test and in train: a recording"):
        corpora.read("commonvoice", root, train_sets=["validated"])


def test_two_releases_in_one_folder(tmp_path, recordings):
    tedlium_tree(tmp_path, recordings, 1)
    release3 = tedlium_tree(tmp_path, recordings, 3)
    with pytest.raises(data.DataError, match="holds TEDLIUM_release1 and TEDLIUM_release-3: let --data end in one"):
        corpora.read("tedlium", tmp_path)
    assert texts(corpora.read("tedlium", release3)["test"]) == texts(recordings["test"])


# ---------------------------------------------------------------------------- hash


def test_hash_sees_texts_times_parts_and_bytes_but_not_the_folder(tmp_path, recordings):
    roots = [tedlium_tree(tmp_path / name, recordings, 2) for name in ("a", "b")]
    corpus, same = (corpora.read("tedlium", root) for root in roots)
    before = identity(corpus)
    assert identity(same) == before and len(before) == 64
    others = [
        {**corpus, "valid": corpus["test"], "test": corpus["valid"]},
        {**corpus, "train": corpus["train"][1:]},
        {**corpus, "train": corpus["train"][::-1]},
    ]
    replace(roots[1] / "test" / "stm" / "Allison_2001.stm", " 0.50 ", " 0.51 ")
    others.append(corpora.read("tedlium", roots[1]))
    assert len({before, *map(identity, others)}) == 5
    path = roots[0] / "train" / "sph" / "Allison_2002.sph"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert identity(corpus) != before
    path.unlink()
    with pytest.raises(data.DataError, match=r"Allison_2002.sph: cannot read the audio"):
        identity(corpus)


# ---------------------------------------------------------------------------- torchaudio


def test_the_trees_are_what_torchaudio_reads(tmp_path, recordings):
    corpus = corpora.read("librispeech", librispeech_tree(tmp_path, recordings))
    dataset = torchaudio.datasets.LIBRISPEECH(tmp_path, "dev-clean")
    rows = [dataset.get_metadata(i) for i in range(len(dataset))]
    found = [(str(u.audio.relative_to(tmp_path / "LibriSpeech")), u.text, u.speaker) for u in corpus["valid"]]
    assert found == [(path, text.lower(), str(speaker)) for path, _, text, speaker, _, _ in rows] and len(found) == 2
    for release, name in enumerate(corpora.TEDLIUM_RELEASES.values(), 1):
        tedlium_tree(tmp_path / name, recordings, release)
        for subset, lines in (("train", 2 * 2 + 6), ("dev", 2 * 2 + 2), ("test", 2 * 2 + 4)):
            assert len(torchaudio.datasets.TEDLIUM(tmp_path / name, name, subset)) == lines


def test_download_librispeech(tmp_path, recordings, monkeypatch):
    source, asked = librispeech_tree(tmp_path / "source", recordings), []

    def network(url, archive, hash_prefix):
        name = Path(archive).name.removesuffix(".tar.gz")
        asked.append(name)
        if asked == [*corpora.LIBRISPEECH_960]:
            raise ConnectionResetError("reset\nby peer")
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(source / "LibriSpeech" / name, f"LibriSpeech/{name}")

    monkeypatch.setattr(torchaudio.datasets.librispeech, "download_url_to_file", network)
    root = tmp_path / "new"
    with pytest.raises(data.DataError, match=r"LibriSpeech/train-other-500: cannot download it \(reset by peer\)"):
        corpora.download("librispeech", root)
    assert set(corpora.librispeech_sets(root)) == {"train-clean-100", "train-clean-360"}  # what came, not what did not
    (root / "LibriSpeech/train-other-500.partial/LibriSpeech/train-other-500/1/2").mkdir(parents=True)  # cut unpacking
    corpora.download("librispeech", root)
    assert asked == [*corpora.LIBRISPEECH_960, "train-other-500", "dev-clean", "test-clean", "test-other"]
    assert {path.name for path in (root / "LibriSpeech").iterdir()} == set(asked)
    utterances = corpora.read("librispeech", root)
    assert identity(utterances) == identity(corpora.read("librispeech", source))
    corpora.download("librispeech", root / "LibriSpeech")  # nothing left to fetch
    assert len(asked) == 7


@pytest.mark.parametrize("release", [1, 2, 3])
def test_download_tedlium(tmp_path, recordings, monkeypatch, release):
    source = tedlium_tree(tmp_path / "source", recordings, release)

    def network(url, archive, hash_prefix):
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(source, source.name)

    monkeypatch.setattr(torchaudio.datasets.tedlium, "download_url_to_file", network)
    with pytest.raises(data.DataError, match="to download, let --data end in the release: TEDLIUM_release1, TED"):
        corpora.download("tedlium", tmp_path)
    corpora.download("tedlium", tmp_path / source.name)
    found, expected = corpora.read("tedlium", tmp_path), corpora.read("tedlium", source)
    assert identity(found) == identity(expected)


def test_download_commonvoice(tmp_path):
    with pytest.raises(data.DataError, match="Common Voice cannot be downloaded by a program"):
        corpora.download("commonvoice", tmp_path)


# ---------------------------------------------------------------------------- trained on


@pytest.mark.parametrize("corpus", list(corpora.CORPORA))
def test_a_ticket_of_each_corpus_stopped_and_taken_up_again(corpus, tmp_path, monkeypatch, capsys):
    root = tree(corpus, tmp_path / "corpus", few(9, 2, 4))
    command = ["--corpus", corpus, "--data", str(root), "--backbone", "cnn-lstm", "--epochs", "2", "--sparsity", "0.2"]
    command += ["--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    calls = []

    def stop(ticket):
        if ticket.steps == 0:  # it is being made
            return
        calls.append(1)
        if len(calls) == 5:  # round 0: two epochs, the end, the best epoch; then round 1
            raise train.Stopped(signal.SIGTERM)

    soak.shrink_models(monkeypatch.setitem)
    with monkeypatch.context() as patch:
        patch.setattr(lottery.Ticket, "check", stop)
        assert train.main([*command, "--save-every", "0"]) == 143
    assert train.main(command) == 0
    assert "going on in round 1" in capsys.readouterr().out
    assert verify.failures(tmp_path / "run", networks) == []
    rows = ledger.read_ledger(tmp_path / "run" / "ledger.jsonl")
    assert [row["round"] for row in rows] == [0, 1] and sum(row["resumed"] for row in rows) == 1
    others = rows[1].get("other_tests", {})
    assert list(others) == (["test-other"] if corpus == "librispeech" else [])
    if others:  # each test set by itself
        assert len(others["test-other"]["test_errors"]) + len(rows[1]["test_errors"]) == 4
        assert "test-other" in (tmp_path / "run" / "report.md").read_text()
    train.train_again(tmp_path / "run", 1)
    if others:  # training again compares all of them
        errors = others["test-other"]["test_errors"]
        forge(
            tmp_path / "run",
            1,
            other_tests={"test-other": others["test-other"] | {"test_errors": [n + 1 for n in errors]}},
        )
        with pytest.raises(lottery.LotteryError, match="differs from the ledger in other_tests"):
            train.train_again(tmp_path / "run", 1)


def test_flags_of_a_corpus(tmp_path, capsys):
    for flags, message in (
        (["--corpus", "tedlium"], "--corpus tedlium wants --data DIR"),
        (["--train-sets", "train-960"], "--train-sets, --valid-sets, --test-sets go with --corpus"),
        (["--corpus", "an4", "--data", str(tmp_path)], "no an4 set 'train' (there: none)"),
        (["--corpus", "an4", "--data", str(tmp_path), "--download"], "git clone https://github.com/cmusphinx/an4"),
        (["--corpus", "librispeech", "--data", str(tmp_path)], "no librispeech set 'train-clean-100' (there: none)"),
    ):
        try:
            code = train.main([*flags, "--out", str(tmp_path / "run")])
        except SystemExit as exit:
            code = exit.code
        assert code == 2 and message in capsys.readouterr().err
