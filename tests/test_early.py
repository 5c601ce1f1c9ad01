"""What can fail fails before the work, and a command that is refused leaves everything as it was."""

import importlib
import os
import re
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import classify_arguments, refused, sampling_arguments

import sample_mp
import train_cls
import train_lora
from semantic_aug import allocator, cli, files, registry, runs
from semantic_aug.classify import config as classify
from semantic_aug.classify import run as classify_run
from semantic_aug.datasets import load_dataset
from semantic_aug.errors import UserError, run_main
from semantic_aug.evaluation.experiments import headroom, pseudo_label
from semantic_aug.finetune import checkpoints
from semantic_aug.finetune import config as finetune
from semantic_aug.foreign_flags import INSTEAD
from semantic_aug.run_lock import lock_folder


def everything(folder):
    """Names and contents of all that lies below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("program", "argv", "message"),
    [
        (train_cls, ["--predict", "gone"], "--predict .*gone: not a folder or file"),
        (train_cls, ["--eval_only", "--output_dir", "gone"], "--output_dir .*gone: no trained classifier there"),
        (train_cls, ["--weights", "gone"], "--weights .*gone: expected a .safetensors or .pth file"),
        (sample_mp, ["--finetune_model_key", "k", "--classifier", "gone"], "gone holds no finished classifier"),
        (headroom, ["--weights", "gone"], "--weights .*gone: expected a .safetensors or .pth file"),
        (pseudo_label, ["--classifier", "gone", "--output_dir", "x"], "gone holds no finished classifier"),
    ],
)
def test_paths_that_lead_nowhere_are_refused_before_data_are_read(program, argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("prepare_process", "let_waiting_threads_sleep"):  # what comes before torch is loaded
        monkeypatch.setattr(allocator, name, None)
    with pytest.raises(UserError, match=message):
        program.main(["--dataset", "folder:nowhere", *argv])


@pytest.mark.parametrize("existing", [[], [".hidden"]])
def test_work_that_fails_before_a_result_leaves_its_folder_as_it_was(tmp_path, existing):
    folder = tmp_path / "new" / "run" if not existing else tmp_path
    for name in existing:
        (folder / name).touch()
    before = everything(tmp_path)
    with pytest.raises(UserError), files.no_trace(folder, ("args.yaml", "logs/*")):
        (folder / "logs" / "a").mkdir(parents=True)
        for name in ("args.yaml", "logs/a/events", ".lock", ".lock-0of2"):
            (folder / name).touch()
        (folder / "metrics.csv").write_text("step,loss\n")
        raise UserError("no")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["checkpoint-5/x", "metrics.csv", "notes.txt"])
def test_work_that_fails_with_a_result_keeps_everything(tmp_path, name):
    with pytest.raises(UserError), files.no_trace(tmp_path / "run", ("args.yaml",)):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / "args.yaml").touch()
        (tmp_path / "run" / name).write_text("step,loss\n1,2\n")
        raise UserError("no")
    assert (tmp_path / "run" / name).is_file() and (tmp_path / "run" / "args.yaml").is_file()


def test_a_folder_with_other_files_or_another_run_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError), files.no_trace(tmp_path, ("*",)):
        (tmp_path / ".lock").touch()
        (tmp_path / "args.yaml").touch()
        raise UserError("no")
    assert sorted(os.listdir(tmp_path)) == ["args.yaml", "mine.txt"]
    run = tmp_path / "run"
    with pytest.raises(UserError), files.no_trace(run, ("*",)):
        run.mkdir()
        (run / "args.yaml").touch()
        held = files.locked(run / ".lock", shared=True)
        held.__enter__()
        raise UserError("no")
    assert (run / "args.yaml").exists()  # another shard is at work there
    held.__exit__(None, None, None)


def test_a_run_that_is_refused_leaves_the_run_that_holds_the_folder_alone(tmp_path):
    """The refused one looked when the other had its lock and nothing else."""
    with files.locked(tmp_path / ".lock"):
        with pytest.raises(UserError), files.no_trace(tmp_path, ("args.yaml", "data/*")):
            (tmp_path / "args.yaml").touch()  # the holder writes
            (tmp_path / "data" / "fox").mkdir(parents=True)
            with lock_folder(tmp_path, "--output_dir"):
                pass
        assert sorted(os.listdir(tmp_path)) == [".lock", "args.yaml", "data"]


def test_a_lock_whose_file_is_gone_is_taken_anew(tmp_path, caplog):
    """A run that leaves no trace removes its lock file while another waits for it."""
    caplog.set_level("INFO")
    path, taken = tmp_path / "run" / ".lock", []
    with files.locked(path):
        waiting = threading.Thread(target=lambda: taken.append(held_alone(path)))
        waiting.start()
        while "waiting for the other" not in caplog.text:
            time.sleep(0.1)
        shutil.rmtree(tmp_path / "run")
    waiting.join()
    assert taken == [True]


def held_alone(path):
    """Takes a lock and says whether nobody else gets it."""
    with files.locked(path, waiting_for="the other"):
        try:
            with files.locked(path, wait=False):
                return False
        except files.LockHeld:
            return True


FINETUNE = ("--max_train_steps", 1, "--train_batch_size", 2, "--report_to", "none", "--validation_steps", 0)
CLASSIFY = ("--model", "resnet18", "--res_mode", 32, "--nepoch", 1, "--gpu", "cpu")


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_lora.py", [*FINETUNE, "--lora_targets", "nothing"], "--lora_targets nothing: the U-Net has no module"),
        ("train_lora.py", [*FINETUNE, "--lr_scheduler", "piecewise_constant"], "--lr_step_rules (not given)"),
        ("train_cls.py", [*CLASSIFY, "--weights", "typo"], "typo: expected a .safetensors or .pth file"),
        ("train_cls.py", [*CLASSIFY, "--weights", "none", "--trainable_layers", "stages9"], "'stages9' is no part"),
        (
            "train_cls.py",
            [*CLASSIFY, "--weights", "none", "--batch_size", 2, "--gradient_accumulation_steps", 9],
            "too small",
        ),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_a_refused_command_leaves_no_folder_and_a_dry_run_refuses_it_too(
    script, flags, message, dry, tiny_base, image_folder, tmp_path, capsys
):
    base = ["--pretrained_model_name_or_path", tiny_base] if script == "train_lora.py" else []
    argv = ["--dataset", f"folder:{image_folder}", "--output_dir", tmp_path / "a" / "out", *base, *flags]
    module = {"train_lora.py": train_lora, "train_cls.py": train_cls}[script]
    assert run_main(module.main, [*map(str, argv), *(["--dry_run"] if dry else [])]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0] and not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lora_targets", "norm1"], "--lora_targets norm1: "),
        (["--register_key", "a#b"], "--register_key 'a#b': expected a name without '#'"),
        (
            ["--unlabelled", "gone"],
            "gone: not there; expected a folder of images, a list with the column path, hf:ID or ",
        ),
    ],
)
def test_stage_1_refuses_before_the_images_are_listed(flags, message, tiny_base, tmp_path, capsys):
    argv = ["--dataset", f"folder:{tmp_path / 'absent'}", "--pretrained_model_name_or_path", tiny_base, *FINETUNE]
    assert run_main(train_lora.main, [*map(str, argv), *flags]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1 and message in error[0], error


def test_a_precision_of_accelerate_launch_that_is_none_of_ours_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    assert run_main(train_lora.main, ["--dataset", f"folder:{tmp_path / 'absent'}", *map(str, FINETUNE)]) == 2
    assert (
        "sets the mixed precision fp8, expected one of no, fp16, bf16: give --mixed_precision"
        in capsys.readouterr().err
    )


def test_the_registry_of_the_default_folder_is_read_before_anything_runs(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Settings:
        TITLE = "run"
        config_dir: Path = cli.setting(tmp_path, type=registry.config_folder, help="folder of the registry files")

    parser = cli.Parser(prog="a_stage.py")
    cli.add_settings(parser, Settings)
    assert cli.read_settings(Settings, parser.parse_args([])).config_dir == tmp_path
    (tmp_path / "synthetic_datasets.yaml").write_text("cub:\n  a: x\ncub:\n  b: y\n")
    with pytest.raises(UserError, match="'cub' is written twice, in line 1 and in line 3"):
        parser.parse_args([])


@pytest.mark.parametrize("dry", [False, True])
def test_a_refused_sampling_leaves_no_folder(workshop, image_folder, tmp_path, dry):
    argv = sampling_arguments(workshop, image_folder, tmp_path / "out", finetune_model_key="foreign")
    line = refused("sample_mp.py", *argv, *(["--dry_run"] if dry else []))
    assert "no token" in line, line
    assert not any(tmp_path.iterdir()), sorted(everything(tmp_path))[3:]


@pytest.mark.parametrize("flags", [[], ["--finetune_strategy", "db", "--train_text_encoder_lora", "--random_crops"]])
def test_a_dry_run_of_a_good_request_passes_and_writes_nothing(flags, tiny_base, image_folder, tmp_path, capsys):
    argv = ["--dataset", f"folder:{image_folder}", "--output_dir", f"{tmp_path}/out", "--dry_run"]
    base = ["--pretrained_model_name_or_path", str(tiny_base), "--register_key", "new", "--config_dir", str(tmp_path)]
    assert run_main(train_lora.main, [*argv, *base, *flags, *map(str, FINETUNE)]) == 0, capsys.readouterr().err
    assert run_main(train_cls.main, [*argv, "--weights", "none", *map(str, CLASSIFY)]) == 0, capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_dry_run_downloads_nothing_and_says_what_a_run_would(image_folder, tiny_base, tmp_path, capsys, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("a download was tried")

    monkeypatch.setattr("socket.socket.connect", no_network)
    for variable in ("CUB_ROOT", "CUB_HUG_LOCAL_IMAGE_TRAIN_DIR", "CUB_HUG_LOCAL_IMAGE_TEST_DIR"):
        monkeypatch.delenv(variable, raising=False)
    data = ["--dataset", f"folder:{image_folder}", "--output_dir", f"{tmp_path}/out", "--dry_run"]
    cases = [
        (train_lora, [*data, "--pretrained_model_name_or_path", "no-such/model"], "the base model no-such/model"),
        (train_lora, ["--dataset", "hf:no-such/set", "--dry_run", "--pretrained_model_name_or_path", "no-such/model"],
         "the data set no-such/set from the hub and the base model no-such/model from the hub"),
        (train_lora, ["--dataset", "cub", "--dry_run", "--pretrained_model_name_or_path", str(tiny_base)],
         "the data set Multimodal-Fatima/CUB_train from the hub (unless you set CUB_ROOT to the unpacked official download"),
        (train_cls, [*data, *map(str, CLASSIFY)], "the pre-trained weights of resnet18 from the hub"),
    ]  # fmt: skip
    for module, argv, message in cases:
        assert run_main(module.main, argv) == 0
        assert f"a run would download {message}" in capsys.readouterr().out
    assert run_main(train_cls.main, [*data, *map(str, CLASSIFY), "--trainable_layers", "stages9"]) == 2


@pytest.mark.slow
def test_a_dry_run_says_that_the_folder_is_another_runs(image_folder, tiny_base, tmp_path):
    argv = list(map(str, classify_arguments(image_folder, tmp_path / "three", nepoch=1)))
    assert train_cls.main(argv) == 0 and train_cls.main([*argv, "--dry_run"]) == 0
    with pytest.raises(UserError, match=r"three holds a run with other arguments \(lr: 0.02 -> 0.03"):
        train_cls.main([*argv, "--lr", "0.03", "--dry_run"])
    one = {"dataset": f"folder:{image_folder}", "pretrained_model_name_or_path": tiny_base, "report_to": "none"}
    one |= {"output_dir": tmp_path / "one", "max_train_steps": 1, "train_batch_size": 2, "validation_steps": 0}
    argv = [str(word) for name, value in one.items() for word in (f"--{name}", value)]
    assert train_lora.main([*argv, "--dry_run"]) == 0 and not (tmp_path / "one").exists()
    assert train_lora.main(argv) == 0 and train_lora.main([*argv, "--dry_run"]) == 0
    with pytest.raises(UserError, match=r"one holds a run with other arguments \(rank: 10 -> 3"):
        train_lora.main([*argv, "--rank", "3", "--dry_run"])


def test_stages_1_and_3_name_the_value_of_a_setting_that_is_left_out(image_folder, tmp_path):
    def one(*argv):
        return finetune.parse(["--dataset", "x", "--output_dir", str(tmp_path / "one"), *argv])

    def three(*argv):
        argv = ["--dataset", f"folder:{image_folder}", "--output_dir", str(tmp_path / "three"), *argv]
        return classify.read_config(train_cls.build_parser().parse_args(argv))

    checkpoints.take_folder(one("--contexts", "captions", "--split", "half"), None, 1)
    with pytest.raises(UserError, match=r"\(setting.split: 'half' -> 'official'; contexts: 'captions' -> none\)"):
        checkpoints.take_folder(one(), None, 1)
    given, plain = three("--momentum", "plain", "--cutmix_per", "item"), three()
    dataset = load_dataset(given.dataset)
    origin = classify_run.origin_of(given, dataset, None)
    runs.claim(given.output_dir, given.record(), "--output_dir", origin=origin)
    with pytest.raises(UserError, match=r"momentum: 'plain' -> 'nesterov'; mixing.cutmix_per: 'item' -> 'batch'\)"):
        classify_run.check_folder(plain, dataset, None)


@pytest.mark.parametrize(
    ("module", "flags", "message"),
    [
        (train_lora, "--lr_scheduler piecewise_constant", "--lr_scheduler piecewise_constant with --lr_step_rules"),
        (train_lora, "--training_templates none.txt", "--training_templates .*none.txt: expected a text file"),
        (train_lora, "--report_to clearml", "--report_to clearml needs the package clearml"),
        (train_lora, "--resolution 41", "41.*multiple of"),
        (sample_mp, "--few_steps 4", "is no Turbo model; give --distilled_lora FILE, or --distilled KIND"),
        (
            sample_mp,
            "--few_steps 5 --distilled turbo",
            "--few_steps 5: a model of kind turbo was distilled for at most 4",
        ),
        (sample_mp, "--few_steps 4 --distilled hyper --guidance_scale 5", "--guidance_scale 5: a model of kind hyper"),
        (
            sample_mp,
            "--few_steps 4 --distilled tcd --timestep_spacing trailing",
            "with --scheduler tcd, which ignores it",
        ),
        (
            sample_mp,
            "--scheduler lcm --num_inference_steps 60",
            "--scheduler lcm with 60 steps: .*smaller than `num_inference_steps`: 60",
        ),
        (
            sample_mp,
            "--scheduler ddim --num_inference_steps 1001",
            "--scheduler ddim with 1001 steps: .*cannot be larger",
        ),
        (
            sample_mp,
            "--scheduler EDMEulerScheduler",
            "EDMEulerScheduler with 25 steps does not denoise by the base model's",
        ),
        (sample_mp, "--resolution 41", "41.*multiple of"),
        (sample_mp, "--sample_strategy diff-mix --finetune_model_key nope", "unknown .* 'nope'"),
        (sample_mp, "--prompt_templates none.txt", "none.txt: expected a text file"),
        (sample_mp, "--contexts none.txt", "none.txt"),
        (
            sample_mp,
            "--sample_strategy real-gen --object_mask object",
            "--object_mask object: the strategy starts from",
        ),
        (train_cls, "--drw_epoch 3 --criterion cb", "--drw_epoch 3: --criterion cb weights classes from the start"),
        (train_cls, "--use_cutmix --nepoch 2 --unmixed_epochs 1 1", "--unmixed_epochs 1 1: none of the --nepoch 2"),
        (train_cls, "--synthetic_balanced", "--synthetic_balanced: there are no synthetic images"),
        (train_cls, "--eval_only --predict .", "--eval_only and --predict each use a classifier in their own way"),
        (train_cls, "--eval_only --seeds 1 2", "--seeds is for training: leave it out, and name one of its runs"),
        (train_cls, "--syndata_dir none", "synthetic subset .*none is not a folder"),
        (train_cls, "--test_dataset nope", "unknown data set 'nope'"),
        (
            train_cls,
            "--model crossvit_tiny_240",
            "--res_mode 224: --model crossvit_tiny_240 cannot take images of 224 x 224 .*240 is what it was made for",
        ),
        (
            train_cls,
            "--model xcit_nano_12_p8_224 --res_mode 100",
            "--res_mode 100: --model xcit_nano_12_p8_224 .*divide",
        ),
        (
            headroom,
            "--model dla34 --res_mode 100",
            "--res_mode 100: --model dla34 cannot take images of 100 x 100 pixels",
        ),
    ],
)
def test_what_flags_and_base_model_decide_is_refused_before_the_data_set_is_read(
    tiny_base, tmp_path, module, flags, message
):
    base = {
        train_lora: ["--pretrained_model_name_or_path"],
        sample_mp: ["--sample_strategy", "real-mix", "--model_path"],
    }
    argv = ["--dataset", f"folder:{tmp_path}/none", *base.get(module, [])] + [str(tiny_base)] * (module in base)
    with pytest.raises(UserError, match=f"{tmp_path}/none"):
        module.main(argv)
    with pytest.raises(UserError, match=message):
        module.main([*argv, *flags.split()])
    assert not list(tmp_path.iterdir())


def test_real_runs_look_at_the_disk_before_they_begin(tiny_base, image_folder, workshop, tmp_path, monkeypatch):
    def nothing_free(folder, needed, flag):
        raise UserError(f"{flag}: {needed > 0}")

    monkeypatch.setattr(files, "check_space", nothing_free)
    argv = classify_arguments(image_folder, tmp_path / "three", nepoch=1)
    with pytest.raises(UserError, match="--output_dir: True"):
        train_cls.main(list(map(str, argv)))
    one = {"dataset": f"folder:{image_folder}", "pretrained_model_name_or_path": tiny_base, "report_to": "none"}
    one |= {"output_dir": tmp_path / "one", "max_train_steps": 1, "train_batch_size": 2}
    for further in ({}, {"resume_from_checkpoint": "latest"}):  # which the wrappers always give
        with pytest.raises(UserError, match="--output_dir: True"):
            train_lora.main([str(word) for name, value in {**one, **further}.items() for word in (f"--{name}", value)])
    with pytest.raises(UserError, match="--output_root: True"):
        sample_mp.main(list(map(str, sampling_arguments(workshop, image_folder, tmp_path / "two"))))
    assert not list(tmp_path.rglob("*.*"))


def test_a_disk_that_is_clearly_too_small_is_refused_with_both_sizes(tmp_path):
    files.check_space(tmp_path / "a" / "b", 1000, "--output_dir")
    with pytest.raises(UserError, match=r"would need 1e\+09 GB of disk, .* GB are free: give another --output_dir"):
        files.check_space(tmp_path / "a" / "b", 10**18, "--output_dir")


@pytest.mark.parametrize("stage", ["train_lora", "sample_mp", "train_cls"])
def test_flags_of_the_authors_name_ours(stage):
    parser = importlib.import_module(stage).build_parser()
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for flag, instead in INSTEAD[f"{stage}.py"].items():
        assert flag not in flags, "one of ours would be refused"
        assert set(re.findall(r"--\w+", instead)) <= flags, (flag, instead)
        with pytest.raises(UserError) as caught:
            parser.parse_args([flag, "1"])
        assert f"{flag} is a flag of the Diff-Mix authors' code: here, {instead};" in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "word", "ours"),
    [
        ("train_cls", "--syndata_p=0.1", "--synthetic_prob"),
        ("train_lora", "--ti_only", "--finetune_strategy ti"),
        ("sample_mp", "--guidance-scale", "--guidance_scale"),
        ("sample_mp", "--class-name", "leave it out: all classes are targets, see --pairing"),
    ],
)
def test_foreign_spellings_name_ours(stage, word, ours):
    with pytest.raises(UserError, match=f"here, {ours};"):
        importlib.import_module(stage).build_parser().parse_args([word, "7"])
