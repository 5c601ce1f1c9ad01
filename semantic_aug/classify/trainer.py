"""The training loop of stage 3: best epoch on validation, test evaluated once, every file of the results."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from semantic_aug import run_dir
from semantic_aug.classify.config import MAY_CHANGE, ClassifyConfig
from semantic_aug.classify.data import EvalBatches, Normaliser, TrainBatches
from semantic_aug.classify.losses import smooth, soft_cross_entropy
from semantic_aug.classify.metrics import Meter, Scores, write_scores
from semantic_aug.classify.mixing import mix
from semantic_aug.classify.models import make_model
from semantic_aug.classify.optim import learning_rate_at, make_optimizer
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.synthetic import SyntheticImages
from semantic_aug.seeding import derive_seed, numpy_rng

log = logging.getLogger(__name__)

EPOCHS_FILE = "epochs.csv"
RESULTS_FILE = "results.json"
MODEL_FILE = "model.safetensors"
STATE_FILE = "last.pt"
COLUMNS = ("epoch", "lr", "train_loss", "val_top1", "val_top5", "val_macro", "val_loss", "images_per_second")
AMP_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
SAVE_SECONDS = 60.0


def results_of(folder: Path) -> dict | None:
    """The results of a finished run in a folder, or None."""
    try:
        return json.loads((folder / RESULTS_FILE).read_text())
    except (OSError, ValueError):
        return None


class Trainer:
    """One training run of a classifier.

    Args:
        config: the request.
        dataset: loaded under ``config.setting``.
        synthetic: images of the synthetic subsets, or None.
    """

    def __init__(self, config: ClassifyConfig, dataset: LoadedDataset, synthetic: SyntheticImages | None):
        self.config, self.dataset = config, dataset
        self.device = torch.device(config.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        torch.manual_seed(derive_seed(config.seed, "classify", "weights"))
        model, normalisation = make_model(config.model, len(dataset.class_names), config.resolution, config.weights)
        self.model: nn.Module = model.to(self.device, memory_format=torch.channels_last)
        self.normalise = Normaliser(normalisation.mean, normalisation.std, self.device)
        self.train_batches = TrainBatches(
            dataset.train,
            synthetic,
            config.gamma,
            config.synthetic_prob,
            config.resolution,
            config.batch_size,
            config.seed,
        )
        self.val_batches = EvalBatches(dataset.val, config.resolution, 2 * config.batch_size) if dataset.val else None
        self.optimizer = make_optimizer(self.model, config.optimizer, config.lr, config.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.total_steps = config.nepoch * self.train_batches.steps_per_epoch
        self.best: dict | None = None
        self.epoch, self.saved = 0, time.monotonic()

    # ------------------------------------------------------------------------------------------------- one run

    def run(self) -> dict:
        """Trains, evaluates the best epoch on test, writes everything; returns what ``results.json`` holds."""
        config, folder = self.config, self.config.output_dir
        self._restore()
        epochs = run_dir.MetricsCsv(folder / EPOCHS_FILE, COLUMNS, keep_below=self.epoch)
        began = time.monotonic()
        with tqdm(
            total=self.total_steps,
            initial=self.epoch * self.train_batches.steps_per_epoch,
            unit="step",
            desc=folder.name,
            dynamic_ncols=True,
            mininterval=1.0,
        ) as bar:
            while self.epoch < config.nepoch:
                row = self._train_epoch(bar)
                self.epoch += 1
                if self.val_batches and (self.epoch % config.eval_every == 0 or self.epoch == config.nepoch):
                    scores = self.evaluate(self.val_batches)
                    row |= {f"val_{name}": value for name, value in scores.summary().items()}
                    bar.set_postfix(val=f"{100 * scores.top1:.2f}", refresh=False)
                    self._keep_best(scores)
                epochs.add(epoch=self.epoch, **row)
                if time.monotonic() - self.saved > SAVE_SECONDS:
                    self._save_state()
        return self._conclude(time.monotonic() - began)

    def _train_epoch(self, bar: tqdm) -> dict[str, float]:
        config = self.config
        torch.manual_seed(derive_seed(config.seed, "classify", "dropout", self.epoch))
        self.model.train()
        total, count, began = torch.zeros((), device=self.device), 0, time.monotonic()
        warmup = round(config.warmup_epochs * self.train_batches.steps_per_epoch)
        lr = config.lr
        for step, (pixels, targets) in enumerate(self.train_batches.epoch(self.epoch)):
            lr = learning_rate_at(
                self.epoch * self.train_batches.steps_per_epoch + step, self.total_steps, warmup, config.lr
            )
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            rng = numpy_rng(config.seed, "classify", "mix", self.epoch, step)
            images, targets = mix(
                self.normalise(pixels), targets.to(self.device, non_blocking=True), config.mixing, rng
            )
            if config.criterion == "ls":
                targets = smooth(targets, config.smoothing)
            with self._autocast():
                loss = soft_cross_entropy(self.model(images), targets)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            total += loss.detach() * len(images)
            count += len(images)
            bar.update()
        return {"lr": lr, "train_loss": float(total) / count, "images_per_second": count / (time.monotonic() - began)}

    @torch.inference_mode()
    def evaluate(self, batches: EvalBatches) -> Scores:
        """Scores of the present weights on a split."""
        self.model.eval()
        meter = Meter(len(self.dataset.class_names), self.device)
        for pixels, labels in batches:
            with self._autocast():
                logits = self.model(self.normalise(pixels))
            meter.add(logits, labels.to(self.device))
        return meter.result()

    def _autocast(self):
        if self.config.amp == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, AMP_DTYPES[self.config.amp])

    # -------------------------------------------------------------------------------------- best epoch and results

    def _keep_best(self, scores: Scores) -> None:
        """The first epoch of the highest validation top-1; ties go to the lower loss."""
        rank = (scores.top1, -scores.loss)
        if self.best is None or rank > (self.best["top1"], -self.best["loss"]):
            self.best = {"epoch": self.epoch, **scores.summary(), "state": _detached(self.model)}

    def _conclude(self, seconds: float) -> dict:
        config, folder = self.config, self.config.output_dir
        chosen = {k: v for k, v in self.best.items() if k != "state"} if self.best else None
        if self.best:
            self.model.load_state_dict(self.best["state"])
        results = {
            "dataset": self.dataset.name,
            "setting": self.dataset.setting.suffix.lstrip("_") or "all data",
            "model": config.model,
            "seed": config.seed,
            "train_images": len(self.dataset.train),
            "epoch": chosen["epoch"] if chosen else config.nepoch,
            "steps": self.total_steps,
            "seconds": round(seconds, 1),
            "val": chosen,
            "test": None,
            "versions": run_dir.versions(),
        }
        if self.dataset.test is not None:
            scores = self.evaluate(EvalBatches(self.dataset.test, config.resolution, 2 * config.batch_size))
            results["test"] = scores.summary()
            write_scores(scores, self.dataset.class_names, folder, "test")
        elif self.val_batches:
            write_scores(self.evaluate(self.val_batches), self.dataset.class_names, folder, "val")
        self._save_model(folder / MODEL_FILE)
        run_dir.write_json(folder / RESULTS_FILE, results)
        (folder / STATE_FILE).unlink(missing_ok=True)
        return results

    def _save_model(self, path: Path) -> None:
        metadata = {"model": self.config.model, "classes": json.dumps(self.dataset.source_names)}
        run_dir.save_tensors(path, self.model.state_dict(), metadata)

    # ------------------------------------------------------------------------------------------------ kill and restart

    def _save_state(self) -> None:
        """Everything a restart needs; batches, augmentation and dropout follow from (seed, epoch)."""
        state = {
            "epoch": self.epoch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best,
        }
        with run_dir.atomic_path(self.config.output_dir / STATE_FILE) as temporary:
            torch.save(state, temporary)
        self.saved = time.monotonic()

    def _restore(self) -> None:
        path = self.config.output_dir / STATE_FILE
        if not path.exists():
            return
        state = run_dir.load_pickle(path, f"remove it to start {self.config.output_dir} afresh", self.config.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.best, self.epoch = state["best"], state["epoch"]
        log.info("%s: going on after epoch %d of %d", self.config.output_dir, self.epoch, self.config.nepoch)


def _detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: copy.deepcopy(value.detach()) for name, value in model.state_dict().items()}


def run(config: ClassifyConfig, dataset: LoadedDataset, synthetic: SyntheticImages | None) -> dict:
    """Runs a request in its output folder, goes on with an interrupted one, or finds it done.

    Raises:
        UserError: the folder holds a run with other arguments.
    """
    known = run_dir.claim(config.output_dir, config.record(), "--output_dir", MAY_CHANGE)
    done = results_of(config.output_dir) if known else None
    if done is not None:
        log.info("%s is finished already", config.output_dir)
        return done
    return Trainer(config, dataset, synthetic).run()
