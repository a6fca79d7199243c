// The loop that one launch repeats, for Python; without CUDA kernels, the word that there is none.
#include <pybind11/pybind11.h>

#include <memory>

#include "require.h"

namespace py = pybind11;

namespace ddpm_fast {

#ifdef DDPM_FAST_WITH_CUDA
namespace {

struct Destroy {
  void operator()(WhileLoop* loop) const { cuda_destroy(loop); }
};

void check(int code) {
  require(code == 0, "a loop of captured steps failed: ", cuda_error_string(code), ".");
}

// Handles and addresses come as the integers that torch gives.
class Loop {
 public:
  Loop(uintptr_t step, uintptr_t remaining) {
    WhileLoop* loop = nullptr;
    check(cuda_while_loop(reinterpret_cast<void*>(step), reinterpret_cast<int64_t*>(remaining),
                          &loop));
    loop_.reset(loop);
  }
  void launch(uintptr_t stream) {
    check(cuda_launch(loop_.get(), reinterpret_cast<void*>(stream)));
  }

 private:
  std::unique_ptr<WhileLoop, Destroy> loop_;
};

}  // namespace
#endif

void bind_while_loop(py::module_& m) {
#ifdef DDPM_FAST_WITH_CUDA
  m.def("has_while_loops", &cuda_has_while_loops, "Whether CUDA's runtime and driver have them.");
  py::class_<Loop>(m, "WhileLoop", "A captured step that one launch repeats `remaining` times.")
      .def(py::init<uintptr_t, uintptr_t>(), py::arg("step"), py::arg("remaining"))
      .def("launch", &Loop::launch, py::arg("stream"));
#else
  m.def("has_while_loops", [] { return false; }, "Whether CUDA's runtime and driver have them.");
#endif
}

}  // namespace ddpm_fast
