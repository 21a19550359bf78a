"""The authority's half of an exchange: one answer for each request, and nothing kept that an answer depends on."""

from __future__ import annotations

from typing import Final, assert_never

from srengine import errors, limits
from srengine.sync.exchange_messages import (
    ExchangeClose,
    ExchangeCompare,
    ExchangeDiffers,
    ExchangeDump,
    ExchangeEqual,
    ExchangeFetch,
    ExchangeFull,
    ExchangePrepare,
    ExchangePrepared,
    ExchangeSketch,
    ExchangeTables,
    Reason,
    Reply,
    Request,
    Tables,
    decode_fetch,
    decode_prepare,
    decode_sketch,
    encode_close,
    encode_tables,
)
from srengine.sync.exchange_side import NOTHING, Moment, Side, located_by, prefix_of, table_of
from srengine.sync.exchange_sizes import extension_of
from srengine.types import Located

DUMP_LEAVES_SHARE: Final = 4
DUMP_LEAVES_MIN: Final = 1024
"""A dump of more leaves than so many times our own is not looked at: it would hold several times what we hold."""
PREPARED_CELLS_MIN: Final = 1024
"""An announced table of so many cells is made in any case, a larger one if we have as many records."""


class Responder:
    """The authority's side: one answer for each request.

    What it keeps in between is a cache beside the leaves, for as long as the tablet stands still: where all records
    are, and one table that was announced.
    """

    def __init__(self, side: Side) -> None:
        self._side = side

    def step(self, request: Request) -> tuple[Reply, tuple[bytes, ...]]:
        """Return the answer and its attachments. Raises `FrameError` for a malformed request."""
        try:
            match request:
                case ExchangeCompare():
                    return self._compare(request.body), ()
                case ExchangePrepare():
                    return self._prepare(request.body), ()
                case ExchangeSketch():
                    return self._sketch(request.body)
                case ExchangeFetch():
                    return self._fetch(request.body)
                case ExchangeDump():
                    return self._dump(request.body)
                case _:
                    assert_never(request)
        except errors.QuotaExceeded:
            return _full(Reason.TOO_LARGE), ()
        except errors.BelowPurgeMark:
            return _full(Reason.BELOW_PURGE_MARK), ()

    def _compare(self, body: bytes) -> Reply:
        if self._side.stands_at(body):
            return ExchangeEqual(body[24:])
        with self._side.moment() as moment:
            head = moment.sequence.to_bytes(8, "little")
            return ExchangeDiffers(head + prefix_of(moment, body[:16]).encode() + moment.estimator)

    def _prepare(self, body: bytes) -> Reply:
        """Make the table that the initiator is making, too: the work of a sketch, one is kept.

        NB: a sketch brings as many bytes as it asks for; this does not, so the own size is the bound.
        """
        shape = decode_prepare(body)
        with self._side.moment() as moment:
            if shape.cells <= max(moment.count, PREPARED_CELLS_MIN):
                moment.prepare(ways=shape.ways, width=shape.width, seed=shape.seed)
            return ExchangePrepared(moment.sequence.to_bytes(8, "little"))

    def _sketch(self, body: bytes) -> tuple[Reply, tuple[bytes, ...]]:
        shape, digest, cells = decode_sketch(body)
        with self._side.moment() as moment:
            mine = table_of(moment, shape)
            difference = mine.minus(cells)
            items = moment.peel([difference])
            if items is not None:
                located = moment.list_ranges(located_by(moment, items, by_leaf=shape.by_leaf))
                if len(located.ranges) <= limits.EXCHANGE_RANGES_MAX:
                    return self._close(moment, located, digest, None)
            extension = extension_of(shape)
            tables = Tables(moment.sequence, extension, mine.encode(), table_of(moment, extension).encode())
            return ExchangeTables(encode_tables(tables)), ()

    def _fetch(self, body: bytes) -> tuple[Reply, tuple[bytes, ...]]:
        sequence, digest, located = decode_fetch(body)
        with self._side.moment() as moment:
            reply, attachments = self._close(moment, located, digest, sequence)
            # What is not here the initiator sees by itself: it asked for it.
            return ExchangeClose(encode_close(NOTHING, replace_rows=bool(reply.body[0]))), attachments

    def _dump(self, body: bytes) -> tuple[Reply, tuple[bytes, ...]]:
        if len(body) < 8:
            raise errors.FrameError("a dump of leaf digests begins with the digest of the rows")
        with self._side.moment() as moment:
            if len(body) - 8 > 14 * max(DUMP_LEAVES_SHARE * moment.leaf_count, DUMP_LEAVES_MIN):
                return _full(Reason.TOO_DIFFERENT), ()
            located = moment.differing_leaves(body[8:])
            if len(located.ranges) > limits.EXCHANGE_RANGES_MAX:
                return _full(Reason.TOO_DIFFERENT), ()
            return self._close(moment, located, body[:8], None)

    def _close(
        self, moment: Moment, located: Located, digest: bytes, since: int | None
    ) -> tuple[ExchangeClose, tuple[bytes, ...]]:
        wanted = located if since is not None else located._replace(listed=())
        found = moment.rows_of(wanted, since, bytes_max=limits.EXCHANGE_BYTES_MAX)
        replace_rows = moment.rows_digest[:8] != digest
        absent = Located(found.missing_pairs, found.missing_ids, located.ranges, located.listed)
        return (
            ExchangeClose(encode_close(absent, replace_rows=replace_rows)),
            (found.rows, moment.meta(with_rows=replace_rows), moment.state),
        )


def _full(reason: Reason) -> ExchangeFull:
    return ExchangeFull(bytes([reason]))
