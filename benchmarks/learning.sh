#!/bin/sh
# All learning benchmarks in order of worth, each cell once: stop it at any time, call it again.
#   PYTHON=.venv/bin/python setsid nohup nice -n 19 sh benchmarks/learning.sh > learning.log 2>&1 &
# About a day of one core; hidden states (3 GB) are made as they are needed.
set -e
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 PYTHONPATH="$PWD"
python="${PYTHON:-python}"
recipes="$python -m benchmarks.recipes"

$recipes --until 100 --seeds 0 --search 100
$recipes --until 100 --seeds 1 2 --search 100 --recipes aurora "ours equal time" ours
$python -m benchmarks.objectives --seeds 0
$recipes --until 400 --seeds 0 --search 200
$recipes --until 400 --seeds 0 --search 100 --domains narrow --parts
$python -m benchmarks.domain_shift --trained 200 --each 200
$recipes --until 100 --search 100 --recipes "aurora batch 1"
$recipes --until 400
$python -m benchmarks.objectives
$recipes --until 1000
$python -m benchmarks.static_drafter
