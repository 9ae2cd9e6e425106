#include "cuda/device.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>

#include "cuda/check.h"
#include "zigzag/error.h"

namespace zigzag::cuda {
namespace {

constexpr std::size_t kMaxTables = 512;
constexpr int kMaxDevices = 64;

/// Page-locked memory for uploads: taken anew only when every earlier piece is still being read.
class PinnedPool {
 public:
  void* take(std::size_t bytes) {
    std::size_t size = 4096;
    while (size < bytes) size *= 2;
    std::lock_guard lock(mutex_);
    auto found = free_.find(size);
    if (found != free_.end()) {
      void* memory = found->second;
      free_.erase(found);
      return memory;
    }
    void* memory = nullptr;
    check(cudaHostAlloc(&memory, size, cudaHostAllocPortable), "cudaHostAlloc");
    return memory;
  }
  void give_back(void* memory, std::size_t bytes) {
    std::size_t size = 4096;
    while (size < bytes) size *= 2;
    std::lock_guard lock(mutex_);
    free_.emplace(size, memory);
  }

 private:
  std::mutex mutex_;
  std::multimap<std::size_t, void*> free_;
};

PinnedPool& pinned_pool() {
  // Never destroyed: tables may outlive static destruction, and CUDA is gone by then.
  static auto* pool = new PinnedPool;
  return *pool;
}

bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  if (stream == nullptr) return false;
  if (cudaStreamIsCapturing(stream, &status) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  return status != cudaStreamCaptureStatusNone;
}

/// An event of the calling thread on this device; a wait binds to its latest record at once, so one
/// serves for all orderings.
cudaEvent_t ordering_event(int device) {
  struct Events {
    std::map<int, cudaEvent_t> made;
    ~Events() {
      for (const auto& entry : made) (void)cudaEventDestroy(entry.second);
    }
  };
  thread_local Events events;
  cudaEvent_t& event = events.made[device];
  if (event == nullptr) {
    check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "cudaEventCreate");
  }
  return event;
}

}  // namespace

DeviceTable::DeviceTable(int device, cudaMemPool_t pool, cudaStream_t stream, const void* data,
                         std::size_t bytes)
    : device_(device), upload_stream_(stream), bytes_(std::max<std::size_t>(bytes, 16)) {
  DeviceGuard guard(device);
  const RelaxedCapture relaxed;
  check(cudaMallocFromPoolAsync(&memory_, bytes_, pool, stream), "cudaMallocFromPoolAsync");
  pinned_ = pinned_pool().take(bytes_);
  if (bytes != 0) std::memcpy(pinned_, data, bytes);
  check(cudaMemcpyAsync(memory_, pinned_, bytes_, cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
  check(cudaEventCreateWithFlags(&uploaded_, cudaEventDisableTiming), "cudaEventCreate");
  check(cudaEventCreateWithFlags(&used_, cudaEventDisableTiming), "cudaEventCreate");
  check(cudaEventRecord(uploaded_, stream), "cudaEventRecord");
}

DeviceTable::~DeviceTable() {
  if (captured_) return;  // a graph reads it whenever it is launched
  DeviceGuard guard(device_);
  const RelaxedCapture relaxed;
  if (in_use_) (void)cudaStreamWaitEvent(upload_stream_, used_, 0);
  (void)cudaFreeAsync(memory_, upload_stream_);
  // The page-locked copy may be overwritten only once the upload has read it.
  if (!upload_seen_) (void)cudaEventSynchronize(uploaded_);
  pinned_pool().give_back(pinned_, bytes_);
  (void)cudaEventDestroy(uploaded_);
  (void)cudaEventDestroy(used_);
}

const void* DeviceTable::acquire(cudaStream_t stream) {
  std::lock_guard lock(mutex_);
  const bool in_graph = capturing(stream);
  if (!upload_seen_) {
    const RelaxedCapture relaxed;
    if (in_graph) {
      // A graph cannot wait for it, and may be launched at any time.
      check(cudaEventSynchronize(uploaded_), "cudaEventSynchronize");
      upload_seen_ = true;
    } else if (cudaEventQuery(uploaded_) == cudaSuccess) {
      upload_seen_ = true;
    } else {
      (void)cudaGetLastError();
      check(cudaStreamWaitEvent(stream, uploaded_, 0), "cudaStreamWaitEvent");
    }
  }
  captured_ = captured_ || in_graph;
  // One event tells the last use, so uses on different streams form one chain.
  if (in_use_ && stream != last_stream_ && !in_graph) {
    check(cudaStreamWaitEvent(stream, used_, 0), "cudaStreamWaitEvent");
  }
  return memory_;
}

void DeviceTable::release(cudaStream_t stream) {
  std::lock_guard lock(mutex_);
  if (capturing(stream)) return;
  if (cudaEventRecord(used_, stream) != cudaSuccess) (void)cudaGetLastError();
  last_stream_ = stream;
  in_use_ = true;
}

DeviceState& DeviceState::get(int index) {
  static std::mutex mutex;
  static std::array<std::atomic<DeviceState*>, kMaxDevices> states{};
  if (index >= 0 && index < kMaxDevices) {
    DeviceState* state = states[static_cast<std::size_t>(index)].load(std::memory_order_acquire);
    if (state != nullptr) return *state;
  }
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    (void)cudaGetLastError();
    count = 0;
  }
  if (count == 0) throw DeviceError("no GPU can be used here: the CUDA driver finds none");
  if (index < 0 || index >= std::min(count, kMaxDevices)) {
    throw DeviceError("device cuda:" + std::to_string(index) + " does not exist: there are " +
                      std::to_string(count) + " GPUs");
  }
  const std::lock_guard lock(mutex);
  std::atomic<DeviceState*>& state = states[static_cast<std::size_t>(index)];
  // Never destroyed: the driver is gone before static destructors run.
  if (state.load() == nullptr) state.store(new DeviceState(index), std::memory_order_release);
  return *state.load();
}

DeviceState::DeviceState(int index) : index_(index) {
  DeviceGuard guard(index);
  cudaMemPoolProps props{};
  props.allocType = cudaMemAllocationTypePinned;
  props.handleTypes = cudaMemHandleTypeNone;
  props.location.type = cudaMemLocationTypeDevice;
  props.location.id = index;
  check(cudaMemPoolCreate(&pool_, &props), "cudaMemPoolCreate");
  std::uint64_t keep = ~std::uint64_t{0};
  check(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep),
        "cudaMemPoolSetAttribute");
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  for (int peer = 0; peer < count; ++peer) {
    int reach = 0;
    if (peer == index || cudaDeviceCanAccessPeer(&reach, peer, index) != cudaSuccess ||
        reach == 0) {
      continue;
    }
    cudaMemAccessDesc access{};
    access.location.type = cudaMemLocationTypeDevice;
    access.location.id = peer;
    access.flags = cudaMemAccessFlagsProtReadWrite;
    check(cudaMemPoolSetAccess(pool_, &access, 1), "cudaMemPoolSetAccess");
  }
  check(cudaStreamCreateWithFlags(&upload_stream_, cudaStreamNonBlocking), "cudaStreamCreate");
}

std::shared_ptr<DeviceTable> DeviceState::table(
    const TableKey& key, const std::function<std::vector<std::byte>()>& build) {
  std::lock_guard lock(mutex_);
  Slot& slot = tables_[key];
  slot.last_use = ++clock_;
  if (slot.table == nullptr) {
    try {
      const std::vector<std::byte> bytes = build();
      slot.table = table(bytes.data(), bytes.size());
    } catch (...) {
      tables_.erase(key);
      throw;
    }
    const std::shared_ptr<DeviceTable> made = slot.table;
    if (tables_.size() > kMaxTables) {
      const auto oldest = std::min_element(
          tables_.begin(), tables_.end(),
          [](const auto& a, const auto& b) { return a.second.last_use < b.second.last_use; });
      tables_.erase(oldest);
    }
    return made;
  }
  return slot.table;
}

std::shared_ptr<DeviceTable> DeviceState::table(const void* data, std::size_t bytes) {
  return std::make_shared<DeviceTable>(index_, pool_, upload_stream_, data, bytes);
}

void* DeviceState::allocate(std::int64_t bytes, cudaStream_t stream) {
  DeviceGuard guard(index_);
  void* memory = nullptr;
  const cudaError_t status =
      cudaMallocFromPoolAsync(&memory, static_cast<std::size_t>(bytes), pool_, stream);
  if (status == cudaErrorMemoryAllocation) {
    (void)cudaGetLastError();
    std::size_t free_bytes = 0;
    std::size_t total_bytes = 0;
    (void)cudaMemGetInfo(&free_bytes, &total_bytes);
    throw DeviceError("cuda:" + std::to_string(index_) + " has too little memory: " +
                      std::to_string(bytes) + " bytes are needed, " + std::to_string(free_bytes) +
                      " of " + std::to_string(total_bytes) + " are free");
  }
  check(status, "cudaMallocFromPoolAsync");
  return memory;
}

void DeviceState::free(void* memory, cudaStream_t stream) noexcept {
  int previous = 0;
  (void)cudaGetDevice(&previous);
  (void)cudaSetDevice(index_);
  (void)cudaFreeAsync(memory, stream);
  (void)cudaSetDevice(previous);
}

cudaStream_t DeviceState::side_stream(cudaStream_t compute) {
  // Per thread, so that ranks that are threads on one GPU never share one.
  struct Streams {
    std::map<std::pair<int, cudaStream_t>, cudaStream_t> made;
    ~Streams() {
      for (const auto& entry : made) (void)cudaStreamDestroy(entry.second);
    }
  };
  thread_local Streams streams;
  cudaStream_t& stream = streams.made[{index_, compute}];
  if (stream == nullptr) {
    DeviceGuard guard(index_);
    int least = 0;
    int greatest = 0;
    check(cudaDeviceGetStreamPriorityRange(&least, &greatest), "cudaDeviceGetStreamPriorityRange");
    check(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest),
          "cudaStreamCreateWithPriority");
  }
  return stream;
}

void DeviceState::order(cudaStream_t earlier, cudaStream_t later) {
  if (earlier == later) return;
  DeviceGuard guard(index_);
  const cudaEvent_t event = ordering_event(index_);
  check(cudaEventRecord(event, earlier), "cudaEventRecord");
  check(cudaStreamWaitEvent(later, event, 0), "cudaStreamWaitEvent");
}

}  // namespace zigzag::cuda
