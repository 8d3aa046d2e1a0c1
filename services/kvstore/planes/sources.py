"""The source sides of the planes that a kvstore serves; the gRPC plane needs none."""

from __future__ import annotations

from dataclasses import dataclass

from services.kvstore.config import KvStoreConfig
from services.kvstore.device_memory import DeviceMemory
from services.kvstore.memory import Memory, SlabMemory
from services.kvstore.planes.nixl_source import NixlSource
from services.kvstore.planes.peer_source import PeerSource
from services.kvstore.planes.socket_source import SocketSource
from services.kvstore.readers import Reader


@dataclass(frozen=True)
class Sources:
    """None where a plane is switched off."""

    socket: SocketSource | None = None
    nixl: NixlSource | None = None
    peer: PeerSource | None = None

    def dismiss(self, reader: Reader) -> None:
        """The reader is gone: nothing moves to it any more."""
        if self.socket is not None:
            self.socket.dismiss(reader)
        if self.nixl is not None:
            self.nixl.dismiss(reader)

    def close(self) -> None:
        """May take a while: not for an event loop."""
        for source in (self.socket, self.nixl, self.peer):
            if source is not None:
                source.close()


def open_sources(config: KvStoreConfig, memory: Memory) -> Sources:
    """Raises HeadwayError when the port for transfers is taken."""
    socket = nixl = peer = None
    if "socket" in config.planes:
        socket = SocketSource(memory, config.transfer_host, config.transfer_timeout_s)
        socket.start(config.transfer_port)
    if "nixl" in config.planes and isinstance(memory, SlabMemory | DeviceMemory):
        nixl = NixlSource(memory, config.node_id)
    if "peer" in config.planes and isinstance(memory, DeviceMemory):
        peer = PeerSource(memory)
    return Sources(socket, nixl, peer)
