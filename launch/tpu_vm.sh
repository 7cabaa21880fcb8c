#!/bin/bash
# Trains on a Cloud TPU VM slice, on all its hosts at once:
#
#   ZONE=us-central2-b bash launch/tpu_vm.sh NAME \
#     --config configs/small_16k.py --workdir /mnt/disk/runs/small_16k \
#     --config.data.path=/mnt/disk/BUILD/latents --config.data.eval=/mnt/disk/BUILD/latents:test \
#     --config.vae=/mnt/disk/parts
#
# /mnt/disk stands for a disk that all hosts have mounted (such as one of Filestore).
# Copies the last commit to the hosts of the TPU called NAME, installs it there, and runs
# `python -m launch.train ARGUMENTS --distributed` on each; a run that asks for it is started again
# by launch/again.sh. Call it once more after the slice was taken away and made anew: the run goes on.
#
# The trainers do not hang on this command, which only follows ~/spatialv2a.log of each host and ends
# with their code. Called again while they run, it follows them. To make them save and stop:
#
#   gcloud compute tpus tpu-vm ssh NAME --worker=all --command='kill -TERM $(cat spatialv2a.pid)'
#
# ZONE     of the TPU (required)
# PROJECT  of the TPU (default: that of gcloud)
# EXTRA    package of the accelerator (default: jax[tpu])
# CACHE    folder of compiled programs on the hosts, such as /mnt/disk/runs/xla (default: in the home)

set -euo pipefail
name=${1:?name of the TPU}
shift
where=("--zone=${ZONE:?zone of the TPU}")
[ -z "${PROJECT:-}" ] || where+=("--project=$PROJECT")
words=("$@")
for i in "${!words[@]}"; do
  case ${words[i]} in
    --workdir | -workdir) workdir=${words[i + 1]:-} ;;
    --workdir=* | -workdir=*) workdir=${words[i]#*=} ;;
  esac
done
if [[ ${workdir:-/} != /* ]]; then # The code is unpacked anew at every start.
  echo "--workdir $workdir would be lost with the next start: give a path that begins with /" >&2
  exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)

packed=$(mktemp -d)
trap 'rm -rf "$packed"' EXIT
git -C "$root" rev-parse HEAD >"$packed/COMMIT" # Which checkpoints name.
git -C "$root" archive --format=tar.gz --add-file="$packed/COMMIT" \
  -o "$packed/spatialv2a.tar.gz" HEAD
gcloud compute tpus tpu-vm scp "$packed/spatialv2a.tar.gz" "$name:spatialv2a.tar.gz" \
  --worker=all "${where[@]}"

train="bash launch/again.sh ../venv/bin/python -u -m launch.train$(printf ' %q' "$@")"
train="$train --distributed --join_timeout=3600"
[ -z "${CACHE:-}" ] || train="export JAX_COMPILATION_CACHE_DIR=$(printf %q "$CACHE"); $train"
# In a session of its own, with no end of a pipe of ssh.
train="$train & echo \$! >../spatialv2a.pid; wait \$!; echo \$? >../spatialv2a.code"
gcloud compute tpus tpu-vm ssh "$name" --worker=all "${where[@]}" --command="
  set -e
  if grep -qs again.sh /proc/\"\$(cat spatialv2a.pid 2>/dev/null)\"/cmdline; then
    echo 'it runs already, and this follows it'
  else
    rm -rf spatialv2a spatialv2a.pid spatialv2a.code && mkdir spatialv2a
    tar -xzf spatialv2a.tar.gz -C spatialv2a && cd spatialv2a
    export PATH=\"\$PATH:\$HOME/.local/bin\" # For uv, since the Python of images is too old.
    command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv -q --clear --python 3.12 ../venv
    uv pip install -q --python ../venv '.[train]' '${EXTRA:-jax[tpu]}'
    setsid bash -c $(printf %q "$train") >>../spatialv2a.log 2>&1 </dev/null &
    cd ..
    until [ -s spatialv2a.pid ]; do sleep 0.1; done
  fi
  tail -n 20 -F --pid=\"\$(cat spatialv2a.pid)\" spatialv2a.log
  for _ in 1 2 3 4 5; do [ -s spatialv2a.code ] || sleep 1; done
  exit \"\$(cat spatialv2a.code || echo 137)\"
"
