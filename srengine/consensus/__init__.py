"""Raft as one machine without input or output, the same for every group: the cluster's journal and, later, each tablet.

`entries` has what is stored, `messages` what is sent, `effects` what goes in and comes out of `machine.RaftMachine`;
`log` keeps the entries and hard state of all groups of a node in one environment, `driver` runs many machines over one
log and one transport.
"""
