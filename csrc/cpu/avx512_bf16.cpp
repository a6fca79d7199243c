// AVX-512 with BF16: convolutions and attention of bfloat16. The products are those of two
// neighbouring bfloat16, or float32 ones with Winograd's algorithm, which needs fewer by more than
// these take longer.
#include "avx512_bf16.h"

#include "attention_loop.h"
#include "avx512.h"
#include "winograd_loop.h"

namespace ddpm_fast {
namespace {

struct PairProducts : Avx512Bf16Sums {
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
};

// The weights lie in half the memory: float16 is eight times as exact as the bfloat16 of the
// result.
struct SmallWeightProducts : Avx512FloatProducts<Avx512Bf16Sums> {
  using Stored = Float16;

  static Weights load_weights(const Stored* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static HalfWeights load_half_weights(const Stored* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
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
