#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "bind_windows.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kUnfold = "unfold";
constexpr const char* kFold = "fold";

std::size_t elements(const Windows& at) {
  return at.images * at.down() * at.across() * at.taps() * at.channels;
}

void unfold_rows(std::uintptr_t x, std::uintptr_t rows, const std::array<std::size_t, 4>& map, const Pair& kernel,
                 const Pair& stride, const Pair& padding, std::size_t element, int threads) {
  const Windows at = windows(kUnfold, map, kernel, stride, padding, threads);
  if (element == 0) throw std::invalid_argument("unfold: element must be at least 1");
  const auto* from = pointer<const unsigned char>(kUnfold, x, at.images * at.height * at.width * at.channels);
  auto* to = pointer<unsigned char>(kUnfold, rows, elements(at));
  const py::gil_scoped_release release;
  unfold(from, to, element, at);
}

template <typename T>
void run_fold(std::uintptr_t rows, std::uintptr_t x, const Windows& at) {
  const auto* from = pointer<const T>(kFold, rows, elements(at));
  auto* to = pointer<T>(kFold, x, at.images * at.height * at.width * at.channels);
  const py::gil_scoped_release release;
  fold<T>(from, to, at);
}

void fold_rows(std::uintptr_t rows, std::uintptr_t x, const std::array<std::size_t, 4>& map, const Pair& kernel,
               const Pair& stride, const Pair& padding, const std::string& dtype, int threads) {
  const Windows at = windows(kFold, map, kernel, stride, padding, threads);
  if (dtype == "bfloat16") return run_fold<std::uint16_t>(rows, x, at);
  if (dtype == "float32") return run_fold<float>(rows, x, at);
  if (dtype == "float64") return run_fold<double>(rows, x, at);
  throw std::invalid_argument("fold: dtype must be bfloat16, float32 or float64, not " + dtype);
}

}  // namespace

void bind_unfold(py::module_& module) {
  module.def(kUnfold, &unfold_rows, py::arg("x"), py::arg("rows"), py::kw_only(), py::arg("map"), py::arg("kernel"),
             py::arg("stride"), py::arg("padding"), py::arg("element"), py::arg("threads"),
             "rows <- what each place of a kernel's window covers of x, zeros where that is beside it.\n"
             "\n"
             "x is the address of a `map` (images, height, width, channels) of elements of `element` bytes, rows of\n"
             "(images, down, across, *kernel, channels). kernel, stride and padding are (vertical, horizontal).\n"
             "Raises ValueError for a null or unaligned address, a kernel that does not fit in the padded map, and for\n"
             "a kernel, stride, element or threads below 1.");
  module.def(kFold, &fold_rows, py::arg("rows"), py::arg("x"), py::kw_only(), py::arg("map"), py::arg("kernel"),
             py::arg("stride"), py::arg("padding"), py::arg("dtype"), py::arg("threads"),
             "x <- the sums of what unfold would have put into rows from each of its places.\n"
             "\n"
             "dtype is bfloat16, whose sums are in float32, float32 or float64; ValueError for any other. The rest is as\n"
             "for unfold.");
}

}  // namespace fastmoco
