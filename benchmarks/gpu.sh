#!/bin/sh
# Runs all that is to be known on a machine with a GPU, in half an hour, right before fast:
#   sh benchmarks/gpu.sh DIR       results and logs go to DIR, such as benchmarks/results/nvidia-h200
# Each command has a time limit and a log; one that fails or hangs does not keep the others from running.
cd "$(dirname "$0")/.." || exit 2
out=${1:?expected a folder for the results, got none; such as benchmarks/results/nvidia-h200}
mkdir -p "$out" || exit 2
now=$(date -u +%Y%m%dT%H%M%SZ)
python=${PYTHON:-python3}

limited() { # NAME SECONDS COMMAND...
    name=$1 seconds=$2
    shift 2
    timeout -k 10 "$seconds" "$@" > "$out/$now-$name.log" 2>&1
    echo "$name: exit code $? (124: stopped at its time limit); $(tail -n 1 "$out/$now-$name.log")"
}

smoke="$python -m benchmarks.speed --check --suite smoke --providers fastkl"
sanitizer="compute-sanitizer --target-processes all --error-exitcode 9 --tool"
xdist=$("$python" -c 'import xdist; print("-n 10")' 2> /dev/null)
limited tests 300 env FASTKL_REQUIRE_GPU=1 "$python" -m pytest -q -m gpu -p no:cacheprovider $xdist tests
"$python" -m benchmarks.speed --out "$out" --seconds 700
limited tune 240 "$python" -m benchmarks.tune --direction forward --dtype bf16 --json "$out/$now-tune.json"
limited accuracy 120 "$python" -m benchmarks.accuracy --device cuda --json "$out/$now-accuracy.json"
limited doctor 150 "$python" -m fastkl doctor --device cuda
limited memcheck 180 $sanitizer memcheck $smoke
limited racecheck 180 $sanitizer racecheck $smoke
