#include "zigzag/tensor.h"

#include <array>

#include "zigzag/error.h"

namespace zigzag {

namespace {

struct DTypeFacts {
  std::string_view name;
  std::int64_t bytes;
};

// In the order of DType.
constexpr std::array<DTypeFacts, 10> kDTypes{{{"float32", 4},
                                              {"float16", 2},
                                              {"bfloat16", 2},
                                              {"float64", 8},
                                              {"int64", 8},
                                              {"int32", 4},
                                              {"int16", 2},
                                              {"int8", 1},
                                              {"uint8", 1},
                                              {"bool", 1}}};

bool is_row_major(const TensorView& view, std::size_t first_dim) {
  std::int64_t expected = 1;
  for (std::size_t i = view.shape.size(); i-- > first_dim;) {
    if (view.shape[i] == 0) return true;
    if (view.shape[i] != 1 && view.strides[i] != expected) return false;
    expected *= view.shape[i];
  }
  return true;
}

}  // namespace

std::int64_t item_size(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)].bytes; }

std::string_view dtype_name(DType dtype) { return kDTypes[static_cast<std::size_t>(dtype)].name; }

DType parse_dtype(std::string_view name) {
  std::string names;
  for (std::size_t i = 0; i < kDTypes.size(); ++i) {
    if (kDTypes[i].name == name) return static_cast<DType>(i);
    names += (i == 0 ? "" : ", ") + std::string(kDTypes[i].name);
  }
  throw InvalidArgument("dtype is '" + std::string(name) + "'; it must be one of " + names);
}

bool is_attention_dtype(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

std::string device_name(Device device) {
  return device.type == DeviceType::kCpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

TensorView TensorView::contiguous(void* data, DType dtype, std::vector<std::int64_t> shape,
                                  Device device) {
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t stride = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i];
  }
  return {data, dtype, device, std::move(shape), std::move(strides)};
}

std::int64_t TensorView::num_elements() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

std::int64_t TensorView::row_elements() const {
  std::int64_t product = 1;
  for (std::size_t i = 1; i < shape.size(); ++i) product *= shape[i];
  return product;
}

bool TensorView::is_contiguous() const { return is_row_major(*this, 0); }

bool TensorView::rows_are_contiguous() const { return is_row_major(*this, 1); }

TensorView TensorView::slice(std::size_t dim, std::int64_t begin, std::int64_t count) const {
  if (dim >= shape.size() || begin < 0 || count < 0 || count > shape[dim] - begin) {
    throw InvalidArgument("slice [" + std::to_string(begin) + ", " + std::to_string(begin + count) +
                          ") of dimension " + std::to_string(dim) + " is outside of shape " +
                          shape_text(shape));
  }
  TensorView result = *this;
  result.shape[dim] = count;
  result.data = static_cast<std::byte*>(data) + begin * strides[dim] * item_size(dtype);
  return result;
}

std::string shape_text(std::span<const std::int64_t> shape) {
  std::string result = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    result += (i == 0 ? "" : ", ") + std::to_string(shape[i]);
  }
  return result + "]";
}

}  // namespace zigzag
