// Fuzzes the CPU kernel of GroupNorm over shapes, parts, types and ranges, and holds every level
// that this CPU has near the baseline. Built with kernels_fuzz.cpp, which says how.
//   build-fuzz/norm_fuzz [cases] [seed]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../csrc/kernels.h"
#include "fuzz_elements.h"

namespace {

using namespace ddpm_fast;

template <class T, class Out>
void fuzz_case(DType dtype, DType out_dtype) {
  static const int64_t kPixels[] = {1, 2, 3, 15, 16, 49, 64, 196, 257, 784};
  static const int64_t kGroupSizes[] = {1, 2, 3, 4, 6, 12, 16, 31, 64, 300};
  GroupNormArgs args{};
  args.samples = 1 + below(3);
  args.pixels = kPixels[below(10)];
  args.groups = 1 + below(9);
  const int64_t channels = args.groups * kGroupSizes[below(10)];
  args.channels[1] = below(2) ? below(channels) : 0;
  args.channels[0] = channels - args.channels[1];
  const int64_t elements = args.samples * args.pixels;
  const Elements<T> first(elements * args.channels[0]), second(elements * args.channels[1]);
  if (below(3) == 0) {  // far from 0, where squares' differences would cancel
    for (int64_t i = 0; i < first.count; ++i) {
      from_float(to_float(first.data()[i]) + 30.0f, first.data() + i);
    }
  }
  const bool rows = below(2) != 0, shifted = below(2) != 0;
  const Elements<float> shift((rows ? args.samples : 1) * channels);
  const Elements<float> weight(shift.count), bias(shift.count);
  args.x[0] = first.data();
  args.x[1] = second.data();
  args.shift = shifted ? shift.data() : nullptr;
  args.weight = weight.data();
  args.bias = bias.data();
  args.shift_stride = args.affine_stride = rows ? channels : 0;
  args.eps = 0.01;
  args.silu = below(2) != 0;
  args.dtype = dtype;
  args.out_dtype = out_dtype;
  const int64_t groups = args.samples * args.groups, middle = below(groups + 1);
  const char* names[kCpuLevels];
  std::vector<float> expected;
  for (int level = 0; level < cpu_levels(names, true); ++level) {
    set_cpu_level(names[level]);
    const Elements<Out> out(elements * channels), whole(elements * channels);
    const Elements<float> memory(norm_memory(channels)), other(memory.count);  // another thread's
    const GroupNormKernel kernel = group_norm_kernel(dtype);
    args.out = whole.data();
    kernel(args, 0, groups, memory.data());
    args.out = out.data();
    kernel(args, 0, middle, memory.data());
    kernel(args, middle, groups, other.data());
    if (std::memcmp(out.data(), whole.data(), out.count * sizeof(Out)) != 0) {
      std::printf("group_norm: %s depends on where the groups are cut\n", names[level]);
      std::exit(1);
    }
    if (!out.is_intact() || !memory.is_intact() || !other.is_intact()) {
      std::printf("group_norm: %s wrote a margin\n", names[level]);
      std::exit(1);
    }
    for (int64_t i = 0; i < out.count; ++i) {
      const float value = to_float(out.data()[i]);
      if (level == 0) expected.push_back(value);
      // Two neighbours of bfloat16, or some of float16 or float32.
      const float apart = out_dtype == DType::kBFloat16  ? 0x1p-7f
                          : out_dtype == DType::kFloat16 ? 0x1p-9f
                                                         : 1e-5f;
      const float bound = apart * (1.0f + std::abs(expected[i]));
      if (std::abs(value - expected[i]) <= bound) continue;
      std::printf("group_norm: %s gives %g, %s %g\n", names[level], value, names[0], expected[i]);
      std::exit(1);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1000;
  generator.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  for (int i = 0; i < cases; ++i) {
    fuzz_case<float, float>(DType::kFloat32, DType::kFloat32);
    fuzz_case<BFloat16, BFloat16>(DType::kBFloat16, DType::kBFloat16);
    fuzz_case<BFloat16, Half>(DType::kBFloat16, DType::kFloat16);
    fuzz_case<Half, Half>(DType::kFloat16, DType::kFloat16);
  }
  const char* names[kCpuLevels];
  std::printf("%d cases, %d levels agree\n", cases, cpu_levels(names, true));
}
