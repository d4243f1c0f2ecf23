#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "infonce.h"

namespace py = pybind11;

namespace fastmoco {
namespace {

constexpr const char* kName = "infonce";

BankDtype dtype_of(const std::string& name) {
  if (name == "float32") return BankDtype::kFloat32;
  if (name == "bfloat16") return BankDtype::kBFloat16;
  if (name == "float16") return BankDtype::kFloat16;
  throw std::invalid_argument("infonce: the bank's dtype must be float32, bfloat16 or float16, not " + name);
}

void bound(std::uintptr_t query, std::uintptr_t key, std::uintptr_t bank, std::uintptr_t skip, std::uintptr_t loss,
           std::uintptr_t rank, std::uintptr_t lse, std::uintptr_t dquery, std::uintptr_t dkey, std::uintptr_t scratch,
           std::size_t n, std::size_t d, std::size_t k, std::size_t skips, double temperature, double margin,
           bool normalized, bool fixed_maximum, const std::string& bank_dtype, const std::string& instruction_set,
           int threads) {
  check_threads(kName, threads);
  if (!(temperature > 0)) throw std::invalid_argument("infonce: temperature must be above 0");
  if (n == 0 || d == 0) throw std::invalid_argument("infonce: an empty batch or embedding");
  if (k > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
    throw std::invalid_argument("infonce: more than 2^31 - 1 rows in the bank");
  if (scratch % 64 != 0) throw std::invalid_argument("infonce: scratch must be aligned to 64 bytes");
  InfoNce a{};
  a.query = pointer<const float>(kName, query, n * d);
  a.key = pointer<const float>(kName, key, n * d);
  a.bank_dtype = dtype_of(bank_dtype);
  if (a.bank_dtype == BankDtype::kFloat32) {
    a.bank = pointer<const float>(kName, bank, k * d);
  } else {
    a.bank = pointer<const std::uint16_t>(kName, bank, k * d);
  }
  a.skip = pointer<const std::int64_t>(kName, skip, n * skips);
  a.n = n, a.d = d, a.k = k, a.skips = skips;
  a.temperature = temperature, a.margin = margin;
  a.normalized = normalized, a.fixed_maximum = fixed_maximum;
  a.loss = pointer<float>(kName, loss, 1);
  a.rank = pointer<std::int64_t>(kName, rank, n);
  a.lse = pointer<float>(kName, lse, n);
  a.dquery = pointer<float>(kName, dquery, n * d);
  a.dkey = pointer<float>(kName, dkey, 0);
  a.scratch = pointer<float>(kName, scratch, 1);
  a.threads = threads;
  a.instruction_set = instruction_set.c_str();
  const py::gil_scoped_release release;
  infonce(a);
}

}  // namespace

void bind_infonce(py::module_& module) {
  module.attr("INFONCE_SETS") = infonce_sets();
  module.def("infonce_scratch", &infonce_scratch, py::arg("n"), py::arg("d"), py::arg("threads"),
             "Floats of scratch memory that infonce needs.");
  module.def("infonce", &bound, py::kw_only(), py::arg("query"), py::arg("key"), py::arg("bank"), py::arg("skip"),
             py::arg("loss"), py::arg("rank"), py::arg("lse"), py::arg("dquery"), py::arg("dkey"), py::arg("scratch"),
             py::arg("n"), py::arg("d"), py::arg("k"), py::arg("skips"), py::arg("temperature"), py::arg("margin"),
             py::arg("normalized"), py::arg("fixed_maximum"), py::arg("bank_dtype"),
             py::arg("instruction_set"), py::arg("threads"),
             "InfoNCE with its gradients (fastmoco/ops/infonce.py). Addresses of dense float32 arrays, of the bank's\n"
             "dtype for the bank and of int64 for skip and rank; skip and dkey may be 0; scratch aligned to 64 bytes.\n"
             "instruction_set: avx512bf16, avx512, avx2 or baseline, the best that is used; '' for any.\n"
             "Raises ValueError for what the arguments alone show to be wrong.");
}

}  // namespace fastmoco
