// What is refused in a sentence, and the checks that need the kernels' arguments alone: whoever
// calls the kernels shares them.
#pragma once

#include <algorithm>
#include <array>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "kernels.h"

namespace ddpm_fast {

// Torch's own check would put the source file's path into the message.
template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  message << "ddpm_fast: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// [first, last) of the bytes that an argument reaches.
struct Bytes {
  const char* name;
  uintptr_t first, last;
};

// The first `written` of `all` share memory with nothing else.
inline void require_separate(const std::vector<Bytes>& all, size_t written) {
  for (size_t i = 0; i < written; ++i) {
    for (size_t j = i + 1; j < all.size(); ++j) {
      const Bytes &a = all[i], &b = all[j];
      const bool empty = a.first == a.last || b.first == b.last;
      require(empty || a.last <= b.first || b.last <= a.first, a.name, " is written while ", b.name,
              " is read, so they must not share memory; pass a clone.");
    }
  }
}

// Whether no two elements share an address: from the narrowest stride on, each dimension clears
// what the ones before it span.
inline bool is_distinct(int64_t samples, int64_t channels, int64_t pixels, const Layout& layout) {
  std::array<std::pair<int64_t, int64_t>, 3> dimensions{
      {{layout.sample, samples}, {layout.channel, channels}, {layout.pixel, pixels}}};
  std::sort(dimensions.begin(), dimensions.end());
  int64_t span = 1;
  for (const auto& [stride, size] : dimensions) {
    if (size <= 1) continue;
    if (stride < span) return false;
    span += stride * (size - 1);
  }
  return true;
}

inline void require_aligned(const char* name, const void* data, size_t element_size) {
  require(reinterpret_cast<uintptr_t>(data) % element_size == 0, name,
          " must begin at a multiple of its elements' ", element_size, " bytes; pass a copy.");
}

inline void require_elements(int64_t elements) {
  require(elements <= kMaxElements, "a sample may have 2^34 elements, but this one has ", elements,
          ".");
}

inline void require_noise(int64_t step, int64_t stream) {
  require(step >= 0 && step < kMaxStep, "step must be between 0 and 2^20 - 1, but it is ", step,
          ".");
  require(stream >= 0 && stream < kMaxStream, "stream must be between 0 and 2^12 - 1, but it is ",
          stream, ".");
}

inline void require_timesteps(const QSampleArgs& args) {
  for (int64_t n = 0; n < args.samples; ++n) {
    require(args.timesteps[n] >= 0 && args.timesteps[n] < args.table_rows, "timesteps[", n, "] is ",
            args.timesteps[n], ", but the table has the rows 0 to ", args.table_rows - 1, ".");
  }
}

// `has_previous`: the pointer to an empty tensor may be null.
inline void require_rows(const StepArgs& args, bool has_previous) {
  for (int64_t n = 0; n < args.samples; ++n) {
    const int64_t row = args.row[n];
    require(row >= 0 && row < args.table_rows, "row[", n, "] is ", row,
            ", but the table has the rows 0 to ", args.table_rows - 1, ".");
    const RowIndex& index = args.index[row];
    require(index.noise_step >= 0 && index.noise_step < kMaxStep, "the noise step of row ", row,
            " is ", index.noise_step, ", but it must be between 0 and 2^20 - 1.");
    require((index.flags & kLearnedVariance) == 0 || args.model_channels == 2 * args.channels,
            "row ", row, " takes the variance from the model, but model_output has ",
            args.model_channels, " channels instead of ", 2 * args.channels, ".");
    require(args.coefficients[row].c2 == 0.0f || has_previous, "row ", row,
            " uses the previous pred_xstart; pass previous_pred_xstart.");
  }
}

}  // namespace ddpm_fast
