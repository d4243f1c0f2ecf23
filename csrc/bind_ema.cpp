#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "ema.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kName = "ema_update";

template <typename T, typename Place>
void run(const Addresses& targets, const Addresses& sources, const Addresses& shadows, const Sizes& sizes,
         double momentum, Place place) {
  std::vector<EmaTensor<T>> tensors;
  tensors.reserve(sizes.size());
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    const auto size = sizes[i];
    tensors.push_back({pointer<T>(kName, targets[i], size), pointer<T>(kName, sources[i], size),
                       shadows.empty() ? nullptr : pointer<std::uint16_t>(kName, shadows[i], size), size});
  }
  const py::gil_scoped_release release;
  update(tensors, make_ema<T>(momentum), place);
}

template <typename Place>
void checked(const Addresses& targets, const Addresses& sources, const Addresses& shadows, const Sizes& sizes,
             double momentum, const std::string& dtype, Place place) {
  check_length(kName, "targets", targets.size(), sizes.size());
  check_length(kName, "sources", sources.size(), sizes.size());
  if (!shadows.empty()) check_length(kName, "shadows", shadows.size(), sizes.size());
  if (!(momentum >= 0.0 && momentum <= 1.0)) throw std::invalid_argument("ema_update: momentum must lie in [0, 1]");
  if (is_float32(kName, dtype)) {
    run<float>(targets, sources, shadows, sizes, momentum, place);
  } else {
    run<double>(targets, sources, shadows, sizes, momentum, place);
  }
}

void on_cpu(const Addresses& targets, const Addresses& sources, const Addresses& shadows, const Sizes& sizes,
            double momentum, const std::string& dtype, int threads) {
  check_threads(kName, threads);
  checked(targets, sources, shadows, sizes, momentum, dtype, threads);
}

void on_cuda(const Addresses& targets, const Addresses& sources, const Addresses& shadows, const Sizes& sizes,
             double momentum, const std::string& dtype, int device, std::uintptr_t stream) {
  checked(targets, sources, shadows, sizes, momentum, dtype, CudaPlace{device, stream});
}

}  // namespace

void bind_ema(py::module_& module) {
  module.def("ema_update", &on_cpu, py::arg("targets"), py::arg("sources"), py::arg("shadows"), py::arg("sizes"),
             py::kw_only(), py::arg("momentum"), py::arg("dtype"), py::arg("threads"),
             "targets[i][:sizes[i]] <- momentum * targets[i] + (1 - momentum) * sources[i], in place, and the result\n"
             "as bfloat16 to shadows[i] unless shadows is empty.\n\n"
             "targets, sources, shadows: addresses of dense memory; sizes: elements; dtype: 'float32' or 'float64'.\n"
             "Raises ValueError for lists of different lengths, a null or unaligned address, a momentum outside\n"
             "[0, 1], another dtype, or fewer than one thread.");
  module.def("ema_update_cuda", &on_cuda, py::arg("targets"), py::arg("sources"), py::arg("shadows"),
             py::arg("sizes"), py::kw_only(), py::arg("momentum"), py::arg("dtype"), py::arg("device"),
             py::arg("stream"),
             "ema_update on a GPU's memory: on the stream of address `stream` of device number `device`.\n\n"
             "Raises RuntimeError with CUDA's message where it cannot be launched, or where this was built without\n"
             "CUDA; else as ema_update.");
}

}  // namespace fastmoco
