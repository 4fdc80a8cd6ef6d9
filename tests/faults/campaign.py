"""``python -m tests.faults.campaign --inputs 1000``: change files at random and print what became of them.

The inputs are those of ``test_fuzz_files`` (manifests, encoders' files, members of shards, pipes in place of files), of
``test_random_tables`` (participants' tables) and of ``test_verify`` (flipped bits). The first input that breaks a promise ends
the command with its traceback.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings

from data_pipeline.shards.build import build_shards
from data_pipeline.shards.verify import find_problems
from data_pipeline.storage.manifest import Manifest
from data_pipeline.volume.decoders import DECODERS
from tests.cohorts import write_cohort
from tests.data_pipeline.cohort import test_random_tables as tables
from tests.faults import test_fuzz_files as files


def fuzz(test: Callable[..., None], *arguments: object) -> tuple[Counter[str], str]:
    """Run a test of ``test_fuzz_files``; return how its inputs ended, and the longest time and the most memory."""
    files.ENDS.clear()
    files.MOST.update(seconds=0.0, bytes=0)
    test(*arguments)
    most = f"at most {files.MOST['seconds']:.1f} s and {files.MOST['bytes'] / 2**20:.0f} MiB"
    return Counter(files.ENDS), most


def random_tables(count: int) -> tuple[Counter[str], str]:
    """Read participants' tables with random blemishes; what is read must be what the table states."""
    ends = Counter[str]()
    tables.event = lambda name: ends.update([name])  # the test's notes of how a table ended
    options = settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))
    options(
        given(people=tables.TABLE, declared=tables.DECLARATIONS)(
            lambda people, declared: tables.check(people, declared)
        )
    )()
    return ends, "refused: by the cell"


def flipped_bits(count: int, folder: Path, seed: int = 0) -> tuple[Counter[str], str]:
    """Flip one bit of a shard at a time; ``verify`` must name the shard."""
    build_shards(write_cohort(folder / "cohort", participants=9), folder / "shards", scans_per_shard=5)
    draw, ends = random.Random(seed), Counter[str]()
    shards = sorted((folder / "shards").glob("*.tar"))
    manifest = Manifest.load(folder / "shards")
    for _ in range(count):
        path = draw.choice(shards)
        intact = path.read_bytes()
        content = bytearray(intact)
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        assert list(find_problems(manifest, 1)) == [path.name]
        ends["found"] += 1
        path.write_bytes(intact)
    return ends, ""


def main() -> None:
    """Run the campaigns and print a line for each."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.campaign", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000, help="inputs of each kind (default: 1000)")
    count = parser.parse_args().inputs
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        kinds: dict[str, Callable[[], tuple[Counter[str], str]]] = {
            "manifest.json": lambda: fuzz(files.test_changed_manifests, count),
            "manifest.json, settings": lambda: fuzz(files.test_changed_settings_of_a_manifest, count),
            **{
                name: lambda name=name: fuzz(files.test_changed_files_of_an_encoder, count, name, folder)
                for name in ("config.json", "preprocessing.json", "readouts.json")
            },
            **{f"member .{codec}": lambda codec=codec: fuzz(files.test_changed_members, count, codec) for codec in DECODERS},
            "pipe, folder, socket or device": lambda: fuzz(files.test_something_else_in_place_of_a_file, count, folder / "odd"),
            "participants.tsv": lambda: random_tables(count),
            "flipped bits": lambda: flipped_bits(count, folder),
        }  # fmt: skip
        for kind, campaign in kinds.items():
            started = time.monotonic()
            ends, most = campaign()
            counts = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
            print(
                f"| {kind} | {sum(ends.values())} | {counts} | {most} | {time.monotonic() - started:.0f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
