// The kernels of AVX-512 F, BW, DQ and VL.
#include "avx512.h"

#include "loops.h"

namespace ddpm_fast {

const CpuKernels kAvx512Kernels = cpu_kernels<Avx512>();

}  // namespace ddpm_fast
