// The kernels' interface: plain structs, raw pointers, sizes, a stream. No torch, no C++ library.
#pragma once

#include "include/ddpm_fast/arguments.h"

namespace ddpm_fast {

inline constexpr int kCoefficients = sizeof(Coefficients) / sizeof(float);
inline constexpr int kIndexColumns = sizeof(RowIndex) / sizeof(int32_t);
inline constexpr int64_t kGrainProducts = 500'000;  // without tiles, that are worth a thread
inline constexpr int64_t kChunk = 4096;  // elements of one sample, the unit of parallel work
// Of cpu/norm_moments.h: columns, rows, rows and columns.
inline constexpr int64_t kNormRow = 1024, kNormBlock = 256, kNormCenter = 8, kNormStrip = 64;

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
  DType dtype, out_dtype;  // of x; of out: x's, or float16 for bfloat16
};

// A convolution's layer on samples of one size; pairs are (height, width).
struct ConvShape {
  int64_t in_channels, out_channels;
  int64_t size[2], out_size[2], kernel[2], stride[2], padding[2];
};

// out = convolution of x, plus bias and residual: channels_last; x has no gaps.
struct ConvArgs {
  ConvShape shape;
  int64_t samples;
  void* out;
  int64_t out_sample, out_row, out_pixel;  // its strides
  const void *x, *weight;                  // weight: as ConvKernels::pack made it
  const float* bias;                       // or null
  const void* residual;                    // or null; like out
  DType out_dtype;                         // x's; for float16 this or bfloat16
};

// (samples, positions, heads * channels), whose channels are neighbours; `sample` and `position`
// are strides.
struct AttentionInput {
  const void* first;
  int64_t sample, position;
};

// out = softmax(query key') value of each sample's heads; out has no gaps.
struct AttentionArgs {
  int64_t samples, positions, heads, channels;  // channels: of a head
  AttentionInput query, key, value;
  void* out;
};

// Static, as in arguments.h.
static constexpr int64_t chunks_of(int64_t elements) { return (elements + kChunk - 1) / kChunk; }

static constexpr int64_t norm_row(int64_t channels) {
  return channels > kNormRow ? channels : kNormRow;
}
// The floats that a GroupNormKernel needs as memory.
static constexpr int64_t norm_memory(int64_t channels) { return 6 * norm_row(channels); }

// The range is in groups, [0, samples * groups); where these are cut into ranges changes no bit.
using GroupNormKernel = void (*)(const GroupNormArgs&, int64_t begin, int64_t end, float* memory);

// One instruction-set level. Ranges are in chunks: [0, samples * chunks_of(elements)).
struct CpuKernels {
  void (*randn)(const RandnArgs&, int64_t begin, int64_t end);
  void (*q_sample)(const QSampleArgs&, int64_t begin, int64_t end);
  // Returns the first sample of the range with a value that is not finite, or -1.
  int64_t (*step)(const StepArgs&, int64_t begin, int64_t end);
  GroupNormKernel group_norm;
};

// Convolutions of one dtype by one algorithm.
struct ConvKernels {
  const char* name;
  DType packed;                                  // of the packed weight
  int64_t grain;                                 // products that are worth a thread
  int64_t (*packed_elements)(const ConvShape&);  // of these, size and out_size are not read
  void (*pack)(const ConvShape&, const float* weight, void* packed);  // (O, I, kH, kW)
  // The work's units, which may be cut anywhere: each costs as much as any other of its layer.
  int64_t (*units)(const ConvArgs&);
  int64_t (*memory_bytes)(const ConvShape&);
  void (*conv2d)(const ConvArgs&, int64_t begin, int64_t end, void* memory);
};

// Of the level in use, and for bfloat16 with the CPU's own conversions where that has AVX512-BF16.
GroupNormKernel group_norm_kernel(DType dtype);

// Attention of one dtype.
struct AttentionKernels {
  int64_t grain;  // products that are worth a thread
  int64_t (*memory_bytes)(const AttentionArgs&);
  // The range is in queries, [0, samples * heads * positions), and may be cut anywhere.
  void (*attention)(const AttentionArgs&, int64_t begin, int64_t end, void* memory);
};

// dtype: of x. winograd: by Winograd's algorithm, which is for kernels of 3 x 3 and stride 1;
// float16 has another with amx alone, where its weight is that for bfloat16. Null where the level
// in use is below AVX2, and but for float32 where it is below AVX-512 or the CPU lacks AVX512-BF16.
const ConvKernels* conv_kernels(DType dtype, bool winograd);
// Null where the level in use is below AVX-512, and for bfloat16 where the CPU lacks AVX512-BF16.
const AttentionKernels* attention_kernels(DType dtype);

// The level in use: DDPM_FAST_CPU (baseline, avx2, avx512, amx), else the best that this CPU has
// and that was run on such CPUs. Throws std::runtime_error if the variable asks for a level that is
// not there. amx is avx512 with convolutions and attention of bfloat16 by tiles.
const CpuKernels& cpu_kernels();
const char* cpu_level_name();
// Likewise, from now on; unchecked, also where an emulator is to do what the CPU cannot. What was
// packed at one level is not to be used at another.
void set_cpu_level(const char* name, bool unchecked = false);
inline constexpr int kCpuLevels = 4;
int cpu_levels(const char* names[kCpuLevels], bool available_only);

extern const CpuKernels kBaselineKernels;
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
extern const GroupNormKernel kAvx512Bf16GroupNorm;
extern const ConvKernels kAvx2Conv, kAvx2Winograd;
extern const ConvKernels kAvx512Conv, kAvx512Winograd;
extern const ConvKernels kAvx512Bf16Conv, kAvx512Bf16Winograd, kAvx512Fp16Winograd;
extern const ConvKernels kAmxBf16Conv, kAmxFp16Conv;
extern const AttentionKernels kAvx512Attention, kAvx512Bf16Attention, kAmxBf16Attention;

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
