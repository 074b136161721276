"""The definition of what vertical-slash selection chooses and shows, in float64 and O(n²).

It takes full score matrices, so that it shares nothing with the versions that never have one.
"""

import torch
from torch import Tensor

BLOCK = 128


def sums(last_logits: Tensor, first_position: int) -> tuple[Tensor, Tensor]:
    """Attention of the last rows summed along columns and along diagonals.

    Args:
        last_logits: [rows, keys], -inf where a key comes later; row t is at first_position + t.

    Returns:
        columns [keys] and, by distance from query to key, diagonals [keys], float64.
    """
    attention = last_logits.double().softmax(-1)
    rows, keys = attention.shape
    diagonals = torch.zeros(keys, dtype=torch.float64)
    for row in range(rows):
        for key in range(first_position + row + 1):
            diagonals[first_position + row - key] += attention[row, key]
    return attention.sum(0), diagonals


def visible(columns: set[int], distances: set[int], length: int) -> Tensor:
    """bool [length, length]: which keys each query sees.

    A key is seen when its tile is at a listed distance from the query's tile, or when its column
    is selected and lies in an earlier tile; never when it comes later.
    """
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query_tile in range(-(-length // BLOCK)):
        rows = slice(query_tile * BLOCK, (query_tile + 1) * BLOCK)
        for distance in distances:
            first_key = (query_tile - distance) * BLOCK
            if first_key >= 0:
                mask[rows, first_key : first_key + BLOCK] = True
        earlier = [column for column in columns if column // BLOCK < query_tile]
        mask[rows, earlier] = True
    return mask.tril()
