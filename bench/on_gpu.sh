#!/bin/bash
# What only a GPU can show: builds natten for the one that is here, with the policies of all older architectures, runs the
# test suite on it, a part of it under compute-sanitizer, and the benchmark; and writes a report.
#
# Usage: bench/on_gpu.sh [-o folder] [stage ...]
#   folder   of the report and the logs; by default $OUT, or else build/on_gpu
#   stages   build, test, memcheck, racecheck, bench; all of them by default. One that fails does not keep the next from
#            running, but for build.
#
# Needs nvcc (11.8 or later; 12 at most for SM50 to SM70), g++, CMake 3.20, Ninja, and a Python with torch for CUDA,
# pybind11, scikit-build-core, pytest, NumPy, tqdm, and the headers of nvidia-cutlass 4.2. What of these Python packages is
# missing is installed from the wheels in the folder $WHEELS, where it is set: then nothing is downloaded.
# PYTEST_ARGS and BENCH_ARGS are passed on, PYTHON is the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
folder=${OUT:-build/on_gpu}
if [ "${1:-}" = -o ]; then
  folder=${2:?-o wants a folder}
  shift 2
fi
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build test memcheck racecheck bench)

build() {
  local arch
  arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .) || return
  if [ -n "${WHEELS:-}" ]; then
    export PIP_NO_INDEX=1 PIP_FIND_LINKS=$WHEELS
    "$python" -m pip install --no-deps "$WHEELS"/*.whl || return
  fi
  "$python" -m pip install --no-build-isolation --no-deps --force-reinstall --verbose . \
    --config-settings cmake.define.NATTEN_CUDA=ON --config-settings "cmake.define.NATTEN_CUDA_ARCHS=$arch" \
    --config-settings cmake.define.NATTEN_CUDA_ALL_POLICIES=ON
}

# shellcheck disable=SC2086  # PYTEST_ARGS and BENCH_ARGS are several words
run_tests() {
  "$python" -m pytest --device cuda --quiet -p no:cacheprovider ${PYTEST_ARGS:-}
}

# Every policy, on problems of each rank and with all operands. Torch's allocator would hide what leaves a tensor.
sanitize() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 \
    "$python" -m pytest --device cuda --quiet -p no:cacheprovider tests/test_kernels.py -k "$2"
}

# shellcheck disable=SC2086
run_bench() {
  "$python" -m bench --device cuda --json "$folder/bench.json" ${BENCH_ARGS:-}
}

run_stage() {
  case $1 in
    build) build ;;
    test) run_tests ;;
    memcheck) sanitize memcheck "test_feature and (rank1 or rank3 or boxes or additional or rpb or gqa)" ;;
    racecheck) sanitize racecheck "test_feature and (rank2 or rpb)" ;;
    bench) run_bench ;;
    *)
      echo "no stage is called $1: build, test, memcheck, racecheck, bench" >&2
      return 2
      ;;
  esac
}

mkdir -p "$folder" || exit
report=$folder/report.md
{
  echo "# natten on a GPU"
  echo
  echo "- $(git describe --always --dirty 2>/dev/null || echo "an unknown commit"), $(date -u +"%F %T") UTC"
  echo "- $(nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader 2>&1 | head -n 1)"
  echo "- $(nvcc --version 2>&1 | tail -n 1)"
  echo "- $("$python" -c 'import sys, torch; print("Python", sys.version.split()[0] + ", torch", torch.__version__)' 2>&1 | tail -n 1)"
  echo
  echo "| stage | result | seconds | last line |"
  echo "| --- | --- | ---: | --- |"
} >"$report"

failures=0
for stage in "${stages[@]}"; do
  log=$folder/$stage.log
  begin=$SECONDS
  if run_stage "$stage" 2>&1 | tee "$log"; then
    result=passed
  else
    result=FAILED
    failures=$((failures + 1))
  fi
  last=$(grep -v '^[[:space:]]*$' "$log" | tail -n 1 | tr '|' '/' | cut -c 1-120)
  echo "| $stage | $result | $((SECONDS - begin)) | $last |" >>"$report"
  if [ "$stage" = build ] && [ $result = FAILED ]; then
    break
  fi
done
if [ -f "$folder/bench.json" ]; then
  {
    echo
    "$python" -m bench --device cuda --load "$folder/bench.json" --markdown 2>&1
  } >>"$report"
fi
cat "$report"
[ $failures -eq 0 ]
