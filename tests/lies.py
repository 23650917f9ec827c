"""Files of somebody who can compute a SHA-256: tickets whose info lies, runs whose rows, masks and tickets do.

Every lie has its hashes right. `soak.py lies N` draws them at random; test_verify.py and test_networks.py name them.
"""

import contextlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

import lottery
from audio_lottery import files, ledger

DEEP = [[]]
for _ in range(60):
    DEEP = [DEEP]
JUNK = ["x", None, {}, -1, True, float("nan"), float("inf"), 10**30, DEEP, [None], "\ud800"]
DEEPER = b"[" * 100_000 + b"]" * 100_000
SHA = "5" * 64


class Forged:
    """A run folder that is rewritten so that every hash follows from what stands there."""

    def __init__(self, run: Path, rng: random.Random):
        self.run, self.rng = run, rng
        self.config = ledger.read_config(run)
        self.rows, self.end = ledger.read_lines(run / "ledger.jsonl")

    @property
    def settings(self) -> dict:
        return self.config if "machine" not in self.config else ledger.settings_of(self.config)

    def row(self, least: int = 0) -> dict:
        return self.rng.choice([row for row in self.rows if row["round"] >= least])

    def ticket(self) -> files.TicketFile:
        return files.load_ticket(self.run / "ticket.safetensors")

    def save_ticket(self, **changes) -> None:
        """With its hashes in the last row."""
        file = self.ticket()._replace(**changes)
        files.save_ticket(self.run / "ticket.safetensors", *file)
        last = self.rows[-1]
        last["info_sha256"], last["mask_sha256"] = ledger.hash_json(file.info), lottery.sha256(file.masks)
        if "trained" in changes:
            same = last["last_sha256"] == last["trained_sha256"]
            last["trained_sha256"] = lottery.sha256(file.trained)
            last["last_sha256"] = last["trained_sha256"] if same else last["last_sha256"]

    def save(self, end: bool = True) -> None:
        previous = here = ledger.hash_json(self.settings)
        for row in self.rows:
            if row["round"] or "dense" not in self.settings:
                row["config_sha256"] = here
            row["previous"] = previous
            row["timing_sha256"] = ledger.timing_hash(row)
            previous = ledger.row_hash(row)
        (self.run / "config.json").write_text(json.dumps(self.config))
        lines = list(map(ledger.ledger_line, self.rows))
        if end:
            lines.append(ledger.end_line(self.rows[-1], self.end["end"]))
        (self.run / "ledger.jsonl").write_bytes(b"".join(lines))


# ---------------------------------------------------------------------------- runs

RUNS: dict[str, Callable[[Forged], None]] = {}


def run_lie(function: Callable[[Forged], None]) -> Callable[[Forged], None]:
    RUNS[function.__name__] = function
    return function


@run_lie
def a_value_of_another_kind(f: Forged) -> None:
    row = f.row()
    key = f.rng.choice([key for key in row if key not in ("previous", "timing_sha256", "config_sha256")])
    row[key] = f.rng.choice([value for value in JUNK if value != {} or key != "versions"])
    f.save()


@run_lie
def a_verdict_behind_a_test_without_a_name(f: Forged) -> None:
    """The honest verdict stands under "", which is how a row's own test is called where tests are gone through."""
    keys = ("test_wer", "test_cer", "test_errors", "test_words", "verdict", "interval", "power")
    for row in f.rows:
        row["other_tests"] = {"": {key: row[key] for key in keys if key in row}}
        row |= {"verdict": "winning", "interval": [-0.2, -0.1]} if row["round"] else {}
    (f.run / "test.jsonl").unlink(missing_ok=True)
    f.save()


@run_lie
def a_setting_of_another_kind(f: Forged) -> None:
    hashes = [key for key in f.config if key == "dense" or key.endswith("_sha256")]
    key = f.rng.choice(
        ["seed", "sparsity", "prune_rate", "rewind_step", "epochs", "margin", "backbone", "size", *hashes]
    )
    f.config[key] = f.rng.choice([value for value in JUNK if value is not f.config[key]])  # lm_sha256 is None
    f.save()


@run_lie
def an_invented_count_of_unpruned_parameters(f: Forged) -> None:
    rest = f.rng.randrange(1, 100)
    for row in f.rows:
        row["remaining_all"] = (row["kept"] + rest) / (row["total"] + rest)
    f.save()


@run_lie
def a_setting_that_is_not_the_ticket_s(f: Forged) -> None:
    key, value = f.rng.choice([("seed", 77), ("data_sha256", SHA), ("batch_size", 5), ("lr", 0.25), ("beam", 9)])
    f.config[key] = value
    for row in f.rows:
        row |= {key: value} if key in row else {}
    f.save()


@run_lie
def an_info_that_is_not_the_configuration_s(f: Forged) -> None:
    info = dict(f.ticket().info)
    key = f.rng.choice(["seed", "sparsity", "data_sha256", "backbone", "size", "lr", "more"])
    info[key] = f.rng.choice([78, 0.5, SHA, "conformer", "paper", None])
    f.save_ticket(info=info)
    f.save()


@run_lie
def sizes_or_tokens_of_another_network(f: Forged) -> None:
    info = json.loads(json.dumps(f.ticket().info))
    what = f.rng.choice(["sizes", "dropout", "reversed", "fewer", "features", "blank"])
    if what == "sizes":
        key = f.rng.choice([key for key, value in info["sizes"].items() if isinstance(value, int)])
        info["sizes"][key] += f.rng.choice([1, 10**9, 2**62])
    elif what == "dropout":
        info["sizes"]["dropout"] = f.rng.choice([0.75, -1, 5])
    elif what == "reversed":
        info["tokens"] = info["tokens"][::-1]
    elif what == "fewer":
        info["tokens"] = info["tokens"][:-1]
    elif what == "features":
        info["features"] = "log1p-stft"
    else:
        info["tokens"][0] = "b"
    f.save_ticket(info=info)
    f.save()


@run_lie
def trained_tensors_of_another_network(f: Forged) -> None:
    file = f.ticket()
    free = [name for name in file.trained if name not in file.masks]
    name, trained = f.rng.choice(free), dict(file.trained)
    what = f.rng.choice(["lacks", "more", "dtype", "shape"])
    if what == "lacks":
        del trained[name]
    elif what == "more":
        trained["more"] = torch.zeros(f.rng.randrange(1, 9))
    elif what == "dtype":
        trained[name] = trained[name].double()
    else:
        trained[name] = trained[name].reshape(-1, 1)
    f.save_ticket(trained=trained)
    f.save()


@run_lie
def counts_that_no_test_gives(f: Forged) -> None:
    row = f.row()
    errors, words = list(row["test_errors"]), list(row["test_words"])
    at = f.rng.randrange(len(errors))
    errors[at] = f.rng.choice([-1, 0.5, -7.25])
    row["test_errors"] = errors
    row["test_wer"] = sum(errors) / sum(words)
    f.save()


@run_lie
def a_number_out_of_range(f: Forged) -> None:
    key, value = f.rng.choice(
        [("test_cer", -3), ("threshold", -1), ("device", "abacus"), ("seconds", -5), ("valid_wer", -0.5),
         ("threads", 0), ("waited", 1e8), ("resumed", -1), ("test_cer", 1e300), ("best_epoch", 0),
         ("losses", [1.0] * 99)]
    )  # fmt: skip
    f.row()[key] = value
    f.save()


@run_lie
def other_weights_at_the_last_epoch_which_is_the_best(f: Forged) -> None:
    row = f.row()
    row["valid_wers"] = [*row["valid_wers"][:-1], min(row["valid_wers"])]
    row["valid_wer"], row["best_epoch"] = ledger.best_epoch(row["valid_wers"])
    row["last_sha256"] = SHA
    f.save()


@run_lie
def no_valid_wers_and_a_valid_wer_of_its_own(f: Forged) -> None:
    for row in f.rng.choice([f.rows, [f.row()]]):
        row.pop("valid_wers")
        if f.rng.random() < 0.5:
            row.pop("losses")
        row["valid_wer"], row["best_epoch"] = 0.001, f.rng.choice([1, 99])
    f.save(end=f.rng.random() < 0.5)


@run_lie
def an_unknown_backbone(f: Forged) -> None:
    f.config["backbone"] = "crystal-ball"
    f.save_ticket(info=f.ticket().info | {"backbone": "crystal-ball"})
    f.save()


@run_lie
def masks_of_a_round_that_is_not_there(f: Forged) -> None:
    masks = f.run / "masks"
    (masks / f.rng.choice(["07.safetensors", "00.safetensors", "x"])).write_bytes(
        (masks / "01.safetensors").read_bytes()
    )


@run_lie
def another_report(f: Forged) -> None:
    path = f.run / f.rng.choice(["report.md", "report.png"])
    path.write_bytes(path.read_bytes() + b"0")


@run_lie
def a_missing_report(f: Forged) -> None:
    (f.run / f.rng.choice(["report.md", "report.png"])).unlink()


@run_lie
def no_end(f: Forged) -> None:
    f.save(end=False)


@run_lie
def another_start(f: Forged) -> None:
    f.row(least=1)[f.rng.choice(["start_sha256", "rewind_sha256"])] = SHA
    f.save()


@run_lie
def no_rewind_state_in_the_ticket(f: Forged) -> None:
    f.save_ticket(rewind=None)
    f.save()


@run_lie
def another_rewind_state(f: Forged) -> None:
    path = f.run / "rewind.safetensors"
    theta, about = files.read_sealed(path, "rewind state")
    name = f.rng.choice(list(theta))
    theta[name] = theta[name] + 1
    files.write_sealed(path, "rewind state", theta, {"run": about["run"]})
    for row in f.rows:
        row["rewind_sha256"] = lottery.sha256(theta)
    f.save()


@run_lie
def masks_that_grow_again(f: Forged) -> None:
    path = f.run / "masks" / "02.safetensors"
    masks, first = files.load_masks(path), files.load_masks(f.run / "masks" / "01.safetensors")
    name = next(n for n in masks if not first[n].all() and masks[n].any())
    masks[name].view(-1)[(~first[name]).flatten().nonzero()[0]] = True
    masks[name].view(-1)[masks[name].flatten().nonzero()[-1]] = False
    files.save_masks(path, masks)
    file = f.ticket()
    states = ({n: v.masked_fill(~masks[n], 0) if n in masks else v for n, v in s.items()} for s in file[1:3])
    rewind, trained = states
    f.save_ticket(masks=masks, rewind=rewind, trained=trained)
    f.rows[-1]["start_sha256"] = lottery.sha256(rewind)
    f.save()


@run_lie
def a_verdict_or_rate_of_its_own(f: Forged) -> None:
    row = f.row(least=1)
    what = f.rng.choice(["verdict", "interval", "test_wer", "test_cer", "remaining", "valid_wer", "remaining_all"])
    other = {"winning": "worse"}.get(row["verdict"], "winning")
    changed = {"verdict": other, "interval": [-0.5, -0.4], "test_cer": 0 if row["test_cer"] else 1}
    row[what] = changed.get(what, 0.0123)
    f.save()


@run_lie
def other_layers(f: Forged) -> None:
    row = f.row()
    layers = dict(row["kept_per_layer"])
    a, b = f.rng.sample(list(layers), 2)
    layers[a], layers[b] = layers[a] - 1, layers[b] + 1
    row["kept_per_layer"] = layers
    f.save()


@run_lie
def other_rounds(f: Forged) -> None:
    what = f.rng.choice(["fewer", "again", "number", "parent", "more keys", "other tests"])
    if what == "fewer":
        f.rows.pop()
    elif what == "again":
        f.rows.append(dict(f.rows[-1]))
    elif what == "number":
        f.row()["round"] = f.rng.choice([7, 5, 999])
    elif what == "parent":
        f.row()["mask_sha256"] = SHA
    elif what == "more keys":
        f.row()["note"] = "x"
    else:
        row = f.row()
        row["other_tests"] = {"elsewhere": {key: row[key] for key in ledger.TESTED}}
    f.save()


@run_lie
def other_texts(f: Forged) -> None:
    """In test.jsonl, their hash in the ledger as it is of them."""
    path = f.run / "test.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    line = f.rng.choice(lines)
    row = f.rows[line["round"]]
    what = f.rng.choice(["hypothesis", "reference", "counts", "fewer", "kind"])
    if what in ("hypothesis", "reference"):
        line[what] += " more"
    elif what == "counts":
        line["substitutions"] += 1
    elif what == "fewer":
        lines.remove(line)
    else:
        key = f.rng.choice(list(line))
        line[key] = f.rng.choice([value for value in JUNK if value != "x" or not isinstance(line[key], str)])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = [
        {key: value for key, value in line.items() if key != "round"} for line in lines if line["round"] == row["round"]
    ]
    row["texts_sha256"] = ledger.hash_json(own)
    f.save()


BARE = (  # lies that rows, config.json and reports alone contradict, as in a folder without masks and tickets
    "a_value_of_another_kind", "a_setting_of_another_kind", "counts_that_no_test_gives", "a_number_out_of_range",
    "other_weights_at_the_last_epoch_which_is_the_best", "another_report", "a_verdict_or_rate_of_its_own",
)  # fmt: skip


@run_lie
def no_file_or_no_json(f: Forged) -> None:
    path = f.run / f.rng.choice(
        ["config.json", "ledger.jsonl", "ticket.safetensors", "rewind.safetensors", "masks/01.safetensors", "report.md"]
    )
    path.unlink()
    what = f.rng.randrange(6)
    if what == 0:
        path.symlink_to("/dev/zero")
    elif what == 1:
        os.mkfifo(path)
    elif what == 2:
        path.mkdir()
    elif what == 3:
        path.write_bytes(DEEPER)
    elif what == 4:
        with open(path, "wb") as file:
            file.truncate(2**40)
    else:
        path.write_bytes(f.rng.choice([b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" + b"9" * 5000 + b"]", b"\xff", b""]))


# ---------------------------------------------------------------------------- tickets


class Lying:
    """A ticket, and what a lie makes of it. `info` may become anything."""

    def __init__(self, path: Path, rng: random.Random):
        self.path, self.rng = path, rng
        self.masks, self.rewind, self.trained, self.info, _ = files.load_ticket(path)
        self.info, self.trained = json.loads(json.dumps(self.info)), dict(self.trained)

    def save(self) -> None:
        with unasked():
            files.save_ticket(self.path, self.masks, self.rewind, self.trained, self.info)


@contextlib.contextmanager
def unasked():
    """Inside, what is written is not checked before: a liar does not ask."""
    with (
        mock.patch.object(files, "check_finite"),
        mock.patch.object(files, "TICKET"),
        mock.patch.object(files.checked, "parse"),
    ):
        yield


TICKETS: dict[str, tuple[Callable[[Lying], None], str]] = {}


def ticket_lie(reader: str):
    """reader: who must refuse it: "file" everybody, "network" who builds the network, "settings" --ticket alone."""

    def add(function: Callable[[Lying], None]) -> Callable[[Lying], None]:
        TICKETS[function.__name__] = function, reader
        return function

    return add


@ticket_lie("file")
def no_info(t: Lying) -> None:
    t.info = t.rng.choice([None, [], 5, "x", True, DEEP, {"deep": DEEP}, {"much": 10**30}, {"nan": float("nan")}])
    t.save()


@ticket_lie("network")
def sizes(t: Lying) -> None:
    key = t.rng.choice(list(t.info["sizes"]))
    value = t.rng.choice(
        [10**9, 2**62, 2**63, float("nan"), 0, -1, "x", None, True, 1.5, [], {}, [[10**9, 1]], [[2, 2]], "\x1b[2J"]
    )
    t.info["sizes"][key] = value if key != "dropout" or value not in (0, True) else 7
    t.save()


@ticket_lie("network")
def keys_of_sizes(t: Lying) -> None:
    if t.rng.random() < 0.5:
        t.info["sizes"].pop(t.rng.choice(list(t.info["sizes"])))
    else:
        t.info["sizes"]["ctc_weight"] = 1
    t.save()


@ticket_lie("network")
def tokens(t: Lying) -> None:
    count = len(t.info["tokens"])
    junk = t.rng.choice([5, None, ["a"], {}, "", True, 1.5])
    t.info["tokens"] = t.rng.choice(
        [t.info["tokens"][:-1] + [junk], t.info["tokens"][:-1], ["a"] * count, "a" * count, None, {}, [], 5,
         [*t.info["tokens"], "more"], {str(i): "a" for i in range(count)}]
    )  # fmt: skip
    t.save()


@ticket_lie("file")
def half_a_surrogate_pair(t: Lying) -> None:
    t.info["tokens"][1] = t.rng.choice(["\ud800", "a\udfff"])
    t.save()


@ticket_lie("network")
def backbone(t: Lying) -> None:
    others = {"rnnt", "cnn-lstm", "conformer"} - {t.info["backbone"]}
    t.info["backbone"] = t.rng.choice([*sorted(others), "x", None, [], {}, 5, True, "__class__"])
    t.save()


@ticket_lie("network")
def features(t: Lying) -> None:
    t.info["features"] = t.rng.choice(["x", "log1p-stft", None, [], 5])
    t.save()


@ticket_lie("network")
def state(t: Lying) -> None:
    free = t.rng.choice([name for name in t.trained if name not in t.masks])
    what = t.rng.choice(["lacks", "more", "dtype", "shape"])
    for part in (t.trained, t.rewind):
        if what == "lacks":
            del part[free]
        elif what == "more":
            part["more"] = torch.zeros(3)
        elif what == "dtype":
            part[free] = part[free].double()
        else:
            part[free] = part[free].reshape(1, -1)
    t.save()


@ticket_lie("file")
def values(t: Lying) -> None:
    name = t.rng.choice(
        [name for name, value in t.trained.items() if value.is_floating_point() and name not in t.masks]
    )
    part = t.rng.choice([t.trained, t.rewind])
    part[name] = torch.full_like(part[name], t.rng.choice([float("nan"), float("inf"), -float("inf")]))
    t.save()


@ticket_lie("settings")
def settings(t: Lying) -> None:
    key = t.rng.choice(
        ["snr", "test_snr", "size", "seed", "seconds", "min_remaining", "corpus", "lr", "epochs", "batch_size", "block",
         "scope", "sparsity", "prune_rate", "margin", "accumulate", "beam", "amp", "train_sets", "batch_seconds"]
    )  # fmt: skip
    junk = ["x", {}, [[]], -1e9, 1e308, [], [None], 2**62, DEEP[0][0], "--help", [1, 2, 3, "x"]]
    t.info[key] = t.rng.choice(junk if key == "amp" else [*junk, True])
    t.save()


@ticket_lie("file")
def metadata(t: Lying) -> None:
    tensors, about = files.read_sealed(t.path, "ticket")
    about = {key: value for key, value in about.items() if key not in ("format", "kind")}
    key = t.rng.choice(list(about))
    name = t.rng.choice(list(t.masks))
    what = t.rng.randrange(4)
    if what == 0:
        about[key] = t.rng.choice([value for value in JUNK if value != {}])  # an empty info is one, of no recogniser
    elif what == 1:
        about["shapes"][name] = t.rng.choice([[10**9, 10**9], [2**62], [-1, -1], [1.5, 2], "x", None, [True], []])
    elif what == 2:
        about["mask_sha256"][name] = t.rng.choice([SHA, 5, None])
    else:
        tensors[t.rng.choice(["noslash", "mask/more", "other/part", "trained"])] = torch.zeros(1)
    with unasked():
        files.write_sealed(t.path, "ticket", tensors, about)


@ticket_lie("file")
def no_file(t: Lying) -> None:
    whole = t.path.read_bytes()
    t.path.unlink()
    what = t.rng.randrange(6)
    if what == 0:
        t.path.symlink_to("/dev/zero")
    elif what == 1:
        os.mkfifo(t.path)
    elif what == 2:
        t.path.mkdir()
    elif what == 3:  # larger than its header says
        with open(t.path, "wb") as file:
            file.write(whole)
            file.truncate(2 ** t.rng.randrange(20, 43))
    elif what == 4:  # a header that is larger than any, or the file
        t.path.write_bytes(t.rng.choice([2**62, 2**31, len(whole)]).to_bytes(8, "little") + whole[8:])
    else:
        header = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
        t.path.write_bytes(len(header).to_bytes(8, "little") + header)


# ---------------------------------------------------------------------------- caches and manifests

GONE = ("zero", "pipe", "folder", "deep", "large", "no JSON")


def put_in_place(path: Path, rng: random.Random) -> None:
    """Another thing under the name of a file."""
    what = rng.choice(GONE)
    path.unlink()
    if what == "zero":
        path.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "large":
        with open(path, "wb") as file:
            file.truncate(2**40)
    else:
        path.write_bytes(DEEPER if what == "deep" else rng.choice([b"\xff", b"", b"[1, 2]", b'{"a": NaN}']))


def resealed(path: Path, change: Callable[[dict, dict, bytes], bytes | None]) -> None:
    """A file of a cache with what change(header, table, features) makes of it, under a seal that holds."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    about = json.loads(header["__metadata__"]["about"][72:])
    body = change(header, about, content[end:]) or content[end:]
    header["__metadata__"]["about"] = f"sha256:{'0' * 64} {json.dumps(about)}"
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text
    at = content.index(files.SEAL) + len(files.SEAL)
    path.write_bytes(content[:at] + files.digest(content, at).encode() + content[at + 64 :] + body)


# Each takes the folder of a cache of one file, and the manifest of what is in it. True: it must be refused, by name.
STORED: dict[str, Callable[[Path, Path, random.Random], bool]] = {}


def stored_lie(function: Callable[[Path, Path, random.Random], bool]):
    STORED[function.__name__] = function
    return function


@stored_lie
def an_index_of_hashes(cache: Path, _manifest: Path, rng: random.Random) -> bool:
    """It only slows the next start."""
    path = cache / "hashes.json"
    if rng.random() < 0.3:
        put_in_place(path, rng)
        return False
    rows = json.loads(path.read_text())
    name, at = rng.choice(list(rows)), rng.randrange(3)
    if rng.random() < 0.3:
        rows[name] = rng.choice(JUNK)
    else:
        rows[name][at] = rng.choice(JUNK)
    path.write_text(json.dumps(rows))
    return False


@stored_lie
def a_table_of_features(cache: Path, _manifest: Path, rng: random.Random) -> bool:
    (path,) = cache.glob("*.safetensors")

    def change(header: dict, about: dict, body: bytes) -> bytes | None:
        what, rows = rng.randrange(8), about["rows"]
        row = rng.choice(rows)
        if what == 0:
            about["rows"] = rng.choice([rows[:-1], [*rows, rows[0]], *JUNK])
        elif what == 1:
            row[rng.randrange(3)] = rng.choice(JUNK)
        elif what == 2:
            row[:2] = [1 + 10**12 // 160, 10**12]
        elif what == 3:
            row[rng.randrange(2)] *= -1
        elif what == 4:
            header["features"][rng.choice(["shape", "dtype", "data_offsets"])] = rng.choice([*JUNK, [10**9, 80], "F64"])
        elif what == 5:
            header["other"] = rng.choice([header["features"], *JUNK])
        elif what == 6:
            about["format"] = rng.choice(JUNK)
        else:
            return body[:-4]
        return None

    resealed(path, change)
    return True


@stored_lie
def no_file_of_features(cache: Path, _manifest: Path, rng: random.Random) -> bool:
    (path,) = cache.glob("*.safetensors")
    put_in_place(path, rng)
    return True


@stored_lie
def a_line_of_a_manifest(_cache: Path, manifest: Path, rng: random.Random) -> bool:
    lines = manifest.read_text().splitlines()
    at, what = rng.randrange(len(lines)), rng.randrange(3)
    if what == 0:
        put_in_place(manifest, rng)
        return True
    row = json.loads(lines[at])
    key = rng.choice(["audio_filepath", "text", "duration", "offset"])
    junk = {"audio_filepath": JUNK, "text": [v for v in JUNK if v != "x"], "offset": JUNK, "duration": JUNK}[key]
    row[key] = rng.choice([v for v in junk if v is not None or key in ("audio_filepath", "text")])
    lines[at] = json.dumps(row)
    if what == 1:
        lines[at] = rng.choice(['{"a": 1, "a": 2}', "[" * 100_000, "5", '{"audio_filepath": 1e999}', "\ud83d", "{}"])
    manifest.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return True
