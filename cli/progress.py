"""How far a command is: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line every `interval` seconds.

    `advance(n, note)` takes the note as a function, called only when something is shown: reading a loss
    waits for the device, which the caller must not do at every step.
    """

    def __init__(self, total: int, description: str, unit: str = "img", interval: float = 15.0, enabled: bool = True):
        self.total, self.description, self.unit = total, description, unit
        self.done, self.skipped, self.start, self.enabled = 0, 0, time.monotonic(), enabled
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=total, desc=description, unit=unit, unit_scale=True, leave=False)
        self.interval = 0.5 if self.bar is not None else interval
        self.shown = self.start

    def advance(self, n: int, note: Callable[[], str] = str) -> None:
        self.done += n
        if not self.enabled:
            return
        if self.bar is not None:
            self.bar.update(n)
        now = time.monotonic()
        if now - self.shown < self.interval:
            return
        self.shown = now
        if self.bar is not None:
            self.bar.set_postfix_str(note())
            return
        rate = (self.done - self.skipped) / (now - self.start)
        left = (self.total - self.done) / rate
        print(
            f"{self.description}: {self.done:,}/{self.total:,} {self.unit}  {note()}  "
            f"{rate:,.0f} {self.unit}/s  {left:,.0f} s left",
            flush=True,
        )

    def skip(self, n: int) -> None:
        """Count `n` as done before this run."""
        self.done = self.skipped = n
        if self.bar is not None:
            self.bar.initial = self.bar.n = n

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def counted(count: int, noun: str) -> str:
    """ "1 epoch", "2 epochs"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
