"""Published weights: the imported encoder gives the published network's features, and unknown layouts are refused."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.nn import functional as F

from data_pipeline.storage.manifest import Manifest
from infra import cli
from infra.errors import UserError
from pretrain import Encoder
from pretrain.weights.import_weights import ARCHITECTURES, import_weights, match_keys, preprocessing_from
from tests.cohorts import write_cohort
from tests.stores import store_at

BLOCKS, GROWTH = (6, 12, 24, 16), 32


def published_shapes(dotted: bool = False) -> dict[str, tuple[int, ...]]:
    """Return name and shape of each tensor of the published DenseNet121 in encoder mode, as torchvision names them."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, channels: int) -> None:
        shapes.update({f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    shapes["features.conv0.weight"] = (64, 1, 7, 7, 7)
    norm("features.norm0", 64)
    channels, dot = 64, "." if dotted else ""
    for block, layers in enumerate(BLOCKS, start=1):
        for layer in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{layer}"
            norm(f"{name}.norm{dot}1", channels)
            shapes[f"{name}.conv{dot}1.weight"] = (4 * GROWTH, channels, 1, 1, 1)
            norm(f"{name}.norm{dot}2", 4 * GROWTH)
            shapes[f"{name}.conv{dot}2.weight"] = (GROWTH, 4 * GROWTH, 3, 3, 3)
            channels += GROWTH
        if block < len(BLOCKS):
            norm(f"features.transition{block}.norm", channels)
            channels //= 2
            shapes[f"features.transition{block}.conv.weight"] = (channels, 2 * channels, 1, 1, 1)
    for head, (inputs, outputs) in {"hidden_representation": (1024, 512), "head_projection": (512, 128)}.items():
        shapes[f"{head}.weight"], shapes[f"{head}.bias"] = (outputs, inputs), (outputs,)
    return shapes


def published_state(dotted: bool = False) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    state = {}
    for name, shape in published_shapes(dotted).items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif len(shape) == 5:
            state[name] = torch.randn(shape, generator=source) * (2 / (shape[1] * shape[2] ** 3)) ** 0.5
        else:  # far from the initial values, so that swapped tensors show
            state[name] = 0.5 + torch.rand(shape, generator=source)
    return state


def naive_features(state: dict[str, torch.Tensor], volumes: torch.Tensor) -> torch.Tensor:
    """The published network in evaluation mode, in plain torch functions: (N, 1, D, H, W) -> (N, 1024)."""

    def norm_relu(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias, mean, var = (state[f"{name}.{p}"] for p in ("weight", "bias", "running_mean", "running_var"))
        shape = (1, -1, 1, 1, 1)
        x = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + 1e-5) * weight.view(shape) + bias.view(shape)
        return x.clamp(min=0)

    x = F.conv3d(volumes, state["features.conv0.weight"], stride=2, padding=3)
    x = F.max_pool3d(norm_relu(x, "features.norm0"), 3, stride=2, padding=1)
    for block, layers in enumerate(BLOCKS, start=1):
        for layer in range(1, layers + 1):
            name = f"features.denseblock{block}.denselayer{layer}"
            new = F.conv3d(norm_relu(x, f"{name}.norm1"), state[f"{name}.conv1.weight"])
            new = F.conv3d(norm_relu(new, f"{name}.norm2"), state[f"{name}.conv2.weight"], padding=1)
            x = torch.cat([x, new], dim=1)
        if block < len(BLOCKS):
            name = f"features.transition{block}"
            x = F.conv3d(norm_relu(x, f"{name}.norm"), state[f"{name}.conv.weight"])
            x = F.avg_pool3d(x, 2, stride=2)
    return x.clamp(min=0).mean(dim=(2, 3, 4))


def write(path, state, prefix="module.", **others):
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    content = {"epoch": 30, "model": {prefix + key: value for key, value in state.items()}, "optimizer": optimizer}
    torch.save({**content, **others}, path)
    return path


def test_imported_weights_give_the_published_networks_features(tmp_path, capsys):
    state = published_state()
    file, out = write(tmp_path / "DenseNet121_BHB-10K.pth", state), tmp_path / "deep" / "imported"
    assert cli.run(["import-weights", str(file), "--arch", "densenet121-yaware", "--out", str(out), "--grid", "4"]) == 0
    printed = capsys.readouterr().out
    assert f"matched: {len(state) - 4}\n" in printed
    assert "missing: 0\n" in printed
    assert "unexpected: 4\n" in printed
    heads = [
        f"module.{head}.{part}" for head in ("hidden_representation", "head_projection") for part in ("weight", "bias")
    ]
    assert all(key in printed for key in [*heads, "trunk.denseblock3.denselayer24.layers.conv2.weight"])
    assert max(map(len, printed.splitlines())) <= 120

    encoder = Encoder.from_pretrained(out)
    volumes = torch.randn(2, 1, 45, 54, 45, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features, expected = encoder(volumes), naive_features(state, volumes)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert expected.std(dim=0).max() > 1e-2 * expected.std()  # the two scans differ, so the comparison means something
    assert encoder.preprocessing["grid"]["shape"] == [45, 54, 45]
    assert (encoder.preprocessing["modality"], encoder.preprocessing["scaling"]) == ("vbm", "none")
    assert (encoder.config["method"], encoder.config["epoch"], encoder.config["simulated"]) == ("y-aware", 30, False)
    assert [path.name for path in out.parent.iterdir()] == ["imported"]
    assert "Imported from `DenseNet121_BHB-10K.pth`" in (out / "README.md").read_text()


def test_files_with_torchvisions_oldest_names_without_prefix_or_counters_are_read(tmp_path):
    state = {key: value for key, value in published_state(dotted=True).items() if not key.endswith("tracked")}
    out, match = import_weights(write(tmp_path / "old.pth", state, prefix=""), "densenet121-yaware", tmp_path / "out")
    assert match.missing == []
    encoder, volumes = Encoder.from_pretrained(out), torch.randn(1, 1, 32, 32, 32)
    plain = {
        key.replace(".norm.", ".norm").replace(".conv.", ".conv") if "denselayer" in key else key: value
        for key, value in state.items()
    }
    with torch.no_grad():
        expected = naive_features(plain, volumes)
        torch.testing.assert_close(encoder(volumes), expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    assert encoder.preprocessing["grid"]["shape"] == [121, 145, 121]


def test_shards_give_the_whole_preprocessing(shards):
    manifest = Manifest.load(shards)
    preprocessing = preprocessing_from(str(shards))
    assert preprocessing["grid"] == manifest.grid
    names = ("modality", "scaling", "crop", "intensity")
    assert [preprocessing[name] for name in names] == [manifest.settings[name] for name in names]
    with pytest.raises(UserError, match="--grid=100 is neither a voxel size of 0.5..20 mm nor a folder of shards"):
        preprocessing_from("100")


def test_a_missing_weight_raises_unless_allowed(tmp_path):
    state = published_state()
    del state["features.denseblock2.denselayer3.conv2.weight"]
    file = write(tmp_path / "part.pth", state)
    with pytest.raises(
        UserError, match=r"has no weights for trunk.denseblock2.denselayer3.layers.conv2.weight .* --allow-missing"
    ):
        import_weights(file, "densenet121-yaware", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _, match = import_weights(file, "densenet121-yaware", tmp_path / "out", allow_missing=True)
    assert match.missing == ["trunk.denseblock2.denselayer3.layers.conv2.weight"]
    assert "missing: 1\n  trunk.denseblock2.denselayer3.layers.conv2.weight\n" in match.report()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_unknown_layouts_raise(tmp_path):
    other = write(tmp_path / "other.pth", {"backbone.conv1.weight": torch.zeros(3)})
    with pytest.raises(
        UserError, match="none of its 1 keys fits .such as module.backbone.conv1.weight.; is --arch right"
    ):
        import_weights(other, "densenet121-yaware", tmp_path / "out", allow_missing=True)
    densenet = ARCHITECTURES["densenet121-yaware"]
    state = {"module.features.conv0.weight": torch.zeros(64, 2, 7, 7, 7)}
    ours = {"trunk.conv0.weight": torch.zeros(64, 1, 7, 7, 7)}
    with pytest.raises(
        UserError, match=r"conv0.weight has shape \[64, 2, 7, 7, 7\], the encoder's .* \[64, 1, 7, 7, 7\]"
    ):
        match_keys(state, ours, densenet, other)
    known = {"module.features.conv0.weight": torch.zeros(64, 1, 7, 7, 7)}
    with pytest.raises(
        UserError, match=r"module.features.denseblock5.x are not weights of densenet121 and none of its"
    ):
        match_keys({**known, "module.features.denseblock5.x": torch.zeros(1)}, ours, densenet, other)
    with pytest.raises(UserError, match=r"two keys mean trunk.conv0.weight, one of them features.conv0.weight"):
        match_keys({**known, "features.conv0.weight": torch.zeros(64, 1, 7, 7, 7)}, ours, densenet, other)
    match = match_keys({**known, "module.head_projection.bias": torch.zeros(1)}, ours, densenet, other)
    assert match.unexpected == ["module.head_projection.bias"]


class Trap:
    """A hostile object: unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("kind", ["torch", "bare pickle", "text", "empty", "no tensors", "nothing"])
def test_a_file_that_is_not_plain_tensors_is_refused_in_one_line(tmp_path, kind, capsys):
    file, sprung = tmp_path / "file.pth", tmp_path / "sprung"
    if kind == "torch":
        write(file, published_state(), note=Trap(sprung))
    elif kind == "bare pickle":
        file.write_bytes(pickle.dumps({"model": Trap(sprung)}))
    elif kind == "text":
        file.write_text("<html>404</html>")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "no tensors":
        torch.save({"epoch": 3, "model": {"a": 1}}, file)
    sprung.unlink(missing_ok=True)
    arguments = ["import-weights", str(file), "--arch", "densenet121-yaware", "--out", str(tmp_path / "out")]
    assert cli.run(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"yaware: error: {file} ")
    assert printed.count("\n") == 1
    expected = {"torch": "never run", "no tensors": "is neither {epoch, model, optimizer}", "nothing": "is missing"}
    assert expected.get(kind, "file.pth") in printed
    assert not sprung.exists()
    assert not (tmp_path / "out").exists()


def test_unknown_architectures_and_existing_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"--arch=densenet-yaware is not known \(did you mean 'densenet121-yaware'\?\)"):
        import_weights(tmp_path / "x.pth", "densenet-yaware", tmp_path / "out")
    with pytest.raises(UserError, match="exists already; choose a new folder"):
        import_weights(tmp_path / "x.pth", "densenet121-yaware", tmp_path)


@pytest.mark.slow
def test_an_imported_encoder_is_evaluated_by_the_real_command(tmp_path, capsys):
    from data_pipeline.shards.build import build_shards
    from data_pipeline.volume.grid import Grid
    from infra.tracking import runs

    cohort = write_cohort(tmp_path / "cohort", participants=40)
    shards = tmp_path / "shards"
    build_shards(cohort, shards, grid=Grid.vbm(5.5), splits={"pretrain": 0.1, "downstream": 0.9})
    file, out, uri = write(tmp_path / "bhb.pth", published_state()), tmp_path / "bhb", store_at(tmp_path / "mlflow.db")
    layout = ["--arch", "densenet121-yaware", "--out", str(out), "--grid", str(shards)]
    assert cli.run(["import-weights", str(file), *layout]) == 0
    given = ["--shards", str(shards), "--tasks", "age", "--experiment", "test", "--tracking-uri", uri]
    assert cli.run(["evaluate", str(out), *given]) == 0
    assert (
        "has no record of the scans it was trained on; make sure that no test participant is among them"
        in capsys.readouterr().out
    )
    (row,) = runs.runs(uri, "test", "evaluation")
    assert (row["tags"]["yaware.run_name"], row["tags"]["yaware.encoder"]) == ("bhb", "densenet121")
    assert row["metrics"]["age.mae"] > 0
