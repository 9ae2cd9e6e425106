// A library that writes what a GPU program's kernels, copies and CUDA calls did, as CSV lines. The
// driver loads it into any process: CUDA_INJECTION64_PATH=.../libcupti_trace.so
// ZIGZAG_CUPTI_TRACE=FILE program. benchmarks/gpu/trace_report.py reads the file.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include <cupti.h>

namespace {

constexpr std::size_t kBufferBytes = 8 << 20;
std::FILE* output = nullptr;
std::mutex output_mutex;

void CUPTIAPI give_buffer(std::uint8_t** buffer, std::size_t* size, std::size_t* records) {
  *size = kBufferBytes;
  *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(8, kBufferBytes));
  *records = 0;
}

void write_call(const CUpti_ActivityAPI& call, bool runtime) {
  const char* name = nullptr;
  (void)cuptiGetCallbackName(runtime ? CUPTI_CB_DOMAIN_RUNTIME_API : CUPTI_CB_DOMAIN_DRIVER_API,
                             call.cbid, &name);
  std::fprintf(output, "call,-1,%u,%llu,%llu,%s,0,0,0\n", call.threadId,
               static_cast<unsigned long long>(call.start),
               static_cast<unsigned long long>(call.end), name == nullptr ? "unknown" : name);
}

/// kind,device,stream or thread,start ns,end ns,name,grid or bytes,block,shared memory
void write_record(const CUpti_Activity* record) {
  switch (record->kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
      const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
      std::fprintf(output, "kernel,%u,%u,%llu,%llu,\"%s\",%dx%dx%d,%d,%d\n", kernel->deviceId,
                   kernel->streamId, static_cast<unsigned long long>(kernel->start),
                   static_cast<unsigned long long>(kernel->end), kernel->name, kernel->gridX,
                   kernel->gridY, kernel->gridZ, kernel->blockX * kernel->blockY * kernel->blockZ,
                   kernel->dynamicSharedMemory);
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMSET: {
      const auto* set = reinterpret_cast<const CUpti_ActivityMemset4*>(record);
      std::fprintf(output, "memset,%u,%u,%llu,%llu,memset,%llu,0,0\n", set->deviceId, set->streamId,
                   static_cast<unsigned long long>(set->start),
                   static_cast<unsigned long long>(set->end),
                   static_cast<unsigned long long>(set->bytes));
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY: {
      const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
      std::fprintf(output, "copy,%u,%u,%llu,%llu,copy kind %d,%llu,0,0\n", copy->deviceId,
                   copy->streamId, static_cast<unsigned long long>(copy->start),
                   static_cast<unsigned long long>(copy->end), copy->copyKind,
                   static_cast<unsigned long long>(copy->bytes));
      break;
    }
    case CUPTI_ACTIVITY_KIND_MEMCPY2: {
      const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpyPtoP4*>(record);
      std::fprintf(output, "copy,%u,%u,%llu,%llu,peer copy from %u,%llu,0,0\n", copy->deviceId,
                   copy->streamId, static_cast<unsigned long long>(copy->start),
                   static_cast<unsigned long long>(copy->end), copy->srcDeviceId,
                   static_cast<unsigned long long>(copy->bytes));
      break;
    }
    case CUPTI_ACTIVITY_KIND_RUNTIME:
    case CUPTI_ACTIVITY_KIND_DRIVER:
      write_call(*reinterpret_cast<const CUpti_ActivityAPI*>(record),
                 record->kind == CUPTI_ACTIVITY_KIND_RUNTIME);
      break;
    default:
      break;
  }
}

void CUPTIAPI take_buffer(CUcontext, std::uint32_t, std::uint8_t* buffer, std::size_t,
                          std::size_t valid) {
  const std::lock_guard lock(output_mutex);
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) write_record(record);
  std::free(buffer);
}

void finish() {
  (void)cuptiActivityFlushAll(1);
  const std::lock_guard lock(output_mutex);
  std::fflush(output);
}

}  // namespace

/// The driver calls this once, before the program's first CUDA call.
extern "C" __attribute__((visibility("default"))) int InitializeInjection() {
  const char* file = std::getenv("ZIGZAG_CUPTI_TRACE");
  if (file == nullptr) return 1;
  output = std::fopen(file, "w");
  if (output == nullptr) return 1;
  (void)cuptiActivityRegisterCallbacks(give_buffer, take_buffer);
  for (const CUpti_ActivityKind kind :
       {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMSET,
        CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMCPY2, CUPTI_ACTIVITY_KIND_RUNTIME}) {
    if (cuptiActivityEnable(kind) != CUPTI_SUCCESS) {
      std::fprintf(stderr, "cupti_trace: kind %d is not there\n", static_cast<int>(kind));
    }
  }
  std::atexit(finish);
  return 1;
}
