#!/usr/bin/env bash
# The main job on simulated scans, small enough for two CPU cores. Each step is a command of its own; a step whose
# output is there already says so and is over at once. Start anew: rm -rf demo
set -euo pipefail
cd "$(dirname "$0")/.."
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///demo/mlflow/mlflow.db}"
began=$SECONDS

step() {
    printf '\n== [%d s] yaware %s\n' $((SECONDS - began)) "$*"
    yaware "$@"
}

step cohort simulate demo/cohort --participants 1200 --spacing 6 --modality vbm --seed 0
step shards build demo/cohort demo/shards --dataset demo --modality vbm --scaling tiv --scans-per-shard 128 --seed 0
step shards preview demo/shards --out demo/preview.png
step pretrain --config demo-cpu
step pretrain --config demo-cpu --run.name=SimCLR --run.output=demo/runs/simclr --loss.proxies.age.bandwidth=0
step pretrain --config demo-cpu --run.name=random --run.output=demo/runs/random --train.steps=0
step evaluate demo/runs/y-aware demo/runs/simclr demo/runs/random --shards demo/shards --tasks ad,scz,age,site \
    --experiment yaware-demo --n-train 15,30,60,120
step compare --experiment yaware-demo --out demo/report.html

printf '\n== done in %d s\n' $((SECONDS - began))
