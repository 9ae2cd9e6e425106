#include "io/atomic_file.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include "zigzag/error.h"

namespace zigzag::io {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kSlots = 64;
constexpr std::size_t kPathBytes = 4096;

enum SlotState : int { kFree, kFilling, kArmed };

// Paths that a signal handler may have to remove: fixed memory, because a handler must not
// allocate.
struct Slot {
  std::atomic<int> state{kFree};
  std::array<char, kPathBytes> path{};
};
std::array<Slot, kSlots> slots;

int arm_slot(const std::string& path) {
  for (std::size_t i = 0; i < kSlots; ++i) {
    int expected = kFree;
    if (!slots[i].state.compare_exchange_strong(expected, kFilling)) continue;
    if (path.size() + 1 > kPathBytes) {
      slots[i].state = kFree;
      return -1;
    }
    std::memcpy(slots[i].path.data(), path.c_str(), path.size() + 1);
    slots[i].state = kArmed;
    return static_cast<int>(i);
  }
  return -1;
}

void free_slot(int& slot) {
  if (slot >= 0) slots[static_cast<std::size_t>(slot)].state = kFree;
  slot = -1;
}

std::string reason() { return std::strerror(errno); }

// The file that a symbolic link leads to, so that a rename replaces the target and not the link.
fs::path resolve(const std::string& path) {
  std::error_code error;
  const fs::path target = fs::weakly_canonical(path, error);
  return error ? fs::path(path) : target;
}

fs::path folder_of(const fs::path& path) {
  return path.has_parent_path() ? path.parent_path() : fs::path(".");
}

}  // namespace

void check_writable(const std::string& path, std::string_view flag) {
  if (path.empty()) throw InvalidArgument(fmt::format("{} is empty; it must name a file", flag));
  const fs::path target = resolve(path);
  std::error_code error;
  const fs::file_status status = fs::status(target, error);
  if (fs::is_directory(status)) {
    throw InvalidArgument(fmt::format("{} '{}' is a folder; it must name a file", flag, path));
  }
  if (fs::exists(status) && !fs::is_regular_file(status)) {
    throw InvalidArgument(
        fmt::format("{} '{}' is not a regular file, so it cannot be replaced", flag, path));
  }
  const fs::path folder = folder_of(target);
  if (!fs::is_directory(folder, error)) {
    throw InvalidArgument(
        fmt::format("{} '{}' lies in a folder that does not exist; make '{}' first", flag, path,
                    folder_of(path).string()));
  }
  if (::access(folder.c_str(), W_OK | X_OK) != 0) {
    throw InvalidArgument(fmt::format("{} '{}' cannot be written: folder '{}': {}", flag, path,
                                      folder_of(path).string(), reason()));
  }
  if (target.filename().string().size() > 200) {
    throw InvalidArgument(fmt::format("{} has a file name of {} bytes; at most 200 are allowed",
                                      flag, target.filename().string().size()));
  }
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  check_writable(path_, "output");
  const fs::path target = resolve(path_);
  path_ = target.string();
  static std::atomic<unsigned> counter{0};
  for (int attempt = 0; attempt < 100 && descriptor_ < 0; ++attempt) {
    temporary_ = (folder_of(target) /
                  fmt::format(".{}.{}.{}.tmp", target.filename().string(), ::getpid(), counter++))
                     .string();
    // Armed before the file exists: a signal in between unlinks nothing, never the reverse.
    slot_ = arm_slot(temporary_);
    descriptor_ = ::open(temporary_.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0666);
    if (descriptor_ >= 0) break;
    const int error = errno;
    free_slot(slot_);
    if (error == EEXIST) continue;
    throw InvalidArgument(
        fmt::format("output '{}' cannot be written: {}", path_, std::strerror(error)));
  }
  if (descriptor_ < 0) {
    throw InvalidArgument(
        fmt::format("output '{}' cannot be written: no free temporary name "
                    "in its folder",
                    path_));
  }
}

AtomicFile::~AtomicFile() {
  if (descriptor_ < 0) return;
  ::close(descriptor_);
  ::unlink(temporary_.c_str());
  free_slot(slot_);
}

void AtomicFile::write_at(std::uint64_t offset, std::span<const std::byte> bytes) {
  const std::byte* data = bytes.data();
  std::size_t left = bytes.size();
  while (left > 0) {
    // Linux writes at most 2^31 - 4096 bytes a call.
    const std::size_t piece = std::min<std::size_t>(left, std::size_t{1} << 30);
    const ssize_t written = ::pwrite(descriptor_, data, piece, static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      throw EnvironmentError(fmt::format("writing '{}' failed: {}", path_, reason()));
    }
    data += written;
    offset += static_cast<std::uint64_t>(written);
    left -= static_cast<std::size_t>(written);
  }
}

void AtomicFile::resize(std::uint64_t bytes) {
  if (::ftruncate(descriptor_, static_cast<off_t>(bytes)) != 0) {
    throw EnvironmentError(fmt::format("writing '{}' failed: {}", path_, reason()));
  }
}

void AtomicFile::commit() {
  if (::fsync(descriptor_) != 0) {
    throw EnvironmentError(fmt::format("writing '{}' failed: {}", path_, reason()));
  }
  if (::rename(temporary_.c_str(), path_.c_str()) != 0) {
    throw EnvironmentError(fmt::format("naming '{}' failed: {}", path_, reason()));
  }
  ::close(descriptor_);
  descriptor_ = -1;
  free_slot(slot_);
  // The name must survive a power cut as well; a folder that refuses fsync is no error.
  const int folder = ::open(folder_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder >= 0) {
    static_cast<void>(::fsync(folder));
    ::close(folder);
  }
}

void unlink_temporary_files() noexcept {
  for (Slot& slot : slots) {
    if (slot.state.load() == kArmed) ::unlink(slot.path.data());
  }
}

}  // namespace zigzag::io
