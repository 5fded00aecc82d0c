// SPDX-License-Identifier: MIT
// Attention straight from its definition: one query (or key) at a time, any storage type, any head dim. The fallback for
// problems that no fused kernel takes, and the oracle that fused kernels are compared with.
//
// Every result is computed by one thread in an order that does not depend on how many there are: deterministic, and no
// atomics. Sums are float, for float64 problems double.
#pragma once

#include <atomic>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "natten/arguments.hpp"
#include "natten/cpu/half.hpp"
#include "natten/cpu/parallel.hpp"

namespace natten::cpu {

// What is summed in; also the type of LSE, its gradient, and the bias table.
template <class Storage>
using Accumulator = std::conditional_t<std::is_same_v<Storage, double>, double, float>;

// Runs body(task) for every task in [0, count), on several threads.
template <class Body>
void for_each_task(int num_threads, std::int64_t count, Body const& body) {
  struct Work {
    Body const& body;
    std::int64_t count;
    std::int64_t chunk;
    std::atomic<std::int64_t> next{0};
  };
  // Sixteen helpings a thread: tasks at borders are smaller than others.
  Work work{body, count, count / (16 * std::int64_t{max(num_threads, 1)}) + 1};
  int const useful_threads = static_cast<int>(count < num_threads ? count : num_threads);
  parallel_region(
      useful_threads,
      [](void* context, int) {
        Work& w = *static_cast<Work*>(context);
        for (std::int64_t begin; (begin = w.next.fetch_add(w.chunk)) < w.count;) {
          std::int64_t const end = begin + w.chunk < w.count ? begin + w.chunk : w.count;
          for (std::int64_t task = begin; task < end; ++task) w.body(task);
        }
      },
      &work);
}

// Splits a task number into coordinates, last one fastest.
struct TaskIndex {
  std::int64_t rest;
  int take(int size) {
    int const coordinate = static_cast<int>(rest % size);
    rest /= size;
    return coordinate;
  }
};

// `x` as a number of its type: no step of an operation that the compiler contracts, where a CPU multiplies and adds at once.
template <class Real>
NATTEN_INLINE Real rounded(Real x) {
#if defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

template <class Storage>
Accumulator<Storage> dot(Storage const* a, Storage const* b, int size) {
  // Eight sums, as the compiler may not reorder one.
  Accumulator<Storage> partial[8] = {};
  int i = 0;
  for (; i + 8 <= size; i += 8) {
    for (int j = 0; j < 8; ++j) partial[j] += to_float(a[i + j]) * to_float(b[i + j]);
  }
  for (; i < size; ++i) partial[0] += to_float(a[i]) * to_float(b[i]);
  Accumulator<Storage> sum = 0;
  for (auto const p : partial) sum += p;
  return sum;
}

// sum += weight * row
template <class Storage>
void add_scaled(Accumulator<Storage>* sum, Accumulator<Storage> weight, Storage const* row, int size) {
  for (int i = 0; i < size; ++i) sum[i] += weight * to_float(row[i]);
}

template <class Storage>
void store(Storage* row, Accumulator<Storage> const* sum, Accumulator<Storage> factor, int size) {
  for (int i = 0; i < size; ++i) row[i] = from_float<Storage>(sum[i] * factor);
}

// A token's place on one axis, and an interval of positions in its dilation group: the window of a query, the inverse
// window of a key, or what of them is wanted.
struct Place {
  Group const* group;
  int position;
  Interval others;
};

// A token's place on all axes.
struct Token {
  Place axis[kMaxRank];
};

// The grid of a problem: finds the keys of a query and the queries of a key, by tensor coordinates.
class Grid {
 public:
  explicit Grid(Problem const& problem) {
    for (int i = 0; i < kMaxRank; ++i) {
      axes_[i] = problem.axes[i];
      for (int g = 0; g < axes_[i].groups(); ++g) groups_[i].push_back(axes_[i].group(g));
    }
  }

  std::int64_t num_queries() const {
    return std::int64_t{axes_[0].query_extent} * axes_[1].query_extent * axes_[2].query_extent;
  }
  std::int64_t num_keys() const {
    return std::int64_t{axes_[0].key_extent} * axes_[1].key_extent * axes_[2].key_extent;
  }

  // `x` becomes the coordinates of the query (key) in its tensor.
  Token query(TaskIndex& index, int (&x)[kMaxRank]) const {
    return token(index, x, &Axis::query_origin, &Axis::query_extent, &Group::window);
  }
  Token key(TaskIndex& index, int (&x)[kMaxRank]) const {
    return token(index, x, &Axis::key_origin, &Axis::key_extent, &Group::inverse);
  }

  // visit(x, offset) for every key in the query's window: its coordinates, and its position minus the query's.
  template <class Visit>
  void for_each_key(Token const& query, Visit const& visit) const {
    for_each(query, &Axis::key_origin, visit);
  }
  // visit(x, offset) for every query in the key's inverse window: its coordinates, and its position minus the key's.
  template <class Visit>
  void for_each_query(Token const& key, Visit const& visit) const {
    for_each(key, &Axis::query_origin, visit);
  }

  // Keys that a query with boundary "zeros" misses.
  static double num_missing(Token const& query) {
    int counted[kMaxRank], present[kMaxRank];
    for (int i = 0; i < kMaxRank; ++i) {
      counted[i] = query.axis[i].group->counted(query.axis[i].position);
      present[i] = query.axis[i].others.size();
    }
    return missing_keys(counted, present);
  }

 private:
  Token token(TaskIndex& index, int (&x)[kMaxRank], int Axis::* origin, int Axis::* extent,
              Interval (Group::*others)(int) const) const {
    Token token;
    for (int i = kMaxRank - 1; i >= 0; --i) {
      x[i] = index.take(axes_[i].*extent);
      int const place = x[i] + axes_[i].*origin;
      Group const& group = groups_[i][place % axes_[i].dilation];
      int const position = place / axes_[i].dilation;
      token.axis[i] = {&group, position, (group.*others)(position)};
    }
    return token;
  }

  template <class Visit>
  void for_each(Token const& token, int Axis::* origin, Visit const& visit) const {
    int x[kMaxRank], offset[kMaxRank];
    auto const loop = [&](auto const& self, int i) -> void {
      if (i == kMaxRank) return visit(x, offset);
      Place const& place = token.axis[i];
      for (int other = place.others.begin; other < place.others.end; ++other) {
        x[i] = other * axes_[i].dilation + place.group->index - axes_[i].*origin;
        offset[i] = other - place.position;
        self(self, i + 1);
      }
    };
    loop(loop, 0);
  }

  Axis axes_[kMaxRank];
  std::vector<Group> groups_[kMaxRank];
};

// The softmax of a query, key by key: the weights so far are relative to the largest logit so far.
template <class Storage>
class OnlineSoftmax {
 public:
  using Real = Accumulator<Storage>;

  // `sum` is room for a row of values.
  OnlineSoftmax(Real* sum, int size) : sum_(sum), size_(size) {
    for (int i = 0; i < size; ++i) sum_[i] = 0;
  }

  void add(Real logit, Storage const* value) {
    if (logit == -kInfinity) return;
    raise_maximum(logit);
    Real const weight = std::exp(logit - maximum_);
    denominator_ += weight;
    add_scaled(sum_, weight, value, size_);
  }
  // A key of which the value does not matter, as the size of its row is 0.
  void add(Real logit) { add(logit, nullptr); }
  // `count` keys with logit 0 and value 0.
  void add_zeros(double count) {
    if (count == 0) return;
    raise_maximum(0);
    denominator_ += static_cast<Real>(count) * std::exp(-maximum_);
  }

  // A row without keys is 0, and its LSE -inf.
  void store_to(Storage* output) const { store(output, sum_, denominator_ == 0 ? Real{0} : 1 / denominator_, size_); }
  Real lse() const { return maximum_ + log_sum(); }
  // LSE in two numbers, the largest logit and the logarithm of the sum of weights relative to it.
  Real maximum() const { return maximum_; }
  Real log_sum() const { return std::log(denominator_); }

 private:
  static constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

  void raise_maximum(Real logit) {
    if (!(logit > maximum_)) return;
    Real const factor = std::exp(maximum_ - logit);
    for (int i = 0; i < size_; ++i) sum_[i] *= factor;
    denominator_ *= factor;
    maximum_ = logit;
  }

  Real* sum_;
  int size_;
  Real maximum_ = -kInfinity;
  Real denominator_ = 0;
};

// Typed access to the tensors of a call, and the logit. `Arguments` is ForwardArguments or BackwardArguments.
template <class Storage, class Arguments>
struct Tensors {
  using Real = Accumulator<Storage>;

  Arguments const& arguments;
  Problem const& problem = arguments.problem;
  Real scale = static_cast<Real>(problem.scale);

  template <class T = Storage>
  static T* row(TensorRef const& tensor, std::int64_t batch, int head, int const (&x)[kMaxRank]) {
    return static_cast<T*>(tensor.data) + tensor.offset(batch, head, x[0], x[1], x[2]);
  }
  // Additional tokens lie along axis 2.
  static Storage* additional_row(TensorRef const& tensor, std::int64_t batch, int head, int token) {
    return static_cast<Storage*>(tensor.data) + tensor.offset(batch, head, 0, 0, token);
  }

  // Where the bias table of `head` holds the entry of a key that lies `offset` positions behind the query.
  std::int64_t rpb_index(int head, int const (&offset)[kMaxRank]) const {
    std::int64_t index = head;
    for (int i = 0; i < kMaxRank; ++i) {
      int const kernel_size = problem.axes[i].kernel_size;
      index = index * (2 * kernel_size - 1) + offset[i] + kernel_size - 1;
    }
    return index;
  }

  // The same number for whoever subtracts something from it: from itself, the largest differs by 0.
  Real logit(Storage const* query, Storage const* key) const {
    return rounded(scale * dot(query, key, problem.head_dim));
  }
  Real logit(Storage const* query, Storage const* key, int head, int const (&offset)[kMaxRank]) const {
    Real const bias = arguments.rpb ? static_cast<Real const*>(arguments.rpb)[rpb_index(head, offset)] : Real{0};
    return logit(query, key) + bias;
  }
};

template <class Storage>
void naive_forward(ForwardArguments const& a) {
  using Real = Accumulator<Storage>;
  Problem const& problem = a.problem;
  Tensors<Storage, ForwardArguments> const t{a};
  Grid const grid(problem);

  std::int64_t const num_rows = problem.batch * grid.num_queries() * problem.heads;
  for_each_task(a.num_threads, num_rows, [&](std::int64_t task) {
    TaskIndex index{task};
    int const head = index.take(problem.heads);
    int const head_kv = head / problem.group_size();
    int x[kMaxRank];
    Token const token = grid.query(index, x);
    std::int64_t const batch = index.rest;

    int const dim = problem.head_dim_value;
    OnlineSoftmax<Storage> softmax(static_cast<Real*>(thread_workspace(dim * sizeof(Real))), dim);
    Storage const* query = t.row(a.query, batch, head, x);
    grid.for_each_key(token, [&](int const(&y)[kMaxRank], int const(&offset)[kMaxRank]) {
      softmax.add(t.logit(query, t.row(a.key, batch, head_kv, y), head, offset), t.row(a.value, batch, head_kv, y));
    });
    for (int j = 0; j < problem.additional_keys; ++j) {
      softmax.add(t.logit(query, t.additional_row(a.additional_keys, batch, head_kv, j)),
                  t.additional_row(a.additional_values, batch, head_kv, j));
    }
    softmax.add_zeros(grid.num_missing(token));
    softmax.store_to(t.row(a.output, batch, head, x));
    *t.template row<Real>(a.lse, batch, head, x) = softmax.lse();
  });
}

// Gradients. With P the attention weights and dP = dO V^T, the gradient of the logits is dS = P (dP - delta), where
// delta = rowsum(dO O) - dLSE. Every pass below computes the P and dS it needs anew.
//
// P is exp(logit - LSE), where LSE is not so large that rounding it has changed P; there, of a softmax computed again.
template <class Storage>
class NaiveBackward {
 public:
  using Real = Accumulator<Storage>;

  explicit NaiveBackward(BackwardArguments const& arguments)
      : a_(arguments),
        grid_(arguments.problem),
        num_rows_(problem_.batch * grid_.num_queries() * problem_.heads),
        stats_(static_cast<RowStats*>(take_scratch(num_rows_ * sizeof(RowStats)))) {}
  ~NaiveBackward() { return_scratch(stats_); }
  NaiveBackward(NaiveBackward const&) = delete;
  NaiveBackward& operator=(NaiveBackward const&) = delete;

  void run() {
    compute_stats();
    compute_d_query();
    compute_d_key_value();
    compute_d_additional();
    if (a_.d_rpb) compute_d_rpb();
  }

 private:
  // LSE is that of the logits minus `maximum`, plus `maximum`.
  struct RowStats {
    Real maximum;
    Real log_sum;
    Real delta;
  };
  // What the backward pass knows of a query, and of its weight for a key.
  struct QueryRow {
    Storage const* query;
    Storage const* d_output;
    RowStats stats;
  };
  struct Weight {
    Real probability;  // P
    Real d_logit;  // dS
  };

  QueryRow query_row(std::int64_t batch, int head, int const (&x)[kMaxRank]) const {
    return {t_.row(a_.query, batch, head, x), t_.row(a_.d_output, batch, head, x), stats_[row_index(batch, head, x)]};
  }

  std::int64_t row_index(std::int64_t batch, int head, int const (&x)[kMaxRank]) const {
    std::int64_t index = batch;
    for (int i = 0; i < kMaxRank; ++i) index = index * problem_.axes[i].query_extent + x[i];
    return index * problem_.heads + head;
  }

  Weight weight(QueryRow const& row, Real logit, Storage const* value) const {
    // A row without weights has no gradient; exp(-inf - -inf) would be NaN.
    if (row.stats.maximum == -std::numeric_limits<Real>::infinity()) return {0, 0};
    Real const probability = std::exp(logit - row.stats.maximum - row.stats.log_sum);
    return {probability, probability * (dot(row.d_output, value, problem_.head_dim_value) - row.stats.delta)};
  }

  // body(batch, head, x, token) for every row of the query tensor.
  template <class Body>
  void for_each_query_row(Body const& body) const {
    for_each_task(a_.num_threads, num_rows_, [&](std::int64_t task) {
      TaskIndex index{task};
      int const head = index.take(problem_.heads);
      int x[kMaxRank];
      Token const token = grid_.query(index, x);
      body(index.rest, head, x, token);
    });
  }

  void compute_stats() {
    for_each_query_row([&](std::int64_t batch, int head, int const(&x)[kMaxRank], Token const& token) {
      Real const d_lse = a_.d_lse ? *t_.template row<Real>(a_.d_lse, batch, head, x) : Real{0};
      Storage const* const d_output = t_.row(a_.d_output, batch, head, x);
      RowStats& stats = stats_[row_index(batch, head, x)];
      stats.delta = dot(d_output, t_.row(a_.output, batch, head, x), problem_.head_dim_value) - d_lse;
      stats.maximum = *t_.template row<Real>(a_.lse, batch, head, x);
      stats.log_sum = 0;
      if (!is_coarse_lse(stats.maximum)) return;
      OnlineSoftmax<Storage> softmax(nullptr, 0);
      Storage const* const query = t_.row(a_.query, batch, head, x);
      int const head_kv = head / problem_.group_size();
      grid_.for_each_key(token, [&](int const(&y)[kMaxRank], int const(&offset)[kMaxRank]) {
        softmax.add(t_.logit(query, t_.row(a_.key, batch, head_kv, y), head, offset));
      });
      for (int j = 0; j < problem_.additional_keys; ++j) {
        softmax.add(t_.logit(query, t_.additional_row(a_.additional_keys, batch, head_kv, j)));
      }
      softmax.add_zeros(Grid::num_missing(token));
      stats.maximum = softmax.maximum();
      stats.log_sum = softmax.log_sum();
    });
  }

  void compute_d_query() {
    int const dim = problem_.head_dim;
    for_each_query_row([&](std::int64_t batch, int head, int const(&x)[kMaxRank], Token const& token) {
      int const head_kv = head / problem_.group_size();
      QueryRow const row = query_row(batch, head, x);
      Real* sum = zeros(dim);
      auto const add = [&](Storage const* key, Storage const* value, Real logit) {
        add_scaled(sum, weight(row, logit, value).d_logit, key, dim);
      };
      grid_.for_each_key(token, [&](int const(&y)[kMaxRank], int const(&offset)[kMaxRank]) {
        Storage const* key = t_.row(a_.key, batch, head_kv, y);
        add(key, t_.row(a_.value, batch, head_kv, y), t_.logit(row.query, key, head, offset));
      });
      for (int j = 0; j < problem_.additional_keys; ++j) {
        Storage const* key = t_.additional_row(a_.additional_keys, batch, head_kv, j);
        add(key, t_.additional_row(a_.additional_values, batch, head_kv, j), t_.logit(row.query, key));
      }
      store(t_.row(a_.d_query, batch, head, x), sum, t_.scale, dim);
    });
  }

  // dK and dV of one key, summed over the queries that attend to it.
  struct KeySums {
    Real* d_key;
    Real* d_value;
  };
  KeySums key_sums() const {
    Real* d_key = zeros(problem_.head_dim + problem_.head_dim_value);
    return {d_key, d_key + problem_.head_dim};
  }
  void add(KeySums const& sums, QueryRow const& row, Real logit, Storage const* value) const {
    Weight const w = weight(row, logit, value);
    add_scaled(sums.d_key, w.d_logit, row.query, problem_.head_dim);
    add_scaled(sums.d_value, w.probability, row.d_output, problem_.head_dim_value);
  }
  void store_sums(KeySums const& sums, Storage* d_key, Storage* d_value) const {
    store(d_key, sums.d_key, t_.scale, problem_.head_dim);
    store(d_value, sums.d_value, Real{1}, problem_.head_dim_value);
  }

  void compute_d_key_value() {
    for_each_task(a_.num_threads, problem_.batch * grid_.num_keys() * problem_.heads_kv, [&](std::int64_t task) {
      TaskIndex index{task};
      int const head_kv = index.take(problem_.heads_kv);
      int y[kMaxRank];
      Token const token = grid_.key(index, y);
      std::int64_t const batch = index.rest;
      Storage const* key = t_.row(a_.key, batch, head_kv, y);
      Storage const* value = t_.row(a_.value, batch, head_kv, y);
      KeySums const sums = key_sums();
      for_each_head(head_kv, [&](int head) {
        grid_.for_each_query(token, [&](int const(&x)[kMaxRank], int const(&offset)[kMaxRank]) {
          QueryRow const row = query_row(batch, head, x);
          add(sums, row, t_.logit(row.query, key, head, {-offset[0], -offset[1], -offset[2]}), value);
        });
      });
      store_sums(sums, t_.row(a_.d_key, batch, head_kv, y), t_.row(a_.d_value, batch, head_kv, y));
    });
  }

  void compute_d_additional() {
    std::int64_t const count = problem_.batch * problem_.additional_keys * problem_.heads_kv;
    for_each_task(a_.num_threads, count, [&](std::int64_t task) {
      TaskIndex index{task};
      int const head_kv = index.take(problem_.heads_kv);
      int const j = index.take(problem_.additional_keys);
      std::int64_t const batch = index.rest;
      Storage const* key = t_.additional_row(a_.additional_keys, batch, head_kv, j);
      Storage const* value = t_.additional_row(a_.additional_values, batch, head_kv, j);
      KeySums const sums = key_sums();
      for_each_head(head_kv, [&](int head) {
        for_each_query([&](int const(&x)[kMaxRank], Token const&) {
          QueryRow const row = query_row(batch, head, x);
          add(sums, row, t_.logit(row.query, key), value);
        });
      });
      store_sums(sums, t_.additional_row(a_.d_additional_keys, batch, head_kv, j),
                 t_.additional_row(a_.d_additional_values, batch, head_kv, j));
    });
  }

  // One entry of the table at a time: every query has at most one key that lies there.
  void compute_d_rpb() {
    int size[kMaxRank];
    for (int i = 0; i < kMaxRank; ++i) size[i] = 2 * problem_.axes[i].kernel_size - 1;
    std::int64_t const count = std::int64_t{problem_.heads} * size[0] * size[1] * size[2];
    for_each_task(a_.num_threads, count, [&](std::int64_t task) {
      TaskIndex index{task};
      int offset[kMaxRank];
      for (int i = kMaxRank - 1; i >= 0; --i) offset[i] = index.take(size[i]) - problem_.axes[i].kernel_size + 1;
      int const head = static_cast<int>(index.rest);
      int const head_kv = head / problem_.group_size();
      Real sum = 0;
      for (std::int64_t batch = 0; batch < problem_.batch; ++batch) {
        for_each_query([&](int const(&x)[kMaxRank], Token const& token) {
          Token pair = token;
          for (int i = 0; i < kMaxRank; ++i) {
            int const key = token.axis[i].position + offset[i];
            if (!token.axis[i].others.contains(key)) return;
            pair.axis[i].others = {key, key + 1};
          }
          grid_.for_each_key(pair, [&](int const(&y)[kMaxRank], int const(&)[kMaxRank]) {
            QueryRow const row = query_row(batch, head, x);
            Real const logit = t_.logit(row.query, t_.row(a_.key, batch, head_kv, y), head, offset);
            sum += weight(row, logit, t_.row(a_.value, batch, head_kv, y)).d_logit;
          });
        });
      }
      static_cast<Real*>(a_.d_rpb)[task] = sum;
    });
  }

  // body(x, token) for every query of one batch and head, on the calling thread.
  template <class Body>
  void for_each_query(Body const& body) const {
    for (std::int64_t i = 0; i < grid_.num_queries(); ++i) {
      TaskIndex index{i};
      int x[kMaxRank];
      Token const token = grid_.query(index, x);
      body(x, token);
    }
  }

  // The query heads that read a key head.
  template <class Body>
  void for_each_head(int head_kv, Body const& body) const {
    int const group_size = problem_.group_size();
    for (int head = head_kv * group_size; head < (head_kv + 1) * group_size; ++head) body(head);
  }

  static Real* zeros(int size) {
    Real* sum = static_cast<Real*>(thread_workspace(size * sizeof(Real)));
    for (int i = 0; i < size; ++i) sum[i] = 0;
    return sum;
  }

  BackwardArguments const& a_;
  Problem const& problem_ = a_.problem;
  Tensors<Storage, BackwardArguments> const t_{a_};
  Grid grid_;
  std::int64_t num_rows_;  // of the query tensor
  RowStats* stats_;  // of every row
};

template <class Storage>
void naive_backward(BackwardArguments const& arguments) {
  NaiveBackward<Storage>(arguments).run();
}

}  // namespace natten::cpu
