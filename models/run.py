"""A run of train.py: its data, its progress, and what it prints, logs and writes."""

import math
from functools import partial

import torch

from datasets.leakage import together
from datasets.loader import batches, load_batch, load_slices
from models.checkpoint import load_checkpoint, save_checkpoint
from models.cost import cost, seconds_an_image
from models.levels import FULL_VIEWS, LEVELS
from models.presets import COMPUTATION, Preset, of_this_version
from models.schedule import budget, forward_calls, inputs_of
from models.training import Trainer, ground_truths
from models.validation import validate
from utils import distributed, run_folder, state
from utils.device import bf16_pays, memory, peak_flops, resident
from utils.errors import Stopped
from utils.files import hash16
from utils.nonfinite import NonFinite
from utils.progress import Progress
from utils.scalars import Scalars, Step

SHORT = 50  # batches: a run of so few is over before it is known how long it takes


class Run:
    """A training from its first image or from where OUT's state left off, in this process of one or more."""

    def __init__(self, args, preset: Preset):
        """args: the arguments of train.py. Raises CvGDiffError's kinds for data or an OUT that cannot be used."""
        self.out, self.preset = args.out, preset
        self.rank, self.processes, self.device = distributed.start(args.device)
        self.description = {"preset": preset.mathematics(), "seed": args.seed}
        self.description |= {"init": hash16(args.init)} if args.init else {}
        before, found = self._find()
        (self.names, slices), (_, val_slices), fingerprints, (traces, _) = load_slices(
            args.data, args.val_fraction, preset.val_slices, args.seed, preset.network().multiple, args.strict,
            args.trust_hu, args.patients_from)
        self.description["data"] = fingerprints
        self.provenance = {"preset": args.preset, "training": self.description, "commit": state.commit(),
                           "torch": torch.__version__}
        if self.rank == 0:
            self._claim(before, found, args.accept_new_data)
        self.truths, self.val_truths = (ground_truths(mu, self.device, preset.dtype)
                                        for mu in (slices, val_slices[self.rank::self.processes]))
        self.truths = resident(self.truths, self.device)
        self.count, self.size = len(self.names), self.truths.shape[-1]
        self.images, self.steps, _ = budget(preset, self.count)
        self.trainer = Trainer(preset, seed=args.seed, steps=self.steps, device=self.device, processes=self.processes,
                               init=args.init)
        earlier = ([load_checkpoint(args.init)[1]] if args.init else []) + ([found] if found else [])
        self.provenance |= {"size": self.size, "traces": together(traces, *(one.get("traces") for one in earlier))}
        self.seen, self.best, skipped = 0, math.inf, 0
        if found:
            self.trainer.load(found)
            self.seen, self.best, skipped = found["seen"], found["best"], found.get("skipped", 0)
            print(f"Resuming {self.out} after {self.seen} of {self.images} images.")
            self._publish("checkpoint.safetensors")  # the run may have ended between its last state and this file
        self.watch = NonFinite(preset.patience, skipped)
        self.scalars = Scalars(self.out, self.seen, writes=self.rank == 0)
        self.load = partial(load_batch, self.truths, seed=args.seed, preset=preset, rank=self.rank,
                            processes=self.processes, pin=self.truths.device.type != torch.device(self.device).type)
        self.bar = Progress(total=self.images, initial=self.seen, unit="img", desc=args.preset, disable=self.rank > 0)
        self.psnr = {}

    def _find(self) -> tuple[dict | None, dict | None]:
        """(description of the run that OUT holds, state to go on from), None at the start; before slices are read.

        Raises RunFolderError where OUT holds another run.
        """
        before = path = found = None
        if self.rank == 0:
            run_folder.lock(self.out)
            path, found = state.newest_state(self.out)
            before = run_folder.described(self.out) or (found and found["run"])  # run.json knows of data accepted since
            if before and isinstance(before.get("preset"), dict):
                before |= {"preset": of_this_version(before["preset"])}
            data = {"data": before.get("data")} if before else {}
            run_folder.check(self.out, self.description | data, "run of train.py", before=before)
        path = distributed.gather(path)[0]
        return before, torch.load(path, map_location="cpu", weights_only=True) if self.rank and path else found

    def _claim(self, before: dict | None, found: dict | None, accept_new_data: bool) -> None:
        """Make OUT this run's, and say what is not as it was. Raises RunFolderError where its slices changed."""
        run_folder.claim(self.out, self.description, "run of train.py", before=before,
                         accept=("data",) if accept_new_data else (),
                         hints={"data": "the slices changed since it was begun. Restore them, give --out a new "
                                        "folder, or go on with what is there now by --accept-new-data."})
        if before and before.get("data") != self.description["data"]:
            print("The slices changed since the run was begun; going on with what is there now.")
        if before and found is None:
            print(f"{self.out} holds no whole state: the run begins again.")
        if found and found.get("versions", state.versions()) != state.versions():
            print("Other package versions than before: the results may differ in their last bits.")
        if found and found["commit"] != self.provenance["commit"]:
            print(f"The run was begun at commit {found['commit']} and goes on with the code of "
                  f"{self.provenance['commit']}.")

    def announce(self) -> None:
        """Say what there is to do, and how long it will take where a measurement of that is short beside it."""
        if self.rank > 0:
            return
        if self.preset.precision == "bf16" and not bf16_pays(self.device):
            print("This processor has no bf16 arithmetic: training in fp32.")
        batches, time, size = len(self.spans()), "", sum(p.numel() for p in self.trainer.network.parameters())
        if batches > SHORT:
            hours = seconds_an_image(self.preset, self.size, self.device, self.processes) / 3600 * (
                budget(self.preset, self.count)[2] / forward_calls(self.preset, 1 + self.preset.hops)
                * (1 - self.seen / self.images))
            time = f", about {hours:.1f} h" if hours >= 1 else f", about {math.ceil(60 * hours)} min"
        print(f"{size / 1e6:.1f} million parameters, {self.device}, "
              f"{self.processes} process(es), {self.count} slices of {self.size} x {self.size}: {batches} batches and "
              f"{self.steps - self.trainer.step} optimizer steps to do{time}.")

    def spans(self) -> list[tuple[int, int]]:
        """(first, last) of the batches that are still to do."""
        return [span for span in batches(self.count, self.preset.batch, self.images) if span[0] >= self.seen]

    def record(self, steps: list[Step], seen: int) -> None:
        """Note what a batch left behind, without waiting for the device."""
        for step in steps:
            self.watch.record(step)
            self.scalars.record(step)
        self.bar.update(seen - self.seen)
        self.seen = seen

    def report(self, before: int) -> bool:
        """Log and show the means of every hundred images; whether too many steps in a row were not finite."""
        due = self.seen // 100 > before // 100 or self.seen == self.images
        failed = (due or self.device == "cpu") and self.watch.check()
        if due:
            values = self.scalars.flush(self.seen, self.trainer.lr, self.watch.total)
            shown = {k: f"{values[k]:.2e}" for k in ("loss/restore", "lr") if k in values} | self.psnr
            if peak := peak_flops(self.device):
                calls = forward_calls(self.preset, inputs_of(self.preset, self.trainer.step))
                flops = calls * cost(self.preset.network(), self.size, self.preset.precision)[1]
                shown["MFU"] = f"{flops * values['images_per_second'] / self.processes / peak:.0%}"
            self.bar.set_postfix({**shown, "GiB": f"{memory(self.device):.1f}"}, refresh=False)
        return failed

    def validate(self) -> None:
        """Measure the published weights, log it, and keep those with the best 18-view error."""
        with self.scalars.paused():
            scores, picture = validate(self.trainer.published, self.val_truths, self.preset, self.device)
            self.scalars.write(self.seen, scores, picture)
            psnr = {k.removesuffix("/psnr"): v for k, v in scores.items() if k.endswith("/psnr")}
            self.bar.write(f"{self.seen} images, PSNR: " + ", ".join(f"{k} {v:.2f} dB" for k, v in psnr.items()))
            self.psnr = {"dB": "/".join(f"{v:.1f}" for k, v in psnr.items() if k.endswith(self.preset.val_sampler))}
            if scores["val18/mse"] < self.best:
                self.best = scores["val18/mse"]
                self._publish("best.safetensors", validation=scores)

    def save(self) -> None:
        """Write the state and what is published. Everything random is a function of seed, step and sample index."""
        if self.rank > 0:
            return
        with self.scalars.paused():
            state.save_state(self.out, self.seen, {
                **self.trainer.state_dict(), "seen": self.seen, "best": self.best, "skipped": self.watch.total,
                "run": self.description, "traces": self.provenance["traces"],
                "computation": {name: getattr(self.preset, name) for name in COMPUTATION},
                "geometry": {"size": self.size, "levels": LEVELS, "full_views": FULL_VIEWS},
                "versions": state.versions(), "commit": self.provenance["commit"]})
            self._publish("checkpoint.safetensors")

    def _publish(self, name: str, **scores) -> None:
        if self.rank == 0:
            save_checkpoint(self.out / name, self.trainer.published.state_dict(), self.trainer.network.config,
                            {**self.provenance, "images": self.seen, **scores})

    def finish(self, signal: int, failed: bool) -> None:
        """Say how the run ended. Raises Stopped where it did not reach its end."""
        self.scalars.close()
        if failed:
            blamed, present = (set().union(*distributed.gather(found)) for found in (self.watch.blamed,
                                                                                     self.watch.present))
            raise Stopped(f"The loss or its gradient was not finite in {self.preset.patience} optimizer steps in a "
                          f"row, which were skipped; the state after {self.seen} images is saved. Slices in them: "
                          + ", ".join(sorted(self.names[i] for i in blamed or present)) + ".")
        distributed.finish()
        if signal:
            raise Stopped(f"Stopped by signal {signal} after {self.seen} of {self.images} images: saved; the same "
                          "command resumes.", status=128 + signal)
        print(f"Done: {self.images} images. {self.out / 'checkpoint.safetensors'} holds the {self.preset.publish} "
              f"weights, {self.out / 'best.safetensors'} those of the best validation.")
