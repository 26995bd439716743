#!/usr/bin/env bash
# Everything that needs a GPU, in one command and at most nine minutes:
#
#     benchmarks/gpu_run.sh OUT_FOLDER [--rehearse]
#
# Builds csrc in place, runs the tests that need a CUDA device, the benchmarks at GPU sizes, the
# memory ceilings and a short bfloat16 training run; writes results.json, report.md with plots, and
# log.txt into OUT_FOLDER. A part that fails or runs out of time does not stop those after it; the
# last lines say what failed, and the exit code is then 1. Needs nothing from a network.
#
# --rehearse runs the same parts on a CPU in the smallest sizes, in under a minute.
# MFLOW_COMMIT names the commit in the results where there is no git; MFLOW_SECONDS is the limit (540).
set -uo pipefail

usage() { sed -n '2,13p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }

out='' rehearse=''
for argument in "$@"; do
  case "$argument" in
    --rehearse) rehearse=1 ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$argument ;;
  esac
done
[ -n "$out" ] || usage
mkdir -p "$out/parts" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2

log=$out/log.txt
seconds=${MFLOW_SECONDS:-540}
margin=30 # for the report
started=$SECONDS
failed=()
: >"$log"

say() { echo "$*" | tee -a "$log"; }

# part NAME LIMIT COMMAND...: within LIMIT seconds, and within what is left of them all.
part() {
  local name=$1 limit=$2 left=$((seconds - margin - (SECONDS - started)))
  local begin=$SECONDS
  shift 2
  [ "$name" = report ] && left=$((left + margin))
  if [ "$left" -lt 5 ]; then
    say "== $name: no time left"
    failed+=("$name (no time left)")
    return
  fi
  [ "$limit" -le "$left" ] || limit=$left
  say "== $name: $* (at most $limit s)"
  timeout --kill-after=5 "$limit" "$@" >>"$log" 2>&1
  local code=$?
  say "== $name: exit code $code after $((SECONDS - begin)) s"
  [ "$code" -eq 124 ] || [ "$code" -eq 137 ] && failed+=("$name (stopped after $limit s)") && return
  [ "$code" -eq 0 ] || failed+=("$name (exit code $code)")
}

# bench NAME LIMIT FILES...: benchmarks; groups that do not start in time are skipped, so that what
# was measured is saved before `timeout` would stop it.
bench() {
  local name=$1 limit=$2
  shift 2
  part "$name" "$limit" python3 -m pytest "${@/#/benchmarks/bench_}" --benchmark-only \
    --benchmark-json "$out/parts/$name.json" --time-limit $((limit * 3 / 5)) "${sizes[@]}"
}

if [ -n "$rehearse" ]; then
  sizes=(--tiny --device cpu)
  tests=(tests/ops/test_logdet.py)
  build=(python3 -c 'import mflow_kernels._C') # as it was built: others may be using it
else
  sizes=(--device cuda)
  # Where GPU tests are; of those the one left out reads digits of a package that is not there.
  tests=(tests/ops tests/layers tests/models tests/test_objectives.py
    --ignore tests/models/test_plain_glow.py)
  build=(python3 setup.py build_ext --inplace)
fi

part environment 20 python3 -m mflow_kernels.env
part build 90 "${build[@]}"
part tests 130 python3 -m pytest -m gpu "${tests[@]}"
bench models 110 models.py layers.py
bench ceilings 150 ceilings.py training.py
bench ops 90 ops.py
results=("$out"/parts/*.json)
part report 30 python3 -m benchmarks.report "${results[@]}" --save "$out/results.json" --out "$out"

if [ ${#failed[@]} -eq 0 ]; then
  say "all parts passed in $((SECONDS - started)) s"
  exit 0
fi
say "failed, after $((SECONDS - started)) s:"
for name in "${failed[@]}"; do say "  $name"; done
exit 1
