"""A data set that somebody else made opens no other file, takes no memory that it only claims, and is held against its tars."""

from __future__ import annotations

import hashlib
import resource
import subprocess
import sys
import tarfile
import textwrap

import numpy as np
import pandas as pd
import pytest
import zstandard

from data_pipeline.shards.info import shards_info
from data_pipeline.shards.verify import find_problems
from data_pipeline.storage.manifest import Manifest
from data_pipeline.storage.manifest_file import read_content
from tests.data_pipeline.shards.strangers import change_table, copy_of, refused, replace_members, write_content
from tests.runs import ROOT


@pytest.fixture
def copy(shards, tmp_path):
    return copy_of(shards, tmp_path / "copy")


NAMES = [
    "/etc/passwd", "../copy/tiny-000000.tar", "http://host/a.tar", "s3://bucket/a.tar", "a\0.tar", "a\n.tar", "x" * 10_000,
    f"{'x' * 10_000}.tar", 7, ["tiny-000000.tar"], None, "", ".", "..", "a/../b.tar", "C:\\a.tar", "a.tar/", "folder/a.tar",
    "manifest.json", {"name": "a.tar"}, True,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: repr(name)[:30])
@pytest.mark.parametrize("command", [Manifest.load, shards_info], ids=["load", "info"])
def test_a_shard_is_a_plain_file_beside_the_manifest(copy, name, command):
    content = read_content(copy)
    content["shards"][0]["name"] = name
    write_content(copy, content)
    refused(copy, ["manifest.json: shards[0].name=", "is not the plain name of a .tar"], command)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../scans.parquet", "scans.parquet\0", 5, None, ["scans.parquet"], "x" * 9999]
)
def test_the_scan_table_is_a_file_beside_the_manifest(copy, name):
    content = read_content(copy)
    content["scans"]["name"] = name
    write_content(copy, content)
    refused(copy, ["manifest.json: scans.name=", "is not scans.parquet"])


@pytest.mark.parametrize("root", ["/", "http://host", "..", 7, None])
def test_only_an_index_may_have_its_shards_elsewhere(copy, root):
    content = read_content(copy)
    content["settings"]["root"] = root
    write_content(copy, content)
    refused(copy, ["settings.root=", "is not the folder or URL of an index"])


VALUES = [
    ("grid", None), ("grid.shape", [0, 3, 3]), ("grid.shape", [10**9] * 3), ("grid.shape", [2000] * 3), ("grid.shape", [9, 9]),
    ("grid.shape", "9x9x9"), ("grid.shape", [9.5, 9, 9]), ("grid.shape", [True, 9, 9]), ("grid.shape", [-9, -9, 9]),
    ("grid.spacing", [1, 1, -1]), ("grid.spacing", None), ("grid.affine", [[1, 0, 0, 0]] * 3),
    ("grid.affine", [[float("nan")] * 4] * 4), ("grid.affine", [[1e300] * 4] * 4), ("settings", []), ("settings.codec", "exe"),
    ("settings.codec", ["zst"]), ("settings.modality", None), ("settings.scaling", {}), ("settings.dataset", "a\nb"),
    ("settings.preparations", []), ("settings.preparations", {"a": {"recipe": {}}}),
    ("settings.preparations", {"a": {"recipe": {}, "libraries": {"ants": 1}}}),
    ("settings.licences", ["CC0"]), ("settings.licences", {"a": "CC0"}), ("settings.licences", {"a": {"licence": "CC0"}}),
    ("settings.licences", {"a": {"licence": "a\nb", "stated_in": "x"}}),
    ("settings.appended", {}), ("settings.appended", [[]]), ("settings.quarantined", "many"), ("shards", {}), ("shards", [1]),
    ("shards", None), ("shards.0.bytes", -1), ("shards.0.bytes", "9"), ("shards.0.bytes", 2**60), ("shards.0.sha256", "../x"),
    ("shards.0.sha256", "0" * 63), ("shards.0.scans", 1e9), ("shards.0.codec", "py"), ("scans", "scans.parquet"),
    ("grid.affine", [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [5, 5, 5, 5]]),
    ("grid.affine", [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), ("grid.affine", [[0] * 4] * 3 + [[0, 0, 0, 1]]),
    ("grid.affine", [[77, 0, 0, 0], [0, 77, 0, 0], [0, 0, 77, 0], [0, 0, 0, 1]]),
    ("scans.rows", -3), ("scans.sha256", None), ("shards.1.name", "tiny-000000.tar"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), VALUES, ids=[f"{key}={value!r}"[:50] for key, value in VALUES])
def test_an_impossible_value_of_the_manifest_is_named(copy, key, value):
    content = read_content(copy)
    *path, last = key.split(".")
    place = content
    for name in path:
        place = place[int(name) if name.isdigit() else name]
    place[last] = value
    write_content(copy, content)
    words = key.replace(".0.", "[0].").replace(".1.", "[1].")
    refused(copy, [f"manifest.json: {words}"])
    refused(copy, [f"manifest.json: {words}"], shards_info)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"[" * 200_000, b'{"format": 1}', b"\xff\xfe", b"{" + b"9" * 9999, b" " * (2**26 + 1)]
)
def test_a_manifest_that_is_none_is_refused(copy, text):
    (copy / "manifest.json").write_bytes(text)
    refused(copy, ["manifest.json"])


COLUMNS = ["key", "shard", "offset", "size", "crc32c", "participant_id", "dataset", "split", "age", "session", "site"]


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("command", [Manifest.load, shards_info], ids=["load", "info"])
def test_a_missing_column_is_named(copy, column, command):
    change_table(copy, pd.read_parquet(copy / "scans.parquet").drop(columns=column))
    refused(copy, [f"scans.parquet has no column {column}"], command)


CELLS = [
    ("shard", 99, "is not in 0..3"), ("shard", -1, "is not in 0..3"), ("offset", -512, "is not in 0.."),
    ("offset", 2**40, "is not inside its shard"), ("offset", 2**60, "is not in 0.."), ("size", 0, "is not in 1.."),
    ("size", 2**40, "is not in 1.."), ("size", -1, "is not in 1.."), ("crc32c", 2**32, "is not in 0..4294967295"),
    ("crc32c", -1, "is not in 0.."), ("age", float("inf"), "is not finite"), ("age", float("-inf"), "is not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("column", "value", "message"), CELLS)
def test_a_cell_outside_its_limits_is_named_with_its_row(copy, column, value, message):
    table = pd.read_parquet(copy / "scans.parquet")
    table.loc[5, column] = value
    change_table(copy, table)
    refused(copy, [f"scans.parquet, row 5: {column}={value}", message])


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("shard", "text", "column shard is of type"),
        ("offset", 1.5, "column offset is of type double, not whole numbers"),
        ("age", "old", "column age is of type"),
        ("key", 7, "column key is of type int64, not text"),
        ("participant_id", None, "column participant_id is of type null, not text"),
        ("key", "sub-01", "row 1: key='sub-01' is not a key that no other row has"),
    ],
)
def test_a_column_of_another_kind_is_named(copy, column, values, message):
    change_table(copy, pd.read_parquet(copy / "scans.parquet").assign(**{column: values}))
    refused(copy, [message])


def test_a_table_with_other_rows_than_the_manifest_says_is_refused(copy):
    table = pd.read_parquet(copy / "scans.parquet")
    change_table(copy, table.iloc[:-1])
    refused(copy, ["has 71 rows, manifest.json says 72, and its shards 72"])
    change_table(copy, table.assign(shard=[0] * len(table), offset=0), rows=72)
    refused(copy, [" scans of tiny-000000.tar, manifest.json says 20"])


def test_a_file_that_is_no_table_is_refused(copy):
    content = read_content(copy)
    for text in (b"", b"PAR1", b"no table at all", (copy / "scans.parquet").read_bytes()[:-20]):
        (copy / "scans.parquet").write_bytes(text)
        content["scans"]["sha256"] = hashlib.sha256(text).hexdigest()
        write_content(copy, content)
        refused(copy, ["scans.parquet is not a Parquet file"])
        refused(copy, ["scans.parquet is not a Parquet file"], shards_info)


def swap(table, column):
    """Exchange the values of two rows of the first shard."""
    first, second = table.index[table["shard"] == 0][:2]
    table.loc[[first, second], column] = table.loc[[second, first], column].to_numpy()
    return table


LIES = {
    "keys exchanged": (lambda table: swap(table, "key"), "the volume at offset"),
    "offsets exchanged": (lambda table: swap(table, "offset"), "the volume at offset"),
    "crc exchanged": (lambda table: swap(table, "crc32c"), "the tar's content has"),
    "size smaller": (lambda table: table.assign(size=table["size"] - 1), "the tar has"),
    "offset of a header": (lambda table: table.assign(offset=table["offset"] - 512), "no volume begins at offset"),
    "another key": (lambda table: table.assign(key=table["key"] + "x"), "the volume at offset"),
    "the same scan twice": (
        lambda table: table.assign(offset=table.groupby("shard")["offset"].transform("first")),
        "another row has the same offset",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_verify_holds_the_scan_table_against_the_tars(copy, lie):
    assert find_problems(Manifest.load(copy)) == {}
    change, message = LIES[lie]
    change_table(copy, change(pd.read_parquet(copy / "scans.parquet")))
    problem = find_problems(Manifest.load(copy))["tiny-000000.tar"]
    assert problem.startswith("the scan table contradicts it: scan ")
    assert message in problem


def test_verify_names_a_volume_that_the_table_leaves_out(copy):
    content = read_content(copy)
    table = pd.read_parquet(copy / "scans.parquet")
    left_out = table.index[table["shard"] == 1][0]
    content["shards"][1]["scans"] -= 1
    content["scans"]["rows"] -= 1
    write_content(copy, content)
    change_table(copy, table.drop(index=left_out))
    assert find_problems(Manifest.load(copy)) == {
        "tiny-000001.tar": f"the scan table contradicts it: {table['key'][left_out]}.npy.zst is not in the scan table"
    }


def npy(shape, dtype="<f2", content=b""):
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


def bomb(size):
    """A zstd frame without a content size that unpacks to ``size`` zero bytes."""
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    return b"".join([*(packer.compress(bytes(2**24)) for _ in range(size >> 24)), packer.flush()])


def frame_that_claims(size):
    """A zstd frame whose header claims ``size`` bytes of content, and that holds a few."""
    frame = bytearray(zstandard.ZstdCompressor(level=1, write_content_size=True).compress(bytes(2**17)))
    assert frame[4] >> 6 == 2, "a content size of four bytes is expected"
    single, width = frame[4] & 0x20, 4
    start = 5 if single else 6
    frame[4] |= 0xC0
    return bytes(frame[:start]) + size.to_bytes(8, "little") + bytes(frame[start + width :])


MEMBERS = {
    "a header of 2000 cubed": lambda: zstandard.compress(npy((2000, 2000, 2000))),
    "a terabyte in one axis": lambda: zstandard.compress(npy((2**40, 1, 1))),
    "negative axes": lambda: zstandard.compress(npy((-1, 5, 5))),
    "too many axes": lambda: zstandard.compress(npy((1,) * 30)),
    "float128 of text": lambda: zstandard.compress(npy((2, 2, 2), "<U999999")),
    "a frame that claims 2^40 bytes": lambda: frame_that_claims(2**40),
    "a frame that claims 2^63 bytes": lambda: frame_that_claims(2**63),
    "3 GB of zeros in 100 kB": lambda: bomb(3 * 2**30),
    "no frame": lambda: b"not zstd at all",
}
READER = """
import sys
from data_pipeline.storage.manifest import Manifest
from tests.memory import peak_bytes
manifest = Manifest.load(sys.argv[1])
row = int(manifest.scans.index[manifest.scans["key"] == sys.argv[2]][0])
try:
    manifest.read_volume(row)
except Exception as error:
    print(type(error).__name__, str(error)[:200])
else:
    print("read")
print(peak_bytes() >> 20)
"""


@pytest.mark.parametrize("kind", MEMBERS)
def test_a_member_takes_no_memory_that_it_only_claims(copy, kind):
    table = pd.read_parquet(copy / "scans.parquet")
    key = str(table["key"][table["shard"] == 0].iloc[0])
    replace_members(copy, {f"{key}.npy.zst": ((payload := MEMBERS[kind]()), len(payload))})
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(READER), str(copy), key], cwd=ROOT, capture_output=True, text=True, timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30)),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told, megabytes = done.stdout.strip().splitlines()
    assert told.split()[0] in ("ValueError", "ZstdError"), told
    assert int(megabytes) < 700, told


def test_members_that_claim_a_terabyte_are_a_contradiction(copy):
    table = pd.read_parquet(copy / "scans.parquet")
    first = table[table["shard"] == 0].sort_values("offset").iloc[-1]
    name = f"{first['key']}.npy.zst"

    content = read_content(copy)
    path = copy / "tiny-000000.tar"
    raw = bytearray(path.read_bytes())
    header = int(first["offset"]) - 512
    info = tarfile.TarInfo(name)
    info.size, info.uname, info.gname = 2**40, "root", "root"
    raw[header : header + 512] = info.tobuf(tarfile.GNU_FORMAT)
    path.write_bytes(raw)
    content["shards"][0]["sha256"] = hashlib.sha256(raw).hexdigest()
    write_content(copy, content)
    problem = find_problems(Manifest.load(copy))["tiny-000000.tar"]
    assert f"size {first['size']}, the tar has {2**40}; is not a whole tar" in problem


def test_intact_volumes_are_read_as_before(copy, shards):
    manifest, original = Manifest.load(copy), Manifest.load(shards)
    assert np.array_equal(manifest.read_volume(3), original.read_volume(3))
