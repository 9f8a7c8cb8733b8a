"""Helical, multi-row CT to fan-beam sinograms of planes: `python -m datasets.rebin SCAN --out DIR`.

SCAN is a folder of DICOM-CT-PD projections, a patient of TCIA's LDCT-and-Projection-data. DIR gets sinograms.npy,
(slices, views, bins) line integrals from feet to head, geometry.json, the fan beam that they belong to, and, where the
scan tells them, photons.npy, photons of each bin without a patient. reconstruct.py and test.py read such a folder.
With --truth, test_img/ gets the FBP of all views, HU, and a manifest. The same command again does only what is missing.

Single-slice rebinning along the exact rays (Noo, Defrise, Clackdoyle, Phys. Med. Biol. 44, 1999, with the flying focal
spot besides). Azimuth a points to e(a) = (-sin a, cos a). The detector's focal centre is F = rho e(phi), the source
S = (rho + drho) e(phi + dphi), dz above it, and a cell of column j and row k is D = F + d_j e(phi + pi + alpha_j),
(cy - k) dv above it. In the plane the ray has the length L = |D - S|, the direction (sin w, -cos w) and the distance
s = S_x cos w + S_y sin w from the axis, to which it is nearest m = -S . (sin w, -cos w) behind the source. The ideal
fan holds it at gamma = arcsin(s / rho), lambda = w - gamma: lambda - phi and gamma depend on column and state of the
spot alone. At the axis it is z + dz (1 - m/L) + (cy - k) dv m/L high, so that the plane z_s reads the row
k = cy - (z_s - z - dz (1 - m/L)) L / (m dv), times L / sqrt(L^2 + ((cy - k) dv - dz)^2) for its slant. Turns that see
a ray are averaged, less where the plane nears the detector's edge; where all do, the ray that runs back helps.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from io import BytesIO
from pathlib import Path

import numpy as np

from datasets.ctpd import POSITIONS, Scan, read_scan
from datasets.prepare import COLUMNS
from datasets.series import Refused
from utils.cli import Parser, script
from utils.errors import InputError, Stopped
from utils.files import atomic, hash16, write_table, writing
from utils.progress import Progress
from utils.run_folder import claim, lock

SINOGRAMS, GEOMETRY = "sinograms.npy", "geometry.json"
READERS = 4   # threads that read files
SAME = 0.05   # of a column: places of two states' columns that count as one
CONE = math.radians(1.2)  # of an axial scan: planes farther from the source's need another reconstruction


def rays(scan: Scan) -> dict[str, np.ndarray]:
    """Of each state and column (states, columns), for phi = 0: lambda, gamma (radians), m and L (mm).

    The first two have as many rows again: the same lines run through from their other end, at lambda + 2 gamma + pi and
    -gamma.
    """
    dphi, _, drho = scan.states.T[:, :, None]
    source = (scan.rho + drho) * np.stack([-np.sin(dphi), np.cos(dphi)])
    alpha, reach = scan.cells()
    way = np.stack([reach * np.sin(alpha) + 0 * dphi, scan.rho - reach * np.cos(alpha) + 0 * dphi]) - source
    L = np.hypot(*way)
    w = np.arctan2(way[0], -way[1])
    gamma = np.arcsin((source[0] * np.cos(w) + source[1] * np.sin(w)) / scan.rho)
    lam = w - gamma
    return {"lam": np.vstack([lam, lam + 2 * gamma + math.pi]), "gamma": np.vstack([gamma, -gamma]),
            "m": -(source * way).sum(0) / L, "L": L}


def merged(gamma: np.ndarray, bins: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All states' columns (states, columns) on the ideal fan as one row of nodes, those at nearly one place as one.

    gamma and bins in radians. Gives which node each column adds to, the nodes' places, and each bin's node before it.
    """
    order = np.argsort(gamma, axis=None)
    ordered = gamma.ravel()[order]
    number = np.cumsum(np.diff(ordered, prepend=ordered[0]) > SAME * np.median(np.abs(np.diff(gamma))))
    node = np.empty(gamma.size, int)
    node[order] = number
    place = np.bincount(number, ordered) / np.bincount(number)
    return node.reshape(gamma.shape), place, np.clip(np.searchsorted(place, bins, "right") - 1, 0, len(place) - 2)


class Rebinned:
    """Fan-beam sinograms of a scan's planes, from feet to head: made when one is asked for, an array (N, views, bins).

    Only the views near a plane are in memory, in a ring in which view i takes the place i modulo its length; those of
    the next plane are read meanwhile.
    """

    def __init__(self, scan: Scan, spacing: float = 1.0, views: int | None = None):
        """spacing: of the planes, mm. views: of a sinogram, those of a turn if None. Raises Refused."""
        self.scan, self.rays, views = scan, rays(scan), views or scan.turn
        part = self.rays["m"] / self.rays["L"]
        dz = scan.states[:, 1]
        self.half = scan.rows * scan.dv * part / 2
        self.middle = dz[:, None] * (1 - part) + (scan.cy - (scan.rows + 1) / 2) * scan.dv * part
        self.lams, self.bins = math.tau * np.arange(views) / views, scan.cells()[0]
        node, place, cell = zip(*(merged(gamma, self.bins) for gamma in np.vsplit(self.rays["gamma"], 2)), strict=True)
        places = np.array([len(one) for one in place])
        place = [np.pad(one, (0, places.max() - len(one))) for one in place]
        self.nodes = np.vstack(node), np.stack(place), places, np.stack(cell)
        self.heights = _heights(scan, spacing, self.half.min(), self.rays["lam"][:len(dz)])
        self.spacing, self.shape = spacing, (len(self.heights), views, scan.columns)
        self.windows = [self._window(z_s) for z_s in self.heights]
        pairs = zip(self.windows, self.windows[1:] + self.windows[-1:], strict=True)
        self.length = max(max(a[1], b[1]) - min(a[0], b[0]) for a, b in pairs)
        self.ring = np.empty((self.length, scan.rows, scan.columns), np.float32)
        self.held, self.coming = np.full(self.length, -1), []
        feed = 0 if scan.axial else np.ptp(scan.z) / (scan.phi[-1] - scan.phi[0]) * math.tau
        pitch = feed / (scan.rows * scan.dv * scan.rho / scan.d0)
        self.notes = scan.notes if pitch <= 1.05 else (
            *scan.notes, f"its pitch is {pitch:.2f}: where no turn sees a plane, the nearest row stands in")
        self.readers, self.workers = ThreadPoolExecutor(READERS), ThreadPoolExecutor(os.cpu_count() or 1)

    def __len__(self) -> int:
        return self.shape[0]

    def geometry(self) -> dict:
        """The geometry file's fields, and the height of the first plane."""
        first = float(self.heights[0])
        return self.scan.geometry() | {
            "angles": {"start": 0.0, "step": 360 / self.shape[1], "count": self.shape[1]},
            "slice_spacing_mm": self.spacing, "first_slice_mm": first if self.scan.head_first else -first}

    def _window(self, z_s: float) -> tuple[int, int]:
        """The views of which a plane may need rays: those that see it, and half a turn to each side."""
        scan, views = self.scan, len(self.scan.phi)
        near = np.flatnonzero(np.abs(scan.z - z_s) <= self.half.max() + np.abs(self.middle).max() + 0.01)
        closest = int(np.abs(scan.z - z_s).argmin())
        turn = 0.55 * math.tau / (scan.phi[-1] - scan.phi[0]) * (views - 1) + 4 * len(scan.states)
        low, high = (near[0], near[-1]) if len(near) else (closest, closest)
        return max(0, min(low, int(closest - turn))), min(views, max(high + 1, int(closest + turn) + 1))

    def _read(self, i: int) -> None:
        self.ring[i % self.length] = self.scan.view(i)
        self.held[i % self.length] = i

    def _request(self, index: int) -> None:
        """Starts to read the views of a plane that the ring lacks."""
        self.coming = [self.readers.submit(self._read, i) for i in range(*self.windows[index])
                       if self.held[i % self.length] != i]

    def __getitem__(self, index: int) -> np.ndarray:
        """Line integrals (views, bins) float32 of one plane. Raises Refused where a view cannot be read."""
        from datasets.rays import gather, project  # compiles, which takes seconds

        wait(self.coming)  # what was read ahead; what failed is this plane's only if it is asked for again
        self._request(index)
        for future in self.coming:
            future.result()
        if 0 <= index < len(self) - 1:
            self._request(index + 1)
        scan, (low, high), z_s = self.scan, self.windows[index], float(self.heights[index])
        order, phi, first = self._by_state(low, high)
        state, z, slots = scan.state[order], scan.z[order], order % self.length
        lines = np.empty((len(order), scan.columns), np.float32)
        out = np.empty(self.shape[1:], np.float32)
        ray, dz = self.rays, scan.states[:, 1].copy()
        self._share(len(order), lambda a, b: project(
            lines[a:b], slots[a:b], state[a:b], z[a:b], self.ring, z_s, dz, scan.dv, scan.cy, ray["m"], ray["L"]))
        self._share(len(out), lambda a, b: gather(
            out[a:b], self.lams[a:b], self.bins, lines, phi, z, first, z_s, ray["lam"], self.middle, self.half,
            *self.nodes))
        return out

    def _by_state(self, low: int, high: int):
        """(views low to high, one state after the other; their phi; where each state begins). Axial: a turn more."""
        scan, order, phi, first = self.scan, [], [], [0]
        for s in range(len(scan.states)):
            own = low + np.flatnonzero(scan.state[low:high] == s)
            again = own[scan.phi[own] + math.tau > scan.phi[own[-1]] + 1e-6] if scan.axial else own[:0]
            order += [own, again]
            phi += [scan.phi[own], scan.phi[again] + math.tau]
            first.append(first[-1] + len(own) + len(again))
        return np.concatenate(order), np.concatenate(phi), np.array(first)

    def _share(self, count: int, work) -> None:
        """work(first, last) over all threads."""
        ends = np.linspace(0, count, 4 * (os.cpu_count() or 1) + 1).astype(int)
        list(self.workers.map(work, ends[:-1], ends[1:]))


def _heights(scan: Scan, spacing: float, half: float, lam: np.ndarray) -> np.ndarray:
    """z of the planes that are seen from everywhere, from feet to head, on multiples of the spacing where it moves."""
    low, high = scan.z.min(), scan.z.max()
    angle = scan.phi[-1] - scan.phi[0]
    steps = np.diff(scan.phi)
    if not len(steps) or steps.min() <= 0 or angle < math.tau - 2 * steps[0] - 1e-6:
        raise Refused(f"turns by {math.degrees(angle):.0f} degrees in {len(scan.phi)} views; expected a whole turn, "
                      "one way, of a scan of several rows, a spiral or a flying focal spot")
    if scan.axial:
        middle = scan.z.mean()
        reach = min(half, scan.rho * math.tan(CONE)) if scan.rows > 1 else 0.0
        most = int(reach / spacing)
        heights = middle + spacing * np.arange(-most, most + 1)
    else:
        edge = (high - low) * (math.pi + np.abs(lam).max()) / angle
        low, high = low + edge + 0.01, high - edge - 0.01
        heights = spacing * np.arange(math.ceil(low / spacing), math.floor(high / spacing) + 1)
        if not len(heights):
            raise Refused(f"has no plane that is seen from everywhere: it turns {angle / math.tau:.1f} times")
    return heights if scan.head_first else heights[::-1]


def read_projections(path: Path, position: str | None = None):
    """(line integrals (N, views, bins), fields of their geometry) of a DICOM-CT-PD folder; said is what was assumed.

    A rotation of one row is as it was measured, all else `Rebinned`. Raises Refused.
    """
    scan = read_scan(path, position)
    if scan.plain:
        _say(path, scan.notes)
        lines = np.stack([scan.view(i)[0] for i in range(len(scan.phi))])
        return lines[None], scan.geometry() | {"angles": np.degrees(scan.phi).tolist()}
    lines = Rebinned(scan)
    _say(path, lines.notes)
    return lines, lines.geometry()


def _say(path, notes):
    for note in notes:
        print(f"{path}: {note}.")


def write_sinograms(lines: Rebinned, out: Path) -> None:
    """OUT/sinograms.npy, slice by slice; what a stopped run has done of it is kept."""
    if (out / SINOGRAMS).is_file():
        return
    partial, header, size = out / ".sinograms.npy", BytesIO(), 4 * lines.shape[1] * lines.shape[2]
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": lines.shape})
    with writing(partial), open(partial, "ab") as file:
        done = max(0, file.tell() - header.tell()) // size
        file.truncate(header.tell() + done * size if done else 0)
        if not done:
            file.write(header.getvalue())
        with Progress(total=len(lines), initial=done, desc="Rebinning", unit="slice") as bar:
            for i in range(done, len(lines)):
                file.write(lines[i].astype("<f4").tobytes())
                file.flush()
                os.fsync(file.fileno())  # no length without its content, even after a power cut
                bar.update()
    os.replace(partial, out / SINOGRAMS)


def write_truth(out: Path, size: int, patient: str, heights: list[float], spacing: float) -> None:
    """OUT/test_img: the FBP of all views by reconstruct.py, a file a slice, and their manifest."""
    script = Path(__file__).parents[1] / "reconstruct.py"
    full, folder, rows = out / "full-view", out / "test_img", []
    done = subprocess.run([sys.executable, script, out, "--method", "fbp", "--format", "npy", "--size", str(size),
                           "--out", full])
    if done.returncode:
        raise Stopped("Stopped: the slices of all views were not made; the reason is above.", done.returncode)
    folder.mkdir(exist_ok=True)
    for i, (hu, height) in enumerate(zip(np.load(full / "volume.npy", mmap_mode="r"), heights, strict=True)):
        path = folder / f"{patient}_{i:03d}.npy"
        _save(path, hu)
        rows.append((path.name, patient, i, "full-view FBP", round(height, 4), spacing, "", SINOGRAMS,
                     hashlib.sha256(path.read_bytes()).hexdigest()))
    write_table(folder / "manifest.csv", COLUMNS, rows)


def _save(path: Path, array: np.ndarray) -> None:
    with atomic(path) as partial, open(partial, "wb") as file:
        np.save(file, array)


def arguments() -> Parser:
    """The flags of python -m datasets.rebin."""
    parser = Parser("python -m datasets.rebin", __doc__)
    parser.add_argument("scan", metavar="SCAN", type=Path, help="a folder of DICOM-CT-PD projections")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where the sinograms go")
    parser.add_argument("--spacing", type=float, default=1.0, help="distance of the slices, mm")
    parser.add_argument("--views", type=int, help="of a sinogram (default: as many as the scan has in a turn)")
    parser.add_argument("--position", choices=POSITIONS, help="how the patient lay, where the files do not say "
                        "(default: their PatientPosition)")
    parser.add_argument("--spectrum", type=int, help="which SpectrumIndex, where there are several (default: the "
                        "only one)")
    parser.add_argument("--field", type=float, help="side of the image, mm (default: the files' "
                        "DataCollectionDiameter)")
    parser.add_argument("--truth", action="store_true", help="write the FBP of all views too, for test.py")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side of these")
    return parser


def rebin(args) -> None:
    """SCAN to OUT, as `arguments` says. Raises Refused, a sentence on the scan."""
    scan = read_scan(args.scan, args.position, args.spectrum)
    lines = Rebinned(scan, args.spacing, args.views)
    _say(args.scan, lines.notes)
    geometry = lines.geometry() | {"size": args.size} | ({"field_of_view_mm": args.field} if args.field else {})
    if "field_of_view_mm" not in geometry:
        raise Refused("does not say how wide the image is (DataCollectionDiameter); say it by --field")
    source = hash16("\n".join(f"{Path(path).name} {frame}" for path, frame, *_ in scan.files).encode(
        errors="backslashreplace"))
    claim(args.out, {"source": source, "geometry": geometry}, "rebinned scan")
    print(f"{len(scan.phi)} views of {scan.rows} x {scan.columns}, patient {scan.position}: {lines.shape[0]} slices of "
          f"{lines.shape[1]} views, {args.spacing:g} mm apart.")
    with atomic(args.out / GEOMETRY) as partial:
        partial.write_text(json.dumps(geometry, indent=1), encoding="utf-8")
    if scan.photons is not None:
        _save(args.out / "photons.npy", scan.photons)
    write_sinograms(lines, args.out)
    if args.truth:
        heights = geometry["first_slice_mm"] + args.spacing * np.arange(len(lines))
        write_truth(args.out, args.size, scan.patient, heights.tolist(), geometry["field_of_view_mm"] / args.size)
    print(f"Written: {args.out / SINOGRAMS} and {GEOMETRY}" + ", and test_img" * args.truth + ".")


@script
def main(argv=None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    parser.at_least(args, {"spacing": 0.01, "views": 8, "field": 1, "size": 8})
    if not args.scan.exists():
        parser.error(f"{args.scan} does not exist")
    lock(args.out)
    try:
        rebin(args)
    except Refused as error:
        raise InputError(f"{args.scan} {error}.") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
