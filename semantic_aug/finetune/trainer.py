"""The training loop of stage 1: textual inversion and DreamBooth-style LoRA (arXiv:2208.01618, 2208.12242, 2106.09685)."""

import contextlib
import logging
import time
from collections.abc import Mapping

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor
from tqdm import tqdm

from semantic_aug import files, runs
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.origin import RunOrigin
from semantic_aug.diffusion import losses
from semantic_aug.diffusion.base import BaseModel, load_base, weight_files
from semantic_aug.diffusion.loop import sample_posterior
from semantic_aug.divergence import CHECK_STEPS, LossLog, check_losses, non_finite
from semantic_aug.errors import Interrupted, UserError, signals_to
from semantic_aug.finetune import checkpoints
from semantic_aug.finetune.batches import BatchSource, Draw
from semantic_aug.finetune.config import FinetuneConfig
from semantic_aug.finetune.graph import RecordedStep
from semantic_aug.finetune.latents import LatentCache, PixelCache, image_sizes
from semantic_aug.finetune.model import TrainedModel, make_optimizer, make_schedule
from semantic_aug.finetune.validation import validation_grid

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.csv"
METRIC_COLUMNS = ("step", "loss", "lora_lr", "token_lr", "grad_norm", "steps_per_second")
STOP_CHECK_STEPS = 10
MIN_LOSS_SCALE = 2.0**-14
"""Scale of the loss in fp16 below which its gradients stay infinite."""
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Trainer:
    """One fine-tuning run.

    Args:
        dataset: loaded under ``config.setting``.
        accelerator: decides device, precision and processes.
        origin: record of the training images, on the main process; compared again after encoding and at the end.
    """

    def __init__(
        self, config: FinetuneConfig, dataset: LoadedDataset, accelerator: Accelerator, origin: RunOrigin | None = None
    ):
        self.config, self.dataset, self.accelerator, self.origin = config, dataset, accelerator, origin
        # the labelled images, then the unlabelled ones as a further class
        self.images = dataset.train if dataset.unlabelled is None else dataset.train.with_class(dataset.unlabelled)
        self.base: BaseModel = load_base(config.model.pretrained_model_name_or_path, config.base_folder)
        self.dtype = DTYPES[config.model.mixed_precision]
        self.model = TrainedModel(self.base, config, dataset).train()
        self._move_to_device()
        self.optimizer = make_optimizer(self.model.parameter_groups(config.train), config.train, accelerator.device)
        self.schedule = make_schedule(self.optimizer, config.train)
        self.noise_scheduler = DDPMScheduler.from_config(self.base.scheduler_config)
        self.prediction_type = self.noise_scheduler.config.prediction_type
        self.alphas = self.noise_scheduler.alphas_cumprod.to(accelerator.device)
        trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        checkpoints.check_disk(config, len(self.images), self.base.geometry, trained)
        self.latents = self._encode_images()
        if not config.images.random_crops:  # the images are encoded: until pictures are drawn, no GPU need hold the VAE
            self.base.vae.to("cpu")
        self.sizes = image_sizes(self.images, config) if self.base.family.sizes else None
        self.effective_batch = config.effective_batch(accelerator.num_processes)
        self.source = BatchSource(
            dataset.train.labels,
            self.effective_batch,
            self.base.geometry.latent_shape(config.images.resolution),
            views=0 if config.images.random_crops else config.images.crops,
            flip=not config.images.no_flip,
            templates=len(self.model.templates),
            num_train_timesteps=self.noise_scheduler.config.num_train_timesteps,
            noise_offset=config.train.noise_offset,
            class_balanced=config.class_balanced,
            seed=config.seed,
            unlabelled=len(dataset.unlabelled or ()),
            unlabelled_share=config.images.unlabelled_share,
        )
        self.labels = torch.from_numpy(self.images.labels)
        self.step = 0
        self.logged_step, self.loss_sum = 0, 0.0  # the last row of the metrics, and the losses since then
        self.stop_signal: int | None = None
        self._scaler_state: dict | None = None
        if origin is not None:
            origin.refuse_changed("no step was trained; run the command again with another --output_dir")
            self.model.describe_images(origin.describe()["data"]["train"]["digest"])

    def _move_to_device(self) -> None:
        """Frozen weights in the working precision, trained ones in float32, everything on the device."""
        device = self.accelerator.device
        vae_dtype = torch.float32 if self.dtype == torch.float16 else self.dtype  # SD's VAE can overflow in fp16
        self.base.vae.to(device, vae_dtype)
        self.model.to(device)
        for parameter in self.model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        self.model.unet.to(memory_format=torch.channels_last)
        self.model.join_projections()
        if self.config.compiled(device.type):
            self.model.compile_networks()

    def _encode_images(self) -> LatentCache | PixelCache:
        accelerator, images = self.accelerator, self.config.images
        table, output_dir, vae = self.images, self.config.output_dir, self.base.vae
        if images.random_crops:
            return PixelCache(table, output_dir, vae, images.resolution, accelerator=accelerator)
        weights = [path for path in weight_files(self.base.folder) if path.parent.name == "vae"]
        digest = files.sha256_text("".join(files.sha256_file(path) for path in weights))
        return LatentCache(
            table, output_dir, vae, digest, images.resolution,
            views=images.crops, flip=not images.no_flip, seed=self.config.seed, accelerator=accelerator,
        )  # fmt: skip

    # -------------------------------------------------------------------------------------------------- one run

    def prepare(self) -> None:
        """Wraps what :meth:`optimizer_step` runs for mixed precision and several processes."""
        # the model is on its device already, and moving it again would copy tensors that are views of others
        self._wrapped, self._stepper = self.accelerator.prepare(
            self.model, self.optimizer, device_placement=[False, True]
        )
        if self._scaler_state and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(self._scaler_state)
        self._pass = self._forward_and_backward
        if self.config.model.cuda_graph:
            self._pass = RecordedStep(self._forward_and_backward, self._parameters())

    def train(self) -> dict:
        """Trains, from the beginning or a checkpoint, to ``max_train_steps`` and writes the final files; returns the content of
        ``summary.json``. Raises Interrupted: SIGINT or SIGTERM came, a checkpoint was written; UserError: a checkpoint that
        does not fit."""
        config, accelerator = self.config, self.accelerator
        self._resume()
        self.prepare()
        path = config.output_dir / METRICS_FILE
        metrics = runs.MetricsCsv(path, METRIC_COLUMNS, self.step) if accelerator.is_main_process else None
        began, first, last = time.monotonic(), self.step, config.train.max_train_steps
        loss_log = LossLog(accelerator.device, CHECK_STEPS, lambda part: accelerator.reduce(part, "mean"))
        logged_at, timed_from = began, self.step
        with signals_to(self._note_signal), self._progress_bar() as bar:
            while self.step < last:
                loss, norm = self.optimizer_step()
                loss_log.add(loss)
                bar.update()
                logging_due = self.step % config.output.logging_steps == 0 or self.step == last
                stopping = self._should_stop()
                saving = stopping or self._is_due(config.output.checkpointing_steps)
                if loss_log.count == CHECK_STEPS or logging_due or saving:
                    self.loss_sum += self._sum_of_losses(loss_log)
                if logging_due:
                    now, count = time.monotonic(), self.step - self.logged_step
                    rate = (self.step - timed_from) / (now - logged_at)
                    row = {"loss": self.loss_sum / count, "steps_per_second": rate}
                    row |= self._learning_rates() | ({"grad_norm": float(norm)} if norm is not None else {})
                    if metrics is not None:
                        metrics.add(step=self.step, **row)
                        bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                    accelerator.log(row, step=self.step)
                    self.logged_step, self.loss_sum = self.step, 0.0
                    logged_at, timed_from = now, self.step
                if saving:
                    self._checkpoint()
                if stopping:
                    raise Interrupted(
                        f"interrupted at step {self.step} of {last}: {config.output_dir}/checkpoint-{self.step} is written; "
                        "the same command with --resume_from_checkpoint latest resumes"
                    )
                if self._is_due(config.output.validation_steps):
                    before = time.monotonic()
                    self._validate()
                    logged_at += time.monotonic() - before
        return self._finish(time.monotonic() - began, self.step - first)

    def _is_due(self, interval: int) -> bool:
        """Whether this step ends an interval; 0 for never."""
        return interval > 0 and self.step % interval == 0

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.train.max_train_steps,
            initial=self.step,
            unit="step",
            desc=f"finetune {self.config.model.finetune_strategy}",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=1.0,
        )

    def optimizer_step(self) -> tuple[Tensor, Tensor | None]:
        """The next optimiser step, over all micro-batches; returns the mean loss and the gradient norm, without a sync."""
        train, accelerator = self.config.train, self.accelerator
        draw = self.source.draw(self.step)
        total, norm = torch.zeros((), device=accelerator.device), None
        for micro in range(train.gradient_accumulation_steps):
            last = micro == train.gradient_accumulation_steps - 1
            part = draw.part(micro * accelerator.num_processes + accelerator.process_index, train.train_batch_size)
            with contextlib.nullcontext() if last else accelerator.no_sync(self._wrapped):
                total += self._pass(self._batch(part))
        if train.max_grad_norm:  # gradient clipping
            norm = accelerator.clip_grad_norm_(self._parameters(), train.max_grad_norm)
        self._stepper.step()
        self.schedule.step()
        self._stepper.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm

    def _moved(self, values: Tensor) -> Tensor:
        """Values on the device; pinned first, since a copy to a GPU from pageable memory waits for all earlier work."""
        device = self.accelerator.device
        if device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()
        return values.to(device, non_blocking=True)

    def _parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _batch(self, draw: Draw) -> dict[str, Tensor]:
        """The inputs of a pass, on the device: moments, random numbers, timesteps, conditions."""
        captions = self.model.captions.choose(draw.index, draw.caption, draw.template)
        sizes = None if self.sizes is None else self.sizes[draw.index, draw.view, draw.flip.long()]
        batch = {
            "moments": self.latents.gather(draw.index, draw.view, draw.flip),
            "posterior": draw.posterior,
            "noise": draw.noise,
            "timesteps": draw.timestep,
            **self.model.conditions(self.labels[draw.index], draw.template, captions, sizes),
        }
        return {name: self._moved(value) for name, value in batch.items()}

    def _forward_and_backward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """A micro-batch's part of the step's mean loss; its gradients are added to the parameters'."""
        loss = self._loss(**batch) / self.config.train.gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def _loss(
        self, moments: Tensor, posterior: Tensor, noise: Tensor, timesteps: Tensor, **conditions: Tensor
    ) -> Tensor:
        settings = self.config.train
        # latents: a sample of the VAE's posterior
        latents = sample_posterior(moments, posterior, self.base.vae.config.scaling_factor)
        # forward diffusion: noise of the drawn timesteps
        noisy = losses.add_noise(latents, noise, timesteps, self.alphas)
        target = losses.target(latents, noise, timesteps, self.alphas, self.prediction_type)
        predicted = self._wrapped(noisy.to(self.dtype), timesteps, conditions)
        # min-SNR loss weights
        weights = None
        if settings.snr_gamma is not None:
            weights = losses.min_snr_weights(timesteps, self.alphas, settings.snr_gamma, self.prediction_type)
        return losses.denoising_loss(predicted, target, weights)

    def _learning_rates(self) -> dict[str, float]:
        used = {"lora_lr": self.model.lora_parameters, "token_lr": self.model.vectors}
        names = [name for name, parameters in used.items() if parameters]
        return {name: group["lr"] for name, group in zip(names, self.optimizer.param_groups, strict=True)}

    # -------------------------------------------------------------------------------------------------- checkpoints

    def _resume(self) -> None:
        wanted = self.config.output.resume_from_checkpoint
        if not wanted:
            return
        folder = checkpoints.find(self.config.output_dir, wanted)
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
                "settings, and cannot be continued: choose another --output_dir"
            ) from None
        self.schedule.load_state_dict(state["schedule"])
        self.step, self._scaler_state = state["step"], state["scaler"]
        # checkpoints of earlier versions lack the losses
        self.logged_step, self.loss_sum = state.get("logged_step", self.step), state.get("loss_sum", 0.0)
        log.info("resuming from %s", folder)

    def _checkpoint(self) -> None:
        self._check_weights()
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self._save_checkpoint()
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        scaler, limit = self.accelerator.scaler, self.config.output.checkpoints_total_limit
        state = {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "effective_batch": self.effective_batch,
            "logged_step": self.logged_step,
            "loss_sum": self.loss_sum,
        }
        checkpoints.save_checkpoint(self.config.output_dir, self.step, self.model, state, limit)

    # --------------------------------------------------------------------------------------------------- divergence

    def _sum_of_losses(self, log: LossLog) -> float:
        """The sum of the losses since the last read. Raises UserError: a loss is not finite, or no scale of it gives finite
        fp16 gradients."""
        recent, scaler = log.read(), self.accelerator.scaler
        check_losses(recent, self.step, self._advice())
        if scaler is not None and scaler.get_scale() < MIN_LOSS_SCALE:
            raise UserError(
                f"training diverged: at step {self.step} no scale of the loss gives finite fp16 gradients; {self._advice()}"
            )
        return float(recent.sum())

    def _check_weights(self) -> None:
        """Refuses trained weights that are not finite, before they are written. Raises UserError: names the first of them."""
        trained = [(name, value) for name, value in self.model.named_parameters() if value.requires_grad]
        if self.model.flat_lora is not None:
            trained.append(("LoRA", self.model.flat_lora.values))
        if name := non_finite(trained):
            raise UserError(f"training diverged: after step {self.step} '{name}' is not finite; {self._advice()}")

    def _advice(self) -> str:
        """What to lower, and which checkpoint is kept."""
        model, train = self.config.model, self.config.train
        saved = checkpoints.listed(self.config.output_dir)
        rates = [f"--learning_rate {train.learning_rate:g}"] if model.trains_lora else []
        rates += [f"--ti_learning_rate {train.ti_learning_rate:g}"] if model.trains_tokens else []
        return (
            f"lower {' and '.join(rates)}"
            + (", set --max_grad_norm 1" if not train.max_grad_norm else "")
            + (", use --mixed_precision bf16" if model.mixed_precision == "fp16" else "")
            + " and choose another --output_dir; "
            + (f"{saved[-1]} is the last good checkpoint" if saved else "there is no checkpoint yet")
        )

    def _refuse_changed_images(self) -> None:
        """Refuses to finish when training images have changed since they were recorded; the last step is kept as a checkpoint,
        from which the run finishes once the images are restored."""
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

    # ------------------------------------------------------------------------------------------ signals and pictures

    def _note_signal(self, number: int, _) -> None:
        if self.stop_signal is not None:  # a second one: at once, without a checkpoint
            raise KeyboardInterrupt
        self.stop_signal = number

    def _should_stop(self) -> bool:
        """Whether any process received a signal; all of them stop at the same step."""
        if self.accelerator.num_processes == 1:
            return self.stop_signal is not None
        if self.step % STOP_CHECK_STEPS:
            return False
        asked = torch.tensor(float(self.stop_signal is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def _validate(self) -> None:
        count = self.config.output.num_validation_images
        if not self.accelerator.is_main_process or not count:
            return
        self.model.eval()
        before = self.base.vae.device
        self.base.vae.to(self.accelerator.device)
        image = validation_grid(
            self.model, self.base, self.dataset.class_names, self.config.images.resolution, count, self.config.seed
        )
        self.base.vae.to(before)
        self.model.train()
        with files.atomic_path(self.config.output_dir / "validation" / f"step-{self.step:06d}.png") as temporary:
            image.save(temporary, "PNG")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):  # not all of accelerate's trackers take pictures
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"validation": np.asarray(image)[None]}, step=self.step, **layout)

    def _finish(self, seconds: float, steps: int) -> dict:
        self._check_weights()
        self.accelerator.wait_for_everyone()
        summary = {
            "steps": self.step,
            "images": len(self.dataset.train),
            **({"unlabelled": len(self.dataset.unlabelled)} if self.dataset.unlabelled else {}),
            "seconds": round(seconds, 1),
            "steps_per_second": round(steps / seconds, 3) if seconds and steps else None,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "versions": runs.versions(),
        }
        if self.accelerator.is_main_process:
            self._refuse_changed_images()
            checkpoints.save_weights(self.model, self.config.output_dir)
            self.latents.remove()  # before the summary, with which the run is finished and is not opened again
            files.write_json(self.config.output_dir / checkpoints.SUMMARY_FILE, summary)
            checkpoints.remove_leftovers(self.config.output_dir)
            rate = summary["steps_per_second"]
            log.info("%d steps in %.0f s, %s steps/s: %s", steps, seconds, rate, self.config.output_dir)
        self.accelerator.end_training()
        return summary
