"""Forward and backward pass of a step as one CUDA graph, whose kernels are started by one launch.

A step of Stable Diffusion at a small batch has thousands of kernels that take less time to run than to launch. Not yet measured
on a GPU; ``python scripts/bench.py gpu`` measures it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 3
"""Steps that run as usual before one is recorded: in its first calls a library chooses its kernels and allocates memory."""


class GraphRecorder:
    """Warms up and records on one stream, since autograd remembers the streams of parameters."""

    def __init__(self):
        self.stream = torch.cuda.Stream()

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """Calls a function on the stream of the recording."""
        usual = torch.cuda.current_stream()
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            result = function()
        usual.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records the GPU work of a function without running it; returns its replay, which uses the same memory."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            function()
        return graph.replay


class RecordedStep:
    """Loss and gradients of a batch, recorded with one batch and replayed with the values of the others (PyTorch's notes on
    CUDA graphs, "whole-network capture"). The optimiser is not recorded, so that clipping and skipped steps work as usual.

    Args:
        function: from the tensors of a batch, by name, to its loss, a scalar; adds the gradients to ``parameters``. It reads
            no value from the device, and takes everything that changes from step to step from its argument.
        parameters: the trained ones; they have no gradients when a step begins.
        recorder: a :class:`GraphRecorder`, or an object with its methods.
    """

    def __init__(
        self,
        function: Callable[[Mapping[str, Tensor]], Tensor],
        parameters: Sequence[nn.Parameter],
        recorder: GraphRecorder | None = None,
    ):
        self.function, self.parameters, self.recorder = function, parameters, recorder or GraphRecorder()
        self.calls = 0
        self.batch: dict[str, Tensor] = {}
        self.loss: Tensor | None = None
        self.gradients: list[Tensor | None] = []
        self.replay: Callable[[], None] | None = None

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch, whose names, shapes and precisions are the same at every call; it lasts until the next."""
        self.calls += 1
        if self.calls <= WARM_UP_STEPS:
            return self.recorder.warm_up(lambda: self.function(batch))
        if self.replay is None:
            self.batch = {name: value.clone() for name, value in batch.items()}
            self.replay = self.recorder.record(self._keep_results)
        for name, value in batch.items():
            self.batch[name].copy_(value, non_blocking=True)
        self.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # reset after each step, but the graph writes to the same memory
        return self.loss

    def _keep_results(self) -> None:
        self.loss = self.function(self.batch)
        self.gradients = [parameter.grad for parameter in self.parameters]
