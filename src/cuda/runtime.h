#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "backend.h"
#include "zigzag/system.h"
#include "zigzag/tensor.h"

namespace zigzag::cuda {

/// Number of GPUs that can be used; 0 without a driver or in a build without CUDA. Never throws.
int device_count() noexcept;

/// The lines that `zigzag doctor` prints about GPUs: driver, devices, cuDNN, NCCL, peer memory.
/// Never throws.
std::vector<Component> components();

/// True when every pair of these devices can read each other's memory, or is one device.
bool peers_reach(std::span<const int> devices) noexcept;

/// The PCI bus id that names a GPU among the processes of a host. Throws DeviceError when there is
/// no such device.
std::string bus_id(Device device);

/// Why this device cannot read the memory of the GPU of that bus id; empty when it can. Never
/// throws.
std::string why_unreachable(Device device, const std::string& bus) noexcept;

/// What attention on this device runs in: "cuDNN 9.19.0" or why not, and whether the tensor-core
/// kernels do.
std::string attention_engine(Device device);

/// Device memory for the command line and the tests, freed with its last owner. Throws DeviceError
/// that says how much was asked for and how much is free.
Buffer allocate(Device device, std::int64_t bytes);

/// Copies bytes between host and device memory in any direction, and returns when they are there.
void copy(void* destination, const void* source, std::int64_t bytes);

/// A stream of this device that does not wait for the legacy default stream; destroyed with its
/// last owner.
std::shared_ptr<void> make_stream(Device device);

/// Waits for all work given to `stream` of this device. Throws DeviceError when some of it failed.
void synchronize(Device device, void* stream);

/// Makes this device the calling thread's current one. Throws DeviceError when there is no such
/// device.
void use_device(Device device);

}  // namespace zigzag::cuda
