"""From a model's name to its files: a checkpoint folder, the bundled model, or a shape.

A shape is a real model's sizes and budgets with random weights: it costs what the model costs, and
says nothing that makes sense. Read without torch, which those who only check a file need not load.
"""

from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from .pocket import CHECKPOINT
from .shapes import known_shapes

POCKET = "pocket"
RANDOM = "random/"


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's parts lie.

    `folder` has the configuration, the budgets and, unless they are `random`, the weights.
    """

    folder: Path
    tokenizer_folder: Path
    random: bool = False

    @classmethod
    def of(cls, name: str) -> "ModelFiles":
        """Of a checkpoint folder, of "pocket", or of "random/" and a shape.

        A random model has the bundled model's byte-level tokenizer: its own is not at hand, and
        the ids lie within its vocabulary.

        Raises:
            CheckpointError: no shape of that name.
        """
        if name == POCKET:
            return cls(CHECKPOINT, CHECKPOINT)
        if not name.startswith(RANDOM):
            return cls(Path(name), Path(name))
        shapes = known_shapes()
        folder = shapes.get(name.removeprefix(RANDOM))
        if folder is None:
            raise CheckpointError(
                f"there is no model {name}; take one of "
                f"{', '.join(RANDOM + shape for shape in shapes)}"
            )
        return cls(folder, CHECKPOINT, random=True)
