"""Features of single scans from an exported encoder, preprocessing included."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data_pipeline.volume.errors import BadScan
from data_pipeline.volume.grid import Grid
from data_pipeline.volume.intensity import zscore
from data_pipeline.volume.load import load_volume
from data_pipeline.volume.preparation import DEFAULT_PREPARATION, scale_factor
from infra.errors import UserError
from infra.files import atomic_write


def embed_files(
    network: nn.Module, preprocessing: dict[str, Any], scans: Sequence[Path], tiv: Sequence[float] | None = None
) -> list[tuple[Path, NDArray[np.float32]]]:
    """(path, features (F,) float32) of NIfTI files; ``tiv`` in ml, one a scan, where the encoder's data were scaled by it."""
    grid, scaling = Grid.from_dict(preprocessing["grid"]), preprocessing.get("scaling") or "none"
    if scaling == "tiv" and (tiv is None or len(tiv) != len(scans)):
        raise UserError(f"this encoder's scans were scaled by tiv; give {len(scans)} values in ml with --tiv")
    prepared = {name: preprocessing.get(name) or usual for name, usual in DEFAULT_PREPARATION.items()}
    rows = []
    for number, path in enumerate(scans):
        try:
            factor = scale_factor(scaling, {"tiv": tiv[number] if tiv else None})
            volume = load_volume(path, grid, factor=factor, **prepared)
        except BadScan as error:
            raise UserError(f"{path}: {error}") from None
        device = next(network.parameters()).device
        with torch.no_grad():
            features = network(torch.from_numpy(zscore(volume))[None, None].to(device))[0]
        rows.append((path, features.cpu().numpy()))
    return rows


def write_table(rows: Sequence[tuple[Path, NDArray[np.float32]]], out: Path | None) -> None:
    """A .tsv: the scan's path, then its features."""
    head = "\t".join(["scan", *(f"f{n}" for n in range(len(rows[0][1])))])
    lines = [head, *("\t".join([str(path), *(f"{v:.6g}" for v in np.asarray(values))]) for path, values in rows)]
    text = "\n".join(lines) + "\n"
    if out is None:
        sys.stdout.write(text)
        return
    with atomic_write(out, "w") as stream:
        stream.write(text)
