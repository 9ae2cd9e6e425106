#pragma once

#include <chrono>
#include <thread>

#include <nanobind/nanobind.h>

namespace zigzag::python {

namespace nb = nanobind;

/// Where a thread stays that wants the GIL of an interpreter that has ended. Up to version 3.13
/// Python ends such a thread by unwinding its stack, which no destructor on the way lets pass: the
/// process would abort ("terminate called without an active exception") instead of exiting with its
/// code. Later versions keep the thread here themselves.
[[noreturn]] inline void stay_until_the_process_ends() {
  for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
}

/// Without the GIL while it lives, on any thread, also on one that outlives the interpreter.
class GilReleased {
 public:
  GilReleased() : state_(PyEval_SaveThread()) {}
  ~GilReleased() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {
      stay_until_the_process_ends();
    }
  }
  GilReleased(const GilReleased&) = delete;
  GilReleased& operator=(const GilReleased&) = delete;

 private:
  PyThreadState* state_;
};

/// With the GIL while it lives, on any thread, also on one that outlives the interpreter.
class GilHeld {
 public:
  GilHeld() {
    try {
      state_ = PyGILState_Ensure();
    } catch (...) {
      stay_until_the_process_ends();
    }
  }
  ~GilHeld() { PyGILState_Release(state_); }
  GilHeld(const GilHeld&) = delete;
  GilHeld& operator=(const GilHeld&) = delete;

 private:
  PyGILState_STATE state_{};
};

}  // namespace zigzag::python
