"""Lab: online_softmax. Attention over keys that come tile by tile, each seen once.

    out = sum_j w_j * value_j,     w = softmax(score)

A context of 100,000 keys does not fit into the fast memory of a chip, and softmax seems to need all scores before it
can give the first weight. It does not: keep the largest score so far, the sum of exp(score - largest), and the sum of
exp(score - largest) * value. When a larger score comes, what was summed up with the old one is too large by a known
factor.

The engine does this in kernels/ops/paged_attention/kernel.py (the loop over tiles); the README beside it has the maths.
Twin in vLLM: v1/attention/ops/triton_unified_attention.py. Source: Milakov and Gimelshein, arXiv 1805.02867.
"""

import math
from collections.abc import Iterator


def attend(tiles: Iterator[tuple[list[float], list[list[float]]]], size: int) -> list[float]:
    """The `size` numbers of `out`.

    tiles: pairs (scores, values) of a few keys each: scores[j] is the score of key j, values[j] its value, `size`
        numbers. They can be read once, from front to back. At least one score is finite; a key that must not be seen
        has the score -inf, and all keys of a tile may be hidden. Scores may be large: exp(1000) is no float.

        attend(iter([([0.0, 0.0], [[1.0], [3.0]]), ([math.log(2)], [[8.0]])]), 1)  ->  [5.0]
        the weights are 1/4, 1/4 and 2/4
    """
    # --- your code
    largest = -math.inf
    total = 0.0
    out = [0.0] * size
    for scores, values in tiles:
        new_largest = max(largest, *scores)
        if new_largest == -math.inf:
            continue
        rescale = math.exp(largest - new_largest)
        largest = new_largest
        weights = [math.exp(score - largest) for score in scores]
        total = total * rescale + sum(weights)
        out = [
            out[d] * rescale + sum(weight * value[d] for weight, value in zip(weights, values, strict=True))
            for d in range(size)
        ]
    return [number / total for number in out]
    # --- end
