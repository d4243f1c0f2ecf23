// What the bindings of all operations share. Each operation's own stand in bind_NAME.cpp.
//
// The module takes addresses and sizes and knows nothing of torch, so one binary serves every torch version. What
// arguments alone can show to be wrong is refused in the bindings; that an address holds as many elements of its dtype
// as the sizes say, and that tensors are dense and do not overlap, is for the caller in fastmoco/ops to have checked.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastmoco {

using Addresses = std::vector<std::uintptr_t>;
using Sizes = std::vector<std::size_t>;

// `address` as a pointer to `size` elements; throws std::invalid_argument where it cannot be one.
template <typename T>
T* pointer(const char* operation, std::uintptr_t address, std::size_t size) {
  const std::string name(operation);
  if (address == 0 && size != 0) throw std::invalid_argument(name + ": a null address with a size above 0");
  if (address % alignof(T) != 0) throw std::invalid_argument(name + ": an address that is not aligned to its dtype");
  return reinterpret_cast<T*>(address);
}

inline void check_threads(const char* operation, int threads) {
  if (threads < 1) throw std::invalid_argument(std::string(operation) + ": threads must be at least 1");
}

inline void check_length(const char* operation, const char* list, std::size_t length, std::size_t sizes) {
  if (length != sizes)
    throw std::invalid_argument(std::string(operation) + ": " + list + " and sizes differ in length");
}

// Whether `dtype` is "float32"; false for "float64", and std::invalid_argument thrown for any other.
inline bool is_float32(const char* operation, const std::string& dtype) {
  if (dtype != "float32" && dtype != "float64")
    throw std::invalid_argument(std::string(operation) + ": dtype must be float32 or float64, not " + dtype);
  return dtype == "float32";
}

// Calls run with an element of `dtype`, of bfloat16 the bits; throws std::invalid_argument for others than these two.
template <typename Run>
void by_dtype(const char* operation, const std::string& dtype, const Run& run) {
  if (dtype == "bfloat16") return run(std::uint16_t{});
  if (dtype == "float32") return run(float{});
  throw std::invalid_argument(std::string(operation) + ": dtype must be bfloat16 or float32, not " + dtype);
}

void bind_batch_norm(pybind11::module_& module);
void bind_convolve(pybind11::module_& module);
void bind_crosscorr(pybind11::module_& module);
void bind_ema(pybind11::module_& module);
void bind_infonce(pybind11::module_& module);
void bind_max_pool(pybind11::module_& module);
void bind_pooled_mse(pybind11::module_& module);
void bind_sgd_ema(pybind11::module_& module);
void bind_unfold(pybind11::module_& module);
void bind_views(pybind11::module_& module);

}  // namespace fastmoco
