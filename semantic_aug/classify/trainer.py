"""The training loop of stage 3: selects the epoch on validation, evaluates once on test, and writes the result files."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from semantic_aug import files, runs, tensors
from semantic_aug.classify.config import MODEL_FILE, ClassifyConfig
from semantic_aug.classify.data import EvalBatches, Normaliser, TrainBatches, share_of
from semantic_aug.classify.losses import make_criterion
from semantic_aug.classify.metrics import (
    SCORE_NAMES,
    Scores,
    autocast,
    evaluate,
    groups_of,
    test_groups,
    write_predictions,
    write_scores,
)
from semantic_aug.classify.mixing import mix
from semantic_aug.classify.models import check_batch_norm, freeze, initial_model
from semantic_aug.classify.optimizer import learning_rate, make_optimizer
from semantic_aug.classify.processes import Processes
from semantic_aug.datasets import ImageTable, LoadedDataset
from semantic_aug.datasets.origin import RunOrigin
from semantic_aug.datasets.synthetic import SyntheticImages
from semantic_aug.divergence import CHECK_STEPS, LossLog, check_losses, non_finite
from semantic_aug.errors import UserError
from semantic_aug.seeding import derive_seed, numpy_rng

log = logging.getLogger(__name__)

EPOCHS_FILE = "epochs.csv"
RESULTS_FILE = "results.json"
STATE_FILE = "last.pt"
BOARD_FOLDER = "tensorboard"
BEFORE_RESULTS = (runs.ARGS_FILE, f"{BOARD_FOLDER}/*")
"""Files that a run writes before its first result; see :func:`semantic_aug.files.no_trace`."""
COLUMNS = ("epoch", "lr", "train_loss", *(f"val_{name}" for name in SCORE_NAMES), "images_per_second")
SAVE_SECONDS = 60.0
"""Time between saves of the training state."""


def results_of(folder: Path) -> dict | None:
    """The results of a finished run in a folder, or None."""
    return files.read_json(folder / RESULTS_FILE)


def check_disk(config: ClassifyConfig, model: nn.Module) -> None:
    """Refuses a run whose state and results do not fit on the disk. Raises UserError: too little space."""
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    copies = 6 if config.training.ema_decay else 5  # weights, their best, the optimiser's two, and the finished file
    files.check_space(config.output_dir, copies * size, "--output_dir")


def training_mode(model: nn.Module, frozen: Sequence[nn.Module]) -> None:
    """Sets training mode, but evaluation mode for frozen modules, which keep their running statistics."""
    model.train()
    for module in frozen:
        module.eval()


def check_parts(
    model: nn.Module, frozen: Sequence[nn.Module], config: ClassifyConfig, processes: Processes, size: int
) -> None:
    """Refuses batches of ``size`` images with an empty part, or with a part too small for BatchNorm, unless BatchNorm is
    synchronised over GPUs."""
    classifier, training = config.classifier, config.training
    parts = processes.count * training.gradient_accumulation_steps
    processes.check(size, parts)
    if processes.count > 1 and processes.device.type == "cuda":
        return
    training_mode(model, frozen)
    advice = (
        f"batches of {size} (--batch_size {training.batch_size}, at most the number of training images) in {parts} part(s), "
        f"{classifier.model} at --res_mode {classifier.res_mode}: give a larger --batch_size or --res_mode, fewer "
        "--gradient_accumulation_steps, or a model without BatchNorm"
    )
    smallest = min(len(share_of(size, part, parts)) for part in range(parts))
    check_batch_norm(model, classifier.res_mode, smallest, advice)


class Trainer:
    """One training run of a classifier.

    Args:
        origin: data and weights of the run; its images are compared again at the end. None: no comparison.
    """

    def __init__(
        self,
        config: ClassifyConfig,
        dataset: LoadedDataset,
        synthetic: SyntheticImages | None,
        origin: RunOrigin | None = None,
    ):
        self.config, self.dataset, self.origin = config, dataset, origin
        training, classifier = config.training, config.classifier
        self.processes = Processes(config.device)
        self.device = self.processes.device
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        torch.manual_seed(derive_seed(config.seed, "classify", "weights"))
        model, self.normalisation = initial_model(classifier, dataset)
        if self.processes.count > 1 and self.device.type == "cuda":
            from timm.layers import convert_sync_batchnorm

            model = convert_sync_batchnorm(model)
        self.model: nn.Module = model.to(self.device, memory_format=torch.channels_last)
        if self.processes.main and not (config.output_dir / STATE_FILE).exists():
            check_disk(config, self.model)
        self.frozen = freeze(self.model, classifier.trainable_layers)
        self.averaged = None
        if training.ema_decay:
            from timm.utils import ModelEmaV3

            # without warm-up the average of a short run consists mostly of its first steps
            self.averaged = ModelEmaV3(self.model, decay=training.ema_decay, use_warmup=True)
        self.normalise = Normaliser(*self.normalisation, self.device)
        self.train_batches = TrainBatches(
            dataset.train,
            synthetic,
            config.synthetic,
            classifier.res_mode,
            training.batch_size,
            config.seed,
            cache=config.placement.cache,
            device=self.device,
            augmentation=training.augmentation,
            epochs=training.nepoch,
        )
        self.parts = self.processes.count * training.gradient_accumulation_steps
        check_parts(self.model, self.frozen, config, self.processes, self.train_batches.batch_size)
        self.counts = dataset.train.counts()
        self.criterion = make_criterion(config.loss, self.counts, self.device)
        self.val_batches = self._eval_batches(dataset.val) if dataset.val else None
        self.test_batches = self._eval_batches(dataset.test) if dataset.test is not None else None
        self._open_images()
        self.optimizer = make_optimizer(self.model, training)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=training.amp == "fp16")
        self.steps_per_epoch = self.train_batches.steps_per_epoch
        self.total_steps = training.nepoch * self.steps_per_epoch
        self.best: dict | None = None
        self.epoch, self.stale, self.saved = 0, 0, time.monotonic()

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and saved: the trained one, or with EMA the moving average of its weights."""
        return self.model if self.averaged is None else self.averaged.module

    def _eval_batches(self, table: ImageTable) -> EvalBatches:
        size, resolution = 2 * self.config.training.batch_size, self.config.classifier.res_mode
        options = {"device": self.device, "keep_aspect": self.config.training.keep_aspect}
        return EvalBatches(table, resolution, size, cache=self.config.placement.cache, **options)

    def _open_images(self) -> None:
        """Opens images that are decoded at each use, so that a damaged one is reported before training and not at its end."""
        if (self.config.output_dir / STATE_FILE).exists():
            return
        evaluated = [batches.store for batches in (self.val_batches, self.test_batches) if batches is not None]
        for store in (*self.train_batches.stores, *evaluated):
            store.open_all(self.processes.rank, self.processes.count)

    # ------------------------------------------------------------------------------------------------- one run

    def run(self) -> dict:
        """Trains, evaluates the best epoch on test and writes all files; returns the content of ``results.json``."""
        training, folder, main = self.config.training, self.config.output_dir, self.processes.main
        self._restore()
        self.processes.wait()  # the state is overwritten only after all processes have read it
        call = self.processes.prepare(torch.compile(self.model) if training.compile else self.model)
        epochs = runs.MetricsCsv(folder / EPOCHS_FILE, COLUMNS, keep_below=self.epoch) if main else None
        board = folder / BOARD_FOLDER if main and training.report_to == "tensorboard" else None
        began = time.monotonic()
        with (
            _board(board, self.epoch) as report,
            tqdm(
                total=self.total_steps,
                initial=self.epoch * self.steps_per_epoch,
                unit="step",
                desc=folder.name,
                dynamic_ncols=True,
                mininterval=1.0,
                disable=not main,
            ) as bar,
        ):
            while self.epoch < training.nepoch and not self._stopped():
                row = self._train_epoch(call, bar)
                self.epoch += 1
                if self.val_batches and (self.epoch % training.eval_every == 0 or self.epoch == training.nepoch):
                    scores = self._scores(self.val_batches)
                    bar.set_postfix(val=f"{100 * scores.top1:.2f}", refresh=False)
                    summary = self._summary(scores, self.dataset.val)
                    row |= {f"val_{name}": value for name, value in summary.items()}
                    self._keep_best(summary, scores.predicted)
                if main:
                    epochs.add(epoch=self.epoch, **row)
                    report(row, self.epoch)
                    if time.monotonic() - self.saved > SAVE_SECONDS:
                        self._save_state()
        if self._stopped() and self.epoch < training.nepoch:
            log.info(
                "stopped after epoch %d: %d evaluations without a better %s", self.epoch, self.stale, training.select_by
            )
        return self._conclude(time.monotonic() - began)

    def _stopped(self) -> bool:
        return 0 < self.config.training.patience <= self.stale

    def _train_epoch(self, call: nn.Module, bar: tqdm) -> dict[str, float]:
        training, began, rank = self.config.training, time.monotonic(), self.processes.rank
        torch.manual_seed(derive_seed(self.config.seed, "classify", "dropout", self.epoch, *([rank] if rank else [])))
        training_mode(self.model, self.frozen)
        loss_log, total = LossLog(self.device, CHECK_STEPS, self.processes.add_up), 0.0
        for step, parts in enumerate(self._epoch_parts()):
            done = self.epoch * self.steps_per_epoch + step
            lr = learning_rate(training, done, self.train_batches.draws.pool, self.train_batches.batch_size)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            step_loss = torch.zeros((), device=self.device)
            mixed, factor = self._mixed(step, parts)
            # gradient accumulation over the parts of the step
            for number, (images, targets) in enumerate(mixed):
                last = number + 1 == len(parts)
                with contextlib.nullcontext() if last else self.processes.no_sync(call):
                    with autocast(self.device, training.amp):
                        logits = call(images)
                    loss = factor * self.criterion(logits, targets, self.epoch).sum()
                    # gradients are averaged over processes: a factor of their number gives the sum over the batch
                    share = self.processes.count / self.train_batches.batch_size
                    self.scaler.scale(loss * share).backward()
                step_loss += loss.detach()
            loss_log.add(step_loss)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            if self.averaged is not None:  # exponential moving average of the weights
                self.averaged.update(self.model, step=done + 1)
            bar.update()
            if loss_log.count == CHECK_STEPS or step + 1 == self.steps_per_epoch:
                recent = loss_log.read()
                check_losses(recent, done + 1, self._advice())
                total += float(recent.sum())
        count = self.steps_per_epoch * self.train_batches.batch_size
        return {"lr": lr, "train_loss": total / count, "images_per_second": count / (time.monotonic() - began)}

    def _epoch_parts(self) -> Iterator[list[tuple]]:
        """Yields the parts of each step that belong to this process: (batch, foregrounds or None)."""
        count, steps = self.processes.count, self.config.training.gradient_accumulation_steps
        parts = [self.processes.rank + count * micro for micro in range(steps)]
        batches = [self.train_batches.epoch(self.epoch, part, self.parts) for part in parts]
        if not (self.config.mixing.use_cmo and self._mixes()):
            yield from ([(batch, None) for batch in step] for step in zip(*batches, strict=True))
            return
        others = [self.train_batches.epoch(self.epoch, part, self.parts, foregrounds=True) for part in parts]
        for step in zip(*batches, *others, strict=True):
            yield list(zip(step[:steps], step[steps:], strict=True))

    def _mixes(self) -> bool:
        return self.config.mixing.mixes(self.epoch, self.config.training.nepoch)

    def _mixed(self, step: int, parts: list[tuple]) -> tuple[Iterable[tuple[Tensor, Tensor]], float | Tensor]:
        """The mixed images and targets of each part of a batch, and the factor of their losses."""
        first, count = self.processes.rank, self.processes.count
        mixed = (self._mixed_part(step, first + count * number, *part) for number, part in enumerate(parts))
        if self.config.loss.class_weight_mean == "images" or not self.criterion.weighted(self.epoch):
            return mixed, 1.0
        # class weights are summed over the whole batch
        mixed = list(mixed)
        total = self.processes.add_up(sum(self.criterion.weight_sum(targets) for _, targets in mixed))
        return mixed, self.train_batches.batch_size / total

    def _mixed_part(self, step: int, part: int, batch: tuple, foregrounds: tuple | None) -> tuple[Tensor, Tensor]:
        images, targets = self._moved(batch)
        if not self._mixes():
            return images, targets
        # all parts of a step draw the same random numbers, so that together they equal the mixed whole batch
        rng = numpy_rng(self.config.seed, "classify", "mix", self.epoch, step)
        share = share_of(self.train_batches.batch_size, part, self.parts), self.train_batches.batch_size
        others = foregrounds and self._moved(foregrounds)
        return mix(images, targets, self.config.mixing, rng, others, share=share)

    def _moved(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, targets = batch
        return self.normalise(pixels), targets.to(self.device, non_blocking=True)

    def _scores(self, batches: EvalBatches) -> Scores:
        """Scores of the evaluated model on a split. Raises UserError: weights that are not finite."""
        model = self.evaluated
        self.processes.agree_on(model)
        if bad := non_finite(model.state_dict().items()):
            raise UserError(f"training diverged: after epoch {self.epoch} '{bad}' is not finite; {self._advice()}")
        classes = len(self.dataset.class_names)
        return evaluate(model, batches, self.normalise, classes, self.processes, self.config.training.amp)

    def _summary(self, scores: Scores, table: ImageTable) -> dict[str, float]:
        return scores.summary(self.counts, groups_of(table), self.config.evaluation.shot_thresholds)

    def _advice(self) -> str:
        training, state = self.config.training, self.config.output_dir / STATE_FILE
        kept = f"{state} holds the last good epoch saved" if state.exists() else "no epoch was saved yet"
        fp16 = ", use --amp bf16" if training.amp == "fp16" else ""
        return f"lower --lr {training.lr:g}{fp16} and choose another --output_dir; {kept}"

    # -------------------------------------------------------------------------------------- best epoch and results

    def _keep_best(self, scores: dict[str, float], predicted: np.ndarray) -> None:
        """Keeps the weights of the epoch with the best validation score; of equal scores the lower loss, then the first."""
        by = self.config.training.select_by
        if self.best is None or (scores[by], -scores["loss"]) > (self.best[by], -self.best["loss"]):
            state = {name: value.detach().clone() for name, value in self.evaluated.state_dict().items()}
            kept = {"state": state, "predicted": torch.from_numpy(predicted)}
            self.best, self.stale = {"epoch": self.epoch, **scores, **kept}, 0
        else:
            self.stale += 1

    def _conclude(self, seconds: float) -> dict:
        config, folder, dataset = self.config, self.config.output_dir, self.dataset
        chosen = {k: v for k, v in self.best.items() if k not in ("state", "predicted")} if self.best else None
        if self.best:
            self.evaluated.load_state_dict(self.best["state"])
        results = {
            "dataset": dataset.name,
            "setting": dataset.setting.suffix.lstrip("_") or "all data",
            "model": config.classifier.model,
            "seed": config.seed,
            "train_images": len(dataset.train),
            "epoch": chosen["epoch"] if chosen else self.epoch,
            "epochs": self.epoch,
            "steps": self.epoch * self.steps_per_epoch,
            "seconds": round(seconds, 1),
            "val": chosen,
            "test": None,
            "versions": runs.versions(),
        }
        final, predicted = {}, {"val": self.best["predicted"]} if self.best else {}
        if dataset.test is not None:
            final["test"] = self._scores(self.test_batches)
            predicted["test"] = final["test"].predicted
            results["test"] = self._summary(final["test"], dataset.test)
            results |= test_groups(final["test"], dataset)
        elif self.val_batches:
            final["val"] = self._scores(self.val_batches)
        if self.processes.main:
            self._refuse_changed_images()
            for split, scores in final.items():
                write_scores(scores, dataset.class_names, folder, split)
            for split, predictions in predicted.items():
                write_predictions(getattr(dataset, split), predictions, dataset.class_names, folder, split)
            metadata = {"model": config.classifier.model, "classes": dataset.source_names}
            if config.training.keep_aspect:
                metadata["keep_aspect"] = True
            normalisation = {name: list(values) for name, values in self.normalisation._asdict().items()}
            usual = {name: list(self.evaluated.pretrained_cfg[name]) for name in normalisation}
            if config.classifier.weights == "torchvision" or normalisation != usual:
                metadata |= normalisation
            tensors.save_tensors(folder / MODEL_FILE, self.evaluated.state_dict(), metadata)
            files.write_json(folder / RESULTS_FILE, results)
            (folder / STATE_FILE).unlink(missing_ok=True)
        self.processes.wait()
        return results

    def _refuse_changed_images(self) -> None:
        """Refuses images that changed during the run, which then cannot be resumed either."""
        if self.origin is None:
            return
        try:
            self.origin.refuse_changed("nothing was written; run the command again with another --output_dir")
        except UserError:
            runs.spoil(self.config.output_dir, "its images changed during the run")
            raise

    # ------------------------------------------------------------------------------------------------ kill and restart

    def _save_state(self) -> None:
        """Saves the state for a restart; batches, augmentation and dropout follow from (seed, epoch)."""
        state = {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averaged": self.averaged.module.state_dict() if self.averaged is not None else None,
            "best": self.best,
            "stale": self.stale,
        }
        tensors.save_pickle(self.config.output_dir / STATE_FILE, state)
        self.saved = time.monotonic()

    def _restore(self) -> None:
        path = self.config.output_dir / STATE_FILE
        if not path.exists():
            return
        state = tensors.load_pickle(path, f"remove it to start {self.config.output_dir} afresh", str(self.device))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.averaged is not None:
            self.averaged.module.load_state_dict(state["averaged"])
        self.best, self.epoch, self.stale = state["best"], state["epoch"], state["stale"]
        log.info("%s: resuming after epoch %d of %d", self.config.output_dir, self.epoch, self.config.training.nepoch)


@contextlib.contextmanager
def _board(folder: Path | None, done: int):
    """Yields a function that writes a row to TensorBoard, or does nothing; rows after the resumed epoch are hidden."""
    if folder is None:
        yield lambda row, epoch: None
        return
    from torch.utils.tensorboard import SummaryWriter

    def report(row: dict[str, float], epoch: int) -> None:
        for name, value in row.items():
            tag = f"val/{name[4:]}" if name.startswith("val_") else f"train/{name}"
            writer.add_scalar(tag, value, epoch)

    with SummaryWriter(str(folder), purge_step=done + 1) as writer:
        yield report
