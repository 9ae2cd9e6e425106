#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include <dlfcn.h>

#include "comm/device_rows.h"
#include "comm/factories.h"
#include "comm/nccl_library.h"
#include "comm/nccl_watch.h"
#include "comm/wait.h"
#include "cuda/check.h"
#include "cuda/device.h"
#include "cuda/layout.h"
#include "cuda/library.h"
#include "cuda/sum_rows.h"
#include "cuda/timeline.h"
#include "zigzag/communicator.h"
#include "zigzag/error.h"

namespace zigzag::comm {
namespace {

using cuda::as_stream;

enum List : std::uint64_t { kSendRows = 11, kReceiveRows, kOwnRows, kSendPartials, kSums };

template <typename Function>
void load(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
  if (function == nullptr) {
    throw CommunicationError(std::string("the NCCL that was opened has no ") + name);
  }
}

NcclLibrary open_nccl() {
  const cuda::OpenedLibrary opened =
      cuda::open_library("ZIGZAG_NCCL_PATH", "libnccl.so.2", "nvidia/nccl/lib");
  if (opened.handle == nullptr) throw CommunicationError(opened.detail);
  NcclLibrary nccl;
  load(opened.handle, "ncclGetVersion", nccl.get_version);
  load(opened.handle, "ncclGetUniqueId", nccl.get_unique_id);
  load(opened.handle, "ncclCommInitRank", nccl.init_rank);
  load(opened.handle, "ncclCommDestroy", nccl.destroy);
  load(opened.handle, "ncclCommAbort", nccl.abort);
  load(opened.handle, "ncclCommGetAsyncError", nccl.get_async_error);
  load(opened.handle, "ncclGetErrorString", nccl.error_string);
  load(opened.handle, "ncclGroupStart", nccl.group_start);
  load(opened.handle, "ncclGroupEnd", nccl.group_end);
  load(opened.handle, "ncclSend", nccl.send);
  load(opened.handle, "ncclRecv", nccl.recv);
  nccl.detail = opened.detail;
  return nccl;
}

/// Rows that go to or come from one peer: a run of the packed rows.
struct Run {
  int peer;
  std::int64_t first_row;
  std::int64_t rows;
};

/// Lists that pack rows for every peer end to end, with the run of each.
struct Packing {
  std::vector<Segment> segments;  // between a tensor and the packed rows
  std::vector<Run> runs;
  std::int64_t rows = 0;
};

/// Exchanges over NCCL: rows are packed for each peer, sent in one group and put in their places.
/// Only rows that a peer reads travel.
class NcclTransport final : public Transport {
 public:
  NcclTransport(std::shared_ptr<Transport> bootstrap, int device)
      : bootstrap_(std::move(bootstrap)), nccl_(NcclLibrary::get()), device_(device) {
    cuda::DeviceGuard guard(device);
    ncclUniqueId id{};
    if (rank() == 0) nccl_.check(nccl_.get_unique_id(&id), "ncclGetUniqueId");
    std::vector<ncclUniqueId> ids(static_cast<std::size_t>(size()));
    bootstrap_->all_gather(std::as_bytes(std::span<const ncclUniqueId>(&id, 1)),
                           std::as_writable_bytes(std::span<ncclUniqueId>(ids)));
    nccl_.check(nccl_.init_rank(&comm_, size(), ids[0], rank()), "ncclCommInitRank");
    watch_ = std::make_unique<NcclWatch>(nccl_, comm_, device, rank(), timeout_seconds());
  }

  ~NcclTransport() override {
    const bool broken = watch_->stop();
    if (!broken) (void)nccl_.destroy(comm_);
  }
  NcclTransport(const NcclTransport&) = delete;
  NcclTransport& operator=(const NcclTransport&) = delete;

  int rank() const override { return bootstrap_->rank(); }
  int size() const override { return bootstrap_->size(); }
  std::string_view name() const override { return "nccl"; }

  void all_gather(std::span<const std::byte> in, std::span<std::byte> out) override {
    watch_->check();
    bootstrap_->all_gather(in, out);
  }
  void barrier() override { bootstrap_->barrier(); }
  void abort(std::string_view reason) noexcept override {
    bootstrap_->abort(reason);
    // Kernels of this rank that wait for peers end, so that its GPU can be used again.
    watch_->abort(reason);
  }

  void gather(std::span<const TensorView> sources, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue queue) override {
    check_device(sources, device_, rank());
    check_device(destinations, device_, rank());
    const cudaStream_t stream = as_stream(queue.stream);
    const Packing out = pack_list(table.sends, true);
    const Packing in = pack_list(table.receives, false);
    std::vector<Segment> unpacking;
    for (const Segment& s : in.segments) {
      unpacking.push_back({0, s.destination_row, s.source_row, s.rows});
    }
    exchange(sources, out, list_key(table, kSendRows), in, step, stream,
             [&](std::size_t t, void* received) {
               const TensorView rows = packed_like(destinations[t], received, in.rows);
               cuda::copy_rows(rows, destinations[t], unpacking, list_key(table, kReceiveRows),
                               queue.stream);
               std::vector<Segment> own = table.receives[static_cast<std::size_t>(rank())];
               for (Segment& segment : own) segment.source = 0;
               cuda::copy_rows(sources[t], destinations[t], own, list_key(table, kOwnRows),
                               queue.stream);
             });
  }

  void reduce(std::span<const TensorView> partials, std::span<const TensorView> destinations,
              const ExchangeTable& table, const Step& step, Queue queue) override {
    check_device(partials, device_, rank());
    check_device(destinations, device_, rank());
    const cudaStream_t stream = as_stream(queue.stream);
    // The rows of a gather the other way: what came from a peer goes back to it.
    const Packing out = pack_list(table.receives, false);
    const Packing in = pack_list(table.sends, true);
    const cuda::TableKey key{list_key(table, kSums), 0, 32};
    exchange(partials, out, list_key(table, kSendPartials), in, step, stream,
             [&](std::size_t t, void* received) {
               std::vector<const void*> bases(static_cast<std::size_t>(size()), received);
               bases[static_cast<std::size_t>(rank())] = partials[t].data;
               cuda::sum_rows(
                   bases, partials[t].dtype, 1, destinations[t], key,
                   [&] { return sum_table(table); }, queue.stream);
             });
  }

 private:
  /// Packs, sends and receives every tensor in one group; then `place` is called for each with the
  /// rows received.
  template <typename Place>
  void exchange(std::span<const TensorView> tensors, const Packing& out, std::uint64_t out_key,
                const Packing& in, const Step& step, cudaStream_t stream, const Place& place) {
    watch_->check();
    cuda::DeviceGuard guard(device_);
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    cuda::check(cudaStreamIsCapturing(stream, &capture), "cudaStreamIsCapturing");
    if (capture != cudaStreamCaptureStatusNone) {
      throw DeviceError(
          "a CUDA graph over several ranks needs peer memory between threads of one process; this "
          "group exchanges through NCCL, whose deadlines no graph keeps");
    }
    const cuda::TimelineScope scope(step_text(step), rank(), device_, cuda::Lane::kExchange,
                                    stream);
    cuda::DeviceState& device = cuda::DeviceState::get(device_);
    std::vector<std::unique_ptr<cuda::Scratch>> sent;
    std::vector<std::unique_ptr<cuda::Scratch>> received;
    for (const TensorView& tensor : tensors) {
      const std::int64_t bytes = tensor.row_bytes();
      sent.push_back(std::make_unique<cuda::Scratch>(device, out.rows * bytes, stream));
      received.push_back(std::make_unique<cuda::Scratch>(device, in.rows * bytes, stream));
      const TensorView packed = packed_like(tensor, sent.back()->data(), out.rows);
      cuda::copy_rows(tensor, packed, out.segments, out_key, stream);
    }
    nccl_.check(nccl_.group_start(), "ncclGroupStart");
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      const std::int64_t bytes = tensors[t].row_bytes();
      for (const Run& run : out.runs) {
        nccl_.check(nccl_.send(sent[t]->as<char>() + run.first_row * bytes,
                               static_cast<std::size_t>(run.rows * bytes), ncclInt8, run.peer,
                               comm_, stream),
                    "ncclSend");
      }
      for (const Run& run : in.runs) {
        nccl_.check(nccl_.recv(received[t]->as<char>() + run.first_row * bytes,
                               static_cast<std::size_t>(run.rows * bytes), ncclInt8, run.peer,
                               comm_, stream),
                    "ncclRecv");
      }
    }
    nccl_.check(nccl_.group_end(), "ncclGroupEnd");
    watch_->started(step_text(step), stream);
    for (std::size_t t = 0; t < tensors.size(); ++t) place(t, received[t]->data());
  }

  /// Rows of every other rank's list, packed in its order. `by_source`: the tensor is a shard,
  /// whose rows a segment counts by source_row; else a gathered buffer.
  Packing pack_list(const std::vector<std::vector<Segment>>& lists, bool by_source) const {
    Packing packing;
    for (int r = 0; r < size(); ++r) {
      if (r == rank()) continue;
      const std::int64_t first = packing.rows;
      for (const Segment& segment : lists[static_cast<std::size_t>(r)]) {
        packing.segments.push_back({0, by_source ? segment.source_row : segment.destination_row,
                                    packing.rows, segment.rows});
        packing.rows += segment.rows;
      }
      if (packing.rows > first) packing.runs.push_back({r, first, packing.rows - first});
    }
    return packing;
  }

  cuda::SumTable sum_table(const ExchangeTable& table) const {
    std::vector<cuda::SumPart> parts;
    std::int64_t row = 0;
    for (int r = 0; r < size(); ++r) {
      for (const Segment& segment : table.sends[static_cast<std::size_t>(r)]) {
        parts.push_back(
            {r, segment.source_row, r == rank() ? segment.destination_row : row, segment.rows});
        if (r != rank()) row += segment.rows;
      }
    }
    return cuda::make_sum_table(parts, size(), table.local_tokens);
  }

  std::shared_ptr<Transport> bootstrap_;
  const NcclLibrary& nccl_;
  int device_;
  ncclComm_t comm_ = nullptr;
  std::unique_ptr<NcclWatch> watch_;
};

}  // namespace

const NcclLibrary& NcclLibrary::get() {
  static const NcclLibrary library = open_nccl();
  return library;
}

std::string why_no_nccl() noexcept {
  try {
    (void)NcclLibrary::get();
    return "";
  } catch (const std::exception& error) {
    return error.what();
  }
}

void NcclLibrary::check(ncclResult_t result, const char* what) const {
  if (result == ncclSuccess || result == ncclInProgress) return;
  throw CommunicationError(std::string(what) + " failed: " + error_string(result));
}

}  // namespace zigzag::comm

namespace zigzag {

Communicator Communicator::nccl(const Communicator& bootstrap, int device) {
  return Communicator(std::make_shared<comm::NcclTransport>(bootstrap.transport_, device));
}

}  // namespace zigzag
