#include <algorithm>
#include <array>
#include <set>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "io/safetensors.h"
#include "zigzag/error.h"

namespace zigzag::io {
namespace {

constexpr std::size_t kMaxDimensions = 32;
constexpr std::uint64_t kMaxBytes = std::uint64_t{1} << 62;

struct FileType {
  std::string_view name;
  std::uint64_t bytes;
  std::optional<DType> dtype;
};

constexpr std::array<FileType, 17> kFileTypes{{
    {"F32", 4, DType::kFloat32},
    {"F16", 2, DType::kFloat16},
    {"BF16", 2, DType::kBFloat16},
    {"F64", 8, DType::kFloat64},
    {"I64", 8, DType::kInt64},
    {"I32", 4, DType::kInt32},
    {"I16", 2, DType::kInt16},
    {"I8", 1, DType::kInt8},
    {"U8", 1, DType::kUInt8},
    {"BOOL", 1, DType::kBool},
    {"U16", 2, std::nullopt},
    {"U32", 4, std::nullopt},
    {"U64", 8, std::nullopt},
    {"C64", 8, std::nullopt},
    {"F8_E4M3", 1, std::nullopt},
    {"F8_E5M2", 1, std::nullopt},
    {"F8_E8M0", 1, std::nullopt},
}};

// Names come from hostile files: a message shows at most this much of one.
std::string shown(std::string_view text) {
  constexpr std::size_t kShown = 60;
  std::string out;
  for (const char c : text.substr(0, kShown)) {
    out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  }
  return text.size() > kShown ? out + "..." : out;
}

template <typename... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw InvalidArgument(fmt::format(format, std::forward<Args>(args)...));
}

// Builds the entries while the JSON is read, so that no document tree is made of a hostile header.
class HeaderReader : public nlohmann::json_sax<nlohmann::json> {
 public:
  SafetensorsHeader header;

  bool null() override { return scalar("null"); }
  bool boolean(bool) override { return scalar("a boolean"); }
  bool number_float(number_float_t, const string_t&) override { return scalar("a fraction"); }
  bool binary(binary_t&) override { return scalar("binary data"); }

  bool number_integer(number_integer_t value) override {
    fail("{} holds {}; it must hold integers of at least 0", place(), value);
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (depth_ != 2 || !in_array_) return scalar("a number");
    if (value > kMaxBytes) fail("{} holds {}; at most 2^62 is allowed", place(), value);
    if (field_ == "shape") {
      if (entry_.shape.size() == kMaxDimensions) {
        fail("{} has more than {} dimensions", place(), kMaxDimensions);
      }
      entry_.shape.push_back(static_cast<std::int64_t>(value));
    } else {
      if (offsets_ == 2) fail("{} holds more than two numbers", place());
      (offsets_ == 0 ? entry_.begin : entry_.end) = value;
      ++offsets_;
    }
    return true;
  }

  bool string(string_t& value) override {
    if (depth_ != 2 || in_array_) return scalar("a string");
    if (in_metadata_) {
      header.metadata[field_] = value;
    } else if (field_ == "dtype") {
      entry_.dtype_text = value;
    } else {
      return scalar("a string");
    }
    return true;
  }

  bool start_object(std::size_t) override {
    if (depth_ >= 2) fail("the header is nested deeper than name, field, value");
    ++depth_;
    fields_.clear();
    offsets_ = 0;
    return true;
  }

  bool key(string_t& value) override {
    if (depth_ == 1) {
      if (!names_.insert(value).second) fail("tensor '{}' is given twice", shown(value));
      in_metadata_ = value == "__metadata__";
      entry_ = {};
      entry_.name = value;
      return true;
    }
    field_ = value;
    if (!fields_.insert(value).second) fail("{} is given twice", place());
    if (!in_metadata_ && value != "dtype" && value != "shape" && value != "data_offsets") {
      fail("tensor '{}' has the unknown field '{}'; dtype, shape and data_offsets are allowed",
           shown(entry_.name), shown(value));
    }
    return true;
  }

  bool end_object() override {
    --depth_;
    if (depth_ == 1 && !in_metadata_) finish_entry();
    return true;
  }

  bool start_array(std::size_t) override {
    if (depth_ != 2 || in_array_ || in_metadata_ || field_ == "dtype") return scalar("a list");
    in_array_ = true;
    return true;
  }

  bool end_array() override {
    in_array_ = false;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception&) override {
    fail("the header is not valid JSON at byte {} of it", position);
  }

 private:
  std::string place() const {
    if (depth_ == 0) return "the header";
    if (depth_ == 1) return fmt::format("tensor '{}'", shown(entry_.name));
    return fmt::format("field '{}' of tensor '{}'", shown(field_), shown(entry_.name));
  }

  bool scalar(std::string_view what) {
    if (depth_ == 0) fail("the header is {}; it must be a JSON object", what);
    fail("{} is {}, which the format does not allow there", place(), what);
  }

  void finish_entry() {
    for (const std::string_view field : {"dtype", "shape", "data_offsets"}) {
      if (!fields_.contains(std::string(field))) {
        fail("tensor '{}' has no field '{}'", shown(entry_.name), field);
      }
    }
    if (offsets_ != 2)
      fail("field 'data_offsets' of tensor '{}' must hold two numbers", shown(entry_.name));
    const auto* type = std::find_if(kFileTypes.begin(), kFileTypes.end(),
                                    [&](const FileType& t) { return t.name == entry_.dtype_text; });
    if (type == kFileTypes.end()) {
      std::string names;
      for (const FileType& t : kFileTypes)
        names += fmt::format("{}{}", names.empty() ? "" : ", ", t.name);
      fail("tensor '{}' has dtype '{}'; {} are allowed", shown(entry_.name),
           shown(entry_.dtype_text), names);
    }
    entry_.dtype = type->dtype;
    std::uint64_t bytes = type->bytes;
    bool empty = false;
    for (const std::int64_t size : entry_.shape) empty = empty || size == 0;
    if (empty) bytes = 0;
    for (const std::int64_t size : entry_.shape) {
      if (!empty && __builtin_mul_overflow(bytes, static_cast<std::uint64_t>(size), &bytes)) {
        bytes = kMaxBytes + 1;
      }
      if (bytes > kMaxBytes) {
        fail("tensor '{}' of shape {} exceeds 2^62 bytes", shown(entry_.name),
             shape_text(entry_.shape));
      }
    }
    if (entry_.end < entry_.begin || entry_.end - entry_.begin != bytes) {
      fail("tensor '{}' has data_offsets [{}, {}], but {} of shape {} takes {} bytes",
           shown(entry_.name), entry_.begin, entry_.end, type->name, shape_text(entry_.shape),
           bytes);
    }
    header.tensors.push_back(std::move(entry_));
    entry_ = {};
  }

  int depth_ = 0;
  bool in_array_ = false;
  bool in_metadata_ = false;
  int offsets_ = 0;
  std::string field_;
  std::set<std::string> fields_;
  std::set<std::string> names_;
  SafetensorsEntry entry_;
};

}  // namespace

const SafetensorsEntry* SafetensorsHeader::find(std::string_view name) const {
  for (const SafetensorsEntry& entry : tensors) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

std::uint64_t safetensors_header_length(std::span<const std::byte> first,
                                        std::uint64_t file_bytes) {
  if (first.size() < 8 || file_bytes < 8) {
    fail("the file has {} bytes; a safetensors file starts with 8 bytes of header length",
         file_bytes);
  }
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) {
    length = length << 8 | std::to_integer<std::uint64_t>(first[static_cast<std::size_t>(i)]);
  }
  if (length > kMaxSafetensorsHeader) {
    fail("the header length is {} bytes; at most {} are allowed (is it a safetensors file?)",
         length, kMaxSafetensorsHeader);
  }
  if (length > file_bytes - 8) {
    fail("the header length is {} bytes, but the file has only {} after it", length,
         file_bytes - 8);
  }
  return length;
}

SafetensorsHeader parse_safetensors_header(std::string_view json, std::uint64_t file_bytes) {
  if (json.empty() || json.front() != '{') fail("the header does not start with '{{'");
  if (file_bytes < 8 || json.size() > file_bytes - 8) {
    fail("the header of {} bytes does not fit into a file of {} bytes", json.size(), file_bytes);
  }
  HeaderReader reader;
  nlohmann::json::sax_parse(json.begin(), json.end(), &reader);
  SafetensorsHeader header = std::move(reader.header);
  header.data_offset = 8 + json.size();

  auto& tensors = header.tensors;
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  std::uint64_t covered = 0;
  for (const SafetensorsEntry& entry : tensors) {
    if (entry.begin != covered) {
      fail(
          "tensor '{}' starts at byte {} of the data, but the tensors before it end at {}; gaps "
          "and overlaps are not allowed",
          shown(entry.name), entry.begin, covered);
    }
    covered = entry.end;
  }
  const std::uint64_t data_bytes = file_bytes - header.data_offset;
  if (covered != data_bytes) {
    fail("the tensors take {} bytes, but the file has {} bytes of data{}", covered, data_bytes,
         covered > data_bytes ? " (is it cut short?)" : "");
  }
  return header;
}

}  // namespace zigzag::io
