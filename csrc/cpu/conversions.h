// bfloat16 and float16 to float32, and back rounded to nearest even: one element, any CPU.
//
// These are the definition: the vector conversions of each instruction set give the same bits.
#pragma once

#include <stdint.h>

namespace ddpm_fast {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_from_bits(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) { return float_from_bits(static_cast<uint32_t>(x.bits) << 16); }

inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7FFFu;
  // 2^112 moves the exponent's bias from 15 to 127, also for subnormals.
  uint32_t bits = float_bits(float_from_bits(magnitude << 13) * 0x1p112f);
  if (magnitude >= 0x7C00u) bits = 0x7F800000u | (magnitude & 0x3FFu) << 13;
  if (magnitude > 0x7C00u) bits |= 0x400000u;  // a quiet NaN, as the CPU's instruction makes it
  return float_from_bits(sign | bits);
}

inline void from_float(float x, float* to) { *to = x; }

inline void from_float(float x, BFloat16* to) {
  const uint32_t bits = float_bits(x), up = 0x7FFFu + (bits >> 16 & 1u);
  to->bits = static_cast<uint16_t>(x == x ? (bits + up) >> 16 : bits >> 16 | 0x40u);
}

inline void from_float(float x, Half* to) {
  const uint32_t bits = float_bits(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half = 0x7C00u;
  if (magnitude > 0x7F800000u) {
    half = 0x7E00u | (magnitude >> 13 & 0x3FFu);
  } else if (magnitude < 0x38800000u) {
    // Subnormal: the sum with 1/2, whose last bit is worth as much, rounds it.
    half = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3F000000u;
  } else if (magnitude < 0x477FF000u) {
    half = (magnitude - 0x38000000u + 0xFFFu + (magnitude >> 13 & 1u)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | half);
}

}  // namespace
}  // namespace ddpm_fast
