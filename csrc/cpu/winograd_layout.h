// Winograd's algorithm, see winograd_loop.h: its transformations, and how its weights, its
// transformed input and its sums lie in memory. D is as in conv_loop.h.
#pragma once

#include "../numerics.h"
#include "conv_layout.h"

namespace ddpm_fast {
namespace {

constexpr int kTile = 4, kSide = kTile + 2, kPlaces = kSide * kSide;
// Bytes of a strip's transformed input and sums: the more, the fewer times the weights are read.
constexpr int64_t kWinogradBytes = int64_t{1} << 21;
constexpr int64_t kFewestTiles = 12;  // of a strip

// Polynomials are evaluated at 0, kA, -kA, kB, -kB and infinity. Of the points whose products are
// exact, these had the smallest error.
constexpr double kA = 0.625, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;
constexpr double kOfA = 0.5 / (kA2 * (kA2 - kB2)), kOfB = 0.5 / (kB2 * (kB2 - kA2));
constexpr double kG[kSide][3] = {{1 / (kA2 * kB2), 0, 0},        {kOfA, kOfA * kA, kOfA * kA2},
                                 {kOfA, -kOfA * kA, kOfA * kA2}, {kOfB, kOfB * kB, kOfB * kB2},
                                 {kOfB, -kOfB * kB, kOfB * kB2}, {0, 0, 1}};

// d = B^T d
template <class D>
DDPM_FAST_INLINE void transform_input(typename D::F (&d)[kSide]) {
  using F = typename D::F;
  const F even_a = D::fma(d[2], D::set(-kB2), d[4]), odd_a = D::fma(d[1], D::set(-kB2), d[3]);
  const F even_b = D::fma(d[2], D::set(-kA2), d[4]), odd_b = D::fma(d[1], D::set(-kA2), d[3]);
  d[0] = D::fma(d[0], D::set(kA2 * kB2), D::fma(d[2], D::set(-(kA2 + kB2)), d[4]));
  d[5] = D::fma(d[1], D::set(kA2 * kB2), D::fma(d[3], D::set(-(kA2 + kB2)), d[5]));
  d[1] = D::fma(odd_a, D::set(kA), even_a);
  d[2] = D::fma(odd_a, D::set(-kA), even_a);
  d[3] = D::fma(odd_b, D::set(kB), even_b);
  d[4] = D::fma(odd_b, D::set(-kB), even_b);
}

// The first kTile of s = A^T s
template <class D>
DDPM_FAST_INLINE void transform_sums(typename D::F (&s)[kSide]) {
  using F = typename D::F;
  const F even_a = D::add(s[1], s[2]), odd_a = D::sub(s[1], s[2]);
  const F even_b = D::add(s[3], s[4]), odd_b = D::sub(s[3], s[4]);
  s[0] = D::add(s[0], D::add(even_a, even_b));
  s[1] = D::fma(odd_b, D::set(kB), D::mul(odd_a, D::set(kA)));
  s[2] = D::fma(even_b, D::set(kB2), D::mul(even_a, D::set(kA2)));
  s[3] = D::fma(odd_b, D::set(kB * kB2), D::fma(odd_a, D::set(kA * kA2), s[5]));
}

// to = G g G^T, by rows
inline void transform_kernel(const float* g, double* to) {
  for (int i = 0; i < kSide; ++i) {
    double row[3] = {};
    for (int k = 0; k < 9; ++k) row[k % 3] += kG[i][k / 3] * g[k];
    for (int j = 0; j < kSide; ++j) {
      to[i * kSide + j] = row[0] * kG[j][0] + row[1] * kG[j][1] + row[2] * kG[j][2];
    }
  }
}

// How it lies in memory: the weights as (block, place, I, lane), each block after its channels'
// scales, the transformed input and the sums as (place, tile of the strip, channel).
template <class D>
struct WinogradLayout {
  using Stored = typename D::Stored;
  static constexpr int64_t kLine = 64 / sizeof(float);
  static constexpr bool kIsScaled = sizeof(Stored) < sizeof(float);
  const ConvShape& shape;
  ConvBlocks<D> blocks;
  int64_t depth;                     // of a transformed pixel
  int64_t tiles_down, tiles_across;  // of a sample
  int64_t strip;                     // tiles that are transformed together

  explicit WinogradLayout(const ConvShape& s)
      : shape(s),
        blocks(s.out_channels),
        depth((s.in_channels + D::kLanes - 1) / D::kLanes * D::kLanes),
        tiles_down((s.out_size[0] + kTile - 1) / kTile),
        tiles_across((s.out_size[1] + kTile - 1) / kTile) {
    const int64_t fitting =
        kWinogradBytes / (kPlaces * (depth + blocks.width) * int64_t{sizeof(float)});
    strip = fitting < kFewestTiles ? kFewestTiles : fitting;
  }
  int64_t tiles() const { return tiles_down * tiles_across; }
  // From place to place, which must not fall on the same lines of the first-level cache.
  int64_t input_place() const { return strip * depth + kLine; }
  int64_t sums_place() const { return strip * blocks.width + kLine; }
  // The input, the sums, and a pixel of zeros.
  int64_t memory_floats() const { return kPlaces * (input_place() + sums_place()) + depth; }

  // Of a block of the packed weights.
  int64_t scales(int64_t lanes) const { return kIsScaled ? lanes * 4 / sizeof(Stored) : 0; }
  int64_t weight_place(int64_t lanes) const { return shape.in_channels * lanes; }
  int64_t packed_block(int64_t lanes) const {
    return scales(lanes) + kPlaces * weight_place(lanes);
  }
  int64_t packed_before(int64_t block) const { return block * packed_block(blocks.width); }
};

template <class D>
int64_t packed_winograd_elements(const ConvShape& shape) {
  const WinogradLayout<D> layout(shape);
  const int64_t last = layout.blocks.count - 1;
  return layout.packed_before(last) + layout.packed_block(layout.blocks.lanes(last));
}

// The power of two that brings `largest` near to the largest float16; 1 if it is 0 or not finite.
inline float scale_of(double largest) {
  if (!(largest > 0.0 && largest < __builtin_inf())) return 1.0f;
  int exponent;
  __builtin_frexp(largest, &exponent);
  return static_cast<float>(__builtin_ldexp(1.0, exponent < -100 ? -115 : exponent - 15));
}

// weight: (O, I, 3, 3).
template <class D>
void pack_winograd(const ConvShape& shape, const float* weight, typename D::Stored* packed) {
  const WinogradLayout<D> layout(shape);
  const int64_t channels = shape.in_channels;
  for (int64_t block = 0; block < layout.blocks.count; ++block) {
    const int64_t lanes = layout.blocks.lanes(block), place = layout.weight_place(lanes);
    typename D::Stored *scales = packed + layout.packed_before(block),
                       *to = scales + layout.scales(lanes);
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const int64_t o = block * layout.blocks.width + lane;
      const bool exists = o < shape.out_channels;
      const float* g = weight + (exists ? o * channels * 9 : 0);
      double transformed[kPlaces] = {};
      double inverse = 1.0;  // of the scale, a power of two
      if constexpr (WinogradLayout<D>::kIsScaled) {
        double largest = 0.0;
        for (int64_t i = 0; exists && i < channels; ++i) {
          transform_kernel(g + i * 9, transformed);
          for (double x : transformed) largest = x > largest ? x : -x > largest ? -x : largest;
        }
        const float scale = scale_of(largest);
        inverse = 1.0 / scale;
        __builtin_memcpy(scales + layout.scales(lane), &scale, sizeof scale);
      }
      for (int64_t i = 0; i < channels; ++i) {
        if (exists) transform_kernel(g + i * 9, transformed);
        for (int p = 0; p < kPlaces; ++p) {
          from_float(static_cast<float>(transformed[p] * inverse),
                     to + p * place + i * lanes + lane);
        }
      }
    }
  }
}

}  // namespace
}  // namespace ddpm_fast
