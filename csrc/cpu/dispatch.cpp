// Which instruction set the kernels use. Compiled for the lowest processor.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../kernels.h"

namespace ddpm_fast {
namespace {

struct Level {
  const CpuKernels* kernels;
  bool (*available)();
};

// Best last.
const Level kLevels[] = {
    {&kBaselineKernels, [] { return true; }},
#ifdef DDPM_FAST_X86
    {&kAvx2Kernels,
     [] {
       __builtin_cpu_init();
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
    {&kAvx512Kernels,
     [] {
       __builtin_cpu_init();
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
};

std::atomic<const CpuKernels*> current{nullptr};

const CpuKernels* best() {
  const CpuKernels* found = nullptr;
  for (const Level& level : kLevels) {
    if (level.available()) found = level.kernels;
  }
  return found;
}

const CpuKernels* named(const char* name) {
  std::string available;
  for (const Level& level : kLevels) {
    if (!level.available()) continue;
    if (std::strcmp(level.kernels->name, name) == 0) return level.kernels;
    available += (available.empty() ? "" : ", ") + std::string(level.kernels->name);
  }
  throw std::runtime_error(
      "the CPU level \"" + std::string(name) +
      "\" (DDPM_FAST_CPU) is not available here; this build on this CPU has: " + available + ".");
}

#ifdef DDPM_FAST_X86
// Of kernels that need AVX-512, those of a dtype; null where the level in use has none.
template <class Kernels>
const Kernels* of_dtype(DType dtype, const Kernels* float32, const Kernels* bfloat16,
                        const Kernels* float16 = nullptr) {
  if (&cpu_kernels() != &kAvx512Kernels) return nullptr;
  if (dtype == DType::kFloat32) return float32;
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx512bf16")) return nullptr;
  return dtype == DType::kBFloat16 ? bfloat16 : float16;
}
#endif

}  // namespace

const CpuKernels& cpu_kernels() {
  const CpuKernels* kernels = current.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    const char* wanted = std::getenv("DDPM_FAST_CPU");
    kernels = wanted != nullptr && *wanted != '\0' ? named(wanted) : best();
    current.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

GroupNormKernel group_norm_kernel([[maybe_unused]] DType dtype) {
#ifdef DDPM_FAST_X86
  __builtin_cpu_init();
  if (dtype == DType::kBFloat16 && &cpu_kernels() == &kAvx512Kernels &&
      __builtin_cpu_supports("avx512bf16")) {
    return kAvx512Bf16GroupNorm;
  }
#endif
  return cpu_kernels().group_norm;
}

const ConvKernels* conv_kernels([[maybe_unused]] DType dtype, [[maybe_unused]] bool winograd) {
#ifdef DDPM_FAST_X86
  if (dtype == DType::kFloat32 && &cpu_kernels() == &kAvx2Kernels) {
    return winograd ? &kAvx2Winograd : &kAvx2Conv;
  }
  if (!winograd) return of_dtype(dtype, &kAvx512Conv, &kAvx512Bf16Conv);
  return of_dtype(dtype, &kAvx512Winograd, &kAvx512Bf16Winograd, &kAvx512Fp16Winograd);
#else
  return nullptr;
#endif
}

const AttentionKernels* attention_kernels([[maybe_unused]] DType dtype) {
#ifdef DDPM_FAST_X86
  return of_dtype(dtype, &kAvx512Attention, &kAvx512Bf16Attention);
#else
  return nullptr;
#endif
}

void set_cpu_level(const char* name) { current.store(named(name), std::memory_order_release); }

int cpu_levels(const char* names[3], bool available_only) {
  int count = 0;
  for (const Level& level : kLevels) {
    if (!available_only || level.available()) names[count++] = level.kernels->name;
  }
  return count;
}

}  // namespace ddpm_fast
