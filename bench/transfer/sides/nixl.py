"""Both sides of NIXL: agents over UCX with one registered slab each, prepared descriptor lists with one entry a slot.

The source begins every move: WRITE puts its slots into the target's. For READ the roles of the agents are swapped
inside: the process that has the target slab begins, for a read pulls. `DONE` means that all bytes are in place.
"""

from __future__ import annotations

import base64
import importlib
import time
from typing import Any

from bench.transfer.sides.common import Answer, Handler, Slab, serve


class Agent:
    """An agent with its slab registered: `card` is what the other side needs."""

    def __init__(self, config: dict[str, Any]) -> None:
        api = importlib.import_module(config["api"])
        self.config = config
        self.slab = Slab(config["fd"], config["slab_bytes"])
        options = api.nixl_agent_config(enable_prog_thread=config["progress_thread"], backends=["UCX"])
        self.agent = api.nixl_agent(config["role"], options)
        self.agent.register_memory([(self.slab.address, self.slab.bytes, 0, "")], "DRAM")

    @property
    def card(self) -> Answer:
        return {
            "card": {"metadata": base64.b64encode(self.agent.get_agent_metadata()).decode(), "at": self.slab.address}
        }

    def slots(self, address: int) -> list[tuple[int, int, int]]:
        """A descriptor (address, bytes, device) for every slot of a slab that begins at `address`."""
        stride, size = self.config["stride"], self.config["block_bytes"]
        return [(address + at, size, 0) for at in range(0, self.config["slab_bytes"], stride)]

    def meet(self, card: dict[str, Any]) -> None:
        """Load the other side's metadata and prepare both descriptor lists once."""
        self.other = self.agent.add_remote_agent(base64.b64decode(card["metadata"]))
        self.local_list = self.agent.prep_xfer_dlist("NIXL_INIT_AGENT", self.slots(self.slab.address), "DRAM")
        self.remote_list = self.agent.prep_xfer_dlist(self.other, self.slots(card["at"]), "DRAM")
        self.agent.make_connection(self.other)

    def move(self, blocks: int) -> Answer:
        """Begin one transfer of `blocks` descriptors and wait for its end, looking every `poll_s` seconds."""
        config, agent = self.config, self.agent
        mine, theirs = ("source_slots", "target_slots") if config["op"] == "WRITE" else ("target_slots", "source_slots")
        local, remote, poll_s = config[mine][:blocks], config[theirs][:blocks], config["poll_s"]
        started = time.perf_counter()
        transfer = agent.make_prepped_xfer(config["op"], self.local_list, local, self.remote_list, remote, b"moved")
        state = agent.transfer(transfer)
        while state == "PROC":
            if poll_s:
                time.sleep(poll_s)
            state = agent.check_xfer_state(transfer)
        seconds = time.perf_counter() - started
        agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        return {"seconds": seconds}


def start(config: dict[str, Any]) -> Handler:
    side = Agent(config)

    def handle(question: dict[str, Any]) -> Answer:
        if "card" in question:
            side.meet(question["card"])
            return {}
        if "blocks" in question:
            return side.move(question["blocks"])
        side.agent.get_new_notifs()
        return side.card

    return handle


if __name__ == "__main__":
    serve(start)
