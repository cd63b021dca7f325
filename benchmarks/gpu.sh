#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: every kernel's tests, then all benchmarks with a goal there, and one JSON of it all.
#   benchmarks/gpu.sh OUT.json [pytest arguments for the benchmarks]
# It takes SECONDS_IN_ALL (560) at most, and 20 more to end. PYTHON names the interpreter (python3), DEVICE the device
# (cuda; cpu tries this script), M3ER_COMMIT the commit where there is no git. Needs PyTorch, Triton, pytest and
# pytest-benchmark; without hypothesis, pyarrow, a peer or another library the tests and contestants that need it skip.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT.json}")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
limit=${SECONDS_IN_ALL:-560}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$(dirname "$out")"

# A part of the run: its name, the most seconds that it takes, arguments of pytest. What does not end by itself is
# interrupted, and writes what it has; what does not react to that is killed.
part() {
  timeout -s INT -k 20 "$2" "$python" -m pytest -q -p no:cacheprovider --device "$device" "${@:3}"
  echo $? >"$work/$1.code"
}

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
  workers=(-n 8) # kernels are compiled side by side
fi
# The tests of large tensors take most of a GPU's memory each: they go one after the other, after the others.
part tests $((limit * 35 / 100)) tests -m 'not large' "${workers[@]}" --junitxml="$work/tests.xml"
part large $((limit * 14 / 100)) tests -m large --junitxml="$work/large.xml"

# Every operation in a process of its own: one that hangs, or loses the device, leaves the others their results. Of the
# time that is left each has its share, and what it does not need goes to those after it.
operations=(fusion_loss correlation_gate local_lstsq memory_scan neighbors cca end_to_end scoring)
shares=(4 3 3 6 3 2 4 2)
for number in "${!operations[@]}"; do
  operation=${operations[$number]}
  of=0
  for share in "${shares[@]:$number}"; do of=$((of + share)); done
  seconds=$(((limit - SECONDS) * shares[number] / of))
  part "$operation" $((seconds > 1 ? seconds : 1)) "benchmarks/test_$operation.py" --benchmark-only \
    --benchmark-json="$work/$operation.json" "$@"
done
"$python" benchmarks/merge.py "$out" "$work" tests large "${operations[@]}"
