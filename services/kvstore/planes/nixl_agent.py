"""A NIXL agent over UCX, the slab registered with it, and the one thread that may use it.

NIXL's own progress thread is off: it would take a core. The thread here makes progress every 0.1 ms while something is
expected, and sleeps otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib
import ipaddress
import itertools
import logging
import os
import queue
import secrets
import threading
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any, NamedTuple

from headway.v1 import transfer_pb2 as pb
from services.kvstore.device_memory import DeviceMemory
from services.kvstore.memory import LANDING_SLOT, PROBE_SLOT, SlabMemory

log = logging.getLogger(__name__)

# The package nixl chooses one of the others, and may import torch to do so.
MODULES = ("nixl_cu12", "nixl_cu13", "nixl")
LOOK_S = 1e-4
HOST, DEVICE = "DRAM", "VRAM"
DONE, MOVING = "DONE", "PROC"
# UCX's shortcuts on one host: a peer that once knew the address writes on, whatever is closed or unregistered here.
SHORTCUTS = ("cma", "knem", "xpmem", "cuda_ipc", "rocm_ipc", "ze_ipc")
# UCX's names for several transports, one of these among them.
WITH_SHORTCUTS = ("all", "sm", "shm", "mm", "cuda", "rocm", "ze")


class NixlError(Exception):
    """NIXL is not there, or refused something; one sentence."""


def load_nixl() -> Any:
    """NIXL's Python API. Raises NixlError where no build of it can be imported, or UCX may take shortcuts."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    forbid_shortcuts(os.environ)
    reason = ""
    for name in MODULES:
        try:
            api = importlib.import_module(f"{name}._api")
            _exit_before_destructors()
            return api
        except ImportError as error:
            reason = reason if isinstance(error, ModuleNotFoundError) else f" ({name}: {error})"
    raise NixlError(
        f"the plane nixl needs the package NIXL, which cannot be imported{reason}: "
        "install the extra (pip install 'headway[nixl]'), or leave nixl out of the setting planes"
    )


@functools.cache
def _exit_before_destructors() -> None:
    """End this process before the loader unloads its libraries, with the status that it exits with.

    Python is finalized by then. NIXL's wheels bring a libnl of their own, whose destructor crashes (1.5.1) where the
    system's is loaded as well: wherever libibverbs is installed, which is wherever there is RDMA.
    """
    libc = ctypes.CDLL(None)
    libc.on_exit(ctypes.cast(libc._exit, ctypes.c_void_p), None)


def check_nixl(transfer_host: str) -> None:
    """Raises NixlError where no agent can be made. Makes one, as a process's first takes UCX half a second.

    UCX asks for no secret, so where `transfer_host` is loopback it listens nowhere else.
    """
    if _is_loopback(transfer_host):
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
    api = load_nixl()
    try:
        api.nixl_agent(f"check-{secrets.token_hex(8)}", _options(api))
    except Exception as error:
        raise NixlError(f"the plane nixl cannot make an agent ({sentence(error)}): leave it out of planes") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _options(api: Any) -> Any:
    return api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"])


def forbid_shortcuts(environment: MutableMapping[str, str]) -> None:
    """Set UCX_TLS, or raise NixlError where it is set and lets a peer write to slots that this side has given up.

    It is enough that this side offers none of them: UCX takes only what both sides have.
    """
    transports = environment["UCX_TLS"] = environment.get("UCX_TLS") or f"^{','.join(SHORTCUTS)}"
    names = {name.lstrip("\\") for name in transports.removeprefix("^").split(",")}
    allowed = set(SHORTCUTS) - names if transports.startswith("^") else names & {*SHORTCUTS, *WITH_SHORTCUTS}
    if allowed:
        raise NixlError(
            f"UCX_TLS={transports} allows {', '.join(sorted(allowed))}, by which a peer may write to slots that were "
            "given out anew: leave it unset, or name others (tcp, rc, posix, ...)"
        )


class Remote(NamedTuple):
    """Another agent whose slab is prepared for transfers."""

    name: str
    slots: int


class Agent:
    """One agent, used by one thread. Methods raise what NIXL raises.

    Nothing of NIXL leaves it: a handle held elsewhere would keep the native agent alive after `destroy`.
    """

    def __init__(self, name: str, memory: SlabMemory | DeviceMemory) -> None:
        api = load_nixl()
        self._nixl = api.nixl_agent(f"{name}-{secrets.token_hex(8)}", _options(api))
        self.slots, self._slot_bytes = memory.slots, memory.slot_bytes
        card = pb.NixlCard(
            slab_address=memory.address(0),
            slots=memory.slots,
            stride=memory.stride,
            probe_address=memory.address(PROBE_SLOT),
            landing_address=memory.address(LANDING_SLOT),
        )
        card.memory, card.device = _place(memory)
        extra = [(address, self._slot_bytes, card.device, "") for address in (card.probe_address, card.landing_address)]
        slab = (card.slab_address, card.stride * card.slots, card.device, "")
        self._registered = self._nixl.register_memory([slab, *extra], card.memory)
        card.metadata = self._nixl.get_agent_metadata()
        self.card = card
        self._mine = self._nixl.prep_xfer_dlist("NIXL_INIT_AGENT", self._descriptors(card), card.memory)
        self._theirs: dict[str, Any] = {}
        self._transfers: dict[int, Any] = {}
        self._numbers = itertools.count()

    def _descriptors(self, card: pb.NixlCard) -> list[tuple[int, int, int]]:
        """(address, bytes, device) of every slot, of the probe, and of where it lands: see `_index`."""
        size, device = self._slot_bytes, card.device
        slab = [(card.slab_address + slot * card.stride, size, device) for slot in range(card.slots)]
        return [*slab, (card.probe_address, size, device), (card.landing_address, size, device)]

    def meet(self, card: pb.NixlCard) -> Remote:
        added: bytes | str = self._nixl.add_remote_agent(card.metadata)
        name = added.decode() if isinstance(added, bytes) else added
        self._theirs[name] = self._nixl.prep_xfer_dlist(name, self._descriptors(card), card.memory or HOST)
        return Remote(name, card.slots)

    def part(self, remote: Remote) -> None:
        """No transfer with it any more; what is on its way may go on."""
        self._nixl.release_dlist_handle(self._theirs.pop(remote.name))
        self._nixl.remove_remote_agent(remote.name)

    def write(self, mine: Sequence[int], remote: Remote, theirs: Sequence[int]) -> int:
        """Start to write own slots into the remote's; the transfer's number."""
        local = [_index(slot, self.slots) for slot in mine]
        there = [_index(slot, remote.slots) for slot in theirs]
        prepared = self._theirs[remote.name]
        transfer = self._nixl.make_prepped_xfer("WRITE", self._mine, local, prepared, there, b"")
        number = next(self._numbers)
        self._transfers[number] = transfer
        self._nixl.transfer(transfer)
        return number

    def state(self, transfer: int) -> str:
        """DONE once all bytes are in place; looking makes progress."""
        state: str = self._nixl.check_xfer_state(self._transfers[transfer])
        return state

    def end(self, transfer: int) -> None:
        self._nixl.release_xfer_handle(self._transfers.pop(transfer))

    def progress(self) -> None:
        """Let other agents' transfers go on."""
        self._nixl.get_new_notifs()

    def destroy(self) -> bool:
        """True: nobody can reach the registered memory any more, by none of the transports that are allowed."""
        native = weakref.ref(self._nixl.agent)
        self._transfers.clear()
        self._theirs.clear()
        del self._mine, self._registered, self._nixl
        # An error's traceback may refer to it, too.
        gc.collect()
        return native() is None


def _place(memory: SlabMemory | DeviceMemory) -> tuple[str, int]:
    """NIXL's name of the kind of memory, and the device's number. A device of NumPy's is memory of the host."""
    if isinstance(memory, DeviceMemory) and memory.segment.device.module.kind == "cuda":
        return DEVICE, memory.segment.device.index
    return HOST, 0


def _index(slot: int, slots: int) -> int:
    return {PROBE_SLOT: slots, LANDING_SLOT: slots + 1}.get(slot, slot)


class AgentThread:
    """Makes an agent, runs jobs with it in order, and destroys it in the end.

    `turn` is called after jobs, and again every LOOK_S as long as it returns True. `over` is called in the thread when
    the agent is no more, with the reason ("" after `close`). Daemon: a process that exits does not wait for it.
    """

    def __init__(
        self, name: str, memory: SlabMemory | DeviceMemory, turn: Callable[[Agent], bool], over: Callable[[str], None]
    ) -> None:
        self._turn = turn
        self._over = over
        self._jobs: queue.SimpleQueue[Callable[[Agent], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(name, memory), name="transfer-nixl", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[Agent], None]) -> None:
        """One that raises ends the agent."""
        self._jobs.put(job)

    def close(self) -> None:
        """Returns at once; jobs submitted before are still run."""
        self._jobs.put(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self, name: str, memory: SlabMemory | DeviceMemory) -> None:
        reason, agent = "", None
        try:
            agent = Agent(name, memory)
            self._work(agent)
        except Exception as error:
            reason = sentence(error)
            error.__traceback__ = None
        if agent is None or agent.destroy():
            self._over(reason)
        else:
            # Rather slots that stay leased than slots that are written to behind their owner's back.
            log.error("event=nixl_agent_lives_on name=%s", name)

    def _work(self, agent: Agent) -> None:
        expecting = False
        while True:
            job: Callable[[Agent], None] | None = nothing
            with contextlib.suppress(queue.Empty):
                job = self._jobs.get(timeout=LOOK_S if expecting else None)
            if job is None:
                return
            job(agent)
            expecting = self._turn(agent)


def nothing(agent: Agent) -> None:
    """The job of a turn without one."""


def sentence(error: Exception) -> str:
    """What NIXL said, with the name of the error, which says more."""
    return f"{type(error).__name__}: {error}"
