// SPDX-License-Identifier: MIT
// The unfused ops straight from their definition (UnfusedArguments), any storage type, any head dim: the fallback of the
// "gemm" kernels, and what they are compared with. Like the naive fused kernels, every result is summed by one thread in
// an order that does not depend on how many there are.
#pragma once

#include "natten/cpu/naive.hpp"

namespace natten::cpu {

// The slots of a query's weights.
class Slots {
 public:
  explicit Slots(Problem const& problem) {
    for (int i = 0; i < kMaxRank; ++i) size_[i] = problem.axes[i].kernel_size;
  }

  // Of the key in `query`'s window that lies `offset` positions behind it.
  std::int64_t of_key(Token const& query, int const (&offset)[kMaxRank]) const {
    return at([&](int i) { return query.axis[i].position + offset[i] - query.axis[i].others.begin; });
  }
  // Of `key`, for the query in its inverse window that lies `offset` positions behind it.
  std::int64_t of_query(Token const& key, int const (&offset)[kMaxRank]) const {
    return at([&](int i) {
      Place const& place = key.axis[i];
      return place.position - place.group->window(place.position + offset[i]).begin;
    });
  }

  // `row` before any key is seen: 0 for the keys that `query` counts, and `unused` behind them.
  template <class Storage>
  void clear(Token const& query, Storage unused, Storage* row) const {
    std::int64_t const count = std::int64_t{size_[0]} * size_[1] * size_[2];
    for (std::int64_t slot = 0; slot < count; ++slot) {
      TaskIndex index{slot};
      bool is_counted = true;
      for (int i = kMaxRank - 1; i >= 0; --i) {
        Place const& place = query.axis[i];
        is_counted &= index.take(size_[i]) < place.group->counted(place.position);
      }
      row[slot] = is_counted ? Storage{} : unused;
    }
  }

 private:
  template <class OnAxis>
  std::int64_t at(OnAxis const& on_axis) const {
    std::int64_t slot = 0;
    for (int i = 0; i < kMaxRank; ++i) slot = slot * size_[i] + on_axis(i);
    return slot;
  }

  int size_[kMaxRank];
};

// What the four kernels share. `body` is called for every row of the tensors on the query (key) grid, by several threads.
template <class Storage>
struct NaiveUnfused {
  using Real = Accumulator<Storage>;

  UnfusedArguments const& arguments;
  Problem const& problem = arguments.problem;
  Tensors<Storage, UnfusedArguments> tensors{arguments};
  Grid grid{problem};
  Slots slots{problem};

  template <class Body>
  void for_each_query_row(Body const& body) const {
    for_each_task(arguments.num_threads, problem.batch * grid.num_queries() * problem.heads, [&](std::int64_t task) {
      TaskIndex index{task};
      int const head = index.take(problem.heads);
      int x[kMaxRank];
      Token const query = grid.query(index, x);
      body(index.rest, head, x, query);
    });
  }
  template <class Body>
  void for_each_key_row(Body const& body) const {
    for_each_task(arguments.num_threads, problem.batch * grid.num_keys() * problem.heads_kv, [&](std::int64_t task) {
      TaskIndex index{task};
      int const head = index.take(problem.heads_kv);
      int x[kMaxRank];
      Token const key = grid.key(index, x);
      body(index.rest, head, x, key);
    });
  }

  // Stores to `row` what `visit_all(add)` adds up: add(weight, other row).
  template <class VisitAll>
  void store_sum(Storage* row, VisitAll const& visit_all) const {
    int const dim = problem.head_dim;
    Real* const sum = static_cast<Real*>(thread_workspace(dim * sizeof(Real)));
    for (int i = 0; i < dim; ++i) sum[i] = 0;
    visit_all([&](Storage weight, Storage const* other) { add_scaled<Storage>(sum, to_float(weight), other, dim); });
    store(row, sum, Real{1}, dim);
  }
};

template <class Storage>
void naive_qk(UnfusedArguments const& a) {
  using Real = Accumulator<Storage>;
  NaiveUnfused<Storage> const n{a};
  Real const* const rpb = static_cast<Real const*>(a.rpb);
  n.for_each_query_row([&](std::int64_t batch, int head, int const(&x)[kMaxRank], Token const& query) {
    Storage* const weights = n.tensors.row(a.weights, batch, head, x);
    Storage const* const row = n.tensors.row(a.query, batch, head, x);
    n.slots.clear(query, from_float<Storage>(a.unused), weights);
    n.grid.for_each_key(query, [&](int const(&y)[kMaxRank], int const(&offset)[kMaxRank]) {
      Real logit = dot(row, n.tensors.row(a.key, batch, head / n.problem.group_size(), y), n.problem.head_dim);
      if (rpb != nullptr) logit += rpb[n.tensors.rpb_index(head, offset)];
      weights[n.slots.of_key(query, offset)] = from_float<Storage>(logit);
    });
  });
}

template <class Storage>
void naive_av(UnfusedArguments const& a) {
  NaiveUnfused<Storage> const n{a};
  n.for_each_query_row([&](std::int64_t batch, int head, int const(&x)[kMaxRank], Token const& query) {
    Storage const* const weights = n.tensors.row(a.weights, batch, head, x);
    n.store_sum(n.tensors.row(a.query, batch, head, x), [&](auto const& add) {
      n.grid.for_each_key(query, [&](int const(&y)[kMaxRank], int const(&offset)[kMaxRank]) {
        add(weights[n.slots.of_key(query, offset)], n.tensors.row(a.key, batch, head / n.problem.group_size(), y));
      });
    });
  });
}

template <class Storage>
void naive_av_transposed(UnfusedArguments const& a) {
  NaiveUnfused<Storage> const n{a};
  int const group_size = n.problem.group_size();
  n.for_each_key_row([&](std::int64_t batch, int head_kv, int const(&y)[kMaxRank], Token const& key) {
    n.store_sum(n.tensors.row(a.key, batch, head_kv, y), [&](auto const& add) {
      for (int head = head_kv * group_size; head < (head_kv + 1) * group_size; ++head) {
        n.grid.for_each_query(key, [&](int const(&x)[kMaxRank], int const(&offset)[kMaxRank]) {
          add(n.tensors.row(a.weights, batch, head, x)[n.slots.of_query(key, offset)],
              n.tensors.row(a.query, batch, head, x));
        });
      }
    });
  });
}

// One entry of the table at a time: every query has at most one key that lies there.
template <class Storage>
void naive_rpb_gradient(UnfusedArguments const& a) {
  using Real = Accumulator<Storage>;
  NaiveUnfused<Storage> const n{a};
  int size[kMaxRank];
  for (int i = 0; i < kMaxRank; ++i) size[i] = 2 * n.problem.axes[i].kernel_size - 1;
  std::int64_t const entries = std::int64_t{n.problem.heads} * size[0] * size[1] * size[2];
  for_each_task(a.num_threads, entries, [&](std::int64_t task) {
    TaskIndex entry{task};
    int offset[kMaxRank];
    for (int i = kMaxRank - 1; i >= 0; --i) offset[i] = entry.take(size[i]) - n.problem.axes[i].kernel_size + 1;
    int const head = static_cast<int>(entry.rest);
    Real sum = 0;
    for (std::int64_t row = 0; row < n.problem.batch * n.grid.num_queries(); ++row) {
      TaskIndex index{row};
      int x[kMaxRank];
      Token const query = n.grid.query(index, x);
      bool is_attended = true;
      for (int i = 0; i < kMaxRank; ++i) {
        is_attended &= query.axis[i].others.contains(query.axis[i].position + offset[i]);
      }
      if (!is_attended) continue;
      sum += to_float(n.tensors.row(a.weights, index.rest, head, x)[n.slots.of_key(query, offset)]);
    }
    static_cast<Real*>(a.d_rpb)[task] = sum;
  });
}

}  // namespace natten::cpu
