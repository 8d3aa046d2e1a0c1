"""How a worker comes to see the slab: host memory by its descriptor, a device's memory by its handle."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from headway.engine.contract import SlabArray
from headway.runtime.errors import HeadwayError
from headway.slab.descriptor import fetch_descriptor, fetch_handle
from headway.slab.device import Device, DeviceError, DeviceMapping
from headway.slab.host import map_descriptor
from headway.v1 import kvstore_pb2


@dataclass(frozen=True, slots=True)
class Mapped:
    """`view`: uint8 [slots, slot_stride]. `close` only once nothing uses it any more."""

    view: SlabArray
    close: Callable[[], None]


def map_slab(welcome: kvstore_pb2.AttachWelcome, device: Device | None) -> Mapped:
    """Takes a while for a large slab. OSError where the kvstore is gone, HeadwayError where it can never work."""
    _check_place(welcome, device)
    if device is None:
        descriptor = fetch_descriptor(welcome.socket_path, welcome.secret)
        try:
            view = map_descriptor(descriptor, welcome.total_slots, welcome.slot_stride)
        finally:
            os.close(descriptor)
        # The pages go with the last view.
        return Mapped(view, lambda: None)
    handle = fetch_handle(welcome.socket_path, welcome.secret)
    try:
        mapping = DeviceMapping(device, handle, welcome.device.bytes)
    except DeviceError as error:
        raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, str(error)) from None
    return Mapped(mapping.view(welcome.total_slots, welcome.slot_stride), mapping.close)


def _check_place(welcome: kvstore_pb2.AttachWelcome, device: Device | None) -> None:
    """Slab and model must share a device: attention reads its own device's slab."""
    theirs = welcome.device if welcome.HasField("device") else None
    if theirs is None and device is None:
        return
    if theirs is not None and device is not None:
        if (theirs.kind, theirs.bus_id) == (device.module.kind, device.bus_id):
            return
        slab, worker = f"{theirs.kind} device {theirs.bus_id}", f"{device} ({device.bus_id})"
    else:
        slab = f"{theirs.kind}:{theirs.index}" if theirs is not None else "host memory"
        worker = str(device or "the CPU")
    message = (
        f"the slab of node {welcome.node_id} lies on {slab}, this worker computes on {worker}: set both --device alike"
    )
    raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, message)
