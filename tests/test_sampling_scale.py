"""Stage 2 at scale: shards and merging, Ray, formats, hangs, plans of many tasks."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import psutil
import pytest
import torch
from helpers import (
    ROOT,
    SUBSET,
    planned,
    refused,
    run_here,
    same,
    sampling_arguments,
    start,
    wait_for_images,
    workers_of,
)
from PIL import Image

import sample_mp
import tiny
from semantic_aug import meta_csv
from semantic_aug.augmentations.engine import EncodedPrompts, Engine
from semantic_aug.augmentations.model import ModelFiles, Prompts
from semantic_aug.augmentations.strategies import find
from semantic_aug.cli import RunSettings
from semantic_aug.datasets import load_dataset
from semantic_aug.devices import actors_of
from semantic_aug.diffusion import loop
from semantic_aug.diffusion.base import load_base
from semantic_aug.diffusion.schedulers import SolverSettings
from semantic_aug.diffusion.text import ConditionCache, Conditions
from semantic_aug.errors import Interrupted, UserError
from semantic_aug.sampling import files
from semantic_aug.sampling import folder as store
from semantic_aug.sampling import run as running
from semantic_aug.sampling.config import resolve_placement
from semantic_aug.sampling.folder import Records
from semantic_aug.sampling.job import Job, Task
from semantic_aug.sampling.launcher import Dispatcher, Launcher, Outcome, Worker
from semantic_aug.sampling.liveness import STANDSTILL_SECONDS, Liveness, processor_seconds
from semantic_aug.sampling.plan import PlanSettings, batches_of_shard, make_plan
from semantic_aug.sampling.ray_engine import node_variables
from semantic_aug.sampling.resources import automatic_batch_size
from semantic_aug.sampling.run import timed_tasks
from semantic_aug.sampling.settings import ImageSettings, Placement
from semantic_aug.sampling.sources import BLOCK, SourceImages, SourceMoments
from semantic_aug.sampling.subset import plan_subset
from semantic_aug.sampling.worker import BatchMaker

CLASSES = ("blue jay", "red fox", "toad")


@pytest.fixture
def engine_of(tiny_base):
    """Makes engines over the tiny base model."""

    def make(settings=None, **options) -> Engine:
        names = Prompts(CLASSES, CLASSES, "animal")
        return Engine(
            ModelFiles(str(tiny_base), tiny_base), names, settings or SolverSettings(8), tiny.RESOLUTION, **options
        )

    return make


# ---------------------------------------------------------------------------------------------------------- the engine


@pytest.fixture
def job_of(image_folder, tiny_base, tmp_path):
    """Makes jobs over the tiny base model."""

    def make(**changes) -> Job:
        return helpers.job_of(
            load_dataset(f"folder:{image_folder}"), tmp_path, dataset=f"folder:{image_folder}",
            model=ModelFiles(str(tiny_base), tiny_base), prompts=Prompts(CLASSES, CLASSES), solver=SolverSettings(4),
            images=ImageSettings(resolution=tiny.RESOLUTION), **changes,
        )  # fmt: skip

    return make


def test_a_micro_batch_that_fits_memory_gives_the_same_images(job_of):
    """Where memory runs out the batch continues in halves, and says so."""
    job = job_of()
    tasks = [Task(n, n, n % 3, 0.5, f"{n}.png", {}) for n in range(6)]
    whole, _ = BatchMaker(job, "cpu").pixels(tasks)
    notes = []
    maker = BatchMaker(job, "cpu", notes.append)
    translate = maker.engine.translate

    def small(moments, targets, *rest):
        if len(targets) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return translate(moments, targets, *rest)

    maker.engine.translate = small
    halves, _ = maker.pixels(tasks)
    assert (whole.int() - halves.int()).abs().max() <= 1
    assert notes == [
        f"out of memory with {size} images at once: continuing with {half} (last bits of images may differ from those of "
        "whole batches; --batch_size sets it)"
        for size, half in ((6, 3), (3, 2))
    ]


@torch.library.custom_op("tests::limited_memory", mutates_args=())
def limited_memory(x: torch.Tensor) -> torch.Tensor:
    """A part of a network, opaque to the compiler, that memory does not hold for more than MOST rows."""
    ROWS.append(len(x))
    if len(x) > MOST[0]:
        raise torch.OutOfMemoryError("out of memory")
    return x.clone()


limited_memory.register_fake(torch.empty_like)
ROWS, MOST = [], [0]


@pytest.mark.slow
def test_out_of_memory_with_compiled_networks_halves_what_they_compute(job_of):
    tasks = [Task(n, n, n % 3, 0.5, f"{n}.png", {}) for n in range(4)]
    whole, _ = BatchMaker(job_of(), "cpu").pixels(tasks)
    notes = []
    torch.compiler.reset()  # what another test compiled has no such hook
    maker = BatchMaker(job_of(compiled=True), "cpu", notes.append)
    maker.engine.unet.conv_in.register_forward_pre_hook(lambda _, inputs: limited_memory(inputs[0]))
    ROWS.clear()
    MOST[0] = 2 * 2  # two images, each with guidance
    halves, _ = maker.pixels(tasks)
    assert (whole.int() - halves.int()).abs().max() <= 1
    assert ROWS == [8] + [4] * 4  # the whole batch once; then two halves of two steps each
    assert len(notes) == 1 and "continuing with 2 (networks are compiled for it, last bits" in notes[0]
    ROWS.clear()
    padded, _ = maker.pixels(tasks[:3])  # from then on in halves, the last one padded
    assert ROWS == [4] * 4 and (whole[:3].int() - padded.int()).abs().max() <= 1


def test_sources_are_encoded_in_halves_where_memory_runs_out(engine_of):
    engine = engine_of()
    images = [tiny.picture(i, i, (tiny.RESOLUTION,) * 2) for i in range(8)]
    whole = engine.encode(images)
    engine.vae.encoder.conv_in.register_forward_pre_hook(lambda _, inputs: limited_memory(inputs[0]))
    ROWS.clear()
    MOST[0] = 3
    assert (engine.encode(images) - whole).abs().max() < 1e-4 and ROWS == [8, 4, 2, 2, 2, 2]
    MOST[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        engine.encode(images[:1])


def test_encoded_prompts_are_bounded_and_the_same_bits(tiny_base):
    """27 templates of 40 classes: 1,080 prompts in 17 chunks, of which 3 are held."""
    names = [f"class {k}" for k in range(40)]
    files, templates = ModelFiles(str(tiny_base), tiny_base), [f"{t} photo of a {{}}" for t in range(27)]
    engine = Engine(files, Prompts(names, names, templates=templates), SolverSettings(4), tiny.RESOLUTION)
    whole, row = engine.prompt_embeds, engine.sampler.null_embeds.nbytes
    assert whole.encode is None and whole.whole.nbytes == 1080 * row  # the text encoders are let go
    model, calls = load_base(str(tiny_base)), []

    def encode(prompts):
        calls.append(len(prompts))
        return model.encode(prompts, tiny.RESOLUTION)

    bound = 3 * 64 * row
    bounded = EncodedPrompts(encode, engine.prompts, row, bound)
    assert not calls
    order = np.random.default_rng(0).permutation(1080)
    for first in range(0, 1080, 120):
        rows = order[first : first + 120].tolist()
        assert torch.equal(bounded[rows].hidden, whole[rows].hidden) and bounded.chunk.cache_info().currsize <= 3
    assert set(calls) == {64, 56} and len(calls) <= 9 * 17
    calls.clear()
    bounded[[5, 70, 5, 6]], bounded[[71]]
    assert len(calls) <= 2, "prompts of a chunk that is held are not encoded again"


def test_stage_1_holds_a_bounded_number_of_encoded_prompts():
    row = Conditions(torch.zeros(1, 4, 8))
    cache = ConditionCache(3 * row.nbytes)
    for key in range(10):
        cache.put(key, row)
        cache.get(0)
    assert cache.nbytes == 3 * row.nbytes and [k for k in range(10) if cache.get(k) is not None] == [0, 8, 9]


def test_sources_are_encoded_once_and_shared(engine_of, image_folder, tmp_path):
    table = load_dataset(f"folder:{image_folder}").train
    sources, engine = SourceImages(table, planned(table)), engine_of()
    one = SourceMoments(sources, engine, "tiny", tmp_path, memory=1)  # room for a single block
    rows = list(range(len(table))) * 2
    first, broken = one.batch(rows)
    assert not broken and one.encoded == len(table) and one.block.cache_info().currsize == 1
    two = SourceMoments(sources, engine, "tiny", tmp_path)
    again, _ = two.batch(rows)
    assert two.encoded == 0 and torch.equal(first, again)
    (tmp_path / ".moments" / two.files[0]).write_bytes(b"torn")
    three = SourceMoments(sources, engine, "tiny", tmp_path)
    assert torch.equal(three.batch(rows)[0], first) and three.encoded == BLOCK
    other = SourceMoments(sources, engine, "another resolution", tmp_path)
    assert torch.equal(other.batch(rows)[0], first) and other.encoded == len(table)
    alone = SourceMoments(sources, engine, "tiny", tmp_path / "another subset")
    assert torch.equal(alone.batch([3, 17])[0], first[[3, 17]])


def test_automatic_batch_size_on_the_cpu():
    assert automatic_batch_size(["cpu", "cpu"], 512) == 16


def test_automatic_batch_size_on_the_head_of_a_ray_cluster_with_fewer_gpus_than_actors(monkeypatch):
    """An actor's number says only which actors share a GPU."""
    memory = [20 * 2**30, 12 * 2**30]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(memory))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory[torch.device(device).index], 80 * 2**30))
    for gpu_ids, images in ((["0"], 8), (["0", "0"], 4), (["0", "1", "2", "3"], 4), (["7", "7"], 2)):
        assert automatic_batch_size(actors_of(gpu_ids), 512) == images


@pytest.mark.parametrize("image_format", list(files.FORMATS))
def test_every_format_carries_its_text_and_the_lossless_ones_every_pixel(image_format, tmp_path):
    pixels, text = np.asarray(tiny.picture(2, 1)), {"source": "Größe", "number": "7", "plan": "x"}
    content = files.encode_image(pixels, text, image_format)
    assert content == files.encode_image(pixels.copy(), text, image_format)
    (tmp_path / "x").write_bytes(content)
    with Image.open(tmp_path / "x") as image:
        image.load()
        assert files.text_of(image) == text
        difference = np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels).max()
    assert difference == 0 if image_format != "jpg" else 0 < difference < 60


# ------------------------------------------------------------------------------------------------------ the folder


def small_subset(folder: Path, image_format="png"):
    """A plan of 20 tasks with every file in place."""
    labels = np.arange(10) % 2
    keys = [f"k{i}" for i in range(10)]
    options = {"strengths": (0.5,), "multiplier": 2, "batch_size": 4, "seed": 0}
    plan = make_plan(labels, keys, 2, PlanSettings(strategy=find("diff-mix"), **options))
    paths = files.TaskPaths(plan, ("a b", "c"), ("a-b", "c"), keys, 0, image_format)
    records = Records(folder)
    for number in range(len(plan)):
        path = folder / store.DATA / paths.relative(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = files.encode_image(np.full((8, 8, 3), number, np.uint8), paths.text(number), image_format)
        records.append([(number, *files.write_image(path, content))])
    return plan, paths, records


@pytest.mark.parametrize("image_format", list(files.FORMATS))
def test_a_restart_trusts_only_what_it_can_verify(tmp_path, image_format):
    plan, paths, records = small_subset(tmp_path, image_format)
    everything = np.ones(len(plan), bool)
    at = lambda number: tmp_path / store.DATA / paths.relative(number)  # noqa: E731
    at(0).unlink()  # missing
    at(1).write_bytes(at(1).read_bytes()[:-3])  # truncated
    at(2).write_bytes(at(3).read_bytes())  # another task's image
    for suffix in files.TEMPORARY_SUFFIXES:
        (at(4).parent / f".{at(4).name}.99{suffix}").write_bytes(b"half")
    (at(4).parent / "notes.txt").write_text("a user's own file")
    done = store.finished_tasks(tmp_path, paths, records, everything)
    size_equal = at(2).exists()  # (a swapped image of equal size passes the quick check)
    assert np.flatnonzero(~done).tolist() == ([0, 1] if size_equal else [0, 1, 2])
    assert not list(tmp_path.rglob(".*.99.*")) and (at(4).parent / "notes.txt").exists() and not at(1).exists()
    done = store.finished_tasks(tmp_path, paths, records, everything, content=True)
    assert np.flatnonzero(~done).tolist() == [0, 1, 2]
    # what is struck out is not listed, whoever writes the table
    assert store.write_meta(tmp_path, paths, np.zeros(len(plan), bool)) == 17


def test_files_without_a_record_are_adopted_if_right(tmp_path):
    plan, paths, records = small_subset(tmp_path)
    records.path.unlink()
    stranger = tmp_path / store.DATA / paths.relative(3)
    Image.new("RGB", (8, 8)).save(stranger)  # right name, but not this plan's image
    cut = tmp_path / store.DATA / paths.relative(5)
    cut.write_bytes(cut.read_bytes()[:-3])  # decodes, yet is not what was written
    done = store.finished_tasks(tmp_path, paths, records, np.ones(len(plan), bool))
    assert np.flatnonzero(~done).tolist() == [3, 5] and not stranger.exists() and not cut.exists()
    assert np.flatnonzero(Records.latest(tmp_path, 20)[0]).tolist() == [n for n in range(20) if n not in (3, 5)]


def test_a_damaged_file_without_a_record_is_removed_whatever_its_decoder_raises(tmp_path):
    plan, paths, records = small_subset(tmp_path, "webp")
    records.path.unlink()
    damaged = tmp_path / store.DATA / paths.relative(5)
    content = damaged.read_bytes()
    assert content[12:16] == b"VP8X"
    damaged.write_bytes(content[:24] + b"\xff\xff\x0f" * 2 + content[30:])  # a canvas of a million by a million pixels
    with pytest.raises(Image.DecompressionBombError):
        Image.open(damaged)
    done = store.finished_tasks(tmp_path, paths, records, np.ones(len(plan), bool))
    assert np.flatnonzero(~done).tolist() == [5] and not damaged.exists()


def test_another_shards_files_are_only_looked_at(tmp_path):
    plan, paths, records = small_subset(tmp_path)
    mine = np.arange(len(plan)) < 10
    theirs = tmp_path / store.DATA / paths.relative(15)
    theirs.write_bytes(b"being written")
    store.finished_tasks(tmp_path, paths, records, mine)
    assert theirs.read_bytes() == b"being written"


@pytest.mark.slow
def test_planning_and_restarting_do_not_grow_faster_than_the_tasks(tmp_path):
    """The full measurement, up to ten million tasks, is scripts/bench.py plans."""
    labels, keys = np.arange(20_000) % 100, [f"{i:07d}" for i in range(20_000)]
    seconds = []
    for multiplier in (5, 50):
        began = time.perf_counter()
        options = {"strengths": (0.3, 0.5, 0.7, 0.9), "multiplier": multiplier, "batch_size": 64, "seed": 0}
        plan = make_plan(labels, keys, 100, PlanSettings(strategy=find("diff-mix"), **options))
        seconds.append(time.perf_counter() - began)
        assert len(plan) == 20_000 * multiplier and (plan.source_class != plan.target).all()
        assert sum(a.nbytes for a in (plan.source, plan.source_class, plan.target, plan.strength_code)) == 13 * len(
            plan
        )
    assert seconds[1] < 40 * seconds[0] + 1


# ---------------------------------------------------------------------------------------------- shards, Ray, hangs


@pytest.mark.slow
def test_five_shards_some_at_once_and_merged(workshop, image_folder, tmp_path, undisturbed):
    argv = sampling_arguments(workshop, image_folder, tmp_path)
    together = [start("sample_mp.py", *argv, "--num_shards", "5", "--shard_index", str(i)) for i in (0, 3)]
    for process in together:
        process.communicate(timeout=600)
        assert process.returncode == 0
    line = refused("sample_mp.py", *argv, "--merge")
    assert "images exist and are listed in meta.csv" in line and "run the shards again" in line
    for index in (1, 2, 4):
        run_here("sample_mp.py", *argv, "--num_shards", "5", "--shard_index", str(index))
    assert "all 54 images exist" in run_here("sample_mp.py", *argv, "--merge", "--verify", "content")
    assert same(tmp_path / SUBSET, undisturbed) and not (tmp_path / SUBSET / ".moments").exists()


@pytest.mark.slow
def test_of_two_runs_started_at_once_one_goes_on(workshop, image_folder, tmp_path, undisturbed):
    argv = sampling_arguments(workshop, image_folder, tmp_path)
    both = [start("sample_mp.py", *argv) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes == [0, 2], outputs
    refusal = next(err for process, (_, err) in zip(both, outputs) if process.returncode == 2)
    assert "is being written by another run (process" in refusal
    assert same(tmp_path / SUBSET, undisturbed)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_images")
def test_a_process_that_stands_still_is_replaced(workshop, image_folder, tmp_path, undisturbed):
    def stop():
        wait_for_images(tmp_path, 3)
        os.kill(workers_of()[0], signal.SIGSTOP)

    argv = sampling_arguments(workshop, image_folder, tmp_path, worker_timeout=3)
    assert "is replaced: silent for" in run_here("sample_mp.py", *argv, meanwhile=stop)
    assert same(tmp_path / SUBSET, undisturbed)


@pytest.mark.slow
def test_a_batch_slower_than_the_limit_of_silence_goes_on_as_long_as_it_works(workshop, image_folder, tmp_path):
    """The first batch of a large model on a CPU takes hours; here hundreds of steps against a limit of two seconds."""
    argv = sampling_arguments(
        workshop, image_folder, tmp_path, syn_dataset_multiplier=0.4, num_inference_steps=700, worker_timeout=2
    )
    process = start("sample_mp.py", *argv)
    wait_for_images(tmp_path, 1, process)
    written = time.monotonic()
    os.killpg(process.pid, signal.SIGSTOP)  # Ctrl-Z: what nobody could hear is nobody's silence
    time.sleep(STANDSTILL_SECONDS + 1)
    os.killpg(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "replaced" not in err and "set aside" not in err, err
    assert time.monotonic() - written > STANDSTILL_SECONDS + 1 + 2, (
        "the batch was not slower than the limit: give it more steps"
    )


def test_signs_of_life_are_messages_steps_and_processor_time():
    busy = "while True: pass"
    idle = "import time\nwhile True: time.sleep(0.01)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {busy!r}])"  # it waits for a compiler
    processes = [
        subprocess.Popen([sys.executable, "-c", code], start_new_session=True) for code in (busy, idle, parent)
    ]
    lives = [Liveness(gpu=False) for _ in processes]
    try:
        time.sleep(1)  # starting takes processor time
        until = time.monotonic() + 4
        while time.monotonic() < until:
            for life, process in zip(lives, processes, strict=True):
                life.observe(processor_seconds(process.pid))
            time.sleep(0.25)
        assert [life.failure(3) is None for life in lives] == [True, False, True]
        os.kill(processes[0].pid, signal.SIGSTOP)
        lives[0].observe(processor_seconds(processes[0].pid))
        lives[1].hear()
        lives[2].observe(None, steps=1)
        time.sleep(1.5)
        lives[0].observe(processor_seconds(processes[0].pid))
        assert [life.failure(1) is None for life in lives] == [False, False, False]
        assert [life.failure(60) for life in lives] == [None, None, None]
        lives[1].skip(1.5)
        assert lives[1].failure(1) is None
    finally:
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_a_gpu_that_hangs_is_found_although_waiting_for_it_takes_processor_time():
    life, cpu = Liveness(gpu=True), Liveness(gpu=False)
    for one in (life, cpu):
        one.skip(-2000)  # as if they had been silent for 2,000 s
        one.observe(1.0)
        one.observe(1000.0)
    assert life.failure(300).startswith("without a step for 2000 s") and cpu.failure(300) is None


def test_a_run_in_which_every_attempt_fails_ends_and_one_with_a_finished_batch_goes_on():
    dispatcher = Dispatcher(None, None, lambda rows: None, 1000, 0)
    for attempt in range(100):  # each fails at another batch, but every tenth process finishes one
        dispatcher.give_back([attempt, attempt + 1], attempt, "a driver fails")
        if attempt % 10 == 9:
            dispatcher.take("worker", [(attempt, 1, 1)], {})
    with pytest.raises(UserError, match="20 attempts at a batch failed in a row.*a driver fails"):
        for attempt in range(100, 121):
            dispatcher.give_back([attempt], attempt, "a driver fails")
    assert attempt == 119 and not dispatcher.outcome.set_aside


def test_processes_that_do_not_start_end_a_run_only_where_none_starts_between(caplog):
    dispatcher = Dispatcher(None, None, lambda rows: None, 1000, 0)
    dispatcher.job = SimpleNamespace(folder=Path("subset"))
    for _ in range(5):
        dispatcher.failed_to_start("cuda:0", "out of memory")
        dispatcher.failed_to_start("cuda:0", "out of memory")
        dispatcher.started()
    dispatcher.bar.close()
    with pytest.raises(UserError, match="could not start, 3 times .out of memory"):
        for _ in range(3):
            dispatcher.failed_to_start("cuda:0", "out of memory")


@pytest.mark.slow
def test_a_batch_that_hangs_three_times_is_set_aside_and_named(workshop, tmp_path):
    # sources are encoded in blocks of eight: whatever starts from a blue jay waits for the one that is never read, which
    # under this seed is the first of two batches
    folder = tiny.write_image_folder(tmp_path / "animals", ["blue jay"], train=8)
    tiny.write_image_folder(folder, ["red fox", "toad"], train=16)
    few = {"syn_dataset_multiplier": 0.15, "batch_size": 3, "seed": 10}
    process = start(
        "tests/hanging_sampling.py", *sampling_arguments(workshop, folder, tmp_path / "out", worker_timeout=3, **few)
    )
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2 and "is set aside (silent for" in err and "1 batches failed three times" in err
    table = meta_csv.read(next((tmp_path / "out").rglob("meta.csv")))
    assert len(table) == 3 and "blue jay" not in {table.class_names[source] for source in table.source}


@pytest.mark.slow
def test_calibration_says_how_long_and_writes_nothing(workshop, image_folder, tmp_path):
    argv = sampling_arguments(workshop, image_folder, tmp_path / "out", num_shards=3, shard_index=0)
    out = run_here("sample_mp.py", *argv, "--dry_run", "--calibrate")
    assert "images/s with 1 process(es), saving included" in out and "one of 3 shard(s)" in out
    assert not (tmp_path / "out").exists()


def test_calibration_encodes_new_sources_as_often_as_the_whole_plan(workshop, image_folder, tmp_path):
    argv = sampling_arguments(workshop, image_folder, tmp_path / "out", syn_dataset_multiplier=20)
    subset = plan_subset(*sample_mp.resolve(sample_mp.build_parser().parse_args([str(word) for word in argv])))
    tasks = timed_tasks(subset)
    sources = [task.source for batch in batches_of_shard(subset.plan, 1, 0, 0).tolist() for task in tasks(batch)]
    assert len(sources) == 360 and sources == np.repeat(range(18), 20).tolist()


def test_an_interruption_does_not_end_a_process_while_it_loads():
    launcher = Launcher(None, None, None, 1, 0)
    worker = launcher._start("cpu")
    try:
        blocked = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{worker.process.pid}/status").read_text())[1]
        assert int(blocked, 16) >> (signal.SIGINT - 1) & 1
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        launcher._kill(worker)


class _Loading(Dispatcher):
    """An engine of two processes without networks, of which the second loads while the first could make five batches."""

    AHEAD = 3

    def _start(self, device):
        return Worker(device=device, life=Liveness(gpu=False))

    def _send(self, worker, batch):
        worker.current = batch

    def _receive(self):
        self.rounds = getattr(self, "rounds", 0) + 1
        for worker, round_loaded in zip(self.workers, (1, 6), strict=True):
            worker.ready = self.rounds >= round_loaded
            if worker.held:
                batch = worker.held.popleft()
                self.take(worker.device, [(batch, 1, 1)], {})

    def _observe(self, worker, limit):
        pass

    def _kill(self, worker):
        pass


@pytest.mark.parametrize("together", [False, True])
def test_processes_that_are_timed_together_begin_when_all_have_loaded(together, tmp_path):
    placement = Placement(devices=("cpu", "another cpu"))
    job = SimpleNamespace(config=SimpleNamespace(placement=placement), folder=tmp_path)
    engine = _Loading(job, lambda batch: [], lambda rows: None, 8, 0)
    engine.together = together
    engine.run(range(8))
    shares = {device: len(marks) for device, marks in engine.marks.items()}
    assert shares == ({"cpu": 4, "another cpu": 4} if together else {"cpu": 8})


@pytest.mark.parametrize(
    ("outcome", "error", "line"),
    [
        (Outcome(interrupted=True), Interrupted, "interrupted: nothing was measured"),
        (Outcome(set_aside={7: "no memory"}), UserError, "nothing was measured: 1 batches failed three times, batch 7"),
    ],
)
def test_a_calibration_that_measured_nothing_does_not_say_that_the_whole_is_done_in_moments(
    workshop, image_folder, tmp_path, monkeypatch, outcome, error, line
):
    argv = sampling_arguments(workshop, image_folder, tmp_path / "out")
    subset = plan_subset(*sample_mp.resolve(sample_mp.build_parser().parse_args([str(word) for word in argv])))
    monkeypatch.setattr(running, "make_launcher", lambda *_: SimpleNamespace(run=lambda batches: outcome))
    with pytest.raises(error, match=line):
        running.calibrate(subset)


@pytest.mark.slow
@pytest.mark.usefixtures("slow_images")
def test_ray_makes_the_same_files_and_survives_a_killed_and_a_stopped_actor(
    workshop, image_folder, tmp_path, undisturbed
):
    pytest.importorskip("ray")
    argv = sampling_arguments(workshop, image_folder, tmp_path, engine="ray", worker_timeout=5)
    mark = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "OF_THIS_TEST": str(tmp_path)}
    process = start("sample_mp.py", *argv, env=mark)
    for number, images in ((signal.SIGKILL, 4), (signal.SIGSTOP, 16)):
        wait_for_images(tmp_path, images, process)
        actors = [p for p in psutil.process_iter(["cmdline"]) if "ray::ImageActor" in " ".join(p.info["cmdline"] or [])]
        actors = [p for p in actors if p.environ().get("OF_THIS_TEST") == str(tmp_path)]
        assert len(actors) == 1
        actors[0].send_signal(number)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0 and err.count("a sampling process on cpu is replaced") == 2, err
    assert "its process or node ended" in err and "silent for" in err, err
    assert same(tmp_path / SUBSET, undisturbed)


@pytest.mark.slow
def test_disturbed_runs_end_as_the_undisturbed_one():
    """The trial that fills the disk; the long version is python scripts/fault_test.py --trials 25."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "fault_test.py"), "--trials", "1", "--seed", "100", "--images", "36"],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 disturbed runs ended byte for byte as the undisturbed one" in done.stdout


def test_actors_of_ray_find_the_data_sets_that_variables_of_this_process_name(monkeypatch, tmp_path):
    """A node has the variables of the shell that it was started in, and another working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUB_ROOT", "downloads/cub")
    monkeypatch.setenv("SIGNS_ROOT", "/data/signs")
    run = RunSettings()
    for dataset, pool, names in (
        ("cub", "dataset:signs", ("CUB_ROOT", "SIGNS_ROOT")),
        ("folder:/data/cells", None, ()),
    ):
        config = SimpleNamespace(dataset=dataset, images=SimpleNamespace(unlabelled=pool), run=run)
        known = {"CUB_ROOT": str(tmp_path / "downloads" / "cub"), "SIGNS_ROOT": "/data/signs"}
        assert node_variables(config) == {"PYTHONPATH": str(ROOT), **{name: known[name] for name in names}}


def test_without_ray_a_dry_run_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--engine ray needs the package ray: pip install"):
        resolve_placement(Placement(engine="ray"))


def test_loop_module_is_what_every_strategy_uses():
    import inspect

    from semantic_aug.augmentations import engine

    assert engine.translate is loop.translate and engine.generate is loop.generate
    assert "diffusers" not in inspect.getsource(engine)


def test_the_steady_rate_counts_the_images_of_the_time_it_spans():
    launcher = Dispatcher(None, None, None, 0, 0)
    # five batches of 8 take ten seconds each; each but the last is reported when the next is computed
    launcher.marks = {"a": [(20.0, 8), (30.0, 8), (40.0, 8), (50.0, 8), (50.1, 8)]}
    assert launcher.steady_rate() == pytest.approx(0.8)
    launcher.marks["b"] = [(20.0, 8), (30.0, 8), (30.0, 8)]  # it had a batch less to do
    assert launcher.steady_rate() == pytest.approx(1.6)
    launcher.marks["b"] = [(20.0, 8), (20.1, 8)]
    assert launcher.steady_rate() == 0.0
