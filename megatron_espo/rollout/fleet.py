"""Several engines as one: rank 0 deals prompts out to the engines of other ranks, which may be on other machines."""

import os
import secrets
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

import torch.distributed as dist

from megatron_espo.rollout.engine import Engine
from megatron_espo.rollout.lifecycle import EngineError
from megatron_espo.types import Prompt, Rollout

_POLL_SECONDS = 0.5


class Fleet:
    """The engines of a run behind one ``generate``, on rank 0; the other owners answer from a thread of their own.

    Rank 0 listens on its own address (torchrun's ``MASTER_ADDR``) while the others connect, and no longer; both sides prove that they know a
    key which rank 0 draws and the process group carries. Weight syncs do not pass here: each owner's engine gets them from its own process.

    Args:
        engine: this rank's engine, ``None`` on ranks without one. Whoever made it closes it.
        owners: the ranks that have one, rank 0 first.

    Collectives: with several owners, one broadcast of an object over all ranks.
    """

    def __init__(self, engine: Engine | None, owners: Sequence[int]) -> None:
        self._engine, self._others = engine, []
        if len(owners) <= 1:
            return
        box: list[Any] = [None]
        if dist.get_rank() == 0:
            key = secrets.token_bytes(32)
            with Listener((os.environ["MASTER_ADDR"], 0), backlog=len(owners), authkey=key) as listener:
                box[0] = (listener.address, key)
                dist.broadcast_object_list(box, src=0)
                connections = [listener.accept() for _ in owners[1:]]
            self._others = [_Remote(connection, connection.recv()) for connection in connections]
        else:
            dist.broadcast_object_list(box, src=0)
            if engine is not None:
                address, key = box[0]
                connection = Client(address, authkey=key)
                connection.send(dist.get_rank())
                threading.Thread(target=_serve, args=(engine, connection), daemon=True).start()

    def generate(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        *,
        seed: int | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        sampling: dict[str, Any] | None = None,
    ) -> list[list[Rollout]]:
        """:meth:`Engine.generate` with all engines: prompt ``i`` goes to engine ``i`` modulo their number. Rank 0 only.

        With a ``seed`` the responses do not depend on how many engines there are.

        Raises:
            EngineError: one of the engines failed, by its rank. What ``on_progress`` raises ends this rank's engine and interrupts the others.
        """
        count = 1 + len(self._others)
        shares = [list(prompts[i::count]) for i in range(count)]
        busy = [other for other, share in zip(self._others, shares[1:], strict=True) if share]

        def relay(finished: int, _: int) -> None:
            for other in busy:
                other.take_news()
            if on_progress is not None:
                on_progress(finished + sum(other.finished for other in busy), len(prompts) * group_size)

        try:
            for other, share in zip(busy, shares[1:], strict=False):
                other.begin((share, group_size, seed, sampling))
            own = self._engine.generate(shares[0], group_size, seed=seed, on_progress=relay, sampling=sampling)
            relay(len(shares[0]) * group_size, 0)
            while waiting := [other.connection for other in busy if other.answer is None]:
                wait(waiting, _POLL_SECONDS)
                relay(len(shares[0]) * group_size, 0)
        finally:
            for other in busy:
                other.interrupt()
        groups: list[Any] = [None] * len(prompts)
        for i, found in enumerate([own, *(other.answer for other in busy)]):
            groups[i::count] = found
        return groups

    def close(self) -> None:
        """End the conversations; the threads of the other owners end with them."""
        for other in self._others:
            other.connection.close()


class _Remote:
    """Rank 0's end of the conversation with another owner.

    Attributes:
        finished: responses of the request under way.
        answer: its groups of rollouts; ``None`` until they have come.
    """

    def __init__(self, connection: Connection, rank: int) -> None:
        self.connection, self._rank = connection, rank
        self.finished, self.answer, self._waits = 0, None, False

    def begin(self, request: tuple) -> None:
        self.finished, self.answer, self._waits = 0, None, True
        self._guarded(self.connection.send, request)

    def take_news(self) -> None:
        """Read what has come. EngineError: the engine has failed."""
        while self._waits and self._guarded(self.connection.poll):
            self._receive()

    def interrupt(self) -> None:
        """Nothing is under way afterwards."""
        if self._waits:
            try:
                self.connection.send(None)
                while self._waits:
                    self._receive()
            except (EngineError, OSError):
                pass  # whatever interrupted the request is told instead

    def _receive(self) -> None:
        kind, payload = self._guarded(self.connection.recv)
        if kind == "progress":
            self.finished = payload
            return
        self._waits = False
        if kind == "error":
            raise EngineError(f"the engine of rank {self._rank}: {payload}")
        self.answer, self.finished = payload, sum(map(len, payload))

    def _guarded(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return call(*args)
        except (EOFError, OSError):
            self._waits = False
            raise EngineError(f"rank {self._rank}, which has an engine, has died") from None


class _Interrupted(Exception):
    """Rank 0 does not want the answer any more."""


def _serve(engine: Engine, connection: Connection) -> None:
    """Answer rank 0's requests until it closes the conversation."""

    def report(finished: int, _: int) -> None:
        connection.send(("progress", finished))
        if connection.poll():
            raise _Interrupted(connection.recv())

    while True:
        try:
            request = connection.recv()
            if request is None:
                continue  # it had been answered already
            prompts, group_size, seed, sampling = request
            try:
                groups = engine.generate(prompts, group_size, seed=seed, on_progress=report, sampling=sampling)
                answer = ("groups", groups)
            except (EOFError, OSError):
                raise
            except Exception as error:
                answer = ("error", f"{type(error).__name__}: {error}" if not isinstance(error, EngineError) else str(error))
            connection.send(answer)
        except (EOFError, OSError):
            return
