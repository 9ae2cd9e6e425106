#!/usr/bin/env bash
# Runs the GPU programs of build/gpu_carry (made by scripts/gpu_pack) on a machine with GPUs: logs
# and JSON go to $OUT (default build/gpu_out), a short summary is printed last. A part that fails
# does not stop the others.
#   scripts/gpu_session.sh test|processes|kill|run|single|masks|ranks|real|timeline|profile|sanitize...
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
OUT="${OUT:-build/gpu_out}"
mkdir -p "${OUT}"
carry=build/gpu_carry
libraries="${PWD}/${carry}/lib:${LD_LIBRARY_PATH:-}"
export NCCL_NVLS_ENABLE=0 PYTHONUNBUFFERED=1 ZIGZAG_TIMEOUT_S="${ZIGZAG_TIMEOUT_S:-60}"
# Few files come back from a lent machine: logs travel as one archive.
logs="$(mktemp -d)"
summary="${OUT}/summary.txt"
: >"${summary}"
chmod +x "${carry}"/gpu_* "${carry}"/zigzag

# part NAME SECONDS COMMAND...: its output goes to $OUT/NAME.log.
part() {
  local name="$1" limit="$2" start code
  shift 2
  start="$(date +%s)"
  LD_LIBRARY_PATH="${libraries}" timeout --kill-after=10 "${limit}" "$@" >"${logs}/${name}.log" 2>&1
  code=$?
  tar -C "${logs}" -czf "${OUT}/logs.tar.gz" .
  printf '%-14s exit %3d  %4d s\n' "${name}" "${code}" "$(($(date +%s) - start))" | tee -a "${summary}"
}

nvidia-smi -L | tee -a "${summary}"
for what in "$@"; do
  case "${what}" in
    test)
      part doctor 60 "${carry}/zigzag" doctor --json
      part gpu_test 280 "${carry}/gpu_test" --gtest_output="json:${OUT}/gpu_test.json" ${GPU_TEST_FILTER:+"--gtest_filter=${GPU_TEST_FILTER}"}
      ;;
    processes)
      part ipc_2 60 "${carry}/gpu_process_test" 2 peer 6
      part ipc_4 90 "${carry}/gpu_process_test" 4 peer 6
      [[ "$(nvidia-smi -L | wc -l)" -gt 1 ]] && part nccl_2 60 "${carry}/gpu_process_test" 2 nccl 6
      ;;
    kill)
      # A rank is killed in an exchange: the others end with an error that names it, and new
      # processes use the same GPUs.
      part kill_peer 60 env ZIGZAG_TIMEOUT_S=10 "${carry}/gpu_process_test" 2 peer 3 kill
      part kill_backward 60 env ZIGZAG_TIMEOUT_S=10 "${carry}/gpu_process_test" 2 peer 3 kill-backward
      [[ "$(nvidia-smi -L | wc -l)" -gt 1 ]] && part kill_nccl 60 env ZIGZAG_TIMEOUT_S=10 "${carry}/gpu_process_test" 2 nccl 3 kill
      ;;
    run)
      # The command, end to end, checked against the float64 reference and one rank.
      part run_peer 60 "${carry}/zigzag" run --device cuda --comm peer --ranks 4 --lengths 500,1,300,129 --heads 8 --kv-heads 2 --head-dim 64 --dtype bfloat16 --backward --check --json
      part run_float 60 "${carry}/zigzag" run --device cuda --ranks 2 --lengths 500,1,300,129 --heads 8 --kv-heads 2 --head-dim 64 --backward --check --json
      ;;
    single)
      part cudnn_direct 90 python3 benchmarks/gpu/cudnn_direct.py "${OUT}/cudnn_direct.json"
      part bench_single 150 "${carry}/gpu_bench" --json "${OUT}/bench_single.json" copy layout attention float32
      ;;
    masks)
      # head_dim 64, a window and a softcap with each engine that serves them; the others fall to the next.
      for engine in hopper cudnn fma; do
        pack=(--device cuda --ranks 1 --lengths 16384 --heads 32 --kv-heads 8 --dtype bfloat16 --repeat 7 --json)
        part "d64_${engine}" 60 env ZIGZAG_GPU_ENGINE="${engine}" "${carry}/zigzag" bench attention "${pack[@]}" --head-dim 64
        [[ "${engine}" == cudnn ]] && continue
        part "window_${engine}" 60 env ZIGZAG_GPU_ENGINE="${engine}" "${carry}/zigzag" bench attention "${pack[@]}" --window 2048
        part "softcap_${engine}" 60 env ZIGZAG_GPU_ENGINE="${engine}" "${carry}/zigzag" bench attention "${pack[@]}" --softcap 30
      done
      ;;
    ranks)
      part bench_peer 120 "${carry}/gpu_bench" --json "${OUT}/bench_peer.json" peer
      part bench_engine 60 env ZIGZAG_PEER_COPY=engine "${carry}/gpu_bench" peer
      part bench_kernel 60 env ZIGZAG_PEER_COPY=kernel "${carry}/gpu_bench" peer
      part bench_nccl 120 "${carry}/gpu_bench" --json "${OUT}/bench_nccl.json" nccl
      ;;
    real)
      part bench_real 240 "${carry}/gpu_bench" --json "${OUT}/bench_real.json" real
      ;;
    timeline)
      part timeline 60 "${carry}/zigzag" bench attention --device cuda --ranks 2 --lengths 16384 --heads 32 --kv-heads 8 --dtype bfloat16 --timeline "${OUT}/timeline.json"
      ;;
    profile)
      # Every kernel of a pass, and that steady calls neither wait nor allocate.
      cupti="$(dirname "$(find /usr/local /opt -name 'libcupti.so.1[0-9]*' 2>/dev/null | head -1)")"
      LD_LIBRARY_PATH="${libraries}:${cupti}" CUDA_INJECTION64_PATH="${PWD}/${carry}/libcupti_trace.so" \
        ZIGZAG_CUPTI_TRACE=/tmp/zigzag_trace.csv timeout 90 "${carry}/gpu_bench" profile >"${logs}/phases.txt" 2>&1
      part trace_report 60 python3 "${carry}/trace_report.py" /tmp/zigzag_trace.csv "${logs}/phases.txt" --kernels
      part steady_calls 60 python3 "${carry}/steady_calls.py" /tmp/zigzag_trace.csv
      ;;
    sanitize)
      part memcheck 200 compute-sanitizer --tool memcheck --error-exitcode 9 "${carry}/gpu_test" --gtest_filter='GpuLayout.StridedAndUnaligned:GpuAttention.OneRankHeadGroups:GpuAttention.Stages:GpuAttention.PeerRanksManyDocuments'
      small=GpuAttention.PackedInputs:GpuAttention.HeadsShareTilesOneRank
      # The tensor-core kernels: tensor maps, barriers in shared memory and warp groups that take turns.
      part memcheck_16 200 env ZIGZAG_GPU_ENGINE=hopper compute-sanitizer --tool memcheck --error-exitcode 9 "${carry}/gpu_test" --gtest_filter="${small}:GpuAttention.PeerRanksBfloat16:GpuAttention.MasksOfWholeTiles"
      part racecheck_16 200 env ZIGZAG_GPU_ENGINE=hopper compute-sanitizer --tool racecheck --error-exitcode 9 "${carry}/gpu_test" --gtest_filter="${small}"
      part synccheck_16 100 env ZIGZAG_GPU_ENGINE=hopper compute-sanitizer --tool synccheck --error-exitcode 9 "${carry}/gpu_test" --gtest_filter="${small}"
      part racecheck 150 compute-sanitizer --tool racecheck --error-exitcode 9 "${carry}/gpu_test" --gtest_filter='GpuAttention.Softcap:GpuAttention.PeerRanksFloat32'
      # Kernels of the library alone: cuDNN's barriers are more than the tool can follow.
      part synccheck 150 compute-sanitizer --tool synccheck --error-exitcode 9 "${carry}/gpu_test" --gtest_filter='GpuAttention.Softcap:GpuAttention.PeerRanksFloat32:GpuLayout.StridedAndUnaligned'
      ;;
    *) echo "gpu_session.sh: no part '${what}'" >&2 ;;
  esac
done

echo "=== failures and figures"
for log in "${logs}"/*.log; do
  echo "--- ${log##*/}"
  case "${log##*/}" in
    gpu_test.log) grep -E '^\[  (FAILED|PASSED)|W [0-9]+|cuDNN|Failure|is .* allowed|unknown file|C\+\+ exception' "${log}" | head -90 ;;
    *) tail -n 45 "${log}" ;;
  esac
done
cat "${summary}"
