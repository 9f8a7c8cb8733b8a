"""Every method by name: baselines and samplers. Needs no PyTorch before it runs."""

from models.baselines import BASELINES
from models.samplers import SAMPLERS

METHODS = {**BASELINES, **SAMPLERS}
LABELS = {name: method.label for name, method in METHODS.items()}
