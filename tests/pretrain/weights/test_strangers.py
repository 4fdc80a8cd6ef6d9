"""An encoder's folder that somebody else wrote is checked before anything is built from it."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
import textwrap
from base64 import b64encode

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import UserError
from infra.files import sha256_of, write_json
from pretrain.encoders import build_encoder
from pretrain.weights.encoder import Encoder
from pretrain.weights.likeness import Likeness
from pretrain.weights.weight_shapes import empty_state
from tests.cohorts import GRID
from tests.odd_files import put_in_place
from tests.pretrain.encoders.names import EACH_ENCODER
from tests.pretrain.weights.encoders import CONFIG, OPTIONS, PREPROCESSING, write_scans, write_small_encoder
from tests.runs import ROOT

LIKENESS = {
    "volume": b64encode(np.arange(2, dtype="<f2")).decode(),
    "scans": 3,
    "median": 0.9,
    "lowest": 0.8,
    "means": [0.1, 0.2],
}
PREPARATION = {"recipe": {"pipeline": "vbm", "version": 1, "spacing": 1.5}, "libraries": {}, "figures": {}}
GOOD = {"config.json": CONFIG, "preprocessing.json": {**PREPROCESSING, "grid": GRID.to_dict()}}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "encoder"
    write_small_encoder(folder)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    """A copy that a test may change; ``renew`` then makes its checksums fit."""
    made = tmp_path / "encoder"
    made.mkdir()
    for path in exported.iterdir():
        (made / path.name).write_bytes(path.read_bytes())
    return made


def renew(folder):
    names = [name for name in json.loads((folder / "checksums.json").read_text()) if (folder / name).is_file()]
    write_json(folder / "checksums.json", {name: sha256_of(folder / name) for name in names})


def refused(folder, *words):
    with pytest.raises(UserError) as caught:
        Encoder.from_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700
    for word in words:
        assert word in message, message


CHANGES = [
    ("config.json", "encoder", None), ("config.json", "encoder", []), ("config.json", "encoder.name", ["resnet18"]),
    ("config.json", "encoder.name", "x" * 10_000), ("config.json", "encoder.options", None),
    ("config.json", "encoder.options", [1]), ("config.json", "feature_size", -1), ("config.json", "feature_size", 10**12),
    ("config.json", "feature_size", "128"), ("config.json", "step", None), ("config.json", "run_name", {"a": 1}),
    ("config.json", "split", "pretrain"), ("config.json", "method", 5), ("config.json", "manifest_digest", [0]),
    ("preprocessing.json", "grid", None), ("preprocessing.json", "grid", [9, 9, 9]),
    ("preprocessing.json", "grid.shape", [10**9, 1, 1]), ("preprocessing.json", "grid.shape", [3000, 3000, 3000]),
    ("preprocessing.json", "grid.shape", [-9, 9, 9]), ("preprocessing.json", "grid.shape", [9, 9]),
    ("preprocessing.json", "grid.shape", [9.0, 9.5, 9]), ("preprocessing.json", "grid.spacing", [0, 1, 1]),
    ("preprocessing.json", "grid.affine", [[1, 2], [3, 4]]), ("preprocessing.json", "grid.affine", [[float("nan")] * 4] * 4),
    ("preprocessing.json", "grid", {**GRID.to_dict(), "spacing": [77, 77, 77]}),
    ("preprocessing.json", "grid", {**GRID.to_dict(), "affine": [*GRID.to_dict()["affine"][:3], [5, 5, 5, 5]]}),
    ("preprocessing.json", "grid", {**GRID.to_dict(), "affine": [[1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]}),
    ("preprocessing.json", "likeness", {**LIKENESS, "volume": b64encode(np.full(4, np.nan, "<f2")).decode()}),
    ("preprocessing.json", "likeness", {**LIKENESS, "volume": b64encode(np.full(4, np.inf, "<f2")).decode()}),
    ("preprocessing.json", "likeness", {**LIKENESS, "volume": b64encode(np.ones(4, "<f2")).decode()}),
    ("preprocessing.json", "likeness", {**LIKENESS, "lowest": 0.95}),
    ("preprocessing.json", "likeness", {**LIKENESS, "means": [2.0, 1.0]}),
    ("preprocessing.json", "scaling", "exec"), ("preprocessing.json", "crop", 3), ("preprocessing.json", "intensity", []),
    ("preprocessing.json", "normalisation", "none"), ("preprocessing.json", "nonfinite", True),
    ("preprocessing.json", "rules", ["grid"]), ("preprocessing.json", "rules", {"grid": 7}),
    ("preprocessing.json", "arrays", 1), ("preprocessing.json", "arrays", {"orientations": {"a": "XYZ"}}),
    ("preprocessing.json", "likeness", {}), ("preprocessing.json", "likeness", {**LIKENESS, "volume": "%%%"}),
    ("preprocessing.json", "likeness", {**LIKENESS, "volume": "AAAA"}),
    ("preprocessing.json", "likeness", {**LIKENESS, "means": [1]}),
    ("preprocessing.json", "likeness", {**LIKENESS, "median": float("inf")}),
    ("preprocessing.json", "preparation", []), ("preprocessing.json", "preparation", {**PREPARATION, "recipe": {}}),
    ("preprocessing.json", "preparation", {**PREPARATION, "libraries": {"antspyx": 1}}),
    ("preprocessing.json", "preparation", {**PREPARATION, "figures": {"tiv": [1.0]}}),
    ("preprocessing.json", "preparation", {**PREPARATION, "figures": {"tiv": [2.0, 1.0]}}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), CHANGES, ids=[f"{n[:6]} {k}={v!r}"[:60] for n, k, v in CHANGES])
def test_an_impossible_value_is_named_with_its_file_and_key(folder, name, key, value):
    content = copy.deepcopy(GOOD[name])
    *path, last = key.split(".")
    place = content
    for part in path:
        place = place[part]
    place[last] = value
    (folder / name).write_text(json.dumps(content))
    renew(folder)
    refused(folder, f"{folder / name}: {key}")


@pytest.mark.parametrize("left_out", ["encoder", "feature_size", "step", "run_name", "method", "split", "grid"])
def test_a_missing_key_is_named(folder, left_out):
    name = next(name for name, content in GOOD.items() if left_out in content)
    (folder / name).write_text(json.dumps({key: value for key, value in GOOD[name].items() if key != left_out}))
    renew(folder)
    refused(folder, f"{folder / name}: {left_out}", "Field required")


TEXTS = ["null", "[]", "7", '"text"', "", "{", "[" * 100_000, '{"a":' * 100_000, "\ud800", "9" * 5000]


@pytest.mark.parametrize("name", ["config.json", "preprocessing.json", "checksums.json"])
@pytest.mark.parametrize("text", TEXTS, ids=[repr(text)[:12] for text in TEXTS])
def test_a_file_that_is_no_json_object_is_refused(folder, name, text):
    (folder / name).write_bytes(text.encode(errors="surrogatepass"))
    if name != "checksums.json":
        renew(folder)
    refused(folder, str(folder / name))


def test_weights_are_compared_before_the_network_is_built(exported, tmp_path):
    folders = []
    for number, options in enumerate([{"width": 8}, {"width": 2.0}, {"max_pool": False, "width": 4}]):
        folders.append(shutil.copytree(exported, tmp_path / str(number)))
        content = {**CONFIG, "encoder": {"name": "resnet18", "options": {**OPTIONS, **options}}}
        (folders[-1] / "config.json").write_text(json.dumps(content))
        renew(folders[-1])
    code = """
        import sys
        from infra.errors import UserError
        from pretrain.weights.encoder import Encoder
        from tests.memory import peak_bytes, reset_peak
        for folder in sys.argv[1:]:
            reset_peak()
            before = peak_bytes()
            try:
                Encoder.from_pretrained(folder)
            except UserError as error:
                print(error)
            print((peak_bytes() - before) >> 20)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, folders)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 2 * len(folders), done.stdout + done.stderr
    for folder, message, megabytes in zip(folders, lines[::2], lines[1::2], strict=True):
        assert f"{folder / 'model.safetensors'}: weights do not fit resnet18: " in message
        assert "in the network that config.json names" in message
        assert int(megabytes) < 300, done.stdout


@pytest.mark.parametrize("options", [{"width": 100}, {"width": -1}, {"width": "8"}, {"nets": 3}, {"norm": ["group"]}])
def test_impossible_options_are_refused_with_the_file(folder, options):
    content = {**CONFIG, "encoder": {"name": "resnet18", "options": options}}
    (folder / "config.json").write_text(json.dumps(content))
    renew(folder)
    refused(folder, f"{folder / 'config.json'}: encoder.options.{next(iter(options))}")


def test_a_vision_transformer_of_a_huge_grid_is_refused(folder):
    content = {**CONFIG, "encoder": {"name": "vit-small", "options": {"grid": [100_000] * 3}}}
    (folder / "config.json").write_text(json.dumps(content))
    renew(folder)
    refused(folder, "encoder.options.grid=[100000, 100000, 100000] is not possible")


def change_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    renew(folder)


def test_missing_unknown_and_reshaped_weights_are_named(folder):
    name = next(key for key, value in load_file(folder / "model.safetensors").items() if value.ndim == 5)
    change_weights(folder, lambda state: state.update({"other": torch.zeros(2)}))
    refused(folder, "other has shape [2] in the file, no entry in the network")
    change_weights(folder, lambda state: (state.pop("other"), state.update({name: torch.zeros(1)})))
    refused(folder, f"{name} has shape [1] in the file")
    change_weights(folder, lambda state: state.pop(name))
    refused(folder, f"{name} has shape no entry in the file")


def first_weight(state):
    return next(key for key, value in state.items() if value.ndim == 5)


TYPES = {
    "I64": torch.int64, "I32": torch.int32, "BOOL": torch.bool, "U8": torch.uint8, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
def test_weights_of_another_type_are_named(folder, kind):
    change_weights(folder, lambda state: state.update({key: value.to(TYPES[kind]) for key, value in state.items()}))
    refused(folder, f"is of type {kind}; allowed: F16, BF16, F32")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_in_sixteen_bits_are_read(folder, kind):
    change_weights(folder, lambda state: state.update({key: value.to(kind) for key, value in state.items()}))
    assert Encoder.from_pretrained(folder).feature_size == 128


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_named(folder, value):
    def change(state):
        state[first_weight(state)].view(-1)[7] = value

    change_weights(folder, change)
    refused(folder, "model.safetensors: 1 of ", " are NaN or infinite")


def test_weights_that_are_all_zero_are_refused(folder):
    change_weights(folder, lambda state: state.update({key: torch.zeros_like(value) for key, value in state.items()}))
    refused(folder, "all weights are 0")


def test_features_that_are_no_numbers_are_an_error(folder):
    """Weights may be finite and their products not."""
    change_weights(folder, lambda state: state.update({k: v * 1e30 if v.ndim == 5 else v for k, v in state.items()}))
    paths = write_scans(folder.parent / "scans", 2)
    with pytest.raises(UserError, match="the encoder's features of . of 2 scans are NaN or infinite"):
        Encoder.from_pretrained(folder).embed(paths, workers=0, progress=False)


PARTS = ["model.safetensors", "config.json", "preprocessing.json", "checksums.json", "seen_scans.json", "mlflow.json"]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("kind", ["named pipe", "folder", "socket", "device"])
def test_something_else_in_place_of_a_file_is_named(folder, name, kind):
    from pretrain.weights import seen_scans

    put_in_place(folder / name, kind)
    with pytest.raises(UserError, match=f"{name} is a {kind}, not a file") as caught:
        (seen_scans.read if name == "seen_scans.json" else Encoder.from_pretrained)(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["empty", "text", "huge header", "claims a terabyte", "pickle"])
def test_a_file_that_is_no_safetensors_file_is_refused(folder, kind):
    huge = json.dumps({"w": {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}}).encode()
    content = {
        "empty": b"", "text": b"<html>404</html>", "huge header": (2**60).to_bytes(8, "little") + b"{}",
        "claims a terabyte": len(huge).to_bytes(8, "little") + huge, "pickle": b"\x80\x04cposix\nsystem\n.",
    }[kind]  # fmt: skip
    (folder / "model.safetensors").write_bytes(content)
    renew(folder)
    refused(folder, "model.safetensors is not a safetensors file")


@pytest.mark.parametrize("name", ["/etc/passwd", "../encoder/README.md", "a/b", "a\nb", ""])
def test_checksums_name_only_files_of_the_folder(folder, name):
    checksums = json.loads((folder / "checksums.json").read_text())
    write_json(folder / "checksums.json", {**checksums, name: "0" * 64})
    refused(folder, "checksums.json names", "not a file beside it")


@pytest.mark.parametrize("content", [{}, {"sources": [{"participants": 3}]}, {"sources": {"a": 1}}, {"sources": [[]]}])
def test_a_malformed_record_of_seen_scans_is_refused(folder, content):
    from pretrain.weights import seen_scans

    write_json(folder / seen_scans.NAME, content)
    with pytest.raises(UserError, match=r"seen_scans\.json is damaged"):
        seen_scans.read(folder)


def test_a_likeness_of_another_grid_is_refused():
    made = Likeness({**GOOD["preprocessing.json"], "likeness": LIKENESS})
    with pytest.raises(UserError, match=r"likeness\.volume has 2 values, a scan on its grid"):
        made.fault(np.random.default_rng(0).random(GRID.shape).astype(np.float16))


def test_a_pointer_leads_only_to_a_step_beside_it(folder, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for text in (str(folder.parent), "../..", "step-1/../../..", ""):
        (checkpoints / "latest").write_text(text)
        refused(tmp_path / "run", "no encoder in")


def test_an_encoder_of_ones_own_is_read_as_before(exported):
    encoder = Encoder.from_pretrained(exported)
    assert encoder.feature_size == 128
    assert encoder.config["run_name"] == "y-aware"


@pytest.mark.parametrize("name", EACH_ENCODER)
def test_shapes_are_known_without_building(name):
    if name in ("vit-base", "vit-large", "resenc-l", "vit-small"):
        with torch.device("meta"):  # the large ones: torch's own way, which swin-unetr does not allow
            built = build_encoder(name, {})
    else:
        built = build_encoder(name, {})
    shapes = {key: value.shape for key, value in built.state_dict().items()}
    assert {key: value.shape for key, value in empty_state(name, {}).items()} == shapes
