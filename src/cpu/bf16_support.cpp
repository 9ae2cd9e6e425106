#include "cpu/bf16_support.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace zigzag::cpu {
namespace {

struct Registers {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return {};
  return r;
}

bool bit(unsigned word, unsigned index) { return ((word >> index) & 1U) != 0; }

bool ask_for_tiles() {
  // Leaf 7: AMX-BF16 is bit 22 and AMX-TILE bit 24 of EDX. Linux lends the tile registers to a
  // process that asks (arch_prctl ARCH_REQ_XCOMP_PERM for state component 18, XTILEDATA).
  constexpr long kRequestPermission = 0x1023;
  constexpr long kTileData = 18;
  const Registers r = cpuid(7, 0);
  return bit(r.edx, 22) && bit(r.edx, 24) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

// Whether the operating system keeps AVX-512 registers is Highway's test of its AVX3 target.
bool has_avx512_bf16() {
  static const bool has = bit(cpuid(7, 1).eax, 5);
  return has;
}

bool has_amx_bf16() {
  static const bool has = ask_for_tiles();
  return has;
}

}  // namespace zigzag::cpu
#else
namespace zigzag::cpu {
bool has_avx512_bf16() { return false; }
bool has_amx_bf16() { return false; }
}  // namespace zigzag::cpu
#endif
