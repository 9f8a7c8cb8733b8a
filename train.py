#!/usr/bin/env python3
"""Train CvG-Diff: EPCT on a folder of HU slices. The same command resumes. See `python train.py --help`."""

import argparse
import copy
import hashlib
import json
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets.slices import find_slices, fingerprint, read_slices, split_by_patient
from models.checkpoint import denoiser, load_checkpoint, save_checkpoint
from models.consistency import data_consistency
from models.degradation import Degradation, levels_for
from models.epct import compose, conditioning, denser_level, loss, measured_level, views_of
from models.presets import PRESETS, Preset
from models.samplers import SAMPLERS
from models.unet import UNet
from utils.device import bf16_pays, check_device, default_device
from utils.files import atomic
from utils.metrics import measure
from utils.scalars import Scalars
from utils.units import WINDOWS, hu_to_mu, window

CHOICES = {"optimizer": ("adam", "adamw"), "schedule": ("step", "cosine"), "precision": ("fp32", "bf16"),
           "publish": ("raw", "ema"), "update": ("shift", "naive"), "loss": ("mse", "rmse"),
           "rollout": ("ema", "own"), "val_sampler": tuple(SAMPLERS)}


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS))
    parser.add_argument("--data", required=True, help="folder with train_img/ and val_img/, or of .npy slices")
    parser.add_argument("--out", required=True, type=Path, help="folder of this run; an existing run is resumed")
    parser.add_argument("--val-fraction", type=float, default=0.1,
                        help="share of the patients that validate, where DATA is one folder")
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--init", type=Path, help="start from the weights of this checkpoint (fine-tuning)")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad slice instead of skipping it")
    flags = parser.add_argument_group("fields of a preset (models/presets.py)")
    for field in fields(Preset):
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            flags.add_argument(name, action=argparse.BooleanOptionalAction)
        else:
            flags.add_argument(name, type=field.type, choices=CHOICES.get(field.name))
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Preset) if getattr(args, f.name) is not None}
    preset = replace(PRESETS[args.preset], **given)
    try:
        check_device(args.device)
        preset.check()
    except ValueError as error:
        parser.error(str(error))
    if args.seed < 0 or not 0 < args.val_fraction < 1:
        parser.error("--seed takes 0 or more, --val-fraction a share between 0 and 1")
    return args, preset


def load_data(args, preset):
    """Training and validation slices as ground truths x0 (N, 1, H, H) in mu on the CPU, and their fingerprint."""
    train, multiple = find_slices(args.data, "train"), preset.network().multiple
    if train[0].parent.name == "train_img":
        val = find_slices(args.data, "val")
    else:
        train, val = split_by_patient(train, args.val_fraction, args.seed)
    truths, prints = [], []
    for files in (train, val):
        files, hu = read_slices(files, multiple, args.strict)
        if preset.val_slices and len(truths) == 1:
            spread = np.linspace(0, len(hu) - 1, min(preset.val_slices, len(hu))).round().astype(int)
            files, hu = [files[i] for i in spread], hu[spread]
        prints.append(fingerprint(files, hu))
        mu = hu_to_mu(torch.from_numpy(hu))[:, None]
        full = Degradation().full
        bar = tqdm(range(0, len(mu), 8), desc="x0 = R(slice)", unit_scale=8, unit="slices", leave=False, disable=None)
        truths.append(torch.cat([full(mu[i:i + 8].to(args.device)).cpu() for i in bar]))
    return truths[0], truths[1], prints


def batches(count: int, batch: int, images: int):
    """(first, last) global sample indices of every batch: none crosses the end of a pass over the data."""
    first = 0
    while first < images:
        last = min(first + batch, (first // count + 1) * count, images)
        yield first, last
        first = last


def sample_at(index: int, count: int, seed: int, draws: int):
    """Slice, symmetry and uniform draws (draws,) of a global sample index: a function of (seed, index) alone."""
    order = np.random.default_rng([seed, 0, index // count]).permutation(count)
    rng = np.random.default_rng([seed, 1, index])
    return order[index % count], rng.integers(8), rng.random(draws)


def steps_of(preset: Preset, step: int) -> int:
    """Optimizer steps of a batch that starts after `step` of them: one, and one a hop once these have begun."""
    return 1 + preset.hops * (step + 1 > preset.epct_start)


def all_steps(preset: Preset, images: int, count: int) -> int:
    """Optimizer steps of the whole run."""
    step = 0
    for _ in batches(count, preset.batch, images):
        step += steps_of(preset, step)
    return step


def learning_rate(preset: Preset, step: int, steps: int, epoch: int) -> float:
    """Rate of the optimizer step that follows `step` of `steps`, in pass number `epoch` (from 0) over the data."""
    if preset.schedule == "step":
        return preset.lr * 0.8 ** (epoch // 25)
    if step < preset.warmup:
        return preset.lr * (step + 1) / preset.warmup
    return preset.lr * 0.5 * (1 + math.cos(math.pi * (step - preset.warmup) / max(1, steps - preset.warmup)))


def validation_due(preset: Preset, before: int, seen: int, images: int, count: int) -> bool:
    """Whether the batch that brought `before` to `seen` images ends at a validation."""
    if preset.val_every:
        return seen // preset.val_every > before // preset.val_every or seen == images
    return seen == images or (seen % count == 0 and (seen // count - 1) % 3 == 0)


@torch.no_grad()
def update_ema(ema: UNet, network: UNet, step: int, preset: Preset) -> None:
    """After optimizer step number `step`: every ema_every steps copy (before ema_start) or average."""
    if step % preset.ema_every == 0:
        keep = 0.0 if step < preset.ema_start else preset.ema
        for average, value in zip(ema.parameters(), network.parameters(), strict=True):
            average.lerp_(value, 1 - keep)


def validate(network, truths, preset, device):
    """Mean PSNR/SSIM (W3000/L500) of one-step and the preset's sampler at 18, 36 and 72 views, 18-view MSE, images."""
    was_training = network.training
    network.eval()
    degrade = Degradation()
    scores, mse, rows = {}, 0.0, []
    for n in (18, 36, 72):
        for i in range(0, len(truths), 4):
            x0 = truths[i:i + 4].to(device)
            y = degrade.project(x0, [n] * len(x0))
            x_T, dc = degrade.fbp(y, x0.shape[-1]), data_consistency(degrade, y, preset.dc)
            for name, consistent in {"one-step": None, preset.val_sampler: dc}.items():
                x0_hat, _ = SAMPLERS[name](denoiser(network), degrade, x_T, levels_for(n), dc=consistent)
                for metric, value in measure(x0_hat, x0, *WINDOWS[0]).items():
                    scores.setdefault(f"val{n}/{name}/{metric}", []).extend(value.tolist())
            if n == 18:
                mse += (x0_hat - x0).square().mean(dim=(1, 2, 3)).sum().item() / len(truths)
            if i == 0:
                rows.append(torch.cat([window(image[0], *WINDOWS[0]) for image in (x0, x_T, x0_hat)], dim=-1))
    network.train(was_training)
    return {k: float(np.mean(v)) for k, v in scores.items()} | {"val18/mse": mse}, torch.cat(rows, dim=-2)


def commit() -> str:
    """Git commit of this code, or "unknown" outside a repository."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def newest_state(out: Path, device: str):
    """The newest whole state of a run, or None; a damaged one is named and passed over."""
    for path in sorted(out.glob("state-*.pt"), reverse=True):
        try:
            return torch.load(path, map_location=device, weights_only=True)
        except Exception as error:  # a truncated zip fails in many ways, and an older state serves
            print(f"{path.name} cannot be read ({type(error).__name__}); trying the one before.", file=sys.stderr)
    return None


def main(argv=None):
    args, preset = parse(argv)
    out, device = args.out, args.device
    truths, val_truths, prints = load_data(args, preset)
    count = len(truths)
    images = preset.images or preset.epochs * count
    steps = all_steps(preset, images, count)
    run = {"preset": asdict(preset), "seed": args.seed, "data": prints}

    torch.manual_seed(args.seed)
    network = UNet(preset.network()).to(device)
    if args.init:
        weights, _ = load_checkpoint(args.init, device)
        if weights.config != network.config:
            sys.exit(f"{args.init} holds another architecture than --preset {args.preset}; repeat the flags that made "
                     "it.")
        network.load_state_dict(weights.state_dict())
        run["init"] = hashlib.sha256(args.init.read_bytes()).hexdigest()[:16]
    ema = copy.deepcopy(network).requires_grad_(False).train(preset.ema_dropout)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[preset.optimizer]
    optimizer = kind(network.parameters(), lr=preset.lr, weight_decay=preset.weight_decay, fused=True)
    degrade = Degradation()
    seen = step = 0
    best = math.inf

    out.mkdir(parents=True, exist_ok=True)
    state = newest_state(out, device)
    if state is None and any(out.iterdir()):
        if (out / "run.json").is_file() and json.loads((out / "run.json").read_text()) != json.loads(json.dumps(run)):
            sys.exit(f"{out} holds another run; give --out a new folder.")
        if not (out / "run.json").is_file():
            sys.exit(f"{out} is not empty and holds no run of train.py; give --out a new or empty folder.")
    if state is not None:
        if state["run"] != run:
            wrong = sorted(k for k in {*run, *state["run"]} if state["run"].get(k) != run.get(k))
            sys.exit(f"{out} holds a run with another {' and '.join(wrong)}; give --out a new folder, or the same "
                     "options to resume.")
        network.load_state_dict(state["network"])
        ema.load_state_dict(state["ema"])
        optimizer.load_state_dict(state["optimizer"])
        seen, step, best = state["seen"], state["step"], state["best"]
        print(f"Resuming {out} after {seen} of {images} images.")
    else:
        with atomic(out / "run.json") as partial:
            partial.write_text(json.dumps(run, indent=1))
    published = ema if preset.publish == "ema" else network
    about = {"preset": args.preset, "training": run, "commit": commit(), "torch": torch.__version__}
    scalars = Scalars(out, seen)

    def publish(name, **scores):
        save_checkpoint(out / name, published.state_dict(), network.config, {**about, "images": seen, **scores})

    def save():
        with atomic(out / f"state-{seen:09d}.pt") as partial:
            torch.save({"network": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                        "seen": seen, "step": step, "best": best, "run": run}, partial)
        publish("checkpoint.safetensors")
        for old in sorted(out.glob("state-*.pt"))[:-2]:
            old.unlink()

    network.train()
    bar = tqdm(total=images, initial=seen, unit="img", desc=args.preset, disable=None)
    bf16 = preset.precision == "bf16" and bf16_pays(device)
    if preset.precision == "bf16" and not bf16:
        print("This processor has no bf16 arithmetic: training in fp32.")
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)
    for first, last in batches(count, preset.batch, images):
        if first < seen:
            continue
        torch.manual_seed(args.seed + 1000003 * (step + 1))  # dropout
        samples = [sample_at(i, count, args.seed, 1 + 2 * preset.hops) for i in range(first, last)]
        order, symmetry, uniform = zip(*samples, strict=True)
        x0 = truths[list(order)].to(device)
        if preset.augment:
            x0 = torch.stack([torch.rot90(x.flip(-1) if g >= 4 else x, int(g % 4), (-2, -1))
                              for x, g in zip(x0, symmetry, strict=True)])
        if not preset.per_sample_levels:
            uniform = uniform[:1] * len(x0)  # one t and one t' a batch
        T = t = [measured_level(u[0], preset.focus) for u in uniform]
        x_t = degrade(x0, views_of(T))
        if preset.dc:
            dc = data_consistency(degrade, degrade.project(x0, views_of(T)), preset.dc)
        losses, norms = [], []
        for hop in range(steps_of(preset, step)):
            if hop > 0:
                if preset.rollout == "ema":
                    with torch.no_grad(), autocast:
                        x0_hat = ema(x_t, conditioning(t, x_t))
                if preset.dc:
                    x0_hat = dc(x0_hat, range(len(x0)))
                s = [denser_level(t_i, u[2 * hop - 1:2 * hop + 1], preset.jumps)
                     for t_i, u in zip(t, uniform, strict=True)]
                x_t, t = compose(degrade, x_t, t, x0_hat, s, preset.update), s
            with autocast:
                slice_losses, x0_hat = loss(network, x_t, t, x0, preset.loss)
            optimizer.zero_grad(set_to_none=True)
            slice_losses.mean().backward()
            norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), preset.clip))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(preset, step, steps, first // count)
            optimizer.step()
            step += 1
            update_ema(ema, network, step, preset)
            losses.append(slice_losses.detach().mean())

        before, seen = seen, last
        bar.update(last - first)
        scalars.train(seen, losses, norms, optimizer.param_groups[0]["lr"])
        if seen // 100 > before // 100 or seen == images:
            bar.set_postfix(scalars.flush(), refresh=False)
        if validation_due(preset, before, seen, images, count):
            scores, picture = validate(published, val_truths, preset, device)
            scalars.validation(seen, scores, picture)
            tqdm.write(f"{seen} images, PSNR: " + ", ".join(
                f"{k.removesuffix('/psnr')} {v:.2f} dB" for k, v in scores.items() if k.endswith("/psnr")))
            if scores["val18/mse"] < best:
                best = scores["val18/mse"]
                publish("best.safetensors", validation=scores)
        if seen // preset.save_every > before // preset.save_every or seen == images:
            save()
    bar.close()
    scalars.close()
    print(f"Done: {images} images. {out / 'checkpoint.safetensors'} holds the {preset.publish} weights, "
          f"{out / 'best.safetensors'} those of the best validation.")


if __name__ == "__main__":
    main()
