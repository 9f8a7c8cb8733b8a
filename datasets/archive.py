"""Folders and files of any layout: which files there are, which slices they hold, whose these are."""

import os
import re
import secrets
import stat
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from datasets.formats import NIFTI, scan
from datasets.plausible import not_data
from datasets.privacy import pseudonymizer
from datasets.series import LeftOut, Problem, Refused, Slice, order_series, split_series
from datasets.slices import KNOWN, number_in, patient_of, patients_of, read_manifest, told_patients, unsure
from utils.errors import InputError, printable
from utils.files import hash16
from utils.workers import DIED, parallel, time_limit

OWN_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}  # of an archive
# What comes with images and holds none, by name: of systems, viewers, discs and data sets. Content goes first.
COMPANIONS = re.compile(
    r"\..*|.*:Zone\.Identifier|Thumbs\.db|desktop\.ini|sheet\.png|(LICEN[SC]E|NOTICE|README|VERSION|LOCKFILE|CHANGELOG)(\..*)?|"
    r".*\.(md|pdf|html?|css|json|jsonl|csv|tsv|xlsx?|docx?|xml|ya?ml|toml|log|md5|sha\d+|inf|ini|exe|dll|jar|bat|sh|py|"
    r"jpe?g|gif|bmp|ico|svg|js)", re.I)
PACKED = re.compile(r".*\.(zip|tar|tgz|tar\.gz|7z|rar)", re.I)


@time_limit()
def examine(path: str, derived: bool = False, trust: bool = False) -> tuple[list[Slice], list[Problem], list[Slice]]:
    """(the slices of a file, what is wrong with it, one whose patient is to be hidden). derived, trust: as of `scan`.

    A file that cannot be used may still tell the name of a patient, which its path repeats.
    """
    try:
        slices = scan(path, derived, trust)
        content = hash16(Path(path))
    except (Refused, OSError) as error:
        name, hidden = os.path.basename(path), []
        if whose := getattr(error, "whose", None):
            hidden = [Slice(path, patient=whose[0], names=whose[1])]
        elif COMPANIONS.fullmatch(name):
            return [], [(path, LeftOut.verdict, "is no image; by its name it comes with them")], []
        elif PACKED.fullmatch(name):
            return [], [(path, "warning", "is a packed archive and was not read: unpack it if it holds images")], []
        if isinstance(error, OSError):
            return [], [(path, "refused", f"cannot be read ({error.strerror})")], hidden
        return [], [(path, error.verdict, not_data(path) or str(error))], hidden
    notes = [(path, "warning", slices[0].warning)] if slices[0].warning else []
    return [replace(one, content=content) for one in slices], notes, slices[:1]


def find_files(inputs: list[str], out: Path) -> tuple[dict[str, str], list[Problem]]:
    """All files below the inputs but not below `out`: ({path: path from the input's parent}, problems).

    Links are followed; one that leads back to a folder already read is refused, so loops end.
    """
    files, problems, links = {}, [], []
    seen = {(out.stat().st_dev, out.stat().st_ino)} if out.is_dir() else set()
    stack = [(str(path), Path(os.path.abspath(path)).name) for path in inputs]
    while stack or links:  # links last: one never hides the folder that it leads to
        path, shown = stack.pop() if stack else links.pop()
        try:
            info = os.stat(path)
            if stat.S_ISREG(info.st_mode):
                files[path] = shown
            elif not stat.S_ISDIR(info.st_mode):
                problems.append((path, "refused", "is neither a file nor a folder"))
            elif (info.st_dev, info.st_ino) not in seen:
                seen.add((info.st_dev, info.st_ino))
                for name in os.listdir(path):
                    child = os.path.join(path, name)
                    (links if os.path.islink(child) else stack).append((child, f"{shown}/{name}"))
            elif os.path.islink(path):
                problems.append((path, "refused", "is a link that leads back to a folder already read"))
        except OSError as error:
            problems.append((path, "refused", f"cannot be read ({error.strerror})"))
    return dict(sorted(files.items())), problems


def read_headers(inputs: list[str], out: Path, workers: int, derived: bool = False,
                 trust: bool = False) -> tuple[list[Slice], dict[str, str], list[Problem], list[Slice]]:
    """(slices, {path: how it is shown}, problems, slices with all patients to be hidden) of all files below the inputs.

    derived, trust: as of `scan`.
    """
    files, problems = find_files(inputs, out)
    slices, hidden, read = [], [], partial(examine, derived=derived, trust=trust)
    for path, found in zip(files, parallel(read, list(files), workers, "Reading headers"), strict=True):
        more, notes, known = found or ([], [(path, "refused", DIED)], [])
        slices += more
        problems += notes
        hidden += known
    return slices, files, problems, hidden


def name_patients(slices: list[Slice], source: str | None = None) -> list[Slice]:
    """Fill in the patient of slices from files that do not say: from a manifest.csv beside them, or from the name.

    A volume is a patient of its own, a slice `case_012` belongs to `case`; where names are bare numbers or the same in
    several folders, the folder is the patient.
    source: `name` (of the file, where its header does not say), `folder` or `manifest`: this alone, the last two also
    for files that say their patient. Raises InputError for a file that no manifest tells but should.
    """
    paths = [Path(path) for path in sorted({one.path for one in slices if source in ("folder", "manifest")
                                            or not one.patient})]
    volumes = _volumes(slices)
    if source == "folder":
        patients = _top_folders(paths)
    elif source == "manifest":
        named = [replace(one, names=(*one.names, patient_of(Path(one.path).name))) for one in slices]
        hide = pseudonymizer(named, keep=False)
        patients = dict(zip(paths, patients_of(paths, source, hide), strict=True))
    else:
        told = {} if source else told_patients(paths)
        named = {path: re.sub(r"\.nii$", "", path.stem, flags=re.I) if path in volumes else patient_of(path.name)
                 for path in paths if path not in told}
        patients = {path: told.get(path) or named[path] for path in paths} | (
            {} if source else _near_folders(named, volumes))

    def fill(one):
        path, patient = Path(one.path), patients[Path(one.path)]
        series = one.series or (one.path if path in volumes else os.path.dirname(one.path))
        alone = any(letter.isalpha() and letter.upper() == letter.lower() for letter in patient)  # as in Chinese
        told = (patient,) * (len(patient) >= 4 or alone or source == "folder")  # shorter ones are in every file name
        return replace(one, patient=patient, names=(*one.names, *told), series=series)

    return [fill(one) if Path(one.path) in patients else one for one in slices]


def _volumes(slices):
    return {Path(one.path) for one in slices if one.frame or one.path.lower().endswith(NIFTI)}


def _top_folders(paths):
    # {path: the first folder below what all have in common, but for train, val and test; else the common one}
    folders = {path: Path(os.path.abspath(path)).parent for path in paths}
    common = Path(os.path.commonpath(folders.values())) if folders else None
    return {path: next((part for part in folder.relative_to(common).parts if part.lower() not in OWN_SPLITS),
                       common.name) for path, folder in folders.items()}


def _near_folders(named, volumes):
    # {path: patient by its folder} of those of {path: patient by its name} whose names do not tell patients apart
    folders = {path: Path(os.path.abspath(path)).parent for path in named}
    used = Counter((patient, path.name) for path, patient in named.items())
    shared = {patient for (patient, _), count in used.items() if count > 1}
    alike = {path for path in volumes & named.keys() if named[path] in shared}
    if len({folders[path] for path in alike}) < len({named[path] for path in alike}):
        shared -= {named[path] for path in alike}  # arterial/case_1.nii and venous/case_1.nii, case_2, ...
    return {path: patient_of(folder.name) if KNOWN.match(folder.name) else folder.name
            for path, folder in folders.items()
            if named[path] in shared or path not in volumes and named[path].isdigit()}


def unsure_patients(slices: list[Slice], hide=str) -> str:
    """A sentence where the patients of slices that are named cannot be right, by their number; else empty.

    hide: as of `unsure`.
    """
    volumes = _volumes(slices)
    single = {path: one.patient for one in slices if one.corner is None and (path := Path(one.path)) not in volumes}
    if all(path.stem == patient for path, patient in single.items()) and (text := unsure(list(single), hide)):
        return text
    series = {one.series for one in slices}
    if len({one.patient for one in slices}) == 1 < len(series):
        return (f"All {len(series)} series are of one patient, by the ID in their headers or by the folder or name "
                "that they share. If they are of several, tell them apart by --patients-from folder, or by a "
                "manifest.csv and --patients-from manifest.")
    return ""


def group_series(slices: list[Slice]) -> list[list[Slice]]:
    """The slices of each volume, sorted by patient and series: one series may hold several."""
    key = attrgetter("patient", "series")
    return [part for _, group in groupby(sorted(slices, key=key), key) for part in split_series(list(group))]


def find_series(path: Path, out: Path, number: int | None = None,
                derived: bool = False, trust: bool = False) -> tuple[list[Slice], list[str], list[Problem]]:
    """(slices from feet to head, how each is called in messages, problems, with these names) of one series.

    Files are called by their paths below `path`, which often bears the patient's name, with pseudonyms in them.
    number: which of several, from 1. Files below `out` are not read. Raises InputError where no series is chosen.
    """
    slices, _, problems, hidden = read_headers([str(path)], out, 1, derived, trust)
    slices = name_patients(_with_manifest(slices))
    groups, hide = group_series(slices), pseudonymizer(slices + hidden, keep=False, salt=secrets.token_hex())

    def call(file):
        return printable(hide(Path(os.path.relpath(file, path if path.is_dir() else path.parent)).as_posix()))

    if not groups:
        reasons = "; ".join(f"{call(name)} {reason}" for name, _, reason in problems[:3])
        raise InputError(f"{path} holds no slices that can be used" + f" ({reasons})" * bool(reasons) + ".")
    if number is None and len(groups) > 1 or number is not None and not 1 <= number <= len(groups):
        folders = [call(Path(group[0].path).parent) for group in groups]
        names = ", ".join(f"{i}: {len(group)} slices" + f" of {folder}" * (folder != ".")
                          + hide(_about(group)) * (folders.count(folder) > 1)
                          for i, (group, folder) in enumerate(zip(groups, folders, strict=True), 1))
        raise InputError(f"{path} holds {len(groups)} series ({names}); choose one by --series.")
    kept, more = order_series(groups[(number or 1) - 1])
    names = [call(one.path) + (f", frame {one.frame}" if one.frame else "") for one in kept]
    return kept, names, [(call(name), *rest) for name, *rest in problems + more]


def _about(group):
    # What may tell the series of one folder apart.
    one, heights = group[0], [one.position for one in group if one.position is not None]
    facts = (one.kernel and f"kernel {one.kernel}", one.spacing and f"pixels of {one.spacing:.3g} mm",
             one.acquisition and f"acquisition {one.acquisition}",
             heights and f"{min(heights):g} to {max(heights):g} mm")
    return f" [{', '.join(filter(None, facts))}]"


def _with_manifest(slices: list[Slice]) -> list[Slice]:
    """Spacing and position of slices that do not tell, from a manifest.csv that datasets.prepare wrote beside them."""
    folders = {Path(one.path).parent for one in slices if one.spacing is None}
    told = {(folder / row["file"], int(number_in(row, "index") or 0)): row
            for folder in folders for row in read_manifest(folder)}

    def fill(one):
        row = told.get((Path(one.path), one.frame), {})
        return replace(one, spacing=number_in(row, "spacing_mm"), position=number_in(row, "position"))

    return [fill(one) if one.spacing is None else one for one in slices]
