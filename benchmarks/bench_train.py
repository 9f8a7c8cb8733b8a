"""Throughput of train.py and of the plainest loop of the same mathematics: `python -m benchmarks.bench_train`.

Both train the same network on the same slices with the published EPCT: two optimizer steps a batch, the EMA's estimate
between them. The plainest loop is eager and fp32, takes batches of 4, makes x0 anew in each batch, and its D has the
redundant full-view pass of the published code.
"""

import copy
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

import train
from datasets.loader import batches, load_slices
from models.cost import cost
from models.degradation import Degradation
from models.levels import LEVELS
from models.presets import PRESETS
from models.schedule import forward_calls, update_ema
from models.unet import UNet
from utils.cli import Parser, script
from utils.device import bf16_pays, chosen_device, peak_flops
from utils.progress import Progress

GOALS = {"cpu": 1.2, "cuda": 6.0}
PAPER_IMAGES = 40 * 4869


def plainest(preset, slices: torch.Tensor, images: int, device: str) -> float:
    """Images a second of the plainest loop; the first two batches are warm-up."""
    torch.manual_seed(0)
    network = UNet(preset.network()).to(device).train()
    ema = copy.deepcopy(network)
    optimizer = torch.optim.Adam(network.parameters(), lr=preset.lr)
    degrade, step, start, warm = Degradation(official=True), 0, 0.0, 2

    def descend(x, t):
        nonlocal step
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(network(x, torch.full((len(x),), float(t), device=device)), x0)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), preset.clip)
        optimizer.step()
        step += 1
        update_ema(ema, network, step, preset)
        return loss.item()

    spans = list(batches(len(slices), 4, images + warm * 4))
    for number, (first, last) in enumerate(Progress(spans, desc="Plainest loop")):
        if number == warm:
            start, counted_from = time.perf_counter(), first
        x0 = degrade.full(slices[torch.arange(first, last) % len(slices)].to(device))
        t = int(torch.randint(8, ()))
        x_t = degrade(x0, LEVELS[t])
        descend(x_t, t)
        with torch.no_grad():
            x0_hat = ema(x_t, torch.full((len(x_t),), float(t), device=device))
        s = int(torch.randint(max(t, 1), ()))
        descend(x_t - degrade(x0_hat, LEVELS[t]) + degrade(x0_hat, LEVELS[s]) if t else x0_hat, s)
    return (spans[-1][1] - counted_from) / (time.perf_counter() - start)  # loss.item() has waited for the device


def ours(preset, data: str, images: int, device: str) -> float:
    """Images a second of train.py, as it measures them itself, after a warm-up of as many images."""
    rounded = -(-images // 100) * 100  # train.py reports every hundred images
    fields = replace(preset, images=2 * rounded, val_every=2 * rounded, val_slices=1, save_every=10**9)
    flags = [f"--{'no-' * (value is False)}{name.replace('_', '-')}{'' if type(value) is bool else f'={value}'}"
             for name, value in asdict(fields).items()]
    with tempfile.TemporaryDirectory() as folder:
        train.main(["--data", data, "--out", f"{folder}/run", "--device", device, *flags])
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    rates = [(line["images"], line["images_per_second"]) for line in lines if "images_per_second" in line]
    seconds = sum(100 / rate for seen, rate in rates if seen > rounded)
    return sum(seen > rounded for seen, _ in rates) * 100 / seconds


@script
def main(argv=None) -> None:
    parser = Parser("python -m benchmarks.bench_train", __doc__)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="whose network (default: tiny, on a GPU base)")
    parser.add_argument("--data", default="datasets/sample", help="folder with train_img/ and val_img/")
    parser.add_argument("--images", type=int, default=100, help="to time in each loop")
    parser.add_argument("--batch", type=int, help="of our loop; the plainest has 4 (default: 4, on a GPU 32)")
    parser.add_device()
    args = parser.parse_args(argv)
    args.device = chosen_device(args.device)
    args.preset = args.preset or ("tiny" if args.device == "cpu" else "base")
    args.batch = args.batch or (4 if args.device == "cpu" else 32)
    row = PRESETS[args.preset]
    network = {name: getattr(row, name) for name in ("width", "dropout", "stem", "residual", "shift", "scale",
                                                     "zero_init")}
    preset = replace(PRESETS["paper"], **network, epct_start=0, per_sample_levels=True, batch=args.batch,
                     precision="bf16" if bf16_pays(args.device) else "fp32")
    (_, slices), *_ = load_slices(args.data, 0.1, 1, 0, preset.network().multiple, False)
    flops = cost(preset.network(), slices.shape[-1], preset.precision)[1]
    top = peak_flops(args.device)
    rates = {"plainest loop": plainest(preset, slices, args.images, args.device),
             "train.py": ours(preset, args.data, args.images, args.device)}
    for name, rate in rates.items():
        used = f", MFU {rate * forward_calls(preset, 2) * flops / top:.1%}" if top else ""
        print(f"{name:14} {rate:8.2f} images/s{used}, {PAPER_IMAGES / rate / 3600:.1f} h for the published budget")
    goal = GOALS[torch.device(args.device).type]
    print(f"train.py is {rates['train.py'] / rates['plainest loop']:.2f}x as fast (goal: {goal}x)")


if __name__ == "__main__":
    main()
