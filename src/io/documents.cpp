#include "io/documents.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <limits>
#include <system_error>

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

// Appends at most `limit` bytes of a file; true when it has more.
bool append_file(const std::string& path, std::int64_t limit, std::vector<std::uint8_t>& tokens) {
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) unreadable(path, std::strerror(errno));
  std::error_code error;
  const std::uintmax_t expected = fs::file_size(path, error);
  if (!error) {
    const auto more = std::min<std::uintmax_t>(expected, static_cast<std::uintmax_t>(limit));
    tokens.reserve(tokens.size() + static_cast<std::size_t>(more));
  }
  std::vector<std::uint8_t> piece(std::size_t{1} << 20);
  bool cut = false;
  while (true) {
    // One byte over the limit tells whether the file goes on.
    const auto want = std::min<std::int64_t>(static_cast<std::int64_t>(piece.size()), limit + 1);
    const ssize_t got = ::read(descriptor, piece.data(), static_cast<std::size_t>(want));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      const int code = errno;
      ::close(descriptor);
      unreadable(path, std::strerror(code));
    }
    if (got == 0) break;
    const std::int64_t taken = std::min<std::int64_t>(got, limit);
    tokens.insert(tokens.end(), piece.begin(), piece.begin() + taken);
    limit -= taken;
    cut = got > taken;
    if (cut) break;
  }
  ::close(descriptor);
  return cut;
}

}  // namespace

DocumentPack read_documents(std::span<const std::string> paths, std::int64_t max_tokens) {
  if (paths.empty()) throw InvalidArgument("no document is given; name at least one file or folder");
  DocumentPack pack;
  std::vector<fs::path> files;
  for (const std::string& path : paths) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (fs::is_directory(status)) {
      list_folder(path, files, pack.notes);
    } else if (fs::is_regular_file(status)) {
      files.emplace_back(path);
    } else if (fs::exists(status)) {
      unreadable(path, "it is neither a regular file nor a folder");
    } else {
      unreadable(path, error ? error.message() : "No such file or directory");
    }
  }
  if (files.empty()) {
    throw InvalidArgument(fmt::format("'{}' holds no regular file, so there is no document",
                                      paths.front()));
  }
  std::int64_t left = max_tokens < 0 ? std::numeric_limits<std::int64_t>::max() - 1 : max_tokens;
  pack.cu_seqlens.push_back(0);
  for (std::size_t i = 0; i < files.size(); ++i) {
    if (left == 0) {
      pack.notes.push_back(fmt::format("left out {} of {} documents: --max-tokens {} is reached",
                                       files.size() - i, files.size(), max_tokens));
      break;
    }
    const std::size_t before = pack.tokens.size();
    const bool cut = append_file(files[i].string(), left, pack.tokens);
    const auto length = static_cast<std::int64_t>(pack.tokens.size() - before);
    left -= length;
    pack.names.push_back(files[i].string());
    pack.cu_seqlens.push_back(pack.cu_seqlens.back() + length);
    if (cut) {
      pack.notes.push_back(fmt::format("cut '{}' after {} bytes: --max-tokens {} is reached",
                                       files[i].string(), length, max_tokens));
    }
  }
  return pack;
}

}  // namespace zigzag::io
