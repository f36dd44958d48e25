"""Work that is the same at every call, as a CUDA graph: a small model otherwise waits for the CPU that launches it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def capture(
    run: Callable[[], Any], device: torch.device, *, warm_up: Callable[[], Any] | None = None
) -> torch.cuda.CUDAGraph:
    """`run` as a graph to replay. It reads and writes tensors that outlive it, in place; capturing computes nothing.

    Args:
        device: a CUDA device; kernels of others are not captured.
        warm_up: runs twice before, on a stream of its own, where libraries set themselves up, which a capture does not
            allow; None: `run` itself, which then computes.

    Raises:
        RuntimeError: from torch, something in `run` cannot be captured, such as a copy to the host.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                (warm_up or run)()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # a graph has memory of its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    return graph
