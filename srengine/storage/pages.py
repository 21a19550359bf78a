"""Read an LMDB file page by page, with bounds, without LMDB.

LMDB maps its file and trusts it. A file that ends before a page that a tree names kills the process with SIGBUS, and a
damaged page number or node size reads wherever it points. So nothing is given to LMDB that this module has not looked
at when there is a reason to (`check_before_open`), and the offline check reads every page through it (`walk`).

A file is a row of pages of one size. Page 0 and 1 are meta pages; a transaction commit writes its data pages anywhere
but over pages in use, syncs, and then overwrites the *older* meta page, so one of the two always describes a whole
tree::

    page 0   meta, transaction 8 ----.         .-> leaf: key -> value
    page 1   meta, transaction 9 --. |   branch ---> leaf: key -> (page 77) -> overflow pages 77, 78, 79
    page 2   ...                   | '-> main --+--> leaf: name -> root of a named tree ("records", "changes", "meta")
    ...                            '---> free     transaction -> pages that it freed
    last page

Every page is either reachable from the newest meta page, or listed as free, or one of the two metas: exactly once.
What is checked of a file, each violation named with its page:

* both meta pages: marks, version, page size, the last page, transaction numbers that alternate;
* each page: its own number and kind, nodes within bounds, packed without gaps, keys in order and within the
  separators above them; overflow runs of the right length; entry and page counts of each tree;
* the free list: page numbers in order, once, not in use;
* no page is reached twice and none is lost.

Bytes in unused space are not looked at, and neither are values: LMDB has no checksums; the tablet's own do that part.

Only files of 64-bit little-endian machines and of data version 1 (LMDB 0.9) are read; others are `ForeignData`. The
reader never writes; `check_before_open` alone may make a healthy file longer. It never holds more than a page and a
bitmap of the file, and its work is bounded by the file's size whatever the bytes say, because no page is read twice.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar

from srengine import errors
from srengine.storage import files

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import TracebackType

DATA_NAME: Final = "data.mdb"
DAMAGES_MAX: Final = 1000
"""Damages kept of one file; the rest is only counted. A report is read by people."""
PAGE_BYTES_MIN: Final = 512
PAGE_BYTES_MAX: Final = 65536
DEPTH_MAX: Final = 32
"""LMDB's own cursor stack."""

_MAGIC: Final = 0xBEEFC0DE
_DATA_VERSION: Final = 1
_INVALID_PAGE: Final = 2**64 - 1
_HEADER_BYTES: Final = 16
_NODE_BYTES: Final = 8
_HEADER: Final = struct.Struct("<QHHHH")  # page number, pad, flags, lower, upper
_OVERFLOW_COUNT: Final = struct.Struct("<I")
_TREE: Final = struct.Struct("<IHHQQQQQ")  # pad, flags, depth, branch, leaf, overflow pages, entries, root
_META: Final = struct.Struct("<IIQQ")  # magic, version, address, map size
_META_TAIL: Final = struct.Struct("<QQ")  # last page, transaction
_META_BYTES: Final = _META.size + 2 * _TREE.size + _META_TAIL.size
_NODE: Final = struct.Struct("<HHHH")  # low, high, flags, key size
_PAGE_NUMBER: Final = struct.Struct("<Q")

_P_BRANCH: Final = 0x01
_P_LEAF: Final = 0x02
_P_OVERFLOW: Final = 0x04
_P_META: Final = 0x08
_P_DIRTY: Final = 0x10
_P_LEAF2: Final = 0x20
_P_SUBPAGE: Final = 0x40

_F_BIG: Final = 0x01
_F_SUBTREE: Final = 0x02
_F_DUPLICATES: Final = 0x04

_DB_REVERSE_KEY: Final = 0x02
_DB_DUPLICATES: Final = 0x04
_DB_INTEGER_KEY: Final = 0x08
_DB_DUPLICATES_FIXED: Final = 0x10

_Rank = TypeVar("_Rank", bytes, int)

assert _META_BYTES == 136, _META_BYTES
assert _TREE.size == 48, _TREE.size


class Tree(NamedTuple):
    """Root and counts of one tree as the file states them."""

    name: str
    pad: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int | None


class Meta(NamedTuple):
    """One meta page. ``last_page`` is the highest page number ever used; the file may be shorter (see module)."""

    page: int
    page_bytes: int
    map_bytes: int
    last_page: int
    transaction: int
    free: Tree
    main: Tree

    @property
    def bytes_claimed(self) -> int:
        """Length of a file that holds every page up to the last one."""
        return (self.last_page + 1) * self.page_bytes


class PageDamage(NamedTuple):
    """One thing that is wrong in a file. ``page`` is None when it is no single page's."""

    kind: str
    page: int | None
    tree: str
    detail: str


@dataclass(slots=True)
class PageReport:
    """What `walk` found.

    ``pages`` counts the pages the file has, ``reached`` those that a tree uses, ``free`` those listed as free.
    ``beyond_end`` says that a page in use lies past the end of the file: opening it would be a crash.
    ``damages_dropped`` counts damages past `DAMAGES_MAX`.
    """

    bytes: int = 0
    pages: int = 0
    reached: int = 0
    free: int = 0
    entries: int = 0
    meta: Meta | None = None
    damages: list[PageDamage] = field(default_factory=list)
    damages_dropped: int = 0
    beyond_end: bool = False

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong."""
        return not self.damages

    def add(self, kind: str, page: int | None, tree: str, detail: str) -> None:
        """Record a damage, or count it when there are too many."""
        if len(self.damages) < DAMAGES_MAX:
            self.damages.append(PageDamage(kind, page, tree, detail))
        else:
            self.damages_dropped += 1


class _BadPageError(Exception):
    """Internal: the page cannot be used; the walk records it and goes on with the next."""

    def __init__(self, kind: str, page: int, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind
        self.page = page
        self.detail = detail


class PageFile:
    """An LMDB data file opened for reading by pread. Use as a context manager.

    The file must not be open in LMDB in this process (closing the descriptor would drop LMDB's locks on some
    systems) and must not change meanwhile. Raises `NotFound`, `InvalidValue` (a symbolic link, no plain file), and
    `ForeignData` or `CorruptionError` from `metas` and `newest`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with files.Directory(path.parent) as directory:
            self._fd = directory.open(path.name, os.O_RDONLY | os.O_NONBLOCK)
        status = os.fstat(self._fd)
        self.bytes = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise errors.InvalidValue(f"{path} is not a plain file", path=str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def read(self, offset: int, length: int) -> bytes:
        """Return up to ``length`` bytes from ``offset``; fewer only at the end of the file."""
        parts = []
        while length > 0:
            try:
                part = os.pread(self._fd, min(length, 1 << 26), offset)
            except OSError as error:
                if error.errno == errno.EIO:
                    raise errors.CorruptionError(
                        f"{self.path} cannot be read at byte {offset}: {error.strerror}",
                        file=str(self.path),
                        offset=offset,
                    ) from error
                raise files.from_os_error(error, f"cannot read {self.path}") from error
            if not part:
                break
            parts.append(part)
            offset += len(part)
            length -= len(part)
        return b"".join(parts)

    # --- meta pages --------------------------------------------------------------------------------------------------

    def metas(self) -> tuple[Meta, Meta]:
        """Return both meta pages.

        Raises `TruncatedTablet` (too short for them), `ForeignData` (no LMDB file, another version or byte order) or
        `CorruptionError` (a meta page is damaged), each naming the page.
        """
        if self.bytes == 0:
            raise errors.TruncatedTablet(f"{self.path} is empty", file=str(self.path), bytes=0)
        first = self._meta(0, 0)
        return first, self._meta(1, first.page_bytes)

    def newest(self) -> Meta:
        """Return the meta page that LMDB would use: the one with the higher transaction number."""
        first, second = self.metas()
        return second if second.transaction > first.transaction else first

    def _meta(self, page: int, offset: int) -> Meta:
        raw = self.read(offset, _HEADER_BYTES + _META_BYTES)
        where = f"meta page {page} of {self.path}"
        facts = {"file": str(self.path), "page": page}
        if len(raw) < _HEADER_BYTES + _META_BYTES:
            if page == 0 and len(raw) >= _HEADER_BYTES + 4 and _magic(raw) != _MAGIC:
                raise errors.ForeignData(f"{self.path} is not an LMDB file", **facts)
            raise errors.TruncatedTablet(f"{self.path} ends inside its meta pages", bytes=self.bytes, **facts)
        number, _, flags, _, _ = _HEADER.unpack_from(raw)
        magic, version, _, map_bytes = _META.unpack_from(raw, _HEADER_BYTES)
        free = _tree("free", raw, _HEADER_BYTES + _META.size)
        main = _tree("main", raw, _HEADER_BYTES + _META.size + _TREE.size)
        last_page, transaction = _META_TAIL.unpack_from(raw, _HEADER_BYTES + _META.size + 2 * _TREE.size)
        page_bytes = free.pad
        if magic != _MAGIC:
            if page == 0 and (number != 0 or flags != _P_META):
                # Not even the rest looks like a meta page.
                raise errors.ForeignData(f"{self.path} is not an LMDB file", **facts)
            raise errors.CorruptionError(f"{where} is damaged: wrong mark", **facts)
        if version != _DATA_VERSION:
            raise errors.ForeignData(
                f"{where} has data version {version}, not {_DATA_VERSION} (LMDB 0.9)", version=version, **facts
            )
        if number != page or flags != _P_META:
            raise errors.CorruptionError(f"{where} is damaged: page {number}, flags {flags:#x}", **facts)
        if not PAGE_BYTES_MIN <= page_bytes <= PAGE_BYTES_MAX or page_bytes & (page_bytes - 1):
            raise errors.CorruptionError(f"{where} is damaged: page size {page_bytes}", **facts)
        if last_page < 1 or (last_page + 1) * page_bytes > 1 << 62:
            raise errors.CorruptionError(f"{where} is damaged: last page {last_page}", **facts)
        return Meta(page, page_bytes, map_bytes, last_page, transaction, free, main)

    # --- content -----------------------------------------------------------------------------------------------------

    def tables(self, *, skip_damage: bool = False) -> dict[str, Tree]:
        """Return the named trees of the newest meta page. Raises `CorruptionError` where `walk` would name a page."""
        meta = self.newest()
        found: dict[str, Tree] = {}
        for key, value, flags in self._items(meta, meta.main, skip_damage=skip_damage):
            if flags & _F_SUBTREE and len(value) == _TREE.size:
                name = key.decode("ascii", "backslashreplace")
                found[name] = _tree(name, value, 0)
        return found

    def items(self, table: str, *, skip_damage: bool = False) -> Iterator[tuple[bytes, bytes]]:
        """Yield key and value of every entry of a named tree without duplicates, in its order.

        For checks and tests: it is slow beside LMDB. With ``skip_damage`` what cannot be read is left out. Raises
        `NotFound` and `CorruptionError`.
        """
        tree = self.tables(skip_damage=skip_damage).get(table)
        if tree is None:
            raise errors.NotFound(f"{self.path} has no table {table!r}", table=table)
        for key, value, _ in self._items(self.newest(), tree, skip_damage=skip_damage):
            yield key, value

    def _items(self, meta: Meta, tree: Tree, *, skip_damage: bool) -> Iterator[tuple[bytes, bytes, int]]:
        walker = _Walker(self, meta, PageReport())
        try:
            yield from walker.items(tree, skip_damage=skip_damage)
        except _BadPageError as bad:
            raise errors.CorruptionError(
                f"page {bad.page} of {self.path} is damaged: {bad.detail}", file=str(self.path), page=bad.page
            ) from bad


def _magic(raw: bytes) -> int:
    return int.from_bytes(raw[_HEADER_BYTES : _HEADER_BYTES + 4], "little")


def _tree(name: str, raw: bytes, offset: int) -> Tree:
    pad, flags, depth, branch, leaf, overflow, entries, root = _TREE.unpack_from(raw, offset)
    return Tree(name, pad, flags, depth, branch, leaf, overflow, entries, None if root == _INVALID_PAGE else root)


class _Tally:
    """Pages and entries of one tree as they were met."""

    __slots__ = ("branch", "entries", "leaf", "overflow")

    def __init__(self) -> None:
        self.branch = self.leaf = self.overflow = self.entries = 0


class _Node(NamedTuple):
    key: bytes
    flags: int
    child: int
    """Branch: the page below. Leaf with `_F_BIG`: the first overflow page."""
    value_bytes: int
    value: bytes


class _Walker:
    """One pass over a file under one meta page. Every page is taken at most once (`_seen`)."""

    def __init__(self, file: PageFile, meta: Meta, report: PageReport) -> None:
        self.file = file
        self.meta = meta
        self.report = report
        self.page_bytes = meta.page_bytes
        self.pages_in_file = file.bytes // meta.page_bytes
        self._seen = bytearray(min(self.pages_in_file, meta.last_page + 1) // 8 + 1)
        self._take(0)
        self._take(1)

    # --- pages -------------------------------------------------------------------------------------------------------

    def _take(self, page: int) -> None:
        index, bit = page >> 3, 1 << (page & 7)
        if index < len(self._seen):
            self._seen[index] |= bit

    def taken(self, page: int) -> bool:
        """Return whether a tree or the free list has named the page."""
        index = page >> 3
        return index < len(self._seen) and bool(self._seen[index] & (1 << (page & 7)))

    def _check_number(self, page: int, count: int = 1) -> None:
        """Refuse a page number that no healthy file has here, before anything is read."""
        if page < 2 or page + count - 1 > self.meta.last_page:
            raise _BadPageError("page-number", page, f"page {page} is not within 2 to {self.meta.last_page}")
        if page + count > self.pages_in_file:
            self.report.beyond_end = True
            raise _BadPageError("beyond-end", page, f"page {page + count - 1} lies past the end of the file")
        for one in range(page, page + count):
            if self.taken(one):
                raise _BadPageError("used-twice", one, f"page {one} is used twice")

    def page(self, number: int, wanted: int) -> tuple[bytes, int, int]:
        """Return (bytes, flags, number of nodes) of a branch or leaf page and take it.

        ``wanted`` is the kind that the depth asks for.
        """
        self._check_number(number)
        self._take(number)
        self.report.reached += 1
        raw = self.file.read(number * self.page_bytes, self.page_bytes)
        own, pad, flags, lower, upper = _HEADER.unpack_from(raw)
        if own != number:
            raise _BadPageError("page-header", number, f"page {number} says that it is page {own}")
        if flags & ~_P_LEAF2 != wanted or (flags & _P_LEAF2 and wanted != _P_LEAF):
            raise _BadPageError("page-header", number, f"page {number} has flags {flags:#x}, wanted {wanted:#x}")
        if lower < _HEADER_BYTES or lower & 1 or (not flags & _P_LEAF2 and not lower <= upper <= self.page_bytes):
            raise _BadPageError("page-header", number, f"page {number} has bounds {lower} to {upper}")
        count = (lower - _HEADER_BYTES) // 2
        if count == 0:
            raise _BadPageError("page-header", number, f"page {number} has no nodes")
        if flags & _P_LEAF2 and (pad == 0 or count * pad > self.page_bytes - _HEADER_BYTES):
            raise _BadPageError("page-header", number, f"page {number} has {count} fixed entries of {pad} bytes")
        return raw, flags, count

    def nodes(self, number: int, raw: bytes, count: int, *, branch: bool) -> list[_Node]:
        """Return the nodes of a page, all of them within it, packed and not overlapping."""
        _, _, _, lower, upper = _HEADER.unpack_from(raw)
        offsets = struct.unpack_from(f"<{count}H", raw, _HEADER_BYTES)
        if len(set(offsets)) != count:
            raise _BadPageError("node", number, f"page {number} has two nodes at one place")
        end = len(raw)
        found = []
        used = 0
        for offset in offsets:
            if offset < upper or offset < lower or offset & 1 or offset + _NODE_BYTES > end:
                raise _BadPageError("node", number, f"page {number} has a node at byte {offset}")
            low, high, flags, key_bytes = _NODE.unpack_from(raw, offset)
            key_at = offset + _NODE_BYTES
            if branch:
                size, child, stored, flags = 0, low | high << 16 | flags << 32, 0, 0
            else:
                size = low | high << 16
                child = 0
                if flags & ~(_F_BIG | _F_SUBTREE | _F_DUPLICATES):
                    raise _BadPageError("node", number, f"page {number} has a node with flags {flags:#x}")
                stored = _PAGE_NUMBER.size if flags & _F_BIG else size
            value_at = key_at + key_bytes
            if value_at + stored > end:
                raise _BadPageError("node", number, f"page {number} has a node that leaves it at byte {offset}")
            if flags & _F_BIG:
                (child,) = _PAGE_NUMBER.unpack_from(raw, value_at)
            length = _NODE_BYTES + key_bytes + stored
            used += length + (length & 1)
            found.append(_Node(raw[key_at:value_at], flags, child, size, raw[value_at : value_at + stored]))
        if used != end - upper:
            raise _BadPageError(
                "node", number, f"page {number} has nodes of {used} bytes in {end - upper} bytes of space"
            )
        return found

    def overflow(self, node: _Node, *, read: bool) -> tuple[int, bytes]:
        """Take the overflow run of a large value; return its pages and, if asked for, the value."""
        first = node.child
        wanted = (_HEADER_BYTES - 1 + node.value_bytes) // self.page_bytes + 1
        self._check_number(first, wanted)
        raw = self.file.read(first * self.page_bytes, _HEADER_BYTES + (node.value_bytes if read else 0))
        own, _, flags = struct.unpack_from("<QHH", raw)
        (count,) = _OVERFLOW_COUNT.unpack_from(raw, 12)
        # LMDB keeps a longer run when a value is overwritten by a shorter one.
        if own != first or flags != _P_OVERFLOW or count < wanted:
            raise _BadPageError(
                "overflow",
                first,
                f"overflow page {first} says page {own}, flags {flags:#x}, {count} pages; wanted {wanted} pages",
            )
        self._check_number(first, count)
        for one in range(first, first + count):
            self._take(one)
        self.report.reached += count
        return count, raw[_HEADER_BYTES:]

    # --- trees -------------------------------------------------------------------------------------------------------

    def items(self, tree: Tree, *, skip_damage: bool = False) -> Iterator[tuple[bytes, bytes, int]]:
        """Yield (key, value, node flags) of a tree in order.

        Raises `_BadPageError` at the first damage, or with ``skip_damage`` goes on behind it.
        """
        if tree.root is None:
            return
        self._check_shape(tree)
        stack = [(tree.root, 1)]
        while stack:
            number, level = stack.pop()
            leaf = level == tree.depth
            try:
                raw, flags, count = self.page(number, _P_LEAF if leaf else _P_BRANCH)
                nodes = [] if flags & _P_LEAF2 else self.nodes(number, raw, count, branch=not leaf)
            except _BadPageError:
                if not skip_damage:
                    raise
                continue
            if not leaf:
                stack.extend((node.child, level + 1) for node in reversed(nodes))
                continue
            for node in nodes:
                try:
                    value = self.overflow(node, read=True)[1] if node.flags & _F_BIG else node.value
                except _BadPageError:
                    if not skip_damage:
                        raise
                    continue
                yield node.key, value, node.flags

    def _check_shape(self, tree: Tree) -> None:
        if not 1 <= tree.depth <= DEPTH_MAX:
            raise _BadPageError("tree", tree.root or 0, f"tree {tree.name} has depth {tree.depth}")

    def check(self, tree: Tree) -> _Tally:
        """Walk a whole tree, recording every damage; named trees in its leaves are walked too."""
        tally = _Tally()
        if tree.root is None:
            if tree.depth or tree.entries:
                self.report.add("tree", None, tree.name, f"tree {tree.name} has entries but no root")
            return tally
        complete = True
        try:
            self._check_shape(tree)
        except _BadPageError as bad:
            self.report.add(bad.kind, tree.root, tree.name, bad.detail)
            return tally
        stack: list[tuple[int, int, bytes | None, bytes | None]] = [(tree.root, 1, None, None)]
        while stack:
            number, level, low, high = stack.pop()
            try:
                self._check_page(tree, tally, number, level, low, high, stack)
            except _BadPageError as bad:
                complete = False
                self.report.add(bad.kind, bad.page, tree.name, bad.detail)
        stated = (tree.branch_pages, tree.leaf_pages, tree.overflow_pages, tree.entries)
        met = (tally.branch, tally.leaf, tally.overflow, tally.entries)
        if tree.flags & _DB_DUPLICATES:
            # LMDB does not keep the page counts of a tree with duplicates exactly.
            stated, met = (0, 0, 0, tree.entries), (0, 0, 0, tally.entries)
        # Counts below a damaged page are unknown; the damage has been named already.
        if complete and stated != met:
            self.report.add(
                "tree",
                tree.root,
                tree.name,
                f"tree {tree.name} states (branch, leaf, overflow pages, entries) {stated}, but has {met}",
            )
        return tally

    def _check_page(
        self,
        tree: Tree,
        tally: _Tally,
        number: int,
        level: int,
        low: bytes | None,
        high: bytes | None,
        stack: list[tuple[int, int, bytes | None, bytes | None]],
    ) -> None:
        leaf = level == tree.depth
        raw, flags, count = self.page(number, _P_LEAF if leaf else _P_BRANCH)
        if leaf:
            tally.leaf += 1
        else:
            tally.branch += 1
        if flags & _P_LEAF2:
            tally.entries += count
            return
        nodes = self.nodes(number, raw, count, branch=not leaf)
        self._check_order(tree, number, nodes, low, high, branch=not leaf)
        if not leaf:
            for index in range(count - 1, -1, -1):
                above = nodes[index + 1].key if index + 1 < count else high
                stack.append((nodes[index].child, level + 1, nodes[index].key if index else low, above))
            return
        for node in nodes:
            try:
                self._check_leaf_node(tree, tally, number, node)
            except _BadPageError as bad:
                self.report.add(bad.kind, bad.page, tree.name, f"{bad.detail} (key {node.key[:64].hex()})")

    def _check_order(
        self, tree: Tree, number: int, nodes: list[_Node], low: bytes | None, high: bytes | None, *, branch: bool
    ) -> None:
        # The first key of a branch page stands for "everything before the second" and may be anything.
        keys = [node.key for node in (nodes[1:] if branch else nodes)]
        if tree.flags & _DB_INTEGER_KEY:
            if any(len(key) not in {4, 8} for key in keys):
                raise _BadPageError("node", number, f"page {number} has a key that is no integer")
            ranks = [int.from_bytes(key, "little") for key in keys]
            bottom = None if low is None else int.from_bytes(low, "little")
            top = None if high is None else int.from_bytes(high, "little")
            disordered = _disordered(ranks, bottom, top)
        else:
            turn = -1 if tree.flags & _DB_REVERSE_KEY else 1
            disordered = _disordered(
                [key[::turn] for key in keys],
                None if low is None else low[::turn],
                None if high is None else high[::turn],
            )
        if disordered:
            self.report.add("key-order", number, tree.name, f"page {number} has keys out of order")

    def _check_leaf_node(self, tree: Tree, tally: _Tally, number: int, node: _Node) -> None:
        if not node.flags & _F_DUPLICATES:
            tally.entries += 1
        if node.flags & _F_BIG:
            pages, _ = self.overflow(node, read=False)
            tally.overflow += pages
        elif node.flags & _F_SUBTREE:
            if len(node.value) != _TREE.size:
                raise _BadPageError("node", number, f"page {number} has a tree root of {len(node.value)} bytes")
            name = node.key.decode("ascii", "backslashreplace")
            below = self.check(_tree(tree.name if node.flags & _F_DUPLICATES else name, node.value, 0))
            if node.flags & _F_DUPLICATES:
                tally.entries += below.entries
        elif node.flags & _F_DUPLICATES:
            tally.entries += _count_subpage(number, node.value)

    def check_free(self, tree: Tree) -> None:
        """Walk the free list: what it lists must be pages in order, not in use and not listed twice."""
        before = len(self.report.damages)
        self.check(tree)
        if len(self.report.damages) != before:
            return
        again = _Walker(self.file, self.meta, PageReport())
        for key, value, _ in again.items(tree):
            numbers = struct.unpack(f"<{len(value) // 8}Q", value[: len(value) // 8 * 8])
            transaction = int.from_bytes(key, "little")
            if len(key) != 8 or transaction > self.meta.transaction:
                self.report.add("free-list", None, "free", f"pages are listed as freed by transaction {transaction}")
            if len(value) % 8 or not numbers or numbers[0] != len(numbers) - 1:
                self.report.add("free-list", None, "free", f"the list of transaction {transaction} is damaged")
                continue
            previous = self.meta.last_page + 1
            for page in numbers[1:]:
                if not 2 <= page < previous:
                    self.report.add("free-list", page, "free", f"page {page} is listed as free out of order")
                    break
                previous = page
                self._check_free_page(page)

    def _check_free_page(self, page: int) -> None:
        if self.taken(page):
            self.report.add("free-list", page, "free", f"page {page} is listed as free and used")
            return
        self._take(page)
        self.report.free += 1


def _disordered(ranks: list[_Rank], low: _Rank | None, high: _Rank | None) -> bool:
    """Return whether the keys of a page do not rise, or leave the half-open range that the page above gives them."""
    for left, right in itertools.pairwise(ranks):
        if not left < right:
            return True
    return bool(ranks) and ((low is not None and ranks[0] < low) or (high is not None and not ranks[-1] < high))


def _count_subpage(number: int, raw: bytes) -> int:
    """Return how many duplicates a page within a node holds."""
    if len(raw) < _HEADER_BYTES:
        raise _BadPageError("node", number, f"page {number} has a page of {len(raw)} bytes in a node")
    _, pad, flags, lower, upper = _HEADER.unpack_from(raw)
    if not flags & _P_SUBPAGE or not flags & _P_LEAF or lower < _HEADER_BYTES or lower & 1 or lower > len(raw):
        raise _BadPageError("node", number, f"page {number} has a damaged page in a node")
    count: int = (lower - _HEADER_BYTES) // 2
    if flags & _P_LEAF2:
        if count * pad > len(raw) - _HEADER_BYTES:
            raise _BadPageError("node", number, f"page {number} has a damaged page in a node")
    elif not lower <= upper <= len(raw):
        raise _BadPageError("node", number, f"page {number} has a damaged page in a node")
    return count


# --- the two questions -----------------------------------------------------------------------------------------------


def walk(path: Path) -> PageReport:
    """Read every page of the file that a tree or the free list uses and return what is wrong; change nothing.

    Never raises for what the bytes say: a file that is no LMDB file, or whose meta pages are damaged, is a report with
    that one damage. Raises `NotFound`, `InvalidValue` and what a refused system call means.
    """
    with PageFile(path) as file:
        return _walk(file)


def _walk(file: PageFile) -> PageReport:
    report = PageReport(bytes=file.bytes)
    try:
        metas = file.metas()
    except errors.TruncatedTablet as error:
        report.beyond_end = True
        report.add("truncated", error.details.get("page"), "", error.message)
        return report
    except errors.ForeignData as error:
        report.add("foreign", error.details.get("page"), "", error.message)
        return report
    except errors.CorruptionError as error:
        report.add("meta", error.details.get("page"), "", error.message)
        return report
    newest = metas[1] if metas[1].transaction > metas[0].transaction else metas[0]
    report.meta = newest
    report.pages = file.bytes // newest.page_bytes
    _check_metas(report, metas)
    walker = _Walker(file, newest, report)
    report.entries = walker.check(newest.main).entries
    try:
        walker.check_free(newest.free)
    except _BadPageError as bad:
        report.add(bad.kind, bad.page, "free", bad.detail)
    _check_lost(report, walker)
    return report


def _check_metas(report: PageReport, metas: tuple[Meta, Meta]) -> None:
    first, second = metas
    newest, older = (second, first) if second.transaction > first.transaction else (first, second)
    if first.page_bytes != second.page_bytes:
        report.add("meta", older.page, "", f"the meta pages state page sizes {first.page_bytes}, {second.page_bytes}")
    fresh = first.transaction == second.transaction == 0
    # Transaction n goes to page n modulo 2, so the two always hold neighbours.
    if not fresh and (newest.transaction % 2 != newest.page or newest.transaction - older.transaction != 1):
        report.add(
            "meta", newest.page, "", f"the meta pages hold transactions {first.transaction} and {second.transaction}"
        )
    for meta in metas:
        if meta.map_bytes % meta.page_bytes or meta.map_bytes < meta.bytes_claimed or meta.map_bytes >= 1 << 47:
            report.add("meta", meta.page, "", f"meta page {meta.page} states a map of {meta.map_bytes} bytes")
        if meta.main.flags or not meta.free.flags & _DB_INTEGER_KEY:
            report.add(
                "meta",
                meta.page,
                "",
                f"meta page {meta.page} has tree flags {meta.free.flags:#x}, {meta.main.flags:#x}",
            )
    if older.last_page > newest.last_page or older.map_bytes > newest.map_bytes:
        report.add("meta", newest.page, "", f"meta page {newest.page} states less than the older one")


def _check_lost(report: PageReport, walker: _Walker) -> None:
    """Name pages that are neither used nor free. Below a damage nothing is known, so then they are no news."""
    if report.damages:
        return
    for page in range(2, min(walker.pages_in_file, walker.meta.last_page + 1)):
        if not walker.taken(page):
            report.add("lost-page", page, "", f"page {page} is neither in use nor free")


def check_before_open(path: Path, *, extend: bool = True) -> Meta:
    """Make sure that LMDB can map the file without dying, and return its newest meta page.

    A file shorter than its meta page claims may be healthy, because LMDB never writes freed pages at the end. So it is
    walked: if every page in use is inside, it is extended sparsely to the claimed length (unless ``extend`` is False)
    and may be opened. Otherwise the file is left as it is and the error says why:

    * `CorruptionError`: the file is missing, a meta page or a needed page is damaged;
    * `TruncatedTablet`: empty, or a needed page lies past its end;
    * `ForeignData`: it is no LMDB file, or one of another version or byte order.
    """
    try:
        file = PageFile(path)
    except errors.NotFound as error:
        raise errors.CorruptionError(f"{path} is missing", file=str(path)) from error
    with file:
        meta = file.newest()
        _check_roots(path, meta)
        if file.bytes >= meta.bytes_claimed:
            return meta
        report = _walk(file)
    if report.beyond_end:
        raise errors.TruncatedTablet(
            f"{path} has {report.bytes} bytes, and pages in use lie past its end",
            file=str(path),
            bytes=report.bytes,
            bytes_wanted=meta.bytes_claimed,
            pages=[damage.page for damage in report.damages if damage.kind == "beyond-end"],
        )
    if report.damages:
        first = report.damages[0]
        raise errors.CorruptionError(
            f"{path} is damaged: {first.detail}", file=str(path), page=first.page, damages=len(report.damages)
        )
    if extend:
        _extend(path, meta.bytes_claimed)
    return meta


def _check_roots(path: Path, meta: Meta) -> None:
    for tree in (meta.free, meta.main):
        if tree.root is not None and not (2 <= tree.root <= meta.last_page and 1 <= tree.depth <= DEPTH_MAX):
            raise errors.CorruptionError(
                f"meta page {meta.page} of {path} is damaged: root {tree.root}, depth {tree.depth}",
                file=str(path),
                page=meta.page,
            )


def _extend(path: Path, length: int) -> None:
    with files.Directory(path.parent) as directory:
        fd = directory.open(path.name, os.O_RDWR)
        try:
            os.ftruncate(fd, length)
            os.fsync(fd)
        except OSError as error:
            raise files.from_os_error(error, f"cannot extend {path}") from error
        finally:
            os.close(fd)
