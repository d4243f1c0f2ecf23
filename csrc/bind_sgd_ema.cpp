#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "sgd_ema.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kName = "sgd_ema_update";

// What both functions are told, by the names their docstring gives.
struct Arguments {
  const Addresses &parameters, &gradients, &buffers, &targets, &shadows, &copies;
  const Sizes& sizes;
  double lr, momentum, weight_decay, ema;
  std::uintptr_t found_inf;
  const std::string& dtype;
};

template <typename T>
T* optional(std::uintptr_t address, std::size_t size) {
  return address == 0 ? nullptr : pointer<T>(kName, address, size);
}

template <typename T, typename Place>
void run(const Arguments& a, Place place) {
  std::vector<SgdEmaTensor<T>> tensors;
  tensors.reserve(a.sizes.size());
  for (std::size_t i = 0; i < a.sizes.size(); ++i) {
    const auto size = a.sizes[i];
    if (a.shadows[i] != 0 && a.targets[i] == 0)
      throw std::invalid_argument("sgd_ema_update: a shadow without a target");
    // The dtype that it is read in, for the look at its alignment.
    const void* const gradient = a.copies[i] != 0
                                     ? static_cast<void*>(pointer<std::uint16_t>(kName, a.gradients[i], size))
                                     : static_cast<void*>(pointer<T>(kName, a.gradients[i], size));
    tensors.push_back({pointer<T>(kName, a.parameters[i], size), gradient, optional<T>(a.buffers[i], size),
                       optional<T>(a.targets[i], size), optional<std::uint16_t>(a.shadows[i], size),
                       optional<std::uint16_t>(a.copies[i], size), size});
  }
  const Sgd<T> sgd{static_cast<T>(a.lr), static_cast<T>(a.momentum), static_cast<T>(a.weight_decay)};
  const SgdEma<T> step{sgd, make_ema<T>(a.ema), optional<const float>(a.found_inf, 1), false};
  const py::gil_scoped_release release;
  update(tensors, step, place);
}

template <typename Place>
void checked(const Arguments& a, Place place) {
  check_length(kName, "parameters", a.parameters.size(), a.sizes.size());
  check_length(kName, "gradients", a.gradients.size(), a.sizes.size());
  check_length(kName, "buffers", a.buffers.size(), a.sizes.size());
  check_length(kName, "targets", a.targets.size(), a.sizes.size());
  check_length(kName, "shadows", a.shadows.size(), a.sizes.size());
  check_length(kName, "copies", a.copies.size(), a.sizes.size());
  if (!(a.ema >= 0.0 && a.ema <= 1.0)) throw std::invalid_argument("sgd_ema_update: ema must lie in [0, 1]");
  if (is_float32(kName, a.dtype)) {
    run<float>(a, place);
  } else {
    run<double>(a, place);
  }
}

void on_cpu(const Addresses& parameters, const Addresses& gradients, const Addresses& buffers,
            const Addresses& targets, const Addresses& shadows, const Addresses& copies, const Sizes& sizes,
            double lr, double momentum, double weight_decay, double ema, std::uintptr_t found_inf,
            const std::string& dtype, int threads) {
  check_threads(kName, threads);
  checked({parameters, gradients, buffers, targets, shadows, copies, sizes, lr, momentum, weight_decay, ema, found_inf,
           dtype},
          threads);
}

void on_cuda(const Addresses& parameters, const Addresses& gradients, const Addresses& buffers,
             const Addresses& targets, const Addresses& shadows, const Addresses& copies, const Sizes& sizes,
             double lr, double momentum, double weight_decay, double ema, std::uintptr_t found_inf,
             const std::string& dtype, int device, std::uintptr_t stream) {
  checked({parameters, gradients, buffers, targets, shadows, copies, sizes, lr, momentum, weight_decay, ema, found_inf,
           dtype},
          CudaPlace{device, stream});
}

}  // namespace

void bind_sgd_ema(py::module_& module) {
  module.def("sgd_ema_update", &on_cpu, py::arg("parameters"), py::arg("gradients"), py::arg("buffers"),
             py::arg("targets"), py::arg("shadows"), py::arg("copies"), py::arg("sizes"), py::kw_only(), py::arg("lr"),
             py::arg("momentum"), py::arg("weight_decay"), py::arg("ema"), py::arg("found_inf"), py::arg("dtype"),
             py::arg("threads"),
             "A step of SGD with momentum, then target <- ema * target + (1 - ema) * parameter, and the target as\n"
             "bfloat16 to its shadow; in place.\n\n"
             "Lists of addresses of dense memory, all as long as sizes (elements); 0 in buffers, targets, shadows or\n"
             "copies for what a parameter lacks. A copy takes the parameter as bfloat16, the dtype of its gradient.\n"
             "found_inf: address of a float32 that, where it is 1, has parameters and buffers left as they are; 0 for\n"
             "none. dtype: 'float32' or 'float64'.\n"
             "Raises ValueError for lists of different lengths, a null or unaligned address, a shadow without a\n"
             "target, an ema outside [0, 1], another dtype, or fewer than one thread.");
  module.def("sgd_ema_update_cuda", &on_cuda, py::arg("parameters"), py::arg("gradients"), py::arg("buffers"),
             py::arg("targets"), py::arg("shadows"), py::arg("copies"), py::arg("sizes"), py::kw_only(), py::arg("lr"),
             py::arg("momentum"), py::arg("weight_decay"), py::arg("ema"), py::arg("found_inf"), py::arg("dtype"),
             py::arg("device"), py::arg("stream"),
             "sgd_ema_update on a GPU's memory: on the stream of address `stream` of device number `device`.\n\n"
             "Raises RuntimeError with CUDA's message where it cannot be launched, or where this was built without\n"
             "CUDA; else as sgd_ema_update.");
}

}  // namespace fastmoco
