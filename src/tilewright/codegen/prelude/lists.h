// Choices and row workspaces for loops over lists of coordinates.
namespace tw {

// `condition ? a : b` without a branch, which random lists would mispredict every other time.
template <class T>
TW_INLINE T pick(bool condition, T a, T b) {
  using bits = typename int_of<sizeof(T)>::type;
  bits x, y;
  __builtin_memcpy(&x, &a, sizeof(T));
  __builtin_memcpy(&y, &b, sizeof(T));
  y ^= (x ^ y) & -static_cast<bits>(condition);
  __builtin_memcpy(&a, &y, sizeof(T));
  return a;
}

// The coordinates of one row and what belongs to each: entries in the order of their arrival, found by
// a hash table with linear probing, which takes memory in proportion to the longest row. A slot of
// the table is empty unless it has the stamp of this row, so that clearing costs nothing.
template <class K, class V>
struct row_workspace {
  struct entry { K key; V value; };
  struct slot { uint32_t stamp, number; };

  entry* entries;
  int64_t count = 0;

  row_workspace() { allocate(6); }
  ~row_workspace() { release(); }
  row_workspace(const row_workspace&) = delete;

  inline __attribute__((always_inline)) void add(K key, V value) {
    uint32_t at = hash(key);
    while (slots[at].stamp == stamp) {
      entry& e = entries[slots[at].number];
      if (e.key == key) {
        e.value += value;
        return;
      }
      at = (at + 1) & mask;
    }
    slots[at] = {stamp, static_cast<uint32_t>(count)};
    entries[count++] = {key, value};
    if (count > mask / 2) grow();
  }
  void clear() {
    count = 0;
    use(6);
  }
  // Ascending keys: sorted runs of 8 by insertion, merged by doubling.
  void sort() {
    const int64_t run = 8;
    for (int64_t first = 0; first < count; first += run) {
      const int64_t last = first + run < count ? first + run : count;
      for (int64_t i = first + 1; i < last; ++i) {
        const entry e = entries[i];
        int64_t j = i;
        for (; j > first && e.key < entries[j - 1].key; --j) entries[j] = entries[j - 1];
        entries[j] = e;
      }
    }
    for (int64_t width = run; width < count; width *= 2) {
      for (int64_t first = 0; first < count; first += 2 * width) {
        const int64_t middle = first + width < count ? first + width : count;
        const int64_t last = middle + width < count ? middle + width : count;
        int64_t a = first, b = middle;
        for (int64_t i = first; i < last; ++i) {
          const bool right = a == middle || (b < last && entries[b].key < entries[a].key);
          spare[i] = entries[right ? b : a];
          a += !right;
          b += right;
        }
      }
      entry* merged = spare;
      spare = entries;
      entries = merged;
    }
  }

 private:
  entry* spare;
  slot* slots;
  uint32_t stamp, mask;
  int bits, allocated;

  uint32_t hash(K key) const {
    return static_cast<uint32_t>((static_cast<uint64_t>(key) * UINT64_C(0x9E3779B97F4A7C15)) >> (64 - bits));
  }
  // An empty table of 2^n slots, in the memory that there is.
  void use(int n) {
    bits = n;
    mask = (1u << n) - 1;
    if (++stamp == 0) {
      __builtin_memset(slots, 0, sizeof(slot) << allocated);
      stamp = 1;
    }
  }
  void allocate(int n) {
    allocated = n;
    entries = static_cast<entry*>(__builtin_malloc(sizeof(entry) << n));
    spare = static_cast<entry*>(__builtin_malloc(sizeof(entry) << n));
    slots = static_cast<slot*>(__builtin_calloc(sizeof(slot), int64_t(1) << n));
    if (!entries || !spare || !slots) __builtin_trap();
    stamp = 0;
    use(n);
  }
  void release() {
    __builtin_free(entries);
    __builtin_free(spare);
    __builtin_free(slots);
  }
  __attribute__((noinline)) void grow() {
    if (bits == allocated) {
      entry *old = entries, *old_spare = spare;
      __builtin_free(slots);
      allocate(bits + 1);
      __builtin_memcpy(entries, old, count * sizeof(entry));
      __builtin_free(old);
      __builtin_free(old_spare);
    } else {
      use(bits + 1);
    }
    for (int64_t i = 0; i < count; ++i) {
      uint32_t at = hash(entries[i].key);
      while (slots[at].stamp == stamp) at = (at + 1) & mask;
      slots[at] = {stamp, static_cast<uint32_t>(i)};
    }
  }
};

}  // namespace tw
