#include "cuda/library.h"

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <vector>

#include <dlfcn.h>

namespace zigzag::cuda {
namespace {

namespace fs = std::filesystem;

/// site-packages of the environment whose programs lie in `bin`.
void add_site_packages(const fs::path& bin, std::vector<fs::path>& found) {
  std::error_code error;
  const fs::path lib = bin.parent_path() / "lib";
  for (fs::directory_iterator entry(lib, error), end; !error && entry != end;
       entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    if (name.rfind("python3", 0) != 0) continue;
    for (const char* packages : {"site-packages", "dist-packages"}) {
      const fs::path path = entry->path() / packages;
      if (fs::is_directory(path, error) &&
          std::find(found.begin(), found.end(), path) == found.end()) {
        found.push_back(path);
      }
    }
  }
}

std::vector<fs::path> python_packages() {
  std::vector<fs::path> found;
  std::error_code error;
  const fs::path self = fs::read_symlink("/proc/self/exe", error);
  if (!error && self.filename().string().rfind("python", 0) == 0) {
    add_site_packages(self.parent_path(), found);
  }
  if (const char* environment = std::getenv("VIRTUAL_ENV")) {
    add_site_packages(fs::path(environment) / "bin", found);
  }
  if (const char* path = std::getenv("PATH")) {
    std::stringstream entries(path);
    for (std::string bin; std::getline(entries, bin, ':');) {
      if (!bin.empty() && fs::exists(fs::path(bin) / "python3", error)) {
        add_site_packages(fs::path(bin), found);
      }
    }
  }
  return found;
}

void* open_path(const fs::path& path) { return dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL); }

}  // namespace

OpenedLibrary open_library(const char* variable, const char* soname, const char* wheel_folder) {
  std::error_code error;
  if (const char* given = std::getenv(variable); given != nullptr && *given != '\0') {
    fs::path path = given;
    if (fs::is_directory(path, error)) path /= soname;
    if (void* handle = open_path(path)) return {handle, path.string()};
    const char* reason = dlerror();
    return {nullptr, std::string(variable) + " is " + given + ", which cannot be opened: " +
                         (reason != nullptr ? reason : "unknown error")};
  }
  if (void* handle = dlopen(soname, RTLD_NOW | RTLD_NOLOAD)) return {handle, "loaded already"};
  for (const fs::path& packages : python_packages()) {
    const fs::path path = packages / wheel_folder / soname;
    if (!fs::exists(path, error)) continue;
    if (void* handle = open_path(path)) return {handle, path.string()};
  }
  if (void* handle = open_path(soname)) return {handle, std::string("the system's ") + soname};
  return {nullptr, std::string(soname) + " was not found: set " + variable +
                       " to its folder, or install NVIDIA's Python wheel that holds " +
                       wheel_folder};
}

}  // namespace zigzag::cuda
