"""DA-Fusion's row of the table and its object masks, and prompts drawn from several templates."""

import csv
import re

import numpy as np
import pytest
import torch
import yaml
from diffusers import StableDiffusionInpaintPipeline
from helpers import CLASSES, ROOT, job_of, planned, refused, run_here, sampling_arguments, subset_contents
from PIL import Image
from test_loop import PROMPTS, Case

import sample_mp
import tiny
from official_layouts import write_cub
from semantic_aug import meta_csv, prompts
from semantic_aug.augmentations import strategies
from semantic_aug.augmentations.engine import Engine
from semantic_aug.augmentations.model import ModelFiles, Prompts
from semantic_aug.datasets import Setting, load_dataset
from semantic_aug.datasets.fingerprint import hash_images, split_identity
from semantic_aug.datasets.readers.folder import read_folder
from semantic_aug.diffusion import loop
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.errors import UserError
from semantic_aug.sampling import config as sampling
from semantic_aug.sampling import files, masks, sources
from semantic_aug.sampling.job import Task
from semantic_aug.sampling.plan import PlanSettings, make_plan
from semantic_aug.sampling.settings import ImageSettings
from semantic_aug.sampling.worker import BatchMaker
from semantic_aug.seeding import task_rng

EMBEDDED = ROOT / "scripts" / "quickstart" / "base"
SIDE = tiny.RESOLUTION // 8
LEFT = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
LEFT[..., : SIDE // 2] = True


# ------------------------------------------------------------------------------------------------------- the strategy


def test_the_row_takes_tokens_alone_and_spreads_its_own_strengths():
    row = strategies.find("da-fusion")
    assert strategies.weights_for(row, True, True, "ck") == (False, True)
    with pytest.raises(UserError, match="strategy da-fusion needs class tokens"):
        strategies.weights_for(row, True, False, "ck")
    strengths, label = sampling.choose_strengths(ImageSettings(sample_strategy="da-fusion"), 25)
    assert label == "Uniform"
    settings = PlanSettings(strategy=row, strengths=strengths, multiplier=4, batch_size=8, seed=0)
    plan = make_plan(np.arange(12) % 3, [str(i) for i in range(12)], 3, settings)
    assert plan.strengths == (1.0, 0.75, 0.5, 0.25) and np.bincount(plan.strength_code).tolist() == [12] * 4
    assert (plan.source_class == plan.target).all() and (plan.source >= 0).all()


# ---------------------------------------------------------------------------------------------------------- the mask


def masked(case, strengths, mask):
    """Latents of the first images under a mask (None: without)."""
    indices = range(len(strengths))
    moments = loop.encode_moments(case.model.vae, loop.to_pixels([case.images[i] for i in indices]))
    return loop.translate(
        case.sampler, moments, case.model.vae.config.scaling_factor, case.embeds[list(indices)], strengths,
        [task_rng(0, i) for i in indices], masks=None if mask is None else mask.expand(len(strengths), 1, SIDE, SIDE),
    )  # fmt: skip


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddim", "euler"])
def test_masked_translation_equals_diffusers_inpainting(tiny_base, scheduler):
    case = Case(tiny_base, SolverSettings(8, 4.0, scheduler))
    got = masked(case, [0.5, 0.75], LEFT)
    pixels = LEFT[0].repeat_interleave(8, 0).repeat_interleave(8, 1).numpy()
    for index, strength in enumerate((0.5, 0.75)):
        pipe = tiny.pipeline(case.model, StableDiffusionInpaintPipeline, scheduler)
        wanted = pipe(
            prompt=PROMPTS[index], image=case.images[index], mask_image=Image.fromarray(pixels.astype(np.uint8) * 255),
            strength=strength, num_inference_steps=8, guidance_scale=4.0, generator=[task_rng(0, index)],
            height=tiny.RESOLUTION, width=tiny.RESOLUTION, output_type="latent",
        ).images  # fmt: skip
        assert (got[index] - wanted[0]).abs().max() <= 1e-4, (scheduler, strength)


def test_a_mask_of_ones_changes_nothing_and_one_of_zeros_gives_the_source(tiny_base):
    case = Case(tiny_base, SolverSettings(8, 4.0))
    plain = masked(case, [0.5, 1.0], None)
    assert torch.equal(masked(case, [0.5, 1.0], torch.ones_like(LEFT)), plain)
    kept = masked(case, [0.5, 1.0], torch.zeros_like(LEFT))
    for i in range(2):
        moments = loop.encode_moments(case.model.vae, loop.to_pixels([case.images[i]]))
        noise = loop.draw((4, SIDE, SIDE), [task_rng(0, i)], moments)
        source = loop.sample_posterior(moments, noise, case.model.vae.config.scaling_factor)
        torch.testing.assert_close(
            kept[i], source[0], atol=1e-4, rtol=0
        )  # a batch of one computes a little differently
        half = masked(case, [0.5, 1.0], LEFT)[i]
        torch.testing.assert_close(half[..., SIDE // 2 :], source[0][..., SIDE // 2 :], atol=1e-4, rtol=0)
        assert (half[..., : SIDE // 2] - source[0][..., : SIDE // 2]).abs().max() > 0.01


def test_the_mask_is_where_the_box_is():
    mask = masks.box_mask((10, 40, 30, 80), (80, 160), (16, 16))  # left, top, right, bottom of an 80 x 160 image
    rows, columns = torch.nonzero(mask[0], as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 7, 2, 5) and mask.sum() == 16
    assert torch.equal(masks.box_mask((10, 40, 30, 80), (80, 160), (16, 16), "background"), ~mask)
    assert masks.box_mask((500, 500, 600, 600), (80, 160), (16, 16)).sum() == 1  # outside: its nearest cell
    assert masks.box_mask((0, 0, 80, 160), (80, 160), (16, 16)).all()
    # 232 of 448 pixels end the 29th of 56 cells: 232 / 448 * 56 is above 29 in floating point
    assert masks.box_mask((0, 0, 232, 448), (448, 448), (56, 56)).sum() == 29 * 56


@pytest.fixture
def cub(tmp_path, monkeypatch):
    write_cub(tmp_path / "cub")
    monkeypatch.setenv("CUB_ROOT", str(tmp_path / "cub"))
    return load_dataset("cub", Setting())


def test_outside_the_mask_the_pixels_stay_close_to_the_source(cub, tmp_path):
    """With the embedded base model: the decoder of a random one sees the whole picture at every pixel."""
    job = job_of(
        cub, tmp_path, model=ModelFiles("embedded", EMBEDDED), solver=SolverSettings(4),
        prompts=Prompts(cub.source_names, cub.class_names, template="a {}"),
        images=ImageSettings(resolution=128, object_mask="object"),
    )  # fmt: skip
    maker = BatchMaker(job, "cpu")
    tasks = [Task(0, 0, 0, 1.0, "0.png", {}), Task(1, 1, 1, 1.0, "1.png", {})]
    nothing = torch.zeros(1, 16, 16, dtype=torch.bool)
    right = nothing.clone()
    right[..., 12:] = True
    created = {}
    assert maker.pixels(tasks)[1] == {} and maker.masks.known.keys() == {0, 1}  # with the boxes of the data set
    for name, mask in (("source", nothing), ("right", right)):
        maker.masks.known = {0: mask, 1: nothing}
        created[name], broken = maker.pixels(tasks)
        assert not broken
    difference = (created["right"].int() - created["source"].int()).abs().float().mean(-1)
    assert difference[0, :, 96:].mean() > 4 * difference[0, :, :64].mean()  # the decoder sees a little beyond a cell
    assert difference[1].max() <= 1


def test_masks_come_from_the_data_sets_boxes(cub):
    result = sources.SourceMasks(sources.SourceImages(cub.train, planned(cub.train)), (8, 8), "object")
    batch = result.batch([0, 1])
    size = cub.train.image(0).size
    assert torch.equal(batch[0], masks.box_mask(cub.train.extras["box"][0].tolist(), size, (8, 8)))
    assert 0 < batch[0].sum() < 64 and batch.shape == (2, 1, 8, 8)


def test_masks_without_boxes_or_sources_are_refused(image_folder, cub):
    images = load_dataset(f"folder:{image_folder}").train
    with pytest.raises(UserError, match="--object_mask object: animals has no boxes of its objects"):
        masks.check_mask("object", images, "animals")
    with pytest.raises(UserError, match="--object_mask object: the strategy starts from noise"):
        ImageSettings(object_mask="object", sample_strategy="diff-gen")
    masks.check_mask("background", cub.train, "cub")


def listed(folder, rows, columns="path,label,box,mask"):
    """A csv data set of 40 x 36 pictures; rows name box and mask of each."""
    for i, _ in enumerate(rows):
        tiny.picture(i % 2, i).save(folder / f"{i}.png")
    lines = [f'{i}.png,{"ab"[i % 2]},"{box}",{mask}' for i, (box, mask) in enumerate(rows)]
    (folder / "list.csv").write_text("\n".join([columns, *lines]) + "\n")
    return load_dataset(f"csv:{folder / 'list.csv'}", Setting(val_fraction=0)).train


def mask_file(path, left, top, right, bottom, mode="L", size=(40, 36)):
    image = Image.new(mode, size)
    image.paste({"RGBA": (0, 0, 0, 255), "P": 1, "1": 1, "L": 9}[mode], (left, top, right, bottom))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA"])
def test_a_list_names_boxes_and_masks(tmp_path, mode):
    mask_file(tmp_path / "m/1.png", 5, 9, 11, 18, mode)
    images = masks.with_regions(
        listed(tmp_path, [("5, 9, 6, 9", ""), ("", "m/1.png"), ("[5 9 6 9]", "m/1.png")]), "object"
    )
    masks.check_regions(images)
    assert images.extras["box"][0].tolist() == [5, 9, 11, 18]
    result = sources.SourceMasks(sources.SourceImages(images, planned(images)), (4, 5), "object").batch([0, 1, 2])
    wanted = torch.zeros(1, 4, 5, dtype=torch.bool)
    wanted[0, 1, 0:2] = True  # of cells with 8 x 9 pixels: columns 5 to 10, rows 9 to 17
    assert all(torch.equal(mask, wanted) for mask in result)
    background = sources.SourceMasks(sources.SourceImages(images, planned(images)), (4, 5), "background").batch([1])
    assert torch.equal(background[0], ~wanted)


def test_masks_beside_a_folder_belong_to_the_images_of_their_names(tmp_path):
    folder = tiny.write_image_folder(tmp_path / "animals", train=2, val=0, test=1)
    mask_file(folder / "masks/train/toad/train000.png", 0, 0, 8, 9)
    mask_file(folder / "test/masks/toad/test000.png", 0, 0, 8, 9)
    (folder / "train" / "metadata.csv").write_text(
        'file_name,box\ntoad/train001.png,"0, 0, 8, 9"\nred fox/train000.png,"1,2,3,4"\n'
    )
    data = load_dataset(f"folder:{folder}", Setting(val_fraction=0))
    assert data.source_names == ("blue jay", "red fox", "toad") and len(data.train) == 6
    extras = {key: (b, m) for key, b, m in zip(data.train.keys, *map(data.train.extras.get, ("box_text", "mask_path")))}
    assert extras["train/toad/train000.png"] == ("", str(folder / "masks/train/toad/train000.png"))
    assert extras["train/toad/train001.png"] == ("0, 0, 8, 9", "") and extras["train/blue jay/train000.png"] == ("", "")
    assert [bool(path) for path in data.test.extras["mask_path"]] == [False, False, True]
    with pytest.raises(UserError, match=r"3 of 6 training images have neither box nor mask \('train/blue jay/train000"):
        masks.with_regions(data.train, "object")
    assert "masks" in load_dataset(f"folder:{tiny.write_image_folder(tmp_path / 'b', ('masks', 'toad'))}").source_names


@pytest.mark.parametrize("masked", ["masks", "masks/train", "train/masks"])
def test_a_folder_of_masks_of_which_some_are_no_class_is_refused(tmp_path, masked):
    start = tmp_path if masked == "masks" else tmp_path / "train"
    for i, name in enumerate(("toad", "frog")):
        (start / name).mkdir(parents=True)
        tiny.picture(i, i).save(start / name / "0.png")
    for name in ("toad", "frog", "newt"):
        mask_file(tmp_path / masked / name / "0.png", 0, 0, 8, 9)
    with pytest.raises(UserError, match=f"{masked} holds masks by class, but no class folder is named newt: rename or"):
        read_folder(tmp_path)
    (tmp_path / masked / "newt" / "0.png").unlink()
    (tmp_path / masked / "newt").rmdir()
    train = read_folder(tmp_path)["train"]
    assert train.class_names == ("frog", "toad") and all(train.extras["mask_path"])


@pytest.mark.parametrize(
    ("box", "mask", "message"),
    [
        ("1, 2, 3", "", "box '1, 2, 3' of image '0.png': expected x, y, width, height in pixels"),
        ("1, 2, 0, 4", "", "box '1, 2, 0, 4' of image '0.png': expected x, y, width, height"),
        ("40, 2, 5, 5", "", "box '40, 2, 5, 5' of image '0.png' lies outside its 40 x 36 pixels"),
        ("", "gone.png", "gone.png of image '0.png' does not exist"),
        ("", "list.csv", "list.csv of image '0.png' cannot be read"),
        ("", "small.png", "small.png has 20 x 18 pixels, its image '0.png' 40 x 36"),
        ("", "empty.png", "empty.png of image '0.png' is empty"),
        ("", "", "1 of 2 training images have neither box nor mask"),
    ],
)
def test_a_bad_box_or_mask_is_one_line_that_names_the_image(tmp_path, box, mask, message):
    mask_file(tmp_path / "small.png", 0, 0, 5, 5, size=(20, 18))
    mask_file(tmp_path / "empty.png", 0, 0, 0, 0)
    images = listed(tmp_path, [(box, mask), ("1, 2, 3, 4", "")])  # a data set that is read without its masks
    with pytest.raises(UserError, match=re.escape(message)):
        masks.check_regions(masks.with_regions(images, "object"))


def test_masks_are_part_of_what_a_subset_is_where_they_are_used(tmp_path):
    mask_file(tmp_path / "m.png", 0, 0, 8, 9)
    images, columns = listed(tmp_path, [("", "m.png"), ("1, 2, 3, 4", "")]), masks.columns_of("object")
    plain = listed(tmp_path, [("", "")] * 2)

    def identity(table, columns):
        return split_identity(table, ("0", "1"), columns)

    for part in (None, ("caption",)):  # all stages, where no mask is asked for
        assert identity(images, part) == identity(plain, part)
    before = masks.with_regions(images, "object")
    plan = sources.PlannedSources.of(before, hash_images(before), columns)
    plan.check(masks.with_regions(images, "object"))
    mask_file(tmp_path / "m.png", 0, 0, 16, 9)
    after = masks.with_regions(images, "object")
    assert identity(before, columns) != identity(after, columns)
    with pytest.raises(sources.DataChanged, match=r"\(1 new, 1 gone; '0.png' is new or has another label or mask\)"):
        plan.check(after)


def test_a_mask_that_is_exchanged_after_the_listing_is_refused(tmp_path):
    mask_file(tmp_path / "m.png", 0, 0, 8, 9)
    images = masks.with_regions(listed(tmp_path, [("", "m.png"), ("1, 2, 3, 4", "")]), "object")
    source_masks = sources.SourceMasks(sources.SourceImages(images, planned(images)), (4, 5), "object")
    mask_file(tmp_path / "m.png", 0, 0, 16, 9)
    with pytest.raises(
        sources.DataChanged, match="m.png was exchanged while images were made from it: everything made"
    ):
        source_masks.batch([1, 0])
    mask_file(tmp_path / "m.png", 0, 0, 8, 9)  # restored
    assert source_masks.batch([0]).sum() == 1
    (tmp_path / "m.png").unlink()
    assert source_masks.batch([0]).sum() == 1  # known by now


@pytest.mark.slow
def test_a_masked_subset_is_refused_on_the_command_line_where_there_are_no_boxes(workshop, image_folder, tmp_path):
    argv = sampling_arguments(workshop, image_folder, tmp_path, object_mask="object")
    assert "has no boxes of its objects" in refused("sample_mp.py", *argv)


# ------------------------------------------------------------------------------------------------------ the templates


def test_templates_come_from_a_set_or_a_file(tmp_path):
    assert prompts.read_templates("training") == prompts.TEMPLATES
    assert all(text.count("{}") == 1 for texts in prompts.TEMPLATE_SETS.values() for text in texts)
    (tmp_path / "t.txt").write_text("# mine\n\na sketch of a {}\na sketch of a {}\n{} at night\n")
    assert prompts.read_templates(str(tmp_path / "t.txt")) == ("a sketch of a {}", "{} at night")
    (tmp_path / "bad.txt").write_text("a sketch\n")
    with pytest.raises(UserError, match="'a sketch': expected exactly one {}"):
        prompts.read_templates(str(tmp_path / "bad.txt"))
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(UserError, match="the file holds no caption"):
        prompts.read_templates(str(tmp_path / "none.txt"))
    with pytest.raises(UserError, match="--prompt_templates traning: expected a text file .* or one of training"):
        prompts.read_templates("traning")


def test_one_prompt_and_several_are_not_given_together():
    argv = ["--dataset", "elpv", "--prompt", "a {}", "--prompt_templates", "views"]
    with pytest.raises(UserError, match="--prompt is one prompt for all images, --prompt_templates several"):
        sample_mp.resolve(sample_mp.build_parser().parse_args(argv))


def task_files(templates, seed=0):
    options = {"strategy": strategies.find("real-gen"), "strengths": (1.0,), "multiplier": 100, "batch_size": 4}
    plan = make_plan(np.arange(9) % 3, [str(i) for i in range(9)], 3, PlanSettings(**options, seed=seed))
    return files.TaskPaths(plan, CLASSES, meta_csv.slugs(CLASSES), [str(i) for i in range(9)], seed, "png", templates)


def test_a_tasks_template_follows_from_seed_and_number():
    templates = ("a {}", "the {}", "one {}")
    some, again, other = task_files(templates), task_files(templates), task_files(templates, seed=1)
    drawn = [some.template(n) for n in range(900)]
    assert drawn == [again.template(n) for n in range(900)] != [other.template(n) for n in range(900)]
    assert min(np.bincount(drawn)) > 250
    assert some.text(5)["prompt"] == templates[drawn[5]]
    assert next(iter(some.meta_rows(np.asarray([5]))))[-1] == templates[drawn[5]]
    plain = task_files(())
    assert plain.further_columns == meta_csv.FURTHER_COLUMNS and "prompt" not in plain.text(5)


def test_every_template_of_every_class_is_a_prompt_of_its_own(tiny_base):
    templates = ("a photo of a {}", "a drawing of a {}")
    files, solver = ModelFiles("tiny", tiny_base), SolverSettings(4)
    engine = Engine(files, Prompts(CLASSES, CLASSES, templates=templates), solver, tiny.RESOLUTION)
    assert engine.prompts == [f"a {kind} of a {name}" for kind in ("photo", "drawing") for name in CLASSES]
    alone = Engine(files, Prompts(CLASSES, CLASSES, template=templates[1]), solver, tiny.RESOLUTION)
    created = engine.generate([3 + 1], [task_rng(0, 0)])
    assert torch.equal(created, alone.generate([1], [task_rng(0, 0)]))
    assert not torch.equal(created, engine.generate([1], [task_rng(0, 0)]))


@pytest.mark.slow
def test_a_subset_of_several_prompts_is_the_same_however_it_is_made_and_never_mixed(workshop, image_folder, tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}\na drawing of a {}\n")
    base = yaml.safe_load((workshop / "config" / "finetuned_ckpts.yaml").read_text())["animals"]["ck"]["model_path"]
    changes = {"sample_strategy": "real-gen", "finetune_model_key": None, "model_path": base}
    changes |= {"prompt_templates": file, "syn_dataset_multiplier": 1}
    one = sampling_arguments(workshop, image_folder, tmp_path / "one", **changes)
    run_here("sample_mp.py", *one)
    run_here(
        "sample_mp.py",
        *sampling_arguments(workshop, image_folder, tmp_path / "two", **changes, num_shards=2, shard_index=1),
    )
    run_here("sample_mp.py", *sampling_arguments(workshop, image_folder, tmp_path / "two", **changes))
    assert subset_contents(tmp_path / "one") == subset_contents(tmp_path / "two")
    folder = next((tmp_path / "one").rglob("meta.csv")).parent
    rows = list(csv.DictReader((folder / "meta.csv").open()))
    assert {row["Prompt"] for row in rows} == {"a photo of a {}", "a drawing of a {}"}
    assert yaml.safe_load((folder / "config.yaml").read_text())["templates"] == ["a photo of a {}", "a drawing of a {}"]
    file.write_text("a photo of a {}\na sketch of a {}\n")
    assert "templates: " in refused("sample_mp.py", *one)
