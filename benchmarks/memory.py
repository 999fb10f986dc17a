"""Memory, counted in bytes of tensor allocations, as the profiler records them."""

from collections.abc import Callable
from typing import Any

from torch._C._profiler import _EventType, _ProfilerEvent
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], Any]) -> int:
    """The largest number of bytes that live at once in what ``step`` allocates."""
    return max(live_bytes(step))


def live_bytes(step: Callable[[], Any]) -> list[int]:
    """Bytes of what ``step`` allocates that live after each allocation and release, from 0 on."""
    return [live for _, live in timeline(step)]


def timeline(step: Callable[[], Any]) -> list[tuple[float, int]]:
    """After each allocation and release in ``step``: the second, from 0 on, and the bytes that live
    of what it allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    todo: list[_ProfilerEvent] = list(profiler.profiler.kineto_results.experimental_event_tree())
    events = []
    while todo:
        event = todo.pop()
        todo += event.children
        if event.typed[0] == _EventType.Allocation:
            events.append((event.start_time_ns, event.typed[1]))
    # By address: a release of what was allocated before is recorded too, where an earlier profile
    # in this process saw its address.
    at: dict[int, int] = {}
    live = [(0.0, 0)]
    events.sort(key=lambda event: event[0])
    for nanoseconds, event in events:
        size = event.alloc_size
        change = size if size > 0 else -at.pop(event.ptr, 0)
        if size > 0:
            at[event.ptr] = size
        live.append(((nanoseconds - events[0][0]) / 1e9, live[-1][1] + change))
    return live
