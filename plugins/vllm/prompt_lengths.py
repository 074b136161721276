"""How long the prompts of a step's sequences are, as whoever runs the model said.

vLLM also computes steps that nobody asked for: to see what memory the model takes, to capture
graphs, and where other ranks have work and this one has none. Their sequences are made up, and have
no prompts; none of their rows has a place in the KV cache. A row that has one is somebody's.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from .checks import TESTED
from .errors import UnknownPromptError
from .step_plan import Integers


def prompt_lengths(said: Integers, first_rows: Integers, slots: Tensor) -> npt.NDArray[np.int64]:
    """Of each sequence the tokens of its prompt; of one that is made up, 0 or anything else.

    Args:
        said: of sequences in their order; there may be fewer, or more.
        first_rows: [sequences + 1], where the rows of each begin.
        slots: int64 [rows or more], page * 128 + offset of each row; -1 for one without a place.

    Raises:
        UnknownPromptError: it is not known of a sequence that somebody asked for. Nothing of its
            prompt would count as such: it would be dense, at another temperature.
    """
    lengths = np.zeros(len(first_rows) - 1, dtype=np.int64)
    known = min(len(lengths), len(said))
    lengths[:known] = said[:known]
    unknown = np.flatnonzero((np.diff(first_rows) > 0) & (lengths == 0))
    if len(unknown):
        # On a GPU this waits for it, but never in a step that somebody waits for.
        has_place = (slots[: int(first_rows[-1])] >= 0).cpu().numpy()
        for sequence in unknown.tolist():
            if has_place[first_rows[sequence] : first_rows[sequence + 1]].any():
                raise UnknownPromptError(sequence, *TESTED)
    return lengths
