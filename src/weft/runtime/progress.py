"""What a run shows while it goes on, and what it writes down.

on a terminal        one line that changes: step, loss, tokens or samples per second, memory        rich
elsewhere            such a line every few seconds
in `log_dir`         `log.jsonl`, one JSON object per step; TensorBoard event files too if tensorboard is installed
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

__all__ = ["Log", "Meter", "Progress"]

WINDOW = 20  # steps over which rates are averaged
LINE_SECONDS = 10.0  # between lines where nothing can be overwritten


class Meter:
    """Rates over the last steps. The first, which builds the programs, counts only until there is a second."""

    def __init__(self) -> None:
        self._marks: deque[tuple[float, int, int]] = deque(maxlen=WINDOW)
        self._steps = 0
        self._last = time.perf_counter()

    def begin(self) -> None:
        self._last = time.perf_counter()

    def end(self, tokens: int, samples: int) -> float:
        """Note a step; returns its seconds."""
        seconds = time.perf_counter() - self._last
        self._steps += 1
        if self._steps == 2:
            self._marks.clear()
        self._marks.append((seconds, tokens, samples))
        return seconds

    @property
    def seconds(self) -> float:
        """Per step, mean of the last ones."""
        return sum(m[0] for m in self._marks) / len(self._marks) if self._marks else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self._rate(1)

    @property
    def samples_per_second(self) -> float:
        return self._rate(2)

    def _rate(self, item: int) -> float:
        seconds = sum(m[0] for m in self._marks)
        return sum(m[item] for m in self._marks) / seconds if seconds else 0.0


class Log:
    """Scalars of each step, written to a folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file = open(self.folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._board = SummaryWriter(str(self.folder))

    def write(self, step: int, scalars: dict[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **scalars}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


class Progress:
    """The line of a run."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console(stderr=True)
        self._live: Any = None
        self._next_line = 0.0
        if self.console.is_terminal:
            from rich.live import Live

            self._live = Live(console=self.console, refresh_per_second=8, transient=False)
            self._live.start()

    def show(self, step: int, loss: float, meter: Meter, nbytes: int, peak: tuple[float, float] | None = None) -> None:
        """Show a step. `nbytes` are kept between steps, `peak` is the most so far on any process and what was planned (0 if
        nothing was), in bytes."""
        rate = meter.tokens_per_second, "tokens/s"
        if not rate[0]:
            rate = meter.samples_per_second, "samples/s"
        speed = f"{rate[0]:,.0f} {rate[1]}  {meter.seconds * 1e3:.0f} ms/step"
        text = f"step {step}  loss {loss:.4f}  {speed}  {_size(nbytes)} per process"
        if peak is not None:
            text += f", peak {_size(peak[0])}" + (f" (planned {_size(peak[1])})" if peak[1] else "")
        if self._live is not None:
            self._live.update(text)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_SECONDS
            self.console.print(text, highlight=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _size(nbytes: float) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes / 1024:.1f} KiB"
