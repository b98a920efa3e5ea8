"""Time and memory of a step on a CPU or a GPU, for contenders that must be compared fairly on a noisy machine."""

from __future__ import annotations

import gc
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

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


class Clock(Protocol):
    """How calls of a step are timed."""

    def sample(self, step: Step) -> float:
        """Seconds of a call."""


class CpuClock:
    """Wall time; several calls a sample where they are short."""

    def __init__(self) -> None:
        self._durations: dict[Step, float] = {}

    def sample(self, step: Step) -> float:
        if step not in self._durations:
            for _ in range(3):
                duration = self._time(step, 1)
            self._durations[step] = duration
        if self._durations[step] < COLD_MATTERS_BELOW:
            warm = time.perf_counter() + WARM_SECONDS
            step()
            while time.perf_counter() < warm:
                step()
        return self._time(step, max(1, round(SAMPLE_SECONDS / max(self._durations[step], 1e-7))))

    @staticmethod
    def _time(step: Step, count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - start) / count


class GpuClock:
    """CUDA events around one call whose inputs are not in the L2 cache.

    The device is kept busy until the host has launched them: in training, too, the host runs ahead.
    """

    #: Of the device's clock, before the first event: longer than it takes to launch the most kernels.
    HEAD_START = 6_000_000

    def __init__(self, device: torch.device) -> None:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(4 * cache, dtype=torch.int8, device=device)

    def sample(self, step: Step) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(self.HEAD_START)
        self._flush.zero_()
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def clock_of(device: torch.device) -> Clock:
    return GpuClock(device) if device.type == "cuda" else CpuClock()


def copy_rate(device: torch.device) -> float:
    """Bytes a second, reads and writes counted, of the fastest of some copies of 1 GiB on a GPU."""
    clock = GpuClock(device)
    source = torch.zeros(1 << 30, dtype=torch.int8, device=device)
    copy = torch.empty_like(source)
    return 2 * source.nbytes / min(clock.sample(lambda: copy.copy_(source)) for _ in range(20))


def time_interleaved(steps: Mapping[str, Step], seconds: float, clock: Clock) -> dict[str, list[float]]:
    """Seconds per call of every step, one sample a round.

    All contenders are timed in every round, in a new random order, so that a slow spell of the machine hits all of them
    and the ratios taken within a round stay fair. Rounds go on until ``seconds`` have passed (at least MIN_ROUNDS).
    """
    for step in steps.values():
        clock.sample(step)
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
                samples[name].append(clock.sample(steps[name]))
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


def peak_extra_bytes(step: Step, device: torch.device) -> int:
    """The most memory that ``step`` holds at once beyond what was held before, in bytes.

    On a GPU what torch's allocator counts. On a CPU every allocation and release of torch's allocator is replayed in
    order, as the profiler records them: what C++ ops allocate through torch counts, what was released in between does
    not add up. Memory a kernel takes elsewhere (its stack, malloc) is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    # An op's own totals are net of what it released, so the peak has to come from the single events.
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
