"""`python -m bench train`: a training step beside the official way, where the RNN-T's goes, and steps on CUDA."""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import prune

import lottery
import models
from bench.measure import in_a_process, in_turns, memory, must_be_compiled, stop, timed


class OfficialBiLstm(nn.Module):
    """A layer as the official code runs it: nn.LSTM over packed sequences, the two directions summed."""

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, batch_first=True, bidirectional=True)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        out = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])[0]
        return out.unflatten(-1, (2, -1)).sum(2)


def official_cnn_lstm(size: str) -> nn.Module:
    """models.CnnLstm with packed layers, every prunable weight under torch.nn.utils.prune at 20 % remaining."""
    model = models.build("cnn-lstm", size, 29)
    for i, lstm in enumerate(model.lstms):
        model.lstms[i] = OfficialBiLstm(lstm.ahead.input_size, lstm.ahead.hidden_size)
    for module in list(model.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.dim() > 1 and "bias" not in name:
                prune.custom_from_mask(module, name, torch.rand_like(weight) < 0.2)
    return model


def our_cnn_lstm(size: str) -> lottery.Ticket:
    """The same at 20 % remaining, held by a ticket."""
    ticket = lottery.Ticket(models.build("cnn-lstm", size, 29))
    ticket.masks = {name: torch.rand_like(w) < 0.2 for name, w in ticket.weights.items()}
    ticket.rewind()
    return ticket


def prune_official(model: nn.Module) -> None:
    """A fifth of what torch.nn.utils.prune has left in the whole model."""
    pairs = [(m, n[: -len("_orig")]) for m in model.modules() for n, _ in m.named_parameters(recurse=False)]
    pairs = [(m, n) for m, n in pairs if hasattr(m, f"{n}_mask")]
    prune.global_unstructured(pairs, prune.L1Unstructured, amount=0.2)


def training_run(way: str, size: str, steps: int) -> None:
    """Child process: print the median seconds of a step, of holding and of pruning, and the peak memory in bytes.

    Both ways keep theta_0 in memory, to rewind to.
    """
    torch.manual_seed(0)
    features, lengths = torch.randn(4, 500, 161 if size == "paper" else 80), torch.tensor([500, 470, 440, 400])
    targets, target_lengths = torch.randint(1, 29, (4, 60)), torch.tensor([60, 55, 50, 45])
    before = memory("VmRSS")
    hold = []
    if way == "official":
        model, ticket = official_cnn_lstm(size), None
        theta_0 = [parameter.detach().clone() for parameter in model.parameters()]
    else:
        ticket = our_cnn_lstm(size)
        model = ticket.model
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4)

    def step() -> None:
        optimizer.zero_grad()
        model.loss(features, lengths, targets, target_lengths).backward()
        if ticket:
            hold.append(timed(ticket.hold))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 400.0)
        optimizer.step()

    seconds = in_turns("cpu", steps, step=step)["step"]
    peak_of_steps = memory("VmHWM") - before
    start = time.perf_counter()
    if ticket:
        ticket.prune(round(0.16 * sum(w.numel() for w in ticket.weights.values())))
        ticket.rewind()
    else:
        prune_official(model)
    pruning = time.perf_counter() - start
    if not ticket:
        with torch.no_grad():  # rewind
            for parameter, value in zip(model.parameters(), theta_0, strict=True):
                parameter.copy_(value)
    held = statistics.median(hold) if hold else 0.0
    print(json.dumps([seconds, held, pruning, peak_of_steps, memory("VmHWM") - before]))


def validate_training() -> None:
    """The official way of running gives the same loss and gradients, at demo size."""
    torch.manual_seed(0)
    ours = models.build("cnn-lstm", "demo", 29).eval()
    theirs = models.build("cnn-lstm", "demo", 29).eval()
    state = ours.state_dict()
    for i, lstm in enumerate(ours.lstms):
        theirs.lstms[i] = OfficialBiLstm(lstm.ahead.input_size, lstm.ahead.hidden_size)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            state[f"lstms.{i}.rnn.{name}"] = state.pop(f"lstms.{i}.ahead.{name}")
            state[f"lstms.{i}.rnn.{name}_reverse"] = state.pop(f"lstms.{i}.back.{name}")
    theirs.load_state_dict(state)
    batch = torch.randn(4, 500, 80), torch.tensor([500, 470, 440, 400])
    batch += torch.randint(1, 29, (4, 60)), torch.tensor([60, 55, 50, 45])
    losses = [model.loss(*batch) for model in (ours, theirs)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(ours.convs[0].weight.grad, theirs.convs[0].weight.grad, rtol=1e-3, atol=1e-4)
    print("validated: packed and padded layers give the same loss and gradients")


def bench_train(args: argparse.Namespace) -> None:
    must_be_compiled()
    validate_training()
    for threads in (1, 2):
        found = {}
        for way in ("ours", "official"):
            code = f"import torch; from bench import training; torch.set_num_threads({threads}); "
            code += f"training.training_run({way!r}, {args.size!r}, {args.repeats})"
            found[way] = json.loads(in_a_process(code))
        (ours, held, pruned, peak, top), (theirs, _, their_pruning, their_peak, their_top) = found.values()
        print(
            f"cnn-lstm {args.size}, {threads} threads: a step {ours:.2f} s, the official way {theirs:.2f} s "
            f"({theirs / ours:.1f} x); holding the ticket {held / ours:.2%} of the step; peak memory of steps "
            f"{peak / 1e9:.2f} GB against {their_peak / 1e9:.2f} GB ({peak / their_peak:.2f}), with pruning and "
            f"rewinding {top / 1e9:.2f} against {their_top / 1e9:.2f} GB ({top / their_top:.2f}); pruning "
            f"{pruned:.2f} s against {their_pruning:.1f} s",
            flush=True,
        )
        torch.set_num_threads(threads)
        transducer_step(args.size, args.repeats)
    if torch.cuda.is_available():
        for backbone in models.BACKBONES:
            for amp in (False, True):
                print(cuda_step(backbone, amp, args.repeats), flush=True)
    else:
        print("no GPU here: no step on CUDA timed")


def transducer_step(size: str, repeats: int) -> None:
    """Where the RNN-T's step goes, and what its loss would take by the reference, which is torchaudio's."""
    torch.manual_seed(0)
    model = models.build("rnnt", size, 29)
    features, lengths = torch.randn(4, 500, 80), torch.tensor([500, 420, 350, 300])
    targets, target_lengths = torch.randint(1, 29, (4, 75)), torch.tensor([75, 60, 50, 45])
    joined, frames = model.every_second(*model.encode(features, lengths))
    leaves = joined.detach().requires_grad_(), model.predict(nn.functional.pad(targets, (1, 0)))[0].detach()
    leaves[1].requires_grad_()
    counts, layer = (frames.tolist(), target_lengths.tolist()), model.output

    def step() -> None:
        model.zero_grad()
        model.loss(features, lengths, targets, target_lengths).backward()

    def step_by_reference() -> None:
        compiled_on, models.COMPILED_ON = models.COMPILED_ON, set()
        step()
        models.COMPILED_ON = compiled_on

    def gradients(way: Callable[[], None]) -> list[torch.Tensor]:
        torch.manual_seed(1)  # the same dropout
        way()
        return [parameter.grad.clone() for parameter in model.parameters()]

    for name, ours, theirs in zip(dict(model.named_parameters()), *map(gradients, (step, step_by_reference))):
        if not (ours - theirs).abs().max() <= 1e-3 * theirs.abs().max():  # NaN is not
            stop(f"rnnt: the gradients of {name} are not the reference's")
    t = in_turns(
        "cpu",
        repeats,
        step=step,
        step_by_reference=step_by_reference,
        encoder=lambda: model.encode(features, lengths)[0].sum().backward(),
        predictor=lambda: model.predict(nn.functional.pad(targets, (1, 0)))[0].sum().backward(),
        loss=lambda: models.CompiledLoss.apply(*leaves, layer.weight, layer.bias, targets, *counts).backward(),
        reference=lambda: models.reference_transducer_loss(*leaves, layer, targets, *counts).backward(),
    )
    parts = ", ".join(f"{name} {t[name] / t['step']:.0%}" for name in ("encoder", "predictor", "loss"))
    other = t["step_by_reference"]
    print(
        f"rnnt {size}, {torch.get_num_threads()} threads: forward and backward {t['step']:.3f} s: {parts}; by the "
        f"reference {other:.3f} s ({other / t['step']:.2f} x), the loss {t['reference'] / other:.0%} "
        f"({t['reference'] / t['loss']:.1f} x)",
        flush=True,
    )


def cuda_step(backbone: str, amp: bool, repeats: int) -> str:
    """A step at paper size on CUDA: 32 utterances of 10 s."""
    torch.manual_seed(0)
    model = models.build(backbone, "paper", 29).cuda()
    ticket, optimizer = lottery.Ticket(model), torch.optim.AdamW(model.parameters(), 3e-4)
    features = torch.randn(32, 1000, models.CnnLstm.BINS[model.features], device="cuda")
    lengths, target_lengths = (torch.full((32,), n, device="cuda") for n in (1000, 120))
    targets = torch.randint(1, 29, (32, 120), device="cuda")

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            loss = model.loss(features, lengths, targets, target_lengths)
        loss.backward()
        ticket.hold()
        optimizer.step()

    torch.cuda.reset_peak_memory_stats()
    t = in_turns("cuda", repeats, step=step, hold=ticket.hold)
    peak = torch.cuda.max_memory_allocated()
    return (
        f"{backbone} paper on {torch.cuda.get_device_name()}{' --amp' if amp else ''}: 32 utterances of 10 s: "
        f"{t['step'] * 1e3:.0f} ms a step, holding {t['hold'] / t['step']:.1%} of it, {peak / 1e9:.1f} GB"
    )
