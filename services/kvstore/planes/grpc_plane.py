"""The gRPC plane: block bytes as messages, over whatever connection gRPC makes. Works wherever control does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from headway.v1 import transfer_pb2 as pb
from headway.v1 import transfer_pb2_grpc
from services.kvstore.memory import SlabMemory
from services.kvstore.planes.contract import Checksums, Copied, Move, PlaneError, Urgency, verdict

log = logging.getLogger(__name__)

# gRPC moves messages of 368 to 737 KB fastest.
MESSAGE_BYTES = 737_280
# Of one call: what is urgent waits for at most one of them.
CALL_BYTES = 4 << 20


class GrpcPlane:
    """Reads from one peer, one call at a time, first come first served: a fallback knows no urgency."""

    name = "grpc"

    def __init__(self, memory: SlabMemory, checksums: Checksums, timeout_s: float) -> None:
        self._memory = memory
        self._checksums = checksums
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._batch = max(1, CALL_BYTES // max(1, memory.slot_bytes))
        self._closed = False
        self._stub: Any = None
        self._secret = b""

    def open(self, channel: grpc.aio.Channel, secret: bytes) -> None:
        """`secret` is that of the Connect stream. Raises PlaneError when there is none."""
        if not secret:
            raise PlaneError("the peer gave no secret for reading")
        self._stub, self._secret = transfer_pb2_grpc.TransferServiceStub(channel), secret

    async def read(self, moves: Sequence[Move], urgency: Urgency) -> list[Copied]:
        copied: list[Copied] = []
        for at in range(0, len(moves), self._batch):
            batch = moves[at : at + self._batch]
            async with self._turn:
                copied += await self._read(batch)
            if copied[-1] is Copied.MISSING:
                break
        return copied + [Copied.MISSING] * (len(moves) - len(copied))

    async def _read(self, moves: Sequence[Move]) -> list[Copied]:
        copied: list[Copied] = []
        if self._closed:
            return [Copied.MISSING] * len(moves)
        request = pb.ReadBlocksRequest(
            secret=self._secret,
            slots=[move.source for move in moves],
            generations=[move.generation for move in moves],
            checksum=self._checksums.wanted(),
        )
        call = self._stub.ReadBlocks(request)
        try:
            # A task of its own would go on writing; this loop stops with its caller.
            while (piece := await asyncio.wait_for(call.read(), self._timeout_s)) is not grpc.aio.EOF:
                view = self._memory.view(moves[piece.index].slot)
                end = piece.offset + len(piece.data)
                view[piece.offset : end] = piece.data
                if end == len(view):
                    checksum = piece.checksum if request.checksum else None
                    copied.append(verdict(view, current=piece.current, checksum=checksum))
        except (grpc.aio.AioRpcError, TimeoutError, ValueError, IndexError) as error:
            log.info("event=plane_closed plane=grpc reason=%s", repr(error))
            self._closed = True
        finally:
            call.cancel()
        return copied + [Copied.MISSING] * (len(moves) - len(copied))

    def close(self) -> None:
        self._closed = True


async def pieces(memory: SlabMemory, request: pb.ReadBlocksRequest) -> AsyncIterator[pb.ReadBlocksResponse]:
    """The source side: the bytes of the slots asked for."""
    for index, (slot, generation) in enumerate(zip(request.slots, request.generations, strict=True)):
        view = memory.view(slot)
        checksum = memory.checksum(slot) if request.checksum else 0
        for offset in range(0, len(view), MESSAGE_BYTES):
            data = bytes(view[offset : offset + MESSAGE_BYTES])
            piece = pb.ReadBlocksResponse(index=index, offset=offset, data=data)
            if offset + len(data) == len(view):
                piece.current, piece.checksum = memory.current(slot, generation), checksum
            yield piece
