// The levels that a prepared network's kernels are fuzzed at.
#pragma once

#include <cstring>

#include "../csrc/kernels.h"

extern "C" void amx_emulator_install();
extern "C" void amx_emulator_remove();

namespace ddpm_fast {
namespace {

// Calls fuzz(name, cases) at each level that is there; at amx, which an emulator can stand in for,
// with `fewer` times less.
template <class Fuzz>
void each_level(int cases, int fewer, const Fuzz& fuzz) {
  const char* names[kCpuLevels];
  const int count = cpu_levels(names, true);
  for (int level = 0; level < count; ++level) {
    set_cpu_level(names[level]);
    fuzz(names[level], cases);
  }
#ifdef DDPM_FAST_AMX
  if (std::strcmp(names[count - 1], "avx512") == 0 && conv_kernels(DType::kBFloat16, false)) {
    amx_emulator_install();
    set_cpu_level("amx", true);
    fuzz("amx, emulated", cases / fewer + 1);
    amx_emulator_remove();
  }
#endif
}

}  // namespace
}  // namespace ddpm_fast
