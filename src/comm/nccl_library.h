#pragma once

#include <string>

#include <nccl.h>

namespace zigzag::comm {

/// The functions of NCCL that the transport calls, taken from the library opened at run time.
struct NcclLibrary {
  decltype(&ncclGetVersion) get_version = nullptr;
  decltype(&ncclGetUniqueId) get_unique_id = nullptr;
  decltype(&ncclCommInitRank) init_rank = nullptr;
  decltype(&ncclCommDestroy) destroy = nullptr;
  decltype(&ncclCommAbort) abort = nullptr;
  decltype(&ncclCommGetAsyncError) get_async_error = nullptr;
  decltype(&ncclGetErrorString) error_string = nullptr;
  decltype(&ncclGroupStart) group_start = nullptr;
  decltype(&ncclGroupEnd) group_end = nullptr;
  decltype(&ncclSend) send = nullptr;
  decltype(&ncclRecv) recv = nullptr;
  std::string detail;

  /// Opened once a process. Throws CommunicationError that says how to get NCCL.
  static const NcclLibrary& get();

  /// Throws CommunicationError that decodes `result` unless it is success.
  void check(ncclResult_t result, const char* what) const;
};

}  // namespace zigzag::comm
