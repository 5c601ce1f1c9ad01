"""A recorded step is the plain one. There is no GPU here, so what a recording needs is tested: nothing is read on the host, and
all that changes comes through the batch."""

import pytest
import torch
from test_finetune_loop import any_precision, make_trainer, request  # noqa: F401 (a fixture)
from torch.utils._python_dispatch import TorchDispatchMode

from semantic_aug.errors import UserError
from semantic_aug.finetune.graph import WARM_UP_STEPS, RecordedStep

aten = torch.ops.aten
WAITS = (
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.lift_fresh.default,  # a constant made by the host
    aten.randn.default,
    aten.rand.default,
    aten.bernoulli.default,
)
"""What a recording refuses, or would repeat though it should change."""


class Recorded(TorchDispatchMode):
    """Notes what a recording would refuse."""

    def __init__(self):
        super().__init__()
        self.calls, self.refused = 0, []

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        self.calls += 1
        by_mask = call is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if call in WAITS or by_mask:
            self.refused.append(str(call))
        return call(*args, **(kwargs or {}))


class Repeated:
    """Repeats a function as a CUDA graph does: results come where they came when it was recorded."""

    def __init__(self, parameters):
        self.parameters = parameters

    def warm_up(self, function):
        return function()

    def record(self, keep_results):
        step = keep_results.__self__
        keep_results()
        loss, gradients, batch = step.loss, step.gradients, step.batch

        def replay():
            assert step.batch is batch and all(p.grad is None for p in self.parameters)
            keep_results()
            loss.copy_(step.loss)
            for kept, gradient in zip(gradients, step.gradients, strict=True):
                kept.copy_(gradient)
            step.loss, step.gradients = loss, gradients

        for parameter in self.parameters:
            parameter.grad = None  # recording is not doing
        return replay


CASES = [
    ("sd1", {}),
    ("sd1", {"mixed_precision": "bf16", "snr_gamma": 5, "noise_offset": 0.1, "lora_targets": ("to_q", "conv1")}),
    ("sd1", {"finetune_strategy": "ti", "random_crops": True}),
    ("sd1", {"finetune_strategy": "db", "lr_scheduler": "cosine"}),
    ("sd2", {"train_text_encoder_lora": True}),
    ("sdxl", {}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_recorded_step_is_the_plain_one(bases, image_folder, tmp_path, family, changes):
    losses, weights = [], []
    for name in ("plain", "recorded"):
        running = make_trainer(bases[family], image_folder, tmp_path / name, **changes)
        if name == "recorded":
            parameters = running._parameters()
            step = RecordedStep(running._pass, parameters, Repeated(parameters))
            running._pass = step
        losses.append([float(running.optimizer_step()[0]) for _ in range(WARM_UP_STEPS + 3)])
        weights.append([parameter.detach().clone() for parameter in running._parameters()])
    assert step.replay is not None and len(set(losses[0])) == len(losses[0])
    assert losses[0] == losses[1]
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_a_pass_reads_nothing_on_the_host(bases, image_folder, tmp_path, family, changes):
    running = make_trainer(bases[family], image_folder, tmp_path / "run", **changes)
    running.optimizer_step()  # what is made once, at the first step
    first, second = (running._batch(running.source.draw(step).part(0, 4)) for step in range(2))
    assert {n: (v.shape, v.dtype) for n, v in first.items()} == {n: (v.shape, v.dtype) for n, v in second.items()}
    with Recorded() as recorded:
        loss = running._forward_and_backward(second)
    assert recorded.calls > 100 and not recorded.refused
    with Recorded() as recorded:
        float(loss)
    assert recorded.refused  # it would have been seen


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, "no GPU that PyTorch can use"),
        ({"gradient_accumulation_steps": 2}, "micro-batches"),
        ({"gradient_checkpointing": True}, "--gradient_checkpointing"),
        ({"ACCELERATE_USE_CPU": "true"}, "accelerate set to the CPU"),
        ({"LOCAL_RANK": "0"}, "a distributed launch"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tiny_base, image_folder, tmp_path, monkeypatch, changes, named):
    if changes:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for name in [name for name in changes if name.isupper()]:
            monkeypatch.setenv(name, changes.pop(name))
    elif torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=f"^--cuda_graph with {named}"):
        request(tiny_base, image_folder, tmp_path / "run", cuda_graph=True, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_on_a_gpu_losses_and_pictures_are_the_plain_ones(tiny_base, image_folder, tmp_path, precision):
    """Recorded for real, with pictures drawn in between."""
    losses = []
    for name, graph in (("plain", {}), ("recorded", {"cuda_graph": True})):
        options = {"mixed_precision": precision, "compile": "off", "num_validation_images": 1, **graph}
        running = make_trainer(tiny_base, image_folder, tmp_path / name, cpu=False, **options)
        steps = [float(running.optimizer_step()[0]) for _ in range(WARM_UP_STEPS + 2)]
        running._validate()
        losses.append(steps + [float(running.optimizer_step()[0]) for _ in range(2)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3 if precision != "no" else 1e-5)
