#include "support/tensor.h"

#include <algorithm>
#include <array>
#include <cstring>

#include <fmt/format.h>

#include "half.h"
#include "support/random.h"

namespace zigzag::test {

namespace {

constexpr std::int64_t kFence = 256;

/// Eight bytes of poison; shorter types take the first ones.
std::array<std::byte, 8> poison(DType dtype) {
  std::uint64_t bits = 0xa5a5a5a5a5a5a5a5U;
  if (dtype == DType::kFloat32) bits = 0x7fd1beef7fd1beefU;
  if (dtype == DType::kFloat16) bits = 0x7ed17ed17ed17ed1U;
  if (dtype == DType::kBFloat16) bits = 0x7fd17fd17fd17fd1U;
  if (dtype == DType::kFloat64) bits = 0x7ff8deadbeef1234U;
  std::array<std::byte, 8> result{};
  std::memcpy(result.data(), &bits, sizeof(bits));
  return result;
}

template <typename T>
T read(const TensorView& view, std::int64_t offset) {
  return view.as<const T>()[offset];
}

}  // namespace

Tensor::Tensor(DType dtype, std::vector<std::int64_t> shape) {
  view_ = TensorView::contiguous(nullptr, dtype, std::move(shape));
  const std::int64_t bytes = view_.num_elements() * item_size(dtype);
  memory_ = std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(bytes + 2 * kFence));
  const auto pattern = poison(dtype);
  for (std::size_t i = 0; i < memory_->size(); ++i) (*memory_)[i] = pattern[i % 8];
  view_.data = memory_->data() + kFence;
}

Tensor Tensor::slice(std::size_t dim, std::int64_t begin, std::int64_t count) const {
  Tensor result = *this;
  result.view_ = view_.slice(dim, begin, count);
  return result;
}

Tensor Tensor::select(std::size_t dim, std::int64_t index) const {
  Tensor result = slice(dim, index, 1);
  result.view_.shape.erase(result.view_.shape.begin() + static_cast<std::ptrdiff_t>(dim));
  result.view_.strides.erase(result.view_.strides.begin() + static_cast<std::ptrdiff_t>(dim));
  return result;
}

std::string Tensor::touched_outside(std::span<const TensorView> views) const {
  std::vector<char> covered(memory_->size(), 0);
  for (const TensorView& view : views) {
    const std::int64_t item = item_size(view.dtype);
    const std::int64_t start = static_cast<const std::byte*>(view.data) - memory_->data();
    for (std::int64_t i = 0; i < view.num_elements(); ++i) {
      std::fill_n(covered.begin() + start + element_offset(view, i) * item, item, 1);
    }
  }
  const auto pattern = poison(view_.dtype);
  for (std::size_t i = 0; i < covered.size(); ++i) {
    if (covered[i] == 0 && (*memory_)[i] != pattern[i % 8]) {
      return fmt::format("byte {} of the tensor's memory of {} bytes was written",
                         static_cast<std::int64_t>(i) - kFence,
                         static_cast<std::int64_t>(covered.size()) - 2 * kFence);
    }
  }
  return {};
}

std::int64_t element_offset(const TensorView& view, std::int64_t number) {
  std::int64_t offset = 0;
  for (std::size_t d = view.shape.size(); d-- > 0;) {
    offset += number % view.shape[d] * view.strides[d];
    number /= view.shape[d];
  }
  return offset;
}

double load(const TensorView& view, std::int64_t number) {
  const std::int64_t offset = element_offset(view, number);
  switch (view.dtype) {
    case DType::kFloat32:
      return static_cast<double>(read<float>(view, offset));
    case DType::kFloat16:
      return static_cast<double>(from_float16(read<std::uint16_t>(view, offset)));
    case DType::kBFloat16:
      return static_cast<double>(from_bfloat16(read<std::uint16_t>(view, offset)));
    case DType::kFloat64:
      return read<double>(view, offset);
    case DType::kInt64:
      return static_cast<double>(read<std::int64_t>(view, offset));
    case DType::kInt32:
      return static_cast<double>(read<std::int32_t>(view, offset));
    case DType::kInt16:
      return static_cast<double>(read<std::int16_t>(view, offset));
    default:
      return static_cast<double>(read<std::int8_t>(view, offset));
  }
}

void store(const TensorView& view, std::int64_t number, double value) {
  const std::int64_t offset = element_offset(view, number);
  switch (view.dtype) {
    case DType::kFloat32:
      view.as<float>()[offset] = static_cast<float>(value);
      break;
    case DType::kFloat16:
      view.as<std::uint16_t>()[offset] = to_float16(static_cast<float>(value));
      break;
    case DType::kBFloat16:
      view.as<std::uint16_t>()[offset] = to_bfloat16(static_cast<float>(value));
      break;
    case DType::kFloat64:
      view.as<double>()[offset] = value;
      break;
    case DType::kInt64:
      view.as<std::int64_t>()[offset] = static_cast<std::int64_t>(value);
      break;
    case DType::kInt32:
      view.as<std::int32_t>()[offset] = static_cast<std::int32_t>(value);
      break;
    case DType::kInt16:
      view.as<std::int16_t>()[offset] = static_cast<std::int16_t>(value);
      break;
    default:
      view.as<std::int8_t>()[offset] = static_cast<std::int8_t>(value);
  }
}

std::vector<double> values(const TensorView& view) {
  std::vector<double> result(static_cast<std::size_t>(view.num_elements()));
  for (std::size_t i = 0; i < result.size(); ++i) {
    result[i] = load(view, static_cast<std::int64_t>(i));
  }
  return result;
}

std::vector<std::byte> bytes(const TensorView& view) {
  const auto item = static_cast<std::size_t>(item_size(view.dtype));
  const auto count = static_cast<std::size_t>(view.num_elements());
  std::vector<std::byte> result(count * item);
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t offset = element_offset(view, static_cast<std::int64_t>(i));
    std::memcpy(result.data() + i * item,
                view.as<std::byte>() + offset * static_cast<std::int64_t>(item), item);
  }
  return result;
}

void fill_bits(const TensorView& view, std::uint64_t seed) {
  const std::int64_t item = item_size(view.dtype);
  for (std::int64_t i = 0; i < view.num_elements(); ++i) {
    const std::uint64_t bits = mix(seed, static_cast<std::uint64_t>(i));
    std::memcpy(view.as<std::byte>() + element_offset(view, i) * item, &bits,
                static_cast<std::size_t>(item));
  }
}

std::int64_t count_poison(const TensorView& view) {
  const auto pattern = poison(view.dtype);
  const std::int64_t item = item_size(view.dtype);
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < view.num_elements(); ++i) {
    count += std::memcmp(view.as<std::byte>() + element_offset(view, i) * item, pattern.data(),
                         static_cast<std::size_t>(item)) == 0;
  }
  return count;
}

}  // namespace zigzag::test
