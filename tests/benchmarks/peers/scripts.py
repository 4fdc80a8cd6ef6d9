"""The work of our commands in scripts of a few lines, with the libraries alone: nothing is checked, kept or recorded."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.harness.measure import run_measured, until_first_line

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
table = pandas.read_csv(sys.argv[1], sep="\\t")
network = resnet18(spatial_dims=3, n_input_channels=1, num_classes=128, widen_factor=0.25).eval()
print("scans:", len(table), flush=True)
"""


def run_script(data: str, name: str) -> dict[str, float]:
    """Run a script in a new process, ``evaluate`` to its first line; return its CPU and wall-clock seconds."""
    cohort = Path(data, "startup", "cohort")
    scan = next(cohort.glob("sub-*/**/*.nii.gz"))
    with tempfile.TemporaryDirectory() as temporary:
        text, *arguments = {
            "export": (EXPORT, str(Path(temporary, "new.safetensors"))),
            "embed": (EMBED, str(scan), str(Path(temporary, "features.tsv"))),
            "evaluate": (EVALUATE, str(cohort / "participants.tsv")),
        }[name]
        command = [sys.executable, "-c", text, *arguments]
        if name == "evaluate":
            used, seconds = until_first_line(command, "scans: ")
            return {"cpu": used, "wall": seconds}
        return run_measured(command, stdout=subprocess.DEVNULL)
