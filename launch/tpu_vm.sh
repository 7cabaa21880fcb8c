#!/bin/bash
# Trains on a Cloud TPU VM slice, on all its hosts at once:
#
#   ZONE=us-central2-b bash launch/tpu_vm.sh NAME \
#     --config configs/small_16k.py --workdir /mnt/disk/runs/small_16k \
#     --config.data.path=/mnt/disk/shards
#
# /mnt/disk stands for a disk that all hosts have mounted (Filestore, or a bucket through gcsfuse).
# Copies the last commit to the hosts of the TPU called NAME, installs it there, and runs
# `python -m launch.train ARGUMENTS --distributed` on each; a run that asks for it is started again
# by launch/again.sh. Call it once more after the slice was taken away and made anew: the run goes on.
#
# ZONE     of the TPU (required)
# PROJECT  of the TPU (default: that of gcloud)
# EXTRA    package of the accelerator (default: jax[tpu])

set -euo pipefail
name=${1:?name of the TPU}
shift
where=("--zone=${ZONE:?zone of the TPU}")
[ -z "${PROJECT:-}" ] || where+=("--project=$PROJECT")
root=$(cd "$(dirname "$0")/.." && pwd)

packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
git -C "$root" archive --format=tar.gz -o "$packed/spatialv2a.tar.gz" HEAD
gcloud compute tpus tpu-vm scp "$packed/spatialv2a.tar.gz" "$name:spatialv2a.tar.gz" \
  --worker=all "${where[@]}"

arguments=$(printf ' %q' "$@")
gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" --command="
  set -e
  rm -rf spatialv2a && mkdir spatialv2a && tar -xzf spatialv2a.tar.gz -C spatialv2a && cd spatialv2a
  [ -d ../venv ] || python3 -m venv ../venv
  ../venv/bin/pip install -q '.[train]' '${EXTRA:-jax[tpu]}'
  bash launch/again.sh ../venv/bin/python -u -m launch.train$arguments --distributed --join_timeout=3600
"
