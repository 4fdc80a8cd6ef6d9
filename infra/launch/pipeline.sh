#!/bin/bash
# Submit build, pretraining, evaluation and comparison to SLURM; each starts when the one before has succeeded.
#
#   infra/launch/pipeline.sh COHORT SHARDS RECIPE RUN TASKS [REPORT]
#
# COHORT      folder or table of a cohort             RUN     folder of the run
# SHARDS      folder of the shards                    TASKS   for example ad,scz,age
# RECIPE      name or path of a recipe                REPORT  default: RUN/report.html
#
# Environment: JOBS               options of `yaware launch --slurm` for all jobs, for example "--partition gpu --account lab"
#              BUILD_JOB, PRETRAIN_JOB, EVALUATE_JOB, COMPARE_JOB        further such options of one job: "--nodes 4 --gpus 8"
#              BUILD_ARGUMENTS, PRETRAIN_ARGUMENTS, ...                  further arguments of one command: "--scaling tiv"
#              EXPERIMENT         MLflow experiment of the evaluation (default: yaware)
#              MLFLOW_TRACKING_URI  store that all nodes reach
#
# Start it in the checkout, on a host that has sbatch. If the arguments of a command are wrong, nothing stays in the queue. If a
# job fails or is cancelled, SLURM cancels those after it. A job that is preempted or reaches its time limit continues by itself
# (but the comparison, which takes minutes).
set -euo pipefail
if [ $# -lt 5 ] || [ $# -gt 6 ]; then
    echo "usage: infra/launch/pipeline.sh COHORT SHARDS RECIPE RUN TASKS [REPORT]" >&2
    exit 2
fi
cohort=$1 shards=$2 recipe=$3 run=$4 tasks=$5 report=${6:-$4/report.html}
experiment=${EXPERIMENT:-yaware}
yaware=${YAWARE:-.venv/bin/yaware}
jobs=()
# Nothing is left in the queue if a later job is refused.
trap '[ $? = 0 ] || [ ${#jobs[@]} = 0 ] || scancel "${jobs[@]}"' EXIT

words_of() { # NAME: put the words of a variable into the array `words`; quotes as in a shell; expands nothing
    local lines
    words=()
    # The dot keeps empty words at the end, which $(...) would cut off.
    if ! lines=$(xargs --no-run-if-empty --max-args=1 printf '%s\n' <<< "${!1:-}" 2>/dev/null && echo .); then
        echo "pipeline: error: $1=${!1} has a quote without its partner; close it, or write \\' or \\\" for the character" >&2
        exit 2
    fi
    lines=${lines%.}
    [ -z "$lines" ] || mapfile -t words <<< "${lines%$'\n'}"
}

for name in JOBS {BUILD,PRETRAIN,EVALUATE,COMPARE}_{JOB,ARGUMENTS}; do words_of "$name"; done # before anything is submitted

submit() { # NAME WORK ARGUMENT ...
    local name=$1 work=$2 options more after=() said job
    local of_job=${name}_JOB of_command=${name}_ARGUMENTS
    words_of JOBS
    options=("${words[@]}")
    words_of "$of_job"
    options+=("${words[@]}")
    words_of "$of_command"
    more=("${words[@]}")
    [ ${#jobs[@]} = 0 ] || after=(--dependency "afterok:${jobs[-1]}")
    said=$("$yaware" launch --slurm "${options[@]}" "${after[@]}" "$work" "${@:3}" "${more[@]}")
    job=$(sed -n 's/^launch: submitted job \([0-9]*\);.*/\1/p' <<< "$said")
    printf 'pipeline: %s\n' "$work: $(sed -n 's/^launch: submitted //p' <<< "$said")"
    jobs+=("$job")
}

submit BUILD build "$cohort" "$shards"
submit PRETRAIN pretrain --config "$recipe" "--data.shards=$shards" "--run.output=$run"
submit EVALUATE evaluate "$run" --shards "$shards" --tasks "$tasks" --experiment "$experiment"
submit COMPARE compare --experiment "$experiment" --out "$report"
printf 'pipeline: to watch: squeue --jobs %s\n' "$(IFS=,; echo "${jobs[*]}")"
printf 'pipeline: to cancel: scancel %s\n' "${jobs[*]}"
