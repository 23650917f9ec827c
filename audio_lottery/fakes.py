"""What torch.compile must be told of the compiled operators of lottery.py: the shapes that come out of them."""

import torch

from lottery import _check_blocks, _check_tensors, ops

if ops.compiled:
    torch.library.register_fake("audio_lottery::hold_ticket_", _check_tensors)

    @torch.library.register_fake("audio_lottery::global_magnitude_masks")
    def fake_masks(weights, masks, keep):
        _check_tensors(weights, [], masks)
        return [mask.new_empty(mask.shape) for mask in masks]

    @torch.library.register_fake("audio_lottery::block_norms")
    def fake_norms(weights, rows, columns):
        _check_blocks(weights, rows, columns)
        matrices = [weight.flatten(1) for weight in weights]
        shapes = [(-(-matrix.size(0) // rows), -(-matrix.size(1) // columns)) for matrix in matrices]
        return [weight.new_empty(shape, dtype=torch.float64) for weight, shape in zip(weights, shapes)]
