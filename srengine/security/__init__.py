"""Who a process is, and whom it lets in.

::

    keys.py        a node's or client's CURVE key pair, in a private file
    admission.py   the allow-list that the transport asks for each handshake
    proof.py       the start-up self-test: strangers stay out, with the door-keeper alive and dead

Encryption and the proof of key ownership are CURVE's, inside the transport; this room only decides and keeps secrets.
"""

from __future__ import annotations

from srengine.security.admission import AllowList, load_allow_list
from srengine.security.keys import (
    create_key_file,
    ensure_node_keys,
    format_public_key,
    load_key_file,
    load_node_keys,
    parse_public_key,
)
from srengine.security.proof import prove_closed

__all__ = [
    "AllowList",
    "create_key_file",
    "ensure_node_keys",
    "format_public_key",
    "load_allow_list",
    "load_key_file",
    "load_node_keys",
    "parse_public_key",
    "prove_closed",
]
