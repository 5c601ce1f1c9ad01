"""From what the user gave to a resolved request: the run's name, defaults, and conflicts refused by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from semantic_aug.classify.config import ClassifyConfig
from semantic_aug.classify.metrics import groups_of
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.synthetic import SyntheticImages, read_subsets
from semantic_aug.errors import UserError

DEFAULT_LR = {"sgd": 0.02, "adamw": 1e-3}
SELECT_BY = ("top1", "macro", "worst_group")


def load_synthetic(
    folders: Sequence[str],
    dataset: LoadedDataset,
    allow_other_sources: bool,
    target_class_num: int,
    most: int | None = None,
) -> SyntheticImages | None:
    """The images of the synthetic subsets, or None without any.

    Args:
        folders: of the subsets.
        dataset: whose classes they have.
        allow_other_sources: accept sources from outside the training images.
        target_class_num: target classes kept of each source class; 0: all.
        most: images kept; None: all.

    Raises:
        UserError: see :func:`semantic_aug.datasets.synthetic.read_subset`.
    """
    if not folders:
        return None
    images = read_subsets(folders, dataset, allow_other_sources)
    if target_class_num:
        images = images.with_targets(target_class_num, dataset.source_names, dataset.setting.subset_seed)
    if most is not None:
        images = images.at_most(most, dataset.setting.subset_seed)
    return images


def learning_rate_of(args: argparse.Namespace, dataset: LoadedDataset) -> tuple[float, str]:
    """The peak learning rate and where it comes from: the flag, the table, or the optimiser's default."""
    if args.lr is not None:
        return args.lr, "--lr"
    lr, source = dataset.learning_rate(args.model, args.res_mode, args.config_dir)
    if lr is not None and args.optimizer != "adamw":
        return lr, source
    return DEFAULT_LR[args.optimizer], f"default of {args.optimizer}"


def check(config: ClassifyConfig, dataset: LoadedDataset) -> None:
    """Refuses combinations that cannot work.

    Raises:
        UserError: one of them.
    """
    if dataset.val is None and config.patience:
        raise UserError(f"--patience {config.patience}: {dataset.name} has no validation images; give --val_fraction")
    if config.select_by == "worst_group" and (dataset.val is None or groups_of(dataset.val) is None):
        raise UserError(
            f"--select_by worst_group: the validation images of {dataset.name} have no groups; expected top1 or macro"
        )
    for flag, given in (
        ("--synthetic_balanced", config.draws.balanced),
        ("--target_class_num", config.target_class_num),
        ("--syndata_max", config.syndata_max),
    ):
        if given and not config.syndata:
            raise UserError(f"{flag}: there are no synthetic images; give --syndata_key or --syndata_dir")
    loss = config.loss
    if loss.drw_epoch >= 0 and loss.criterion == "cb":
        raise UserError(
            f"--drw_epoch {loss.drw_epoch}: --criterion cb weights classes from the start; expected another"
        )
    if loss.drw_epoch >= config.nepoch:
        raise UserError(
            f"--drw_epoch {loss.drw_epoch}: expected fewer than the --nepoch {config.nepoch} epochs there are"
        )


def run_name(config: ClassifyConfig, keys: Sequence[str]) -> str:
    """The default name of a run's folder (without the seed), from what tells runs apart."""
    draws, loss, mixing = config.draws, config.loss, config.mixing
    parts = [config.model, str(config.resolution)]
    if keys:
        parts += ["+".join(keys).replace("#", "."), f"g{config.gamma:g}"]
        parts += [draws.mode] if draws.mode != "item" else []
        parts += [f"p{draws.probability:g}"] if draws.mode != "concat" else []
        parts += ["balanced"] if draws.balanced else []
        parts += [f"t{config.target_class_num}"] if config.target_class_num else []
        parts += [f"n{config.syndata_max}"] if config.syndata_max else []
    else:
        parts.append("real")
    parts += [kind for kind in ("cutmix", "mixup", "cmo") if kind in mixing.kinds]
    parts += [loss.criterion] if loss.criterion != "ce" else []
    parts += [f"drw{loss.drw_epoch}"] if loss.drw_epoch >= 0 else []
    parts += [config.trainable_layers] if config.trainable_layers != "all" else []
    parts += ["ema"] if config.ema_decay else []
    return "-".join(parts).replace("/", "_")


def default_folder(config: ClassifyConfig, dataset: LoadedDataset, keys: Sequence[str]) -> Path:
    """``outputs/classification/{dataset}{setting}/{run name}``."""
    return Path("outputs/classification") / f"{dataset.name}{dataset.setting.suffix}" / run_name(config, keys)
