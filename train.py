"""Find winning tickets: train dense, prune, rewind, repeat, and test every round against dense.

    python train.py --backbone rnnt --sparsity 0.9

See README.md for what stands in the run folder, lottery.py for the algorithm.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import jiwer
import numpy as np
import torch
from tqdm import tqdm

import data
import lottery
import models
from data import SpecAugment

HERE = Path(__file__).resolve().parent


# ---------------------------------------------------------------------------- recipes


@dataclasses.dataclass(frozen=True)
class Recipe:
    epochs: int
    batch_size: int
    lr: float
    # "one-cycle": the learning rate rises to lr and falls to 0 over all steps, beta1 falls from 0.95 to 0.85 and rises
    # again (Smith & Topin 2019, torch's defaults); "anneal": lr / 1.1 after each epoch
    schedule: str
    clip: float  # of the gradient's norm
    seconds: tuple[float, float]  # shortest and longest utterance that is trained on; all are evaluated
    augment: SpecAugment
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)


# The paper's, for every backbone at --size paper (its time warping left out).
PAPER = Recipe(16, 32, 3e-4, "anneal", 400.0, (1.0, 15.0), SpecAugment(1, 27, 1, 70))
# Ours, for a quarter of an hour of speech and two cores.
ONE_CYCLE = (0.95, 0.999)
LIGHT, STRONG = SpecAugment(1, 10, 1, 10, 0.1), SpecAugment(2, 15, 2, 20, 0.2)
RECIPES = {
    ("cnn-lstm", "demo"): Recipe(20, 8, 3e-3, "one-cycle", 400.0, (0.0, 10.0), STRONG, betas=ONE_CYCLE),
    ("rnnt", "demo"): Recipe(18, 8, 4e-3, "one-cycle", 5.0, (0.0, 10.0), LIGHT, betas=ONE_CYCLE),
    ("conformer", "demo"): Recipe(20, 8, 2e-3, "one-cycle", 5.0, (0.0, 10.0), LIGHT, betas=ONE_CYCLE),
    **{(backbone, "paper"): PAPER for backbone in models.BACKBONES},
}


# ---------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2 (argparse prints its usage above it)."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    recipe = {size: RECIPES["rnnt", size] for size in ("demo", "paper")}

    def default(field: str) -> str:
        return (
            f"the recipe's, e.g. {getattr(recipe['demo'], field)} (demo) or {getattr(recipe['paper'], field)} (paper)"
        )

    p = Parser(
        prog="train.py", description="Find winning tickets of a speech recogniser.", allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=110),
    )  # fmt: skip
    add = p.add_argument
    add("--backbone", choices=list(models.BACKBONES), default="rnnt", help="network (default: rnnt)")
    add("--sparsity", type=float, default=0.9, help="fraction of prunable weights to remove (default: 0.9)")
    add("--data", default="demo", metavar="demo|DIR", help="folder with train, valid, test.jsonl (default: demo)")
    add("--size", choices=["demo", "paper"], default="demo", help="size of network and recipe (default: demo)")
    add("--prune-rate", type=float, default=0.2, help="share of survivors removed a round (default: 0.2)")
    add("--epochs", type=int, help=f"epochs a round (default: {default('epochs')})")
    add("--batch-size", type=int, help=f"utterances (default: {default('batch_size')})")
    add("--lr", type=float, help=f"learning rate (default: {default('lr')})")
    add("--rewind-step", type=int, default=0, help="step whose weights are restored (default: 0, initialisation)")
    add("--seed", type=int, default=0, help="of initialisation, order, dropout, masking (default: 0)")
    add("--margin", type=float, default=0.01, help="WER that a matching ticket may lose (default: 0.01)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    add("--out", type=Path, help="run folder (default: runs/BACKBONE-DATA-SIZE-SPARSITY-seedSEED)")
    args = p.parse_args(argv)
    args.recipe = RECIPES[args.backbone, args.size]
    chosen = {k: getattr(args, k) for k in ("epochs", "batch_size", "lr") if getattr(args, k) is not None}
    args.recipe = dataclasses.replace(args.recipe, **chosen)
    for flag, value, low in (
        ("--epochs", args.recipe.epochs, 1), ("--batch-size", args.recipe.batch_size, 1), ("--seed", args.seed, 0),
        ("--rewind-step", args.rewind_step, 0), ("--margin", args.margin, 0),
    ):  # fmt: skip
        if not low <= value < 2**31:
            p.error(f"{flag} must be at least {low} and below 2^31, got {value}")
    if not 0 < args.recipe.lr < math.inf:
        p.error(f"--lr must be above 0, got {args.recipe.lr}")
    try:
        lottery.check_rates(args.sparsity, args.prune_rate)
    except lottery.LotteryError as error:
        p.error(str(error))
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds no CUDA device here")
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    args.data = HERE / "demo" if args.data == "demo" else Path(args.data)
    name = f"{args.backbone}-{args.data.resolve().name}-{args.size}-{args.sparsity:g}-seed{args.seed}"
    args.out = args.out or Path("runs") / name
    return args


def configuration(args: argparse.Namespace) -> dict:
    """Everything that decides the result, as JSON: config.json."""
    config = {
        k: getattr(args, k) for k in ("backbone", "sparsity", "size", "prune_rate", "rewind_step", "seed", "margin")
    }
    config["data"] = "demo" if args.data == HERE / "demo" else str(args.data.resolve())
    config |= dataclasses.asdict(args.recipe)
    # Not compared when a run is met again, but results are bit for bit the same only on the same machine.
    config["machine"] = {"device": args.device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    return json.loads(json.dumps(config))


# ---------------------------------------------------------------------------- recognise and score


def recognise(model, examples: list[data.Example], tokens: list[str], batch_size: int, device: str) -> list[str]:
    """Greedy transcripts, in the order of the examples."""
    texts = [""] * len(examples)
    model.eval()
    with torch.inference_mode():
        for indices, batch in data.eval_batches(examples, batch_size):
            batch = batch.to(device)
            for i, ids in zip(indices, model.transcribe(batch.features, batch.input_lengths)):
                texts[i] = data.decode(ids, tokens)
    return texts


def score(references: list[str], hypotheses: list[str]) -> dict:
    """Word error counts an utterance, and WER and CER over all (jiwer)."""
    outputs = [jiwer.process_words(r, h) for r, h in zip(references, hypotheses)]
    errors = [o.substitutions + o.deletions + o.insertions for o in outputs]
    words = [o.hits + o.substitutions + o.deletions for o in outputs]
    cer = jiwer.cer(references, hypotheses)
    return {"errors": errors, "words": words, "wer": sum(errors) / sum(words), "cer": cer}


# ---------------------------------------------------------------------------- one round of training


class Corpus:
    """The three splits as examples. Says aloud what training leaves out and what the tokens cannot spell."""

    def __init__(self, utterances: dict[str, list[data.Utterance]], tokens: list[str], model, seconds=(0.0, math.inf)):
        self.tokens = tokens
        self.train, self.valid, self.test = (
            data.load_examples(utterances[split], tokens, model.features, f"features of {split}")
            for split in ("train", "valid", "test")
        )
        print(f"data: {len(self.train)} train, {len(self.valid)} valid, {len(self.test)} test utterances")
        low, high = seconds
        long_enough = [e for e in self.train if low <= e.seconds <= high]
        frames = model.output_lengths(torch.tensor([len(e.features) for e in long_enough])).tolist()
        fits = [e for n, e in zip(frames, long_enough) if n >= max(2, data.frames_needed(e.targets))]  # 2: batch norm
        for gone, why in (
            (len(self.train) - len(long_enough), f"not between {low:g} and {high:g} s long"),
            (len(long_enough) - len(fits), "fewer encoder frames than CTC needs for the text"),
        ):
            if gone:
                print(f"data: {gone} train utterances left out of training: {why}")
        if not fits:
            raise data.DataError("no train utterance is left to train on (see the counts above)")
        self.train = fits
        for split in ("valid", "test"):
            unseen = data.unseen_characters(utterances[split], tokens)
            if unseen:
                counts = ", ".join(f"{c!r} x {n}" for c, n in sorted(unseen.items()))
                print(f"data: {split} has characters that train has not, counted as errors: {counts}")


def train_round(ticket: lottery.Ticket, corpus: Corpus, recipe: Recipe, seed: int, device: str):
    """Train ticket.model to its last epoch, with a fresh optimizer, schedule and data order.

    Returns (valid WER, epoch, state) of the epoch with the best valid WER; of equals the later.
    """
    model, best = ticket.model, None
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, recipe.betas, weight_decay=recipe.weight_decay)
    steps = steps_an_epoch(corpus, recipe)
    if recipe.schedule == "one-cycle":
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=steps * recipe.epochs)
    else:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.1 ** -(step // steps))
    label = f"round {ticket.round}"
    bar = tqdm(total=steps * recipe.epochs, desc=label, unit="step", disable=None, leave=False)
    said = time.monotonic()
    for epoch in range(recipe.epochs):
        torch.manual_seed(int(np.random.default_rng([seed, epoch, 1]).integers(2**63)))  # dropout
        model.train()
        total = 0.0
        for batch in data.train_batches(corpus.train, recipe.batch_size, seed, epoch, recipe.augment):
            batch = batch.to(device)
            optimizer.zero_grad()
            loss = model.loss(batch.features, batch.input_lengths, batch.targets, batch.target_lengths)
            loss.backward()
            ticket.hold()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            schedule.step()
            ticket.stepped()
            total += loss.item() * len(batch.texts)
            bar.update()
        if not math.isfinite(total):
            raise lottery.LotteryError(f"{label}, epoch {epoch + 1}: the loss is {total}: try a lower --lr")
        ticket.check()
        hypotheses = recognise(model, corpus.valid, corpus.tokens, recipe.batch_size, device)
        wer = score([e.text for e in corpus.valid], hypotheses)["wer"]
        if best is None or wer <= best[0]:
            best = (wer, epoch + 1, lottery.copy_state(model))
        line = f"epoch {epoch + 1}/{recipe.epochs}, loss {total / len(corpus.train):.2f}, valid WER {wer:.3f}"
        bar.set_postfix_str(line)
        if bar.disable and time.monotonic() - said > 30:  # in a log
            said = time.monotonic()
            print(f"  {label}, {line}", flush=True)
    bar.close()
    return best


def steps_an_epoch(corpus: Corpus, recipe: Recipe) -> int:
    return math.ceil(len(corpus.train) / recipe.batch_size)


# ---------------------------------------------------------------------------- the run folder


def read_run(out: Path, config: dict, rounds: int) -> list[dict]:
    """The ledger of the finished run in the folder `out`, [] if there is none yet. Writes nothing.

    Raises LotteryError if the folder holds anything else.
    """
    if out.exists() and not out.is_dir():
        raise lottery.LotteryError(f"--out {out}: is a file, not a folder")
    if not out.exists() or not any(out.iterdir()):
        return []
    try:
        old = dict(json.loads((out / "config.json").read_text(encoding="utf-8")))
        lines = (out / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
        ledger = [dict(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError):
        raise lottery.LotteryError(
            f"--out {out}: the folder is not empty and holds no whole run: choose another"
        ) from None
    for key, value in config.items():
        if key != "machine" and old.get(key) != value:
            what = f"{key} {old.get(key)} there, {value} now"
            raise lottery.LotteryError(f"--out {out}: holds another run ({what}): choose another folder")
    if 0 < len(ledger) < rounds:
        what = f"{len(ledger)} of {rounds} rounds"
        raise lottery.LotteryError(f"--out {out}: holds an unfinished run ({what}): remove it or choose another folder")
    return ledger


def append(path: Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------------------- report

COLUMNS = ["round", "remaining", "of all", "valid WER", "test WER", "test CER", "seconds", "against dense"]


def cells(row: dict) -> list[str]:
    """A ledger row under COLUMNS."""
    shares = [f"{row[key]:.1%}" for key in ("remaining", "remaining_all")]
    rates = [f"{row[key]:.3f}" for key in ("valid_wer", "test_wer", "test_cer")]
    against = str(lottery.Verdict(row["verdict"], *row["interval"])) if row["round"] else "-"
    return [str(row["round"]), *shares, *rates, f"{row['seconds']:.0f}", against]


def text_line(texts: list[str]) -> str:
    return "  ".join([text.rjust(len(column)) for text, column in zip(texts[:-1], COLUMNS)] + texts[-1:])


def markdown_line(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def summary(ledger: list[dict]) -> list[str]:
    """The dense model, the sparsest ticket that is not behind it, and the best one."""
    dense, tickets = ledger[0], ledger[1:]
    lines = [f"dense: test WER {dense['test_wer']:.3f}, CER {dense['test_cer']:.3f}"]
    good = [row for row in tickets if row["verdict"] in ("winning", "matching")]
    for name, rows, key in (
        ("sparsest winning or matching ticket", good, lambda row: row["remaining"]),
        ("ticket with the best valid WER", tickets, lambda row: (row["valid_wer"], row["remaining"])),
    ):
        if rows:
            row = min(rows, key=key)
            lines.append(
                f"{name}: round {row['round']}, {row['remaining']:.1%} of the prunable and {row['remaining_all']:.1%} "
                f"of all weights remain, test WER {row['test_wer']:.3f}, {row['verdict']}"
            )
        elif tickets:
            lines.append(f"{name}: none")
    seeds_and_utterances = f"1 seed, {len(dense['test_words'])} test utterances"
    return [*lines, f"95 % intervals of WER(ticket) - WER(dense): {seeds_and_utterances}, each ticket tested once"]


def write_report(out: Path, config: dict, ledger: list[dict]) -> None:
    """report.md and report.png."""
    utterances = len(ledger[0]["test_words"])
    explained = (
        f"Against dense: 95 % interval of WER(ticket) - WER(dense), paired bootstrap over {utterances} test "
        f"utterances, 1 seed, no correction for testing {len(ledger) - 1} tickets. *winning*: the interval lies below "
        f"0; *matching*: its upper end is at most {config['margin']}; *worse*: it lies above 0; else *undecided*. Each "
        "round is tested once, at its epoch with the best valid WER; pruning uses the last epoch. `remaining` is of "
        "the prunable weights, `of all` of all parameters."
    )
    lines = [f"# {config['backbone']} on {config['data']}, seed {config['seed']}", ""]
    lines += [*(f"- {line}" for line in summary(ledger)), "", explained, ""]
    lines += [markdown_line(COLUMNS), markdown_line(["---:"] * 7 + [":---"])]
    lines += [markdown_line(cells(row)) for row in ledger]
    lines += ["", "![WER and CER against remaining weights](report.png)", ""]
    lines += ["```json", json.dumps(config, indent=2), "```", ""]
    lottery.write_atomically(out / "report.md", "\n".join(lines).encode())
    draw(out / "report.png", config, ledger)


def draw(path: Path, config: dict, ledger: list[dict]) -> None:
    """WER and CER against remaining weights; the band is the paired interval about the dense WER."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    remaining = [100 * row["remaining"] for row in ledger]
    for ax, key, name in ((axes[0], "test_wer", "test WER"), (axes[1], "test_cer", "test CER")):
        dense = ledger[0][key]
        ax.axhline(dense, color="black", linewidth=1, linestyle="--", label=f"dense {dense:.3f}")
        if key == "test_wer" and len(ledger) > 1:
            low, high = ([dense + row["interval"][i] for row in ledger[1:]] for i in (0, 1))
            ax.fill_between(remaining[1:], low, high, color="C0", alpha=0.2, label="95 % interval against dense")
        ax.plot(remaining, [row[key] for row in ledger], "o-", color="C0", label="ticket")
        ax.set(xscale="log", xlabel="remaining prunable weights, %", ylabel=name)
        ticks = [t for t in (100, 50, 20, 10, 5, 2, 1) if t >= 0.8 * remaining[-1]]
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.invert_xaxis()
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(
        f"{config['backbone']} on {Path(config['data']).name}, {config['size']} size, seed {config['seed']}"
    )
    temporary = path.with_name("report.tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    os.replace(temporary, path)


# ---------------------------------------------------------------------------- the whole


def run(args: argparse.Namespace) -> None:
    config, recipe, device = configuration(args), args.recipe, args.device
    utterances = data.read_corpus(args.data)
    tokens = data.tokens_of(utterances["train"])
    torch.manual_seed(args.seed)  # the draw of theta_0
    model = models.build(args.backbone, args.size, len(tokens))
    total = sum(weight.numel() for weight in lottery.prunable(model).values())
    rounds = len(lottery.kept_counts(total, args.sparsity, args.prune_rate))
    ledger = read_run(args.out, config, rounds)
    print("config: " + ", ".join(f"{key} {value}" for key, value in config.items()))
    if ledger:
        print(f"{args.out} is finished: nothing to train")
        print("\n".join(map(text_line, [COLUMNS, *map(cells, ledger)])))
        print("\n".join(summary(ledger)))
        return
    print(f"ops: {lottery.ops.path}; device: {device}, {torch.get_num_threads()} threads")
    everything = sum(p.numel() for p in model.parameters())
    print(f"model: {everything:,} parameters, {total:,} prunable; {rounds} rounds, the first one dense")
    corpus = Corpus(utterances, tokens, model, recipe.seconds)
    steps = steps_an_epoch(corpus, recipe) * recipe.epochs
    if args.rewind_step > steps:
        raise lottery.LotteryError(f"--rewind-step {args.rewind_step}: a round has only {steps} steps")
    args.out.mkdir(parents=True, exist_ok=True)
    lottery.write_atomically(args.out / "ledger.jsonl", b"")
    lottery.write_atomically(args.out / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    print(text_line(COLUMNS), flush=True)
    for found in search(model.to(device), corpus, args):
        info = {**config, "tokens": tokens, "features": model.features, "round": found.row["round"]}
        masks, rewind = found.ticket.masks, found.ticket.rewind_state
        lottery.save_ticket(args.out / "ticket.safetensors", masks, rewind, model.state_dict(), info)
        ledger.append(found.row)
        if len(ledger) == rounds:
            write_report(args.out, config, ledger)
        append(args.out / "ledger.jsonl", found.row)  # last: a ledger that has all rounds is a finished run
        print(text_line(cells(found.row)), flush=True)
        for name, kept in found.row["kept_per_layer"].items():
            if kept == 0:
                print(f"  {name}: no weight is left in this layer", flush=True)
    print("\n".join(summary(ledger)))
    print(f"{args.out}: ledger.jsonl, ticket.safetensors, report.md, report.png")


def search(model: torch.nn.Module, corpus: Corpus, args: argparse.Namespace):
    """lottery.find_ticket with this recipe; rows get WER, CER, seconds, seed and the verdict against round 0."""
    recipe, device = args.recipe, args.device
    trained, dense = {}, {}

    def train(ticket: lottery.Ticket) -> lottery.State:
        started = time.monotonic()
        wer, epoch, state = train_round(ticket, corpus, recipe, args.seed, device)
        trained.update(valid_wer=wer, best_epoch=epoch, started=started)
        return state

    def evaluate(model: torch.nn.Module) -> dict:
        hypotheses = recognise(model, corpus.test, corpus.tokens, recipe.batch_size, device)
        test = score([e.text for e in corpus.test], hypotheses)
        row = {"valid_wer": trained["valid_wer"], "best_epoch": trained["best_epoch"], "test_wer": test["wer"]}
        row |= {"test_cer": test["cer"], "test_errors": test["errors"], "test_words": test["words"]}
        if dense:
            found = lottery.verdict(test["errors"], dense["errors"], test["words"], args.margin)
            row |= {"verdict": found.word, "interval": [found.low, found.high]}
        else:
            dense.update(test)
        return row | {"seconds": round(time.monotonic() - trained["started"], 1), "seed": args.seed}

    return lottery.find_ticket(
        model, train, evaluate,
        sparsity=args.sparsity, prune_rate=args.prune_rate, rewind_step=args.rewind_step,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except (data.DataError, lottery.LotteryError, OSError) as error:
        print(f"train.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
