"""Where the machines of `consensus/` enter the simulator."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from srengine.consensus.machine import RaftMachine

if TYPE_CHECKING:
    from tests.simulator.breakages import Breakage
    from tests.simulator.process import Process


def open_machine(process: Process, group: str, breakage: Breakage) -> RaftMachine:
    """Return the machine of one group in one run of a node, broken if that is what is tested."""
    host, world = process.host, process.world
    log = host.log(group)
    machine = RaftMachine(
        group=group,
        node_id=host.id,
        log=log,
        hard_state=log.hard_state,
        applied_index=host.state(group).index,
        timing=world.regime.timing,
        random=random.Random(f"{world.seed} machine {host.id} {group} {host.disk.image.boot}"),
        now=host.clock.now_s(),
        trusted=False,
    )
    if breakage.machine is not None:
        breakage.machine(machine)
    return machine
