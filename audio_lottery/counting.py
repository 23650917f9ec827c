"""How often the weights of any nn.Module multiply: its multiply-adds, dense and with zeros skipped."""

from collections.abc import Callable

from torch import nn

from lottery import PRUNED_LAYERS, prunable


def weight_uses(model: nn.Module, call: Callable[[], object]) -> dict[str, int]:
    """How often each prunable weight multiplies an input during call(), which runs the model.

    The sum of uses * numel is the multiply-adds of all products with weights; of uses * kept, with zeros skipped.
    Counted are convolutions (padding included), recurrent layers (each step) and linear layers, not products of two
    activations, as in attention. (Counters of FLOPs take nn.LSTM for 0.)
    """
    names = {id(weight): name for name, weight in prunable(model).items()}
    uses = dict.fromkeys(names.values(), 0)

    def count(module, inputs, output):
        out = (output[0] if isinstance(output, tuple) else output).data  # of a packed sequence too
        for weight in module.parameters(recurse=isinstance(module, nn.MultiheadAttention)):  # calls out_proj unseen
            if id(weight) in names:
                convolution = isinstance(module, nn.modules.conv._ConvNd)
                uses[names[id(weight)]] += out.numel() // (module.out_channels if convolution else out.shape[-1])

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, PRUNED_LAYERS)]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return uses
