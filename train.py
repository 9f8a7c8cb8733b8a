#!/usr/bin/env python3
"""Train CvG-Diff: EPCT on a folder of HU slices. The same command resumes. See `python train.py --help`.

Several GPUs: `torchrun --nproc-per-node 8 train.py ...`; the batch is shared out and the result the same to rounding.
"""

import argparse
import copy
import hashlib
import math
import sys
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from datasets.loader import ahead, batches, load_batch, load_slices, start_angle
from datasets.slices import find_slices, read_slices
from models.checkpoint import load_checkpoint, save_checkpoint
from models.cost import cost, describe
from models.degradation import FULL_VIEWS, LEVELS, Degradation, level_of
from models.dropout import seed_dropout
from models.epct import begin, hop, loss, network_input
from models.presets import COMPUTATION, PRESETS, Preset
from models.samplers import SAMPLERS
from models.schedule import budget, forward_calls, inputs_of, learning_rate, update_ema, validation_due
from models.unet import UNet
from models.validation import validate
from utils import distributed, state
from utils.device import bf16_pays, check_device, compiled, default_device, memory, memory_advice, peak
from utils.nonfinite import NonFinite
from utils.scalars import Scalars, Step

CHOICES = {"optimizer": ("adam", "adamw"), "schedule": ("step", "cosine"), "precision": ("fp32", "bf16", "fp64"),
           "publish": ("raw", "ema"), "update": ("shift", "naive"), "loss": ("mse", "rmse", "charbonnier", "spectral"),
           "conditioning": ("level", "log-views"), "rollout": ("ema", "own"),
           "residual_channel": ("two-pass", "anchored"), "val_sampler": tuple(SAMPLERS)}


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
    parser.add_argument("--accept-new-data", action="store_true", help="resume although the slices have changed")
    parser.add_argument("--dry-run", action="store_true", help="print configuration and cost, and stop")
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


def ground_truths(mu: torch.Tensor, device: str, dtype: torch.dtype) -> torch.Tensor:
    """x0 = R(slice), mu (N, 1, H, W), on the CPU."""
    full = Degradation().full
    bar = tqdm(range(0, len(mu), 8), desc="x0 = R(slice)", unit_scale=8, unit="slices", leave=False, disable=None)
    return torch.cat([full(mu[i:i + 8].to(device, dtype)).cpu() for i in bar]) if len(mu) else mu


def optimize(optimizer, network, clip: float, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One step with clipped gradients: (gradient norm, 1.0 where it is not finite, and then nothing changes)."""
    norm = torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
    optimizer.found_inf = (~norm.isfinite()).float()  # fused optimizers read it on the device: nobody waits
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    return norm.detach(), optimizer.found_inf


def with_channels(state: dict[str, torch.Tensor], channels: int) -> dict[str, torch.Tensor]:
    """Weights whose first layer takes so many channels; it ignores those it did not have."""
    first = state["conv_in.weight"]
    return state | {"conv_in.weight": F.pad(first, (0, 0, 0, 0, 0, channels - first.shape[1]))}


def build(args, preset: Preset, device: str, dtype: torch.dtype, run: dict):
    """Network, its EMA and optimizer at the start of a run."""
    torch.manual_seed(args.seed)
    network = UNet(preset.network()).to(device, dtype)
    if args.init:
        weights, _ = load_checkpoint(args.init, device)
        free = ["conditioning", "dropout", "zero_init"]  # these have no weights of their own,
        if weights.config.channels == 1:
            free += ["channels", "residual_channel"]  # and a residual channel can start from none
        if replace(weights.config, **{name: getattr(preset, name) for name in free}) != network.config:
            sys.exit(f"{args.init} holds another architecture than --preset {args.preset}; repeat the flags that made "
                     "it.")
        network.load_state_dict(with_channels(weights.state_dict(), network.conv_in.in_channels))
        run["init"] = hashlib.sha256(args.init.read_bytes()).hexdigest()[:16]
    if preset.channels_last and torch.device(device).type == "cuda":
        network.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(network).requires_grad_(False).train(preset.ema_dropout)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[preset.optimizer]
    return network, ema, kind(network.parameters(), lr=preset.lr, weight_decay=preset.weight_decay, fused=True)


def restore(args, run: dict, rank: int, device: str) -> dict | None:
    """The state to go on from, or None at the start of a run; exits where OUT holds another run."""
    out, found = args.out, None
    if rank == 0:
        path, found = state.newest_state(out, device)
        before = state.described_run(out) or (found and found["run"])  # run.json knows of data accepted since
        if before and "preset" in before:  # a field younger than that run has the value it had by default
            before["preset"] = Preset().mathematics() | before["preset"]
        state.check_run(out, run, before, args.accept_new_data)
        if before and found is None:
            print(f"{out} holds no whole state: the run begins again.")
        if found and found.get("versions", state.versions()) != state.versions():
            print("Other package versions than before: the results may differ in their last bits.")
        if found and found["commit"] != state.commit():
            print(f"The run was begun at commit {found['commit']} and goes on with the code of {state.commit()}.")
        state.describe_run(out, run)
    path = distributed.gather(path if rank == 0 else None)[0]
    return found if rank == 0 or path is None else torch.load(path, map_location=device, weights_only=True)


def main(argv=None):
    args, preset = parse(argv)
    if args.dry_run:
        files = find_slices(args.data, "train")
        size = read_slices(files[:1], preset.network().multiple, True)[1].shape[-1]
        return print(describe(preset, len(files), size, args.device))

    out, (rank, processes, device) = args.out, distributed.start(args.device)
    cuda = torch.device(device).type == "cuda"
    dtype = torch.float64 if preset.precision == "fp64" else torch.float32
    (names, slices), (_, val_slices), prints = load_slices(args.data, args.val_fraction, preset.val_slices, args.seed,
                                                           preset.network().multiple, args.strict)
    truths = slices.to(dtype) if preset.deforms else ground_truths(slices, device, dtype)
    val_truths = ground_truths(val_slices[rank::processes], device, dtype)
    count = len(names)
    images, steps, _ = budget(preset, count)
    run = {"preset": preset.mathematics(), "seed": args.seed, "data": prints}
    network, ema, optimizer = build(args, preset, device, dtype, run)
    seen, step, best, skipped = 0, 0, math.inf, 0
    if found := restore(args, run, rank, device):
        network.load_state_dict(found["network"])
        ema.load_state_dict(found["ema"])
        optimizer.load_state_dict(found["optimizer"])
        seen, step, best, skipped = found["seen"], found["step"], found["best"], found.get("skipped", 0)
        print(f"Resuming {out} after {seen} of {images} images.")
    published = ema if preset.publish == "ema" else network
    about = {"preset": args.preset, "training": run, "commit": state.commit(), "torch": torch.__version__}

    def publish(name, **scores):
        if rank == 0:
            with state.full_disk(out):
                save_checkpoint(out / name, published.state_dict(), network.config, {**about, "images": seen, **scores})

    def save():
        """No state of a random generator is kept: everything random is a function of seed, step and sample index."""
        if rank == 0:
            state.save_state(out, seen, {
                "network": network.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                "seen": seen, "step": step, "best": best, "skipped": watch.total, "run": run,
                "computation": {name: getattr(preset, name) for name in COMPUTATION},
                "geometry": {"size": truths.shape[-1], "levels": LEVELS, "full_views": FULL_VIEWS},
                "versions": state.versions(), "commit": about["commit"]})
            publish("checkpoint.safetensors")

    bf16 = preset.precision == "bf16" and bf16_pays(device)
    if preset.precision == "bf16" and not bf16:
        print("This processor has no bf16 arithmetic: training in fp32.")
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)
    model, average = network.train(), ema
    if preset.compile:
        x, t = truths[:1].to(device).expand(-1, preset.channels, -1, -1), torch.zeros(1, device=device)
        model, average = compiled(network, x, t), compiled(ema, x, t)
    if processes > 1:
        model = DistributedDataParallel(model)
    load = partial(load_batch, truths, seed=args.seed, preset=preset, rank=rank, processes=processes, pin=cuda)
    spans = [span for span in batches(count, preset.batch, images) if span[0] >= seen]
    watch, scalars = NonFinite(preset.patience, skipped), Scalars(out, seen, writes=rank == 0)
    top = peak(device)
    flops = cost(preset.network(), truths.shape[-1], preset.precision)[1] if top else 0
    told = failed = 0
    psnr = {}
    bar = tqdm(total=images, initial=seen, unit="img", desc=args.preset, disable=None if rank == 0 else True)

    with memory_advice(preset.batch, processes, preset.accumulate), distributed.Stop() as stop, bar:
        for (first, last), parts, weight in ahead(load, spans):
            degrade = Degradation(start_angle(first, args.seed, preset.starts))
            chains = [begin(part, degrade, preset, args.seed, device) for part in parts]
            inputs, taken = inputs_of(preset, step), []
            for number in range(inputs):
                whole = number + 1 == inputs or not preset.combined  # whether an optimizer step follows this input
                if not taken:
                    optimizer.zero_grad(set_to_none=True)
                for chain in chains:
                    if number > 0:
                        if preset.rollout == "ema":
                            seed_dropout(ema, [(args.seed, step, i, 1) for i in chain.part.indices])
                            with torch.no_grad(), autocast:
                                chain.x0_hat = average(*network_input(chain, average, preset))
                        hop(chain, number, preset)
                    seed_dropout(network, [(args.seed, step, i, 0) for i in chain.part.indices])
                    with distributed.exchange(model, last=whole and chain is chains[-1]):
                        with autocast:
                            x0_hat = model(*network_input(chain, model, preset))
                            losses = loss(x0_hat, chain.x0, preset.loss, preset.scale)
                        (losses.sum() * weight / (inputs if preset.combined else 1)).backward()
                    chain.x0_hat = x0_hat.detach()
                    levels = [LEVELS[level_of(n)] for n in chain.views]
                    taken.append(([number] * len(losses), chain.part.slices, levels, losses.detach()))
                if not whole:
                    continue
                lr = learning_rate(preset, step, steps, first // count)
                norm, bad = optimize(optimizer, network, preset.clip, lr)
                step += 1
                update_ema(ema, network, step, preset)
                *which, losses = zip(*taken, strict=True)
                done, taken = Step(*(sum(part, []) for part in which), torch.cat(losses), norm, bad), []
                watch.record(done)
                scalars.record(done)

            before, seen = seen, last
            bar.update(last - first)
            flush = seen // 100 > before // 100 or seen == images
            failed = (flush or not cuda) and watch.check()
            if flush:
                values = scalars.flush(seen, lr, watch.total)
                shown = {k: f"{values[k]:.2e}" for k in ("loss/restore", "lr") if k in values} | psnr
                if top:
                    rate = forward_calls(preset, inputs_of(preset, step)) * flops * values["images_per_second"]
                    shown["MFU"] = f"{rate / top / processes:.0%}"
                bar.set_postfix({**shown, "GiB": f"{memory(device):.1f}"}, refresh=False)
            with scalars.paused():
                if validation_due(preset, before, seen, images, count):
                    scores, picture = validate(published, val_truths, preset, device)
                    scalars.write(seen, scores, picture)
                    decibels = {k.removesuffix("/psnr"): v for k, v in scores.items() if k.endswith("/psnr")}
                    bar.write(f"{seen} images, PSNR: " + ", ".join(f"{k} {v:.2f} dB" for k, v in decibels.items()))
                    psnr = {"dB": "/".join(f"{v:.1f}" for k, v in decibels.items() if k.endswith(preset.val_sampler))}
                    if scores["val18/mse"] < best:
                        best = scores["val18/mse"]
                        publish("best.safetensors", validation=scores)
                told = stop.agreed()
                if seen // preset.save_every > before // preset.save_every or seen == images or told or failed:
                    save()
            if told or failed:
                break
    scalars.close()
    if failed:
        blamed = set().union(*distributed.gather(watch.blamed)) or set().union(*distributed.gather(watch.present))
        sys.exit(f"The loss or its gradient was not finite in {preset.patience} optimizer steps in a row, which were "
                 f"skipped; the state after {seen} images is saved. Slices in them: "
                 + ", ".join(sorted(names[i] for i in blamed)) + ".")
    distributed.finish()
    if told:
        print(f"Stopped by signal {told} after {seen} of {images} images: saved; the same command resumes.")
        sys.exit(128 + told)
    print(f"Done: {images} images. {out / 'checkpoint.safetensors'} holds the {preset.publish} weights, "
          f"{out / 'best.safetensors'} those of the best validation.")


if __name__ == "__main__":
    main()
