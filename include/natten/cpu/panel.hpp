// SPDX-License-Identifier: MIT
// Tiles that slide. A small window wastes half of the products of a tile that is a box, as the tile's keys are the box around
// all its windows. Here lanes are neighbours on the last axis, and slot i of a lane is token begin + i of its own window: what
// a slot takes are neighbours, too, one vector of a packed row where they lie word by word. Such a vector is made by a shift, or
// a permutation where windows stop sliding at the end of the axis, and then multiplied with the lanes of up to four tiles that
// are neighbours and see the same tokens: a panel.
#pragma once

#include <new>
#include <utility>

#include "natten/cpu/tile.hpp"

namespace natten::cpu::NATTEN_CPU_ISA {

// Shifts and permutations of AVX-512 take one instruction, and its 32 registers hold the sums of four tiles.
constexpr bool kCanSlide = kLanes == 16;
constexpr int kPanelTiles = kCanSlide ? 4 : 1;

// Tiles are made in place: they take more than a kilobyte each, and to clear those that are not used takes longer than to make those
// that are.
class Panel {
 public:
  NATTEN_INLINE int count() const { return count_; }
  NATTEN_INLINE Tile const& operator[](int i) const { return reinterpret_cast<Tile const*>(memory_)[i]; }
  // Its tokens on an axis.
  Interval box(int axis) const { return {(*this)[0].box[axis].begin, (*this)[count_ - 1].box[axis].end}; }
  template <class... Arguments>
  Tile& add(Arguments const&... arguments) {
    return *new (memory_ + sizeof(Tile) * count_++) Tile(arguments...);
  }

 private:
  alignas(Tile) unsigned char memory_[kPanelTiles * sizeof(Tile)];
  int count_ = 0;
};

// Slots per run of dot products, so that sums, the vectors they are made of and the lanes fit into registers.
constexpr int kMaxSlots = 8;
constexpr int max_slots(int tiles) { return tiles == 4 ? 6 : kMaxSlots; }
static_assert(kMaxSlots + kLanes <= kSlideReach && 2 * kLanes <= kSlideReach, "a run must stay in a block");

// use(std::integral_constant<int, I>()) for every I.
template <class Use, int... I>
NATTEN_INLINE void for_each_constant(std::integer_sequence<int, I...>, Use const& use) {
  (use(std::integral_constant<int, I>()), ...);
}

// How the intervals of a tile's lanes begin: one token further than the lane before, all at the same one, or otherwise.
enum class Sliding { kStep, kStand, kMixed };

// out[tile][i][lane] = sum over words of lanes[tile][word][lane] * stream[word][from[lane] + i], i < S.
template <class Math, int N, int S, Sliding kSliding>
void slide_run(Vec const* const* lanes, int words, Word const* stream, int pitch, IntVec from, Vec* const* out) {
  Vec sum[N][S] = {};
  Vec const* own[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) own[n] = lanes[n];
  // A load that crosses a line costs two, which only pays where several tiles use it: 47 against 72 % of peak for one.
  constexpr bool kShifts = kSliding == Sliding::kStep && N == 1;
  for (int w = 0; w < words; ++w, stream += pitch) {
    Vec x[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      x[n] = own[n][w];
      keep_in_register(x[n]);  // else it is loaded again for every slot, which halves the rate
    }
    Vec low, high;
    if constexpr (kShifts) {
      low = load_as<Vec>(stream);
      high = load_as<Vec>(stream + kLanes);
    }
    for_each_constant(std::make_integer_sequence<int, S>{}, [&](auto slot) __attribute__((always_inline)) {
      Vec v;
      if constexpr (kShifts) v = shifted<slot.value>(low, high);
      else if constexpr (kSliding == Sliding::kStep) v = load_as<Vec>(stream + slot.value);
      else if constexpr (kSliding == Sliding::kStand) v = bit_cast<Vec>(broadcast(stream[slot.value]));
      else v = permute(load_as<Vec>(stream + slot.value), from);
      keep_in_register(v);
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) sum[n][slot.value] = Math::multiply_add(sum[n][slot.value], x[n], v);
    });
  }
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
#pragma GCC unroll 8
    for (int i = 0; i < S; ++i) out[n][i] = sum[n][i];
  }
}

// The numbers of tiles and slots are only known at run time: a table of its instantiations.
template <class Math>
struct SlideRuns {
  using Run = void (*)(Vec const* const*, int, Word const*, int, IntVec, Vec* const*);

  static Run of(Sliding sliding, int tiles, int slots) {
    if (sliding == Sliding::kStep) return of_sliding<Sliding::kStep>(tiles, slots);
    if (sliding == Sliding::kStand) return of_sliding<Sliding::kStand>(tiles, slots);
    return of_sliding<Sliding::kMixed>(tiles, slots);
  }

 private:
  template <int N, Sliding kSliding, int... I>
  static Run pick(int slots, std::integer_sequence<int, I...>) {
    static constexpr Run kRuns[] = {slide_run<Math, N, I + 1, kSliding>...};
    return kRuns[slots - 1];
  }
  template <Sliding kSliding>
  static Run of_sliding(int tiles, int slots) {
    switch (tiles) {
      case 1:
        return pick<1, kSliding>(slots, std::make_integer_sequence<int, max_slots(1)>{});
      case 2:
        return pick<2, kSliding>(slots, std::make_integer_sequence<int, max_slots(2)>{});
      case 3:
        return pick<3, kSliding>(slots, std::make_integer_sequence<int, max_slots(3)>{});
      default:
        return pick<4, kSliding>(slots, std::make_integer_sequence<int, max_slots(4)>{});
    }
  }
};

// How the intervals of a tile's lanes slide.
struct Slide {
  int begin = 0;  // of the first lane's interval
  int slots = 0;  // of the longest
  int padding = 0;  // zeros that follow the slots of a row
  IntVec from = {};  // of each lane's interval, behind `begin`
  Sliding sliding = Sliding::kMixed;

  Slide() = default;
  explicit Slide(Tile const& tile) {
    int lanes = 0;
    while (lanes < kLanes && tile.has(lanes)) ++lanes;
    Interval const(&of)[kLanes] = tile.interval[2];
    int some = 0;
    while (some + 1 < lanes && of[some].empty()) ++some;
    begin = of[some].begin;
    bool steps = true, stands = true;
    for (int l = some; l < lanes; ++l) {
      slots = max(slots, of[l].size());
      // Lanes without a token to slide with begin where it suits.
      from[l] = of[l].empty() ? from[max(l - 1, 0)] : of[l].begin - begin;
      steps = steps && (of[l].empty() || from[l] == l);
      stands = stands && from[l] == 0;
    }
    for (int l = lanes; l < kLanes; ++l) from[l] = from[lanes - 1];
    if (steps) {
      for (int l = 0; l < kLanes; ++l) from[l] = l;
    }
    sliding = steps ? Sliding::kStep : stands ? Sliding::kStand : Sliding::kMixed;
    // A weighted sum of four lanes takes the tokens of all.
    for (int l = 0; l < kLanes; l += kMaxGroupLanes) padding = max(padding, from[l + kMaxGroupLanes - 1] - from[l]);
    padding = max(padding, kMinPadding);
  }

  // Whether the same vectors serve both.
  NATTEN_INLINE bool is_like(Slide const& other) const {
    if (sliding != other.sliding) return false;
    return sliding != Sliding::kMixed || !any(from != other.from);
  }

 private:
  static constexpr int kMinPadding = 3;  // for pairs of slots in a word
};

// The tiles of a panel each see a part of a chunk's rows: more may be in it than of a tile alone.
constexpr int kPanelChunkBytes = 72 << 10;

// The scores of a tile for a chunk: room for its rows, behind zeros.
constexpr int kMaxPadding = kLanes;
constexpr int kScoreVectors = kMaxPadding + kMaxChunkTokens;

// What the tiles of a panel have to do with some rows of the stream side, or, where they are neighbours on the last axis, with a
// part of one.
struct PanelChunk {
  struct Row {
    int z, y;
    int first, end;  // tiles that take part
  };
  Slide slide[kPanelTiles];
  Chunk of_tile[kPanelTiles];
  Row row[kMaxChunkTokens];
  int rows = 0;
  bool is_line;  // else all tiles see the same tokens of a row

  PanelChunk(Panel const& panel, bool is_line_) : is_line(is_line_) {
    for (int t = 0; t < panel.count(); ++t) slide[t] = t == 0 || is_line ? Slide(panel[t]) : slide[0];
  }

  // Tile t is to see the slots [begin, end).
  void set_slots(int t, int begin, int end, StreamBox const& box, int tokens_per_word) {
    Slide const& s = slide[t];
    Chunk& c = of_tile[t];
    int const last = s.from[kLanes - 1];
    c.slots = max(end - begin, 0);
    c.pitch = c.slots + s.padding;
    c.x = box.first + (s.begin + begin - box.first) / tokens_per_word * tokens_per_word;
    c.width = round_up(min(s.begin + end + last, box.axis[2].end) - c.x, tokens_per_word);
    c.begin = s.begin + begin - c.x;
    c.from = s.from;
  }
  void clear(int tiles) {
    rows = 0;
    for (int t = 0; t < tiles; ++t) of_tile[t].rows = 0;
  }
};

// Calls visit(chunk) until a panel's part of a packed box is covered, which holds the whole intervals on the last axis.
// `is_line`: the tiles are neighbours on that axis.
template <class Visit>
void for_each_panel_chunk(Panel const& panel, bool is_line, StreamBox const& box, int max_tokens, int tokens_per_word,
                          Visit&& visit) {
  Interval part[kMaxRank];
  for (int a = 0; a < kMaxRank; ++a) {
    part[a] = Interval{panel[0].stream[a].begin, panel[panel.count() - 1].stream[a].end}.clipped_to(box.axis[a]);
    if (part[a].empty()) return;
  }
  PanelChunk chunk(panel, is_line);
  auto const add_row = [&](int z, int y) {
    PanelChunk::Row row{z, y, panel.count(), 0};
    for (int t = 0; t < panel.count(); ++t) {
      Tile const& tile = panel[t];
      if (chunk.of_tile[t].slots == 0 || !tile.interval[0][0].contains(z) || !tile.interval[1][0].contains(y)) continue;
      chunk.of_tile[t].append(box, z, y);
      row.first = min(row.first, t);
      row.end = t + 1;
    }
    if (row.first < row.end) chunk.row[chunk.rows++] = row;
  };
  auto const visit_and_clear = [&] {
    if (chunk.rows > 0) visit(const_cast<PanelChunk const&>(chunk));
    chunk.clear(panel.count());
  };
  auto const for_each_row = [&](auto const& use) {
    for (int z = part[0].begin; z < part[0].end; ++z) {
      for (int y = part[1].begin; y < part[1].end; ++y) use(z, y);
    }
  };

  if (is_line) {
    int const pieces = ceil_div(part[2].size(), min(max_tokens, kMaxChunkTokens - kMaxPadding));
    for_each_row([&](int z, int y) {
      for (int i = 0; i < pieces; ++i) {
        Interval const piece = {part[2].begin + i * part[2].size() / pieces,
                                part[2].begin + (i + 1) * part[2].size() / pieces};
        for (int t = 0; t < panel.count(); ++t) {
          Slide const& s = chunk.slide[t];
          Interval const slots = Interval{piece.begin - s.begin, piece.end - s.begin}.clipped_to({0, s.slots});
          chunk.set_slots(t, slots.begin, slots.end, box, tokens_per_word);
        }
        add_row(z, y);
        visit_and_clear();
      }
    });
    return;
  }
  for (int t = 0; t < panel.count(); ++t) chunk.set_slots(t, 0, chunk.slide[t].slots, box, tokens_per_word);
  Chunk const& any_tile = chunk.of_tile[0];
  int const max_rows = max(1, min(max_tokens / max(1, any_tile.width), kMaxChunkTokens / any_tile.pitch));
  for_each_row([&](int z, int y) {
    add_row(z, y);
    if (chunk.rows == max_rows) visit_and_clear();
  });
  visit_and_clear();
}

// Scores of some tiles of a panel for a chunk: dot products of their lanes, which are `lanes_step` apart, at
// out[tile * kScoreVectors + kMaxPadding], with the zeros that belong to them.
template <class Math>
void slide_rows(PanelChunk const& chunk, Interval tiles, StreamBox const& box, SlidingOperand const& operand,
                Vec const* lanes, int lanes_step, Vec* out, FetchAhead& fetch) {
  Vec* scores[kPanelTiles];  // of the next row
  for (int t = tiles.begin; t < tiles.end; ++t) {
    scores[t] = out + t * kScoreVectors + kMaxPadding;
    for (int i = 1; i <= chunk.slide[t].padding; ++i) scores[t][-i] = Vec{};
  }
  for (int r = 0; r < chunk.rows; ++r) {
    PanelChunk::Row const& row = chunk.row[r];
    Interval const taking = Interval{row.first, row.end}.clipped_to(tiles);
    if (taking.empty()) continue;
    int const line = box.row(row.z, row.y);
    // Tokens of the first lane, from box.axis[2].begin on.
    auto const tokens_of = [&](int t) {
      Chunk const& c = chunk.of_tile[t];
      int const begin = c.x + c.begin - box.axis[2].begin;
      return Interval{begin, begin + c.slots};
    };
    // The tiles [first, end) with tokens [x, next), which are alike.
    auto const run_all = [&](int first, int end, int x, int next) {
      int const n = end - first;
      Vec const* own[kPanelTiles];
      Vec* to[kPanelTiles];
      for (int i = 0; i < n; ++i) {
        own[i] = lanes + (first + i) * lanes_step;
        to[i] = scores[first + i] + (x - tokens_of(first + i).begin);
      }
      Slide const& slide = chunk.slide[first];
      for (int at = x, size, left = ceil_div(next - x, max_slots(n)); at < next; at += size, --left) {
        size = ceil_div(next - at, left);
        fetch.some();
        SlideRuns<Math>::of(slide.sliding, n, size)(own, operand.words, operand.at(line, at, 0), operand.pitch,
                                                    slide.from, to);
        for (int t = 0; t < n; ++t) to[t] += size;
      }
    };
    Interval const all = {tokens_of(taking.begin).begin, tokens_of(taking.end - 1).end};
    if (!chunk.is_line) run_all(taking.begin, taking.end, all.begin, all.end);
    for (int x = all.begin; chunk.is_line && x < all.end;) {
      int next = all.end;
      Interval seeing = {taking.end, taking.end};  // tiles that see x: neighbours, as tokens are monotone
      for (int t = taking.begin; t < taking.end; ++t) {
        Interval const tokens = tokens_of(t);
        if (x < tokens.begin) next = min(next, tokens.begin);
        if (!tokens.contains(x)) continue;
        next = min(next, tokens.end);
        seeing = {min(seeing.begin, t), t + 1};
      }
      for (int t = seeing.begin, end; t < seeing.end; t = end) {
        for (end = t + 1; end < seeing.end && chunk.slide[end].is_like(chunk.slide[t]);) ++end;
        run_all(t, end, x, next);
      }
      x = next;
    }
    for (int t = taking.begin; t < taking.end; ++t) {
      Chunk const& c = chunk.of_tile[t];
      for (int i = c.slots; i < c.pitch; ++i) scores[t][i] = Vec{};
      scores[t] += c.pitch;
    }
  }
}

}  // namespace natten::cpu::NATTEN_CPU_ISA
