#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "io/atomic_file.h"
#include "zigzag/tensor.h"

namespace zigzag::io {

/// One tensor of a safetensors file. `begin` and `end` count bytes from the start of the data.
struct SafetensorsEntry {
  std::string name;
  std::string dtype_text;      // as in the file: "F32", "BF16", ...
  std::optional<DType> dtype;  // empty for types of the format that this library does not have
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

/// A safetensors header that has been checked: names are unique, every tensor's bytes are exactly
/// shape x item size, and the tensors cover the data without gap or overlap.
struct SafetensorsHeader {
  std::vector<SafetensorsEntry> tensors;  // in the order of their bytes
  std::map<std::string, std::string> metadata;
  std::uint64_t data_offset = 0;  // bytes before the data: 8 + header length

  /// The entry of that name, or null.
  const SafetensorsEntry* find(std::string_view name) const;
};

/// Longest header in bytes that is read, as in the format's own implementations.
inline constexpr std::uint64_t kMaxSafetensorsHeader = 100'000'000;

/// Length of the JSON header, from the first 8 bytes of a file of `file_bytes` bytes. Throws
/// InvalidArgument when the file is too short for it or it exceeds kMaxSafetensorsHeader.
std::uint64_t safetensors_header_length(std::span<const std::byte> first, std::uint64_t file_bytes);

/// Parses and checks the JSON header of a file of `file_bytes` bytes. Memory is linear in the
/// header's length. Throws InvalidArgument with one sentence.
SafetensorsHeader parse_safetensors_header(std::string_view json, std::uint64_t file_bytes);

/// A safetensors file open for reading.
class SafetensorsFile {
 public:
  /// Opens and checks the header; reads no data. Throws InvalidArgument naming the file.
  explicit SafetensorsFile(std::string path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const SafetensorsHeader& header() const { return header_; }
  const std::string& path() const { return path_; }

  /// Reads bytes.size() bytes of a tensor from byte `offset` of it on. Safe from several threads.
  /// Throws InvalidArgument when that is out of the tensor or the file has shrunk.
  void read(const SafetensorsEntry& entry, std::uint64_t offset, std::span<std::byte> bytes) const;

 private:
  std::string path_;
  SafetensorsHeader header_;
  int descriptor_ = -1;
};

/// Name, type and shape of a tensor to be written.
struct SafetensorsSpec {
  std::string name;
  DType dtype;
  std::vector<std::int64_t> shape;
};

/// Writes a safetensors file that appears under its name only when commit() returns.
class SafetensorsWriter {
 public:
  /// Creates a temporary file and reserves space for all tensors. Throws as AtomicFile does.
  SafetensorsWriter(std::string path, std::span<const SafetensorsSpec> tensors,
                    const std::map<std::string, std::string>& metadata = {});

  /// Writes bytes at byte `offset` of tensor number `index`. Safe from several threads. Throws
  /// InvalidArgument when that is out of the tensor, EnvironmentError when the disk fails.
  void write(std::size_t index, std::uint64_t offset, std::span<const std::byte> bytes);
  /// Flushes and renames.
  void commit() { file_.commit(); }
  /// Bytes of the whole file.
  std::uint64_t file_bytes() const { return file_bytes_; }

 private:
  AtomicFile file_;
  std::vector<std::uint64_t> begins_;  // [tensors + 1], from the start of the file
  std::uint64_t file_bytes_ = 0;
};

}  // namespace zigzag::io
