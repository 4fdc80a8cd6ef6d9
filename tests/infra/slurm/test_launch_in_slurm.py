"""``yaware launch --slurm``: the batch script to the letter, what is refused in one line, and the submission."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from infra import cli
from infra.slurm.batch_script import TEMPLATES, WORKS, batch_script, read_template
from pretrain.config import find_recipe, load_recipe

pytestmark = pytest.mark.usefixtures("start")
PRETRAIN = ["pretrain", "--config", "demo-cpu", "--run.output=my runs/one"]


def launch(*words: str) -> int:
    return cli.run(["launch", "--slurm", *words])


def test_a_dry_run_prints_the_script_and_writes_nothing(start, capsys):
    options = ["--nodes=3", "--gpus=2", "--time=1-2", "--mem=64G", "--account=lab", "--partition=gpu", "--dependency=afterok:3",
               "--job-name=one", "--sbatch-option", "qos=low", "--sbatch-option=exclusive",
               "--sbatch-option", 'comment=a "b" #c']  # fmt: skip
    assert launch(*options, "--dry-run", *PRETRAIN, "--batch.global=12", "--loss.options={tau: 1}") == 0
    printed = capsys.readouterr().out
    assert (
        printed
        == f"""#!/bin/bash
# Written by `yaware launch --slurm`; it can be submitted again with sbatch.
#SBATCH --job-name=one
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=2
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=1-2
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output="{start}/my runs/one/%x-%j.log"
#SBATCH --partition=gpu
#SBATCH --account=lab
#SBATCH --mem=64G
#SBATCH --dependency=afterok:3
#SBATCH --qos=low
#SBATCH --exclusive
#SBATCH --comment="a \\"b\\" #c"
#SBATCH --kill-on-invalid-dep=yes
SLURM_SUBMIT_DIR={start}
export YAWARE_PYTHON={sys.executable}
set -- demo-cpu '--run.output=my runs/one' --batch.global=12 '--loss.options={{tau: 1}}'
"""
        + (TEMPLATES / "pretrain.sbatch").read_text().partition("--output=%x-%j.log\n")[2]
    )
    assert list(start.iterdir()) == []


def test_without_options_those_of_the_batch_script_are_taken(start, capsys):
    build = ["build", "cohort", "my shards", "--codec", "npy"]
    assert launch("--dry-run", "--dependency=afterok:1", *build) == 0
    lines = capsys.readouterr().out.splitlines()
    template = (TEMPLATES / "build-shards.sbatch").read_text().splitlines()
    expected = [line for line in template if line.startswith("#SBATCH ") and "--output" not in line]
    assert [line for line in lines if line in expected] == expected
    assert "set -- cohort 'my shards' --codec npy" in lines
    assert f'#SBATCH --output="{start}/my shards/%x-%j.log"' in lines
    assert lines[-1] == template[-1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["evaluate", "run", "--shards=s", "--tasks=ad,agee"], r"task 'agee' is not known \(did you mean 'age'\?\)"),
        (["evaluate", "run", "--shards=s", "--tasks=mine.yaml"], "task file mine.yaml does not exist"),
        ([*PRETRAIN, "--encoder.name=resnet19"], r"encoder.name='resnet19' is not known"),
        ([*PRETRAIN, "--encoder.options={widht: 1}"], "widht"),
        ([*PRETRAIN, "--batch.micro=3", "--batch.global=64"], "batch.micro=3 does not divide the 16 scans per rank"),
    ],
)
def test_what_needs_no_shards_is_checked_before_they_are_there(words, text, capsys):
    """A stage of the pipeline is submitted before the stages that it waits for have run."""
    assert launch("--dry-run", "--nodes=2", "--gpus=2", "--dependency=afterok:1", *words) == 2
    captured = capsys.readouterr()
    assert re.search(text, captured.err)
    assert captured.err.count("\n") == 1


def test_without_gpus_pretraining_has_one_rank_a_node(capsys):
    assert launch("--dry-run", "--gpus=0", "--nodes=4", "--dependency=afterok:1", *PRETRAIN) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "#SBATCH --ntasks-per-node=1" in lines
    assert not any(line.startswith("#SBATCH --gpus") for line in lines)


def test_a_script_is_put_where_the_user_wants_it_with_its_log(start, capsys):
    words = ["evaluate", "run", "--shards=s", "--tasks=age", "--finetune.epochs=3"]
    assert launch("--dry-run", "--gpus=1", "--script=jobs/a.sbatch", "--dependency=afterok:1", *words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"#SBATCH --output={start}/jobs/%x-%j.log" in lines
    assert "#SBATCH --gpus-per-node=1" in lines
    assert "set -- run --shards=s --tasks=age --finetune.epochs=3" in lines


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "the following arguments are required: work, arguments; see yaware launch --slurm --help"),
        (["train"], "argument work: invalid choice: 'train'"),
        (["--nodes=0", *PRETRAIN], "argument --nodes: '0' is not a whole number of at least 1"),
        (["--gpus=-1", *PRETRAIN], "argument --gpus: '-1' is not a whole number of at least 0"),
        (["--hostfile=h", *PRETRAIN], "argument work: invalid choice|unrecognized arguments: --hostfile=h"),
        (["--time=soon", *PRETRAIN], "time='soon' cannot be used; allowed: minutes, hours:minutes:seconds or days-hours"),
        (["--mem=4 GB", *PRETRAIN], "mem='4 GB' cannot be used; allowed: megabytes, or a number with K, M, G or T"),
        (["--job-name=a/b", *PRETRAIN], "job-name='a/b' cannot be used; allowed: a name without /, % and spaces"),
        (["--account=a\n#SBATCH --nodes=9", *PRETRAIN], r"account='a\\n#SBATCH --nodes=9' cannot be used; allowed: one line"),
        (["--sbatch-option=nodes=2", "--nodes=2", *PRETRAIN], "--sbatch-option=nodes=2: nodes is given twice"),
        (["--sbatch-option=nodes=0", *PRETRAIN], "--sbatch-option=nodes=0: nodes is not possible here; use --nodes N"),
        (["--sbatch-option=ntasks=4", *PRETRAIN], "ntasks is not possible here; use --nodes N and --gpus G"),
        (["--sbatch-option=export=NONE", *PRETRAIN], "export is not possible here; leave it out"),
        (["--sbatch-option=signal=B:TERM@9", *PRETRAIN], "signal='B:TERM@9' cannot be used; allowed: USR1@SECONDS"),
        (["--sbatch-option=ntasks-per-node=²", *PRETRAIN], "ntasks-per-node='²' cannot be used; allowed: a whole number"),
        (["--nodes=²", *PRETRAIN], "argument --nodes: '²' is not a whole number of at least 1"),
        (["--time=2", *PRETRAIN], "time=2 is too short: .* 120 s before it; .*USR1@SECONDS with fewer seconds"),
        (["--account=", *PRETRAIN], "--account is empty; give a value, or leave it out"),
        (["--sbatch-option=qos=", *PRETRAIN], "--sbatch-option=qos= has no value; write qos=VALUE, or qos for"),
        (["--gpus=2", "--sbatch-option=gres=gpu:2", *PRETRAIN], "--gpus=2 and --sbatch-option=gres=gpu:2 ask for GPUs twice"),
        (["--gpus=2", "--sbatch-option=gpus-per-node=2", *PRETRAIN], "gpus-per-node is given twice"),
        (["--sbatch-option=gres=gpu:x:y", *PRETRAIN], "gres=gpu:x:y: 'gpu:x:y' names no number of GPUs"),
        (["--sbatch-option=q", "--sbatch-option=q=1", *PRETRAIN], "--sbatch-option=q=1: q is given twice"),
        (["--sbatch-option=-N2", *PRETRAIN], "--sbatch-option=-N2: '-N2' is no long option of sbatch; write KEY=VALUE"),
        (["--sbatch-option=array=1-3", *PRETRAIN], "--sbatch-option=array=1-3: array is not possible here"),
        # The command's own arguments.
        (["--gpus=3", *PRETRAIN], "batch.global=32 is not divisible by world_size=6; use 4 or 8 ranks"),
        (["--gpus=2", *PRETRAIN], "demo/shards/manifest.json is missing"),
        (["pretrain", "demo-cpu"], "the following arguments are required: --config; see yaware pretrain --help"),
        ([*PRETRAIN, "--train.stepps=3"], "train.stepps"),
        (["build", "cohort"], "the following arguments are required: out; see yaware shards build --help"),
        (["build", "cohort", "out", "--codec=npyy"], r"codec='npyy' is not known \(did you mean 'npy'\?\)"),
        (["build", "cohort", "out", "--quality.x=1"], "quality.x"),
        (["build", "cohort", "out"], "cohort is not there; give the folder or table of a cohort"),
        (["prepare", "raw"], "the following arguments are required: out; see yaware cohort prepare --help"),
        (["prepare", "raw", "out", "--prepare.linear.kindd=rigid"], "linear.kindd"),
        (["prepare", "raw", "out", "--pipeline=vbm", "--rigid"], "pipeline vbm needs affine registration"),
        (["prepare", "raw", "out", "--dry-run"], "--dry-run of the preparation does nothing in a job"),
        (["prepare", "raw", "out"], "raw is not there; give the folder or table of the raw scans"),
        (["evaluate", "run", "--shards=s", "--tasks=age", "--folds=1"], "folds=1 is too small; it must be at least 2"),
        (["evaluate", "run", "--shards=s", "--tasks=age", "--protocols=svm"], "protocol 'svm' is not known"),
        (["evaluate", "run", "--shards=s", "--tasks=age", "--x=1"], "argument --x=1 is not known"),
        (["evaluate", "run", "--shards=s", "--tasks=age"], "s/manifest.json is missing"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_one_line_with_status_2(words, text, start, capsys):
    assert launch("--dry-run", *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("yaware: error: ")
    assert captured.err.count("\n") == 1
    assert re.search(text, captured.err), captured.err
    assert list(start.iterdir()) == []


def test_without_sbatch_one_line_says_what_to_do(monkeypatch, capsys, start):
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch("--dependency=afterok:1", "build", "cohort", "out") == 2
    error = capsys.readouterr().err
    assert error.startswith("yaware: error: sbatch is not found; submit from a host of the cluster, or add --dry-run ")
    assert error.count("\n") == 1
    assert not (start / "out").exists()


@pytest.mark.parametrize(
    ("option", "ranks"), [("gpus-per-node=h100:4", 4), ("gres=gpu:a100:2,shard:8", 2), ("gres=gpu", 1), ("gpus-per-node=1", 1)]
)  # fmt: skip
def test_gpus_of_a_kind_set_the_ranks_of_a_node(option, ranks, capsys):
    assert launch("--dry-run", "--dependency=afterok:1", "--sbatch-option", option, *PRETRAIN) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"#SBATCH --ntasks-per-node={ranks}" in lines
    gpus = [line for line in lines if line.startswith(("#SBATCH --gpus", "#SBATCH --gres"))]
    assert gpus == [f"#SBATCH --{option}"]


def test_a_python_that_the_user_has_chosen_is_kept(monkeypatch, capsys):
    monkeypatch.setenv("YAWARE_PYTHON", "/images/python of yaware")
    assert launch("--dry-run", "--dependency=afterok:1", *PRETRAIN) == 0
    monkeypatch.setenv("YAWARE_HOST_PYTHON", "/usr/bin/python3")
    assert launch("--dry-run", "--dependency=afterok:1", *PRETRAIN) == 0
    first, second = capsys.readouterr().out.split("#!/bin/bash\n")[1:]
    assert "export YAWARE_PYTHON='/images/python of yaware'" in first.splitlines()
    assert "YAWARE_HOST_PYTHON=" not in first.split("set -- ")[0]
    assert "export YAWARE_HOST_PYTHON=/usr/bin/python3" in second.splitlines()


def test_a_submission_prints_the_job_its_log_and_what_to_type(sbatch, start, capsys):
    sbatch.write_text("echo '123;cluster'")
    assert launch("--job-name=b", "--dependency=afterok:1", "build", "cohort", "a%j b") == 0
    log = f"{start}/a%j b/b-123.log"
    assert capsys.readouterr().out.splitlines() == [
        "launch: wrote a%j b/b.sbatch",
        f"launch: submitted job 123; its log: {log}",
        f"launch: to watch: squeue --jobs 123; tail -F '{log}'",
        "launch: to cancel: scancel 123",
    ]
    assert (start / "calls").read_text() == "--parsable a%j b/b.sbatch\n"
    assert subprocess.run(["bash", "-n", start / "a%j b/b.sbatch"], check=False).returncode == 0
    assert [path.name for path in (start / "a%j b").iterdir()] == ["b.sbatch"], "no temporary file is left"


def test_a_job_keeps_its_recipe_although_the_file_changes(sbatch, start, capsys):
    """Both queued jobs have the recipe of their submission, with its overrides, and the file can be removed."""
    sbatch.write_text("echo 7")
    recipe = start / "mine.yaml"
    copies = []
    for steps in (3, 4):
        text = find_recipe("demo-cpu").read_text()
        recipe.write_text(re.sub(r"(?m)^train:", f"train:\n  steps: {steps}", re.sub(r"(?m)^  steps:.*\n", "", text)))
        words = ["pretrain", "--config", "mine.yaml", "--run.output=run", "--batch.global=16"]
        assert launch("--dependency=afterok:1", *words) == 0
        (copy,) = re.findall(r"^set -- (\S+)$", (start / "run/yaware.sbatch").read_text(), re.MULTILINE)
        assert f"launch: the job reads the recipe from {copy}, a copy" in capsys.readouterr().out
        copies.append(copy)
    assert launch("--dry-run", "--dependency=afterok:1", *words) == 0
    assert capsys.readouterr().err == f"launch: {copies[1]} is not written yet: a submission writes it\n"
    recipe.unlink()
    loaded = [load_recipe(copy, []) for copy in copies]
    assert [(one.train.steps, one.batch.global_, one.run.output) for one in loaded] == [(3, 16, "run"), (4, 16, "run")]
    assert not list((start / "run").glob("*.tmp*"))


def test_variables_of_sbatch_do_not_replace_what_was_typed(sbatch, start, monkeypatch, capsys):
    sbatch.write_text("env | grep ^SBATCH_ >> calls; echo 7")
    for name, value in {
        "PARTITION": "debug",
        "OUTPUT": "x.log",
        "TIMELIMIT": "9",
        "RESERVATION": "r",
        "ARRAY_INX": "1-3",
    }.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    assert launch("--partition=gpu", "--dependency=afterok:1", "build", "cohort", "out") == 0
    captured = capsys.readouterr()
    assert sorted((start / "calls").read_text().splitlines()[1:]) == ["SBATCH_RESERVATION=r", "SBATCH_TIMELIMIT=9"]
    assert "launch: SBATCH_PARTITION=debug is not used: the job has --partition=gpu\n" in captured.err
    assert "launch: SBATCH_ARRAY_INX=1-3 is not used: it is not possible here\n" in captured.err
    assert f"its log: {start}/out/yaware-build-7.log" in captured.out


def test_a_log_that_only_slurm_can_name_is_told_as_a_pattern(sbatch, capsys):
    sbatch.write_text("echo 7")
    assert launch("--sbatch-option=output=logs/%N-%j", "--dependency=afterok:1", "build", "cohort", "out") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == (
        "launch: submitted job 7; its log: a file of the pattern logs/%N-%j, which SLURM completes when the job starts"
    )
    assert lines[2] == "launch: to watch: squeue --jobs 7"


def test_a_refusal_of_sbatch_is_one_line(sbatch, capsys):
    sbatch.write_text(
        "echo 'sbatch: error: invalid partition specified: gpus' >&2\necho 'sbatch: error: failed' >&2\nexit 1"
    )
    assert launch("--dependency=afterok:1", "build", "cohort", "out") == 2
    assert capsys.readouterr().err == (
        "yaware: error: sbatch refused out/yaware-build.sbatch: invalid partition specified: gpus sbatch: error: failed\n"
    )


def test_a_script_that_cannot_be_written_is_one_line(sbatch, start, capsys):
    (start / "file").touch()
    assert launch("--script=file/x.sbatch", "--dependency=afterok:1", "build", "cohort", "out") == 2
    assert capsys.readouterr().err.startswith("yaware: error: --script=file/x.sbatch cannot be written")
    assert not (start / "calls").exists()


@pytest.mark.parametrize("work", WORKS)
def test_every_work_has_a_batch_script_that_runs_its_command_and_a_check(work):
    name, command = WORKS[work]
    last = read_template(work).body.splitlines()
    called = {"pretrain": "pretrain.train --config"}.get(work, " ".join(command))
    assert any(
        re.search(rf'-m (infra\.slurm\.ray_job |infra\.cli |){re.escape(called)} "\$@"', line) for line in last
    ), name
    assert callable(cli.batch_check(command[0]))


def test_the_arguments_reach_the_command_unchanged(tmp_path):
    words = ["--a={x: 1}", "b c", "'", '"', "$HOME", "*"]
    text = batch_script(read_template("build"), {"nodes": "1"}, words, tmp_path)
    body = text.partition("exec ")[0] + "printf '%s\\n' \"$@\"\n"
    done = subprocess.run(["bash", "-c", body], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == words


@pytest.mark.parametrize("name", ["a", "launch"])
def test_the_word_slurm_after_the_command_is_the_commands_own(name, capsys):
    assert launch("--dry-run", "--dependency=afterok:1", "build", name, "out", "--slurm") == 2
    assert "--slurm" in capsys.readouterr().err
