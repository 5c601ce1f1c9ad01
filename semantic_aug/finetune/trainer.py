"""The training loop of stage 1: textual inversion and DreamBooth-style LoRA (arXiv:2208.01618, 2208.12242, 2106.09685)."""

from __future__ import annotations

import contextlib
import logging
import signal
import time

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DDPMScheduler
from torch import Tensor
from tqdm import tqdm

from semantic_aug import files, runs
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.origin import RunOrigin
from semantic_aug.diffusion import losses
from semantic_aug.diffusion.base import BaseModel, load_base, weight_files
from semantic_aug.diffusion.loop import sample_posterior
from semantic_aug.divergence import CHECK_STEPS, LossLog
from semantic_aug.errors import Interrupted, UserError
from semantic_aug.finetune import checkpoints, divergence
from semantic_aug.finetune.batches import BatchSource
from semantic_aug.finetune.config import FinetuneConfig
from semantic_aug.finetune.early import disk_needed
from semantic_aug.finetune.folder import SUMMARY_FILE, finished, origin_of, take_folder
from semantic_aug.finetune.latents import LatentCache
from semantic_aug.finetune.model import TrainedModel
from semantic_aug.finetune.optim import make_optimizer, make_schedule
from semantic_aug.finetune.pixels import PixelCache
from semantic_aug.finetune.sizes import image_sizes
from semantic_aug.finetune.validation import save_grid, validation_grid
from semantic_aug.prompts import TEMPLATES
from semantic_aug.runs import RunLock

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.csv"
BEFORE_RESULTS = (runs.ARGS_FILE, "latents-*", "pixels-*", "logs/*")
"""What a run writes before its first result; see :func:`semantic_aug.files.no_trace`."""
METRIC_COLUMNS = ("step", "loss", "lora_lr", "token_lr", "grad_norm", "steps_per_second")
STOP_CHECK_STEPS = 10
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Trainer:
    """One fine-tuning run.

    Args:
        config: the request.
        dataset: loaded under ``config.setting``.
        accelerator: made by :func:`make_accelerator`.
        origin: of the run, on the main process; its images are looked at again when they have been encoded and at the end.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        dataset: LoadedDataset,
        accelerator: Accelerator,
        origin: RunOrigin | None = None,
    ):
        self.config, self.dataset, self.accelerator, self.origin = config, dataset, accelerator, origin
        self.base: BaseModel = load_base(config.base_name, config.base_folder)
        self.base.geometry.check(config.resolution)
        dtype = DTYPES[config.mixed_precision]
        self.model = TrainedModel(self.base, config, dataset).train()
        self._place(dtype)
        self.optimizer = make_optimizer(self.model.parameter_groups(config), config, accelerator.device)
        self.schedule = make_schedule(self.optimizer, config)
        self.noise_scheduler = DDPMScheduler.from_config(self.base.scheduler_config)
        self.prediction_type = config.prediction_type or self.noise_scheduler.config.prediction_type
        self.alphas = losses.alphas_cumprod(self.noise_scheduler).to(accelerator.device)
        if not config.resume_from_checkpoint:  # else much of it is written already
            trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
            needed = disk_needed(config, len(dataset.train), self.base.geometry, trained)
            files.check_space(config.output_dir, needed, "--output_dir")
        self.latents = self._encode_images()
        if not config.random_crops:  # the images are encoded: until pictures are drawn the VAE need not lie on a GPU
            self.base.vae.to("cpu")
        self.sizes = image_sizes(dataset.train, config) if self.base.family.sizes else None
        self.effective_batch = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        self.source = BatchSource(
            dataset.train.labels,
            self.effective_batch,
            self.base.geometry.latent_shape(config.resolution),
            0 if config.random_crops else config.crops,
            config.random_flip,
            len(TEMPLATES),
            self.noise_scheduler.config.num_train_timesteps,
            config.noise_offset,
            config.class_balanced,
            config.seed,
        )
        self.labels = torch.from_numpy(dataset.train.labels)
        self.step = 0
        self.stop_signal: int | None = None
        self._scaler_state: dict | None = None
        if origin is not None:
            origin.refuse_changed("no step was trained; run the command again with another --output_dir")
            self.model.describe_images(origin.describe()["data"]["train"]["digest"])

    def _place(self, dtype: torch.dtype) -> None:
        """Frozen weights in the working precision, trained ones in float32, everything on the device."""
        device = self.accelerator.device
        self.base.vae.to(device, torch.float32 if dtype == torch.float16 else dtype)  # SD's VAE can overflow in fp16
        self.model.to(device)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        self.model.unet.to(memory_format=torch.channels_last)
        self.model.join_projections()
        if self.config.compiled(device.type):
            self.model.compile_networks()

    def _encode_images(self) -> LatentCache | PixelCache:
        shared = (self.accelerator.process_index, self.accelerator.num_processes, self.accelerator.wait_for_everyone)
        if self.config.random_crops:
            return PixelCache(
                self.dataset.train, self.config.output_dir, self.base.vae, self.config.resolution, *shared
            )
        folder = self.base.folder
        digest = files.sha256_text(
            "".join(files.sha256_file(p) for p in weight_files(folder) if p.parent.name == "vae")
        )
        return LatentCache(
            self.dataset.train,
            self.config.output_dir,
            self.base.vae,
            digest,
            self.config.resolution,
            self.config.crops,
            self.config.random_flip,
            self.config.seed,
            *shared,
        )

    # -------------------------------------------------------------------------------------------------- one run

    def prepare(self) -> None:
        """Wraps what :meth:`optimizer_step` runs for mixed precision and several processes."""
        # the model is where it should be; what copies its tensors would part those that are parts of others
        self._wrapped, self._stepper = self.accelerator.prepare(
            self.model, self.optimizer, device_placement=[False, True]
        )
        if self._scaler_state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._scaler_state)

    def train(self) -> dict:
        """Runs (or goes on) to ``max_train_steps`` and writes the final files.

        Returns:
            The summary that ``summary.json`` keeps.

        Raises:
            Interrupted: SIGINT or SIGTERM came; a checkpoint was written.
            UserError: a checkpoint that does not fit.
        """
        config, accelerator = self.config, self.accelerator
        main = accelerator.is_main_process
        self._resume()
        self.prepare()
        metrics = (
            runs.MetricsCsv(config.output_dir / METRICS_FILE, METRIC_COLUMNS, keep_below=self.step) if main else None
        )
        began, first = time.monotonic(), self.step
        loss_log = LossLog(accelerator.device, CHECK_STEPS, lambda part: accelerator.reduce(part, "mean"))
        total, norm, logged_at, logged_step = 0.0, None, began, self.step
        with (
            self._signals(),
            tqdm(
                total=config.max_train_steps,
                initial=self.step,
                unit="step",
                desc=f"finetune {config.strategy}",
                disable=not main,
                dynamic_ncols=True,
                mininterval=1.0,
            ) as bar,
        ):
            while self.step < config.max_train_steps:
                loss, norm = self.optimizer_step()
                loss_log.add(loss)
                bar.update()
                logged = self.step % config.logging_steps == 0 or self.step == config.max_train_steps
                stopping = self._should_stop()
                saving = stopping or (config.checkpointing_steps and self.step % config.checkpointing_steps == 0)
                if logged or saving or loss_log.count == CHECK_STEPS:
                    total += divergence.sum_of_losses(loss_log, self.step, accelerator.scaler, config)
                if logged:
                    now, count = time.monotonic(), self.step - logged_step
                    row = {"loss": total / count, "steps_per_second": count / (now - logged_at)}
                    row |= self._learning_rates() | ({"grad_norm": float(norm)} if norm is not None else {})
                    if main:
                        metrics.add(step=self.step, **row)
                        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                    accelerator.log(row, step=self.step)
                    total, logged_at, logged_step = 0.0, now, self.step
                if saving:
                    self._checkpoint()
                if stopping:
                    raise Interrupted(
                        f"interrupted at step {self.step} of {config.max_train_steps}: {config.output_dir}/"
                        f"checkpoint-{self.step} is written; the same command with --resume_from_checkpoint latest goes on"
                    )
                if config.validation_steps and self.step % config.validation_steps == 0:
                    before = time.monotonic()
                    self._validate()
                    logged_at += time.monotonic() - before
        return self._finish(time.monotonic() - began, self.step - first)

    def optimizer_step(self) -> tuple[Tensor, Tensor | None]:
        """The next optimiser step, over all micro-batches; returns the mean loss and the gradient norm, without a sync."""
        config, accelerator = self.config, self.accelerator
        draw = self.source.draw(self.step)
        total, norm = torch.zeros((), device=accelerator.device), None
        for micro in range(config.gradient_accumulation_steps):
            last = micro == config.gradient_accumulation_steps - 1
            part = draw.part(micro * accelerator.num_processes + accelerator.process_index, config.train_batch_size)
            with contextlib.nullcontext() if last else accelerator.no_sync(self._wrapped):
                loss = self._loss(part) / config.gradient_accumulation_steps
                accelerator.backward(loss)
            total += loss.detach()
        if config.max_grad_norm:
            norm = accelerator.clip_grad_norm_(
                [p for g in self.optimizer.param_groups for p in g["params"]], config.max_grad_norm
            )
        self._stepper.step()
        self.schedule.step()
        self._stepper.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm

    def _moved(self, values: Tensor) -> Tensor:
        """Values on the device; a copy to a GPU from ordinary memory would wait for all that was started before it."""
        device = self.accelerator.device
        if device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()
        return values.to(device, non_blocking=True)

    def _loss(self, draw) -> Tensor:
        moments = self._moved(self.latents.gather(draw.index, draw.view, draw.flip))
        noise, timesteps = self._moved(draw.noise), self._moved(draw.timestep)
        latents = sample_posterior(moments, self._moved(draw.posterior), self.base.vae.config.scaling_factor)
        noisy = losses.add_noise(latents, noise, timesteps, self.alphas)
        wanted = losses.target(latents, noise, timesteps, self.alphas, self.prediction_type)
        captions = self.model.captions.choose(draw.index, draw.caption)
        sizes = None if self.sizes is None else self.sizes[draw.index, draw.view, draw.flip.long()]
        conditions = self.model.conditions(self.labels[draw.index], draw.template, captions, sizes)
        conditions = {name: self._moved(value) for name, value in conditions.items()}
        dtype = DTYPES[self.config.mixed_precision]
        predicted = self._wrapped(noisy.to(dtype), timesteps, conditions)
        weights = None
        if self.config.snr_gamma is not None:
            weights = losses.min_snr_weights(timesteps, self.alphas, self.config.snr_gamma, self.prediction_type)
        return losses.denoising_loss(predicted, wanted, weights)

    def _learning_rates(self) -> dict[str, float]:
        rates = [group["lr"] for group in self.optimizer.param_groups]
        names = [
            name for name, used in (("lora_lr", self.model.lora_parameters), ("token_lr", self.model.vectors)) if used
        ]
        return dict(zip(names, rates, strict=True))

    # ------------------------------------------------------------------------------------- checkpoints and signals

    def _resume(self) -> None:
        if not self.config.resume_from_checkpoint:
            return
        folder = checkpoints.find(self.config.output_dir, self.config.resume_from_checkpoint)
        if folder is None:
            log.info("no checkpoint in %s yet: starting from the beginning", self.config.output_dir)
            return
        state = checkpoints.load_state(folder)
        if state["effective_batch"] != self.effective_batch:
            raise UserError(
                f"{folder} was trained with an effective batch of {state['effective_batch']} images, this run has "
                f"{self.effective_batch} (--train_batch_size x --gradient_accumulation_steps x processes)"
            )
        checkpoints.load_weights(self.model, folder)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError:
            raise UserError(
                f"{folder} holds an optimiser of other parameters, from another version of this program or with other "
                "settings, and cannot be gone on with: choose another --output_dir"
            ) from None
        self.schedule.load_state_dict(state["schedule"])
        self.step, self._scaler_state = state["step"], state["scaler"]
        log.info("resuming from %s", folder)

    def _checkpoint(self) -> None:
        divergence.check_weights(self.model, self.step, self.config)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._save_checkpoint()
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        scaler = self.accelerator.scaler
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "effective_batch": self.effective_batch,
        }
        limit = self.config.checkpoints_total_limit
        checkpoints.save_checkpoint(self.config.output_dir, self.step, self.model, state, limit)

    def _refuse_changed_images(self) -> None:
        """Nothing is concluded of images that are no longer those of the record.

        All of them were read, and compared, before the first step: with the old images back the run may be concluded.
        """
        if self.origin is None:
            return
        try:
            self.origin.refuse_changed(
                f"no final weights were written, {self.config.output_dir}/checkpoint-{self.step} is kept; restore the "
                "images and add --resume_from_checkpoint latest, or choose another --output_dir"
            )
        except UserError:
            self._save_checkpoint()
            raise

    @contextlib.contextmanager
    def _signals(self):
        def note(number, _):
            if self.stop_signal is not None:  # a second one: at once, without a checkpoint
                raise KeyboardInterrupt
            self.stop_signal = number

        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _should_stop(self) -> bool:
        """Whether any process was asked to stop; all of them must agree on the step."""
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        if self.step % STOP_CHECK_STEPS:
            return False
        asked = torch.tensor(float(self.stop_signal is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def _validate(self) -> None:
        if not self.accelerator.is_main_process or not self.config.num_validation_images:
            return
        self.model.eval()
        before = self.base.vae.device
        self.base.vae.to(self.accelerator.device)
        image = validation_grid(
            self.model,
            self.base,
            self.dataset.class_names,
            self.config.resolution,
            self.config.num_validation_images,
            self.config.seed,
            self.accelerator.autocast,
        )
        self.base.vae.to(before)
        self.model.train()
        save_grid(image, self.config.output_dir, self.step)
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):  # not all of accelerate's trackers take pictures
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.asarray(image)[None]}, step=self.step, **layout)

    def _finish(self, seconds: float, steps: int) -> dict:
        divergence.check_weights(self.model, self.step, self.config)
        self.accelerator.wait_for_everyone()
        summary = {
            "steps": self.step,
            "images": len(self.dataset.train),
            "seconds": round(seconds, 1),
            "steps_per_second": round(steps / seconds, 3) if seconds and steps else None,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "versions": runs.versions(),
        }
        if self.accelerator.is_main_process:
            self._refuse_changed_images()
            checkpoints.save_weights(self.model, self.config.output_dir)
            files.write_json(self.config.output_dir / SUMMARY_FILE, summary)
            self.latents.remove()
            checkpoints.remove_leftovers(self.config.output_dir)
            log.info(
                "%d steps in %.0f s, %s steps/s: %s",
                steps,
                seconds,
                summary["steps_per_second"],
                self.config.output_dir,
            )
        self.accelerator.end_training()
        return summary


def make_accelerator(config: FinetuneConfig) -> Accelerator:
    """The accelerator of a run; launched by ``accelerate launch`` or plainly."""
    return Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(str(config.output_dir), str(config.output_dir / "logs")),
    )


def run(config: FinetuneConfig, dataset: LoadedDataset, accelerator: Accelerator) -> dict:
    """Runs a request in its output folder, or finds it done.

    Raises:
        UserError: the folder holds a run with other arguments or an unfinished one that is not asked to be resumed, or
            is in use.
        Interrupted: a signal stopped it; a checkpoint was written.
    """
    with contextlib.ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(files.no_trace(config.output_dir, BEFORE_RESULTS))
            held.enter_context(RunLock(config.output_dir, "--output_dir"))
        return _run_alone(config, dataset, accelerator)


def _run_alone(config: FinetuneConfig, dataset: LoadedDataset, accelerator: Accelerator) -> dict:
    """See :func:`run`."""
    origin = origin_of(config, dataset)
    if accelerator.is_main_process:
        take_folder(config, origin, accelerator.num_processes)
    accelerator.wait_for_everyone()
    done = finished(config.output_dir)
    if done and done["steps"] >= config.max_train_steps:
        return done
    if config.report_to != "none":
        record = runs.plain(config.record(accelerator.num_processes))
        flat = {name: value for name, value in record.items() if isinstance(value, (str, int, float, bool))}
        accelerator.init_trackers("finetune", flat)
    return Trainer(config, dataset, accelerator, origin if accelerator.is_main_process else None).train()
