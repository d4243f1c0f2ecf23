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

// All but `out`.
ViewBatch checked(std::uintptr_t images, std::uintptr_t views, std::size_t count, int size, int blur_kernel) {
  if (size < 1 || size > kMostSize) throw std::invalid_argument("views: size must be from 1 to 32767");
  if (blur_kernel < 1 || blur_kernel % 2 == 0 || blur_kernel / 2 >= size)
    throw std::invalid_argument("views: blur_kernel must be odd, positive and below twice the size");
  ViewBatch batch{};
  batch.images = pointer<const ViewImage>(kName, images, count);
  batch.views = pointer<const ViewRecord>(kName, views, count);
  batch.count = count;
  batch.size = size;
  batch.blur_kernel = blur_kernel;
  return batch;
}

void bound(std::uintptr_t images, std::uintptr_t views, std::uintptr_t out, std::size_t count, int size,
           int blur_kernel, const std::string& set, int threads) {
  ViewBatch batch = checked(images, views, count, size, blur_kernel);
  batch.out = pointer<std::uint16_t>(kName, out, count);
  check_threads(kName, threads);
  const py::gil_scoped_release release;
  make_views(batch, threads, set.c_str());
}

py::tuple bound_space(std::uintptr_t images, std::uintptr_t views, std::size_t count, int size, int blur_kernel) {
  const ViewSpaceNeeded needed = views_space(checked(images, views, count, size, blur_kernel));
  return py::make_tuple(needed.taps, needed.bytes);
}

void bound_cuda(std::uintptr_t images, std::uintptr_t views, std::uintptr_t out, std::uintptr_t workspace,
                std::size_t count, int size, int blur_kernel, int taps, int device, std::uintptr_t stream) {
  ViewBatch batch = checked(images, views, count, size, blur_kernel);
  batch.out = pointer<std::uint16_t>(kName, out, count);
  if (taps < 1) throw std::invalid_argument("views: taps must be at least 1");
  double* const space = pointer<double>(kName, workspace, count);
  const py::gil_scoped_release release;
  make_views(batch, taps, space, CudaPlace{device, stream});
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
             "best. The same bits with any number of threads. Raises ValueError for a size not from 1 to 32767, a\n"
             "blur_kernel that is even or at least twice the size, threads below 1, an address that cannot be one or\n"
             "an unknown instruction set.");
  module.def("views_space", &bound_space, py::arg("images"), py::arg("views"), py::kw_only(), py::arg("count"),
             py::arg("size"), py::arg("blur_kernel"),
             "What views_cuda needs for these records, whose addresses are on the host: (taps, bytes of workspace).");
  module.def("views_cuda", &bound_cuda, py::arg("images"), py::arg("views"), py::arg("out"), py::arg("workspace"),
             py::kw_only(), py::arg("count"), py::arg("size"), py::arg("blur_kernel"), py::arg("taps"),
             py::arg("device"), py::arg("stream"),
             "As views, where all addresses are on a GPU, those of the images' pixels in the records too; on its\n"
             "stream, without waiting for it. taps and the size of workspace: from views_space. Raises RuntimeError\n"
             "with CUDA's message where it cannot be launched, or where this build has no CUDA.");
}

}  // namespace fastmoco
