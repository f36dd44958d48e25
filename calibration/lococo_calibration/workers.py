"""Several processes that share one run, as torchrun or accelerate start them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lococo_runtime._exceptions import UnsupportedError
from torch import Tensor


class Workers:
    """This process among those of the run. One process needs neither accelerate nor torch.distributed.

    Args:
        device: "auto" gives every process a GPU of its own.

    Raises:
        UnsupportedError: started as one of several, without accelerate.
    """

    def __init__(self, device: str) -> None:
        self.rank, self.count = 0, 1
        self._state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        try:
            accelerate: Any = importlib.import_module("accelerate")
        except ModuleNotFoundError as e:
            raise UnsupportedError("several processes need accelerate: pip install 'lococo-export[fit-all]'") from e
        self._state = accelerate.PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def first(self) -> bool:
        """Whether this process writes files and lines."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """`name`, or this process's GPU for "auto" and "cuda"."""
        return str(self._state.device) if self._state is not None and name in ("auto", "cuda") else name

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """The others enter when the first has left, and find its files."""
        if self._state is None:
            yield
        else:
            with self._state.main_process_first():
                yield

    def mean(self, tensors: list[Tensor]) -> None:
        """Replaces tensors by their means over all processes."""
        if self._state is None:
            return
        flat = torch.cat([t.flatten() for t in tensors])
        torch.distributed.all_reduce(flat)
        flat /= self.count
        for t, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            t.copy_(part.view_as(t))

    def wait(self) -> None:
        """Until all are here."""
        if self._state is not None:
            self._state.wait_for_everyone()
