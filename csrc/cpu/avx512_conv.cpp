// AVX-512: convolutions of float32, sixteen sums at a time.
#include "attention_loop.h"
#include "avx512.h"
#include "conv_loop.h"

namespace ddpm_fast {
namespace {

struct Avx512Products {
  using Element = float;
  using F = __m512;
  using Half = __m256;
  using Weights = __m512;
  using HalfWeights = __m256;
  static constexpr int kLanes = 16, kDepth = 1, kSums = 24, kMostVectors = 4;

  static F zero() { return _mm512_setzero_ps(); }
  static Half half_zero() { return _mm256_setzero_ps(); }
  static Weights load_weights(const float* p) { return _mm512_loadu_ps(p); }
  static HalfWeights load_half_weights(const float* p) { return _mm256_loadu_ps(p); }
  static F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static F dot(F sum, Weights weights, F shared) { return _mm512_fmadd_ps(weights, shared, sum); }
  static Half half_dot(Half sum, HalfWeights weights, F shared) {
    return _mm256_fmadd_ps(weights, _mm512_castps512_ps256(shared), sum);
  }
  static F widened(Half x) { return _mm512_zextps256_ps512(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }

  // Of the first `count` lanes; the others are zero, or stay as they were.
  static __mmask16 lanes(int64_t count) {
    return count >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
  }
  static F load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), p); }
  static void store(float* p, F x, int64_t count) { _mm512_mask_storeu_ps(p, lanes(count), x); }
};

}  // namespace

const ConvKernels kAvx512Conv = conv_kernels<Avx512Products>("avx512");
const AttentionKernels kAvx512Attention = attention_kernels<Avx512Products, Avx512>();

}  // namespace ddpm_fast
