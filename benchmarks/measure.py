"""Time and energy of work on a GPU, in the two regimes that its power limit makes necessary.

- *burst*: about 1.5 ms of calls after an idle pause, several times; the median. The clock is as
  high as it gets.
- *sustained*: half a second of one method, warmed up by itself; the mean, with the energy and the
  clock that the driver reports.

The calls are captured into a CUDA graph where they can be, so that no launch overhead of the host
is measured. Where they cannot, a spinning kernel holds the stream until all of them are queued. The
same kernel goes before a graph, to hide the latency of its launch.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

Call = Callable[[int], None]
"""Queues one call on the current stream; the argument counts calls, to rotate over buffers."""

_SPIN_HZ = 2.0e9  # no less than the SM clock, so that a spin lasts no less than asked for


@dataclass(frozen=True)
class Timing:
    """How to measure; times in seconds."""

    bursts: int = 7
    burst_s: float = 1.5e-3
    idle_s: float = 0.03
    sustained_s: float = 0.5
    sustained_warmup_s: float = 0.2
    sustained_batch_s: float = 5e-3
    graph: bool = True

    @property
    def conditions(self) -> dict[str, str]:
        """For the reader of a result."""
        return {
            "burst": (
                f"median of {self.bursts} bursts of about {1e3 * self.burst_s:g} ms, each after "
                f"{1e3 * self.idle_s:g} ms idle"
            ),
            "sustained": (
                f"mean over {self.sustained_s:g} s of one method, warmed up by "
                f"{self.sustained_warmup_s:g} s of it; energy and SM clock by NVML"
            ),
            "launch": "CUDA graph"
            if self.graph
            else "direct calls, queued behind a spinning kernel",
        }


@dataclass(frozen=True)
class Sample:
    """One call, and what else was measured of it.

    Attributes:
        us: its time in µs.
        spread: between the quartiles of the bursts, over the median.
        mj: its energy in mJ.
        watts: mean power.
        sm_mhz: mean clock.
        launch: ``graph`` or ``direct``.
    """

    us: float
    spread: float = 0.0
    mj: float | None = None
    watts: float | None = None
    sm_mhz: float | None = None
    launch: str = "graph"


class Batch:
    """A number of calls that are queued together."""

    def __init__(self, call: Call, count: int, stream: torch.cuda.Stream, graph: bool) -> None:
        """Capture the calls, if they can be captured; each has run before, outside of a capture."""
        self.call, self.count, self.stream = call, count, stream
        self.graph = self._capture() if graph else None
        self.host_s = 0.0
        if self.graph is None:
            begin = time.perf_counter()
            self.queue()
            self.host_s = time.perf_counter() - begin
        else:
            self.queue()  # the first replay uploads the graph
        stream.synchronize()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        # torch.cuda.graph would give all cached memory back to the driver each time.
        self.stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            try:
                graph.capture_begin(capture_error_mode="thread_local")
                for index in range(self.count):
                    self.call(index)
            except Exception as error:
                print(f"measure: not captured ({error}); direct calls instead", flush=True)
                with suppress(RuntimeError):  # the capture is invalid, which is known by now
                    graph.capture_end()
                return None
            try:
                graph.capture_end()
            except RuntimeError as error:
                print(f"measure: not captured ({error}); direct calls instead", flush=True)
                return None
        return graph

    @property
    def launch(self) -> str:
        """How the calls are queued."""
        return "direct" if self.graph is None else "graph"

    def queue(self) -> None:
        """Queue all calls, without waiting."""
        with torch.cuda.stream(self.stream):
            if self.graph is not None:
                self.graph.replay()
            else:
                for index in range(self.count):
                    self.call(index)

    def spin(self) -> None:
        """Hold the stream for as long as :meth:`queue` takes."""
        with torch.cuda.stream(self.stream):
            torch.cuda._sleep(int(_SPIN_HZ * (300e-6 + 1.5 * self.host_s)))


class Meter:
    """Measures calls on a stream of its own.

    Args:
        timing: regimes.
        nvml: the sampler of energy and clock, or None.
    """

    def __init__(self, timing: Timing, nvml: Nvml | None) -> None:
        """Make the stream."""
        self.timing, self.nvml = timing, nvml
        self.stream = torch.cuda.Stream()
        self.captures = timing.graph

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self.stream)
        return event

    def estimate_us(self, call: Call, warm_up: int = 2, calls: int = 3) -> float:
        """Time of a call, roughly; runs it for the first time outside of a capture."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            begin = time.perf_counter()
            for index in range(warm_up):
                call(index)
            self.stream.synchronize()
            host_s = min(time.perf_counter() - begin, 1e-3)
            torch.cuda._sleep(int(_SPIN_HZ * (300e-6 + calls * host_s)))
            first = self._event()
            for index in range(calls):
                call(index)
            last = self._event()
        last.synchronize()
        return max(1e3 * first.elapsed_time(last) / calls, 1.0)

    def _batch(self, call: Call, seconds: float) -> Batch:
        count = max(1, round(seconds * 1e6 / self.estimate_us(call)))
        return Batch(call, count, self.stream, self.captures)

    def burst(self, call: Call) -> Sample:
        """Median over bursts."""
        timing = self.timing
        batch = self._batch(call, timing.burst_s)
        times = []
        for _ in range(timing.bursts):
            time.sleep(timing.idle_s)
            batch.spin()
            first = self._event()
            batch.queue()
            last = self._event()
            last.synchronize()
            times.append(1e3 * first.elapsed_time(last) / batch.count)
        median = statistics.median(times)
        quartiles = statistics.quantiles(times, n=4) if len(times) > 3 else [median] * 3
        return Sample(median, (quartiles[2] - quartiles[0]) / median, launch=batch.launch)

    def sustained(self, call: Call) -> Sample:
        """Mean over a long loop, with energy."""
        timing = self.timing
        batch = self._batch(call, timing.sustained_batch_s)
        time.sleep(0.1)
        first = self._event()
        batch.queue()
        last = self._event()
        last.synchronize()
        batch_s = max(1e-3 * first.elapsed_time(last), 1e-5)
        time.sleep(timing.idle_s)
        with Sampler(self.nvml) as sampler:
            for _ in range(max(1, round(timing.sustained_warmup_s / batch_s))):
                batch.queue()
            batches = max(1, round(timing.sustained_s / batch_s))
            first = self._event()
            for _ in range(batches):
                batch.queue()
            last = self._event()
            last.synchronize()
            end = time.perf_counter()
        seconds = 1e-3 * first.elapsed_time(last)
        us = 1e6 * seconds / (batches * batch.count)
        watts, sm_mhz = sampler.over(end - seconds, end)
        mj = None if watts is None else 1e-3 * watts * us
        return Sample(us, mj=mj, watts=watts, sm_mhz=sm_mhz, launch=batch.launch)

    def measure(self, call: Call, regime: str) -> Sample:
        """By the regime's name."""
        return self.burst(call) if regime == "burst" else self.sustained(call)


class Nvml:
    """The driver's counters of torch's current device.

    Raises:
        Exception: whatever keeps them from being read; see :func:`open_nvml`.
    """

    def __init__(self) -> None:
        """Find the device and read each counter once."""
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        try:
            uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except (AttributeError, pynvml.NVMLError):
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        self.read()

    def read(self) -> tuple[int, int]:
        """Energy since the driver was loaded in mJ, and the SM clock in MHz."""
        energy = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
        return energy, self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM)

    def power_limit_w(self) -> float:
        """What the clock gives way to."""
        return 1e-3 * self._nvml.nvmlDeviceGetEnforcedPowerLimit(self._handle)


def open_nvml() -> Nvml | None:
    """The counters, or None with a line that says why there are none."""
    try:
        return Nvml()
    except (
        Exception
    ) as error:  # no package, no library or no permission: time is measured all the same
        print(f"measure: no energy and no clocks: {error}", flush=True)
        return None


class Sampler:
    """Reads the counters every few milliseconds, beside the thread that queues the work."""

    def __init__(self, nvml: Nvml | None) -> None:
        """Without counters, do nothing."""
        self._nvml = nvml
        self._samples: list[tuple[float, int, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if nvml else None

    def _run(self) -> None:
        while not self._stop.wait(0.004):
            with suppress(Exception):  # a reading that fails is one reading less
                energy, clock = self._nvml.read()
                self._samples.append((time.perf_counter(), energy, clock))

    def __enter__(self) -> Sampler:
        """Start."""
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_error: Any) -> None:
        """Stop."""
        self._stop.set()
        if self._thread:
            self._thread.join()

    def over(self, begin: float, end: float) -> tuple[float | None, float | None]:
        """Mean power in W and mean SM clock in MHz between two times of ``perf_counter``.

        The driver renews the energy some ten times a second, so power is the slope from the first
        renewal in the window to the last; dividing by the whole window would be off by a renewal.
        """
        inside = [sample for sample in self._samples if begin <= sample[0] <= end]
        if len(inside) < 2:
            return None, None
        clock = statistics.fmean(sample[2] for sample in inside)
        renewals = [after for before, after in pairwise(inside) if after[1] != before[1]]
        if len(renewals) < 3:
            return None, clock
        (t0, e0, _), (t1, e1, _) = renewals[0], renewals[-1]
        return 1e-3 * (e1 - e0) / (t1 - t0), clock
