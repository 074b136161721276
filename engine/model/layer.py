"""One decoder layer, for prefill and for decoding: everything but attention, which is passed in.

Source: Qwen2 as published in transformers' `Qwen2ForCausalLM`.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from torch import Tensor

from ...kernels import elementwise
from ...kernels.narrow import Narrowing, Rows
from ..parallel.aside import Pending
from ..parallel.mesh import Mesh
from ..stages import UNTIMED, Stages
from .linear import Linear
from .rows import ALL_ROWS, RowSteps, finished

Queries = TypeVar("Queries")


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """Root mean square norm (arXiv 1910.07467), computed in float32.

    What comes out is `narrowing`'s, as the product that follows takes it.
    """

    weight: Tensor
    epsilon: float
    narrowing: Narrowing | None = None

    def __call__(self, hidden: Tensor) -> Rows:
        """[n, hidden] to the same, normed."""
        if self.narrowing is None:
            return elementwise.rms_norm(hidden, self.weight, self.epsilon)
        return elementwise.narrow_rms_norm(hidden, self.weight, self.epsilon, self.narrowing)

    def add(self, more: Tensor, residual: Tensor) -> tuple[Rows, Tensor]:
        """Norm of residual + more, and that sum, each [n, hidden]."""
        if self.narrowing is None:
            return elementwise.add_rms_norm(more, residual, self.weight, self.epsilon)
        return elementwise.narrow_add_rms_norm(
            more, residual, self.weight, self.epsilon, self.narrowing
        )


class Attention(ABC, Generic[Queries]):
    """Attention of the rows of one forward pass; knows where K and V of all tokens lie.

    In two steps, so that hidden states are let go of before attention takes its memory.
    """

    @abstractmethod
    def write(self, layer: "Layer", normed: Rows) -> Queries:
        """Project rows, and put their K and V where `attend` finds them.

        Args:
            normed: hidden states after the layer's first norm, [n, hidden].

        Returns:
            whatever `attend` needs.
        """

    @abstractmethod
    def attend(self, layer: "Layer", queries: Queries) -> Tensor:
        """Attend to all tokens up to each row's own: [n, heads, d] of this rank's heads."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One decoder layer's weights on this rank, and what they do to hidden states.

    Those come as a pair: the residual stream, and that normed for what is next. `next_norm` is of
    what follows: the next layer's first norm, or the model's last.
    """

    number: int
    mesh: Mesh
    head_dim: int
    num_heads: int
    qkv: Linear  # outputs (heads + 2 * kv_heads) * d: queries, keys, values
    output: Linear
    mlp_norm: RMSNorm
    gate_up: Linear  # outputs 2 * intermediate: gate, then up
    down: Linear
    next_norm: RMSNorm

    def forward(
        self,
        hidden: list[Rows],
        attention: Attention[Queries],
        steps: RowSteps = ALL_ROWS,
        stages: Stages = UNTIMED,
    ) -> None:
        """Put what comes out of the layer in place of what goes in.

        The list is emptied at once, so that nothing outlives its use.

        Args:
            hidden: [normed, residual], each [n, hidden]; the residual is a tensor.
            steps: which rows go through the MLP at once.
        """
        residual = hidden.pop()
        assert isinstance(residual, Tensor)
        queries = attention.write(self, hidden.pop())
        attended = attention.attend(self, queries)
        del queries
        if self.mesh.tensor_parallel == 1:
            hidden += steps.map(
                lambda rows: finished(self._finish(attended[rows], residual[rows], stages))
            )
        else:
            hidden += steps.map_in_turns(
                lambda rows: self._finish(attended[rows], residual[rows], stages)
            )

    def queries(self, normed: Rows) -> Tensor:
        """[n, hidden] after the first norm to [n, heads, d], not rotated."""
        return self._heads(normed, slice(0, self.num_heads * self.head_dim))

    def keys_values(self, normed: Rows) -> tuple[Tensor, Tensor]:
        """[n, hidden] after the first norm to K and V, each [n, kv_heads, d], not rotated.

        They are views of one tensor, with rows apart.
        """
        k, v = self._heads(normed, slice(self.num_heads * self.head_dim, None)).chunk(2, 1)
        return k, v

    def project(self, normed: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """[n, hidden] after the first norm to q [n, heads, d], k and v [n, kv_heads, d].

        They are views of one tensor, with rows apart.
        """
        heads = self._heads(normed, slice(None))
        kv_heads = (heads.shape[1] - self.num_heads) // 2
        q, k, v = heads.split_with_sizes((self.num_heads, kv_heads, kv_heads), 1)
        return q, k, v

    def for_one_row(self) -> "Layer":
        """The same weights, multiplied with one row only; see `Linear.for_one_row`."""
        return replace(
            self,
            qkv=self.qkv.for_one_row(),
            output=self.output.for_one_row(),
            gate_up=self.gate_up.for_one_row(),
            down=self.down.for_one_row(),
        )

    def _heads(self, normed: Rows, outputs: slice) -> Tensor:
        """Some outputs of the first product, as heads: [n, heads, d]."""
        return self.qkv.rows(outputs)(normed).unflatten(-1, (-1, self.head_dim))

    def _finish(
        self, attended: Tensor, residual: Tensor, stages: Stages
    ) -> Generator[None, None, tuple[Rows, Tensor]]:
        """Output projection and MLP, with their residuals.

        Yields where it would wait for other ranks: other rows are computed meanwhile.

        Args:
            attended: this rank's heads, [n, heads, d].
            residual: what went into the layer, not normed, [n, hidden].

        Returns:
            Hidden states [n, hidden], normed by `next_norm`; and as they are, the new residual.
        """
        with stages.time("linear"):
            projected = self.output(attended.flatten(1))
        del attended
        summed = self._begin_sum(projected, stages)
        del projected
        yield
        normed, residual = self._add(summed, residual, self.mlp_norm, stages)
        # What is not needed any more is let go of at once: gate and up are the widest there is.
        del summed
        with stages.time("linear"):
            gate_up = self.gate_up(normed)
        del normed
        with stages.time("elementwise"):
            activated = self._activated(gate_up)
        del gate_up
        with stages.time("linear"):
            down = self.down(activated)
        del activated
        summed = self._begin_sum(down, stages)
        del down
        yield
        return self._add(summed, residual, self.next_norm, stages)

    def _begin_sum(self, partial: Tensor, stages: Stages) -> Pending[Tensor]:
        """Sum a product over the tensor ranks, beside computing."""
        if self.mesh.tensor_parallel == 1:
            return Pending(partial)
        with stages.time("communication"):
            return self.mesh.begin_sum_over_tensor_ranks(partial)

    def _activated(self, gate_up: Tensor) -> Rows:
        """What the last product takes."""
        narrowing = self.down.takes
        if narrowing is None:
            return elementwise.swiglu(gate_up)
        return elementwise.narrow_swiglu(gate_up, narrowing)

    def _add(
        self, summed: Pending[Tensor], residual: Tensor, norm: RMSNorm, stages: Stages
    ) -> tuple[Rows, Tensor]:
        """Add a product to the residual, and norm that."""
        if self.mesh.tensor_parallel > 1:
            with stages.time("communication"):
                summed.wait()
        with stages.time("elementwise"):
            return norm.add(summed.result, residual)
