// GroupNorm of AVX-512 with BF16, whose instruction rounds two vectors of bfloat16 at once.
#include "avx512.h"
#include "norm_loop.h"

namespace ddpm_fast {
namespace {

// Subnormal numbers become zero.
struct Avx512Bf16 : Avx512 {
  using Avx512::store;
  template <int stride>
  static void store(BFloat16* p, F x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
  }
  // Two neighbouring vectors.
  static void store_pair(BFloat16* p, F a, F b) {
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
  }
};

}  // namespace

const GroupNormKernel kAvx512Bf16GroupNorm = group_norm<Avx512Bf16>;

}  // namespace ddpm_fast
