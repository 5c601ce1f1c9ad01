"""Forward and backward pass of a step as one CUDA graph, which starts all their kernels with one launch.

A step of Stable Diffusion at a small batch is thousands of kernels that take less time to run than to launch. Not yet measured
on a GPU; ``python scripts/bench.py gpu`` does it.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

WARM_UP_STEPS = 3
"""Steps that run as usual before one is recorded: libraries choose their kernels and take their memory at the first calls."""


class GraphRecorder:
    """Records on the stream on which what comes before has run: autograd remembers the streams of parameters."""

    def __init__(self):
        self.stream = torch.cuda.Stream()

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """Calls a function."""
        usual = torch.cuda.current_stream()
        self.stream.wait_stream(usual)
        with torch.cuda.stream(self.stream):
            result = function()
        usual.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records what a function does on the GPU, without doing it; returns what does it again, with the same memory."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            function()
        return graph.replay


class RecordedStep:
    """Loss and gradients of a batch, recorded with one batch and replayed with the values of the others (PyTorch's notes on
    CUDA graphs, "whole-network capture"; the optimiser stays outside, so that clipping and skipped steps are as they were).

    Args:
        function: from the tensors of a batch, by name, to its loss, a scalar; adds the gradients to ``parameters``. It may
            read no value from the device, and what changes from step to step it takes from its argument.
        parameters: what is trained; without gradients whenever a step begins.
        recorder: has the methods of :class:`GraphRecorder`, which is the default.
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
            parameter.grad = gradient  # dropped after each step, but the graph writes where it wrote before
        return self.loss

    def _keep_results(self) -> None:
        self.loss = self.function(self.batch)
        self.gradients = [parameter.grad for parameter in self.parameters]
