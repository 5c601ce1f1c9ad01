"""Flags of the Diff-Mix authors' scripts that have another name here, or none, and what to give instead.

From https://github.com/Zhicaiwww/Diff-Mix, both layouts: ``train_lora.py``, ``train_text_to_image_ti_lora_diffmix.py``;
``sample_mp.py``, ``generate_translations.py``; ``train_hub.py``, ``train_hub_waterbird.py``, ``train_hub_imb.py``.
"""

from collections.abc import Collection

AUTOMATIC = "leave it out: chosen by the program"
NO_HUB = "leave it out: results stay in --output_dir"
CACHED = "leave it out: the hub's cache is used, HF_HOME and HF_HUB_OFFLINE set it"
COLUMNS = "leave it out: columns are found, or named by the data set's entry in datasets.yaml"
ADAMW = "leave it out: AdamW's default is used"

INSTEAD = {
    "train_lora.py": {
        "--dataset_name": "--dataset",
        "--dataset_config_name": "--dataset hf:ID:CONFIGURATION",
        "--train_data_dir": "--dataset folder:PATH",
        **dict.fromkeys(("--image_column", "--caption_column"), COLUMNS),
        "--validation_prompt": "leave it out: --validation_steps draws every class under its own prompt",
        "--validation_epochs": "--validation_steps, in optimiser steps",
        "--max_train_samples": "--examples_per_class",
        "--num_train_epochs": "--max_train_steps, in optimiser steps",
        "--center_crop": "leave it out: the centre crop is the default, --crops and --random_crops take others",
        "--random_flip": "leave it out: images are mirrored unless --no_flip is given",
        "--ti_only": "--finetune_strategy ti",
        "--imbalanced_factor": "--imbalance_factor",
        **dict.fromkeys(("--adam_beta1", "--adam_beta2", "--adam_epsilon"), ADAMW),
        **dict.fromkeys(("--push_to_hub", "--hub_token", "--hub_model_id"), NO_HUB),
        "--logging_dir": "leave it out: logs are written below --output_dir",
        **dict.fromkeys(("--revision", "--cache_dir", "--local_files_only"), CACHED),
        **dict.fromkeys(("--allow_tf32", "--dataloader_num_workers", "--local_rank"), AUTOMATIC),
        "--enable_xformers_memory_efficient_attention": AUTOMATIC,
        "--no_safe_serialization": "leave it out: python -m semantic_aug.diffusion.convert writes the authors' files",
    },
    "sample_mp.py": {
        "--finetuned_ckpt": "--finetune_model_key, a key of finetuned_ckpts.yaml",
        "--syn_dataset_mulitiplier": "--syn_dataset_multiplier",
        "--aug_strategy": "--sample_strategy",
        "--mask": "--object_mask object",
        "--inverted": "--object_mask background",
        "--beta_strength": "--strength_strategy fixed or uniform; strengths are not drawn from a beta distribution",
        "--class_name": "leave it out: all classes are targets, see --pairing",
        "--confusion_matrix_path": "--pairing confusion with --classifier RUN, a finished run of train_cls.py",
        "--debug": "--dry_run",
    },
    "train_cls.py": {
        **dict.fromkeys(("-d", "--dir"), "--dataset"),
        **dict.fromkeys(("-m", "--arch"), "--model"),
        "-b": "--batch_size",
        "-lr": "--lr",
        "-g": "--gpu",
        "-s": "--seed",
        "-a": "--amp fp16",
        **dict.fromkeys(("--syndata_p", "--syn_p", "--synthetic_probability"), "--synthetic_prob"),
        "--syn_type": "--syndata_key",
        "--clip_filtered_syn": "--syndata_key KEY#VARIANT",
        **dict.fromkeys(("-sp", "--soft_power"), "--gamma"),
        **dict.fromkeys(("-ss", "--soft_scaler"), "leave it out: soft labels sum to 1, --criterion ls smooths them"),
        **dict.fromkeys(("-mp", "--mixup_probability", "--mixup_prob"), "--mix_prob"),
        **dict.fromkeys(("-rs", "--resize", "-cs", "--crop_size"), "--res_mode, the side of the crop"),
        **dict.fromkeys(("-ne", "--epochs"), "--nepoch"),
        **dict.fromkeys(("-fs", "--finetune_strategy"), "--trainable_layers"),
        "--imb_factor": "--task imbalanced --imbalance_factor",
        "--rand_number": "--subset_seed",
        "--loss_type": "--criterion ce, ldam or bsm",
        "--train_rule": "--drw_epoch 160 for DRW, --criterion cb for CBReweight",
        "--lr_steps": "--lr_schedule step",
        "--cos": "--lr_schedule cosine",
        "--use_weighted_syn": "--synthetic_draw inverse_frequency",
        **dict.fromkeys(("--wd", "--weight-decay"), "--weight_decay"),
        "--learning-rate": "--lr",
        "--data_aug": "--use_cmo for CMO, none for vanilla",
        **dict.fromkeys(("--start_data_aug", "--end_data_aug"), "--unmixed_epochs START END"),
        "--beta": "--cutmix_alpha",
        "--use_randaug": "--augmentation resized_crop; there is no RandAugment",
        "--weighted_alpha": "leave it out: --use_cmo draws images in favour of rare classes",
        "--num_classes": "leave it out: the data set's",
        **dict.fromkeys(("--resume", "--start-epoch"), "leave it out: the same command resumes a run in --output_dir"),
        **dict.fromkeys(
            ("-n", "--note", "-p", "--group_note", "--exp_str", "--root_log", "--root_model"), "--output_dir"
        ),
        "--root": "leave it out: --dataset folder:PATH, or the environment variable of the data set",
        **dict.fromkeys(("-w", "--num_workers", "-j", "--workers"), AUTOMATIC),
        "--print_freq": "leave it out: one progress bar and epochs.csv",
    },
}
"""Command -> flag of the authors' -> what to give instead; hyphens are read as underscores where only they differ."""


def instead_of(word: str, command: str, flags: Collection[str]) -> str | None:
    """The replacement of an argument of the command line, with or without ``=VALUE``; None where it is no foreign flag of the
    script ``command``."""
    flag = word.split("=")[0]
    underscored = "--" + flag[2:].replace("-", "_")
    if flag in flags or not flag.startswith("-"):
        return None
    known = INSTEAD.get(command, {})
    return known.get(flag) or known.get(underscored) or (underscored if underscored in flags else None)
