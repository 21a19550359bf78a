"""One process that claims epochs: ``python -m tests.contender NAME ADDRESS``.

For each line ``{"epoch": …, "term": …, "digest": …}`` on stdin it claims the epoch behind that one, at the node of
``ADDRESS`` (tests/journal_node.py), and says on stdout what became of it: ``true`` or ``false``. A claim whose answer
is lost is asked again with the same request id.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys

from srengine.ha.epochs import Fence
from srengine.transport import Endpoint, Identity
from tests.contending import Claim, GetEpoch, ask


async def contend(name: str, address: str) -> None:
    endpoint = Endpoint(Identity(version="test"))
    channel = endpoint.channel(address)
    node_id = secrets.token_hex(16)
    await ask(channel, GetEpoch())
    while line := await asyncio.to_thread(sys.stdin.readline):
        before = json.loads(line)
        fence = Fence(
            before["epoch"] + 1, node_id, name, before["term"], before["epoch"], bytes.fromhex(before["digest"])
        )
        claimed = await ask(channel, Claim(fence, secrets.token_bytes(16)))
        sys.stdout.write(json.dumps(claimed.won) + "\n")
        sys.stdout.flush()
    await endpoint.close()


if __name__ == "__main__":
    asyncio.run(contend(*sys.argv[1:]))
