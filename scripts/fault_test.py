#!/usr/bin/env python
"""Disturbs real runs of a stage in real processes and checks that nothing is lost, doubled or mislabelled.

    python scripts/fault_test.py --trials 25
    python scripts/fault_test.py --stage 1 --trials 5
    python scripts/fault_test.py --stage 3 --trials 5

Stages 1 and 3: each trial trains the same tiny model afresh, stops it at up to three random moments (SIGKILL, SIGTERM,
SIGINT), starts the command again until it ends well, and compares weights, metrics and predictions bit for bit with the
undisturbed run; rates of images or steps per second alone may differ. Stage 3 saves its state after every epoch here.

Stage 2: each trial starts the same small subset afresh and, drawn from its seed, does some of: kill a random worker or
the parent (SIGKILL), ask it to stop (SIGTERM, SIGINT), delete or truncate random images, fill the disk (a small tmpfs,
where this user may mount one), resume with another number of processes, or change what the images are made from: add,
remove or exchange a training image, exchange the base model or the LoRA. What was changed must be refused with one
line, and no image may be another than the undisturbed run's; then it is restored. The command is started again until it
ends well, and every byte compared with the undisturbed run. The tally goes to ``outputs/fault_test_stage{N}.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

RESTARTS = 12
FAULTS = (
    "kill worker",
    "kill parent",
    "terminate parent",
    "interrupt parent",
    "delete images",
    "truncate images",
    "change processes",
)
CHANGES = ("add image", "remove image", "exchange image", "change base", "change LoRA")
"""Faults that make the inputs other than those the subset was begun with."""
SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}


class Workshop:
    """A tiny base model, images and a checkpoint, and the command that makes a subset from them.

    Args:
        folder: where everything goes.
        images: of the subset.
        processes: of the command.
    """

    def __init__(self, folder: Path, images: int, processes: int):
        import yaml

        import tiny

        classes = ("blue jay", "red fox", "toad")
        base = tiny.write_base(folder / "base")
        self.pictures = tiny.write_image_folder(folder / "animals")
        tiny.write_lora(folder / "ck" / "pytorch_lora_weights.safetensors", base)
        tiny.write_tokens(folder / "ck" / "learned_embeds.safetensors", classes)
        entry = {
            "model_path": str(base),
            "lora_path": str(folder / "ck"),
            "embed_path": str(folder / "ck/learned_embeds.safetensors"),
        }
        (folder / "config").mkdir()
        (folder / "config" / "finetuned_ckpts.yaml").write_text(yaml.safe_dump({"animals": {"ck": entry}}))
        self.folder, self.multiplier, self.processes = folder, images / 18, processes

    def change(self, fault: str, rng: random.Random) -> Callable[[], None]:
        """Changes an input; returns what restores it."""
        images = sorted((self.pictures / "train").rglob("*.png"))
        chosen, other = rng.sample(images, 2)
        path = {
            "add image": chosen.with_name("added.png"),
            "change base": self.folder / "base" / "unet" / "diffusion_pytorch_model.safetensors",
            "change LoRA": self.folder / "ck" / "pytorch_lora_weights.safetensors",
        }.get(fault, chosen)
        before = path.read_bytes() if path.exists() else None
        if fault == "remove image":
            path.unlink()
        elif path.suffix == ".png":
            put(path, other.read_bytes())
        else:  # the last weight becomes another one
            put(path, before[:-2] + bytes(2))
        return lambda: put(path, before)

    def start(self, root: Path) -> subprocess.Popen:
        """Starts the command in a process group of its own."""
        argv = [
            sys.executable, str(ROOT / "sample_mp.py"), "--dataset", f"folder:{self.pictures}", "--finetune_model_key", "ck",
            "--config_dir", str(self.folder / "config"), "--output_root", str(root), "--syn_dataset_multiplier",
            str(self.multiplier), "--batch_size", "4", "--num_inference_steps", "6", "--strength_strategy", "uniform",
            "--gpu_ids", *["cpu"] * self.processes,
        ]  # fmt: skip
        return start(argv)

    @staticmethod
    def contents(root: Path) -> dict[str, str]:
        """Every image and ``meta.csv``: path -> SHA-256."""
        paths = [p for p in root.rglob("*") if p.suffix == ".png" or p.name == "meta.csv"]
        return {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)}


class Training:
    """A tiny training of stage 1 or 3, and the command that runs or resumes it.

    Args:
        folder: where everything goes.
        stage: 1 or 3.
    """

    LENGTH = {1: 24, 3: 8}
    """Optimiser steps, or epochs; each has a row in the metrics."""
    RATES = ("steps_per_second", "images_per_second")

    def __init__(self, folder: Path, stage: int):
        import tiny

        self.folder, self.stage, self.length = folder, stage, self.LENGTH[stage]
        data = ["--dataset", f"folder:{tiny.write_image_folder(folder / 'animals')}", "--report_to", "none"]
        if stage == 1:
            base, script = tiny.write_base(folder / "base"), "train_lora.py"
            flags = f"--max_train_steps {self.length} --logging_steps 1 --train_batch_size 2 --checkpointing_steps 3"
            data += ["--pretrained_model_name_or_path", str(base)]
            flags += " --validation_steps 0 --resume_from_checkpoint latest"
        else:
            script = "tests/saving_every_epoch.py"
            flags = f"--model resnet18 --weights none --res_mode 32 --nepoch {self.length} --lr 0.02 --batch_size 6"
            flags += " --gpu cpu --use_cutmix"
        self.command = [sys.executable, str(ROOT / script), *data, *flags.split()]

    def start(self, out: Path) -> subprocess.Popen:
        """Starts the command, on the CPU."""
        return start([*self.command, "--output_dir", str(out)], CUDA_VISIBLE_DEVICES="")

    def metrics(self, out: Path) -> Path:
        """The file that gets a row for every step or epoch."""
        return out / {1: "metrics.csv", 3: "epochs.csv"}[self.stage]

    def rows(self, out: Path) -> list[list[str]]:
        """The metrics so far, without rates."""
        if not self.metrics(out).exists():
            return []
        with open(self.metrics(out), newline="", encoding="utf-8") as lines:
            header, *rows = list(csv.reader(lines)) or [[]]
        kept = [column for column, name in enumerate(header) if name not in self.RATES]
        return [[row[column] for column in kept if column < len(row)] for row in rows]

    def contents(self, out: Path) -> dict[str, str]:
        """Weights, predictions and scores: name -> SHA-256; and the metrics."""
        paths = [p for p in out.iterdir() if p.suffix in (".safetensors", ".csv") and p != self.metrics(out)]
        hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(paths)}
        return {**hashes, "metrics": repr(self.rows(out))}

    def trial(self, seed: int, wanted: dict[str, str], tally: Counter) -> bool:
        """One run that is stopped up to three times; returns whether the outcome is bit for bit the undisturbed one."""
        rng, out = random.Random(seed), self.folder / f"trial-{seed}"
        for _ in range(rng.randint(1, 3)):
            process, enough = self.start(out), rng.randrange(self.length)
            while process.poll() is None and len(self.rows(out)) < enough:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.3)
            kind = rng.choice(list(SIGNALS))
            if process.poll() is None:
                process.send_signal(SIGNALS[kind])
                tally[kind] += 1
            process.communicate(timeout=900)
        fine = finish(self, out) == wanted
        shutil.rmtree(out)
        return fine


def start(argv: list[str], **environment: str) -> subprocess.Popen:
    """Starts a command in a process group of its own."""
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(argv, cwd=ROOT, env={**os.environ, **environment}, **options)


def put(path: Path, content: bytes | None) -> None:
    """Gives a file this content, at once as copying tools do; None removes it."""
    if content is None:
        path.unlink()
        return
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_bytes(content)
    temporary.replace(path)


def workers_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the sampling processes."""
    try:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    except OSError:
        return []


def disturb(fault: str, process: subprocess.Popen, root: Path, rng: random.Random) -> bool:
    """Does one fault; returns whether it hit something."""
    images = sorted(root.rglob("*.png"))
    if fault == "kill worker":
        workers = workers_of(process)
        for pid in rng.sample(workers, min(len(workers), 1)):
            os.kill(pid, signal.SIGKILL)
        return bool(workers)
    if fault in ("kill parent", "terminate parent", "interrupt parent"):
        number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}[fault.split()[0]]
        alive = process.poll() is None
        with contextlib.suppress(ProcessLookupError):
            # a terminal's Ctrl-C reaches the whole group, the others the parent alone
            os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
        return alive
    for path in rng.sample(images, min(len(images), rng.randint(1, 3))):
        with contextlib.suppress(FileNotFoundError):
            if fault == "delete images":
                path.unlink()
            else:
                content = path.read_bytes()
                path.write_bytes(content[: rng.randrange(len(content))])
    return bool(images)


@contextlib.contextmanager
def small_disk(megabytes: float):
    """A tmpfs of a given size, or None where this user may not mount one."""
    mount = Path(tempfile.mkdtemp(prefix="small-disk-"))
    options = f"size={int(megabytes * 1024)}k"
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", mount], capture_output=True).returncode == 0
    )
    try:
        yield mount if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(mount, ignore_errors=True)


def fill_and_recover(workshop: Workshop, wanted: dict[str, str], rng: random.Random) -> bool | None:
    """Runs on a disk too small for the subset, then makes room; returns whether all came right, None without a mount."""
    need = sum(p.stat().st_size for p in (workshop.folder / "undisturbed").rglob("*") if p.is_file()) / 2**20
    with small_disk(need * 3) as disk:
        if disk is None:
            return None
        ballast = disk / "ballast"
        ballast.write_bytes(b"\0" * int(need * (2.2 + 0.6 * rng.random()) * 2**20))
        process = workshop.start(disk / "out")
        _, err = process.communicate(timeout=600)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        if process.returncode != 2 or len(lines) != 1 or "No space left" not in lines[0]:
            raise AssertionError(f"a full disk ended with status {process.returncode}: {err}")
        ballast.unlink()
        return finish(workshop, disk / "out") == wanted


def finish(workshop: Workshop | Training, root: Path) -> dict[str, str]:
    """Runs the command until it ends well; returns what is there."""
    for _ in range(RESTARTS):
        process = workshop.start(root)
        _, err = process.communicate(timeout=900)
        if process.returncode == 0:
            return workshop.contents(root)
    raise AssertionError(f"did not end well in {RESTARTS} starts: {err}")


def start_and_wait(workshop: Workshop, root: Path, enough: int, rng: random.Random) -> subprocess.Popen:
    """A started command that has made some images, or has ended."""
    process, limit = workshop.start(root), time.monotonic() + 300
    while process.poll() is None and len(list(root.rglob("*.png"))) < enough and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(rng.random() * 0.5)
    return process


def wrong_images(root: Path, wanted: dict[str, str]) -> set[str]:
    """Images that are not the undisturbed run's."""
    return {
        name for name, value in Workshop.contents(root).items() if name.endswith(".png") and wanted.get(name) != value
    }


def change_and_restore(
    workshop: Workshop, root: Path, fault: str, wanted: dict[str, str], rng: random.Random
) -> bool | None:
    """Changes an input of a running command, which is then disturbed or left alone, and of one that is started again.

    Returns:
        Whether all that was made is right and the changed input was refused with one line; None where nothing ran any more.
    """
    damaged = wrong_images(root, wanted)  # by an earlier fault; a run that is refused does not repair them
    process = start_and_wait(workshop, root, rng.randint(0, len(wanted) // 2), rng)
    running = process.poll() is None and (root.exists() and any(root.rglob("config.yaml")))
    restore = workshop.change(fault, rng)
    if rng.random() < 0.6:
        disturb("kill worker", process, root, rng)  # its replacement meets the changed input
    _, first = process.communicate(timeout=900)
    fine = wrong_images(root, wanted) <= damaged
    if process.returncode == 0:  # whatever could meet the change had been read before
        fine &= workshop.contents(root) == wanted
    if running:
        process = workshop.start(root)
        _, second = process.communicate(timeout=900)
        fine &= process.returncode == 2 and "holds a subset made otherwise" in second
        for err in (first, second):
            fine &= len([line for line in err.splitlines() if line.startswith(("error: ", "Traceback"))]) <= 1
        fine &= wrong_images(root, wanted) <= damaged
    else:  # it was changed before the subset was begun: another subset, and a right one
        shutil.rmtree(root, ignore_errors=True)
    restore()
    return fine if running else None


def trial(workshop: Workshop, seed: int, wanted: dict[str, str], tally: Counter) -> bool:
    """One disturbed run; returns whether the outcome is byte for byte the undisturbed one."""
    rng, processes = random.Random(seed), workshop.processes
    chosen = rng.sample(FAULTS, rng.randint(1, 3)) if rng.random() > 0.15 else ["fill disk"]
    chosen += [rng.choice(CHANGES)] if rng.random() < 0.6 and chosen != ["fill disk"] else []
    if chosen == ["fill disk"]:
        fine = fill_and_recover(workshop, wanted, rng)
        if fine is not None:
            tally["fill disk"] += 1
            return fine
        chosen = ["kill parent"]
    root, fine = workshop.folder / f"trial-{seed}", True
    for fault in chosen:
        if fault in CHANGES:
            right = change_and_restore(workshop, root, fault, wanted, rng)
            tally[fault] += right is not None
            fine &= right is not False
            continue
        process = start_and_wait(workshop, root, rng.randint(1, max(1, len(wanted) // 2)), rng)
        if fault == "change processes":
            workshop.processes, hit = rng.choice([n for n in (1, 2, 3) if n != workshop.processes]), True
            process.kill()
        else:
            hit = disturb(fault, process, root, rng)
        tally[fault] += hit
        if (
            fault in ("delete images", "truncate images", "kill worker")
            and rng.random() < 0.5
            and process.poll() is None
        ):
            process.kill()
        process.communicate(timeout=900)
    fine &= finish(workshop, root) == wanted
    workshop.processes = processes
    shutil.rmtree(root)
    return fine


def main() -> int:
    """Runs the trials and prints the tally."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="that is disturbed (default: 2)")
    parser.add_argument("--trials", type=int, default=25, help="disturbed runs (default: 25)")
    parser.add_argument("--seed", type=int, default=0, help="of the first trial (default: 0)")
    parser.add_argument("--images", type=int, default=72, help="images of stage 2's subset (default: 72)")
    parser.add_argument("--processes", type=int, default=2, help="stage 2's sampling processes (default: 2)")
    args = parser.parse_args()
    tally, failed = Counter(), []
    with tempfile.TemporaryDirectory(prefix="fault-test-") as temporary:
        if args.stage == 2:
            workshop = Workshop(Path(temporary), args.images, args.processes)
        else:
            workshop = Training(Path(temporary), args.stage)
        wanted = finish(workshop, workshop.folder / "undisturbed")
        assert len(wanted) >= (args.images + 1 if args.stage == 2 else 3), f"{len(wanted)} files"
        for seed in range(args.seed, args.seed + args.trials):
            fine = trial(workshop, seed, wanted, tally) if args.stage == 2 else workshop.trial(seed, wanted, tally)
            failed += [] if fine else [seed]
            print(f"trial {seed}: {'equal' if fine else 'DIFFERENT'}   faults so far: {dict(tally)}", flush=True)
    summary = {"trials": args.trials, "equal": args.trials - len(failed), "failed_seeds": failed, "faults": dict(tally)}
    (ROOT / "outputs").mkdir(exist_ok=True)
    (ROOT / "outputs" / f"fault_test_stage{args.stage}.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(
        f"{summary['equal']} of {args.trials} disturbed runs ended byte for byte as the undisturbed one; faults: {dict(tally)}"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
