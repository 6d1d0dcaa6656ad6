"""A step captured once as a CUDA graph and replayed: one launch in place of thousands."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Generator, Tensor

log = logging.getLogger("sdecor")
T = TypeVar("T")
_WARM = 3


class Captured(Generic[T]):
    """A function of tensors that changes state on a GPU, run from a CUDA graph after `_WARM` calls as it is.

    All calls but those of another shape replay the kernels of the captured call on copies of their inputs, and give the
    same output tensors, with other values. What the function decides on the CPU is decided once; what it draws on the
    GPU from `generator`, or from the default one, is drawn anew. A function that waits for the GPU cannot be captured:
    a warning says so, and it runs as it is.
    """

    def __init__(self, function: Callable[..., T], generator: Generator | None = None) -> None:
        self.function, self.generator = function, generator
        self.calls, self.stream = 0, torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.possible = True

    def __call__(self, *inputs: Tensor) -> T:
        """The function's output; valid until the next call."""
        fits = not self.inputs or [t.shape for t in inputs] == [t.shape for t in self.inputs]
        if not (self.possible and fits):
            return self.function(*inputs)
        self.calls += 1
        if self.calls <= _WARM:
            return self._aside(inputs)
        if self.graph is None:
            self._capture(inputs)
            if self.graph is None:
                return self.function(*inputs)
        for own, new in zip(self.inputs, inputs, strict=True):
            own.copy_(new)
        self.graph.replay()
        return self.output

    def _aside(self, inputs: tuple[Tensor, ...]) -> T:
        """Run on the stream of the capture, where libraries then have made what they make once."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            out = self.function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return out

    def _capture(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = [torch.empty_like(t).copy_(t) for t in inputs]
        graph = torch.cuda.CUDAGraph()
        if self.generator is not None and self.generator.device.type == "cuda":
            graph.register_generator_state(self.generator)
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            self.possible = False
            log.warning("the step runs without a CUDA graph, several times slower: %s", str(error).splitlines()[0])
        else:
            self.graph = graph
