#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace zigzag::cpu {

/// Calls work(task) once for every task in [0, tasks) on the threads that all operations of the
/// process share: num_threads() slots, however many rank threads call at once, so that W ranks
/// never oversubscribe the cores. Tasks are claimed in ascending order: put the heaviest first. A
/// task may wait for an earlier one, which is done or runs on a live thread, and for nothing else.
/// Returns when all are done; the first exception that a task throws is rethrown then.
void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)>& work);

/// The same for ranges: calls work(begin, end) over pieces of [0, count) of about `grain`.
void parallel_ranges(std::int64_t count, std::int64_t grain,
                     const std::function<void(std::int64_t, std::int64_t)>& work);

/// Uninitialised memory aligned to 256 bytes, on huge pages where the system has them and it is
/// large; std::free releases it.
void* allocate_pages(std::int64_t bytes);

/// Memory of the calling thread, aligned to 64 bytes and kept for its next call: at least `bytes`,
/// uninitialised. A later call on the same thread takes it back.
std::byte* thread_scratch(std::size_t bytes);

}  // namespace zigzag::cpu
