#include "io/documents.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <limits>
#include <system_error>

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include "zigzag/error.h"

namespace zigzag::io {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void unreadable(const std::string& path, const std::string& why) {
  throw InvalidArgument(fmt::format("document '{}' cannot be read: {}", path, why));
}

// Regular files under a folder in the order of their paths; the others become notes.
void list_folder(const fs::path& folder, std::vector<fs::path>& files,
                 std::vector<std::string>& notes) {
  std::vector<fs::directory_entry> entries;
  std::error_code error;
  fs::directory_iterator iterator(folder, error);
  for (; !error && iterator != fs::directory_iterator(); iterator.increment(error)) {
    entries.push_back(*iterator);
  }
  if (error) unreadable(folder.string(), error.message());
  std::sort(entries.begin(), entries.end(),
            [](const auto& a, const auto& b) { return a.path() < b.path(); });
  for (const fs::directory_entry& entry : entries) {
    const fs::file_status link = entry.symlink_status(error);
    const fs::file_status status = entry.status(error);
    if (fs::is_directory(link)) {
      list_folder(entry.path(), files, notes);
    } else if (fs::is_directory(status)) {
      notes.push_back(fmt::format("left out '{}': a link to a folder", entry.path().string()));
    } else if (fs::is_regular_file(status)) {
      files.push_back(entry.path());
    } else {
      notes.push_back(fmt::format("left out '{}': not a regular file", entry.path().string()));
    }
  }
}

}  // namespace

DocumentList list_documents(std::span<const std::string> paths, std::int64_t max_tokens) {
  if (paths.empty()) {
    throw InvalidArgument("no document is given; name at least one file or folder");
  }
  DocumentList list;
  std::vector<fs::path> files;
  for (const std::string& path : paths) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (fs::is_directory(status)) {
      list_folder(path, files, list.notes);
    } else if (fs::is_regular_file(status)) {
      files.emplace_back(path);
    } else if (fs::exists(status)) {
      unreadable(path, "it is neither a regular file nor a folder");
    } else {
      unreadable(path, error ? error.message() : "No such file or directory");
    }
  }
  if (files.empty()) {
    throw InvalidArgument(
        fmt::format("'{}' holds no regular file, so there is no document", paths.front()));
  }
  std::int64_t left = max_tokens < 0 ? std::numeric_limits<std::int64_t>::max() : max_tokens;
  list.cu_seqlens.push_back(0);
  for (std::size_t i = 0; i < files.size(); ++i) {
    if (left == 0) {
      list.notes.push_back(
          fmt::format("left out {} of {} documents: the limit of {} tokens is "
                      "reached",
                      files.size() - i, files.size(), max_tokens));
      break;
    }
    const std::string name = files[i].string();
    std::error_code error;
    const std::uintmax_t bytes = fs::file_size(files[i], error);
    if (error) unreadable(name, error.message());
    if (::access(name.c_str(), R_OK) != 0) unreadable(name, std::strerror(errno));
    const auto taken = static_cast<std::int64_t>(
        std::min<std::uintmax_t>(bytes, static_cast<std::uintmax_t>(left)));
    if (static_cast<std::uintmax_t>(taken) < bytes) {
      list.notes.push_back(
          fmt::format("cut '{}' after {} of {} bytes: the limit of {} tokens is "
                      "reached",
                      name, taken, bytes, max_tokens));
    }
    left -= taken;
    list.names.push_back(name);
    list.cu_seqlens.push_back(list.cu_seqlens.back() + taken);
  }
  return list;
}

std::vector<std::uint8_t> read_tokens(const DocumentList& list) {
  std::vector<std::uint8_t> tokens(static_cast<std::size_t>(list.cu_seqlens.back()));
  for (std::size_t i = 0; i < list.names.size(); ++i) {
    const int descriptor = ::open(list.names[i].c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) unreadable(list.names[i], std::strerror(errno));
    std::int64_t at = list.cu_seqlens[i];
    std::string failure;
    while (at < list.cu_seqlens[i + 1] && failure.empty()) {
      // Linux reads at most 2^31 - 4096 bytes a call.
      const std::int64_t want = std::min<std::int64_t>(list.cu_seqlens[i + 1] - at, 1 << 30);
      const ssize_t got = ::read(descriptor, tokens.data() + at, static_cast<std::size_t>(want));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) failure = std::strerror(errno);
      if (got == 0) failure = "it became shorter while it was read";
      if (got > 0) at += got;
    }
    ::close(descriptor);
    if (!failure.empty()) unreadable(list.names[i], failure);
  }
  return tokens;
}

}  // namespace zigzag::io
