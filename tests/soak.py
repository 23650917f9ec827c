"""Long trials of what must never break; the tests run short versions, `make soak` the long ones.

    python tests/soak.py kills N       SIGKILL runs N times in all, at random and on purpose; compare with uninterrupted
    python tests/soak.py tickets N     read N damaged tickets and checkpoints, and every single-byte flip of a small one
    python tests/soak.py ledgers N     verify a run with N damaged ledgers
    python tests/soak.py audio N       decode N damaged WAV, FLAC, Opus and MP3 files
    python tests/soak.py lies N        read N lying tickets, forged runs and caches, their hashes right (tests/lies.py)
    python tests/soak.py recordings N  decode N recordings of every format, rate and channel count, whose headers lie,
                                       and read a thousand manifests with one fault each (tests/recordings.py)

Each prints one line that says what was tried and what failed, and exits with 0 only if nothing did.
"""

import argparse
import contextlib
import functools
import hashlib
import io
import json
import operator
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import lies  # noqa: E402
import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from recordings import recordings  # noqa: E402

import data  # noqa: E402
import lottery  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402
import transcribe  # noqa: E402
from audio_lottery import files, ledger, sound, verdicts, verify  # noqa: E402
from lab import compare, controls, networks, plan  # noqa: E402
from runner import cache, flags  # noqa: E402
from runner.folder import rows_there  # noqa: E402

# ---------------------------------------------------------------------------- kills


def small_corpus(folder: Path) -> Path:
    """A few of the demo's shortest recordings."""
    for split, count in (("train", 6), ("valid", 2), ("test", 2)):
        rows = [json.loads(line) for line in (ROOT / "demo" / f"{split}.jsonl").read_text().splitlines()]
        rows = sorted(rows, key=lambda row: row["duration"])[:count]
        for row in rows:
            row["audio_filepath"] = str(ROOT / "demo" / row["audio_filepath"])
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def shrink_models(set_item=operator.setitem) -> None:
    """Networks of a few thousand weights: what is tried here is the run, not the recogniser.

    set_item: monkeypatch.setitem, where they are to be as large again afterwards.
    """
    for network, small in (
        (models.CnnLstm, dict(channels=2, kernels=((5, 3), (3, 3)), hidden=8, layers=1)),
        (models.Transducer, dict(channels=8, hidden=12, layers=1, predictor=8, joiner=8)),
        (models.ConformerCtc, dict(channels=2, width=16, heads=2, blocks=1, kernel=3)),
    ):
        set_item(network.SIZES, "demo", network.SIZES["demo"] | small)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(where: str, count: int) -> None:
    """Arrange that this process dies at the count-th write (half done), fsync, rename (before or after) or pruning."""
    left = [count]

    def reached() -> bool:
        left[0] -= 1
        return left[0] == 0

    def dying(function, after: bool = False):
        def call(*args, **kwargs):
            hit = reached()
            if hit and not after:
                die()
            result = function(*args, **kwargs)
            if hit:
                die()
            return result

        return call

    class HalfWritten(io.FileIO):
        def write(self, content):
            if not reached():
                return super().write(content)
            super().write(bytes(content)[: len(content) // 2])
            die()

    if where == "write":  # of a tensor file or of the ledger
        files.open = ledger.open = HalfWritten
    elif where == "fsync":
        os.fsync = dying(os.fsync)
    elif where in ("rename", "renamed"):
        os.replace = dying(os.replace, where == "renamed")
    elif where == "prune":
        lottery.prune = dying(lottery.prune)
    elif where == "pruned":
        lottery.prune = dying(lottery.prune, after=True)
    elif where == "step":
        torch.optim.AdamW.step = dying(torch.optim.AdamW.step)


def child(argv: list[str], where: str = "", count: int = 0) -> int:
    """Fork a run that dies as told; returns its process id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            if where:
                die_at(where, count)
            code = train.main(argv)
    finally:
        os._exit(code)


def result(run: Path) -> dict[str, str]:
    """What a run leaves, without what may differ: times, the report that shows them, and the lock."""
    rows = ledger.read_ledger(run / "ledger.jsonl")
    kept = [{key: value for key, value in row.items() if key not in ledger.TIMING} for row in rows]
    found = {"ledger.jsonl": json.dumps(kept)}
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name not in ("lock", "ledger.jsonl", "report.md", "report.png"):
            found[str(path.relative_to(run))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def kills(number: int, seed: int) -> bool:
    rng, killed, runs, wrong = random.Random(seed), 0, 0, []
    by_point: dict[str, int] = {}
    shrink_models()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        corpus = small_corpus(Path(folder))
        common = ["--data", str(corpus), "--epochs", "3", "--batch-size", "3", "--sparsity", "0.36"]
        expected, seconds, argvs = {}, {}, {}
        for backbone in models.BACKBONES:
            for rewind in ("0", "2"):
                argvs[f"{backbone}-{rewind}"] = [*common, "--backbone", backbone, "--rewind-step", rewind]
            tickets_of = ["--ticket", f"{folder}/{backbone}-2"]
            argvs[f"{backbone}-ticket"] = [*tickets_of, "--seed", "1"]  # round 0 is trained
            argvs |= {f"{backbone}-{control}": [*tickets_of, "--control", control] for control in controls.CONTROLS}

        def train_whole(name: str) -> None:
            start = time.monotonic()
            _, status = os.waitpid(child([*argvs[name], "--out", f"{folder}/{name}"]), 0)
            if status:
                sys.exit(f"soak.py: the uninterrupted {name} run failed with status {status}")
            expected[name], seconds[name] = result(Path(folder) / name), time.monotonic() - start

        while killed < number:
            name = rng.choice(list(argvs))
            argv = argvs[name]
            for needed in ([Path(argv[1]).name] if argv[0] == "--ticket" else []) + [name]:
                if needed not in expected:
                    train_whole(needed)
            want = expected[name]
            out, runs, tries = Path(folder) / f"run{runs}", runs + 1, 0
            while True:
                tries += 1
                every = rng.choice(["0", "0.001", "5"])  # minutes: each step, each few, none but the ends of rounds
                where = rng.choice(["time", "write", "fsync", "rename", "renamed", "prune", "pruned", "step"])
                count = rng.randint(1, {"step": 8, "prune": 2, "pruned": 2}.get(where, 30))
                argv_now = [*argv, "--out", str(out), "--save-every", every]
                process = child(argv_now, "" if where == "time" or tries > 20 else where, count)
                if where == "time" and tries <= 20:
                    time.sleep(rng.uniform(0, 1.1 * seconds[name]))
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                _, status = os.waitpid(process, 0)
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
                    killed += 1
                    by_point[where] = by_point.get(where, 0) + 1
                    continue
                if status or result(out) != want or verify.failures(out, networks):
                    wrong.append(f"{name} (status {status})")
                break
            for path in sorted(out.rglob("*"), reverse=True):
                path.unlink() if path.is_file() else path.rmdir()
            out.rmdir()
    points = ", ".join(f"{count} {point}" for point, count in sorted(by_point.items()))
    print(
        f"kills: {killed} SIGKILLs ({points}) in {runs} runs; resumed = uninterrupted in {runs - len(wrong)} of {runs}"
    )
    print("".join(f"  differs: {name}\n" for name in wrong), end="")
    return not wrong


# ---------------------------------------------------------------------------- damage


def damaged(content: bytes, rng: random.Random) -> bytes:
    """One random injury: bits flipped, cut, spliced, zeroed, or edited in the header."""
    kind, damage = rng.randrange(6), bytearray(content)
    at = rng.randrange(len(damage))
    if kind == 0:
        for _ in range(rng.choice([1, 1, 1, 2, 8])):
            damage[rng.randrange(len(damage))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del damage[at:]
    elif kind == 2:
        size = rng.randint(1, 64)
        damage[at : at + size] = damage[rng.randrange(len(damage)) :][:size]
    elif kind == 3:
        damage[at : at + rng.randint(1, 512)] = bytes(rng.randint(0, 512))
    elif kind == 4:
        header = rng.randrange(min(len(damage), 1000))
        damage[header] = rng.randrange(256)
    else:
        del damage[at : at + rng.randint(1, 32)]
    return bytes(damage)


def tickets(number: int, seed: int) -> bool:
    rng, silent, crashes, tried = random.Random(seed), 0, [], 0
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))
    ticket = lottery.Ticket(model)
    ticket.prune(9)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path, other = Path(folder) / "t", Path(folder) / "c"
        files.save_ticket(path, ticket.masks, ticket.rewind_state, model.state_dict(), {"tokens": ["a"]})
        files.write_sealed(other, "checkpoint", lottery.copy_state(model), {"round": 1})
        readers = (
            (path.read_bytes(), files.load_ticket),
            (other.read_bytes(), lambda file: files.read_sealed(file, "checkpoint")),
        )

        def attempt(content: bytes, read) -> None:
            nonlocal silent, tried
            tried += 1
            with open(path, "wb") as file:
                file.write(content)
            try:
                read(path)
                silent += 1
            except lottery.LotteryError:
                pass
            except BaseException as error:
                crashes.append(repr(error))

        whole, read = readers[0]
        for at in range(len(whole)):
            for flip in range(1, 256) if number >= 100_000 else [rng.randrange(1, 256)]:
                attempt(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :], read)
        flips = tried
        while tried - flips < number:
            whole, read = readers[rng.random() < 0.25]
            content = damaged(whole, rng)
            if content != whole:
                attempt(content, read)
    print(
        f"tickets: {tried - flips} damaged tickets and checkpoints, and {flips} single-byte flips of a ticket of "
        f"{len(readers[0][0])} bytes: silent {silent}, other exceptions {len(crashes)}"
    )
    print("".join(f"  {error}\n" for error in crashes[:5]), end="")
    return not silent and not crashes


def ledgers(number: int, seed: int) -> bool:
    rng, silent, crashes = random.Random(seed), 0, []
    shrink_models()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        argv = ["--data", str(small_corpus(Path(folder))), "--epochs", "1", "--sparsity", "0.36", "--out", str(run)]
        with contextlib.redirect_stdout(io.StringIO()):
            train.main(argv)
        if verify.failures(run, networks):
            sys.exit("soak.py: the undamaged run does not verify")
        path = run / "ledger.jsonl"
        whole = path.read_bytes()
        for _ in range(number):
            content = damaged(whole, rng)
            if content == whole:
                continue
            path.write_bytes(content)
            try:
                silent += not verify.failures(run, networks)
            except BaseException as error:
                crashes.append(repr(error))
    print(f"ledgers: {number} damaged ledgers: not found by verify {silent}, exceptions {len(crashes)}")
    print("".join(f"  {error}\n" for error in crashes[:5]), end="")
    return not silent and not crashes


def audio(number: int, seed: int) -> bool:
    """Files are decoded in a forked process, so that a crash or a hang (10 s) is seen and counted."""
    rng, crashes, hangs, accepted, done = random.Random(seed), 0, 0, 0, 0
    not_finite = 0
    torch.set_num_threads(1)
    samples = sound.load_audio(ROOT / "demo" / "audio" / "added.opus").numpy()[:12_000]
    with tempfile.TemporaryDirectory() as folder:
        originals = []
        for suffix, options in (
            ("wav", {}), ("wav", {"subtype": "FLOAT"}), ("flac", {}), ("mp3", {}),
            ("opus", {"format": "OGG", "subtype": "OPUS"}),
        ):  # fmt: skip
            path = Path(folder) / f"whole.{suffix}"
            soundfile.write(path, samples, 16_000, **options)
            originals.append((suffix, path.read_bytes()))
        while done < number:
            batch = [
                (suffix, damaged(whole, rng)) for suffix, whole in rng.choices(originals, k=min(200, number - done))
            ]
            read_end, write_end = os.pipe()
            process = os.fork()
            if process == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders' own chatter
                for suffix, content in batch:
                    path = Path(folder) / f"damaged.{suffix}"
                    path.write_bytes(content)
                    outcome = b"r"
                    try:
                        (example,) = cache.load_examples([data.Utterance(path, "a")], [data.BLANK, "a"], "log-mel")
                        outcome = b"a" if example.features.isfinite().all() else b"n"
                    except data.DataError:
                        pass
                    os.write(write_end, outcome)
                os._exit(0)
            os.close(write_end)
            outcomes, last = b"", time.monotonic()
            os.set_blocking(read_end, False)
            while time.monotonic() - last < 10:
                with contextlib.suppress(BlockingIOError):
                    piece = os.read(read_end, 4096)
                    if not piece:
                        break
                    outcomes, last = outcomes + piece, time.monotonic()
                time.sleep(0.002)
            else:
                os.kill(process, signal.SIGKILL)
                hangs += 1
            os.close(read_end)
            _, status = os.waitpid(process, 0)
            crashes += bool(status) and time.monotonic() - last < 10
            accepted, not_finite = accepted + outcomes.count(b"a"), not_finite + outcomes.count(b"n")
            done += len(outcomes) + (len(outcomes) < len(batch))
    print(
        f"audio: {done} damaged WAV, FLAC, MP3 and Opus files: crashes {crashes}, hangs {hangs}, NaN let through "
        f"{not_finite}; {accepted} decoded all the same (damage inside the samples), the rest refused by name"
    )
    return not crashes and not hangs and not not_finite


# ---------------------------------------------------------------------------- lies


class Liars:
    """Tickets and runs to forge, and who must find it out."""

    def __init__(self, folder: Path):
        self.folder, self.corpus = folder, small_corpus(folder)
        torch.set_num_threads(1)
        shrink_models()
        self.runs = {}
        exact = functools.lru_cache(1000)(verdicts.verdict_of)
        # The slow part, once for the same errors. Children begin with what is known here.
        verify.verdict_of = lambda errors, dense, words, margin: exact(
            tuple(errors), tuple(dense), tuple(words), margin
        )
        search = ["--data", str(self.corpus), "--backbone", "cnn-lstm", "--epochs", "2", "--sparsity", "0.36"]
        with contextlib.redirect_stdout(io.StringIO()):
            assert train.main([*search, "--out", str(folder / "search")]) == 0
            assert train.main(["--ticket", str(folder / "search"), "--out", str(folder / "given")]) == 0
            for name in ("search", "given"):
                run = folder / name
                found = [f"{check.name}: {check.wrong}" for check in verify.verify(run, networks) if check.wrong]
                assert not found, found
                self.runs[name] = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
        bare = [p for p in self.runs["search"] if p.suffix != ".safetensors"]
        self.runs["bare"] = {folder / "bare" / p.relative_to(folder / "search"): p.read_bytes() for p in bare}
        (folder / "bare").mkdir()
        self.restore(folder / "bare", self.runs["bare"])
        self.utterances = data.read_corpus(self.corpus)["train"]
        self.features = self.read_stored()
        self.stored = {p: p.read_bytes() for p in [self.corpus / "train.jsonl", *(folder / "cache").iterdir()]}
        self.infos = {}
        for backbone in models.BACKBONES:
            self.infos[backbone] = self.ticket_of(backbone)

    def ticket_of(self, backbone: str) -> bytes:
        """A ticket of the backbone, with the settings of a run."""
        torch.manual_seed(0)
        info = dict(files.load_ticket(self.folder / "search" / "ticket.safetensors").info)
        model = models.build(backbone, "demo", len(info["tokens"]))
        info |= {"backbone": backbone, "sizes": models.BACKBONES[backbone].SIZES["demo"], "features": model.features}
        ticket = lottery.Ticket(model)
        ticket.prune(ticket.kept // 2)
        ticket.rewind()
        path = self.folder / "ticket.safetensors"
        files.save_ticket(path, ticket.masks, ticket.rewind_state, model.state_dict(), info)
        return path.read_bytes()

    def forge_run(self, kind: str, rng: random.Random) -> str:
        """What became of one forged run: found, not here, silent or the exception."""
        name = rng.choice(list(self.runs) if kind in lies.BARE else ["search", "given"])
        run = self.folder / name
        lies.RUNS[kind](lies.Forged(run, rng))
        try:
            words = {check.word for check in verify.verify(run, networks)}
            with contextlib.suppress(lottery.LotteryError):  # the next start, and who compares
                rows_there(run, ledger.read_config(run), flags.NAMES)
                compare.load(run)
            told = "not here" in words and name != "bare"
            return "found" if "FAILED" in words else "not here" if told else "silent"
        finally:
            self.restore(run, self.runs[name])

    def read_stored(self) -> list[torch.Tensor]:
        """The features of the manifest's recordings, from the cache."""
        cache._opened.cache_clear()
        utterances = data.read_manifest(self.corpus / "train.jsonl")
        kept = cache.Cache(self.folder / "cache")
        return [example.features for example in cache.load_examples(utterances, [data.BLANK], "log-mel", "", kept)]

    def forge_stored(self, kind: str, rng: random.Random) -> str:
        """As forge_run, of a cache or a manifest: refused by name, or without harm."""
        refused = lies.STORED[kind](self.folder / "cache", self.corpus / "train.jsonl", rng)
        try:
            same = all(map(torch.equal, self.read_stored(), self.features))
            return "silent" if refused or not same else "found"
        except data.DataError as error:
            named = str(error).startswith(str(self.folder))
            return "found" if refused and named else f"silent: {error}"
        finally:
            for path in (self.corpus / "train.jsonl", *(self.folder / "cache").iterdir()):
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            for path, content in self.stored.items():
                path.write_bytes(content)

    def restore(self, run: Path, whole: dict[Path, bytes]) -> None:
        for path in sorted(run.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.rmdir()
            elif path not in whole or not path.is_file() or path.is_symlink():
                path.unlink()
        for path, content in whole.items():
            path.parent.mkdir(exist_ok=True)
            if not path.exists() or path.stat().st_size != len(content) or path.read_bytes() != content:
                path.write_bytes(content)

    def forge_ticket(self, kind: str, rng: random.Random) -> str:
        """As forge_run, of a ticket: everybody who reads what it lies about must refuse it."""
        path = self.folder / "lying.safetensors"
        if path.is_dir():
            path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(self.infos[rng.choice(list(self.infos))])
        lie, reader = lies.TICKETS[kind]
        lie(lies.Lying(path, rng))
        readers = {
            "load": lambda: transcribe.load(path),
            "plan": lambda: plan.of_ticket(path),
            "--ticket": lambda: flags.parse(["--ticket", str(path), "--data", str(self.corpus)]),
            "size": lambda: files.load_ticket(path),
        }
        asked = {"file": list(readers), "network": ["load", "plan", "--ticket"], "settings": ["--ticket"]}[reader]
        outcome = "found"
        for name, read in readers.items():
            try:
                read()
                outcome = f"silent in {name}" if name in asked else outcome
            except lottery.LotteryError:
                pass
            except SystemExit as stop:
                if stop.code != 2:
                    raise
        return outcome


def lies_in_a_child(liars: Liars, seeds: list[tuple[str, int]]) -> list[tuple[str, str]]:
    """(kind, outcome) of each, in a process of its own: what it takes and where it dies is seen from here."""
    read_end, write_end = os.pipe()
    process = os.fork()
    if process == 0:
        nothing = open(os.devnull, "w")
        with (
            os.fdopen(write_end, "w") as told,
            contextlib.redirect_stderr(nothing),
            contextlib.redirect_stdout(nothing),
        ):
            for kind, seed in seeds:
                forge = liars.forge_stored if kind in lies.STORED else liars.forge_ticket
                forge = liars.forge_run if kind in lies.RUNS else forge
                try:
                    outcome = forge(kind, random.Random(seed))
                except BaseException as error:
                    outcome = f"exception {type(error).__name__}: {' '.join(str(error).split())[:100]}"
                told.write(json.dumps([kind, outcome]) + "\n")
                told.flush()
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as answers:
        found = [tuple(json.loads(line)) for line in answers]
    _, status = os.waitpid(process, 0)
    if status:
        found.append((seeds[len(found)][0], f"exception: died of {status}"))
    return found


def lies_(number: int, seed: int) -> bool:
    rng, found = random.Random(seed), []
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        liars = Liars(Path(folder))
        kinds = [*lies.RUNS, *lies.TICKETS, *lies.STORED]
        todo = [(kinds[i % len(kinds)], rng.randrange(2**31)) for i in range(number)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        for start in range(0, number, 500):
            part = todo[start : start + 500]
            while part:
                done = lies_in_a_child(liars, part)
                found += done
                part = part[len(done) :]
    most = max(before, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 2**20
    silent = [f"{kind}: {outcome}" for kind, outcome in found if outcome.startswith("silent")]
    crashes = [f"{kind}: {outcome}" for kind, outcome in found if outcome.startswith("exception")]
    runs, stored = (sum(kind in part for kind, _ in found) for part in (lies.RUNS, lies.STORED))
    told = sum(outcome == "not here" for _, outcome in found)
    print(
        f"lies: {len(found)} tried ({runs} forged runs of {len(lies.RUNS)} kinds, {len(found) - runs - stored} tickets "
        f"of {len(lies.TICKETS)}, {stored} caches and manifests of {len(lies.STORED)}): silent {len(silent)}, "
        f"tracebacks {len(crashes)}, at most {most:.2f} GiB; {told} were told of as not here"
    )
    print("".join(f"  {line}\n" for line in dict.fromkeys(silent + crashes)), end="")
    return not silent and not crashes and most < 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    commands = (kills, tickets, ledgers, audio, recordings, lies_)
    by_name = {function.__name__.rstrip("_"): function for function in commands}
    parser.add_argument("what", choices=list(by_name))
    parser.add_argument("number", type=int)
    parser.add_argument("--seed", type=int, default=int(np.random.default_rng().integers(2**31)))
    args = parser.parse_args()
    start = time.monotonic()
    good = by_name[args.what](args.number, args.seed)
    print(f"  seed {args.seed}, {time.monotonic() - start:.0f} s", flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()
