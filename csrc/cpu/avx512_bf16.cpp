// AVX-512 with BF16: the products of two neighbouring bfloat16, sixteen sums at a time.
#include "attention_loop.h"
#include "avx512.h"
#include "conv_loop.h"

namespace ddpm_fast {
namespace {

struct Avx512Bf16 {
  using Element = BFloat16;
  using F = __m512;
  using Half = __m256;
  using Weights = __m512bh;
  using HalfWeights = __m256bh;
  static constexpr int kLanes = 16, kDepth = 2, kSums = 24, kMostVectors = 4;

  static F zero() { return _mm512_setzero_ps(); }
  static Half half_zero() { return _mm256_setzero_ps(); }
  static Weights load_weights(const Element* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static HalfWeights load_half_weights(const Element* p) {
    return (__m256bh)_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static __m512i broadcast(const Element* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static F dot(F sum, Weights weights, __m512i shared) {
    return _mm512_dpbf16_ps(sum, weights, (__m512bh)shared);
  }
  static Half half_dot(Half sum, HalfWeights weights, __m512i shared) {
    return _mm256_dpbf16_ps(sum, weights, (__m256bh)_mm512_castsi512_si256(shared));
  }
  static F widened(Half x) { return _mm512_zextps256_ps512(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }

  // Of the first `count` lanes; the others are zero, or stay as they were.
  static __mmask16 lanes(int64_t count) {
    return count >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
  }
  static F load(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), p); }
  static F load(const Element* p, int64_t count) {
    const __m256i bits = _mm256_maskz_loadu_epi16(lanes(count), p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store(float* p, F x, int64_t count) { _mm512_mask_storeu_ps(p, lanes(count), x); }
  static void store(Element* p, F x, int64_t count) {
    _mm256_mask_storeu_epi16(p, lanes(count), (__m256i)_mm512_cvtneps_pbh(x));
  }
};

}  // namespace

const ConvKernels kAvx512Bf16Conv = conv_kernels<Avx512Bf16>("avx512_bf16");
const AttentionKernels kAvx512Bf16Attention = attention_kernels<Avx512Bf16, Avx512>();

}  // namespace ddpm_fast
