// The words that the authors of Philox4x32-10 publish, against csrc/numerics.h and each CPU level.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numbers>

#include "../csrc/numerics.h"

namespace ddpm_fast {
namespace {

// Random123's kat_vectors.
struct KnownWords {
  uint32_t counter[4], key[2], words[4];
};
const KnownWords kKnownWords[] = {
    {{0, 0, 0, 0}, {0, 0}, {0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8}},
    {{0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF},
     {0xFFFFFFFF, 0xFFFFFFFF},
     {0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD}},
    {{0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344},
     {0xA4093822, 0x299F31D0},
     {0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1}}};

// One lane of plain integers: as much of a V (see ../csrc/numerics.h) as Philox needs.
struct Lane {
  using W = uint64_t;
  static constexpr int kParts = 1;

  static W multiply(W a, uint32_t b) { return (a & 0xFFFFFFFFu) * b; }
  static W high(W a) { return a >> 32; }
  static W xor3(W a, W b, W c) { return a ^ b ^ c; }
};

void known_words() {
  for (const KnownWords& known : kKnownWords) {
    uint64_t words[1][4];
    for (int i = 0; i < 4; ++i) words[0][i] = known.counter[i];
    philox<Lane>(words, NoiseKey{known.key[0], known.key[1], 0, 0, 0});
    for (int i = 0; i < 4; ++i) {
      const auto word = static_cast<uint32_t>(words[0][i]);
      if (word == known.words[i]) continue;
      std::printf("word %d is %08x, but %08x is published\n", i, word, known.words[i]);
      std::exit(1);
    }
  }
}

int64_t joined(uint32_t low, uint32_t high) {
  return static_cast<int64_t>(uint64_t{high} << 32 | low);
}

// Where the noise has those counters, each level has the normals of those words, to 4 ulp of
// Box-Muller in double.
void known_normals(float* out) {
  const char* names[kCpuLevels];
  const int levels = cpu_levels(names, true);
  for (const KnownWords& known : kKnownWords) {
    const int64_t seed = joined(known.key[0], known.key[1]);
    const int64_t sample_index = joined(known.counter[2], known.counter[3]);
    const int64_t first = int64_t{4} * known.counter[0], chunk = first / kChunk;
    const auto step = static_cast<int32_t>(known.counter[1] & 0xFFFFF);
    const auto stream = static_cast<int32_t>(known.counter[1] >> 20);
    for (int level = 0; level < levels; ++level) {
      set_cpu_level(names[level]);
      const RandnArgs args{out, &seed, &sample_index, 1, kMaxElements, step, stream};
      cpu_kernels().randn(args, chunk, chunk + 1);
      for (int i = 0; i < 4; ++i) {
        const float u = std::fma(static_cast<float>(known.words[i & 2]), 0x1p-32f, 0x1p-33f);
        const double radius = std::sqrt(-2 * std::log(static_cast<double>(u)));
        const double angle = 2 * std::numbers::pi * 0x1p-32 * known.words[i | 1];
        const double exact = radius * (i & 1 ? std::sin(angle) : std::cos(angle));
        const auto near = static_cast<float>(std::fabs(exact));
        const double ulp = std::nextafter(near, INFINITY) - near;
        if (std::fabs(out[first + i] - exact) <= 4 * ulp) continue;
        std::printf("%s: normal %d of the published words is %.9g, but %.9g is wanted\n",
                    names[level], i, out[first + i], exact);
        std::exit(1);
      }
    }
  }
}

}  // namespace
}  // namespace ddpm_fast
