// AVX-512: sixteen sums of a convolution at a time, and float32 products for them.
#pragma once

#include <immintrin.h>

#include "conversions.h"

namespace ddpm_fast {
namespace {

struct Avx512Sums {
  using F = __m512;
  using Half = __m256;
  static constexpr int kLanes = 16, kSums = 24, kMostVectors = 4;
  static constexpr bool kHasHalves = true;

  static F zero() { return _mm512_setzero_ps(); }
  static Half half_zero() { return _mm256_setzero_ps(); }
  static F widened(Half x) { return _mm512_zextps256_ps512(x); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }

  // Of the first `count` lanes; the others are zero, or stay as they were.
  static __mmask16 lanes(int64_t count) {
    return count >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
  }
  static F load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), p); }
  static F load(const BFloat16* p, int64_t count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(lanes(count), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static void store(float* p, F x, int64_t count) { _mm512_mask_storeu_ps(p, lanes(count), x); }
};

template <class Sums>
struct Avx512FloatProducts : Sums {
  using typename Sums::F;
  using typename Sums::Half;
  using Element = float;
  using Stored = float;
  using Weights = __m512;
  using HalfWeights = __m256;
  static constexpr int kDepth = 1;

  static Weights load_weights(const float* p) { return _mm512_loadu_ps(p); }
  static HalfWeights load_half_weights(const float* p) { return _mm256_loadu_ps(p); }
  static F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static F dot(F sum, Weights weights, F shared) { return _mm512_fmadd_ps(weights, shared, sum); }
  static Half half_dot(Half sum, HalfWeights weights, F shared) {
    return _mm256_fmadd_ps(weights, _mm512_castps512_ps256(shared), sum);
  }
};

using Avx512Products = Avx512FloatProducts<Avx512Sums>;

}  // namespace
}  // namespace ddpm_fast
