// The kernels' interface: plain structs, raw pointers, sizes, a stream. No torch, no C++ library.
#pragma once

#include <stdint.h>

namespace ddpm_fast {

inline constexpr int kCoefficients = 16;        // floats in a row of the step's table, see StepRow
inline constexpr int kIndexColumns = 4;         // timestep, noise step, flags, spare
inline constexpr int32_t kLearnedVariance = 1;  // a bit of the flags
inline constexpr int64_t kMaxElements = int64_t{1} << 34;  // a 32-bit counter of four elements
inline constexpr int64_t kMaxStep = int64_t{1} << 20, kMaxStream = int64_t{1} << 12;
inline constexpr int64_t kChunk = 4096;  // elements of one sample, the unit of parallel work
inline constexpr int64_t kNormRow = 1024, kNormBlock = 256;  // see cpu/norm_loop.h

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };
enum class Status : int32_t { kOk, kBadRow, kNotFinite };

// Where element (sample, channel, pixel) lies, in elements: contiguous, channels_last, or a slice.
struct Layout {
  int64_t sample, channel, pixel;
};

struct RandnArgs {
  float* out;  // (samples, elements), contiguous
  const int64_t *seed, *sample_index;
  int64_t samples, elements;
  int32_t step, stream;
};

struct QSampleArgs {
  float *x_t, *noise_out;  // noise_out: null when noise is given
  const float *x_start, *noise;
  const float* coefficients;  // (T, 2)
  const int64_t *timesteps, *seed, *sample_index;
  Layout layout;  // of all four
  int64_t samples, channels, pixels, table_rows;
  int32_t stream;
  bool past_caches;  // on a CPU: write the results straight to memory
};

struct StepArgs {
  float* out;
  const float* x_t;
  const void* model_output;
  const float* noise;           // or null: drawn in registers
  float* previous;              // or null: read for c2, then overwritten by pred_xstart
  const float* guidance_scale;  // or null; with it model_output has 2 * samples rows
  const float* coefficients;    // (table_rows, 16)
  const int32_t* index;         // (table_rows, 4)
  const int64_t *row, *seed, *sample_index;
  int32_t* status;  // or null: (code, row, sample, spare)
  Layout out_layout, x_layout, model_layout, noise_layout, previous_layout;
  int64_t samples, channels, pixels, table_rows;
  DType model_dtype;
  int64_t model_channels;  // channels, or twice that with learned variances
  // or null: x_prev once more, as the network's next input; twice `samples` rows where
  // guidance_scale is given, the second half equal to the first.
  void* next_input;
  Layout next_layout;
  DType next_dtype;
};

// y = GroupNorm(x + shift), then SiLU: channels_last, without gaps. x is (samples, pixels,
// channels) in one or two parts, whose channels follow each other.
struct GroupNormArgs {
  void* out;
  const void* x[2];
  int64_t channels[2];  // of each part; 0 where there is no second
  // A row of as many floats for each sample, or with stride 0 one for all; shift may be null.
  const float *shift, *weight, *bias;
  int64_t shift_stride, affine_stride;
  int64_t samples, pixels, groups;
  double eps;
  bool silu;
  DType dtype;  // of x and out: float32 or bfloat16
};

// A convolution's layer on samples of one size; pairs are (height, width).
struct ConvShape {
  int64_t in_channels, out_channels;
  int64_t size[2], out_size[2], kernel[2], stride[2], padding[2];
};

// out = convolution of x, plus bias and residual: channels_last, without gaps.
struct ConvArgs {
  ConvShape shape;
  int64_t samples;
  void* out;
  const void *x, *weight;  // weight: as ConvKernels::pack made it
  const float* bias;       // or null
  const void* residual;    // or null; like out
};

// Static, so that the linker takes no file's copy, with its instructions, for another's.
static constexpr int64_t chunks_of(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

// The floats that `group_norm` needs as memory: four times this.
static constexpr int64_t norm_row(int64_t channels) {
  return channels > kNormRow ? channels : kNormRow;
}

// One instruction-set level. Ranges are in chunks: [0, samples * chunks_of(elements)).
struct CpuKernels {
  const char* name;
  void (*randn)(const RandnArgs&, int64_t begin, int64_t end);
  void (*q_sample)(const QSampleArgs&, int64_t begin, int64_t end);
  // Returns the first sample of the range with a value that is not finite, or -1.
  int64_t (*step)(const StepArgs&, int64_t begin, int64_t end);
  // The range is in groups, [0, samples * groups); each of a sample's has the same channels.
  void (*group_norm)(const GroupNormArgs&, int64_t begin, int64_t end, float* memory);
};

// Convolutions of bfloat16, on the CPUs that have instructions for them.
struct ConvKernels {
  const char* name;
  int64_t (*packed_elements)(const ConvShape&);  // of these, size and out_size are not read
  void (*pack)(const ConvShape&, const void* weight, void* packed);  // (O, I, kH, kW)
  // The work's units, which may be cut anywhere: each costs as much as any other of its layer.
  int64_t (*units)(const ConvArgs&);
  int64_t (*memory_bytes)(const ConvShape&);
  void (*conv2d)(const ConvArgs&, int64_t begin, int64_t end, void* memory);
};

// Null where this CPU has none, or the level in use is below AVX-512.
const ConvKernels* conv_kernels();

// The level in use: DDPM_FAST_CPU (baseline, avx2, avx512), else the best that this CPU has.
// Throws std::runtime_error if the variable asks for a level that is not there.
const CpuKernels& cpu_kernels();
void set_cpu_level(const char* name);  // likewise; for tests
int cpu_levels(const char* names[3], bool available_only);

extern const CpuKernels kBaselineKernels;
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
extern const ConvKernels kAvx512Bf16Conv;

// Launchers; each returns cudaError_t. A bad row of a step leaves its sample as it was and sets the
// status; a bad timestep makes its sample NaN.
int cuda_randn(const RandnArgs& args, void* stream);
int cuda_q_sample(const QSampleArgs& args, void* stream);
int cuda_step(const StepArgs& args, void* stream);
const char* cuda_error_string(int code);

// A captured step (a cudaGraph_t, which is copied) that one launch repeats `*remaining` times, at
// least once; `remaining` lies on the device that is current when the loop is made. Likewise
// cudaError_t; cudaErrorNotSupported where the runtime is older than CUDA 12.4.
struct WhileLoop;
bool cuda_has_while_loops();  // whether runtime and driver have them
int cuda_while_loop(void* step, int64_t* remaining, WhileLoop** loop);
int cuda_launch(const WhileLoop* loop, void* stream);
void cuda_destroy(WhileLoop* loop);

}  // namespace ddpm_fast
