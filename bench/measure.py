"""Time and memory of a step, for contenders that must be compared fairly on a noisy machine."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Step = Callable[[], object]

#: A sample times as many calls as fill this, so that the clock and a scheduler's hiccup do not dominate short calls.
SAMPLE_SECONDS = 2e-3
#: Untimed calls go before a sample for this long, at least one where a call is shorter than COLD_MATTERS_BELOW seconds:
#: else a contender would pay for the caches and the heap that the last one left (its memory, given back to the system,
#: has to be faulted in again), the more so the shorter its calls are.
WARM_SECONDS = 5e-3
COLD_MATTERS_BELOW = 0.1
MIN_ROUNDS = 5
MAX_ROUNDS = 2000


def time_interleaved(steps: Mapping[str, Step], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every step, one sample a round.

    All contenders are timed in every round, in a new random order, so that a slow spell of the machine hits all of them
    and the ratios taken within a round stay fair. Rounds go on until ``seconds`` have passed (at least MIN_ROUNDS).
    """
    calls, durations = {}, {}
    for name, step in steps.items():
        for _ in range(3):
            start = time.perf_counter()
            step()
            duration = time.perf_counter() - start
        durations[name] = duration
        calls[name] = max(1, round(SAMPLE_SECONDS / max(duration, 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffler = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        for done in range(MAX_ROUNDS):
            if done >= MIN_ROUNDS and time.perf_counter() >= deadline:
                break
            shuffler.shuffle(order)
            for name in order:
                step, count = steps[name], calls[name]
                if durations[name] < COLD_MATTERS_BELOW:
                    warm = time.perf_counter() + WARM_SECONDS
                    step()
                    while time.perf_counter() < warm:
                        step()
                start = time.perf_counter()
                for _ in range(count):
                    step()
                samples[name].append((time.perf_counter() - start) / count)
    finally:
        gc.enable()
    return samples


class OtherProcesses:
    """Context manager that tells which share of the machine's CPUs other processes used meanwhile (Linux, else 0).

    A kernel that waits for a thread which another process pushed off its core is slower by far more than that share.
    """

    share = 0.0

    def __enter__(self) -> OtherProcesses:
        self._start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        wall, busy, own = (end - start for end, start in zip(self._read(), self._start, strict=True))
        self.share = max(0.0, busy - own) / (wall * (os.cpu_count() or 1))

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds of wall clock, of all processes on all CPUs, and of this process."""
        statistics_file = Path("/proc/stat")
        busy = own = 0.0
        if statistics_file.exists():
            user, nice, system, _idle, _wait, interrupts, soft, *_ = map(
                float, statistics_file.read_text().split(maxsplit=8)[1:8]
            )
            busy = (user + nice + system + interrupts + soft) / os.sysconf("SC_CLK_TCK")
            own = time.process_time()
        return time.perf_counter(), busy, own


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """The 20 %, 50 % and 80 % quantiles."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return fifths[0], statistics.median(samples), fifths[3]


def median_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median of the ratios taken within each round."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def peak_extra_bytes(step: Step) -> int:
    """The most memory that ``step`` holds at once beyond what was held before, in bytes.

    Replays every allocation and release of torch's CPU allocator in order, as the profiler records them: what C++ ops
    allocate through torch counts, what was released in between does not add up. Memory a kernel takes elsewhere (its
    stack, malloc) is not seen.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    # An op's own totals are net of what it released, so the peak has to come from the single events.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
