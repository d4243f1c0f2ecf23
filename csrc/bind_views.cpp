#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "views.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kName = "views";

ViewBatch checked(std::uintptr_t images, std::uintptr_t views, std::uintptr_t out, std::size_t count, int size,
                  int blur_kernel) {
  if (size < 1) throw std::invalid_argument("views: size must be at least 1");
  if (blur_kernel < 1 || blur_kernel % 2 == 0 || blur_kernel / 2 >= size)
    throw std::invalid_argument("views: blur_kernel must be odd, positive and below twice the size");
  return {pointer<const ViewImage>(kName, images, count), pointer<const ViewRecord>(kName, views, count), count, size,
          blur_kernel, pointer<std::uint16_t>(kName, out, count)};
}

void bound(std::uintptr_t images, std::uintptr_t views, std::uintptr_t out, std::size_t count, int size,
           int blur_kernel, const std::string& set, int threads) {
  const ViewBatch batch = checked(images, views, out, count, size, blur_kernel);
  check_threads(kName, threads);
  const py::gil_scoped_release release;
  make_views(batch, threads, set.c_str());
}

}  // namespace

void bind_views(py::module_& module) {
  module.attr("VIEWS_SETS") = views_sets();
  module.def(kName, &bound, py::arg("images"), py::arg("views"), py::arg("out"), py::kw_only(), py::arg("count"),
             py::arg("size"), py::arg("blur_kernel"), py::arg("instruction_set"), py::arg("threads"),
             "Cuts views from images on the CPU: out (count, size, size, 3) float16.\n\n"
             "Addresses: images of records (uint64 address, int32 height, width, wide, unused), whose pixels are\n"
             "dense (height, width, 3), uint8 or, where wide is not 0, uint16; views of `count` records as\n"
             "fastmoco.ops.views.VIEW, which the caller has checked. instruction_set: one of VIEWS_SETS, '' for the\n"
             "best. The same bits with any number of threads. Raises ValueError for a size below 1, a blur_kernel\n"
             "that is even or at least twice the size, threads below 1, an address that cannot be one or an unknown\n"
             "instruction set.");
}

}  // namespace fastmoco
