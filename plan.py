"""What a search for a ticket costs, before anything is trained: python train.py --plan"""

import torch

import lottery
import models
import report

HOURS = {"LibriSpeech": 960, "TED-LIUM 1": 118, "Common Voice (as in the paper)": 582}  # of training speech
SPARSITIES = (0.79, 0.9, 0.956)  # the paper's sparsest matching tickets of CNN-LSTM: 21 %, (10 %) and 4.4 % remain
TERAFLOPS = 20  # sustained by one GPU: an assumption; recurrent layers run far below the peak
TOKENS_A_SECOND = 15  # characters of read English


def multiply_adds(backbone: str) -> float:
    """Multiply-adds of the loss per second of speech, forward, at paper size with the paper's 29 tokens."""
    seconds, tokens = 4, 29
    model = models.build(backbone, "paper", tokens)
    uses = per_utterance(model, seconds, tokens)
    return sum(uses[name] * weight.numel() for name, weight in lottery.prunable(model).items()) / seconds


def per_utterance(model: torch.nn.Module, seconds: int, tokens: int) -> dict[str, int]:
    """How often each weight multiplies in the loss of one utterance."""
    frames, text = torch.tensor([100 * seconds]), torch.tensor([TOKENS_A_SECOND * seconds])
    bins = models.CnnLstm.BINS[model.features]
    targets = torch.randint(1, tokens, (1, int(text)))
    with torch.no_grad():
        return lottery.weight_uses(model, lambda: model.loss(torch.randn(1, int(frames), bins), frames, targets, text))


def table(epochs: int, prune_rate: float) -> str:
    """Markdown: what one search costs at each of SPARSITIES."""
    columns = ["backbone", "multiply-adds a second of speech", "training speech", *(f"{s:.1%}" for s in SPARSITIES)]
    lines = [report.markdown_line(columns), report.markdown_line(["---"] * len(columns))]
    for backbone in models.BACKBONES:
        forward = multiply_adds(backbone)
        for corpus, hours in HOURS.items():
            row = [backbone, f"{forward / 1e9:.2f} G", f"{corpus}, {hours} h"]
            for sparsity in SPARSITIES:
                trainings = len(lottery.kept_counts(10**9, sparsity, prune_rate))
                audio = trainings * epochs * hours
                total = 3 * forward * 3600 * audio  # backward() takes two products for each of the forward pass
                gpu_hours = 2 * total / (TERAFLOPS * 1e12) / 3600
                row.append(f"{trainings} trainings, {audio:,} h of audio, {total:.1e}, {gpu_hours:,.0f} GPU h")
            lines.append(report.markdown_line(row))
    return "\n".join(lines)


def explained(epochs: int) -> str:
    return (
        f"Paper size, {epochs} epochs a training, by target sparsity. Multiply-adds: products with weights of forward "
        f"and backward pass (3 times the forward pass), characters as tokens, {TOKENS_A_SECOND} a second. GPU hours: "
        f"at {TERAFLOPS} TFLOP/s sustained, an assumption, not a measurement; a pruned weight is multiplied all the "
        "same in training."
    )
