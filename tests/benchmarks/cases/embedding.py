"""CPU seconds of a further scan of ``yaware embed``: as the command runs, and its two parts one after another."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from infra.processes.kept_memory import keep_freed_memory
from pretrain.weights.embedding import embed_table
from pretrain.weights.encoder import Encoder
from pretrain.weights.scan_source import FileSource
from tests.benchmarks.cases.startup import whole
from tests.benchmarks.harness.measure import measured


def further_scans(data: str, scans: int) -> dict[str, float]:
    """Return the seconds of a further scan of DenseNet121 at full size: those of ``scans`` + 1 less those of one, shared."""
    found = sorted(Path(data, "full", "cohort").glob("sub-*/**/*.nii.gz"))[: scans + 1]
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary, "run")
        whole([
            "pretrain", "--config", "paper-bhb10k", f"--data.shards={Path(data, 'full', 'shards')}", "--batch.global=2",
            "--batch.micro=null", "--train.epochs=null", "--train.steps=0", "--monitor.every_epochs=0", "--readouts.fit=false",
            f"--run.output={run}", f"--run.tracking_uri=sqlite:///{temporary}/mlflow.db",
        ])  # fmt: skip
        out = str(Path(temporary, "new.tsv"))
        for _ in range(2):  # the first time files may come from the disk
            one = whole(["embed", str(run), str(found[0]), "--out", out])
            Path(out).unlink()
        all_of = whole(["embed", str(run), *map(str, found), "--out", out])
        alone = one_after_another(run, [str(path) for path in found])
    cpu, wall = ((many - single) / (len(found) - 1) for many, single in zip(all_of, one, strict=True))
    return {"cpu": cpu, "wall": wall, "start": one[1], "start_cpu": one[0], **alone}


def one_after_another(run: Path, scans: list[str]) -> dict[str, float]:
    """Embed scans without a reader in the background; return the CPU seconds of reading one, and of its features."""
    encoder, spent = Encoder.from_pretrained(run), [0.0]

    class Timed(FileSource):
        def read(self, position: int) -> NDArray[np.float32]:
            used = time.process_time()
            voxels = super().read(position)
            spent[0] += time.process_time() - used
            return voxels

    def embed(paths: list[str]) -> dict[str, float]:
        source = Timed(paths, encoder.preprocessing)
        return measured(lambda: embed_table(encoder.network, source, workers=0, progress=False), len(paths))

    keep_freed_memory()  # as yaware embed does
    embed(scans[:1])  # what the first scan needs beside
    spent[0] = 0.0
    cpu, reading = embed(scans[1:])["cpu"], spent[0] / (len(scans) - 1)
    return {"beside_reading and checking a scan": reading, "beside_its features, not at the same time": cpu - reading}
