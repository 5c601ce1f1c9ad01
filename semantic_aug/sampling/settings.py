"""The settings of stage 2, each declared once: the parser, the record and the identity of a subset follow from them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from semantic_aug import cli
from semantic_aug.augmentations import strategies
from semantic_aug.datasets.settings import Pool, add_shared
from semantic_aug.diffusion.distilled import KINDS
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.errors import UserError
from semantic_aug.prompts import CAPTIONS, SAMPLING_TEMPLATE, read_contexts, read_templates
from semantic_aug.registry import find_lora, new_key, resolve_path
from semantic_aug.sampling.plan import PAIRINGS, SOURCES

LCM_SOLVER = {"num_inference_steps": 8, "guidance_scale": 1.0, "scheduler": "lcm"}
"""Settings of the solver that a latent consistency model takes where the user gives none."""

CONTEXT_STEPS = 0.3
"""Diff-II's share of the steps under a prompt with a context; its authors also take 0.1 and 1, by data set."""

MASK_THRESHOLD = 0.2
"""Share of a class activation map's maximum from which Zhou et al. 2016 (arXiv:1512.04150) count the object."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model that makes the images, and its prompts."""

    TITLE = "model and prompts"
    finetune_model_key: str | None = cli.setting(
        None,
        type=cli.optional_word,
        metavar="KEY",
        help="checkpoint of the data set's section in finetuned_ckpts.yaml; not needed by real-* strategies",
    )
    model_path: str | None = cli.setting(
        None,
        type=cli.model,
        metavar="MODEL",
        help="base model, a hub id or a folder (default: the checkpoint's, else Stable Diffusion 1.5)",
    )
    lcm_lora: Path | None = cli.setting(
        None, type=cli.path, metavar="FILE", help="LCM-LoRA to merge as well, with which a few steps are enough"
    )
    distilled_lora: Path | None = cli.setting(
        None, type=cli.path, metavar="FILE", help="LoRA of a distilled model (LCM, TCD, Hyper-SD) to merge as well"
    )
    few_steps: int | None = cli.setting(
        None,
        type=cli.whole(1),
        help="steps of a distilled LoRA or of a distilled base model (SD-Turbo, SDXL-Turbo) under its own solver; strength s "
        "becomes int(s * N) / N",
    )
    distilled: str | None = cli.setting(
        None,
        choices=tuple(KINDS),
        help="what the distilled model of --few_steps is (default: what its name, its metadata or the base model's "
        "scheduler says)",
    )
    prompt: str | None = cli.setting(
        None, metavar="TEMPLATE", help=f"prompt with {{}} for the class (default: '{SAMPLING_TEMPLATE}')"
    )
    prompt_templates: str | None = cli.setting(
        None,
        metavar="FILE|NAME",
        help="several prompts, of which each image draws one: a text file with one a line, or training or views",
    )

    contexts: str | None = cli.setting(
        None,
        type=cli.path_or(CAPTIONS),
        metavar="FILE|captions",
        help="contexts, of which each image's prompt gets one whatever its class: a text file with one a line, such as 'in "
        "the snow', or captions, which takes what the training images' captions say besides their classes",
    )

    def __post_init__(self):
        if self.prompt is not None and self.prompt.count("{}") != 1:
            raise UserError(f"--prompt '{self.prompt}': expected exactly one {{}} where the class goes")
        if self.prompt is not None and self.prompt_templates is not None:
            raise UserError("--prompt is one prompt for all images, --prompt_templates several: give one of them")

        given = [f"--{name}" for name in ("distilled_lora", "distilled") if getattr(self, name) is not None]
        if given and self.few_steps is None:
            raise UserError(f"{given[0]} goes with --few_steps N, the number of steps of the distilled model")
        if self.lcm_lora and self.distilled_lora:
            raise UserError("--lcm_lora and --distilled_lora both name a distilled LoRA: give one of them")

    def extra_lora(self) -> Path | None:
        """The file of the LoRA that is merged as well; None without one. Raises UserError: no such file."""
        given = [(path, f"--{name}") for name in ("lcm_lora", "distilled_lora") if (path := getattr(self, name))]
        return find_lora(*given[0]) if given else None

    def texts(self) -> dict[str, str | tuple[str, ...]]:
        """The prompts and a file's contexts, as :class:`semantic_aug.augmentations.model.Prompts` takes them. Raises UserError:
        a file that cannot be read."""
        several = read_templates(self.prompt_templates) if self.prompt_templates else ()
        file = None if self.contexts == CAPTIONS else self.contexts
        contexts = read_contexts(str(resolve_path(file))) if file else ()
        return {"template": self.prompt or SAMPLING_TEMPLATE, "templates": several, "contexts": contexts}


@dataclass(frozen=True, kw_only=True)
class ImageSettings:
    """The images to make. A subset's identity has the strengths that follow from the flags, instead of the flags."""

    TITLE = "images"
    sample_strategy: str = cli.setting(
        "diff-mix", choices=strategies.names(), metavar="STRATEGY", help=f"one of {', '.join(strategies.names())}"
    )
    aug_strength: float = cli.setting(
        0.7,
        type=cli.number(0, 1, open_low=True),
        metavar="S",
        help="share of the noise schedule that an image is noised by, in (0, 1]; from-noise strategies use 1, da-fusion "
        "and diff-ii draw their own; inversion-mix: position between the source (0) and the image of the target class (1)",
        result=False,
    )
    strength_strategy: str = cli.setting(
        "fixed",
        choices=("fixed", "uniform"),
        help="fixed: --aug_strength; uniform: evenly from 0.3, 0.5, 0.7, 0.9",
        result=False,
    )
    syn_dataset_multiplier: float = cli.setting(
        5, type=cli.number(0, 1e6, open_low=True), metavar="M", help="synthetic images per training image"
    )
    pairing: str = cli.setting(
        "balanced",
        choices=PAIRINGS,
        absent="balanced",
        help="targets of the *-mix strategies; balanced: every class equally often, and never the source's own where that "
        "can be avoided; independent: drawn uniformly for each image, own class included, as the Diff-Mix authors' code does; "
        "confusion: as often as --classifier takes validation images of the source's class for the target",
    )
    sources: str = cli.setting(
        "even",
        choices=SOURCES,
        absent="even",
        help="source images; even: every class equally often, and every image of a class (in the long-tail setting, with "
        "targets of other classes, every image); hard: in proportion to --classifier's loss on each training image, one in "
        "five evenly; unlabelled: those of --unlabelled, each equally often; both: half even, half unlabelled",
    )
    unlabelled: Path | str | None = cli.setting_of(Pool, "unlabelled")
    classifier: Path | None = cli.setting(
        None,
        type=cli.path,
        metavar="RUN",
        help="output folder of a finished train_cls.py run on the same images, for --pairing confusion, --sources hard, "
        "--object_mask without boxes or masks, and the part of unlabelled sources in their labels (default: none; that part "
        "is even over all classes)",
        result=False,
    )
    context_steps: float = cli.setting(
        CONTEXT_STEPS,
        type=cli.number(0, 1),
        metavar="SHARE",
        help="diff-ii and inversion-mix: share of the denoising steps, the first ones, in which the prompt has its context",
        absent=CONTEXT_STEPS,
    )
    resolution: int | None = cli.setting(
        None, type=cli.whole(8), metavar="PIXELS", help="side of the images (default: the base model's own)"
    )
    object_mask: str | None = cli.setting(
        None,
        choices=("object", "background"),
        help="change only this part of a source image, by its box or mask, else by --classifier's class activation map, "
        "and keep the rest (default: change all)",
    )
    mask_threshold: float = cli.setting(
        MASK_THRESHOLD,
        type=cli.number(0, 1, open_low=True),
        metavar="X",
        help="share of the class activation map's maximum from which a cell is the object's",
        absent=MASK_THRESHOLD,
    )
    image_format: str = cli.setting(
        "png", choices=("png", "webp", "jpg"), help="png and webp are lossless; jpg (quality 95) is smaller and lossy"
    )

    @property
    def strategy(self) -> strategies.Strategy:
        """Row of the strategy table."""
        return strategies.find(self.sample_strategy)

    def __post_init__(self):
        if self.pairing != "balanced" and self.strategy.pairing != "mixed":
            raise UserError(
                f"--pairing {self.pairing} with --sample_strategy {self.sample_strategy}, which keeps every image in its "
                "class: leave it out, or choose a *-mix strategy"
            )
        if self.sources != "even" and self.strategy.start == "noise":
            raise UserError(
                f"--sources {self.sources} with --sample_strategy {self.sample_strategy}, which starts from noise: leave it "
                "out, or choose a strategy that starts from images"
            )
        self._check_pool()
        if self.object_mask is not None and self.strategy.start != "image":
            why = {"noise": "noise and has no source image", "inversion": "two inverted images and changes everything"}
            raise UserError(
                f"--object_mask {self.object_mask}: the strategy starts from {why[self.strategy.start]}; leave it out"
            )
        if self.mask_threshold != MASK_THRESHOLD and not (self.object_mask and self.classifier):
            raise UserError(
                f"--mask_threshold {self.mask_threshold:g} goes with --object_mask and --classifier, whose class activation "
                "maps it divides"
            )
        if self.context_steps != CONTEXT_STEPS and self.strategy.start != "inversion":
            raise UserError(
                f"--context_steps {self.context_steps:g} with --sample_strategy {self.sample_strategy}, which has its context "
                "in every step: leave it out, or choose diff-ii or inversion-mix"
            )
        users = [
            f"--{name} {value}"
            for name, value in (("pairing", "confusion"), ("sources", "hard"))
            if getattr(self, name) == value
        ]
        if users and self.classifier is None:
            raise UserError(
                f"{users[0]} follows a classifier: give --classifier RUN, the folder of a finished train_cls.py run"
            )
        if self.classifier is not None and not (users or self.unlabelled or self.object_mask):
            raise UserError(
                f"--classifier {self.classifier}: nothing follows it; give --pairing confusion, --sources hard, "
                "--sources unlabelled or --object_mask, or leave it out"
            )

    def _check_pool(self) -> None:
        if self.sources not in ("unlabelled", "both"):
            if self.unlabelled is not None:
                raise UserError(
                    f"--unlabelled {self.unlabelled}: --sources {self.sources} does not use it; give --sources unlabelled or "
                    "both"
                )
            return
        if (self.strategy.start, self.strategy.pairing) != ("image", "mixed"):
            raise UserError(
                f"--sources {self.sources} with --sample_strategy {self.sample_strategy}: an image without a class is "
                "translated to one by a *-mix strategy that starts from images; choose one of these"
            )
        if self.unlabelled is None:
            raise UserError(
                f"--sources {self.sources} needs --unlabelled PATH: a folder of images, a list, hf:ID or dataset:NAME"
            )
        if self.object_mask is not None:
            raise UserError(f"--object_mask {self.object_mask}: unlabelled images have no masks; leave out one of them")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Devices, processes and batches.

    Attributes:
        devices: one process each, from ``gpu_ids``.
        batch_size: most tasks per batch; part of the plan. 0 until it has been chosen.
        automatic_batch: ``batch_size`` was chosen by the program.
    """

    TITLE = "devices and processes"
    gpu_ids: tuple[str, ...] | None = cli.setting(
        None,
        nargs="+",
        metavar="ID",
        help="one process per entry: GPU numbers or the word cpu (default: every GPU once, else as many CPU "
        "processes as there are cores and as memory holds)",
        result=False,
    )
    batch_size: int = cli.setting(
        0,
        type=lambda text: 0 if text == "auto" else cli.whole(1)(text),
        metavar="N|auto",
        help="images per batch, which decides the plan; auto: from the GPU's free memory, 16 on the CPU (default: auto)",
    )
    dtype: str = cli.setting(
        "auto",
        choices=("auto", "fp32", "fp16", "bf16"),
        help="precision of the networks; auto: fp16 on a GPU, fp32 on the CPU",
    )
    compile: str = cli.setting(
        "auto",
        choices=("auto", "on", "off"),
        help="compile U-Net and decoder; auto: on GPUs where the subset is large enough to repay it",
        result=False,
    )
    engine: str = cli.setting(
        "mp",
        choices=("mp", "ray"),
        help="mp: processes of this machine; ray: actors, --gpu_ids then says how many and on what",
        result=False,
    )
    ray_address: str | None = cli.setting(
        None,
        metavar="ADDRESS",
        help="a running Ray cluster, 'auto' for the one running here (default: start one on this machine)",
        result=False,
    )
    cpu_threads: int = cli.setting(1, type=cli.whole(1), help="arithmetic threads per CPU process", result=False)
    worker_timeout: float | None = cli.setting(
        None,
        type=cli.number(1),
        metavar="SECONDS",
        help="seconds without a message, a step or processor time after which a process is replaced (default: 300; while "
        "it loads: 1800)",
        result=False,
    )
    devices: tuple[str, ...] = ()
    automatic_batch: bool = False

    @property
    def device_type(self) -> str:
        """``cpu`` or ``cuda``."""
        return "cpu" if self.devices[0] == "cpu" else "cuda"

    def __post_init__(self):
        if self.ray_address and self.engine != "ray":
            raise UserError("--ray_address goes with --engine ray")


@dataclass(frozen=True, kw_only=True)
class OutputSettings:
    """Where images are written, and which of them this run makes."""

    TITLE = "output and shards"
    output_root: Path | None = cli.setting(
        None,
        type=cli.path,
        help="folder that gets {dataset}/{subset} (default: outputs/aug_samples with the setting's suffix)",
        result=False,
    )
    register_key: str | None = cli.setting(
        None,
        type=new_key,
        metavar="KEY",
        help="write the subset into synthetic_datasets.yaml under this key",
        result=False,
    )
    num_shards: int = cli.setting(
        1, type=cli.whole(1), help="number of runs that the batches are dealt to", result=False
    )
    shard_index: int = cli.setting(
        0, type=cli.whole(0), metavar="I", help="which of these runs this one is, from 0", result=False
    )
    merge: bool = cli.setting(False, help="make no image: join and check what shards made", result=False)
    verify: str = cli.setting(
        "size",
        choices=("size", "content"),
        help="how existing files are checked; content reads all of them",
        result=False,
    )
    calibrate: bool = cli.setting(False, help="with --dry_run: time a few batches", result=False)

    def __post_init__(self):
        if self.shard_index >= self.num_shards:
            raise UserError(f"--shard_index {self.shard_index}: expected a number below --num_shards {self.num_shards}")
        if self.merge and self.calibrate:
            raise UserError("--calibrate times the making of images, of which --merge makes none: give one of them")
        if self.merge and self.num_shards > 1:
            raise UserError("--merge joins all shards: give it without --num_shards and --shard_index")


def build_parser() -> cli.Parser:
    """All flags of this stage."""
    description = "Stage 2: translates real images between classes into a synthetic subset."
    parser = cli.Parser("sample_mp", prog="sample_mp.py", description=description)
    add_shared(parser)
    for settings in (ModelSettings, ImageSettings):
        cli.add_settings(parser, settings)
    cli.add_settings(parser, SolverSettings, **dict.fromkeys(LCM_SOLVER))  # None where the user gives no value
    for settings in (Placement, OutputSettings):
        cli.add_settings(parser, settings)
    return parser


def check_flags(args: argparse.Namespace) -> None:
    """Refuses flags of several groups that contradict each other, whatever data set and model are. Raises UserError: names
    two of them."""
    if args.calibrate and not args.dry_run:
        raise UserError("--calibrate goes with --dry_run")
    if args.calibrate and strategies.find(args.sample_strategy).start == "inversion":
        raise UserError(
            f"--calibrate with --sample_strategy {args.sample_strategy}, which inverts most images in its first batches, so "
            "that these say nothing of the others: leave it out (--dry_run gives the U-Net evaluations)"
        )
    if args.context_steps != CONTEXT_STEPS and args.contexts is None:
        raise UserError(f"--context_steps {args.context_steps:g} goes with --contexts, from which the contexts come")
    if args.few_steps is not None and args.num_inference_steps is not None:
        raise UserError("--few_steps and --num_inference_steps both say how many steps: give one of them")
