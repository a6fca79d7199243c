// AVX2 and FMA3: convolutions of float32, eight sums at a time.
#include <immintrin.h>

#include "winograd_loop.h"

namespace ddpm_fast {
namespace {

struct Avx2Products {
  using Element = float;
  using Stored = float;
  using F = __m256;
  using Half = __m128;
  using Weights = __m256;
  using HalfWeights = __m128;
  static constexpr int kLanes = 8, kDepth = 1, kSums = 12, kMostVectors = 2;
  static constexpr bool kHasHalves = true;

  static F zero() { return _mm256_setzero_ps(); }
  static Half half_zero() { return _mm_setzero_ps(); }
  static Weights load_weights(const float* p) { return _mm256_loadu_ps(p); }
  static HalfWeights load_half_weights(const float* p) { return _mm_loadu_ps(p); }
  static F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static F dot(F sum, Weights weights, F shared) { return _mm256_fmadd_ps(weights, shared, sum); }
  static Half half_dot(Half sum, HalfWeights weights, F shared) {
    return _mm_fmadd_ps(weights, _mm256_castps256_ps128(shared), sum);
  }
  static F widened(Half x) { return _mm256_zextps128_ps256(x); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }

  // Of the first `count` lanes; the others are zero, or stay as they were.
  static __m256i lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F load(const float* p, int64_t count) {
    return count >= kLanes ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, lanes(count));
  }
  static void store(float* p, F x, int64_t count) {
    if (count >= kLanes) return store(p, x);
    _mm256_maskstore_ps(p, lanes(count), x);  // slower on some processors
  }
};

}  // namespace

const ConvKernels kAvx2Conv = conv_kernels<Avx2Products>("avx2");
const ConvKernels kAvx2Winograd = winograd_kernels<Avx2Products, float>("avx2");

}  // namespace ddpm_fast
