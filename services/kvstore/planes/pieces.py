"""ReadBlocksResponse to and from bytes without the copies that protobuf would make of a block's bytes.

The wire format is protobuf's own; only the way to it is short: one copy out of the slab, one into it.
"""

from __future__ import annotations

from headway.v1.transfer_pb2 import ReadBlocksResponse

_DATA = ReadBlocksResponse.DATA_FIELD_NUMBER << 3 | 2
_VARINT, _BYTES = 0, 2
_FIELDS = {field.number: field.name for field in ReadBlocksResponse.DESCRIPTOR.fields}


def pack_piece(meta: ReadBlocksResponse, data: memoryview) -> bytes:
    """`meta` with these data."""
    return b"".join((meta.SerializeToString(), bytes([_DATA]), _varint(len(data)), data))


def unpack_piece(message: bytes) -> tuple[ReadBlocksResponse, memoryview]:
    """What is known of the piece, and a view of its data. ValueError on bytes that are no such message."""
    view, at, data = memoryview(message), 0, memoryview(b"")
    meta = ReadBlocksResponse()
    while at < len(view):
        tag, at = _read_varint(view, at)
        value, at = _read_varint(view, at)
        if tag == _DATA:
            data = view[at : at + value]
            if len(data) < value:
                raise ValueError("the message was cut off")
            at += value
        elif tag & 7 == _VARINT and tag >> 3 in _FIELDS:
            setattr(meta, _FIELDS[tag >> 3], bool(value) if _FIELDS[tag >> 3] == "current" else value)
        else:
            raise ValueError(f"the message has an unknown field {tag >> 3}")
    return meta, data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(view) and shift < 70:
        byte = view[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("the message was cut off")
