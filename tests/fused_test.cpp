// SPDX-License-Identifier: MIT
// The fused kernels of this machine against the naive ones, on random problems. For machines without torch, such as the
// emulated one that `make aarch64` runs it on.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "dispatch/dispatch.hpp"
#include "dispatch/names.hpp"
#include "natten/cpu/half.hpp"
#include "natten/tiling.hpp"

namespace natten {

namespace {

std::mt19937 generator(0);

int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// Runs visit(elements) with a pointer of the storage type.
template <class Visit>
auto with_type(DType dtype, void* data, Visit const& visit) {
  switch (dtype) {
    case DType::kFloat64:
      return visit(static_cast<double*>(data));
    case DType::kFloat32:
      return visit(static_cast<float*>(data));
    case DType::kBFloat16:
      return visit(static_cast<cpu::BFloat16*>(data));
    case DType::kFloat16:
      return visit(static_cast<cpu::Float16*>(data));
  }
  std::abort();
}

// A contiguous tensor [batch, axes, heads, dim].
class Array {
 public:
  enum class Fill { kRandom, kNan };

  Array(DType dtype, std::int64_t batch, int const (&extent)[kMaxRank], int heads, int dim, Fill fill) : dtype_(dtype) {
    ref_.stride_head = dim;
    std::int64_t stride = std::int64_t{dim} * heads;
    for (int i = kMaxRank - 1; i >= 0; --i) {
      ref_.stride_axis[i] = stride;
      stride *= extent[i];
    }
    ref_.stride_batch = stride;
    size_ = static_cast<std::size_t>(batch * stride);
    memory_.resize(size_ + 1);
    ref_.data = memory_.data();
    std::normal_distribution<double> normal;
    with_type(dtype_, ref_.data, [&](auto* elements) {
      using Element = std::remove_pointer_t<decltype(elements)>;
      for (std::size_t i = 0; i < size_; ++i) {
        elements[i] = cpu::from_float<Element>(fill == Fill::kRandom ? normal(generator) : NAN);
      }
    });
  }

  TensorRef const& ref() const { return ref_; }

  // Largest difference, relative for numbers beyond 1; NaN if any is.
  double difference(Array const& other) const {
    double worst = 0;
    for (std::size_t i = 0; i < size_; ++i) {
      double const expected = other.at(i);
      double const error = std::abs(at(i) - expected) / (1 + std::abs(expected));
      worst = error <= worst ? worst : error;
    }
    return worst;
  }

 private:
  double at(std::size_t i) const {
    return with_type(dtype_, ref_.data, [&](auto* elements) -> double { return cpu::to_float(elements[i]); });
  }

  DType dtype_;
  std::size_t size_;
  std::vector<double> memory_;  // large enough for every type
  TensorRef ref_;
};

Problem random_problem(DType dtype) {
  Problem p;
  p.dtype = dtype;
  p.rank = random_int(1, 3);
  for (int i = kMaxRank - p.rank; i < kMaxRank; ++i) {
    Axis& a = p.axes[i];
    a.boundary = static_cast<Boundary>(random_int(0, 2));
    a.dilation = random_int(1, 3);
    a.kernel_size = random_int(1, 6);
    a.stride = random_int(1, a.kernel_size);
    a.extent = a.kernel_size * a.dilation + random_int(0, p.rank == 1 ? 60 : 6);
    a.is_causal = random_int(0, 3) == 0;
    a.query_extent = a.key_extent = a.extent;
  }
  p.batch = random_int(1, 2);
  p.heads_kv = random_int(1, 2);
  p.heads = p.heads_kv * random_int(1, 2);
  p.head_dim = random_int(1, 40);
  p.head_dim_value = random_int(0, 1) ? p.head_dim : random_int(1, 40);
  p.additional_keys = random_int(0, 1) ? random_int(1, 5) : 0;
  p.has_rpb = random_int(0, 1) == 1;
  p.scale = 0.3;
  check(p);
  choose_tiles(p);
  return p;
}

// The tensors on a problem's query grid, key grid, and so on.
struct Shapes {
  explicit Shapes(Problem const& problem) : p(problem) {
    for (int i = 0; i < kMaxRank; ++i) {
      query[i] = p.axes[i].query_extent;
      key[i] = p.axes[i].key_extent;
      table[i] = 2 * p.axes[i].kernel_size - 1;
    }
  }
  Array of_query(int dim, Array::Fill fill) const { return {p.dtype, p.batch, query, p.heads, dim, fill}; }
  Array of_key(int dim, Array::Fill fill) const { return {p.dtype, p.batch, key, p.heads_kv, dim, fill}; }
  Array of_tokens(int dim, Array::Fill fill) const { return {p.dtype, p.batch, tokens, p.heads_kv, dim, fill}; }
  Array of_rows(Array::Fill fill) const { return {DType::kFloat32, p.batch, query, p.heads, 1, fill}; }
  Array of_bias(Array::Fill fill) const { return {DType::kFloat32, p.heads, table, 1, 1, fill}; }

  Problem const& p;
  int query[kMaxRank], key[kMaxRank], table[kMaxRank];
  int tokens[kMaxRank] = {1, 1, p.additional_keys};
};

struct Inputs {
  explicit Inputs(Shapes const& s, Array::Fill fill = Array::Fill::kRandom)
      : query(s.of_query(s.p.head_dim, fill)),
        key(s.of_key(s.p.head_dim, fill)),
        value(s.of_key(s.p.head_dim_value, fill)),
        additional_keys(s.of_tokens(s.p.head_dim, fill)),
        additional_values(s.of_tokens(s.p.head_dim_value, fill)),
        rpb(s.of_bias(fill)),
        output(s.of_query(s.p.head_dim_value, fill)),
        lse(s.of_rows(fill)) {}

  Array query, key, value, additional_keys, additional_values, rpb;
  Array output, lse;  // of gradients: those that arrive
};

// Of the inputs' names, the gradients; output and LSE are those of the forward pass.
using Results = Inputs;

Kernel const& kernel_of(std::string const& backend, Op op, Problem const& problem, std::string const& isa) {
  for (Candidate const& candidate : candidates(problem, op, backend, isa)) {
    if (candidate.reasons.empty()) return *candidate.kernel;
  }
  throw std::runtime_error("no kernel of " + backend + " for " + isa);
}

void run(std::string const& backend, std::string const& isa, Problem const& p, Inputs const& inputs,
         Inputs const& cotangents, Results& results) {
  ForwardArguments f;
  f.problem = p;
  f.query = inputs.query.ref();
  f.key = inputs.key.ref();
  f.value = inputs.value.ref();
  f.output = results.output.ref();
  f.lse = results.lse.ref();
  f.num_threads = 2;

  BackwardArguments b;
  b.d_output = cotangents.output.ref();
  b.d_lse = cotangents.lse.ref();
  b.d_query = results.query.ref();
  b.d_key = results.key.ref();
  b.d_value = results.value.ref();
  if (p.additional_keys) {
    f.additional_keys = inputs.additional_keys.ref();
    f.additional_values = inputs.additional_values.ref();
    b.d_additional_keys = results.additional_keys.ref();
    b.d_additional_values = results.additional_values.ref();
  }
  if (p.has_rpb) {
    f.rpb = inputs.rpb.ref().data;
    b.d_rpb = results.rpb.ref().data;
  }
  kernel_of(backend, Op::kForward, p, isa).forward(f);

  b.problem = p;
  b.query = f.query;
  b.key = f.key;
  b.value = f.value;
  b.additional_keys = f.additional_keys;
  b.additional_values = f.additional_values;
  b.rpb = f.rpb;
  b.output = f.output;
  b.lse = f.lse;
  b.num_threads = f.num_threads;
  kernel_of(backend, Op::kBackward, p, isa).backward(b);
}

bool agree(Problem const& p, std::string const& isa) {
  Shapes const shapes(p);
  Inputs const inputs(shapes), cotangents(shapes);
  Results fused(shapes, Array::Fill::kNan), naive(shapes, Array::Fill::kNan);
  run("fna", isa, p, inputs, cotangents, fused);
  run("naive", isa, p, inputs, cotangents, naive);

  // Both round once to the storage type; the fused kernels may round weights to it as well.
  double const tolerance = p.dtype == DType::kFloat32 ? 1e-4 : p.dtype == DType::kFloat16 ? 2e-2 : 1e-1;
  bool all = true;
  auto const compare = [&](char const* name, Array const& a, Array const& b) {
    double const difference = a.difference(b);
    if (difference <= tolerance) return;
    std::fprintf(stderr, "%s: %s off by %g\n", dtype_name(p.dtype).c_str(), name, difference);
    all = false;
  };
  compare("output", fused.output, naive.output);
  compare("lse", fused.lse, naive.lse);
  compare("d_query", fused.query, naive.query);
  compare("d_key", fused.key, naive.key);
  compare("d_value", fused.value, naive.value);
  if (p.additional_keys) {
    compare("d_additional_keys", fused.additional_keys, naive.additional_keys);
    compare("d_additional_values", fused.additional_values, naive.additional_values);
  }
  if (p.has_rpb) compare("d_rpb", fused.rpb, naive.rpb);
  return all;
}

}  // namespace

}  // namespace natten

int main() {
  using natten::DType;
  bool all = true;
  for (std::string const& isa : natten::cpu_isas()) {
    int count = 0, passed = 0;
    for (int i = 0; i < 60; ++i) {
      for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
        ++count;
        passed += natten::agree(natten::random_problem(dtype), isa);
      }
    }
    std::printf("%s: %d of %d problems agree\n", isa.c_str(), passed, count);
    all = all && passed == count;
  }
  return all ? 0 : 1;
}
