"""The run folder: signals, checkpoints, the lock, and what stands in it already. docs/runs.md names its files."""

import contextlib
import dataclasses
import errno
import fcntl
import math
import os
import shlex
import signal
import socket
import time
from pathlib import Path

import torch

import lottery
from audio_lottery import checked, files, ledger
from audio_lottery.checked import SHA256, integer, listed, number
from lab import report
from runner import processes

# ---------------------------------------------------------------------------- signals


class Stopped(BaseException):
    """A signal came; the run is saved. No Exception: a reader's `except Exception` must not take it for damage."""

    def __init__(self, number: int):
        self.number = number

    def told(self, argv: list[str]) -> str:
        """What ended the run, and how it goes on."""
        command = f"the same torchrun command, with {processes.count()} processes again"
        if processes.count() == 1:
            command = shlex.join(["python", "train.py", *argv])
        return f"train.py: stopped by {signal.Signals(self.number).name}; go on with: {command}"


class Signals:
    """SIGINT, SIGTERM, SIGHUP: noted while `deferred`, so that a step is finished and saved; else they end the program.

    A SIGHUP that is ignored, as under nohup, stays so.
    One that comes within a second of the last is the same: `timeout` sends SIGTERM twice, as torchrun may.
    """

    SAME = 1.0  # seconds

    def __init__(self):
        self.deferred, self.number, self.over = False, 0, False
        self.last = -math.inf

    def __enter__(self) -> "Signals":
        taken = [signal.SIGINT, signal.SIGTERM]
        taken += [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
        self.before = {number: signal.signal(number, self.receive) for number in taken}
        return self

    def __exit__(self, *_) -> None:
        for which, handler in self.before.items():
            signal.signal(which, handler)

    def receive(self, number: int, _frame) -> None:
        before, now = self.number, time.monotonic()
        if self.over or (before and now - self.last < self.SAME):
            return
        self.number, self.last = number, now  # noted in any case: where a destructor runs, what is raised is dropped
        if not self.deferred or before:  # the second one does not wait
            raise Stopped(number)


# ---------------------------------------------------------------------------- checkpoints


@dataclasses.dataclass
class Progress:
    """Where a round stands."""

    epoch: int = 0
    batch: int = 0  # of the epoch, done
    before: int = 0  # epochs that do not count: they end before the round starts, or while its masks still change
    loss: float = 0.0  # summed over the epoch's utterances so far, of all processes
    losses: list[float] = dataclasses.field(default_factory=list)  # of each epoch: the mean over its utterances
    valid_wers: list[float] = dataclasses.field(default_factory=list)  # behind each epoch
    best: lottery.State = dataclasses.field(default_factory=dict)  # of the epoch of the best valid WER
    seconds: float = 0.0
    waited: float = 0.0  # of these, for the next batch
    resumed: int = 0  # how often this round was taken up again


PROGRESS = checked.record(
    {"epoch": integer(0, ledger.EPOCHS), "batch": integer(), "loss": number()},
    {
        "before": integer(0, ledger.EPOCHS), "losses": listed(number(), 0, ledger.EPOCHS),
        "valid_wers": listed(number(0), 0, ledger.EPOCHS),
        "seconds": number(0), "waited": number(0), "resumed": integer(),
    },
)  # fmt: skip
ABOUT = checked.record(
    {
        "run": checked.text(most=64), "round": integer(0, 1000), "steps": integer(), "threshold": number(0),
        "has_rewind_state": checked.switch, "start": SHA256, "parent": checked.text(most=64), "schedule": integer(),
        "group": checked.OBJECT, "progress": PROGRESS,
    },
    {"facts": checked.OBJECT},
)  # fmt: skip


class Checkpointer:
    """Writes checkpoint.safetensors: everything that a run goes on from, in one file that is whole at any instant.

    All processes call it in step; the first one writes, for all.
    """

    SHARE = 0.01  # of the time, for saving, at most

    def __init__(
        self, out: Path, run_sha256: str, minutes: float | None, signals: Signals, checkpoint: "Checkpoint | None",
        keeps_rewind_state: bool = True,
    ):  # fmt: skip
        """minutes: between checkpoints; None: 5, or as many as keep saving below SHARE of the time.

        keeps_rewind_state: False where each round has another one, which is not of this run's making.
        """
        self.out, self.run, self.signals = out, {"run": run_sha256}, signals
        self.seconds, self.adapts = 300.0 if minutes is None else 60 * minutes, minutes is None
        self.rewind_saved = checkpoint is not None and checkpoint.has_rewind_state
        self.keeps_rewind_state = keeps_rewind_state
        self.saved = time.monotonic()
        self.parent = ""  # the hash of the masks of the round before
        self.facts: dict = {}  # of this process: what decides bits and is no setting
        self.earlier: dict[int, dict] = {}  # those that were others when a round was begun, by round

    def after_step(self, ticket: lottery.Ticket, optimizer, schedule, at: Progress) -> None:
        """Save if it is time, or if a signal came to any of the processes; after a signal, raise Stopped."""
        due = not processes.index() and time.monotonic() - self.saved >= self.seconds  # the one that writes decides
        number = processes.largest(self.signals.number)
        if number or processes.largest(due):
            self.save(ticket, optimizer, schedule, at)
        if number:
            raise Stopped(number)

    def save(self, ticket: lottery.Ticket, optimizer, schedule, at: Progress) -> None:
        if not math.isfinite(at.loss):  # nothing can come of it
            raise lottery.LotteryError(f"round {ticket.round}: the loss is {at.loss}: try a lower --lr")
        generators, started = processes.gather(generator_states()), time.monotonic()
        if processes.index():
            return
        model, tensors = ticket.model, {}
        for process, states in enumerate(generators):
            tensors |= {f"generator/{process}/{name}": state for name, state in states.items()}
        tensors |= {f"model/{name}": value for name, value in lottery.state_of(model).items()}
        tensors |= {f"best/{name}": value for name, value in at.best.items()}
        tensors |= {f"mask/{name}": files.pack_bits(mask) for name, mask in ticket.masks.items()}
        for name, parameter in model.named_parameters():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{name}/{key}"] = value
        (group,) = optimizer.param_groups
        has_rewind_state = self.keeps_rewind_state and ticket.rewind_state is not None
        about = self.run | {
            "round": ticket.round,
            "steps": ticket.steps,
            "has_rewind_state": has_rewind_state,
            "threshold": ticket.threshold,
            "start": ticket.start_sha256,
            "parent": self.parent,
            "schedule": schedule.last_epoch,
            "group": {key: value for key, value in group.items() if key != "params"},
            "progress": {f.name: getattr(at, f.name) for f in dataclasses.fields(at) if f.name != "best"},
            "facts": self.facts | {"earlier": self.earlier.get(ticket.round, {})},
        }
        if has_rewind_state and not self.rewind_saved:
            files.write_sealed(self.out / "rewind.safetensors", "rewind state", ticket.rewind_state, self.run)
            self.rewind_saved = True
        files.write_sealed(self.out / "checkpoint.safetensors", "checkpoint", tensors, about)
        self.saved = time.monotonic()
        if self.adapts:
            self.seconds = max(300.0, (self.saved - started) / self.SHARE)


def generator_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


class Checkpoint:
    """A checkpoint as read back."""

    def __init__(self, out: Path, run_sha256: str):
        self.out = out
        self.tensors, self.about = files.read_sealed(out / "checkpoint.safetensors", "checkpoint", ABOUT)
        self.has_rewind_state, self.rewind_state = self.about["has_rewind_state"], None
        belong = [("checkpoint", self.about)]
        if self.has_rewind_state:
            self.rewind_state, about = files.read_sealed(out / "rewind.safetensors", "rewind state")
            belong.append(("rewind state", about))
        for kind, about in belong:
            if about.get("run") != run_sha256:
                raise lottery.LotteryError(f"--out {out}: the {kind} there is of another run")

    def other_facts(self, now: dict, rows: list[dict]) -> dict[int, dict]:
        """The values of these facts that were others in the checkpoint's round, by round; says so, if any was.

        Raises LotteryError for other tokens, which the network's outputs stand for.
        """
        before = self.about.get("facts", {})
        earlier = before.get("earlier") if isinstance(before.get("earlier"), dict) else {}
        if before.get("tokens", now["tokens"]) != now["tokens"]:
            raise lottery.LotteryError(f"--out {self.out}: the checkpoint is of other tokens (another sentencepiece?)")
        if self.about["round"] in [row["round"] for row in rows]:  # its row is written, and goes by its own
            return {}
        found = {}
        for key in sorted(now.keys() & (before.keys() | earlier.keys()) - {"tokens"}):
            values = [*(earlier.get(key) or []), *([before[key]] if key in before else [])]
            others = [value for i, value in enumerate(values) if value != now[key] and value not in values[:i]]
            found |= {key: others} if others else {}
        if found:
            others = ", ".join(sorted(found))
            print(f"the round's first part was trained with other {others}: bits may differ, and its row says so")
        return {self.about["round"]: found} if found else {}

    def part(self, name: str) -> dict[str, torch.Tensor]:
        return {key[len(name) + 1 :]: value for key, value in self.tensors.items() if key.startswith(f"{name}/")}

    @contextlib.contextmanager
    def fitting(self):
        """What does not fit in here is a checkpoint of another network: hashes can be right, and the rest a lie."""
        try:
            yield
        except lottery.LotteryError as error:
            if str(self.out) in str(error):
                raise
            raise lottery.LotteryError(f"--out {self.out}: the checkpoint does not fit this run ({error})") from None
        except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise lottery.LotteryError(f"--out {self.out}: the checkpoint does not fit this run ({why})") from None

    def resume(self, ticket: lottery.Ticket) -> str:
        """What lottery.find_ticket asks for."""
        with self.fitting():
            return self._resume(ticket)

    def _resume(self, ticket: lottery.Ticket) -> str:
        device = next(iter(ticket.weights.values())).device
        about, packed = self.about, self.part("mask")
        ticket.round, ticket.steps, ticket.threshold = about["round"], about["steps"], about["threshold"]
        ticket.masks = {n: files.unpack_bits(packed[n], list(w.shape)).to(device) for n, w in ticket.weights.items()}
        ticket.start_sha256 = about["start"]
        own = lottery.state_of(ticket.model)
        if self.has_rewind_state:
            shapes = {name: value.shape for name, value in self.rewind_state.items()}
            if shapes != {name: value.shape for name, value in own.items()}:
                raise lottery.LotteryError(f"--out {self.out}: rewind.safetensors is of another network")
            ticket.rewind_state = {name: value.to(device) for name, value in self.rewind_state.items()}
        lottery.load_state(ticket.model, self.part("model"))
        return about["parent"]

    def restore(self, model: torch.nn.Module, optimizer, schedule, device: str, epochs=ledger.EPOCHS) -> Progress:
        """Put optimizer, schedule and generators where they were; the model is there already. epochs: of a round."""
        with self.fitting():
            at = self._restore(model, optimizer, schedule, device)
            counted = max(0, at.epoch - at.before)  # epochs that may be the best
            done = len(at.losses) == len(at.valid_wers) == counted and at.epoch <= epochs
            if not done or at.best.keys() != (lottery.state_of(model).keys() if counted else {}.keys()):
                raise ValueError(f"epoch {at.epoch} of {epochs}, with the valid WER of {len(at.valid_wers)}")
            self.tensors, self.rewind_state = {}, None  # what is still needed of them has them
            return at

    def _restore(self, model: torch.nn.Module, optimizer, schedule, device: str) -> Progress:
        try:
            at = Progress(**self.about["progress"], best={n: v.to(device) for n, v in self.part("best").items()})
        except TypeError:
            raise lottery.LotteryError("the checkpoint is of another version: choose another --out") from None
        parameters = dict(model.named_parameters())
        for key, value in self.part("optimizer").items():
            name, entry = key.rsplit("/", 1)
            optimizer.state[parameters[name]][entry] = value if entry == "step" else value.to(device)
        group = {k: tuple(v) if isinstance(v, list) else v for k, v in self.about["group"].items()}
        optimizer.param_groups[0].update(group)
        schedule.last_epoch = self.about["schedule"]
        states = self.part(f"generator/{processes.index()}")
        torch.set_rng_state(states["cpu"])
        if device == "cuda" and "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"])
        at.resumed += 1
        return at


def checkpoint_there(
    out: Path, rows: list[dict], rounds: list[int], run_sha256: str, dense_taken_over: bool
) -> Checkpoint | None:
    """What the run goes on from. Raises LotteryError if it is not of the ledger's last round or the one behind it."""
    checkpoint = Checkpoint(out, run_sha256) if (out / "checkpoint.safetensors").exists() else None
    if len(rows) > dense_taken_over and not checkpoint:
        raise lottery.LotteryError(f"--out {out}: {len(rows)} rounds in the ledger and no checkpoint to go on from")
    if checkpoint and checkpoint.about["round"] not in rounds[max(0, len(rows) - 1) : len(rows) + 1]:
        where = f"the checkpoint is in round {checkpoint.about['round']}, the ledger has {len(rows)} rounds"
        raise lottery.LotteryError(f"--out {out}: {where}")
    if checkpoint:
        at = checkpoint.about["progress"]
        print(f"going on in round {checkpoint.about['round']}, after {at['epoch']} epochs and {at['batch']} batches")
    return checkpoint


def scalars_to(folder: Path):
    """A writer for TensorBoard. It writes by itself every two minutes, and at its close."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise lottery.LotteryError("--tensorboard: the package is not there: pip install tensorboard") from None
    return SummaryWriter(str(folder))


@contextlib.contextmanager
def locked(out: Path):
    """Hold the run folder; the lock dies with this process. Raises LotteryError naming the process that has it.

    lockf, not flock: worker processes do not inherit it, so that none of them outlives this one with it.
    """
    with files.naming(out / "lock"):  # never through a link, which a stranger may have put there
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        file = open(os.open(out / "lock", flags, 0o666), "a+")
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                why = f"cannot be locked ({error.strerror}): choose an --out on another file system"
                raise lottery.LotteryError(f"--out {out}: {why}") from None
            file.seek(0)
            raise lottery.LotteryError(f"--out {out}: in use by {file.read().strip() or 'another process'}") from None
        with files.naming(out / "lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield


def check_links(out: Path) -> None:
    """Raise LotteryError where a run would write through a link, which a stranger may have put there."""
    for name in ("ledger.jsonl", "masks", "test.jsonl"):
        if (out / name).is_symlink():
            raise lottery.LotteryError(f"--out {out}: {name} is a link, which a run does not write through")


def check_out(out: Path) -> None:
    """Raise LotteryError, naming it, unless the run folder can be written to, or made. Leaves nothing behind."""
    if out.exists() and not out.is_dir():
        raise lottery.LotteryError(f"--out {out}: is a file, not a folder")
    made = []
    try:
        for folder in reversed([path for path in (out, *out.parents) if not path.exists()]):
            try:
                folder.mkdir()
                made.append(folder)
            except FileExistsError:
                if not folder.is_dir():  # else another run has made it by now
                    raise
        if not os.access(out, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise lottery.LotteryError(f"--out {out}: cannot write there ({error.strerror})") from None
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another process has put something into it
                folder.rmdir()


def end(out: Path, rows: list[dict]) -> None:
    """The report, the ledger's end with its hashes, and no checkpoint: the last steps of a run, or those missing.

    A run of before has a report and no end, and stays as it is.
    """
    reports, checkpoint = ("report.md", "report.png"), out / "checkpoint.safetensors"
    _, ended = ledger.read_lines(out / "ledger.jsonl")
    if not all((out / name).exists() for name in reports) or (not ended and checkpoint.exists()):
        report.write_report(out, ledger.read_config(out), rows)
        ledger.append_end(out, rows, reports)
    with files.naming(checkpoint):
        checkpoint.unlink(missing_ok=True)


def rows_there(out: Path, config: dict, flags: tuple[str, ...]) -> list[dict]:
    """The ledger of the run in the folder `out`, [] if there is none yet. Writes nothing.

    flags: the settings that are flags of the command line, for the message.
    Raises LotteryError if the folder holds another run, or anything else.
    """
    if out.exists() and not out.is_dir():
        raise lottery.LotteryError(f"--out {out}: is a file, not a folder")
    if not out.exists() or {path.name for path in out.iterdir()} <= {"lock", "config.json.tmp"}:
        return []
    try:
        old = ledger.read_config(out)
    except lottery.LotteryError as error:
        why = f": {error}" if (out / "config.json").exists() else ""
        raise lottery.LotteryError(
            f"--out {out}: the folder is not empty and holds no run: choose another{why}"
        ) from None
    for key in {**config, **old}:
        value = config.get(key)
        if key != "machine" and old.get(key) != value:
            hashes = {"data_sha256": "--data, by its hash", "lm_sha256": "--lm, by its hash"}
            hashes["noise_sha256"] = "--noise, by its hash"
            name = f"--{key.replace('_', '-')}" if key in flags else hashes.get(key, key)
            what = f"{name} {old.get(key)} there, {value} now"
            rule = "start as many" if key == "processes" else "choose another folder"
            raise lottery.LotteryError(f"--out {out}: holds another run ({what}): {rule}")
    path = out / "ledger.jsonl"
    rows = ledger.read_ledger(path) if path.exists() else []
    try:
        ledger.check_chain(rows, ledger.settings_of(config))
    except lottery.LotteryError as error:
        raise lottery.LotteryError(f"{path}: {error} (see python -m audio_lottery verify)") from None
    return rows
