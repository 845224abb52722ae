#!/bin/bash
# The decisive checks on a GPU in at most 9 minutes: agreement with a CPU, inference, seconds, memory, training.
#
#     bash benchmarks/gpu.sh OUT [DATA]
#
# DATA is a folder with a few cases, such as six of BraTS; without it nothing is trained. Tables are written row by row,
# and a part that takes too long is ended, so that the others still run. DEVICE=cpu SIDE=32 is a trial without a GPU.
set -u
out=$1 data=${2:-} device=${DEVICE:-cuda} side=${SIDE:-128}
mkdir -p "$out"
part() { # NAME SECONDS ARGUMENTS...
    local name=$1 limit=$2
    shift 2
    timeout "$limit" python -m segkit "$@" > "$out/$name.txt" 2>&1
    echo "$name: exit status $?, see $out/$name.txt"
}
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv > "$out/device.txt" 2>&1
part parity 75 bench gpu -d "$device" --side "$side" --table parity
part inference 60 bench gpu -d "$device" --side "$side" --table inference
part seconds 90 bench gpu -d "$device" --side "$side" --table seconds
part memory 45 bench gpu -d "$device" --side "$side" --table memory
[ -z "$data" ] && exit
part train 255 train "$data" -o "$out/run" -d "$device" --budget 4m --set "planning.patch_size=[$side,$side,$side]" \
    --set training.compile=false --set training.steps_per_epoch=50
tail -n 1 "$out/run/metrics.jsonl"
