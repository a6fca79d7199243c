// Noise contract, version 1 (ddpm_fast/noise.py is the definition), and the exponential.
//
// Written once over a small type of vector operations V, so that every instruction set and CUDA
// perform the same IEEE operations in the same order. V::F holds V::kLanes floats, V::U as many
// 32-bit words, V::W half of them (V::kParts to a U) as 64-bit integers, for Philox' products.
#pragma once

#include <stdint.h>

#include "kernels.h"

#ifdef __CUDACC__
#define DDPM_FAST_INLINE __device__ __forceinline__
#define DDPM_FAST_UNROLL _Pragma("unroll")
#else
#define DDPM_FAST_INLINE inline __attribute__((always_inline))
#define DDPM_FAST_UNROLL _Pragma("GCC unroll 16")
#endif

namespace ddpm_fast {
namespace {

// The key and the three words of the counter that a sample's step has in common.
struct NoiseKey {
  uint32_t k0, k1, c1, c2, c3;

  DDPM_FAST_INLINE uint32_t round_key(int round, int word) const {
    return word ? k1 + 0xBB67AE85u * round : k0 + 0x9E3779B9u * round;
  }
};

DDPM_FAST_INLINE NoiseKey noise_key(int64_t seed, int64_t sample_index, int32_t step,
                                    int32_t stream) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32),
          static_cast<uint32_t>(step) | static_cast<uint32_t>(stream) << 20,
          static_cast<uint32_t>(sample_index),
          static_cast<uint32_t>(static_cast<uint64_t>(sample_index) >> 32)};
}

// Upper halves of the 64-bit lanes may hold anything: the products read the lower ones only. The
// parts advance together, because each waits for its own products.
template <class V, class Key>
DDPM_FAST_INLINE void philox(typename V::W (*counters)[4], const Key& key) {
  DDPM_FAST_UNROLL
  for (int round = 0; round < 10; ++round) {
    DDPM_FAST_UNROLL
    for (int part = 0; part < V::kParts; ++part) {
      typename V::W* c = counters[part];
      typename V::W p0 = V::multiply(c[0], 0xD2511F53u), p1 = V::multiply(c[2], 0xCD9E8D57u);
      c[0] = V::xor3(V::high(p1), c[1], key.round_key(round, 0));
      c[1] = p1;
      c[2] = V::xor3(V::high(p0), c[3], key.round_key(round, 1));
      c[3] = p0;
    }
  }
}

template <class V, int n>
DDPM_FAST_INLINE typename V::F horner(const float (&coefficients)[n], typename V::F x) {
  typename V::F value = V::set(coefficients[n - 1]);
  DDPM_FAST_UNROLL
  for (int i = n - 2; i >= 0; --i) value = V::fma(value, x, V::set(coefficients[i]));
  return value;
}

template <class V>
DDPM_FAST_INLINE typename V::F radius(typename V::U word) {
  using F = typename V::F;
  constexpr float kLog[] = {-0x1.555506p-1f, 0x1.fffef4p-2f, -0x1.99d05ep-2f, 0x1.559d36p-2f,
                            -0x1.1ed424p-2f, 0x1.f32078p-3f, -0x1.1e73a0p-2f, 0x1.07e5f4p-2f};
  F u = V::fma(V::from_unsigned(word), V::set(0x1p-32f), V::set(0x1p-33f));
  auto bits = V::sub(V::bits(u), V::set_u(0x3F2AAAABu));
  F exponent = V::from_signed(V::template shift_right_signed<23>(bits));
  auto mantissa = V::add(V::bit_and(bits, V::set_u(0x7FFFFFu)), V::set_u(0x3F2AAAABu));
  F f = V::sub(V::from_bits(mantissa), V::set(1.0f));
  F y = V::fma(horner<V>(kLog, f), f, V::set(1.0f));
  F t = V::fma(V::mul(f, f), y, V::mul(V::set(-2.0f), f));
  return V::sqrt(V::fma(exponent, V::set(-0x1.62e430p0f), t));
}

template <class V>
DDPM_FAST_INLINE void cos_sin(typename V::U word, typename V::F& cos, typename V::F& sin) {
  using F = typename V::F;
  constexpr float kSin[] = {-0x1.4abbbep-1f, 0x1.465facp-4f, -0x1.2db5a6p-8f};
  constexpr float kCos[] = {-0x1.3bd3ccp0f, 0x1.03c1b0p-2f, -0x1.55b2b6p-6f, 0x1.d4f7ecp-11f};
  auto a = V::add(word, V::set_u(0x20000000u));
  auto remainder = V::sub(V::bit_and(a, V::set_u(0x3FFFFFFFu)), V::set_u(0x20000000u));
  F x = V::mul(V::from_signed(remainder), V::set(0x1p-30f));
  F z = V::mul(x, x);
  F tail = V::mul(x, V::fma(horner<V>(kSin, z), z, V::set(-0x1.777a5cp-25f)));
  F s = V::fma(x, V::set(0x1.921fb6p0f), tail);
  F c = V::fma(horner<V>(kCos, z), z, V::set(1.0f));
  auto sign = V::set_u(0x80000000u);
  F first = V::template select_bit<30>(a, s, c), second = V::template select_bit<30>(a, c, s);
  auto cos_sign = V::bit_and(V::add(a, V::set_u(0x40000000u)), sign);
  cos = V::from_bits(V::bit_xor(V::bits(first), cos_sign));
  sin = V::from_bits(V::bit_xor(V::bits(second), V::bit_and(a, sign)));
}

// The 4 * kLanes normals of the counters from `counter` on, in the order of the elements.
// `Key`: NoiseKey, or what has its members.
template <class V, class Key>
DDPM_FAST_INLINE void normals(const Key& key, uint32_t counter, typename V::F z[4]) {
  typename V::W words[V::kParts][4];
  DDPM_FAST_UNROLL
  for (int part = 0; part < V::kParts; ++part) {
    words[part][0] = V::counters(counter, part);
    words[part][1] = V::set_w(key.c1);
    words[part][2] = V::set_w(key.c2);
    words[part][3] = V::set_w(key.c3);
  }
  philox<V>(words, key);
  DDPM_FAST_UNROLL
  for (int pair = 0; pair < 4; pair += 2) {
    typename V::F r = radius<V>(V::join(words, pair)), cos, sin;
    cos_sin<V>(V::join(words, pair + 1), cos, sin);
    z[pair] = V::mul(r, cos);
    z[pair + 1] = V::mul(r, sin);
  }
  V::interleave(z);
}

template <class V>
DDPM_FAST_INLINE typename V::F exponential(typename V::F x) {
  using F = typename V::F;
  constexpr float kExp[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558acp-5f, 0x1.12397ap-7f,
                            0x1.6a5166p-10f};
  x = V::min(V::set(89.0f), V::max(V::set(-104.0f), x));
  F k = V::sub(V::fma(x, V::set(0x1.715476p0f), V::set(0x1.8p23f)), V::set(0x1.8p23f));
  F r = V::fma(k, V::set(0x1.05c610p-29f), V::fma(k, V::set(-0x1.62e430p-1f), x));
  F y = V::add(V::fma(horner<V>(kExp, r), V::mul(r, r), r), V::set(1.0f));
  auto n = V::to_signed(k);
  auto half = V::template shift_right_signed<1>(n);
  auto bias = V::set_u(127);
  F scale0 = V::from_bits(V::template shift_left<23>(V::add(half, bias)));
  F scale1 = V::from_bits(V::template shift_left<23>(V::add(V::sub(n, half), bias)));
  return V::mul(V::mul(y, scale0), scale1);
}

}  // namespace
}  // namespace ddpm_fast
