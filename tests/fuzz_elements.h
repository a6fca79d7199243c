// Random arrays for the fuzzes of a prepared network's kernels.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "../csrc/cpu/conversions.h"

namespace ddpm_fast {
namespace {

std::mt19937_64 generator;

int64_t below(int64_t n) { return static_cast<int64_t>(generator() % n); }

// Whose length is prime, so that no shape's rows repeat it.
const std::vector<float>& normals() {
  static const std::vector<float> values = [] {
    std::vector<float> drawn(65537);
    for (float& value : drawn) value = std::normal_distribution<float>()(generator);
    return drawn;
  }();
  return values;
}

// Exactly as much memory as there are elements, for the address sanitizer; or with a margin that
// must stay as it was, for what the sanitizer does not see (masked vectors). The values follow each
// other in the table of normals from anywhere on: to draw each took most of a fuzz's time.
template <class T>
struct Elements {
  int64_t count, margin;
  std::unique_ptr<T[]> memory;

  explicit Elements(int64_t n) : count(n), margin(below(2) * 64), memory(new T[n + 2 * margin]) {
    const std::vector<float>& values = normals();
    size_t at = below(values.size());
    for (int64_t i = 0; i < count; ++i) {
      from_float(values[at] + 0.5f, data() + i);
      at = at + 1 < values.size() ? at + 1 : 0;
    }
    for (int64_t i = 0; i < margin; ++i) memory[i] = memory[margin + count + i] = sentinel();
  }
  static T sentinel() {
    T value;
    from_float(12345.0f, &value);
    return value;
  }
  T* data() const { return memory.get() + margin; }
  bool is_intact() const {
    const float wanted = to_float(sentinel());
    for (int64_t i = 0; i < margin; ++i) {
      if (to_float(memory[i]) != wanted || to_float(memory[margin + count + i]) != wanted) {
        return false;
      }
    }
    return true;
  }
};

}  // namespace
}  // namespace ddpm_fast
