// The tiles that a mask lets a request see, on the host: a program (attention/extents.py) runs the functions
// that kernels have in their text.
//
// In front of this file: bounds.h, table.h, variant.h of a table without shared keys and positions; the
// enumeration `Operation`. A program is pairs of an operation and its argument, in postfix order; it leaves
// one range of keys for each case of the mask on the stack.

namespace extents {

struct Value { tw::Bound bound; tw::Line line; };  // an operation leaves one of the two

// What a plan is for (`packed` of attention/planner.py); the steps of the mask's program are behind it.
struct Shape { int64_t steps, cases, kv_heads, group, head_blocks; };

template <int CASES>
struct Mask {
  static constexpr int RANGES = CASES;
  const Shape& shape;
  Value* stack;

  tw::Ranges<RANGES> ranges(const tw::Tile& tile, const tw::Line&, const tw::Line&) const {
    Value* top = stack - 1;
    const int64_t* program = reinterpret_cast<const int64_t*>(&shape + 1);
    for (const int64_t* step = program; step < program + 2 * shape.steps; step += 2) switch (static_cast<Operation>(step[0])) {
#define TW_PUSH(name, field, value) case name: (++top)->field = value; break;
#define TW_BOUND_1(name) case name: top->bound = tw::name(top->bound); break;
#define TW_BOUND_2(name) case name: --top; top->bound = tw::name(top->bound, top[1].bound); break;
#define TW_LINES(name, field) case name: top -= 2; top->field = tw::name(top->line, top[1].line, top[2].bound); break;
      TW_PUSH(constant, bound, tw::bound(step[1]))
      TW_PUSH(position, bound, (&tile.qo)[step[1]])
      TW_PUSH(bound_int, bound, tw::bound_int())
      TW_PUSH(bound_bool, bound, tw::bound_bool())
      TW_PUSH(keys_none, bound, tw::keys_none())
      TW_PUSH(line_key, line, tw::line_key())
      TW_PUSH(line_unknown, line, tw::line_unknown())
      case line: top->line = tw::line(top->bound); break;
      TW_BOUND_1(bound_neg) TW_BOUND_1(bound_not) TW_BOUND_1(bound_abs) TW_BOUND_1(bound_truth)
      TW_BOUND_2(bound_add) TW_BOUND_2(bound_sub) TW_BOUND_2(bound_mul) TW_BOUND_2(bound_lower) TW_BOUND_2(bound_upper)
      TW_BOUND_2(bound_div) TW_BOUND_2(bound_mod) TW_BOUND_2(bound_less) TW_BOUND_2(bound_less_equal) TW_BOUND_2(bound_same)
      TW_BOUND_2(bound_and) TW_BOUND_2(bound_or) TW_BOUND_2(bound_xor) TW_BOUND_2(keys_both) TW_BOUND_2(keys_if)
      case bound_select: top -= 2; top->bound = tw::bound_select(top->bound, top[1].bound, top[2].bound); break;
      TW_LINES(line_add, line) TW_LINES(line_sub, line) TW_LINES(line_mul, line) TW_LINES(line_div, line)
      TW_LINES(keys_up_to, bound) TW_LINES(keys_below, bound)
#undef TW_PUSH
#undef TW_BOUND_1
#undef TW_BOUND_2
#undef TW_LINES
    }
    tw::Ranges<RANGES> ranges;
    for (int n = 0; n < RANGES; ++n) ranges.of[n] = stack[n].bound;
    return ranges;
  }
};

// How many tiles queries `first` … `last` of any of the heads see of so many keys. `stack`: [steps].
TW_INLINE int64_t visible_tiles(const Shape& shape, Value* stack, int64_t first, int64_t last, int64_t keys) {
  const tw::Bound any = tw::bound_int(), heads{0, shape.kv_heads * shape.group - 1};
  const tw::Tile tile{tw::Bound{first, last}, any, heads, tw::Bound{0, shape.kv_heads - 1}, any, any, any, tw::bound(keys)};
  tw::Pages pages{};
  pages.length = static_cast<int32_t>(keys);
  if (shape.cases == 1) return tw::tiles_seen<cuts::TILE>(Mask<1>{shape, stack}, tile, pages).count();
  if (shape.cases == 2) return tw::tiles_seen<cuts::TILE>(Mask<2>{shape, stack}, tile, pages).count();
  return tw::tiles_seen<cuts::TILE>(Mask<3>{shape, stack}, tile, pages).count();
}

}  // namespace extents
