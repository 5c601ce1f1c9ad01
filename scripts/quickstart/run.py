"""The whole job on the embedded default: stage 1, 2 and 3 on ELPV in a few-shot setting, and one report.

Every step is a command a user could type; it is printed before it runs. Steps that are done are not done again, and an
interrupted one resumes from what is on disk.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from semantic_aug import files  # noqa: E402
from semantic_aug.errors import EXIT_INTERRUPTED, UserError, run_main  # noqa: E402
from semantic_aug.evaluation.document import (  # noqa: E402
    Cell,
    Code,
    Heading,
    Items,
    Paragraph,
    Picture,
    Report,
    Table,
    gallery_of,
    link,
    subset_links,
    write,
)
from semantic_aug.evaluation.experiments.results import read_predictions  # noqa: E402
from semantic_aug.evaluation.experiments.statistics import image_interval  # noqa: E402
from semantic_aug.evaluation.quality import gallery  # noqa: E402

BASE = "scripts/quickstart/base"
DATASET = "elpv"
CHECKPOINT, SUBSET = "quickstart", "quickstart_diffmix"
STRENGTHS = (0.3, 0.5, 0.7, 0.9)
CLASSIFIERS = {"real only": (), "real + CutMix": ("--use_cutmix",), "real + Diff-Mix": ("--syndata_key", SUBSET)}


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        folder: under ``outputs``.
        shots: training photographs per class.
        finetune_steps: of stage 1, at ``finetune_batch`` images each.
        finetune_batch: images per step.
        multiplier: synthetic images per photograph.
        steps: solver steps of stage 2.
        epochs: of each classifier; equal, so are its optimisation steps.
        eval_every: epochs between evaluations on validation.
        picture_rows: rows of the report's picture.
    """

    folder: str
    shots: int
    finetune_steps: int
    finetune_batch: int
    multiplier: float
    steps: int
    epochs: int
    eval_every: int
    picture_rows: int


FULL = Size("quickstart", 10, 400, 16, 5, 25, 40, 5, 6)
SMOKE = Size("quickstart_smoke", 2, 6, 4, 1, 4, 2, 2, 2)


class Quickstart:
    """The steps of one size, each with its command, and the times they took.

    Args:
        size: how much of everything.
    """

    def __init__(self, size: Size):
        self.size, self.out = size, Path("outputs") / size.folder
        self.times_file = ROOT / self.out / "times.json"
        self.times: dict[str, dict] = json.loads(self.times_file.read_text()) if self.times_file.exists() else {}

    def commands(self) -> dict[str, list[str]]:
        """Name of a step -> its command."""
        size = self.size
        shared = [
            "--dataset",
            DATASET,
            "--examples_per_class",
            str(size.shots),
            "--config_dir",
            str(self.out / "config"),
        ]
        steps = {
            "finetune": [
                "train_lora.py", *shared, "--pretrained_model_name_or_path", BASE, "--finetune_strategy", "ti_db",
                "--max_train_steps", str(size.finetune_steps), "--train_batch_size", str(size.finetune_batch),
                "--learning_rate", "5e-4", "--ti_learning_rate", "5e-3", "--initializer", "super_class",
                "--checkpointing_steps", "100", "--validation_steps", "0", "--logging_steps", "20", "--report_to", "none",
                "--output_dir", str(self.out / "finetune"), "--register_key", CHECKPOINT,
                "--resume_from_checkpoint", "latest",
            ],
            "sample": [
                "sample_mp.py", *shared, "--finetune_model_key", CHECKPOINT, "--sample_strategy", "diff-mix",
                "--aug_strength", "0.7", "--syn_dataset_multiplier", f"{size.multiplier:g}",
                "--num_inference_steps", str(size.steps), "--output_root", str(self.out / "aug_samples"),
                "--register_key", SUBSET,
            ],
        }  # fmt: skip
        for name, flags in CLASSIFIERS.items():
            steps[name] = [
                "train_cls.py", *shared, "--model", "tf_efficientnet_lite0", "--res_mode", "128", "--nepoch", str(size.epochs),
                "--batch_size", "16", "--eval_every", str(size.eval_every), "--gamma", "0.5", "--synthetic_prob", "0.3",
                "--seed", "2020", "--output_dir", str(self.result_folder(name)), *flags,
            ]  # fmt: skip
        return steps

    def result_folder(self, name: str) -> Path:
        """Where a classifier's results go."""
        return self.out / "classification" / name.replace(" ", "").replace("+", "_")

    def print_headroom(self) -> None:
        """Prints whether more photographs would help at all, before the first step; a failure stops nothing."""
        shots = str(self.size.shots)
        flags = ["--dataset", DATASET, "--examples_per_class", shots, "--pool_per_class", str(4 * self.size.shots)]
        flags += ["--val_examples_per_class", "30", "--output_dir", str(self.out / "headroom")]
        words = [sys.executable, "-m", "semantic_aug.evaluation", "headroom", *flags]
        process = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if process.returncode == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        print(process.stdout.partition("\n")[0], flush=True)

    def run_steps(self) -> None:
        """Runs what is not done yet.

        Raises:
            UserError: a step failed; its own message stands above.
            KeyboardInterrupt: it was interrupted.
        """
        commands = self.commands()
        for position, (name, words) in enumerate(commands.items(), 1):
            entry = self.times.setdefault(name, {"seconds": 0.0, "done": False, "command": words})
            if entry["done"] and entry["command"] == words:
                print(f"[{position}/{len(commands)}] {name}: done before, in {entry['seconds']:.0f} s")
                continue
            print(f"[{position}/{len(commands)}] {name}: python {shlex.join(words)}", flush=True)
            began = time.monotonic()
            process = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL)
            try:
                status = process.wait()
            except KeyboardInterrupt:
                status = process.wait()  # the step got the signal too and makes its work safe
                raise
            finally:
                entry.update(seconds=round(entry["seconds"] + time.monotonic() - began, 1), command=words)
                files.write_json(self.times_file, self.times)
            if status == EXIT_INTERRUPTED:
                raise KeyboardInterrupt
            if status:
                raise UserError(
                    f"step '{name}' ended with status {status}: its message stands above; once that is corrected, the same "
                    "command resumes from here"
                )
            entry["done"] = True
            files.write_json(self.times_file, self.times)

    # ------------------------------------------------------------------------------------------------- the report

    def table(self) -> Table:
        """The comparison; the details of test scores are their intervals over the test photographs."""
        rows = []
        for name in CLASSIFIERS:
            folder = ROOT / self.result_folder(name)
            results = json.loads((folder / "results.json").read_text())
            predictions, cells = read_predictions(folder, "test"), []
            for score in ("top1", "macro"):
                low, high = image_interval(predictions.shares(score), predictions.strata(score))
                detail = (
                    f"95 % interval over {len(predictions.files)} photographs: {100 * low:.1f} to {100 * high:.1f} %"
                )
                cells.append(Cell(f"{100 * results['test'][score]:.1f} %", detail))
            cells += [
                f"{100 * results['val']['top1']:.1f} %",
                str(results["steps"]),
                f"{self.times[name]['seconds']:.0f} s",
            ]
            rows.append([name, *cells])
        return Table(["training data", "test top-1", "test macro", "validation top-1", "steps", "time"], rows)

    @property
    def subset(self) -> Path:
        """The folder of the synthetic images."""
        return next((ROOT / self.out / "aug_samples" / DATASET).glob("*/meta.csv")).parent

    def make_gallery(self) -> None:
        """The gallery of the synthetic images."""
        words = ["--dataset", DATASET, "--examples_per_class", str(self.size.shots), "--syndata_dir", str(self.subset)]
        if gallery.main([*words, "--output_dir", str(gallery_of(self.subset).parent), "--processes", "1"]):
            raise UserError(f"no gallery could be made of {self.subset}")

    def write_report(self) -> Table:
        """Writes ``report.md`` and ``report.html`` (the picture lies beside them); returns the table."""
        table, folder = self.table(), ROOT / self.out
        total = sum(entry["seconds"] for entry in self.times.values())
        runs = [folder / "finetune", *(ROOT / self.result_folder(name) for name in CLASSIFIERS)]
        blocks = [
            table,
            Paragraph(
                "One seed: differences of a few points are within the spread. EfficientNet-Lite0 at 128 px, equal optimisation "
                "steps; the best epoch is validation's, test is evaluated once."
            ),
            Picture("report.png", "translations"),
            Paragraph(
                "Each row: a photograph, and its translations to two other classes at strengths 0.3, 0.5, 0.7, 0.9."
            ),
            Heading("Synthetic images and runs"),
            Items([*subset_links([self.subset], folder), *(link(run.name, run, folder) for run in runs)]),
            Heading(f"Times ({total / 60:.1f} minutes in all)"),
            Table(["step", "seconds"], [[name, f"{entry['seconds']:.0f}"] for name, entry in self.times.items()]),
            Heading("Commands"),
            Code("\n".join(f"python {shlex.join(words)}" for words in self.commands().values())),
        ]
        write(Report(f"ELPV, {self.size.shots} photographs per class", blocks), folder / "report.md")
        return table

    def draw(self) -> None:
        """Writes ``report.png``: photographs and their translations over the strengths."""
        path = ROOT / self.out / "report.png"
        if self.times.get("picture", {}).get("done") and path.exists():
            return
        began = time.monotonic()
        from semantic_aug import console, registry
        from semantic_aug.augmentations.engine import Engine
        from semantic_aug.augmentations.model import ModelFiles, Prompts
        from semantic_aug.datasets import Setting, load_dataset
        from semantic_aug.datasets.images import fit
        from semantic_aug.diffusion.base import find_base, read_geometry
        from semantic_aug.diffusion.schedulers import SolverSettings
        from semantic_aug.pictures import Cell, grid
        from semantic_aug.seeding import task_rng

        console.quiet_libraries()
        data = load_dataset(DATASET, Setting(examples_per_class=self.size.shots))
        checkpoint = registry.checkpoint(DATASET, CHECKPOINT, ROOT / self.out / "config")
        folder = find_base(checkpoint.model_path)
        resolution = read_geometry(folder).native_resolution
        weights = ModelFiles(checkpoint.model_path, folder, checkpoint.lora_path, checkpoint.embed_path)
        classes = Prompts(data.source_names, data.class_names, data.spec.super_class)
        engine = Engine(weights, classes, SolverSettings(num_inference_steps=self.size.steps), resolution)
        half, rows = len(data.class_names) // 2, []
        strengths = [s for s in STRENGTHS if s * self.size.steps >= 1]
        for row in range(self.size.picture_rows):
            label = row * len(data.class_names) // self.size.picture_rows
            index = int((data.train.labels == label).argmax())
            photograph = fit(data.train.image(index), resolution)
            # the other cell type at the same level, and the same type at the opposite level
            targets = [(label + half) % (2 * half), label // half * half + (half - 1 - label % half)]
            moments = engine.encode([photograph]).expand(2 * len(strengths), -1, -1, -1)
            wanted = [target for target in targets for _ in strengths]
            noise = [task_rng(0, row) for _ in wanted]
            from PIL import Image

            made = engine.translate(moments, wanted, strengths * 2, noise)
            cells = [
                Cell(Image.fromarray(image.numpy()), data.class_names[t]) for image, t in zip(made, wanted, strict=True)
            ]
            rows.append([Cell(photograph, data.class_names[label]), *cells])
        titles = ["photograph", *(f"s = {s}" for _ in range(2) for s in strengths)]
        grid(
            rows,
            column_titles=titles,
            title=f"ELPV, {self.size.shots} photographs per class: translations between classes",
        ).save(path)
        self.times["picture"] = {"seconds": round(time.monotonic() - began, 1), "done": True}
        files.write_json(self.times_file, self.times)


def main(argv: list[str] | None = None) -> int:
    """Runs the steps, draws, reports."""
    parser = argparse.ArgumentParser(prog="quickstart.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="tiny counts, to see that everything works")
    parser.add_argument(
        "--skip_headroom", action="store_true", help="do not measure first whether more photographs help"
    )
    args = parser.parse_args(argv)
    quickstart = Quickstart(SMOKE if args.smoke else FULL)
    if not args.skip_headroom:
        quickstart.print_headroom()
    quickstart.run_steps()
    quickstart.draw()
    quickstart.make_gallery()
    table = quickstart.write_report()
    print(f"\n{table.markdown()}\n\nreport: {quickstart.out / 'report.html'} (as text: report.md)")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
