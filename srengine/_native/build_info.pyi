"""Facts about this build; the module is written by setup.py."""

LMDB_VERSION: str
LMDB_PATCHED: bool
SYSTEM_LIBS: bool
