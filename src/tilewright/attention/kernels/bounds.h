// Interval arithmetic on integers: the class of a tile under a mask (attention/bounds.py is its twin).
// Read by C++ and CUDA; TW_INLINE comes from either prelude.

namespace tw {

struct Bound { int64_t lo, hi; };

// Of a tile of scores: positions, numbers of heads, request and keys, lengths of the request.
struct Tile { Bound qo, kv, qo_head, kv_head, request, key, qo_len, kv_len; };

enum TileClass { EMPTY = 0, PARTIAL = 1, FULL = 2 };

TW_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
TW_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

TW_INLINE Bound bound(int64_t x) { return Bound{x, x}; }
TW_INLINE Bound bound_bool() { return Bound{0, 1}; }
TW_INLINE Bound bound_int() { return Bound{-2147483648ll, 2147483647ll}; }
// What may have wrapped around may be anything.
TW_INLINE Bound bound_fit(int64_t lo, int64_t hi) {
  return lo < -2147483648ll || hi > 2147483647ll ? bound_int() : Bound{lo, hi};
}

TW_INLINE Bound bound_add(Bound a, Bound b) { return bound_fit(a.lo + b.lo, a.hi + b.hi); }
TW_INLINE Bound bound_sub(Bound a, Bound b) { return bound_fit(a.lo - b.hi, a.hi - b.lo); }
TW_INLINE Bound bound_neg(Bound a) { return bound_fit(-a.hi, -a.lo); }
TW_INLINE Bound bound_mul(Bound a, Bound b) {
  int64_t w = a.lo * b.lo, x = a.lo * b.hi, y = a.hi * b.lo, z = a.hi * b.hi;
  return bound_fit(least(least(w, x), least(y, z)), most(most(w, x), most(y, z)));
}
TW_INLINE Bound bound_abs(Bound a) {
  int64_t l = a.lo < 0 ? -a.lo : a.lo, h = a.hi < 0 ? -a.hi : a.hi;
  return bound_fit(a.lo <= 0 && a.hi >= 0 ? 0 : least(l, h), most(l, h));
}
TW_INLINE Bound bound_lower(Bound a, Bound b) { return Bound{least(a.lo, b.lo), least(a.hi, b.hi)}; }
TW_INLINE Bound bound_upper(Bound a, Bound b) { return Bound{most(a.lo, b.lo), most(a.hi, b.hi)}; }
TW_INLINE int64_t bound_floor(int64_t a, int64_t by) { return by == 1 ? a : a >= 0 ? a / by : -((by - 1 - a) / by); }
TW_INLINE Bound bound_div(Bound a, Bound b) {
  if (b.lo != b.hi || b.lo <= 0) return bound_int();
  return Bound{bound_floor(a.lo, b.lo), bound_floor(a.hi, b.lo)};
}
TW_INLINE Bound bound_mod(Bound a, Bound b) {
  if (b.lo != b.hi || b.lo <= 0) return bound_int();
  int64_t low = bound_floor(a.lo, b.lo), high = bound_floor(a.hi, b.lo);
  if (low != high) return Bound{0, b.lo - 1};
  return Bound{a.lo - low * b.lo, a.hi - low * b.lo};
}

TW_INLINE Bound bound_less(Bound a, Bound b) { return Bound{a.hi < b.lo, a.lo < b.hi}; }
TW_INLINE Bound bound_less_equal(Bound a, Bound b) { return Bound{a.hi <= b.lo, a.lo <= b.hi}; }
TW_INLINE Bound bound_same(Bound a, Bound b) {
  return Bound{a.lo == a.hi && b.lo == b.hi && a.lo == b.lo, a.lo <= b.hi && b.lo <= a.hi};
}
TW_INLINE Bound bound_truth(Bound a) { return Bound{a.lo > 0 || a.hi < 0, a.lo != 0 || a.hi != 0}; }
TW_INLINE Bound bound_not(Bound a) { return Bound{1 - a.hi, 1 - a.lo}; }
TW_INLINE Bound bound_and(Bound a, Bound b) { return Bound{a.lo & b.lo, a.hi & b.hi}; }
TW_INLINE Bound bound_or(Bound a, Bound b) { return Bound{a.lo | b.lo, a.hi | b.hi}; }
TW_INLINE Bound bound_xor(Bound a, Bound b) {
  return a.lo == a.hi && b.lo == b.hi ? bound(a.lo ^ b.lo) : bound_bool();
}
TW_INLINE Bound bound_select(Bound c, Bound a, Bound b) {
  if (c.lo == 1) return a;
  if (c.hi == 0) return b;
  return Bound{least(a.lo, b.lo), most(a.hi, b.hi)};
}

TW_INLINE int tile_class(Bound mask) { return mask.hi == 0 ? EMPTY : mask.lo == 1 ? FULL : PARTIAL; }

}  // namespace tw
