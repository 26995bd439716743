#!/usr/bin/env bash
# Everything that needs a GPU, in one command and at most nine minutes:
#
#     benchmarks/gpu_run.sh OUT_FOLDER [--rehearse]
#
# Builds csrc in place, runs the tests that need a CUDA device, the benchmarks at GPU sizes, the
# memory ceilings and a short bfloat16 training run; writes results.json, report.md with plots, and
# log.txt into OUT_FOLDER. A part that fails or runs out of time does not stop those after it; the
# last lines say what failed, and the exit code is then 1. Needs nothing from a network. What a part
# measured is in OUT_FOLDER/parts as soon as it ends, also where it is stopped:
# `python -m benchmarks.report OUT_FOLDER/parts/*.json --out OUT_FOLDER` makes the report of a run
# that was killed.
#
# --rehearse runs the same parts on a CPU in the smallest sizes, in under a minute; its parts have no
# limits but MFLOW_SECONDS, since a busy machine is no fault of theirs.
# MFLOW_COMMIT names the commit in the results where there is no git; MFLOW_SECONDS is the limit (540).
set -uo pipefail

usage() { sed -n '2,18p' "$0" | sed 's/^# \{0,1\}//' >&2; exit 2; }

out='' rehearse=''
for argument in "$@"; do
  case "$argument" in
    --rehearse) rehearse=1 ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$argument ;;
  esac
done
[ -n "$out" ] || usage
mkdir -p "$out" && out=$(cd "$out" && pwd) && rm -rf "$out/parts" && mkdir "$out/parts" || exit 2
log=$out/log.txt
: >"$log" || exit 2
cd "$(dirname "$0")/.." || exit 2

seconds=${MFLOW_SECONDS:-540}
margin=30 # for the report
started=$SECONDS
failed=()
# Compiled kernels, kept for the next run; many processes read and write them.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$PWD/build/inductor}
export OMP_NUM_THREADS=1 # of each of them

say() { echo "$*" | tee -a "$log"; }

left() { echo $((seconds - margin - (SECONDS - started))); }

# within LIMIT: the seconds of a part: LIMIT, but no more than is left; all of it in a rehearsal.
within() {
  local left
  left=$(left)
  if [ -z "$rehearse" ] && [ "$1" -lt "$left" ]; then echo "$1"; else echo "$left"; fi
}

# part NAME LIMIT COMMAND...: within LIMIT seconds, and within what is left of them all.
part() {
  local name=$1 limit begin=$SECONDS code
  limit=$(within "$2")
  [ "$name" = report ] && limit=$((limit + margin))
  shift 2
  if [ "$limit" -lt 5 ]; then
    say "== $name: no time left"
    failed+=("$name (no time left)")
    return
  fi
  say "== $name: ${told:-$*} (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >>"$log" 2>&1
  code=$?
  say "== $name: exit code $code after $((SECONDS - begin)) s"
  [ "$code" -eq 124 ] || [ "$code" -eq 137 ] && failed+=("$name (stopped after $limit s)") && return
  [ "$code" -eq 0 ] || failed+=("$name (exit code $code)")
}

# together NAME LIMIT COMMANDS: a line each, all at once, as what they wait for is Triton, which
# compiles on one core. Each prints into a file, and all of it goes to the log at the end.
together() {
  local folder=$out/parts/$1 told
  told="$(wc -l <<<"$3") at once, such as $(tail -n 1 <<<"$3")"
  mkdir -p "$folder"
  part "$1" "$2" bash -c 'all_at_once "$@"' _ "$folder" "$3"
  cat "$folder"/*.txt >>"$log" 2>/dev/null # none where there was no time
}

all_at_once() { # FOLDER COMMANDS
  local running=() code=0 command one
  while read -r command; do
    bash -c "$command" >"$1/${#running[@]}.txt" 2>&1 &
    running+=($!)
  done <<<"$2"
  for one in "${running[@]}"; do wait "$one" || code=$?; done
  return "$code"
}
export -f all_at_once

# shards COMMAND: lines of as many parts of a pytest command as there are cores; one may be empty.
shards() {
  for ((i = 1; i <= cores; i++)); do
    echo "python3 -m pytest $* -p benchmarks.harness.pytest_shard --shard $i/$cores || [ \$? -eq 5 ]"
  done
}

# bench NAME LIMIT FILES...: benchmarks; groups that do not start in time are skipped.
bench() {
  local name=$1 limit
  limit=$(within "$2")
  shift 2
  part "$name" "$limit" python3 -m pytest "${@/#/benchmarks/bench_}" --benchmark-only \
    --benchmark-json "$out/parts/$name.json" --time-limit $((limit * 3 / 5)) "${sizes[@]}"
}

check="benchmarks --benchmark-only --check"
if [ -n "$rehearse" ]; then
  sizes=(--tiny --device cpu)
  cores=1
  tests=(tests/ops/test_logdet.py)
  build=(python3 -c 'import mflow_kernels._C') # as it was built: others may be using it
  checks=$(shards "$check ${sizes[*]} -k accumulate_logdet")
else
  sizes=(--device cuda)
  cores=$(env -u OMP_NUM_THREADS nproc) # which would count those threads
  # Where GPU tests are; of those the one left out reads digits of a package that is not there.
  tests=(tests/ops tests/layers tests/models tests/models/test_objectives.py
    --ignore tests/models/test_plain_glow.py)
  # Without its CUDA part it is built all the same, and the part has failed.
  build=(bash -c 'MFLOW_CUDA=1 python3 setup.py build_ext --inplace ||
    { python3 setup.py build_ext --inplace; exit 1; }')
  # The kernels that benchmarks need are compiled here, on all cores; K = 32 needs no others.
  checks=$(shards "$check ${sizes[*]} --ignore benchmarks/bench_ceilings.py -k 'not K32'"
    for side in 256 512 1024; do
      echo "python3 -m pytest $check ${sizes[*]} -k '3x${side}x$side-L6 and ours'"
    done)
fi

part environment 20 python3 -m mflow_kernels.env
part build 90 "${build[@]}"
together tests 120 "$(shards -m gpu "${tests[@]}")"
together check 80 "$checks"
bench models 90 models.py layers.py interop.py
bench ops 60 ops.py
bench ceilings 150 training.py ceilings.py
results=("$out"/parts/*.json)
part report 30 python3 -m benchmarks.report "${results[@]}" --save "$out/results.json" --out "$out"

if [ ${#failed[@]} -eq 0 ]; then
  say "all parts passed in $((SECONDS - started)) s"
  exit 0
fi
say "failed, after $((SECONDS - started)) s:"
for name in "${failed[@]}"; do say "  $name"; done
exit 1
