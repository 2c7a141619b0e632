"""How far the recovery of a target has come, and how fast it goes [pure].

Chunks that were equal from the start count as done without having been sent, so `done` reaches
`total`; the rate counts only what is sent.
"""

from collections import deque

from emberfs.proto.ids import SECOND

RATE_WINDOW_NS = 10 * SECOND
# A session in which nothing moves for so long says so; longer than any single call may take.
STILL_NS = 20 * SECOND


class Progress:
    """Counts one session after another of filling the same target."""

    def __init__(self) -> None:
        self.done_chunks = self.total_chunks = 0
        self.done_bytes = self.total_bytes = 0
        self._problem = ""
        self._failed_at = 0  # chunks that were done when the last session failed
        self._sent_bytes = 0
        self._moved_ns = 0
        self._samples: deque[tuple[int, int]] = deque()  # (when, bytes sent until then)

    def begin(self, chunks: int, count: int, now_ns: int) -> None:
        """A session begins: this many chunks and bytes are to be equal at its end."""
        self.done_chunks = self.done_bytes = 0
        self.total_chunks, self.total_bytes = chunks, count
        self._moved_ns = now_ns

    def equal(self, chunks: int, count: int, now_ns: int) -> None:
        """Some chunks need not be sent."""
        self._move(chunks, count, now_ns)

    def sent(self, count: int, now_ns: int) -> None:
        """One chunk has arrived."""
        self._sent_bytes += count
        self._move(1, count, now_ns)

    def waits(self, now_ns: int) -> None:
        """The throttle held us up: that is no lack of progress."""
        self._moved_ns = now_ns

    def _move(self, chunks: int, count: int, now_ns: int) -> None:
        self.done_chunks += chunks
        self.done_bytes += count
        self.total_chunks = max(self.total_chunks, self.done_chunks)
        self.total_bytes = max(self.total_bytes, self.done_bytes)
        self._moved_ns = now_ns
        if self.done_chunks > self._failed_at:
            self._problem = ""

    def complete(self) -> None:
        """Everything is equal; what was removed meanwhile no longer counts."""
        self.total_chunks, self.total_bytes = self.done_chunks, self.done_bytes
        self._problem, self._failed_at = "", 0

    def failed(self, problem: str) -> None:
        """The session has ended early; the next one has to come further to clear it."""
        self._problem = problem
        self._failed_at = max(self._failed_at, self.done_chunks)

    def problem(self, now_ns: int) -> str:
        """Why it does not advance, in words; empty while it does."""
        if not self._problem and now_ns - self._moved_ns > STILL_NS:
            return f"nothing has moved for {(now_ns - self._moved_ns) // SECOND} s"
        return self._problem

    def bytes_per_s(self, now_ns: int) -> int:
        """Rate over the last seconds."""
        samples = self._samples
        samples.append((now_ns, self._sent_bytes))
        while len(samples) > 2 and samples[0][0] < now_ns - RATE_WINDOW_NS:
            samples.popleft()
        elapsed_ns = now_ns - samples[0][0]
        return (self._sent_bytes - samples[0][1]) * SECOND // elapsed_ns if elapsed_ns else 0
