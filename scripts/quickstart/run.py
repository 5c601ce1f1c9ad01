"""All three stages on an embedded base model, in a few-shot setting, and one report.

Every step is a command that a user could type, and is printed before it runs. Finished steps are not repeated, and an
interrupted one resumes from its files.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from tasks import SMOKE, SUBSET, TASKS, Task  # noqa: E402

from semantic_aug import cli, files  # noqa: E402
from semantic_aug.datasets import catalog, download  # noqa: E402
from semantic_aug.errors import EXIT_INTERRUPTED, UserError, run_main  # noqa: E402
from semantic_aug.evaluation.document import (  # noqa: E402
    Cell,
    Report,
    Table,
    code,
    gallery_of,
    items,
    link,
    subset_links,
    write,
)
from semantic_aug.evaluation.experiments.results import read_predictions  # noqa: E402
from semantic_aug.evaluation.experiments.statistics import image_interval  # noqa: E402
from semantic_aug.evaluation.quality import gallery  # noqa: E402

CHECKPOINT = "quickstart"
RESULTS = {"train_lora.py": "summary.json", "train_cls.py": "results.json"}
"""The file that marks a finished run in its output folder."""


class Quickstart:
    """The steps of a task, each with its command, and the times they took.

    Args:
        task: data set, base model and settings.
        smoke: tiny counts, into a folder of their own.
    """

    def __init__(self, task: Task, smoke: bool = False):
        self.task, self.size = task, SMOKE if smoke else task.size
        self.out = Path("outputs") / (f"{task.folder}_smoke" if smoke else task.folder)
        self.times_file = ROOT / self.out / "times.json"
        self.times: dict[str, dict] = files.read_json(self.times_file) or {}

    @property
    def title(self) -> str:
        """Of the report and its picture."""
        return f"{self.task.title}, {self.size.shots} photographs per class"

    @property
    def data(self) -> list[str]:
        """Flags that name the data set and its few-shot draw."""
        flags = {"dataset": self.task.dataset, "examples_per_class": self.size.shots, **self.task.setting}
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def commands(self) -> dict[str, list[str]]:
        """Name of a step -> its command."""
        task, size = self.task, self.size
        shared = [*self.data, "--config_dir", str(self.out / "config")]
        steps = {
            "finetune": [
                "train_lora.py", *shared, "--pretrained_model_name_or_path", task.base, "--finetune_strategy", "ti_db",
                "--max_train_steps", str(size.finetune_steps), "--train_batch_size", str(size.finetune_batch), *task.finetune,
                "--checkpointing_steps", "100", "--validation_steps", "0", "--logging_steps", "20", "--report_to", "none",
                "--output_dir", str(self.out / "finetune"), "--register_key", CHECKPOINT,
                "--resume_from_checkpoint", "latest",
            ],
        }  # fmt: skip
        real = {name: flags for name, flags in task.methods.items() if "--syndata_key" not in flags}
        steps |= {name: self.classify(name, flags, shared) for name, flags in real.items()}
        steps["sample"] = [
            "sample_mp.py", *shared, "--finetune_model_key", CHECKPOINT,
            *(str(self.result_folder(word)) if word in real else word for word in task.sample),
            "--syn_dataset_multiplier", f"{size.multiplier:g}", "--num_inference_steps", str(size.steps),
            "--output_root", str(self.out / "aug_samples"), "--register_key", SUBSET,
        ]  # fmt: skip
        synthetic = {name: flags for name, flags in task.methods.items() if name not in real}
        steps |= {name: self.classify(name, flags, shared) for name, flags in synthetic.items()}
        return steps

    def classify(self, name: str, flags: Sequence[str], shared: Sequence[str]) -> list[str]:
        """The command of one classifier."""
        budget = ["--nepoch", str(self.size.epochs), "--eval_every", str(self.size.eval_every)]
        output = ["--output_dir", str(self.result_folder(name))]
        return ["train_cls.py", *shared, *self.task.classifier, *budget, *output, *flags]

    def result_folder(self, name: str) -> Path:
        """Where a classifier's results go."""
        return self.out / "classification" / name.replace(" ", "").replace("+", "_")

    def fetch(self) -> None:
        """Downloads the photographs where they are neither named by a variable nor fetched before. Raises UserError: no
        network."""
        spec = catalog.find_spec(self.task.dataset)
        if spec.archive and not os.environ.get(spec.variables[0]):
            os.environ[spec.variables[0]] = str(download.download_official(spec, ROOT / download.ROOT))

    def headroom(self) -> list[str]:
        """The command that measures whether more photographs would help at all."""
        flags = ["--dataset", self.task.dataset, "--examples_per_class", str(self.size.shots)]
        flags += ["--pool_per_class", str(4 * self.size.shots), "--val_examples_per_class", "30"]
        return ["-m", "semantic_aug.evaluation", "headroom", *flags, "--output_dir", str(self.out / "headroom")]

    def print_headroom(self) -> None:
        """Prints the headroom, before the first step; a failure stops nothing."""
        process = subprocess.run([sys.executable, *self.headroom()], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        if process.returncode == EXIT_INTERRUPTED:
            raise KeyboardInterrupt
        print(process.stdout.partition("\n")[0], flush=True)

    def has_result(self, argv: Sequence[str]) -> bool:
        """Whether the result of a command exists and is whole; it may have been removed or damaged since it was run."""
        if argv[0] not in RESULTS:
            return bool(self.subsets)
        return files.read_json(ROOT / argv[argv.index("--output_dir") + 1] / RESULTS[argv[0]]) is not None

    def run_steps(self) -> None:
        """Runs what is not done yet.

        Raises:
            UserError: a step failed; its own message stands above.
            KeyboardInterrupt: it was interrupted.
        """
        commands = self.commands()
        for position, (name, argv) in enumerate(commands.items(), 1):
            entry = self.times.setdefault(name, {"seconds": 0.0, "done": False, "command": argv})
            if entry["done"] and entry["command"] == argv and self.has_result(argv):
                print(f"[{position}/{len(commands)}] {name}: done before, in {entry['seconds']:.0f} s")
                continue
            if entry["done"]:  # a step that is run again counts once
                entry.update(seconds=0.0, done=False)
            print(f"[{position}/{len(commands)}] {name}: python {shlex.join(argv)}", flush=True)
            began = time.monotonic()
            process = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL)
            try:
                status = process.wait()
            except KeyboardInterrupt:
                status = process.wait()  # the step received the signal too and saves its work
                raise
            finally:
                entry.update(seconds=round(entry["seconds"] + time.monotonic() - began, 1), command=argv)
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
        for name in self.task.methods:
            folder = ROOT / self.result_folder(name)
            results = json.loads((folder / "results.json").read_text())
            predictions, cells = read_predictions(folder, "test"), []
            for score in ("top1", "macro"):
                low, high = (100 * end for end in image_interval(predictions.shares(score), predictions.strata(score)))
                detail = f"95 % interval over {len(predictions.files)} photographs: {low:.1f} to {high:.1f} %"
                cells.append(Cell(f"{100 * results['test'][score]:.1f} %", detail))
            validation, seconds = f"{100 * results['val']['top1']:.1f} %", f"{self.times[name]['seconds']:.0f} s"
            rows.append([name, *cells, validation, str(results["steps"]), seconds])
        return Table(["training data", "test top-1", "test macro", "validation top-1", "steps", "time"], rows)

    def differences(self) -> str:
        """The change of test macro by synthetic images, one sentence for each method that has them."""
        runs = {name: read_predictions(ROOT / self.result_folder(name), "test") for name in self.task.methods}
        synthetic, sentences = [name for name in runs if "--syndata_key" in self.task.methods[name]], []
        for name in synthetic:
            parts = []
            for other in (other for other in runs if other not in synthetic):
                gain = runs[name].shares("macro") - runs[other].shares("macro")
                low, high = image_interval(gain, runs[name].strata("macro"))
                parts.append(f"{100 * gain.sum():+.1f} [{100 * low:.1f}, {100 * high:.1f}] to {other}")
            sentences.append(f"Test macro of {name}, in points: {', '.join(parts)}.")
        return " ".join([*sentences, "The 95 % intervals are for other test photographs, not for other seeds."])

    @property
    def subsets(self) -> list[Path]:
        """The folders of the synthetic images."""
        return sorted(path.parent for path in (ROOT / self.out / "aug_samples" / self.task.dataset).glob("*/meta.csv"))

    def make_galleries(self) -> None:
        """The gallery of each synthetic subset."""
        for subset in self.subsets:
            output = gallery_of(subset).parent
            argv = [*self.data, "--syndata_dir", str(subset), "--output_dir", str(output), "--processes", "1"]
            if gallery.main(argv):
                raise UserError(f"no gallery could be made of {subset}")

    def write_report(self) -> Table:
        """Writes ``report.md`` and ``report.html`` (the picture lies beside them); returns the table."""
        table, folder = self.table(), ROOT / self.out
        strengths = ", ".join(map(str, self.task.strengths))
        total = sum(entry["seconds"] for entry in self.times.values())
        runs = [folder / "finetune", *(ROOT / self.result_folder(name) for name in self.task.methods)]
        blocks = [
            table,
            self.differences(),
            (
                f"One seed: differences of a few points are within the spread. {self.task.note}, equal optimisation "
                "steps; the best epoch is validation's, test is evaluated once."
            ),
            "![translations](report.png)",
            f"Each row: a photograph, and its translations to two other classes at strengths {strengths}.",
            "## Synthetic images and runs",
            items([*subset_links(self.subsets, folder), *(link(run.name, run, folder) for run in runs)]),
            f"## Times ({total / 60:.1f} minutes in all)",
            Table(["step", "seconds"], [[name, f"{entry['seconds']:.0f}"] for name, entry in self.times.items()]),
            "## Commands",
            code("\n".join(f"python {shlex.join(argv)}" for argv in self.commands().values())),
        ]
        write(Report(self.title, blocks), folder / "report.md")
        return table

    def draw(self) -> None:
        """Writes ``report.png``: photographs and their translations over the strengths."""
        path, finetuned_by = ROOT / self.out / "report.png", self.commands()["finetune"]
        if self.times.get("picture", {}).get("command") == finetuned_by and path.exists():
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
        task = self.task
        data = load_dataset(task.dataset, Setting(examples_per_class=self.size.shots, **task.setting))
        checkpoint = registry.checkpoint(task.dataset, CHECKPOINT, ROOT / self.out / "config")
        folder = find_base(checkpoint.model_path)
        resolution = read_geometry(folder).native_resolution
        weights = ModelFiles(checkpoint.model_path, folder, checkpoint.lora_path, checkpoint.embed_path)
        classes = Prompts(data.source_names, data.class_names, data.spec.super_class)
        engine = Engine(weights, classes, SolverSettings(num_inference_steps=self.size.steps), resolution)
        count, rows = len(data.class_names), []
        strengths = [s for s in task.strengths if s * self.size.steps >= 1]
        for row in range(self.size.picture_rows):
            label = row * count // self.size.picture_rows
            index = int((data.train.labels == label).argmax())
            photograph = fit(data.train.image(index), resolution)
            moments = engine.encode([photograph]).expand(2 * len(strengths), -1, -1, -1)
            wanted = [target for target in task.targets(label, count) for _ in strengths]
            created = engine.translate(moments, wanted, strengths * 2, [task_rng(0, row) for _ in wanted])
            pictures = [photograph, *(Image.fromarray(image.numpy()) for image in created)]
            names = [data.class_names[shown] for shown in (label, *wanted)]
            rows.append(list(map(Cell, pictures, names)))
        titles = ["photograph", *(f"s = {s}" for _ in range(2) for s in strengths)]
        grid(rows, column_titles=titles, title=f"{self.title}: translations between classes").save(path)
        seconds = round(time.monotonic() - began, 1)
        self.times["picture"] = {"seconds": seconds, "done": True, "command": finetuned_by}
        files.write_json(self.times_file, self.times)


def main(argv: list[str] | None = None) -> int:
    """Runs the steps, draws, reports."""
    parser = cli.PlainParser(prog="quickstart.sh", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="elpv",
        help="elpv: photographs of solar cells, which install with a package; signs: photographs of hands, downloaded (16 MB) "
        "where SIGNS_ROOT does not name a copy (default: elpv)",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny counts, to see that everything works")
    parser.add_argument(
        "--skip_headroom", action="store_true", help="do not measure first whether more photographs help"
    )
    args = parser.parse_args(argv)
    quickstart = Quickstart(TASKS[args.task], args.smoke)
    quickstart.fetch()
    if not args.skip_headroom:
        quickstart.print_headroom()
    quickstart.run_steps()
    quickstart.draw()
    quickstart.make_galleries()
    table = quickstart.write_report()
    print(f"\n{table.markdown()}\n\nreport: {quickstart.out / 'report.html'} (as text: report.md)")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
