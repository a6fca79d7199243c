// AVX-512 with BF16: convolutions and attention of bfloat16. The products are those of two
// neighbouring bfloat16, or float32 ones with Winograd's algorithm, which needs fewer by more than
// these take longer.
#include "attention_loop.h"
#include "avx512.h"
#include "avx512_products.h"
#include "winograd_loop.h"

namespace ddpm_fast {
namespace {

using Float16 = Half;

DDPM_FAST_INLINE void store_rounded(BFloat16* p, __m512 x, __mmask16 lanes) {
  _mm256_mask_storeu_epi16(p, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

struct PairProducts : Avx512Sums {
  using Element = BFloat16;
  using Stored = BFloat16;
  using Weights = __m512bh;
  using HalfWeights = __m256bh;
  static constexpr int kDepth = 2;

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
  using Avx512Sums::store;
  static void store(Element* p, F x, int64_t count) { store_rounded(p, x, lanes(count)); }
};

// The weights lie in half the memory: float16 is eight times as exact as the bfloat16 of the
// result.
struct SmallWeightProducts : Avx512Products {
  using Stored = Float16;
  using Avx512Sums::load;
  using Avx512Sums::store;

  static Weights load_weights(const Stored* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static HalfWeights load_half_weights(const Stored* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static F load(const Float16* p, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(count), p));
  }
  static void store(BFloat16* p, F x, int64_t count) { store_rounded(p, x, lanes(count)); }
  static void store(Float16* p, F x, int64_t count) {
    _mm256_mask_storeu_epi16(p, lanes(count), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
};

}  // namespace

const ConvKernels kAvx512Bf16Conv = conv_kernels<PairProducts>("avx512_bf16");
const ConvKernels kAvx512Bf16Winograd =
    winograd_kernels<SmallWeightProducts, BFloat16>("avx512_bf16");
const ConvKernels kAvx512Fp16Winograd =
    winograd_kernels<SmallWeightProducts, Float16, BFloat16, Float16>("avx512_bf16");
const AttentionKernels kAvx512Bf16Attention = attention_kernels<PairProducts, Avx512>();

}  // namespace ddpm_fast
