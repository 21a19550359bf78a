"""`Client` and `Table`: the cluster for threads. They hold no protocol: each call runs its asyncio twin on one loop
thread.

The loop runs in one daemon thread for each client, started at the first call. A client may be used by many threads at
once; after a fork the child must make its own (`ForkedEnvironment`).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import (
    Callable,
    Coroutine,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    MutableMapping,
    ValuesView,
)
from types import TracebackType
from typing import Any, Final, Self, TypeVar, cast, overload

from srengine import errors
from srengine.client import messages, routing
from srengine.client.asynchronous import TIMEOUT_S_DEFAULT, AsyncClient
from srengine.client.calls import ChannelSource
from srengine.client.operations import check_key, check_value
from srengine.client.tables import AsyncTable, TableRecord

_Result = TypeVar("_Result")
_MISSING: Final = cast("bytes", object())
"""Tells a default that was not given from None."""
CLEAR_KEYS_MAX: Final = 4096


class Client:
    """A cluster client for threads, the twin of `AsyncClient`: same names, arguments and errors.

    Use it in a ``with`` block or call `close`. Nothing is sent until the first call.
    """

    def __init__(
        self,
        endpoints: str | Iterable[str] = routing.DEFAULT_ENDPOINT,
        *,
        token: str | None = None,
        key_file: str | None = None,
        server_key: str | None = None,
        timeout_s: float = TIMEOUT_S_DEFAULT,
        source: Callable[[], ChannelSource] | None = None,
    ) -> None:
        self._client = AsyncClient(
            endpoints, token=token, key_file=key_file, server_key=server_key, timeout_s=timeout_s
        )
        self._make_source = source
        """Called on the loop, because sockets belong to it."""
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._pid = os.getpid()

    @property
    def timeout_s(self) -> float:
        """Seconds that one call may take, retries and failover included."""
        return self._client.timeout_s

    def table(self, name: str) -> Table:
        """Return the table ``database.table``; see `AsyncClient.table`."""
        return Table(self, self._client.table(name))

    def create_database(self, name: str, *, if_missing: bool = False) -> None:
        """Create a database; see `AsyncClient.create_database`."""
        self._run(self._client.create_database(name, if_missing=if_missing))

    def list_databases(self) -> list[str]:
        """Return the names of all databases; see `AsyncClient.list_databases`."""
        return self._run(self._client.list_databases())

    def create_table(
        self, name: str, *, tablets: int = 8, replicas: int = 3, if_missing: bool = False
    ) -> messages.TableInfo:
        """Create a table; see `AsyncClient.create_table`."""
        return self._run(self._client.create_table(name, tablets=tablets, replicas=replicas, if_missing=if_missing))

    def list_tables(self, database: str = "") -> list[messages.TableInfo]:
        """Return all tables; see `AsyncClient.list_tables`."""
        return self._run(self._client.list_tables(database))

    def describe_table(self, name: str) -> messages.TableInfo:
        """Return one table; see `AsyncClient.describe_table`."""
        return self._run(self._client.describe_table(name))

    def status(self, node: str = "") -> dict[str, Any]:
        """Return the cluster at a glance; see `AsyncClient.status`."""
        return self._run(self._client.status(node))

    def members(self) -> list[dict[str, Any]]:
        """Return the members; see `AsyncClient.members`."""
        return self._run(self._client.members())

    def list_members(self) -> messages.MemberList:
        """Return the members as the journal has them; see `AsyncClient.list_members`."""
        return self._run(self._client.list_members())

    def add_member(self, name: str, *, role: str = "follower", public_key: str = "") -> str:
        """Return a ticket for a new node; see `AsyncClient.add_member`."""
        return self._run(self._client.add_member(name, role=role, public_key=public_key))

    def remove_member(self, name: str, *, force: bool = False) -> None:
        """Remove a member; see `AsyncClient.remove_member`."""
        self._run(self._client.remove_member(name, force=force))

    def update_address(self, name: str, address: str) -> None:
        """Change a member's address; see `AsyncClient.update_address`."""
        self._run(self._client.update_address(name, address))

    def set_role(self, name: str, role: str) -> None:
        """Make a member a follower or an observer; see `AsyncClient.set_role`."""
        self._run(self._client.set_role(name, role))

    def transfer_leader(self, target: str | None = None) -> str:
        """Hand leadership over; see `AsyncClient.transfer_leader`."""
        return self._run(self._client.transfer_leader(target))

    def put_register(self, name: str, value: bytes, *, if_version: int | None = None) -> int:
        """Set a small named value; see `AsyncClient.put_register`."""
        return self._run(self._client.put_register(name, value, if_version=if_version))

    def get_register(self, name: str) -> messages.Register:
        """Return a small named value; see `AsyncClient.get_register`."""
        return self._run(self._client.get_register(name))

    def sync_status(self, table: str = "") -> list[dict[str, Any]]:
        """Return the state of each replica; see `AsyncClient.sync_status`."""
        return self._run(self._client.sync_status(table))

    def sync_run(self, table: str = "", *, timeout_s: float = 600.0) -> list[dict[str, Any]]:
        """Have all replicas checked, compared and repaired now; see `AsyncClient.sync_run`."""
        return self._run(self._client.sync_run(table, timeout_s=timeout_s))

    def close(self) -> None:
        """Close all connections and end the thread. A second close does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is None or thread is None or os.getpid() != self._pid:
            return
        asyncio.run_coroutine_threadsafe(_close(self._client), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        """Run one call on the loop thread; an interrupted wait cancels it."""
        try:
            loop = self._running_loop()
        except errors.Error:
            coroutine.close()
            raise
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError as error:
            if self._closed:
                raise errors.Closed("the client was closed during the call") from error
            raise
        except BaseException:
            future.cancel()
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if os.getpid() != self._pid:
            raise errors.ForkedEnvironment("the client was made before a fork; make another in the child")
        with self._lock:
            if self._closed:
                raise errors.Closed("the client is closed")
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(
                    target=self._serve, args=(self._loop,), name="srengine-client", daemon=True
                )
                self._thread.start()
            return self._loop

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        if self._make_source is not None:
            loop.call_soon(lambda: self._client._use(cast("Callable[[], ChannelSource]", self._make_source)()))
        loop.run_forever()


async def _close(client: AsyncClient) -> None:
    """Close the client and end what still runs on its loop."""
    await client.close()
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Table(MutableMapping[bytes, bytes]):
    """One table of a cluster as a mapping of bytes to bytes, in key order; the twin of `AsyncTable`.

    Reads of the mapping are ``quorum`` reads, writes ``quorum`` writes. ``len`` scans the keys. `pop`, `popitem` and
    `setdefault` are atomic for their key. Keys and values are ``bytes``; anything else is a `TypeError`.
    """

    def __init__(self, client: Client, table: AsyncTable) -> None:
        self._client = client
        self._table = table

    @property
    def name(self) -> str:
        """``database.table``."""
        return self._table.name

    def __repr__(self) -> str:
        return f"<Table {self.name}>"

    # --- the mapping -------------------------------------------------------------------------------------------------

    def __getitem__(self, key: bytes) -> bytes:
        record = self.get_record(key)
        if record is None:
            raise KeyError(key)
        return record.value

    def __setitem__(self, key: bytes, value: bytes) -> None:
        self.put(key, value)

    def __delitem__(self, key: bytes) -> None:
        if not self.delete(key):
            raise KeyError(key)

    def __contains__(self, key: object) -> bool:
        return self.get_record(cast("bytes", key)) is not None

    def __len__(self) -> int:
        return self._client._run(self._table.count())

    def __bool__(self) -> bool:
        return next(iter(self), None) is not None

    def __iter__(self) -> Iterator[bytes]:
        for page in self._pages(keys_only=True):
            for key, _ in page:
                yield key

    def __reversed__(self) -> Iterator[bytes]:
        for page in self._pages(keys_only=True, reverse=True):
            for key, _ in page:
                yield key

    def keys(self) -> KeysView[bytes]:
        """Return the keys in order, read as they are asked for."""
        return KeysView(self)

    def items(self) -> ItemsView[bytes, bytes]:
        """Return the pairs in key order, read as they are asked for."""
        return _ScanItems(self)

    def values(self) -> ValuesView[bytes]:
        """Return the values in the order of their keys, read as they are asked for."""
        return _ScanValues(self)

    @overload  # type: ignore[override]
    def pop(self, key: bytes) -> bytes: ...
    @overload
    def pop(self, key: bytes, default: bytes | None) -> bytes | None: ...
    def pop(self, key: bytes, default: bytes | None = _MISSING) -> bytes | None:
        """Delete ``key`` and return its value; ``default`` (or KeyError) when there is none. Atomic for the key."""
        value = self._client._run(self._table.pop(check_key(key)))
        if value is not None:
            return value
        if default is _MISSING:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[bytes, bytes]:
        """Delete the first pair and return it; KeyError when the table is empty. Atomic for the key."""
        while True:
            key = next(iter(self), None)
            if key is None:
                raise KeyError("the table is empty")
            value = self.pop(key, None)
            if value is not None:
                return key, value

    def setdefault(self, key: bytes, default: bytes | None = None) -> bytes:
        """Return the value of ``key``; when there is none, store ``default`` and return it. Atomic for the key."""
        return self._client._run(self._table.setdefault(check_key(key), check_value(cast("bytes", default))))

    def clear(self) -> None:
        """Delete every key that the table holds now, in batches."""
        batch: list[bytes] = []
        for key in self:
            batch.append(key)
            if len(batch) == CLEAR_KEYS_MAX:
                self.delete_many(batch)
                batch = []
        self.delete_many(batch)

    def update(self, other: Any = (), /, **pairs: Any) -> None:
        """Store all pairs of ``other`` (a mapping or pairs), as `put_many` does."""
        if pairs:
            raise TypeError("keys are bytes; keyword arguments are not")
        if hasattr(other, "keys") and not isinstance(other, Mapping):
            other = [(key, other[key]) for key in other.keys()]  # noqa: SIM118 - only keys() is promised
        self.put_many(other)

    # --- the same names as AsyncTable --------------------------------------------------------------------------------

    @overload  # type: ignore[override]
    def get(self, key: bytes, *, consistency: str = "quorum") -> bytes | None: ...
    @overload
    def get(self, key: bytes, default: bytes, *, consistency: str = "quorum") -> bytes: ...
    @overload
    def get(self, key: bytes, default: None, *, consistency: str = "quorum") -> bytes | None: ...
    def get(self, key: bytes, default: bytes | None = None, *, consistency: str = "quorum") -> bytes | None:
        """Return the value of ``key``, or ``default``; see `AsyncTable.get`."""
        return self._client._run(self._table.get(key, default, consistency=consistency))

    def get_record(self, key: bytes, *, consistency: str = "quorum") -> TableRecord | None:
        """Return value and version of ``key``, or None; see `AsyncTable.get_record`."""
        return self._client._run(self._table.get_record(key, consistency=consistency))

    def get_many(self, keys: Iterable[bytes], *, consistency: str = "quorum") -> dict[bytes, bytes]:
        """Return the values of those ``keys`` that exist; see `AsyncTable.get_many`."""
        return self._client._run(self._table.get_many(list(keys), consistency=consistency))

    def put(
        self,
        key: bytes,
        value: bytes,
        *,
        if_absent: bool = False,
        if_version: int | None = None,
        consistency: str = "quorum",
    ) -> int:
        """Store ``value``; return its version; see `AsyncTable.put`."""
        return self._client._run(
            self._table.put(key, value, if_absent=if_absent, if_version=if_version, consistency=consistency)
        )

    def delete(self, key: bytes, *, if_version: int | None = None, consistency: str = "quorum") -> bool:
        """Delete ``key``; return whether it existed; see `AsyncTable.delete`."""
        return self._client._run(self._table.delete(key, if_version=if_version, consistency=consistency))

    def put_many(
        self, pairs: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]], *, consistency: str = "quorum"
    ) -> int:
        """Store all pairs, all or nothing for each tablet; see `AsyncTable.put_many`."""
        return self._client._run(self._table.put_many(_read_here(pairs), consistency=consistency))

    def delete_many(self, keys: Iterable[bytes], *, consistency: str = "quorum") -> int:
        """Delete all ``keys``; return how many existed; see `AsyncTable.delete_many`."""
        return self._client._run(self._table.delete_many(list(keys), consistency=consistency))

    def scan(
        self,
        *,
        start: bytes | None = None,
        stop: bytes | None = None,
        prefix: bytes | None = None,
        reverse: bool = False,
        limit: int | None = None,
        consistency: str = "quorum",
    ) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) in key order; see `AsyncTable.scan`."""
        for page in self._pages(
            start=start, stop=stop, prefix=prefix, reverse=reverse, limit=limit, consistency=consistency
        ):
            yield from page

    def _pages(self, **options: Any) -> Iterator[list[tuple[bytes, bytes]]]:
        pages = self._table.pages(**options)
        while True:
            page = self._client._run(_next_page(pages))
            if page is None:
                return
            yield page


class _ScanItems(ItemsView[bytes, bytes]):
    """Pairs from one scan, where the inherited view would ask for each value by itself."""

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return cast("Table", self._mapping).scan()  # type: ignore[attr-defined]


class _ScanValues(ValuesView[bytes]):
    def __iter__(self) -> Iterator[bytes]:
        return (value for _, value in cast("Table", self._mapping).scan())  # type: ignore[attr-defined]


async def _next_page(pages: Any) -> list[tuple[bytes, bytes]] | None:
    return cast("list[tuple[bytes, bytes]] | None", await anext(pages, None))


def _read_here(
    pairs: Mapping[bytes, bytes] | Iterable[tuple[bytes, bytes]],
) -> Mapping[bytes, bytes] | list[tuple[bytes, bytes]]:
    """Run the caller's iterator on the caller's thread: it may use this very client."""
    return dict(pairs) if isinstance(pairs, Mapping) else list(pairs)
