#!/bin/sh
# The Python of an Apptainer image (yaware.def), for the batch scripts, which take their Python from YAWARE_PYTHON:
#   export YAWARE_IMAGE=/shared/yaware.sif YAWARE_BIND=/data,/scratch YAWARE_PYTHON=$PWD/infra/launch/apptainer_python.sh
#   sbatch infra/launch/pretrain.sbatch demo-cpu --data.shards=/data/shards
# YAWARE_IMAGE: the image, which all nodes see. YAWARE_BIND: folders outside the home and the working directory, joined by commas.
# --nv gives the GPUs and the driver of the host. The code is that of the checkout in which the job was submitted.
set -eu
image=${YAWARE_IMAGE:?set YAWARE_IMAGE to the image that apptainer build has made}
[ -e "$image" ] || { echo "apptainer_python.sh: error: YAWARE_IMAGE=$image is missing on $(hostname)" >&2; exit 2; }
exec apptainer exec --nv --pwd "$PWD" --bind "$PWD${YAWARE_BIND:+,$YAWARE_BIND}" "$image" /opt/yaware/.venv/bin/python "$@"
