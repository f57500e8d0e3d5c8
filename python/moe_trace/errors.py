"""Everything that reading a trace can raise. All are `TraceError`; each message says what to do."""

from __future__ import annotations


class TraceError(Exception):
    """A trace cannot be read as asked."""


class TraceNotFound(TraceError):
    """There is nothing at the path."""


class NotATrace(TraceError):
    """What is at the path was not written by moe_native."""


class UnsupportedVersion(TraceError):
    """The trace was written by a newer moe_native, in a form that this one does not know."""


class DamagedTrace(TraceError):
    """Bytes are not what was written: a checksum, a length or a reference does not hold."""
