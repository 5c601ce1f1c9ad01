"""The card of an export: counts, how its images were made, and the licences that bear on them; the same facts as JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from semantic_aug import registry, runs
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.synthetic import is_pseudo_labelled, locate, subset_record
from semantic_aug.diffusion.license import NOT_KNOWN, license_of
from semantic_aug.evaluation.document import render
from semantic_aug.evaluation.quality.export_formats import HF_SPLITS, SplitImages
from semantic_aug.evaluation.quality.inputs import Subset
from semantic_aug.evaluation.quality.measure import measured

SETTINGS = (
    *("strategy", "strengths", "multiplier", "resolution", "num_inference_steps", "guidance_scale", "scheduler"),
    *("template", "templates", "seed", "checkpoint_key"),
)
"""Entries of a subset's ``config.yaml`` that the card repeats."""

DISCLOSURE = (
    "Images marked as synthetic were made by a diffusion model and are no photographs of anything that exists. What was "
    "written into their files when they were made (PNG text chunks) is still there."
)
PSEUDO_LABELLED = (
    "Pseudo-labelled photographs are real: unlabelled images as they are, each under the class that a classifier gave it, "
    "which may be wrong. They are not marked as synthetic."
)
OPENING = {
    "imagefolder": 'from torchvision.datasets import ImageFolder\n\ntrain = ImageFolder("{folder}/train")',
    "hf": 'from datasets import load_dataset\n\ntrain = load_dataset("{folder}", split="train")',
    "webdataset": "import webdataset\n\n"
    'train = webdataset.WebDataset("{folder}/train-{{000000..{last:06d}}}.tar", shardshuffle=False).decode("pil")',
    "csv": 'import pandas\n\ntrain = pandas.read_csv("{folder}/images.csv").query("split == \'train\'")',
    "original": 'import pandas\n\ntrain = pandas.read_csv("{folder}/meta.csv")',
}
"""Format -> Python code that opens an export."""
TEMPLATE = Path(__file__).with_name("card.md.j2")


def _describe_subset(subset: Subset, measures: Path | None, class_names: Sequence[str]) -> dict[str, Any]:
    """Facts of a subset: how each folder was made, and the share of near-copies, which a run of ``measure`` holds."""
    origins, copies = [], measured(measures, subset, class_names).get("near_copies")
    for root in [locate(folder)[0] for folder in subset.folders]:
        if is_pseudo_labelled(root):
            threshold = (runs.load_arguments(root) or {}).get("pseudo_threshold")
            known = {} if threshold is None else {"least_probability": threshold}
            origins.append({"labels": "by a classifier (pseudo-labels)", **known, "license_of_photographs": NOT_KNOWN})
            continue
        record = subset_record(root)
        name = record["arguments"].get("base_model") if record else None
        is_path = name and name.startswith((".", "/", "~"))  # which an export, that may be published, does not tell
        base = Path(name).name if is_path else name
        license = record.get("base_license") or (license_of(name, registry.resolve_path(name)) if name else NOT_KNOWN)
        settings = {key: record[key] for key in SETTINGS if record.get(key) is not None}
        origins.append({"base_model": base or NOT_KNOWN, "base_model_license": license, **settings})
    share = None if copies is None else float(copies.mean())
    return {"name": subset.name, "images": len(subset), "made_with": origins, "near_copies": share}


def describe(
    dataset: LoadedDataset, subsets: Sequence[Subset], splits: Sequence[SplitImages], settings, left_out: int
) -> dict[str, Any]:
    """The facts of the card, as plain values.

    Args:
        subsets: as they were read, before any image was left out.
        settings: an :class:`semantic_aug.evaluation.quality.export.ExportSettings`.
        left_out: number of synthetic images with too small a target weight.

    Raises:
        UserError: ``--measures`` is not a run of ``measure`` on these images.
    """
    spec, names, counts = dataset.spec, dataset.source_names, splits[0].counts
    pseudo = "pseudo_labelled" in counts
    disclosures = [DISCLOSURE] if counts["synthetic"] or not pseudo else []
    disclosures += [PSEUDO_LABELLED] if pseudo else []
    return runs.plain(
        {
            "format": settings.format,
            "images": {split.name: split.counts for split in splits},
            "class_names": list(names),
            "class_counts": np.bincount(splits[0].labels, minlength=len(names)).tolist(),
            "gamma": settings.gamma,
            "min_target_weight": settings.min_target_weight,
            "left_out": left_out,
            "unlabelled_sources": sum(len(split.uncertain) for split in splits),
            "disclosure": " ".join(disclosures),
            "dataset": {
                "name": dataset.name,
                "part": dataset.setting.suffix.lstrip("_") or "all training images",
                "license": spec.license,
                "citation": spec.citation,
                "homepage": spec.homepage,
            },
            "subsets": [_describe_subset(subset, settings.measures, names) for subset in subsets],
        }
    )


def _front_matter(facts: Mapping[str, Any], made: Sequence[Mapping], photographs: Sequence[Mapping]) -> str:
    """The metadata that the hub reads, in YAML.

    Args:
        made: folders of images that a model made.
        photographs: folders of pseudo-labelled photographs.
    """
    licences = [facts["dataset"]["license"], *(origin["base_model_license"] for origin in made)]
    licences += [origin["license_of_photographs"] for origin in photographs]
    ids = {text.lower().replace(" ", "-") for text in licences}
    known = len(ids) == 1 and next(iter(ids)).startswith(("cc-by", "cc0", "apache", "mit"))
    total = sum(sum(counts.values()) for counts in facts["images"].values())
    bounds = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", float("inf"): "n>1M"}
    front: dict[str, Any] = {
        "license": next(iter(ids)) if known else "other",
        "pretty_name": f"{facts['dataset']['name']}, {'synthetic' if made else 'pseudo-labelled'}",
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "data-augmentation", "diff-mix"] if made else ["data-augmentation", "pseudo-labels"],
        "size_categories": [next(text for most, text in bounds.items() if total < most)],
    }
    if facts["format"] == "hf":
        files = [{"split": HF_SPLITS[name], "path": f"data/{HF_SPLITS[name]}-*"} for name in facts["images"]]
        front["configs"] = [{"config_name": "default", "data_files": files}]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"


def write_card(facts: Mapping[str, Any], folder: Path, shards: int) -> str:
    """The card in Markdown, with the front matter that the hub reads; ``shards`` is the number of the training split's."""
    origins = [origin for subset in facts["subsets"] for origin in subset["made_with"]]
    made = [origin for origin in origins if "base_model" in origin]
    photographs = [origin for origin in origins if "license_of_photographs" in origin]
    kinds, pseudo = {"real": "real images", "synthetic": "synthetic images"}, "pseudo-labelled photographs"
    if any("pseudo_labelled" in of_split for of_split in facts["images"].values()):
        kinds["pseudo_labelled"] = pseudo
    text = render(
        TEMPLATE,
        **facts,
        title="synthetic images" if made else pseudo,
        kinds=kinds,
        opening=OPENING[facts["format"]].format(folder=folder.name, last=max(0, shards - 1)),
        made=bool(made),
        pseudo="pseudo_labelled" in kinds,
        base_models=sorted({(origin["base_model"], origin["base_model_license"]) for origin in made}),
        photograph_licences=sorted({origin["license_of_photographs"] for origin in photographs}),
    )
    return _front_matter(facts, made, photographs) + text
