#!/usr/bin/env bash
# Writes this folder with version 0.1 of segkit: bash make.sh SOURCE OUT, with version 0.1 unpacked in SOURCE.
set -euo pipefail
export PYTHONPATH="$1" OMP_NUM_THREADS=1
mkdir -p "$2" && cd "$2"
segkit() { python -m segkit "$@"; }
small=(--preset tiny -d cpu -q -f 1 --set "network.arguments.widths=[4,6]" --set "planning.patch_size=[16,16,16]"
    --set planning.batch_size=1 --set data.folds=2 --set training.workers=0)
six_steps=("${small[@]}" --set training.steps=6 --set training.steps_per_epoch=2)

segkit phantom data --cases 2 --size 24 --convention brats2023 --seed 5 -q
segkit train data -o run "${small[@]}" --set training.steps=200 --set training.steps_per_epoch=100
segkit export -m run -o export -q
segkit infer -m run -i data -o masks/torch --backend torch -d cpu -q
segkit infer -m export -i data -o masks/onnxruntime --backend onnxruntime -d cpu -q
segkit evaluate -p masks/torch -r data -o scores -q

segkit train data -o whole "${six_steps[@]}"
# The same training, which receives SIGTERM during its third step.
python - train data -o stopped "${six_steps[@]}" <<'PYTHON' || test $? = 130
import os
import signal
import sys

import segkit.cli
from segkit.training import loop

rate_at, steps = loop.rate_at, []


def stopping(*arguments):
    steps.append(len(steps))
    if len(steps) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
    return rate_at(*arguments)


loop.rate_at = stopping
segkit.cli.main(sys.argv[1:])
PYTHON

# What the tests do not need, the folder it was made in, and the machine.
mv whole/model.safetensors whole.safetensors
mv scores/scores.json scores.json
rm -r whole scores masks/*/manifest.json run/last.ckpt {run,stopped}/{cache,figures,previous.ckpt,report.html}
sed -i "s|$PWD/data|data|" {run,stopped}/{config.yaml,split.json}
sed -i '/"platform": /d; /"cores": /d' {run,stopped,export}/model.json
