"""Data sets at a glance: ``python -m semantic_aug.datasets list | info NAME | get NAME | check NAME``.

``check`` exits with status 0 where nothing is wrong, 1 where something is, and 2 where the data set cannot be read at all.
"""

import argparse
import sys
from pathlib import Path

from semantic_aug import cli, console, files, registry
from semantic_aug.datasets import catalog, download
from semantic_aug.datasets.readers.notes import collected
from semantic_aug.errors import UserError, WouldDownload, no_downloads, run_main

OUTPUT = Path("outputs/check")
SHOWN = 5
"""Cases of each kind named on the terminal."""
WORD = "a registered name, a name of datasets.yaml, or folder:PATH, csv:PATH, hf:ID"


def build_parser() -> argparse.ArgumentParser:
    """The three commands and their flags."""
    parser = cli.PlainParser(prog="python -m semantic_aug.datasets", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--config_dir",
        type=registry.config_folder,
        default=str(registry.CONFIG_DIR),
        help="folder of the registry files",
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=cli.PlainParser)
    commands.add_parser("list", help="the data sets there are")
    info = commands.add_parser("info", help="what one is, its license, and how to get it")
    info.add_argument("name", metavar="NAME", help=WORD)
    get = commands.add_parser("get", help="download a data set, or say where to get it and which variable to set")
    get.add_argument("name", metavar="NAME", help=WORD)
    get.add_argument(
        "--root",
        type=registry.typed_path,
        metavar="DIR",
        help=f"folder for official archives (default: {download.ROOT})",
    )
    check = commands.add_parser("check", help="opens every image; counts, broken images, duplicates, leaks, odd images")
    check.add_argument("name", metavar="NAME", help=WORD)
    check.add_argument(
        "--output_dir", type=registry.typed_path, default=OUTPUT, help=f"of the sheet and the JSON (default: {OUTPUT})"
    )
    check.add_argument("--strict", action="store_true", help="warnings fail the check too")
    check.add_argument("--workers", type=int, default=None, metavar="N", help="threads (default: one per core)")
    return parser


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")


def show_list(config_dir: Path) -> int:
    """Names, super-classes and where each comes from."""
    for name in catalog.known_names(config_dir):
        spec = catalog.find_spec(name, config_dir)
        source = ", ".join((*spec.variables[:1], *spec.hub[:1])) or ("package" if spec.about else registry.DATASETS)
        first = spec.about.split("\n")[0] if spec.about else ""
        _say(f"{name:<11} {spec.super_class or '-':<11} {source}" + (f"\n{'':<11} {first}" if first else ""))
    _say("", "One's own: --dataset folder:PATH | csv:PATH | hf:ID, or an entry of config/datasets.yaml")
    return 0


def show_info(word: str, config_dir: Path) -> int:
    """Everything a spec says, and the counts where the data can be read."""
    spec = catalog.find_spec(word, config_dir)
    rows = {
        "name": spec.name,
        "super-class": spec.super_class or "(none)",
        "license": spec.license,
        "citation": spec.citation,
        "homepage": spec.homepage,
        "hub": ", ".join(spec.hub),
        "local copies": ", ".join(spec.variables),
        "read from": "the official download, else copies of the hub's files, else the hub"
        if spec.variables[1:]
        else "",
        "groups": ", ".join(spec.group_names),
    }
    _say(*(f"{name:<13} {value}" for name, value in rows.items() if value))
    if spec.about:
        _say("", spec.about.strip())
    try:
        with no_downloads(True):
            _say("", catalog.load_dataset(word, config_dir=config_dir).describe())
    except WouldDownload:
        _say("", "counts: not shown, reading them would download the hub's copy; check does")
    except UserError as error:
        _say("", f"not readable here: {error}")
    return 0


def run_check(word: str, output_dir: Path, strict: bool, workers: int | None, config_dir: Path) -> int:
    """Checks a data set, prints what was found, writes the contact sheet and a JSON."""
    from tqdm import tqdm

    from semantic_aug.datasets import check as checks

    if workers is not None and workers < 1:
        raise UserError(f"--workers {workers}: expected at least 1")
    with collected() as notes:
        spec, splits = catalog.read_splits(word, config_dir)

    def bar(items, total):
        return tqdm(items, total=total, desc=f"checking {spec.name}", unit="image", leave=False, dynamic_ncols=True)

    report, sheet = checks.check(spec, splits, workers, bar, notes)
    _say(f"{spec.name}: {len(report.class_names)} classes")
    for split, counts in report.counts.items():
        _say(f"  {split:<6}{sum(counts):>8} images, {min(counts)} to {max(counts)} per class")
    for side, (low, median, high) in report.sizes.items():
        _say(f"  {side:<6}{low:>8} to {high} pixels, median {median}")
    for finding in report.findings:
        _say(f"{'PROBLEM' if finding.problem else 'warning'}: {finding.kind}: {len(finding.cases)}")
        _say(*(f"    {case}" for case in finding.cases[:SHOWN]))
        if len(finding.cases) > SHOWN:
            _say(f"    ... and {len(finding.cases) - SHOWN} more, named in the JSON")
    folder = registry.resolve_path(output_dir)
    with files.atomic_path(folder / f"{spec.name}.png") as temporary:
        sheet.save(temporary, "PNG")
    files.write_json(folder / f"{spec.name}.json", report.as_dict())
    shown = registry.shown_path(folder / spec.name)
    _say(f"written: {shown}.png (contact sheet), {shown}.json")
    failed = bool(report.findings if strict else report.problems)
    warned = len(report.findings) - len(report.problems)
    _say(f"{len(report.problems)} problems, {warned} warnings: {'failed' if failed else 'passed'}")
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Runs one command."""
    args = build_parser().parse_args(argv)
    console.quiet_libraries()
    console.set_up_logging()
    if args.command == "list":
        return show_list(args.config_dir)
    if args.command == "info":
        return show_info(args.name, args.config_dir)
    if args.command == "get":
        line, setting = download.get(args.name, args.root, args.config_dir)
        _say(line, *([f"to read it: {setting}"] if setting else []))
        return 0
    return run_check(args.name, args.output_dir, args.strict, args.workers, args.config_dir)


if __name__ == "__main__":
    sys.exit(run_main(main))
