#include "run.h"

#include <chrono>
#include <condition_variable>
#include <exception>
#include <list>
#include <memory>
#include <mutex>
#include <thread>

#include "gil.h"

namespace zigzag::python {
namespace {

constexpr auto kSignalInterval = std::chrono::milliseconds(50);
// How long an interrupted operation may take to notice before it is left to itself.
constexpr auto kAbandonAfter = std::chrono::milliseconds(500);

/// An operation on its helper thread and the mailbox through which it calls Python.
struct Job {
  std::function<void()> work;
  std::mutex mutex;
  std::condition_variable wake_caller;
  std::condition_variable wake_worker;
  const std::function<void()>* request = nullptr;
  std::exception_ptr request_error;
  std::exception_ptr error;
  bool done = false;
  bool abandoned = false;
};

thread_local Job* current_job = nullptr;

void work_on(Job& job) {
  current_job = &job;
  std::exception_ptr error;
  try {
    job.work();
  } catch (...) {
    error = std::current_exception();
  }
  current_job = nullptr;
  const std::lock_guard lock(job.mutex);
  job.error = error;
  job.done = true;
  job.wake_caller.notify_all();
}

// Jobs that were interrupted and had not ended: their arrays must outlive the writes. Guarded by
// the GIL; freed by a later call on the main thread.
std::list<std::unique_ptr<Job>>& abandoned_jobs() {
  static auto* jobs = new std::list<std::unique_ptr<Job>>;
  return *jobs;
}

void free_ended_jobs() {
  abandoned_jobs().remove_if([](const std::unique_ptr<Job>& job) {
    const std::lock_guard lock(job->mutex);
    return job->done;
  });
}

bool is_main_thread() {
  nb::module_ threading = nb::module_::import_("threading");
  return threading.attr("current_thread")().is(threading.attr("main_thread")());
}

// Runs what the operation asks of Python; called with the GIL.
void answer(Job& job) {
  std::exception_ptr error;
  try {
    (*job.request)();
  } catch (...) {
    error = std::current_exception();
  }
  const std::lock_guard lock(job.mutex);
  job.request = nullptr;
  job.request_error = error;
  job.wake_worker.notify_all();
}

enum class Event { kDone, kRequest, kTick };

Event wait_for_event(Job& job, std::chrono::milliseconds limit) {
  std::unique_lock lock(job.mutex);
  job.wake_caller.wait_for(lock, limit, [&] { return job.done || job.request != nullptr; });
  return job.done ? Event::kDone : job.request != nullptr ? Event::kRequest : Event::kTick;
}

[[noreturn]] void interrupt(std::unique_ptr<Job> job, const Communicator& communicator) {
  nb::python_error interrupted;  // takes the pending KeyboardInterrupt
  bool ended = false;
  {
    const GilReleased release;
    {
      const std::lock_guard lock(job->mutex);
      job->abandoned = true;  // a request that comes from here on fails
      job->wake_worker.notify_all();
    }
    communicator.abort("interrupted by a signal");
    const auto limit = std::chrono::steady_clock::now() + kAbandonAfter;
    std::unique_lock lock(job->mutex);
    ended = job->wake_caller.wait_until(lock, limit, [&] { return job->done; });
  }
  if (!ended) {
    abandoned_jobs().push_back(std::move(job));
  }
  throw std::move(interrupted);
}

}  // namespace

void run_operation(std::function<void()> work, const Communicator& communicator, Device device) {
  if (device.type != DeviceType::kCpu || !is_main_thread() || communicator.name() == "mpi") {
    // MPI_THREAD_FUNNELED: the thread that initialised MPI makes its calls.
    const GilReleased release;
    work();
    return;
  }
  free_ended_jobs();
  auto job = std::make_unique<Job>();
  job->work = std::move(work);
  std::thread([raw = job.get()] { work_on(*raw); }).detach();
  for (;;) {
    Event event;
    {
      const GilReleased release;
      event = wait_for_event(*job, kSignalInterval);
    }
    if (event == Event::kDone) {
      break;
    }
    if (event == Event::kRequest) {
      answer(*job);
    } else if (PyErr_CheckSignals() != 0) {
      interrupt(std::move(job), communicator);
    }
  }
  std::exception_ptr error;
  {
    // The worker may still hold the mutex that it signalled under.
    const std::lock_guard lock(job->mutex);
    error = job->error;
  }
  if (error) {
    std::rethrow_exception(error);
  }
}

void call_python(const std::function<void()>& call) {
  Job* const job = current_job;
  if (job == nullptr) {
    const GilHeld acquire;
    call();
    return;
  }
  std::unique_lock lock(job->mutex);
  if (job->abandoned) {
    throw CommunicationError("the operation was interrupted by a signal");
  }
  job->request_error = nullptr;
  job->request = &call;
  job->wake_caller.notify_all();
  job->wake_worker.wait(lock, [&] { return job->request == nullptr || job->abandoned; });
  if (job->request != nullptr) {
    job->request = nullptr;
    throw CommunicationError("the operation was interrupted by a signal");
  }
  if (job->request_error) {
    std::rethrow_exception(std::exchange(job->request_error, nullptr));
  }
}

}  // namespace zigzag::python
