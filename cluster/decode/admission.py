"""Who gets pages next, when several requests wait for them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ...engine.decode.contract import DecodeEngine
from ...engine.decode.grammar import Constraint
from ...engine.errors import LongreachError, OutOfPagesError
from ...engine.fairness import Turns
from ...engine.messages import GenerationRequest
from ..tasks import forever


@dataclass(eq=False)
class _Waiting:
    request: GenerationRequest
    take: Callable[[GenerationRequest], None]
    admitted: asyncio.Future[None] = field(default_factory=asyncio.Future)


class Admission:
    """Reserves pages for one request after the other, from one task that page frees wake.

    As in prefill, shorter prompts go first, with a bound on how often one is passed (`Turns`), and
    none passes one whose turn it is.

    Args:
        engine: whose pages they are.
        turn: held by whoever uses the engine.
        patience: see `Turns`.
        changed: called when the number of waiting requests has changed.
        on_failure: called if the task ends, which it must not.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        turn: asyncio.Lock,
        patience: float,
        changed: Callable[[], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._engine, self._turn, self._changed = engine, turn, changed
        self._turns = Turns(patience)
        self._waiting: dict[str, _Waiting] = {}
        self._wake = asyncio.Event()
        self._task = forever(self._run(), on_failure)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for pages."""
        return len(self._waiting)

    async def reserve(self, request: GenerationRequest) -> None:
        """Return when a request has its pages, for a prompt that comes from prefill.

        Whoever is cancelled may have got them at that moment: `DecodeEngine.cancel` frees them.

        Raises: as `DecodeEngine.reserve`, except that it waits for pages that are not free now.
        """
        await self._wait(_Waiting(request, self._engine.reserve))

    async def admit(self, request: GenerationRequest, constraint: Constraint | None) -> None:
        """Return when a request is in the engine, which computes its prompt; as `reserve`."""
        await self._wait(_Waiting(request, partial(self._engine.admit, constraint=constraint)))

    async def _wait(self, entry: _Waiting) -> None:
        request = entry.request
        self._engine.check(request)
        name = request.request_id
        self._turns.join(name, len(request.prompt))
        self._waiting[name] = entry
        self.wake()
        try:
            await entry.admitted
        finally:
            if self._waiting.get(name) is entry:
                self._forget(name)
                self._changed()
                # Whoever is next may fit into what this one waited for.
                self.wake()

    def wake(self) -> None:
        """Pages were freed, or whose turn it is has changed."""
        self._wake.set()

    def refuse(self, request_id: str, error: LongreachError) -> None:
        """End the wait of one request, if it waits."""
        if request_id in self._waiting:
            self._settle(request_id, error)

    def refuse_all(self, error: LongreachError) -> None:
        """End everybody's wait."""
        for request_id in list(self._waiting):
            self._settle(request_id, error)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            async with self._turn:
                while self._waiting and self._admit(self._turns.order()[0]):
                    pass
            self._changed()

    def _admit(self, request_id: str) -> bool:
        """Whether a request waits no longer: it has pages, or will never get any."""
        entry = self._waiting[request_id]
        try:
            entry.take(entry.request)
        except OutOfPagesError:
            return False
        except LongreachError as error:
            self._settle(request_id, error)
            return True
        self._turns.serve(request_id, len(entry.request.prompt))
        self._settle(request_id, None)
        return True

    def _settle(self, request_id: str, error: LongreachError | None) -> None:
        admitted = self._waiting[request_id].admitted
        self._forget(request_id)
        if admitted.done():
            return  # Whoever waited was cancelled, and has not run since.
        if error is None:
            admitted.set_result(None)
        else:
            admitted.set_exception(error)

    def _forget(self, request_id: str) -> None:
        del self._waiting[request_id]
        self._turns.leave(request_id)
