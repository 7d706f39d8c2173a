// Floats as integers: the fraction is cut off, what is out of range becomes the nearest integer of the type, NaN 0.
// cpu.h and integers.cuh include this file inside namespace tw, after TW_INLINE. It has no branches, so that loops
// become vectors.
template <class To, class From>
TW_INLINE To to_integer(From x) {
  constexpr bool SIGNED = To(-1) < To(0);
  constexpr int BITS = 8 * sizeof(To) - SIGNED;
  constexpr From HALF = From(UINT64_C(1) << (BITS - 1)), END = HALF + HALF, BEGIN = SIGNED ? -END : From(0);
  constexpr To MOST = static_cast<To>(UINT64_C(0xffffffffffffffff) >> (64 - BITS));
  const From low = x < BEGIN ? BEGIN : x;
  if constexpr (BITS < (sizeof(From) == 4 ? 24 : 53)) {  // floats hold the largest, too
    const From whole = low < From(MOST) ? low : From(MOST);
    if constexpr (BITS < 32) return static_cast<To>(static_cast<int32_t>(x == x ? whole : From(0)));
    else return static_cast<To>(x == x ? whole : From(0));
  } else {
    const To whole = static_cast<To>(low < END ? low : From(0));
    return x >= END ? MOST : whole;
  }
}
