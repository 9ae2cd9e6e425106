#pragma once

#include <functional>
#include <utility>

#include "tensor.h"

namespace zigzag::python {

/// Runs a collective operation on memory of the host without the GIL. On Python's main thread the
/// work runs on a helper thread while this one waits, so that signals are handled: Ctrl-C aborts
/// `communicator`, leaves the work to end by itself and raises KeyboardInterrupt. `work` owns all
/// that it uses.
///
/// `device`: the work gives orders to that GPU and returns. It runs on the calling thread, whose
/// current device, streams and graph captures are CUDA's view of the caller.
void run_operation(std::function<void()> work, const Communicator& communicator,
                   Device device = {});

/// Calls back into Python from an operation, with the GIL, on the thread that called
/// run_operation. Exceptions of `call` come back to the operation.
void call_python(const std::function<void()>& call);

}  // namespace zigzag::python
