"""Links between nodes: what is on its way, and how fast it came."""

from __future__ import annotations

import pytest

from headway.core.links import Links


def test_pulls_queue_on_their_link_and_on_no_other() -> None:
    links = Links(0.01, 1e6)
    link = links.between("a", "b")
    assert link.landing_s(1_000_000, 5.0) == pytest.approx(6.01)
    assert link.start(1_000_000, 5.0) == pytest.approx(6.01)
    assert link.landing_s(0, 5.0) == pytest.approx(6.02)
    assert links.between("b", "a").landing_s(0, 5.0) == pytest.approx(5.01)
    assert links.between("a", "b") is link


def test_bandwidth_follows_what_was_measured() -> None:
    links = Links(0.0, 1e9)
    link = links.between("a", "b")
    link.observe(10_000_000, 0.1)
    assert (link.bytes_per_s, link.error) == (pytest.approx(1e8), 0.0), "the first measurement replaces the guess"
    link.observe(10_000_000, 0.2)
    assert 6e7 < link.bytes_per_s < 1e8
    assert link.error == pytest.approx(0.2 * 0.5)
    for _ in range(50):
        link.observe(10_000_000, 0.2)
    assert (link.bytes_per_s, link.error) == (pytest.approx(5e7, rel=0.01), pytest.approx(0.0, abs=0.01))
    link.observe(1000, 1.0)
    assert link.bytes_per_s == pytest.approx(5e7, rel=0.01)
    assert list(links) == [("a", "b", link)]


def test_a_node_that_is_gone_is_forgotten() -> None:
    links = Links(0.0, 1e9)
    links.between("a", "b").start(10**9, 0.0)
    links.forget("b")
    assert links.between("a", "b").free_s == 0.0
