#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: builds for the card it finds, runs the op suite on it with every
# backend, the kernels under compute-sanitizer, and the benchmarks. Installs nothing, and needs no network.
#
#   bash benchmarks/gpu.sh RESULTS_FOLDER
#
# It ends inside FASTDIS_GPU_SECONDS (500). A stage that fails or runs out of time is recorded, the later ones still run,
# and the command then fails. RESULTS_FOLDER gets gpu.json, table.txt and the logs; the table is printed last.
#
# PYTHON                 the interpreter that has torch (python3)
# FASTDIS_GPU_STAGES     a selection of "build suite large sanitizer benchmarks"; what is left out is recorded as such
# FASTDIS_GPU_DRY_RUN=1  no GPU and no build: every stage on the CPU, with what is installed and tiny sizes
# .whl/                  wheels of Python packages that are missing here, if there is such a folder
set -uo pipefail

if [ $# -ne 1 ]; then
  echo "usage: bash benchmarks/gpu.sh RESULTS_FOLDER" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
results=$(cd "$1" && pwd)
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2

python=${PYTHON:-python3}
dry=${FASTDIS_GPU_DRY_RUN:-0}
stages=${FASTDIS_GPU_STAGES:-build suite large sanitizer benchmarks}
deadline=${FASTDIS_GPU_SECONDS:-500}
here=benchmarks/gpu
base=build/gpu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# -P of every Python below: the package is the one that was built, not the one in the current folder.
export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export PYTHONPATH="$root/tests/ops:$root/benchmarks/ops:$root/$here"
if [ "$dry" = 1 ]; then
  device=cpu
else
  device=cuda
  PYTHONPATH="$root/$base/site:$PYTHONPATH"
fi
export TRITON_CACHE_DIR="$root/$base/triton" TORCHINDUCTOR_CACHE_DIR="$root/$base/inductor"
# Without it cuBLAS refuses to run under torch's deterministic algorithms, which some tests turn on.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

least() { echo $(($1 < $2 ? $1 : $2)); }
remaining() { echo $((deadline - SECONDS)); }
wanted() { [[ " $stages " == *" $1 "* ]]; }

record() { # stage, exit code, seconds, seconds allowed
  printf '{"stage": "%s", "exit": %d, "seconds": %d, "allowed": %d}\n' "$@" >>"$work/stages.jsonl"
  echo "$1: exit $2 after $3 of $4 s"
}

# Runs a command as a stage, its output in a log; a stage for which no time is left is recorded as one that ran out.
# What is in `signal` ends it then: pytest reports what it has after an interrupt.
stage() { # name, seconds, command...
  local name=$1 allowed=$2 started=$SECONDS code=0
  shift 2
  if [ "$allowed" -gt 0 ]; then
    timeout --signal="${signal:-TERM}" --kill-after=10 "$allowed" "$@" >"$work/$name.log" 2>&1 || code=$?
  else
    code=124
  fi
  record "$name" "$code" $((SECONDS - started)) "$allowed"
}

build() {
  rm -rf "$base/site"
  FORCE_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} "$python" setup.py build --build-base "$base" --build-lib "$base/site"
}

suite() { # JUnit file, processes, pytest arguments...
  local report=$1 processes=$2 workers=()
  shift 2
  if [ "$processes" -gt 1 ] && "$python" -c "import xdist"; then workers=(-n "$processes" --dist worksteal); fi
  # A worker for each core compiles; each of them starting as many more would only get in their way.
  OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 "$python" -m pytest -p no:cacheprovider -o junit_logging=no \
    --junitxml "$work/$report.xml" ${workers[@]+"${workers[@]}"} "$@"
}

sanitizer() { # tool
  local command=("$python" "$here/sanitize.py" --device "$device")
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # or an access beyond a tensor would fall into memory that the cache holds
  if [ "$dry" = 1 ]; then
    "${command[@]}"
    return
  fi
  local checker
  checker=$(command -v compute-sanitizer || command -v /usr/local/cuda/bin/compute-sanitizer) || {
    echo "compute-sanitizer is not installed"
    return 127
  }
  local options=(--tool "$1" --error-exitcode 9)
  # torch asks the driver for things that may not be there, and copes with the answer.
  if [ "$1" = memcheck ]; then options+=(--report-api-errors no); fi
  "$checker" "${options[@]}" "${command[@]}"
}

# Compiles what the benchmarks will time, in parallel, into the caches of Inductor and Triton.
precompile() {
  local workers code=0 pids=()
  workers=$(least "$(nproc)" 12)
  for ((worker = 0; worker < workers; ++worker)); do
    TORCHINDUCTOR_COMPILE_THREADS=2 OMP_NUM_THREADS=1 \
      "$python" "$here/bench.py" --device "$device" --precompile "$worker" "$workers" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
  return "$code"
}

if compgen -G ".whl/*.whl" >/dev/null; then
  stage wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/wheels" .whl/*.whl
  PYTHONPATH="$PYTHONPATH:$work/wheels"
fi

export -f build suite sanitizer precompile least
export python dry device here base work root

if [ "$dry" != 1 ]; then
  TORCH_CUDA_ARCH_LIST=$("$python" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") || {
    echo "$python has no torch that sees a GPU; name one that has by PYTHON, or set FASTDIS_GPU_DRY_RUN=1" >&2
    exit 2
  }
  export TORCH_CUDA_ARCH_LIST
fi

if wanted build && [ "$dry" != 1 ]; then stage build "$(least 180 "$(remaining)")" bash -c build; fi
stage environment 100 "$python" "$here/environment.py" "$work/environment.json"

if wanted sanitizer; then
  allowed=$(least 150 "$(($(remaining) - 150))")
  tools=(memcheck racecheck)
  if [ "$dry" = 1 ]; then tools=(memcheck); fi # they differ in compute-sanitizer alone
  for tool in "${tools[@]}"; do stage "$tool" "$allowed" bash -c "sanitizer $tool" & done
fi
if wanted suite; then
  if [ "$dry" = 1 ]; then
    processes=1
    selection=(tests/ops/test_on_gpu.py tests/ops/test_gaussian_kl.py -k "on_gpu or schema")
  else
    processes=$(least "$(nproc)" 16)
    # The other files of that folder need no GPU.
    selection=(tests/ops -k "cuda or on_gpu" --ignore tests/ops/test_cuda_compile.py
      --ignore tests/ops/test_triton_compile.py --ignore tests/ops/test_triton_interpreter.py)
    if "$python" -c "import scipy, sklearn"; then selection=(tests/spectral/test_device.py "${selection[@]}"); fi
  fi
  signal=INT stage suite "$(least 150 "$(($(remaining) - 150))")" bash -c 'suite suite "$@"' - "$processes" \
    "${selection[@]}"
fi
wait
if wanted large && [ "$dry" != 1 ]; then
  signal=INT stage large "$(least 40 "$(($(remaining) - 140))")" bash -c 'suite large 1 tests/ops/test_on_gpu.py -m slow'
fi
if wanted benchmarks; then
  if [ "$dry" != 1 ]; then
    stage precompile "$(least 80 "$(($(remaining) - 100))")" bash -c precompile
    # Configurations chosen meanwhile were timed on a busy GPU: they are chosen again on a quiet one.
    find "$TORCHINDUCTOR_CACHE_DIR" -name '*.best_config' -delete
  fi
  allowed=$(($(remaining) - 15))
  stage benchmarks "$allowed" "$python" "$here/bench.py" --device "$device" --seconds $((allowed - 15)) \
    --out "$work/benchmarks.json"
fi

for log in "$work"/*.log; do tail -c 4000000 "$log" >"$results/$(basename "$log")"; done
(cd "$results" && cat memcheck.log racecheck.log >sanitizer.log 2>/dev/null
  cat wheels.log precompile.log >>benchmarks.log 2>/dev/null
  rm -f memcheck.log racecheck.log wheels.log precompile.log environment.log)
"$python" "$here/report.py" "$work" "$results" --stages "$stages" --device "$device"
