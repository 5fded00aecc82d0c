// SPDX-License-Identifier: MIT
// Random problems and their tensors, for the tests that are C++ programs.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>
#include <type_traits>
#include <vector>

#include "natten/arguments.hpp"
#include "natten/cpu/half.hpp"

namespace natten {

inline std::mt19937 generator(0);

inline int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

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

// A contiguous tensor [batch, axes, heads, dim], in memory of exactly its size.
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
    std::normal_distribution<double> normal;
    allocate([&](std::size_t) { return fill == Fill::kRandom ? normal(generator) : NAN; });
  }

  Array(Array const& other) : Array(other, other.dtype_) {}
  Array(Array&&) = default;
  Array& operator=(Array&&) = default;

  // The same numbers, rounded to another type.
  Array converted(DType dtype) const { return {*this, dtype}; }

  TensorRef const& ref() const { return ref_; }

  // NaN wherever `other` is.
  void poison(Array const& other) {
    with_type(dtype_, ref_.data, [&](auto* elements) {
      using Storage = std::remove_pointer_t<decltype(elements)>;
      for (std::size_t i = 0; i < size_; ++i) {
        if (std::isnan(other.at(i))) elements[i] = cpu::from_float<Storage>(NAN);
      }
    });
  }

  // Every number becomes change(number, row), numbered by [batch, axes, heads].
  template <class Change>
  void change(Change const& change) {
    with_type(dtype_, ref_.data, [&](auto* elements) {
      using Storage = std::remove_pointer_t<decltype(elements)>;
      for (std::size_t i = 0; i < size_; ++i) {
        elements[i] = cpu::from_float<Storage>(change(at(i), i / static_cast<std::size_t>(ref_.stride_head)));
      }
    });
  }

  // Largest difference, relative for numbers beyond 1; NaN if any is.
  double difference(Array const& other) const {
    double worst = 0;
    for (std::size_t i = 0; i < size_; ++i) {
      double const expected = other.at(i);
      if (at(i) == expected) continue;  // infinities too
      double const error = std::abs(at(i) - expected) / (1 + std::abs(expected));
      if (std::isnan(error)) return error;
      worst = std::max(worst, error);
    }
    return worst;
  }

  // element(place on each axis, column)
  template <class Element>
  void fill(Element const& element) {
    with_type(dtype_, ref_.data, [&](auto* elements) {
      using Storage = std::remove_pointer_t<decltype(elements)>;
      for (std::size_t i = 0; i < size_; ++i) {
        std::int64_t rest = static_cast<std::int64_t>(i) % ref_.stride_batch;
        int place[kMaxRank];
        for (int a = 0; a < kMaxRank; ++a) {
          place[a] = static_cast<int>(rest / ref_.stride_axis[a]);
          rest %= ref_.stride_axis[a];
        }
        elements[i] = cpu::from_float<Storage>(element(place, static_cast<int>(rest % ref_.stride_head)));
      }
    });
  }

  double at(std::size_t i) const {
    return with_type(dtype_, ref_.data, [&](auto* elements) -> double { return cpu::to_float(elements[i]); });
  }

 private:
  Array(Array const& other, DType dtype) : dtype_(dtype), size_(other.size_), ref_(other.ref_) {
    allocate([&](std::size_t i) { return other.at(i); });
  }

  template <class Element>
  void allocate(Element const& element) {
    with_type(dtype_, nullptr, [&](auto* type) {
      using Storage = std::remove_pointer_t<decltype(type)>;
      memory_.resize(std::max<std::size_t>(size_, 1) * sizeof(Storage));
      ref_.data = memory_.data();
      auto* const elements = static_cast<Storage*>(ref_.data);
      for (std::size_t i = 0; i < size_; ++i) elements[i] = cpu::from_float<Storage>(element(i));
    });
  }

  DType dtype_;
  std::size_t size_;
  std::vector<char> memory_;
  TensorRef ref_;
};

// Half of them whole vectors of 16 bytes, which are copied in other ways than any number of elements.
inline int random_head_dim(int most) {
  int const dim = random_int(1, most);
  return random_int(0, 1) == 1 ? std::min((dim + 7) / 8 * 8, most) : dim;
}

// `room`: how many tokens an axis may have beyond the smallest that its window fits into, by the rank.
inline Problem random_problem(DType dtype, int max_head_dim = 40, int const (&room)[kMaxRank] = {60, 6, 6},
                              int const (&max_kernel_size)[kMaxRank] = {6, 6, 6}) {
  Problem p;
  p.dtype = dtype;
  p.rank = random_int(1, 3);
  for (int i = kMaxRank - p.rank; i < kMaxRank; ++i) {
    Axis& a = p.axes[i];
    a.boundary = static_cast<Boundary>(random_int(0, 2));
    a.dilation = random_int(1, 3);
    a.kernel_size = random_int(1, max_kernel_size[p.rank - 1]);
    a.stride = random_int(1, a.kernel_size);
    a.extent = a.kernel_size * a.dilation + random_int(0, room[p.rank - 1]);
    a.is_causal = random_int(0, 3) == 0;
    a.query_extent = a.key_extent = a.extent;
  }
  p.batch = random_int(1, 2);
  p.heads_kv = random_int(1, 2);
  p.heads = p.heads_kv * random_int(1, 2);
  p.head_dim = random_head_dim(max_head_dim);
  p.head_dim_value = random_int(0, 1) ? p.head_dim : random_head_dim(max_head_dim);
  p.additional_keys = random_int(0, 1) ? random_int(1, 5) : 0;
  p.has_rpb = random_int(0, 1) == 1;
  constexpr double kScales[] = {0.3, 0.3, 0.3, 0.0, -0.2};
  p.scale = kScales[random_int(0, 4)];
  return p;
}

// The tensors on a problem's query grid, key grid, and so on.
struct Shapes {
  explicit Shapes(Problem const& problem) : p(problem) {
    for (int i = 0; i < kMaxRank; ++i) {
      query[i] = p.axes[i].query_extent;
      key[i] = p.axes[i].key_extent;
      table[i] = 2 * p.axes[i].kernel_size - 1;
      slots *= p.axes[i].kernel_size;
    }
  }
  Array of_query(int dim, Array::Fill fill) const { return {p.dtype, p.batch, query, p.heads, dim, fill}; }
  Array of_key(int dim, Array::Fill fill) const { return {p.dtype, p.batch, key, p.heads_kv, dim, fill}; }
  Array of_tokens(int dim, Array::Fill fill) const { return {p.dtype, p.batch, tokens, p.heads_kv, dim, fill}; }
  Array of_rows(Array::Fill fill) const { return {wide, p.batch, query, p.heads, 1, fill}; }
  Array of_bias(Array::Fill fill) const { return {wide, p.heads, table, 1, 1, fill}; }

  Problem const& p;
  DType wide = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  int query[kMaxRank], key[kMaxRank], table[kMaxRank], slots = 1;
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

  // The same numbers in float64.
  Inputs widened() const {
    Inputs other = *this;
    for (Array* array : {&other.query, &other.key, &other.value, &other.additional_keys, &other.additional_values,
                         &other.rpb, &other.output, &other.lse}) {
      *array = array->converted(DType::kFloat64);
    }
    return other;
  }

  Array query, key, value, additional_keys, additional_values, rpb;
  Array output, lse;  // of gradients: those that arrive
};

// Of the inputs' names, the gradients; output and LSE are those of the forward pass.
using Results = Inputs;

inline ForwardArguments forward_arguments(Problem const& p, Inputs const& inputs, Results& results) {
  ForwardArguments f;
  f.problem = p;
  f.query = inputs.query.ref();
  f.key = inputs.key.ref();
  f.value = inputs.value.ref();
  f.output = results.output.ref();
  f.lse = results.lse.ref();
  if (p.additional_keys) {
    f.additional_keys = inputs.additional_keys.ref();
    f.additional_values = inputs.additional_values.ref();
  }
  if (p.has_rpb) f.rpb = inputs.rpb.ref().data;
  return f;
}

// `results` hold the output and LSE already.
inline BackwardArguments backward_arguments(Problem const& p, Inputs const& inputs, Inputs const& cotangents,
                                            Results& results) {
  BackwardArguments b;
  b.problem = p;
  b.query = inputs.query.ref();
  b.key = inputs.key.ref();
  b.value = inputs.value.ref();
  b.output = results.output.ref();
  b.lse = results.lse.ref();
  b.d_output = cotangents.output.ref();
  b.d_lse = cotangents.lse.ref();
  b.d_query = results.query.ref();
  b.d_key = results.key.ref();
  b.d_value = results.value.ref();
  if (p.additional_keys) {
    b.additional_keys = inputs.additional_keys.ref();
    b.additional_values = inputs.additional_values.ref();
    b.d_additional_keys = results.additional_keys.ref();
    b.d_additional_values = results.additional_values.ref();
  }
  if (p.has_rpb) {
    b.rpb = inputs.rpb.ref().data;
    b.d_rpb = results.rpb.ref().data;
  }
  return b;
}

// The operands of the unfused ops; which of them is the result depends on the op.
struct UnfusedTensors {
  UnfusedTensors(Shapes const& s, Array::Fill fill)
      : query(s.of_query(s.p.head_dim, fill)),
        key(s.of_key(s.p.head_dim, fill)),
        weights(s.of_query(s.slots, fill)),
        rpb(s.of_bias(fill)) {}

  UnfusedTensors widened() const {
    UnfusedTensors other = *this;
    for (Array* array : {&other.query, &other.key, &other.weights, &other.rpb}) {
      *array = array->converted(DType::kFloat64);
    }
    return other;
  }
  Array& result_of(Op op) {
    return op == Op::kQk ? weights : op == Op::kAv ? query : op == Op::kAvTransposed ? key : rpb;
  }

  Array query, key, weights, rpb;
};

inline UnfusedArguments unfused_arguments(Problem const& p, Op op, UnfusedTensors const& tensors, double unused) {
  UnfusedArguments u;
  u.problem = p;
  u.query = tensors.query.ref();
  u.key = tensors.key.ref();
  u.weights = tensors.weights.ref();
  if (p.has_rpb && op == Op::kQk) u.rpb = tensors.rpb.ref().data;
  if (op == Op::kRpbGradient) u.d_rpb = tensors.rpb.ref().data;
  u.unused = unused;
  return u;
}

// Calls visit(name, array, array) for all that a problem has.
template <class Visit>
void compare_results(Problem const& p, Results const& a, Results const& b, Visit const& visit) {
  visit("output", a.output, b.output);
  visit("lse", a.lse, b.lse);
  visit("d_query", a.query, b.query);
  visit("d_key", a.key, b.key);
  visit("d_value", a.value, b.value);
  if (p.additional_keys) {
    visit("d_additional_keys", a.additional_keys, b.additional_keys);
    visit("d_additional_values", a.additional_values, b.additional_values);
  }
  if (p.has_rpb) visit("d_rpb", a.rpb, b.rpb);
}

}  // namespace natten
