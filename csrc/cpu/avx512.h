// AVX-512 F, BW, DQ and VL: sixteen lanes.
#pragma once

#include <immintrin.h>

#include "../numerics.h"
#include "conversions.h"

namespace ddpm_fast {
namespace {

// Sixteen elements, `stride` apart, as they lie in the 16 * stride places from the first one's on:
// of each place, the element that goes there, and where one does.
template <int stride>
struct Spread {
  alignas(64) int32_t element[4][16];
  alignas(64) int16_t element16[2][32];
  __mmask16 taken[4];
  __mmask32 taken16[2];

  constexpr Spread() : element{}, element16{}, taken{}, taken16{} {
    for (int i = 0; i < 16 * stride; ++i) {
      const uint32_t here = i % stride == 0;
      element[i / 16][i % 16] = i / stride;
      element16[i / 32][i % 32] = static_cast<int16_t>(i / stride);
      taken[i / 16] = static_cast<__mmask16>(taken[i / 16] | here << i % 16);
      taken16[i / 32] |= here << i % 32;
    }
  }
};
template <int stride>
constexpr Spread<stride> kSpread;

// The first n of a vector's lanes.
constexpr uint32_t first_lanes(int n) {
  return n <= 0 ? 0u : n >= 32 ? ~0u : (uint32_t{1} << n) - 1;
}

struct Avx512 {
  using F = __m512;
  struct U {
    __m512i v;
  };
  using W = __m512i;
  static constexpr int kLanes = 16, kParts = 2, kMaxStride = 4;
  static constexpr bool kPastCaches = true, kHasScale = true;

  static F set(float x) { return _mm512_set1_ps(x); }
  static U set_u(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  static W set_w(uint32_t x) { return _mm512_set1_epi64(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  // p: a multiple of a vector. fence: what was stored so comes before what follows.
  static void store_past_caches(float* p, F x) { _mm512_stream_ps(p, x); }
  static void fence() { _mm_sfence(); }

  // kLanes elements of any type, `stride` apart; see conversions.h. Nothing between the elements
  // is written, and nothing after the last one read.
  static F widen(__m256i x, BFloat16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
  }
  static F widen(__m256i x, Half) { return _mm512_cvtph_ps(x); }
  static __m256i narrow(F x, BFloat16) {
    const __m512i bits = _mm512_castps_si512(x), half = _mm512_srli_epi32(bits, 16);
    const __m512i up =
        _mm512_add_epi32(_mm512_and_si512(half, _mm512_set1_epi32(1)), _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, up), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_or_epi32(rounded, nan, half, _mm512_set1_epi32(0x40)));
  }
  static __m256i narrow(F x, Half) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }
  static __m512i lanes_times(int stride) {
    return _mm512_mullo_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm512_set1_epi32(stride));
  }

  template <int stride>
  static F load(const float* p) {
    if constexpr (stride == 1) return load(p);
    constexpr int extent = 15 * stride + 1;
    const __m512i from = lanes_times(stride);
    auto part = [&](int i) {
      return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(extent - 16 * i)),
                                   p + 16 * i);
    };
    const F low = _mm512_permutex2var_ps(part(0), from, part(1));
    if constexpr (stride == 2) return low;
    const F high = _mm512_permutex2var_ps(part(2), from, part(3));
    return _mm512_mask_blend_ps(_mm512_test_epi32_mask(from, _mm512_set1_epi32(32)), low, high);
  }
  template <int stride, class T>
  static F load(const T* p) {
    if constexpr (stride == 1) {
      return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
    }
    constexpr int extent = 15 * stride + 1;
    const __m512i from = _mm512_castsi256_si512(_mm512_cvtepi32_epi16(lanes_times(stride)));
    const __m512i low = _mm512_maskz_loadu_epi16(first_lanes(extent), p);
    const __m512i high = _mm512_maskz_loadu_epi16(first_lanes(extent - 32), p + 32);
    return widen(_mm512_castsi512_si256(_mm512_permutex2var_epi16(low, from, high)), T{});
  }
  template <int stride>
  static void store(float* p, F x) {
    if constexpr (stride == 1) return store(p, x);
    DDPM_FAST_UNROLL
    for (int i = 0; i < stride; ++i) {
      const F spread = _mm512_permutexvar_ps(_mm512_load_si512(kSpread<stride>.element[i]), x);
      _mm512_mask_storeu_ps(p + 16 * i, kSpread<stride>.taken[i], spread);
    }
  }
  template <int stride, class T>
  static void store(T* p, F x) {
    const __m256i words = narrow(x, T{});
    if constexpr (stride == 1) {
      return _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), words);
    }
    DDPM_FAST_UNROLL
    for (int i = 0; 2 * i < stride; ++i) {
      const __m512i spread = _mm512_permutexvar_epi16(
          _mm512_load_si512(kSpread<stride>.element16[i]), _mm512_castsi256_si512(words));
      _mm512_mask_storeu_epi16(p + 32 * i, kSpread<stride>.taken16[i], spread);
    }
  }

  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sqrt(F x) { return _mm512_sqrt_ps(x); }
  static F reciprocal(F x) { return _mm512_rcp14_ps(x); }  // within 2^-14
  // t - floor(t), and x * 2^floor(t).
  static F fraction(F t) { return _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF); }
  static F scale(F x, F t) { return _mm512_scalef_ps(x, t); }
  static F poison(F a, F x) { return fma(x, set(0.0f), a); }  // NaN where x is not finite
  static F max(F a, F b) { return _mm512_max_ps(a, b); }      // b where either is NaN
  static float largest(F x) { return _mm512_reduce_max_ps(x); }
  static float total(F x) { return _mm512_reduce_add_ps(x); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }

  static U bits(F x) { return {_mm512_castps_si512(x)}; }
  static F from_bits(U u) { return _mm512_castsi512_ps(u.v); }
  static F from_unsigned(U u) { return _mm512_cvtepu32_ps(u.v); }
  static F from_signed(U u) { return _mm512_cvtepi32_ps(u.v); }
  static U to_signed(F x) { return {_mm512_cvttps_epi32(x)}; }
  static U add(U a, U b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static U sub(U a, U b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  static U bit_and(U a, U b) { return {_mm512_and_si512(a.v, b.v)}; }
  static U bit_xor(U a, U b) { return {_mm512_xor_si512(a.v, b.v)}; }
  template <int n>
  static U shift_left(U a) {
    return {_mm512_slli_epi32(a.v, n)};
  }
  template <int n>
  static U shift_right_signed(U a) {
    return {_mm512_srai_epi32(a.v, n)};
  }
  template <int bit>
  static F select_bit(U a, F if_set, F if_clear) {
    __mmask16 mask = _mm512_test_epi32_mask(a.v, set_u(1u << bit).v);
    return _mm512_mask_blend_ps(mask, if_clear, if_set);
  }

  static W multiply(W a, uint32_t b) { return _mm512_mul_epu32(a, set_w(b)); }
  static W high(W a) { return _mm512_srli_epi64(a, 32); }
  static W xor3(W a, W b, uint64_t c) {
    return _mm512_ternarylogic_epi64(a, b, _mm512_set1_epi64(static_cast<int64_t>(c)), 0x96);
  }
  // Lane 4 j + m takes counter 4 m + j, so that `interleave` need not cross 128-bit lanes.
  static W counters(uint32_t first, int part) {
    W offsets = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    return _mm512_add_epi64(_mm512_set1_epi64(int64_t{first} + 4 * part), offsets);
  }
  static U join(W (*words)[4], int i) {  // part 0 has the even lanes, part 1 the odd ones
    return {_mm512_mask_shuffle_epi32(words[0][i], 0xAAAA, words[1][i], _MM_PERM_CCAA)};
  }
  static __m512d pairs(F x) { return _mm512_castps_pd(x); }
  static void interleave(F* z) {
    F low01 = _mm512_unpacklo_ps(z[0], z[1]), high01 = _mm512_unpackhi_ps(z[0], z[1]);
    F low23 = _mm512_unpacklo_ps(z[2], z[3]), high23 = _mm512_unpackhi_ps(z[2], z[3]);
    z[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(low01), pairs(low23)));
    z[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(low01), pairs(low23)));
    z[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pairs(high01), pairs(high23)));
    z[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pairs(high01), pairs(high23)));
  }
  // Lane i of x[j] becomes lane j of x[i]: in each 128 bits, then these.
  static void transpose(F (&x)[16]) {
    DDPM_FAST_UNROLL
    for (int i = 0; i < 16; i += 4) interleave(x + i);
    DDPM_FAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const F even01 = _mm512_shuffle_f32x4(x[i], x[4 + i], 0x88);
      const F odd01 = _mm512_shuffle_f32x4(x[i], x[4 + i], 0xDD);
      const F even23 = _mm512_shuffle_f32x4(x[8 + i], x[12 + i], 0x88);
      const F odd23 = _mm512_shuffle_f32x4(x[8 + i], x[12 + i], 0xDD);
      x[i] = _mm512_shuffle_f32x4(even01, even23, 0x88);
      x[4 + i] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
      x[8 + i] = _mm512_shuffle_f32x4(even01, even23, 0xDD);
      x[12 + i] = _mm512_shuffle_f32x4(odd01, odd23, 0xDD);
    }
  }

  // The first `count` lanes.
  static __mmask16 lanes(int64_t count) {
    return count >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
  }
  // Words of one float32 or two bfloat16, see attention_loop.h: of `count` neighbouring elements,
  // or of as many columns of two rows, `stride` apart, if there are as many; and zeros.
  static F words(const float* p, int64_t count) { return _mm512_maskz_loadu_ps(lanes(count), p); }
  static F words(const BFloat16* p, int64_t count) {
    const __mmask32 taken = count >= 2 * kLanes ? ~0u : (1u << count) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(taken, p));
  }
  static F stacked_words(const float* p, int64_t, int64_t, int64_t count) {
    return words(p, count);
  }
  static F stacked_words(const BFloat16* p, int64_t stride, int64_t rows, int64_t count) {
    const __m256i low = _mm256_maskz_loadu_epi16(lanes(count), p);
    const __m256i high = _mm256_maskz_loadu_epi16(rows > 1 ? lanes(count) : 0, p + stride);
    return _mm512_castsi512_ps(_mm512_or_si512(_mm512_cvtepu16_epi32(low),
                                               _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
  }
  static void store_words(void* p, F words, int64_t count) {
    _mm512_mask_storeu_ps(p, lanes(count), words);
  }
};

}  // namespace
}  // namespace ddpm_fast
