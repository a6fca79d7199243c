// AVX-512: convolutions of float32.
#include "avx512_products.h"
#include "winograd_loop.h"

namespace ddpm_fast {

const ConvKernels kAvx512Conv = conv_kernels<Avx512Products>("avx512");
const ConvKernels kAvx512Winograd = winograd_kernels<Avx512Products, float>("avx512");

}  // namespace ddpm_fast
