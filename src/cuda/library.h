#pragma once

#include <string>

namespace zigzag::cuda {

/// A library that was opened at run time, or why it was not.
struct OpenedLibrary {
  void* handle = nullptr;  // never closed
  std::string detail;      // where it was found, or one sentence that says how to get it
};

/// Opens `soname`: first the file or folder that the environment variable `variable` names, then
/// what the process has loaded already, then `wheel_folder` (such as "nvidia/cudnn/lib") in the
/// site-packages of the Python environments on VIRTUAL_ENV and PATH, then the system.
OpenedLibrary open_library(const char* variable, const char* soname, const char* wheel_folder);

}  // namespace zigzag::cuda
