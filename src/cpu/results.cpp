// SPDX-License-Identifier: MIT
#include "cpu/results.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

#include "natten/cpu/parallel.hpp"

namespace natten::cpu {

namespace {

constexpr std::uintptr_t kHugePage = 2 << 20;
constexpr std::uintptr_t kLargeResult = 2 * kHugePage;  // holds a whole huge page, wherever it begins

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

// glibc returns freed memory beyond a threshold to the system, and maps every piece beyond another one anew. Both grow with
// what a program frees, up to those of 32 MB: results of 1 MB became fresh pages in every other call until some tensor
// happened to be larger. This frees such a piece, which was never touched; thresholds that a user has set stay as they are.
void let_malloc_keep_results() {
#ifdef __GLIBC__
  constexpr std::size_t kLargest = (32 << 20) - (64 << 10);
  static bool const is_done = [] {
    void* volatile piece = std::malloc(kLargest);
    std::free(piece);
    return true;
  }();
  static_cast<void>(is_done);
#endif
}

// Part of a result, from page to page.
struct Pages {
  std::uintptr_t begin;
  std::uintptr_t end;

  // Visits pieces that a huge page has room for.
  template <class Visit>
  void for_each_piece(Visit const& visit) const {
    for (std::uintptr_t at = begin; at < end;) {
      std::uintptr_t const next = (at / kHugePage + 1) * kHugePage;
      visit(Pages{at, next < end ? next : end});
      at = next;
    }
  }

  bool are_there() const {
    unsigned char first = 0;
    return mincore(reinterpret_cast<void*>(begin), 1, &first) != 0 || (first & 1) != 0;
  }
  // Where the system does not know the advice, nothing happens: the kernel finds fresh pages, as without it.
  void advise(int advice) const { static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, advice)); }
};

// Lets all threads touch what is not there yet. When they do it in the kernel, which goes through the heads of the same tokens
// side by side, two of them are stopped for a page, and clear a huge one each.
void touch(Pages const& pages, int num_threads) {
  bool are_there = true;
  pages.for_each_piece([&](Pages const& piece) { are_there = are_there && piece.are_there(); });
  if (are_there) return;
  struct Context {
    Pages pages;
    std::atomic<std::uintptr_t> next;
  } context{pages, {pages.begin / kHugePage}};
  parallel_region(
      num_threads,
      [](void* pointer, int) {
        Context& c = *static_cast<Context*>(pointer);
        for (;;) {
          std::uintptr_t const at = c.next.fetch_add(1, std::memory_order_relaxed) * kHugePage;
          if (at >= c.pages.end) return;
          Pages const piece{at < c.pages.begin ? c.pages.begin : at,
                            at + kHugePage < c.pages.end ? at + kHugePage : c.pages.end};
          if (!piece.are_there()) piece.advise(MADV_POPULATE_WRITE);
        }
      },
      &context);
}

void provide(void* data, std::int64_t bytes, int num_threads) {
  constexpr std::int64_t kMapped = 128 << 10;  // what glibc maps anew, before it has learned better
  if (data == nullptr || bytes < kMapped) return;
  let_malloc_keep_results();
  if (bytes < static_cast<std::int64_t>(kLargeResult)) return;
  static auto const page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  auto const address = reinterpret_cast<std::uintptr_t>(data);
  Pages const pages{(address + page - 1) / page * page, (address + static_cast<std::uintptr_t>(bytes)) / page * page};
  pages.advise(MADV_HUGEPAGE);
  touch(pages, num_threads);
}

std::int64_t bytes_of(DType dtype) {
  if (dtype == DType::kFloat64) return 8;
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Results of a call, which are contiguous.
class Results {
 public:
  Results(Problem const& problem, int num_threads) : problem_(problem), num_threads_(num_threads) {}

  void of_queries(TensorRef const& tensor, std::int64_t elements, std::int64_t element) const {
    provide(tensor.data, tokens(&Axis::query_extent) * problem_.heads * elements * element, num_threads_);
  }
  void of_keys(TensorRef const& tensor, std::int64_t elements) const {
    provide(tensor.data, tokens(&Axis::key_extent) * problem_.heads_kv * elements * bytes_of(problem_.dtype),
            num_threads_);
  }
  void of_queries(TensorRef const& tensor, std::int64_t elements) const {
    of_queries(tensor, elements, bytes_of(problem_.dtype));
  }

 private:
  std::int64_t tokens(int Axis::* extent) const {
    std::int64_t count = problem_.batch;
    for (Axis const& axis : problem_.axes) count *= axis.*extent;
    return count;
  }

  Problem const& problem_;
  int num_threads_;
};

}  // namespace

void provide_pages(ForwardArguments const& a, Op) {
  Results const results(a.problem, a.num_threads);
  results.of_queries(a.output, a.problem.head_dim_value);
  results.of_queries(a.lse, 1, a.problem.dtype == DType::kFloat64 ? 8 : 4);
}

void provide_pages(BackwardArguments const& a, Op) {
  Results const results(a.problem, a.num_threads);
  results.of_queries(a.d_query, a.problem.head_dim);
  results.of_keys(a.d_key, a.problem.head_dim);
  results.of_keys(a.d_value, a.problem.head_dim_value);
}

void provide_pages(UnfusedArguments const& a, Op op) {
  Results const results(a.problem, a.num_threads);
  if (op == Op::kQk) {
    std::int64_t slots = 1;
    for (Axis const& axis : a.problem.axes) slots *= axis.kernel_size;
    results.of_queries(a.weights, slots);
  } else if (op == Op::kAv) {
    results.of_queries(a.query, a.problem.head_dim);
  } else if (op == Op::kAvTransposed) {
    results.of_keys(a.key, a.problem.head_dim);
  }
}

}  // namespace natten::cpu
