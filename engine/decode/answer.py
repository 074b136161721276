"""What one choice of a request has said so far: its text, and whether it has ended."""

from collections.abc import Sequence
from dataclasses import replace

from ..messages import ChosenToken, Delta, SamplingParameters
from .detokenizer import Detokenizer, TokenBytes


def ending_tokens(sampling: SamplingParameters, end_ids: Sequence[int]) -> tuple[int, ...]:
    """Tokens that end an answer.

    Args:
        end_ids: of the model.
    """
    # A grammar allows an end only where the answer is whole.
    ignores_end = sampling.ignore_eos and sampling.grammar is None
    return (*(() if ignores_end else end_ids), *sampling.stop_token_ids)


class Answer:
    """Turns the tokens of a choice into deltas, in order: `num_tokens` so far, of `most` in all.

    Args:
        ends: tokens that end it; they are no part of its text.
        replayed: tokens that the client has from an earlier attempt, the first ones of the answer.
    """

    def __init__(
        self,
        choice: int,
        sampling: SamplingParameters,
        ends: Sequence[int],
        token_bytes: TokenBytes,
        replayed: Sequence[int] = (),
    ) -> None:
        self.choice, self.replayed = choice, replayed
        self.num_tokens, self.most = 0, sampling.max_tokens
        self._ends = frozenset(ends)
        self._text = Detokenizer(
            token_bytes,
            sampling.stop,
            sampling.min_tokens,
            shows_control=not sampling.skip_special_tokens,
        )

    @property
    def is_replayed(self) -> bool:
        """Whether the client has the next token already."""
        return self.num_tokens < len(self.replayed)

    def take(self, chosen: ChosenToken, is_whole: bool = False) -> Delta | None:
        """Add a token; what the client is told, which is nothing where it has the token.

        Args:
            is_whole: nothing can follow it, by the answer's grammar.
        """
        was_replayed = self.is_replayed
        delta = self._take(chosen, is_whole)
        if not was_replayed:
            return delta
        # That it has ended the client may not know yet.
        return None if delta.finish_reason is None else replace(delta, text="", tokens=())

    def cut_off(self) -> Delta:
        """It ends here, for want of room: what is still to say."""
        return Delta(self.choice, self._text.finish(), (), "length")

    def _take(self, chosen: ChosenToken, is_whole: bool) -> Delta:
        self.num_tokens += 1
        reason, text = None, ""
        if chosen.token_id in self._ends:
            reason = "stop"
        else:
            text = self._text.push(chosen.token_id)
            if self._text.stopped or is_whole:
                reason = "stop"
            elif self.num_tokens == self.most:
                reason = "length"
        if reason is not None and not self._text.stopped:
            text += self._text.finish()
        return Delta(self.choice, text, (chosen,), reason)
