"""Progress of a long run over files: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from dataclasses import dataclass
from typing import Any

SECONDS_BETWEEN_LINES = 5.0
MB = 1e6


@dataclass
class Totals:
    """What has been done so far: rows kept, tokens, bytes of input files, bytes of text."""

    documents: int = 0
    tokens: int = 0
    consumed: int = 0
    text: int = 0


class Progress:
    """Reports on stderr.

    Args:
        total: bytes of all input files.
        log_interval: documents between plain lines; by default a line every few seconds.
        before: what was done before the clock started; speeds do not count it.
    """

    def __init__(self, total: int, log_interval: int | None = None, before: Totals | None = None) -> None:
        self.total, self.log_interval = total, log_interval
        self.before = before or Totals()
        self.started = self._last_time = time.monotonic()
        self._last_documents = self.before.documents
        self._bar: Any = None
        if log_interval is None and sys.stderr is not None and sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(
                total=total, initial=self.before.consumed, unit="B", unit_scale=True, dynamic_ncols=True
            )

    def update(self, done: Totals) -> None:
        """Report, where it is time to."""
        if self._bar is not None:
            self._bar.set_postfix_str(self.speed(done), refresh=False)
            self._bar.update(done.consumed - self._bar.n)
            return
        now = time.monotonic()
        if self.log_interval is None:
            due = now - self._last_time >= SECONDS_BETWEEN_LINES
        else:
            due = done.documents - self._last_documents >= self.log_interval
        if due:
            self._last_time, self._last_documents = now, done.documents
            print(f"{self._share(done, now)} | {self.speed(done)}", file=sys.stderr, flush=True)

    def speed(self, done: Totals) -> str:
        """Documents, MB of text and tokens per second since the start."""
        seconds = max(1e-9, time.monotonic() - self.started)
        megabytes = (done.text - self.before.text) / MB / seconds
        tokens = (done.tokens - self.before.tokens) / seconds
        return f"{done.documents:,} documents, {megabytes:.2f} MB/s, {tokens:,.0f} tokens/s"

    def _share(self, done: Totals, now: float) -> str:
        share = min(1.0, done.consumed / max(1, self.total))
        done_now = (done.consumed - self.before.consumed) / max(1, self.total)
        left = (now - self.started) * (1 - share) / max(done_now, 1e-9)
        return f"{share:6.1%} of the input, {left:,.0f} s left"

    def close(self) -> None:
        """Finish the bar's line."""
        if self._bar is not None:
            self._bar.close()
