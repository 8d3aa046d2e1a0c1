"""The source side of the peer plane: leads other stores of this host to the slab, and tells what it was worth."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from headway.slab.host import SlabError
from headway.v1 import transfer_pb2 as pb
from services.kvstore.device_memory import DeviceMemory

log = logging.getLogger(__name__)

Answer = Callable[[pb.ConnectResponse], None]


def boot_id() -> str:
    """The same for all processes of a host, and for no other host."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class PeerSource:
    """`heard` takes the plane's messages on the event loop; its answers come from a thread, in order."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._thread = ThreadPoolExecutor(1, "transfer-peer")

    def heard(self, request: pb.ConnectRequest, answer: Answer) -> None:
        if request.HasField("open_peer"):
            self._thread.submit(lambda: answer(pb.ConnectResponse(peer_opened=self._open())))
        else:
            self._thread.submit(lambda: answer(pb.ConnectResponse(checked=self._check(request.check))))

    def close(self) -> None:
        """Other stores must have let go of the slab."""
        self._thread.shutdown()

    # ------------------------------------------------------------------ in the thread

    def _open(self) -> pb.PeerOpened:
        segment = self._memory.segment
        try:
            outer = self._memory.outer
            return pb.PeerOpened(
                kind=segment.device.module.kind,
                bus_id=segment.device.bus_id,
                host=boot_id(),
                handle=segment.handle,
                bytes=segment.size,
                probe_handle=outer.handle,
                probe_bytes=outer.size,
            )
        except SlabError as error:
            return pb.PeerOpened(error=str(error))

    def _check(self, check: pb.CheckBlocks) -> pb.BlocksChecked:
        memory, slots = self._memory, list(check.slots)
        checked = pb.BlocksChecked(request_id=check.request_id)
        if len(slots) != len(check.generations) or not all(memory.has(slot) for slot in slots):
            log.warning("event=peer_check_refused reason=slots_that_this_slab_does_not_have")
            return checked
        sums = memory.checksums(slots) if check.checksum else []
        # After the bytes were read, by the reader and here.
        checked.current.extend(memory.current(*named) for named in zip(slots, check.generations, strict=True))
        checked.checksums.extend(sums)
        return checked
