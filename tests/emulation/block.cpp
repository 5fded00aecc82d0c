// SPDX-License-Identifier: MIT
// Compiled without ThreadSanitizer's instrumentation even where the kernels have it: what lanes hand each other in
// registers orders no memory.
#include "emulation/simt.hpp"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "copies.hpp"
#include "emulation/builtins.hpp"
#include "fiber.hpp"

__thread uint3 threadIdx;
__thread uint3 blockIdx;
__thread uint3 blockDim;
__thread uint3 gridDim;

namespace natten::emulation {
namespace {

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {}
  int below(int bound) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<int>((state_ >> 32) * static_cast<std::uint64_t>(bound) >> 32);
  }

 private:
  std::uint64_t state_;
};

struct Settings {
  int seed = 0;
  bool copies_are_late = true;
  int threads = 0;

  static Settings read() {
    Settings s;
    if (char const* seed = std::getenv("NATTEN_EMULATION_SEED")) s.seed = std::atoi(seed);
    if (char const* copies = std::getenv("NATTEN_EMULATION_COPIES")) s.copies_are_late = std::string(copies) != "early";
    if (char const* threads = std::getenv("NATTEN_EMULATION_THREADS")) s.threads = std::atoi(threads);
    if (s.threads < 1) s.threads = std::max(1u, std::thread::hardware_concurrency());
    if (kFindsRaces) s.threads = 1;
    return s;
  }
};

// Values that lanes give or take.
struct Room {
  alignas(64) std::byte bytes[4096];
  unsigned readers = 0;  // lanes that may still take from it
};

struct Warp {
  std::vector<std::unique_ptr<Room>> rooms;
  Room* given = nullptr;          // of the meeting that comes
  Room* taken[kLanes] = {};       // of a lane's last meeting
  char const* operation = nullptr;  // that lanes are waiting in
  unsigned mask = 0, arrived = 0;
  std::uint32_t generation = 0;  // of warp barriers
  char tokens[2];                // their addresses, for ThreadSanitizer
  unsigned lanes = 0;            // that exist
  std::vector<int> runnable;     // threads

  void reset(int begin, int end) {  // threads
    for (auto& room : rooms) room->readers = 0;
    std::fill_n(taken, kLanes, nullptr);
    given = free_room();
    operation = nullptr;
    arrived = 0;
    lanes = end - begin == kLanes ? ~0u : (1u << (end - begin)) - 1;
    runnable.clear();
    for (int t = begin; t < end; ++t) runnable.push_back(t);
  }

  Room* free_room() {
    for (auto& room : rooms) {
      if (room.get() != given && room->readers == 0) return room.get();
    }
    rooms.push_back(std::make_unique<Room>());
    return rooms.back().get();
  }

  void stop_taking(int lane) {
    if (taken[lane] != nullptr) taken[lane]->readers &= ~(1u << lane);
    taken[lane] = nullptr;
  }
  // Lanes of a part of the warp may be several meetings ahead of the others.
  void let_take(Room* room) {
    room->readers = mask;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (mask >> lane & 1) taken[lane] = room;
    }
  }
};

// One product, of the tensor cores' numbers of rows: a constant, for the sake of vector instructions.
template <int kM>
void multiply(Product const& p, float const* a, float* d) {
  float const* const b = a + p.begin_b();
  float const* const c = a + p.begin_c();
  for (int n = 0; n < p.n; ++n) {
    float sum[kM];
    for (int m = 0; m < kM; ++m) sum[m] = c[m + n * kM];
    for (int k = 0; k < p.k; ++k) {
      float const factor = b[n + k * p.n];
      for (int m = 0; m < kM; ++m) sum[m] += a[m + k * kM] * factor;
    }
    for (int m = 0; m < kM; ++m) d[m + n * kM] = sum[m];
  }
}

}  // namespace

// One block at a time, on one thread of the operating system.
class Block {
 public:
  Block(Grid const& grid, Settings const& settings)
      : grid_(grid),
        settings_(settings),
        fibers_(new Fiber[grid.threads]),
        copies_(grid.threads),
        waiting_(grid.threads),
        finished_(grid.threads),
        warps_((grid.threads + kLanes - 1) / kLanes) {
    for (Warp& warp : warps_) warp.runnable.reserve(kLanes);
    allocate();
  }
  ~Block() { discard(); }

  // What threads leave behind: their stacks, shared memory, and asynchronous copies.
  void allocate() {
    stacks_ = std::make_unique<Stacks>(grid_.threads);
    // Not by aligned_alloc, which wants whole multiples of the alignment.
    shared_.reset(static_cast<char*>(::operator new(room(), std::align_val_t(kAlignment))));
  }
  void discard() {
    acquire(&end_token_);
    for (Copies& copies : copies_) copies.clear();
    stacks_.reset();
    shared_.reset();
  }

  void run(std::int64_t index, void (*body)(void const*, char*), void const* state) {
    body_ = body;
    state_ = state;
    random_ = Random(settings_.seed * 0x10001 + index);
    std::memset(shared_.get(), 0xff, grid_.shared_bytes);
    std::memset(shared_.get() + grid_.shared_bytes, kFence, room() - grid_.shared_bytes);
    order_.resize(warps_.size());
    for (int w = 0; w < int(warps_.size()); ++w) order_[w] = w;
    keeps_order_ = random_.below(2);
    shuffle_warps();
    barrier_arrived_ = num_finished_ = 0;
    error_ = nullptr;
    for (int w = 0; w < int(warps_.size()); ++w) {
      warps_[w].reset(w * kLanes, std::min((w + 1) * kLanes, grid_.threads));
    }
    under_way_.start(shared_.get(), grid_.shared_bytes);
    num_runnable_ = grid_.threads;
    blockIdx = {static_cast<unsigned>(index), 0, 0};
    blockDim = {static_cast<unsigned>(grid_.threads), 1, 1};
    gridDim = {static_cast<unsigned>(grid_.blocks), 1, 1};
    host_.prepare(nullptr, nullptr);
    for (int t = 0; t < grid_.threads; ++t) {
      waiting_[t] = nullptr;
      finished_[t] = false;
      copies_[t].start(settings_.copies_are_late, under_way_);
      fibers_[t].prepare((*stacks_)[t], &Block::entry);
    }

    release(&start_token_);
    current = this;
    Fiber& first = pick();
    came_from_ = &host_;
    Fiber::switch_to(first, host_, false);
    current = nullptr;
    if (error_) std::rethrow_exception(error_);
    for (int i = grid_.shared_bytes; i < room(); ++i) {
      if (shared_.get()[i] != kFence) throw Error("a write behind the end of shared memory");
    }
  }

  void block_barrier() {
    char* const token = &barrier_tokens_[barrier_generation_ % 2];
    release(token);
    if (++barrier_arrived_ == grid_.threads) {
      barrier_arrived_ = 0;
      ++barrier_generation_;
      for (int t = 0; t < grid_.threads; ++t) {
        if (t != thread_) make_runnable(t);
      }
      shuffle_warps();
    } else {
      suspend("__syncthreads");
    }
    acquire(token);
  }

  void warp_barrier(unsigned mask) {
    Warp& warp = my_warp();
    char* const token = &warp.tokens[warp.generation % 2];
    release(token);
    if (arrive("__syncwarp", mask)) {
      ++warp.generation;
      depart();
    } else {
      suspend("__syncwarp");
    }
    acquire(token);
  }

  void give(int bytes, int count, int const* places, void const* values) {
    std::byte* const room = my_warp().given->bytes;
    auto const* const from = static_cast<std::byte const*>(values);
    for (int i = 0; i < count; ++i) {
      std::byte* const place = room + places[i] * bytes;
      if (bytes == 4) std::memcpy(place, from + i * 4, 4);
      else if (bytes == 2) std::memcpy(place, from + i * 2, 2);
      else std::memcpy(place, from + i * 8, 8);
    }
  }

  void take(int bytes, int count, int const* places, void* values) {
    std::byte const* const room = my_warp().taken[lane()]->bytes;
    auto* const to = static_cast<std::byte*>(values);
    for (int i = 0; i < count; ++i) {
      std::byte const* const place = room + places[i] * bytes;
      if (bytes == 4) std::memcpy(to + i * 4, place, 4);
      else if (bytes == 2) std::memcpy(to + i * 2, place, 2);
      else std::memcpy(to + i * 8, place, 8);
    }
  }

  // What lanes gave becomes what they take.
  void meet(char const* operation, unsigned mask) {
    if (!arrive(operation, mask)) return suspend(operation);
    Warp& warp = my_warp();
    warp.let_take(warp.given);
    warp.given = warp.free_room();
    depart();
  }

  void meet_and_multiply(Product const& p) {
    if (!arrive("mma", ~0u)) return suspend("mma");
    Warp& warp = my_warp();
    Room* const result = warp.free_room();
    auto const* const given = reinterpret_cast<float const*>(warp.given->bytes);
    auto* const product = reinterpret_cast<float*>(result->bytes);
    for (int g = 0; g < p.groups; ++g) {
      auto const multiply = p.m == 16 ? &emulation::multiply<16> : &emulation::multiply<8>;
      multiply(p, given + g * p.size(), product + g * p.m * p.n);
    }
    warp.let_take(result);
    depart();
  }

  int lane() const { return thread_ % kLanes; }
  Copies& copies() { return copies_[thread_]; }

  bool is_shared(void const* address, int bytes) const {
    auto const* const p = static_cast<char const*>(address);
    return p >= shared_.get() && p + bytes <= shared_.get() + grid_.shared_bytes;
  }

  bool is_under_way(void const* address, int bytes) const { return under_way_.touches(address, bytes); }

  static thread_local Block* current;

 private:
  static constexpr int kAlignment = 128;
  static constexpr char kFence = 0x5a;

  // Bytes of shared memory and a fence behind it, of which AddressSanitizer has one of its own.
  int room() const {
#if defined(__SANITIZE_ADDRESS__)
    return grid_.shared_bytes;
#else
    return (grid_.shared_bytes + 2 * kAlignment - 1) / kAlignment * kAlignment;
#endif
  }

  static void entry() { current->run_thread(); }

  void run_thread() {
    Fiber::arrive(fibers_[thread_], *came_from_);
    acquire(&start_token_);
    try {
      body_(state_, shared_.get());
      copies().check_all_waited_for();
    } catch (...) {
      fail(std::current_exception());
    }
    release(&end_token_);
    finished_[thread_] = true;
    ++num_finished_;
    leave(true);
  }

  Warp& my_warp() { return warps_[thread_ / kLanes]; }

  void make_runnable(int thread) {
    waiting_[thread] = nullptr;
    warps_[thread / kLanes].runnable.push_back(thread);
    ++num_runnable_;
  }

  // Whether this lane is the last to arrive.
  bool arrive(char const* operation, unsigned mask) {
    Warp& warp = my_warp();
    mask &= warp.lanes;
    if (!(mask >> lane() & 1)) throw Error(std::string(operation) + ": a lane that is not in the mask takes part");
    if (warp.arrived == 0) {
      warp.operation = operation;
      warp.mask = mask;
    } else if (warp.operation != operation || warp.mask != mask) {
      throw Error(std::string("lanes of a warp are in ") + warp.operation + " and in " + operation +
                  " at once, or with different masks");
    }
    warp.stop_taking(lane());
    warp.arrived |= 1u << lane();
    return warp.arrived == mask;
  }

  // The last lets the others go on.
  void depart() {
    Warp& warp = my_warp();
    int const begin = thread_ / kLanes * kLanes;
    for (int l = 0; l < kLanes; ++l) {
      if ((warp.mask >> l & 1) && begin + l != thread_) make_runnable(begin + l);
    }
    warp.arrived = 0;
  }

  void suspend(char const* operation) {
    waiting_[thread_] = operation;
    leave(false);
  }

  // Runs another fiber; returns when this one runs again.
  void leave(bool ends) {
    int const self = thread_;
    Fiber& next = error_ ? host_ : pick();
    came_from_ = &fibers_[self];
    if (&next == &fibers_[self]) return;
    Fiber::switch_to(next, fibers_[self], ends);
  }

  // The next to run: the host where nobody can.
  Fiber& pick() {
    if (num_runnable_ == 0) {
      if (num_finished_ < grid_.threads) fail(std::make_exception_ptr(Error(describe_deadlock())));
      return host_;
    }
    if (!keeps_order_ && random_.below(kLanes) == 0) shuffle_warps();
    int i = 0;
    while (warps_[order_[i]].runnable.empty()) ++i;
    std::vector<int>& runnable = warps_[order_[i]].runnable;
    int const place = random_.below(int(runnable.size()));
    thread_ = runnable[place];
    runnable[place] = runnable.back();
    runnable.pop_back();
    --num_runnable_;
    threadIdx = {static_cast<unsigned>(thread_), 0, 0};
    return fibers_[thread_];
  }

  void shuffle_warps() {
    for (int i = int(order_.size()) - 1; i > 0; --i) std::swap(order_[i], order_[random_.below(i + 1)]);
  }

  void fail(std::exception_ptr error) {
    if (!error_) error_ = error;
  }

  std::string describe_deadlock() const {
    std::string text = "deadlock:";
    for (int t = 0; t < grid_.threads;) {
      int const first = t;
      char const* const state = finished_[t] ? "exited" : waiting_[t];
      while (t < grid_.threads && (finished_[t] ? "exited" : waiting_[t]) == state) ++t;
      text += " threads " + std::to_string(first) + " to " + std::to_string(t - 1) +
              (finished_[first] ? " have exited;" : std::string(" wait in ") + state + ";");
    }
    return text;
  }

  Grid grid_;
  Settings settings_;
  std::unique_ptr<Stacks> stacks_;
  Fiber host_;
  std::unique_ptr<Fiber[]> fibers_;
  std::vector<Copies> copies_;
  UnderWay under_way_;
  std::vector<char const*> waiting_;  // in which operation; null: nowhere
  std::vector<char> finished_;
  std::vector<Warp> warps_;
  std::vector<int> order_;  // of warps
  bool keeps_order_ = false;  // one warp runs as far as it can before the next; else they overtake each other
  struct Free {
    void operator()(char* memory) const { ::operator delete(memory, std::align_val_t(kAlignment)); }
  };
  std::unique_ptr<char, Free> shared_;

  void (*body_)(void const*, char*) = nullptr;
  void const* state_ = nullptr;
  Random random_{0};
  int thread_ = 0;  // that runs
  Fiber* came_from_ = nullptr;
  int num_runnable_ = 0, num_finished_ = 0, barrier_arrived_ = 0;
  std::uint32_t barrier_generation_ = 0;
  char barrier_tokens_[2], start_token_, end_token_;  // for ThreadSanitizer
  std::exception_ptr error_;
};

thread_local Block* Block::current = nullptr;

void launch(Grid const& grid, void (*body)(void const*, char*), void const* state) {
  Settings const settings = Settings::read();
  std::atomic<std::int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  auto const work = [&] {
    try {
      std::unique_ptr<Block> block, last;
      History const self = History::of_current();
      History heir = History::create();
      for (std::int64_t i; (i = next++) < grid.blocks;) {
        if (!block) {
          block = std::make_unique<Block>(grid, settings);
        } else if (kFindsRaces) {
          // Blocks are not ordered among each other, so none may inherit another's memory and what was done to it. And
          // whoever frees that must have waited for a block, which whoever starts the next has not.
          heir.switch_to();
          block->discard();
          self.switch_to();
          block->allocate();
        }
        block->run(i, body, state);
        if (kFindsRaces) std::swap(block, last);  // a thread is ordered after itself in the block before the last
      }
      heir.switch_to();
      block.reset();
      last.reset();
      self.switch_to();
      heir.release_to_current();
    } catch (...) {
      next = grid.blocks;
      std::lock_guard<std::mutex> const lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  int const threads = static_cast<int>(std::min<std::int64_t>(settings.threads, grid.blocks));
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
}

void block_barrier() { Block::current->block_barrier(); }
void warp_barrier(unsigned mask) { Block::current->warp_barrier(mask); }
void give(int bytes, int count, int const* places, void const* values) {
  Block::current->give(bytes, count, places, values);
}
void meet(char const* operation, unsigned mask) { Block::current->meet(operation, mask); }
void take(int bytes, int count, int const* places, void* values) { Block::current->take(bytes, count, places, values); }
void meet_and_multiply(Product const& product) { Block::current->meet_and_multiply(product); }
int lane() { return Block::current->lane(); }

void check_shared(void const* address, int bytes, char const* operation) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    throw Error(std::string(operation) + ": an address that is no multiple of " + std::to_string(bytes));
  }
  if (!Block::current->is_shared(address, bytes)) {
    throw Error(std::string(operation) + ": an address outside of shared memory");
  }
  if (Block::current->is_under_way(address, bytes)) {
    throw Error(std::string(operation) + ": an address that an asynchronous copy is under way to");
  }
}

void copy_async(void const* source, void* destination, int bytes, bool is_present) {
  check_shared(destination, bytes, "cp.async");
  if (reinterpret_cast<std::uintptr_t>(source) % bytes != 0) {
    throw Error("cp.async: a source that is no multiple of " + std::to_string(bytes));
  }
  Block::current->copies().issue(source, destination, bytes, is_present);
}
void commit_copies() { Block::current->copies().commit(); }
void wait_for_copies(int pending) { Block::current->copies().wait(pending); }

}  // namespace natten::emulation
