"""``yaware promote`` in a real store: references to checkpoints, and refused promotions."""

from __future__ import annotations

import pytest

from infra import cli
from infra.errors import UserError
from infra.files import sha256_of
from infra.tracking import registry
from infra.tracking.tracker import Tracker
from tests.stores import store_at


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("registry")
    uri = store_at(root / "mlflow.db")
    tracker = Tracker.open(uri, "test", "y-aware", tags={"yaware.kind": "pretraining"})
    models = {}
    for step in (10, 20):
        folder = root / f"step-{step}" / "encoder"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights %d" % step)
        models[step] = tracker.log_checkpoint(f"y-aware-{step}", step, folder, sha256_of(folder / "model.safetensors"))
    tracker.end()
    Tracker.open(uri, "test", "short", tags={"yaware.kind": "pretraining"}).end()
    tags = {"yaware.kind": "evaluation", "yaware.model_id": models[10]}
    evaluation = Tracker.open(uri, "test", "evaluation", tags=tags)
    evaluation.end()
    return root, uri, models, str(tracker.run_id), str(evaluation.run_id)


def test_a_checkpoint_is_promoted_by_model_run_name_evaluation_or_alias(store, capsys):
    _, uri, models, run_id, evaluation_id = store
    base = ["--name", "brain-encoder", "--experiment", "test", "--tracking-uri", uri]
    for reference, options, step in (
        ("y-aware", [], 20), (run_id, ["--step", "10"], 10), (models[20], [], 20), (evaluation_id, [], 10),
    ):  # fmt: skip
        assert cli.run(["promote", reference, *base, "--alias", "champion", *options]) == 0
        assert registry.promoted(uri, "brain-encoder", "champion")["step"] == step
        printed = capsys.readouterr().out
        assert f"step {step} is brain-encoder version {1 if step == 20 else 2}, alias champion" in printed
    assert cli.run(["promote", models[20], *base, "--alias", "newest"]) == 0
    assert registry.promoted(uri, "brain-encoder", "newest")["model_id"] == models[20]
    assert registry.promoted(uri, "brain-encoder", "champion")["model_id"] == models[10]
    assert cli.run(["promote", "brain-encoder@newest", *base, "--alias", "champion"]) == 0
    assert registry.promoted(uri, "brain-encoder", "champion")["model_id"] == models[20]


@pytest.mark.parametrize(
    ("reference", "options", "text"),
    [
        (
            "y-awar",
            [],
            r"'y-awar' is not a model id, a run id or a pretraining of experiment 'test' \(did you mean 'y-aware'\?\)",
        ),
        ("0" * 32, [], "tracking store .* not found"),
        ("short", [], "run short has no checkpoint in"),
        ("y-aware", ["--step", "15"], "run y-aware has no checkpoint of step 15; it has 10, 20"),
        ("y-aware", ["--alias", "v3"], "--alias=v3: use letters, digits"),
        ("y-aware", ["--name", "a b"], "--name=a b: use letters, digits"),
        ("brain-encoder@none", [], "tracking store .* alias none not found"),
        ("y-aware", ["--experiment", "tset"], r"experiment 'tset' is not in .* \(did you mean 'test'\?\)"),
    ],
)
def test_a_refused_promotion_prints_one_line(store, capsys, reference, options, text):
    import re

    base = ["--name", "refused", "--alias", "champion", "--experiment", "test", "--tracking-uri", store[1]]
    assert cli.run(["promote", reference, *base, *options]) == 2
    printed = capsys.readouterr().err
    assert re.search(text, printed), printed
    assert printed.count("\n") == 1
    with pytest.raises(UserError):
        registry.promoted(store[1], "refused", "champion")


def test_missing_or_changed_weights_are_not_promoted(store, capsys):
    root, uri, models, _, _ = store
    weights = root / "step-10" / "encoder" / "model.safetensors"
    command = ["promote", models[10], "--name", "refused", "--alias", "champion", "--tracking-uri", uri]
    original = weights.read_bytes()
    weights.write_bytes(b"other")
    assert cli.run(command) == 2
    assert "differs from the logged file" in capsys.readouterr().err
    weights.unlink()
    assert cli.run(command) == 2
    assert "no weights in" in capsys.readouterr().err
    weights.write_bytes(original)
