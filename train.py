#!/usr/bin/env python3
"""Train CvG-Diff: EPCT on a folder of HU slices. The same command resumes.

Several GPUs: `torchrun --nproc-per-node 8 train.py ...`; the batch is shared out and the result the same to rounding.
"""

from dataclasses import fields, replace
from pathlib import Path

from datasets.slices import find_slices
from models.presets import PRESETS, Preset
from utils.cli import Parser, add_fields, script
from utils.errors import InputError


def parse(argv=None):
    """(arguments, preset) of a command line, checked as far as it goes without data."""
    parser = Parser("train.py", __doc__)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS), help="a row of models/presets.py")
    parser.add_argument("--data", required=True, help="folder with train_img/ and val_img/, or of .npy slices")
    parser.add_argument("--out", required=True, type=Path, help="folder of this run; an existing run is resumed")
    parser.add_argument("--val-fraction", type=float, default=0.1,
                        help="share of the patients that validate, where DATA is one folder")
    parser.add_argument("--seed", type=int, default=3407, help="of everything random")
    parser.add_device()
    parser.add_argument("--init", type=Path, help="start from the weights of this checkpoint (default: none)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad slice instead of skipping it")
    parser.add_argument("--accept-new-data", action="store_true", help="resume although the slices have changed")
    parser.add_argument("--patients-from", choices=("name", "manifest"), help="what alone tells the patient of a slice "
                        "(default: manifest.csv, else the name, where it does not make every slice a patient)")
    parser.add_argument("--trust-hu", action="store_true", help="values are HU even where they do not look so")
    parser.add_argument("--dry-run", action="store_true", help="print configuration and cost, and stop")
    add_fields(parser.add_argument_group("fields of a preset (models/presets.py)"), Preset, in_presets)
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Preset) if getattr(args, f.name) is not None}
    preset = replace(PRESETS[args.preset], **given)
    if args.seed < 0 or not 0 < args.val_fraction < 1:
        parser.error("--seed takes 0 or more, --val-fraction a share between 0 and 1")
    try:
        preset.check()
    except InputError as error:
        parser.error(str(error))
    return args, preset


def in_presets(name: str) -> str:
    """The default of a field: what tiny has, and where other presets differ."""
    rows = {preset: getattr(row, name) for preset, row in PRESETS.items()}
    others = [f"{preset} {value}" for preset, value in rows.items() if value != rows["tiny"]]
    return ", ".join([f"{rows['tiny']}" + " in tiny" * bool(others), *others])


@script
def main(argv=None):
    args, preset = parse(argv)
    find_slices(args.data, "train")
    from datasets.loader import prefetch  # these need PyTorch, which takes two seconds
    from models.cost import describe_run
    from models.run import Run
    from models.schedule import validation_due
    from utils import distributed
    from utils.device import chosen_device, memory_advice

    args.device = chosen_device(args.device)
    if args.dry_run:
        return print(describe_run(preset, args.data, args.device))
    run = Run(args, preset)
    signal = failed = 0
    with memory_advice(preset.batch, run.processes, preset.accumulate), distributed.Stop() as stop, run.bar:
        run.announce()
        for (first, last), parts, weight in prefetch(run.load, run.spans()):
            # Train: the restore input x_T, then the composed inputs
            before = run.seen
            run.record(run.trainer.update(parts, weight, epoch=first // run.count), last)

            # Report
            failed = run.report(before)

            # Validate
            if validation_due(preset, before, last, run.images, run.count):
                run.validate()

            # Save
            signal = stop.agreed()
            due = last // preset.save_every > before // preset.save_every or last == run.images
            if due or signal or failed:
                run.save()

            # Stop?
            if signal or failed:
                break
    run.finish(signal, failed)


if __name__ == "__main__":
    main()
