// The walk of a decode kernel's CTA over its units and their tiles (see decode.cuh; tests compile it for
// the host).
//
// A node is a row of the table: a request, or keys that several requests share. A unit is (request, block of KV
// heads), in that order; a CTA does one head of the block. It has the keys of the request's own node and of the
// shared nodes that no launch in front does, one *piece* after the other, from the inside out.
// The launch in front (KIND is FRONT) walks parts of shared nodes: `start_item`.
//
// In front of this file: table.h, variant.h, the constants of `attention` (see decode.cuh).

namespace attention {

// A unit of a node as one number, in their order.
TW_INLINE int64_t place(int node, int unit) { return static_cast<int64_t>(node) << 32 | static_cast<uint32_t>(unit); }
struct Range {  // of this CTA; `first` and `last` name the ranges that share its first and last unit
  Cut begin, end;
  int64_t limit;  // the place of the first unit that it has no part of
};
TW_INLINE Range range_of(const Params& p, int cta) {
  const Cut begin = p.cuts[cta / HEAD_BLOCK], end = p.cuts[cta / HEAD_BLOCK + 1];
  return Range{begin, end, place(end.node, end.unit + (end.tile > 0))};
}

// The tiles of a piece from `tile` to `end` are numbers in `seen`, those that the rows of the unit can see.
struct Walk {
  int node, unit, head, tile, end;
  int piece, outer, before;  // the node whose keys they are, the next one, the tiles of the pieces before
  int joined, state;         // of a request: the next node of which there are states; of an item: its first state
  tw::Pages keys;            // of the piece
  int token, rows, first;  // the first row of q; packed rows; at least the lowest position of a query
  int request, kv_len;     // of a request: its number, all its keys
  tw::Tiles<Variant::RANGES> seen;
};

TW_INLINE bool in_range(const Walk& w, const Range& range) {
  return place(w.node, w.unit) < range.limit;
}

// The units of a node, and which pieces they have.
TW_INLINE int units_of(const Params& p, Walk& w) {
  w.piece = w.node;
  if constexpr (LEVELS == 1) {
    return p.kv_heads / HEAD_BLOCK;
  } else {
    const tw::Node node = tw::node_at(p, w.node);
    const int tokens = tw::first_row(p, node.end) - tw::first_row(p, node.begin);
    w.outer = node.outer;
    w.joined = node.joined;
    return w.node >= tw::own_node(p, 0) && tokens > 0 ? p.kv_heads / HEAD_BLOCK : 0;
  }
}

TW_INLINE tw::Tile tile_of(const Params& p, const Walk& w, tw::Bound kv, tw::Bound key) {
  tw::Tile tile{tw::Bound{w.first, w.first + w.rows / G - 1}, kv, tw::Bound{w.head * G, w.head * G + G - 1}, tw::bound(w.head),
                tw::bound(w.node), key, tw::bound(w.rows / G), tw::bound(w.keys.length)};
  if constexpr (LEVELS > 1 && KIND == FRONT) {
    tile.qo.hi = MAX_KEYS;
    tile.request = tile.qo_len = tile.kv_len = tw::Bound{0, MAX_KEYS};
  } else if constexpr (LEVELS > 1) {
    tile.request = tw::bound(w.request);
    tile.kv_len = tw::bound(w.kv_len);
  }
  return tile;
}

// The rows of a unit.
TW_INLINE void bound(Walk& w, const Params& p, int member) {
  const tw::Node node = tw::node_at(p, w.node);
  w.token = tw::first_row(p, node.begin);
  w.head = w.unit * HEAD_BLOCK + member;
  const int tokens = tw::first_row(p, node.end) - w.token;
  w.request = w.node - tw::own_node(p, 0);
  w.first = tw::first_query(p, w.keys, w.request, tokens);
  w.rows = tokens * G < ROWS ? tokens * G : ROWS;
  w.before = 0;
  w.kv_len = w.keys.number(w.keys.length);
}

// The tiles of a piece that this CTA does: to the cut, or to the last as the keys are now.
TW_INLINE bool is_last(const Walk& w, const Range& range) { return place(w.node, w.unit) == place(range.end.node, range.end.unit); }
TW_INLINE void see(Walk& w, const Params& p, const Variant& variant, const Range& range) {
  w.seen = tw::tiles_seen<TILE>(variant, tile_of(p, w, {}, {}), w.keys);
  const int all = w.seen.count(), left = range.end.tile - w.before;
  w.end = is_last(w, range) && left < all ? left : all;
}

// To the first unit from here on that has rows; `entered`: whether the keys are its node's.
TW_INLINE void settle(Walk& w, const Params& p, const Variant& variant, const Range& range, int member, bool entered) {
  while (in_range(w, range)) {
    if (!entered) w.keys = tw::pages_of(p, w.node, MAX_KEYS);
    if (w.unit < units_of(p, w)) break;
    ++w.node;
    w.unit = 0;
    entered = false;
  }
  w.rows = 0;
  if (!in_range(w, range)) return;
  bound(w, p, member);
  see(w, p, variant, range);
}
// Whether this CTA has another piece of the unit.
TW_INLINE bool has_piece(const Walk& w, const Range& range) {
  return LEVELS > 1 && KIND != FRONT && w.outer >= 0 && !(is_last(w, range) && range.end.tile <= w.before + w.seen.count());
}
TW_INLINE void next_piece(Walk& w, const Params& p, const Variant& variant, const Range& range) {
  w.before += w.seen.count();
  w.tile -= w.seen.count();
  w.piece = w.outer;
  w.outer = tw::node_at(p, w.piece).outer;
  w.keys = tw::pages_of(p, w.piece, MAX_KEYS);
  see(w, p, variant, range);
}
TW_INLINE void next_unit(Walk& w, const Params& p, const Variant& variant, const Range& range, int member) {
  ++w.unit;
  w.tile = 0;
  settle(w, p, variant, range, member, LEVELS == 1);
}
// The queries of an item from `token` on, at most TOKENS, as the only unit of a range, which is made for it.
TW_INLINE Walk start_item(const Params& p, const Variant& variant, const tw::SharedItem& item, int token, Range& range) {
  Walk w{};
  w.node = w.piece = item.node;
  w.head = item.head;
  w.outer = w.joined = -1;
  w.keys = tw::pages_of(p, w.node, MAX_KEYS);
  w.token = token;
  w.rows = (item.end - token < TOKENS ? item.end - token : TOKENS) * G;
  w.state = item.row + (token - item.token);
  // Queries of shared keys lie behind these, but for those of a request without keys of its own.
  w.first = table::QUERY_POSITIONS ? -MAX_KEYS : w.keys.base + w.keys.length - (p.qo_indptr ? TOKENS : 1);
  range = Range{Cut{w.node}, Cut{w.node}, place(w.node, 1)};
  w.seen = tw::tiles_seen<TILE>(variant, tile_of(p, w, {}, {}), w.keys);
  const int64_t count = w.seen.count();
  w.tile = static_cast<int>(count * item.chunk / item.chunks);
  w.end = static_cast<int>(count * (item.chunk + 1) / item.chunks);
  return w;
}
TW_INLINE Walk start(const Params& p, const Variant& variant, const Range& range, int member) {
  Walk w{};
  w.node = range.begin.node;
  w.unit = range.begin.unit;
  w.tile = range.begin.tile;
  settle(w, p, variant, range, member, false);
  while (in_range(w, range) && w.tile >= w.seen.count() && has_piece(w, range)) next_piece(w, p, variant, range);
  return w;
}

}  // namespace attention
