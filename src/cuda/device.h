#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <vector>

#include <cuda_runtime_api.h>

namespace zigzag::cuda {

/// Names a table: what it is made from, two free numbers, and what kind it is.
struct TableKey {
  std::uint64_t plan = 0;
  std::uint64_t detail = 0;
  std::uint32_t kind = 0;
  auto operator<=>(const TableKey&) const = default;
};

/// A small read-only array in device memory, uploaded asynchronously on a stream of its own. Uses
/// on any stream are ordered after the upload, and its memory is released after its last use.
class DeviceTable {
 public:
  DeviceTable(int device, cudaMemPool_t pool, cudaStream_t stream, const void* data,
              std::size_t bytes);
  ~DeviceTable();
  DeviceTable(const DeviceTable&) = delete;
  DeviceTable& operator=(const DeviceTable&) = delete;

  /// The memory, for work that is given to `stream` from here on.
  const void* acquire(cudaStream_t stream);
  /// That work has been given.
  void release(cudaStream_t stream);
  std::size_t bytes() const { return bytes_; }

 private:
  int device_;
  cudaStream_t upload_stream_;
  void* memory_ = nullptr;
  std::size_t bytes_ = 0;
  void* pinned_ = nullptr;
  cudaEvent_t uploaded_ = nullptr;
  cudaEvent_t used_ = nullptr;
  std::mutex mutex_;
  cudaStream_t last_stream_ = nullptr;
  bool upload_seen_ = false;
  bool in_use_ = false;
  bool captured_ = false;  // by a graph, which may be launched at any time: memory stays
};

/// A table acquired for the work of one scope.
class TableUse {
 public:
  TableUse(std::shared_ptr<DeviceTable> table, cudaStream_t stream)
      : table_(std::move(table)), stream_(stream), data_(table_->acquire(stream)) {}
  ~TableUse() { table_->release(stream_); }
  TableUse(const TableUse&) = delete;
  TableUse& operator=(const TableUse&) = delete;

  template <typename T>
  const T* as() const {
    return static_cast<const T*>(data_);
  }

 private:
  std::shared_ptr<DeviceTable> table_;
  cudaStream_t stream_;
  const void* data_;
};

/// What the process keeps for one GPU: a memory pool that peers can read, the stream of table
/// uploads and the tables of the packs seen lately.
class DeviceState {
 public:
  /// The state of device `index`, made at first use. Throws DeviceError when there is no such GPU.
  static DeviceState& get(int index);

  int index() const { return index_; }
  cudaMemPool_t pool() const { return pool_; }

  /// The table of `key`; `build` is called when it is not there and gives its bytes.
  std::shared_ptr<DeviceTable> table(const TableKey& key,
                                     const std::function<std::vector<std::byte>()>& build);
  /// A table that nobody else will ask for.
  std::shared_ptr<DeviceTable> table(const void* data, std::size_t bytes);

  /// Memory of the pool in the order of `stream`. Throws DeviceError that says how much was asked
  /// for and how much is free.
  void* allocate(std::int64_t bytes, cudaStream_t stream);
  void free(void* memory, cudaStream_t stream) noexcept;

  /// A stream of the calling thread beside `compute`, for exchanges: its kernels start before those
  /// that wait on `compute`.
  cudaStream_t side_stream(cudaStream_t compute);

  /// Work given to `later` from here on starts after everything given to `earlier` so far.
  void order(cudaStream_t earlier, cudaStream_t later);

 private:
  explicit DeviceState(int index);

  int index_;
  cudaMemPool_t pool_ = nullptr;
  cudaStream_t upload_stream_ = nullptr;
  std::mutex mutex_;
  struct Slot {
    std::shared_ptr<DeviceTable> table;
    std::uint64_t last_use = 0;
  };
  std::map<TableKey, Slot> tables_;
  std::uint64_t clock_ = 0;
};

/// Memory of the pool for the work of one scope on one stream.
class Scratch {
 public:
  Scratch(DeviceState& device, std::int64_t bytes, cudaStream_t stream)
      : device_(device),
        stream_(stream),
        memory_(bytes > 0 ? device.allocate(bytes, stream) : nullptr) {}
  ~Scratch() {
    if (memory_ != nullptr) device_.free(memory_, stream_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  void* data() const { return memory_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  DeviceState& device_;
  cudaStream_t stream_;
  void* memory_;
};

/// Mixes a number into a hash.
inline std::uint64_t mix(std::uint64_t hash, std::uint64_t value) {
  hash ^= value + 0x9e3779b97f4a7c15ull + (hash << 12) + (hash >> 4);
  hash *= 0xff51afd7ed558ccdull;
  return hash ^ (hash >> 33);
}

/// The bytes of a vector of plain values.
template <typename T>
std::vector<std::byte> bytes_of(const std::vector<T>& values) {
  const auto* first = reinterpret_cast<const std::byte*>(values.data());
  return {first, first + values.size() * sizeof(T)};
}

/// Puts the bytes of a vector behind others; gives where they begin.
template <typename T>
std::size_t append_bytes(std::vector<std::byte>& bytes, const std::vector<T>& values) {
  const std::size_t at = bytes.size();
  const std::vector<std::byte> more = bytes_of(values);
  bytes.insert(bytes.end(), more.begin(), more.end());
  return at;
}

}  // namespace zigzag::cuda
