#!/usr/bin/env bash
# Verify every implementation on an NVIDIA GPU, run every kernel's tests there and then every benchmark with a goal, and
# write one JSON with the results.
#   benchmarks/gpu.sh OUT.json [pytest arguments for the benchmarks]
# It takes at most SECONDS_IN_ALL (560), and 20 more to end. PYTHON names the interpreter (python3), DEVICE the device
# (cuda; cpu to try this script), M3ER_COMMIT the commit where there is no git. It needs PyTorch, Triton, pytest and
# pytest-benchmark; the verification also typer and rich. Tests and contestants whose libraries are missing, such as hypothesis or pyarrow, are skipped.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT.json}")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
limit=${SECONDS_IN_ALL:-560}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
# Names, and each one's share of the time.
table=$("$python" -m benchmarks.speed.operations) || exit 1
mapfile -t operations < <(cut -d' ' -f1 <<<"$table")
mapfile -t shares < <(cut -d' ' -f2 <<<"$table")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$(dirname "$out")"

# Run one part: its name, its time limit in seconds, arguments of pytest. At the limit it is interrupted and writes the
# results that it has; 20 seconds later it is killed.
part() {
  timeout -s INT -k 20 "$2" "$python" -m pytest -q -p no:cacheprovider --device "$device" "${@:3}"
  echo $? >"$work/$1.code"
}

# Which implementations are right here, in at most a minute; the rest runs whatever comes out.
timeout -s INT -k 20 100 "$python" -m m3er_fast.cli info --verify --json >"$work/verification.info"
echo $? >"$work/verification.code"

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
  workers=(-n 8) # kernels are compiled in parallel
fi
# Each test of large tensors takes most of a GPU's memory, so they run one after the other, after all other tests.
part tests $((limit * 35 / 100)) tests -m 'not large' "${workers[@]}" --junitxml="$work/tests.xml"
part large $((limit * 14 / 100)) tests -m large --junitxml="$work/large.xml"

# Every operation has a process of its own: if one hangs or loses the device, the others keep their results. Each takes
# its share of the time that is left, and leaves the rest of its share to those after it.
for number in "${!operations[@]}"; do
  operation=${operations[$number]}
  remaining=0
  for share in "${shares[@]:$number}"; do remaining=$((remaining + share)); done
  seconds=$(((limit - SECONDS) * shares[number] / remaining))
  part "$operation" $((seconds > 1 ? seconds : 1)) "benchmarks/speed/test_$operation.py" --benchmark-only \
    --benchmark-json="$work/$operation.json" "$@"
done
"$python" -m benchmarks.report.merge "$out" "$work" verification tests large "${operations[@]}"
