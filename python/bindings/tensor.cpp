#include "tensor.h"

#include <algorithm>
#include <memory>
#include <new>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include "cuda/runtime.h"

namespace zigzag::python {
namespace {

// Copies move bits, so an unsigned type travels as the signed type of its size.
std::optional<DType> integer_dtype(int bits) {
  switch (bits) {
    case 8:
      return DType::kInt8;
    case 16:
      return DType::kInt16;
    case 32:
      return DType::kInt32;
    case 64:
      return DType::kInt64;
    default:
      return std::nullopt;
  }
}

std::optional<DType> to_dtype(nb::dlpack::dtype type) {
  if (type.lanes != 1) {
    return std::nullopt;
  }
  switch (static_cast<nb::dlpack::dtype_code>(type.code)) {
    case nb::dlpack::dtype_code::Float:
      return type.bits == 16   ? std::optional(DType::kFloat16)
             : type.bits == 32 ? std::optional(DType::kFloat32)
             : type.bits == 64 ? std::optional(DType::kFloat64)
                               : std::nullopt;
    case nb::dlpack::dtype_code::Bfloat:
      return type.bits == 16 ? std::optional(DType::kBFloat16) : std::nullopt;
    case nb::dlpack::dtype_code::Bool:
      return type.bits == 8 ? std::optional(DType::kBool) : std::nullopt;
    case nb::dlpack::dtype_code::UInt:
      return type.bits == 8 ? std::optional(DType::kUInt8) : integer_dtype(type.bits);
    case nb::dlpack::dtype_code::Int:
      return integer_dtype(type.bits);
    default:
      return std::nullopt;
  }
}

Device to_device(int type, int index) {
  if (type == nb::device::cpu::value) {
    return {DeviceType::kCpu, 0};
  }
  if (type == nb::device::cuda::value) {
    return {DeviceType::kCuda, index};
  }
  throw InvalidArgument("the array lives on a device of DLPack type " + std::to_string(type) +
                        "; it must be on the CPU or on CUDA");
}

}  // namespace

Tensor::Tensor(nb::ndarray<nb::ro> source, const std::optional<std::string>& dtype)
    : array(std::move(source)) {
  const nb::dlpack::dtype given = array.dtype();
  const auto own = to_dtype(given);
  if (!own && !dtype) {
    throw InvalidArgument("the array's element type (DLPack code " + std::to_string(given.code) +
                          ", " + std::to_string(given.bits) +
                          " bits) is not supported; it must be a float, integer or bool type");
  }
  view.dtype = dtype ? parse_dtype(*dtype) : *own;
  if (item_size(view.dtype) * 8 != given.bits) {
    throw InvalidArgument("an array of " + std::to_string(given.bits) +
                          "-bit elements cannot be read as " + std::string(dtype_name(view.dtype)));
  }
  view.device = to_device(array.device_type(), array.device_id());
  view.data = const_cast<void*>(array.data());  // NOLINT: inputs are only read
  view.shape.resize(array.ndim());
  view.strides.resize(array.ndim());
  for (std::size_t i = 0; i < array.ndim(); ++i) {
    view.shape[i] = static_cast<std::int64_t>(array.shape(i));
    view.strides[i] = array.stride(i);
  }
  if (view.num_elements() == 0) {
    // NumPy gives arrays without elements strides of 0; which ones they have says nothing.
    std::int64_t stride = 1;
    for (std::size_t i = array.ndim(); i-- > 0;) {
      view.strides[i] = stride;
      stride *= std::max<std::int64_t>(view.shape[i], 1);
    }
  }
}

Tensor::Tensor(nb::object owner, std::uintptr_t address, const std::string& dtype,
               const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides,
               int gpu) {
  view.dtype = parse_dtype(dtype);
  view.device = {DeviceType::kCuda, gpu};
  view.data = reinterpret_cast<void*>(address);  // NOLINT
  view.shape = shape;
  view.strides = strides;
  const std::vector<std::size_t> extents(shape.begin(), shape.end());
  const auto bits = static_cast<std::uint8_t>(8 * item_size(view.dtype));
  array = nb::ndarray<nb::ro>(view.data, extents.size(), extents.data(), owner, strides.data(),
                              {static_cast<std::uint8_t>(nb::dlpack::dtype_code::UInt), bits, 1},
                              nb::device::cuda::value, gpu);
}

nb::ndarray<nb::array_api> Tensor::allocate(const Tensor& like,
                                            const std::vector<std::size_t>& shape) {
  std::int64_t bytes = item_size(like.view.dtype);
  for (const std::size_t extent : shape) bytes *= static_cast<std::int64_t>(extent);
  auto owned = std::make_unique<Buffer>();
  if (like.view.device.type == DeviceType::kCuda) {
    *owned = cuda::allocate(like.view.device, bytes);
  } else {
    const auto size = static_cast<std::size_t>(std::max<std::int64_t>(bytes, 1));
    owned->memory = std::shared_ptr<void>(::operator new(size),
                                          [](void* memory) { ::operator delete(memory); });
  }
  void* const data = owned->memory.get();
  nb::capsule owner(owned.release(),
                    [](void* pointer) noexcept { delete static_cast<Buffer*>(pointer); });
  return nb::ndarray<nb::array_api>(data, shape.size(), shape.data(), owner, nullptr,
                                    like.array.dtype(), like.array.device_type(),
                                    like.array.device_id());
}

IndexArray to_array(std::vector<std::int64_t> values) {
  auto owned = std::make_unique<std::vector<std::int64_t>>(std::move(values));
  std::int64_t* const data = owned->data();
  const std::size_t size = owned->size();
  nb::capsule owner(owned.release(), [](void* pointer) noexcept {
    delete static_cast<std::vector<std::int64_t>*>(pointer);
  });
  return IndexArray(data, {size}, owner);
}

Mask make_mask(bool causal, std::pair<std::int64_t, std::int64_t> window) {
  return Mask{causal, window.first, window.second};
}

void bind_tensor(nb::module_& module) {
  nb::class_<Tensor>(module, "Tensor",
                     "A view of an array on the CPU or on CUDA that keeps the array alive.")
      .def(nb::init<nb::ndarray<nb::ro>, const std::optional<std::string>&>(), nb::arg("array"),
           nb::arg("dtype").none() = nb::none())
      .def(nb::init<nb::object, std::uintptr_t, const std::string&,
                    const std::vector<std::int64_t>&, const std::vector<std::int64_t>&, int>(),
           nb::arg("owner"), nb::arg("address"), nb::arg("dtype"), nb::arg("shape"),
           nb::arg("strides"), nb::arg("gpu"))
      .def("allocate", &Tensor::allocate, nb::arg("shape"))
      .def_prop_ro("shape", [](const Tensor& self) { return self.view.shape; })
      .def_prop_ro("dtype",
                   [](const Tensor& self) { return std::string(dtype_name(self.view.dtype)); })
      .def_prop_ro("device", [](const Tensor& self) { return device_name(self.view.device); });
}

}  // namespace zigzag::python
