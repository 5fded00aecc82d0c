// SPDX-License-Identifier: MIT
// The walk that forward and the gradient of the query share: query tiles in lanes, keys and values streamed, first those
// of the windows, then the additional ones. What is computed is up to a pass.
#pragma once

#include "natten/cpu/bias.hpp"
#include "natten/cpu/schedule.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// One packed piece of keys and values.
template <class Math>
struct KeyStream {
  StreamBox box;
  PackedTensor<Math> key;
  PackedTensor<Math> value;
  bool nonfinite;
};

// The tensors of one query head of one dilation group, by position.
template <class T>
GroupView<T> query_view(Problem const& problem, TensorRef const& tensor, Group const (&groups)[kMaxRank],
                        std::int64_t batch, int head) {
  int const origin[kMaxRank] = {problem.axes[0].query_origin, problem.axes[1].query_origin, problem.axes[2].query_origin};
  return GroupView<T>(tensor, groups, origin, batch, head);
}

template <class T>
GroupView<T> key_view(Problem const& problem, TensorRef const& tensor, Group const (&groups)[kMaxRank],
                      std::int64_t batch, int head_kv) {
  int const origin[kMaxRank] = {problem.axes[0].key_origin, problem.axes[1].key_origin, problem.axes[2].key_origin};
  return GroupView<T>(tensor, groups, origin, batch, head_kv);
}

// Additional tokens are a line of their own: one group, on the last axis.
template <class T>
GroupView<T> additional_view(TensorRef const& tensor, std::int64_t batch, int head_kv) {
  Group const line[kMaxRank];
  return GroupView<T>(tensor, line, {0, 0, 0}, batch, head_kv);
}

// A pass has
//   Arguments, and a member `arguments`
//   kNeeds                           which operands of the stream it multiplies with
//   scratch_bytes(arena)             takes its scratch memory of an item
//   state_floats()                   size of what it keeps of a tile from piece to piece
//   clear(state); load(context); attend(context, stream, bias, tile, state); finish(context, state)
struct StreamNeeds {
  bool key_sum, value_dot, value_sum;  // the key is always a dot operand
};

// One tile of one head, to a pass.
struct TileContext {
  Schedule::Item const& item;
  Tile const& tile;
  int head;
  int ahead;  // positions to the next tile on the last axis; 0 at its end
};

template <class Math>
class QueryBlocks {
 public:
  using Storage = typename Math::Storage;

  QueryBlocks(Problem const& problem, std::int64_t state_floats, int num_threads)
      : problem_(problem),
        state_floats_(state_floats),
        words_k_(PackedTensor<Math>::words(problem.head_dim, kSample) / kSample),
        words_v_(PackedTensor<Math>::words(problem.head_dim_value, kSample) / kSample),
        max_packed_(kPackedBytes / 4 / (words_k_ + words_v_)),
        schedule_(problem, Side::kQuery, max_packed_,
                  kStateBytes * kLanes / (4 * state_floats * problem.group_size()), num_threads) {}

  std::int64_t items() const { return schedule_.items; }
  // Items of one head of one batch entry are neighbours.
  std::int64_t items_per_head() const { return schedule_.items / (problem_.batch * problem_.heads_kv); }

  template <class Pass>
  void run_item(Pass& pass, std::int64_t index) const {
    Schedule::Item const item = schedule_.item(problem_, index);
    if (item.empty) return;

    Interval stream[kMaxRank];
    for (int a = 0; a < kMaxRank; ++a) stream[a] = item.groups[a].keys_of(item.block[a]);
    Interval const additional[kMaxRank] = {{0, 1}, {0, 1}, {0, problem_.additional_keys}};

    int pieces = 0;
    auto const count = [&](StreamBox const&) { ++pieces; };
    for_each_piece(stream, max_packed_, Math::kPerWord, count);
    for_each_piece(additional, max_packed_, Math::kPerWord, count);
    // With one piece a tile is finished before the next begins, and they share their state.
    std::int64_t const states =
        pieces <= 1 ? 1 : std::int64_t{schedule_.tiles_per_block()} * problem_.group_size();

    Arena counter(nullptr);
    take_memory(counter, states);
    pass.take_scratch(counter);
    Arena arena(thread_workspace(counter.used()));
    Memory const memory = take_memory(arena, states);
    pass.take_scratch(arena);
    AxisIntervals intervals[kMaxRank];
    fill_intervals(item, Side::kQuery, memory.intervals, intervals);

    // `use(context, state)` for every tile and every head that reads this block's key head.
    auto const for_each_head = [&](auto const& use) {
      for_each_tile(item, schedule_.tile, [&](int const(&corner)[kMaxRank], int tile_index) {
        Tile const tile(schedule_.tile, corner, item.block, intervals);
        int const ahead = tile.box[2].end < item.block[2].end ? schedule_.tile.size[2] : 0;
        for (int h = 0; h < problem_.group_size(); ++h) {
          std::int64_t const index_of_state = states == 1 ? 0 : std::int64_t{tile_index} * problem_.group_size() + h;
          use(TileContext{item, tile, item.head_kv * problem_.group_size() + h, ahead},
              memory.states + index_of_state * state_floats_);
        }
      });
    };
    if (pieces == 0) {  // no key at all
      for_each_head([&](TileContext const& context, float* state) {
        pass.clear(state);
        pass.finish(context, state);
      });
      return;
    }

    int piece = 0;
    auto const visit = [&](StreamBox const& box, bool is_additional) {
      bool const is_first = piece == 0;
      bool const is_last = ++piece == pieces;
      KeyStream<Math> const packed = pack(pass, item, box, is_additional, memory.packed);
      for_each_head([&](TileContext const& context, float* state) {
        if (is_first) pass.clear(state);
        pass.load(context);
        if (is_additional) {
          pass.attend(context, packed, context.tile.against_all(problem_.additional_keys), Bias(), state);
        } else {
          pass.attend(context, packed, context.tile,
                      Bias(problem_, pass.arguments.rpb, context.head, context.tile, Side::kQuery), state);
        }
        if (is_last) pass.finish(context, state);
      });
    };
    for_each_piece(stream, max_packed_, Math::kPerWord, [&](StreamBox const& box) { visit(box, false); });
    for_each_piece(additional, max_packed_, Math::kPerWord, [&](StreamBox const& box) { visit(box, true); });
  }

 private:
  static constexpr int kSample = 1 << 10;

  struct Memory {
    Interval* intervals;
    Word* packed;
    float* states;
  };

  Memory take_memory(Arena& arena, std::int64_t states) const {
    Memory m;
    m.intervals = arena.take<Interval>(schedule_.positions());
    m.packed = arena.take<Word>((words_k_ + words_v_) * max_packed_);
    m.states = arena.take<float>(states * state_floats_);
    return m;
  }

  template <class Pass>
  KeyStream<Math> pack(Pass const& pass, Schedule::Item const& item, StreamBox const& box, bool is_additional,
                       Word* memory) const {
    auto const& a = pass.arguments;
    auto const view = [&](TensorRef const& window, TensorRef const& additional) {
      return is_additional ? additional_view<Storage const>(additional, item.batch, item.head_kv)
                           : key_view<Storage const>(problem_, window, item.groups, item.batch, item.head_kv);
    };
    int const tokens = box.tokens();
    KeyStream<Math> stream{box,
                           PackedTensor<Math>(memory, problem_.head_dim, tokens),
                           PackedTensor<Math>(memory + PackedTensor<Math>::words(problem_.head_dim, tokens),
                                              problem_.head_dim_value, tokens),
                           false};
    constexpr StreamNeeds kNeeds = Pass::kNeeds;
    bool const key = stream.key.pack(view(a.key, a.additional_keys), box, /*as_dot=*/true, kNeeds.key_sum);
    bool const value =
        stream.value.pack(view(a.value, a.additional_values), box, kNeeds.value_dot, kNeeds.value_sum);
    stream.nonfinite = key || value;
    return stream;
  }

  Problem const& problem_;
  std::int64_t state_floats_;
  std::int64_t words_k_;  // of a token
  std::int64_t words_v_;
  std::int64_t max_packed_;  // tokens
  Schedule schedule_;
};

// The way to multiply this storage type on this ISA.
template <class Storage>
struct MathFor {
  using Type = Float32Math<Storage>;
};
#if defined(__AVX512BF16__)
template <>
struct MathFor<BFloat16> {
  using Type = BFloat16Math;
};
#endif

}  // namespace natten::cpu::NATTEN_CPU_ISA
