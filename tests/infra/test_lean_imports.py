"""Imports: each entry of the program loads only the large libraries that it needs; modules can be left out for a while."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from infra.lean_imports import without

LARGE = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "deepspeed", "monai", "mlflow", "ray", "pandas", "sklearn",
         "nvidia.dali", "matplotlib.pyplot", "nibabel", "scipy.signal", "scipy.linalg", "scipy.ndimage", "scipy.spatial",
         "scipy.stats", "sympy", "jsonschema", "optuna", "transformers")  # fmt: skip
OWN = "from infra.lean_imports import own_process; own_process()\n"
ENCODERS = """
from pretrain.encoders import ENCODERS, build_encoder
for name, encoder in ENCODERS.items():
    if name not in ("vit-base", "vit-large", "resnet101", "resnet152", "resnet200"):
        options = {"width": 0.25} if "width" in encoder.__kwdefaults__ else {}
        assert build_encoder(name, options).feature_size > 0, name
"""
# What `embed`, `export` and an evaluation do before they read the first scan.
LOADING = """
import pretrain.weights.embedding, pretrain.weights.write
from pretrain.encoders import ENCODERS
from pretrain.weights.weight_shapes import empty_state
for name in ENCODERS:
    assert all(value.is_meta for key, value in empty_state(name, {}).items() if key.endswith("weight")), name
"""
STEP = """
import torch
from pretrain.engine.importing import without_compiler
without_compiler()
for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([weight], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: print("hook"))
    weight.exp().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
    assert weight.requires_grad and weight.grad is None and torch.is_grad_enabled()
    print(kind.__name__, weight.tolist())
"""
# What `shards build` and its Ray workers do before they read the first scan.
BUILDING = """
import data_pipeline.cli, data_pipeline.shards.build, data_pipeline.shards.writing
from infra import ray_cluster
ray_cluster.import_ray()
"""
# What DeepSpeed's launcher of one host does before it starts the ranks; of deepspeed it imports only this launcher.
LAUNCHER = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
import pretrain.engine.local_ranks
from pretrain.engine.launcher_import import import_launcher
import_launcher()
"""
HELP = """
from contextlib import suppress
from infra.cli import run
with suppress(SystemExit):
    run([{!r}, '--help'])"""


def large_modules(code: str) -> set[str]:
    """Return which of LARGE a new process has imported after ``code``."""
    script = f"{code}\nimport json, sys\nprint(json.dumps([name for name in {LARGE!r} if sys.modules.get(name)]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import infra.cli", set()),
        ("import yaware", set()),
        (HELP.format("pretrain"), set()),
        (HELP.format("evaluate"), set()),
        ("import pretrain.launch.start", set()),
        (LAUNCHER, {"deepspeed"}),
        ("import pretrain.engine.importing as i; i.import_deepspeed()", {"torch", "deepspeed"}),
        (
            "import pretrain.engine.importing as i; i.import_deepspeed(); i.import_muon_uncompiled()",
            {"torch", "deepspeed"},
        ),
        ("import pretrain.train", {"torch", "pandas", "nibabel"}),
        (OWN + ENCODERS, {"torch", "monai"}),
        (OWN + LOADING, {"torch", "monai", "pandas", "nibabel"}),
        (
            "import evaluation.protocols.evaluate",
            {"torch", "pandas", "nibabel", "sklearn", "scipy.linalg", "scipy.ndimage", "scipy.spatial", "scipy.stats"},
        ),
        (OWN + STEP, {"torch"}),
        (OWN + BUILDING, {"pandas", "nibabel", "ray", "jsonschema"}),
        (
            "import evaluation.comparison.comparison, evaluation.comparison.terminal",
            {"pandas", "matplotlib.pyplot", "sklearn", "scipy.linalg", "scipy.ndimage", "scipy.spatial", "scipy.stats"},
        ),
    ],
)
def test_an_entry_imports_only_what_it_needs(code, allowed):
    assert large_modules(code) <= allowed


def printed(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_optimizers_do_the_same_without_the_compiler():
    lean, usual = printed(OWN + STEP), printed(STEP)
    assert lean == usual
    assert lean.count("hook") == 3


def test_in_another_programs_process_nothing_is_hidden():
    code = """
        from infra.lean_imports import without_optional
        with without_optional("colorsys"):
            import colorsys
        import torch
        before = torch.optim.Adam.step, vars(torch.optim.Optimizer)["zero_grad"]
        from pretrain.engine.importing import without_compiler
        without_compiler()
        assert before == (torch.optim.Adam.step, vars(torch.optim.Optimizer)["zero_grad"])
        assert not hasattr(torch.optim.Optimizer.zero_grad.__wrapped__, "__dynamo_disable")
    """
    printed(textwrap.dedent(code))


def test_a_tar_is_written_without_torch_and_webdataset_reads_with_it_later():
    code = """
        import io, sys
        from data_pipeline.shards.tar import tar_writer
        stream = io.BytesIO()
        writer = tar_writer()(stream, encoder=False)
        writer.write({"__key__": "a", "bin": b"1"})
        writer.close()
        assert stream.getvalue() and "torch" not in sys.modules
        import torch, webdataset
        assert issubclass(webdataset.DataPipeline, torch.utils.data.IterableDataset)
    """
    printed(OWN + textwrap.dedent(code))


def test_a_module_is_hidden_only_within_the_block():
    sys.modules.pop("this", None)
    with pytest.raises(ImportError), without("this"):
        import this  # noqa: F401
    assert "this" not in sys.modules
    import colorsys

    with without("colorsys"):
        import colorsys as again
    assert again is colorsys is sys.modules["colorsys"]


def test_a_module_that_the_block_imports_under_the_same_name_stays():
    with without("wave"):
        del sys.modules["wave"]
        import wave
    assert sys.modules["wave"] is wave


def test_a_command_collects_garbage_from_its_first_long_work_on():
    code = """
        import gc, weakref
        from infra.lean_imports import own_process, start_collecting
        usual = gc.get_threshold()
        start_collecting()
        assert gc.get_threshold() == usual and not gc.get_freeze_count()

        class Node: ...

        def cycle():
            node = Node()
            node.self = node
            return weakref.ref(node)

        own_process()
        kept = cycle()
        objects = [[] for _ in range(100_000)]
        assert kept() is not None
        from infra.progress import Progress
        Progress(1, "scans", "reading")
        assert gc.get_threshold() == usual and gc.get_freeze_count() > 100_000
        later = cycle()
        objects = [[] for _ in range(100_000)]
        assert later() is None
    """
    printed(textwrap.dedent(code))


def test_what_is_open_at_the_end_of_a_command_is_written(tmp_path):
    code = f"""
        import atexit, tempfile, weakref
        from infra.lean_imports import own_process
        own_process()
        folder = tempfile.TemporaryDirectory(dir={str(tmp_path)!r})
        file = open({str(tmp_path / "text")!r}, "w")
        file.write("all of it")
        atexit.register(print, "goodbye")
    """
    assert printed(textwrap.dedent(code)) == ["goodbye"]
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
    assert (tmp_path / "text").read_text() == "all of it"
