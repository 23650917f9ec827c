"""What a run is, before anything is trained: corpus, network, tokens, noise, another run's tickets, configuration."""

import argparse
import contextlib
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

import data
import lottery
import models
from audio_lottery import files, ledger, sound
from audio_lottery.console import printable
from lab import controls, corpora, decode, networks, rivals
from lab.noise import Noise
from runner import flags, processes, recipes
from runner.cache import Cache, what_is_broken

HERE = Path(__file__).resolve().parents[1]
IN_MEMORY = 16e9  # bytes of features that are kept in memory, at most


def code_sha256() -> str:
    """Hash of the sources that decide a result, as they stand on the disk."""
    names = (
        "lottery", "models", "data", "train", "audio_lottery/files", "audio_lottery/ledger", "audio_lottery/sound",
        "audio_lottery/verdicts", "audio_lottery/draws", "runner/flags", "runner/values", "runner/recipes",
        "runner/settings", "runner/folder", "runner/cache", "runner/processes", "lab/controls", "lab/rivals",
        "lab/corpora", "lab/decode", "lab/noise", "lab/scoring",
    )  # fmt: skip
    sources = [HERE / f"{name}.py" for name in names] + sorted((HERE / "csrc").rglob("*.*"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


CODE_SHA256 = code_sha256()  # of what this process has imported: an edit while it works is not what it runs


@dataclasses.dataclass
class Setting:
    """What is built before anything is trained."""

    args: argparse.Namespace
    config: dict  # everything that decides the result, and "machine", which does not
    utterances: dict[str, list[data.Utterance]]
    tokens: list[str]
    model: torch.nn.Module
    transcriber_of: Callable  # of a model: how the test transcribes
    rounds: list[int]
    cache: str | Cache
    dense: dict | None = None  # round 0, if it is taken from another run
    noise: Noise | None = None

    def __post_init__(self):
        recipes.settle(self.model, self.args.recipe)
        self.loss, self.transcribe = processes.loss_of(self.model), self.transcriber_of(self.model)

    def epoch(self, train: list[data.Example], number: int, augment: data.SpecAugment | None = None) -> data.Epoch:
        """The batches of an epoch, of this process's share."""
        recipe, process, count = self.args.recipe, processes.index(), processes.count()
        mix = self.noise.for_training if self.noise and self.noise.snr is not None else None
        return data.Epoch(
            train, recipe.batch_size, self.args.seed, number, augment, recipe.batch_seconds, process, count, mix
        )

    def epoch_ends(self, train: list[data.Example]) -> list[int]:
        """Steps after which each epoch of a round ends."""
        recipe = self.args.recipe
        if recipe.batch_seconds is None:  # each has as many batches
            steps = self.steps_of(train, 0)
            return [steps * (e + 1) for e in range(recipe.epochs)]
        return list(itertools.accumulate(self.steps_of(train, e) for e in range(recipe.epochs)))

    def steps_of(self, train: list[data.Example], epoch: int) -> int:
        return math.ceil(len(self.epoch(train, epoch)) / self.args.recipe.accumulate)

    def facts(self) -> dict:
        """What every row of the ledger says of where it comes from."""
        settings = ledger.settings_of(self.config)
        return {
            "seed": self.args.seed,
            "config_sha256": ledger.hash_json(settings),
            "data_sha256": settings["data_sha256"],
            "code_sha256": CODE_SHA256,
            "versions": {
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
                "torchaudio": torchaudio.__version__,
                "libsndfile": soundfile.__libsndfile_version__,
                "operators": lottery.ops.path_on(self.args.device)[:100],  # the transducer's loss rounds as they do
            },
            "device": self.args.device,
            "threads": torch.get_num_threads(),
        }

    def info(self, row: dict) -> dict:
        """What the ticket of a row says of itself: whatever rebuilds the network, and the run's settings."""
        sizes = row.get("sizes") or models.BACKBONES[self.args.backbone].SIZES[self.args.size]
        network = {"sizes": sizes, "tokens": self.tokens, "features": self.model.features}
        return json.loads(json.dumps(ledger.settings_of(self.config) | network))  # as it is read back


def prepare(args: argparse.Namespace) -> Setting:
    """Read the corpus, build the network, make the configuration. What cannot be trained is refused here, by name."""
    utterances = read_corpus(args)
    check_rewind_step(args, most_steps(args.recipe, len(utterances["train"])), "at most")
    if args.skip_broken:
        leave_out_broken(utterances, args.workers)
    cache = Cache(args.cache) if isinstance(args.cache, Path) else args.cache
    tokens = data.tokens_of(utterances["train"], args.tokens)
    torch.manual_seed(args.seed)  # the draw of theta_0
    model = models.build(args.backbone, args.size, len(tokens)).to(args.device)
    if args.init:
        start_from(args.init, model, tokens)
    if args.source:  # of another network: refused before anything is trained
        what = {"control": args.control, "weights": args.ticket_weights, "backbone": args.backbone, "size": args.size}
        what |= {"exclude": args.keep_dense}
        controls.check_source(args.source, args.rounds, model, tokens, **what)
    if cache == "memory":
        check_memory(utterances, models.CnnLstm.BINS[model.features], args)
    hashes = hashes_of(utterances, cache, args)
    say_copies(utterances, hashes)
    say_cut(utterances)
    config = flags.configuration(args) | {"data_sha256": data.corpus_sha256(utterances, hashes)}
    if args.corpus == "an4":
        print(corpora.an4_said(config["data_sha256"]))
    config |= {"ticket_sha256": args.source.identity(args.rounds, args.ticket_weights)} if args.source else {}
    config |= {"init_sha256": lottery.sha256(lottery.state_of(model))} if args.init else {}
    noise = Noise(args.noise, args.snr, args.test_snr or ()) if args.noise else None
    config |= {"noise_sha256": noise.sha256} if noise else {}
    config |= ways(args, model)
    dense = dense_of(args, config)
    config |= {"dense": ledger.row_hash(dense)} if dense else {}
    ticket = ticket_for(model, args)
    counts = lottery.kept_counts(ticket.kept_units, args.sparsity, args.prune_rate)
    if not args.source:
        lottery.check_least(ticket, counts[-1])
    options = {key: getattr(args, key) for key in flags.DECODING} if args.lm else {"beam": args.beam}
    words = {word for utterance in utterances["train"] for word in utterance.text.split()}
    transcriber_of = functools.partial(decode.transcriber, tokens=tokens, lm=args.lm, words=words, **options)
    rounds = args.rounds or list(range(len(counts)))
    return Setting(args, config, utterances, tokens, model, transcriber_of, rounds, cache, dense, noise)


def say_copies(utterances: dict[str, list[data.Utterance]], hashes: dict[Path, str]) -> None:
    """Name, in a line, recordings that two parts have under two names: a corpus may be so, but who reads must know."""
    first: dict[str, tuple[str, Path]] = {}
    copies = {}
    for part, those in utterances.items():
        for path in dict.fromkeys(utterance.audio for utterance in those):
            other, before = first.setdefault(hashes[path], (part, path))
            if other != part:
                copies[path] = f"{path} of {part} is {before} of {other}"
    if copies:
        some, more = "; ".join([*copies.values()][:3]), f"; {len(copies) - 3} more" if len(copies) > 3 else ""
        print(printable(f"data: copies of one recording are in two parts, which makes tests easier: {some}{more}"))


def say_cut(utterances: dict[str, list[data.Utterance]], look: int = 100) -> None:
    """Tell, in a line, of parts whose durations leave out the ends of recordings, by a look at some of each."""
    for part, those in utterances.items():
        beginnings = [u for u in those if u.offset is None and u.duration is not None]
        looked = beginnings[:: math.ceil(len(beginnings) / look) or 1]
        over = []
        for u in looked:
            with contextlib.suppress(data.DataError):  # told when it is decoded
                over.append(sound.about(u.audio)[0] - u.duration)
        cut = sorted(seconds for seconds in over if sound.ROUNDING < seconds < 1e6)  # 1e6: a header that does not know
        if cut:
            by = f"by {cut[len(cut) // 2]:.1f} s (median)"
            said = f"{len(cut)} of {len(looked)} looked at are longer than their duration, {by}"
            print(f"data: of {part} {said}: only their beginnings are heard")


def most_steps(recipe, utterances: int) -> int:
    """Steps of a round that trains on all utterances: known before a recording is read, and some is left out."""
    batches = utterances if recipe.batch_seconds else math.ceil(utterances / (recipe.batch_size * processes.count()))
    return recipe.epochs * math.ceil(batches / recipe.accumulate)


def check_rewind_step(args: argparse.Namespace, steps: int, word: str) -> None:
    """Raise LotteryError unless steps are left behind --rewind-step; word: only, or at most, so many."""
    if args.rewind_step >= steps:
        rule = f"a round has {word} {steps} steps, and tickets train on what is left of them"
        raise lottery.LotteryError(f"--rewind-step {args.rewind_step}: {rule}")


def ways(args: argparse.Namespace, model: torch.nn.Module) -> dict[str, str]:
    """A word for each way of this run that once was another, so that runs of then neither go on here nor merge."""
    words = {
        "noise_draws": "by utterance" if args.test_snr else "",  # once another recording and place at each SNR
        "small": "keeps heads" if args.control == "dense-small" else "",  # once of fewer heads
        "normalization": "one mean" if model.features in data.ONE_MEAN else "",  # once a mean a bin
        "late_rewinding": "equal steps" if args.rewind_step else "",  # once from step 0, with k steps more than dense
        "mask_draws": "named" if args.control in controls.RANDOM else "",  # once those of epoch 3's order
    }
    return {key: word for key, word in words.items() if word}


def read_corpus(args: argparse.Namespace) -> dict[str, list[data.Utterance]]:
    """The utterances of --data by split: manifests, or a --corpus as it is unpacked; with --no-test, no test set."""
    if args.corpus == "manifests":
        return data.read_corpus(args.data, data.SPLITS if args.test else data.SPLITS[:2])
    sets = (args.train_sets, args.valid_sets, args.test_sets if args.test else [])
    if args.download and not processes.index():
        corpora.download(args.corpus, args.data, *sets)
    processes.gather(None)
    return corpora.read(args.corpus, args.data, *sets)


def leave_out_broken(utterances: dict[str, list[data.Utterance]], workers: int) -> None:
    """Take the utterances whose recordings cannot be decoded out of train and valid, and say so. A test stays whole.

    Each process decodes its share. Raises DataError if none is left.
    """
    for part in ("train", "valid"):
        all_of_them, count = utterances[part], processes.count()
        wrong = what_is_broken(all_of_them[processes.index() :: count], f"decoding {part}", workers)
        shares = processes.gather(wrong)
        wrong = [shares[i % count][i // count] for i in range(len(all_of_them))]
        utterances[part] = [utterance for utterance, why in zip(all_of_them, wrong) if not why]
        errors = [data.DataError(why) for why in wrong if why]
        if not utterances[part]:
            raise data.DataError(f"--skip-broken: no {part} recording is left: {data.Broken(errors)}")
        if errors:
            what = f"{len(errors)} of {len(wrong)} {part} recordings left out by --skip-broken"
            print(printable(f"data: {what}: {data.Broken(errors)}"))


def hashes_of(
    utterances: dict[str, list[data.Utterance]], cache: str | Cache, args: argparse.Namespace
) -> dict[Path, str]:
    """SHA-256 of every recording's bytes, of AN4 its samples."""
    if args.corpus == "an4":
        return corpora.hash_samples([utterance for part in utterances.values() for utterance in part], args.workers)
    recordings = data.audio_files(utterances)
    if isinstance(cache, Cache):
        return processes.first_then_others(lambda: cache.hash_files(recordings))
    return data.hash_files(recordings)


def check_memory(utterances: dict[str, list[data.Utterance]], bins: int, args: argparse.Namespace) -> None:
    """Raise DataError if the features of all utterances, by their seconds, are more than memory is for.

    Of training speech with noise it is the waveforms that are kept; at other speeds its features are kept once more.
    """
    each = 4 * 100 * bins  # bytes of a second
    size = 0.0
    for part, those in utterances.items():
        waveforms = part == "train" and args.noise and args.snr
        times = 1.0 if part == "valid" else 1.0 + len(args.test_snr or ())
        times = sum(1 / speed for speed in {1.0, *args.recipe.speeds}) if part == "train" else times
        size += sum(map(seconds_of, those)) * (64_000 if waveforms else each) * times
    size *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes of this machine
    if size > IN_MEMORY:
        rule = f"too many for it ({IN_MEMORY / 1e9:.1f} at most): name a folder for them, or none"
        raise data.DataError(f"--cache memory: {size / 1e9:.1f} GB of features are {rule}")


def seconds_of(utterance: data.Utterance) -> float:
    """By its manifest, or by its recording's header; 0 where that cannot be read, which is told when it is decoded."""
    if utterance.duration is not None:
        return utterance.duration
    with contextlib.suppress(data.DataError):
        seconds = sound.about(utterance.audio)[0]
        return max(0.0, seconds - (utterance.offset or 0.0)) if seconds < 1e6 else 0.0  # a header that does not know
    return 0.0


def start_from(path: Path, model: torch.nn.Module, tokens: list[str]) -> None:
    """Put a ticket's trained weights into the model, as theta_0."""
    file = files.load_ticket(path)
    if "tokens" in file.info:
        networks.check_tokens(file.info["tokens"], f"--init {path}: its info, tokens")
    state, renewed = controls.adopt(model, file.trained, file.info.get("tokens") == tokens, path)
    lottery.load_state(model, state)
    said = f"; made new, for other tokens: {', '.join(renewed)}" if renewed else ""
    removed = sum(int((~mask).sum()) for mask in file.masks.values())
    print(printable(f"theta_0: the trained weights of {path}{f', {removed:,} of them 0' if removed else ''}{said}"))


def of_round(setting: Setting, train: list[data.Example], number: int) -> Setting:
    """The setting with the recipe of round `number`, which for some --control's is another one."""
    args = setting.args
    if not (number and args.control in rivals.RIVALS):
        return setting
    steps = setting.epoch_ends(train)[-1]
    recipe = rivals.recipe_of(args.recipe, args.control, number, steps, args.rewind_step)
    here = copy.copy(setting)  # with its model and what wraps it
    here.args = argparse.Namespace(**vars(args) | {"recipe": recipe})
    return here


# ---------------------------------------------------------------------------- another run's round 0, and its tickets


def dense_of(args: argparse.Namespace, config: dict) -> dict | None:
    """Round 0 of --dense, or of --ticket's run, if it was trained with the same settings."""
    if not args.source:
        return None
    run, settings, row = args.ticket, args.source.settings, args.source.dense
    if args.dense:
        run = args.dense
        there, rows = ledger.read_run(run)
        settings, row = ledger.settings_of(there), rows[0] if rows else None
    ignored = {"machine", "margin", "marks", "ticket_sha256", "dense", *flags.NOT_OF_DENSE, *controls.FOLLOWING}
    keys = sorted((config.keys() | settings.keys()) - ignored)
    other = [key for key in keys if config.get(key) != settings.get(key)]
    if row and not other:
        config["machine"]["dense"] = str(run.resolve())
        return {**row, "previous": row["config_sha256"]}  # as where it was trained: that run may have taken it over too
    if args.dense:
        why = f"other {', '.join(other)}" if row else "none is finished"
        raise lottery.LotteryError(f"--dense {run}: it has no round 0 of these settings ({why})")
    if row:
        print(printable(f"dense is trained anew, as --ticket {run} has other {', '.join(other)}"))
    return None


def ticket_for(model: torch.nn.Module, args: argparse.Namespace) -> lottery.Ticket:
    """A ticket of this model, nothing pruned yet. Raises LotteryError naming --keep-dense if nothing bears the name."""
    try:
        return lottery.Ticket(model, pruning=args.pruning, exclude=args.keep_dense)
    except lottery.LotteryError as error:
        raise lottery.LotteryError(re.sub("^exclude ", "--keep-dense ", str(error))) from None


def ticket_of(setting: Setting, number: int) -> tuple[Setting, lottery.Ticket, dict]:
    """The ticket of --ticket's round `number`, or its control, ready to be trained; the setting with its model; what
    its row says of its origin."""
    args, model = setting.args, setting.model
    if number == 0:
        return setting, lottery.Ticket(model, exclude=args.keep_dense), {}
    ticket, about, renewed = controls.ticket_of_round(
        args.source, number, model, setting.tokens, args.pruning, args.seed,
        control=args.control, weights=args.ticket_weights, backbone=args.backbone, size=args.size,
        exclude=args.keep_dense,
    )  # fmt: skip
    if renewed:
        print(f"  round {number}: made new and not pruned, for other tokens: {', '.join(renewed)}", flush=True)
    if ticket.model is not model:
        setting = dataclasses.replace(setting, model=ticket.model)
    return setting, ticket, about
