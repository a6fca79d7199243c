// pybind11, apart from torch's headers: what was built, what this CPU can do, and the kernels on
// NumPy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace ddpm_fast {
namespace {

using Longs = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

std::vector<std::string> levels(bool available_only) {
  const char* names[3];
  const int count = cpu_levels(names, available_only);
  return {names, names + count};
}

py::dict build_config() {
  py::dict config;
  config["version"] = DDPM_FAST_VERSION;
  config["compiler"] = DDPM_FAST_COMPILER;
  config["build_type"] = DDPM_FAST_BUILD_TYPE;
  config["torch"] = DDPM_FAST_TORCH;
  config["cpu_levels"] = levels(false);
  config["cuda_compiled"] = DDPM_FAST_CUDA_COMPILED != 0;
#ifdef DDPM_FAST_WITH_CUDA
  config["cuda_linked"] = true;
#else
  config["cuda_linked"] = false;
#endif
  return config;
}

py::array_t<float> randn(const Longs& seed, const Longs& sample_index, int64_t elements,
                         int32_t step, int32_t stream) {
  const int64_t samples = sample_index.size();
  if (seed.ndim() != 1 || sample_index.ndim() != 1 || seed.size() != samples) {
    throw std::invalid_argument("seed and sample_index must be of the same shape (N,).");
  }
  if (elements < 0 || elements > kMaxElements || step < 0 || step >> 20 || stream < 0 ||
      stream >> 12) {
    throw std::invalid_argument(
        "elements must be 0 to 2^34, step 0 to 2^20 - 1 and stream 0 to 2^12 - 1.");
  }
  py::array_t<float> out({samples, elements});
  const RandnArgs args{
      out.mutable_data(), seed.data(), sample_index.data(), samples, elements, step, stream};
  const CpuKernels& kernels = cpu_kernels();
  py::gil_scoped_release release;
  kernels.randn(args, 0, samples * chunks_of(elements));
  return out;
}

}  // namespace
}  // namespace ddpm_fast

PYBIND11_MODULE(_C, m) {
  using namespace ddpm_fast;
  m.doc() = "Compiled kernels of ddpm_fast; importing it registers torch.ops.ddpm_fast.";
  m.def("build_config", &build_config, "What was compiled into this module.");
  m.def("cpu_level", [] { return cpu_kernels().name; }, "The instruction-set level in use.");
  m.def(
      "cpu_levels_available", [] { return levels(true); },
      "The compiled levels that this CPU has, best last.");
  m.def("_set_cpu_level", &set_cpu_level, py::arg("name"),
        "Use this level from now on (for tests); RuntimeError if it is not available.");
  m.def(
      "randn", &randn, py::arg("seed"), py::arg("sample_index"), py::arg("elements"),
      py::arg("step"), py::arg("stream") = 0,
      "Normals of the noise contract: seed and sample_index int64 (N,) -> float32 (N, elements).");
}
