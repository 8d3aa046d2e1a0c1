"""The short way to and from ReadBlocksResponse is protobuf's own format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.v1.transfer_pb2 import ReadBlocksResponse
from services.kvstore.planes.pieces import pack_piece, unpack_piece

PIECES = st.builds(
    ReadBlocksResponse,
    index=st.integers(0, 2**32 - 1),
    offset=st.integers(0, 2**32 - 1),
    data=st.binary(max_size=500),
    current=st.booleans(),
    checksum=st.integers(0, 2**64 - 1),
)


def apart(piece: ReadBlocksResponse) -> tuple[ReadBlocksResponse, bytes]:
    meta = ReadBlocksResponse()
    meta.CopyFrom(piece)
    meta.ClearField("data")
    return meta, piece.data


@given(PIECES)
def test_protobuf_reads_what_is_packed(piece: ReadBlocksResponse) -> None:
    meta, data = apart(piece)
    assert ReadBlocksResponse.FromString(pack_piece(meta, memoryview(data))) == piece


@given(PIECES)
def test_what_protobuf_writes_is_unpacked(piece: ReadBlocksResponse) -> None:
    meta, data = unpack_piece(piece.SerializeToString())
    assert (meta, bytes(data)) == apart(piece)


@given(PIECES, st.data())
def test_what_was_cut_off_is_refused_or_has_less(piece: ReadBlocksResponse, data: st.DataObject) -> None:
    whole = piece.SerializeToString()
    try:
        meta, content = unpack_piece(whole[: data.draw(st.integers(0, max(0, len(whole) - 1)))])
    except ValueError:
        return
    assert not whole or (meta, bytes(content)) != apart(piece)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown field 15"):
        unpack_piece(bytes([15 << 3, 1]))
