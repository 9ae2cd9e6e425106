#include "comm_agree_cases.h"

namespace zigzag::test {

comm::Agreement agreed(int size) {
  comm::Agreement agreement;
  const std::int64_t lengths[] = {100, 28};
  comm::set_plan(agreement, Plan::from_lengths(lengths, size));
  agreement.heads = 8;
  agreement.kv_heads = 2;
  agreement.head_dim = 64;
  agreement.scale = 0.125;
  agreement.kv_heads_per_stage = 2;
  return agreement;
}

std::vector<Disagreement> disagreements() {
  using comm::Agreement;
  return {
      {"direction",
       [](Agreement& a) { a.direction = comm::Direction::kBackward; },
       {"started a backward", "rank 0 started a forward"}},
      {"pack",
       [](Agreement& a) {
         const std::int64_t lengths[] = {99, 28};
         comm::set_plan(a, Plan::from_lengths(lengths, a.world_size));
       },
       {"127 tokens in 2 documents", "128 tokens"}},
      {"world size", [](Agreement& a) { a.world_size += 1; }, {"ranks (fingerprint"}},
      {"dtype",
       [](Agreement& a) { a.dtype = DType::kBFloat16; },
       {"has dtype bfloat16", "rank 0 has dtype float32"}},
      {"device", [](Agreement& a) { a.device = DeviceType::kCuda; }, {"on cuda", "on cpu"}},
      {"heads", [](Agreement& a) { a.heads = 4; }, {"4 heads", "8 heads"}},
      {"kv_heads", [](Agreement& a) { a.kv_heads = 4; }, {"4 kv_heads", "2 kv_heads"}},
      {"head_dim", [](Agreement& a) { a.head_dim = 128; }, {"head_dim 128", "head_dim 64"}},
      {"causal", [](Agreement& a) { a.mask.causal = false; }, {"causal false", "causal true"}},
      {"window_left", [](Agreement& a) { a.mask.window_left = 7; }, {"window 7,-1"}},
      {"window_right", [](Agreement& a) { a.mask.window_right = 7; }, {"window -1,7"}},
      {"scale", [](Agreement& a) { a.scale = 1; }, {"softmax_scale 1 ", "softmax_scale 0.125"}},
      {"softcap", [](Agreement& a) { a.softcap = 30; }, {"softcap 30", "softcap 0"}},
      {"stage", [](Agreement& a) { a.kv_heads_per_stage = 1; }, {"kv_heads_per_stage 1"}},
      {"kernels",
       [](Agreement& a) { a.kernels = Kernels::kReference; },
       {"kernels reference", "kernels fused"}},
      {"deterministic", [](Agreement& a) { a.deterministic = true; }, {"deterministic true"}},
  };
}

}  // namespace zigzag::test
