"""Files with random changes: each is read, or refused by an error of the kind that its reader promises, in time and memory.

A few examples by default; ``pytest -m slow tests/faults/test_fuzz_files.py`` tries thousands.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import time
from collections import Counter

import nibabel
import numpy as np
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.quality.rules import Limits, Quality
from data_pipeline.shards.build import build_shards
from data_pipeline.shards.writing import quality_rules
from data_pipeline.storage.manifest import Manifest, check_shards
from data_pipeline.storage.manifest_file import check_content, digest_of, is_simulated
from data_pipeline.volume.decoders import DECODERS, decode
from data_pipeline.volume.preparation import Preparation, file_rules
from infra.errors import UserError
from infra.settings import to_dict
from pretrain.weights.encoder import Encoder
from pretrain.weights.schema import check_config, check_preprocessing_file, check_readouts_file
from tests.cohorts import GRID, write_cohort
from tests.memory import peak_bytes, reset_peak
from tests.odd_files import KINDS, put_in_place
from tests.pretrain.weights.encoders import CONFIG, PREPROCESSING, write_small_encoder

SECONDS, BYTES = 10.0, 2 * 2**30
# What became of the inputs of this process, for ``tests.faults.campaign``, and the longest time and most memory of one.
ENDS, MOST = Counter[str](), {"seconds": 0.0, "bytes": 0}
COUNTS = [20, pytest.param(3000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
VOXELS = int(np.prod(GRID.shape))

ERROR = {"by": "all", "group": "all", "people": 9, "scans": 12, "mae": 3.2, "bias": -0.1}
SUMMARY = {
    "scale": "each", "penalty": 1.0, "people": 9, "scans": 12, "missing": 0, "unreadable": 0, "mae": 3.2, "r2": 0.7,
    "slope": 0.9, "offset": 1.0,
    "calibrated_on": {"split": "monitor", "people": 60, "scans": 61, "excluded": 1, "seen": False, "reason": ""},
}  # fmt: skip
READOUTS = {
    "weights": "0" * 64, "layer": None, "pooling": ["mean"], "coverage": 0.95, "left_out": {"iq": "too few"},
    "fitted_on": [{"manifest_digest": "0" * 64, "role": "trained", "participants": ["0" * 16], "voxels": None}],
    "readouts": [
        {"name": "age", "classes": [], "intercept": 40.0, "summary": SUMMARY, "errors": [ERROR]},
        {"name": "sex", "classes": ["F", "M"], "intercept": 0.5, "summary": SUMMARY, "errors": []},
    ],
}  # fmt: skip

numbers = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([0, -1, 2**31, 2**40, 2**63, 10**400, True, 1.5])
)
texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["/etc/passwd", "..", "http://host/a.tar", "a\0b", "a\nb", "x" * 10_000, "ü" * 200]),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
# What to do with one place of a JSON document: the place is chosen by the number, and gets the value or goes.
changes = st.lists(st.tuples(st.integers(0, 10_000), st.one_of(st.just("remove"), values)), min_size=1, max_size=4)


def changed(content, todo):
    """Return a copy of a JSON document with some places changed."""
    content = copy.deepcopy(content)
    for number, value in todo:
        places = []
        waiting = [content]
        while waiting:
            node = waiting.pop()
            items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            for key, inner in items:
                places.append((node, key))
                waiting.append(inner)
        if places:
            node, key = places[number % len(places)]
            if value == "remove":
                del node[key]
            else:
                node[key] = value
    return content


def holds_or_refuses(function, *errors):
    """Call a reader; only these errors, of one short line, may come, within time and memory. Return the line, or ""."""
    reset_peak()
    held, started, message, end = peak_bytes(), time.monotonic(), "", "read"
    try:
        function()
    except errors as error:
        message, end = str(error) if isinstance(error, UserError) else "", "refused"
    seconds, taken = time.monotonic() - started, peak_bytes() - held
    ENDS[end] += 1
    MOST.update(seconds=max(MOST["seconds"], seconds), bytes=max(MOST["bytes"], taken))
    assert "\n" not in message
    assert len(message) < 1000
    assert seconds < SECONDS
    assert taken < BYTES
    return message


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def manifest_content():
    """Return the content of a small manifest."""
    shards = [{"name": f"a-{n:06d}.tar", "bytes": 4096, "sha256": f"{n:064x}", "scans": 2} for n in range(2)]
    return {
        "format": 1, "grid": GRID.to_dict(), "dtype": "float16", "shards": shards,
        "settings": {"dataset": "a", "modality": "vbm", "scaling": "none", "codec": "zst", "quarantined": 0,
                     "scans_per_shard": 2, "seed": 0, "splits": {"pretrain": 0.7, "downstream": 0.3}, "crop": "world",
                     "intensity": "none", "simulated": False, "pseudonymised": False, "array_orientations": {"a": "LAS"},
                     "preparations": {"a": {"recipe": {"pipeline": "vbm"}, "libraries": {"antspyx": "0.6.3"}}},
                     "licences": {"a": {"licence": "CC0", "stated_in": "dataset_description.json"}},
                     "quality": to_dict(Quality(limits={"age": Limits(18, 90)})),
                     "annotated": [{"columns": ["iq"], "table": "iq.tsv"}], "appended": [{"dataset": "b", "scans": 2}]},
        "scans": {"name": "scans.parquet", "rows": 4, "sha256": "0" * 64},
    }  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
def test_changed_manifests(count):
    def read(todo):
        content = changed(manifest_content(), todo)
        text = json.dumps({**content, "digest": digest_of(content)}).encode()
        holds_or_refuses(lambda: check_content(text, "manifest.json"), UserError)

    text = json.dumps({**manifest_content(), "digest": digest_of(manifest_content())}).encode()
    assert check_content(text, "manifest.json")["format"] == 1, "the unchanged manifest is refused"
    examples(count)(given(changes)(read))()


@pytest.mark.parametrize("count", COUNTS)
def test_changed_settings_of_a_manifest(count):
    """Settings that are not refused can be used: by the rules, the preparation and the recorded preprocessing."""

    def use(text):
        settings = check_content(text, "manifest.json")["settings"]
        quality_rules(settings)
        Preparation.of(GRID.to_dict(), settings)
        file_rules(settings)
        assert is_simulated(settings) in (False, True)
        [entry["columns"] for entry in settings.get("annotated", [])]

    def read(todo):
        content = manifest_content()
        content["settings"] = changed(content["settings"], todo)
        text = json.dumps({**content, "digest": digest_of(content)}).encode()
        holds_or_refuses(lambda: use(text), UserError)

    content = manifest_content()
    use(json.dumps({**content, "digest": digest_of(content)}).encode())
    examples(count)(given(changes)(read))()


def test_a_manifest_of_a_later_version_is_told_to_update_yaware():
    for found, fix in ((2, "update yaware"), (0, "build the shards again"), ("1", "build the shards again")):
        text = json.dumps({**manifest_content(), "format": found}).encode()
        with pytest.raises(UserError, match=f"manifest.json has format .*, this version reads 1; {fix}"):
            check_content(text, "manifest.json")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["config.json", "preprocessing.json", "readouts.json"])
def test_changed_files_of_an_encoder(count, name, tmp_path):
    check, content = {
        "config.json": (check_config, CONFIG),
        "preprocessing.json": (check_preprocessing_file, {**PREPROCESSING, "grid": GRID.to_dict()}),
        "readouts.json": (check_readouts_file, READOUTS),
    }[name]
    check(content, tmp_path / name)

    @given(changes)
    def run(todo):
        holds_or_refuses(lambda: check(changed(content, todo), tmp_path / name), UserError)

    examples(count)(run)()


def read_in_place(path, kind, read):
    """Put something else in place of a file and read; the reader must refuse it in one line that names the file."""
    kept = path.with_name(f"{path.name}.kept")
    path.rename(kept)
    try:
        put_in_place(path, kind)

        ends = ENDS["refused"]
        message = holds_or_refuses(read, UserError)
        assert f"{path.name} is a {kind}, not a file" in message
        assert ENDS["refused"] == ends + 1, f"{path} was read"
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        kept.rename(path)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_something_else_in_place_of_a_file(count, tmp_path):
    """Named pipes, folders, sockets and devices in place of each file of an encoder and of a data set."""
    encoder, shards = tmp_path / "encoder", tmp_path / "shards"
    write_small_encoder(encoder)
    build_shards(write_cohort(tmp_path / "cohort", participants=6), shards, scans_per_shard=12)
    manifest = Manifest.load(shards)
    readers = {
        **{
            encoder / name: lambda: Encoder.from_pretrained(encoder)
            for name in ("model.safetensors", "config.json", "preprocessing.json", "checksums.json")
        },
        **{shards / name: lambda: Manifest.load(shards) for name in ("manifest.json", "scans.parquet")},
        **{path: lambda: check_shards(manifest, manifest.rows()) for path in shards.glob("*.tar")},
    }  # fmt: skip
    for read in readers.values():
        read()
    chosen = st.tuples(st.sampled_from(sorted(readers)), st.sampled_from(KINDS))
    examples(count)(given(chosen)(lambda choice: read_in_place(*choice, readers[choice[0]])))()


def member(codec):
    """Return an intact member of a shard."""
    voxels = np.random.default_rng(0).random(GRID.shape).astype(np.float16)
    stream = io.BytesIO()
    np.save(stream, voxels)
    raw = stream.getvalue()
    if codec.startswith("nii"):
        raw = nibabel.Nifti1Image(voxels.astype(np.float32), np.array(GRID.affine)).to_bytes()
    if codec.endswith(".gz"):
        return gzip.compress(raw, mtime=0)
    return zstandard.compress(raw) if codec == "zst" else raw


# Where to write which bytes: most faults are in the first bytes, the header.
patches = st.lists(
    st.tuples(st.one_of(st.integers(0, 400), st.integers(0, 10**6)), st.binary(min_size=1, max_size=16)),
    min_size=1, max_size=6,
)  # fmt: skip


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("codec", DECODERS)
def test_changed_members(count, codec):
    intact = member(codec)
    assert decode(intact, codec, voxels=VOXELS).shape == GRID.shape

    def read(todo, cut):
        payload = bytearray(intact)
        for place, content in todo:
            start = place % len(payload)
            payload[start : start + len(content)] = content
        # The reader counts a scan as unreadable whatever the exception; what counts is that it comes, and in time.
        holds_or_refuses(lambda: decode(bytes(payload[: max(1, len(payload) - cut)]), codec, voxels=VOXELS), Exception)

    examples(count)(given(patches, st.one_of(st.just(0), st.integers(0, 1000)))(read))()
