"""Each kind of random draw by its name: the third number of its seed, behind the seed and an epoch, round or 0."""

import numpy as np

ORDER, DROPOUT, NOISE, TEST_NOISE, INITIAL_WEIGHTS, MASKS, SPEED = range(7)


def generator(seed: int, number: int, stream: int, *more: int) -> np.random.Generator:
    """The generator of one kind of draw. A seed's trailing 0 changes nothing: ORDER is that of [seed, number]."""
    return np.random.default_rng([seed, number, stream, *more])


def torch_seed(seed: int, number: int, stream: int, *more: int) -> int:
    """What a generator of torch's is seeded with for one kind of draw."""
    return int(generator(seed, number, stream, *more).integers(2**63))
