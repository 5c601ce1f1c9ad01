"""Class activation maps of a finished classifier as masks of the objects."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from evaluating import write_judge
from helpers import job_of, planned, sampling_arguments
from PIL import Image

import sample_mp
import tiny
from semantic_aug.augmentations.model import ModelFiles, Prompts
from semantic_aug.classify.activation import activation_maps, shares, target_layer
from semantic_aug.classify.data import Normaliser
from semantic_aug.classify.inference import load_run
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.errors import UserError
from semantic_aug.sampling.claim import warn
from semantic_aug.sampling.guide import make_guide, write_guide
from semantic_aug.sampling.job import Task
from semantic_aug.sampling.plan import Guide
from semantic_aug.sampling.settings import ImageSettings
from semantic_aug.sampling.sources import SourceImages, SourceMasks
from semantic_aug.sampling.subset import plan_subset
from semantic_aug.sampling.worker import BatchMaker

pytest.importorskip("pytorch_grad_cam")
NORMALISE = Normaliser((0.5,) * 3, (0.5,) * 3, torch.device("cpu"))


def maps_of(model, side, count=3):
    images = [tiny.picture(i, i, (side, side)) for i in range(count)]
    return np.concatenate(list(activation_maps(model.eval(), NORMALISE, side, images.__getitem__, [0, 1, 2][:count])))


def test_a_map_is_grad_cam_of_the_last_stage():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3).eval()
    got = maps_of(model, 64)
    images = torch.from_numpy(np.stack([tiny.picture(i, i, (64, 64)) for i in range(3)]))
    features = model.forward_features(NORMALISE(images)).detach().requires_grad_()
    logits = model.forward_head(features)
    (gradient,) = torch.autograd.grad(logits[range(3), range(3)].sum(), features)
    cam = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    wanted = torch.nn.functional.interpolate(cam.detach(), (64, 64), mode="bilinear").squeeze(1)
    wanted = wanted / wanted.amax((1, 2), keepdim=True).clamp(min=1e-30)  # a map may show nothing
    assert got.dtype == np.float32 and np.abs(got - wanted.numpy()).max() < 1e-3


def test_a_map_is_a_share_of_its_maximum_whatever_its_minimum():
    maps = np.stack([np.full((2, 2), 3.0), -np.ones((2, 2)), [[2.0, 4.0], [4.0, 4.0]]])
    got = shares(maps, 4)
    assert (got[0] == 1).all() and not got[1].any()  # what speaks for a class everywhere shows it everywhere
    assert got[2].max() == 1 and got[2].min() == 0.5 and got.dtype == np.float32


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}),  # a class token, of which the map has no cell
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "window_size": 2, "embed_dim": 32, "num_heads": (1, 2, 4, 8)},
        ),
        ("convnext_atto", {}),
    ],
)
def test_transformers_and_networks_in_stages_have_maps(name, options):
    torch.manual_seed(0)
    maps = maps_of(timm.create_model(name, num_classes=3, **options), 64)
    assert maps.shape == (3, 64, 64) and np.isfinite(maps).all() and maps.min() >= 0 and maps.max() <= 1
    assert (maps.reshape(3, -1).std(1) > 0).any()


def test_what_has_no_map_is_refused_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="--classifier: the features of MlpMixer are no grid"):
        maps_of(timm.create_model("mixer_s32_224", num_classes=3, img_size=64), 64)
    with pytest.raises(UserError, match="Linear has no stages"):
        target_layer(torch.nn.Linear(1, 1))
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    with pytest.raises(UserError, match="pip install grad-cam"):
        maps_of(torch.nn.Linear(1, 1), 8)


def test_maps_lie_where_the_class_is(tmp_path):
    """A pattern that says the class stands in the left or the right half of grey images."""
    rng, images, sides = np.random.default_rng(0), [], []
    for i in range(12):
        image = Image.new("RGB", (128, 128), (128, 128, 128))
        sides.append(int(rng.integers(2)))
        image.paste(tiny.picture(i % 3, i, (64, 128)), (64 * sides[-1], 0))
        images.append(image)
    classes = [i % 3 for i in range(12)]
    judge = load_run(write_judge(tmp_path, images, classes, ("a", "b", "c"), 128))
    maps = np.concatenate(list(judge.activation_maps(images.__getitem__, classes)))
    inside = [m[:, 64 * side :][:, :64].sum() / max(m.sum(), 1e-9) for m, side in zip(maps, sides, strict=True)]
    assert np.mean(np.greater(inside, 0.5)) >= 0.9 and np.mean(inside) > 0.55


@pytest.fixture
def background(animals, judge_folder, tmp_path):
    """The judge's run, and the settings that ask it for the objects of a data set without masks."""
    run = shutil.copytree(judge_folder, tmp_path / "run")
    return ImageSettings(object_mask="background", classifier=run, resolution=tiny.RESOLUTION)


GRID = (tiny.RESOLUTION // 8,) * 2


def test_objects_are_thresholded_kept_and_keyed(background, animals, tmp_path):
    guide = make_guide(background, animals, "cpu", load_run, tmp_path / "subset", GRID)
    judge = load_run(background.classifier)
    order = [judge.class_names.index(name) for name in animals.source_names]
    maps = judge.activation_maps(animals.train.image, [order[label] for label in animals.train.labels])
    cells = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(np.concatenate(list(maps))), GRID) >= 0.2
    assert np.array_equal(np.unpackbits(guide.objects, axis=1).astype(bool), cells.flatten(1).numpy())
    write_guide(tmp_path / "subset", replace(guide, objects=~guide.objects))  # as another GPU might have it
    again = make_guide(background, animals, "cpu", load_run, tmp_path / "subset", GRID)
    assert np.array_equal(again.objects, ~guide.objects)
    for other in (replace(background, mask_threshold=0.5), replace(background, mask_threshold=1.0)):
        computed = make_guide(other, animals, "cpu", load_run, tmp_path / "subset", GRID)
        assert computed.origin != guide.origin and (computed.objects | guide.objects == guide.objects).all()
    boxes = replace(animals, train=replace(animals.train, extras={"box": np.zeros((len(animals.train), 4))}))
    assert make_guide(background, boxes, "cpu", load_run, tmp_path, GRID).objects is None  # masks of one's own win


def test_an_image_without_an_object_may_change_everywhere(animals):
    objects = np.packbits([[0, 1, 1, 0] + [0] * 12, [0] * 16], axis=1)
    for part, first in (("object", 2), ("background", 14)):
        masks = SourceMasks(SourceImages(animals.train, planned(animals.train)), GRID, part, objects).batch([0, 1])
        assert masks.shape == (2, 1, *GRID) and masks.sum((1, 2, 3)).tolist() == [first, 16]


def test_a_process_keeps_the_object(animals, image_folder, tiny_base, tmp_path):
    objects = np.packbits(np.tile([1, 1, 0, 0] * 4, (len(animals.train), 1)), axis=1)
    job = job_of(
        animals, tmp_path, dataset=f"folder:{image_folder}", model=ModelFiles("tiny", tiny_base),
        prompts=Prompts(animals.source_names, animals.class_names), solver=SolverSettings(4),
        images=ImageSettings(resolution=tiny.RESOLUTION, object_mask="background", classifier="run"),
        guide=Guide(objects=objects),
    )  # fmt: skip
    maker, seen = BatchMaker(job, "cpu"), []
    translate = maker.engine.translate
    maker.engine.translate = lambda *inputs: seen.append(inputs[-1]) or translate(*inputs)
    maker.pixels([Task(0, 0, 1, 0.5, "0.png", {})])
    assert seen[0][0, 0].tolist() == [[False, False, True, True]] * 4


def test_the_flags_make_masks_that_are_recorded(workshop, image_folder, judge_folder, tmp_path, caplog):
    def resolved(**flags):
        argv = sampling_arguments(workshop, image_folder, tmp_path, object_mask="background", **flags)
        return sample_mp.resolve(sample_mp.build_parser().parse_args([str(word) for word in argv]))

    config, dataset = resolved(classifier=judge_folder)
    for strategy, warned in (("diff-mix", True), ("diff-aug", False)):
        caplog.clear()
        warn(plan_subset(*resolved(classifier=judge_folder, sample_strategy=strategy)))
        assert ("keeps the object of each source, while labels name the target" in caplog.text) == warned
    assert config.guide.objects.shape == (len(dataset.train), 2) and config.images.mask_threshold == 0.2
    with pytest.raises(UserError, match="has no boxes .* or --classifier RUN, which finds objects"):
        resolved()
    with pytest.raises(UserError, match="starts from noise"):
        ImageSettings(object_mask="object", sample_strategy="real-gen", classifier=judge_folder)
