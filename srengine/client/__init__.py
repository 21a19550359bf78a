"""The cluster seen from a program: `Client` for threads, `AsyncClient` for asyncio, both with the same names.

messages    what client and node say to each other
packing     the bulk bytes beside the messages
routing     which node to ask
calls       retries, redirects, failover within one deadline
sessions    request ids: a repeated write happens once
tables      reads and writes of a table: every rule once
asynchronous, blocking    the two faces
link        the one place that touches transport and keys
"""

from srengine.client.asynchronous import AsyncClient
from srengine.client.blocking import Client, Table
from srengine.client.connecting import connect
from srengine.client.tables import AsyncTable, TableRecord

__all__ = ["AsyncClient", "AsyncTable", "Client", "Table", "TableRecord", "connect"]
