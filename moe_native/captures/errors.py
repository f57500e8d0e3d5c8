"""What can go wrong with a capture, beside what is wrong with its arguments."""


class CaptureError(RuntimeError):
    """An engine that cannot be captured, or rows that are missing. The message says which, and what to do."""


class NotArmedError(CaptureError):
    """An engine whose workers do not know of captures."""
