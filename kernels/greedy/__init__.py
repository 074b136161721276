"""The best token of every row of logits, and its log-probability, without moving the logits."""

from torch import Tensor

from . import reference

__all__ = ["best_tokens"]


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """What greedy sampling takes from logits [n, vocab], of any floating type.

    Returns:
        tokens int32 [n], the lowest id among equals, and the natural logarithm of their
        probability, float32 [n], computed in float32. It is not finite, and the token any one of
        the vocabulary, where a row holds NaN or infinity, or nothing but -infinity: a step that
        was launched ahead looks it up before anybody has seen that.
    """
    if logits.is_cuda:
        from . import triton_greedy

        return triton_greedy.best_tokens(logits)
    return reference.best_tokens(logits)
