// Random tensors for the kernels' fuzz: their shapes, memory orders and values, and whether two are
// equal.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../csrc/kernels.h"

namespace ddpm_fast {
namespace {

uint64_t state;

uint64_t random_bits() {  // splitmix64
  uint64_t z = (state += 0x9E3779B97F4A7C15u);
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}
int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % n); }
bool flip() { return below(2) == 0; }

int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

struct Shape {
  int64_t samples, channels, pixels;

  int64_t elements() const { return channels * pixels; }
};

Shape random_shape() {
  static const int64_t kPixels[] = {0, 1, 2, 15, 16, 63, 257, 1023, 1024, 1025, 1408, 4095, 4099};
  return {below(4), 1 + below(5), flip() ? below(70) : kPixels[below(13)]};
}

// Memory of one tensor. Half of them end where the last element does, for the address sanitizer;
// the others have a margin that must stay as it was, for what the sanitizer does not see (masked
// vectors).
struct Buffer {
  DType dtype = DType::kFloat32;
  Layout layout{};
  int64_t offset = 0;
  std::vector<char> first;         // what each level begins with
  std::unique_ptr<char[]> memory;  // exactly as much

  Buffer() = default;
  Buffer(DType type, const Shape& shape) : dtype(type) {
    const int64_t gap = flip() ? 0 : below(9), order = below(4), c = shape.channels;
    layout.pixel = order == 0 ? c : order == 1 ? 1 + below(6) : 1;
    layout.channel = order == 0 ? 1 : layout.pixel * shape.pixels + (order == 3 ? gap : 0);
    layout.sample = (order == 0 ? c * shape.pixels : c * layout.channel) + gap;
    int64_t extent = 0;
    if (shape.samples * shape.elements() > 0) {
      extent = (shape.samples - 1) * layout.sample + (c - 1) * layout.channel +
               (shape.pixels - 1) * layout.pixel + 1;
    }
    const int64_t margin = flip() ? 0 : 64;
    offset = margin + below(4);
    first.resize((offset + extent + margin) * size_of(dtype));
    for (size_t i = 0; i + size_of(dtype) <= first.size(); i += size_of(dtype)) fill(&first[i]);
    reset();
  }
  // Numbers near 1 mostly; else any bits.
  void fill(char* at) {
    const bool any = below(64) == 0;
    const uint32_t bits = static_cast<uint32_t>(random_bits());
    uint32_t value = any ? bits : (bits & 0x807FFFFFu) | 0x3F000000u | (bits >> 8 & 0x00800000u);
    if (dtype == DType::kBFloat16) value >>= 16;
    if (dtype == DType::kFloat16) value = any ? bits : (bits & 0x8FFFu) | 0x3000u;
    std::memcpy(at, &value, size_of(dtype));
  }
  void reset() {
    memory.reset(new char[first.size()]);
    std::copy(first.begin(), first.end(), memory.get());
  }
  template <class T = void>
  T* data() {
    return reinterpret_cast<T*>(memory.get() + offset * size_of(dtype));
  }
  std::string bytes() const { return {memory.get(), first.size()}; }
};

bool is_nan(const char* at, DType dtype) {
  uint32_t bits = 0;
  std::memcpy(&bits, at, size_of(dtype));
  if (dtype == DType::kBFloat16) bits <<= 16;
  if (dtype == DType::kFloat16) return (bits & 0x7FFFu) > 0x7C00u;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u;
}

// Equal bits; which NaN a sum of two NaNs is, is left to the compiler.
bool equal(const std::string& a, const std::string& b, DType dtype) {
  const size_t size = size_of(dtype);
  for (size_t i = 0; i < a.size(); i += size) {
    if (std::memcmp(&a[i], &b[i], size) == 0) continue;
    if (!is_nan(&a[i], dtype) || !is_nan(&b[i], dtype)) return false;
  }
  return true;
}

}  // namespace
}  // namespace ddpm_fast
