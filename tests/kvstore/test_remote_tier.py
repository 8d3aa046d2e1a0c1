"""The remote tier against a real server: right bytes or nothing, and nobody waits for a server that is gone."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from services.kvstore.tiers.contract import TierError
from services.kvstore.tiers.link import Link, LinkOptions
from services.kvstore.tiers.remote import BATCH_KEYS, RemoteTier
from tests.kvstore.redis_rig import Server, wait_for
from tests.kvstore.test_kvstore import rust_built
from tests.kvstore.tier_rig import DIGEST, SLOT_BYTES, body_of, key_of, put, right, slot

redis = pytest.importorskip("redis", reason="the extra [redis] is not installed")

QUICK = LinkOptions(connect_s=0.5, timeout_s=0.5, first_retry_s=0.05, last_retry_s=0.2)


def opened(url: str, digest: bytes = DIGEST, slot_bytes: int = SLOT_BYTES) -> RemoteTier:
    tier = RemoteTier.open(url, slot_bytes, digest, QUICK)
    wait_for(lambda: tier.up)
    return tier


@pytest.fixture
def tier(server: Server) -> Iterator[RemoteTier]:
    tier = opened(server.url)
    yield tier
    tier.close()


def name_of(key: bytes) -> str:
    return f"headway:{DIGEST.hex()}:{key.hex()}"


# ---------------------------------------------------------------------- what was put comes back


def test_blocks_come_back_and_a_chain_ends_where_it_is_not_there(tier: RemoteTier, server: Server) -> None:
    keys = put(tier, 1, 2, 3)
    assert right(tier, keys) == 3
    assert right(tier, [*keys[:2], key_of(9), keys[2]]) == 2
    assert tier.leading([*keys[:2], key_of(9), keys[2]]) == 2
    assert tier.leading([key_of(9), *keys]) == 0
    assert tier.get(keys, [slot()]) == 1
    counts = tier.counts()
    assert (counts.hits, counts.bytes_written, counts.bytes_read) == (6, 3 * SLOT_BYTES, 6 * SLOT_BYTES)
    assert (counts.torn, counts.errors, counts.dropped) == (0, 0, 0)
    # Nothing stays for ever.
    assert all(0 < server.client.ttl(name_of(key)) <= 24 * 3600 for key in keys)


def test_two_nodes_share_blocks_of_one_format_and_not_of_another(tier: RemoteTier, server: Server) -> None:
    keys = put(tier, 1, 2)
    other, stranger = opened(server.url), opened(server.url, b"another digest..")
    assert [right(other, keys), right(stranger, keys)] == [2, 0]
    other.close()
    stranger.close()


def test_many_blocks_go_in_bounded_batches(server: Server) -> None:
    size = 1 << 20
    tier = opened(server.url, slot_bytes=size)
    keys = [key_of(name) for name in range(11)]
    sizes: list[int] = []
    mget = redis.Redis.mget

    def counting(client: Any, names: list[bytes]) -> Any:
        sizes.append(len(names))
        return mget(client, names)

    for key in keys:
        assert tier.put(key, b"", memoryview(body_of(key, size)))
    tier.flush()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis.Redis, "mget", counting)
        views = [slot(size) for _ in keys]
        assert tier.get(keys, views) == 11
    assert sizes == [4, 4, 3]
    assert all(bytes(view) == body_of(key, size) for key, view in zip(keys, views, strict=True))
    tier.close()


def test_leading_asks_beyond_one_batch(tier: RemoteTier, server: Server) -> None:
    keys = [key_of(name) for name in range(2 * BATCH_KEYS)]
    server.client.mset({name_of(key): b"x" for key in keys[: BATCH_KEYS + 3]})
    assert tier.leading(keys) == BATCH_KEYS + 3
    assert tier.leading(keys[:BATCH_KEYS]) == BATCH_KEYS


def test_a_block_whose_slot_was_given_away_while_it_waited_is_not_sent(tier: RemoteTier, server: Server) -> None:
    assert tier.put(key_of(1), b"", memoryview(body_of(key_of(1))), lambda: False)
    tier.flush()
    assert server.client.dbsize() == 0
    assert tier.counts().dropped == 1
    assert right(tier, put(tier, 1)) == 1


# ---------------------------------------------------------------------- values that are not what they should be


@pytest.mark.parametrize("damage", ["flip", "header", "short", "long", "other", "garbage", "empty"])
def test_a_value_that_is_not_the_whole_block_is_a_miss_and_deleted(
    tier: RemoteTier, server: Server, damage: str
) -> None:
    keys = put(tier, 1, 2)
    value = bytearray(server.client.get(name_of(keys[1])))
    if damage == "flip":
        value[-1] ^= 1
    elif damage == "header":
        # The parent: nothing but the checksum vouches for it.
        value[30] ^= 1
    elif damage == "short":
        del value[-1]
    elif damage == "long":
        value += b"\0"
    elif damage == "other":
        value = bytearray(server.client.get(name_of(keys[0])))
    else:
        value = bytearray(os.urandom(len(value)) if damage == "garbage" else b"")
    server.client.set(name_of(keys[1]), bytes(value))
    assert right(tier, keys) == 1
    assert tier.counts().torn == 1
    assert not server.client.exists(name_of(keys[1]))
    assert tier.up
    put(tier, 2)
    assert right(tier, keys) == 2


def test_a_server_that_is_full_refuses_blocks_but_serves_those_it_has(
    tier: RemoteTier, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    keys = put(tier, 1)
    server.client.config_set("maxmemory", 1)
    put(tier, 2, 3)
    assert tier.up
    assert (tier.counts().errors, tier.counts().dropped) == (2, 2)
    assert sum("remote_tier_refused" in record.message for record in caplog.records) == 1
    assert right(tier, keys) == 1
    assert tier.leading([key_of(2)]) == 0


def test_a_server_that_forbids_a_command_is_not_taken_for_gone(tier: RemoteTier, server: Server) -> None:
    keys = put(tier, 1)
    server.client.execute_command("ACL", "SETUSER", "default", "-mget")
    assert tier.get(keys, [slot()]) == 0
    assert (tier.up, tier.counts().errors) == (True, 1)
    assert tier.leading(keys) == 1
    server.client.execute_command("ACL", "SETUSER", "default", "+mget")
    assert right(tier, keys) == 1


def test_more_questions_at_once_than_connections_wait_a_bounded_time(server: Server) -> None:
    link = Link(server.url, LinkOptions(timeout_s=0.05, connections=1))
    link.probe()
    started, go_on = threading.Event(), threading.Event()
    slow = threading.Thread(target=link.ask, args=(lambda _: started.set() or go_on.wait(30), None))
    slow.start()
    assert started.wait(30)
    assert link.ask(lambda client: client.ping(), False) is False
    assert link.up
    go_on.set()
    slow.join()
    assert link.ask(lambda client: client.ping(), False) is True
    link.close()


# ---------------------------------------------------------------------- servers that go


def test_a_server_that_dies_is_a_miss_at_once_and_found_again(tier: RemoteTier, server: Server) -> None:
    keys = put(tier, 1, 2)
    server.stop()
    assert tier.get(keys, [slot(), slot()]) == 0
    assert not tier.up
    asked: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis.Redis, "mget", lambda *_: asked.append(None))
        # Down, nobody is asked.
        assert [tier.get(keys, [slot(), slot()]), tier.leading(keys)] == [0, 0]
        assert not tier.put(key_of(3), b"", memoryview(body_of(key_of(3))))
    assert asked == []
    server.start()
    wait_for(lambda: tier.up)
    assert right(tier, keys) == 0
    assert right(tier, put(tier, 1, 2)) == 2


def test_a_server_that_hangs_costs_one_time_limit_and_not_more(tier: RemoteTier, server: Server) -> None:
    keys = put(tier, 1)
    server.process.send_signal(signal.SIGSTOP)
    try:
        assert tier._link._client.connection_pool.connection_kwargs["socket_timeout"] == QUICK.timeout_s
        assert tier.get(keys, [slot()]) == 0
        assert not tier.up
        assert tier.get(keys, [slot()]) == 0
    finally:
        server.process.send_signal(signal.SIGCONT)
    wait_for(lambda: tier.up)
    # The late answer to the question given up is not taken for the answer to this one.
    more = put(tier, 2, 3)
    assert right(tier, more) == 2
    assert right(tier, keys) == 1


def test_what_waits_while_the_server_dies_is_dropped_and_closing_does_not_hang(server: Server) -> None:
    tier = opened(server.url)
    started, go_on = threading.Event(), threading.Event()
    tier.put(key_of(0), b"", memoryview(body_of(key_of(0))), lambda: started.set() or go_on.wait(30))
    assert started.wait(30)
    for name in (1, 2, 3):
        assert tier.put(key_of(name), b"", memoryview(body_of(key_of(name))))
    server.stop()
    go_on.set()
    tier.flush()
    assert tier.counts().dropped == 4
    tier.close()
    assert not tier.put(key_of(5), b"", memoryview(body_of(key_of(5))))
    server.start()


def test_waits_between_tries_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    link = Link(f"redis://127.0.0.1:{port}", LinkOptions(first_retry_s=1.0, last_retry_s=5.0))
    tries = []
    while len(tries) < 6:
        before = link.errors
        link.probe()
        if link.errors > before:
            tries.append(now[0])
        now[0] += 0.5
    assert [after - before for before, after in itertools.pairwise(tries)] == [1, 2, 4, 5, 5]
    link.close()


def test_a_server_that_is_not_there_at_the_start_is_no_error_but_no_address_is(server: Server) -> None:
    server.stop()
    tier = RemoteTier.open(server.url, SLOT_BYTES, DIGEST, QUICK)
    assert tier.get([key_of(1)], [slot()]) == 0
    server.start()
    wait_for(lambda: tier.up)
    assert right(tier, put(tier, 1)) == 1
    tier.close()
    with pytest.raises(TierError, match="remote_url is no address"):
        RemoteTier.open("http://nowhere", SLOT_BYTES, DIGEST)


def test_without_the_client_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(TierError, match=r"headway\[redis\]"):
        RemoteTier.open("redis://127.0.0.1", SLOT_BYTES, DIGEST)


# ---------------------------------------------------------------------- together


def test_both_tiers_at_work_load_nothing_built_in_rust(tier: RemoteTier, server: Server, tmp_path: Path) -> None:
    put(tier, 1)
    code = (
        "import sys; from pathlib import Path\n"
        "from tests.kvstore.tier_rig import *; from services.kvstore.tiers.remote import RemoteTier\n"
        f"tier = RemoteTier.open({server.url!r}, SLOT_BYTES, DIGEST)\n"
        "while not tier.up: pass\n"
        "assert right(tier, [key_of(1)]) == 1\n"
        f"other = reopen(Path({str(tmp_path / 'other')!r}))\n"
        "assert right(other, put(other, 1)) == 1\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert "xxhash" in maps
        assert rust_built(process.pid) == []
    finally:
        process.communicate(b"")
