// Fuzzes the CPU kernel of attention over shapes, strides and ranges, and holds it near sums in
// float64. Built with kernels_fuzz.cpp, which says how.
//   build-fuzz/attention_fuzz [cases] [seed]
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

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("attention: %s\n", what);
  std::exit(1);
}

template <class T>
double element(const AttentionInput& input, int64_t sample, int64_t position, int64_t channel) {
  const int64_t at = sample * input.sample + position * input.position + channel;
  return to_float(static_cast<const T*>(input.first)[at]);
}

// The result at a channel of all heads' and position i; `size`: of the absolute terms.
template <class T>
double expected(const AttentionArgs& args, int64_t n, int64_t channel, int64_t i, double* size) {
  const int64_t first = channel / args.channels * args.channels;
  std::vector<double> scores(args.positions);
  double most = -INFINITY, sum = 0.0, value = 0.0;
  for (int64_t j = 0; j < args.positions; ++j) {
    for (int64_t c = first; c < first + args.channels; ++c) {
      scores[j] += element<T>(args.query, n, i, c) * element<T>(args.key, n, j, c);
    }
    most = std::fmax(most, scores[j]);
  }
  *size = 0.0;
  for (int64_t j = 0; j < args.positions; ++j) {
    const double weight = std::exp(scores[j] - most), v = element<T>(args.value, n, j, channel);
    sum += weight;
    value += weight * v;
    *size += weight * std::abs(v);
  }
  *size /= sum;
  return value / sum;
}

// rounding: to a T.
template <class T>
void fuzz_case(const AttentionKernels& kernels, double rounding) {
  static const int64_t kChannels[] = {1, 2, 3, 7, 8, 15, 16, 17, 24, 31, 32, 40, 48, 64, 65};
  static const int64_t kPositions[] = {1, 2, 3, 7, 16, 20, 33, 49, 50, 64, 97, 150};
  AttentionArgs args{};
  args.samples = 1 + below(3);
  args.heads = 1 + below(3);
  args.channels = kChannels[below(15)];
  args.positions = kPositions[below(12)];
  const int64_t all = args.heads * args.channels, parts = below(2) ? 3 : 1;
  const int64_t in = args.samples * args.positions * all;
  const Elements<T> x(in * parts), other(in), out(in);
  if (below(4) == 0) {  // scores whose exponentials are not finite
    for (int64_t i = 0; i < in; ++i)
      from_float(10.0f * to_float(other.data()[i]), other.data() + i);
  }
  const AttentionInput input{x.data(), args.positions * all * parts, all * parts};
  args.query = args.key = args.value = input;
  if (parts == 3) {
    args.key.first = x.data() + all;
    args.value.first = x.data() + 2 * all;
  } else {
    args.query.first = other.data();
  }
  args.out = out.data();
  const Elements<T> memory(kernels.memory_bytes(args) / sizeof(T));
  const Elements<T> others_memory(memory.count);  // as another thread's
  // Nothing is to be read that was not written: these are no numbers, which zeros do not hide.
  std::memset(memory.data(), 0xFF, memory.count * sizeof(T));
  std::memset(others_memory.data(), 0xFF, memory.count * sizeof(T));
  const int64_t units = args.samples * args.heads * args.positions, middle = below(units + 1);
  kernels.attention(args, 0, middle, memory.data());
  kernels.attention(args, middle, units, others_memory.data());
  require(out.is_intact() && memory.is_intact() && others_memory.is_intact(),
          "a margin was written");
  const std::vector<T> whole(out.data(), out.data() + in);
  for (int64_t i = 0, next; i < units; i = next) {
    next = i + 1 + below(70);
    if (next > units) next = units;
    kernels.attention(args, i, next, memory.data());
  }
  require(std::memcmp(whole.data(), out.data(), in * sizeof(T)) == 0, "a cut changed a bit");
  for (int check = 0; check < 50; ++check) {
    const int64_t at = below(in), pixel = at / all;
    double size;
    const double want =
        expected<T>(args, pixel / args.positions, at % all, pixel % args.positions, &size);
    const double apart = std::abs(to_float(out.data()[at]) - want);
    require(apart <= rounding * (std::abs(want) + size) + size * 0x1p-12, "a wrong sum");
  }
}

// Of the level in use, of each dtype that has kernels.
void fuzz_level(const char* name, int cases) {
  const AttentionKernels* f32 = attention_kernels(DType::kFloat32);
  const AttentionKernels* bf16 = attention_kernels(DType::kBFloat16);
  for (int i = 0; i < cases; ++i) {
    if (f32 != nullptr) fuzz_case<float>(*f32, 0x1p-24);
    if (bf16 != nullptr) fuzz_case<BFloat16>(*bf16, 0x1p-8);
  }
  std::printf("%s: %d cases of each dtype that has kernels agree\n", name, cases);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1000;
  generator.seed(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  each_level(cases, 3, fuzz_level);
}
