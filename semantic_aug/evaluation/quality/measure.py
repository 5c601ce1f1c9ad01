"""Faithfulness, diversity, FID, KID and near-copies of synthetic subsets, per strength and class."""

from __future__ import annotations

from semantic_aug import cli, console, registry, runs
from semantic_aug.datasets.settings import add_shared
from semantic_aug.evaluation.quality import inputs as options


def build_parser() -> cli.Parser:
    """All flags of this command."""
    parser = cli.Parser(prog="python -m semantic_aug.evaluation measure", description=__doc__)
    add_shared(parser)
    options.add_subsets(parser)
    options.add_models(parser)
    options.add_output(parser)
    group = parser.add_argument_group("measures")
    group.add_argument(
        "--reference",
        type=cli.path_or(),
        default=None,
        metavar="DIR",
        help="another subset (DIR#NAME for a filtered one): FID and KID to it are given too, as of a faster sampling preset "
        "to the exact one",
    )
    group.add_argument(
        "--gamma",
        type=cli.number(0, open_low=True),
        default=0.5,
        metavar="G",
        help="label agreement is under the soft labels (1 - s^G) source + s^G target; above 0",
    )
    group.add_argument(
        "--copy_percentile",
        type=cli.number(0, 100),
        default=1.0,
        metavar="P",
        help="an image is a near-copy where a training image is nearer to it than the P-th percentile of the training images' "
        "distances to their own nearest neighbour",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measures, writes the files and prints the totals."""
    args = build_parser().parse_args(argv)
    console.quiet_libraries()
    console.set_up_logging()
    given = options.resolve(args)
    judge, clip = options.judge(args, given), options.clip(args, given.device)
    from semantic_aug.evaluation.quality import measure_report
    from semantic_aug.evaluation.quality.measures import Measurer, missing
    from semantic_aug.evaluation.quality.subset import open_subset

    reference = None
    if args.reference:
        reference = open_subset("reference", [args.reference], given.dataset, args.allow_other_sources)
    extractor = options.extractor(args, given.device)
    print(given.dataset.describe())
    for subset in given.subsets:
        print(f"synthetic: {subset.name}, {len(subset)} images")
    if args.dry_run:
        return 0
    folder = registry.resolve_path(args.output_dir)
    arguments = options.record(args)
    runs.claim(folder, arguments, "--output_dir", options.MAY_CHANGE, origin=options.origin(args, given))
    measurer = Measurer(
        given.dataset, extractor, judge, clip, args.gamma, args.seed, args.copy_percentile, args.batch_size
    )
    real, threshold = measurer.real()
    other = measurer.reference(reference) if reference else None
    rows = []
    for subset in given.subsets:
        rows += measurer.rows(measurer.look(subset, real, threshold), real, other)
    rows += measurer.rows(real, real)
    notes = missing(given.subsets, measurer, real.features.shape[1], len(given.dataset.train))
    if measure_report.axes_of(rows) is None:
        notes.append(f"{measure_report.PICTURE_FILE} is left out: it needs --classifier or --clip")
    facts = {"arguments": arguments, "copy_threshold": threshold, "notes": notes, "versions": runs.versions()}
    files = measure_report.write(folder, rows, facts)
    print(measure_report.markdown(rows))
    print(
        f"near-copies: nearer than {threshold:.4g} to a training image (percentile {args.copy_percentile:g} of real ones)"
    )
    print(*(f"note: {note}" for note in notes), sep="\n")
    print(f"written: {', '.join(registry.shown_path(file) for file in files)}")
    return 0
