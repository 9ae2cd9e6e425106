#pragma once

#include <cstdint>
#include <memory>

namespace zigzag::cpu {

/// Uninitialised memory as allocate_pages gives it, which comes back to the process's pool: the
/// next call of forward or backward needs the same again, and new pages cost as much as copying
/// them. The pool keeps at most 256 MiB that nobody uses.
std::shared_ptr<void> pooled_pages(std::int64_t bytes);

}  // namespace zigzag::cpu
