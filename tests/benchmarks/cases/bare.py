"""The work of our commands in scripts of a few lines, with the libraries alone: nothing is checked, kept or recorded."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import torch

from infra.processes.kept_memory import keep_freed_memory
from tests.benchmarks.cases.startup import until_first_line
from tests.benchmarks.harness.measure import measured, run_measured

# Read one scan, give its features to a table. MONAI's network has random weights.
EMBED = """
import sys
import nibabel, numpy, pandas, torch
from monai.networks.nets import resnet18
network = resnet18(spatial_dims=3, n_input_channels=1, num_classes=128, widen_factor=0.25).eval()
volume = numpy.asarray(nibabel.load(sys.argv[1]).dataobj, dtype=numpy.float32)
volume = torch.from_numpy((volume - volume.mean()) / volume.std())[None, None]
with torch.no_grad():
    features = network(volume)
pandas.DataFrame(features.numpy()).to_csv(sys.argv[2], sep="\\t")
"""
# Tell how much memory a training takes: DeepSpeed's own estimate.
PLAN = """
from monai.networks.nets import resnet18
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs_all_live
network = resnet18(spatial_dims=3, n_input_channels=1, num_classes=128, widen_factor=0.25)
estimate_zero2_model_states_mem_needs_all_live(network, num_gpus_per_node=2, num_nodes=1)
"""
# Write the weights of a network into a file.
EXPORT = """
import sys
from monai.networks.nets import resnet18
from safetensors.torch import save_file
save_file(resnet18(spatial_dims=3, n_input_channels=1, num_classes=128, widen_factor=0.25).state_dict(), sys.argv[1])
"""
# Come as far as the first scan of an evaluation: libraries, table and network.
EVALUATE = """
import sys
import nibabel, pandas, torch
from monai.networks.nets import resnet18
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
table = pandas.read_parquet(sys.argv[1])
network = resnet18(spatial_dims=3, n_input_channels=1, num_classes=128, widen_factor=0.25).eval()
print("scans:", len(table), flush=True)
"""


def script(data: str, name: str) -> dict[str, float]:
    """Run a script in a new process, ``evaluate`` to its first line; return its CPU and wall-clock seconds."""
    folder = Path(data, "startup")
    scan = next((folder / "cohort").glob("sub-*/**/*.nii.gz"))
    with tempfile.TemporaryDirectory() as temporary:
        text, *arguments = {
            "plan": (PLAN,),
            "export": (EXPORT, str(Path(temporary, "new.safetensors"))),
            "embed": (EMBED, str(scan), str(Path(temporary, "features.tsv"))),
            "evaluate": (EVALUATE, str(folder / "shards" / "scans.parquet")),
        }[name]
        command = [sys.executable, "-c", text, *arguments]
        if name == "evaluate":
            used, seconds = until_first_line(command, "scans: ")
            return {"cpu": used, "wall": seconds}
        return run_measured(command, stdout=subprocess.DEVNULL)


def further_scans(data: str, scans: int, channels_last: bool = False) -> dict[str, float]:
    """Measure MONAI's DenseNet121 on scans read with nibabel, one after another; the first is not counted."""
    from monai.networks.nets import DenseNet121

    keep_freed_memory()  # as yaware embed does
    found = sorted(Path(data, "full", "cohort").glob("sub-*/**/*.nii.gz"))[: scans + 1]
    network = DenseNet121(spatial_dims=3, in_channels=1, out_channels=512).eval()
    network.to(memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format)  # type: ignore[call-overload]

    def embed(path: Path) -> None:
        volume = np.asarray(nibabel.load(path).dataobj, dtype=np.float32)
        with torch.no_grad():
            network(torch.from_numpy((volume - volume.mean()) / volume.std())[None, None])

    embed(found[0])
    return measured(lambda: [embed(path) for path in found[1:]], len(found) - 1)
