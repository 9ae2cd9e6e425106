#include "io/safetensors.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>
#include <sys/stat.h>
#include <unistd.h>

#include "zigzag/error.h"

namespace zigzag::io {
namespace {

// Fills `bytes` from `offset` on; false when the file ends before.
bool read_exactly(int descriptor, std::uint64_t offset, std::span<std::byte> bytes,
                  const std::string& path) {
  std::byte* data = bytes.data();
  std::size_t left = bytes.size();
  while (left > 0) {
    const std::size_t piece = std::min<std::size_t>(left, std::size_t{1} << 30);
    const ssize_t got = ::pread(descriptor, data, piece, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      throw InvalidArgument(fmt::format("'{}' cannot be read: {}", path, std::strerror(errno)));
    }
    if (got == 0) return false;
    data += got;
    offset += static_cast<std::uint64_t>(got);
    left -= static_cast<std::size_t>(got);
  }
  return true;
}

std::string_view file_type_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "F32";
    case DType::kFloat16:
      return "F16";
    case DType::kBFloat16:
      return "BF16";
    case DType::kFloat64:
      return "F64";
    case DType::kInt64:
      return "I64";
    case DType::kInt32:
      return "I32";
    case DType::kInt16:
      return "I16";
    case DType::kInt8:
      return "I8";
    case DType::kUInt8:
      return "U8";
    case DType::kBool:
      return "BOOL";
  }
  throw InvalidArgument("a safetensors file cannot hold a tensor of an unknown type");
}

// The 8 bytes of length and the JSON, padded with spaces so that the data is aligned to 64 bytes.
std::string file_head(std::span<const SafetensorsSpec> tensors,
                      const std::map<std::string, std::string>& metadata,
                      std::vector<std::uint64_t>& begins) {
  nlohmann::ordered_json json = nlohmann::ordered_json::object();
  if (!metadata.empty()) json["__metadata__"] = metadata;
  std::uint64_t offset = 0;
  begins.assign(1, 0);
  for (const SafetensorsSpec& tensor : tensors) {
    std::uint64_t bytes = static_cast<std::uint64_t>(item_size(tensor.dtype));
    for (const std::int64_t size : tensor.shape) bytes *= static_cast<std::uint64_t>(size);
    json[tensor.name] = {{"dtype", file_type_name(tensor.dtype)},
                         {"shape", tensor.shape},
                         {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
    begins.push_back(offset);
  }
  std::string text = json.dump();
  text.resize((text.size() + 8 + 63) / 64 * 64 - 8, ' ');
  std::string head(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) {
    head[i] = static_cast<char>(static_cast<std::uint64_t>(text.size()) >> (8 * i) & 0xff);
  }
  head += text;
  for (std::uint64_t& begin : begins) begin += head.size();
  return head;
}

}  // namespace

SafetensorsFile::SafetensorsFile(std::string path) : path_(std::move(path)) {
  // O_NONBLOCK: opening a named pipe must not wait for a writer.
  descriptor_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor_ < 0) {
    throw InvalidArgument(fmt::format("'{}' cannot be read: {}", path_, std::strerror(errno)));
  }
  try {
    struct stat status {};
    if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
      throw InvalidArgument(
          fmt::format("'{}' is not a regular file; a safetensors file is wanted", path_));
    }
    const auto file_bytes = static_cast<std::uint64_t>(status.st_size);
    std::array<std::byte, 8> first{};
    try {
      if (file_bytes >= 8 && !read_exactly(descriptor_, 0, first, path_)) {
        throw InvalidArgument("it became shorter while it was read");
      }
      std::string json(safetensors_header_length(first, file_bytes), '\0');
      if (!read_exactly(descriptor_, 8, std::as_writable_bytes(std::span(json)), path_)) {
        throw InvalidArgument("it became shorter while it was read");
      }
      header_ = parse_safetensors_header(json, file_bytes);
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(
          fmt::format("'{}' is not a valid safetensors file: {}", path_, error.what()));
    }
  } catch (...) {
    ::close(descriptor_);
    throw;
  }
}

SafetensorsFile::~SafetensorsFile() { ::close(descriptor_); }

void SafetensorsFile::read(const SafetensorsEntry& entry, std::uint64_t offset,
                           std::span<std::byte> bytes) const {
  const std::uint64_t size = entry.end - entry.begin;
  if (offset > size || bytes.size() > size - offset) {
    throw InvalidArgument(fmt::format("bytes {} to {} of tensor '{}' were asked for; it has {}",
                                      offset, offset + bytes.size(), entry.name, size));
  }
  if (!read_exactly(descriptor_, header_.data_offset + entry.begin + offset, bytes, path_)) {
    throw InvalidArgument(fmt::format("'{}' became shorter while it was read", path_));
  }
}

SafetensorsWriter::SafetensorsWriter(std::string path, std::span<const SafetensorsSpec> tensors,
                                     const std::map<std::string, std::string>& metadata)
    : file_(std::move(path)) {
  const std::string head = file_head(tensors, metadata, begins_);
  file_bytes_ = begins_.back();
  file_.resize(file_bytes_);
  file_.write_at(0, std::as_bytes(std::span(head)));
}

void SafetensorsWriter::write(std::size_t index, std::uint64_t offset,
                              std::span<const std::byte> bytes) {
  const std::uint64_t size = begins_.at(index + 1) - begins_[index];
  if (offset > size || bytes.size() > size - offset) {
    throw InvalidArgument(fmt::format("bytes {} to {} of tensor {} were written; it has {}", offset,
                                      offset + bytes.size(), index, size));
  }
  file_.write_at(begins_[index] + offset, bytes);
}

}  // namespace zigzag::io
