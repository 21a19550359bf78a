"""A random story of three real nodes: writers and readers all the time, kills, pauses, wiped and restored disks."""

from __future__ import annotations

import random
import shutil
import threading
import time
from pathlib import Path

import pytest

from srengine import errors
from srengine.client import messages, packing
from tests.node.cluster import Asker, tablet_of
from tests.processes import Nodes, wait_for

pytestmark = pytest.mark.processes
TABLE = "shop.orders"
KEYS = [b"key-%02d" % number for number in range(24)]


class Writer(threading.Thread):
    """Counts keys up at random nodes; ``acknowledged``: key -> [(moment, count)], ``tried``: key -> highest count."""

    def __init__(self, nodes: Nodes, seed: int) -> None:
        super().__init__(daemon=True)
        self.addresses = [node.address for node in nodes]
        self.random = random.Random(seed)
        self.acknowledged: dict[bytes, list[tuple[float, int]]] = {key: [] for key in KEYS}
        self.tried = dict.fromkeys(KEYS, 0)
        self.done = threading.Event()

    def run(self) -> None:
        with Asker() as asker:
            while not self.done.is_set():
                key = self.random.choice(KEYS)
                self.tried[key] += 1
                count = self.tried[key]
                address = self.random.choice(self.addresses)
                try:
                    asker.write(address, TABLE, {key: b"%d" % count}, timeout_s=3)
                except errors.Error:
                    continue
                self.acknowledged[key].append((time.time(), count))


class Reader(threading.Thread):
    """Reads locally at every node; ``wrong`` collects what must not be."""

    def __init__(self, nodes: Nodes, writer: Writer) -> None:
        super().__init__(daemon=True)
        self.addresses = [node.address for node in nodes]
        self.writer = writer
        self.right = 0
        self.wrong: list[str] = []
        self.done = threading.Event()

    def run(self) -> None:
        chooser = random.Random(1)
        with Asker() as asker:
            while not self.done.is_set():
                key, address = chooser.choice(KEYS), chooser.choice(self.addresses)
                message = messages.Read(TABLE, tablet_of(key, 2), (key,), "local", timeout_s=0.2)
                try:
                    reply = asker.ask(address, message, timeout_s=2)
                except errors.Error:
                    continue
                (record,) = packing.unpack_records(packing.single(reply.attachments), 1)
                count = int(record.value or b"0")
                known = [seen for moment, seen in list(self.writer.acknowledged[key]) if moment <= reply.message.as_of]
                if count < max(known, default=0) or count > self.writer.tried[key]:
                    self.wrong.append(
                        f"{address} says {key!r} = {count} as of {reply.message.as_of}, known {known[-3:]}"
                    )
                self.right += 1


@pytest.mark.parametrize("seed", [1])
def test_random_story(nodes: Nodes, asker: Asker, tmp_path: Path, seed: int) -> None:
    """K21, F13, F14, F21: no acknowledged write is lost, local reads are as current as they say, all end equal."""
    tell(nodes, asker, tmp_path, seed, chapters=5)


def tell(nodes: Nodes, asker: Asker, tmp_path: Path, seed: int, *, chapters: int) -> None:
    chooser = random.Random(seed)
    one = nodes["node-1"].address
    asker.create(one, TABLE, tablets=2)
    writer = Writer(nodes, seed)
    reader = Reader(nodes, writer)
    writer.start()
    reader.start()
    for chapter in range(chapters):
        node = nodes[f"node-{chooser.randint(1, 3)}"]
        what = chooser.choice(["kill", "kill", "pause", "restore", "wipe"])
        if what == "pause":
            node.pause()
            stand(writer, chooser.uniform(0.5, 4))
            node.go_on()
        elif what == "kill":
            node.kill()
            stand(writer, chooser.uniform(0.0, 2))
            node.start().wait_ready()
        else:
            node.kill()
            yesterday = tmp_path / f"yesterday-{chapter}"
            shutil.copytree(node.data, yesterday)
            node.start().wait_ready()
            stand(writer, 1.5)
            node.kill()
            shutil.rmtree(node.data)
            if what == "restore" or node.name == "node-1":
                shutil.copytree(yesterday, node.data)
            node.start().wait_ready()
        wait_for(lambda: in_step(asker, one), f"all replicas current after {what} of {node.name}", 60)
    for thread in (reader, writer):
        thread.done.set()
        thread.join()
    assert reader.wrong == []
    assert reader.right
    wait_for(lambda: asker.settled(one, TABLE), "all replicas equal")
    for node in nodes:
        found = asker.everything(node.address, TABLE, consistency="local")
        for key in KEYS:
            count = int(found.get(key, b"0"))
            last = max((seen for _, seen in writer.acknowledged[key]), default=0)
            assert last <= count <= writer.tried[key], (node.name, key, last, count)
    assert sum(map(len, writer.acknowledged.values())) > 20


def stand(writer: Writer, seconds: float) -> None:
    """Let the writer go on for a while."""
    writer.done.wait(seconds)


def in_step(asker: Asker, address: str) -> bool:
    try:
        return all(replica["state"] == "SYNCED" for replica in asker.replicas(address, TABLE))
    except errors.Error:
        return False
