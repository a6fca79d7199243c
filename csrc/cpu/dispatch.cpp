// Which instruction set the kernels use. Compiled for the lowest processor.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#ifdef DDPM_FAST_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../kernels.h"

namespace ddpm_fast {
namespace {

#ifdef DDPM_FAST_X86
bool has_avx512() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512_bf16() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16");
}

#ifdef DDPM_FAST_AMX
// Whether CPU and system have tiles of bfloat16; Linux gives a process their state if it asks.
bool has_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  unsigned a = 0, b = 0, c = 0, features = 0;
  if (!has_avx512() || !has_avx512_bf16()) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &features) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of prctl.h
  return (features & kBf16) != 0 && (features & kTiles) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif
#endif

struct Level {
  const char* name;
  const CpuKernels* kernels;
  bool (*available)();
  bool is_proven = true;  // else it is to be asked for
  bool has_tiles = false;
};

// Best last.
const Level kLevels[] = {
    {"baseline", &kBaselineKernels, [] { return true; }},
#ifdef DDPM_FAST_X86
    {"avx2", &kAvx2Kernels,
     [] {
       __builtin_cpu_init();
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
    {"avx512", &kAvx512Kernels, has_avx512},
#endif
#ifdef DDPM_FAST_AMX
    {"amx", &kAvx512Kernels, has_amx, false, true},
#endif
};

std::atomic<const Level*> current{nullptr};

const Level* best() {
  const Level* found = nullptr;
  for (const Level& level : kLevels) {
    if (level.is_proven && level.available()) found = &level;
  }
  return found;
}

const Level* named(const char* name, bool unchecked = false) {
  std::string available;
  for (const Level& level : kLevels) {
    if (!unchecked && !level.available()) continue;
    if (std::strcmp(level.name, name) == 0) return &level;
    available += (available.empty() ? "" : ", ") + std::string(level.name);
  }
  throw std::runtime_error(
      "the CPU level \"" + std::string(name) +
      "\" (DDPM_FAST_CPU) is not available here; this build on this CPU has: " + available + ".");
}

const Level& level_in_use() {
  const Level* level = current.load(std::memory_order_acquire);
  if (level == nullptr) {
    const char* wanted = std::getenv("DDPM_FAST_CPU");
    level = wanted != nullptr && *wanted != '\0' ? named(wanted) : best();
    current.store(level, std::memory_order_release);
  }
  return *level;
}

#ifdef DDPM_FAST_X86
// Of kernels that need AVX-512, those of a dtype; null where the level in use has none.
template <class Kernels>
const Kernels* of_dtype(DType dtype, const Kernels* float32, const Kernels* bfloat16,
                        const Kernels* float16 = nullptr) {
  if (&cpu_kernels() != &kAvx512Kernels) return nullptr;
  if (dtype == DType::kFloat32) return float32;
  if (!has_avx512_bf16()) return nullptr;
  return dtype == DType::kBFloat16 ? bfloat16 : float16;
}
#endif

}  // namespace

const CpuKernels& cpu_kernels() { return *level_in_use().kernels; }
const char* cpu_level_name() { return level_in_use().name; }

GroupNormKernel group_norm_kernel([[maybe_unused]] DType dtype) {
#ifdef DDPM_FAST_X86
  if (dtype == DType::kBFloat16 && &cpu_kernels() == &kAvx512Kernels && has_avx512_bf16()) {
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
#ifdef DDPM_FAST_AMX
  if (!winograd && level_in_use().has_tiles) {
    return of_dtype(dtype, &kAvx512Conv, &kAmxBf16Conv, &kAmxFp16Conv);
  }
#endif
  if (!winograd) return of_dtype(dtype, &kAvx512Conv, &kAvx512Bf16Conv);
  return of_dtype(dtype, &kAvx512Winograd, &kAvx512Bf16Winograd, &kAvx512Fp16Winograd);
#else
  return nullptr;
#endif
}

const AttentionKernels* attention_kernels([[maybe_unused]] DType dtype) {
#ifdef DDPM_FAST_X86
#ifdef DDPM_FAST_AMX
  if (level_in_use().has_tiles) return of_dtype(dtype, &kAvx512Attention, &kAmxBf16Attention);
#endif
  return of_dtype(dtype, &kAvx512Attention, &kAvx512Bf16Attention);
#else
  return nullptr;
#endif
}

void set_cpu_level(const char* name, bool unchecked) {
  current.store(named(name, unchecked), std::memory_order_release);
}

int cpu_levels(const char* names[kCpuLevels], bool available_only) {
  int count = 0;
  for (const Level& level : kLevels) {
    if (!available_only || level.available()) names[count++] = level.name;
  }
  return count;
}

}  // namespace ddpm_fast
