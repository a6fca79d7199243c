// What the kernels take: plain structs, raw pointers, sizes. No C++ library, C++17.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

inline constexpr int kNoiseVersion = 1;  // of the noise contract: ddpm_fast/noise.py defines it
inline constexpr int64_t kMaxElements = int64_t{1} << 34;  // of a sample: a 32-bit counter of four
inline constexpr int64_t kMaxStep = int64_t{1} << 20, kMaxStream = int64_t{1} << 12;

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };
enum class Status : int32_t { kOk, kBadRow, kNotFinite };

// Where element (sample, channel, pixel) lies, in elements from the first: sample * layout.sample +
// channel * layout.channel + pixel * layout.pixel. A pixel is a position in what follows the
// channel, in C order: of an image y * width + x, of a single number the only one.
struct Layout {
  int64_t sample, channel, pixel;
};

// Static, so that the linker takes no file's copy, with its instructions, for another's.
static constexpr Layout contiguous(int64_t channels, int64_t pixels) {
  return {channels * pixels, pixels, 1};
}
static constexpr Layout channels_last(int64_t channels, int64_t pixels) {
  return {channels * pixels, 1, channels};
}

// One row of a step's table, that is one step of a sampling method:
//   pred_xstart = clip(a * x_t + b * model_output, clip_lo, clip_hi)
//   x_prev = c0 * pred_xstart + c1 * x_t + c2 * previous_pred_xstart + c3 * model_output
//            + sigma * noise
// A term whose coefficient is 0 is skipped. ddpm_fast/methods.py fills them for each method.
struct Coefficients {
  float a, b, c0, c1, c2, c3, sigma;
  float min_log, max_log;  // of a learned variance: the bounds of its logarithm
  float clip_lo, clip_hi;  // -1 and 1; the infinities clip nothing
  float spare[5];
};

inline constexpr int32_t kLearnedVariance = 1;  // a bit of the flags

struct RowIndex {
  int32_t timestep;    // what the network is given; the kernels do not read it
  int32_t noise_step;  // 0 .. 2^20 - 1; as 0 draws x_T, row i has i + 1
  int32_t flags, spare;
};

// Normals of the noise contract: a pure function of seed, sample_index, stream, step and position.
struct RandnArgs {
  float* out = nullptr;                   // (samples, elements), contiguous
  const int64_t* seed = nullptr;          // (samples,), any
  const int64_t* sample_index = nullptr;  // (samples,), any
  int64_t samples = 0, elements = 0;
  int32_t step = 0;    // 0 .. 2^20 - 1: 0 draws x_T
  int32_t stream = 0;  // 0 .. 2^12 - 1: 0 is sampling, 1 q_sample, 2 editing; the rest is reserved
};

// x_t = coefficients[t][0] * x_start + coefficients[t][1] * noise (Ho et al. 2020, equation 4), t
// being the sample's timestep, the noise given or that of `stream` and step 0.
struct QSampleArgs {
  int64_t samples = 0, channels = 0, pixels = 0, table_rows = 0;
  float* x_t = nullptr;
  float* noise_out = nullptr;  // the noise that is drawn; null if `noise` is given
  const float* x_start = nullptr;
  const float* noise = nullptr;         // or null: drawn
  const float* coefficients = nullptr;  // (table_rows, 2): the square roots of alphas_cumprod and
                                        // 1 - alphas_cumprod
  const int64_t* timesteps = nullptr;   // (samples,), 0 .. table_rows - 1
  const int64_t* seed = nullptr;        // (samples,), any
  const int64_t* sample_index = nullptr;
  Layout layout{channels * pixels, pixels, 1};  // of x_t, noise_out, x_start and noise
  int32_t stream = 1;
  bool past_caches = false;  // write the results straight to memory: for 16 MB of them and more
};

// One step of a sampling method, each sample at its own row of the table. Designated initialisers
// make the layouts that are not given contiguous; whoever assigns the sizes assigns the layouts
// too.
struct StepArgs {
  int64_t samples = 0, channels = 0, pixels = 0, table_rows = 0;
  int64_t model_channels = channels;  // or twice that, with learned variances
  DType model_dtype = DType::kFloat32, next_dtype = DType::kFloat32;

  float* out = nullptr;                   // x_prev; may be x_t
  const float* x_t = nullptr;             // (samples, channels, pixels)
  const void* model_output = nullptr;     // (samples, model_channels, pixels)
  const float* noise = nullptr;           // or null: drawn in registers, of stream 0
  float* previous = nullptr;              // or null: read for c2, then overwritten by pred_xstart
  const float* guidance_scale = nullptr;  // or null; with it model_output has 2 * samples samples,
                                          // conditional ones first:
                                          // unconditional + scale * (conditional - unconditional)
  const Coefficients* coefficients = nullptr;  // (table_rows,)
  const RowIndex* index = nullptr;             // (table_rows,)
  const int64_t* row = nullptr;                // (samples,), 0 .. table_rows - 1
  const int64_t* seed = nullptr;               // (samples,), any
  const int64_t* sample_index = nullptr;       // (samples,), any
  // (code, row, sample, spare), or null: a Status, and where; the first report stays.
  int32_t* status = nullptr;
  // Or null: x_prev once more, as the network's next input; 2 * samples samples where
  // guidance_scale is given, the second half equal to the first.
  void* next_input = nullptr;

  Layout out_layout{channels * pixels, pixels, 1};
  Layout x_layout{channels * pixels, pixels, 1};
  Layout model_layout{model_channels * pixels, pixels, 1};
  Layout noise_layout{channels * pixels, pixels, 1};
  Layout previous_layout{channels * pixels, pixels, 1};
  Layout next_layout{channels * pixels, pixels, 1};
};

}  // namespace ddpm_fast
