// Plays every block and thread of the multi-tensor kernels on the CPU and compares with the CPU's own loops, bit for
// bit. Exits with 1 and a message at the first difference. Compiled and run by test_launch.py, with sanitizers.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "chunks.h"
#include "ema.h"
#include "sgd_ema.h"

namespace {

std::mt19937 random_bits(7);

// An array in memory of exactly its size, so that a sanitizer sees one element too far; `skew` elements off alignment.
template <typename T>
struct Array {
  explicit Array(std::size_t size, std::size_t skew) : memory(size + skew), skew(skew) {
    for (auto& x : memory) x = static_cast<T>(std::normal_distribution<double>()(random_bits) * 8);
  }
  T* data() { return memory.data() + skew; }
  std::vector<T> memory;
  std::size_t skew;
};

template <typename T>
struct Operands {
  Operands(std::size_t size, std::size_t skew)
      : size(size), p(size, skew), g(size, skew), b(size, skew), k(size, skew), s(size, skew), c(size, skew),
        n(size, skew) {
    for (std::size_t i = 0; i < size; ++i) n.data()[i] = fastmoco::bf16_bits(static_cast<float>(g.data()[i]));
  }
  std::size_t size;
  Array<T> p, g, b, k;
  Array<std::uint16_t> s, c, n;

  bool operator==(const Operands& other) const {
    const auto same = [](const auto& x, const auto& y) {
      const auto bytes = x.memory.size() * sizeof(x.memory[0]);
      return bytes == 0 || std::memcmp(x.memory.data(), y.memory.data(), bytes) == 0;
    };
    return same(p, other.p) && same(g, other.g) && same(b, other.b) && same(k, other.k) && same(s, other.s) &&
           same(c, other.c);
  }
};

template <std::size_t kBytes, typename Function>
int play(const std::vector<typename Function::Tensor>& tensors, const Function& function, unsigned threads) {
  int launches = 0;
  fastmoco::tabulate<kBytes>(tensors, function, [&](const fastmoco::Table<Function, kBytes>& table) {
    static_assert(sizeof table + sizeof function <= kBytes, "the parameters do not fit");
    ++launches;
    for (std::uint32_t block = 0; block < table.chunks(); ++block) {
      for (unsigned thread = 0; thread < threads; ++thread) {
        fastmoco::run_chunk(table, function, block, thread, threads);
      }
    }
  });
  return launches;
}

void expect(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

// Empty, around a pack and a chunk, several chunks; enough of them that a small table takes several launches.
const std::size_t kSizes[] = {0, 1, 3, 4, 5, 17, 4095, 4096, 4097, 0, 8192, 12345, 2, 64, 40000, 7, 4099};

template <typename T>
std::vector<Operands<T>> operands(std::size_t skew) {
  std::vector<Operands<T>> all;
  for (const auto size : kSizes) all.emplace_back(size, all.size() % 3 == 0 ? skew : 0);
  return all;
}

template <typename T>
void compare_ema(std::size_t skew, bool shadows) {
  auto ours = operands<T>(skew), theirs = ours;
  const auto list = [shadows](std::vector<Operands<T>>& all) {
    std::vector<fastmoco::EmaTensor<T>> tensors;
    for (auto& x : all) tensors.push_back({x.k.data(), x.p.data(), shadows ? x.s.data() : nullptr, x.size});
    return tensors;
  };
  const auto ema = fastmoco::make_ema<T>(0.97);
  expect(play<512>(list(ours), ema, 32) > 1, "a small table took all tensors");
  fastmoco::update(list(theirs), ema, 3);
  expect(ours == theirs, "EMA in several launches differs");
  expect(play<32764>(list(ours), ema, 256) == 1, "a large table took more than one launch");
  fastmoco::update(list(theirs), ema, 1);
  expect(ours == theirs, "EMA in one launch differs");
}

template <typename T>
void compare_sgd(std::size_t skew, bool buffers, float found_inf) {
  auto ours = operands<T>(skew), theirs = ours;
  const auto list = [buffers](std::vector<Operands<T>>& all) {
    std::vector<fastmoco::SgdEmaTensor<T>> tensors;
    for (auto& x : all) {
      // In turn: an average and its shadow, an average, neither; each with and without a copy.
      const auto turn = tensors.size() % 3;
      const bool copied = tensors.size() % 2 == 0;
      const void* const gradient = copied ? static_cast<const void*>(x.n.data()) : x.g.data();
      tensors.push_back({x.p.data(), gradient, buffers ? x.b.data() : nullptr, turn < 2 ? x.k.data() : nullptr,
                         turn < 1 ? x.s.data() : nullptr, copied ? x.c.data() : nullptr, x.size});
    }
    return tensors;
  };
  const fastmoco::Sgd<T> sgd{T(0.1), T(buffers ? 0.9 : 0), T(0.01)};
  const fastmoco::SgdEma<T> step{sgd, fastmoco::make_ema<T>(0.9), &found_inf, false};
  expect(play<512>(list(ours), step, 32) > 1, "a small table took all tensors");
  fastmoco::update(list(theirs), step, 2);
  expect(ours == theirs, "SGD and EMA in several launches differ");
  expect(play<32764>(list(ours), step, 256) == 1, "a large table took more than one launch");
  fastmoco::update(list(theirs), step, 3);
  expect(ours == theirs, "SGD and EMA in one launch differ");
}

template <typename T>
void compare() {
  for (const std::size_t skew : {0, 1}) {
    for (const bool flag : {false, true}) {
      compare_ema<T>(skew, flag);
      for (const float found_inf : {0.0f, 1.0f}) compare_sgd<T>(skew, flag, found_inf);
    }
  }
}

}  // namespace

int main() {
  compare<float>();
  compare<double>();
  std::puts("the same");
}
