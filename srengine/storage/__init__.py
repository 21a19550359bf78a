"""Tablets and the metadata store: the only room that uses LMDB.

| name | what |
|---|---|
| `Store`, `open_store` | a directory of tablets that belongs to one process |
| `Tablet` | one replicated table part: records, change log, root; thread-safe |
| `View` | a pinned point-in-time reader of a tablet |
| `Batch`, `Outcome`, `encode_operations` | the log's face: what goes in, what came of it |
| `Delta`, `RowBatch`, `check_rows` | the replica's face: what changed, as bytes for the wire |
| `MetadataStore` | named tables of a node in an LMDB environment of their own |
| `VerifyReport`, `Damage`, `verify_directory` | the offline check |

Names are loaded when first used, so that a program that wants one of them does not load all.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srengine.storage.entries import Batch as Batch
    from srengine.storage.entries import Delta as Delta
    from srengine.storage.entries import Outcome as Outcome
    from srengine.storage.entries import check_operations as check_operations
    from srengine.storage.entries import check_rows as check_rows
    from srengine.storage.entries import encode_deletes as encode_deletes
    from srengine.storage.entries import encode_operations as encode_operations
    from srengine.storage.entries import encode_puts as encode_puts
    from srengine.storage.metadata import MetadataStore as MetadataStore
    from srengine.storage.report import Damage as Damage
    from srengine.storage.report import VerifyReport as VerifyReport
    from srengine.storage.store import Store as Store
    from srengine.storage.store import open_store as open_store
    from srengine.storage.tablet import Tablet as Tablet
    from srengine.storage.verify import verify_directory as verify_directory
    from srengine.storage.view import RowBatch as RowBatch
    from srengine.storage.view import View as View

_HOME = {
    "Batch": "entries",
    "Damage": "report",
    "Delta": "entries",
    "MetadataStore": "metadata",
    "Outcome": "entries",
    "RowBatch": "view",
    "Store": "store",
    "Tablet": "tablet",
    "VerifyReport": "report",
    "View": "view",
    "check_operations": "entries",
    "check_rows": "entries",
    "encode_deletes": "entries",
    "encode_operations": "entries",
    "encode_puts": "entries",
    "open_store": "store",
    "verify_directory": "verify",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(name)
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
