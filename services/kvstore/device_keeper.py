"""The slab on a device: nothing of it outlives the kvstore, so there is nothing to restart from."""

from __future__ import annotations

import logging

from headway.core.model import KvFormat
from headway.core.records import ForgetfulRecords, Records
from headway.slab.device import Device, DeviceSegment
from headway.slab.host import SHM, slot_stride
from headway.slab.metadata import Metadata
from services.kvstore.restart import FormerWorker

log = logging.getLogger(__name__)


class DeviceKeeper:
    """As restart.Keeper, for a device. A worker of a former kvstore exits by itself and cannot reach this slab."""

    def __init__(self, name: str, device: Device, size: int) -> None:
        """Raises SlabError."""
        # For its lock: the name stands for the slab and for its socket, whatever memory it is.
        self._metadata = Metadata(name)
        # A killed kvstore's slab in host memory, which nobody would look for any more.
        (SHM / name).unlink(missing_ok=True)
        try:
            self.segment = DeviceSegment(device, size)
        except BaseException:
            self._metadata.remove()
            raise
        free, total = device.module.memory(device.index)
        log.info(
            "event=device_slab device=%s name=%r slab_bytes=%d left_for_weights_bytes=%d of_bytes=%d",
            device, device.module.name(device.index), size, free, total,
        )  # fmt: skip

    def lay_out(self, kv_format: KvFormat) -> Records:
        """Records of a slab with this format, all slots free."""
        return ForgetfulRecords(self.segment.size // slot_stride(kv_format.slot_bytes))

    def keep(self, worker: FormerWorker) -> None:
        """Nobody asks for it later."""

    def forget(self, incarnation: str) -> None:
        """Nobody asked for it."""

    def remove(self) -> None:
        """Workers must have let go of the slab: what they read after this is undefined."""
        self.segment.remove()
        self._metadata.remove()
