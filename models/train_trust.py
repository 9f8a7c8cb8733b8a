"""Make the error network of a checkpoint: reconstruct training slices, learn how wrong they are, calibrate, write it.

    python -m models.train_trust --checkpoint tiny --data DATA --out OUT

OUT gets samples/ (reconstructed training slices and their errors) and NAME-trust.safetensors, which belongs beside the
checkpoint NAME.safetensors. What is measured, by which scanner and with which noise is drawn as in the training of the
checkpoint. The same command makes the samples that are missing, then trains and calibrates.
"""

import math
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from models.presets import Preset, of_this_version
from models.weights import find_checkpoint
from utils.cli import Parser, script
from utils.errors import InputError
from utils.files import atomic, hash16
from utils.progress import Progress

VIEWS, PHOTONS = (18, 36, 72), (None, 1e6, 1e5, 1e4)  # of the calibration
METHOD = "spdps"                                      # of reconstruct.py, by default
BATCH = 4
UNSCALED = {"scales": [[18, None, 1.0]]}


def pinball(error: torch.Tensor, q: torch.Tensor, coverage: float) -> torch.Tensor:
    """The loss whose least value is the quantile: of absolute errors and predictions q (B, 1, H, H), by slice, (B,).

    Koenker and Bassett (Econometrica 46, 1978). Divided by a slice's mean error, so that all slices weigh alike.
    """
    left = error - q
    return torch.maximum(coverage * left, (coverage - 1) * left).mean((1, 2, 3)) / error.mean((1, 2, 3)).clamp_min(1e-6)


def conformal_scale(ratios: torch.Tensor, coverage: float) -> float:
    """The factor on predictions that covers this share of the errors: ratios = error / prediction of all pixels."""
    rank = min(len(ratios), math.ceil(coverage * (len(ratios) + 1)))
    return float(ratios.kthvalue(rank).values)


def recipe(header: dict) -> Preset:
    """How the checkpoint's training drew measurements. Raises InputError where this version cannot draw them."""
    try:
        found = Preset(**of_this_version(header.get("training", {}).get("preset", {})))
    except TypeError as error:
        raise InputError(f"The checkpoint was trained with fields that this version does not know ({error}).") from None
    found.check()
    return replace(found, hops=1, batch=1, augment=False, accumulate=1)


def make_sample(reconstructor, preset: Preset, truths: torch.Tensor, index: int, seed: int):
    """(condition, arrays) of sample number `index`: ((views, photons), (3, H, H)): image, undetermined share, error."""
    from datasets.loader import load_batch
    from models.degradation import Degradation
    from models.drawn import draw_measurement, draw_scanner, measure
    from models.graphs import directly
    from models.trust import FEW, undetermined

    _, (part,), _ = load_batch(truths, (index, index + 1), seed, preset)
    degrade = Degradation(draw_scanner(part.common, preset, seed))
    n_T, noise = draw_measurement(part, degrade, preset)
    x0 = part.x.to(reconstructor.device)
    (y,), ((photons, electronic),) = measure(part, degrade, x0, n_T, noise, seed), noise or [(math.inf, 0.0)]
    photons = photons if math.isfinite(photons) else None
    one = replace(reconstructor, scanner=degrade.scanner, graphs=directly)  # no two samples are alike
    x0_hat, _ = one.run(METHOD, y[None], x0.shape[-1], photons=photons, electronic=electronic)
    unseen = undetermined(degrade, x0_hat, n_T[0], FEW)
    told = one.told(photons, x0.shape[-1]) or math.inf
    return (n_T[0], told), torch.cat([x0_hat, unseen, (x0_hat - x0).abs()], dim=1)[0].cpu().numpy()


def make_samples(args, reconstructor, preset: Preset, truths: torch.Tensor):
    """The samples of OUT, those that are missing made now: (conditions, arrays (N, 3, H, H))."""
    folder, conditions, arrays = args.out / "samples", [], []
    folder.mkdir(exist_ok=True)
    for index in Progress(range(args.samples), desc="Samples", unit="slice"):
        path, found = folder / f"{index:05d}.npz", None
        with suppress(Exception), np.load(path, allow_pickle=False) as file:  # not there, or damaged in whatever way
            found = file["condition"], file["arrays"]
        if found is None:
            found = make_sample(reconstructor, preset, truths, index, args.seed)
            with atomic(path) as partial, open(partial, "wb") as file:
                np.savez(file, condition=np.array(found[0]), arrays=found[1])
        conditions.append(found[0])
        arrays.append(found[1])
    return np.array(conditions), np.array(arrays)


def train(args, conditions, arrays, device: str):
    """The error network, trained on the samples."""
    from models.trust import COVERAGE, config, half_widths
    from models.unet import UNet
    from utils.device import bf16_pays

    torch.manual_seed(args.seed)
    network, rng = UNet(config(args.width)).to(device).train(), np.random.default_rng(args.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4)
    batches = [order[i:i + BATCH] for _ in range(args.passes)
               for order in [rng.permutation(len(arrays))] for i in range(0, len(order), BATCH)]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=len(batches) + 1)
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16_pays(device))
    bar, recent = Progress(batches, desc="Error network", unit="batch"), None
    for batch in bar:
        x, unseen, error = torch.from_numpy(arrays[batch]).to(device).split(1, dim=1)
        photons = torch.tensor(conditions[batch, 1], dtype=torch.float32, device=device)
        with autocast:
            q = half_widths(network, x, unseen, conditions[batch, 0].tolist(), photons)
        loss = pinball(error, q, COVERAGE).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent = loss.item() if recent is None else 0.98 * recent + 0.02 * loss.item()
        bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
    return network.eval()


def interval(reconstructor, x0: torch.Tensor, names: list[str], n_views: int, photons: float | None, network=None):
    """(|error|, half width) of slices x0 (B, 1, H, H) measured by n views: as `x0`.

    network: an error network whose half widths are not scaled yet, in the place of the checkpoint's.
    """
    from models.evaluation import Noise, simulate_measurement

    errors, widths = [], []
    for one, name in zip(x0.split(1), names, strict=True):
        y = simulate_measurement(one, n_views, [name], reconstructor.degrade, Noise(photons))
        x0_hat, _ = reconstructor.run(METHOD, y, one.shape[-1], photons=photons)
        errors.append((x0_hat - one).abs())
        widths.append(reconstructor.half_width(x0_hat, n_views, photons, network and (network, UNSCALED)))
    return torch.cat(errors), torch.cat(widths)


def calibrate(args, reconstructor, error_network, names: list[str], x0: torch.Tensor) -> list[list]:
    """Rows (views, photons, scale): each scale covers its share of all pixels of the validation slices."""
    from models.trust import COVERAGE

    rows = []
    for n, photons in Progress([(n, p) for n in VIEWS for p in PHOTONS], desc="Calibration", unit="condition"):
        error, width = interval(reconstructor, x0, names, n, photons, error_network)
        rows.append([n, photons, conformal_scale((error / width).flatten(), COVERAGE)])
    return rows


def parse(argv=None):
    parser = Parser("python -m models.train_trust", __doc__)
    parser.add_argument("--checkpoint", default="tiny", help="as of test.py")
    parser.add_argument("--data", required=True, help="folder with train_img/ and val_img/, as in the "
                        "training of the checkpoint")
    parser.add_argument("--out", required=True, type=Path, help="folder for samples and the error network")
    parser.add_argument("--samples", type=int, default=400, help="reconstructed training slices")
    parser.add_argument("--passes", type=int, default=8, help="over them")
    parser.add_argument("--val-slices", type=int, default=12, help="that calibrate, evenly spread")
    parser.add_argument("--width", type=int, default=32, help="channels of the error network, a multiple of 32")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    parser.add_device()
    args = parser.parse_args(argv)
    parser.at_least(args, {"samples": 1, "passes": 1, "val_slices": 1, "width": 32, "seed": 0})
    if args.width % 32:
        parser.error(f"--width {args.width}: expected a multiple of 32")
    return args


@script
def main(argv=None):
    args = parse(argv)
    checkpoint = find_checkpoint(args.checkpoint)
    from datasets.leakage import met_again
    from datasets.loader import load_slices  # these need PyTorch, which takes two seconds
    from models.checkpoint import save_checkpoint
    from models.reconstructor import Reconstructor
    from models.training import ground_truths
    from models.trust import beside
    from utils import run_folder, state

    reconstructor = Reconstructor.from_checkpoint(checkpoint, device=args.device)
    run_folder.lock(args.out)
    preset = recipe(reconstructor.header)
    seed = reconstructor.header.get("training", {}).get("seed", args.seed)  # where one folder is split: as it was then
    (names, slices), (val_names, val), fingerprints, (_, calibrating) = load_slices(
        args.data, 0.1, args.val_slices, seed, reconstructor.multiple, strict=False)
    again = met_again(reconstructor.header.get("traces"), calibrating)
    if again != "unknown" and any(again.values()):
        raise InputError(f"{again['slices']} slices and {again['patients']} patients that would calibrate took part in "
                         f"the training of {checkpoint}; put others into val_img/.")
    made = {name: getattr(args, name) for name in ("samples", "passes", "width", "seed")}
    run_folder.claim(args.out, {"of": hash16(checkpoint), "data": fingerprints, "method": METHOD, "seed": args.seed,
                               "mirror": reconstructor.mirror},
                     "run of models.train_trust")
    device = reconstructor.device
    truths, val = (ground_truths(mu, device, torch.float32) for mu in (slices, val))
    network = train(args, *make_samples(args, reconstructor, preset, truths), device).half().float()  # as it is stored
    scales = calibrate(args, reconstructor, network, val_names, val.to(device))
    target = args.out / beside(checkpoint).name
    save_checkpoint(target, network.half().state_dict(), network.config, {
        "predicts": "error", "of": hash16(checkpoint), "scales": scales, "method": METHOD, "dc": reconstructor.dc,
        "size": val.shape[-1], "commit": state.commit(),
        "made": made | {"data": fingerprints, "training_slices": len(names), "calibration_slices": len(val_names)}})
    print("Scales: " + ", ".join(f"{n} views {'no noise' if photons is None else f'{photons:g} photons'} {scale:.2f}"
                                 for n, photons, scale in scales))
    print(f"Written: {target}. Put it beside {checkpoint}.")


if __name__ == "__main__":
    main()
