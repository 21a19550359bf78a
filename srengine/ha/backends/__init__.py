"""Backends of `protocol.HAProtocol`: each holds election, epochs and journal in its own way."""
