// Fuzzes the CPU kernel of convolutions over shapes and ranges, and holds it near sums in float64.
// Built with kernels_fuzz.cpp, which says how.
//   build-fuzz/conv_fuzz [cases] [seed]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../csrc/kernels.h"
#include "fuzz_elements.h"
#include "fuzz_levels.h"

namespace {

using namespace ddpm_fast;

ConvShape random_shape(bool winograd) {
  static const int64_t kChannels[] = {1,  2,  3,  7,  8,  15, 16,  17, 24,
                                      31, 32, 40, 48, 64, 65, 100, 130};
  static const int64_t kSizes[] = {1, 2, 3, 4, 7, 9, 14, 25};
  ConvShape shape{};
  shape.in_channels = kChannels[below(17)];
  shape.out_channels = kChannels[below(17)];
  const bool is_1x1 = !winograd && below(4) == 0;  // which is not copied
  for (int i = 0; i < 2; ++i) {
    shape.size[i] = kSizes[below(8)];
    shape.kernel[i] = winograd ? 3 : is_1x1 ? 1 : 1 + below(3);
    shape.stride[i] = winograd || is_1x1 ? 1 : 1 + below(2);
    shape.padding[i] = is_1x1 ? 0 : below(3) + (below(8) == 0 ? 3 : 0);
    const int64_t missing = shape.kernel[i] - shape.size[i] - 2 * shape.padding[i];
    if (missing > 0) shape.size[i] += missing;
    shape.out_size[i] =
        (shape.size[i] + 2 * shape.padding[i] - shape.kernel[i]) / shape.stride[i] + 1;
    if (!is_1x1 && below(4) == 0) shape.out_size[i] += below(3);  // more padding after than before
  }
  if (below(16) == 0) {  // more than a strip
    shape.in_channels = 256;
    shape.size[1] = 300;
    shape.out_size[1] = (300 + 2 * shape.padding[1] - shape.kernel[1]) / shape.stride[1] + 1;
  }
  return shape;
}

struct Sum {
  double value, size;  // of the absolute terms
};

template <class T>
Sum expected(const ConvArgs& args, const float* weight, int64_t n, int64_t y, int64_t x,
             int64_t o) {
  const ConvShape& shape = args.shape;
  Sum sum{0.0, 0.0};
  const auto add = [&](double term) {
    sum.value += term;
    sum.size += std::abs(term);
  };
  for (int64_t i = 0; i < shape.kernel[0]; ++i) {
    for (int64_t j = 0; j < shape.kernel[1]; ++j) {
      const int64_t row = y * shape.stride[0] + i - shape.padding[0];
      const int64_t column = x * shape.stride[1] + j - shape.padding[1];
      if (row < 0 || row >= shape.size[0] || column < 0 || column >= shape.size[1]) continue;
      const T* from = static_cast<const T*>(args.x) +
                      ((n * shape.size[0] + row) * shape.size[1] + column) * shape.in_channels;
      for (int64_t c = 0; c < shape.in_channels; ++c) {
        const int64_t at =
            ((o * shape.in_channels + c) * shape.kernel[0] + i) * shape.kernel[1] + j;
        add(static_cast<double>(to_float(from[c])) * weight[at]);
      }
    }
  }
  if (args.bias != nullptr) add(args.bias[o]);
  return sum;
}

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("conv2d: %s\n", what);
  std::exit(1);
}

float largest(const Elements<float>& values) {
  float most = 0.0f;
  for (int64_t i = 0; i < values.count; ++i) most = std::max(most, std::abs(values.data()[i]));
  return most;
}

// rounding: to an Out. Packed is what the weights are kept as.
template <class T, class Packed, class Out = T>
void fuzz_case(const ConvKernels& kernels, bool winograd, double rounding,
               DType out_dtype = DType::kFloat32) {
  ConvArgs args{};
  ConvShape& shape = args.shape = random_shape(winograd);
  args.samples = 1 + below(3);
  const int64_t in = args.samples * shape.size[0] * shape.size[1] * shape.in_channels;
  // Between the pixels of the output there may be others'.
  args.out_pixel = shape.out_channels + below(2) * 5;
  args.out_row = shape.out_size[1] * args.out_pixel;
  args.out_sample = shape.out_size[0] * args.out_row;
  const int64_t outputs = args.samples * args.out_sample;
  const Elements<T> x(in);
  const Elements<Out> residual(outputs), out(outputs);
  const Elements<float> weight(shape.out_channels * shape.in_channels * shape.kernel[0] *
                               shape.kernel[1]);
  const Elements<Packed> packed(kernels.packed_elements(shape));
  const Elements<float> bias(shape.out_channels);
  kernels.pack(shape, weight.data(), packed.data());
  args.out = out.data();
  args.out_dtype = out_dtype;
  args.x = x.data();
  args.weight = packed.data();
  args.bias = below(2) ? bias.data() : nullptr;
  args.residual = below(2) ? residual.data() : nullptr;
  const Elements<T> memory(kernels.memory_bytes(shape) / sizeof(T));
  const std::vector<Out> before(out.data(), out.data() + outputs);
  const Elements<T> other(kernels.memory_bytes(shape) / sizeof(T));  // as another thread's
  // Nothing is to be read that was not written: these are no numbers, which zeros do not hide.
  std::memset(memory.data(), 0xFF, memory.count * sizeof(T));
  std::memset(other.data(), 0xFF, other.count * sizeof(T));
  const int64_t units = kernels.units(args), middle = below(units + 1);
  kernels.conv2d(args, 0, middle, memory.data());
  kernels.conv2d(args, middle, units, other.data());
  require(packed.is_intact() && out.is_intact() && memory.is_intact() && other.is_intact(),
          "a margin was written");
  const double most = largest(weight);
  for (int check = 0; check < 200; ++check) {
    const int64_t i = below(outputs), pixel = i / args.out_pixel, row = pixel / shape.out_size[1];
    const int64_t channel = i % args.out_pixel;
    if (channel >= shape.out_channels) {
      require(to_float(out.data()[i]) == to_float(before[i]), "a gap was written");
      continue;
    }
    Sum sum = expected<T>(args, weight.data(), row / shape.out_size[0], row % shape.out_size[0],
                          pixel % shape.out_size[1], channel);
    if (args.residual != nullptr) sum.value += to_float(residual.data()[i]);
    const double apart = std::abs(to_float(out.data()[i]) - sum.value);
    // What the weights are rounded to; Winograd's sums are of all that a tile sees, at most
    // about 6.
    const double kept = sizeof(Packed) == sizeof(float) ? 0x1p-20 : winograd ? 0x1p-9 : 0x1p-8;
    const double size = winograd ? 6.0 * 9.0 * shape.in_channels * most : sum.size;
    require(apart <= std::abs(sum.value) * rounding + (size + 8.0) * kept, "a wrong sum");
  }
}

// Of the level in use, of each dtype that has kernels.
void fuzz_level(const char* name, int cases) {
  for (int i = 0; i < cases; ++i) {
    const bool winograd = i % 2 != 0;
    const ConvKernels* f32 = conv_kernels(DType::kFloat32, winograd);
    const ConvKernels* bf16 = conv_kernels(DType::kBFloat16, winograd);
    const ConvKernels* f16 = conv_kernels(DType::kFloat16, winograd);
    if (f32 != nullptr) fuzz_case<float, float>(*f32, winograd, 0x1p-24);
    if (bf16 != nullptr && winograd) {
      fuzz_case<BFloat16, Half>(*bf16, winograd, 0x1p-8);
      fuzz_case<Half, Half, BFloat16>(*f16, winograd, 0x1p-8, DType::kBFloat16);
      fuzz_case<Half, Half>(*f16, winograd, 0x1p-11, DType::kFloat16);
    } else if (bf16 != nullptr) {
      fuzz_case<BFloat16, BFloat16>(*bf16, winograd, 0x1p-8, DType::kBFloat16);
    }
    if (f16 != nullptr && !winograd) {  // by tiles: rounded to bfloat16 first
      fuzz_case<Half, BFloat16, BFloat16>(*f16, winograd, 0x1p-8, DType::kBFloat16);
      fuzz_case<Half, BFloat16, Half>(*f16, winograd, 0x1p-11, DType::kFloat16);
    }
  }
  std::printf("%s: %d cases of each dtype that has kernels agree\n", name, cases);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1000;
  generator.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  each_level(cases, 10, fuzz_level);
}
