#include "attention_check.h"

#include <cmath>
#include <cstdint>
#include <sstream>

#include "plan_data.h"
#include "zigzag/error.h"

namespace zigzag {

namespace {

using std::int64_t;

std::string text(int64_t value) { return std::to_string(value); }

/// The range of softmax_scale and softcap.
constexpr double kSmallestFactor = 1e-30;
constexpr double kLargestFactor = 1e30;

/// "1e+300", where std::to_string would print 300 digits.
std::string number_text(double value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

/// A tensor with the name that messages use.
struct Named {
  const char* name;
  const TensorView& view;
};

void check_dims(const Named& tensor, std::size_t dims, const char* expected) {
  if (tensor.view.rank() != dims || tensor.view.strides.size() != dims) {
    throw InvalidArgument(std::string(tensor.name) + " has shape " + shape_text(tensor.view.shape) +
                          "; it must be " + expected);
  }
  if (tensor.view.data == nullptr && tensor.view.num_elements() > 0) {
    throw InvalidArgument(std::string(tensor.name) + " has no data");
  }
}

void check_last_stride(const Named& tensor) {
  // Arrays without elements come with any strides.
  if (tensor.view.num_elements() > 0 && tensor.view.shape.back() > 1 &&
      tensor.view.strides.back() != 1) {
    throw InvalidArgument("the last stride of " + std::string(tensor.name) + " is " +
                          text(tensor.view.strides.back()) +
                          "; it must be 1 (make the tensor contiguous along head_dim)");
  }
}

/// A GPU faults on addresses that are no multiple of the type's size.
void check_alignment(const Named& tensor) {
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.view.data);
  const int64_t size = item_size(tensor.view.dtype);
  if (tensor.view.num_elements() > 0 && address % static_cast<std::uintptr_t>(size) != 0) {
    throw InvalidArgument(std::string(tensor.name) +
                          " starts at an address that is no multiple of " + text(size) +
                          " bytes, the size of a " + std::string(dtype_name(tensor.view.dtype)));
  }
}

/// What is written must not lie on itself.
void check_own_elements(const Named& tensor) {
  for (std::size_t dim = 0; dim < tensor.view.rank(); ++dim) {
    if (tensor.view.num_elements() > 0 && tensor.view.shape[dim] > 1 &&
        tensor.view.strides[dim] == 0) {
      throw InvalidArgument(std::string(tensor.name) + " has stride 0 in dimension " +
                            text(static_cast<int64_t>(dim)) +
                            "; results need memory of their own for every element");
    }
  }
}

void check_like(const Named& tensor, const Named& model, DType dtype) {
  if (tensor.view.dtype != dtype) {
    throw InvalidArgument(std::string(tensor.name) + " is " +
                          std::string(dtype_name(tensor.view.dtype)) + "; it must be " +
                          std::string(dtype_name(dtype)) +
                          (dtype == model.view.dtype ? " like " : " for ") + model.name);
  }
  if (!(tensor.view.device == model.view.device)) {
    throw InvalidArgument(std::string(tensor.name) + " is on " + device_name(tensor.view.device) +
                          " and " + model.name + " on " + device_name(model.view.device) +
                          "; all tensors must be on one device");
  }
}

void check_shape(const Named& tensor, std::span<const int64_t> shape, const char* meaning) {
  if (tensor.view.shape.size() != shape.size() ||
      !std::equal(shape.begin(), shape.end(), tensor.view.shape.begin())) {
    throw InvalidArgument(std::string(tensor.name) + " has shape " + shape_text(tensor.view.shape) +
                          "; it must be " + shape_text(shape) + ", " + meaning);
  }
}

/// q, k and v against one another.
void check_inputs(const Named& q, const Named& k, const Named& v) {
  check_dims(q, 3, "[tokens, heads, head_dim]");
  check_dims(k, 3, "[tokens, kv_heads, head_dim]");
  check_dims(v, 3, "[tokens, kv_heads, head_dim]");
  if (!is_attention_dtype(q.view.dtype)) {
    throw InvalidArgument("q is " + std::string(dtype_name(q.view.dtype)) +
                          "; attention takes float32, float16 and bfloat16");
  }
  for (const Named& tensor : {k, v}) check_like(tensor, q, q.view.dtype);
  check_shape(v, k.view.shape, "the shape of k");
  const int64_t heads = q.view.shape[1];
  const int64_t kv_heads = k.view.shape[1];
  const int64_t head_dim = q.view.shape[2];
  if (heads < 1 || kv_heads < 1 || heads % kv_heads != 0) {
    throw InvalidArgument("q has " + text(heads) + " heads and k has " + text(kv_heads) +
                          "; the heads of q must be a multiple of those of k, both at least 1");
  }
  if (head_dim < 1 || head_dim > kMaxHeadDim) {
    throw InvalidArgument("head_dim is " + text(head_dim) + "; it must be 1 to " +
                          text(kMaxHeadDim));
  }
  if (k.view.shape[2] != head_dim) {
    throw InvalidArgument("k has head_dim " + text(k.view.shape[2]) + " and q " + text(head_dim) +
                          "; they must be equal");
  }
  for (const Named& tensor : {q, k, v}) {
    check_last_stride(tensor);
    check_alignment(tensor);
  }
}

void check_rows(const Named& tensor, int64_t rows, const Plan& plan, int64_t rank) {
  if (tensor.view.shape[0] == rows) return;
  throw InvalidArgument(std::string(tensor.name) + " has " + text(tensor.view.shape[0]) +
                        " rows; rank " + text(rank) + " of " + text(plan.world_size()) + " holds " +
                        text(rows) + " of the plan's " + text(plan.total_tokens()) +
                        " tokens (cu_seqlens are those of the whole pack)");
}

void check_as(const Named& tensor, const Named& model) {
  check_dims(tensor, 3, "[tokens, heads, head_dim]");
  check_like(tensor, model, model.view.dtype);
  const std::string meaning = std::string("the shape of ") + model.name;
  check_shape(tensor, model.view.shape, meaning.c_str());
  check_last_stride(tensor);
  check_alignment(tensor);
}

void check_output(const Named& tensor, const Named& model) {
  check_as(tensor, model);
  check_own_elements(tensor);
}

void check_lse(const Named& lse, const Named& q) {
  check_dims(lse, 2, "[tokens, heads]");
  check_like(lse, q, DType::kFloat32);
  const std::vector<int64_t> shape{q.view.shape[0], q.view.shape[1]};
  check_shape(lse, shape, "the tokens and heads of q");
  check_alignment(lse);
}

void check_options(const AttentionOptions& options, int64_t kv_heads) {
  check_mask(options.mask);
  // Scores are float32: beyond this range they would all be 0, infinite or NaN.
  const auto fits = [](double value) {
    return std::isfinite(value) && std::abs(value) >= kSmallestFactor &&
           std::abs(value) <= kLargestFactor;
  };
  if (options.softmax_scale && *options.softmax_scale != 0 && !fits(*options.softmax_scale)) {
    throw InvalidArgument("softmax_scale is " + number_text(*options.softmax_scale) +
                          "; it must be 0 or of a size from 1e-30 to 1e30");
  }
  if (options.softcap != 0 && (!fits(options.softcap) || options.softcap < 0)) {
    throw InvalidArgument("softcap is " + number_text(options.softcap) +
                          "; it must be 0 (none) or 1e-30 to 1e30");
  }
  const int64_t stage = options.kv_heads_per_stage;
  if (stage < 0 || (stage > 0 && kv_heads % stage != 0)) {
    throw InvalidArgument("kv_heads_per_stage is " + text(stage) +
                          "; it must be 0 (automatic) or a divisor of the " + text(kv_heads) +
                          " KV heads");
  }
}

/// Checks that need the plan and the group, and the defaults.
Problem resolve(const Named& q, const Named& k, const Named& v, const Plan& plan,
                const Communicator& communicator, const AttentionOptions& options) {
  if (plan.world_size() != communicator.size()) {
    throw InvalidArgument("the plan is for " + text(plan.world_size()) +
                          " ranks and the group has " + text(communicator.size()) +
                          "; they must be equal");
  }
  const int64_t rank = communicator.rank();
  const int64_t rows = plan.local_tokens(rank);
  for (const Named& tensor : {q, k, v}) check_rows(tensor, rows, plan, rank);
  check_inputs(q, k, v);
  const int64_t kv_heads = k.view.shape[1];
  const int64_t head_dim = q.view.shape[2];
  check_options(options, kv_heads);
  Problem problem;
  problem.heads = q.view.shape[1];
  problem.kv_heads = kv_heads;
  problem.head_dim = head_dim;
  problem.scale = options.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(head_dim)));
  problem.kernels = options.kernels.value_or(default_kernels());
  problem.kv_heads_per_stage =
      options.kv_heads_per_stage > 0
          ? options.kv_heads_per_stage
          : auto_kv_heads_per_stage(plan, kv_heads, head_dim, q.view.dtype, q.view.device);
  return problem;
}

/// What forward and backward take alike; out and lse may be inputs.
Problem check_call(const TensorView& q, const TensorView& k, const TensorView& v, const Plan& plan,
                   const Communicator& communicator, const AttentionOptions& options,
                   const TensorView& out, const TensorView& lse) {
  const Named named_q{"q", q};
  check_dims(named_q, 3, "[tokens, heads, head_dim]");
  check_dims({"k", k}, 3, "[tokens, kv_heads, head_dim]");
  check_dims({"v", v}, 3, "[tokens, kv_heads, head_dim]");
  const Problem problem = resolve(named_q, {"k", k}, {"v", v}, plan, communicator, options);
  check_as({"out", out}, named_q);
  check_lse({"lse", lse}, named_q);
  return problem;
}

}  // namespace

Problem check_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                      const Plan& plan, const Communicator& communicator,
                      const AttentionOptions& options, const TensorView& out,
                      const TensorView& lse) {
  const Problem problem = check_call(q, k, v, plan, communicator, options, out, lse);
  check_own_elements({"out", out});
  check_own_elements({"lse", lse});
  return problem;
}

Problem check_backward(const TensorView& dout, const TensorView& q, const TensorView& k,
                       const TensorView& v, const TensorView& out, const TensorView& lse,
                       const Plan& plan, const Communicator& communicator,
                       const AttentionOptions& options, const TensorView& dq, const TensorView& dk,
                       const TensorView& dv) {
  const Problem problem = check_call(q, k, v, plan, communicator, options, out, lse);
  const Named named_q{"q", q};
  const Named named_k{"k", k};
  check_as({"dout", dout}, named_q);
  check_output({"dq", dq}, named_q);
  check_output({"dk", dk}, named_k);
  check_output({"dv", dv}, named_k);
  return problem;
}

comm::Agreement describe(comm::Direction direction, const TensorView& q, const Plan& plan,
                         const AttentionOptions& options, const Problem& problem,
                         const std::string& error) {
  comm::Agreement mine;
  mine.direction = direction;
  comm::set_plan(mine, plan);
  mine.dtype = q.dtype;
  mine.device = q.device.type;
  mine.heads = problem.heads;
  mine.kv_heads = problem.kv_heads;
  mine.head_dim = problem.head_dim;
  mine.mask = options.mask;
  mine.scale = problem.scale;
  mine.softcap = options.softcap;
  mine.kv_heads_per_stage = problem.kv_heads_per_stage;
  mine.kernels = problem.kernels;
  mine.deterministic = options.deterministic;
  mine.error = error;
  return mine;
}

namespace reference {

namespace {

void check_pack(std::span<const int64_t> cu_seqlens, const Named& q, const Named& k, const Named& v,
                const AttentionOptions& options) {
  const Plan plan(cu_seqlens, 1);
  check_inputs(q, k, v);
  for (const Named& tensor : {q, k, v}) {
    if (tensor.view.shape[0] != plan.total_tokens()) {
      throw InvalidArgument(std::string(tensor.name) + " has " + text(tensor.view.shape[0]) +
                            " rows; cu_seqlens ends at " + text(plan.total_tokens()));
    }
    if (tensor.view.device.type != DeviceType::kCpu) {
      throw InvalidArgument(std::string(tensor.name) + " is on " + device_name(tensor.view.device) +
                            "; the float64 reference runs on the cpu");
    }
  }
  check_options(options, k.view.shape[1]);
}

void check_float64(const Named& tensor, std::span<const int64_t> shape, const Named& model) {
  check_dims(tensor, shape.size(), "as many dimensions as its input");
  check_like(tensor, model, DType::kFloat64);
  check_shape(tensor, shape, "the shape of its input");
}

}  // namespace

void check_reference_forward(const TensorView& q, const TensorView& k, const TensorView& v,
                             std::span<const int64_t> cu_seqlens, const AttentionOptions& options,
                             const TensorView& out, const TensorView& lse) {
  const Named named_q{"q", q};
  check_pack(cu_seqlens, named_q, {"k", k}, {"v", v}, options);
  check_float64({"out", out}, q.shape, named_q);
  check_float64({"lse", lse}, std::span<const int64_t>(q.shape).first(2), named_q);
}

void check_reference_backward(const TensorView& dout, const TensorView& q, const TensorView& k,
                              const TensorView& v, std::span<const int64_t> cu_seqlens,
                              const AttentionOptions& options, const TensorView& dq,
                              const TensorView& dk, const TensorView& dv) {
  const Named named_q{"q", q};
  const Named named_k{"k", k};
  check_pack(cu_seqlens, named_q, named_k, {"v", v}, options);
  check_as({"dout", dout}, named_q);
  check_float64({"dq", dq}, q.shape, named_q);
  check_float64({"dk", dk}, k.shape, named_k);
  check_float64({"dv", dv}, k.shape, named_k);
}

}  // namespace reference

}  // namespace zigzag
