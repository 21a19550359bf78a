"""What nodes whose journal is in etcd say to each other, besides what etcd carries: little.

==================  ===========================================================================================
`Forward`           any node to the leader: put this command into the journal; answered by `Forwarded`
`Handover`          any node to the leader: transfer the leadership; answered by `HandedOver`
`FetchCopy`         a node that is behind the floor to one that holds a copy: a stream of its items (state.py)
==================  ===========================================================================================
"""

from __future__ import annotations

import msgspec

from srengine.codec import registry


class Forward(msgspec.Struct, frozen=True):
    """Put a command into the journal. ``force``: a change of membership may leave too few voters alive."""

    kind: str
    body: bytes
    epoch: int
    request: bytes
    timeout_s: float
    force: bool = False


class Forwarded(msgspec.Struct, frozen=True):
    """Where it was decided. A refusal is answered by its error."""

    index: int


class Handover(msgspec.Struct, frozen=True):
    """Transfer the leadership to the member of this name; empty: to whoever is best."""

    target: str
    timeout_s: float


class HandedOver(msgspec.Struct, frozen=True):
    """Name of the new leader."""

    name: str


class FetchCopy(msgspec.Struct, frozen=True):
    """Send the copy of the state at this index."""

    index: int


registry.register("ha.etcd_forward", Forward)
registry.register("ha.etcd_forwarded", Forwarded)
registry.register("ha.etcd_handover", Handover)
registry.register("ha.etcd_handed_over", HandedOver)
registry.register("ha.etcd_fetch_copy", FetchCopy)
