#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace zigzag::io {

/// A file that appears under its name only when it is whole: bytes go to a temporary name in the
/// same folder, and commit() flushes and renames. Destroyed without commit, it leaves nothing
/// behind and what stood under the name before stays as it was.
class AtomicFile {
 public:
  /// Creates the temporary file. Throws InvalidArgument when the folder does not exist, when `path`
  /// is something other than a regular file, or when it cannot be written.
  explicit AtomicFile(std::string path);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  /// Writes bytes at an offset. Safe from several threads at once. Throws EnvironmentError when the
  /// disk is full or fails.
  void write_at(std::uint64_t offset, std::span<const std::byte> bytes);
  /// Sets the length, zeros where nothing was written. Throws EnvironmentError.
  void resize(std::uint64_t bytes);
  /// Flushes to the disk and gives the file its name. Throws EnvironmentError.
  void commit();

  /// The final name.
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::string temporary_;
  int descriptor_ = -1;
  int slot_ = -1;
};

/// Throws InvalidArgument when an AtomicFile could not be created at `path` now: its folder is
/// missing or not writable, or the path names something other than a regular file. `flag` names
/// the option in the message.
void check_writable(const std::string& path, std::string_view flag);

/// Removes the temporary files of every AtomicFile that is not committed. Calls only
/// async-signal-safe functions: made for handlers of SIGINT and SIGTERM.
void unlink_temporary_files() noexcept;

}  // namespace zigzag::io
