"""TransferService: what other nodes' kvstores call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc

from headway.runtime.convert import kv_format_from_proto
from headway.runtime.errors import HeadwayError, abort
from headway.v1 import transfer_pb2 as pb
from headway.v1 import transfer_pb2_grpc
from services.kvstore.node import Node
from services.kvstore.planes.grpc_plane import pieces
from services.kvstore.planes.sources import Sources
from services.kvstore.readers import Reader

log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[pb.ConnectRequest, pb.ConnectResponse]
ReadContext = grpc.aio.ServicerContext[pb.ReadBlocksRequest, pb.ReadBlocksResponse]


def add_transfers(server: grpc.aio.Server, servicer: TransferServicer) -> None:
    """As the generated function does, but ReadBlocks writes its messages by itself."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Connect": grpc.stream_stream_rpc_method_handler(
            servicer.Connect, pb.ConnectRequest.FromString, pb.ConnectResponse.SerializeToString
        ),
        "ReadBlocks": grpc.unary_stream_rpc_method_handler(servicer.ReadBlocks, pb.ReadBlocksRequest.FromString),
    }
    name = pb.DESCRIPTOR.services_by_name["TransferService"].full_name
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))


class TransferServicer(transfer_pb2_grpc.TransferServiceServicer):
    """`serve_bytes`: whether the gRPC plane is on."""

    def __init__(self, node: Node, sources: Sources, *, serve_bytes: bool) -> None:
        self._node = node
        self._sources = sources
        self._serve_bytes = serve_bytes

    async def Connect(
        self, request_iterator: AsyncIterator[pb.ConnectRequest], context: Context
    ) -> AsyncIterator[pb.ConnectResponse]:
        requests = aiter(request_iterator)
        reader = await self._hello(requests, context)
        node = self._node
        node.readers[reader.key] = reader
        reading = asyncio.create_task(self._read(requests, reader))
        try:
            secret = reader.secret if self._serve_bytes else b""
            yield pb.ConnectResponse(
                welcome=pb.PeerWelcome(node_id=node.config.node_id, epoch=node.epoch, secret=secret)
            )
            while not (reading.done() and not reader.responses):
                await reader.wake.wait()
                reader.wake.clear()
                responses, reader.responses = reader.responses, []
                for response in responses:
                    yield response
        finally:
            reading.cancel()
            del node.readers[reader.key]
            reader.close()
            node.settle()
            self._sources.dismiss(reader)

    async def _hello(self, requests: AsyncIterator[pb.ConnectRequest], context: Context) -> Reader:
        first = await anext(requests, None)
        if first is None or not first.HasField("hello") or not first.hello.node_id:
            await abort(context, HeadwayError(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello"))
        assert first is not None
        theirs, ours = kv_format_from_proto(first.hello.kv_format), self._node.kv_format
        if theirs != ours:
            message = (
                f"node {first.hello.node_id} has the KV format {theirs}, node {self._node.config.node_id} has {ours}: "
                "they share no blocks"
            )
            await abort(context, HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, message))
        return Reader(self._node, first.hello.node_id)

    async def _read(self, requests: AsyncIterator[pb.ConnectRequest], reader: Reader) -> None:
        try:
            async for request in requests:
                kind = request.WhichOneof("message")
                if kind == "pin":
                    reader.pin(request.pin)
                elif kind == "follow":
                    reader.follow(request.follow)
                elif kind == "release":
                    reader.release(request.release.pull_id)
                elif kind == "open_socket":
                    self._open_socket(request.open_socket, reader)
                elif kind in ("open_nixl", "move_nixl", "close_nixl"):
                    self._to_nixl(request, reader)
                elif kind in ("open_peer", "check"):
                    self._to_peer(request, reader)
                self._node.settle()
        except Exception:
            log.exception("peer=%s event=connect_failed", reader.joiner)
        finally:
            reader.wake.set()

    def _open_socket(self, request: pb.OpenSocket, reader: Reader) -> None:
        opened = pb.SocketOpened(request_id=request.request_id)
        if (sockets := self._sources.socket) is not None:
            opened.port, opened.secret = sockets.port, sockets.admit(reader)
        reader.put(pb.ConnectResponse(socket=opened))

    def _to_nixl(self, request: pb.ConnectRequest, reader: Reader) -> None:
        if (nixl := self._sources.nixl) is not None:
            nixl.heard(request, reader)
        elif request.HasField("open_nixl"):
            refused = pb.NixlOpened(error="this node does not serve the plane nixl")
            reader.put(pb.ConnectResponse(nixl_opened=refused))

    def _to_peer(self, request: pb.ConnectRequest, reader: Reader) -> None:
        if (peer := self._sources.peer) is not None:
            loop = asyncio.get_running_loop()

            def answer(response: pb.ConnectResponse) -> None:
                # At the very end the loop may be gone before the thread.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(reader.put, response)

            peer.heard(request, answer)
        elif request.HasField("open_peer"):
            refused = pb.PeerOpened(error="this node does not serve the plane peer")
            reader.put(pb.ConnectResponse(peer_opened=refused))

    async def ReadBlocks(  # type: ignore[override]
        self, request: pb.ReadBlocksRequest, context: ReadContext
    ) -> AsyncIterator[bytes]:
        """Messages as bytes: see `planes.pieces`."""
        readers = self._node.readers.values()
        if not self._serve_bytes or not any(reader.secret == request.secret for reader in readers):
            message = "these blocks are given only to a kvstore that is connected (Connect) and shows its secret"
            await abort(context, HeadwayError(grpc.StatusCode.PERMISSION_DENIED, message))
        memory = self._node.memory
        if len(request.slots) != len(request.generations) or not all(memory.has(slot) for slot in request.slots):
            message = "each slot must be one of this slab, and have a generation"
            await abort(context, HeadwayError(grpc.StatusCode.INVALID_ARGUMENT, message))
        async for piece in pieces(memory, request):
            yield piece
