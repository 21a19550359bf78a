"""Tablets as groups: writes, reads, catch-up.

* `slots`      this node's copy of a tablet, whatever state it is in
* `leading`    the first member's side: commit, acknowledge, read
* `following`  a replica's side: pull, apply, copy, read locally
* `copying`    deltas and copies between two nodes
* `service`    all tablets of a node

The machines behind are those of `srengine.ha`: the journal and every tablet are groups of one kind.
"""
