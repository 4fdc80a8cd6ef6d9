"""The work of our commands with the libraries alone, in our environment: nothing is checked, kept or recorded."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import torch

from infra.processes.kept_memory import keep_freed_memory
from tests.benchmarks.harness.measure import measured, run_measured

# Tell how much memory a training takes: DeepSpeed's own estimate.
PLAN = """
from monai.networks.nets import resnet18
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs_all_live
network = resnet18(spatial_dims=3, n_input_channels=1, num_classes=128, widen_factor=0.25)
estimate_zero2_model_states_mem_needs_all_live(network, num_gpus_per_node=2, num_nodes=1)
"""


def plan() -> dict[str, float]:
    """Run the script of an estimate in a new process; return its CPU and wall-clock seconds."""
    return run_measured([sys.executable, "-c", PLAN])


def further_scans(data: str, scans: int, channels_last: bool = False) -> dict[str, float]:
    """Measure MONAI's DenseNet121 on scans read with nibabel, one after another; the first is not counted."""
    from monai.networks.nets import DenseNet121

    keep_freed_memory()  # as yaware embed does
    found = sorted(Path(data, "full", "cohort").glob("sub-*/**/*.nii.gz"))[: scans + 1]
    network = DenseNet121(spatial_dims=3, in_channels=1, out_channels=512).eval()
    network.to(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)  # type: ignore[call-overload]

    spent = [0.0]

    def embed(path: Path) -> None:
        used = time.process_time()
        volume = np.asarray(nibabel.load(path).dataobj, dtype=np.float32)
        volume = (volume - volume.mean()) / volume.std()
        spent[0] += time.process_time() - used
        with torch.no_grad():
            network(torch.from_numpy(volume)[None, None])

    embed(found[0])
    spent[0] = 0.0
    seconds = measured(lambda: [embed(path) for path in found[1:]], len(found) - 1)
    reading = spent[0] / (len(found) - 1)
    return {**seconds, "part_reading": reading, "part_features": seconds["cpu"] - reading}
