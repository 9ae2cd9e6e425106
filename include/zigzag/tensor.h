#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace zigzag {

/// Element types. Attention takes float32, float16 and bfloat16; shard and unshard take them all.
enum class DType : std::uint8_t {
  kFloat32,
  kFloat16,
  kBFloat16,
  kFloat64,
  kInt64,
  kInt32,
  kInt16,
  kInt8,
  kUInt8,
  kBool,
};

/// Bytes of one element.
std::int64_t item_size(DType dtype);

/// The lower-case name, such as "bfloat16".
std::string_view dtype_name(DType dtype);

/// The type of that name. Throws InvalidArgument with the list of names when there is none.
DType parse_dtype(std::string_view name);

/// True for the types that attention computes in: float32, float16, bfloat16.
bool is_attention_dtype(DType dtype);

/// Where memory lives.
enum class DeviceType : std::uint8_t { kCpu, kCuda };

/// A device: its kind and, among several of a kind, its index.
struct Device {
  DeviceType type = DeviceType::kCpu;
  int index = 0;
  bool operator==(const Device&) const = default;
};

/// "cpu" or "cuda:1".
std::string device_name(Device device);

/// A view of memory that somebody else owns: data, type, device, shape and strides in ELEMENTS.
/// Copying a view copies no data. Inputs and outputs of every operation are views.
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;

  /// A row-major view of `data` with this shape.
  static TensorView contiguous(void* data, DType dtype, std::vector<std::int64_t> shape,
                               Device device = {});

  /// Number of dimensions.
  std::size_t rank() const { return shape.size(); }

  /// Product of the shape; 1 for a scalar.
  std::int64_t num_elements() const;

  /// Elements of one entry along dimension 0 (product of shape[1:]).
  std::int64_t row_elements() const;
  /// Their bytes, gaps not counted.
  std::int64_t row_bytes() const { return row_elements() * item_size(dtype); }

  /// True when strides are row-major without gaps (dimensions of size 1 do not count).
  bool is_contiguous() const;

  /// True when shape[1:] is row-major without gaps, so that each row is one run of bytes.
  bool rows_are_contiguous() const;

  /// Entries [begin, begin + count) along `dim`. Throws InvalidArgument when out of range.
  TensorView slice(std::size_t dim, std::int64_t begin, std::int64_t count) const;

  /// The element type's pointer. No check: the caller has checked dtype.
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
};

/// "[1024, 8, 128]".
std::string shape_text(std::span<const std::int64_t> shape);

}  // namespace zigzag
