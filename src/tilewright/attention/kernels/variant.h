// What the rendered struct `Variant` and its users need: tensors, sinks, extents (attention/extents.py is
// the twin of these).
// Read by C++ and CUDA; TW_INLINE comes from either prelude, TW_METHOD from the family.

namespace tw {

#ifdef TW_SCAN
// Between which values elements of one row of a tensor lie, as far as a kernel has learnt that: those of each of its
// first tiles of SIZE, and of one range.
struct Extremes {
  static constexpr int SIZE = attention::BN;
  int32_t row = -1, tiles = 0, from = 0, to = -1;
  const int2* of = nullptr;
  int2 range{};
  // Whether those of a tile hold for some of its columns (for a few, their own are less wide), and of which.
  TW_METHOD bool holds(Bound wanted, Bound column, int& tile) const {
    tile = static_cast<int>(column.lo) / SIZE;
    return row == wanted.lo && column.lo >= 0 && tile < tiles && column.hi < (tile + 1) * SIZE && column.hi - column.lo >= 32;
  }
};
#endif

// A tensor of a variant, one row for each request or row of q. Elements outside it are 0.
template <class T>
struct Array {
  const T* data;
  int32_t rows, columns;
#ifdef TW_SCAN
  Extremes known{};
#endif
  TW_METHOD T at(int32_t row, int32_t column) const {
    const bool inside = row >= 0 && row < rows && column >= 0 && column < columns;
#ifdef TW_SCAN  // of 32 bits, without a branch
    return __builtin_bit_cast(T, tw::load_word_if(inside, data + static_cast<int64_t>(row) * columns + column));
#endif
    return inside ? data[static_cast<int64_t>(row) * columns + column] : T(0);
  }
};

// Between which values the elements of one row lie, if that is known or they are at most TW_SCAN; a family that does
// not define it reads none.
template <class T>
TW_INLINE Bound bound_elements(const Array<T>& array, Bound row, Bound column) {
#ifdef TW_SCAN
  const Extremes& known = array.known;
  if (row.lo == row.hi && known.row == row.lo && known.from == column.lo && known.to == column.hi) return Bound{known.range.x, known.range.y};
  int tile;
  if (row.lo == row.hi && known.holds(row, column, tile)) return Bound{known.of[tile].x, known.of[tile].y};
  if (row.lo == row.hi && column.hi - column.lo < TW_SCAN) {
    const bool exists = row.lo >= 0 && row.lo < array.rows, outside = !exists || column.lo < 0 || column.hi >= array.columns;
    const int32_t* at = array.data + (exists ? row.lo * array.columns + most(column.lo, 0) : 0);
    const int32_t* end = exists ? array.data + row.lo * array.columns + least(column.hi + 1, array.columns) : at;
    int32_t low = outside ? 0 : 2147483647, high = outside ? 0 : -2147483648;
    const auto take = [&](int32_t x) { low = min(low, x), high = max(high, x); };
    for (; at < end && (reinterpret_cast<uint64_t>(at) & 15); ++at) take(__ldg(at));
#pragma unroll 8
    for (; at + 4 <= end; at += 4) {
      const int4 x = __ldg(reinterpret_cast<const int4*>(at));
      take(x.x), take(x.y), take(x.z), take(x.w);
    }
    for (; at < end; ++at) take(__ldg(at));
    return Bound{low, high};
  }
#endif
  return bound_int();
}

// A row of D elements as a hook reads it: 0 outside. `read(d)` is an element as float32.
template <int D, class Read>
struct HookRow {
  const Read& read;
  TW_METHOD float operator[](int32_t d) const { return static_cast<uint32_t>(d) < static_cast<uint32_t>(D) ? read(d) : 0.0f; }
};
template <int D, class Read>
TW_INLINE HookRow<D, Read> elements_of(const Read& read) { return HookRow<D, Read>{read}; }

// A row's sink joins its softmax, once, when all of the row's keys are in `largest` and `weight` (the sum
// of exp(score - largest)). Returns the factor of the outputs, which the sink has no part in.
TW_INLINE float add_sink(float sink, float& largest, float& weight) {
  const float before = largest;
  largest = sink > before ? sink : before;
  const float base = largest < -3.4028235e38f ? 0.0f : largest;  // -inf: nothing is seen
  const float keep = tw::exp(before - base);
  weight = weight * keep + tw::exp(sink - base);
  return keep;
}

// -- extents: the keys that a tile of rows can see ------------------------------------------------

// floor((slope * key + rest) / by); where not `known` it may be any number.
struct Line {
  int64_t slope;
  Bound rest;
  int64_t by;
  bool known;
};

TW_INLINE Line line(Bound rest) { return Line{0, rest, 1, true}; }
TW_INLINE Line line_key() { return Line{1, Bound{0, 0}, 1, true}; }
TW_INLINE Line line_unknown() { return Line{0, Bound{0, 0}, 1, false}; }
// A line if it stays in int32 over all keys.
TW_INLINE Line line_fit(int64_t slope, Bound rest, bool known, Bound key) {
  if (!known || slope < -2147483648ll || slope > 2147483647ll) return line_unknown();
  const int64_t a = slope * key.lo, b = slope * key.hi;
  if (least(a, b) + rest.lo < -2147483648ll || most(a, b) + rest.hi > 2147483647ll) return line_unknown();
  return Line{slope, rest, 1, true};
}
TW_INLINE Line line_add(Line a, Line b, Bound key) {
  const bool known = a.known && b.known && a.by == 1 && b.by == 1;
  return line_fit(a.slope + b.slope, Bound{a.rest.lo + b.rest.lo, a.rest.hi + b.rest.hi}, known, key);
}
TW_INLINE Line line_sub(Line a, Line b, Bound key) {
  const bool known = a.known && b.known && a.by == 1 && b.by == 1;
  return line_fit(a.slope - b.slope, Bound{a.rest.lo - b.rest.hi, a.rest.hi - b.rest.lo}, known, key);
}
TW_INLINE Line line_mul(Line a, Line b, Bound key) {
  if (b.slope != 0) { const Line other = a; a = b; b = other; }
  const bool known = a.known && b.known && a.by == 1 && b.by == 1 && b.slope == 0 && b.rest.lo == b.rest.hi;
  if (!known) return line_unknown();
  const int64_t times = b.rest.lo, low = a.rest.lo * times, high = a.rest.hi * times;
  return line_fit(a.slope * times, Bound{least(low, high), most(low, high)}, true, key);
}
TW_INLINE Line line_div(Line a, Line b, Bound) {
  const bool known = a.known && b.known && a.by == 1 && b.by == 1 && b.slope == 0;
  if (!known || b.rest.lo != b.rest.hi || b.rest.lo <= 0) return line_unknown();
  return Line{a.slope, a.rest, b.rest.lo, true};
}

TW_INLINE Bound keys_none() { return Bound{0, -1}; }
TW_INLINE Bound keys_both(Bound a, Bound b) { return Bound{most(a.lo, b.lo), least(a.hi, b.hi)}; }
TW_INLINE Bound keys_if(Bound condition, Bound key) { return condition.hi != 0 ? key : keys_none(); }
// Keys where a <= b is possible: (a.slope - b.slope) * key <= room.
TW_INLINE Bound keys_up_to(Line a, Line b, Bound key) {
  const bool known = a.known && b.known && (a.by == 1 || (b.by == 1 && b.slope == 0)) && (b.by == 1 || a.slope == 0);
  if (!known) return key;
  const int64_t slope = a.slope - b.slope, room = b.rest.hi * a.by + a.by - 1 - a.rest.lo * b.by;
  if (slope == 0) return room < 0 ? keys_none() : key;
  return slope < 0 ? Bound{-bound_floor(room, -slope), key.hi} : Bound{key.lo, bound_floor(room, slope)};
}
TW_INLINE Bound keys_below(Line a, Line b, Bound key) {
  const int64_t one = a.by == 1;
  a.rest = Bound{a.rest.lo + one, a.rest.hi + one};
  b.rest = Bound{b.rest.lo - (1 - one), b.rest.hi - (1 - one)};
  return keys_up_to(a, b, key);
}

template <int N>
struct Ranges { Bound of[N]; };

// Tiles of keys, in order, without those that nothing sees: tile `at(i)` is the i-th of `count()`.
template <int N>
struct Tiles {
  int begin[N], end[N];
  TW_METHOD int count() const {
    int all = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) all += end[n] - begin[n];
    return all;
  }
  TW_METHOD int at(int i) const {
    int tile = begin[0] + i;
#pragma unroll
    for (int n = 1; n < N; ++n)
      if (tile >= end[n - 1]) tile += begin[n] - end[n - 1];
    return tile;
  }
};

// The tiles of TILE keys that the rows of `tile` can see.
template <int TILE, class Variant, class Pages>
TW_INLINE Tiles<Variant::RANGES> tiles_seen(const Variant& variant, Tile tile, const Pages& pages) {
  constexpr int N = Variant::RANGES;
  Tiles<N> tiles;
  tile.key = Bound{0, pages.length - 1};
  Line kv = line_key(), number = line_key();
  if constexpr (table::KEY_POSITIONS || table::LEVELS > 1) kv = line_fit(pages.stride, bound(pages.base), true, tile.key);
  if constexpr (table::LEVELS > 1) number = kv;
  const Ranges<N> ranges = variant.ranges(tile, kv, number);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const Bound keys = keys_both(ranges.of[n], tile.key);
    const bool some = keys.lo <= keys.hi;
    tiles.begin[n] = some ? static_cast<int>(keys.lo) / TILE : 0;
    tiles.end[n] = some ? static_cast<int>(keys.hi) / TILE + 1 : 0;
  }
#pragma unroll
  for (int last = N - 1; last > 0; --last)  // sorted by their begin
#pragma unroll
    for (int n = 0; n < last; ++n)
      if (tiles.begin[n + 1] < tiles.begin[n]) {
        const int begin = tiles.begin[n], end = tiles.end[n];
        tiles.begin[n] = tiles.begin[n + 1];
        tiles.end[n] = tiles.end[n + 1];
        tiles.begin[n + 1] = begin;
        tiles.end[n + 1] = end;
      }
#pragma unroll
  for (int n = 1; n < N; ++n) {  // without overlaps
    tiles.begin[n] = tiles.begin[n] > tiles.end[n - 1] ? tiles.begin[n] : tiles.end[n - 1];
    tiles.end[n] = tiles.end[n] > tiles.begin[n] ? tiles.end[n] : tiles.begin[n];
  }
  return tiles;
}

}  // namespace tw
