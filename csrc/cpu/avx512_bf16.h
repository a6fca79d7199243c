// AVX-512 with BF16: sums that are rounded to 16 bits.
#pragma once

#include "avx512_products.h"

namespace ddpm_fast {
namespace {

using Float16 = Half;  // a sum's Half is half a vector

struct Avx512Bf16Sums : Avx512Sums {
  using Avx512Sums::load;
  using Avx512Sums::store;
  static F load(const Float16* p, int64_t count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes(count), p));
  }
  static void store(Float16* p, F x, int64_t count) {
    _mm256_mask_storeu_epi16(p, lanes(count), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
  }
  static void store(BFloat16* p, F x, int64_t count) {
    _mm256_mask_storeu_epi16(p, lanes(count), (__m256i)_mm512_cvtneps_pbh(x));
  }
};

}  // namespace
}  // namespace ddpm_fast
