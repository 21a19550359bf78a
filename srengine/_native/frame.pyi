"""The head of a frame, made and proved in one call."""

def sealed(body: bytes, data_bytes: int, data_checksum: int) -> bytes:
    """Return head and ``body`` in one piece."""

def proved(first: bytes, data_bytes: int) -> int:
    """Return the checksum that the head declares for the data; -1 unless head and body are whole and declare
    ``data_bytes``.
    """
