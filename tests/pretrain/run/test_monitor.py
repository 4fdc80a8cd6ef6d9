"""The online monitor: probes on held-out participants, metrics of two views, alarm, best checkpoint; and skipped steps."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

from data_pipeline.loading.loader import volumes
from data_pipeline.loading.order import EveryScan
from data_pipeline.storage.manifest import Manifest
from infra.errors import UserError
from pretrain.config import MonitorSection, load_recipe
from pretrain.engine import engine
from pretrain.engine.ema import Average
from pretrain.engine.engine import NotFinite
from pretrain.model import build_model
from pretrain.run import checkpoint
from pretrain.run.monitor import OnlineMonitor, encode
from pretrain.run.online_probes import ProbeTarget, Watched, check_held_out, probe_metrics, view_metrics, watched_scans
from pretrain.run.plan import Plan, make_plan
from pretrain.run.skips import Skips
from pretrain.run.step import lr_factor, train_step
from pretrain.run.stop import StopRequest

CPU = torch.device("cpu")
SMALL = ["--encoder.options={width: 0.25, norm: group}", "--batch.global=4"]


@pytest.fixture(scope="module")
def manifest(shards):
    return Manifest.load(shards)


@pytest.fixture(scope="module", params=[0, 1, 3])
def trained(one_rank, request):
    recipe = load_recipe("demo-cpu", [*SMALL, f"--deepspeed.zero_optimization.stage={request.param}"])
    return engine.build_engine(recipe, build_model(recipe), lr_factor(recipe.optimizer, 20, 10))


def test_features_are_the_encoders_in_the_order_of_the_scans(trained, manifest):
    trained.train()
    rows = np.array([5, 0, 9, 3, 7])
    found = encode(trained, manifest, rows, device=CPU, dtype=torch.float32, batch=2)
    assert trained.module.training
    trained.module.eval()
    with torch.no_grad():
        expected = torch.cat([trained.module.encoder(part) for _, part in volumes(manifest, rows, 1)])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_a_moving_average_is_encoded_instead_of_the_engines_encoder(trained, manifest):
    average = Average(trained, 0.5)
    before = average.state()
    for step in (1, 2):
        views = torch.randn(2, 4, 1, 12, 12, 12, generator=torch.Generator().manual_seed(step))
        train_step(trained, lambda z, temperature, batch: z.square().mean(), {"views": views}, step, torch.float32)
        average.update(step)
    network = average.network(load_recipe("demo-cpu", SMALL).encoder, CPU, torch.float32)
    assert not network.training
    averaged, now = average.state(), engine.encoder_state(trained)
    name = "trunk.conv1.weight"
    assert not torch.equal(averaged[name], now[name])
    assert not torch.equal(averaged[name], before[name])
    assert all(torch.equal(value, averaged[name]) for name, value in network.state_dict().items())
    rows = np.array([5, 0, 9])
    found = encode(trained, manifest, rows, device=CPU, dtype=torch.float32, batch=2, encoder=network)
    with torch.no_grad():
        expected = torch.cat([network(part) for _, part in volumes(manifest, rows, 1)])
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    plain = encode(trained, manifest, rows, device=CPU, dtype=torch.float32, batch=2)
    assert not np.allclose(found, plain, rtol=1e-4, atol=1e-5)


def test_probes_predict_labels_that_are_in_the_features_and_no_others():
    generator = np.random.default_rng(0)
    ages, people = generator.uniform(20, 80, 200), np.arange(200) // 2
    ages = ages[people]
    noise = generator.normal(size=(200, 30))
    sick = np.where(generator.random(100) < 0.3, "scz", "control")[people]
    sites = np.array(["a", "b", "c"])[generator.integers(0, 3, 100)[people]]
    everyone, half = np.ones(200, dtype=bool), np.arange(200) < 100
    tasks = [
        ProbeTarget("age", "regression", ages, everyone), ProbeTarget("diagnosis", "classes", sick, half),
        ProbeTarget("site", "classes", sites, everyone),
    ]  # fmt: skip
    watched = Watched(np.arange(200), people, 10, tasks)
    signal = 0.2 * ages[:, None] * generator.normal(size=30)
    for labels in (sick, sites):
        for label in np.unique(labels):
            signal = signal + 2.0 * (labels == label)[:, None] * generator.normal(size=30)
    told, untold = probe_metrics(noise + signal, watched), probe_metrics(noise, watched)
    assert told["monitor/age_mae"] < 3 < 10 < untold["monitor/age_mae"]
    assert told["monitor/age_r2"] > 0.9
    assert untold["monitor/age_r2"] < 0.2
    assert told["monitor/diagnosis_auc"] > 0.95 > 0.7 > untold["monitor/diagnosis_auc"]
    assert told["monitor/diagnosis_balanced_accuracy"] > 0.9
    assert told["monitor/site_balanced_accuracy"] > 0.9 > 0.5 > untold["monitor/site_balanced_accuracy"]
    assert "monitor/site_auc" not in told
    assert probe_metrics(np.ones((200, 4)), watched)["monitor/spread"] == 0.0


def test_the_monitor_watches_labelled_scans_of_its_split(manifest):
    assert watched_scans(MonitorSection(every_epochs=0), manifest, 10.0, 0) is None
    assert watched_scans(MonitorSection(split="nowhere"), manifest, 10.0, 0) is None
    found = watched_scans(MonitorSection(split="downstream", every_epochs=0.5, max_scans=20), manifest, 10.0, 0)
    assert found is not None
    assert (len(found.rows), found.every_steps) == (20, 5)
    assert set(manifest.scans["split"].iloc[found.rows]) == {"downstream"}
    (task,) = found.tasks
    assert np.array_equal(task.labels, manifest.scans["age"].to_numpy(float)[found.rows])
    assert found.groups.tolist() == manifest.subjects()[found.rows].tolist()


def test_a_split_that_shares_participants_with_the_training_scans_is_refused(shards, manifest, tmp_path):
    pretrain, people = manifest.rows(split="pretrain"), manifest.subjects()
    for split in ("pretrain", "monitor", "downstream"):
        rows = manifest.rows(split=split)
        count = len(set(people[rows]))
        with pytest.raises(UserError) as found:
            check_held_out(MonitorSection(split=split), manifest, np.concatenate([pretrain, rows[:1]]))
        shared = count if split == "pretrain" else 1
        assert f"monitor.split={split}: {shared} of its {count} participants are also trained on" in str(found.value)
        assert "(there: downstream, monitor, pretrain)" in str(found.value)
    check_held_out(MonitorSection(), manifest, pretrain)
    check_held_out(MonitorSection(every_epochs=0, split="pretrain"), manifest, pretrain)
    check_held_out(MonitorSection(split="downstream"), manifest, manifest.rows(query="split != 'downstream'"))
    given = [f"--data.shards={shards}", f"--run.output={tmp_path}/run", "--batch.global=4", "--monitor.every_epochs=1"]
    make_plan(load_recipe("demo-cpu", given), 1)
    with pytest.raises(UserError, match="participants are also trained on"):
        make_plan(load_recipe("demo-cpu", [*given, "--data.split=[pretrain, monitor]"]), 1)


def test_a_missing_split_is_an_error_if_it_was_set_and_otherwise_a_message(trained, shards, tmp_path, capsys):
    rows = Manifest.load(shards).rows(split="pretrain")
    with pytest.raises(UserError, match=r"monitor.split=monitr is not in .* \(did you mean 'monitor'\?\); there: "):
        check_held_out(MonitorSection(split="monitr"), Manifest.load(shards), rows)
    manifest = Manifest.load(shards)
    manifest.scans["split"] = manifest.scans["split"].replace("monitor", "downstream")
    with pytest.raises(UserError, match=r"there: downstream, pretrain; name one .* monitor.every_epochs=0"):
        check_held_out(MonitorSection(every_epochs=5), manifest, rows)
    check_held_out(MonitorSection(every_epochs=0, split="nowhere"), manifest, rows)
    check_held_out(MonitorSection(), manifest, rows)
    given = [*SMALL, f"--run.output={tmp_path}", "--monitor.every_epochs=1", "--train.steps=30"]
    plan = Plan.build(load_recipe("demo-cpu", given), manifest, rows, EveryScan(40, 0, 4))
    monitor = OnlineMonitor(plan, trained, None, CPU, torch.float32, "cpu")
    assert not monitor(30, None)
    assert "pretrain: no monitor: monitor.split=monitor is not in " in capsys.readouterr().out


def test_any_column_can_be_a_task(manifest):
    def tasks_of(*names):
        found = watched_scans(MonitorSection(split="downstream", tasks=list(names)), manifest, 10.0, 0)
        return {task.name: task for task in found.tasks}, found.left_out

    sex = manifest.scans["sex"]
    tasks, left_out = tasks_of("age", "sex")
    assert (tasks["age"].kind, tasks["sex"].kind, left_out) == ("regression", "classes", [])
    assert set(tasks["sex"].labels[tasks["sex"].labelled]) == set(sex.unique())
    tasks, left_out = tasks_of("age:classes", "sex")
    # No age is shared by as many participants as there are folds.
    assert set(tasks) == {"sex"}
    assert left_out == ["monitor task age is left out: too few labels (0 participants of split downstream)"]


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("agee", r"'agee' is not a column of the scan table \(did you mean 'age'\?\)"),
        ("sex:regression", "'sex:regression' holds no numbers; write sex, or sex:classes"),
        ("sex:clases", "'sex:clases' has an unknown kind"),
    ],
)
def test_a_task_without_a_fitting_column_is_named(manifest, task, text):
    with pytest.raises(UserError, match=text):
        watched_scans(MonitorSection(split="downstream", tasks=["age", task]), manifest, 10.0, 0)


def test_alignment_uniformity_and_spread_of_embeddings_computed_by_hand():
    # Four scans on the corners of a square, both views equal: squared distances of four sides (2) and two diagonals (4).
    corners = torch.tensor([[1.0, 0], [0, 2.0], [-3.0, 0], [0, -1.0]])
    found = view_metrics(torch.stack([corners, corners]))
    assert found["monitor/alignment"] == 0.0
    assert found["monitor/uniformity"] == pytest.approx(np.log((4 * np.exp(-4) + 2 * np.exp(-8)) / 6))
    assert found["monitor/embedding_std"] == pytest.approx(1.0)
    # The second view is rotated by 90 degrees.
    turned = view_metrics(torch.stack([corners, corners.roll(1, 0)]))
    assert turned["monitor/alignment"] == pytest.approx(2.0)
    generator = torch.Generator().manual_seed(0)
    even = view_metrics(torch.randn(2, 400, 128, generator=generator))
    assert even["monitor/embedding_std"] == pytest.approx(1.0, abs=0.01)
    assert even["monitor/uniformity"] == pytest.approx(-4.0, abs=0.1)
    point = view_metrics(torch.ones(2, 10, 8) + 1e-3 * torch.randn(2, 10, 8, generator=generator))
    assert point["monitor/embedding_std"] < 0.01
    assert point["monitor/uniformity"] == pytest.approx(0.0, abs=1e-3)


class RecordingLog:
    """Stands in for rank 0's log."""

    def __init__(self):
        self.looks = []

    def monitor(self, step, metrics, alarm):
        self.looks.append((step, metrics, alarm))


def test_the_monitor_keeps_the_best_checkpoint_and_alarms_at_a_collapse(trained, manifest, tmp_path):
    recipe = load_recipe("demo-cpu", [
        *SMALL, f"--run.output={tmp_path}", "--monitor.every_epochs=0.5", "--monitor.split=downstream",
        "--monitor.tasks=[sex, age]", "--monitor.max_scans=24", "--monitor.view_scans=7", "--monitor.batch=3",
        "--train.steps=30",
    ])  # fmt: skip
    plan = Plan.build(recipe, manifest, manifest.rows(split="pretrain"), EveryScan(40, 0, 4))
    monitor, log = OnlineMonitor(plan, trained, None, CPU, torch.float32, "cpu"), RecordingLog()
    trained.train()
    random = torch.get_rng_state()
    assert monitor(5, log)
    assert not monitor(6, log)
    assert not monitor(10, log), "an equal encoder is not better"
    assert monitor(5, log), "a repeated evaluation after a restart"
    assert torch.equal(torch.get_rng_state(), random)
    assert trained.module.training
    assert [step for step, _, _ in log.looks] == [4, 9, 4]
    metrics = log.looks[0][1]
    assert metrics == log.looks[1][1], "the views differ between evaluations"
    assert {
        "monitor/sex_balanced_accuracy",
        "monitor/age_mae",
        "monitor/alignment",
        "monitor/uniformity",
    } <= metrics.keys()
    best = checkpoint.read_best(tmp_path / "checkpoints")
    assert best == {"step": 5, "metric": "monitor/sex_balanced_accuracy", "score": best["score"]}
    checkpoint.note_best(tmp_path / "checkpoints", 3, "monitor/age_mae", 0.0)
    assert monitor(10, log), "the best score of another task was not ignored"
    recipe.monitor.collapse_below = 0.999
    assert not monitor(15, log)
    assert log.looks[-1][2].startswith("the embeddings of all scans are nearly equal (embedding_std ")
    assert log.looks[0][2] == ""


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_does_not_change_the_next_one(trained, manifest, tmp_path, what):
    """Weights, optimiser and gradient are as without the skipped step; the schedule has advanced."""
    recipe = load_recipe("demo-cpu", [*SMALL, f"--run.output={tmp_path}", "--train.max_skipped_steps=1"])
    skips = Skips(Plan.build(recipe, manifest, manifest.rows(), EveryScan(72, 0, 4)), 0)
    trained.train()
    generator = torch.Generator().manual_seed(0)
    batch = {"views": torch.randn(2, 4, 1, 12, 12, 12, generator=generator), "scan": torch.arange(4)}

    def good(embeddings, temperature, batch):
        return embeddings.square().mean()

    def bad(embeddings, temperature, batch):
        return embeddings.sum() * float("nan") if what == "loss" else (embeddings.sum() * 0.0).sqrt()

    before = engine.encoder_state(trained)
    lr = trained.lr_scheduler.get_last_lr()[0]
    with pytest.raises(NotFinite) as found:
        train_step(trained, bad, batch, 3, torch.float32)
    message = skips.skip(trained, 3, batch, found.value)
    assert f"step skipped (1 of at most 1); its scans are listed in {tmp_path}/not-finite-step-00000003.json" in message
    assert trained.lr_scheduler.get_last_lr()[0] != lr
    assert all(torch.equal(before[name], value) for name, value in engine.encoder_state(trained).items())
    # Steps with learning rate 0 compare the gradients alone: nothing of the skipped one is left.
    for group in trained.optimizer.param_groups:
        group["lr"] = 0.0
    first, _ = train_step(trained, good, batch, 4, torch.float32)
    for group in trained.optimizer.param_groups:
        group["lr"] = 0.0
    again, _ = train_step(trained, good, batch, 5, torch.float32)
    assert first["grad_norm"] == pytest.approx(again["grad_norm"], rel=1e-6)
    assert np.isfinite(first["grad_norm"])
    with pytest.raises(NotFinite, match=r"after 1 skipped steps \(train.max_skipped_steps=1\)"):
        skips.skip(trained, 6, batch, found.value)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_no_weight(trained, what):
    trained.train()
    before = engine.encoder_state(trained)
    views = torch.randn(2, 4, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))

    def loss(embeddings, temperature, batch):
        return embeddings.sum() * float("nan") if what == "loss" else (embeddings.sum() * 0.0).sqrt()

    with pytest.raises(NotFinite, match=f"step 3: the {what} is"):
        train_step(trained, loss, {"views": views}, 3, torch.float32)
    after = engine.encoder_state(trained)
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_votes_are_summed(trained):
    views = torch.randn(2, 4, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    trained.optimizer.zero_grad()
    metrics, sums = train_step(
        trained, lambda z, temperature, batch: z.square().mean(), {"views": views}, 0, torch.float32,
        votes=lambda: [15.0, 0.0],
    )  # fmt: skip
    assert sums == [15.0, 0.0]
    assert metrics["loss"] > 0


def test_a_signal_during_the_forward_pass_counts_in_the_same_step(trained):
    views = torch.randn(2, 4, 1, 12, 12, 12, generator=torch.Generator().manual_seed(0))
    stop = StopRequest()

    def loss(embeddings, temperature, batch):
        os.kill(os.getpid(), signal.SIGUSR1)
        return embeddings.square().mean()

    stop.listen()
    try:
        _, sums = train_step(
            trained, loss, {"views": views}, 0, torch.float32, votes=lambda: [float(stop.received is not None)]
        )
    finally:
        stop.forget()
    assert sums == [1.0]
    assert stop.name == "SIGUSR1"
