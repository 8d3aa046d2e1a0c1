"""The source side of the NIXL plane: one agent for all readers. It writes into their slots.

Whatever a reader asks for is answered only when its bytes have moved (DONE), and only then is it looked up whether the
slots still were what the reader took them for. A reader has a bounded number of requests on the way, most urgent first,
so all that come are begun at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from headway.v1 import transfer_pb2 as pb
from services.kvstore.device_memory import DeviceMemory
from services.kvstore.memory import SlabMemory
from services.kvstore.planes.nixl_agent import DONE, MOVING, Agent, AgentThread, NixlError, Remote, sentence

if TYPE_CHECKING:
    from services.kvstore.readers import Reader

log = logging.getLogger(__name__)

CLOSE_S = 2.0


@dataclass(slots=True)
class _Moving:
    """A request on its way."""

    wanted: pb.MoveNixl
    transfer: int
    checksums: list[int]


@dataclass(slots=True)
class _Link:
    """A reader's agent, and what is on its way there by request_id."""

    remote: Remote
    moving: dict[int, _Moving] = field(default_factory=dict)


class NixlSource:
    """Used by the event loop; its agent is made for the first reader, when the slab has been laid out."""

    def __init__(self, memory: SlabMemory | DeviceMemory, name: str) -> None:
        self._memory = memory
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._thread: AgentThread | None = None
        self._readers: set[Reader] = set()
        # Of the thread's agent, by reader.
        self._links: dict[Reader, _Link] = {}

    def heard(self, request: pb.ConnectRequest, reader: Reader) -> None:
        """One of the messages of this plane."""
        if request.HasField("open_nixl"):
            self._readers.add(reader)
            self._started().submit(lambda agent: self._open(agent, reader, request.open_nixl))
        elif request.HasField("move_nixl"):
            self._started().submit(lambda agent: self._move(agent, reader, request.move_nixl))
        else:
            self.dismiss(reader)

    def dismiss(self, reader: Reader) -> None:
        """It wants nothing more, or its stream broke."""
        self._readers.discard(reader)
        if self._thread is not None:
            self._thread.submit(lambda agent: self._part(agent, reader))

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()
            self._thread.join(CLOSE_S)

    def _started(self) -> AgentThread:
        if self._thread is None:
            self._thread = AgentThread(self._name, self._memory, self._turn, self._over)
        return self._thread

    # ------------------------------------------------------------------ in the agent's thread

    def _open(self, agent: Agent, reader: Reader, wanted: pb.OpenNixl) -> None:
        self._part(agent, reader)
        opened = pb.NixlOpened()
        try:
            self._links[reader] = _Link(agent.meet(wanted.card))
            opened.card.CopyFrom(agent.card)
        except Exception as error:
            opened.error = sentence(error)
        self._tell(reader, pb.ConnectResponse(nixl_opened=opened))

    def _move(self, agent: Agent, reader: Reader, wanted: pb.MoveNixl) -> None:
        link = self._links.get(reader)
        try:
            if link is None:
                raise NixlError("there is no agent of this reader")
            self._check(wanted, link)
            transfer = agent.write(wanted.slots, link.remote, wanted.targets)
        except Exception as error:
            self._answer(reader, pb.NixlMoved(request_id=wanted.request_id, error=sentence(error)))
            return
        # While the bytes are on their way.
        checksums = [self._memory.checksum(slot) for slot in wanted.slots] if wanted.checksum else []
        link.moving[wanted.request_id] = _Moving(wanted, transfer, checksums)

    def _check(self, wanted: pb.MoveNixl, link: _Link) -> None:
        """Raises NixlError on slots that are none."""
        counts = {len(wanted.slots), len(wanted.generations), len(wanted.targets)}
        if counts == {0} or len(counts) > 1 or not all(self._memory.has(slot) for slot in wanted.slots):
            raise NixlError("each slot must be one of this slab, and have a generation and a target")

    def _turn(self, agent: Agent) -> bool:
        """See what is done; whether anything is still on its way."""
        for reader, link in self._links.items():
            for number, moving in list(link.moving.items()):
                state, error = _state(agent, moving.transfer)
                if state != MOVING:
                    del link.moving[number]
                    self._moved(reader, moving, error if state != DONE else "")
                    with contextlib.suppress(Exception):
                        agent.end(moving.transfer)
        return any(link.moving for link in self._links.values())

    def _moved(self, reader: Reader, moving: _Moving, error: str) -> None:
        wanted = moving.wanted
        moved = pb.NixlMoved(request_id=wanted.request_id, checksums=moving.checksums, error=error)
        # After the bytes were read: had a slot been given out anew before, its generation would tell.
        moved.current.extend(
            self._memory.current(slot, generation)
            for slot, generation in zip(wanted.slots, wanted.generations, strict=True)
        )
        self._answer(reader, moved)

    def _answer(self, reader: Reader, moved: pb.NixlMoved) -> None:
        self._tell(reader, pb.ConnectResponse(nixl_moved=moved))

    def _tell(self, reader: Reader, response: pb.ConnectResponse) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(reader.put, response)

    def _part(self, agent: Agent, reader: Reader) -> None:
        """Cancel what is on its way, as far as possible: the reader protects its slots by itself."""
        link = self._links.pop(reader, None)
        if link is None:
            return
        for moving in link.moving.values():
            with contextlib.suppress(Exception):
                agent.end(moving.transfer)
        try:
            agent.part(link.remote)
        except Exception as error:
            log.info("peer=%s event=nixl_not_parted reason=%s", reader.joiner, sentence(error))

    def _over(self, reason: str) -> None:
        """The agent is no more. Without a reason the store ends; else the next reader gets a new one."""
        if reason:
            log.warning("event=nixl_agent_failed reason=%s", reason)
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._lost, reason)

    def _lost(self, reason: str) -> None:
        """In the event loop again."""
        self._links, self._thread = {}, None
        for reader in self._readers:
            reader.put(pb.ConnectResponse(nixl_opened=pb.NixlOpened(error=reason)))
        self._readers.clear()


def _state(agent: Agent, transfer: int) -> tuple[str, str]:
    """As `Agent.state`, and what went wrong."""
    try:
        return agent.state(transfer), "the transfer failed"
    except Exception as error:
        return "ERR", sentence(error)
