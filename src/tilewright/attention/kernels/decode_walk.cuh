// The walk of a decode kernel's CTA over its units and their tiles (see decode.cuh; tests compile it for
// the host).
//
// A node is a row of the table: a request, or keys that several requests share. A unit is (node, block of
// packed rows, block of KV heads), in that order; a CTA does one head of the block. A node of more than
// NARROW_ROWS packed rows is *wide*: its rows go WIDE_ROWS at a time.
//
// In front of this file: table.h, variant.h, the constants of `attention` (see decode.cuh).

namespace attention {

struct Range {  // of this CTA; `first` and `last` name the ranges that share its first and last unit
  Cut begin, end;
};
TW_INLINE Range range_of(const Params& p, int cta) { return Range{p.cuts[cta / HEAD_BLOCK], p.cuts[cta / HEAD_BLOCK + 1]}; }

// The tiles of a unit from `tile` to `end` are numbers in `seen`, those that its rows can see.
struct Walk {
  int node, unit, head, tile, end;
  tw::Pages keys;
  int units;               // of the node, where nodes are shared
  bool wide;
  int token, rows, first;  // the first row of q; packed rows; at least the lowest position of a query
  tw::Tiles<Variant::RANGES> seen;
};

TW_INLINE bool in_range(const Walk& w, const Range& range) {
  const Cut& end = range.end;
  return w.node < end.node || (w.node == end.node && (w.unit < end.unit || (w.unit == end.unit && end.tile > 0)));
}
template <bool WIDE>
TW_INLINE bool has_unit(const Walk& w, const Range& range) {
  return in_range(w, range) && (LEVELS == 1 || w.wide == WIDE);
}

// Begins a node: its keys and its units.
TW_INLINE void enter(Walk& w, const Params& p) {
  w.keys = tw::pages_of(p, w.node, MAX_KEYS);
  if constexpr (LEVELS > 1) {
    const tw::Node node = tw::node_at(p, w.node);
    const int tokens = tw::first_row(p, node.end) - tw::first_row(p, node.begin);
    w.wide = tokens * G > NARROW_ROWS;
    w.units = p.kv_heads / HEAD_BLOCK * (w.wide ? (tokens + WIDE_TOKENS - 1) / WIDE_TOKENS : tokens > 0);
  }
}
TW_INLINE int units_of(const Params& p, const Walk& w) { return LEVELS == 1 ? p.kv_heads / HEAD_BLOCK : w.units; }

TW_INLINE tw::Tile tile_of(const Params& p, const Walk& w, tw::Bound kv, tw::Bound key) {
  tw::Tile tile{tw::Bound{w.first, w.first + w.rows / G - 1}, kv, tw::Bound{w.head * G, w.head * G + G - 1}, tw::bound(w.head),
                tw::bound(w.node), key, tw::bound(w.rows / G), tw::bound(w.keys.length)};
  if constexpr (LEVELS > 1) {
    const tw::Node node = tw::node_at(p, w.node);
    if (w.node < tw::own_node(p, 0)) tile.qo.hi = MAX_KEYS;
    tile.request = tw::Bound{node.begin, node.end - 1};
    tile.qo_len = tile.kv_len = tw::Bound{0, MAX_KEYS};
  }
  return tile;
}

// The rows of a unit, and the tiles that this CTA does: to the cut, or to the last as the keys are now.
TW_INLINE void bound(Walk& w, const Params& p, const Variant& variant, const Range& range, int member) {
  const tw::Node node = tw::node_at(p, w.node);
  w.token = tw::first_row(p, node.begin);
  w.head = w.unit * HEAD_BLOCK + member;
  int tokens = tw::first_row(p, node.end) - w.token;
  if constexpr (LEVELS > 1) {
    const int head_blocks = p.kv_heads / HEAD_BLOCK, skipped = w.wide ? w.unit / head_blocks * WIDE_TOKENS : 0;
    w.head = w.unit % head_blocks * HEAD_BLOCK + member;
    w.token += skipped;
    tokens = w.wide && tokens - skipped > WIDE_TOKENS ? WIDE_TOKENS : tokens - skipped;
  }
  // Queries of shared keys lie behind these, but for those of a request without keys of its own.
  w.first = table::QUERY_POSITIONS ? -MAX_KEYS : w.keys.base + w.keys.length - NARROW_ROWS;
  const int request = w.node - tw::own_node(p, 0);
  if (request >= 0) w.first = tw::first_query(p, w.keys, request, tokens);
  w.rows = tokens * G < MOST_ROWS ? tokens * G : MOST_ROWS;
  w.seen = tw::tiles_seen<TILE>(variant, tile_of(p, w, {}, {}), w.keys);
  const int all = w.seen.count();
  w.end = w.node == range.end.node && w.unit == range.end.unit && range.end.tile < all ? range.end.tile : all;
}

// To the next unit that has rows, from one that may have none, whichever its class.
TW_INLINE void settle(Walk& w, const Params& p, const Variant& variant, const Range& range, int member) {
  while (in_range(w, range) && w.unit >= units_of(p, w)) {
    ++w.node;
    w.unit = 0;
    if (in_range(w, range)) enter(w, p);
  }
  if (in_range(w, range)) bound(w, p, variant, range, member);
}
TW_INLINE void next_unit(Walk& w, const Params& p, const Variant& variant, const Range& range, int member) {
  ++w.unit;
  w.tile = 0;
  settle(w, p, variant, range, member);
}
TW_INLINE Walk start(const Params& p, const Variant& variant, const Range& range, int member) {
  Walk w{};
  w.node = range.begin.node;
  w.unit = range.begin.unit;
  w.tile = range.begin.tile;
  if (in_range(w, range)) enter(w, p);
  settle(w, p, variant, range, member);
  return w;
}

}  // namespace attention
