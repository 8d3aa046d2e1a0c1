"""The launcher with real processes of simulated engines: started, killed, restarted, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headway.client import Client
from headway.fleet import Fleet, FleetError, FleetSpec
from headway.fleet.slabs import SHM, remove_stale_slabs, slab_name

SIM = FleetSpec(model="sim", engine="sim", slab_bytes=1 << 20)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with Fleet(SIM, tmp_path_factory.mktemp("fleet")) as fleet:
        fleet.wait_ready(60)
        yield fleet


def gone(pid: int) -> bool:
    """Ended, or a zombie that nobody has collected."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_serves(fleet: Fleet) -> None:
    assert fleet.names == ["kvstore", "router", "prefill-0", "decode-0"]
    with Client(fleet.address) as client:
        assert client.generate("hello", max_tokens=3).finished.usage.output_tokens == 3


def test_kill_and_restart_on_the_same_port(fleet: Fleet) -> None:
    before, address = fleet.process("decode-0"), fleet.address_of("decode-0")
    fleet.kill("decode-0")
    assert not fleet.alive("decode-0")
    with pytest.raises(FleetError, match="decode-0 was killed by signal 9"):
        fleet.wait_ready(5)
    fleet.restart("decode-0")
    assert fleet.process("decode-0") != before
    assert fleet.address_of("decode-0") == address
    fleet.wait_ready(30)


def test_stop_and_continue(fleet: Fleet) -> None:
    state = Path(f"/proc/{fleet.process('prefill-0')}/status")
    fleet.stop_signal("prefill-0")
    wait_for(lambda: "State:\tT" in state.read_text())
    fleet.cont("prefill-0")
    wait_for(lambda: "State:\tT" not in state.read_text())


def test_unknown_names(fleet: Fleet) -> None:
    with pytest.raises(FleetError, match="no process decode-7; there are: kvstore, router"):
        fleet.process("decode-7")


def test_stop_leaves_nothing(tmp_path: Path) -> None:
    fleet = Fleet(SIM, tmp_path)
    with fleet:
        pids = [fleet.process(name) for name in fleet.names]
        fleet.stop_signal("decode-0")
    assert all(map(gone, pids))
    assert not list(SHM.glob(f"headway-{os.getpid()}-*{fleet._slabs[0]}*"))


def test_a_service_that_does_not_start_shows_its_log_and_stops_the_others(tmp_path: Path) -> None:
    spec = FleetSpec(model="sim", engine="sim", slab_bytes=1 << 20, flags={"decode-0": ["--max-batch", "none"]})
    fleet = Fleet(spec, tmp_path)
    with pytest.raises(FleetError, match=r"decode-0 ended with status 2; (?s:.*)setting max_batch is 'none'"):
        fleet.start()
    assert not any(fleet.alive(name) for name in fleet.names)


def test_a_supervised_service_comes_back(tmp_path: Path) -> None:
    spec = FleetSpec(prefill=0, decode=0, mixed=1, model="sim", engine="sim", slab_bytes=1 << 20, supervise=True)
    with Fleet(spec, tmp_path) as fleet:
        fleet.wait_ready(60)
        before = fleet.process("mixed-0")
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: fleet.process("mixed-0") != before)
        fleet.wait_ready(60)


def test_children_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from headway.fleet import Fleet, FleetSpec\n"
        "spec = FleetSpec(prefill=0, decode=0, mixed=1, model='sim', engine='sim', slab_bytes=1 << 20)\n"
        "with Fleet(spec, sys.argv[1]) as fleet:\n"
        "    print(*(fleet.process(name) for name in fleet.names), flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.communicate()
    assert len(pids) == 3
    wait_for(lambda: all(map(gone, pids)))
    remove_stale_slabs()
    assert not list(SHM.glob(f"headway-{parent.pid}-*"))


def test_only_slabs_of_dead_owners_are_stale() -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    stale, own = SHM / slab_name(int(dead.stdout), "00000000"), SHM / slab_name(os.getpid(), "00000000")
    for path in (stale, own):
        path.touch()
    remove_stale_slabs()
    assert (stale.exists(), own.exists()) == (False, True)
    own.unlink()


@pytest.mark.parametrize("numbers", [{"prefill": 0}, {"decode": 0}, {"prefill": -1, "mixed": 1}, {"nodes": 0}])
def test_impossible_fleets(numbers: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="a fleet"):
        FleetSpec(**numbers)  # type: ignore[arg-type]


def test_workers_are_dealt_to_nodes() -> None:
    spec = FleetSpec(prefill=2, decode=1, nodes=2)
    assert spec.workers == [("prefill-0", "prefill", 0), ("prefill-1", "prefill", 1), ("decode-0", "decode", 0)]
    assert spec.kvstores == ["kvstore", "kvstore-1"]


def test_workers_come_and_drain_while_the_fleet_runs(tmp_path: Path) -> None:
    with Fleet(SIM, tmp_path) as fleet:
        fleet.wait_ready(60)
        name = fleet.add_worker("prefill")
        assert name == "prefill-1"
        assert {worker.worker_id for worker in fleet.wait_ready(60).workers} == {"prefill-0", "prefill-1", "decode-0"}
        fleet.drain(name)
        fleet.wait_gone(name, 20.0)
        with Client(fleet.address) as client:
            until = time.monotonic() + 5.0
            while len(client.fleet().workers) > 2 and time.monotonic() < until:
                time.sleep(0.05)
            assert {worker.worker_id for worker in client.fleet().workers} == {"prefill-0", "decode-0"}
            assert client.generate([1, 2, 3], max_tokens=3).finished.usage.output_tokens == 3
        assert fleet.add_worker("prefill") == "prefill-2", "a name is not given twice"
        fleet.wait_ready(60)


def test_several_routers_know_the_same_workers(tmp_path: Path) -> None:
    with Fleet(FleetSpec(model="sim", engine="sim", slab_bytes=1 << 20, routers=2), tmp_path) as fleet:
        fleet.wait_ready(60)
        assert len(fleet.addresses) == 2
        for address in fleet.addresses:
            with Client(address) as client:
                assert client.generate([1, 2, 3], max_tokens=3).finished.usage.output_tokens == 3
                assert {worker.worker_id for worker in client.fleet().workers} == {"prefill-0", "decode-0"}
        fleet.kill("router")
        with Client(fleet.addresses[1]) as client:
            assert client.generate([4, 5, 6], max_tokens=3).finished.usage.output_tokens == 3


def test_a_supervised_fleet_keeps_its_workers(tmp_path: Path) -> None:
    spec = FleetSpec(model="sim", engine="sim", slab_bytes=1 << 20, supervise=True)
    with Fleet(spec, tmp_path) as fleet:
        fleet.wait_ready(60)
        for action in (lambda: fleet.add_worker("prefill"), lambda: fleet.drain("prefill-0")):
            with pytest.raises(FleetError, match="keeps the workers that it started with"):
                action()
