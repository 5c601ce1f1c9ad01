"""Stage 1 with unlabelled images: how they share the batches, what learns from them, and which pools are refused."""

import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_finetune_loop import any_precision, make_trainer, request, trained  # noqa: F401

import tiny
from semantic_aug import prompts
from semantic_aug.errors import Interrupted, UserError
from semantic_aug.finetune import checkpoints, trainer
from semantic_aug.finetune import run as stage
from semantic_aug.finetune.batches import BatchSource
from semantic_aug.finetune.config import parse
from semantic_aug.finetune.run import train
from semantic_aug.seeding import numpy_rng

LABELLED = 18
"""Training images of the tiny folder, whose rows come first."""


@pytest.fixture
def pool(tmp_path):
    """Nine unlabelled images of another size."""
    (tmp_path / "pool").mkdir()
    for index in range(9):
        tiny.picture(index % 3, 1000 + index).resize((50, 30)).save(tmp_path / "pool" / f"{index}.png")
    return tmp_path / "pool"


def source(batch, unlabelled=0, share=None, **changes):
    options = dict(
        views=1, flip=True, templates=5, num_train_timesteps=100, noise_offset=0.0, class_balanced=False, seed=3
    )
    pool = {"unlabelled": unlabelled, "unlabelled_share": share}
    return BatchSource(np.arange(LABELLED) % 3, batch, (4, 2, 2), **{**options, **pool, **changes})


@pytest.mark.parametrize(("batch", "share"), [(8, 0.25), (6, 0.1), (1, 0.3), (7, 0.5)])
@pytest.mark.parametrize("balanced", [False, True])
def test_every_batch_holds_its_share_and_every_image_its_turn(batch, share, balanced):
    batches = [source(batch, 7, share, class_balanced=balanced).indices(step) for step in range(120)]
    assert all(len(rows) == batch for rows in batches)
    unlabelled = np.array([(rows >= LABELLED).sum() for rows in batches])
    assert np.abs(unlabelled - batch * share).max() < 1 and unlabelled.sum() == round(120 * batch * share)
    turns = np.bincount(np.concatenate(batches), minlength=LABELLED + 7)
    parts = [turns[LABELLED:]] if balanced else [turns[:LABELLED], turns[LABELLED:]]
    assert all(part.max() - part.min() <= 1 for part in parts)
    if batch * share >= 2:  # no slice of the batch, of a process or a micro-batch, is left to one kind
        assert len({tuple(rows >= LABELLED) for rows in batches}) > 1


def test_without_a_pool_the_batches_are_the_shuffled_epochs():
    order = numpy_rng(3, "train", "epoch", 0).permutation(LABELLED)
    assert np.array_equal(np.concatenate([source(6).indices(step) for step in range(3)]), order)


@pytest.mark.parametrize(
    ("template", "super_class", "caption"),
    [
        ("a photo of a {}", "bird", "a photo of a bird"),
        ("a photo of a {}", "aircraft", "a photo of an aircraft"),
        ("a photo of a {}", "", "a photo"),
        ("a close-up photo of the {} on a branch", "", "a close-up photo"),
        ("{}", "", "a photo"),
    ],
)
def test_captions_without_a_class(template, super_class, caption):
    assert prompts.caption_without_class(template, super_class) == caption


@pytest.mark.parametrize("changes", [{}, {"random_crops": True}, {"train_text_encoder_lora": True}])
def test_class_tokens_learn_nothing_from_unlabelled_images(tiny_base, image_folder, tmp_path, pool, caplog, changes):
    caplog.set_level("INFO")
    running = make_trainer(tiny_base, image_folder, tmp_path / "run", unlabelled=pool, **changes)
    if not changes:
        assert "latents of 27 images (1 crop(s), with mirror images) take" in caplog.text
        assert isinstance(running.latents.moments, np.memmap) and len(running.latents.moments) == 27
    (vectors,), lora = running.model.vectors, running.model.lora_parameters
    for rows, learned in (([18, 26, 20, 21], False), ([0, 26, 17, 21], True)):
        draw = replace(running.source.draw(0), index=torch.tensor(rows))
        running._forward_and_backward(running._batch(draw))
        assert bool(vectors.grad.abs().sum() > 0) == learned
        assert all(parameter.grad.abs().sum() > 0 for parameter in lora[:1])
        running.optimizer.zero_grad()


def test_the_last_captions_are_those_without_a_class(tiny_base, image_folder, tmp_path, pool):
    model = make_trainer(tiny_base, image_folder, tmp_path / "run", unlabelled=pool, training_templates="views").model
    tokenizer = stage.load_skeleton(str(tiny_base), tiny_base).tokenizers[0]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in model.prompt_ids[0][-9:]]
    assert [text.replace(" ", "") for text in texts[3:5]] == ["aphoto", "aclose-upphoto"]


def run(base, images, folder, **changes):
    config, dataset = request(base, images, folder, **changes)
    return train(config, dataset, Accelerator(cpu=True))


def test_a_stopped_run_ends_as_one_that_was_not_and_is_of_its_pool_alone(
    tiny_base, image_folder, tmp_path, pool, monkeypatch
):
    changes = {"max_train_steps": 5, "train_batch_size": 2, "unlabelled": pool, "unlabelled_share": 0.4}
    summary = run(tiny_base, image_folder, tmp_path / "whole", **changes)
    assert (summary["images"], summary["unlabelled"]) == (18, 9)
    halves = {"train_batch_size": 1, "gradient_accumulation_steps": 2}
    plain, stopped = trainer.Trainer.optimizer_step, []

    def step(self):
        if self.step == 2 and not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGTERM))
        return plain(self)

    monkeypatch.setattr(trainer.Trainer, "optimizer_step", step)
    with pytest.raises(Interrupted):
        run(tiny_base, image_folder, tmp_path / "parts", **changes)
    pool.rename(tmp_path / "moved")
    changes |= {"unlabelled": tmp_path / "moved", "resume_from_checkpoint": "latest"}
    run(tiny_base, image_folder, tmp_path / "parts", **changes)
    whole, parts = trained(tmp_path / "whole"), trained(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    run(tiny_base, image_folder, tmp_path / "halves", **{**changes, **halves})  # as two processes would share it
    halves = trained(tmp_path / "halves")
    assert all((whole[name] - halves[name]).abs().max() < 1e-4 for name in whole)

    for other, difference in (({"unlabelled_share": 0.5}, "0.4 -> 0.5"), ({"unlabelled": None}, "0.4 -> none")):
        again = {**changes, **other}
        if again["unlabelled"] is None:
            del again["unlabelled"], again["unlabelled_share"]
        with pytest.raises(UserError, match=f"unlabelled_share: {difference}"):
            run(tiny_base, image_folder, tmp_path / "parts", **again)
    tiny.picture(0, 7).save(tmp_path / "moved" / "3.png")
    with pytest.raises(UserError, match="unlabelled: 9 images as before, the same names and labels, other content"):
        run(tiny_base, image_folder, tmp_path / "whole", **changes)


def test_a_dry_run_says_how_many_and_what_share(tiny_base, image_folder, tmp_path, pool, capsys):
    argv = {"dataset": f"folder:{image_folder}", "pretrained_model_name_or_path": tiny_base, "unlabelled": pool}
    argv |= {"output_dir": tmp_path / "run", "report_to": "none", "unlabelled_share": 0.3}
    stage.run(parse([*(text for name, value in argv.items() for text in (f"--{name}", str(value))), "--dry_run"]))
    line = "unlabelled: 9 images, on average 2.4 of the 8 images of a step (0.3), under captions like 'a photo'\n"
    assert line in capsys.readouterr().out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unlabelled_share": 0}, "--unlabelled_share 0: expected a number in (0, 1)"),
        ({"unlabelled_share": 1}, "--unlabelled_share 1: expected a number in (0, 1)"),
        ({"unlabelled_share": 1.5}, "1.5: expected a number in [0, 1]"),
        ({"finetune_strategy": "ti"}, "--unlabelled with --finetune_strategy ti, which trains no LoRA: nothing would"),
        ({"unlabelled": "gone"}, "gone: not there; expected a folder of images"),
        ({"unlabelled": "empty"}, "empty: no image there; expected files ending in"),
        ({"unlabelled": "leaking"}, "leaking holds 1 test images of animals"),
    ],
)
def test_bad_pools_and_shares_are_one_line(tiny_base, image_folder, tmp_path, pool, changes, message):
    (tmp_path / "empty").mkdir()
    shutil.copytree(pool, tmp_path / "leaking")
    shutil.copy(next((image_folder / "test" / "toad").iterdir()), tmp_path / "leaking" / "holiday.png")
    changes = {"unlabelled": pool.name, **changes}
    changes["unlabelled"] = tmp_path / changes["unlabelled"]
    with pytest.raises(UserError) as error:
        request(tiny_base, image_folder, tmp_path / "run", **changes)
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_share_of_nothing_is_refused():
    with pytest.raises(UserError, match="--unlabelled_share 0.5 goes with --unlabelled PATH"):
        parse(["--dataset", "elpv", "--unlabelled_share", "0.5"])


def test_without_a_pool_the_record_is_as_before(tiny_base, image_folder, tmp_path):
    config, dataset = request(tiny_base, image_folder, tmp_path / "run")
    assert not [name for name in config.record() if name.startswith("unlabelled")]
    assert "unlabelled" not in checkpoints.origin_of(config, dataset).describe()
