"""Circuit breaker: when storage does not answer, calls stop asking it for a while."""


class Breaker:
    """Closed, it lets all calls through; open, none; after a pause, one probe at a time."""

    def __init__(self, failures_max: int, pause_first_ns: int, pause_max_ns: int) -> None:
        """Opens after `failures_max` failures in a row; pauses double from first to max."""
        self._failures_max = failures_max
        self._pause_first_ns = pause_first_ns
        self._pause_max_ns = pause_max_ns
        self._failures = 0
        self._pause_ns = pause_first_ns
        self._closed_from_ns: int | None = None  # None: it is closed
        self._probing = False

    @property
    def is_open(self) -> bool:
        """True while calls are refused, or one of them probes."""
        return self._closed_from_ns is not None

    def allows(self, now_ns: int) -> bool:
        """Ask before a call; whoever gets True reports how it went."""
        if self._closed_from_ns is None:
            return True
        if self._probing or now_ns < self._closed_from_ns:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """A call has reached storage."""
        self._failures = 0
        self._closed_from_ns = None
        self._probing = False
        self._pause_ns = self._pause_first_ns

    def failed(self, now_ns: int) -> None:
        """A call has failed or run out of time."""
        self._failures += 1
        if self._closed_from_ns is not None and not self._probing:
            return  # a call that began before it opened
        if not self._probing and self._failures < self._failures_max:
            return
        self._probing = False
        self._closed_from_ns = now_ns + self._pause_ns
        self._pause_ns = min(2 * self._pause_ns, self._pause_max_ns)

    def gave_up(self) -> None:
        """A call ended without telling anything of storage (it was cancelled)."""
        self._probing = False
