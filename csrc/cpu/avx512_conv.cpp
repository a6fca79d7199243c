// AVX-512: convolutions and attention of float32.
#include "attention_loop.h"
#include "avx512.h"
#include "avx512_products.h"
#include "winograd_loop.h"

namespace ddpm_fast {

const ConvKernels kAvx512Conv = conv_kernels<Avx512Products>("avx512");
const ConvKernels kAvx512Winograd = winograd_kernels<Avx512Products, float>("avx512");
const AttentionKernels kAvx512Attention = attention_kernels<Avx512Products, Avx512>();

}  // namespace ddpm_fast
