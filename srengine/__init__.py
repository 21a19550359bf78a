"""A replicated tablet store that lives inside or beside a Python service.

Embedded, one process, no network::

    with srengine.open("data") as store:
        users = store.tablet("users")
        users.put(b"k", b"v")

A cluster's client::

    with srengine.connect("tcp://127.0.0.1:7400") as cluster:
        orders = cluster.table("shop.orders")
        orders[b"k"] = b"v"

Public names are loaded when they are first used, so that a client does not load what only a node needs. docs/python.md
walks through them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srengine.client import AsyncClient as AsyncClient
    from srengine.client import AsyncTable as AsyncTable
    from srengine.client import Client as Client
    from srengine.client import Table as Table
    from srengine.client import TableRecord as TableRecord
    from srengine.client import connect as connect
    from srengine.errors import AddressInUse as AddressInUse
    from srengine.errors import AlreadyOpen as AlreadyOpen
    from srengine.errors import BelowPurgeMark as BelowPurgeMark
    from srengine.errors import Closed as Closed
    from srengine.errors import Conflict as Conflict
    from srengine.errors import CorruptionError as CorruptionError
    from srengine.errors import Denied as Denied
    from srengine.errors import DiskFull as DiskFull
    from srengine.errors import Diverged as Diverged
    from srengine.errors import Error as Error
    from srengine.errors import ForeignData as ForeignData
    from srengine.errors import ForkedEnvironment as ForkedEnvironment
    from srengine.errors import FrameError as FrameError
    from srengine.errors import InvalidValue as InvalidValue
    from srengine.errors import MasterState as MasterState
    from srengine.errors import MemberNotFound as MemberNotFound
    from srengine.errors import NoLeader as NoLeader
    from srengine.errors import NoQuorum as NoQuorum
    from srengine.errors import NotAuthenticated as NotAuthenticated
    from srengine.errors import NotFound as NotFound
    from srengine.errors import NotLeader as NotLeader
    from srengine.errors import NotReady as NotReady
    from srengine.errors import QuotaExceeded as QuotaExceeded
    from srengine.errors import Removed as Removed
    from srengine.errors import RequestExpired as RequestExpired
    from srengine.errors import SchemaMismatch as SchemaMismatch
    from srengine.errors import SnapshotDamaged as SnapshotDamaged
    from srengine.errors import StaleEpoch as StaleEpoch
    from srengine.errors import TabletFenced as TabletFenced
    from srengine.errors import TimedOut as TimedOut
    from srengine.errors import TruncatedTablet as TruncatedTablet
    from srengine.errors import UnknownMaster as UnknownMaster
    from srengine.errors import Unreachable as Unreachable
    from srengine.errors import UnsafePermissions as UnsafePermissions
    from srengine.errors import UnsupportedFeature as UnsupportedFeature
    from srengine.errors import UnsupportedFileSystem as UnsupportedFileSystem
    from srengine.errors import UsageError as UsageError
    from srengine.errors import ViewExpired as ViewExpired
    from srengine.node import Node as Node
    from srengine.node import NodeOptions as NodeOptions
    from srengine.storage import Store as Store
    from srengine.storage import Tablet as Tablet
    from srengine.storage import View as View
    from srengine.storage import open_store as open  # noqa: A004, F401 - the word users expect
    from srengine.types import Position as Position
    from srengine.types import Record as Record

__version__ = "0.1.0"
"""Version of this package, as ``srengine --version`` says it."""

_HOME = {
    "AddressInUse": "errors",
    "AlreadyOpen": "errors",
    "AsyncClient": "client",
    "AsyncTable": "client",
    "BelowPurgeMark": "errors",
    "Client": "client",
    "Closed": "errors",
    "Conflict": "errors",
    "CorruptionError": "errors",
    "Denied": "errors",
    "DiskFull": "errors",
    "Diverged": "errors",
    "Error": "errors",
    "ForeignData": "errors",
    "ForkedEnvironment": "errors",
    "FrameError": "errors",
    "InvalidValue": "errors",
    "MasterState": "errors",
    "MemberNotFound": "errors",
    "NoLeader": "errors",
    "NoQuorum": "errors",
    "Node": "node",
    "NodeOptions": "node",
    "NotAuthenticated": "errors",
    "NotFound": "errors",
    "NotLeader": "errors",
    "NotReady": "errors",
    "Position": "types",
    "QuotaExceeded": "errors",
    "Record": "types",
    "Removed": "errors",
    "RequestExpired": "errors",
    "SchemaMismatch": "errors",
    "SnapshotDamaged": "errors",
    "StaleEpoch": "errors",
    "Store": "storage",
    "Table": "client",
    "TableRecord": "client",
    "Tablet": "storage",
    "TabletFenced": "errors",
    "TimedOut": "errors",
    "TruncatedTablet": "errors",
    "UnknownMaster": "errors",
    "Unreachable": "errors",
    "UnsafePermissions": "errors",
    "UnsupportedFeature": "errors",
    "UnsupportedFileSystem": "errors",
    "UsageError": "errors",
    "View": "storage",
    "ViewExpired": "errors",
    "connect": "client",
    "open": "storage",
}
"""Public name -> the room that it lives in."""

_NAME_THERE = {"open": "open_store"}

__all__ = sorted(_HOME)  # noqa: PLE0605 - computed from the one table above


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if home == "storage":
        # Tablets write and read snapshot files with what a higher room puts there.
        importlib.import_module(f"{__name__}.snapshot")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), _NAME_THERE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
