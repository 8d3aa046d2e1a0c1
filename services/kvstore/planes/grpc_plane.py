"""The gRPC plane: block bytes as messages, over whatever connection gRPC makes. Works wherever control does."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from headway.v1 import transfer_pb2 as pb
from services.kvstore.memory import Memory
from services.kvstore.planes.contract import Checksums, Copied, Move, PlaneError, Urgency, digests, verdict
from services.kvstore.planes.pieces import pack_piece, unpack_piece

log = logging.getLogger(__name__)

# gRPC moves messages of 368 to 737 KB fastest.
MESSAGE_BYTES = 737_280
# Of one call: what is urgent waits for at most one of them.
CALL_BYTES = 16 << 20
READ_BLOCKS = "/headway.v1.TransferService/ReadBlocks"


class GrpcPlane:
    """Reads from one peer, one call at a time, first come first served: a fallback knows no urgency."""

    name = "grpc"

    def __init__(self, memory: Memory, checksums: Checksums, timeout_s: float) -> None:
        self._memory = memory
        self._checksums = checksums
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._batch = max(1, CALL_BYTES // max(1, memory.slot_bytes))
        self._closed = False
        self._read_blocks: Any = None
        self._secret = b""

    def open(self, channel: grpc.aio.Channel, secret: bytes) -> None:
        """`secret` is that of the Connect stream. Raises PlaneError when there is none."""
        if not secret:
            raise PlaneError("the peer gave no secret for reading")
        self._read_blocks = channel.unary_stream(READ_BLOCKS, pb.ReadBlocksRequest.SerializeToString)
        self._secret = secret

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
        call = self._read_blocks(request)
        try:
            # A task of its own would go on writing; this loop stops with its caller.
            for index, move in enumerate(moves):
                copied.append(await self._read_block(call, index, move.slot, checked=request.checksum))
        except (grpc.aio.AioRpcError, TimeoutError, ValueError, EOFError) as error:
            log.info("event=plane_closed plane=grpc reason=%s", repr(error))
            self._closed = True
        finally:
            call.cancel()
        return copied + [Copied.MISSING] * (len(moves) - len(copied))

    async def _read_block(self, call: Any, index: int, slot: int, *, checked: bool) -> Copied:
        """Blocks come in order, each in pieces from its beginning on, and end with a piece that is not current.

        Raises EOFError when the call ends before, ValueError on anything else than this block's pieces.
        """
        with contextlib.closing(self._memory.incoming([slot])) as landing:
            (view,) = next(landing)
            end = 0
            while end < len(view):
                async with asyncio.timeout(self._timeout_s):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    raise EOFError("the call ended in the middle of a block")
                piece, data = unpack_piece(message)
                if not piece.current:
                    return Copied.STALE
                if (piece.index, piece.offset) != (index, end) or not data:
                    raise ValueError("a piece of another block came")
                end += len(data)
                view[piece.offset : end] = data
            copied = verdict(view, current=True, checksum=piece.checksum if checked else None)
            # On a device, only now does it go into its slot.
            next(landing, None)
        return copied

    def close(self) -> None:
        self._closed = True


async def pieces(memory: Memory, request: pb.ReadBlocksRequest) -> AsyncIterator[bytes]:
    """The source side: the bytes of the slots asked for, as messages. One that is not current ends a stale block."""
    for index, (slot, generation) in enumerate(zip(request.slots, request.generations, strict=True)):
        with contextlib.closing(memory.outgoing([slot])) as gathered:
            (view,) = next(gathered)
            checksum = digests([view])[0] if request.checksum else 0
            for offset in range(0, len(view), MESSAGE_BYTES):
                meta = pb.ReadBlocksResponse(index=index, offset=offset, checksum=checksum, current=True)
                piece = pack_piece(meta, view[offset : offset + MESSAGE_BYTES])
                # Only now, when its bytes have been copied, is it known whether they were still this block's.
                if not memory.current(slot, generation):
                    meta.current = False
                    yield pack_piece(meta, memoryview(b""))
                    break
                yield piece
