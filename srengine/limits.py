"""Hard bounds, each with its reason. Relations between bounds are asserted at import.

Unlike options (settings of one process), these never change at run time: formats and peers rely on them.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB

# --- records ---------------------------------------------------------------------------------------------------------
KEY_BYTES_MIN: Final = 1
KEY_BYTES_MAX: Final = 511
"""LMDB's own limit with its default page size; a larger one would need another build that nobody else can read."""
VALUE_BYTES_MAX: Final = 64 * MIB
"""A value is held in memory by its reader and its writer; larger things belong into files."""
VERSION_ENTRIES_MAX: Final = 64
"""Isolated writers named by one record; beyond it the oldest must have been merged."""

# --- batches and entries ---------------------------------------------------------------------------------------------
ENTRY_OPERATIONS_MAX: Final = 1_000_000
ENTRY_BYTES_MAX: Final = 128 * MIB
"""One entry, one transaction: it holds at least one record of the largest size."""
GROUP_BYTES_MAX: Final = 256 * MIB
"""Entries that share a transaction; bounds LMDB's list of dirty pages."""
SESSIONS_MAX: Final = 1024
REQUESTS_KEPT_MAX: Final = 4096
"""Kept answers for each tablet. A repeated request older than that is refused, never executed."""
ROOT_RING_ENTRIES: Final = 65_536
"""(sequence, root) pairs in memory for each tablet: 24 bytes each, allocated as they come."""

# --- names -----------------------------------------------------------------------------------------------------------
NAME_BYTES_MAX: Final = 128
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"

# --- snapshot --------------------------------------------------------------------------------------------------------
CHUNK_BYTES_TARGET: Final = MIB
"""Rows are gathered up to this; one larger record makes a chunk of its own."""
CHUNK_BYTES_MAX: Final = VALUE_BYTES_MAX + 64 * KIB
CHUNK_COMPRESSED_BYTES_MAX: Final = CHUNK_BYTES_MAX + CHUNK_BYTES_MAX // 128 + 64 * KIB
ZSTD_WINDOW_BYTES_MAX: Final = 8 * MIB
MANIFEST_BYTES_MAX: Final = MIB
TRAILER_BYTES_MAX: Final = 64 * MIB
"""Meta rows, request rows and chunk digests of the largest tablet that one snapshot ships."""

# --- transport -------------------------------------------------------------------------------------------------------
CLIENT_FRAME_BYTES_MAX: Final = MIB
PEER_FRAME_BYTES_MAX: Final = 8 * MIB
BULK_FRAME_BYTES_MAX: Final = MIB + 64 * KIB
PART_BYTES_MAX: Final = 256 * KIB
"""A larger value travels in parts, so that no frame delays a heartbeat."""
MESSAGE_DEPTH_MAX: Final = 64
PARTS_MAX: Final = 8
HIGH_WATER_FRAMES: Final = 256
CREDIT_FRAMES: Final = 16
"""Pieces of one transfer that may be on their way unasked; hides a round trip at full speed."""
BODY_BYTES_MAX: Final = 512 * KIB
"""A message without its attachments; what is larger belongs into an attachment."""
ENVELOPES_MAX: Final = 256
"""Messages that share a frame."""
ENVELOPES_BYTES_TARGET: Final = 64 * KIB
"""No further message joins a frame that has grown to this."""
ATTACHMENTS_MAX: Final = 64
REQUESTS_IN_FLIGHT_MAX: Final = 512
"""Unanswered requests of one connection; the caller queues what is more. Times PART_BYTES_MAX: what may come
unasked.
"""
CONNECTION_BYTES_MAX: Final = ENTRY_BYTES_MAX
"""Attachments of one connection held in memory; more is granted when there is room."""
ENDPOINT_BYTES_MAX: Final = 2 * CONNECTION_BYTES_MAX
FAILURE_BYTES_MAX: Final = 16 * KIB
"""Sentence and facts of an error on the wire; longer ones are cut."""
UNREAD_BYTES_MAX: Final = 192 * MIB
"""Bytes of one connection that the kernel has taken in and no whole frame has brought to us; beyond it the connection
is closed. ZeroMQ counts whole messages only: one that never ends would fill the memory.
"""
CONNECTIONS_MAX: Final = 256
"""Accepted connections of one port, half-done handshakes included; beyond it new ones are closed at once."""
POSTS_BYTES_MAX: Final = 16 * MIB
"""Bytes of one-way messages on their way over one connection; what does not fit is dropped, and said again by whoever
needs it heard.
"""
POSTS_HELD_MAX: Final = 16
"""One-way messages that wait for a connection which is just being made."""
REQUEST_WINDOW: Final = 4096
"""Request ids remembered behind the highest one, so that a repeated frame is not answered twice."""
HANDSHAKE_MS: Final = 2000
HELLO_S_MAX: Final = 5.0
"""An accepted connection that has not said hello by then is closed."""
HEARTBEAT_MS: Final = 1000
HEARTBEAT_TIMEOUT_MS: Final = 3000
RECONNECT_MS_MIN: Final = 100
RECONNECT_MS_MAX: Final = 5000
CONNECT_MS_MAX: Final = 3000
LINGER_MS: Final = 200
PROGRESS_S_MAX: Final = 30.0
"""A connection with unfinished transfers that moves no byte for so long is closed."""

# --- sync ------------------------------------------------------------------------------------------------------------
PULL_BYTES_MAX: Final = 4 * MIB
"""A delta that fits is sent in the answer and applied in one transaction; a larger one is shipped in bulk."""

EXCHANGE_RECORDS_MAX: Final = 16_000_000
"""Records whose places are held in memory (4 bytes each) while an exchange compares record by record."""
EXCHANGE_CELLS_MAX: Final = 1_500_000
"""Cells of a sketch: enough for a million differing records; a peer cannot make us fill a larger one."""
EXCHANGE_BYTES_MAX: Final = 64 * MIB
"""Cells, dumps, ids and rows of one message of an exchange; what is more goes as a full copy."""
EXCHANGE_ATTEMPTS_MAX: Final = 3
"""Sketches of one exchange before leaf digests are dumped: the first, another seed, another size."""
EXCHANGE_ROUNDS_MAX: Final = 12
"""Requests of one exchange, whatever the other side answers."""
EXCHANGE_WHOLE_BYTES_MAX: Final = KIB
"""Ranges of which some records differ are shipped whole up to this; above it their digests are listed first."""
EXCHANGE_RANGES_MAX: Final = 4096
"""Ranges of keys shipped whole in one message."""
EXCHANGE_TABLETS_MAX: Final = 1024
"""Tablets that are compared in one message: 32 KiB of positions."""
EXCHANGE_INLINE_BYTES_MAX: Final = 64 * KIB
"""Bodies of an exchange's messages up to this travel inside the message, larger ones as an attachment."""
EXCHANGES_MAX: Final = 2
"""Exchanges that a node begins at one time; each may hold EXCHANGE_BYTES_MAX and a walk of all records."""
EXCHANGE_ANSWERS_MAX: Final = 2
"""Requests of exchanges that a node answers at one time; what is more waits its turn."""
EXCHANGE_ANSWERS_WAITING_MAX: Final = 16
"""Requests of exchanges that wait; what is more is told to come again."""
LEAVES_WARM_MAX: Final = 32
"""Tablets whose leaves are kept in memory after an exchange (about 1.5 MB for a million records)."""
LEAVES_WARM_S: Final = 60.0
"""How long they are kept without another exchange: as long as following writes costs more than building them anew."""
EXCHANGE_UNPROVEN_MAX: Final = 3
"""Exchanges in a row that did not reach the root the peer promised; then it is left alone for QUARANTINE_S."""
QUARANTINE_S: Final = 600.0

# --- scrub -----------------------------------------------------------------------------------------------------------
SCRUB_BYTES_S: Final = 4 * MIB
"""Default of how many bytes of records a node reads a second to look for rot: about a tenth of one core."""
SCRUB_INTERVAL_S: Final = 86_400.0
"""Default of how often each tablet is read whole."""
SCRUB_START_S: Final = 60.0
"""A node that has just started has better things to do."""
SCRUB_SLICE_BYTES: Final = 256 * KIB
"""Read at a time: a few milliseconds, and one short view."""
SCRUB_DAMAGES_MAX: Final = 4096
"""Damaged records healed one by one in a pass; with more of them the copy is replaced."""
FETCH_ROWS_KEYS_MAX: Final = 512
"""Keys asked for in one message."""
FETCH_ROWS_BYTES_MAX: Final = 128 * MIB
HEAL_ATTEMPTS_MAX: Final = 5
"""Tries to put a healed record into a tablet that is being written."""

# --- client ----------------------------------------------------------------------------------------------------------
READ_MESSAGE_KEYS_MAX: Final = 4096
READ_MESSAGE_KEYS_BYTES_MAX: Final = 256 * KIB
"""Keys asked for in one message: they travel inside it, so they stay well under a client frame."""
READ_REPLY_BYTES_MAX: Final = 4 * MIB
SCAN_REPLY_BYTES_MAX: Final = MIB
"""A page of a scan; a client holds at most one of each tablet."""
REDIRECTS_MAX: Final = 4
"""Redirects followed without a pause; more of them mean that two nodes point at each other."""
RETRY_DELAY_S_MIN: Final = 0.02
RETRY_DELAY_S_MAX: Final = 0.5
ENDPOINTS_MAX: Final = 64
FAILED_KEYS_NAMED_MAX: Final = 100
"""Keys that the error of a partly failed batch names; the rest is counted."""

assert EXCHANGE_CELLS_MAX * 30 <= EXCHANGE_BYTES_MAX, (EXCHANGE_CELLS_MAX, EXCHANGE_BYTES_MAX)
assert EXCHANGE_INLINE_BYTES_MAX <= BODY_BYTES_MAX, (EXCHANGE_INLINE_BYTES_MAX, BODY_BYTES_MAX)
assert FETCH_ROWS_KEYS_MAX * KEY_BYTES_MAX <= CLIENT_FRAME_BYTES_MAX, (FETCH_ROWS_KEYS_MAX, CLIENT_FRAME_BYTES_MAX)
assert FETCH_ROWS_BYTES_MAX <= CONNECTION_BYTES_MAX, (FETCH_ROWS_BYTES_MAX, CONNECTION_BYTES_MAX)
assert EXCHANGE_BYTES_MAX <= CONNECTION_BYTES_MAX, (EXCHANGE_BYTES_MAX, CONNECTION_BYTES_MAX)
assert KEY_BYTES_MIN >= 1, KEY_BYTES_MIN
assert KEY_BYTES_MAX <= 511, KEY_BYTES_MAX
assert ENTRY_BYTES_MAX >= VALUE_BYTES_MAX + 64 * KIB, (ENTRY_BYTES_MAX, VALUE_BYTES_MAX)
assert CHUNK_BYTES_MAX >= VALUE_BYTES_MAX + KEY_BYTES_MAX, (CHUNK_BYTES_MAX, VALUE_BYTES_MAX)
assert CHUNK_BYTES_TARGET <= CHUNK_BYTES_MAX, (CHUNK_BYTES_TARGET, CHUNK_BYTES_MAX)
assert PULL_BYTES_MAX + 64 * KIB <= PEER_FRAME_BYTES_MAX, (PULL_BYTES_MAX, PEER_FRAME_BYTES_MAX)
assert PART_BYTES_MAX <= CLIENT_FRAME_BYTES_MAX, (PART_BYTES_MAX, CLIENT_FRAME_BYTES_MAX)
assert READ_MESSAGE_KEYS_BYTES_MAX + READ_MESSAGE_KEYS_MAX * 8 <= CLIENT_FRAME_BYTES_MAX // 2, (
    READ_MESSAGE_KEYS_BYTES_MAX,
    READ_MESSAGE_KEYS_MAX,
)
assert 0 < RETRY_DELAY_S_MIN <= RETRY_DELAY_S_MAX, (RETRY_DELAY_S_MIN, RETRY_DELAY_S_MAX)

# --- contact (seconds) -----------------------------------------------------------------------------------------------
PULL_HOLD_S: Final = 0.5
"""How long a leader keeps a pull waiting for something new: the longest silence between two healthy nodes."""
PULL_TIMEOUT_S: Final = 2.5
"""How long a replica waits for the answer to a pull before it asks again."""
STALENESS_S_MAX: Final = 3.0
"""A replica answers `local` reads only if what it applied was the leader's newest when asked at most this long ago."""
CONTACT_S: Final = 3.0
"""A node not heard of for longer does not count as reachable."""
DUPLICATE_PATIENCE_S: Final = 9.0
"""How long a node that seems to be a copy of a living one keeps asking before it gives up: its predecessor may have
just died.
"""
START_GRACE_S: Final = 1.0
"""A leader that knows enough waits this long for the rest: one that knows better may just be starting."""
COME_UP_S: Final = 3.0
"""How long a leader whose copy is damaged waits for a replica that is behind to come up before it goes back to it."""
CHECK_KEPT_S: Final = 15.0
"""How long a replica that was proved whole and is refused says so before it tries the leader's rows again."""
HALT_RETRY_S: Final = 1.0
"""A replica that was refused (diverged, foreign) or that failed asks again after this."""

ASK_RETRY_S: Final = 0.2
"""Pause after a question that got no answer; doubled for each further one in a row, so that many tablets do not
spin."""
ASK_RETRY_DOUBLINGS_MAX: Final = 3

# --- admission -------------------------------------------------------------------------------------------------------
WRITE_QUEUE_BYTES_MAX: Final = 256 * MIB
"""Operations waiting at one tablet's leader; beyond it writers wait for room."""
WRITE_GROUP_ENTRIES_MAX: Final = 4096
"""Entries that one transaction takes."""
READ_KEYS_MAX: Final = 100_000
TABLETS_PER_TABLE_MAX: Final = 1024
JOURNAL_ENTRY_BYTES_MAX: Final = 4 * MIB
PROPOSE_S_MAX: Final = 120.0
"""How long a leader keeps a proposal of another node, whatever that asks for."""
STATE_ITEM_BYTES_MAX: Final = 2 * JOURNAL_ENTRY_BYTES_MAX
"""One item of the agreed state on its way to another node: it holds at least one row that one command made."""

# --- consensus -------------------------------------------------------------------------------------------------------
GROUP_NODES_MAX: Final = 256
"""Voters and learners of one group; a leader writes to each of them at every heartbeat."""
APPEND_BYTES_MAX: Final = 256 * KIB
"""Entries of one message, at least one: so that no message delays a heartbeat."""
IN_FLIGHT_MESSAGES_MAX: Final = 64
"""Messages with entries on their way to one follower, unanswered."""
IN_FLIGHT_BYTES_MAX: Final = 4 * MIB
UNCOMMITTED_BYTES_MAX: Final = 64 * MIB
"""Proposals in a leader's log that are not committed; one larger entry is taken when there is no other."""
APPLY_BYTES_MAX: Final = 16 * MIB
"""Committed entries handed out and not applied yet; one larger entry is handed out alone."""
READS_WAITING_MAX: Final = 16_384
ROUNDS_KEPT_MAX: Final = 1024
"""Heartbeats whose time of sending is remembered; an answer to an older one renews nothing."""
EARLY_CAMPAIGNS_MAX: Final = 8
"""Campaigns in quick succession after a hint that the leader is dead; after them the usual time-out."""
DEPARTING_S_MAX: Final = 10.0
"""How long a leader goes on telling a removed node that it was removed."""

assert APPEND_BYTES_MAX <= IN_FLIGHT_BYTES_MAX <= UNCOMMITTED_BYTES_MAX, (APPEND_BYTES_MAX, IN_FLIGHT_BYTES_MAX)
assert PULL_HOLD_S < PULL_TIMEOUT_S < CONTACT_S, (PULL_HOLD_S, PULL_TIMEOUT_S, CONTACT_S)
assert PULL_HOLD_S < STALENESS_S_MAX / 2, (PULL_HOLD_S, STALENESS_S_MAX)
assert DUPLICATE_PATIENCE_S >= 2 * CONTACT_S, (DUPLICATE_PATIENCE_S, CONTACT_S)
assert GROUP_BYTES_MAX >= ENTRY_BYTES_MAX, (GROUP_BYTES_MAX, ENTRY_BYTES_MAX)
assert REQUESTS_IN_FLIGHT_MAX * PART_BYTES_MAX <= CONNECTION_BYTES_MAX, (REQUESTS_IN_FLIGHT_MAX, PART_BYTES_MAX)
assert REQUEST_WINDOW >= 2 * REQUESTS_IN_FLIGHT_MAX, (REQUEST_WINDOW, REQUESTS_IN_FLIGHT_MAX)
assert BODY_BYTES_MAX + ENVELOPES_BYTES_TARGET + 64 * KIB <= CLIENT_FRAME_BYTES_MAX, (
    BODY_BYTES_MAX,
    CLIENT_FRAME_BYTES_MAX,
)
assert POSTS_BYTES_MAX >= 2 * PEER_FRAME_BYTES_MAX, (POSTS_BYTES_MAX, PEER_FRAME_BYTES_MAX)
assert CONNECTION_BYTES_MAX >= ENTRY_BYTES_MAX, (CONNECTION_BYTES_MAX, ENTRY_BYTES_MAX)
assert UNREAD_BYTES_MAX >= REQUESTS_IN_FLIGHT_MAX * PART_BYTES_MAX + 32 * MIB, (UNREAD_BYTES_MAX, PART_BYTES_MAX)
assert UNREAD_BYTES_MAX >= 2 * CREDIT_FRAMES * BULK_FRAME_BYTES_MAX, (UNREAD_BYTES_MAX, BULK_FRAME_BYTES_MAX)
