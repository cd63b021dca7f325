#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: every kernel's tests, then its benchmarks, and one JSON that holds both.
#   benchmarks/gpu.sh OUT.json [pytest arguments for the benchmarks]
# PYTHON names the interpreter (python3); M3ER_COMMIT the commit, where there is no git. Needs PyTorch, Triton, pytest and
# pytest-benchmark; without hypothesis, a peer or a library the tests and contestants that need it skip.
set -uo pipefail
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT.json}")
shift
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$(dirname "$out")"

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
  workers=(-n 8) # kernels are compiled side by side
fi
# The tests of large tensors take most of a GPU's memory each: they go one after the other, after the others.
timeout -s INT -k 20 210 "$python" -m pytest tests -q -p no:cacheprovider --device cuda -m 'not large' "${workers[@]}" \
  --junitxml="$work/tests.xml"
tests=$?
timeout -s INT -k 20 80 "$python" -m pytest tests -q -p no:cacheprovider --device cuda -m large --junitxml="$work/large.xml"
large=$?
# The kernels first: what does not fit into the time is missing, and what was measured is kept. A CCA is fitted on the CPU.
timeout -s INT -k 20 200 "$python" -m pytest benchmarks/test_fusion_loss.py benchmarks/test_correlation_gate.py \
  benchmarks/test_local_lstsq.py benchmarks/test_neighbors.py benchmarks/test_memory_scan.py -q -p no:cacheprovider \
  --device cuda --benchmark-only --benchmark-json="$work/benchmarks.json" "$@"
benchmarks=$?

"$python" - "$out" "$work" <<'PYTHON'
import json, pathlib, sys
import xml.etree.ElementTree as tree

out, work = map(pathlib.Path, sys.argv[1:])
report = {"tests": {}}
for name in ("tests", "large"):
    suite = next(iter(tree.parse(work / f"{name}.xml").getroot()), None) if (work / f"{name}.xml").exists() else None
    if suite is None:
        report["tests"][name] = "did not finish"
        continue
    report["tests"][name] = {key: float(suite.get(key)) for key in ("tests", "failures", "errors", "skipped", "time")}
    report["tests"][name]["failed"] = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
measured = work / "benchmarks.json"
report |= json.loads(measured.read_text()) if measured.exists() else {"benchmarks": "did not finish"}
out.write_text(json.dumps(report, indent=1) + "\n")
print(f"{out}: {json.dumps(report['tests'])}")
PYTHON
echo "exit codes: tests $tests, large tests $large, benchmarks $benchmarks"
[ "$tests" -eq 0 ] && [ "$large" -eq 0 ] && [ "$benchmarks" -eq 0 ]
