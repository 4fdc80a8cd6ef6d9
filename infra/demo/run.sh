#!/usr/bin/env bash
# Run the pipeline on simulated scans, small enough for two CPU cores. Every step is a yaware command; a step whose output
# exists is skipped. To start from scratch: rm -rf demo
set -euo pipefail
cd "$(dirname "$0")/../.."
export MLFLOW_TRACKING_URI="${MLFLOW_TRACKING_URI:-sqlite:///demo/mlflow/mlflow.db}"
start=$SECONDS

step() {
    printf '\n== [%d s] yaware %s\n' $((SECONDS - start)) "$*"
    yaware "$@"
}

step cohort simulate demo/cohort --participants 1200 --spacing 6 --modality vbm --seed 0
step shards build demo/cohort demo/shards --dataset demo --modality vbm --scaling tiv --scans-per-shard 128 --seed 0
step shards preview demo/shards --out demo/preview.png
step pretrain --config demo-cpu
step pretrain --config demo-cpu --run.name=SimCLR --run.output=demo/runs/simclr --loss.proxies.age.bandwidth=0
step pretrain --config demo-cpu --run.name=random --run.output=demo/runs/random --train.steps=0 --readouts.fit=true
step evaluate demo/runs/y-aware demo/runs/simclr demo/runs/random --shards demo/shards --tasks ad,scz,age,site \
    --experiment yaware-demo --n-train 15,30,60,120
step compare --experiment yaware-demo --out demo/report.html

printf '\n== finished in %d s\n\n' $((SECONDS - start))
python -m infra.demo.summary demo
