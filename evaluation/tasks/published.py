"""AUCs published in the y-Aware paper, shown for reference next to the results of this code."""

from __future__ import annotations

SOURCE = "Dufumier et al., MICCAI 2021, arXiv:2106.08808"

# AUC of a linear probe on the frozen encoder after pretraining on 10,000 scans ("supervised": fully supervised), read off
# the paper's plot to about 0.001. Task -> number of training scans -> method -> AUC.
PUBLISHED: dict[str, dict[int, dict[str, float]]] = {
    "scz": {
        100: {"y-Aware": 0.737, "SimCLR": 0.586, "age supervision": 0.630, "Model Genesis": 0.600, "supervised": 0.690},
        300: {"y-Aware": 0.765, "SimCLR": 0.642, "age supervision": 0.679, "Model Genesis": 0.685, "supervised": 0.748},
        500: {"y-Aware": 0.796, "SimCLR": 0.678, "age supervision": 0.721, "Model Genesis": 0.721, "supervised": 0.777},
    },
    "bd": {
        100: {"y-Aware": 0.590, "SimCLR": 0.563, "age supervision": 0.571, "Model Genesis": 0.542, "supervised": 0.593},
        300: {"y-Aware": 0.649, "SimCLR": 0.580, "age supervision": 0.595, "Model Genesis": 0.582, "supervised": 0.630},
        500: {"y-Aware": 0.664, "SimCLR": 0.605, "age supervision": 0.626, "Model Genesis": 0.599, "supervised": 0.658},
    },
    "ad": {
        100: {"y-Aware": 0.916, "SimCLR": 0.841, "age supervision": 0.820, "Model Genesis": 0.886, "supervised": 0.934},
        200: {"y-Aware": 0.937, "SimCLR": 0.864, "age supervision": 0.880, "Model Genesis": 0.909, "supervised": 0.958},
        300: {"y-Aware": 0.952, "SimCLR": 0.880, "age supervision": 0.913, "Model Genesis": 0.909, "supervised": 0.965},
    },
}  # fmt: skip
