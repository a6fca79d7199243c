// pybind11, apart from torch's headers: what was built, and what this CPU can do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace py = pybind11;

namespace ddpm_fast {

void bind_numpy(py::module_& m);              // numpy_ops.cpp
void bind_while_loop(py::module_& m);         // while_loop_bindings.cpp
std::vector<std::string> replay_operators();  // torch_replay_operators.cpp

namespace {

std::vector<std::string> levels(bool available_only) {
  const char* names[kCpuLevels];
  const int count = cpu_levels(names, available_only);
  return {names, names + count};
}

py::dict build_config() {
  py::dict config;
  config["version"] = DDPM_FAST_VERSION;
  config["compiler"] = DDPM_FAST_COMPILER;
  config["build_type"] = DDPM_FAST_BUILD_TYPE;
  config["torch"] = DDPM_FAST_TORCH;
  config["sources"] = DDPM_FAST_SOURCES;
  config["cpu_levels"] = levels(false);
  config["cuda_compiled"] = DDPM_FAST_CUDA_COMPILED != 0;
#ifdef DDPM_FAST_WITH_CUDA
  config["cuda_linked"] = true;
#else
  config["cuda_linked"] = false;
#endif
  return config;
}

}  // namespace
}  // namespace ddpm_fast

PYBIND11_MODULE(_C, m) {
  using namespace ddpm_fast;
  m.doc() = "Compiled kernels of ddpm_fast; importing it registers torch.ops.ddpm_fast.";
  m.def("build_config", &build_config, "What was compiled into this module.");
  m.def("cpu_level", &cpu_level_name, "The instruction-set level in use.");
  m.def(
      "cpu_levels_available", [] { return levels(true); },
      "The compiled levels that this CPU has, best last.");
  m.def(
      "conv_kernels",
      [](bool bfloat16) -> std::optional<std::string> {
        const ConvKernels* kernels =
            conv_kernels(bfloat16 ? DType::kBFloat16 : DType::kFloat32, false);
        return kernels == nullptr ? std::nullopt : std::optional<std::string>(kernels->name);
      },
      py::arg("bfloat16"),
      "The instruction set of `conv2d`, or None where this CPU, or the level in use, has none.");
  m.def(
      "has_attention",
      [](bool bfloat16) {
        return attention_kernels(bfloat16 ? DType::kBFloat16 : DType::kFloat32) != nullptr;
      },
      py::arg("bfloat16"), "Whether this CPU, at the level in use, has `attention`.");
  m.def("replay_operators", &replay_operators,
        "The operators that a recording can have, by their numbers: see replay.py.");
  m.def("_set_cpu_level", &set_cpu_level, py::arg("name"), py::arg("unchecked") = false,
        "Use this level from now on; RuntimeError if it is not available, and not `unchecked`.");
  bind_numpy(m);
  bind_while_loop(m);
}
