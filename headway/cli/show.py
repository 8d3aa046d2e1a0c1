"""`headway fleet` and `headway explain`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from headway.cli.ask import read_prompt
from headway.client import Client, ExpectedLink, Link, Placement, Store, Tier, Worker
from headway.client.pace import milliseconds


def fleet(arguments: argparse.Namespace) -> int:
    with Client(arguments.address) as client:
        view = client.fleet()
    model = f"{view.model}, context {view.context_tokens} tokens" if view.model else "no worker yet"
    print(f"{model}, {view.requests_in_flight} requests in flight\n")
    heads = [
        "worker",
        "node",
        "role",
        "state",
        "waiting",
        "running",
        "tokens to compute",
        "seconds",
        "slots in use",
        "off by",
        "pid",
    ]
    print(table(heads, map(_worker_row, view.workers)))
    print()
    stores = (
        [s.node_id, s.address, "watching" if s.watching else "unreachable", s.indexed_blocks,
         s.indexed_blocks * view.block_size]
        for s in view.stores
    )  # fmt: skip
    print(table(["kvstore of", "address", "state", "cached blocks", "cached tokens"], stores))
    links = [_link_row(store, link) for store in view.stores for link in store.links]
    if links:
        print("\n" + table(["blocks to", "from", "plane", "MB", "MB/s", "fallbacks"], links))
    expected = [_expected_row(link) for link in view.expected_links]
    if expected:
        print("\n" + table(["pulls from", "to", "expected MB/s", "off by", "seconds on the way"], expected))
    tiers = [_tier_row(store, tier) for store in view.stores for tier in store.tiers]
    if tiers:
        print("\n" + table(["below", "tier", "blocks", "read again", "MB written", "MB read", "ms a block"], tiers))
    return 0


def explain(arguments: argparse.Namespace) -> int:
    with Client(arguments.address) as client:
        explanation = client.explain(read_prompt(arguments.prompt))
    print(f"a prompt of {explanation.prompt_tokens} tokens; the first option would be taken\n")
    heads = ["prefill", "decode", "cached tokens", "wait", "pull", "compute", "for others", "cost", "refused because"]
    print(table(heads, map(_option_row, explanation.options)))
    return 0


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns as wide as their widest cell; numbers to the right."""
    cells = [list(heads), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if cell.isdigit() else cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in cells
    ]
    return "\n".join(lines)


def _worker_row(worker: Worker) -> list[object]:
    state = "ready" if worker.ready else "not ready"
    used = f"{worker.total_slots - worker.free_slots} of {worker.total_slots}"
    errors = f"{worker.prefill_error:.0%} / {worker.step_error:.0%}"
    return [
        worker.worker_id, worker.node_id, worker.role, state, worker.waiting_sequences, worker.running_sequences,
        worker.waiting_tokens, f"{worker.queue_s:.2f}", used, errors, worker.pid,
    ]  # fmt: skip


def _link_row(store: Store, link: Link) -> list[object]:
    rate = f"{link.bytes_per_s / 1e6:.0f}" if link.bytes_per_s else "–"
    return [store.node_id, link.node_id, link.plane or "not connected", link.bytes // 1_000_000, rate, link.fallbacks]


def _expected_row(link: ExpectedLink) -> list[object]:
    rate = f"{link.bytes_per_s / 1e6:.0f}" if link.bytes_per_s else "–"
    return [link.source, link.destination, rate, f"{link.error:.0%}", f"{link.backlog_s:.2f}"]


def _tier_row(store: Store, tier: Tier) -> list[object]:
    written, read = tier.bytes_written // 1_000_000, tier.bytes_read // 1_000_000
    return [store.node_id, tier.name, tier.blocks, tier.hits, written, read, milliseconds(tier.read_block_s)]


def _option_row(option: Placement) -> list[object]:
    seconds = (option.wait_s, option.pull_s, option.compute_s, option.delay_s, option.cost_s)
    times = [milliseconds(value) for value in seconds]
    return [option.prefill_worker or "–", option.decode_worker or "–", option.overlap_tokens, *times, option.refused]
