"""Request ids: a command that comes twice is applied once, so no two commands may share one."""

from __future__ import annotations

import os
import threading

from srengine.ha.journal import REQUEST_BYTES, new_request


def test_request_ids_are_never_given_twice():
    """Many threads draw ids, more than are drawn from the system at a time, and all of them differ."""
    drawn: list[list[bytes]] = [[] for _ in range(8)]
    start = threading.Barrier(len(drawn))

    def draw(into):
        start.wait()
        into.extend(new_request() for _ in range(2000))

    threads = [threading.Thread(target=draw, args=(into,)) for into in drawn]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [request for into in drawn for request in into]
    assert len(set(found)) == len(found) == 16_000
    assert {len(request) for request in found} == {REQUEST_BYTES}


def test_a_forked_child_draws_other_ids():
    """What the parent has drawn and not used yet is the parent's alone."""
    new_request()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"".join(new_request() for _ in range(100)))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        theirs = pipe.read()
    assert os.waitpid(child, 0) == (child, 0)
    ours = {new_request() for _ in range(300)}
    assert len(theirs) == 100 * REQUEST_BYTES
    assert not ours & {theirs[at : at + REQUEST_BYTES] for at in range(0, len(theirs), REQUEST_BYTES)}
