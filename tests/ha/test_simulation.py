"""Groups under crashes, loss of messages and loss of disks: nothing acknowledged is lost, all replicas end equal."""

from __future__ import annotations

import pytest

from tests.ha.simulation import Simulation


@pytest.mark.parametrize("seed", range(40))
def test_group_of_three_keeps_its_promises(seed: int) -> None:
    """F13, F14: no acknowledged write is lost and replicas end equal under crashes, wipes and restores, one at a
    time.
    """
    simulation = Simulation(seed)
    simulation.story()
    simulation.settle()
    assert simulation.acknowledged, seed
    assert simulation.reads, seed


@pytest.mark.parametrize("seed", range(40))
def test_group_of_five_keeps_its_promises(seed: int) -> None:
    """F14: the same with five replicas, where an acknowledged write may be at three of them only."""
    simulation = Simulation(1000 + seed, nodes=5)
    simulation.story(30)
    simulation.settle()
    assert simulation.acknowledged, seed


@pytest.mark.parametrize("seed", range(40))
def test_rot_is_found_and_repaired(seed: int) -> None:
    """K11, F10: records that are changed, lost or added behind one replica, the leader's too, with or without the root,
    are repaired from the others; nothing acknowledged is lost, all end whole and equal.
    """
    simulation = Simulation(3000 + seed)
    simulation.story(rot=True)
    simulation.settle()
    assert simulation.acknowledged, seed


def test_rot_is_repaired_by_exchanges() -> None:
    """K11: the simulated rot really is repaired, on the leader and on others."""
    repairs = 0
    for seed in range(5):
        simulation = Simulation(3000 + seed)
        simulation.story(rot=True)
        repairs += simulation.repairs
    assert repairs >= 5, repairs


@pytest.mark.parametrize("seed", range(4))
def test_single_node_group_serves(seed: int) -> None:
    """A group of one acknowledges alone and keeps everything over crashes."""
    simulation = Simulation(2000 + seed, nodes=1)
    for _ in range(200):
        simulation.run(0.1)
        simulation.write()
        if simulation.random.random() < 0.1:
            simulation.crash("n1")
            simulation.start("n1")
    simulation.settle()
    assert len(simulation.acknowledged) > 50
