"""astra-toolbox's projectors with the geometry, orientation and units of ours."""

import astra
import torch


class Astra:
    """The projector `kind` of astra-toolbox, such as line_fanflat or strip_fanflat, or cuda, for a `RadonFanbeam`."""

    def __init__(self, radon, kind: str):
        self.radon, n = radon, radon.resolution
        volume = astra.create_vol_geom(n, n)
        scan = astra.create_proj_geom("fanflat", radon.det_spacing, radon.det_count, -radon.angles.double().numpy(),
                                      radon.source_distance, radon.det_distance)
        projector_id = astra.create_projector(kind, scan, volume)
        self.image, self.sinogram = astra.data2d.create("-vol", volume), astra.data2d.create("-sino", scan)
        self.algorithms = {}
        for name, result in (("FP", "VolumeDataId"), ("BP", "ReconstructionDataId")):
            options = astra.astra_dict(name + ("_CUDA" if kind == "cuda" else ""))
            options |= {"ProjectorId": projector_id, "ProjectionDataId": self.sinogram, result: self.image}
            self.algorithms[name] = astra.algorithm.create(options)

    def _run(self, name, source, target, batch):
        results = []
        for one in batch.numpy():
            astra.data2d.store(source, one)
            astra.algorithm.run(self.algorithms[name])
            results.append(torch.from_numpy(astra.data2d.get(target)))
        return torch.stack(results)

    def forward(self, images):
        """(B, H, W) -> (B, views, bins), slice by slice."""
        return self._run("FP", self.image, self.sinogram, images)

    def fbp(self, sinogram):
        """(B, views, bins) -> (B, H, W) with our filter: astra-toolbox has none for a fan beam on the CPU."""
        return self._run("BP", self.sinogram, self.image, self.radon.filter_sinogram(sinogram))
