// SPDX-License-Identifier: MIT
// The walk that forward and the gradient of the query share: query tiles in lanes, keys and values streamed, first those
// of the windows, then the additional ones. What is computed is up to a pass.
#pragma once

#include "natten/cpu/bias.hpp"
#include "natten/cpu/schedule.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// One packed piece of keys and values.
template <class Math>
struct KeyStream {
  StreamBox box;
  PackedTensor<Math> key;
  PackedTensor<Math> value;
  bool is_packed = false;
  bool nonfinite = false;
};

// The tensors of one query head of one dilation group, by position.
template <class T>
GroupView<T> query_view(Problem const& problem, TensorRef const& tensor, Group const (&groups)[kMaxRank],
                        std::int64_t batch, int head) {
  int const origin[kMaxRank] = {problem.axes[0].query_origin, problem.axes[1].query_origin,
                                problem.axes[2].query_origin};
  return GroupView<T>(tensor, groups, origin, batch, head);
}

template <class T>
GroupView<T> key_view(Problem const& problem, TensorRef const& tensor, Group const (&groups)[kMaxRank],
                      std::int64_t batch, int head_kv) {
  int const origin[kMaxRank] = {problem.axes[0].key_origin, problem.axes[1].key_origin, problem.axes[2].key_origin};
  return GroupView<T>(tensor, groups, origin, batch, head_kv);
}

// Tokens of a side, in all its heads and batch entries.
NATTEN_INLINE std::int64_t all_tokens(Problem const& problem, int heads, int Axis::* extent) {
  std::int64_t tokens = problem.batch * heads;
  for (Axis const& axis : problem.axes) tokens *= axis.*extent;
  return tokens;
}

// Views of tensors that a call computes, of `dim` elements a token.
template <class T, class Arguments>
GroupView<T> query_result(Arguments const& arguments, TensorRef const& tensor, Group const (&groups)[kMaxRank],
                          std::int64_t batch, int head, int dim) {
  Problem const& problem = arguments.problem;
  std::int64_t const tokens = all_tokens(problem, problem.heads, &Axis::query_extent);
  return as_result(query_view<T>(problem, tensor, groups, batch, head), tokens, dim, arguments.num_threads);
}

template <class T, class Arguments>
GroupView<T> key_result(Arguments const& arguments, TensorRef const& tensor, Group const (&groups)[kMaxRank],
                        std::int64_t batch, int head_kv, int dim) {
  Problem const& problem = arguments.problem;
  std::int64_t const tokens = all_tokens(problem, problem.heads_kv, &Axis::key_extent);
  return as_result(key_view<T>(problem, tensor, groups, batch, head_kv), tokens, dim, arguments.num_threads);
}

// Additional tokens are a line of their own: one group, on the last axis.
template <class T>
GroupView<T> additional_view(TensorRef const& tensor, std::int64_t batch, int head_kv) {
  Group const line[kMaxRank];
  return GroupView<T>(tensor, line, {0, 0, 0}, batch, head_kv);
}

// One tile of one head, to a pass.
struct TileContext {
  Schedule::Item const& item;
  Panel const& panel;
  int index;  // of the tile in its panel
  Tile const& tile;
  int head;
  bool is_line;  // whether the panel's tiles are neighbours on the last axis
  Interval const (&own)[kMaxRank];  // tokens of the panel; results are fetched, too, as a store that misses stalls
  Interval const (&next)[kMaxRank];  // tokens of the panel that follows; none behind the last
  FetchAhead& fetch;  // for the pass, which starts it with the first tile of a panel
};

// Which operands of the stream a pass multiplies with.
struct StreamNeeds {
  bool key_dot, key_sum, value_dot, value_sum;
};

// A pass has
//   arguments, kNeeds
//   state_floats()                    what it keeps of a tile from piece to piece
//   take_scratch(arena)               scratch memory
//   clear(state), load(context), attend(context, stream, tile, bias, state), finish(context, state)
//   kSlides; attend_panel(context of the first tile, stream, biases, states)
template <class Math>
class QueryBlocks {
 public:
  using Storage = typename Math::Storage;

  // `sum_floats`: of what a pass sums up for a token of the stream; if there are sums, an item completes those of its share.
  QueryBlocks(Problem const& problem, std::int64_t state_floats, StreamNeeds const& needs, bool may_slide,
              int num_threads, std::int64_t sum_floats = 0)
      : problem_(problem),
        state_floats_(state_floats),
        needs_(needs),
        token_words_(token_words(problem.head_dim) + token_words(problem.head_dim_value)),
        additional_capacity_(min(problem.additional_keys, static_cast<int>(kPackedBytes / 16 / token_words_))),
        schedule_(problem, Side::kQuery,
                  4 * (token_words_ + (may_slide && kCanSlide && problem.tiles.queries_slide ? second_operands() : 0)),
                  4 * state_floats / kLanes * problem.group_size(),
                  /*allow_ring=*/additional_capacity_ == problem.additional_keys, may_slide, num_threads,
                  4 * sum_floats) {}

  std::int64_t items() const { return schedule_.items; }
  bool slides() const { return schedule_.slides; }
  bool can_complete_sums() const { return schedule_.can_complete_stream(problem_); }
  Schedule::Item item(std::int64_t index) const { return schedule_.item(problem_, index); }
  // Room for a token each of those that an item's ring holds.
  std::int64_t ring_tokens(std::int64_t index) const {
    Schedule::Item const item = this->item(index);
    if (item.empty) return 0;
    Walk const walk(schedule_, item, Math::kPerWord);
    return std::int64_t{walk.ring_rows()} * walk.row_tokens();
  }
  // Items of one head of one batch entry are neighbours.
  std::int64_t items_per_head() const { return schedule_.blocks_per_group() * schedule_.groups_per_head(); }

  template <class Pass>
  void run_item(Pass& pass, std::int64_t index) const {
    Schedule::Item const item = this->item(index);
    if (item.empty) return;
    Walk const walk(schedule_, item, Math::kPerWord);
    bool const one_piece = walk.is_ring() && additional_capacity_ == problem_.additional_keys;
    std::int64_t const states =
        one_piece ? schedule_.tiles_per_panel() : std::int64_t{schedule_.panels_per_step()} * problem_.group_size();

    Arena counter(nullptr);
    take_memory(counter, walk, states);
    pass.take_scratch(counter);
    Arena arena(thread_workspace(counter.used()));
    Memory const memory = take_memory(arena, walk, states);
    pass.take_scratch(arena);
    AxisIntervals intervals[kMaxRank];
    fill_intervals(item, Side::kQuery, memory.intervals, intervals);

    Interval const line[kMaxRank] = {{0, 1}, {0, 1}, {0, problem_.additional_keys}};
    bool ring_nonfinite = false;
    FetchAhead fetch;
    KeyStream<Math> additional;  // stays packed if it is one piece
    if (one_piece && problem_.additional_keys > 0) {
      StreamBox const box(line, Math::kPerWord, /*padding=*/0, /*origin=*/0, /*ring=*/1);
      additional = packed(box, memory.additional, nullptr);
      additional.nonfinite = pack_additional(pass, item, additional);
    }

    walk.for_each_step([&](Interval const(&block)[kMaxRank]) {
      // use(context, state) for the first tile of every panel, and every head that reads this block's key head.
      auto const for_each_head = [&](auto const& use) {
        for_each_panel(block, schedule_.panel, [&](int const(&corner)[kMaxRank], int index) {
          Panel const panel = schedule_.panel_at(corner, block, intervals);
          Interval const own[kMaxRank] = {panel.box(0), panel.box(1), panel.box(2)};
          Interval next[kMaxRank];
          schedule_.next_panel(corner, block, item.block, next);
          for (int h = 0; h < problem_.group_size(); ++h) {
            std::int64_t const state = one_piece ? 0 : std::int64_t{index} * problem_.group_size() + h;
            use(TileContext{item, panel, 0, panel[0], item.head_kv * problem_.group_size() + h,
                            schedule_.panel_axis == 2, own, next, fetch},
                memory.states + state * state_floats_);
          }
        });
      };
      // The same for all tiles of its panel.
      auto const for_each_tile = [&](TileContext const& first, float* states, auto const& use) {
        for (int t = 0; t < first.panel.count(); ++t) {
          use(TileContext{item, first.panel, t, first.panel[t], first.head, first.is_line, first.own, first.next,
                          first.fetch},
              states + t * state_floats_);
        }
      };
      auto const bias_of = [&](Tile const& tile, int head) {
        return Bias(problem_, pass.arguments.rpb, head, tile, Side::kQuery);
      };
      auto const load = [&](TileContext const& c) {
        pass.load(c);
        if (!schedule_.slides) fetch.all();  // products of a single tile are too few to spread them over
      };
      auto const attend_window = [&](TileContext const& c, KeyStream<Math> const& stream, float* states) {
        if constexpr (Pass::kSlides && kCanSlide) {
          if (schedule_.slides) {
            Bias biases[kPanelTiles];
            for (int t = 0; t < c.panel.count(); ++t) biases[t] = bias_of(c.panel[t], c.head);
            pass.attend_panel(c, stream, biases, states);
            return;
          }
        }
        pass.attend(c, stream, c.tile, bias_of(c.tile, c.head), states);
      };
      auto const attend_additional = [&](TileContext const& c, KeyStream<Math> const& stream, float* state) {
        pass.attend(c, stream, c.tile.against_all(problem_.additional_keys), Bias(), state);
      };

      if (one_piece) {
        KeyStream<Math> window;
        walk.for_each_stream_piece(block, /*keeps_ring=*/true, [&](StreamBox const& box, Interval slices) {
          window = packed(box, memory.packed, schedule_.slides ? &walk : nullptr);
          ring_nonfinite |= pack_window(pass, item, window, slices);
          window.nonfinite = ring_nonfinite;
        });
        for_each_head([&](TileContext const& first, float* states) {
          for_each_tile(first, states, [&](TileContext const& c, float* state) {
            pass.clear(state);
            load(c);
          });
          if (window.is_packed) attend_window(first, window, states);
          fetch.all();
          for_each_tile(first, states, [&](TileContext const& c, float* state) {
            if (additional.is_packed) attend_additional(c, additional, state);
            pass.finish(c, state);
          });
        });
        return;
      }
      for_each_head([&](TileContext const&, float* state) { pass.clear(state); });
      walk.for_each_stream_piece(block, /*keeps_ring=*/false, [&](StreamBox const& box, Interval slices) {
        KeyStream<Math> stream = packed(box, memory.packed, nullptr);
        stream.nonfinite = pack_window(pass, item, stream, slices);
        for_each_head([&](TileContext const& c, float* state) {
          load(c);
          attend_window(c, stream, state);
        });
      });
      for_each_piece(line, additional_capacity_, Math::kPerWord, [&](StreamBox const& box) {
        KeyStream<Math> stream = packed(box, memory.additional, nullptr);
        stream.nonfinite = pack_additional(pass, item, stream);
        for_each_head([&](TileContext const& c, float* state) {
          load(c);
          attend_additional(c, stream, state);
        });
      });
      for_each_head([&](TileContext const& c, float* state) { pass.finish(c, state); });
    });
  }

 private:
  struct Memory {
    Interval* intervals;
    Word* packed;
    Word* additional;
    float* states;
  };

  Memory take_memory(Arena& arena, Walk const& walk, std::int64_t states) const {
    Memory m;
    m.intervals = arena.take<Interval>(schedule_.positions());
    m.packed = arena.take<Word>(
        schedule_.slides ? sliding_words(walk, problem_.head_dim, needs_.key_dot, needs_.key_sum) +
                               sliding_words(walk, problem_.head_dim_value, needs_.value_dot, needs_.value_sum)
                         : token_words_ * walk.capacity());
    m.additional = arena.take<Word>(token_words_ * round_up(additional_capacity_, Math::kPerWord));
    m.states = arena.take<float>(states * state_floats_);
    return m;
  }

  static std::int64_t token_words(int dim) { return PackedTensor<Math>::token_words(dim); }

  // Words of a token that sliding adds: a dot operand is no sum operand any more.
  std::int64_t second_operands() const {
    if (Math::kPerWord > 1) return 0;
    return (needs_.key_dot && needs_.key_sum ? token_words(problem_.head_dim) : 0) +
           (needs_.value_dot && needs_.value_sum ? token_words(problem_.head_dim_value) : 0);
  }

  // A tensor in the ring of a walk whose tokens slide past the lanes.
  static std::int64_t sliding_words(Walk const& walk, int dim, bool as_dot, bool as_sum) {
    if (!as_dot) return token_words(dim) * walk.capacity();
    return PackedTensor<Math>::sliding_words(dim, walk.ring_rows(), walk.row_tokens(), as_sum ? walk.capacity() : 0);
  }
  static PackedTensor<Math> sliding(Walk const& walk, Word* memory, int dim, bool as_dot, bool as_sum) {
    int const tokens = static_cast<int>(walk.capacity());
    if (!as_dot) return PackedTensor<Math>(memory, dim, tokens);
    return PackedTensor<Math>::sliding(memory, dim, walk.ring_rows(), walk.row_tokens(), as_sum ? tokens : 0);
  }

  // `slides`: the walk whose ring it is, if keys slide.
  KeyStream<Math> packed(StreamBox const& box, Word* memory, Walk const* slides) const {
    int const dim = problem_.head_dim, dim_value = problem_.head_dim_value;
    KeyStream<Math> stream;
    stream.box = box;
    if (slides != nullptr) {
      stream.key = sliding(*slides, memory, dim, needs_.key_dot, needs_.key_sum);
      memory += sliding_words(*slides, dim, needs_.key_dot, needs_.key_sum);
      stream.value = sliding(*slides, memory, dim_value, needs_.value_dot, needs_.value_sum);
    } else {
      stream.key = PackedTensor<Math>(memory, dim, box.tokens());
      stream.value = PackedTensor<Math>(memory + token_words(dim) * box.tokens(), dim_value, box.tokens());
    }
    stream.is_packed = true;
    return stream;
  }

  template <class Pass>
  bool pack_window(Pass const& pass, Schedule::Item const& item, KeyStream<Math> const& stream, Interval slices) const {
    return pack(stream, slices,
                key_view<Storage const>(problem_, pass.arguments.key, item.groups, item.batch, item.head_kv),
                key_view<Storage const>(problem_, pass.arguments.value, item.groups, item.batch, item.head_kv));
  }

  template <class Pass>
  bool pack_additional(Pass const& pass, Schedule::Item const& item, KeyStream<Math> const& stream) const {
    return pack(stream, stream.box.axis[0],
                additional_view<Storage const>(pass.arguments.additional_keys, item.batch, item.head_kv),
                additional_view<Storage const>(pass.arguments.additional_values, item.batch, item.head_kv));
  }

  bool pack(KeyStream<Math> const& stream, Interval slices, GroupView<Storage const> const& key,
            GroupView<Storage const> const& value) const {
    bool const k = stream.key.pack(key, stream.box, slices, needs_.key_dot, needs_.key_sum);
    bool const v = stream.value.pack(value, stream.box, slices, needs_.value_dot, needs_.value_sum);
    return k || v;
  }

  Problem const& problem_;
  std::int64_t state_floats_;
  StreamNeeds needs_;
  std::int64_t token_words_;
  int additional_capacity_;  // tokens packed at a time
  Schedule schedule_;
};

// A pass over everything.
template <class Math, class Pass>
void run_query_blocks(Pass const& prototype, int num_threads) {
  QueryBlocks<Math> const blocks(prototype.arguments.problem, prototype.state_floats(), Pass::kNeeds, Pass::kSlides,
                                 num_threads);
  for_each_item(blocks.items(), num_threads, [&](std::int64_t i) {
    Pass pass = prototype;  // scratch memory is a thread's own
    blocks.run_item(pass, i);
  });
}

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
