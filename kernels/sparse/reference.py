"""The definition of what vertical-slash selection chooses and shows, in float64 and O(n²).

It takes full score matrices, so that it shares nothing with the versions that never have one.
"""

import torch
from torch import Tensor

BLOCK = 128


def sums(last_logits: Tensor, first_position: int) -> tuple[Tensor, Tensor]:
    """Attention of the last rows summed along columns and along bands of 128 diagonals.

    Args:
        last_logits: [rows, keys], -inf where a key comes later; row t is at first_position + t.

    Returns:
        columns [keys] and bands [ceil(keys / 128)], float64.
    """
    attention = last_logits.double().softmax(-1)
    rows, keys = attention.shape
    bands = torch.zeros(-(-keys // BLOCK), dtype=torch.float64)
    for row in range(rows):
        for key in range(first_position + row + 1):
            bands[(first_position + row - key) // BLOCK] += attention[row, key]
    return attention.sum(0), bands


def visible(verticals: set[int], bands: set[int], length: int) -> Tensor:
    """bool [length, length]: which keys each query sees.

    A key is seen when its column is selected and lies in an earlier tile, or when any pair of its
    tile and the query's tile is at a distance in a selected band; never when it comes later.
    """
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query_tile in range(-(-length // BLOCK)):
        rows = slice(query_tile * BLOCK, (query_tile + 1) * BLOCK)
        for key_tile in range(query_tile + 1):
            # Distances between the two tiles lie in ((apart - 1) * 128, (apart + 1) * 128).
            apart = query_tile - key_tile
            if apart in bands or apart - 1 in bands:
                mask[rows, key_tile * BLOCK : (key_tile + 1) * BLOCK] = True
        for key in verticals:
            if key // BLOCK < query_tile:
                mask[rows, key] = True
    return mask.tril()
