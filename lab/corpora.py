"""The paper's corpora as they are unpacked: LibriSpeech, TED-LIUM releases 1 to 3, Common Voice. And AN4.

Layouts, and what the sets are called (SET stands for a name that read() takes):

    LibriSpeech/SET/SPEAKER/CHAPTER/*.flac and SPEAKER-CHAPTER.trans.txt    train-clean-100, dev-clean, test-other ...
    TEDLIUM_release1|TEDLIUM_release2/SET/{sph,stm}                         train, dev, test
    TEDLIUM_release-3/{data,legacy/dev,legacy/test}/{sph,stm}               train, dev, test
    cv-corpus-VERSION/LANGUAGE/SET.tsv and clips/*.mp3                      train, dev, test, validated, other ...
    cv_corpus_v1/cv-valid-SET.csv, audio in folders beside it               train, dev, test
    an4/etc/an4_{train,test}.{fileids,transcription}, wav/FILEID.wav        train, valid, test

torchaudio's dataset classes download; they do not read here. LIBRISPEECH.get_metadata opens a chapter's transcripts
again for every utterance of it, TEDLIUM gives text and times only with the decoded audio, and COMMONVOICE takes the
quotation marks in sentences for CSV quotes, so that one utterance swallows the lines that follow.
"""

import csv
import functools
import hashlib
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torchaudio

from audio_lottery.console import printable
from audio_lottery.sound import foreign
from data import MARK, DataError, Utterance, check_apart, in_parallel, waveform_of

LIBRISPEECH_960 = ["train-clean-100", "train-clean-360", "train-other-500"]  # what "train-960" stands for
TEDLIUM_RELEASES = {"TEDLIUM_release1": "release1", "TEDLIUM_release2": "release2", "TEDLIUM_release-3": "release3"}


# ---------------------------------------------------------------------------- the two entries


def read(
    corpus: str, root: Path, train_sets: list[str] | None = None, valid_sets: list[str] | None = None,
    test_sets: list[str] | None = None,
) -> dict[str, list[Utterance]]:  # fmt: skip
    """{"train": [...], "valid": [...]} and one key a test set: its name, "test-" put before it unless it starts so.

    corpus: a key of CORPORA. Without sets: the corpus's own (DEFAULT_SETS). Several sets of train or valid follow one
    another in the order given. Utterances stand in the order of file names and lines.

    Texts are normalised by normalise_librispeech, of AN4 too, _tedlium or _commonvoice. Where nothing is left, a train
    utterance is left out; one of valid or test is kept, and every word recognised in it is an error. Both are counted
    aloud. A segment that TED-LIUM marks as not to be scored is no utterance.

    Raises DataError, naming file and line, for whatever is missing or malformed, and for a recording that is in two
    parts: Common Voice's "validated" holds its "test". Audio is not decoded here.
    """
    find, read_set = CORPORA[corpus]
    if not root.is_dir():
        raise DataError(f"{root}: no such folder (--data wants the one with the unpacked corpus)")
    there = find(root)
    train, valid, tests = choose(corpus, train_sets, valid_sets, test_sets)
    for name in train + valid + tests:
        if name not in there:
            raise DataError(f"{root}: no {corpus} set {name!r} (there: {', '.join(there) or 'none'})")
    parts = {"train": train, "valid": valid}
    named = {name if name.startswith("test") else f"test-{name}": [name] for name in tests}
    if len(named) < len(tests):
        raise DataError(f"{root}: of the test sets {' '.join(tests)} two are called the same with test- before them")
    parts |= named
    utterances = {part: [u for name in names for u in read_set(there[name])] for part, names in parts.items()}
    for part, found in utterances.items():
        empty = sum(not utterance.text for utterance in found)
        if empty and part == "train":
            utterances[part] = [utterance for utterance in found if utterance.text]
            print(f"data: {empty} train utterances left out: nothing is left of their texts once normalised")
        elif empty:
            what = f"{empty} {part} utterances have an empty text once normalised"
            print(printable(f"data: {what}; kept: any word is an error"))
        if len(found) == empty:
            raise DataError(f"{root}: no utterance with a text in {' '.join(parts[part])}")
    check_apart(utterances)
    return utterances


def download(
    corpus: str, root: Path, train_sets: list[str] | None = None, valid_sets: list[str] | None = None,
    test_sets: list[str] | None = None,
) -> None:  # fmt: skip
    """Fetch what is not there yet, by torchaudio, which checks the archives' hashes. Arguments as for read().

    Unpacked in a folder beside its place and moved there whole, so that a stopped download never passes for a set.
    Of TED-LIUM the whole release is fetched; root says which: its last part is the release's folder.
    Raises DataError for Common Voice, whose archives are handed out only in a browser, and where the network fails.
    """
    train, valid, tests = choose(corpus, train_sets, valid_sets, test_sets)
    if corpus == "librispeech":
        home = root if root.name == "LibriSpeech" else root / "LibriSpeech"
        for name in train + valid + tests:
            fetch(home / name, Path("LibriSpeech", name), torchaudio.datasets.LIBRISPEECH, url=name)
    elif corpus == "tedlium":
        if root.name not in TEDLIUM_RELEASES:
            raise DataError(f"{root}: to download, let --data end in the release: {', '.join(TEDLIUM_RELEASES)}")
        fetch(root, Path(root.name), torchaudio.datasets.TEDLIUM, release=TEDLIUM_RELEASES[root.name])
    elif corpus == "an4":
        raise DataError("AN4 is fetched by git: git clone https://github.com/cmusphinx/an4")
    else:
        raise DataError("Common Voice cannot be downloaded by a program: get it at https://commonvoice.mozilla.org")


def fetch(target: Path, unpacked: Path, dataset: Callable, **kwargs) -> None:
    """dataset(folder, download=True) makes folder/unpacked, which becomes target. Nothing is done if target exists."""
    if target.exists():
        return
    partial = target.with_name(f"{target.name}.partial")  # keeps a whole archive for the next try
    try:
        shutil.rmtree(partial / unpacked.parts[0], ignore_errors=True)  # an unpacking that was cut
        partial.mkdir(parents=True, exist_ok=True)
        dataset(partial, download=True, **kwargs)
        os.replace(partial / unpacked, target)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"{target}: cannot download it ({' '.join(str(error).split())})") from None
    shutil.rmtree(partial)


def choose(corpus: str, *sets: list[str] | None) -> list[list[str]]:
    """The names of the train, valid and test sets, defaults and "train-960" filled in. None may come twice."""
    chosen = [default if names is None else names for names, default in zip(sets, DEFAULT_SETS[corpus])]
    if corpus == "librispeech":
        chosen = [[part for n in names for part in (LIBRISPEECH_960 if n == "train-960" else [n])] for names in chosen]
    names = [name for names in chosen for name in names]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"the {corpus} set {name!r} is chosen twice (of all train, valid and test sets)")
    return chosen


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, the line without its end) of a text file's lines, blank ones and a byte-order mark left out."""
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror})") from None
    with file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(MARK) if number == 1 else line
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}, line {number}: not UTF-8 ({error})") from None
            if text.strip():
                yield number, text


def listed(folder: Path, pattern: str) -> list[Path]:
    """What fits the pattern in a folder, sorted, without what a system put there (sound.foreign)."""
    return sorted(path for path in folder.glob(pattern) if not any(map(foreign, path.relative_to(folder).parts)))


# ---------------------------------------------------------------------------- LibriSpeech


def librispeech_sets(root: Path) -> dict[str, Path]:
    home = root / "LibriSpeech" if (root / "LibriSpeech").is_dir() else root
    return {path.name: path for path in listed(home, "*") if path.is_dir() and not path.name.endswith(".partial")}


def read_librispeech(folder: Path) -> list[Utterance]:
    utterances = []
    for chapter in [path for path in listed(folder, "*/*") if path.is_dir()]:
        speaker = chapter.parent.name
        transcripts = chapter / f"{speaker}-{chapter.name}.trans.txt"
        source, without_text = str(transcripts), {path.stem for path in listed(chapter, "*.flac")}
        for number, line in numbered_lines(transcripts):
            name, _, text = line.partition(" ")
            audio = chapter / f"{name}.flac"
            if name not in without_text:
                raise DataError(f"{source}, line {number}: no such audio file, or a second text for it: {audio}")
            without_text.remove(name)
            utterances.append(Utterance(audio, normalise_librispeech(text), speaker, source=source, line=number))
        if without_text:
            raise DataError(f"{transcripts}: no text for {min(without_text)}.flac")
    return utterances


def normalise_librispeech(text: str) -> str:
    """Lower case, single spaces. The texts are A to Z and apostrophes already."""
    return " ".join(text.lower().split())


# ---------------------------------------------------------------------------- TED-LIUM


def tedlium_sets(root: Path) -> dict[str, Path]:
    homes = [root / name for name in TEDLIUM_RELEASES if (root / name).is_dir()]
    if len(homes) > 1:
        raise DataError(f"{root}: holds {' and '.join(home.name for home in homes)}: let --data end in one of them")
    home = homes[0] if homes else root
    folders = {name: home / name for name in ("train", "dev", "test")}
    if (home / "legacy").is_dir():  # release 3; legacy/train is links to data
        folders = {"train": home / "data", "dev": home / "legacy" / "dev", "test": home / "legacy" / "test"}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def read_tedlium(folder: Path) -> list[Utterance]:
    if not (folder / "stm").is_dir():
        raise DataError(f"{folder / 'stm'}: no such folder")
    talks = {path.stem: path for path in listed(folder / "sph", "*.sph")}
    found = [
        tedlium_segment(line, talks, folder, str(path), number)
        for path in listed(folder / "stm", "*.stm")
        for number, line in numbered_lines(path)
        if not line.startswith(";;")  # a comment
    ]
    if empty := sum(utterance is not None and not utterance.duration for utterance in found):
        print(printable(f"data: {empty} segments of no length left out of {folder}"))
    return [utterance for utterance in found if utterance and utterance.duration]


def tedlium_segment(line: str, talks: dict[str, Path], folder: Path, source: str, number: int) -> Utterance | None:
    """A line of an stm file; None for one that is not to be scored."""
    where = f"{source}, line {number}"
    try:
        talk, _channel, speaker, begin, end, *rest = line.split(maxsplit=5)
        begin, end = float(begin), float(end)
    except ValueError:
        form = "file channel speaker begin end <labels> text"
        raise DataError(f"{where}: not of the form {form!r}: {line[:60]!r}") from None
    text = rest[0] if rest else ""
    if "ignore_time_segment_in_scoring" in text.lower():
        return None
    if not 0 <= begin <= end < 1e7:
        raise DataError(f"{where}: a segment from {begin} to {end} s (0 <= begin <= end)")
    if talk not in talks:
        raise DataError(f"{where}: no such audio file: {folder / 'sph' / f'{talk}.sph'}")
    return Utterance(talks[talk], normalise_tedlium(text), speaker, begin, end - begin, source, number)


def normalise_tedlium(text: str) -> str:
    """Lower case, single spaces, without markup: <o,f0,male>, <unk>, <sil>, {NOISE}, [..], the (2) of a pronunciation.

    A word that starts with an apostrophe joins the one before ("it 's" -> "it's"), as in the recipes of Kaldi and
    ESPnet: the corpus splits there, and WERs compare. So does "get 'em".
    """
    text = re.sub(r"\([^()]*\)|<[^<>]*>|\{[^{}]*\}|\[[^][]*\]", " ", text)  # (..) first: it may hold <..>
    return re.sub(r"(?<=\S) '", "'", " ".join(text.lower().split()))


# ---------------------------------------------------------------------------- Common Voice


def commonvoice_sets(root: Path) -> dict[str, Path]:
    old = {path.stem.removeprefix("cv-valid-"): path for path in listed(root, "cv-*.csv")}
    return {path.stem: path for path in listed(root, "*.tsv")} or old


def read_commonvoice(path: Path) -> list[Utterance]:
    old = path.suffix == ".csv"
    audio_column, text_column = ("filename", "text") if old else ("path", "sentence")
    folder = path.parent if old else path.parent / "clips"
    source, header, utterances = str(path), [], []
    for number, line in numbered_lines(path):
        where = f"{source}, line {number}"
        try:
            row = next(csv.reader([line])) if old else line.split("\t")  # the TSVs quote nothing
        except csv.Error as error:
            raise DataError(f"{where}: not CSV ({error})") from None
        if not header:
            header = [column.strip() for column in row]  # in whatever order
            for column in (audio_column, text_column):
                if column not in header:
                    raise DataError(f"{where}: no column {column!r} (there: {', '.join(header)})")
            continue
        if len(row) != len(header):
            raise DataError(f"{where}: {len(row)} columns where the header has {len(header)}")
        fields = dict(zip(header, row))
        name = fields[audio_column]
        audio = folder / (name if name.endswith(".mp3") else f"{name}.mp3")
        if not audio.is_file():
            raise DataError(f"{where}: no such audio file: {audio}")
        speaker = sys.intern(fields.get("client_id", ""))  # 128 characters, the same in many lines
        text = normalise_commonvoice(fields[text_column], "en" if old else path.parent.name)
        utterances.append(Utterance(audio, text, speaker, source=source, line=number))
    return utterances


RESPELLED = dict.fromkeys(map(ord, "\u2018\u2019\u201b\u02bb\u02bc\u00b4`\uff07\u05f3"), "'")
RESPELLED |= {0x200B: " ", **dict.fromkeys((0x55B, 0x55C, 0x55E, *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)))}
GERSHAYIM = re.compile(r"(?<=[\u05d0-\u05ea])[\"\u201d\u05f4](?=[\u05d0-\u05ea])")


def normalise_commonvoice(text: str, language: str = "") -> str:
    """Lower case, NFKC; letters, marks and digits of any language and apostrophes stay, the rest becomes a space.

    Typographic apostrophes become "'". A pair of them around words is quotation marks and goes. The joiners U+200C and
    U+200D, which Persian and Indic spellings need, stay, as do Hebrew's gershayim and Catalan's l·l; marks within an
    Armenian word, variation selectors and other invisible characters (soft hyphens, directions) vanish. A word has a
    letter or a digit. language: by its code, as Common Voice's folders have it: I is U+0131 in tr and az.
    """
    text = unicodedata.normalize("NFKC", text.translate(RESPELLED)).replace("\u0130", "i")
    text = GERSHAYIM.sub("\u05f4", (text.replace("I", "\u0131") if language in ("tr", "az") else text).lower())
    text = re.sub(r"(?<!l)·|·(?!l)", " ", "".join(map(as_kept, text)))
    text = re.sub(r"(?<!\w)'(.+?)'(?!\w)", r"\1", text)
    return " ".join(word for word in text.split() if any(unicodedata.category(c)[0] in "LN" for c in word))


@functools.cache
def as_kept(character: str) -> str:
    """The character itself, a space or nothing."""
    category = unicodedata.category(character)
    if category[0] in "LMN" or character in "'·\u05f4\u200c\u200d":
        return character
    return "" if category == "Cf" else " "


# ---------------------------------------------------------------------------- AN4

AN4_VALID = 8  # speakers of the official train part, by SHA-1 of their names
# data_sha256 of the AN4 behind results/an4 (cmusphinx/an4 at b567d132), with its test and without (--no-test).
AN4_SHA256 = {
    "2e746afe52e144caf8930339f8afa746286fade19484120bba6004ed378f1772": "train, valid and test",
    "bb4591ad7783eca94f23db5043bf69cfc12658216f0fdabb7c219f90820e7608": "train and valid",
}


def an4_sets(root: Path) -> dict[str, tuple[Path, str]]:
    return {name: (root, name) for name in ("train", "valid", "test")} if (root / "etc").is_dir() else {}


def read_an4(where: tuple[Path, str]) -> list[Utterance]:
    """A set of a clone of cmusphinx/an4, in the order of ids. valid: of the 8 speakers of the official train part whose
    SHA-1 of "an4-valid/SPEAKER" is smallest; train: of the others."""
    root, name = where
    official = "test" if name == "test" else "train"
    listed_in, texts_in = (root / "etc" / f"an4_{official}.{what}" for what in ("fileids", "transcription"))
    texts, source, found = {}, str(texts_in), []
    for number, line in numbered_lines(texts_in):
        match = re.fullmatch(r"(?:<s>)?(.*?)(?:</s>)?\s*\(([^()\s]+)\)\s*", line)
        if not match:
            raise DataError(f"{source}, line {number}: not of the form 'TEXT (ID)': {line[:60]!r}")
        if match[2] in texts:
            raise DataError(f"{source}, line {number}: a second text for {match[2]}")
        texts[match[2]] = normalise_librispeech(match[1]), number
    for number, line in numbered_lines(listed_in):
        audio = root / "wav" / f"{line.strip()}.wav"
        if audio.stem not in texts:
            raise DataError(f"{listed_in}, line {number}: no text for {audio.stem}, or it is listed twice")
        if not audio.is_file():
            raise DataError(f"{listed_in}, line {number}: no such audio file: {audio}")
        text, line_of_text = texts.pop(audio.stem)
        found.append(Utterance(audio, text, audio.parent.name, source=source, line=line_of_text))
    if texts:
        raise DataError(f"{source}: {min(texts)} is not in {listed_in}")
    found.sort(key=lambda utterance: utterance.audio.stem)
    if official == "test":
        return found
    speakers = {utterance.speaker for utterance in found}
    if len(speakers) <= AN4_VALID:
        raise DataError(f"{listed_in}: {len(speakers)} speakers, of whom {AN4_VALID} would be for valid")
    valid = sorted(speakers, key=lambda name: hashlib.sha1(f"an4-valid/{name}".encode()).digest())[:AN4_VALID]
    return [utterance for utterance in found if (utterance.speaker in valid) == (name == "valid")]


class _Samples(torch.utils.data.Dataset):
    """SHA-256 of each utterance's samples, or the DataError met."""

    def __init__(self, utterances: list[Utterance]):
        self.utterances = utterances

    def __len__(self) -> int:
        return len(self.utterances)

    def __getitem__(self, index: int) -> str | DataError:
        try:
            return hashlib.sha256(waveform_of(self.utterances[index]).numpy().tobytes()).hexdigest()
        except DataError as error:
            return error


def hash_samples(utterances: list[Utterance], workers: int = 0) -> dict[Path, str]:
    """SHA-256 of each recording's samples (float32 at 16 kHz), so that a WAV and a FLAC of one recording have one."""
    hashes = in_parallel(_Samples(utterances), "decoding", workers)
    return dict(zip([utterance.audio for utterance in utterances], hashes))


def an4_said(data_sha256: str) -> str:
    """Whether an AN4 is the one of our tables, in a line."""
    if data_sha256 in AN4_SHA256:
        return f"data: AN4, {AN4_SHA256[data_sha256]} as in results/an4, sample for sample"
    return f"data: not the AN4 of results/an4: its ids, texts and samples have another hash ({data_sha256})"


CORPORA: dict[str, tuple[Callable, Callable]] = {  # the sets there are, by name; the utterances of one
    "librispeech": (librispeech_sets, read_librispeech),
    "tedlium": (tedlium_sets, read_tedlium),
    "commonvoice": (commonvoice_sets, read_commonvoice),
    "an4": (an4_sets, read_an4),
}
DEFAULT_SETS = {  # train, valid, test
    "librispeech": (["train-960"], ["dev-clean"], ["test-clean", "test-other"]),
    "tedlium": (["train"], ["dev"], ["test"]),
    "commonvoice": (["train"], ["dev"], ["test"]),
    "an4": (["train"], ["valid"], ["test"]),
}
